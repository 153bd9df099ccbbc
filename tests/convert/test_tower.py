"""A pretrained tower goes into a model that has one of its geometry: all of it, or nothing."""

import pytest
import torch

from openblip.config import UserError
from openblip.convert.tower import load_tower_
from openblip.convert.weights import WeightsError
from openblip.models.vit import HuggingFaceVision, VisionConfig, VisionTransformer

SIGLIP = {
    "model_type": "siglip_vision_model", "image_size": 36, "patch_size": 14, "hidden_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 24, "vision_use_head": False,
}  # fmt: skip


def backbone(**changes) -> HuggingFaceVision:
    """A SigLIP tower; 36 pixels are two patches of 14, and what is over is left out, as at 384 px."""
    torch.manual_seed(0)
    settings = SIGLIP | changes
    return HuggingFaceVision(VisionConfig(36, 14, settings["hidden_size"], 2, 2, 24, backbone=settings))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A SigLIP with both of its towers, as it is on the hub."""
    from transformers import SiglipConfig, SiglipModel

    text = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    vision = {name: value for name, value in SIGLIP.items() if name not in ("model_type", "vision_use_head")}
    config = SiglipConfig(text_config={**text, "vocab_size": 20, "projection_size": 12}, vision_config=vision)
    torch.manual_seed(1)
    model = SiglipModel(config).eval()
    folder = tmp_path_factory.mktemp("siglip")
    model.save_pretrained(folder)
    return model, folder


def test_the_tower_of_a_larger_model_is_taken(whole):
    model, folder = whole
    vision = backbone().eval()
    pixels = torch.randn(2, 3, 36, 36)
    with torch.no_grad():
        theirs = model.vision_model(pixel_values=pixels).last_hidden_state
        assert (vision(pixels)[:, 1:] - theirs).abs().max() > 1e-3
        load_tower_(vision, str(folder))
        found = vision(pixels)
    assert theirs.shape == (2, 4, 12)
    torch.testing.assert_close(found[:, 1:], theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(found[:, 0], theirs.mean(dim=1), rtol=0, atol=1e-6)


def test_another_geometry_is_refused_and_nothing_changes(whole):
    vision = backbone(hidden_size=16)
    before = {name: value.clone() for name, value in vision.state_dict().items()}
    with pytest.raises(WeightsError, match="of another shape"):
        load_tower_(vision, str(whole[1]))
    with pytest.raises(WeightsError, match="missing"):
        load_tower_(backbone(num_hidden_layers=3), str(whole[1]))
    assert all(torch.equal(value, before[name]) for name, value in vision.state_dict().items())


def test_what_cannot_be_had_is_said(whole, tmp_path):
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tower_(backbone(), str(tmp_path))
    with pytest.raises(UserError, match="is no `backbone`"):
        load_tower_(VisionTransformer(VisionConfig(32, 16, 16, 1, 2, 32)), str(whole[1]))
    with pytest.raises(UserError, match="dinov2_small: is read into a tower of ours"):
        load_tower_(backbone(), "dinov2_small")
