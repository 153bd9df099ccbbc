"""BLIP-3's stages as tasks: next words behind pictures, in documents or conversations, and DPO on preferences.

Batches are laid out as `models.blip3` reads them: input_ids and labels [B, L] with a run of `<image>` ids for each
image, pixel_values [T, 3, S, S] of all tiles or tile_embeds [T, 1 + N, D], grids [I, 4], and where there are any:
position_ids [B, L] of packed rows, image_index of shared images, frames [I] of videos, condition_ids and condition_mask
[I, L'].
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from openblip.config import ConfigError, UserError
from openblip.models.blip3 import Blip3
from openblip.models.generation import GenerationConfig
from openblip.train import distributed
from openblip.train.objectives import dpo_loss, lm_loss, sequence_log_probs
from openblip.train.tasks import Batch, Losses, Task

_NOISE_STEPS = 1000  # of the diffusion whose steps `noise_step` counts


@dataclass
class Blip3TaskConfig:
    """The language model's loss. lm_lr_scale: factor on the learning rate of what is trained of the language model."""

    label_smoothing: float = 0.0
    lm_lr_scale: float = 1.0


@dataclass
class DpoTaskConfig:
    """DPO (Rafailov et al. 2023), and xGen-MM's second rejected answer.

    beta: how dear it is to leave the reference.
    noise_step: None, or the step of a diffusion of 1,000 whose noise is put over the pictures; what the model answers
        to those is rejected too, drawn anew at each step (POVID, Zhou et al. 2024; 500 there).
    max_new_tokens: length of that answer.
    """

    beta: float = 0.1
    noise_step: int | None = None
    max_new_tokens: int = 64
    lm_lr_scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ConfigError(f"beta: a number above 0, got {self.beta}")
        if self.noise_step is not None and not 1 <= self.noise_step <= _NOISE_STEPS:
            raise ConfigError(f"noise_step: 1 to {_NOISE_STEPS}, or null, got {self.noise_step}")


class Blip3Task(Task):
    """Next-word loss wherever a batch has labels: interleaved pre-training and instruction tuning (§4.2 to 4.4)."""

    model: Blip3

    def __init__(self, model: Blip3, config: Blip3TaskConfig) -> None:
        super().__init__()
        self.model, self.config = model, config

    def lr_scale(self, name: str) -> float:
        """Factor on the learning rate of a parameter of this task."""
        return self.config.lm_lr_scale if name.startswith("model.lm.model.") else 1.0

    def shard_units(self) -> list[nn.Module]:
        """The language model's layers. (Not the resampler's, which a rank without images does not run.)"""
        lm = self.model.lm.model
        names = set(lm._no_split_modules or ())
        return [module for module in lm.modules() if type(module).__name__ in names]

    def forward(self, batch: Batch) -> Losses:
        """{"lm": loss}, the mean over the labelled tokens of all ranks."""
        runs = vision_runs(self.model, batch)
        embeds = self.model.embed(batch["input_ids"], runs, batch.get("image_index"))
        logits, labels = self.model.labelled_logits(embeds, batch["labels"], batch.get("position_ids"))
        total, count = lm_loss(logits, labels, smoothing=self.config.label_smoothing)
        return {"lm": distributed.global_mean(total + _idle(self.model, batch), count)}


