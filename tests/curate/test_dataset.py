"""Scores become datasets without a model, and what is written is read again as it was meant."""

import json
import tarfile

import pyarrow.parquet as pq
import pytest

from openblip.config import UserError
from openblip.curate.capfilt import keep_best
from openblip.curate.dataset import decide, scores, write_parquet, write_webdataset
from openblip.curate.engine import run
from openblip.data.rows import BadRows, ByteRange, Row
from openblip.data.sources import open_source
from tests.curate.made import WRONG, ColourCapFilt, caption, colour, tar_source
from tests.data.made import png, write

WRITERS = pytest.mark.parametrize("write_dataset", [write_parquet, write_webdataset])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(source, job folder, the model that was asked)."""
    folder = tmp_path_factory.mktemp("finished")
    source, capfilt = tar_source(folder), ColourCapFilt()
    run(capfilt, source, folder / "job")
    return source, folder / "job", capfilt


def kept_texts(table) -> list[str]:
    return [line["text"] for line in table.to_pylist() if line["kept"]]


def expected(number: int) -> list[str]:
    own = f"one {colour(number)} thing"
    return [own] if number in WRONG else [caption(number), own]


def picture(row: Row) -> bytes:
    return row.image.read() if isinstance(row.image, ByteRange) else row.image


def test_what_is_kept_is_decided_anew_without_a_model(finished):
    _, job, capfilt = finished
    calls, table = capfilt.calls, scores(job)
    half = decide(table)
    assert kept_texts(half) == [text for number in range(12) for text in expected(number)]
    assert len(kept_texts(decide(half, threshold=0.85))) == 8, "and once more on the result"
    assert len(kept_texts(decide(table, threshold=0))) == 24
    assert kept_texts(decide(table, threshold=1)) == []
    best = decide(table, "top_k", k=1)
    wanted = [expected(number)[0] for number in range(12)]
    assert kept_texts(best) == wanted and table.column_names == half.column_names[:-1]
    assert capfilt.calls == calls


def test_keep_best_is_what_top_k_is(finished):
    assert len(kept_texts(decide(scores(finished[1]), "top_k", k=9))) == 24
    assert keep_best([], 3) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "best"}, 'rule is "itm" or "top_k"'),
        ({"threshold": 2}, "between 0 and 1, got 2"),
        ({"k": 0}, "at least 1"),
    ],
)
def test_impossible_decisions_are_refused(options, message, finished):
    with pytest.raises(UserError, match=message):
        decide(scores(finished[1]), **options)


@WRITERS
def test_a_written_dataset_reads_as_it_was_meant(write_dataset, finished, tmp_path):
    source, job, capfilt = finished
    calls = capfilt.calls
    human = [Row("h1", [png((9, 9, 9))], ["A human's words, unchanged!", "twice"], split="train")]
    made = write_dataset(job, source, tmp_path / "out", human=human)
    assert (made.images, made.captions, made.left_out) == (13, {"web": 8, "synthetic": 12, "human": 2}, 0)
    again = open_source(tmp_path / "out", cache_dir=tmp_path / "cache")
    bad = BadRows()
    rows = list(again.rows(bad))
    assert bad.total == 0 and len(rows) == 13 and capfilt.calls == calls
    assert [(row.id, row.captions) for row in rows[:12]] == [(f"p{n}", expected(n)) for n in range(12)]
    assert [picture(row) for row in rows[:12]] == [picture(row) for row in source], "byte by byte"
    assert (rows[12].id, rows[12].captions) == ("h1", ["A human's words, unchanged!", "twice"])
    assert (rows[12].split, picture(rows[12])) == ("train", png((9, 9, 9)))
    web, own = rows[0].extra["provenance"]
    scored = {"itm": 0.9, "itc": 0.4, "match": 0.9, "captioner": "c" * 16, "filter": "f" * 16}
    assert web == {"text": caption(0), "kind": "web", "seed": None, **scored}
    assert own["kind"] == "synthetic" and own["seed"] == scores(job).to_pylist()[1]["seed"]
    assert rows[12].extra["provenance"][1] == {**dict.fromkeys(web), "text": "twice", "kind": "human"}
    card = (tmp_path / "out/README.md").read_text()
    assert "P(match) ≥ 0.5" in card and source.fingerprint in card


def test_the_tars_are_img2datasets(finished, tmp_path):
    source, job, _ = finished
    write_webdataset(job, source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.joinpath("out").glob("*.tar")) == [
        *("00000.tar", "00001.tar", "00002.tar")
    ]
    with tarfile.open(tmp_path / "out/00001.tar") as tar:
        assert tar.getnames()[:4] == ["000010000.png", "000010000.txt", "000010000.json", "000010001.png"]
        assert tar.extractfile("000010000.txt").read().decode() == expected(4)[0]
        facts = json.loads(tar.extractfile("000010000.json").read())
    assert facts["key"] == "000010000" and facts["captions"] == expected(4) and facts["image_id"] == "p4"


def test_the_parquet_is_plain(finished, tmp_path):
    source, job, _ = finished
    write_parquet(job, source, tmp_path / "out", rule="top_k", k=1)
    table = pq.read_table(tmp_path / "out/00000.parquet")
    assert table["captions"].to_pylist() == [expected(number)[:1] for number in range(4)]
    assert table["image"][0].as_py()["bytes"].startswith(b"\x89PNG")


@WRITERS
def test_pictures_without_a_kept_caption_are_left_out(write_dataset, finished, tmp_path):
    source, job, _ = finished
    made = write_dataset(job, source, tmp_path / "out", threshold=0.85)
    assert (made.images, made.left_out, made.captions) == (8, 4, {"web": 8})
    ids = {row.id for row in open_source(tmp_path / "out", cache_dir=tmp_path / "cache")}
    assert ids == {f"p{number}" for number in range(12)} - {f"p{number}" for number in WRONG}
    with pytest.raises(UserError, match="no text is kept at this threshold"):
        write_dataset(job, source, tmp_path / "none", threshold=1)
    assert not any(path.name.startswith((".none", "none")) for path in tmp_path.iterdir())


@WRITERS
def test_a_dataset_appears_when_it_is_complete_and_is_never_written_over(write_dataset, finished, tmp_path):
    source, job, _ = finished

    def breaking_off():
        yield Row("h", [png((1, 1, 1))], ["x"])
        raise RuntimeError("the power fails")

    with pytest.raises(RuntimeError):
        write_dataset(job, source, tmp_path / "out", human=breaking_off())
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="h: a human row without a caption"):
        write_dataset(job, source, tmp_path / "out", human=[Row("h", [b""], [])])
    write_dataset(job, source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "what was left behind is gone"
    with pytest.raises(UserError, match="is there already"):
        write_dataset(job, source, tmp_path / "out")


def test_jobs_that_do_not_fit_are_refused(finished, tmp_path):
    source, job, _ = finished
    with pytest.raises(UserError, match="was not made of"):
        write_parquet(job, tar_source(tmp_path, tars=2), tmp_path / "out")
    with pytest.raises(UserError, match="no finished shard"):
        scores(tmp_path / "nothing")
    for path in job.glob("scores-0000[02].*"):
        write(tmp_path / "half" / path.name, path.read_bytes())
    with pytest.raises(UserError, match=r"1 of 3 shards are not done \(the first: 00001\)"):
        write_parquet(tmp_path / "half", source, tmp_path / "out")
    write(tmp_path / "half/scores-00002.parquet", b"PAR1 broken")
    with pytest.raises(UserError, match=r"scores-00002.parquet: is damaged"):
        scores(tmp_path / "half")


def test_a_picture_that_is_gone_is_named(tmp_path):
    write(tmp_path / "a.png", png((255, 0, 0)))
    write(tmp_path / "rows.jsonl", '{"file_name": "a.png", "caption": "red"}\n')
    source = open_source(tmp_path / "rows.jsonl", cache_dir=tmp_path / "c")
    run(ColourCapFilt(), source, tmp_path / "job")
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match=r"rows.jsonl.*the picture cannot be read any more"):
        write_parquet(tmp_path / "job", source, tmp_path / "out")
