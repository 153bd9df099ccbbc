"""Lists of kept pairs as DataComp exchanges them: a sorted NumPy array of 128-bit ids, each as two u8."""

import hashlib
import io
import re
from pathlib import Path

import numpy as np

from openblip.curate.dataset import Rule, check_job, decide, shard_scores
from openblip.curate.job import publish
from openblip.curate.texts import TextRules
from openblip.data.rows import Row
from openblip.data.shards import InShards

UIDS = np.dtype("u8,u8")  # of a uid's 32 hex digits, the first 16 and the last
_HEX = re.compile(r"[0-9a-f]{32}")


def uid_of(row: Row) -> str:
    """The 32 hex digits of a pair: its column `uid`, or its id if that is such a number, or else the MD5 of its id."""
    for value in (row.extra.get("uid"), row.id):
        if isinstance(value, str) and _HEX.fullmatch(value.lower()):
            return value.lower()
    return hashlib.md5(row.id.encode(), usedforsecurity=False).hexdigest()


def write_uids(
    job: str | Path,
    source: InShards,
    out_npy: str | Path,
    *,
    rule: Rule = "itm",
    threshold: float = 0.5,
    k: int = 2,
    texts: TextRules | None = None,
) -> int:
    """Write the uids of the pairs whose web text is kept, and return how many: [n] of `UIDS`, sorted, each once.

    rule, threshold, k, texts: see `dataset.decide`. Memory: 16 bytes a pair. Raises UserError: see `dataset.check_job`.
    """
    parts = [np.empty(0, UIDS)]
    for manifest in check_job(job, source):
        table = decide(shard_scores(job, manifest), rule, threshold, k, texts).select(["row", "kind", "kept"])
        kept = {line["row"] for line in table.to_pylist() if line["kind"] == "web" and line["kept"]}
        rows = source.part(manifest.shard) if kept else []
        uids = [uid_of(rows[number]) for number in sorted(kept)]
        parts.append(np.array([(int(uid[:16], 16), int(uid[16:], 16)) for uid in uids], UIDS))
    found = np.unique(np.concatenate(parts))
    file = io.BytesIO()
    np.save(file, found)
    publish(Path(out_npy), file.getvalue())
    return len(found)
