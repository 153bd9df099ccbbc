"""The vision transformer: shapes, positions at any size, recomputation, and backbones of transformers."""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch

from openblip.config import ConfigError, from_dict, to_dict
from openblip.models import vit
from openblip.models.blip import Blip, BlipConfig
from openblip.models.text import TextConfig
from openblip.models.vit import (
    HuggingFaceVision,
    VisionConfig,
    VisionTransformer,
    build_vision,
    resize_position_embedding,
    vit_base,
    vit_large,
)

TINY = VisionConfig(32, 8, 24, 3, 4, 32)
SMALL_BACKBONE = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "side", "tokens", "width"),
    [(vit_base(), 224, 197, 768), (vit_base(384), 384, 577, 768), (vit_base(480), 480, 901, 768),
     (vit_large(), 224, 197, 1024)],
)  # fmt: skip
def test_the_papers_shapes(config, side, tokens, width):
    with torch.device("meta"):
        assert VisionTransformer(config)(torch.empty(1, 3, side, side)).shape == (1, tokens, width)


def test_drop_path_grows_with_depth():
    with torch.device("meta"):
        rates = [block.drop_path.rate for block in VisionTransformer(vit_large()).blocks]
    assert rates == pytest.approx([0.1 * i / 23 for i in range(24)])
    assert (
        VisionTransformer(VisionConfig(32, 8, 24, 1, 4, 32, drop_path_rate=0.1)).blocks[0].drop_path.rate == 0
    )


def test_positions_of_the_own_grid_are_left_alone():
    table = torch.randn(1, 17, 6)
    assert resize_position_embedding(table, (4, 4)) is table


def cubic(values: torch.Tensor, size: int) -> torch.Tensor:
    """Cubic convolution (Keys 1981, a = -0.75 as in PyTorch) along the first axis, cell centres aligned."""

    def kernel(x: float) -> float:
        x, a = abs(x), -0.75
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    out = torch.zeros(size, *values.shape[1:], dtype=values.dtype)
    for i in range(size):
        place = (i + 0.5) * len(values) / size - 0.5
        for j in range(math.floor(place) - 1, math.floor(place) + 3):
            out[i] += kernel(place - j) * values[min(max(j, 0), len(values) - 1)]
    return out


def test_positions_of_another_grid_are_interpolated():
    table = torch.randn(1, 26, 6, dtype=torch.float64)
    resized = resize_position_embedding(table, (8, 3))
    grid = cubic(cubic(table[0, 1:].view(5, 5, 6), 8).transpose(0, 1), 3).transpose(0, 1)  # [8, 3, 6]
    torch.testing.assert_close(resized, torch.cat([table[0, :1], grid.flatten(0, 1)])[None])


def test_patches_come_in_raster_order():
    model = VisionTransformer(VisionConfig(32, 8, 4, 0, 1, 4, final_norm=False)).eval()
    with torch.no_grad():
        model.patch_embedding.weight.fill_(1 / 64)
        model.position_embedding.zero_()
    image = torch.zeros(1, 3, 32, 48)
    image[0, :, 8:16, 40:48] = 1  # second row, last of six columns
    with pytest.raises(ValueError, match="33 x 32 pixels: both sides must be multiples of 8"):
        model(torch.zeros(1, 3, 32, 33))
    tokens = model(image)
    assert tokens.shape == (1, 1 + 4 * 6, 4)
    assert tokens[0, :, 0].argmax() == 1 + 6 + 5
    torch.testing.assert_close(tokens[:, 0], model.class_embedding[:, 0])


@torch.no_grad()
def test_without_a_class_token_the_mean_stands_in_its_place_and_what_is_over_is_left_out():
    torch.manual_seed(0)
    model = VisionTransformer(VisionConfig(36, 8, 24, 2, 4, 32, class_token=False)).eval()
    assert "class_embedding" not in model.state_dict() and model.position_embedding.shape == (1, 16, 24)
    images = torch.randn(2, 3, 36, 36)
    tokens = model(images)
    assert tokens.shape == (2, 17, 24)
    torch.testing.assert_close(tokens[:, 0], tokens[:, 1:].mean(dim=1))
    images[:, :, 32:], images[:, :, :, 32:] = 9, 9
    assert torch.equal(model(images), tokens)
    assert model(torch.randn(1, 3, 24, 41)).shape == (1, 1 + 3 * 5, 24)
    resized = resize_position_embedding(model.position_embedding, (3, 5))
    with_class = resize_position_embedding(
        torch.cat([torch.ones(1, 1, 24), model.position_embedding], dim=1), (3, 5)
    )
    assert torch.equal(with_class, torch.cat([torch.ones(1, 1, 24), resized], dim=1))
    with pytest.raises(ValueError, match="18 position embeddings are no square grid"):
        resize_position_embedding(torch.zeros(1, 18, 24), (3, 5))


def test_models_read_as_many_channels_as_blocks_give():
    config = replace(TINY, output_blocks=(1, 3))
    assert from_dict(VisionConfig, json.loads(json.dumps(to_dict(config))), "config.json") == config
    text = TextConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24)
    model = Blip(BlipConfig(config, text)).eval()
    images = torch.randn(2, 3, 32, 32)
    embeds = model.encode_image(images)
    assert embeds.shape == (2, 17, 48)
    model.itm_logits(model.encoder_memory(embeds), torch.tensor([[5, 6], [7, 8]])).sum().backward()
    assert model.image_features(embeds).shape == (2, 256)
    assert all(block.mlp.fc1.weight.grad.abs().sum() > 0 for block in model.vision.blocks)


