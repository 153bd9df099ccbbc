"""What questions are answered with no picture to look at, and a model's answers by kind: the floors of docs/results.md.

    python runs/vqa_floor.py OUT/questions --take 1000 --answers sft.json

DATA: single questions, in the splits `train` and `test` (`runs/make_easy_vqa.py`). The floors over the test questions
are the most frequent answer of the training split to any question, and to the same question. With --answers, the file
of `openblip eval vqa --out` on the same draw, also the accuracy on questions for yes or no, colours, and shapes.
"""

import json
from collections import Counter, defaultdict
from pathlib import Path

import tyro

from openblip.config import UserError
from openblip.data.easy_vqa import COLOURS
from openblip.data.rows import BadRows
from openblip.data.sources import open_source
from openblip.eval.benchmarks import usable_rows


def main(data: tyro.conf.Positional[str], take: int | None = None, answers: Path | None = None) -> None:
    """Print floors, and accuracies by kind, as JSON.

    Args:
        data: folder with questions.
        take: of so many test questions, drawn as `openblip eval --take` does.
        answers: what a model answered to the same questions.
    """
    given: defaultdict[str, Counter[str]] = defaultdict(Counter)
    train = open_source(data, split="train", require_captions=False)
    for index in range(len(train)):
        row = train[index]
        given[row.question or ""][row.answers[0]] += 1
    overall = sum(given.values(), Counter[str]()).most_common(1)[0][0]
    rows = usable_rows("vqa", open_source(data, split="test", require_captions=False), BadRows(), take=take)
    right = [row.answers[0] for row in rows]
    known = [given[row.question or ""] or Counter([overall]) for row in rows]
    same = [counts.most_common(1)[0][0] for counts in known]
    found = {"questions": len(rows), "most_frequent": share([overall] * len(rows), right)}
    found["most_frequent_of_question"] = share(same, right)
    if answers is not None:
        said = json.loads(answers.read_text(encoding="utf-8"))["figures"]["answers"]
        if len(said) != len(rows):
            raise UserError(
                f"{answers}: has {len(said)} answers to {len(rows)} questions; give the same --take"
            )
        for name in ("yes or no", "colour", "shape"):
            of = [number for number, word in enumerate(right) if kind(word) == name]
            if of:
                accuracy = share([said[n].strip().lower() for n in of], [right[n] for n in of])
                found[name] = {"questions": len(of), "accuracy": accuracy}
    print(json.dumps(found, indent=2))


def kind(answer: str) -> str:
    """What a question with this answer asks for."""
    if answer in ("yes", "no"):
        return "yes or no"
    return "colour" if answer in COLOURS else "shape"


def share(said: list[str], right: list[str]) -> float:
    """How often both are the same."""
    return sum(one == other for one, other in zip(said, right, strict=True)) / len(right)


if __name__ == "__main__":
    tyro.cli(main)
