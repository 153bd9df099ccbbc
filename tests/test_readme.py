"""README's commands and lines of Python are run, against tiny models standing where it says they stand."""

import re
import shlex
from pathlib import Path

import pytest

from openblip import cli, recipes
from tests.tiny_models import drawing, picture_folder, save_blip
from tests.tiny_recipes import tiny_recipe

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.S | re.M)


def commands() -> list[list[str]]:
    """Every shell line of README, block or inline, that begins with openblip or make; comments left out."""
    lines = [line for language, text in BLOCKS if not language for line in text.splitlines()]
    lines += re.findall(r"`((?:\.venv/bin/)?openblip [^`]+|make \w+)`", README)
    found = [shlex.split(line, comments=True) for line in lines if not line.startswith((" ", "openblip/"))]
    return [words for words in found if words and words[0].split("/")[-1] in ("openblip", "make")]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder like that of somebody who ran the quickstart and has pictures in my_folder."""
    save_blip(tmp_path / "quickstart/bootstrapped/model")
    picture_folder(tmp_path / "quickstart/openmoji", 6)
    drawing(0).save(tmp_path / "quickstart/openmoji/images/1F375.png")
    picture_folder(tmp_path / "my_folder", 8)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setitem(recipes.RECIPES, "small_pretrain", tiny_recipe)
    return tmp_path


def test_the_python_runs_and_prints(here, capsys):
    blocks = [text for language, text in BLOCKS if language == "python"]
    assert blocks
    for text in blocks:
        exec(compile(text, "README.md", "exec"), {})
        printed = capsys.readouterr().out.strip().splitlines()
        assert len(printed) == text.count("print(") and all(printed)


def test_the_openblip_commands_run(here, monkeypatch, capsys):
    told = []
    monkeypatch.setattr("openblip.quickstart.run.run", lambda *of, **__: told.append(of) or {})
    ran = [words[1] for words in commands() if words[0].endswith("openblip")]
    assert {"quickstart", "search", "train", "--help"} <= set(ran)
    for _, *arguments in (words for words in commands() if words[0].endswith("openblip")):
        try:
            cli.main(arguments)
        except SystemExit as end:
            assert "--help" in arguments and end.code in (0, None), arguments
        assert capsys.readouterr().out.strip()
    assert told and told[0][:2] == ("my_folder", Path("quickstart-my_folder"))
    assert (here / "runs/mine/model/model.safetensors").is_file()


def test_the_make_targets_exist():
    targets = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    wanted = {words[1] for words in commands() if words[0] == "make"}
    assert {"quickstart", "test"} <= wanted <= targets


def test_what_it_says_a_pipeline_can_do_it_can():
    from openblip.api import Pipeline

    sentence = re.search(r"^`caption`, (.*?)\.$", README, re.S | re.M).group(0)
    named = re.findall(r"`(\w+)`", sentence)
    assert len(named) > 5 and all(callable(getattr(Pipeline, name)) for name in named)
