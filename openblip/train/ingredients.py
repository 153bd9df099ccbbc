"""What a training stage begins with: a model, fresh or loaded, and the tokenizers and transform that belong to it."""

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from openblip.config import UserError
from openblip.convert import parts
from openblip.convert.lm import LmDtype, lm_folder, load_lm
from openblip.convert.weights import LoadReport
from openblip.data.collate import PairCollator, PairDataset, Rows
from openblip.data.loader import Loader
from openblip.data.prompts import LmTokenizer
from openblip.data.text import Tokenizer, bert_uncased
from openblip.data.transforms import CLIP_MEAN, CLIP_STD, ImageTransform
from openblip.hub import Pretrained, load_pretrained
from openblip.models.blip import Blip, BlipConfig, without_decoder, without_encoder
from openblip.models.blip2 import Blip2, Blip2Config, without_heads
from openblip.models.blip2_llm import Blip2Llm, Blip2LlmConfig
from openblip.models.blip3 import Blip3Config
from openblip.models.blip_nlvr import BlipNlvrConfig
from openblip.models.blip_vqa import BlipVqaConfig
from openblip.models.clip import Clip, ClipConfig
from openblip.models.lm import LanguageModel
from openblip.models.vit import VisionTransformer
from openblip.recipes import Language, Recipe
from openblip.train.ingredients_blip3 import blip3_model
from openblip.train.initialise import load_text_, load_tower_
from openblip.train.start import calibrate_blip2_, calibrate_heads_, nlvr_from, standardise_tower_, vqa_from

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
    """A model to train, with the tokenizers and deterministic transform that belong to it.

    frozen: the parts that a saved model names, see `convert.frozen`. reports: what became of the tensors of
        pretrained parts that a fresh model begins with.
    """

    model: Any
    tokenizer: Tokenizer | None  # None: all that is read, the language model reads
    transform: ImageTransform
    frozen: dict[str, str] = field(default_factory=dict)
    lm_tokenizer: LmTokenizer | None = None
    reports: list[LoadReport] = field(default_factory=list)


def prepare(recipe: Recipe, rows: Rows, init: Pretrained | None = None) -> Ingredients:
    """Build what the recipe describes, with the weights it begins with.

    rows: what `recipe.calibrate` takes its sample from. init: a loaded model to begin with instead of
    `recipe.init`. Random weights come from the recipe's seed.

    Raises:
        UserError: a fine-tune has nothing to begin with, or something its stage cannot use.
    """
    torch.manual_seed(recipe.train.seed)
    if init is None and recipe.init is not None:
        init = load_pretrained(recipe.init, image_size=recipe.system.vision.image_size)
    if recipe.stage.startswith("blip3"):
        return _blip3(recipe, init)
    has_start = init is not None or bool(recipe.vision_init or recipe.text_init)
    if recipe.stage not in ("clip", "pretrain", "blip2_stage1") and not has_start:
        raise UserError(
            f"{recipe.stage}: fine-tunes a pre-trained model, and this recipe names none; set `init` "
            "(--init FOLDER, or a hub name)"
        )
    if recipe.stage == "clip":
        return _clip(recipe, init)
    if recipe.stage in ("blip2_stage2", "instruct"):
        return _stage2(recipe, _untaught(recipe, rows) if init is None else init)
    wanted = Blip2 if recipe.stage == "blip2_stage1" else Blip
    if init is None:
        begun = _fresh(recipe)
        if recipe.calibrate:
            _calibrate_(begun, recipe, rows)
    else:
        transform = init.transform or _transform(recipe, None)
        begun = Ingredients(init.model, init.tokenizer or bert_uncased(), transform, init.frozen)
    if not isinstance(begun.model, wanted):
        raise UserError(
            f"{recipe.stage}: begins with a pre-trained {wanted.__name__}, not with a {type(begun.model).__name__}"
        )
    begun = replace(begun, frozen=_train_as_told_(begun.model, recipe, begun.frozen))
    return replace(begun, model=_for_stage(recipe, begun.model))


