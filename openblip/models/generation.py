"""Greedy, nucleus and beam-search decoding over a `step` that hides the model and its cache.

    step(ids, parents) -> logits [R, V] of the last position

    call        ids         parents
    first       [B, P]      None; the prompts, one row per image, prefilled once
    the others  [R, 1]      [R]: row r continues row parents[r] of the call before (reorder the cache by it);
                            None: row r continues row r

Rows stay image-major, R = B · g with row r of image r // g, so the memory of an image is never repeated or
reordered, only the short cache of what was decoded is. A text that ended is padded until all have.

The options bear transformers' names and mean what they mean there, in the same order: repetition penalty,
minimum of new tokens, temperature, top-p. Greedy and sampling apply them to logits, beam search to
log-probabilities.

Shapes: B prompts, P prompt tokens, n texts per prompt, K beams, R rows, T new tokens, V vocabulary.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from openblip.config import ConfigError

Step = Callable[[Tensor, Tensor | None], Tensor]

_NO_TOKEN = torch.iinfo(torch.int64).max  # in a history: nothing to penalise here
_SHORTLIST = 256  # likeliest tokens, where a nucleus usually ends: to rank all 30,000 takes 20 times as long


@dataclass
class GenerationConfig:
    """How to decode: `num_beams` > 1 is beam search, `do_sample` is sampling, neither is greedy.

    max_new_tokens, min_new_tokens: without the prompt; the end token does not count for the minimum.
    top_p, temperature, seed: for sampling. Without a seed, torch's global generator gives one.
    repetition_penalty: above 1 discourages the tokens of prompt and text so far (Keskar et al. 2019, §4.1).
    length_penalty, early_stopping: for beam search. A text scores log P / length ** length_penalty. The
        search for a prompt is over as soon as K texts have ended (True), or when besides the best open beam
        would not beat the worst of them (False: at its length; "never": at the length that suits it best).
    num_return_sequences: texts per prompt: that many samples, or the best of the beams.

    Raises ConfigError (a UserError): a value out of range, or options that exclude each other.
    """

    num_beams: int = 1
    do_sample: bool = False
    max_new_tokens: int = 30
    min_new_tokens: int = 0
    top_p: float = 1.0
    temperature: float = 1.0
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0
    num_return_sequences: int = 1
    early_stopping: bool | Literal["never"] = False
    seed: int | None = None

    def __post_init__(self) -> None:
        beams, limit, texts = self.num_beams, self.max_new_tokens, self.num_return_sequences
        for name, is_right, wanted in (
            ("num_beams", beams >= 1, "at least 1"),
            ("max_new_tokens", limit >= 1, "at least 1"),
            ("min_new_tokens", 0 <= self.min_new_tokens <= limit, f"from 0 to max_new_tokens ({limit})"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("temperature", 0 < self.temperature < math.inf, "above 0"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
            ("length_penalty", math.isfinite(self.length_penalty), "a finite number"),
            ("num_return_sequences", texts >= 1, "at least 1"),
            ("early_stopping", self.early_stopping in (True, False, "never"), 'True, False or "never"'),
        ):
            if not is_right:
                raise ConfigError(f"{name} {getattr(self, name)!r}: must be {wanted}")
        if self.do_sample and beams > 1:
            raise ConfigError(f"do_sample with num_beams {beams}: beam search does not sample, set one back")
        if not self.do_sample and texts > beams:
            raise ConfigError(f"num_return_sequences {texts}: without do_sample at most num_beams ({beams})")


@dataclass
class Generated:
    """New tokens only; n rows per prompt, when searched the best first.

    sequences [B · n, T]: end token included, then padding; T is the longest length.
    lengths [B · n]: tokens of each row, end token included.
    scores [B · n]: greedy and sampling: log P of the tokens under the model itself, without penalties and
        temperature. Beam search: log P (with penalties) / length ** length_penalty. Rows without a text,
        because fewer than n different ones exist, have length 0 and score -inf.
    """

    sequences: Tensor
    lengths: Tensor
    scores: Tensor


def generate(
    step: Step,
    prompt_ids: Tensor,
    config: GenerationConfig,
    *,
    eos_token_id: int | Sequence[int],
    pad_token_id: int,
    prompt_mask: Tensor | None = None,
    seeds: Sequence[int] | None = None,
) -> Generated:
    """Continue prompt_ids [B, P].

    Args:
        step: see the head of this file.
        eos_token_id: the token that ends a text, or several.
        pad_token_id: fills `sequences` behind the end.
        prompt_mask: [B, P], 0 where a prompt is padding, which the repetition penalty then overlooks. (That
            attention overlooks it too is the business of `step`.)
        seeds: for sampling, one per prompt instead of config.seed. What is drawn depends on the prompt's seed
            and logits alone: not on the batch; max_new_tokens and num_return_sequences only cut it off.

    Raises:
        ValueError: not one seed per prompt, or first logits of the wrong shape.
        FloatingPointError: the first logits hold NaN.
    """
    eos = torch.tensor(eos_token_id, dtype=torch.int64, device=prompt_ids.device).reshape(-1)
    if config.num_beams > 1:
        sequences, scores = _search(step, prompt_ids, config, eos, pad_token_id, prompt_mask)
    else:
        tokens, log_probs = zip(*_decode(step, prompt_ids, config, eos, pad_token_id, prompt_mask, seeds))
        sequences, scores = torch.stack(tokens, dim=1), torch.stack(log_probs, dim=1).sum(dim=1)
    ends_so_far = _is_in(sequences, eos).cumsum(dim=1)
    lengths = 1 + (ends_so_far[:, :-1] == 0).sum(dim=1)  # a token counts if no token before it was an end
    lengths = lengths.masked_fill(scores == -math.inf, 0)
    return Generated(sequences[:, : int(lengths.max())], lengths, scores)


def stream(
    step: Step,
    prompt_ids: Tensor,
    config: GenerationConfig,
    *,
    eos_token_id: int | Sequence[int],
    pad_token_id: int,
    prompt_mask: Tensor | None = None,
    seeds: Sequence[int] | None = None,
) -> Iterator[Tensor]:
    """The columns [B · n] of what `generate` returns for the same arguments, each as soon as it is known.

    Raises ConfigError for beam search, which knows its first token last; otherwise what `generate` raises.
    """
    if config.num_beams > 1:
        raise ConfigError(f"num_beams {config.num_beams}: beam search cannot stream; set num_beams to 1")
    eos = torch.tensor(eos_token_id, dtype=torch.int64, device=prompt_ids.device).reshape(-1)
    return (tokens for tokens, _ in _decode(step, prompt_ids, config, eos, pad_token_id, prompt_mask, seeds))


def sequence_log_likelihood(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Teacher forcing: log P of labels [B, L] (-100 = ignored) under logits [B, L, V] -> [B], summed over L.

    logits[:, i] are those that predict labels[:, i]: the shift is the caller's. With label smoothing, minus
    the summed smoothed loss, by which the released BLIP ranks VQA answers.
    """
    losses = F.cross_entropy(
        _wide(logits).flatten(0, 1), labels.flatten(), reduction="none", label_smoothing=label_smoothing
    )
    return -losses.view(labels.shape).sum(dim=1)


