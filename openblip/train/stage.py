"""One training stage from a recipe and rows to a saved model: what `openblip train`, CapFilt and the quickstart run."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from openblip.config import UserError, differences, from_dict, to_dict
from openblip.convert.files import refuse_foreign
from openblip.data import discover
from openblip.data.chat import chat_tokenizer
from openblip.data.collate import (
    CaptionCollator,
    NlvrCollator,
    NlvrDataset,
    PairCollator,
    PairDataset,
    Rows,
    VqaCollator,
    VqaDataset,
    rows_fingerprint,
    text_lengths,
)
from openblip.data.collate_lm import InstructDataset, LmCollator, PrefixDataset
from openblip.data.features import FeatureCache, TileCache, build_features
from openblip.data.loader import Loader
from openblip.data.mixture import MixedRows, Mixture
from openblip.data.rows import BadRows
from openblip.data.text import clean_caption
from openblip.data.tiles import TileTransform
from openblip.data.transforms import ImageTransform, TrainTransform
from openblip.hub import Pretrained, save_pretrained
from openblip.models.blip3 import Blip3
from openblip.recipes import Recipe
from openblip.train import checkpoint, distributed
from openblip.train.batches_blip3 import blip3_loader
from openblip.train.ingredients import Ingredients, prepare
from openblip.train.loop import Evaluate, FitResult, fit
from openblip.train.tasks import BlipTask, CaptionTask, ClipTask, NlvrTask, Task, VqaTask
from openblip.train.tasks_blip2 import Blip2LlmTask, Blip2Task
from openblip.train.tasks_blip3 import Blip3Task, DpoTask

# Settings of the loop that may be others when a run goes on: its length, what it shows and keeps, where tensors are.
_MAY_CHANGE = (
    *("max_steps", "warmup_steps", "log_every", "eval_every", "save_every", "keep_checkpoints"),
    *("grad_checkpointing", "shard"),
)


@dataclass
class StageResult:
    """Where the model was saved, and how the run ended."""

    folder: Path
    fit: FitResult


def run_stage(
    recipe: Recipe,
    rows: Rows,
    run_dir: str | Path,
    *,
    init: Pretrained | None = None,
    features: FeatureCache | str | Path | None = None,
    evaluate: Evaluate | None = None,
    info: dict[str, Any] | None = None,
    report: Callable[[int, int], None] | None = None,
) -> StageResult:
    """Train one stage on `rows` and save the model in `run_dir`/model; an interrupted run goes on where it was.

    What a run was begun with stands in its begun.json. With another recipe or other rows it does not go on, nor is its
    model taken for theirs; only its length, and what it logs and keeps, may change (`_MAY_CHANGE`).

    features: what the frozen vision tower makes of the pictures, or a folder to keep it in, which stages on the same
        pictures can share; `run_dir`/features if none is given, the recipe keeps features, the tower is frozen, and
        nothing is augmented anew at each step. Views that the recipe augments with have folders of their own in it.
    evaluate: see `loop.fit`. info: for the model card. report: called with (pictures done, pictures in all) while the
        tower looks at them.

    Raises:
        UserError: the folder holds a run of another recipe or other rows, or a model that is not openblip's; a folder
            for features, and a tower that is trained, pictures that are augmented, or videos.
    """
    run_dir = Path(run_dir)
    _refuse_unread(recipe)
    device = distributed.init_from_env()
    begun = _begun(recipe, rows)
    _refuse_other_run(run_dir, begun)
    refuse_foreign(run_dir / "model")
    made = prepare(recipe, rows, init)
    made.model.to(device)
    run_dir.mkdir(parents=True, exist_ok=True)
    if distributed.is_main():
        part = run_dir / ".begun.json.part"
        part.write_text(json.dumps(begun, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(run_dir / "begun.json")  # in one step: other ranks may be reading it
    if made.reports:
        told = "\n".join(map(str, made.reports))
        (run_dir / "begins_with.txt").write_text(f"{told}\n", encoding="utf-8")
    listed = run_dir / "bad_rows.jsonl"
    augment = recipe.augment
    number_of_views = 0 if augment is None else augment.views
    is_augmented = augment is not None and not number_of_views
    is_fixed = getattr(made.model.config, "freeze_vision", False) and not is_augmented
    if isinstance(made.model, Blip3):  # of videos there are too many frames, and noise is put on pixels
        noise = recipe.stage == "blip3_dpo" and recipe.dpo_task.noise_step is not None
        is_fixed = is_fixed and made.model.temporal is None and not noise
    if features is not None and not is_fixed:
        raise UserError(
            "features: only a frozen tower, shown pictures without augmentation at each step or noise and no videos, "
            "always makes the same"
        )
    if is_fixed and not isinstance(features, FeatureCache) and (recipe.keep_features or features is not None):
        folder = run_dir / "features" if features is None else Path(features)
        features = cache_features(
            made, rows, folder, workers=recipe.workers, bad=BadRows(listed), report=report
        )
    assert features is None or isinstance(features, FeatureCache)
    views: list[FeatureCache] = []
    if number_of_views:
        if features is None or isinstance(made.model, Blip3):
            raise UserError(
                "augment.views: views are for features that are kept, of a frozen tower and whole pictures: set "
                "keep_features or give a folder for features; elsewhere it is 0"
            )
        transform = _augmented(recipe, made.transform)
        views = [
            cache_features(
                made, rows, features.folder / f"view{number}", transform=transform, seed=number,
                workers=recipe.workers, report=report,
            )
            for number in range(1, number_of_views + 1)
        ]  # fmt: skip
    bad = BadRows(listed)
    loader = _loader(recipe, made, rows, features, views, bad)
    ramp = round(recipe.ramp_epochs * loader.steps_per_epoch / recipe.train.accumulate)
    task = task_of(recipe, made, ramp).to(device)
    result = fit(task, loader, recipe.train, run_dir, evaluate=evaluate, run_config=recipe)
    if result.ema is not None:
        result.ema.copy_to_(task)
    folder = run_dir / "model"
    if distributed.is_main() and not result.interrupted:
        known: dict[str, Any] = (
            {"prompt": recipe.prompt} if recipe.stage in ("caption", "blip2_stage2") else {}
        )
        if isinstance(made.model, Blip3) and made.model.temporal is not None:
            known["frames"] = recipe.frames
        known |= {"stage": recipe.stage, "steps": result.step, "bad_rows": _count_reasons(listed)}
        save_pretrained(
            made.model, folder, tokenizer=made.tokenizer, transform=made.transform, info=known | (info or {}),
            frozen=made.frozen, lm_tokenizer=made.lm_tokenizer,
        )  # fmt: skip
    distributed.barrier()
    return StageResult(folder, result)


def _begun(recipe: Recipe, rows: Rows) -> dict[str, Any]:
    """All that decides what a run makes: its recipe, the rows, and the weights it begins with, if they are here."""
    files: list[Path] = []
    if recipe.init is not None:  # a name on the hub has no files here, and stands for itself
        init = Path(recipe.init)
        files = [init] if init.is_file() else sorted(init.glob("*.safetensors"))
    return {
        "recipe": _settings(replace(recipe, init=None) if files else recipe),
        "init": {file.name: discover.digest(str(file)) for file in files},
        "data": {"rows": len(rows), "sha256": rows_fingerprint(rows)},
    }


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Those that a run cannot change."""
    found = to_dict(recipe)
    found.pop("workers")
    for name in _MAY_CHANGE:
        found["train"].pop(name, None)
    return found


