"""Decoding against itself: a text in a batch and alone, limits and penalties, mistakes, teacher forcing."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from openblip.config import ConfigError, UserError
from openblip.models.generation import GenerationConfig, _search, generate, sequence_log_likelihood, stream
from tests.models.tiny_steps import ENDS, EOS, PAD, SAMPLING, TinyTransformer, texts, trigram, with_history

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
