"""Attention against torch's own, and the small bricks against their formulas."""

import math

import pytest
import torch
from torch import nn

from openblip.models import layers
from openblip.models.layers import ACTIVATIONS, Attention, DropPath, LayerScale, Mlp, attend, init_weights


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def slow_attention(q, k, v, mask):
    """One query after the other."""
    out = torch.zeros(q.shape, dtype=q.dtype)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])):
        seen = [j for j in range(k.shape[2]) if mask[b, 0, i, j]]
        scores = torch.stack([q[b, h, i] @ k[b, h, j] / math.sqrt(q.shape[-1]) for j in seen])
        out[b, h, i] = sum(p * v[b, h, j] for p, j in zip(scores.exp() / scores.exp().sum(), seen))
    return out


def test_both_kernels_are_softmax_attention():
    q, k, v = random(2, 3, 4, 5), random(2, 3, 6, 5), random(2, 3, 6, 5)
    mask = torch.rand(2, 1, 4, 6) < 0.6
    mask[..., 0] = True  # nobody sees nothing
    wanted = slow_attention(q, k, v, mask)
    weights: list[torch.Tensor] = []
    torch.testing.assert_close(attend(q, k, v, mask), wanted)
    torch.testing.assert_close(attend(q, k, v, mask, weights=weights), wanted)
    torch.testing.assert_close(attend(q, k, v), slow_attention(q, k, v, torch.ones_like(mask)))
    (probabilities,) = weights
    assert probabilities.shape == (2, 3, 4, 6)
    torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(2, 3, 4, dtype=torch.float64))
    assert (probabilities.masked_select(~mask) == 0).all()


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_stays_bfloat16_and_close(autocast):
    q, k, v = random(2, 3, 4, 8), random(2, 3, 6, 8), random(2, 3, 6, 8)
    mask = torch.arange(6) < 4
    wanted = slow_attention(q, k, v, mask.expand(2, 1, 4, 6))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=0.03)


def test_kept_probabilities_stay_in_the_graph():
    q, k, v = random(1, 2, 3, 4), random(1, 2, 3, 4).requires_grad_(), random(1, 2, 3, 4)
    weights: list[torch.Tensor] = []
    attend(q, k, v, weights=weights).sum().backward(inputs=[weights[0], k])
    torch.testing.assert_close(weights[0].grad, v.sum(-1)[:, :, None, :].expand(-1, -1, 3, -1))
    assert k.grad.abs().max() > 0


def test_self_attention_is_torchs_multi_head_attention():
    ours, theirs = Attention(12, 3).double(), nn.MultiheadAttention(12, 3, batch_first=True).double()
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.qkv.weight.data, ours.qkv.bias.data
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    x, padding = random(2, 5, 12), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    wanted, _ = theirs(x, x, x, key_padding_mask=~padding)
    torch.testing.assert_close(ours(x, mask=padding[:, None, None, :])[0], wanted)


def test_cross_attention_is_torchs_multi_head_attention():
    ours = Attention(12, 3, kv_size=7).double()
    theirs = nn.MultiheadAttention(12, 3, kdim=7, vdim=7, batch_first=True).double()
    theirs.q_proj_weight.data = ours.q.weight.data
    theirs.k_proj_weight.data, theirs.v_proj_weight.data = ours.kv.weight.data.chunk(2)
    theirs.in_proj_bias.data = torch.cat([ours.q.bias.data, ours.kv.bias.data])
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    x, memory = random(2, 5, 12), random(2, 4, 7)
    wanted, _ = theirs(x, memory, memory)
    torch.testing.assert_close(ours(x, memory=ours.project(memory))[0], wanted)


def test_rows_of_queries_share_the_memory_of_their_image():
    attention = Attention(12, 3, kv_size=7).double()
    x, memory = random(6, 5, 12), random(2, 4, 7)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0]]).bool()
    projected = attention.project(memory)
    weights: list[torch.Tensor] = []
    together = attention(x, memory=projected, mask=mask[:, None, None, :], weights=weights)[0]
    for row in range(6):
        image = row // 3
        own = attention.project(memory[image : image + 1])
        alone = attention(x[row : row + 1], memory=own, mask=mask[image, None, None, None, :])[0]
        torch.testing.assert_close(together[row : row + 1], alone)
    assert weights[0].shape == (2, 3, 15, 4), "three rows of five queries side by side"
    with pytest.raises(ValueError, match="5 rows of queries cannot be shared out evenly over 2 images"):
        attention(x[:5], memory=projected)


