"""What a training recipe says: one full configuration of one stage."""

from dataclasses import dataclass, field
from typing import Any, Literal

from openblip.config import ConfigError
from openblip.models.adapters import LoraSettings
from openblip.models.blip import BlipConfig
from openblip.models.blip import blip_base as base_model
from openblip.models.blip2 import Blip2Config
from openblip.models.blip3 import Blip3Config, Sampling
from openblip.models.clip import ClipConfig
from openblip.train.config import TrainConfig
from openblip.train.tasks import BlipTaskConfig
from openblip.train.tasks_blip2 import Blip2LlmTaskConfig, Blip2TaskConfig
from openblip.train.tasks_blip3 import Blip3TaskConfig, DpoTaskConfig

Stage = Literal[
    "clip", "pretrain", "retrieval", "caption", "vqa", "nlvr",
    "blip2_stage1", "blip2_stage2", "instruct", "blip3_pretrain", "blip3_sft", "blip3_dpo",
]  # fmt: skip
# Under what name a stage's geometry stands in a recipe, if not under "model".
_GEOMETRY = {
    "clip": "clip",
    **dict.fromkeys(("blip2_stage1", "blip2_stage2", "instruct"), "blip2"),
    **dict.fromkeys(("blip3_pretrain", "blip3_sft", "blip3_dpo"), "blip3"),
}


@dataclass
class Augment:
    """Training transform: share of the area a random crop keeps, flips, RandomAugment.

    views: so many of each picture are made once, and each step draws one of these or the whole picture, which lets a
        frozen vision tower's features be cached; 0: a new one at each step. Raises ConfigError below 0.
    """

    crop: tuple[float, float] = (0.2, 1.0)
    flip: bool = True
    randaugment: bool = True
    views: int = 0

    def __post_init__(self) -> None:
        if self.views < 0:
            raise ConfigError(f"augment.views is 0 or more, got {self.views}")


@dataclass
class Language:
    """A language model: where it comes from, what is trained of it (nothing, adapters, all), how it is told to talk.

    adapters_alone: nothing but the adapters is trained, not even what stands before the language model (BLIP-3).
    changes: to its configuration. family: see `LmConfig`.
    first_token_id, query_projections: see `Blip2LlmConfig`.
    """

    source: str = "smollm2"
    lora: LoraSettings | None = None
    adapters_alone: bool = False
    trainable: bool = False
    changes: dict[str, Any] = field(default_factory=dict)
    family: str = ""
    first_token_id: int | None = None
    query_projections: bool = False


@dataclass
class Recipe:
    """One training stage: what is trained, on what kind of rows, and how.

    stage: which task. model, clip, blip2, blip3: geometry of the model it trains, see `system`; language: the language
        model of BLIP-2's stage 2, and of BLIP-3 (where it takes the place of `blip3.lm`). task, blip2_task,
        blip2_llm_task, blip3_task, dpo_task: its losses.
    init: a model folder or hub name whose weights it begins with. vision_init, text_init: an image tower and a BERT
        that a fresh model begins with: a folder, file or hub name, or a registry package, see `train.initialise`.
    tokenizer: a folder with tokenizer files, for a CLIP that begins with nothing.
    augment: None: the deterministic transform, which lets a frozen vision tower's features be cached, see `Augment`.
    keep_features: they are, on disk beside the run, where nothing else is said: worth it if pictures are met again.
    calibrate: how many rows a fresh model's frozen tower and ITC heads are fitted to before the first step
        (see `train.start`); 0: not at all, as in the papers, whose towers are trained.
    ramp_epochs: soft targets grow to their full share within so many epochs.
    max_length: tokens of a text; for BLIP-3 of a whole row, vision tokens included.
    captions: of a picture, learnt together in BLIP-2's stage 2 with a decoder-only model: what it makes of the picture
        serves them all. The paper has 1.
    bucket: batches of texts of like length, which saves padding.
    pack: several documents in a row of `max_length` tokens (BLIP-3's pre-training).
    count_end_of_chunk: <|endofchunk|> of a document is learnt, as BLIP-3 meant it; its released code masks it.
    single_answer_weight: of an answer, in VQA, where only one person was asked (BLIP's code: 0.2, for Visual Genome).
    sampling: how a BLIP-3 samples tiles from now on; None: as the model does that the stage begins with.
    max_images: conversations with more are left out, documents cut (BLIP-3). frames: of a video.
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
    blip3: Blip3Config | None = None
    blip3_task: Blip3TaskConfig = field(default_factory=Blip3TaskConfig)
    dpo_task: DpoTaskConfig = field(default_factory=DpoTaskConfig)
    init: str | None = None
    tokenizer: str | None = None
    vision_init: str | None = None
    text_init: str | None = None
    augment: Augment | None = field(default_factory=Augment)
    keep_features: bool = True
    calibrate: int = 0
    ramp_epochs: float = 2.0
    max_length: int = 30
    prompt: str = ""
    captions: int = 1
    bucket: bool = False
    pack: bool = False
    count_end_of_chunk: bool = True
    single_answer_weight: float = 1.0
    sampling: Sampling | None = None
    max_images: int = 4
    frames: int = 8
    workers: int = 2

    @property
    def system(self) -> BlipConfig | ClipConfig | Blip2Config | Blip3Config:
        """The geometry that counts for this stage. Raises ConfigError if the recipe lacks it."""
        field = _GEOMETRY.get(self.stage, "model")
        found = getattr(self, field)
        if found is None:
            raise ConfigError(f"{self.stage}: the recipe needs its geometry, `{field}`")
        return found
