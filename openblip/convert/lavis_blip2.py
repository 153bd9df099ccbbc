"""LAVIS's files of BLIP-2 and InstructBLIP, and what they leave to others: the image tower and the language model.

    file                                  what is in it                                      ours
    blip2_pretrained*.pth                 stage 1: queries, Q-Former, heads, ln_vision       Blip2
    blip2_finetune_coco.pth               the same, and the tower, which was trained         Blip2
    blip2_pretrained_opt*, _flant5*.pth   stage 2: the Q-Former's query path, and opt_proj   Blip2Llm
    blip2_caption_*.pth                   or t5_proj; in the second the tower                Blip2Llm
    instruct_blip_*_trimmed.pth           llm_proj or t5_proj, and the Q-Former reads text   Blip2Llm, qformer_text

LAVIS saves what it trained. A frozen tower comes from a file of its own (see `lavis_towers`), a language model through
`convert.lm`, as it was changed there: OPT's and Vicuna's texts begin with </s>, OPT's end with a line break
(`data.prompts.QUIRKS`), and Flan-T5 runs with the exact GELU (`models.lm.RELEASED_BLIP2`).

The geometry is read from shapes; 64 channels are a head of the Q-Former. `ln_vision` has the epsilon 1e-5, and the
Q-Former's norms 1e-12.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openblip.config import UserError
from openblip.convert.huggingface_names import bert_names
from openblip.convert.lavis_towers import CLIP_L, EVA, TOWERS, Tower, read_tower
from openblip.convert.lavis_towers import LAYOUTS as ALONE
from openblip.convert.layout import COUNTED, Layout, Names, Tensors, shape_of, their_names, under
from openblip.convert.lm import lm_folder, load_lm
from openblip.data.prompts import LmTokenizer
from openblip.models.blip2 import Blip2Config
from openblip.models.blip2_llm import Blip2LlmConfig
from openblip.models.lm import RELEASED_BLIP2, LanguageModel
from openblip.models.qformer import QFormerConfig

_TOWER = "visual_encoder."
_LAYER = "Qformer.bert.encoder.layer."
_WORDS = "Qformer.bert.embeddings.word_embeddings.weight"
_POSITIONS = "Qformer.bert.embeddings.position_embeddings.weight"
_NOT_READ = "of texts, which the Q-Former of stage 2 does not read"
_NOT_WRITTEN = "of texts that a Q-Former writes, which it does in stage 1 alone"
_CHANNELS = 64  # of a head

_QFORMER: Names = {
    **{name.removeprefix("embeddings."): theirs for name, theirs in bert_names("Qformer.bert.").items()},
    "query_tokens": "query_tokens",
    "layers.{}.query_feed_forward.mlp.fc1": f"{_LAYER}{{}}.intermediate_query.dense",
    "layers.{}.query_feed_forward.mlp.fc2": f"{_LAYER}{{}}.output_query.dense",
    "layers.{}.query_feed_forward.residual.norm": f"{_LAYER}{{}}.output_query.LayerNorm",
}
_HEADS: Names = {
    "vision_proj": "vision_proj",
    "text_proj": "text_proj",
    "itm_head": "itm_head",
    "temperature": "temp",
    "lm_head.dense": "Qformer.cls.predictions.transform.dense",
    "lm_head.norm": "Qformer.cls.predictions.transform.LayerNorm",
    "lm_head.bias": "Qformer.cls.predictions.bias",
}
_TIED = (
    (_WORDS, "Qformer.cls.predictions.decoder.weight"),
    ("Qformer.cls.predictions.bias", "Qformer.cls.predictions.decoder.bias"),
)


@dataclass(frozen=True)
class _Language:
    """A family that a projection leads to: how its texts are written, and which one has which width."""

    model_type: str
    family: str
    known: Mapping[int, str]


_LANGUAGES = {
    "opt_proj": _Language("opt", "opt", {2560: "facebook/opt-2.7b", 4096: "facebook/opt-6.7b"}),
    "t5_proj": _Language("t5", "t5", {2048: "google/flan-t5-xl", 4096: "google/flan-t5-xxl"}),
    "llm_proj": _Language("llama", "vicuna", {4096: "Vicuna 7B v1.1", 5120: "Vicuna 13B v1.1"}),
}


@dataclass
class Parts:
    """What was brought in beside a file. config: for its layout; ignored, notes: for its report."""

    lm: LanguageModel | None = None
    ignored: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def config(self) -> dict[str, Any]:
        """In the place of a config.json."""
        return {} if self.lm is None else {"lm": self.lm.config}


def bring_in_(
    tensors: Tensors, where: str, *, vision: str | Path | None = None, lm: str | Path | None = None
) -> Parts:
    """Put the tensors of the tower at `vision` beside those of a file that has none, and load the language model `lm`.

    Raises:
        UserError: the file needs a part that was not given, or does not need one that was; or the part is another one
            than it was trained with.
        WeightsError: the tower's file is not whole.
    """
    parts = Parts()
    if not any(name.startswith(_LAYER) for name in tensors):
        if vision is not None or lm is not None:
            raise UserError(f"{where}: `vision` and `lm` are for LAVIS's files of BLIP-2, and this is none")
        return parts
    keys = tensors.get(f"{_LAYER}0.crossattention.self.key.weight")
    has_tower = any(name.startswith(_TOWER) for name in tensors)
    if has_tower and vision is not None:
        raise UserError(f"{where}: holds an image tower of its own, which was trained; leave `vision` out")
    if not has_tower and keys is not None:
        _bring_tower_(tensors, where, vision, keys.shape[1], parts)
    projection = next((name for name in _LANGUAGES if f"{name}.weight" in tensors), None)
    if projection is None:
        if lm is not None:
            raise UserError(f"{where}: stage 1 of BLIP-2, which has no language model; leave `lm` out")
        return parts
    width = tensors[f"{projection}.weight"].shape[0]
    dtype = tensors[f"{projection}.weight"].dtype
    parts.lm = _language_model(where, lm, _LANGUAGES[projection], width, dtype)
    parts.notes.append(f"lm comes from {lm}")
    return parts


def _bring_tower_(tensors: Tensors, where: str, vision: str | Path | None, width: int, parts: Parts) -> None:
    wanted = CLIP_L if width == 1024 else EVA
    if vision is None:
        raise UserError(
            f"{where}: holds no image tower; give `vision`, the file of {wanted.name} ({wanted.file}), whose tokens "
            f"are {width} wide"
        )
    model, kind, report = read_tower(vision, tensors["query_tokens"].dtype)
    if (found := model.config.hidden_size) != width:
        raise UserError(f"{vision}: the tokens of this tower are {found} wide, and {where} looks at {width}")
    names = kind.names(_TOWER)
    tensors.update({their_names(name, names)[0]: value for name, value in model.state_dict().items()})
    parts.ignored |= {f"{name} of {vision}": why for name, why in report.ignored.items()}
    parts.notes.append(f"vision comes from {vision}")


def _language_model(
    where: str, source: str | Path | None, language: _Language, width: int, dtype: torch.dtype
) -> LanguageModel:
    kind = f"a language model of the type {language.model_type} and the width {width}"
    usual = f", such as {language.known[width]}" if width in language.known else ""
    if source is None:
        raise UserError(
            f"{where}: holds no language model; give `lm`, a folder or a name on the hub of {kind}{usual}"
        )
    words = LmTokenizer.load(
        lm_folder(str(source)), language.family, encoder_decoder=language.model_type == "t5"
    )
    changes = RELEASED_BLIP2.get(language.model_type, {}) | {"eos_token_id": words.end_id}
    found = load_lm(str(source), "bfloat16" if dtype is torch.bfloat16 else "float32", changes=changes)
    if (got := found.config.config["model_type"]) != language.model_type or found.hidden_size != width:
        raise UserError(f"{source}: a {got} of the width {found.hidden_size}; {where} wants {kind}{usual}")
    found.config.family = language.family if language.family != language.model_type else ""
    return found


def _qformer(tensors: Mapping[str, Tensor], *, text: bool) -> QFormerConfig:
    """The geometry of a Q-Former, from its shapes."""
    _, queries, width = shape_of(tensors, "query_tokens")
    layers = [re.match(rf"{re.escape(_LAYER)}(\d+)\.(crossattention)?", name) for name in tensors]
    depth = len({found[1] for found in layers if found})
    looking = sorted({int(found[1]) for found in layers if found and found[2]})
    settings: dict[str, Any] = {}
    if text:
        words = shape_of(tensors, _WORDS)[0]  # [DEC] came behind BERT's, and is the last
        settings = {"vocab_size": words, "dec_token_id": words - 1}
        settings["max_position_embeddings"] = shape_of(tensors, _POSITIONS)[0]
    return QFormerConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=max(width // _CHANNELS, 1),
        intermediate_size=shape_of(tensors, f"{_LAYER}0.intermediate_query.dense.weight")[0],
        num_query_tokens=queries,
        cross_attention_frequency=looking[1] - looking[0] if len(looking) > 1 else depth,
        text=text,
        **settings,
    )


def _blip2(tower: Tower, tensors: Mapping[str, Tensor], *, text: bool, heads: bool) -> Blip2Config:
    return Blip2Config(
        tower.config(tensors, _TOWER, tower.count(tensors, _TOWER)),
        _qformer(tensors, text=text),
        projection_dim=shape_of(tensors, "vision_proj.weight")[0] if heads else 256,
        ln_vision_eps=1e-5,
        encoder=heads,
        decoder=heads,
    )


def _layout(
    tower: Tower, name: str, marks: tuple[str, ...], names: Names, config: Any, **more: Any
) -> Layout:
    return Layout(
        origin="LAVIS", name=f"{name} ({tower.name})", names=names, config=config, images="blip-2",
        marks=(*marks, "query_tokens", "Qformer.bert", f"{_TOWER}{tower.blocks}"),
        align_corners=tower.align_corners,
        prepare_=lambda tensors: tower.join_biases_(tensors, _TOWER, tower.count(tensors, _TOWER)), **more,
    )  # fmt: skip


def _stage1(tower: Tower) -> Layout:
    names = under("vision", tower.names(_TOWER)) | under("qformer", _QFORMER) | {"ln_vision": "ln_vision"}
    return _layout(
        tower, "BLIP-2 stage 1", ("itm_head", "Qformer.cls"), names | _HEADS,
        lambda config, tensors: _blip2(tower, tensors, text=True, heads=True),
        tied=_TIED,
    )  # fmt: skip


def _stage2(tower: Tower, projection: str, *, text: bool) -> Layout:
    """With `text` an InstructBLIP."""
    names = under("vision", tower.names(_TOWER)) | under("qformer", _QFORMER) | {"ln_vision": "ln_vision"}
    marks: tuple[str, ...] = (f"{projection}.weight",)
    ignored = COUNTED | {r"Qformer\.cls\..*": _NOT_WRITTEN}
    if text:
        marks += (_WORDS, f"{_LAYER}0.intermediate")
    else:
        unread = (
            r"embeddings\.(word|position)_embeddings\.weight|encoder\.layer\.\d+\.(intermediate|output)\..*"
        )
        ignored |= {rf"Qformer\.bert\.({unread})": _NOT_READ}

    def settings(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Blip2LlmConfig:
        stage1 = _blip2(tower, tensors, text=text, heads=False)
        return Blip2LlmConfig(config["lm"], stage1, qformer_text=text)

    return _layout(
        tower, f"{'InstructBLIP' if text else 'BLIP-2 stage 2'}, {projection}", marks,
        under("blip2", names) | {"projection": projection}, settings, ignored=ignored,
    )  # fmt: skip


_KINDS: tuple[Callable[[Tower], Layout], ...] = (
    lambda tower: _stage2(tower, "llm_proj", text=True),
    lambda tower: _stage2(tower, "t5_proj", text=True),
    lambda tower: _stage2(tower, "llm_proj", text=False),
    lambda tower: _stage2(tower, "t5_proj", text=False),
    lambda tower: _stage2(tower, "opt_proj", text=False),
    _stage1,
)
LAYOUTS = (*(kind(tower) for tower in TOWERS for kind in _KINDS), *ALONE)
