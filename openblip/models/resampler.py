"""Perceiver resampler (Alayrac et al. 2022, Flamingo §3.1; as released in xGen-MM): any number of tokens to K.

    media [N, D] ─ norm ─┐
                         ├─► keys, values ──┐
    latents [K, D] ─ norm ┴─► queries ─── attention ─ + ─ norm, FFN ─ + ─► latents of the next layer
                                                                           after the last: norm, projection to H

The media are the same in each layer; only the latents change. Without frame embeddings the media have no order.

Shapes: G groups (tiles, strips, images, videos), N media tokens of each, D their width, K latents, F frames, L words of
a condition, C their width, H width of the output.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openblip.config import ConfigError
from openblip.models.layers import attend


@dataclass
class ResamplerConfig:
    """By default xGen-MM's resampler, 109,901,568 parameters. Flamingo's: 8 heads of 64, 64 latents, no output_size.

    head_dim: width of a head; heads together may be wider than hidden_size.
    ff_mult: width of the FFN, as a multiple of hidden_size.
    output_size: H, the width of the language model; None leaves the projection out, and H is D.
    max_frames: learned embeddings of so many points in time, for video (Flamingo); None: the media have no frames.
    condition_size: C, the width of words that may tell what to look for; None: there are none.
    """

    hidden_size: int = 1152
    num_latents: int = 128
    num_hidden_layers: int = 6
    num_attention_heads: int = 16
    head_dim: int = 96
    ff_mult: int = 4
    output_size: int | None = 3072
    max_frames: int | None = None
    condition_size: int | None = None
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value <= 0:
                raise ConfigError(f"{name} must be positive, got {value}")


class ResamplerLayer(nn.Module):
    """Latents look at the media and at each other, then an FFN. No biases but those of the norms."""

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        inner = config.num_attention_heads * config.head_dim
        self.num_heads = config.num_attention_heads
        self.norm_media = nn.LayerNorm(width, eps=eps)
        self.norm_latents = nn.LayerNorm(width, eps=eps)
        self.q = nn.Linear(width, inner, bias=False)
        self.kv = nn.Linear(width, 2 * inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)
        self.norm_ff = nn.LayerNorm(width, eps=eps)
        self.fc1 = nn.Linear(width, config.ff_mult * width, bias=False)
        self.fc2 = nn.Linear(config.ff_mult * width, width, bias=False)

    def forward(self, latents: Tensor, media: Tensor, mask: Tensor | None) -> Tensor:
        """latents [G, K, D], media [G, N, D], mask [G, 1, 1, N + K], True where to look -> [G, K, D]."""
        x = self.norm_latents(latents)
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [G, heads, K, d]
        # Joined before the projection, where a token is still D wide and not 2 · heads · d.
        kv = self.kv(torch.cat([self.norm_media(media), x], dim=1))
        k, v = kv.unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        latents = latents + self.out(attend(q, k, v, mask).transpose(1, 2).flatten(2))
        return latents + self.fc2(F.gelu(self.fc1(self.norm_ff(latents))))


class PerceiverResampler(nn.Module):
    """K learned latents that read media of any number, and of what the condition says, if there is one.

    A condition (BLIP-3's ablation: the text tokens join the latents) is projected to the width of the latents and
    stands behind them as further rows in every layer: its words look at the media, and the latents at the words. What
    becomes of the words is dropped at the end, so the output has K tokens either way.
    """

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        self.config = config
        width, eps = config.hidden_size, config.layer_norm_eps
        self.latents = nn.Parameter(torch.randn(config.num_latents, width))
        if config.max_frames is not None:
            self.frame_embedding = nn.Parameter(torch.randn(config.max_frames, width))
        if config.condition_size is not None:
            self.condition_norm = nn.LayerNorm(config.condition_size, eps=eps)
            self.condition_projection = nn.Linear(config.condition_size, width)
        self.layers = nn.ModuleList(ResamplerLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width, eps=eps)
        self.projection = (
            nn.Identity() if config.output_size is None else nn.Linear(width, config.output_size)
        )
        self.checkpointing = False

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Recompute the activations of every layer in the backward pass."""
        self.checkpointing = enabled

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        condition: Tensor | None = None,
        condition_mask: Tensor | None = None,
    ) -> Tensor:
        """Media [G, N, D], or with `max_frames` [G, F, N, D] -> [G, K, H].

        Args:
            mask: [G, N], or [G, F, N]; True or 1 for real media. A group may have none: its latents see each other.
            condition: [G, L, C], words for each group.
            condition_mask: [G, L], True or 1 for real words.

        Raises ValueError: frames, or a condition, that this resampler was not made for.
        """
        x, mask = self._media(x, mask)
        latents = self.latents.expand(len(x), -1, -1)
        if condition is not None:
            if self.config.condition_size is None:
                raise ValueError("a condition, and this resampler was made without condition_size")
            words = self.condition_projection(self.condition_norm(condition))
            latents = torch.cat([latents, words.to(latents.dtype)], dim=1)
        visible = self._visible(x, latents, mask, condition_mask)
        for layer in self.layers:
            if self.checkpointing and self.training:
                latents = checkpoint(layer, latents, x, visible, use_reentrant=False)
            else:
                latents = layer(latents, x, visible)
        return self.projection(self.norm(latents[:, : self.config.num_latents]))

    def _media(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Media [G, F · N, D] and mask [G, F · N], each frame marked with its time; without frames as they are."""
        most = self.config.max_frames
        if x.ndim != (3 if most is None else 4):
            shape = "[G, N, D] (max_frames is not set)" if most is None else "[G, F, N, D]"
            raise ValueError(f"media of shape {tuple(x.shape)}; this resampler reads {shape}")
        if most is None:
            return x, mask
        if x.shape[1] > most:
            raise ValueError(f"{x.shape[1]} frames; this resampler has {most} (max_frames)")
        x = x + self.frame_embedding[: x.shape[1], None]
        return x.flatten(1, 2), None if mask is None else mask.flatten(1, 2)

    def _visible(
        self, x: Tensor, latents: Tensor, mask: Tensor | None, condition_mask: Tensor | None
    ) -> Tensor | None:
        """The mask [G, 1, 1, N + K + L] of keys: real media, all latents, real words. None: all of them."""
        if mask is None and condition_mask is None:
            return None
        visible = torch.ones(len(x), x.shape[1] + latents.shape[1], dtype=torch.bool, device=x.device)
        if mask is not None:
            visible[:, : x.shape[1]] = mask.bool()
        if condition_mask is not None:
            visible[:, x.shape[1] + self.config.num_latents :] = condition_mask.bool()
        return visible[:, None, None]
