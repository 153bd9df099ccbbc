"""Ids of a text with images in it, and what must hold when such a text is cut: no image is cut, none is skipped.

An image stands in a text as a run of `image` ids, as many as the model will put vision tokens in their place.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

IGNORED = -100  # the label of a place that is not counted


@dataclass(frozen=True)
class AddedTokens:
    """The three tokens beyond the language model's own, which have no text: §4.4, ids 32012 to 32014 as released."""

    first_id: int

    # As they are written where ids are not known yet, in this order.
    NAMES = ("<image>", "<image placeholder>", "<|endofchunk|>")

    @property
    def image(self) -> int:
        """Stands for one vision token."""
        return self.first_id

    @property
    def placeholder(self) -> int:
        """Of the released vocabulary; nothing uses it."""
        return self.first_id + 1

    @property
    def end_of_chunk(self) -> int:
        """Ends what a document says about an image."""
        return self.first_id + 2


@dataclass(frozen=True)
class Tokens:
    """One text: ids [L], labels [L] (−100 where not counted), and where its images are.

    `runs` has (start, stop) of each image, in order; neighbours are runs of their own.
    """

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    runs: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def text(cls, ids: Sequence[int], *, counted: bool) -> "Tokens":
        """A stretch of text, whose labels are its ids if it is counted."""
        return cls(list(ids), list(ids) if counted else [IGNORED] * len(ids))

    @classmethod
    def image(cls, image_id: int, length: int) -> "Tokens":
        """One image of `length` vision tokens, never counted."""
        return cls([image_id] * length, [IGNORED] * length, [(0, length)])

    @classmethod
    def join(cls, pieces: Iterable["Tokens"]) -> "Tokens":
        """Several, one after the other."""
        joined = cls()
        for piece in pieces:
            at = len(joined)
            joined.runs.extend((start + at, stop + at) for start, stop in piece.runs)
            joined.ids.extend(piece.ids)
            joined.labels.extend(piece.labels)
        return joined

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def is_counted(self) -> bool:
        """Whether any label counts; the first cannot, nothing comes before it."""
        return any(label != IGNORED for label in self.labels[1:])

    @property
    def answers(self) -> int:
        """How many stretches of counted tokens there are; an image within one does not part it."""
        inside = {place for start, stop in self.runs for place in range(start, stop)}
        counted = [label != IGNORED for place, label in enumerate(self.labels) if place not in inside]
        return sum(now and not before for before, now in zip([False, *counted], counted))

    def cut(self, length: int) -> "Tokens":
        """The first `length` tokens, or fewer: an image that does not fit goes, with all that follows it."""
        for start, stop in self.runs:
            if stop > length:
                length = min(length, start)
        runs = [run for run in self.runs if run[1] <= length]
        return Tokens(self.ids[:length], self.labels[:length], runs)
