"""The papers' evaluation protocols over rows: retrieval with ITM rerank, captioning, VQA. Each returns plain
numbers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openblip.api import Pipeline, generation_config
from openblip.config import UserError
from openblip.data.collate import picture_key
from openblip.data.features import FeatureCache
from openblip.data.rows import Row
from openblip.data.text import clean_caption
from openblip.eval.captions import caption_scores
from openblip.eval.metrics import recall_at
from openblip.eval.vqa import exact_match, vqa_accuracy

Embeds = Callable[[Sequence[Row]], Tensor]  # rows -> image_embeds [B, N, D]


def from_pictures(pipeline: Pipeline) -> Embeds:
    """Image embeddings of rows by opening their pictures."""
    return lambda rows: torch.cat([embeds for embeds, _ in pipeline.encoded([row.image for row in rows])])


def from_cache(cache: FeatureCache) -> Embeds:
    """Image embeddings of rows from a cache of the frozen tower's features."""
    return lambda rows: torch.stack([cache.lookup(picture_key(row)) for row in rows])


@torch.inference_mode()
def retrieval(
    pipeline: Pipeline,
    rows: Sequence[Row],
    *,
    k: int = 128,
    rerank: bool = True,
    embeds: Embeds | None = None,
) -> dict[str, Any]:
    """Image-to-text and text-to-image recall (BLIP §5.1): {"itc": {...}, "itm": {...}}.

    "itc" ranks by cosine alone. "itm" takes the k best by cosine, for each image and for each text, and ranks
    these by ITM logit + cosine; all else comes last. CLIP has no ITM head: "itc" is all there is. Every caption
    of a row is a text. Images are projected once for all their candidates.
    """
    texts = [clean_caption(caption) for row in rows for caption in row.captions]
    owner = np.repeat(np.arange(len(rows)), [len(row.captions) for row in rows])
    if not texts or min(len(row.captions) for row in rows) == 0:
        raise UserError("retrieval: every row needs a caption")
    if rerank and k < 1:
        raise UserError(f"retrieval: k is at least 1, got {k}")
    embeds = embeds or from_pictures(pipeline)
    text_features = torch.from_numpy(pipeline.embed_texts(texts))
    model, size = pipeline.matcher, pipeline.batch_size
    blocks = [slice(start, start + size) for start in range(0, len(rows), size)]
    image_features = [model.image_features(_on(pipeline, embeds(rows[b]))).float().cpu() for b in blocks]
    cosine = torch.cat([model.similarity(part, text_features) for part in image_features])  # [images, texts]
    result: dict[str, Any] = {"itc": recall_at(cosine, owner), "images": len(rows), "texts": len(texts)}
    if not rerank or not pipeline.can_match:
        return result

    wanted = torch.zeros_like(cosine, dtype=torch.bool)
    wanted.scatter_(1, cosine.topk(min(k, len(texts)), dim=1).indices, True)
    wanted.scatter_(0, cosine.topk(min(k, len(rows)), dim=0).indices, True)
    scores = torch.full_like(cosine, -torch.inf)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # batches of like length: less padding
    for block in blocks:
        seen = _on(pipeline, embeds(rows[block]))
        for local, image in enumerate(range(len(rows))[block]):
            candidates = [i for i in order if wanted[image, i]]
            memory = model.encoder_memory(seen[local : local + 1])
            for start in range(0, len(candidates), 64):
                part = candidates[start : start + 64]
                tokens = pipeline.tokens([texts[i] for i in part])
                logits = model.itm_logits(memory, tokens["input_ids"], tokens["attention_mask"])[:, 1]
                scores[image, part] = logits.float().cpu() + cosine[image, part]
    return result | {"itm": recall_at(scores, owner)}


def captioning(
    pipeline: Pipeline,
    rows: Sequence[Row],
    *,
    embeds: Embeds | None = None,
    prompt: str | None = None,
    **generation: Any,
) -> dict[str, Any]:
    """Captions against each row's own: BLEU-1…4, ROUGE-L, CIDEr-D, and the captions by row id.

    prompt: as in `Pipeline.caption`. BLIP writes 3 tokens or more here (its released evaluation).
    """
    if not pipeline.can_caption:
        raise UserError(f"captioning: this {type(pipeline.model).__name__} model has no part for it")
    settings = {"min_new_tokens": 3, **pipeline.caption_options, **generation}
    written: list[str] = []
    if embeds is None:
        said = pipeline.caption([row.image for row in rows], prompt, **settings)
        written = [texts if isinstance(texts, str) else texts[0] for texts in said]
    else:
        config = generation_config(settings)
        for start in range(0, len(rows), pipeline.batch_size):
            seen = _on(pipeline, embeds(rows[start : start + pipeline.batch_size]))
            written += [texts[0] for texts in pipeline.caption_embeds(seen, prompt, config)]
    predictions = {row.id: text for row, text in zip(rows, written, strict=True)}
    scores = caption_scores(predictions, {row.id: row.captions for row in rows})
    return {**scores, "captions": predictions}


def vqa(
    pipeline: Pipeline, rows: Sequence[Row], *, answers: Sequence[str] | None = None, **generation: Any
) -> dict[str, Any]:
    """VQA accuracy of free answers, or, given `answers`, of the best-ranked one; and the answers, in row order."""
    asked = [row for row in rows if row.question is not None]
    if not asked:
        raise UserError("vqa: no row has a question")
    said = pipeline.answer(
        [row.image for row in asked], [str(row.question) for row in asked], answers=answers, **generation
    )
    keys = [str(number) for number in range(len(asked))]
    truth = {key: row.answers for key, row in zip(keys, asked, strict=True)}
    enough = min(len(answers) for answers in truth.values()) >= 4
    accuracy = (vqa_accuracy if enough else exact_match)(dict(zip(keys, said, strict=True)), truth)
    return {**accuracy, "answers": list(said)}


def _on(pipeline: Pipeline, embeds: Tensor) -> Tensor:
    """Embeddings where the model is, in its precision."""
    return embeds.to(pipeline.device, pipeline.dtype)
