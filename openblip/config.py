"""Dataclasses <-> JSON, strictly, and the two errors that belong to the user.

Every configuration of the project (models, transforms, training runs) is a plain dataclass. This file turns
one into JSON and back and accepts nothing it does not understand: an unknown key, a wrong type or an
impossible value is an error that says where it stands and what would be right.
"""

import dataclasses
import difflib
import functools
import json
import math
import os
import types
import typing
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")

_SHOWN = 3  # mistakes spelled out in one message; the rest is counted


class UserError(ValueError):
    """Base of every error that is the user's to mend; its message is one line: what, where, what is right.

    The command line prints the message without a traceback and exits with code 2.
    """


class ConfigError(UserError):
    """A configuration with an unknown key, a missing key, a wrong type or an impossible value."""


def to_dict(obj: Any) -> dict[str, Any]:
    """The dataclass instance `obj` as a dict that `json` can write: tuples become lists, paths strings.

    Fields with `init=False` are derived from the others and left out.

    Raises:
        ConfigError: a value is of a kind JSON cannot hold, or is not finite.
    """
    if not dataclasses.is_dataclass(obj) or isinstance(obj, type):
        raise TypeError(f"to_dict wants a dataclass instance, got {obj!r}")
    return _plain(obj, type(obj).__name__, ())


def from_dict(cls: type[T], data: dict[str, Any], where: str) -> T:
    """Build the dataclass `cls` from `data`: nested dataclasses, unions, Literal, tuples, lists, dicts.

    Nothing is coerced (`"3"` is not 3, `true` is not 1) except what JSON leaves no other way to write: a list
    for a tuple, an integer for a float, a string for a path.

    Args:
        cls: the dataclass wanted.
        data: what `to_dict` gives, or what a JSON file holds.
        where: where `data` came from (a file name, a field), the beginning of any error message.

    Raises:
        ConfigError: names the key, what was got and what was wanted; for an unknown key the nearest
            known one. What a dataclass's own `__post_init__` raises keeps its message and gains its place.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: got {_shown(data)}, wanted an object with the keys of {cls.__name__}")
    text = json.dumps(_plain(data, where, ()))
    try:
        # JSON mode, because strict Python mode would take no dict for a dataclass and no list for a tuple.
        found: T = _adapter(cls).validate_json(text, strict=True, extra="forbid")  # type: ignore[arg-type] # hashable
        return found
    except ValidationError as error:
        mistakes = list(dict.fromkeys(_explain(cls, e) for e in error.errors(include_url=False)))
        more = f" (and {len(mistakes) - _SHOWN} more)" if len(mistakes) > _SHOWN else ""
        raise ConfigError(f"{where}: {'; '.join(mistakes[:_SHOWN])}{more}") from None


@functools.cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    """Takes milliseconds to make, and a job has thousands of manifests."""
    return TypeAdapter(cls)


def save_json(obj: Any, path: str | Path) -> None:
    """Write the dataclass instance `obj` to `path` in one step: a reader never sees half a file."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(to_dict(obj), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def load_json(cls: type[T], path: str | Path) -> T:
    """Read the dataclass `cls` from the JSON file `path`.

    Raises:
        ConfigError: no such file, not JSON (with the line), a key given twice, or what `from_dict` refuses.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ConfigError(f'{path}: the key "{key}" is given twice in one object')
            found[key] = value
        return found

    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None
    try:
        data = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}: line {error.lineno}, column {error.colno}: not JSON: {error.msg}"
        ) from None
    return from_dict(cls, data, str(path))


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two JSON objects, a phrase for each: `"train.lr was 0.1 and is 0.2"`."""
    old, new = _flat(before), _flat(now)
    return [
        f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{name}.{key}".strip(".")).items()}


def _plain(value: Any, where: str, path: tuple[str | int, ...]) -> Any:
    """`value` made of dicts, lists, strings, finite numbers, bools and None only."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value) if f.init]
        return {name: _plain(getattr(value, name), where, (*path, name)) for name in names}
    if isinstance(value, dict):
        return {str(key): _plain(item, where, (*path, str(key))) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where, (*path, i)) for i, item in enumerate(value)]
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: {_dotted(path)}: got {value}, wanted a finite number")
    if value is None or type(value) in (str, bool, int, float):
        return value
    raise ConfigError(f"{where}: {_dotted(path)}: a {type(value).__name__} has no place in a configuration")


def _explain(cls: type, error: Any) -> str:
    """One of pydantic's findings as a sentence of ours: the key, what was got, what was wanted."""
    kind = error["type"]
    path, owner, wanted = _follow(cls, error["loc"])
    if kind == "missing" and isinstance(path[-1], int):  # a tuple too short: told of as one too long
        kind, path, wanted = "tuple", path[:-1], owner
    if kind in ("unexpected_keyword_argument", "missing"):
        key, hints = str(path[-1]), _hints(owner)
        place = f"{_dotted(path[:-1])}: " if path[:-1] else ""
        if kind == "missing":
            return f'{place}the key "{key}" is missing (wanted {_type_name(hints[key])})'
        near = difflib.get_close_matches(key, hints, n=1, cutoff=0.5)
        hint = f'did you mean "{near[0]}"?' if near else f"known keys: {', '.join(hints)}"
        return f'{place}unknown key "{key}"; {hint}'
    place = f"{_dotted(path)}: " if path else ""
    if "error" in error.get("ctx", {}):  # raised by a __post_init__
        return f"{place}{error['ctx']['error']}"
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "multiple_of"):
        return f"{place}got {_shown(error['input'])}, {error['msg'][0].lower()}{error['msg'][1:]}"
    return f"{place}got {_shown(error['input'])}, wanted {_type_name(wanted)}"