def _train_as_told_(model: Any, recipe: Recipe, frozen: dict[str, str]) -> dict[str, str]:
    """What of a geometry is of training, and so the recipe's: whether the tower is trained, and what is dropped.

    Returns `frozen` without a tower that is trained from now on.
    """
    told: Any = recipe.system
    changes: dict[str, Any] = {"freeze_vision": told.freeze_vision}
    if isinstance(told, Blip2Config):
        changes["image_dropout"] = told.image_dropout
    model.config = replace(model.config, **changes)
    model.vision.requires_grad_(not told.freeze_vision)
    return frozen if told.freeze_vision else {name: of for name, of in frozen.items() if name != "vision"}


def _untaught(recipe: Recipe, rows: Rows) -> Pretrained:
    """What stage 1 begins with, in the place of what it makes: stage 2 without stage 1 (BLIP-2's figure 5)."""
    first = prepare(replace(recipe, stage="blip2_stage1"), rows)
    return Pretrained(first.model, first.tokenizer, first.transform, {}, LoadReport(), first.frozen)


def _stage2(recipe: Recipe, init: Pretrained) -> Ingredients:
    """Stage 1 and a language model become stage 2; what is stage 2 already goes on, with the recipe's adapters."""
    language = recipe.language
    if language is None:
        raise UserError(f"{recipe.stage}: the recipe names no language model; set `language`")
    if init.tokenizer is None or init.transform is None:
        raise UserError(f"{recipe.stage}: begins with a model that has its tokenizer and its image transform")
    if isinstance(init.model, Blip2Llm):
        again = _adapted(init.model if recipe.stage == "blip2_stage2" else _instructed(init.model), language)
        named = {name.removeprefix("blip2."): source for name, source in init.frozen.items()}
        named = _train_as_told_(again.blip2, recipe, named)
        again.config = replace(again.config, blip2=again.blip2.config)
        frozen = {name: of for name, of in init.frozen.items() if name.removeprefix("blip2.") in named}
        return Ingredients(again, init.tokenizer, init.transform, frozen, init.lm_tokenizer)
    if not isinstance(init.model, Blip2):
        raise UserError(f"{recipe.stage}: begins with a BLIP-2, not with a {type(init.model).__name__}")
    reads_text, blip2 = recipe.stage == "instruct", init.model
    named = _train_as_told_(blip2, recipe, init.frozen)
    frozen = {f"blip2.{module}": source for module, source in named.items()}
    if recipe.blip2_llm_task.stage1 is None:
        blip2 = without_heads(blip2, keep_text=reads_text)
        if not reads_text:
            frozen.pop("blip2.qformer.word", None)
    dtype: LmDtype = "bfloat16" if recipe.train.precision == "bf16" else "float32"
    lm = load_lm(language.source, dtype, lora=language.lora, changes=language.changes)
    config = Blip2LlmConfig(
        lm.config, blip2.config, reads_text, language.first_token_id, language.query_projections
    )
    model = Blip2Llm(config, lm)
    model.blip2 = blip2
    family = lm.config.family or lm.config.config["model_type"]
    words = LmTokenizer.load(lm_folder(language.source), family, encoder_decoder=lm.is_encoder_decoder)
    return Ingredients(model, init.tokenizer, init.transform, frozen, words)


def _adapted(model: Blip2Llm, language: Language) -> Blip2Llm:
    """The model with adapters in its language model, if the recipe has some and the model has none."""
    if language.lora is None or model.lm.config.lora is not None:
        return model
    lm = LanguageModel(replace(model.lm.config, lora=language.lora), model.lm.model)
    adapted = Blip2Llm(replace(model.config, lm=lm.config), lm)
    adapted.blip2, adapted.projection = model.blip2, model.projection
    return adapted


def _blip3(recipe: Recipe, init: Pretrained | None) -> Ingredients:
    model, words = blip3_model(recipe, init)
    if init is not None:
        return Ingredients(model, None, init.transform or _transform(recipe, None), init.frozen, words)
    reports, transform = _tower(recipe, model)
    return Ingredients(model, None, transform, _named_parts(recipe), words, reports)


