"""`openblip chat` says what the library says, mistakes cost a line, and the other commands take a BLIP-3."""

import io
import json
import re

import pytest

from openblip import cli
from openblip.api import load
from tests.tiny_models import drawing, picture_folder, question_folder, save_blip, save_blip3

FEW = ("--max-new-tokens", "8")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """blip3, blip: models; data: pictures with captions; asked: with questions; 0.png, 1.png."""
    root = tmp_path_factory.mktemp("cli")
    save_blip3(root / "blip3")
    save_blip(root / "blip")
    picture_folder(root / "data", 4)
    question_folder(root / "asked", 2)
    for number in (0, 1):
        drawing(number).save(root / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def model(root):
    return load(root / "blip3")


@pytest.fixture(autouse=True)
def own_cache(root, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", root / "cache")


@pytest.fixture
def run(capsys):
    def call(*arguments):
        capsys.readouterr()
        cli.main([*map(str, arguments)])
        return capsys.readouterr()

    return call


@pytest.fixture
def talked(root, run, monkeypatch):
    """What comes out of a conversation at the keyboard: (standard output, standard error)."""

    def type_in(*lines, arguments=()):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return run("chat", "--model", root / "blip3", *FEW, *arguments)

    return type_in


def test_messages_are_answered_and_printed(root, run, model):
    talk = model.conversation("Be brief.")
    shown = [root / "0.png", root / "1.png"]
    answers = [talk.say("which?", shown, max_new_tokens=8), talk.say("why?", max_new_tokens=8)]
    images = ("--image", shown[0], "--image", shown[1])
    call = ("chat", "--model", root / "blip3", *images, *FEW, "--system", "Be brief.")
    said = run(*call, "--message", "which?", "--message", "why?")
    assert said.out == "".join(f"{answer}\n" for answer in answers) and said.err == ""
    found = json.loads(run(*call, "--message", "which?", "--message", "why?", "--json").out)
    assert found == {"messages": talk.messages, "answers": answers}
    sampled = (*call, "--message", "x", "--do-sample", "--seed")
    assert run(*sampled, 1).out == run(*sampled, 1).out != run(*sampled, 2).out


def test_a_conversation_at_the_keyboard(root, talked, model):
    talk, options = model.conversation(), {"max_new_tokens": 8}
    answers = [
        talk.say("what?", root / "0.png", **options),
        talk.say("and?", [root / "1.png"], **options),
    ]
    talk.undo()
    answers += [talk.say("so?", **options)]
    lines = ["what?", "", f"/image {root / '1.png'}", "and?", "/undo", "so?"]
    said = talked(*lines, arguments=("--image", root / "0.png"))
    assert said.out.splitlines() == answers
    assert "/image FILE" in said.err and said.err.count("> ") == 7 and "taken back" in said.err
    assert talked("what?", "/quit", "never").out.splitlines() == [model.chat("what?", **options)]


def test_an_answer_is_shown_as_it_is_written(root, monkeypatch, model):
    pieces = []

    class Screen(io.StringIO):
        def write(self, text):
            pieces.append(text)
            return len(text)

    monkeypatch.setattr("sys.stdout", Screen())
    cli.main(["chat", "--model", str(root / "blip3"), *FEW, "--message", "what?"])
    assert "".join(pieces) == model.chat("what?", max_new_tokens=8) + "\n" and len(pieces) > 4


def test_a_mistake_at_the_keyboard_costs_a_line(root, talked, model):
    (root / "broken.png").write_bytes(b"broken")
    lines = [
        "/undo",
        "/image nowhere.png",
        f"/image {root / 'broken.png'}",
        "/image",
        "/fly",
        "x" * 500,
        f"/image {root / '1.png'}",
        "/undo",
        "what?",
    ]
    said = talked(*lines)
    assert said.out.splitlines() == [model.chat("what?", max_new_tokens=8)]
    mistakes = [line for line in said.err.replace("> ", "").splitlines() if line.startswith("openblip: ")]
    wanted = [
        "nothing has been said",
        "no file",
        "not_an_image",
        "/image: ",
        "/fly: /image FILE",
        "more than the 400",
    ]
    assert len(mistakes) == 6 and all(part in line for part, line in zip(wanted, mistakes))
    assert "pictures taken back" in said.err


def test_an_answer_can_be_stopped(root, talked, model, monkeypatch):
    from openblip.api_talk import Talk

    stream = Talk.stream

    def interrupted(self, text, *args, **options):
        pieces = stream(self, text, *args, **options)
        yield next(pieces)
        if text == "stop":
            raise KeyboardInterrupt
        yield from pieces

    monkeypatch.setattr(Talk, "stream", interrupted)
    said = talked("stop", "what?")
    assert said.out.splitlines()[-1].endswith(model.chat("what?", max_new_tokens=8))
    assert "stopped" in said.err


def test_mistakes_end_with_2(root, capsys):
    call = ["chat", "--model", str(root / "blip3")]
    for arguments, line in (
        ([*call, "--json"], "add --message"),
        ([*call, "--image", "none.png", "--message", "x"], "no file"),
        ([*call, "--message", "x" * 500], "more than the 400"),
        ([*call, "--message", "x", "--max-new-tokens", "0"], "max_new_tokens"),
        ([*call, "--message", "<image> x"], "1 <image> markers for 0 images"),
        (["chat", "--model", str(root / "blip"), "--message", "x"], "wants a BLIP-3, .* is a Blip$"),
        (["match", str(root / "0.png"), "a dog", "--model", str(root / "blip3")], "matching"),
        (["search", "a dog", "--data", str(root / "data"), "--model", str(root / "blip3")], "embedding"),
        (["eval", "retrieval", "--data", str(root / "data"), "--model", str(root / "blip3")], "embedding"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        said = capsys.readouterr()
        (found,) = said.err.strip().splitlines()
        assert caught.value.code == 2 and said.out == ""
        assert re.search(line, found), found


def test_the_other_commands_take_it(root, run, model):
    picture, folder = root / "0.png", ("--model", root / "blip3")
    said = json.loads(run("caption", picture, *folder, *FEW, "--json").out)
    assert said == {str(picture): model.caption(picture, max_new_tokens=8)}
    said = json.loads(run("vqa", picture, "which?", *folder, "--prompt", "Say: {}", "--json").out)
    assert said["answer"] == model.answer(picture, "which?", prompt="Say: {}")
    said = json.loads(run("vqa", picture, "which?", *folder, "--answers", "red", "no", "--json").out)
    assert said["answer"] == model.answer(picture, "which?", answers=["red", "no"])
    out = root / "figures.json"
    run("eval", "caption", "--data", root / "data", *folder, "--out", out, "--json")
    record = json.loads(out.read_text())
    assert record["num_beams"] == 1 and len(record["figures"]["captions"]) == 4
    found = json.loads(run("eval", "vqa", "--data", root / "asked", *folder, "--json").out)
    assert len(found["answers"]) == 2 and 0 <= found["accuracy"] <= 1
    assert json.loads(run("info", root / "blip3", "--json").out)["model"] == "Blip3"
