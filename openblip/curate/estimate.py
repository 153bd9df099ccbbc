"""What a job would take, from a few hundred pictures: time, money, disk."""

import io
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from openblip.config import UserError
from openblip.curate.engine import Loadable
from openblip.curate.job import SCHEMA
from openblip.curate.progress import clock
from openblip.curate.shard import Seconds, check_work, judge, open_batch
from openblip.data.shards import InShards

SAMPLES = 200
PLACES = 10  # shards they are taken from, at even distances


@dataclass(frozen=True)
class Estimate:
    """What all of a source would take, if it is like the samples.

    images: that can be used; of shards nobody has opened by their sizes. ms: per image, of each phase, without
    the first batch. hours: of one worker, decoding beside its model. cost: hours × price. score_bytes: of all scores.
    noise_share: web texts below P(match) 0.5.
    """

    shards: int
    images: int
    samples: int
    ms: dict[str, float]
    images_per_second: float
    hours: float
    cost: float | None
    score_bytes: int
    bad: dict[str, int]
    noise_share: float | None

    def text(self) -> str:
        """For people."""
        phases = ", ".join(f"{phase} {ms:.1f}" for phase, ms in self.ms.items())
        lines = [
            f"about {self.images:,} usable pictures in {self.shards:,} shards, by {self.samples} samples",
            f"ms per picture: {phases}",
            f"{self.images_per_second:.1f} images/s and {clock(3600 * self.hours)} for one worker; n workers, an n-th",
            f"scores on disk: {self.score_bytes / 1e6:,.1f} MB",
        ]
        if self.cost is not None:
            lines.append(f"cost: {self.cost:,.2f}")
        if self.noise_share is not None:
            lines.append(f"noise among web texts at P(match) 0.5: {self.noise_share:.1%}")
        if self.bad:
            lines.append("not usable: " + ", ".join(f"{reason} {n}" for reason, n in self.bad.items()))
        return "\n".join(lines)


def estimate(
    capfilt: Loadable,
    source: InShards,
    *,
    batch_size: int = 32,
    decoders: int = 1,
    samples: int = SAMPLES,
    price: float | None = None,
) -> Estimate:
    """Work on about `samples` pictures and publish nothing. price: of a worker for an hour, in whatever money.

    Raises UserError: an impossible number, no shard can be opened, or no row of those looked at can be used.
    """
    check_work(batch_size, decoders)
    shards = source.shards()
    places = np.linspace(0, len(shards) - 1, min(PLACES, len(shards))).round().astype(int).tolist()
    worker = capfilt.load()
    first, seconds, bad = Seconds(), Seconds(), Counter[str]()
    timed = images = rows_seen = 0
    rows_of: list[int] = []
    records: list[dict[str, Any]] = []
    problem: Exception | None = None
    for place in places:
        try:
            rows = source.part(shards[place].name)
        except Exception as error:  # one file's trouble: the job would put it aside
            problem = error
            rows_of.append(0)
            continue
        rows_of.append(len(rows))
        stop = min(len(rows), max(1, samples // len(places)))
        for start in range(0, stop, batch_size):
            batch = open_batch(worker, rows, start, min(start + batch_size, stop))
            spent = first if not images else seconds  # libraries warm up in the first
            for phase, more in batch.seconds.items():
                spent[phase] = spent.get(phase, 0.0) + more
            timed += len(batch.rows) if spent is seconds else 0
            images += len(batch.rows)
            rows_seen += len(batch.rows) + len(batch.bad)
            bad.update(entry.reason for entry in batch.bad)
            records += judge(worker, batch, spent)
    if not images:
        raise UserError(
            f"{source.path}: none of {rows_seen} rows looked at can be used: {problem or dict(bad)}"
        )
    spent, over = (seconds, timed) if timed else (first, images)
    ms = {phase: 1000 * one / over for phase, one in spent.items()}
    per_image = max(
        ms.get("caption", 0) + ms.get("score", 0), (ms.get("read", 0) + ms.get("decode", 0)) / decoders
    )
    sizes = np.array([getattr(shard, "size", 1) for shard in shards], float)
    total = sum(rows_of) / sizes[places].sum() * sizes.sum() * images / rows_seen
    hours = total * per_image / 3_600_000
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records, schema=SCHEMA), file, compression="zstd")
    web = [line["match"] < 0.5 for line in records if line["kind"] == "web"]
    return Estimate(
        shards=len(shards),
        images=round(total),
        samples=images,
        ms=ms,
        images_per_second=1000 / per_image,
        hours=hours,
        cost=None if price is None else hours * price,
        score_bytes=round(len(file.getvalue()) / images * total),
        bad=dict(bad),
        noise_share=sum(web) / len(web) if web else None,
    )
