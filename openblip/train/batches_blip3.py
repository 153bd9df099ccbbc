"""Rows to batches for a stage of BLIP-3: documents, conversations, preferences."""

from typing import Any

from openblip.config import UserError
from openblip.data.chat import BadChat, chat_tokenizer
from openblip.data.collate import Rows
from openblip.data.collate_chat import (
    MAX_CONDITION,
    ChatCollator,
    ChatDataset,
    InterleavedDataset,
    PackedCollator,
    PreferenceCollator,
    PreferenceDataset,
    TiledPictures,
    TileFeatures,
)
from openblip.data.conversation import read_conversation, read_preference
from openblip.data.interleaved import document_tokens, read_document
from openblip.data.loader import Loader
from openblip.data.prompts import LmTokenizer
from openblip.data.rows import BadRow, BadRows, Row
from openblip.data.tiles import TileTransform
from openblip.data.tokens import AddedTokens
from openblip.data.transforms import ImageTransform
from openblip.models.blip3 import Blip3
from openblip.recipes import Recipe
from openblip.train import distributed


def blip3_loader(
    recipe: Recipe, model: Blip3, words: LmTokenizer, transform: ImageTransform, rows: Rows, bad: BadRows,
    features: TileFeatures | None = None,
) -> Loader:  # fmt: skip
    """Dataset, collator and order of a stage of BLIP-3; with `features`, no picture is opened.

    Raises UserError: documents for a resampler that reads questions, a token budget for DPO, or what `ChatTokenizer`
    raises.
    """
    config = model.config
    how: dict[str, Any] = {
        "vision_length": config.vision_length,
        "max_length": recipe.max_length,
        "frames": None if config.temporal is None else recipe.frames,
        "features": features,
    }
    tiles = None if features is not None else TileTransform(transform, config.used_grids)
    condition = 0 if config.resampler.condition_size is None else MAX_CONDITION
    dataset: ChatDataset | InterleavedDataset | PreferenceDataset
    collate: Any
    if recipe.stage == "blip3_pretrain":
        if condition:
            raise UserError(
                "blip3_pretrain: documents ask no question, which this resampler reads; train it by SFT"
            )
        added = AddedTokens(model.image_token_id)
        dataset = InterleavedDataset(
            rows, tiles, tokenizer=words, added=added, max_images=recipe.max_images,
            count_end_of_chunk=recipe.count_end_of_chunk, **how,
        )  # fmt: skip
        collate = PackedCollator(words, recipe.max_length) if recipe.pack else ChatCollator(words)
    else:
        chat = chat_tokenizer(words, model.image_token_id, model.lm.config.family)
        kind = PreferenceDataset if recipe.stage == "blip3_dpo" else ChatDataset
        dataset = kind(rows, tiles, chat=chat, max_images=recipe.max_images, **how)
        collate = (PreferenceCollator if recipe.stage == "blip3_dpo" else ChatCollator)(words, condition)
    budget = recipe.train.batch_tokens
    if budget is not None and recipe.stage == "blip3_dpo":
        raise UserError(
            "batch_tokens: DPO is a mean over pairs, so each process needs as many; set batch_size"
        )
    longest = max(config.vision_length(*grid) for grid in config.used_grids or ((0, 0),))
    if config.temporal is not None:
        longest = max(longest, config.temporal.num_tokens)
    is_sorted = budget is not None or (recipe.bucket and not recipe.pack)
    return Loader(
        dataset,
        collate,
        None if budget is not None else recipe.train.batch_size,
        recipe.train.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        workers=recipe.workers,
        lengths=_lengths(dataset, longest) if is_sorted else None,
        batch_tokens=budget,
        bad=bad,
    )


def _lengths(dataset: TiledPictures, vision: int) -> list[int]:
    """About how many tokens each row has, without opening pictures: each counts as `vision` tokens, the most there are.

    A row that is bad has 1: it is met again, recorded and replaced when its batch is made. One that may be too long has
    the most there can be, for with fewer vision tokens it may fit.
    """
    found = []
    for index in range(len(dataset)):
        try:
            found.append(_length(dataset, dataset.rows[index], vision))
        except BadRow:
            found.append(1)
        except BadChat as error:
            found.append(dataset.max_length if error.reason == "too_long" and dataset.max_length else 1)
    return found


def _length(dataset: TiledPictures, row: Row, vision: int) -> int:
    most = dataset.max_length
    if isinstance(dataset, ChatDataset):
        chat = read_conversation(row, max_images=dataset.max_images)
        return len(dataset.chat.training(chat.messages, [vision] * len(chat.images), most))
    if isinstance(dataset, PreferenceDataset):
        pair = read_preference(row, max_images=dataset.max_images)
        images = [vision] * len(pair.conversation.images)
        answers = (pair.chosen, pair.rejected)
        messages = pair.conversation.messages
        return max(len(dataset.chat.preference(messages, answer, images, most)) for answer in answers)
    assert isinstance(dataset, InterleavedDataset)
    document = read_document(row)
    images = [vision] * len(document.images)
    return len(document_tokens(document, images, dataset.tokenizer, dataset.added, most))
