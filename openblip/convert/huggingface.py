"""transformers' checkpoints <-> ours: one table of names per architecture, one walker for all of them.

    transformers class                  ours                                model_type there
    BlipForConditionalGeneration        Blip without encoder (captioner)    blip
    BlipForImageTextRetrieval           Blip without decoder (ITC + ITM)    blip
    BlipForQuestionAnswering            BlipVqa                             blip
    CLIPModel                           Clip                                clip
    Dinov2Model                         VisionTransformer                   dinov2

Where transformers and the released BLIP code part ways, and what happens here:

- The BLIP text models overwrite the first token only when a caption is generated. Ours always does ([CLS] for
  ITC, [ENC] for ITM and for questions, [DEC] for decoding), as the code did that trained these weights.
- The decoder of `BlipForQuestionAnswering` looks at the padding of the question; ours masks it, so that an
  answer does not depend on what else is in the batch.
- `layer_norm_eps` of the vision tower is 1e-6 in the released code and 1e-5 in transformers; the folder's own
  value is kept, so that a converted model answers as it did.
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
from openblip.convert.weights import LoadReport, empty_model, fill_, merge_tied_, refuse, resize_positions_
from openblip.models.blip import Blip
from openblip.models.blip_vqa import BlipVqa
from openblip.models.clip import Clip
from openblip.models.vit import VisionTransformer

# Our module or parameter -> theirs; several of theirs are one of ours, stacked. {} is the number of the layer.
Names = dict[str, str | tuple[str, ...]]


def _vision(prefix: str, qkv: str | tuple[str, ...], out: str) -> Names:
    """The ViT of BLIP and CLIP, and CLIP's text blocks; what differs is how attention is called."""
    layer = f"{prefix}encoder.layers.{{}}."
    heads = tuple(layer + name for name in qkv) if isinstance(qkv, tuple) else layer + qkv
    return {
        "class_embedding": f"{prefix}embeddings.class_embedding",
        "patch_embedding": f"{prefix}embeddings.patch_embedding",
        "position_embedding": f"{prefix}embeddings.position_embedding",
        "blocks.{}.norm1": f"{layer}layer_norm1",
        "blocks.{}.attention.qkv": heads,
        "blocks.{}.attention.out": layer + out,
        "blocks.{}.norm2": f"{layer}layer_norm2",
        "blocks.{}.mlp.fc1": f"{layer}mlp.fc1",
        "blocks.{}.mlp.fc2": f"{layer}mlp.fc2",
    }


def _text(prefix: str) -> Names:
    """BLIP's BERT; these are also the names of the original checkpoints."""
    layer = f"{prefix}encoder.layer.{{}}."
    query, key, value = (f"{layer}attention.self.{name}" for name in ("query", "key", "value"))
    image_query, image_key, image_value = (
        f"{layer}crossattention.self.{n}" for n in ("query", "key", "value")
    )
    return {
        "embeddings.word": f"{prefix}embeddings.word_embeddings",
        "embeddings.position": f"{prefix}embeddings.position_embeddings",
        "embeddings.norm": f"{prefix}embeddings.LayerNorm",
        "layers.{}.self_attention.attention.qkv": (query, key, value),
        "layers.{}.self_attention.attention.out": f"{layer}attention.output.dense",
        "layers.{}.self_attention.residual.norm": f"{layer}attention.output.LayerNorm",
        "layers.{}.cross_attention.attention.q": image_query,
        "layers.{}.cross_attention.attention.kv": (image_key, image_value),
        "layers.{}.cross_attention.attention.out": f"{layer}crossattention.output.dense",
        "layers.{}.cross_attention.residual.norm": f"{layer}crossattention.output.LayerNorm",
        "layers.{}.feed_forward.mlp.fc1": f"{layer}intermediate.dense",
        "layers.{}.feed_forward.mlp.fc2": f"{layer}output.dense",
        "layers.{}.feed_forward.residual.norm": f"{layer}output.LayerNorm",
    }


def _under(ours: str, names: Names) -> Names:
    return {f"{ours}.{name}": theirs for name, theirs in names.items()}


