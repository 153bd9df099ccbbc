"""What people have, as rows: `open_source(path)` recognises the format, `source[i]` gives a `Row`.

- a folder with metadata.csv, metadata.jsonl or captions.jsonl: `file_name`, `caption` or `captions`, and more
- a csv or jsonl file: the same, image paths relative to the file
- a json file: COCO's captions, Karpathy's splits, or a list of objects
- parquet, a file or a folder of files: images as bytes, as {bytes, path}, or as paths
- conversations (`conversations` or `messages`) and interleaved documents (`texts`, `images`) in any of these
- videos (`video`) in place of images, in all but tars
- tars as img2dataset and webdataset write them: one, a folder, or a pattern such as `{00000..00031}.tar`
- a folder of pictures, if captions are not required

Paths are local or anything fsspec knows (`s3://`, `gs://`, `memory://`). Splits are subfolders (`train/`, `val/`),
files named so, or a column `split`. What a file is, its content decides, not its name; only an object of JSON in a
file called `.jsonl` or `.ndjson` is one line of many.
"""

import hashlib
import itertools
import json
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from openblip.config import UserError
from openblip.data import discover, tables
from openblip.data.lines import Columns
from openblip.data.row_range import RowRange
from openblip.data.rows import (
    CAPTION_NAMES,
    CHAT_NAMES,
    IMAGE_NAMES,
    PAIR_NAMES,
    QUESTION_NAMES,
    VIDEO_NAMES,
    BadRow,
    BadRows,
    ByteRange,
    Reference,
    Row,
    RowReader,
)

__all__ = ["BadRow", "BadRows", "ByteRange", "Reference", "Row", "Shard", "Source", "open_source"]

