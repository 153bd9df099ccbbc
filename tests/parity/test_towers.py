"""Image towers by themselves: ours give what transformers' SigLIP, ViT and DeiT give, from their folders and files."""

import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image
from torch import Tensor
from transformers import DeiTConfig, SiglipConfig, SiglipVisionConfig, SiglipVisionModel, ViTConfig
from transformers.models.deit.modeling_deit import DeiTForImageClassificationWithTeacher, DeiTModel
from transformers.models.siglip.modeling_siglip import SiglipModel
from transformers.models.vit.modeling_vit import ViTForImageClassification, ViTModel

import openblip
from openblip.config import UserError
from openblip.convert.recognise import from_checkpoint_
from openblip.convert.weights import WeightsError
from openblip.hub import load_pretrained
from tests.parity.peers import (
    TOLERANCE,
    other_activation,
    other_eps,
    pixels,
    random_peer,
    swapped_q_and_k,
    without,
)

SMALL = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8, "attn_implementation": "sdpa",
}  # fmt: skip
TEXT = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 40,
    "projection_size": 24, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def siglip_config(**changes: int) -> SiglipConfig:
    return SiglipConfig(text_config=TEXT, vision_config=SMALL | changes, attn_implementation="sdpa")


PEERS = {
    "SiglipVisionModel": lambda: random_peer(SiglipVisionModel, SiglipVisionConfig(**SMALL)),
    "SiglipModel": lambda: random_peer(SiglipModel, siglip_config()),
    "SigLIP with pixels over": lambda: random_peer(
        SiglipVisionModel, SiglipVisionConfig(**SMALL | {"image_size": 36, "patch_size": 8})
    ),
    "ViTModel": lambda: random_peer(ViTModel, ViTConfig(**SMALL)),
    "ViTForImageClassification": lambda: random_peer(ViTForImageClassification, ViTConfig(**SMALL)),
}


def tower(peer):
    """The part of a peer that gives tokens."""
    return getattr(peer, "vision_model", getattr(peer, "vit", peer))


@torch.no_grad()
def gap(model, peer, images: Tensor) -> float:
    """The largest difference of all tokens; of a tower without a class token, token 0 is the mean of the others."""
    theirs = tower(peer)(images).last_hidden_state
    if not model.config.class_token:
        theirs = torch.cat([theirs.mean(dim=1, keepdim=True), theirs], dim=1)
    mine = model(images)
    assert mine.shape == theirs.shape
    return float((mine - theirs).abs().max())


def side(peer) -> int:
    return tower(peer).config.image_size


@pytest.mark.parametrize("kind", PEERS)
def test_tokens_are_those_of_transformers(kind, tmp_path):
    words = tokenizers.Tokenizer(
        tokenizers.models.Unigram([("a", 0.0)], 0)
    )  # SigLIP's, which is none of ours
    words.save(str(tmp_path / "tokenizer.json"))
    peer = PEERS[kind]()
    images = pixels(2, 3, side(peer), side(peer))
    first, second = tower(peer)(images).last_hidden_state
    assert (first - second).abs().max() > 0.1  # it looks at its image
    peer.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path, dtype=torch.float64)
    assert gap(loaded.model, peer, images) < TOLERANCE
    own = [name for name, _ in peer.named_parameters()]
    assert len(loaded.report.loaded) == len(loaded.model.state_dict()) and len(loaded.report.ignored) < len(
        own
    )
    assert loaded.tokenizer is None and not loaded.report.fresh


@torch.no_grad()
def test_a_tower_by_itself_embeds_pictures(tmp_path):
    peer = PEERS["ViTModel"]().float()
    peer.save_pretrained(tmp_path)
    pipeline = openblip.load(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3), dtype=np.uint8)
    images = [Image.fromarray(array) for array in noise]
    states = peer(torch.stack([pipeline.transform(image) for image in images])).last_hidden_state
    wanted = torch.nn.functional.normalize(states[:, 0], dim=-1)
    found = pipeline.embed_images(images)
    assert np.abs(found - wanted.numpy()).max() < 1e-5 and np.abs(found[0] - found[1]).max() > 1e-3
    assert pipeline.embed_images([]).shape == (0, 24)
    for refused in (lambda: pipeline.embed_texts("a"), lambda: pipeline.caption(images[0])):
        with pytest.raises(UserError, match="this VisionTransformer model has no part for it"):
            refused()


@pytest.mark.parametrize(
    "fault",
    [
        other_eps("", 10),
        swapped_q_and_k("blocks.1"),
        other_activation("blocks.2", "gelu"),
        without("norm"),
    ],
    ids=["eps", "q and k", "exact GELU", "no final norm"],
)
def test_a_fault_in_siglip_is_seen(fault):
    peer = PEERS["SiglipVisionModel"]()
    model, _ = from_checkpoint_(peer.config.to_dict(), dict(peer.state_dict()), "peer")
    assert gap(model, peer, pixels(2, 3, 32, 32)) < TOLERANCE
    fault(model)
    assert gap(model, peer, pixels(2, 3, 32, 32)) > TOLERANCE


@pytest.mark.parametrize("fault", [other_eps("", 10), swapped_q_and_k("blocks.1")], ids=["eps", "q and k"])
def test_a_fault_in_a_vit_is_seen(fault, tmp_path):
    peer = PEERS["ViTModel"]()
    peer.config.layer_norm_eps = 1e-6  # 1e-12, as it is, and 1e-11 are the same in float64
    peer = random_peer(ViTModel, peer.config)
    peer.save_pretrained(tmp_path)
    model = load_pretrained(tmp_path, dtype=torch.float64).model
    fault(model)
    assert gap(model, peer, pixels(2, 3, 32, 32)) > TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("kind", ["SiglipVisionModel", "ViTModel"])
