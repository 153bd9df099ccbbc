"""Pictures into an index: read, decoded and embedded at the same time, published block by block.

Three stages, each at work while the others are: one thread reads rows and asks which pictures are there already, some
decode, and the model embeds in the caller's. A block is published at once or not at all, so a run that was killed has
lost the block it was at, and the same call goes on behind the last one.
"""

import contextlib
import io
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from openblip.api import Pipeline
from openblip.config import UserError
from openblip.data.image import BadImage, open_image
from openblip.data.loader import prefetch
from openblip.data.rows import BadRow, BadRows, Row, printable
from openblip.data.sources import Source, open_source
from openblip.search.index import Index
from openblip.search.places import absolute, place_of

BLOCK = 1024  # pictures published at once
THUMBNAIL = 200  # pixels of its longer side


@dataclass
class Added:
    """What came of adding a source: pictures added, those there before, rows read, and what could not be used."""

    pictures: int = 0
    known: int = 0
    rows: int = 0
    bad: dict[str, int] = field(default_factory=dict)


@dataclass
class _Block:
    """What was read for one version of the table. read: rows of the source up to here; rows: pictures to add."""

    read: int
    known: int = 0
    rows: list[Row] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)


@dataclass
class _Batch:
    """Some pictures of a block, decoded: pixel_values [B, 3, S, S], None without any; of the last, the block."""

    block: _Block | None
    rows: list[Row] = field(default_factory=list)
    pixel_values: np.ndarray | None = None
    thumbnails: list[bytes | None] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)


def add(
    index: Index,
    pipeline: Pipeline,
    data: str | os.PathLike[str],
    *,
    name: str | None = None,
    reading: Mapping[str, Any] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    thumbnail: int = THUMBNAIL,
    block: int = BLOCK,
    workers: int = 2,
    bad: BadRows | None = None,
    report: Callable[[int, int], None] | None = None,
) -> Added:
    """Embed the pictures of a source that are not there yet, and add them.

    A picture is known by its id: rows that follow each other with the same id are one picture with all their captions;
    a later one adds nothing, nor does a picture that changed under its name. Of a row with several pictures the first
    is taken. `Index.tend` comes afterwards.

    Args:
        data: anything `open_source` reads; captions are not required.
        name: of the source in the index; by default its path, so that equal names in other folders are other pictures.
        reading: options of `open_source`: split, image_column, caption_column, image_root.
        thumbnail: pixels of its longer side; 0 keeps none.
        block: pictures published at once.
        workers: threads that decode.
        bad: counts and lists rows and pictures that cannot be used; by default a tenth of them may be so.
        report: called with (rows read, rows in all) after each batch.

    Raises:
        UserError: another model's index, no such data, too many bad rows, another process is adding to this index.
    """
    if block < 1 or min(thumbnail, workers) < 0:
        raise UserError(
            f"add: block is at least 1, thumbnail and workers are not negative, got {block}, {thumbnail} and {workers}"
        )
    index.refuse_other(pipeline)
    options = {key: value for key, value in (reading or {}).items() if value is not None}
    if "image_root" in options:
        options["image_root"] = absolute(os.fspath(options["image_root"]))
    source = open_source(data, **options, require_captions=False, cache_dir=cache_dir)
    name = name or absolute(os.fspath(data))
    bad = BadRows() if bad is None else bad
    added, under_way = Added(), set[str]()
    lines, problems = list[dict[str, Any]](), list[BadRow]()
    pictures = _pictures(source)

    def read(_: int) -> _Block | None:
        found = list(itertools.islice(pictures, block))
        return _sift_(index, name, found, under_way) if found else None

    def decode(work: tuple[list[Row], _Block | None]) -> _Batch:
        return _decode(pipeline, *work, thumbnail)

    with index.writing(), contextlib.ExitStack() as stack:
        index.table.checkout_latest()  # others may have added before
        blocks = stack.enter_context(contextlib.closing(prefetch(read, itertools.count(), workers=1)))
        batches = prefetch(decode, _batches(blocks, pipeline.batch_size), workers)
        for batch in stack.enter_context(contextlib.closing(batches)):
            problems += batch.bad
            lines += _lines(pipeline, batch, name, options)
            done = batch.block
            if done is not None:
                bad.saw(done.read - added.rows)  # first: the share of bad ones is judged by it
                for problem in [*done.bad, *problems]:
                    bad.add(problem.reason, problem.where, problem.detail)
                added.pictures += index.append(lines) if lines else 0
                added.rows, added.known = done.read, added.known + done.known
                under_way.difference_update([row.id for row in done.rows])
                problems, lines = [], []
            if report is not None:
                report(min(added.rows + len(lines), len(source)), len(source))
    added.bad = dict(bad.counts)
    return added


