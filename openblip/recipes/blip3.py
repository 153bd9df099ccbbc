"""BLIP-3 / xGen-MM: what the report and the released code say of its stages, and small ones for two CPU cores."""

from dataclasses import replace

from openblip.models.adapters import LoraSettings
from openblip.models.blip3 import ADDED_TOKENS, Blip3Config
from openblip.models.lm import LmConfig
from openblip.models.resampler import ResamplerConfig
from openblip.models.temporal import TemporalConfig
from openblip.models.vit import VisionConfig
from openblip.recipes.recipe import Language, Recipe
from openblip.train.config import TrainConfig
from openblip.train.tasks_blip3 import DpoTaskConfig


def xgenmm_pretrain() -> Recipe:
    """BLIP-3 base pre-training on interleaved documents, 4B: SigLIP-SO400M at 384 px frozen, Phi-3-mini trained whole.

    The paper gives the number of tokens (about 100 billion) and not how they were trained on: batch and learning rate
    are those of the released fine-tuning code, for want of better.
    """
    vision = VisionConfig(
        image_size=384, patch_size=14, hidden_size=1152, num_hidden_layers=27, num_attention_heads=16,
        intermediate_size=4304, hidden_act="gelu_tanh", class_token=False,
    )  # fmt: skip
    train = TrainConfig(
        max_steps=200_000, batch_size=256, lr=2e-5, warmup_steps=2000, weight_decay=0.0, precision="bf16",
        grad_checkpointing=True, shard=True, save_every=1000,
    )  # fmt: skip
    return Recipe(
        "blip3_pretrain", train, blip3=Blip3Config(_language_model(32012), vision, tile_grouping="strip"),
        language=Language("microsoft/Phi-3-mini-4k-instruct", trainable=True, family="xgenmm"),
        vision_init="google/siglip-so400m-patch14-384", augment=None, max_length=2048, pack=True,
        keep_features=False,  # a tile's are 1.7 MB, and are seen once
    )  # fmt: skip


def xgenmm_sft() -> Recipe:
    """BLIP-3 instruction tuning as released: an epoch of a million conversations, 64 a step. Begins with a base."""
    recipe = xgenmm_pretrain()
    train = replace(recipe.train, max_steps=16_000, batch_size=64)
    return replace(recipe, stage="blip3_sft", train=train, bucket=True, pack=False, vision_init=None)


