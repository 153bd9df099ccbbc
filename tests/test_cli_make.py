"""The commands that make something: models, cleaned data, a page on the hub."""

import json
import os
import signal

import numpy as np
import pyarrow.parquet as pq
import pytest

from openblip import cli
from openblip.config import save_json
from openblip.curate.capfilt import MatchScale
from openblip.curate.engine_ray import RayOptions
from openblip.data.sources import open_source
from openblip.hub import load_pretrained
from openblip.recipes import Recipe, recipe_named
from openblip.train import stage
from openblip.train.config import TrainConfig
from tests.curate.made import smooth
from tests.data.made import tar_bytes, write, write_images
from tests.tiny_models import picture_folder
from tests.tiny_recipes import tiny_recipe

pytestmark = pytest.mark.usefixtures("own_cache")


def test_train_from_a_recipe_file_and_use_what_it_made(root, answer, tmp_path):
    save_json(tiny_recipe(), tmp_path / "tiny.json")
    data = ("--data", root / "data", "--out", tmp_path / "run", "--split", "train")
    found = answer("train", tmp_path / "tiny.json", *data, "--steps", 2, "--seed", 7)
    assert found["step"] == 2 and found["interrupted"] is False
    assert {"itc", "itm", "lm"} <= set(found["losses"])
    facts = answer("info", found["model"])
    assert facts["model"] == "Blip" and facts["info"]["steps"] == 2
    more = ("--init", found["model"], "--data", root / "data", "--out", tmp_path / "captioner")
    save_json(tiny_recipe("caption"), tmp_path / "caption.json")
    captioner = answer("train", tmp_path / "caption.json", *more)
    assert captioner["step"] == 3
    two = ("--data", root / "data", root / "data", "--take", 3, 5, "--out", tmp_path / "mixed")
    assert answer("train", tmp_path / "tiny.json", *two, "--steps", 1)["step"] == 1
    picture = root / "data/images/00.png"
    options = ("--model", captioner["model"], "--max-new-tokens", 3)
    assert list(answer("caption", picture, *options)) == [str(picture)]


