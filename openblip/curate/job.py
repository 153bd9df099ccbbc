"""The folder of a CapFilt job: which files there are, and how they get there whole.

    scores-<shard>.parquet    one line per text: `SCHEMA`
    scores-<shard>.json       its manifest: the shard is done. Written last
    quarantine-<shard>.json   instead: why the shard was put aside
    bad_rows.jsonl            rows and pictures that could not be used: reason, where, detail
    models.json               what the models' files hold, so that they need not be read again; see `loading`
    progress.html             how far it is

Files are written beside and renamed, so what bears the name is whole.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from openblip.config import UserError, differences, load_json, to_dict

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),  # its number in the shard
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
BINS = 100  # of P(match) in a manifest


@dataclass(frozen=True)
class BadEntry:
    """A row that could not be used."""

    reason: str
    where: str
    detail: str


@dataclass(frozen=True)
class ShardManifest:
    """What is known of a finished shard.

    rows: looked at, good and bad; sha256: of the parquet file; web_match: how many web texts have their P(match) in
    each of `BINS` equal parts of 0…1.
    """

    shard: str
    rows: int
    images: int
    texts: int
    sha256: str
    fingerprint: dict[str, Any]
    bad: list[BadEntry] = field(default_factory=list)
    web_match: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Quarantine:
    """Why a shard was put aside: one line, and all there is to say. fingerprint: as of a manifest."""

    shard: str
    reason: str
    fingerprint: dict[str, Any]
    detail: str = ""


class PublishError(UserError):
    """The job's folder takes no more: the disk is full, or it must not be written."""


def job_folder(out: str | Path) -> Path:
    """The folder, made if it is not there. Raises PublishError: it cannot be."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PublishError(f"{folder}: cannot be made ({error.strerror or error})") from None
    return folder


def refuse_other(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Raise UserError if what `folder` holds was made with other settings than it now would; it names them."""
    if found := differences(before, now):
        raise UserError(f"{folder}: holds a job made otherwise: {'; '.join(found)}; use a new folder")


def is_full(error: BaseException | None) -> bool:
    """Whether an error says that a disk is full or must not be written: no shard's fault."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def manifests(job: str | Path) -> list[ShardManifest]:
    """Those of the finished shards of a job, by name; an empty list for a folder without any."""
    return [_checked(path) for path in sorted(Path(job).glob("scores-*.json"))]


def read_manifest(job: Path, shard: str) -> ShardManifest | None:
    """That of one shard; None if it is not finished."""
    path = scores_path(job, shard).with_suffix(".json")
    return _checked(path) if path.is_file() else None


def quarantined(job: str | Path) -> list[Quarantine]:
    """The shards of a job that were put aside, by name."""
    return [load_json(Quarantine, path) for path in sorted(Path(job).glob("quarantine-*.json"))]


def scores_path(job: str | Path, shard: str) -> Path:
    """Where the scored texts of a shard are."""
    return Path(job) / f"scores-{shard}.parquet"


def is_whole(folder: Path, manifest: ShardManifest) -> bool:
    """Whether the scores are those the manifest speaks of; a lost or damaged file is made again.

    A file that is older than its manifest, as it was written, is believed; any other is hashed. Whoever reads
    scores hashes them in any case.
    """
    path = scores_path(folder, manifest.shard)
    try:
        if path.stat().st_mtime_ns <= path.with_suffix(".json").stat().st_mtime_ns:
            return True
        return hashlib.sha256(path.read_bytes()).hexdigest() == manifest.sha256
    except FileNotFoundError:
        return False


def put_aside(folder: Path, aside: Quarantine) -> None:
    """Publish why a shard is in quarantine. Raises PublishError."""
    text = json.dumps(to_dict(aside), indent=2, ensure_ascii=False) + "\n"
    publish(folder / f"quarantine-{aside.shard}.json", text.encode("utf-8", "backslashreplace"))


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """A block that writes `.name.part` and renames it: what the disk refuses is a PublishError, and leaves nothing."""
    try:
        yield
    except OSError as error:
        shutil.rmtree(folder.with_name(f".{folder.name}.part"), ignore_errors=True)
        raise PublishError(
            f"{folder}: cannot be written ({error.strerror or error}); the same call goes on"
        ) from error


def publish(path: Path, content: bytes) -> None:
    """Write a file in one step that survives a crash: beside, to the disk, then renamed.

    Raises PublishError: it cannot be written; nothing of it is left.
    """
    part = path.with_name(
        f".{path.name}.{uuid.uuid4().hex[:12]}.part"
    )  # two machines may be at the same file
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # the first error says what is wrong with the folder
            part.unlink(missing_ok=True)
        raise PublishError(
            f"{path.parent}: cannot be written ({error.strerror or error}): {path.name} is not there, what is "
            "finished stays, and the same call goes on from it"
        ) from error


def _checked(path: Path) -> ShardManifest:
    return load_json(ShardManifest, path)
