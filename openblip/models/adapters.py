"""Low-rank adapters (LoRA) in a language model: put in, told apart by their names, merged into the weights below."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from openblip.config import ConfigError

INSTALL = "pip install 'openblip[lm]'"


@dataclass
class LoraSettings:
    """Low-rank adapters (Hu et al. 2021), by the package peft. They train, the weights below them do not.

    target_modules: names of the linear layers that get one; None: what peft holds right for the family.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: list[str] | None = None


def is_adapter(name: str) -> bool:
    """Whether a parameter of a language model belongs to its LoRA adapters, by its name."""
    return "lora_" in name


def without_adapter(name: str) -> str:
    """What a parameter that got an adapter was called before."""
    return name.replace(".base_layer.", ".")


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model without its LoRA adapters: what they add is added to the weights below them."""
    state = model.state_dict()
    for path, module in model.named_modules():
        layer: Any = module
        for adapter in getattr(layer, "active_adapters", ()) if hasattr(layer, "base_layer") else ():
            name = f"{path}.base_layer.weight"
            delta = layer.get_delta_weight(adapter)
            state[name] = (state[name].to(delta.dtype) + delta).to(state[name].dtype)
    return {without_adapter(name): value for name, value in state.items() if not is_adapter(name)}


def add_adapters_(model: Any, lora: LoraSettings) -> None:
    """Put adapters into a model of transformers, in float32 over bfloat16 weights.

    Raises ConfigError: peft is not installed, or finds no such layers.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError(f"lora needs peft: {INSTALL}") from None
    wanted = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
    )
    try:
        inject_adapter_in_model(wanted, model)
    except ValueError as error:
        raise ConfigError(f"lora: {str(error).splitlines()[0]}") from None
    for name, weight in model.named_parameters():
        if is_adapter(name) and weight.dtype is torch.bfloat16:  # in which small updates would be lost
            weight.data = weight.data.float()
