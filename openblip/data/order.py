"""Which rows make up which batch: pure functions of the seed and the batch's number, the same for any ranks.

The two orders answer the same questions. `batch(number)` gives epoch and rows, `part` a rank's share of them:
the parts of all ranks, in rank order, are the batch of a single process.
"""

import math
from bisect import bisect_right
from typing import Protocol

import numpy as np

from openblip.config import UserError

# First word of an epoch's seed; the loader's samples have another. Numpy fills short seeds up with zeros:
# [seed, epoch] would be [seed, epoch, 0].
_ORDER = 1
_WINDOW = 64  # batches that are sorted by length together


class Order(Protocol):
    """What the loader asks of an order."""

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in one pass over the data."""
        ...

    def batch(self, number: int) -> tuple[int, np.ndarray]:
        """(epoch, rows [R] int64) of global batch `number`, counted from 0 over all epochs."""
        ...

    def part(self, rows: np.ndarray, rank: int, world_size: int) -> np.ndarray:
        """The rows of a batch that are this rank's."""
        ...

    def replacements(self, rows: np.ndarray) -> np.ndarray | int:
        """Rows that may stand in for a bad one of this batch; a number means all of so many."""
        ...


class CountedBatches:
    """Batches of `batch_size` rows; with `lengths`, each of rows of like length. See `Loader`."""

    def __init__(
        self, rows: int, batch_size: int, seed: int, *, drop_last: bool, lengths: np.ndarray | None = None
    ) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.drop_last, self.lengths = drop_last, lengths
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))  # of the epoch last asked for

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in one pass over the data."""
        full, rest = divmod(self.rows, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def batch(self, number: int) -> tuple[int, np.ndarray]:
        """(epoch, rows [batch_size] int64) of global batch `number`."""
        epoch, place = divmod(number, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, self._epoch(epoch))
        return epoch, self._order[1][place * self.batch_size : (place + 1) * self.batch_size]

    def part(self, rows: np.ndarray, rank: int, world_size: int) -> np.ndarray:
        """Equal, contiguous parts."""
        share = len(rows) // world_size
        return rows[rank * share : (rank + 1) * share]

    def replacements(self, rows: np.ndarray) -> int:
        """Any row."""
        return self.rows

    def _epoch(self, epoch: int) -> np.ndarray:
        """All rows in the order of an epoch."""
        rng = np.random.default_rng([_ORDER, self.seed, epoch])
        order = rng.permutation(self.rows)
        if self.lengths is None:
            return order
        size = self.batch_size
        full = len(order) // size * size
        windows = np.split(order[:full], range(_WINDOW * size, full, _WINDOW * size))
        sorted_windows = [rows[np.argsort(self.lengths[rows], kind="stable")] for rows in windows]
        batches = np.concatenate(sorted_windows).reshape(-1, size)
        batches = rng.permuted(rng.permutation(batches), axis=1)  # neither batches nor ranks come by length
        return np.concatenate([batches.ravel(), order[full:]])


class BudgetedBatches:
    """Batches of rows of like length whose padded size, rows times the longest, is within `batch_tokens`.

    An epoch's rows are shuffled, sorted by length within windows of at most 64 batches or so, up and down by
    turns so that neighbours stay alike, and cut wherever one more row would go beyond the budget. So epochs
    differ by a few batches in number; where one ends is known by making all before it, which is done once.

    Raises:
        UserError: rows that are too long to give each of `world_size` ranks one, or too few for a batch.
    """

    def __init__(
        self, lengths: np.ndarray, batch_tokens: int, seed: int, *, drop_last: bool, world_size: int = 1
    ) -> None:
        self.lengths, self.batch_tokens, self.seed, self.drop_last = lengths, batch_tokens, seed, drop_last
        too_long = int((lengths > batch_tokens // world_size).sum())
        longest = int(lengths.max(initial=0))
        if too_long:
            shared = f", {batch_tokens // world_size} for each of {world_size} processes" * (world_size > 1)
            raise UserError(
                f"batch_tokens {batch_tokens}{shared}: {too_long} of {len(lengths)} rows are longer, the "
                f"longest has {longest}; raise it to {longest * world_size}, or shorten or leave out long rows"
            )
        if not len(lengths) or (drop_last and len(lengths) * longest <= batch_tokens):
            raise UserError(
                f"{len(lengths)} rows do not fill one batch of {batch_tokens} tokens: lower batch_tokens or "
                "add rows"
            )
        self._by_length = np.argsort(lengths, kind="stable")
        self._sorted = lengths[self._by_length]
        self._ends: list[int] = []  # batches up to the end of each epoch
        self._made: tuple[int, list[np.ndarray]] = (-1, [])  # the epoch last asked for

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in the first pass over the data."""
        self._know(0)
        return self._ends[0]

    def batch(self, number: int) -> tuple[int, np.ndarray]:
        """(epoch, rows [R] int64) of global batch `number`."""
        while not self._ends or self._ends[-1] <= number:
            self._know(len(self._ends))
        epoch = bisect_right(self._ends, number)
        return epoch, self._epoch(epoch)[number - (self._ends[epoch - 1] if epoch else 0)]

    def part(self, rows: np.ndarray, rank: int, world_size: int) -> np.ndarray:
        """Contiguous parts of nearly equal length in all, each of one row at least."""
        ends = np.cumsum(self.lengths[rows])
        cuts = [0]
        for other in range(1, world_size):
            # Half a row's length: a row belongs to the side that holds more of it.
            nearest = int(np.searchsorted(ends - self.lengths[rows] / 2, ends[-1] * other / world_size))
            cuts.append(min(max(nearest, cuts[-1] + 1), len(rows) - (world_size - other)))
        cuts.append(len(rows))
        return rows[cuts[rank] : cuts[rank + 1]]

    def replacements(self, rows: np.ndarray) -> np.ndarray:
        """All rows short enough to keep a batch of so many within the budget."""
        most = self.batch_tokens // len(rows)
        return self._by_length[: np.searchsorted(self._sorted, most, side="right")]

    def _know(self, epoch: int) -> None:
        """Note where `epoch` ends, if it is the next that is not known."""
        if epoch == len(self._ends):
            self._ends.append((self._ends[-1] if epoch else 0) + len(self._epoch(epoch)))

    def _epoch(self, epoch: int) -> list[np.ndarray]:
        """The batches of an epoch."""
        if self._made[0] != epoch:
            self._made = (epoch, self._make(epoch))
        return self._made[1]

    def _make(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng([_ORDER, self.seed, epoch])
        order = rng.permutation(len(self.lengths))
        window = _WINDOW * max(1.0, self.batch_tokens / max(1.0, float(self.lengths.mean())))
        pieces = np.array_split(order, 2 * math.ceil(len(order) / (2 * window)))  # as many up as down: a ring
        pieces = [rows[np.argsort(self.lengths[rows], kind="stable")] for rows in pieces]
        order = np.concatenate([rows[::-1] if number % 2 else rows for number, rows in enumerate(pieces)])
        order = np.roll(order, rng.integers(len(order)))  # or the last batch would be of the shortest
        cuts, longest, start = [], 0, 0
        for place, length in enumerate(self.lengths[order].tolist()):
            longest = max(longest, length)
            if longest * (place - start + 1) > self.batch_tokens:
                cuts.append(place)
                start, longest = place, length
        batches = np.split(order, cuts)
        if self.drop_last:
            batches.pop()
        # Neither batches nor, within one, places go by length.
        return [rng.permutation(batches[number]) for number in rng.permutation(len(batches))]
