"""Linear layers with 8-bit weights, for inference: half the memory of bfloat16, one scale per output row.

Activations stay in floating point. Few rows (decoding) go to torch's kernel that reads the 8-bit weights directly;
for many rows (a prefill) a matrix in the activations' type is made on the way and thrown away.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openblip.models.packed import PackedLinear

_FEW_ROWS = 32  # above, the kernel for 8-bit weights is slower than to widen them and multiply


class Int8Linear(nn.Module):
    """y = x (scale · weight)ᵀ + bias with weight int8 [O, I] and scale [O], of the linear layer's dtype."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = (weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127).to(weight.dtype)
        quantised = (weight.float() / scale.float()[:, None]).round().clamp(-127, 127)
        self.register_buffer("weight", quantised.to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] in the dtype of the scale -> [..., O]."""
        weight, scale, bias = self.weight, self.scale, self.bias
        is_short = x.numel() <= _FEW_ROWS * x.shape[-1] and x.device.type == "cpu"
        if is_short and x.dtype is torch.bfloat16 and not (torch.is_grad_enabled() and x.requires_grad):
            y = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), weight, scale)
            y = y.reshape(*x.shape[:-1], -1)
            return y if bias is None else y + bias
        return F.linear(x, weight.to(x.dtype) * scale[:, None].to(x.dtype), bias)


def to_int8_(model: nn.Module, keep: tuple[nn.Module | None, ...] = ()) -> nn.Module:
    """Replace every linear layer below `model`, in place, but those of `keep`. Returns the model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.Linear) or type(child) not in (nn.Linear, PackedLinear):
                continue
            if not any(child is kept for kept in keep):
                setattr(parent, name, Int8Linear(child))
    return model
