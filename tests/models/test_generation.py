"""Decoding: against transformers, against brute force, against planted distributions, and against itself."""

import itertools
import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from openblip.config import ConfigError, UserError
from openblip.models.generation import (
    Generated,
    GenerationConfig,
    Step,
    _draw,
    _nucleus,
    _search,
    generate,
    sequence_log_likelihood,
    stream,
)

PAD, EOS = 1, 2
ENDS = {"eos_token_id": EOS, "pad_token_id": PAD}


def texts(generated: Generated) -> list[list[int]]:
    """The rows without padding."""
    return [row[:length].tolist() for row, length in zip(generated.sequences, generated.lengths)]


def with_history(logits_of: Callable[[Tensor], Tensor]) -> Step:
    """A step without a cache: it keeps every row's tokens, follows `parents`, and recomputes all of them."""
    history: Tensor | None = None

    def step(ids: Tensor, parents: Tensor | None) -> Tensor:
        nonlocal history
        if history is not None:
            history = torch.cat([history if parents is None else history[parents], ids], dim=1)
        else:
            history = ids
        return logits_of(history)

    return step


def trigram(table: Tensor) -> Step:
    """Logits table[a, b] [V] behind the tokens ..., a, b."""
    return with_history(lambda ids: table[ids[:, -2], ids[:, -1]])


class TinyTransformer(nn.Module):
    """A causal transformer with a cache, float64, with an end token likely enough to be met."""

    def __init__(self, vocabulary: int = 23, width: int = 16, layers: int = 2, end_bias: float = 2.0) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(64, width)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.mlp = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary)
        nn.init.normal_(self.head.weight)
        nn.init.constant_(self.head.bias, 0.0)
        with torch.no_grad():
            self.head.bias[EOS] = end_bias
        self.double().eval()

    def forward(self, ids: Tensor, cache: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """ids [R, L] -> logits [R, V] behind the last; `cache` is read and replaced, one (k, v) per layer."""
        past = cache[0][0].shape[1] if cache else 0
        x = self.words(ids) + self.positions(torch.arange(past, past + ids.shape[1]))
        seen = []
        for number, (qkv, mlp) in enumerate(zip(self.qkv, self.mlp)):
            q, k, v = qkv(x).chunk(3, dim=-1)
            if cache:
                k, v = torch.cat([cache[number][0], k], 1), torch.cat([cache[number][1], v], 1)
            seen.append((k, v))
            mask = torch.ones(ids.shape[1], k.shape[1], dtype=torch.bool).tril(past)
            x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + mlp(x).tanh()
        if cache is not None:
            cache[:] = seen
        return self.head(x[:, -1])

    def step(self, follow: bool = True) -> Step:
        """The cached step; without `follow` it expands its cache after the prompt, but never reorders it."""
        cache: list[tuple[Tensor, Tensor]] = []

        def step(ids: Tensor, parents: Tensor | None) -> Tensor:
            if parents is not None and (follow or len(parents) != len(cache[0][0])):
                cache[:] = [(k[parents], v[parents]) for k, v in cache]
            return self(ids, cache)

        return step


# Against transformers


def tiny_peer(name: str, seed: int, end_bias: float = 3.0) -> transformers.PreTrainedModel:
    """A random float64 model of transformers whose head has a bias towards the end token."""
    torch.manual_seed(seed)
    size = {"vocab_size": 37, "bos_token_id": 0, "pad_token_id": PAD, "eos_token_id": EOS}
    if name == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **size)
        model, head = transformers.GPT2LMHeadModel(config), "lm_head"
    else:
        size |= {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        size |= {"max_position_embeddings": 64}
        if name == "bert":
            model, head = transformers.BertLMHeadModel(transformers.BertConfig(is_decoder=True, **size)), None
        else:
            model, head = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size)), "lm_head"
    for parameter in model.parameters():  # the default of 0.02 makes all tokens alike
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3)
    output = nn.Linear(16, 37)
    nn.init.normal_(output.weight, std=0.7)
    with torch.no_grad():
        output.bias[EOS] = end_bias
    if head is None:
        model.cls.predictions.decoder = output
    else:
        setattr(model, head, output)
    return model.double().eval()


def peer_step(model: transformers.PreTrainedModel, mask: Tensor) -> Step:
    """A transformers model with its cache as a step, for left-padded prompts."""
    cache = transformers.DynamicCache(config=model.config)

    @torch.no_grad()
    def step(ids: Tensor, parents: Tensor | None) -> Tensor:
        nonlocal mask
        if cache.get_seq_length():
            if parents is not None:
                cache.reorder_cache(parents)
                mask = mask[parents]
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True)
        return out.logits[:, -1]

    return step


