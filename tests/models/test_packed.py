"""Weights in oneDNN's layout: the same products, and never those of a weight that is no longer there."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from openblip.models.int8 import Int8Linear, to_int8_
from openblip.models.packed import PackedLinear, pack_
from openblip.models.text import LanguageModelHead, TextConfig


@pytest.fixture
def calls(monkeypatch):
    """How often a linear layer went the usual way."""
    found = []
    plain = F.linear
    monkeypatch.setattr(F, "linear", lambda *given: found.append(1) or plain(*given))
    return found


def rows():
    """Inputs of 20 columns in every shape a model has, views among them."""
    x = torch.randn(6, 7, 20)
    return [x, x[:0], x[0], x[:1, :1], x[:, 2], x[:, :3], torch.randn(20, 6).T, torch.randn(6, 40)[:, ::2]]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_packed_layers_give_what_plain_ones_give(dtype, off, bias, calls):
    plain = nn.Linear(20, 33, bias=bias, dtype=dtype)
    packed = pack_(copy.deepcopy(plain))
    assert isinstance(packed, PackedLinear)
    with torch.no_grad():
        for x in (x.to(dtype) for x in rows()):
            wanted = plain(x)
            calls.clear()
            found = packed(x)
            assert not calls and found.dtype is dtype
            torch.testing.assert_close(found, wanted, rtol=off, atol=off)


def test_a_changed_weight_is_packed_anew():
    layer, x = pack_(nn.Linear(20, 33)).requires_grad_(False), torch.randn(4, 20)
    before = layer(x)
    made = layer.packed._made
    assert layer(x).equal(before) and layer.packed._made is made, "packed once"
    layer.weight.mul_(2)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    layer.load_state_dict({"weight": torch.ones(33, 20), "bias": torch.zeros(33)})
    torch.testing.assert_close(layer(x), x.sum(dim=1, keepdim=True).expand(4, 33))
    layer.weight = nn.Parameter(torch.zeros(33, 20), requires_grad=False)
    assert layer(x).abs().max() == 0
    layer.to(torch.bfloat16)
    assert layer(x.bfloat16()).dtype is torch.bfloat16
    for _ in range(20):  # where the old weight was, a new one may come to lie
        layer.weight = None
        layer.weight = nn.Parameter(torch.randn(33, 20), requires_grad=False)
        layer.bias = nn.Parameter(torch.randn(33), requires_grad=False)
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    with torch.inference_mode():  # whose tensors count no changes
        made = pack_(nn.Linear(20, 33))
        torch.testing.assert_close(made(x), F.linear(x, made.weight, made.bias))


def test_what_has_a_gradient_goes_the_usual_way(calls):
    layer, x = pack_(nn.Linear(20, 33)), torch.randn(4, 20)
    layer(x).sum().backward()
    assert layer.weight.grad.abs().max() > 0
    layer.requires_grad_(False)
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad.abs().max() > 0 and len(calls) == 2
    layer.double()
    layer(x.detach().double())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(x.detach()).dtype is torch.bfloat16
    assert len(calls) == 4


def test_threads_may_ask_at_once():
    for _ in range(5):
        layer, x = pack_(nn.Linear(2048, 2048)).requires_grad_(False), torch.randn(4, 2048)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(layer, [x] * 8))
        assert all(one.equal(found[0]) for one in found)


def test_copies_pack_for_themselves():
    layer, x = pack_(nn.Linear(20, 33)).requires_grad_(False), torch.randn(4, 20)
    wanted = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.packed is not layer.packed and other.packed._made is None
        assert other(x).equal(wanted)
    assert layer.state_dict().keys() == {"weight", "bias"}


def test_the_head_of_a_text_transformer_packs_the_words_it_shares(calls):
    config = TextConfig(
        vocab_size=50, hidden_size=20, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    head, words, states = (
        LanguageModelHead(config).requires_grad_(False),
        torch.randn(50, 20),
        torch.randn(3, 20),
    )
    wanted = head(states, words)
    calls.clear()
    torch.testing.assert_close(pack_(head)(states, words), wanted)
    assert not calls


def test_what_is_too_large_or_has_8_bits_is_not_packed(monkeypatch):
    model = nn.Sequential(nn.Linear(20, 33), nn.Linear(33, 5))
    monkeypatch.setattr("openblip.models.packed._MOST", 700)
    assert not any(isinstance(layer, PackedLinear) for layer in pack_(model))
    monkeypatch.setattr("openblip.models.packed._MOST", 900)
    assert all(isinstance(layer, PackedLinear) for layer in pack_(model))
    assert all(isinstance(layer, Int8Linear) for layer in to_int8_(model))
    assert isinstance(pack_(model)[0], Int8Linear)
