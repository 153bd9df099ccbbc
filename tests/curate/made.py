"""Pictures of one colour with captions that name it, or by planting another; models that know, or do not."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from openblip.api import Pipeline
from openblip.curate.capfilt import ScoredText, seed_of
from openblip.data.rows import Row
from openblip.data.sources import Source, open_source
from openblip.data.text import bert_uncased
from openblip.data.transforms import ImageTransform
from openblip.hub import Pretrained
from openblip.models.blip import Blip, BlipConfig
from openblip.models.text import TextConfig
from openblip.models.vit import VisionConfig
from tests.data.made import png, tar_bytes, write

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
NAMES = list(COLOURS)
WRONG = {1, 4, 5, 9}  # pictures whose web caption is planted wrong


def colour(number: int) -> str:
    return NAMES[number % 3]


def caption(number: int) -> str:
    return f"a {colour(number + (number in WRONG))} square & <b>{number}</b>"


def tar_source(folder: Path, tars: int = 3, each: int = 4, bad: dict[int, bytes] | None = None) -> Source:
    """Tars of pictures with one caption; `bad` replaces the bytes of some."""
    for shard in range(tars):
        members = {}
        for number in range(shard * each, (shard + 1) * each):
            members[f"{number:04d}.png"] = (bad or {}).get(number, png(COLOURS[colour(number)]))
            members[f"{number:04d}.txt"] = caption(number).encode()
            members[f"{number:04d}.json"] = json.dumps({"image_id": f"p{number}"}).encode()
        write(folder / f"web/{shard:05d}.tar", tar_bytes(members))
    return open_source(folder / "web", cache_dir=folder / "cache")


class ColourCapFilt:
    """What the job asks of a `CapFilt`, with models that see colours: P(match) is 0.9 for the right one, else 0.1.

    `calls` counts batches that were judged; `die_at` is called with that number before each.
    """

    def __init__(self, seed: int = 0, die_at=None) -> None:
        self.draft_size = 8
        self.features = None
        self.models = {"captioner": "c" * 16, "filter": "f" * 16}
        self.seed, self.calls, self.die_at = seed, 0, die_at

    @property
    def fingerprint(self) -> dict:
        return {**self.models, "config": {"seed": self.seed, "generation": {"top_p": 0.9}}}

    def embed(self, rows: Sequence[Row], images: Sequence[Image.Image]) -> list[str]:
        return [NAMES[max(range(3), key=image.getpixel((0, 0)).__getitem__)] for image in images]

    def load(self) -> "ColourCapFilt":
        return self

    def write(self, rows: Sequence[Row], seen: list[str]) -> list[str]:
        if self.die_at is not None:
            self.die_at(self.calls)
        self.calls += 1
        return [f"one {name} thing" for name in seen]

    def score(self, rows: Sequence[Row], written: list[str], seen: list[str]) -> list[ScoredText]:
        texts = []
        for row, own, name in zip(rows, written, seen, strict=True):
            for text in row.captions:
                itm = 0.9 if name in text else 0.1
                texts.append(ScoredText(row.id, "web", text, itm, itm - 0.5, itm, None))
            texts.append(ScoredText(row.id, "synthetic", own, 0.8, 0.35, 0.8, seed_of(row.id, self.seed)))
        return texts


def tiny_blip(seed: int, **parts: bool) -> Pipeline:
    """A random model that reads and writes English, in 32 pixels."""
    torch.manual_seed(seed)
    vision = VisionConfig(32, 16, 16, 2, 2, 32)
    model = Blip(BlipConfig(vision, TextConfig(30524, 16, 2, 2, 32), projection_dim=8, **parts))
    for weight in model.parameters():  # livelier than at the start of training, so that scores differ
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    transform = ImageTransform(image_size=32)
    return Pipeline(
        Pretrained(model, bert_uncased(), transform, {"prompt": "a picture of "}, None), batch_size=4
    )


def smooth(number: int, side: int = 200) -> Image.Image:
    """A picture like no other: coarse noise, smoothed."""
    noise = torch.randint(256, (8, 8, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
    return Image.fromarray(noise.numpy()).resize((side, side), Image.Resampling.BICUBIC)


def picture_rows(count: int) -> list[Row]:
    """Rows with pictures that differ, as bytes."""
    rows = []
    for number in range(count):
        file = io.BytesIO()
        noise = torch.randint(
            256, (9, 9, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8
        )
        Image.fromarray(noise.numpy()).save(file, "PNG")
        rows.append(Row(f"id{number}", [file.getvalue()], [caption(number), "a dog"][: 1 + number % 2]))
    return rows
