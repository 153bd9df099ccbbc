"""What commands share: data near and far, columns by name, a bar to wait by, a place for the figures."""

import pytest

from openblip.cli_shared import progress
from openblip.config import save_json
from tests.data.made import as_coco, tar_bytes, write
from tests.tiny_recipes import tiny_recipe

pytestmark = pytest.mark.usefixtures("own_cache")


def test_data_may_be_remote_or_a_pattern(root, answer, mistake, monkeypatch, tmp_path):
    import fsspec

    remote = fsspec.filesystem("memory")
    remote.put(str(root / "data"), "/bucket/data", recursive=True)
    url = "memory://bucket/data"
    assert answer("info", url)["rows"] == 8
    assert (
        answer("eval", "retrieval", "--data", url, "--model", root / "filter", "--split", "test")["images"]
        == 4
    )
    assert len(answer("search", "red", "--data", f"file://{root / 'data'}", "--model", root / "filter")) == 8
    save_json(tiny_recipe(), tmp_path / "tiny.json")
    assert answer("train", tmp_path / "tiny.json", "--data", url, "--out", tmp_path / "run")["step"] == 3
    told = []
    monkeypatch.setattr("openblip.quickstart.run.run", lambda *of, **how: told.append((*of, how)) or {})
    answer("quickstart", "--data", url)
    answer("quickstart", "--data", "some where/{a,b}.tar", "--image-root", url)
    answer("quickstart")
    assert [one[0] for one in told] == [url, "some where/{a,b}.tar", None]
    assert [str(one[1]) for one in told] == ["quickstart-data", "quickstart-a-b-.tar", "quickstart"]
    assert told[1][2]["image_root"] == url
    for number, members in enumerate(({"1.png": b"x", "1.txt": b"one"}, {"2.png": b"y", "2.txt": b"two"})):
        write(tmp_path / f"{number:05d}.tar", tar_bytes(members))
    found = answer("info", tmp_path / "{00000..00001}.tar")
    assert (found["rows"], found["kind"]) == (2, "tar")
    assert answer("info", tmp_path / "*.tar")["rows"] == 2
    assert "no file matches" in mistake("info", tmp_path / "*.parquet")


def test_columns_and_the_place_of_pictures_can_be_named(root, answer, mistake, tmp_path):
    """COCO keeps its lists in annotations/ and its pictures in train2017/."""
    lists = as_coco(tmp_path / "coco/train2017").rename(tmp_path / "captions_train2017.json")
    found = answer("search", "red", "--data", lists, "--model", root / "filter", "--image-root",
                   tmp_path / "coco/train2017")  # fmt: skip
    assert len(found) == 3
    write(tmp_path / "odd.csv", "photo,words,more\nimages/a.png,red,x\nimages/b.png,green,x\n")
    call = ("eval", "retrieval", "--data", tmp_path / "odd.csv", "--model", root / "filter")
    assert "--image-column" in mistake(*call)
    assert "--caption-column" in mistake(*call, "--image-column", "photo")
    named = (
        "--image-column",
        "photo",
        "--caption-column",
        "words",
        "--image-root",
        tmp_path / "coco/train2017",
    )
    assert answer(*call, *named)["images"] == 2


def test_there_is_a_bar_for_a_terminal_alone(monkeypatch, capsys):
    with progress("looking") as report:
        assert report is None
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes standard error for a terminal
    with progress("looking") as report:
        report(3, 8)
    assert "looking" in (said := capsys.readouterr()).err and "3/8" in said.err and said.out == ""
    with progress("looking", json=True) as report:
        assert report is None
