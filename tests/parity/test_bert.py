"""A text transformer that begins with a BERT gives what transformers' BERT gives, but for its types of tokens."""

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, BertModel

from openblip.convert.bert import bert_
from openblip.convert.weights import WeightsError
from openblip.models.text import LanguageModelHead, TextConfig, TextTransformer
from tests.parity.peers import TOLERANCE, other_activation, other_eps, random_peer, swapped_q_and_k, texts

WORDS = 128
CONFIG = TextConfig(
    WORDS + 2, 16, 2, 4, 24, max_position_embeddings=24, layer_norm_eps=1e-6, dec_token_id=WORDS, enc_token_id=WORDS + 1
)  # fmt: skip


def peer_of(cls):
    config = BertConfig(
        vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=24, layer_norm_eps=1e-6, attn_implementation="sdpa",
    )  # fmt: skip
    peer = random_peer(cls, config)
    body(peer).embeddings.token_type_embeddings.weight.data.zero_()
    return peer


def body(peer):
    return getattr(peer, "bert", peer)


def fresh() -> tuple[TextTransformer, LanguageModelHead]:
    torch.manual_seed(0)
    return TextTransformer(CONFIG, encoder_width=12).double().eval(), LanguageModelHead(
        CONFIG
    ).double().eval()


@torch.no_grad()
def gap(text: TextTransformer, peer) -> float:
    ids, mask = texts([9, 5, 12], first=101)
    real = mask.bool()
    wanted = body(peer)(input_ids=ids, attention_mask=mask).last_hidden_state
    return float((text(ids, mask) - wanted)[real].abs().max())


@pytest.mark.parametrize("cls", [BertModel, BertForMaskedLM, BertForPreTraining])
def test_states_are_those_of_bert(cls):
    peer = peer_of(cls)
    ids, mask = texts([9], first=101)
    states = body(peer)(input_ids=ids, attention_mask=mask).last_hidden_state
    assert (
        body(peer)(input_ids=ids.flip(1)).last_hidden_state.flip(1) - states
    ).abs().max() > 0.1  # it reads in order
    text, head = fresh()
    before = {name: value.clone() for name, value in text.state_dict().items()}
    bert_(text, peer.state_dict(), "peer", head)
    assert gap(text, peer) < TOLERANCE
    for name, value in text.state_dict().items():
        assert torch.equal(value, before[name]) == (".cross_attention." in name), name


@pytest.mark.parametrize(
    "fault", [other_eps("", 10), swapped_q_and_k("layers.1"), other_activation("", "gelu_tanh")],
    ids=["eps", "q and k", "tanh GELU"],
)  # fmt: skip
def test_a_fault_is_seen(fault):
    peer = peer_of(BertModel)
    text, _ = fresh()
    bert_(text, peer.state_dict(), "peer")
    fault(text)
    assert gap(text, peer) > TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("cls", [BertForMaskedLM, BertForPreTraining])
def test_the_head_that_writes_comes_along(cls):
    peer = peer_of(cls)
    peer.cls.predictions.bias.data = torch.randn(WORDS, dtype=torch.float64)
    text, head = fresh()
    bert_(text, peer.state_dict(), "peer", head)
    ids, mask = texts([9, 5], first=101)
    out = peer(input_ids=ids, attention_mask=mask)
    theirs = getattr(out, "logits", None) if hasattr(out, "logits") else out.prediction_logits
    mine = head(text(ids, mask), text.embeddings.word.weight)
    assert mine.shape[-1] == WORDS + 2
    assert (mine[..., :WORDS] - theirs)[mask.bool()].abs().max() < TOLERANCE


# ---------------------------------------------------------------------------------------- what becomes of the rest


def test_new_words_are_fresh_and_what_blip_has_not_is_named():
    text, head = fresh()
    peer = peer_of(BertForPreTraining)
    report = bert_(text, peer.state_dict(), "peer", head)
    assert report.fresh["embeddings.word.weight[128:]"] == report.fresh["lm_head.bias[128:]"]
    new = text.embeddings.word.weight[WORDS:]
    mean = text.embeddings.word.weight[:WORDS].mean(dim=0)
    assert (new - mean).std() < 0.04 and (new[0] - new[1]).std() > 0.01 and not head.bias[WORDS:].any()
    assert {name.partition(".")[0] for name in report.ignored} == {"embeddings", "pooler", "cls"}
    assert "no types" in report.ignored["embeddings.token_type_embeddings.weight"]
    assert list(report.tied) == ["cls.predictions.decoder.weight", "cls.predictions.decoder.bias"]
    loaded = {*text.state_dict(), *(f"lm_head.{name}" for name in head.state_dict())}
    assert loaded == {*report.loaded, *(name for name in report.fresh if "[" not in name)}
    again, other = fresh()
    bert_(again, peer.state_dict(), "peer", other)
    assert torch.equal(again.embeddings.word.weight, text.embeddings.word.weight)


def test_a_head_stays_as_it_was_where_there_is_none_and_is_left_where_it_is_not_wanted():
    text, head = fresh()
    before = {name: value.clone() for name, value in head.state_dict().items()}
    report = bert_(text, peer_of(BertModel).state_dict(), "peer", head)
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
    assert {f"lm_head.{name}" for name in before} < set(report.fresh)
    report = bert_(text, peer_of(BertForMaskedLM).state_dict(), "peer")
    assert "cls.predictions.transform.dense.weight" in report.ignored


def old_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the first files have it: LayerNorm.gamma and LayerNorm.beta, and a table of positions."""
    found = {"bert.embeddings.position_ids": torch.arange(24)[None]}
    for name, value in tensors.items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        found[name] = value
    return found


def test_the_names_of_old_files_are_read():
    peer = peer_of(BertForPreTraining)
    text, head = fresh()
    report = bert_(text, old_names(peer.state_dict()), "pytorch_model.bin", head)
    assert gap(text, peer) < TOLERANCE and "embeddings.position_ids" in report.ignored
    assert torch.equal(head.norm.weight, peer.cls.predictions.transform.LayerNorm.weight)


def test_another_bert_is_refused_and_nothing_changes():
    text, _ = fresh()
    before = {name: value.clone() for name, value in text.state_dict().items()}
    tensors = peer_of(BertModel).state_dict()
    with pytest.raises(WeightsError, match=r"no place for: encoder\.layer\.2\.output\.dense\.bias"):
        bert_(text, tensors | {"encoder.layer.2.output.dense.bias": torch.zeros(16)}, "peer")
    with pytest.raises(WeightsError, match=r"1 missing: encoder\.layer\.1\.attention\.self\.key\.bias"):
        bert_(
            text, {k: v for k, v in tensors.items() if k != "encoder.layer.1.attention.self.key.bias"}, "peer"
        )
    with pytest.raises(
        WeightsError, match=r"embeddings\.position\.weight is \[30, 16\], the model wants \[24, 16\]"
    ):
        bert_(text, tensors | {"embeddings.position_embeddings.weight": torch.zeros(30, 16)}, "peer")
    with pytest.raises(WeightsError, match=r"embeddings\.word\.weight is \[140, 16\]"):
        bert_(text, tensors | {"embeddings.word_embeddings.weight": torch.zeros(140, 16)}, "peer")
    untied = peer_of(BertForMaskedLM).state_dict()
    untied["cls.predictions.decoder.weight"] = untied["cls.predictions.decoder.weight"] + 1
    with pytest.raises(WeightsError, match="differ; in this model they are one tensor"):
        bert_(text, untied, "peer")
    assert all(torch.equal(value, before[name]) for name, value in text.state_dict().items())
