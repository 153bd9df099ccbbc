"""An index of pictures, on disk or in object storage: a LanceDB table that grows, is searched and kept.

One line per picture:

    source      what it was added from: a name, by default the path of the data
    id          of the picture, the row's; unique within a source, and the same each time it is added
    vector      its ITC vector [P], float32, L2-normalised; of BLIP-2 one for each of Q queries
    captions    its texts
    split       of the row
    extra       every other column of the row, as JSON
    where       file and line it was read from
    place       how its picture is opened again, as JSON (`search.places`)
    thumbnail   a small JPEG; null if none is kept

The schema's metadata say which model made the vectors, so that no other is searched with. Every change is a version of
its own, published at once: who is killed while adding leaves the version before. Several may read while one adds.
"""

import contextlib
import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from openblip.api import Pipeline
from openblip.config import UserError, differences, to_dict
from openblip.search.lines import Made, as_table, made_of, schema_of, vectors_of

TABLE = "pictures"
EXACT_BELOW = 50_000  # pictures; up to here every vector is compared
PARTITION = 1000  # vectors in a partition of the ANN index, about
GROWN = 4  # times as many are too many
SAMPLE, ITERATIONS = 64, 25  # of k-means: vectors per partition, and rounds
PROBES = 40  # partitions looked at
REFINE = 2  # times as many candidates as wanted are compared by their exact vectors
FRESH = timedelta(seconds=5)  # what others added is seen after this at the latest
INSTALL = "pip install 'openblip[search]'"
COLUMNS = ("source", "id", "vector", "captions", "split", "extra", "where", "place")  # of a hit


