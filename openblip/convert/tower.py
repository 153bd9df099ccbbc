"""A pretrained image tower into a model that has one of its geometry: from a registry package, a file, a folder, or
the hub.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from openblip.config import UserError
from openblip.convert import parts
from openblip.convert.lavis_towers import read_tower
from openblip.convert.weights import refuse, resize_positions_
from openblip.models.vit import HuggingFaceVision, VisionTransformer


def load_tower_(vision: nn.Module, source: str) -> None:
    """Fill a tower from `source`, all of it or nothing.

    source: "dinov2_small", from a registry package; a file of EVA-CLIP's ViT-g or CLIP's ViT-L (see `lavis_towers`),
        which its keys tell; or, for a tower that is a `backbone` of transformers, a folder or hub name with its weights. A
        model of which the tower is a part will do, as CLIP's and SigLIP's are.

    Raises:
        UserError: there are no such weights, or the tower is not made for that source.
        WeightsError: tensors are missing, or of another shape.
    """
    if source == "dinov2_small":
        if not isinstance(vision, VisionTransformer):
            raise UserError("vision_init dinov2_small: is read into a tower of ours, and this is a backbone")
        tower = parts.dinov2_small(vision.config.image_size, vision.config.num_hidden_layers)
        vision.load_state_dict(tower.state_dict())
        return
    if isinstance(vision, VisionTransformer) and Path(source).is_file():
        _load_file_(vision, source)
        return
    if not isinstance(vision, HuggingFaceVision):
        raise UserError(
            f"vision_init {source!r}: the tower is no `backbone` of transformers to load it into; what else there is "
            "is dinov2_small, and files of towers"
        )
    model: Any = vision.model
    try:
        found, info = type(model).from_pretrained(
            source, config=model.config, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"vision_init {source!r}: cannot be loaded: {line}") from None
    wrong = [f"{name} is {list(theirs)}, not {list(ours)}" for name, theirs, ours in info["mismatched_keys"]]
    refuse(source, missing=info["missing_keys"], wrong=wrong)
    model.load_state_dict(found.state_dict())


def _load_file_(vision: VisionTransformer, source: str) -> None:
    """From a file of `lavis_towers`; the table of positions is resized as LAVIS does it."""
    tower, kind, _ = read_tower(source, torch.float32)
    mine, theirs = vision.config, tower.config
    same = replace(mine, image_size=theirs.image_size, drop_path_rate=theirs.drop_path_rate)
    if odd := [name for name, value in vars(theirs).items() if getattr(same, name) != value]:
        told = ", ".join(f"{name} {getattr(theirs, name)} and not {getattr(mine, name)}" for name in odd)
        raise UserError(f"vision_init {source!r}: {kind.name} has {told}")
    state = dict(tower.state_dict())
    resize_positions_(state, vision.state_dict(), align_corners=kind.align_corners)
    vision.load_state_dict(state)