SHARD_ROWS = 1000  # for formats that are not in shards already
SAMPLE_ROWS = 20  # looked at when a source is opened, so that a wrong column name fails there


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows `start` to `stop` of a source; `name` is unique in it and fit for a file name."""

    name: str
    start: int
    stop: int


def open_source(
    path: str | os.PathLike[str],
    *,
    split: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    image_root: str | os.PathLike[str] | None = None,
    require_captions: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
) -> "Source":
    """Open a data source in any of the formats above.

    The first time a file is seen it is read once and a table of its rows is kept in the cache. From then on opening
    is a memory map: rows hold no memory but the pages in use, and 8 bytes a row when a column of splits selects.
    Images are not touched, except that parquet is unpacked into the cache.

    Args:
        path: file, folder or pattern, local or remote.
        split: only this split; None for all rows.
        image_column: the column with the image, if it has none of the usual names.
        caption_column: the column with the caption or captions, likewise.
        image_root: where relative image paths start, if not at the file that names them.
        require_captions: False accepts rows with neither caption nor question nor conversation: pictures to
            caption or to index.
        cache_dir: where tables are kept; by default with Hugging Face's (`HF_DATASETS_CACHE`).

    Raises:
        UserError: nothing is there, it is in no known format, or the columns or the split are missing.
    """
    root, found = discover.find_files(os.fspath(path))
    source = open_groups(
        os.fspath(path), root, found,
        image_column=image_column, caption_column=caption_column, image_root=image_root,
        require_captions=require_captions, cache_dir=cache_dir,
    )  # fmt: skip
    source.check_columns()
    return source if split is None else source._select(split)


def open_groups(
    path: str,
    root: str,
    groups: list[discover.Group],
    *,
    image_root: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    **reading: Any,
) -> "Source":
    """Files that `discover.find_files` found at `path`, or some of them, as one source; else as `open_source`."""
    if cache_dir is None:
        import datasets

        cache_dir = datasets.config.HF_DATASETS_CACHE
    cache = Path(cache_dir) / "openblip"
    parts = []
    for group in groups:
        base = os.fspath(image_root) if image_root is not None else group.base
        prefix = "" if image_root is not None else discover.below(root, group.base)
        parts.append(_open_part(group, RowReader(base, prefix, **reading), cache))
    return Source(path, parts)


@dataclass(frozen=True)
class _Part:
    """Files of one kind, folder and split: their table, and how its lines become rows."""

    table: Any  # datasets.Dataset, in arrow format
    kind: str
    urls: list[str]
    names: list[str]
    sizes: list[int]
    bounds: list[int]  # file f has the lines bounds[f] to bounds[f + 1]
    split: str | None
    reader: RowReader
    chosen: np.ndarray | None = None  # the lines that belong to the split asked for, [n] int64; None: all

    def __len__(self) -> int:
        return self.bounds[-1] if self.chosen is None else len(self.chosen)

    def record(self, index: int) -> tuple[dict[str, Any], str, str]:
        """Names to values, where, and an id to fall back on."""
        line = index if self.chosen is None else int(self.chosen[index])
        file = bisect_right(self.bounds, line) - 1
        number = line - self.bounds[file]
        fallback = f"{self.names[file]}#{number}"
        where = f"{self.names[file]} row {number}"
        try:
            values = self.table[line].to_pylist()[0]
        except UnicodeDecodeError as error:
            raise BadRow("not_utf8", where, f"text is not UTF-8: {error}") from error
        if self.kind == "parquet":
            return values, where, fallback
        where = values["where"]
        if values["problem"] is not None:
            reason, _, detail = values["problem"].partition("|")
            raise BadRow(reason, where, detail)
        record = _parse(values["record"], where)
        if values["start"] is not None:
            record["image"] = ByteRange(self.urls[file], values["start"], values["stop"])
        return record, where, fallback

    def row(self, index: int) -> Row:
        return self.reader.row(*self.record(index), self.split)

    def splits(self) -> Any:
        """The column of splits, a pyarrow array of strings: "" for none, null for lines too broken to say."""
        import pyarrow as pa

        if "split" not in self.table.column_names:
            return pa.repeat("", len(self))
        column = self.table.data.column("split").cast(pa.string())
        column = column if self.chosen is None else column.take(pa.array(self.chosen))
        return column.fill_null("") if self.kind == "parquet" else column


class Source:
    """Rows by index. Made by `open_source`.

    Safe to pickle and to read from many processes: it holds memory maps, no open files. Equal data gives
    equal rows in equal order everywhere.
    """

    def __init__(self, path: str, parts: list[_Part]) -> None:
        self.path = path
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts]).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Row:
        """Row `index`; negative counts from the end.

        Raises:
            BadRow: this row cannot be used. Others can: reading goes on.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {self.path}, which has {len(self)}")
        index %= len(self)
        part = bisect_right(self._ends, index)
        return self._parts[part].row(index - (self._ends[part - 1] if part else 0))

    def light(self, index: int) -> Row:
        """Row `index`, holding no picture: of one whose bytes stand in the source's table, where. Raises BadRow."""
        row = self[index]
        images: list[Reference] = [
            InSource(self, index, number) if isinstance(image, bytes) else image
            for number, image in enumerate(row.images)
        ]
        return replace(row, images=images)

    def __iter__(self) -> Iterator[Row]:
        """All rows; the first bad one ends it with `BadRow`. `rows` goes on."""
        return (self[index] for index in range(len(self)))

    def rows(self, bad: BadRows, start: int = 0, stop: int | None = None) -> Iterator[Row]:
        """The good rows from `start` to `stop`; the bad ones are recorded in `bad`."""
        for index in range(start, len(self) if stop is None else stop):
            bad.saw()
            with bad.skipping():
                yield self[index]

    @property
    def kind(self) -> str:
        """csv, jsonl, json, parquet, tar or images."""
        return self._parts[0].kind

    @cached_property
    def columns(self) -> list[str]:
        """The names in the first rows, in order of appearance."""
        return list(dict.fromkeys(name for record in self._sample()[0] for name in record))

    @cached_property
    def splits(self) -> dict[str, int]:
        """Every split and the number of its rows."""
        counts: Counter[str] = Counter()
        for part in self._parts:
            if part.split is not None:
                counts[part.split] += len(part)
                continue
            for entry in part.splits().value_counts().to_pylist():
                if entry["values"]:
                    counts[entry["values"]] += entry["counts"]
        return dict(counts)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what the rows are: content of text files; name, size, number of rows of parquet and tars.

        It survives moving the folder. It does not see a picture replaced under the same name.
        """
        state = []
        for part in self._parts:
            chosen = None if part.chosen is None else hashlib.sha256(part.chosen.tobytes()).hexdigest()
            files: list[Any] = list(zip(part.names, part.sizes, part.bounds[1:]))
            if part.kind in ("csv", "jsonl", "json"):
                files.append([discover.digest(url) for url in part.urls])
            elif part.kind == "images":
                files.append(part.table[:].column("where").to_pylist())
            names = (part.reader.image_column, part.reader.caption_column, part.reader.require_captions)
            state.append((part.kind, part.split, names, files, chosen))
        return hashlib.sha256(json.dumps([tables.LAYOUT, state]).encode()).hexdigest()

    def shards(self) -> list[Shard]:
        """The source in pieces: a tar or parquet file is one, other formats are cut every `SHARD_ROWS` rows.

        The same source is always cut in the same way, and adding a file leaves the other shards' names alone.
        """
        shards, offset = [], 0
        for part in self._parts:
            if part.kind in ("parquet", "tar"):
                lines = np.arange(part.bounds[-1]) if part.chosen is None else part.chosen
                cuts = np.searchsorted(lines, part.bounds).tolist()
                names = [name.rpartition(".")[0] or name for name in part.names]
            else:
                cuts = [*range(0, len(part), SHARD_ROWS), len(part)]
                stem = part.names[0].rpartition(".")[0] or part.kind
                names = [f"{stem}-{number:05d}" for number in range(len(cuts) - 1)]
            for name, start, stop in zip(names, cuts, cuts[1:]):
                shards.append(Shard(name.replace("/", "--"), offset + start, offset + stop))
            offset += len(part)
        return shards

    def part(self, shard: str) -> RowRange:
        """The rows of the shard of this name, counted from 0."""
        for one in self.shards():
            if one.name == shard:
                return RowRange(self, one.start, one.stop)
        raise UserError(f"{self.path}: there is no shard {shard!r}")

    def identity(self, shard: str) -> str:
        """The same for all shards: any change of the source may have moved rows between them."""
        return self.fingerprint

    def _sample(self) -> tuple[list[dict[str, Any]], BadRow | None]:
        """Records of the first rows of every part, and the first thing that was wrong with one."""
        records, problem = [], None
        for part in self._parts:
            for index in range(min(len(part), SAMPLE_ROWS)):
                try:
                    records.append(part.record(index)[0])
                except BadRow as error:
                    problem = problem or error
        return records, problem

    def check_columns(self) -> None:
        """Raise UserError if no row can be good, naming the columns there are."""
        if len(self) == 0:
            raise UserError(f"{self.path}: {', '.join(self._parts[0].names)} has no rows")
        records, problem = self._sample()
        if not records:
            raise UserError(f"{self.path}: none of the first rows can be read; the first says: {problem}")
        found, reader = ", ".join(self.columns), self._parts[0].reader
        for option in ("image_column", "caption_column"):
            name = getattr(reader, option)
            if name is not None and name not in self.columns:
                raise UserError(f"{self.path}: there is no column {name!r} ({option}); there are: {found}")
        usual = {*IMAGE_NAMES, *itertools.chain(*PAIR_NAMES), *VIDEO_NAMES, *CHAT_NAMES}
        if reader.image_column is None and usual.isdisjoint(self.columns):
            raise UserError(
                f"{self.path}: which column is the image? Name it with image_column (--image-column); "
                f"there are: {found}"
            )
        usual = {*CAPTION_NAMES, *QUESTION_NAMES, *CHAT_NAMES}
        if reader.require_captions and reader.caption_column is None and usual.isdisjoint(self.columns):
            raise UserError(
                f"{self.path}: which column is the caption? Name it with caption_column (--caption-column); "
                f"pictures without captions want require_captions=False (capfilt --captionless); there are: {found}"
            )

    def _select(self, split: str) -> "Source":
        """The rows of one split, with those too broken to say theirs: they are met, so they are counted."""
        import pyarrow.compute as compute

        if split not in self.splits:
            known = ", ".join(f"{name} ({count} rows)" for name, count in sorted(self.splits.items()))
            raise UserError(f"{self.path}: there is no split {split!r}; there are: {known or 'none'}")
        parts = []
        for part in self._parts:
            if part.split is None:
                chosen = compute.fill_null(compute.equal(part.splits(), split), True)
                parts.append(replace(part, chosen=np.flatnonzero(chosen)))
            elif part.split == split:
                parts.append(part)
        return Source(self.path, parts)


@dataclass(frozen=True)
class InSource:
    """Picture `number` of a row, read when asked for."""

    source: Source
    index: int
    number: int

    def read(self) -> bytes:
        """The encoded bytes."""
        image = self.source[self.index].images[self.number]
        assert isinstance(image, bytes)
        return image


def _open_part(group: discover.Group, reader: RowReader, cache: Path) -> _Part:
    from datasets import concatenate_datasets

    if group.kind == "parquet":
        table, counts = tables.parquet_table(group.urls, group.names, cache)
    elif group.kind == "images":
        table = tables.image_table(group.pictures, group.base, cache)
        counts = [len(table)]
    else:
        columns = Columns(reader.image_column, reader.caption_column)
        each = [
            tables.line_table(url, name, group.kind, columns, cache)
            for url, name in zip(group.urls, group.names)
        ]
        table, counts = concatenate_datasets(each), [len(one) for one in each]
    bounds = [0, *np.cumsum(counts).tolist()]
    table = table.with_format("arrow")  # as stored: nothing is decoded that nobody asked for
    return _Part(table, group.kind, group.urls, group.names, group.sizes, bounds, group.split, reader)


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow("not_utf8", where, f"text is not UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        raise BadRow("not_json", where, str(error)) from error
    if not isinstance(record, dict):
        raise BadRow("not_json", where, f"an object with column names is wanted, got {line[:40]!r}")
    return record
