"""Two gloo processes that each hold half of a task, against one. Run by torchrun, this file is what the two do."""

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor

from openblip.config import UserError
from openblip.train import checkpoint, distributed, log
from openblip.train.config import TrainConfig
from openblip.train.loop import NonFiniteError, fit

ROOT = Path(__file__).resolve().parents[2]
BATCH, STEPS, WORDS = 8, 6, 5


def held(parameters) -> int:
    """Numbers this rank holds of some tensors."""
    return sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in parameters)


class Layer(nn.Module):
    """A unit: frozen but for an adapter and a bias of odd sizes."""

    def __init__(self, task: "Deep") -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)
        self.linear.weight.requires_grad_(False)
        self.down, self.up = nn.Linear(8, 3, bias=False), nn.Linear(3, 8)
        self.watch = task.watch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.watch(self)
        x = self.norm(x)
        return F.gelu(self.linear(x) + self.up(self.down(x)))


class Deep(nn.Module):
    """A frozen tower, layers that are units, a tied head, a twin, a queue; smaller and larger than two ranks."""

    twins = ("twin",)

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0 if distributed.rank() == 0 else 77)  # all begin with the weights of rank 0
        self.tower = nn.Linear(6, 8).requires_grad_(False)
        if distributed.rank():
            self.tower.load_state_dict({"weight": torch.zeros(8, 6), "bias": torch.zeros(8)})
        self.words, self.head = nn.Embedding(WORDS, 8), nn.Linear(8, WORDS, bias=False)
        self.head.weight = self.words.weight
        self.layers = nn.ModuleList(Layer(self) for _ in range(3))
        self.gain = nn.Parameter(torch.tensor([1.2]))  # rank 1 holds nothing of it
        self.scale = nn.Parameter(torch.tensor(0.7), requires_grad=False)
        self.twin = nn.Linear(8, 8).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(16, 8), dim=-1))
        self.register_buffer("is_full", torch.tensor([True, False]))
        self.dropout = dropout
        self.stop_at: int | None = None
        self.poison: int | None = None
        self.seen: dict[str, int] = {}

    def shard_units(self) -> list[nn.Module]:
        return list(self.layers)

    def watch(self, layer: nn.Module) -> None:
        if self.training:
            self.seen["in_layer"] = held(p for other in self.layers for p in other.parameters())

    def begin_step(self, step: int) -> None:
        self.seen["between_steps"] = held(self.parameters())
        with torch.no_grad():
            self.twin.weight.lerp_(self.layers[1].linear.weight, 0.1)
        if step == self.stop_at and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def hidden(self, batch: dict) -> torch.Tensor:
        x = self.tower(batch["x"]) * self.scale + self.words(batch["label"])
        for layer in self.layers:
            x = F.dropout(layer(x), self.dropout, self.training)
        return x

    def forward(self, batch: dict) -> dict[str, torch.Tensor]:
        x = self.hidden(batch)
        image, teacher = F.normalize(x, dim=-1), F.normalize(self.twin(x.detach()), dim=-1)
        teachers = distributed.all_gather(teacher)
        own = distributed.rank() * len(x) + torch.arange(len(x))
        logits = 5 * image @ torch.cat([teachers, distributed.all_gather(image), self.queue]).T
        self.queue.copy_(torch.cat([teachers, self.queue])[:16])
        tokens = F.cross_entropy(self.gain * self.head(x), (batch["label"] + 1) % WORDS, reduction="none")
        if self.poison in batch["ids"]:
            tokens = tokens * float("nan")
        return {
            "itc": F.cross_entropy(logits, own),
            "lm": distributed.global_mean((tokens * batch["counted"]).sum(), batch["counted"].sum()),
        }


class Shares:
    """Each rank's rows of the same global batches."""

    def batches(self, start: int):
        share = BATCH // distributed.world_size()
        rows = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
        while True:
            generator = torch.Generator().manual_seed(start)
            batch = {
                "x": torch.randn(BATCH, 6, generator=generator),
                "label": torch.randint(WORDS, (BATCH,), generator=generator),
                "counted": torch.tensor([1, 1, 1, 1, 0, 0, 0, 1]),
                "ids": [start * BATCH + i for i in range(BATCH)],
            }
            yield {key: value[rows] for key, value in batch.items()}
            start += 1


def config(**changes) -> TrainConfig:
    settings = {"max_steps": STEPS, "batch_size": BATCH, "accumulate": 2, "lr": 1e-2, "clip_norm": 0.1}
    settings |= {"ema_decay": 0.9, "log_every": 1, "save_every": None, "eval_every": 2}
    return TrainConfig(**settings | changes)


