"""BLIP-2 beside its peers, on the same random weights of the real geometry.

    python benchmarks/blip2.py [--only stage1 stage2 stage2_captions caption2] [--runs 5] [--quick] [--clock cpu]

stage1     one training step against the released code's way: every pass projects the image anew, texts padded to 32
stage2     one training step on cached features against one that runs the frozen tower
stage2_captions  one on all captions of each picture against transformers, to which each is a row
caption2   5 beams against transformers' Blip2ForConditionalGeneration, and both behind the vision tower alone
"""

import tempfile
from dataclasses import replace
from typing import Any

import torch
from blip import named, texts
from lavis import stage1_as_released
from paired import Bench, close, main, same_ids
from torch import Tensor

from openblip.hub import save_for_transformers
from openblip.models.blip2 import Blip2, Blip2Config
from openblip.models.blip2_llm import Blip2Llm, Blip2LlmConfig
from openblip.models.generation import GenerationConfig
from openblip.models.lm import LmConfig
from openblip.models.packed import pack_
from openblip.models.qformer import QFormerConfig
from openblip.models.vit import VisionConfig
from openblip.recipes.blip2 import blip2_stage1_small
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


def pairs(rows: int, vision: VisionConfig) -> dict[str, Tensor]:
    """A batch for stage 1, pixels and all."""
    ids, mask = texts(rows)
    pixels = torch.randn(rows, 3, vision.image_size, vision.image_size)
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask, "image_ids": torch.arange(rows)}


def small_parts(bench: Bench) -> tuple[VisionConfig, QFormerConfig]:
    """The small recipe's tower and Q-Former."""
    found = blip2_stage1_small().blip2
    assert found is not None
    if not bench.quick:
        return found.vision, found.qformer
    tiny = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    return VisionConfig(32, layer_norm_eps=1e-5, final_norm=False, **tiny), QFormerConfig(30524, **tiny)


def summed(losses: dict[str, Tensor]) -> Tensor:
    """The loss [] that a step follows; its gradients are made here."""
    total = torch.stack([loss.float() for loss in losses.values()]).sum()
    total.backward()
    return total.detach()


def step(task: Blip2Task | Blip2LlmTask, batch: dict[str, Any]) -> Tensor:
    """The loss [] of a step of ours in bf16, its optimizer left out."""
    task.zero_grad()
    task.begin_step(0)
    with torch.autocast("cpu", torch.bfloat16):
        losses = task(batch)
    return summed(losses)


def stage1(bench: Bench) -> None:
    """The paper's Q-Former on ViT-L's tokens, and the small recipe's; no dropout, so that losses can be compared."""
    small = Blip2Config(*small_parts(bench))
    paper = small if bench.quick else Blip2Config(VIT_L)
    for name, config, rows in (("ViT-L, BERT-base", paper, 8), ("small recipe", small, 32)):
        task = Blip2Task(Blip2(config), Blip2TaskConfig()).eval()
        rows = bench.batch(rows)
        batch = pairs(rows, config.vision)
        tokens = 1 + (config.vision.image_size // config.vision.patch_size) ** 2
        batch["image_embeds"] = torch.randn(rows, tokens, config.vision.output_size)

        def ours(task=task, batch=batch) -> Tensor:
            return step(task, batch)

        def theirs(task=task, batch=batch) -> Tensor:
            task.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                given = batch["image_embeds"], batch["input_ids"], batch["attention_mask"]
                losses = stage1_as_released(task.model, *given)
            return summed({"all": losses})

        where = f"stage 1 step, {name}, batch {rows}, bf16, cached features"
        bench.paired(where, theirs, ours, close(0.05), dtype=torch.bfloat16)


def stage2_task(
    bench: Bench, vision: VisionConfig, qformer: QFormerConfig, rows: int
) -> tuple[Blip2LlmTask, dict[str, Any]]:
    """Stage 2 on a tower and a Q-Former without the heads of stage 1, and a batch."""
    stage1 = Blip2Config(vision, replace(qformer, text=False), encoder=False, decoder=False)
    lm = small_lm() if bench.quick else dict(SMOLLM2)
    model = Blip2Llm(Blip2LlmConfig(LmConfig(lm), stage1))
    model.lm.model.to(torch.bfloat16)
    batch = pairs(rows, vision)
    batch["input_ids"] %= lm["vocab_size"]
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return Blip2LlmTask(model, Blip2LlmTaskConfig()).eval(), batch


def small_lm() -> dict[str, Any]:
    """SmolLM2, but tiny."""
    tiny = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 3}
    return {**SMOLLM2, **tiny, "intermediate_size": 96, "vocab_size": 512}


def stage2(bench: Bench, rows: int = 16) -> None:
    """What caching the frozen tower's features saves, on ViT-L and in the small recipe."""
    small = small_parts(bench)
    rows = bench.batch(rows)
    for name, parts in (
        ("ViT-L, BERT-base", small if bench.quick else (VIT_L, QFormerConfig())),
        ("small recipe", small),
    ):
        task, batch = stage2_task(bench, *parts, rows)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            cached = {**batch, "image_embeds": task.model.encode_image(batch["pixel_values"])}
        where = f"stage 2 step, {name}, 135M, batch {rows}, bf16, cached features"
        calls = [lambda batch=batch, task=task: step(task, batch) for batch in (batch, cached)]
        bench.paired(where, *calls, close(0.05), dtype=torch.bfloat16)


