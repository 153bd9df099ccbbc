"""How cost grows: with images in a batch, their size, beams, tokens, and candidates; a curve for each side.

    python benchmarks/growth.py --out growth.png [--quick] [--clock cpu] [--dtype bf16] [--only beams ...]

BLIP ViT-B/16 and BERT-base. Captions (4 images of 224 px, 3 beams, 10 tokens, where nothing else is said) beside
transformers; ITM of one image with a growing number of texts beside the released code's way. Every curve is drawn over
what ours took at its first point, so both axes are ratios or counts. A point is the better of two calls, the sides in
turn.
"""

import argparse
import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from blip import models, pixels_of, texts, written
from lavis import rerank_as_released
from paired import Bench, Call

from openblip.models.packed import pack_

Sides = Callable[[int], tuple[Call, Call]]  # a point on the x axis -> (theirs, ours)
DEFAULTS = {"images": 4, "pixels": 224, "beams": 3, "tokens": 10}
POINTS = {
    "images": (1, 2, 4, 8), "pixels": (224, 320, 384, 480), "beams": (1, 3, 5, 8), "tokens": (5, 10, 20, 40),
    "candidates": (4, 16, 64, 128),
}  # fmt: skip


def captions(axis: str, dtype: torch.dtype, quick: bool) -> Sides:
    """Captions, with one of the settings as it is asked for."""

    def sides(value: int) -> tuple[Call, Call]:
        now = {**DEFAULTS, axis: value}
        theirs, ours = models("BlipForConditionalGeneration", quick, now["pixels"])
        images = torch.randn(now["images"], 3, *[pixels_of(now["pixels"], quick)] * 2)
        tokens = {"max_new_tokens": now["tokens"], "min_new_tokens": now["tokens"]}
        return written(theirs, ours, images, dtype, num_beams=now["beams"], **tokens)

    return sides


def candidates(dtype: torch.dtype, quick: bool) -> Sides:
    """ITM of one image and so many texts."""

    def sides(value: int) -> tuple[Call, Call]:
        plain = models("BlipForImageTextRetrieval", quick, 224)[1].to(dtype)
        ours = pack_(copy.deepcopy(plain))  # as `openblip.load` does; the released code packs nothing
        side = pixels_of(224, quick)
        with torch.inference_mode():
            embeds = ours.encode_image(torch.randn(1, 3, side, side, dtype=dtype))
        ids, mask = texts(value)

        @torch.inference_mode()
        def released() -> Any:
            return rerank_as_released(plain, embeds, ids, mask)

        @torch.inference_mode()
        def own() -> Any:
            return ours.itm_logits(ours.memory(embeds), ids, mask)

        return released, own

    return sides


def measure(bench: Bench, axis: str, dtype: torch.dtype) -> list[tuple[int, float, float]]:
    """(x, theirs, ours), the last two over ours at the first x."""
    sides = candidates(dtype, bench.quick) if axis == "candidates" else captions(axis, dtype, bench.quick)
    found: list[tuple[int, float, float]] = []
    for value in POINTS[axis][: 2 if bench.quick else None]:
        theirs, ours = sides(value)
        turns = [(bench.seconds(theirs), bench.seconds(ours)) for _ in range(2)]
        found.append((value, *(min(column) for column in zip(*turns, strict=True))))
    first = found[0][2]
    return [(value, theirs / first, ours / first) for value, theirs, ours in found]


def draw(curves: dict[str, list[tuple[int, float, float]]], precision: str, path: Path) -> None:
    """A panel for each axis."""
    figure = importlib.import_module("matplotlib.figure").Figure(
        figsize=(3.2 * len(curves), 3.2), layout="constrained"
    )
    for axis, place in zip(curves, figure.subplots(1, len(curves), squeeze=False)[0], strict=True):
        x, theirs, ours = zip(*curves[axis], strict=True)
        peer = "LAVIS-style" if axis == "candidates" else "transformers"
        place.plot(x, theirs, "o--", color="#888888", label=peer)
        place.plot(x, ours, "o-", color="#0b6e4f", label="openblip")
        place.set(xlabel=axis, xticks=x, ylim=(0, None))
        place.legend(frameon=False)
    figure.supylabel(f"time, ours at the first point = 1 ({precision})")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the picture, a PNG or SVG file")
    parser.add_argument("--only", nargs="+", choices=POINTS, default=list(POINTS))
    parser.add_argument("--quick", action="store_true", help="sizes at which figures mean nothing")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for one thread")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    options = parser.parse_args()
    bench = Bench(quick=options.quick, clock=options.clock)
    dtype = torch.float32 if options.dtype == "fp32" else torch.bfloat16
    curves = {}
    for axis in options.only:
        curves[axis] = measure(bench, axis, dtype)
        for value, theirs, ours in curves[axis]:
            print(f"{value:6} {axis:11} theirs {theirs:6.2f}  ours {ours:6.2f}", flush=True)
    draw(curves, options.dtype, options.out)


if __name__ == "__main__":
    main()
