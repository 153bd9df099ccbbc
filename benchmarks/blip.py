"""BLIP beside transformers' BLIP and the released code's way, on the same random weights of the real geometry.

    python benchmarks/blip.py [--only caption write rerank embed pretrain] [--runs 5] [--quick] [--clock cpu]

caption    8 images of 384 px, 3 beams, 20 tokens, and 20 tokens at most
write      greedy and nucleus, 1 image and 16
rerank     ITM of images with 64 texts each
embed      ITC vectors of JPEGs of 12 megapixels
pretrain   forward and backward of ITC + ITM + LM, 16 pairs of 224 px

ViT-B/16 and BERT-base. Peers run at their best: SDPA where they have it, cached keys and values, the same precision.
"""

import copy
import io
from typing import Any

import numpy as np
import torch
from lavis import rerank_as_released, step_as_released
from paired import Bench, close, drawn_anew_, main, same_ids
from PIL import Image
from torch import Tensor

from openblip.api import Pipeline
from openblip.convert.recognise import from_checkpoint_
from openblip.convert.weights import LoadReport
from openblip.data.text import bert_uncased
from openblip.data.transforms import ImageTransform
from openblip.hub import Pretrained
from openblip.models.blip import Blip, BlipConfig, blip_base
from openblip.models.generation import GenerationConfig
from openblip.models.packed import pack_
from openblip.models.text import TextConfig
from openblip.models.vit import VisionConfig
from openblip.train.tasks import BlipTask, BlipTaskConfig

CLS, SEP, DEC, ENC = 101, 102, 30522, 30523


def models(kind: str, quick: bool, side: int = 384) -> tuple[Any, Blip]:
    """A model of transformers, and ours with its weights."""
    import transformers

    small = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}
    text = {
        "vocab_size": 30524,
        "bos_token_id": DEC,
        "eos_token_id": SEP,
        "sep_token_id": SEP,
        "pad_token_id": 0,
    }
    config = transformers.BlipConfig(
        text_config={**text, "num_attention_heads": 12, **(small if quick else {})},
        vision_config={"image_size": pixels_of(side, quick), **(small if quick else {})},
        image_text_hidden_size=256,
    )
    torch.manual_seed(0)
    theirs = drawn_anew_(getattr(transformers, kind)(config))
    weights = {name: value.clone() for name, value in theirs.state_dict().items()}
    ours = from_checkpoint_(theirs.config.to_dict(), weights, "peer")[0]
    return theirs.requires_grad_(False), ours.requires_grad_(False)


def pixels_of(side: int, quick: bool) -> int:
    """A side in pixels."""
    return 32 if quick else side


def texts(rows: int) -> tuple[Tensor, Tensor]:
    """Captions as they come: 8 to 17 tokens, padded to the longest -> ids, mask [R, L]."""
    lengths = 8 + torch.arange(rows) % 10
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids = torch.randint(1000, 30000, mask.shape)
    ids[:, 0] = CLS
    ids[torch.arange(rows), lengths - 1] = SEP
    return ids * mask, mask


