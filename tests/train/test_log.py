import json
import sys
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from openblip.train import log
from openblip.train.log import RunLog, StepMetrics


@dataclass
class Config:
    lr: float = 0.1


def metrics(step: int, **losses: float) -> StepMetrics:
    losses = losses or {"itc": 1.0 / step, "lm": 2.0}
    return StepMetrics(sum(losses.values()), losses, 1e-3, 0.5, 12.0)


def lines(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def scalars(run_dir) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard would show of a run: per tag its steps and values."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_run_folder_holds_what_was_asked_for_and_what_came_of_it(tmp_path, capsys):
    with RunLog(tmp_path, Config(0.2), start_step=0, max_steps=3) as run:
        for step in (1, 2):
            run.advance(step)
            run.step(step, metrics(step))
        run.evaluation(2, {"r_mean": 0.5, "cider": float("nan")})
        run.draw()
    assert json.loads((tmp_path / "config.json").read_text()) == {"lr": 0.2}
    assert lines(tmp_path) == [
        {
            "step": 1,
            "loss": 3.0,
            "losses": {"itc": 1.0, "lm": 2.0},
            "lr": 1e-3,
            "grad_norm": 0.5,
            "samples_per_s": 12.0,
        },
        {
            "step": 2,
            "loss": 2.5,
            "losses": {"itc": 0.5, "lm": 2.0},
            "lr": 1e-3,
            "grad_norm": 0.5,
            "samples_per_s": 12.0,
        },
        {"step": 2, "eval": {"r_mean": 0.5, "cider": None}},
    ]
    board = scalars(tmp_path)
    assert board["loss/itc"] == [(1, 1.0), (2, 0.5)]
    assert board["train/lr"] == [(1, pytest.approx(1e-3)), (2, pytest.approx(1e-3))]
    assert board["eval/r_mean"] == [(2, 0.5)]
    told = capsys.readouterr()
    assert told.out == ""  # stdout belongs to what a command answers
    assert "step 1/3  loss 3  itc 1  lm 2  lr 1.00e-03  12 samples/s" in told.err
    assert "step 2/3  eval  r_mean 0.5" in told.err


def test_a_resumed_run_takes_back_what_came_after_its_checkpoint(tmp_path):
    with RunLog(tmp_path, Config(), start_step=0, max_steps=9) as run:
        for step in range(1, 6):
            run.step(step, metrics(step))
            run.evaluation(step, {"r_mean": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    with RunLog(tmp_path, Config(), start_step=3, max_steps=9) as run:
        run.step(4, metrics(4, itc=9.0))
    assert [(line["step"], "eval" in line) for line in lines(tmp_path)] == [
        *[(step, is_eval) for step in (1, 2, 3) for is_eval in (False, True)],
        (4, False),
    ]
    assert lines(tmp_path)[-1]["losses"] == {"itc": 9.0}
    assert [step for step, _ in scalars(tmp_path)["eval/r_mean"]] == [1, 2, 3]
    assert scalars(tmp_path)["loss/itc"][-1] == (4, 9.0)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("", 0),
        ('{"step": 1}\n{"step": 2}\n', 2),
        ('{"step": 1}\n{"step": 2}', 1),
        ('{"step": 1}\n{"step": 3}\n{"step": 2}\n', 1),
        ('{"step": 1}\nnot json\n{"step": 2}\n', 1),
        ('{"step": 1}\n"step"\n{"step": 2}\n', 1),
    ],
)
def test_truncating_keeps_the_whole_lines_up_to_a_step(tmp_path, text, kept):
    file = tmp_path / "metrics.jsonl"
    file.write_text(text)
    log.truncate_metrics_(file, 2)
    assert file.read_text() == "".join(text.splitlines(keepends=True)[:kept])
    log.truncate_metrics_(tmp_path / "absent.jsonl", 2)
    assert not (tmp_path / "absent.jsonl").exists()


def test_what_is_not_installed_is_told_once(tmp_path, capsys, monkeypatch):
    for absent in ("torch.utils.tensorboard", "matplotlib.figure", "matplotlib"):
        monkeypatch.setitem(sys.modules, absent, None)
    with RunLog(tmp_path, Config(), start_step=0, max_steps=9) as run:
        run.step(1, metrics(1))
        run.draw()
        run.step(2, metrics(2))
        run.draw()
    told = capsys.readouterr().err
    assert told.count("tensorboard is not installed") == told.count("matplotlib is not installed") == 1
    assert "pip install 'openblip[log]'" in told
    assert len(lines(tmp_path)) == 2 and not (tmp_path / "loss.png").exists()


def test_plain_lines_come_now_and_then_and_at_the_end(tmp_path, capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(log.time, "monotonic", lambda: now)
    with RunLog(tmp_path, Config(), start_step=10, max_steps=50) as run:
        for step in range(11, 51):
            now += 4.0
            run.advance(step)
            run.step(step, metrics(step))
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [int(line.split()[1].split("/")[0]) for line in shown] == [11, 19, 27, 35, 43, 50]
    assert shown[0].endswith("2:36 left") and shown[-1].endswith("0:00 left")


def test_a_terminal_sees_a_bar_with_rate_and_time_left(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    with RunLog(tmp_path, Config(), start_step=2, max_steps=8) as run:
        for step in (3, 4):
            run.advance(step)
            run.step(step, metrics(step))
        run.note("above the bar")
    told = capsys.readouterr().err
    assert "4/8" in told and "12 samples/s" in told and "0:00:" in told
    assert "above the bar" in told and "left" not in told


def test_other_ranks_write_nothing(tmp_path, capsys):
    with RunLog(tmp_path / "run", Config(), start_step=0, max_steps=2, enabled=False) as run:
        run.advance(1)
        run.step(1, metrics(1))
        run.evaluation(1, {"r_mean": 1.0})
        run.note("hello")
        run.draw()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().err == ""


def test_the_picture_has_a_panel_for_each_loss_and_score(tmp_path):
    figure_module = pytest.importorskip("matplotlib.figure")
    file, picture = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    file.write_text("")
    log.draw_curves(file, picture)
    assert not picture.exists()  # nothing to show yet
    rng = np.random.default_rng(0)
    with RunLog(tmp_path, Config(), start_step=0, max_steps=400) as run:
        for step in range(1, 401):
            curve = 3 * np.exp(-step / 100) + rng.normal(0, 0.2)
            run.step(step, metrics(step, itc=curve + 1, itm=0.6, lm=curve * 2 + 3))
            if step % 100 == 0:
                run.evaluation(step, {"r_mean": step / 400})
    seen = []
    save = figure_module.Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            figure_module.Figure, "savefig", lambda self, *a, **k: (seen.append(self), save(self, *a, **k))
        )
        log.draw_curves(file, picture)
    axes = seen[0].axes
    assert [panel.get_ylabel() for panel in axes] == ["itc loss", "itm loss", "lm loss", "r_mean"]
    assert all(panel.get_xlabel() == "optimizer step" for panel in axes)
    raw, smooth = (line.get_ydata() for line in axes[0].lines)
    assert len(raw) == len(smooth) == 400
    assert np.abs(np.diff(smooth)).mean() < np.abs(np.diff(raw)).mean() / 5
    with Image.open(picture) as image:
        assert image.format == "PNG" and image.width > image.height


def test_the_running_mean_is_the_mean_of_its_window():
    values = np.arange(80.0) ** 2
    smooth = log._running_mean(values)
    assert smooth[40] == pytest.approx(values[38:43].mean())
    assert smooth[0] == pytest.approx(values[:3].mean()) and smooth[-1] == pytest.approx(values[-3:].mean())
    assert log._running_mean(np.array([4.0])).tolist() == [4.0]
