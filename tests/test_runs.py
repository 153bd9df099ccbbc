"""The scripts in runs/ say what the commands understand, with recipes that exist."""

import functools
import itertools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from openblip import cli
from openblip.recipes import RECIPES

RUNS = sorted((Path(__file__).resolve().parent.parent / "runs").glob("*.sh"))


def commands(script: Path) -> list[list[str]]:
    """Its openblip commands as lists of words; a shell variable becomes a name."""
    text = script.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("openblip ")]
    return [shlex.split(re.sub(r"\$\{?(\w+)\}?", r"\1", line)) for line in lines]


@pytest.mark.parametrize("script", RUNS, ids=lambda path: path.name)
def test_its_commands_are_understood(script, monkeypatch):
    called = []

    def noted(command):
        @functools.wraps(command)  # tyro reads the options off the signature
        def note(*args, **kwargs):
            called.append((command.__name__, kwargs))

        return note

    monkeypatch.setattr(cli, "COMMANDS", {name: noted(command) for name, command in cli.COMMANDS.items()})
    found = commands(script)
    assert len(found) >= 5
    for words in found:
        cli.main(words[1:])
    assert [name for name, _ in called] == [words[1] for words in found]
    recipes = [kwargs["recipe"] for name, kwargs in called if name == "train"]
    assert recipes and set(recipes) <= RECIPES.keys()


@pytest.mark.parametrize("script", RUNS, ids=lambda path: path.name)
def test_each_step_begins_with_what_an_earlier_one_made(script):
    made: set[str] = set()
    for words in commands(script):
        options = dict(itertools.pairwise(words))
        for option in ("--init", "--model", "--captioner", "--filter"):
            if option in options and options[option].endswith("/model"):
                parent = options[option].removesuffix("/model")
                assert parent in made or parent == "out/name", f"{' '.join(words)}: nothing made {parent}"
        if words[1] == "train":
            made.add(options["--out"])


def test_a_wrong_option_would_be_noticed(monkeypatch, capsys):
    monkeypatch.setattr(cli, "COMMANDS", {"info": cli.COMMANDS["info"], "search": cli.COMMANDS["search"]})
    with pytest.raises(SystemExit) as end:
        cli.main(["search", "a dog", "--data", "x", "--model", "y", "--folder", "z"])
    assert end.value.code == 2


def test_floors_of_questions_and_answers_by_kind(tmp_path):
    def line(number: int, question: str, answer: str, split: str) -> str:
        return json.dumps(
            {"image": f"{number}.png", "question": question, "answers": [answer], "split": split}
        )

    for number in range(8):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{number}.png")
    color, shape, there = "what color is it?", "what shape is it?", "is it red?"
    train = [
        (color, "red"),
        (color, "red"),
        (color, "blue"),
        (shape, "circle"),
        (there, "yes"),
        (there, "yes"),
        (there, "yes"),
    ]
    test = [(color, "red"), (color, "blue"), (shape, "circle"), (there, "no"), (there, "yes")]
    lines = [line(n, *row, "train") for n, row in enumerate(train)] + [line(7, *row, "test") for row in test]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines) + "\n")
    said = tmp_path / "said.json"
    said.write_text(json.dumps({"figures": {"answers": ["red", "red", "circle", "No", "no"]}}))
    script = RUNS[0].parent / "vqa_floor.py"
    call = [sys.executable, str(script), str(tmp_path), "--answers", str(said)]
    found = json.loads(subprocess.run(call, check=True, capture_output=True, text=True).stdout)
    assert found == {
        "questions": 5,
        "most_frequent": 0.2,
        "most_frequent_of_question": 0.6,
        "yes or no": {"questions": 2, "accuracy": 0.5},
        "colour": {"questions": 2, "accuracy": 0.5},
        "shape": {"questions": 1, "accuracy": 1.0},
    }
    call += ["--take", "3"]
    assert (
        "5 answers to 3 questions" in subprocess.run(call, check=False, capture_output=True, text=True).stderr
    )
