"""The same job on Ray: the same files, whatever becomes of actors and machines.

One small cluster for all tests; its workers import this project from the folder pytest runs in.
"""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from openblip.config import UserError
from openblip.curate.capfilt import CapFiltConfig
from openblip.curate.engine import run
from openblip.curate.engine_ray import ATTEMPTS, RayOptions, on_ray
from openblip.curate.loading import NamedCapFilt
from openblip.curate.shard import Work
from openblip.data.shards import open_shards
from tests.curate.made import ColourCapFilt, tar_source
from tests.curate.test_engine import files
from tests.tiny_models import save_blip

os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled", RAY_worker_niceness="0")
ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cluster():
    """Two machines of one CPU each, after a head without any, on loopback."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 10**8})
    nodes = [made.add_node(num_cpus=1, object_store_memory=10**8) for _ in range(2)]
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    ray.init(
        address=made.address,
        runtime_env={"env_vars": environment},
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield made, nodes
    ray.shutdown()
    made.shutdown()


def tars(folder: Path, **options):
    tar_source(folder, **options)
    return open_shards(folder / "web", cache_dir=folder / "cache")


class Dying(ColourCapFilt):
    """Kills its process when it first arrives in a worker, then at some shards, {name: how often}; files count."""

    def __init__(self, times: dict[str, int], folder: Path) -> None:
        super().__init__()
        self.times, self.folder, self.home = times, folder, os.getpid()

    def __setstate__(self, state):
        self.__dict__ = state
        if os.getpid() != self.home and not (self.folder / "death-on-arrival").exists():
            (self.folder / "death-on-arrival").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def write(self, rows, seen):
        shard = rows[0].where.partition(".tar")[0]
        deaths = len(list(self.folder.glob(f"death-{shard}-*")))
        if deaths < self.times.get(shard, 0):
            (self.folder / f"death-{shard}-{deaths}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().write(rows, seen)


def test_no_cluster_and_no_ray_are_one_line(tmp_path, monkeypatch):
    source, work = tars(tmp_path), Work(tmp_path)
    with pytest.raises(UserError, match=r"^Ray: no cluster at '127.0.0.1:9': .*refused"):
        next(on_ray(ColourCapFilt(), source, ["00000"], work, RayOptions(address="127.0.0.1:9")))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r'needs the package ray: pip install "openblip\[ray\]"'):
        next(on_ray(ColourCapFilt(), source, ["00000"], work, RayOptions()))


@pytest.fixture
def one_thread():
    """As an actor of one CPU has; with more, sums are rounded otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_real_models_on_two_actors_and_one_and_here_make_the_same_files(cluster, tmp_path):
    source = tars(tmp_path, tars=4, each=3, bad={5: b"no picture"})
    save_blip(tmp_path / "writer")
    save_blip(tmp_path / "filter", seed=2, decoder=False, share=())

    def job(name: str, actors: int | None) -> dict[str, bytes]:
        names = [str(tmp_path / "writer")], str(tmp_path / "filter")
        capfilt = NamedCapFilt(*names, CapFiltConfig(), known=tmp_path / name)
        on = None if actors is None else RayOptions(actors=actors)
        result = run(capfilt, source, tmp_path / name, batch_size=2, ray=on)
        assert (result.shards, result.images, result.bad) == (4, 11, {"not_an_image": 1})
        return files(tmp_path / name)

    here = job("here", None)
    assert len(here) == 10
    assert job("one", 1) == here
    assert job("two", 2) == here


def test_killed_workers_cost_time_and_the_shard_that_kills_them_all_is_put_aside(cluster, tmp_path):
    source = tars(tmp_path)
    run(ColourCapFilt(), source, tmp_path / "here")
    capfilt = Dying({"00000": 1, "00001": 99}, tmp_path)
    result = run(capfilt, source, tmp_path / "job", ray=RayOptions(actors=2))
    assert (tmp_path / "death-on-arrival").exists() and len(list(tmp_path.glob("death-00000-*"))) == 1
    assert len(list(tmp_path.glob("death-00001-*"))) == ATTEMPTS
    assert list(result.aside) == ["00001"] and "its worker died 3 times" in result.aside["00001"]
    assert not list((tmp_path / "job").glob(".*")), "no claim and no half-written file is left"
    found, whole = files(tmp_path / "job"), files(tmp_path / "here")
    assert found.pop("quarantine-00001.json")
    assert found == {name: whole[name] for name in whole if "00001" not in name}


class Failing(ColourCapFilt):
    def load(self):
        raise UserError("captioner: there is no such model")


def test_what_ends_a_job_is_said_in_one_line(cluster, tmp_path):
    with pytest.raises(UserError, match=r"^captioner: there is no such model$"):
        run(Failing(), tars(tmp_path), tmp_path / "job", ray=RayOptions())
    with pytest.raises(UserError, match="an actor of 64 CPUs and 0 GPUs fits on no machine; there are: "):
        run(ColourCapFilt(), tars(tmp_path), tmp_path / "job", ray=RayOptions(cpus=64))
    with pytest.raises(UserError, match="actors is at least 1"):
        RayOptions(actors=0)


class LosingAMachine(ColourCapFilt):
    """Tells where it works, then waits at one shard until that machine is gone."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def write(self, rows, seen):
        if "00003.tar" in rows[0].where and not (self.folder / "where").exists():
            part = self.folder / "part"
            part.write_text(ray.get_runtime_context().get_node_id())
            part.rename(self.folder / "where")
            signal.pause()
        return super().write(rows, seen)


def test_a_lost_machine_loses_nothing(cluster, tmp_path):
    """The last test of the cluster, which has one machine less after it."""
    made, nodes = cluster
    source = tars(tmp_path, tars=8, each=3)
    run(ColourCapFilt(), source, tmp_path / "here")
    killed = []

    def watch(state):  # called after each shard: the other machine goes on
        if (tmp_path / "where").exists() and not killed:
            lost = (tmp_path / "where").read_text()
            killed.append(next(node for node in nodes if node.node_id == lost))
            made.remove_node(killed[0], allow_graceful=False)

    capfilt = LosingAMachine(tmp_path)
    result = run(capfilt, source, tmp_path / "job", ray=RayOptions(actors=2), progress=watch)
    assert killed and not result.aside and result.images == 24
    assert files(tmp_path / "job") == files(tmp_path / "here")
