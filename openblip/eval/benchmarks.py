"""The papers' evaluation protocols over rows: retrieval with ITM rerank, captioning, VQA. Each returns plain
numbers.

Rows with equal ids show the same picture; where pictures are what is measured, they count as one, with all captions.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from openblip.api import Pipeline, generation_config, row_seeds
from openblip.config import UserError
from openblip.data.collate import check_picture, picture_key
from openblip.data.features import FeatureCache
from openblip.data.loader import prefetch
from openblip.data.rows import BadRow, BadRows, Row
from openblip.data.sources import Source
from openblip.data.text import clean_caption
from openblip.eval.captions import caption_scores
from openblip.eval.metrics import recall_at
from openblip.eval.vqa import exact_match, vqa_accuracy
from openblip.models.clip import Clip

Task = Literal["retrieval", "caption", "vqa"]
Embeds = Callable[[Sequence[Row]], Tensor]  # rows -> image_embeds [B, N, D]
Report = Callable[[int, int], None]  # called with (rows done, rows in all)

_AT_A_TIME = 256  # pictures given to a pipeline between two reports
_KEPT = 2 * 2**30  # bytes of image embeddings that retrieval keeps for its second pass
_PROJECTED = 4  # images whose keys and values retrieval holds at a time
_PAIRS = 64  # of image and text in a batch


def from_pictures(pipeline: Pipeline) -> Embeds:
    """Image embeddings of rows by opening their pictures."""
    return lambda rows: torch.cat([embeds for embeds, _ in pipeline.encoded([row.image for row in rows])])


def from_cache(cache: FeatureCache) -> Embeds:
    """Image embeddings of rows from a cache of the frozen tower's features."""
    return lambda rows: torch.stack([cache.lookup(picture_key(row)) for row in rows])


def usable_rows(
    task: Task, source: Source, bad: BadRows, *, take: int | None = None, report: Report | None = None
) -> list[Row]:
    """The rows of a source that can be measured, without the bytes of their pictures. The others are recorded in `bad`.

    Every picture is opened once before the first is measured: figures are of a set that is known. take: so many rows
    alone, drawn by the seed 42, in their order. Raises UserError if none is left.
    """
    if take is not None and take < 1:
        raise UserError(f"take is 1 or more, got {take}")
    numbers = range(len(source)) if take is None else _drawn(len(source), take)
    opened: set[str] = set()

    def look(index: int) -> Row | BadRow:
        try:
            row = source.light(index)
            if task == "vqa" and row.question is not None and not row.answers:
                raise BadRow("missing_answer", row.where, "no answer in the row")
            if task != "vqa" and not row.captions:
                raise BadRow("missing_caption", row.where, "no caption in the row")
            if row.id not in opened:
                check_picture(row)
                opened.add(row.id)
            return row
        except BadRow as error:
            return error

    rows: list[Row] = []
    for done, found in enumerate(prefetch(look, numbers, workers=2), start=1):
        bad.saw()
        if isinstance(found, BadRow):
            bad.add(found.reason, found.where, found.detail)
        else:
            rows.append(found)
        if report is not None:
            report(done, len(numbers))
    if not rows:
        raise UserError(f"{source.path}: no row can be used for {task}: {bad.summary()}")
    return rows


def by_picture(rows: Sequence[Row]) -> list[Row]:
    """One row for each picture, with the captions of all its rows; in the order of their first ones."""
    found: dict[str, Row] = {}
    for row in rows:
        first = found.get(row.id)
        found[row.id] = row if first is None else replace(first, captions=[*first.captions, *row.captions])
    return list(found.values())