SEARCHES = [
    {
        "num_beams": 2 + (index // 3) % 4,
        "length_penalty": length,
        "repetition_penalty": repetition,
        "early_stopping": early,
    }
    for index, (early, length, repetition) in enumerate(
        itertools.product((False, True, "never"), (-1.0, 0.0, 1.0, 2.0), (1.0, 1.4))
    )
]
GREEDY = [{"repetition_penalty": penalty} for penalty in (1.0, 0.8, 1.1, 2.0)] * 3


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt2", GREEDY),
        ("bert", GREEDY),
        ("llama", GREEDY),
        ("gpt2", SEARCHES[0::3]),
        ("bert", SEARCHES[1::3]),
        ("llama", SEARCHES[2::3]),
    ],
)
def test_same_ids_as_transformers(name, options):
    ended, beats_greedy = Counter(), 0
    for seed, option in enumerate(options):
        option = {"max_new_tokens": 8, "min_new_tokens": (0, 0, 3)[seed % 3], **option}
        if option.get("num_beams", 1) > 1:
            option["num_return_sequences"] = 1 + seed % option["num_beams"]
        ends = EOS if seed % 4 else [EOS, 5]
        model = tiny_peer(name, seed)
        prompts = torch.randint(6, 37, (6, 5))
        mask = torch.ones_like(prompts)
        if name != "bert":  # left padding, with a token that the model also writes
            mask[1, :2], mask[2, :4] = 0, 0
            prompts = prompts.masked_fill(mask == 0, 7)
        theirs = model.generate(
            prompts,
            attention_mask=mask,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=PAD,
            return_dict_in_generate=True,
            output_scores=True,
            **option,
        )
        ours = generate(
            peer_step(model, mask),
            prompts,
            GenerationConfig(**option),
            eos_token_id=ends,
            pad_token_id=PAD,
            prompt_mask=mask,
        )
        assert torch.equal(ours.sequences, theirs.sequences[:, 5:]), option
        if option.get("num_beams", 1) > 1:
            torch.testing.assert_close(ours.scores.float(), theirs.sequences_scores, rtol=1e-5, atol=1e-5)
            greedy = option | {"num_beams": 1, "num_return_sequences": 1}
            plain = generate(peer_step(model, mask), prompts, GenerationConfig(**greedy), **ENDS)
            is_like_greedy = texts(ours)[:: option["num_return_sequences"]] == texts(plain)
            beats_greedy += option["repetition_penalty"] == 1 and not is_like_greedy
        ended.update(row[-1] in (EOS, 5) for row in texts(ours))
    assert ended[True] > 5 and ended[False] > 2, f"the comparison saw too little: {ended}"
    assert options is GREEDY or beats_greedy >= 2, "beam search found nothing that greedy does not"


# Against brute force


def all_texts(table: Tensor, prompt: list[int], limit: int, minimum: int = 0) -> dict[tuple[int, ...], float]:
    """Every text of at most `limit` tokens and its log P, by enumeration."""
    found, open_texts = {}, [((), 0.0)]
    for length in range(limit):
        following = []
        for text, score in open_texts:
            a, b = (*prompt, *text)[-2:]
            for token, log_prob in enumerate(table[a, b].log_softmax(-1).tolist()):
                longer = (*text, token), score + log_prob
                if token == EOS and length < minimum:
                    continue
                if token == EOS or length + 1 == limit:
                    found[longer[0]] = longer[1]
                else:
                    following.append(longer)
        open_texts = following
    return found


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("minimum", [0, 2])
def test_a_beam_wide_enough_finds_the_best_of_all_texts(penalty, minimum):
    table = torch.randn(5, 5, 5, dtype=torch.float64) * 2
    prompts = torch.tensor([[0, 3], [4, 0], [1, 1]])
    config = GenerationConfig(
        num_beams=350,  # there are 341 texts
        num_return_sequences=20,
        max_new_tokens=4,
        min_new_tokens=minimum,
        length_penalty=penalty,
    )
    found = generate(trigram(table), prompts, config, **ENDS)
    for row, prompt in enumerate(prompts.tolist()):
        scores = {
            text: score / len(text) ** penalty for text, score in all_texts(table, prompt, 4, minimum).items()
        }
        best = sorted(scores, key=scores.__getitem__, reverse=True)[:20]
        assert texts(found)[20 * row : 20 * row + 20] == [list(text) for text in best]
        torch.testing.assert_close(
            found.scores[20 * row : 20 * row + 20],
            torch.tensor([scores[text] for text in best], dtype=torch.float64),
            rtol=1e-12,
            atol=1e-12,
        )


