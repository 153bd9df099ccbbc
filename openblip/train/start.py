"""What a model begins with.

A fresh BLIP around a frozen vision tower starts from the statistics of its data (`standardise_tower_`,
`calibrate_heads_`). A fine-tuned model starts from the weights of a pre-trained one, copied part by part and
counted.

Captioner and retrieval model are halves of the pre-trained one (`models.blip.without_encoder`,
`without_decoder`). VQA and NLVR2 have parts the pre-trained model lacks; which tensors stay fresh is
returned, never guessed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openblip.config import UserError
from openblip.models.blip import Blip
from openblip.models.blip2 import Blip2
from openblip.models.blip_nlvr import BlipNlvr, BlipNlvrConfig
from openblip.models.blip_vqa import BlipVqa, BlipVqaConfig
from openblip.models.text import swap_first_token
from openblip.models.vit import VisionTransformer, position_grid, resize_position_embedding


@torch.no_grad()
def standardise_tower_(vision: VisionTransformer, pixel_values: Tensor) -> None:
    """Set gain and bias of a frozen tower's final LayerNorm such that every channel has mean 0 and deviation 1.

    pixel_values [K, 3, S, S]: a sample of the data. Channels of a pretrained tower differ widely in mean and
    scale, and what is common to all images drowns what tells them apart; a tower that is not trained cannot
    mend that by itself. Raises UserError: no final LayerNorm, or several `output_blocks`.
    """
    norm = vision.norm
    if not isinstance(norm, nn.LayerNorm):
        raise UserError("this vision tower has no final LayerNorm to set")
    if vision.config.output_blocks is not None:
        raise UserError("this vision tower gives several blocks, and one final LayerNorm cannot fit them all")
    norm.weight.fill_(1)
    norm.bias.zero_()
    tokens = vision(pixel_values).flatten(0, 1)  # [K·N, D]
    deviation = _floored(tokens.std(dim=0))
    norm.weight.copy_(1 / deviation)
    norm.bias.copy_(-tokens.mean(dim=0) / deviation)


@torch.no_grad()
def calibrate_heads_(model: Blip, image_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor) -> None:
    """Data-dependent initialisation of the ITC projections (Krähenbühl et al. 2016): centred, unit-scale inputs.

    image_embeds [K, N, D] and texts [K, L]: a sample of the data. Without it all cosines begin near 1, since
    the states have a large common part, and the first epochs go into removing it.
    """
    ids = swap_first_token(input_ids, model.config.text.cls_token_id)
    _calibrate_(model.vision_proj, image_embeds[:, 0])
    _calibrate_(model.text_proj, model.text_encoder(ids, attention_mask)[:, 0])


@torch.no_grad()
def calibrate_blip2_(model: Blip2, image_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor) -> None:
    """The same for BLIP-2: `ln_vision` gives every channel mean 0 and deviation 1, then both ITC heads follow."""
    norm = model.ln_vision
    tokens = F.layer_norm(image_embeds, norm.normalized_shape, eps=norm.eps).flatten(0, 1)  # [K·N, D]
    deviation = _floored(tokens.std(dim=0))
    norm.weight.copy_(1 / deviation)
    norm.bias.copy_(-tokens.mean(dim=0) / deviation)
    ids = swap_first_token(input_ids, model.config.qformer.cls_token_id)
    queries = model.qformer.encode_queries(model.memory(image_embeds))
    _calibrate_(model.vision_proj, queries.flatten(0, 1))
    _calibrate_(model.text_proj, model.qformer.encode_text(ids, attention_mask)[:, 0])


def _calibrate_(head: nn.Linear, x: Tensor) -> None:
    """Draw a projection anew for inputs like x [K, D]: centred, every channel at unit scale."""
    fresh = torch.randn_like(head.weight) / head.in_features**0.5
    head.weight.copy_(fresh / _floored(x.std(dim=0)))
    head.bias.copy_(-head.weight @ x.mean(dim=0))


def _floored(deviation: Tensor) -> Tensor:
    """Standard deviations [D] of channels, none below a tenth of the median of those that vary: some channels
    are constant. 1 for all where nothing varies, as in a sample of one.
    """
    varying = deviation[deviation > 0]
    if not len(varying):
        return torch.ones_like(deviation)
    return deviation.clamp(min=0.1 * varying.median())


def vqa_from(pretrained: Blip, config: BlipVqaConfig) -> tuple[BlipVqa, list[str]]:
    """A VQA model with the encoder and decoder of `pretrained` -> (model, names of tensors that stayed fresh).

    The decoder attends to question states, not to the image: its keys and values start from the pre-trained
    ones if the widths agree (ViT-B), and fresh otherwise (ViT-L), as in the released code.
    """
    model = BlipVqa(config)
    return model, _copy_(model, {name: name for name in model.state_dict()}, pretrained.state_dict())


def nlvr_from(pretrained: Blip, config: BlipNlvrConfig) -> tuple[BlipNlvr, list[str]]:
    """An NLVR2 model with both twins copied from the one cross-attention -> (model, names that stayed fresh).

    The merge layers and the head have no counterpart in pre-training (BLIP §5.4).
    """
    model = BlipNlvr(config)
    table = {}
    for name in model.state_dict():
        theirs = name.replace("cross_attention.left.", "cross_attention.attention.")
        table[name] = theirs.replace("cross_attention.right.", "cross_attention.attention.")
    return model, _copy_(model, table, pretrained.state_dict())


def _copy_(model: nn.Module, table: dict[str, str], weights: dict[str, Tensor]) -> list[str]:
    """Copy weights[table[name]] into each tensor of `model`; returns the names that nothing fitted."""
    fresh = []
    for name, value in model.state_dict().items():
        found = weights.get(table[name])
        if found is not None and name.endswith("position_embedding") and found.shape != value.shape:
            side = position_grid(value)[1]
            found = resize_position_embedding(found, (side, side))
        if found is None or found.shape != value.shape:
            fresh.append(name)
        else:
            value.copy_(found)
    return fresh
