"""The job: all texts once, whatever interrupts it; nothing done twice; nothing mixed."""

import json
import multiprocessing
import os
import re
import signal
import threading
from dataclasses import replace

import pytest
import torch

from openblip.config import UserError
from openblip.curate import shard
from openblip.curate.capfilt import CapFilt
from openblip.curate.dataset import scores
from openblip.curate.engine import run
from openblip.curate.job import SCHEMA, ShardManifest, manifests
from openblip.data.image import open_image
from openblip.data.rows import BadRow
from openblip.data.sources import open_source
from tests.curate.made import WRONG, ColourCapFilt, caption, picture_rows, tar_source, tiny_blip
from tests.data.made import parquet_bytes, png, write


def files(folder) -> dict[str, bytes]:
    """What a job's folder holds, but for the page that says how fast it went."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "progress.html"}


def test_a_job_scores_every_text_of_every_picture(tmp_path):
    said = []
    source, capfilt = tar_source(tmp_path), ColourCapFilt()
    result = run(
        capfilt,
        source,
        tmp_path / "job",
        batch_size=3,
        progress=lambda state: said.append((state.rows_done + state.in_work, state.rows)),
    )
    assert (result.shards, result.found_done, result.rows, result.images) == (3, 0, 12, 12)
    assert (result.texts, result.bad, capfilt.calls) == (24, {}, 6)
    assert list(dict.fromkeys(said)) == [(3, 12), (4, 12), (7, 12), (8, 12), (11, 12), (12, 12)]
    table = scores(tmp_path / "job")
    assert table.schema == SCHEMA
    lines = table.to_pylist()
    assert [(line["row"], line["id"]) for line in lines[::2]] == [(n % 4, f"p{n}") for n in range(12)]
    assert [line["text"] for line in lines[::2]] == [caption(n) for n in range(12)]
    wrong = {line["id"] for line in lines if line["kind"] == "web" and line["itm"] < 0.5}
    assert wrong == {f"p{number}" for number in WRONG}, "the planted noise, all of it and nothing else"
    one = lines[3]
    assert one["where"] == source[1].where and "bytes" in one["image"] and one["seed"] > 0
    assert (one["captioner"], one["filter"], one["kind"]) == ("c" * 16, "f" * 16, "synthetic")


def test_a_second_run_asks_no_model_and_changes_nothing(tmp_path):
    source, job = tar_source(tmp_path), tmp_path / "job"
    run(ColourCapFilt(), source, job)
    before = files(job)
    again = ColourCapFilt()
    result = run(again, source, job)
    assert again.calls == 0 and result.found_done == 3 and result.texts == 24
    assert files(job) == before


def test_a_lost_or_damaged_shard_alone_is_made_again(tmp_path):
    source, job = tar_source(tmp_path), tmp_path / "job"
    run(ColourCapFilt(), source, job)
    before = files(job)
    (job / "scores-00000.parquet").unlink()
    broken = bytearray(before["scores-00002.parquet"])
    broken[20] ^= 1
    (job / "scores-00002.parquet").write_bytes(broken)
    again = ColourCapFilt()
    assert run(again, source, job).found_done == 1 and again.calls == 2
    assert files(job) == before


@pytest.mark.parametrize("moment", ["in the model", "before the manifest"])
def test_kill_and_go_on_is_the_undisturbed_run(moment, tmp_path, monkeypatch):
    source = tar_source(tmp_path, bad={1: b"no picture", 6: b""})
    run(ColourCapFilt(), source, tmp_path / "whole", batch_size=2)
    job = tmp_path / "job"

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def work():
        if moment == "in the model":  # of the second batch of the second shard
            run(ColourCapFilt(die_at=lambda calls: calls == 3 and die()), source, job, batch_size=2)
        publish = shard.publish
        shard.publish = lambda path, content: (
            die() if path.name == "scores-00001.json" else publish(path, content)
        )
        run(ColourCapFilt(), source, job, batch_size=2)

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert (job / "scores-00000.json").exists() and not (job / "scores-00001.json").exists()
    assert (job / "scores-00001.parquet").exists() == (moment == "before the manifest")
    again = ColourCapFilt()
    result = run(again, source, job, batch_size=2)
    assert result.found_done == 1 and again.calls == 4, "two shards of two batches"
    assert files(job) == files(tmp_path / "whole")
    assert result.bad == {"not_an_image": 1, "empty": 1}


def test_a_job_of_other_models_configuration_or_source_is_refused(tmp_path):
    source, job = tar_source(tmp_path), tmp_path / "job"
    run(ColourCapFilt(), source, job)
    before = files(job)
    with pytest.raises(UserError, match=r"job made otherwise: config.seed was 0 and is 5; use a new folder"):
        run(ColourCapFilt(seed=5), source, job)
    other = ColourCapFilt()
    other.models = {**other.models, "filter": "0" * 16}
    with pytest.raises(UserError, match="filter was 'ffffffffffffffff' and is '0000000000000000'"):
        run(other, source, job)
    with pytest.raises(UserError, match="source was"):
        run(ColourCapFilt(), tar_source(tmp_path / "less", tars=2), job)
    assert files(job) == before and other.calls == 0


def test_bad_pictures_and_rows_are_recorded_and_the_rest_goes_on(tmp_path):
    source, job = (
        tar_source(tmp_path, bad={0: png((1, 2, 3))[:45], 5: b"GIF89 no", 7: b""}),
        tmp_path / "job",
    )
    result = run(ColourCapFilt(), source, job, batch_size=4)
    assert (result.rows, result.images, result.texts) == (12, 9, 18)
    listed = [json.loads(line) for line in (job / "bad_rows.jsonl").read_text().splitlines()]
    assert [entry["where"] for entry in listed] == ["00000.tar 0000", "00001.tar 0005", "00001.tar 0007"]
    assert sum(result.bad.values()) == 3 and result.bad["empty"] == 1
    assert {line["id"] for line in scores(job).to_pylist()} == {f"p{n}" for n in range(12)} - {
        "p0",
        "p5",
        "p7",
    }


def test_a_shard_of_too_many_bad_pictures_is_put_aside_until_it_is_tried_again(tmp_path):
    bad = dict.fromkeys(range(260, 275), b"")
    source, job = tar_source(tmp_path, tars=3, each=130, bad=bad), tmp_path / "job"
    result = run(ColourCapFilt(), source, job, batch_size=65)
    assert list(result.aside) == ["00002"] and (result.rows, result.images, result.bad) == (260, 260, {})
    assert re.match(
        r"15 bad rows among 65 of 130 \(empty 15\): more than the share of 0.1", result.aside["00002"]
    )
    some = tar_source(tmp_path / "some", tars=1, each=130, bad=dict.fromkeys(range(12), b""))
    assert not run(ColourCapFilt(), some, tmp_path / "some/job", batch_size=13).aside, (
        "12 of the first 13, but of all"
    )
    again = ColourCapFilt()
    assert run(again, source, job).aside == result.aside and again.calls == 0, "not tried unasked"
    assert run(again, source, job, retry=True).aside.keys() == {"00002"}
    result = run(again, source, job, retry=True, max_bad_share=0.2)
    assert not result.aside and result.bad == {"empty": 15} and not list(job.glob("quarantine-*"))


def test_a_source_without_one_good_picture_is_an_error(tmp_path):
    source = tar_source(tmp_path, tars=1, each=2, bad={0: b"", 1: b""})
    with pytest.raises(UserError, match="no row of 2 can be used: empty 2"):
        run(ColourCapFilt(), source, tmp_path / "job")


def test_pictures_as_bytes_and_paths(tmp_path):
    write(
        tmp_path / "bytes.parquet",
        parquet_bytes({"image": [png((255, 0, 0))], "caption": ["red"], "id": ["x"]}),
    )
    run(ColourCapFilt(), open_source(tmp_path / "bytes.parquet", cache_dir=tmp_path / "c"), tmp_path / "job")
    (line,) = [line for line in scores(tmp_path / "job").to_pylist() if line["kind"] == "web"]
    assert line["image"] is None and line["itm"] == 0.9
    write(tmp_path / "a.png", png((255, 0, 0)))
    write(tmp_path / "rows.jsonl", '{"file_name": "a.png", "caption": "red"}\n')
    run(ColourCapFilt(), open_source(tmp_path / "rows.jsonl", cache_dir=tmp_path / "c"), tmp_path / "job2")
    assert scores(tmp_path / "job2").to_pylist()[0]["image"] == str(tmp_path / "a.png")


def test_rows_of_one_picture_speak_as_the_first(tmp_path):
    write(tmp_path / "a.png", png((255, 0, 0)))
    lines = [{"file_name": "a.png", "caption": text, "image_id": "same"} for text in ("red", "blue")]
    write(tmp_path / "rows.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    source = open_source(tmp_path / "rows.jsonl", cache_dir=tmp_path / "c")
    run(ColourCapFilt(), source, tmp_path / "job")
    found = scores(tmp_path / "job").to_pylist()
    assert {line["row"] for line in found} == {0}
    assert {line["text"] for line in found if line["kind"] == "web"} == {"red", "blue"}


def test_with_real_models_the_job_is_what_they_say_alone(tmp_path):
    rows = picture_rows(3)
    columns = {"image": [row.image for row in rows], "captions": [row.captions for row in rows]}
    write(tmp_path / "web.parquet", parquet_bytes({**columns, "id": [row.id for row in rows]}))
    source = open_source(tmp_path / "web.parquet", cache_dir=tmp_path / "c")
    capfilt = CapFilt(tiny_blip(1), tiny_blip(2))
    run(capfilt, source, tmp_path / "job", batch_size=2)
    alone = [text for row in rows for text in capfilt([row], capfilt.embed([row]))]
    found = scores(tmp_path / "job").to_pylist()
    assert [line["text"] for line in found] == [text.text for text in alone]
    assert [line["itm"] for line in found] == pytest.approx([text.itm for text in alone], abs=1e-5)


def test_pictures_are_decoded_while_the_model_works(tmp_path, monkeypatch):
    """The model's first call waits until the next shard's pictures have been opened."""
    opened, ahead = [], threading.Event()

    def opening(image, **options):
        opened.append(image)
        if len(opened) == 8:
            ahead.set()
        return open_image(image, **options)

    monkeypatch.setattr(shard, "open_image", opening)
    capfilt = ColourCapFilt(die_at=lambda calls: calls == 0 and waited.append(ahead.wait(30)))
    waited: list[bool] = []
    run(capfilt, tar_source(tmp_path), tmp_path / "job", batch_size=4)
    assert waited == [True] and len(opened) == 12


class Features:
    """Embeds [5, 16] by picture, of which one could not be computed."""

    def lookup(self, key: str) -> torch.Tensor:
        if key == "p2":
            raise BadRow("no_features", key, "could not be read when its features were computed")
        return torch.randn(5, 16, generator=torch.Generator().manual_seed(int(key[1:])))


def test_cached_features_stand_in_for_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(shard, "open_image", lambda *_, **__: pytest.fail("a picture was opened"))
    capfilt = CapFilt(tiny_blip(1), tiny_blip(1), features=Features())
    result = run(capfilt, tar_source(tmp_path, tars=1), tmp_path / "job")
    assert result.images == 3 and result.bad == {"no_features": 1}
    first, *_ = scores(tmp_path / "job").to_pylist()
    match = capfilt.filter.match_embeds(Features().lookup("p0")[None], [[caption(0)]])
    assert first["itm"] == pytest.approx(float(match.probability[0, 0]), abs=1e-5)


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    write(tmp_path / "job/.scores-00000.parquet.123.part", b"PAR1")
    write(
        tmp_path / "job/bad_rows.jsonl", b'{"reason": "empty", "where": "of a shard that was not finished"}\n'
    )
    run(ColourCapFilt(), tar_source(tmp_path, tars=1), tmp_path / "job")
    assert set(files(tmp_path / "job")) == {"scores-00000.parquet", "scores-00000.json", "bad_rows.jsonl"}
    assert files(tmp_path / "job")["bad_rows.jsonl"] == b""


def test_a_batch_size_of_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="batch_size and decoders are at least 1"):
        run(ColourCapFilt(), tar_source(tmp_path), tmp_path / "job", batch_size=0)


def test_every_line_of_a_manifest_is_about_its_shard(tmp_path):
    source, job = tar_source(tmp_path, bad={1: b""}), tmp_path / "job"
    run(ColourCapFilt(), source, job)
    first, second, _ = manifests(job)
    assert (first.rows, first.images, first.texts, len(first.bad)) == (4, 3, 6, 1)
    assert sum(first.web_match) == 3 and (second.web_match[10], second.web_match[90]) == (2, 2)
    assert replace(second, sha256="", web_match=[]) == ShardManifest("00001", 4, 4, 8, "", first.fingerprint)
