"""Our Clip gives what transformers' CLIPModel gives."""

import pytest
import torch
from transformers import CLIPModel

from openblip.convert.huggingface import to_huggingface
from openblip.train.objectives import clip_loss
from tests.parity.peers import (
    TOLERANCE,
    clip_config,
    difference,
    other_activation,
    other_eps,
    ours,
    pixels,
    random_peer,
    swapped_q_and_k,
    texts,
    without,
)

IMAGES = pixels(3, 3, 32, 32)
# The end of text is not always the last token, and may come twice: the first one counts.
IDS, MASK = texts([12, 5, 8], first=98, last=99, high=98)


@pytest.fixture(scope="module")
def peer():
    return random_peer(CLIPModel, clip_config())


@torch.no_grad()
def gap(model, peer, images=IMAGES, ids=IDS) -> float:
    """The largest difference of states, features and logits; states of padding are not compared."""
    embeds = model.encode_image(images)
    image_features, text_features = model.image_features(embeds), model.text_features(ids, MASK)
    theirs = peer(ids, images, MASK, interpolate_pos_encoding=True)
    real = MASK.bool()
    return difference(
        {
            "image states": embeds,
            "text states": model.text(ids, MASK)[real],
            "image features": image_features,
            "text features": text_features,
            "logits": model.clamped_scale() * image_features @ text_features.T,
        },
        {
            "image states": theirs.vision_model_output.last_hidden_state,
            "text states": theirs.text_model_output.last_hidden_state[real],
            "image features": theirs.image_embeds,
            "text features": theirs.text_embeds,
            "logits": theirs.logits_per_image,
        },
    )


@torch.no_grad()
def test_the_peer_looks_at_its_inputs(peer):
    logits = peer(IDS, IMAGES, MASK).logits_per_image
    assert logits.std(dim=0).min() > 0.1, "images"
    assert logits.std(dim=1).min() > 0.1, "texts"


def test_features_and_logits_are_the_same(peer):
    assert gap(ours(peer), peer) < TOLERANCE


@torch.no_grad()
def test_the_loss_is_the_same(peer):
    model = ours(peer)
    images = model.image_features(model.encode_image(IMAGES))
    loss = clip_loss(images, model.text_features(IDS, MASK), model.clamped_scale())
    assert abs(loss - peer(IDS, IMAGES, MASK, return_loss=True).loss) < TOLERANCE


def test_images_of_another_shape_give_the_same(peer):
    assert gap(ours(peer), peer, images=pixels(3, 3, 40, 56)) < TOLERANCE


def test_a_text_that_ends_twice_is_pooled_at_the_first_end(peer):
    ids = IDS.clone()
    ids[0, 4] = 99
    assert gap(ours(peer), peer, ids=ids) < TOLERANCE


def test_old_files_that_mean_the_largest_id_by_end_2():
    peer = random_peer(CLIPModel, clip_config(eos_token_id=2))
    model = ours(peer)
    assert model.config.text.eos_token_id == 99
    assert gap(model, peer) < TOLERANCE


def pooled_at_the_end_of_the_row(model):
    model.config.text.eos_token_id = 0  # of no text: argmax then finds position 0


@pytest.mark.parametrize(
    "fault",
    [
        other_eps("vision.", 10),
        other_eps("text.", 0.1),
        swapped_q_and_k("vision.blocks.1"),
        swapped_q_and_k("text.blocks.0"),
        other_activation("vision.", "gelu"),
        other_activation("text.", "gelu"),
        without("vision.pre_norm"),
        without("vision_norm"),
        without("text.norm"),
        pooled_at_the_end_of_the_row,
    ],
    ids=[
        "vision eps", "text eps", "vision q and k", "text q and k", "vision GELU", "text GELU", "no pre-norm",
        "no vision norm", "no text norm", "pooled elsewhere",
    ],
)  # fmt: skip
def test_a_fault_is_seen(peer, fault):
    model = ours(peer)
    fault(model)
    assert gap(model, peer) > TOLERANCE


def test_it_goes_back(peer):
    config, weights = to_huggingface(ours(peer))
    for section in ("text_config", "vision_config"):
        theirs = peer.config.to_dict()[section]
        assert config[section] == {key: theirs[key] for key in config[section]}
    assert weights.keys() == peer.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in peer.state_dict().items())
