"""What every test gets: no network, the same random numbers, and optional data by environment variable."""

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: without it a wrong name costs 20 s
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from openblip import cli
from tests.tiny_models import picture_folder, question_folder, save_blip, save_clip, save_vqa


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Each test starts from the same global seeds, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def flickr8k() -> Path:
    """A folder with `captions.jsonl` and photographs to measure on; neither shipped nor needed."""
    folder = os.environ.get("OPENBLIP_FLICKR8K")
    if not folder:
        pytest.skip("OPENBLIP_FLICKR8K is not set: no folder of real photographs to measure on")
    if not (Path(folder) / "captions.jsonl").is_file():
        pytest.fail(f"OPENBLIP_FLICKR8K={folder}: there is no captions.jsonl in it")
    return Path(folder)


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """Python's own answer to SIGINT: whoever starts pytest in the background of a shell has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """blip, filter, vqa and clip: models; data: 8 pictures, 4 in each split; asked: 4 with questions."""
    root = tmp_path_factory.mktemp("cli")
    save_blip(root / "blip")
    save_blip(root / "filter", seed=2, decoder=False, share=())
    save_vqa(root / "vqa")
    save_clip(root / "clip")
    picture_folder(root / "data")
    question_folder(root / "asked")
    return root


@pytest.fixture
def own_cache(root, monkeypatch):
    """Tables of rows beside the data of `root`."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", root / "cache")


@pytest.fixture
def answer(capsys):
    """What a command prints with --json."""

    def run(*arguments):
        capsys.readouterr()
        cli.main([*map(str, arguments), "--json"])
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def mistake(capsys):
    """The one line a command ends with, with exit code 2."""

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main([*map(str, arguments)])
        said = capsys.readouterr()
        assert caught.value.code == 2 and said.out == ""
        (line,) = said.err.strip().splitlines()
        return line

    return run
