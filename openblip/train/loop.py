"""The one training loop. It sees a task that turns a batch into named losses, and no model.

A task is an `nn.Module` with

    forward(batch) -> dict[str, Tensor]   named scalar losses, each a mean over this rank's share of the batch
    begin_step(step)                      called once per optimizer step, before its micro-batches, with the
                                          number of steps done so far: momentum update, ramps

and, where it has use for them,

    twins: collection of names            parameters without gradient that change all the same, or modules of
                                          such (momentum encoders): checkpoints must hold them
    no_decay: collection of names         parameters without weight decay, beside those that never have it
    lr_scale(name) -> float               factor on the learning rate of a parameter (layer-wise decay)
    set_grad_checkpointing(True)          recompute activations in the backward pass
    shard_units() -> list of modules      layers of a large model, for `TrainConfig.shard` (see shard.py); raises
                                          UserError if the task cannot be sharded

What decides the next step is the task's state, the optimizer's, the random states and the step number, which
also gives the place in the data. A checkpoint holds just that: a run that was stopped and resumed is the run
that was not, bit for bit on a CPU.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from openblip.config import ConfigError, UserError, to_dict
from openblip.train import checkpoint, distributed, optim
from openblip.train.config import TrainConfig
from openblip.train.log import RunLog, StepMetrics
from openblip.train.rng import RngState, rng_state, seed_rng_, set_rng_state_
from openblip.train.shard import full
from openblip.train.signals import StopSignals

Batch = dict[str, Any]
Evaluate = Callable[[nn.Module, int], dict[str, float]]
Evaluations = list[tuple[int, dict[str, float]]]  # (steps done, values by name)

# What a run cannot change and keep its place in the data.
_DATA_POSITION = ("batch_size", "batch_tokens", "accumulate", "seed")


class Loader(Protocol):
    """What the loop asks of a loader."""

    def batches(self, start: int) -> Iterator[Batch]:
        """This rank's share of the global micro-batches from number `start` on, without end.

        The same whenever it is called: nothing may depend on, or draw from, the global random states. "ids"
        or "image_ids" of a batch name its samples when something is wrong with them, and tell how many came.
        """
        ...


class NonFiniteError(UserError):
    """A loss or the gradient is NaN or infinite; raised before the optimizer could spread it."""


@dataclass(frozen=True)
class FitResult:
    """How a run ended. The task holds the last weights; `ema.copy_to_(task)` puts in the averaged."""

    step: int  # optimizer steps done, those before a resume included
    losses: dict[str, float]  # of the last step
    evaluations: Evaluations  # of the whole run
    interrupted: bool  # stopped by SIGTERM or SIGINT; the same call goes on from there
    checkpoint: Path  # of this step
    ema: optim.Ema | None


def fit(
    task: nn.Module,
    loader: Loader,
    config: TrainConfig,
    run_dir: str | Path,
    *,
    evaluate: Evaluate | None = None,
    resume: bool = True,
    run_config: Any = None,
) -> FitResult:
    """Train `task` in place up to optimizer step `config.max_steps`, from the newest checkpoint in `run_dir`.

    SIGTERM or SIGINT saves at the next step boundary and returns; a second SIGINT raises KeyboardInterrupt at
    once. Sets Python's, numpy's and torch's global random states: from the seed, or from the checkpoint. With
    `config.shard`, the task is whole again on every rank afterwards; only an error leaves it in shards.

    Args:
        evaluate: `evaluate(task, step)` gives numbers by name. Every rank calls it, in eval mode, without
            gradients, with the averaged weights if there are any, and all weights whole. It cannot influence
            training: random states and training mode are put back.
        resume: False refuses a folder that holds checkpoints, so that nothing is overwritten.
        run_config: dataclass to keep as the run folder's config.json; `config` if None.

    Raises:
        NonFiniteError: names step, loss and run folder, where bad_batch.json lists the samples' ids.
        CheckpointError: the newest checkpoint is damaged or of another task.
        UserError: the configuration fits neither the task nor what the run began with, or the loader ended.
    """
    config = replace(
        config
    )  # checked once more, for fields may have been set since; and nobody sets them now
    _check_task(task, config)
    if config.grad_checkpointing:
        task.set_grad_checkpointing(True)  # type: ignore[operator]  # to mypy an nn.Module has tensors only
    model = distributed.wrap(task, config.shard)  # first: the optimizer holds weights as they are trained
    run = _Run(task, config, Path(run_dir))
    begin = _begin_(run, resume)

    step, saved, losses, evaluations = begin.step, begin.checkpoint, begin.losses, begin.evaluations
    is_stopping = False
    busy, samples = 0.0, 0  # seconds and samples since the last logged step, without evaluating and saving
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(
            RunLog(
                run.folder,
                config if run_config is None else run_config,
                start_step=step,
                max_steps=config.max_steps,
                enabled=distributed.is_main(),
            )
        )
        for line in begin.notes:
            log.note(line)
        stop = stack.enter_context(StopSignals())
        stack.callback(task.train, task.training)
        task.train()
        batches = loader.batches(step * config.accumulate)
        if hasattr(batches, "close"):
            stack.callback(batches.close)  # workers end with the run, not when someone collects garbage
        set_rng_state_(begin.rng)  # last: whatever came before may have drawn numbers

        def evaluate_if_due() -> None:
            is_due = step == config.max_steps or (step > 0 and _is_multiple(step, config.eval_every))
            if evaluate is not None and is_due and step not in (done for done, _ in evaluations):
                evaluations.append((step, _evaluate(evaluate, run, model, step)))
                log.evaluation(*evaluations[-1])

        evaluate_if_due()  # a signal may have stopped the run right before
        while step < config.max_steps and not is_stopping:
            began = time.perf_counter()
            task.begin_step(step)  # type: ignore[operator]
            lr = optim.learning_rate(config, step)
            optim.set_lr_(run.optimizer, lr)
            run.optimizer.zero_grad(set_to_none=True)
            micro = _forward_backward(model, batches, config, step)
            if step == begin.step and (unused := run.without_gradient()):
                log.note(f"no gradient reaches {unused}")
            norm = full(nn.utils.get_total_norm([p.grad for p in run.weights if p.grad is not None]))
            losses, grad_norm, came, is_stopping = _agree(micro, norm, stop.is_requested)
            _check_finite(run, step, losses, grad_norm, micro)
            if config.clip_norm is not None:
                nn.utils.clip_grads_with_norm_(run.weights, config.clip_norm, norm)
            run.optimizer.step()
            if run.ema is not None:
                run.ema.update_(task, step)
            step += 1
            busy, samples = busy + time.perf_counter() - began, samples + came

            log.advance(step)
            if step == config.max_steps or _is_multiple(step, config.log_every):
                total = sum(config.loss_weights.get(name, 1.0) * value for name, value in losses.items())
                log.step(step, StepMetrics(total, losses, lr, grad_norm, samples / busy))
                busy, samples = 0.0, 0
            if not is_stopping:  # whoever sent SIGTERM does not wait long
                evaluate_if_due()
            if is_stopping or step == config.max_steps or _is_multiple(step, config.save_every):
                saved = _save(run, step, losses, evaluations)
                log.draw()
        if is_stopping:
            log.note(f"stopped after step {step}, saved in {saved}; the same call goes on from there")
    distributed.unshard_(model)
    if run.ema is not None:
        run.ema.weights = {name: full(weight) for name, weight in run.ema.weights.items()}
    assert saved is not None  # max_steps is at least 1: a checkpoint was there, or the last step made one
    return FitResult(step, losses, evaluations, is_stopping, saved, run.ema)


class _Run:
    """What belongs together while a task is trained."""

    def __init__(self, task: nn.Module, config: TrainConfig, folder: Path) -> None:
        self.task, self.config, self.folder = task, config, folder
        groups = optim.param_groups(
            task,
            config.weight_decay,
            no_decay=getattr(task, "no_decay", ()),
            lr_scale=getattr(task, "lr_scale", None),
        )
        self.weights = [weight for group in groups for weight in group["params"]]
        # fused: three times as fast as the loop over tensors, on a CPU too
        self.optimizer = torch.optim.AdamW(
            groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True
        )
        self.ema = None if config.ema_decay is None else optim.Ema(task, config.ema_decay)
        self.frozen = checkpoint.frozen_hashes(task)

    def without_gradient(self) -> str:
        """Names of trainable weights that the losses do not depend on; DDP cannot train such a task.

        Raises:
            UserError: there are some, and several processes.
        """
        names = [n for n, p in self.task.named_parameters() if p.requires_grad and p.grad is None]
        if names and distributed.world_size() > 1:
            raise UserError(
                f"no gradient reaches {', '.join(names)}; several processes need one for each trainable "
                "weight: freeze these (requires_grad False), or use them"
            )
        return ", ".join(names)


@dataclass(frozen=True)
class _Begin:
    """Where a run begins or goes on."""

    step: int
    rng: RngState
    checkpoint: Path | None = None
    losses: dict[str, float] = field(default_factory=dict)
    evaluations: Evaluations = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Micro:
    """What the micro-batches of one step on this rank gave."""

    names: list[str]
    values: Tensor  # [accumulate, losses]
    ids: list[list[Any]]  # of the samples, by micro-batch
    samples: int  # how many there were


def _check_task(task: nn.Module, config: TrainConfig) -> None:
    half = [name for name, p in task.named_parameters() if p.requires_grad and p.dtype.itemsize < 4]
    if half:
        raise UserError(
            f"{half[0]}: trainable weights must be float32, or small updates round to nothing; "
            "precision bf16 is for the forward pass"
        )
    if config.grad_checkpointing and not hasattr(task, "set_grad_checkpointing"):
        raise UserError(f"grad_checkpointing is on, but {type(task).__name__} has no set_grad_checkpointing")
    if config.batch_tokens is None and config.batch_size % distributed.world_size():
        world = distributed.world_size()
        raise UserError(f"batch_size {config.batch_size} cannot be shared equally by {world} processes")


def _begin_(run: _Run, resume: bool) -> _Begin:
    """Load the newest checkpoint, if there is one."""
    rank, world = distributed.rank(), distributed.world_size()
    newest = checkpoint.latest(run.folder)
    if newest is None:
        seed_rng_(run.config.seed, rank)
        return _Begin(0, rng_state())
    if not resume:
        raise UserError(
            f"{run.folder}: holds {newest.name} of an earlier run; resume it or choose another folder"
        )
    found = checkpoint.load_(newest, run.task, run.optimizer, ema=run.ema, frozen=run.frozen)
    if found.step > run.config.max_steps:
        raise UserError(f"{newest}: is beyond max_steps {run.config.max_steps}; nothing is left to train")
    before, now = to_dict(TrainConfig()) | found.extra["config"], to_dict(run.config)
    changed = {k: f"{k} was {before.get(k)!r}, now {now[k]!r}" for k in now if before.get(k) != now[k]}
    moved = [changed[key] for key in _DATA_POSITION if key in changed]
    if moved:
        raise UserError(
            f"{newest}: {'; '.join(moved)}: that loses the place in the data; begin a new run folder"
        )
    notes = [f"resumed from {newest}", *changed.values()]
    if len(found.rng) == world:
        rng = found.rng[rank]
    else:
        notes.append(f"{len(found.rng)} processes before, {world} now: the random states begin anew")
        seed_rng_(run.config.seed, rank, found.step)
        rng = rng_state()
    evaluations = [(step, values) for step, values in found.extra["evaluations"]]
    return _Begin(found.step, rng, newest, found.extra["losses"], evaluations, notes)


def _forward_backward(model: nn.Module, batches: Iterator[Batch], config: TrainConfig, step: int) -> _Micro:
    """Forward and backward over the micro-batches of one step; the gradients are left in the parameters."""
    device = next(model.parameters()).device
    names: list[str] = []
    values, ids, samples = [], [], 0
    for number in range(config.accumulate):
        batch = next(batches, None)
        if batch is None:
            there, wanted = step * config.accumulate + number, config.max_steps * config.accumulate
            raise UserError(f"the loader ended after {there} micro-batches; {wanted} are needed")
        batch = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
        is_last = number == config.accumulate - 1
        with contextlib.nullcontext() if is_last else distributed.no_sync(model):
            # No cache in shards: it would keep a copy of every weight until the forward pass ends.
            is_bf16, caches = config.precision == "bf16", not config.shard
            with torch.autocast(device.type, torch.bfloat16, is_bf16, cache_enabled=caches):
                losses = model(batch)
            names = names or list(losses)
            _check_losses(losses, names, config)
            total = torch.stack([config.loss_weights.get(name, 1.0) * losses[name] for name in names]).sum()
            (total / config.accumulate).backward()
        values.append(torch.stack([losses[name].detach().float() for name in names]))
        ids.append(_sample_ids(batch))
        samples += len(ids[-1]) or config.batch_size // distributed.world_size()
    return _Micro(names, torch.stack(values), ids, samples)


def _check_losses(losses: dict[str, Tensor], names: list[str], config: TrainConfig) -> None:
    if unknown := config.loss_weights.keys() - losses.keys():
        given = ", ".join(losses)
        raise ConfigError(f"loss_weights: {', '.join(sorted(unknown))}: no such loss; the task gives {given}")
    if losses.keys() != set(names):
        raise ValueError(f"the task gave the losses {list(losses)}, and {names} for the micro-batch before")
    for name, loss in losses.items():
        if loss.ndim:
            raise ValueError(f"loss {name!r} has shape {list(loss.shape)}, wanted a scalar")


def _sample_ids(batch: Batch) -> list[Any]:
    found = batch["ids"] if "ids" in batch else batch.get("image_ids", [])
    return found.tolist() if isinstance(found, Tensor) else list(found)


def _agree(micro: _Micro, norm: Tensor, wants_stop: bool) -> tuple[dict[str, float], float, int, bool]:
    """Mean losses and gradient norm over the ranks, samples of all, and whether any was told to stop."""
    told = norm.new_tensor([micro.samples, wants_stop], dtype=torch.float32)
    own = torch.cat([micro.values.mean(0), norm.float().view(1), told])
    *losses, grad_norm, samples, stopping = distributed.mean_over_ranks(own).tolist()
    return dict(zip(micro.names, losses)), grad_norm, round(samples * distributed.world_size()), stopping > 0


def _check_finite(run: _Run, step: int, losses: dict[str, float], grad_norm: float, micro: _Micro) -> None:
    """Refuse to go on if a loss or the gradient is not finite on any rank; then all ranks raise together."""
    bad = [f"loss {name} is {value}" for name, value in losses.items() if not math.isfinite(value)]
    if not bad and math.isfinite(grad_norm):
        return
    own = []
    for number, (row, ids) in enumerate(zip(micro.values.tolist(), micro.ids)):
        if not bad or not all(map(math.isfinite, row)):  # with finite losses, any of them may be to blame
            values = {name: str(value) for name, value in zip(micro.names, row)}
            own.append({"rank": distributed.rank(), "micro_batch": number, "ids": ids, "losses": values})
    everyone = [entry for several in distributed.gather_objects(own) for entry in several]
    file = run.folder / "bad_batch.json"
    if distributed.is_main():
        record = {"step": step + 1, "grad_norm": str(grad_norm), "micro_batches": everyone}
        file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    distributed.barrier()
    what = "; ".join(bad) or f"the gradient norm is {grad_norm}, with finite losses"
    raise NonFiniteError(
        f"step {step + 1}: {what}; no weight was changed. {file} lists its samples: look at them, "
        "lower lr or lengthen the warm-up"
    )


def _is_multiple(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _evaluate(evaluate: Evaluate, run: _Run, model: nn.Module, step: int) -> dict[str, float]:
    rng = rng_state()
    run.task.eval()
    averaged = run.ema.swapped_into_(run.task) if run.ema else contextlib.nullcontext()
    try:
        with torch.no_grad(), averaged, distributed.whole(model):
            return {name: float(value) for name, value in evaluate(run.task, step).items()}
    finally:
        run.task.train()
        set_rng_state_(rng)


def _save(run: _Run, step: int, losses: dict[str, float], evaluations: Evaluations) -> Path:
    """Save with every rank's random states; all wait until it is published."""
    checkpoint.save(
        run.folder,
        run.task,
        run.optimizer,
        step=step,
        rng=distributed.gather_objects(rng_state()),
        frozen=run.frozen,
        ema=run.ema,
        extra={"config": to_dict(run.config), "losses": losses, "evaluations": evaluations},
        keep=run.config.keep_checkpoints,
    )
    distributed.barrier()
    saved = checkpoint.latest(run.folder)
    assert saved is not None
    return saved
