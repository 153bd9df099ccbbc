"""Rows to batches that a BLIP-3 learns from: pictures, videos and text alone in one."""

import io
from itertools import islice

import pytest
from PIL import Image

from openblip.data.rows import BadRows, Row
from openblip.data.transforms import ImageTransform
from openblip.data.video import FRAMES, Video
from openblip.recipes import Recipe
from openblip.train.batches_blip3 import blip3_loader
from openblip.train.config import TrainConfig
from openblip.train.tasks_blip3 import Blip3Task, Blip3TaskConfig
from tests.data.test_chat import bytes_tokenizer
from tests.data.test_collate_chat import picture
from tests.data.videos import encode, greys
from tests.models.tiny_blip3 import LATENTS, PIXELS, tiny_blip3
from tests.models.tiny_lms import CONFIGS

ROWS = [
    Row("video", [Video(encode(greys(20)))], [], "what?", ["it gets lighter"], where="row 0"),
    Row("picture", [picture("wide", 90)], [], "what?", ["red"], where="row 1"),
    Row("words", [], [], "what?", ["nothing"], where="row 2"),
]


@pytest.fixture
def made(monkeypatch):
    """What makes a model whose language model has words for all bytes, and a loader for it."""
    words = bytes_tokenizer()
    small = {"vocab_size": 300, "max_position_embeddings": 256}
    monkeypatch.setitem(CONFIGS, "llama", {**CONFIGS["llama"], **small})

    def make(rows, max_length=200, batch_tokens=None, **settings):
        model = tiny_blip3(**settings).float()
        train = TrainConfig(max_steps=1, batch_size=3, batch_tokens=batch_tokens)
        recipe = Recipe("blip3_sft", train, blip3=model.config, workers=0, max_length=max_length, bucket=True)
        bad = BadRows()
        return model, blip3_loader(recipe, model, words, ImageTransform(PIXELS), rows, bad), bad

    return make


@pytest.mark.parametrize("kind", ["attention", "ttm"])
@pytest.mark.parametrize("sampling", ["anyres", "fixed", "anyres_fixed_sampling"])
def test_pictures_videos_and_text_train_the_temporal_encoder(made, kind, sampling):
    model, loader, _ = made(ROWS, video=kind, sampling=sampling)
    batch = next(loader.batches())
    order = [batch["ids"].index(name) for name in ("video", "picture", "words")]
    assert sorted(batch["frames"].tolist()) == [1, FRAMES]
    images = (batch["input_ids"] == model.image_token_id).sum(dim=1)[order].tolist()
    tiles = 4 if sampling == "anyres" else 1
    assert images == [2, LATENTS * tiles, 0], "a video has as many as its encoder makes"
    task = Blip3Task(model, Blip3TaskConfig()).train()
    loss = task(batch)["lm"]
    loss.backward()
    assert loss.isfinite()
    for name, weight in model.temporal.named_parameters():
        assert weight.grad.isfinite().all() and weight.grad.abs().max() > 0, name


def test_a_row_that_fits_with_few_tiles_counts_in_a_budget(made):
    """Of a picture as large as can be, the question alone would be too long."""
    file = io.BytesIO()
    Image.new("RGB", (20, 20)).save(file, "PNG")
    rows = [Row(f"{n}", [file.getvalue()], [], "what?", ["a"], where=f"row {n}") for n in range(40)]
    _, loader, _ = made(rows)
    length = next(loader.batches())["input_ids"].shape[1]
    _, loader, bad = made(rows, max_length=length, batch_tokens=4 * length)
    for batch in islice(loader.batches(), loader.steps_per_epoch):
        assert batch["input_ids"].shape == (4, length)
    assert not bad.counts


def test_a_model_without_temporal_encoder_leaves_videos_out(made):
    _, loader, bad = made([*ROWS, *ROWS[1:]] * 3)
    for batch in islice(loader.batches(), 2 * loader.steps_per_epoch):
        assert set(batch["frames"].tolist()) <= {1} and "video" not in batch["ids"]
    assert set(bad.counts) == {"video"}
