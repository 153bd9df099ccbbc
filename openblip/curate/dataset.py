"""From scored texts to a dataset: what is kept is decided when they are read, and no model is asked.

    job folder ── scores ──► one table ── decide ──► the same with a column `kept`
    job folder + source ── write_parquet, write_webdataset ──► a folder to train on

A written dataset is a folder of shards that `open_source` reads again. Each picture is as it was in the
source, byte by byte; each of its captions says where it came from and what the filter thought of it. A
picture without a kept caption is left out.
"""

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from openblip.config import UserError
from openblip.curate.capfilt import ScoredText, check_rule, keep_best, keep_matching
from openblip.curate.job import SCHEMA, ShardManifest, manifests, publish, quarantined, scores_path, writing
from openblip.curate.texts import TextRules
from openblip.data.row_range import Rows
from openblip.data.rows import Row
from openblip.data.shards import InShards

Rule = Literal["itm", "top_k"]

_TITLE = "# A dataset bootstrapped by CapFilt"  # its card begins with
_SHARD_IMAGES = 1000  # in a file of human rows; web rows stay in the shards they came in
_MAGIC = {  # first bytes -> file name suffix
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG": "png",
    b"GIF8": "gif",
    b"RIFF": "webp",
    b"BM": "bmp",
    b"II*\0": "tif",
    b"MM\0*": "tif",
    b"P5": "ppm",
    b"P6": "ppm",
}
_CAPTION = pa.struct(
    SCHEMA.field(name) for name in ("text", "kind", "itm", "itc", "match", "seed", "captioner", "filter")
)
_DATASET = pa.schema(
    [
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("image_id", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("provenance", pa.list_(_CAPTION)),  # of each caption
        ("split", pa.string()),
    ]
)


@dataclass(frozen=True)
class Written:
    """A dataset on disk. `captions` counts by kind; `left_out`: pictures without a kept caption."""

    folder: Path
    images: int
    captions: dict[str, int]
    left_out: int


@dataclass(frozen=True)
class _Sample:
    """A picture with its captions; `provenance` holds a `_CAPTION` for each."""

    id: str
    picture: bytes
    captions: list[str]
    provenance: list[dict[str, Any]]
    split: str | None

    @property
    def suffix(self) -> str:
        """Of a file with this picture, by its first bytes."""
        if self.picture[4:12] in (b"ftypavif", b"ftypavis"):
            return "avif"
        return next((suffix for magic, suffix in _MAGIC.items() if self.picture.startswith(magic)), "jpg")


def scores(job: str | Path) -> pa.Table:
    """All scored texts of a job, finished or not, in the order of the shards' names: `job.SCHEMA`.

    Raises:
        UserError: there is no finished shard in the folder, or a file of scores is lost or unreadable.
    """
    return pa.concat_tables([shard_scores(job, manifest) for manifest in _finished(job)])


def decide(
    table: pa.Table,
    rule: Rule = "itm",
    threshold: float = 0.5,
    k: int = 2,
    texts: TextRules | None = None,
) -> pa.Table:
    """The table with a column `kept`.

    rule: "itm" keeps P(match) ≥ threshold (BLIP §3.3); "top_k" the k best of an image by ITC (BLIP-2 §3.4).
    texts: what breaks these rules is not kept, and takes no place among the k.

    Raises:
        UserError: an unknown rule, a threshold outside 0…1, k below 1.
    """
    if rule not in ("itm", "top_k"):
        raise UserError(f'rule is "itm" or "top_k", got {rule!r}')
    check_rule(threshold, k)
    names = [field.name for field in fields(ScoredText)]
    scored = [ScoredText(**line) for line in table.select(names).to_pylist()]
    allowed = [texts is None or texts.allows(one.text) for one in scored]
    chosen = [one for one, good in zip(scored, allowed, strict=True) if good]
    decisions = iter(keep_matching(chosen, threshold) if rule == "itm" else keep_best(chosen, k))
    column = pa.array([good and next(decisions) for good in allowed], pa.bool_())
    if "kept" in table.column_names:
        return table.set_column(table.column_names.index("kept"), "kept", column)
    return table.append_column("kept", column)


def write_parquet(
    job: str | Path,
    source: InShards,
    out: str | Path,
    *,
    rule: Rule = "itm",
    threshold: float = 0.5,
    k: int = 2,
    texts: TextRules | None = None,
    human: Iterable[Row] | None = None,
    over: bool = False,
) -> Written:
    """Write the bootstrapped dataset as parquet: image {bytes, path}, image_id, captions, provenance, split.

    Args:
        job: a finished job. source: what it was made of.
        out: a new folder; it appears when it is complete. over: or that of a dataset written before, which is there
            until then.
        rule, threshold, k, texts: see `decide`.
        human: rows people vouch for, added unchanged and with kind "human": `human.HumanRows` of a second source.

    Raises:
        UserError: the job is of another source or not finished, `out` is not empty, nothing is kept, a
            picture cannot be read any more, or a human row has no caption.
    """

    def write(path: Path, samples: list[_Sample]) -> None:
        records = [
            {
                "image": {"bytes": sample.picture, "path": f"{path.stem}-{number:05d}.{sample.suffix}"},
                "image_id": sample.id,
                "captions": sample.captions,
                "provenance": sample.provenance,
                "split": sample.split,
            }
            for number, sample in enumerate(samples)
        ]
        with path.with_suffix(".parquet").open("wb") as file:
            pq.write_table(pa.Table.from_pylist(records, schema=_DATASET), file)
            file.flush()
            os.fsync(file.fileno())

    with writing(Path(out)):
        return _write(job, source, Path(out), write, rule, threshold, k, texts, human, over)


def write_webdataset(
    job: str | Path,
    source: InShards,
    out: str | Path,
    *,
    rule: Rule = "itm",
    threshold: float = 0.5,
    k: int = 2,
    texts: TextRules | None = None,
    human: Iterable[Row] | None = None,
    over: bool = False,
) -> Written:
    """Write the bootstrapped dataset as tars in img2dataset's layout; all else is as in `write_parquet`.

    A sample is `key.jpg` (or what the picture is), `key.txt` (the first kept caption) and `key.json`:
    image_id, captions, and for each its provenance: kind, both scores, seed, hashes of the models.
    """

    def write(path: Path, samples: list[_Sample]) -> None:
        with path.with_suffix(".tar").open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                for number, sample in enumerate(samples):
                    _add_sample(tar, f"{path.stem}{number:04d}", sample)
            file.flush()
            os.fsync(file.fileno())

    with writing(Path(out)):
        return _write(job, source, Path(out), write, rule, threshold, k, texts, human, over)


def check_job(job: str | Path, source: InShards) -> list[ShardManifest]:
    """The manifests of a job, in the order of the source's shards; those in quarantine have none.

    Raises:
        UserError: it is the job of another source, or not finished.
    """
    done = {manifest.shard: manifest for manifest in _finished(job)}
    names = [shard.name for shard in source.shards()]
    made_of = {name: manifest.fingerprint["source"] for name, manifest in done.items()}
    if not made_of.keys() <= set(names) or any(made_of[name] != source.identity(name) for name in made_of):
        raise UserError(f"{job}: this job was not made of {source.path} as it is now; open the same source")
    models = [{**manifest.fingerprint, "source": ""} for manifest in done.values()]
    aside = {one.shard for one in quarantined(job)}
    missing = [name for name in names if name not in done and name not in aside]
    if missing or any(one != models[0] for one in models):
        what = f"{len(missing)} of {len(names)} shards are not done (the first: {missing[0]})" if missing else (
            "some shards were done with other models or settings than others"
        )  # fmt: skip
        raise UserError(f"{job}: {what}; run the job again, it goes on")
    return [done[name] for name in names if name in done]


def picture_bytes(row: Row) -> bytes:
    """The encoded first picture of a row, as it is in the source.

    Raises:
        UserError: it cannot be read.
    """
    try:
        if isinstance(row.image, bytes):
            return row.image
        return Path(row.image).read_bytes() if isinstance(row.image, str) else row.image.read()
    except OSError as error:
        raise UserError(f"{row.where}: the picture cannot be read any more: {error}") from None


def _finished(job: str | Path) -> list[ShardManifest]:
    found = manifests(job)
    if not found:
        raise UserError(f"{job}: no finished shard of a CapFilt job in this folder")
    return found


def shard_scores(job: str | Path, manifest: ShardManifest) -> pa.Table:
    """The scored texts of one shard: `job.SCHEMA`.

    Raises UserError: the file is lost, or not the one that its manifest speaks of.
    """
    path = scores_path(job, manifest.shard)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: scores cannot be read ({error}); run the job again") from None
    if hashlib.sha256(content).hexdigest() != manifest.sha256:
        raise UserError(f"{path}: is damaged, its manifest has another hash; delete it and run the job again")
    return pq.read_table(pa.BufferReader(content), schema=SCHEMA)


def _write(
    job: str | Path,
    source: InShards,
    out: Path,
    write: Callable[[Path, list[_Sample]], None],
    rule: Rule,
    threshold: float,
    k: int,
    texts: TextRules | None,
    human: Iterable[Row] | None,
    over: bool,
) -> Written:
    """One file per shard of the job, then the human rows; beside `out` first, then renamed as a whole."""
    done = check_job(job, source)
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not (over and _is_ours(out)):
        raise UserError(f"{out}: is there already; a dataset is written to a new folder")
    part, old = out.with_name(f".{out.name}.part"), out.with_name(f".{out.name}.old")
    for left_behind in (part, old):
        shutil.rmtree(left_behind, ignore_errors=True)
    part.mkdir(parents=True)
    counts: Counter[str] = Counter()
    images = seen = files = 0

    def write_file(samples: list[_Sample]) -> None:
        nonlocal files, images
        write(part / f"{files:05d}", samples)
        files += 1
        images += len(samples)
        counts.update(entry["kind"] for sample in samples for entry in sample.provenance)

    for manifest in done:
        table = decide(shard_scores(job, manifest), rule, threshold, k, texts)
        seen += manifest.images
        if samples := list(_web_samples(table, source.part(manifest.shard))):
            write_file(samples)
    left_out = seen - images
    if not images:
        shutil.rmtree(part)
        raise UserError(f"{job}: no text is kept at this threshold, so there is nothing to write")
    waiting: list[_Sample] = []
    for row in human or ():
        waiting.append(_human_sample(row))
        if len(waiting) == _SHARD_IMAGES:
            write_file(waiting)
            waiting = []
    if waiting:
        write_file(waiting)
    card = _card(done[0], rule, threshold, k, texts, images, counts, left_out)
    publish(part / "README.md", card.encode())
    if out.exists():
        out.rename(old)
    part.rename(out)
    shutil.rmtree(old, ignore_errors=True)
    return Written(out, images, dict(counts), left_out)


def _is_ours(folder: Path) -> bool:
    card = folder / "README.md"
    return card.is_file() and card.read_text(encoding="utf-8").startswith(_TITLE)


def _web_samples(table: pa.Table, rows: Rows) -> Iterator[_Sample]:
    """The pictures of a shard that have a kept caption; the web's captions come first."""
    kept: dict[str, list[dict[str, Any]]] = {}
    for line in table.filter(table.column("kept")).to_pylist():
        kept.setdefault(line["id"], []).append(line)
    for lines in kept.values():
        different = {line["text"]: line for line in reversed(lines)}  # of equal texts the first
        lines = [line for line in lines if different[line["text"]] is line]
        row = rows[lines[0]["row"]]
        provenance = [{name.name: line[name.name] for name in _CAPTION} for line in lines]
        yield _Sample(row.id, picture_bytes(row), [line["text"] for line in lines], provenance, row.split)


def _human_sample(row: Row) -> _Sample:
    if not row.captions:
        raise UserError(f"{row.where or row.id}: a human row without a caption")
    blank = dict.fromkeys(name.name for name in _CAPTION)
    provenance = [{**blank, "text": text, "kind": "human"} for text in row.captions]
    return _Sample(row.id, picture_bytes(row), row.captions, provenance, row.split)


def _add_sample(tar: tarfile.TarFile, key: str, sample: _Sample) -> None:
    facts = {
        "key": key,
        "image_id": sample.id,
        "caption": sample.captions[0],
        "captions": sample.captions,
        "provenance": sample.provenance,
        **({} if sample.split is None else {"split": sample.split}),
    }
    _add(tar, f"{key}.{sample.suffix}", sample.picture)
    _add(tar, f"{key}.txt", sample.captions[0].encode())
    _add(tar, f"{key}.json", json.dumps(facts, ensure_ascii=False).encode())


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _card(
    manifest: ShardManifest,
    rule: Rule,
    threshold: float,
    k: int,
    texts: TextRules | None,
    images: int,
    counts: Counter[str],
    left_out: int,
) -> str:
    """README.md of a dataset: how it was made."""
    rule_text = f"P(match) ≥ {threshold:g}" if rule == "itm" else f"the {k} best of an image by ITC"
    if texts is not None:
        rule_text += f", of texts that keep {texts}"
    kinds = "\n".join(f"| {kind} captions | {count} |" for kind, count in sorted(counts.items()))
    facts = json.dumps(manifest.fingerprint, indent=2, ensure_ascii=False)
    return f"""{_TITLE}

Kept: {rule_text}.

| | |
|---|---|
| images | {images} |
{kinds}
| images left out | {left_out} |

Each caption says in `provenance` where it came from, and what the filter thought of it.

Made by:

```json
{facts}
```
"""