_SPLIT_HEADS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_BLIP_VISION = _under("vision", _vision("vision_model.", "self_attn.qkv", "self_attn.projection")) | {
    "vision.norm": "vision_model.post_layernorm"
}
_BLIP_ENCODER = _under("text_encoder", _text("text_encoder."))
_BLIP_DECODER = _under("text_decoder", _text("text_decoder.bert.")) | {
    "lm_head.dense": "text_decoder.cls.predictions.transform.dense",
    "lm_head.norm": "text_decoder.cls.predictions.transform.LayerNorm",
    "lm_head.bias": "text_decoder.cls.predictions.bias",
}
_BLIP_TIED = (
    ("text_decoder.bert.embeddings.word_embeddings.weight", "text_decoder.cls.predictions.decoder.weight"),
    ("text_decoder.cls.predictions.bias", "text_decoder.cls.predictions.decoder.bias"),
)
_CLIP = (
    _under("vision", _vision("vision_model.", _SPLIT_HEADS, "self_attn.out_proj"))
    | _under("text", _vision("text_model.", _SPLIT_HEADS, "self_attn.out_proj"))
    | {
        "text.word": "text_model.embeddings.token_embedding",
        "text.position": "text_model.embeddings.position_embedding",
        "text.norm": "text_model.final_layer_norm",
        "vision.position_embedding": "vision_model.embeddings.position_embedding.weight",
        "vision.pre_norm": "vision_model.pre_layrnorm",  # sic
        "vision_norm": "vision_model.post_layernorm",
        "vision_proj": "visual_projection",
        "text_proj": "text_projection",
        "logit_scale": "logit_scale",
    }
)
_DINOV2_LAYER = "encoder.layer.{}."
_DINOV2: Names = {
    "class_embedding": "embeddings.cls_token",
    "patch_embedding": "embeddings.patch_embeddings.projection",
    "position_embedding": "embeddings.position_embeddings",
    "blocks.{}.norm1": f"{_DINOV2_LAYER}norm1",
    "blocks.{}.attention.qkv": tuple(
        f"{_DINOV2_LAYER}attention.{name}" for name in ("q_proj", "k_proj", "v_proj")
    ),
    "blocks.{}.attention.out": f"{_DINOV2_LAYER}attention.o_proj",
    "blocks.{}.scale1.gain": f"{_DINOV2_LAYER}layer_scale1.lambda1",
    "blocks.{}.norm2": f"{_DINOV2_LAYER}norm2",
    "blocks.{}.mlp.fc1": f"{_DINOV2_LAYER}mlp.fc1",
    "blocks.{}.mlp.fc2": f"{_DINOV2_LAYER}mlp.fc2",
    "blocks.{}.scale2.gain": f"{_DINOV2_LAYER}layer_scale2.lambda1",
    "norm": "layernorm",
}
_DINOV2_OLD_NAMES = (  # files on disk have the left ones, state dicts of transformers 5 the right ones
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
)
_COUNTED = {r".*\.position_ids": "0, 1, 2, … are counted at run time"}


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
        _BLIP_VISION | _BLIP_ENCODER | _BLIP_DECODER, configs.vqa, configs.to_blip,
        lambda model: isinstance(model, BlipVqa),
        tied=_BLIP_TIED,
    ),
    Layout(
        "BlipForConditionalGeneration", "blip", ("vision_model", "text_decoder"),
        _BLIP_VISION | _BLIP_DECODER, configs.captioner, configs.to_blip,
        lambda model: isinstance(model, Blip) and not model.config.encoder,
        tied=_BLIP_TIED,
    ),
    Layout(
        "BlipForImageTextRetrieval", "blip", ("vision_model", "text_encoder", "itm_head"),
        _BLIP_VISION | _BLIP_ENCODER | {name: name for name in ("vision_proj", "text_proj", "itm_head")},
        configs.retrieval, configs.to_blip,
        lambda model: isinstance(model, Blip) and not model.config.decoder,
        fresh={"temperature": (0.07, "transformers keeps no ITC temperature; this is where training starts")},
    ),
    Layout(
        "CLIPModel", "clip", ("vision_model", "text_model", "visual_projection"),
        _CLIP, configs.clip, configs.to_clip,
        lambda model: isinstance(model, Clip),
        leading={"vision.class_embedding": 2, "vision.position_embedding": 1},
    ),
    Layout(
        "Dinov2Model", "dinov2", ("embeddings", "encoder", "layernorm"),
        _DINOV2, configs.dinov2, configs.to_dinov2,
        lambda model: isinstance(model, VisionTransformer),
        ignored={r"embeddings\.mask_token": "stands for hidden patches while DINOv2 itself is trained"},
        old_names=_DINOV2_OLD_NAMES,
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
    report = LoadReport(where, f"transformers {layout.name}", tied=merge_tied_(left, layout.tied, where))
    model = empty_model(layout.config(config), image_size)
    state, missing = {}, []
    for name, empty in model.state_dict().items():
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
    for name, value in mine.items():
        if name in layout.fresh:
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
    number = re.search(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", name)
    row = name if number is None else name[: number.start()] + "{}" + name[number.end() :]
    module, _, leaf = row.rpartition(".")
    theirs, leaf = (names[row], "") if row in names else (names[module], f".{leaf}")
    theirs = (theirs,) if isinstance(theirs, str) else theirs
    return tuple((part + leaf).format("" if number is None else number.group()) for part in theirs)