def search_without_stopping(table: Tensor, prompt: list[int], beams: int, limit: int, penalty: float):
    """Beam search in plain Python, to the limit of the length -> [(score, text)], best first."""
    finished, open_texts = [], [(0.0, ())]
    for length in range(1, limit + 1):
        ranked = sorted(
            (
                (score + log_prob, (*text, token))
                for score, text in open_texts
                for token, log_prob in enumerate(table[(*prompt, *text)[-2:]].log_softmax(-1).tolist())
            ),
            reverse=True,
        )
        finished += [
            (score / length**penalty, text)
            for score, text in ranked[:beams]
            if text[-1] == EOS or length == limit
        ]
        open_texts = [(score, text) for score, text in ranked if text[-1] != EOS][:beams]
    return sorted(finished, reverse=True)[:beams]


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 2.0])
def test_never_stopping_early_loses_nothing(penalty):
    calls = 0
    for seed in range(8):
        torch.manual_seed(seed)
        table, prompts = torch.randn(5, 5, 5, dtype=torch.float64) * 3, torch.randint(0, 5, (4, 2))
        table[:, :, EOS] += 3
        inner = trigram(table)

        def step(ids: Tensor, parents: Tensor | None, inner: Step = inner) -> Tensor:
            nonlocal calls
            calls += 1
            return inner(ids, parents)

        config = GenerationConfig(
            num_beams=3,
            num_return_sequences=3,
            max_new_tokens=9,
            length_penalty=penalty,
            early_stopping="never",
        )
        found = generate(step, prompts, config, **ENDS)
        for row, prompt in enumerate(prompts.tolist()):
            expected = search_without_stopping(table, prompt, 3, 9, penalty)
            torch.testing.assert_close(  # scores, not texts: those of the same trigrams in another order tie
                found.scores[3 * row : 3 * row + 3],
                torch.tensor([score for score, _ in expected], dtype=torch.float64),
            )
    assert penalty > 0 or calls < 8 * 9, "the search must have stopped early somewhere"


@pytest.mark.parametrize("beams", [2, 3, 5])
def test_scores_are_those_of_the_returned_tokens(beams):
    table = torch.randn(5, 5, 5, dtype=torch.float64) * 2
    config = GenerationConfig(
        num_beams=beams, num_return_sequences=beams, max_new_tokens=5, length_penalty=0.5
    )
    found = generate(trigram(table), torch.tensor([[0, 3], [4, 0]]), config, **ENDS)
    for row, (text, score) in enumerate(zip(texts(found), found.scores.tolist())):
        log_prob = all_texts(table, [[0, 3], [4, 0]][row // beams], 5)[tuple(text)]
        assert score == pytest.approx(log_prob / len(text) ** 0.5, abs=1e-12)


def test_a_search_without_enough_texts_says_so():
    table = torch.randn(3, 3, 3)
    config = GenerationConfig(num_beams=4, num_return_sequences=4, max_new_tokens=1)
    found = generate(trigram(table), torch.tensor([[0, 1]]), config, **ENDS)
    assert sorted(texts(found)[:3]) == [[0], [1], [2]]
    assert found.lengths.tolist() == [1, 1, 1, 0]
    assert found.scores[3] == -math.inf and found.sequences[3].tolist() == [PAD]
    assert (found.scores[:3].diff() < 0).all()


# Against itself


def test_one_beam_is_greedy():
    model, prompts = TinyTransformer(), torch.randint(3, 23, (8, 4))
    greedy = generate(model.step(), prompts, GenerationConfig(max_new_tokens=12), **ENDS)
    config = GenerationConfig(max_new_tokens=12, length_penalty=0.0)
    sequences, scores = _search(model.step(), prompts, config, torch.tensor([EOS]), PAD, None)
    assert len(set(greedy.lengths.tolist())) > 2
    assert torch.equal(sequences[:, : greedy.sequences.shape[1]], greedy.sequences)
    torch.testing.assert_close(scores, greedy.scores, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 4, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3, "seed": 1}],
    ids=["beam", "sampling"],
)
def test_a_cache_that_follows_parents_is_no_cache(options):
    model, prompts = TinyTransformer(), torch.randint(3, 23, (5, 4))
    config = GenerationConfig(max_new_tokens=12, **options)
    cached = generate(model.step(), prompts, config, **ENDS)
    plain = generate(with_history(model), prompts, config, **ENDS)
    assert texts(cached) == texts(plain)
    torch.testing.assert_close(cached.scores, plain.scores, rtol=1e-10, atol=1e-10)
    if "num_beams" in options:  # proof that it matters
        assert texts(generate(model.step(follow=False), prompts, config, **ENDS)) != texts(plain)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"repetition_penalty": 1.3, "num_beams": 2}])
