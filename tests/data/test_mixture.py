"""A mixture draws by √size, from seed and place alone."""

from collections import Counter

import numpy as np
import pytest

from openblip.config import UserError
from openblip.data.loader import Loader
from openblip.data.mixture import MixedRows, Mixture
from openblip.data.rows import Row


class Numbers:
    def __init__(self, size: int, first: int = 0) -> None:
        self.size, self.first = size, first

    def __len__(self) -> int:
        return self.size

    def get(self, index, rng):
        return {"number": self.first + index}


def test_shares_are_those_of_the_roots():
    mixture = Mixture({"small": Numbers(100), "large": Numbers(900, 1000)})
    assert len(mixture) == 1000
    assert mixture.shares == pytest.approx({"small": 0.25, "large": 0.75})
    drawn = [mixture.get(0, np.random.default_rng(i)) for i in range(4000)]
    counts = Counter(sample["dataset"] for sample in drawn)
    assert counts["small"] / 4000 == pytest.approx(0.25, abs=0.03)
    assert all((sample["number"] >= 1000) == (sample["dataset"] == "large") for sample in drawn)
    rows = Counter(sample["number"] for sample in drawn if sample["dataset"] == "small")
    assert len(rows) == 100, "all rows have their turn"


def test_factors_by_hand():
    mixture = Mixture({"a": Numbers(100), "b": Numbers(100)}, {"a": 3.0})
    assert mixture.shares == pytest.approx({"a": 0.75, "b": 0.25})


def test_a_loader_sees_the_same_mixture_again():
    def batches():
        mixture = Mixture({"a": Numbers(9), "b": Numbers(16, 100)})
        return Loader(mixture, lambda samples: [sample["number"] for sample in samples], 5, seed=3).batches(2)

    one, two = batches(), batches()
    assert [next(one) for _ in range(8)] == [next(two) for _ in range(8)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (({},), "one data set or more"),
        (({"a": Numbers(0)},), "a: an empty data set"),
        (({"a": Numbers(1)}, {"b": 1.0}), "b: no such data set"),
        (({"a": Numbers(1)}, {"a": 0.0}), "a: a factor is a number above 0"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        Mixture(*arguments)


def rows(name: str, count: int) -> list[Row]:
    return [Row(f"{number}.png", [b""], [name]) for number in range(count)]


def test_so_many_rows_of_each():
    mixed = MixedRows([rows("a", 100), rows("b", 3)], [10, 8])
    assert len(mixed) == 18
    found = [mixed[place] for place in range(18)]
    assert [row.captions[0] for row in found] == ["a"] * 10 + ["b"] * 8
    ids = [row.id for row in found]
    assert len(set(ids[:10])) == 10, "without putting back"
    assert sorted(Counter(ids[10:]).values()) == [2, 3, 3], "all of them, and again"
    assert (
        ids
        == [mixed[place].id for place in range(18)]
        == [row.id for row in MixedRows(mixed.sources, [10, 8])]
    )
    assert ids != [row.id for row in MixedRows(mixed.sources, [10, 8], seed=1)]


def test_equal_file_names_are_not_the_same_picture():
    mixed = MixedRows([rows("a", 3), rows("b", 3)])
    assert len(mixed) == len({row.id for row in mixed}) == 6


@pytest.mark.parametrize(
    ("sources", "counts", "message"),
    [
        ([], None, "0 data sets"),
        ([rows("a", 2)], [1, 2], "1 data sets to mix, and 2 numbers"),
        ([rows("a", 2), []], None, "data set 2 of the mixture: 0 rows"),
        ([rows("a", 2)], [0], "of which 0 are to be taken"),
    ],
)
def test_impossible_mixtures_of_rows(sources, counts, message):
    with pytest.raises(UserError, match=message):
        MixedRows(sources, counts)


def test_a_mixture_is_told_by_what_was_drawn_of_what():
    rows = [Row(str(number), ["x.png"], [f"text {number}"]) for number in range(9)]
    mixed = [
        MixedRows([rows, rows], [3, 5]), MixedRows([rows, rows], [3, 6]), MixedRows([rows, rows], [3, 5], seed=1),
        MixedRows([rows, rows[::-1]], [3, 5]),
    ]  # fmt: skip
    assert len({one.fingerprint for one in mixed}) == 4
    assert MixedRows([rows, list(rows)], [3, 5]).fingerprint == mixed[0].fingerprint
