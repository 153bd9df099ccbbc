"""easy-VQA's own questions, and the canvases made of its shapes; both from the package, if it is installed."""

import importlib.util
import io
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from openblip.config import UserError
from openblip.data.conversation import read_conversation
from openblip.data.easy_vqa import COLOURS, SHAPES, easy_vqa_canvas_rows, easy_vqa_rows
from openblip.data.image import open_image

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("easy_vqa") is None, reason="the package easy-vqa is not installed"
)
RGB = {
    "black": (0, 0, 0), "blue": (0, 0, 255), "brown": (165, 42, 42), "gray": (128, 128, 128), "green": (0, 255, 0),
    "red": (255, 0, 0), "teal": (0, 128, 128), "yellow": (255, 255, 0),
}  # fmt: skip
FILLED = {"triangle": 0.5, "circle": 0.785, "rectangle": 1.0}
ORDINALS = ["first", "second", "third", "fourth", "fifth"]


@needs_package
def test_the_questions_of_both_splits():
    train, test = easy_vqa_rows("train"), easy_vqa_rows("test")
    assert (len(train), len(test)) == (38_575, 9_673)
    assert len({row.id for row in train}) == 4_000 and not {row.id for row in train} & {r.id for r in test}
    assert sum(row.answers[0] in ("yes", "no") for row in train) == 28_407
    assert len({row.answers[0] for row in train}) == 13
    first = train[0]
    assert (first.question, first.answers) == ("what is the blue shape?", ["rectangle"])
    assert open_image(first.image).size == (64, 64)
    assert read_conversation(first).messages[0]["content"] == "<image>\nwhat is the blue shape?"
    assert "easy-vqa train question 0" in first.where


@needs_package
def test_canvases_can_be_answered_from_their_pixels():
    rows = easy_vqa_canvas_rows("test", 6, questions=4, shape_size=40)
    assert len(rows) == 24
    for row in rows:
        image = open_image(row.image)
        is_wide = row.extra["orientation"] == "wide"
        assert image.size == ((1008, 336) if is_wide else (336, 1008))
        along = objects(np.asarray(image), axis=0 if is_wide else 1)
        assert 3 <= len(along) <= 5
        ordinal, end = re.search(r"the (\w+) (?:shape|one) from the (\w+)\?$", row.question).groups()
        assert end in (("left", "right") if is_wide else ("top", "bottom"))
        place = ORDINALS.index(ordinal)
        pixels = along[-1 - place if end in ("right", "bottom") else place]
        assert max(pixels.shape[:2]) in (39, 40, 41)
        if row.extra["kind"] == "color":
            assert row.answers == [nearest_colour(pixels)]
        else:
            assert row.answers == [likely_shape(pixels, np.asarray(image)[0, 0])]


def objects(image, axis):
    """The shapes in order along the long side, each cut out: [h, w, 3]."""
    ground = image[0, 0].astype(int)
    mask = np.abs(image.astype(int) - ground).max(axis=2) > 20
    line = np.flatnonzero(mask.any(axis=axis))
    found = []
    for run in np.split(line, np.flatnonzero(np.diff(line) > 1) + 1):
        strip = (slice(None), slice(run[0], run[-1] + 1))
        strip = strip if axis == 0 else strip[::-1]
        across = np.flatnonzero(mask[strip].any(axis=1 - axis))
        across = slice(across[0], across[-1] + 1)
        found.append(image[strip][across] if axis == 0 else image[strip][:, across])
    return found


def nearest_colour(pixels):
    middle = pixels[pixels.shape[0] // 2, pixels.shape[1] // 2].astype(int)
    return min(RGB, key=lambda name: np.abs(middle - RGB[name]).sum())


def likely_shape(pixels, ground):
    """By the share of its box that is nearer to its colour than to the ground: 1/2, π/4, 1."""
    middle = pixels[pixels.shape[0] // 2, pixels.shape[1] // 2].astype(int)
    own, other = (np.abs(pixels.astype(int) - colour).sum(axis=2) for colour in (middle, ground.astype(int)))
    share = (own < other).mean()
    return min(FILLED, key=lambda name: abs(FILLED[name] - share))


@needs_package
def test_canvases_are_the_same_in_every_run_and_differ_by_split_and_number():
    rows = easy_vqa_canvas_rows("test", 3, questions=2)
    again = easy_vqa_canvas_rows("test", 5, questions=2)
    assert rows == again[: len(rows)]
    other = [*easy_vqa_canvas_rows("train", 3), *easy_vqa_canvas_rows("test", 3, seed=1)]
    assert len({row.image for row in [*again, *other]}) == 5 + 3 + 3
    assert (
        rows[0].image is rows[1].image and rows[0].id == rows[1].id and rows[0].question != rows[1].question
    )
    assert Image.open(io.BytesIO(rows[0].image)).format == "PNG"


@needs_package
def test_no_answer_is_right_by_habit():
    rows = easy_vqa_canvas_rows("test", 150, questions=4)
    counts = Counter(row.answers[0] for row in rows)
    assert set(counts) == {*COLOURS, *SHAPES}
    shapes = sum(counts[name] for name in SHAPES)
    assert max(counts[name] for name in SHAPES) < 0.45 * shapes
    assert max(counts[name] for name in COLOURS) < 0.25 * (len(rows) - shapes)


@needs_package
@pytest.mark.parametrize(
    "options, problem",
    [
        ({"shapes": (0, 3)}, "fewest and most"),
        ({"shapes": (2, 11)}, "fewest and most"),
        ({"shape_size": 250}, "do not fit"),
        ({"questions": 13}, "1 to 12 differ"),
    ],
)
def test_what_does_not_fit_is_said(options, problem):
    with pytest.raises(UserError, match=problem):
        easy_vqa_canvas_rows("test", 1, **options)


def test_a_missing_package_and_a_wrong_split(monkeypatch):
    with pytest.raises(UserError, match="splits train, test, not 'val'"):
        easy_vqa_rows("val")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps easy-vqa"):
        easy_vqa_rows("train")
