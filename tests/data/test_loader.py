"""loader.py: batch k is a function of (seed, k), whoever asks, however often, with however many helpers."""

import io
import itertools
import random
import threading
import time
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from PIL import Image

from openblip.config import UserError
from openblip.data.collate import PairCollator, PairDataset
from openblip.data.loader import Loader, prefetch
from openblip.data.rows import BadRow, BadRows, Row
from openblip.data.text import bert_uncased
from openblip.data.transforms import TrainTransform


class Numbers:
    """Samples that say which row they are and what they drew. Rows in `bad` cannot be used."""

    def __init__(self, rows: int, bad: tuple[int, ...] = (), jitter: bool = False) -> None:
        self.rows, self.bad, self.jitter = rows, set(bad), jitter

    def __len__(self) -> int:
        return self.rows

    def get(self, index: int, rng: np.random.Generator) -> dict:
        if self.jitter:
            time.sleep(0.002 * (index % 3))  # so that threads finish out of order
        if index in self.bad:
            raise BadRow("broken", f"row {index}", "planted")
        return {"row": index, "draw": int(rng.integers(10**12))}


def collate(samples) -> dict:
    return {name: torch.tensor([sample[name] for sample in samples]) for name in ("row", "draw")}


joined = itertools.chain.from_iterable


def take(loader: Loader, count: int, start: int = 0) -> list[tuple[list[int], list[int]]]:
    """`count` batches as lists; the iterator is closed."""
    batches = loader.batches(start)
    taken = [(batch["row"].tolist(), batch["draw"].tolist()) for batch in itertools.islice(batches, count)]
    batches.close()
    return taken


def test_an_epoch_visits_every_row_once_in_an_order_of_its_own():
    loader = Loader(Numbers(24), collate, 4, seed=5)
    assert loader.steps_per_epoch == 6
    epochs = [list(joined(rows for rows, _ in take(loader, 6, start=6 * epoch))) for epoch in range(3)]
    assert all(sorted(rows) == list(range(24)) for rows in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(24))
    assert take(loader, 6) != take(Loader(Numbers(24), collate, 4, seed=6), 6)


def test_random_numbers_differ_between_rows_and_epochs():
    draws = [draws for _, draws in take(Loader(Numbers(24), collate, 4), 18)]
    assert len(set(joined(draws))) == 3 * 24


def test_the_end_of_an_epoch_is_dropped_or_a_smaller_batch():
    dropping = take(Loader(Numbers(10), collate, 4), 20)
    assert all(len(rows) == 4 for rows, _ in dropping)
    assert {row for rows, _ in dropping for row in rows} == set(range(10))  # not always the same are left out
    keeping = Loader(Numbers(10), collate, 4, drop_last=False)
    assert keeping.steps_per_epoch == 3
    sizes = [len(rows) for rows, _ in take(keeping, 6)]
    assert sizes == [4, 4, 2, 4, 4, 2]
    assert sorted(joined(rows for rows, _ in take(keeping, 3))) == list(range(10))


@pytest.mark.parametrize("start", [1, 5, 6, 7, 13])
@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_needs_the_number_of_the_batch_only(start, workers):
    straight = take(Loader(Numbers(24, bad=(3, 8)), collate, 4, seed=1), 16)
    resumed = take(Loader(Numbers(24, bad=(3, 8)), collate, 4, seed=1, workers=workers), 16 - start, start)
    assert resumed == straight[start:]