def test_an_interrupted_training_says_so_and_ends_with_130(root, monkeypatch, capsys, tmp_path):
    save_json(tiny_recipe(), tmp_path / "tiny.json")
    call = ["train", tmp_path / "tiny.json", "--data", root / "data", "--out", tmp_path / "run"]

    def stopped(loop_task, *of, fit=stage.fit, **options):
        loop_task.begin_step = lambda step: os.kill(os.getpid(), signal.SIGTERM)
        return fit(loop_task, *of, **options)

    monkeypatch.setattr(stage, "fit", stopped)
    with pytest.raises(SystemExit) as end:
        cli.main([*map(str, call), "--steps", "3"])
    said = capsys.readouterr().out.strip()
    place = str(tmp_path / "run/checkpoints/step-00000001")
    assert end.value.code == 130 and said == f"interrupted after step 1: the same call goes on from {place}"
    with pytest.raises(SystemExit) as end:
        cli.main([*map(str, call), "--steps", "3", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert end.value.code == 130 and found["interrupted"] and found["step"] == 2 and "model" not in found
    assert found["checkpoint"].endswith("step-00000002")
    monkeypatch.undo()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", root / "cache")
    monkeypatch.setattr("openblip.train.distributed.is_main", lambda: False)
    cli.main([*map(str, call), "--steps", "3"])
    assert capsys.readouterr().out == "", "of several processes one speaks"


def test_bare_pictures_are_information_and_may_be_given_captions(root, answer, mistake, tmp_path):
    write_images(tmp_path / "bare")
    found = answer("info", tmp_path / "bare")
    assert (found["rows"], found["kind"]) == (3, "images")
    call = ["capfilt", "--data", tmp_path / "bare", "--out", tmp_path / "job", "--threshold", 0]
    call += ["--captioner", root / "blip", "--filter", root / "filter"]
    assert "--captionless" in mistake(*call)
    found = answer(*call, "--captionless")
    assert (found["images"], found["texts"]) == (3, 3)
    page = (tmp_path / "job/report.html").read_text()
    assert "Written" in page and page.count("data:image/") == 3
    rows = list(open_source(tmp_path / "job/parquet"))
    assert len(rows) == 3 and all(len(row.captions) == 1 for row in rows)


def test_capfilt_fits_its_scale_to_human_pairs(root, answer, mistake, tmp_path):
    call = ["capfilt", "--data", root / "data", "--out", tmp_path / "job", "--threshold", 0]
    call += ["--captioner", root / "blip", "--filter", root / "filter"]
    answer(*call, "--calibrate", root / "data")
    card = json.loads(next((tmp_path / "job").glob("scores-*.json")).read_text())
    scale = card["fingerprint"]["config"]["scale"]
    assert scale["itc"] != 0 and all(float(f"{value:.4g}") == value for value in scale.values())
    line = pq.read_table(next((tmp_path / "job").glob("scores-*.parquet"))).to_pylist()[0]
    assert line["match"] == pytest.approx(float(MatchScale(**scale)(np.array(line["itm"]), line["itc"])))
    assert "holds a job made otherwise: config.scale" in mistake(*call), "judged by another scale"
    picture_folder(tmp_path / "one", 1)
    assert "1 human pairs are too few" in mistake(*call, "--calibrate", tmp_path / "one")


def test_what_was_written_stays_until_there_is_something_better(root, answer, mistake, tmp_path):
    human = picture_folder(tmp_path / "human", 12)
    (human / "images/03.png").unlink()
    (human / "images/04.png").write_bytes(b"no picture")
    call = ["capfilt", "--data", root / "data", "--out", tmp_path / "job", "--human", human]
    call += ["--captioner", root / "blip", "--filter", root / "filter"]
    answer(*call, "--threshold", 0)
    listed = (tmp_path / "job/bad_human_rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["reason"] for line in listed] == ["missing", "not_an_image"]
    assert len(open_source(tmp_path / "job/parquet")) == 18, "the good ones"
    before = {path: path.read_bytes() for path in (tmp_path / "job").glob("*/*")}
    assert len(before) > 4
    assert "no text is kept" in mistake(*call, "--threshold", 1)
    assert {path: path.read_bytes() for path in (tmp_path / "job").glob("*/*")} == before
    (tmp_path / "job/parquet/README.md").write_text("somebody else's")
    assert "is there already" in mistake(*call, "--threshold", 0)


def test_capfilt_writes_job_datasets_and_report_and_may_be_called_again(root, answer, tmp_path):
    call = ["capfilt", "--data", root / "data", "--out", tmp_path / "job"]
    call += ["--captioner", root / "blip", "--filter", root / "filter", "--human", root / "data"]
    found = answer(*call, "--threshold", 0)
    assert (found["images"], found["rows"], found["found_done"], found["bad"]) == (8, 8, 0, {})
    assert found["texts"] >= 9, "the web's and written ones"
    tables = [pq.read_table(file) for file in sorted((tmp_path / "job/parquet").glob("*.parquet"))]
    kinds = [one["kind"] for table in tables for row in table["provenance"].to_pylist() for one in row]
    assert kinds.count("web") == kinds.count("human") == 8 and kinds.count("synthetic") == found["texts"] - 8
    tars = open_source(tmp_path / "job/webdataset", cache_dir=tmp_path / "cache")
    assert len(tars) == 16 and all(row.captions for row in tars)
    report = (tmp_path / "job/report.html").read_text()
    assert "data:image/" in report and "http" not in report.replace("http://www.w3.org", "")
    again = answer(*call, "--top-k", 1)
    assert again["found_done"] == again["shards"] == found["shards"], "no text is judged twice"
    table = pq.read_table(sorted((tmp_path / "job/parquet").glob("*.parquet"))[0])
    assert all(len(captions) == 1 for captions in table["captions"].to_pylist()), "but kept by the new rule"


def test_bootstrap_hands_on_what_it_was_told(root, answer, monkeypatch, tmp_path):
    told = {}

    def run_rounds(web, human, out, config, **options):
        told.update(options, web=len(web), human=len(human), out=out, config=config)
        return [{"round": 1, "model": "x"}, {"round": 2, "model": "y"}]

    monkeypatch.setattr("openblip.curate.rounds.run_rounds", run_rounds)
    save_json(tiny_recipe("caption", 5), tmp_path / "caption.json")
    call = [
        "bootstrap",
        "--data",
        root / "data",
        "--split",
        "train",
        "--human",
        root / "data",
        "--out",
        tmp_path,
    ]
    call += [
        "--rounds",
        2,
        "--caption",
        tmp_path / "caption.json",
        "--threshold",
        0.7,
        "--captions",
        3,
        "--seed",
        9,
    ]
    assert [one["model"] for one in answer(*call, "--model", root / "blip")] == ["x", "y"]
    assert (told["web"], told["human"], told["rounds"], told["out"]) == (4, 8, 2, tmp_path)
    assert told["model"] == str(root / "blip") and told["batch_size"] == 32 and told["ray"] is None
    answer(*call, "--engine", "ray", "--actors", 3)
    assert told["ray"] == RayOptions(actors=3)
    config = told["config"]
    assert config.caption.train.max_steps == 5 and config.pretrain == recipe_named("small_pretrain")
    assert (config.threshold, config.capfilt.seed, config.capfilt.generation.num_return_sequences) == (
        0.7,
        9,
        3,
    )


def test_push_says_where_it_is(root, answer, mistake, monkeypatch, tmp_path):
    told = []
    monkeypatch.setattr(
        "openblip.hub.push_to_hub",
        lambda *of, **how: told.append((*of, how)) or "https://hub.example/ann/blip",
    )
    assert answer("push", root / "blip", "ann/blip", "--private") == {"url": "https://hub.example/ann/blip"}
    assert told == [(root / "blip", "ann/blip", {"private": True})]
    monkeypatch.undo()
    assert "no config.json" in mistake("push", tmp_path, "ann/blip")


def test_train_takes_a_vocabulary_for_clip(root, answer, mistake, tmp_path):
    geometry = load_pretrained(root / "clip").model.config
    train = TrainConfig(max_steps=1, batch_size=2, save_every=None)
    save_json(Recipe("clip", train, clip=geometry, augment=None, workers=0), tmp_path / "clip.json")
    call = ("train", tmp_path / "clip.json", "--data", root / "data", "--out", tmp_path / "run")
    assert "vocabulary" in mistake(*call)
    assert answer(*call, "--tokenizer", root / "clip")["step"] == 1
    assert answer("info", tmp_path / "run/model")["model"] == "Clip"


def web_tars(folder, count=3):
    """Tars as img2dataset writes them, of two pictures each."""
    for shard in range(count):
        members = {}
        for number in (2 * shard, 2 * shard + 1):
            smooth(number, 48).save(folder / "one.png")
            members[f"{number:04d}.png"] = (folder / "one.png").read_bytes()
            members[f"{number:04d}.txt"] = f"a thing of number {number}".encode()
        write(folder / f"web/{shard:05d}.tar", tar_bytes(members))
    return folder / "web"


def test_a_shard_put_aside_is_said_and_ends_with_3(root, answer, mistake, capsys, tmp_path):
    write(web_tars(tmp_path) / "00001.tar", b"no tar")
    call = ["capfilt", "--data", tmp_path / "web", "--out", tmp_path / "job", "--threshold", 0]
    call += ["--captioner", root / "blip", "--filter", root / "filter", "--write", "webdataset", "uids"]
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            cli.main([*map(str, call), "--json"])
        said = capsys.readouterr()
        assert end.value.code == 3 and json.loads(said.out)["images"] == 4
        assert "1 of 3 shards were put aside (00001: ReadError: truncated header)" in said.err
    assert not (tmp_path / "job/parquet").exists() and len(np.load(tmp_path / "job/uids.npy")) == 4
    assert len(open_source(tmp_path / "job/webdataset", cache_dir=tmp_path / "c")) == 4


def test_a_finished_job_is_gone_through_without_a_model_or_a_picture(root, answer, monkeypatch, tmp_path):
    web_tars(tmp_path)
    call = ["capfilt", "--data", tmp_path / "web", "--out", tmp_path / "job"]
    call += ["--captioner", root / "blip", "--filter", root / "filter"]
    first = answer(*call, "--threshold", 0)
    monkeypatch.setattr("openblip.curate.loading.load", lambda *_, **__: pytest.fail("a model was loaded"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "job").glob("*/*")}
    again = answer(*call, "--threshold", 0)
    assert again["found_done"] == 3 and again["sha256"] == first["sha256"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "job").glob("*/*")} == before
    assert answer(*call, "--top-k", 1)["found_done"] == 3, "another rule asks no model either"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "job").glob("*/*")} != before


