"""What callers of a pipeline give: images one or many, questions, messages, seeds, options. Checked here."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image as PILImage

from openblip.config import UserError, from_dict
from openblip.data.conversation import IMAGE, check_turns, parse_messages, place_images
from openblip.data.image import Readable
from openblip.data.prompts import Message
from openblip.data.rows import message_images
from openblip.data.video import Video
from openblip.models.generation import GenerationConfig

Image = (
    str | Path | bytes | Readable | PILImage.Image | Video
)  # a BLIP-3 with a temporal encoder reads videos
# A conversation; a text is the user's only message (see `marked`).
Messages = str | Sequence[Mapping[str, Any]]
# Messages, or words; their images; a name for what is said about them.
Request = tuple[Any, Sequence[Image], str]
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


def check_room(positions: int, prompt: int, config: GenerationConfig) -> None:
    """Raises UserError: prompt tokens and new ones are more than a model has positions. The last needs none."""
    if (room := positions - prompt + 1) < config.max_new_tokens:
        raise UserError(
            f"max_new_tokens is at most {room}, got {config.max_new_tokens}: this model has {positions} positions, "
            f"and the prompt takes {prompt}"
        )


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


def requests(messages: Any, images: Any) -> tuple[bool, list[Request]]:
    """(was it a single conversation, the conversations with their images).

    images: of a single conversation one or a list, of several a list of that; None: those in the parts of the messages.
    Raises UserError: not as many conversations as there are images for.
    """
    single = isinstance(messages, str | Mapping) or not messages or isinstance(messages[0], Mapping)
    talks = [messages] if single else list(messages)
    if images is None:
        found = [[] if isinstance(talk, str) else message_images({"messages": talk}) for talk in talks]
    elif single:
        found = [listed(images)[1]]
    else:
        is_one, several = listed(images)
        if is_one or len(several) != len(talks):
            have = "one image" if is_one else f"images for {len(several)}"
            raise UserError(f"chat: {len(talks)} conversations but {have}; give a list of images for each")
        found = [[] if own is None else listed(own)[1] for own in several]
    names = ["chat"] if single else [f"conversation {number}" for number in range(len(talks))]
    return single, list(zip(talks, found, names, strict=True))


def placed(messages: Messages, count: int, where: str) -> list[Message]:
    """A conversation for the model to answer, with a marker <image> for each of its `count` images.

    A single image is put in front of the first user's message, as in training, if it has no marker or one up to there.
    What the assistant said is text, and holds no markers.

    Raises BadRow: messages that are none, out of order, or with another number of markers.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": marked(messages, count, where)}]
    found = parse_messages(messages, where)
    # A model may have spelled a marker, or had nothing to say; neither is a mistake of the user's.
    given = [{**one, "content": "..."} if one["role"] == "assistant" else one for one in found]
    first = next((i for i, message in enumerate(given) if message["role"] == "user"), 0)
    in_front, later = (
        sum(message["content"].count(IMAGE) for message in part)
        for part in (given[: first + 1], given[first + 1 :])
    )
    if (count, in_front, later) != (1, 0, 1):
        given = place_images(given, count, where)
    check_turns(given, where, answered=False)
    return [own if own["role"] == "assistant" else one for own, one in zip(found, given, strict=True)]


def marked(text: str, count: int, where: str) -> str:
    """A user's message with a marker for each of its `count` images: in front of it, if it has none. Raises BadRow."""
    if count > 1 and IMAGE not in text:
        return "\n".join([IMAGE] * count + [text.strip()]).strip()
    return place_images([{"role": "user", "content": text.strip()}], count, where)[0]["content"]
