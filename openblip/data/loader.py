"""Batches in an order that depends on the seed alone, built ahead by background threads.

Batch number k of a run is a pure function of (seed, k): its epoch and rows (`order.py`), and with them the
random numbers of a sample, which follow from (seed, epoch, row). So the step number is all that
resuming needs, and neither the number of processes nor that of threads changes what is trained on.

Threads, not processes: decoding, resizing and tokenising release the interpreter lock, and threads need no
pickling, no shared memory, and no second copy of anything.
"""

import contextlib
import itertools
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from openblip.config import UserError
from openblip.data.order import BudgetedBatches, CountedBatches, Order
from openblip.data.rows import BadRow, BadRows

T = TypeVar("T")
R = TypeVar("R")

Sample = dict[str, Any]
Batch = dict[str, Any]

_SAMPLE = 2  # first word of a sample's seed; an epoch's order has another
_MAX_DRAWS = 100  # rows tried for one place of a batch


class Dataset(Protocol):
    """What the loader asks of a dataset."""

    def __len__(self) -> int: ...

    def get(self, index: int, rng: np.random.Generator) -> Sample:
        """Sample `index`; all that is random about it comes from `rng`. Several threads call at once.

        "problems" of a sample, if it has them, are BadRows for parts that it does without; the loader records them.

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
        batch_size: of the global batch, over all ranks. None: `batch_tokens` says how large it is.
        seed: not negative.
        rank, world_size: this process gets the `rank`-th of `world_size` equal, contiguous parts: what all
            ranks gather in rank order is the batch of a single process. (With `batch_tokens`: nearly equal.)
        workers: threads that build batches ahead, `workers` + 1 of them at most; 0 builds them when asked.
        drop_last: leave out what does not fill a batch at the end of an epoch (other rows in each epoch);
            otherwise the last batch is smaller.
        lengths: a number per row. Batches are made of rows of like length, which saves padding.
        batch_tokens: budget of the global batch in place of a number of samples: it has as many rows, of like
            length, as padded to the longest of `lengths` stay within. A bad row's place goes to one that is
            short enough. Ranks then have different numbers of samples, so a loss must be a mean over tokens
            by `distributed.global_mean`: what is a plain mean over samples counts those of a small part more.
        bad: counts and lists bad rows and ends the run when they are too many. Only batches that were handed
            out are counted, in order, so the list does not depend on `workers`.
    """

    def __init__(
        self,
        dataset: Dataset,
        collate: Callable[[Sequence[Sample]], Batch],
        batch_size: int | None,
        seed: int = 0,
        *,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        drop_last: bool = True,
        lengths: Sequence[int] | None = None,
        batch_tokens: int | None = None,
        bad: BadRows | None = None,
    ) -> None:
        rows = len(dataset)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}")
        if seed < 0 or workers < 0:
            raise UserError(f"seed and workers must not be negative, got {seed} and {workers}")
        if (batch_size is None) == (batch_tokens is None) or (batch_tokens is not None and lengths is None):
            raise ValueError("wanted either batch_size, or batch_tokens and lengths")
        if lengths is not None and len(lengths) != rows:
            raise ValueError(f"{len(lengths)} lengths for {rows} rows")
        measured = None if lengths is None else np.asarray(lengths)
        self.order: Order
        if batch_size is not None:
            _check_size(rows, batch_size, world_size, drop_last)
            self.order = CountedBatches(rows, batch_size, seed, drop_last=drop_last, lengths=measured)
        else:
            assert measured is not None and batch_tokens is not None
            if not drop_last and world_size > 1:
                raise UserError("the rest of an epoch may be too small for several processes: drop it")
            self.order = BudgetedBatches(
                measured, batch_tokens, seed, drop_last=drop_last, world_size=world_size
            )
        self.dataset, self.collate, self.seed = dataset, collate, seed
        self.rank, self.world_size, self.workers = rank, world_size, workers
        self.bad = BadRows() if bad is None else bad

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in one pass over the data; with `batch_tokens`, in the first: others differ a little."""
        return self.order.steps_per_epoch

    def indices(self, number: int) -> np.ndarray:
        """Rows of global batch `number`, counted from 0 over all epochs: [batch_size] int64, all ranks'."""
        return self.order.batch(number)[1]

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

    def _jobs(self, start: int) -> Iterator["_Job"]:
        for number in itertools.count(start):
            epoch, rows = self.order.batch(number)
            part = self.order.part(rows, self.rank, self.world_size)
            yield _Job(epoch, part, self.order.replacements(rows))

    def _build(self, job: "_Job") -> tuple[int, Batch | None, list[BadRow]]:
        """(number of samples, batch or None if a place stays empty, bad rows met). Changes nothing."""
        samples: list[Sample] = []
        problems: list[BadRow] = []
        for row in job.rows.tolist():
            sample = self._sample(job, row, problems)
            if sample is None:
                return len(samples), None, problems
            samples.append(sample)
        return len(samples), self.collate(samples), problems

    def _sample(self, job: "_Job", row: int, problems: list[BadRow]) -> Sample | None:
        rng = np.random.default_rng([_SAMPLE, self.seed, job.epoch, row])
        for _ in range(_MAX_DRAWS):
            try:
                sample = self.dataset.get(row, rng)
                problems += sample.pop("problems", [])  # parts that it could do without
                return sample
            except BadRow as error:
                problems.append(error)
            row = int(rng.choice(job.replacements))
        return None


@dataclass(frozen=True)
class _Job:
    """What a rank builds a batch from."""

    epoch: int
    rows: np.ndarray
    replacements: np.ndarray | int  # rows that may take the place of a bad one, or how many all are


def _check_size(rows: int, batch_size: int, world_size: int, drop_last: bool) -> None:
    if batch_size < 1 or batch_size % world_size:
        raise UserError(f"batch_size {batch_size} cannot be shared equally by {world_size} process(es)")
    if rows < (batch_size if drop_last else 1):
        raise UserError(f"{rows} rows do not fill one batch of {batch_size}: lower batch_size or add rows")
    if not drop_last and rows % batch_size % world_size:
        rest = f"the last {rows % batch_size} of {rows} rows"
        raise UserError(f"{rest} cannot be shared equally by {world_size} processes")


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
