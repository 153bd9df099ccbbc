"""What the steps of a story took, over all calls: kept in a file, so that an interruption forgets nothing."""

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MAXRSS_PER_MB = 2**20 if sys.platform == "darwin" else 2**10


class Clock:
    """Seconds by step, and the largest memory of any call in MB, written to `file` after each step."""

    def __init__(self, file: Path) -> None:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        self.file = file
        self.seconds: dict[str, float] = found.get("seconds", {})
        self.peak_mb: int = found.get("peak_mb", 0)
        self.has_worked = False  # a step of this call was not finished before

    @property
    def total(self) -> float:
        """Seconds of all steps."""
        return sum(self.seconds.values())

    @contextmanager
    def resumable(self, step: str, *, is_done: bool, has_begun: bool) -> Iterator[None]:
        """A step that goes on where it was stopped: what it took before counts too. Done already, it takes nothing."""
        if is_done:
            yield
            return
        before = self.seconds.get(step, 0.0) if has_begun else 0.0
        began, self.has_worked = time.monotonic(), True
        try:
            yield
        finally:
            self._note(step, before + time.monotonic() - began)

    @contextmanager
    def repeated(self, step: str) -> Iterator[None]:
        """A step that every call does anew. It counts once, as it was when the models it looks at were new."""
        began = time.monotonic()
        yield
        if self.has_worked or step not in self.seconds:
            self._note(step, time.monotonic() - began)

    def _note(self, step: str, seconds: float) -> None:
        self.seconds[step] = round(seconds, 3)
        now = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _MAXRSS_PER_MB)
        self.peak_mb = max(self.peak_mb, now)
        text = json.dumps({"seconds": self.seconds, "peak_mb": self.peak_mb}, indent=2) + "\n"
        part = self.file.with_name(f".{self.file.name}.part")
        part.write_text(text, encoding="utf-8")
        part.replace(self.file)
