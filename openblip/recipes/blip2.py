"""BLIP-2 and InstructBLIP: the papers' recipes, and small ones that train on two CPU cores."""

from dataclasses import replace

from openblip.models.blip2 import Blip2Config
from openblip.models.qformer import QFormerConfig
from openblip.models.vit import VisionConfig, clip_vit_l
from openblip.recipes.recipe import Augment, Language, Recipe
from openblip.train.config import TrainConfig
from openblip.train.tasks_blip2 import Blip2LlmTaskConfig, Blip2TaskConfig


def blip2_stage1() -> Recipe:
    """BLIP-2 stage 1 with CLIP's ViT-L, frozen: 250,000 steps of 2320 pairs at 224 px (BLIP-2 §3.4 and appendix).

    Begins with CLIP's tower and bert-base, from the hub; `vision_init` may be LAVIS's clip_vit_L.pth as well, or with
    EVA-CLIP's ViT-g, `models.vit.eva_vit_g`, eva_vit_g.pth, in batches of 1680.
    """
    train = TrainConfig(
        max_steps=250_000, batch_size=2320, lr=1e-4, warmup_steps=2000, betas=(0.9, 0.98), precision="bf16",
        clip_norm=None, save_every=1000,
    )  # fmt: skip
    augment = Augment(crop=(0.5, 1.0), randaugment=False)
    return Recipe(
        "blip2_stage1", train, blip2=Blip2Config(clip_vit_l()), augment=augment, max_length=32,
        vision_init="openai/clip-vit-large-patch14", text_init="google-bert/bert-base-uncased",
    )  # fmt: skip


def blip2_stage2() -> Recipe:
    """BLIP-2 stage 2 with OPT-2.7B: 80,000 steps of 1920 pairs (BLIP-2 §3.4 and appendix). Begins with stage 1."""
    recipe = blip2_stage1()
    train = replace(recipe.train, max_steps=80_000, batch_size=1920, min_lr=5e-5)
    # There a text ends with a line break, which is OPT's token 50118.
    language = Language("facebook/opt-2.7b", changes={"eos_token_id": 50118})
    return replace(
        recipe, stage="blip2_stage2", train=train, language=language, vision_init=None, text_init=None
    )


def blip2_retrieval_coco() -> Recipe:
    """Retrieval fine-tune of stage 1 on COCO at 364 px, its ViT-L trained too: 5 epochs at batch 224 (appendix)."""
    recipe = blip2_stage1()
    assert recipe.blip2 is not None
    system = replace(recipe.blip2, vision=replace(clip_vit_l(), image_size=364), freeze_vision=False)
    train = replace(recipe.train, max_steps=12_650, batch_size=224, lr=5e-6, warmup_steps=1000)
    return replace(
        recipe, blip2=system, train=train, blip2_task=replace(recipe.blip2_task, match_ids=True),
        vision_init=None, text_init=None,
    )  # fmt: skip


def blip2_caption_coco() -> Recipe:
    """Captioning fine-tune of stage 2 on COCO at 364 px, its tower trained too: 5 epochs at batch 256 (appendix).

    With OPT-6.7B the paper lets the tower's learning rate fall with depth, `blip2_llm_task.vision_lr_decay` 0.95.
    """
    recipe = blip2_stage2()
    train = replace(
        recipe.train, max_steps=11_000, batch_size=256, lr=1e-5, min_lr=0.0, warmup_steps=1000, warmup_lr=1e-8,
        betas=(0.9, 0.999),
    )  # fmt: skip
    system = blip2_retrieval_coco().blip2
    return replace(recipe, blip2=system, train=train, prompt="a photo of", max_length=30)


def instructblip() -> Recipe:
    """InstructBLIP with Vicuna-7B: at most 60,000 steps of 128 instructions (InstructBLIP §2.6). Begins with BLIP-2."""
    recipe = blip2_stage2()
    train = replace(
        recipe.train, max_steps=60_000, batch_size=128, lr=1e-5, min_lr=0.0, warmup_steps=1000, warmup_lr=1e-8,
        betas=(0.9, 0.999),
    )  # fmt: skip
    return replace(
        recipe, stage="instruct", train=train, language=Language("lmsys/vicuna-7b-v1.1"), max_length=256
    )


