"""Rows to samples and batches for a language model that reads images among its text: chats, documents, preferences.

A dataset opens pictures as tiles (or takes what a frozen tower made of them), reads the text of the row and encodes
it; a collator pads on the right and stacks. Encoding is the dataset's, since only there a row that is too long can be
a bad row. Shapes: B rows, L tokens, I images, T tiles of all images, S tile size, N tower tokens, D their width.

    pixel_values [T, 3, S, S] or tile_embeds [T, N, D]   in order of appearance in the text, row after row
    grids [I, 4]                                         columns, rows, width, height
    frames [I]                                           1, or of a video, whose tiles are its frames, how many
    input_ids, attention_mask, labels [B, L]
    ids                                                  one name for each row, for messages

A video is an image of several bases, one for each frame, with a grid of none: (0, 0, width, height). A batch without
any image has grids [0, 4] and neither pixel_values nor tile_embeds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from openblip.data.chat import BadChat, ChatTokenizer
from openblip.data.collate import Batch, Rows, Sample, picture_key
from openblip.data.conversation import MAX_IMAGES, read_conversation, read_preference
from openblip.data.image import BadImage, open_image
from openblip.data.interleaved import document_tokens, pack, read_document
from openblip.data.prompts import LmTokenizer
from openblip.data.rows import BadRow, Row
from openblip.data.tiles import Tiles, TileTransform
from openblip.data.tokens import IGNORED, AddedTokens, Tokens
from openblip.data.video import Video, read_frames

Grid = tuple[int, int, int, int]  # columns, rows, width, height
VisionLength = Callable[
    [int, int, int], int
]  # (columns, rows, frames) -> vision tokens of an image, or video
MAX_CONDITION = 64  # tokens of a question that an instruction-conditioned resampler reads


class TileEmbeds(NamedTuple):
    """What a frozen tower made of one picture's tiles: embeds [1 + columns · rows, N, D], and its grid; or is still to
    make of them: pixels [1 + columns · rows, 3, S, S]. Of a video: [frames, ...].
    """

    embeds: Tensor
    grid: Grid
    frames: int = 1


class TileFeatures(Protocol):
    """Tile embeds by picture."""

    def lookup(self, key: str) -> TileEmbeds:
        """Of the picture with this key (`collate.picture_key`). Raises BadRow: it could not be read."""
        ...


def open_tiles(row: Row, number: int, transform: TileTransform) -> Tiles:
    """Picture `number` of a row as tiles.

    Raises:
        BadRow: the picture cannot be read; with the reason of `BadImage` and the place of the row.
    """
    try:
        return transform(open_image(row.images[number], draft_size=transform.draft_size))
    except BadImage as error:
        raise BadRow(error.reason, row.where, error.detail) from error


def video_tiles(video: Video, frames: int, transform: TileTransform) -> TileEmbeds:
    """So many frames of a video, each as a base tile [frames, 3, S, S]. Raises BadImage: it cannot be read."""
    shown = read_frames(video.source, frames)
    # By numpy, as in `_images`. A short video shows a frame more than once.
    made = {id(image): transform.base(image).numpy() for image in shown}
    pixels = torch.from_numpy(np.stack([made[id(image)] for image in shown]))
    return TileEmbeds(pixels, (0, 0, *shown[0].size), len(shown))


@dataclass(frozen=True)
class TiledPictures:
    """Rows with their pictures as tiles: what the datasets share.

    Pictures are opened and put through `transform`, or never opened when there are `features`.
    `vision_length` is the model's. A text of more than `max_length` tokens, vision tokens among them, is cut as the
    dataset says. Of a video so many `frames` are taken; None: the model reads no videos.
    """

    rows: Rows = field(repr=False)
    transform: TileTransform | None = None
    features: TileFeatures | None = field(default=None, kw_only=True)
    vision_length: VisionLength = field(kw_only=True)
    max_length: int | None = field(default=None, kw_only=True)
    frames: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if (self.transform is None) == (self.features is None):
            raise ValueError("a dataset takes either a transform, or features that have been through one")

    def __len__(self) -> int:
        return len(self.rows)

    def tiles(self, row: Row, number: int, rng: np.random.Generator) -> TileEmbeds:
        """Picture `number` of a row: pixels [1 + columns · rows, 3, S, S] or embeds, and the grid.

        Raises:
            BadRow: the picture cannot be read; with the reason of `BadImage` and the place of the row. Or it is a
                video, and `frames` is None.
        """
        reference = row.images[number]
        if isinstance(reference, Video) and self.frames is None:
            raise BadRow("video", row.where, "it shows a video, and this model has no temporal encoder")
        if self.features is not None:
            return self.features.lookup(picture_key(row, number))
        assert self.transform is not None
        if isinstance(reference, Video):
            assert self.frames is not None
            try:
                return video_tiles(reference, self.frames, self.transform)
            except BadImage as error:
                raise BadRow(error.reason, row.where, error.detail) from error
        found = open_tiles(row, number, self.transform)
        return TileEmbeds(found.pixel_values, found.grid)

    def lengths(self, pictures: Sequence[TileEmbeds]) -> list[int]:
        """Vision tokens of each picture."""
        return [self.vision_length(*picture.grid[:2], picture.frames) for picture in pictures]

    def sample(self, row: Row, pictures: Sequence[TileEmbeds], kept: int) -> Sample:
        """What all samples have: pixels or embeds, "grids" and "frames" of the first `kept` pictures, and "id"."""
        name = "pixel_values" if self.features is None else "tile_embeds"
        return {
            name: [picture.embeds for picture in pictures[:kept]],
            "grids": [picture.grid for picture in pictures[:kept]],
            "frames": [picture.frames for picture in pictures[:kept]],
            "id": row.id,
        }


@dataclass(frozen=True)
class ChatDataset(TiledPictures):
    """Conversations with up to `max_images` images, answers to be learnt (§4.5, SFT); captions and questions too.

    A conversation that is too long loses its last exchanges (`ChatTokenizer.training`), and their images.
    """

    chat: ChatTokenizer = field(kw_only=True)
    max_images: int = field(default=MAX_IMAGES, kw_only=True)

    def get(self, index: int, rng: np.random.Generator) -> Sample:
        """{"tokens", "question": the last in them, "pixel_values" or "tile_embeds", "grids", "frames", "id"}.

        Raises:
            BadRow: the row, its conversation or one of its pictures cannot be used.
        """
        row = self.rows[index]
        found = read_conversation(row, rng, max_images=self.max_images)
        pictures = [self.tiles(row, number, rng) for number in range(len(found.images))]
        try:
            tokens = self.chat.training(found.messages, self.lengths(pictures), self.max_length)
        except BadChat as error:
            raise BadRow(error.reason, row.where, error.detail) from error
        return {
            **self.sample(row, pictures, len(tokens.runs)),
            "tokens": tokens,
            "question": found.question(tokens.answers),
        }


@dataclass(frozen=True)
class PreferenceDataset(TiledPictures):
    """A prompt with a better and a worse answer (§4.5, DPO). Answers that are too long are cut on the right."""

    chat: ChatTokenizer = field(kw_only=True)
    max_images: int = field(default=MAX_IMAGES, kw_only=True)

    def get(self, index: int, rng: np.random.Generator) -> Sample:
        """{"chosen", "rejected": Tokens, "question", "pixel_values" or "tile_embeds": a list, "grids", "frames", "id"}.

        Raises:
            BadRow: the row or one of its pictures cannot be used.
        """
        row = self.rows[index]
        found = read_preference(row, max_images=self.max_images)
        messages = found.conversation.messages
        pictures = [self.tiles(row, number, rng) for number in range(len(row.images))]
        lengths = self.lengths(pictures)
        try:
            chosen = self.chat.preference(messages, found.chosen, lengths, self.max_length)
            rejected = self.chat.preference(messages, found.rejected, lengths, self.max_length)
        except BadChat as error:
            raise BadRow(error.reason, row.where, error.detail) from error
        question = found.conversation.question()
        return {
            **self.sample(row, pictures, len(pictures)),
            "chosen": chosen,
            "rejected": rejected,
            "question": question,
        }


@dataclass(frozen=True)
class InterleavedDataset(TiledPictures):
    """Documents of text and images, and pictures with captions (§4.5, pre-training).

    A picture that cannot be read leaves its place; its bad row is in the sample's "problems". A document without a
    readable one is bad itself, unless it never had one. `max_images` cuts a document before the next;
    `count_end_of_chunk`: see `interleaved`.
    """

    tokenizer: LmTokenizer = field(kw_only=True)
    added: AddedTokens = field(kw_only=True)
    max_images: int | None = field(default=None, kw_only=True)
    count_end_of_chunk: bool = field(default=True, kw_only=True)

    def get(self, index: int, rng: np.random.Generator) -> Sample:
        """{"tokens", "pixel_values" or "tile_embeds": a list, "grids", "frames", "id", "problems": list of BadRow}.

        Raises:
            BadRow: the row cannot be used, none of its pictures can be read, or nothing is left after cutting.
        """
        row = self.rows[index]
        document = read_document(row, rng)
        pictures: dict[int, TileEmbeds] = {}
        problems: dict[int, BadRow] = {}
        for number in range(len(document.images)):
            if len(pictures) == self.max_images:
                document = document.before_image(number)
                break
            try:
                pictures[number] = self.tiles(row, number, rng)
            except BadRow as error:
                where = f"{row.where} image {number}"
                problems[number] = BadRow(error.reason, where, error.detail)
        if problems and not pictures:
            first = next(iter(problems.values()))
            raise BadRow(first.reason, row.where, f"none of its images can be read; {first}")
        document = document.without_images(problems)
        tiles = list(pictures.values())
        tokens = document_tokens(
            document, self.lengths(tiles), self.tokenizer, self.added, self.max_length,
            count_end_of_chunk=self.count_end_of_chunk,
        )  # fmt: skip
        if not tokens.is_counted:
            raise BadRow("too_long", row.where, f"no text within the first {self.max_length} tokens")
        return {
            **self.sample(row, tiles, len(tokens.runs)),
            "tokens": tokens,
            "problems": list(problems.values()),
        }


@dataclass(frozen=True)
class ChatCollator:
    """Samples of a `ChatDataset`, or of an `InterleavedDataset` unpacked -> a batch as at the head of this file.

    max_condition: for an instruction-conditioned resampler, also condition_ids, condition_mask [I, Lq] of at most so
        many tokens: what the user said last in the row of each image, in the language model's ids; 0 for none.
    """

    tokenizer: LmTokenizer
    max_condition: int = 0

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """One batch."""
        rows = [sample["tokens"] for sample in samples]
        batch = {**_images(samples), **_stacked(rows, self.tokenizer.pad_id), "ids": _ids(samples)}
        return {**batch, **_conditions(samples, self.tokenizer, self.max_condition)}


@dataclass(frozen=True)
class PreferenceCollator:
    """Samples of a `PreferenceDataset` -> a batch of 2B rows: all chosen answers, then all rejected ones.

    Images and grids are those of the B prompts, once; `image_index` [2 I] says for each image in the order of its
    appearance in the rows which of them it is.
    """

    tokenizer: LmTokenizer
    max_condition: int = 0

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """One batch."""
        rows = [sample[name] for name in ("chosen", "rejected") for sample in samples]
        images = _images(samples)
        return {
            **images,
            **_stacked(rows, self.tokenizer.pad_id),
            **_conditions(samples, self.tokenizer, self.max_condition),
            "image_index": torch.arange(len(images["grids"])).repeat(2),
            "ids": _ids(samples) * 2,
        }


@dataclass(frozen=True)
class PackedCollator:
    """Samples of an `InterleavedDataset` -> a batch with several documents in a row (`interleaved.pack`).

    There are fewer rows than samples. `position_ids` [B, L] restart at 0 with each document; padding is all 0, so that
    each of its places is a text of its own. The first token of a document has no label: nothing before it is to
    predict it.
    `ids` has the names of a row's documents, joined by " + ".

    Raises ValueError: a document longer than `max_length`, to which the dataset should have cut it.
    """

    tokenizer: LmTokenizer
    max_length: int

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """One batch."""
        documents = [cast(Tokens, sample["tokens"]) for sample in samples]
        longest = max(map(len, documents))
        if longest > self.max_length:
            raise ValueError(f"a document of {longest} tokens does not fit into rows of {self.max_length}")
        rows, positions, ids, order = [], [], [], []
        for members in pack([len(document) for document in documents], self.max_length):
            pieces = [documents[member] for member in members]
            rows.append(Tokens.join(_unpredicted(piece) for piece in pieces))
            positions.append([place for piece in pieces for place in range(len(piece))])
            ids.append(" + ".join(samples[member]["id"] for member in members))
            order += [samples[member] for member in members]
        batch = {**_images(order), **_stacked(rows, self.tokenizer.pad_id), "ids": ids}
        width = batch["input_ids"].shape[1]
        padded = [[*places, *[0] * (width - len(places))] for places in positions]
        return {**batch, "position_ids": torch.tensor(padded)}


def _unpredicted(document: Tokens) -> Tokens:
    return Tokens(document.ids, [IGNORED, *document.labels[1:]], document.runs)


def _images(samples: Sequence[Sample]) -> Batch:
    """The tiles of all images in one tensor, grids [I, 4] and frames [I]."""
    grids = [grid for sample in samples for grid in sample["grids"]]
    frames = [count for sample in samples for count in sample["frames"]]
    batch: Batch = {
        "grids": torch.tensor(grids, dtype=torch.int64).reshape(-1, 4),
        "frames": torch.tensor(frames, dtype=torch.int64),
    }
    for name in ("pixel_values", "tile_embeds"):
        stacks = [stack.numpy() for sample in samples for stack in sample.get(name, [])]
        if stacks:  # by numpy: torch would start a team of compute threads in each of the loader's threads
            batch[name] = torch.from_numpy(np.concatenate(stacks))
    return batch


def _stacked(rows: Sequence[Tokens], pad_id: int) -> Batch:
    """input_ids, attention_mask, labels [B, L], padded on the right."""
    width = max(map(len, rows))
    ids = [[*row.ids, *[pad_id] * (width - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    labels = [[*row.labels, *[IGNORED] * (width - len(row))] for row in rows]
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(labels),
    }


def _conditions(samples: Sequence[Sample], tokenizer: LmTokenizer, max_length: int) -> Batch:
    """`conditions` of all images, if there is any use for it."""
    if not max_length:  # documents ask nothing
        return {}
    asked = [sample["question"] for sample in samples for _ in sample["grids"]]
    return conditions(asked, tokenizer, max_length)


def conditions(questions: Sequence[str], tokenizer: LmTokenizer, max_length: int = MAX_CONDITION) -> Batch:
    """A question for each image -> condition_ids, condition_mask [I, Lq]; a long question keeps its end."""
    known = {text: tokenizer.encode(text)[-max_length:] for text in questions}
    rows = [Tokens.text(known[text], counted=False) for text in questions]
    if not rows:
        empty = torch.zeros(0, 0, dtype=torch.int64)
        return {"condition_ids": empty, "condition_mask": empty}
    stacked = _stacked(rows, tokenizer.pad_id)
    return {"condition_ids": stacked["input_ids"], "condition_mask": stacked["attention_mask"]}


def _ids(samples: Sequence[Sample]) -> list[str]:
    return [sample["id"] for sample in samples]
