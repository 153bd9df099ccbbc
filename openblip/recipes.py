"""Named training recipes: functions that return a full `Recipe`. A variant calls another and changes fields.

The papers' own recipes are `clip_b16`, `blip_base`, `blip_large` and the fine-tunes below them (BLIP §4.1 and
table 14, and the released configs); `small_*` are those that train on a laptop's CPU from real pretrained
parts.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from openblip.config import ConfigError, UserError
from openblip.models.blip import BlipConfig
from openblip.models.blip import blip_base as base_model
from openblip.models.blip import blip_large as large_model
from openblip.models.blip2 import Blip2Config
from openblip.models.clip import ClipConfig
from openblip.models.lm import LoraSettings
from openblip.models.qformer import QFormerConfig
from openblip.models.text import TextConfig
from openblip.models.vit import VisionConfig
from openblip.train.config import TrainConfig
from openblip.train.tasks import BlipTaskConfig
from openblip.train.tasks_blip2 import Blip2LlmTaskConfig, Blip2TaskConfig

Stage = Literal[
    "clip", "pretrain", "retrieval", "caption", "vqa", "nlvr", "blip2_stage1", "blip2_stage2", "instruct"
]


@dataclass
class Augment:
    """Training transform: share of the area a random crop keeps, flips, RandomAugment."""

    crop: tuple[float, float] = (0.2, 1.0)
    flip: bool = True
    randaugment: bool = True


@dataclass
class Language:
    """The language model of BLIP-2's stage 2: where it comes from, adapters to train, changes to its configuration."""

    source: str = "smollm2"
    lora: LoraSettings | None = None
    changes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Recipe:
    """One training stage: what is trained, on what kind of rows, and how.

    stage: which task. model, clip, blip2: geometry of the model it trains, see `system`; language: what BLIP-2's
        stage 2 adds. task, blip2_task, blip2_llm_task: its losses.
    init: a model folder or hub name whose weights it begins with. vision_init, text_init: real pretrained parts
        from registry packages.
    tokenizer: a folder with tokenizer files, for a CLIP that begins with nothing.
    augment: None: the deterministic transform, which lets a frozen vision tower's features be cached.
    calibrate: how many rows a fresh model's frozen tower and ITC heads are fitted to before the first step
        (see `train.start`); 0: not at all, as in the papers, whose towers are trained.
    ramp_epochs: soft targets grow to their full share within so many epochs.
    bucket: batches of captions of like length, which saves padding.
    """

    stage: Stage
    train: TrainConfig
    model: BlipConfig = field(default_factory=base_model)
    clip: ClipConfig | None = None
    blip2: Blip2Config | None = None
    task: BlipTaskConfig = field(default_factory=BlipTaskConfig)
    blip2_task: Blip2TaskConfig = field(default_factory=Blip2TaskConfig)
    language: Language | None = None
    blip2_llm_task: Blip2LlmTaskConfig = field(default_factory=Blip2LlmTaskConfig)
    init: str | None = None
    tokenizer: str | None = None
    vision_init: Literal["dinov2_small"] | None = None
    text_init: Literal["minilm"] | None = None
    augment: Augment | None = field(default_factory=Augment)
    calibrate: int = 0
    ramp_epochs: float = 2.0
    max_length: int = 30
    prompt: str = ""
    bucket: bool = False
    workers: int = 2

    @property
    def system(self) -> BlipConfig | ClipConfig | Blip2Config:
        """The geometry that counts for this stage. Raises ConfigError if the recipe lacks it."""
        of_blip2 = dict.fromkeys(("blip2_stage1", "blip2_stage2", "instruct"), "blip2")
        field = (of_blip2 | {"clip": "clip"}).get(self.stage, "model")
        found = getattr(self, field)
        if found is None:
            raise ConfigError(f"{self.stage}: the recipe needs its geometry, `{field}`")
        return found


def clip_b16() -> Recipe:
    """CLIP ViT-B/16 from scratch (Radford et al. 2021, tables 18 and 19)."""
    train = TrainConfig(
        max_steps=390_000, batch_size=32768, lr=5e-4, warmup_steps=2000, weight_decay=0.2, betas=(0.9, 0.98),
        eps=1e-6, clip_norm=None, precision="bf16",
    )  # fmt: skip
    augment = Augment(crop=(0.9, 1.0), flip=False, randaugment=False)
    return Recipe("clip", train, clip=ClipConfig(), augment=augment, max_length=77)


def blip_base() -> Recipe:
    """BLIP pre-training, ViT-B/16, 224 px: 20 epochs of 14M images at batch 2880, as the paper has it."""
    train = TrainConfig(
        max_steps=97_000, batch_size=2880, lr=3e-4, min_lr=1e-6, warmup_steps=3000, schedule="step_decay",
        steps_per_epoch=4861, decay_rate=0.85, clip_norm=None, save_every=1000,
    )  # fmt: skip
    return Recipe("pretrain", train, model=base_model(224), task=BlipTaskConfig(negatives="local"))


