"""Runs that are stopped, by a signal or a crash, and resumed: to the bit what was never stopped."""

import os
import random
import signal
import threading

import numpy as np
import pytest
import torch
from torch import nn

from openblip.config import UserError
from openblip.train import checkpoint, loop, rng
from openblip.train.loop import fit
from tests.train.tiny_loop import STEPS, TinyLoader, TinyTask, config, lines


def evaluate(task: nn.Module, step: int) -> dict[str, float]:
    """Draws random numbers and looks at weights: neither may influence training."""
    assert not task.training and not torch.is_grad_enabled()
    return {
        "noise": torch.rand(1).item(),
        "weight": task.position.sum().item() + random.random() + np.random.rand(),
    }


def everything(task: TinyTask, result: loop.FitResult) -> dict[str, torch.Tensor]:
    """Weights, buffers, averaged weights, and (read from the last checkpoint) optimizer and random states."""
    found = dict(task.state_dict())
    found |= {f"ema.{name}": tensor for name, tensor in result.ema.weights.items()}
    for part in ("optimizer", "rng", "model", "ema"):
        stored = checkpoint.load_file(result.checkpoint / f"{part}.safetensors")
        found |= {f"{part}.safetensors/{name}": tensor for name, tensor in stored.items()}
    return found


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Twenty steps without interruption."""
    run_dir = tmp_path_factory.mktemp("straight")
    task = TinyTask()
    result = fit(task, TinyLoader(), config(), run_dir, evaluate=evaluate)
    return task, result, run_dir


class Killed(TinyTask):
    """Sends itself a signal (or fails) in the middle of a step."""

    def __init__(self, at: int, sends: int | None) -> None:
        super().__init__()
        self.at, self.sends = at, sends

    def begin_step(self, step: int) -> None:
        super().begin_step(step)
        if step == self.at:
            if self.sends is None:
                raise RuntimeError("the power is gone")
            os.kill(os.getpid(), self.sends)


def interrupted_at_7(run_dir, how: str, **changes) -> None:
    """Leave a checkpoint after step 7: by a signal during it, or by a crash some steps later."""
    if how == "crash":
        with pytest.raises(RuntimeError, match="power"):
            fit(Killed(10, None), TinyLoader(), config(**changes), run_dir, evaluate=evaluate)
    else:
        sends = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}[how]
        result = fit(
            Killed(6, sends), TinyLoader(), config(save_every=None, **changes), run_dir, evaluate=evaluate
        )
        assert (result.step, result.interrupted) == (7, True)
    assert checkpoint.latest(run_dir).name == "step-00000007"


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "crash"])
def test_resumed_is_bitwise_what_was_never_stopped(how, straight, tmp_path):
    """20 steps against 7 + 13, with dropout, accumulation, queue, momentum, EMA and evaluation on."""
    task, result, run_dir = straight
    interrupted_at_7(tmp_path, how)
    resumed = TinyTask(seed=5)  # nothing may come from its own initial weights
    second = fit(resumed, TinyLoader(), config(), tmp_path, evaluate=evaluate)
    assert resumed.begun == list(range(7, STEPS)) and resumed.seen == task.seen[7 * 8 :]
    assert differing(everything(task, result), everything(resumed, second)) == []
    assert (second.step, second.interrupted, second.losses) == (STEPS, False, result.losses)
    assert second.evaluations == result.evaluations
    assert [step for step, _ in second.evaluations] == [4, 8, 12, 16, 20]
    assert lines(tmp_path) == lines(run_dir)


FORGOTTEN = {
    "queue": lambda task, optimizer, ema: task.queue.zero_(),
    "pointer": lambda task, optimizer, ema: task.pointer.add_(1),
    "twin": lambda task, optimizer, ema: task.twin.weight.data.mul_(0.9),
    "ema": lambda task, optimizer, ema: ema.weights["position"].zero_(),
    "moments": lambda task, optimizer, ema: [state["exp_avg"].zero_() for state in optimizer.state.values()],
    "adam step": lambda task, optimizer, ema: [state["step"].zero_() for state in optimizer.state.values()],
    "python": "python",
    "numpy": "numpy",
    "torch": "torch",
    "data position": None,
}


@pytest.mark.parametrize("what", FORGOTTEN)
def test_the_comparison_notices_whatever_a_resume_would_forget(what, straight, tmp_path, monkeypatch):
    """The test above can fail: take any one thing out of what is restored and the runs differ."""
    task, result, _ = straight
    interrupted_at_7(tmp_path, "SIGTERM")
    load_ = checkpoint.load_

    def forgetful(path, task, optimizer, *, ema, frozen):
        found = load_(path, task, optimizer, ema=ema, frozen=frozen)
        forget = FORGOTTEN[what]
        if callable(forget):
            forget(task, optimizer, ema)
        elif forget:
            rng.seed_rng_(123)
            found.rng[0][forget] = rng.rng_state()[forget]
        return found

    monkeypatch.setattr(checkpoint, "load_", forgetful)
    loader = TinyLoader()
    if what == "data position":
        loader.batches = lambda start: TinyLoader().batches(start + 1)
    resumed = TinyTask(seed=5)
    second = fit(resumed, loader, config(), tmp_path, evaluate=evaluate)
    assert differing(everything(task, result), everything(resumed, second))


def test_evaluation_and_logging_leave_training_alone(straight, tmp_path):
    task, result, _ = straight
    quiet = TinyTask()
    other = fit(quiet, TinyLoader(), config(log_every=6, eval_every=None, save_every=None), tmp_path)
    assert differing(everything(task, result), everything(quiet, other)) == []
    assert [line["step"] for line in lines(tmp_path)] == [6, 12, 18, 20]
    assert other.evaluations == []


def test_signal_handlers_are_put_back_and_the_loader_closed(tmp_path):
    def mine(number, frame):
        raise AssertionError("not during fit")

    before = signal.signal(signal.SIGTERM, mine)
    try:
        loader = TinyLoader()
        fit(Killed(2, signal.SIGTERM), loader, config(), tmp_path)
        assert signal.getsignal(signal.SIGTERM) is mine and loader.closed == 1
        with pytest.raises(RuntimeError, match="power"):
            fit(Killed(4, None), loader, config(), tmp_path)
        assert signal.getsignal(signal.SIGTERM) is mine and loader.closed == 2
    finally:
        signal.signal(signal.SIGTERM, before)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_stops_at_once(tmp_path):
    class Impatient(TinyTask):
        def begin_step(self, step):
            super().begin_step(step)
            if step == 3:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGTERM)  # no second SIGINT
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(Impatient(), TinyLoader(), config(save_every=None), tmp_path)
    assert checkpoint.latest(tmp_path) is None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_fit_works_outside_the_main_thread(tmp_path):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(fit(TinyTask(), TinyLoader(), config(max_steps=3), tmp_path))
    )
    thread.start()
    thread.join()
    assert results[0].step == 3 and not results[0].interrupted


def test_a_finished_run_is_given_back_without_training(straight, tmp_path):
    task, result, run_dir = straight
    again = TinyTask(seed=5)
    second = fit(again, TinyLoader(), config(), run_dir, evaluate=evaluate)
    assert again.begun == []
    assert (second.losses, second.evaluations) == (result.losses, result.evaluations)
    assert differing(everything(task, result), everything(again, second)) == []


def test_a_signal_in_the_last_step_leaves_the_evaluation_for_later(tmp_path):
    first = fit(Killed(4, signal.SIGTERM), TinyLoader(), config(max_steps=5), tmp_path, evaluate=evaluate)
    assert first.interrupted and [step for step, _ in first.evaluations] == [4]
    second = fit(TinyTask(), TinyLoader(), config(max_steps=5), tmp_path, evaluate=evaluate)
    assert not second.interrupted and [step for step, _ in second.evaluations] == [4, 5]


def test_what_may_and_may_not_change_on_resume(tmp_path, capsys):
    fit(TinyTask(), TinyLoader(), config(max_steps=3), tmp_path)
    with pytest.raises(UserError, match=r"accumulate was 2, now 4.*place in the data"):
        fit(TinyTask(), TinyLoader(), config(accumulate=4), tmp_path)
    with pytest.raises(UserError, match=r"batch_tokens was None, now 9.*place in the data"):
        fit(TinyTask(), TinyLoader(), config(batch_tokens=9), tmp_path)
    with pytest.raises(UserError, match="holds step-00000003 of an earlier run"):
        fit(TinyTask(), TinyLoader(), config(), tmp_path, resume=False)
    with pytest.raises(UserError, match="beyond max_steps 2"):
        fit(TinyTask(), TinyLoader(), config(max_steps=2, warmup_steps=1), tmp_path)
    task = TinyTask()
    task.frozen.weight.data[0, 0] += 1
    with pytest.raises(UserError, match=r"other frozen weights .*frozen\.weight"):
        fit(task, TinyLoader(), config(), tmp_path)
    capsys.readouterr()
    fit(TinyTask(), TinyLoader(), config(max_steps=4, lr=2e-2), tmp_path)
    told = capsys.readouterr().err
    assert "resumed from" in told and "lr was 0.01, now 0.02" in told and "batch_size" not in told
