"""The global random states of Python, numpy and torch: as tensors for a checkpoint, and from a seed."""

import json
import random
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

RngState = dict[str, Tensor]


def rng_state() -> RngState:
    """The global random states of Python, numpy, torch and the current GPU, if any, as uint8 tensors."""
    _, words, gauss = random.getstate()
    _, key, position, has_gauss, cached = cast(tuple[Any, ...], np.random.get_state())
    state = {
        "python": _json_bytes([words, gauss]),
        "numpy": _json_bytes(["MT19937", key.tolist(), position, has_gauss, cached]),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state_(state: RngState) -> None:
    """Set the global random states to what `rng_state` gave."""
    words, gauss = json.loads(state["python"].numpy().tobytes())
    random.setstate((3, tuple(words), gauss))
    np.random.set_state(tuple(json.loads(state["numpy"].numpy().tobytes())))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_rng_(*numbers: int) -> None:
    """Seed Python, numpy and torch, each differently, from all of `numbers` (a seed and a rank, say).

    Adding the rank to the seed would make rank 1 of seed 0 repeat what rank 0 of seed 1 does.
    """
    for_python, for_numpy, for_torch = np.random.SeedSequence(numbers).generate_state(3)
    random.seed(int(for_python))
    np.random.seed(int(for_numpy))
    torch.manual_seed(int(for_torch))


def _json_bytes(value: Any) -> Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
