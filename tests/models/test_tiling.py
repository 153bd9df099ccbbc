"""tiling.py: where each token of each tile stands on the map, and in which group the resampler sees it."""

import pytest
import torch

from openblip.models.tiling import content_mask, merge_tiles, regroup

GRIDS = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3), (4, 3)]


def embeds(columns, rows, side):
    """Tokens [T, n · n, 3] that say who they are: tile, row and column within it."""
    tokens = [
        [tile, token // side, token % side] for tile in range(columns * rows) for token in range(side**2)
    ]
    return torch.tensor(tokens).view(columns * rows, side**2, 3)


@pytest.mark.parametrize(("columns", "rows"), GRIDS)
def test_every_token_stands_where_its_tile_is(columns, rows):
    canvas = merge_tiles(embeds(columns, rows, 3), columns, rows)
    assert canvas.shape == (3 * rows, 3 * columns, 3)
    for y in range(3 * rows):
        for x in range(3 * columns):
            assert canvas[y, x].tolist() == [y // 3 * columns + x // 3, y % 3, x % 3]


@pytest.mark.parametrize(("columns", "rows"), GRIDS)
def test_tile_grouping_undoes_the_merge(columns, rows):
    tokens = embeds(columns, rows, 3)
    canvas = merge_tiles(tokens, columns, rows)
    groups, mask = regroup(canvas, canvas[..., 0] % 2 == 0, "tile", 3)
    assert torch.equal(groups, tokens)
    assert torch.equal(mask, tokens[..., 0] % 2 == 0)


@pytest.mark.parametrize(("columns", "rows"), GRIDS)
def test_a_strip_is_in_reading_order(columns, rows):
    """Group g, token t is r = 729 g + t of the canvas: row r // (27 · columns), column r % (27 · columns)."""
    side = 27
    y, x = torch.meshgrid(torch.arange(rows * side), torch.arange(columns * side), indexing="ij")
    canvas = torch.stack([y, x], dim=-1)
    groups, mask = regroup(canvas, y % 2 == 1, "strip", side)
    assert groups.shape == (columns * rows, 729, 2) and mask.shape == (columns * rows, 729)
    r = 729 * torch.arange(columns * rows)[:, None] + torch.arange(729)
    assert torch.equal(groups[..., 0], r // (27 * columns)) and torch.equal(
        groups[..., 1], r % (27 * columns)
    )
    assert torch.equal(mask, r // (27 * columns) % 2 == 1)
    assert groups.flatten(0, 1).unique(dim=0).shape[0] == columns * rows * 729  # each token once


@pytest.mark.parametrize(
    ("columns", "rows", "last_of_first_group"),
    [(1, 3, (26, 26)), (2, 1, (13, 26)), (2, 2, (13, 26)), (3, 1, (8, 80))],
)
def test_strips_of_the_released_model(columns, rows, last_of_first_group):
    """27 rows for one column, 13 and a half for two, 9 for three."""
    side = 27
    y, x = torch.meshgrid(torch.arange(rows * side), torch.arange(columns * side), indexing="ij")
    groups, _ = regroup(torch.stack([y, x], dim=-1), y >= 0, "strip", side)
    assert tuple(groups[0, -1].tolist()) == last_of_first_group


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_strips_are_the_tiles_with_one_column_and_only_then(rows):
    for columns in (1, 2, 3):
        canvas = merge_tiles(embeds(columns, rows, 4), columns, rows)
        pairs = [regroup(canvas, canvas[..., 1] == 0, grouping, 4) for grouping in ("strip", "tile")]
        for strip, tile in zip(*pairs, strict=True):
            assert torch.equal(strip, tile) == (columns == 1)


@pytest.mark.parametrize(
    ("arguments", "rows", "columns"),
    [  # (columns, rows, side, width, height) -> rows and columns of the map that show the picture, of all
        ((2, 1, 27, 500, 300), (0, 27), (4, 50)),  # int(45) tokens wide, 9 of padding: 4 on each side
        ((2, 2, 27, 640, 480), (7, 47), (0, 54)),  # int(40.5), 14 of padding
        ((2, 2, 27, 480, 640), (0, 54), (7, 47)),
        ((3, 1, 27, 2000, 500), (3, 24), (0, 81)),  # int(20.25), 7 of padding: 3 on each side
        ((1, 2, 27, 384, 384), (13, 41), (0, 27)),
        ((2, 2, 27, 1000, 1000), (0, 54), (0, 54)),
        ((2, 2, 27, 214, 107), (14, 40), (0, 54)),  # 27 tokens, but 107 · (54 / 214) is a little less: 26
        ((3, 1, 16, 2000, 20), (7, 9), (0, 48)),  # half a token high: LLaVA's rule would leave none
        ((1, 3, 16, 1, 65535), (0, 48), (7, 9)),
    ],
)
def test_masks_of_pictures(arguments, rows, columns):
    mask = content_mask(*arguments)
    across, down, side = arguments[:3]
    wanted = torch.zeros(down * side, across * side, dtype=torch.bool)
    wanted[slice(*rows), slice(*columns)] = True
    assert mask.dtype == torch.bool and torch.equal(mask, wanted)


@pytest.mark.parametrize(
    "call",
    [
        lambda: merge_tiles(torch.zeros(3, 9, 2), 2, 2),
        lambda: merge_tiles(torch.zeros(4, 8, 2), 2, 2),
        lambda: content_mask(0, 0, 3, 10, 10),
        lambda: regroup(torch.zeros(6, 4, 2), torch.ones(6, 4), "tile", 3),
        lambda: regroup(torch.zeros(6, 6, 2), torch.ones(6, 3), "tile", 3),
    ],
)
def test_maps_that_do_not_fit_are_refused(call):
    with pytest.raises(ValueError, match="tiles"):
        call()
