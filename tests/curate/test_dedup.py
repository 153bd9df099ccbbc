"""Planted copies are found whatever was done to them, and nothing else is; a job goes over the rest."""

import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from openblip.config import UserError
from openblip.curate import dedup
from openblip.curate.dataset import scores, write_webdataset
from openblip.curate.dedup import deduplicate
from openblip.curate.engine import run
from openblip.data.shards import open_shards
from openblip.data.sources import open_source
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
    near, far = 1 | 1 << 20 | 1 << 63, 1 | 1 << 20 | 1 << 40 | 1 << 63
    assert not seen.before(0, owner=1) and seen.before(0, owner=2) and not seen.before(0, owner=1)
    assert seen.before(near, owner=2) and not seen.before(far, owner=2)
    assert not dedup._Seen(3).before(near, owner=1)
    exact = dedup._Seen(0)
    assert not exact.before(0, owner=1) and not exact.before(1, owner=1) and exact.before(1, owner=2)


@pytest.mark.parametrize("distance", [0, 4])
def test_rows_of_one_picture_stay_or_go_together(tmp_path, distance):
    """One line per caption: pictures 0 and 1 with three captions each, then a copy of 0 under another name."""
    lines = []
    for name, picture in (("a", 0), ("b", 1), ("copy", 0)):
        write(tmp_path / f"web/{name}.jpg", jpeg(smooth(picture)))
        lines += [{"file_name": f"{name}.jpg", "caption": f"{name} red {n}"} for n in range(3)]
    lines = lines[::3] + lines[1::3] + lines[2::3]  # the rows of a picture need not stand together
    write(tmp_path / "web/captions.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    source, job = open_source(tmp_path / "web", cache_dir=tmp_path / "cache"), tmp_path / "job"
    job.mkdir()
    for _ in range(2):  # the second time from the hashes on disk
        kept, dropped = deduplicate(source, job, distance)
        rows = kept.part(source.shards()[0].name)
        assert [rows[n].captions[0] for n in range(len(rows))] == [
            f"{name} red {n}" for n in range(3) for name in "ab"
        ]
        assert dropped == 3


def test_hashes_on_disk_that_do_not_say_whose_they_are_are_made_again(tmp_path):
    source, job = web(tmp_path), tmp_path / "job"
    job.mkdir()
    for shard in source.shards():
        with (job / f"hashes-{shard.name}.npy").open("wb") as file:
            for part in (source.identity(shard.name), 6, np.zeros(0, [("row", "i8"), ("hash", "u8")])):
                np.save(file, np.array(part))
    assert deduplicate(source, job, 4)[1] == 3


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
