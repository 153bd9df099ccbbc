"""CapFilt on real, tiny models: an image's result is its own; and the rules of what is kept, by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from openblip.api import Match
from openblip.config import UserError
from openblip.curate.capfilt import (
    CapFilt,
    CapFiltConfig,
    MatchScale,
    ScoredText,
    bootstrap,
    fit_match_scale,
    keep_best,
    keep_matching,
    nucleus,
    seed_of,
    weights_hash,
)
from openblip.data.rows import Row
from tests.curate.made import picture_rows, tiny_blip


@pytest.fixture(scope="module")
def models():
    return tiny_blip(1), tiny_blip(2)


def config(seed: int = 0, texts: int = 2) -> CapFiltConfig:
    generation = nucleus()
    generation.max_new_tokens, generation.num_return_sequences = 5, texts
    return CapFiltConfig(generation, seed=seed)


def judged(capfilt: CapFilt, rows: list[Row], batch: int) -> dict[str, list[ScoredText]]:
    found: dict[str, list[ScoredText]] = {row.id: [] for row in rows}
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        for text in capfilt(part, capfilt.embed(part)):
            found[text.id].append(text)
    return found


def same(one: dict[str, list[ScoredText]], other: dict[str, list[ScoredText]]) -> bool:
    def words(texts):
        return [(text.kind, text.text, text.seed) for text in texts]

    def close(a, b):
        return a.itm == pytest.approx(b.itm, abs=1e-5) and a.itc == pytest.approx(b.itc, abs=1e-5)

    return all(
        words(one[name]) == words(other[name]) and all(map(close, one[name], other[name])) for name in one
    )


def test_an_images_texts_and_scores_do_not_depend_on_batch_or_order(models):
    rows = picture_rows(6)
    capfilt = CapFilt(*models, config())
    reference = judged(capfilt, rows, 6)
    assert [text.kind for text in reference["id1"]] == ["web", "web", "synthetic", "synthetic"]
    assert [text.kind for text in reference["id2"]] == ["web", "synthetic", "synthetic"]
    assert len({text.itm for texts in reference.values() for text in texts}) > 10, "scores differ"
    assert same(reference, judged(capfilt, rows, 1))
    assert same(reference, judged(capfilt, rows[::-1], 4))
    assert not same(reference, judged(CapFilt(*models, config(seed=1)), rows, 6)), "the seed matters"


def test_scores_are_those_of_match(models):
    rows = picture_rows(2)
    found = judged(CapFilt(*models, config()), rows, 2)
    for row in rows:
        texts = [text.text for text in found[row.id]]
        match = models[1].match(row.image, texts)
        assert [text.itm for text in found[row.id]] == pytest.approx(match.probability.tolist(), abs=1e-5)
        assert [text.itc for text in found[row.id]] == pytest.approx(match.cosine.tolist(), abs=1e-5)


def test_what_is_blank_or_written_twice_is_left_out(models, monkeypatch):
    capfilt, rows = CapFilt(*models, config()), picture_rows(2)
    monkeypatch.setattr(capfilt.captioner, "caption_embeds", lambda *_: [["a cat", "a cat", " "], ["", ""]])
    found = judged(capfilt, rows, 2)
    assert [text.text for text in found["id0"] if text.kind == "synthetic"] == ["a cat"]
    assert [text.kind for text in found["id1"]] == ["web", "web"]
    rows = [Row("bare", rows[1].images, []), Row("too", rows[1].images, [])]
    monkeypatch.setattr(capfilt.captioner, "caption_embeds", lambda *_: [[""], [""]])
    assert capfilt(rows, capfilt.embed(rows)) == []


def test_models_without_the_part_are_refused(models):
    with pytest.raises(UserError, match="captioner: this model has no text decoder"):
        CapFilt(tiny_blip(1, decoder=False), models[1])
    with pytest.raises(UserError, match="filter: this model has no ITM head"):
        CapFilt(models[0], tiny_blip(1, encoder=False))


def test_the_fingerprint_sees_one_weight_and_the_transform():
    model = tiny_blip(3)
    before = weights_hash(model)
    assert weights_hash(tiny_blip(3)) == before
    model.transform = replace(model.transform, mean=(0.5, 0.5, 0.5))
    assert weights_hash(model) != before
    model = tiny_blip(3)
    with torch.no_grad():
        model.model.itm_head.bias[0] += 1e-6
    assert weights_hash(model) != before


def test_seeds():
    assert seed_of("a", 0) == seed_of("a", 0)
    assert len({seed_of("a", 0), seed_of("b", 0), seed_of("a", 1)}) == 3
    assert all(0 <= seed_of(str(number), 0) < 2**63 for number in range(100))


def text(name: str, kind: str, words: str, itm: float, itc: float) -> ScoredText:
    return ScoredText(name, kind, words, itm, itc, itm, None)


TEXTS = [
    text("a", "web", "w", 0.5, 0.1),
    text("a", "synthetic", "s", 0.499, 0.3),
    text("a", "synthetic", "t", 0.9, 0.2),
    text("b", "web", "w", 0.2, 0.1),
    text("b", "synthetic", "w", 0.3, 0.4),
    text("b", "synthetic", "x", 0.3, -0.4),
]


def test_rules():
    assert keep_matching(TEXTS) == [True, False, True, False, False, False]
    assert keep_matching(TEXTS, 0.3) == [True, True, True, False, True, True]
    assert keep_best(TEXTS, 1) == [False, True, False, False, True, False]
    assert keep_best(TEXTS, 2) == [False, True, True, False, True, True], "equal texts take one place"
    assert keep_best(TEXTS[:1], 5) == [True]


def test_bootstrap():
    rows = [Row("a", [b"1"], ["w"], label=7), Row("b", [b"2"], ["w"])]
    made = bootstrap(rows, TEXTS, keep_matching(TEXTS))
    assert [(row.id, row.captions, row.label) for row in made] == [("a", ["w", "t"], 7)]
    assert rows[0].captions == ["w"], "the rows given are left as they were"
    with pytest.raises(UserError, match="dropped every text"):
        bootstrap(rows, TEXTS, [False] * 6)


class PlantedFilter:
    """Judges picture i (embeds [1, 1, 1] that say i) with text j as planted: P(match) and cosine [n, n]."""

    def __init__(self, probability: np.ndarray, cosine: np.ndarray) -> None:
        self.probability, self.cosine = probability, cosine

    def match_embeds(self, embeds: torch.Tensor, texts: list[list[str]]) -> Match:
        pictures = embeds.flatten().long().tolist()
        return Match(self.probability[pictures], self.cosine[pictures])


def planted(signal: float, count: int = 40) -> tuple[PlantedFilter, list[Row], torch.Tensor]:
    """Logits and cosines that are both `signal` deviations higher for a picture's own caption."""
    rng = np.random.default_rng(0)
    own = np.eye(count)
    logit = 3 * (rng.normal(0, 1, (count, count)) + signal * own) - 2
    cosine = 0.1 * (rng.normal(0, 1, (count, count)) + signal * own) + 0.2
    rows = [Row(str(number), [b""], [f"text {number}"]) for number in range(count)]
    return PlantedFilter(1 / (1 + np.exp(-logit)), cosine), rows, torch.arange(count).view(-1, 1, 1)


