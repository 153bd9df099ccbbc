"""One training stage from a recipe and rows to a saved model: what `openblip train`, CapFilt and the quickstart run."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openblip.config import UserError, to_dict
from openblip.convert import parts
from openblip.data.collate import (
    CaptionCollator,
    NlvrCollator,
    NlvrDataset,
    PairCollator,
    PairDataset,
    Rows,
    VqaCollator,
    VqaDataset,
    text_lengths,
)
from openblip.data.features import FeatureCache, build_features
from openblip.data.loader import Loader
from openblip.data.rows import BadRows
from openblip.data.text import Tokenizer, bert_uncased, clean_caption
from openblip.data.transforms import CLIP_MEAN, CLIP_STD, ImageTransform, TrainTransform
from openblip.hub import Pretrained, load_pretrained, save_pretrained
from openblip.models.blip import Blip, without_decoder, without_encoder
from openblip.models.blip_nlvr import BlipNlvrConfig
from openblip.models.blip_vqa import BlipVqaConfig
from openblip.models.clip import Clip
from openblip.models.vit import VisionTransformer
from openblip.recipes import Recipe
from openblip.train import distributed
from openblip.train.loop import Evaluate, FitResult, fit
from openblip.train.start import calibrate_heads_, nlvr_from, standardise_tower_, vqa_from
from openblip.train.tasks import BlipTask, CaptionTask, ClipTask, NlvrTask, Task, VqaTask

# What a stage takes from the model it begins with.
_HALVES = {
    "pretrain": ("encoder", "decoder"),
    "retrieval": ("encoder",),
    "caption": ("decoder",),
    "vqa": ("encoder", "decoder"),
    "nlvr": ("encoder",),
}


@dataclass
class Ingredients:
    """A model to train, with the tokenizer and deterministic transform that belong to it."""

    model: Any
    tokenizer: Tokenizer
    transform: ImageTransform


@dataclass
class StageResult:
    """Where the model was saved, and how the run ended."""

    folder: Path
    fit: FitResult


def prepare(recipe: Recipe, rows: Rows, init: Pretrained | None = None) -> Ingredients:
    """Build what the recipe describes, with the weights it begins with.

    rows: what `recipe.calibrate` takes its sample from. init: a loaded model to begin with instead of
    `recipe.init`. Random weights come from the recipe's seed.
    """
    torch.manual_seed(recipe.train.seed)
    if init is None and recipe.init is not None:
        geometry = recipe.clip if recipe.stage == "clip" and recipe.clip is not None else recipe.model
        init = load_pretrained(recipe.init, image_size=geometry.vision.image_size)
    if recipe.stage == "clip":
        return _clip(recipe, init)
    start = init.model if init is not None else _fresh_blip(recipe)
    if not isinstance(start, Blip):
        raise UserError(f"{recipe.stage}: begins with a pre-trained BLIP, not with a {type(start).__name__}")
    tokenizer = init.tokenizer if init is not None and init.tokenizer is not None else bert_uncased()
    transform = init.transform if init is not None and init.transform is not None else _transform(recipe)
    if init is None and recipe.calibrate:
        _calibrate_(start, recipe, rows, tokenizer, transform)
    return Ingredients(_for_stage(recipe, start), tokenizer, transform)


def _calibrate_(
    model: Blip, recipe: Recipe, rows: Rows, tokenizer: Tokenizer, transform: ImageTransform
) -> None:
    """Fit the frozen tower's output and the ITC heads to a sample of the rows, drawn by the recipe's seed."""
    dataset = PairDataset(rows, transform)
    loader = Loader(
        dataset, PairCollator(tokenizer, recipe.max_length), min(recipe.calibrate, len(rows)),
        recipe.train.seed, workers=recipe.workers,
    )  # fmt: skip
    batch = next(loader.batches())
    model.eval()
    with torch.no_grad():
        if recipe.model.freeze_vision and isinstance(model.vision, VisionTransformer):
            standardise_tower_(model.vision, batch["pixel_values"])
        embeds = model.encode_image(batch["pixel_values"])
        calibrate_heads_(model, embeds, batch["input_ids"], batch["attention_mask"])


def _clip(recipe: Recipe, init: Pretrained | None) -> Ingredients:
    """A CLIP to train: `init` as it is, or a fresh one with the recipe's geometry and tokenizer."""
    if recipe.clip is None:
        raise UserError("a clip recipe needs its `clip` geometry")
    transform = ImageTransform(recipe.clip.vision.image_size, resize="crop")
    if init is not None:
        if not isinstance(init.model, Clip) or init.tokenizer is None:
            raise UserError("clip: begins with a CLIP and its tokenizer, and `init` is none")
        return Ingredients(init.model, init.tokenizer, init.transform or transform)
    if recipe.tokenizer is None:
        raise UserError(
            "clip: a fresh CLIP needs a vocabulary; set the recipe's `tokenizer` to a folder with one"
        )
    return Ingredients(Clip(recipe.clip), Tokenizer.load(recipe.tokenizer), transform)


