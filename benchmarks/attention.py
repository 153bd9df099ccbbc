"""Which attention kernel is faster here: torch's fused one, or matmul, softmax, matmul.

    python benchmarks/attention.py [--runs 15]

Above 1 the plain one takes less time. `openblip.models.layers.attend` follows this table: plain in bfloat16 on a CPU,
fused otherwise.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from paired import Bench, close, main
from torch import Tensor

# name: (batch, heads, queries, keys, head width)
SHAPES = {
    "ViT-B/16, 224 px": (8, 12, 197, 197, 64),
    "ViT-B/16, 384 px": (4, 12, 577, 577, 64),
    "BLIP cross-attention, 3 texts": (16, 12, 60, 197, 64),
    "BLIP decoding, 3 beams": (8, 12, 3, 577, 64),
    "small BLIP cross-attention": (64, 12, 24, 65, 32),
    "small BLIP self-attention": (192, 12, 8, 8, 32),
    "135M language model, 20 texts": (20, 9, 13, 30, 64),
}


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v in three operations."""
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v


def once(attention: Callable[..., Tensor], tensors: list[Tensor], backward: bool) -> Tensor:
    """One call, with the backward pass if asked for; what it gives."""
    out = attention(*tensors)
    if backward:
        out.backward(torch.ones_like(out))
        for tensor in tensors:
            tensor.grad = None
    return out.detach()


def attention(bench: Bench) -> None:
    """Every shape, precision and direction."""
    for name, (batch, heads, queries, keys, width) in SHAPES.items():
        for dtype in bench.precisions:
            for backward in (False, True):
                sizes = (queries, keys, keys)
                tensors = [
                    torch.randn(1 if bench.quick else batch, heads, n, width, dtype=dtype) for n in sizes
                ]
                for tensor in tensors:
                    tensor.requires_grad_(backward)

                def call(kernel: Callable[..., Tensor], tensors=tensors, backward=backward) -> Tensor:
                    return once(kernel, tensors, backward)

                direction = "forward + backward" if backward else "forward"
                bench.paired(
                    f"{name}, {str(dtype)[6:]}, {direction}",
                    lambda call=call: call(F.scaled_dot_product_attention),
                    lambda call=call: call(plain),
                    close(1e-4 if dtype is torch.float32 else 0.05),
                )


ROWS = {"attention": attention}

if __name__ == "__main__":
    main(__doc__, ROWS)
