"""What a frozen encoder makes of pictures, computed once and kept on disk.

A cache is a folder:

    features.bin     the embeds of all pictures, one after the other: [pictures, N, D]; or of all their tiles
    grids.bin        where pictures are cut into tiles, the grid of each: int64 [pictures, 4]
    keys.json        the names of the pictures, in the same order
    features.json    the manifest: fingerprint, shape, and whether the cache is complete

While it is built, features.bin grows at its end (then grids.bin), and its length says how far it is, so whoever comes
after a crash goes on from there. Last of all, a manifest that says "complete" replaces the first, by a rename.
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
from openblip.data.collate_chat import TileEmbeds, open_tiles
from openblip.data.loader import prefetch
from openblip.data.rows import BadRow, BadRows
from openblip.data.tiles import Tiles, TileTransform
from openblip.data.transforms import ImageTransform, TrainTransform

Precision = Literal["bfloat16", "float16", "float32"]
_NO_GRID = (0, 0, 0, 0)
_GRID_BYTES = 4 * 8
_SAME = 0.05  # encoded twice, in bfloat16 on other machines, embeds differ by a hundredth
_ADVICE = "use another folder, or delete this one"
_STORED: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
}


@dataclass(frozen=True)
class Manifest:
    """What features.json holds; `keys` is the SHA-256 of keys.json, `shape` (pictures, N, D)."""

    fingerprint: dict[str, Any]
    keys: str
    shape: tuple[int, int, int]
    dtype: Precision
    complete: bool

    @property
    def embeds_bytes(self) -> int:
        """Size on disk of the embeds of a picture, or tile."""
        return self.shape[1] * self.shape[2] * _STORED[self.dtype].itemsize


class FeatureCache:
    """A complete cache, read only: embeds [N, D] of a picture by its number or its key.

    `shape` is (pictures, N, D), or (tiles, N, D) and read by a `TileCache`; `keys` the name of each picture.

    Raises:
        UserError: there is no cache in `folder`, it is not complete or damaged, or it was made with another
            `fingerprint`; the message names what differs.
    """

    def __init__(self, folder: str | Path, fingerprint: dict[str, Any]) -> None:
        self.folder = Path(folder)
        manifest = _read_manifest(self.folder, fingerprint)
        if manifest is None:
            raise UserError(f"{self.folder}: there are no features here; build_features makes them")
        if not manifest.complete:
            done, _ = _done(self.folder, manifest)
            raise UserError(
                f"{self.folder}: only {done} of {manifest.shape[0]} pictures are done; build_features goes on"
            )
        path, keys = self.folder / "features.bin", (self.folder / "keys.json").read_bytes()
        is_tiled = (self.folder / "grids.bin").exists()
        embeds = int(_tiles(_grids(self.folder)).sum()) if is_tiled else manifest.shape[0]
        found = path.stat().st_size if path.is_file() else 0
        if found != embeds * manifest.embeds_bytes or hashlib.sha256(keys).hexdigest() != manifest.keys:
            raise UserError(f"{self.folder}: features.bin or keys.json is damaged; delete the folder")
        self.shape, self.dtype = (embeds, *manifest.shape[1:]), manifest.dtype
        self.keys: list[str] = json.loads(keys)
        self._numbers = {key: number for number, key in enumerate(self.keys)}
        self._embeds = np.memmap(path, _STORED[self.dtype], mode="r", shape=self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def get(self, index: int) -> Tensor:
        """Embeds [N, D] of picture number `index`: float32, a copy.

        Raises:
            BadRow: the picture could not be read when the cache was built.
        """
        return self.read(slice(index, index + 1), self.keys[index])[0]

    def read(self, places: slice, key: str) -> Tensor:
        """Embeds [n, N, D] from these places of features.bin, those of the picture `key`. Raises BadRow: as `get`."""
        if self.dtype == "bfloat16":  # the upper half of a float32
            embeds = (self._embeds[places].astype(np.uint32) << 16).view(np.float32)
        else:
            embeds = self._embeds[places].astype(np.float32)
        if np.isnan(embeds[0, 0, 0]):
            raise BadRow("no_features", key, "could not be read when its features were computed")
        return torch.from_numpy(embeds)

    def lookup(self, key: str) -> Tensor:
        """Embeds [N, D] of the picture with this key (`collate.picture_key`).

        Raises:
            BadRow: as `get`.
            UserError: there is no such picture.
        """
        return self.get(self.number(key))

    def number(self, key: str) -> int:
        """The number of the picture with this key. Raises UserError: there is none."""
        if key not in self._numbers:
            raise UserError(f"{self.folder}: has no features of {key!r}; it was built from other rows")
        return self._numbers[key]


class TileCache:
    """A cache of pictures that were cut into tiles: gives a picture's embeds with its grid.

    Raises UserError: the grids are missing or damaged.
    """

    def __init__(self, features: FeatureCache) -> None:
        self._features = features
        self._grids = _grids(features.folder)
        self._stops = np.cumsum(_tiles(self._grids)).tolist()
        if len(self._grids) != len(features.keys):
            raise UserError(f"{features.folder}: grids.bin is missing or damaged; delete the folder")

    def __len__(self) -> int:
        return len(self._grids)

    def lookup(self, key: str) -> TileEmbeds:
        """Of the picture with this key (`collate.picture_key`). Raises what `FeatureCache.lookup` raises."""
        number = self._features.number(key)
        columns, rows, width, height = self._grids[number].tolist()
        stop = self._stops[number]
        embeds = self._features.read(slice(stop - 1 - columns * rows, stop), key)
        return TileEmbeds(embeds, (columns, rows, width, height))


def build_features(
    folder: str | Path,
    fingerprint: dict[str, Any],
    rows: Rows,
    transform: ImageTransform | TrainTransform | TileTransform,
    encode: Callable[[Tensor], Tensor],
    *,
    seed: int = 0,
    batch_size: int = 32,
    dtype: Precision = "bfloat16",
    workers: int = 0,
    bad: BadRows | None = None,
    report: Callable[[int, int], None] | None = None,
) -> FeatureCache:
    """Encode every distinct picture of `rows`, or what is missing of them, and open the cache (of tiles: `TileCache`).

    A second process waits for the first and then finds the work done. Of what is there, three pictures are encoded
    again and compared, since others may have the same names.

    Args:
        folder: of this cache alone.
        fingerprint: all that a picture's embeds depend on, as JSON values: settings and weights, transform, grids.
        encode: pixel_values [B, 3, S, S] -> image_embeds [B, N, D], N and D always the same. Called without
            gradients.
        seed: of a transform that draws; what it draws for a picture depends on the picture's number besides.
        batch_size: of `encode`; of tiles, too, as many as so many pictures have are made at a time. Interrupted and
            continued with the same one gives the same bits.
        dtype: of the file; bfloat16 keeps three digits.
        workers: threads that open pictures ahead.
        bad: counts and lists pictures that cannot be read, whose places are marked.
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

    def load(number: int) -> Tiles:
        index, side = places[keys[number]]
        if isinstance(transform, TileTransform):
            return open_tiles(rows[index], side, transform)
        draws = np.random.default_rng((seed, number))
        return Tiles(open_picture(rows[index], transform, draws, side)[None], _NO_GRID)

    def encode_all(tiles: list[Tiles]) -> Tensor:
        pixels = torch.cat([one.pixel_values for one in tiles])
        with torch.no_grad():
            return torch.cat([encode(part) for part in pixels.split(batch_size)])

    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder / "lock"):
        manifest = _read_manifest(folder, fingerprint)
        encoded = json.dumps(keys).encode()
        digest = hashlib.sha256(encoded).hexdigest()
        if manifest is None:
            shape = (len(keys), *_embed_shape(len(keys), load, encode_all))
            for name in ("features.bin", "grids.bin"):
                (folder / name).unlink(missing_ok=True)
            if isinstance(transform, TileTransform):
                (folder / "grids.bin").touch()
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
        _require_same(folder, manifest, keys, load, encode_all)
        if not manifest.complete:
            _write_missing(folder, manifest, keys, load, encode_all, batch_size, workers, bad, report)
            save_json(replace(manifest, complete=True), folder / "features.json")
    return FeatureCache(folder, fingerprint)


