"""easy-VQA as folders to train and evaluate on: single questions, conversations, and preferences.

    python runs/make_easy_vqa.py OUT [--captions FOLDER]

OUT/questions  one question a row, in the splits `train` and `test`: for BLIP.
OUT/chats   split `train`: every drawing with all that is asked about it, as one conversation; and, with --captions
            (pictures with captions, split `train`), 2,000 of those described. Split `test`: one question a row.
OUT/canvas  one question a row, in both splits, about canvases three tiles long, on which shapes are small (see
            `data/easy_vqa.py`).
OUT/pairs   a question each, the right answer chosen, another of its kind rejected, for DPO.

Needs `pip install --no-deps easy-vqa`.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from openblip.data.easy_vqa import COLOURS, SHAPES, Split, easy_vqa_canvas_rows, easy_vqa_rows
from openblip.data.rows import Row
from openblip.data.sources import open_source

SPLITS: tuple[Split, Split] = ("train", "test")
KINDS = (COLOURS, SHAPES, ("yes", "no"))


@dataclass
class Arguments:
    """out: where the folders go. captions: pictures with captions, of which so many are `described`. canvases: how many
    to train with, and a quarter as many to test with. pairs: how many preferences. seed: of all that is drawn."""

    out: tyro.conf.Positional[Path]
    captions: Path | None = None
    described: int = 2000
    canvases: int = 4000
    pairs: int = 1000
    seed: int = 0


def conversations(
    rows: Sequence[Row], rng: np.random.Generator
) -> Iterator[tuple[Row, list[dict[str, str]]]]:
    """All questions about one picture as one conversation, in an order of their own."""
    for _, found in groupby(sorted(rows, key=lambda row: row.id), key=lambda row: row.id):
        asked = list(found)
        turns = []
        for index in rng.permutation(len(asked)).tolist():
            turns.append({"from": "human", "value": asked[index].question})
            turns.append({"from": "gpt", "value": asked[index].answers[0]})
        yield {"image": asked[0].image, "conversations": turns, "split": asked[0].split}


def questions(rows: Sequence[Row], folder: Path) -> Iterator[dict[str, Any]]:
    """One question a row."""
    for row in rows:
        kind = {"kind": row.extra["kind"]} if "kind" in row.extra else {}
        asked = {"question": row.question, "answers": row.answers, "split": row.split}
        yield {"image": picture(row, folder), **asked, **kind}


def described(source: Path, count: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """So many pictures of the split `train`, each described by one of its captions."""
    rows = open_source(str(source), split="train")
    for index in rng.permutation(len(rows))[:count].tolist():
        row = rows[index]
        caption = row.captions[rng.integers(len(row.captions))]
        turns = [{"from": "human", "value": "Describe the image."}, {"from": "gpt", "value": caption}]
        yield {"image": str(Path(str(row.image)).resolve()), "conversations": turns, "split": "train"}


def preferences(rows: Sequence[Row], count: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Questions with a right answer and a wrong one of the same kind."""
    for index in rng.choice(len(rows), count, replace=False).tolist():
        row, answer = rows[index], rows[index].answers[0]
        others = [other for kind in KINDS if answer in kind for other in kind if other != answer]
        wrong = others[rng.integers(len(others))]
        yield {
            "image": str(row.image),
            "prompt": row.question,
            "chosen": answer,
            "rejected": wrong,
            "split": "train",
        }


def picture(row: Row, folder: Path) -> str:
    """The path of a row's picture, which is written to the folder if it is in no file."""
    if isinstance(row.image, str):
        return row.image
    assert isinstance(row.image, bytes)
    file = folder / row.id
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(row.image)
    return row.id


def write(folder: Path, found: Iterable[dict[str, Any]]) -> None:
    """The list of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in found)
    (folder / "captions.jsonl").write_text(text, encoding="utf-8")
    print(f"{folder}: {text.count(chr(10))} rows")


def main(given: Arguments) -> None:
    """Make the folders."""
    rng = np.random.default_rng(given.seed)
    train, test = (easy_vqa_rows(split) for split in SPLITS)
    write(given.out / "questions", questions([*train, *test], given.out / "questions"))
    chats = [*conversations(train, rng), *questions(test, given.out / "chats")]
    if given.captions is not None:
        chats += described(given.captions, given.described, rng)
    write(given.out / "chats", chats)
    counts = (given.canvases, given.canvases // 4)
    canvases = (
        easy_vqa_canvas_rows(split, count, shape_size=20, long_side=336, short_side=112, seed=given.seed)
        for split, count in zip(SPLITS, counts, strict=True)
    )
    write(given.out / "canvas", (line for rows in canvases for line in questions(rows, given.out / "canvas")))
    write(given.out / "pairs", preferences(train, given.pairs, rng))


if __name__ == "__main__":
    main(tyro.cli(Arguments))