class DpoTask(Task):
    """DPO: rows 0 to B − 1 of a batch are the chosen answers, the other B the rejected, in the same order; they share
    images, by image_index.

    The reference is the model as the stage began: of what is trained, which with adapters is little, the task keeps a
    copy, with which the model is called for the reference's log-probabilities. (Never is the copy put into the weights
    themselves: autocast keeps what it made of a weight, and would go on with that.)
    """

    model: Blip3

    def __init__(self, model: Blip3, config: DpoTaskConfig, ends: Sequence[int] = ()) -> None:
        """ends: tokens that end an answer, beside those of the language model (`Blip3.ends`)."""
        super().__init__()
        self.model, self.config, self.ends = model, config, ends
        self.reference = nn.Module()
        for name, weight in model.named_parameters():
            if weight.requires_grad:  # a name of a buffer holds no dot
                self.reference.register_buffer(name.replace(".", "/"), weight.detach().clone())
        self.draws = torch.Generator()

    def lr_scale(self, name: str) -> float:
        """Factor on the learning rate of a parameter of this task."""
        return self.config.lm_lr_scale if name.startswith("model.lm.model.") else 1.0

    def shard_units(self) -> list[nn.Module]:
        """Raises ConfigError: the reference is a copy of whole weights, and adapters are small."""
        raise ConfigError(
            "shard: DPO keeps a whole copy of what it trains, so it does not go in shards; train adapters"
        )

    def begin_step(self, step: int) -> None:
        """Seed this step's noise."""
        device = self.model.lm.model.device
        self.draws = torch.Generator(device).manual_seed(self.config.seed * 1_000_003 + step)

    def forward(self, batch: Batch) -> Losses:
        """{"dpo": loss} and, with noise, {"dpo_noise"}: the loss against what was said of the noisy pictures."""
        pairs, seen = len(batch["labels"]) // 2, batch
        if self.model.config.freeze_vision and "pixel_values" in batch:  # policy and reference see the same
            seen = {**batch, "tile_embeds": self.model.encode_image(batch["pixel_values"])}
        gains = self._gains(seen)
        losses = {"dpo": dpo_loss(gains[:pairs], gains[pairs:], self.config.beta)}
        if self.config.noise_step is not None:  # prompts without a picture have nothing to be misled by
            shown = (batch["input_ids"][:pairs] == self.model.image_token_id).any(dim=1)
            total = gains.sum() * 0
            if shown.any():
                misled = self._gains({**seen, **self._misled(batch)})
                total = dpo_loss(gains[:pairs][shown], misled[shown], self.config.beta) * shown.sum()
            count = shown.sum().to(gains.dtype).clamp(min=1e-6)  # none at all: a loss of 0
            losses["dpo_noise"] = distributed.global_mean(total, count)
        losses["dpo"] = losses["dpo"] + _idle(self.model, batch)
        return losses

    def _gains(self, batch: Batch) -> Tensor:
        """log P of each row's answer under the policy, less that under the reference [R]."""
        answers = _Answers(self.model)  # made here: in the task, its weights would be there twice
        began = {f"model.{name.replace('/', '.')}": value for name, value in self.reference.named_buffers()}
        with torch.no_grad(), _evaluating(self.model):
            before = functional_call(answers, began, (batch,))
        return answers(batch) - before

    @torch.no_grad()
    def _misled(self, batch: Batch) -> Batch:
        """input_ids, labels and image_index: the prompts of the chosen answers, and what the model itself says to them
        when noise is laid over the pictures."""
        if "pixel_values" not in batch:
            raise UserError("noise_step: noise is put on pixels, so pictures cannot come as cached features")
        assert self.config.noise_step is not None
        pairs, pad = len(batch["labels"]) // 2, self.model.lm.pad_token_id
        ids = batch["input_ids"][:pairs]
        prompts = (batch["labels"][:pairs] != -100).int().argmax(dim=1)  # [B]: how long each is
        width = int(prompts.max())
        mask = torch.arange(width, device=ids.device) < prompts[:, None]
        index = batch["image_index"][
            : len(batch["image_index"]) // 2
        ]  # both answers to a prompt have its images
        noisy = {**batch, "pixel_values": diffused(batch["pixel_values"], self.config.noise_step, self.draws)}
        heads = ids[:, :width].masked_fill(~mask, pad)
        config = GenerationConfig(max_new_tokens=self.config.max_new_tokens)
        with _evaluating(self.model):
            embeds = self.model.embed(heads, vision_runs(self.model, noisy), index)
            said = self.model.generate(embeds, mask, config, ends=self.ends)
        rows = [
            torch.cat([row[:prompt], answer[:length]])
            for row, prompt, answer, length in zip(ids, prompts, said.sequences, said.lengths, strict=True)
        ]
        told = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        places = torch.arange(told.shape[1], device=ids.device)[None]
        ends = (prompts + said.lengths)[:, None]
        counted = (places >= prompts[:, None]) & (places < ends)
        labels = told.masked_fill(~counted, -100)
        return {"input_ids": told, "labels": labels, "image_index": index}


class _Answers(nn.Module):
    """log P of each row's answer, [R]: of a model, or with `functional_call` of one with other weights."""

    def __init__(self, model: Blip3) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        model, labels = self.model, batch["labels"]
        embeds = model.embed(batch["input_ids"], vision_runs(model, batch), batch.get("image_index"))
        logits, wanted = model.labelled_logits(embeds, labels)
        rows = (labels[:, 1:] != -100).nonzero()[:, 0]
        return sequence_log_probs(logits, wanted, rows, len(labels))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def vision_runs(model: Blip3, batch: Batch) -> list[Tensor]:
    """What the language model sees of each image of a batch; nothing if it has none."""
    if "grids" not in batch or not len(batch["grids"]):
        return []
    tiles = batch["tile_embeds"] if "tile_embeds" in batch else model.encode_image(batch["pixel_values"])
    frames = batch.get("frames")
    return model.vision_runs(
        tiles, batch["grids"], frames=None if frames is None else frames.tolist(),
        condition_ids=batch.get("condition_ids"), condition_mask=batch.get("condition_mask"),
    )  # fmt: skip


def diffused(pixel_values: Tensor, step: int, generator: torch.Generator) -> Tensor:
    """Pictures after `step` of 1,000 steps of a diffusion whose noise grows as a sigmoid from 1e-5 to 5e-3 (POVID)."""
    ramp = torch.linspace(-6, 6, _NOISE_STEPS, dtype=torch.float64).sigmoid()
    kept = float((1 - (ramp * (0.5e-2 - 1e-5) + 1e-5)).cumprod(dim=0)[step - 1])
    noise = torch.randn(
        pixel_values.shape, generator=generator, device=pixel_values.device, dtype=pixel_values.dtype
    )
    return kept**0.5 * pixel_values + (1 - kept) ** 0.5 * noise


def _idle(model: Blip3, batch: Batch) -> Tensor:
    """0, with the weights that this batch has no use for in its graph: every rank must have a gradient for them all."""
    grids, frames = batch.get("grids"), batch.get("frames")
    has_images = grids is not None and len(grids) > 0
    has_videos = has_images and frames is not None and bool((frames > 1).any())
    unused: list[nn.Module] = [] if has_images else [model.vision, model.resampler]
    unused += [model.temporal] if model.temporal is not None and not has_videos else []
    weights = [p for module in unused for p in module.parameters() if p.requires_grad]
    zero = torch.zeros((), device=batch["labels"].device)
    return sum((0.0 * p.sum() for p in weights), zero)
