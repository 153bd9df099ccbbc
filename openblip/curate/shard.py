"""One shard of a CapFilt job, the worker of every engine: read, decode, caption, score, publish.

A shard's own result depends on nothing but the models, the configuration and its rows, all of which are in its
manifest; who made it, when, and how often it was begun leave no trace. What is published, and where: see `job`.
"""

import hashlib
import io
import json
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from openblip.config import UserError, to_dict
from openblip.curate.capfilt import CapFilt
from openblip.curate.job import (
    BINS,
    SCHEMA,
    BadEntry,
    PublishError,
    Quarantine,
    ShardManifest,
    is_full,
    publish,
    put_aside,
    scores_path,
)
from openblip.data.collate import picture_key
from openblip.data.image import BadImage, open_image
from openblip.data.loader import prefetch
from openblip.data.row_range import Rows
from openblip.data.rows import BadRow, Row
from openblip.data.shards import InShards

MIN_SEEN = 100  # a shard of fewer rows is not judged by its share of bad ones
Seconds = dict[str, float]  # by phase
PHASES = ("read", "decode", "caption", "score", "write")


@dataclass(frozen=True)
class Outcome:
    """What became of a shard: one of the first two. seconds: of each of `PHASES`, background threads included."""

    done: ShardManifest | None
    aside: Quarantine | None
    seconds: dict[str, float]


@dataclass(frozen=True)
class Work:
    """What to do with a shard.

    max_bad_share: the share of its rows or pictures that may be unusable; of more, the shard is put aside, once that is
        certain (one of fewer than `MIN_SEEN` rows is not).
    decoders: threads that read and decode while the model works.
    """

    folder: Path
    batch_size: int = 32
    max_bad_share: float = 0.1
    decoders: int = 1


def check_work(batch_size: int, decoders: int, max_bad_share: float = 0.1) -> None:
    """Raise UserError for numbers that no shard could be worked on with; see `Work`."""
    if batch_size < 1 or decoders < 1:
        raise UserError(f"batch_size and decoders are at least 1, got {batch_size} and {decoders}")
    if not 0 <= max_bad_share <= 1:
        raise UserError(f"max_bad_share is a share between 0 and 1, got {max_bad_share}")


@dataclass(frozen=True)
class Batch:
    """Some rows of a shard, opened; `numbers` says which of them are good."""

    numbers: list[int]
    rows: list[Row]
    images: list[Image.Image] | None  # None: features are looked up instead
    bad: list[BadEntry]
    seconds: Seconds


@dataclass(frozen=True)
class OpenedShard:
    """A shard whose first batch is there; or what was raised on the way."""

    shard: str
    rows: Rows | None
    first: Batch | None
    error: Exception | None
    seconds: Seconds


def fingerprint_of(capfilt: dict[str, Any], source: InShards, shard: str) -> dict[str, Any]:
    """What a shard's result depends on, as JSON: models and configuration (`CapFilt.fingerprint`), rows."""
    found: dict[str, Any] = json.loads(json.dumps({**capfilt, "source": source.identity(shard)}))
    return found


def open_shard(capfilt: CapFilt, source: InShards, shard: str, work: Work) -> OpenedShard:
    """Open a shard and its first batch; what is wrong is told, not raised, so that a thread may do it ahead of time."""
    seconds: Seconds = {}
    try:
        with _timed(seconds, "read"):
            rows = source.part(shard)
        first = open_batch(capfilt, rows, 0, min(work.batch_size, len(rows)))
    except Exception as error:
        return OpenedShard(shard, None, None, error, seconds)
    return OpenedShard(shard, rows, first, None, seconds)


def process_shard(
    capfilt: CapFilt,
    source: InShards,
    shard: str,
    work: Work,
    opened: OpenedShard | None = None,
    tell: Callable[[int], None] | None = None,
) -> Outcome:
    """Caption and score a shard and publish it, or put it aside: whatever is wrong with it is its own affair.

    opened: by `open_shard`, ahead of time. tell: called with the number of rows done after each batch.
    Raises PublishError: the folder takes no more, so no other shard would fare better.
    """
    fingerprint = fingerprint_of(capfilt.fingerprint, source, shard)
    opened = opened or open_shard(capfilt, source, shard, work)
    seconds = dict(opened.seconds)
    try:
        if opened.error is not None:
            raise opened.error
        records, images, bad, rows = _judge_all(capfilt, opened, work, seconds, tell)
    except Exception as error:
        if is_full(error) or is_full(error.__cause__):
            raise PublishError(f"{_line(str(error))}: the same call goes on when there is room") from error
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        aside = Quarantine(shard, _line(reason), fingerprint, "".join(traceback.format_exception(error)))
        put_aside(work.folder, aside)
        return Outcome(None, aside, seconds)
    with _timed(seconds, "write"):
        done = _publish_shard(work.folder, shard, records, images, bad, rows, fingerprint)
    return Outcome(done, None, seconds)


