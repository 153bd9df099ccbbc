"""What a row says, as a conversation: one form for chat files, questions with answers, and captions.

- LLaVA's layout: `conversations` of {"from": "human" | "gpt" | "system", "value": text with <image> in it}
- Hugging Face's: `messages` of {"role", "content": text, or parts of type "text" and "image"}
- `question` with `answers`: one turn; captions: one turn after a general request
- preferences: `prompt`, `question`, `messages` or `conversations`, with `chosen` and `rejected` answers

In a message's text the marker <image> stands where an image stands, and where a video does, which takes one as an
image does (§4.8, as released); a row's <video> markers mean the same. A row with a single image has one marker, at the
front of the first thing the user says, wherever it was before (§4.4, as released).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from openblip.data.prompts import Message
from openblip.data.rows import BadRow, Reference, Row, is_image_part, read_text
from openblip.data.tokens import AddedTokens
from openblip.data.video import Video

IMAGE = AddedTokens.NAMES[0]
MAX_IMAGES = 4  # rows with more are skipped, as in the released code
CAPTION_PROMPT = "Describe the image."
VIDEO_PROMPT = "Describe the video."

_ROLES = {
    **{"system": "system", "user": "user", "human": "user"},
    **{"assistant": "assistant", "gpt": "assistant"},
}


@dataclass(frozen=True)
class Conversation:
    """Messages {"role": "system" | "user" | "assistant", "content"} with <image> markers, and the images in order.

    A system message may come first; then user and assistant alternate, the user first. `id` and `where` are the row's.
    """

    messages: list[Message]
    images: list[Reference]
    id: str
    where: str

    def question(self, turns: int | None = None) -> str:
        """What the user said last, without markers; of the first `turns` turns, if they are not all."""
        asked = [message["content"] for message in self.messages if message["role"] == "user"]
        return asked[:turns][-1].replace(IMAGE, "").strip()


@dataclass(frozen=True)
class Preference:
    """A conversation that ends with the user, the better answer, and the worse one."""

    conversation: Conversation
    chosen: str
    rejected: str


def read_conversation(
    row: Row,
    rng: np.random.Generator | None = None,
    *,
    max_images: int = MAX_IMAGES,
    caption_prompt: str | None = None,
) -> Conversation:
    """The conversation of a row, which ends with an answer.

    Args:
        rng: draws one of several answers or captions; without it the first is taken.
        max_images: a row with more is refused.
        caption_prompt: what the user says where a row has only captions; None: `CAPTION_PROMPT`, or `VIDEO_PROMPT`.

    Raises:
        BadRow: there is no conversation in the row, it is not well-formed, or its images do not fit its text.
    """
    for name in ("conversations", "messages"):
        if name in row.extra:
            return _conversation(row, parse_messages(row.extra[name], row.where), max_images, answered=True)
    usual = VIDEO_PROMPT if any(isinstance(image, Video) for image in row.images) else CAPTION_PROMPT
    asked, found = caption_prompt or usual, row.captions
    if row.question is not None:
        asked, found = row.question, row.answers
        if not found:
            raise BadRow("missing_answer", row.where, f"no answer to its question {row.question!r}")
    if not found:
        columns = ", ".join(row.extra) or "nothing but images"
        raise BadRow(
            "missing_messages", row.where, f"no messages, question or caption; the row has {columns}"
        )
    answer = found[0] if rng is None else found[int(rng.integers(len(found)))]
    messages: list[Message] = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": answer},
    ]
    return _conversation(row, messages, max_images, answered=True)


def read_preference(row: Row, *, max_images: int = MAX_IMAGES) -> Preference:
    """A prompt with two answers; where a row has no prompt, `chosen` and `rejected` are whole conversations.

    Raises:
        BadRow: a part is missing, the answers are the same, or what `read_conversation` says.
    """
    prompt: list[Message] | None = None
    for name in ("prompt", "conversations", "messages"):
        value = row.extra.get(name)
        if isinstance(value, str):
            prompt = [{"role": "user", "content": read_text(value, row.where)}]
        elif value is not None:
            prompt = parse_messages(value, row.where)
        if prompt is not None:
            break
    if prompt is None and row.question is not None:
        prompt = [{"role": "user", "content": row.question}]
    heads, answers = [], []
    for name in ("chosen", "rejected"):
        head, answer = _last_answer(row.extra.get(name), name, row.where)
        heads.append(head)
        answers.append(answer)
    if prompt is None:
        if heads[0] != heads[1]:
            raise BadRow(
                "missing_messages", row.where, "no prompt, and what comes before both answers differs"
            )
        prompt = heads[0]
    elif any(head not in ([], prompt) for head in heads):
        raise BadRow("role_order", row.where, "an answer is one message, or repeats the prompt before it")
    if answers[0] == answers[1]:
        raise BadRow("no_preference", row.where, "chosen and rejected are the same")
    return Preference(_conversation(row, prompt, max_images, answered=False), answers[0], answers[1])


def parse_messages(value: Any, where: str) -> list[Message]:
    """Messages in LLaVA's or Hugging Face's form -> ours. Parts of a content become lines, an image a marker.

    Raises:
        BadRow: not a list of messages, an unknown role, a part that is neither text nor image, or no text.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise BadRow("missing_messages", where, f"a list of messages is wanted, got {str(value)[:40]!r}")
    messages: list[Message] = []
    for number, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise BadRow(
                "missing_messages", where, f"message {number} is {str(message)[:40]!r}, not an object"
            )
        said = message.get("role") or message.get("from")
        role = _ROLES.get(str(said))
        if role is None:
            known = ", ".join(_ROLES)
            raise BadRow("unknown_role", where, f"message {number} is by {said!r}; roles are {known}")
        content = message.get("content") if message.get("content") is not None else message.get("value")
        parts = content if isinstance(content, list) else [content]
        texts = [_part_text(part, number, where) for part in parts if part is not None]
        messages.append({"role": role, "content": "\n".join(text for text in texts if text)})
    return messages


