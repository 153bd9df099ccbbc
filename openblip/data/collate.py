"""Rows to samples, samples to batches: one dataset and one collator for each kind of training.

A dataset opens and transforms pictures (or takes their cached features) and chooses texts; a collator
tokenises, pads and stacks. What is drawn comes from the Generator a sample is asked for with, so a sample
is a pure function of dataset, index and generator. Shapes: B samples, N image tokens, D their width, S
image size, L text tokens, R answers.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from openblip.data.image import BadImage, open_image
from openblip.data.row_range import Rows
from openblip.data.rows import BadRow, Row
from openblip.data.text import Tokenizer, clean_caption, clean_question
from openblip.data.transforms import ImageTransform, TrainTransform, swap_pair

Sample = dict[str, Any]
Batch = dict[str, Any]

PROMPT = "a picture of "  # of BLIP's captioner, in training and in use


class Features(Protocol):
    """Image embeds by picture: a `FeatureCache`."""

    def lookup(self, key: str) -> Tensor:
        """[N, D] of the picture with this key (`picture_key`)."""
        ...


def image_id(row: Row) -> int:
    """A number for the picture, the same in every run; rows that show one picture share it (`Row.id`).

    Not negative, so that it never equals the −100 of an empty place in a feature queue.
    """
    return int.from_bytes(hashlib.blake2b(row.id.encode(), digest_size=8).digest()) >> 1


def picture_key(row: Row, number: int = 0) -> str:
    """The name of picture `number` of a row in a feature cache."""
    return row.id if len(row.images) == 1 else f"{row.id}#{number}"


def open_picture(
    row: Row,
    transform: ImageTransform | TrainTransform,
    rng: np.random.Generator | None = None,
    number: int = 0,
) -> Tensor:
    """Picture `number` of a row, transformed: float32 [3, S, S].

    Raises:
        BadRow: the picture cannot be read; with the reason of `BadImage` and the place of the row.
    """
    try:
        image = open_image(row.images[number], draft_size=transform.draft_size)
    except BadImage as error:
        raise BadRow(error.reason, row.where, error.detail) from error
    return transform(image, rng)  # type: ignore[arg-type]  # only an ImageTransform is called without rng


def check_picture(row: Row) -> None:
    """Raise BadRow if there is no picture, or one cannot be opened. A JPEG is decoded as small as it goes."""
    for image in row.images or [row.image]:
        try:
            open_image(image, draft_size=1)
        except BadImage as error:
            raise BadRow(error.reason, row.where, error.detail) from error


@dataclass(frozen=True)
class Pictures:
    """Rows with their pictures: what the datasets share.

    Pictures are opened and put through `transform`, or never opened when `features` has what a frozen encoder
    made of them. `views`: features of other views of the same pictures; each visit draws one, or `features`.
    """

    rows: Rows = field(repr=False)
    transform: ImageTransform | TrainTransform | None = None
    features: Features | None = field(default=None, kw_only=True)
    views: Sequence[Features] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        if (self.transform is None) == (self.features is None):
            raise ValueError("a dataset takes either a transform, or features that have been through one")

    def __len__(self) -> int:
        return len(self.rows)

    def picture(self, row: Row, rng: np.random.Generator, number: int = 0) -> Sample:
        """{"pixel_values": [3, S, S]} or {"image_embeds": [N, D]}."""
        if self.features is not None:
            drawn = int(rng.integers(len(self.views) + 1)) if self.views else 0
            seen = self.views[drawn - 1] if drawn else self.features
            return {"image_embeds": seen.lookup(picture_key(row, number))}
        assert self.transform is not None
        return {"pixel_values": open_picture(row, self.transform, rng, number)}


@dataclass(frozen=True)
class PairDataset(Pictures):
    """A picture and one of its captions, drawn anew at each visit: CLIP, pre-training, retrieval, captioning.

    `clean` is applied to captions; `str` leaves them as they are, for CLIP. several: so many captions at each visit,
    all different if there are as many, for those that learn them together (`LmCollator`).
    """

    clean: Callable[[str], str] = field(default=clean_caption, kw_only=True)
    several: int = field(default=1, kw_only=True)

    def get(self, index: int, rng: np.random.Generator) -> Sample:
        """{"pixel_values" or "image_embeds", "text", "image_id", "id"}, and where several are wanted "texts".

        Raises:
            BadRow: the row or its picture cannot be used, or no caption has anything left after cleaning.
        """
        row = self.rows[index]
        captions = [text for caption in row.captions if (text := self.clean(caption))]
        if not captions:
            raise BadRow("missing_caption", row.where, f"no words in its captions: {row.captions!r}")
        if self.several == 1:
            text = captions[rng.integers(len(captions))]
            return {**self.picture(row, rng), "text": text, "image_id": image_id(row), "id": row.id}
        order = rng.permutation(len(captions)).tolist()
        texts = [captions[order[number % len(order)]] for number in range(self.several)]
        found = {"text": texts[0], "texts": texts, "image_id": image_id(row), "id": row.id}
        return {**self.picture(row, rng), **found}


@dataclass(frozen=True)
class VqaDataset(Pictures):
    """A picture, a question, and its distinct answers with their weights (BLIP §5.3).

    The weight of an answer is the share of the people asked who gave it, count/10 in VQAv2. Where only one
    was asked it is `single_answer_weight`: 1, or 0.2 when Visual Genome is mixed in, as in the released code.
    """

    single_answer_weight: float = field(default=1.0, kw_only=True)

    def get(self, index: int, rng: np.random.Generator) -> Sample:
        """{"pixel_values" or "image_embeds", "text": the question, "answers", "weights", "id"}.

        Raises:
            BadRow: the row or its picture cannot be used, or it lacks question or answers.
        """
        row = self.rows[index]
        if not row.question:
            raise BadRow("missing_question", row.where, "no question in the row")
        if not row.answers:
            raise BadRow("missing_answer", row.where, "no answer in the row")
        counts = Counter(row.answers)
        weights = [count / len(row.answers) for count in counts.values()]
        if len(row.answers) == 1:
            weights = [self.single_answer_weight]
        texts = {"text": clean_question(row.question), "answers": list(counts), "weights": weights}
        return {**self.picture(row, rng), **texts, "id": row.id}


@dataclass(frozen=True)
class NlvrDataset(Pictures):
    """Two pictures, a sentence, and whether it is true of them (NLVR2; BLIP §5.4).

    In training (`swap`) the pictures are exchanged half of the time, with the words left and right.
    """

    swap: bool = field(default=True, kw_only=True)

    def get(self, index: int, rng: np.random.Generator) -> Sample:
        """{"pixel_values" [2, 3, S, S] or "image_embeds" [2, N, D], "text", "label": 0 or 1, "id"}.

        Raises:
            BadRow: the row or a picture cannot be used, there are not two pictures, or no true/false label.
        """
        row = self.rows[index]
        if len(row.images) != 2:
            raise BadRow("missing_image", row.where, f"two images are wanted, got {len(row.images)}")
        if not row.captions:
            raise BadRow("missing_caption", row.where, "no sentence in the row")
        label = _truth(row)
        left, right, text = 0, 1, clean_caption(row.captions[0], max_words=40)
        if self.swap:
            left, right, text = swap_pair(left, right, text, rng)
        first, second = self.picture(row, rng, left), self.picture(row, rng, right)
        name, pair = _stacked([first, second])
        return {name: pair, "text": text, "label": label, "id": row.id}


@dataclass(frozen=True)
class PairCollator:
    """Samples of a `PairDataset` -> input_ids, attention_mask [B, L], image_ids [B], and the pictures.

    `max_length`: 30 in BLIP pre-training, 35 in retrieval, 77 for CLIP.
    """

    tokenizer: Tokenizer
    max_length: int = 30

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """One batch."""
        texts = self.tokenizer([sample["text"] for sample in samples], self.max_length)
        image_ids = torch.tensor([sample["image_id"] for sample in samples])
        return {**picture_tensors(samples), **texts, "image_ids": image_ids}


@dataclass(frozen=True)
class CaptionCollator:
    """Samples of a `PairDataset`, each caption after the prompt -> a pair batch, and labels [B, L].

    Labels are the ids in their own places (whoever predicts shifts them), −100 on padding and on the prompt,
    start token included: 4 places in BLIP's captioning fine-tune.
    """

    tokenizer: Tokenizer
    prompt: str = PROMPT
    max_length: int = 40

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """One batch."""
        prompted = [{**sample, "text": self.prompt + sample["text"]} for sample in samples]
        batch = PairCollator(self.tokenizer, self.max_length)(prompted)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, : len(self.tokenizer.prompt_ids(self.prompt))] = -100
        return {**batch, "labels": labels}


@dataclass(frozen=True)
class VqaCollator:
    """Samples of a `VqaDataset` -> the pictures, input_ids, attention_mask [B, L] of the questions, and
    answer_ids, answer_mask [R, L'], answer_weights [R], answer_question [R] of all answers.

    Answers stand in the order of their questions; `answer_question` is the row of the question.
    """

    tokenizer: Tokenizer
    max_length: int = 35

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """One batch."""
        questions = self.tokenizer([sample["text"] for sample in samples], self.max_length)
        answers = self.tokenizer([text for sample in samples for text in sample["answers"]], self.max_length)
        counts = torch.tensor([len(sample["answers"]) for sample in samples])
        return {
            **picture_tensors(samples),
            **questions,
            "answer_ids": answers["input_ids"],
            "answer_mask": answers["attention_mask"],
            "answer_weights": torch.tensor([weight for sample in samples for weight in sample["weights"]]),
            "answer_question": torch.arange(len(samples)).repeat_interleave(counts),
        }


@dataclass(frozen=True)
class NlvrCollator:
    """Samples of an `NlvrDataset` -> input_ids, attention_mask [B, L], labels [B], and pictures [2B, ...].

    Stacked as the model wants them: the first pictures of all samples, then the second ones.
    """

    tokenizer: Tokenizer
    max_length: int = 40

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """One batch."""
        texts = self.tokenizer([sample["text"] for sample in samples], self.max_length)
        labels = torch.tensor([sample["label"] for sample in samples])
        name, pairs = _stacked(samples)  # [B, 2, ...]
        pictures = {name: pairs.transpose(0, 1).flatten(0, 1)}
        return {**pictures, **texts, "labels": labels, "ids": [sample["id"] for sample in samples]}


def picture_tensors(samples: Sequence[Sample]) -> Batch:
    """{"pixel_values": [B, 3, S, S] or "image_embeds": [B, N, D], "ids": B row ids, to name samples by}."""
    name, stacked = _stacked(samples)
    return {name: stacked, "ids": [sample["id"] for sample in samples]}


def _stacked(samples: Sequence[Sample]) -> tuple[str, Tensor]:
    """The name of what stands for the pictures, and all of them in one tensor."""
    name = "image_embeds" if "image_embeds" in samples[0] else "pixel_values"
    # By numpy: torch.stack would start a team of compute threads in each of the loader's threads.
    return name, torch.from_numpy(np.stack([sample[name].numpy() for sample in samples]))


def _truth(row: Row) -> int:
    """1 or 0 from True, "true", 1, "1" and their opposites."""
    known = {"true": 1, "1": 1, "false": 0, "0": 0}
    try:
        return known[str(row.label).lower()]
    except KeyError:
        raise BadRow("bad_label", row.where, f"the label is {row.label!r}, wanted true or false") from None


def rows_fingerprint(rows: Rows) -> str:
    """A hash of what rows say: their own `fingerprint`, as a `Source` has one, or else of their ids and texts.

    Pictures are not read.
    """
    if (own := getattr(rows, "fingerprint", None)) is not None:
        return own
    digest = hashlib.sha256()
    for index in range(len(rows)):
        try:
            row = rows[index]
            state: Any = [row.id, row.captions, row.question, row.answers, row.label, row.extra]
        except BadRow as error:
            state = error.reason
        digest.update(json.dumps(state, default=str).encode() + b"\n")
    return digest.hexdigest()


def text_lengths(rows: Rows) -> list[int]:
    """For `Loader(lengths=...)`: the mean number of characters of each row's captions, or of its question.

    Reads every row once; a bad one has length 0.
    """
    lengths = []
    for index in range(len(rows)):
        try:
            row = rows[index]
        except BadRow:
            lengths.append(0)
            continue
        texts = row.captions or [row.question or ""]
        lengths.append(sum(map(len, texts)) // len(texts))
    return lengths
