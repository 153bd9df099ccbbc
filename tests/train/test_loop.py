"""What one step does, how it is evaluated and counted, and which mistakes stop a run."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from openblip.config import ConfigError, UserError
from openblip.train import loop, rng
from openblip.train.loop import NonFiniteError, fit
from tests.train.tiny_loop import STEPS, TinyLoader, TinyTask, config, lines

pytestmark = pytest.mark.usefixtures("no_pictures")


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
