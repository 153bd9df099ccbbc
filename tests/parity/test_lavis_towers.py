"""LAVIS's files of image towers, EVA-CLIP's ViT-g and CLIP's ViT-L, become ours and give what slow plain forwards give,
and a recipe begins with them.
"""

from dataclasses import replace

import pytest
import torch

from openblip.convert.lavis_towers import LAYOUTS as TOWER_LAYOUTS
from openblip.convert.weights import WeightsError
from openblip.data.transforms import ImageTransform
from openblip.hub import load_pretrained
from openblip.models.blip2 import Blip2Config
from openblip.models.qformer import QFormerConfig
from openblip.models.vit import VisionTransformer, clip_vit_l, eva_vit_g
from openblip.recipes.blip2 import blip2_stage1
from openblip.train.ingredients import prepare
from tests.parity.lavis_files import plain_clip, plain_eva
from tests.parity.peers import TOLERANCE, other_activation, other_eps, swapped_q_and_k, without
from tests.parity.peers_lavis import IMAGES, LARGER, WIDTH, clip_file, eva_file


@pytest.fixture(scope="module")
def eva(tmp_path_factory):
    return eva_file(tmp_path_factory)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return clip_file(tmp_path_factory)


@torch.no_grad()
def test_eva_gives_what_its_file_says(eva):
    file, tower, peer = eva
    found = load_pretrained(file, dtype=torch.float64)
    assert type(found.model) is VisionTransformer and found.report.layout == "LAVIS EVA-CLIP ViT-g"
    given = found.model(IMAGES)
    assert (given - plain_eva(tower, IMAGES, heads=2, blocks=3)).abs().max() < TOLERANCE
    assert (given - peer(IMAGES).last_hidden_state).abs().max() < TOLERANCE
    assert (given - plain_eva(tower, IMAGES, heads=2, blocks=4)).abs().max() > 0.01, "the last block counts"
    assert found.report.ignored.keys() == {name for name in tower if name.startswith("blocks.3.")}
    assert found.transform.image_size == 32 and found.transform.resize == "squash"


@torch.no_grad()
def test_clip_gives_what_its_file_says(clip, tmp_path):
    file, tower, peer = clip
    found = load_pretrained(file, dtype=torch.float64)
    given = found.model(IMAGES)
    assert (given - plain_clip(tower, IMAGES, heads=2, blocks=2)).abs().max() < TOLERANCE
    seen = peer(IMAGES, output_hidden_states=True).hidden_states
    assert (given - seen[-2]).abs().max() < TOLERANCE and (given - seen[-1]).abs().max() > 0.01
    last = {name for name in tower if name.startswith("transformer.resblocks.2.")}
    assert found.report.ignored.keys() == last | {"ln_post.weight", "ln_post.bias", "proj"}


@torch.no_grad()
def test_positions_are_resized_as_lavis_resizes_them(eva, clip):
    for (file, tower, _), plain, blocks, corners in ((eva, plain_eva, 3, False), (clip, plain_clip, 2, True)):
        found = load_pretrained(file, image_size=48, dtype=torch.float64)
        assert found.report.interpolated.keys() == {"position_embedding"}
        given = found.model(LARGER)
        wanted = plain(tower, LARGER, heads=2, blocks=blocks, align_corners=corners)
        other = plain(tower, LARGER, heads=2, blocks=blocks, align_corners=not corners)
        assert (given - wanted).abs().max() < TOLERANCE
        assert (given - other).abs().max() > 1e-3, "the corners count"


@pytest.mark.parametrize(
    "fault",
    [other_eps("blocks.1", 10), swapped_q_and_k("blocks.2"), other_activation("blocks.0", "gelu_tanh")],
    ids=["eps", "q and k", "tanh GELU"],
)
@torch.no_grad()
def test_a_fault_of_eva_is_seen(eva, fault):
    model = load_pretrained(eva[0], dtype=torch.float64).model
    fault(model)
    assert (model(IMAGES) - plain_eva(eva[1], IMAGES, heads=2, blocks=3)).abs().max() > TOLERANCE