def test_a_text_in_a_batch_is_the_text_alone(options):
    model, prompts = TinyTransformer(), torch.randint(3, 23, (8, 4))
    config = GenerationConfig(max_new_tokens=12, **options)
    together = generate(model.step(), prompts, config, **ENDS)
    assert len(set(together.lengths.tolist())) > 2
    for row in range(8):
        alone = generate(model.step(), prompts[row : row + 1], config, **ENDS)
        assert texts(alone)[0] == texts(together)[row]
        assert alone.scores[0].item() == pytest.approx(together.scores[row].item(), abs=1e-10)
        assert (together.sequences[row, together.lengths[row] :] == PAD).all()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "seed": 0}])
def test_the_model_is_called_as_promised_and_not_once_too_often(options):
    model, prompts = TinyTransformer(end_bias=9.0), torch.randint(3, 23, (3, 4))
    calls, inner = [], model.step()

    def step(ids: Tensor, parents: Tensor | None) -> Tensor:
        calls.append((tuple(ids.shape), parents))
        assert parents is None or parents.max() < calls[-2][0][0]
        return inner(ids, parents)

    config = GenerationConfig(min_new_tokens=2, max_new_tokens=30, **options)
    found = generate(step, prompts, config, **ENDS)
    beams = options.get("num_beams", 1)
    assert calls[0][0] == (3, 4) and calls[0][1] is None
    assert {shape for shape, _ in calls[1:]} == {(3 * beams, 1)}
    assert all((parents is None) == (beams == 1) for _, parents in calls[1:])
    if beams == 1:
        assert len(calls) == found.sequences.shape[1] < 30
    else:
        assert len(calls) < 30


def test_the_limits_hold():
    model, prompts = TinyTransformer(end_bias=6.0), torch.randint(3, 23, (8, 4))
    for beams, (least, most) in itertools.product((1, 3), ((0, 9), (4, 9), (9, 9))):
        config = GenerationConfig(num_beams=beams, min_new_tokens=least, max_new_tokens=most)
        found = generate(model.step(), prompts, config, **ENDS)
        for text in texts(found):
            assert least <= len(text) - (text[-1] == EOS) and len(text) <= most and EOS not in text[:-1]
        assert least or min(found.lengths) < 4, "without a minimum, texts of this model are shorter"


def test_the_repetition_penalty_counts_prompt_and_text_but_no_padding():
    high = torch.tensor([-9.0, -9.0, -9.0, 2.0, 1.9, 1.8, -9.0])
    for prompt, mask, logits, expected in (
        ([6, 6], None, high, [3, 4, 5]),
        ([6, 3], None, high, [4, 5, 3]),  # 3 falls to 2 / 1.5, 4 to 1.9 / 1.5, so 5 is next, then 3
        ([3, 6], [0, 1], high, [3, 4, 5]),
        ([3, 6], [1, 1], high, [4, 5, 3]),
        ([99, 6], None, high, [3, 4, 5]),  # an id that the head does not have
        ([6, 6], None, high - 3, [3, 4, 5]),  # negative logits: multiplied, division would favour 3 again
    ):
        found = generate(
            lambda ids, parents, logits=logits: logits.expand(len(ids), -1),
            torch.tensor([prompt]),
            GenerationConfig(max_new_tokens=3, repetition_penalty=1.5),
            prompt_mask=None if mask is None else torch.tensor([mask]),
            **ENDS,
        )
        assert texts(found) == [expected], (prompt, mask)


@pytest.mark.parametrize("penalty", [1.0, 1.5])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "top_p": 0.9}])
def test_the_models_logits_are_not_changed_and_no_graph_is_built(options, penalty):
    table = torch.randn(9, 9, 9, requires_grad=True)
    before = table.detach().clone()
    config = GenerationConfig(
        max_new_tokens=4, min_new_tokens=2, repetition_penalty=penalty, seed=0, **options
    )
    found = generate(lambda ids, parents: table[0, : len(ids)], torch.tensor([[0, 3]]), config, **ENDS)
    assert torch.equal(table, before) and not found.scores.requires_grad
    assert not found.scores.is_inference()  # generated texts may be trained on


