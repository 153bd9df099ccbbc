"""features.py: what is read back is what was encoded; interrupted, continued, shared, refused."""

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from openblip.config import UserError, to_dict
from openblip.data.collate import PairCollator, PairDataset
from openblip.data.features import FeatureCache, build_features
from openblip.data.loader import Loader
from openblip.data.rows import BadRow, BadRows, Row
from openblip.data.text import bert_uncased
from openblip.data.transforms import ImageTransform, TrainTransform

TRANSFORM = ImageTransform(8)
MADE_BY = {"encoder": "abc", "transform": to_dict(TRANSFORM), "layer": 9}


def row(number: int) -> Row:
    rng, file = np.random.default_rng(number), io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (12, 10, 3), dtype=np.uint8)).save(file, "PNG")
    return Row(f"{number}.png", [file.getvalue()], [f"caption {number}"], where=f"row {number}")


ROWS = [row(number) for number in range(10)]


class Encoder:
    """[B, 3, 8, 8] -> [B, 4, 48], a picture's quarters. Counts, and stops after `limit` pictures."""

    def __init__(self, limit: int = 10**9) -> None:
        self.batches: list[int] = []
        self.limit = limit

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        if sum(self.batches) + len(pixels) > self.limit:
            raise KeyboardInterrupt
        self.batches.append(len(pixels))
        return pixels.unflatten(2, (2, 4)).unflatten(4, (2, 4)).permute(0, 2, 4, 1, 3, 5).reshape(-1, 4, 48)


def build(folder: Path, encode=None, rows=ROWS, made_by=MADE_BY, **options) -> FeatureCache:
    return build_features(
        folder, made_by, rows, TRANSFORM, encode or Encoder(), **{"batch_size": 3, **options}
    )


def expected(number: int) -> torch.Tensor:
    image = Image.open(io.BytesIO(ROWS[number].images[0]))
    return Encoder()(TRANSFORM(image)[None])[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_view_is_drawn_by_the_seed_and_the_number_of_the_picture(tmp_path):
    draws = TrainTransform(8, (0.3, 0.9), randaugment=False)
    assert TRANSFORM.image_size == draws.image_size

    def view(name: str, seed: int, rows=ROWS, **options) -> torch.Tensor:
        cache = build_features(tmp_path / name, MADE_BY, rows, draws, Encoder(), seed=seed, **options)
        return torch.stack([cache.get(number) for number in range(len(rows))])

    one = view("one", 1)
    assert torch.equal(one, view("alike", 1, batch_size=3, workers=2)), "neither batches nor threads matter"
    assert not torch.equal(one, view("other", 2))
    twice = [ROWS[0], replace(ROWS[0], id="the same picture again")]
    assert not torch.equal(*view("twice", 1, twice)), "each picture draws for itself"
    with pytest.raises(KeyboardInterrupt):
        build_features(tmp_path / "stopped", MADE_BY, ROWS, draws, Encoder(limit=6), seed=1, batch_size=3)
    assert torch.equal(one, view("stopped", 1, batch_size=3)), "what was interrupted goes on alike"


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0), ("float16", 2**-11), ("bfloat16", 2**-8)])
def test_read_back_as_encoded(tmp_path, dtype, error):
    cache = build(tmp_path / "cache", dtype=dtype)
    assert len(cache) == 10 and cache.shape == (10, 4, 48)
    for number in range(10):
        found = cache.get(number)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected(number), rtol=error, atol=0)
        assert torch.equal(found, expected(number).to(getattr(torch, dtype)).float())
        assert torch.equal(cache.lookup(f"{number}.png"), found)
    size = {"float32": 4}.get(dtype, 2) * 10 * 4 * 48
    assert (tmp_path / "cache" / "features.bin").stat().st_size == size
    cache.get(0).zero_()
    assert torch.equal(cache.get(0), expected(0).to(getattr(torch, dtype)).float())  # a copy was zeroed


def test_threads_and_batch_size_change_nothing(tmp_path):
    build(tmp_path / "a")
    build(tmp_path / "b", workers=3)
    build(tmp_path / "c", batch_size=4)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")


def test_a_complete_cache_is_not_built_again(tmp_path):
    build(tmp_path)
    before, again = contents(tmp_path), Encoder()
    build(tmp_path, again)
    assert again.batches == [1, 1, 1] and contents(tmp_path) == before  # three are looked at


@pytest.mark.parametrize("limit", [0, 1, 4, 7, 10])
def test_interrupted_and_continued_is_the_same(tmp_path, limit):
    # The first picture alone is encoded once more, to see the shape.
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "broken", Encoder(limit))
    with pytest.raises(UserError, match=r"there are no features|only \d of 10 pictures are done"):
        FeatureCache(tmp_path / "broken", MADE_BY)
    rest = Encoder()
    build(tmp_path / "broken", rest)
    build(tmp_path / "whole")
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
    if limit:
        done = (limit - 1) // 3 * 3  # and nothing of it is done again, but three are looked at
        assert sum(rest.batches) == 10 - done + min(done, 3)


