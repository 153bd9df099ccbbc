"""CapFilt beside what there is without it: a captioner, then a filter, both of transformers, one after the other.

    python benchmarks/capfilt.py [--runs 5] [--quick] [--clock cpu]

From JPEGs of two megapixels with a web text each to a written caption and P(match) of both texts. Captioner and filter
are BLIP ViT-B/16 at 384 px with weights of their own, as after fine-tuning (BLIP §3.3), so an image is embedded twice
here. There it is embedded once by the captioner and once for each text by the filter, which takes pairs.
"""

import io
from collections.abc import Sequence
from typing import Any

import torch
from blip import ENC, models, named, photographs, pixels_of
from paired import Bench, main
from PIL import Image
from torch import Tensor

from openblip.api import Pipeline
from openblip.convert.weights import LoadReport
from openblip.curate.capfilt import CapFilt, CapFiltConfig, nucleus
from openblip.data.image import open_image
from openblip.data.rows import Row
from openblip.data.text import bert_uncased, clean_caption
from openblip.data.transforms import ImageTransform
from openblip.hub import Pretrained

WEB = (
    "a dog runs along the beach", "photo for sale, contact us", "two children on a wooden swing in the garden",
    "IMG 2041", "the old town hall at night, seen from the river", "a bowl of noodle soup with egg",
    "best price guaranteed on all our products", "a red tram passes a church",
)  # fmt: skip


def capfilt(bench: Bench) -> None:
    """The log odds of the web texts are compared; what is written is drawn, and differs."""
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    writer, our_writer = models("BlipForConditionalGeneration", bench.quick)
    judge, our_judge = models("BlipForImageTextRetrieval", bench.quick)
    side, tokenizer = pixels_of(384, bench.quick), bert_uncased()
    jpegs = photographs(bench.batch(8), bench.quick, 1600, 1200)
    web = WEB[: len(jpegs)]
    rows = [Row(str(i), [data], [text]) for i, (data, text) in enumerate(zip(jpegs, web, strict=True))]
    processor = BlipImageProcessorPil(size={"height": side, "width": side})
    settings = nucleus()
    steps: dict[str, Any] = {
        "do_sample": True, "top_p": settings.top_p, "repetition_penalty": settings.repetition_penalty,
        "min_new_tokens": settings.min_new_tokens, "max_new_tokens": settings.max_new_tokens, "top_k": 0,
    }  # fmt: skip

    for dtype in bench.precisions:
        writer.to(dtype)
        judge.to(dtype)
        pipelines = [
            Pipeline(Pretrained(model, tokenizer, ImageTransform(side), {}, LoadReport()), dtype=named(dtype))
            for model in (our_writer, our_judge)
        ]
        work = CapFilt(*pipelines, CapFiltConfig())

        def pixels(files: Sequence[bytes], dtype: torch.dtype = dtype) -> Tensor:
            opened = [Image.open(io.BytesIO(data)) for data in files]
            return processor(opened, return_tensors="pt")["pixel_values"].to(dtype)

        @torch.inference_mode()
        def theirs() -> Tensor:
            prompt = torch.tensor([[101, 102]] * len(jpegs))  # [CLS] and an end that is dropped
            written = writer.generate(pixels(jpegs), prompt, **steps)
            captions = [tokenizer.decode(ids) for ids in written[:, 1:].tolist()]
            twice = [data for data in jpegs for _ in range(2)]
            texts = [clean_caption(text) for pair in zip(web, captions, strict=True) for text in pair]
            encoded = tokenizer(texts)
            ids = encoded["input_ids"].clone()
            ids[:, 0] = ENC
            logits = judge(ids, pixels(twice), attention_mask=encoded["attention_mask"]).itm_score
            return logits.float().diff(dim=1)[::2, 0]

        def ours(work: CapFilt = work) -> Tensor:
            images = [open_image(data, draft_size=work.draft_size) for data in jpegs]
            scored = work(rows, work.embed(rows, images))
            return torch.tensor([text.itm for text in scored if text.kind == "web"]).logit()

        def alike(theirs: Tensor, ours: Tensor) -> bool:
            """The JPEGs are decoded at another scale."""
            return theirs.shape == ours.shape and bool((theirs - ours).abs().max() < 0.1)

        name = f"CapFilt of {len(jpegs)} images at {side} px, {named(dtype)}"
        bench.paired(name, theirs, ours, alike, dtype=dtype)


ROWS = {"capfilt": capfilt}

if __name__ == "__main__":
    main(__doc__, ROWS)
