"""Memory: an image as the cross-attention of every layer sees it, projected once for all who look at it.

Shapes: B images, N tokens of each, R rows of queries.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

_FEW_IMAGES = 8  # that a GPU goes through one by one


@dataclass
class Memory:
    """An image (or any other sequence) as cross-attention sees it: keys and values of every layer, projected
    once.

    They depend on the image alone, so ITM positives, both kinds of negatives, the decoder, beams and
    reranking all take the same object. `layers[i]` is what layer i's cross-attention made of B images;
    `index` [R] says which image each row of queries looks at; without it R = B · g and row r looks at image r
    // g.
    """

    layers: list[Any]  # KeyValue, or a pair of them (NLVR2)
    mask: Tensor | None = None  # [B, N], True for real tokens; None: all are
    index: Tensor | None = None

    def rows(self, index: Tensor) -> "Memory":
        """The same projections for rows of queries that look at image `index[r]` (of this view)."""
        return replace(self, index=index if self.index is None else self.index[index])

    @cached_property
    def counts(self) -> list[int] | None:
        """How often each image stands in `index`, if it stands there in one run; else None.

        On a CPU, or for few images: where it takes less time to go from image to image than to copy an image for each
        of its rows.
        """
        if self.index is None or (self.index.device.type != "cpu" and self.images > _FEW_IMAGES):
            return None
        if bool((self.index.diff() < 0).any()):
            return None
        return self.index.bincount(minlength=self.images).tolist()

    @property
    def images(self) -> int:
        """B."""
        some = next(layer for layer in self.layers if layer is not None)
        while isinstance(some, tuple):
            some = some[0]
        return len(some)

    def shares(self, tokens: Tensor, *, packed: bool) -> list[int] | None:
        """How many queries each image has if row r has tokens[r]; None: all as many.

        Of all images if there are `counts`, otherwise of those that `layer` gives. packed: rows differ in tokens.
        Raises ValueError: the rows cannot be shared out evenly over the images they are for.
        """
        if self.counts is None and not packed:
            return None
        images = self.images if self.index is None else len(self.index)
        group, rest = divmod(len(tokens), images)  # rows of each
        if rest:
            raise ValueError(
                f"{len(tokens)} rows of queries cannot be shared out evenly over {images} images"
            )
        rows = [group * count for count in self.counts or [1] * images]
        return [int(part.sum()) for part in tokens.split(rows)]

    def layer(self, number: int, *, by_image: bool = False) -> tuple[Any, Tensor | None]:
        """What layer `number` attends to, and the mask [B, 1, 1, N]; row by row of `index`, unless `by_image`."""
        picked, mask = self.layers[number], self.mask
        if self.index is not None and not by_image:
            picked = _take(picked, self.index)
            mask = None if mask is None else mask[self.index]
        return picked, None if mask is None else mask[:, None, None, :].bool()


def _take(pair: Any, index: Tensor) -> Any:
    """Rows `index` of every tensor in a (nested) tuple."""
    return tuple(_take(part, index) for part in pair) if isinstance(pair, tuple) else pair[index]