@pytest.mark.parametrize("world", [2, 4])
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(world):
    data = Numbers(40, bad=(1, 7, 30))
    alone = take(Loader(data, collate, 8, seed=3), 12)
    ranks = [take(Loader(data, collate, 8, seed=3, rank=rank, world_size=world), 12) for rank in range(world)]
    for number, (rows, draws) in enumerate(alone):
        parts = [ranks[rank][number] for rank in range(world)]
        assert all(len(part[0]) == 8 // world for part in parts)
        assert list(joined(part[0] for part in parts)) == rows
        assert list(joined(part[1] for part in parts)) == draws


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_change_nothing(workers):
    plain = take(Loader(Numbers(30, bad=(2, 9)), collate, 5, seed=2), 14)
    assert (
        take(Loader(Numbers(30, bad=(2, 9), jitter=True), collate, 5, seed=2, workers=workers), 14) == plain
    )


def test_global_random_states_are_neither_read_nor_moved():
    loader = Loader(Numbers(24), collate, 4, workers=1)
    first = take(loader, 8)
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert take(loader, 8) == first
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_a_bad_row_is_recorded_and_its_place_filled(tmp_path):
    bad = BadRows(tmp_path / "bad.jsonl", max_share=0.5)
    loader = Loader(Numbers(24, bad=(3, 8)), collate, 4, seed=1, bad=bad)
    clean = take(Loader(Numbers(24), collate, 4, seed=1), 12)
    found = take(loader, 12)
    for (rows, draws), (clean_rows, clean_draws) in zip(found, clean):
        assert len(rows) == 4 and not {3, 8} & set(rows)
        for place, row in enumerate(clean_rows):  # all other places are as they were
            assert row in (3, 8) or (rows[place], draws[place]) == (row, clean_draws[place])
    assert bad.counts["broken"] >= 4  # both rows in both epochs, and when drawn as replacements
    assert bad.seen == 48 + bad.total
    lines = (tmp_path / "bad.jsonl").read_text().splitlines()
    assert len(lines) == bad.total and '"where": "row 3"' in "".join(lines)


def test_the_list_of_bad_rows_does_not_depend_on_threads_or_what_was_built_ahead(tmp_path):
    lists = []
    for workers in (0, 3):
        bad = BadRows(tmp_path / f"{workers}.jsonl", max_share=1)
        take(
            Loader(Numbers(24, tuple(range(0, 24, 3)), jitter=True), collate, 4, workers=workers, bad=bad), 2
        )
        lists.append((tmp_path / f"{workers}.jsonl").read_text())
        assert bad.seen == 8 + bad.total
    assert lists[0] == lists[1] != ""


def test_replacements_do_not_come_from_the_neighbourhood():
    # Half of the rows, all in one block, are bad: a folder that is gone.
    found = take(Loader(Numbers(400, tuple(range(200))), collate, 20, bad=BadRows(max_share=1)), 20)
    rows = [row for batch, _ in found for row in batch]
    assert min(rows) >= 200
    assert max(rows.count(row) for row in rows) < 10  # not one row for all


def test_too_many_bad_rows_end_the_run():
    bad = BadRows(max_share=0.1, min_seen=20)
    with pytest.raises(UserError, match="max_share"):
        take(Loader(Numbers(40, bad=tuple(range(20))), collate, 4, bad=bad), 10)


@pytest.mark.parametrize("workers", [0, 2])
def test_data_without_a_good_row_ends_at_once(workers):
    class Listed(BadRows):
        """Would go on for ever."""

        def add(self, reason, where, detail):
            self.counts[reason] += 1

    data, bad = Numbers(1000, bad=tuple(range(1000))), Listed()
    with pytest.raises(
        UserError, match=r"no good row in 100 draws \(100 broken\); the last: row \d+: planted"
    ):
        take(Loader(data, collate, 4, workers=workers, bad=bad), 1)
    assert bad.total == 100


def test_other_errors_pass_through():
    class Faulty(Numbers):
        def get(self, index, rng):
            raise ZeroDivisionError("a bug, not bad data")

    for workers in (0, 2):
        with pytest.raises(ZeroDivisionError):
            take(Loader(Faulty(8), collate, 4, workers=workers), 1)


def padding(loader: Loader, lengths: np.ndarray, epoch: int) -> int:
    """Positions that are padding in one epoch of the global batches."""
    steps = loader.steps_per_epoch
    batches = [lengths[loader.indices(number)] for number in range(epoch * steps, (epoch + 1) * steps)]
    return sum(int((batch.max() - batch).sum()) for batch in batches)


def test_buckets_save_padding_and_keep_the_order_fixed():
    lengths = np.random.default_rng(0).integers(4, 400, size=1003)
    plain, bucketed = (Loader(Numbers(1003), collate, 8, seed=4, lengths=x) for x in (None, lengths))
    assert padding(bucketed, lengths, 0) < 0.2 * padding(plain, lengths, 0)
    steps = bucketed.steps_per_epoch
    epochs = [[bucketed.indices(e * steps + n).tolist() for n in range(steps)] for e in range(2)]
    for rows in epochs:
        assert len(set(joined(rows))) == steps * 8 == 1000
    assert epochs[0] != epochs[1]
    again = Loader(Numbers(1003), collate, 8, seed=4, lengths=lengths)
    assert [again.indices(n).tolist() for n in range(steps)] == epochs[0]
    # Neither the batches of an epoch nor the places in a batch go by length: no rank gets all the long ones.
    means = np.array([lengths[rows].mean() for rows in epochs[0]])
    assert abs(np.corrcoef(means, np.arange(steps))[0, 1]) < 0.3
    rising = [lengths[rows[:4]].sum() < lengths[rows[4:]].sum() for rows in epochs[0]]
    falling = [lengths[rows[:4]].sum() > lengths[rows[4:]].sum() for rows in epochs[0]]
    assert abs(sum(rising) - sum(falling)) < 50  # of 125; all of them if places went by length
    kept = Loader(Numbers(1003), collate, 8, seed=4, lengths=lengths, drop_last=False)
    assert sorted(joined(kept.indices(n).tolist() for n in range(126))) == list(range(1003))


LENGTHS = np.random.default_rng(1).integers(4, 100, size=400)


def budgeted(budget: int = 400, data: Numbers | None = None, **options) -> Loader:
    settings = {"seed": 4, "lengths": LENGTHS} | options
    return Loader(data or Numbers(400), collate, None, batch_tokens=budget, **settings)


def test_a_token_budget_fills_batches_and_keeps_within():
    loader = budgeted()
    epoch = [loader.indices(number) for number in range(loader.steps_per_epoch)]
    rows = list(joined(batch.tolist() for batch in epoch))
    assert len(set(rows)) == len(rows) > 370, "each once, and no more left out than one batch"
    padded = np.array([len(batch) * LENGTHS[batch].max() for batch in epoch])
    assert padded.max() <= 400 and padded.mean() > 0.9 * 400
    real = np.array([LENGTHS[batch].sum() for batch in epoch])
    assert real.sum() > 0.9 * padded.sum(), "rows of a batch are of like length"
    sizes = np.array([len(batch) for batch in epoch])
    assert sizes.min() >= 4 and sizes.max() > 15
    assert abs(np.corrcoef(sizes, np.arange(len(sizes)))[0, 1]) < 0.3, "nor do batches go by length"
    kept = budgeted(drop_last=False)
    whole = [kept.indices(number).tolist() for number in range(kept.steps_per_epoch)]
    assert sorted(joined(whole)) == list(range(400))


def test_a_token_budget_leaves_out_other_rows_in_each_epoch():
    order = budgeted().order
    used: dict[int, list[int]] = {}
    for epoch, rows in (order.batch(number) for number in range(800)):
        used.setdefault(epoch, []).extend(rows.tolist())
    assert len(used) == 14
    left = [set(range(400)) - set(used[epoch]) for epoch in range(13)]
    assert not set.intersection(*left)
    lengths = [LENGTHS[list(rows)].mean() for rows in left]
    assert min(lengths) < 30 and max(lengths) > 70, (
        "nor always the shortest, which an order by length has last"
    )


@pytest.mark.parametrize("start", [1, 57, 58, 59, 60, 117, 200])
def test_a_budgeted_batch_is_known_by_its_number(start):
    straight, resumed = budgeted(), budgeted()
    rows = [straight.indices(number).tolist() for number in range(210)]
    assert resumed.indices(start).tolist() == rows[start]
    assert resumed.indices(start - 1).tolist() == rows[start - 1]  # also backwards
    steps = straight.steps_per_epoch
    assert 55 < steps < 62
    counts, seen = [], set()  # an epoch ends where a row comes again
    for batch in rows:
        if seen & set(batch):
            counts.append(len(seen))
            seen = set()
        seen |= set(batch)
    assert len(counts) == 3 and min(counts) > 370
    assert rows[:steps] != rows[steps : 2 * steps]
    assert take(budgeted(workers=2), 3, start) == take(budgeted(), 3 + start)[start:]
    assert rows[:3] != [budgeted(seed=5).indices(number).tolist() for number in range(3)]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_share_the_tokens_of_a_budgeted_batch(world):
    data = Numbers(400, bad=(1, 7, 30))
    alone = take(budgeted(data=data), 70)
    ranks = [take(budgeted(data=data, rank=rank, world_size=world), 70) for rank in range(world)]
    for number, (rows, draws) in enumerate(alone):
        parts = [ranks[rank][number] for rank in range(world)]
        assert list(joined(part[0] for part in parts)) == rows
        assert list(joined(part[1] for part in parts)) == draws
        tokens = [LENGTHS[part[0]].sum() for part in parts]
        assert min(tokens) > 0 and max(tokens) - min(tokens) <= 2 * LENGTHS[rows].max()
    uneven = [
        budgeted(rank=r, world_size=2).order.part(np.argsort(LENGTHS)[[399, 0, 1, 2, 3]], r, 2)
        for r in (0, 1)
    ]
    assert [len(part) for part in uneven] == [1, 4]  # one long row, four short ones


def test_what_replaces_a_bad_row_stays_within_the_budget():
    data = Numbers(400, bad=tuple(range(0, 400, 2)))
    for rows, _ in take(budgeted(data=data, bad=BadRows(max_share=1)), 130):
        assert len(rows) * LENGTHS[rows].max() <= 400
    shortest = int(LENGTHS.argmin())  # others may stand in for it
    assert take(budgeted(data=Numbers(400, bad=(shortest,))), 70)


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        (90, {}, rf"{(LENGTHS > 90).sum()} of 400 rows are longer, the longest has 99; raise it to 99"),
        (180, {"world_size": 2}, r"180, 90 for each of 2 processes: \d+ of 400 .* raise it to 198"),
        (39_600, {}, "400 rows do not fill one batch of 39600 tokens"),
        (400, {"world_size": 2, "drop_last": False}, "too small for several processes"),
    ],
)
def test_an_impossible_budget_is_said_at_once(budget, options, message):
    with pytest.raises(UserError, match=message):
        budgeted(budget, **options)
    assert budgeted(39_599).steps_per_epoch == budgeted(39_600, drop_last=False).steps_per_epoch == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 6, "world_size": 4}, "cannot be shared equally by 4"),
        ({"batch_size": 0}, "cannot be shared equally"),
        ({"batch_size": 32}, "10 rows do not fill one batch of 32"),
        ({"batch_size": 4, "seed": -1}, "must not be negative"),
        ({"batch_size": 4, "workers": -1}, "must not be negative"),
        ({"batch_size": 9, "world_size": 3, "drop_last": False}, "last 1 of 10 rows cannot be shared"),
    ],
)
def test_what_cannot_work_is_said_at_once(options, message):
    with pytest.raises(UserError, match=message):
        Loader(Numbers(10), collate, **options)