@pytest.mark.parametrize(
    "fault",
    [
        other_eps("pre_norm", 0.1), other_eps("blocks.1", 0.1), swapped_q_and_k("blocks.1"),
        other_activation("blocks.0", "gelu"), without("pre_norm"),
    ],
    ids=["eps before", "eps", "q and k", "GELU", "no norm before"],
)  # fmt: skip
@torch.no_grad()
def test_a_fault_of_clip_is_seen(clip, fault):
    model = load_pretrained(clip[0], dtype=torch.float64).model
    fault(model)
    assert (model(IMAGES) - plain_clip(clip[1], IMAGES, heads=2, blocks=2)).abs().max() > TOLERANCE


@pytest.mark.parametrize(
    ("width", "blocks", "used"), [(1408, 40, 39), (1408, 39, 39), (1024, 24, 23), (1024, 23, 23)]
)
def test_of_the_released_towers_the_second_last_block_is_the_last(width, blocks, used):
    """Whether a file has one more or not."""
    empty = lambda *shape: torch.empty(shape, device="meta")  # noqa: E731
    if width == 1408:
        tensors = {"patch_embed.proj.weight": empty(width, 3, 14, 14), "pos_embed": empty(1, 257, width)}
        tensors |= {f"blocks.{number}.mlp.fc1.weight": empty(6144, width) for number in range(blocks)}
    else:
        tensors = {"conv1.weight": empty(width, 3, 14, 14), "positional_embedding": empty(257, width)}
        name = "transformer.resblocks.{}.mlp.c_fc.weight"
        tensors |= {name.format(number): empty(4096, width) for number in range(blocks)}
    config = TOWER_LAYOUTS[width == 1024].config({}, tensors)
    assert (config.num_hidden_layers, config.num_attention_heads, config.image_size) == (used, 16, 224)
    assert config.intermediate_size == (6144 if width == 1408 else 4096) and config.patch_size == 14


def test_the_towers_of_the_paper_have_their_geometry():
    with torch.device("meta"):
        giant, large = VisionTransformer(eva_vit_g()), VisionTransformer(clip_vit_l())
    count = [sum(value.numel() for value in tower.parameters()) for tower in (giant, large)]
    assert [round(number / 1e6) for number in count] == [986, 291]


def test_a_recipe_begins_with_the_file_of_a_tower(eva, clip):
    geometry = {"image_size": 48, "patch_size": 8, "num_attention_heads": 2, "intermediate_size": 40}
    kinds = [
        (eva, eva_vit_g(**geometry, hidden_size=WIDTH, num_hidden_layers=3), plain_eva, False),
        (clip, clip_vit_l(**geometry, hidden_size=128, num_hidden_layers=2), plain_clip, True),
    ]
    qformer = QFormerConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20)
    for (file, tensors, _), vision, plain, corners in kinds:
        recipe = replace(
            blip2_stage1(), vision_init=str(file), text_init=None, blip2=Blip2Config(vision, qformer)
        )
        made = prepare(recipe, [])
        tokens = made.model.encode_image(LARGER.float())
        tensors = {name: value.float() for name, value in tensors.items()}
        blocks = vision.num_hidden_layers
        wanted = plain(tensors, LARGER.float(), heads=2, blocks=blocks, align_corners=corners)
        torch.testing.assert_close(tokens, wanted, rtol=1e-4, atol=1e-4)
        assert not made.model.vision.patch_embedding.weight.requires_grad
        assert made.transform == ImageTransform(48) and made.frozen == {}, "it is saved with the model"


def test_a_tower_that_is_not_whole_is_named(eva, clip, tmp_path):
    for (_, tower, _), gone in (
        (eva, "blocks.1.attn.v_bias"),
        (clip, "transformer.resblocks.0.attn.in_proj_bias"),
    ):
        broken = {name: value for name, value in tower.items() if name != gone} | {"extra": torch.zeros(1)}
        torch.save(broken, tmp_path / "tower.pth")
        wanted = "blocks.1.attn.qkv.bias" if gone.endswith("v_bias") else gone
        with pytest.raises(WeightsError, match=rf"1 missing: {wanted}; .*extra"):
            load_pretrained(tmp_path / "tower.pth")
