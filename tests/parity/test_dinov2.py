"""Our VisionTransformer as DINOv2 gives what transformers' Dinov2Model gives."""

from dataclasses import replace

import pytest
import torch
from transformers import Dinov2Backbone, Dinov2Model

from openblip.config import UserError
from openblip.convert.huggingface import to_huggingface
from openblip.models.vit import VisionTransformer
from tests.parity.peers import (
    TOLERANCE,
    difference,
    dinov2_config,
    other_activation,
    other_eps,
    ours,
    pixels,
    random_peer,
    swapped_q_and_k,
    without,
)


@pytest.fixture(scope="module")
def peer():
    return random_peer(Dinov2Model, dinov2_config())


@torch.no_grad()
def gap(model, peer, images) -> float:
    """The largest difference of all tokens after every block and after the final norm."""
    states = []
    hooks = [
        block.register_forward_hook(lambda _m, _i, output: states.append(output)) for block in model.blocks
    ]
    final = model(images)
    for hook in hooks:
        hook.remove()
    theirs = peer(images, output_hidden_states=True)
    mine = {f"block {i}": state for i, state in enumerate(states)}
    wanted = {f"block {i}": state for i, state in enumerate(theirs.hidden_states[1:])}
    return difference(mine | {"final": final}, wanted | {"final": theirs.last_hidden_state})


def test_the_peer_looks_at_its_image(peer):
    a, b = (peer(pixels(1, 3, 32, 32, seed=seed)).last_hidden_state for seed in (1, 2))
    assert (a - b).abs().max() > 0.1


def test_tokens_are_the_same(peer):
    assert gap(ours(peer), peer, pixels(2, 3, 32, 32)) < TOLERANCE


def test_tokens_of_images_of_another_shape_are_the_same():
    # transformers interpolates DINOv2's position embeddings in float32 even here, so ours has to.
    peer = random_peer(Dinov2Model, dinov2_config())
    table = peer.embeddings.position_embeddings
    table.data = table.data.float().double()
    model = ours(peer)
    model.position_embedding.data = model.position_embedding.data.float()
    assert gap(model, peer, pixels(2, 3, 48, 40)) < TOLERANCE


@pytest.mark.parametrize(
    "fault",
    [
        other_eps("", 10),
        swapped_q_and_k("blocks.1"),
        other_activation("blocks.2", "gelu_tanh"),
        without("norm"),
        without("blocks.0.scale1"),
        without("blocks.2.scale2"),
    ],
    ids=["eps", "q and k", "tanh GELU", "no final norm", "no first layer scale", "no last layer scale"],
)
def test_a_fault_is_seen(peer, fault):
    model = ours(peer)
    fault(model)
    assert gap(model, peer, pixels(2, 3, 32, 32)) > TOLERANCE


@torch.no_grad()
def several(peer, blocks) -> VisionTransformer:
    """Our tower with the peer's weights, that gives what these blocks give."""
    tower = ours(peer)
    model = VisionTransformer(replace(tower.config, output_blocks=blocks)).double().eval()
    model.load_state_dict(tower.state_dict())
    return model


@torch.no_grad()
def test_tokens_of_several_blocks_are_those_of_its_backbone(peer):
    backbone = random_peer(Dinov2Backbone, dinov2_config(out_indices=[1, 3], reshape_hidden_states=False))
    backbone.load_state_dict(peer.state_dict())
    images = pixels(2, 3, 32, 32)
    theirs = torch.cat(backbone(images).feature_maps, dim=-1)
    mine = several(peer, (1, 3))(images)
    assert mine.shape[-1] == several(peer, (1, 3)).config.output_size == 48
    assert (mine - theirs).abs().max() < TOLERANCE
    assert torch.equal(mine[..., 24:], ours(peer)(images))  # the last is what the tower alone gives
    assert (several(peer, (2, 3))(images) - theirs).abs().max() > 0.1


def test_several_blocks_do_not_go_back(peer):
    with pytest.raises(UserError, match="reads one block of its image tower, not output_blocks"):
        to_huggingface(several(peer, (1, 3)))


def test_it_goes_back(peer):
    config, weights = to_huggingface(ours(peer))
    again = peer.config.to_dict()
    again = peer.config.to_dict() | {"architectures": ["Dinov2Model"]}
    assert config == {key: again[key] for key in config}
    theirs = {name: value for name, value in peer.state_dict().items() if name != "embeddings.mask_token"}
    assert weights.keys() == theirs.keys()
    assert all(torch.equal(weights[name], value) for name, value in theirs.items())
