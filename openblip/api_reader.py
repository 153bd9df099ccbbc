"""What a BLIP-3 reads and writes, between what callers give and the model: pictures as tiles, prompts, tokens, texts.

    {"role": "user", "content": "<image>\\nwhat is it?"} ─ chat template ─ ids, a run of <image> ids for each picture
                                  a.png ─ tiles ─ tower ─ resampler ─ vision tokens ───┘
                                                                      language model ── answer

Shapes: b conversations, L tokens, K vision tokens of a picture, H width of the language model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from openblip.api_arguments import Image, Messages, options, placed, row_seeds
from openblip.config import UserError
from openblip.data.chat import CHAT_TEMPLATES, BadChat, ChatTokenizer, chat_tokenizer
from openblip.data.collate_chat import TileEmbeds, conditions, video_tiles
from openblip.data.conversation import IMAGE
from openblip.data.image import BadImage, open_image
from openblip.data.prompts import LmTokenizer, Message
from openblip.data.rows import BadRow
from openblip.data.tiles import TileTransform
from openblip.data.tokens import Tokens
from openblip.data.transforms import ImageTransform
from openblip.data.video import FRAMES, as_video
from openblip.models.blip3 import Blip3
from openblip.models.decoding import Decoding
from openblip.models.generation import GenerationConfig, generate, stream

MAX_ANSWER = 768  # new tokens of an answer, as in the released code; of a small context, a quarter


@dataclass(frozen=True)
class Prompt:
    """What the language model is to go on from. `question`: what a resampler that reads questions is told."""

    tokens: Tokens
    tiles: list[TileEmbeds]  # of which the tower is still to be asked
    question: str
    where: str


def one_text(config: GenerationConfig) -> GenerationConfig:
    """These options. Raises UserError: they are of what cannot be said as it is written, or of several texts."""
    if config.num_beams > 1:
        raise UserError(f"num_beams {config.num_beams}: beam search cannot stream; set num_beams to 1")
    if config.num_return_sequences > 1:
        raise UserError(f"num_return_sequences {config.num_return_sequences}: a stream is of one text")
    return config


class ChatReader:
    """A `Blip3` with the tokenizer of its language model; `transform` is that of a tile.

    batch_size: tiles that the tower looks at together. frames: that are taken of a video.
    """

    def __init__(
        self, model: Blip3, words: LmTokenizer, transform: ImageTransform, device: torch.device,
        dtype: torch.dtype, batch_size: int, frames: int = FRAMES,
    ) -> None:  # fmt: skip
        self.model, self.words, self.frames = model, words, frames
        self.device, self.dtype, self.batch_size = device, dtype, batch_size
        self.tiles = TileTransform(transform, model.config.used_grids)
        self.reads_questions = model.config.resampler.condition_size is not None
        family = model.lm.config.family
        can_chat = family in CHAT_TEMPLATES or words.has_chat_template
        self._format = chat_tokenizer(words, model.image_token_id, family) if can_chat else None
        self.ends = model.ends([] if self._format is None else [self._format.end_id])

    @property
    def chat_format(self) -> ChatTokenizer:
        """How conversations become ids. Raises UserError: the language model has no chat template."""
        if self._format is None:
            raise UserError("chat: the language model of this model has no chat template")
        return self._format

    # --- prompts ----------------------------------------------------------------------------------------------

    def chat_prompt(self, messages: Messages, images: Sequence[Image], where: str) -> Prompt:
        """A conversation, up to where the model answers. Raises BadRow."""
        tiles = self.opened(images, where)
        return self.prompt(messages, tiles, tiles, where)

    def prompt(
        self, messages: Messages, pictures: Sequence[TileEmbeds], tiles: list[TileEmbeds], where: str
    ) -> Prompt:
        """The same of these pictures, of which `tiles` are still to be looked at."""
        said = placed(messages, len(pictures), where)
        try:
            tokens = self.chat_format.prompt(said, self._lengths(pictures))
        except BadChat as error:
            raise BadRow(error.reason, where, error.detail) from error
        return Prompt(tokens, tiles, said[-1]["content"].replace(IMAGE, "").strip(), where)

    def document_prompt(self, words: str, images: Sequence[Image], where: str) -> Prompt:
        """A document that begins with pictures, and perhaps with some words about them. Raises BadRow."""
        tiles = self.opened(images, where)
        pieces = [Tokens.text(self.words.start_ids, counted=False)]
        for length in self._lengths(tiles):
            pieces.append(Tokens.image(self.model.image_token_id, length))
        pieces.append(Tokens.text(self.words.encode(words), counted=False))
        return Prompt(Tokens.join(pieces), tiles, words, where)

    def opened(self, images: Sequence[Image], where: str) -> list[TileEmbeds]:
        """Pictures as tiles, and videos as frames. Raises BadRow."""
        try:
            return [self._opened(image, where) for image in images]
        except BadImage as error:
            raise BadRow(error.reason, where, error.detail) from error

    def _opened(self, image: Image, where: str) -> TileEmbeds:
        if (video := as_video(image)) is None:
            found = self.tiles(open_image(image, draft_size=self.tiles.draft_size))
            return TileEmbeds(found.pixel_values, found.grid)
        if self.model.temporal is None:
            raise BadRow("video", where, "it shows a video, and this model has no temporal encoder")
        return video_tiles(video, self.frames, self.tiles)

    def answer_ids(self, answer: str) -> list[int]:
        """An answer with the token that ends it. Raises UserError: it says nothing."""
        if not answer.strip():
            raise UserError(f"answer: the answer {answer!r} has no words")
        asked: list[Message] = [{"role": "user", "content": "?"}]
        counted = [i for i in self.chat_format.preference(asked, answer, []).labels if i >= 0]
        return counted[: counted.index(self.chat_format.end_id) + 1]

    def options(self, usual: dict[str, Any], generation: dict[str, Any]) -> GenerationConfig:
        """A caller's options over the usual ones. If nobody says how long an answer may be: `MAX_ANSWER`."""
        context = self.model.lm.context_length or 4 * MAX_ANSWER
        most = max(1, min(MAX_ANSWER, context // 4))
        return options({"max_new_tokens": most, **usual}, generation)

    def require_room(self, prompt: Prompt, new_tokens: int) -> None:
        """Nothing. Raises UserError: there is no room for so many new tokens, and by how many."""
        context, tokens, images = self.model.lm.context_length, prompt.tokens, prompt.tokens.runs
        if context is not None and (over := len(tokens) + new_tokens - context) > 0:
            seen = sum(stop - start for start, stop in images)
            raise UserError(
                f"{prompt.where}: {len(tokens)} tokens, {seen} of them for {len(images)} images, and {new_tokens} to "
                f"write (max_new_tokens) are {over} more than the {context} of this language model's context"
            )

    def _lengths(self, pictures: Sequence[TileEmbeds]) -> list[int]:
        return [self.model.config.vision_length(*one.grid[:2], one.frames) for one in pictures]

    # --- embeddings -------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def seen(self, tiles: Sequence[TileEmbeds]) -> list[TileEmbeds]:
        """What the tower makes of pictures, a few tiles at a time."""
        if not tiles:
            return []
        pixels = torch.cat([picture.embeds for picture in tiles]).split(self.batch_size)
        embeds = torch.cat(
            [self.model.encode_image(part.to(self.device, self.dtype)) for part in pixels]
        ).split([len(picture.embeds) for picture in tiles])
        return [picture._replace(embeds=one) for one, picture in zip(embeds, tiles, strict=True)]

    @torch.inference_mode()
    def runs(self, pictures: Sequence[TileEmbeds], questions: Sequence[str]) -> list[Tensor]:
        """The vision tokens of each picture [K, H]; `questions`, one for each, are for a resampler that reads them."""
        if not pictures:
            return []
        read: dict[str, Any] = {}
        if self.reads_questions:
            found = conditions(questions, self.words)
            read = {name: value.to(self.device) for name, value in found.items()}
        grids = torch.tensor([picture.grid for picture in pictures])
        embeds, frames = torch.cat([one.embeds for one in pictures]), [one.frames for one in pictures]
        return self.model.vision_runs(embeds, grids, frames=frames, **read)

    def embedded(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        """Embeddings [b, L, H] of prompts and which of them are real [b, L], padding last."""
        pictures = self.seen([tiles for prompt in prompts for tiles in prompt.tiles])
        runs = self.runs(pictures, [prompt.question for prompt in prompts for _ in prompt.tiles])
        ids, mask = self.padded([prompt.tokens.ids for prompt in prompts])
        return self.model.embed(ids, runs), mask

    def padded(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Ids [b, L] and their mask, padding last."""
        ids = [torch.tensor(row, device=self.device) for row in rows]
        mask = [torch.ones_like(row) for row in ids]
        padded = pad_sequence(ids, batch_first=True, padding_value=self.words.pad_id)
        return padded, pad_sequence(mask, batch_first=True)

    # --- texts ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def written(
        self, prompts: Sequence[Prompt], config: GenerationConfig, seeds: Sequence[int]
    ) -> list[list[str]]:
        """num_return_sequences texts for each prompt."""
        decoding = self.model.begin(*self.embedded(prompts))
        step = self.model.step(decoding)
        found = generate(step, decoding.start_ids, config, seeds=seeds, **self.ends)
        texts = [self.decode(row) for row in found.sequences.tolist()]
        n = config.num_return_sequences
        return [texts[i : i + n] for i in range(0, len(texts), n)]

    def columns(self, decoding: Decoding, config: GenerationConfig) -> Iterator[Tensor]:
        """Tokens [1], each as soon as it is written."""
        seeds = row_seeds(config.seed, 1)
        return stream(self.model.step(decoding), decoding.start_ids, config, seeds=seeds, **self.ends)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of what was written, up to the token that ends it, whichever it is."""
        ends = self.ends["eos_token_id"]
        stop = next((place for place, number in enumerate(ids) if number in ends), len(ids))
        return self.words.decode([number for number in ids[:stop] if number < self.model.image_token_id])
