"""Rows to batches for a language model: captions, prefix-LM halves, instructions.

A sample has a prompt, which the model reads, and a text, which it is to write; how both become ids and labels is
`LmTokenizer.training`'s affair.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from openblip.data.collate import Batch, PairDataset, Pictures, Sample, picture_tensors
from openblip.data.prompts import LmTokenizer, split_for_prefix_lm
from openblip.data.rows import BadRow
from openblip.data.text import Tokenizer, clean_caption


@dataclass(frozen=True)
class PrefixDataset(PairDataset):
    """A picture and a caption cut in two at random, for an encoder-decoder model (BLIP-2 §3.3)."""

    def get(self, index: int, rng: np.random.Generator) -> Sample:
        """A pair's sample, with the caption's first part as "prompt", its second as "text", all of it as "caption"."""
        sample = super().get(index, rng)
        prompt, text = split_for_prefix_lm(sample["text"], rng)
        return {**sample, "prompt": prompt, "text": text, "caption": sample["text"]}


@dataclass(frozen=True)
class InstructDataset(Pictures):
    """A picture, what is asked about it, and an answer (InstructBLIP §2.1).

    Rows have the columns `instruction`, `output` (a text, or several to draw one from) and, where the instruction is
    general, `input`: what it is applied to, put below it.
    """

    def get(self, index: int, rng: np.random.Generator) -> Sample:
        """{"pixel_values" or "image_embeds", "prompt", "text", "id"}.

        Raises:
            BadRow: the row or its picture cannot be used, or it has no instruction or no output.
        """
        row = self.rows[index]
        outputs = row.extra.get("output") or []
        outputs = [outputs] if isinstance(outputs, str) else list(outputs)
        outputs = [text for text in outputs if str(text).strip()]
        parts = [str(row.extra.get(name) or "").strip() for name in ("instruction", "input")]
        if not any(parts):
            raise BadRow("missing_instruction", row.where, "no instruction and no input in the row")
        if not outputs:
            raise BadRow("missing_output", row.where, "no output in the row")
        text = str(outputs[rng.integers(len(outputs))])
        prompt = "\n".join(part for part in parts if part)
        return {**self.picture(row, rng), "prompt": prompt, "text": text, "id": row.id}


@dataclass(frozen=True)
class LmCollator:
    """Samples -> the pictures, and input_ids, attention_mask, labels (see `LmTokenizer.training`): a row for each
    picture, or for each of its "texts", picture by picture.

    prompt: for samples that bring none. max_prompt, max_target: in tokens. qformer: the Q-Former's tokenizer, for
    batches that have a text once more in its vocabulary: what `reads` says, the "prompt" as qformer_ids, qformer_mask
    [B, L'] (InstructBLIP), or the "caption" as text_ids, text_mask, with image_ids [B] (stage 1 beside stage 2).
    """

    tokenizer: LmTokenizer
    prompt: str = ""
    max_prompt: int = 128
    max_target: int = 32
    qformer: Tokenizer | None = None
    reads: Literal["prompt", "caption"] = "prompt"

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """One batch."""
        prompts = [sample.get("prompt", self.prompt) for sample in samples]
        texts = [sample.get("texts", [sample["text"]]) for sample in samples]
        written = self.tokenizer.training(
            [prompt for prompt, several in zip(prompts, texts, strict=True) for _ in several],
            [text for several in texts for text in several],
            max_prompt=self.max_prompt,
            max_target=self.max_target,
        )
        batch = {**picture_tensors(samples), **written}
        if self.qformer is None:
            return batch
        if self.reads == "prompt":
            read = self.qformer(prompts, self.max_prompt, keep="end")
            return {**batch, "qformer_ids": read["input_ids"], "qformer_mask": read["attention_mask"]}
        captions = [sample["caption"] if "caption" in sample else sample["text"] for sample in samples]
        read = self.qformer([clean_caption(text) for text in captions], self.max_target)
        image_ids = torch.tensor([sample["image_id"] for sample in samples])
        return {
            **batch,
            "text_ids": read["input_ids"],
            "text_mask": read["attention_mask"],
            "image_ids": image_ids,
        }
