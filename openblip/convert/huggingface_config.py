"""config.json of transformers' models <-> our configurations; most fields have the same name in both."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from openblip.config import UserError, from_dict
from openblip.models.blip import BlipConfig
from openblip.models.blip2 import Blip2Config
from openblip.models.blip2_llm import Blip2LlmConfig
from openblip.models.blip_vqa import BlipVqaConfig
from openblip.models.clip import ClipConfig, ClipTextConfig
from openblip.models.lm import LmConfig
from openblip.models.qformer import QFormerConfig
from openblip.models.text import TextConfig
from openblip.models.vit import VisionConfig

# What transformers assumes for a key that config.json leaves out.
_BLIP_TEXT = {
    "vocab_size": 30524, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 8,
    "intermediate_size": 3072, "hidden_act": "gelu", "max_position_embeddings": 512, "layer_norm_eps": 1e-12,
    "pad_token_id": 0, "sep_token_id": 102, "bos_token_id": 30522, "hidden_dropout_prob": 0.0,
}  # fmt: skip
_VIT = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "gelu"}
_BLIP_VIT = _VIT | {"image_size": 384, "patch_size": 16, "intermediate_size": 3072, "layer_norm_eps": 1e-5}
_CLIP_VIT = _BLIP_VIT | {"image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu"}
_CLIP_TEXT_MODEL = {
    "vocab_size": 49408, "hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8,
    "intermediate_size": 2048, "hidden_act": "quick_gelu", "max_position_embeddings": 77,
    "layer_norm_eps": 1e-5, "eos_token_id": 49407,
}  # fmt: skip
_DINOV2_VIT = _VIT | {
    "image_size": 224, "patch_size": 14, "layer_norm_eps": 1e-6, "mlp_ratio": 4, "layerscale_value": 1.0,
}  # fmt: skip
_SIGLIP_VIT = _BLIP_VIT | {"image_size": 224, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_IMAGENET_VIT = _BLIP_VIT | {"image_size": 224, "layer_norm_eps": 1e-12}
_EVA_VIT = {
    "hidden_size": 1408, "num_hidden_layers": 39, "num_attention_heads": 16, "intermediate_size": 6144,
    "hidden_act": "gelu", "image_size": 224, "patch_size": 14, "layer_norm_eps": 1e-6,
}  # fmt: skip
_QFORMER = {
    "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "hidden_act": "gelu", "max_position_embeddings": 512, "layer_norm_eps": 1e-12,
    "pad_token_id": 0, "cross_attention_frequency": 2, "hidden_dropout_prob": 0.1,
}  # fmt: skip
# Not in their files, but in ours: [CLS] and [SEP] are BERT's, and [DEC] is the word behind BERT's last.
_QFORMER_TOKENS = {"cls_token_id": 101, "sep_token_id": 102, "dec_token_id": 30522}
_FAMILY = "lm_family"  # a key of ours: an InstructBLIP around another llama than Vicuna is not taken for one
_NOT_THE_MODEL = {"transformers_version", "architectures", "dtype", "torch_dtype", "_name_or_path"}
_ACTIVATIONS = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def _read(section: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `defaults`' keys in a section of config.json, the activation by our name."""
    found = {key: section.get(key, default) for key, default in defaults.items()}
    if found["hidden_act"] not in _ACTIVATIONS:
        raise UserError(
            f"config.json: hidden_act {found['hidden_act']!r}; known are {', '.join(_ACTIVATIONS)}"
        )
    found["hidden_act"] = _ACTIVATIONS[found["hidden_act"]]
    for key in {"image_size", "patch_size"} & found.keys():
        found[key] = _side(found[key], key)
    return found


def _side(size: Any, key: str) -> int:
    height, width = size if isinstance(size, list | tuple) else (size, size)
    if height != width:
        raise UserError(f"config.json: {key} {size}: only square ones are supported")
    return height


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    # Files of the first CLIP converter carry `text_config_dict`, which wins where it is given.
    section = config.get(f"{name}_dict") or config.get(name) or {}
    if not isinstance(section, Mapping):
        raise UserError(f"config.json: {name} is no object")
    return section


def _blip_parts(config: Mapping[str, Any]) -> tuple[VisionConfig, TextConfig]:
    text = _read(_section(config, "text_config"), _BLIP_TEXT)
    text["dropout"] = text.pop("hidden_dropout_prob")
    text["dec_token_id"] = text.pop("bos_token_id")
    text["enc_token_id"] = (
        text["dec_token_id"] + 1
    )  # not in the file: BLIP added [DEC] and [ENC], in this order
    vision = _read(_section(config, "vision_config"), _BLIP_VIT)
    return (
        from_dict(VisionConfig, vision, "config.json: vision_config"),
        from_dict(TextConfig, text, "config.json: text_config"),
    )


def captioner(config: Mapping[str, Any]) -> BlipConfig:
    """BlipForConditionalGeneration: no text encoder."""
    vision, text = _blip_parts(config)
    return BlipConfig(vision, text, share=(), encoder=False)


