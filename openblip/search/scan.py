"""Search over a source without an index: embed every picture, rank by cosine, rerank the best by ITM."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from openblip.api import Pipeline
from openblip.config import UserError
from openblip.data.image import open_image
from openblip.data.rows import BadRows, Row
from openblip.data.sources import Source


def scan(
    pipeline: Pipeline,
    source: Source,
    query: str,
    *,
    top: int = 10,
    rerank: int = 32,
    bad: BadRows | None = None,
    report: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """The `top` pictures for a text, best first: {"id", "where", "score", "cosine"}.

    The `rerank` best by cosine are scored by the ITM head's log odds + cosine and come first (BLIP §5.1); the
    others follow in the order of their cosine, which is their score, as for all pictures with CLIP, which has no
    such head. Pictures that cannot be opened are recorded in `bad`. `report` is called with (rows done, rows in all).
    Raises UserError if none can be opened.
    """
    bad = bad or BadRows(max_share=1.0)
    rows: list[Row] = []
    vectors = []
    block: list[tuple[Row, Any]] = []

    def embed() -> None:
        rows.extend(row for row, _ in block)
        vectors.append(pipeline.embed_images([image for _, image in block]))
        block.clear()

    for index in range(len(source)):
        bad.saw()
        with bad.skipping():
            row = source.light(index)
            with bad.skipping(row.where):
                block.append((row, open_image(row.image, draft_size=pipeline.transform.draft_size)))
        if len(block) == pipeline.batch_size:
            embed()
        if report is not None:
            report(index + 1, len(source))
    if block:
        embed()
    if not rows:
        raise UserError(f"search: no picture could be opened ({dict(bad.counts)})")
    cosine = pipeline.similarity(np.concatenate(vectors), pipeline.embed_texts([query]))[:, 0]
    order = np.argsort(-cosine, kind="stable")
    scores = cosine.copy()
    if rerank > 0 and pipeline.can_match:
        head = order[:rerank]
        found = pipeline.match([rows[i].image for i in head], query)
        scores[head] = torch.logit(torch.from_numpy(found.probability), eps=1e-6).numpy() + found.cosine
        order = np.concatenate([head[np.argsort(-scores[head], kind="stable")], order[rerank:]])
    return [
        {"id": rows[i].id, "where": rows[i].where, "score": float(scores[i]), "cosine": float(cosine[i])}
        for i in order[:top]
    ]
