"""Which model it was: hashes of weights and settings, by which what one model made is told from another's."""

import hashlib

import torch
from torch import Tensor

from openblip.api import Pipeline


def weights_hash(pipeline: Pipeline) -> str:
    """SHA-256 of a model's weights, configuration and image transform, shortened to 16 digits."""
    return _hash(pipeline.model.state_dict(), repr((pipeline.model.config, pipeline.transform)))


def vision_hash(pipeline: Pipeline) -> str:
    """The same of its vision tower alone."""
    return _hash(pipeline.model.vision.state_dict(), repr(pipeline.model.config.vision))


def matcher_hash(pipeline: Pipeline) -> str:
    """The same of the part that embeds images and texts, with the transform: a language model behind it has no say."""
    return _hash(pipeline.matcher.state_dict(), repr((pipeline.matcher.config, pipeline.transform)))


def _hash(weights: dict[str, Tensor], config: str) -> str:
    digest = hashlib.sha256(config.encode())
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(
            weights[name].detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()[:16]
