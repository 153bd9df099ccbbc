"""Our BLIP-2 of stage 1 gives what transformers' Blip2ForImageTextRetrieval gives: the Q-Former's states of queries
and text, each alone and together, ITC cosines and ITM logits.

It has no head that writes; of ours, the decoder is left out.
"""

from dataclasses import replace

import pytest
import torch
from transformers import Blip2ForImageTextRetrieval

from openblip.config import UserError
from openblip.convert.huggingface import to_huggingface
from openblip.convert.recognise import from_checkpoint_
from openblip.convert.weights import WeightsError
from openblip.hub import load_pretrained, save_for_transformers
from openblip.models.blip2 import Blip2, without_decoder
from tests.parity.peers import (
    CLS,
    SEP,
    TOLERANCE,
    blip2_retrieval_config,
    difference,
    other_activation,
    other_eps,
    ours,
    pixels,
    random_peer,
    save_words,
    swapped_k_and_v,
    swapped_q_and_k,
    texts,
    without,
)

IMAGES = pixels(3, 3, 32, 32)
IDS, MASK = texts([9, 4, 7], first=CLS)
QUERIES = 5


@pytest.fixture(scope="module")
def peer():
    return random_peer(Blip2ForImageTextRetrieval, blip2_retrieval_config())


@torch.no_grad()
def gap(model, peer, images=IMAGES) -> float:
    """The largest difference of image states, Q-Former states (of real tokens), features, cosines and ITM logits."""
    embeds = model.encode_image(images)
    memory = model.memory(embeds)
    real = MASK.bool()
    both = torch.cat([MASK.new_ones(len(MASK), QUERIES), MASK], dim=1)
    image_features, text_features = model.image_features(embeds), model.text_features(IDS, MASK)
    mine = {
        "image": model.ln_vision(embeds),
        "queries": model.qformer.encode_queries(memory),
        "text": model.qformer.encode_text(IDS, MASK)[real],
        "both": model.qformer.encode_both(memory, IDS, MASK)[both.bool()],
        "image features": image_features,
        "text features": text_features,
        "cosines": model.similarity(image_features, text_features),
        "itm": model.itm_logits(memory, IDS, MASK),
    }
    seen = peer.vision_model(images, interpolate_pos_encoding=True).last_hidden_state
    queries = peer.query_tokens.expand(len(images), -1, -1)
    alone = peer.qformer(queries, encoder_hidden_states=seen).last_hidden_state
    together = peer.qformer(
        peer.embeddings(IDS, query_embeds=queries), QUERIES, both, encoder_hidden_states=seen
    ).last_hidden_state
    theirs = {"image": seen, "queries": alone, "both": together[both.bool()]}
    if images is IMAGES:  # the model as a whole takes no other size
        itc = peer(images, IDS, MASK)
        itm = peer(images, IDS, MASK, use_image_text_matching_head=True)
        theirs |= {
            "text": itc.text_model_output.last_hidden_state[real],
            "image features": itc.image_embeds,
            "text features": itc.text_embeds,
            "cosines": itc.logits_per_image,
            "itm": itm.logits_per_image,
        }
    return difference({name: mine[name] for name in theirs}, theirs)


@torch.no_grad()
def test_the_peer_looks_at_its_image_and_words(peer):
    one_image, one_text = IMAGES[:1].expand(3, -1, -1, -1), (IDS[:1].expand(3, -1), MASK[:1].expand(3, -1))
    for head in (True, False):
        by_image = peer(IMAGES, *one_text, use_image_text_matching_head=head).logits_per_image
        by_text = peer(one_image, IDS, MASK, use_image_text_matching_head=head).logits_per_image
        assert by_image[:, 0].std() > 0.01, "images"
        assert (by_text[:, 0] if head else by_text[0]).std() > 0.01, "words"


def test_states_cosines_and_matching_are_the_same(peer):
    assert gap(ours(peer), peer) < TOLERANCE


def test_images_of_another_shape_give_the_same(peer):
    assert gap(ours(peer), peer, images=pixels(3, 3, 24, 48)) < TOLERANCE


@torch.no_grad()
def test_a_row_of_text_chooses_its_image(peer):
    model = ours(peer)
    index = torch.tensor([2, 0, 0])
    itm = model.itm_logits(model.memory(model.encode_image(IMAGES)).rows(index), IDS, MASK)
    theirs = peer(IMAGES[index], IDS, MASK, use_image_text_matching_head=True).logits_per_image
    assert (itm - theirs).abs().max() < TOLERANCE


def queries_through_the_text_ffn(model: Blip2) -> None:
    for layer in model.qformer.layers:
        layer.query_feed_forward = layer.feed_forward


