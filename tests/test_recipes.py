"""Every recipe describes a model that can be built, and those of the papers say what the papers say."""

from dataclasses import replace

import pytest
import torch

from openblip.config import UserError, from_dict, to_dict
from openblip.models.blip import Blip, without_decoder
from openblip.models.blip2 import Blip2
from openblip.models.blip3 import Blip3
from openblip.models.blip_nlvr import BlipNlvr, BlipNlvrConfig
from openblip.models.blip_vqa import BlipVqa, BlipVqaConfig
from openblip.models.clip import Clip
from openblip.models.lm import LmConfig
from openblip.recipes import RECIPES, Recipe, recipe_named
from openblip.train.tasks import BlipTaskConfig

COCO, FLICKR = 566_747, 145_000  # captions of Karpathy's training splits
# name: (stage, samples of an epoch, epochs, batch, lr, image side, tokens of text)
PAPERS = {
    "clip_b16": ("clip", 400e6, 32, 32768, 5e-4, 224, 77),
    "blip_base": ("pretrain", 14e6, 20, 2880, 3e-4, 224, 30),
    "blip_large": ("pretrain", 14e6, 20, 2400, 2e-4, 224, 30),
    "retrieval_coco": ("retrieval", COCO, 6, 256, 1e-5, 384, 35),
    "retrieval_flickr": ("retrieval", FLICKR, 6, 256, 1e-5, 384, 35),
    "caption_coco": ("caption", COCO, 5, 256, 1e-5, 384, 40),
    "nlvr2": ("nlvr", 86_373, 15, 256, 3e-5, 384, 40),
    "blip2_retrieval_coco": ("blip2_stage1", COCO, 5, 224, 5e-6, 364, 32),
    "blip2_caption_coco": ("blip2_stage2", COCO, 5, 256, 1e-5, 364, 30),
}


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_numbers(name):
    stage, samples, epochs, batch, lr, side, tokens = PAPERS[name]
    recipe = recipe_named(name)
    vision = recipe.system.vision
    assert (recipe.stage, recipe.train.batch_size, recipe.train.lr) == (stage, batch, lr)
    assert (vision.image_size, recipe.max_length) == (side, tokens)
    assert recipe.train.max_steps * batch == pytest.approx(samples * epochs, rel=0.02)


def test_blip2_is_fine_tuned_with_its_tower():
    finds, tells = recipe_named("blip2_retrieval_coco"), recipe_named("blip2_caption_coco")
    assert not finds.blip2.freeze_vision and not tells.blip2.freeze_vision
    assert finds.blip2.decoder and finds.blip2_task.match_ids, "ITG is kept"
    assert (finds.train.betas, tells.train.betas) == ((0.9, 0.98), (0.9, 0.999))
    assert finds.train.warmup_steps == tells.train.warmup_steps == 1000 and tells.prompt == "a photo of"


def test_blip2_as_in_the_paper():
    """Appendix of BLIP-2: steps and batches of the larger towers' sibling; InstructBLIP §2.6."""
    one, two = recipe_named("blip2_stage1"), recipe_named("blip2_stage2")
    for recipe, steps, batch, floor in ((one, 250_000, 2320, 0.0), (two, 80_000, 1920, 5e-5)):
        train = recipe.train
        assert (train.max_steps, train.batch_size, train.lr, train.min_lr) == (steps, batch, 1e-4, floor)
        assert (train.betas, train.weight_decay, train.warmup_steps) == ((0.9, 0.98), 0.05, 2000)
        assert (
            recipe.blip2.freeze_vision and recipe.blip2.vision.image_size == 224 and recipe.max_length == 32
        )
        assert (
            recipe.blip2.qformer.num_query_tokens == 32
            and recipe.blip2.qformer.cross_attention_frequency == 2
        )
    task = one.blip2_task
    assert task.negatives == "global" and task.negative_floor == 0 and task.label_smoothing == 0.1
    assert task.match_pairs is None and task.keep_tokens == 1 and not task.match_ids
    assert two.blip2_llm_task.stage1 is None and two.language.changes == {"eos_token_id": 50118}
    instruct = recipe_named("instructblip").train
    assert (instruct.max_steps, instruct.lr, instruct.warmup_steps, instruct.betas) == (
        60_000,
        1e-5,
        1000,
        (0.9, 0.999),
    )


def test_blip3_as_in_the_released_code():
    """lr 2e-5 after 2,000 steps of warm-up, 64 conversations a step, no weight decay, 2,048 tokens; the whole model
    is trained but the tower; DPO with adapters."""
    base, sft, dpo = (recipe_named(f"xgenmm_{name}") for name in ("pretrain", "sft", "dpo"))
    assert (sft.train.lr, sft.train.warmup_steps, sft.train.batch_size, sft.train.weight_decay) == (
        2e-5,
        2000,
        64,
        0,
    )
    assert sft.train.precision == "bf16" and sft.train.grad_checkpointing and sft.max_length == 2048
    for recipe in (base, sft):
        assert recipe.blip3.freeze_vision and recipe.language.trainable and recipe.train.shard
    assert dpo.language.lora is not None and not dpo.language.trainable and dpo.dpo_task.noise_step
    assert dpo.train.max_steps * dpo.train.batch_size == pytest.approx(62_600, rel=0.01)
    assert all(
        recipe_named(f"xgenmm_{name}").blip3.lm.first_added_id == 32012 for name in ("safety", "video")
    )
    geometry = base.blip3
    assert geometry.tile_grouping == "strip" and geometry.sampling == "anyres"
    assert [geometry.vision_length(*grid) for grid in geometry.grids] == [384, 384, 640, 512, 512]


