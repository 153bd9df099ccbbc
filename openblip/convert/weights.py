"""Weights go into a model completely or not at all; what happened to every tensor is written down."""

from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from openblip.config import UserError
from openblip.models.blip import Blip, BlipConfig
from openblip.models.blip2 import Blip2, Blip2Config
from openblip.models.blip2_llm import Blip2Llm, Blip2LlmConfig
from openblip.models.blip3 import Blip3, Blip3Config
from openblip.models.blip_nlvr import BlipNlvr, BlipNlvrConfig
from openblip.models.blip_vqa import BlipVqa, BlipVqaConfig
from openblip.models.clip import Clip, ClipConfig
from openblip.models.lm import LanguageModel
from openblip.models.vit import VisionConfig, build_vision, position_grid, resize_position_embedding

# What can be saved and loaded: the name in config.json, the configuration, the model it describes.
SYSTEMS: dict[str, tuple[type, Callable[[Any], nn.Module]]] = {
    "blip": (BlipConfig, Blip),
    "blip_vqa": (BlipVqaConfig, BlipVqa),
    "blip_nlvr": (BlipNlvrConfig, BlipNlvr),
    "blip2": (Blip2Config, Blip2),
    "blip2_llm": (Blip2LlmConfig, Blip2Llm),
    "blip3": (Blip3Config, Blip3),
    "clip": (ClipConfig, Clip),
    "vit": (VisionConfig, build_vision),
}

LM = "lm.model."  # names of a language model of transformers in a system of ours begin with this
_SHOWN = 6  # names spelled out in one message; the rest is counted


class WeightsError(UserError):
    """Weights that do not fit the model: missing, not known, of another shape, or copies that differ."""


@dataclass
class LoadReport:
    """What became of every tensor of a model and of the file it came from. `print` it."""

    source: str = ""
    layout: str = "openblip"
    loaded: list[str] = field(default_factory=list)  # our names
    tied: dict[str, str] = field(default_factory=dict)  # a name -> the name it shares one tensor with
    ignored: dict[str, str] = field(default_factory=dict)  # a name in the file -> why it is not needed
    interpolated: dict[str, str] = field(default_factory=dict)  # our name -> "old size -> new size"
    fresh: dict[str, str] = field(default_factory=dict)  # our name -> what it is set to, and why
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.layout} layout, {len(self.loaded)} tensors loaded"]
        for title in ("interpolated", "fresh", "ignored"):
            found: dict[str, list[str]] = {}
            for name, what in getattr(self, title).items():
                found.setdefault(what, []).append(name)
            for what, names in found.items():
                who = names[0] if len(names) == 1 else f"{len(names)} tensors, such as {names[0]}"
                lines.append(f"  {title}: {who} ({what})")
        for name, owner in list(self.tied.items())[:1]:
            lines.append(
                f"  tied: {len(self.tied)} names to tensors of another name, such as {name} = {owner}"
            )
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def empty_model(config: Any, image_size: int | None = None, lm: LanguageModel | None = None) -> Any:
    """The model a config of `SYSTEMS` describes, without weights (on the meta device), in eval mode.

    With `image_size`, for images of that many pixels instead; with `lm`, around this language model. What holds a
    model of transformers is built in earnest, since that may hold tables that are in no file; its weights are memory as
    it was found. Raises UserError for a vision backbone at another size.
    """
    vision = config if isinstance(config, VisionConfig) else config.vision
    if image_size is not None and image_size != vision.image_size:
        if vision.backbone is not None:
            raise UserError(
                f"image_size {image_size}: the vision backbone of this model is made for {vision.image_size}"
            )
        config = _with_vision(config, replace(vision, image_size=image_size))
    build: Any = next(build for cls, build in SYSTEMS.values() if type(config) is cls)
    if lm is not None:
        with torch.device("meta"), _NothingDrawn():
            return build(replace(config, lm=lm.config), lm).eval()
    if vision.backbone is not None or hasattr(config, "lm"):
        with _NothingDrawn():
            return build(config).eval()
    with torch.device("meta"), _NothingDrawn():
        return build(config).eval()


def _with_vision(config: Any, vision: VisionConfig) -> Any:
    """The same configuration with another vision tower."""
    if isinstance(config, VisionConfig):
        return vision
    if isinstance(config, Blip2LlmConfig):
        return replace(config, blip2=replace(config.blip2, vision=vision))
    return replace(config, vision=vision)


