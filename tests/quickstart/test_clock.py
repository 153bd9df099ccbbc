"""Seconds of steps that were interrupted, finished before, done anew."""

import json

import pytest

from openblip.quickstart import clock as module
from openblip.quickstart.clock import Clock


@pytest.fixture
def spend(monkeypatch):
    """A clock on the wall that moves when told to."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def move(seconds: float) -> None:
        now[0] += seconds

    return move


def test_an_interrupted_step_goes_on_counting_and_a_finished_one_stops(tmp_path, spend):
    file = tmp_path / "seconds.json"
    with pytest.raises(KeyboardInterrupt), Clock(file).resumable("noisy", is_done=False, has_begun=False):
        spend(5)
        raise KeyboardInterrupt
    clock = Clock(file)
    with clock.resumable("noisy", is_done=False, has_begun=True):
        spend(3)
    with clock.resumable("filter", is_done=True, has_begun=True):
        spend(100)
    assert clock.seconds == {"noisy": 8} and clock.total == 8 and clock.peak_mb > 10
    with Clock(file).resumable("noisy", is_done=False, has_begun=False):  # its folder was deleted
        spend(2)
    assert json.loads(file.read_text()) == {"seconds": {"noisy": 2}, "peak_mb": clock.peak_mb}


def test_what_every_call_repeats_counts_once(tmp_path, spend):
    file = tmp_path / "seconds.json"
    for seconds, is_done, expected in ((4, False, 4), (9, True, 4), (9, False, 9)):
        clock = Clock(file)
        with clock.resumable("noisy", is_done=is_done, has_begun=True):
            pass
        with clock.repeated("capfilt"):
            spend(seconds)
        assert clock.seconds["capfilt"] == expected
    with pytest.raises(KeyboardInterrupt), clock.repeated("capfilt"):
        spend(1)
        raise KeyboardInterrupt
    assert Clock(file).seconds["capfilt"] == 9, "half of it was for nothing"
