"""Random tiny models of transformers to compare with, inputs for them, and faults to plant in ours.

Two things make a comparison of random models blind, and are seen to here: `BlipVisionConfig` starts its
weights at 1e-10, so that a random BLIP ignores its image, and fresh LayerNorms (weight 1, bias 0) hide one
that is missing. Every weight is drawn anew, large enough to matter, and the tests check that the peer looks
at all of its inputs.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import Blip2Config, BlipConfig, CLIPConfig, Dinov2Config
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from openblip.convert.recognise import from_checkpoint_
from openblip.models.layers import ACTIVATIONS, Attention, Mlp

TOLERANCE = 1e-9
CLS, SEP, DEC, ENC = 101, 102, 128, 129
VOCABULARY = 130


def blip_config(*, text_width: int = 16, vision_width: int = 24) -> BlipConfig:
    """Two layers, vision and text of different widths, [DEC] and [ENC] the last two of 130 words."""
    text = {
        "vocab_size": VOCABULARY, "hidden_size": text_width, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 24, "pad_token_id": 0, "bos_token_id": DEC,
        "eos_token_id": SEP, "sep_token_id": SEP, "label_smoothing": 0.1,
    }  # fmt: skip
    vision = {
        "hidden_size": vision_width, "intermediate_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 4, "image_size": 32, "patch_size": 8, "initializer_range": 0.02,
    }  # fmt: skip
    return BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=12)


def clip_config(**text: int) -> CLIPConfig:
    """Two layers; 98 starts a text, 99 ends it, 0 pads (where it is not `text`'s)."""
    small = {"num_hidden_layers": 2, "num_attention_heads": 4, "attn_implementation": "sdpa"}
    ids = {"vocab_size": 100, "bos_token_id": 98, "eos_token_id": 99, "pad_token_id": 0}
    return CLIPConfig(
        text_config={
            "hidden_size": 16,
            "intermediate_size": 28,
            "max_position_embeddings": 12,
            **ids,
            **small,
            **text,
        },
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 32,
            "image_size": 32,
            "patch_size": 8,
            **small,
        },
        projection_dim=12,
        attn_implementation="sdpa",  # the eager path rounds its softmax to float32
    )


def dinov2_config(**settings: object) -> Dinov2Config:
    """Three layers, 4 x 4 patches."""
    return Dinov2Config(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8,
        attn_implementation="sdpa", **settings,
    )  # fmt: skip


def blip2_sections(**qformer: bool) -> dict[str, dict]:
    """Vision tower and Q-Former of a BLIP-2 or InstructBLIP: four layers, of which two look at the image."""
    return {
        "vision_config": {
            "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
            "image_size": 32, "patch_size": 8, "initializer_range": 0.02,
        },
        "qformer_config": {
            "vocab_size": DEC + 1, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4,
            "num_attention_heads": 4, "max_position_embeddings": 24, "pad_token_id": 0, **qformer,
        },
    }  # fmt: skip


def blip2_retrieval_config() -> Blip2Config:
    """Five queries; the language model it names is never made."""
    return Blip2Config(
        **blip2_sections(use_qformer_text_input=True), num_query_tokens=5, image_text_hidden_size=12
    )


def language_model(model_type: str) -> dict:
    """A tiny one: of its 60 words 43 to 58 end a text, 0 pads, 1 stands for the image, 2 begins."""
    common = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": [*range(43, 59)]}
    decoder = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_size": 16,
        "max_position_embeddings": 64,
    }
    kinds = {
        "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16, **decoder},
        "llama": {"intermediate_size": 24, "num_key_value_heads": 2, **decoder},
        "t5": {
            "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0,
            "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu", "tie_word_embeddings": False,
        },
    }  # fmt: skip
    return {"model_type": model_type, **common, **kinds[model_type]}


def save_words(folder: Path) -> None:
    """The vocabulary of a BERT of 128 words as a tokenizer's file; [DEC] is the one behind them."""
    words = [f"w{number}" for number in range(DEC)]
    words[0], words[100], words[CLS], words[SEP] = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")