class Index:
    """An index that is there: made by `create_index` or `open_index`."""

    def __init__(self, path: str, table: Any, made: Made) -> None:
        self.path, self.table, self.made = path, table, made
        self._accepted: weakref.ref[Pipeline] | None = None  # hashing a large model takes seconds

    def __len__(self) -> int:
        """Pictures in it."""
        return self.table.count_rows()

    def refuse_other(self, pipeline: Pipeline) -> None:
        """Raise UserError if its vectors were made by another model than this one, or in another precision."""
        if self._accepted is not None and self._accepted() is pipeline:
            return
        now = replace(Made.by(pipeline, self.made.model), model=self.made.model)
        if found := differences(to_dict(self.made), to_dict(now)):
            raise UserError(
                f"{self.path}: its vectors are of another model ({'; '.join(found)}); take the one it was made with, "
                f"{self.made.model} in {self.made.dtype}, or build an index of this one elsewhere"
            )
        self._accepted = weakref.ref(pipeline)

    # --- what changes it ------------------------------------------------------------------------------------

    def append(self, lines: Sequence[dict[str, Any]]) -> int:
        """Add lines (columns by name), published at once -> how many; those whose source and id are there are not."""
        done = (
            self.table.merge_insert(["source", "id"])
            .when_not_matched_insert_all()
            .execute(as_table(lines, self.made))
        )
        return done.num_inserted_rows

    def delete(self, *, ids: Sequence[str] = (), source: str | None = None, where: str | None = None) -> int:
        """Take out the pictures that have one of `ids`, and are of `source`, and fit the filter `where` -> how many.

        What is not given does not choose. Raises UserError: nothing is given, or a filter that makes no sense.
        """
        if where is not None:
            self.check_filter(where)
        chosen = [f"({where})"] if where is not None else []
        chosen += [f"id IN ({', '.join(map(_text, ids))})"] if ids else []
        chosen += [f"source = {_text(source)}"] if source is not None else []
        if not chosen:
            raise UserError("delete: say what: ids, a source, or a filter")
        with self._asking(where):
            return self.table.delete(" AND ".join(chosen)).num_deleted_rows

    def tend(self) -> None:
        """Bring the full-text and ANN indexes up to date and join small files. What is killed here is done next time.

        The ANN index is made when there are `EXACT_BELOW` pictures, and made anew when its partitions have become too
        few. Of BLIP-2 there is none: a picture is searched by the best of its Q vectors, and all are compared.
        """
        from lancedb.index import FTS, BTree, IvfSq

        count, there = len(self), self.table.list_indices()
        columns = {column for index in there for column in index.columns}
        if count and "captions" not in columns:
            self.table.create_index("captions", config=FTS())
        if count >= EXACT_BELOW and "id" not in columns:
            self.table.create_index("id", config=BTree())
        ann = {
            index.name: int(index.name.rpartition("_")[2]) for index in there if index.columns == ["vector"]
        }
        partitions = max(1, count // PARTITION)
        has_enough = max(ann.values(), default=0) * GROWN >= partitions
        if count >= EXACT_BELOW and not has_enough and not self.made.queries:
            config = IvfSq(
                distance_type="cosine", num_partitions=partitions, sample_rate=SAMPLE, max_iterations=ITERATIONS
            )  # fmt: skip
            self.table.create_index("vector", config=config, name=f"vector_{partitions}")
            for name in ann:
                self.table.drop_index(name)
        self.table.optimize()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """A block in which this process alone adds. Raises UserError: another one does.

        Two that add the same pictures would add them twice. Only a local index is guarded; the lock ends with its
        process.
        """
        if "://" in self.path:
            yield
            return
        import fcntl

        with (Path(self.path) / ".adding").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    f"{self.path}: another process is adding to it; wait until it is done"
                ) from None
            yield

    # --- what asks it ---------------------------------------------------------------------------------------

    def missing(self, source: str, ids: Sequence[str]) -> set[str]:
        """Those of `ids` that are not there as pictures of `source`."""
        if not ids:
            return set()
        filter = f"source = {_text(source)} AND id IN ({', '.join(map(_text, ids))})"
        found = self.table.search().where(filter).select(["id"]).limit(len(ids)).to_arrow()
        return set(ids) - set(found["id"].to_pylist())

    def nearest(
        self,
        vector: np.ndarray,
        count: int,
        *,
        where: str | None = None,
        text: str | None = None,
        exact: bool = False,
    ) -> list[dict[str, Any]]:
        """The `count` pictures nearest to a vector [P] by cosine, best first: their `COLUMNS`.

        For BLIP-2, the cosine is that of the best of a picture's Q vectors. where: a filter in SQL, applied before.
        text: words to look for in captions; the two lists are merged by reciprocal rank fusion. exact: compare
        every vector even if there is an ANN index. Raises UserError: a filter that makes no sense; no captions
        indexed yet, where `text` is given.
        """
        if where is not None:
            self.check_filter(where)
        if text is None:
            query = self.table.search(vector, vector_column_name="vector")
        else:
            if not any(one.columns == ["captions"] for one in self.table.list_indices()):
                raise UserError(
                    f"{self.path}: its captions are not indexed yet; let `openblip index add` come to its end"
                )
            from lancedb.rerankers import RRFReranker

            query = self.table.search(
                query_type="hybrid", vector_column_name="vector", fts_columns="captions"
            )
            query = query.vector(vector).text(text).rerank(RRFReranker())
        query = query.distance_type("cosine")
        if where is not None:
            query = query.where(where)
        query = query.bypass_vector_index() if exact else self._probing(query)
        with self._asking(where):
            found = query.select(list(COLUMNS)).limit(count).to_arrow().select(list(COLUMNS))
        vectors = vectors_of(found["vector"], self.made)
        lines = found.drop_columns("vector").to_pylist()
        return [{**line, "vector": vector} for line, vector in zip(lines, vectors, strict=True)]

    @staticmethod
    def _probing(query: Any) -> Any:
        """A search of the ANN index: of more partitions only while a filter leaves fewer pictures than wanted."""
        return query.minimum_nprobes(PROBES).maximum_nprobes(0).refine_factor(REFINE)

    def thumbnails(self, lines: Sequence[dict[str, Any]]) -> list[bytes | None]:
        """The thumbnail of each of some hits; None where there is none."""
        if not lines:
            return []
        filter = f"id IN ({', '.join(sorted({_text(line['id']) for line in lines}))})"
        found = self.table.search().where(filter).select(["source", "id", "thumbnail"]).limit(len(self))
        by_key = {(one["source"], one["id"]): one["thumbnail"] for one in found.to_list()}
        return [by_key.get((line["source"], line["id"])) for line in lines]

    def check_filter(self, where: str) -> None:
        """Raise UserError if a filter is no SQL, or speaks of columns that are not there."""
        with self._asking(where):
            self.table.search().where(where).limit(1).explain_plan()

    @contextlib.contextmanager
    def _asking(self, where: str | None) -> Iterator[None]:
        """What LanceDB says of a filter, in one line."""
        try:
            yield
        except (ValueError, RuntimeError) as error:
            if where is None:
                raise
            said = _said(error).removeprefix("Invalid input, ").rstrip(".")
            raise UserError(
                f"where {where!r}: {said}; a filter is SQL, texts in single quotes: split = 'train'"
            ) from None

    def stats(self) -> dict[str, Any]:
        """What is in it: pictures by source and split, what made its vectors, its indexes, its size in bytes."""
        count = len(self)
        groups = self.table.search().select(["source", "split"]).limit(max(1, count)).to_arrow()
        indexes = {
            one.columns[0]: {"type": one.index_type, "pictures": one.num_indexed_rows}
            for one in self.table.list_indices()
        }
        return {
            "pictures": count,
            "sources": _counts(groups["source"]),
            "splits": _counts(groups["split"]),
            "made_by": to_dict(self.made),
            "search": "approximate" if "vector" in indexes else "exact",
            "indexes": indexes,
            "version": self.table.version,
            "bytes": self.table.stats()["total_bytes"],
        }


