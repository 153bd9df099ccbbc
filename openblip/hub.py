"""Models in folders: ours, transformers', and by name from the Hugging Face hub; and files of original weights.

    config.json          model_type, our version, the model's configuration, image transform, facts about it,
                         and the frozen parts that are named instead of held (see `convert.frozen`)
    model.safetensors    weights; what several modules share is there once; above 5 GB in several files
    tokenizer.json       if there is a tokenizer
    lm_tokenizer/        that of a language model whose weights are here
    README.md            the model card

What a folder or file holds is recognised from config.json and the names of the tensors. Weights fit completely or are
refused, with the names of those that do not; `Pretrained.report` says what became of each.
"""

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openblip import __version__
from openblip.config import UserError, from_dict, save_json, to_dict
from openblip.convert.files import WEIGHTS, publish, read_object, read_weights, save_weights
from openblip.convert.frozen import FrozenPart, bring_in_, leave_out_
from openblip.convert.lm import load_lm
from openblip.convert.pretrained import Pretrained, from_another_layout_, lm_tokenizer, reads_text
from openblip.convert.processor import for_transformers, save_processor
from openblip.convert.weights import (
    LM,
    SYSTEMS,
    LoadReport,
    empty_model,
    fill_,
    merge_tied_,
    resize_positions_,
    tied_in,
    tied_names,
)
from openblip.data.prompts import LmTokenizer
from openblip.data.text import Tokenizer
from openblip.data.transforms import ImageTransform
from openblip.model_card import model_card
from openblip.models.adapters import is_adapter
from openblip.models.lm import LanguageModel
from openblip.models.qformer import QFormerConfig
from openblip.models.text import TextConfig

_NAME = re.compile(r"[\w.-]+/[\w.-]+")  # on the hub


@dataclass
class _Card:
    """config.json of our own folders."""

    model_type: str
    openblip_version: str
    model: dict[str, Any]
    image_transform: ImageTransform | None = None
    info: dict[str, Any] = field(default_factory=dict)
    frozen: dict[str, FrozenPart] = field(default_factory=dict)


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    transform: ImageTransform | None = None,
    info: dict[str, Any] | None = None,
    frozen: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    lm_tokenizer: LmTokenizer | None = None,
) -> None:
    """Write a model of `convert.weights.SYSTEMS` to `folder`, over what was saved there before.

    Files appear in one step each and config.json last, so a folder with a config.json is complete; a model
    that was loaded from this very folder may be saved to it.

    Args:
        info: what is worth knowing, as JSON can hold it; the model card shows "trained_on" (a text),
            "metrics" ({name: number}) and the rest as a list.
        frozen: modules to name and not to save, {module: source of `convert.frozen`}.
        dtype: of the file; None keeps the model's.
        lm_tokenizer: of a language model that is saved too; one that has a source (`LmConfig.source`) is named, with
            its hash, and only what was trained of it is saved.

    Raises:
        UserError: a model of another kind, a tokenizer that does not belong to it, no place for a folder, a
            frozen part or source that is not known.
        ConfigError: `info` holds something JSON cannot.
    """
    kind = _kind_of(model)
    _check_tokenizer(tokenizer, model.config, "save_pretrained")
    weights = model.state_dict()
    for _, *others in tied_names(model):
        for name in others:
            del weights[name]
    named = leave_out_(weights, frozen or {})
    lm = getattr(model.config, "lm", None)
    if lm is not None and lm.source is not None:
        weights = {k: v for k, v in weights.items() if not k.startswith(LM) or is_adapter(k)}
    card = _Card(kind, __version__, to_dict(model.config), transform, info or {}, named)

    def write(part: Path) -> None:
        save_json(card, part / "config.json")
        save_weights(_in(dtype, weights), part)
        if tokenizer is not None:
            tokenizer.save(part)
        if lm_tokenizer is not None and lm is not None and lm.source is None:
            lm_tokenizer.save(part / "lm_tokenizer")
        page = model_card(model, kind, Path(folder).resolve().name, __version__, card.info, frozen)
        (part / "README.md").write_text(page, encoding="utf-8")

    publish(Path(folder), write)


