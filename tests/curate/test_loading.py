"""Models by name: loaded when there is work, in any process, and known again without being read."""

import pickle

import pytest

from openblip.curate import loading
from openblip.curate.capfilt import CapFilt, CapFiltConfig
from openblip.curate.dataset import scores
from openblip.curate.engine import run
from openblip.curate.loading import NamedCapFilt
from tests.curate.made import picture_rows, tar_source
from tests.tiny_models import save_blip


@pytest.fixture
def named(tmp_path):
    save_blip(tmp_path / "writer")
    save_blip(tmp_path / "other", seed=5)
    save_blip(tmp_path / "filter", seed=2, decoder=False, share=())

    def make(*captioners: str) -> NamedCapFilt:
        writers = [str(tmp_path / name) for name in captioners or ("writer",)]
        return NamedCapFilt(writers, str(tmp_path / "filter"), CapFiltConfig(), known=tmp_path / "job")

    (tmp_path / "job").mkdir()
    return make


def unloadable(*_, **__):
    pytest.fail("a model was loaded")


def test_its_fingerprint_is_that_of_what_it_becomes_and_is_known_again_without_loading(named, monkeypatch):
    first = named()
    became = first.load()
    assert isinstance(became, CapFilt) and first.fingerprint == became.fingerprint
    monkeypatch.setattr(loading, "load", unloadable)
    assert named().fingerprint == first.fingerprint
    assert pickle.loads(pickle.dumps(first))._loaded == {}, "models do not travel"


def test_a_finished_job_loads_nothing_and_a_changed_model_is_noticed(named, tmp_path, monkeypatch):
    source = tar_source(tmp_path)
    run(named(), source, tmp_path / "job")
    with monkeypatch.context() as patched:
        patched.setattr(loading, "load", unloadable)
        assert run(named(), source, tmp_path / "job").found_done == 3
    before = named().fingerprint
    save_blip(tmp_path / "new", seed=9)
    weights = tmp_path / "new/model.safetensors"
    weights.replace(tmp_path / "writer/model.safetensors")
    assert named().fingerprint["captioner"] != before["captioner"]
    with pytest.raises(ValueError, match="captioner was"):
        run(named(), source, tmp_path / "job")
    result = run(named(), source, tmp_path / "job", anew=True)
    assert result.found_done == 0 and len(set(scores(tmp_path / "job")["captioner"].to_pylist())) == 1


def test_the_scale_is_fitted_once(named, monkeypatch):
    first, rows = named(), picture_rows(4)
    first.calibrate(rows)
    assert first.config.scale.itc != 0
    monkeypatch.setattr(loading, "load", unloadable)
    again = named()
    again.calibrate(rows)
    assert again.config.scale == first.config.scale


def test_several_captioners_write_what_each_writes_alone(named, tmp_path):
    source = tar_source(tmp_path, tars=1)

    def texts(folder: str, *captioners: str) -> list[tuple]:
        run(named(*captioners), source, tmp_path / folder)
        lines = scores(tmp_path / folder).to_pylist()
        return [(one["id"], one["text"], one["captioner"]) for one in lines if one["kind"] == "synthetic"]

    one, other = texts("one", "writer"), texts("other", "other")
    assert len({line[2] for line in one + other}) == 2 and {o[1] for o in one} != {o[1] for o in other}
    both = texts("both", "writer", "other")
    assert sorted(both) == sorted(one + other)
