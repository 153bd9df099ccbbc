"""What a checkpoint is, its names and its config.json say, and one that is not known is told what there is."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file
from transformers import BlipForConditionalGeneration

from openblip.config import UserError
from openblip.convert.recognise import LAYOUTS, find_layout
from openblip.hub import load_pretrained
from tests.convert.official_blip import Official, save
from tests.parity.peers import blip_config, random_peer


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.origin} {layout.name}")
def test_marks_alone_tell_a_layout(layout):
    names = [f"{mark}.weight" for mark in layout.marks] + ["something.else"]
    assert find_layout({"model_type": layout.model_type}, names, "it") is layout
    assert find_layout({"model_type": layout.model_type}, layout.marks, "it") is layout


def test_a_mark_is_a_whole_name_and_no_beginning_of_one():
    with pytest.raises(UserError, match="is not known"):
        find_layout({}, ["visual_encoder.patch_embedding.x", "text_decoder.bertram.x"], "it")


def test_what_is_not_known_is_told_what_there_is():
    names = [f"part{number}.weight" for number in range(9)]
    with pytest.raises(UserError) as told:
        find_layout({}, names, "the file")
    assert re.match(
        r"the file: a file with tensors under part0, .*, part7 and 1 more is not known", str(told.value)
    )
    assert "LAVIS BlipCaption" in str(told.value) and "transformers CLIPModel" in str(told.value)
    with pytest.raises(UserError, match="model_type 'llava' with tensors under vision is not known"):
        find_layout({"model_type": "llava"}, ["vision.x"], "it")


def test_weights_of_a_folder_stand_for_it_and_need_its_config(tmp_path):
    random_peer(BlipForConditionalGeneration, blip_config()).save_pretrained(tmp_path)
    assert load_pretrained(tmp_path / "model.safetensors").report.source == str(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(
        UserError, match=r"lacks the config.json of its transformers BlipForConditionalGeneration"
    ):
        load_pretrained(tmp_path / "model.safetensors")


def test_a_config_beside_an_original_file_is_not_its_own(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    file = save(Official().caption(), tmp_path / "model_base_caption.pth")
    assert load_pretrained(file).report.layout == "LAVIS BlipCaption"
    save_file({"a": torch.ones(1)}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=r"b.safetensors: a file with tensors under a is not known"):
        load_pretrained(tmp_path / "b.safetensors")
