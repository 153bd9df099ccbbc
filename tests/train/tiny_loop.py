"""A task with all that makes resuming hard, and what else the tests of the loop share: loader, settings, log."""

import json
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from openblip.train.config import TrainConfig

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


def lines(run_dir) -> list[dict]:
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for line in found:
        line.pop("samples_per_s", None)
    return found
