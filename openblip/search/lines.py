"""A line of an index as Arrow has it, and the facts about what made its vectors, which stand in the schema."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from openblip.api import Pipeline
from openblip.config import UserError, from_dict, to_dict
from openblip.fingerprint import matcher_hash

LAYOUT = 1  # counted up when a column changes its meaning

_KEY = b"openblip"  # of our facts in the schema's metadata


@dataclass(frozen=True)
class Made:
    """By what the vectors were made: `weights` is a hash (`fingerprint.matcher_hash`), `width` is P.

    queries: vectors per picture of BLIP-2, Q; 0 where a picture has a single one. model: where it was loaded from.
    """

    model: str
    weights: str
    dtype: str
    width: int
    queries: int
    layout: int = LAYOUT

    @classmethod
    def by(cls, pipeline: Pipeline, model: str | Path) -> "Made":
        """The facts of a model that was loaded from `model`. Raises UserError: it embeds nothing."""
        if pipeline.matcher is None:
            raise UserError(
                f"an index wants a model that embeds images and texts; this {type(pipeline.model).__name__} does not"
            )
        shape = pipeline.embed_images([]).shape  # [0, P] or [0, Q, P]
        dtype = "bf16" if str(pipeline.dtype) == "torch.bfloat16" else "fp32"
        name = os.path.abspath(model) if Path(model).exists() else str(model)  # noqa: PTH100 (symbolic links stay)
        queries = shape[1] if len(shape) == 3 else 0
        return cls(name, matcher_hash(pipeline), dtype, shape[-1], queries)


def schema_of(made: Made) -> pa.Schema:
    """The columns of `search.index`, and by what their vectors were made."""
    vector = pa.list_(pa.float32(), made.width)
    columns = [
        ("source", pa.string()),
        ("id", pa.string()),
        ("vector", pa.list_(vector) if made.queries else vector),
        ("captions", pa.list_(pa.string())),
        ("split", pa.string()),
        ("extra", pa.json_(pa.utf8())),
        ("where", pa.string()),
        ("place", pa.string()),
        ("thumbnail", pa.binary()),
    ]
    return pa.schema(columns, metadata={_KEY: json.dumps(to_dict(made)).encode()})


def as_table(lines: Sequence[dict[str, Any]], made: Made) -> pa.Table:
    """Lines, columns by name, one or more."""
    schema = schema_of(made)
    columns: dict[str, Any] = {name: [line[name] for line in lines] for name in schema.names}
    vectors = np.stack(columns["vector"]).astype(np.float32)
    array = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), made.width)
    if made.queries:
        ends = np.arange(0, len(lines) * made.queries + 1, made.queries, dtype=np.int32)
        array = pa.ListArray.from_arrays(pa.array(ends), array)
    columns["vector"] = array
    columns["extra"] = pa.ExtensionArray.from_storage(
        schema.field("extra").type, pa.array(columns["extra"], pa.utf8())
    )
    arrays = [
        column if isinstance(column, pa.Array) else pa.array(column, schema.field(name).type)
        for name, column in columns.items()
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def made_of(schema: pa.Schema, path: str) -> Made:
    """The facts in a schema. Raises UserError: there are none, or they are of another layout; `path` is named."""
    facts = (schema.metadata or {}).get(_KEY)
    if facts is None:
        raise UserError(f"{path}: holds a table that openblip did not make; name another place")
    made = from_dict(Made, json.loads(facts), path)
    if made.layout != LAYOUT:
        raise UserError(
            f"{path}: an index of layout {made.layout}, this version reads {LAYOUT}; build it anew"
        )
    return made


def vectors_of(column: pa.ChunkedArray, made: Made) -> np.ndarray:
    """The column "vector" of n lines as float32 [n, P], or [n, Q, P]."""
    array = column.combine_chunks()
    flat = array.flatten().flatten() if made.queries else array.flatten()
    shape = (len(array), made.queries, made.width) if made.queries else (len(array), made.width)
    return flat.to_numpy(zero_copy_only=False).reshape(shape)