def _fresh_blip(recipe: Recipe) -> Blip:
    """A new BLIP, with pretrained parts where the recipe names them."""
    model = Blip(recipe.model)
    if recipe.vision_init == "dinov2_small":
        tower = parts.dinov2_small(recipe.model.vision.image_size, recipe.model.vision.num_hidden_layers)
        model.vision.load_state_dict(tower.state_dict())
    if recipe.text_init == "minilm":
        parts.minilm_text_(model.text_encoder)
        parts.minilm_text_(model.text_decoder)
    return model


def _transform(recipe: Recipe) -> ImageTransform:
    """The deterministic transform of a fresh model: BLIP squashes; DINOv2 was trained with ImageNet's statistics."""
    dino = recipe.vision_init == "dinov2_small"
    mean, std = (parts.DINOV2_MEAN, parts.DINOV2_STD) if dino else (CLIP_MEAN, CLIP_STD)
    return ImageTransform(recipe.model.vision.image_size, mean, std)


def _for_stage(recipe: Recipe, start: Blip) -> nn.Module:
    """The model that the stage trains, begun with `start`."""
    vision, text, frozen = start.config.vision, start.config.text, start.config.freeze_vision
    for half in ("encoder", "decoder"):
        if half in _HALVES[recipe.stage] and not getattr(start.config, half):
            raise UserError(f"{recipe.stage}: needs a model with its text {half}, and this one has none")
    match recipe.stage:
        case "pretrain":
            return start
        case "retrieval":
            return without_decoder(start)
        case "caption":
            return without_encoder(start)
        case "vqa":
            return vqa_from(start, BlipVqaConfig(vision, text, frozen))[0]
        case "nlvr":
            return nlvr_from(start, BlipNlvrConfig(vision, text, frozen))[0]
    raise UserError(f"no stage is called {recipe.stage!r}")


def run_stage(
    recipe: Recipe,
    rows: Rows,
    run_dir: str | Path,
    *,
    init: Pretrained | None = None,
    features: FeatureCache | None = None,
    evaluate: Evaluate | None = None,
    info: dict[str, Any] | None = None,
) -> StageResult:
    """Train one stage on `rows` and save the model in `run_dir`/model; an interrupted run goes on where it was.

    features: what the (frozen) vision tower made of the pictures; made in `run_dir`/features when the tower
        is frozen and nothing is augmented. evaluate: see `loop.fit`. info: for the model card.
    """
    run_dir = Path(run_dir)
    device = distributed.init_from_env()
    made = prepare(recipe, rows, init)
    made.model.to(device)
    run_dir.mkdir(parents=True, exist_ok=True)
    listed = run_dir / "bad_rows.jsonl"
    if features is None and recipe.model.freeze_vision and recipe.augment is None:
        folder = run_dir / "features"
        features = cache_features(made, rows, folder, workers=recipe.workers, bad=BadRows(listed))
    bad = BadRows(listed)
    loader = _loader(recipe, made, rows, features, bad)
    ramp = round(recipe.ramp_epochs * loader.steps_per_epoch / recipe.train.accumulate)
    task = _task(recipe, made.model, ramp).to(device)
    result = fit(task, loader, recipe.train, run_dir, evaluate=evaluate, run_config=recipe)
    if result.ema is not None:
        result.ema.copy_to_(task)
    folder = run_dir / "model"
    if distributed.is_main() and not result.interrupted:
        known: dict[str, Any] = {"prompt": recipe.prompt} if recipe.stage == "caption" else {}
        known |= {"stage": recipe.stage, "steps": result.step, "bad_rows": _count_reasons(listed)}
        save_pretrained(
            made.model, folder, tokenizer=made.tokenizer, transform=made.transform, info=known | (info or {})
        )
    distributed.barrier()
    return StageResult(folder, result)


