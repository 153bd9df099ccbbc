"""What a user holds: `load(name)` gives a Pipeline that captions, matches, answers, embeds and localises.

It is `api_blip.Pipeline`; where a language model does the talking, `api_llm.LlmPipeline`; for BLIP-3, which holds
conversations about any number of pictures, `api_chat.ChatPipeline`: the same calls.
"""

from pathlib import Path

import torch

from openblip.api_arguments import generation_config, row_seeds
from openblip.api_blip import DTYPES, Localization, Match, Pipeline
from openblip.api_chat import ChatPipeline
from openblip.api_llm import LlmPipeline
from openblip.api_talk import Talk
from openblip.config import UserError
from openblip.hub import load_pretrained
from openblip.models.blip2_llm import Blip2Llm
from openblip.models.blip3 import Blip3

__all__ = [
    "ChatPipeline", "LlmPipeline", "Localization", "Match", "Pipeline", "Talk",
    "generation_config", "load", "row_seeds",
]  # fmt: skip


def load(
    name: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str = "fp32",
    batch_size: int = 16,
    vision: str | Path | None = None,
    lm: str | Path | None = None,
) -> Pipeline:
    """Load a model folder (ours or transformers'), a hub name or a file of original weights.

    device: where it runs; a GPU if there is one. dtype: "fp32", or "bf16" (faster where the processor has it), or
    "int8" for a model with a language model, whose linear layers then have 8 bits, and all else is bf16.
    vision, lm: image tower and language model of an original BLIP-2 file, see `hub.load_pretrained`. Raises UserError
    for a name that is no model, an unknown dtype, a batch_size below 1, or a model this class cannot run.
    """
    if dtype not in (*DTYPES, "int8"):
        raise UserError(f'dtype must be "fp32", "bf16" or "int8", not {dtype!r}')
    if batch_size < 1:
        raise UserError(f"batch_size is at least 1, got {batch_size}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    stored = torch.float32 if dtype == "fp32" else torch.bfloat16  # a large model never stands there twice
    found = load_pretrained(name, dtype=stored, vision=vision, lm=lm)
    kinds: dict[type, type[Pipeline]] = {Blip2Llm: LlmPipeline, Blip3: ChatPipeline}
    kind = kinds.get(type(found.model), Pipeline)
    return kind(found, device=device, dtype=dtype, batch_size=batch_size)