def _require_same(
    folder: Path, manifest: Manifest, keys: list[str],
    load: Callable[[int], Tiles], encode: Callable[[list[Tiles]], Tensor],
) -> None:  # fmt: skip
    """Encode again the first, the middle and the last that are done. Raises UserError: other embeds."""
    done = min(_done(folder, manifest)[0], len(keys))
    ends = np.cumsum(_tiles(_grids(folder))) if (folder / "grids.bin").exists() else np.arange(1, done + 1)
    for number in sorted({0, done // 2, done - 1}) if done else ():
        begin = int(ends[number - 1]) if number else 0
        start, size = (manifest.embeds_bytes * count for count in (begin, int(ends[number]) - begin))
        kept = torch.from_numpy(np.fromfile(folder / "features.bin", np.uint8, size, offset=start))
        old = kept.view(getattr(torch, manifest.dtype)).float()
        try:
            new = encode([load(number)]).flatten().float()
        except BadRow:  # as it was marked
            new = torch.full_like(old, torch.nan)
        gap = (new - old).norm() / old.norm() if new.shape == old.shape else torch.inf
        if gap > _SAME or new.isnan().any() != old.isnan().any():
            raise UserError(f"{folder}: holds features of another picture called {keys[number]!r}; {_ADVICE}")


def _write_missing(
    folder: Path,
    manifest: Manifest,
    keys: list[str],
    load: Callable[[int], Tiles],
    encode: Callable[[list[Tiles]], Tensor],
    batch_size: int,
    workers: int,
    bad: BadRows,
    report: Callable[[int, int], None] | None,
) -> None:
    """Append what features.bin and grids.bin lack, in whole batches, and see it safely on disk."""
    total, tokens, width = manifest.shape
    grids = folder / "grids.bin"

    def load_batch(start: int) -> tuple[list[Tiles | None], list[BadRow]]:
        made: list[Tiles | None] = []
        problems = []
        for number in range(start, min(start + batch_size, total)):
            try:
                made.append(load(number))
            except BadRow as error:
                made.append(None)
                problems.append(error)
        return made, problems

    done, embeds = _done(folder, manifest, batch_size)  # a batch that was cut off is made again
    with (folder / "features.bin").open("ab") as file:
        file.truncate(embeds * manifest.embeds_bytes)
        if grids.exists():
            os.truncate(grids, done * _GRID_BYTES)
        batches = prefetch(load_batch, range(done, total, batch_size), workers)
        with contextlib.closing(batches):
            for made, problems in batches:
                bad.saw(len(made))
                for problem in problems:
                    bad.add(problem.reason, problem.where, problem.detail)
                counts = torch.tensor([1 if one is None else len(one.pixel_values) for one in made])
                block = torch.full((int(counts.sum()), tokens, width), torch.nan)
                block = block.to(getattr(torch, manifest.dtype))  # NaN marks what could not be read
                if good := [one for one in made if one is not None]:
                    real = torch.tensor([one is not None for one in made]).repeat_interleave(counts)
                    block[real] = encode(good).to(block)
                    unsound = real & ~block.isfinite().flatten(1).all(dim=1)
                    if unsound.any():
                        number = torch.arange(len(made)).repeat_interleave(counts)[unsound][0]
                        key = keys[done + int(number)]
                        raise UserError(f"the encoder gives NaN or infinity in {manifest.dtype} for {key!r}")
                file.write(block.view(torch.uint8).numpy().tobytes())
                if grids.exists():
                    file.flush()  # first: a grid says that its tiles are there
                    found = np.array([_NO_GRID if one is None else one.grid for one in made], "<i8")
                    with grids.open("ab") as index:
                        index.write(found.tobytes())
                done += len(made)
                if report is not None:
                    report(done, total)
        file.flush()
        os.fsync(file.fileno())


def _done(folder: Path, manifest: Manifest, batch_size: int = 1) -> tuple[int, int]:
    """How many pictures of an incomplete cache are done, in whole batches, and how many embeds those have."""
    file = folder / "features.bin"
    embeds = file.stat().st_size // manifest.embeds_bytes if file.is_file() else 0
    if not (folder / "grids.bin").exists():
        done = embeds // batch_size * batch_size
        return done, done
    stops = np.cumsum(_tiles(_grids(folder)))
    done = int(np.searchsorted(stops, embeds, side="right")) // batch_size * batch_size
    return done, int(stops[done - 1]) if done else 0


def _grids(folder: Path) -> np.ndarray:
    """[pictures, 4], those that are whole in grids.bin."""
    file = folder / "grids.bin"
    found = np.fromfile(file, "<i8") if file.exists() else np.empty(0, "<i8")
    return found[: len(found) // 4 * 4].reshape(-1, 4)


def _tiles(grids: np.ndarray) -> np.ndarray:
    """How many tiles each picture has, its base included."""
    return 1 + grids[:, 0] * grids[:, 1]


def _embed_shape(
    total: int, load: Callable[[int], Tiles], encode: Callable[[list[Tiles]], Tensor]
) -> tuple[int, int]:
    """(N, D), from the first picture that can be read."""
    problem: BadRow | None = None
    for number in range(total):
        try:
            picture = load(number)
        except BadRow as error:
            problem = error
            continue
        _, tokens, width = encode([picture]).shape
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
