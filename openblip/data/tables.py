"""Files to Arrow tables, once per file: a table is memory-mapped, so a million rows cost almost no memory.

Parquet goes through Hugging Face's reader. Text files and tars become tables of `Line`s beside it in the
cache: their records are parsed when a row is asked for, because the readers of Hugging Face infer a type
per column and stop at the first line that does not fit, whereas here a bad line is one bad row. A table is
found again by the file's path, size and time of change.
"""

import glob
import hashlib
import itertools
import json
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from openblip.config import UserError
from openblip.data.lines import Columns, Line, read_lines
from openblip.data.rows import printable

if TYPE_CHECKING:
    from datasets import Dataset

LAYOUT = 2  # in every table's name, with its fields: to be counted up when the meaning of one changes
BATCH = 10_000  # lines per write: some MB


def line_table(url: str, name: str, kind: str, columns: Columns, cache: Path) -> "Dataset":
    """The lines of one file (see `read_lines`), from the cache or else read now.

    Raises:
        UserError: the file as a whole makes no sense, or the cache cannot be written.
    """
    import fsspec

    filesystem, path = fsspec.url_to_fs(url)
    target = cache / f"{_digest(url, filesystem.ukey(path), name, kind, *columns)}.arrow"
    if not target.exists():
        with filesystem.open(path, "rb") as file:
            _write_table(target, read_lines(file, kind, name, columns))
    return _open_table(target)


def image_table(pictures: Iterable[str], folder: str, cache: Path) -> "Dataset":
    """Bare pictures, by their names relative to `folder`, as lines."""
    pictures = list(pictures)
    target = cache / f"{_digest(folder, *pictures)}.arrow"
    if not target.exists():
        lines = (Line(printable(name), json.dumps({"file_name": name}).encode(), "") for name in pictures)
        _write_table(target, lines)
    return _open_table(target)


def parquet_table(urls: list[str], names: list[str], cache: Path) -> "tuple[Dataset, list[int]]":
    """Parquet files as one table, and the number of rows of each.

    Hugging Face unpacks them into its cache once (as much disk as the files), because Parquet itself cannot
    give one row without decoding a whole row group. Remote files are copied to the cache before.

    Raises:
        UserError: a file is broken, or the files do not have the same columns.
    """
    import datasets
    import pyarrow
    import pyarrow.parquet
    from datasets.exceptions import DatasetGenerationError

    paths, counts = [_local_copy(url, cache) for url in urls], []
    for path, name in zip(paths, names):
        try:
            counts.append(pyarrow.parquet.read_metadata(path).num_rows)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{name}: not a readable parquet file: {error}") from error
    patterns = [glob.escape(path) for path in paths]
    try:
        table = datasets.load_dataset("parquet", data_files=patterns, split="train", cache_dir=str(cache))
    except DatasetGenerationError as error:
        others = f" and the {len(names) - 1} files beside it" if len(names) > 1 else ""
        raise UserError(f"{names[0]}{others}: {error.__cause__ or error}") from error
    return table, counts


def _local_copy(url: str, cache: Path) -> str:
    """The path of a local file, or of a copy of a remote one."""
    import fsspec

    filesystem, path = fsspec.url_to_fs(url)
    if "://" not in url:
        return path
    target = cache / f"{_digest(url, filesystem.ukey(path))}.parquet"
    if not target.exists():
        with _published(target) as partial:
            filesystem.get_file(path, str(partial))
    return str(target)


def _open_table(path: Path) -> "Dataset":
    from datasets import Dataset

    return Dataset.from_file(str(path))


def _write_table(target: Path, lines: Iterator[Line]) -> None:
    import pyarrow as pa

    types = (pa.string(), pa.binary(), pa.string(), pa.string(), pa.int64(), pa.int64())
    schema = pa.schema(zip(Line._fields, types))
    with (
        _published(target) as partial,
        pa.OSFile(str(partial), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as writer,
    ):
        while batch := list(itertools.islice(lines, BATCH)):
            columns = [pa.array(column, type_) for column, type_ in zip(zip(*batch), types)]
            writer.write_batch(pa.record_batch(columns, schema=schema))


@contextmanager
def _published(target: Path) -> Iterator[Path]:
    """A path to write to, renamed to `target` at the end, so that no other process sees half a file."""
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
    except OSError as error:
        raise UserError(
            f"cannot write to the cache ({error}); HF_DATASETS_CACHE or cache_dir= names another folder"
        ) from error
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _digest(*state: str | None) -> str:
    """The name of a table."""
    return hashlib.sha256(json.dumps([LAYOUT, Line._fields, *state]).encode()).hexdigest()[:32]
