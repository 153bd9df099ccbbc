"""AdamW's parameter groups, the learning rate as a function of the step, the averaged twin of the weights."""

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from openblip.config import UserError
from openblip.train.config import TrainConfig

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of optimizer step number `step` (the first is 0), however often a run was resumed.

    Warm-up is a straight line from `warmup_lr` at step 0 to `lr` at step `warmup_steps`. Then

    - "cosine": half a cosine from `lr` to `min_lr`, which it meets at `max_steps`; every step, where the
      released codes move once per epoch (BLIP §4.1, BLIP-2 §3.4);
    - "linear": a straight line from `lr` to `min_lr`;
    - "constant": `lr`;
    - "step_decay": `max(min_lr, lr * decay_rate ** epoch)`, as BLIP's released pre-training does (its paper
      says 0.85, its code 0.9). As there, warm-up belongs to epoch 0: what is left of it then is dropped.
    """
    epoch = (
        step // config.steps_per_epoch if config.schedule == "step_decay" and config.steps_per_epoch else 0
    )
    if step < config.warmup_steps and epoch == 0:
        return config.warmup_lr + (config.lr - config.warmup_lr) * step / config.warmup_steps
    done = min(1.0, (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps))
    match config.schedule:
        case "cosine":
            return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1.0 + math.cos(math.pi * done))
        case "linear":
            return config.lr + (config.min_lr - config.lr) * done
        case "constant":
            return config.lr
        case "step_decay":
            return max(config.min_lr, config.lr * config.decay_rate**epoch)


def param_groups(
    module: nn.Module,
    weight_decay: float,
    *,
    no_decay: Collection[str] = (),
    lr_scale: Callable[[str], float] | None = None,
) -> list[dict[str, Any]]:
    """The trainable parameters of `module`, each once, in groups of equal weight decay and equal `lr_scale`.

    Weight decay pulls towards zero, which means nothing for a bias, a gain or a temperature: tensors of fewer
    than two dimensions, biases and what normalisation layers own get none (the released BLIP decayed all).

    Args:
        weight_decay: for the tensors that decay.
        no_decay: further names without decay, whole or the end of one after a dot ("position_embedding").
        lr_scale: factor on the learning rate of the parameter of that name; `set_lr_` is what applies it.

    Returns:
        Groups with the keys "params", "weight_decay", "lr_scale".

    Raises:
        UserError: nothing is trainable.
        ValueError: an entry of `no_decay` fits no parameter.
    """
    names: dict[nn.Parameter, list[str]] = {}  # a shared parameter has several, and any of them may be listed
    is_norm: dict[nn.Parameter, bool] = {}
    for prefix, part in module.named_modules(remove_duplicate=False):
        for leaf, parameter in part.named_parameters(prefix, recurse=False):
            names.setdefault(parameter, []).append(leaf)
            is_norm[parameter] = is_norm.get(parameter, False) or isinstance(part, _NORMS)

    def is_listed(name: str, entry: str) -> bool:
        return name == entry or name.endswith(f".{entry}")

    for entry in no_decay:
        if not any(is_listed(name, entry) for several in names.values() for name in several):
            raise ValueError(f"no_decay lists {entry!r}, but no parameter has that name")

    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter, several in names.items():
        if not parameter.requires_grad:
            continue
        is_exempt = (
            parameter.ndim < 2
            or is_norm[parameter]
            or any(is_listed(name, entry) for name in several for entry in ("bias", *no_decay))
        )
        scale = 1.0 if lr_scale is None else lr_scale(several[0])
        groups.setdefault((0.0 if is_exempt else weight_decay, scale), []).append(parameter)
    if not groups:
        raise UserError("nothing to train: every parameter of the task is frozen (requires_grad is False)")
    return [{"params": ps, "weight_decay": decay, "lr_scale": scale} for (decay, scale), ps in groups.items()]


def tower_lr_scale(name: str, decay: float, depth: int) -> float:
    """Layer-wise decay of an image tower's learning rate (BEiT; BLIP-2's fine-tuning), for a parameter's name.

    Block `i` of `depth` gets `decay ** (depth - i)`, what is before them `decay ** (depth + 1)`, and what is behind
    them or no part of the tower 1. LAVIS computes these factors and uses them nowhere.
    """
    _, _, part = f".{name}".partition(".vision.")
    if part.startswith("blocks."):
        return float(decay ** (depth - int(part.split(".")[1])))
    is_before = part.startswith(("patch_embedding", "class_embedding", "position_embedding", "pre_norm"))
    return float(decay ** (depth + 1)) if is_before else 1.0


def set_lr_(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give each group `lr` times its own `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


class Ema:
    """A twin of the trainable weights that follows them: `twin = d * twin + (1 - d) * weight` at each step.

    `d` grows from 0.1 to `decay` as `min(decay, (1 + step) / (10 + step))`, so that a short run forgets its
    random initial weights too.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: p.detach().clone() for name, p in _trainable(module)}

    @torch.no_grad()
    def update_(self, module: nn.Module, step: int) -> None:
        """Move the twin towards the weights of `module`, after optimizer step number `step` (from 0)."""
        weight = 1.0 - min(self.decay, (1.0 + step) / (10.0 + step))
        for name, parameter in _trainable(module):
            self.weights[name].lerp_(parameter, weight)

    @torch.no_grad()
    def copy_to_(self, module: nn.Module) -> None:
        """Overwrite the trainable weights of `module` with the twin's."""
        for name, parameter in _trainable(module):
            parameter.copy_(self.weights[name])

    @contextmanager
    def swapped_into_(self, module: nn.Module) -> Iterator[None]:
        """The twin's weights in `module` for a `with` block; its own come back whatever happens inside."""
        own = {name: p.detach().clone() for name, p in _trainable(module)}
        self.copy_to_(module)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in _trainable(module):
                    parameter.copy_(own[name])


def _trainable(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)
