"""The pixels of a folder's preprocessor_config.json are those of the processor that wrote it."""

import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

# By their modules: the package's lazy door would ask for torchvision.
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from openblip.config import UserError, from_dict, to_dict
from openblip.convert.preprocessor import image_transform
from openblip.data.image import open_image
from openblip.data.tiles import XGENMM_GRIDS, TileTransform
from openblip.data.transforms import ImageTransform

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
SQUARE = {"height": 32, "width": 32}


def photo(width: int, height: int) -> Image.Image:
    """Smooth colours, edges and noise, so that no two ways of resizing agree."""
    rng = np.random.default_rng(width * 1009 + height)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (7 + c)) * np.cos(y / (9 + c)) * 90 + 128 for c in range(3)]
    edges = 60 * ((x // 11 + y // 17) % 2)[..., None]
    noise = rng.integers(-20, 20, size=(height, width, 3))
    return Image.fromarray((np.stack(waves, axis=-1) + edges + noise).clip(0, 255).astype(np.uint8))


def with_alpha(width: int, height: int) -> Image.Image:
    image = photo(width, height).convert("RGBA")
    image.putalpha(
        Image.fromarray(np.random.default_rng(3).integers(0, 256, (height, width), dtype=np.uint8))
    )
    return image


def stored(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


PICTURES = {
    "wide": stored(photo(301, 40), "PNG"),
    "tall": stored(photo(37, 203), "PNG"),
    "very wide": stored(photo(500, 7), "PNG"),
    "tiny": stored(photo(5, 3), "PNG"),
    "one pixel": stored(photo(1, 1), "PNG"),
    "as large as the crop": stored(photo(32, 32), "PNG"),
    "JPEG": stored(photo(150, 120), "JPEG", quality=80),
    "palette": stored(photo(90, 61).convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
    "palette with a clear colour": stored(
        photo(90, 61).convert("P", palette=Image.Palette.ADAPTIVE), "PNG", transparency=7
    ),
    "GIF": stored(photo(64, 99).convert("P"), "GIF"),
    "grey": stored(photo(73, 64).convert("L"), "PNG"),
    "grey with alpha": stored(with_alpha(73, 64).convert("LA"), "PNG"),
    "black and white": stored(photo(73, 64).convert("1"), "PNG"),
    "RGBA": stored(with_alpha(80, 50), "PNG"),
    "CMYK": stored(photo(50, 80).convert("CMYK"), "JPEG"),
}
PEERS = {
    "CLIP": ("clip", CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE)),
    "CLIP, old numbers": ("clip", CLIPImageProcessorPil(size=32, crop_size=32)),
    "BLIP": ("blip", BlipImageProcessorPil(size=SQUARE)),
    "BLIP-2": ("blip-2", BlipImageProcessorPil(size={"height": 24, "width": 24})),
    "InstructBLIP": ("instructblip", BlipImageProcessorPil(size=24)),
    "SigLIP": ("siglip", SiglipImageProcessorPil(size=SQUARE)),
    "DINOv2": ("dinov2", BitImageProcessorPil(size={"shortest_edge": 37}, crop_size=SQUARE, **IMAGENET)),
    "ViT": ("vit", ViTImageProcessorPil(size=SQUARE, do_convert_rgb=True)),
    "DeiT": ("deit", DeiTImageProcessorPil(size={"height": 37, "width": 37}, crop_size=SQUARE, do_convert_rgb=True)),
    "crop beyond the picture": ("clip", CLIPImageProcessorPil(size={"shortest_edge": 21}, crop_size=SQUARE)),
    "no norm": ("blip", BlipImageProcessorPil(size=SQUARE, do_normalize=False)),
    "one number for all colours": ("blip", BlipImageProcessorPil(size=SQUARE, image_mean=0.4, image_std=0.3)),
    "lanczos": ("blip", BlipImageProcessorPil(size=SQUARE, resample=1)),
    "nearest": ("blip", BlipImageProcessorPil(size=SQUARE, resample=0)),
    "crop switched off": ("clip", CLIPImageProcessorPil(size=SQUARE, do_center_crop=False)),
}  # fmt: skip


def read(kind: str, peer, folder) -> ImageTransform:
    """The transform of the file that `peer` saves."""
    peer.save_pretrained(folder)
    file = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    transform, notes = image_transform(kind, 999, file)
    assert notes == []
    return transform


@pytest.mark.parametrize("family", PEERS)
def test_pixels_are_those_of_transformers(family, tmp_path):
    kind, peer = PEERS[family]
    transform = read(kind, peer, tmp_path)
    for name, encoded in PICTURES.items():
        theirs = peer(Image.open(io.BytesIO(encoded)), return_tensors="pt")["pixel_values"][0]
        mine = transform(open_image(encoded))
        assert mine.shape == theirs.shape and (mine - theirs).abs().max() <= 1e-6, name


@pytest.mark.parametrize(
    "change",
    [{"resize_size": None}, {"interpolation": "bilinear"}, {"resize": "squash"}, {"mean": (0.5, 0.5, 0.5)}],
    ids=str,
)
def test_a_fault_is_seen(change, tmp_path):
    from dataclasses import replace

    kind, peer = PEERS["DINOv2"]
    wrong = replace(read(kind, peer, tmp_path), **change)
    encoded = PICTURES["wide"]
    theirs = peer(Image.open(io.BytesIO(encoded)), return_tensors="pt")["pixel_values"][0]
    assert (wrong(open_image(encoded)) - theirs).abs().max() > 0.05


def test_transparency_shows_white():
    assert with_alpha(40, 40).getchannel("A").getextrema() == (
        0,
        255,
    )  # so that the comparison above means something
    clear = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    assert image_transform("blip", 8, None)[0](open_image(clear)).min() > 1.9


def test_what_a_file_leaves_out_is_what_its_class_assumes():
    classes = {"clip": CLIPImageProcessorPil, "blip": BlipImageProcessorPil, "vit": ViTImageProcessorPil}
    for kind, peer in classes.items():
        full = image_transform(kind, 1, json.loads(peer().to_json_string()))[0]
        assert image_transform(kind, 1, {})[0] == full
    bit = image_transform("dinov2", 1, {"image_processor_type": "BitImageProcessor"})[0]
    assert bit == image_transform("dinov2", 1, json.loads(BitImageProcessorPil().to_json_string()))[0]
    assert bit == ImageTransform(224, resize="crop")  # CLIP's statistics, as the class has them
    nested = {"processor_class": "BlipProcessor", "image_processor": {"size": 48}}
    assert image_transform("blip", 1, nested)[0] == ImageTransform(48)
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 48, "crop_size": 40}
    assert image_transform("blip", 1, old)[0] == ImageTransform(40, resize="crop", resize_size=48)


def test_without_a_file_it_is_what_is_usual_at_the_models_size():
    transform, notes = image_transform("dinov2", 448, None)
    assert (transform.image_size, transform.resize_size, transform.resize) == (448, 512, "crop")
    assert "no preprocessor_config.json" in notes[0]
    assert image_transform("clip", 336, None)[0] == ImageTransform(336, resize="crop")
    assert image_transform("siglip", 384, None)[0].std == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_resize": False}, "do_resize is false"),
        ({"do_rescale": False}, "do_rescale is false"),
        ({"rescale_factor": 1 / 127.5}, "by 1/255 alone"),
        ({"do_pad": True}, "do_pad is true"),
        ({"resample": 4}, "resample 4; known are"),
        ({"size": {"height": 30, "width": 40}}, "only one square size"),
        ({"size": {"shortest_edge": 30, "longest_edge": 40}}, "only one square size"),
        ({"size": {"shortest_edge": 30}}, "images of many shapes"),
        ({"do_center_crop": True}, "crop_size None"),
        ({"do_center_crop": True, "crop_size": [30, 20]}, "only one square size"),
        ({"image_processor_type": "FuyuImageProcessor"}, "FuyuImageProcessor; known are"),
        ({"image_mean": [0.5, 0.5]}, "mean"),
        ({"resize_mode": "longest"}, "only squash"),
    ],
    ids=str,
)
def test_a_step_that_is_not_done_here_is_an_error(changes, message):
    with pytest.raises(UserError, match=message):
        image_transform("blip", 32, {"size": 32} | changes)


