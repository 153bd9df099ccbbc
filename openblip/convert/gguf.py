"""GGUF, the one-file format of llama.cpp: a Llama in it becomes a folder that transformers loads.

The file is read with the package `gguf` alone. Weights are dequantised to float32; llama.cpp keeps the rows of the
query and key matrices in another order (pairs of a rotation side by side), which is undone. The tokenizer is built
from the words, merges and kinds of token in the metadata, and the chat template is taken along.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from openblip.config import UserError

INSTALL = "pip install 'openblip[lm]'"

_LAYOUT = 1  # of the folders in the cache: a new number makes old ones stale
_CONTROL, _USER_DEFINED = 3, 4  # kinds of token
_NAMES = {  # modules of a layer: llama.cpp's -> transformers'
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
# How a byte-level BPE cuts a text before merging, by `tokenizer.ggml.pre`.
_DIGITS_APART = ("smollm", "starcoder", "refact", "command-r")
_GPT2 = ("gpt-2", "default", "")
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ONE_PATTERN = {
    "llama-bpe": _LLAMA3_WORDS,
    "llama3": _LLAMA3_WORDS,
    "qwen2": _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}"),
}


def gguf_folder(file: str | Path) -> Path:
    """A GGUF file as a folder with config.json, model.safetensors and tokenizer: converted once, then kept.

    In `$XDG_CACHE_HOME/openblip/gguf` (else `~/.cache/...`), under the hash of the file. A conversion that is cut
    off leaves nothing that would be taken for a result.

    Raises:
        UserError: the file cannot be read, is no GGUF, or holds something else than a Llama with a byte-level
            BPE tokenizer; or the cache cannot be written.
    """
    file = Path(file)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "openblip" / "gguf"
    try:
        with file.open("rb") as stream:
            name = hashlib.file_digest(stream, "sha256").hexdigest()[:20]
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    folder = cache / f"{name}-v{_LAYOUT}"
    if folder.is_dir():
        return folder
    part = cache / f".{folder.name}.{os.getpid()}.part"
    try:
        part.mkdir(parents=True, exist_ok=True)
        convert_gguf(file, part)
        try:
            part.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster: its folder is as good
                raise
    except OSError as error:
        raise UserError(
            f"{cache}: cannot be written ({error.strerror or error}); set XDG_CACHE_HOME"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def convert_gguf(file: str | Path, folder: str | Path) -> None:
    """Write what transformers wants of a GGUF file into `folder`. Raises UserError as `gguf_folder` does."""
    fields, tensors = _open(Path(file))
    config, state = llama_config(fields, str(file)), {}
    for name, value in tensors:
        state[transformers_name(name, str(file))] = permuted_back(name, value, config)
    config["tie_word_embeddings"] = "lm_head.weight" not in state
    tokenizer = bpe_tokenizer(fields, str(file))
    folder = Path(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "config.json", config | {"architectures": ["LlamaForCausalLM"], "dtype": "float32"})
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(fields, config))


def llama_config(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """The metadata of a GGUF file as transformers' LlamaConfig. Raises UserError for another architecture."""
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise UserError(f'{where}: architecture "{architecture}"; of GGUF files, only "llama" can be read')
    names = {
        "hidden_size": "embedding_length",
        "num_hidden_layers": "block_count",
        "intermediate_size": "feed_forward_length",
        "num_attention_heads": "attention.head_count",
        "max_position_embeddings": "context_length",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    }
    missing = [f"llama.{name}" for name in names.values() if f"llama.{name}" not in fields]
    missing += [name for name in ("tokenizer.ggml.tokens",) if name not in fields]
    if missing:
        raise UserError(f"{where}: the metadata lack {missing[0]}")
    if "llama.rope.scaling.type" in fields and fields["llama.rope.scaling.type"] != "none":
        raise UserError(
            f"{where}: scaled rotary positions cannot be read from GGUF; take the original folder"
        )
    config = {ours: fields[f"llama.{theirs}"] for ours, theirs in names.items()}
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = fields.get("llama.attention.head_count_kv", heads)
    config["head_dim"] = fields.get("llama.rope.dimension_count", config["hidden_size"] // heads)
    config["vocab_size"] = len(fields["tokenizer.ggml.tokens"])
    theta = fields.get("llama.rope.freq_base", 10000.0)
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    for name in ("bos", "eos", "padding"):
        ours = {"padding": "pad"}.get(name, name)
        config[f"{ours}_token_id"] = fields.get(f"tokenizer.ggml.{name}_token_id")
    return {"model_type": "llama", **config}


def transformers_name(name: str, where: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`. Raises UserError for an unknown one."""
    module, _, end = name.rpartition(".")
    if module in _TOP_NAMES:
        return f"{_TOP_NAMES[module]}.{end}"
    block, _, part = module.removeprefix("blk.").partition(".")
    if not module.startswith("blk.") or part not in _NAMES:
        raise UserError(f"{where}: unknown tensor {name}; this is no plain Llama")
    return f"model.layers.{block}.{_NAMES[part]}.{end}"


def permuted_back(name: str, value: Tensor, config: dict[str, Any]) -> Tensor:
    """Rows of a query or key matrix [heads · d, D] in transformers' order; other tensors as they are.

    llama.cpp rotates neighbours (2i, 2i + 1), transformers halves (i, i + d/2).
    """
    for part, heads in (("attn_q", "num_attention_heads"), ("attn_k", "num_key_value_heads")):
        if f".{part}." in name:
            pairs = value.unflatten(0, (config[heads], -1, 2))  # [heads, d/2, 2, ...]
            return pairs.transpose(1, 2).reshape(value.shape).contiguous()
    return value


def bpe_tokenizer(fields: dict[str, Any], where: str) -> tokenizers.Tokenizer:
    """The byte-level BPE tokenizer that a GGUF file describes.

    Raises UserError for another kind of tokenizer.
    """
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2":
        raise UserError(
            f'{where}: a tokenizer of kind "{kind}"; from GGUF only byte-level BPE ("gpt2") can be read'
        )
    words = fields["tokenizer.ggml.tokens"]
    merges = [tuple(line.split(" ", 1)) for line in fields.get("tokenizer.ggml.merges", [])]
    tokenizer = tokenizers.Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    cut: pre_tokenizers.PreTokenizer
    if pre in _DIGITS_APART:
        cut = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_of_words])
    elif pre in _ONE_PATTERN:
        words_of = pre_tokenizers.Split(tokenizers.Regex(_ONE_PATTERN[pre]), behavior="isolated")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        cut = pre_tokenizers.Sequence([words_of, plain])
    elif pre in _GPT2:
        cut = bytes_of_words
    else:
        raise UserError(f'{where}: its tokenizer cuts words in the manner "{pre}", which is not known here')
    tokenizer.pre_tokenizer = cut
    tokenizer.decoder = decoders.ByteLevel()
    for number, token_kind in enumerate(fields.get("tokenizer.ggml.token_type", [])):
        if token_kind in (_CONTROL, _USER_DEFINED):
            added = tokenizers.AddedToken(words[number], special=token_kind == _CONTROL, normalized=False)
            (tokenizer.add_special_tokens if added.special else tokenizer.add_tokens)([added])
    if fields.get("tokenizer.ggml.add_bos_token"):
        bos = words[fields["tokenizer.ggml.bos_token_id"]]
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, fields["tokenizer.ggml.bos_token_id"])]
        )
    return tokenizer


def _tokenizer_config(fields: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    words = fields["tokenizer.ggml.tokens"]
    named = {f"{name}_token": config[f"{name}_token_id"] for name in ("bos", "eos", "pad")}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        **{name: words[number] for name, number in named.items() if number is not None},
        **({"chat_template": fields[key]} if (key := "tokenizer.chat_template") in fields else {}),
    }


def _open(file: Path) -> tuple[dict[str, Any], Iterator[tuple[str, Tensor]]]:
    """Metadata and tensors (float32, in torch's order of sizes) of a GGUF file."""
    try:
        import gguf
    except ImportError:
        raise UserError(f"reading {file.name} needs the package gguf: {INSTALL}") from None
    try:
        reader = gguf.GGUFReader(file)
        fields = {name: item.contents() for name, item in reader.fields.items()}
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"{file}: not a sound GGUF file ({error})") from None

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for item in reader.tensors:
            values = gguf.quants.dequantize(item.data, item.tensor_type)
            yield item.name, torch.from_numpy(np.array(values, dtype=np.float32))

    return fields, tensors()


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
