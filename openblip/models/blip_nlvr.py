"""BLIP for NLVR2: is this sentence true of these two images?

Each cross-attention block is twinned: one attention per image, merged by a mean in the lower half of the
layers and by a learned linear map in the upper half (BLIP §5.4 and its released code). Head on the [ENC]
state. Shapes: B pairs of images, N image tokens, L text tokens, D width.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from openblip.models.layers import KeyValue, init_weights
from openblip.models.memory import Memory
from openblip.models.text import Residual, TextConfig, TextTransformer, swap_first_token
from openblip.models.tower import TowerModel
from openblip.models.vit import VisionConfig, vit_base


@dataclass
class BlipNlvrConfig:
    """Geometry of an NLVR2 model; the paper's is ViT-B/16 at 384 px with drop path 0.1."""

    vision: VisionConfig = field(default_factory=lambda: vit_base(384, drop_path_rate=0.1))
    text: TextConfig = field(default_factory=TextConfig)
    freeze_vision: bool = False


class TwinCrossAttentionBlock(nn.Module):
    """Two cross-attentions, one per image, merged, then one residual LayerNorm."""

    def __init__(self, config: TextConfig, encoder_width: int, *, merge: bool) -> None:
        super().__init__()
        self.left, self.right = (config.attention(encoder_width) for _ in range(2))
        self.merge = nn.Linear(2 * config.hidden_size, config.hidden_size) if merge else None
        self.residual = Residual(config)

    def project(self, memory: Tensor) -> tuple[KeyValue, KeyValue]:
        """[2B, N, encoder_width], all left images then all right ones -> keys and values of both."""
        left, right = memory.chunk(2)
        return self.left.project(left), self.right.project(right)

    def forward(
        self,
        x: Tensor,
        memory: tuple[KeyValue, KeyValue],
        mask: Tensor | None,
        weights: list[Tensor] | None,
        shares: list[int] | None = None,
    ) -> Tensor:
        """x [B, L, D] -> [B, L, D]."""
        left = self.left(x, memory=memory[0], mask=mask, weights=weights, shares=shares)[0]
        right = self.right(x, memory=memory[1], mask=mask, weights=weights, shares=shares)[0]
        y = (left + right) / 2 if self.merge is None else self.merge(torch.cat([left, right], dim=-1))
        return self.residual(x, y)


class BlipNlvr(TowerModel):
    """Twin cross-attention over two images, binary head."""

    def __init__(self, config: BlipNlvrConfig) -> None:
        super().__init__(config)
        text, width = config.text, config.vision.output_size

        def twin(number: int) -> TwinCrossAttentionBlock:
            return TwinCrossAttentionBlock(text, width, merge=number >= text.num_hidden_layers // 2)

        self.text_encoder = TextTransformer(text, cross_block=twin)
        self.cls_head = nn.Sequential(
            nn.Linear(text.hidden_size, text.hidden_size), nn.ReLU(), nn.Linear(text.hidden_size, 2)
        )
        self.cls_head.apply(init_weights)

    def memory(self, image_embeds: Tensor) -> Memory:
        """image_embeds [2B, N, D], all left then all right -> keys and values of both, every layer."""
        return self.text_encoder.memory(image_embeds)

    def logits(self, memory: Memory, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Sentences [B, L] -> [B, 2]; class 1 = true."""
        ids = swap_first_token(input_ids, self.config.text.enc_token_id)
        return self.cls_head(self.text_encoder(ids, attention_mask, memory)[:, 0])