def retrieval(config: Mapping[str, Any]) -> BlipConfig:
    """BlipForImageTextRetrieval: no text decoder."""
    vision, text = _blip_parts(config)
    width = config.get("image_text_hidden_size", 256)
    return BlipConfig(vision, text, projection_dim=width, share=(), decoder=False)


def vqa(config: Mapping[str, Any]) -> BlipVqaConfig:
    """BlipForQuestionAnswering."""
    return BlipVqaConfig(*_blip_parts(config))


def clip(config: Mapping[str, Any]) -> ClipConfig:
    """CLIPModel."""
    text = _read(_section(config, "text_config"), _CLIP_TEXT_MODEL)
    if text["eos_token_id"] == 2:  # a mistake of old files: it means the largest id
        text["eos_token_id"] = text["vocab_size"] - 1
    vision = _read(_section(config, "vision_config"), _CLIP_VIT)
    vision |= {"patch_bias": False, "pre_norm": True, "final_norm": False}
    return ClipConfig(
        from_dict(VisionConfig, vision, "config.json: vision_config"),
        from_dict(ClipTextConfig, text, "config.json: text_config"),
        config.get("projection_dim", 512),
    )


def dinov2(config: Mapping[str, Any]) -> VisionConfig:
    """Dinov2Model."""
    if config.get("use_swiglu_ffn"):
        raise UserError("config.json: use_swiglu_ffn (DINOv2 giant) is not supported")
    found = _read(config, _DINOV2_VIT)
    found["intermediate_size"] = found["hidden_size"] * found.pop("mlp_ratio")
    found["layer_scale"] = found.pop("layerscale_value")
    return from_dict(VisionConfig, found, "config.json")


def siglip(config: Mapping[str, Any]) -> VisionConfig:
    """SiglipVisionModel, or the image tower of a SiglipModel."""
    section = _section(config, "vision_config") if config.get("model_type") == "siglip" else config
    found = _read(section, _SIGLIP_VIT) | {"class_token": False}
    return from_dict(VisionConfig, found, "config.json")


def vit(config: Mapping[str, Any]) -> VisionConfig:
    """ViTModel and DeiTModel."""
    if not config.get("qkv_bias", True):
        raise UserError("config.json: qkv_bias false is not supported")
    return from_dict(VisionConfig, _read(config, _IMAGENET_VIT), "config.json")


def blip2_retrieval(config: Mapping[str, Any]) -> Blip2Config:
    """Blip2ForImageTextRetrieval: no head that writes."""
    vision, qformer = _blip2_parts(config)
    return Blip2Config(
        vision,
        qformer,
        projection_dim=config.get("image_text_hidden_size", 256),
        ln_vision_eps=vision.layer_norm_eps,
        decoder=False,
    )


def blip2_llm(config: Mapping[str, Any]) -> Blip2LlmConfig:
    """Blip2ForConditionalGeneration, Blip2Model: the Q-Former's query path and a language model."""
    return Blip2LlmConfig(_lm(config), _headless(*_blip2_parts(config, text=False)))


def instructblip(config: Mapping[str, Any]) -> Blip2LlmConfig:
    """InstructBlipForConditionalGeneration: the Q-Former reads the instruction too."""
    lm = _lm(config)
    if lm.config["model_type"] == "llama":  # the only one it was released with, whose tokenizer was changed
        lm.family = config.get(_FAMILY, "vicuna")
    return Blip2LlmConfig(lm, _headless(*_blip2_parts(config)), qformer_text=True)


def _headless(vision: VisionConfig, qformer: QFormerConfig) -> Blip2Config:
    eps = vision.layer_norm_eps
    return Blip2Config(vision, qformer, ln_vision_eps=eps, encoder=False, decoder=False)


def _lm(config: Mapping[str, Any]) -> LmConfig:
    text = {"model_type": "opt"} | dict(_section(config, "text_config"))
    found = {key: value for key, value in text.items() if key not in _NOT_THE_MODEL}
    if config.get("image_token_index") is not None:
        found["image_token_index"] = config["image_token_index"]
    return LmConfig(found)


def _blip2_parts(config: Mapping[str, Any], *, text: bool = True) -> tuple[VisionConfig, QFormerConfig]:
    section = _section(config, "vision_config")
    if not section.get("qkv_bias", True):
        raise UserError("config.json: vision_config: qkv_bias false is not supported")
    vision = _read(section, _EVA_VIT) | {"final_norm": False}
    section = _section(config, "qformer_config")
    qformer = _read(section, _QFORMER) | {"text": text}
    qformer["dropout"] = qformer.pop("hidden_dropout_prob")
    qformer["num_query_tokens"] = config.get("num_query_tokens", 32)
    qformer |= {key: section.get(key, token) for key, token in _QFORMER_TOKENS.items()}
    qformer["dec_token_id"] = min(qformer["dec_token_id"], qformer["vocab_size"] - 1)
    return (
        from_dict(VisionConfig, vision, "config.json: vision_config"),
        from_dict(QFormerConfig, qformer, "config.json: qformer_config"),
    )


