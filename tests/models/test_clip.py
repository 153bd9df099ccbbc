"""CLIP's two towers: what its vectors are, and what does not change them."""

import math

import torch
import torch.nn.functional as F

from openblip.models.clip import Clip, ClipConfig, ClipTextConfig, clip_vision

CONFIG = ClipConfig(
    clip_vision(32, 8, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32),
    ClipTextConfig(60, 16, 2, 4, 24, max_position_embeddings=10, eos_token_id=59),
    projection_dim=12,
)
IDS = torch.tensor([[58, 7, 8, 59, 0, 0], [58, 9, 4, 5, 6, 59], [58, 7, 59, 59, 8, 59]])
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


def clip() -> Clip:
    model = Clip(CONFIG).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def test_the_papers_shapes():
    with torch.device("meta"):
        model = Clip(ClipConfig())
        embeds = model.encode_image(torch.empty(2, 3, 224, 224))
    assert embeds.shape == (2, 197, 768)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == 150  # ViT-B/16: 149.6M
    assert model.vision.patch_embedding.bias is None and model.vision_proj.bias is None
    assert model.config.vision.hidden_act == model.config.text.hidden_act == "quick_gelu"


@torch.no_grad()
def test_vectors_are_projections_of_length_one():
    model = clip()
    embeds = model.encode_image(torch.randn(3, 3, 32, 32, dtype=torch.float64))
    images, texts = model.image_features(embeds), model.text_features(IDS, MASK)
    for features in (images, texts):
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(3, dtype=torch.float64))
    normed = F.layer_norm(embeds[:, 0], (24,), model.vision_norm.weight, model.vision_norm.bias, 1e-5)
    torch.testing.assert_close(images, F.normalize(normed @ model.vision_proj.weight.T, dim=-1))
    states = model.text(IDS, MASK)
    pooled = torch.stack([states[0, 3], states[1, 5], states[2, 2]])  # at the first end of text
    torch.testing.assert_close(texts, F.normalize(pooled @ model.text_proj.weight.T, dim=-1))


@torch.no_grad()
def test_what_comes_after_the_end_changes_nothing():
    model = clip()
    wanted = model.text_features(IDS, MASK)
    torch.testing.assert_close(model.text_features(IDS), wanted, msg="without a mask: it is causal")
    torch.testing.assert_close(model.text_features(IDS[:1, :4]), wanted[:1])
    other = IDS.clone()
    other[0, 4:], other[2, 3:] = 33, 34
    torch.testing.assert_close(model.text_features(other, MASK), wanted)
    other[:, 1] = 35
    assert (model.text_features(other, MASK) - wanted).abs().amax(dim=1).min() > 1e-3


@torch.no_grad()
def test_the_scale_is_at_most_100():
    model = clip()
    assert math.isclose(model.logit_scale.item(), math.log(1 / 0.07), rel_tol=1e-6)
    assert math.isclose(model.clamped_scale().item(), 1 / 0.07, rel_tol=1e-6)
    model.logit_scale.fill_(9)
    assert math.isclose(model.clamped_scale().item(), 100, rel_tol=1e-12)


def test_recomputing_activations_changes_nothing():
    model, pixel_values = clip().train(), torch.randn(3, 3, 32, 32, dtype=torch.float64)

    def run():
        model.zero_grad()
        images = model.image_features(model.encode_image(pixel_values))
        logits = model.clamped_scale() * images @ model.text_features(IDS, MASK).T
        F.cross_entropy(logits, torch.arange(3)).backward()
        return logits, [parameter.grad.clone() for parameter in model.parameters()]

    plain = run()
    model.set_grad_checkpointing()
    assert model.vision.checkpointed == 2 and model.text.checkpointing
    torch.testing.assert_close(run(), plain, rtol=0, atol=0)