@torch.no_grad()
def _decode(
    step: Step,
    prompt_ids: Tensor,
    config: GenerationConfig,
    eos: Tensor,
    pad: int,
    mask: Tensor | None,
    seeds: Sequence[int] | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Greedy and sampling: per step one token [B · n] and its log P; pad and 0 behind the end of a text."""
    device, texts = prompt_ids.device, config.num_return_sequences
    uniforms = _uniforms(config, seeds, len(prompt_ids)).to(device) if config.do_sample else None
    logits, parents = _prefill(step, prompt_ids), None
    history, start = _history(prompt_ids, mask, config, pad)
    if texts > 1:
        parents = torch.arange(len(prompt_ids), device=device).repeat_interleave(texts)
        logits, history = logits[parents], history[parents]
    done = torch.zeros(len(history), dtype=torch.bool, device=device)
    for length in range(config.max_new_tokens):
        logits = _wide(logits)
        scores = _penalise(logits, history[:, : start + length], config, eos, length)
        if uniforms is None:
            tokens = scores.argmax(dim=1)
        else:
            probs = (scores / config.temperature).softmax(dim=1)
            tokens = _draw(_nucleus(probs, config.top_p), uniforms[:, length])
        log_probs = logits.log_softmax(dim=1).gather(1, tokens[:, None])[:, 0]
        tokens = tokens.masked_fill(done, pad)
        yield tokens, log_probs.masked_fill(done, 0)
        history[:, start + length] = tokens
        done = done | _is_in(tokens, eos)
        if length + 1 == config.max_new_tokens or bool(done.all()):
            return
        logits, parents = step(tokens[:, None], parents), None


@torch.no_grad()
def _search(
    step: Step, prompt_ids: Tensor, config: GenerationConfig, eos: Tensor, pad: int, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Beam search: the n best texts per prompt [B · n, max_new_tokens], scores [B · n] (-inf: no text)."""
    beams, limit, penalty = config.num_beams, config.max_new_tokens, config.length_penalty
    logits = _prefill(step, prompt_ids)
    prompts, vocabulary = logits.shape
    keep = beams * (1 + len(eos))  # continuations, of which K · len(eos) at most end a text and K can go on
    width = min(keep, vocabulary)
    history, start = _history(prompt_ids, mask, config, pad)
    rows = torch.arange(prompts, device=prompt_ids.device)[:, None]
    finished = history[:, None].repeat(1, beams, 1)  # [B, K, ...], best first
    finished_scores = logits.new_full((prompts, beams), -math.inf, dtype=_wide(logits).dtype)
    open_scores = finished_scores.clone()
    open_scores[:, 0] = 0  # the beams of a prompt start out the same: only the first counts
    done = torch.zeros(prompts, dtype=torch.bool, device=prompt_ids.device)
    for length in range(1, limit + 1):
        # The best continuations of each prompt, best first, out of the best of each beam.
        log_probs = _wide(logits).log_softmax(dim=1)
        log_probs = _penalise(log_probs, history[:, : start + length - 1], config, eos, length - 1)
        best, best_ids = log_probs.topk(width)
        group = len(logits) // prompts  # rows per prompt: one after the prefill, then K
        totals, flat = (open_scores[:, :, None] + best.view(prompts, group, width)).flatten(1).topk(keep)
        parents = rows * group + (flat // width).clamp(max=group - 1)  # [B, keep]: rows of the last call
        tokens = best_ids[parents, flat % width]
        ends = _is_in(tokens, eos) | (length == limit)

        # Those of the first K that end a text compete with the finished ones.
        texts = history[parents[:, :beams]]
        texts[:, :, start + length - 1] = tokens[:, :beams]
        scores = (totals / length**penalty).masked_fill(~ends | done[:, None], -math.inf)[:, :beams]
        finished_scores, order = torch.cat([finished_scores, scores], dim=1).topk(beams)
        finished = torch.cat([finished, texts], dim=1)[rows, order]

        # The first K that do not end go on, while they can change the result.
        open_scores, order = totals.masked_fill(ends, -math.inf).topk(beams)
        reach = limit if config.early_stopping == "never" and penalty > 0 else length
        worst = finished_scores[:, -1]
        done = done | (open_scores[:, 0] / reach**penalty <= worst)
        if config.early_stopping is True:
            done = done | (worst > -math.inf)
        if length == limit or bool(done.all()):
            break
        parents, tokens = parents.gather(1, order).flatten(), tokens.gather(1, order).flatten()
        history = history[parents]
        history[:, start + length - 1] = tokens
        logits = step(tokens[:, None], parents)
    finished = finished[:, :, start:].masked_fill(finished_scores[:, :, None] == -math.inf, pad)
    wanted = config.num_return_sequences
    return finished[:, :wanted].flatten(0, 1), finished_scores[:, :wanted].flatten()


def _prefill(step: Step, prompt_ids: Tensor) -> Tensor:
    """The logits [B, V] behind the prompts. Broken weights show here, before they become nonsense text."""
    logits, prompts = step(prompt_ids, None), len(prompt_ids)
    if logits.ndim != 2 or len(logits) != prompts:
        raise ValueError(f"step gave {list(logits.shape)} for {prompts} prompts: must be [{prompts}, V]")
    if bool(logits.isnan().any()):
        raise FloatingPointError("the model's logits are NaN: broken weights, or half precision overflowed")
    return logits


def _history(ids: Tensor, mask: Tensor | None, config: GenerationConfig, pad: int) -> tuple[Tensor, int]:
    """Room for the tokens of each row [B, start + max_new_tokens], and `start`, where the new ones begin:
    behind the prompt (without what the mask leaves out) if a penalty needs to know it, else at 0."""
    new = ids.new_full((len(ids), config.max_new_tokens), pad)
    if config.repetition_penalty == 1:
        return new, 0
    known = ids if mask is None else ids.masked_fill(mask == 0, _NO_TOKEN)
    return torch.cat([known, new], dim=1), ids.shape[1]


def _penalise(scores: Tensor, seen: Tensor, config: GenerationConfig, eos: Tensor, length: int) -> Tensor:
    """Scores [R, V] after `length` new tokens: repetition penalty on the ids `seen` [R, S], and no end before
    min_new_tokens. `scores` itself stays as it is: it may be the model's own tensor."""
    if config.repetition_penalty != 1:
        seen = seen.clamp(max=scores.shape[1])
        scores = F.pad(scores, (0, 1))  # one more column, for ids outside of the vocabulary
        old = scores.gather(1, seen)
        new = torch.where(old < 0, old * config.repetition_penalty, old / config.repetition_penalty)
        scores = scores.scatter_(1, seen, new)[:, :-1]
    if length < config.min_new_tokens:
        scores = scores.index_fill(1, eos, -math.inf)
    return scores


def _nucleus(probs: Tensor, top_p: float, shortlist: int = _SHORTLIST) -> Tensor:
    """Zero all of probs [R, V] but each row's smallest set of likeliest tokens that sums up to top_p or more
    (Holtzman et al. 2020, §3.1). Only rows whose set exceeds the shortlist are ranked in full; each row for
    itself, so that it comes out the same in every batch."""
    if top_p == 1:
        return probs
    best, ids = probs.topk(min(shortlist, probs.shape[1]))
    sums = best.cumsum(dim=1, dtype=torch.float64)
    kept = torch.zeros_like(probs).scatter_(1, ids, best.masked_fill(sums - best >= top_p, 0))
    is_longer = sums[:, -1] < top_p
    if shortlist < probs.shape[1] and bool(is_longer.any()):
        kept[is_longer] = _nucleus(probs[is_longer], top_p, probs.shape[1])
    return kept


def _draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """One token [R] per row of weights [R, V], by inverse CDF at uniforms [R] in (0, 1]: none of weight 0.

    In the order of the vocabulary, not of the weights: neighbours in rank change places with the last bits of
    the logits, which vary with the batch size, and would take the drawn token with them.
    """
    cdf = weights.cumsum(dim=1, dtype=torch.float64)
    return torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:])[:, 0]