def test_the_default_scale_is_the_itm_head():
    probability = np.array([0.0, 0.2, 0.5, 1.0])
    assert MatchScale()(probability, np.array([9.0, -9, 9, -9])) == pytest.approx(probability, abs=1e-6)


@pytest.mark.parametrize("signal", [2.0, 40.0])  # the halves overlap; the halves are far apart
def test_a_fitted_scale_listens_to_both_heads_alike(signal):
    filter, rows, embeds = planted(signal)
    scale = fit_match_scale(filter, rows, embeds)
    own = np.eye(len(rows), dtype=bool)
    match = scale(filter.probability, filter.cosine)
    found, missed = (match[own] >= 0.5).mean(), (match[~own] >= 0.5).mean()
    # The mean of two scores of one deviation each has one of √½: what a filter by both, cut in the middle, gets.
    share = 0.5 * math.erfc(-signal / 2)
    assert found == pytest.approx(share, abs=0.06) and missed == pytest.approx(1 - share, abs=0.06)
    if signal == 2:  # else the logits are at the end of what a probability can tell
        assert scale.itm * 3 == pytest.approx(scale.itc * 0.1, rel=0.1), "per deviation"


def test_a_head_that_does_not_know_is_still_asked():
    """Held-out pairs are easier than the web's noise, so a head is not left out for what it says of them."""
    filter, rows, embeds = planted(2.0)
    filter.probability = np.random.default_rng(1).uniform(0.3, 0.9, filter.probability.shape)
    scale = fit_match_scale(filter, rows, embeds)
    logit = np.log(filter.probability / (1 - filter.probability))
    own = np.eye(len(rows), dtype=bool)
    balanced = [np.concatenate([x[own].repeat(len(rows) - 1), x[~own]]).std() for x in (logit, filter.cosine)]
    assert scale.itm * balanced[0] == pytest.approx(scale.itc * balanced[1], rel=1e-6)


def test_a_scale_needs_two_pairs():
    filter, rows, embeds = planted(0.3)
    with pytest.raises(UserError, match="1 human pairs are too few"):
        fit_match_scale(filter, rows[:1], embeds[:1])


def test_the_scale_decides_what_is_kept_and_the_heads_stay_on_record(models):
    rows, plain = picture_rows(2), config()
    turned = replace(plain, scale=MatchScale(itm=-1.0))
    before, after = judged(CapFilt(*models, plain), rows, 2), judged(CapFilt(*models, turned), rows, 2)
    for one, other in zip(before["id1"], after["id1"], strict=True):
        assert one.match == pytest.approx(one.itm) and one.itm == other.itm
        assert other.match == pytest.approx(1 - one.itm)
    assert CapFilt(*models, plain).fingerprint != CapFilt(*models, turned).fingerprint
    assert keep_matching(after["id1"]) == [text.match >= 0.5 for text in after["id1"]]
