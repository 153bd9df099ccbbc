"""The index at size: recall@10 of the ANN search against the exact one, times, memory; and how fast pictures come in.

    python benchmarks/search.py [--vectors 1000000] [--width 256] [--queries 100] [--at FOLDER]
    python benchmarks/search.py --embed [--pictures 192] [--rounds 3]

The vectors are made: 2,000 random directions, and around each its share of the vectors, each the direction + 0.8 times
a random one of about unit length, normalised. Queries are vectors of the table + 0.3 times a random direction. They
are spread in all dimensions, as a model's are not: its vectors may be easier to search, or harder. A search is
`Index.nearest` with everything a hit is made of, one query after the other.

--embed: JPEGs of 500 × 375 pixels into an index with a ViT-B/16 at 224 pixels (random weights), thumbnails included, as
a share of the rate of the model alone on the same pictures, decoded before; both in turn, in one process. The share of
processor time is what is left if there is no second core to decode on.
"""

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from openblip.api import Pipeline
from openblip.data.text import bert_uncased
from openblip.data.transforms import ImageTransform
from openblip.hub import Pretrained
from openblip.models.blip import Blip, BlipConfig
from openblip.models.text import TextConfig
from openblip.models.vit import VisionConfig
from openblip.search import index as product
from openblip.search.fill import add, embed_pixels
from openblip.search.index import Index, create_index, new_index
from openblip.search.lines import Made

CENTRES, SPREAD, PERTURBED, WRITTEN = 2000, 0.8, 0.3, 20_000
VIT_B = VisionConfig(224, 16, 768, 12, 12, 3072)


