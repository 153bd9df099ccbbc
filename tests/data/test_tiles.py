"""tiles.py: the grid a picture gets, where its pixels go, and what of it each tile shows."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from openblip.config import ConfigError
from openblip.data.tiles import XGENMM_GRIDS, TileTransform, choose_grid, grids_up_to, on_canvas
from openblip.data.transforms import ImageTransform
from openblip.models.tiling import content_mask

HALF = (0.5, 0.5, 0.5)  # SigLIP's mean and std: black is -1
SIDES = st.integers(1, 300)


def picture(width: int, height: int) -> Image.Image:
    """Noise without dark pixels, so that black is padding."""
    noise = np.random.default_rng(width * 1009 + height).integers(60, 256, size=(height, width, 3))
    return Image.fromarray(noise.astype(np.uint8))


def released_choice(width, height, grids, side):
    """The rule as the released code writes it down; None where it finds nothing to show."""
    best, most, least_waste = None, 0, float("inf")
    for columns, rows in grids:
        scale = min(columns * side / width, rows * side / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        waste = columns * side * rows * side - effective
        if effective > most or (effective and effective == most and waste < least_waste):
            best, most, least_waste = (columns, rows), effective, waste
    return best


@pytest.mark.parametrize(
    ("size", "grid", "tokens"),
    [
        ((500, 300), (2, 1), 384),
        ((640, 480), (2, 2), 640),
        ((480, 640), (2, 2), 640),
        ((1000, 1000), (2, 2), 640),
        ((1920, 1080), (2, 2), 640),
        ((2000, 500), (3, 1), 512),
        ((500, 2000), (1, 3), 512),
        ((300, 300), (1, 2), 384),  # ties of two tiles: the first of the list
        ((384, 384), (1, 2), 384),
        ((385, 384), (2, 1), 384),
    ],
)
def test_grids_and_token_counts_of_the_released_model(size, grid, tokens):
    columns, rows = choose_grid(*size, XGENMM_GRIDS, 384)
    assert (columns, rows) == grid
    assert 128 * (1 + columns * rows) == tokens


@pytest.mark.parametrize("grids", [XGENMM_GRIDS, grids_up_to(12)], ids=["released", "12 tiles"])
@settings(max_examples=300, deadline=None)
@given(width=st.integers(1, 4000), height=st.integers(1, 4000), side=st.sampled_from([14, 224, 384]))
def test_the_choice_is_that_of_the_released_code(grids, width, height, side):
    wanted = released_choice(width, height, grids, side)
    if wanted is not None:
        assert choose_grid(width, height, grids, side) == wanted


def test_the_first_of_the_list_wins_a_tie():
    assert choose_grid(100, 100, ((2, 1), (1, 2)), 384) == (2, 1)
    assert choose_grid(100, 100, ((1, 2), (2, 1)), 384) == (1, 2)
    assert choose_grid(100, 100, ((2, 2), (1, 2)), 384) == (1, 2)  # no tie: the smaller canvas
    assert choose_grid(100, 100, (), 384) == (0, 0)


@pytest.mark.parametrize(
    ("size", "grid"), [((1, 65535), (1, 3)), ((65535, 1), (3, 1)), ((1, 1), (1, 2)), ((1, 500), (1, 2))]
)
def test_pictures_of_a_single_row_have_tiles_too(size, grid):
    assert choose_grid(*size, XGENMM_GRIDS, 384) == grid
    tiles = TileTransform(ImageTransform(16, HALF, HALF))(picture(*size))
    assert tiles.pixel_values.shape == (1 + tiles.grid[0] * tiles.grid[1], 3, 16, 16)
    assert tiles.pixel_values.isfinite().all() and tiles.grid[2:] == size
    assert (tiles.pixel_values[1:] > -1).any()


def test_larger_sets_hold_every_grid_once():
    assert grids_up_to(4) == ((1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (2, 2), (4, 1))
    grids = grids_up_to(12)
    wanted = {(c, r) for c in range(1, 13) for r in range(1, 13) if 2 <= c * r <= 12}
    assert set(grids) == wanted and len(grids) == len(wanted) == 34
    assert [choose_grid(*size, grids, 384) for size in ((1920, 1080), (1000, 1000))] == [(4, 3), (3, 3)]
    with pytest.raises(ConfigError, match="at least 2 tiles"):
        grids_up_to(1)


@settings(max_examples=300, deadline=None)
@given(SIDES, SIDES, st.integers(2, 12), st.randoms(use_true_random=False))
def test_the_order_of_a_whole_set_matters_only_between_the_two_smallest(width, height, tiles, random):
    grids = grids_up_to(tiles)
    others = list(grids[2:])
    random.shuffle(others)
    where = random.randint(0, len(others))
    other = [*others[:where], (1, 2), (2, 1), *others[where:]]
    assert choose_grid(width, height, other, 14) == choose_grid(width, height, grids, 14)


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, st.sampled_from(grids_up_to(6)))
def test_the_canvas_holds_the_whole_picture_in_its_middle(width, height, grid):
    canvas_width, canvas_height = grid[0] * 32, grid[1] * 32
    pixels = np.asarray(on_canvas(picture(width, height), canvas_width, canvas_height, "bilinear"))
    assert pixels.shape == (canvas_height, canvas_width, 3)
    ys, xs = np.nonzero(pixels.max(axis=2))
    left, right, top, bottom = xs.min(), xs.max() + 1, ys.min(), ys.max() + 1
    assert (pixels[top:bottom, left:right].max(axis=2) > 0).all()  # one rectangle
    scale = min(canvas_width / width, canvas_height / height)
    assert right - left == min(math.ceil(width * scale), canvas_width)
    assert bottom - top == min(math.ceil(height * scale), canvas_height)
    assert canvas_width - right - left in (0, 1) and canvas_height - bottom - top in (0, 1)  # rounded down


def test_sizes_are_rounded_up_in_the_released_order_of_operations():
    pixels = np.asarray(on_canvas(picture(544, 170), 768, 768))
    rows = np.nonzero(pixels.max(axis=(1, 2)))[0]
    # 170 · 768 / 544 is 240; 170 · (768 / 544) is a little more, and 241 rows begin at (768 - 241) // 2.
    assert (rows.min(), rows.max() + 1) == (263, 504)
    plain = np.asarray(on_canvas(picture(300, 100), 64, 64))
    rows = np.nonzero(plain.max(axis=(1, 2)))[0]
    assert (rows.min(), rows.max() + 1) == (21, 43)  # 21.3 rows are 22


@settings(max_examples=40, deadline=None)
@given(SIDES, SIDES, st.sampled_from([(), XGENMM_GRIDS, grids_up_to(9)]))
def test_tiles_put_together_are_the_canvas_and_the_first_is_the_whole(width, height, grids):
    side, image = 16, picture(width, height)
    base = ImageTransform(side, HALF, HALF)
    tiles = TileTransform(base, grids)(image)
    columns, rows = tiles.grid[:2]
    assert tiles.grid == (*choose_grid(width, height, grids, side), width, height)
    assert tiles.pixel_values.shape == (1 + columns * rows, 3, side, side)
    assert torch.equal(tiles.pixel_values[0], base(image))
    if not grids:
        assert (columns, rows) == (0, 0)
        return
    canvas = np.asarray(on_canvas(image, columns * side, rows * side)).astype(np.float32)
    wanted = torch.from_numpy(canvas).permute(2, 0, 1) / 255 * 2 - 1
    found = torch.empty_like(wanted)
    for number, tile in enumerate(tiles.pixel_values[1:]):
        row, column = divmod(number, columns)
        found[:, row * side : (row + 1) * side, column * side : (column + 1) * side] = tile
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("interpolation", ["bicubic", "nearest"])
def test_the_canvas_is_resized_as_the_base_is(interpolation):
    base = ImageTransform(16, HALF, HALF, interpolation=interpolation)
    image = Image.fromarray(np.array([[[0] * 3, [255] * 3]], dtype=np.uint8))  # black, white
    tiles = TileTransform(base, ((2, 1),))(image).pixel_values
    assert (set(tiles[1:].unique().tolist()) == {-1.0, 1.0}) == (interpolation == "nearest")


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 2000), st.integers(1, 2000), st.sampled_from([27, 16, 5]))
def test_the_mask_is_the_pasted_picture_to_within_a_token(width, height, tokens):
    patch = 14
    side = tokens * patch
    columns, rows = choose_grid(width, height, grids_up_to(6), side)
    scale = min(columns * side / width, rows * side / height)
    shown = [min(math.ceil(width * scale), columns * side), min(math.ceil(height * scale), rows * side)]
    mask = content_mask(columns, rows, tokens, width, height)
    for axis, length in enumerate((columns * tokens, rows * tokens)):
        ones = mask.any(dim=axis).nonzero().flatten()
        first, last = int(ones[0]), int(ones[-1]) + 1
        offset = (length * patch - shown[axis]) // 2
        assert abs(first - offset / patch) < 1
        assert abs(last - (offset + shown[axis]) / patch) < 1 + 1 / patch  # the larger margin is on this side
        assert mask.all(dim=axis).sum() in (0, last - first)  # one rectangle


def test_a_base_that_would_not_show_the_whole_and_grids_without_tiles_are_refused():
    with pytest.raises(ConfigError, match='"squash"'):
        TileTransform(ImageTransform(16, resize="crop"))
    with pytest.raises(ConfigError, match="to 20 px around a centre of 16"):
        TileTransform(ImageTransform(16, resize_size=20))
    with pytest.raises(ConfigError, match="at least one"):
        TileTransform(ImageTransform(16), ((1, 2), (0, 2)))


def test_a_draft_is_never_enlarged():
    """`open_image` decodes to at least twice `draft_size` on the short side: no canvas wants more."""
    for grids in ((), XGENMM_GRIDS, grids_up_to(12)):
        size = TileTransform(ImageTransform(16), grids).draft_size
        for columns, rows in grids:
            for width, height in ((2 * size, 2 * size), (2 * size, 5 * size), (40 * size, 2 * size)):
                assert min(columns * 16 / width, rows * 16 / height) <= 1
    assert TileTransform(ImageTransform(16), ()).draft_size == 16
    assert TileTransform(ImageTransform(16)).draft_size == 32