def test_another_size_is_interpolated_as_there(kind, tmp_path):
    peer = PEERS[kind]()
    peer.save_pretrained(tmp_path)
    images = pixels(1, 3, 48, 40)
    theirs = peer(images, interpolate_pos_encoding=True).last_hidden_state
    mine = load_pretrained(tmp_path, dtype=torch.float64).model(images)
    assert (mine[:, -theirs.shape[1] :] - theirs).abs().max() < TOLERANCE
    larger = load_pretrained(tmp_path, dtype=torch.float64, image_size=48)
    images = pixels(1, 3, 48, 48)
    theirs = peer(images, interpolate_pos_encoding=True).last_hidden_state
    assert (larger.model(images)[:, -theirs.shape[1] :] - theirs).abs().max() < TOLERANCE
    assert larger.report.interpolated == {"position_embedding": "4 x 4 -> 6 x 6 patches, bicubic"}


@torch.no_grad()
@pytest.mark.parametrize("cls", [DeiTModel, DeiTForImageClassificationWithTeacher])
def test_a_distilled_deit_is_read_without_its_distillation_token(cls, tmp_path):
    peer = random_peer(cls, DeiTConfig(**SMALL))
    peer.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path, dtype=torch.float64)
    body = getattr(peer, "deit", peer)
    images = pixels(2, 3, 32, 32)
    x = body.embeddings(images)
    x = torch.cat([x[:, :1], x[:, 2:]], dim=1)  # its own layers, on its own embeddings, but for that one
    for layer in body.layers:
        x = layer(x)
    assert (loaded.model(images) - body.layernorm(x)).abs().max() < TOLERANCE
    assert (loaded.model(images)[:, 0] - body(images).last_hidden_state[:, 0]).abs().max() > 1e-3
    assert "distillation_token" in str(loaded.report) and "something to begin with" in str(loaded.report)


# ------------------------------------------------------------------------------------------------ timm's layout

WIDE = SMALL | {"hidden_size": 128, "num_attention_heads": 2}  # heads of 64, as all of timm's


def as_timm(peer) -> dict[str, Tensor]:
    """A ViT's weights under timm's names (cls_token, pos_embed, blocks.N.attn.qkv, ...), with a head for classes."""
    theirs = peer.state_dict()
    found = {
        "cls_token": theirs["embeddings.cls_token"],
        "pos_embed": theirs["embeddings.position_embeddings"],
        "head.weight": torch.zeros(10, 128),
        "head.bias": torch.zeros(10),
    }
    for end in ("weight", "bias"):
        found[f"patch_embed.proj.{end}"] = theirs[f"embeddings.patch_embeddings.projection.{end}"]
        found[f"norm.{end}"] = theirs[f"layernorm.{end}"]
        for n in range(peer.config.num_hidden_layers):
            parts = [theirs[f"layers.{n}.attention.{name}_proj.{end}"] for name in "qkv"]
            found[f"blocks.{n}.attn.qkv.{end}"] = torch.cat(parts)
            found[f"blocks.{n}.attn.proj.{end}"] = theirs[f"layers.{n}.attention.o_proj.{end}"]
            found[f"blocks.{n}.norm1.{end}"] = theirs[f"layers.{n}.layernorm_before.{end}"]
            found[f"blocks.{n}.norm2.{end}"] = theirs[f"layers.{n}.layernorm_after.{end}"]
            for name in ("fc1", "fc2"):
                found[f"blocks.{n}.mlp.{name}.{end}"] = theirs[f"layers.{n}.mlp.{name}.{end}"]
    return found


@pytest.fixture(scope="module")
def wide():
    return random_peer(ViTModel, ViTConfig(**WIDE, layer_norm_eps=1e-6))


def test_timms_names_are_read(wide):
    tensors = as_timm(wide)
    extra = {
        "pre_logits.fc.weight": torch.zeros(128, 128),
        "pre_logits.fc.bias": torch.zeros(128),
    }  # of in21k's
    model, report = from_checkpoint_({}, tensors | extra, "deit.pth")
    assert gap(model, wide, pixels(2, 3, 32, 32)) < TOLERANCE
    assert (
        set(report.ignored) == {"head.weight", "head.bias", *extra}
        and report.layout == "timm VisionTransformer"
    )
    swapped = dict(tensors)
    for name in [name for name in tensors if ".attn.qkv." in name]:
        q, k, v = tensors[name].chunk(3)
        swapped[name] = torch.cat([k, q, v])
    wrong, _ = from_checkpoint_({}, swapped, "deit.pth")
    assert gap(wrong, wide, pixels(2, 3, 32, 32)) > TOLERANCE


def test_what_is_no_timm_vit_is_refused(wide):
    tensors = as_timm(wide)
    with pytest.raises(WeightsError, match=r"missing: norm.bias, norm.weight"):
        from_checkpoint_({}, {k: v for k, v in tensors.items() if not k.startswith("norm.")}, "deit.pth")
    with pytest.raises(WeightsError, match=r"no place for: blocks.0.ls1.gamma"):
        from_checkpoint_({}, tensors | {"blocks.0.ls1.gamma": torch.ones(128)}, "deit.pth")
    positions = tensors["pos_embed"]
    with pytest.raises(UserError, match="16 rows, which leave none for the class token"):
        from_checkpoint_({}, tensors | {"pos_embed": positions[:, 1:]}, "deit.pth")
    with pytest.raises(UserError, match="18 position embeddings are no square grid"):
        from_checkpoint_(
            {}, tensors | {"pos_embed": torch.cat([positions, positions[:, :1]], dim=1)}, "deit.pth"
        )
