import itertools
import json
import os
import random
import signal
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from openblip.config import ConfigError, UserError
from openblip.train import checkpoint, loop, rng
from openblip.train.config import TrainConfig
from openblip.train.loop import NonFiniteError, fit

STEPS = 20


class TinyTask(nn.Module):
    """A contrastive and a regression loss with all that makes resuming hard.

    A frozen tower, a shared block, dropout, a momentum twin, a queue with a pointer, a ramp, and draws from
    each of the three global random states.
    """

    twins = ("twin",)
    no_decay = ("position",)

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(99)
        self.frozen = nn.Linear(6, 8).requires_grad_(False)
        torch.manual_seed(seed)
        shared = nn.Linear(8, 8)
        self.image = nn.ModuleDict({"proj": nn.Linear(8, 8), "shared": shared})
        self.text = nn.ModuleDict({"proj": nn.Linear(8, 8), "shared": shared})
        self.position = nn.Parameter(torch.randn(1, 8))
        self.twin = nn.Linear(8, 8).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(10, 8), dim=-1))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))
        self.alpha = 0.0
        self.begun: list[int] = []
        self.seen: list[int] = []

    def begin_step(self, step: int) -> None:
        self.begun.append(step)
        self.alpha = min(1.0, step / 10)
        with torch.no_grad():
            self.twin.weight.lerp_(self.text["proj"].weight, 0.1)

    def forward(self, batch: dict) -> dict[str, torch.Tensor]:
        self.seen += batch["ids"]
        x = self.frozen(batch["x"])
        image = F.normalize(
            self.image["shared"](F.dropout(self.image["proj"](x), 0.2, self.training)), dim=-1
        )
        text = F.normalize(self.text["shared"](self.text["proj"](x + self.position)), dim=-1)
        teacher = F.normalize(self.twin(x), dim=-1)
        noise = np.random.rand() + random.random()
        logits = image @ torch.cat([teacher, self.queue]).T / 0.1 + noise * self.alpha
        if self.training:
            slots = (self.pointer + torch.arange(len(x))) % len(self.queue)
            self.queue[slots] = teacher.float()
            self.pointer += len(x)
            self.pointer %= len(self.queue)
        return {
            "itc": F.cross_entropy(logits, torch.arange(len(x)), label_smoothing=0.1),
            "lm": (text.sum(-1) * noise - batch["y"]).square().mean(),
        }


class TinyLoader:
    """Micro-batch number n is the same whenever it is asked for."""

    def __init__(self, size: int = 4, end: int | None = None) -> None:
        self.size, self.end, self.closed = size, end, 0

    def batches(self, start: int):
        number = start
        try:
            while self.end is None or number < self.end:
                generator = torch.Generator().manual_seed(number)
                yield {
                    "x": torch.randn(self.size, 6, generator=generator),
                    "y": torch.randn(self.size, generator=generator),
                    "ids": [number * self.size + i for i in range(self.size)],
                }
                number += 1
        finally:
            self.closed += 1


def config(**changes) -> TrainConfig:
    settings = {
        "max_steps": STEPS,
        "batch_size": 4,
        "accumulate": 2,
        "lr": 1e-2,
        "warmup_steps": 3,
        "clip_norm": 0.5,
        "ema_decay": 0.9,
        "log_every": 1,
        "save_every": 7,
        "eval_every": 4,
    }
    return TrainConfig(**settings | changes)


def evaluate(task: nn.Module, step: int) -> dict[str, float]:
    """Draws random numbers and looks at weights: neither may influence training."""
    assert not task.training and not torch.is_grad_enabled()
    return {
        "noise": torch.rand(1).item(),
        "weight": task.position.sum().item() + random.random() + np.random.rand(),
    }


def lines(run_dir) -> list[dict]:
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for line in found:
        line.pop("samples_per_s", None)
    return found


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


def test_evaluation_sees_the_averaged_weights_and_the_task_keeps_its_own(tmp_path):
    seen = {}

    def look(task, step):
        seen[step] = task.position.detach().clone()
        return {}

    task = TinyTask().eval()
    result = fit(task, TinyLoader(), config(), tmp_path, evaluate=look)
    assert not task.training, "put back as it was"
    assert torch.equal(seen[STEPS], result.ema.weights["position"])
    assert not torch.equal(seen[STEPS], task.position)


