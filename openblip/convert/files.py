"""Model folders on disk: weights are read whole, damage is named, and what is written appears whole or not at all."""

import json
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

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # or their <name>.index.json, which lists several


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


def read_weights(folder: Path, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """All tensors of the weight files of a folder, on the CPU, floating-point ones in `dtype`."""
    weights: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        try:
            is_safe = file.suffix == ".safetensors"
            found = load_file(file) if is_safe else torch.load(file, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise UserError(f"{file}: not there, though the index lists it") from None
        except SafetensorError as error:
            raise UserError(f"{file}: damaged, or no safetensors file: {error}") from None
        except Exception as error:  # torch raises half a dozen kinds for a file it cannot or will not read
            raise UserError(f"{file}: cannot be read as weights: {str(error).splitlines()[0]}") from None
        if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
            raise UserError(f"{file}: wanted names and tensors, nothing else")
        weights |= {name: v.to(dtype) if v.is_floating_point() else v for name, v in found.items()}
    return weights


def _weight_files(folder: Path) -> list[Path]:
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            places = read_object(index).get("weight_map")
            names = sorted(set(map(str, places.values()))) if isinstance(places, dict) else []
            if not names or any(Path(name).name != name for name in names):
                raise UserError(f"{index}: weight_map does not name the files beside it")
            return [folder / name for name in names]
    raise UserError(
        f"{folder}: no weights in it; wanted one of {', '.join(_WEIGHTS)}, or an index of several files"
    )


def save_weights(weights: dict[str, Tensor], folder: Path) -> None:
    """Write tensors as model.safetensors, above 5 GB as several files with an index."""
    from huggingface_hub import save_torch_state_dict

    on_cpu = {name: value.detach().cpu() for name, value in weights.items()}
    save_torch_state_dict(on_cpu, folder, max_shard_size="5GB", metadata={"format": "pt"})


def publish(folder: Path, is_ours: Callable[[str], bool], write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder beside, then put what is in it into `folder`, in place of what was saved before:
    files and folders whose names are ours. config.json comes last.

    By rename: loaded weights are a view of their file, which lives on under them, while writing into it would
    pull them away. Raises UserError: no folder can be made there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: no folder can be made there: {error.strerror}") from None
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as beside:
        write(Path(beside))
        (folder / "config.json").unlink(missing_ok=True)
        for stale in [path for path in folder.iterdir() if is_ours(path.name)]:
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        for file in sorted(Path(beside).iterdir(), key=lambda path: path.name == "config.json"):
            file.replace(folder / file.name)
