"""transforms.py: transformers' pixels at evaluation, the paper's augmentation, random only as told."""

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from openblip.config import ConfigError, from_dict, to_dict
from openblip.data import transforms
from openblip.data.transforms import (
    RANDOM_AUGMENT,
    ImageTransform,
    TrainTransform,
    exchange_left_right,
    random_augment,
    random_crop_box,
    rotate,
    swap_pair,
    warp,
)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with some noise: interpolation has something to do."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (7 + c)) * np.cos(y / (9 + c)) * 100 + 128 for c in range(3)]
    noise = rng.integers(-20, 20, size=(height, width, 3))
    return Image.fromarray((np.stack(waves, axis=-1) + noise).clip(0, 255).astype(np.uint8))


SIZES = [(64, 48), (37, 91), (224, 224), (301, 200), (15, 10), (32, 32), (33, 65), (500, 7)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_evaluation_equals_transformers(size, resize):
    # By their modules: the package's lazy door would ask for torchvision.
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    if resize == "squash":
        peer = BlipImageProcessorPil(size={"height": 32, "width": 32})
    else:
        peer = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    image = picture(*size)
    theirs = peer(image, return_tensors="pt")["pixel_values"][0]
    ours = ImageTransform(32, resize=resize)(image)
    assert ours.dtype == torch.float32 and ours.shape == (3, 32, 32)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)

    if size != (32, 32):  # the comparison can fail: another interpolation is far away
        other = ImageTransform(32, resize=resize, interpolation="bilinear")(image)
        assert (other - theirs).abs().max() > 1e-3


def test_squash_and_crop_differ_on_a_picture_that_is_not_square():
    image = picture(90, 40)
    assert (ImageTransform(32)(image) - ImageTransform(32, resize="crop")(image)).abs().max() > 0.1


def test_another_size_cuts_off_as_much():
    assert ImageTransform(224, resize_size=256).at(448) == ImageTransform(448, resize_size=512)
    assert ImageTransform(224, resize="crop").at(336) == ImageTransform(336, resize="crop")


def test_a_transform_survives_json():
    for transform in (
        ImageTransform(48, resize="crop", resize_size=50),
        TrainTransform(48, scale=(0.5, 1.0)),
    ):
        assert from_dict(type(transform), to_dict(transform), "here") == transform


@pytest.mark.parametrize(
    "make",
    [
        lambda: ImageTransform(0),
        lambda: ImageTransform(std=(1, 0, 1)),
        lambda: ImageTransform(resize="stretch"),
        lambda: ImageTransform(interpolation="cubic"),
        lambda: ImageTransform(resize_size=0),
        lambda: TrainTransform(scale=(0, 1)),
        lambda: TrainTransform(scale=(0.5, 0.2)),
        lambda: TrainTransform(ratio=(2, 1)),
        lambda: TrainTransform(magnitude=11),
    ],
)
def test_impossible_values_are_refused(make):
    with pytest.raises(ConfigError):
        make()


def test_only_rgb_is_transformed():
    with pytest.raises(ValueError, match="RGB"):
        ImageTransform(8)(Image.new("RGBA", (8, 8)))


def test_training_depends_on_the_generator_and_on_nothing_else():
    transform, image = TrainTransform(32), picture(80, 60)
    first = transform(image, np.random.default_rng(3))
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    again = transform(image, np.random.default_rng(3))
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    assert torch.equal(first, again)
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])
    assert not torch.equal(first, transform(image, np.random.default_rng(4)))
    assert first.shape == (3, 32, 32) and first.dtype == torch.float32


def test_training_without_augmentation_is_the_evaluation_transform_or_its_mirror_image():
    image = picture(40, 40)
    transform = TrainTransform(32, scale=(1, 1), ratio=(1, 1), randaugment=False)
    plain = ImageTransform(32)(image)
    mirrored = ImageTransform(32)(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    flips = 0
    for seed in range(400):
        tensor = transform(image, np.random.default_rng(seed))
        flips += torch.equal(tensor, mirrored)
        assert torch.equal(tensor, plain) or torch.equal(tensor, mirrored)
    assert 150 < flips < 250  # half, at five standard deviations
    still = TrainTransform(32, scale=(1, 1), ratio=(1, 1), randaugment=False, flip=False)
    assert all(torch.equal(still(image, np.random.default_rng(seed)), plain) for seed in range(20))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 600), st.integers(1, 600), st.integers(0, 10**6), st.sampled_from([0.08, 0.2, 0.5]))
