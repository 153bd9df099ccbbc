"""transformers' checkpoints <-> ours: one table of names per architecture, one walker for all of them.

    transformers class                    ours                                model_type there
    BlipForConditionalGeneration          Blip without encoder (captioner)    blip
    BlipForImageTextRetrieval             Blip without decoder (ITC + ITM)    blip
    BlipForQuestionAnswering              BlipVqa                             blip
    Blip2ForImageTextRetrieval            Blip2 without decoder (ITC + ITM)   blip-2
    Blip2ForConditionalGeneration         Blip2Llm (and Blip2Model's names)   blip-2
    InstructBlipForConditionalGeneration  Blip2Llm with qformer_text          instructblip
    CLIPModel                             Clip                                clip
    Dinov2Model                           VisionTransformer                   dinov2

Where transformers and the released BLIP code part ways, and what happens here:

- The BLIP text models overwrite the first token only when a caption is generated. Ours always does ([CLS] for
  ITC, [ENC] for ITM and for questions, [DEC] for decoding), as the code did that trained these weights.
- The decoder of `BlipForQuestionAnswering` looks at the padding of the question; ours masks it, so that an
  answer does not depend on what else is in the batch.
- `layer_norm_eps` of the vision tower is 1e-6 in the released code and 1e-5 in transformers; the folder's own
  value is kept, so that a converted model answers as it did.
- The norm behind the vision tower of BLIP-2 is part of the bridge, our `ln_vision`. Its epsilon is 1e-5 in the
  released code, and in transformers that of the tower, 1e-6; the folder's own is kept here too.
- BLIP-2 has no head there for a Q-Former that writes (ITG); what [CLS], [SEP] and [DEC] are is in none of its files.
- The soft prompt stands there in the place of `image_token_index` in the prompt, here always before it.
- T5's output layer is tied by transformers' configuration, whatever it says; with another one in the file it is not.
- The pooled output, normalised twice there, is used by none of these models and does not exist here.
- CLIP's `eos_token_id` 2, a mistake in old files, means "the largest id", which is the end of text.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from openblip.config import UserError
from openblip.convert import huggingface_config as configs
from openblip.convert import huggingface_names as tables
from openblip.convert.huggingface_names import Names
from openblip.convert.weights import (
    LM,
    LoadReport,
    empty_model,
    fill_,
    merge_tied_,
    refuse,
    resize_positions_,
    tied_in,
    tied_names,
)
from openblip.models.blip import Blip
from openblip.models.blip2 import Blip2
from openblip.models.blip2_llm import Blip2Llm
from openblip.models.blip_vqa import BlipVqa
from openblip.models.clip import Clip
from openblip.models.vit import VisionTransformer

_NO_TEMPERATURE = {
    "temperature": (0.07, "transformers keeps no ITC temperature; this is where training starts")
}
_COUNTED = {r".*\.position_ids": "0, 1, 2, … are counted at run time"}
_COMPUTED = _COUNTED | {r"language_model\..*\.rotary_emb\.inv_freq": "computed from the configuration"}
_BLIP2_LLM_PARTS = ("vision_model", "query_tokens", "qformer", "language_projection", "language_model")


@dataclass(frozen=True)
class Layout:
    """One class of transformers: how to know it, and how its configuration and names become ours."""

    name: str
    model_type: str  # in its config.json
    parts: tuple[str, ...]  # names begin with these; what tells it from others of the same model_type
    names: Names
    config: Callable[[Mapping[str, Any]], Any]
    to_config: Callable[[Any], dict[str, Any]]
    is_ours: Callable[[nn.Module], bool]
    tied: tuple[tuple[str, str], ...] = ()
    ignored: Mapping[str, str] = field(default_factory=lambda: _COUNTED)  # pattern of their name -> why
    fresh: Mapping[str, tuple[float, str]] = field(
        default_factory=dict
    )  # our name -> value, why it is not in the file
    old_names: tuple[tuple[str, str], ...] = ()
    leading: Mapping[str, int] = field(
        default_factory=dict
    )  # our name -> leading axes of size 1 that theirs has not


LAYOUTS = (
    Layout(
        "BlipForQuestionAnswering", "blip", ("vision_model", "text_encoder", "text_decoder"),
        tables.BLIP_VISION | tables.BLIP_ENCODER | tables.BLIP_DECODER, configs.vqa, configs.to_blip,
        lambda model: isinstance(model, BlipVqa),
        tied=tables.BLIP_TIED,
    ),
    Layout(
        "BlipForConditionalGeneration", "blip", ("vision_model", "text_decoder"),
        tables.BLIP_VISION | tables.BLIP_DECODER, configs.captioner, configs.to_blip,
        lambda model: isinstance(model, Blip) and not model.config.encoder,
        tied=tables.BLIP_TIED,
    ),
    Layout(
        "BlipForImageTextRetrieval", "blip", ("vision_model", "text_encoder", "itm_head"),
        tables.BLIP_VISION | tables.BLIP_ENCODER | {name: name for name in ("vision_proj", "text_proj", "itm_head")},
        configs.retrieval, configs.to_blip,
        lambda model: isinstance(model, Blip) and not model.config.decoder,
        fresh=_NO_TEMPERATURE,
    ),
    Layout(
        "Blip2ForImageTextRetrieval", "blip-2", ("vision_model", "query_tokens", "embeddings", "qformer", "itm_head"),
        tables.BLIP2_RETRIEVAL, configs.blip2_retrieval, configs.to_blip2_retrieval,
        lambda model: isinstance(model, Blip2) and not model.config.decoder,
        fresh=_NO_TEMPERATURE,
    ),
    Layout(
        "Blip2ForConditionalGeneration", "blip-2", _BLIP2_LLM_PARTS,
        tables.BLIP2_LLM, configs.blip2_llm, configs.to_blip2_llm,
        lambda model: isinstance(model, Blip2Llm) and not model.config.qformer_text,
        ignored=_COMPUTED,
    ),
    Layout(
        "InstructBlipForConditionalGeneration", "instructblip", _BLIP2_LLM_PARTS,
        tables.INSTRUCTBLIP, configs.instructblip, configs.to_blip2_llm,
        lambda model: isinstance(model, Blip2Llm) and model.config.qformer_text,
        ignored=_COMPUTED,
    ),
    Layout(
        "CLIPModel", "clip", ("vision_model", "text_model", "visual_projection"),
        tables.CLIP, configs.clip, configs.to_clip,
        lambda model: isinstance(model, Clip),
        leading={"vision.class_embedding": 2, "vision.position_embedding": 1},
    ),
    Layout(
        "Dinov2Model", "dinov2", ("embeddings", "encoder", "layernorm"),
        tables.DINOV2, configs.dinov2, configs.to_dinov2,
        lambda model: isinstance(model, VisionTransformer),
        ignored={r"embeddings\.mask_token": "stands for hidden patches while DINOv2 itself is trained"},
        old_names=tables.DINOV2_OLD_NAMES,
    ),
)  # fmt: skip


def find_layout(config: Mapping[str, Any], names: Iterable[str], where: str) -> Layout:
    """Which layout a config.json and the names of the tensors beside it have.

    Raises UserError that says what was found and which are known.
    """
    parts = {name.partition(".")[0] for name in names}
    for layout in LAYOUTS:
        if config.get("model_type") == layout.model_type and parts.issuperset(layout.parts):
            return layout
    raise UserError(
        f"{where}: model_type {config.get('model_type')!r} with tensors under {', '.join(sorted(parts))} is "
        f"not known; known are {', '.join(layout.name for layout in LAYOUTS)}, and folders of our own"
    )


def from_huggingface(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str, *, image_size: int | None = None
) -> tuple[Any, LoadReport]:
    """A model of ours, in eval mode, with the weights of a transformers model.

    Args:
        config: its config.json.
        tensors: its state dict.
        where: what to call it in messages.
        image_size: resize the position embeddings for images of this many pixels.

    Raises:
        UserError: a model that is not known here.
        WeightsError: tensors that are missing, not known, of another shape, or tied but different; by name.
    """
    layout = find_layout(config, tensors, where)
    left = {_renamed(name, layout.old_names): value for name, value in tensors.items()}
    model = empty_model(layout.config(config), image_size)
    names_in_lm = [name for name in model.state_dict() if name.startswith(LM)]
    in_lm = {name: _their_names(name, layout.names)[0] for name in names_in_lm}
    groups = tied_in(model, {name: left[theirs] for name, theirs in in_lm.items() if theirs in left})
    tied = [[in_lm[name] for name in names] for names in groups] + [*layout.tied]
    report = LoadReport(where, f"transformers {layout.name}", tied=merge_tied_(left, tied, where))
    owners = {name: owner for owner, *others in groups for name in others}
    state, missing = {}, []
    for name, empty in model.state_dict().items():
        if name in owners:
            continue
        if name in layout.fresh:
            state[name] = torch.tensor(layout.fresh[name][0])
            report.fresh[name] = "set to {}: {}".format(*layout.fresh[name])
            continue
        theirs = _their_names(name, layout.names)
        if absent := [their_name for their_name in theirs if their_name not in left]:
            missing += absent
            continue
        parts = [left.pop(their_name) for their_name in theirs]
        value = parts[0] if len(parts) == 1 else torch.cat(parts)
        state[name] = value[(None,) * (empty.ndim - value.ndim)]
        report.loaded.append(name)
    for pattern, why in layout.ignored.items():
        for name in [name for name in left if re.fullmatch(pattern, name)]:
            report.ignored[name] = why
            del left[name]
    refuse(where, missing=missing, unknown=left.keys())
    state |= {name: state[owner] for name, owner in owners.items()}
    report.interpolated = resize_positions_(state, model.state_dict())
    fill_(model, state, where)
    return model, report


def to_huggingface(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config.json, state dict) that give transformers' own class the weights of `model`, tied ones once.

    Raises UserError for a model transformers has no class for, naming the part that does not fit.
    """
    layout = next((layout for layout in LAYOUTS if layout.is_ours(model)), None)
    if isinstance(model, Blip) and model.config.encoder and model.config.decoder:
        raise UserError(
            "transformers has no BLIP with both halves: convert its halves, without_decoder(model) and so on"
        )
    if isinstance(model, Blip2) and model.config.decoder:
        raise UserError(
            "transformers has no BLIP-2 whose Q-Former writes: convert blip2.without_decoder(model)"
        )
    if isinstance(model, Blip2Llm) and (model.config.blip2.encoder or model.config.blip2.decoder):
        raise UserError(
            "transformers has no BLIP-2 with both stages: convert blip2_llm.without_stage1(model)"
        )
    if layout is None:
        raise UserError(f"transformers has no class for a {type(model).__name__}")
    if isinstance(model, BlipVqa) and model.config.vision.hidden_size != model.config.text.hidden_size:
        raise UserError(f"{layout.name} of transformers needs images and texts of one width")
    config = layout.to_config(model.config)
    mine, theirs = model.state_dict(), empty_model(layout.config(config)).state_dict()
    if odd := sorted(mine.keys() ^ theirs.keys()):
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise UserError(f"{layout.name} of transformers is built differently: {', '.join(odd[:3])}{more}")
    state: dict[str, Tensor] = {}
    once = {name for _, *others in tied_names(model) for name in others}
    for name, value in mine.items():
        if name in layout.fresh or name in once:
            continue
        names = _their_names(name, layout.names)
        value = value.reshape(value.shape[layout.leading.get(name, 0) :])
        parts = value.chunk(len(names)) if len(names) > 1 else (value,)
        state |= {their_name: part.clone() for their_name, part in zip(names, parts)}
    return config | {"architectures": [layout.name]}, state


def _renamed(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        name = name.replace(old, new)
    return name


def _their_names(name: str, names: Names) -> tuple[str, ...]:
    """The tensors of theirs that a tensor of ours is made of, by the table."""
    for ours, theirs in names.items():
        if ours.endswith(".") and name.startswith(ours):
            return (f"{theirs}{name.removeprefix(ours)}",)
    number = re.search(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", name)
    row = name if number is None else name[: number.start()] + "{}" + name[number.end() :]
    module, _, leaf = row.rpartition(".")
    theirs, leaf = (names[row], "") if row in names else (names[module], f".{leaf}")
    theirs = (theirs,) if isinstance(theirs, str) else theirs
    return tuple((part + leaf).format("" if number is None else number.group()) for part in theirs)