def _refuse_unread(recipe: Recipe) -> None:
    """Raises UserError: a setting that this stage would not read."""
    is_blip3 = recipe.stage.startswith("blip3")
    if recipe.train.batch_tokens is not None and not is_blip3:
        raise UserError(
            f"{recipe.stage}: train.batch_tokens is for BLIP-3; elsewhere batch_size says how many"
        )
    if recipe.augment is not None and is_blip3:
        raise UserError(f"{recipe.stage}: BLIP-3 sees whole pictures, so `augment` is null")
    task = recipe.blip2_task if recipe.stage == "blip2_stage1" else recipe.blip2_llm_task
    decay, tower = task.vision_lr_decay, recipe.blip2
    if decay != 1 and (tower is None or tower.freeze_vision or tower.vision.backbone is not None):
        raise UserError(
            "vision_lr_decay: is for a tower of ours that is trained (blip2.freeze_vision: false)"
        )


def _refuse_other_run(run_dir: Path, begun: dict[str, Any]) -> None:
    """Raise UserError if there is a checkpoint or a model in the folder, made of something else."""
    file = run_dir / "begun.json"
    has_run = checkpoint.latest(run_dir) is not None or (run_dir / "model/config.json").is_file()
    if not has_run or not file.is_file():
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    # Through the class: a setting that is new since then had its default.
    before["recipe"] = _settings(from_dict(Recipe, before["recipe"], f"{file}: recipe"))
    if found := differences(before, begun):
        raise UserError(f"{run_dir}: holds a run made otherwise: {'; '.join(found)}; use a new folder")


