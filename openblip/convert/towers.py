"""Image towers that come by themselves: those of SigLIP, and the ImageNet ones that BLIP's begin with.

    checkpoint                                        keys
    transformers SiglipVisionModel, SiglipModel       as CLIP's there, without a class token
    transformers ViTModel, and DeiTModel (distilled)  embeddings, encoder.layer, layernorm
    timm VisionTransformer                            cls_token, pos_embed, blocks: DeiT's own .pth files, and timm's

Read only: ours are written by `save_pretrained`, and as DINOv2's by `save_for_transformers`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from openblip.config import UserError
from openblip.convert import huggingface_config as configs
from openblip.convert import huggingface_names as tables
from openblip.convert.layout import COUNTED, Layout, Names, Tensors
from openblip.models.vit import VisionConfig, position_grid

_HEAD_WIDTH = 64  # of every ViT in timm and DeiT; shapes do not tell it
_POOLING = "pools the tokens into one vector of its own"
_CLASSES = "tells the classes it was trained on apart"


def _without_prefix_(prefix: str) -> Any:
    """`prepare_` that takes a prefix off the names that have it, as wrapped models put it there."""

    def prepare_(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(prefix)]:
            tensors[name.removeprefix(prefix)] = tensors.pop(name)

    return prepare_


def _drop_distillation_(tensors: Tensors) -> None:
    """DeiT's second summary token, and its position, which is row 1."""
    _without_prefix_("deit.")(tensors)
    positions = tensors.get("embeddings.position_embeddings")
    if positions is not None and "embeddings.distillation_token" in tensors:
        tensors["embeddings.position_embeddings"] = torch.cat([positions[:, :1], positions[:, 2:]], dim=1)


def timm_names(prefix: str) -> Names:
    """The ViT of timm, which the released code of BLIP and EVA have, too."""
    block = f"{prefix}blocks.{{}}."
    return {
        "class_embedding": f"{prefix}cls_token",
        "position_embedding": f"{prefix}pos_embed",
        "patch_embedding": f"{prefix}patch_embed.proj",
        "blocks.{}.norm1": f"{block}norm1",
        "blocks.{}.attention.qkv": f"{block}attn.qkv",
        "blocks.{}.attention.out": f"{block}attn.proj",
        "blocks.{}.norm2": f"{block}norm2",
        "blocks.{}.mlp.fc1": f"{block}mlp.fc1",
        "blocks.{}.mlp.fc2": f"{block}mlp.fc2",
        "norm": f"{prefix}norm",
    }


def timm_config(tensors: Mapping[str, Tensor]) -> VisionConfig:
    """The geometry of a timm ViT, from its shapes. Raises UserError: positions that are no square grid."""
    positions, patches = tensors["pos_embed"], tensors["patch_embed.proj.weight"]
    try:
        first, side = position_grid(positions)
    except ValueError as error:
        raise UserError(f"pos_embed: {error}") from None
    if first != 1:
        raise UserError(f"pos_embed: {positions.shape[1]} rows, which leave none for the class token")
    width, patch = patches.shape[0], patches.shape[-1]
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    return VisionConfig(
        image_size=side * patch,
        patch_size=patch,
        hidden_size=width,
        num_hidden_layers=len(blocks),
        num_attention_heads=max(width // _HEAD_WIDTH, 1),
        intermediate_size=tensors["blocks.0.mlp.fc1.weight"].shape[0],
    )


def _transformers(
    name: str, model_type: str, marks: tuple[str, ...], wrapper: str, **more: Any
) -> list[Layout]:
    """A class of transformers, by itself and as a part called `wrapper` of another with that model_type."""
    return [
        Layout(
            origin="transformers", name=name, model_type=model_type, images=model_type,
            marks=tuple(f"{prefix}{mark}" for mark in marks), **more,
        )
        for prefix in ("", wrapper)
    ]  # fmt: skip


_SIGLIP: dict[str, Any] = {
    "marks": ("embeddings.patch_embedding", "post_layernorm"),
    "wrapper": "vision_model.",
    "names": tables.siglip_names(""),
    "config": lambda config, tensors: configs.siglip(config),
    "prepare_": _without_prefix_("vision_model."),
    "ignored": {
        **COUNTED,
        r"head\..*": _POOLING,
        r"classifier\..*": _CLASSES,
        r"text_model\..*|logit_(scale|bias)": "of SigLIP's texts; only its image tower is read",
    },
}
_VIT: dict[str, Any] = {
    "marks": ("embeddings.cls_token", "embeddings.patch_embeddings", "layernorm"),
    "names": tables.VIT,
    "config": lambda config, tensors: configs.vit(config),
}
LAYOUTS: tuple[Layout, ...] = (
    *_transformers("SiglipVisionModel", "siglip_vision_model", **_SIGLIP),
    *_transformers("SiglipModel", "siglip", **_SIGLIP),
    *_transformers(
        "ViTModel", "vit", wrapper="vit.", prepare_=_without_prefix_("vit."),
        ignored={r"pooler\..*": _POOLING, r"classifier\..*": _CLASSES}, **_VIT,
    ),
    *_transformers(
        "DeiTModel", "deit", wrapper="deit.", prepare_=_drop_distillation_,
        ignored={
            r"pooler\..*": _POOLING, r"(cls_|distillation_)?classifier\..*": _CLASSES,
            r"embeddings\.distillation_token": "a second summary token, with which a teacher's answers were learnt",
        },
        notes=("without its distillation token the tower gives other tokens than DeiT: something to begin with",),
        **_VIT,
    ),
    Layout(
        origin="timm", name="VisionTransformer",
        marks=("cls_token", "pos_embed", "patch_embed.proj", "blocks.0.attn.qkv", "blocks.0.mlp.fc1"),
        names=timm_names(""), config=lambda config, tensors: timm_config(tensors), images="deit",
        ignored={r"head\..*": _CLASSES, r"pre_logits\..*": _CLASSES},
    ),
)  # fmt: skip
