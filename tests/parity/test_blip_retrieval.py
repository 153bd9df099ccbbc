"""Our retrieval model gives what transformers' BlipForImageTextRetrieval gives: ITC cosines and ITM logits.

transformers leaves the first token of a text as the tokenizer made it, [CLS]; the code that trained these
weights puts [ENC] there for ITM, as ours does. The peer is given the token ours puts.
"""

import pytest
import torch
from transformers import BlipForImageTextRetrieval

from openblip.convert.huggingface import to_huggingface
from tests.parity.peers import (
    CLS,
    ENC,
    TOLERANCE,
    blip_config,
    difference,
    other_activation,
    other_eps,
    ours,
    pixels,
    random_peer,
    swapped_k_and_v,
    swapped_q_and_k,
    texts,
    without,
)

IMAGES = pixels(3, 3, 32, 32)
IDS, MASK = texts([9, 4, 7], first=CLS)


@pytest.fixture(scope="module")
def peer():
    return random_peer(BlipForImageTextRetrieval, blip_config())


def beginning_with(token: int) -> torch.Tensor:
    ids = IDS.clone()
    ids[:, 0] = token
    return ids


@torch.no_grad()
def gap(model, peer, images=IMAGES) -> float:
    """The largest difference of image states, text states with and without image, cosines, ITM logits."""
    embeds = model.encode_image(images)
    memory = model.memory(embeds)
    real, enc = MASK.bool(), beginning_with(ENC)
    mine = {
        "image": embeds,
        "text": model.text_encoder(IDS, MASK)[real],
        "cosines": model.image_features(embeds) @ model.text_features(IDS, MASK).T,
        "text over image": model.text_encoder(enc, MASK, memory)[real],
        "itm": model.itm_logits(memory, IDS, MASK),
    }
    itc = peer(IDS, images, use_itm_head=False, attention_mask=MASK, interpolate_pos_encoding=True)
    itm = peer(enc, images, attention_mask=MASK, interpolate_pos_encoding=True)
    theirs = {
        "image": itc.last_hidden_state,
        "text": itc.question_embeds[real],
        "cosines": itc.itm_score,
        "text over image": itm.question_embeds[real],
        "itm": itm.itm_score,
    }
    return difference(mine, theirs)


@torch.no_grad()
def test_the_peer_looks_at_its_image_and_words(peer):
    for use_itm_head in (True, False):
        one_text = peer(IDS[:1].expand(3, -1), IMAGES, use_itm_head=use_itm_head).itm_score[:, 0]
        one_image = peer(
            IDS, IMAGES[:1].expand(3, -1, -1, -1), use_itm_head=use_itm_head
        ).itm_score.flatten()[:3]
        assert one_text.std() > 0.01, "images"
        assert one_image.std() > 0.01, "words"


def test_states_cosines_and_matching_are_the_same(peer):
    assert gap(ours(peer), peer) < TOLERANCE


def test_images_of_another_shape_give_the_same(peer):
    assert gap(ours(peer), peer, images=pixels(3, 3, 24, 48)) < TOLERANCE


@torch.no_grad()
def test_the_first_token_of_transformers_can_be_had(peer):
    model = ours(peer)
    model.config.text.enc_token_id = CLS
    itm = model.itm_logits(model.memory(model.encode_image(IMAGES)), IDS, MASK)
    assert (itm - peer(IDS, IMAGES, attention_mask=MASK).itm_score).abs().max() < TOLERANCE
    assert (itm - peer(beginning_with(ENC), IMAGES, attention_mask=MASK).itm_score).abs().max() > 0.01


@pytest.mark.parametrize(
    "fault",
    [
        other_eps("vision.", 0.1),
        other_eps("text_encoder.", 1e7),
        swapped_q_and_k("vision.blocks.0"),
        swapped_q_and_k("text_encoder.layers.1"),
        swapped_k_and_v("text_encoder.layers.1"),
        other_activation("vision.", "gelu_tanh"),
        other_activation("text_encoder.", "gelu_tanh"),
        without("vision.norm"),
        without("text_encoder.layers.1.cross_attention.residual.norm"),
        lambda model: model.itm_head.weight.data.copy_(model.itm_head.weight.flip(0)),
    ],
    ids=[
        "vision eps", "text eps", "vision q and k", "text q and k", "cross k and v", "vision tanh GELU",
        "text tanh GELU", "no final norm", "no cross norm", "class 0 = match",
    ],
)  # fmt: skip
def test_a_fault_is_seen(peer, fault):
    model = ours(peer)
    fault(model)
    assert gap(model, peer) > TOLERANCE


def test_it_goes_back(peer):
    config, weights = to_huggingface(ours(peer))
    assert config["image_text_hidden_size"] == peer.config.image_text_hidden_size
    assert weights.keys() == peer.state_dict().keys()
    assert all(torch.equal(value, peer.state_dict()[name]) for name, value in weights.items())
