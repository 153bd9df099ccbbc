"""Linear layers whose weights are laid out for oneDNN once, not at each call: inference on a CPU.

oneDNN multiplies matrices in blocks. Given a plain weight it either brings it into blocks at every call, which for a
few rows costs as much as the product, or takes a slower way. A weight in blocks is a second copy of it in memory.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openblip.models.text import LanguageModelHead

_ROWS = 256  # the layout is asked for so many; it serves others as well
_MOST = 2**30  # parameters of a model that may be there twice


class Packed:
    """`F.linear` with the weight in blocks, which is made at first use, and anew when the weight has changed.

    What has a gradient, is not float32 or bfloat16, or not on a CPU goes the usual way, as does all under autocast.
    Copies and pickles are empty.
    """

    def __init__(self) -> None:
        # The weight (held, so that its place in memory is not another's), how often it had been changed, its blocks: in
        # one tuple, since several threads may ask at once.
        self._made: tuple[Tensor, int, Tensor] | None = None

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., I], weight [O, I], bias [O] -> [..., O]."""
        if not _is_served(x, weight, bias):
            return F.linear(x, weight, bias)
        made, version = self._made, 0 if weight.is_inference() else weight._version
        if made is None or (*_place(made[0]), made[1]) != (*_place(weight), version):
            plain = weight.detach()
            made = self._made = plain, version, torch.ops.mkldnn._reorder_linear_weight(plain, _ROWS)
        return torch.ops.mkldnn._linear_pointwise(x, made[2], bias, "none", [], "")

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Packed, ()


class PackedLinear(nn.Linear):
    """A linear layer that keeps its weight in blocks, too. `pack_` makes them."""

    packed: Packed

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]."""
        return self.packed(x, self.weight, self.bias)


def pack_(model: Any) -> Any:
    """Let every linear layer below `model` pack its weight when it is first used. Returns the model.

    Not those of a model of more than 2³⁰ parameters, which should not be in memory twice, nor where torch was built
    without oneDNN.
    """
    if not torch.backends.mkldnn.is_available() or sum(p.numel() for p in model.parameters()) > _MOST:
        return model
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = PackedLinear
            module.__dict__["packed"] = Packed()
        elif isinstance(module, LanguageModelHead):
            module.packed = Packed()
    return model


def _is_served(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if x.dtype is not weight.dtype or x.device.type != "cpu" or weight.device.type != "cpu":
        return False
    if x.dtype is not torch.float32 and not (x.dtype is torch.bfloat16 and _has_bfloat16()):
        return False
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    return not torch.is_grad_enabled() or not any(
        one is not None and one.requires_grad for one in (x, weight, bias)
    )


def _place(weight: Tensor) -> tuple[int, torch.dtype]:
    return weight.data_ptr(), weight.dtype


def _has_bfloat16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()
