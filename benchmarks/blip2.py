"""BLIP-2 beside its peers, paired in one process on the same random weights: ratios of time, medians.

    python benchmarks/blip2.py [--runs 5] [--only stage1 stage2 caption]

stage1    one training step against the released code's way: every pass projects the image anew, texts padded to 32
stage2    one training step on cached features against one that runs the frozen tower
caption   5 beams against transformers' Blip2ForConditionalGeneration, after a check that both write the same ids

Above 1, ours takes less time. The last line is the peak memory of a stage 2 step of 16 pairs, in a process of its own.
"""

import argparse
import gc
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openblip.hub import save_for_transformers
from openblip.models.blip2 import Blip2, Blip2Config
from openblip.models.blip2_llm import Blip2Llm, Blip2LlmConfig
from openblip.models.generation import GenerationConfig
from openblip.models.lm import LmConfig
from openblip.models.qformer import QFormerConfig
from openblip.models.vit import VisionConfig
from openblip.recipes.blip2 import blip2_stage1_small
from openblip.train.objectives import hard_negatives, labelled_positions, next_token_labels
from openblip.train.tasks_blip2 import Blip2LlmTask, Blip2LlmTaskConfig, Blip2Task, Blip2TaskConfig

# SmolLM2-135M's geometry; its weights do not matter here.
SMOLLM2 = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 2048,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip
VIT_L = VisionConfig(
    image_size=224, patch_size=14, hidden_size=1024, num_hidden_layers=23, num_attention_heads=16,
    intermediate_size=4096, final_norm=False, layer_norm_eps=1e-5,
)  # fmt: skip


def paired(name: str, theirs: Callable[[], object], ours: Callable[[], object], runs: int) -> None:
    """Print theirs / ours, run by run in turn: median, minimum, maximum."""
    ratios = []
    for run in range(runs + 1):  # the first warms up
        times = []
        for call in (theirs, ours):
            gc.collect()
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        if run:
            ratios.append(times[0] / times[1])
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"{name:56}{statistics.median(ratios):6.2f}  ({spread})", flush=True)


def texts(rows: int, vocabulary: int = 30000) -> tuple[Tensor, Tensor]:
    """Captions as they come: 8 to 17 tokens, padded to the longest -> ids, mask [R, L]."""
    lengths = 8 + torch.arange(rows) % 10
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return torch.randint(1000, vocabulary, mask.shape) * mask, mask


def pairs(rows: int, vision: VisionConfig) -> dict[str, Tensor]:
    """A batch for stage 1, pixels and all."""
    ids, mask = texts(rows)
    pixels = torch.randn(rows, 3, vision.image_size, vision.image_size)
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask, "image_ids": torch.arange(rows)}


