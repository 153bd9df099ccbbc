"""A model pushed to the hub is whole there, nothing else is, and what the hub refuses is one line."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from openblip.config import UserError
from openblip.data.text import Tokenizer
from openblip.hub import load_pretrained, push_to_hub, save_for_transformers, save_pretrained
from openblip.models.blip import Blip, without_decoder
from tests.tiny_blip import BLIP, files_in, tokenizer_of_words


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return tokenizer_of_words(tmp_path_factory.mktemp("vocabulary") / "vocab.txt")


class Hub:
    """What huggingface_hub's HfApi is asked for, and what the repository then holds. `refuses`: calls that fail."""

    def __init__(self, folder, refuses: dict[str, Exception] | None = None) -> None:
        self.folder, self.refuses, self.asked = folder, refuses or {}, []

    def __call__(self, token=None):
        self.asked.append(("token", token))
        return self

    def create_repo(self, repo_id, *, private, exist_ok):
        self.asked.append(("create", repo_id, private, exist_ok))
        if "create" in self.refuses:
            raise self.refuses["create"]
        return f"https://hub.example/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, delete_patterns, commit_message):
        self.asked.append(("upload", repo_id, delete_patterns))
        if "upload" in self.refuses:
            raise self.refuses["upload"]
        from huggingface_hub.utils import filter_repo_objects

        names = list(filter_repo_objects(files_in(folder_path), allow_patterns=allow_patterns))
        self.folder.mkdir(exist_ok=True)
        for name in names:
            shutil.copy(folder_path / name, self.folder / name)


@pytest.mark.parametrize("how", ["folder", "loaded"])
def test_a_model_pushed_to_the_hub_is_whole_there_and_nothing_else_is(how, tokenizer, tmp_path, monkeypatch):
    model = Blip(BLIP)
    save_pretrained(model, tmp_path / "mine", tokenizer=tokenizer, info={"trained_on": "ten photographs"})
    (tmp_path / "mine/notes.txt").write_text("not for the public")
    hub = Hub(tmp_path / "there")
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    what = str(tmp_path / "mine") if how == "folder" else load_pretrained(tmp_path / "mine")
    assert push_to_hub(what, "ann/blip", private=True, token="secret") == "https://hub.example/ann/blip"
    stale = ["model*.safetensors", "model*.safetensors.index.json"]
    assert hub.asked == [
        ("token", "secret"),
        ("create", "ann/blip", True, True),
        ("upload", "ann/blip", stale),
    ]
    wanted = ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert files_in(tmp_path / "there") == wanted
    found = load_pretrained(tmp_path / "there")
    assert all(
        torch.equal(value, model.state_dict()[name]) for name, value in found.model.state_dict().items()
    )
    assert found.info == {"trained_on": "ten photographs"} and found.tokenizer is not None
    if how == "loaded":
        assert "# blip\n" in (tmp_path / "there/README.md").read_text(), "named as on the hub"


def test_what_is_not_a_complete_model_of_ours_is_not_pushed(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "there")
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    save_pretrained(Blip(BLIP), tmp_path / "mine")
    save_for_transformers(without_decoder(Blip(BLIP)), tmp_path / "theirs")
    shutil.copytree(tmp_path / "mine", tmp_path / "cut")
    os.truncate(tmp_path / "cut/model.safetensors", 5000)
    for folder, name, message in (
        ("mine", "blip", "looks like owner/name"),
        ("absent", "ann/blip", "no config.json in it"),
        ("theirs", "ann/blip", "not a folder of openblip's"),
        ("cut", "ann/blip", "damaged"),
    ):
        with pytest.raises(UserError, match=message):
            push_to_hub(tmp_path / folder, name)
    assert not any(asked[0] in ("create", "upload") for asked in hub.asked)


@pytest.mark.parametrize("call", ["create", "upload"])
def test_what_the_hub_says_no_to_is_one_line(call, tmp_path, monkeypatch):
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    save_pretrained(Blip(BLIP), tmp_path / "mine")
    answer = SimpleNamespace(headers={}, request=None, status_code=403)
    for error, said in (
        (
            HfHubHTTPError("403 Forbidden: no right to write\n\nRequest ID: 7", response=answer),
            "403 Forbidden: no right to write",
        ),
        (HTTPError("the connection was refused"), "the connection was refused"),
        (ValueError(), "ValueError"),
    ):
        monkeypatch.setattr("huggingface_hub.HfApi", Hub(tmp_path / "there", {call: error}))
        with pytest.raises(UserError) as caught:
            push_to_hub(tmp_path / "mine", "ann/blip")
        assert str(caught.value) == f"ann/blip: the hub did not take it: {said}"
