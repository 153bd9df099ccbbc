"""BLIP for VQA: what the answer sees, and ranking against plain loops."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from openblip.models.blip_vqa import BlipVqa, BlipVqaConfig
from openblip.models.generation import GenerationConfig
from openblip.models.text import TextConfig
from openblip.models.vit import VisionConfig, vit_large

VISION = VisionConfig(32, 8, 24, 2, 4, 32)
TEXT = TextConfig(
    60, 16, 2, 4, 24, max_position_embeddings=16, dropout=0.0, cls_token_id=54, sep_token_id=55,
    dec_token_id=56, enc_token_id=57,
)  # fmt: skip


@pytest.fixture
def model() -> BlipVqa:
    model = BlipVqa(BlipVqaConfig(VISION, TEXT)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, dtype=torch.float64)


def texts(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    tokens = torch.randint(1, 54, mask.shape)
    tokens[:, 0] = 54
    tokens[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = 55
    return tokens * mask, mask


def test_the_decoder_is_as_wide_as_the_question_and_shares_nothing():
    with torch.device("meta"):
        model = BlipVqa(BlipVqaConfig(vit_large(480)))
    assert model.text_encoder.layers[0].cross_attention.attention.kv.in_features == 1024
    assert model.text_decoder.layers[0].cross_attention.attention.kv.in_features == 768
    encoder = {id(parameter) for parameter in model.text_encoder.parameters()}
    assert not any(id(parameter) in encoder for parameter in model.text_decoder.parameters())
    default = BlipVqaConfig().vision
    assert (default.image_size, default.drop_path_rate) == (480, 0.1)


@torch.no_grad()
def test_an_answer_sees_image_and_question_but_no_padding(model):
    (questions, mask), (answers, answer_mask) = texts([7, 4]), texts([4, 3])
    embeds = model.encode_image(images(2))

    def states(embeds, questions, mask):
        return model.lm_states(model.question_memory(embeds, questions, mask), answers, answer_mask)

    said = states(embeds, questions, mask)
    padding = questions + 9 * (1 - mask)
    torch.testing.assert_close(states(embeds, padding, mask), said)
    short = model.question_memory(embeds[1:], questions[1:, :4])
    torch.testing.assert_close(model.lm_states(short, answers[1:], answer_mask[1:]), said[1:])
    assert (states(embeds.flip(0), questions, mask) - said).abs().max() > 1e-3, "image"
    other = questions.clone()
    other[:, 2] = 53 - other[:, 2]
    assert (states(embeds, other, mask) - said).abs().amax(dim=(1, 2)).min() > 1e-3, "question"


def slow_rank(model, memory, question: int, answers: list[list[int]], k: int, smoothing: float) -> int:
    """One candidate after the other (BLIP's released code in words)."""
    own = memory.rows(torch.tensor([question]))

    def logits(ids: list[int]) -> torch.Tensor:
        return model.lm_logits(model.lm_states(own, torch.tensor([ids])))[0]

    first = logits([56])[0].softmax(dim=0)
    short = sorted(range(len(answers)), key=lambda i: -first[answers[i][1]])[:k]
    losses = {}
    for i in short:
        ids = answers[i]
        losses[i] = F.cross_entropy(
            logits(ids)[:-1], torch.tensor(ids[1:]), label_smoothing=smoothing, reduction="sum"
        )
    return min(losses, key=losses.get)


@torch.no_grad()
def test_ranking_is_what_plain_loops_find(model):
    for parameter in model.parameters():
        parameter.mul_(1.5)  # so that questions make a difference
    lengths = [7, 4, 5, 6, 3, 7] * 3
    questions, mask = texts(lengths)
    memory = model.question_memory(model.encode_image(images(18)), questions, mask)
    answer_lengths = [4, 5, 5, 4, 5, 5, 4, 5]
    answers, answer_mask = texts(answer_lengths)
    rows = [answers[i, :length].tolist() for i, length in enumerate(answer_lengths)]
    found = {}
    for k, smoothing in ((1, 0.1), (3, 0.1), (128, 0.1), (128, 0.0), (128, 0.8)):
        best = model.rank(memory, answers, answer_mask, k=k, label_smoothing=smoothing).tolist()
        assert best == [slow_rank(model, memory, question, rows, k, smoothing) for question in range(18)]
        found[k, smoothing] = best
    assert found[1, 0.1] != found[128, 0.1], "the short list matters here"
    assert found[128, 0.8] != found[128, 0.0], "and so does label smoothing"
    assert model.rank(memory, answers, answer_mask).tolist() == found[128, 0.1], (
        "on by default, as in the released code"
    )


@torch.no_grad()
def test_free_answers_by_the_papers_defaults(model):
    questions, mask = texts([5, 4])
    memory = model.question_memory(model.encode_image(images(2)), questions, mask)
    found = model.generate(memory)
    assert found.sequences.shape[1] <= 9
    stated = GenerationConfig(num_beams=3, max_new_tokens=9, min_new_tokens=1)
    assert torch.equal(found.sequences, model.generate(memory, stated).sequences)
    alone = model.question_memory(model.encode_image(images(1)), questions[:1], mask[:1])
    assert len(model.generate(alone, GenerationConfig(max_new_tokens=4)).sequences) == 1


def test_a_frozen_tower_is_not_trained():
    model = BlipVqa(BlipVqaConfig(replace(VISION, drop_path_rate=0.9), TEXT, freeze_vision=True)).train()
    assert not model.vision.training and model.text_decoder.training
    embeds = model.encode_image(images(4).float())
    assert (
        not embeds.requires_grad
        and torch.equal(embeds, model.encode_image(torch.zeros(4, 3, 32, 32))) is False
    )
    assert all(not parameter.requires_grad for parameter in model.vision.parameters())
    model.set_grad_checkpointing()
    assert model.vision.checkpointed == 0 and model.text_decoder.checkpointing


def test_recomputing_activations_changes_nothing(model):
    (questions, mask), (answers, answer_mask), pixel_values = texts([6, 4]), texts([4, 3]), images(2)
    model.train()

    def run():
        model.zero_grad()
        memory = model.question_memory(model.encode_image(pixel_values), questions, mask)
        logits = model.lm_logits(model.lm_states(memory, answers, answer_mask))
        logits.square().mean().backward()
        return logits, [parameter.grad.clone() for parameter in model.parameters()]

    plain = run()
    model.set_grad_checkpointing()
    torch.testing.assert_close(run(), plain, rtol=0, atol=0)
