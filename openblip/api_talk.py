"""A conversation with a BLIP-3 in several turns, of which each costs what is new in it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openblip.api_arguments import Image, listed, marked
from openblip.api_blip import spoken
from openblip.api_reader import ChatReader, Prompt, one_text
from openblip.config import UserError
from openblip.data.collate_chat import TileEmbeds
from openblip.data.conversation import IMAGE
from openblip.data.prompts import Message
from openblip.data.tokens import Tokens
from openblip.models.decoding import Decoding
from openblip.models.generation import GenerationConfig


class Talk:
    """A conversation in several turns. Made by `ChatPipeline.conversation`.

    What was read stays in the cache of the language model: a turn costs its own tokens and those of its answer. Where
    the ids of the conversation differ from those that were read (an undone turn, a model that spelled a word in another
    way than its tokenizer), it is read anew from there on; and from the first picture on, if the resampler reads what
    was last asked. What is said is what `chat(talk.messages, talk.images)` would say.

    `messages` and `images` are the conversation so far, which a mistake leaves as it was.
    """

    def __init__(
        self, reader: ChatReader, system: str | None = None, usual: dict[str, Any] | None = None
    ) -> None:
        self.messages: list[Message] = []
        if system is not None and system.strip():
            self.messages = [{"role": "system", "content": system.strip()}]
        self.images: list[Image] = []
        self._reader, self._usual = reader, usual or {}
        self._seen: list[TileEmbeds] = []  # of `images`
        self._runs: list[Tensor] = []  # vision tokens of `images`
        self._read: _Read | None = None

    def say(self, text: str, images: Image | Sequence[Image] = (), **generation: Any) -> str:
        """The answer to a further message, with any number of further images and videos. See `stream`."""
        for _ in self.stream(text, images, **generation):
            continue
        return self.messages[-1]["content"]

    def stream(self, text: str, images: Image | Sequence[Image] = (), **generation: Any) -> Iterator[str]:
        """The same, piece by piece as it is written. A turn whose answer is not listened to until its end is none.

        Images stand in front of the text, unless it has a marker <image> for each. Generation options are those of
        `ChatPipeline.chat`, without beams.

        Raises UserError, at once: see `ChatPipeline.chat`.
        """
        config = one_text(self._reader.options(self._usual, generation))
        new = listed(images)[1]
        messages: list[Message] = [
            *self.messages,
            {"role": "user", "content": marked(text, len(new), "chat")},
        ]
        tiles = self._reader.opened(new, "chat")
        prompt = self._reader.prompt(messages, [*self._seen, *tiles], tiles, "chat")
        self._reader.require_room(prompt, config.max_new_tokens)
        return self._answered(prompt, config, messages, [*self.images, *new], self._seen, self._runs)

    def undo(self) -> None:
        """Take back the last message, its images and its answer. Raises UserError: there is none."""
        if len(self.messages) < 2:
            raise UserError("undo: nothing has been said yet")
        self.messages = self.messages[:-2]
        left = sum(one["content"].count(IMAGE) for one in self.messages if one["role"] != "assistant")
        self.images, self._seen = self.images[:left], self._seen[:left]
        self._runs = self._runs[:left]

    @torch.inference_mode()
    def _answered(
        self, prompt: Prompt, config: GenerationConfig, messages: list[Message], images: list[Image],
        seen: list[TileEmbeds], known: list[Tensor],
    ) -> Iterator[str]:  # fmt: skip
        """`seen` and `known`: what the tower and the resampler made of the pictures so far."""
        reader, tokens = self._reader, prompt.tokens
        seen = [*seen, *reader.seen(prompt.tiles)]
        known = [] if reader.reads_questions else known
        new = seen[len(known) :]
        runs = [*known, *reader.runs(new, [prompt.question] * len(new))]
        decoding = self._begin(tokens, runs)
        ids: list[int] = []

        def columns() -> Iterator[Tensor]:
            for token in reader.columns(decoding, config):
                ids.append(int(token[0]))
                yield token

        yield from spoken(columns(), reader.decode)
        self._read = _Read(decoding, [*tokens.ids, *ids], list(zip(tokens.runs, runs)))
        self._seen, self._runs, self.images = seen, runs, images
        self.messages = [*messages, {"role": "assistant", "content": reader.decode(ids)}]

    def _begin(self, tokens: Tokens, runs: Sequence[Tensor]) -> Decoding:
        """Behind what was read already and is the same; what is new is still to be read."""
        # Taken out: what breaks off in the middle of a step must not be gone on from.
        read, self._read = self._read, None
        kept = 0 if read is None else read.common(tokens, runs)
        model, device = self._reader.model, self._reader.device
        if read is not None and kept:
            ids = torch.tensor([tokens.ids[kept:]], device=device)
            new = [run for (start, _), run in zip(tokens.runs, runs, strict=True) if start >= kept]
            try:
                read.decoding.rewind(kept, model.embed(ids, new))
            except RuntimeError:  # a cache with a sliding window has forgotten what came before it
                return self._begin(tokens, runs)
            return read.decoding
        ids = torch.tensor([tokens.ids], device=device)
        return model.begin(model.embed(ids, runs), torch.ones_like(ids))


@dataclass(frozen=True)
class _Read:
    """What a decoding has read and written: ids, of which its cache holds the first ones, and pictures in them."""

    decoding: Decoding
    ids: list[int]
    pictures: list[tuple[tuple[int, int], Tensor]]  # (start, stop), vision tokens

    def common(self, tokens: Tokens, runs: Sequence[Tensor]) -> int:
        """Of how many tokens from the beginning the cache can be kept; at least the last token is read anew."""
        most = min(self.decoding.cache.get_seq_length(), len(tokens) - 1)
        same = next((i for i in range(most) if self.ids[i] != tokens.ids[i]), most)
        for place, run, (old_place, old_run) in zip(tokens.runs, runs, self.pictures):
            if place != old_place or run is not old_run:
                same = min(same, place[0], old_place[0])
        return next((start for start, stop in tokens.runs if start < same < stop), same)
