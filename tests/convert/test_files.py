"""Weights come out of any file that holds them, mapped and not copied, and no file is ever run."""

import argparse
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from openblip.config import UserError
from openblip.convert.files import publish, read_weights

WEIGHTS = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "b": torch.ones(4, dtype=torch.bfloat16),
    "ids": torch.arange(3),
}


def same(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == WEIGHTS.keys() and all(torch.equal(found[k], v) for k, v in WEIGHTS.items())


@pytest.mark.parametrize("name", ["x.pth", "x.bin", "x"])
@pytest.mark.parametrize("kind", ["torch", "old torch", "safetensors"])
def test_what_a_file_is_its_bytes_say(kind, name, tmp_path):
    if kind == "safetensors":
        save_file(WEIGHTS, tmp_path / name)
    else:
        torch.save(WEIGHTS, tmp_path / name, _use_new_zipfile_serialization=kind == "torch")
    assert same(read_weights(tmp_path / name, None))


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict"])
def test_a_checkpoint_of_a_run_is_read_for_its_weights(key, tmp_path):
    state = {"exp_avg": torch.ones(2)}
    more = {"optimizer": {"state": {0: state}}, "config": {"lr": 1e-5, "names": ["a"]}, "epoch": 3}
    torch.save({key: WEIGHTS, **more}, tmp_path / "x.pth")
    assert same(read_weights(tmp_path / "x.pth", None))


def test_floating_point_tensors_are_brought_to_a_dtype(tmp_path):
    torch.save(WEIGHTS, tmp_path / "x.pth")
    found = read_weights(tmp_path / "x.pth", torch.float16)
    assert [v.dtype for v in found.values()] == [torch.float16, torch.float16, torch.int64]
    assert torch.equal(found["a.weight"].float(), WEIGHTS["a.weight"])


class Payload:
    """Unpickled by anybody careless, it makes a file."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
@pytest.mark.parametrize("place", ["alone", "beside the weights", "among the weights"])
def test_a_file_that_would_run_code_is_refused_and_runs_none(place, zipped, tmp_path):
    evil = Payload(tmp_path / "planted")
    content = {"alone": evil, "beside the weights": {"model": WEIGHTS, "config": evil}}
    content["among the weights"] = WEIGHTS | {"evil": evil}
    torch.save(content[place], tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        UserError, match=r"x.pth: cannot be read as weights: it would call posix.system;"
    ) as told:
        read_weights(tmp_path / "x.pth", None)
    assert "\n" not in str(told.value) and not (tmp_path / "planted").exists()
    torch.load(tmp_path / "x.pth", weights_only=False)  # the careless way
    assert (tmp_path / "planted").exists(), "the payload works"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "wanted names and tensors"),
        ({"epoch": 3}, "wanted names and tensors"),
        ({"model": {"a": torch.ones(1), "b": "text"}}, "wanted names and tensors"),
        ({"model": argparse.Namespace()}, "it would call argparse.Namespace"),
    ],
)
def test_a_file_with_something_else_is_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match=message):
        read_weights(tmp_path / "x.pth", None)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file.write_bytes(b""), "cannot be read as weights: "),
        (lambda file: file.write_bytes(b"nonsense, no weights"), "damaged, or no weights at all"),
        (lambda file: os.truncate(file, file.stat().st_size // 2), "cannot be read as weights: "),
        (lambda file: torch.jit.script(torch.nn.Linear(1, 1)).save(file), "a program"),
    ],
    ids=["empty", "nonsense", "cut off", "TorchScript"],
)
def test_a_damaged_file_is_refused_with_one_line(spoil, message, tmp_path):
    torch.save(WEIGHTS, tmp_path / "x.pth")
    spoil(tmp_path / "x.pth")
    with pytest.raises(UserError, match=message) as told:
        read_weights(tmp_path / "x.pth", None)
    assert str(told.value).startswith(str(tmp_path)) and "\n" not in str(told.value)
    assert "weights_only" not in str(told.value), "torch's advice to run it is not passed on"


# ------------------------------------------------------------------------------------------------- publish


def publish_two(folder: Path, text: str = "x") -> None:
    """A card and a tokenizer, as saving a model does it."""

    def write(part: Path) -> None:
        (part / "README.md").write_text(f"a model; saved by openblip {text}")
        (part / "tokenizer.json").write_text(text)

    publish(folder, write)


@pytest.mark.parametrize("name", ["README.md", "config.json", "tokenizer.json", "lm_tokenizer/a.json"])
def test_files_of_somebody_else_are_not_replaced(name, tmp_path):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text('{"mine": 1}')
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=f"{name.partition('/')[0]} would be replaced") as told:
        publish_two(tmp_path)
    assert "\n" not in str(told.value) and file.read_text() == '{"mine": 1}'
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(files) == sorted([file, tmp_path / "notes.txt"])


def test_what_openblip_saved_is_replaced_and_all_else_stays(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    publish_two(tmp_path, "1")
    publish_two(tmp_path, "2")
    assert (tmp_path / "tokenizer.json").read_text() == "2" and (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "README.md").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json would be replaced"):
        publish_two(tmp_path)
    (tmp_path / "config.json").write_text('{"openblip_version": "1"}')
    publish_two(tmp_path, "3")
    assert (tmp_path / "tokenizer.json").read_text() == "3"


# ------------------------------------------------------------------------------------------------- memory


def write_zeros(file, shapes: dict[str, tuple[int, ...]]) -> int:
    """A safetensors file of bfloat16 zeros; a hole, so that gigabytes cost nothing to write. Returns its bytes."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(stream.tell() + end)
    return end


def write_shards(folder, shapes: dict[str, tuple[int, ...]], shards: int) -> int:
    """The same in several files with their index, as transformers' folders have it."""
    names, size, places = list(shapes), 0, {}
    for number in range(shards):
        file = folder / f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[number::shards]
        size += write_zeros(file, {name: shapes[name] for name in mine})
        places |= dict.fromkeys(mine, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return size


def peak(code: str, *arguments: str) -> int:
    """Bytes of memory that a Python running `code` holds at most."""
    code += "\nimport re\nprint(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return 1024 * int(run.stdout.split()[-1])


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measured as Linux tells it")


@needs_proc
def test_a_blip2_of_opt_2_7b_is_loaded_without_a_second_copy(tmp_path):
    """7.5 GB of bfloat16 in a folder of transformers'. They stay mapped, so what is held is what was copied."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    text = {"model_type": "opt", "hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32}
    text |= {"ffn_dim": 10240, "word_embed_proj_dim": 2560, "vocab_size": 50304}
    config = Blip2Config(text_config=text, num_query_tokens=32, image_token_index=50303)
    with torch.device("meta"):
        model = Blip2ForConditionalGeneration(config)
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    config.save_pretrained(tmp_path)
    size = write_shards(tmp_path, shapes, 4)
    assert size > 7.4e9
    code = """
import sys, torch
from openblip.hub import load_pretrained
model = load_pretrained(sys.argv[1], dtype=None).model
assert next(model.lm.parameters()).dtype == torch.bfloat16
"""
    assert peak(code, str(tmp_path)) < 0.3 * size


@needs_proc
def test_weights_in_another_dtype_are_converted_one_by_one(tmp_path):
    """200 MB of bfloat16 become 400 MB of float32: one file of eight is held in both, not all."""
    size = write_shards(tmp_path, {f"a.{number}": (2**20,) for number in range(100)}, 8)
    code = "import sys, torch\nfrom pathlib import Path\nfrom openblip.convert.files import read_weights\n"
    idle = peak(code)
    held = peak(code + "found = read_weights(Path(sys.argv[1]), torch.float32)", str(tmp_path)) - idle
    assert 2 * size < held < 1.2 * 2 * size
