"""The one door to a language model of transformers: decoder-only (OPT, Llama, Phi, ...) or encoder-decoder (T5, BART).

It is frozen, and reads an image as a soft prompt: vectors [B, Q, H] in place of words (BLIP-2 §3.3).

    decoder-only       [padding ; soft prompt ; prompt ; text so far] ── decoder ── next word
    encoder-decoder    [soft prompt ; prompt ; padding] ── encoder ──┐
                       [start ; text so far] ────────────────────── decoder ── next word

Padding stands where it changes nothing. Before the soft prompt, no distance between two real tokens depends on it,
whatever a model counts (positions, a sliding window), and each row begins at position 0. An encoder sees both ways,
so there padding stands last. In training texts end at their own length: a causal model never sees padding behind them.

Shapes: B images, Q vectors of a soft prompt, R rows of text (R = B · g, row r belongs to image r // g), P prompt
tokens, L text tokens, K labelled positions, H width, V vocabulary.
"""

import inspect
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openblip.config import ConfigError, UserError
from openblip.models.adapters import INSTALL, LoraSettings, add_adapters_
from openblip.models.decoding import Decoding, ordered
from openblip.models.layers import init_weights, recompute_activations_

# What the released BLIP-2 changed in a family's own configuration, by model_type. Flan-T5 was trained with GELU's
# tanh approximation, but the weights of BLIP-2 beside it with the exact one.
RELEASED_BLIP2: dict[str, dict[str, Any]] = {"t5": {"dense_act_fn": "gelu"}}

# Where the configuration names no token that a decoder starts from, by model_type: a field that does.
_DECODER_START = {"t5": "pad_token_id", "mt5": "pad_token_id", "bart": "eos_token_id"}

_LENGTHS = 4  # into how many groups of like length the texts of a batch are sorted


@dataclass
class LmConfig:
    """A language model.

    config: its configuration in transformers, with `model_type`. `eos_token_id` (one or several) ends a text.
    source: where its weights are: a folder, a name on the hub, a `.gguf` file, or "smollm2" for the one that a
        registry package holds. None: they are new, and saved with the model.
    sha256: of those weights, see `convert.lm.weights_sha256`.
    family: how its texts are written, in `data.prompts.QUIRKS`, where `model_type` does not say ("vicuna").
    trainable: its weights are trained, and so saved with the model; then there is no `source`.
    added_tokens: words beyond its vocabulary, with embeddings and output rows of their own that train (IDEFICS's
        decoupled embeddings). first_added_id: the id of the first; what the vocabulary has from there on is out of
        use. None: its size.
    """

    config: dict[str, Any] = field(default_factory=dict)
    source: str | None = None
    sha256: str | None = None
    lora: LoraSettings | None = None
    family: str = ""
    trainable: bool = False
    added_tokens: int = 0
    first_added_id: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.config.get("model_type"), str):
            raise ConfigError('config: names no "model_type", such as "llama" or "opt"')
        if self.trainable and (self.lora is not None or self.source is not None):
            raise ConfigError(
                "trainable: a model that trains whole has no adapters, and no other source of weights"
            )


