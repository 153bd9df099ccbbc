"""Pairs that people vouch for, to stand beside web pairs: captioner and filter learn from them, nobody judges them."""

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from openblip.config import UserError
from openblip.data.collate import check_picture
from openblip.data.rows import BadRows, Row
from openblip.data.sources import Source
from openblip.recipes import Recipe


class HumanRows:
    """The good rows of a source, to stand beside web rows: under ids of their own, for two folders may both have an
    `images/1.jpg`. Every picture is opened. Bad ones are listed in the file `bad`; too many are a UserError (see
    `BadRows`). `report` is called with (rows looked at, rows in all).
    """

    def __init__(self, source: Source, bad: Path, report: Callable[[int, int], None] | None = None) -> None:
        bad.unlink(missing_ok=True)
        counted = BadRows(bad)
        self.source = source
        self.numbers: list[int] = []
        for number in range(len(source)):
            counted.saw()
            with counted.skipping():
                row = source[number]
                check_picture(row)
                self.numbers += [number] if row.captions else []
            if report is not None:
                report(number + 1, len(source))

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int, /) -> Row:
        row = self.source[self.numbers[index]]
        return replace(row, id=f"human/{row.id}")

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def part(self, indices: Sequence[int]) -> "HumanRows":
        """Some of them."""
        found = copy.copy(self)
        found.numbers = [self.numbers[index] for index in indices]
        return found

    @property
    def fingerprint(self) -> str:
        """That of the source, and which of its rows are good."""
        return hashlib.sha256(json.dumps([self.source.fingerprint, self.numbers]).encode()).hexdigest()


class Stages(Protocol):
    """What is trained on human pairs; every `held_out`-th is kept out of the filter's training, 0: none."""

    pretrain: Recipe
    caption: Recipe
    retrieval: Recipe
    held_out: int


def check_enough(stages: Stages, human: int, web: int | None = None) -> None:
    """Raise UserError if so many pairs do not fill one batch of every stage, or cannot fit the filter's scale.

    web: None if it is not known yet.
    """
    every = stages.held_out
    pretrain, caption, retrieval = (
        recipe.train.batch_size for recipe in (stages.pretrain, stages.caption, stages.retrieval)
    )
    wants = [("human", human, caption, f"a batch of {caption} of the caption recipe")]
    what = f"a batch of {retrieval} of the retrieval recipe"
    if every:  # the first of every so many is held out
        wants.append(
            ("human", human, every + 1, f"two pairs held out (every {every}-th) to fit the filter's scale")
        )
        retrieval += -(-retrieval // (every - 1))
        what += f" without the pairs held out (every {every}-th)"
    wants.append(("human", human, retrieval, what))
    if web is not None:
        wants.append(
            ("web and human", web + human, pretrain, f"a batch of {pretrain} of the pretrain recipe")
        )
    for name, pairs, least, what in wants:
        if pairs < least:
            raise UserError(f"{name}: {pairs} pairs are too few for {what}: wanted {least} or more")
