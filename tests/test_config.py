"""config.py: what goes in comes out, and what is wrong is named."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Gt

from openblip.config import ConfigError, UserError, from_dict, load_json, save_json, to_dict


@dataclass
class Tower:
    hidden_size: int = 8
    activation: Literal["gelu", "quick_gelu"] = "gelu"

    def __post_init__(self):
        if self.hidden_size % 2:
            raise ConfigError(f"hidden_size {self.hidden_size} is odd, wanted an even number")


@dataclass
class Borrowed:
    name: str


@dataclass(frozen=True)
class Run:
    lr: float
    tower: Tower = field(default_factory=Tower)
    teacher: Tower | None = None
    image: Tower | Borrowed | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    sizes: tuple[int, ...] = ()
    stages: list[Tower] = field(default_factory=list)
    by_name: dict[str, Tower] = field(default_factory=dict)
    limit: int | str | None = None
    folder: Path | None = None
    weight: Annotated[float, Gt(0)] = 1.0
    extra: dict[str, Any] = field(default_factory=dict)
    doubled: float = field(init=False, default=0.0)

    def __post_init__(self):
        object.__setattr__(self, "doubled", 2 * self.lr)


FULL = Run(
    lr=1e-4,
    tower=Tower(16, "quick_gelu"),
    teacher=Tower(4),
    image=Borrowed("some/backbone"),
    betas=(0.9, 0.98),
    sizes=(1, 2, 3),
    stages=[Tower(2), Tower(4)],
    by_name={"a": Tower(6)},
    limit="all",
    folder=Path("runs/one"),
    weight=2.0,
    extra={"note": "naïve", "n": [1, None, True]},
)


def test_a_full_configuration_survives_the_file(tmp_path):
    save_json(FULL, tmp_path / "run.json")
    assert load_json(Run, tmp_path / "run.json") == FULL
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"], "no half-written file stays behind"


def test_the_file_is_plain_json_without_derived_fields():
    data = json.loads(json.dumps(to_dict(FULL)))
    assert (
        data["betas"] == [0.9, 0.98]
        and data["folder"] == "runs/one"
        and data["image"] == {"name": "some/backbone"}
    )
    assert "doubled" not in data
    assert from_dict(Run, {"lr": 3}, "x").doubled == 6.0, (
        "__post_init__ runs, and an integer serves as a float"
    )


WRONG = {
    "unknown key at the top": (
        {"lr": 1, "betsa": [0, 1]},
        'run.json: unknown key "betsa"; did you mean "betas"?',
    ),
    "unknown key below": (
        {"lr": 1, "tower": {"hiden_size": 4}},
        'run.json: tower: unknown key "hiden_size"; did you mean "hidden_size"?',
    ),
    "unknown key like no other": (
        {"lr": 1, "tower": {"zzz": 4}},
        'run.json: tower: unknown key "zzz"; known keys: hidden_size, activation',
    ),
    "unknown key in a list": (
        {"lr": 1, "stages": [{}, {"activatoin": "gelu"}]},
        'run.json: stages[1]: unknown key "activatoin"; did you mean "activation"?',
    ),
    "unknown key in a dict": (
        {"lr": 1, "by_name": {"a": {"size": 4}}},
        'run.json: by_name.a: unknown key "size"; did you mean "hidden_size"?',
    ),
    "unknown key in a union": (
        {"lr": 1, "image": {"hidden_sise": 4}},
        'run.json: image: unknown key "hidden_sise"; did you mean "hidden_size"?',
    ),
    "derived key": ({"lr": 1, "doubled": 2}, 'run.json: unknown key "doubled"'),
    "missing key": ({}, 'run.json: the key "lr" is missing (wanted float)'),
    "missing key in a union": (
        {"lr": 1, "image": {"nam": "x"}},
        'image: the key "name" is missing (wanted str)',
    ),
    "string for a number": ({"lr": "1e-4"}, 'run.json: lr: got "1e-4" (str), wanted float'),
    "bool for an integer": (
        {"lr": 1, "tower": {"hidden_size": True}},
        "run.json: tower.hidden_size: got true (bool), wanted int",
    ),
    "float for an integer": (
        {"lr": 1, "tower": {"hidden_size": 8.0}},
        "run.json: tower.hidden_size: got 8.0 (float), wanted int",
    ),
    "number for a dataclass": (
        {"lr": 1, "tower": 8},
        "run.json: tower: got 8 (int), wanted an object with the keys of Tower",
    ),
    "null for a dataclass": (
        {"lr": 1, "tower": None},
        "run.json: tower: got null (NoneType), wanted an object with the keys of Tower",
    ),
    "not a literal": (
        {"lr": 1, "teacher": {"activation": "relu"}},
        'run.json: teacher.activation: got "relu" (str), wanted one of "gelu", "quick_gelu"',
    ),
    "no member of a union": (
        {"lr": 1, "limit": 1.5},
        "run.json: limit: got 1.5 (float), wanted int or str or null",
    ),
    "tuple too short": (
        {"lr": 1, "betas": []},
        "run.json: betas: got [] (list), wanted tuple[float, float]",
    ),
    "tuple too long": (
        {"lr": 1, "betas": [0, 1, 2]},
        "run.json: betas: got [0, 1, 2] (list), wanted tuple[float, float]",
    ),
    "inside a tuple": ({"lr": 1, "sizes": [1, "2"]}, 'run.json: sizes[1]: got "2" (str), wanted int'),
    "out of range": ({"lr": 1, "weight": 0}, "run.json: weight: got 0"),
    "refused by the dataclass itself": (
        {"lr": 1, "stages": [{}, {"hidden_size": 3}]},
        "run.json: stages[1]: hidden_size 3 is odd, wanted an even number",
    ),
    "not finite": ({"lr": float("nan")}, "run.json: lr: got nan, wanted a finite number"),
    "not for a configuration": ({"lr": {1, 2}}, "run.json: lr: a set has no place in a configuration"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_named_with_its_place_and_its_remedy(name):
    data, message = WRONG[name]
    with pytest.raises(ConfigError) as caught:
        from_dict(Run, data, "run.json")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value), "one line"


def test_several_mistakes_are_listed_and_counted():
    with pytest.raises(ConfigError) as caught:
        from_dict(Run, {"lr": "a", "betas": 1, "sizes": 2, "stages": 3, "weight": "b"}, "run.json")
    assert str(caught.value).count(";") == 2 and str(caught.value).endswith("(and 2 more)")


def test_the_top_must_be_an_object():
    with pytest.raises(
        ConfigError, match=r"run.json: got \[1\] \(list\), wanted an object with the keys of Run"
    ):
        from_dict(Run, [1], "run.json")  # type: ignore[arg-type]


def test_a_value_json_cannot_hold_is_refused_on_the_way_out():
    with pytest.raises(ConfigError, match="Run: lr: got inf, wanted a finite number"):
        to_dict(Run(lr=float("inf")))
    with pytest.raises(ConfigError, match=r"Run: extra\.x\[0\]: a bytes has no place"):
        to_dict(Run(lr=1.0, extra={"x": [b"raw"]}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"lr": 1,\n oops}', "line 2, column 2: not JSON"),
        (b'{"lr": 1, "lr": 2}', 'the key "lr" is given twice'),
        (b'{"lr": "\xff"}', "not UTF-8 text"),
        (None, "cannot be read (No such file"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    path = tmp_path / "run.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_json(Run, path)
    assert str(caught.value).startswith(str(path)) and message in str(caught.value)
