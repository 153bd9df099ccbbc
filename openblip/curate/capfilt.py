"""CapFilt (BLIP §3.3): a captioner writes captions for web images, a filter drops texts that do not match.

    web pairs  {(I, T_w)} ──┬──────────────────── filter ── kept (I, T_w) ┐
                            └─ captioner ── T_s ─ filter ── kept (I, T_s) ┼─► a dataset to train on
    human pairs {(I, T_h)} ───────────────────────────────────────────────┘

Captioner (LM) and filter (ITC + ITM) are fine-tuned separately, from the same pre-trained model, on the
human pairs; sharing weights between them makes the filter forgive the captioner's mistakes (table 4). Scores
are stored, and what is kept is decided when they are read: `keep_matching` is BLIP's rule, `keep_best`
BLIP-2's (§3.4).
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from openblip.api import Pipeline
from openblip.config import UserError, to_dict
from openblip.data.collate import Rows, picture_key
from openblip.data.features import FeatureCache
from openblip.data.rows import Row
from openblip.fingerprint import vision_hash, weights_hash
from openblip.models.generation import GenerationConfig

Kind = Literal["web", "synthetic"]


def nucleus() -> GenerationConfig:
    """The paper's sampling: one caption by nucleus sampling, p = 0.9 (more diverse than beams: table 2).

    Lengths and the repetition penalty are those of the released captioning code.
    """
    return GenerationConfig(
        do_sample=True, top_p=0.9, repetition_penalty=1.1, min_new_tokens=3, max_new_tokens=20
    )


@dataclass(frozen=True)
class MatchScale:
    """P(match) from both of the filter's heads: sigmoid(itm · ITM logit + itc · cosine + bias).

    The default is the ITM head alone, the paper's rule. A small filter, whose ITM head has seen little, gains from
    the cosine; `fit_match_scale` finds the weights on human pairs the filter was not trained on.
    """

    itm: float = 1.0
    itc: float = 0.0
    bias: float = 0.0

    def __call__(self, probability: np.ndarray, cosine: np.ndarray) -> np.ndarray:
        """P(match) of the ITM head and cosines [...] -> P(match) [...]."""
        clipped = probability.astype(np.float64).clip(1e-7, 1 - 1e-7)
        logit = np.log(clipped / (1 - clipped))
        return 1 / (1 + np.exp(-(self.itm * logit + self.itc * cosine + self.bias)))


@dataclass
class CapFiltConfig:
    """How captions are written. `num_return_sequences` of `generation` is the number of captions per image.

    prompt: None for the captioner's own. seed: with the image's id, it alone decides what is sampled.
    """

    generation: GenerationConfig = field(default_factory=nucleus)
    prompt: str | None = None
    seed: int = 0
    scale: MatchScale = field(default_factory=MatchScale)


@dataclass(frozen=True)
class ScoredText:
    """A text of an image, where it came from, and what the filter thinks of it."""

    id: str  # of the image
    kind: Kind
    text: str
    itm: float  # P(match) of the ITM head
    itc: float  # cosine of the ITC features
    match: float  # what is decided by: `itm`, unless the job has a `MatchScale`
    seed: int | None  # what a synthetic text was sampled with
    captioner: str | None = None  # hash of the model that wrote it; None: of the web

    def record(self) -> dict[str, Any]:
        """As a dict, for a table."""
        return asdict(self)


def fit_scale_on(
    filter: Pipeline, rows: Rows, *, most: int = 200, report: Callable[[int, int], None] | None = None
) -> MatchScale:
    """`fit_match_scale` on at most `most` of the rows, at even distances, whose pictures are opened.

    Four digits are kept: a job that is gone on with elsewhere, where sums are rounded otherwise, has the same scale.
    """
    count = min(most, len(rows))
    chosen = [rows[index] for index in np.linspace(0, len(rows) - 1, count).round().astype(int).tolist()]
    embeds = (
        torch.cat([part for part, _ in filter.encoded([row.image for row in chosen])]) if chosen else None
    )
    scale = fit_match_scale(filter, chosen, torch.empty(0) if embeds is None else embeds, report=report)
    return MatchScale(*(float(f"{value:.4g}") for value in (scale.itm, scale.itc, scale.bias)))


def fit_match_scale(
    filter: Pipeline,
    rows: Sequence[Row],
    embeds: Tensor,
    *,
    report: Callable[[int, int], None] | None = None,
) -> MatchScale:
    """P(match) from the filter's two scores, of equal weight, as a logistic regression on their sum.

    rows: human pairs kept out of the filter's training; embeds [B, N, D] of their pictures. Every picture is
    judged with its own caption and with those of the other rows; both kinds weigh the same, so 0.5 is the
    boundary between a match and a chance pair. Raises UserError for fewer than two rows.

    Only the scale is fitted. Captions of other human pairs are easier to tell than what is wrong with web captions:
    a regression that may choose between the scores learns to overlook the ITM head, which knows more of the latter.
    """
    if len(rows) < 2:
        raise UserError(f"{len(rows)} human pairs are too few to fit the filter's scale: give two or more")
    texts = [row.captions[0] for row in rows]
    found = []
    for picture in embeds:  # rows² texts are many at once
        found.append(filter.match_embeds(picture[None], [texts]))
        if report is not None:
            report(len(found), len(rows))
    own = np.eye(len(rows), dtype=bool).ravel()
    weight = np.where(own, 0.5 / own.sum(), 0.5 / (~own).sum())
    p = np.concatenate([one.probability[0] for one in found]).astype(np.float64).clip(1e-7, 1 - 1e-7)
    scores = np.stack([np.log(p / (1 - p)), np.concatenate([one.cosine[0] for one in found])], axis=1)
    mean = weight @ scores
    spread = np.sqrt(weight @ (scores - mean) ** 2) + 1e-9
    x = np.stack([((scores - mean) / spread).sum(axis=1), np.ones(len(own))], axis=1)
    ridge = np.diag([1e-3, 0.0])  # a bounded slope when the pairs are perfectly separable
    beta = np.zeros(2)
    for _ in range(50):  # Newton's method; the problem is convex
        predicted = 1 / (1 + np.exp(-(x @ beta)))
        gradient = x.T @ (weight * (predicted - own)) + ridge @ beta
        curvature = (x * (weight * predicted * (1 - predicted))[:, None]).T @ x + ridge
        beta -= np.linalg.solve(curvature + 1e-9 * np.eye(2), gradient)
    itm, itc = beta[0] / spread
    return MatchScale(float(itm), float(itc), float(beta[1] - itm * mean[0] - itc * mean[1]))


@dataclass(frozen=True)
class Written:
    """A text by a captioner (its hash), and what it was sampled with."""

    text: str
    seed: int
    captioner: str


class CapFilt:
    """Captioners and filter at work on one batch of web images after the other.

    captioner: one, or several, each of which writes its own captions, whose texts stand in their order.
    features: what the vision tower made of the pictures, if all models have the same frozen one.
    Raises UserError for a captioner that cannot write or a filter that cannot judge.
    """

    def __init__(
        self,
        captioner: Pipeline | Sequence[Pipeline],
        filter: Pipeline,
        config: CapFiltConfig | None = None,
        *,
        features: FeatureCache | None = None,
    ) -> None:
        self.captioners = [captioner] if isinstance(captioner, Pipeline) else list(captioner)
        if not self.captioners or not all(one.can_caption for one in self.captioners):
            raise UserError("captioner: this model has no text decoder; give a captioning model")
        if not filter.can_match:
            raise UserError("filter: this model has no ITM head; give a retrieval model")
        self.filter = filter
        self.config = config or CapFiltConfig()
        self.models = model_names([weights_hash(one) for one in self.captioners], weights_hash(filter))
        self._towers = [(vision_hash(one), one.transform) for one in (*self.captioners, filter)]
        self.one_tower = len({tower for tower, _ in self._towers}) == 1
        if features is not None and not self.one_tower:
            raise UserError(
                "features: captioner and filter have different vision towers, so no cache serves both"
            )
        self.features = features

    @property
    def captioner(self) -> Pipeline:
        """The first of them."""
        return self.captioners[0]

    @property
    def draft_size(self) -> int:
        """The `draft_size` for `open_image` that is enough for all models."""
        return max(transform.draft_size for _, transform in self._towers)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the outcome depends on besides the data: the models' weights, and the configuration."""
        return {**self.models, "config": to_dict(self.config)}

    def load(self) -> "CapFilt":
        """Itself: its models are there. See `loading.NamedCapFilt`."""
        return self

    def __call__(self, rows: Sequence[Row], embeds: Sequence[Tensor]) -> list[ScoredText]:
        """Write captions for a batch of images and score them beside the web's: `write`, then `score`.

        Texts come image by image, the web's first; an image's own result does not depend on the batch it is in.
        """
        return self.score(rows, self.write(rows, embeds), embeds)

    def write(self, rows: Sequence[Row], embeds: Sequence[Tensor]) -> list[list[Written]]:
        """The captions of each image, from what `embed` gave.

        What the captioners wrote twice is there once, what they left blank not at all.
        """
        seeds = [seed_of(row.id, self.config.seed) for row in rows]
        found: list[dict[str, Written]] = [{} for _ in rows]
        hashes = [name for key, name in self.models.items() if key != "filter"]
        for captioner, name, seen in zip(self.captioners, hashes, embeds[:-1], strict=True):
            written = captioner.caption_embeds(seen, self.config.prompt, self.config.generation, seeds)
            for of, texts, seed in zip(found, written, seeds, strict=True):
                for text in texts:
                    if text.strip():
                        of.setdefault(text, Written(text, seed, name))
        return [list(of.values()) for of in found]

    def score(
        self, rows: Sequence[Row], written: Sequence[Sequence[Written]], embeds: Sequence[Tensor]
    ) -> list[ScoredText]:
        """The web's texts and the written ones as the filter judges them."""
        texts: list[list[tuple[Kind, str, int | None, str | None]]] = [
            [("web", text, None, None) for text in row.captions]
            + [("synthetic", one.text, one.seed, one.captioner) for one in own]
            for row, own in zip(rows, written, strict=True)
        ]
        scored: list[ScoredText] = []
        if not any(texts):
            return scored
        found = self.filter.match_ragged(embeds[-1], [[text for _, text, _, _ in of] for of in texts])
        for row, of, judged in zip(rows, texts, found, strict=True):
            match = self.config.scale(judged.probability, judged.cosine)
            for (kind, text, seed, captioner), itm, itc, p in zip(
                of, judged.probability, judged.cosine, match, strict=True
            ):
                scored.append(
                    ScoredText(row.id, kind, text, float(itm), float(itc), float(p), seed, captioner)
                )
        return scored

    def embed(self, rows: Sequence[Row], images: Sequence[Any] | None = None) -> tuple[Tensor, ...]:
        """image_embeds [B, N, D] as each captioner sees the rows, then as the filter does.

        images: the rows' pictures, if they are opened already. Cached features are looked up instead; models that
        share tower and transform look once.
        """
        if self.features is not None:
            seen = torch.stack([self.features.lookup(picture_key(row)) for row in rows])
            seen = seen.to(self.captioner.device, self.captioner.dtype)
            return (seen,) * len(self._towers)
        images = [row.image for row in rows] if images is None else images
        encoded: dict[Any, Tensor] = {}
        for tower, pipeline in zip(self._towers, (*self.captioners, self.filter), strict=True):
            if tower not in encoded:
                encoded[tower] = torch.cat([part for part, _ in pipeline.encoded(images)])
        return tuple(encoded[tower] for tower in self._towers)


