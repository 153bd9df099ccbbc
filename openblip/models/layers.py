"""The bricks every model here is built from: one attention for the whole project, the MLP, drop path.

Shapes: B images, R rows of queries, L query tokens, N memory tokens, D width, H heads, d = D / H.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeyValue = tuple[Tensor, Tensor]  # keys and values, each [B, H, N, d]
_SCORES_AT_ONCE = 2**21  # of plain attention: 4 MB in bfloat16


def quick_gelu(x: Tensor) -> Tensor:
    """x · sigmoid(1.702 x), the activation OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "quick_gelu": quick_gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    dropout: float = 0.0,
    weights: list[Tensor] | None = None,
) -> Tensor:
    """softmax(q kᵀ / √d) v. The one place that chooses the kernel.

    q [B, H, L, d]; k, v [B, H, N, d]; mask broadcastable to [B, H, L, N], True where a query may look. With
    `weights`, the probabilities [B, H, L, N] are appended to that list and stay in the graph (Grad-CAM).

    torch's fused kernel, but for bfloat16 on a CPU: there three plain operations take less time in nearly every
    shape of this project, above all with the backward pass (docs/performance.md; `benchmarks/attention.py` measures),
    if the scores they write and read again stay in the cache: hence a few heads at a time.
    """
    plain = weights is not None or (q.dtype is torch.bfloat16 and q.device.type == "cpu")
    if not plain:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    # torch.bmm and not `@`, which would lay out the transposed keys anew, element by element.
    heads, scale = q.shape[:2], q.shape[-1] ** -0.5
    q, k, v = (q * scale).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    at_once = len(q) if weights is not None else max(1, _SCORES_AT_ONCE // (q.shape[1] * k.shape[1]))
    masks: Iterable[Tensor | None] = repeat(None)
    if mask is not None:
        masks = torch.atleast_2d(mask).expand(*heads, -1, -1).flatten(0, 1).split(at_once)
    looked = []
    for few_q, few_k, few_v, seen in zip(q.split(at_once), k.split(at_once), v.split(at_once), masks):
        scores = torch.bmm(few_q, few_k.transpose(1, 2))
        if seen is not None:
            scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        probabilities = scores.softmax(dim=-1)
        if weights is not None:
            weights.append(probabilities.unflatten(0, heads))
            probabilities = weights[-1].flatten(0, 1)  # Grad-CAM asks for the gradient of what is in the list
        looked.append(torch.bmm(F.dropout(probabilities, dropout).to(v.dtype), few_v))
    return (looked[0] if len(looked) == 1 else torch.cat(looked)).unflatten(0, heads)


@dataclass
class Packing:
    """Texts [R, L] without their padding: their T real tokens laid end to end, those of one image together.

    place [T]: where each token stands in the flattened [R · L].
    """

    rows: int
    length: int
    place: Tensor

    def pack(self, padded: Tensor) -> Tensor:
        """[R, L, ...] -> [T, ...]."""
        return padded.flatten(0, 1).index_select(0, self.place)

    def spread(self, packed: Tensor) -> Tensor:
        """[T, ...] -> [R, L, ...], zeros where there is no token."""
        padded = packed.new_zeros(self.rows * self.length, *packed.shape[1:])
        return padded.index_copy(0, self.place, packed).unflatten(0, (self.rows, self.length))


class Attention(nn.Module):
    """Multi-head attention with its output projection.

    Self-attention (`kv_size=None`) keeps q, k, v in one matrix. Cross-attention projects a memory of width
    `kv_size` once, with `project`, and any number of query rows may then look at it.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, *, kv_size: int | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        if kv_size is None:
            self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        else:
            self.q = nn.Linear(hidden_size, hidden_size)
            self.kv = nn.Linear(kv_size, 2 * hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)

    def project(self, memory: Tensor) -> KeyValue:
        """Keys and values [B, H, N, d] of a memory [B, N, kv_size]. Cross-attention only."""
        pair = self.kv(memory).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        k, v = pair.contiguous().unbind(0)  # once, and not at every look
        return k, v

    def forward(
        self,
        x: Tensor,
        *,
        memory: KeyValue | None = None,
        mask: Tensor | None = None,
        past: KeyValue | None = None,
        weights: list[Tensor] | None = None,
        packing: Packing | None = None,
        shares: list[int] | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """x [R, L, D] -> ([R, L, D], the keys and values that were looked at).

        Self-attention: `past` [R, H, T, d] is put before the new keys and values; `mask` [R|1, 1, L, T + L].
        Cross-attention: `memory` holds B images and R = B · g: row r looks at image r // g. The g rows of an
        image are laid side by side as g · L queries against one memory, so nothing is copied per row. `mask`
        [B, 1, 1, N]. With `shares` (queries of each image, adding up to those of x) images may have different numbers.

        With a `packing`, x is [T, D] and so is what comes back; cross-attention then needs `shares`.
        """
        dropout = self.dropout if self.training else 0.0
        if memory is None:
            qkv = self.qkv(x) if packing is None else packing.spread(self.qkv(x))
            q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            if past is not None:
                k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        elif shares is not None:
            k, v = memory
            q = self.q(x).reshape(1, -1, self.num_heads, k.shape[-1]).transpose(1, 2)  # [1, H, queries, d]
            masks: Iterable[Tensor | None] = repeat(None) if mask is None else mask.split(1)
            parts = zip(q.split(shares, dim=2), k.split(1), v.split(1), masks)
            y = torch.cat([attend(*part, dropout=dropout) for part in parts if part[0].shape[2]], dim=2)
            return self.out(y.transpose(1, 2).reshape(x.shape)), (k, v)
        else:
            k, v = memory
            images = k.shape[0]
            if x.shape[0] % images:
                raise ValueError(
                    f"{x.shape[0]} rows of queries cannot be shared out evenly over {images} images"
                )
            rows = x.reshape(images, -1, x.shape[-1])  # [B, g·L, D]
            q = self.q(rows).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, g·L, d]
        y = attend(q, k, v, mask, dropout=dropout, weights=weights).transpose(1, 2)
        y = y.reshape(x.shape) if packing is None else packing.pack(y.flatten(2))
        return self.out(y), (k, v)


class Mlp(nn.Module):
    """Linear, activation, linear: [..., D] -> [..., D]."""

    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str = "gelu") -> None:
        super().__init__()
        self.act = ACTIVATIONS[hidden_act]
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.fc2(self.act(self.fc1(x)))


class DropPath(nn.Module):
    """Stochastic depth: in training, drops the whole branch of a sample with probability `rate`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] -> [B, ...], kept samples scaled by 1 / (1 - rate)."""
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.rate
        return x * keep.to(x.dtype) / (1 - self.rate)


class LayerScale(nn.Module):
    """A learned gain per channel (DINOv2)."""

    def __init__(self, hidden_size: int, initial: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((hidden_size,), initial))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return x * self.gain


def init_weights(module: nn.Module, std: float = 0.02) -> None:
    """BERT's and ViT's initialisation of one module: N(0, std) for matrices, zero biases, unit norms.

    For `nn.Module.apply`.
    """
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=std)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def recompute_activations_(model: nn.Module, enabled: bool) -> None:
    """Tell a model of transformers to recompute its layers' activations in the backward pass, or not to."""
    # Newer versions call it activation checkpointing, and warn at the name that older ones know.
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    switch: Any = getattr(model, f"{kind}_checkpointing_{'enable' if enabled else 'disable'}")
    switch({"use_reentrant": False}) if enabled else switch()
