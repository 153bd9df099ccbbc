"""A random BLIP-3, small enough to compute in float64 on the side, and rows of text with pictures for it."""

import torch
from torch import Tensor

from openblip.models.blip3 import Blip3, Blip3Config
from openblip.models.resampler import ResamplerConfig
from openblip.models.temporal import TemporalConfig
from openblip.models.vit import VisionConfig
from tests.models.tiny_lms import VOCAB, tiny_lm

IMAGE, END_OF_CHUNK = VOCAB, VOCAB + 2
SIDE = 4  # tokens across a tile
LATENTS, WIDTH, HIDDEN = (
    3,
    12,
    16,
)  # tokens the resampler makes of a tile; width of the tower, of the language model
PIXELS = 8 * SIDE


def tiny_blip3(
    lm: str = "llama", *, video: str | None = None, condition: bool = False, lora=None, **changes
) -> Blip3:
    """In float64; all that is random is the same each time."""
    language = tiny_lm(lm, added_tokens=3, lora=lora, trainable=changes.pop("trainable", False))
    torch.manual_seed(8)
    resampler = ResamplerConfig(
        WIDTH, LATENTS, 2, 2, 8, 2, language.hidden_size, condition_size=HIDDEN if condition else None
    )
    temporal = None
    if video is not None:
        temporal = TemporalConfig(
            HIDDEN, video, LATENTS if video == "mean" else 2, LATENTS, 2, 1, 2, intermediate_size=16
        )
    vision = VisionConfig(PIXELS, 8, WIDTH, 2, 2, 24)
    config = Blip3Config(language.config, vision, resampler, temporal=temporal, **changes)
    model = Blip3(config, language).double().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not name.startswith("lm.model.") and name != "resampler.latents":
                weight.add_(0.3 * torch.randn_like(weight))
    return model


def tiles(grids: list[tuple[int, int, int, int]], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random tile embeds [T, 1 + N, D] of pictures cut so, and their grids."""
    count = sum(1 + columns * rows for columns, rows, _, _ in grids)
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(count, 1 + SIDE * SIDE, WIDTH, dtype=torch.float64, generator=generator)
    return embeds, torch.tensor(grids, dtype=torch.int64).reshape(-1, 4)


def text(*parts: int | str, runs: list[int]) -> list[int]:
    """Ids where "i" is the next image, as many ids as its run has."""
    rest = iter(runs)
    ids: list[int] = []
    for part in parts:
        ids += [IMAGE] * next(rest) if part == "i" else [int(part)]
    return ids
