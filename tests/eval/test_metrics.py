"""Recall against a slow loop, ties, AUC against all pairs, curve points by hand, NLVR2's grouping, errors."""

import numpy as np
import pytest
import torch

from openblip.config import UserError
from openblip.eval.metrics import filter_scores, nlvr2_scores, recall_at

# rows: images, columns: texts; texts 0 and 1 describe image 0, the others images 1 and 2
SIMS = [[0.1, 0.9, 0.8, 0.0], [0.7, 0.2, 0.6, 0.5], [0.3, 0.4, 0.5, 0.4]]
OWNER = [0, 0, 1, 2]


def slow_recall(sims, owner, ks):
    """Rank of the best right answer when every wrong one of equal score stands before it."""
    n_images, n_texts = sims.shape
    text_ranks, image_ranks = [], []
    for i in range(n_images):
        best = max(sims[i, t] for t in range(n_texts) if owner[t] == i)
        text_ranks.append(sum(owner[t] != i and sims[i, t] >= best for t in range(n_texts)))
    for t in range(n_texts):
        image_ranks.append(sum(i != owner[t] and sims[i, t] >= sims[owner[t], t] for i in range(n_images)))
    recalls = {f"tr@{k}": np.mean(np.array(text_ranks) < k) for k in ks}
    return recalls | {f"ir@{k}": np.mean(np.array(image_ranks) < k) for k in ks}


def test_recall_by_hand():
    got = recall_at(np.array(SIMS), np.array(OWNER), ks=(1, 2))
    # image 0: text 1 is first; image 1: text 2 second; image 2: text 3 ties with text 1 behind text 2: third
    assert (got["tr@1"], got["tr@2"]) == pytest.approx((1 / 3, 2 / 3))
    # text 0: its image is last; text 1: first; text 2: second; text 3: second
    assert (got["ir@1"], got["ir@2"]) == pytest.approx((1 / 4, 3 / 4))
    assert got["r_mean"] == pytest.approx((1 / 3 + 2 / 3 + 1 / 4 + 3 / 4) / 4)


def test_recall_equals_the_slow_loop():
    rng = np.random.default_rng(0)
    for _ in range(20):
        n_images = int(rng.integers(1, 12))
        owner = np.concatenate([np.arange(n_images), rng.integers(0, n_images, size=15)])
        rng.shuffle(owner)
        sims = rng.integers(0, 6, size=(n_images, len(owner))).astype(float)  # many ties
        got = recall_at(sims, owner)
        mean = got.pop("r_mean")
        assert got == pytest.approx(slow_recall(sims, owner, (1, 5, 10)))
        assert mean == pytest.approx(sum(got.values()) / 6)
        assert list(got) == ["tr@1", "tr@5", "tr@10", "ir@1", "ir@5", "ir@10"]


def test_a_tie_counts_against_the_model():
    owner = np.repeat(np.arange(20), 2)
    for constant in (0.0, -100.0, -np.inf):
        assert recall_at(np.full((20, 40), constant), owner)["r_mean"] == 0.0
    # Texts of the same image are no rivals of each other.
    assert recall_at(np.eye(20)[:, owner], owner)["r_mean"] == 1.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_torch_and_numpy_agree(dtype):
    sims = torch.tensor([[3, 1, 2], [3, 4, 0]]).to(dtype)
    sims = sims.requires_grad_() if dtype.is_floating_point else sims
    got = recall_at(sims, torch.tensor([0, 1, 0]))
    assert got == recall_at(np.array([[3.0, 1, 2], [3, 4, 0]]), [0, 1, 0])
    assert got["ir@1"] == pytest.approx(2 / 3)  # text 0 is tied


@pytest.mark.parametrize(
    ("sims", "owner", "ks", "message"),
    [
        (np.zeros(3), [0], (1,), r"sims: got shape \[3\]"),
        (np.zeros((0, 3)), [0, 0, 0], (1,), r"sims: got shape \[0, 3\]"),
        (np.zeros((2, 3)), [0, 1], (1,), r"text_image: got int64 of shape \[2\], .* 3 texts"),
        (np.zeros((2, 3)), [0.0, 1, 1], (1,), "text_image: got float64"),
        (np.zeros((2, 3)), [0, 1, 2], (1,), r"text_image: got 0\.\.2, wanted rows of sims, 0\.\.1"),
        (np.zeros((2, 3)), [0, 1, -1], (1,), r"text_image: got -1\.\.1"),
        (np.zeros((3, 3)), [0, 0, 2], (1,), r"1 of 3 images have no text \(first: 1\)"),
        (np.array([[1.0, np.nan]]), [0, 0], (1,), "1 of 2 scores are NaN"),
        (np.zeros((1, 1)), [0], (0, 1), r"ks: got \[0, 1\]"),
        (np.zeros((1, 1)), [0], (), r"ks: got \[\]"),
    ],
)
def test_recall_refuses_what_it_cannot_score(sims, owner, ks, message):
    with pytest.raises(UserError, match=message):
        recall_at(sims, owner, ks)


