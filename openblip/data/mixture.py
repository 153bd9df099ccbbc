"""Several data sets as one: by the square root of their sizes (InstructBLIP §2.4), or so many rows of each (BLIP-3)."""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from openblip.config import UserError
from openblip.data.collate import Rows, rows_fingerprint
from openblip.data.loader import Dataset, Sample
from openblip.data.row_range import RowRange
from openblip.data.rows import Row


class Mixture:
    """A dataset whose every sample comes from one of several, drawn by its own random numbers.

    With sizes S_i, data set i is drawn with probability √S_i / Σ √S_j, a row of it evenly: large sets are not
    overfitted for the sake of small ones, nor small ones drowned. Samples carry where they are from as "dataset".

    Args:
        datasets: by name.
        factors: multiply the probability of a data set by hand, as InstructBLIP does for two of its 26 (before
            all are scaled to sum to 1).

    Raises:
        UserError: no data set, an empty one, or a factor that is not positive or names none.
    """

    def __init__(self, datasets: Mapping[str, Dataset], factors: Mapping[str, float] | None = None) -> None:
        factors = dict(factors or {})
        if not datasets:
            raise UserError("a mixture needs one data set or more")
        for name, dataset in datasets.items():
            if not len(dataset):
                raise UserError(f"{name}: an empty data set has no share in a mixture")
        for name, factor in factors.items():
            if name not in datasets:
                raise UserError(f"{name}: no such data set in this mixture; there are {', '.join(datasets)}")
            if not 0 < factor < np.inf:
                raise UserError(f"{name}: a factor is a number above 0, got {factor}")
        self.datasets = dict(datasets)
        weights = np.array([len(d) ** 0.5 * factors.get(name, 1.0) for name, d in self.datasets.items()])
        self.shares = dict(zip(self.datasets, (weights / weights.sum()).tolist(), strict=True))

    def __len__(self) -> int:
        """Rows of all data sets together, which is what counts as an epoch."""
        return sum(map(len, self.datasets.values()))

    def get(self, index: int, rng: np.random.Generator) -> Sample:
        """A sample that `rng` draws; the index has no say. Raises BadRow: the row drawn cannot be used."""
        names = list(self.datasets)
        name = names[int(rng.choice(len(names), p=list(self.shares.values())))]
        dataset = self.datasets[name]
        return {**dataset.get(int(rng.integers(len(dataset))), rng), "dataset": name}


class MixedRows:
    """So many rows of each of several sources, one source after the other, as BLIP-3's released code mixes its data.

    Which rows is drawn by `seed`, without putting back, or, of a source with fewer rows, every row as often as it goes
    and the rest drawn. Ids begin with the number of the source: equal file names are not the same picture.

    Args:
        sources: what to read.
        counts: rows of each; None, or None for one of them: all of it.

    Raises:
        UserError: no source, an empty one, or not one count, above 0, for each.
    """

    def __init__(
        self, sources: Sequence[Rows], counts: Sequence[int | None] | None = None, *, seed: int = 42
    ) -> None:
        self.is_counted = counts is not None
        counts = [None] * len(sources) if counts is None else list(counts)
        if not sources or len(counts) != len(sources):
            raise UserError(
                f"{len(sources)} data sets to mix, and {len(counts)} numbers of rows to take of them"
            )
        self.sources = list(sources)
        self.places: list[tuple[int, int]] = []  # (source, its row)
        for number, (source, count) in enumerate(zip(self.sources, counts, strict=True)):
            size = len(source)
            wanted = size if count is None else count
            if not size or wanted < 1:
                raise UserError(
                    f"data set {number + 1} of the mixture: {size} rows, of which {wanted} are to be taken"
                )
            rng = np.random.default_rng([seed, number])
            drawn = [*range(size)] * (wanted // size) + rng.permutation(size)[: wanted % size].tolist()
            self.places += [(number, index) for index in sorted(drawn)]

    def __len__(self) -> int:
        """Rows of all sources together."""
        return len(self.places)

    def __getitem__(self, index: int) -> Row:
        """Row `index`. Raises IndexError: there is none, or what its source raises."""
        number, place = self.places[index]
        row = self.sources[number][place]
        return replace(row, id=f"{number}/{row.id}")

    def parts(self) -> "dict[str, Rows]":
        """The rows of each source by themselves, with the same ids, by the number of the source."""
        numbers = np.array([number for number, _ in self.places])
        starts = np.searchsorted(numbers, range(len(self.sources) + 1)).tolist()
        return {str(n): RowRange(self, *span) for n, span in enumerate(itertools.pairwise(starts))}

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what was drawn of which sources (see `rows_fingerprint`)."""
        state = [[rows_fingerprint(source) for source in self.sources], self.places]
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()
