"""One thin module per training stage: `task(batch)` gives named losses, and the loop needs to know no more.

What a loss needs beyond the model (momentum twin, queue, ramp, random draws) lives here. Batches hold
`pixel_values` [B, 3, S, S], or `image_embeds` [B, N, D] when a frozen tower's features are cached.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openblip.config import ConfigError
from openblip.models.blip import Blip
from openblip.models.blip_nlvr import BlipNlvr
from openblip.models.blip_vqa import BlipVqa
from openblip.models.clip import MAX_LOGIT_SCALE, Clip
from openblip.train import distributed
from openblip.train.matching import matching_loss
from openblip.train.objectives import (
    clip_loss,
    labelled_positions,
    lm_loss,
    momentum_update_,
    next_token_labels,
    positive_pairs,
    soft_cross_entropy,
    soft_targets,
    vqa_loss,
    wide,
)

Batch = dict[str, Any]
Losses = dict[str, Tensor]


class Task(nn.Module):
    """A training stage. `begin_step(step)` is called once per optimizer step, before its micro-batches."""

    model: Any

    def begin_step(self, step: int) -> None:
        """Whatever moves with the step and not with the batch."""

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Trade time for memory in the model."""
        self.model.set_grad_checkpointing(enabled)

    def image_embeds(self, batch: Batch) -> Tensor:
        """[B, N, D]: cached features, or the vision tower's output."""
        return (
            batch["image_embeds"]
            if "image_embeds" in batch
            else self.model.encode_image(batch["pixel_values"])
        )


class ClipTask(Task):
    """CLIP: symmetric InfoNCE over the global batch."""

    model: Clip

    def __init__(self, model: Clip) -> None:
        super().__init__()
        self.model = model

    def begin_step(self, step: int) -> None:
        """Clamp the scale: beyond the cap it would have no gradient, and never come back."""
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)

    def forward(self, batch: Batch) -> Losses:
        """{"itc": loss}."""
        images = self.model.image_features(self.image_embeds(batch))
        texts = self.model.text_features(batch["input_ids"], batch["attention_mask"])
        images, texts = distributed.all_gather(images), distributed.all_gather(texts)
        return {"itc": clip_loss(images, texts, self.model.clamped_scale())}


@dataclass
class BlipTaskConfig:
    """Pre-training (BLIP §3.2) and, with `match_ids` and no decoder in the model, retrieval fine-tuning.

    alpha_ramp_steps: soft targets grow linearly to `alpha` (2 epochs in pre-training, 1 in fine-tuning).
    match_ids: pairs of one image are positives of each other, in the batch and in the queue; otherwise only
        the pair itself is, as in the paper's pre-training.
    negatives: draw hard negatives from the global batch, or from this rank's part of it.
    negative_floor: added to the drawing weights (1e-4 in pre-training, 0 in fine-tuning).
    text_lr_scale: factor on the learning rate of the text transformer but its cross-attention, for text
        weights that come pretrained and meet fresh heads.
    """

    queue_size: int = 57600
    momentum: float = 0.995
    alpha: float = 0.4
    alpha_ramp_steps: int = 0
    match_ids: bool = False
    negatives: str = "global"
    negative_floor: float = 1e-4
    label_smoothing: float = 0.1
    text_lr_scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.negatives not in ("global", "local"):
            raise ConfigError(f'negatives must be "global" or "local", not {self.negatives!r}')
        if not 0 <= self.momentum <= 1 or not 0 <= self.alpha <= 1:
            raise ConfigError("momentum and alpha lie between 0 and 1")


