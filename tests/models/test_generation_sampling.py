"""Sampling and streaming: planted distributions, one seed's text in any batch, and columns as they are read."""

import math
from collections import Counter

import pytest
import torch
import transformers
from torch import Tensor

from openblip.models.generation import GenerationConfig, _draw, _nucleus, generate, stream
from tests.models.tiny_steps import ENDS, EOS, SAMPLING, TinyTransformer, texts, trigram

# Sampling


def nucleus_by_hand(probs: list[float], top_p: float) -> dict[int, float]:
    """The renormalised nucleus, with Python's sort."""
    kept, total = {}, 0.0
    for token in sorted(range(len(probs)), key=lambda token: -probs[token]):
        if total >= top_p:
            break
        kept[token] = probs[token]
        total += probs[token]
    return {token: prob / total for token, prob in kept.items()}


@pytest.mark.parametrize(
    ("top_p", "temperature"), [(1.0, 1.0), (0.8, 1.0), (0.8, 0.5), (0.05, 1.0), (1.0, 2.0)]
)
def test_samples_have_the_distribution_asked_for(top_p, temperature):
    table, rows = torch.randn(7, 7, 7, dtype=torch.float64) * 1.5, 20000
    config = GenerationConfig(
        do_sample=True, max_new_tokens=2, top_p=top_p, temperature=temperature, seed=3, min_new_tokens=1
    )
    expected = {}
    no_end = table[0, 3].index_fill(0, torch.tensor(EOS), -math.inf)
    for first, prob in nucleus_by_hand((no_end / temperature).softmax(0).tolist(), top_p).items():
        second = nucleus_by_hand((table[3, first] / temperature).softmax(0).tolist(), top_p)
        expected |= {(first, token): prob * other for token, other in second.items()}
    expected = {pair: prob for pair, prob in expected.items() if prob > 0}
    found = generate(trigram(table), torch.tensor([[0, 3]]).expand(rows, -1), config, **ENDS)
    counts = Counter(map(tuple, texts(found)))
    assert set(counts) <= set(expected)
    assert {pair for pair, prob in expected.items() if prob > 1e-3} <= set(counts)
    for pair, prob in expected.items():
        assert abs(counts[pair] / rows - prob) < 4.5 * math.sqrt(prob * (1 - prob) / rows) + 1e-9, pair


def test_the_nucleus_is_that_of_transformers_within_the_shortlist_and_beyond():
    logits = torch.randn(12, 3000) * torch.linspace(0.1, 8, 12)[:, None]
    for top_p in (0.01, 0.5, 0.9, 0.999):
        kept = _nucleus(logits.softmax(1), top_p) > 0
        theirs = transformers.TopPLogitsWarper(top_p)(None, logits) > -math.inf
        assert (kept.sum(1) - theirs.sum(1)).abs().max() <= 1  # float32 sums differ at the border
        assert (kept != theirs).sum() <= 2
        sizes = kept.sum(1).tolist()
        assert top_p != 0.9 or (min(sizes) < 256 < max(sizes)), "both ways of ranking must have been taken"


def test_the_nucleus_of_a_row_depends_on_that_row_only():
    logits = torch.randn(6, 3000) * torch.tensor([0.1, 0.2, 1.0, 3.0, 5.0, 9.0])[:, None]
    probs = logits.bfloat16().float().softmax(1)  # half precision: many ties
    together = _nucleus(probs, 0.9)
    for row in range(6):
        assert torch.equal(_nucleus(probs[row : row + 1], 0.9)[0], together[row])
    assert _nucleus(torch.full((1, 4), 0.25), 0.5).count_nonzero() == 2
    assert _nucleus(torch.full((1, 4), 0.25), 0.51).count_nonzero() == 3


def test_a_token_without_weight_is_never_drawn():
    weights = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    for uniform, token in ((1e-300, 1), (0.25, 1), (0.25 + 1e-12, 3), (1 - 2**-53, 3), (1.0, 3)):
        assert _draw(weights, torch.tensor([uniform], dtype=torch.float64)).item() == token, uniform


def test_the_same_seed_gives_the_same_text_alone_and_in_any_batch():
    model, prompts, seeds = TinyTransformer(), torch.randint(3, 23, (8, 4)), list(range(100, 108))
    config = GenerationConfig(**SAMPLING)
    together = texts(generate(model.step(), prompts, config, seeds=seeds, **ENDS))
    order = [5, 2, 7, 0]
    shuffled = generate(model.step(), prompts[order], config, seeds=[seeds[row] for row in order], **ENDS)
    assert texts(shuffled) == [together[row] for row in order]
    for row in range(8):
        alone = generate(model.step(), prompts[row : row + 1], config, seeds=[seeds[row]], **ENDS)
        assert texts(alone) == [together[row]]
    others = generate(model.step(), prompts, config, seeds=[seed + 1 for seed in seeds], **ENDS)
    assert sum(a != b for a, b in zip(texts(others), together)) >= 6


def test_more_tokens_and_more_texts_continue_what_there_was():
    model, prompts = TinyTransformer(), torch.randint(3, 23, (6, 4))
    few = texts(generate(model.step(), prompts, GenerationConfig(seed=5, **SAMPLING), **ENDS))
    longer = GenerationConfig(seed=5, **(SAMPLING | {"max_new_tokens": 25}))
    assert [text[:10] for text in texts(generate(model.step(), prompts, longer, **ENDS))] == few
    three = GenerationConfig(seed=5, num_return_sequences=3, **SAMPLING)
    more = texts(generate(model.step(), prompts, three, **ENDS))
    assert more[::3] == few and more[1::3] != few and more[1::3] != more[2::3]


def test_where_a_seed_comes_from():
    model, prompts = TinyTransformer(), torch.randint(3, 23, (1, 4)).expand(6, -1)

    def sample(seed: int | None) -> list[list[int]]:
        return texts(generate(model.step(), prompts, GenerationConfig(seed=seed, **SAMPLING), **ENDS))

    assert sample(1) == sample(1) != sample(2)
    assert len(set(map(tuple, sample(1)))) >= 4, "rows of one batch have streams of their own"
    torch.manual_seed(7)
    first, second = sample(None), sample(None)
    torch.manual_seed(7)
    assert sample(None) == first != second
    torch.manual_seed(7)
    sample(1)
    assert sample(None) == first, "a seed leaves torch's generator alone"


# Streaming


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.5, "min_new_tokens": 3},
        {"seed": 4, "num_return_sequences": 2, **SAMPLING},
    ],
    ids=["greedy", "penalties", "sampling"],
)
def test_a_stream_is_generate_column_by_column(options):
    model, prompts = TinyTransformer(), torch.randint(3, 23, (5, 4))
    config = GenerationConfig(**({"max_new_tokens": 12} | options))
    columns = list(stream(model.step(), prompts, config, **ENDS))
    assert not any(column.is_inference() or column.requires_grad for column in columns)
    assert torch.equal(torch.stack(columns, dim=1), generate(model.step(), prompts, config, **ENDS).sequences)


def test_a_stream_asks_the_model_only_for_what_is_read():
    model, calls = TinyTransformer(end_bias=-50.0), []
    inner = model.step()

    def step(ids: Tensor, parents: Tensor | None) -> Tensor:
        calls.append(ids)
        return inner(ids, parents)

    columns = stream(step, torch.tensor([[3, 4]]), GenerationConfig(max_new_tokens=9), **ENDS)
    assert not calls
    next(columns), next(columns)
    assert len(calls) == 2
    assert torch.is_grad_enabled()
