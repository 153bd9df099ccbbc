"""What goes wrong in a job: one shard's trouble stays its own, a full disk is one line, a killed run loses nothing."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from openblip.config import UserError
from openblip.curate import dataset, engine, job
from openblip.curate.dataset import scores, write_parquet
from openblip.curate.engine import run
from openblip.curate.job import PublishError, publish
from openblip.curate.report import write_report
from openblip.data.shards import open_shards
from tests.curate.made import ColourCapFilt, tar_source
from tests.curate.test_engine import files
from tests.data.made import write

ROOT = Path(__file__).resolve().parents[2]
TRIALS = int(os.environ.get("OPENBLIP_KILL_TRIALS", "3"))


def tars(folder: Path, **options):
    tar_source(folder, **options)
    return open_shards(folder / "web", cache_dir=folder / "cache")


def test_a_poisoned_shard_is_put_aside_and_the_rest_is_as_without_it(tmp_path):
    source, folder = tars(tmp_path), tmp_path / "job"
    run(ColourCapFilt(), source, tmp_path / "whole")
    poison = b"<html>404: not found</html>"
    whole = (tmp_path / "web/00001.tar").read_bytes()
    write(tmp_path / "web/00001.tar", poison)
    source = open_shards(tmp_path / "web", cache_dir=tmp_path / "cache")
    result = run(ColourCapFilt(), source, folder)
    assert result.aside == {"00001": "ReadError: truncated header"} and result.images == 8
    told = json.loads((folder / "quarantine-00001.json").read_text())
    assert told["reason"] == result.aside["00001"] and "Traceback" in told["detail"]
    found, wanted = files(folder), files(tmp_path / "whole")
    assert {name: found[name] for name in wanted if "00001" not in name} == {
        name: content for name, content in wanted.items() if "00001" not in name
    }
    assert (tmp_path / "web/00001.tar").read_bytes() == poison, "the input stays as it is"
    assert write_parquet(folder, source, tmp_path / "out").images == 8
    assert write_report(folder, source, tmp_path / "report.html")["images"] == 8
    again = ColourCapFilt()
    assert run(again, source, folder).aside == result.aside and again.calls == 0
    write(tmp_path / "web/00001.tar", whole)
    mended = open_shards(tmp_path / "web", cache_dir=tmp_path / "cache")
    assert not run(again, mended, folder, anew=True).aside and again.calls == 1
    assert files(folder) == wanted


def test_a_model_that_fails_at_a_shard_is_that_shards_trouble(tmp_path):
    capfilt = ColourCapFilt()
    real = capfilt.score

    def score(rows, written, seen):
        if "00001" in rows[0].where:
            raise RuntimeError("index out of range\n in self")
        return real(rows, written, seen)

    capfilt.score = score
    result = run(capfilt, tars(tmp_path), tmp_path / "job")
    assert result.aside == {"00001": "RuntimeError: index out of range in self"} and result.images == 8


def test_when_nothing_works_the_job_ends_early_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "IN_A_ROW", 2)
    capfilt = ColourCapFilt()
    capfilt.write = lambda *_: 1 / 0
    source = tars(tmp_path, tars=5)
    with pytest.raises(UserError, match=r"2 shards in a row .* 00001: ZeroDivisionError: division by zero"):
        run(capfilt, source, tmp_path / "job")
    assert len(list((tmp_path / "job").glob("quarantine-*"))) == 2
    write_all = tars(tmp_path / "one", tars=1)
    with pytest.raises(UserError, match="every shard had to be put aside; 00000: ZeroDivisionError"):
        run(capfilt, write_all, tmp_path / "one/job")


def test_a_full_disk_is_one_line_and_nothing_is_half_published(tmp_path, monkeypatch):
    source, folder = tars(tmp_path), tmp_path / "job"
    fsync, full = os.fsync, []

    def no_room(descriptor):
        name = Path(f"/proc/self/fd/{descriptor}").resolve().name
        if "scores-00001.parquet" in name:
            full.append(name)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(job.os, "fsync", no_room)
    with pytest.raises(PublishError, match=r"No space left on device.*the same call goes on from it") as told:
        run(ColourCapFilt(), source, folder)
    assert full and "\n" not in str(told.value)
    names = {path.name for path in folder.iterdir()} - {"progress.html"}
    assert names == {"scores-00000.parquet", "scores-00000.json", "bad_rows.jsonl"}
    monkeypatch.undo()
    assert run(ColourCapFilt(), source, folder).found_done == 1
    run(ColourCapFilt(), source, tmp_path / "whole")
    assert files(folder) == files(tmp_path / "whole")


def test_a_disk_that_is_full_for_good(tmp_path):
    """The kernel's own refusal: a process that may write no file of more than a kilobyte."""
    tars(tmp_path)
    code = f"""
import resource, signal
from pathlib import Path
from openblip.curate.engine import run
from tests.curate.made import ColourCapFilt
from openblip.data.shards import open_shards
source = open_shards({str(tmp_path / "web")!r}, cache_dir={str(tmp_path / "cache")!r})
[source.part(shard.name) for shard in source.shards()]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
run(ColourCapFilt(), source, {str(tmp_path / "job")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "PublishError" in done.stderr and "File too large" in done.stderr
    assert {path.name for path in (tmp_path / "job").iterdir()} == {"bad_rows.jsonl"}


def test_an_output_that_must_not_be_written_is_one_line_before_any_model(tmp_path):
    write(tmp_path / "file", b"")
    capfilt = ColourCapFilt()
    with pytest.raises(PublishError, match="file/job: cannot be made"):
        run(capfilt, tars(tmp_path), tmp_path / "file/job")
    with pytest.raises(PublishError, match=r"^/proc: cannot be written \(.*\): x"):
        publish(Path("/proc/x"), b"")
    assert capfilt.calls == 0


WORK = """
import sys, time, torch
torch.set_num_threads(1)
from openblip.curate.engine import run
from openblip.data.shards import open_shards
from tests.curate.made import ColourCapFilt
web, cache, out = sys.argv[1:]
capfilt = ColourCapFilt(die_at=lambda calls: time.sleep(0.02))
print("begun", flush=True)
run(capfilt, open_shards(web, cache_dir=cache), out, batch_size=2)
"""


def test_killed_at_any_moment_and_called_again_it_is_the_undisturbed_run(tmp_path):
    """A handful of trials; OPENBLIP_KILL_TRIALS=30 for more. Moments are spread over the run by the trial's number."""
    tars(tmp_path, tars=8, bad={5: b"no picture"})
    untouched = {path.name: path.read_bytes() for path in (tmp_path / "web").iterdir()}

    def begin(out: str) -> subprocess.Popen:
        call = [sys.executable, "-c", WORK, *(str(tmp_path / name) for name in ("web", "cache", out))]
        child = subprocess.Popen(call, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert child.stdout.readline() == "begun\n"
        return child

    child, begun = begin("quiet"), time.monotonic()
    assert child.wait() == 0
    usual = time.monotonic() - begun
    kills = 0
    for trial in range(TRIALS):
        out = f"job{trial}"
        child = begin(out)
        time.sleep(usual * (trial + 0.5) / TRIALS)
        child.kill()
        kills += child.wait() == -signal.SIGKILL
        result = run(
            ColourCapFilt(), open_shards(tmp_path / "web", cache_dir=tmp_path / "cache"), tmp_path / out
        )
        assert result.shards == 8 and not result.aside
        assert files(tmp_path / out) == files(tmp_path / "quiet")
        assert len(scores(tmp_path / out)) == 62
    assert kills, "at least one was still at work"
    assert {path.name: path.read_bytes() for path in (tmp_path / "web").iterdir()} == untouched


def test_a_disk_that_fills_up_under_a_dataset_is_one_line(tmp_path, monkeypatch):
    source = tars(tmp_path)
    run(ColourCapFilt(), source, tmp_path / "job")

    def no_room(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(dataset.os, "fsync", no_room)
    for write_kept in (dataset.write_parquet, dataset.write_webdataset):
        with pytest.raises(PublishError, match=r"out: cannot be written .No space left on device"):
            write_kept(tmp_path / "job", source, tmp_path / "out")
        assert not list(tmp_path.glob("*out*"))
    monkeypatch.undo()
    assert dataset.write_webdataset(tmp_path / "job", source, tmp_path / "out").images == 12
