"""Steps for decoding, small enough to be checked by hand: tables of trigrams, and a transformer with a cache."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openblip.models.generation import Generated, Step

PAD, EOS = 1, 2
ENDS = {"eos_token_id": EOS, "pad_token_id": PAD}
SAMPLING = {"do_sample": True, "top_p": 0.95, "max_new_tokens": 10}


def texts(generated: Generated) -> list[list[int]]:
    """The rows without padding."""
    return [row[:length].tolist() for row, length in zip(generated.sequences, generated.lengths)]


def with_history(logits_of: Callable[[Tensor], Tensor]) -> Step:
    """A step without a cache: it keeps every row's tokens, follows `parents`, and recomputes all of them."""
    history: Tensor | None = None

    def step(ids: Tensor, parents: Tensor | None) -> Tensor:
        nonlocal history
        if history is not None:
            history = torch.cat([history if parents is None else history[parents], ids], dim=1)
        else:
            history = ids
        return logits_of(history)

    return step


def trigram(table: Tensor) -> Step:
    """Logits table[a, b] [V] behind the tokens ..., a, b."""
    return with_history(lambda ids: table[ids[:, -2], ids[:, -1]])


class TinyTransformer(nn.Module):
    """A causal transformer with a cache, float64, with an end token likely enough to be met."""

    def __init__(self, vocabulary: int = 23, width: int = 16, layers: int = 2, end_bias: float = 2.0) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(64, width)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.mlp = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary)
        nn.init.normal_(self.head.weight)
        nn.init.constant_(self.head.bias, 0.0)
        with torch.no_grad():
            self.head.bias[EOS] = end_bias
        self.double().eval()

    def forward(self, ids: Tensor, cache: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """ids [R, L] -> logits [R, V] behind the last; `cache` is read and replaced, one (k, v) per layer."""
        past = cache[0][0].shape[1] if cache else 0
        x = self.words(ids) + self.positions(torch.arange(past, past + ids.shape[1]))
        seen = []
        for number, (qkv, mlp) in enumerate(zip(self.qkv, self.mlp)):
            q, k, v = qkv(x).chunk(3, dim=-1)
            if cache:
                k, v = torch.cat([cache[number][0], k], 1), torch.cat([cache[number][1], v], 1)
            seen.append((k, v))
            mask = torch.ones(ids.shape[1], k.shape[1], dtype=torch.bool).tril(past)
            x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + mlp(x).tanh()
        if cache is not None:
            cache[:] = seen
        return self.head(x[:, -1])

    def step(self, follow: bool = True) -> Step:
        """The cached step; without `follow` it expands its cache after the prompt, but never reorders it."""
        cache: list[tuple[Tensor, Tensor]] = []

        def step(ids: Tensor, parents: Tensor | None) -> Tensor:
            if parents is not None and (follow or len(parents) != len(cache[0][0])):
                cache[:] = [(k[parents], v[parents]) for k, v in cache]
            return self(ids, cache)

        return step
