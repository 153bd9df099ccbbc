"""Rows become batches of tiles and ids: the layout, the order of images, and that nothing is cut that must be whole."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from openblip.data.chat import ChatTokenizer
from openblip.data.collate_chat import (
    ChatCollator,
    ChatDataset,
    InterleavedDataset,
    PackedCollator,
    PreferenceCollator,
    PreferenceDataset,
    TileEmbeds,
)
from openblip.data.loader import Loader
from openblip.data.rows import BadRow, Row
from openblip.data.tiles import TileTransform
from openblip.data.tokens import AddedTokens
from openblip.data.transforms import ImageTransform
from tests.data.test_chat import bytes_tokenizer

LM = bytes_tokenizer()
CHAT = ChatTokenizer(LM, 1000, "xgenmm")
SIZES = {"square": (40, 40), "wide": (90, 30), "tall": (30, 90)}
TRANSFORM = TileTransform(
    ImageTransform(image_size=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)), ((1, 2), (3, 1), (1, 3))
)
TILES = {"square": 3, "wide": 4, "tall": 4}
RNG = np.random.default_rng(0)


def picture(name, value=0):
    """One colour, whose red value tells it apart."""
    file = io.BytesIO()
    Image.new("RGB", SIZES[name], (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def vision_length(columns, rows, frames=1):
    return 2 * (1 + columns * rows)


def chat_row(images, *texts, **fields):
    said = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return Row("r", images, [], where="row 5", extra={"messages": said}, **fields)


def dataset(kind, *rows, **options):
    words = {"tokenizer": LM, "added": AddedTokens(1000)} if kind is InterleavedDataset else {"chat": CHAT}
    if "features" not in options:
        options["transform"] = TRANSFORM
    return kind(list(rows), vision_length=vision_length, **words, **options)


def samples(kind, *rows, **options):
    made = dataset(kind, *rows, **options)
    return [made.get(index, np.random.default_rng(0)) for index in range(len(made))]


def runs(ids):
    """Lengths of the runs of image ids in a row."""
    text = "".join("i" if number == 1000 else " " for number in ids.tolist())
    return [len(run) for run in text.split()]


def reds(pixels):
    """The red value of each base tile's and tile's middle, [T], 0 to 255."""
    return (pixels[:, 0, 4, 4] * 255).round().int().tolist()


ROWS = [
    chat_row([picture("wide", 50)], "<image>\nwhat is it?", "red"),
    chat_row([], "hi", "hello you"),
    chat_row(
        [picture("square", 60), picture("tall", 70)], "a <image> b <image> c", "d", "and more words", "e"
    ),
]


def test_a_batch_of_chats():
    batch = ChatCollator(LM)(samples(ChatDataset, *ROWS))
    assert (
        batch["pixel_values"].shape == (4 + 3 + 4, 3, 8, 8) and batch["pixel_values"].dtype == torch.float32
    )
    assert batch["grids"].tolist() == [[3, 1, 90, 30], [1, 2, 40, 40], [1, 3, 30, 90]]
    assert reds(batch["pixel_values"])[0] == 50 and reds(batch["pixel_values"])[4] == 60
    assert reds(batch["pixel_values"])[7:] == [70] * 4  # a canvas of three tiles, all filled
    assert [runs(row) for row in batch["input_ids"]] == [[8], [], [6, 8]]
    assert batch["ids"] == ["r", "r", "r"]
    real = batch["attention_mask"].bool()
    for index, row in enumerate(ROWS):
        lengths = [[8], [], [6, 8]][index]
        alone = CHAT.training(row.extra["messages"], lengths)
        assert batch["input_ids"][index, real[index]].tolist() == alone.ids
        assert batch["labels"][index, real[index]].tolist() == alone.labels
        assert (
            batch["attention_mask"][index].tolist() == sorted(batch["attention_mask"][index].tolist())[::-1]
        )
    assert (batch["input_ids"][~real] == LM.pad_id).all() and (batch["labels"][~real] == -100).all()
    assert not {"condition_ids", "image_index", "position_ids"} & batch.keys()


def test_a_batch_of_text_alone():
    batch = ChatCollator(LM, max_condition=5)(samples(ChatDataset, ROWS[1], ROWS[1]))
    assert (
        "pixel_values" not in batch and batch["grids"].shape == (0, 4) and batch["grids"].dtype == torch.int64
    )
    assert batch["condition_ids"].shape[0] == 0


class Features:
    """Embeds that tell their picture's key; one picture could not be read."""

    def lookup(self, key):
        if key == "r#1":
            raise BadRow("no_features", key, "could not be read")
        return TileEmbeds(torch.full((3, 5, 2), float(len(key))), (2, 1, 20, 10))


