"""A random tiny xGen-MM of three peers, its checkpoint as the released code writes it, and its forward done slowly.

The image tower is transformers' SigLIP and the language model its Phi-3. The resampler, the tiling and what joins the
three are written down here from the report and the released code, one token and one head at a time.
"""

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from tests.parity.peers import random_peer

SIDE, PATCH = 4, 8  # tokens across a tile, pixels of a token
DEPTH, LATENTS, HEADS = 2, 3, 16

# Names of a released checkpoint (N: the number of a layer).
RELEASED_NAMES = [
    r"vision_encoder\.embeddings\.(patch_embedding\.(weight|bias)|position_embedding\.weight)",
    r"vision_encoder\.encoder\.layers\.N\.self_attn\.[qkv]_proj\.(weight|bias)",
    r"vision_encoder\.encoder\.layers\.N\.self_attn\.out_proj\.(weight|bias)",
    r"vision_encoder\.encoder\.layers\.N\.(layer_norm[12]|mlp\.fc[12])\.(weight|bias)",
    r"vision_encoder\.post_layernorm\.(weight|bias)",
    r"vision_encoder\.head\..*",
    r"vision_tokenizer\.(latents|(projection|norm)\.(weight|bias))",
    r"vision_tokenizer\.layers\.N\.0\.(norm_media|norm_latents)\.(weight|bias)",
    r"vision_tokenizer\.layers\.N\.0\.(to_q|to_kv|to_out)\.weight",
    r"vision_tokenizer\.layers\.N\.1\.(0\.(weight|bias)|1\.weight|3\.weight)",
    r"lang_model\.model\.embed_tokens\.(weight|additional_embedding\.weight)",
    r"lang_model\.lm_head\.(weight|additional_fc\.weight)",
    r"lang_model\.model\.layers\.N\.(input_layernorm|post_attention_layernorm)\.weight",
    r"lang_model\.model\.layers\.N\.self_attn\.(qkv_proj|o_proj)\.weight",
    r"lang_model\.model\.layers\.N\.mlp\.(gate_up_proj|down_proj)\.weight",
    r"lang_model\.model\.norm\.weight",
]


@dataclass
class Released:
    """The three parts, the rows of the added words, and the id of the first of them."""

    vision: SiglipVisionModel
    sampler: dict[str, Tensor]
    lm: Phi3ForCausalLM
    added_words: Tensor  # [3, H]
    added_head: Tensor  # [3, H]
    first: int

    def checkpoint(self) -> dict[str, Tensor]:
        """The state dict of the released class."""
        found = {f"vision_encoder.{name}": value for name, value in self.vision.state_dict().items()}
        found |= {f"vision_tokenizer.{name}": value for name, value in self.sampler.items()}
        found |= {f"lang_model.{name}": value for name, value in self.lm.state_dict().items()}
        found["lang_model.model.embed_tokens.additional_embedding.weight"] = self.added_words
        found["lang_model.lm_head.additional_fc.weight"] = self.added_head
        for name in found:
            row = re.sub(r"(?<=layers\.)\d+(?=\.)", "N", name)
            assert any(re.fullmatch(pattern, row) for pattern in RELEASED_NAMES), (
                f"{name} is not a released name"
            )
        return {name: value.detach().clone() for name, value in found.items()}


def released(*, hidden: int, heads: int, rows: int, first: int, kv_heads: int | None = None) -> Released:
    """`hidden`, `heads`, `rows`: width, heads and vocabulary of the language model; `first`: id of `<image>`."""
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    width = 32
    vision = random_peer(
        SiglipVisionModel,
        SiglipVisionConfig(
            hidden_size=width, intermediate_size=40, num_hidden_layers=2, num_attention_heads=16,
            image_size=SIDE * PATCH, patch_size=PATCH, attn_implementation="sdpa",
        ),
    )  # fmt: skip
    lm = random_peer(
        Phi3ForCausalLM,
        Phi3Config(
            vocab_size=rows, hidden_size=hidden, intermediate_size=24, num_hidden_layers=2, num_attention_heads=heads,
            num_key_value_heads=kv_heads, max_position_embeddings=4096, sliding_window=2047, bos_token_id=1,
            eos_token_id=2, pad_token_id=2, attn_implementation="sdpa",
        ),
    )  # fmt: skip
    inner = HEADS * 4
    sampler = {"latents": draw(LATENTS, width), "projection.weight": draw(hidden, width, scale=width**-0.5)}
    sampler |= {
        "projection.bias": draw(hidden),
        "norm.weight": 1 + draw(width, scale=0.3),
        "norm.bias": draw(width),
    }
    for n in range(DEPTH):
        for norm in ("0.norm_media", "0.norm_latents", "1.0"):
            sampler[f"layers.{n}.{norm}.weight"] = 1 + draw(width, scale=0.3)
            sampler[f"layers.{n}.{norm}.bias"] = draw(width, scale=0.3)
        sampler[f"layers.{n}.0.to_q.weight"] = draw(inner, width, scale=width**-0.5)
        sampler[f"layers.{n}.0.to_kv.weight"] = draw(2 * inner, width, scale=width**-0.5)
        sampler[f"layers.{n}.0.to_out.weight"] = draw(width, inner, scale=inner**-0.5)
        sampler[f"layers.{n}.1.1.weight"] = draw(4 * width, width, scale=width**-0.5)
        sampler[f"layers.{n}.1.3.weight"] = draw(width, 4 * width, scale=(4 * width) ** -0.5)
    return Released(vision, sampler, lm, draw(3, hidden), draw(3, hidden), first)


def norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    """LayerNorm over the last axis, epsilon 1e-5."""
    centred = x - x.mean(dim=-1, keepdim=True)
    scale = (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    return centred / scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def resample(weights: dict[str, Tensor], media: Tensor, mask: Tensor) -> Tensor:
    """One group: media [N, D], mask [N] (True: real) -> [K, H]. The media are the same in every layer."""
    latents = weights["latents"]
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers."))
    for n in range(depth):
        x = norm(media, weights, f"layers.{n}.0.norm_media")
        own = norm(latents, weights, f"layers.{n}.0.norm_latents")
        q = own @ weights[f"layers.{n}.0.to_q.weight"].T
        k, v = (torch.cat([x, own]) @ weights[f"layers.{n}.0.to_kv.weight"].T).chunk(2, dim=-1)
        size = q.shape[1] // HEADS
        visible = torch.cat([mask, torch.ones(len(latents), dtype=torch.bool)])
        heads = []
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            scores = (q[:, part] * size**-0.5) @ k[:, part].T
            scores = scores.masked_fill(~visible, -math.inf)
            heads.append(scores.softmax(dim=-1) @ v[:, part])
        latents = latents + torch.cat(heads, dim=-1) @ weights[f"layers.{n}.0.to_out.weight"].T
        x = norm(latents, weights, f"layers.{n}.1.0") @ weights[f"layers.{n}.1.1.weight"].T
        x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        latents = latents + x @ weights[f"layers.{n}.1.3.weight"].T
    return norm(latents, weights, "norm") @ weights["projection.weight"].T + weights["projection.bias"]


def groups(
    tiles: Tensor, columns: int, rows: int, width: int, height: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Tokens of a picture's tiles [1 + T, N, D], base first -> what the resampler sees at a time, and what of it is
    picture: the base, then as many tokens as a tile has in reading order over the whole canvas."""
    tokens = SIDE * SIDE
    across, down = columns * SIDE, rows * SIDE
    shown = torch.zeros(down, across, dtype=torch.bool)
    if width / height > across / down:
        margin = (down - int(height * (across / width))) // 2
        shown[margin : down - margin, :] = True
    else:
        margin = (across - int(width * (down / height))) // 2
        shown[:, margin : across - margin] = True
    canvas, mask = [], []
    for row in range(down):
        for column in range(across):
            tile = (row // SIDE) * columns + column // SIDE
            canvas.append(tiles[1 + tile, (row % SIDE) * SIDE + column % SIDE])
            mask.append(shown[row, column])
    found, masks = [tiles[0]], [torch.ones(tokens, dtype=torch.bool)]
    for group in range(columns * rows):
        found.append(torch.stack(canvas[group * tokens : (group + 1) * tokens]))
        masks.append(torch.stack(mask[group * tokens : (group + 1) * tokens]))
    return found, masks


@torch.no_grad()
def logits(
    peer: Released, pictures: list[tuple[Tensor, tuple[int, int, int, int]]], text: list[int]
) -> Tensor:
    """Next-word logits [L, first + 3] of a text in which every `<image>` is one picture, tiles and grid."""
    waiting = iter(pictures)
    vocabulary = peer.lm.get_input_embeddings().weight
    rows = []
    for word in text:
        if word == peer.first:
            tiles, grid = next(waiting)
            seen = peer.vision(tiles).last_hidden_state
            for media, mask in zip(*groups(seen, *grid), strict=True):
                rows.append(resample(peer.sampler, media, mask))
        elif word > peer.first:
            rows.append(peer.added_words[word - peer.first][None])
        else:
            rows.append(vocabulary[word][None])
    states = peer.lm.model(inputs_embeds=torch.cat(rows)[None]).last_hidden_state[0]
    head = peer.lm.get_output_embeddings().weight[: peer.first]
    return torch.cat([states @ head.T, states @ peer.added_head.T], dim=1)
