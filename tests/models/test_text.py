"""The text transformer: who sees whom, the cache, the memory, what is shared."""

import pytest
import torch

from openblip.config import ConfigError, UserError
from openblip.models import text
from openblip.models.text import (
    Cache,
    LanguageModelHead,
    Memory,
    TextConfig,
    TextTransformer,
    swap_first_token,
)

CONFIG = TextConfig(60, 16, 2, 4, 24, max_position_embeddings=12, dropout=0.0)


def transformer(**changes) -> TextTransformer:
    model = TextTransformer(TextConfig(**{**vars(CONFIG), **changes}), encoder_width=10).double().eval()
    with torch.no_grad():  # larger than at the start of training, so that everything shows
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(5, 60, (rows, length))


def influence(model, length: int, **options) -> list[list[int]]:
    """table[i][j] = 1 if the state at i changes with the token at j."""
    tokens = ids(1, length)
    with torch.no_grad():
        states = model(tokens, **options)
        table = torch.zeros(length, length, dtype=torch.int64)
        for j in range(length):
            other = tokens.clone()
            other[0, j] = tokens[0, j] % 54 + 6
            table[:, j] = ((model(other, **options) - states).abs().amax(dim=-1)[0] > 1e-12).long()
    return table.tolist()


def test_the_truth_table_of_masks():
    model = transformer()
    padded = torch.tensor([[1, 1, 1, 0]])
    assert influence(model, 4) == [[1, 1, 1, 1]] * 4
    assert influence(model, 4, causal=True) == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    # A padded position still sees itself through its residual; nobody else sees it.
    assert influence(model, 4, attention_mask=padded) == [[1, 1, 1, 0]] * 3 + [[1, 1, 1, 1]]
    assert influence(model, 4, attention_mask=padded, causal=True) == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 1],
    ]
    left = torch.tensor([[0, 1, 1, 1]])
    table = influence(model, 4, attention_mask=left, causal=True)
    assert table[1:] == [[0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]


@torch.no_grad()
def test_words_alone_are_words_in_a_batch():
    model, image = transformer(), torch.randn(3, 5, 10, dtype=torch.float64)
    lengths, tokens = [7, 3, 5], ids(3, 7)
    mask = (torch.arange(7) < torch.tensor(lengths)[:, None]).long()
    for causal in (False, True):
        together = model(tokens, mask, model.memory(image), causal=causal)
        for i, length in enumerate(lengths):
            alone = model(tokens[i : i + 1, :length], None, model.memory(image[i : i + 1]), causal=causal)
            torch.testing.assert_close(together[i, :length], alone[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunks", [[1] * 6, [3, 1, 2], [6]])
@torch.no_grad()
def test_with_a_cache_is_without(chunks):
    model, tokens = transformer(), ids(4, 6)
    memory = model.memory(torch.randn(2, 5, 10, dtype=torch.float64))
    whole = model(tokens, None, memory, causal=True)
    cache, pieces = Cache(2), []
    for piece in tokens.split(chunks, dim=1):
        pieces.append(model(piece, None, memory, causal=True, cache=cache))
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-12)
    assert cache.length == 6


@torch.no_grad()
def test_a_cache_remembers_what_was_padding():
    model, tokens = transformer(), ids(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 0, 1, 1, 1]])
    whole = model(tokens, mask, causal=True)
    cache = Cache(2)
    first = model(tokens[:, :3], mask[:, :3], causal=True, cache=cache)
    rest = [model(tokens[:, i : i + 1], causal=True, cache=cache) for i in range(3, 6)]
    torch.testing.assert_close(torch.cat([first, *rest], dim=1)[0], whole[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat(rest, dim=1), whole[:, 3:], rtol=0, atol=1e-12)
    assert torch.equal(cache.mask, mask)
    late = Cache(2)  # the mask comes with the second call: what was there counts as real
    model(tokens[:, :3], causal=True, cache=late)
    model(tokens[:, 3:], mask[:, :3], causal=True, cache=late)
    assert late.mask.tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]


