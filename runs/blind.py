"""What a language model says of pictures that it is not shown: the floor under BLIP-2's captions.

    python runs/blind.py DATA MODEL --split val

MODEL: a stage 2 of BLIP-2. Its language model alone goes on with a prompt, and that sentence is taken as the caption
of every picture of DATA. Prints the scores and the sentence as JSON.
"""

import json
from pathlib import Path

import torch
import tyro

import openblip
from openblip.api_llm import LlmPipeline
from openblip.config import UserError
from openblip.data.sources import open_source
from openblip.eval.captions import caption_scores
from openblip.models.generation import GenerationConfig


def main(
    data: tyro.conf.Positional[str],
    model: tyro.conf.Positional[Path],
    split: str | None = None,
    prompt: str = "A photo of",
) -> None:
    """Caption every picture of `data` with one sentence.

    Args:
        data: pictures with captions.
        model: folder of a stage 2, whose language model is asked.
        split: of the data.
        prompt: what the sentence begins with.
    """
    pipeline = openblip.load(model)
    if not isinstance(pipeline, LlmPipeline):
        raise UserError(f"{model}: has no language model to ask")
    words, bridge = pipeline.lm_tokenizer, pipeline.model
    nothing = torch.zeros(1, 0, bridge.lm.hidden_size)
    options = GenerationConfig(num_beams=5, max_new_tokens=30, min_new_tokens=1)
    written = bridge.generate(nothing, torch.tensor([words.encode(prompt)]), None, options).sequences[0]
    sentence = f"{prompt} {words.decode(written)}"
    references = {row.id: row.captions for row in open_source(data, split=split)}
    scores = caption_scores(dict.fromkeys(references, sentence), references)
    print(json.dumps({**scores, "caption": sentence}, indent=2))


if __name__ == "__main__":
    tyro.cli(main)
