"""A task in shards: each process keeps its part of every weight, gradient and moment (FSDP2, `fully_shard`).

What a task lists in `shard_units()` (the layers of a language model) is gathered when its `forward` is called,
freed after it, and gathered once more for the backward pass. So nothing but its `forward` may use its weights,
and all ranks call it equally often, whatever their batches hold: what runs only if there are images is no unit.
All other weights are gathered together for the whole step. Gradients are averaged over the processes as DDP
does it, and each keeps its part.

A shard is a `DTensor`. Optimizer, averaged weights and clipping work on shards; a checkpoint holds whole
tensors, so a run may go on with another number of processes, in shards or not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from openblip.config import UserError


def full(tensor: Tensor) -> Tensor:
    """`tensor` without its graph; of a shard, the whole, gathered: then every rank must call this."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shared_like(whole: Tensor, tensor: Tensor) -> Tensor:
    """`whole`, or this rank's shard of it if `tensor` is one; every rank has the same `whole`."""
    if not isinstance(tensor, DTensor):
        return whole
    device = tensor.device  # src_data_rank None: take the part that is here already, send nothing
    return distribute_tensor(whole.to(device), tensor.device_mesh, tensor.placements, src_data_rank=None)


class Sharded(nn.Module):
    """`task` in shards, which begins with rank 0's weights and buffers. It is sharded in place.

    Raises:
        UserError: a trainable weight without dimensions; there is nothing to share out.
        ValueError: a unit that is no part of the task.
    """

    def __init__(self, task: nn.Module) -> None:
        super().__init__()
        scalars = {name: p for name, p in task.named_parameters() if p.ndim == 0}
        if trained := [name for name, p in scalars.items() if p.requires_grad]:
            raise UserError(
                f"shard: {', '.join(trained)}: a trainable weight must have a dimension to be shared out; "
                "give it shape [1], freeze it, or train without shard"
            )
        units = set(task.shard_units()) if hasattr(task, "shard_units") else set()  # type: ignore[operator]
        if strangers := units - set(task.modules()):
            raise ValueError(f"shard_units: {type(strangers.pop()).__name__} is no part of the task")
        for tensor in (*task.parameters(), *task.buffers()):
            _from_rank_0_(tensor.detach())
        changes = [_Changes(module) for module in task.modules()]
        mesh = init_device_mesh(next(task.parameters()).device.type, (dist.get_world_size(),))
        for module in reversed(list(task.modules())):  # inner ones first; the task itself comes last
            if module in units or module is task:
                fully_shard(module, mesh=mesh, ignored_params=set(scalars.values()))
                assert isinstance(module, FSDPModule)
                module.set_force_sum_reduction_for_comms(mesh.device_type == "cpu")  # gloo takes no mean
        for change in changes:
            change.done()
        self.task, self._changes = task, changes

    def forward(self, batch: Any) -> Any:
        """What the task makes of a batch."""
        return self.task(batch)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The task with all its weights on every rank, and nothing of FSDP, for a `with` block all enter.

        Inside, any method of any module may be called, and ranks need not do the same. What is done to the
        weights there is lost.
        """
        shards = self._gather_()
        try:
            yield
        finally:
            for module, name, shard in shards:
                module._parameters[name] = shard
            for change in self._changes:
                change.swap_()

    def unshard_(self) -> None:
        """Make the task what it was before, whole on every rank. Every rank must call this."""
        self._gather_()
        for change in self._changes:
            _module_state_mapping.pop(change.module, None)  # or no later stage could shard it again

    def _gather_(self) -> list[tuple[nn.Module, str, nn.Parameter]]:
        """Put whole weights in the place of shards; where each shard was."""
        shards = []
        for module in self.task.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and isinstance(parameter.data, DTensor):
                    shards.append((module, name, parameter))
        for change in self._changes:
            change.swap_()
        whole: dict[int, nn.Parameter] = {}  # several modules may share one
        for module, name, shard in shards:
            if id(shard) not in whole:
                whole[id(shard)] = nn.Parameter(full(shard), requires_grad=shard.requires_grad)
            module._parameters[name] = whole[id(shard)]
        return shards


class _Changes:
    """What `fully_shard` makes of a module beside its weights: another class, hooks, attributes of its own."""

    def __init__(self, module: nn.Module) -> None:
        """Remember `module` as it is."""
        self.module, self.kind = module, type(module)
        own = vars(module)
        tables = [name for name in own if name.endswith("_hooks") and isinstance(own[name], dict)]
        self.hooks = {name: dict(own[name]) for name in tables}
        self.names = set(own)
        self.attributes: dict[str, Any] = {}

    def done(self) -> None:
        """Now it is sharded."""
        self.names = set(vars(self.module)) - self.names

    def swap_(self) -> None:
        """Exchange what the module is for what is remembered: first it becomes plain, then sharded again."""
        own = vars(self.module)
        kind, self.module.__class__ = type(self.module), self.kind
        self.kind = kind
        for name, remembered in self.hooks.items():
            self.hooks[name] = dict(own[name])
            own[name].clear()
            own[name].update(remembered)
        taken = {name: own.pop(name) for name in self.names if name in own}
        own.update(self.attributes)
        self.attributes = taken


def _from_rank_0_(tensor: Tensor) -> None:
    if tensor.numel():
        sent = tensor.contiguous()
        dist.broadcast(sent.view(-1).view(torch.uint8), 0)  # as bytes: gloo does not know every dtype
        tensor.copy_(sent)
