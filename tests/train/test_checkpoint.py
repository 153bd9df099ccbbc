"""Checkpoints. Run as a program, this file forks writers and kills them while they save."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from openblip.config import UserError
from openblip.train import checkpoint, optim, rng

ROOT = Path(__file__).resolve().parents[2]


class Task(nn.Module):
    """Encoder and decoder share a block, as BLIP's text towers do; frozen tower, twin and queue."""

    twins = ("twin",)

    def __init__(self, seed: int = 0, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        torch.manual_seed(seed)
        shared = nn.Linear(4, width)
        self.encoder = nn.ModuleDict({"own": nn.Linear(4, 4), "shared": shared})
        self.decoder = nn.ModuleDict({"own": nn.Linear(4, 4), "shared": shared})
        self.twin = nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("queue", torch.randn(3, 4))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def loss(self) -> torch.Tensor:
        x = self.frozen(torch.randn(5, 4))
        return sum(m["shared"](m["own"](x)).square().mean() for m in (self.encoder, self.decoder))


def training(seed: int = 0, width: int = 6) -> tuple[Task, torch.optim.AdamW, optim.Ema]:
    task = Task(seed, width)
    optimizer = torch.optim.AdamW(optim.param_groups(task, 0.05), lr=1e-2, fused=True)
    return task, optimizer, optim.Ema(task, 0.9)


def train_(task, optimizer, ema, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        task.loss().backward()
        optimizer.step()
        ema.update_(task, step)
        task.pointer += 1
        with torch.no_grad():
            task.twin.weight.lerp_(task.encoder["own"].weight, 0.5)


def save(folder: Path, task, optimizer, ema, step: int, **more) -> Path:
    settings = {"frozen": checkpoint.frozen_hashes(task), "rng": [rng.rng_state()]} | more
    return checkpoint.save(folder, task, optimizer, ema=ema, step=step, **settings)


@pytest.fixture
def saved(tmp_path):
    state = training()
    train_(*state, steps=3)
    return save(tmp_path, *state, step=3, extra={"note": "täst"}), state


def test_everything_comes_back(saved):
    path, (task, optimizer, ema) = saved
    other, other_optimizer, other_ema = training(seed=1)
    assert not torch.equal(other.queue, task.queue)
    resumed = checkpoint.load_(path, other, other_optimizer, ema=other_ema)
    assert (resumed.step, resumed.extra) == (3, {"note": "täst"})
    for name, tensor in task.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    for name, tensor in ema.weights.items():
        assert torch.equal(tensor, other_ema.weights[name])
    for mine, theirs in zip(optimizer.param_groups, other_optimizer.param_groups):
        assert mine["weight_decay"] == theirs["weight_decay"]
        for a, b in zip(mine["params"], theirs["params"]):
            ours, others = optimizer.state[a], other_optimizer.state[b]
            assert ours.keys() == others.keys() == {"step", "exp_avg", "exp_avg_sq"}
            assert all(torch.equal(ours[key], others[key]) for key in ours)
    # Shared weights are one tensor still: one step moves both names.
    train_(other, other_optimizer, other_ema, steps=1)
    assert other.encoder["shared"].weight is other.decoder["shared"].weight
    assert not torch.equal(other.encoder["shared"].weight, task.encoder["shared"].weight)


def test_what_is_on_the_disk(saved):
    path, _ = saved
    assert path.name == "step-00000003"
    stored = load_file(path / "model.safetensors")
    assert "encoder.shared.weight" in stored and "decoder.shared.weight" not in stored
    assert {"twin.weight", "queue", "pointer"} <= stored.keys()
    assert not any(name.startswith(("frozen", "scratch")) for name in stored)
    state = json.loads((path / "state.json").read_text())
    assert state["shared"] == {f"decoder.shared.{x}": f"encoder.shared.{x}" for x in ("weight", "bias")}
    assert state["frozen"].keys() == {"frozen.weight", "frozen.bias"}
    files = {file.name for file in path.iterdir()}
    assert json.loads((path / "manifest.json").read_text()).keys() == files - {"manifest.json"}
    assert {Path(name).suffix for name in files} == {".json", ".safetensors"}


def test_random_states_go_on_where_they_were(saved):
    def draw():
        return [random.gauss(0, 1), random.random(), np.random.randn(), *torch.randn(3).tolist()]

    random.gauss(0, 1), np.random.randn()  # each keeps a second Gaussian number in store
    state = rng.rng_state()
    first = draw()
    assert draw() != first
    rng.set_rng_state_(state)
    assert draw() == first
    rng.seed_rng_(0, 1)
    ours = draw()
    rng.seed_rng_(1, 0)
    assert draw() != ours
    rng.seed_rng_(0, 1)
    assert draw() == ours


def test_a_flipped_byte_is_refused_by_name(saved):
    path, _ = saved
    task, optimizer, ema = training(seed=1)
    before = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for position in {0, len(whole) // 3, len(whole) // 2, len(whole) - 2}:
            damaged = bytearray(whole)
            damaged[position] ^= 1
            file.write_bytes(damaged)
            with pytest.raises(checkpoint.CheckpointError, match=r"damaged|missing") as caught:
                checkpoint.load_(path, task, optimizer, ema=ema)
            assert file.name in str(caught.value), position
        file.write_bytes(whole[:-2])
        with pytest.raises(checkpoint.CheckpointError, match=file.name):
            checkpoint.load_(path, task, optimizer, ema=ema)
        file.rename(file.with_suffix(".gone"))
        with pytest.raises(checkpoint.CheckpointError, match=file.name):
            checkpoint.load_(path, task, optimizer, ema=ema)
        file.with_suffix(".gone").unlink()
        file.write_bytes(whole)
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.state_dict().items())
    assert not optimizer.state
    checkpoint.load_(path, task, optimizer, ema=ema)


def test_keys_and_shapes_are_strict_and_named(saved):
    path, _ = saved
    task = Task(width=8)
    with pytest.raises(
        checkpoint.CheckpointError, match=r"encoder\.shared\.weight is float32 \[6, 4\], .* \[8, 4\]"
    ):
        checkpoint.load_(path, task)
    task = Task()
    task.register_buffer("gained", torch.zeros(1))
    del task.queue
    untouched = task.encoder["own"].weight.clone()
    with pytest.raises(checkpoint.CheckpointError, match="missing: gained; not in this task: queue"):
        checkpoint.load_(path, task)
    assert torch.equal(task.encoder["own"].weight, untouched)
    task = Task()
    task.decoder["shared"] = nn.Linear(4, 6)
    with pytest.raises(checkpoint.CheckpointError, match=r"shared otherwise .*decoder\.shared\.bias"):
        checkpoint.load_(path, task)
    task = Task()
    optimizer = torch.optim.AdamW([task.encoder["own"].weight])
    with pytest.raises(checkpoint.CheckpointError, match=r"does not train: .*encoder\.own\.bias"):
        checkpoint.load_(path, task, optimizer)


def test_other_frozen_weights_are_refused(saved):
    path, _ = saved
    task = Task()
    task.frozen.bias.data[0] += 1e-6
    with pytest.raises(UserError, match=r"other frozen weights .*\(frozen\.bias\)"):
        checkpoint.load_(path, task)


def test_averaged_weights_must_be_there_if_asked_for(tmp_path):
    task, optimizer, ema = training()
    path = save(tmp_path, task, optimizer, None, step=1)
    with pytest.raises(checkpoint.CheckpointError, match="no averaged weights"):
        checkpoint.load_(path, task, optimizer, ema=ema)


def test_a_frozen_weight_that_moved_is_not_lost_silently(tmp_path):
    task, optimizer, ema = training()
    task.twins = ()
    frozen = checkpoint.frozen_hashes(task)
    train_(task, optimizer, ema, steps=1)
    with pytest.raises(ValueError, match=r"twin\.weight: .*attribute `twins`"):
        save(tmp_path, task, optimizer, ema, step=1, frozen=frozen)
    assert checkpoint.latest(tmp_path) is None


def test_the_newest_are_kept_and_leftovers_cleaned(tmp_path):
    state = training()
    assert checkpoint.latest(tmp_path) is None
    for step in (9, 99_999_999, 100_000_000):  # numbers, not names, are what is compared
        path = save(tmp_path, *state, step=step, keep=2)
        assert checkpoint.latest(tmp_path) == path
        leftover = tmp_path / "checkpoints" / ".tmp-step-00000010-1"
        leftover.mkdir()
        (leftover / "model.safetensors").write_bytes(b"half")
        assert checkpoint.latest(tmp_path) == path
    path = save(tmp_path, *state, step=100_000_001, keep=2)
    assert sorted(p.name for p in path.parent.iterdir()) == ["step-100000000", "step-100000001"]
    with pytest.raises(checkpoint.CheckpointError, match="exists already"):
        save(tmp_path, *state, step=100_000_001)


def write_one(folder: Path) -> None:
    """Save the checkpoint after the newest; everything in it holds its step number."""
    task, optimizer, ema = training()
    train_(task, optimizer, ema, steps=1)
    newest = checkpoint.latest(folder)
    step = 1 if newest is None else int(newest.name.removeprefix("step-")) + 1
    with torch.no_grad():
        moments = [state["exp_avg"] for state in optimizer.state.values()]
        for tensor in (*task.encoder.parameters(), task.queue, *ema.weights.values(), *moments):
            tensor.fill_(step)
    save(folder, task, optimizer, ema, step=step, keep=2)


def look(folder: Path) -> dict:
    """Load the newest checkpoint: its step, the values found in it, and what a kill left behind."""
    task, optimizer, ema = training(seed=1)
    newest = checkpoint.latest(folder)
    step = checkpoint.load_(newest, task, optimizer, ema=ema).step
    tensors = [task.queue, *task.decoder["shared"].parameters(), *ema.weights.values()]
    tensors += [state["exp_avg"] for state in optimizer.state.values()]
    leftovers = [path.name for path in newest.parent.iterdir() if path.name.startswith(".tmp-")]
    return {
        "step": step,
        "values": torch.cat([t.flatten() for t in tensors]).unique().tolist(),
        "left": leftovers,
    }


def killed_at_random(folder: Path, times: int) -> list[dict]:
    """Fork a writer that saves on and on, kill it at a random moment, look; `times` times."""
    random.seed(0)
    found = []
    for _ in range(times):
        child = os.fork()
        if child == 0:
            while True:
                write_one(folder)
        before = checkpoint.latest(folder)
        while checkpoint.latest(folder) == before:
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found.append(look(folder))
    return found


def die_at_call(number: int) -> None:
    """Have this process killed before its `number`-th call that syncs or changes a folder's entries."""
    count = 0

    def dying(function: Callable) -> Callable:
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    os.fsync = dying(lambda handle: None)  # what the system has taken no kill can lose: spare the time
    for name in ("rename", "unlink", "rmdir", "mkdir"):
        setattr(os, name, dying(getattr(os, name)))


def killed_at_each_call(folder: Path) -> list[dict]:
    """Fork a writer that dies before call n, look; for n = 1, 2, ... until one gets through."""
    found = []
    for number in range(1, 100):
        child = os.fork()
        if child == 0:
            die_at_call(number)
            write_one(folder)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        found.append(look(folder))
        if status == 0:
            return found
    raise AssertionError("the writer never got through")


def test_killed_while_saving_leaves_a_checkpoint_that_loads(tmp_path):
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    at_random, at_each_call = json.loads(done.stdout)
    assert len(at_random) == 10 and len(at_each_call) > 15
    for found in (*at_random, *at_each_call):
        assert found["values"] == [found["step"]], found
    steps = [found["step"] for found in at_random]
    assert steps == sorted(set(steps)), "each writer published more than the one before"
    assert any(found["left"] for found in at_random), "no kill fell into a save: the test shows nothing"
    steps = [found["step"] for found in at_each_call]
    assert steps == sorted(steps) and steps[0] < steps[-1]
    kinds = {name[:9] for found in at_each_call for name in found["left"]}
    assert kinds == {".tmp-step", ".tmp-old-"}, "killed while writing and while deleting"
    save(tmp_path, *training(), step=steps[-1] + 1)
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))


if __name__ == "__main__":
    train_(*training(), steps=1)  # what torch loads at first use, the forked writers need not load each
    target = Path(sys.argv[1])
    print(json.dumps([killed_at_random(target, times=10), killed_at_each_call(target)]))