def unit(vectors: np.ndarray) -> np.ndarray:
    """float32 [n, P], L2-normalised."""
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def directions(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    """Random vectors [count, width] of about unit length."""
    return rng.standard_normal((count, width), dtype=np.float32) / np.float32(width**0.5)


def filled(folder: str, count: int, width: int, queries: int) -> tuple[Index, np.ndarray]:
    """(a table of `count` vectors without an ANN index, queries [queries, width])."""
    rng = np.random.default_rng(0)
    centres, asked = unit(directions(rng, CENTRES, width)), []
    index = new_index(folder, Made("made up", "0" * 16, "fp32", width, 0))
    schema = index.table.schema
    for start in range(0, count, WRITTEN):
        size = min(WRITTEN, count - start)
        vectors = unit(centres[rng.integers(CENTRES, size=size)] + SPREAD * directions(rng, size, width))
        asked.append(vectors[rng.integers(size, size=-(-queries * WRITTEN // count))])
        columns = {name: pa.nulls(size, schema.field(name).type) for name in schema.names}
        columns["source"], columns["where"] = pa.repeat("made", size), pa.repeat("nowhere", size)
        columns["id"] = pa.array([f"{number:09d}" for number in range(start, start + size)])
        columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), width)
        index.table.add(pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema))
    near = np.concatenate(asked)
    near = near[rng.permutation(len(near))[:queries]]
    return index, unit(near + PERTURBED * directions(rng, len(near), width))


def asked(search: Callable[[np.ndarray], list[dict]], queries: np.ndarray) -> tuple[list[set[str]], str]:
    """(the ids found for each query, the times in words)."""
    found, times, start_all = [], [], clock()
    for query in queries:
        start = time.perf_counter()
        lines = search(query)
        times.append(1000 * (time.perf_counter() - start))
        found.append({line["id"] for line in lines})
    processor = 1000 * (clock() - start_all)[1] / len(queries)
    p50, p95 = np.percentile(times, [50, 95])
    return found, f"p50 {p50:.1f} ms, p95 {p95:.1f} ms, of processor time {processor:.1f} ms"


def peak() -> str:
    """The most memory this process has had."""
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"


def size_of(folder: str) -> str:
    """Of all files, versions before included."""
    return f"{sum(file.stat().st_size for file in Path(folder).rglob('*') if file.is_file()) / 2**30:.2f} GiB"


def recall(count: int, width: int, queries: int, folder: str) -> None:
    """Print the figures of the exact search, of building the ANN index, and of searching with it."""
    start = time.perf_counter()
    index, asking = filled(folder, count, width, queries)
    print(
        f"{count:,} × {width}: written in {time.perf_counter() - start:.0f} s, {size_of(folder)}", flush=True
    )
    truth, times = asked(lambda query: index.nearest(query, 10, exact=True), asking[:queries])
    print(f"exact: {times}; peak memory {peak()}", flush=True)
    start, product.EXACT_BELOW = clock(), 0
    index.tend()
    took, processor = clock() - start
    print(f"indexes built in {took:.0f} s, {processor:.0f} s of processor time; peak memory {peak()}")
    print(f"with the versions before it {size_of(folder)}", flush=True)
    usual = product.PROBES
    for probes in (usual // 4, usual // 2, usual, 2 * usual):
        product.PROBES = probes
        index.nearest(asking[0], 10)  # loads the index
        found, times = asked(lambda query: index.nearest(query, 10), asking)
        share = statistics.mean(len(a & b) / 10 for a, b in zip(found, truth, strict=True))
        note = " (as it is used)" if probes == usual else ""
        print(f"{probes} probes: recall@10 {share:.4f}, {times}{note}", flush=True)


def photographs(folder: Path, count: int) -> Path:
    """JPEGs with edges and grain, so that they cost to decode what photographs do."""
    rng = np.random.default_rng(1)
    folder.mkdir(parents=True)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(256, size=(12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), np.int16)
        grain = rng.integers(-12, 13, size=pixels.shape, dtype=np.int16)
        picture = Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8))
        picture.save(folder / f"{number:05d}.jpg", quality=90)
    return folder


def embed(pictures: int, rounds: int, folder: str) -> None:
    """Print the rate of adding to an index and of the model alone, pictures per second, and their ratio."""
    torch.manual_seed(0)
    model = Blip(BlipConfig(VIT_B, TextConfig(30524, 64, 1, 1, 64), projection_dim=256))
    pipeline = Pipeline(Pretrained(model, bert_uncased(), ImageTransform(224), {}, None), batch_size=16)
    data = photographs(Path(folder) / "data", pictures)
    paths = sorted(data.iterdir())
    tensors = [pipeline.transform(Image.open(path).convert("RGB")) for path in paths]
    batches = [torch.stack(tensors[start : start + 16]) for start in range(0, pictures, 16)]
    shares = []
    for number in range(rounds + 1):
        start = clock()
        for batch in batches:
            embed_pixels(pipeline, batch)
        alone = clock() - start
        index = create_index(f"{folder}/{number}", pipeline, "made up")
        index.refuse_other(pipeline)
        start = clock()
        added = add(index, pipeline, data, cache_dir=Path(folder) / "cache", block=64)
        whole = clock() - start
        assert added.pictures == pictures
        if number:  # the first warms up
            shares.append(alone / whole)
            rates = f"model alone {pictures / alone[0]:.2f}/s, whole {pictures / whole[0]:.2f}/s"
            print(f"{rates}, share {shares[-1][0]:.2f}, of processor time {shares[-1][1]:.2f}", flush=True)
    wall, processor = np.median(shares, axis=0)
    print(f"share: median {wall:.2f}, of processor time {processor:.2f}; {torch.get_num_threads()} threads")


def clock() -> np.ndarray:
    """Seconds on the clock, and of the processor in all threads of this process."""
    return np.array([time.perf_counter(), time.process_time()])


def main() -> None:
    """What the module says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--embed", action="store_true")
    parser.add_argument("--pictures", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--at", help="an empty folder; by default one that is gone afterwards")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.embed:
            embed(given.pictures, given.rounds, given.at or folder)
        else:
            recall(given.vectors, given.width, given.queries, given.at or folder)


if __name__ == "__main__":
    main()
