"""Every layout of weights that is known, and which one a checkpoint has: seen in its names and its config.json."""

from collections.abc import Collection, Mapping
from typing import Any

from openblip.config import UserError
from openblip.convert import huggingface, lavis, lavis_blip2, towers, xgenmm
from openblip.convert.layout import Layout, Tensors, model_from_
from openblip.convert.weights import LoadReport

# The first that fits is taken: what has more marks stands before what has fewer of the same.
LAYOUTS: tuple[Layout, ...] = (
    *huggingface.LAYOUTS,
    *lavis.LAYOUTS,
    *lavis_blip2.LAYOUTS,
    *towers.LAYOUTS,
    *xgenmm.LAYOUTS,
)

_SHOWN = 8  # parts of an unknown checkpoint in the message


def find_layout(config: Mapping[str, Any], names: Collection[str], where: str) -> Layout:
    """Which layout a checkpoint has. Its file may be called anything.

    Args:
        config: its config.json; {} if it has none.
        names: of its tensors.
        where: what to call it in messages.

    Raises UserError that says what was found and which are known.
    """
    found = {name[:end] for name in names for end, sign in enumerate(f"{name}.") if sign == "."}
    fitting = [layout for layout in LAYOUTS if found.issuperset(layout.marks)]
    model_type = config.get("model_type")
    if layout := next((layout for layout in fitting if layout.model_type == model_type), None):
        return layout
    parts = sorted({name.partition(".")[0] for name in names})
    more = f" and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else ""
    told = f"{where}: {f'model_type {model_type!r}' if config else 'a file'} with tensors under "
    told += ", ".join(parts[:_SHOWN]) + more
    if fitting and not config:
        raise UserError(f"{told} lacks the config.json of its {fitting[0].origin} {fitting[0].name}")
    known = ", ".join(dict.fromkeys(f"{layout.origin} {layout.name}" for layout in LAYOUTS))
    raise UserError(f"{told} is not known; known are {known}, and folders of our own")


def from_checkpoint_(
    config: Mapping[str, Any], tensors: Tensors, where: str, *, image_size: int | None = None
) -> tuple[Any, LoadReport]:
    """A model of ours, in eval mode, with the weights of a checkpoint of any layout; empties `tensors`.

    Arguments and errors are those of `layout.model_from_`; also a UserError for a checkpoint that is not known.
    """
    layout = find_layout(config, tensors, where)
    return model_from_(layout, config, tensors, where, image_size=image_size)
