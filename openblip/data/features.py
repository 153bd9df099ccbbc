"""What a frozen encoder makes of pictures, computed once and kept on disk.

A cache is a folder:

    features.bin     the embeds of all pictures, one after the other: [pictures, N, D]
    keys.json        the names of the pictures, in the same order
    features.json    the manifest: fingerprint, shape, and whether the cache is complete

While it is built, features.bin grows at its end and its length says how far it is, so whoever comes after a
crash goes on from there. Last of all, a manifest that says "complete" replaces the first, by a rename.
Readers map the file into memory: any number of processes share one copy.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from openblip.config import UserError, differences, load_json, save_json
from openblip.data.collate import Rows, open_picture, picture_key
from openblip.data.loader import prefetch
from openblip.data.rows import BadRow, BadRows
from openblip.data.transforms import ImageTransform

Precision = Literal["bfloat16", "float16", "float32"]
_ADVICE = "use another folder, or delete this one"
_STORED: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
}


@dataclass(frozen=True)
class Manifest:
    """What features.json holds; `keys` is the SHA-256 of keys.json."""

    fingerprint: dict[str, Any]
    keys: str
    shape: tuple[int, int, int]
    dtype: Precision
    complete: bool

    @property
    def picture_bytes(self) -> int:
        """Size of one picture's embeds on disk."""
        return self.shape[1] * self.shape[2] * _STORED[self.dtype].itemsize


class FeatureCache:
    """A complete cache, read only: embeds [N, D] of a picture by its number or its key.

    `shape` is (pictures, N, D), `keys` the name of each picture.

    Raises:
        UserError: there is no cache in `folder`, it is not complete or damaged, or it was made with another
            `fingerprint`; the message names what differs.
    """

    def __init__(self, folder: str | Path, fingerprint: dict[str, Any]) -> None:
        self.folder = Path(folder)
        manifest = _read_manifest(self.folder, fingerprint)
        if manifest is None:
            raise UserError(f"{self.folder}: there are no features here; build_features makes them")
        path, size = self.folder / "features.bin", manifest.shape[0] * manifest.picture_bytes
        found = path.stat().st_size if path.is_file() else 0
        if not manifest.complete:
            done = found // manifest.picture_bytes
            raise UserError(
                f"{self.folder}: only {done} of {manifest.shape[0]} pictures are done; build_features goes on"
            )
        keys = (self.folder / "keys.json").read_bytes()
        if found != size or hashlib.sha256(keys).hexdigest() != manifest.keys:
            raise UserError(f"{self.folder}: features.bin or keys.json is damaged; delete the folder")
        self.shape, self.dtype, self.keys = manifest.shape, manifest.dtype, json.loads(keys)
        self._numbers = {key: number for number, key in enumerate(self.keys)}
        self._embeds = np.memmap(path, _STORED[self.dtype], mode="r", shape=self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def get(self, index: int) -> Tensor:
        """Embeds [N, D] of picture number `index`: float32, a copy.

        Raises:
            BadRow: the picture could not be read when the cache was built.
        """
        if self.dtype == "bfloat16":  # the upper half of a float32
            embeds = (self._embeds[index].astype(np.uint32) << 16).view(np.float32)
        else:
            embeds = self._embeds[index].astype(np.float32)
        if np.isnan(embeds[0, 0]):
            raise BadRow("no_features", self.keys[index], "could not be read when its features were computed")
        return torch.from_numpy(embeds)

    def lookup(self, key: str) -> Tensor:
        """Embeds [N, D] of the picture with this key (`collate.picture_key`).

        Raises:
            BadRow: as `get`.
            UserError: there is no such picture.
        """
        if key not in self._numbers:
            raise UserError(f"{self.folder}: has no features of {key!r}; it was built from other rows")
        return self.get(self._numbers[key])


def build_features(
    folder: str | Path,
    fingerprint: dict[str, Any],
    rows: Rows,
    transform: ImageTransform,
    encode: Callable[[Tensor], Tensor],
    *,
    batch_size: int = 32,
    dtype: Precision = "bfloat16",
    workers: int = 0,
    bad: BadRows | None = None,
    report: Callable[[int, int], None] | None = None,
) -> FeatureCache:
    """Encode every distinct picture of `rows`, or what is missing of them, and open the cache.

    A second process waits for the first and then finds the work done.

    Args:
        folder: of this cache alone.
        fingerprint: all that the embeds depend on, as JSON values: the encoder (a hash of its weights), the
            layer taken, the transform, the source.
        encode: pixel_values [B, 3, S, S] -> image_embeds [B, N, D], N and D always the same. Called without
            gradients.
        batch_size: of `encode`. Interrupted and continued with the same one gives the same bits.
        dtype: of the file; bfloat16 keeps three digits.
        workers: threads that open pictures ahead.
        bad: counts and lists pictures that cannot be read. Their places are marked; `get` knows them.
        report: called with (pictures done, pictures in all) after each batch.

    Raises:
        UserError: the folder holds features of another fingerprint, another dtype or other pictures; too many
            pictures are bad; or `encode` gives numbers that are not finite in `dtype`.
    """
    folder, bad = Path(folder), BadRows() if bad is None else bad
    places = _distinct_pictures(rows, bad)
    if not places:
        raise UserError(f"{folder}: no pictures to make features of")
    keys = list(places)

    def load(number: int) -> Tensor:
        index, side = places[keys[number]]
        return open_picture(rows[index], transform, number=side)

    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder / "lock"):
        manifest = _read_manifest(folder, fingerprint)
        encoded = json.dumps(keys).encode()
        digest = hashlib.sha256(encoded).hexdigest()
        if manifest is None:
            shape = (len(keys), *_embed_shape(len(keys), load, encode))
            (folder / "features.bin").unlink(missing_ok=True)
            (folder / "keys.json").write_bytes(encoded)
            manifest = Manifest(_json(fingerprint), digest, shape, dtype, complete=False)
            save_json(manifest, folder / "features.json")
        if manifest.keys != digest:
            count = manifest.shape[0]
            raise UserError(
                f"{folder}: holds features of {count} others than these {len(keys)} pictures; {_ADVICE}"
            )
        if manifest.dtype != dtype:
            raise UserError(f"{folder}: holds features in {manifest.dtype}, wanted {dtype}; {_ADVICE}")
        if not manifest.complete:
            _write_missing(
                folder / "features.bin", manifest, keys, load, encode, batch_size, workers, bad, report
            )
            save_json(replace(manifest, complete=True), folder / "features.json")
    return FeatureCache(folder, fingerprint)