def _count_reasons(listed: Path) -> dict[str, int]:
    """How often each reason stands in bad_rows.jsonl: of the whole run, with what came before a resume."""
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.exists() else []
    return dict(Counter(json.loads(line)["reason"] for line in lines))


def cache_features(
    made: Ingredients,
    rows: Rows,
    folder: str | Path,
    *,
    transform: TrainTransform | None = None,
    seed: int = 0,
    workers: int = 2,
    bad: BadRows | None = None,
    report: Callable[[int, int], None] | None = None,
) -> FeatureCache:
    """What the vision tower makes of every picture of `rows`, under the deterministic transform, in bfloat16; of a
    BLIP-3's every tile. transform, seed: one random view of each picture instead.
    """
    vision = made.model.vision.eval()
    device = next(vision.parameters()).device

    def encode(pixel_values: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return vision(pixel_values.to(device)).float().cpu()

    digest = hashlib.sha256()
    for name, value in sorted(vision.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    chosen: ImageTransform | TrainTransform | TileTransform = (
        made.transform if transform is None else transform
    )
    fingerprint: dict[str, Any] = {"vision": digest.hexdigest(), "transform": to_dict(chosen)}
    fingerprint["vision_config"] = to_dict(made.model.config.vision)
    fingerprint["precision"] = "bf16"
    if transform is not None:
        fingerprint["seed"] = seed
    elif isinstance(made.model, Blip3):
        chosen = TileTransform(made.transform, made.model.config.used_grids)
        fingerprint["grids"] = chosen.grids
    return build_features(
        folder, fingerprint, rows, chosen, encode, seed=seed, workers=workers, bad=bad, report=report
    )


def _loader(
    recipe: Recipe,
    made: Ingredients,
    rows: Rows,
    features: FeatureCache | None,
    views: list[FeatureCache],
    bad: BadRows,
) -> Loader:
    """Dataset, collator and order of a stage."""
    if isinstance(made.model, Blip3):
        assert made.lm_tokenizer is not None
        tiles = None if features is None else TileCache(features)
        return blip3_loader(recipe, made.model, made.lm_tokenizer, made.transform, rows, bad, tiles)
    assert made.tokenizer is not None
    transform: ImageTransform | TrainTransform | None = None
    if features is None:
        transform = made.transform if recipe.augment is None else _augmented(recipe, made.transform)
    dataset: PairDataset | VqaDataset | NlvrDataset | InstructDataset | Mixture
    if recipe.stage == "vqa":
        weight = recipe.single_answer_weight
        dataset = VqaDataset(rows, transform, features=features, views=views, single_answer_weight=weight)
    elif recipe.stage == "nlvr":
        dataset = NlvrDataset(rows, transform, features=features, views=views)
    elif recipe.stage == "instruct":
        if isinstance(rows, MixedRows) and not rows.is_counted:  # by √size (InstructBLIP §2.4)
            parts = rows.parts().items()
            dataset = Mixture(
                {name: InstructDataset(of, transform, features=features, views=views) for name, of in parts}
            )
        else:
            dataset = InstructDataset(rows, transform, features=features, views=views)
    else:
        # CLIP's captions and a language model's keep their capitals and their punctuation.
        clean = str if recipe.stage in ("clip", "blip2_stage2") else clean_caption
        words = made.lm_tokenizer
        if recipe.captions != 1 and (
            recipe.captions < 1 or recipe.stage != "blip2_stage2" or words is None or words.encoder_decoder
        ):
            raise UserError(
                f"captions: {recipe.captions} of a picture are learnt together in BLIP-2's stage 2 alone, "
                "with a decoder-only language model; elsewhere it is 1"
            )
        kind = PrefixDataset if words is not None and words.encoder_decoder else PairDataset
        dataset = kind(rows, transform, features=features, views=views, clean=clean, several=recipe.captions)
    tokenizer, length = made.tokenizer, recipe.max_length
    match recipe.stage:
        case "caption":
            collate: Any = CaptionCollator(tokenizer, recipe.prompt, length)
        case "vqa":
            collate = VqaCollator(tokenizer, length)
        case "nlvr":
            collate = NlvrCollator(tokenizer, length)
        case "blip2_stage2" | "instruct":
            assert made.lm_tokenizer is not None
            reads: Literal["prompt", "caption"] = "prompt" if recipe.stage == "instruct" else "caption"
            is_read = recipe.stage == "instruct" or recipe.blip2_llm_task.stage1 is not None
            words_of = tokenizer if is_read else None
            collate = LmCollator(made.lm_tokenizer, recipe.prompt, 128, length, words_of, reads)
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
        lengths=text_lengths(rows) if recipe.bucket and not isinstance(dataset, Mixture) else None,
        bad=bad,
    )


def _augmented(recipe: Recipe, transform: ImageTransform) -> TrainTransform:
    augment = recipe.augment
    assert augment is not None
    return TrainTransform(
        transform.image_size, augment.crop, flip=augment.flip, randaugment=augment.randaugment,
        mean=transform.mean, std=transform.std,
    )  # fmt: skip


def task_of(recipe: Recipe, made: Ingredients, ramp: int) -> Task:
    """The stage's losses around its model. ramp: steps in which soft targets grow to their full share."""
    model = made.model
    match recipe.stage:
        case "clip":
            return ClipTask(model)
        case "pretrain" | "retrieval":
            return BlipTask(model, replace(recipe.task, alpha_ramp_steps=ramp, seed=recipe.train.seed))
        case "blip2_stage1":
            return Blip2Task(model, replace(recipe.blip2_task, seed=recipe.train.seed))
        case "blip2_stage2" | "instruct":
            return Blip2LlmTask(model, replace(recipe.blip2_llm_task, seed=recipe.train.seed))
        case "blip3_pretrain" | "blip3_sft":
            return Blip3Task(model, recipe.blip3_task)
        case "blip3_dpo":
            assert made.lm_tokenizer is not None
            chat = chat_tokenizer(made.lm_tokenizer, model.image_token_id, model.lm.config.family)
            return DpoTask(model, replace(recipe.dpo_task, seed=recipe.train.seed), [chat.end_id])
        case "caption":
            return CaptionTask(model, label_smoothing=recipe.task.label_smoothing)
        case "vqa":
            return VqaTask(model, label_smoothing=recipe.task.label_smoothing)
    return NlvrTask(model)