def xgenmm_dpo() -> Recipe:
    """BLIP-3 DPO: an epoch of 62,600 pairs, adapters alone, a second rejected answer from noisy pictures (§4.5).

    The paper says so much, and that adapters are 2.5 % of the weights. It gives neither β nor a learning rate: these
    are the usual ones of DPO with adapters.
    """
    recipe = xgenmm_sft()
    train = replace(recipe.train, max_steps=978, batch_size=64, lr=5e-6, warmup_steps=100, shard=False)
    lora = LoraSettings(64, 128.0, target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"])
    language = Language("microsoft/Phi-3-mini-4k-instruct", lora, adapters_alone=True, family="xgenmm")
    return replace(
        recipe, stage="blip3_dpo", train=train, language=language, dpo_task=DpoTaskConfig(noise_step=500)
    )


def xgenmm_safety() -> Recipe:
    """BLIP-3 safety tuning: adapters, three epochs of 2,000 rows of VLGuard with 5,000 of the instructions.

    `openblip train xgenmm_safety --data vlguard instructions --take 2000 5000 --init ...`
    """
    recipe = xgenmm_dpo()
    return replace(recipe, stage="blip3_sft", train=replace(recipe.train, max_steps=328), bucket=True)


def xgenmm_video() -> Recipe:
    """BLIP-3-Video: an instructed model of pictures, with an encoder of 8 frames to 32 tokens.

    The paper names its data, video captions and then video questions, and no learning rate: this is that of pictures.
    """
    recipe = xgenmm_sft()
    assert recipe.blip3 is not None
    temporal = TemporalConfig(3072, "ttm", num_tokens=32, intermediate_size=3072)
    return replace(recipe, blip3=replace(recipe.blip3, temporal=temporal), bucket=False)


def blip3_small_pretrain() -> Recipe:
    """BLIP-3 on captions for two CPU cores: DINOv2 ViT-S/14 at 112 px and SmolLM2-135M, both frozen."""
    resampler = ResamplerConfig(
        hidden_size=384, num_latents=16, num_hidden_layers=3, num_attention_heads=6, head_dim=64, output_size=576
    )  # fmt: skip
    vision = VisionConfig(
        image_size=112, patch_size=14, hidden_size=384, num_hidden_layers=9, num_attention_heads=6,
        intermediate_size=1536, layer_scale=1.0,
    )  # fmt: skip
    train = TrainConfig(
        max_steps=1000, batch_size=32, lr=1e-3, min_lr=5e-5, warmup_steps=50, betas=(0.9, 0.98), precision="bf16",
        log_every=10, save_every=100,
    )  # fmt: skip
    return Recipe(
        "blip3_pretrain", train, blip3=Blip3Config(_language_model(), vision, resampler), language=Language(),
        # Documents of one picture are about 95 tokens long: batches of like length have no padding to speak of, where
        # packed rows would have each text attend over all 512 places.
        vision_init="dinov2_small", augment=None, max_length=512, bucket=True,
    )  # fmt: skip


def blip3_small_sft() -> Recipe:
    """Instruction tuning of a model from `blip3_small_pretrain`, with adapters in the language model."""
    recipe = blip3_small_pretrain()
    train = replace(recipe.train, max_steps=600, batch_size=16, lr=5e-4)
    return replace(
        recipe,
        stage="blip3_sft",
        train=train,
        language=Language(lora=LoraSettings(16, 32.0)),
        vision_init=None,
    )


def blip3_small_dpo() -> Recipe:
    """A short DPO of a model from `blip3_small_sft`."""
    recipe = blip3_small_sft()
    train = replace(recipe.train, max_steps=50, batch_size=8, lr=5e-5, min_lr=5e-6, warmup_steps=5)
    # Most of its pictures are met once: nothing to keep.
    return replace(recipe, stage="blip3_dpo", train=train, keep_features=False)


def blip3_small_anyres() -> Recipe:
    """The paper's ablation of resolution in small, first of three: every tile is sampled by itself.

    Instruction tuning of a model from `blip3_small_sft`, on pictures whose answers need detail
    (`runs/make_easy_vqa.py`).
    """
    recipe = blip3_small_sft()
    train = replace(recipe.train, max_steps=200)
    return replace(recipe, train=train, sampling="anyres", max_length=192)


def blip3_small_fixed() -> Recipe:
    """Second of three: the picture squashed into one tile."""
    return replace(blip3_small_anyres(), sampling="fixed")


def blip3_small_fixed_sampling() -> Recipe:
    """Third of three: all tiles are sampled together, to as few tokens as one has."""
    return replace(blip3_small_anyres(), sampling="anyres_fixed_sampling")


def blip3_small_conditioned() -> Recipe:
    """`blip3_small_fixed_sampling` with a resampler that reads the question: what matters can go into few tokens."""
    recipe = blip3_small_fixed_sampling()
    assert recipe.blip3 is not None
    resampler = replace(recipe.blip3.resampler, condition_size=576)
    return replace(recipe, blip3=replace(recipe.blip3, resampler=resampler))


def _language_model(first_added_id: int | None = None) -> LmConfig:
    """What stands for the language model until a recipe's `language` is loaded.

    first_added_id: 32012 in the released weights, where Phi-3's tokenizer ends; its matrix has 32,064 rows.
    """
    added = len(ADDED_TOKENS)
    return LmConfig({"model_type": "llama"}, added_tokens=added, first_added_id=first_added_id)