def _pictures(source: Source) -> Iterator[tuple[int, Row | BadRow]]:
    """(rows read up to here, a picture as one row with the captions of all rows in a run with its id; or a bad row)."""
    current: Row | None = None
    for number in range(len(source)):
        try:
            row = source.light(number)
        except BadRow as error:
            yield number + 1, error
            continue
        if current is not None and row.id == current.id:
            current = replace(current, captions=list(dict.fromkeys([*current.captions, *row.captions])))
        else:
            if current is not None:
                yield number, current
            current = row
    if current is not None:
        yield len(source), current


def _sift_(index: Index, name: str, found: Sequence[tuple[int, Row | BadRow]], under_way: set[str]) -> _Block:
    """A block of what was found and is not there yet. `under_way` gains its ids, which the caller takes out again.

    Ids are looked for among those under way before they are in the table: what is published in between is in both.
    """
    block = _Block(found[-1][0])
    rows: dict[str, Row] = {}
    for _, one in found:
        if isinstance(one, BadRow):
            block.bad.append(one)
        elif one.id in under_way or one.id in rows:
            block.known += 1
        else:
            rows[one.id] = one
    missing = index.missing(name, list(rows))
    block.known += len(rows) - len(missing)
    block.rows = [row for id, row in rows.items() if id in missing]
    under_way |= missing
    return block


def _batches(blocks: Iterator[_Block | None], size: int) -> Iterator[tuple[list[Row], _Block | None]]:
    """The rows of blocks, up to `size` at a time; the last of each block come with it, if there are none by itself."""
    for block in blocks:
        if block is None:
            return
        parts = [block.rows[start : start + size] for start in range(0, len(block.rows), size)] or [[]]
        for number, part in enumerate(parts, start=1):
            yield part, block if number == len(parts) else None


def _decode(pipeline: Pipeline, rows: Sequence[Row], block: _Block | None, side: int) -> _Batch:
    batch, pixels = _Batch(block), []
    draft_size = max(pipeline.transform.draft_size, side)
    for row in rows:
        try:
            image = open_image(row.image, draft_size=draft_size)
        except BadRow as error:
            batch.bad.append(error)
        except BadImage as error:
            batch.bad.append(BadRow(error.reason, row.where, error.detail))
        else:
            batch.rows.append(row)
            pixels.append(pipeline.transform(image).numpy())
            batch.thumbnails.append(_thumbnail_(image, side) if side else None)
    if pixels:  # by numpy: torch.stack would start a team of compute threads in each of these
        batch.pixel_values = np.stack(pixels)
    return batch


def _thumbnail_(image: Image.Image, side: int) -> bytes:
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return file.getvalue()


def _lines(pipeline: Pipeline, batch: _Batch, name: str, reading: dict[str, Any]) -> list[dict[str, Any]]:
    if batch.pixel_values is None:
        return []
    vectors = embed_pixels(pipeline, torch.from_numpy(batch.pixel_values))
    return [
        {
            "source": name,
            "id": row.id,
            "vector": vector,
            "captions": row.captions,
            "split": row.split,
            "extra": _extra(row),
            "where": printable(row.where),
            "place": place_of(row, reading),
            "thumbnail": thumbnail,
        }
        for row, vector, thumbnail in zip(batch.rows, vectors, batch.thumbnails, strict=True)
    ]


@torch.inference_mode()
def embed_pixels(pipeline: Pipeline, pixel_values: torch.Tensor) -> np.ndarray:
    """What `Pipeline.embed_images` gives, of pictures that went through its transform [B, 3, S, S]."""
    embeds = pipeline.model.encode_image(pixel_values.to(pipeline.device, pipeline.dtype))
    return pipeline.matcher.image_features(embeds).float().cpu().numpy()


def _extra(row: Row) -> str | None:
    """The columns of a row that have no place of their own, as JSON that any reader takes."""
    found = row.extra if row.label is None else {**row.extra, "label": row.label}
    return json.dumps(_plain(found)) if found else None


def _plain(value: Any) -> Any:
    """A value as JSON can hold it: bytes are left out, what is not finite is null, all else unknown is text."""
    if isinstance(value, Mapping):
        return {printable(str(key)): _plain(one) for key, one in value.items() if not isinstance(one, bytes)}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value if not isinstance(one, bytes)]
    if isinstance(value, str):
        return printable(value)
    if value is None or isinstance(value, bool) or (isinstance(value, int) and abs(value) < 2**63):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return printable(str(value))
