"""How far a job is: one line for a terminal, one page for a browser, both of what has been published so far."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from openblip.curate.job import BINS, Quarantine, ShardManifest, publish
from openblip.curate.shard import PHASES, Outcome
from openblip.html import histogram_svg, page, section, table

PAGE = "progress.html"
_EVERY = 5.0  # seconds between two pages

_ABOUT = {
    "read": "opening the shard and fetching pictures; in background threads",
    "decode": "in background threads",
    "caption": "both vision towers, and writing",
    "score": "the filter's judgement",
    "write": "publishing scores and manifests",
}


@dataclass
class Progress:
    """Counts of a job. What was `before` was finished by earlier runs: it counts, but says nothing about speed.

    shards, rows: in all; rows are None where only files are known. threshold: below it a web text is noise. in_work:
    rows of the shard in this process that are done, before it is published.
    """

    shards: int
    rows: int | None = None
    threshold: float = 0.5
    before: int = 0
    done: int = 0
    aside: dict[str, str] = field(default_factory=dict)  # shard -> reason
    rows_done: int = 0
    in_work: int = 0
    images: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    web_match: list[int] = field(default_factory=lambda: [0] * BINS)
    begun: float = field(default_factory=time.monotonic)
    _shown: float = 0.0

    def found(self, done: Iterable[ShardManifest], aside: Iterable[Quarantine]) -> None:
        """Count what earlier runs left."""
        for manifest in done:
            self._count(manifest)
        self.aside |= {one.shard: one.reason for one in aside}
        self.before, self.images = self.finished, 0

    def add(self, outcome: Outcome) -> None:
        """Count a shard of this run."""
        self.in_work = 0
        for phase, spent in outcome.seconds.items():
            self.seconds[phase] += spent
        if outcome.done is not None:
            self._count(outcome.done)
        elif outcome.aside is not None:
            self.aside[outcome.aside.shard] = outcome.aside.reason

    @property
    def finished(self) -> int:
        """Shards that are done or put aside."""
        return self.done + len(self.aside)

    @property
    def images_per_second(self) -> float:
        """Of this run, its beginning included."""
        return (self.images + self.in_work) / max(time.monotonic() - self.begun, 1e-9)

    @property
    def noise_share(self) -> float | None:
        """Share of the web texts with a P(match) below the threshold, rounded to 1 / BINS; None before the first."""
        total = sum(self.web_match)
        return sum(self.web_match[: round(self.threshold * BINS)]) / total if total else None

    @property
    def seconds_left(self) -> float | None:
        """By the shards of this run; None before the first."""
        now = self.finished - self.before
        return (time.monotonic() - self.begun) / now * (self.shards - self.finished) if now else None

    def line(self) -> str:
        """`12 of 1,000 shards, 34.5 images/s, 23.1% noise so far, 2:05:10 left`."""
        parts = [f"{self.finished:,} of {self.shards:,} shards"]
        if self.aside:
            parts[0] += f" ({len(self.aside):,} put aside)"
        parts.append(f"{self.images_per_second:.1f} images/s")
        if (noise := self.noise_share) is not None:
            parts.append(f"{noise:.1%} noise so far")
        if (left := self.seconds_left) is not None and self.finished < self.shards:
            parts.append(f"{clock(left)} left")
        return ", ".join(parts)

    def show(self, folder: Path, title: str, *, last: bool = False) -> None:
        """Write the page, unless one was written a moment ago; the last one does not ask to be loaded again."""
        now = time.monotonic()
        if last or now - self._shown >= _EVERY:
            self._shown = now
            publish(folder / PAGE, self.page(title, live=not last).encode())

    def page(self, title: str, *, live: bool) -> str:
        """The whole HTML document."""
        spent = time.monotonic() - self.begun
        facts = [
            ("shards", f"{self.finished:,} of {self.shards:,}"),
            ("… of earlier runs", f"{self.before:,}"),
            ("… put aside", f"{len(self.aside):,}"),
            ("rows", f"{self.rows_done:,}" + (f" of {self.rows:,}" if self.rows is not None else "")),
            ("images/s", f"{self.images_per_second:.2f}"),
            ("noise so far", "" if self.noise_share is None else f"{self.noise_share:.1%}"),
            ("time of this run", clock(spent)),
            ("time left", "" if self.seconds_left is None else clock(self.seconds_left)),
        ]
        phases = [
            (phase, f"{spent:.1f}", f"{1000 * spent / max(1, self.images):.2f}", _ABOUT[phase])
            for phase, spent in self.seconds.items()
        ]
        body = [
            section("So far", table((), facts)),
            section("Where the time goes", table(("phase", "seconds", "ms per image", ""), phases),
                    text="Summed over workers and threads, so they may exceed the time of the run."),
        ]  # fmt: skip
        if sum(self.web_match):
            counts = enumerate(_few(self.web_match))
            values = [(place + 0.5) / BINS for place, count in counts for _ in range(count)]
            drawn = histogram_svg({"web": values}, threshold=self.threshold, label="P(match) of web texts")
            body.append(section("Web texts", f"<figure>{drawn}</figure>"))
        if self.aside:
            listed = list(self.aside.items())[:50]
            body.append(section("Put aside", table(("shard", "why"), listed)))
        return page(title, "\n".join(body), subtitle=self.line(), refresh=10 if live else None)

    def _count(self, manifest: ShardManifest) -> None:
        self.done += 1
        self.rows_done += manifest.rows
        self.images += manifest.images
        if manifest.web_match:
            self.web_match = [a + b for a, b in zip(self.web_match, manifest.web_match, strict=True)]


def clock(seconds: float) -> str:
    """`1:02:03`, or `4 d 1:02:03`."""
    whole = round(seconds)
    days, rest = divmod(whole, 86_400)
    return (f"{days} d " if days else "") + f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"


def _few(counts: list[int], most: int = 10_000) -> list[int]:
    """Counts in the same proportions, about `most` in all."""
    return [round(count * min(1.0, most / sum(counts))) for count in counts]
