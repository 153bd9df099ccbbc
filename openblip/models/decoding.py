"""Writing with a language model: what it has read is cached, once per image, and shared by the beams behind it.

Shapes: B images, P tokens of a prefix (soft prompt and words), R rows of text (R = B · g, row r belongs to image
r // g), L text tokens, D and H widths of states and embeddings, V vocabulary.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Decoding:
    """A `step(ids, parents)` of `generation`, and what it has cached of prefix and text.

    The prefix (soft prompt and prompt) is run once per image, at the first call. Then its keys and values are
    repeated once for the rows that continue it, and only those of the text are reordered after that: the rows of an
    image have the prefix in common. `start_ids` is what `generation` must be given as the prompt: nothing for a
    decoder-only model, which has the prompt in its prefix, and the start token for a decoder with an encoder.
    """

    def __init__(self, lm: Any, prefix: Tensor, mask: Tensor) -> None:
        """prefix [B, P, H], mask [B, P]: True for what is real, anywhere."""
        self.lm = lm
        self.prefix, self.mask = prefix, mask
        if not lm.is_encoder_decoder:
            self.prefix, self.mask = ordered(prefix, mask, padding="first")
        start = [lm.start_token_id] if lm.is_encoder_decoder else []
        self.start_ids = torch.tensor([start] * len(prefix), dtype=torch.int64, device=prefix.device)
        self.is_padded = not bool(self.mask.all())
        self.pending: Tensor | None = self.prefix  # what is to be run before the next ids
        self.cache: Any = None
        self.encoded: tuple[Tensor, Tensor | None] | None = None
        self.decoded = 0  # tokens of the text in the cache
        self.is_spread = False  # whether the rows of the cache are those of texts, not of images

    def __call__(self, ids: Tensor, parents: Tensor | None) -> Tensor:
        """The step of `generation`: logits [R, V] behind ids [R, L]."""
        return self.lm.logits(self.states(ids, parents)[:, -1])

    @torch.no_grad()
    def states(self, ids: Tensor, parents: Tensor | None) -> Tensor:
        """States [R, L, D] of ids [R, L] (padding last); the first call of a decoder-only model: of its prefix too."""
        if parents is not None:
            self._follow(parents)
        run = self._with_encoder if self.lm.is_encoder_decoder else self._alone
        return run(ids)

    @torch.no_grad()
    def rank(
        self, answer_ids: Tensor, answer_mask: Tensor, *, length_penalty: float = 0.0, chunk: int = 16
    ) -> Tensor:
        """How likely each of C answers is behind each prefix -> [B, C]: log P / length ** length_penalty.

        answer_ids, answer_mask: [C, L] for all prefixes, or [B, C, L]; padding last. The prefix is run once per image,
        then `chunk` answers of each at a time. Raises UserError: no room for the longest answer.
        """
        images = len(self.prefix)
        answer_ids, answer_mask = (x.expand(images, -1, -1) for x in (answer_ids, answer_mask))
        self.require_room(answer_ids.shape[-1])
        first = self.states(self.start_ids, None)[:, -1:]  # [B, 1, D]
        scores = []
        for ids, mask in zip(answer_ids.split(chunk, dim=1), answer_mask.split(chunk, dim=1)):
            rows = torch.arange(images, device=ids.device).repeat_interleave(ids.shape[1])
            labels = ids.masked_fill(mask == 0, -100).flatten(0, 1)  # [R, L]
            states = first[rows]
            if labels.shape[1] > 1:
                behind = self.fork().states(ids.flatten(0, 1)[:, :-1], rows)
                states = torch.cat([states, behind], dim=1)
            wanted = labels != -100
            logits = self.lm.logits(states[wanted])
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            losses = F.cross_entropy(logits, labels[wanted], reduction="none")
            total = losses.new_zeros(labels.shape).masked_scatter(wanted, losses).sum(dim=1)
            scores.append((-total / wanted.sum(dim=1) ** length_penalty).view(images, -1))
        return torch.cat(scores, dim=1)

    def fork(self) -> "Decoding":
        """The same prefix and text so far, to be continued apart from this one."""
        other = copy.copy(self)
        other.cache = copy.deepcopy(self.cache)
        return other

    def rewind(self, tokens: int, then: Tensor) -> None:
        """Keep the first `tokens` of what was run, and run `then` [B, P, H] before the next ids.

        For a conversation that goes on: rows stay as they were, none of them padded. Raises ValueError: beams or
        padding, an encoder, or more tokens than there are.
        """
        if self.is_padded or self.is_spread or self.lm.is_encoder_decoder or self.cache is None:
            raise ValueError(
                "only an unpadded prefix that was run, and continued row by row, can be gone back to"
            )
        excess = self.cache.get_seq_length() - tokens
        if excess < 0:
            raise ValueError(f"{tokens} tokens to keep, and {tokens + excess} were run")
        if excess:
            self.cache.crop(-excess)
        self.pending, self.decoded = then, 0
        self.mask = self.mask.new_ones(len(self.mask), tokens + then.shape[1])

    def require_room(self, new_tokens: int) -> None:
        """Raise a UserError if that many new tokens do not fit behind the prefix."""
        prefix = self.mask.shape[1]
        self.lm.require_room(
            max(prefix, new_tokens + 1) if self.lm.is_encoder_decoder else prefix + new_tokens
        )

    def _alone(self, ids: Tensor) -> Tensor:
        from transformers import DynamicCache

        words = self.lm.embed(ids)
        self.mask = torch.cat([self.mask, torch.ones_like(ids, dtype=torch.bool)], dim=1)
        if self.cache is None:
            self.cache = DynamicCache(config=self.lm.model.config)
        if self.pending is not None:
            words, self.pending = torch.cat([self.pending, words], dim=1), None
        places: dict[str, Tensor] = {}
        if self.is_padded:
            places["attention_mask"] = self.mask.long()
            if self.lm.takes_positions:
                positions = (self.mask.cumsum(dim=1) - 1).clamp(min=0)
                places["position_ids"] = positions[:, -words.shape[1] :]
        self.lm.choose_attention(words)
        out = self.lm.model.base_model(inputs_embeds=words, cache=self.cache, use_cache=True, **places)
        self.decoded += ids.shape[1]
        return out.last_hidden_state

    def _with_encoder(self, ids: Tensor) -> Tensor:
        from transformers import DynamicCache, EncoderDecoderCache

        if self.encoded is None:
            self.encoded = self.lm.encode(self.prefix, self.mask)
            self.cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        states, mask = self.encoded
        out = self.lm.model.get_decoder()(
            input_ids=ids,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            cache=self.cache,
            use_cache=True,
        )
        self.decoded += ids.shape[1]
        return out.last_hidden_state

    def _follow(self, parents: Tensor) -> None:
        """Row r of the cache becomes what row parents[r] was."""
        if not self.is_spread:
            self.is_spread = True
            self.cache.reorder_cache(parents)
            self.mask = self.mask[parents]
            if self.encoded is not None:
                states, mask = self.encoded
                self.encoded = states[parents], None if mask is None else mask[parents]
        elif not torch.equal(parents, torch.arange(len(parents), device=parents.device)):
            # The mask stays: the rows of an image are padded alike, and no text is.
            own = self.cache.self_attention_cache if self.lm.is_encoder_decoder else self.cache
            for layer in own.layers:
                _reorder_text_(layer, parents, self.decoded)


def _reorder_text_(layer: Any, parents: Tensor, decoded: int) -> None:
    """Reorder the keys and values of the last `decoded` tokens; other kinds of state as a whole."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        layer.reorder_cache(parents)
        return
    for kept in (layer.keys, layer.values):
        text = kept[:, :, max(0, kept.shape[2] - decoded) :]
        text.copy_(text[parents])


def ordered(x: Tensor, mask: Tensor, padding: str) -> tuple[Tensor, Tensor]:
    """Rows of x [B, L, H] with their padding (mask False) moved to the front or behind, in order otherwise."""
    if bool(mask.all()):
        return x, mask
    order = mask.int().argsort(dim=1, stable=True, descending=padding == "last")
    return x.gather(1, order[:, :, None].expand_as(x)), mask.gather(1, order)
