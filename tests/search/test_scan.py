"""Search without an index: the order by cosine, what the ITM head changes of it, and pictures that are broken."""

import json

import numpy as np
import pytest

from openblip.api import load
from openblip.config import UserError
from openblip.data.rows import BadRows
from openblip.data.sources import open_source
from openblip.search.scan import scan
from tests.curate.made import tiny_blip
from tests.tiny_models import picture_folder, save_clip

QUERY = "a green square"


@pytest.fixture(scope="module")
def pipeline():
    return tiny_blip(5)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    return open_source(picture_folder(folder / "data", 10), cache_dir=folder / "cache")


def test_without_the_itm_head_the_order_is_that_of_cosine(pipeline, source):
    found = scan(pipeline, source, QUERY, top=20, rerank=0)
    cosine = pipeline.embed_images([row.image for row in source]) @ pipeline.embed_texts(QUERY)
    ids = [row.id for row in source]
    assert [hit["id"] for hit in found] == [ids[i] for i in np.argsort(-cosine)]
    assert [hit["cosine"] for hit in found] == pytest.approx(sorted(cosine, reverse=True), abs=1e-5)
    assert all(hit["score"] == hit["cosine"] for hit in found)
    assert all("captions.jsonl" in hit["where"] for hit in found)
    assert scan(pipeline, source, QUERY, top=3, rerank=0) == found[:3]


def test_the_itm_head_changes_the_order_of_the_head_alone(pipeline, source):
    plain = scan(pipeline, source, QUERY, top=20, rerank=0)
    found = scan(pipeline, source, QUERY, top=20, rerank=4)
    assert {hit["id"] for hit in found[:4]} == {hit["id"] for hit in plain[:4]}
    assert found[4:] == plain[4:]
    images = {row.id: row.image for row in source}
    judged, temperature = {}, pipeline.model.temperature.item()
    for hit in plain[:4]:
        match = pipeline.match(images[hit["id"]], QUERY)
        p = float(match.probability[0])
        judged[hit["id"]] = np.log(p / (1 - p)) + float(match.cosine[0]) / temperature
    assert [hit["id"] for hit in found[:4]] == sorted(judged, key=judged.get, reverse=True)
    assert [hit["score"] for hit in found[:4]] == pytest.approx(
        sorted(judged.values(), reverse=True), abs=1e-4
    )
    whole = scan(pipeline, source, QUERY, top=20, rerank=100)
    assert [hit["id"] for hit in whole] != [hit["id"] for hit in plain], "it can change the order"


def test_clip_has_no_itm_head_and_ranks_by_cosine(source, tmp_path):
    clip = load(save_clip(tmp_path / "clip"))
    assert tiny_blip(5).can_match and not clip.can_match
    found = scan(clip, source, QUERY, top=20, rerank=4)
    assert found == scan(clip, source, QUERY, top=20, rerank=0) and len(found) == 10
    cosine = clip.embed_images([row.image for row in source]) @ clip.embed_texts(QUERY)
    assert [hit["score"] for hit in found] == pytest.approx(sorted(cosine, reverse=True), abs=1e-5)


def test_broken_pictures_and_rows_are_recorded_and_the_rest_is_found(pipeline, tmp_path):
    folder = picture_folder(tmp_path / "data", 5)
    (folder / "images/01.png").write_bytes(b"no picture")
    (folder / "images/02.png").unlink()
    with (folder / "captions.jsonl").open("a") as file:
        file.write(json.dumps({"captions": ["of nothing"]}) + "\n")
    bad = BadRows()
    source = open_source(folder, cache_dir=tmp_path / "cache")
    found = scan(pipeline, source, QUERY, top=20, rerank=2, bad=bad)
    assert {hit["id"][-6:] for hit in found} == {"00.png", "03.png", "04.png"}
    assert bad.total == 3 and bad.counts["not_an_image"] == 1, bad.counts


def test_videos_are_no_pictures_and_it_is_told_how_far_it_is(pipeline, tmp_path):
    folder, told, bad = picture_folder(tmp_path / "data", 3), [], BadRows()
    with (folder / "captions.jsonl").open("a") as file:
        file.write(json.dumps({"video": "a.mp4", "captions": ["a film"]}) + "\n")
    source = open_source(folder, cache_dir=tmp_path / "cache")
    found = scan(pipeline, source, QUERY, rerank=2, bad=bad, report=lambda *done: told.append(done))
    assert len(found) == 3 and dict(bad.counts) == {"not_an_image": 1}
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("numbers", [{"top": -2}, {"top": 0}, {"rerank": -1}])
def test_numbers_that_make_no_sense_are_refused(numbers, pipeline, source):
    with pytest.raises(UserError, match="top is at least 1 and rerank not negative"):
        scan(pipeline, source, QUERY, **numbers)


def test_nothing_to_search_is_said(pipeline, tmp_path):
    folder = picture_folder(tmp_path / "data", 2)
    for picture in (folder / "images").iterdir():
        picture.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"no picture could be opened.*not_an_image"):
        scan(pipeline, open_source(folder, cache_dir=tmp_path / "cache"), QUERY)
