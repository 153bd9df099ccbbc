"""The commands about finding pictures: an index that is built, added to, thinned and looked at, and the search."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import subcommand

from openblip.cli_make import print_answer
from openblip.cli_shared import AS_USUAL, How, Reading, as_lines, at_least, check_file, progress, say_skipped
from openblip.config import UserError

if TYPE_CHECKING:
    from openblip.search.index import Index

IndexPath = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="INDEX")]]
Query = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="QUERY")]]
Dtype = Literal["fp32", "bf16"]


def build(
    index: IndexPath,
    model: str,
    data: tuple[str, ...],
    name: str | None = None,
    dtype: Dtype = "fp32",
    thumbnail: int = 200,
    workers: int = 2,
    batch_size: int = 16,
    max_bad_share: float = 0.1,
    how: How = AS_USUAL,
    json: bool = False,
) -> None:
    """Make an index and add pictures to it. Stopped at any time, the same call goes on; so does one for an index that
    is there, if it is of the same model.

    Args:
        index: where: a folder, or a place in object storage (`s3://...`).
        model: a retrieval model (folder or hub name); it makes the vectors, and searches take it again.
        data: pictures, any layouts `openblip info` understands.
        name: what the source is called in the index, if there is one; by default its path.
        dtype: precision the model runs in, here and whenever the index is used.
        thumbnail: pixels of the longer side of the small pictures that are kept; 0: none.
        workers: threads that read and decode pictures.
        batch_size: pictures the model sees at a time.
        max_bad_share: the share of rows or pictures that may be unusable (judged from 100 rows on).
        json: print what was added as JSON.
    """
    from openblip.api import load
    from openblip.search.index import create_index

    _check_filling(batch_size, thumbnail, workers)
    pipeline = load(model, dtype=dtype, batch_size=batch_size)
    _fill(
        create_index(index, pipeline, model), pipeline, data, how,
        name=name, thumbnail=thumbnail, workers=workers, max_bad_share=max_bad_share, json=json,
    )  # fmt: skip


def add(
    index: IndexPath,
    data: tuple[str, ...],
    model: str | None = None,
    name: str | None = None,
    thumbnail: int = 200,
    workers: int = 2,
    batch_size: int = 16,
    max_bad_share: float = 0.1,
    how: How = AS_USUAL,
    json: bool = False,
) -> None:
    """Add pictures to an index: those that are not in it yet. Stopped at any time, the same call goes on.

    Args:
        index: a folder, or a place in object storage.
        data: pictures, any layouts `openblip info` understands.
        model: the one the index was made with; where it was then, if not given.
        name: what the source is called in the index, if there is one; by default its path.
        thumbnail: pixels of the longer side of the small pictures that are kept; 0: none.
        workers: threads that read and decode pictures.
        batch_size: pictures the model sees at a time.
        max_bad_share: the share of rows or pictures that may be unusable (judged from 100 rows on).
        json: print what was added as JSON.
    """
    from openblip.search.index import open_index

    _check_filling(batch_size, thumbnail, workers)
    found = open_index(index)
    pipeline = _load(found, model, batch_size)
    _fill(
        found, pipeline, data, how,
        name=name, thumbnail=thumbnail, workers=workers, max_bad_share=max_bad_share, json=json,
    )  # fmt: skip


def delete(
    index: IndexPath,
    ids: tuple[str, ...] = (),
    source: str | None = None,
    where: str | None = None,
    json: bool = False,
) -> None:
    """Take pictures out of an index: those that fit everything that is given.

    Args:
        index: a folder, or a place in object storage.
        ids: of pictures; every source may have one of that id.
        source: name of the source they were added from (`openblip index stats`).
        where: a filter in SQL, such as "split = 'test'".
        json: print {deleted, pictures} as JSON.
    """
    from openblip.search.index import open_index

    found = open_index(index)
    gone = found.delete(ids=ids, source=source, where=where)
    answer = {"deleted": gone, "pictures": len(found)}
    print_answer(answer, json, lambda: as_lines(answer))


def stats(index: IndexPath, json: bool = False) -> None:
    """Say what is in an index: pictures by source and split, the model that made it, its indexes, its size.

    Args:
        index: a folder, or a place in object storage.
        json: print it as JSON.
    """
    from openblip.search.index import open_index

    found = open_index(index).stats()
    print_answer(found, json, lambda: as_lines(found))


Action = (
    Annotated[Any, subcommand("build", constructor=build)]
    | Annotated[Any, subcommand("add", constructor=add)]
    | Annotated[Any, subcommand("delete", constructor=delete)]
    | Annotated[Any, subcommand("stats", constructor=stats)]
)


def index(action: Annotated[Action, tyro.conf.arg(name="")]) -> None:
    """Make and keep an index of pictures to search in: build, add, delete, stats."""


def search(
    query: Query = "",
    model: str | None = None,
    data: str | None = None,
    index: str | None = None,
    image: Path | None = None,
    top: int = 10,
    rerank: int = 32,
    where: str | None = None,
    hybrid: bool = False,
    exact: bool = False,
    html: Path | None = None,
    how: How = AS_USUAL,
    json: bool = False,
) -> None:
    """Find the pictures that fit a text: by cosine first, the best of them by ITM logit + cosine (BLIP §5.1).

    Args:
        query: the text.
        model: a retrieval model (folder or hub name); with an index, the one it was made with, if not given.
        data: pictures to look through, any layout `openblip info` understands: each is embedded for this one search.
        index: an index of pictures, in place of data.
        image: find pictures like this one, in place of a text.
        top: how many to show.
        rerank: how many of the best by cosine the ITM head looks at; 0: none. CLIP has no such head.
        where: only pictures of an index that fit this filter in SQL, such as "split = 'train'".
        hybrid: look for the text's words in the captions of an index as well.
        exact: compare every vector, where an index would take a short cut.
        html: write a page with the pictures to this file.
        how: of `data`.
        json: print a list of {id, score, cosine} as JSON, with an index also captions, split and more.
    """
    from openblip.data.image import open_image
    from openblip.search.page import results_page

    if (data is None) == (index is None):
        raise UserError("search: give either --data, pictures to look through, or --index, an index of them")
    if bool(query) == (image is not None):
        raise UserError("search: give either a text or --image, a picture")
    at_least(1, top=top)
    at_least(0, rerank=rerank)
    if html is not None:
        check_file(html, "--html")
    asked = query if image is None else open_image(image)
    if index is not None:
        if how != AS_USUAL:
            raise UserError(
                "search: options of how data are read go with --data; filter an index with --where"
            )
        found, pictures, pipeline = _in_index(
            index, model, asked, top=top, rerank=rerank, where=where, hybrid=hybrid, exact=exact
        )
    else:
        if where is not None or hybrid or exact:
            raise UserError(
                "search: --where, --hybrid and --exact go with --index (openblip index build makes one)"
            )
        if model is None:
            raise UserError("search: --data wants a --model")
        found, pictures, pipeline = _in_data(str(data), model, asked, how, json, top=top, rerank=rerank)
    if html is not None:
        title = f"“{query}”" if image is None else f"Like {image.name}"
        page = results_page(title, found, pictures(), subtitle=f"{len(found)} pictures of {index or data}")
        html.write_text(page, encoding="utf-8")
    print_answer(found, json, lambda: _as_table(found))
    if rerank and image is None and not pipeline.can_match:
        print("this model has no ITM head: ranked by cosine alone", file=sys.stderr)
    if gone := sum(hit.get("judged") == "thumbnail" for hit in found):
        print(f"{gone} pictures are not where they were: judged by their thumbnails", file=sys.stderr)


def _in_index(
    path: str, model: str | None, asked: Any, **options: Any
) -> tuple[list[dict[str, Any]], Any, Any]:
    """(hits, how to get their pictures, the pipeline)."""
    from openblip.search.find import find
    from openblip.search.index import open_index
    from openblip.search.places import Places

    found, places = open_index(path), Places()
    pipeline = _load(found, model)
    hits = find(found, pipeline, asked, places=places, **options)

    def pictures() -> list[Any]:
        kept = zip(hits, found.thumbnails(hits), strict=True)
        return [small or places.open_if_there(hit["place"], hit["id"]) for hit, small in kept]

    return hits, pictures, pipeline


def _in_data(
    data: str, model: str, asked: Any, how: Reading, json: bool, **options: Any
) -> tuple[list[dict[str, Any]], Any, Any]:
    from openblip.api import load
    from openblip.data.rows import BadRows
    from openblip.search.scan import scan

    bad = BadRows()
    source = how.open(data, require_captions=False)
    pipeline = load(model)
    with progress("looking at every picture", json) as report:
        hits = scan(pipeline, source, asked, bad=bad, report=report, **options)
    say_skipped(bad)
    return hits, lambda: [source[hit["row"]].image for hit in hits], pipeline


def _load(index: "Index", model: str | None, batch_size: int = 16) -> Any:
    """The model an index was made with, from where it was then, or from `model`."""
    from openblip.api import load

    try:
        return load(model or index.made.model, dtype=index.made.dtype, batch_size=batch_size)
    except UserError as error:
        if model is not None:
            raise
        raise UserError(
            f"{index.path}: the model it was made with is not where it was: {error}; name it with --model"
        ) from None


def _check_filling(batch_size: int, thumbnail: int, workers: int) -> None:
    """Before the work. Raises UserError: a number that makes no sense."""
    at_least(1, batch_size=batch_size)
    at_least(0, thumbnail=thumbnail, workers=workers)


def _fill(
    index: "Index",
    pipeline: Any,
    data: tuple[str, ...],
    how: Reading,
    *,
    name: str | None,
    max_bad_share: float,
    json: bool,
    **options: Any,
) -> None:
    from collections import Counter

    from openblip.data.rows import BadRows
    from openblip.search.fill import add

    if not data:
        raise UserError("index: no data given")
    if name is not None and len(data) > 1:
        raise UserError("index: --name is for one source; add the others by calls of their own")
    listed = None if "://" in index.path else Path(index.path) / "bad_rows.jsonl"
    total: Counter[str] = Counter(added=0, known=0, rows=0)
    unusable: Counter[str] = Counter()
    for one in data:
        bad = BadRows(listed, max_bad_share)
        with progress(f"adding {one}", json) as report:
            done = add(index, pipeline, one, name=name, reading=vars(how), bad=bad, report=report, **options)
        say_skipped(bad, listed)
        total.update(added=done.pictures, known=done.known, rows=done.rows)
        unusable.update(done.bad)
    index.tend()
    answer = {**total, "bad": dict(unusable), "pictures": len(index)}
    print_answer(answer, json, lambda: as_lines({key: value for key, value in answer.items() if value != {}}))


def _as_table(hits: list[dict[str, Any]]) -> str:
    """A line for each hit: score, cosine, id, and its first caption if there is one."""
    width = max((len(hit["id"]) for hit in hits), default=0)
    lines = []
    for hit in hits:
        said = (hit.get("captions") or [""])[0]
        lines.append(f"{hit['score']:8.3f} {hit['cosine']:7.3f}  {hit['id']:{width}}  {said}".rstrip())
    return "\n".join([f"{'score':>8} {'cosine':>7}  id", *lines])
