"""The whole story at toy size: every step runs, the files say what they promise, a second call trains nothing."""

import json
import re
import shutil
from dataclasses import replace
from functools import partial

import pytest

from openblip import cli
from openblip.config import UserError
from openblip.curate.capfilt import ScoredText
from openblip.data.rows import Row
from openblip.quickstart import run as run_module
from openblip.quickstart.report import write_report
from openblip.quickstart.story import MODELS, Story, StoryConfig, judge_filter, tell
from tests.tiny_models import COLOURS, SHAPES, drawing, picture_folder
from tests.tiny_recipes import tiny_recipe

RECALLS = {"tr@1", "tr@5", "tr@10", "ir@1", "ir@5", "ir@10", "r_mean"}


def tiny_story(**changes) -> StoryConfig:
    """Threshold 0.3: filters that learned next to nothing keep something."""
    sizes = {"human": 12, "test": 12, "threshold": 0.3, "held_out": 3}
    recipes = {
        "pretrain": tiny_recipe(steps=4),
        "caption": tiny_recipe("caption", 2),
        "retrieval": tiny_recipe("retrieval", 2),
    }
    return StoryConfig(**sizes | recipes | changes)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawings")
    found = []
    for number in range(60):
        path = folder / f"{number}.png"
        drawing(number).save(path)
        found.append(Row(f"d{number}", [str(path)], [f"a {COLOURS[number % 8]} {SHAPES[number // 8]}"]))
    return found


@pytest.fixture(scope="module")
def told(rows, tmp_path_factory) -> tuple[Story, list[str]]:
    lines: list[str] = []
    return tell(rows, tmp_path_factory.mktemp("story"), tiny_story(), lines.append), lines


def test_the_rows_are_split_and_only_the_story_knows_what_is_wrong(told, rows):
    story, lines = told
    parts = [{row.id for row in part} for part in (story.human, story.web, story.test)]
    assert [len(part) for part in parts] == [12, 36, 12] and len(set.union(*parts)) == 60
    true = {row.id: row.captions for row in rows}
    assert sum(not right for right in story.right.values()) == round(0.4 * 36)
    assert {row.id: row.captions == true[row.id] for row in story.web} == story.right
    assert all(row.captions == true[row.id] for row in [*story.human, *story.test])
    assert "36 web pairs of which 14 are wrong" in lines[0]


def test_the_results_are_there_for_machines(told):
    story, _ = told
    found = json.loads((story.folder / "results.json").read_text())
    assert found == json.loads(json.dumps(story.results))
    assert found["seed"] == 0 and found["seconds"] > 0 and found["peak_mb"] > 50
    assert {"auc", "precision", "recall", "threshold"} <= set(found["filter"])
    assert all(0 <= found["filter"][name] <= 1 for name in ("auc", "precision", "recall"))
    for name in MODELS:
        assert set(found[name]) >= RECALLS | {"cider"} and set(found[name]["reranked"]) >= RECALLS
        assert found[name]["r_mean"] == pytest.approx(
            sum(found[name][key] for key in RECALLS - {"r_mean"}) / 6
        )
        assert len(story.captions[name]) == 12


def test_the_second_model_sees_what_capfilt_kept(told):
    story, lines = told
    kept = [text for text, keep in zip(story.texts, story.kept, strict=True) if keep]
    assert all(text.match >= 0.3 for text in kept)
    assert {text.id for text in story.texts} == {row.id for row in story.web}
    assert {text.kind for text in story.texts} == {"web", "synthetic"}
    pictures = len({text.id for text in kept})
    assert story.results["filter"]["pictures_left"] == pictures
    assert f"bootstrapped: 4 steps on {pictures + 12} pictures" in lines
    assert "noisy: 4 steps on 48 pictures" in lines and "clean: 4 steps on 48 pictures" in lines
    assert "filter: 2 steps on 8 pictures" in lines, "without those its scale is fitted to"


def test_the_report_shows_pictures_and_needs_nothing_from_outside(told, tmp_path):
    story, _ = told
    page = write_report(story, tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/") > 20
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page) and "@import" not in page
    assert not re.findall(r"https?://(?!www\.w3\.org)", page)
    for title in (
        "Did CapFilt make a better model",
        "find the noise",
        "Kept, dropped",
        "Where the words look",
    ):
        assert title in page
    assert f"{story.results['bootstrapped']['r_mean']:.3f}"[:4] in page


def test_told_again_it_trains_nothing_and_says_the_same(told, rows, monkeypatch):
    story, _ = told
    weights = {name: (story.folder / name / "model/model.safetensors").read_bytes() for name in MODELS}

    def step(*_, **__):
        raise AssertionError("a finished part was trained again")

    monkeypatch.setattr("torch.optim.AdamW.step", step)
    again = tell(rows, story.folder, tiny_story(), lambda line: None)
    assert again.texts == story.texts and again.captions == story.captions
    assert again.results["seconds"] == story.results["seconds"], "it took what it took"
    for name in ("filter", *MODELS):
        assert again.results[name] == story.results[name]
    for name, content in weights.items():
        assert (story.folder / name / "model/model.safetensors").read_bytes() == content


