"""What callers of a pipeline give: images one or many, questions, seeds, generation options. Checked here."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image as PILImage

from openblip.config import UserError, from_dict
from openblip.data.image import Readable
from openblip.models.generation import GenerationConfig

Image = str | Path | bytes | Readable | PILImage.Image
T = TypeVar("T")


def row_seeds(seed: int | None, count: int) -> list[int]:
    """One seed per row, a function of (seed, row); fresh ones when seed is None."""
    if seed is not None and seed < 0:
        raise UserError(f"seed {seed}: must be 0 or more")
    sequence = np.random.SeedSequence(seed)
    return [int(value) for value in sequence.generate_state(count, np.uint64) >> np.uint64(1)]


def generation_config(options: dict[str, Any]) -> GenerationConfig:
    """Generation options by keyword. Raises ConfigError (a UserError) that names an unknown or impossible one."""
    return from_dict(GenerationConfig, options, "generation options")


def options(usual: dict[str, Any], generation: dict[str, Any]) -> GenerationConfig:
    """A caller's generation options over the usual ones; who samples has no beams."""
    sampled = {"num_beams": 1} if generation.get("do_sample") else {}
    return generation_config({**usual, **sampled, **generation})


def listed(images: Image | Sequence[Image]) -> tuple[bool, list[Image]]:
    """(was it a single image, the images as a list)."""
    if isinstance(images, Sequence) and not isinstance(images, str | bytes):
        return False, list(images)
    return True, [images]


def questioned(
    images: Image | Sequence[Image], questions: str | Sequence[str], answers: Sequence[str] | None
) -> tuple[bool, list[Image], list[str]]:
    """(was it a single image, the images, a question for each). Raises UserError: they do not go together."""
    single, found = listed(images)
    asked = [questions] * len(found) if isinstance(questions, str) else list(questions)
    if len(asked) != len(found):
        raise UserError(f"answer: {len(found)} images but {len(asked)} questions; give one per image")
    if answers is not None and not answers:
        raise UserError("answer: `answers` is an empty list; give the answers to choose from, or None")
    return single, found, asked


def ahead(function: Callable[[slice], T], items: Sequence[slice]) -> Iterator[T]:
    """function(item) for each item, computed one ahead in a background thread."""
    with ThreadPoolExecutor(1) as pool:
        coming = None
        for item in items:
            started = pool.submit(function, item)
            if coming is not None:
                yield coming.result()
            coming = started
        if coming is not None:
            yield coming.result()
