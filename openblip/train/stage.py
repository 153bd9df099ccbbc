"""One training stage from a recipe and rows to a saved model: what `openblip train`, CapFilt and the quickstart run."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
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
from openblip.models.blip2 import Blip2, Blip2Config
from openblip.models.blip_nlvr import BlipNlvrConfig
from openblip.models.blip_vqa import BlipVqaConfig
from openblip.models.clip import Clip, ClipConfig
from openblip.models.text import TextTransformer
from openblip.models.vit import VisionTransformer
from openblip.recipes import Recipe
from openblip.train import distributed
from openblip.train.loop import Evaluate, FitResult, fit
from openblip.train.start import calibrate_blip2_, calibrate_heads_, nlvr_from, standardise_tower_, vqa_from
from openblip.train.tasks import BlipTask, CaptionTask, ClipTask, NlvrTask, Task, VqaTask
from openblip.train.tasks_blip2 import Blip2Task

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
    frozen: dict[str, str] = field(
        default_factory=dict
    )  # parts that a saved model names, see `convert.frozen`


@dataclass
class StageResult:
    """Where the model was saved, and how the run ended."""

    folder: Path
    fit: FitResult


def prepare(recipe: Recipe, rows: Rows, init: Pretrained | None = None) -> Ingredients:
    """Build what the recipe describes, with the weights it begins with.

    rows: what `recipe.calibrate` takes its sample from. init: a loaded model to begin with instead of
    `recipe.init`. Random weights come from the recipe's seed.

    Raises:
        UserError: a fine-tune has nothing to begin with, or something its stage cannot use.
    """
    torch.manual_seed(recipe.train.seed)
    has_start = init is not None or any((recipe.init, recipe.vision_init, recipe.text_init))
    if recipe.stage not in ("clip", "pretrain", "blip2_stage1") and not has_start:
        raise UserError(
            f"{recipe.stage}: fine-tunes a pre-trained model, and this recipe names none; set `init` "
            "(--init FOLDER, or a hub name)"
        )
    if init is None and recipe.init is not None:
        init = load_pretrained(recipe.init, image_size=recipe.system.vision.image_size)
    if recipe.stage == "clip":
        return _clip(recipe, init)
    wanted = Blip2 if recipe.stage == "blip2_stage1" else Blip
    fresh = _fresh_blip2 if wanted is Blip2 else _fresh_blip
    start: Any = init.model if init is not None else fresh(recipe)
    if not isinstance(start, wanted):
        raise UserError(
            f"{recipe.stage}: begins with a pre-trained {wanted.__name__}, not with a {type(start).__name__}"
        )
    tokenizer = init.tokenizer if init is not None and init.tokenizer is not None else bert_uncased()
    transform = init.transform if init is not None and init.transform is not None else _transform(recipe)
    if init is None and recipe.calibrate:
        _calibrate_(start, recipe, rows, tokenizer, transform)
    frozen = _named_parts(recipe) if init is None else init.frozen
    return Ingredients(_for_stage(recipe, start), tokenizer, transform, frozen)


def _named_parts(recipe: Recipe) -> dict[str, str]:
    """The parts of a fresh BLIP-2 that stay as their packages have them, which need not be saved."""
    found = {}
    if isinstance(recipe.system, Blip2Config):
        if recipe.system.freeze_vision and recipe.vision_init == "dinov2_small":
            found["vision"] = "dinov2_small"
        if recipe.system.qformer.freeze_words and recipe.text_init == "minilm":
            found["qformer.word"] = "minilm_words"
    return found


def _calibrate_(
    model: Blip | Blip2, recipe: Recipe, rows: Rows, tokenizer: Tokenizer, transform: ImageTransform
) -> None:
    """Fit the frozen tower's output and the ITC heads to a sample of the rows, drawn by the recipe's seed."""
    dataset = PairDataset(rows, transform)
    loader = Loader(
        dataset, PairCollator(tokenizer, recipe.max_length), min(recipe.calibrate, len(rows)),
        recipe.train.seed, workers=recipe.workers,
    )  # fmt: skip
    batch = next(loader.batches())
    model.eval()
    texts = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        if isinstance(model, Blip2):
            calibrate_blip2_(model, model.encode_image(batch["pixel_values"]), *texts)
            return
        if recipe.model.freeze_vision and isinstance(model.vision, VisionTransformer):
            standardise_tower_(model.vision, batch["pixel_values"])
        calibrate_heads_(model, model.encode_image(batch["pixel_values"]), *texts)


def _clip(recipe: Recipe, init: Pretrained | None) -> Ingredients:
    """A CLIP to train: `init` as it is, or a fresh one with the recipe's geometry and tokenizer."""
    geometry = recipe.system
    assert isinstance(geometry, ClipConfig)
    transform = ImageTransform(geometry.vision.image_size, resize="crop")
    if init is not None:
        if not isinstance(init.model, Clip) or init.tokenizer is None:
            raise UserError("clip: begins with a CLIP and its tokenizer, and `init` is none")
        return Ingredients(init.model, init.tokenizer, init.transform or transform)
    if recipe.tokenizer is None:
        raise UserError(
            "clip: a fresh CLIP needs a vocabulary; set the recipe's `tokenizer` to a folder with one"
        )
    return Ingredients(Clip(geometry), Tokenizer.load(recipe.tokenizer), transform)


