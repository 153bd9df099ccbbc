"""A pretrained tower goes into a model that has one of its geometry: all of it, or nothing."""

from dataclasses import replace

import pytest
import torch

from openblip.config import UserError
from openblip.convert.tower import load_tower_
from openblip.convert.weights import WeightsError
from openblip.models.blip2 import Blip2Config
from openblip.models.qformer import QFormerConfig
from openblip.models.vit import (
    HuggingFaceVision,
    VisionConfig,
    VisionTransformer,
    clip_vit_l,
    eva_vit_g,
    resize_position_embedding,
)
from openblip.recipes.blip2 import blip2_stage1
from openblip.train.ingredients import prepare

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


def eva_file(path, blocks: int = 3, side: int = 2) -> dict[str, torch.Tensor]:
    """An EVA-CLIP of one head of 88 channels, of which all blocks but the last are used."""
    torch.manual_seed(2)
    width = 88
    tensors = {
        "cls_token": torch.randn(1, 1, width),
        "pos_embed": torch.randn(1, 1 + side * side, width),
        "patch_embed.proj.weight": torch.randn(width, 3, 8, 8),
        "patch_embed.proj.bias": torch.randn(width),
    }
    shapes = {"norm1": (width,), "norm2": (width,), "attn.proj": (width, width), "mlp.fc1": (20, width)}
    shapes |= {"mlp.fc2": (width, 20)}
    for number in range(blocks):
        for name, shape in shapes.items():
            tensors[f"blocks.{number}.{name}.weight"] = torch.randn(shape)
            tensors[f"blocks.{number}.{name}.bias"] = torch.randn(shape[0])
        tensors[f"blocks.{number}.attn.qkv.weight"] = torch.randn(3 * width, width)
        tensors |= {f"blocks.{number}.attn.{one}_bias": torch.randn(width) for one in "qv"}
    torch.save(tensors, path)
    return tensors


def eva(**changes) -> VisionTransformer:
    settings = {"hidden_size": 88, "num_attention_heads": 1, "num_hidden_layers": 2, "intermediate_size": 20}
    return VisionTransformer(
        VisionConfig(**{"image_size": 16, "patch_size": 8, "final_norm": False, **settings, **changes})
    )


def test_a_file_of_eva_is_known_by_its_keys(tmp_path):
    tensors = eva_file(tmp_path / "any.name")
    vision = eva(drop_path_rate=0.1)
    load_tower_(vision, str(tmp_path / "any.name"))
    assert torch.equal(vision.blocks[1].mlp.fc1.weight, tensors["blocks.1.mlp.fc1.weight"])
    bias = vision.blocks[0].attention.qkv.bias
    assert torch.equal(bias[:88], tensors["blocks.0.attn.q_bias"]) and not bias[88:176].any()
    larger = eva(image_size=32)
    load_tower_(larger, str(tmp_path / "any.name"))
    wanted = resize_position_embedding(tensors["pos_embed"], (4, 4))
    assert torch.equal(larger.position_embedding, wanted)


def test_a_file_of_another_geometry_is_refused(tmp_path):
    eva_file(tmp_path / "eva.pth")
    before = eva(num_hidden_layers=3)
    state = {name: value.clone() for name, value in before.state_dict().items()}
    with pytest.raises(UserError, match="EVA-CLIP ViT-g has num_hidden_layers 2 and not 3"):
        load_tower_(before, str(tmp_path / "eva.pth"))
    assert all(torch.equal(value, state[name]) for name, value in before.state_dict().items())
    with pytest.raises(UserError, match="final_norm False and not True"):
        load_tower_(eva(final_norm=True), str(tmp_path / "eva.pth"))
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="no image tower of BLIP-2"):
        load_tower_(eva(), str(tmp_path / "other.pth"))


def test_a_recipe_begins_with_a_file_of_a_tower(tmp_path):
    tensors = eva_file(tmp_path / "eva.pth")
    qformer = QFormerConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20)
    stage1 = Blip2Config(eva().config, qformer)
    recipe = replace(blip2_stage1(), vision_init=str(tmp_path / "eva.pth"), blip2=stage1)
    made = prepare(recipe, [])
    assert torch.equal(made.model.vision.patch_embedding.weight, tensors["patch_embed.proj.weight"])
    assert not made.model.vision.patch_embedding.weight.requires_grad
    assert made.transform.image_size == 16 and made.frozen == {}, "and is saved with the model"


def test_the_towers_of_the_paper_have_their_geometry():
    with torch.device("meta"):
        giant, large = VisionTransformer(eva_vit_g()), VisionTransformer(clip_vit_l())
    count = [sum(value.numel() for value in tower.parameters()) for tower in (giant, large)]
    assert [round(number / 1e6) for number in count] == [986, 291]