def test_a_step_is_what_the_formulas_say(tmp_path):
    """One step by hand: weighted sum, mean over micro-batches, clipping, AdamW with its groups, the EMA."""
    settings = config(max_steps=1, warmup_steps=0, schedule="constant", loss_weights={"lm": 0.25})
    task, mine = TinyTask(), TinyTask()
    result = fit(task, TinyLoader(), settings, tmp_path)

    rng.seed_rng_(settings.seed, 0)
    mine.begin_step(0)
    batches = TinyLoader().batches(0)
    losses = [mine(next(batches)) for _ in range(2)]
    (sum(loss["itc"] + 0.25 * loss["lm"] for loss in losses) / 2).backward()
    trained = {name: p for name, p in mine.named_parameters() if p.requires_grad}
    norm = torch.stack([p.grad.square().sum() for p in trained.values()]).sum().sqrt()
    assert norm > 0.5, "clipping is at work"
    for name, p in trained.items():
        before, gradient = p.detach().clone(), p.grad * (0.5 / norm)
        decay = 0.0 if p.ndim < 2 or name == "position" else settings.weight_decay
        after = before * (1 - 1e-2 * decay) - 1e-2 * gradient / (gradient.abs() + settings.eps)
        torch.testing.assert_close(task.get_parameter(name).detach(), after, atol=1e-6, rtol=1e-5)
        expected = 0.1 * before + 0.9 * after
        torch.testing.assert_close(result.ema.weights[name], expected, atol=1e-6, rtol=1e-5)
    assert {path.name for path in tmp_path.iterdir()} >= {
        "config.json",
        "metrics.jsonl",
        "loss.png",
        "checkpoints",
    }
    (line,) = lines(tmp_path)
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    for name in ("itc", "lm"):
        mean = sum(loss[name].item() for loss in losses) / 2
        assert line["losses"][name] == result.losses[name] == pytest.approx(mean, rel=1e-6)
    assert line["loss"] == pytest.approx(line["losses"]["itc"] + 0.25 * line["losses"]["lm"])


def test_the_schedule_and_the_scale_of_each_weight_are_applied(tmp_path):
    class Scaled(TinyTask):
        def lr_scale(self, name: str) -> float:
            return 0.0 if name == "position" else 1.0

    start, cold, scaled = TinyTask(), TinyTask(), Scaled()
    fit(cold, TinyLoader(), config(max_steps=1, warmup_steps=1, warmup_lr=0.0), tmp_path / "cold")
    assert torch.equal(cold.image["proj"].weight, start.image["proj"].weight), "the first learning rate is 0"
    fit(scaled, TinyLoader(), config(max_steps=4, schedule="linear"), tmp_path / "scaled")
    assert torch.equal(scaled.position, start.position)
    assert not torch.equal(scaled.image["proj"].weight, start.image["proj"].weight)
    lrs = [line["lr"] for line in lines(tmp_path / "scaled")]
    assert lrs == pytest.approx([1e-6, 1e-6 + (1e-2 - 1e-6) / 3, 1e-6 + (1e-2 - 1e-6) * 2 / 3, 1e-2])


def test_bf16_runs_the_forward_pass_only(tmp_path):
    dtypes = []

    class Watched(TinyTask):
        def forward(self, batch):
            dtypes.append(self.image["proj"](batch["x"] @ torch.ones(6, 8)).dtype)
            return super().forward(batch)

    fp32, bf16 = TinyTask(), Watched()
    fit(fp32, TinyLoader(), config(max_steps=5), tmp_path / "fp32")
    fit(bf16, TinyLoader(), config(max_steps=5, precision="bf16"), tmp_path / "bf16")
    assert set(dtypes) == {torch.bfloat16}
    assert {p.dtype for p in bf16.parameters()} == {torch.float32}
    difference = (fp32.position - bf16.position).abs().max()
    assert 0 < difference < 0.05


