"""The run folder's record: what was asked for, what came of it as numbers, and the curve to look at.

    <run>/config.json       the resolved configuration
    <run>/metrics.jsonl     {"step", "loss", "losses", "lr", "grad_norm", "samples_per_s"} for a logged step,
                            {"step", "eval"} for an evaluation: one object a line
    <run>/tensorboard/      the same for TensorBoard, if it is installed
    <run>/loss.png          the curves, drawn at each checkpoint, if matplotlib is installed

While training, stderr shows a progress bar if it is a terminal, a plain line now and then if not.
"""

import importlib
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from openblip.config import save_json

PLAIN_EVERY = 30.0  # seconds between two plain lines where there is no terminal


@dataclass(frozen=True)
class StepMetrics:
    """The measurements of one optimizer step, over all its micro-batches and ranks."""

    loss: float  # the weighted sum that was minimised
    losses: dict[str, float]  # each by name, without its weight
    lr: float
    grad_norm: float  # before clipping
    samples_per_s: float


class RunLog:
    """Writes the record of one run; a `with` block closes it."""

    def __init__(
        self, run_dir: str | Path, config: Any, *, start_step: int, max_steps: int, enabled: bool = True
    ) -> None:
        """Open the record in `run_dir` and show the progress.

        Args:
            config: the dataclass to keep as config.json.
            start_step: steps done by the checkpoint the run goes on from. What an interrupted run wrote
                beyond it is removed, because it will be written again.
            enabled: False (all ranks but 0) does nothing at all.
        """
        self.run_dir, self.max_steps, self.enabled = Path(run_dir), max_steps, enabled
        if not enabled:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        save_json(config, self.run_dir / "config.json")
        self._console = Console(stderr=True, highlight=False)
        self._progress: Progress | None = None
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("step"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bar = self._progress.add_task("", total=max_steps, completed=start_step)
        self._begun, self._start_step = time.monotonic(), start_step
        self._last_line = -math.inf
        self._can_draw = True
        self._metrics_file = self.run_dir / "metrics.jsonl"
        truncate_metrics_(self._metrics_file, start_step)
        # Line by line to the system: a killed process has written what it measured.
        self._metrics = self._metrics_file.open("a", encoding="utf-8", buffering=1)
        self._board = self._open_tensorboard(start_step)
        if self._progress is not None:
            self._progress.start()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        if not self.enabled:
            return
        if self._progress is not None:
            self._progress.stop()
        self._metrics.close()
        if self._board is not None:
            self._board.close()

    def advance(self, step: int) -> None:
        """Move the progress bar: `step` optimizer steps are done."""
        if self.enabled and self._progress is not None:
            self._progress.update(self._bar, completed=step)

    def step(self, step: int, metrics: StepMetrics) -> None:
        """Record the measurements of the optimizer step that made it `step` steps."""
        if not self.enabled:
            return
        self._write({"step": step, **asdict(metrics)})
        if self._board is not None:
            for name, value in metrics.losses.items():
                self._board.add_scalar(f"loss/{name}", value, step)
            for name in ("loss", "lr", "grad_norm", "samples_per_s"):
                self._board.add_scalar(f"train/{name}", getattr(metrics, name), step)
        each = "".join(f"  {n} {v:.4g}" for n, v in metrics.losses.items()) if len(metrics.losses) > 1 else ""
        text = f"loss {metrics.loss:.4g}{each}  lr {metrics.lr:.2e}  {metrics.samples_per_s:.3g} samples/s"
        if self._progress is not None:
            self._progress.update(self._bar, description=text)
        elif time.monotonic() - self._last_line >= PLAIN_EVERY or step == self.max_steps:
            self._last_line = time.monotonic()
            left = (self._last_line - self._begun) / (step - self._start_step) * (self.max_steps - step)
            self.note(f"step {step}/{self.max_steps}  {text}  {_clock(left)} left")

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """Record what `evaluate` measured after `step` steps."""
        if not self.enabled:
            return
        # JSON has no NaN: a measure that is not defined here is null.
        self._write({"step": step, "eval": {n: v if math.isfinite(v) else None for n, v in values.items()}})
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"eval/{name}", value, step)
        numbers = "".join(f"  {name} {value:.4g}" for name, value in values.items())
        self.note(f"step {step}/{self.max_steps}  eval{numbers}")

    def note(self, text: str) -> None:
        """Show one line, above the progress bar if there is one."""
        if self.enabled:
            self._console.print(text, markup=False, soft_wrap=True)

    def draw(self) -> None:
        """Draw loss.png anew and bring the TensorBoard events to the disk."""
        if not self.enabled:
            return
        if self._board is not None:
            self._board.flush()
        if self._can_draw:
            try:
                draw_curves(self._metrics_file, self.run_dir / "loss.png")
            except ImportError:
                self._can_draw = False
                self.note("matplotlib is not installed: no loss.png (pip install 'openblip[log]')")

    def _write(self, line: dict[str, Any]) -> None:
        self._metrics.write(json.dumps(line) + "\n")

    def _open_tensorboard(self, start_step: int) -> Any:
        try:
            tensorboard = importlib.import_module("torch.utils.tensorboard")
        except ImportError:
            self.note("tensorboard is not installed: no event files (pip install 'openblip[log]')")
            return None
        purge = start_step + 1 if start_step else None
        return tensorboard.SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=purge)


