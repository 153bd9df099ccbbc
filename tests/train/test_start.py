"""What a model begins with: copied weights, counted; heads and towers fitted to the data."""

import pytest
import torch
from torch import nn

from openblip.config import UserError
from openblip.models.blip import Blip, BlipConfig
from openblip.models.blip_nlvr import BlipNlvrConfig
from openblip.models.blip_vqa import BlipVqaConfig
from openblip.models.vit import VisionTransformer, resize_position_embedding
from openblip.train.start import calibrate_heads_, nlvr_from, standardise_tower_, vqa_from
from tests.train import tiny

ATTENTION = "cross_attention.attention."


def pretrained(vision_width: int = 24) -> Blip:
    return tiny.stir_(tiny.blip(vision=tiny.vision(hidden_size=vision_width)), seed=7)


def assert_copied(model: nn.Module, source: Blip, fresh: list[str], renamed=lambda name: name) -> None:
    """All tensors but the fresh ones are the source's, in value and not in memory; the fresh ones are not."""
    theirs = source.state_dict()
    for name, value in model.state_dict().items():
        found = theirs.get(renamed(name))
        is_same = found is not None and found.shape == value.shape and torch.equal(found, value)
        assert is_same == (name not in fresh), name
        assert found is None or found.data_ptr() != value.data_ptr(), "fine-tuning must not change the source"


def test_vqa_takes_both_halves_and_with_equal_widths_nothing_is_fresh():
    source = pretrained(vision_width=32)
    model, fresh = vqa_from(source, BlipVqaConfig(source.config.vision, source.config.text))
    assert fresh == []
    assert_copied(model, source, fresh)
    encoder, decoder = model.text_encoder.layers[0], model.text_decoder.layers[0]
    assert torch.equal(encoder.feed_forward.mlp.fc1.weight, decoder.feed_forward.mlp.fc1.weight)
    assert encoder.feed_forward is not decoder.feed_forward, "no longer shared"


def test_vqa_of_another_vision_width_projects_question_states_by_fresh_weights():
    source = pretrained(vision_width=24)
    model, fresh = vqa_from(source, BlipVqaConfig(source.config.vision, source.config.text))
    assert fresh == [f"text_decoder.layers.{layer}.{ATTENTION}kv.weight" for layer in (0, 1)]
    assert_copied(model, source, fresh)


@pytest.mark.parametrize("width", [24, 32])
def test_nlvr_begins_with_two_copies_of_the_one_cross_attention(width):
    source = pretrained(width)
    model, fresh = nlvr_from(source, BlipNlvrConfig(source.config.vision, source.config.text))
    head = [f"cls_head.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")]
    merge = [f"text_encoder.layers.1.cross_attention.merge.{kind}" for kind in ("weight", "bias")]
    assert sorted(fresh) == sorted(merge + head), "the upper half of two layers is the second"

    def single(name: str) -> str:
        return name.replace("cross_attention.left.", ATTENTION).replace("cross_attention.right.", ATTENTION)

    assert_copied(model, source, fresh, single)
    for mine, theirs in zip(model.text_encoder.layers, source.text_encoder.layers):
        for twin in (mine.cross_attention.left, mine.cross_attention.right):
            assert twin.state_dict().keys() == theirs.cross_attention.attention.state_dict().keys()
            for name, value in theirs.cross_attention.attention.state_dict().items():
                assert torch.equal(twin.state_dict()[name], value)
    left, right = (getattr(model.text_encoder.layers[0].cross_attention, side) for side in ("left", "right"))
    assert left.q.weight.data_ptr() != right.q.weight.data_ptr(), "the twins part from here"


def test_position_embeddings_fit_a_higher_resolution():
    source = pretrained()
    config = BlipVqaConfig(tiny.vision(image_size=32), source.config.text)
    model, fresh = vqa_from(source, config)
    assert not any("position_embedding" in name for name in fresh)
    wanted = resize_position_embedding(source.vision.position_embedding, (4, 4))
    assert torch.equal(model.vision.position_embedding, wanted) and wanted.shape[1] == 17


