"""The image towers of BLIP-2 as LAVIS keeps them: in files of their own, and in those of models that trained them.

    eva_vit_g.pth     EVA-CLIP ViT-g/14, 1408 wide, of which 39 blocks are used
    clip_vit_L.pth    CLIP ViT-L/14, 1024 wide, by the names of OpenAI, of which 23 blocks are used

BLIP-2 looks at all tokens before the last block, and no norm follows. The geometry is read from shapes, but for what
they do not tell: EVA has 88 channels a head, CLIP 64.

- EVA's keys have no bias: q_bias, zeros and v_bias are that of the fused projection.
- When tables of positions are resized, LAVIS aligns the corners of CLIP's and not those of EVA's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from openblip.config import UserError
from openblip.convert.files import read_weights
from openblip.convert.layout import Layout, Names, Tensors, model_from_, shape_of
from openblip.convert.towers import timm_names
from openblip.convert.weights import LoadReport, WeightsError
from openblip.models.vit import VisionConfig, VisionTransformer

_USED = {1408: 39, 1024: 23}  # blocks, by width; of a tower we do not know, all but the last
_LAST = "of the last block, which BLIP-2 does not look behind"
_POOLED = "of the one vector that CLIP makes of an image; BLIP-2 looks at all tokens"


def _eva_names(prefix: str) -> Names:
    return {name: theirs for name, theirs in timm_names(prefix).items() if name != "norm"}


def _clip_names(prefix: str) -> Names:
    block = f"{prefix}transformer.resblocks.{{}}."
    return {
        "class_embedding": f"{prefix}class_embedding",
        "position_embedding": f"{prefix}positional_embedding",
        "patch_embedding": f"{prefix}conv1",
        "pre_norm": f"{prefix}ln_pre",
        "blocks.{}.norm1": f"{block}ln_1",
        "blocks.{}.attention.qkv.weight": f"{block}attn.in_proj_weight",
        "blocks.{}.attention.qkv.bias": f"{block}attn.in_proj_bias",
        "blocks.{}.attention.out": f"{block}attn.out_proj",
        "blocks.{}.norm2": f"{block}ln_2",
        "blocks.{}.mlp.fc1": f"{block}mlp.c_fc",
        "blocks.{}.mlp.fc2": f"{block}mlp.c_proj",
    }


def _eva_config(tensors: Mapping[str, Tensor], prefix: str, blocks: int) -> VisionConfig:
    width, _, patch, _ = shape_of(tensors, f"{prefix}patch_embed.proj.weight")
    return VisionConfig(
        image_size=_grid(tensors, f"{prefix}pos_embed") * patch,
        patch_size=patch,
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=max(width // 88, 1),
        intermediate_size=shape_of(tensors, f"{prefix}blocks.0.mlp.fc1.weight")[0],
        final_norm=False,
    )


def _clip_config(tensors: Mapping[str, Tensor], prefix: str, blocks: int) -> VisionConfig:
    width, _, patch, _ = shape_of(tensors, f"{prefix}conv1.weight")
    return VisionConfig(
        image_size=_grid(tensors, f"{prefix}positional_embedding") * patch,
        patch_size=patch,
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=max(width // 64, 1),
        intermediate_size=shape_of(tensors, f"{prefix}transformer.resblocks.0.mlp.c_fc.weight")[0],
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
        patch_bias=False,
        pre_norm=True,
        final_norm=False,
    )


def _grid(tensors: Mapping[str, Tensor], name: str) -> int:
    """How many patches a side a table of positions [..., 1 + n², D] has."""
    patches = shape_of(tensors, name)[-2] - 1
    side = round(patches**0.5)
    if side * side != patches:
        raise WeightsError(f"{name} has {patches} patches, which is no square of them")
    return side


@dataclass(frozen=True)
class Tower:
    """One kind of tower, wherever it stands: functions of the prefix of its names, "" or "visual_encoder."."""

    name: str
    file: str  # as LAVIS calls it
    blocks: str  # the module they are in
    width: str  # a tensor whose first axis is it
    marks: tuple[str, ...]  # of a file with nothing else
    ignored: Mapping[str, str]  # in it
    names: Callable[[str], Names]
    config: Callable[[Mapping[str, Tensor], str, int], VisionConfig]  # tensors, prefix, how many blocks
    align_corners: bool

    def count(self, tensors: Mapping[str, Tensor], prefix: str) -> int:
        """How many blocks there are."""
        start = f"{prefix}{self.blocks}."
        return len({name.removeprefix(start).split(".")[0] for name in tensors if name.startswith(start)})

    def join_biases_(self, tensors: Tensors, prefix: str, blocks: int) -> None:
        """EVA's q_bias, zeros, v_bias, as the bias of one projection."""
        for number in range(blocks):
            start = f"{prefix}{self.blocks}.{number}.attn."
            if f"{start}q_bias" in tensors and f"{start}v_bias" in tensors:
                query, value = (tensors.pop(f"{start}{name}_bias") for name in "qv")
                tensors[f"{start}qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])


# Of a block that is used all of these are taken, so what fits a pattern in the end belongs to one that is not.
_EVA_BLOCK = r"blocks\.\d+\.((norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)|attn\.[qv]_bias)"
_CLIP_BLOCK = (
    r"transformer\.resblocks\.\d+\."
    r"((ln_[12]|attn\.out_proj|mlp\.c_(fc|proj))\.(weight|bias)|attn\.in_proj_(weight|bias))"
)
EVA = Tower(
    name="EVA-CLIP ViT-g", file="eva_vit_g.pth", blocks="blocks", width="patch_embed.proj.weight",
    marks=("cls_token", "pos_embed", "blocks.0.attn.q_bias"),
    ignored={_EVA_BLOCK: _LAST, r"(fc_)?norm\.(weight|bias)|head\.(weight|bias)|mask_token": _POOLED},
    names=_eva_names, config=_eva_config, align_corners=False,
)  # fmt: skip
CLIP_L = Tower(
    name="CLIP ViT-L", file="clip_vit_L.pth", blocks="transformer.resblocks", width="conv1.weight",
    marks=("class_embedding", "conv1", "transformer.resblocks"),
    ignored={_CLIP_BLOCK: _LAST, r"ln_post\.(weight|bias)|proj": _POOLED},
    names=_clip_names, config=_clip_config, align_corners=True,
)  # fmt: skip
TOWERS = (EVA, CLIP_L)


def _alone(tower: Tower) -> Layout:
    """A file of nothing but the tower."""

    def used(tensors: Mapping[str, Tensor]) -> int:
        blocks = tower.count(tensors, "")
        return min(blocks, _USED.get(shape_of(tensors, tower.width)[0], blocks - 1))

    return Layout(
        origin="LAVIS", name=tower.name, marks=tower.marks, names=tower.names(""), images="blip-2",
        config=lambda config, tensors: tower.config(tensors, "", used(tensors)),
        prepare_=lambda tensors: tower.join_biases_(tensors, "", used(tensors)),
        ignored=tower.ignored, align_corners=tower.align_corners,
    )  # fmt: skip


LAYOUTS = tuple(_alone(tower) for tower in TOWERS)


def read_tower(source: str | Path, dtype: torch.dtype | None) -> tuple[VisionTransformer, Tower, LoadReport]:
    """A tower from its file, in `dtype` (None: the file's). Of a whole CLIP by OpenAI's names it is the image tower.

    Raises UserError: no file, or none of these towers. WeightsError: it is not whole.
    """
    place = Path(source).expanduser()
    if not place.is_file():
        raise UserError(f"{place}: no such file of an image tower")
    tensors = read_weights(place, dtype)
    texts = []
    if "visual.conv1.weight" in tensors:
        texts = [name for name in tensors if not name.startswith("visual.")]
        tensors = {
            n.removeprefix("visual."): value for n, value in tensors.items() if n.startswith("visual.")
        }
    for tower, layout in zip(TOWERS, LAYOUTS, strict=True):
        if all(any(f"{name}.".startswith(f"{mark}.") for name in tensors) for mark in tower.marks):
            model, report = model_from_(layout, {}, tensors, str(place))
            report.ignored |= dict.fromkeys(texts, "of CLIP's texts")
            return model, tower, report
    raise UserError(f"{place}: no image tower of BLIP-2: {' or '.join(tower.name for tower in TOWERS)}")
