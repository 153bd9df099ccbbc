"""CLIP and BLIP: the papers' recipes (BLIP §4.1 and table 14, and the released configs), and small ones."""

from dataclasses import replace

from openblip.models.blip import BlipConfig
from openblip.models.blip import blip_base as base_model
from openblip.models.blip import blip_large as large_model
from openblip.models.clip import ClipConfig
from openblip.models.text import TextConfig
from openblip.models.vit import VisionConfig
from openblip.recipes.recipe import Augment, Recipe
from openblip.train.config import TrainConfig
from openblip.train.tasks import BlipTaskConfig


def clip_b16() -> Recipe:
    """CLIP ViT-B/16 from scratch (Radford et al. 2021, tables 18 and 19)."""
    train = TrainConfig(
        max_steps=390_000, batch_size=32768, lr=5e-4, warmup_steps=2000, weight_decay=0.2, betas=(0.9, 0.98),
        eps=1e-6, clip_norm=None, precision="bf16",
    )  # fmt: skip
    augment = Augment(crop=(0.9, 1.0), flip=False, randaugment=False)
    return Recipe("clip", train, clip=ClipConfig(), augment=augment, max_length=77)


def blip_base() -> Recipe:
    """BLIP pre-training, ViT-B/16, 224 px: 20 epochs of 14M images at batch 2880, as the paper has it.

    Begins with DeiT-B and bert-base, from the hub. Without a network, `vision_init` and `text_init` may be folders or
    files of them, or None.
    """
    train = TrainConfig(
        max_steps=97_000, batch_size=2880, lr=3e-4, min_lr=1e-6, warmup_steps=3000, schedule="step_decay",
        steps_per_epoch=4861, decay_rate=0.85, clip_norm=None, save_every=1000,
    )  # fmt: skip
    return Recipe(
        "pretrain", train, model=base_model(224), task=BlipTaskConfig(negatives="local"),
        vision_init="facebook/deit-base-patch16-224", text_init="google-bert/bert-base-uncased",
    )  # fmt: skip


def blip_large() -> Recipe:
    """BLIP pre-training with ViT-L/16, trained on ImageNet-21k: batch 2400, lr 2e-4."""
    recipe = blip_base()
    train = replace(recipe.train, batch_size=2400, lr=2e-4, max_steps=116_000, steps_per_epoch=5833)
    return replace(
        recipe, model=large_model(224), train=train, vision_init="timm/vit_large_patch16_224.augreg_in21k"
    )


def retrieval_coco() -> Recipe:
    """Retrieval fine-tune on COCO at 384 px: 6 epochs at batch 256, hard negatives from all ranks."""
    train = TrainConfig(max_steps=13_200, batch_size=256, lr=1e-5, clip_norm=None, grad_checkpointing=True)
    task = BlipTaskConfig(match_ids=True, negative_floor=0.0)
    return Recipe(
        "retrieval", train, model=base_model(384), task=task, augment=Augment(crop=(0.5, 1.0)), ramp_epochs=1.0,
        max_length=35,
    )  # fmt: skip


def retrieval_flickr() -> Recipe:
    """Retrieval fine-tune on Flickr30k: as on COCO, with hard negatives from the own rank's batch."""
    recipe = retrieval_coco()
    task = replace(recipe.task, negatives="local")
    return replace(recipe, task=task, train=replace(recipe.train, max_steps=3_400))


def caption_coco() -> Recipe:
    """Captioning fine-tune on COCO at 384 px: 5 epochs at batch 256, prompt "a picture of "."""
    train = TrainConfig(max_steps=11_000, batch_size=256, lr=1e-5, clip_norm=None)
    return Recipe(
        "caption", train, model=base_model(384), augment=Augment(crop=(0.5, 1.0)), max_length=40,
        prompt="a picture of ",
    )  # fmt: skip


def vqa_v2() -> Recipe:
    """VQA fine-tune on VQAv2 and Visual Genome at 480 px: 10 epochs at batch 256, drop path 0.1.

    Visual Genome has one answer for each question, which weighs 0.2, as in the released code.
    """
    model = base_model(480)
    model.vision.drop_path_rate = 0.1
    train = TrainConfig(max_steps=50_000, batch_size=256, lr=2e-5, clip_norm=None)
    return Recipe(
        "vqa", train, model=model, augment=Augment(crop=(0.5, 1.0)), max_length=35, single_answer_weight=0.2
    )  # fmt: skip


def nlvr2() -> Recipe:
    """NLVR2 fine-tune at 384 px: 15 epochs at batch 256, drop path 0.1."""
    model = base_model(384)
    model.vision.drop_path_rate = 0.1
    train = TrainConfig(max_steps=5_000, batch_size=256, lr=3e-5, clip_norm=None)
    return Recipe("nlvr", train, model=model, augment=Augment(crop=(0.5, 1.0)), max_length=40)


def small_pretrain() -> Recipe:
    """BLIP pre-training that fits two CPU cores: frozen DINOv2 ViT-S/14 at 112 px, text from MiniLM (6 x 384)."""
    text = TextConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, dropout=0.0
    )
    vision = VisionConfig(
        image_size=112, patch_size=14, hidden_size=384, num_hidden_layers=9, num_attention_heads=6,
        intermediate_size=1536, layer_scale=1.0,
    )  # fmt: skip
    train = TrainConfig(
        max_steps=110, batch_size=64, lr=1e-3, min_lr=5e-5, warmup_steps=10, warmup_lr=1e-4, betas=(0.9, 0.98),
        precision="bf16", log_every=10, save_every=None,
    )  # fmt: skip
    # Negatives close to uniform: an ITM head that has seen little learns nothing from the hardest ones.
    task = BlipTaskConfig(
        queue_size=512, momentum=0.98, match_ids=True, negative_floor=0.1, text_lr_scale=0.3
    )  # fmt: skip
    return Recipe(
        "pretrain", train, model=BlipConfig(vision=vision, text=text, freeze_vision=True), task=task,
        vision_init="dinov2_small", text_init="minilm", augment=None, calibrate=256, bucket=True, max_length=20,
    )  # fmt: skip


def small_retrieval() -> Recipe:
    """Retrieval fine-tune (CapFilt's filter) of a model from `small_pretrain`."""
    recipe = small_pretrain()
    task = replace(recipe.task, queue_size=256, text_lr_scale=1.0)
    train = replace(recipe.train, max_steps=60, lr=3e-4)
    return replace(
        recipe,
        stage="retrieval",
        task=task,
        train=train,
        calibrate=0,
        ramp_epochs=1.0,
        vision_init=None,
        text_init=None,
    )


def small_caption() -> Recipe:
    """Captioning fine-tune (CapFilt's captioner) of a model from `small_pretrain`."""
    recipe = small_retrieval()
    return replace(recipe, stage="caption", train=replace(recipe.train, lr=5e-4))


def small_vqa() -> Recipe:
    """VQA fine-tune of a model from `small_pretrain`: questions with short answers (`runs/make_easy_vqa.py`)."""
    recipe = small_retrieval()
    train = replace(recipe.train, max_steps=1000, lr=5e-4, warmup_steps=50, log_every=20, save_every=200)
    return replace(recipe, stage="vqa", train=train)
