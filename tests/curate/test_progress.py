"""The line and the page of a job."""

import re

import pytest

from openblip.curate import progress as module
from openblip.curate.engine import run
from openblip.curate.job import BINS, ShardManifest
from openblip.curate.progress import Progress, clock
from openblip.curate.shard import PHASES, Outcome
from tests.curate.made import ColourCapFilt, tar_source
from tests.curate.test_report import Balance


@pytest.fixture
def at(monkeypatch):
    """Sets the time, in seconds."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, seconds)


def manifest(name: str, images: int, noise: int) -> ShardManifest:
    match = [0] * BINS
    match[49], match[50] = noise, images - noise
    return ShardManifest(name, images, images, 2 * images, "", {}, [], match)


def test_speed_and_time_left_are_of_this_run_and_noise_is_of_all(at):
    at(100)
    state = Progress(10, begun=100)
    state.found([manifest("a", 50, 10)], [])
    assert "left" not in state.line() and state.noise_share == 0.2
    at(110)
    state.add(Outcome(manifest("b", 50, 40), None, {"caption": 4.0, "read": 1.0}))
    assert state.line() == "2 of 10 shards, 5.0 images/s, 50.0% noise so far, 0:01:20 left"
    state.in_work = 20
    assert state.images_per_second == 7 and state.seconds["caption"] == 4
    assert Progress(1, threshold=0.5).noise_share is None


def test_a_clock():
    assert [clock(s) for s in (59.6, 3661, 200_000)] == ["0:01:00", "1:01:01", "2 d 7:33:20"]


def test_a_job_leaves_a_page_that_is_live_while_it_runs(tmp_path):
    live = []

    def look(state):
        live.append((tmp_path / "job/progress.html").read_text())

    source = tar_source(tmp_path, tars=4, each=130, bad=dict.fromkeys(range(20), b""))
    result = run(ColourCapFilt(), source, tmp_path / "job", progress=look)
    assert 'http-equiv="refresh"' in live[0] and "of 4 shards" in live[0]
    page = (tmp_path / "job/progress.html").read_text()
    Balance(page)
    assert "refresh" not in page and "4 of 4 shards (1 put aside)" in page and "<svg" in page
    assert re.search(r"<td>00000</td><td>20 bad rows among 32 of 130 \(empty 20\)", page)
    for phase in PHASES:
        assert re.search(rf"<td>{phase}</td>", page) and result.seconds[phase] > 0