def evaluate(task: Deep, step: int) -> dict[str, float]:
    """What calls layers from outside `forward`, and on rank 0 more often: no rank may wait for another."""
    batch = next(Shares.batches(Shares(), 1000))
    for _ in range(3 * (1 - distributed.rank())):
        task.hidden(batch)
    one = {key: value[:1] for key, value in batch.items()} | {
        "label": torch.tensor([1]),
        "x": torch.ones(1, 6),
    }
    return {"hidden": task.hidden(one).square().mean().item()}


def sharded_then(folder: Path, first: bool, second: bool, **changes) -> Deep:
    """Train to step 3 and on to the end, each with or without shards."""
    stopped = Deep(changes.get("dropout", 0.0))
    stopped.stop_at = 2
    result = fit(stopped, Shares(), config(shard=first), folder, evaluate=evaluate)
    assert (result.step, result.interrupted) == (3, True)
    task = Deep(changes.get("dropout", 0.0))
    nn.init.zeros_(task.words.weight)
    fit(task, Shares(), config(shard=second), folder, evaluate=evaluate)
    return task


def two_ranks(folder: Path) -> dict:
    """What each of two processes does and reports."""
    found: dict = {}
    sizes: list[int] = []
    step = torch.optim.AdamW.step

    def measured(self, *args):
        sizes.append(held(p.grad for group in self.param_groups for p in group["params"]))
        step(self, *args)
        sizes.append(held(t for state in self.state.values() for t in state.values() if t.ndim))

    torch.optim.AdamW.step = measured
    task = sharded_then(folder / "shards", True, True)
    torch.optim.AdamW.step = step
    found["seen"], found["grads"], found["moments"] = task.seen, sizes[-2], sizes[-1]
    found["is_plain"] = type(task) is Deep and not any(isinstance(p, DTensor) for p in task.parameters())
    found["tied"] = task.head.weight is task.words.weight
    found["hooks"] = sum(len(v) for m in task.modules() for n, v in vars(m).items() if n.endswith("_hooks"))
    torch.save(
        {n: t.clone() for n, t in copy.deepcopy(task).state_dict().items()},
        folder / f"end{distributed.rank()}.pt",
    )
    sharded_then(folder / "shards_first", True, False)
    sharded_then(folder / "shards_last", False, True)
    sharded_then(folder / "dropped_resumed", True, True, dropout=0.3)
    again = Deep(0.3)
    fit(again, Shares(), config(shard=True), folder / "dropped", evaluate=evaluate)
    fit(again, Shares(), config(shard=True, max_steps=1, precision="bf16"), folder / "twice")
    found["bf16"] = fit(Deep(), Shares(), config(shard=True, precision="bf16"), folder / "bf16").losses

    found["errors"] = []
    poisoned, scalar, stranger, unused = Deep(), Deep(), Deep(), Deep()
    poisoned.poison = 3 * BATCH + 5  # a row of rank 1
    scalar.scale.requires_grad_(True)
    stranger.shard_units = lambda: [nn.Linear(2, 2)]
    unused.nobody = nn.Linear(2, 2)
    for number, task in enumerate((poisoned, scalar, stranger, unused)):
        try:
            fit(task, Shares(), config(shard=True), folder / f"error{number}")
        except ValueError as error:
            found["errors"].append([type(error).__name__, str(error)])
        distributed.barrier()
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder in which two processes have trained, and what each of them reported."""
    folder = tmp_path_factory.mktemp("ranks")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, __file__, str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "FutureWarning" not in done.stderr and "deprecated" not in done.stderr
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same training by one process, at one go."""
    folder = tmp_path_factory.mktemp("alone")
    task = Deep()
    return folder, task, fit(task, Shares(), config(shard=True), folder, evaluate=evaluate)


def lines(run_dir: Path, kind: str) -> list[dict]:
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if kind in line]


def stored(run_dir: Path, part: str) -> dict[str, torch.Tensor]:
    newest = checkpoint.latest(run_dir)
    assert newest.name == f"step-{STEPS:08d}"
    return load_file(newest / f"{part}.safetensors")