@torch.inference_mode()
def retrieval(
    pipeline: Pipeline,
    rows: Sequence[Row],
    *,
    k: int = 128,
    rerank: bool = True,
    embeds: Embeds | None = None,
    report: Report | None = None,
) -> dict[str, Any]:
    """Image-to-text and text-to-image recall (BLIP §5.1): {"itc": {...}, "itm": {...}, "itm_itc": {...}}.

    "itc" ranks by cosine alone. "itm" takes the k best by cosine, for each image and for each text, and ranks
    these by ITM logit + cosine, as the released code does; all else comes last. "itm_itc" ranks the same k by ITM log
    odds + cosine / temperature: an ITM head that learnt from negatives drawn in proportion to exp(cosine / temperature)
    knows log P(match) − log of that proportion, so the sum is what ranks best. CLIP has no ITM head: "itc" is all there
    is. Every caption of a row is a text. A pair that both directions ask for is scored once, an image is projected once
    for all its texts, and embeddings are kept for the second pass as far as `_KEPT` goes.
    """
    rows = by_picture(rows)
    # CLIP learns captions as they are, with capitals and full stops.
    clean = str if isinstance(pipeline.model, Clip) else clean_caption
    texts = [clean(caption) for row in rows for caption in row.captions]
    owner = np.repeat(np.arange(len(rows)), [len(row.captions) for row in rows])
    if not texts or min(len(row.captions) for row in rows) == 0:
        raise UserError("retrieval: every row needs a caption")
    if rerank and k < 1:
        raise UserError(f"retrieval: k is at least 1, got {k}")
    embeds = embeds or from_pictures(pipeline)
    text_features = torch.from_numpy(pipeline.embed_texts(texts))
    model, size = pipeline.matcher, pipeline.batch_size
    blocks = list(_parts(rows, size))
    passes = len(rows) * (2 if rerank and pipeline.can_match else 1)
    image_features = []
    kept: dict[int, Tensor] = {}  # by the first row of a block
    left = _KEPT if passes > len(rows) else 0
    for block in blocks:
        seen = _on(pipeline, embeds(rows[block]))
        image_features.append(model.image_features(seen).float().cpu())
        left -= seen.nbytes
        if left >= 0:
            kept[block.start] = seen
        _tell(report, block.stop, passes)
    cosine = torch.cat([model.similarity(part, text_features) for part in image_features])  # [images, texts]
    result: dict[str, Any] = {"itc": recall_at(cosine, owner), "images": len(rows), "texts": len(texts)}
    if not rerank or not pipeline.can_match:
        return result

    wanted = torch.zeros_like(cosine, dtype=torch.bool)
    wanted.scatter_(1, cosine.topk(min(k, len(texts)), dim=1).indices, True)
    wanted.scatter_(0, cosine.topk(min(k, len(rows)), dim=0).indices, True)
    by_itm = torch.full_like(cosine, -torch.inf)
    by_both = by_itm.clone()
    temperature = float(model.temperature)
    tokens = pipeline.tokens(texts)
    for block in blocks:
        seen = kept.pop(block.start) if block.start in kept else _on(pipeline, embeds(rows[block]))
        for few in _parts(rows[block], _PROJECTED):
            first = block.start + few.start
            image, text = wanted[first : block.start + few.stop].nonzero().unbind(1)
            logits, near = _itm_logits(model, seen[few], tokens, image, text), cosine[first + image, text]
            by_itm[first + image, text] = logits[:, 1] + near
            by_both[first + image, text] = logits[:, 1] - logits[:, 0] + near / temperature
        _tell(report, len(rows) + block.stop, passes)
    return result | {"itm": recall_at(by_itm, owner), "itm_itc": recall_at(by_both, owner)}


def _itm_logits(model: Any, embeds: Tensor, tokens: dict[str, Tensor], image: Tensor, text: Tensor) -> Tensor:
    """ITM logits [K, 2], float32, column 1 = match, for K pairs of one of image_embeds [B, N, D] and one of the texts.

    In batches of pairs whose texts are about as long, of whatever images: little padding, and few small batches.
    """
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    memory, logits = model.encoder_memory(embeds), torch.empty(len(text), 2)
    for part in mask.sum(dim=1).cpu()[text].argsort(stable=True).split(_PAIRS):
        part = part[image[part].argsort(stable=True)]  # those of one image together
        rows = text[part].to(ids.device)
        length = int(mask[rows].sum(dim=1).max())
        seen = memory.rows(image[part].to(ids.device))
        logits[part] = model.itm_logits(seen, ids[rows, :length], mask[rows, :length]).float().cpu()
    return logits