def released_losses(model: Blip2, embeds: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Stage 1 as LAVIS's blip2_qformer computes it: ITM projects 3B images, all texts are padded to 32 tokens."""
    from openblip.models.text import Cache

    ids, mask = (F.pad(x, (0, 32 - x.shape[1])) for x in (ids, mask))
    cache, rows = Cache(model.config.qformer.num_hidden_layers), len(ids)
    states = model.qformer.encode_queries(model.memory(embeds), cache=cache)
    logits = (
        model.similarity(model.project_queries(states), model.text_features(ids, mask)) / model.temperature
    )
    labels = torch.arange(rows)
    smoothing = {"label_smoothing": 0.1}
    itc = (F.cross_entropy(logits, labels, **smoothing) + F.cross_entropy(logits.T, labels, **smoothing)) / 2
    own = torch.eye(rows, dtype=torch.bool)
    text, _ = hard_negatives(logits, own)
    image, _ = hard_negatives(logits.T, own)
    every = torch.cat([embeds, embeds[image], embeds])
    every_ids, every_mask = torch.cat([ids, ids, ids[text]]), torch.cat([mask, mask, mask[text]])
    found = model.itm_logits(model.memory(every), every_ids, every_mask)
    itm = F.cross_entropy(found, torch.cat([torch.ones(rows), torch.zeros(2 * rows)]).long())
    wanted, words = labelled_positions(next_token_labels(ids, mask))
    every_logits = model.lm_logits(model.lm_states(cache, ids, mask))[:, :-1]  # at padding too
    itg = F.cross_entropy(every_logits[wanted], words, label_smoothing=0.1)
    return itc + itm + itg


def stage1(runs: int) -> None:
    """The paper's Q-Former on ViT-L's tokens, and the small recipe's."""
    small = blip2_stage1_small().blip2
    assert small is not None
    for name, config, rows in (("ViT-L, BERT-base", Blip2Config(VIT_L), 8), ("small recipe", small, 32)):
        model = Blip2(config).train()
        task, batch = Blip2Task(model, Blip2TaskConfig()), pairs(rows, config.vision)
        tokens = 1 + (config.vision.image_size // config.vision.patch_size) ** 2
        batch["image_embeds"] = torch.randn(rows, tokens, config.vision.hidden_size)

        def ours(task=task, batch=batch) -> None:
            task.begin_step(0)
            with torch.autocast("cpu", torch.bfloat16):
                loss = torch.stack(list(task(batch).values())).sum()
            loss.backward()

        def theirs(model=model, batch=batch) -> None:
            with torch.autocast("cpu", torch.bfloat16):
                given = batch["image_embeds"], batch["input_ids"], batch["attention_mask"]
                loss = released_losses(model, *given)
            loss.backward()

        paired(f"stage 1 step, {name}, batch {rows}, bf16, cached features", theirs, ours, runs)


def stage2_task(rows: int) -> tuple[Blip2LlmTask, dict[str, Any]]:
    """The small recipe's stage 2, without the heads of stage 1, and a batch."""
    small = blip2_stage1_small().blip2
    assert small is not None
    qformer = QFormerConfig(**{**vars(small.qformer), "text": False})
    stage1 = Blip2Config(small.vision, qformer, encoder=False, decoder=False)
    model = Blip2Llm(Blip2LlmConfig(LmConfig(dict(SMOLLM2)), stage1)).train()
    model.lm.model.to(torch.bfloat16)
    batch = pairs(rows, small.vision)
    batch["labels"] = next_token_labels(batch["input_ids"], batch["attention_mask"])
    return Blip2LlmTask(model, Blip2LlmTaskConfig()), batch


def step(task: Blip2LlmTask, batch: dict[str, Any]) -> None:
    """Forward and backward."""
    task.begin_step(0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = task(batch)["lm"]
    loss.backward()


def stage2(runs: int, rows: int = 16) -> None:
    """What caching the frozen tower's features saves."""
    task, batch = stage2_task(rows)
    with torch.no_grad():
        cached = {**batch, "image_embeds": task.model.encode_image(batch["pixel_values"])}
    name = f"stage 2 step, small recipe, batch {rows}, bf16, cached features"
    paired(name, lambda: step(task, batch), lambda: step(task, cached), runs)


def caption(runs: int, rows: int = 4, tokens: int = 20) -> None:
    """ViT-L + Q-Former + 135M language model, 5 beams: the whole call, and what comes after the tower."""
    from transformers import Blip2ForConditionalGeneration

    torch.manual_seed(0)
    lm = {**SMOLLM2, "image_token_index": SMOLLM2["vocab_size"] - 1}
    stage1 = Blip2Config(VIT_L, QFormerConfig(text=False), encoder=False, decoder=False)
    model = Blip2Llm(Blip2LlmConfig(LmConfig(lm), stage1)).eval()
    with tempfile.TemporaryDirectory() as folder:
        save_for_transformers(model, folder)
        peer = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    pixels, prompt = torch.randn(rows, 3, 224, 224), torch.full((rows, 1), 1)
    theirs_prompt = torch.cat([torch.full((rows, 32), lm["image_token_index"]), prompt], dim=1)
    settings = GenerationConfig(num_beams=5, max_new_tokens=tokens, min_new_tokens=tokens)

    @torch.inference_mode()
    def ours() -> Tensor:
        soft = model.soft_prompt(model.encode_image(pixels.to(model.projection.weight.dtype)))
        return model.generate(soft, prompt, config=settings).sequences

    @torch.inference_mode()
    def theirs() -> Tensor:
        return peer.generate(
            pixel_values=pixels.to(peer.dtype), input_ids=theirs_prompt,
            attention_mask=torch.ones_like(theirs_prompt),
            num_beams=5, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
        )  # fmt: skip

    assert torch.equal(ours(), theirs()[:, -tokens:]), "both must write the same before they are timed"
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        peer.to(dtype)
        paired(f"caption, ViT-L + 135M, 5 beams, batch {rows}, {str(dtype)[6:]}", theirs, ours, runs)


def memory() -> None:
    """Peak memory of this process after two stage 2 steps of 16 pairs, in GB."""
    task, batch = stage2_task(16)
    optimizer = torch.optim.AdamW([weight for weight in task.parameters() if weight.requires_grad])
    for _ in range(2):
        step(task, batch)
        optimizer.step()
    per_gb = 2**30 if sys.platform == "darwin" else 2**20
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / per_gb:.2f}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=["stage1", "stage2", "caption", "memory"])
    options = parser.parse_args()
    if options.only == ["memory-here"]:
        memory()
        return
    for name in options.only:
        if name == "memory":
            command = [sys.executable, __file__, "--only", "memory-here"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            print(f"{'peak memory of a stage 2 step, batch 16, GB':56}{float(done.stdout):6.2f}")
        else:
            {"stage1": stage1, "stage2": stage2, "caption": caption}[name](options.runs)


if __name__ == "__main__":
    main()
