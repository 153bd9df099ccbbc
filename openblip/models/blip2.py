"""BLIP-2, stage 1 (Li et al. 2023, §3.2): a Q-Former learns to see through a frozen image encoder.

    pixel_values ─ vision (frozen) ─ image_embeds ─ ln_vision ─ memory   (keys and values, projected once)
                                                                  │
    queries ──────────── encode_queries ──┬── vision_proj ── image_features [Q of them] ┐
                                          │                                             ├ max cosine     (ITC)
    [CLS] text ───────── encode_text ─────┼── text_proj ──── text_features              ┘
                                          │
    queries + [CLS] text ─ encode_both ───┼── itm_head, mean over queries ── match / no match            (ITM)
                                          │
    [DEC] text ──────── decode, causal ◄──┘── lm_head ── next word                                       (ITG)

What a caller sees is BLIP's: `encode_image`, `image_features`, `text_features`, `memory`, `itm_logits`, `generate`.

Shapes: B images, N image tokens, Q queries, R rows of text (R = B · g, row r belongs to image r // g, unless
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
from openblip.models.qformer import QFormer, QFormerConfig
from openblip.models.text import Cache, LanguageModelHead, swap_first_token
from openblip.models.tower import TowerModel
from openblip.models.vit import VisionConfig, vit_large


@dataclass
class Blip2Config:
    """A BLIP-2 of stage 1. `freeze_vision` keeps the tower in eval mode and out of the gradient.

    image_dropout: share of the channels of a picture's tokens, the same in all of them, that training sees as 0.
    encoder, decoder: False leaves out what ITC and ITM, or ITG, need. Without both it is what stage 2 needs of it:
        the tower and the Q-Former.

    Raises ConfigError: heads of text on a Q-Former without its text part; a share that is none.
    """

    vision: VisionConfig = field(default_factory=vit_large)
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    projection_dim: int = 256
    ln_vision_eps: float = 1e-5
    image_dropout: float = 0.0
    freeze_vision: bool = True
    encoder: bool = True
    decoder: bool = True

    def __post_init__(self) -> None:
        if (self.encoder or self.decoder) and not self.qformer.text:
            raise ConfigError(
                "encoder and decoder need the Q-Former's text part: set qformer.text, or leave both out"
            )
        if not 0 <= self.image_dropout < 1:
            raise ConfigError(f"image_dropout is a share, 0 or more and below 1, got {self.image_dropout}")

    @property
    def text(self) -> QFormerConfig:
        """What the tokenizer must agree with."""
        return self.qformer


class Blip2(TowerModel):
    """Frozen image encoder, Q-Former and the three heads of stage 1."""

    def __init__(self, config: Blip2Config) -> None:
        super().__init__(config)
        width, hidden = config.vision.output_size, config.qformer.hidden_size
        # Belongs to the bridge: trained even when the tower is not.
        self.ln_vision = nn.LayerNorm(width, eps=config.ln_vision_eps)
        self.qformer = QFormer(config.qformer, encoder_width=width)
        if config.encoder:
            self.vision_proj = nn.Linear(hidden, config.projection_dim)
            self.text_proj = nn.Linear(hidden, config.projection_dim)
            self.itm_head = nn.Linear(hidden, 2)
            self.temperature = nn.Parameter(torch.tensor(0.07))
            for head in (self.vision_proj, self.text_proj, self.itm_head):
                head.apply(init_weights)
        if config.decoder:
            self.lm_head = LanguageModelHead(config.qformer)

    def memory(self, image_embeds: Tensor) -> Memory:
        """image_embeds [B, N, D] -> keys and values of every layer that looks at them, for every use."""
        tokens = self.ln_vision(image_embeds)
        if self.training and self.config.image_dropout:
            channels = tokens.new_ones(*tokens.shape[:-2], 1, tokens.shape[-1])
            tokens = tokens * F.dropout(channels, self.config.image_dropout)
        return self.qformer.memory(tokens)

    encoder_memory = decoder_memory = memory

    def image_features(self, image_embeds: Tensor) -> Tensor:
        """image_embeds [B, N, D] -> [B, Q, P]: every query's output projected, L2-normalised."""
        return self.project_queries(self.qformer.encode_queries(self.memory(image_embeds)))

    def project_queries(self, states: Tensor) -> Tensor:
        """Query states [B, Q, D] -> image features [B, Q, P]."""
        return F.normalize(self.vision_proj(states), dim=-1)

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """input_ids [R, L] -> [R, P]: [CLS] state projected, L2-normalised."""
        ids = swap_first_token(input_ids, self.config.qformer.cls_token_id)
        return F.normalize(self.text_proj(self.qformer.encode_text(ids, attention_mask)[:, 0]), dim=-1)

    def similarity(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """[B, Q, P], [R, P] -> cosines [B, R]: that of the query that fits the text best (BLIP-2 §3.2)."""
        return (image_features.flatten(0, 1) @ text_features.T).unflatten(0, image_features.shape[:2]).amax(1)

    def itm_logits(self, memory: Memory, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """input_ids [R, L] against their images -> [R, 2], the mean over queries; class 1 = match."""
        ids = swap_first_token(input_ids, self.config.qformer.cls_token_id)
        states = self.qformer.encode_both(memory, ids, attention_mask)
        return self.itm_head(states[:, : self.config.qformer.num_query_tokens]).mean(dim=1)

    def lm_states(self, cache: Cache, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Decoder states [R, L, D] of input_ids [R, L] after what `cache` holds: queries, then text so far.

        Position 0 of the text becomes [DEC].
        """
        if cache.length == self.config.qformer.num_query_tokens:
            input_ids = swap_first_token(input_ids, self.config.qformer.dec_token_id)
        return self.qformer.decode(input_ids, attention_mask, cache)

    def lm_logits(self, states: Tensor) -> Tensor:
        """Decoder states [..., D] -> next-token logits [..., V]. Call it on the positions that are needed."""
        return self.lm_head(states, self.qformer.word.weight)

    def generate(
        self,
        memory: Memory,
        prompt_ids: Tensor,
        config: GenerationConfig | None = None,
        *,
        seeds: Sequence[int] | None = None,
    ) -> Generated:
        """Captions from the Q-Former itself: continue prompt_ids [B, L], as `Blip.generate` does."""
        text = self.config.qformer
        return generate(
            self.decoding_step(memory),
            swap_first_token(prompt_ids, text.dec_token_id),
            config or GenerationConfig(),
            eos_token_id=text.sep_token_id,
            pad_token_id=text.pad_token_id,
            seeds=seeds,
        )

    def decoding_step(self, memory: Memory):
        """The `step(ids, parents) -> logits` that `generation` runs on; the image is seen once, by the queries."""
        cache = Cache(self.config.qformer.num_hidden_layers)
        self.qformer.encode_queries(memory, cache=cache)

        def step(ids: Tensor, parents: Tensor | None) -> Tensor:
            if parents is not None:
                cache.reorder_(parents)
            return self.lm_logits(self.lm_states(cache, ids)[:, -1])

        return step


def without_decoder(model: Blip2) -> Blip2:
    """What matches and embeds of a model as a model of its own, sharing no tensor with it."""
    return _part_of(model, replace(model.config, decoder=False))


def without_heads(model: Blip2, *, keep_text: bool = False) -> Blip2:
    """Tower and Q-Former of a model as a model of its own; what only text needs goes too, unless `keep_text`."""
    qformer = replace(model.config.qformer, text=keep_text)
    return _part_of(model, replace(model.config, qformer=qformer, encoder=False, decoder=False))


def _part_of(model: Blip2, config: Blip2Config) -> Blip2:
    some = next(model.parameters())
    part = Blip2(config).to(some.device, some.dtype).train(model.training)
    wanted = part.state_dict().keys()
    part.load_state_dict({name: value for name, value in model.state_dict().items() if name in wanted})
    return part