def open_index(path: str | os.PathLike[str]) -> Index:
    """The index at a local or remote path. Raises UserError: there is none, or LanceDB is not installed."""
    found = _find(os.fspath(path))
    if found is None:
        raise UserError(f"{path}: there is no index; make one with: openblip index build {path} --data ...")
    return found


def create_index(path: str | os.PathLike[str], pipeline: Pipeline, model: str | Path) -> Index:
    """A new index at `path` for a model that was loaded from `model`; or the one that is there, of the same model.

    Raises UserError: the index there is another model's; the model embeds nothing; LanceDB is not installed.
    """
    name = os.fspath(path)
    found = _find(name)
    if found is None:  # an empty one is there as well
        found = new_index(name, Made.by(pipeline, model))
    found.refuse_other(pipeline)
    return found


def new_index(path: str, made: Made) -> Index:
    """An empty index for vectors that were made so. Raises UserError: none can be made there."""
    try:
        table = _connect(path).create_table(TABLE, schema=schema_of(made))
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(f"{path}: no index can be made there: {_said(error)}") from None
    return Index(path, table, made)


def _find(path: str) -> Index | None:
    if "://" not in path and not Path(path).is_dir():
        return None
    database = _connect(path)
    try:
        if TABLE not in database.list_tables().tables:
            return None
        table = database.open_table(TABLE)
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(f"{path}: the index cannot be read: {_said(error)}") from None
    return Index(path, table, made_of(table.schema, path))


def _connect(path: str) -> Any:
    os.environ.setdefault("LANCEDB_LOG", "error")  # it warns of changes to come, on every search
    try:
        import lancedb
    except ImportError:
        raise UserError(
            f"an index needs LanceDB, which is not installed; install it with: {INSTALL}"
        ) from None
    try:
        return lancedb.connect(path, read_consistency_interval=FRESH)
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(f"{path}: cannot be opened: {_said(error)}") from None


def _said(error: Exception) -> str:
    """The first line of an error; LanceDB's others are places in its source."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    return {
        one["values"]: one["counts"] for one in column.value_counts().to_pylist() if one["values"] is not None
    }


def _text(value: str) -> str:
    """A text as SQL has it."""
    return "'" + value.replace("'", "''") + "'"
