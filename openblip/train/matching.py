"""Image-text matching over a batch: every pair, a hard negative text per image, a hard negative image per text.

BLIP §3.2 and BLIP-2 §3.2 train their ITM heads in this one way; only the head differs, behind
`model.itm_logits(memory, input_ids, attention_mask)`.

Shapes: B pairs of this rank, G pairs of the candidates (the global batch, or this rank's), K ≤ B pairs that count.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openblip.models.memory import Memory
from openblip.train import distributed
from openblip.train.objectives import hard_negatives, itm_loss, positive_pairs


def matching_loss(
    model: Any,
    memory: Memory,
    embeds: Tensor,
    ids: Tensor,
    mask: Tensor,
    similarity: tuple[Tensor, Tensor],
    image_ids: Tensor,
    *,
    negatives: str,
    floor: float,
    among_allowed: bool = False,
    generator: torch.Generator,
    pairs: int | None = None,
) -> Tensor:
    """The ITM loss of 3K rows, averaged over all ranks.

    Args:
        memory: of this rank's images, made from `embeds` [B, N, D].
        ids, mask: this rank's texts [B, L].
        similarity: ITC logits image-to-text and text-to-image, both [B, G of all ranks].
        image_ids: [B]; pairs of one image are never each other's negatives.
        negatives: draw them from the "global" batch, or from this rank's "local" part of it.
        floor, among_allowed: see `objectives.hard_negatives`.
        generator: of the draws, in the same state on every rank.
        pairs: only the first so many pairs count; negatives still come from all. None: every pair.
    """
    size = len(ids)
    count = size if pairs is None else min(pairs, size)
    own = slice(distributed.rank() * size, (distributed.rank() + 1) * size)
    image_to_text, text_to_image = similarity
    candidate_ids = distributed.all_gather(image_ids)
    if negatives == "local":
        image_to_text, text_to_image = image_to_text[:, own], text_to_image[:, own]
        candidate_ids = candidate_ids[own]
    is_global = negatives == "global" and distributed.world_size() > 1
    forbidden = positive_pairs(image_ids, candidate_ids)
    how: dict[str, Any] = {"floor": floor, "among_allowed": among_allowed, "generator": generator}

    def draw(scores: Tensor) -> tuple[Tensor, Tensor]:
        """(candidate, does one exist) of the first K rows; drawn for the global batch, so topology changes nothing."""
        if not is_global:
            index, exists = hard_negatives(scores, forbidden, **how)
            return index[:count], exists[:count]
        everyone = distributed.all_gather(scores.detach()), distributed.all_gather(forbidden)
        index, exists = hard_negatives(*everyone, **how)
        return index[own][:count], exists[own][:count]

    text_of_image, text_exists = draw(image_to_text)
    image_of_text, image_exists = draw(text_to_image)

    order = torch.arange(count, device=ids.device)  # of the texts with a wrong image
    if is_global:
        longest = int(distributed.all_gather(torch.tensor([ids.shape[1]], device=ids.device)).max())
        ids, mask = (F.pad(x, (0, longest - x.shape[1])) for x in (ids, mask))  # pad id and mask are both 0
        negative_memory = model.encoder_memory(distributed.all_gather(embeds)[image_of_text])
        negative_ids = distributed.all_gather(ids)[text_of_image]
        negative_mask = distributed.all_gather(mask)[text_of_image]
    else:
        order = image_of_text.argsort(stable=True)  # rows of one image together: see `Memory.counts`
        negative_memory = memory.rows(image_of_text[order])
        negative_ids, negative_mask = ids[text_of_image], mask[text_of_image]
    if count < size:
        memory = memory.rows(torch.arange(count, device=ids.device))
        ids, mask = ids[:count], mask[:count]

    # Image i sees its own text and its hard negative text: rows 2i and 2i + 1 against its memory.
    paired_ids = torch.stack([ids, negative_ids], dim=1).flatten(0, 1)
    paired_mask = torch.stack([mask, negative_mask], dim=1).flatten(0, 1)
    paired = model.itm_logits(memory, paired_ids, paired_mask)
    strangers = model.itm_logits(negative_memory, ids[order], mask[order])

    labels = torch.cat([torch.tensor([1, 0], device=ids.device).repeat(count), torch.zeros_like(ids[:, 0])])
    always = torch.ones_like(text_exists)
    counted = torch.cat([torch.stack([always, text_exists], dim=1).flatten(), image_exists[order]])
    return distributed.global_mean(*itm_loss(torch.cat([paired, strangers]), labels, counted))