def save_for_transformers(
    model: nn.Module | Pretrained,
    folder: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    transform: ImageTransform | None = None,
    info: dict[str, Any] | None = None,
    lm_tokenizer: LmTokenizer | None = None,
    dtype: torch.dtype | None = None,
    approximate: bool = False,
) -> list[str]:
    """Write a folder that transformers loads with its own classes and processor; see `convert.processor`.

    All weights are in it, also those of parts that our own folders name. Adapters are added to what they adapt.

    Args:
        model: with what belongs to it, as `load_pretrained` gives it; or alone, and the rest as in `save_pretrained`.
            What is not given is not written: without image transform and tokenizers there is no processor.
        dtype: of the file; None keeps the model's.
        approximate: allow what transformers cannot hold exactly: one epsilon for the norms of the tower and the one
            behind it (1e-6 and 1e-5 in the released BLIP-2; the tower's is taken, as in transformers' own conversion).

    Returns what deserves to be known about the folder.

    Raises UserError if there is no such class; BLIP's halves go one by one (`without_encoder`, `without_decoder`).
    """
    found = (
        model
        if isinstance(model, Pretrained)
        else Pretrained(model, tokenizer, transform, info or {}, LoadReport(), lm_tokenizer=lm_tokenizer)
    )
    kind = _kind_of(found.model)
    config, weights, notes = for_transformers(found, approximate=approximate)

    def write(part: Path) -> None:
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_weights(_in(dtype, weights), part)
        save_processor(part, config, found.transform, found.tokenizer, found.lm_tokenizer)
        page = model_card(
            found.model, kind, Path(folder).resolve().name, __version__, found.info, found.frozen,
            transformers=config["architectures"][0],
        )  # fmt: skip
        (part / "README.md").write_text(page, encoding="utf-8")

    publish(Path(folder), write)
    return notes


def load_pretrained(
    name_or_path: str | Path,
    *,
    image_size: int | None = None,
    dtype: torch.dtype | None = torch.float32,
    tokenizer: str | Path | None = None,
    vision: str | Path | None = None,
    lm: str | Path | None = None,
) -> Pretrained:
    """Load a folder of ours or of transformers, either by its name on the hub, or a file of original weights.

    `convert.recognise` lists what is known. Nothing that is loaded is executed: weights are safetensors, or
    pickles read with `weights_only`. They stay mapped to their file until they are used.

    Args:
        image_size: for images of this many pixels instead; position embeddings are resized, for fine-tuning
            at a higher resolution (BLIP §4.1).
        dtype: of the weights; None keeps the file's own.
        tokenizer: a folder with the tokenizer, for weights that come without.
        vision, lm: the file of the image tower and the language model (a folder, a name on the hub, a `.gguf` file) of
            an original BLIP-2 or InstructBLIP file, which holds what was trained.

    Raises:
        UserError: no such path or name, no weights in it, a damaged file, a model that is not known.
        ConfigError: config.json is no configuration of such a model.
        WeightsError: tensors that are missing, not known, of another shape, or copies of one tensor that
            differ.
    """
    place, config, weights = read_checkpoint(name_or_path, dtype)
    if "openblip_version" in config:
        if vision is not None or lm is not None:
            raise UserError(f"{place}: names its own parts; leave `vision` and `lm` out")
        found = _load_ours(place, config, weights, image_size)
        if tokenizer is not None and reads_text(found.model.config):
            found.tokenizer = Tokenizer.load(tokenizer)
    else:
        found = from_another_layout_(
            place, config, weights, image_size=image_size, tokenizer=tokenizer, vision=vision, lm=lm
        )
    _check_tokenizer(found.tokenizer, found.model.config, str(place))
    if image_size is not None and found.transform is not None:
        found.transform = found.transform.at(image_size)
    return found


def read_checkpoint(
    name_or_path: str | Path, dtype: torch.dtype | None = torch.float32
) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """What is there, as it is: (the folder or file, its config.json or {}, its tensors). See `load_pretrained`."""
    place = _find(name_or_path)
    config = read_object(place / "config.json") if place.is_dir() else {}
    return place, config, read_weights(place, dtype)


def _kind_of(model: nn.Module) -> str:
    """Its name in `SYSTEMS`."""
    for name, (cls, _) in SYSTEMS.items():
        if type(getattr(model, "config", None)) is cls:
            return name
    raise UserError(f"a {type(model).__name__} cannot be saved; what can is {', '.join(SYSTEMS)}")


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
    lm = _language_model(settings, weights)
    model = empty_model(settings, image_size, lm)
    report = LoadReport(where, loaded=sorted(weights))
    if lm is not None:
        named = {f"lm.{name}": value for name, value in lm.state_dict().items()}
        weights |= {k: v for k, v in named.items() if k.startswith(LM) and not is_adapter(k)}
        report.notes.append(f"lm comes from {lm.config.source}, as in training")
    groups = tied_in(model, weights)
    merge_tied_(weights, groups, where)
    bring_in_(weights, card.frozen, settings, where)
    sources: dict[str, str] = {module: part.source for module, part in card.frozen.items()}
    report.notes += [f"{module} comes from {source}, as in training" for module, source in sources.items()]
    for owner, *others in groups:
        if owner in weights:
            weights |= dict.fromkeys(others, weights[owner])
            report.tied |= dict.fromkeys(others, owner)
    report.interpolated = resize_positions_(weights, model.state_dict())
    fill_(model, weights, where)
    tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None
    words = lm_tokenizer(model, folder / "lm_tokenizer")
    return Pretrained(model, tokenizer, card.image_transform, card.info, report, sources, words)