def _judge_all(
    capfilt: CapFilt, opened: OpenedShard, work: Work, seconds: Seconds, tell: Callable[[int], None] | None
) -> tuple[list[dict[str, Any]], int, list[BadEntry], int]:
    """(lines of `SCHEMA`, number of good pictures, bad rows, number of rows) of a shard."""
    rows = opened.rows
    assert rows is not None and opened.first is not None
    records: list[dict[str, Any]] = []
    bad: list[BadEntry] = []
    images = seen = 0
    for batch in _batches(capfilt, rows, opened.first, work):
        for phase, spent in batch.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + spent
        bad += batch.bad
        for entry in batch.bad:
            if entry.reason == "truncated_tar":  # nobody knows how much is missing
                raise UserError(f"{entry.where}: {entry.detail}")
        images += len(batch.rows)
        seen += len(batch.rows) + len(batch.bad)
        if len(rows) >= MIN_SEEN and len(bad) > work.max_bad_share * len(rows):
            counts = ", ".join(f"{name} {n}" for name, n in Counter(one.reason for one in bad).most_common())
            raise UserError(
                f"{len(bad)} bad rows among {seen} of {len(rows)} ({counts}): more than the share of "
                f"{work.max_bad_share:g} that max_bad_share allows; the last is {bad[-1].where}: {bad[-1].detail}"
            )
        records += judge(capfilt, batch, seconds)
        if tell is not None:
            tell(seen)
    return records, images, bad, len(rows)


def _batches(capfilt: CapFilt, rows: Rows, first: Batch, work: Work) -> Iterator[Batch]:
    """All batches of a shard; threads are ahead with the next ones while the model has one."""
    size = work.batch_size
    pieces = [(start, min(start + size, len(rows))) for start in range(size, len(rows), size)]
    rest = prefetch(lambda piece: open_batch(capfilt, rows, *piece), pieces, workers=work.decoders)
    try:
        yield first
        yield from rest
    finally:
        rest.close()


def open_batch(capfilt: CapFilt, rows: Rows, start: int, stop: int) -> Batch:
    """Read rows and decode their pictures; what is bad is told, not raised. Runs in a thread of its own."""
    batch = Batch([], [], None if capfilt.features is not None else [], [], {})
    for number in range(start, stop):
        where = f"row {number}"
        try:
            with _timed(batch.seconds, "read"):
                row = rows[number]
                where, picture = row.where, row.image
                if capfilt.features is not None:
                    capfilt.features.lookup(picture_key(row))  # refuses what was bad when they were computed
                elif not isinstance(picture, str | bytes):
                    picture = _read(picture)
            if batch.images is not None:
                with _timed(batch.seconds, "decode"):
                    batch.images.append(open_image(picture, draft_size=capfilt.draft_size))
        except BadRow as error:
            batch.bad.append(BadEntry(error.reason, error.where, error.detail))
        except BadImage as error:
            batch.bad.append(BadEntry(error.reason, where, error.detail))
        else:
            batch.numbers.append(number)
            batch.rows.append(row)
    return batch


def _read(picture: Any) -> bytes:
    try:
        content: bytes = picture.read()
    except OSError as error:
        raise BadImage("unreadable", f"{picture}: {error.strerror or error}") from error
    return content


def judge(capfilt: CapFilt, batch: Batch, seconds: Seconds) -> list[dict[str, Any]]:
    """Lines of `SCHEMA` for a batch; rows of one picture speak as the first of them."""
    if not batch.rows:
        return []
    first: dict[str, tuple[int, Row]] = {}
    for number, row in zip(batch.numbers, batch.rows, strict=True):
        first.setdefault(row.id, (number, row))
    with _timed(seconds, "caption"):
        embeds = capfilt.embed(batch.rows, batch.images)
        written = capfilt.write(batch.rows, embeds)
    with _timed(seconds, "score"):
        scored = capfilt.score(batch.rows, written, embeds)
    records = []
    for text in scored:
        number, row = first[text.id]
        image = None if isinstance(row.image, bytes) else str(row.image)
        place = {"row": number, "where": row.where, "image": image}
        models = {
            "captioner": text.captioner or capfilt.models["captioner"],
            "filter": capfilt.models["filter"],
        }
        records.append({**text.record(), **models, **place})
    return records


def _publish_shard(
    folder: Path,
    shard: str,
    records: list[dict[str, Any]],
    images: int,
    bad: list[BadEntry],
    rows: int,
    fingerprint: dict[str, Any],
) -> ShardManifest:
    """Scores first, manifest last: a shard with a manifest is complete."""
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records, schema=SCHEMA), file, compression="zstd")
    content = file.getvalue()
    digest = hashlib.sha256(content).hexdigest()
    web = np.array([line["match"] for line in records if line["kind"] == "web"])
    bins = np.bincount((web * BINS).astype(int).clip(0, BINS - 1), minlength=BINS).tolist()
    manifest = ShardManifest(shard, rows, images, len(records), digest, fingerprint, bins, bad)
    publish(scores_path(folder, shard), content)
    text = json.dumps(to_dict(manifest), indent=2, ensure_ascii=False) + "\n"
    publish(scores_path(folder, shard).with_suffix(".json"), text.encode())
    (folder / f"quarantine-{shard}.json").unlink(missing_ok=True)
    return manifest


@contextmanager
def _timed(seconds: Seconds, phase: str) -> Iterator[None]:
    begun = time.perf_counter()
    try:
        yield
    finally:
        seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - begun


def _line(text: str) -> str:
    return " ".join(text.split())[:500]