def random_peer(cls: type, config, seed: int = 0) -> nn.Module:
    """A peer in float64 and eval mode, all its weights drawn anew."""
    peer = cls(config).double().eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in peer.parameters():  # tied ones come once
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.ndim == 0:
            continue
        if parameter.ndim == 1:  # norms, biases, layer scale
            parameter.data = parameter.data + 0.3 * noise
        else:
            parameter.data = noise * 1.5 * parameter[0].numel() ** -0.5
    return peer


@contextlib.contextmanager
def norms_that_do_not_round() -> Iterator[None]:
    """transformers' norms of Llama and T5 round to float32 in between; not here, in neither model."""

    def forward(norm, x):
        return norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", forward)
        patch.setattr(T5LayerNorm, "forward", forward)
        yield


def make_talkative_(decoder: nn.Module, end: float = 4) -> None:
    """Tune a random text decoder so that it does not say one word for ever, and ends after a while."""
    for layer in decoder.bert.encoder.layer:
        layer.crossattention.output.dense.weight.data *= 0.5
        layer.attention.output.dense.weight.data *= 3
        layer.output.dense.weight.data *= 3
    decoder.cls.predictions.bias.data[SEP] += end


def cut(sequences: Tensor) -> list[list[int]]:
    """Rows up to the end token: behind it, transformers' beam search takes a pad_token_id of 0 for none."""
    rows = sequences.tolist()
    return [row[: row.index(SEP) + 1] if SEP in row else row for row in rows]


def ours(peer: nn.Module) -> nn.Module:
    """Our model with a copy of the peer's weights."""
    weights = {name: value.clone() for name, value in peer.state_dict().items()}
    return from_checkpoint_(peer.config.to_dict(), weights, "peer")[0]


def pixels(*shape: int, seed: int = 1) -> Tensor:
    """Random images of this shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def texts(
    lengths: list[int], first: int, last: int = SEP, low: int = 1, high: int = 100
) -> tuple[Tensor, Tensor]:
    """Padded (input_ids, attention_mask): `first`, random words, `last`, then 0."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(low, high, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids[:, 0] = first
    ids[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = last
    return ids * mask, mask


def difference(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of any element of any output; the two must name the same outputs."""
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert value.shape == theirs[name].shape, name
    return max(float((value.double() - theirs[name].double()).abs().max()) for name, value in mine.items())


# Faults. Each takes a model of ours and breaks it in one place.


def _modules(model: nn.Module, kind: type, within: str) -> list[nn.Module]:
    found = [m for name, m in model.named_modules() if isinstance(m, kind) and name.startswith(within)]
    assert found, f"nothing to break in {within}"
    return found


def other_eps(within: str, factor: float) -> Callable[[nn.Module], None]:
    """LayerNorms with another epsilon."""

    def plant(model: nn.Module) -> None:
        for norm in _modules(model, nn.LayerNorm, within):
            norm.eps *= factor

    return plant


def swapped_q_and_k(within: str) -> Callable[[nn.Module], None]:
    """Queries and keys of self-attention exchanged (in a causal or padded model not even a symmetry)."""

    def plant(model: nn.Module) -> None:
        for attention in _modules(model, Attention, within):
            if hasattr(attention, "qkv"):
                for parameter in attention.qkv.parameters():
                    q, k, v = parameter.data.chunk(3)
                    parameter.data = torch.cat([k, q, v])

    return plant


def swapped_k_and_v(within: str) -> Callable[[nn.Module], None]:
    """Keys and values of cross-attention exchanged."""

    def plant(model: nn.Module) -> None:
        for attention in _modules(model, Attention, within):
            if hasattr(attention, "kv"):
                for parameter in attention.kv.parameters():
                    parameter.data = parameter.data.roll(len(parameter) // 2, dims=0)

    return plant


def other_activation(within: str, name: str) -> Callable[[nn.Module], None]:
    """MLPs with another activation: the tanh approximation for the exact GELU, GELU for QuickGELU."""

    def plant(model: nn.Module) -> None:
        for mlp in _modules(model, Mlp, within):
            mlp.act = ACTIVATIONS[name]

    return plant


def without(path: str) -> Callable[[nn.Module], None]:
    """A module left out."""

    def plant(model: nn.Module) -> None:
        model.get_submodule(path)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Identity())

    return plant
