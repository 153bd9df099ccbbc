"""What CapFilt's engines cost, and that they lose nothing: the measurements of docs/scale.md.

    python -m benchmarks.scale make FOLDER --images 10000      img2dataset's tars of 1,000 JPEGs each, and two models
    python -m benchmarks.scale run FOLDER [--actors 2]         one job: images/s, peak memory, phases
    python -m benchmarks.scale faults FOLDER --trials 30       kill -9 at random moments; the same in the end?

With --actors 2, the last two are on Ray.

The JPEGs are 200 synthetic ones of sizes web pictures have, over and over; each has a caption and an id of its own. The
models are BLIPs of random weights (32 px, width 16, 2 layers) that write 5 tokens greedily: they cost little, so that
what is around them shows.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from openblip.curate.capfilt import CapFiltConfig
from openblip.curate.engine import run
from openblip.curate.engine_ray import RayOptions
from openblip.curate.loading import NamedCapFilt
from openblip.data.shards import open_shards
from openblip.data.text import bert_uncased
from openblip.data.transforms import ImageTransform
from openblip.hub import save_pretrained
from openblip.models.blip import Blip, BlipConfig
from openblip.models.generation import GenerationConfig
from openblip.models.text import TextConfig
from openblip.models.vit import VisionConfig

PER_SHARD = 1000
SIZES = [(640, 480), (500, 375), (800, 600), (480, 640), (1024, 683), (400, 400), (320, 240), (1200, 800)]


def main() -> None:
    """One of the three commands above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("make", "run", "faults"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--per-shard", type=int, default=PER_SHARD)
    parser.add_argument("--actors", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--trials", type=int, default=30)
    options = parser.parse_args()
    if options.command == "make":
        make(options.folder, options.images, options.per_shard)
    elif options.command == "run":
        print(json.dumps(measure(options.folder, options.out or options.folder / "job", options.actors)))
    else:
        faults(options.folder, options.trials, options.actors)


def make(folder: Path, images: int, per_shard: int) -> None:
    """Tars in folder/web, models in folder/captioner and folder/filter."""
    pictures = [jpeg(number) for number in range(200)]
    (folder / "web").mkdir(parents=True)
    for shard in range(-(-images // per_shard)):
        with tarfile.open(folder / f"web/{shard:05d}.tar", "w") as tar:
            for number in range(shard * per_shard, min((shard + 1) * per_shard, images)):
                key = f"{shard:05d}{number % per_shard:04d}"
                facts = {
                    "key": key,
                    "uid": hashlib.md5(str(number).encode()).hexdigest(),
                    "status": "success",
                }
                for suffix, content in (
                    ("jpg", pictures[number % len(pictures)]),
                    ("txt", f"picture number {number} of a test".encode()),
                    ("json", json.dumps(facts).encode()),
                ):
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    for name, seed, parts in (("captioner", 1, {}), ("filter", 2, {"decoder": False, "share": ()})):
        torch.manual_seed(seed)
        vision = VisionConfig(32, 16, 16, 2, 2, 32)
        model = Blip(BlipConfig(vision, TextConfig(30524, 16, 2, 2, 32), projection_dim=8, **parts))
        for weight in model.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.3)
        save_pretrained(model, folder / name, tokenizer=bert_uncased(), transform=ImageTransform(32))


def jpeg(number: int) -> bytes:
    """Smooth shapes with noise: about as many bytes as a photograph of its size."""
    rng = np.random.default_rng(number)
    width, height = SIZES[number % len(SIZES)]
    coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.int16)
    noisy = smooth + rng.integers(-5, 6, (height, width, 1), dtype=np.int16)
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=80)
    return file.getvalue()


def measure(folder: Path, out: Path, actors: int) -> dict[str, object]:
    """Run a job and say what it cost."""
    torch.set_num_threads(1)
    begun = time.perf_counter()
    source = open_shards(folder / "web", cache_dir=folder / "cache")
    config = CapFiltConfig(GenerationConfig(num_beams=1, max_new_tokens=5))
    capfilt = NamedCapFilt([str(folder / "captioner")], str(folder / "filter"), config, known=out)
    out.mkdir(parents=True, exist_ok=True)
    memory: list[int] = []

    def look(state: object) -> None:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        memory.append(pages * os.sysconf("SC_PAGE_SIZE") // 2**20)

    result = run(capfilt, source, out, ray=RayOptions(actors=actors) if actors else None, progress=look)
    seconds = time.perf_counter() - begun
    return {
        "images": result.images,
        "shards": result.shards,
        "found_done": result.found_done,
        "put_aside": len(result.aside),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(time.process_time(), 2),
        "images_per_second": round(result.images_per_second, 1),
        "phase_ms_per_image": {
            phase: round(1000 * spent / max(1, result.images), 3) for phase, spent in result.seconds.items()
        },
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "resident_mib_by_quarter": [int(max(part)) for part in np.array_split(memory, 4) if len(part)],
    }


def faults(folder: Path, trials: int, actors: int) -> None:
    """Kill -9 at random moments, let it finish, compare with a quiet run: a job each time, or on Ray its workers."""
    quiet, out = folder / "quiet", folder / "disturbed"
    shutil.rmtree(quiet, ignore_errors=True)
    call = [sys.executable, "-m", "benchmarks.scale", "run", str(folder), "--actors", str(actors), "--out"]
    begun = time.monotonic()
    subprocess.run([*call, str(quiet)], check=True, stdout=subprocess.DEVNULL)
    usual = time.monotonic() - begun
    wanted, untouched = outcome(quiet), hashes(folder / "web")
    chance, kills, jobs, different = random.Random(0), 0, 0, 0
    while kills < trials:
        shutil.rmtree(out, ignore_errors=True)
        child = subprocess.Popen([*call, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        jobs += 1
        if actors:  # Ray replaces the workers, and this very call finishes
            killed = 0
            while child.poll() is None:
                time.sleep(chance.uniform(0.2, 2.0))
                killed += kills + killed < trials and kill_worker(out, chance)
            if child.returncode:
                raise SystemExit("a job whose workers were killed did not finish")
        else:
            time.sleep(chance.uniform(0.3, 1.0) * usual)
            killed = int(child.poll() is None)
            child.kill()
            child.wait()
        published = len(list(out.glob("scores-*.json")))
        if not actors:
            subprocess.run([*call, str(out)], check=True, stdout=subprocess.DEVNULL)
        kills += killed
        same = outcome(out) == wanted
        different += not same
        what = f"job {jobs}: {killed} killed, {published} shards published"
        print(f"{what}, in the end {'identical' if same else 'DIFFERENT'}", flush=True)
    intact = hashes(folder / "web") == untouched
    print(json.dumps({"jobs": jobs, "kills": kills, "different": different, "input_untouched": intact}))
    raise SystemExit(bool(different) or not intact)


def kill_worker(out: Path, chance: random.Random) -> bool:
    """Kill one that is at a shard for the first time: a shard that takes three workers with it would be put aside."""
    for claim in chance.sample(found := sorted(out.glob(".claim-*")), len(found)):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):  # finished meanwhile
            (line,) = claim.read_text(encoding="ascii").splitlines()
            process = int(line.split()[1])
            if b"ray::" in Path(f"/proc/{process}/cmdline").read_bytes():
                os.kill(process, signal.SIGKILL)
                return True
    return False


def outcome(job: Path) -> dict[str, str]:
    """Hashes of all that a job publishes, but for the pages that say when."""
    names = ("progress.html", "models.json")
    return {name: digest for name, digest in hashes(job).items() if name not in names}


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the files in a folder."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()}


if __name__ == "__main__":
    main()
