"""A dry run: what all would take, from a part of it."""

import pytest

from openblip.config import UserError
from openblip.curate.estimate import estimate
from openblip.data.shards import open_shards
from tests.curate.made import ColourCapFilt, tar_source
from tests.data.made import write


def test_it_counts_all_by_a_part_and_publishes_nothing(tmp_path):
    tar_source(tmp_path, tars=12, each=30, bad={0: b""})
    write(tmp_path / "web/00011.tar", b"no tar")
    source = open_shards(tmp_path / "web", cache_dir=tmp_path / "cache")
    before = sorted(tmp_path.rglob("*"))
    capfilt = ColourCapFilt()
    found = estimate(capfilt, source, samples=100, batch_size=5, price=2.0)
    assert found.shards == 12 and found.samples == 89 and found.bad == {"empty": 1}
    assert found.images == pytest.approx(330 * 89 / 90, rel=0.03), (
        "all shards but the broken one, less what is bad"
    )
    assert found.cost == 2 * found.hours > 0
    assert found.images_per_second * found.hours * 3600 == pytest.approx(found.images, rel=0.01)
    assert {"read", "decode", "caption", "score"} == set(found.ms) and 0 < found.noise_share < 1
    assert "one worker" in found.text() and "cost: " in found.text()
    assert capfilt.calls <= 20 and not [
        path for path in sorted(tmp_path.rglob("*")) if path not in before and path.suffix != ".arrow"
    ]


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"decoders": 0}])
def test_impossible_numbers_are_refused_before_a_model_is_asked(tmp_path, wrong):
    capfilt = ColourCapFilt()
    with pytest.raises(UserError, match="batch_size and decoders are at least 1"):
        estimate(capfilt, tar_source(tmp_path, tars=1), **wrong)
    assert not capfilt.calls


def test_a_source_of_no_use_is_an_error(tmp_path):
    source = tar_source(tmp_path, tars=1, each=3, bad=dict.fromkeys(range(3), b""))
    with pytest.raises(UserError, match="none of 3 rows looked at can be used"):
        estimate(ColourCapFilt(), source)
