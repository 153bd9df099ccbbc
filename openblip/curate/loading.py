"""A CapFilt by the names of its models: loaded when a shard needs it, in whatever process that is.

What its fingerprint is can be told without the models once they have been loaded for a job: the job's folder says in
models.json which files they were loaded from, how large these are and when they were changed, and the hash of what
was in them. Files that are still the same are not read again.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openblip.api import Pipeline, load
from openblip.config import to_dict
from openblip.curate.capfilt import (
    CapFilt,
    CapFiltConfig,
    MatchScale,
    fit_scale_on,
    model_names,
    weights_hash,
)
from openblip.curate.job import publish
from openblip.data.collate import Rows, rows_fingerprint

_KNOWN = "models.json"


@dataclass
class NamedCapFilt:
    """What becomes a `CapFilt`. Safe to pickle, and cheap to: models that are loaded stay behind.

    captioners, filter: folders or hub names; another machine must reach the same. known: the job's folder.
    """

    captioners: Sequence[str]
    filter: str
    config: CapFiltConfig
    known: Path
    dtype: str = "fp32"
    _loaded: dict[str, Pipeline] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": {}}

    @property
    def models(self) -> dict[str, str]:
        """Hashes of the models, as of `CapFilt`; those of files that changed are loaded for it."""
        return model_names([self._hash(name) for name in self.captioners], self._hash(self.filter))

    @property
    def fingerprint(self) -> dict[str, Any]:
        """That of the `CapFilt` it becomes."""
        return {**self.models, "config": to_dict(self.config)}

    def load(self) -> CapFilt:
        """The models, ready for work. Raises UserError: one is not there or cannot do its part."""
        writers = [self.pipeline(name) for name in self.captioners]
        return CapFilt(writers, self.pipeline(self.filter), self.config)

    def pipeline(self, name: str) -> Pipeline:
        """The model of this name, loaded once."""
        if name not in self._loaded:
            self._loaded[name] = load(name, dtype=self.dtype)
        return self._loaded[name]

    def calibrate(self, rows: Rows, report: Any = None) -> None:
        """Set the scale that fits the filter on human pairs (`fit_scale_on`), or that is known to."""
        key = f"scale of {self._hash(self.filter)} on {rows_fingerprint(rows)}"
        known = self._read()
        if key not in known:
            known[key] = to_dict(fit_scale_on(self.pipeline(self.filter), rows, report=report))
            self._write(known)
        self.config.scale = MatchScale(**known[key])

    def _hash(self, name: str) -> str:
        known, key, files = self._read(), f"{name} in {self.dtype}", _files(name)
        if files is None or known.get(key, {}).get("files") != files:
            known[key] = {"files": files, "hash": weights_hash(self.pipeline(name))}
            self._write(known)
        found: str = known[key]["hash"]
        return found

    def _read(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.known / _KNOWN).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none yet: all is loaded and hashed
            return {}
        return found

    def _write(self, known: dict[str, Any]) -> None:
        publish(self.known / _KNOWN, (json.dumps(known, indent=2) + "\n").encode())


def _files(name: str) -> list[list[Any]] | None:
    """[name, size in bytes, time of change in ns] of a model's files; None for a name on the hub."""
    place = Path(name)
    found = sorted(place.rglob("*")) if place.is_dir() else [place]
    if not place.exists():
        return None
    stats = [(path, path.stat()) for path in found if path.is_file()]
    return [[str(path.relative_to(place)), stat.st_size, stat.st_mtime_ns] for path, stat in stats]
