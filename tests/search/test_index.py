"""An index: what is in it after adding, again, from elsewhere, killed; what it refuses; what it finds."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from openblip.api import load
from openblip.config import UserError
from openblip.data.image import BadImage, open_image
from openblip.data.rows import BadRows
from openblip.search import index as module
from openblip.search.fill import add
from openblip.search.find import find
from openblip.search.index import create_index, new_index, open_index
from openblip.search.lines import Made, vectors_of
from openblip.search.places import Places
from tests.curate.made import tiny_blip
from tests.data.made import tar_bytes, write
from tests.tiny_models import drawing, picture_folder, save_blip, save_blip2, save_clip

QUERY = "a green square"
KEPT = ("source", "id", "captions", "split", "extra", "where", "place", "thumbnail")


@pytest.fixture(scope="module")
def pipeline():
    return tiny_blip(5)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """30 pictures: 15 of split train, 15 of test."""
    return picture_folder(tmp_path_factory.mktemp("data") / "of it", 30)


@pytest.fixture(scope="module")
def filled(pipeline, data, cache, tmp_path_factory):
    """An index of `data` that no test changes."""
    index = create_index(tmp_path_factory.mktemp("index"), pipeline, "tiny")
    add(index, pipeline, data, cache_dir=cache)
    index.tend()
    return index


def content(index) -> dict:
    """Every column but the vector by (source, id), and the vectors [n, ...] in the order of these."""
    table = index.table.to_arrow()
    vectors = vectors_of(table["vector"], index.made)
    lines = table.select(KEPT).to_pylist()
    order = sorted(range(len(lines)), key=lambda i: (lines[i]["source"], lines[i]["id"]))
    keys = [(lines[i]["source"], lines[i]["id"]) for i in order]
    assert len(set(keys)) == len(keys), "no picture is there twice"
    return {"lines": [lines[i] for i in order], "vectors": vectors[order]}


def test_what_is_added_is_what_the_model_makes_of_it(pipeline, data, filled):
    found = content(filled)
    assert [line["id"] for line in found["lines"]] == [f"images/{n:02d}.png" for n in range(30)]
    expected = pipeline.embed_images([data / line["id"] for line in found["lines"]])
    np.testing.assert_allclose(found["vectors"], expected, atol=1e-5)
    first, last = found["lines"][0], found["lines"][-1]
    assert first["captions"] == ["a red circle"] and first["source"] == str(data)
    assert (first["split"], last["split"]) == ("train", "test") and "captions.jsonl" in first["where"]
    assert open_image(first["thumbnail"]).size == (48, 48), "no larger than the picture"
    stats = filled.stats()
    assert stats["pictures"] == 30 and stats["splits"] == {"train": 15, "test": 15}
    assert stats["sources"] == {str(data): 30} and stats["search"] == "exact" and stats["bytes"] > 0


def test_adding_again_embeds_nothing_and_new_pictures_alone_are_added(pipeline, cache, tmp_path, monkeypatch):
    folder, index = picture_folder(tmp_path / "data", 6), create_index(tmp_path / "index", pipeline, "tiny")
    assert add(index, pipeline, folder, cache_dir=cache).pictures == 6
    before, seen = content(index), []
    encode = type(pipeline.model).encode_image
    monkeypatch.setattr(
        type(pipeline.model), "encode_image", lambda self, of: seen.append(len(of)) or encode(self, of)
    )
    again = add(index, pipeline, folder, cache_dir=cache)
    assert (again.pictures, again.known, again.rows, seen) == (0, 6, 6, [])
    drawing(40).save(folder / "images/new.png")
    with (folder / "captions.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": "images/new.png", "caption": "new", "year": 2011}) + "\n")
    more = add(open_index(tmp_path / "index"), pipeline, folder, cache_dir=cache)
    assert (more.pictures, more.known, sum(seen)) == (1, 6, 1)
    index = open_index(tmp_path / "index")
    after = content(index)
    assert after["lines"][:6] == before["lines"] and np.array_equal(after["vectors"][:6], before["vectors"])
    assert json.loads(after["lines"][6]["extra"]) == {"year": 2011}
    (hit,) = find(index, pipeline, QUERY, where="json_get_int(extra, 'year') > 2010")
    assert hit["id"] == "images/new.png" and hit["extra"] == {"year": 2011}


def test_equal_names_in_two_sources_are_two_pictures_and_a_name_outlives_a_folder(pipeline, cache, tmp_path):
    first, second = picture_folder(tmp_path / "a", 3), picture_folder(tmp_path / "b", 5)
    index = create_index(tmp_path / "index", pipeline, "tiny")
    add(index, pipeline, first, cache_dir=cache)
    assert add(index, pipeline, second, name="mine", cache_dir=cache).pictures == 5
    moved = (tmp_path / "b").rename(tmp_path / "c")
    assert add(index, pipeline, moved, name="mine", cache_dir=cache).known == 5
    assert index.stats()["sources"] == {str(first): 3, "mine": 5}


def test_rows_of_one_picture_in_a_row_are_one_with_all_captions(pipeline, cache, tmp_path):
    folder = picture_folder(tmp_path / "data", 3)
    lines = (folder / "captions.jsonl").read_text().splitlines(keepends=True)
    other = json.dumps({"file_name": "images/00.png", "caption": "the first"}) + "\n"
    late = json.dumps({"file_name": "images/00.png", "caption": "too late"}) + "\n"
    (folder / "captions.jsonl").write_text("".join([lines[0], other, *lines[1:], late]))
    for block in (1, 1024):  # also where one block ends between the rows of a picture
        index = create_index(tmp_path / f"index{block}", pipeline, "tiny")
        added = add(index, pipeline, folder, cache_dir=cache, block=block)
        assert (added.pictures, added.known, added.rows) == (3, 1, 5)
        assert content(index)["lines"][0]["captions"] == ["a red circle", "the first"]


def test_tars_and_parquet_are_opened_again_where_they_are(pipeline, cache, tmp_path):
    pictures = [(tmp_path / f"{n}.png", drawing(n)) for n in range(4)]
    for path, image in pictures:
        image.save(path)
    members = {f"{n}.png": path.read_bytes() for n, (path, _) in enumerate(pictures)}
    write(tmp_path / "web/0.tar", tar_bytes({**members, **{f"{n}.txt": b"a thing" for n in range(4)}}))
    table = {"image": [{"bytes": path.read_bytes()} for path, _ in pictures], "id": list("abcd")}
    pa.parquet.write_table(pa.table({**table, "split": ["x", "y", "x", "y"]}), tmp_path / "some.parquet")
    index = create_index(tmp_path / "index", pipeline, "tiny")
    add(index, pipeline, tmp_path / "web", cache_dir=cache)
    add(index, pipeline, tmp_path / "some.parquet", reading={"split": "y"}, cache_dir=cache)
    found, places = content(index)["lines"], Places(cache)
    drawn = {"b": 1, "d": 3} | {f"0.tar/{n}": n for n in range(4)}
    assert len(found) == 6
    for line in found:
        number = drawn.get(line["id"], next((n for n in range(4) if line["id"].endswith(str(n))), None))
        opened = places.open(json.loads(line["place"]), line["id"])
        assert np.array_equal(np.asarray(opened), np.asarray(pictures[number][1])), line
    hits = find(index, pipeline, QUERY, places=places)
    assert {hit["judged"] for hit in hits} == {"picture"} and len(hits) == 6
    held = next(hit for hit in hits if hit["id"] == "b")
    with pytest.raises(BadImage, match="holds picture b now, not d"):
        places.open(held["place"], "d")
    (tmp_path / "some.parquet").unlink()
    assert Places(cache).open_if_there(held["place"], "b") is None


def test_bad_rows_and_pictures_are_recorded_and_too_many_of_them_end_it(pipeline, cache, tmp_path):
    folder = picture_folder(tmp_path / "data", 6)
    (folder / "images/01.png").write_bytes(b"no picture")
    (folder / "images/02.png").unlink()
    with (folder / "captions.jsonl").open("a") as file:
        file.write('{"captions": ["of nothing"]}\nno json\n{"video": "a.mp4", "captions": ["a film"]}\n')
    index, bad = create_index(tmp_path / "index", pipeline, "tiny"), BadRows(tmp_path / "bad.jsonl")
    told: list = []
    added = add(
        index, pipeline, folder, cache_dir=cache, bad=bad, block=2, report=lambda *now: told.append(now)
    )
    assert told[-1] == (9, 9) and told == sorted(told)
    assert (added.pictures, added.rows, sum(added.bad.values())) == (4, 9, 5) and bad.seen == 9
    listed = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert {"not_an_image", "missing", "missing_image", "not_json"} == {one["reason"] for one in listed}
    assert any("line 2" in one["where"] for one in listed)
    with pytest.raises(UserError, match=r"bad.*max_share"):
        add(index, pipeline, folder, cache_dir=cache, bad=BadRows(max_share=0.1, min_seen=1))
    drawing(1).save(folder / "images/01.png")
    assert add(index, pipeline, folder, cache_dir=cache).pictures == 1, "a mended picture is added later"


def test_ids_that_sql_could_trip_over(pipeline, cache, tmp_path):
    names = ["it's", 'a "b"', "back\\slash", "ünï\nline", "%_", "x' OR '1'='1", ""]
    folder = picture_folder(tmp_path / "data", 1)
    rows = [
        {"file_name": "images/00.png", "image_id": name or "z", "odd": [float("nan"), "\ud800"]}
        for name in names
    ]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = create_index(tmp_path / "index", pipeline, "tiny")
    assert add(index, pipeline, folder, name="o'hara", cache_dir=cache).pictures == len(names)
    assert add(index, pipeline, folder, name="o'hara", cache_dir=cache).pictures == 0
    hits = find(index, pipeline, QUERY)
    assert all(index.thumbnails(hits)) and hits[0]["extra"]["odd"] == [None, "\\ud800"]
    assert index.delete(ids=["x' OR '1'='1"]) == 1 and index.delete(source="o'hara") == len(names) - 1


def test_delete_takes_what_fits_everything_that_is_said(pipeline, data, cache, tmp_path):
    index = create_index(tmp_path / "index", pipeline, "tiny")
    add(index, pipeline, data, cache_dir=cache)
    assert index.delete(ids=["images/00.png", "images/29.png", "absent"], where="split = 'test'") == 1
    assert len(index) == 29 and index.missing(str(data), ["images/00.png", "images/29.png"]) == {
        "images/29.png"
    }
    assert index.delete(source="elsewhere") == 0
    with pytest.raises(UserError, match="say what"):
        index.delete()
    with pytest.raises(UserError, match="No field named splt"):
        index.delete(where="splt = 3")
    assert index.delete(where="split = 'test' OR split = 'none'", source=str(data)) == 14
    assert add(index, pipeline, data, cache_dir=cache).pictures == 15, "what was taken out may come again"


def test_another_model_or_precision_is_refused_and_the_fix_is_named(pipeline, filled, data, cache, tmp_path):
    other = tiny_blip(6)
    for ask in (
        lambda: add(filled, other, data, cache_dir=cache),
        lambda: find(filled, other, QUERY),
        lambda: create_index(filled.path, other, "other"),
    ):
        with pytest.raises(
            UserError, match=r"another model \(weights was .*take the one it was made with, tiny in fp32"
        ):
            ask()
    save_blip(tmp_path / "blip", 5)
    index = create_index(tmp_path / "index", load(tmp_path / "blip"), tmp_path / "blip")
    with pytest.raises(UserError, match=r"dtype was 'fp32' and is 'bf16'"):
        index.refuse_other(load(tmp_path / "blip", dtype="bf16"))
    index.refuse_other(load(tmp_path / "blip"))
    assert open_index(tmp_path / "index").made.model == str(tmp_path / "blip")


def test_no_index_and_foreign_tables_are_said(pipeline, tmp_path):
    with pytest.raises(UserError, match="there is no index; make one"):
        open_index(tmp_path / "absent")
    assert not (tmp_path / "absent").exists(), "looking makes nothing"
    import lancedb

    lancedb.connect(tmp_path / "other").create_table("pictures", pa.table({"a": [1]}))
    with pytest.raises(UserError, match="did not make"):
        create_index(tmp_path / "other", pipeline, "tiny")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot be opened|no index can be made"):
        create_index(tmp_path / "file", pipeline, "tiny")


def test_an_empty_index_finds_nothing_and_is_filled_later(pipeline, data, cache, tmp_path):
    index = create_index(f"file://{tmp_path / 'index'}", pipeline, "tiny")  # by address, as object storage is
    index.tend()
    assert (
        find(index, pipeline, QUERY) == [] and index.thumbnails([]) == [] and index.stats()["pictures"] == 0
    )
    again = create_index(f"file://{tmp_path / 'index'}", pipeline, "tiny")
    assert add(again, pipeline, data, cache_dir=cache).pictures == 30
    again.tend()
    index = open_index(f"file://{tmp_path / 'index'}")
    assert len(index) == 30 and len(find(index, pipeline, QUERY, hybrid=True)) == 10


def test_a_model_that_embeds_nothing_makes_no_index(tmp_path):
    from tests.tiny_models import save_vqa

    with pytest.raises(UserError, match="wants a model that embeds images and texts; this BlipVqa"):
        create_index(tmp_path / "index", load(save_vqa(tmp_path / "vqa")), "vqa")
    assert not (tmp_path / "index").exists()


def test_two_cannot_add_at_once(pipeline, filled, data, cache):
    with filled.writing(), pytest.raises(UserError, match="another process is adding"):
        add(open_index(filled.path), pipeline, data, cache_dir=cache)


def test_blip2_has_several_vectors_a_picture_and_ranks_by_the_best(data, cache, tmp_path):
    pipeline = load(save_blip2(tmp_path / "blip2"))
    index = create_index(tmp_path / "index", pipeline, "tiny")
    add(index, pipeline, data, cache_dir=cache)
    index.tend()
    paths = [data / f"images/{n:02d}.png" for n in range(30)]
    cosine = pipeline.similarity(pipeline.embed_images(paths), pipeline.embed_texts([QUERY]))[:, 0]
    hits = find(index, pipeline, QUERY, top=5, rerank=0)
    assert [hit["id"] for hit in hits] == [f"images/{n:02d}.png" for n in np.argsort(-cosine)[:5]]
    assert [hit["cosine"] for hit in hits] == pytest.approx(np.sort(cosine)[::-1][:5].tolist(), abs=1e-5)
    assert find(index, pipeline, QUERY, rerank=8, top=8) != find(index, pipeline, QUERY, rerank=0, top=8)
    assert open_index(tmp_path / "index").made.queries == 3
    with pytest.raises(UserError, match="BLIP-2 compares a picture with a text"):
        find(index, pipeline, drawing(3))


def test_clip_and_the_precision_of_the_index(data, cache, tmp_path):
    pipeline = load(save_clip(tmp_path / "clip"), dtype="bf16")
    index = create_index(tmp_path / "index", pipeline, "tiny")
    add(index, pipeline, data, cache_dir=cache)
    assert index.made.dtype == "bf16"
    hits = find(index, pipeline, "red", top=4)
    assert all(hit["score"] == hit["cosine"] and hit["judged"] is None for hit in hits)


KILLED = """
import os, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from openblip.search.fill import add
from openblip.search.index import Index, create_index
from tests.curate.made import tiny_blip
index, data, cache, die_in = sys.argv[1:]
append = Index.append
def slowly(self, lines, done=[]):
    if len(done) == int(die_in):
        print("here", flush=True)
        time.sleep(float(os.environ["WAIT"]))
    done.append(1)
    return append(self, lines)
