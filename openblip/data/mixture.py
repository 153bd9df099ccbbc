"""Several data sets as one, drawn from in proportion to the square root of their sizes (InstructBLIP §2.4)."""

from collections.abc import Mapping

import numpy as np

from openblip.config import UserError
from openblip.data.loader import Dataset, Sample


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
