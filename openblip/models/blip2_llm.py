"""BLIP-2, stage 2 (Li et al. 2023, §3.3), and InstructBLIP (Dai et al. 2023): a frozen language model sees.

    pixel_values ─ stage 1's tower (frozen) and ln_vision ─ memory
                                                              │
    queries (+ instruction text: InstructBLIP) ─ Q-Former ────┘
                        │ the queries' outputs
                    projection ─ soft prompt [B, Q, H] ─┐
                                                        ├─ language model (frozen) ── next word
                    prompt and text ────────────────────┘

Trained are queries, Q-Former, ln_vision, projection, and adapters if the language model has some. A stage 1 that
keeps its heads goes on matching and embedding beside the language model.

Shapes: B images, T frames of a video, N image tokens, De their width, Q queries (T · Q for a video), P prompt tokens,
L text tokens, K labelled positions, C candidate answers, H width of the language model, V its vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from openblip.config import ConfigError
from openblip.models.blip2 import Blip2, Blip2Config, without_heads
from openblip.models.generation import Generated, GenerationConfig, generate, stream
from openblip.models.layers import init_weights
from openblip.models.lm import Decoding, LanguageModel, LmConfig
from openblip.models.qformer import QFormerConfig
from openblip.models.vit import VisionConfig


def _queries_alone() -> Blip2Config:
    return Blip2Config(qformer=QFormerConfig(text=False), encoder=False, decoder=False)


@dataclass
class Blip2LlmConfig:
    """Stage 2 of BLIP-2, on stage 1: with its heads or, as in the released models, without.

    qformer_text: InstructBLIP, whose Q-Former reads the instruction too. Raises ConfigError: it has no text part.
    first_token_id: a token that stands before the soft prompt. A decoder whose texts always began with one token leans
        its attention on it, and a small one is of no use without (docs/results.md). The released models have none.
    query_projections: a projection of its own for each query, see `QueryProjections`. The released models share one.
    """

    lm: LmConfig
    blip2: Blip2Config = field(default_factory=_queries_alone)
    qformer_text: bool = False
    first_token_id: int | None = None
    query_projections: bool = False

    def __post_init__(self) -> None:
        if self.qformer_text and not self.blip2.qformer.text:
            raise ConfigError("qformer_text: the Q-Former has no text part; set blip2.qformer.text")

    @property
    def vision(self) -> VisionConfig:
        """The image tower's."""
        return self.blip2.vision

    @property
    def freeze_vision(self) -> bool:
        """Whether the tower stays as it is."""
        return self.blip2.freeze_vision

    @property
    def text(self) -> QFormerConfig | None:
        """What the Q-Former's tokenizer must agree with, if it reads text."""
        return self.blip2.qformer if self.blip2.qformer.text else None


class QueryProjections(nn.Module):
    """A linear map for each of Q queries: states [B, T · Q, D] of T frames -> [B, T · Q, H].

    The queries of a Q-Former that was trained for hours, not weeks, come to hold the same (docs/results.md), and one
    map makes Q times the same token of them. Biases begin as far apart as the words of a language model.
    """

    def __init__(self, queries: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(queries, in_features, out_features))
        self.bias = nn.Parameter(torch.empty(queries, out_features))
        nn.init.normal_(self.weight, std=0.02)
        nn.init.normal_(self.bias, std=0.1)

    def forward(self, states: Tensor) -> Tensor:
        """Each query through its own map."""
        frames = states.unflatten(1, (-1, len(self.weight)))
        seen = torch.einsum("btqd,qdh->btqh", frames, self.weight)
        return (seen + self.bias.to(seen.dtype)).flatten(1, 2)


