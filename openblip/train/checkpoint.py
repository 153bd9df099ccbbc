"""Checkpoints: published whole or not at all, refused when a byte has changed, and without pickle.

    <run>/checkpoints/step-00000040/
        model.safetensors       trainable weights, momentum twins, buffers; what several modules share, once
        optimizer.safetensors   AdamW's state, by name of the weight
        ema.safetensors         the averaged weights, if there are any
        rng.safetensors         the random states of every rank, as bytes
        state.json              step, what shares what, sha256 of the frozen weights, what the caller adds
        manifest.json           sha256 and size of each of the files above

Frozen weights are not stored: they come with the task, and their hashes tell whether they are the same still.
A parameter without gradient that changes all the same (a momentum encoder's) is not frozen: the task lists
its name, or the name of its module, in the attribute `twins`.

All tensors are stored whole, whether a run keeps them in shards or not. Of several processes, all call `save`
and `load_`: shards are gathered, rank 0 writes, and each reads.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openblip.config import UserError
from openblip.train import distributed
from openblip.train.optim import Ema
from openblip.train.rng import RngState
from openblip.train.shard import full, shared_like

FORMAT = 1

_PUBLISHED = re.compile(r"step-\d{8,}")
_REQUIRED = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json")


class CheckpointError(UserError):
    """A checkpoint that is damaged or does not belong to this task."""


@dataclass(frozen=True)
class Resumed:
    """What `load_` gives back, beside the tensors it put in place."""

    step: int
    rng: list[RngState]  # by rank
    extra: dict[str, Any]


@dataclass(frozen=True)
class _Parts:
    """The state of a task, each tensor once, under the first of its names."""

    kept: dict[str, Tensor]
    frozen: dict[str, Tensor]
    shared: dict[str, str]  # further name -> first name


def frozen_hashes(task: nn.Module) -> dict[str, str]:
    """sha256 of each frozen weight of `task` (its dtype, shape and bytes), by name. Every rank calls this."""
    return {name: _tensor_hash(tensor) for name, tensor in _parts(task).frozen.items()}


def save(
    run_dir: str | Path,
    task: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
    rng: list[RngState],
    frozen: dict[str, str],
    ema: Ema | None = None,
    extra: dict[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Publish a checkpoint; remove all but the newest `keep`, and what killed processes left half-written.

    Everything is written beside its final place, hashed and synced to the disk; one rename publishes it.
    Killed at any moment, it leaves what was published before as it was. Every rank calls this, and all but
    rank 0 return before it is published.

    Args:
        step: optimizer steps done so far; names the checkpoint.
        rng: `rng_state()` of each rank.
        frozen: `frozen_hashes(task)` as the run began.
        extra: more to keep in state.json (what JSON can hold), given back by `load_`.

    Returns:
        The folder, published or soon to be.

    Raises:
        CheckpointError: this step is published already.
        ValueError: a frozen weight has changed since `frozen` was taken, so it would be lost (see `twins`).
    """
    root = Path(run_dir) / "checkpoints"
    target = root / f"step-{step:08d}"
    is_main = distributed.is_main()
    if is_main and target.exists():
        raise CheckpointError(f"{target}: exists already")
    parts = _parts(task)
    changed = [name for name, tensor in parts.frozen.items() if _tensor_hash(tensor) != frozen.get(name)]
    if changed:
        raise ValueError(
            f"{_some(changed)}: no gradient, yet changed since the run began: a checkpoint would lose that. "
            "List the parameter's name, or its module's, in the task's attribute `twins`"
        )
    state = {
        "format": FORMAT,
        "step": step,
        "shared": parts.shared,
        "frozen": frozen,
        "extra": extra or {},
        "torch": str(torch.__version__),
    }
    files = {"model": parts.kept, "optimizer": _optimizer_tensors(task, optimizer)}
    files["rng"] = {f"{rank}.{key}": value for rank, one in enumerate(rng) for key, value in one.items()}
    if ema is not None:
        files["ema"] = ema.weights

    temporary = root / f".tmp-{target.name}-{os.getpid()}"
    if is_main:
        root.mkdir(parents=True, exist_ok=True)
        for left in root.glob(".tmp-*"):
            shutil.rmtree(left)
        temporary.mkdir()
    for stem, tensors in files.items():
        flat: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            whole = full(tensor)
            if is_main:
                flat[name] = whole.cpu().contiguous()
        if is_main:
            save_file(flat, temporary / f"{stem}.safetensors")
    if not is_main:
        return target
    _write_json(temporary / "state.json", state)
    manifest = {file.name: _file_entry(file) for file in sorted(temporary.iterdir())}
    _write_json(temporary / "manifest.json", manifest)
    for path in (*temporary.iterdir(), temporary):
        _sync(path)
    temporary.rename(target)
    for folder in (root, root.parent):
        _sync(folder)

    for old in _published(root)[:-keep]:
        # First out of sight in one step: killed while deleting, we must not leave half of one published.
        doomed = old.rename(root / f".tmp-old-{old.name}")
        shutil.rmtree(doomed)
    return target


