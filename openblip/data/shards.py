"""A source by its files: what many machines work on, each tar or parquet file a shard that its worker alone opens.

`open_source` knows every row before the first is used, which takes a look into each file. Here files are listed and
nothing more, so a job over a hundred thousand remote tars begins at once, and its driver holds their names.

A file's name says what it is. One that is not what its name says fails when it is opened, and fails alone.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from openblip.config import UserError
from openblip.data import discover
from openblip.data.row_range import Rows
from openblip.data.sources import Source, open_groups, open_source

__all__ = ["InShards", "ShardFile", "ShardFiles", "open_shards"]

_FILES = ("tar", "parquet")


class Named(Protocol):
    """A shard; its name is unique in its source and fit for a file name."""

    @property
    def name(self) -> str: ...


class InShards(Protocol):
    """What is worked on shard by shard: a `Source`, or `ShardFiles`."""

    @property
    def path(self) -> str: ...

    def shards(self) -> Sequence[Named]:
        """All of them, in order, always the same."""
        ...

    def part(self, shard: str) -> Rows:
        """The rows of the shard of this name. Raises UserError: it cannot be opened, or there is none."""
        ...

    def identity(self, shard: str) -> str:
        """A hash of what the shard's rows are, as far as it can be told without opening it."""
        ...


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A file, and what its shard is called. size: in bytes."""

    name: str
    url: str
    size: int


class ShardFiles:
    """Tars or parquet files, none of them opened. Made by `open_shards`.

    Safe to pickle: it holds names. A worker elsewhere opens its shard if it reaches the same paths or URLs.
    """

    def __init__(
        self, path: str, root: str, groups: list[discover.Group], reading: dict[str, Any], cache: str | None
    ) -> None:
        self.path = path
        self._root, self._reading, self._cache = root, reading, cache
        self._of = {
            _name(name): replace(group, urls=[url], names=[name], sizes=[size])
            for group in groups
            for url, name, size in zip(group.urls, group.names, group.sizes, strict=True)
        }
        if len(self._of) < sum(len(group.urls) for group in groups):
            raise UserError(f"{path}: two files would make shards of one name; rename one")

    def shards(self) -> list[ShardFile]:
        """One for each file, in the order of their names."""
        return [ShardFile(name, group.urls[0], group.sizes[0]) for name, group in self._of.items()]

    def part(self, shard: str) -> Source:
        """The rows of one file. Raises UserError: it is not what its name says, or cannot be reached."""
        if shard not in self._of:
            raise UserError(f"{self.path}: there is no shard {shard!r}")
        return open_groups(self.path, self._root, [self._of[shard]], cache_dir=self._cache, **self._reading)

    def identity(self, shard: str) -> str:
        """A hash of a file's name, size and split and of how it is read; moving the folder does not change it."""
        group = self._of[shard]
        state = [group.kind, group.names, group.sizes, group.split, self._reading]
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def open_shards(
    path: str | os.PathLike[str],
    *,
    split: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    image_root: str | os.PathLike[str] | None = None,
    require_captions: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Source | ShardFiles:
    """A source to be worked on in shards: tars and parquet files are listed, all else is opened by `open_source`.

    So are tars and parquet files whose rows name their splits, if a split is asked for. Arguments are those of
    `open_source`. The first file that can be opened is looked into, so that a wrong column name fails here.

    Raises:
        UserError: what `open_source` refuses; no file can be opened.
    """
    root, groups = discover.find_files(os.fspath(path), by_name=True)
    reading: dict[str, Any] = {
        "image_column": image_column,
        "caption_column": caption_column,
        "image_root": None if image_root is None else os.fspath(image_root),
        "require_captions": require_captions,
    }
    in_files = all(group.kind in _FILES for group in groups)
    if not in_files or (split is not None and split not in {group.split for group in groups}):
        return open_source(path, split=split, cache_dir=cache_dir, **reading)
    chosen = [group for group in groups if split in (None, group.split)]
    cache = None if cache_dir is None else os.fspath(cache_dir)
    found = ShardFiles(os.fspath(path), root, chosen, reading, cache)
    problem: Exception | None = None
    for shard in found.shards()[:10]:
        try:
            first = found.part(shard.name)
        except Exception as error:  # one file's trouble; who works on it will meet it again and say so
            problem = problem or error
        else:
            first.check_columns()
            return found
    raise UserError(f"{path}: none of the first files can be opened; the first says: {problem}")


def _name(file: str) -> str:
    return (file.rpartition(".")[0] or file).replace("/", "--")
