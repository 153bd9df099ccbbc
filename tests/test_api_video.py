"""Videos in a user's hands: where a BLIP-3 with a temporal encoder takes a picture, it takes a video."""

import json

import pytest
import torch

from openblip import cli
from openblip.api import load
from openblip.config import UserError
from openblip.data.video import Video, as_video, read_frames
from openblip.hub import load_pretrained, save_pretrained
from openblip.models.temporal import TemporalConfig
from tests.data.videos import encode, greys
from tests.tiny_models import drawing, save_blip3

FEW = {"max_new_tokens": 8}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """video: a model for videos; plain: one for pictures; up.mp4, bright.mkv, broken.mp4, a.png."""
    root = tmp_path_factory.mktemp("videos")
    save_blip3(root / "video", temporal=TemporalConfig(16, "attention", 4, 3))
    save_blip3(root / "plain")
    (root / "up.mp4").write_bytes(encode(greys(20)))
    (root / "bright.mkv").write_bytes(encode(greys(40)[20:]))
    (root / "broken.mp4").write_bytes(b"no video at all")
    drawing(0).save(root / "a.png")
    return root


@pytest.fixture(scope="module")
def model(root):
    return load(root / "video", batch_size=3)


def test_what_is_a_video(root):
    for source in ("a.mp4", root / "b.MOV", "c.webm"):
        assert as_video(source) == Video(source)
    for source in ("a.png", root / "a.gif", b"bytes.mp4", drawing(0)):
        assert as_video(source) is None
    assert as_video(Video(b"bytes")) == Video(b"bytes")


def test_questions_about_videos(model, root):
    """Their frames go through the temporal encoder, and what they show has a say."""
    up, bright = root / "up.mp4", str(root / "bright.mkv")
    prompt = model.reader.chat_prompt("what?", [up], "")
    assert [stop - start for start, stop in prompt.tokens.runs] == [4]
    with torch.inference_mode():
        pixels = torch.stack([model.transform(frame) for frame in read_frames(up, 8)])
        frames = model.model.resampler(model.model.encode_image(pixels)[:, 1:])
        ids = torch.tensor([prompt.tokens.ids])
        wanted = model.model.embed(ids, [model.model.temporal(frames[None])[0]])
        torch.testing.assert_close(model.reader.embedded([prompt])[0], wanted)
    answers = model.answer([up, bright, root / "a.png"], "what?", **FEW)
    assert answers == [model.chat("what?", one, **FEW) for one in (up, Video(bright), drawing(0))]
    assert len(set(answers)) == 3
    parts = [{"type": "video", "video": str(up)}, {"type": "text", "text": "what?"}]
    assert model.chat([{"role": "user", "content": parts}], **FEW) == answers[0]
    written = model.caption([up, root / "a.png"], **FEW)
    assert written[0] == model.chat("Describe the video.", up, **FEW), "as in training"
    assert written[1] == model.chat("Describe the image.", root / "a.png", **FEW)
    assert "".join(model.caption_stream(up, **FEW)) == written[0]
    assert model.answer(up, "what?", answers=["red", "no"]) in ("red", "no")


def test_a_talk_about_pictures_and_videos(model, root):
    talk = model.conversation()
    for text, new in (("a", root / "a.png"), ("and", [root / "up.mp4", root / "bright.mkv"]), ("so?", [])):
        answer = talk.say(text, new, **FEW)
        assert answer == model.chat(talk.messages[:-1], talk.images, **FEW)
    talk.undo()
    talk.undo()
    assert talk.images == [root / "a.png"]


def test_so_many_frames_as_in_training(root, tmp_path):
    found = load_pretrained(root / "video")
    save_pretrained(
        found.model, tmp_path, transform=found.transform, lm_tokenizer=found.lm_tokenizer, info={"frames": 3}
    )
    model = load(tmp_path)
    assert len(model.reader.opened([root / "up.mp4"], "")[0].embeds) == 3
    assert isinstance(model.chat("what?", root / "up.mp4", **FEW), str)


def test_mistakes_are_said(model, root):
    plain = load(root / "plain")
    for call in (plain.chat, lambda text, image: plain.conversation().say(text, image)):
        with pytest.raises(UserError, match="chat: it shows a video, and this model has no temporal encoder"):
            call("what?", root / "up.mp4")
    with pytest.raises(UserError, match=r"question 1: .*no temporal encoder"):
        plain.answer([root / "a.png", root / "up.mp4"], "what?")
    with pytest.raises(UserError, match=r"chat: .*not_a_video"):
        model.chat("what?", root / "broken.mp4")
    with pytest.raises(UserError, match=r"chat: there is no file .*missing"):
        model.chat("what?", "nowhere.mp4")


def test_chat_at_the_command_line(model, root, capsys):
    call = ["chat", "--model", str(root / "video"), "--message", "what?", "--max-new-tokens", "8"]
    cli.main([*call, "--image", str(root / "up.mp4"), "--json"])
    assert json.loads(capsys.readouterr().out)["answers"] == [model.chat("what?", root / "up.mp4", **FEW)]
    for path, line in (("broken.mp4", "not_a_video"), ("nowhere.mp4", "no file")):
        with pytest.raises(SystemExit):
            cli.main([*call, "--image", str(root / path)])
        assert line in capsys.readouterr().err