def test_crop_boxes_lie_inside_and_keep_scale_and_ratio(width, height, seed, least):
    rng = np.random.default_rng(seed)
    left, top, right, bottom = random_crop_box(width, height, (least, 1.0), (3 / 4, 4 / 3), rng)
    w, h = right - left, bottom - top
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    # Sides are rounded to whole pixels, by half a pixel at most.
    if 0.75 <= width / height <= 4 / 3:
        assert (w + 0.5) * (h + 0.5) >= least * width * height
    assert (w + 0.5) / (h - 0.5) >= 3 / 4 and (w - 0.5) / (h + 0.5) <= 4 / 3


def test_crop_boxes_cover_the_whole_range():
    rng = np.random.default_rng(0)
    boxes = [random_crop_box(400, 400, (0.2, 1.0), (3 / 4, 4 / 3), rng) for _ in range(2000)]
    shares = np.array([(r - l) * (b - t) / 160_000 for l, t, r, b in boxes])  # noqa: E741
    aspects = np.log([(r - l) / (b - t) for l, t, r, b in boxes])  # noqa: E741
    assert shares.min() < 0.22 and shares.max() > 0.95
    assert aspects.min() < math.log(0.78) and aspects.max() > math.log(1.28)
    assert abs(aspects.mean()) < 0.02  # log-uniform: wide and tall are alike
    assert len({box[:2] for box in boxes}) > 1000


@pytest.mark.parametrize(
    ("size", "box"), [((1000, 6), (496, 0, 504, 6)), ((6, 1000), (0, 496, 6, 504)), ((1, 1), (0, 0, 1, 1))]
)
def test_a_picture_too_narrow_to_crop_gives_its_centre(size, box):
    assert random_crop_box(*size, (0.9, 1.0), (3 / 4, 4 / 3), np.random.default_rng(0)) == box


