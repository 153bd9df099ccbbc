"""The same worker on many machines: Ray Data schedules shards over actors that hold the models.

Ray is what restarts workers, replaces lost machines and scales the pool; what it does twice is done once, because a
shard that is published is not worked on again. Every machine must reach the source, the models and the job's folder
at the same paths or URLs, as a shared file system gives them.

Nothing here imports ray before a job runs on it: it comes with `pip install "openblip[ray]"`.
"""

import json
import logging
import os
import platform
import socket
import uuid
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openblip.config import UserError, from_dict, to_dict
from openblip.curate.job import PublishError, Quarantine, ShardManifest, is_whole, put_aside, read_manifest
from openblip.curate.shard import Outcome, Work, fingerprint_of, process_shard
from openblip.data.shards import InShards

ATTEMPTS = 3  # a shard that took so many workers down with it is put aside

BEGINNINGS = 10  # workers that died one after the other before they had begun: the job ends


@dataclass(frozen=True)
class RayOptions:
    """Where and how wide a job runs.

    actors: that hold the models; with max_actors, as few as Ray starts with, up to that many as the queue is long.
    cpus, gpus: of each, whole or parts: two actors of 0.5 GPUs share one. cpus is also how many threads torch uses.
    address: of a cluster; None for the one `ray start` began on this machine, or else one begun for this job.

    Raises UserError for numbers that make no sense.
    """

    actors: int = 1
    max_actors: int | None = None
    cpus: float = 1
    gpus: float = 0
    address: str | None = None

    def __post_init__(self) -> None:
        if self.actors < 1 or (self.max_actors is not None and self.max_actors < self.actors):
            raise UserError(
                f"actors is at least 1 and at most max_actors, got {self.actors} and {self.max_actors}"
            )
        if self.cpus < 0 or self.gpus < 0:
            raise UserError(f"CPUs and GPUs per actor must not be negative, got {self.cpus} and {self.gpus}")


def on_ray(
    capfilt: Any, source: InShards, shards: Sequence[str], work: Work, options: RayOptions
) -> Generator[Outcome, None, None]:
    """What becomes of the shards, as it comes to pass.

    Raises:
        UserError: ray is not installed, no cluster at the address, or what ended the work of an actor.
        PublishError: the job's folder takes no more.
    """
    # Read when ray is imported. A cluster of one's own says otherwise in its environment.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    try:
        import ray
        import ray.data
    except ImportError:
        raise UserError('engine "ray" needs the package ray: pip install "openblip[ray]"') from None

    mine = not ray.is_initialized()
    if mine:
        _connect(ray, options)
    try:
        _check_room(ray, options)
        for name in ("ray.data", "ray.data._internal.progress"):  # its executor raises the first again
            logging.getLogger(name).setLevel(logging.ERROR)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # the job has a line of its own
        if hasattr(context, "max_consecutive_actor_init_deaths"):  # newer releases give up at the first
            context.max_consecutive_actor_init_deaths = BEGINNINGS
        run = uuid.uuid4().hex[:12]
        pool = ray.data.ActorPoolStrategy(
            min_size=options.actors, max_size=options.max_actors or options.actors
        )
        waiting = ray.data.from_items([{"shard": name} for name in shards], override_num_blocks=len(shards))
        folder = work.folder.resolve()
        outcomes = waiting.map(
            _Worker,
            fn_constructor_args=(capfilt, source, to_dict(work) | {"folder": str(folder)}, run, options.cpus),
            compute=pool,
            num_cpus=options.cpus,
            num_gpus=options.gpus or None,
        )
        try:
            for line in outcomes.iter_rows():
                yield _read(json.loads(line["outcome"]))
        except UserError:
            raise
        except Exception as error:  # of Ray, whose kinds are many
            raise UserError(
                f"Ray gave up: {' '.join(str(error).split())[-500:]}; the same call goes on"
            ) from error
    finally:
        if mine:
            ray.shutdown()


def _connect(ray: Any, options: RayOptions) -> None:
    host, _, port = (options.address or "").rpartition("://")[2].rpartition(":")
    try:
        if host and port.isdigit():  # where nobody listens, Ray itself goes on trying for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=options.address, logging_level=logging.WARNING, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise UserError(f"Ray: no cluster at {options.address!r}: {' '.join(str(error).split())}") from None


def _check_room(ray: Any, options: RayOptions) -> None:
    """An actor that fits on no machine would be waited for in vain; an autoscaler may yet bring one."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fits = any(node.get("CPU", 0) >= options.cpus and node.get("GPU", 0) >= options.gpus for node in machines)
    if not fits and options.address is None:
        most = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in machines)
        raise UserError(
            f"an actor of {options.cpus:g} CPUs and {options.gpus:g} GPUs fits on no machine; there are: {most}"
        )


class _Worker:
    """Holds the models in an actor; told a shard, it says what became of it. What goes wrong is told, not raised."""

    def __init__(self, capfilt: Any, source: InShards, work: dict[str, Any], run: str, cpus: float) -> None:
        import torch

        torch.set_num_threads(max(1, int(cpus)))
        self.named, self.source, self.run = capfilt, source, run
        self.work = from_dict(Work, work, "work")
        self.capfilt: Any = None

    def __call__(self, item: dict[str, Any]) -> dict[str, str]:
        try:
            found = self._outcome(str(item["shard"]))
        except Exception as error:  # of the job: a model that cannot be loaded, a folder that takes no more
            kind = "publish" if isinstance(error, PublishError) else "error"
            return {"outcome": json.dumps({kind: str(error) or type(error).__name__})}
        parts = {
            "done": found.done and to_dict(found.done),
            "aside": found.aside and to_dict(found.aside),
            "seconds": found.seconds,
        }
        return {"outcome": json.dumps(parts)}

    def _outcome(self, shard: str) -> Outcome:
        folder = self.work.folder
        if self.capfilt is None:
            self.capfilt = self.named.load()
        fingerprint = fingerprint_of(self.capfilt.fingerprint, self.source, shard)
        found = read_manifest(folder, shard)
        if found is not None and found.fingerprint == fingerprint and is_whole(folder, found):
            return Outcome(found, None, {})  # published by a worker that was lost before it could say so
        claim = folder / f".claim-{shard}.{self.run}"
        if _attempts(claim) > ATTEMPTS:
            aside = Quarantine(shard, f"its worker died {ATTEMPTS} times while it was at it", fingerprint)
            put_aside(folder, aside)
            outcome = Outcome(None, aside, {})
        else:
            outcome = process_shard(self.capfilt, self.source, shard, self.work)
        claim.unlink(missing_ok=True)
        return outcome


def _attempts(claim: Path) -> int:
    """How often this shard has been begun in this run, this time included. A file counts: processes may be gone."""
    try:
        with claim.open("a", encoding="ascii") as file:
            file.write(f"{platform.node()} {os.getpid()}\n")
        return len(claim.read_text(encoding="ascii").splitlines())
    except OSError as error:
        raise PublishError(f"{claim.parent}: cannot be written ({error.strerror or error})") from error


def _read(found: dict[str, Any]) -> Outcome:
    if "publish" in found:
        raise PublishError(found["publish"])
    if "error" in found:
        raise UserError(found["error"])
    done, aside = found["done"], found["aside"]
    return Outcome(
        done and from_dict(ShardManifest, done, "a worker's answer"),
        aside and from_dict(Quarantine, aside, "a worker's answer"),
        found["seconds"],
    )
