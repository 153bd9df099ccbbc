"""Models in folders: ours, transformers', and by name from the Hugging Face hub.

    config.json          model_type, our version, the model's configuration, image transform, facts about it
    model.safetensors    weights; what several modules share is there once; above 5 GB in several files
    tokenizer.json       if there is a tokenizer
    README.md            the model card

What a folder holds is recognised from config.json and the names of the tensors. Weights fit completely or are
refused, with the names of those that do not; `Pretrained.report` says what became of each.
"""

import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from openblip import __version__
from openblip.config import UserError, from_dict, save_json, to_dict
from openblip.convert.huggingface import from_huggingface, to_huggingface
from openblip.convert.huggingface_config import image_transform
from openblip.convert.weights import (
    SYSTEMS,
    LoadReport,
    empty_model,
    fill_,
    merge_tied_,
    resize_positions_,
    tied_names,
)
from openblip.data.text import Tokenizer
from openblip.data.transforms import ImageTransform
from openblip.models.text import TextConfig

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # or their <name>.index.json, which lists several
_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|tokenizer\.json")


@dataclass
class Pretrained:
    """A model as it was saved, in eval mode, and what belongs to it."""

    model: Any  # Blip, BlipVqa, BlipNlvr, Clip, VisionTransformer or HuggingFaceVision
    tokenizer: Tokenizer | None
    transform: ImageTransform | None
    info: dict[str, Any]
    report: LoadReport


@dataclass
class _Card:
    """config.json of our own folders."""

    model_type: str
    openblip_version: str
    model: dict[str, Any]
    image_transform: ImageTransform | None = None
    info: dict[str, Any] = field(default_factory=dict)


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    transform: ImageTransform | None = None,
    info: dict[str, Any] | None = None,
) -> None:
    """Write a model of `convert.weights.SYSTEMS` to `folder`, over what was saved there before.

    Files appear in one step each and config.json last, so a folder with a config.json is complete; a model
    that was loaded from this very folder may be saved to it.

    Args:
        info: what is worth knowing, as JSON can hold it; the model card shows "trained_on" (a text),
            "metrics" ({name: number}) and the rest as a list.

    Raises:
        UserError: a model of another kind, a tokenizer that does not belong to it, no place for a folder.
        ConfigError: `info` holds something JSON cannot.
    """
    kind = next(
        (name for name, (cls, _) in SYSTEMS.items() if type(getattr(model, "config", None)) is cls), None
    )
    if kind is None:
        raise UserError(f"a {type(model).__name__} cannot be saved; what can is {', '.join(SYSTEMS)}")
    _check_tokenizer(tokenizer, model.config, "save_pretrained")
    card = _Card(kind, __version__, to_dict(model.config), transform, info or {})
    weights = model.state_dict()
    for _, *others in tied_names(model):
        for name in others:
            del weights[name]

    def write(part: Path) -> None:
        save_json(card, part / "config.json")
        _save_weights(weights, part)
        if tokenizer is not None:
            tokenizer.save(part)
        (part / "README.md").write_text(
            _model_card(model, card, Path(folder).resolve().name), encoding="utf-8"
        )

    _publish(Path(folder), write)


def save_for_transformers(model: nn.Module, folder: str | Path) -> None:
    """Write config.json and model.safetensors as transformers reads them, for its own class of this model.

    Raises UserError if there is no such class; BLIP's halves go one by one (`without_encoder`,
    `without_decoder`).
    """
    config, weights = to_huggingface(model)

    def write(part: Path) -> None:
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _save_weights(weights, part)

    _publish(Path(folder), write)


def load_pretrained(
    name_or_folder: str | Path, *, image_size: int | None = None, dtype: torch.dtype | None = torch.float32
) -> Pretrained:
    """Load a folder of ours or of transformers (see `convert.huggingface`), or either by its name on the hub.

    Nothing in a folder is executed: weights are safetensors, or pickles read with `weights_only`.

    Args:
        image_size: for images of this many pixels instead; position embeddings are resized, for fine-tuning
            at a higher resolution (BLIP §4.1).
        dtype: of the weights; None keeps the file's own.

    Raises:
        UserError: no such folder or name, no weights in it, a damaged file, a model that is not known.
        ConfigError: config.json is no configuration of such a model.
        WeightsError: tensors that are missing, not known, of another shape, or copies of one tensor that
            differ.
    """
    folder = _find_folder(name_or_folder)
    config = _read_object(folder / "config.json")
    weights = _read_weights(folder, dtype)
    load = _load_ours if "openblip_version" in config else _load_theirs
    found = load(folder, config, weights, image_size)
    _check_tokenizer(found.tokenizer, found.model.config, str(folder))
    if image_size is not None and found.transform is not None:
        found.transform = replace(found.transform, image_size=image_size)
    return found


