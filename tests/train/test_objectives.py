"""Every loss against a loop that says what it means, and what hard negatives may and may not be."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from openblip.train.objectives import (
    clip_loss,
    hard_negatives,
    itm_loss,
    labelled_positions,
    lm_loss,
    momentum_update_,
    next_token_labels,
    positive_pairs,
    soft_cross_entropy,
    soft_targets,
    vqa_loss,
)

DOUBLE = torch.float64


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), atol=tolerance, rtol=0)


def test_soft_targets_and_their_loss_are_what_a_loop_says():
    similarity, logits = torch.randn(2, 3, 6, dtype=DOUBLE)
    ids, candidates = torch.tensor([4, 9, 4]), torch.tensor([4, 9, 4, 9, 7, -100])
    positives = positive_pairs(ids, candidates)
    targets = soft_targets(similarity, positives, alpha=0.3)
    total = 0.0
    for i in range(3):
        same = [float(ids[i] == candidates[j]) for j in range(6)]
        believed = [math.exp(similarity[i, j]) for j in range(6)]
        predicted = [math.exp(logits[i, j]) for j in range(6)]
        for j in range(6):
            wanted = 0.3 * believed[j] / sum(believed) + 0.7 * same[j] / sum(same)
            assert targets[i, j].item() == pytest.approx(wanted, abs=1e-12)
            total -= wanted * math.log(predicted[j] / sum(predicted))
    close(soft_cross_entropy(logits, targets), total / 3)
    close(targets.sum(dim=1), [1.0, 1.0, 1.0])


def test_without_belief_targets_are_the_truth_alone():
    positives = torch.tensor([[True, False, True], [False, True, False]])
    close(soft_targets(torch.randn(2, 3), positives, 0.0), [[0.5, 0, 0.5], [0, 1, 0]])


@pytest.mark.parametrize("among_allowed", [False, True])
def test_hard_negatives_are_drawn_in_proportion_and_never_where_forbidden(among_allowed):
    similarity = torch.tensor([[3.0, 1.0, 0.0, 2.0], [0.5, 0.5, 4.0, -1.0]])
    forbidden = torch.tensor([[True, False, False, False], [False, False, True, False]])
    draws = 20_000
    index, exists = hard_negatives(
        similarity.repeat(draws, 1),
        forbidden.repeat(draws, 1),
        floor=0.05,
        among_allowed=among_allowed,
        generator=torch.Generator().manual_seed(3),
    )
    assert exists.all()
    rivals = similarity.masked_fill(forbidden, -torch.inf) if among_allowed else similarity
    weights = (rivals.softmax(dim=1) + 0.05) * ~forbidden
    wanted = weights / weights.sum(dim=1, keepdim=True)
    found = F.one_hot(index.view(draws, 2), 4).double().mean(dim=0)
    assert (found[forbidden] == 0).all()
    torch.testing.assert_close(found, wanted.double(), atol=0.012, rtol=0)  # over 3 standard errors


def test_the_same_generator_draws_the_same_negatives():
    similarity, forbidden = torch.randn(64, 64), torch.eye(64, dtype=torch.bool)

    def drawn(seed):
        return hard_negatives(similarity, forbidden, generator=torch.Generator().manual_seed(seed))[0]

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))


def test_a_row_without_weight_draws_evenly_from_what_is_allowed():
    """Softmax underflows beside a similarity that is forbidden, and fine-tuning adds no floor."""
    similarity = torch.tensor([[900.0, 0.0, 5.0]]).repeat(3000, 1)
    forbidden = torch.tensor([[True, False, False]]).repeat(3000, 1)
    index, exists = hard_negatives(
        similarity, forbidden, floor=0.0, generator=torch.Generator().manual_seed(0)
    )
    assert exists.all()
    counts = torch.bincount(index, minlength=3).tolist()
    assert counts[0] == 0 and abs(counts[1] - 1500) < 120


def test_a_row_where_everything_is_forbidden_has_no_negative():
    forbidden = torch.tensor([[True, True], [True, False]])
    index, exists = hard_negatives(torch.zeros(2, 2), forbidden)
    assert exists.tolist() == [False, True]
    assert index[1] == 1 and 0 <= index[0] < 2


def test_broken_similarities_leave_the_verdict_to_the_losses():
    """The loop's finite guard names the samples; an error out of the sampler would come before it."""
    similarity = torch.tensor([[math.nan, math.nan, math.nan], [0.0, math.inf, 0.0]])
    forbidden = torch.eye(3, dtype=torch.bool)[:2]
    for floor, among_allowed in itertools.product((0.0, 1e-4), (False, True)):
        index, exists = hard_negatives(similarity, forbidden, floor=floor, among_allowed=among_allowed)
        assert exists.all() and not forbidden[torch.arange(2), index].any()


def test_drawing_leaves_no_graph():
    similarity = torch.randn(3, 3, requires_grad=True)
    index, exists = hard_negatives(similarity, torch.eye(3, dtype=torch.bool))
    assert not index.requires_grad and not exists.requires_grad


