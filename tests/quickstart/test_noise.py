"""What is planted as wrong is wrong, all of it is counted, and no picture is on both sides of a split."""

from collections import Counter

import pytest

from openblip.config import UserError
from openblip.data.rows import Row
from openblip.quickstart.noise import plant_noise, split


def make_rows(count, group=None):
    """Rows with two captions each, all different."""
    return [
        Row(
            f"{number}.png",
            [f"{number}.png"],
            [f"picture {number}", f"number {number}"],
            where=f"row {number}",
            extra={} if group is None else {"group": group(number)},
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("share", [0, 0.05, 0.4, 1])
def test_the_stated_share_is_wrong_and_the_rest_untouched(share):
    rows = make_rows(101)
    noisy, wrong = plant_noise(rows, share, seed=3)
    assert sum(wrong) == round(share * 101)
    for row, changed, is_wrong in zip(rows, noisy, wrong, strict=True):
        assert changed.id == row.id and changed.images == row.images
        assert (not set(changed.captions) & set(row.captions)) if is_wrong else changed == row
    before, after = (sorted(text for row in some for text in row.captions) for some in (rows, noisy))
    assert before == after, "an exchange: nothing is lost and nothing is doubled"
    assert rows == make_rows(101), "the argument is left as it was"


def test_noise_is_a_function_of_the_seed():
    rows = make_rows(50)
    assert plant_noise(rows, 0.5, seed=1) == plant_noise(rows, 0.5, seed=1)
    assert plant_noise(rows, 0.5, seed=1) != plant_noise(rows, 0.5, seed=2)
    # the same on every machine and with every Python: these were read off once
    _, wrong = plant_noise(make_rows(20), 0.25, seed=7)
    assert [index for index, is_wrong in enumerate(wrong) if is_wrong] == [1, 2, 4, 10, 12]


@pytest.mark.parametrize("seed", range(20))
def test_no_row_gets_what_would_be_right(seed):
    """Captions that several pictures share, rows of one picture, and siblings: none may be exchanged."""
    rows = make_rows(30, group=lambda number: f"family {number // 3}")
    for row in rows[:10]:
        row.captions.append("A common   caption")
    rows[10].captions.append("a common caption")
    rows += [Row("0.png", ["0.png"], ["another word for it"], where="row 30")]
    rows[30].extra["group"] = "family 0"
    known = {}
    for row in rows:
        known.setdefault(row.id, set()).update(" ".join(text.lower().split()) for text in row.captions)
    groups = {text: row.extra["group"] for row in rows for text in row.captions[:1]}
    noisy, wrong = plant_noise(rows, 1.0, seed)
    assert all(wrong)
    for row in noisy:
        assert not {" ".join(text.lower().split()) for text in row.captions} & known[row.id]
        assert groups[row.captions[0]] != row.extra["group"]


def test_what_cannot_be_exchanged_is_an_error():
    rows = make_rows(10)
    for row in rows:
        row.captions = ["all the same"]
    with pytest.raises(UserError, match=r"row \d: none of the 4 rows .* would be wrong here"):
        plant_noise(rows, 0.4, seed=0)
    with pytest.raises(UserError, match="none of the 1 rows"):
        plant_noise(make_rows(10), 0.1, seed=0)
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match="between 0 and 1"):
            plant_noise(rows, share, seed=0)


def test_a_split_has_the_stated_sizes_and_shares_no_group():
    rows = make_rows(1000, group=lambda number: "large" if number < 30 else f"{number // 2}")
    parts = split(rows, seed=0, human=300, test=400)
    assert (len(parts.human), len(parts.web), len(parts.test)) == (300, 300, 400)
    assert Counter(row.id for part in parts for row in part) == Counter(row.id for row in rows)
    groups = [{row.extra["group"] for row in part} for part in parts]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
    order = [rows.index(row) for row in parts.web]
    assert order == sorted(order)


def test_a_split_is_a_function_of_the_seed():
    rows = make_rows(60)
    assert split(rows, 5, 20, 20) == split(rows, 5, 20, 20)
    assert split(rows, 5, 20, 20) != split(rows, 6, 20, 20)


def test_rows_of_one_picture_stay_together():
    rows = [Row(f"{number // 5}.png", ["x"], [f"caption {number}"]) for number in range(100)]
    for seed in range(5):
        parts = split(rows, seed, human=30, test=30)
        pictures = [{row.id for row in part} for part in parts]
        assert sum(map(len, pictures)) == 20
        assert len(parts.human) == len(parts.test) == 30


def test_an_impossible_split_is_an_error():
    with pytest.raises(UserError, match="10 rows cannot be split into 5 for the human part, 5 for the test"):
        split(make_rows(10), 0, human=5, test=5)
    with pytest.raises(UserError, match="cannot be split"):
        split(make_rows(10), 0, human=0, test=5)
    with pytest.raises(
        UserError, match=r"nothing is left for the test part: .* in 1 groups, of which 'a' has 10"
    ):
        split(make_rows(10, group=lambda number: "a"), 0, human=3, test=3)