Index.append = slowly
pipeline = tiny_blip(5)
found = create_index(index, pipeline, "tiny")
add(found, pipeline, data, cache_dir=cache, block=4)
print("through", flush=True)
"""


@pytest.mark.parametrize(("block", "wait"), [(3, 60), (5, 0)])
def test_killed_while_adding_the_last_version_is_readable_and_the_next_run_completes_it(
    pipeline, data, cache, filled, tmp_path, block, wait
):
    """wait 0: the kill comes while the block is written, or thereabouts."""
    run = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "index"), str(data), str(cache), str(block)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "WAIT": str(wait)},
        cwd=Path(__file__).parent.parent.parent,
    )  # fmt: skip
    assert run.stdout.readline() == "here\n"
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    index = open_index(tmp_path / "index")
    there = content(index)
    assert len(there["lines"]) in ({4 * block} if wait else {20, 24, 28, 30}), "whole blocks"
    assert find(index, pipeline, QUERY, top=3), "it can be searched"
    added = add(index, pipeline, data, cache_dir=cache, block=4)
    assert (added.pictures, added.known) == (30 - len(there["lines"]), len(there["lines"]))
    index.tend()
    whole, undisturbed = content(index), content(filled)
    assert whole["lines"] == undisturbed["lines"]
    np.testing.assert_allclose(whole["vectors"], undisturbed["vectors"], atol=1e-6)
    hits = [find(one, pipeline, QUERY, top=30) for one in (index, filled)]
    assert [hit["id"] for hit in hits[0]] == [hit["id"] for hit in hits[1]]


def test_the_ann_index_finds_what_the_exact_search_finds_and_what_came_after_it(tmp_path, monkeypatch):
    rng, width, count = np.random.default_rng(0), 32, 6000

    def unit(vectors):
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    def lines(vectors, start):
        blank = dict.fromkeys(KEPT) | {"source": "made"}
        return [{**blank, "id": str(start + n), "vector": vector} for n, vector in enumerate(vectors)]

    centres = unit(rng.normal(size=(50, width)))
    vectors = unit(centres[rng.integers(50, size=count)] + 0.1 * rng.normal(size=(count, width)))
    index = new_index(str(tmp_path / "index"), Made("made", "0", "fp32", width, 0))
    assert index.append(lines(vectors[:5000], 0)) == 5000 and index.append(lines(vectors[10:20], 0)) == 0
    assert index.nearest(vectors[0], 1, exact=True)[0]["id"] == "0", "what is there stays as it is"
    monkeypatch.setattr(module, "EXACT_BELOW", 5001)
    index.tend()
    assert index.stats()["search"] == "exact"
    monkeypatch.setattr(module, "EXACT_BELOW", 5000)
    monkeypatch.setattr(module, "PARTITION", 100)
    monkeypatch.setattr(module, "PROBES", 20)
    index.tend()
    stats = open_index(tmp_path / "index").stats()
    assert stats["search"] == "approximate" and stats["indexes"]["vector"] == {
        "type": "IvfSq",
        "pictures": 5000,
    }
    index.append(lines(vectors[5000:], 5000))  # not in the ANN index yet
    queries = unit(vectors[rng.integers(count, size=60)] + 0.05 * rng.normal(size=(60, width)))
    truth = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :10]

    def share(**options):
        found = [{int(line["id"]) for line in index.nearest(query, 10, **options)} for query in queries]
        return np.mean([len(found & set(row.tolist())) / 10 for found, row in zip(found, truth, strict=True)])

    assert share(exact=True) == 1.0
    assert share() >= 0.95
    far = {str(id) for id in np.argsort(queries[0] @ vectors.T)[:3]}
    few = index.nearest(queries[0], 3, where=" OR ".join(f"id = '{id}'" for id in far))
    assert {line["id"] for line in few} == far, "a filter that leaves what is far away still finds it"
    index.tend()
    assert index.stats()["indexes"]["vector"]["pictures"] == count and share() >= 0.95
    (before,) = [one.name for one in index.table.list_indices() if one.columns == ["vector"]]
    monkeypatch.setattr(module, "PARTITION", 25)  # as if it had grown fourfold and more
    index.tend()
    (after,) = [one.name for one in index.table.list_indices() if one.columns == ["vector"]]
    assert (before, after) == ("vector_50", "vector_240") and share() >= 0.95
    monkeypatch.setattr(module, "PROBES", 1)
    monkeypatch.setattr(module, "REFINE", 1)
    assert share() < 1.0, "the search is approximate, and the measure sees it"


def test_filters_are_applied_before_the_search_and_a_bad_one_is_one_clear_line(pipeline, filled):
    hits = find(filled, pipeline, QUERY, top=30, where="split = 'train'", rerank=4)
    assert len(hits) == 15 and {hit["split"] for hit in hits} == {"train"}
    last = [hit["id"] for hit in find(filled, pipeline, QUERY, top=30, rerank=0)[-2:]]
    hits = find(filled, pipeline, QUERY, top=2, rerank=0, where=f"id = '{last[0]}' OR id = '{last[1]}'")
    assert [hit["id"] for hit in hits] == last, "what is far away is found if nothing else is asked for"
    (hit,) = find(filled, pipeline, QUERY, where="array_has(captions, 'a red square')", rerank=0)
    assert hit["id"] == "images/08.png"
    assert find(filled, pipeline, QUERY, where="split = 'nowhere'") == []
    for where, said in [
        ("splt = 'train'", "No field named splt"),
        ("split =", "parse|pars"),
        ("split = train", "train"),
    ]:
        with pytest.raises(UserError, match=said) as caught:
            find(filled, pipeline, QUERY, where=where)
        assert "\n" not in str(caught.value) and "split = 'train'" in str(caught.value)


def test_hybrid_search_brings_what_the_words_name_to_the_short_list(pipeline, filled, data, cache, tmp_path):
    plain = [hit["id"] for hit in find(filled, pipeline, "yellow triangle", top=30, rerank=0)]
    hits = find(filled, pipeline, "yellow triangle", top=30, rerank=0, hybrid=True)
    named = next(hit["id"] for hit in hits if hit["captions"] == ["a yellow triangle"])
    by_words = [hit["id"] for hit in hits].index(named)
    assert by_words < plain.index(named), "its words brought it forward"
    some = find(filled, pipeline, "yellow triangle", top=30, rerank=0, hybrid=True, where="split = 'train'")
    assert {hit["split"] for hit in some} == {"train"}
    reranked = find(filled, pipeline, "yellow triangle", top=30, rerank=8, hybrid=True)
    assert {hit["id"] for hit in reranked[:8]} == {hit["id"] for hit in hits[:8]}
    with pytest.raises(UserError, match="give a text"):
        find(filled, pipeline, drawing(3), hybrid=True)
    fresh = create_index(tmp_path / "index", pipeline, "tiny")
    add(fresh, pipeline, data, cache_dir=cache)
    with pytest.raises(UserError, match="captions are not indexed yet"):
        find(fresh, pipeline, QUERY, hybrid=True)


def test_two_stages_and_what_is_gone_is_judged_by_its_thumbnail(pipeline, cache, tmp_path):
    folder = picture_folder(tmp_path / "data", 10)
    index = create_index(tmp_path / "index", pipeline, "tiny")
    add(index, pipeline, folder, cache_dir=cache)
    plain = find(index, pipeline, QUERY, top=10, rerank=0)
    hits = find(index, pipeline, QUERY, top=10, rerank=4)
    assert [hit["judged"] for hit in hits] == ["picture"] * 4 + [None] * 6
    assert hits[4:] == plain[4:] and {hit["id"] for hit in hits[:4]} == {hit["id"] for hit in plain[:4]}
    for hit in hits[:4]:
        match = pipeline.match(folder / hit["id"], QUERY)
        p = float(match.probability[0])
        itc = float(match.cosine[0]) / pipeline.model.temperature.item()
        assert hit["score"] == pytest.approx(np.log(p / (1 - p)) + itc, abs=1e-2)
    assert [hit["score"] for hit in hits[:4]] == sorted((hit["score"] for hit in hits[:4]), reverse=True)
    (folder / hits[0]["id"]).unlink()
    again = find(index, pipeline, QUERY, top=10, rerank=4)
    assert {hit["id"]: hit["judged"] for hit in again[:4]}[hits[0]["id"]] == "thumbnail"
    scores = {hit["id"]: pytest.approx(hit["score"], abs=1e-4) for hit in hits[1:]}
    assert {hit["id"]: hit["score"] for hit in again if hit["id"] != hits[0]["id"]} == scores
    bare = create_index(tmp_path / "bare", pipeline, "tiny")
    add(bare, pipeline, folder, cache_dir=cache, thumbnail=0, bad=BadRows(max_share=1.0))
    (folder / plain[1]["id"]).unlink(missing_ok=True)
    found = find(bare, pipeline, QUERY, top=10, rerank=4)
    assert [hit["judged"] for hit in found].count("picture") >= 2 and found[4]["judged"] is None
    assert bare.thumbnails(found) == [None] * len(found)


def test_a_picture_as_query_finds_itself_first(pipeline, filled, data):
    hits = find(filled, pipeline, open_image(data / "images/07.png"), top=3)
    assert hits[0]["id"] == "images/07.png" and hits[0]["cosine"] == pytest.approx(1, abs=1e-5)
    assert all(hit["judged"] is None and hit["score"] == hit["cosine"] for hit in hits)


@pytest.mark.parametrize(
    ("options", "said"), [({"top": 0}, "top is at least 1"), ({"rerank": -1}, "not negative")]
)
def test_impossible_options_are_refused(pipeline, filled, options, said):
    with pytest.raises(UserError, match=said):
        find(filled, pipeline, QUERY, **options)
    with pytest.raises(UserError, match="text is empty"):
        find(filled, pipeline, "  ")


def test_what_was_embedded_ahead_is_what_the_pipeline_embeds(pipeline):
    from openblip.search.fill import embed_pixels

    pictures = [drawing(n) for n in range(3)]
    values = torch.stack([pipeline.transform(picture) for picture in pictures])
    np.testing.assert_allclose(embed_pixels(pipeline, values), pipeline.embed_images(pictures), atol=1e-6)
