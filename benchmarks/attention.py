"""Which attention kernel is faster here: torch's fused one, or matmul, softmax, matmul. Ratios, paired in one process.

    python benchmarks/attention.py

`openblip.models.layers.attend` follows this table: plain in bfloat16 on a CPU, fused otherwise.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# name: (batch, heads, queries, keys, head width)
SHAPES = {
    "ViT-B/16, 224 px": (8, 12, 197, 197, 64),
    "ViT-B/16, 384 px": (4, 12, 577, 577, 64),
    "BLIP cross-attention, 3 texts": (16, 12, 60, 197, 64),
    "BLIP decoding, 3 beams": (8, 12, 3, 577, 64),
    "small BLIP cross-attention": (64, 12, 24, 65, 32),
    "small BLIP self-attention": (192, 12, 8, 8, 32),
}


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v in three operations."""
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v


def seconds(attention: Callable[..., Tensor], tensors: list[Tensor], backward: bool) -> float:
    """One call, with the backward pass if asked for."""
    start = time.perf_counter()
    out = attention(*tensors)
    if backward:
        out.backward(torch.ones_like(out))
        for tensor in tensors:
            tensor.grad = None
    return time.perf_counter() - start


def main(runs: int = 15) -> None:
    """Print median fused / plain for every shape, precision and direction; above 1 the plain one is faster."""
    print(f"{'shape':32}{'dtype':10}{'pass':20}fused / plain (median, min, max)")
    for name, (batch, heads, queries, keys, width) in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            for backward in (False, True):
                sizes = (queries, keys, keys)
                tensors = [
                    torch.randn(batch, heads, n, width, dtype=dtype, requires_grad=backward) for n in sizes
                ]
                fused = F.scaled_dot_product_attention
                ratios = []
                for _ in range(runs + 2):
                    ratios.append(seconds(fused, tensors, backward) / seconds(plain, tensors, backward))
                ratios = sorted(ratios[2:])
                direction = "forward + backward" if backward else "forward"
                spread = f"{statistics.median(ratios):.2f}  ({ratios[0]:.2f} to {ratios[-1]:.2f})"
                print(f"{name:32}{str(dtype)[6:]:10}{direction:20}{spread}", flush=True)


if __name__ == "__main__":
    main()