def _count_reasons(listed: Path) -> dict[str, int]:
    """How often each reason stands in bad_rows.jsonl: of the whole run, with what came before a resume."""
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.exists() else []
    return dict(Counter(json.loads(line)["reason"] for line in lines))


def cache_features(
    made: Ingredients,
    rows: Rows,
    folder: str | Path,
    *,
    workers: int = 2,
    bad: BadRows | None = None,
    report: Callable[[int, int], None] | None = None,
) -> FeatureCache:
    """What the vision tower makes of every picture of `rows`, under the deterministic transform, in bfloat16."""
    vision = made.model.vision.eval()
    device = next(vision.parameters()).device

    def encode(pixel_values: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return vision(pixel_values.to(device)).float().cpu()

    digest = hashlib.sha256()
    for name, value in sorted(vision.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    fingerprint = {"vision": digest.hexdigest(), "transform": to_dict(made.transform), "precision": "bf16"}
    return build_features(
        folder, fingerprint, rows, made.transform, encode, workers=workers, bad=bad, report=report
    )


def _loader(
    recipe: Recipe, made: Ingredients, rows: Rows, features: FeatureCache | None, bad: BadRows
) -> Loader:
    """Dataset, collator and order of a stage."""
    transform: ImageTransform | TrainTransform | None = None
    if features is None:
        transform = made.transform if recipe.augment is None else _augmented(recipe, made.transform)
    dataset: PairDataset | VqaDataset | NlvrDataset
    if recipe.stage == "vqa":
        dataset = VqaDataset(rows, transform, features=features)
    elif recipe.stage == "nlvr":
        dataset = NlvrDataset(rows, transform, features=features)
    else:
        clean = str if recipe.stage == "clip" else clean_caption
        dataset = PairDataset(rows, transform, features=features, clean=clean)
    tokenizer, length = made.tokenizer, recipe.max_length
    match recipe.stage:
        case "caption":
            collate: Any = CaptionCollator(tokenizer, recipe.prompt, length)
        case "vqa":
            collate = VqaCollator(tokenizer, length)
        case "nlvr":
            collate = NlvrCollator(tokenizer, length)
        case _:
            collate = PairCollator(tokenizer, length)
    return Loader(
        dataset,
        collate,
        recipe.train.batch_size,
        recipe.train.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        workers=recipe.workers,
        lengths=text_lengths(rows) if recipe.bucket else None,
        bad=bad,
    )


def _augmented(recipe: Recipe, transform: ImageTransform) -> TrainTransform:
    augment = recipe.augment
    assert augment is not None
    return TrainTransform(
        transform.image_size, augment.crop, flip=augment.flip, randaugment=augment.randaugment,
        mean=transform.mean, std=transform.std,
    )  # fmt: skip


def _task(recipe: Recipe, model: Any, ramp: int) -> Task:
    """The stage's losses around its model."""
    match recipe.stage:
        case "clip":
            return ClipTask(model)
        case "pretrain" | "retrieval":
            return BlipTask(model, replace(recipe.task, alpha_ramp_steps=ramp, seed=recipe.train.seed))
        case "caption":
            return CaptionTask(model, label_smoothing=recipe.task.label_smoothing)
        case "vqa":
            return VqaTask(model, label_smoothing=recipe.task.label_smoothing)
    return NlvrTask(model)
