"""Videos in place of images: which columns and messages name one, and what it is in a sample and a batch."""

import json

import numpy as np
import pytest
import torch

from openblip.data.collate_chat import (
    ChatCollator,
    ChatDataset,
    InterleavedDataset,
    PreferenceDataset,
    TileEmbeds,
)
from openblip.data.conversation import CAPTION_PROMPT, VIDEO_PROMPT, read_conversation
from openblip.data.image import BadImage, open_image
from openblip.data.rows import BadRow, Row, RowReader
from openblip.data.sources import open_source
from openblip.data.video import Video, read_frames
from tests.data.test_collate_chat import LM, chat_row, dataset, picture, reds, runs, samples
from tests.data.videos import STEP, encode, greys, numbers

CLIP = encode(greys(40))
READER = RowReader("/data", "train/")


def vision_length(columns, rows, frames=1):
    return 5 if frames > 1 else 2 * (1 + columns * rows)


def test_columns_that_name_a_video():
    for column in ("video", "video_path", "video_file"):
        row = READER.row({column: "a.mp4", "caption": "b"}, "w", "0", None)
        assert row.images == [Video("/data/a.mp4")] and row.id == "train/a.mp4" and column not in row.extra
    row = READER.row({"video": {"bytes": b"clip", "path": "a.mp4"}, "caption": "b"}, "w", "7", None)
    assert row.images == [Video(b"clip")] and row.id == "7"
    row = READER.row({"video": ["1.png", "2.png"], "caption": "b"}, "w", "7", None)
    assert row.images == [Video(["/data/1.png", "/data/2.png"])], "the frames of one"
    both = {"image": "i.png", "video": "a.mp4", "path": "a.mp4", "question": "q", "answer": "a"}
    row = READER.row(both, "w", "7", None)
    assert row.images == ["/data/i.png", Video("/data/a.mp4")] and row.extra == {"path": "a.mp4"}
    row = READER.row({"video": "a.mp4", "path": "a.mp4", "caption": "b"}, "w", "7", None)
    assert row.images == [Video("/data/a.mp4")], "a path beside a video is no picture"
    with pytest.raises(BadRow, match="is a URL and not fetched"):
        READER.row({"video": "https://example.org/a.mp4", "caption": "b"}, "w", "0", None)
    with pytest.raises(BadRow, match="missing_image"):
        READER.row({"video": {"bytes": None, "path": None}, "caption": "b"}, "w", "0", None)


def test_an_image_column_that_is_named_is_the_only_one():
    reader = RowReader("/data", image_column="still")
    row = reader.row({"still": "i.png", "video": "a.mp4", "caption": "b"}, "w", "0", None)
    assert row.images == ["/data/i.png"] and row.extra == {"video": "a.mp4"}


def test_videos_and_images_in_messages_keep_their_order():
    content = [
        {"type": "video", "video": "a.mp4"},
        {"type": "image", "image": "i.png"},
        {"type": "video_url", "video_url": {"url": "b.mp4"}},
        {"type": "video", "video": ["1.png", "2.png"]},
        {"type": "text", "text": "what?"},
    ]
    said = [{"role": "user", "content": content}, {"role": "assistant", "content": "that"}]
    row = READER.row({"messages": said}, "w", "0", None)
    frames = Video(["/data/1.png", "/data/2.png"])
    assert row.images == [Video("/data/a.mp4"), "/data/i.png", Video("/data/b.mp4"), frames]
    found = read_conversation(row)
    assert found.messages[0]["content"] == "<image>\n<image>\n<image>\n<image>\nwhat?"


def test_a_video_takes_one_marker_of_either_name():
    for marker in ("<image>", "<video>", ""):
        turns = [{"from": "human", "value": f"{marker}\nwhat?"}, {"from": "gpt", "value": "that"}]
        row = READER.row({"video": "a.mp4", "conversations": turns}, "w", "0", None)
        assert read_conversation(row).messages[0]["content"] == "<image>\nwhat?"
    told = Row("r", [Video("a.mp4")], ["a cat"])
    assert read_conversation(told).messages[0]["content"] == f"<image>\n{VIDEO_PROMPT}"
    assert read_conversation(told, caption_prompt="Well?").messages[0]["content"] == "<image>\nWell?"
    told = Row("r", ["a.png"], ["a cat"])
    assert read_conversation(told).messages[0]["content"] == f"<image>\n{CAPTION_PROMPT}"


