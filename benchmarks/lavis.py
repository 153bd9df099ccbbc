"""What the released code of BLIP and LAVIS does, on our modules: the peer for what transformers does not have.

Every text pass projects its images anew, texts are padded to a fixed length, and a decoder makes logits everywhere.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from openblip.models.blip import Blip
from openblip.models.blip2 import Blip2
from openblip.models.text import Cache
from openblip.train.objectives import (
    hard_negatives,
    itm_loss,
    labelled_positions,
    lm_loss,
    next_token_labels,
)
from openblip.train.tasks import BlipTask, Losses


def padded(ids: Tensor, mask: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Both [R, L] -> [R, length]."""
    return F.pad(ids, (0, length - ids.shape[1])), F.pad(mask, (0, length - mask.shape[1]))


def rerank_as_released(model: Blip, embeds: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """ITM logits [R, 2] of image_embeds [B, N, D] and R / B texts for each: an image is copied for each of them."""
    ids, mask = padded(ids, mask, 35)
    count = len(ids) // len(embeds)
    found = []
    for number, image in enumerate(embeds):
        own = slice(number * count, (number + 1) * count)
        copies = image.expand(count, -1, -1)
        found.append(model.itm_logits(model.memory(copies), ids[own], mask[own]))
    return torch.cat(found)


def step_as_released(task: BlipTask, batch: dict[str, Tensor]) -> Losses:
    """BLIP's pre-training losses: four passes of text, five projections of the images, texts of 30 tokens."""
    model = task.model
    ids, mask = padded(batch["input_ids"], batch["attention_mask"], 30)
    embeds, rows = model.encode_image(batch["pixel_values"]), len(ids)
    images, texts = model.image_features(embeds), model.text_features(ids, mask)
    batch = {**batch, "image_embeds": embeds, "input_ids": ids, "attention_mask": mask}
    losses, image_to_text, text_to_image = task._itc(batch, images, texts)
    own = torch.eye(rows, dtype=torch.bool)
    text, _ = hard_negatives(image_to_text, own, generator=task.draws)
    image, _ = hard_negatives(text_to_image, own, generator=task.draws)
    matched = model.itm_logits(model.memory(embeds), ids, mask)
    seen = torch.cat([embeds, embeds[image]])
    others = model.itm_logits(model.memory(seen), torch.cat([ids[text], ids]), torch.cat([mask[text], mask]))
    labels = torch.cat([torch.ones(rows), torch.zeros(2 * rows)]).long()
    total, count = itm_loss(torch.cat([matched, others]), labels, torch.ones(3 * rows))
    losses["itm"] = total / count
    logits = model.lm_logits(model.lm_states(model.memory(embeds), ids, mask))[:, :-1]  # at padding too
    wanted, words = labelled_positions(next_token_labels(ids, mask))
    total, count = lm_loss(logits[wanted], words)
    losses["lm"] = total / count
    return losses


def stage1_as_released(model: Blip2, embeds: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Stage 1 of BLIP-2 as blip2_qformer computes it, all its losses: ITM projects 3B images, texts of 32 tokens."""
    ids, mask = padded(ids, mask, 32)
    cache, rows = Cache(model.config.qformer.num_hidden_layers), len(ids)
    states = model.qformer.encode_queries(model.memory(embeds), cache=cache)
    logits = (
        model.similarity(model.project_queries(states), model.text_features(ids, mask)) / model.temperature
    )
    labels = torch.arange(rows)
    smoothing = {"label_smoothing": 0.1}
    itc = (F.cross_entropy(logits, labels, **smoothing) + F.cross_entropy(logits.T, labels, **smoothing)) / 2
    own = torch.eye(rows, dtype=torch.bool)
    text, _ = hard_negatives(logits, own)
    image, _ = hard_negatives(logits.T, own)
    every = torch.cat([embeds, embeds[image], embeds])
    every_ids, every_mask = torch.cat([ids, ids, ids[text]]), torch.cat([mask, mask, mask[text]])
    found = model.itm_logits(model.memory(every), every_ids, every_mask)
    itm = F.cross_entropy(found, torch.cat([torch.ones(rows), torch.zeros(2 * rows)]).long())
    wanted, words = labelled_positions(next_token_labels(ids, mask))
    every_logits = model.lm_logits(model.lm_states(cache, ids, mask))[:, :-1]
    itg = F.cross_entropy(every_logits[wanted], words, label_smoothing=0.1)
    return itc + itm + itg
