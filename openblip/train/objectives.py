"""The losses of the line, as functions of tensors: ITC, ITM's hard negatives, LM, CLIP's contrastive loss.

Shapes: B pairs of this rank, M candidates (all pairs of the global batch, then the queue), P projection
width, L tokens, V vocabulary, K labelled positions.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def wide(logits: Tensor) -> Tensor:
    """At least float32: bfloat16 logits have too few digits for a softmax over many."""
    return logits if logits.dtype is torch.float64 else logits.float()


def positive_pairs(ids: Tensor, candidate_ids: Tensor) -> Tensor:
    """Which candidates show the same image: ids [B], candidate_ids [M] -> [B, M], True for a positive."""
    return ids[:, None] == candidate_ids[None, :]


def soft_targets(similarity: Tensor, positives: Tensor, alpha: float) -> Tensor:
    """ITC targets [B, M]: α · what the momentum encoder believes + (1 − α) · the truth (ALBEF eq. 6, BLIP §3.2).

    similarity [B, M]: the momentum features' cosines over the temperature. positives [B, M] bool; several
    positives of a row share its weight.
    """
    truth = positives.to(similarity.dtype)
    truth = truth / truth.sum(dim=1, keepdim=True)
    return alpha * similarity.softmax(dim=1) + (1 - alpha) * truth


def smoothed_targets(positives: Tensor, smoothing: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """ITC targets [B, M] of BLIP-2: the positives [B, M] share 1 − s, all candidates share s.

    With one positive per row this is ordinary label smoothing.
    """
    truth = positives.to(dtype)
    return (1 - smoothing) * truth / truth.sum(dim=1, keepdim=True) + smoothing / truth.shape[1]


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over rows of −Σ targets · log softmax(logits); both [B, M]."""
    return -(targets * F.log_softmax(wide(logits), dim=1)).sum(dim=1).mean()


