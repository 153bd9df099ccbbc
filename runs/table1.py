"""BLIP's table 1 in small, on photographs: no CapFilt, filter only, captioner only, both; equal steps.

    OPENBLIP_FLICKR8K=folder python runs/table1.py --out table1

The folder holds pictures with several human captions each and a `train` and a `val` split (Flickr8k, say). Of the
training pictures 1,000 count as human-labelled; 5,000 others keep one caption each, as the web has it, and half of
them get another picture's, planted here. One model is pre-trained on the noisy whole; captioner and filter are
fine-tuned from it; the four data sets are made from the same scored texts, and a model is pre-trained from the same
start on each. About two hours on two CPU cores; interrupted, the same call goes on. Writes results.json,
texts.jsonl and curves.png, and prints the table.
"""

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import tyro

from openblip.api import Pipeline
from openblip.config import UserError
from openblip.curate.capfilt import (
    CapFilt,
    CapFiltConfig,
    ScoredText,
    bootstrap,
    fit_match_scale,
    keep_matching,
    nucleus,
)
from openblip.data.features import FeatureCache
from openblip.data.rows import Row
from openblip.data.sources import open_source
from openblip.eval.benchmarks import from_cache
from openblip.hub import load_pretrained, save_pretrained
from openblip.quickstart.noise import plant_noise
from openblip.quickstart.story import evaluate, judge_filter
from openblip.recipes import Recipe
from openblip.recipes.blip import small_caption, small_pretrain, small_retrieval
from openblip.train.ingredients import prepare
from openblip.train.stage import cache_features, run_stage


def longer(recipe: Recipe, steps: int) -> Recipe:
    """A small recipe for photographs: more steps, longer texts, checkpoints on the way."""
    train = replace(recipe.train, max_steps=steps, warmup_steps=steps // 20, save_every=50, log_every=10)
    return replace(recipe, train=train, max_length=30)


@dataclass
class Config:
    """What to train on, and for how long."""

    data: Path = field(default_factory=lambda: Path(os.environ.get("OPENBLIP_FLICKR8K", "")))
    out: Path = Path("table1")
    human: int = 1000
    web: int = 5000
    noise: float = 0.5
    threshold: float = 0.8
    seed: int = 0
    pretrain_steps: int = 350
    caption_steps: int = 120
    filter_steps: int = 120


def main(config: Config) -> None:
    """Run the study, or what is missing of it."""
    if not config.data.is_dir():
        raise SystemExit("name the pictures: --data FOLDER, or the environment variable OPENBLIP_FLICKR8K")
    rows = list(open_source(str(config.data), split="train"))
    test = list(open_source(str(config.data), split="val"))
    if len(rows) < config.human + config.web:
        raise UserError(f"{config.data}: {len(rows)} training pictures, wanted {config.human + config.web}")
    human, others = rows[: config.human], rows[config.human : config.human + config.web]
    truth = [replace(row, captions=row.captions[:1]) for row in others]
    web, wrong = plant_noise(truth, config.noise, config.seed)
    right = {row.id: not is_wrong for row, is_wrong in zip(web, wrong, strict=True)}

    recipe = longer(small_pretrain(), config.pretrain_steps)
    made = prepare(recipe, [*web, *human])
    start = config.out / "start"
    if not (start / "config.json").is_file():
        save_pretrained(made.model, start, tokenizer=made.tokenizer, transform=made.transform)
    features = cache_features(made, [*rows, *test], config.out / "features")

    def train(name: str, stage: Recipe, on: list, init: Path) -> Path:
        print(f"{name}: {stage.train.max_steps} steps on {len(on)} pictures", flush=True)
        done = run_stage(stage, on, config.out / name, init=load_pretrained(init), features=features)
        if done.fit.interrupted:
            raise SystemExit(130)
        return done.folder

    models = {"none": train("none", recipe, [*web, *human], start)}
    held_out = human[::5]
    seen = [row for row in human if row not in held_out]
    captioner = train("captioner", longer(small_caption(), config.caption_steps), human, models["none"])
    judge = train("filter", longer(small_retrieval(), config.filter_steps), seen, models["none"])

    texts = scored_texts(config, web, captioner, judge, held_out, features)
    matching = keep_matching(texts, config.threshold)
    kept = {
        "filter": [keep and text.kind == "web" for text, keep in zip(texts, matching, strict=True)],
        "captioner": [True] * len(texts),
        "both": matching,
    }
    results: dict = {
        "seed": config.seed,
        "noise_found": judge_filter(texts, right, config.threshold),
        "models": {},
    }
    left = [text for text, keep in zip(texts, matching, strict=True) if keep]
    results["kept"] = {kind: sum(text.kind == kind for text in left) for kind in ("web", "synthetic")}
    results["kept"]["photographs"] = len({text.id for text in left})
    print(json.dumps(results), flush=True)
    for name, keep in kept.items():
        models[name] = train(f"cleaned-{name}", recipe, [*bootstrap(web, texts, keep), *human], start)

    for name, folder in models.items():
        figures, _ = evaluate(
            Pipeline(load_pretrained(folder), dtype="bf16", batch_size=64),
            test, features, min_new_tokens=5, max_new_tokens=20,
        )  # fmt: skip
        results["models"][name] = figures
        print(f"{name:12} mean recall {figures['r_mean']:.3f}  CIDEr-D {figures['cider']:.3f}", flush=True)
    (config.out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    draw_curves({name: folder.parent for name, folder in models.items()}, config.out / "curves.png")


def draw_curves(runs: dict[str, Path], picture: Path) -> None:
    """The losses of each pre-training, one line per data set: how hard a data set is to learn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(13, 3.6))
    for name, run in runs.items():
        lines = [
            json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        lines = [line for line in lines if "losses" in line]
        for panel, loss in zip(panels, ("itc", "itm", "lm"), strict=True):
            panel.plot([line["step"] for line in lines], [line["losses"][loss] for line in lines], label=name)
            panel.set(title=loss, xlabel="step")
    panels[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def scored_texts(
    config: Config, web: list[Row], captioner: Path, judge: Path, held_out: list[Row], features: FeatureCache
) -> list[ScoredText]:
    """What CapFilt makes of the web pairs, from texts.jsonl if an earlier call got so far."""
    listed = config.out / "texts.jsonl"
    if listed.is_file():
        return [ScoredText(**json.loads(line)) for line in listed.read_text(encoding="utf-8").splitlines()]
    writer, filter = (
        Pipeline(load_pretrained(path), dtype="bf16", batch_size=64) for path in (captioner, judge)
    )
    scale = fit_match_scale(filter, held_out, from_cache(features)(held_out).to(filter.dtype))
    # A decoder this young leaves much of its mass on the tail of the vocabulary, hence the temperature.
    generation = replace(nucleus(), min_new_tokens=5, temperature=0.7)
    worker = CapFilt(
        writer, filter, CapFiltConfig(generation, seed=config.seed, scale=scale), features=features
    )
    texts: list[ScoredText] = []
    for first in range(0, len(web), 64):
        texts += worker(web[first : first + 64], worker.embed(web[first : first + 64]))
    lines = [json.dumps(text.record(), ensure_ascii=False) + "\n" for text in texts]
    half = listed.with_suffix(".part")
    half.write_text("".join(lines), encoding="utf-8")
    half.replace(listed)
    return texts


if __name__ == "__main__":
    main(tyro.cli(tyro.conf.OmitArgPrefixes[Config]))