def test_a_tower_of_several_blocks_is_not_standardised():
    tower = VisionTransformer(tiny.vision(num_hidden_layers=2, output_blocks=(1, 2)))
    with pytest.raises(UserError, match="gives several blocks"):
        standardise_tower_(tower, torch.randn(4, 3, 16, 16))


def test_a_standardised_tower_gives_channels_of_mean_0_and_deviation_1():
    torch.manual_seed(0)
    tower = tiny.stir_(VisionTransformer(tiny.vision())).eval()
    pixels = torch.randn(32, 3, 16, 16)
    with torch.no_grad():
        before = tower(pixels).flatten(0, 1)
        standardise_tower_(tower, pixels)
        after = tower(pixels).flatten(0, 1)
    assert before.mean(dim=0).abs().max() > 0.1 and (before.std(dim=0) - 1).abs().max() > 0.1
    torch.testing.assert_close(after.mean(dim=0), torch.zeros(24), atol=1e-4, rtol=0)
    torch.testing.assert_close(after.std(dim=0), torch.ones(24), atol=1e-4, rtol=0)


class Head(nn.Module):
    """A text encoder whose states are its ids, one channel each."""

    def forward(self, input_ids, attention_mask):
        return input_ids[:, None, 1:].float()


def sample(rows: int = 400, constant: int = 0, width: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Image embeds and ids with channels of very different means and scales, some of them constant."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-1, 1, width)
    embeds = 5 + torch.randn(rows, 1, width, generator=generator) * scale
    embeds[:, :, :constant] = 3.0
    ids = torch.randint(-300, 700, (rows, 1 + 32), generator=generator)
    ids[:, 1 : 1 + constant] = 40
    return embeds, ids


def calibrated(embeds: torch.Tensor, ids: torch.Tensor) -> Blip:
    torch.manual_seed(0)
    model = Blip(BlipConfig(vision=tiny.vision(), text=tiny.text(), projection_dim=256))
    model.text_encoder = Head()
    calibrate_heads_(model, embeds, ids, torch.ones_like(ids))
    return model


@pytest.mark.parametrize("constant", [0, 3])
def test_calibrated_heads_give_centred_features_of_unit_scale(constant):
    embeds, ids = sample(constant=constant)
    model = calibrated(embeds, ids)
    for head, x in ((model.vision_proj, embeds[:, 0]), (model.text_proj, ids[:, 1:].float())):
        features = head(x)
        torch.testing.assert_close(features.mean(dim=0), torch.zeros(256), atol=1e-3, rtol=0)
        assert features.std(dim=0).mean().item() == pytest.approx(1.0, abs=0.15)
    cosines = model.image_features(embeds) @ model.image_features(embeds).T
    assert cosines[~torch.eye(400, dtype=torch.bool)].mean().abs() < 0.02, "all near 1 without it"


@pytest.mark.parametrize("constant", [3, 20])
def test_constant_channels_do_not_blow_up(constant):
    """They may move in other data, and what moved little in the sample must not drown the rest there."""
    embeds, ids = sample(constant=constant)
    model = calibrated(embeds, ids)
    varying = model.vision_proj.weight[:, constant:]
    assert model.vision_proj.weight.isfinite().all() and model.text_proj.weight.isfinite().all()
    assert model.vision_proj.weight[:, :constant].abs().max() < 100 * varying.abs().max()


@pytest.mark.filterwarnings("ignore:std")
def test_a_sample_of_one_leaves_the_scale_alone():
    embeds, ids = sample(rows=1)
    model = calibrated(embeds, ids)
    assert model.vision_proj.weight.isfinite().all()
    torch.testing.assert_close(model.vision_proj(embeds[:, 0]), torch.zeros(1, 256), atol=1e-4, rtol=0)