def test_clip_loss_asks_both_ways_which_belongs_to_which():
    images, texts = F.normalize(torch.randn(2, 5, 8, dtype=DOUBLE), dim=-1)
    total = 0.0
    for i in range(5):
        of_image = [math.exp(7 * images[i] @ texts[j]) for j in range(5)]
        of_text = [math.exp(7 * images[j] @ texts[i]) for j in range(5)]
        total -= math.log(of_image[i] / sum(of_image)) + math.log(of_text[i] / sum(of_text))
    close(clip_loss(images, texts, torch.tensor(7.0, dtype=DOUBLE)), total / 10)


def test_itm_loss_counts_only_what_exists():
    logits, labels = torch.randn(4, 2, dtype=DOUBLE), torch.tensor([1, 0, 0, 1])
    total, count = itm_loss(logits, labels, torch.tensor([True, False, True, True]))
    wanted = [-math.log(math.exp(logits[r, labels[r]]) / logits[r].exp().sum()) for r in (0, 2, 3)]
    close(total, sum(wanted))
    assert count.item() == 3


def test_decoders_predict_the_next_token_of_real_tokens_only():
    ids = torch.tensor([[1, 7, 8, 2], [1, 9, 2, 0]])
    labels = next_token_labels(ids, (ids != 0).long())
    assert labels.tolist() == [[1, 7, 8, 2], [1, 9, 2, -100]]
    wanted, following = labelled_positions(labels)
    assert wanted.tolist() == [[True, True, True], [True, True, False]]
    assert following.tolist() == [7, 8, 2, 9, 2]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_lm_loss_is_cross_entropy_with_label_smoothing(smoothing):
    logits, labels = torch.randn(6, 9, dtype=DOUBLE), torch.randint(9, (6,))
    total, count = lm_loss(logits, labels, smoothing=smoothing)
    close(total / count, F.cross_entropy(logits, labels, label_smoothing=smoothing))
    by_hand = 0.0
    for row, label in zip(logits.log_softmax(dim=1), labels.tolist()):
        by_hand -= (1 - smoothing) * row[label].item() + smoothing * row.mean().item()
    close(total, by_hand)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("tokens", [0, 40])  # forty are gone through in parts
def test_the_gradient_of_lm_loss_is_that_of_cross_entropy(smoothing, tokens):
    logits = torch.randn(tokens, 9, dtype=DOUBLE, requires_grad=True)
    labels = torch.randint(9, (tokens,))
    total = lm_loss(logits, labels, smoothing=smoothing)[0]
    wanted = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")
    close(total, wanted)
    weight = torch.tensor(0.3, dtype=DOUBLE)
    close(torch.autograd.grad(total * weight, logits)[0], torch.autograd.grad(wanted * weight, logits)[0])


def test_the_gradient_of_lm_loss_is_rounded_once():
    logits = torch.randn(200, 90).bfloat16().requires_grad_()
    labels = torch.randint(90, (200,))
    weight = torch.tensor(1 / 3)  # which bfloat16 has not
    (ours,) = torch.autograd.grad(lm_loss(logits, labels)[0] * weight, logits)
    (exact,) = torch.autograd.grad(
        lm_loss(wide := logits.detach().double().requires_grad_(), labels)[0], wide
    )
    torch.testing.assert_close(ours, (exact / 3).bfloat16(), rtol=2**-7, atol=0)
    assert (ours == (exact / 3).bfloat16()).float().mean() > 0.999


def test_vqa_loss_is_the_weighted_sum_of_token_losses_over_questions():
    logits, labels = torch.randn(5, 7, dtype=DOUBLE), torch.randint(7, (5,))
    rows, weights = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0.7, 0.3, 1.0])
    total = 0.0
    for answer in range(3):
        tokens = [k for k in range(5) if rows[k] == answer]
        losses = [F.cross_entropy(logits[k], labels[k], label_smoothing=0.1).item() for k in tokens]
        total += weights[answer].item() * sum(losses)
    close(vqa_loss(logits, labels, rows, weights, questions=2), total / 2)


@pytest.mark.parametrize("loss", ["itc", "clip", "itm", "lm", "vqa"])
def test_losses_of_bfloat16_logits_are_made_in_float32(loss):
    logits, labels = (8 * torch.randn(5, 5)).bfloat16(), torch.randint(2, (5,))
    made = {
        "itc": lambda x: soft_cross_entropy(x, torch.full((5, 5), 0.2)),
        "clip": lambda x: clip_loss(x, torch.eye(5, dtype=x.dtype), torch.tensor(1.0)),
        "itm": lambda x: itm_loss(x[:, :2], labels, torch.ones(5))[0],
        "lm": lambda x: lm_loss(x, labels)[0],
        "vqa": lambda x: vqa_loss(x, labels, torch.arange(5), torch.ones(5), 5),
    }[loss]
    assert made(logits).dtype is torch.float32
    torch.testing.assert_close(made(logits), made(logits.float()), atol=1e-6, rtol=1e-6)


def test_momentum_update_moves_the_twin_alone():
    twin, online = [torch.randn(3, dtype=DOUBLE) for _ in range(2)], [torch.randn(3, dtype=DOUBLE)] * 2
    before, followed = [value.clone() for value in twin], online[0].clone()
    momentum_update_(twin, online, 0.9)
    for old, new in zip(before, twin):
        close(new, 0.9 * old + 0.1 * followed)
    assert torch.equal(online[0], followed)
