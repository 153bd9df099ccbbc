"""What a folder of transformers holds beside config.json and weights, written from what our models come with.

    preprocessor_config.json   from an `ImageTransform`. It names the class without a suffix: transformers takes the one
                               that runs on torchvision, or "...Pil" where that is not installed.
    processor_config.json      image processor and tokenizers as one
    tokenizer.json,            what a text becomes before a model reads it, such that it is what ours makes of it
    tokenizer_config.json
    chat_template.jinja        of a language model that has one
    qformer_tokenizer/         of the words that InstructBLIP's Q-Former reads
    generation_config.json     what begins, ends and pads a text

Where a language model writes, the soft prompt stands in the places of a token <image> before the prompt, which the
processor writes there. A vocabulary without that token gets it as its last word, and a table of embeddings without
room for it gets a row.
"""

import json
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import models, processors
from torch import Tensor

from openblip.convert.huggingface import to_huggingface
from openblip.convert.huggingface_config import one_epsilon
from openblip.convert.pretrained import Pretrained
from openblip.data.prompts import INSTRUCT_PROMPT, LmTokenizer
from openblip.data.text import Tokenizer
from openblip.data.transforms import ImageTransform
from openblip.models.lm import LanguageModel

IMAGE_TOKEN = "<image>"

_PROCESSORS = {
    "blip": "BlipProcessor",
    "blip-2": "Blip2Processor",
    "instructblip": "InstructBlipProcessor",
    "clip": "CLIPProcessor",
}
_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # PIL's numbers
_WRITERS = ("ConditionalGeneration", "QuestionAnswering")  # classes whose names end so
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def image_processor(transform: ImageTransform) -> dict[str, Any]:
    """preprocessor_config.json of a transform. BLIP's class squashes, CLIP's also takes the centre."""
    resized, kept = transform.draft_size, transform.image_size
    size = (
        {"height": resized, "width": resized} if transform.resize == "squash" else {"shortest_edge": resized}
    )
    shape: dict[str, Any] = {"image_processor_type": "BlipImageProcessor", "size": size}
    if transform.resize == "crop" or resized != kept:
        shape["image_processor_type"] = "CLIPImageProcessor"
        shape |= {"do_center_crop": True, "crop_size": {"height": kept, "width": kept}}
    return shape | {
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": _RESAMPLE[transform.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(transform.mean),
        "image_std": list(transform.std),
    }


def save_processor(
    folder: Path,
    config: Mapping[str, Any],
    transform: ImageTransform | None,
    tokenizer: Tokenizer | None,
    lm_tokenizer: LmTokenizer | None = None,
) -> None:
    """Write into `folder` what belongs beside its config.json, as far as it is given."""
    kind, names = config["model_type"], {"processor_class": _PROCESSORS.get(config["model_type"])}
    if config["architectures"][0].endswith(_WRITERS):
        _save_generation_config(folder, config)
    if transform is not None:
        _save(folder / "preprocessor_config.json", names | image_processor(transform))
        if kind in _PROCESSORS:
            queries = {"num_query_tokens": config.get("num_query_tokens")}
            _save(folder / "processor_config.json", names | queries)
    if lm_tokenizer is not None:
        _save_lm_tokenizer(folder, lm_tokenizer, names)
        folder = folder / "qformer_tokenizer"
    if tokenizer is not None and (lm_tokenizer is None or kind == "instructblip"):
        folder.mkdir(exist_ok=True)
        save = _save_bert if isinstance(tokenizer.backend.model, models.WordPiece) else _save_clip
        save(folder, tokenizer, config, names)


