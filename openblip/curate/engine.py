"""The job around CapFilt: a source in, shard by shard, scored texts out; interrupted at any time, it goes on.

`run` decides which shards are to do and counts what becomes of them. The work itself is `shard.process_shard`, here
or, by `engine_ray`, in actors on many machines: the same function, the same files (see `job`).
"""

import contextlib
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Generator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from openblip.config import UserError, to_dict
from openblip.curate.capfilt import CapFilt
from openblip.curate.engine_ray import RayOptions, on_ray
from openblip.curate.job import (
    Quarantine,
    ShardManifest,
    is_whole,
    job_folder,
    manifests,
    publish,
    quarantined,
    refuse_other,
)
from openblip.curate.progress import Progress
from openblip.curate.shard import Outcome, Work, check_work, open_shard, process_shard
from openblip.data.loader import prefetch
from openblip.data.shards import InShards

IN_A_ROW = 10  # shards put aside without one done in between: it is not the shards


class Loadable(Protocol):
    """A `CapFilt`, or a `NamedCapFilt`, which becomes one."""

    @property
    def fingerprint(self) -> dict[str, Any]: ...

    def load(self) -> CapFilt: ...


@dataclass(frozen=True)
class JobResult:
    """A finished job. `found_done` of its `shards` had been finished before; `bad` counts rows by reason.

    aside: shards in quarantine, and why; seconds: of each phase (`shard.PHASES`), of this run; images_per_second: of
    this run; sha256: of all scores together.
    """

    folder: Path
    shards: int
    found_done: int
    rows: int
    images: int
    texts: int
    bad: dict[str, int]
    aside: dict[str, str]
    seconds: dict[str, float]
    images_per_second: float
    sha256: str


