"""easy-VQA as rows: small drawings of one coloured shape each, with questions; and large canvases made of its shapes.

The drawings come with the package `easy-vqa` (Victor Zhou): 64 x 64 PNG, 4,000 to train with and 38,575 questions,
1,000 to test with and 9,673 questions, 13 answers. The package is found, not imported.

A canvas is a test of detail: several shapes, small on a wide or tall ground, and questions about one by its place.
Seen squashed into one tile, a shape is a few pixels; cut into tiles, it can be told.
"""

import importlib.util
import io
import json
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageChops

from openblip.config import UserError
from openblip.data.rows import Row

Split = Literal["train", "test"]
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")

_SPLITS: dict[str, int] = {"train": 0, "test": 1}  # with a part of the seed for each
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


def easy_vqa_rows(split: Split) -> list[Row]:
    """All questions of a split, one row each; rows about one drawing share its `id`.

    Raises:
        UserError: the package is missing, or is not what it was.
    """
    folder, questions = _read(split)
    return [
        Row(
            id=f"{split}/{number}.png",
            images=[str(folder / f"images/{number}.png")],
            captions=[],
            question=question,
            answers=[answer],
            split=split,
            where=f"easy-vqa {split} question {index}",
        )
        for index, (question, answer, number) in enumerate(questions)
    ]


def easy_vqa_canvas_rows(
    split: Split,
    pictures: int,
    *,
    questions: int = 2,
    shapes: tuple[int, int] = (3, 5),
    shape_size: int = 24,
    long_side: int = 1008,
    short_side: int = 336,
    seed: int = 0,
) -> list[Row]:
    """Questions like "what color is the third shape from the left?" about large canvases of small shapes.

    Half of the canvases are wide, half tall. The shapes are cut out of drawings of the split, stand in a row at even
    steps along the long side, and at any height of the short side. Colours and shapes are each drawn evenly, so
    that no answer is right more often than by chance: 1 in 8 colours, 1 in 3 shapes.

    A picture depends on the split, the sizes, the seed and its number alone. `row.extra` has "kind" ("color" or
    "shape") and "orientation" ("wide" or "tall"); `row.images` the PNG bytes, one object for all its questions.

    Args:
        pictures: how many canvases.
        questions: about each canvas, all different.
        shapes: fewest and most shapes on a canvas.
        shape_size: pixels of a shape's longer side.
        long_side, short_side: of a canvas, in pixels.

    Raises:
        UserError: the package is missing, or the shapes do not fit.
    """
    fewest, most = shapes
    if not 1 <= fewest <= most <= len(_ORDINALS):
        raise UserError(f"shapes: fewest and most, from 1 to {len(_ORDINALS)}, got {shapes}")
    if shape_size * most > long_side or shape_size > short_side:
        raise UserError(f"{most} shapes of {shape_size} pixels do not fit on {long_side} x {short_side}")
    if not 1 <= questions <= 4 * fewest:
        raise UserError(
            f"questions: 1 to {4 * fewest} differ on a canvas of {fewest} shapes, got {questions}"
        )
    known = _known_shapes(split)
    rows = []
    for number in range(pictures):
        rng = np.random.default_rng([seed, _SPLITS[split], number])
        is_wide = number % 2 == 0
        found = [
            (COLOURS[rng.integers(len(COLOURS))], SHAPES[rng.integers(len(SHAPES))])
            for _ in range(rng.integers(fewest, most + 1))
        ]
        chosen = [known[kind][rng.integers(len(known[kind]))] for kind in found]
        png = _draw(chosen, is_wide, shape_size, long_side, short_side, rng)
        for question, answer, kind in _questions(found, is_wide, questions, rng):
            rows.append(
                Row(
                    id=f"{split}/canvas-{seed}-{number}.png",
                    images=[png],
                    captions=[],
                    question=question,
                    answers=[answer],
                    split=split,
                    where=f"easy-vqa {split} canvas {number}",
                    extra={"kind": kind, "orientation": "wide" if is_wide else "tall"},
                )
            )
    return rows


@dataclass(frozen=True)
class _Cut:
    """A shape without its ground: its one colour, RGB, and how much of each pixel it covers, 0 to 255."""

    colour: tuple[int, ...]
    cover: Image.Image


