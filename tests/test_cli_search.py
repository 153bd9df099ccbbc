"""The commands about finding pictures, from building an index to a page of results."""

import json
import re
from pathlib import Path

import pytest

from openblip import cli
from openblip.data.image import open_image
from openblip.html import thumbnail
from tests.tiny_models import drawing, picture_folder

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """data: 8 pictures; index: of them, made by the first test that wants it."""
    folder = tmp_path_factory.mktemp("search")
    picture_folder(folder / "data", 8)
    return folder


@pytest.fixture
def index(root, folder, answer):
    call = ("index", "build", folder / "index", "--data", folder / "data", "--model", root / "filter")
    found = answer(*call)
    assert found["pictures"] == 8 and found["added"] + found["known"] == 8 and found["bad"] == {}
    return folder / "index"


def test_an_index_from_build_to_delete(root, answer, mistake, capsys, tmp_path):
    data, index = picture_folder(tmp_path / "data", 6), tmp_path / "index"
    (data / "images/01.png").write_bytes(b"broken")
    cli.main(["index", "build", str(index), "--data", str(data), "--model", str(root / "filter")])
    said = capsys.readouterr()
    assert "added: 5" in said.out and "1 rows could not be used: not_an_image 1" in said.err
    assert json.loads((index / "bad_rows.jsonl").read_text())["reason"] == "not_an_image"
    drawing(1).save(data / "images/01.png")
    added = answer("index", "add", index, "--data", data, "--split", "train")  # its model is known
    assert added == {"added": 1, "known": 2, "rows": 3, "bad": {}, "pictures": 6}
    stats = answer("index", "stats", index)
    assert stats["pictures"] == 6 and stats["sources"] == {str(data): 6}
    assert stats["made_by"]["model"] == str(root / "filter") and stats["indexes"]["captions"]["pictures"] == 6
    cli.main(["index", "stats", str(index)])
    assert "pictures: 6" in capsys.readouterr().out
    assert answer("index", "delete", index, "--ids", "images/00.png", "images/05.png") == {
        "deleted": 2,
        "pictures": 4,
    }
    assert answer("index", "delete", index, "--where", "split = 'test'") == {"deleted": 2, "pictures": 2}
    assert "say what" in mistake("index", "delete", index)


def test_search_in_an_index_as_json_table_and_page(root, folder, index, answer, capsys):
    found = answer("search", "a red circle", "--index", index, "--top", 3)
    keys = {"id", "source", "where", "captions", "split", "extra", "place", "score", "cosine", "judged"}
    assert len(found) == 3 and set(found[0]) == keys and found[0]["judged"] == "picture"
    data = ("--data", folder / "data", "--model", root / "filter", "--top", 3)
    scanned = answer("search", "a red circle", *data)
    assert [hit["id"] for hit in scanned] == [hit["id"] for hit in found], (
        "with an index or without, the same"
    )
    page = folder / "pages/page.html"
    cli.main(["search", "a red circle", "--index", str(index), "--top", "3", "--html", str(page)])
    said = capsys.readouterr()
    header, *lines = said.out.strip().splitlines()
    assert header.split() == ["score", "cosine", "id"] and said.err == ""
    assert [line.split()[2] for line in lines] == [hit["id"] for hit in found]
    assert found[0]["captions"][0] in lines[0]
    for one in (page.read_text(), _scanned_page(data, folder, capsys)):
        assert len(re.findall(r'<img src="data:image/jpeg', one)) == 3 and "“a red circle”" in one
        assert all(hit["id"] in one for hit in found)
    assert open_image(found[0]["place"]["path"]).size == (48, 48)
    few = answer("search", "red", "--index", index, "--where", "split = 'test'", "--hybrid", "--exact")
    assert len(few) == 4 and {hit["split"] for hit in few} == {"test"}


def _scanned_page(data, folder, capsys) -> str:
    cli.main(["search", "a red circle", *map(str, data), "--html", str(folder / "scanned.html")])
    capsys.readouterr()
    return (folder / "scanned.html").read_text()


def test_a_page_shows_pictures_where_no_thumbnails_are_kept(root, folder, index, answer, tmp_path):
    call = ("--data", folder / "data", "--model", root / "filter", "--thumbnail", 0)
    answer("index", "build", tmp_path / "index", *call)
    answer("search", "red", "--index", tmp_path / "index", "--top", 2, "--html", tmp_path / "page.html")
    answer("search", "red", "--index", index, "--top", 2, "--html", tmp_path / "other.html")
    pages = [(tmp_path / name).read_text() for name in ("page.html", "other.html")]
    shown = [re.findall(r'src="data:image/jpeg;base64,([^"]+)', page) for page in pages]
    grey = thumbnail(b"").partition(",")[2]
    assert len(shown[0]) == 2 and grey not in shown[0] + shown[1]


