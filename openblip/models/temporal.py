"""BLIP-3-Video's temporal encoders (Ryoo et al. 2024, §2): the tokens of all frames of a video to a few of the video.

    "mean"       each of the K tokens, averaged over the frames; M = K
    "attention"  space-time attentional pooling: M learned soft masks over all F · K tokens (TokenLearner)
    "ttm"        grouped token Turing machine: token k of every frame belongs to group k, which keeps G slots of memory

    frame t, token k ─┐                      ┌──────────────────────────────┐
                      ├─ read ─ process ─────┤ write: G soft masks over     ├─► memory of t + 1
    memory k [G, D] ──┘  (transformer,       │ memory, processed, frame's   │   after the last frame:
                          G + 1 tokens)      └──────────────────────────────┘   M soft masks over K · G slots

Shapes: B videos, F frames, K tokens of a frame, D their width, G slots of a group's memory, M tokens of a video.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openblip.config import ConfigError
from openblip.models.vit import VisionBlock, VisionConfig


@dataclass
class TemporalConfig:
    """What a video of F x `frame_tokens` tokens becomes: `num_tokens` (M; 32 and 128 were released).

    kind: "mean", "attention" or "ttm".
    frame_tokens: K, tokens of a frame, the resampler's num_latents.
    memory_slots, num_hidden_layers, num_attention_heads, intermediate_size: of the Turing machine; the last is the
        width of its FFN, None for 4 · hidden_size.

    Raises ConfigError: an impossible number, or "mean" to another number of tokens than a frame has.
    """

    hidden_size: int
    kind: Literal["mean", "attention", "ttm"] = "ttm"
    num_tokens: int = 32
    frame_tokens: int = 128
    memory_slots: int = 4
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    intermediate_size: int | None = None
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_tokens", "frame_tokens", "memory_slots", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.kind == "mean" and self.num_tokens != self.frame_tokens:
            raise ConfigError(
                f'kind "mean" leaves the {self.frame_tokens} tokens of a frame; num_tokens is {self.num_tokens}'
            )
        if self.kind == "ttm" and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )


def build_temporal(config: TemporalConfig) -> nn.Module:
    """The encoder of this kind: a module from [B, F, K, D] to [B, M, D]."""
    if config.kind == "mean":
        return MeanPooling()
    if config.kind == "attention":
        return AttentionPooling(config)
    return GroupedTuringMachine(config)


class SoftMasks(nn.Module):
    """TokenLearner 1.1 (Ryoo et al. 2021, as in TTM): each new token is its own soft mask over the tokens there are."""

    def __init__(self, hidden_size: int, num_tokens: int, eps: float) -> None:
        super().__init__()
        # Without biases: one that is equal for all tokens changes no softmax over them.
        self.norm = nn.LayerNorm(hidden_size, eps=eps)
        self.fc1 = nn.Linear(hidden_size, 2 * num_tokens, bias=False)
        self.fc2 = nn.Linear(2 * num_tokens, num_tokens, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, num_tokens, D]; not the normalised tokens are mixed, but the tokens."""
        masks = self.fc2(F.gelu(self.fc1(self.norm(x)))).softmax(dim=1)
        return masks.transpose(1, 2).to(x.dtype) @ x


class MeanPooling(nn.Module):
    """The mean over the frames; nothing is learned."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, F, K, D] -> [B, K, D]."""
        return x.mean(dim=1)


class AttentionPooling(nn.Module):
    """Soft masks over the tokens of all frames at once, which know of no order."""

    def __init__(self, config: TemporalConfig) -> None:
        super().__init__()
        self.pool = SoftMasks(config.hidden_size, config.num_tokens, config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """[B, F, K, D] -> [B, M, D]."""
        return self.pool(x.flatten(1, 2))


class GroupedTuringMachine(nn.Module):
    """Token Turing machine (Ryoo et al. 2022) with one small memory for each of the K tokens of a frame.

    All groups share the weights; what a memory begins with is learned for each. A read takes all G + 1 tokens: nothing
    has to be left out of so few. Frames are marked with their time (sines and cosines), any number of them.
    """

    def __init__(self, config: TemporalConfig) -> None:
        super().__init__()
        self.config = config
        width, eps = config.hidden_size, config.layer_norm_eps
        block = VisionConfig(
            hidden_size=width,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size or 4 * width,
            layer_norm_eps=eps,
        )
        self.memory = nn.Parameter(torch.randn(config.frame_tokens, config.memory_slots, width))
        self.process = nn.Sequential(*(VisionBlock(block, 0.0) for _ in range(config.num_hidden_layers)))
        self.write = SoftMasks(width, config.memory_slots, eps)
        self.pool = SoftMasks(width, config.num_tokens, eps)

    def forward(self, x: Tensor) -> Tensor:
        """[B, F, K, D] -> [B, M, D]. Raises ValueError: K is not `frame_tokens`."""
        videos, frames, tokens, width = x.shape
        if tokens != self.config.frame_tokens:
            raise ValueError(f"{tokens} tokens per frame, wanted {self.config.frame_tokens} (frame_tokens)")
        x = x + time_embedding(frames, width, x.device).to(x.dtype)[:, None]
        memory = self.memory.to(x.dtype).expand(videos, -1, -1, -1).flatten(0, 1)  # [B · K, G, D]
        for frame in x.unbind(1):
            token = frame.reshape(videos * tokens, 1, width)
            processed = self.process(torch.cat([memory, token], dim=1))
            memory = self.write(torch.cat([memory, processed, token], dim=1))
        return self.pool(memory.reshape(videos, -1, width))


def time_embedding(frames: int, width: int, device: torch.device | None = None) -> Tensor:
    """Sines and cosines of the numbers of the frames, in turn, of growing wave length (Vaswani et al. 2017): [F, D]."""
    rates = 10000.0 ** (-torch.arange(0, width, 2, device=device) / width)
    angles = torch.arange(frames, device=device)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]