def blip2_stage1_small() -> Recipe:
    """BLIP-2 stage 1 for two CPU cores: frozen DINOv2 ViT-S/14 at 224 px, Q-Former from MiniLM (6 x 384).

    Three blocks of the tower side by side tell more than any alone. Their features take 1.2 MB a photograph, 0.6 of it
    for a second view.
    """
    vision = VisionConfig(
        image_size=224, patch_size=14, hidden_size=384, num_hidden_layers=12, num_attention_heads=6,
        intermediate_size=1536, layer_scale=1.0, output_blocks=(8, 10, 12),
    )  # fmt: skip
    qformer = QFormerConfig(
        vocab_size=30524, hidden_size=384, num_hidden_layers=6, intermediate_size=1536, num_query_tokens=16,
        freeze_words=True, attention_dropout=0.0,
    )  # fmt: skip
    train = TrainConfig(
        max_steps=1100, batch_size=128, lr=1e-3, min_lr=2e-5, warmup_steps=60, betas=(0.9, 0.98),
        precision="bf16", ema_decay=0.99, log_every=10, save_every=100,
    )  # fmt: skip
    task = Blip2TaskConfig(
        match_ids=True,
        negative_floor=0.01,
        match_pairs=24,
        write_pairs=32,
        keep_tokens=0.33,
        text_lr_scale=0.3,
    )
    # Some thousand photographs are few: without these it soon knows them by heart.
    augment = Augment(crop=(0.5, 1.0), randaugment=False, views=1)
    return Recipe(
        "blip2_stage1", train, blip2=Blip2Config(vision, qformer, image_dropout=0.3), blip2_task=task,
        vision_init="dinov2_small", text_init="minilm", augment=augment, calibrate=256, bucket=True, max_length=30,
    )  # fmt: skip


def blip2_retrieval_small() -> Recipe:
    """Retrieval fine-tuning of a small stage 1 (BLIP-2 §4.4): ITM sees every pair of a batch, not a quarter of them."""
    recipe = blip2_stage1_small()
    train = replace(recipe.train, max_steps=400, lr=6e-4, warmup_steps=30)
    task = replace(recipe.blip2_task, match_pairs=None)
    return replace(recipe, train=train, blip2_task=task, calibrate=0, vision_init=None, text_init=None)


def blip2_stage2_small() -> Recipe:
    """BLIP-2 stage 2 for two CPU cores: the queries learn to tell SmolLM2-135M, which stays as it is."""
    recipe = blip2_stage1_small()
    train = replace(recipe.train, max_steps=600, batch_size=16, lr=8e-4, warmup_steps=30)
    task = Blip2LlmTaskConfig(keep_tokens=0.5, text_lr_scale=0.3)
    # <|im_start|>: what every text began with that SmolLM2 was taught to answer.
    language = Language(first_token_id=1, query_projections=True)
    return replace(
        recipe, stage="blip2_stage2", train=train, language=language, blip2_llm_task=task, captions=5,
        calibrate=0, vision_init=None, text_init=None,
    )  # fmt: skip


def blip2_small() -> Recipe:
    """Both stages' losses at once, on a stage 1: one small model that matches, embeds and tells."""
    recipe = blip2_stage2_small()
    first = replace(recipe.blip2_task, match_pairs=8, write_pairs=8)
    train = replace(recipe.train, batch_size=32)
    task = replace(recipe.blip2_llm_task, stage1=first)
    return replace(recipe, train=train, blip2_llm_task=task, captions=1)


def blip2_stage1_short() -> Recipe:
    """The paper's table 6 in small, with ITG: a quarter of the steps of `blip2_stage1_small`."""
    recipe = blip2_stage1_small()
    return replace(recipe, train=replace(recipe.train, max_steps=250))


def blip2_stage1_short_without_itg() -> Recipe:
    """The same without ITG: matching alone."""
    recipe = blip2_stage1_short()
    assert recipe.blip2 is not None
    return replace(recipe, blip2=replace(recipe.blip2, decoder=False))


def blip2_stage2_short() -> Recipe:
    """The paper's figure 5 in small: a short stage 2, on a stage 1."""
    recipe = blip2_stage2_small()
    return replace(recipe, train=replace(recipe.train, max_steps=120))


def blip2_stage2_short_alone() -> Recipe:
    """The same without stage 1: the Q-Former begins as stage 1 did."""
    recipe = blip2_stage2_short()
    return replace(recipe, vision_init="dinov2_small", text_init="minilm", calibrate=256)
