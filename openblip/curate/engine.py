"""The job around CapFilt: a source in, shard by shard, scored texts out; interrupted at any time, it goes on.

A job is a folder:

    scores-<shard>.parquet   one line per text: `SCHEMA`
    scores-<shard>.json      its manifest: the shard is done. Written last
    bad_rows.jsonl           rows and pictures that could not be used: reason, where, detail

Both files of a shard are written beside and renamed, so what bears the name is whole. A shard's own result
depends on nothing but the models, the configuration and the source, all of which are in the manifest.
"""

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from openblip.config import UserError, differences, load_json, to_dict
from openblip.curate.capfilt import CapFilt
from openblip.data.collate import picture_key
from openblip.data.image import BadImage, open_image
from openblip.data.loader import prefetch
from openblip.data.rows import BadRow, BadRows, Row
from openblip.data.sources import Shard, Source

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),  # its number in the source
        ("id", pa.string()),  # of the image
        ("where", pa.string()),  # file and line of the row
        ("image", pa.string()),  # path; null if the source holds the bytes
        ("kind", pa.string()),  # "web" or "synthetic"
        ("text", pa.string()),
        ("itm", pa.float64()),  # P(match) of the ITM head
        ("itc", pa.float64()),  # cosine
        ("match", pa.float64()),  # P(match), of the heads `CapFiltConfig.scale` names: what is decided by
        ("seed", pa.int64()),  # of a synthetic text; null for the web's
        ("captioner", pa.string()),  # hash of the model
        ("filter", pa.string()),
    ]
)


@dataclass(frozen=True)
class BadEntry:
    """A row that could not be used."""

    reason: str
    where: str
    detail: str


@dataclass(frozen=True)
class ShardManifest:
    """What is known of a finished shard. rows: looked at, good and bad; sha256: of the parquet file."""

    shard: str
    rows: int
    images: int
    texts: int
    sha256: str
    fingerprint: dict[str, Any]
    bad: list[BadEntry] = field(default_factory=list)


@dataclass(frozen=True)
class JobResult:
    """A finished job. `found_done` of its `shards` had been finished before; `bad` counts rows by reason."""

    folder: Path
    shards: int
    found_done: int
    rows: int
    images: int
    texts: int
    bad: dict[str, int]


@dataclass(frozen=True)
class _Batch:
    """Rows start to stop of the source, opened; `numbers` says which of them are good."""

    start: int
    stop: int
    numbers: list[int]
    rows: list[Row]
    images: list[Image.Image] | None  # None: features are looked up instead
    bad: list[BadEntry]


