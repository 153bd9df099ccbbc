"""The scripts in runs/ say what the commands understand, with recipes that exist."""

import functools
import itertools
import re
import shlex
from pathlib import Path

import pytest

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
