"""Rows become prompts to read and texts to write, for decoders, encoder-decoders and instructions."""

import numpy as np
import pytest
import torch

from openblip.data.collate import PairDataset
from openblip.data.collate_lm import InstructDataset, LmCollator, PrefixDataset
from openblip.data.prompts import LmTokenizer
from openblip.data.rows import BadRow, Row
from openblip.data.text import bert_uncased
from tests.data.test_prompts import byte_level, sentence_piece, shown


class FakeFeatures:
    """Every picture looks the same."""

    def lookup(self, key):
        return torch.ones(3, 2)


def row(**fields):
    return Row(**{"id": "a.png", "images": ["a.png"], "captions": ["a dog runs"], "where": "row 7"} | fields)


def dataset(kind, *rows, **options):
    return kind(list(rows), None, features=FakeFeatures(), **options)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_captions_follow_the_prompt_and_alone_are_labelled():
    samples = [
        dataset(PairDataset, row()).get(0, rng()),
        dataset(PairDataset, row(captions=["cat"])).get(0, rng()),
    ]
    batch = LmCollator(LmTokenizer(byte_level(), "opt"), prompt="a photo of ")(samples)
    assert batch["image_embeds"].shape == (2, 3, 2) and batch["ids"] == ["a.png", "a.png"]
    assert "".join(shown(LmTokenizer(byte_level()), batch["input_ids"][1])).startswith(
        "</s>a_photo_of_cat\\n<pad>"
    )
    labelled = batch["labels"] != -100
    assert labelled.sum(dim=1).tolist() == [len(" a dog runs\n"), len(" cat\n")]
    assert torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])
    assert "qformer_ids" not in batch


def test_several_captions_of_a_picture_are_rows_behind_one_picture():
    pairs = dataset(
        PairDataset, row(captions=["one", "two", "three", "..."]), row(captions=["cat"]), several=3
    )
    orders = [pairs.get(0, rng(seed))["texts"] for seed in range(20)]
    assert {frozenset(texts) for texts in orders} == {frozenset(["one", "two", "three"])}
    assert len({tuple(texts) for texts in orders}) == 6, "in any order"
    words = LmTokenizer(byte_level())
    batch = LmCollator(words, prompt="a ")([pairs.get(0, rng()), pairs.get(1, rng())])
    assert batch["image_embeds"].shape == (2, 3, 2)
    texts = [words.decode(line[line != -100].tolist()).strip() for line in batch["labels"]]
    assert sorted(texts[:3]) == ["one", "three", "two"] and texts[3:] == ["cat", "cat", "cat"]


def test_long_texts_are_cut():
    collate = LmCollator(LmTokenizer(byte_level()), prompt="0123456789", max_prompt=4, max_target=5)
    batch = collate([dataset(PairDataset, row()).get(0, rng())])
    tokenizer = LmTokenizer(byte_level())
    assert shown(tokenizer, batch["input_ids"][0]) == [*"6789", "_", "a", "_", "d", "o"]


def test_prefixes_for_an_encoder_decoder():
    words = ["a", "dog", "runs", "a", "cat", "is", "this"]
    captions = dataset(PrefixDataset, row(captions=[" ".join(words)]))
    found = [captions.get(0, rng(seed)) for seed in range(40)]
    cuts = set()
    for sample in found:
        assert [*sample["prompt"].split(), *sample["text"].split()] == words
        cuts.add(len(sample["prompt"].split()))
    assert cuts == set(range(len(words))), "the first part may be empty, the second never is"
    assert captions.get(0, rng(3))["text"] == found[3]["text"]
    batch = LmCollator(LmTokenizer(sentence_piece(), "t5", encoder_decoder=True))(found[:4])
    assert batch["input_ids"].shape[0] == batch["labels"].shape[0] == 4
    for sample, ids in zip(found[:4], batch["input_ids"], strict=True):
        assert int((ids > 1).sum()) == len(sample["prompt"].split())


def test_instructions_are_read_by_both():
    asked = row(extra={"instruction": "Is it so?", "input": "a cat flies", "output": "no"})
    sample = dataset(InstructDataset, asked).get(0, rng())
    assert sample["prompt"] == "Is it so?\na cat flies" and sample["text"] == "no"
    words = bert_uncased()
    batch = LmCollator(LmTokenizer(byte_level()), qformer=words)([sample])
    assert words.decode(batch["qformer_ids"][0].tolist()) == "is it so? a cat flies"
    assert batch["qformer_ids"][0, 0] == words.cls_id and batch["qformer_mask"].all()
    short = LmCollator(LmTokenizer(byte_level()), qformer=words, max_prompt=5)([sample])
    assert words.decode(short["qformer_ids"][0]) == "a cat flies", (
        "cut on the left, as for the language model"
    )


def test_stage_1_beside_stage_2_reads_captions_as_cleaned_as_alone():
    sample = dataset(PairDataset, row(captions=["Two Dogs , wet !"]), clean=str).get(0, rng())
    words = bert_uncased()
    batch = LmCollator(LmTokenizer(byte_level()), qformer=words, reads="caption")([sample])
    assert words.decode(batch["text_ids"][0].tolist()) == "two dogs, wet"
    assert sample["text"] == "Two Dogs , wet !", "and the language model writes them as people do"


def test_one_of_several_outputs_is_drawn():
    several = dataset(InstructDataset, row(extra={"instruction": "say", "output": ["yes", "no", " "]}))
    assert {several.get(0, rng(seed))["text"] for seed in range(20)} == {"yes", "no"}


@pytest.mark.parametrize(
    "extra, reason",
    [({"output": "no"}, "missing_instruction"), ({"instruction": "say", "output": " "}, "missing_output"),
     ({"instruction": "say"}, "missing_output")],
)  # fmt: skip
def test_half_a_row_is_a_bad_row(extra, reason):
    with pytest.raises(BadRow, match="in the row") as caught:
        dataset(InstructDataset, row(extra=extra)).get(0, rng())
    assert caught.value.reason == reason and caught.value.where == "row 7"