class _NothingDrawn(TorchFunctionMode):
    """Initial weights are not drawn: they will be replaced, and billions of them would take minutes."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.__name__ in ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_"):
            tensor = args[0] if args else kwargs["tensor"]
            # torch draws a truncated normal until all of it lies within the bounds: 0 does, memory as it is may not.
            return tensor if tensor.is_meta else tensor.new_zeros(()).expand_as(tensor)
        return func(*args, **kwargs)


def merge_tied_(
    tensors: MutableMapping[str, Tensor], groups: Iterable[Sequence[str]], where: str
) -> dict[str, str]:
    """Leave one copy of every group of names that stand for one tensor, under the first name of the group.

    Returns {other name: first name} of the copies found. Raises WeightsError if two copies are not equal: a
    model that ties them could only load one.
    """
    tied = {}
    for owner, *others in groups:
        for name in others:
            if name not in tensors:
                continue
            value = tensors.pop(name)
            kept = tensors.setdefault(owner, value)
            if kept is not value and not torch.equal(kept, value):
                raise WeightsError(f"{where}: {name} and {owner} differ; in this model they are one tensor")
            tied[name] = owner
    return tied


def tied_in(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """`tied_names`, less those for which `tensors` hold a value of their own and the model lets them.

    Our own structure does not. A language model of transformers does: T5 ties its output layer by default, and the
    files of Flan-T5 have another one.
    """
    groups = []
    for names in tied_names(model):
        found = [name for name in names if name in tensors]
        kept = [
            name
            for name in names
            if name not in found[1:]
            or not name.startswith(LM)
            or torch.equal(tensors[name], tensors[found[0]])
        ]
        groups += [kept] if len(kept) > 1 else []
    return groups


def tied_names(model: nn.Module) -> list[list[str]]:
    """Groups of names by which the model knows one and the same tensor: its structure ties them."""
    groups: dict[int, list[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(value), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def resize_positions_(
    tensors: MutableMapping[str, Tensor], wanted: Mapping[str, Tensor], *, align_corners: bool = False
) -> dict[str, str]:
    """Resize tables of position embeddings to the grid the model wants: {name: "sizes"}.

    Only between square grids, which is what `VisionTransformer` is configured with; bicubic (BLIP §4.1). A table that
    cannot be resized stays as it is, of a shape that `fill_` refuses.
    """
    resized = {}
    for name, value in tensors.items():
        shape = wanted[name].shape if name in wanted else value.shape
        if not name.endswith("position_embedding") or value.shape == shape or value.shape[2:] != shape[2:]:
            continue
        try:
            (first, old), (new_first, new) = position_grid(value), position_grid(wanted[name])
        except ValueError:
            continue
        if first == new_first:
            tensors[name] = resize_position_embedding(value, (new, new), align_corners=align_corners)
            resized[name] = f"{old} x {old} -> {new} x {new} patches, bicubic"
    return resized


def fill_(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Put `tensors` into `model`, on the meta device or not: they become its parameters, nothing is copied.

    Every name of the state dict must be there, and no other. What the model ties stays tied if it is one tensor
    in `tensors` too.

    Raises:
        WeightsError: names the tensors that are missing, unknown or of another shape.
    """
    wanted = model.state_dict()
    wrong = [
        f"{name} is {list(tensors[name].shape)}, the model wants {list(value.shape)}"
        for name, value in wanted.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    refuse(where, missing=wanted.keys() - tensors.keys(), unknown=tensors.keys() - wanted.keys(), wrong=wrong)
    groups = tied_names(model)
    model.load_state_dict(dict(tensors), assign=True)
    for owner, *others in groups:
        for name in others:
            if tensors[name] is tensors[owner]:
                module, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(module), leaf, model.get_parameter(owner))


def refuse(
    where: str,
    *,
    missing: Collection[str] = (),
    unknown: Collection[str] = (),
    wrong: Sequence[str] = (),
) -> None:
    """Raise a WeightsError that names every kind of misfit; return if there is none."""
    faults = []
    if missing:
        faults.append(f"{len(missing)} missing: {_names(sorted(missing))}")
    if unknown:
        faults.append(f"{len(unknown)} this model has no place for: {_names(sorted(unknown))}")
    if wrong:
        faults.append(f"{len(wrong)} of another shape: {_names(wrong)}")
    if faults:
        raise WeightsError(f"{where}: weights do not fit the model; {'; '.join(faults)}")


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