def test_keys_and_values_of_the_past_count():
    attention = Attention(12, 3).double()
    x = random(2, 5, 12)
    causal = torch.ones(5, 5).tril().bool()[None, None]
    whole, (keys, values) = attention(x, mask=causal)
    past, pieces = None, []
    for i in range(5):
        y, past = attention(x[:, i : i + 1], past=past)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
    torch.testing.assert_close(past, (keys, values))


def test_attention_drops_out_only_in_training():
    attention = Attention(12, 3, dropout=0.5).double()
    x = random(2, 5, 12)
    assert not torch.equal(attention(x)[0], attention(x)[0])
    attention.eval()
    assert torch.equal(attention(x)[0], attention(x)[0])


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("gelu", lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2),
        ("quick_gelu", lambda x: x / (1 + math.exp(-1.702 * x))),
        ("gelu_tanh", lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2),
    ],
)
def test_activations(name, formula):
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)
    wanted = torch.tensor([formula(float(value)) for value in x], dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS[name](x), wanted, rtol=1e-12, atol=1e-12)
    others = [act(x) for other, act in ACTIVATIONS.items() if other != name]
    assert all((other - wanted).abs().max() > 1e-4 for other in others), "the three can be told apart"


def test_mlp():
    mlp, x = Mlp(4, 9, "quick_gelu").double(), random(3, 4)
    hidden = x @ mlp.fc1.weight.T + mlp.fc1.bias
    wanted = (hidden / (1 + (-1.702 * hidden).exp())) @ mlp.fc2.weight.T + mlp.fc2.bias
    torch.testing.assert_close(mlp(x), wanted)


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    x = torch.rand(4000, 3) + 1
    dropped = DropPath(0.25)(x)
    is_kept = dropped[:, 0] != 0
    torch.testing.assert_close(dropped, x * is_kept[:, None] / 0.75)
    assert abs(is_kept.float().mean() - 0.75) < 0.03
    assert torch.equal(DropPath(0.25).eval()(x), x)
    assert torch.equal(DropPath(0.0)(x), x)


def test_layer_scale():
    scale = LayerScale(3, 0.5)
    scale.gain.data[1] = 2
    assert scale(torch.ones(2, 3)).tolist() == [[0.5, 2, 0.5]] * 2


def test_initial_weights():
    net = nn.ModuleList([nn.Linear(200, 100), nn.LayerNorm(4), nn.Embedding(100, 200)])
    for parameter in net.parameters():
        nn.init.constant_(parameter, 7)
    net.apply(init_weights)
    linear, norm, embedding = net
    assert abs(linear.weight.std() - 0.02) < 0.001 and abs(linear.weight.mean()) < 0.001
    assert (linear.bias == 0).all() and (norm.weight == 1).all() and (norm.bias == 0).all()
    assert abs(embedding.weight.std() - 0.02) < 0.001


@pytest.mark.parametrize("at_once", [1, 3 * 5 * 7, 2**30], ids=["a head at a time", "three", "all"])
@pytest.mark.parametrize("masked", [False, True])
def test_plain_attention_in_parts_is_attention(at_once, masked, monkeypatch):
    monkeypatch.setattr(layers, "_SCORES_AT_ONCE", at_once)
    q, k, v = (torch.randn(2, 4, n, 8).bfloat16().requires_grad_() for n in (5, 7, 7))
    mask = torch.rand(2, 1, 5, 7).argsort(dim=-1) > 2 if masked else None
    found, wanted = attend(q, k, v, mask), attend(q.double(), k.double(), v.double(), mask)
    assert found.dtype is torch.bfloat16 and torch.allclose(found.double(), wanted, atol=0.05)
    mine = torch.autograd.grad(found.double().square().sum(), (q, k, v))
    right = torch.autograd.grad(wanted.square().sum(), (q, k, v))
    assert all(torch.allclose(one, other, atol=0.1, rtol=0.05) for one, other in zip(mine, right))


def test_images_with_different_numbers_of_queries():
    attention = Attention(16, 2, kv_size=10).double()
    images, x = torch.randn(3, 6, 10).double(), torch.randn(7, 16).double()
    k, v = attention.project(images)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0]])[:, None, None].bool()
    found = attention(x, memory=(k, v), mask=mask, shares=[4, 0, 3])[0]
    for image, own in ((0, slice(0, 4)), (2, slice(4, 7))):
        one = slice(image, image + 1)
        alone = attention(x[None, own], memory=(k[one], v[one]), mask=mask[one])[0][0]
        assert torch.allclose(found[own], alone, atol=1e-12)
