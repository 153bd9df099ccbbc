"""Rows from one number to another of what has more of them."""

from dataclasses import dataclass
from typing import Protocol

from openblip.data.rows import Row


class Rows(Protocol):
    """A `Source`, a list of `Row`, or anything else with a length and random access, which may raise `BadRow`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Row: ...


@dataclass(frozen=True)
class RowRange:
    """Rows `start` to `stop` of others, counted from 0."""

    rows: Rows
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int, /) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self.rows[self.start + index]