def _read(split: Split) -> tuple[Path, list[list[Any]]]:
    """The folder of a split and its [question, answer, number of the drawing]."""
    if split not in _SPLITS:
        raise UserError(f"easy-vqa has the splits {', '.join(_SPLITS)}, not {split!r}")
    found = importlib.util.find_spec("easy_vqa")
    if found is None or found.origin is None:
        raise UserError("easy-VQA is not installed; install it with: pip install --no-deps easy-vqa")
    folder = Path(found.origin).parent / "data" / split
    try:
        return folder, json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: not the data of easy-vqa 1.0: {error}") from error


@cache
def _known_shapes(split: Split) -> dict[tuple[str, str], list[_Cut]]:
    """(colour, shape) -> the shapes whose questions give away both, and which stand clear of the edge."""
    folder, questions = _read(split)
    said: dict[int, tuple[set[str], set[str]]] = defaultdict(lambda: (set(), set()))
    for question, answer, number in questions:
        if question.startswith("what"):  # of yes and no questions only some tell what is there
            words = {answer, *re.findall(r"\w+", question)}
            said[number][0].update(words.intersection(COLOURS))
            said[number][1].update(words.intersection(SHAPES))
    known: dict[tuple[str, str], list[_Cut]] = defaultdict(list)
    for number, (colours, shapes) in sorted(said.items()):
        if len(colours) == len(shapes) == 1:
            with Image.open(folder / f"images/{number}.png") as file:
                cut = _cut_out(file.convert("RGB"))
            if cut is not None:
                known[colours.pop(), shapes.pop()].append(cut)
    return known


def _cut_out(image: Image.Image) -> _Cut | None:
    """The shape of a drawing; None if it touches the edge, where a part may be missing."""
    ground = image.getpixel((0, 0))
    bands = ImageChops.difference(image, Image.new("RGB", image.size, ground)).split()
    largest = ImageChops.lighter(ImageChops.lighter(bands[0], bands[1]), bands[2])
    peak = max(1, int(np.asarray(largest).max()))
    cover = largest.point([value * 255 // peak if value <= peak else 255 for value in range(256)])
    box = cover.point([0] * 64 + [255] * 192).getbbox()  # a quarter of a pixel or more
    if box is None or min(box[:2]) == 0 or box[2] == image.width or box[3] == image.height:
        return None
    middle = np.asarray(image)[(box[1] + box[3]) // 2, (box[0] + box[2]) // 2]
    return _Cut(tuple(middle.tolist()), cover.crop(box))


def _draw(
    cuts: list[_Cut],
    is_wide: bool,
    shape_size: int,
    long_side: int,
    short_side: int,
    rng: np.random.Generator,
) -> bytes:
    """PNG of shapes in a row along the long side."""
    ground = tuple(rng.integers(230, 256, 3).tolist())
    canvas = Image.new("RGB", (long_side, short_side) if is_wide else (short_side, long_side), ground)
    step = long_side / len(cuts)
    for number, cut in enumerate(cuts):
        scale = shape_size / max(cut.cover.size)
        size = (max(1, round(cut.cover.width * scale)), max(1, round(cut.cover.height * scale)))
        along = int(number * step + rng.uniform(0, step - shape_size))
        across = int(rng.uniform(0, short_side - shape_size))
        place = (along, across) if is_wide else (across, along)
        cover = cut.cover.resize(size)
        canvas.paste(cut.colour, (*place, place[0] + size[0], place[1] + size[1]), cover)
    file = io.BytesIO()
    canvas.save(file, "PNG", compress_level=1)  # a third of the time, a little larger
    return file.getvalue()


def _questions(
    found: list[tuple[str, str]], is_wide: bool, count: int, rng: np.random.Generator
) -> list[tuple[str, str, str]]:
    """`count` different (question, answer, kind) about shapes in order."""
    ends = ("left", "right") if is_wide else ("top", "bottom")
    places = [(place, end, kind) for place in range(len(found)) for end in (0, 1) for kind in (0, 1)]
    asked = []
    for index in rng.choice(len(places), count, replace=False).tolist():
        place, end, kind = places[index]
        colour, shape = found[-1 - place if end else place]
        wording = f"the {_ORDINALS[place]} shape from the {ends[end]}?"
        if kind == 0:
            asked.append((f"what color is {wording}", colour, "color"))
        else:
            asked.append((f"what shape is {wording.replace(' shape ', ' one ')}", shape, "shape"))
    return asked
