"""Documents of text and images: in order, marked chunk by chunk, cut and packed without cutting an image."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openblip.data.collate import PairDataset
from openblip.data.interleaved import Document, document_tokens, pack, read_document
from openblip.data.prompts import LmTokenizer
from openblip.data.rows import BadRow, Row, RowReader
from openblip.data.sources import open_source
from openblip.data.tokens import AddedTokens
from openblip.data.transforms import ImageTransform
from tests.data.made import parquet_bytes, png, write, write_images
from tests.data.test_prompts import byte_level

TOKENIZER = LmTokenizer(byte_level(start="<s>"))
ADDED = AddedTokens(1000)
END = TOKENIZER.end_id


def read(record):
    return read_document(RowReader("pictures").row(record, "doc 3", "docs#3", None))


def document(*parts):
    return Document(list(parts), ["x.png"] * parts.count(None), "d", "doc")


def shown(ids):
    """Ids as text: [i] an image id, § the end of a chunk, $ the end, ^ the start, "." what is not counted."""
    known = {1000: "[i]", 1002: "§", END: "$", TOKENIZER.start_ids[0]: "^"}
    texts = []
    for number in ids:
        if number < 0:
            texts.append(".")
        elif number in known:
            texts.append(known[number])
        else:
            texts.append(TOKENIZER._backend.id_to_token(number).replace("Ġ", " ").replace("Ċ", "\n"))
    return "".join(texts)


def tokens_of(doc, lengths=None, max_length=None):
    lengths = [2] * len(doc.images) if lengths is None else lengths
    return document_tokens(doc, lengths, TOKENIZER, ADDED, max_length)


@pytest.mark.parametrize(
    "parts, wanted",
    [
        (("a b", None, "cd", None, "e"), "^a b[i][i]cd§[i][i]e§$"),
        ((None, "cd"), "^[i][i]cd§$"),  # a picture and its caption
        ((None, None, "cd"), "^[i][i][i][i]cd§$"),  # no text, no end
        (("a", None), "^a[i][i]$"),
        ((None, "a ", " b", None), "^[i][i]a\n\nb§[i][i]$"),  # one chunk
        (("just", "text"), "^just\n\ntext$"),
        ((None, "<|endofchunk|></s>"), "^[i][i]<|endofchunk|></s>§$"),  # a text is never control
    ],
)
def test_chunks_end_after_images(parts, wanted):
    tokens = tokens_of(document(*parts))
    assert shown(tokens.ids) == wanted
    assert shown(tokens.labels) == wanted.replace("[i]", ".").replace("^", ".")
    assert all(tokens.ids[start:stop] == [1000] * 2 for start, stop in tokens.runs)


def test_the_end_of_a_chunk_is_counted_unless_it_shall_not_be():
    """As meant, and as released (§4.4)."""
    doc = document("ab", None, "cd", None, "ef")
    meant, released = (
        document_tokens(doc, [2, 1], TOKENIZER, ADDED, count_end_of_chunk=count) for count in (True, False)
    )
    assert meant.ids == released.ids
    assert shown(meant.labels) == ".ab..cd§.ef§$" and shown(released.labels) == ".ab..cd..ef.$"


def test_obelics_layout():
    found = read({"images": [None, "a.png", None, png((1, 2, 3))], "texts": ["one ", None, "two", None]})
    assert found.parts == ["one", None, "two", None]
    assert found.images == ["pictures/a.png", png((1, 2, 3))]
    assert (found.id, found.where) == ("docs#3", "doc 3")
    both = read({"images": ["a.png", None], "texts": ["about a", "more"], "image_id": 7})
    assert both.parts == [None, "about a", "more"] and both.id == "7"
    assert read({"images": [None], "texts": ["only text"]}).images == []


def test_what_cannot_be_an_image_keeps_its_place():
    found = read({"images": ["http://x/a.jpg", None, "b.png", 3], "texts": [None, "x", None, None]})
    assert found.parts == [None, "x", None, None]
    assert found.images == ["http://x/a.jpg", "pictures/b.png", "3"]


def test_markers_and_captions():
    found = read({"text": "one <image> two <image>", "images": ["a.png", "b.png"]})
    assert shown(tokens_of(found).ids) == "^one[i][i]two§[i][i]$"
    caption = Row("a", ["a.png"], ["a dog", "a cat"], where="doc")
    assert shown(tokens_of(read_document(caption)).ids) == "^[i][i]a dog§$"
    drawn = {read_document(caption, np.random.default_rng(i)).parts[1] for i in range(20)}
    assert drawn == {"a dog", "a cat"}


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"text": "one <image>", "images": ["a.png", "b.png"]}, "image_count"),
        ({"text": "no marker", "images": ["a.png", "b.png"]}, "image_count"),
        ({"images": ["a.png", None], "texts": [None, " "]}, "missing_caption"),
        ({"images": [None, None], "texts": [None, None]}, "missing_caption"),
        ({"images": ["a.png", None], "texts": [None, 4]}, "not_text"),
        ({"images": ["a.png", None], "texts": ["x"]}, "missing_image"),  # not parallel: two captions' images
        ({"image": "a.png", "question": "what?"}, "missing_caption"),
    ],
)
def test_bad_documents(record, reason):
    with pytest.raises(BadRow, match="doc 3") as caught:
        read(record)
    assert caught.value.reason == reason


def test_parallel_lists_without_gaps_are_pictures_with_captions():
    row = RowReader("").row({"images": ["a.png"], "texts": ["a dog"]}, "row", "0", None)
    assert row.captions == ["a dog"] and "document" not in row.extra


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_files_of_documents(kind, tmp_path):
    write_images(tmp_path)
    texts, images = [["x", None, "y"], [None, "z"]], [[None, "images/a.png", None], ["images/b.png", None]]
    records = [
        {"texts": text, "images": image, "metadata": "m"} for text, image in zip(texts, images, strict=True)
    ]
    content = {
        "parquet": lambda: parquet_bytes({name: [r[name] for r in records] for name in records[0]}),
        "json": lambda: json.dumps(records),
        "jsonl": lambda: "\n".join(map(json.dumps, records)),
    }[kind]()
    source = open_source(write(tmp_path / f"docs.{kind}", content), cache_dir=tmp_path / "cache")
    found = [read_document(row) for row in source]
    assert [doc.parts for doc in found] == [["x", None, "y"], [None, "z"]]
    assert found[0].images == [f"{tmp_path}/images/a.png"]
    assert source[0].extra["metadata"] == "m"
    with pytest.raises(BadRow, match="no words in its captions"):
        PairDataset(source, ImageTransform()).get(0, np.random.default_rng(0))


def test_images_that_are_missing_leave_their_place():
    doc = Document([None, "a", None, "b", None, "c"], ["0", "1", "2"], "d", "doc")
    rest = doc.without_images({1})
    assert rest.parts == [None, "a", "b", None, "c"] and rest.images == ["0", "2"]
    assert shown(tokens_of(rest).ids) == "^[i][i]a\n\nb§[i][i]c§$"
    before = doc.before_image(1)
    assert before.parts == [None, "a"] and before.images == ["0"]
    assert shown(tokens_of(before).ids) == "^[i][i]a§", "which was not its end"
    assert doc.before_image(0).parts == []


def test_a_long_document_ends_before_the_image_that_does_not_fit():
    doc = document("ab", None, "cd", None, "ef")
    whole = tokens_of(doc, [3, 4])
    assert shown(whole.ids) == "^ab[i][i][i]cd§[i][i][i][i]ef§$"
    for room in range(1, len(whole) + 1):
        tokens = tokens_of(doc, [3, 4], room)
        assert tokens.ids == whole.ids[: len(tokens)] and len(tokens) <= room
        assert tokens.ids.count(1000) == [0, 3, 7][len(tokens.runs)]  # whole images alone
        assert len(tokens) == {4: 3, 5: 3, 10: 9, 11: 9, 12: 9}.get(room, room)
    assert shown(tokens_of(doc, [3, 4], 12).ids) == "^ab[i][i][i]cd§"


def test_first_fit():
    assert pack([5, 6, 3, 4, 2, 10], 10) == [[0, 2, 4], [1, 3], [5]]
    assert pack([], 10) == [] and pack([10, 1], 10) == [[0], [1]]


@given(st.lists(st.integers(1, 20), max_size=30))
def test_packing_loses_nothing(lengths):
    rows = pack(lengths, 20)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    assert all(sum(lengths[number] for number in row) <= 20 and row == sorted(row) for row in rows)
    fill = [sum(lengths[number] for number in row) for row in rows]
    assert sum(2 * one <= 20 for one in fill) <= 1  # first fit leaves at most one row half empty
