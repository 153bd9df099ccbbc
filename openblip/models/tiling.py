"""The tokens of a picture's tiles as one map, and the map in groups for the resampler (xGen-MM's released code).

Shapes: T = columns · rows tiles without the base, row by row; n tokens across and down a tile, D their width.

    tiles 0 1   merged:  0 0 1 1    in groups of n · n   "tile": 0 0 0 0 | 1 1 1 1 | ...   the tiles again
          2 3            0 0 1 1                         "strip": 0 0 1 1 | 0 0 1 1 | ...  reading order over the
                         2 2 3 3                                                          whole canvas, row after row
                         2 2 3 3
"""

import math
from typing import Literal

import torch
from torch import Tensor

Grouping = Literal["strip", "tile"]


def merge_tiles(tile_embeds: Tensor, columns: int, rows: int) -> Tensor:
    """tile_embeds [T, n · n, D], without the base -> the map of the canvas [rows · n, columns · n, D].

    Raises ValueError: T is not columns · rows, or a tile's tokens are no square.
    """
    tiles, tokens = tile_embeds.shape[:2]
    side = math.isqrt(tokens)
    if tiles != columns * rows or side * side != tokens:
        raise ValueError(
            f"{tiles} tiles of {tokens} tokens do not make a map of {columns} x {rows} square tiles"
        )
    return (
        tile_embeds.unflatten(0, (rows, columns))
        .unflatten(2, (side, side))
        .transpose(1, 2)
        .reshape(rows * side, columns * side, -1)
    )


def content_mask(columns: int, rows: int, side: int, width: int, height: int) -> Tensor:
    """Which of a map's tokens show the picture of width x height pixels: bool [rows · side, columns · side].

    LLaVA's rule for undoing the padding, on the map of tokens (`side` of them across a tile). It rounds a picture of
    less than one token to none; that one token is kept here, or the model would see nothing of a very long picture.

    Raises ValueError: a grid without tiles has no map.
    """
    if min(columns, rows) < 1:
        raise ValueError(f"a grid of {columns} x {rows} tiles has no map of tokens")
    across, down = columns * side, rows * side
    mask = torch.ones(down, across, dtype=torch.bool)
    if width / height > across / down:
        margin = (down - max(int(height * (across / width)), 1)) // 2
        mask[:margin] = False
        mask[down - margin :] = False
    else:
        margin = (across - max(int(width * (down / height)), 1)) // 2
        mask[:, :margin] = False
        mask[:, across - margin :] = False
    return mask


def regroup(canvas: Tensor, mask: Tensor, grouping: Grouping, side: int) -> tuple[Tensor, Tensor]:
    """A map [rows · n, columns · n, D] and its mask [rows · n, columns · n] in groups: [T, n · n, D], [T, n · n].

    "tile" undoes `merge_tiles`. "strip" is what the released weights were trained with: group g, place t is number
    r = n² · g + t of the map in reading order, row r // (columns · n); with one column the two are the same.

    Raises ValueError: the map is not made of tiles of `side` tokens, or the mask is of another map.
    """
    down, across = canvas.shape[:2]
    if down % side or across % side or mask.shape != canvas.shape[:2]:
        raise ValueError(
            f"a map of {across} x {down} tokens and a mask of shape {tuple(mask.shape)}, in tiles of side {side}"
        )
    return _in_groups(canvas, grouping, side), _in_groups(mask, grouping, side)


def _in_groups(canvas: Tensor, grouping: Grouping, side: int) -> Tensor:
    """[rows · n, columns · n, ...] -> [T, n · n, ...]."""
    rest = canvas.shape[2:]
    if grouping == "tile":
        canvas = canvas.unflatten(1, (-1, side)).unflatten(0, (-1, side)).transpose(1, 2)
    return canvas.reshape(-1, side * side, *rest)