def named(dtype: torch.dtype) -> str:
    """As people write it."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def written(theirs: Any, ours: Blip, images: Tensor, dtype: torch.dtype, **options: Any) -> tuple[Any, Any]:
    """Calls that write captions of images: ids [B, T] without the first token, padded to what was asked for."""
    pixels, prompts = images.to(dtype), torch.full((len(images), 1), CLS)
    settings, width = GenerationConfig(**options), options["max_new_tokens"]
    theirs.to(dtype)
    pack_(ours.to(dtype))  # as `openblip.load` does

    def cut(ids: Tensor) -> Tensor:  # behind the end, transformers' beam search writes what it likes
        ended = (ids == SEP).cumsum(dim=1) - (ids == SEP).long() > 0
        ids = ids.masked_fill(ended, 0)
        return torch.nn.functional.pad(ids, (0, width - ids.shape[1]))

    @torch.inference_mode()
    def their_ids() -> Tensor:
        ended = torch.cat([prompts, torch.full_like(prompts, SEP)], dim=1)  # the last token is dropped
        return cut(theirs.generate(pixels, ended, **{"do_sample": False, **options})[:, 1:])

    @torch.inference_mode()
    def our_ids() -> Tensor:
        memory = ours.decoder_memory(ours.encode_image(pixels))
        return cut(ours.generate(memory, prompts, settings).sequences)

    return their_ids, our_ids


def caption(bench: Bench) -> None:
    """Beam search; the ids are the same in fp32. In bf16 near ties fall otherwise on the two sides."""
    theirs, ours = models("BlipForConditionalGeneration", bench.quick)
    images = torch.randn(bench.batch(8), 3, *[pixels_of(384, bench.quick)] * 2)
    tokens = 5 if bench.quick else 20
    for dtype in bench.precisions:
        for least in (tokens, 0):
            calls = written(
                theirs, ours, images, dtype, num_beams=3, max_new_tokens=tokens, min_new_tokens=least
            )
            name = f"caption, beam 3, {'' if least else 'up to '}{tokens} tokens, batch {len(images)}, {named(dtype)}"
            bench.paired(name, *calls, same_ids if dtype is torch.float32 else None, dtype=dtype)


def write(bench: Bench) -> None:
    """Greedy and nucleus. What is drawn differs, so only greedy ids are compared."""
    theirs, ours = models("BlipForConditionalGeneration", bench.quick)
    for batch in sorted({1, bench.batch(16)}):
        images = torch.randn(batch, 3, *[pixels_of(384, bench.quick)] * 2)
        for dtype in bench.precisions:
            for kind, options in (("greedy", {}), ("nucleus 0.9", {"do_sample": True, "top_p": 0.9})):
                fixed = {"max_new_tokens": 20, "min_new_tokens": 20, **options}
                calls = written(theirs, ours, images, dtype, **fixed)
                same = same_ids if kind == "greedy" and dtype is torch.float32 else None
                bench.paired(f"{kind}, 20 tokens, batch {batch}, {named(dtype)}", *calls, same, dtype=dtype)


def rerank(bench: Bench) -> None:
    """Logits [images, texts, 2]. transformers looks at every image anew for every text, so it is given one."""
    theirs, ours = models("BlipForImageTextRetrieval", bench.quick)
    side, count = pixels_of(384, bench.quick), 4 if bench.quick else 64
    plain, ours = ours, pack_(copy.deepcopy(ours))  # as `openblip.load` does; the released code packs nothing
    for dtype in bench.precisions:
        theirs.to(dtype)
        plain.to(dtype)
        ours.to(dtype)
        for images in sorted({1, bench.batch(16)}):
            pixels = torch.randn(images, 3, side, side, dtype=dtype)
            ids, mask = texts(images * count)

            @torch.inference_mode()
            def our_logits(pixels=pixels, ids=ids, mask=mask) -> Tensor:
                return ours.itm_logits(ours.memory(ours.encode_image(pixels)), ids, mask)

            @torch.inference_mode()
            def released(pixels=pixels, ids=ids, mask=mask) -> Tensor:
                return rerank_as_released(plain, plain.encode_image(pixels), ids, mask)

            @torch.inference_mode()
            def their_logits(pixels=pixels, ids=ids, mask=mask) -> Tensor:
                asked = torch.cat([torch.full_like(ids[:, :1], ENC), ids[:, 1:]], dim=1)
                rows = [  # a row at a time holds the memory of one image, not of 64
                    theirs(row[None], pixels[:1], attention_mask=own[None]).itm_score
                    for row, own in zip(asked, mask, strict=True)
                ]
                return torch.cat(rows)

            peers = [("LAVIS-style", released)] + ([("transformers", their_logits)] if images == 1 else [])
            for peer, call in peers:
                name = f"rerank, {images} × {count}, {named(dtype)}, against {peer}"
                bench.paired(name, call, our_logits, close(tolerance(dtype)), dtype=dtype)


def tolerance(dtype: torch.dtype) -> float:
    """How far apart sums in another order may end."""
    return 1e-4 if dtype is torch.float32 else 0.1


def photographs(count: int, quick: bool, width: int = 4000, height: int = 3000) -> list[bytes]:
    """JPEGs of 12 megapixels, or of another size: clouds of colour with a little grain."""
    width, height, found = (400, 300, []) if quick else (width, height, [])
    for number in range(count):
        draw = np.random.default_rng(number)
        clouds = Image.fromarray(draw.integers(0, 256, (30, 40, 3), np.uint8))
        picture = np.asarray(clouds.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
        picture = (picture + draw.integers(-6, 7, picture.shape)).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=90)
        found.append(file.getvalue())
    return found


def embed(bench: Bench) -> None:
    """From bytes to normalised vectors. Ours may decode a large JPEG at a fraction of its size."""
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    jpegs = photographs(bench.batch(8), bench.quick)
    for side in (224, 384):
        theirs, ours = models("BlipForImageTextRetrieval", bench.quick, side)
        side = pixels_of(side, bench.quick)
        processor = BlipImageProcessorPil(size={"height": side, "width": side})
        for dtype in bench.precisions:
            theirs.to(dtype)
            pretrained = Pretrained(ours, bert_uncased(), ImageTransform(image_size=side), {}, LoadReport())
            pipeline = Pipeline(pretrained, dtype=named(dtype), batch_size=4)

            @torch.inference_mode()
            def their_vectors(dtype=dtype, processor=processor, theirs=theirs) -> Tensor:
                found = []
                for start in range(0, len(jpegs), 4):
                    opened = [Image.open(io.BytesIO(data)) for data in jpegs[start : start + 4]]
                    pixels = processor(opened, return_tensors="pt")["pixel_values"].to(dtype)
                    states = theirs.vision_model(pixels).last_hidden_state[:, 0]
                    found.append(torch.nn.functional.normalize(theirs.vision_proj(states), dim=-1))
                return torch.cat(found)

            def our_vectors(pipeline=pipeline) -> Tensor:
                return torch.from_numpy(pipeline.embed_images(jpegs))

            def alike(theirs: Tensor, ours: Tensor) -> bool:
                return bool((theirs.float() * ours).sum(dim=1).min() > 0.98)

            where = f"embed {len(jpegs)} JPEGs of 12 megapixels at {side} px, {named(dtype)}"
            bench.paired(where, their_vectors, our_vectors, alike, dtype=dtype)


def pretrain(bench: Bench) -> None:
    """One step, its optimizer left out; in eval mode, where no dropout and no growing queue tell losses apart."""
    rows, quick = bench.batch(16), bench.quick
    config = blip_base(224)
    if quick:
        small = VisionConfig(32, 16, 48, 2, 3, 96)
        config = BlipConfig(small, TextConfig(30524, 48, 2, 3, 96))
    torch.manual_seed(0)
    task = BlipTask(Blip(config), BlipTaskConfig()).eval()
    ids, mask = texts(rows)
    side = config.vision.image_size
    batch = {"pixel_values": torch.randn(rows, 3, side, side), "input_ids": ids, "attention_mask": mask}
    batch["image_ids"] = torch.arange(rows)

    def ours(dtype: torch.dtype) -> Tensor:
        return step(task, batch, dtype, task)

    def released(dtype: torch.dtype) -> Tensor:
        return step(task, batch, dtype, lambda batch: step_as_released(task, batch))

    for dtype in bench.precisions:
        name = f"pre-training step, batch {rows}, {side} px, {named(dtype)}, against LAVIS-style"
        calls = [lambda call=call, dtype=dtype: call(dtype) for call in (released, ours)]
        bench.paired(name, *calls, close(tolerance(dtype)), dtype=dtype)
    if len(bench.precisions) > 1:
        name = f"pre-training step of ours, batch {rows}, fp32 over bf16"
        bench.paired(name, lambda: ours(torch.float32), lambda: ours(torch.bfloat16), close(0.1))


def step(task: BlipTask, batch: dict[str, Any], dtype: torch.dtype, losses: Any) -> Tensor:
    """The losses [3] of one step from the same state, with gradients made and dropped again."""
    task.begin_step(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        found = losses(batch)
    total = torch.stack([found[name].float() for name in ("itc", "itm", "lm")])
    total.sum().backward()
    task.zero_grad()
    return total.detach()


ROWS = {"caption": caption, "write": write, "rerank": rerank, "embed": embed, "pretrain": pretrain}

if __name__ == "__main__":
    main(__doc__, ROWS)
