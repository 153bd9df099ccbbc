"""Several processes on one global batch, such that the result is that of one process.

What makes gradients right without any scaling in a task: each rank's loss is a *mean over its own, equally
large share* of the global batch. DDP averages the ranks' gradients, and the mean of those means is the
global mean. `all_gather` fits in: backward, it *sums* what all ranks send back to a row; DDP divides by the
number of ranks; what remains is the gradient of the mean of the ranks' losses. A mean over anything but
samples (LM: over tokens, of which ranks have different numbers) is taken with `global_mean`.

All functions work in a single process too, where nothing is initialised.
"""

import contextlib
import os
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from openblip.train.shard import Sharded


def init_from_env() -> torch.device:
    """Join the process group that `torchrun` describes in the environment, if any; this process's device."""
    has_cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if has_cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if has_cuda else "gloo")
    return device


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """True in the one process that logs and saves."""
    return rank() == 0


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def all_gather(rows: Tensor) -> Tensor:
    """The rows of all ranks, in rank order, differentiable.

    Args:
        rows: [B, ...], the same shape on every rank.

    Returns:
        [world * B, ...]; own rows start at `rank() * B`. The gradient of a row is the sum over all ranks'
        losses (see the head of this file). Under `no_grad`, or for integers, there is none.
    """
    if world_size() == 1:
        return rows
    world = dist.distributed_c10d._get_default_group()
    gathered = functional.all_gather_single_autograd(rows.contiguous(), 0, world)
    return functional.wait_tensor(gathered)  # a plain tensor, not one that waits at its first use


def global_mean(total: Tensor, count: Tensor) -> Tensor:
    """Mean over what all ranks hold together, from each rank's own sum and count, as a task's loss.

    Args:
        total: scalar, the sum over this rank's elements (tokens, say), with its graph.
        count: scalar, how many they are. May be 0 here, not everywhere.

    Returns:
        scalar `total * world / sum of counts`. Its average over the ranks, which DDP takes of gradients and
        the loop of logged losses, is the mean exactly. In one process it is the mean itself.
    """
    if world_size() == 1:
        return total / count
    counts = count.detach().to(torch.float64, copy=True)
    dist.all_reduce(counts)
    return total * (world_size() / counts).to(total.dtype)


def mean_over_ranks(values: Tensor) -> Tensor:
    """Elementwise mean over the ranks, a new tensor without gradient; NaN or inf on one rank shows on all."""
    values = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(values)  # gloo has no AVG
    return values / world_size()


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, in rank order, on every rank."""
    everyone: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(everyone, value)
    return everyone


def wrap(task: nn.Module, shard: bool = False) -> nn.Module:
    """`task` as several processes train it, weights and buffers first rank 0's. Itself if alone.

    DDP averages the gradients; with `shard`, no rank keeps more than its part of weights, gradients and
    moments (see train/shard.py).

    Buffers are not sent around later: a queue is large, and filled with gathered features it is the same on
    every rank anyway. A task must keep to that: what enters a buffer is gathered first.
    """
    if world_size() == 1:
        return task
    if shard:
        return Sharded(task)
    device = next(task.parameters()).device
    return DistributedDataParallel(
        task,
        device_ids=[device.index] if device.type == "cuda" else None,
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
    )


def no_sync(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Forward and backward without averaging gradients: for all micro-batches of a step but the last.

    In shards they are averaged each time: until then, every rank holds the whole gradient.
    """
    return model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()


def whole(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """The task behind `wrap` with whole weights on every rank, for a `with` block, which every rank enters."""
    return model.whole() if isinstance(model, Sharded) else contextlib.nullcontext()


def unshard_(model: nn.Module) -> None:
    """Make the task behind `wrap` whole again on every rank, for good; every rank calls this."""
    if isinstance(model, Sharded):
        model.unshard_()
