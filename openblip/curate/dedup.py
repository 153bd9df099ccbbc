"""Pictures that look the same, found before any model sees them: of each, the first in the source stays.

    keep-<shard>.npy    numbers of the rows that stay, [n] int64
    hashes-<shard>.npy  perceptual hashes of a shard's pictures, so that an interrupted search goes on

The hash is imagehash's pHash: 64 bits of a picture's low frequencies, which survive scaling and compression.
It sees no colours: flat drawings that differ in them alone are taken for one.
Rows of equal ids show the same picture (`Row.id`): they stay, or are left out, together.
`pip install "openblip[curate]"` brings it.
"""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np

from openblip.config import UserError
from openblip.curate.job import publish
from openblip.data.collate import image_id
from openblip.data.image import BadImage, open_image
from openblip.data.loader import prefetch
from openblip.data.row_range import Rows
from openblip.data.rows import BadRow, Row
from openblip.data.shards import InShards, Named

MOST = 8  # bits; beyond, different pictures are taken for one
_HASHED = np.dtype([("row", "i8"), ("id", "i8"), ("hash", "u8")])


class KeptRows:
    """A source without the rows that `deduplicate` found to be seen before. Safe to pickle."""

    def __init__(self, source: InShards, folder: Path) -> None:
        self.source, self.folder = source, folder

    @property
    def path(self) -> str:
        """That of the source."""
        return self.source.path

    def shards(self) -> "list[Named]":
        """Those of the source."""
        return list(self.source.shards())

    def part(self, shard: str) -> "ChosenRows":
        """The rows of a shard that stay. Raises UserError: it could not be opened when duplicates were looked for."""
        rows, file = self.source.part(shard), _keep(self.folder, shard)
        if not file.is_file():
            raise UserError(
                f"{shard}: could not be opened when duplicates were looked for, and now it can; retry"
            )
        return ChosenRows(rows, np.load(file))

    def identity(self, shard: str) -> str:
        """Of the shard, and of which rows stay."""
        file = _keep(self.folder, shard)
        chosen = file.read_bytes() if file.is_file() else b""
        return hashlib.sha256(self.source.identity(shard).encode() + chosen).hexdigest()


class ChosenRows:
    """Some rows of others, in order."""

    def __init__(self, rows: Rows, numbers: np.ndarray) -> None:
        self.rows, self.numbers = rows, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int, /) -> Row:
        return self.rows[int(self.numbers[index])]


def deduplicate(
    source: InShards,
    folder: Path,
    distance: int = 0,
    *,
    workers: int = 1,
    report: Callable[[int, int], None] | None = None,
) -> tuple[KeptRows, int]:
    """Look at every picture of a source; what is left, and how many rows look like an earlier one of another id.

    Rows and pictures that cannot be used stay, to be met and counted with the others. Memory: about two hundred bytes
    a picture, with a distance above 0 several hundred.

    Args:
        folder: the job's. distance: bits in which the hashes of equal pictures may differ, 0 to `MOST`.
        workers: threads that decode. report: called with (shards looked at, shards in all).

    Raises:
        UserError: no imagehash, or an impossible distance.
    """
    if not 0 <= distance <= MOST:
        raise UserError(f"the distance of equal pictures is 0 to {MOST} bits, got {distance}")
    try:
        import imagehash
    except ImportError:
        raise UserError(
            'de-duplication needs the package imagehash: pip install "openblip[curate]"'
        ) from None

    def picture_hash(row: Row) -> int:
        return int(str(imagehash.phash(open_image(row.image, draft_size=32))), 16)

    names = [shard.name for shard in source.shards()]
    seen = _Seen(distance)
    found = prefetch(lambda name: _hashes(source, name, folder, picture_hash), names, workers)
    dropped = 0
    for done, (name, looked) in enumerate(zip(names, found, strict=True), 1):
        path, file = _keep(folder, name), io.BytesIO()
        if looked is None:
            path.unlink(missing_ok=True)
        else:
            rows, hashes = looked
            again = [row for row, owner, value in hashes.tolist() if seen.before(value, owner)]
            dropped += len(again)
            np.save(file, np.setdiff1d(np.arange(rows), np.array(again, np.int64)))
            if not path.is_file() or path.read_bytes() != file.getvalue():
                publish(path, file.getvalue())
        if report is not None:
            report(done, len(names))
    return KeptRows(source, folder), dropped


class _Seen:
    """Hashes so far, and whose they are. Two that differ in at most d bits are equal in one of their d + 1 bands."""

    def __init__(self, distance: int) -> None:
        self.distance = distance
        self.cuts = np.linspace(0, 64, distance + 2).round().astype(int).tolist()
        self.bands: list[dict[int, list[int]]] = [{} for _ in range(distance + 1)]
        self.owners: dict[int, int] = {}  # hash -> number of the id it was first seen with

    def before(self, value: int, owner: int) -> bool:
        """Whether one like this was seen with another id; if not, now it is."""
        if value in self.owners:
            return self.owners[value] != owner
        if self.distance:
            keys = [value >> low & (1 << high - low) - 1 for low, high in zip(self.cuts, self.cuts[1:])]
            for band, key in zip(self.bands, keys, strict=True):
                near = [one for one in band.get(key, ()) if (value ^ one).bit_count() <= self.distance]
                if any(self.owners[one] != owner for one in near):
                    return True
            for band, key in zip(self.bands, keys, strict=True):
                band.setdefault(key, []).append(value)
        self.owners[value] = owner
        return False


def _hashes(
    source: InShards, shard: str, folder: Path, picture_hash: Callable[[Row], int]
) -> tuple[int, np.ndarray] | None:
    """(number of rows, [n] of `_HASHED`) of a shard; None if it cannot be opened, which the job will find and say."""
    path = folder / f"hashes-{shard}.npy"
    identity = source.identity(shard)
    if path.is_file():
        with path.open("rb") as file:
            if str(np.load(file)) == identity:
                count, hashes = int(np.load(file)), np.load(file)
                if hashes.dtype == _HASHED:  # older files do not say whose the hashes are
                    return count, hashes
    try:
        rows = source.part(shard)
    except Exception:  # whatever it is: `KeptRows.part` meets it again, and the shard is put aside with it
        return None
    found = []
    for number in range(len(rows)):
        try:
            row = rows[number]
            found.append((number, image_id(row), picture_hash(row)))
        except (BadRow, BadImage):
            continue
    hashes, content = np.array(found, _HASHED), io.BytesIO()
    for part in (np.array(identity), np.array(len(rows)), hashes):
        np.save(content, part)
    publish(path, content.getvalue())
    return len(rows), hashes


def _keep(folder: Path, shard: str) -> Path:
    return folder / f"keep-{shard}.npy"
