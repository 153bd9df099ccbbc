"""BLIP-2's stages as tasks.

Stage 1 teaches the Q-Former to read images (BLIP-2 §3.2): ITC, ITM and ITG. Stage 2 teaches it to tell a frozen
language model what it read (§3.3), and InstructBLIP to read for the sake of a question.

Batches hold `pixel_values` [B, 3, S, S], or `image_embeds` [B, N, D] when the frozen tower's features are cached.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from openblip.config import ConfigError
from openblip.models.blip2 import Blip2
from openblip.models.blip2_llm import Blip2Llm
from openblip.models.text import Cache
from openblip.train import distributed
from openblip.train.matching import matching_loss
from openblip.train.objectives import (
    labelled_positions,
    lm_loss,
    next_token_labels,
    positive_pairs,
    smoothed_targets,
    soft_cross_entropy,
    wide,
)
from openblip.train.optim import tower_lr_scale
from openblip.train.tasks import Batch, Losses, Task


@dataclass
class Blip2TaskConfig:
    """Stage 1; with `match_ids`, retrieval fine-tuning, which keeps all three losses (BLIP-2 §4.4).

    match_ids: pairs of one image are positives of each other; otherwise only the pair itself is.
    negatives, negative_floor: see `matching.matching_loss`.
    match_pairs, write_pairs: ITM, and ITG, on the first so many pairs of a batch, in which ITC sees all; None: on
        every pair.
    keep_tokens: share of the image's tokens, drawn anew at each step, that training looks at.
    text_lr_scale: factor on the learning rate of what came from a pretrained BERT.
    vision_lr_decay: of a tower that is trained, and ours, see `optim.tower_lr_scale`.
    """

    match_ids: bool = False
    negatives: str = "global"
    negative_floor: float = 0.0
    match_pairs: int | None = None
    write_pairs: int | None = None
    keep_tokens: float = 1.0
    label_smoothing: float = 0.1
    text_lr_scale: float = 1.0
    vision_lr_decay: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.negatives not in ("global", "local"):
            raise ConfigError(f'negatives must be "global" or "local", not {self.negatives!r}')
        _check_share(self.keep_tokens)
        for name in ("match_pairs", "write_pairs"):
            pairs = getattr(self, name)
            if pairs is not None and pairs < 1:
                raise ConfigError(f"{name} is 1 or more, got {pairs}")


class Blip2Task(Task):
    """ITC, ITM and ITG over one image memory; the query pass of ITC is also the past of ITG."""

    model: Blip2

    def __init__(self, model: Blip2, config: Blip2TaskConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.draws = torch.Generator()

    def lr_scale(self, name: str) -> float:
        """Factor on the learning rate of a parameter of this task."""
        return _lr_scale(name, self.config, self.model.config.vision.num_hidden_layers)

    def begin_step(self, step: int) -> None:
        """Seed this step's draws."""
        self.draws = _seeded_draws(self.config.seed, step, self.model.temperature.device)

    def forward(self, batch: Batch) -> Losses:
        """{"itc", "itm"} and, with a decoder, {"itg"}; equal weights in the paper (its table 6 leaves ITG out)."""
        embeds = self.image_embeds(batch)
        if self.training:
            embeds = some_tokens(embeds, self.config.keep_tokens, self.draws)
        texts = batch["input_ids"], batch["attention_mask"]
        return stage1_losses(self.model, embeds, *texts, batch["image_ids"], self.config, self.draws)[0]


def stage1_losses(
    model: Blip2,
    embeds: Tensor,
    ids: Tensor,
    mask: Tensor,
    image_ids: Tensor,
    config: Blip2TaskConfig,
    draws: torch.Generator,
) -> tuple[Losses, Tensor]:
    """(the losses of stage 1, the states [B, Q, D] of the queries) of embeds [B, N, D] and texts [B, L].

    The image is projected once for all of them, and the query pass of ITC is also the past of ITG.
    """
    memory = model.memory(embeds)
    cache = Cache(model.config.qformer.num_hidden_layers) if model.config.decoder else None
    states = model.qformer.encode_queries(memory, cache=cache)

    images, texts = model.project_queries(states), model.text_features(ids, mask)
    all_images, all_texts = distributed.all_gather(images), distributed.all_gather(texts)
    if config.match_ids:
        positives = positive_pairs(image_ids, distributed.all_gather(image_ids))
    else:
        own = distributed.rank() * len(ids) + torch.arange(len(ids), device=ids.device)
        positives = F.one_hot(own, len(all_texts)).bool()
    image_to_text = wide(model.similarity(images, all_texts)) / model.temperature  # [B, G]
    text_to_image = wide(model.similarity(all_images, texts)).T / model.temperature
    targets = smoothed_targets(positives, config.label_smoothing, image_to_text.dtype)
    itc = (soft_cross_entropy(image_to_text, targets) + soft_cross_entropy(text_to_image, targets)) / 2

    losses = {"itc": itc}
    losses["itm"] = matching_loss(
        model, memory, embeds, ids, mask, (image_to_text, text_to_image), image_ids,
        negatives=config.negatives, floor=config.negative_floor, among_allowed=True, generator=draws,
        pairs=config.match_pairs,
    )  # fmt: skip
    if cache is not None:
        if config.write_pairs is not None:
            cache, ids, mask = (
                cache.first(config.write_pairs),
                ids[: config.write_pairs],
                mask[: config.write_pairs],
            )
        wanted, labels = labelled_positions(next_token_labels(ids, mask))
        written = model.lm_states(cache, ids, mask)[:, :-1][wanted]
        total = lm_loss(model.lm_logits(written), labels, smoothing=config.label_smoothing)
        losses["itg"] = distributed.global_mean(*total)
    return losses, states