def _write_missing(
    path: Path,
    manifest: Manifest,
    keys: list[str],
    load: Callable[[int], Tensor],
    encode: Callable[[Tensor], Tensor],
    batch_size: int,
    workers: int,
    bad: BadRows,
    report: Callable[[int, int], None] | None,
) -> None:
    """Append what features.bin lacks, in whole batches, and see it safely on disk."""
    total, tokens, width = manifest.shape

    def load_batch(start: int) -> tuple[list[int], list[Tensor], list[BadRow]]:
        numbers, pixels, problems = [], [], []
        for number in range(start, min(start + batch_size, total)):
            try:
                pixels.append(load(number))
                numbers.append(number - start)
            except BadRow as error:
                problems.append(error)
        return numbers, pixels, problems

    with path.open("ab") as file:
        done = file.tell() // manifest.picture_bytes // batch_size * batch_size
        file.truncate(done * manifest.picture_bytes)  # a batch that was cut off is made again
        batches = prefetch(load_batch, range(done, total, batch_size), workers)
        with contextlib.closing(batches):
            for numbers, pixels, problems in batches:
                bad.saw(len(numbers) + len(problems))
                for problem in problems:
                    bad.add(problem.reason, problem.where, problem.detail)
                block = torch.full((len(numbers) + len(problems), tokens, width), torch.nan)
                block = block.to(getattr(torch, manifest.dtype))  # NaN marks what could not be read
                if numbers:
                    block[numbers] = _encode(encode, pixels).to(block)
                    finite = block[numbers].isfinite().flatten(1).all(dim=1).tolist()
                    if not all(finite):
                        key = keys[done + numbers[finite.index(False)]]
                        raise UserError(f"the encoder gives NaN or infinity in {manifest.dtype} for {key!r}")
                file.write(block.view(torch.uint8).numpy().tobytes())
                done += len(block)
                if report is not None:
                    report(done, total)
        file.flush()
        os.fsync(file.fileno())


def _encode(encode: Callable[[Tensor], Tensor], pixels: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return encode(torch.stack(pixels))


def _embed_shape(
    total: int, load: Callable[[int], Tensor], encode: Callable[[Tensor], Tensor]
) -> tuple[int, int]:
    """(N, D), from the first picture that can be read."""
    problem: BadRow | None = None
    for number in range(total):
        try:
            pixels = load(number)
        except BadRow as error:
            problem = error
            continue
        _, tokens, width = _encode(encode, [pixels]).shape
        return tokens, width
    raise UserError(f"none of {total} pictures can be read; the last: {problem}")


def _distinct_pictures(rows: Rows, bad: BadRows) -> dict[str, tuple[int, int]]:
    """Key -> (row, number within the row) of all pictures, in order of appearance."""
    places: dict[str, tuple[int, int]] = {}
    bad.saw(len(rows))
    for index in range(len(rows)):
        with bad.skipping():
            row = rows[index]
            for number in range(len(row.images)):
                places.setdefault(picture_key(row, number), (index, number))
    return places


def is_complete(folder: str | Path) -> bool:
    """Whether there is a cache in `folder`, of whatever, with all of its pictures."""
    file = Path(folder) / "features.json"
    return file.is_file() and load_json(Manifest, file).complete


def _read_manifest(folder: Path, fingerprint: dict[str, Any]) -> Manifest | None:
    """The manifest in `folder`, if there is one; refused if its fingerprint is another."""
    if not (folder / "features.json").exists():
        return None
    manifest = load_json(Manifest, folder / "features.json")
    if found := differences(manifest.fingerprint, _json(fingerprint)):
        raise UserError(f"{folder}: holds features made otherwise: {'; '.join(found)}; {_ADVICE}")
    return manifest


def _json(value: dict[str, Any]) -> dict[str, Any]:
    """The value as JSON gives it back: lists for tuples."""
    return json.loads(json.dumps(value))


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time; the system frees the lock of a process that died."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
