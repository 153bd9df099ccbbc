"""Chat files, questions and captions become one form of conversation; what is not one says so, naming the row."""

import json

import numpy as np
import pytest

from openblip.config import UserError
from openblip.data.collate import PairDataset, VqaDataset
from openblip.data.conversation import (
    CAPTION_PROMPT,
    place_images,
    read_conversation,
    read_preference,
)
from openblip.data.image import open_image
from openblip.data.rows import BadRow, Row, RowReader
from openblip.data.sources import open_source
from openblip.data.transforms import ImageTransform
from tests.data.made import COLOURS, jsonl, parquet_bytes, png, write, write_images

PNG = png((1, 2, 3))


def read(record, where="chat.json[7]"):
    return RowReader("pictures").row(record, where, "chat#7", None)


def turns(conversation):
    return [(message["role"], message["content"]) for message in conversation.messages]


def llava(*texts, image="a.png", who=("human", "gpt")):
    said = [{"from": who[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": "000033", "conversations": said} | ({} if image is None else {"image": image})


def test_llava_layout():
    row = read(llava("<image>\nWhat is it?", "A dog.", "What colour?", "Brown."))
    found = read_conversation(row)
    assert turns(found) == [
        ("user", "<image>\nWhat is it?"),
        ("assistant", "A dog."),
        ("user", "What colour?"),
        ("assistant", "Brown."),
    ]
    assert (found.images, found.id, found.where) == (["pictures/a.png"], "a.png", "chat.json[7]")
    assert found.question() == "What colour?"


@pytest.mark.parametrize(
    "first, second, wanted",
    [
        ("What is it?", "And now?", "<image>\nWhat is it?"),  # none
        ("What is it?\n<image>", "And now?", "<image>\nWhat is it?"),  # behind
        ("Look at <image> here", "And now?", "<image>\nLook at here"),  # inside
        ("What is it?", "<image>\nAnd now?", "<image>\nWhat is it?"),  # later
        ("<image>", "And now?", "<image>"),  # alone
    ],
)
def test_the_only_image_comes_first(first, second, wanted):
    found = read_conversation(read(llava(first, "A dog.", second, "A cat.")))
    assert [text for role, text in turns(found) if role == "user"] == [wanted, "And now?"]


def test_a_system_message_stays_in_front_of_the_image():
    said = [
        {"from": "system", "value": "Be kind."},
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Yo"},
    ]
    found = read_conversation(read({"image": "a.png", "conversations": said}))
    assert turns(found) == [("system", "Be kind."), ("user", "<image>\nHi"), ("assistant", "Yo")]


def test_several_images_stay_where_they_are():
    row = read(
        llava("First <image>, then <image>.", "I see.", "And <image>?", "Too.", image=["a.png", "b.png", PNG])
    )
    found = read_conversation(row)
    assert found.images == ["pictures/a.png", "pictures/b.png", PNG]
    assert [text.count("<image>") for _, text in turns(found)] == [2, 0, 1, 0]


def parts(*items):
    return [{"role": "user", "content": list(items)}, {"role": "assistant", "content": "Yes."}]


@pytest.mark.parametrize(
    "image, column",
    [
        ({"type": "image", "image": "a.png"}, {}),
        ({"type": "image", "path": "a.png"}, {}),
        ({"type": "image", "url": "a.png"}, {}),
        ({"type": "image_url", "image_url": {"url": "a.png"}}, {}),
        ({"type": "image", "text": None}, {"images": ["a.png"]}),
        ({"type": "image"}, {"image": "a.png"}),
        ({"type": "image", "image": "a.png", "text": None}, {"images": ["elsewhere.png"]}),
    ],
)
def test_hugging_face_layout_with_parts(image, column):
    row = read({"messages": parts({"type": "text", "text": "Is it so?", "image": None}, image), **column})
    found = read_conversation(row)
    assert found.images == ["pictures/a.png"]
    assert turns(found) == [("user", "<image>\nIs it so?"), ("assistant", "Yes.")]


def test_bytes_in_parts_and_two_images_become_lines():
    struct = {"bytes": PNG, "path": None}
    text = {"type": "text", "text": "Same?"}
    row = read({"messages": parts({"type": "image", "image": struct}, {"type": "image", "image": PNG}, text)})
    assert row.images == [PNG, PNG]
    assert turns(read_conversation(row))[0] == ("user", "<image>\n<image>\nSame?")


def test_text_alone_is_a_conversation_too():
    row = read(llava("Hi", "Yo", image=None))
    assert row.images == [] and row.id == "chat#7"
    assert turns(read_conversation(row)) == [("user", "Hi"), ("assistant", "Yo")]
    assert read(llava("Hi", "Yo", image="")).images == []
    with pytest.raises(BadRow, match="text alone"):
        _ = row.image


def test_questions_and_captions_are_one_turn():
    row = Row("a", ["a.png"], [], question="what?", answers=["dog", "cat"], where="row 1")
    assert turns(read_conversation(row)) == [("user", "<image>\nwhat?"), ("assistant", "dog")]
    drawn = {read_conversation(row, np.random.default_rng(i)).messages[1]["content"] for i in range(20)}
    assert drawn == {"dog", "cat"}
    row = Row("a", ["a.png"], ["a red square"], where="row 2")
    assert turns(read_conversation(row)) == [
        ("user", f"<image>\n{CAPTION_PROMPT}"),
        ("assistant", "a red square"),
    ]


def chat(*messages, **columns):
    said = [{"role": role, "content": content} for role, content in messages]
    return {"messages": said, **columns}


U, A = ("user", "<image> x"), ("assistant", "y")
BAD = {
    "no marker for two images": (chat(("user", "x"), A, images=["a", "b"]), "image_count", "0 <image>"),
    "two markers for one": (
        chat(("user", "<image><image>"), A, image="a"),
        "image_count",
        "2 <image> markers for 1",
    ),
    "a marker without an image": (chat(U, A), "image_count", "1 <image> markers for 0"),
    "a part without its image": (
        {"messages": parts({"type": "image", "image": "a"}, {"type": "image"})},
        "missing_image",
        "no image",
    ),
    "unknown role": (
        chat(("user", "x"), ("narrator", "y")),
        "unknown_role",
        "message 1 is by 'narrator'; roles are system",
    ),
    "no role": (chat(("user", "x"), (None, "y")), "unknown_role", "None"),
    "empty answer": (chat(("user", "x"), ("assistant", " ")), "missing_answer", "by the assistant, is empty"),
    "no answer": (chat(("user", "x")), "missing_answer", "ends with the user"),
    "empty question": (chat(("user", ""), A), "missing_question", "by the user, is empty"),
    "answer first": (chat(A, U, image="a"), "role_order", "turn 0 is by assistant, wanted user"),
    "two questions": (chat(U, U, A, images=["a", "b"]), "role_order", "turn 1 is by user"),
    "late system": (chat(("user", "x"), A, ("system", "z")), "role_order", "turn 2 is by system"),
    "only a system message": (chat(("system", "z")), "missing_messages", "nobody says anything"),
    "no messages": (chat(), "missing_messages", "no messages, question or caption"),
    "messages that are none": ({"messages": ["x"], "image": "a"}, "missing_messages", "not an object"),
    "five images": (
        chat(("user", "<image>" * 5), A, images=list("abcde")),
        "too_many_images",
        "5 images, more than 4",
    ),
    "a sound": ({"messages": parts({"type": "audio"})}, "unknown_part", "of type 'audio'"),
    "a number": (chat(("user", 3), A), "not_text", "got int"),
    "a lone surrogate": (chat(("user", "\ud800"), A), "not_utf8", "UTF-8"),
    "captions, none": ({"image": "a", "id": 3}, "missing_caption", "the row has id, image"),
    "an image elsewhere": (chat(U, A, image="http://x/a.png"), "remote_image", "not fetched"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_conversations_name_the_row(name):
    record, reason, detail = BAD[name]
    with pytest.raises(BadRow, match=detail) as caught:
        read_conversation(read(record))
    assert caught.value.reason == reason and str(caught.value).startswith("chat.json[7]: ")


def test_a_question_without_an_answer_is_a_bad_row():
    with pytest.raises(BadRow, match=r"row 3: no answer to its question 'what") as caught:
        read_conversation(Row("a", ["a"], [], question="what?", where="row 3"))
    assert caught.value.reason == "missing_answer"


ASKED = [{"role": "user", "content": "Is it?"}]


def answered(text):
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": "Is it?", "chosen": "yes", "rejected": "no"},
        {"question": "Is it?", "chosen": "yes", "rejected": "no"},
        {"messages": ASKED, "chosen": "yes", "rejected": "no"},
        {
            "conversations": [{"from": "human", "value": "<image>\nIs it?"}],
            "chosen": "yes",
            "rejected": "no",
        },
        {"prompt": ASKED, "chosen": answered("yes"), "rejected": answered("no")},
        {"chosen": ASKED + answered("yes"), "rejected": ASKED + answered("no")},
        {"prompt": ASKED, "chosen": ASKED + answered("yes"), "rejected": ASKED + answered("no")},
    ],
)
def test_preferences(columns):
    found = read_preference(read({"image": "a.png", **columns}))
    assert turns(found.conversation) == [("user", "<image>\nIs it?")]
    assert (found.chosen, found.rejected) == ("yes", "no")
    assert found.conversation.images == ["pictures/a.png"]


def test_images_in_a_prompt_that_the_answers_repeat_count_once():
    picture = {"type": "image", "image": "a.png"}
    asked = [{"role": "user", "content": [picture, {"type": "text", "text": "Is it?"}]}]
    whole = {"chosen": asked + answered("yes"), "rejected": asked + answered("no")}
    for columns in (whole, {"prompt": asked, **whole}):
        found = read_preference(read(columns))
        assert found.conversation.images == ["pictures/a.png"]
        assert turns(found.conversation) == [("user", "<image>\nIs it?")]


@pytest.mark.parametrize(
    "columns, reason",
    [
        ({"prompt": "x", "chosen": "yes", "rejected": ""}, "missing_answer"),
        ({"prompt": "x", "chosen": [], "rejected": "no"}, "missing_answer"),
        ({"prompt": "x", "chosen": ASKED, "rejected": "no"}, "missing_answer"),
        ({"chosen": "yes", "rejected": "no"}, "missing_messages"),
        ({"chosen": ASKED + answered("yes"), "rejected": answered("no")}, "missing_messages"),
        ({"prompt": "x", "chosen": "yes", "rejected": " yes"}, "no_preference"),
        ({"prompt": "x", "chosen": "<image>", "rejected": "no"}, "image_count"),
        ({"messages": ASKED + answered("so"), "chosen": "yes", "rejected": "no"}, "role_order"),
        ({"prompt": "x", "chosen": ASKED + answered("yes"), "rejected": "no"}, "role_order"),
    ],
)
def test_bad_preferences(columns, reason):
    with pytest.raises(BadRow) as caught:
        read_preference(read({"image": "a.png", **columns}))
    assert caught.value.reason == reason


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_files_of_conversations_open_by_themselves(kind, tmp_path):
    """Same picture twice in a row, a text-only chat between: no row is joined, and none is refused for its columns."""
    write_images(tmp_path)
    records = [
        llava("<image>\nWhat?", "Red.", image="images/a.png"),
        llava("Hi", "Yo", image=None),
        llava("What?\n<image>", "Red!", image="images/a.png"),
    ]
    if kind == "parquet":
        records = [{"image": None, **record} for record in records]
        content = parquet_bytes({name: [r[name] for r in records] for name in records[0]})
    else:
        content = json.dumps(records) if kind == "json" else jsonl(records)
    source = open_source(write(tmp_path / f"chats.{kind}", content), cache_dir=tmp_path / "cache")
    found = [read_conversation(row) for row in source]
    assert [turns(one)[0][1] for one in found] == ["<image>\nWhat?", "Hi", "<image>\nWhat?"]
    assert [len(one.images) for one in found] == [1, 0, 1]
    assert open_image(found[2].images[0]).getpixel((0, 0)) == COLOURS["a"]


def test_messages_alone_make_a_source_and_other_columns_do_not(tmp_path):
    path = write(tmp_path / "a.jsonl", jsonl([{"messages": ASKED + answered("yes")}] * 2))
    assert len(open_source(path, cache_dir=tmp_path / "cache")) == 2
    path = write(tmp_path / "b.jsonl", jsonl([{"letters": ASKED}] * 2))
    with pytest.raises(UserError, match="which column is the image"):
        open_source(path, cache_dir=tmp_path / "cache")


def test_other_datasets_refuse_conversations_row_by_row():
    row = read(llava("Hi", "Yo", image=None))
    for dataset in (PairDataset([row], ImageTransform()), VqaDataset([row], ImageTransform())):
        with pytest.raises(BadRow, match=r"no words|no question"):
            dataset.get(0, np.random.default_rng(0))


def test_markers_of_a_chat_in_use():
    asked = [{"role": "user", "content": "what?"}]
    assert place_images(asked, 1, "chat") == [{"role": "user", "content": "<image>\nwhat?"}]
    assert place_images(asked, 0, "chat") == asked
