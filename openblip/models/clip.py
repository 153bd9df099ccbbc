"""CLIP (Radford et al. 2021): two towers and one contrastive loss. The baseline of the line.

Shapes: B images, R texts, L tokens, D width, P projection width.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openblip.models.layers import Attention, Mlp, init_weights
from openblip.models.vit import VisionConfig, build_vision

MAX_LOGIT_SCALE = math.log(100)


@dataclass
class ClipTextConfig:
    """CLIP's causal text transformer; the defaults are those of ViT-B."""

    vocab_size: int = 49408
    hidden_size: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    hidden_act: str = "quick_gelu"
    max_position_embeddings: int = 77
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407


def clip_vision(image_size: int = 224, patch_size: int = 16, **changes: Any) -> VisionConfig:
    """CLIP's ViT: pre-norm after the embeddings, QuickGELU, no bias in the patch projection."""
    clip = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "patch_bias": False, "pre_norm": True}
    return VisionConfig(image_size, patch_size, final_norm=False, **{**clip, **changes})


@dataclass
class ClipConfig:
    """A CLIP model; the defaults are ViT-B/16."""

    vision: VisionConfig = field(default_factory=clip_vision)
    text: ClipTextConfig = field(default_factory=ClipTextConfig)
    projection_dim: int = 512


class ClipTextBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attention = Attention(width, config.num_attention_heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, config.intermediate_size, config.hidden_act)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[R, L, D] -> [R, L, D]."""
        x = x + self.attention(self.norm1(x), mask=mask)[0]
        return x + self.mlp(self.norm2(x))


class ClipText(nn.Module):
    """Causal text tower, pooled at the first end-of-text token."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.config = config
        self.word = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(ClipTextBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.checkpointing = False
        self.apply(init_weights)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """input_ids [R, L] -> states [R, L, D] after the final norm."""
        length = input_ids.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()[None, None]
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, None, :].bool()
        x = self.word(input_ids) + self.position.weight[:length]
        for block in self.blocks:
            recompute = self.checkpointing and self.training
            x = checkpoint(block, x, mask, use_reentrant=False) if recompute else block(x, mask)
        return self.norm(x)


class Clip(nn.Module):
    """Two towers into one space."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        width = config.vision.output_size
        self.vision = build_vision(config.vision)
        self.vision_norm = nn.LayerNorm(width, eps=config.vision.layer_norm_eps)  # on the class token only
        self.vision_proj = nn.Linear(width, config.projection_dim, bias=False)
        self.text = ClipText(config.text)
        self.text_proj = nn.Linear(config.text.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # a logarithm
        self.vision_proj.apply(init_weights)
        self.text_proj.apply(init_weights)

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Recompute activations of both towers in the backward pass."""
        self.vision.set_grad_checkpointing(enabled)
        self.text.checkpointing = enabled

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, 3, S, S] -> image_embeds [B, N, D], before the final norm of the class token."""
        return self.vision(pixel_values)

    def image_features(self, image_embeds: Tensor) -> Tensor:
        """image_embeds [B, N, D] -> [B, P], L2-normalised."""
        return F.normalize(self.vision_proj(self.vision_norm(image_embeds[:, 0])), dim=-1)

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """input_ids [R, L] -> [R, P], L2-normalised; pooled at the first end-of-text token of each row."""
        states = self.text(input_ids, attention_mask)
        last = (input_ids == self.config.text.eos_token_id).int().argmax(dim=1)
        return F.normalize(self.text_proj(states[torch.arange(len(states)), last]), dim=-1)

    def similarity(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """[B, P], [R, P] -> cosines [B, R]."""
        return image_features @ text_features.T

    def clamped_scale(self) -> Tensor:
        """exp(logit_scale), at most 100: what cosines are multiplied by."""
        return self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
