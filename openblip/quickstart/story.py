"""The whole story of BLIP in one command: noisy pairs, a model, its bootstrapped captions, a better model.

    rows ─ split ─┬─ human pairs (true captions)
                  ├─ web pairs, a stated share of them planted wrong
                  └─ test pairs, never trained on

    (b) pre-train on web + human ─► noisy model ─┬─ fine-tune on human ─► captioner ┐
                                                 └─ fine-tune on human ─► filter    ┴─ (d) CapFilt over the
                                                 web
    (e) pre-train from scratch on what CapFilt made ─► bootstrapped model
        and once more on the true web captions      ─► clean model, the best that could be hoped for

Every step is resumable: a finished one is read from its folder. story.json there says of which settings and rows; with
others it is refused. The three models begin with the same weights and take the same number of steps.
"""

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from openblip.api import Pipeline
from openblip.config import UserError, from_dict, to_dict
from openblip.convert.weights import LoadReport
from openblip.curate.capfilt import (
    CapFilt,
    CapFiltConfig,
    ScoredText,
    bootstrap,
    check_rule,
    fit_match_scale,
    keep_matching,
    nucleus,
)
from openblip.curate.human import check_enough
from openblip.curate.job import publish, refuse_other
from openblip.data.collate import rows_fingerprint
from openblip.data.features import FeatureCache, is_complete
from openblip.data.rows import Row
from openblip.eval.benchmarks import captioning, from_cache, retrieval
from openblip.eval.metrics import filter_scores
from openblip.hub import Pretrained, load_pretrained
from openblip.quickstart.clock import Clock
from openblip.quickstart.noise import plant_noise, split
from openblip.recipes import Recipe
from openblip.recipes.blip import small_caption, small_pretrain, small_retrieval
from openblip.train import checkpoint
from openblip.train.ingredients import prepare
from openblip.train.stage import cache_features, run_stage

MODELS = ("noisy", "bootstrapped", "clean")
Say = Callable[[str], None]


@dataclass
class StoryConfig:
    """Sizes of the experiment.

    noise: share of the web pairs that get another picture's captions.
    threshold: of P(match); above the paper's 0.5, for so small a filter remembers wrong web pairs from
        pre-training and gives them more than it gives strangers.
    held_out: every so many-th human pair is kept out of the filter's training, to fit its scale.

    Raises UserError for a number that makes no sense, or fewer human pairs than fill a batch of each stage.
    """

    human: int = 300
    test: int = 400
    noise: float = 0.4
    threshold: float = 0.8
    held_out: int = 4
    seed: int = 0
    pretrain: Recipe = field(default_factory=small_pretrain)
    caption: Recipe = field(default_factory=small_caption)
    retrieval: Recipe = field(default_factory=small_retrieval)

    def __post_init__(self) -> None:
        if not 0 < self.noise < 1:
            raise UserError(f"noise is a share between 0 and 1, got {self.noise}")
        if self.held_out < 2:
            raise UserError(f"held_out is at least 2, so that pairs are left, got {self.held_out}")
        check_rule(self.threshold)
        check_enough(self, self.human)


@dataclass
class Story:
    """What happened, for the report: the data, the scored texts, the models' pipelines and all figures."""

    human: list[Row]
    web: list[Row]  # as found: with planted noise
    test: list[Row]
    right: dict[str, bool]  # web row id -> its captions are its own
    texts: list[ScoredText]
    kept: list[bool]
    models: dict[str, Pipeline]
    captions: dict[str, dict[str, str]]  # model -> test row id -> caption
    results: dict[str, Any]
    folder: Path


