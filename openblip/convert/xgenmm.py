"""xGen-MM (BLIP-3 v1.5): its training checkpoints and its folders on the hub -> Blip3.

    vision_encoder.*        SigLIP's image tower                 vision.*
    vision_tokenizer.*      perceiver resampler                  resampler.*
    lang_model.*            Phi-3, and three rows of its own     lm.*

A training checkpoint has these names, and a folder the same below `vlm.`, with a config.json. Shapes tell the
geometry but for the number of heads, which is that of the released model, as is all of Phi-3-mini that a folder's
config.json does not say. What the resampler reads at a time is a strip of the canvas (`Blip3Config.tile_grouping`).
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from openblip.config import UserError
from openblip.convert.huggingface_names import siglip_names
from openblip.convert.layout import COUNTED, Layout, Names, Tensors, under
from openblip.data.tiles import XGENMM_GRIDS
from openblip.models.blip3 import ADDED_TOKENS, Blip3Config
from openblip.models.lm import LmConfig
from openblip.models.resampler import ResamplerConfig
from openblip.models.vit import VisionConfig

_WORDS = 32012  # of Phi-3's tokenizer with <pad>; rows of the vocabulary from here on are out of use
_VISION_HEADS = _RESAMPLER_HEADS = 16
_IMAGE_SIZE = 384  # 27 patches of 14 across, and 6 pixels over
_PHI3: dict[str, Any] = {
    "model_type": "phi3", "num_attention_heads": 32, "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 2047,
    "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 32000, "pad_token_id": 32000,
}  # fmt: skip
_PHI3_KEYS = {
    *_PHI3,
    "rope_scaling",
    "partial_rotary_factor",
    "initializer_range",
}  # what a folder may say of it
_SAMPLER = "vision_tokenizer."
_LAYER = f"{_SAMPLER}layers.{{}}."
_NAMES: Names = (
    under("vision", siglip_names("vision_encoder."))
    | {
        "resampler.latents": f"{_SAMPLER}latents",
        "resampler.norm": f"{_SAMPLER}norm",
        "resampler.projection": f"{_SAMPLER}projection",
        "resampler.layers.{}.norm_media": f"{_LAYER}0.norm_media",
        "resampler.layers.{}.norm_latents": f"{_LAYER}0.norm_latents",
        "resampler.layers.{}.q": f"{_LAYER}0.to_q",
        "resampler.layers.{}.kv": f"{_LAYER}0.to_kv",
        "resampler.layers.{}.out": f"{_LAYER}0.to_out",
        "resampler.layers.{}.norm_ff": f"{_LAYER}1.0",
        "resampler.layers.{}.fc1": f"{_LAYER}1.1",
        "resampler.layers.{}.fc2": f"{_LAYER}1.3",
    }
    | {
        "lm.added_words": "lang_model.model.embed_tokens.additional_embedding",
        "lm.added_head": "lang_model.lm_head.additional_fc",
        "lm.model.": "lang_model.",
    }
)
_IGNORED = COUNTED | {
    r"vision_encoder\.head\..*": "pools SigLIP's tokens into one vector, and the resampler reads the tokens",
    r"lang_model\..*\.rotary_emb\.\w+": "computed from the configuration",
}


def _without_wrapper_(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith(("vlm.", "module."))]:
        tensors[name.partition(".")[2]] = tensors.pop(name)


def _config(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Blip3Config:
    """The geometry. `config` is a folder's config.json, {} of a training checkpoint."""
    vision = _vision(tensors)
    encoder = config.get("vision_encoder_config") or {}
    aspect = encoder.get("image_aspect_ratio", "anyres")
    if aspect != "anyres":
        raise UserError(
            f"config.json: image_aspect_ratio {aspect!r}; only anyres, that of v1.5, is supported"
        )
    per_tile = encoder.get("anyres_patch_sampling", True)
    side = vision.image_size
    grids = [(width // side, height // side) for width, height in encoder.get("anyres_grids") or ()]
    return Blip3Config(
        _language_model(config.get("text_config") or {}, tensors),
        vision,
        _resampler(tensors),
        sampling="anyres" if per_tile else "anyres_fixed_sampling",
        tile_grouping="strip",
        grids=grids or list(XGENMM_GRIDS),
    )


def _vision(tensors: Mapping[str, Tensor]) -> VisionConfig:
    """SigLIP's image tower."""
    if not any(name.startswith("vision_encoder.") for name in tensors):
        raise UserError(
            "no vision_encoder: the released training script saves what it trained, and not the tower; add the tensors "
            "of google/siglip-so400m-patch14-384 (its vision_model.*) as vision_encoder.*"
        )
    width, _, patch, _ = _shape(tensors, "vision_encoder.embeddings.patch_embedding.weight", 4)
    side = round(_shape(tensors, "vision_encoder.embeddings.position_embedding.weight", 2)[0] ** 0.5)
    return VisionConfig(
        image_size=_IMAGE_SIZE if _IMAGE_SIZE // patch == side else side * patch,
        patch_size=patch,
        hidden_size=width,
        num_hidden_layers=_count(tensors, "vision_encoder.encoder.layers."),
        num_attention_heads=_VISION_HEADS,
        intermediate_size=_shape(tensors, "vision_encoder.encoder.layers.0.mlp.fc1.weight", 2)[0],
        hidden_act="gelu_tanh",
        class_token=False,
    )


def _resampler(tensors: Mapping[str, Tensor]) -> ResamplerConfig:
    latents, width = _shape(tensors, f"{_SAMPLER}latents", 2)
    inner = _shape(tensors, f"{_SAMPLER}layers.0.0.to_q.weight", 2)[0]
    return ResamplerConfig(
        hidden_size=width,
        num_latents=latents,
        num_hidden_layers=_count(tensors, f"{_SAMPLER}layers."),
        num_attention_heads=_RESAMPLER_HEADS,
        head_dim=inner // _RESAMPLER_HEADS,
        ff_mult=_shape(tensors, f"{_SAMPLER}layers.0.1.1.weight", 2)[0] // width,
        output_size=_shape(tensors, f"{_SAMPLER}projection.weight", 2)[0],
    )


def _language_model(said: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LmConfig:
    """Phi-3; `said`: text_config of a folder."""
    if said.get("model_type", "phi3") != "phi3":
        raise UserError(f"config.json: text_config: model_type {said['model_type']!r}; v1.5 has phi3")
    settings = _PHI3 | {key: value for key, value in said.items() if key in _PHI3_KEYS and value is not None}
    rows, width = _shape(tensors, "lang_model.model.embed_tokens.weight", 2)
    first, heads = said.get("initial_tokenizer_len", _WORDS), settings["num_attention_heads"]
    if not 0 < first <= rows:
        raise UserError(f"{first} words of the tokenizer, and the language model has {rows}; see text_config")
    if width % heads:
        raise UserError(f"{heads} heads of the language model, and a width of {width}; see text_config")
    projected = _shape(tensors, "lang_model.model.layers.0.self_attn.qkv_proj.weight", 2)[0]
    settings |= {
        "vocab_size": rows,
        "hidden_size": width,
        "num_hidden_layers": _count(tensors, "lang_model.model.layers."),
        "num_key_value_heads": (projected - width) // (2 * width // heads),
        "intermediate_size": _shape(tensors, "lang_model.model.layers.0.mlp.gate_up_proj.weight", 2)[0] // 2,
    }
    return LmConfig(
        settings,
        family="xgenmm",
        added_tokens=len(ADDED_TOKENS),
        first_added_id=None if first == rows else first,
    )


def _shape(tensors: Mapping[str, Tensor], name: str, axes: int) -> tuple[int, ...]:
    """Raises UserError: not there, or with other axes."""
    if name not in tensors or tensors[name].ndim != axes:
        raise UserError(f"{name}: there is no such tensor of {axes} axes, so this is no xGen-MM v1.5")
    return tuple(tensors[name].shape)


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many layers there are below a prefix."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in tensors if name.startswith(prefix)})


def _layout(name: str, model_type: str | None, prefix: str) -> Layout:
    return Layout(
        origin="xGen-MM", name=name, model_type=model_type, names=_NAMES, config=_config, images="xgenmm",
        prepare_=_without_wrapper_, ignored=_IGNORED,
        marks=(f"{prefix}vision_tokenizer.latents", f"{prefix}lang_model"),
    )  # fmt: skip


LAYOUTS = (
    _layout("XGenMMModelForConditionalGeneration", "xgenmm", "vlm."),
    *(_layout("XGenMMPerceiver", None, prefix) for prefix in ("", "module.", "vlm.")),
)
