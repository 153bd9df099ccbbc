"""What every system here stands on: an image tower that is trained, or frozen and left exactly as it is."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from openblip.models.vit import build_vision


class TowerModel(nn.Module):
    """An image tower, and around it whatever a system adds.

    With `config.freeze_vision` the tower stays in eval mode and out of the gradient, whatever mode the rest is in.

    Shapes: B images, T frames of a video, S image side, N image tokens, D their width.
    """

    def __init__(self, config: Any) -> None:
        """config: a system's, with `vision` and `freeze_vision`."""
        super().__init__()
        self.config = config
        self.vision = build_vision(config.vision)
        if config.freeze_vision:
            self.vision.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Training mode; a frozen tower stays in eval mode."""
        super().train(mode)
        if self.config.freeze_vision:
            self.vision.eval()
        return self

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Recompute activations of the transformers in the backward pass: less memory, a third more time."""
        children: list[Any] = [child for child in self.children() if hasattr(child, "set_grad_checkpointing")]
        for child in children:
            child.set_grad_checkpointing(enabled and not (child is self.vision and self.config.freeze_vision))

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, 3, S, S] -> image_embeds [B, N, D]: all tokens of the tower. Video [B, T, 3, S, S] ->
        [B, T, N, D]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_vision):
            return self.vision(pixel_values.flatten(0, -4)).unflatten(0, pixel_values.shape[:-3])
