"""What it takes to begin: the import, the help, a model from disk.

    python benchmarks/start.py [--runs 5] [--clock cpu]

start    `import openblip` against `import transformers`, `openblip --help` against importing torch
load     BLIP ViT-B/16 from its folder, against transformers' from_pretrained and against reading the file's bytes
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from blip import models
from paired import Bench, Call, main

from openblip.data.text import bert_uncased
from openblip.data.transforms import ImageTransform
from openblip.hub import load_pretrained, save_pretrained


def python(*arguments: str) -> Call:
    """Runs a fresh interpreter to its end."""
    return lambda: subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)


def start(bench: Bench) -> None:
    """Interpreters, start to end."""
    calls = imports("transformers", "openblip")
    bench.paired("import openblip, against transformers", *calls, None, memory=False)
    theirs, ours = (
        python("-c", "import torch"),
        python("-c", "from openblip.cli import main; main(['--help'])"),
    )
    bench.paired("openblip --help, against importing torch", theirs, ours, None, memory=False)


def imports(theirs: str, ours: str) -> tuple[Call, Call]:
    """Two modules, imported."""
    return python("-c", f"import {theirs}"), python("-c", f"import {ours}")


def load(bench: Bench) -> None:
    """Weights are compared; every one of ours is read, as a mapped file would not be until it is used."""
    with tempfile.TemporaryDirectory() as place:
        theirs, ours = models("BlipForConditionalGeneration", bench.quick)
        folder, peer = Path(place) / "ours", Path(place) / "theirs"
        theirs.save_pretrained(peer)
        save_pretrained(ours, folder, tokenizer=bert_uncased(), transform=ImageTransform(image_size=384))
        file = folder / "model.safetensors"

        def our_model() -> Any:
            model = load_pretrained(folder).model
            return model, touched(model)

        def their_model() -> Any:
            model = type(theirs).from_pretrained(peer)
            return model, touched(model)

        def same(theirs: Any, ours: Any) -> bool:
            return abs(theirs[1] - ours[1]) < 1e-3 * abs(theirs[1])

        bench.paired("load from disk, against transformers", their_model, our_model, same)
        bench.paired("load from disk, against reading the file", file.read_bytes, our_model, None)


def touched(model: Any) -> float:
    """The largest element of all weights: each has been looked at."""
    return max(float(weight.detach().abs().max()) for weight in model.parameters())


ROWS = {"start": start, "load": load}

if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main(__doc__, ROWS)
