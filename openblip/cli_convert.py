"""`openblip convert`: official checkpoints into folders of ours or of transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from openblip.cli_make import given, print_answer
from openblip.config import UserError

if TYPE_CHECKING:
    from openblip.hub import Pretrained

Source = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="SOURCE")]]
Target = tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="OUT")]]


def convert(
    source: Source,
    target: Target,
    to: Literal["openblip", "transformers"] = "openblip",
    half: Literal["caption", "retrieval"] | None = None,
    dtype: Literal["fp32", "bf16", "fp16"] | None = None,
    image_size: int | None = None,
    tokenizer: Path | None = None,
    vision: str | None = None,
    lm: str | None = None,
    approximate: bool = False,
    json: bool = False,
) -> None:
    """Make a model folder of an official checkpoint, and say what became of every tensor.

    Args:
        source: a file of original weights, a folder of transformers or of ours, or a hub name.
        target: folder to write.
        to: whose layout it gets: ours, or one that transformers loads.
        half: of a model that does both, for there is no class of transformers that does.
        dtype: of the weights; by default that of the source.
        image_size: for images of this many pixels instead, with position embeddings resized.
        tokenizer: a folder with the tokenizer, for weights that come without.
        vision: file of the image tower, for a BLIP-2 file that holds what was trained.
        lm: the language model (a folder or hub name), likewise.
        approximate: allow what transformers cannot hold exactly, as its own conversion of BLIP-2 did; the report says
            what that is.
        json: print the report as JSON.
    """
    import torch

    from openblip.hub import load_pretrained, save_for_transformers, save_pretrained

    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    kind = None if dtype is None else kinds[dtype]
    parts = given(image_size=image_size, tokenizer=tokenizer, vision=vision, lm=lm)
    found = load_pretrained(source, dtype=kind, **parts)
    if half is not None:
        found = _half(found, half)
    if to == "transformers":
        found.report.notes += save_for_transformers(found, target, approximate=approximate)
    else:
        save_pretrained(
            found.model, target, tokenizer=found.tokenizer, transform=found.transform, info=found.info,
            frozen=found.frozen, lm_tokenizer=found.lm_tokenizer,
        )  # fmt: skip
    answer = {"folder": str(target), "model": type(found.model).__name__, "report": vars(found.report)}
    print_answer(answer, json, lambda: f"{found.report}\n{type(found.model).__name__}: {target}")


def _half(found: "Pretrained", half: str) -> "Pretrained":
    """The half of a model that captions or retrieves, with what belongs to it."""
    from dataclasses import replace

    from openblip.models import blip, blip2, blip2_llm

    halves: dict[tuple[type, str], Callable[[Any], Any]] = {
        (blip.Blip, "caption"): blip.without_encoder,
        (blip.Blip, "retrieval"): blip.without_decoder,
        (blip2.Blip2, "retrieval"): blip2.without_decoder,
        (blip2_llm.Blip2Llm, "caption"): blip2_llm.without_stage1,
    }
    cut = halves.get((type(found.model), half))
    if cut is None:
        raise UserError(f"--half {half}: a {type(found.model).__name__} has no such half to cut out")
    model = cut(found.model)
    there = dict(model.named_modules())
    frozen = {module: source for module, source in found.frozen.items() if module in there}
    return replace(found, model=model, frozen=frozen)
