"""Systems and batches small enough to train to the end within a test."""

from typing import Any

import torch
from torch import Tensor, nn

from openblip.models.blip import Blip, BlipConfig
from openblip.models.blip_nlvr import BlipNlvr, BlipNlvrConfig
from openblip.models.blip_vqa import BlipVqa, BlipVqaConfig
from openblip.models.clip import Clip, ClipConfig, ClipTextConfig, clip_vision
from openblip.models.text import TextConfig
from openblip.models.vit import VisionConfig

CLS, SEP, DEC, ENC = 1, 2, 3, 4
WORDS = 30  # ids 5 to 34


def vision(**changes: Any) -> VisionConfig:
    settings = {"image_size": 16, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2}
    return VisionConfig(**settings | {"num_attention_heads": 2, "intermediate_size": 48} | changes)


def text(**changes: Any) -> TextConfig:
    ids = {"cls_token_id": CLS, "sep_token_id": SEP, "dec_token_id": DEC, "enc_token_id": ENC}
    settings = {"vocab_size": 5 + WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings |= {"intermediate_size": 64, "max_position_embeddings": 16, "dropout": 0.0}
    return TextConfig(**settings | ids | changes)


def blip(*, dropout: float = 0.0, **changes: Any) -> Blip:
    return Blip(
        BlipConfig(**{"vision": vision(), "text": text(dropout=dropout), "projection_dim": 16} | changes)
    )


def vqa(dropout: float = 0.0) -> BlipVqa:
    return BlipVqa(BlipVqaConfig(vision(), text(dropout=dropout)))


def nlvr(dropout: float = 0.0) -> BlipNlvr:
    return BlipNlvr(BlipNlvrConfig(vision(), text(dropout=dropout)))


def clip() -> Clip:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    words = ClipTextConfig(vocab_size=5 + WORDS, max_position_embeddings=16, eos_token_id=SEP, **sizes)
    return Clip(ClipConfig(clip_vision(16, 8, **sizes), words, projection_dim=16))


def stir_(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights as after some training: no zero biases, no tiny matrices, no two alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((0.1 * noise).to(parameter.dtype)) if parameter.ndim else None
    return module


def texts(lengths: list[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random texts of so many words -> ids and mask [R, longest + 2]."""
    ids = torch.zeros(len(lengths), max(lengths) + 2, dtype=torch.long)
    for row, length in zip(ids, lengths):
        row[0], row[length + 1] = CLS, SEP
        row[1 : length + 1] = torch.randint(5, 5 + WORDS, (length,), generator=generator)
    return ids, (ids != 0).long()


def pairs(rows: int = 8, seed: int = 0) -> dict[str, Any]:
    """A batch of pictures of noise, each with a caption of 2 to 5 words of its own."""
    generator = torch.Generator().manual_seed(seed)
    ids, mask = texts([2 + (row + seed) % 4 for row in range(rows)], generator)
    pictures = torch.randn(rows, 3, 16, 16, generator=generator)
    return {
        "pixel_values": pictures,
        "input_ids": ids,
        "attention_mask": mask,
        "image_ids": 100 * seed + torch.arange(rows),
        "ids": [f"{seed}/{row}" for row in range(rows)],
    }


def prompted(rows: int = 8, seed: int = 0) -> dict[str, Any]:
    """For captioning: every text begins with the same word, which has no label."""
    batch = pairs(rows, seed)
    batch["input_ids"][:, 1] = 5
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :2] = -100
    return {**batch, "labels": labels}


def questions(rows: int = 8, seed: int = 0) -> dict[str, Any]:
    """Questions about pictures; every third has a second answer, given by fewer people."""
    batch = pairs(rows, seed)
    whose = [row for row in range(rows) for _ in range(2 if row % 3 == 0 else 1)]
    ids, mask = texts([1 + place % 3 for place in range(len(whose))], torch.Generator().manual_seed(seed + 1))
    weights = [
        1.0 if row % 3 else (0.7 if row not in whose[:place] else 0.3) for place, row in enumerate(whose)
    ]
    batch |= {"answer_ids": ids, "answer_mask": mask, "answer_weights": torch.tensor(weights)}
    return {**batch, "answer_question": torch.tensor(whose)}


def statements(rows: int = 8, seed: int = 0) -> dict[str, Any]:
    """A text about two pictures, true for every other row; the left pictures first, then the right ones."""
    batch = pairs(rows, seed)
    right = pairs(rows, seed + 1000)["pixel_values"]
    batch["pixel_values"] = torch.cat([batch["pixel_values"], right])
    return {**batch, "labels": torch.arange(rows) % 2}