class LanguageModel(nn.Module):
    """A causal or encoder-decoder model. `model`: the one that holds the weights; None: fresh weights.

    If it is not `config.trainable`, it stays in eval mode and gets no gradient, which passes through it to the soft
    prompt all the same. With `config.lora`, the adapters train, and their dropout is on in training mode.

    Raises ConfigError: transformers (or peft, for LoRA) is not installed, or the configuration makes no model.
    """

    def __init__(self, config: LmConfig, model: Any = None) -> None:
        super().__init__()
        self.config = config
        self.model = build(config.config) if model is None else model
        self.model.requires_grad_(config.trainable)
        if config.lora is not None:
            add_adapters_(self.model, config.lora)
        self.is_encoder_decoder = bool(self.model.config.is_encoder_decoder)
        decoder = self.model.get_decoder() if self.is_encoder_decoder else self.model.base_model
        self.takes_positions = "position_ids" in inspect.signature(decoder.forward).parameters
        self.recomputes = False
        self.takes_plain_attention = False
        self.added_words: nn.Embedding | None = None
        if config.added_tokens:
            self.added_words = nn.Embedding(config.added_tokens, self.hidden_size).apply(init_weights)
            width = self.model.get_output_embeddings().weight.shape[1]
            self.added_head = nn.Linear(width, config.added_tokens, bias=False).apply(init_weights)
            if not 0 < self.first_added_id <= self._vocabulary:
                raise ConfigError(
                    f"first_added_id {self.first_added_id}: there are {self._vocabulary} words before"
                )
        self.train(self.training)

    def train(self, mode: bool = True) -> "LanguageModel":
        """Training mode; of a model that is not trained, for the adapters' dropout alone."""
        super().train(mode)
        if self.config.trainable:
            return self
        self.model.eval()
        for name, module in self.model.named_modules():
            if "lora_dropout" in name:
                module.train(mode)
        return self

    @property
    def hidden_size(self) -> int:
        """Width H of the embeddings, which a soft prompt has too."""
        return self._words.weight.shape[1]

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Recompute activations of the layers in the backward pass; of a frozen model too, through which what stands
        before it is trained, and adapters are.

        Raises ConfigError: a family whose layers cannot be run a second time.
        """
        self.recomputes = enabled
        if self.config.trainable:
            recompute_activations_(self.model, enabled)
            return
        from transformers.modeling_layers import GradientCheckpointingLayer

        layers = [one for one in self.model.modules() if isinstance(one, GradientCheckpointingLayer)]
        if not layers:
            raise ConfigError(f"grad_checkpointing: not for the layers of a {self.model.config.model_type}")
        for (
            layer
        ) in layers:  # by ourselves: transformers does it in training mode, which a frozen model is never in
            layer.__dict__.pop("forward", None)
            if enabled:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    @property
    def vocab_size(self) -> int:
        """Ids a text can hold, added tokens included."""
        return self.first_added_id + self.config.added_tokens if self.added_words else self._vocabulary

    @property
    def first_added_id(self) -> int:
        """The id of the first added token."""
        first = self.config.first_added_id
        return self._vocabulary if first is None else first

    @property
    def _vocabulary(self) -> int:
        return self.model.get_output_embeddings().weight.shape[0]

    @property
    def context_length(self) -> int | None:
        """Positions there are for soft prompt, prompt and text together; None: as many as one likes (T5)."""
        return getattr(self.model.config, "max_position_embeddings", None)

    @property
    def eos_token_ids(self) -> list[int]:
        """The tokens that end a text. Raises ConfigError if the configuration names none."""
        ids = self.config.config.get("eos_token_id", self.model.config.eos_token_id)
        if ids is None or ids == []:
            raise ConfigError("this language model's config names no eos_token_id: nothing would end a text")
        return [ids] if isinstance(ids, int) else list(ids)

    @property
    def pad_token_id(self) -> int:
        """Fills what stands behind the end of a text; the model never reads it."""
        pad = self.model.config.pad_token_id
        return self.eos_token_ids[0] if pad is None else pad

    @property
    def start_token_id(self) -> int:
        """What the decoder of an encoder-decoder begins with."""
        settings = self.model.config
        start = getattr(settings, "decoder_start_token_id", None)
        if start is None:
            start = getattr(settings, _DECODER_START.get(settings.model_type, "bos_token_id"))
        if start is None:
            raise ConfigError("this language model's config names no decoder_start_token_id")
        return start

    @property
    def _words(self) -> nn.Embedding:
        """The input embeddings as they are used: BART's encoder scales the table it shares."""
        return (self.model.get_encoder() if self.is_encoder_decoder else self.model).get_input_embeddings()

    def embed(self, input_ids: Tensor) -> Tensor:
        """Ids [...] -> embeddings [..., H]."""
        if self.added_words is None:
            return self._words(input_ids)
        own = input_ids >= self.first_added_id
        words = self._words(input_ids.masked_fill(own, 0))
        added = self.added_words((input_ids - self.first_added_id).clamp(min=0))
        return torch.where(own[..., None], added.to(words.dtype), words)

    def states_of(self, embeds: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Decoder-only: embeddings [B, L, H], padding last -> states [B, L, D], of which [:, i] predicts token i + 1.

        position_ids [B, L]: where they begin anew at 0, another text begins, which does not see what is before it.

        Raises:
            UserError: a text is longer than the context.
            ConfigError: position_ids, and a model that takes none.
        """
        places = {} if position_ids is None else {"position_ids": position_ids}
        self.require_room(embeds.shape[1] if position_ids is None else int(position_ids.max()) + 1)
        if places and not self.takes_positions:
            raise ConfigError(
                f"{self.model.config.model_type}: takes no position ids, so its rows hold one text each"
            )
        self.choose_attention(embeds)
        # Without a mask and a cache, transformers makes the mask of several texts out of their positions.
        return self.model.base_model(inputs_embeds=embeds, use_cache=False, **places).last_hidden_state

    def choose_attention(self, embeds: Tensor) -> None:
        """Plain attention instead of torch's fused one for a step of training in bfloat16 on a CPU, where the fused
        backward pass is slow (docs/performance.md compares both); afterwards the fused one again.
        """
        half = embeds.dtype is torch.bfloat16 or torch.is_autocast_enabled("cpu")
        on_cpu = embeds.device.type == "cpu"
        plain = half and on_cpu and torch.is_grad_enabled() and not self.recomputes
        if plain and not self.takes_plain_attention and self.model.config._attn_implementation == "sdpa":
            self.model.set_attn_implementation("eager")
            self.takes_plain_attention = True
        elif self.takes_plain_attention and not plain:
            self.model.set_attn_implementation("sdpa")
            self.takes_plain_attention = False

    def states(
        self,
        soft_prompt: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Teacher forcing: states [B, L, D], of which states[:, i] predicts labels[:, i]. For `logits` and a loss.

        soft_prompt [B, Q, H]. Decoder-only: input_ids [B, L] are prompt and text, padding last, and so stand the
        labels; states[:, 0] are those of the last vector of the soft prompt. Encoder-decoder: input_ids [B, P]
        are the prompts, attention_mask [B, P] tells their padding, labels [B, L] are the texts (-100: padding).
        """
        prefix, mask = self._with_words(soft_prompt, input_ids, attention_mask)
        if not self.is_encoder_decoder:
            return self.states_of(prefix)[:, soft_prompt.shape[1] - 1 : -1]
        assert labels is not None, "an encoder-decoder needs labels"
        before = labels.masked_fill(labels == -100, self.pad_token_id)
        before = torch.cat([torch.full_like(before[:, :1], self.start_token_id), before[:, :-1]], dim=1)
        self.require_room(max(prefix.shape[1], before.shape[1]))
        encoded, seen = self.encode(prefix, mask)
        out = self.model.get_decoder()(
            input_ids=before, encoder_hidden_states=encoded, encoder_attention_mask=seen, use_cache=False
        )
        return out.last_hidden_state

    def states_of_several(self, soft_prompt: Tensor, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """`states` of several texts behind each soft prompt, which is run once for all of them; decoder-only.

        soft_prompt [B, Q, H]; input_ids [R, L], R = B · g, row r behind soft prompt r // g, `lengths` [R] of them real
        -> states [R, L, D], zeros where a text has ended. Rows of like length run together, so that little of what runs
        is padding. Raises ConfigError: an encoder-decoder, a soft prompt longer than a sliding window, or a model whose
        activations are recomputed: its cache would grow each time.
        """
        if self.is_encoder_decoder or self.recomputes:
            raise ConfigError(
                "several captions of a picture at once: not for an encoder-decoder, nor with grad_checkpointing"
            )
        from transformers import DynamicCache

        self.require_room(soft_prompt.shape[1] + input_ids.shape[1])
        run, settings = self.model.base_model, self.model.config
        words = self.embed(input_ids)
        self.choose_attention(soft_prompt)
        seen = DynamicCache(config=settings)
        prefix = run(inputs_embeds=soft_prompt.to(words.dtype), cache=seen, use_cache=True).last_hidden_state
        if any(layer.keys.shape[2] != soft_prompt.shape[1] for layer in seen.layers):
            raise ConfigError(f"a soft prompt of {soft_prompt.shape[1]} is more than a sliding window holds")
        first = prefix[:, -1:].repeat_interleave(len(input_ids) // len(soft_prompt), dim=0)
        states = first.new_zeros(*input_ids.shape, first.shape[-1])
        states[:, :1] = first
        for rows in lengths.argsort(stable=True).tensor_split(_LENGTHS):
            longest = (
                int(lengths[rows].max()) - 1 if len(rows) else 0
            )  # what follows the last word is not asked for
            if longest < 1:
                continue
            cache, of = DynamicCache(config=settings), rows // (len(input_ids) // len(soft_prompt))
            for number, layer in enumerate(seen.layers):
                cache.update(layer.keys[of], layer.values[of], number)
            behind = run(inputs_embeds=words[rows, :longest], cache=cache, use_cache=True).last_hidden_state
            states[rows, 1 : 1 + longest] = behind
        return states

    def logits(self, states: Tensor) -> Tensor:
        """States [..., D] -> logits [..., V], as the model's own forward makes them. Call it where they are needed."""
        settings = self.model.config
        if getattr(settings, "scale_decoder_outputs", False):  # T5 with tied embeddings
            states = states * settings.d_model**-0.5
        logits = self.model.get_output_embeddings()(states)
        bias = getattr(self.model, "final_logits_bias", None)  # BART
        if bias is not None:
            logits = logits + bias[0]
        cap = getattr(settings, "final_logit_softcapping", None)  # Gemma
        logits = logits if cap is None else torch.tanh(logits / cap) * cap
        if self.added_words is None:
            return logits
        return torch.cat(
            [logits[..., : self.first_added_id], self.added_head(states).to(logits.dtype)], dim=-1
        )

    def continue_from(self, prefix: Tensor, mask: Tensor) -> Decoding:
        """Begin to write behind embeddings [B, P, H]; mask [B, P] bool, False for padding, anywhere."""
        return Decoding(self, prefix, mask)

    def decode(self, soft_prompt: Tensor, prompt_ids: Tensor, prompt_mask: Tensor | None = None) -> Decoding:
        """Begin to write: soft_prompt [B, Q, H], prompt_ids [B, P], prompt_mask [B, P] (0: padding, anywhere)."""
        return Decoding(self, *self._with_words(soft_prompt, prompt_ids, prompt_mask))

    def require_room(self, tokens: int) -> None:
        """Raise a UserError if `tokens` (soft prompt, prompt and text) are more than the model has positions."""
        limit = self.context_length
        if limit is not None and tokens > limit:
            raise UserError(
                f"image, prompt and text take {tokens} positions, {tokens - limit} more than the {limit} of this "
                "language model: shorten the prompt or ask for fewer new tokens"
            )

    def _with_words(
        self, soft_prompt: Tensor, input_ids: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """[soft prompt ; words] as [B, Q + P, H], and which of them are real [B, Q + P] bool."""
        words = self.embed(input_ids)
        real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
        real = torch.cat([real.new_ones(soft_prompt.shape[:2]), real], dim=1)
        return torch.cat([soft_prompt.to(words.dtype), words], dim=1), real

    def encode(self, prefix: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """The encoder's states and their mask, padding moved behind."""
        self.choose_attention(prefix)
        prefix, mask = ordered(prefix, mask, padding="last")
        some = None if bool(mask.all()) else mask.long()
        encoded = self.model.get_encoder()(inputs_embeds=prefix, attention_mask=some)
        return encoded.last_hidden_state, some


def build(config: dict[str, Any]) -> Any:
    """A transformers model with fresh weights from its configuration as a dict.

    Raises ConfigError: transformers is not installed, or knows no such model.
    """
    settings = dict(config)
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
    except ImportError:
        raise ConfigError(f"a language model needs transformers: {INSTALL}") from None
    try:
        wanted = AutoConfig.for_model(settings.pop("model_type"), **settings)
        cls = AutoModelForSeq2SeqLM if wanted.is_encoder_decoder else AutoModelForCausalLM
        return cls.from_config(wanted)
    except ValueError as error:
        raise ConfigError(f"lm.config: {str(error).splitlines()[0]}") from None