class Blip2Llm(nn.Module):
    """Stage 1, projection, language model. `lm`: the one with its weights; None: fresh ones."""

    def __init__(self, config: Blip2LlmConfig, lm: LanguageModel | None = None) -> None:
        super().__init__()
        self.config = config
        self.blip2 = Blip2(config.blip2)
        self.lm = LanguageModel(config.lm) if lm is None else lm
        qformer = config.blip2.qformer
        if config.query_projections:
            widths = qformer.hidden_size, self.lm.hidden_size
            self.projection: nn.Module = QueryProjections(qformer.num_query_tokens, *widths)
        else:
            self.projection = nn.Linear(qformer.hidden_size, self.lm.hidden_size)
            self.projection.apply(init_weights)
        first = config.first_token_id
        if first is not None and not 0 <= first < self.lm.vocab_size:
            raise ConfigError(f"first_token_id {first}: the language model has {self.lm.vocab_size} tokens")

    @property
    def vision(self) -> nn.Module:
        """The image tower."""
        return self.blip2.vision

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Recompute activations of tower, Q-Former and language model, which the soft prompt is trained through.

        Raises ConfigError: a language model whose layers cannot be run a second time.
        """
        self.blip2.set_grad_checkpointing(enabled)
        self.lm.set_grad_checkpointing(enabled)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, 3, S, S] -> image_embeds [B, N, De], or a video's [B, T, N, De]; see `Blip2`."""
        return self.blip2.encode_image(pixel_values)

    def soft_prompt(
        self, image_embeds: Tensor, qformer_ids: Tensor | None = None, qformer_mask: Tensor | None = None
    ) -> Tensor:
        """What the language model is shown: image_embeds [B, N, De] -> [B, Q, H], or with a
        `first_token_id` [B, 1 + Q, H].

        With `qformer_text`, qformer_ids [B, L'] and qformer_mask [B, L'] are the instructions in the Q-Former's
        vocabulary, [CLS] first. Video [B, T, N, De]: each frame for itself, then all of their queries in one row,
        [B, T · Q, H]. Raises ValueError: instructions are missing, or not wanted.
        """
        if (qformer_ids is not None) != self.config.qformer_text:
            wanted = "wants instruction ids" if self.config.qformer_text else "takes no instruction ids"
            raise ValueError(f"the Q-Former of this model {wanted} (qformer_text)")
        frames = image_embeds.shape[1] if image_embeds.ndim == 4 else 1
        memory = self.blip2.memory(image_embeds.flatten(0, 1) if image_embeds.ndim == 4 else image_embeds)
        qformer = self.blip2.qformer
        if qformer_ids is None:
            states = qformer.encode_queries(memory)
        else:
            ids = qformer_ids.repeat_interleave(frames, dim=0)
            mask = None if qformer_mask is None else qformer_mask.repeat_interleave(frames, dim=0)
            states = qformer.encode_both(memory, ids, mask)[:, : qformer.config.num_query_tokens]
        return self.project(states.reshape(len(image_embeds), -1, states.shape[-1]))

    def project(self, states: Tensor) -> Tensor:
        """The queries' outputs [B, Q, D] -> the soft prompt [B, Q, H], behind the first token if there is one."""
        seen = self.projection(states)
        if self.config.first_token_id is None:
            return seen
        first = self.lm.embed(torch.full_like(seen[:, :1, 0], self.config.first_token_id, dtype=torch.long))
        return torch.cat([first.to(seen.dtype), seen], dim=1)

    def lm_states(
        self,
        soft_prompt: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor,
    ) -> Tensor:
        """States [B, L, D], of which states[:, i] predicts labels[:, i]; see `LanguageModel.states`."""
        return self.lm.states(soft_prompt, input_ids, attention_mask, labels)

    def lm_logits(self, states: Tensor) -> Tensor:
        """States [..., D] -> logits [..., V]. Call it on the positions that are needed."""
        return self.lm.logits(states)

    def labelled_logits(
        self, soft_prompt: Tensor, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(logits [K, V], their labels [K]) where labels [B, L] are not −100, and nowhere else.

        Decoder-only: input_ids and labels [B, L] are prompt and text; or [B · g, L], g texts behind each soft prompt,
        which is then run once (`LanguageModel.states_of_several`). Encoder-decoder: input_ids [B, P] are the prompts,
        labels [B, L] the texts.
        """
        wanted = labels != -100
        if len(labels) != len(soft_prompt):
            places = torch.arange(1, labels.shape[1] + 1, device=labels.device)
            lengths = (wanted * places).amax(dim=1)
            states = self.lm.states_of_several(soft_prompt, input_ids, lengths)
            return self.lm_logits(states[wanted]), labels[wanted]
        return self.lm_logits(self.lm_states(soft_prompt, input_ids, attention_mask, labels)[wanted]), labels[
            wanted
        ]

    def generate(
        self,
        soft_prompt: Tensor,
        prompt_ids: Tensor,
        prompt_mask: Tensor | None = None,
        config: GenerationConfig | None = None,
        *,
        seeds: Sequence[int] | None = None,
    ) -> Generated:
        """Continue prompt_ids [B, P] (prompt_mask [B, P]: 0 for padding, P may be 0); see `generation.generate`.

        The paper captions with 5 beams and at most 30 tokens, and answers with 5 beams, at most 10 and a length
        penalty of −1. Raises UserError: image, prompt and new tokens do not fit into the model's context.
        """
        decoding, config = self._begin(soft_prompt, prompt_ids, prompt_mask, config)
        return generate(decoding, decoding.start_ids, config, seeds=seeds, **self._ends())

    def stream(
        self,
        soft_prompt: Tensor,
        prompt_ids: Tensor,
        prompt_mask: Tensor | None = None,
        config: GenerationConfig | None = None,
        *,
        seeds: Sequence[int] | None = None,
    ) -> Iterator[Tensor]:
        """The columns of what `generate` returns, each as soon as it is known; see `generation.stream`."""
        decoding, config = self._begin(soft_prompt, prompt_ids, prompt_mask, config)
        return stream(decoding, decoding.start_ids, config, seeds=seeds, **self._ends())

    @torch.no_grad()
    def rank(
        self,
        soft_prompt: Tensor,
        prompt_ids: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        *,
        prompt_mask: Tensor | None = None,
        length_penalty: float = 0.0,
        chunk: int = 16,
    ) -> Tensor:
        """How likely the language model finds each of C answers -> [B, C]: log P / length ** length_penalty.

        answer_ids, answer_mask: [C, L] for all prompts, or [B, C, L]; padding last. Length penalty 0, the summed
        loss, is InstructBLIP's; 1 takes the mean over tokens. The prefix is run once per image, then `chunk`
        answers of each at a time.
        """
        decoding = self.lm.decode(soft_prompt, prompt_ids, prompt_mask)
        return decoding.rank(answer_ids, answer_mask, length_penalty=length_penalty, chunk=chunk)

    def _begin(
        self,
        soft_prompt: Tensor,
        prompt_ids: Tensor,
        prompt_mask: Tensor | None,
        config: GenerationConfig | None,
    ) -> tuple[Decoding, GenerationConfig]:
        config = config or GenerationConfig()
        decoding = self.lm.decode(soft_prompt, prompt_ids, prompt_mask)
        decoding.require_room(config.max_new_tokens)
        return decoding, config

    def _ends(self) -> dict[str, Any]:
        return {"eos_token_id": self.lm.eos_token_ids, "pad_token_id": self.lm.pad_token_id}


def without_stage1(model: Blip2Llm) -> Blip2Llm:
    """The model without the heads of stage 1, as it is released; the language model is the same object."""
    blip2 = without_heads(model.blip2, keep_text=model.config.qformer_text)
    found = Blip2Llm(replace(model.config, blip2=blip2.config), model.lm)
    found.blip2 = blip2
    found.projection.load_state_dict(model.projection.state_dict())
    some = next(model.projection.parameters())
    return found.to(some.device, some.dtype).train(model.training)
