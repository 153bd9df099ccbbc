"""Pictures: heat where the map is hot, captions under their image, nothing cut off in silence."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from openblip.picture import caption_grid, draw_heatmaps, heat_overlay

GREY = Image.new("RGB", (64, 48), (100, 100, 100))


def test_no_heat_leaves_the_image_as_it_is():
    for heat in (np.zeros((3, 4)), np.full((3, 4), -1.0)):
        assert np.array_equal(heat_overlay(GREY, heat), GREY)


def test_heat_is_red_where_the_map_is_hot():
    heat = np.zeros((3, 4))
    heat[0, 3] = 1  # top right
    over = np.asarray(heat_overlay(GREY, heat)).astype(int)
    assert over.shape == (48, 64, 3)
    red, green, _ = over[8, 56]
    assert red - green > 80
    assert np.array_equal(over[40, 8], [100, 100, 100]), "bottom left is cold"
    hottest = np.unravel_index((over[..., 0] - over[..., 1]).argmax(), (48, 64))
    assert hottest[0] < 16 and hottest[1] >= 48
    assert np.array_equal(heat_overlay(GREY, heat * 5), heat_overlay(GREY, heat)), "1 and more is the same"


def test_any_kind_of_image_can_be_shown():
    for mode in ("L", "P", "RGBA", "CMYK", "1", "I;16"):
        image = Image.new(mode, (20, 30))
        assert heat_overlay(image, np.ones((2, 2))).mode == "RGB"
        assert caption_grid([image], ["a"]).mode == "RGB"


def test_a_strip_has_the_image_and_a_picture_per_word():
    maps = np.zeros((2, 4, 4))
    maps[0, 0, 0], maps[1, 3, 3] = 4, 2
    strip = draw_heatmaps(Image.new("RGB", (100, 100), (90, 90, 90)), ["cat", "mat"], maps, tile=100)
    assert strip.width == 3 * 106 + 6
    pixels = np.asarray(strip).astype(int)
    heat = pixels[..., 0] - pixels[..., 1]
    tiles = [heat[6:106, 6 + 106 * i : 106 + 106 * i] for i in range(3)]
    assert abs(tiles[0]).max() == 0, "the image itself"
    assert tiles[1][5, 5] > 80 and abs(tiles[1][90, 90]) < 5
    assert tiles[2].max() < tiles[1].max(), "maps share one scale: half as hot is less red"
    assert (pixels[110:, 112:212] < 128).any(), "a label below"
    assert (pixels[110:, 6:106] > 200).all(), "none under the image"
    flat = np.asarray(draw_heatmaps(GREY, ["x"], np.zeros((1, 2, 2)), tile=100)).astype(int)
    assert abs(flat[6:100, 112:212, 0] - flat[6:100, 112:212, 1]).max() == 0, (
        "no heat at all is no division by 0"
    )


def test_a_grid_keeps_proportions_and_order():
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    images = [Image.new("RGB", (50, 25), colour) for colour in colours]
    sheet = np.asarray(caption_grid(images, ["one", "two", "three"], columns=2, tile=100))
    assert sheet.shape[1] == 2 * 106 + 6
    for i, colour in enumerate(colours):
        is_colour = (abs(sheet.astype(int) - colour).max(axis=-1) < 30).nonzero()
        height, width = (int(axis.max() - axis.min()) + 1 for axis in is_colour)
        assert (height, width) == (50, 100), "twice as wide as high"
        assert (is_colour[1].min() > 100) == (i == 1) and (is_colour[0].min() > 100) == (i == 2)


def ink(text: str, tile: int = 120) -> np.ndarray:
    """Where letters are under a white image."""
    sheet = np.asarray(caption_grid([Image.new("RGB", (10, 10), "white")], [text], tile=tile).convert("L"))
    return sheet < 128


def test_long_captions_are_wrapped_and_cut_visibly():
    short, long = (
        ink("a dog"),
        ink("a dog and a cat and a bird and a fish in a row of houses by the sea " * 4),
    )
    assert long.shape[0] > short.shape[0]
    assert not long[:, :4].any() and not long[:, -4:].any(), "within the tile"
    four_lines = ink("word " * 12)
    assert ink("word " * 500).shape == ink("word " * 40).shape
    assert four_lines.shape[0] <= long.shape[0]
    unbroken = ink("x" * 200)
    assert unbroken.any() and not unbroken[:, -4:].any(), "a word without spaces is broken"


def test_wrapping_loses_no_word_that_fits():
    from openblip.picture import _wrapped

    font = ImageFont.load_default(13)
    text = "the quick brown fox jumps over the lazy dog"
    lines = _wrapped(text, font, 130)
    assert " ".join(lines) == text and 1 < len(lines) <= 4
    assert all(font.getlength(line) <= 130 for line in lines)
    cut = _wrapped(text * 5, font, 130)
    assert len(cut) == 4 and cut[-1].endswith("…") and font.getlength(cut[-1]) <= 130
    assert _wrapped("", font, 130) == [""]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: caption_grid([], []), "0 images and 0 captions"),
        (lambda: caption_grid([GREY], ["a", "b"]), "1 images and 2 captions"),
        (
            lambda: draw_heatmaps(GREY, ["a", "b"], np.zeros((1, 2, 2))),
            r"2 words and maps of shape \(1, 2, 2\)",
        ),
        (lambda: heat_overlay(GREY, np.zeros(3)), r"shape \(3,\)"),
        (lambda: heat_overlay(GREY, np.full((2, 2), np.nan)), "finite"),
    ],
)
def test_what_cannot_be_drawn(call, message):
    with pytest.raises(ValueError, match=message):
        call()