def gradients(model, images):
    model.zero_grad()
    torch.manual_seed(5)  # the same samples are dropped
    output = model(images)
    output.square().sum().backward()
    return output, [parameter.grad.clone() for parameter in model.parameters()]


def test_recomputing_activations_changes_nothing(monkeypatch):
    calls = []
    recompute = vit.checkpoint
    monkeypatch.setattr(
        vit, "checkpoint", lambda block, *a, **k: calls.append(block) or recompute(block, *a, **k)
    )
    model = VisionTransformer(VisionConfig(32, 8, 24, 3, 4, 32, drop_path_rate=0.5)).double().train()
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    plain = gradients(model, images)
    for setting, blocks in ((True, 3), (2, 2), (False, 0)):
        calls.clear()
        model.set_grad_checkpointing(setting)
        torch.testing.assert_close(gradients(model, images), plain, rtol=0, atol=0)
        assert calls == list(model.blocks)[3 - blocks :]
    model.set_grad_checkpointing(True)
    model.eval()(images)
    assert not calls, "nothing is recomputed outside of training"


@pytest.mark.parametrize(
    ("change", "message"),
    [({"image_size": 33}, "image_size 33 is not a multiple of patch_size 8"),
     ({"num_attention_heads": 5}, "hidden_size 24 is not a multiple of num_attention_heads 5"),
     ({"output_blocks": ()}, r"output_blocks are rising numbers from 1, the last 12, got \[\]"),
     ({"output_blocks": (0, 12)}, r"the last 12, got \[0, 12\]"),
     ({"output_blocks": (8, 10)}, r"the last 12, got \[8, 10\]"),
     ({"output_blocks": (10, 8, 12)}, r"the last 12, got \[10, 8, 12\]"),
     ({"output_blocks": (12,), "backbone": {"model_type": "vit"}}, "not of a backbone")],
)  # fmt: skip
def test_impossible_configs(change, message):
    with pytest.raises(ConfigError, match=message):
        VisionConfig(
            **{"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_attention_heads": 4} | change
        )


@pytest.mark.parametrize("kind", ["dinov2", "vit", "siglip_vision_model", "clip_vision_model"])
@torch.no_grad()
def test_backbones_of_transformers(kind):
    backbone = {"model_type": kind} | SMALL_BACKBONE
    config = VisionConfig(32, 8, 24, 2, 4, backbone=backbone)
    model = build_vision(config).eval()
    assert isinstance(model, HuggingFaceVision) and config.backbone == backbone, "the config is not used up"
    images = torch.randn(2, 3, 32, 32)
    theirs = model.model(pixel_values=images).last_hidden_state
    tokens = model(images)
    assert tokens.shape == (2, 17, 24), "a summary token, then patches"
    if kind == "siglip_vision_model":  # has none of its own
        torch.testing.assert_close(tokens[:, 0], theirs.mean(dim=1))
        theirs = torch.cat([tokens[:, :1], theirs], dim=1)
    assert torch.equal(tokens, theirs)
    assert (tokens[0] - tokens[1]).abs().max() > 1e-3


@torch.no_grad()
def test_a_convolutional_backbone_gives_tokens_too():
    backbone = {
        "model_type": "convnext",
        "hidden_sizes": [8, 24],
        "depths": [1, 1],
        "num_stages": 2,
        "patch_size": 4,
    }
    model = build_vision(VisionConfig(32, 8, 24, 2, 4, backbone=backbone)).eval()
    images = torch.randn(2, 3, 32, 48)
    maps = model.model(pixel_values=images).last_hidden_state  # [2, 24, 4, 6]
    tokens = model(images)
    assert tokens.shape == (2, 1 + 24, 24)
    torch.testing.assert_close(tokens[:, 1 + 6 + 2], maps[:, :, 1, 2])
    torch.testing.assert_close(tokens[:, 0], maps.mean(dim=(2, 3)))


@pytest.mark.filterwarnings("error::FutureWarning")  # that a newer transformers will not have it any more
def test_a_backbone_recomputes_its_activations_and_stops_again():
    model = build_vision(VisionConfig(32, 8, 24, 2, 4, backbone={"model_type": "dinov2"} | SMALL_BACKBONE))
    flags = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    model.set_grad_checkpointing()
    assert flags and all(module.gradient_checkpointing for module in flags)
    model.set_grad_checkpointing(False)
    assert not any(module.gradient_checkpointing for module in flags)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ({"model_type": "dinov9"} | SMALL_BACKBONE, "vision.backbone: .*dinov9"),
        (SMALL_BACKBONE, "vision.backbone: "),
        (
            {"model_type": "vit"} | SMALL_BACKBONE | {"hidden_size": 28},
            "hidden_size is 24, but the backbone's is 28",
        ),
    ],
)
def test_backbones_that_are_none(backbone, message):
    with pytest.raises(ConfigError, match=message):
        build_vision(VisionConfig(32, 8, 24, 2, 4, backbone=backbone))


def test_without_transformers_a_backbone_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'openblip\[hf\]'"):
        build_vision(VisionConfig(32, 8, 24, 2, 4, backbone={"model_type": "vit"} | SMALL_BACKBONE))
