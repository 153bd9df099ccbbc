"""Frozen parts that a saved model names instead of holding: what was trained is small, what it stands on is public.

    config.json:  "frozen": {"vision": {"source": "dinov2_small", "sha256": "..."}, ...}

A part is a module of the model by its name. Saving leaves its tensors out, loading takes them from the source and
holds them against the hash, so that a bridge never stands on other ground than it was trained on.
"""

import hashlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from openblip.config import UserError
from openblip.convert import parts
from openblip.convert.weights import WeightsError
from openblip.models.text import TextTransformer

Source = Literal["dinov2_small", "minilm_words"]


@dataclass
class FrozenPart:
    """Where a frozen part comes from. `sha256` of its tensors as it was trained with, see `sha256_of`."""

    source: Source
    sha256: str


def leave_out_(weights: MutableMapping[str, Tensor], sources: Mapping[str, str]) -> dict[str, FrozenPart]:
    """Take the tensors of the parts named in `sources` {module: source} out of a state dict.

    Raises UserError: an unknown source, or a module without tensors.
    """
    found = {}
    for module, source in sources.items():
        if source not in get_args(Source):
            raise UserError(
                f"{module}: no source is called {source!r}; there are {', '.join(get_args(Source))}"
            )
        names = [name for name in weights if name.startswith(f"{module}.")]
        if not names:
            raise UserError(f"{module}: the model has no such part to leave out")
        tensors = {name.removeprefix(f"{module}."): weights.pop(name) for name in names}
        found[module] = FrozenPart(source, sha256_of(tensors))  # type: ignore[arg-type]
    return found


def bring_in_(
    weights: MutableMapping[str, Tensor], frozen: Mapping[str, FrozenPart], config: Any, where: str
) -> None:
    """Put the frozen parts of a model with `config` beside the weights that were saved.

    Raises UserError: a package is missing (the message has the command that installs it). WeightsError: the
    source gives other weights than those the model was trained with.
    """
    for module, part in frozen.items():
        tensors = _fetch(part.source, config)
        if (found := sha256_of(tensors)) != part.sha256:
            raise WeightsError(
                f"{where}: trained with another {module} than {part.source} gives here "
                f"(sha256 {found[:12]}..., wanted {part.sha256[:12]}...)"
            )
        weights.update({f"{module}.{name}": value for name, value in tensors.items()})


def sha256_of(tensors: Mapping[str, Tensor]) -> str:
    """Of tensors by name, rounded to bfloat16: the same for float32 and bfloat16 copies."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{name} {list(value.shape)} ".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _fetch(source: Source, config: Any) -> dict[str, Tensor]:
    """The tensors of a source, as a part of a model with `config` wants them."""
    if source == "dinov2_small":
        vision = config.vision
        return dict(parts.dinov2_small(vision.image_size, vision.num_hidden_layers).state_dict())
    bert = TextTransformer(parts.minilm_text_config())
    parts.minilm_text_(bert)
    return {"weight": bert.embeddings.word.weight.detach()}