def test_a_batch_cut_off_in_the_middle_is_made_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "broken", Encoder(7))
    path = tmp_path / "broken" / "features.bin"
    path.write_bytes(path.read_bytes()[:-100])  # 6 pictures were there; now the sixth is half
    rest = Encoder()
    build(tmp_path / "broken", rest)
    assert rest.batches == [
        1,
        1,
        1,
        3,
        3,
        1,
    ]  # three that are looked at, then the same batches as without an interruption, so the same bits
    build(tmp_path / "whole")
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def test_complete_data_without_the_mark_is_not_trusted_as_it_stands(tmp_path):
    build(tmp_path)
    manifest = json.loads((tmp_path / "features.json").read_text())
    (tmp_path / "features.json").write_text(json.dumps({**manifest, "complete": False}))
    with pytest.raises(UserError, match="only 10 of 10 pictures are done; build_features goes on"):
        FeatureCache(tmp_path, MADE_BY)
    assert len(build(tmp_path)) == 10


def _killed_build(folder: Path, after: int) -> None:
    torch.set_num_threads(1)  # a fork of a process that has had threads may not start more
    encode = Encoder()

    def encode_and_die(pixels):
        if sum(encode.batches) >= after:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(pixels)

    build(folder, encode_and_die, workers=2)


@pytest.mark.parametrize("after", [0, 1, 4, 10])
def test_killed_and_continued_is_the_same(tmp_path, after):
    process = multiprocessing.get_context("fork").Process(
        target=_killed_build, args=(tmp_path / "broken", after)
    )
    process.start()
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL
    build(tmp_path / "broken")
    build(tmp_path / "whole")
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("made_by", "message"),
    [
        ({**MADE_BY, "encoder": "xyz"}, r"encoder was 'abc' and is 'xyz'"),
        (
            {**MADE_BY, "transform": to_dict(ImageTransform(16))},
            r"transform\.image_size was 8 and is 16",
        ),
        ({"encoder": "abc", "transform": MADE_BY["transform"]}, "layer was 9 and is None"),
        ({**MADE_BY, "precision": "bf16"}, "precision was None and is 'bf16'"),
    ],
)
def test_another_fingerprint_is_refused_and_named(tmp_path, made_by, message):
    build(tmp_path)
    before = contents(tmp_path)
    for attempt in (lambda: FeatureCache(tmp_path, made_by), lambda: build(tmp_path, made_by=made_by)):
        with pytest.raises(UserError, match=message):
            attempt()
    assert contents(tmp_path) == before


def test_a_fingerprint_is_compared_as_json(tmp_path):
    build(tmp_path, made_by={"sizes": (1, 2), "nested": {"a": (3,)}})
    assert len(FeatureCache(tmp_path, {"sizes": [1, 2], "nested": {"a": [3]}})) == 10


def test_other_pictures_and_another_dtype_are_refused(tmp_path):
    build(tmp_path)
    with pytest.raises(UserError, match="features of 10 others than these 9 pictures"):
        build(tmp_path, rows=ROWS[:9])
    with pytest.raises(UserError, match="features in bfloat16, wanted float32"):
        build(tmp_path, dtype="float32")


@pytest.mark.parametrize("stop", [10**9, 7])
def test_other_pictures_of_the_same_names_are_refused(tmp_path, stop):
    with contextlib.suppress(KeyboardInterrupt):
        build(tmp_path, Encoder(stop))
    others = [replace(row(number + 100), id=made.id) for number, made in enumerate(ROWS)]
    with pytest.raises(
        UserError, match=r"holds features of another picture called '0\.png'; use another folder"
    ):
        build(tmp_path, rows=others)
    some = [*ROWS[:-1], others[-1]] if stop > 10 else [*ROWS[:5], others[5], *ROWS[6:]]
    with pytest.raises(UserError, match=f"another picture called '{9 if stop > 10 else 5}.png'"):
        build(tmp_path, rows=some)


def test_another_encoder_of_the_same_fingerprint_is_refused(tmp_path):
    build(tmp_path)
    with pytest.raises(UserError, match="another picture called"):
        build(tmp_path, lambda pixels: Encoder()(pixels).flip(-1))


def test_damage_is_seen(tmp_path):
    build(tmp_path / "cache")
    for name, spoil in (("features.bin", lambda data: data[:-1]), ("keys.json", lambda data: data + b" ")):
        shutil.copytree(tmp_path / "cache", tmp_path / name)
        path = tmp_path / name / name
        path.write_bytes(spoil(path.read_bytes()))
        with pytest.raises(UserError, match="damaged"):
            FeatureCache(tmp_path / name, MADE_BY)
    with pytest.raises(UserError, match="no features here"):
        FeatureCache(tmp_path / "nowhere", MADE_BY)


