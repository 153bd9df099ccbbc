"""Where in the image a word is: Grad-CAM of the image-text matching head's cross-attention.

For the score "this text matches this image", the attention of every word to every patch in one layer, counted
where more of it would raise the score (attention times the positive part of its gradient, mean over the
heads; Selvaraju et al. 2017, as ALBEF §6.4 applies it to cross-attention). The released code looks at block 6
or 7 of 12, at 24 x 24 patches; here it is any layer and any grid, the one of the image at hand.

Shapes: B images with one text each, L text tokens, h x w patches, H heads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from openblip.models.blip import Blip


def default_layer(depth: int) -> int:
    """Seven twelfths up, like the released code's block 7 of 12; never the last, where words say no more."""
    return min(7 * depth // 12, max(depth - 2, 0))


def localize(
    model: Blip,
    image_embeds: Tensor,
    grid: tuple[int, int],
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    layer: int | None = None,
) -> Tensor:
    """Heat maps [B, L, h, w] of text tokens over image patches, not negative and not normalised.

    Map 0 is that of the [ENC] token, on which the score is read: the whole text. Those of padding are zero.
    Gradients of the model's parameters are left alone, and the maps carry none.

    Args:
        image_embeds: [B, N, D] from `encode_image`, class token first.
        grid: (h, w) with h · w = N - 1.
        input_ids, attention_mask: [B, L], text i with image i.
        layer: whose cross-attention to look at, from 0; None for `default_layer`. In the last layer only
            [ENC] has a map: what the other tokens see there no longer reaches the score.

    Raises:
        ValueError: a model without text encoder or in training mode, a grid that is not that of the tokens, a
            layer there is not.
    """
    height, width = grid
    if not model.config.encoder:
        raise ValueError("localisation reads the matching score: this model has no text encoder")
    if model.training:
        raise ValueError("localisation needs a model in eval mode; call model.eval()")
    if image_embeds.shape[1] - 1 != height * width:
        raise ValueError(f"{image_embeds.shape[1] - 1} patches are no grid of {height} x {width}")
    depth = model.config.text.num_hidden_layers
    layer = default_layer(depth) if layer is None else layer
    if not 0 <= layer < depth:
        raise ValueError(f"layer {layer}: the text encoder has layers 0 to {depth - 1}")
    with torch.inference_mode(False), torch.enable_grad():
        # The gradient is taken at the attention, so something before it must want one, in a frozen model too.
        image_embeds = image_embeds.detach().clone().requires_grad_()
        input_ids = input_ids.clone()
        attention_mask = None if attention_mask is None else attention_mask.clone()
        weights: list[Tensor] = []
        logits = model.itm_logits(
            model.encoder_memory(image_embeds), input_ids, attention_mask, weights=weights
        )
        attention = weights[layer]  # [B, H, L, N]
        (gradient,) = torch.autograd.grad(logits[:, 1].sum(), attention)
    maps = (attention.detach() * gradient.relu()).mean(dim=1)
    return maps[:, :, 1:].unflatten(-1, (height, width))


def merge_word_pieces(pieces: Sequence[str], maps: Tensor) -> tuple[list[str], Tensor]:
    """Pieces of words ("snow", "##man") with maps [L, h, w] -> words with the means of theirs [W, h, w]."""
    groups: list[list[int]] = []
    for i, piece in enumerate(pieces):
        if piece.startswith("##") and groups:
            groups[-1].append(i)
        else:
            groups.append([i])
    words = ["".join(pieces[i].removeprefix("##") for i in group) for group in groups]
    return words, torch.stack([maps[group].mean(dim=0) for group in groups])