def test_what_was_made_anew_is_what_it_took(told, rows, tmp_path):
    folder = shutil.copytree(told[0].folder, tmp_path / "copy")
    shutil.rmtree(folder / "clean")
    noted = json.loads((folder / "seconds.json").read_text())
    assert set(noted["seconds"]) == {"features", *MODELS, "captioner", "filter", "capfilt", "evaluation"}
    noted["seconds"] |= {"noisy": 1000.0, "clean": 5000.0, "evaluation": 5000.0}
    (folder / "seconds.json").write_text(json.dumps({**noted, "peak_mb": 123456}))
    again = tell(rows, folder, tiny_story(), lambda line: None)
    assert 1000 < again.results["seconds"] < 2000 and again.results["peak_mb"] == 123456


def test_another_story_is_not_told_with_its_models(told, rows):
    story, _ = told
    with pytest.raises(UserError, match=r"made otherwise: noise was 0.4 and is 0.2; use a new folder"):
        tell(rows, story.folder, tiny_story(noise=0.2), lambda line: None)
    with pytest.raises(UserError, match="made otherwise: rows was"):
        tell(rows[:-1], story.folder, tiny_story(), lambda line: None)


def test_the_filter_is_judged_by_what_was_planted():
    right = {"a": True, "b": False, "c": True, "d": False}

    def text(id, match, kind="web"):
        return ScoredText(id, kind, "x", match, match, match, None)

    web = [text("a", 0.9), text("b", 0.2), text("c", 0.4), text("d", 0.1)]
    found = judge_filter([*web, text("a", 0.0, "synthetic")], right, 0.5)
    assert found["auc"] == 1 and found["recall"] == 1, "both wrong ones are dropped"
    assert found["precision"] == pytest.approx(2 / 3) and found["share_dropped"] == 0.75
    assert judge_filter(web, {name: not known for name, known in right.items()}, 0.5)["auc"] == 0


def test_the_command_does_the_same_on_a_folder_of_ones_own(monkeypatch, tmp_path, capsys):
    folder = picture_folder(tmp_path / "mine", 36)
    (folder / "images/07.png").write_bytes(b"broken")
    monkeypatch.setattr(
        run_module, "StoryConfig", partial(replace, tiny_story(pretrain=tiny_recipe(steps=2)))
    )
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    call = [
        "quickstart",
        "--data",
        str(folder),
        "--out",
        str(tmp_path / "out"),
        "--human",
        "10",
        "--test",
        "8",
    ]
    cli.main([*call, "--json", "--seed", "3"])
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found == json.loads((tmp_path / "out/results.json").read_text()) and found["seed"] == 3
    assert "data: 10 human pairs, 17 web pairs of which 7 are wrong, 8 test pairs" in said.err
    assert "data:image/" in (tmp_path / "out/report.html").read_text()
    (bad,) = (tmp_path / "out/bad_rows.jsonl").read_text().splitlines()
    assert json.loads(bad)["reason"] == "not_an_image", "the story goes on without a broken picture"


def test_what_cannot_be_told_is_said(rows, tmp_path):
    with pytest.raises(UserError, match=r"noise is a share between 0 and 1, got 1\.5"):
        tiny_story(noise=1.5)
    with pytest.raises(UserError, match="60 rows cannot be split"):
        tell(rows, tmp_path, tiny_story(human=50), lambda line: None)
    with pytest.raises(UserError, match=r"threshold is a P\(match\) between 0 and 1, got 80"):
        tiny_story(threshold=80)
    with pytest.raises(UserError, match="held_out is at least 2"):
        tiny_story(held_out=1)


def test_too_few_pairs_are_said_before_anything_is_made(rows, mistake, tmp_path):
    out = tmp_path / "out"
    found = mistake("quickstart", "--human", 85, "--out", out)
    assert "human: 85 pairs are too few for a batch of 64 of the retrieval recipe" in found
    assert "(every 4-th): wanted 86 or more" in found and not out.exists()
    twins = [replace(row, extra={"group": number // 5}) for number, row in enumerate(rows)]
    with pytest.raises(UserError, match="human: 5 pairs are too few for a batch of 4"):
        tell(twins, out, tiny_story(human=9, test=5), lambda line: None)  # whole groups: 5 of the 9
    recipe = tiny_recipe()
    large = replace(recipe, train=replace(recipe.train, batch_size=49))
    with pytest.raises(
        UserError, match="web and human: 48 pairs are too few for a batch of 49 of the pretrain"
    ):
        tell(rows, out, tiny_story(pretrain=large), lambda line: None)
    assert not out.exists()
