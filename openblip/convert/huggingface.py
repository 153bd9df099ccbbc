"""transformers' checkpoints <-> ours: one table of names per class.

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

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from openblip.config import UserError
from openblip.convert import huggingface_config as configs
from openblip.convert import huggingface_names as tables
from openblip.convert.layout import COUNTED, Layout, Names, Tensors, their_names
from openblip.convert.weights import empty_model, tied_names
from openblip.models.adapters import merged_state, without_adapter
from openblip.models.blip import Blip
from openblip.models.blip2 import Blip2
from openblip.models.blip2_llm import Blip2Llm
from openblip.models.blip_vqa import BlipVqa
from openblip.models.clip import Clip
from openblip.models.lm import LanguageModel
from openblip.models.vit import VisionTransformer

_NO_TEMPERATURE = {
    "temperature": (0.07, "transformers keeps no ITC temperature; this is where training starts")
}
_COMPUTED = COUNTED | {r"language_model\..*\.rotary_emb\.inv_freq": "computed from the configuration"}
_BLIP2_LLM_PARTS = ("vision_model", "query_tokens", "qformer", "language_projection", "language_model")


@dataclass(frozen=True, kw_only=True)
class TransformersLayout(Layout):
    """One class of transformers: a layout that is written, too."""

    to_config: Callable[[Any], dict[str, Any]]
    is_ours: Callable[[nn.Module], bool]
    leading: Mapping[str, int]  # our name -> leading axes of size 1 that theirs has not


def _layout(
    name: str,
    model_type: str,
    marks: tuple[str, ...],
    names: Names,
    from_config: Callable[[Mapping[str, Any]], Any],
    to_config: Callable[[Any], dict[str, Any]],
    is_ours: Callable[[nn.Module], bool],
    *,
    leading: Mapping[str, int] | None = None,
    **more: Any,
) -> TransformersLayout:
    return TransformersLayout(
        origin="transformers", name=name, model_type=model_type, marks=marks, names=names, images=model_type,
        config=lambda config, tensors: from_config(config), to_config=to_config, is_ours=is_ours,
        leading=leading or {}, **more,
    )  # fmt: skip


def _renew_dinov2_(tensors: Tensors) -> None:
    for name in list(tensors):
        new = name
        for old, current in tables.DINOV2_OLD_NAMES:
            new = new.replace(old, current)
        tensors[new] = tensors.pop(name)


LAYOUTS = (
    _layout(
        "BlipForQuestionAnswering", "blip", ("vision_model", "text_encoder", "text_decoder"),
        tables.BLIP_VISION | tables.BLIP_ENCODER | tables.BLIP_DECODER, configs.vqa, configs.to_blip,
        lambda model: isinstance(model, BlipVqa),
        tied=tables.BLIP_TIED,
    ),
    _layout(
        "BlipForConditionalGeneration", "blip", ("vision_model", "text_decoder"),
        tables.BLIP_VISION | tables.BLIP_DECODER, configs.captioner, configs.to_blip,
        lambda model: isinstance(model, Blip) and not model.config.encoder,
        tied=tables.BLIP_TIED,
    ),
    _layout(
        "BlipForImageTextRetrieval", "blip", ("vision_model", "text_encoder", "itm_head"),
        tables.BLIP_VISION | tables.BLIP_ENCODER | {name: name for name in ("vision_proj", "text_proj", "itm_head")},
        configs.retrieval, configs.to_blip,
        lambda model: isinstance(model, Blip) and not model.config.decoder,
        fresh=_NO_TEMPERATURE,
    ),
    _layout(
        "Blip2ForImageTextRetrieval", "blip-2", ("vision_model", "query_tokens", "embeddings", "qformer", "itm_head"),
        tables.BLIP2_RETRIEVAL, configs.blip2_retrieval, configs.to_blip2_retrieval,
        lambda model: isinstance(model, Blip2) and not model.config.decoder,
        fresh=_NO_TEMPERATURE,
    ),
    _layout(
        "Blip2ForConditionalGeneration", "blip-2", _BLIP2_LLM_PARTS,
        tables.BLIP2_LLM, configs.blip2_llm, configs.to_blip2_llm,
        lambda model: isinstance(model, Blip2Llm) and not model.config.qformer_text,
        ignored=_COMPUTED,
    ),
    _layout(
        "InstructBlipForConditionalGeneration", "instructblip", _BLIP2_LLM_PARTS,
        tables.INSTRUCTBLIP, configs.instructblip, configs.to_blip2_llm,
        lambda model: isinstance(model, Blip2Llm) and model.config.qformer_text,
        ignored=_COMPUTED,
    ),
    _layout(
        "CLIPModel", "clip", ("vision_model", "text_model", "visual_projection"),
        tables.CLIP, configs.clip, configs.to_clip,
        lambda model: isinstance(model, Clip),
        leading={"vision.class_embedding": 2, "vision.position_embedding": 1},
    ),
    _layout(
        "Dinov2Model", "dinov2", ("embeddings", "encoder", "layernorm"),
        tables.DINOV2, configs.dinov2, configs.to_dinov2,
        lambda model: isinstance(model, VisionTransformer),
        ignored={r"embeddings\.mask_token": "stands for hidden patches while DINOv2 itself is trained"},
        prepare_=_renew_dinov2_,
    ),
)  # fmt: skip


def to_huggingface(model: nn.Module, config: Any = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config.json, state dict) that give transformers' own class the weights of `model`, tied ones once.

    LoRA adapters are added to the weights below them. config: instead of the model's own, see
    `huggingface_config.one_epsilon`.

    Raises UserError for a model transformers has no class for, naming the part that does not fit.
    """
    layout = next((layout for layout in LAYOUTS if layout.is_ours(model)), None)
    if isinstance(model, Blip) and model.config.encoder and model.config.decoder:
        raise UserError(
            "transformers has no BLIP with both halves: convert its halves, without_decoder(model) and so on "
            "(openblip convert: --half caption or --half retrieval)"
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
    for module in model.modules():
        if isinstance(module, VisionTransformer) and module.config.output_blocks is not None:
            raise UserError(
                f"{layout.name} of transformers reads one block of its image tower, not output_blocks"
            )
    if isinstance(model, BlipVqa) and model.config.vision.hidden_size != model.config.text.hidden_size:
        raise UserError(f"{layout.name} of transformers needs images and texts of one width")
    if isinstance(model, Blip2Llm):
        _check_language_model(layout.name, model.lm)
    config = layout.to_config(model.config if config is None else config)
    mine = merged_state(model)
    theirs = empty_model(layout.config(config, {})).state_dict()
    if odd := sorted(mine.keys() ^ theirs.keys()):
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise UserError(f"{layout.name} of transformers is built differently: {', '.join(odd[:3])}{more}")
    state: dict[str, Tensor] = {}
    once = {without_adapter(name) for _, *others in tied_names(model) for name in others}
    for name, value in mine.items():
        if name in layout.fresh or name in once:
            continue
        names = their_names(name, layout.names)
        value = value.reshape(value.shape[layout.leading.get(name, 0) :])
        parts = value.chunk(len(names)) if len(names) > 1 else (value,)
        state |= {their_name: part.clone() for their_name, part in zip(names, parts)}
    return config | {"architectures": [layout.name]}, state


def _check_language_model(name: str, lm: LanguageModel) -> None:
    """Raises UserError: one that a class of transformers would build or feed in another way."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    settings = lm.model.config
    if lm.is_encoder_decoder and settings.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(f"{name} of transformers takes a {settings.model_type} for a decoder without encoder")
    if lm.hidden_size != settings.hidden_size:
        raise UserError(
            f"{name} of transformers projects to the language model's hidden_size, {settings.hidden_size}, and its "
            f"words have {lm.hidden_size}"
        )