def run(
    capfilt: CapFilt,
    source: Source,
    out: str | Path,
    *,
    batch_size: int = 32,
    max_bad_share: float = 0.1,
    progress: Callable[[int, int], None] | None = None,
) -> JobResult:
    """Caption and score every picture of a source. Shards that are done already cost no model call.

    Args:
        out: the job's folder, new or that of an interrupted run.
        max_bad_share: the share of rows or pictures that may be unusable (judged from 100 rows on).
        progress: called with (rows done, rows in all) after each batch.

    Raises:
        UserError: the folder holds a job with other models, another configuration or source; too many bad
            rows; no usable picture at all.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is at least 1, got {batch_size}")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    fingerprint = json.loads(json.dumps({**capfilt.fingerprint, "source": source.fingerprint}))
    before = manifests(folder)
    for manifest in before:
        refuse_other(manifest.fingerprint, fingerprint, folder)
    for left_behind in folder.glob(".*.part"):  # by a run that was killed while writing
        left_behind.unlink()
    done = {manifest.shard: manifest for manifest in before if _is_whole(folder, manifest)}

    shards = source.shards()
    bad = BadRows(folder / "bad_rows.jsonl", max_bad_share)
    bad.saw(sum(manifest.rows for manifest in done.values()))
    bad.counts = Counter(entry.reason for manifest in done.values() for entry in manifest.bad)
    _list_bad(folder, shards, done)  # an interrupted run had begun to list more
    waiting = [shard for shard in shards if shard.name not in done]
    pieces = [
        (start, min(start + batch_size, shard.stop))
        for shard in waiting
        for start in range(shard.start, shard.stop, batch_size)
    ]
    # One thread decodes, across the borders of shards, while the model works.
    batches = prefetch(lambda piece: _open_batch(capfilt, source, *piece), pieces, workers=1)
    try:
        for shard in waiting:
            records: list[dict[str, Any]] = []
            entries: list[BadEntry] = []
            images = 0
            for start in range(shard.start, shard.stop, batch_size):
                batch = next(batches)
                assert batch.start == start
                bad.saw(batch.stop - batch.start)
                for entry in batch.bad:
                    bad.add(entry.reason, entry.where, entry.detail)
                records += _judge(capfilt, batch)
                entries += batch.bad
                images += len(batch.rows)
                if progress is not None:
                    progress(bad.seen, len(source))
            done[shard.name] = _publish_shard(folder, shard, records, images, entries, fingerprint)
    finally:
        batches.close()
    _list_bad(folder, shards, done)
    result = JobResult(
        folder,
        shards=len(shards),
        found_done=len(shards) - len(waiting),
        rows=sum(manifest.rows for manifest in done.values()),
        images=sum(manifest.images for manifest in done.values()),
        texts=sum(manifest.texts for manifest in done.values()),
        bad=dict(bad.counts),
    )
    if not result.texts:
        raise UserError(f"{source.path}: no row of {result.rows} can be used: {bad.summary()}")
    return result


def manifests(job: str | Path) -> list[ShardManifest]:
    """Those of the finished shards of a job, by name; an empty list for a folder without any."""
    return [load_json(ShardManifest, path) for path in sorted(Path(job).glob("scores-*.json"))]


def scores_path(job: str | Path, shard: str) -> Path:
    """Where the scored texts of a shard are."""
    return Path(job) / f"scores-{shard}.parquet"


def publish(path: Path, content: bytes) -> None:
    """Write a file in one step that survives a crash: beside, to the disk, then renamed."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _open_batch(capfilt: CapFilt, source: Source, start: int, stop: int) -> _Batch:
    """Read rows and decode their pictures; what is bad is told, not raised. Runs in a thread of its own."""
    transforms = (capfilt.captioner.transform, capfilt.filter.transform)
    draft_size = max(transform.draft_size for transform in transforms)
    batch = _Batch(start, stop, [], [], None if capfilt.features is not None else [], [])
    for number in range(start, stop):
        where = f"row {number}"
        try:
            row = source[number]
            where = row.where
            if capfilt.features is not None:
                capfilt.features.lookup(picture_key(row))  # refuses what was bad when features were computed
            if batch.images is not None:
                batch.images.append(open_image(row.image, draft_size=draft_size))
        except BadRow as error:
            batch.bad.append(BadEntry(error.reason, error.where, error.detail))
        except BadImage as error:
            batch.bad.append(BadEntry(error.reason, where, error.detail))
        else:
            batch.numbers.append(number)
            batch.rows.append(row)
    return batch


def _judge(capfilt: CapFilt, batch: _Batch) -> list[dict[str, Any]]:
    """Lines of `SCHEMA` for a batch; rows of one picture speak as the first of them."""
    if not batch.rows:
        return []
    first: dict[str, tuple[int, Row]] = {}
    for number, row in zip(batch.numbers, batch.rows, strict=True):
        first.setdefault(row.id, (number, row))
    records = []
    for text in capfilt(batch.rows, capfilt.embed(batch.rows, batch.images)):
        number, row = first[text.id]
        image = None if isinstance(row.image, bytes) else str(row.image)
        place = {"row": number, "where": row.where, "image": image}
        records.append({**text.record(), **capfilt.models, **place})
    return records


def _publish_shard(
    folder: Path,
    shard: Shard,
    records: list[dict[str, Any]],
    images: int,
    bad: list[BadEntry],
    fingerprint: dict[str, Any],
) -> ShardManifest:
    """Scores first, manifest last: a shard with a manifest is complete."""
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records, schema=SCHEMA), file, compression="zstd")
    content = file.getvalue()
    digest = hashlib.sha256(content).hexdigest()
    manifest = ShardManifest(
        shard.name, shard.stop - shard.start, images, len(records), digest, fingerprint, bad
    )
    publish(scores_path(folder, shard.name), content)
    text = json.dumps(to_dict(manifest), indent=2, ensure_ascii=False) + "\n"
    publish(scores_path(folder, shard.name).with_suffix(".json"), text.encode())
    return manifest


def _is_whole(folder: Path, manifest: ShardManifest) -> bool:
    """Whether the scores are those the manifest speaks of; a lost or damaged file is made again."""
    path = scores_path(folder, manifest.shard)
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == manifest.sha256


def _list_bad(folder: Path, shards: Sequence[Shard], done: dict[str, ShardManifest]) -> None:
    """Write bad_rows.jsonl anew: what the finished shards say, in the order of the source."""
    entries = [entry for shard in shards if shard.name in done for entry in done[shard.name].bad]
    lines = "".join(json.dumps(to_dict(entry)) + "\n" for entry in entries)
    publish(folder / "bad_rows.jsonl", lines.encode())


def refuse_other(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Raise UserError if what `folder` holds was made with other settings than it now would; it names them."""
    if found := differences(before, now):
        raise UserError(f"{folder}: holds a job made otherwise: {'; '.join(found)}; use a new folder")