def blip_large() -> Recipe:
    """BLIP pre-training with ViT-L/16: batch 2400, lr 2e-4."""
    recipe = blip_base()
    train = replace(recipe.train, batch_size=2400, lr=2e-4, max_steps=116_000, steps_per_epoch=5833)
    return replace(recipe, model=large_model(224), train=train)


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
    """VQA fine-tune on VQAv2 and Visual Genome at 480 px: 10 epochs at batch 256, drop path 0.1."""
    model = base_model(480)
    model.vision.drop_path_rate = 0.1
    train = TrainConfig(max_steps=50_000, batch_size=256, lr=2e-5, clip_norm=None)
    return Recipe("vqa", train, model=model, augment=Augment(crop=(0.5, 1.0)), max_length=35)


def nlvr2() -> Recipe:
    """NLVR2 fine-tune at 384 px: 15 epochs at batch 256, drop path 0.1."""
    model = base_model(384)
    model.vision.drop_path_rate = 0.1
    train = TrainConfig(max_steps=5_000, batch_size=256, lr=3e-5, clip_norm=None)
    return Recipe("nlvr", train, model=model, augment=Augment(crop=(0.5, 1.0)), max_length=40)


def blip2_stage1() -> Recipe:
    """BLIP-2 stage 1 with a frozen ViT-L: 250,000 steps of 2320 pairs at 224 px (BLIP-2 §3.4 and appendix)."""
    train = TrainConfig(
        max_steps=250_000, batch_size=2320, lr=1e-4, warmup_steps=2000, betas=(0.9, 0.98), precision="bf16",
        clip_norm=None, save_every=1000,
    )  # fmt: skip
    augment = Augment(crop=(0.5, 1.0), randaugment=False)
    return Recipe("blip2_stage1", train, blip2=Blip2Config(), augment=augment, max_length=32)


def blip2_stage2() -> Recipe:
    """BLIP-2 stage 2 with OPT-2.7B: 80,000 steps of 1920 pairs (BLIP-2 §3.4 and appendix). Begins with stage 1."""
    recipe = blip2_stage1()
    train = replace(recipe.train, max_steps=80_000, batch_size=1920, min_lr=5e-5)
    # There a text ends with a line break, which is OPT's token 50118.
    language = Language("facebook/opt-2.7b", changes={"eos_token_id": 50118})
    return replace(recipe, stage="blip2_stage2", train=train, language=language)


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
    """BLIP-2 stage 1 for two CPU cores: frozen DINOv2 ViT-S/14 at 224 px, Q-Former from MiniLM (6 x 384)."""
    vision = VisionConfig(
        image_size=224, patch_size=14, hidden_size=384, num_hidden_layers=9, num_attention_heads=6,
        intermediate_size=1536, layer_scale=1.0,
    )  # fmt: skip
    qformer = QFormerConfig(
        vocab_size=30524, hidden_size=384, num_hidden_layers=6, intermediate_size=1536, num_query_tokens=16,
        freeze_words=True,
    )  # fmt: skip
    train = TrainConfig(
        max_steps=2500, batch_size=64, lr=1e-3, min_lr=2e-5, warmup_steps=100, betas=(0.9, 0.98),
        precision="bf16", log_every=20, save_every=100,
    )  # fmt: skip
    task = Blip2TaskConfig(
        match_ids=True, negative_floor=0.1, match_pairs=24, keep_tokens=0.5, text_lr_scale=0.3
    )
    return Recipe(
        "blip2_stage1", train, blip2=Blip2Config(vision, qformer), blip2_task=task, vision_init="dinov2_small",
        text_init="minilm", augment=None, calibrate=256, bucket=True, max_length=30,
    )  # fmt: skip


def blip2_stage2_small() -> Recipe:
    """BLIP-2 stage 2 for two CPU cores: SmolLM2-135M frozen, stage 1's losses kept, so that one model does all."""
    recipe = blip2_stage1_small()
    train = replace(recipe.train, max_steps=1500, batch_size=32, lr=5e-4)
    task = Blip2LlmTaskConfig(keep_tokens=0.5, text_lr_scale=0.3, stage1=recipe.blip2_task)
    return replace(
        recipe, stage="blip2_stage2", train=train, language=Language(), blip2_llm_task=task, calibrate=0,
        vision_init=None, text_init=None,
    )  # fmt: skip


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


RECIPES: dict[str, Callable[[], Recipe]] = {
    function.__name__: function
    for function in (
        clip_b16, blip_base, blip_large, retrieval_coco, retrieval_flickr, caption_coco, vqa_v2, nlvr2,
        blip2_stage1, blip2_stage2, instructblip, blip2_stage1_small, blip2_stage2_small,
        small_pretrain, small_retrieval, small_caption,
    )
}  # fmt: skip


def recipe_named(name: str) -> Recipe:
    """The recipe called `name`. Raises UserError that lists them if there is none."""
    if name not in RECIPES:
        raise UserError(f"no recipe is called {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]()
