"""Our VQA model gives what transformers' BlipForQuestionAnswering gives: question states, loss, answers.

Two quirks of transformers. A question keeps its [CLS] there, while the code that trained these weights puts
[ENC] (as ours does): the peer is given [ENC]. And its decoder looks at the padding of the question
(`generate` asks for that, and cross-attention drops the mask anyway), so that an answer depends on the other
questions of the batch; ours masks it. So questions of one length are compared as a batch, and questions of
several with what the peer says to each alone.
"""

import pytest
import torch
from transformers import BlipForQuestionAnswering

from openblip.convert.huggingface import to_huggingface
from openblip.models.generation import GenerationConfig
from openblip.train.objectives import labelled_positions, lm_loss, next_token_labels
from tests.parity.peers import (
    CLS,
    DEC,
    ENC,
    TOLERANCE,
    blip_config,
    cut,
    difference,
    make_talkative_,
    other_activation,
    other_eps,
    ours,
    pixels,
    random_peer,
    swapped_k_and_v,
    swapped_q_and_k,
    texts,
    without,
)

IMAGES = pixels(3, 3, 32, 32)
QUESTIONS, QUESTION_MASK = texts([7, 7, 7], first=CLS)
ANSWERS, ANSWER_MASK = texts([3, 6, 4], first=CLS, low=50)
PADDED, PADDED_MASK = texts([9, 5, 7], first=CLS)


@pytest.fixture(scope="module")
def peer():
    # transformers can only build a decoder that attends to states as wide as the image's.
    peer = random_peer(BlipForQuestionAnswering, blip_config(text_width=16, vision_width=16), seed=1)
    make_talkative_(peer.text_decoder, end=2)
    return peer


def beginning_with(ids: torch.Tensor, token: int) -> torch.Tensor:
    ids = ids.clone()
    ids[:, 0] = token
    return ids


@torch.no_grad()
def gap(model, peer, images=IMAGES, questions=QUESTIONS, question_mask=QUESTION_MASK) -> float:
    """The largest difference of image states, and of states and logits of real tokens.

    The peer is asked one question after the other, without its padding.
    """
    embeds = model.encode_image(images)
    memory = model.text_encoder.memory(embeds)
    read = model.text_encoder(beginning_with(questions, ENC), question_mask, memory)
    states = model.lm_states(model.question_memory(embeds, questions, question_mask), ANSWERS, ANSWER_MASK)
    logits = model.lm_logits(states)
    their_embeds = peer.vision_model(images, True).last_hidden_state
    mine, theirs = {"image": embeds}, {"image": their_embeds}
    for i, (question, answer) in enumerate(zip(question_mask.bool(), ANSWER_MASK.bool())):
        asked = beginning_with(questions[i : i + 1, question], ENC)
        there = peer.text_encoder(asked, encoder_hidden_states=their_embeds[i : i + 1]).last_hidden_state
        told = peer.text_decoder(
            beginning_with(ANSWERS[i : i + 1, answer], DEC),
            encoder_hidden_states=there,
            output_hidden_states=True,
        )
        mine |= {f"question {i}": read[i, question], f"states {i}": states[i, answer]}
        mine[f"logits {i}"] = logits[i, answer]
        theirs |= {f"question {i}": there[0], f"states {i}": told.hidden_states[-1][0]}
        theirs[f"logits {i}"] = told.logits[0]
    return difference(mine, theirs)


@torch.no_grad()
def test_the_peer_looks_at_image_question_and_answer(peer):
    def loss(image: int, question: int, answer: int) -> float:
        one = slice(image, image + 1), slice(question, question + 1), slice(answer, answer + 1)
        ids = ANSWERS[one[2], :3]
        return float(peer(QUESTIONS[one[1], :5], IMAGES[one[0]], ids, labels=ids).loss)

    start = loss(0, 0, 0)
    for other in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert abs(loss(*other) - start) > 0.01, other


def test_states_and_logits_are_the_same(peer):
    assert gap(ours(peer), peer) < TOLERANCE


def test_padding_of_a_question_changes_nothing(peer):
    assert gap(ours(peer), peer, questions=PADDED, question_mask=PADDED_MASK) < TOLERANCE


@torch.no_grad()
def test_the_loss_is_the_same(peer):
    model = ours(peer)
    states = model.lm_states(
        model.question_memory(model.encode_image(IMAGES), QUESTIONS, QUESTION_MASK), ANSWERS, ANSWER_MASK
    )
    wanted, labels = labelled_positions(next_token_labels(ANSWERS, ANSWER_MASK))
    total, count = lm_loss(model.lm_logits(states[:, :-1][wanted]), labels, smoothing=0.1)
    theirs = peer(
        beginning_with(QUESTIONS, ENC), IMAGES, beginning_with(ANSWERS, DEC), ANSWER_MASK, QUESTION_MASK,
        labels=ANSWERS.masked_fill(ANSWER_MASK == 0, -100),
    )  # fmt: skip
    assert abs(total / count - theirs.loss) < TOLERANCE


def test_images_of_another_shape_give_the_same(peer):
    assert gap(ours(peer), peer, images=pixels(3, 3, 40, 48)) < TOLERANCE


@pytest.mark.parametrize(
    "fault",
    [
        other_eps("vision.", 0.1),
        other_eps("text_encoder.", 1e7),
        other_eps("text_decoder.", 1e7),
        swapped_q_and_k("text_encoder.layers.0"),
        swapped_q_and_k("text_decoder.layers.1"),
        swapped_k_and_v("text_encoder.layers.0"),
        swapped_k_and_v("text_decoder.layers.0"),
        other_activation("text_encoder.", "gelu_tanh"),
        other_activation("text_decoder.", "gelu_tanh"),
        without("vision.norm"),
    ],
    ids=[
        "vision eps", "question eps", "answer eps", "question q and k", "answer q and k",
        "question cross k and v", "answer cross k and v", "question tanh GELU", "answer tanh GELU",
        "no final norm",
    ],
)  # fmt: skip
def test_a_fault_is_seen(peer, fault):
    model = ours(peer)
    fault(model)
    assert gap(model, peer) > TOLERANCE


def test_a_decoder_tied_to_the_encoder_is_seen(peer):
    model = ours(peer)
    model.text_decoder.share_(model.text_encoder, ["feed_forward"])
    assert gap(model, peer) > TOLERANCE


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 1, "max_new_tokens": 9}, {"num_beams": 3, "max_new_tokens": 9, "min_new_tokens": 1}],
    ids=["greedy", "beam 3"],
)
@torch.no_grad()
def test_answers_are_the_same(peer, options):
    model, images, config = ours(peer), pixels(9, 3, 32, 32, seed=3), GenerationConfig(**options)
    for lengths in ([6] * 9, [9, 5, 7, 4, 6, 8, 5, 9, 3]):
        questions, mask = texts(lengths, first=CLS)
        memory = model.question_memory(model.encode_image(images), questions, mask)
        answers = cut(model.generate(memory, config).sequences)
        theirs = []
        for i, length in enumerate(lengths):
            asked = beginning_with(questions[i : i + 1, :length], ENC)
            theirs += cut(peer.generate(asked, images[i : i + 1], do_sample=False, **options)[:, 1:])
        assert answers == theirs
        assert len({tuple(answer) for answer in answers}) > 3


def test_it_goes_back(peer):
    _, weights = to_huggingface(ours(peer))
    tied = {"text_decoder.cls.predictions.decoder.weight", "text_decoder.cls.predictions.decoder.bias"}
    assert weights.keys() == peer.state_dict().keys() - tied
    assert all(torch.equal(value, peer.state_dict()[name]) for name, value in weights.items())
