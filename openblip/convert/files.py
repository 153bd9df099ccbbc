"""Weights on disk: they are read whole, damage is named, and what is written appears whole or not at all."""

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from openblip.config import UserError

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of a folder; or <name>.index.json, which lists several
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")  # that single files of weights usually have
_STATE = ("model", "state_dict", "model_state_dict")  # where checkpoints of training runs keep the weights

# What saving replaces: files of ours, and of transformers.
_OURS = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|tokenizer(_config)?\.json|lm_tokenizer|qformer_tokenizer"
    r"|(generation|processor|preprocessor)_config\.json|chat_template\.jinja"
)
_ORDER = {"README.md": 0, "config.json": 2}  # of files that appear in a folder; 1: the others
_SAVED = "saved by openblip"  # in every model card


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises UserError: not there, not JSON, not an object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent}: no {path.name} in it; this is no folder of a model") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: wanted an object, got a {type(found).__name__}")
    return found


def read_weights(place: Path, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """All tensors of a file, or of the weight files of a folder, on the CPU, floating-point ones in `dtype`.

    What a file is, its first bytes tell. They are mapped, not read: what keeps its dtype stays where it is on disk
    until it is looked at, and what changes it is copied one tensor at a time. A checkpoint with more in it
    than weights (`{"model": ..., "optimizer": ...}`) is read for its weights.

    Raises UserError: damaged, no weights, or a file that would run code. Nothing in it is ever run.
    """
    weights: dict[str, Tensor] = {}
    for file in _weight_files(place) if place.is_dir() else [place]:
        found = _read_file(file)
        for name in list(found):
            value = found.pop(name)
            weights[name] = value.to(dtype) if value.is_floating_point() else value
    return weights


def _read_file(file: Path) -> dict[str, Tensor]:
    found: Any
    try:
        with file.open("rb") as stream:
            start = stream.read(9)
        if start[8:] == b"{":  # the length of a header, and the header
            found = load_file(file)
        else:
            is_zip = start.startswith(b"PK")  # otherwise torch's format before 1.6, which cannot be mapped
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except FileNotFoundError:
        raise UserError(f"{file}: not there, though the index lists it") from None
    except SafetensorError as error:
        raise UserError(f"{file}: damaged, or no safetensors file: {error}") from None
    except Exception as error:  # torch raises half a dozen kinds for a file it cannot or will not read
        raise UserError(f"{file}: cannot be read as weights: {_reason(error)}") from None
    for key in _STATE:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(
            f"{file}: wanted names and tensors, nothing else, or a checkpoint with them as {', '.join(_STATE)}"
        )
    return dict(found)


def _reason(error: Exception) -> str:
    """Why torch does not read a file. Its own words are advice to run what is in it."""
    told = str(error)
    if name := re.search(r"GLOBAL (\S+)", told):
        return f"it would call {name[1]}; a file of weights calls nothing, and this one is not opened"
    if "TorchScript" in told:
        return "it is a program (TorchScript), which is not opened"
    if told.startswith("Weights only load failed"):
        return "damaged, or no weights at all"
    return told.strip().splitlines()[0] if told.strip() else type(error).__name__


def _weight_files(folder: Path) -> list[Path]:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            places = read_object(index).get("weight_map")
            names = sorted(set(map(str, places.values()))) if isinstance(places, dict) else []
            if not names or any(Path(name).name != name for name in names):
                raise UserError(f"{index}: weight_map does not name the files beside it")
            return [folder / name for name in names]
    raise UserError(
        f"{folder}: no weights in it; wanted one of {', '.join(WEIGHTS)}, or an index of several files"
    )


def save_weights(weights: dict[str, Tensor], folder: Path) -> None:
    """Write tensors as model.safetensors, above 5 GB as several files with an index."""
    from huggingface_hub import save_torch_state_dict

    on_cpu = {name: value.detach().cpu() for name, value in weights.items()}
    save_torch_state_dict(on_cpu, folder, max_shard_size="5GB", metadata={"format": "pt"})


def publish(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder beside, then put what is in it into `folder`, in place of what was saved before.
    config.json comes last.

    By rename: loaded weights are a view of their file, which lives on under them, while writing into it would
    pull them away. README.md comes first and says whose folder it is, however early the process ends.

    Raises UserError: no folder can be made there, or what `refuse_foreign` raises.
    """
    refuse_foreign(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: no folder can be made there: {error.strerror}") from None
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as beside:
        write(Path(beside))
        (folder / "config.json").unlink(missing_ok=True)
        for stale in [path for path in folder.iterdir() if _OURS.fullmatch(path.name)]:
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        for file in sorted(Path(beside).iterdir(), key=lambda path: _ORDER.get(path.name, 1)):
            file.replace(folder / file.name)


def refuse_foreign(folder: Path) -> None:
    """Before work whose result is saved there. Raises UserError: saving would replace what openblip did not write."""
    card, config = folder / "README.md", folder / "config.json"
    for file, mark in ((card, _SAVED), (config, '"openblip_version"')):
        if file.is_file() and mark in file.read_text(encoding="utf-8", errors="replace"):
            return
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if foreign := sorted(name for name in names if _OURS.fullmatch(name) or name in _ORDER):
        raise UserError(
            f"{folder}: {', '.join(foreign)} would be replaced, and openblip did not write that; name a new folder, or "
            "one that openblip saved a model in"
        )