def captioning(
    pipeline: Pipeline,
    rows: Sequence[Row],
    *,
    embeds: Embeds | None = None,
    prompt: str | None = None,
    report: Report | None = None,
    **generation: Any,
) -> dict[str, Any]:
    """Captions against each row's own: BLEU-1…4, ROUGE-L, CIDEr-D, and the captions by row id.

    prompt: as in `Pipeline.caption`. BLIP writes 3 tokens or more here, unless `generation` says otherwise; in its
        released evaluation it is 1 or more, and 16 at most.
    """
    if not pipeline.can_caption:
        raise UserError(f"captioning: this {type(pipeline.model).__name__} model has no part for it")
    rows = by_picture(rows)
    settings = {"min_new_tokens": 3, **pipeline.caption_options, **generation}
    seeds = row_seeds(generation.get("seed"), len(rows))
    written: list[str] = []
    for part in _parts(rows, _AT_A_TIME if embeds is None else pipeline.batch_size):
        if embeds is None:
            said = pipeline.caption([row.image for row in rows[part]], prompt, seeds=seeds[part], **settings)
            written += [texts if isinstance(texts, str) else texts[0] for texts in said]
        else:
            seen, config = _on(pipeline, embeds(rows[part])), generation_config(settings)
            written += [texts[0] for texts in pipeline.caption_embeds(seen, prompt, config, seeds[part])]
        _tell(report, part.stop, len(rows))
    predictions = {row.id: text for row, text in zip(rows, written, strict=True)}
    scores = caption_scores(predictions, {row.id: row.captions for row in rows})
    return {**scores, "captions": predictions}


def vqa(
    pipeline: Pipeline,
    rows: Sequence[Row],
    *,
    answers: Sequence[str] | None = None,
    report: Report | None = None,
    **generation: Any,
) -> dict[str, Any]:
    """VQA accuracy of free answers, or, given `answers`, of the best-ranked one; and the answers, in row order.

    Where no question has 4 answers, accuracy is the share of `exact_match`. Raises UserError: no questions, or of both
    kinds.
    """
    asked = [row for row in rows if row.question is not None]
    if not asked:
        raise UserError("vqa: no row has a question")
    enough = len(asked[0].answers) >= 4
    for row in asked:
        if (len(row.answers) >= 4) != enough:
            raise UserError(
                f"vqa: {asked[0].where} has {len(asked[0].answers)} answers and {row.where} {len(row.answers)}; "
                "accuracy is counted otherwise from 4 answers on, so measure the two kinds apart"
            )
    said: list[str] = []
    for part in _parts(asked, _AT_A_TIME):
        images, questions = [row.image for row in asked[part]], [str(row.question) for row in asked[part]]
        found = pipeline.answer(images, questions, answers=answers, **generation)
        said += [found] if isinstance(found, str) else found
        _tell(report, part.stop, len(asked))
    keys = [str(number) for number in range(len(asked))]
    truth = {key: row.answers for key, row in zip(keys, asked, strict=True)}
    accuracy = (vqa_accuracy if enough else exact_match)(dict(zip(keys, said, strict=True)), truth)
    return {**accuracy, "answers": said}


def _drawn(rows: int, count: int) -> list[int]:
    found: list[int] = np.sort(np.random.default_rng(42).permutation(rows)[:count]).tolist()
    return found


def _parts(rows: Sequence[Row], size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, len(rows))) for start in range(0, len(rows), size))


def _tell(report: Report | None, done: int, total: int) -> None:
    if report is not None:
        report(done, total)


def _on(pipeline: Pipeline, embeds: Tensor) -> Tensor:
    """Embeddings where the model is, in its precision."""
    return embeds.to(pipeline.device, pipeline.dtype)
