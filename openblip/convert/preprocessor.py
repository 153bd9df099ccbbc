"""preprocessor_config.json of transformers' models -> our `ImageTransform`: the same pixel values, or an error.

"The same" is measured against transformers' PIL processors. What its torchvision processors resize differs from
them by a few levels of 255, as it does from us.
"""

from collections.abc import Mapping
from typing import Any

from openblip.config import UserError, from_dict
from openblip.convert.parts import DINOV2_MEAN, DINOV2_STD
from openblip.data.transforms import CLIP_MEAN, CLIP_STD, ImageTransform

_FILE = "preprocessor_config.json"
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL's numbers
_CLIP = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "resample": 3}
_HALF = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5), "resample": 3}
_CROP = {"size": {"shortest_edge": 224}, "crop_size": 224, "do_center_crop": True, "default_to_square": False}

# What each class assumes for a key that the file leaves out.
_CLASSES: dict[str, dict[str, Any]] = {
    "BlipImageProcessor": {"size": 384, **_CLIP},
    "CLIPImageProcessor": {**_CROP, **_CLIP},
    "BitImageProcessor": {**_CROP, **_CLIP},
    "SiglipImageProcessor": {"size": {"height": 224, "width": 224}, "default_to_square": False, **_HALF},
    "ViTImageProcessor": {"size": 224, **_HALF, "resample": 2},
    "DeiTImageProcessor": {"size": 256, "crop_size": 224, "do_center_crop": True, **_HALF},
    "Blip3ImageProcessor": {"size": 378, **_CLIP},  # xGen-MM's, of each of its tiles
}
_HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_DINOV2 = ImageTransform(224, DINOV2_MEAN, DINOV2_STD, resize="crop", resize_size=256)
# model_type -> the class in its files, and what is usual where there is no file.
_USUAL = {
    "blip": ("BlipImageProcessor", ImageTransform(384)),
    "blip-2": ("BlipImageProcessor", ImageTransform(224)),
    "instructblip": ("BlipImageProcessor", ImageTransform(224)),
    "clip": ("CLIPImageProcessor", ImageTransform(224, resize="crop")),
    "dinov2": ("BitImageProcessor", _DINOV2),
    "siglip": ("SiglipImageProcessor", ImageTransform(224, *_HALVES)),
    "siglip_vision_model": ("SiglipImageProcessor", ImageTransform(224, *_HALVES)),
    "vit": ("ViTImageProcessor", ImageTransform(224, *_HALVES, interpolation="bilinear")),
    "deit": ("DeiTImageProcessor", ImageTransform(224, DINOV2_MEAN, DINOV2_STD, resize_size=256)),
    "xgenmm": ("Blip3ImageProcessor", ImageTransform(384, *_HALVES)),
}


def image_transform(
    kind: str, image_size: int, processor: Mapping[str, Any] | None
) -> tuple[ImageTransform, list[str]]:
    """The image transform that a preprocessor_config.json describes, and what deserves to be known about it.

    Without one (None) it is what is usual for the model_type `kind`, at the `image_size` of the model. Raises
    UserError for steps `ImageTransform` does not have.
    """
    usual_class, usual = _USUAL[kind]
    if processor is None:
        return usual.at(image_size), [f"no {_FILE}: images are prepared as is usual for {kind}"]
    processor = processor.get("image_processor", processor)  # of a processor_config.json
    name = processor.get("image_processor_type") or processor.get("feature_extractor_type") or usual_class
    name = name.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    if name not in _CLASSES:
        raise UserError(f"{_FILE}: image_processor_type {name}; known are {', '.join(_CLASSES)}")
    found: dict[str, Any] = _CLASSES[name] | {
        key: value for key, value in processor.items() if value is not None
    }
    return from_dict(ImageTransform, _settings(found), _FILE), []


def _settings(found: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an `ImageTransform`."""
    if found.get("resize_mode", "squash") != "squash":  # xGen-MM's
        raise UserError(f"{_FILE}: resize_mode {found['resize_mode']!r}; only squash is supported")
    for step in ("do_resize", "do_rescale"):
        if not found.get(step, True):
            raise UserError(f"{_FILE}: {step} is false, and a step that is always done here")
    if found.get("do_pad"):
        raise UserError(f"{_FILE}: do_pad is true, and no step that is done here")
    if abs(found.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise UserError(f"{_FILE}: pixels are scaled by {found['rescale_factor']}, here by 1/255 alone")
    interpolation = found.get(
        "interpolation_mode", _RESAMPLE.get(found["resample"])
    )  # the first is xGen-MM's
    if interpolation is None:
        raise UserError(f"{_FILE}: resample {found['resample']!r}; known are PIL's {_RESAMPLE}")
    resize, size = _resize(found["size"], square=found.get("default_to_square", True))
    crop = _side(found.get("crop_size"), "crop_size") if found.get("do_center_crop") else size
    if resize == "crop" and not found.get("do_center_crop"):
        raise UserError(f"{_FILE}: size {found['size']} and no do_center_crop: images of many shapes")
    settings = {"resize": resize, "image_size": crop, "interpolation": interpolation}
    if size != crop:
        settings["resize_size"] = size
    normalise = found.get("do_normalize", True)
    mean, std = (found["image_mean"], found["image_std"]) if normalise else (0.0, 1.0)
    return settings | {"mean": _three(mean), "std": _three(std)}


def _resize(size: Any, *, square: bool) -> tuple[str, int]:
    """("squash" or "crop", pixels) of "size" as it may stand in the file; a number alone is one or the other."""
    if isinstance(size, Mapping) and size.keys() == {"shortest_edge"}:
        return "crop", size["shortest_edge"]
    if isinstance(size, int) and not square:
        return "crop", size
    return "squash", _side(size, "size")


def _side(size: Any, key: str) -> int:
    """The side of a square."""
    sides = [size.get("height"), size.get("width")] if isinstance(size, Mapping) else size
    height, width = sides if isinstance(sides, list | tuple) and len(sides) == 2 else (sides, sides)
    if height != width or not isinstance(height, int):
        raise UserError(f"{_FILE}: {key} {size}: only one square size is supported")
    return height


def _three(value: Any) -> Any:
    """One number is that of all three colours."""
    return (value,) * 3 if isinstance(value, int | float) else value