def _uniforms(config: GenerationConfig, seeds: Sequence[int] | None, prompts: int) -> Tensor:
    """Numbers in (0, 1], [B · n, max_new_tokens] float64: every row from a generator of its own."""
    if seeds is None:
        seed = int(torch.randint(2**63 - 1, ())) if config.seed is None else config.seed
        seeds = [_derive(seed, prompt) for prompt in range(prompts)]
    if len(seeds) != prompts:
        raise ValueError(f"{len(seeds)} seeds for {prompts} prompts: must be one per prompt")
    generator = torch.Generator()
    uniforms = torch.empty(prompts * config.num_return_sequences, config.max_new_tokens, dtype=torch.float64)
    for row, numbers in enumerate(uniforms):
        prompt, text = divmod(row, config.num_return_sequences)
        numbers.uniform_(generator=generator.manual_seed(_derive(seeds[prompt], text)))
    return 1 - uniforms


def _derive(seed: int, index: int) -> int:
    """The seed of stream `index`; streams of neighbouring seeds or indices have nothing in common."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest(), "little")


def _is_in(tokens: Tensor, ids: Tensor) -> Tensor:
    """Which of tokens [...] are among ids [E]."""
    return (tokens[..., None] == ids).any(dim=-1)


def _wide(logits: Tensor) -> Tensor:
    """At least float32: in half precision, sums of log-probabilities are ordered by chance."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
