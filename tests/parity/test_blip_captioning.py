"""Our captioner gives what BlipForConditionalGeneration of transformers gives: states, loss, captions."""

import pytest
import torch
from transformers import BlipForConditionalGeneration

from openblip.convert.huggingface import to_huggingface
from openblip.models.generation import GenerationConfig
from openblip.train.objectives import labelled_positions, lm_loss, next_token_labels
from tests.parity.peers import (
    CLS,
    DEC,
    SEP,
    TOLERANCE,
    blip_config,
    cut,
    difference,
    make_talkative_,
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
    peer = random_peer(BlipForConditionalGeneration, blip_config(), seed=1)
    make_talkative_(peer.text_decoder)
    return peer


def started() -> torch.Tensor:
    ids = IDS.clone()
    ids[:, 0] = DEC
    return ids


@torch.no_grad()
def gap(model, peer, images=IMAGES) -> float:
    """The largest difference of image states, and of decoder states and logits of real tokens."""
    embeds = model.encode_image(images)
    states = model.lm_states(model.memory(embeds), IDS, MASK)
    theirs = peer(images, started(), MASK, interpolate_pos_encoding=True)
    told = peer.text_decoder.bert(started(), MASK, encoder_hidden_states=theirs.image_embeds, is_decoder=True)
    real = MASK.bool()
    return difference(
        {"image": embeds, "states": states[real], "logits": model.lm_logits(states[real])},
        {"image": theirs.image_embeds, "states": told.last_hidden_state[real], "logits": theirs.logits[real]},
    )


@torch.no_grad()
def test_the_peer_looks_at_its_image_and_words(peer):
    logits = peer(IMAGES, IDS[:1].expand(3, -1)).logits
    assert logits.std(dim=0).max() > 0.1, "images"
    assert logits.std(dim=1).max() > 0.1, "words"


def test_states_and_logits_are_the_same(peer):
    assert gap(ours(peer), peer) < TOLERANCE


@torch.no_grad()
def test_the_loss_is_the_same(peer):
    model = ours(peer)
    wanted, labels = labelled_positions(next_token_labels(IDS, MASK))
    states = model.lm_states(model.memory(model.encode_image(IMAGES)), IDS, MASK)[:, :-1][wanted]
    total, count = lm_loss(model.lm_logits(states), labels, smoothing=0.1)
    theirs = peer(IMAGES, started(), MASK, labels=IDS.masked_fill(MASK == 0, -100))
    assert abs(total / count - theirs.loss) < TOLERANCE


def test_images_of_another_shape_give_the_same(peer):
    assert gap(ours(peer), peer, images=pixels(3, 3, 48, 24)) < TOLERANCE


@pytest.mark.parametrize(
    "fault",
    [
        other_eps("vision.", 0.1),  # 1e-5 there, 1e-6 in the released code
        other_eps("text_decoder.", 1e7),  # 1e-12 for BERT, 1e-5 for everybody else
        other_eps("lm_head.", 1e7),
        swapped_q_and_k("vision.blocks.2"),
        swapped_q_and_k("text_decoder.layers.0"),
        swapped_k_and_v("text_decoder.layers.1"),
        other_activation("vision.", "gelu_tanh"),
        other_activation("text_decoder.", "gelu_tanh"),
        lambda model: setattr(model.lm_head, "act", torch.nn.ReLU()),
        without("vision.norm"),
        without("lm_head.norm"),
        without("text_decoder.embeddings.norm"),
    ],
    ids=[
        "vision eps", "text eps", "head eps", "vision q and k", "text q and k", "cross k and v",
        "vision tanh GELU", "text tanh GELU", "ReLU in the head", "no final norm", "no head norm",
        "no embedding norm",
    ],
)  # fmt: skip
def test_a_fault_is_seen(peer, fault):
    model = ours(peer)
    fault(model)
    assert gap(model, peer) > TOLERANCE


def test_an_image_normalised_twice_is_seen(peer):
    model = ours(peer)
    model.vision.norm = torch.nn.Sequential(model.vision.norm, model.vision.norm)
    assert gap(model, peer) > TOLERANCE


def test_a_missing_causal_mask_is_seen(peer):
    model = ours(peer)
    decoder = model.text_decoder.forward
    model.text_decoder.forward = lambda *args, causal, **options: decoder(*args, **options)
    assert gap(model, peer) > TOLERANCE


@pytest.mark.parametrize("prompt", [[], [7, 40, 3]], ids=["no prompt", "prompt"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 1, "max_new_tokens": 12},
        {"num_beams": 3, "max_new_tokens": 12},
        {"num_beams": 3, "max_new_tokens": 9, "min_new_tokens": 4, "length_penalty": 0.3},
        {"num_beams": 1, "max_new_tokens": 12, "repetition_penalty": 1.4},
    ],
    ids=["greedy", "beam 3", "beam 3, longer", "greedy, not repeating"],
)
@torch.no_grad()
def test_captions_are_the_same(peer, prompt, options):
    model, images = ours(peer), pixels(10, 3, 32, 32)
    prompts = torch.tensor([CLS, *prompt]).expand(10, -1)
    made = model.generate(model.memory(model.encode_image(images)), prompts, GenerationConfig(**options))
    ended = torch.cat([prompts, torch.full((10, 1), SEP)], dim=1)  # the peer drops the last token of a prompt
    theirs = peer.generate(images, ended, do_sample=False, **options)
    captions = cut(made.sequences)
    assert captions == cut(theirs[:, prompts.shape[1] :])
    assert len({tuple(caption) for caption in captions}) > 3, "captions depend on the image"
    assert len({len(caption) for caption in captions}) > 2, "captions end at different lengths"


def test_it_goes_back(peer):
    config, weights = to_huggingface(ours(peer))
    theirs = peer.config.to_dict()
    for section in ("text_config", "vision_config"):
        assert config[section] == {key: theirs[section][key] for key in config[section]}
    tied = {"text_decoder.cls.predictions.decoder.weight", "text_decoder.cls.predictions.decoder.bias"}
    assert weights.keys() == peer.state_dict().keys() - tied
    assert all(torch.equal(value, peer.state_dict()[name]) for name, value in weights.items())
