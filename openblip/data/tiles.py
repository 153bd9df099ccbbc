"""A picture of any size as tiles of one size (BLIP-3 §3.1): the whole of it small, then its parts large.

2000 x 500 ─ squashed to S x S ─────────────────────► base tile
          └─ choose_grid: (3, 1) ─ resized, centred
             on black ─┬──────┬──────┬──────┐
                       │  ....│......│....  │ 3 S x S ──► three more tiles, row by row
                       └──────┴──────┴──────┘
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from openblip.config import ConfigError
from openblip.data.transforms import ImageTransform

# (columns, rows) in the order of the released code, which decides ties. There is no 1 x 1: with the base, every picture
# has three tiles or more.
XGENMM_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


@dataclass(frozen=True)
class Tiles:
    """One picture: pixel_values [1 + columns · rows, 3, S, S], base first; grid (columns, rows, width, height).

    width, height: pixels of the picture itself. A grid (0, 0, ...) is the base alone.
    """

    pixel_values: Tensor
    grid: tuple[int, int, int, int]


@dataclass(frozen=True)
class TileTransform:
    """A picture to `Tiles`: `base` makes pixels of every tile; its image_size is the side S of a tile.

    grids: the (columns, rows) to choose from, `XGENMM_GRIDS` or `grids_up_to(n)`; none is fixed resolution, the
        base alone.

    Raises ConfigError: `base` crops (the base tile would not show the whole picture), or a grid without tiles.
    """

    base: ImageTransform
    grids: tuple[tuple[int, int], ...] = XGENMM_GRIDS

    def __post_init__(self) -> None:
        if self.base.resize != "squash" or self.base.draft_size != self.base.image_size:
            raise ConfigError(
                'base: must "squash" to image_size to show the whole picture, and this is a '
                f'"{self.base.resize}" to {self.base.draft_size} px around a centre of {self.base.image_size}'
            )
        if any(min(grid) < 1 for grid in self.grids):
            raise ConfigError(f"grids must be (columns, rows) of at least one each, got {self.grids}")

    @property
    def draft_size(self) -> int:
        """The `draft_size` for `open_image`: every canvas still needs a picture smaller than the decoded one.

        So the choice of a grid depends on the proportions alone, and those a draft keeps to within a pixel.
        """
        return self.base.image_size * max((min(grid) for grid in self.grids), default=1)

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> Tiles:
        """An RGB image -> its tiles. `rng` is ignored: all transforms are called alike."""
        side = self.base.image_size
        tiles = [self.base(image)]
        columns, rows = choose_grid(*image.size, self.grids, side)
        if columns:
            canvas = on_canvas(image, columns * side, rows * side, self.base.interpolation)
            for top in range(0, rows * side, side):
                for left in range(0, columns * side, side):
                    tiles.append(self.base(canvas.crop((left, top, left + side, top + side))))
        return Tiles(torch.stack(tiles), (columns, rows, *image.size))


def grids_up_to(tiles: int) -> tuple[tuple[int, int], ...]:
    """All (columns, rows) of 2 to `tiles` tiles: fewer tiles first, of as many the taller first.

    The order breaks ties of `choose_grid`, where two grids show a picture equally large on canvases equally large. The
    picture then fits as well into what the two have in common, a smaller grid of this set, which wins, unless that is
    a single tile. So the order decides between (1, 2) and (2, 1) alone; the released list, too, has (1, 2) first.

    Raises ConfigError: `tiles` is below 2.
    """
    if tiles < 2:
        raise ConfigError(f"grids_up_to wants at least 2 tiles (fixed resolution has no grids), got {tiles}")
    grids = [(columns, rows) for columns in range(1, tiles + 1) for rows in range(1, tiles // columns + 1)]
    return tuple(sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[0]))[1:])


def choose_grid(width: int, height: int, grids: Sequence[tuple[int, int]], tile_size: int) -> tuple[int, int]:
    """The (columns, rows) that show most of a picture of width x height pixels; (0, 0) if there are no grids.

    Most pixels of the picture as it is resized, never more than it has; then the smallest canvas; then the first of
    the list (LLaVA's rule, and xGen-MM's). A side of the resized picture is no less than one pixel, here as in the
    resize: so very long pictures, too, get the longest canvas.
    """
    best, best_rank = (0, 0), (-1, 0)
    for columns, rows in grids:
        canvas_width, canvas_height = columns * tile_size, rows * tile_size
        scale = min(canvas_width / width, canvas_height / height)
        shown = max(int(width * scale), 1) * max(int(height * scale), 1)
        shown = min(shown, width * height)
        rank = (shown, shown - canvas_width * canvas_height)  # the second: minus the waste
        if rank > best_rank:
            best, best_rank = (columns, rows), rank
    return best


def on_canvas(image: Image.Image, width: int, height: int, interpolation: str = "bicubic") -> Image.Image:
    """The picture as large as it fits, proportions kept, in the middle of a black canvas of width x height pixels.

    Rounded up, and in the released code's order of operations: so each side has at least one pixel.
    """
    scale_x, scale_y = width / image.width, height / image.height
    if scale_x < scale_y:
        size = (width, min(math.ceil(image.height * scale_x), height))
    else:
        size = (min(math.ceil(image.width * scale_y), width), height)
    canvas = Image.new("RGB", (width, height))
    offset = ((width - size[0]) // 2, (height - size[1]) // 2)
    canvas.paste(image.resize(size, Image.Resampling[interpolation.upper()]), offset)
    return canvas