def text_positions_behind_the_queries(model: Blip2) -> None:
    words = model.qformer._words
    model.qformer._words = lambda ids, first: words(ids, first + QUERIES)


def cross_attention_of_another_layer(model: Blip2) -> None:
    first, _, third, _ = model.qformer.layers
    first.cross_attention, third.cross_attention = third.cross_attention, first.cross_attention


@pytest.mark.parametrize(
    "fault",
    [
        other_eps("vision.", 10),
        other_eps("ln_vision", 10),  # 1e-6 there, 1e-5 in the released code
        other_eps("qformer.", 1e7),
        swapped_q_and_k("vision.blocks.2"),
        swapped_q_and_k("qformer.layers.3"),
        swapped_k_and_v("qformer.layers.2"),
        other_activation("vision.", "gelu_tanh"),
        other_activation("qformer.layers.1", "gelu_tanh"),
        without("ln_vision"),
        without("qformer.norm"),
        queries_through_the_text_ffn,
        text_positions_behind_the_queries,
        cross_attention_of_another_layer,
        lambda model: model.itm_head.weight.data.copy_(model.itm_head.weight.flip(0)),
    ],
    ids=[
        "vision eps", "ln_vision eps", "Q-Former eps", "vision q and k", "Q-Former q and k", "cross k and v",
        "vision tanh GELU", "Q-Former tanh GELU", "no ln_vision", "no embedding norm", "one FFN", "positions",
        "layers exchanged", "class 0 = match",
    ],
)  # fmt: skip
def test_a_fault_is_seen(peer, fault):
    model = ours(peer)
    fault(model)
    assert gap(model, peer) > TOLERANCE


def test_it_goes_back(peer):
    model = ours(peer)
    config, weights = to_huggingface(model)
    assert weights.keys() == peer.state_dict().keys()
    assert all(torch.equal(value, peer.state_dict()[name]) for name, value in weights.items())
    theirs = peer.config.to_dict()
    for section in ("vision_config", "qformer_config"):
        added = {"cls_token_id", "sep_token_id", "dec_token_id"} if section == "qformer_config" else set()
        assert config[section].keys() - theirs[section].keys() == added
        assert all(theirs[section].get(key, value) == value for key, value in config[section].items())
    again, _ = from_checkpoint_(config, weights, "again")
    assert again.config == model.config
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


def test_a_folder_of_theirs_is_loaded_and_ours_is_theirs(peer, tmp_path):
    peer.save_pretrained(tmp_path / "theirs")
    save_words(tmp_path / "theirs")
    found = load_pretrained(tmp_path / "theirs", dtype=None)
    assert type(found.model) is Blip2 and found.report.layout == "transformers Blip2ForImageTextRetrieval"
    assert found.transform.image_size == 32 and found.transform.resize == "squash"
    assert found.report.fresh.keys() == {"temperature"} and not found.report.ignored
    assert found.report.loaded == [name for name in found.model.state_dict() if name != "temperature"]
    assert found.tokenizer(["w7 w9"])["input_ids"].tolist() == [[CLS, 7, 9, SEP]]
    save_for_transformers(found.model, tmp_path / "ours")
    again, info = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    assert gap(ours(peer), again.double().eval()) < TOLERANCE


def test_a_tensor_too_few_or_too_many_is_named(peer):
    config, weights = peer.config.to_dict(), dict(peer.state_dict())
    weights["qformer.encoder.layer.0.crossattention.attention.query.lora"] = torch.zeros(1)
    del weights["query_tokens"], weights["vision_model.post_layernorm.bias"]
    weights["query_tokens.weight"] = torch.zeros(1)
    with pytest.raises(WeightsError, match=r"query_tokens, vision_model.post_layernorm.bias; .*query.lora"):
        from_checkpoint_(config, weights, "the file")


def test_what_transformers_cannot_hold_is_refused(peer):
    config = ours(peer).config
    whole = Blip2(replace(config, decoder=True))
    with pytest.raises(UserError, match="without_decoder"):
        to_huggingface(whole)
    assert to_huggingface(without_decoder(whole))[1].keys() == peer.state_dict().keys()
    with pytest.raises(UserError, match=r"ln_vision_eps is 1e-05, vision.layer_norm_eps 1e-06"):
        to_huggingface(Blip2(replace(config, ln_vision_eps=1e-5)))
    with pytest.raises(UserError, match=r"built differently: vision.norm.bias"):
        to_huggingface(Blip2(replace(config, vision=replace(config.vision, final_norm=True))))
    theirs = peer.config.to_dict()
    theirs["vision_config"] |= {"qkv_bias": False}
    with pytest.raises(UserError, match="qkv_bias"):
        from_checkpoint_(theirs, peer.state_dict(), "the file")
