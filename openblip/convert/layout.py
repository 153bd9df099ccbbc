"""The walker: one table of names and a configuration are all that another layout of weights needs to become ours."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from openblip.convert.weights import (
    LM,
    LoadReport,
    WeightsError,
    empty_model,
    fill_,
    merge_tied_,
    refuse,
    resize_positions_,
    tied_in,
    tied_names,
)
from openblip.models.lm import LanguageModel

# Our module or parameter -> theirs; several of theirs are one of ours, stacked. {} is the number of the layer. A name
# that ends in a dot stands for all below it, which is called the same in both.
Names = dict[str, str | tuple[str, ...]]
Tensors = dict[str, Tensor]

COUNTED = {r".*\.position_ids": "0, 1, 2, … are counted at run time"}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One kind of checkpoint: how to know it, and how its configuration, names and tensors become ours.

    origin, name: the code that writes it, and its class there.
    model_type: in its config.json; None: it comes as a file of tensors, without a config.json.
    marks: modules or tensors that are in it: what tells it from others.
    names: the table.
    config: our configuration of its config.json ({}: none) and its tensors, prepared.
    images: how they are prepared if no file says: a kind of `preprocessor.image_transform`.
    prepare_: what names alone cannot say, done to the tensors before all else.
    tied: names of theirs that stand for one tensor.
    ignored: pattern of their name -> why it is not needed.
    fresh: our name -> its value, and why it is not in the file.
    align_corners: when its table of positions is resized.
    notes: of the load report. info: what is worth knowing of the model, see `hub.save_pretrained`.
    """

    origin: str
    name: str
    model_type: str | None = None
    marks: tuple[str, ...]
    names: Names
    config: Callable[[Mapping[str, Any], Mapping[str, Tensor]], Any]
    images: str
    prepare_: Callable[[Tensors], None] | None = None
    tied: tuple[tuple[str, str], ...] = ()
    ignored: Mapping[str, str] = field(default_factory=lambda: COUNTED)
    fresh: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    align_corners: bool = False
    notes: tuple[str, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)


def under(ours: str, names: Names) -> Names:
    """The same table for a module that is a part `ours` of a model."""
    return {f"{ours}.{name}": theirs for name, theirs in names.items()}


def model_from_(
    layout: Layout,
    config: Mapping[str, Any],
    tensors: Tensors,
    where: str,
    *,
    image_size: int | None = None,
    lm: LanguageModel | None = None,
) -> tuple[Any, LoadReport]:
    """A model of ours, in eval mode, with the weights of a checkpoint.

    Args:
        config: its config.json; {} if it has none.
        tensors: its state dict. It is emptied on the way, so that what is copied is not held twice.
        where: what to call it in messages.
        image_size: resize the position embeddings for images of this many pixels.
        lm: the language model of a checkpoint that holds none.

    Raises:
        UserError, ConfigError: the configuration is none for our model.
        WeightsError: tensors that are missing, not known, of another shape, or tied but different; by name.
    """
    if layout.prepare_ is not None:
        layout.prepare_(tensors)
    try:
        ours = layout.config(config, tensors)
    except WeightsError as error:
        raise WeightsError(f"{where}: {error}") from None
    model = empty_model(ours, image_size, lm)
    wanted = model.state_dict()
    held = {} if lm is None else {name: value for name, value in wanted.items() if name.startswith(LM)}
    for owner, *others in tied_names(model):
        held |= dict.fromkeys(others, held[owner]) if owner in held else {}
    wanted = {name: value for name, value in wanted.items() if name not in held}
    theirs = {name: their_names(name, layout.names) for name in wanted if name not in layout.fresh}
    in_lm = {name: theirs[name][0] for name in wanted if name.startswith(LM)}
    groups = tied_in(model, {name: tensors[their] for name, their in in_lm.items() if their in tensors})
    groups = [names for names in groups if names[0] not in held]
    tied = [list(copies) for names in groups for copies in zip(*(theirs[name] for name in names))]
    report = LoadReport(where, f"{layout.origin} {layout.name}", notes=list(layout.notes))
    report.tied = merge_tied_(tensors, [*layout.tied, *tied], where)
    owners = {name: owner for owner, *others in groups for name in others}
    state: Tensors = {}
    missing: list[str] = []
    for name, empty in wanted.items():
        if name in owners:
            continue
        if name in layout.fresh:
            state[name] = torch.tensor(layout.fresh[name][0])
            report.fresh[name] = "set to {}: {}".format(*layout.fresh[name])
            continue
        if absent := [their for their in theirs[name] if their not in tensors]:
            missing += absent
            continue
        parts = [tensors.pop(their) for their in theirs[name]]
        value = parts[0] if len(parts) == 1 else torch.cat(parts)
        state[name] = value[(None,) * (empty.ndim - value.ndim)]
        report.loaded.append(name)
    for pattern, why in layout.ignored.items():
        for name in [name for name in tensors if re.fullmatch(pattern, name)]:
            report.ignored[name] = why
            del tensors[name]
    refuse(where, missing=missing, unknown=tensors.keys())
    state |= {name: state[owner] for name, owner in owners.items()} | held
    report.interpolated = resize_positions_(state, wanted, align_corners=layout.align_corners)
    fill_(model, state, where)
    return model, report


def shape_of(tensors: Mapping[str, Tensor], name: str) -> torch.Size:
    """The shape of a tensor that the geometry of a model is read off. Raises WeightsError: it is not there."""
    if name not in tensors:
        raise WeightsError(f"{name} is missing, and shows how the model is built")
    return tensors[name].shape


def their_names(name: str, names: Names) -> tuple[str, ...]:
    """The tensors of theirs that a tensor of ours is made of, by the table."""
    for ours, theirs in names.items():
        if ours.endswith(".") and name.startswith(ours):
            return (f"{theirs}{name.removeprefix(ours)}",)
    number = re.search(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", name)
    row = name if number is None else name[: number.start()] + "{}" + name[number.end() :]
    module, _, leaf = row.rpartition(".")
    theirs, leaf = (names[row], "") if row in names else (names[module], f".{leaf}")
    theirs = (theirs,) if isinstance(theirs, str) else theirs
    return tuple((part + leaf).format("" if number is None else number.group()) for part in theirs)