def clip_loss(image_features: Tensor, text_features: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE (Radford et al. 2021, fig. 3) of normalised features [B, P], B the global batch."""
    logits = wide(scale * image_features @ text_features.T)
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def hard_negatives(
    similarity: Tensor,
    forbidden: Tensor,
    *,
    floor: float = 1e-4,
    among_allowed: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """One negative per row, drawn in proportion to softmax(similarity) + floor (BLIP §3.2).

    similarity [B, M] over the temperature; forbidden [B, M], True for own pairs and pairs of the same image.
    among_allowed: take the softmax over what is allowed, as BLIP-2's code does, and not over all, as BLIP's: there the
    floor gains weight as own pairs become likely, and the draw gets easier with time.
    Returns (index [B], exists [B]). When softmax and floor leave nothing to draw from, the draw is uniform
    over what is allowed; a row in which everything is forbidden has no negative: `exists` is False and its
    index is only there to keep the shape. Similarities that are not finite draw like zeros: it is the losses'
    part to say that something broke.
    """
    scores = similarity.detach().float()
    if among_allowed:
        scores = scores.masked_fill(forbidden, -torch.inf)
    weights = scores.softmax(dim=1).nan_to_num(0) + floor
    weights = weights.masked_fill(forbidden, 0)
    empty = weights.sum(dim=1, keepdim=True) <= 0
    weights = torch.where(empty, (~forbidden).float(), weights)
    exists = (~forbidden).any(dim=1)
    weights = torch.where(exists[:, None], weights, torch.ones_like(weights))
    return torch.multinomial(weights, 1, generator=generator).squeeze(1), exists


def itm_loss(logits: Tensor, labels: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Matching cross-entropy over the rows where `counted` [R]: (its sum, how many they are).

    logits [R, 2], labels [R] (1 = match). Uncounted rows are those for which no negative exists.
    """
    losses = F.cross_entropy(wide(logits), labels, reduction="none")
    return (losses * counted).sum(), counted.sum().float()


def next_token_labels(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Labels [B, L] of a text itself: its ids, −100 on padding."""
    return input_ids.masked_fill(attention_mask == 0, -100)


def labelled_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where a decoder must predict, so that logits are made nowhere else.

    labels [B, L] aligned with the input -> (positions [B, L - 1] bool over states[:, :-1], their labels [K]).
    """
    following = labels[:, 1:]
    wanted = following != -100
    return wanted, following[wanted]


def lm_loss(logits: Tensor, labels: Tensor, *, smoothing: float = 0.1) -> tuple[Tensor, Tensor]:
    """Cross-entropy of logits [K, V] with label smoothing: (its sum over the K labels, how many they are).

    The mean is left to the caller, because ranks hold different numbers of tokens.
    """
    total = _SummedCrossEntropy.apply(logits, labels, smoothing)
    return total, torch.tensor(float(len(labels)), device=logits.device)


class _SummedCrossEntropy(torch.autograd.Function):
    """`F.cross_entropy(wide(logits), labels, label_smoothing, reduction="sum")`, never with all of [K, V] in float32.

    A language model's vocabulary makes logits the largest tensor of a step. They are widened some rows at a time, for
    the loss and again for its gradient: softmax less target, rounded once.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        total = wide(logits.new_zeros(()))
        normalisers = total.new_empty(len(logits), 1)
        for rows in _some_rows(logits):
            part, right = wide(logits[rows]), labels[rows, None]
            normalisers[rows] = part.logsumexp(dim=1, keepdim=True)
            wanted = (1 - smoothing) * part.gather(1, right) + smoothing * part.mean(dim=1, keepdim=True)
            total += (normalisers[rows] - wanted).sum()
        ctx.save_for_backward(logits, labels, normalisers)
        ctx.smoothing = smoothing
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor, None, None]:
        logits, labels, normalisers = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for rows in _some_rows(logits):
            slope = (wide(logits[rows]) - normalisers[rows]).exp_()
            slope -= ctx.smoothing / logits.shape[1]
            slope.scatter_add_(1, labels[rows, None], torch.full_like(normalisers[rows], ctx.smoothing - 1))
            gradient[rows] = slope.mul_(grad_total)
        return gradient, None, None


def _some_rows(logits: Tensor) -> list[slice]:
    """Rows of logits [K, V] that are widened at once: on a CPU, so few that they stay in its cache."""
    step = 16 if logits.device.type == "cpu" else 4096
    return [slice(first, first + step) for first in range(0, len(logits), step)]


def vqa_loss(
    logits: Tensor, labels: Tensor, rows: Tensor, weights: Tensor, questions: int, *, smoothing: float = 0.1
) -> Tensor:
    """Σ over answers of weight · summed token loss, over the number of questions (BLIP's VQA code).

    logits [K, V], labels [K], rows [K]: the answer each label belongs to, weights [R] of the answers.
    """
    losses = F.cross_entropy(wide(logits), labels, label_smoothing=smoothing, reduction="none")
    return (losses * weights[rows]).sum() / questions


@torch.no_grad()
def momentum_update_(twin: list[Tensor], online: list[Tensor], momentum: float) -> None:
    """twin ← momentum · twin + (1 − momentum) · online, in place, tensor by tensor (MoCo)."""
    torch._foreach_lerp_(twin, online, 1 - momentum)


def sequence_log_probs(logits: Tensor, labels: Tensor, rows: Tensor, count: int) -> Tensor:
    """log P of texts [count]: of logits [K, V] and labels [K], summed over those that belong to each text, rows [K]."""
    losses = F.cross_entropy(wide(logits), labels, reduction="none")
    return losses.new_zeros(count).index_add(0, rows, -losses)


def dpo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """−log σ(β (chosen − rejected)), mean over pairs (Rafailov et al. 2023, eq. 7).

    chosen, rejected [B]: log P of the answers under the policy, less that under the reference.
    """
    return -F.logsigmoid(beta * (chosen - rejected)).mean()
