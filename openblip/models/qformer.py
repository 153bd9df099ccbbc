"""Q-Former (Li et al. 2023, BLIP-2 §3.1): learned queries that read an image, beside a text they may or may not see.

    queries [Q, D] ─ norm ─┐                                 ┌─ (every second layer) cross-attention ─ query FFN ─► x
                           ├─ self-attention, shared by both ┤        to the image's memory
    text ids ─ embed ──────┘                                 └─ text FFN ─────────────────────────────────────────► y

Self-attention masks (fig. 2 of the paper): ● row may look at column; text columns also need a real token there

            ITC, uni-modal             ITM, bi-directional        ITG, multimodal causal
              q q q  t t t               q q q  t t t               q q q  t t t
          q   ● ● ●  · · ·           q   ● ● ●  ● ● ●           q   ● ● ●  · · ·
          q   ● ● ●  · · ·           q   ● ● ●  ● ● ●           q   ● ● ●  · · ·
          t   · · ·  ● ● ●           t   ● ● ●  ● ● ●           t   ● ● ●  ● · ·
          t   · · ·  ● ● ●           t   ● ● ●  ● ● ●           t   ● ● ●  ● ● ·
          t   · · ·  ● ● ●           t   ● ● ●  ● ● ●           t   ● ● ●  ● ● ●

    computed by `encode_queries`      `encode_both`             `encode_queries`, whose keys and values
           and `encode_text`                                     `decode` then looks at

In ITG the queries do not see the text, so their pass is that of ITC, and one serves both.

Shapes: B images, N image tokens, Q queries, R rows of text (R = B · g, row r belongs to image r // g, unless
`memory.rows` says otherwise), L text tokens, D width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openblip.config import ConfigError, UserError
from openblip.models.layers import KeyValue, init_weights
from openblip.models.memory import Memory
from openblip.models.text import (
    Cache,
    CrossAttentionBlock,
    FeedForwardBlock,
    SelfAttentionBlock,
    TextConfig,
    TextTransformer,
    extend_mask_,
    self_mask,
)


@dataclass
class QFormerConfig(TextConfig):
    """A BERT (the defaults are bert-base-uncased with one more word, [DEC]) with queries.

    cross_attention_frequency: queries look at the image in layers 0, f, 2f, ...
    text: False leaves out what only text needs; stage 2 uses the query path alone.
    freeze_words: keep the word embeddings as they came, so that a trained model is shipped without them.
    """

    vocab_size: int = 30523
    num_query_tokens: int = 32
    cross_attention_frequency: int = 2
    text: bool = True
    freeze_words: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_query_tokens < 1 or self.cross_attention_frequency < 1:
            raise ConfigError("num_query_tokens and cross_attention_frequency are 1 or more")


class QFormerLayer(nn.Module):
    """One layer: self-attention over both streams, then each stream's own way."""

    cross_attention: Any  # a CrossAttentionBlock, or None
    feed_forward: Any  # a FeedForwardBlock, or None

    def __init__(self, config: QFormerConfig, encoder_width: int, *, looks_at_image: bool) -> None:
        super().__init__()
        self.self_attention = SelfAttentionBlock(config)
        self.cross_attention = CrossAttentionBlock(config, encoder_width) if looks_at_image else None
        self.query_feed_forward = FeedForwardBlock(config)
        self.feed_forward = FeedForwardBlock(config) if config.text else None

    def forward(
        self,
        x: Tensor,
        queries: int,
        mask: Tensor | None,
        past: KeyValue | None,
        memory: tuple[KeyValue, Tensor | None] | None,
        shares: list[int] | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """x [R, queries + L, D]: the first positions are queries -> x, all keys and values so far."""
        x, seen = self.self_attention(x, mask, past)
        streams = []
        if queries:
            q = x[:, :queries].contiguous()  # of a mere view, torch's linear copies the weights once per row
            if self.cross_attention is not None and memory is not None:
                q = self.cross_attention(q, memory[0], memory[1], None, shares)
            streams.append(self.query_feed_forward(q))
        if x.shape[1] > queries:
            streams.append(self.feed_forward(x[:, queries:].contiguous()))
        return (streams[0] if len(streams) == 1 else torch.cat(streams, dim=1)), seen


class QFormer(nn.Module):
    """The querying transformer. `encoder_width`: width of the image tokens its cross-attention projects."""

    def __init__(self, config: QFormerConfig, encoder_width: int) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, width))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)  # of queries and text embeddings alike
        self.dropout = nn.Dropout(config.dropout)
        if config.text:
            self.word = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
            self.word.weight.requires_grad_(not config.freeze_words)
            self.position = nn.Embedding(config.max_position_embeddings, width)
        self.layers = nn.ModuleList(
            QFormerLayer(config, encoder_width, looks_at_image=number % config.cross_attention_frequency == 0)
            for number in range(config.num_hidden_layers)
        )
        self.checkpointing = False
        self.apply(init_weights)
        nn.init.normal_(self.query_tokens, std=0.02)

    @torch.no_grad()
    def copy_text_(self, text: TextTransformer) -> None:
        """Begin with the weights of a BERT: all it has, and its FFN for the queries too (BLIP-2 §3.1).

        Queries and cross-attention keep the weights they have. Raises ConfigError for another geometry.
        """
        mine, theirs = self.config, text.config
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            if getattr(mine, name) != getattr(theirs, name):
                raise ConfigError(
                    f"this BERT does not fit: its {name} is {getattr(theirs, name)}, not {getattr(mine, name)}"
                )
        self.norm.load_state_dict(text.embeddings.norm.state_dict())
        if mine.text:
            for name in ("word", "position"):
                table, bert = getattr(self, name).weight, getattr(text.embeddings, name).weight
                if len(bert) < len(table):
                    raise ConfigError(f"this BERT has {len(bert)} {name} embeddings, wanted {len(table)}")
                table.copy_(bert[: len(table)])
        layers: list[tuple[Any, Any]] = list(zip(self.layers, text.layers, strict=True))
        for own, layer in layers:
            own.self_attention.load_state_dict(layer.self_attention.state_dict())
            own.query_feed_forward.load_state_dict(layer.feed_forward.state_dict())
            if mine.text:
                own.feed_forward.load_state_dict(layer.feed_forward.state_dict())

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Recompute the activations of every layer in the backward pass."""
        self.checkpointing = enabled

    def memory(self, image_tokens: Tensor, mask: Tensor | None = None) -> Memory:
        """Project image_tokens [B, N, encoder_width] once for every use. mask [B, N], 1 for real tokens."""
        crosses: list[Any] = [layer.cross_attention for layer in self.layers]
        return Memory([None if cross is None else cross.project(image_tokens) for cross in crosses], mask)

    def encode_queries(self, memory: Memory, *, cache: Cache | None = None) -> Tensor:
        """Queries alone -> [B, Q, D], one set per image. A `cache` keeps their keys and values for `decode`."""
        images = len(memory.layers[0][0]) if memory.index is None else len(memory.index)
        return self._run(self._queries(images), self.config.num_query_tokens, None, memory, cache)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Text alone, bidirectional: input_ids [R, L], attention_mask [R, L] -> [R, L, D]."""
        length = input_ids.shape[1]
        mask = self_mask(attention_mask, length, length, causal=False, device=input_ids.device)
        return self._run(self._words(input_ids, 0), 0, mask, None, None)

    def encode_both(self, memory: Memory, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Queries and text that see each other: input_ids [R, L] -> [R, Q + L, D], the queries first."""
        queries = self.config.num_query_tokens
        x = torch.cat([self._queries(len(input_ids)), self._words(input_ids, 0)], dim=1)
        mask = None
        if attention_mask is not None:
            seen = attention_mask.new_ones(len(input_ids), queries)
            mask = torch.cat([seen, attention_mask], dim=1)[:, None, None, :].bool()
        return self._run(x, queries, mask, memory, None)

    def decode(self, input_ids: Tensor, attention_mask: Tensor | None, cache: Cache) -> Tensor:
        """Causal text [R, L] after what `cache` holds, which begins with the queries of R images -> [R, L, D].

        The new tokens join the cache. Raises ValueError past the last position.
        """
        past, length = cache.length, input_ids.shape[1]
        if attention_mask is not None or cache.mask is not None:
            attention_mask = extend_mask_(cache, attention_mask, input_ids)
        mask = self_mask(attention_mask, length, past + length, causal=True, device=input_ids.device)
        x = self._words(input_ids, past - self.config.num_query_tokens)
        return self._run(x, 0, mask, None, cache)

    def _queries(self, rows: int) -> Tensor:
        return self.dropout(self.norm(self.query_tokens).expand(rows, -1, -1))

    def _words(self, input_ids: Tensor, first: int) -> Tensor:
        """Text embeddings [R, L, D] from position `first`; queries have no positions."""
        if not self.config.text:
            raise ValueError("this Q-Former was built without its text part")
        last = first + input_ids.shape[1]
        if last > self.config.max_position_embeddings:
            raise UserError(f"{last} tokens: this model has {self.config.max_position_embeddings} positions")
        positions = torch.arange(first, last, device=input_ids.device)[None]
        return self.dropout(self.norm(self.word(input_ids) + self.position(positions)))

    def _run(
        self, x: Tensor, queries: int, mask: Tensor | None, memory: Memory | None, cache: Cache | None
    ) -> Tensor:
        shares = None
        if memory is not None:
            shares = memory.shares(torch.full((len(x),), queries), packed=False)
        for number, layer in enumerate(self.layers):
            past = cache.layers[number] if cache is not None else None
            seen = None
            if memory is not None and memory.layers[number] is not None:
                seen = memory.layer(number, by_image=memory.counts is not None)
            if self.checkpointing and self.training:
                x, pair = checkpoint(layer, x, queries, mask, past, seen, shares, use_reentrant=False)
            else:
                x, pair = layer(x, queries, mask, past, seen, shares)
            if cache is not None:
                cache.layers[number] = pair
        return x
