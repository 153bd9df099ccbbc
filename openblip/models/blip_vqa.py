"""BLIP for visual question answering: an encoder reads the question over the image, a decoder reads that.

    image ─ vision ─ memory ─┐
    [ENC] question ─ text_encoder ─ question states ─ memory ─┐
    [DEC] answer   ─ text_decoder, causal ────────────────────┴─ next word        (BLIP §5.3)

The decoder attends to the question states, so its `encoder_width` is the text width even for ViT-L, and
encoder and decoder share nothing. Shapes: B questions (one image each), R rows of answers, L tokens, C
candidates.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from openblip.models.generation import Generated, GenerationConfig, generate, sequence_log_likelihood
from openblip.models.memory import Memory
from openblip.models.text import (
    Cache,
    LanguageModelHead,
    TextConfig,
    TextTransformer,
    swap_first_token,
)
from openblip.models.tower import TowerModel
from openblip.models.vit import VisionConfig, vit_base


@dataclass
class BlipVqaConfig:
    """Geometry of a VQA model; the paper's is ViT-B/16 at 480 px with drop path 0.1."""

    vision: VisionConfig = field(default_factory=lambda: vit_base(480, drop_path_rate=0.1))
    text: TextConfig = field(default_factory=TextConfig)
    freeze_vision: bool = False


class BlipVqa(TowerModel):
    """Question encoder over the image, answer decoder over the question."""

    def __init__(self, config: BlipVqaConfig) -> None:
        super().__init__(config)
        self.text_encoder = TextTransformer(config.text, encoder_width=config.vision.output_size)
        self.text_decoder = TextTransformer(config.text, encoder_width=config.text.hidden_size)
        self.lm_head = LanguageModelHead(config.text)

    def question_memory(
        self, image_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Memory:
        """image_embeds [B, N, D], questions [B, L] -> what the answer decoder attends to, padding masked."""
        ids = swap_first_token(input_ids, self.config.text.enc_token_id)
        states = self.text_encoder(ids, attention_mask, self.text_encoder.memory(image_embeds))
        return self.text_decoder.memory(states, attention_mask)

    def lm_states(
        self,
        memory: Memory,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cache: Cache | None = None,
    ) -> Tensor:
        """Answer decoder states [R, L, D]; position 0 becomes [DEC] unless the cache holds it already."""
        if cache is None or cache.length == 0:
            input_ids = swap_first_token(input_ids, self.config.text.dec_token_id)
        return self.text_decoder(input_ids, attention_mask, memory, causal=True, cache=cache)

    def lm_logits(self, states: Tensor) -> Tensor:
        """Decoder states [..., D] -> next-token logits [..., V]."""
        return self.lm_head(states, self.text_decoder.embeddings.word.weight)

    def generate(self, memory: Memory, config: GenerationConfig | None = None) -> Generated:
        """Free answers. The released code's default is beam 3, at most 10 tokens, at least 1."""
        text = self.config.text
        cache = Cache(text.num_hidden_layers)
        questions = len(memory.layers[0][0])

        def step(ids: Tensor, parents: Tensor | None) -> Tensor:
            if parents is not None:
                cache.reorder_(parents)
            return self.lm_logits(self.lm_states(memory, ids, cache=cache)[:, -1])

        prompt = torch.full((questions, 1), text.dec_token_id, device=memory.layers[0][0].device)
        config = config or GenerationConfig(num_beams=3, max_new_tokens=9, min_new_tokens=1)
        return generate(step, prompt, config, eos_token_id=text.sep_token_id, pad_token_id=text.pad_token_id)

    def rank(
        self,
        memory: Memory,
        answer_ids: Tensor,
        answer_mask: Tensor,
        *,
        k: int = 128,
        label_smoothing: float = 0.1,
    ) -> Tensor:
        """Which of C candidate answers [C, L] ([CLS] a b [SEP], padded) fits each question -> index [B].

        The released code's two steps: the k candidates with the likeliest first token, then the summed loss
        of each (label smoothing is on there too, so it is here).
        """
        text = self.config.text
        questions, candidates = len(memory.layers[0][0]), len(answer_ids)
        k = min(k, candidates)
        start = torch.full((questions, 1), text.dec_token_id, device=answer_ids.device)
        first = self.lm_logits(self.lm_states(memory, start)[:, 0]).softmax(dim=-1)  # [B, V]
        shortlist = first[:, answer_ids[:, 1]].topk(k, dim=1).indices  # [B, k]
        ids, mask = answer_ids[shortlist].flatten(0, 1), answer_mask[shortlist].flatten(0, 1)  # [B·k, L]
        logits = self.lm_logits(self.lm_states(memory, ids, mask)[:, :-1])
        labels = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        scores = sequence_log_likelihood(logits, labels, label_smoothing=label_smoothing).view(questions, k)
        return shortlist.gather(1, scores.argmax(dim=1, keepdim=True)).squeeze(1)
