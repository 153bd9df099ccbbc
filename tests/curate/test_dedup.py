"""Planted copies are found whatever was done to them, and nothing else is; a job goes over the rest."""

import io
import pickle

import pytest
from PIL import Image

from openblip.config import UserError
from openblip.curate import dedup
from openblip.curate.dataset import scores, write_webdataset
from openblip.curate.dedup import deduplicate
from openblip.curate.engine import run
from openblip.data.shards import open_shards
from tests.curate.made import ColourCapFilt, smooth
from tests.data.made import tar_bytes, write

pytest.importorskip("imagehash")
COPIES = {5: 1, 8: 1, 9: 4}  # picture -> the one it is a copy of, scaled and compressed


def jpeg(image: Image.Image, quality: int = 95) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def web(folder, broken: bool = False):
    """Two tars of six: pictures of which three are copies, and a file that is no picture."""
    for shard in range(2):
        members = {}
        for number in range(6 * shard, 6 * shard + 6):
            original = COPIES.get(number, number)
            picture = smooth(original)
            if number in COPIES:
                picture = picture.resize((40, 40))
            content = jpeg(picture, 20 if number in COPIES else 95)
            members[f"{number:04d}.jpg"] = b"no picture" if number == 11 else content
            members[f"{number:04d}.txt"] = b"red"
        write(folder / f"web/{shard:05d}.tar", tar_bytes(members))
    if broken:
        write(folder / "web/00002.tar", b"no tar")
    return open_shards(folder / "web", cache_dir=folder / "cache")


def test_copies_are_left_out_and_the_first_stays(tmp_path):
    source, job = web(tmp_path, broken=True), tmp_path / "job"
    job.mkdir()
    kept, dropped = deduplicate(source, job, 4)
    left = [
        int(kept.part(name)[i].id[-4:]) for name in ("00000", "00001") for i in range(len(kept.part(name)))
    ]
    assert left == [number for number in range(12) if number not in COPIES] and dropped == 3
    result = run(ColourCapFilt(), pickle.loads(pickle.dumps(kept)), job)
    assert (result.images, result.bad, list(result.aside)) == (8, {"not_an_image": 1}, ["00002"])
    written = {int(line["id"][-4:]) for line in scores(job).to_pylist()}
    assert written == set(range(11)) - COPIES.keys()
    made = write_webdataset(job, kept, tmp_path / "out", threshold=0)
    assert made.images == 8
    with pytest.raises(UserError, match="was not made of"):
        write_webdataset(job, source, tmp_path / "whole", threshold=0)


def test_a_second_search_opens_no_picture_and_another_distance_finds_others(tmp_path, monkeypatch):
    source, job = web(tmp_path), tmp_path / "job"
    job.mkdir()
    _, near = deduplicate(source, job, 4)
    before = {path.name: path.stat().st_mtime_ns for path in job.iterdir()}
    monkeypatch.setattr(dedup, "open_image", lambda *_, **__: pytest.fail("a picture was opened"))
    assert deduplicate(source, job, 4)[1] == near == 3
    assert {path.name: path.stat().st_mtime_ns for path in job.iterdir()} == before
    assert deduplicate(source, job, 0)[1] == 2, "compression changed some bits of one"


def test_hashes_within_the_distance_are_found_by_their_bands():
    seen = dedup._Seen(3)
    assert not seen.before(0) and seen.before(0)
    assert seen.before(1 | 1 << 20 | 1 << 63) and not seen.before(1 | 1 << 20 | 1 << 40 | 1 << 63)
    exact = dedup._Seen(0)
    assert not exact.before(0) and not exact.before(1) and exact.before(1)


def test_impossible_distances_are_refused(tmp_path):
    with pytest.raises(UserError, match="0 to 8 bits, got 9"):
        deduplicate(web(tmp_path), tmp_path, 9)


def test_a_shard_that_could_not_be_opened_once_is_put_aside_and_not_taken_for_empty(tmp_path, monkeypatch):
    source, job = web(tmp_path), tmp_path / "job"
    job.mkdir()
    part = type(source).part

    def fails_once(self, shard):
        if shard == "00001":
            raise OSError("the network was away")
        return part(self, shard)

    monkeypatch.setattr(type(source), "part", fails_once)
    kept, _ = deduplicate(source, job, 4)
    monkeypatch.setattr(type(source), "part", part)
    result = run(ColourCapFilt(), kept, job)
    assert list(result.aside) == ["00001"] and "could not be opened when duplicates" in result.aside["00001"]
    kept, dropped = deduplicate(source, job, 4)
    result = run(ColourCapFilt(), kept, job)
    assert not result.aside and dropped == 3 and result.images == 8, "the same call again finishes it"
