"""How to train: the settings of the loop, and which are impossible. Imports no torch: recipes stay cheap."""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from openblip.config import ConfigError

Schedule = Literal["cosine", "linear", "constant", "step_decay"]
Precision = Literal["fp32", "bf16"]


@dataclass
class TrainConfig:
    """How to train. An impossible value raises ConfigError, which names the field and what is right."""

    max_steps: int = 1000  # optimizer steps
    batch_size: int = 64  # samples of one micro-batch, all ranks together
    batch_tokens: int | None = None  # of one micro-batch, padding included, in place of `batch_size` samples
    accumulate: int = 1  # micro-batches per optimizer step
    lr: float = 3e-4
    min_lr: float = 0.0
    warmup_steps: int = 0
    warmup_lr: float = 1e-6  # where the warm-up begins
    schedule: Schedule = "cosine"  # see optim.learning_rate
    steps_per_epoch: int | None = None  # for "step_decay"
    decay_rate: float = 0.9  # for "step_decay"
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_norm: float | None = 1.0  # of the whole gradient; None: no clipping
    precision: Precision = "fp32"  # of the forward pass; weights are float32 in either
    grad_checkpointing: bool = False
    shard: bool = False  # each process holds its part of weights, gradients and moments: train/shard.py
    loss_weights: dict[str, float] = field(default_factory=dict)  # by loss name; 1 where nothing is said
    ema_decay: float | None = None  # None: no averaged twin of the weights
    seed: int = 0
    log_every: int = 10  # optimizer steps, as the next two
    eval_every: int | None = None  # None: at the end only
    save_every: int | None = 500  # None: at the end only
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        def check(name: str, is_right: bool, right: str) -> None:
            if not is_right:
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, wanted {right}")

        for name in ("max_steps", "batch_size", "accumulate", "log_every", "keep_checkpoints"):
            check(name, getattr(self, name) >= 1, "1 or more")
        for name in ("batch_tokens", "steps_per_epoch", "eval_every", "save_every"):
            check(name, getattr(self, name) is None or getattr(self, name) >= 1, "1 or more, or null")
        check("lr", 0 < self.lr < math.inf, "a number above 0")
        check("min_lr", 0 <= self.min_lr <= self.lr, f"0 to lr ({self.lr})")
        check("warmup_steps", 0 <= self.warmup_steps <= self.max_steps, f"0 to max_steps ({self.max_steps})")
        if self.warmup_steps:
            check("warmup_lr", 0 <= self.warmup_lr <= self.lr, f"0 to lr ({self.lr})")
        check("schedule", self.schedule in get_args(Schedule), f"one of {', '.join(get_args(Schedule))}")
        if self.schedule == "step_decay":
            check("steps_per_epoch", self.steps_per_epoch is not None, "a number: step_decay counts epochs")
        check("decay_rate", 0 < self.decay_rate <= 1, "above 0 and at most 1")
        check("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more")
        check("betas", len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two numbers in [0, 1)")
        check("eps", 0 < self.eps < math.inf, "a number above 0")
        check("clip_norm", self.clip_norm is None or 0 < self.clip_norm < math.inf, "above 0, or null")
        check("precision", self.precision in get_args(Precision), f"one of {', '.join(get_args(Precision))}")
        check("ema_decay", self.ema_decay is None or 0 < self.ema_decay < 1, "between 0 and 1, or null")
        check("seed", self.seed >= 0, "0 or more")
        check(
            "loss_weights", all(0 <= w < math.inf for w in self.loss_weights.values()), "weights of 0 or more"
        )
