"""Lists of uids as DataComp's tools read them."""

import hashlib
import json

import numpy as np

from openblip.curate.engine import run
from openblip.curate.uids import uid_of, write_uids
from openblip.data.rows import Row
from openblip.data.shards import open_shards
from tests.curate.made import COLOURS, WRONG, ColourCapFilt, caption, colour, tar_source
from tests.data.made import png, tar_bytes, write


def md5(text: str) -> str:
    return hashlib.md5(text.encode()).hexdigest()


def as_datacomp(uids):
    """The expression of DataComp's own baselines."""
    made = np.array([(int(uid[:16], 16), int(uid[16:32], 16)) for uid in uids], np.dtype("u8,u8"))
    made.sort()
    return made


def test_a_uid_is_the_rows_own_or_the_md5_of_its_id():
    own = md5("anything")
    assert uid_of(Row("x", [], [], extra={"uid": own.upper()})) == own
    assert uid_of(Row(own, [], [])) == own
    assert uid_of(Row("x", [], [], extra={"uid": "short"})) == uid_of(Row("x", [], [])) == md5("x")


def test_the_list_holds_the_pairs_whose_web_text_is_kept(tmp_path):
    members = {}
    for number in range(12):
        members[f"{number:04d}.png"] = png(COLOURS[colour(number)])
        members[f"{number:04d}.txt"] = caption(number).encode()
        members[f"{number:04d}.json"] = json.dumps({"uid": md5(str(number))}).encode()
    write(tmp_path / "web/00000.tar", tar_bytes(members))
    source = open_shards(tmp_path / "web", cache_dir=tmp_path / "c")
    run(ColourCapFilt(), source, tmp_path / "job")
    kept = [md5(str(number)) for number in range(12) if number not in WRONG]
    assert write_uids(tmp_path / "job", source, tmp_path / "uids.npy") == len(kept) == 8
    found = np.load(tmp_path / "uids.npy")
    assert found.dtype == np.dtype("u8,u8") and (found == as_datacomp(kept)).all()
    assert write_uids(tmp_path / "job", source, tmp_path / "none.npy", threshold=0.95) == 0
    assert np.load(tmp_path / "none.npy").shape == (0,)


def test_without_uids_ids_are_hashed(tmp_path):
    source = tar_source(tmp_path)
    run(ColourCapFilt(), source, tmp_path / "job")
    write_uids(tmp_path / "job", source, tmp_path / "uids.npy")
    kept = as_datacomp(md5(f"p{number}") for number in range(12) if number not in WRONG)
    assert (np.load(tmp_path / "uids.npy") == kept).all()