def _language_model(settings: Any, weights: Mapping[str, Tensor]) -> LanguageModel | None:
    """The language model that a folder names instead of holding, if it does."""
    lm = getattr(settings, "lm", None)
    if lm is None or lm.source is None:
        return None
    half = any(value.dtype is torch.bfloat16 for value in weights.values())
    changes = {name: value for name, value in lm.config.items() if name != "model_type"}
    found = load_lm(
        lm.source, "bfloat16" if half else "float32", sha256=lm.sha256, lora=lm.lora, changes=changes,
        added_tokens=lm.added_tokens, first_added_id=lm.first_added_id,
    )  # fmt: skip
    found.config.family = lm.family
    return found


def push_to_hub(
    model: str | Path | Pretrained, repo_id: str, *, private: bool = False, token: str | None = None
) -> str:
    """Upload a model folder of ours, or a loaded model, to the Hugging Face hub; returns the address.

    The folder is loaded first, so that nothing incomplete is published. `load_pretrained(repo_id)` gets it back.

    Args:
        repo_id: "owner/name"; made if it is not there, and what it holds of a model is replaced if it is.
        private: whether a new one is; the visibility of one that is there stays.
        token: with the right to write; otherwise HF_TOKEN, or that of `hf auth login`.

    Raises:
        UserError: no complete folder of ours, no such name, or the hub refuses; with its first line of why.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    if not _NAME.fullmatch(repo_id):
        raise UserError(f"{repo_id}: a name on the Hugging Face hub looks like owner/name")
    if isinstance(model, Pretrained):
        with tempfile.TemporaryDirectory() as beside:
            folder = Path(beside) / repo_id.partition("/")[2]
            save_pretrained(
                model.model, folder, tokenizer=model.tokenizer, transform=model.transform, info=model.info,
                frozen=model.frozen, lm_tokenizer=model.lm_tokenizer,
            )  # fmt: skip
            return push_to_hub(folder, repo_id, private=private, token=token)
    folder = Path(model).expanduser()
    if "openblip_version" not in read_object(folder / "config.json"):
        raise UserError(
            f"{folder}: not a folder of openblip's; load it and save it with save_pretrained first"
        )
    load_pretrained(folder)
    files = [
        "config.json",
        "tokenizer.json",
        "lm_tokenizer/*",
        "README.md",
        "model*.safetensors",
        "model*.safetensors.index.json",
    ]
    hub = HfApi(token=token)
    try:
        address = hub.create_repo(repo_id, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=files, delete_patterns=files[-2:],
            commit_message=f"A model saved by openblip {__version__}",
        )  # fmt: skip
    except (OSError, ValueError, HfHubHTTPError, HTTPError) as error:
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{repo_id}: the hub did not take it: {why[0]}") from None
    return str(address)


def _check_tokenizer(tokenizer: Tokenizer | None, config: Any, where: str) -> None:
    """Wrong ids are no crash but nonsense, so they are looked for here."""
    text = getattr(config, "qformer" if getattr(config, "qformer_text", False) else "text", None)
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
    # The words stand before [DEC]; what stands behind it, [ENC], no Q-Former is given.
    tokens = text.dec_token_id + 1 if isinstance(text, QFormerConfig) else tokenizer.vocab_size
    if tokens > text.vocab_size:
        raise UserError(f"{where}: the tokenizer has {tokens} tokens, the model knows {text.vocab_size}")


def _find(name_or_path: str | Path) -> Path:
    """The folder or file that is meant; the weights of a folder stand for the folder."""
    place = Path(name_or_path).expanduser()
    if place.exists():
        is_part = place.name in WEIGHTS and (place.parent / "config.json").is_file()
        return place.parent if is_part else place
    if isinstance(name_or_path, Path) or not _NAME.fullmatch(name_or_path):
        raise UserError(
            f"{place}: no such folder or file (a name on the Hugging Face hub looks like owner/name)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        found = Path(
            snapshot_download(
                name_or_path, allow_patterns=["*.json", "*.jinja", "*.txt", "model*.safetensors"]
            )
        )
        if not any(found.glob("model*.safetensors")):
            snapshot_download(name_or_path, allow_patterns=["pytorch_model*.bin"])
    except (OSError, ValueError, HfHubHTTPError) as error:
        why = str(error).strip().splitlines()[0]
        raise UserError(f"{name_or_path}: no such folder here, and the hub does not give it: {why}") from None
    return found


def _in(dtype: torch.dtype | None, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in a dtype, if one is wanted."""
    if dtype is None:
        return weights
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in weights.items()}