def place_images(messages: Sequence[Message], count: int, where: str) -> list[Message]:
    """The messages with as many markers as there are images.

    A single image is put at the front of the first user's message, whether it had no marker or one elsewhere.

    Raises:
        BadRow: two markers or more for one image, or any other number than that of the images.
    """
    markers = sum(message["content"].count(IMAGE) for message in messages)
    if markers != count and (count, markers) != (1, 0):
        raise BadRow("image_count", where, f"the text has {markers} {IMAGE} markers for {count} images")
    if count != 1:
        return list(messages)
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), 0)
    placed: list[Message] = []
    for number, message in enumerate(messages):
        text = " ".join(part for piece in message["content"].split(IMAGE) if (part := piece.strip()))
        placed.append({**message, "content": f"{IMAGE}\n{text}".strip() if number == first else text})
    return placed


def check_turns(messages: Sequence[Message], where: str, *, answered: bool) -> None:
    """Nothing, if user and assistant alternate and nobody says nothing.

    Args:
        answered: the last message is the assistant's; otherwise it is the user's.

    Raises:
        BadRow: out of order, or a message is empty.
    """
    turns = list(messages[1:] if messages and messages[0]["role"] == "system" else messages)
    for number, message in enumerate(turns):
        wanted = ("user", "assistant")[number % 2]
        if message["role"] != wanted:
            detail = (
                f"turn {number} is by {message['role']}, wanted {wanted}: they take turns, the user first"
            )
            raise BadRow("role_order", where, detail)
        if not message["content"]:
            reason = "missing_question" if wanted == "user" else "missing_answer"
            raise BadRow(reason, where, f"turn {number}, by the {wanted}, is empty")
    if not turns:
        raise BadRow("missing_messages", where, "nobody says anything")
    if answered and len(turns) % 2:
        raise BadRow("missing_answer", where, "the conversation ends with the user, without an answer")
    if not answered and not len(turns) % 2:
        raise BadRow("role_order", where, "the prompt ends with an answer; it is the user's turn to be last")


def _conversation(row: Row, messages: list[Message], max_images: int, *, answered: bool) -> Conversation:
    if len(row.images) > max_images:
        raise BadRow("too_many_images", row.where, f"{len(row.images)} images, more than {max_images}")
    if any(isinstance(image, Video) for image in row.images):
        messages = [{**one, "content": one["content"].replace("<video>", IMAGE)} for one in messages]
    messages = place_images(messages, len(row.images), row.where)
    check_turns(messages, row.where, answered=answered)
    return Conversation(messages, row.images, row.id, row.where)


def _last_answer(value: Any, name: str, where: str) -> tuple[list[Message], str]:
    """What comes before an answer, and the answer."""
    head: list[Message] = []
    if isinstance(value, list) and value:
        *head, last = parse_messages(value, where)
        value = last["content"] if last["role"] == "assistant" else ""
    answer = "" if value is None else read_text(value, where)
    if not answer:
        raise BadRow("missing_answer", where, f"no answer in {name}")
    if IMAGE in answer:
        raise BadRow("image_count", where, f"there is an {IMAGE} marker in {name}")
    return head, answer


def _part_text(part: Any, number: int, where: str) -> str:
    if is_image_part(part):
        return IMAGE
    if isinstance(part, Mapping):
        if part.get("type") != "text":
            raise BadRow("unknown_part", where, f"message {number} has a part of type {part.get('type')!r}")
        part = part.get("text")
    return "" if part is None else read_text(part, where)