def run(
    capfilt: Loadable,
    source: InShards,
    out: str | Path,
    *,
    batch_size: int = 32,
    max_bad_share: float = 0.1,
    decoders: int = 1,
    threshold: float = 0.5,
    ray: RayOptions | None = None,
    anew: bool = False,
    retry: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> JobResult:
    """Caption and score every picture of a source. Shards that are done already cost no model call.

    A shard that cannot be worked on (its file is broken, too many of its rows are bad, a model fails at it) is put
    aside with its reason, and the others go on; a later call leaves it there, unless its file has changed or `retry`
    asks for it.

    Args:
        capfilt: loaded if a shard is to be done, and not before.
        out: the job's folder, new or that of an interrupted run; on Ray, one that all machines share.
        max_bad_share: the share of a shard's rows or pictures that may be unusable (of 100 rows or more).
        decoders: threads that read and decode pictures while the model works.
        threshold: what `progress` calls noise: web texts below this P(match). It changes no result.
        ray: work on Ray instead of in this process.
        anew: do shards again that were done with other models, another configuration or other rows, instead of
            refusing the folder.
        progress: called after each batch of this process, and after each shard.

    Raises:
        UserError: the folder holds a job with other models, another configuration or source; no usable picture at
            all; ten shards in a row had to be put aside; the folder takes no more.
    """
    check_work(batch_size, decoders, max_bad_share)
    folder = job_folder(out)
    names = [shard.name for shard in source.shards()]
    base = json.loads(json.dumps(capfilt.fingerprint))
    done, aside = _survey(folder, source, names, base, anew)
    if retry:
        aside = {}
    _list_bad(folder, names, done)  # also shows that the folder can be written, before the models are asked
    for left_behind in itertools.chain(folder.glob(".*.part"), folder.glob(".claim-*")):  # by a killed run
        left_behind.unlink(missing_ok=True)

    rows = len(source) if isinstance(source, Sized) else None
    state = Progress(len(names), rows, threshold)
    state.found(done.values(), aside.values())
    found_done = len(done)
    waiting = [name for name in names if name not in done and name not in aside]
    title = f"CapFilt over {source.path}"

    def tell(rows_in_work: int = 0) -> None:
        state.in_work = rows_in_work
        state.show(folder, title)
        if progress is not None:
            progress(state)

    work = Work(folder, batch_size, max_bad_share, decoders)
    if ray is not None and waiting:
        outcomes = on_ray(capfilt, source, waiting, work, ray)
    else:
        outcomes = _here(capfilt, source, waiting, work, tell)
    failures = 0
    with contextlib.closing(outcomes):
        for outcome in outcomes:
            state.add(outcome)
            if outcome.done is not None:
                done[outcome.done.shard] = outcome.done
            elif outcome.aside is not None:
                aside[outcome.aside.shard] = outcome.aside
            failures = 0 if outcome.done is not None else failures + 1
            tell()
            if failures >= IN_A_ROW and outcome.aside is not None:
                raise UserError(
                    f"{folder}: {failures} shards in a row had to be put aside, so the job ends here; the last, "
                    f"{outcome.aside.shard}: {outcome.aside.reason}; retry (--retry) tries them again"
                )
    _list_bad(folder, names, done)
    state.show(folder, title, last=True)
    result = JobResult(
        folder,
        shards=len(names),
        found_done=found_done,
        rows=sum(manifest.rows for manifest in done.values()),
        images=sum(manifest.images for manifest in done.values()),
        texts=sum(manifest.texts for manifest in done.values()),
        bad=dict(Counter(entry.reason for manifest in done.values() for entry in manifest.bad)),
        aside={name: aside[name].reason for name in sorted(aside)},
        seconds=state.seconds,
        images_per_second=state.images_per_second if waiting else 0.0,
        sha256=hashlib.sha256(
            "".join(done[name].sha256 for name in names if name in done).encode()
        ).hexdigest(),
    )
    if not done and aside:
        name, reason = next(iter(result.aside.items()))
        raise UserError(f"{source.path}: every shard had to be put aside; {name}: {reason}")
    if not result.texts:
        reasons = ", ".join(f"{reason} {count}" for reason, count in Counter(result.bad).most_common())
        raise UserError(f"{source.path}: no row of {result.rows} can be used: {reasons}")
    return result


def _survey(
    folder: Path, source: InShards, names: Sequence[str], base: dict[str, Any], anew: bool
) -> tuple[dict[str, ShardManifest], dict[str, Quarantine]]:
    """The shards that are done, and those that were put aside, by name."""
    known = set(names)
    done: dict[str, ShardManifest] = {}
    aside: dict[str, Quarantine] = {}
    found: list[ShardManifest | Quarantine] = [*manifests(folder), *quarantined(folder)]
    for one in found:
        if one.shard not in known:
            raise UserError(
                f"{folder}: holds a shard {one.shard!r} that {source.path} does not; use a new folder"
            )
        now = {**base, "source": source.identity(one.shard)}
        if one.fingerprint != now:
            mended = isinstance(one, Quarantine) and {**one.fingerprint, "source": now["source"]} == now
            if not anew and not mended:
                refuse_other(one.fingerprint, now, folder)
        elif isinstance(one, Quarantine):
            aside[one.shard] = one
        elif is_whole(folder, one):
            done[one.shard] = one
    return done, {name: one for name, one in aside.items() if name not in done}


def _here(
    capfilt: Loadable, source: InShards, names: Sequence[str], work: Work, tell: Callable[[int], None]
) -> Generator[Outcome, None, None]:
    """What becomes of the shards, one after the other in this process; the next ones are opened meanwhile."""
    if not names:
        return  # and the models are not loaded
    worker = capfilt.load()
    opened = prefetch(lambda name: open_shard(worker, source, name, work), names, workers=1)
    with contextlib.closing(opened):
        for one in opened:
            yield process_shard(worker, source, one.shard, work, one, tell)


def _list_bad(folder: Path, names: Sequence[str], done: dict[str, ShardManifest]) -> None:
    """Write bad_rows.jsonl anew: what the finished shards say, in the order of the source."""
    entries = [entry for name in names if name in done for entry in done[name].bad]
    lines = "".join(json.dumps(to_dict(entry)) + "\n" for entry in entries)
    publish(folder / "bad_rows.jsonl", lines.encode())
