"""What `openblip.models.packed` saves: the same layers with their weights as they are, and in oneDNN's blocks.

    python benchmarks/packed.py [--runs 5] [--quick] [--clock cpu]

The image tower of BLIP ViT-B/16 on 4 images of 384 px, and layers for few rows, as in decoding: enough of a kind, one
after the other, that their weights do not stay in the cache.
"""

import copy

import torch
from blip import named, tolerance
from paired import Bench, close, main
from torch import Tensor, nn

from openblip.models.packed import pack_
from openblip.models.vit import VisionConfig, VisionTransformer

LAYERS = {"768 to 3072": (768, 3072, 24), "768 to 30524": (768, 30524, 3)}  # columns, rows, how many of them


def packed(bench: Bench) -> None:
    """The tower, then the layers."""
    torch.manual_seed(0)
    config = VisionConfig(32, 16, 48, 2, 3, 96) if bench.quick else VisionConfig(384)
    tower = VisionTransformer(config).eval().requires_grad_(False)
    images = torch.randn(bench.batch(4), 3, config.image_size, config.image_size)
    for dtype in bench.precisions:
        one(
            bench, f"tower, {len(images)} images of {config.image_size} px", tower.to(dtype), images.to(dtype)
        )
        for name, (columns, rows, count) in LAYERS.items():
            layers = nn.ModuleList(
                nn.Linear(columns, rows, dtype=dtype) for _ in range(2 if bench.quick else count)
            )
            for few in (3, 24):
                one(
                    bench,
                    f"{few} rows, {name}",
                    layers.requires_grad_(False),
                    torch.randn(few, columns).to(dtype),
                )


def one(bench: Bench, name: str, plain: nn.Module, x: Tensor) -> None:
    """A line: a module, or several layers that are given the same."""
    ours = pack_(copy.deepcopy(plain))

    @torch.inference_mode()
    def run(module: nn.Module) -> Tensor:
        if isinstance(module, nn.ModuleList):
            return torch.stack([layer(x) for layer in module])
        return module(x)

    calls = lambda: run(plain), lambda: run(ours)
    bench.paired(f"{name}, {named(x.dtype)}, packed", *calls, close(tolerance(x.dtype)))


ROWS = {"packed": packed}

if __name__ == "__main__":
    main(__doc__, ROWS)
