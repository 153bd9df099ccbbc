"""BLIP (Li et al. 2022): one image encoder, and one text transformer used three ways.

    pixel_values ─ vision ─ image_embeds ─┬─ vision_proj ─────────── image_features ┐
                                          │                                         ├ cosine      (ITC)
    [CLS] text ─ text_encoder ────────────┼─ text_proj ───────────── text_features  ┘
                                          │
                                        memory   (keys and values of the image, projected once)
                                          │
    [ENC] text ─ text_encoder ────────────┼─ itm_head ── match / no match                         (ITM)
    [DEC] text ─ text_decoder, causal ────┴─ lm_head ─── next word                                (LM)

Encoder and decoder share every module but self-attention, including its output dense and LayerNorm (BLIP
§3.1).

Shapes: B images, N image tokens, R rows of text (R = B · g, row r belongs to image r // g, unless
`memory.rows` says otherwise), L text tokens, P projection width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openblip.config import ConfigError
from openblip.models.generation import Generated, GenerationConfig, generate
from openblip.models.layers import init_weights
from openblip.models.memory import Memory
from openblip.models.text import (
    Cache,
    LanguageModelHead,
    TextConfig,
    TextTransformer,
    swap_first_token,
)
from openblip.models.tower import TowerModel
from openblip.models.vit import VisionConfig, vit_base, vit_large

PARTS = ("embeddings", "self_attention", "cross_attention", "feed_forward")
ALL_BUT_SELF_ATTENTION = ("embeddings", "cross_attention", "feed_forward")


@dataclass
class BlipConfig:
    """A BLIP model. `share` lists what encoder and decoder have in common; fine-tuned checkpoints share nothing.

    `encoder` / `decoder` leave a half out: a captioner has no text encoder, a retrieval model no decoder.
    `freeze_vision` keeps the vision tower in eval mode and out of the gradient.
    """

    vision: VisionConfig = field(default_factory=vit_base)
    text: TextConfig = field(default_factory=TextConfig)
    projection_dim: int = 256
    share: tuple[str, ...] = ALL_BUT_SELF_ATTENTION
    encoder: bool = True
    decoder: bool = True
    freeze_vision: bool = False

    def __post_init__(self) -> None:
        unknown = [part for part in self.share if part not in PARTS]
        if unknown:
            raise ConfigError(f"share: unknown part {unknown[0]!r}; the parts are {', '.join(PARTS)}")
        if not (self.encoder or self.decoder):
            raise ConfigError("a BLIP model needs encoder or decoder")


def blip_base(image_size: int = 224) -> BlipConfig:
    """BLIP with ViT-B/16."""
    return BlipConfig(vision=vit_base(image_size))


def blip_large(image_size: int = 224) -> BlipConfig:
    """BLIP with ViT-L/16; the text transformer stays BERT-base."""
    return BlipConfig(vision=vit_large(image_size))


class Blip(TowerModel):
    """The multimodal mixture of encoder-decoder (MED) with its three heads."""

    def __init__(self, config: BlipConfig) -> None:
        super().__init__(config)
        width, hidden = config.vision.output_size, config.text.hidden_size
        if config.encoder:
            self.text_encoder = TextTransformer(config.text, encoder_width=width)
            self.vision_proj = nn.Linear(width, config.projection_dim)
            self.text_proj = nn.Linear(hidden, config.projection_dim)
            self.itm_head = nn.Linear(hidden, 2)
            self.temperature = nn.Parameter(torch.tensor(0.07))
            for head in (self.vision_proj, self.text_proj, self.itm_head):
                head.apply(init_weights)
        if config.decoder:
            self.text_decoder = TextTransformer(config.text, encoder_width=width)
            self.lm_head = LanguageModelHead(config.text)
        if config.encoder and config.decoder:
            self.text_decoder.share_(self.text_encoder, config.share)

    def _texts(self) -> list[TextTransformer]:
        return [getattr(self, name) for name in ("text_encoder", "text_decoder") if hasattr(self, name)]

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, 3, S, S] -> image_embeds [B, N, D]: all tokens after the final norm.

        Video [B, T, 3, S, S] -> [B, T · N, D]: the tokens of all frames in one sequence (BLIP §5.6).
        """
        image_embeds = super().encode_image(pixel_values)
        return image_embeds.flatten(1, 2) if pixel_values.ndim == 5 else image_embeds

    def image_features(self, image_embeds: Tensor, frames: int = 1) -> Tensor:
        """image_embeds [B, N, D] -> [B, P]: token 0 projected, L2-normalised. The ITC vector, the one to search
        with.

        With `frames` > 1, the mean of the projected first tokens of all frames, normalised.
        """
        first = image_embeds.unflatten(1, (frames, -1))[:, :, 0]  # [B, T, D]
        return F.normalize(self.vision_proj(first).mean(dim=1), dim=-1)

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """input_ids [R, L] -> [R, P]: [CLS] state projected, L2-normalised. The ITC vector."""
        ids = swap_first_token(input_ids, self.config.text.cls_token_id)
        return F.normalize(self.text_proj(self.text_encoder(ids, attention_mask, packed=True)[:, 0]), dim=-1)

    def similarity(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """[B, P], [R, P] -> cosines [B, R]."""
        return image_features @ text_features.T

    def memory(self, image_embeds: Tensor) -> Memory:
        """image_embeds [B, N, D] -> keys and values of every layer, projected once for every use.

        Encoder and decoder attend to the same memory when they share their cross-attention, and it is made by
        the half that exists otherwise.
        """
        if self.config.encoder and self.config.decoder and "cross_attention" not in self.config.share:
            raise ValueError(
                "encoder and decoder do not share cross-attention: use encoder_memory or decoder_memory"
            )
        return self._texts()[0].memory(image_embeds)

    def encoder_memory(self, image_embeds: Tensor) -> Memory:
        """The memory for `itm_logits`; the same as `memory` when cross-attention is shared."""
        return self.text_encoder.memory(image_embeds)

    def decoder_memory(self, image_embeds: Tensor) -> Memory:
        """The memory for `lm_states` and `generate`; the same as `memory` when cross-attention is shared."""
        return self.text_decoder.memory(image_embeds)

    def itm_logits(
        self,
        memory: Memory,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        weights: list[Tensor] | None = None,
    ) -> Tensor:
        """input_ids [R, L] against their images -> [R, 2]; class 1 = match (BLIP §3.2)."""
        ids = swap_first_token(input_ids, self.config.text.enc_token_id)
        states = self.text_encoder(ids, attention_mask, memory, weights=weights, packed=True)
        return self.itm_head(states[:, 0])

    def lm_states(
        self,
        memory: Memory,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cache: Cache | None = None,
    ) -> Tensor:
        """Decoder states [R, L, D] of input_ids [R, L]; position 0 becomes [DEC] unless the cache holds it already.

        What stands at padding means nothing.
        """
        if cache is None or cache.length == 0:
            input_ids = swap_first_token(input_ids, self.config.text.dec_token_id)
        return self.text_decoder(input_ids, attention_mask, memory, causal=True, cache=cache, packed=True)

    def lm_logits(self, states: Tensor) -> Tensor:
        """Decoder states [..., D] -> next-token logits [..., V]. Call it on the positions that are needed."""
        return self.lm_head(states, self.text_decoder.embeddings.word.weight)

    def generate(
        self,
        memory: Memory,
        prompt_ids: Tensor,
        config: GenerationConfig | None = None,
        *,
        seeds: Sequence[int] | None = None,
    ) -> Generated:
        """Continue prompt_ids [B, L], one row per image of the memory, all of one length without [SEP] or
        padding.

        Returns new tokens only, see `generation.generate`.
        """
        text = self.config.text
        return generate(
            self.decoding_step(memory),
            swap_first_token(prompt_ids, text.dec_token_id),
            config or GenerationConfig(),
            eos_token_id=text.sep_token_id,
            pad_token_id=text.pad_token_id,
            seeds=seeds,
        )

    def decoding_step(self, memory: Memory):
        """The `step(ids, parents) -> logits` that `generation` runs on. Beams are rows against one memory."""
        cache = Cache(self.config.text.num_hidden_layers)

        def step(ids: Tensor, parents: Tensor | None) -> Tensor:
            if parents is not None:
                cache.reorder_(parents)
            states = self.lm_states(memory, ids, cache=cache)
            return self.lm_logits(states[:, -1])

        return step


def without_decoder(model: Blip) -> Blip:
    """The retrieval half (filter) of a model as a model of its own, sharing no tensor with it."""
    return _part_of(model, replace(model.config, decoder=False, share=()))


def without_encoder(model: Blip) -> Blip:
    """The captioning half of a model as a model of its own, sharing no tensor with it."""
    return _part_of(model, replace(model.config, encoder=False, share=()))


def _part_of(model: Blip, config: BlipConfig) -> Blip:
    some = next(model.parameters())
    part = Blip(config).to(some.device, some.dtype).train(model.training)
    wanted = part.state_dict().keys()
    part.load_state_dict({name: value for name, value in model.state_dict().items() if name in wanted})
    return part