def stage2_captions(bench: Bench, rows: int = 16, captions: int = 5) -> None:
    """A stage 2 step on cached features and all captions of a picture, each of which is a row to transformers."""
    from transformers import Blip2ForConditionalGeneration

    vision, qformer = small_parts(bench) if bench.quick else (VIT_L, QFormerConfig())
    task, batch = stage2_task(bench, vision, qformer, bench.batch(rows))
    model, rows = task.model, len(batch["pixel_values"])
    image_token = model.lm.vocab_size - 1
    ids, mask = texts(rows * captions)
    ids %= image_token
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        embeds = model.encode_image(batch["pixel_values"])
    ours_batch = {"image_embeds": embeds, "input_ids": ids, "attention_mask": mask, "labels": labels}

    model.config.lm.config["image_token_index"] = image_token
    with tempfile.TemporaryDirectory() as folder:
        save_for_transformers(model, folder)
        peer = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    peer.language_model.to(torch.bfloat16).requires_grad_(False)
    peer.vision_model.requires_grad_(False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        seen = peer.vision_model(batch["pixel_values"].repeat_interleave(captions, dim=0))
    peer.vision_model.forward = lambda *_, **__: seen
    queries = torch.full((len(ids), model.config.blip2.qformer.num_query_tokens), image_token)
    theirs_batch = {
        "pixel_values": batch["pixel_values"],
        "input_ids": torch.cat([queries, ids], dim=1),
        "attention_mask": torch.cat([torch.ones_like(queries), mask], dim=1),
        "labels": torch.cat([torch.full_like(queries, -100), labels], dim=1),
    }

    def ours() -> Tensor:
        return step(task, ours_batch)

    def theirs() -> Tensor:
        peer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = peer(**theirs_batch).loss
        return summed({"lm": loss})

    name = f"stage 2 step, BERT-base, 135M, {captions} captions of {rows} pictures, bf16, cached features"
    bench.paired(name, theirs, ours, close(0.05), dtype=torch.bfloat16)


def caption(bench: Bench, rows: int = 4, tokens: int = 20) -> None:
    """ViT-L + Q-Former + 135M language model, 5 beams. The ids are the same in fp32."""
    from transformers import Blip2ForConditionalGeneration

    torch.manual_seed(0)
    lm = small_lm() if bench.quick else dict(SMOLLM2)
    lm["image_token_index"] = lm["vocab_size"] - 1
    vision, qformer = small_parts(bench) if bench.quick else (VIT_L, QFormerConfig())
    stage1 = Blip2Config(vision, replace(qformer, text=False), encoder=False, decoder=False)
    model = Blip2Llm(Blip2LlmConfig(LmConfig(lm), stage1)).eval().requires_grad_(False)
    pack_(model)  # as `openblip.load` does
    with tempfile.TemporaryDirectory() as folder:
        save_for_transformers(model, folder)
        peer = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    peer.eval().requires_grad_(False)
    rows = bench.batch(rows)
    pixels, prompt = torch.randn(rows, 3, *[vision.image_size] * 2), torch.full((rows, 1), 1)
    queries = stage1.qformer.num_query_tokens
    theirs_prompt = torch.cat([torch.full((rows, queries), lm["image_token_index"]), prompt], dim=1)
    settings = GenerationConfig(num_beams=5, max_new_tokens=tokens, min_new_tokens=tokens)

    @torch.inference_mode()
    def ours(seen: Tensor | None = None) -> Tensor:
        soft = model.soft_prompt(model.encode_image(pixels.to(peer.dtype)) if seen is None else seen)
        return model.generate(soft, prompt, config=settings).sequences

    @torch.inference_mode()
    def theirs() -> Tensor:
        return peer.generate(
            pixel_values=pixels.to(peer.dtype), input_ids=theirs_prompt,
            attention_mask=torch.ones_like(theirs_prompt),
            num_beams=5, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
        )[:, -tokens:]  # fmt: skip

    for dtype in bench.precisions:
        model.to(dtype)
        peer.to(dtype)
        same = same_ids if dtype is torch.float32 else None
        name = f"caption, ViT-L + 135M, beam 5, batch {rows}, {named(dtype)}"
        bench.paired(name, theirs, ours, same, dtype=dtype)
        with torch.inference_mode():
            seen, tower = peer.vision_model(pixels.to(dtype)), peer.vision_model.forward
            embeds = model.encode_image(pixels.to(dtype))
        peer.vision_model.forward = lambda *_, seen=seen, **__: seen
        bench.paired(
            f"{name}, behind the tower", theirs, lambda embeds=embeds: ours(embeds), same, dtype=dtype
        )
        peer.vision_model.forward = tower


ROWS = {"stage1": stage1, "stage2": stage2, "stage2_captions": stage2_captions, "caption2": caption}

if __name__ == "__main__":
    main(__doc__, ROWS)