def model_names(captioners: Sequence[str], filter: str) -> dict[str, str]:
    """Hashes by part: `captioner`, of several `captioner2` and so on, and `filter`."""
    names = {
        f"captioner{number if number > 1 else ''}": one for number, one in enumerate(captioners, start=1)
    }
    return {**names, "filter": filter}


def check_rule(threshold: float = 0.5, k: int = 2) -> None:
    """Raise UserError for a threshold or a k that `keep_matching` and `keep_best` could not mean."""
    if not 0 <= threshold <= 1:
        raise UserError(f"threshold is a P(match) between 0 and 1, got {threshold}")
    if k < 1:
        raise UserError(f"top_k is at least 1, got {k}")


def keep_matching(texts: Sequence[ScoredText], threshold: float = 0.5) -> list[bool]:
    """BLIP's rule: a text is kept if P(match) ≥ threshold. 0.5 is what the ITM head itself says."""
    return [text.match >= threshold for text in texts]


def keep_best(texts: Sequence[ScoredText], k: int = 2) -> list[bool]:
    """BLIP-2's rule (§3.4): of each image's texts, web's and written, the k of highest ITC similarity.

    Equal texts of an image take one place.
    """
    kept = [False] * len(texts)
    by_image: dict[str, list[int]] = {}
    for index, text in enumerate(texts):
        by_image.setdefault(text.id, []).append(index)
    for indices in by_image.values():
        different: dict[str, int] = {}
        for index in sorted(indices, key=lambda i: (-texts[i].itc, i)):
            different.setdefault(texts[index].text, index)
        for index in list(different.values())[:k]:
            kept[index] = True
    return kept


def bootstrap(rows: Sequence[Row], texts: Sequence[ScoredText], kept: Sequence[bool]) -> list[Row]:
    """The web rows with the captions that were kept, without images that have none. Add the human rows to it.

    Raises UserError if nothing is left.
    """
    captions: dict[str, list[str]] = {}
    for text, keep in zip(texts, kept, strict=True):
        if keep:
            captions.setdefault(text.id, []).append(text.text)
    found = [
        replace(row, captions=list(dict.fromkeys(captions[row.id]))) for row in rows if row.id in captions
    ]
    if not found:
        raise UserError("CapFilt dropped every text: the filter matches nothing at this threshold")
    return found


def seed_of(image_id: str, seed: int) -> int:
    """The number an image's captions are sampled with: a hash of its id and the run's seed, below 2⁶³."""
    digest = hashlib.blake2b(f"{seed}:{image_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
