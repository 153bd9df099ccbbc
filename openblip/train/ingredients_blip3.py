"""What a stage of BLIP-3 begins with: parts joined for the first time, or a model to go on with."""

from dataclasses import replace

import torch

from openblip.config import UserError
from openblip.convert.lm import LmDtype, lm_folder, load_lm
from openblip.data.prompts import LmTokenizer
from openblip.hub import Pretrained
from openblip.models.adapters import is_adapter
from openblip.models.blip3 import ADDED_TOKENS, Blip3
from openblip.models.lm import LanguageModel
from openblip.recipes import Language, Recipe


def blip3_model(recipe: Recipe, init: Pretrained | None) -> tuple[Blip3, LmTokenizer]:
    """The model a stage of BLIP-3 trains, but for its tower's weights, and the tokenizer of its language model.

    Raises:
        UserError: nothing to begin with that the stage could use; a language model that cannot be had, or trained
            in the way the recipe wants.
        ConfigError: parts that do not fit.
    """
    if recipe.language is None:
        raise UserError(f"{recipe.stage}: the recipe names no language model; set `language`")
    if init is None:
        if recipe.stage != "blip3_pretrain" and recipe.vision_init is None:
            raise UserError(
                f"{recipe.stage}: begins with a trained BLIP-3; set `init` (--init FOLDER, or a hub name)"
            )
        model, words = _joined(recipe, recipe.language)
        model = _seeing(model, recipe)
        _freeze_(model, recipe.language)
        return model, words
    if not isinstance(init.model, Blip3) or init.lm_tokenizer is None:
        raise UserError(f"{recipe.stage}: begins with a BLIP-3, not with a {type(init.model).__name__}")
    model = _seeing(_with_temporal(_with_language(init.model, recipe.language), recipe), recipe)
    _halve_frozen_(model.lm, recipe)
    _freeze_(model, recipe.language)
    return model, init.lm_tokenizer


def _joined(recipe: Recipe, language: Language) -> tuple[Blip3, LmTokenizer]:
    """A tower, still to be filled, a language model from elsewhere, and between them a fresh resampler."""
    geometry = recipe.blip3
    assert geometry is not None
    half = recipe.train.precision == "bf16" and not language.trainable
    dtype: LmDtype = "bfloat16" if half else "float32"
    lm = load_lm(
        language.source, dtype, lora=language.lora, changes=language.changes, trainable=language.trainable,
        added_tokens=len(ADDED_TOKENS), first_added_id=geometry.lm.first_added_id,
    )  # fmt: skip
    lm.config.family = language.family
    resampler = replace(geometry.resampler, output_size=lm.hidden_size)
    temporal = geometry.temporal and replace(geometry.temporal, hidden_size=lm.hidden_size)
    model = Blip3(replace(geometry, lm=lm.config, resampler=resampler, temporal=temporal), lm)
    family = language.family or lm.config.config["model_type"]
    return model, LmTokenizer.load(lm_folder(language.source), family)


def _with_language(model: Blip3, language: Language) -> Blip3:
    """The model, with what the recipe trains of its language model: adapters are put in where there are none."""
    have = model.lm.config
    if language.trainable == have.trainable and (language.lora is None or have.lora is not None):
        return model
    if have.lora is not None:
        raise UserError(
            "language.trainable: this model has adapters; train those, or begin with a model without"
        )
    if language.trainable:
        wanted = replace(have, trainable=True, source=None, sha256=None)
    elif have.trainable and language.lora is None:
        raise UserError(
            "language: this model's language model was trained whole; go on so, or with adapters (lora)"
        )
    else:
        # What was trained whole is in no other place, so it stays in the folder below its adapters.
        wanted = replace(have, trainable=False, lora=language.lora)
    lm = LanguageModel(wanted, model.lm.model)
    lm.added_words, lm.added_head = model.lm.added_words, model.lm.added_head
    found = Blip3(replace(model.config, lm=wanted), lm)
    found.vision, found.resampler, found.temporal = model.vision, model.resampler, model.temporal
    return found


def _with_temporal(model: Blip3, recipe: Recipe) -> Blip3:
    """A model of pictures, with the recipe's encoder for videos if it has none."""
    assert recipe.blip3 is not None
    if model.temporal is not None or recipe.blip3.temporal is None:
        return model
    tokens = model.config.resampler.num_latents
    temporal = replace(recipe.blip3.temporal, hidden_size=model.lm.hidden_size, frame_tokens=tokens)
    found = Blip3(replace(model.config, temporal=temporal), model.lm)
    found.vision, found.resampler = model.vision, model.resampler
    return found


def _seeing(model: Blip3, recipe: Recipe) -> Blip3:
    """The model, sampling tiles as the recipe says, with a resampler that reads the question if the recipe's does."""
    assert recipe.blip3 is not None
    have = model.config
    sampling, resampler = recipe.sampling or have.sampling, have.resampler
    if recipe.blip3.resampler.condition_size is not None and resampler.condition_size is None:
        resampler = replace(resampler, condition_size=model.lm.hidden_size)
    if (sampling, resampler) == (have.sampling, have.resampler):
        return model
    found = Blip3(replace(have, sampling=sampling, resampler=resampler), model.lm)
    found.vision, found.temporal = model.vision, model.temporal
    found.resampler.load_state_dict({**found.resampler.state_dict(), **model.resampler.state_dict()})
    return found


def _freeze_(model: Blip3, language: Language) -> None:
    """All but the adapters, if they are to be trained alone."""
    if not language.adapters_alone:
        return
    if model.lm.config.lora is None:
        raise UserError("language.adapters_alone: this language model has no adapters; set language.lora")
    for name, weight in model.named_parameters():
        weight.requires_grad_(is_adapter(name))


def _halve_frozen_(lm: LanguageModel, recipe: Recipe) -> None:
    """A frozen language model in bfloat16, where it is used in that anyway: half the memory, and nothing to convert."""
    if recipe.train.precision == "bf16":
        for weight in lm.model.parameters():
            if not weight.requires_grad:
                weight.data = weight.data.to(torch.bfloat16)
