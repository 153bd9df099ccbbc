"""BLIP-3 in a user's hands: conversations with any number of pictures of any size; captions and answers by them.

With a temporal encoder it takes a video wherever it takes a picture: a path like clip.mp4, or a `data.video.Video`. The
marker <image> stands in a text where a picture or a video stands. One that is alone in its conversation is put in front
of the first thing the user says, as in training, if it has no marker or one in there.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from openblip.api_arguments import Image, Messages, Request, ahead, questioned, requests, row_seeds
from openblip.api_blip import Pipeline, spoken
from openblip.api_llm import quantise_
from openblip.api_reader import ChatReader, Prompt, one_text
from openblip.api_talk import Talk
from openblip.config import UserError
from openblip.data.conversation import CAPTION_PROMPT, VIDEO_PROMPT
from openblip.data.video import FRAMES, as_video
from openblip.hub import Pretrained
from openblip.models.generation import GenerationConfig


class ChatPipeline(Pipeline):
    """A `Blip3` with its tokenizer and image transform, ready for use. Made by `api.load`.

    A model that was only pre-trained, on documents, writes captions as it read them; after instruction tuning it is
    asked for them. It talks either way.
    """

    chat_options: ClassVar[dict[str, Any]] = {"num_beams": 1}  # greedy, as the released code
    caption_options: ClassVar[dict[str, Any]] = {"num_beams": 1, "max_new_tokens": 64}
    answer_options: ClassVar[dict[str, Any]] = {"num_beams": 1, "max_new_tokens": 32}

    def __init__(
        self,
        pretrained: Pretrained,
        *,
        device: str | torch.device = "cpu",
        dtype: str = "fp32",
        batch_size: int = 16,
    ) -> None:
        words = pretrained.lm_tokenizer
        if words is None:
            raise UserError(
                "this model came without the tokenizer of its language model, so it cannot be used"
            )
        is_int8 = dtype == "int8"
        super().__init__(pretrained, device=device, dtype="bf16" if is_int8 else dtype, batch_size=batch_size)
        if is_int8:
            quantise_(self.model.lm)
        frames = self.info.get("frames", FRAMES)
        self.reader = ChatReader(
            self.model, words, self.transform, self.device, self.dtype, self.batch_size, frames
        )

    @property
    def can_caption(self) -> bool:
        """Always."""
        return True

    # --- what users ask for ---------------------------------------------------------------------------------

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        images: Image | Sequence[Any] | None = None,
        **generation: Any,
    ) -> str | list[str]:
        """The answer to a conversation, or a list of answers to a list of conversations.

        messages: [{"role": "user", "content": "<image> and <image>: which is older?"}, ...], system messages first,
            the last of them the user's; contents may be Hugging Face's lists of parts. A text alone is a single
            message, which needs no markers: its images stand in front.
        images: of the conversation in the order of their markers, one or a list; for several conversations a list of
            that for each. None: those that the parts of the messages bring.
        generation: as for `caption`; greedy by default. An answer has at most max_new_tokens; if none is given, 768,
            or a quarter of a small context. There must be room for as many.

        Raises UserError: no such messages, as many markers as images there are not, an image that cannot be read, or
        more tokens than the context has room for; it says by how many.
        """
        config = self.reader.options(self.chat_options, generation)
        single, asked = requests(messages, images)
        said = self._replies(asked, self.reader.chat_prompt, config, row_seeds(config.seed, len(asked)))
        return said[0][0] if single else [texts[0] for texts in said]

    def chat_stream(
        self, messages: Messages, images: Image | Sequence[Image] | None = None, **generation: Any
    ) -> Iterator[str]:
        """The answer to one conversation, piece by piece as it is written (greedy or sampled, no beams)."""
        single, asked = requests(messages, images)
        if not single:
            raise UserError("chat_stream: one conversation at a time")
        config = self.reader.options(self.chat_options, generation)
        return self._streamed(self.reader.chat_prompt(*asked[0]), config)

    def conversation(self, system: str | None = None) -> Talk:
        """A conversation in several turns that remembers what was shown and said; `system` comes first in it."""
        return Talk(self.reader, system, self.chat_options)

    def caption_stream(self, image: Image, prompt: str | None = None, **generation: Any) -> Iterator[str]:
        """The caption of one image, piece by piece as it is written (greedy or sampled, no beams)."""
        config = self.reader.options(self.caption_options, generation)
        return self._streamed(
            self._caption_prompt(self._caption_words(image, prompt), [image], "caption"), config
        )

    def answer(
        self,
        images: Image | Sequence[Image],
        questions: str | Sequence[str],
        *,
        answers: Sequence[str] | None = None,
        prompt: str = "{}",
        **generation: Any,
    ) -> str | list[str]:
        """Answer a question about each image: freely, or, given `answers`, the one of them that fits best.

        prompt: what the model is asked, with {} for the question. The best answer is the likeliest as a whole; with
        length_penalty=1, the one whose tokens are the likeliest on average (see `Decoding.rank`).
        """
        config = self.reader.options(self.answer_options, generation)
        single, images, questions = questioned(images, questions, answers)
        if "{}" not in prompt:
            raise UserError(f"answer: the prompt {prompt!r} has no {{}} where the question goes")
        if not all(question.strip() for question in questions):
            raise UserError("answer: a question has no words")
        asked: list[Request] = [
            (prompt.replace("{}", question.strip()), [image], f"question {number}")
            for number, (image, question) in enumerate(zip(images, questions, strict=True))
        ]
        if answers is None:
            seeds = row_seeds(config.seed, len(asked))
            said = [texts[0] for texts in self._replies(asked, self.reader.chat_prompt, config, seeds)]
        else:
            penalty = generation.get("length_penalty", 0.0)
            said = [answers[best] for best in self._best(asked, answers, penalty)]
        return said[0] if single else said

    def encoded(self, images: Sequence[Image]) -> Iterator[tuple[Tensor, slice]]:
        """Nothing: pictures differ in their number of tiles, so no tensor holds several. Raises UserError."""
        raise UserError(
            "a BLIP-3 cuts each picture into as many tiles as it needs: use caption, answer or chat on the pictures"
        )

    # --- inside ---------------------------------------------------------------------------------------------

    @property
    def _is_base(self) -> bool:
        """Whether it goes on with documents, and does not answer yet."""
        return self.info.get("stage") == "blip3_pretrain"

    @property
    def _caption_prompt(self) -> Callable[..., Prompt]:
        return self.reader.document_prompt if self._is_base else self.reader.chat_prompt

    def _caption_words(self, image: Image, prompt: str | None) -> str:
        """What a caption is asked for with, as in training."""
        if self._is_base or prompt is not None:
            return prompt or ""
        return self.info.get("prompt", CAPTION_PROMPT if as_video(image) is None else VIDEO_PROMPT)

    def _batches(
        self, asked: Sequence[Request], build: Callable[..., Prompt], new_tokens: int
    ) -> Iterator[tuple[slice, list[Prompt]]]:
        """Prompts, batch by batch, with room for new tokens; the pictures of the next are opened meanwhile."""
        size = self.batch_size
        parts = [slice(start, start + size) for start in range(0, len(asked), size)]
        made = ahead(lambda part: [build(*request) for request in asked[part]], parts)
        for part, prompts in zip(parts, made, strict=True):
            for prompt in prompts:
                self.reader.require_room(prompt, new_tokens)
            yield part, prompts

    def _replies(
        self,
        asked: Sequence[Request],
        build: Callable[..., Prompt],
        config: GenerationConfig,
        seeds: Sequence[int],
    ) -> list[list[str]]:
        """num_return_sequences texts for each request."""
        said: list[list[str]] = []
        for part, prompts in self._batches(asked, build, config.max_new_tokens):
            said += self.reader.written(prompts, config, seeds[part])
        return said

    def _captions(
        self, images: Sequence[Image], prompt: str | None, config: GenerationConfig, seeds: Sequence[int]
    ) -> list[list[str]]:
        asked: list[Request] = [
            (self._caption_words(image, prompt), [image], f"image {i}") for i, image in enumerate(images)
        ]
        return self._replies(asked, self._caption_prompt, config, seeds)

    def _streamed(self, prompt: Prompt, config: GenerationConfig) -> Iterator[str]:
        """Mistakes show at once, before the first piece is asked for."""
        self.reader.require_room(prompt, one_text(config).max_new_tokens)
        return self._pieces_of(prompt, config)

    @torch.inference_mode()
    def _pieces_of(self, prompt: Prompt, config: GenerationConfig) -> Iterator[str]:
        decoding = self.model.begin(*self.reader.embedded([prompt]))
        yield from spoken(self.reader.columns(decoding, config), self.reader.decode)

    def _best(self, asked: Sequence[Request], answers: Sequence[str], length_penalty: float) -> list[int]:
        """The index of the likeliest answer to each request, whose prompts are of one template: they end alike."""
        ids, mask = self.reader.padded([self.reader.answer_ids(answer) for answer in answers])
        best: list[int] = []
        for _, prompts in self._batches(asked, self.reader.chat_prompt, ids.shape[1]):
            with torch.inference_mode():
                decoding = self.model.begin(*self.reader.embedded(prompts))
                best += decoding.rank(ids, mask, length_penalty=length_penalty).argmax(dim=1).tolist()
        return best