def for_transformers(
    found: Pretrained, *, approximate: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    """(config.json, state dict, what deserves to be known) of a model with what belongs to it; see
    `hub.save_for_transformers`.
    """
    ours, notes = found.model.config, []
    if approximate and (same := one_epsilon(ours)) != ours:
        notes.append("the norm behind the tower has the epsilon of the tower, and not its own")
        ours = same
    config, weights = to_huggingface(found.model, ours)
    if found.lm_tokenizer is not None:
        notes += put_image_token_(config, weights, found.lm_tokenizer, found.model.lm)
    elif found.tokenizer is not None and config["model_type"] == "blip-2":
        put_image_token_(config, weights, found.tokenizer)
    return config, weights, notes


@torch.no_grad()
def put_image_token_(
    config: MutableMapping[str, Any],
    weights: MutableMapping[str, Tensor],
    words: Tokenizer | LmTokenizer,
    lm: LanguageModel | None = None,
) -> list[str]:
    """Tell config.json the id of <image> in a vocabulary, or the one it will have there; and if it is beyond the
    embeddings of the language model, give them the rows. Without one it marks places alone, and is never embedded.

    A new row is the mean of the others, as transformers resizes tables (it adds a noise of 3e-5 of their deviation).
    With what a text begins is told too, for a processor that is given none. Returns what deserves to be known.
    """
    backend = words.backend
    known = backend.token_to_id(IMAGE_TOKEN)
    token = backend.get_vocab_size(with_added_tokens=True) if known is None else known
    config["image_token_index"] = token
    if lm is None or not isinstance(words, LmTokenizer):
        return []
    text = config["text_config"] = dict(config["text_config"])
    if len(words.start_ids) == 1:
        text["bos_token_id"] = words.start_ids[0]
    head: Any = lm.model.get_output_embeddings()
    tables = [lm.model.get_input_embeddings().weight, head.weight, getattr(head, "bias", None)]
    rows = len(tables[0])
    if token < rows:
        return [f"{IMAGE_TOKEN} is token {token}, for which the language model has a row"]
    more = token + 1 - rows
    for name, value in lm.model.state_dict(keep_vars=True).items():
        theirs = f"language_model.{name}"
        if theirs in weights and any(value is table for table in tables):
            old = weights[theirs]
            mean = old.float().mean(dim=0, keepdim=True).to(old.dtype)
            weights[theirs] = torch.cat([old, mean.expand(more, *old.shape[1:])])
    text["vocab_size"] = token + 1
    return [
        f"{IMAGE_TOKEN} is token {token}: the language model's embeddings have {more} row(s) more than ours"
    ]


def _save_generation_config(folder: Path, config: Mapping[str, Any]) -> None:
    """generation_config.json of a model that writes: the tokens that begin, end and pad a text."""
    text = dict(config["text_config"])
    if config["model_type"] == "blip":
        text["eos_token_id"] = text["sep_token_id"]
    else:
        from transformers import AutoConfig

        settings = AutoConfig.for_model(**text)  # with what the file leaves out
        text = {name: getattr(settings, name, None) for name in _SPECIAL}
    _save(folder / "generation_config.json", {k: text[k] for k in _SPECIAL if text.get(k) is not None})


def _save_bert(folder: Path, tokenizer: Tokenizer, config: Mapping[str, Any], names: dict[str, Any]) -> None:
    """[CLS] text [SEP], but [ENC] question [SEP] for BLIP: transformers does not put [ENC] there itself."""
    backend, kind = tokenizer.backend, config["model_type"]
    asks = config.get("architectures") == ["BlipForQuestionAnswering"]
    _frame_(backend, ["[ENC]" if asks else "[CLS]"], ["[SEP]"])
    text = config.get("text_config" if kind == "blip" else "qformer_config", {})
    settings = {
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "bos_token": "[DEC]",
        "model_max_length": text.get("max_position_embeddings", tokenizer.context_length),
        "padding_side": "right",
        "truncation_side": "right",
    }
    if kind == "instructblip":  # a long instruction loses its beginning
        settings |= {"truncation_side": "left"}
        settings["model_max_length"] = min(INSTRUCT_PROMPT, settings["model_max_length"])
    _save_tokenizer(folder, backend, settings | names)


def _save_clip(folder: Path, tokenizer: Tokenizer, config: Mapping[str, Any], names: dict[str, Any]) -> None:
    """By CLIP's own class, which alone knows how words are set apart in what it decodes."""
    settings: dict[str, Any] = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>")
    settings |= {"bos_token": "<|startoftext|>", "tokenizer_class": "CLIPTokenizer"}
    settings["model_max_length"] = config["text_config"]["max_position_embeddings"]
    _save_tokenizer(folder, tokenizer.backend, settings | names)


def _save_lm_tokenizer(folder: Path, words: LmTokenizer, names: dict[str, Any]) -> None:
    """With the token <image>, and with what a text begins and ends with, whatever the tokenizer had put there.

    Padding of a decoder's prompts stands before them, of an encoder's behind.
    """
    backend = words.backend
    word: Any = backend.id_to_token
    ends = [list(map(word, ids)) for ids in (words.start_ids, words.prompt_end_ids)]
    _frame_(backend, *ends)
    if backend.token_to_id(IMAGE_TOKEN) is None:
        backend.add_special_tokens([tokenizers.AddedToken(IMAGE_TOKEN, normalized=False, special=True)])
    settings: dict[str, Any] = {**words.special_tokens}
    settings.setdefault("pad_token", word(words.pad_id))
    if len(words.start_ids) == 1:
        settings["bos_token"] = word(words.start_ids[0])
    settings |= {"padding_side": "right" if words.encoder_decoder else "left", "truncation_side": "left"}
    _save_tokenizer(folder, backend, settings | names)
    if words.chat_template:
        (folder / "chat_template.jinja").write_text(words.chat_template, encoding="utf-8")


def _frame_(backend: tokenizers.Tokenizer, before: list[str], behind: list[str]) -> None:
    """Tokens to put around a text."""
    known = sorted({*before, *behind})
    backend.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *behind],
        pair=[*before, "$A", *behind, "$B", *behind],
        special_tokens=[(token, backend.token_to_id(token)) for token in known],
    )


def _save_tokenizer(folder: Path, backend: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> None:
    backend.save(str(folder / "tokenizer.json"))
    plain = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # reads tokenizer.json as it is
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    _save(folder / "tokenizer_config.json", plain | dict(settings))


def _save(path: Path, values: Mapping[str, Any]) -> None:
    kept = {name: value for name, value in values.items() if value is not None}
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
