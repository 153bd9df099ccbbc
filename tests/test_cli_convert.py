"""`openblip convert`: an original checkpoint becomes a folder of ours or of transformers, bit for bit."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, BlipForConditionalGeneration

from openblip import cli
from openblip.api import load
from openblip.hub import load_pretrained
from tests.convert.official_blip import Official, save

KINDS = {
    "retrieval": ("retrieval", None),
    "caption": ("caption", None),
    "vqa": ("vqa", None),
    "captioner of a whole one": ("pretrain", "caption"),
    "filter of a whole one": ("pretrain", "retrieval"),
}


@pytest.fixture
def said(capsys):
    """What a command prints."""

    def run(*arguments) -> str:
        capsys.readouterr()
        cli.main([*map(str, arguments)])
        return capsys.readouterr().out

    return run


@pytest.fixture
def mistake(capsys):
    """The line a command ends with, with exit code 2."""

    def run(*arguments) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main([*map(str, arguments)])
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert caught.value.code == 2
        return line

    return run


def official(kind: str, tmp_path, **sizes: int):
    return save(getattr(Official(vision=128, **sizes), kind)(), tmp_path / "original.pth")


@pytest.mark.parametrize("kind", ["pretrain", "nlvr"])
def test_into_a_folder_of_ours(kind, said, tmp_path):
    sizes = {"layers": 12} if kind == "nlvr" else {"words": 30524}
    file = official(kind, tmp_path, **sizes)
    answer = said("convert", file, tmp_path / "ours")
    direct, found = load_pretrained(file, dtype=None), load_pretrained(tmp_path / "ours", dtype=None)
    assert str(direct.report) in answer and f"{type(found.model).__name__}: {tmp_path / 'ours'}" in answer
    assert found.model.config == direct.model.config and found.transform == direct.transform
    state = found.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in direct.model.state_dict().items())
    assert found.info == direct.info and (found.tokenizer is None) == (kind == "nlvr")


@pytest.mark.parametrize("name", KINDS)
def test_into_a_folder_of_transformers_and_back(name, said, tmp_path):
    kind, half = KINDS[name]
    file = official(kind, tmp_path)
    answer = json.loads(
        said(
            "convert",
            file,
            tmp_path / "theirs",
            "--to",
            "transformers",
            *(["--half", half] if half else []),
            "--json",
        )
    )
    assert answer["folder"] == str(tmp_path / "theirs") and answer["report"]["layout"].startswith(
        "LAVIS Blip"
    )
    direct, found = load_pretrained(file, dtype=None).model, load_pretrained(tmp_path / "theirs", dtype=None)
    state, wanted = direct.state_dict(), found.model.state_dict()
    fresh = {"temperature"} if "text_proj.weight" in wanted else set()
    assert found.report.fresh.keys() == fresh and not found.report.ignored
    assert all(torch.equal(value, state[name]) for name, value in wanted.items() if name not in fresh)
    if half is None:
        assert state.keys() == wanted.keys()
        rate = direct.config.vision.drop_path_rate  # of training, which transformers does not do
        assert replace(found.model.config.vision, drop_path_rate=rate) == direct.config.vision
        assert found.model.config.text == direct.config.text


def test_transformers_loads_what_was_converted(said, tmp_path):
    said(
        "convert",
        official("caption", tmp_path, words=30524),
        tmp_path / "theirs",
        "--to",
        "transformers",
        "--dtype",
        "fp32",
    )
    peer, told = BlipForConditionalGeneration.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(told.values()) and peer.dtype == torch.float32
    assert AutoProcessor.from_pretrained(tmp_path / "theirs").tokenizer("a dog")["input_ids"] == [
        101,
        1037,
        3899,
        102,
    ]


def test_a_file_and_its_folder_say_the_same(said, tmp_path):
    file = official("caption", tmp_path, words=30524)
    said("convert", file, tmp_path / "ours")
    picture = Image.effect_noise((40, 30), 80).convert("RGB")
    captions = [load(place).caption(picture, max_new_tokens=4) for place in (file, tmp_path / "ours")]
    assert captions[0] == captions[1] and captions[0]


def test_options(said, tmp_path):
    file = official("retrieval", tmp_path)
    said("convert", file, tmp_path / "ours", "--dtype", "bf16", "--image-size", 48)
    found = load_pretrained(tmp_path / "ours", dtype=None)
    assert found.model.itm_head.weight.dtype == torch.bfloat16
    assert found.model.config.vision.image_size == 48 == found.transform.image_size


@pytest.mark.parametrize("to", ["openblip", "transformers"])
def test_over_an_earlier_result_and_not_over_what_somebody_else_wrote(to, said, mistake, tmp_path):
    file, out = official("caption", tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("my notes")
    (out / "tokenizer.json").write_text("{}")
    call = ("convert", file, out, "--to", to)
    assert "README.md, tokenizer.json would be replaced" in mistake(*call)
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "tokenizer.json"]
    assert (out / "README.md").read_text() == "my notes" and (out / "tokenizer.json").read_text() == "{}"
    for path in out.iterdir():
        path.unlink()
    for other in (to, to, "transformers", "openblip"):
        said("convert", file, out, "--to", other)
    (out / "config.json").unlink()  # as an interrupted conversion leaves it
    said(*call)
    assert load_pretrained(out).model


def test_what_cannot_be_converted_is_one_line(mistake, tmp_path):
    file = official("pretrain", tmp_path)
    line = mistake("convert", file, tmp_path / "out", "--to", "transformers")
    assert "no BLIP with both halves" in line and "--half" in line
    file = official("vqa", tmp_path)
    assert "a BlipVqa has no such half" in mistake("convert", file, tmp_path / "out", "--half", "caption")
    assert "no such folder or file" in mistake("convert", "nosuch.pth", tmp_path / "out")
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pth")
    assert "other.pth: a file with tensors under a is not known" in mistake(
        "convert", tmp_path / "other.pth", tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()


def test_info_tells_what_became_of_a_file(said, tmp_path):
    answer = said("info", official("pretrain", tmp_path))
    assert "model: Blip" in answer and "LAVIS BlipPretrain layout" in answer and "visual_encoder_m" in answer