def test_search_with_a_picture(root, folder, index, answer):
    for where in (("--index", index), ("--data", folder / "data", "--model", root / "filter")):
        found = answer("search", "--image", folder / "data/images/05.png", *where, "--top", 2)
        assert found[0]["id"] == "images/05.png" and found[0]["score"] == found[0]["cosine"]


def test_what_is_gone_is_said(root, index, folder, answer, capsys):
    (folder / "data/images/02.png").rename(folder / "away.png")
    try:
        cli.main(["search", "red", "--index", str(index), "--json"])
        said = capsys.readouterr()
        assert "1 pictures are not where they were: judged by their thumbnails" in said.err
        judged = {hit["id"]: hit["judged"] for hit in json.loads(said.out)}
        assert judged["images/02.png"] == "thumbnail" and judged["images/03.png"] == "picture"
    finally:
        (folder / "away.png").rename(folder / "data/images/02.png")


def test_mistakes_are_one_line(root, folder, index, mistake, tmp_path):
    data = ("--data", folder / "data")
    other = ("--model", root / "clip")
    assert "another model" in mistake("search", "red", "--index", index, *other)
    assert "another model" in mistake("index", "add", index, *data, *other)
    assert "another model" in mistake("index", "build", index, *data, *other)
    assert "No field named splt" in mistake("search", "red", "--index", index, "--where", "splt = 3")
    assert "No field named splt" in mistake("index", "delete", index, "--where", "splt = 3")
    assert "there is no index" in mistake("search", "red", "--index", tmp_path / "absent")
    assert "there is no index" in mistake("index", "add", tmp_path / "absent", *data)
    assert "either --data" in mistake("search", "red")
    assert "either --data" in mistake("search", "red", "--index", index, *data)
    assert "either a text" in mistake("search", "--index", index)
    assert "either a text" in mistake(
        "search", "red", "--index", index, "--image", folder / "data/images/00.png"
    )
    assert "no file" in mistake("search", "--index", index, "--image", tmp_path / "absent.png")
    assert "go with --index" in mistake("search", "red", *data, "--where", "split = 'a'", *other)
    assert "wants a --model" in mistake("search", "red", *data)
    assert "go with --data" in mistake("search", "red", "--index", index, "--split", "test")
    assert "no data given" in mistake("index", "build", tmp_path / "new", "--data", *other)
    assert "for one source" in mistake("index", "add", index, "--data", "a", "b", "--name", "x")
    assert "--html" in mistake("search", "red", "--index", index, "--html", tmp_path)


def test_numbers_that_make_no_sense_are_refused_before_any_work(root, folder, index, mistake, monkeypatch):
    monkeypatch.setattr("openblip.api.load", lambda *_, **__: pytest.fail("loaded a model first"))
    data, model = ("--data", folder / "data"), ("--model", root / "filter")
    new = folder / "never"
    for call in (("index", "build", new, *data, *model), ("index", "add", index, *data)):
        assert "--batch-size is at least 1, got -1" in mistake(*call, "--batch-size", -1)
        assert "--batch-size is at least 1, got 0" in mistake(*call, "--batch-size", 0)
        assert "--thumbnail is at least 0, got -1" in mistake(*call, "--thumbnail", -1)
        assert "--workers is at least 0, got -2" in mistake(*call, "--workers", -2)
    assert not new.exists()
    for place in ((*data, *model), ("--index", index)):
        assert "--top is at least 1, got -2" in mistake("search", "red", *place, "--top", -2)
        assert "--rerank is at least 0, got -1" in mistake("search", "red", *place, "--rerank", -1)


def test_a_model_that_moved_is_named(root, folder, mistake, answer, tmp_path):
    from tests.tiny_models import save_blip

    save_blip(tmp_path / "blip", seed=2, decoder=False, share=())
    answer("index", "build", tmp_path / "index", "--data", folder / "data", "--model", tmp_path / "blip")
    (tmp_path / "blip").rename(tmp_path / "moved")
    assert "name it with --model" in mistake("search", "red", "--index", tmp_path / "index")
    assert len(answer("search", "red", "--index", tmp_path / "index", "--model", tmp_path / "moved")) == 8


def test_every_action_has_its_help(capsys):
    for name, told in {
        "build": "--thumbnail",
        "add": "--data",
        "delete": "--where",
        "stats": "INDEX",
    }.items():
        with pytest.raises(SystemExit) as end:
            cli.main(["index", name, "--help"])
        assert end.value.code in (0, None) and told in capsys.readouterr().out


def test_the_python_of_the_page_about_search_runs(root, folder, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parent.parent / "docs/search.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    (tmp_path / "my_model").symlink_to(root / "filter")
    (tmp_path / "my_folder").symlink_to(folder / "data")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "search.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 4
