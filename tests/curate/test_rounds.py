"""CapFilt in rounds: who begins with whom, what is judged, and that an interrupted call goes on as if it never was."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from openblip.config import UserError
from openblip.curate import rounds as rounds_module
from openblip.curate.capfilt import MatchScale
from openblip.curate.dataset import scores
from openblip.curate.human import HumanRows, check_enough
from openblip.curate.rounds import RoundsConfig, run_rounds
from openblip.data.sources import Source, open_source
from openblip.hub import load_pretrained
from openblip.train import log
from tests.tiny_models import drawing, picture_folder, save_blip
from tests.tiny_recipes import tiny_recipe


@pytest.fixture(scope="module", autouse=True)
def no_curves_and_own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "draw_curves", lambda metrics, picture: picture.write_bytes(b"curves"))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[Source, Source]:
    """Web and human pairs. Their files have the same names, and one of the human ones is broken."""
    folder = tmp_path_factory.mktemp("data")
    picture_folder(folder / "human", 12)
    for number in range(12):  # other pictures under the same names
        Image.new("RGB", (40, 40), (20 * number, 90, 30)).save(folder / f"human/images/{number:02d}.png")
    (folder / "human/images/03.png").write_bytes(b"broken")
    return open_source(picture_folder(folder / "web", 10)), open_source(folder / "human")


def config(**changes) -> RoundsConfig:
    """A filter that learned next to nothing keeps something at 0.3."""
    stages = {stage: tiny_recipe(stage, 2) for stage in ("pretrain", "caption", "retrieval")}
    return RoundsConfig(**{**stages, "threshold": 0.3, **changes})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_pretrained(folder).model.state_dict()


class Stages:
    """Stands before `run_stage` and notes folder, stage, start and rows; at `stop_at` it is interrupted."""

    def __init__(self, out: Path, stop_at: str = "") -> None:
        self.out, self.stop_at, self.ran, self.run_stage = out, stop_at, [], rounds_module.run_stage

    def __call__(self, recipe, rows, folder, **options):
        name = str(folder.relative_to(self.out))
        self.ran.append((name, recipe.stage, str(Path(recipe.init).relative_to(self.out)), len(rows)))
        if name == self.stop_at:
            return SimpleNamespace(fit=SimpleNamespace(interrupted=True))
        return self.run_stage(recipe, rows, folder, **options)


@pytest.fixture(scope="module")
def two(data, tmp_path_factory):
    """Two rounds: folder, figures, the stages that ran, the lines that were said."""
    out, said = tmp_path_factory.mktemp("two"), []
    with pytest.MonkeyPatch.context() as patch:
        stages = Stages(out)
        patch.setattr(rounds_module, "run_stage", stages)
        found = run_rounds(*data, out, config(), rounds=2, say=said.append)
    return out, found, stages.ran, said


def test_each_round_begins_with_the_model_of_the_one_before_and_pretrains_from_the_start(two):
    out, found, ran, said = two
    left = [len(open_source(out / f"round{n}/parquet")) for n in (1, 2)]
    assert [(name, stage, init) for name, stage, init, _ in ran] == [
        ("round0", "pretrain", "start"),
        ("round1/captioner", "caption", "round0/model"),
        ("round1/filter", "retrieval", "round0/model"),
        ("round1", "pretrain", "start"),
        ("round2/captioner", "caption", "round1/model"),
        ("round2/filter", "retrieval", "round1/model"),
        ("round2", "pretrain", "start"),
    ]
    assert [rows for *_, rows in ran] == [21, 11, 11, left[0], 11, 11, left[1]]
    assert [one["model"] for one in found] == [str(out / f"round{n}/model") for n in (1, 2)]
    assert [line for line in said if line.startswith("round 1: kept")], said
    assert (out / "round2/report.html").is_file() and json.loads(
        (out / "round1/round.json").read_text()
    ) == found[0]


def test_every_round_judges_the_web_pairs_as_they_were_found(two, data):
    out, found, *_ = two
    tables = [scores(out / f"round{n}/job").to_pylist() for n in (1, 2)]
    for table, figures in zip(tables, found, strict=True):
        web = {(line["id"], line["text"]) for line in table if line["kind"] == "web"}
        assert web == {(row.id, text) for row in data[0] for text in row.captions}
        assert figures["web"]["texts"] == 10
        assert figures["web"]["kept"] == sum(line["match"] >= 0.3 for line in table if line["kind"] == "web")
    assert {line["filter"] for line in tables[0]}.isdisjoint(line["filter"] for line in tables[1])
    kept = pq.read_table(sorted((out / "round2/parquet").glob("*.parquet"))).to_pylist()
    kinds = [one["kind"] for row in kept for one in row["provenance"]]
    assert kinds.count("human") == 11 and kinds.count("web") == found[1]["web"]["kept"]


def test_human_rows_have_ids_of_their_own_and_no_bad_ones(data, tmp_path):
    told: list[tuple[int, int]] = []
    human = HumanRows(data[1], tmp_path / "bad.jsonl", lambda *done: told.append(done))
    assert told == [(number, 12) for number in range(1, 13)]
    assert len(human) == 11 and {row.id for row in human}.isdisjoint(row.id for row in data[0])
    (broken,) = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert broken["reason"] == "not_an_image" and "03.png" in broken["detail"]
    (tmp_path / "few").mkdir()
    for name in "abc":
        drawing(0).save(tmp_path / f"few/{name}.png")
    lines = [
        {"file_name": "a.png", "caption": "a"},
        {"file_name": "b.png"},
        {"file_name": "c.png", "caption": "c"},
    ]
    (tmp_path / "few/captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    few = HumanRows(open_source(tmp_path / "few"), tmp_path / "bad.jsonl")
    assert [row.captions for row in few] == [["a"], ["c"]] and few[-1].id == "human/c.png"
    (listed,) = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert listed["reason"] == "missing_caption"


def test_an_interrupted_call_goes_on_and_a_finished_one_trains_nothing(two, data, tmp_path, monkeypatch):
    out, found, ran, _ = two
    first = Stages(tmp_path, stop_at="round1/filter")
    monkeypatch.setattr(rounds_module, "run_stage", first)
    with pytest.raises(KeyboardInterrupt):
        run_rounds(*data, tmp_path, config(), rounds=2, say=str)
    again = Stages(tmp_path)
    again.run_stage = first.run_stage
    monkeypatch.setattr(rounds_module, "run_stage", again)
    resumed = run_rounds(*data, tmp_path, config(), rounds=2, say=str)
    assert again.ran == ran[len(first.ran) - 1 :], "what was finished is not run again"
    assert [{**one, "model": ""} for one in resumed] == [{**one, "model": ""} for one in found]
    for name in ("round1/model", "round2/model"):
        whole = weights(out / name)
        assert all(torch.equal(value, whole[key]) for key, value in weights(tmp_path / name).items())
    again.ran.clear()
    assert run_rounds(*data, tmp_path, config(), rounds=2, say=str) == resumed and again.ran == []


def test_other_settings_or_data_want_another_folder(two, data):
    out = two[0]
    for web, human, changed, named in (
        (*data, config(threshold=0.4), "threshold was 0.3 and is 0.4"),
        (*data, config(caption=tiny_recipe("caption", 5)), "caption.train.max_steps was 2 and is 5"),
        (data[1], data[1], config(), "web was"),
    ):
        with pytest.raises(UserError, match=named):
            run_rounds(web, human, out, changed, rounds=2, say=str)
    with pytest.raises(UserError, match="rounds is at least 1, got 0"):
        run_rounds(*data, out, config(), rounds=0)
    with pytest.raises(UserError, match="caption: wanted a recipe of this stage, got one of 'retrieval'"):
        config(caption=tiny_recipe("retrieval"))


def batch_of(stage: str, size: int):
    recipe = tiny_recipe(stage, 2)
    return replace(recipe, train=replace(recipe.train, batch_size=size))


@pytest.mark.parametrize(
    ("changes", "batch_size", "said"),
    [
        (
            {"caption": batch_of("caption", 13)},
            4,
            "human: 12 pairs are too few for a batch of 13 of the caption recipe",
        ),
        (
            {"retrieval": batch_of("retrieval", 13)},
            4,
            "12 pairs .* a batch of 13 of the retrieval recipe: wanted 13 or",
        ),
        (
            {"retrieval": batch_of("retrieval", 10), "held_out": 4},
            4,
            r"held out \(every 4-th\): wanted 14 or more",
        ),
        ({"held_out": 12}, 4, "two pairs held out .* wanted 13 or more"),
        (
            {"pretrain": batch_of("pretrain", 23)},
            4,
            "web and human: 22 pairs are too few .* the pretrain recipe",
        ),
        ({}, 0, "batch_size and decoders are at least 1, got 0"),
    ],
)
def test_too_few_pairs_are_refused_before_anything_is_written(data, tmp_path, changes, batch_size, said):
    with pytest.raises(UserError, match=said):
        run_rounds(*data, tmp_path / "out", config(**changes), batch_size=batch_size, say=str)
    assert not (tmp_path / "out").exists()


def test_a_folder_refused_for_its_bad_rows_takes_more_rows(data, tmp_path, monkeypatch):
    """Of 12 human rows one is broken, which is not known before all were opened."""
    monkeypatch.setattr(rounds_module, "prepare", lambda *_: pytest.fail("a model was made"))
    needs_12 = config(caption=batch_of("caption", 12))
    with pytest.raises(
        UserError, match="human: 11 pairs are too few for a batch of 12 of the caption recipe"
    ):
        run_rounds(*data, tmp_path, needs_12, say=str)
    assert [path.name for path in tmp_path.iterdir()] == ["bad_human_rows.jsonl"]
    more = open_source(picture_folder(tmp_path.with_name(f"{tmp_path.name}-more"), 12))
    with pytest.raises(pytest.fail.Exception, match="a model was made"):  # the folder is not in the way
        run_rounds(data[0], more, tmp_path, needs_12, say=str)


@pytest.mark.parametrize("held_out", [2, 3, 5])
@pytest.mark.parametrize("batch", [1, 4, 7])
def test_the_number_of_pairs_it_asks_for_is_the_least_that_will_do(held_out, batch):
    stages = config(retrieval=batch_of("retrieval", batch), caption=batch_of("caption", 1), held_out=held_out)

    def is_enough(human: int) -> bool:
        out = len(range(0, human, held_out))
        return out >= 2 and human - out >= batch

    for human in range(1, 30):
        if is_enough(human):
            check_enough(stages, human)
        else:
            with pytest.raises(UserError, match="too few"):
                check_enough(stages, human)


def test_an_impossible_threshold_is_refused_by_its_name():
    for wrong in (80.0, -0.1, float("nan")):
        with pytest.raises(UserError, match=f"threshold is a P.match. between 0 and 1, got {wrong}"):
            config(threshold=wrong)


def test_a_share_of_the_human_pairs_can_fit_the_filters_scale(data, tmp_path, monkeypatch):
    stages, fitted = Stages(tmp_path), []
    monkeypatch.setattr(rounds_module, "run_stage", stages)
    scale = MatchScale(0.5, 2.0, -0.1)
    monkeypatch.setattr(rounds_module, "fit_scale_on", lambda judge, rows: fitted.append(rows) or scale)
    given = save_blip(tmp_path / "given", freeze_vision=True)
    run_rounds(*data, tmp_path, config(threshold=0.0, held_out=4), rounds=1, model=given, say=str)
    assert [(stage, rows) for _, stage, _, rows in stages.ran[:2]] == [("caption", 11), ("retrieval", 8)]
    (held_out,) = fitted
    assert [row.id for row in held_out] == [f"human/images/{n:02d}.png" for n in (0, 5, 9)], "03 is broken"
    line = scores(tmp_path / "round1/job").to_pylist()[0]
    assert line["match"] == pytest.approx(float(scale(np.array(line["itm"]), line["itc"])))
    with pytest.raises(UserError, match="held_out 1: wanted 2 or more"):
        config(held_out=1)


def test_a_model_that_was_pretrained_already_stands_for_round_0(data, tmp_path, monkeypatch):
    given = save_blip(tmp_path / "given", freeze_vision=True)
    stages = Stages(tmp_path)
    monkeypatch.setattr(rounds_module, "run_stage", stages)
    run_rounds(*data, tmp_path, config(threshold=0.0), rounds=1, model=given, say=str)
    assert [init for *_, init, _ in stages.ran] == ["given", "given", "start"]
    assert not (tmp_path / "round0").exists()
    assert not (tmp_path / "features").exists(), "its tower may be another"
