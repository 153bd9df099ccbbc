"""TextTransformer: BERT that can look at images. BLIP's text encoder, image-grounded encoder and decoder.

One module, three uses (BLIP §3.1); only the first token, the mask and the memory differ:

    use                      first token   self-attention   memory
    text encoder (ITC)       [CLS]         bidirectional    none
    image-grounded encoder   [ENC]         bidirectional    image tokens     (ITM)
    image-grounded decoder   [DEC]         causal           image tokens     (LM)

Shapes: B images, R rows of text (R = B · g, row r belongs to image r // g), L text tokens, N memory tokens, D
width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openblip.config import ConfigError, UserError
from openblip.models.layers import ACTIVATIONS, Attention, KeyValue, Mlp, Packing, init_weights
from openblip.models.memory import Memory


@dataclass
class TextConfig:
    """Geometry of the text transformer; the defaults are BLIP's, which is bert-base-uncased with two more words."""

    vocab_size: int = 30524
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12
    dropout: float = 0.1
    attention_dropout: float | None = None  # of attention weights; None: as `dropout`
    pad_token_id: int = 0
    cls_token_id: int = 101
    sep_token_id: int = 102  # also the end of a generated text
    dec_token_id: int = 30522
    enc_token_id: int = 30523

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )

    def attention(self, kv_size: int | None = None) -> Attention:
        """An attention of this geometry; with `kv_size`, to a memory of that width."""
        dropout = self.dropout if self.attention_dropout is None else self.attention_dropout
        return Attention(self.hidden_size, self.num_attention_heads, kv_size=kv_size, dropout=dropout)


class Cache:
    """Keys and values of the tokens decoded so far, one pair [R, H, T, d] per layer."""

    def __init__(self, num_layers: int) -> None:
        self.layers: list[KeyValue | None] = [None] * num_layers
        self.mask: Tensor | None = None  # [R, T]

    @property
    def length(self) -> int:
        """How many tokens are cached."""
        return 0 if self.layers[0] is None else self.layers[0][0].shape[2]

    def reorder_(self, parents: Tensor) -> None:
        """Row r continues what row parents[r] was."""
        self.layers = [None if pair is None else (pair[0][parents], pair[1][parents]) for pair in self.layers]
        self.mask = None if self.mask is None else self.mask[parents]

    def first(self, rows: int) -> "Cache":
        """What the first so many rows hold, as a cache of its own."""
        part = Cache(len(self.layers))
        part.layers = [None if pair is None else (pair[0][:rows], pair[1][:rows]) for pair in self.layers]
        part.mask = None if self.mask is None else self.mask[:rows]
        return part


class Residual(nn.Module):
    """BERT's post-norm residual: LayerNorm(x + dropout(branch))."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """[R, L, D], [R, L, D] -> [R, L, D]."""
        return self.norm(x + self.dropout(branch))


class SelfAttentionBlock(nn.Module):
    """Self-attention, its output dense and its LayerNorm: the part that encoder and decoder do not share."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.attention = config.attention()
        self.residual = Residual(config)

    def forward(
        self, x: Tensor, mask: Tensor | None, past: KeyValue | None, packing: Packing | None = None
    ) -> tuple[Tensor, KeyValue]:
        """x [R, L, D] (packed: [T, D]), mask [R, 1, L, T + L] -> x, all keys and values so far."""
        y, seen = self.attention(x, mask=mask, past=past, packing=packing)
        return self.residual(x, y), seen


class CrossAttentionBlock(nn.Module):
    """Cross-attention to a memory of width `encoder_width`, with its output dense and LayerNorm."""

    def __init__(self, config: TextConfig, encoder_width: int) -> None:
        super().__init__()
        self.attention = config.attention(encoder_width)
        self.residual = Residual(config)

    def project(self, memory: Tensor) -> KeyValue:
        """[B, N, encoder_width] -> keys and values [B, H, N, d]."""
        return self.attention.project(memory)

    def forward(
        self,
        x: Tensor,
        memory: KeyValue,
        mask: Tensor | None,
        weights: list[Tensor] | None,
        shares: list[int] | None = None,
    ) -> Tensor:
        """x [R, L, D] or, with `shares`, [..., D] -> the same."""
        return self.residual(
            x, self.attention(x, memory=memory, mask=mask, weights=weights, shares=shares)[0]
        )


