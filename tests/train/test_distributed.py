"""Two gloo processes against one. Run by torchrun, this file is what the two do."""

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

from openblip.config import UserError
from openblip.train import checkpoint, distributed, log
from openblip.train.config import TrainConfig
from openblip.train.loop import NonFiniteError, fit

ROOT = Path(__file__).resolve().parents[2]
BATCH = 8


class PairTask(nn.Module):
    """Contrastive loss over the global batch and a queue, and a loss over unevenly spread tokens."""

    twins = ("twin",)

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0 if distributed.rank() == 0 else 77)  # DDP begins with the weights of rank 0
        self.image, self.text = nn.Linear(6, 8), nn.Linear(6, 8)
        self.head = nn.Linear(8, 5)
        self.temperature = nn.Parameter(torch.tensor(0.2))
        self.twin = nn.Linear(6, 8).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(16, 8), dim=-1))
        self.dropout = dropout
        self.stop_at: int | None = None
        self.poison: int | None = None

    def begin_step(self, step: int) -> None:
        with torch.no_grad():
            self.twin.weight.lerp_(self.text.weight, 0.2)
        if step == self.stop_at and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def forward(self, batch: dict) -> dict[str, torch.Tensor]:
        image = F.normalize(F.dropout(self.image(batch["x"]), self.dropout, self.training), dim=-1)
        text = F.normalize(self.text(batch["y"]), dim=-1)
        images, texts = distributed.all_gather(image), distributed.all_gather(text)
        teachers = distributed.all_gather(F.normalize(self.twin(batch["y"]), dim=-1))
        own = distributed.rank() * len(image) + torch.arange(len(image))
        i2t = image @ torch.cat([texts, self.queue]).T / self.temperature
        t2i = text @ images.T / self.temperature
        self.queue.copy_(torch.cat([teachers, self.queue])[:16])
        tokens = F.cross_entropy(self.head(image), batch["label"], reduction="none")
        if self.poison in batch["ids"]:
            tokens = tokens * float("nan")
        return {
            "itc": (F.cross_entropy(i2t, own) + F.cross_entropy(t2i, own)) / 2,
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
                "y": torch.randn(BATCH, 6, generator=generator),
                "label": torch.randint(5, (BATCH,), generator=generator),
                "counted": torch.tensor([1, 1, 1, 1, 0, 0, 0, 1]),  # four tokens against one
                "ids": [start * BATCH + i for i in range(BATCH)],
            }
            yield {key: value[rows] for key, value in batch.items()}
            start += 1


def config(**changes) -> TrainConfig:
    settings = {
        "max_steps": 6,
        "batch_size": BATCH,
        "accumulate": 2,
        "lr": 1e-2,
        "clip_norm": 1.0,
        "ema_decay": 0.9,
        "log_every": 1,
        "save_every": None,
    }
    return TrainConfig(**settings | changes)


def evaluate(task: nn.Module, step: int) -> dict[str, float]:
    """Measured by all ranks together, as an evaluation over shares of the data would be."""
    return {"own_rank": distributed.mean_over_ranks(torch.tensor(float(distributed.rank()))).item()}


def two_ranks(folder: Path) -> dict:
    """What each of two processes does and reports."""
    found: dict = {}
    rank = distributed.rank()
    rows = torch.arange(6.0).reshape(2, 3).T * (rank + 1)  # not contiguous
    rows.requires_grad_()
    gathered = distributed.all_gather(rows)
    found["gathered"] = gathered.tolist()
    (gathered * torch.arange(6.0)[:, None] * 10**rank).sum().backward()
    found["gathered_grad"] = rows.grad.tolist()
    found["gathered_ints"] = distributed.all_gather(torch.tensor([rank])).tolist()
    found["objects"] = distributed.gather_objects({"rank": rank})
    found["helpers"] = [rank, distributed.world_size(), distributed.is_main()]

    fit(PairTask(), Shares(), config(), folder / "two", evaluate=evaluate)
    fit(PairTask(dropout=0.3), Shares(), config(), folder / "straight")
    stopped = PairTask(dropout=0.3)
    stopped.stop_at = 2
    result = fit(stopped, Shares(), config(), folder / "resumed")
    found["stopped"] = [result.step, result.interrupted]
    resumed = PairTask(dropout=0.3)
    torch.nn.init.zeros_(resumed.image.weight)
    fit(resumed, Shares(), config(), folder / "resumed")

    poisoned = PairTask()
    poisoned.poison = 3 * BATCH + 5  # a row of rank 1
    found["errors"] = []
    unused = PairTask()
    unused.nobody = nn.Linear(2, 2)
    for task, settings in ((poisoned, config()), (unused, config()), (PairTask(), config(batch_size=7))):
        try:
            fit(task, Shares(), settings, folder / "errors")
        except UserError as error:
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
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)], done.stderr


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_gathering_and_its_gradient(ranks):
    _, found, _ = ranks
    first = torch.arange(6.0).reshape(2, 3).T
    expected = torch.cat([first, first * 2])
    for rank in (0, 1):
        assert found[rank]["gathered"] == expected.tolist()
        # Row i is weighted by i on rank 0 and 10 i on rank 1; what comes back is the sum: 11 i.
        own = torch.arange(6.0)[:, None].expand(6, 2)[3 * rank : 3 * rank + 3] * 11
        assert found[rank]["gathered_grad"] == own.tolist()
        assert found[rank]["gathered_ints"] == [0, 1]
        assert found[rank]["objects"] == [{"rank": 0}, {"rank": 1}]
        assert found[rank]["helpers"] == [rank, 2, rank == 0]