def test_wrong_calls_are_errors():
    for options in ({"rank": 2, "world_size": 2}, {"rank": -1}, {"lengths": [1, 2, 3]}):
        with pytest.raises(ValueError):
            Loader(Numbers(10), collate, 4, **options)
    for size, options in (
        (4, {"batch_tokens": 9, "lengths": [1] * 10}),
        (None, {"batch_tokens": 9}),
        (None, {}),
    ):
        with pytest.raises(ValueError, match="either batch_size"):
            Loader(Numbers(10), collate, size, **options)
    with pytest.raises(ValueError, match="from 0"):
        Loader(Numbers(10), collate, 4).batches(-1)


def test_prefetch_keeps_order_and_works_at_the_same_time():
    together = threading.Barrier(3)

    def work(item: int) -> int:
        together.wait(timeout=20)  # three must be here at once
        time.sleep(0.01 * (item % 2))
        return item * item

    assert list(prefetch(work, range(9), 3)) == [n * n for n in range(9)]


def test_prefetch_is_bounded_and_lazy():
    read = []

    def items():
        for number in itertools.count():
            read.append(number)
            yield number

    results = prefetch(lambda item: item, items(), 2)
    assert read == []
    for number in range(5):
        assert next(results) == number
        assert len(read) <= number + 1 + 3  # workers + 1 ahead
    results.close()
    assert len(read) <= 8