def _load_ours(
    folder: Path, config: dict[str, Any], weights: dict[str, Tensor], image_size: int | None
) -> Pretrained:
    where = str(folder)
    card = from_dict(_Card, config, f"{where}/config.json")
    if card.model_type not in SYSTEMS:
        raise UserError(
            f"{where}/config.json: model_type {card.model_type!r}; known are {', '.join(SYSTEMS)}"
        )
    settings: Any = from_dict(SYSTEMS[card.model_type][0], card.model, f"{where}/config.json: model")
    model = empty_model(settings, image_size)
    groups = tied_names(model)
    merge_tied_(weights, groups, where)
    report = LoadReport(where, loaded=sorted(weights))
    for owner, *others in groups:
        if owner in weights:
            weights |= dict.fromkeys(others, weights[owner])
            report.tied |= dict.fromkeys(others, owner)
    report.interpolated = resize_positions_(weights, model.state_dict())
    fill_(model, weights, where)
    tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None
    return Pretrained(model, tokenizer, card.image_transform, card.info, report)


def _load_theirs(
    folder: Path, config: dict[str, Any], weights: dict[str, Tensor], image_size: int | None
) -> Pretrained:
    model, report = from_huggingface(config, weights, str(folder), image_size=image_size)
    files = [folder / name for name in ("preprocessor_config.json", "processor_config.json")]
    processor = next((_read_object(file) for file in files if file.is_file()), None)
    vision = getattr(model.config, "vision", model.config)
    transform, notes = image_transform(config["model_type"], vision.image_size, processor)
    report.notes += notes
    tokenizer = None
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt", "vocab.json")):
        tokenizer = Tokenizer.load(folder)
    elif hasattr(model.config, "text"):
        report.notes.append("no tokenizer in this folder")
    return Pretrained(model, tokenizer, transform, {"converted_from": report.layout}, report)


def _check_tokenizer(tokenizer: Tokenizer | None, config: Any, where: str) -> None:
    """Wrong ids are no crash but nonsense, so they are looked for here."""
    text = getattr(config, "text", None)
    if tokenizer is None or text is None:
        return
    pairs = [
        ("sep_id", "sep_token_id"),
        ("cls_id", "cls_token_id"),
        ("pad_id", "pad_token_id"),
        ("dec_id", "dec_token_id"),
    ]
    pairs = pairs if isinstance(text, TextConfig) else [("sep_id", "eos_token_id")]
    for theirs, ours in pairs:
        if (got := getattr(tokenizer, theirs)) != (wanted := getattr(text, ours)):
            raise UserError(
                f"{where}: the tokenizer's {theirs} is {got}, the model's {ours} {wanted}: no match"
            )
    if tokenizer.vocab_size > text.vocab_size:
        raise UserError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} tokens, the model knows {text.vocab_size}"
        )


def _find_folder(name_or_folder: str | Path) -> Path:
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{folder}: a file; wanted the folder it is in, with config.json and the weights")
    if isinstance(name_or_folder, Path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name_or_folder):
        raise UserError(f"{folder}: no such folder (a name on the Hugging Face hub looks like owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        found = Path(
            snapshot_download(name_or_folder, allow_patterns=["*.json", "*.txt", "model*.safetensors"])
        )
        if not any(found.glob("model*.safetensors")):
            snapshot_download(name_or_folder, allow_patterns=["pytorch_model*.bin"])
    except (OSError, ValueError, HfHubHTTPError) as error:
        why = str(error).strip().splitlines()[0]
        raise UserError(
            f"{name_or_folder}: no such folder here, and the hub does not give it: {why}"
        ) from None
    return found


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent}: no {path.name} in it; this is no folder of a model") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: wanted an object, got a {type(found).__name__}")
    return found


