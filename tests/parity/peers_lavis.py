"""Random peers of LAVIS's BLIP-2 and InstructBLIP and the original files of each: bridge, image tower, language model.

transformers has one epsilon for the tower and the norm behind it; here its peer gets that of the released code, 1e-5.
"""

import json
from pathlib import Path

import torch
from transformers import Blip2Config as TheirBlip2Config
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2VisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
)

from openblip.hub import load_pretrained
from tests.data.test_prompts import byte_level
from tests.parity.lavis_files import lavis_names, openai_names, split_tower, with_last_block
from tests.parity.peers import blip2_sections, language_model, pixels, random_peer

WIDTH = 176  # two heads of 88
IMAGES, LARGER = pixels(2, 3, 32, 32), pixels(2, 3, 48, 48)
KINDS = {  # which projection the file has, which language model
    "opt": ("opt_proj", "opt"),
    "t5": ("t5_proj", "t5"),
    "instruct llama": ("llm_proj", "llama"),
    "instruct t5": ("t5_proj", "t5"),
}


def sections(**qformer) -> dict:
    """Heads of EVA's and BERT's sizes: shapes do not tell how many there are."""
    found = blip2_sections(**qformer)
    found["vision_config"] |= {"hidden_size": WIDTH, "intermediate_size": 40, "num_attention_heads": 2}
    found["qformer_config"] |= {"hidden_size": 128, "num_attention_heads": 2}
    return found


def drawn(cls: type, config):
    """A random peer whose weights are numbers of float32, with EVA's biases and the released epsilon."""
    peer = random_peer(cls, config)
    with torch.no_grad():
        for layer in peer.vision_model.encoder.layers:
            layer.self_attn.qkv.bias[WIDTH : 2 * WIDTH] = 0
        for parameter in peer.parameters():
            parameter.copy_(parameter.float())
    peer.vision_model.post_layernorm.eps = 1e-5
    return peer


class Files:
    """A peer and its files: what LAVIS saved of it, the tower with one block more, the language model's folder."""

    def __init__(self, folder: Path, kind: str) -> None:
        instruct = kind.startswith("instruct")
        projection, family = KINDS[kind]
        words = byte_level()
        settings = language_model(family) | {"vocab_size": len(words), "eos_token_id": 2, "pad_token_id": 1}
        config = (InstructBlipConfig if instruct else TheirBlip2Config)(
            **sections(), num_query_tokens=5, image_token_index=1, text_config=settings
        )
        self.peer = drawn(
            InstructBlipForConditionalGeneration if instruct else Blip2ForConditionalGeneration, config
        )
        self.whole = lavis_names(self.peer.state_dict(), projection)
        self.bridge, tower = split_tower(self.whole)
        self.file, self.vision, self.lm = folder / "bridge.pth", folder / "tower.pth", folder / "lm"
        torch.save({"model": self.bridge}, self.file)
        torch.save(with_last_block(tower), self.vision)
        self.peer.language_model.float().save_pretrained(self.lm)
        self.peer.double()
        if (
            family == "t5"
        ):  # Flan-T5's own configuration has another GELU than the released BLIP-2 ran it with
            path = self.lm / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"dense_act_fn": "gelu_new"}))
        words.save_pretrained(self.lm)

    def load(self, **changes):
        given = {"vision": self.vision, "lm": str(self.lm), "dtype": torch.float64} | changes
        found = load_pretrained(given.pop("file", self.file), **given)
        found.model.double()
        return found


def stage2_files(tmp_path_factory):
    """A function of a kind that makes its `Files` once."""
    made: dict[str, Files] = {}

    def get(kind: str) -> Files:
        if kind not in made:
            made[kind] = Files(tmp_path_factory.mktemp("lavis"), kind)
        return made[kind]

    return get


def eva_file(tmp_path_factory):
    """(file, its tensors, transformers' model of its blocks but the last)."""
    peer = random_peer(Blip2VisionModel, TheirBlip2Config(**sections()).vision_config, seed=3)
    with torch.no_grad():
        for layer in peer.encoder.layers:
            layer.self_attn.qkv.bias[WIDTH : 2 * WIDTH] = 0
    peer.post_layernorm = torch.nn.Identity()
    state = {f"vision_model.{name}": value for name, value in peer.state_dict().items()}
    tower = with_last_block(split_tower(lavis_names(state))[1])
    file = tmp_path_factory.mktemp("eva") / "eva_vit_g.pth"
    torch.save(tower, file)
    return file, tower, peer


def clip_file(tmp_path_factory):
    """(file, its tensors, transformers' model of all of its blocks)."""
    config = CLIPVisionConfig(
        hidden_size=128, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, image_size=32,
        patch_size=8, attn_implementation="sdpa",
    )  # fmt: skip
    peer = random_peer(CLIPVisionModel, config, seed=4)
    tower = openai_names(peer.state_dict())
    file = tmp_path_factory.mktemp("clip") / "clip_vit_L.pth"
    torch.save(tower, file)
    return file, tower, peer
