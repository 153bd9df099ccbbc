"""What several commands share: how data are read, a bar while there is something to wait for, a place for a file,
what was found as lines."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from openblip.config import UserError

if TYPE_CHECKING:
    from openblip.curate.engine_ray import RayOptions
    from openblip.curate.progress import Progress
    from openblip.data.rows import BadRows
    from openblip.data.shards import ShardFiles
    from openblip.data.sources import Source


@dataclass(frozen=True)
class Reading:
    """How data are read.

    Args:
        split: only this split of the data.
        image_column: the column with the image, if it has none of the usual names.
        caption_column: the column with the caption or captions, likewise.
        image_root: folder that relative image paths start from, if not where the file is that names them.
    """

    split: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    image_root: str | None = None

    def open(self, data: str, *, require_captions: bool = True) -> "Source":
        """A local or remote path or pattern as rows."""
        from openblip.data.sources import open_source

        return open_source(data, **vars(self), require_captions=require_captions)

    def open_shards(self, data: str, *, require_captions: bool = True) -> "Source | ShardFiles":
        """The same, to be worked on in shards: tars and parquet files are listed, not opened."""
        from openblip.data.shards import open_shards

        return open_shards(data, **vars(self), require_captions=require_captions)


How = Annotated[Reading, tyro.conf.arg(name="")]  # its options bear no prefix
AS_USUAL = Reading()


@dataclass(frozen=True)
class Engine:
    """Where shards are worked on.

    Args:
        engine: this process, or Ray: the cluster that `ray start` began, or one of its own on this machine.
        actors: Ray workers, each with its models.
        max_actors: let Ray make more of them, up to this many, while shards are waiting.
        cpus_per_actor: of each, and its number of threads.
        gpus_per_actor: of each; 0.5 lets two share one.
        address: of another Ray cluster.
    """

    engine: Literal["local", "ray"] = "local"
    actors: int = 1
    max_actors: int | None = None
    cpus_per_actor: float = 1
    gpus_per_actor: float = 0
    address: str | None = None

    def ray(self) -> "RayOptions | None":
        """What it says of Ray; None: this process. Raises UserError: numbers or options that make no sense."""
        from openblip.curate.engine_ray import RayOptions

        if self.engine == "local":
            if self != Engine():
                raise UserError("--actors, --cpus-per-actor and the like are for --engine ray")
            return None
        return RayOptions(
            self.actors, self.max_actors, self.cpus_per_actor, self.gpus_per_actor, self.address
        )


Where = Annotated[Engine, tyro.conf.arg(name="")]
HERE = Engine()


def at_least(lowest: int, **numbers: int | None) -> None:
    """Raises UserError: an option below what it may be; None is one that was not given."""
    for name, number in numbers.items():
        if number is not None and number < lowest:
            raise UserError(f"--{name.replace('_', '-')} is at least {lowest}, got {number}")


def check_file(path: Path, option: str = "--out") -> None:
    """Make the folder of a file that will be written, before the work. Raises UserError: the file cannot be there."""
    if path.is_dir():
        raise UserError(f"{option} {path}: is a folder; name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {path}: its folder cannot be made ({error.strerror})") from None
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{option} {path}: must not be written")


@contextmanager
def progress(what: str, json: bool = False) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on standard error, moved by calls with (done, in all): from the first of them until all is done.

    None where nobody looks: with `json`, or if standard error is no terminal.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if json or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars = Progress(*columns, console=console)
    bar = bars.add_task(what, total=None)

    def report(done: int, total: int) -> None:
        bars.start()
        bars.update(bar, completed=done, total=total)
        if done >= total:  # what comes next may have a bar of its own
            bars.stop()

    try:
        yield report
    finally:
        bars.stop()


def say_skipped(bad: "BadRows", listed: Path | None = None) -> None:
    """A line on standard error about rows that could not be used, if there are any; `listed` is the file with all."""
    if bad.total:
        where = f" ({listed})" if listed is not None else ""
        print(f"{bad.total} rows could not be used: {bad.summary()}{where}", file=sys.stderr)


def as_lines(values: dict[str, Any], indent: str = "") -> str:
    """Names and values, one a line; what is in a dict further in."""
    lines = []
    for name, value in values.items():
        if isinstance(value, dict):
            lines.append(f"{indent}{name}:\n{as_lines(value, indent + '  ')}")
        else:
            lines.append(
                f"{indent}{name}: {value:.4f}" if isinstance(value, float) else f"{indent}{name}: {value}"
            )
    return "\n".join(lines)


@contextmanager
def job_progress(json: bool = False) -> Iterator[Callable[["Progress"], None]]:
    """The line of a job (`Progress.line`) on standard error: rewritten in place; in a file, a line every half minute.

    Nothing with `json`.
    """
    from rich.console import Console

    console, shown = Console(stderr=True), [0.0]

    def report(state: "Progress") -> None:
        every = 0.5 if console.is_terminal else 30.0
        if json or (time.monotonic() - shown[0] < every and state.finished < state.shards):
            return
        shown[0] = time.monotonic()
        if console.is_terminal:
            console.file.write(f"\r\x1b[2K{state.line()}")
            console.file.flush()
        else:
            print(state.line(), file=sys.stderr, flush=True)

    try:
        yield report
    finally:
        if console.is_terminal and shown[0]:
            console.file.write("\n")
