"""Retrieval recall, the quality of a yes/no filter, NLVR2: plain dicts of floats in 0..1.

Caption metrics are in `captions.py`, VQA accuracy in `vqa.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from openblip.config import UserError

_SHOWN = 3  # ids spelled out in one error


def recall_at(sims: Any, text_image: Any, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Retrieval recall in both directions, several captions per image allowed (BLIP section 5.1).

    "tr@k" is the share of images with one of their captions among the k best texts, "ir@k" the share of
    texts with their image among the k best, "r_mean" the mean of all of these (six by default). Fractions in
    0..1; papers print them times 100.

    A tie counts against the model: a right answer ranks behind every wrong one of equal score. So a constant
    score gains nothing, and pairs that a rerank left at one low value are never found by luck.

    Args:
        sims: [n_images, n_texts] numpy array or torch tensor, larger is closer; may hold infinities.
        text_image: [n_texts] integers, for each text the row of `sims` it describes; every row needs a text.
        ks: depths, each at least 1.

    Raises:
        UserError: shapes that do not agree, an index out of range, an image without a text, NaN.
    """
    scores, owner = _array(sims), _array(text_image)
    if scores.ndim != 2 or scores.size == 0:
        raise UserError(f"sims: got shape {list(scores.shape)}, wanted [n_images, n_texts], at least [1, 1]")
    n_images, n_texts = scores.shape
    if owner.shape != (n_texts,) or not np.issubdtype(owner.dtype, np.integer):
        got = f"{owner.dtype} of shape {list(owner.shape)}"
        raise UserError(f"text_image: got {got}, wanted one integer for each of the {n_texts} texts")
    if owner.min() < 0 or owner.max() >= n_images:
        got = f"{owner.min()}..{owner.max()}"
        raise UserError(f"text_image: got {got}, wanted rows of sims, 0..{n_images - 1}")
    if len(bare := np.flatnonzero(np.bincount(owner, minlength=n_images) == 0)):
        raise UserError(f"text_image: {len(bare)} of {n_images} images have no text (first: {bare[0]})")
    if nans := int(np.isnan(scores).sum()):
        raise UserError(f"sims: {nans} of {scores.size} scores are NaN")
    if not ks or min(ks) < 1:
        raise UserError(f"ks: got {list(ks)}, wanted depths of at least 1")

    own = scores[owner, np.arange(n_texts)]  # of each text with its image
    best = np.full(n_images, -np.inf)  # of each image with its texts
    np.maximum.at(best, owner, own)
    # Ranks from 0: the wrong answers at least as good, hence all of them less the right ones.
    image_rank = (scores >= own).sum(axis=0) - 1
    right = np.bincount(owner[own >= best[owner]], minlength=n_images)
    text_rank = (scores >= best[:, None]).sum(axis=1) - right
    recalls = {f"tr@{k}": float((text_rank < k).mean()) for k in ks}
    recalls |= {f"ir@{k}": float((image_rank < k).mean()) for k in ks}
    return {**recalls, "r_mean": sum(recalls.values()) / len(recalls)}


def filter_scores(scores: Any, labels: Any, threshold: float = 0.5) -> dict[str, float]:
    """How well scores tell positives from negatives: "precision", "recall", "f1", "accuracy", "auc".

    All but "auc" are taken at the threshold. For CapFilt's filter the scores are P(match), the labels say
    which captions are true, and a caption is kept at P(match) >= 0.5. To ask how well it finds the noise,
    give 1 - scores and the opposite labels. The precision of a filter that calls nothing positive is 0.

    Args:
        scores: [n] finite numbers, larger is more positive.
        labels: [n] booleans or 0/1, with at least one of each.
        threshold: what scores this much or more is called positive.

    Raises:
        UserError: shapes that do not agree, scores not finite, labels not 0/1 or all the same.
    """
    values, truth = _scored(scores, labels)
    said = values >= threshold
    hits = int((said & truth).sum())
    precision, recall = hits / max(1, int(said.sum())), hits / int(truth.sum())
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "accuracy": float((said == truth).mean()),
        "auc": _auc(values, truth),
    }


def nlvr2_scores(predictions: Mapping[str, Any], labels: Mapping[str, Any]) -> dict[str, float]:
    """NLVR2's "accuracy" and "consistency" (Suhr et al. 2019, arXiv:1811.00491).

    Consistency is the share of sentences judged rightly with every one of their image pairs. As in the
    official script, examples are called "split-set-pair-sentence" ("dev-850-0-1"), and those that differ in
    the third field alone share their sentence.

    Args:
        predictions: example id -> True or False, or these words in any capitals.
        labels: example id -> the truth, likewise, for exactly the ids of `predictions`.

    Raises:
        UserError: nothing to score, ids that do not agree or are not of that form, other values.
    """
    require_same_ids(predictions, labels, "label")
    right, consistent = 0, dict[tuple[str, ...], bool]()
    for example, label in labels.items():
        fields = str(example).split("-")
        if len(fields) != 4:
            raise UserError(f'example "{example}": wanted an id like "dev-850-0-1" (split-set-pair-sentence)')
        hit = _truth(predictions[example], example) == _truth(label, example)
        right += hit
        sentence = (*fields[:2], fields[3])
        consistent[sentence] = consistent.get(sentence, True) and hit
    return {"accuracy": right / len(labels), "consistency": sum(consistent.values()) / len(consistent)}


def require_same_ids(predictions: Mapping[Any, Any], others: Mapping[Any, Any], what: str) -> None:
    """Raise UserError unless there are predictions and `others` (called `what`) has exactly their ids.

    To score what both have would be silently wrong: on another set a metric is another metric.
    """
    if not predictions:
        raise UserError(f"predictions: there are none (and {len(others)} of the other side: {what})")
    unknown = [repr(i) for i in predictions if i not in others]
    if unknown:
        raise UserError(f"{len(unknown)} ids have a prediction but no {what}: {_first(unknown)}")
    missing = [repr(i) for i in others if i not in predictions]
    if missing:
        raise UserError(f"{len(missing)} ids have a {what} but no prediction: {_first(missing)}")


def _first(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _array(values: Any) -> np.ndarray:
    """`values` as numpy; a torch tensor may be on any device, need gradients or be bfloat16."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        if values.is_floating_point():
            values = values.float() if values.element_size() < 4 else values
    return np.asarray(values)


def _scored(scores: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    values, truth = _array(scores), _array(labels)
    if values.ndim != 1 or truth.shape != values.shape:
        got = f"{list(values.shape)} and {list(truth.shape)}"
        raise UserError(f"scores and labels: got shapes {got}, wanted one shape [n]")
    if not np.isin(truth, (0, 1)).all():
        raise UserError("labels: wanted booleans or 0 and 1")
    if bad := int((~np.isfinite(values)).sum()):
        raise UserError(f"scores: {bad} of {values.size} are not finite")
    if len(np.unique(truth)) < 2:
        raise UserError(f"labels: got {truth.size} labels of one kind, wanted positives and negatives")
    return values, truth.astype(bool)


def _auc(values: np.ndarray, truth: np.ndarray) -> float:
    """Area under the ROC curve: how often a positive outscores a negative, a tie counting half."""
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[group]  # from 1; equal scores share the mean of their ranks
    positives = int(truth.sum())
    wins = rank[truth].sum() - positives * (positives + 1) / 2  # Mann-Whitney U
    return float(wins / (positives * (truth.size - positives)))


def _truth(value: Any, example: str) -> bool:
    word = str(value).lower()
    if word not in ("true", "false"):
        raise UserError(f'example "{example}": got {value!r}, wanted True or False')
    return word == "true"