def test_a_transform_saved_before_there_was_a_resize_size_is_read():
    old = to_dict(ImageTransform(48, resize="crop"))
    del old["resize_size"]
    assert from_dict(ImageTransform, old, "here") == ImageTransform(48, resize="crop")


# ---------------------------------------------------------------------------------------------- xGen-MM


def released_tiles(image: Image.Image, side: int, mean: float, std: float) -> torch.Tensor:
    """Any resolution as the released training code writes it down: base first, then the canvas row by row."""
    width, height = image.size
    best, most, least_waste = None, 0, math.inf
    for columns, rows in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)):
        scale = min(columns * side / width, rows * side / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        waste = columns * side * rows * side - effective
        if effective > most or (effective == most and waste < least_waste):
            best, most, least_waste = (columns * side, rows * side), effective, waste
    scale_x, scale_y = best[0] / width, best[1] / height
    if scale_x < scale_y:
        size = (best[0], min(math.ceil(height * scale_x), best[1]))
    else:
        size = (min(math.ceil(width * scale_y), best[0]), best[1])
    canvas = Image.new("RGB", best, (0, 0, 0))
    canvas.paste(image.resize(size), ((best[0] - size[0]) // 2, (best[1] - size[1]) // 2))
    tiles = [image.resize((side, side))]
    for top in range(0, best[1], side):
        tiles += [canvas.crop((left, top, left + side, top + side)) for left in range(0, best[0], side)]
    pixels = np.stack([np.asarray(tile) for tile in tiles]).astype(np.float64) / 255
    return torch.from_numpy((pixels - mean) / std).permute(0, 3, 1, 2).float()


@pytest.mark.parametrize("size", [(301, 40), (37, 203), (90, 61), (20, 20), (64, 64), (130, 128)], ids=str)
def test_tiles_are_those_of_the_released_code(size):
    file = {
        "image_processor_type": "Blip3ImageProcessor", "size": [32, 32], "resize_mode": "squash",
        "interpolation_mode": "bicubic", "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_resize": True,
    }  # fmt: skip
    transform = TileTransform(image_transform("xgenmm", 32, file)[0], XGENMM_GRIDS)
    encoded = stored(photo(*size), "PNG")
    theirs = released_tiles(Image.open(io.BytesIO(encoded)), 32, 0.5, 0.5)
    found = transform(open_image(encoded)).pixel_values
    assert found.shape == theirs.shape and (found - theirs).abs().max() <= 1e-6
    other = TileTransform(ImageTransform(32), XGENMM_GRIDS)(open_image(encoded)).pixel_values
    assert (other - theirs).abs().max() > 0.1  # CLIP's statistics are not SigLIP's