def test_two_processes_train_as_one(ranks, tmp_path):
    folder, _, _ = ranks
    task = PairTask()
    result = fit(task, Shares(), config(), tmp_path, evaluate=evaluate)
    one, two = lines(tmp_path), lines(folder / "two")
    assert [line["step"] for line in two] == [1, 2, 3, 4, 5, 6, 6]
    for a, b in zip(one[:-1], two[:-1]):
        assert a["losses"] == pytest.approx(b["losses"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], abs=1e-5)
    assert one[0]["losses"]["itc"] - one[-2]["losses"]["itc"] > 0.1, "it learned something"
    assert two[-1]["eval"] == {"own_rank": 0.5}
    weights = load_file(checkpoint.latest(folder / "two") / "model.safetensors")
    assert weights.keys() == task.state_dict().keys()
    for name, tensor in task.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-5, rtol=0)
    averaged = load_file(checkpoint.latest(folder / "two") / "ema.safetensors")
    for name, tensor in result.ema.weights.items():
        torch.testing.assert_close(averaged[name], tensor, atol=1e-5, rtol=0)


def test_a_signal_to_one_rank_stops_both_and_resuming_is_bitwise(ranks):
    folder, found, _ = ranks
    assert [rank["stopped"] for rank in found] == [[3, True], [3, True]]
    straight, resumed = (checkpoint.latest(folder / name) for name in ("straight", "resumed"))
    assert straight.name == resumed.name == "step-00000006"
    for part in ("model", "optimizer", "ema", "rng"):
        a, b = (load_file(path / f"{part}.safetensors") for path in (straight, resumed))
        assert a.keys() == b.keys()
        assert [name for name in a if not torch.equal(a[name], b[name])] == []
    rng = load_file(straight / "rng.safetensors")
    assert not torch.equal(rng["0.torch"], rng["1.torch"]), "ranks draw different dropout masks"
    plain = load_file(checkpoint.latest(folder / "two") / "model.safetensors")
    assert not torch.equal(plain["image.weight"], load_file(straight / "model.safetensors")["image.weight"])


def test_another_number_of_processes_goes_on_and_says_so(ranks, tmp_path, capsys):
    folder, _, _ = ranks
    newest = checkpoint.latest(folder / "straight")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / newest.name).symlink_to(newest)
    result = fit(PairTask(dropout=0.3), Shares(), config(max_steps=7), tmp_path)
    assert result.step == 7
    assert "2 processes before, 1 now: the random states begin anew" in capsys.readouterr().err


def test_an_error_on_one_rank_is_an_error_on_both(ranks):
    folder, found, _ = ranks
    for rank in (0, 1):
        (bad, bad_text), (unused, unused_text), (batch, batch_text) = found[rank]["errors"]
        assert bad == NonFiniteError.__name__ and "step 2: loss lm is nan" in bad_text
        assert (unused, batch) == ("UserError", "UserError")
        assert "no gradient reaches nobody.weight, nobody.bias" in unused_text
        assert "batch_size 7 cannot be shared equally by 2 processes" in batch_text
    (entry,) = json.loads((folder / "errors" / "bad_batch.json").read_text())["micro_batches"]
    assert (entry["rank"], entry["micro_batch"], entry["ids"]) == (1, 1, [28, 29, 30, 31])


def test_only_rank_0_speaks_and_nothing_is_deprecated(ranks):
    _, _, told = ranks
    assert told.count("resumed from") == 1
    assert "FutureWarning" not in told and "deprecated" not in told


def test_alone_nothing_needs_a_process_group():
    rows = torch.ones(2, 3, requires_grad=True)
    task = nn.Linear(2, 2)
    assert distributed.init_from_env().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.all_gather(rows) is rows and distributed.wrap(task) is task
    assert distributed.gather_objects("x") == ["x"]
    assert distributed.global_mean(torch.tensor(6.0), torch.tensor(4)) == 1.5
    assert distributed.mean_over_ranks(rows).tolist() == rows.tolist()
    assert not distributed.mean_over_ranks(rows).requires_grad
    with distributed.no_sync(task):
        distributed.barrier()
    distributed.shutdown()


if __name__ == "__main__":
    distributed.init_from_env()
    log.draw_curves = lambda metrics, picture: None  # pictures take longer than all the training here
    report = two_ranks(Path(sys.argv[1]))
    (Path(sys.argv[1]) / f"rank{distributed.rank()}.json").write_text(json.dumps(report))
    distributed.shutdown()
