"""A query → pictures, in two stages: a short list by cosine (ITC), the best of it reranked by ITM (BLIP §5.1)."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from openblip.api import Pipeline
from openblip.config import UserError
from openblip.data.image import open_image
from openblip.data.loader import prefetch
from openblip.search.index import Index
from openblip.search.places import Places

Query = str | Image.Image  # a text, or a picture to find others like it


def find(
    index: Index,
    pipeline: Pipeline,
    query: Query,
    *,
    top: int = 10,
    rerank: int = 32,
    where: str | None = None,
    hybrid: bool = False,
    exact: bool = False,
    places: Places | None = None,
) -> list[dict[str, Any]]:
    """The `top` pictures of an index for a query, best first.

    The `rerank` first by cosine are opened again where they came from and come first, by ITM and ITC, see
    `reranked`; of one that is gone, its thumbnail is judged. The others follow by cosine, which is their score; so do
    all for a picture as query, and with CLIP, which has no such head.

    Args:
        where: a filter in SQL over the columns of `search.index`, applied before the search.
        hybrid: the short list is that of vectors and of words in captions, by reciprocal rank fusion. What is not
            reranked stays in its order; its score is its cosine nevertheless.
        exact: compare every vector, even if there is an ANN index.
        places: where pictures are opened.

    Returns:
        dicts of "id", "source", "where", "captions", "split", "extra", "place" (see `search.places`), "score",
        "cosine", and "judged": what the
        ITM head saw, "picture" or "thumbnail"; None: nothing.

    Raises:
        UserError: another model's index, a filter that makes no sense, a query that says nothing, a picture as query
            for BLIP-2, or for a hybrid search.
    """
    check_numbers(top, rerank)
    if hybrid and not isinstance(query, str):
        raise UserError("search: a hybrid search looks for words in captions; give a text")
    index.refuse_other(pipeline)
    vector = embed_query(pipeline, query)
    head = rerank if isinstance(query, str) and pipeline.can_match else 0
    text = query if hybrid and isinstance(query, str) else None
    lines = index.nearest(vector, max(top, head), where=where, text=text, exact=exact)
    if not lines:
        return []
    cosine = pipeline.similarity(np.stack([line["vector"] for line in lines]), vector[None])[:, 0]
    judged: list[str | None] = [None] * len(lines)
    order, scores = np.arange(len(lines)), cosine
    if head:
        images, judged = _open(index, lines[:head], pipeline.transform.draft_size, places or Places())
        judged += [None] * (len(lines) - len(judged))
        known = [i for i, what in enumerate(judged) if what is not None]
        order, scores = reranked(pipeline, str(query), cosine, known, images)
    return [
        {
            **{name: lines[i][name] for name in ("id", "source", "where", "captions", "split")},
            "extra": json.loads(lines[i]["extra"] or "{}"),
            "place": json.loads(lines[i]["place"]),
            "score": float(scores[i]),
            "cosine": float(cosine[i]),
            "judged": judged[i],
        }
        for i in order[:top]
    ]


def check_numbers(top: int, rerank: int) -> None:
    """Raises UserError: so many pictures cannot be shown, or judged by the ITM head."""
    if top < 1 or rerank < 0:
        raise UserError(f"search: top is at least 1 and rerank not negative, got {top} and {rerank}")


def embed_query(pipeline: Pipeline, query: Query) -> np.ndarray:
    """The ITC vector [P] of a text or a picture. Raises UserError: an empty text; a picture, for BLIP-2."""
    if isinstance(query, str):
        if not query.strip():
            raise UserError("search: the text is empty; say what to look for")
        return pipeline.embed_texts(query)
    vector = pipeline.embed_images(query)
    if vector.ndim == 2:
        raise UserError(
            "search: BLIP-2 compares a picture with a text, by the best of its queries, and not with a picture; "
            "search with a text, or with a model of BLIP or CLIP"
        )
    return vector


def reranked(
    pipeline: Pipeline, text: str, cosine: np.ndarray, chosen: Sequence[int], images: Sequence[Any]
) -> tuple[np.ndarray, np.ndarray]:
    """(order, scores) of B pictures with `cosine` [B]: the `chosen` first, by ITM and ITC, then the others.

    By ITM and ITC: log odds + cosine / temperature, see `eval.benchmarks.retrieval`. images: of the chosen, in their
    order, anything `open_image` takes; each is encoded and projected once. The others keep their order, and their
    cosine as score.
    """
    scores, head = cosine.copy(), np.asarray(chosen, np.int64)
    if len(head):
        found = pipeline.match(images, text)
        odds = torch.logit(torch.from_numpy(found.probability), eps=1e-6).numpy()
        scores[head] = odds + found.cosine / float(pipeline.matcher.temperature)
    others = np.setdiff1d(np.arange(len(cosine)), head)
    return np.concatenate([head[np.argsort(-scores[head], kind="stable")], others]), scores


def _open(
    index: Index, lines: Sequence[dict[str, Any]], draft_size: int, places: Places
) -> tuple[list[Image.Image], list[str | None]]:
    """(the pictures that could be opened, what each line's is: "picture", "thumbnail" or None)."""

    def look(line: dict[str, Any]) -> Image.Image | None:
        return places.open_if_there(json.loads(line["place"]), line["id"], draft_size)

    images: list[Image.Image] = []
    judged: list[str | None] = []
    for line, picture in zip(lines, prefetch(look, lines, workers=4), strict=True):
        what: str | None = "picture"
        if picture is None and (small := index.thumbnails([line])[0]) is not None:
            picture, what = open_image(small), "thumbnail"
        judged.append(what if picture is not None else None)
        images += [picture] if picture is not None else []
    return images, judged