def test_a_dry_run_says_what_it_would_take(root, answer, capsys, tmp_path):
    call = ["capfilt", "--data", web_tars(tmp_path), "--out", tmp_path / "job", "--dry-run", "--price", 3]
    call += ["--captioner", root / "blip", root / "blip", "--filter", root / "filter"]
    found = answer(*call)
    assert (found["images"], found["shards"], found["samples"]) == (6, 3, 6) and found["cost"] > 0
    assert not list((tmp_path / "job").glob("scores-*"))
    cli.main([*map(str, call)])
    assert "about 6 usable pictures in 3 shards" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("--threshold", 80), "threshold is a P(match) between 0 and 1, got 80.0"),
        (("--top-k", 0), "top_k is at least 1, got 0"),
        (("--script", "klingon"), "script: 'klingon' is not known"),
        (("--batch-size", 0), "batch_size and decoders are at least 1, got 0 and 1"),
        (("--decoders", 0, "--dry-run"), "batch_size and decoders are at least 1, got 32 and 0"),
        (("--max-bad-share", 2), "max_bad_share is a share between 0 and 1"),
    ],
)
def test_impossible_rules_are_refused_before_the_job(root, mistake, tmp_path, wrong, said):
    call = ["capfilt", "--data", root / "data", "--out", tmp_path / "job"]
    call += ["--captioner", root / "blip", "--filter", root / "filter"]
    assert said in mistake(*call, *wrong) and not (tmp_path / "job").exists()