def test_a_source_of_videos(tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/a.mp4").write_bytes(CLIP)
    lines = [{"video": "clips/a.mp4", "question": "what?", "answer": "grey"}]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (row,) = open_source(tmp_path, cache_dir=tmp_path / "cache")
    assert numbers(read_frames(row.image.source, 4)) == [5, 15, 25, 35]
    with pytest.raises(BadImage, match="it is a video"):
        open_image(row.image)


def test_a_batch_of_pictures_and_videos():
    rows = [
        chat_row([picture("wide", 50)], "<image>\nwhat is it?", "red"),
        chat_row([Video(CLIP)], "what now?", "grey"),
        chat_row([], "hi", "you"),
        chat_row([picture("square", 60), Video(encode(greys(2)))], "a <image> b <image>", "d"),
    ]
    made = ChatDataset(rows, dataset(ChatDataset).transform, chat=dataset(ChatDataset).chat,
                       vision_length=vision_length, frames=4)  # fmt: skip
    batch = ChatCollator(LM)([made.get(index, np.random.default_rng(0)) for index in range(len(rows))])
    assert batch["frames"].tolist() == [1, 4, 1, 4] and batch["frames"].dtype == torch.int64
    assert batch["grids"].tolist() == [[3, 1, 90, 30], [0, 0, 64, 48], [1, 2, 40, 40], [0, 0, 64, 48]]
    assert batch["pixel_values"].shape == (4 + 4 + 3 + 4, 3, 8, 8)
    assert batch["pixel_values"].dtype == torch.float32
    grey = reds(batch["pixel_values"])
    assert [round(value / STEP) for value in grey[4:8]] == [5, 15, 25, 35]
    assert [round(value / STEP) for value in grey[11:]] == [0, 0, 1, 1]
    assert grey[0] == 50 and grey[8] == 60
    assert [runs(row) for row in batch["input_ids"]] == [[8], [5], [], [6, 5]]


def test_preferences_and_captions_of_videos():
    extra = {"prompt": "what?", "chosen": "a", "rejected": "b"}
    (sample,) = samples(PreferenceDataset, Row("r", [Video(CLIP)], [], extra=extra), frames=1)
    assert sample["frames"] == [1] and sample["pixel_values"][0].shape[0] == 1, "one frame is a picture"
    assert [round(value / STEP) for value in reds(sample["pixel_values"][0])] == [20]
    row = Row("r", [Video(CLIP)], ["it gets lighter"])
    options = {"tokenizer": LM, "added": dataset(InterleavedDataset).added, "vision_length": vision_length}
    made = InterleavedDataset([row], dataset(ChatDataset).transform, frames=3, **options)
    sample = made.get(0, np.random.default_rng(0))
    assert sample["frames"] == [3] and sample["tokens"].runs == [(0, 5)]


def test_features_of_a_video_stand_in_for_it():
    class Features:
        def lookup(self, key):
            assert key == "r"
            return TileEmbeds(torch.ones(6, 5, 2), (0, 0, 64, 48), 6)

    options = {"chat": dataset(ChatDataset).chat, "vision_length": vision_length, "features": Features()}
    row = chat_row([Video("gone.mp4")], "what?", "that")
    sample = ChatDataset([row], frames=6, **options).get(0, np.random.default_rng(0))
    assert sample["frames"] == [6] and sample["tokens"].runs[0][1] - sample["tokens"].runs[0][0] == 5
    with pytest.raises(BadRow, match="no temporal encoder"):
        ChatDataset([row], **options).get(0, np.random.default_rng(0))


def test_a_bad_video_is_a_bad_row():
    row = chat_row([Video(CLIP[:-200])], "what?", "that")
    with pytest.raises(BadRow, match="row 5") as error:
        samples(ChatDataset, row, frames=4)
    assert error.value.reason == "truncated"
    with pytest.raises(BadRow, match="row 5: it shows a video, and this model has no temporal encoder"):
        samples(ChatDataset, chat_row([Video(CLIP)], "what?", "that"))
