"""The benchmarks run, at sizes where their figures mean nothing, and compare before they time."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from openblip.models.packed import pack_

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def paired():
    """The harness; the benchmarks find each other as they do when one is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module("paired")
        for name in [path.stem for path in FOLDER.glob("*.py")]:
            sys.modules.pop(name, None)


def test_sides_that_disagree_are_not_timed(paired):
    bench = paired.Bench(runs=1, quick=True)
    one, two = (lambda: torch.ones(3)), (lambda: torch.tensor([1.0, 1.0, 1.1]))
    with pytest.raises(AssertionError, match="a name: the two sides do not agree"):
        bench.paired("a name", one, two, paired.close(0.05))
    assert bench.rows == []
    bench.paired("a name", one, two, paired.close(0.15))
    assert [row.name for row in bench.rows] == ["a name"]
    assert not paired.same_ids(torch.tensor([1, 2]), torch.tensor([1, 3]))


def test_work_and_memory_are_counted(paired):
    x = torch.randn(8, 16)
    with torch.no_grad():
        assert paired.matrix_products(lambda: x @ x.T) == 2 * 8 * 16 * 8
        packed = pack_(torch.nn.Linear(16, 5).requires_grad_(False))
        assert paired.matrix_products(lambda: packed(x)) == 2 * 8 * 16 * 5, "packed ones too"
        q = torch.randn(1, 2, 40, 16)
        fused = torch.nn.functional.scaled_dot_product_attention
        assert paired.matrix_products(lambda: fused(q, q, q)) == 2 * 2 * (2 * 40 * 16 * 40), "fused ones too"
    total, held = paired.peak(lambda: torch.ones(64, 1024, 1024).sum())
    assert total == 2**26
    assert held is None or 200_000 < held < 400_000, "kB, of 256 MB"


@pytest.mark.parametrize(
    "name", ["caption", "rerank", "pretrain", "stage1", "stage2_captions", "capfilt", "packed"]
)
def test_a_benchmark_runs_and_compares(paired, name, capsys):
    bench = paired.Bench(runs=1, quick=True)
    importlib.import_module("run").ROWS[name](bench)
    assert bench.rows and all(row.ratio > 0 for row in bench.rows)
    assert bench.rows[-1].name in capsys.readouterr().out


def test_every_benchmark_is_in_the_table_once(paired):
    modules = [
        importlib.import_module(name)
        for name in ("attention", "blip", "blip2", "blip3", "capfilt", "packed", "start")
    ]
    names = [name for module in modules for name in module.ROWS]
    assert sorted(names) == sorted(importlib.import_module("run").ROWS)


def test_growth_is_drawn(paired, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["growth.py", "--quick", "--out", str(tmp_path / "growth.png")])
    importlib.import_module("growth").main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and lines[0].split()[-1] == "1.00", "ours at the first point is the measure"
    assert Image.open(tmp_path / "growth.png").width > 1000