def test_a_picture_of_several_rows_is_encoded_once(tmp_path):
    encode = Encoder()
    cache = build(tmp_path, encode, rows=[ROWS[0], ROWS[1], ROWS[0], ROWS[1], ROWS[0]])
    assert len(cache) == 2 and encode.batches == [1, 2]  # one to see the shape
    assert cache.keys == ["0.png", "1.png"]


def test_both_pictures_of_a_pair_are_encoded(tmp_path):
    both = Row("pair", [ROWS[3].images[0], ROWS[4].images[0]], ["a sentence"])
    cache = build(tmp_path, rows=[both], dtype="float32")
    assert torch.equal(cache.lookup("pair#0"), expected(3))
    assert torch.equal(cache.lookup("pair#1"), expected(4))


def test_a_picture_that_cannot_be_read_leaves_a_marked_gap(tmp_path):
    broken = [Row(f"bad{number}", [b"junk"], ["x"], where=f"line {number}") for number in range(4)]
    rows = [broken[0], *ROWS[:2], *broken[1:], *ROWS[2:]]  # a whole batch of bad ones among them
    bad = BadRows(tmp_path / "bad.jsonl", max_share=0.5)
    cache = build(tmp_path / "cache", rows=rows, bad=bad, dtype="float32")
    assert bad.counts == {"not_an_image": 4} and '"line 3"' in (tmp_path / "bad.jsonl").read_text()
    for number in range(10):
        assert torch.equal(cache.lookup(f"{number}.png"), expected(number))
    for number in range(4):
        with pytest.raises(BadRow, match=f"bad{number}: could not be read"):
            cache.lookup(f"bad{number}")
    # The loader goes round the gaps.
    loader = Loader(
        PairDataset(rows, features=cache), PairCollator(bert_uncased()), 7, bad=BadRows(max_share=1)
    )
    for _, batch in zip(range(4), loader.batches()):
        for name, embeds in zip(batch["ids"], batch["image_embeds"]):
            assert torch.equal(embeds, expected(int(name.removesuffix(".png"))))


def test_nothing_readable_and_too_much_unreadable_are_errors(tmp_path):
    junk = [Row(f"{number}", [b"junk"], ["x"], where="here") for number in range(5)]
    with pytest.raises(UserError, match=r"none of 5 pictures can be read; the last: here: .*not_an_image"):
        build(tmp_path / "a", rows=junk)
    with pytest.raises(UserError, match="max_share"):
        build(tmp_path / "b", rows=[*ROWS, *junk], bad=BadRows(max_share=0.1, min_seen=5))
    with pytest.raises(UserError, match="no pictures"):
        build(tmp_path / "c", rows=[])


@pytest.mark.parametrize(
    ("dtype", "value"), [("float32", torch.nan), ("float16", 1e6), ("bfloat16", torch.inf)]
)
def test_numbers_that_do_not_fit_are_refused_by_name(tmp_path, dtype, value):
    def encode(pixels):
        embeds = Encoder()(pixels)
        embeds[-1, 2, 5] = value  # of the last in each batch
        return embeds

    with pytest.raises(UserError, match=f"NaN or infinity in {dtype} for '2.png'"):
        build(tmp_path, encode, dtype=dtype)


def test_an_unknown_picture_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no features of 'else\.png'; it was built from other rows"):
        build(tmp_path).lookup("else.png")


def test_progress_is_reported(tmp_path):
    seen = []
    build(tmp_path, report=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 10), (6, 10), (9, 10), (10, 10)]


def test_encoding_keeps_no_graph(tmp_path):
    weight = torch.ones(1, requires_grad=True)

    def encode(pixels):
        embeds = Encoder()(pixels * weight)
        assert not embeds.requires_grad
        return embeds

    build(tmp_path, encode)


def _slow_build(folder: Path, queue) -> None:
    torch.set_num_threads(1)  # see above
    encode = Encoder()

    def slowly(pixels):
        time.sleep(0.05)
        return encode(pixels)

    cache = build(folder, slowly)
    queue.put((sum(encode.batches), cache.get(7).sum().item()))


def test_two_builders_share_the_work_and_the_file(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    others = [context.Process(target=_slow_build, args=(tmp_path, queue)) for _ in range(2)]
    for process in others:
        process.start()
    results = sorted(queue.get(timeout=60) for _ in others)
    for process in others:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert [encoded for encoded, _ in results] == [3, 11]  # one did all, the other found it done
    assert results[0][1] == results[1][1] == FeatureCache(tmp_path, MADE_BY).get(7).sum().item()
