"""Each stage of xGen-MM begins where the one before ended: the recipes as they are, at the size of a toy."""

from dataclasses import replace

import pytest

from openblip.config import UserError
from openblip.convert.weights import LoadReport
from openblip.hub import Pretrained
from openblip.models.lm import LmConfig
from openblip.models.resampler import ResamplerConfig
from openblip.models.temporal import TemporalConfig
from openblip.recipes import recipe_named
from openblip.train.ingredients import prepare
from openblip.train.stage import task_of
from tests.data.test_chat import bytes_tokenizer
from tests.models.tiny_lms import CONFIGS, tiny_lm

BEGINS_WITH = {
    "xgenmm_pretrain": None,
    "xgenmm_sft": "xgenmm_pretrain",
    "xgenmm_dpo": "xgenmm_sft",
    "xgenmm_safety": "xgenmm_dpo",
    "xgenmm_video": "xgenmm_sft",
}


@pytest.fixture(scope="module")
def phi3(tmp_path_factory):
    """A folder with a language model of the family, and a tokenizer that has its control tokens."""
    folder, words = tmp_path_factory.mktemp("phi3"), bytes_tokenizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, "phi3", {**CONFIGS["phi3"], "vocab_size": 290, "max_position_embeddings": 128})
        tiny_lm("phi3").float().model.save_pretrained(folder)
    words.save(folder)
    return folder


def small(name, phi3):
    """The recipe with a toy's sizes, and nothing else changed."""
    recipe = recipe_named(name)
    sizes = {"image_size": 16, "patch_size": 8, "hidden_size": 16}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    geometry = replace(
        recipe.blip3,
        lm=LmConfig({"model_type": "llama"}, added_tokens=3, first_added_id=280),
        vision=replace(recipe.blip3.vision, **sizes),
        resampler=ResamplerConfig(16, 3, 1, 2, 8, 2, 1),
        temporal=recipe.blip3.temporal and TemporalConfig(1, "ttm", 2, 3, 2, 1, 1),
    )
    return replace(
        recipe, blip3=geometry, language=replace(recipe.language, source=str(phi3)), vision_init=None
    )


def made(name, phi3):
    """(recipe, what it begins with), after all the recipes before it."""
    recipe, before = small(name, phi3), BEGINS_WITH[name]
    if before is None:
        return recipe, prepare(recipe, [])
    start = made(before, phi3)[1]
    init = Pretrained(
        start.model, None, start.transform, {}, LoadReport("memory"), start.frozen, start.lm_tokenizer
    )
    return recipe, prepare(recipe, [], init)


@pytest.mark.parametrize("name", BEGINS_WITH)
def test_it_can_start(name, phi3):
    recipe, found = made(name, phi3)
    task = task_of(recipe, found, 0)
    trained = {part for part, weight in task.named_parameters() if weight.requires_grad}
    adapters = {part for part in trained if "lora_" in part}
    if name in ("xgenmm_dpo", "xgenmm_safety"):
        assert trained == adapters and len(adapters) == 2 * 2 * 4, "two layers, four places, A and B"
    else:
        assert not adapters and any("resampler" in part for part in trained)
        assert any("qkv_proj" in part for part in trained) and any("added_words" in part for part in trained)
    assert not any(".vision." in part for part in trained)
    if name == "xgenmm_dpo":
        assert list(task.ends) == found.lm_tokenizer.encode_rendered("<|end|>"), (
            "as the answers it learns from"
        )


def test_adapters_alone_need_adapters(phi3):
    recipe = small("xgenmm_dpo", phi3)
    recipe = replace(recipe, stage="blip3_pretrain", language=replace(recipe.language, lora=None))
    with pytest.raises(UserError, match=r"language\.adapters_alone: .* no adapters; set language\.lora"):
        prepare(recipe, [])
