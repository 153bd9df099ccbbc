"""An experiment whose answer is known: rows split in three, and wrong captions planted in one part."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from openblip.config import UserError
from openblip.data.rows import Row


class Split(NamedTuple):
    """Three parts of a data set that share no picture, each in the order of the whole."""

    human: list[Row]  # captions people vouch for
    web: list[Row]  # captions as found: the part that noise is planted in
    test: list[Row]  # never seen in training


def split(rows: Sequence[Row], seed: int, human: int = 300, test: int = 400) -> Split:
    """Draw `human` and `test` rows at random; the rest is the web part.

    Rows of one group (`row.extra["group"]`, or else one picture, `row.id`) stay together: a test picture
    whose sibling was trained on would not be unseen. A group that would make a part too large goes to
    another; a part may thus stay smaller than asked for.

    Raises:
        UserError: a size is not positive, or nothing is left for the web part.
    """
    if human < 1 or test < 1 or human + test >= len(rows):
        raise UserError(
            f"{len(rows)} rows cannot be split into {human} for the human part, {test} for the test and the "
            "rest for the web part: each needs at least one"
        )
    groups: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[_group(row)].append(index)
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    parts: dict[str, list[int]] = {"test": [], "human": [], "web": []}
    sizes = {"test": test, "human": human, "web": len(rows)}
    for name in order:
        part = next(part for part, size in sizes.items() if len(parts[part]) + len(groups[name]) <= size)
        parts[part] += groups[name]
    if empty := [part for part, indices in parts.items() if not indices]:
        largest = max(groups, key=lambda name: len(groups[name]))
        raise UserError(
            f"nothing is left for the {empty[0]} part: the {len(rows)} rows are in {len(groups)} groups, of "
            f"which {largest!r} has {len(groups[largest])}"
        )
    return Split(*([rows[index] for index in sorted(parts[part])] for part in Split._fields))


def plant_noise(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[bool]]:
    """Give a share of the rows the captions of other rows; also returns which rows are wrong now.

    `round(share · len(rows))` rows, drawn at random, exchange their captions among each other, so the set of
    captions as a whole stays what it was. No row gets the captions of its own group (see `split`), nor one
    that its picture also has: what is planted as wrong is wrong.

    Raises:
        UserError: `share` is not within 0 and 1, or the drawn rows are too few or too alike to be exchanged.
    """
    if not 0 <= share <= 1:
        raise UserError(f"the share of wrong captions is between 0 and 1, got {share}")
    own: dict[str, set[str]] = defaultdict(set)  # picture -> everything it is called
    for row in rows:
        own[row.id].update(map(_plain, row.captions))

    def is_wrong(receiver: int, giver: int) -> bool:
        taken = {_plain(text) for text in rows[giver].captions}
        return _group(rows[receiver]) != _group(rows[giver]) and not taken & own[rows[receiver].id]

    draw = random.Random(seed)
    drawn = draw.sample(range(len(rows)), round(share * len(rows)))
    givers = dict(zip(drawn, drawn[1:] + drawn[:1], strict=True))  # one ring: nobody keeps what it has
    for receiver in drawn:
        if is_wrong(receiver, givers[receiver]):
            continue
        for other in draw.sample(drawn, len(drawn)):
            if is_wrong(receiver, givers[other]) and is_wrong(other, givers[receiver]):
                givers[receiver], givers[other] = givers[other], givers[receiver]
                break
        else:
            raise UserError(
                f"{rows[receiver].where}: none of the {len(drawn)} rows drawn to exchange captions has any "
                "that would be wrong here; take a larger share, or rows that are less alike"
            )
    noisy = [
        replace(row, captions=list(rows[givers[index]].captions)) if index in givers else row
        for index, row in enumerate(rows)
    ]
    return noisy, [index in givers for index in range(len(rows))]


def _group(row: Row) -> str:
    return str(row.extra.get("group", row.id))


def _plain(caption: str) -> str:
    """A caption without what makes no other caption of it: case and spaces."""
    return " ".join(caption.casefold().split())
