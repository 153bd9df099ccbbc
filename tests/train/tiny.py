"""Systems and batches small enough to train to the end within a test."""

from typing import Any

import torch
from torch import Tensor, nn

from openblip.models.adapters import LoraSettings
from openblip.models.blip import Blip, BlipConfig
from openblip.models.blip2 import Blip2, Blip2Config, without_heads
from openblip.models.blip2_llm import Blip2Llm, Blip2LlmConfig
from openblip.models.blip_nlvr import BlipNlvr, BlipNlvrConfig
from openblip.models.blip_vqa import BlipVqa, BlipVqaConfig
from openblip.models.clip import Clip, ClipConfig, ClipTextConfig, clip_vision
from openblip.models.qformer import QFormerConfig
from openblip.models.text import TextConfig
from openblip.models.vit import VisionConfig
from openblip.train import distributed
from openblip.train.config import TrainConfig
from openblip.train.tasks import Task
from tests.models.tiny_lms import EOS, PAD, VOCAB, tiny_lm

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


def blip2(*, dropout: float = 0.0, decoder: bool = True, **changes: Any) -> Blip2:
    settings = {"vocab_size": 5 + WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings |= {"intermediate_size": 64, "max_position_embeddings": 16, "num_query_tokens": 3}
    ids = {"cls_token_id": CLS, "sep_token_id": SEP, "dec_token_id": DEC}
    qformer = QFormerConfig(**settings | ids | changes, dropout=dropout)
    return Blip2(Blip2Config(vision(), qformer, projection_dim=16, decoder=decoder))


ADAPTERS = LoraSettings(
    rank=8, target_modules=["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
)


def blip2_llm(
    lm: str = "llama",
    *,
    instruct: bool = False,
    heads: bool = False,
    dropout: float = 0.0,
    lora: bool = False,
) -> Blip2Llm:
    """Stage 2 around a random language model, the same one each time."""
    stage1 = blip2(dropout=dropout)
    if not heads:
        stage1 = without_heads(stage1, keep_text=instruct)
    language = tiny_lm(lm, lora=ADAPTERS if lora else None).float()
    model = Blip2Llm(Blip2LlmConfig(language.config, stage1.config, qformer_text=instruct), language)
    model.blip2 = stage1
    return model


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


def told(rows: int = 8, seed: int = 0) -> dict[str, Any]:
    """For stage 2: a prompt of one word, and a text of words of the tiny language models that ends as theirs do."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [2 + (row + seed) % 4 for row in range(rows)]
    ids = torch.full((rows, 2 + max(lengths)), PAD)
    labels = torch.full_like(ids, -100)
    for row, length in enumerate(lengths):
        ids[row, 0] = 5
        ids[row, 1 : length + 1] = torch.randint(6, VOCAB - 12, (length,), generator=generator)
        ids[row, length + 1] = EOS
        labels[row, 1 : length + 2] = ids[row, 1 : length + 2]
    batch = pairs(rows, seed)
    return {
        **batch,
        **{"text_ids": batch["input_ids"], "text_mask": batch["attention_mask"]},
        **{"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels},
    }


def asked(rows: int = 8, seed: int = 0) -> dict[str, Any]:
    """For InstructBLIP: all pictures alike, so that the instruction, which the Q-Former alone reads, must tell."""
    batch = told(rows, seed)
    batch["pixel_values"] = batch["pixel_values"][:1].repeat(rows, 1, 1, 1)
    return {**batch, "qformer_ids": batch["text_ids"], "qformer_mask": batch["text_mask"]}


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


def doubled(batch: dict) -> dict:
    """The batch in float64."""
    is_float = {key: isinstance(value, Tensor) and value.is_floating_point() for key, value in batch.items()}
    return {key: value.double() if is_float[key] else value for key, value in batch.items()}


def trained(task: Task, batch: dict, steps: int, lr: float = 1e-2) -> dict[str, float]:
    """Train in place on one batch, the rate falling to zero; the losses before each step's end."""
    weights = [weight for weight in task.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    losses: dict[str, Tensor] = {}
    for step in range(steps):
        task.begin_step(step)
        losses = task(batch)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        schedule.step()
    return {name: loss.item() for name, loss in losses.items()}


class Batches:
    """Batch number k of 8 samples, or this rank's share of it, with its texts cut to their own longest."""

    def __init__(self, made, shared: bool = False) -> None:
        self.made, self.shared = made, shared

    def batches(self, start: int):
        while True:
            batch = self.made(8, start)
            if self.shared:
                share = 8 // distributed.world_size()
                rows = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
                batch = {key: value[rows] for key, value in batch.items()}
                longest = int(batch["attention_mask"].sum(dim=1).max())
                batch |= {key: batch[key][:, :longest] for key in ("input_ids", "attention_mask")}
            yield batch
            start += 1


def settings(steps: int, **changes) -> TrainConfig:
    constant = {"lr": 1e-3, "schedule": "constant", "log_every": 1, "save_every": None}
    return TrainConfig(max_steps=steps, batch_size=8, **constant | changes)