def latest(run_dir: str | Path) -> Path | None:
    """The newest published checkpoint of a run, or None. Half-written ones do not count."""
    published = _published(Path(run_dir) / "checkpoints")
    return published[-1] if published else None


def load_(
    path: str | Path,
    task: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    ema: Ema | None = None,
    frozen: dict[str, str] | None = None,
) -> Resumed:
    """Put the checkpoint at `path` into `task`, and into `optimizer` and `ema` if given, in place.

    Everything is checked before the first tensor is touched. Tensors are copied into, never replaced, so
    modules that share one go on sharing it. Random states are handed back, for the caller to set them last.

    Args:
        frozen: `frozen_hashes(task)`, if at hand; hashing large frozen models takes seconds.

    Raises:
        CheckpointError: names the file that is missing or whose bytes have changed; the keys that are
            missing, unknown, shared otherwise or of another shape or dtype; the frozen weights that are not
            those the checkpoint was trained with.
    """
    path = Path(path)
    _verify(path)
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if state["format"] != FORMAT:
        raise CheckpointError(f"{path / 'state.json'}: format {state['format']}, this version reads {FORMAT}")

    parts = _parts(task)
    retied = {
        n
        for n in parts.shared.keys() | state["shared"].keys()
        if parts.shared.get(n) != state["shared"].get(n)
    }
    if retied:
        raise CheckpointError(f"{path}: weights shared otherwise than in this task: {_some(retied)}")
    _check_frozen(path, state["frozen"], frozen_hashes(task) if frozen is None else frozen)
    model = load_file(path / "model.safetensors")
    _check_tensors(path / "model.safetensors", model, parts.kept)
    averages: dict[str, Tensor] = {}
    if ema is not None:
        if not (path / "ema.safetensors").exists():
            raise CheckpointError(
                f"{path}: holds no averaged weights; set ema_decay to null to go on without"
            )
        averages = load_file(path / "ema.safetensors")
        _check_tensors(path / "ema.safetensors", averages, ema.weights)
    if optimizer is not None:  # the last thing that can fail, and it checks before it sets
        _load_optimizer_(path / "optimizer.safetensors", task, optimizer)

    with torch.no_grad():
        for name, tensor in parts.kept.items():
            tensor.copy_(shared_like(model[name], tensor))
        if ema is not None:
            for name, tensor in ema.weights.items():
                tensor.copy_(shared_like(averages[name], tensor))

    rng: dict[int, RngState] = {}
    for key, value in load_file(path / "rng.safetensors").items():
        rank, name = key.split(".", 1)
        rng.setdefault(int(rank), {})[name] = value
    return Resumed(state["step"], [rng[rank] for rank in sorted(rng)], state["extra"])


def _parts(task: nn.Module) -> _Parts:
    twins = tuple(getattr(task, "twins", ()))
    first: dict[int, str] = {}
    parts = _Parts({}, {}, {})
    for name, tensor in task.state_dict(
        keep_vars=True
    ).items():  # keep_vars: the tensors themselves, not aliases
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: a checkpoint holds tensors, this is a {type(tensor).__name__}")
        if id(tensor) in first:
            parts.shared[name] = first[id(tensor)]
            continue
        first[id(tensor)] = name
        is_twin = any(name == twin or name.startswith(f"{twin}.") for twin in twins)
        is_frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad and not is_twin
        (parts.frozen if is_frozen else parts.kept)[name] = tensor
    return parts


