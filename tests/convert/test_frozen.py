"""A saved bridge names what it stands on, and refuses to stand on anything else."""

import json

import pytest
import torch
from safetensors.torch import load_file

from openblip.config import UserError
from openblip.convert import frozen
from openblip.convert.weights import WeightsError
from openblip.hub import load_pretrained, save_pretrained
from openblip.models.blip2 import Blip2, Blip2Config
from openblip.models.qformer import QFormerConfig
from openblip.models.vit import VisionConfig

SOURCES = {"vision": "dinov2_small", "qformer.word": "minilm_words"}


@pytest.fixture
def model():
    torch.manual_seed(0)
    vision = VisionConfig(32, 16, 16, 2, 2, 32)
    return Blip2(
        Blip2Config(vision, QFormerConfig(50, 16, 2, 2, 32, dec_token_id=3, cls_token_id=1, sep_token_id=2))
    )


@pytest.fixture
def packages(monkeypatch, model):
    """What the packages hold, at a size a test can have."""
    held = {
        "dinov2_small": {name: value.clone() for name, value in model.vision.state_dict().items()},
        "minilm_words": {"weight": model.qformer.word.weight.detach().clone()},
    }
    monkeypatch.setattr(frozen, "_fetch", lambda source, config: held[source])
    return held


def test_what_is_named_is_not_saved_and_comes_back(model, packages, tmp_path):
    save_pretrained(model, tmp_path / "whole")
    save_pretrained(model, tmp_path / "bridge", frozen=SOURCES)
    whole, bridge = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "bridge"))
    assert whole.keys() - bridge.keys() == {
        name for name in whole if name.startswith("vision.") or name == "qformer.word.weight"
    }
    found = load_pretrained(tmp_path / "bridge")
    assert found.frozen == SOURCES
    assert "vision comes from dinov2_small" in str(found.report)
    for name, value in model.state_dict().items():
        assert torch.equal(value, found.model.state_dict()[name]), name
    save_pretrained(found.model, tmp_path / "again", frozen=found.frozen)
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == bridge.keys()


@pytest.mark.parametrize("part", list(SOURCES))
def test_other_ground_is_refused(part, model, packages, tmp_path):
    save_pretrained(model, tmp_path, frozen=SOURCES)
    tensors = packages[SOURCES[part]]
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 0.1
    with pytest.raises(WeightsError, match=f"trained with another {part} than {SOURCES[part]}"):
        load_pretrained(tmp_path)


def test_half_precision_on_file(model, packages, tmp_path):
    save_pretrained(model, tmp_path, frozen=SOURCES, dtype=torch.bfloat16)
    saved = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}
    found = load_pretrained(tmp_path).model
    assert torch.equal(found.vision.patch_embedding.weight, model.vision.patch_embedding.weight), (
        "the source's own"
    )
    assert torch.equal(found.itm_head.weight, model.itm_head.weight.bfloat16().float())


@pytest.mark.parametrize(
    "sources, message",
    [({"vision": "clip"}, "no source is called 'clip'"), ({"tower": "minilm_words"}, "no such part")],
)
def test_mistakes_are_named(sources, message, model, tmp_path):
    with pytest.raises(UserError, match=message):
        save_pretrained(model, tmp_path, frozen=sources)


def test_an_unknown_source_on_file_is_refused(model, packages, tmp_path):
    save_pretrained(model, tmp_path, frozen=SOURCES)
    config = json.loads((tmp_path / "config.json").read_text())
    config["frozen"]["vision"]["source"] = "elsewhere"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"frozen.vision.source"):
        load_pretrained(tmp_path)
