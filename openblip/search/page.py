"""What a search found, as a page with pictures: one file, without scripts and without network."""

from collections.abc import Sequence
from typing import Any

from openblip.html import CardLine, card, cards, page, thumbnail


def results_page(
    title: str, hits: Sequence[dict[str, Any]], pictures: Sequence[Any], *, subtitle: str = ""
) -> str:
    """HTML of the hits of `find` or `scan` in their order.

    pictures: one per hit, anything `open_image` takes; one that cannot be opened, or is None, is shown grey.
    """
    shown = []
    for number, (hit, picture) in enumerate(zip(hits, pictures, strict=True), start=1):
        lines = [CardLine(text) for text in hit.get("captions", [])[:3]]
        lines.append(CardLine("", tag=f"{number}. score {hit['score']:.3f}, cosine {hit['cosine']:.3f}"))
        shown.append(card(thumbnail(picture or b""), lines, title=hit["id"]))
    return page(title, cards(shown), subtitle=subtitle)