def test_cached_features_stand_in_for_pictures():
    batch = ChatCollator(LM)(
        samples(ChatDataset, chat_row(["gone.png"], "<image>\nx", "y"), features=Features())
    )
    assert batch["tile_embeds"].shape == (3, 5, 2) and (batch["tile_embeds"] == 1).all()
    assert "pixel_values" not in batch and batch["grids"].tolist() == [[2, 1, 20, 10]]
    assert runs(batch["input_ids"][0]) == [6]
    with pytest.raises(ValueError, match="either a transform, or features"):
        dataset(ChatDataset, features=Features(), transform=TRANSFORM)


def test_conditions_are_the_last_question_once_for_each_image():
    batch = ChatCollator(LM, max_condition=10)(samples(ChatDataset, *ROWS))
    texts = [
        "".join(LM._backend.id_to_token(i) for i in ids[mask.bool()].tolist()).replace("Ġ", " ")
        for ids, mask in zip(batch["condition_ids"], batch["condition_mask"], strict=True)
    ]
    assert texts == ["hat is it?", "more words", "more words"]


def test_a_chat_that_is_too_long_loses_its_last_images_too():
    row = chat_row([picture("wide", 1), picture("wide", 2)], "<image>\nwhat?", "x", "and <image>?", "y")
    whole = samples(ChatDataset, row)[0]
    short = samples(ChatDataset, row, max_length=len(whole["tokens"]) - 1)[0]
    assert len(whole["grids"]) == 2 and len(short["grids"]) == len(short["pixel_values"]) == 1
    assert runs(torch.tensor(short["tokens"].ids)) == [8]
    assert (whole["question"], short["question"]) == ("and ?", "what?"), "nothing of what was cut"
    half = samples(ChatDataset, row, max_length=len(short["tokens"]) - 1)[0]
    assert half["question"] == "what?" and len(half["tokens"]) == len(short["tokens"]) - 1
    with pytest.raises(BadRow, match="row 5: the first question has") as caught:
        samples(ChatDataset, row, max_length=20)
    assert caught.value.reason == "too_long"


@pytest.mark.parametrize(
    "row, reason",
    [
        (chat_row([b"no picture"], "<image> x", "y"), "not_an_image"),
        (chat_row([b""], "x", "y"), "empty"),
        (chat_row([], "<|end|>", "y"), "control_token"),
        (chat_row([], "<image>", "y"), "image_count"),
        (chat_row([picture("wide")] * 5, "<image>" * 5, "y"), "too_many_images"),
    ],
)
def test_bad_rows_name_the_row(row, reason):
    with pytest.raises(BadRow, match="row 5") as caught:
        samples(ChatDataset, row)
    assert caught.value.reason == reason


@pytest.mark.parametrize("size, reason", [((1, 3000), "aspect"), ((3000, 1), "aspect")])
def test_slivers_are_bad_rows(size, reason):
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    with pytest.raises(BadRow, match=r"row 5.*one side is over") as caught:
        samples(ChatDataset, chat_row([file.getvalue()], "x", "y"))
    assert caught.value.reason == reason


def test_preferences_share_their_images():
    def row(images, asked):
        extra = {"prompt": asked, "chosen": "good", "rejected": "really bad"}
        return Row("p", images, [], where="row 5", extra=extra)

    rows = [
        row([picture("wide", 10)], "<image>\nq?"),
        row([], "no picture"),
        row([picture("square", 20), picture("tall", 30)], "<image><image>\nr?"),
    ]
    batch = PreferenceCollator(LM, max_condition=8)(samples(PreferenceDataset, *rows))
    assert batch["input_ids"].shape[0] == 6 and batch["ids"] == ["p"] * 6
    assert batch["grids"].shape == (3, 4) and len(batch["pixel_values"]) == 4 + 3 + 4
    assert batch["image_index"].tolist() == [0, 1, 2, 0, 1, 2]
    assert len(batch["condition_ids"]) == 3
    lengths = [vision_length(*grid[:2]) for grid in batch["grids"].tolist()]
    found = [run for ids in batch["input_ids"] for run in runs(ids)]
    assert found == [8, 6 + 8, 8, 6 + 8] and lengths == [8, 6, 8]
    counted = [
        ids[labels != -100].tolist() for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]
    end = CHAT.tokenizer.encode_rendered("<|end|>\n")
    assert counted == [LM.encode("good") + end] * 3 + [LM.encode("really bad") + end] * 3
    prompts = (batch["labels"] != -100).int().argmax(dim=1).tolist()
    assert prompts[:3] == prompts[3:]
    for row, length in enumerate(prompts[:3]):
        assert torch.equal(batch["input_ids"][row, :length], batch["input_ids"][row + 3, :length])


def document(*parts, name="d"):
    images = [part for part in parts if isinstance(part, bytes)]
    return Row(
        name, images, [], where="doc 2",
        extra={"document": [None if isinstance(part, bytes) else part for part in parts]},
    )  # fmt: skip