def test_prefetch_raises_in_turn_and_ends_its_threads():
    def work(item: int) -> int:
        if item == 2:
            raise KeyError("third")
        return item

    before = threading.active_count()
    results = prefetch(work, range(10), 2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(KeyError, match="third"):
        next(results)
    assert threading.active_count() == before
    results = prefetch(work, itertools.cycle([0, 1]), 2)
    next(results)
    assert threading.active_count() > before
    results.close()
    assert threading.active_count() == before


def test_closing_prefetch_drops_what_was_not_begun(monkeypatch):
    begun, one_is_at_work, two_is_cancelled = [], threading.Event(), threading.Event()
    cancel = Future.cancel
    monkeypatch.setattr(Future, "cancel", lambda self: cancel(self) and not two_is_cancelled.set())

    def work(item: int) -> int:
        begun.append(item)
        if item == 1:
            one_is_at_work.set()
            two_is_cancelled.wait(timeout=5)
        return item

    results = prefetch(work, range(10), 1)
    assert next(results) == 0
    assert one_is_at_work.wait(timeout=20)
    results.close()
    assert begun == [0, 1]


def test_closing_batches_ends_their_threads():
    before = threading.active_count()
    batches = Loader(Numbers(20), collate, 4, workers=2).batches()
    next(batches)
    assert threading.active_count() == before + 2
    batches.close()
    assert threading.active_count() == before


def test_pictures_and_texts_through_everything(tmp_path):
    rng, rows = np.random.default_rng(0), []
    for number in range(12):
        path = tmp_path / f"{number}.jpg"
        Image.fromarray(rng.integers(0, 255, (50, 60, 3), dtype=np.uint8)).save(path)
        rows.append(Row(path.name, [str(path)], [f"picture {number}", "number " * number], where=path.name))
    (tmp_path / "3.jpg").write_bytes((tmp_path / "3.jpg").read_bytes()[:300])
    (tmp_path / "5.jpg").unlink()
    (tmp_path / "8.jpg").write_bytes(io.BytesIO().getvalue())

    def batches(workers: int, start: int, count: int, bad: BadRows) -> list[dict]:
        data, tokens = PairDataset(rows, TrainTransform(24)), PairCollator(bert_uncased(), 10)
        stream = Loader(data, tokens, 4, seed=9, workers=workers, bad=bad).batches(start)
        taken = list(itertools.islice(stream, count))
        stream.close()
        return taken

    bad = BadRows(max_share=1)
    straight = batches(0, 0, 8, bad)
    assert set(bad.counts) == {"truncated", "missing", "empty"}
    for one, other in zip(straight[3:], batches(2, 3, 5, BadRows(max_share=1))):
        assert one.keys() == other.keys() and one["ids"] == other["ids"]
        for name in ("pixel_values", "input_ids", "attention_mask", "image_ids"):
            assert torch.equal(one[name], other[name]), name
    seen = {name for batch in straight for name in batch["ids"]}
    assert len(seen) == 9 and not seen & {"3.jpg", "5.jpg", "8.jpg"}