@torch.no_grad()
def test_reordered_rows_continue_their_parents():
    model, tokens, parents = transformer(), ids(3, 4), torch.tensor([2, 0, 0, 1])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 1, 1]])
    cache, more = Cache(2), ids(4, 1)
    model(tokens[:, :3], mask, causal=True, cache=cache)
    cache.reorder_(parents)
    continued = model(more, causal=True, cache=cache)
    whole = model(
        torch.cat([tokens[parents, :3], more], dim=1),
        torch.nn.functional.pad(mask[parents], (0, 1), value=1),
        causal=True,
    )  # fmt: skip
    torch.testing.assert_close(continued[:, 0], whole[:, -1], rtol=0, atol=1e-12)


def test_too_many_tokens():
    model, cache = transformer(), Cache(2)
    with pytest.raises(UserError, match="13 tokens: this model has 12 positions"):
        model(ids(1, 13))
    model(ids(1, 12), cache=cache)
    with pytest.raises(ValueError, match="13 tokens"):
        model(ids(1, 1), cache=cache)


@torch.no_grad()
def test_masked_memory_is_not_seen():
    model, tokens = transformer(), ids(4, 3)
    memory, mask = (
        torch.randn(2, 5, 10, dtype=torch.float64),
        torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0]]),
    )
    states = model(tokens, None, model.memory(memory, mask))
    changed = memory.clone()
    changed[:, [2, 4]] += 1
    other = model(tokens, None, model.memory(changed, mask))
    assert (other[:2] - states[:2]).abs().max() > 1e-3
    assert torch.equal(other[2:], states[2:])
    picked = model.memory(memory, mask).rows(torch.tensor([1, 1, 0]))
    torch.testing.assert_close(
        model(tokens[:3], None, picked),
        model(tokens[:3], None, model.memory(memory[[1, 1, 0]], mask[[1, 1, 0]])),
    )


def test_rows_of_rows():
    layer = (torch.arange(3.0)[:, None], torch.arange(3.0)[:, None] + 10)
    memory = Memory([layer]).rows(torch.tensor([2, 0, 1])).rows(torch.tensor([0, 0, 2]))
    (keys, values), mask = memory.layer(0)
    assert keys.flatten().tolist() == [2, 2, 1] and values.flatten().tolist() == [12, 12, 11]
    assert mask is None
    nested = Memory([(layer, layer)]).rows(torch.tensor([1])).layer(0)[0]
    assert nested[1][0].tolist() == [[1.0]], "both of a twin"


@torch.no_grad()
def test_without_a_memory_cross_attention_is_skipped():
    model, tokens = transformer(), ids(2, 4)
    plain = TextTransformer(CONFIG).double().eval()
    weights = model.state_dict()
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    assert not any("cross_attention" in name for name in plain.state_dict())
    assert torch.equal(plain(tokens), model(tokens))
    memory = model.memory(torch.randn(2, 5, 10, dtype=torch.float64))
    assert (model(tokens, None, memory) - model(tokens)).abs().max() > 1e-3


@torch.no_grad()
def test_probabilities_of_every_layer_can_be_kept():
    model, kept = transformer(), []
    memory = model.memory(torch.randn(2, 5, 10, dtype=torch.float64))
    tokens = ids(6, 3)
    states = model(tokens, None, memory, weights=kept)
    torch.testing.assert_close(states, model(tokens, None, memory))
    assert [weights.shape for weights in kept] == [(2, 4, 9, 5)] * 2
    torch.testing.assert_close(kept[1].sum(dim=-1), torch.ones(2, 4, 9, dtype=torch.float64))


def test_recomputing_activations_changes_nothing(monkeypatch):
    calls = []
    recompute = text.checkpoint
    monkeypatch.setattr(
        text, "checkpoint", lambda layer, *a, **k: calls.append(layer) or recompute(layer, *a, **k)
    )
    model, tokens = transformer(dropout=0.3).train(), ids(4, 5)
    mask, image = torch.tensor([[1, 1, 1, 1, 0]] * 4), torch.randn(2, 5, 10, dtype=torch.float64)

    def run():
        model.zero_grad()
        torch.manual_seed(5)
        states = model(tokens, mask, model.memory(image), causal=True)
        states.square().sum().backward()
        return states, [parameter.grad.clone() for parameter in model.parameters()]

    plain = run()
    model.set_grad_checkpointing()
    torch.testing.assert_close(run(), plain, rtol=0, atol=0)
    assert calls == list(model.layers)
    model.eval()(tokens)
    assert len(calls) == 2