def test_filter_by_hand():
    got = filter_scores([0.9, 0.5, 0.4, 0.8, 0.1], [1, 1, 1, 0, 0])
    # at 0.5: two true and one false called positive; 4 of the 6 pairs in the right order
    assert got == pytest.approx(
        {"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "accuracy": 3 / 5, "auc": 4 / 6}
    )
    assert filter_scores([0.1, 0.2], [True, False]) == {
        "precision": 0.0, "recall": 0.0, "f1": 0.0, "accuracy": 0.5, "auc": 0.0,
    }  # fmt: skip
    assert filter_scores([0.6, 0.7], [False, True], threshold=0.65)["accuracy"] == 1.0


def test_auc_equals_all_pairs():
    rng = np.random.default_rng(0)
    for _ in range(20):
        labels = rng.permutation(np.arange(30) < rng.integers(1, 29))
        scores = rng.integers(0, 8, size=30) / 8  # many ties
        pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels] for n in scores[~labels]]
        assert filter_scores(torch.tensor(scores), torch.tensor(labels))["auc"] == pytest.approx(
            np.mean(pairs)
        )


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0.1, 0.2], [1], r"got shapes \[2\] and \[1\]"),
        ([[0.1]], [[1]], "wanted one shape"),
        ([], [], "got 0 labels of one kind"),
        ([0.1, 0.2], [1, 1], "got 2 labels of one kind"),
        ([0.1, 0.2], [1, 2], "wanted booleans or 0 and 1"),
        ([0.1, np.nan], [1, 0], "1 of 2 are not finite"),
    ],
)
def test_filter_refuses_what_it_cannot_score(scores, labels, message):
    with pytest.raises(UserError, match=message):
        filter_scores(scores, labels)


def test_nlvr2_groups_by_sentence():
    labels = {"dev-1-0-0": "True", "dev-1-1-0": "False", "dev-1-0-1": "True", "dev-2-0-0": "False"}
    said = {"dev-1-0-0": "FALSE", "dev-1-1-0": "true", "dev-1-0-1": True, "dev-2-0-0": False}
    # sentence (dev, 1, 0) is wrong with both of its pairs; (dev, 1, 1) and (dev, 2, 0) are right
    assert nlvr2_scores(said, labels) == pytest.approx({"accuracy": 2 / 4, "consistency": 2 / 3})
    said["dev-1-0-0"] = "True"  # one wrong pair of two is still an inconsistent sentence
    assert nlvr2_scores(said, labels) == pytest.approx({"accuracy": 3 / 4, "consistency": 2 / 3})
    assert nlvr2_scores(labels, labels) == {"accuracy": 1.0, "consistency": 1.0}


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        ({}, {"dev-1-0-0": True}, "there are none"),
        ({"dev-1-0-0": True}, {"dev-1-0-1": True}, "have a prediction but no label: 'dev-1-0-0'"),
        ({"dev-1-0-0": True}, {"dev-1-0-0": True, "dev-1-0-1": True}, "have a label but no prediction"),
        ({"dev-1": True}, {"dev-1": True}, 'example "dev-1": wanted an id like'),
        ({"dev-1-0-0": "yes"}, {"dev-1-0-0": True}, "got 'yes', wanted True or False"),
        ({"dev-1-0-0": True}, {"dev-1-0-0": 1}, "got 1, wanted True or False"),
    ],
)
def test_nlvr2_refuses_what_it_cannot_score(predictions, labels, message):
    with pytest.raises(UserError, match=message):
        nlvr2_scores(predictions, labels)


def test_a_long_list_of_ids_is_cut_short():
    with pytest.raises(UserError, match=r"^5 ids have a prediction but no label: 0, 1, 2, \.\.\.$"):
        nlvr2_scores(dict.fromkeys(range(5), True), {})