@dataclass
class Blip2LlmTaskConfig:
    """Stage 2. keep_tokens, vision_lr_decay: as in stage 1. label_smoothing: of the language model's loss; the release
    has none.

    stage1: train the losses of stage 1 too, so that one Q-Former goes on matching while it learns to tell. Its
        `keep_tokens`, `seed` and factors on learning rates are overruled by these.
    """

    keep_tokens: float = 1.0
    label_smoothing: float = 0.0
    text_lr_scale: float = 1.0
    vision_lr_decay: float = 1.0
    stage1: Blip2TaskConfig | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check_share(self.keep_tokens)


class Blip2LlmTask(Task):
    """The language model's loss on the text behind the soft prompt (BLIP-2 §3.3; InstructBLIP with instructions).

    Batches hold input_ids, attention_mask, labels, see `LmTokenizer.training`; with `qformer_text` the instructions
    for the Q-Former, qformer_ids and qformer_mask [B, L']; for stage 1's losses the captions in the Q-Former's
    vocabulary, text_ids and text_mask [B, L''], and image_ids [B].
    """

    model: Blip2Llm

    def __init__(self, model: Blip2Llm, config: Blip2LlmTaskConfig) -> None:
        super().__init__()
        if config.stage1 is not None and (model.config.qformer_text or not model.config.blip2.encoder):
            raise ConfigError(
                "stage1: its losses need a stage 1 with its heads, and queries without instructions"
            )
        self.model, self.config = model, config
        self.draws = torch.Generator()

    def lr_scale(self, name: str) -> float:
        """Factor on the learning rate of a parameter of this task."""
        return _lr_scale(name, self.config, self.model.config.vision.num_hidden_layers)

    def begin_step(self, step: int) -> None:
        """Seed this step's draws."""
        self.draws = _seeded_draws(self.config.seed, step, next(self.model.parameters()).device)

    def forward(self, batch: Batch) -> Losses:
        """{"lm": loss}, and those of stage 1 if they are trained too."""
        embeds = self.image_embeds(batch)
        if self.training:
            embeds = some_tokens(embeds, self.config.keep_tokens, self.draws)
        losses: Losses = {}
        if self.config.stage1 is None:
            seen = self.model.soft_prompt(embeds, batch.get("qformer_ids"), batch.get("qformer_mask"))
        else:
            texts = batch["text_ids"], batch["text_mask"], batch["image_ids"]
            losses, states = stage1_losses(self.model.blip2, embeds, *texts, self.config.stage1, self.draws)
            seen = self.model.project(states)
        ids = batch["input_ids"], batch["attention_mask"], batch["labels"]
        logits, labels = self.model.labelled_logits(seen, *ids)
        total = lm_loss(logits, labels, smoothing=self.config.label_smoothing)
        return {**losses, "lm": distributed.global_mean(*total)}


def some_tokens(embeds: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A share of each image's tokens, drawn anew: [..., N, D] -> [..., K, D]; all of them for a share of 1."""
    if share == 1:
        return embeds
    kept = max(1, round(embeds.shape[-2] * share))
    noise = torch.rand(embeds.shape[:-1], device=embeds.device, generator=generator)
    order = noise.argsort(dim=-1)[..., :kept, None].expand(*embeds.shape[:-2], kept, embeds.shape[-1])
    return embeds.gather(-2, order)


def _check_share(keep_tokens: float) -> None:
    if not 0 < keep_tokens <= 1:
        raise ConfigError(f"keep_tokens is a share above 0 and at most 1, got {keep_tokens}")


def _lr_scale(name: str, config: Blip2TaskConfig | Blip2LlmTaskConfig, depth: int) -> float:
    """Factor on the learning rate of a parameter of a task: of the Q-Former, what it got from a BERT; of the tower."""
    if "qformer." in name and not any(fresh in name for fresh in ("query_tokens", "cross_attention")):
        return config.text_lr_scale
    return tower_lr_scale(name, config.vision_lr_decay, depth)


def _seeded_draws(seed: int, step: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed * 1_000_003 + step)