class FeedForwardBlock(nn.Module):
    """MLP with its LayerNorm."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.mlp = Mlp(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.residual = Residual(config)

    def forward(self, x: Tensor) -> Tensor:
        """[R, L, D] -> [R, L, D]."""
        return self.residual(x, self.mlp(x))


class TextEmbeddings(nn.Module):
    """Word + position embeddings, LayerNorm, dropout. BLIP has no token types."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """input_ids [R, L], positions [R|1, L] -> [R, L, D]."""
        return self.dropout(self.norm(self.word(input_ids) + self.position(positions)))


CrossBlock = Callable[[int], nn.Module]  # layer number -> a block with `project` and `forward`


class TextLayer(nn.Module):
    """Self-attention, cross-attention (skipped without a memory), feed-forward."""

    cross_attention: Any  # a CrossAttentionBlock, another block like it, or None

    def __init__(self, config: TextConfig, cross_attention: nn.Module | None) -> None:
        super().__init__()
        self.self_attention = SelfAttentionBlock(config)
        self.cross_attention = cross_attention
        self.feed_forward = FeedForwardBlock(config)

    def forward(self, x, mask, past, memory, memory_mask, weights, packing=None, shares=None):
        """x [R, L, D] (packed: [T, D]) -> x, the self-attention keys and values so far."""
        x, seen = self.self_attention(x, mask, past, packing)
        if memory is not None:
            x = self.cross_attention(x, memory, memory_mask, weights, shares)
        return self.feed_forward(x), seen


class TextTransformer(nn.Module):
    """A BERT with optional cross-attention in every layer (BLIP's MED is two of them that share modules).

    `encoder_width`: width of what cross-attention looks at; None builds no cross-attention.
    `cross_block`: builds another cross-attention block for a layer (NLVR2's twin).
    """

    def __init__(
        self, config: TextConfig, encoder_width: int | None = None, *, cross_block: CrossBlock | None = None
    ) -> None:
        super().__init__()
        self.config = config

        def block(number: int) -> nn.Module | None:
            if cross_block is not None:
                return cross_block(number)
            return None if encoder_width is None else CrossAttentionBlock(config, encoder_width)

        self.embeddings = TextEmbeddings(config)
        self.layers = nn.ModuleList(
            TextLayer(config, block(number)) for number in range(config.num_hidden_layers)
        )
        self.checkpointing = False
        self.apply(init_weights)

    def share_(self, other: "TextTransformer", parts: Sequence[str]) -> "TextTransformer":
        """Use `other`'s very modules for the named parts: "embeddings", "self_attention", "cross_attention",
        "feed_forward". Returns self.
        """
        for part in parts:
            if part == "embeddings":
                self.embeddings = other.embeddings
            else:
                for mine, theirs in zip(self.layers, other.layers, strict=True):
                    setattr(mine, part, getattr(theirs, part))
        return self

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Recompute the activations of every layer in the backward pass."""
        self.checkpointing = enabled

    def memory(self, tokens: Tensor, mask: Tensor | None = None) -> Memory:
        """Project tokens [B, N, encoder_width] for every layer, once. mask [B, N], 1 for real tokens."""
        layers: list[Any] = list(self.layers)
        return Memory([layer.cross_attention.project(tokens) for layer in layers], mask)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        memory: Memory | None = None,
        *,
        causal: bool = False,
        cache: Cache | None = None,
        weights: list[Tensor] | None = None,
        packed: bool = False,
    ) -> Tensor:
        """input_ids [R, L], attention_mask [R, L] (1 = real token; None: all) -> states [R, L, D].

        With a `cache`, the ids continue what is cached (and are added to it). With `weights`, every layer's
        cross-attention probabilities [B, H, g·L, N] are appended to that list. With `packed`, padding costs nothing
        where that pays (on a CPU, without cache and weights), and the states there may be zeros. Raises UserError
        past the last position.
        """
        past_length = cache.length if cache is not None else 0
        length = input_ids.shape[1]
        total = past_length + length
        if total > self.config.max_position_embeddings:
            raise UserError(f"{total} tokens: this model has {self.config.max_position_embeddings} positions")
        if cache is not None and (attention_mask is not None or cache.mask is not None):
            attention_mask = extend_mask_(cache, attention_mask, input_ids)
        mask = self_mask(attention_mask, length, total, causal, input_ids.device)
        positions = torch.arange(past_length, total, device=input_ids.device)[None]
        x = self.embeddings(input_ids, positions)
        packing = shares = None
        tokens = torch.full((len(input_ids),), length)
        if (
            packed
            and cache is None
            and weights is None
            and attention_mask is not None
            and x.device.type == "cpu"
        ):
            packing = Packing(len(input_ids), length, attention_mask.flatten().nonzero()[:, 0])
            x, tokens = packing.pack(x), attention_mask.sum(dim=1)
        by_image = memory is not None and memory.counts is not None
        if memory is not None:
            shares = memory.shares(tokens, packed=packing is not None)
        for number, layer in enumerate(self.layers):
            past = cache.layers[number] if cache is not None else None
            seen, seen_mask = (None, None) if memory is None else memory.layer(number, by_image=by_image)
            if self.checkpointing and self.training:
                given = (x, mask, past, seen, seen_mask, weights, packing, shares)
                x, pair = checkpoint(layer, *given, use_reentrant=False)
            else:
                x, pair = layer(x, mask, past, seen, seen_mask, weights, packing, shares)
            if cache is not None:
                cache.layers[number] = pair
        return x if packing is None else packing.spread(x)


def extend_mask_(cache: Cache, new: Tensor | None, input_ids: Tensor) -> Tensor:
    """Append the padding mask of new tokens to the cached one; keeps the result [R, T + L] in the cache."""
    old = cache.mask
    if old is None:
        old = input_ids.new_ones(len(input_ids), cache.length)
    cache.mask = torch.cat([old, torch.ones_like(input_ids) if new is None else new], dim=1)
    return cache.mask


def self_mask(padding: Tensor | None, length: int, total: int, causal: bool, device) -> Tensor | None:
    """True where a query may look: [R|1, 1, L, T + L], or None when it may look everywhere."""
    mask = None if padding is None else padding[:, None, None, :].bool()
    if causal and length > 1:
        triangle = torch.ones(length, total, dtype=torch.bool, device=device).tril(total - length)
        mask = triangle[None, None] if mask is None else mask & triangle
    return mask


class LanguageModelHead(nn.Module):
    """BERT's masked-LM head: dense, GELU, LayerNorm, then the word embeddings (tied) plus a bias."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act = ACTIVATIONS[config.hidden_act]
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.packed: Callable[[Tensor, Tensor, Tensor], Tensor] = F.linear  # or `packed.Packed`
        self.apply(init_weights)

    def forward(self, states: Tensor, word_embeddings: Tensor) -> Tensor:
        """states [..., D], word_embeddings [V, D] -> logits [..., V]."""
        return self.packed(self.norm(self.act(self.dense(states))), word_embeddings, self.bias)


def swap_first_token(input_ids: Tensor, token_id: int) -> Tensor:
    """A copy of input_ids [R, L] whose first token is overwritten (BLIP overwrites, it never inserts)."""
    swapped = input_ids.clone()
    swapped[:, 0] = token_id
    return swapped
