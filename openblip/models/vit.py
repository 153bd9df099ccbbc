"""VisionTransformer: pixels -> image tokens. BLIP's ViT, CLIP's, DINOv2's and SigLIP's are configs of it.

Shapes: B batch, N tokens (class token first, then patches in raster order), D width, S image side.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openblip.config import ConfigError
from openblip.models.layers import (
    Attention,
    DropPath,
    LayerScale,
    Mlp,
    init_weights,
    recompute_activations_,
)


@dataclass
class VisionConfig:
    """Geometry of a vision transformer; the defaults are BLIP's ViT-B/16 at 224 px (BLIP §3.1).

    class_token: SigLIP has none. Its place, token 0, which the projection heads read, is then taken by the mean of
        the others; and what an image has beyond whole patches is left out, as SigLIP leaves out 6 of 384 pixels.
    output_blocks: numbers of the blocks, 1 the first, whose outputs are the tokens, each normalised, side by side by
        channels, as DINOv2 is probed (Oquab et al. 2024, §7.1): what blocks know differs. None: the last block.
    backbone: any other Hugging Face vision model instead: its own config as a dict with `model_type`.

    Raises ConfigError: sizes that do not fit each other; blocks that are not there, not the last, or a backbone's.
    """

    image_size: int = 224
    patch_size: int = 16
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    drop_path_rate: float = 0.0
    patch_bias: bool = True  # CLIP's patch projection has none
    pre_norm: bool = False  # CLIP normalises the embeddings before the first block
    final_norm: bool = True  # CLIP normalises the pooled token only, outside this module
    layer_scale: float | None = None  # DINOv2: initial gain of each branch
    class_token: bool = True
    output_blocks: tuple[int, ...] | None = None
    backbone: dict[str, Any] | None = None

    @property
    def output_size(self) -> int:
        """Channels of an image token."""
        return self.hidden_size * len(self.output_blocks or (0,))

    @property
    def text(self) -> None:
        """Nothing reads text in a tower: there is no tokenizer to agree with."""
        return None

    def __post_init__(self) -> None:
        if self.backbone is None and self.class_token and self.image_size % self.patch_size:
            raise ConfigError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.output_blocks is not None:
            blocks, depth = list(self.output_blocks), self.num_hidden_layers
            if self.backbone is not None:
                raise ConfigError("output_blocks are of openblip's own transformer, not of a backbone")
            if not blocks or blocks != sorted(set(blocks)) or blocks[0] < 1 or blocks[-1] != depth:
                raise ConfigError(f"output_blocks are rising numbers from 1, the last {depth}, got {blocks}")


def vit_base(image_size: int = 224, **changes: Any) -> VisionConfig:
    """BLIP's ViT-B/16."""
    return VisionConfig(image_size=image_size, **changes)


def vit_large(image_size: int = 224, **changes: Any) -> VisionConfig:
    """BLIP's ViT-L/16; the released code always trains it with drop path 0.1."""
    large: dict[str, Any] = {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    }
    return VisionConfig(image_size=image_size, **large, **{"drop_path_rate": 0.1, **changes})


def eva_vit_g(image_size: int = 224, **changes: Any) -> VisionConfig:
    """EVA-CLIP's ViT-g/14 up to its second last block, which BLIP-2 looks at (BLIP-2 §3.4)."""
    giant: dict[str, Any] = {"patch_size": 14, "hidden_size": 1408, "num_hidden_layers": 39}
    giant |= {"num_attention_heads": 16, "intermediate_size": 6144, "final_norm": False}
    return VisionConfig(image_size, **{**giant, **changes})


def clip_vit_l(image_size: int = 224, **changes: Any) -> VisionConfig:
    """CLIP's ViT-L/14 up to its second last block, likewise."""
    large: dict[str, Any] = {"patch_size": 14, "hidden_size": 1024, "num_hidden_layers": 23}
    large |= {"num_attention_heads": 16, "intermediate_size": 4096, "final_norm": False}
    large |= {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "patch_bias": False, "pre_norm": True}
    return VisionConfig(image_size, **{**large, **changes})


def resize_position_embedding(table: Tensor, grid: tuple[int, int], *, align_corners: bool = False) -> Tensor:
    """Position embeddings for another grid (rows, columns): bicubic, the class row kept as it is.

    table: [1, 1 + n·n, D], or without a class token [1, n·n, D].
    """
    first, side = position_grid(table)
    if (side, side) == grid:
        return table
    patches = table[:, first:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=grid, mode="bicubic", align_corners=align_corners)
    return torch.cat([table[:, :first], patches.flatten(2).transpose(1, 2)], dim=1)


def position_grid(table: Tensor) -> tuple[int, int]:
    """(rows before the patches: 1 of the class token or 0, side n of the grid) of position embeddings.

    n·n + 1 is no square, so the number of rows tells. Raises ValueError: no such table.
    """
    side = math.isqrt(table.shape[1])
    first = table.shape[1] - side * side
    if first > 1:
        raise ValueError(
            f"{table.shape[1]} position embeddings are no square grid, with or without a class token"
        )
    return first, side


class VisionBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VisionConfig, drop_path: float) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        scale = config.layer_scale
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attention = Attention(width, config.num_attention_heads)
        self.scale1 = nn.Identity() if scale is None else LayerScale(width, scale)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, config.intermediate_size, config.hidden_act)
        self.scale2 = nn.Identity() if scale is None else LayerScale(width, scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        x = x + self.drop_path(self.scale1(self.attention(self.norm1(x))[0]))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


class ImageTower(nn.Module):
    """What a tower by itself is used for, under the names that systems have for it."""

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, 3, S, S] -> image_embeds [B, N, D]."""
        return self(pixel_values)

    def image_features(self, image_embeds: Tensor) -> Tensor:
        """image_embeds [B, N, D] -> [B, D]: token 0, L2-normalised."""
        return F.normalize(image_embeds[:, 0], dim=-1)


class VisionTransformer(ImageTower):
    """ViT (Dosovitskiy et al. 2021) with learned positions, and a class token or the mean in its place."""

    class_embedding: Any  # nn.Parameter, or None

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        width, depth = config.hidden_size, config.num_hidden_layers
        grid = config.image_size // config.patch_size
        self.patch_embedding = nn.Conv2d(
            3, width, config.patch_size, config.patch_size, bias=config.patch_bias
        )
        self.class_embedding = nn.Parameter(torch.empty(1, 1, width)) if config.class_token else None
        self.position_embedding = nn.Parameter(torch.empty(1, config.class_token + grid * grid, width))
        self.pre_norm = nn.LayerNorm(width, eps=config.layer_norm_eps) if config.pre_norm else nn.Identity()
        rates = [config.drop_path_rate * block / max(depth - 1, 1) for block in range(depth)]
        self.blocks = nn.ModuleList(VisionBlock(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps) if config.final_norm else nn.Identity()
        self.earlier = (config.output_blocks or ())[:-1]  # blocks before the last whose outputs are wanted
        self.checkpointed = 0  # how many of the last blocks recompute their activations in the backward pass
        self.apply(init_weights)
        if config.class_token:
            nn.init.trunc_normal_(self.class_embedding, std=0.02)
        nn.init.trunc_normal_(self.position_embedding, std=0.02)

    def set_grad_checkpointing(self, blocks: int | bool = True) -> None:
        """Recompute the activations of the last `blocks` blocks (True: all) in the backward pass."""
        self.checkpointed = len(self.blocks) if blocks is True else int(blocks)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, 3, S, S'] -> image_embeds [B, 1 + S·S'/p², D], normalised if `final_norm`.

        With `output_blocks`, D is `output_size`.

        Another size than the configured one resizes the position embeddings. Raises ValueError if a side is
        no multiple of the patch size, unless `class_token` says otherwise.
        """
        patch, has_class = self.config.patch_size, self.config.class_token
        height, width = pixel_values.shape[-2:]
        if has_class and (height % patch or width % patch):
            raise ValueError(f"image of {width} x {height} pixels: both sides must be multiples of {patch}")
        x = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # [B, N - 1, D]
        if has_class:
            x = torch.cat([self.class_embedding.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        x = x + resize_position_embedding(self.position_embedding, (height // patch, width // patch)).to(
            x.dtype
        )
        x = self.pre_norm(x)
        first_checkpointed = len(self.blocks) - self.checkpointed
        earlier = []
        for index, block in enumerate(self.blocks):
            if self.training and index >= first_checkpointed:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
            if index + 1 in self.earlier:
                earlier.append(self.norm(x))
        x = self.norm(x)
        x = torch.cat([*earlier, x], dim=-1) if earlier else x
        return x if has_class else torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)


class HuggingFaceVision(ImageTower):
    """Any vision backbone of transformers, used as it is: tokens [B, N, D] with a summary token first."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        if config.backbone is None:
            raise ConfigError("backbone: name a Hugging Face vision model")
        settings = dict(config.backbone)
        try:
            from transformers import AutoConfig, AutoModel

            backbone = AutoConfig.for_model(settings.pop("model_type", None), **settings)
            self.model = AutoModel.from_config(backbone)
        except ImportError:
            raise ConfigError("vision.backbone needs transformers: pip install 'openblip[hf]'") from None
        except ValueError as error:
            raise ConfigError(f"vision.backbone: {str(error).splitlines()[0]}") from None
        self.config = config
        self.has_class_token = any(
            getattr(module, name, None) is not None
            for module in self.model.modules()
            for name in ("cls_token", "class_embedding")
        )
        width = getattr(backbone, "hidden_size", config.hidden_size)
        if width != config.hidden_size:
            raise ConfigError(f"vision.hidden_size is {config.hidden_size}, but the backbone's is {width}")

    def set_grad_checkpointing(self, blocks: int | bool = True) -> None:
        """Recompute activations in the backward pass (the backbone decides which)."""
        recompute_activations_(self.model, bool(blocks))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, 3, S, S] -> [B, N, D].

        Feature maps [B, D, h, w] become tokens. A backbone without a class token gets the mean of its tokens
        as token 0, since the projection heads read token 0.
        """
        x = self.model(pixel_values=pixel_values).last_hidden_state
        if x.ndim == 4:
            x = x.flatten(2).transpose(1, 2)
        return x if self.has_class_token else torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)


def build_vision(config: VisionConfig) -> VisionTransformer | HuggingFaceVision:
    """The vision tower a config describes, with fresh weights."""
    return VisionTransformer(config) if config.backbone is None else HuggingFaceVision(config)