@pytest.mark.parametrize("run", ["shards", "shards_first", "shards_last"])
def test_shards_train_as_one_process_through_a_resume_with_or_without_them(run, ranks, alone):
    folder, _ = ranks
    one = lines(alone[0], "losses")
    two = lines(folder / run, "losses")
    assert [line["step"] for line in two] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(one, two):
        assert a["losses"] == pytest.approx(b["losses"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
        assert a["grad_norm"] > 0.1, "it was clipped"
    assert one[0]["loss"] - one[-1]["loss"] > 0.3, "it learned something"
    for a, b in zip(lines(alone[0], "eval"), lines(folder / run, "eval"), strict=True):
        assert a["eval"] == pytest.approx(b["eval"], abs=1e-5)
    for part in ("model", "optimizer", "ema"):
        a, b = stored(alone[0], part), stored(folder / run, part)
        assert a.keys() == b.keys() and {t.dtype for t in a.values()} == {t.dtype for t in b.values()}
        for name in a:
            torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=0, msg=f"{part} {name}")


def test_the_task_is_whole_and_plain_again_on_both_ranks(ranks, alone):
    folder, found = ranks
    ends = [torch.load(folder / f"end{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, tensor in alone[1].state_dict().items():
        assert torch.equal(ends[0][name], ends[1][name]), name
        torch.testing.assert_close(ends[0][name], tensor, atol=1e-5, rtol=0)
    for rank in found:
        assert (rank["is_plain"], rank["tied"], rank["hooks"]) == (True, True, 0)


def test_each_rank_holds_half(ranks):
    _, (first, second) = ranks
    task = Deep()
    layer, layers = held(task.layers[0].parameters()), held(task.layers.parameters())
    trained = held(p for p in task.parameters() if p.requires_grad)
    seen = [rank["seen"] for rank in (first, second)]
    assert (
        sum(rank["between_steps"] for rank in seen) == held(task.parameters()) + 1
    )  # a number has no halves
    assert max(rank["between_steps"] for rank in seen) < 0.55 * held(task.parameters())
    # Only the layer that runs is whole.
    assert sum(rank["in_layer"] for rank in seen) == layers + layer
    assert first["grads"] + second["grads"] == trained
    assert first["moments"] + second["moments"] == 2 * trained
    assert max(first["moments"], second["moments"]) < 0.6 * 2 * trained


def test_resuming_in_shards_is_bitwise(ranks):
    folder, _ = ranks
    for part in ("model", "optimizer", "ema", "rng"):
        a, b = stored(folder / "dropped", part), stored(folder / "dropped_resumed", part)
        assert a.keys() == b.keys() and [name for name in a if not torch.equal(a[name], b[name])] == []
    plain = stored(folder / "shards", "model")["gain"]
    assert not torch.equal(plain, stored(folder / "dropped", "model")["gain"]), "dropout was on"


def test_one_process_goes_on_from_shards(ranks, alone, tmp_path):
    folder, _ = ranks
    newest = checkpoint.latest(folder / "shards")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / newest.name).symlink_to(newest)
    task, straight = Deep(), Deep()
    result = fit(task, Shares(), config(max_steps=7), tmp_path, evaluate=evaluate)
    assert result.step == 7
    (tmp_path / "straight" / "checkpoints").mkdir(parents=True)
    (tmp_path / "straight" / "checkpoints" / newest.name).symlink_to(checkpoint.latest(alone[0]))
    fit(straight, Shares(), config(max_steps=7), tmp_path / "straight", evaluate=evaluate)
    for name, tensor in straight.state_dict().items():
        torch.testing.assert_close(task.state_dict()[name], tensor, atol=1e-5, rtol=0)


def test_half_precision_and_mistakes(ranks, alone):
    _, found = ranks
    for rank in found:
        assert rank["bf16"] == pytest.approx(alone[2].losses, rel=0.03) and rank["bf16"] != alone[2].losses
        (bad, bad_text), scalar, stranger, unused = rank["errors"]
        assert bad == NonFiniteError.__name__ and "step 2: loss lm is nan" in bad_text
        assert scalar[0] == UserError.__name__ and "shard: scale: a trainable weight must have" in scalar[1]
        assert stranger == ["ValueError", "shard_units: Linear is no part of the task"]
        assert unused[0] == UserError.__name__ and "no gradient reaches nobody.weight" in unused[1]


if __name__ == "__main__":
    distributed.init_from_env()
    log.draw_curves = lambda metrics, picture: None  # pictures take longer than all the training here
    report = two_ranks(Path(sys.argv[1]))
    (Path(sys.argv[1]) / f"rank{distributed.rank()}.json").write_text(json.dumps(report))
    distributed.shutdown()