def tell(
    rows: Sequence[Row], folder: str | Path, config: StoryConfig | None = None, say: Say = print
) -> Story:
    """Run the story on rows with true captions; results.json goes to `folder`, and all it names is returned.

    Raises UserError for rows that cannot be split or are too few, or when the filter keeps nothing.
    """
    config = config or StoryConfig()
    folder = Path(folder)
    human, truth, test = split(rows, config.seed, config.human, config.test)
    check_enough(config, len(human), len(truth))  # the split may have found fewer than were asked for
    web, wrong = plant_noise(truth, config.noise, config.seed)
    right = {row.id: not is_wrong for row, is_wrong in zip(web, wrong, strict=True)}
    settings = {**to_dict(config), "rows": rows_fingerprint(rows)}
    listed = folder / "story.json"
    if listed.is_file():
        before = json.loads(listed.read_text(encoding="utf-8"))
        told_of = before.pop("rows")
        # Through the class: a setting that is new since then had its default.
        old = {**to_dict(from_dict(StoryConfig, before, str(listed))), "rows": told_of}
        refuse_other(old, settings, folder)
    folder.mkdir(parents=True, exist_ok=True)
    publish(listed, json.dumps(settings, indent=2).encode())
    say(
        f"data: {len(human)} human pairs, {len(web)} web pairs of which {sum(wrong)} are wrong, "
        f"{len(test)} test pairs"
    )

    pretrain = _seeded(config.pretrain, config.seed)
    clock, seen_in = Clock(folder / "seconds.json"), folder / "features"
    with clock.resumable("features", is_done=is_complete(seen_in), has_begun=seen_in.exists()):
        start = prepare(pretrain, [*web, *human])
        fresh = Pretrained(start.model, start.tokenizer, start.transform, {}, LoadReport())
        say("encoding every picture once with the frozen vision tower")
        features = cache_features(start, list(rows), seen_in, workers=pretrain.workers)

    def train(name: str, recipe: Recipe, on: Sequence[Row], init: Pretrained) -> Path:
        say(f"{name}: {recipe.train.max_steps} steps on {len(on)} pictures")
        run_dir = folder / name
        is_done, has_begun = (run_dir / "model/config.json").is_file(), checkpoint.latest(run_dir) is not None
        with clock.resumable(name, is_done=is_done, has_begun=has_begun):
            made = run_stage(recipe, on, run_dir, init=copy.deepcopy(init), features=features)
        if made.fit.interrupted:
            raise KeyboardInterrupt
        return made.folder

    noisy = train("noisy", pretrain, [*web, *human], fresh)
    captioner = train("captioner", _seeded(config.caption, config.seed), human, load_pretrained(noisy))
    held_out = human[:: config.held_out]  # the filter's scale is fitted to pairs it was not fine-tuned on
    seen = [row for row in human if row not in held_out]
    judge = train("filter", _seeded(config.retrieval, config.seed), seen, load_pretrained(noisy))

    say("CapFilt: writing a caption for every web picture and judging both texts")
    with clock.repeated("capfilt"):
        worker = _capfilt(captioner, judge, held_out, features, config.seed)
        texts = [
            text
            for first in range(0, len(web), 64)
            for text in worker(web[first : first + 64], worker.embed(web[first : first + 64]))
        ]
    lines = (json.dumps(text.record(), ensure_ascii=False) + "\n" for text in texts)
    (folder / "texts.jsonl").write_text("".join(lines), encoding="utf-8")
    kept = keep_matching(texts, config.threshold)
    bootstrapped = bootstrap(web, texts, kept)
    train("bootstrapped", pretrain, [*bootstrapped, *human], fresh)
    train("clean", pretrain, [*truth, *human], fresh)

    say("evaluating on the test pairs")
    models = {
        name: Pipeline(load_pretrained(folder / name / "model"), dtype="bf16", batch_size=64)
        for name in MODELS
    }
    results: dict[str, Any] = {"seed": config.seed, "filter": judge_filter(texts, right, config.threshold)}
    results["filter"] |= {"pictures_left": len(bootstrapped), "texts_kept": sum(kept), "texts": len(texts)}
    captions: dict[str, dict[str, str]] = {}
    with clock.repeated("evaluation"):
        for name, model in models.items():
            figures, captions[name] = evaluate(model, test, features)
            results[name] = figures
            say(f"{name}: mean recall {figures['r_mean']:.3f}, CIDEr-D {figures['cider']:.3f}")
    results |= {"seconds": round(clock.total, 1), "peak_mb": clock.peak_mb}
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return Story(human, web, test, right, texts, kept, models, captions, results, folder)


def _seeded(recipe: Recipe, seed: int) -> Recipe:
    return replace(recipe, train=replace(recipe.train, seed=seed))


def _capfilt(
    captioner: Path, judge: Path, held_out: Sequence[Row], features: FeatureCache, seed: int
) -> CapFilt:
    """Captioner and filter with short captions, as drawings have, and a scale fitted to `held_out`."""
    writer = Pipeline(load_pretrained(captioner), dtype="bf16", batch_size=64)
    filter = Pipeline(load_pretrained(judge), dtype="bf16", batch_size=64)
    scale = fit_match_scale(filter, held_out, from_cache(features)(held_out).to(filter.dtype))
    # A decoder this young leaves much of its mass on the tail of the vocabulary, hence the temperature.
    generation = replace(nucleus(), min_new_tokens=1, max_new_tokens=12, temperature=0.7)
    return CapFilt(writer, filter, CapFiltConfig(generation, seed=seed, scale=scale), features=features)


def judge_filter(texts: Sequence[ScoredText], right: dict[str, bool], threshold: float) -> dict[str, float]:
    """How well the filter found the planted noise among the web's texts: what it drops is called noise."""
    web = [text for text in texts if text.kind == "web"]
    noise = [not right[text.id] for text in web]
    above = math.nextafter(1 - threshold, 2)  # what lies at the threshold is kept
    scores = filter_scores([1 - text.match for text in web], noise, threshold=above)
    alone = {
        f"auc_{name}": filter_scores([-getattr(text, name) for text in web], noise)["auc"]
        for name in ("itm", "itc")
    }
    dropped = sum(text.match < threshold for text in web)
    return {**scores, **alone, "share_dropped": dropped / len(web), "threshold": threshold}


def evaluate(
    model: Pipeline,
    test: Sequence[Row],
    features: FeatureCache,
    *,
    min_new_tokens: int = 1,
    max_new_tokens: int = 12,
) -> tuple[dict[str, Any], dict[str, str]]:
    """({tr@k, ir@k, r_mean by cosine, the same after ITM rerank as `reranked`, cider}, captions by row id)."""
    embeds = from_cache(features)
    found = retrieval(model, test, k=10, embeds=embeds)
    length: dict[str, Any] = {"min_new_tokens": min_new_tokens, "max_new_tokens": max_new_tokens}
    written = captioning(model, test, embeds=embeds, **length)
    return {**found["itc"], "reranked": found["itm"], "cider": written["cider"]}, written["captions"]