def test_bootstrap_refuses_an_impossible_threshold_before_the_first_step(root, mistake, tmp_path):
    call = ["bootstrap", "--data", root / "data", "--human", root / "data", "--out", tmp_path / "job"]
    found = mistake(*call, "--threshold", 80)
    assert "threshold is a P(match) between 0 and 1, got 80.0" in found and not (tmp_path / "job").exists()


def test_options_of_ray_want_the_engine(root, mistake, tmp_path):
    call = ["capfilt", "--data", root / "data", "--out", tmp_path / "job"]
    call += ["--captioner", root / "blip", "--filter", root / "filter"]
    assert "are for --engine ray" in mistake(*call, "--actors", 2)
    assert "actors is at least 1" in mistake(*call, "--engine", "ray", "--actors", 0)


def test_copies_and_short_texts_are_left_out(root, answer, tmp_path):
    web = web_tars(tmp_path)
    write(web / "00003.tar", (web / "00000.tar").read_bytes())
    call = ["capfilt", "--data", web, "--out", tmp_path / "job", "--threshold", 0, "--dedup", 0]
    call += ["--captioner", root / "blip", "--filter", root / "filter", "--write", "webdataset"]
    found = answer(*call, "--min-words", 5, "--script", "latin")
    assert (found["shards"], found["images"]) == (4, 6)
    kept = open_source(tmp_path / "job/webdataset", cache_dir=tmp_path / "c")
    assert all(len(text.split()) >= 5 for row in kept for text in row.captions) and len(kept) == 6