def bilinear(pixels: np.ndarray, matrix: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The warp by its definition, a second way, and which pixels come from inside the picture."""
    height, width, _ = pixels.shape
    y, x = np.mgrid[:height, :width]
    sx = matrix[0] * x + matrix[1] * y + matrix[2]
    sy = matrix[3] * x + matrix[4] * y + matrix[5]
    inside = (sx >= 0) & (sx <= width - 1) & (sy >= 0) & (sy <= height - 1)
    x0, y0 = np.clip(np.floor(sx), 0, width - 2).astype(int), np.clip(np.floor(sy), 0, height - 2).astype(int)
    fx, fy = (sx - x0)[..., None], (sy - y0)[..., None]
    upper = pixels[y0, x0] * (1 - fx) + pixels[y0, x0 + 1] * fx
    lower = pixels[y0 + 1, x0] * (1 - fx) + pixels[y0 + 1, x0 + 1] * fx
    return upper * (1 - fy) + lower * fy, inside


def about_centre(degrees: float, width: int, height: int) -> tuple[float, ...]:
    turn = np.array([[math.cos(a := math.radians(degrees)), -math.sin(a)], [math.sin(a), math.cos(a)]])
    centre = np.array([width / 2, height / 2])
    shift = centre - turn @ centre
    return (*turn[0], shift[0], *turn[1], shift[1])


@pytest.mark.parametrize(
    ("name", "matrix"),
    [
        ("shear_x", (1, 0.15, 0, 0, 1, 0)),
        ("shear_y", (1, 0, 0, 0.15, 1, 0)),
        ("translate_x", (1, 0, 5, 0, 1, 0)),
        ("translate_y", (1, 0, 0, 0, 1, 5)),
        ("rotate", about_centre(15, 60, 44)),
    ],
)
def test_movements_have_the_papers_magnitude_in_pixel_coordinates(name, matrix):
    image = picture(60, 44)
    moved = np.asarray(RANDOM_AUGMENT[name](image, 0.5, 1), dtype=float)
    wanted, inside = bilinear(np.asarray(image, dtype=float), matrix)
    assert inside.mean() > 0.6
    assert np.abs(moved - wanted)[inside].max() < 1.5  # rounding to 8 bits
    far_outside = ~inside  # and so are the neighbours: what lies on the very edge is either's
    for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
        far_outside &= ~np.roll(inside, step, axis)
    assert far_outside.any() and (moved[far_outside] == 128).all()
    # A shift of half a pixel, which PIL's own coordinates would give a shear, is seen.
    other, _ = bilinear(np.asarray(image, dtype=float), (*matrix[:2], matrix[2] + 0.5, *matrix[3:]))
    assert np.abs(moved - other)[inside].max() > 5


def test_the_other_sign_moves_the_other_way():
    image = picture(60, 44)
    there = RANDOM_AUGMENT["translate_x"](image, 0.5, 1)
    back = RANDOM_AUGMENT["translate_x"](there, 0.5, -1)
    assert np.array_equal(np.asarray(back)[:, 5:], np.asarray(image)[:, 5:])
    assert not np.array_equal(np.asarray(there), np.asarray(back))


def test_warp_by_the_identity_and_a_full_turn_change_nothing():
    image = picture(31, 20)
    assert np.array_equal(np.asarray(warp(image, (1, 0, 0, 0, 1, 0))), np.asarray(image))
    turned = np.asarray(rotate(image, 360), dtype=int)
    assert np.abs(turned - np.asarray(image, dtype=int))[1:-1, 1:-1].max() <= 1


def test_colour_operations_do_what_the_paper_says_at_magnitude_5():
    image = picture(160, 120)
    dull = image.point(lambda value: 60 + value // 4)
    for name in ("identity", "brightness", "sharpness"):  # enhancement factor 0.5 · 1.8 + 0.1 = 1
        assert np.array_equal(np.asarray(RANDOM_AUGMENT[name](dull, 0.5, 1)), np.asarray(dull)), name
    stretched = np.asarray(RANDOM_AUGMENT["autocontrast"](dull, 0.5, 1))
    assert stretched.min() == 0 and stretched.max(axis=(0, 1)).min() >= 254  # the table is rounded down
    levels = np.asarray(RANDOM_AUGMENT["equalize"](dull, 0.5, 1))[..., 0]
    assert np.abs(np.percentile(levels, [25, 50, 75]) - [64, 128, 191]).max() < 20  # evenly spread
    assert np.ptp(np.asarray(dull)) < 70
    bright = np.asarray(RANDOM_AUGMENT["brightness"](dull, 1.0, 1), dtype=float)
    assert np.abs(bright - (np.asarray(dull) * 1.9).clip(0, 255)).max() <= 1


def test_operations_are_drawn_evenly_with_probability_a_half_and_both_signs(monkeypatch):
    seen = []
    spies = {
        name: lambda image, strength, sign, name=name: seen.append((name, strength, sign)) or image
        for name in RANDOM_AUGMENT
    }
    monkeypatch.setattr(transforms, "RANDOM_AUGMENT", spies)
    image, rng = picture(4, 4), np.random.default_rng(0)
    per_picture = Counter()
    for _ in range(4000):
        before = len(seen)
        random_augment(image, rng)
        per_picture[len(seen) - before] += 1
    names = Counter(name for name, _, _ in seen)
    assert len(names) == 10 and all(300 < count < 500 for count in names.values())  # 400 ± 5 deviations
    assert 900 < per_picture[0] < 1100 and 900 < per_picture[2] < 1100  # two draws, each with 0.5
    assert {strength for _, strength, _ in seen} == {0.5}
    assert 1800 < sum(sign == 1 for _, _, sign in seen) < 2200
    seen.clear()
    random_augment(image, rng, num_ops=50, magnitude=10)
    assert {strength for _, strength, _ in seen} == {1.0}


def test_the_ten_operations_of_the_paper():
    assert set(RANDOM_AUGMENT) == {
        *("identity", "autocontrast", "brightness", "sharpness", "equalize"),
        *("shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
    }


def test_draft_size_leaves_the_smallest_crop_its_detail():
    assert ImageTransform(224).draft_size == 224
    for least in (0.2, 0.5, 1.0):  # open_image keeps twice the draft size on both sides
        kept = 2 * TrainTransform(224, scale=(least, 1.0)).draft_size
        assert kept * math.sqrt(least) >= 224 > (kept - 4) * math.sqrt(least)


@pytest.mark.parametrize(
    ("sentence", "mirrored"),
    [
        ("the left dog is right of the cat", "the right dog is left of the cat"),
        ("on the left, a left-hand glove", "on the right, a right-hand glove"),
        ("the leftmost one, not the rightmost", "the rightmost one, not the leftmost"),
        ("leftovers look bright, the fright is upright", "leftovers look bright, the fright is upright"),
        ("", ""),
    ],
)
def test_left_and_right_are_exchanged_as_words(sentence, mirrored):
    assert exchange_left_right(sentence) == mirrored
    assert exchange_left_right(mirrored) == sentence


def test_a_pair_is_swapped_half_of_the_time_and_its_sentence_with_it():
    results = Counter(swap_pair("L", "R", "left one", np.random.default_rng(seed)) for seed in range(400))
    assert set(results) == {("L", "R", "left one"), ("R", "L", "right one")}
    assert 150 < results[("L", "R", "left one")] < 250
