"""BLIP in the open: vision-language models, their training, their data curation, their use.

Importing this package costs next to nothing: the public names are looked up when they are first used, so that
neither torch nor transformers is paid for by a program that only asks for the version.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openblip.api import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

_LAZY = {"load": "openblip.api"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'openblip' has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