def _read_weights(folder: Path, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """All tensors of the weight files of a folder, on the CPU, floating-point ones in `dtype`."""
    weights: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        try:
            is_safe = file.suffix == ".safetensors"
            found = load_file(file) if is_safe else torch.load(file, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise UserError(f"{file}: not there, though the index lists it") from None
        except SafetensorError as error:
            raise UserError(f"{file}: damaged, or no safetensors file: {error}") from None
        except Exception as error:  # torch raises half a dozen kinds for a file it cannot or will not read
            raise UserError(f"{file}: cannot be read as weights: {str(error).splitlines()[0]}") from None
        if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
            raise UserError(f"{file}: wanted names and tensors, nothing else")
        weights |= {name: v.to(dtype) if v.is_floating_point() else v for name, v in found.items()}
    return weights


def _weight_files(folder: Path) -> list[Path]:
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            places = _read_object(index).get("weight_map")
            names = sorted(set(map(str, places.values()))) if isinstance(places, dict) else []
            if not names or any(Path(name).name != name for name in names):
                raise UserError(f"{index}: weight_map does not name the files beside it")
            return [folder / name for name in names]
    raise UserError(
        f"{folder}: no weights in it; wanted one of {', '.join(_WEIGHTS)}, or an index of several files"
    )


def _save_weights(weights: dict[str, Tensor], folder: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    on_cpu = {name: value.detach().cpu() for name, value in weights.items()}
    save_torch_state_dict(on_cpu, folder, max_shard_size="5GB", metadata={"format": "pt"})


def _publish(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder beside, then put its files into `folder`, in place of those saved before.

    By rename: loaded weights are a view of their file, which lives on under them, while writing into it would
    pull them away.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: no folder can be made there: {error.strerror}") from None
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as beside:
        write(Path(beside))
        (folder / "config.json").unlink(missing_ok=True)
        for stale in [path for path in folder.iterdir() if _OURS.fullmatch(path.name)]:
            stale.unlink()
        for file in sorted(Path(beside).iterdir(), key=lambda path: path.name == "config.json"):
            file.replace(folder / file.name)


_CARD = """---
library_name: openblip
tags: [{kind}, image-text]
---

# {name}

A model that {use}. {cls} with {millions:.1f}M parameters, for images of
{side} x {side} pixels; saved by openblip {version}.

```python
import openblip

model = openblip.load("path/to/this/folder")
{example}
```

## Trained on

{trained_on}
"""

_MATCHING = (
    "says how well a text fits an image and embeds both for search",
    'model.match("a.jpg", "a dog on a beach")',
)
_USES = {  # what it is for, and a line of code
    "captioner": ("captions images", 'model.caption("a.jpg")'),
    "retrieval": _MATCHING,
    "blip": (f"captions images, {_MATCHING[0]}", f'model.caption("a.jpg")\n{_MATCHING[1]}'),
    "blip_vqa": ("answers questions about images", 'model.answer("a.jpg", "what is the dog doing?")'),
    "blip_nlvr": ("says whether a sentence is true of two images", "model.model  # the BlipNlvr"),
    "clip": ("embeds images and texts for search", 'model.embed_images("a.jpg")'),
    "vit": ("turns an image into tokens", "model.model  # the VisionTransformer"),
}


def _model_card(model: Any, card: _Card, name: str) -> str:
    """README.md of a saved model: what it is, how to load it, what it was trained on, its figures."""
    config, kind = model.config, card.model_type
    if kind == "blip" and not (config.encoder and config.decoder):
        kind = "retrieval" if config.encoder else "captioner"
    use, example = _USES[kind]
    info = dict(card.info)
    trained_on, metrics = info.pop("trained_on", "Not stated."), info.pop("metrics", {})
    text = _CARD.format(
        kind=card.model_type,
        name=name,
        use=use,
        cls=type(model).__name__,
        millions=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        side=getattr(config, "vision", config).image_size,
        version=card.openblip_version,
        example=example,
        trained_on=trained_on,
    )
    if metrics:
        rows = [
            f"| {key} | {f'{value:.4g}' if isinstance(value, float) else value} |"
            for key, value in metrics.items()
        ]
        text += "\n".join(["\n## Figures\n", "| metric | value |", "|---|---|", *rows, ""])
    if info:
        rows = [f"- {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in info.items()]
        text += "\n".join(["\n## More\n", *rows, ""])
    return text