def _instructed(model: Blip2Llm) -> Blip2Llm:
    """The model as an InstructBLIP: its Q-Former reads the instruction, and the heads of stage 1 are gone."""
    if model.config.qformer_text:
        return model
    if not model.blip2.qformer.config.text:
        raise UserError(
            "instruct: the Q-Former of this model has no text part to read an instruction with; begin with stage 1, or "
            "with a stage 2 that kept its heads"
        )
    blip2 = without_heads(model.blip2, keep_text=True)
    instructed = Blip2Llm(replace(model.config, blip2=blip2.config, qformer_text=True), model.lm)
    instructed.blip2 = blip2
    instructed.projection.load_state_dict(model.projection.state_dict())
    return instructed


def _named_parts(recipe: Recipe) -> dict[str, str]:
    """The parts of a fresh BLIP-2 or BLIP-3 that stay as their packages have them, which need not be saved."""
    system, found = recipe.system, {}
    is_bridge = isinstance(system, Blip2Config | Blip3Config) and system.freeze_vision
    if is_bridge and recipe.vision_init == "dinov2_small":
        found["vision"] = "dinov2_small"
    if isinstance(system, Blip2Config) and system.qformer.freeze_words and recipe.text_init == "minilm":
        found["qformer.word"] = "minilm_words"
    return found


def _calibrate_(begun: Ingredients, recipe: Recipe, rows: Rows) -> None:
    """Fit the frozen tower's output and the ITC heads to a sample of the rows, drawn by the recipe's seed."""
    model, dataset = begun.model, PairDataset(rows, begun.transform)
    assert begun.tokenizer is not None
    loader = Loader(
        dataset, PairCollator(begun.tokenizer, recipe.max_length), min(recipe.calibrate, len(rows)),
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


def _fresh(recipe: Recipe) -> Ingredients:
    """A new BLIP, or BLIP-2 of stage 1, with pretrained parts where the recipe names them."""
    geometry = recipe.system
    model = Blip2(geometry) if isinstance(geometry, Blip2Config) else Blip(recipe.model)
    reports, transform = _tower(recipe, model)
    tokenizer = None
    if recipe.text_init is not None:
        texts, tokenizer = load_text_(model, recipe.text_init)
        reports += texts
    return Ingredients(model, tokenizer or bert_uncased(), transform, _named_parts(recipe), reports=reports)


def _tower(recipe: Recipe, model: Any) -> tuple[list[LoadReport], ImageTransform]:
    """Fill the tower of a fresh model, if the recipe says with what -> what became of it, and its transform."""
    if recipe.vision_init is None:
        return [], _transform(recipe, None)
    report, transform = load_tower_(model.vision, recipe.vision_init)
    return [report], _transform(recipe, transform)


def _transform(recipe: Recipe, tower: ImageTransform | None) -> ImageTransform:
    """The deterministic transform of a fresh model: whole pictures, and the statistics its tower was trained with.

    tower: how those prepared images that trained it. A BLIP that trains its tower has CLIP's, as released, though it
    begins with an ImageNet tower.
    """
    system = recipe.system
    size, kind = system.vision.image_size, (system.vision.backbone or {}).get("model_type", "")
    if tower is not None and not (isinstance(system, BlipConfig) and not system.freeze_vision):
        return ImageTransform(size, tower.mean, tower.std)
    if kind.startswith("dinov2"):
        return ImageTransform(size, parts.DINOV2_MEAN, parts.DINOV2_STD)
    if kind.startswith("siglip"):
        return ImageTransform(size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return ImageTransform(size, CLIP_MEAN, CLIP_STD)


def _for_stage(recipe: Recipe, start: Any) -> nn.Module:
    """The model that the stage trains, begun with `start`."""
    if recipe.stage == "blip2_stage1":
        return start
    # Fine-tunes are new modules with the weights of the start: how much of the tower is dropped, the recipe says.
    vision = replace(start.config.vision, drop_path_rate=recipe.model.vision.drop_path_rate)
    if recipe.stage != "pretrain":
        start = copy.copy(start)
        start.config = replace(start.config, vision=vision)
    text, frozen = start.config.text, start.config.freeze_vision
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
