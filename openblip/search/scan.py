"""Search over a source without an index: embed every picture, rank by cosine, rerank the best by ITM."""

from collections.abc import Callable
from typing import Any

import numpy as np

from openblip.api import Pipeline
from openblip.config import UserError
from openblip.data.image import open_image
from openblip.data.rows import BadRows, Row
from openblip.data.sources import Source
from openblip.search.find import Query, check_numbers, embed_query, reranked


def scan(
    pipeline: Pipeline,
    source: Source,
    query: Query,
    *,
    top: int = 10,
    rerank: int = 32,
    bad: BadRows | None = None,
    report: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """The `top` pictures for a text, or for a picture, best first: {"id", "where", "row", "score", "cosine"}.

    The `rerank` best by cosine are scored by ITM and ITC, see `find.reranked`, and come first (BLIP §5.1); the
    others follow in the order of their cosine, which is their score, as for all pictures with CLIP, which has no
    such head, and when the query is a picture. "row" is the number of the row in the source. Pictures that cannot be
    opened are recorded in `bad`. `report` is called with (rows done, rows in all).
    Raises UserError if none can be opened, top is below 1 or rerank negative; and as `find.embed_query`.
    """
    check_numbers(top, rerank)
    bad = bad or BadRows(max_share=1.0)
    vector = embed_query(pipeline, query)
    rows: list[tuple[int, Row]] = []
    vectors = []
    block: list[tuple[int, Row, Any]] = []

    def embed() -> None:
        rows.extend((number, row) for number, row, _ in block)
        vectors.append(pipeline.embed_images([image for *_, image in block]))
        block.clear()

    for index in range(len(source)):
        bad.saw()
        with bad.skipping():
            row = source.light(index)
            with bad.skipping(row.where):
                block.append((index, row, open_image(row.image, draft_size=pipeline.transform.draft_size)))
        if len(block) == pipeline.batch_size:
            embed()
        if report is not None:
            report(index + 1, len(source))
    if block:
        embed()
    if not rows:
        raise UserError(f"search: no picture could be opened ({dict(bad.counts)})")
    cosine = pipeline.similarity(np.concatenate(vectors), vector[None])[:, 0]
    best = np.argsort(-cosine, kind="stable")
    order, scores = best, cosine[best]
    if isinstance(query, str) and rerank > 0 and pipeline.can_match:
        images = [rows[i][1].image for i in best[:rerank]]
        within, scores = reranked(pipeline, query, cosine[best], range(len(images)), images)
        order, scores = best[within], scores[within]
    return [
        {
            "id": rows[i][1].id,
            "where": rows[i][1].where,
            "row": rows[i][0],
            "score": float(score),
            "cosine": float(cosine[i]),
        }
        for i, score in zip(order[:top], scores)
    ]