class MomentumTwin(nn.Module):
    """Slowly moving copies of what ITC looks at: vision tower (unless frozen), text encoder, both projections."""

    def __init__(self, model: Blip) -> None:
        super().__init__()
        self.vision = None if model.config.freeze_vision else copy.deepcopy(model.vision)
        self.text_encoder = copy.deepcopy(model.text_encoder)
        for layer in self.text_encoder.layers:
            layer._modules["cross_attention"] = None  # ITC never looks at the image through the text
        self.vision_proj, self.text_proj = copy.deepcopy(model.vision_proj), copy.deepcopy(model.text_proj)
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "MomentumTwin":
        """The twin is a teacher: no dropout, whatever the student does."""
        return super().train(False)

    def pairs(self, model: Blip) -> tuple[list[Tensor], list[Tensor]]:
        """(twin parameters, the parameters of `model` they follow), in the same order."""
        online = dict(model.named_parameters(remove_duplicate=False))
        named = list(self.named_parameters())
        return [value for _, value in named], [online[name] for name, _ in named]

    @torch.no_grad()
    def features(self, batch: Batch, text_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(image_features, text_features) [B, P], normalised."""
        embeds = self.vision(batch["pixel_values"]) if self.vision is not None else batch["image_embeds"]
        states = self.text_encoder(text_ids, batch["attention_mask"], packed=True)
        images, texts = self.vision_proj(embeds[:, 0]), self.text_proj(states[:, 0])
        return F.normalize(images, dim=-1), F.normalize(texts, dim=-1)


class FeatureQueue(nn.Module):
    """The last Q momentum features of images and texts, with their image ids (−100: nothing yet)."""

    images: Tensor
    texts: Tensor
    ids: Tensor
    pointer: Tensor

    def __init__(self, size: int, width: int, *, seed: int = 0) -> None:
        super().__init__()
        noise = torch.randn(2, size, width, generator=torch.Generator().manual_seed(seed))
        images, texts = F.normalize(noise, dim=-1)
        self.register_buffer("images", images)  # [Q, P]
        self.register_buffer("texts", texts)
        self.register_buffer("ids", torch.full((size,), -100))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def push_(self, images: Tensor, texts: Tensor, ids: Tensor) -> None:
        """Replace the oldest entries by features [G, P] and ids [G] of the global batch; of one that is larger
        than the queue, the last Q stay.
        """
        size, dtype = len(self.ids), self.images.dtype
        last = slice(max(len(ids) - size, 0), None)
        slots = (self.pointer + torch.arange(len(ids), device=ids.device)[last]) % max(size, 1)
        self.images[slots], self.texts[slots] = images[last].to(dtype), texts[last].to(dtype)
        self.ids[slots] = ids[last]
        self.pointer.copy_((self.pointer + len(ids)) % max(size, 1))


class BlipTask(Task):
    """BLIP's objectives over one image memory: ITC with momentum and queue, ITM with hard negatives, LM.

    A model without a decoder is fine-tuned for retrieval (ITC + ITM).
    """

    twins = ("twin",)  # moves without gradients, so checkpoints must hold it

    model: Blip

    def __init__(self, model: Blip, config: BlipTaskConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.twin = MomentumTwin(model)
        self.queue = FeatureQueue(config.queue_size, model.config.projection_dim, seed=config.seed)
        self.alpha = config.alpha
        self.draws = torch.Generator()

    def lr_scale(self, name: str) -> float:
        """Factor on the learning rate of a parameter of this task."""
        is_text = (
            name.startswith(("model.text_encoder.", "model.text_decoder.")) and "cross_attention" not in name
        )
        return self.config.text_lr_scale if is_text else 1.0

    def begin_step(self, step: int) -> None:
        """Move the twin, clamp the temperature, set the ramp and seed this step's draws."""
        momentum_update_(*self.twin.pairs(self.model), self.config.momentum)
        with torch.no_grad():
            self.model.temperature.clamp_(0.001, 0.5)
        ramp = self.config.alpha_ramp_steps
        self.alpha = self.config.alpha * (min(1.0, step / ramp) if ramp else 1.0)
        self.draws = torch.Generator(self.queue.ids.device)  # a generator draws on its own device only
        self.draws.manual_seed(self.config.seed * 1_000_003 + step)

    def forward(self, batch: Batch) -> Losses:
        """{"itc", "itm"} and, with a decoder, {"lm"}; equal weights in the papers."""
        model = self.model
        ids, mask = batch["input_ids"], batch["attention_mask"]
        embeds = self.image_embeds(batch)
        images, texts = model.image_features(embeds), model.text_features(ids, mask)
        losses, sim_i2t, sim_t2i = self._itc({**batch, "image_embeds": embeds}, images, texts)

        memory = model.encoder_memory(embeds)
        losses["itm"] = matching_loss(
            model, memory, embeds, ids, mask, (sim_i2t, sim_t2i), batch["image_ids"],
            negatives=self.config.negatives, floor=self.config.negative_floor, generator=self.draws,
        )  # fmt: skip
        if model.config.decoder:
            labels = next_token_labels(ids, mask)
            wanted, labels = labelled_positions(labels)
            if "cross_attention" not in model.config.share:
                memory = model.decoder_memory(embeds)
            states = model.lm_states(memory, ids, mask)[:, :-1][wanted]
            total = lm_loss(model.lm_logits(states), labels, smoothing=self.config.label_smoothing)
            losses["lm"] = distributed.global_mean(*total)
        return losses

    def _itc(self, batch: Batch, images: Tensor, texts: Tensor) -> tuple[Losses, Tensor, Tensor]:
        """ITC loss, and the similarities to the global batch [B, G] both ways."""
        text_ids = batch["input_ids"].clone()
        text_ids[:, 0] = self.model.config.text.cls_token_id
        twin_images, twin_texts = self.twin.features(batch, text_ids)
        all_images, all_texts = distributed.all_gather(twin_images), distributed.all_gather(twin_texts)
        global_ids = distributed.all_gather(batch["image_ids"])

        image_candidates = torch.cat([all_images, self.queue.images.to(all_images.dtype)])  # [M, P]
        text_candidates = torch.cat([all_texts, self.queue.texts.to(all_texts.dtype)])
        if self.config.match_ids:
            positives = positive_pairs(batch["image_ids"], torch.cat([global_ids, self.queue.ids]))
        else:
            first = distributed.rank() * len(texts)
            own = first + torch.arange(len(texts), device=texts.device)
            positives = F.one_hot(own, len(text_candidates)).bool()

        temperature = self.model.temperature
        with torch.no_grad():
            targets_i2t = soft_targets(twin_images @ text_candidates.T / temperature, positives, self.alpha)
            targets_t2i = soft_targets(twin_texts @ image_candidates.T / temperature, positives, self.alpha)
        sim_i2t = images @ text_candidates.T / temperature
        sim_t2i = texts @ image_candidates.T / temperature
        loss = (soft_cross_entropy(sim_i2t, targets_i2t) + soft_cross_entropy(sim_t2i, targets_t2i)) / 2
        if self.training:
            self.queue.push_(all_images, all_texts, global_ids)
        size = len(global_ids)
        return {"itc": loss}, sim_i2t[:, :size], sim_t2i[:, :size]


class CaptionTask(Task):
    """Captioning fine-tune: LM loss on the labelled tokens (the prompt is masked by the collator)."""

    model: Blip

    def __init__(self, model: Blip, *, label_smoothing: float = 0.1) -> None:
        super().__init__()
        self.model, self.label_smoothing = model, label_smoothing

    def forward(self, batch: Batch) -> Losses:
        """{"lm": loss}."""
        memory = self.model.decoder_memory(self.image_embeds(batch))
        wanted, labels = labelled_positions(batch["labels"])
        states = self.model.lm_states(memory, batch["input_ids"], batch["attention_mask"])[:, :-1][wanted]
        total = lm_loss(self.model.lm_logits(states), labels, smoothing=self.label_smoothing)
        return {"lm": distributed.global_mean(*total)}


class VqaTask(Task):
    """VQA fine-tune: every distinct answer of a question, weighted by how many people gave it."""

    model: BlipVqa

    def __init__(self, model: BlipVqa, *, label_smoothing: float = 0.1) -> None:
        super().__init__()
        self.model, self.label_smoothing = model, label_smoothing

    def forward(self, batch: Batch) -> Losses:
        """{"lm": loss}; answers [R, L] belong to questions `answer_question` [R]."""
        model = self.model
        memory = model.question_memory(self.image_embeds(batch), batch["input_ids"], batch["attention_mask"])
        ids, mask = batch["answer_ids"], batch["answer_mask"]
        wanted, labels = labelled_positions(next_token_labels(ids, mask))
        rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(wanted)[wanted]
        states = model.lm_states(memory.rows(batch["answer_question"]), ids, mask)[:, :-1][wanted]
        logits = model.lm_logits(states)
        questions = len(batch["input_ids"])
        loss = vqa_loss(
            logits, labels, rows, batch["answer_weights"], questions, smoothing=self.label_smoothing
        )
        return {"lm": loss}


class NlvrTask(Task):
    """NLVR2: is the sentence true of both images?"""

    model: BlipNlvr

    def __init__(self, model: BlipNlvr) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Losses:
        """{"nlvr": loss}; images come stacked, all left ones then all right ones."""
        memory = self.model.memory(self.image_embeds(batch))
        logits = self.model.logits(memory, batch["input_ids"], batch["attention_mask"])
        return {"nlvr": F.cross_entropy(wide(logits), batch["labels"])}
