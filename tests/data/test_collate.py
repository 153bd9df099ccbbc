"""collate.py: what a sample holds, what a batch holds, and which rows are refused."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from openblip.data.collate import (
    CaptionCollator,
    NlvrCollator,
    NlvrDataset,
    PairCollator,
    PairDataset,
    VqaCollator,
    VqaDataset,
    image_id,
    open_picture,
    picture_key,
    text_lengths,
)
from openblip.data.rows import BadRow, Row
from openblip.data.text import bert_uncased, clean_caption
from openblip.data.transforms import ImageTransform, TrainTransform
from openblip.data.video import Video

TRANSFORM = ImageTransform(16)


@pytest.fixture(scope="module")
def tokenizer():
    return bert_uncased()


def png(level: int, size: tuple[int, int] = (20, 20)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (level, level, level)).save(file, "PNG")
    return file.getvalue()


def grey(pixels: torch.Tensor) -> int:
    """The level of a picture of one colour, back from the first channel of its tensor."""
    return round(((pixels.flatten()[0] * TRANSFORM.std[0] + TRANSFORM.mean[0]) * 255).item())


def pair(number: int, *captions: str, row_id: str | None = None) -> Row:
    return Row(
        id=row_id or f"{number}.png", images=[png(number)], captions=list(captions), where=f"row {number}"
    )


class FakeFeatures:
    """Embeds that tell which key was asked for."""

    def lookup(self, key: str) -> torch.Tensor:
        return torch.full((3, 2), float(sum(key.encode())))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_a_pair_batch(tokenizer):
    data = PairDataset([pair(10, "A dog."), pair(20, "Two small cats!")], TRANSFORM)
    batch = PairCollator(tokenizer, 30)([data.get(0, rng()), data.get(1, rng())])
    assert batch["pixel_values"].shape == (2, 3, 16, 16) and batch["pixel_values"].dtype == torch.float32
    assert [grey(pixels) for pixels in batch["pixel_values"]] == [10, 20]
    assert [tokenizer.decode(ids) for ids in batch["input_ids"]] == ["a dog", "two small cats"]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert batch["image_ids"].dtype == torch.int64 and len(set(batch["image_ids"].tolist())) == 2
    assert batch["ids"] == ["10.png", "20.png"]


def test_image_ids_are_the_pictures_and_do_not_change():
    same = [pair(1, "a", row_id="x"), pair(2, "b", row_id="x"), pair(3, "c", row_id="y")]
    ids = [image_id(row) for row in same]
    assert ids[0] == ids[1] != ids[2]
    assert ids[:1] == [2697552496229297191]  # in every run: feature queues outlive one
    assert all(0 <= image_id(pair(n, "a")) < 2**63 for n in range(200))


def test_each_visit_draws_one_caption():
    data = PairDataset([pair(1, "One.", "TWO", "...", "three")], TRANSFORM)
    texts = {data.get(0, rng(seed))["text"] for seed in range(60)}
    assert texts == {"one", "two", "three"}  # cleaned; what cleaning empties is never drawn
    assert data.get(0, rng(7))["text"] == data.get(0, rng(7))["text"]
    raw = PairDataset([pair(1, "One.")], TRANSFORM, clean=str)
    assert raw.get(0, rng())["text"] == "One."


def test_training_pictures_are_a_function_of_the_generator():
    data = PairDataset([pair(1, "a")], TrainTransform(16))
    noise = np.random.default_rng(1).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    data.rows[0].images[0] = file.getvalue()
    assert torch.equal(data.get(0, rng(5))["pixel_values"], data.get(0, rng(5))["pixel_values"])
    assert not torch.equal(data.get(0, rng(5))["pixel_values"], data.get(0, rng(6))["pixel_values"])


def test_large_jpegs_are_decoded_small(tmp_path, monkeypatch):
    asked = []
    from openblip.data import collate

    real = collate.open_image
    monkeypatch.setattr(
        collate, "open_image", lambda source, draft_size: asked.append(draft_size) or real(source)
    )
    open_picture(pair(1, "a"), ImageTransform(16))
    open_picture(pair(1, "a"), TrainTransform(16, scale=(0.25, 1)), rng())
    assert asked == [16, 16]


def test_features_take_the_place_of_pictures(tokenizer):
    row = pair(1, "a dog")
    row.images = ["nothing/is/opened.png"]
    data = PairDataset([row, row], features=FakeFeatures())
    batch = PairCollator(tokenizer)([data.get(0, rng()), data.get(1, rng())])
    assert "pixel_values" not in batch
    assert torch.equal(batch["image_embeds"], torch.stack([FakeFeatures().lookup("1.png")] * 2))
    with pytest.raises(ValueError, match="either a transform, or features"):
        PairDataset([row], TRANSFORM, features=FakeFeatures())
    with pytest.raises(ValueError, match="either a transform, or features"):
        PairDataset([row])


def test_each_visit_draws_the_picture_or_one_of_its_views():
    class View(FakeFeatures):
        def __init__(self, mark):
            self.mark = mark

        def lookup(self, key):
            return torch.full((3, 2), self.mark)

    data = PairDataset([pair(1, "a dog")], features=View(0.0), views=[View(1.0), View(2.0)])
    draws = rng()
    seen = [data.get(0, draws)["image_embeds"][0, 0].item() for _ in range(300)]
    assert all(70 < seen.count(mark) < 130 for mark in (0.0, 1.0, 2.0))
    again = rng()
    assert seen == [data.get(0, again)["image_embeds"][0, 0].item() for _ in range(300)]


def test_labels_of_the_captioner_leave_out_prompt_and_padding(tokenizer):
    data = PairDataset([pair(1, "a dog"), pair(2, "two very small cats")], TRANSFORM)
    batch = CaptionCollator(tokenizer)([data.get(0, rng()), data.get(1, rng())])
    ids, labels = batch["input_ids"], batch["labels"]
    assert tokenizer.decode(ids[0]) == "a picture of a dog"
    assert labels[0].tolist() == [-100] * 4 + [*tokenizer.prompt_ids("a dog")[1:], 102, -100, -100]
    assert labels[1].tolist() == [-100] * 4 + ids[1, 4:].tolist()
    assert labels.shape == ids.shape == (2, 9)
    long = CaptionCollator(tokenizer, max_length=6)([data.get(1, rng())])
    assert long["labels"].tolist() == [[-100] * 4 + [ids[1, 4].item(), 102]]
    bare = CaptionCollator(tokenizer, prompt="")([data.get(0, rng())])
    assert bare["labels"].tolist() == [[-100, *tokenizer.prompt_ids("a dog")[1:], 102]]


def question(number: int, text: str | None, *answers: str) -> Row:
    return Row(id=f"{number}.png", images=[png(number)], captions=[], question=text, answers=list(answers))


def test_a_vqa_batch(tokenizer):
    rows = [
        question(1, "What is it?", *["dog"] * 6, *["a cat"] * 3, "pig"),
        question(2, "Is it RED (or not)?", "no"),
    ]
    data = VqaDataset(rows, TRANSFORM)
    batch = VqaCollator(tokenizer)([data.get(0, rng()), data.get(1, rng())])
    assert [tokenizer.decode(ids) for ids in batch["input_ids"]] == ["what is it?", "is it red or not?"]
    assert [tokenizer.decode(ids) for ids in batch["answer_ids"]] == ["dog", "a cat", "pig", "no"]
    assert batch["answer_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0]]
    torch.testing.assert_close(batch["answer_weights"], torch.tensor([0.6, 0.3, 0.1, 1.0]))
    assert batch["answer_question"].tolist() == [0, 0, 0, 1]
    assert batch["pixel_values"].shape == (2, 3, 16, 16) and batch["ids"] == ["1.png", "2.png"]
    genome = VqaDataset(rows, TRANSFORM, single_answer_weight=0.2)
    assert genome.get(1, rng())["weights"] == [0.2]
    assert genome.get(0, rng())["weights"] == pytest.approx([0.6, 0.3, 0.1])


def statement(number: int, label: object, text: str = "the left one is a dog") -> Row:
    images = [png(number), png(number + 1)]
    return Row(id=f"{number}|{number + 1}", images=images, captions=[text], label=label)


def test_an_nlvr_batch_has_all_left_pictures_first(tokenizer):
    data = NlvrDataset([statement(10, "True"), statement(20, False)], TRANSFORM, swap=False)
    batch = NlvrCollator(tokenizer)([data.get(0, rng()), data.get(1, rng())])
    assert [grey(pixels) for pixels in batch["pixel_values"]] == [10, 20, 11, 21]
    assert batch["labels"].tolist() == [1, 0] and batch["labels"].dtype == torch.int64
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 8)
    assert batch["ids"] == ["10|11", "20|21"]


def test_nlvr_pictures_and_words_are_swapped_together():
    data = NlvrDataset([statement(10, 1)], TRANSFORM)
    seen = set()
    for seed in range(40):
        sample = data.get(0, rng(seed))
        seen.add((tuple(grey(one) for one in sample["pixel_values"]), sample["text"], sample["label"]))
    assert seen == {((10, 11), "the left one is a dog", 1), ((11, 10), "the right one is a dog", 1)}


def test_nlvr_features_have_a_key_for_each_side(tokenizer):
    row = statement(10, 1)
    data = NlvrDataset([row], features=FakeFeatures(), swap=False)
    batch = NlvrCollator(tokenizer)([data.get(0, rng())])
    assert [picture_key(row, side) for side in (0, 1)] == ["10|11#0", "10|11#1"]
    left, right = (FakeFeatures().lookup(picture_key(row, side)) for side in (0, 1))
    assert torch.equal(batch["image_embeds"], torch.stack([left, right])) and not torch.equal(left, right)


@pytest.mark.parametrize(
    ("label", "truth"), [(True, 1), ("true", 1), ("False", 0), (0, 0), ("1", 1), (None, None), (2, None)]
)
def test_labels_are_true_or_false(label, truth):
    data = NlvrDataset([statement(10, label)], TRANSFORM)
    if truth is None:
        with pytest.raises(BadRow, match="wanted true or false"):
            data.get(0, rng())
    else:
        assert data.get(0, rng())["label"] == truth


@pytest.mark.parametrize(
    ("dataset", "row", "reason"),
    [
        (PairDataset, pair(1), "missing_caption"),
        (PairDataset, pair(1, "...", "!"), "missing_caption"),
        (VqaDataset, question(1, None, "a"), "missing_question"),
        (VqaDataset, question(1, "what?"), "missing_answer"),
        (NlvrDataset, pair(1, "one picture only"), "missing_image"),
        (NlvrDataset, Row("1", [png(1), png(2)], [], label=1), "missing_caption"),
        (PairDataset, Row("1", ["absent.png"], ["a"], where="line 7"), "missing"),
        (PairDataset, Row("1", [b"not a picture"], ["a"], where="line 7"), "not_an_image"),
        (PairDataset, Row("1", [Video("a.mp4")], ["a"], where="line 7"), "not_an_image"),
        (PairDataset, Row("1", [Video(["1.png", "2.png"])], ["a"], where="line 7"), "not_an_image"),
    ],
)
def test_rows_that_cannot_be_used_say_why(dataset, row, reason):
    with pytest.raises(BadRow) as caught:
        dataset([row], TRANSFORM).get(0, rng())
    assert caught.value.reason == reason
    assert caught.value.where == row.where


def test_text_lengths_are_known_for_every_row():
    class Rows(list):
        def __getitem__(self, index):
            if index == 1:
                raise BadRow("not_json", "line 2", "no")
            return super().__getitem__(index)

    rows = Rows([pair(1, "12345", "123"), pair(2, "x"), question(3, "1234567", "a")])
    assert text_lengths(rows) == [4, 0, 7]


def test_cleaning_is_the_papers():
    data = PairDataset([pair(1, "A  (very) BIG dog.")], TRANSFORM)
    assert data.get(0, rng())["text"] == clean_caption("A  (very) BIG dog.") == "a very big dog"
