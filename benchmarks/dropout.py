"""How much time dropout takes on a CPU: torch's, and ours of random bytes. Ratios, paired in one process.

python benchmarks/dropout.py
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from openblip.models.layers import dropout

# name: shape
SHAPES = {
    "BLIP-base states, 48 texts of 30 tokens": (48, 30, 768),
    "BLIP-base cross-attention weights": (16, 12, 90, 197),
    "small Q-Former states": (96, 40, 384),
    "small Q-Former self-attention weights": (96, 12, 40, 40),
}


def seconds(drop: Callable[[Tensor, float], Tensor], x: Tensor) -> float:
    """Forward and backward once."""
    start = time.perf_counter()
    out = drop(x, 0.1)
    out.backward(torch.ones_like(out))
    x.grad = None
    return time.perf_counter() - start


def main(runs: int = 15) -> None:
    """Print median torch / ours for every shape and precision; above 1 ours is faster."""
    print(f"{'shape':44}{'dtype':10}torch / ours (median, min, max)")
    for name, shape in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(shape).to(dtype).requires_grad_()
            ratios = sorted([seconds(F.dropout, x) / seconds(dropout, x) for _ in range(runs + 2)][2:])
            spread = f"{statistics.median(ratios):.2f}  ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            print(f"{name:44}{str(dtype)[6:]:10}{spread}", flush=True)


if __name__ == "__main__":
    main()