def truncate_metrics_(file: Path, step: int) -> None:
    """Cut a metrics file after its last line of the first `step` steps; half a line at the end goes too."""
    if not file.exists():
        return
    kept = 0
    with file.open("rb+") as stream:
        for line in stream:
            try:
                is_ours = line.endswith(b"\n") and json.loads(line)["step"] <= step
            except (ValueError, KeyError, TypeError):
                is_ours = False
            if not is_ours:
                break
            kept += len(line)
        stream.truncate(kept)


def draw_curves(metrics: Path, picture: Path) -> None:
    """Draw a metrics file: a panel per named loss and per evaluated number, over the step.

    Raw losses are points, the line is their running mean over a twentieth of the run.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure_module = importlib.import_module(
        "matplotlib.figure"
    )  # its Figure draws by Agg, whatever the display
    ticker = importlib.import_module("matplotlib.ticker")
    losses: dict[str, list[tuple[int, float]]] = {}
    scores: dict[str, list[tuple[int, float]]] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        for into, found in ((losses, entry.get("losses", {})), (scores, entry.get("eval", {}))):
            for name, value in found.items():
                if value is not None:
                    into.setdefault(name, []).append((entry["step"], value))
    panels = [(f"{name} loss", points, True) for name, points in losses.items()]
    panels += [(name, points, False) for name, points in scores.items()]
    if not panels:
        return
    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    last_step = max(step for _, points, _ in panels for step, _ in points)
    rows = -(-len(panels) // columns)
    figure = figure_module.Figure(figsize=(4.8 * columns, 3.2 * rows), layout="constrained")
    for number, (title, points, is_loss) in enumerate(panels, start=1):
        steps, values = np.array([s for s, _ in points]), np.array([v for _, v in points])
        axes = figure.add_subplot(rows, columns, number)
        if is_loss:
            axes.plot(steps, values, ".", color="tab:blue", alpha=0.25, markersize=4, label="logged")
            axes.plot(steps, _running_mean(values), color="tab:blue", linewidth=1.8, label="running mean")
            if number == 1:
                axes.legend(frameon=False)
        else:
            axes.plot(steps, values, "o-", color="tab:orange", markersize=4)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(title)
        axes.set_xlim(0, last_step)
        axes.ticklabel_format(useOffset=False)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(nbins=6, integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    part = picture.with_name(f".{picture.name}.part")
    figure.savefig(part, format="png", dpi=110)
    part.replace(picture)  # whoever looks meanwhile sees a whole picture


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of a twentieth of the points; at both ends over what there is of it."""
    half = len(values) // 40
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
