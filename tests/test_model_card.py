"""The model card says what a model can do, by the parts it has, and what it stands on."""

from types import SimpleNamespace

import pytest
import torch

from openblip.model_card import model_card

STAGE1 = {"image_size": 32, "encoder": True, "decoder": True}
LM = {"config": {"model_type": "opt"}, "source": None, "sha256": None, "lora": None, "trainable": False}


def card(kind, frozen=None, info=None, **config):
    model = SimpleNamespace(parameters=lambda: [torch.zeros(3)], config=SimpleNamespace(**config))
    return model_card(model, kind, "mine", "1.0", info or {}, frozen)


@pytest.mark.parametrize("kind", ["blip", "blip2"])
def test_a_part_that_is_not_there_is_no_ability(kind):
    both = card(kind, **STAGE1)
    assert "captions images, says how well" in both and "model.caption" in both and "model.match" in both
    judge = card(kind, **STAGE1 | {"decoder": False})
    assert "says how well" in judge and "caption" not in judge
    writer = card(kind, **STAGE1 | {"encoder": False})
    assert "captions images" in writer and "match" not in writer


def test_a_bridge_without_heads():
    page = card("blip2", **STAGE1 | {"encoder": False, "decoder": False})
    assert "into query tokens" in page and "caption" not in page and "match" not in page


@pytest.mark.parametrize("heads", [False, True])
def test_a_model_with_a_language_model(heads):
    stage1 = SimpleNamespace(encoder=heads, decoder=heads, freeze_vision=True)
    lm = SimpleNamespace(**LM | {"source": "some/lm", "sha256": "abc"})
    page = card("blip2_llm", blip2=stage1, lm=lm, qformer_text=not heads, image_size=32)
    assert "model.answer" in page and "model.caption" in page and ("model.match" in page) == heads
    assert ("InstructBLIP" in page) == (not heads)
    frozen = page.split("## Frozen parts\n")[1].split("##")[0].strip().splitlines()
    assert frozen == [
        "- vision, the image tower",
        "- lm, the language model (opt): from some/lm (sha256 abc), not in this folder",
    ]


def test_named_parts_and_adapters():
    stage1 = SimpleNamespace(encoder=True, decoder=True, freeze_vision=True)
    lm = SimpleNamespace(**LM | {"lora": object()})
    options = {"blip2": stage1, "lm": lm, "qformer_text": False, "image_size": 32}
    page = card("blip2_llm", {"blip2.vision": "dinov2_small"}, **options)
    assert "- blip2.vision: dinov2_small, not in this folder\n- lm" in page and "- vision" not in page
    assert "(opt): in this folder; its LoRA adapters were trained" in page
    assert "Frozen" not in card("blip", **STAGE1) and "Frozen" not in card("clip", image_size=32)


def blip3(info=None, *, sampling="anyres", **lm):
    options = {"sampling": sampling, "grids": [(1, 2), (3, 1)], "freeze_vision": True}
    vision = SimpleNamespace(image_size=32)
    return card("blip3", info=info, vision=vision, lm=SimpleNamespace(**LM | lm), **options)


def test_a_blip3_says_what_it_learnt_and_how_it_sees():
    page = blip3({"stage": "blip3_sft"})
    assert "holds conversations about any number of pictures" in page
    assert "model.chat(" in page and "model.conversation()" in page and "model.answer(" in page
    assert "images of\nany size, which it sees as a whole and in up to 3 tiles of 32 x 32 pixels;" in page
    assert "images of\n32 x 32 pixels;" in blip3(sampling="fixed")
    base = blip3({"stage": "blip3_pretrain"})
    assert "goes on with documents" in base and "model.caption" in base and "model.chat" not in base


def test_a_language_model_that_was_trained_whole_is_not_frozen():
    assert "- lm, the language model (opt): in this folder" in blip3()
    page = blip3(trainable=True)
    assert "- vision, the image tower" in page and "- lm" not in page
