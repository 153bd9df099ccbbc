"""Pretrained parts that a recipe names, into a fresh model: an image tower (`vision_init`), a BERT (`text_init`)."""

from dataclasses import replace
from typing import Any

from torch import nn

from openblip.config import UserError
from openblip.convert import parts
from openblip.convert.bert import bert_
from openblip.convert.weights import LoadReport, refuse
from openblip.data.text import Tokenizer
from openblip.data.transforms import ImageTransform
from openblip.hub import load_pretrained, read_checkpoint
from openblip.models.blip import Blip
from openblip.models.blip2 import Blip2
from openblip.models.text import TextConfig, TextTransformer
from openblip.models.vit import HuggingFaceVision, VisionTransformer


def load_tower_(vision: nn.Module, source: str) -> tuple[LoadReport, ImageTransform | None]:
    """Fill a tower from `source`, all of it or nothing -> what became of it, and how its images were prepared.

    source: "dinov2_small", from a registry package; or a folder, file or hub name of anything `load_pretrained` reads
        that is an image tower or has one; or, for a tower that is a `backbone` of transformers, what transformers
        reads. Position embeddings are resized. A tower without a final norm takes the first blocks of a deeper
        one (BLIP-2 takes 23 of CLIP's 24).

    Raises:
        UserError: there are no such weights, or the tower is not made for that source.
        WeightsError: tensors are missing, or of another shape.
    """
    if isinstance(vision, HuggingFaceVision):
        return _load_backbone_(vision, source), None
    assert isinstance(vision, VisionTransformer)
    if source == "dinov2_small":
        tower = parts.dinov2_small(vision.config.image_size, vision.config.num_hidden_layers)
        transform = ImageTransform(vision.config.image_size, parts.DINOV2_MEAN, parts.DINOV2_STD)
        return _copy_tower_(vision, tower, LoadReport(source)), transform
    found = load_pretrained(source, image_size=vision.config.image_size)
    model = getattr(found.model, "blip2", found.model)
    tower = getattr(model, "vision", model)
    if not isinstance(tower, VisionTransformer):
        raise UserError(
            f"vision_init {source!r}: a {type(found.model).__name__} without an image tower of ours"
        )
    report = LoadReport(source, found.report.layout, interpolated=found.report.interpolated)
    return _copy_tower_(vision, tower, report), found.transform


def load_text_(model: Blip | Blip2, source: str) -> tuple[list[LoadReport], Tokenizer | None]:
    """Begin with the texts of a BERT -> what became of it, and its tokenizer, if that comes along.

    A BLIP's encoder and decoder both are this BERT; a Q-Former has its FFN for the queries, too (BLIP-2 §3.1).
    Each has its head that writes, where the file has one.

    source: "minilm", from a registry package, or a folder, file or hub name of a BERT.

    Raises:
        UserError: there are no such weights, or they have another number of heads.
        WeightsError: tensors are missing, not known, or of another shape.
    """
    if isinstance(model, Blip2):
        geometry = model.config.qformer
        text = TextTransformer(TextConfig(**{name: getattr(geometry, name) for name in vars(TextConfig())}))
        reports, tokenizer = _load_bert_({"qformer": text}, getattr(model, "lm_head", None), source)
        model.qformer.copy_text_(text)
        return reports, tokenizer
    halves = ("text_encoder", "text_decoder")
    texts = {half: getattr(model, half) for half in halves if hasattr(model, half)}
    return _load_bert_(texts, getattr(model, "lm_head", None), source)


def _load_bert_(
    texts: dict[str, TextTransformer], head: Any, source: str
) -> tuple[list[LoadReport], Tokenizer | None]:
    if source == "minilm":
        return [parts.minilm_text_(text) for text in texts.values()], None
    place, config, tensors = read_checkpoint(source)
    reports = []
    for name, text in texts.items():
        heads = config.get("num_attention_heads", text.config.num_attention_heads)
        if heads != text.config.num_attention_heads:
            raise UserError(
                f"text_init {source!r}: a BERT of {heads} heads, and the model's texts have "
                f"{text.config.num_attention_heads}"
            )
        reports.append(
            bert_(text, tensors, f"{source} into {name}", None if name == "text_encoder" else head)
        )
    has_words = any((place / name).is_file() for name in ("tokenizer.json", "vocab.txt"))
    return reports, Tokenizer.load(place) if has_words else None


def _copy_tower_(vision: VisionTransformer, tower: VisionTransformer, report: LoadReport) -> LoadReport:
    mine, theirs = vision.config, tower.config
    for name in ("num_attention_heads", "hidden_act"):
        if getattr(mine, name) != getattr(theirs, name):
            raise UserError(
                f"vision_init {report.source!r}: its {name} is {getattr(theirs, name)}, not {getattr(mine, name)}"
            )
    if mine.layer_norm_eps != theirs.layer_norm_eps:
        report.notes.append(
            f"its norms have an epsilon of {theirs.layer_norm_eps}, here {mine.layer_norm_eps}"
        )
    own, state = vision.state_dict(), tower.state_dict()
    if not mine.final_norm:
        left_out = [f"blocks.{number}." for number in range(mine.num_hidden_layers, theirs.num_hidden_layers)]
        for name in [name for name in state if name.startswith(tuple(left_out))]:
            report.ignored[name] = f"this tower has {mine.num_hidden_layers} blocks"
            del state[name]
    wrong = [
        f"{name} is {list(value.shape)}, not {list(own[name].shape)}"
        for name, value in state.items()
        if name in own and value.shape != own[name].shape
    ]
    refuse(report.source, missing=own.keys() - state.keys(), unknown=state.keys() - own.keys(), wrong=wrong)
    vision.load_state_dict(state)
    return replace(report, loaded=sorted(state))


def _load_backbone_(vision: HuggingFaceVision, source: str) -> LoadReport:
    if source == "dinov2_small":
        raise UserError("vision_init dinov2_small: is read into a tower of ours, and this is a backbone")
    model: Any = vision.model
    try:
        found, info = type(model).from_pretrained(
            source, config=model.config, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"vision_init {source!r}: cannot be loaded: {line}") from None
    wrong = [f"{name} is {list(theirs)}, not {list(ours)}" for name, theirs, ours in info["mismatched_keys"]]
    refuse(source, missing=info["missing_keys"], wrong=wrong)
    model.load_state_dict(found.state_dict())
    ignored = dict.fromkeys(info["unexpected_keys"], "no part of this tower")
    return LoadReport(
        source, f"transformers {type(model).__name__}", sorted(model.state_dict()), ignored=ignored
    )
