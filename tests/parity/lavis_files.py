"""Original files of BLIP-2, made of the weights of transformers' models by LAVIS's names; and slow plain forwards of
its two image towers, straight from the keys of their files.

Both are written from the published names and formulas, and know nothing of our reader.
"""

import math
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

LAYER = "Qformer.bert.encoder.layer."
# transformers' names -> LAVIS's, first fit.
RULES = [
    (r"query_tokens", r"query_tokens"),
    (r"vision_model\.post_layernorm\.", r"ln_vision."),
    (r"vision_model\.embeddings\.class_embedding", r"visual_encoder.cls_token"),
    (r"vision_model\.embeddings\.position_embedding", r"visual_encoder.pos_embed"),
    (r"vision_model\.embeddings\.patch_embedding\.", r"visual_encoder.patch_embed.proj."),
    (r"vision_model\.encoder\.layers\.(\d+)\.layer_norm", r"visual_encoder.blocks.\1.norm"),
    (
        r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection\.",
        r"visual_encoder.blocks.\1.attn.proj.",
    ),
    (r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.", r"visual_encoder.blocks.\1.attn."),
    (r"vision_model\.encoder\.layers\.(\d+)\.mlp\.", r"visual_encoder.blocks.\1.mlp."),
    (r"qformer\.encoder\.layer\.(\d+)\.(cross)?attention\.attention\.", rf"{LAYER}\1.\2attention.self."),
    (r"qformer\.encoder\.layer\.", LAYER),
    (r"qformer\.(embeddings\.)?layernorm\.", r"Qformer.bert.embeddings.LayerNorm."),
    (r"(qformer\.)?embeddings\.(word|position)_embeddings\.", r"Qformer.bert.embeddings.\2_embeddings."),
    (r"vision_projection\.", r"vision_proj."),
    (r"text_projection\.", r"text_proj."),
    (r"itm_head\.", r"itm_head."),
]


def lavis_names(state: Mapping[str, Tensor], projection: str = "") -> dict[str, Tensor]:
    """A state dict of transformers by LAVIS's names, without its language model; with its tower."""
    rules = [*RULES, (r"language_projection\.", f"{projection}.")]
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.startswith("language_model.") or name.endswith("position_ids"):
            continue
        pattern, new = next(rule for rule in rules if re.match(rule[0], name))
        theirs = re.sub(f"^{pattern}", new, name)
        if theirs.endswith("attn.qkv.bias"):  # EVA has none for the keys
            query, key, bias = value.chunk(3)
            assert not key.any()
            found[theirs.replace("qkv.bias", "q_bias")] = query.clone()
            found[theirs.replace("qkv.bias", "v_bias")] = bias.clone()
        else:
            found[theirs] = value.clone()
    return found


def split_tower(file: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(what LAVIS saves of a model whose tower is frozen, the tower's tensors by the names of its own file)."""
    tower = {n.removeprefix("visual_encoder."): v for n, v in file.items() if n.startswith("visual_encoder.")}
    return {n: v for n, v in file.items() if not n.startswith("visual_encoder.")}, tower


def with_last_block(tower: Mapping[str, Tensor], start: str = "blocks.") -> dict[str, Tensor]:
    """The tower's file, which has one block more than BLIP-2 uses."""
    numbers = [int(n.removeprefix(start).split(".")[0]) for n in tower if n.startswith(start)]
    last = max(numbers)
    more = {
        n.replace(f"{start}{last}.", f"{start}{last + 1}."): torch.randn_like(v)
        for n, v in tower.items()
        if n.startswith(f"{start}{last}.")
    }
    return {**tower, **more}


def stage1_extras(file: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What stage 1 has and transformers has no place for: temperature, the head that writes, a table of numbers."""
    words = file["Qformer.bert.embeddings.word_embeddings.weight"]
    size, width = words.shape
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=words.dtype)

    bias = draw(size)
    head = "Qformer.cls.predictions."
    return {
        "temp": torch.tensor(0.05, dtype=words.dtype),
        f"{head}bias": bias,
        f"{head}transform.dense.weight": draw(width, width),
        f"{head}transform.dense.bias": draw(width),
        f"{head}transform.LayerNorm.weight": 1 + 0.3 * draw(width),
        f"{head}transform.LayerNorm.bias": draw(width),
        f"{head}decoder.weight": words.clone(),
        f"{head}decoder.bias": bias.clone(),
        "Qformer.bert.embeddings.position_ids": torch.arange(24)[None],
    }


def openai_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIPVisionModel's state dict by OpenAI's names, with its projection."""
    rules = {
        "embeddings.class_embedding": "class_embedding",
        "embeddings.position_embedding.weight": "positional_embedding",
        "embeddings.patch_embedding.weight": "conv1.weight",
        "pre_layrnorm": "ln_pre",
        "post_layernorm": "ln_post",
        "encoder.layers": "transformer.resblocks",
        "layer_norm": "ln_",
        "self_attn.out_proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith("position_ids") or any(f".{n}_proj." in name for n in "kv"):
            continue
        new = name.removeprefix("vision_model.")
        for old, wanted in rules.items():
            new = new.replace(old, wanted)
        if ".self_attn.q_proj." in new:
            value = torch.cat([state[name.replace("q_proj", f"{n}_proj")] for n in "qkv"])
            new = new.replace("self_attn.q_proj.", "attn.in_proj_")
        found[new] = value.clone()
    width = found["class_embedding"].shape[0]
    return found | {"proj": torch.randn(width, 12, dtype=found["class_embedding"].dtype)}


# ------------------------------------------------------------------------------------------ slow and plain


def _norm(x: Tensor, file: Mapping[str, Tensor], name: str, eps: float) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps) * file[f"{name}.weight"] + file[f"{name}.bias"]


def _attention(x: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    """Of one image [N, D], head by head; weight [3 D, D] holds query, key, value, in this order."""
    width = x.shape[-1]
    query, key, value = (
        (x @ weight[i * width : (i + 1) * width].T + bias[i * width : (i + 1) * width]) for i in range(3)
    )
    size, seen = width // heads, []
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        scores = query[:, own] @ key[:, own].T / math.sqrt(size)
        seen.append(scores.softmax(dim=-1) @ value[:, own])
    return torch.cat(seen, dim=-1)


def _patches(image: Tensor, weight: Tensor) -> Tensor:
    """An image [3, S, S] cut into patches in raster order, each projected: [n, D]."""
    side = weight.shape[-1]
    rows = [
        weight.flatten(1) @ image[:, y : y + side, x : x + side].flatten()
        for y in range(0, image.shape[1], side)
        for x in range(0, image.shape[2], side)
    ]
    return torch.stack(rows)


def resized(positions: Tensor, side: int, *, align_corners: bool) -> Tensor:
    """Positions [1 + n², D] for side² patches."""
    old = round((len(positions) - 1) ** 0.5)
    if old == side:
        return positions
    grid = positions[1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=align_corners)
    return torch.cat([positions[:1], grid[0].flatten(1).T])


def plain_eva(
    file: Mapping[str, Tensor], images: Tensor, heads: int, blocks: int, *, align_corners=False
) -> Tensor:
    """EVA-CLIP's ViT up to block number `blocks`: pre-norm, eps 1e-6, exact GELU, no bias of the keys, no last norm."""
    tokens = []
    for image in images:
        x = _patches(image, file["patch_embed.proj.weight"]) + file["patch_embed.proj.bias"]
        side = round(len(x) ** 0.5)
        x = torch.cat([file["cls_token"][0], x])
        x = x + resized(file["pos_embed"][0], side, align_corners=align_corners)
        for number in range(blocks):
            own = f"blocks.{number}."
            query, value = file[f"{own}attn.q_bias"], file[f"{own}attn.v_bias"]
            bias = torch.cat([query, torch.zeros_like(query), value])
            seen = _attention(_norm(x, file, f"{own}norm1", 1e-6), file[f"{own}attn.qkv.weight"], bias, heads)
            x = x + seen @ file[f"{own}attn.proj.weight"].T + file[f"{own}attn.proj.bias"]
            h = (
                _norm(x, file, f"{own}norm2", 1e-6) @ file[f"{own}mlp.fc1.weight"].T
                + file[f"{own}mlp.fc1.bias"]
            )
            h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
            x = x + h @ file[f"{own}mlp.fc2.weight"].T + file[f"{own}mlp.fc2.bias"]
        tokens.append(x)
    return torch.stack(tokens)


def plain_clip(
    file: Mapping[str, Tensor], images: Tensor, heads: int, blocks: int, *, align_corners=True
) -> Tensor:
    """CLIP's ViT up to block number `blocks`: a norm before, QuickGELU, eps 1e-5, no bias of the patches."""
    tokens = []
    for image in images:
        x = _patches(image, file["conv1.weight"])
        side = round(len(x) ** 0.5)
        x = torch.cat([file["class_embedding"][None], x])
        x = x + resized(file["positional_embedding"], side, align_corners=align_corners)
        x = _norm(x, file, "ln_pre", 1e-5)
        for number in range(blocks):
            own = f"transformer.resblocks.{number}."
            weight, bias = file[f"{own}attn.in_proj_weight"], file[f"{own}attn.in_proj_bias"]
            seen = _attention(_norm(x, file, f"{own}ln_1", 1e-5), weight, bias, heads)
            x = x + seen @ file[f"{own}attn.out_proj.weight"].T + file[f"{own}attn.out_proj.bias"]
            h = (
                _norm(x, file, f"{own}ln_2", 1e-5) @ file[f"{own}mlp.c_fc.weight"].T
                + file[f"{own}mlp.c_fc.bias"]
            )
            h = h * torch.sigmoid(1.702 * h)
            x = x + h @ file[f"{own}mlp.c_proj.weight"].T + file[f"{own}mlp.c_proj.bias"]
        tokens.append(x)
    return torch.stack(tokens)