def _fresh_blip(recipe: Recipe) -> Blip:
    """A new BLIP, with pretrained parts where the recipe names them."""
    model = Blip(recipe.model)
    _vision_init_(model, recipe)
    if recipe.text_init == "minilm":
        parts.minilm_text_(model.text_encoder)
        parts.minilm_text_(model.text_decoder)
    return model


def _fresh_blip2(recipe: Recipe) -> Blip2:
    """A new BLIP-2 of stage 1, likewise."""
    geometry = recipe.system
    assert isinstance(geometry, Blip2Config)
    model = Blip2(geometry)
    _vision_init_(model, recipe)
    if recipe.text_init == "minilm":
        bert = TextTransformer(parts.minilm_text_config())
        parts.minilm_text_(bert)
        model.qformer.copy_text_(bert)
    return model


def _vision_init_(model: Blip | Blip2, recipe: Recipe) -> None:
    """The pretrained vision tower that the recipe names, if it names one."""
    if recipe.vision_init == "dinov2_small":
        vision = recipe.system.vision
        tower = parts.dinov2_small(vision.image_size, vision.num_hidden_layers)
        model.vision.load_state_dict(tower.state_dict())


def _transform(recipe: Recipe) -> ImageTransform:
    """The deterministic transform of a fresh model: BLIP squashes; DINOv2 was trained with ImageNet's statistics."""
    dino = recipe.vision_init == "dinov2_small"
    mean, std = (parts.DINOV2_MEAN, parts.DINOV2_STD) if dino else (CLIP_MEAN, CLIP_STD)
    return ImageTransform(recipe.system.vision.image_size, mean, std)


def _for_stage(recipe: Recipe, start: Any) -> nn.Module:
    """The model that the stage trains, begun with `start`."""
    if recipe.stage == "blip2_stage1":
        return start
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
    if features is None and getattr(made.model.config, "freeze_vision", False) and recipe.augment is None:
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
            made.model, folder, tokenizer=made.tokenizer, transform=made.transform, info=known | (info or {}),
            frozen=made.frozen,
        )  # fmt: skip
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
        case "blip2_stage1":
            return Blip2Task(model, replace(recipe.blip2_task, seed=recipe.train.seed))
        case "caption":
            return CaptionTask(model, label_smoothing=recipe.task.label_smoothing)
        case "vqa":
            return VqaTask(model, label_smoothing=recipe.task.label_smoothing)
    return NlvrTask(model)