def _optimizer_tensors(task: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `<weight>.<key>` -> tensor. Its settings are the config's matter."""
    names = {id(tensor): name for name, tensor in _parts(task).kept.items()}
    return {
        f"{names[id(parameter)]}.{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def _load_optimizer_(file: Path, task: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    kept = _parts(task).kept
    tensors: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in load_file(file).items():
        name, key = full_name.rsplit(".", 1)
        tensors.setdefault(name, {})[key] = tensor
    names = {id(tensor): name for name, tensor in kept.items()}
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    unknown = tensors.keys() - set(order)
    if unknown:  # the other way round is fine: a weight that never had a gradient has no state
        raise CheckpointError(f"{file}: state of weights this optimizer does not train: {_some(unknown)}")
    for name, state in tensors.items():
        odd = [f"{name}.{key}" for key, t in state.items() if t.ndim and t.shape != kept[name].shape]
        if odd:
            raise CheckpointError(f"{file}: of another shape than the weight: {_some(odd)}")
    by_index = {
        index: {key: shared_like(t, kept[name]) if t.ndim else t for key, t in tensors[name].items()}
        for index, name in enumerate(order)
        if name in tensors
    }
    optimizer.load_state_dict({"state": by_index, "param_groups": optimizer.state_dict()["param_groups"]})


def _check_tensors(file: Path, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    def kind(tensor: Tensor) -> str:
        return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"

    problems = []
    if missing := wanted.keys() - found.keys():
        problems.append(f"missing: {_some(missing)}")
    if unexpected := found.keys() - wanted.keys():
        problems.append(f"not in this task: {_some(unexpected)}")
    odd = [name for name in found if name in wanted and kind(found[name]) != kind(wanted[name])]
    if odd:
        problems.append(_some([f"{n} is {kind(found[n])}, the task has {kind(wanted[n])}" for n in odd]))
    if problems:
        raise CheckpointError(f"{file}: {'; '.join(problems)}")


def _check_frozen(path: Path, trained_with: dict[str, str], now: dict[str, str]) -> None:
    differing = {n for n in trained_with.keys() | now.keys() if trained_with.get(n) != now.get(n)}
    if differing:
        raise CheckpointError(
            f"{path}: trained with other frozen weights than those of this task ({_some(differing)}); "
            "load the frozen parts the run began with, or begin a new run folder"
        )


def _verify(path: Path) -> None:
    """Compare every file of the checkpoint with the manifest."""
    file = path / "manifest.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        entries = {name: (entry["sha256"], entry["bytes"]) for name, entry in manifest.items()}
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise CheckpointError(
            f"{file}: damaged; delete this checkpoint to fall back on the one before"
        ) from None
    for name in dict.fromkeys((*_REQUIRED, *entries)):
        file = path / name
        if name not in entries or not file.is_file():
            raise CheckpointError(f"{file}: missing; delete this checkpoint to fall back on the one before")
        entry = _file_entry(file)
        if (entry["sha256"], entry["bytes"]) != entries[name]:
            raise CheckpointError(
                f"{file}: damaged, its sha256 or size is not that of manifest.json; "
                "delete this checkpoint to fall back on the one before"
            )


def _published(root: Path) -> list[Path]:
    """Published checkpoints, oldest first."""
    found = [path for path in root.glob("step-*") if _PUBLISHED.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _file_entry(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"sha256": hashlib.file_digest(stream, "sha256").hexdigest(), "bytes": file.stat().st_size}


def _tensor_hash(tensor: Tensor) -> str:
    plain = full(tensor).cpu().contiguous()
    digest = hashlib.sha256(f"{plain.dtype} {list(plain.shape)} ".encode())
    digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    """Have the operating system put a file, or the list of a folder's entries, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _some(names: Iterable[str], shown: int = 5) -> str:
    """The first few of many names, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - shown} more" if len(ordered) > shown else ""
    return ", ".join(ordered[:shown]) + more