def test_pretraining_as_in_the_paper():
    for name in ("blip_base", "blip_large"):
        train = recipe_named(name).train
        assert train.schedule == "step_decay" and train.decay_rate == 0.85 and train.weight_decay == 0.05
        assert train.steps_per_epoch * train.batch_size == pytest.approx(14e6, rel=0.001)
        assert train.max_steps / train.steps_per_epoch == pytest.approx(20, abs=0.2)
        assert recipe_named(name).augment.crop == (0.2, 1.0) and recipe_named(name).ramp_epochs == 2
        assert recipe_named(name).text_init.endswith("bert-base-uncased")
    assert "deit-base" in recipe_named("blip_base").vision_init
    assert "in21k" in recipe_named("blip_large").vision_init
    task = recipe_named("blip_base").task
    assert task == BlipTaskConfig(queue_size=57600, momentum=0.995, alpha=0.4, negatives="local")
    assert task.negative_floor == 1e-4 and not task.match_ids and task.label_smoothing == 0.1


def test_fine_tuning_as_in_the_paper():
    for name in ("retrieval_coco", "retrieval_flickr", "caption_coco", "vqa_v2", "nlvr2"):
        recipe = recipe_named(name)
        assert (recipe.train.schedule, recipe.train.weight_decay, recipe.augment.crop) == (
            "cosine",
            0.05,
            (0.5, 1.0),
        )
    coco, flickr = recipe_named("retrieval_coco"), recipe_named("retrieval_flickr")
    assert (coco.task.negatives, flickr.task.negatives) == ("global", "local")
    for recipe in (coco, flickr):
        assert recipe.task.match_ids and recipe.task.negative_floor == 0 and recipe.ramp_epochs == 1
    assert recipe_named("caption_coco").prompt == "a picture of "
    vqa = recipe_named("vqa_v2")
    assert (vqa.train.batch_size, vqa.train.lr, vqa.model.vision.image_size, vqa.max_length) == (
        256,
        2e-5,
        480,
        35,
    )
    assert vqa.model.vision.drop_path_rate == recipe_named("nlvr2").model.vision.drop_path_rate == 0.1
    assert recipe_named("blip_base").model.vision.drop_path_rate == 0, "geometries are not shared"


def test_small_recipes_begin_one_with_another():
    first = recipe_named("small_pretrain")
    for name in ("small_retrieval", "small_caption", "small_vqa"):
        then = recipe_named(name)
        assert then.model == first.model and then.max_length == first.max_length
        assert then.vision_init is None and then.text_init is None and then.calibrate == 0
    assert first.vision_init and first.model.freeze_vision and first.augment is None


@pytest.mark.parametrize("name", RECIPES)
def test_a_cosine_falls(name):
    train = recipe_named(name).train
    assert train.schedule != "cosine" or train.min_lr < train.lr


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_goes_through_a_file_and_back(name):
    recipe = recipe_named(name)
    assert from_dict(Recipe, to_dict(recipe), name) == recipe
    recipe.train.lr = 1.0
    assert recipe_named(name).train.lr != 1.0, "each call makes a recipe of its own"


def blip3(recipe):
    """With the geometry of its language model, whose weights a recipe loads."""
    lm = {
        "smollm2": {
            "model_type": "llama",
            "hidden_size": 576,
            "intermediate_size": 1536,
            "vocab_size": 49152,
        },
        "microsoft/Phi-3-mini-4k-instruct": {"model_type": "phi3"},
    }[recipe.language.source]
    lm = LmConfig({**lm, "tie_word_embeddings": False}, added_tokens=3, trainable=recipe.language.trainable)
    return Blip3(replace(recipe.blip3, lm=lm))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_describes_a_model_that_can_be_built(name):
    recipe = recipe_named(name)
    vision, text = recipe.model.vision, recipe.model.text
    with torch.device("meta"):
        model = {
            "clip": lambda: Clip(recipe.clip),
            "pretrain": lambda: Blip(recipe.model),
            "retrieval": lambda: without_decoder(Blip(recipe.model)),
            "caption": lambda: Blip(recipe.model),
            "vqa": lambda: BlipVqa(BlipVqaConfig(vision, text)),
            "nlvr": lambda: BlipNlvr(BlipNlvrConfig(vision, text)),
            "blip2_stage1": lambda: Blip2(recipe.blip2),
            "blip2_stage2": lambda: Blip2(recipe.blip2),  # the language model is loaded, not built
            "instruct": lambda: Blip2(recipe.blip2),
            **dict.fromkeys(("blip3_pretrain", "blip3_sft", "blip3_dpo"), lambda: blip3(recipe)),
        }[recipe.stage]()
    if recipe.blip3 is None:
        limit = (recipe.clip.text if recipe.clip else text).max_position_embeddings
        assert recipe.max_length <= limit
    if name == "xgenmm_sft":
        assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(4.36e9, rel=0.005)
        assert sum(weight.numel() for weight in model.resampler.parameters()) == 109_901_568
    if name == "blip_base":
        millions = sum(weight.numel() for weight in model.parameters()) / 1e6
        assert millions == pytest.approx(252, abs=1)  # BLIP table 3, all but self-attention shared


def test_an_unknown_name_is_told_the_known_ones():
    with pytest.raises(UserError, match="no recipe is called 'blip_bse'") as error:
        recipe_named("blip_bse")
    assert all(name in str(error.value) for name in RECIPES)
    assert all(recipe_named(name) == function() for name, function in RECIPES.items())