def to_blip(config: BlipConfig | BlipVqaConfig) -> dict[str, Any]:
    """config.json of a BLIP captioner, retrieval or VQA model."""
    text = {
        key: getattr(config.text, key) for key in _BLIP_TEXT.keys() - {"bos_token_id", "hidden_dropout_prob"}
    }
    text |= {"bos_token_id": config.text.dec_token_id, "eos_token_id": config.text.sep_token_id}
    text |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), config.text.dropout)
    vision = {key: getattr(config.vision, key) for key in _BLIP_VIT}
    parts = {"text_config": _their_act(text), "vision_config": _their_act(vision), "model_type": "blip"}
    return parts | {"image_text_hidden_size": getattr(config, "projection_dim", 256)}


def to_blip2_retrieval(config: Blip2Config) -> dict[str, Any]:
    """config.json of a Blip2ForImageTextRetrieval."""
    return _to_blip2_parts(config, "blip-2") | {"image_text_hidden_size": config.projection_dim}


def to_blip2_llm(config: Blip2LlmConfig) -> dict[str, Any]:
    """config.json of a Blip2ForConditionalGeneration or, with `qformer_text`, InstructBlipForConditionalGeneration.

    There the soft prompt stands where the prompt has the token `image_token_index`; it is the one the model came
    with, or the last of the vocabulary.
    """
    from transformers import AutoConfig

    if config.query_projections:
        raise UserError(
            "transformers has one projection for all queries, and this model has one for each: query_projections"
        )
    if config.first_token_id is not None:
        raise UserError(
            f"transformers has no token before the soft prompt, and this model was trained with one: first_token_id is "
            f"{config.first_token_id}"
        )
    text = dict(config.lm.config)
    token = text.pop("image_token_index", None)
    if token is None:
        token = AutoConfig.for_model(**text).vocab_size - 1
    parts = _to_blip2_parts(config.blip2, "instructblip" if config.qformer_text else "blip-2")
    return parts | {"text_config": text, "image_token_index": token, _FAMILY: config.lm.family}


def one_epsilon(config: Any) -> Any:
    """A BLIP-2's configuration with the epsilon of the tower for the norm behind it too, as transformers has it."""
    if isinstance(config, Blip2LlmConfig):
        return replace(config, blip2=one_epsilon(config.blip2))
    if isinstance(config, Blip2Config):
        return replace(config, ln_vision_eps=config.vision.layer_norm_eps)
    return config


def _to_blip2_parts(config: Blip2Config, model_type: str) -> dict[str, Any]:
    if config.ln_vision_eps != config.vision.layer_norm_eps:
        raise UserError(
            f"transformers has one epsilon for all norms of the image: ln_vision_eps is {config.ln_vision_eps}, "
            f"vision.layer_norm_eps {config.vision.layer_norm_eps} (transformers' own conversion of the released "
            "models took the tower's for both; `approximate` does so too)"
        )
    vision = {key: getattr(config.vision, key) for key in _EVA_VIT}
    kept = (*(_QFORMER.keys() - {"hidden_dropout_prob"}), *_QFORMER_TOKENS)
    qformer = {key: getattr(config.qformer, key) for key in kept}
    qformer |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), config.qformer.dropout)
    qformer["encoder_hidden_size"] = config.vision.hidden_size
    if model_type == "blip-2":
        qformer["use_qformer_text_input"] = config.qformer.text
    return {
        "model_type": model_type,
        "vision_config": _their_act(vision) | {"qkv_bias": True},
        "qformer_config": _their_act(qformer),
        "num_query_tokens": config.qformer.num_query_tokens,
    }


def to_clip(config: ClipConfig) -> dict[str, Any]:
    """config.json of a CLIPModel."""
    text = {key: getattr(config.text, key) for key in _CLIP_TEXT_MODEL}
    vision = {key: getattr(config.vision, key) for key in _CLIP_VIT}
    parts = {"text_config": _their_act(text), "vision_config": _their_act(vision), "model_type": "clip"}
    return parts | {"projection_dim": config.projection_dim}


def to_dinov2(config: VisionConfig) -> dict[str, Any]:
    """config.json of a Dinov2Model."""
    same = {key: getattr(config, key) for key in _DINOV2_VIT.keys() - {"mlp_ratio", "layerscale_value"}}
    own = {
        "mlp_ratio": config.intermediate_size // config.hidden_size,
        "layerscale_value": config.layer_scale or 1.0,
    }
    return _their_act(same) | own | {"model_type": "dinov2"}


def _their_act(section: dict[str, Any]) -> dict[str, Any]:
    act = section["hidden_act"]
    return section | {"hidden_act": "gelu_pytorch_tanh" if act == "gelu_tanh" else act}
