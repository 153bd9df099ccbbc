"""Two ways of doing one thing, run in turn in one process: do they agree, and what does each cost?

Every benchmark here is a function of a `Bench` that calls `bench.paired` for each line of its table. What comes out are
ratios: another machine, or this one when busy, changes both sides alike.
"""

import argparse
import ctypes
import gc
import json
import math
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

Call = Callable[[], Any]
_SIDE = 2048  # of the matrices that the machine's limit is measured with


@dataclass(frozen=True)
class Row:
    """One line of the table.

    ratio, low, high: their time over ours, median, least and most of the runs; above 1, ours takes less.
    memory: their peak over ours, each beyond what the process held before; None where the system does not tell.
    share: of the machine's limit: what ours would take if it were nothing but its own matrix products, each as fast as
        one of two square matrices, over what it takes. None if it was not asked for.
    """

    name: str
    ratio: float
    low: float
    high: float
    memory: float | None
    share: float | None

    def __str__(self) -> str:
        memory = "" if self.memory is None else f"{self.memory:8.2f}"
        share = "" if self.share is None else f"{self.share:8.0%}"
        return (
            f"{self.name:64}{self.ratio:7.2f}  {f'({self.low:.2f} to {self.high:.2f})':18}{memory:8}{share:8}"
        )


@dataclass
class Bench:
    """How to measure, and what was.

    runs: pairs that are timed, after one that is compared and not timed.
    quick: sizes at which figures mean nothing, to see that everything runs.
    clock: "wall", or "cpu": processor time of this process and those it started, which other work on the machine
        changes little. It adds up over threads: for one thread only.
    most: images in a batch, where the machine has no time for those of the real sizes; lines say how many there were.
    precisions: of those benchmarks that have a line for each.
    """

    runs: int = 5
    quick: bool = False
    clock: Literal["wall", "cpu"] = "wall"
    most: int | None = None
    precisions: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    rows: list[Row] = field(default_factory=list)

    def batch(self, size: int) -> int:
        """How many images a batch of this size has here."""
        return min(size, 2 if self.quick else self.most or size)

    def now(self) -> float:
        """Seconds."""
        if self.clock == "wall":
            return time.perf_counter()
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + ended.ru_utime + ended.ru_stime

    def seconds(self, call: Call) -> float:
        """What one call takes."""
        gc.collect()
        start = self.now()
        call()
        return self.now() - start

    def product(self, dtype: torch.dtype) -> float:
        """Seconds per floating-point operation of one matrix product, at its best."""
        side = 64 if self.quick else _SIDE
        matrix = torch.randn(side, side).to(dtype)
        return min(self.seconds(lambda: matrix @ matrix) for _ in range(3)) / (2 * side**3)

    def paired(
        self,
        name: str,
        theirs: Call,
        ours: Call,
        same: Callable[[Any, Any], bool] | None,
        *,
        dtype: torch.dtype | None = None,
        memory: bool = True,
    ) -> Row:
        """Time both in turn, print the line and keep it.

        same: judges what both returned before anything is timed. None: they are different by nature.
        dtype: of the matrix products of ours; None leaves the share of the machine's limit out.
        memory: whether this process is the one whose memory tells something.
        Raises AssertionError: they do not agree.
        """
        (output, most), (our_output, our_most) = peak(theirs), peak(ours)
        if same is not None and not same(output, our_output):
            raise AssertionError(f"{name}: the two sides do not agree")
        del output, our_output
        is_known = memory and most is not None and our_most is not None
        held = most / max(our_most, 1) if is_known else None
        operations = 0 if dtype is None else matrix_products(ours)
        ratios, shares = [], []
        for _ in range(self.runs):
            their_time, our_time = self.seconds(theirs), max(self.seconds(ours), 1e-9)
            ratios.append(their_time / our_time)
            if dtype is not None:
                shares.append(operations * self.product(dtype) / our_time)
        share = statistics.median(shares) if shares else None
        row = Row(name, statistics.median(ratios), min(ratios), max(ratios), held, share)
        print(row, flush=True)
        self.rows.append(row)
        return row


def matrix_products(call: Call) -> int:
    """How many floating-point operations a call spends on matrix products and convolutions."""
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.mkldnn._linear_pointwise: _packed_product}
    )
    with sdpa_kernel(SDPBackend.MATH), counter:  # the fused kernel would not be counted
        call()
    return counter.get_total_flops()


def _packed_product(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Operations of a layer of `models.packed`, from the shapes of its input and its weight."""
    return 2 * math.prod(x) * weight[0]


def peak(call: Call) -> tuple[Any, int | None]:
    """What a call returns, and the most memory in kB that it holds beyond what the process held before.

    None where Linux does not say.
    """
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed and kept would count as held before
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    except (OSError, AttributeError):
        return call(), None
    before = _status("VmRSS")
    output = call()
    return output, _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def same_ids(theirs: Tensor, ours: Tensor) -> bool:
    """The same token ids."""
    return torch.equal(theirs, ours)


def close(tolerance: float) -> Callable[[Tensor, Tensor], bool]:
    """Judges tensors, or the losses of a training step: no element further off than this share of the largest."""

    def judge(theirs: Tensor, ours: Tensor) -> bool:
        gap = (theirs.float() - ours.float()).abs().max()
        return theirs.shape == ours.shape and bool(gap <= tolerance * theirs.float().abs().max())

    return judge


def drawn_anew_(model: nn.Module) -> nn.Module:
    """All weights of a model at random and large enough to matter; transformers' BLIP starts blind to its image."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    return model.eval()


def main(about: str, benchmarks: dict[str, Callable[[Bench], None]]) -> None:
    """Run benchmarks by name, as the command line says, and print their lines."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="pairs that are timed")
    parser.add_argument("--only", nargs="+", choices=benchmarks, default=list(benchmarks), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="sizes at which figures mean nothing")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for one thread")
    parser.add_argument("--batch", type=int, help="images in a batch at most, where real sizes take too long")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="this precision alone")
    parser.add_argument("--json", type=Path, help="the same lines for programs")
    options = parser.parse_args()
    bench = Bench(options.runs, options.quick, options.clock, options.batch)
    if options.dtype:
        bench.precisions = (torch.float32 if options.dtype == "fp32" else torch.bfloat16,)
    print(f"{'':64}{'time':>7}  {'(least to most)':18}{'memory':>8}{'limit':>8}")
    for name in options.only:
        benchmarks[name](bench)
    if options.json:
        lines = [asdict(row) for row in bench.rows]
        options.json.write_text(json.dumps(lines, indent=2) + "\n", encoding="utf-8")
