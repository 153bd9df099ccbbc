"""Batches in an order that depends on the seed alone, built ahead by background threads.

Batch number k of a run is a pure function of (seed, k): epoch and place follow from k, the order of an epoch
from (seed, epoch), the random numbers of a sample from (seed, epoch, row). So the step number is all that
resuming needs, and neither the number of processes nor that of threads changes what is trained on.

Threads, not processes: decoding, resizing and tokenising release the interpreter lock, and threads need no
pickling, no shared memory, and no second copy of anything.
"""

import contextlib
import itertools
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import numpy as np

from openblip.config import UserError
from openblip.data.rows import BadRow, BadRows

T = TypeVar("T")
R = TypeVar("R")

Sample = dict[str, Any]
Batch = dict[str, Any]

# First words of seeds. Numpy fills short seeds up with zeros: [seed, epoch] would be [seed, epoch, 0].
_ORDER, _SAMPLE = 1, 2
_WINDOW = 64  # batches that are sorted by length together
_MAX_DRAWS = 100  # rows tried for one place of a batch


class Dataset(Protocol):
    """What the loader asks of a dataset."""

    def __len__(self) -> int: ...

    def get(self, index: int, rng: np.random.Generator) -> Sample:
        """Sample `index`; all that is random about it comes from `rng`. Several threads call at once.

        Raises:
            BadRow: this sample cannot be used; the loader takes another.
        """
        ...


class Loader:
    """Endless batches of a dataset.

    A sample that raises `BadRow` is recorded, and its place in the batch goes to another, drawn with the
    place's own random numbers: sizes stay fixed, and a batch still depends on nothing but its number. (Not to
    its neighbour, which in most data is bad for the same reason.)

    Args:
        dataset: samples by index.
        collate: the samples of a batch -> the batch.
        batch_size: of the global batch, over all ranks.
        seed: not negative.
        rank, world_size: this process gets the `rank`-th of `world_size` equal, contiguous parts: what all
            ranks gather in rank order is the batch of a single process.
        workers: threads that build batches ahead, `workers` + 1 of them at most; 0 builds them when asked.
        drop_last: leave out what does not fill a batch at the end of an epoch (other rows in each epoch);
            otherwise the last batch is smaller.
        lengths: a number per row. Batches are made of rows of like length, which saves padding.
        bad: counts and lists bad rows and ends the run when they are too many. Only batches that were handed
            out are counted, in order, so the list does not depend on `workers`.
    """

    def __init__(
        self,
        dataset: Dataset,
        collate: Callable[[Sequence[Sample]], Batch],
        batch_size: int,
        seed: int = 0,
        *,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        drop_last: bool = True,
        lengths: Sequence[int] | None = None,
        bad: BadRows | None = None,
    ) -> None:
        rows = len(dataset)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}")
        if seed < 0 or workers < 0:
            raise UserError(f"seed and workers must not be negative, got {seed} and {workers}")
        if batch_size < 1 or batch_size % world_size:
            raise UserError(f"batch_size {batch_size} cannot be shared equally by {world_size} process(es)")
        if rows < (batch_size if drop_last else 1):
            raise UserError(
                f"{rows} rows do not fill one batch of {batch_size}: lower batch_size or add rows"
            )
        if not drop_last and rows % batch_size % world_size:
            rest = f"the last {rows % batch_size} of {rows} rows"
            raise UserError(f"{rest} cannot be shared equally by {world_size} processes")
        if lengths is not None and len(lengths) != rows:
            raise ValueError(f"{len(lengths)} lengths for {rows} rows")
        self.dataset, self.collate, self.batch_size, self.seed = dataset, collate, batch_size, seed
        self.rank, self.world_size, self.workers, self.drop_last = rank, world_size, workers, drop_last
        self.lengths = None if lengths is None else np.asarray(lengths)
        self.bad = BadRows() if bad is None else bad
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))  # of the epoch last asked for

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in one pass over the data."""
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def indices(self, number: int) -> np.ndarray:
        """Rows of global batch `number`, counted from 0 over all epochs: [batch_size] int64, all ranks'."""
        epoch, place = divmod(number, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, self._epoch_order(epoch))
        return self._order[1][place * self.batch_size : (place + 1) * self.batch_size]

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """This rank's parts of the global batches from number `start` on, without end.

        Closing the iterator ends its threads.

        Raises:
            UserError: too many bad rows, see `BadRows`; or no good one in many draws.
        """
        if start < 0:
            raise ValueError(f"batches are counted from 0, got {start}")
        return self._batches(start)

    def _batches(self, start: int) -> Iterator[Batch]:
        built = prefetch(self._build, self._jobs(start), self.workers)
        with contextlib.closing(built):
            for samples, batch, problems in built:
                self.bad.saw(samples + len(problems))
                for problem in problems:
                    self.bad.add(problem.reason, problem.where, problem.detail)
                if batch is None:
                    reasons = Counter(problem.reason for problem in problems).most_common()
                    found = ", ".join(f"{count} {reason}" for reason, count in reasons)
                    raise UserError(f"no good row in {_MAX_DRAWS} draws ({found}); the last: {problems[-1]}")
                yield batch

    def _jobs(self, start: int) -> Iterator[tuple[int, np.ndarray]]:
        """(epoch, this rank's rows) of each batch."""
        for number in itertools.count(start):
            rows = self.indices(number)
            share = len(rows) // self.world_size
            yield number // self.steps_per_epoch, rows[self.rank * share : (self.rank + 1) * share]

    def _build(self, job: tuple[int, np.ndarray]) -> tuple[int, Batch | None, list[BadRow]]:
        """(number of samples, batch or None if a place stays empty, bad rows met). Changes nothing."""
        epoch, rows = job
        samples: list[Sample] = []
        problems: list[BadRow] = []
        for row in rows.tolist():
            sample = self._sample(epoch, row, problems)
            if sample is None:
                return len(samples), None, problems
            samples.append(sample)
        return len(samples), self.collate(samples), problems

    def _sample(self, epoch: int, row: int, problems: list[BadRow]) -> Sample | None:
        rng = np.random.default_rng([_SAMPLE, self.seed, epoch, row])
        for _ in range(_MAX_DRAWS):
            try:
                return self.dataset.get(row, rng)
            except BadRow as error:
                problems.append(error)
            row = int(rng.integers(len(self.dataset)))
        return None

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """All rows in the order of an epoch."""
        rng = np.random.default_rng([_ORDER, self.seed, epoch])
        order = rng.permutation(len(self.dataset))
        if self.lengths is None:
            return order
        size = self.batch_size
        full = len(order) // size * size
        windows = np.split(order[:full], range(_WINDOW * size, full, _WINDOW * size))
        sorted_windows = [rows[np.argsort(self.lengths[rows], kind="stable")] for rows in windows]
        batches = np.concatenate(sorted_windows).reshape(-1, size)
        batches = rng.permuted(rng.permutation(batches), axis=1)  # neither batches nor ranks come by length
        return np.concatenate([batches.ravel(), order[full:]])


def prefetch(work: Callable[[T], R], items: Iterable[T], workers: int) -> Generator[R, None, None]:
    """`map(work, items)`, in order, up to `workers` + 1 results ahead, made by `workers` threads.

    `items` is read in the caller's thread, so it may be any generator, also an endless one. What `work`
    raises is raised when its turn comes. Closing drops what was not begun and waits for what was.
    """
    if workers == 0:
        yield from map(work, items)
        return
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="openblip-data") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > workers + 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
