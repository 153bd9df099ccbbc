"""A pretrained image tower into a model that has one of its geometry: from a registry package, a folder, or the hub."""

from typing import Any

from torch import nn

from openblip.config import UserError
from openblip.convert import parts
from openblip.convert.weights import refuse
from openblip.models.vit import HuggingFaceVision, VisionTransformer


def load_tower_(vision: nn.Module, source: str) -> None:
    """Fill a tower from `source`, all of it or nothing.

    source: "dinov2_small", from a registry package, or, for a tower that is a `backbone` of transformers, a folder or
        hub name with its weights. A model of which the tower is a part will do, as CLIP's and SigLIP's are.

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
    if not isinstance(vision, HuggingFaceVision):
        raise UserError(
            f"vision_init {source!r}: the tower is no `backbone` of transformers to load it into; what else there is "
            "is dinov2_small"
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