def _follow(tp: Any, loc: Sequence[str | int]) -> tuple[tuple[str | int, ...], Any, Any]:
    """Walk pydantic's location `loc` down the type `tp`.

    Returns the location as the user wrote it, the type that holds its last step, and the type wanted there.
    Pydantic adds the name of the tried member where a union is met; that is not a key of the user's.
    """
    path: list[str | int] = []
    owner, tp = None, _unwrap(tp)
    for i, step in enumerate(loc):
        if _is_union(tp):
            member = next(
                (m for m in typing.get_args(tp) if getattr(_unwrap(m), "__name__", None) == step), None
            )
            if member is None or i == len(loc) - 1:  # no member fits: the whole union is what was wanted
                break
            tp = _unwrap(member)
            continue
        path.append(step)
        owner = tp
        origin, args = typing.get_origin(tp), typing.get_args(tp)
        if dataclasses.is_dataclass(tp):
            tp = _hints(tp).get(str(step), Any)
        elif origin is dict:
            tp = args[1]
        elif origin is tuple and isinstance(step, int):
            tp = args[0] if args[-1] is Ellipsis else args[min(step, len(args) - 1)]
        else:
            tp = args[0] if args else Any
        tp = _unwrap(tp)
    return tuple(path), owner, tp


def _unwrap(tp: Any) -> Any:
    """`Annotated[X, ...]` as X; `X | None` as X too, since pydantic names no union member for it."""
    if typing.get_origin(tp) is typing.Annotated:
        tp = typing.get_args(tp)[0]
    members = [m for m in typing.get_args(tp) if m is not types.NoneType] if _is_union(tp) else []
    return _unwrap(members[0]) if len(members) == 1 else tp


def _is_union(tp: Any) -> bool:
    return typing.get_origin(tp) in (typing.Union, types.UnionType)


def _hints(cls: Any) -> dict[str, Any]:
    """The keys a dataclass takes and their types; nothing for what is no dataclass."""
    if not dataclasses.is_dataclass(cls):
        return {}
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def _type_name(tp: Any) -> str:
    if typing.get_origin(tp) is typing.Literal:
        return "one of " + ", ".join(json.dumps(value) for value in typing.get_args(tp))
    if dataclasses.is_dataclass(tp):
        return f"an object with the keys of {getattr(tp, '__name__', tp)}"
    if _is_union(tp):
        return " or ".join(_type_name(member) for member in typing.get_args(tp))
    if tp is types.NoneType:
        return "null"
    return tp.__name__ if isinstance(tp, type) and not typing.get_args(tp) else str(tp).replace("typing.", "")


def _shown(value: Any) -> str:
    text = json.dumps(value, default=repr, ensure_ascii=False)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def _dotted(path: Sequence[str | int]) -> str:
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".")
