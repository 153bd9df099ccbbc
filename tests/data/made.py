"""Small data sources of every format, with the same three pictures and their captions."""

import csv
import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

COLOURS = {"a": (255, 0, 0), "b": (0, 255, 0), "c": (0, 0, 255)}
CAPTIONS = {
    "a": ["a red square", "red"],
    "b": ["a green square, on nothing"],
    "c": ['"blue"', "ein blaues Quadrat à la carte"],
}


def png(colour: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(file, "PNG")
    return file.getvalue()


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_images(folder: Path) -> None:
    for name, colour in COLOURS.items():
        write(folder / f"images/{name}.png", png(colour))


def jsonl(records: list[dict]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def csv_text(rows: list[list], **options) -> str:
    file = io.StringIO()
    csv.writer(file, **options).writerows(rows)
    return file.getvalue()


def tar_bytes(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def parquet_bytes(columns: dict) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def as_jsonl(folder: Path, name: str = "captions.jsonl", key: str = "captions") -> Path:
    write_images(folder)
    write(
        folder / name, jsonl([{"file_name": f"images/{n}.png", key: texts} for n, texts in CAPTIONS.items()])
    )
    return folder


def as_csv(folder: Path, name: str = "metadata.csv", **options) -> Path:
    write_images(folder)
    rows = [[f"images/{n}.png", text] for n, texts in CAPTIONS.items() for text in texts]
    write(folder / name, csv_text([["image", "caption"], *rows], **options))
    return folder / name


def as_coco(folder: Path) -> Path:
    write_images(folder)
    images = [{"id": i, "file_name": f"images/{n}.png"} for i, n in enumerate(CAPTIONS)]
    captions = [{"image_id": i, "caption": text} for i, n in enumerate(CAPTIONS) for text in CAPTIONS[n]]
    document = {"info": {"year": 2014}, "images": images, "annotations": captions[::-1][::-1]}
    return write(folder / "captions_train.json", json.dumps(document, indent=1))


def as_list(folder: Path) -> Path:
    write_images(folder)
    rows = [{"image": f"images/{n}.png", "caption": text} for n, texts in CAPTIONS.items() for text in texts]
    return write(folder / "coco_karpathy_train.json", json.dumps(rows))


def as_karpathy(folder: Path) -> Path:
    write_images(folder)
    images = [
        {
            "filepath": "images",
            "filename": f"{n}.png",
            "sentences": [{"raw": t} for t in texts],
            "cocoid": ord(n),
        }
        for n, texts in CAPTIONS.items()
    ]
    return write(folder / "dataset_coco.json", json.dumps({"dataset": "coco", "images": images}))


def as_parquet_bytes(folder: Path) -> Path:
    columns = {"jpg": [png(COLOURS[n]) for n in CAPTIONS], "text": list(CAPTIONS.values())}
    return write(folder / "x.parquet", parquet_bytes(columns))


def as_parquet_structs(folder: Path) -> Path:
    structs = [{"bytes": png(COLOURS[n]), "path": "image.png"} for n in CAPTIONS]
    write(
        folder / "0.parquet", parquet_bytes({"image": structs[:2], "captions": list(CAPTIONS.values())[:2]})
    )
    write(
        folder / "1.parquet", parquet_bytes({"image": structs[2:], "captions": list(CAPTIONS.values())[2:]})
    )
    return folder


def as_parquet_paths(folder: Path) -> Path:
    write_images(folder)
    columns = {"image": [f"images/{n}.png" for n in CAPTIONS], "captions": list(CAPTIONS.values())}
    return write(
        folder / "[1]" / "x.parquet",
        parquet_bytes({**columns, "image": [f"../{p}" for p in columns["image"]]}),
    )


def as_tars(folder: Path) -> Path:
    """What img2dataset leaves behind, statistics and all; the sidecars hold several captions each."""
    for shard, names in {"00000": "ab", "00001": "c"}.items():
        members = {}
        for index, n in enumerate(names):
            members[f"{shard}{index:04d}.png"] = png(COLOURS[n])
            members[f"{shard}{index:04d}.json"] = json.dumps(
                {"captions": CAPTIONS[n], "status": "success"}
            ).encode()
        write(folder / f"{shard}.tar", tar_bytes(members))
        write(folder / f"{shard}.parquet", parquet_bytes({"url": ["http://x/a.png"], "status": ["success"]}))
        write(folder / f"{shard}_stats.json", '{"successes": 1}')
    return folder


FORMATS = {
    "folder with captions.jsonl": as_jsonl,
    "folder with metadata.jsonl": lambda folder: as_jsonl(folder, "metadata.jsonl", "text"),
    "a jsonl file": lambda folder: as_jsonl(folder, "some.jsonl", "texts") / "some.jsonl",
    "folder with metadata.csv": lambda folder: as_csv(folder).parent,
    "a csv file": lambda folder: as_csv(folder, "pairs.csv"),
    "csv with tabs": lambda folder: as_csv(folder, "pairs.tsv", delimiter="\t"),
    "csv with bars": lambda folder: as_csv(folder, "results.csv", delimiter="|"),
    "coco": as_coco,
    "list": as_list,
    "karpathy": as_karpathy,
    "parquet with bytes": as_parquet_bytes,
    "parquet with structs": as_parquet_structs,
    "parquet with paths": as_parquet_paths,
    "tars": as_tars,
}
