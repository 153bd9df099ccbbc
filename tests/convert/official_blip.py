"""Checkpoints as salesforce/BLIP and LAVIS write them for BLIP, with random weights: names and shapes of their modules.

Written from the modules of that code, not from our tables, so that the two can be held against each other. Heads are 64
wide there, which keeps these from being as tiny as other models of the tests.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

State = dict[str, Tensor]


@dataclass
class Official:
    """A geometry, and the weights that are drawn for it one after the other."""

    vision: int = 192  # three heads
    text: int = 128  # two
    blocks: int = 3
    layers: int = 2
    words: int = 130
    image_size: int = 32
    patch: int = 8
    projection: int = 12
    queue: int = 5
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def draw(self, *shape: int) -> Tensor:
        """A matrix that keeps the size of what it is multiplied with; a vector around 0."""
        noise = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return noise * (0.3 if len(shape) == 1 else 1.5 * noise[0].numel() ** -0.5)

    def linear(self, name: str, out: int, inside: int) -> State:
        return {f"{name}.weight": self.draw(out, inside), f"{name}.bias": self.draw(out)}

    def norm(self, name: str, width: int) -> State:
        return {f"{name}.weight": 1 + self.draw(width), f"{name}.bias": self.draw(width)}

    def vit(self, name: str) -> State:
        """timm's ViT of 2021."""
        width, patches = self.vision, (self.image_size // self.patch) ** 2
        state = {
            f"{name}.cls_token": self.draw(1, 1, width),
            f"{name}.pos_embed": self.draw(1, 1 + patches, width),
        }
        state[f"{name}.patch_embed.proj.weight"] = self.draw(width, 3, self.patch, self.patch)
        state[f"{name}.patch_embed.proj.bias"] = self.draw(width)
        for number in range(self.blocks):
            block = f"{name}.blocks.{number}"
            state |= self.norm(f"{block}.norm1", width)
            state |= self.linear(f"{block}.attn.qkv", 3 * width, width)
            state |= self.linear(f"{block}.attn.proj", width, width)
            state |= self.norm(f"{block}.norm2", width)
            state |= self.linear(f"{block}.mlp.fc1", width + 8, width)
            state |= self.linear(f"{block}.mlp.fc2", width, width + 8)
        return state | self.norm(f"{name}.norm", width)

    def attention(self, name: str, memory: int, *, twin: bool = False, merge: bool = False) -> State:
        """BertAttention; NLVR2's looks at two images."""
        state: State = {}
        for number in ("0", "1") if twin else ("",):
            for part, inside in (("query", self.text), ("key", memory), ("value", memory)):
                state |= self.linear(f"{name}.self{number}.{part}", self.text, inside)
            state |= self.linear(f"{name}.output.dense{number}", self.text, self.text)
        if merge:
            state |= self.linear(f"{name}.output.merge_layer", self.text, 2 * self.text)
        return state | self.norm(f"{name}.output.LayerNorm", self.text)

    def bert(self, name: str, memory: int, *, twin: bool = False) -> State:
        """BertModel of med.py, or of nlvr_encoder.py."""
        width, bert = self.text, f"{name}.embeddings"
        state = {f"{bert}.position_ids": torch.arange(24)[None]}
        state[f"{bert}.word_embeddings.weight"] = self.draw(self.words, width)
        state[f"{bert}.position_embeddings.weight"] = self.draw(24, width)
        state |= self.norm(f"{bert}.LayerNorm", width)
        for number in range(self.layers):
            layer = f"{name}.encoder.layer.{number}"
            state |= self.attention(f"{layer}.attention", width)
            state |= self.attention(f"{layer}.crossattention", memory, twin=twin, merge=twin and number >= 6)
            state |= self.linear(f"{layer}.intermediate.dense", width + 8, width)
            state |= self.linear(f"{layer}.output.dense", width, width + 8)
            state |= self.norm(f"{layer}.output.LayerNorm", width)
        return state

    def decoder(self, name: str, memory: int) -> State:
        """BertLMHeadModel: the words are its output layer, too, and both are in the file."""
        state, head = self.bert(f"{name}.bert", memory), f"{name}.cls.predictions"
        state[f"{head}.bias"] = self.draw(self.words)
        state |= self.linear(f"{head}.transform.dense", self.text, self.text)
        state |= self.norm(f"{head}.transform.LayerNorm", self.text)
        state[f"{head}.decoder.weight"] = state[f"{name}.bert.embeddings.word_embeddings.weight"].clone()
        state[f"{head}.decoder.bias"] = state[f"{head}.bias"].clone()
        return state

    def itc(self, end: str = "") -> State:
        state = self.linear(f"vision_proj{end}", self.projection, self.vision)
        return state | self.linear(f"text_proj{end}", self.projection, self.text)

    def momentum(self) -> State:
        state = self.vit("visual_encoder_m") | self.bert("text_encoder_m", self.vision) | self.itc("_m")
        state |= {name: self.draw(self.projection, self.queue) for name in ("image_queue", "text_queue")}
        return state

    def pretrain(self) -> State:
        """BLIP_Pretrain. All but self-attention is one for encoder and decoder, and in the file twice."""
        state = self.vit("visual_encoder") | self.bert("text_encoder", self.vision)
        state |= self.decoder("text_decoder", self.vision)
        for name in state:
            within = name.removeprefix("text_encoder.")
            if within != name and ".attention." not in name:
                state[name] = state[f"text_decoder.bert.{within}"].clone()
        state |= self.itc() | self.linear("itm_head", 2, self.text) | {"temp": torch.tensor(0.05).double()}
        return state | self.momentum() | {"queue_ptr": torch.tensor([3])}

    def retrieval(self, pointer: str = "ptr_queue") -> State:
        """BLIP_Retrieval; the pointer is called `queue_ptr` in LAVIS."""
        state = self.vit("visual_encoder") | self.bert("text_encoder", self.vision) | self.itc()
        state |= (
            self.linear("itm_head", 2, self.text) | {"temp": torch.tensor(0.02).double()} | self.momentum()
        )
        return state | {"idx_queue": torch.full((1, self.queue), -100), pointer: torch.tensor([3])}

    def itm(self) -> State:
        """BlipITM of LAVIS."""
        state = self.vit("visual_encoder") | self.bert("text_encoder", self.vision) | self.itc()
        return state | self.linear("itm_head", 2, self.text)

    def caption(self) -> State:
        """BLIP_Decoder."""
        return self.vit("visual_encoder") | self.decoder("text_decoder", self.vision)

    def vqa(self) -> State:
        """BLIP_VQA: the decoder looks at the states of the question."""
        state = self.vit("visual_encoder") | self.bert("text_encoder", self.vision)
        return state | self.decoder("text_decoder", self.text)

    def nlvr(self) -> State:
        """BLIP_NLVR, which merges the two images from layer 6 on by what was learned, below by a mean."""
        state = self.vit("visual_encoder") | self.bert("text_encoder", self.vision, twin=True)
        return (
            state | self.linear("cls_head.0", self.text, self.text) | self.linear("cls_head.2", 2, self.text)
        )


def save(state: State, file: Path) -> Path:
    """As their training loops save."""
    torch.save({"model": state, "optimizer": {"state": {}}, "config": {"vit": "base"}, "epoch": 5}, file)
    return file


def for_transformers(state: State) -> State:
    """The same weights by the names of transformers' BLIP, which has neither momentum, nor queues, nor temperature.

    Its text models have kept the names; in its vision tower everything has another.
    """
    names = (
        ("visual_encoder.blocks.", "vision_model.encoder.layers."),
        ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
        ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
        ("visual_encoder.patch_embed.proj", "vision_model.embeddings.patch_embedding"),
        ("visual_encoder.norm", "vision_model.post_layernorm"),
        (".norm1.", ".layer_norm1."),
        (".norm2.", ".layer_norm2."),
        (".attn.qkv.", ".self_attn.qkv."),
        (".attn.proj.", ".self_attn.projection."),
    )
    found = {}
    for name, value in state.items():
        if "_m." in name or "queue" in name or name == "temp" or name.endswith("position_ids"):
            continue
        for theirs, new in names:
            name = name.replace(theirs, new)
        found[name] = value
    return found