def test_shared_parts_are_the_very_modules():
    one, two = transformer(), transformer()
    assert two.share_(one, ["embeddings", "cross_attention"]) is two
    assert two.embeddings is one.embeddings
    for mine, theirs in zip(two.layers, one.layers):
        assert mine.cross_attention is theirs.cross_attention
        assert mine.self_attention is not theirs.self_attention
        assert mine.feed_forward is not theirs.feed_forward
    with pytest.raises(ValueError):
        transformer(num_hidden_layers=3).share_(one, ["feed_forward"])


def test_the_head_is_tied_to_the_words():
    model, head = transformer(), LanguageModelHead(CONFIG).double()
    states = torch.randn(2, 3, 16, dtype=torch.float64)
    words = model.embeddings.word.weight
    logits = head(states, words)
    hidden = head.norm(torch.nn.functional.gelu(states @ head.dense.weight.T + head.dense.bias))
    torch.testing.assert_close(logits, hidden @ words.T + head.bias)
    logits.sum().backward()
    assert words.grad.abs().min() > 0, "every word's embedding learns from the head"


def test_the_first_token_is_overwritten_in_a_copy():
    tokens = torch.tensor([[101, 7, 8], [101, 9, 102]])
    assert swap_first_token(tokens, 30523).tolist() == [[30523, 7, 8], [30523, 9, 102]]
    assert tokens[:, 0].tolist() == [101, 101]


def test_bert_geometry_by_default():
    config = TextConfig()
    with torch.device("meta"):
        model = TextTransformer(config)
    assert model.embeddings.word.weight.shape == (30524, 768)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == 1 + 12 * 2 and {norm.eps for norm in norms} == {1e-12}
    assert not any("type" in name for name in model.state_dict()), "BLIP has no token types"
    assert (config.cls_token_id, config.sep_token_id, config.dec_token_id, config.enc_token_id) == (
        101, 102, 30522, 30523,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="hidden_size 10 is not a multiple of num_attention_heads 4"):
        TextConfig(60, 10, 2, 4)


def ragged(rows: int, length: int) -> torch.Tensor:
    """A mask of rows that are all of different lengths but the last two."""
    return (torch.arange(length) < torch.arange(rows).add(2).clamp(max=rows)[:, None]).long()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "index", [None, [0, 0, 0, 2, 2, 2], [2, 0, 1, 1, 0, 2]], ids=["even", "sorted", "mixed"]
)
def test_without_its_padding_a_text_is_what_it_is_with_it(index, causal):
    """States of real tokens, and gradients; with images that nobody or a different number of rows look at."""
    model, mask, tokens = transformer(), ragged(6, 7), ids(6, 7)
    image = torch.randn(3, 5, 10, dtype=torch.float64)
    found = []
    for packed in (False, True):
        seen = image.clone().requires_grad_()
        memory = model.memory(seen, torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [1] * 4 + [0]]))
        if index is not None:
            memory = memory.rows(torch.tensor(index))
        real = model(tokens, mask, memory, causal=causal, packed=packed)[mask.bool()]
        model.zero_grad()
        real.square().sum().backward()
        found.append([real, seen.grad, model.layers[0].self_attention.attention.qkv.weight.grad.clone()])
    assert all(torch.allclose(one, other, atol=1e-9) for one, other in zip(*found))
    assert found[0][1].abs().amax(dim=(1, 2)).count_nonzero() == (2 if index == [0, 0, 0, 2, 2, 2] else 3)


def test_rows_of_one_image_that_lie_together_are_not_copied():
    model, image = transformer(), torch.randn(3, 5, 10, dtype=torch.float64)
    memory = model.memory(image)
    together, apart = memory.rows(torch.tensor([0, 2, 2])), memory.rows(torch.tensor([2, 0, 2]))
    assert memory.counts is None and together.counts == [1, 0, 2] and apart.counts is None
    tokens = ids(3, 4)
    with torch.no_grad():
        first, second = model(tokens, memory=together), model(tokens[[1, 0, 2]], memory=apart)
    assert torch.allclose(first, second[[1, 0, 2]], atol=1e-12)
    assert not torch.allclose(first[:2], second[:2], atol=1e-3), "rows differ"