def test_documents_leave_out_what_cannot_be_read():
    row = document("before", picture("wide", 10), "ten", b"broken", "on", picture("tall", 20), "twenty")
    (sample,) = samples(InterleavedDataset, row)
    assert [len(tiles) for tiles in sample["pixel_values"]] == [4, 4]
    assert runs(torch.tensor(sample["tokens"].ids)) == [8, 8]
    (problem,) = sample["problems"]
    assert (problem.reason, problem.where) == ("not_an_image", "doc 2 image 1")
    (featured,) = samples(InterleavedDataset, document(b"", "x", b"", "y", name="r"), features=Features())
    assert len(featured["tile_embeds"]) == 1 and featured["problems"][0].reason == "no_features"
    with pytest.raises(BadRow, match="doc 2: none of its images can be read; doc 2 image 0: ") as caught:
        samples(InterleavedDataset, document("x", b"broken", "y", b"worse"))
    assert caught.value.reason == "not_an_image"
    (text,) = samples(InterleavedDataset, document("only text"))
    assert text["grids"] == [] and text["pixel_values"] == []


def test_documents_are_cut_before_an_image():
    row = document(picture("wide", 10), "ten", picture("wide", 20), "twenty")
    whole = samples(InterleavedDataset, row)[0]
    for options in ({"max_images": 1}, {"max_length": len(whole["tokens"]) - len("twenty") - 3}):
        (short,) = samples(InterleavedDataset, row, **options)
        assert runs(torch.tensor(short["tokens"].ids)) == [8] and len(short["pixel_values"]) == 1
        assert (
            short["tokens"].ids == whole["tokens"].ids[: len(short["tokens"])]
            and LM.end_id not in short["tokens"].ids
        )
    assert whole["tokens"].labels[-1] == LM.end_id
    with pytest.raises(BadRow, match="no text within the first 8 tokens") as caught:
        samples(InterleavedDataset, row, max_length=8)
    assert caught.value.reason == "too_long"


@pytest.mark.parametrize("count", [True, False])
def test_a_documents_chunks_end_counted_or_not(count):
    (sample,) = samples(InterleavedDataset, document(picture("wide"), "x"), count_end_of_chunk=count)
    assert (1002 in sample["tokens"].labels) == count and 1002 in sample["tokens"].ids


def test_documents_go_unpacked_too():
    batch = ChatCollator(LM)(samples(InterleavedDataset, document(picture("wide", 10), "ten"), document("x")))
    assert [runs(row) for row in batch["input_ids"]] == [[8], []] and "position_ids" not in batch


def test_packed_rows():
    rows = [
        document(picture("wide", 10), "a" * 20, name="one"),  # 30 tokens
        document(picture("tall", 20), "b" * 26, name="two"),  # 36
        document("c" * 5, name="three"),  # 6
        document(picture("square", 30), "d", name="four"),  # 9
    ]
    made = samples(InterleavedDataset, *rows, max_length=45)
    assert [len(sample["tokens"]) for sample in made] == [30, 36, 6, 9]
    batch = PackedCollator(LM, 45)(made)
    assert batch["ids"] == ["one + three + four", "two"]
    assert batch["input_ids"].shape == batch["position_ids"].shape == (2, 45)
    assert batch["position_ids"][0].tolist() == [*range(30), *range(6), *range(9)]
    assert batch["position_ids"][1].tolist() == [*range(36), *[0] * 9]
    assert batch["attention_mask"].sum(dim=1).tolist() == [45, 36]
    first = [made[0], made[2], made[3]]
    assert batch["input_ids"][0].tolist() == [number for sample in first for number in sample["tokens"].ids]
    labels = [[-100, *sample["tokens"].labels[1:]] for sample in first]
    assert batch["labels"][0].tolist() == [number for row in labels for number in row]
    assert made[2]["tokens"].labels[0] != -100  # which the end of "one" would have had to predict
    assert batch["grids"][:, :2].tolist() == [[3, 1], [1, 2], [1, 3]]  # as in the rows, not as in the samples
    assert reds(batch["pixel_values"])[0] == 10 and reds(batch["pixel_values"])[7] == 20
    with pytest.raises(ValueError, match="36 tokens does not fit"):
        PackedCollator(LM, 35)(made)


def test_the_loader_replaces_what_is_bad_and_threads_change_nothing():
    rows = [*ROWS, chat_row([b"broken"], "<image> x", "y"), chat_row([], "x", "")] * 3
    data = dataset(ChatDataset, *rows)

    def batches(workers):
        loader = Loader(data, ChatCollator(LM), 5, workers=workers)
        loader.bad.max_share = 1.0
        made = loader.batches()
        found = [next(made) for _ in range(4)]
        made.close()
        return found, loader.bad.counts

    (one, problems), (many, same) = batches(0), batches(3)
    assert problems == same and set(problems) == {"not_an_image", "missing_answer"}
    for before, after in zip(one, many, strict=True):
        assert before.keys() == after.keys() and before["ids"] == after["ids"]
        assert all(torch.equal(before[name], after[name]) for name in before if name != "ids")