class Poisoned(TinyTask):
    """Gives a bad loss, or a bad gradient of a good loss, for one sample."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, batch):
        losses = super().forward(batch)
        if 42 in batch["ids"]:
            if self.kind == "loss":
                losses["lm"] = losses["lm"] * float("nan")
            else:
                zero = (self.position * 0).sum()
                losses["lm"] = losses["lm"] + zero.sqrt().clamp(max=1)  # 0, and its derivative is 0/0
        return losses


@pytest.mark.parametrize(
    ("kind", "message", "blamed"),
    [
        ("loss", r"^step 6: loss lm is nan; no weight was changed", [0]),
        ("gradient", r"^step 6: the gradient norm is nan, with finite losses", [0, 1]),
    ],
)
def test_a_bad_number_stops_the_run_before_the_weights(kind, message, blamed, tmp_path):
    good, task = TinyTask(), Poisoned(kind)
    fit(good, TinyLoader(), config(max_steps=5, schedule="constant"), tmp_path / "good")
    run_dir = tmp_path / "bad"
    with pytest.raises(NonFiniteError, match=message) as caught:
        fit(task, TinyLoader(), config(schedule="constant", save_every=None), run_dir)
    assert str(run_dir) in str(caught.value) and isinstance(caught.value, UserError)
    for name, p in good.named_parameters():
        if p.requires_grad:
            assert torch.equal(p, task.get_parameter(name)), f"{name} is as after step 5"
    record = json.loads((run_dir / "bad_batch.json").read_text())
    assert record["step"] == 6
    assert [entry["micro_batch"] for entry in record["micro_batches"]] == blamed
    assert record["micro_batches"][0]["ids"] == [40, 41, 42, 43]
    assert record["micro_batches"][0]["losses"].keys() == {"itc", "lm"}
    assert len(lines(run_dir)) == 5


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


def test_a_forgotten_twin_is_found_at_the_first_save(tmp_path):
    task = TinyTask()
    task.twins = ()
    with pytest.raises(ValueError, match=r"twin\.weight: no gradient, yet changed"):
        fit(task, TinyLoader(), config(max_steps=2, warmup_steps=0), tmp_path)


def test_mistakes_are_named(tmp_path, capsys):
    with pytest.raises(ConfigError, match="loss_weights: itm: no such loss; the task gives itc, lm"):
        fit(TinyTask(), TinyLoader(), config(loss_weights={"itm": 1.0}), tmp_path)
    with pytest.raises(UserError, match="the loader ended after 5 micro-batches; 40 are needed"):
        fit(TinyTask(), TinyLoader(end=5), config(), tmp_path)
    changed = config()
    changed.lr = -1.0
    with pytest.raises(ConfigError, match="lr: got -1"):
        fit(TinyTask(), TinyLoader(), changed, tmp_path)
    with pytest.raises(UserError, match="TinyTask has no set_grad_checkpointing"):
        fit(TinyTask(), TinyLoader(), config(grad_checkpointing=True), tmp_path)
    with pytest.raises(UserError, match="position: trainable weights must be float32"):
        task = TinyTask()
        task.position.data = task.position.data.bfloat16()
        fit(task, TinyLoader(), config(), tmp_path)

    class Vector(TinyTask):
        def forward(self, batch):
            return {"itc": super().forward(batch)["itc"].expand(2)}

    with pytest.raises(ValueError, match=r"loss 'itc' has shape \[2\]"):
        fit(Vector(), TinyLoader(), config(), tmp_path)
    task = TinyTask()
    task.unused = nn.Linear(2, 2)
    capsys.readouterr()
    fit(task, TinyLoader(), config(max_steps=3), tmp_path / "unused")
    assert capsys.readouterr().err.count("no gradient reaches unused.weight, unused.bias") == 1


def test_the_rate_counts_the_samples_that_came(tmp_path, monkeypatch):
    """Batches within a token budget are of different sizes; a step takes one tick of this clock."""

    class Growing(TinyLoader):
        def batches(self, start: int):
            for number in itertools.count(start):
                yield from itertools.islice(TinyLoader(size=1 + number).batches(number), 1)

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    settings = config(batch_tokens=100, max_steps=4, log_every=2, save_every=None)
    fit(TinyTask(), Growing(), settings, tmp_path)
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["samples_per_s"] for line in written] == [(1 + 2 + 3 + 4) / 2, (5 + 6 + 7 + 8) / 2]


def test_gradient_checkpointing_is_passed_on(tmp_path):
    class Able(TinyTask):
        def set_grad_checkpointing(self, enabled: bool = True) -> None:
            self.is_checkpointing = enabled

    task = Able()
    fit(task, TinyLoader(), config(max_steps=3, grad_checkpointing=True), tmp_path)
    assert task.is_checkpointing
