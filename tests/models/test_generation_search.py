"""Greedy and beam search: against transformers, and against brute force."""

import itertools
import math
from collections import Counter

import pytest
import torch
import transformers
from torch import Tensor, nn

from openblip.models.generation import GenerationConfig, Step, generate
from tests.models.tiny_steps import ENDS, EOS, PAD, texts, trigram

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