def test_half_precision_is_summed_in_single():
    table = torch.randn(9, 9, 9).bfloat16()
    for options in ({}, {"num_beams": 3}, {"do_sample": True, "top_p": 0.8, "seed": 0}):
        half = generate(trigram(table), torch.tensor([[0, 3]]), GenerationConfig(**options), **ENDS)
        single = generate(trigram(table.float()), torch.tensor([[0, 3]]), GenerationConfig(**options), **ENDS)
        assert half.scores.dtype == torch.float32
        assert torch.equal(half.sequences, single.sequences) and torch.equal(half.scores, single.scores)


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


SAMPLING = {"do_sample": True, "top_p": 0.95, "max_new_tokens": 10}


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


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams 0: must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens 0: must be at least 1"),
        ({"min_new_tokens": -1}, "min_new_tokens -1: must be from 0 to max_new_tokens"),
        ({"min_new_tokens": 31}, r"min_new_tokens 31: must be from 0 to max_new_tokens \(30\)"),
        ({"top_p": 0.0}, "top_p 0.0: must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p 1.1: must be above 0 and at most 1"),
        ({"temperature": 0.0}, "temperature 0.0: must be above 0"),
        ({"temperature": math.nan}, "temperature nan: must be above 0"),
        ({"repetition_penalty": -1.0}, "repetition_penalty -1.0: must be above 0"),
        ({"length_penalty": math.inf}, "length_penalty inf: must be a finite number"),
        ({"num_return_sequences": 0}, "num_return_sequences 0: must be at least 1"),
        ({"early_stopping": "always"}, "early_stopping 'always': must be True, False or \"never\""),
        ({"num_beams": 3, "do_sample": True}, "do_sample with num_beams 3: beam search does not sample"),
        ({"num_return_sequences": 2}, r"num_return_sequences 2: without do_sample at most num_beams \(1\)"),
        ({"num_beams": 2, "num_return_sequences": 3}, r"at most num_beams \(2\)"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message) as error:
        GenerationConfig(**options)
    assert isinstance(error.value, UserError) and "\n" not in str(error.value)


def test_what_cannot_be_done_is_said():
    prompts, table = torch.tensor([[0, 3]]), torch.randn(5, 5, 5)
    with pytest.raises(ConfigError, match="beam search cannot stream"):
        stream(trigram(table), prompts, GenerationConfig(num_beams=2), **ENDS)
    with pytest.raises(ValueError, match="2 seeds for 1 prompts"):
        generate(trigram(table), prompts, GenerationConfig(do_sample=True), seeds=[1, 2], **ENDS)
    for config in (GenerationConfig(), GenerationConfig(num_beams=2)):
        with pytest.raises(FloatingPointError, match="NaN"):
            generate(trigram(table * math.nan), prompts, config, **ENDS)
        with pytest.raises(ValueError, match=r"step gave \[1, 1, 5\] for 1 prompts: must be \[1, V\]"):
            generate(lambda ids, parents: table[:1, :1], prompts, config, **ENDS)


# Teacher forcing


def test_sequence_log_likelihood_by_hand():
    logits = torch.randn(3, 4, 6, dtype=torch.float64)
    labels = torch.tensor([[1, 2, 3, 4], [5, -100, 0, -100], [-100, -100, -100, -100]])
    log_probs = logits.log_softmax(-1)
    for smoothing in (0.0, 0.1):
        expected = []
        for row, targets in enumerate(labels.tolist()):
            terms = [
                (1 - smoothing) * log_probs[row, i, target] + smoothing * log_probs[row, i].mean()
                for i, target in enumerate(targets)
                if target != -100
            ]
            expected.append(float(sum(terms)))
        result = sequence_log_likelihood(logits, labels, label_smoothing=smoothing)
        torch.testing.assert_close(
            result, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
        )


def test_generated_scores_are_teacher_forced_scores():
    model, prompts = TinyTransformer(), torch.randint(3, 23, (5, 4))
    for options in ({}, {"repetition_penalty": 1.5}, {"temperature": 0.7, "seed": 2, **SAMPLING}):
        found = generate(model.step(), prompts, GenerationConfig(**options), **ENDS)
        step, columns = with_history(model), [prompts, *found.sequences.split(1, dim=1)[:-1]]
        logits = torch.stack([step(ids, None) for ids in columns], dim=1)
        padding = torch.arange(found.sequences.shape[1]) >= found.lengths[:, None]
        labels = found.sequences.masked_fill(padding, -100)
        with torch.no_grad():
            torch.testing.assert_close(sequence_log_likelihood(logits, labels), found.scores)
