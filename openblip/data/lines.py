"""Text files and tars to `Line`s, the future rows, in one pass and without giving up at a bad one.

A line that cannot become a row is a line all the same, with the reason in it: it is met, counted and listed
when its turn comes, and everything around it is kept.
"""

import csv
import io
import itertools
import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple

from openblip.config import UserError
from openblip.data.rows import (
    CAPTION_NAMES,
    CHAT_NAMES,
    IMAGE_NAMES,
    QUESTION_NAMES,
    VIDEO_NAMES,
    printable,
)

MAX_TEXT = 1 << 20  # bytes of a caption or a sidecar in a tar
IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif"})

Record = dict[str, Any]
Found = tuple[str, Record | str]  # where, and a record or what is wrong: "reason|detail"


class Line(NamedTuple):
    """One future row.

    `record` is a JSON object in bytes, not checked yet. `split` is what its column of this name says, "" if
    nothing, None if it cannot be read. `problem` is `"reason|detail"` of the `BadRow` that this line will be.
    `start` and `stop` are the byte range of the image inside a tar.
    """

    where: str
    record: bytes | None = None
    split: str | None = None
    problem: str | None = None
    start: int | None = None
    stop: int | None = None


class Columns(NamedTuple):
    """The names of the columns with image and caption, where they are not the usual ones."""

    image: str | None = None
    caption: str | None = None


def read_lines(file: IO[bytes], kind: str, name: str, columns: Columns) -> Iterator[Line]:
    """The lines of a file of kind jsonl, csv, json or tar, called `name` in messages.

    Neighbours in csv and json that name the same image, have one caption each and ask no question are one
    line with all the captions, and the other columns of the first: that is how these formats write a list.
    A file of kind json that turns out to be one object per line is read as jsonl.

    Memory: one line; for json the whole document, for tars the text of one sample.

    Raises:
        UserError: the file as a whole makes no sense.
    """
    name = printable(name)
    if kind == "jsonl":
        return _read_jsonl(file, name)
    if kind == "tar":
        return _read_tar(file, name)
    if kind == "csv":
        return _join_captions(_read_csv(file, name), columns)
    try:
        document = _whole_document(file, name)
    except _JsonLines:
        file.seek(0)
        return _read_jsonl(file, name)
    return _join_captions(_read_json(document, name), columns)


def csv_delimiter(header: str) -> str:
    """The most frequent of the usual delimiters in the first line."""
    return max(",\t;|", key=header.count)


def _read_jsonl(file: IO[bytes], name: str) -> Iterator[Line]:
    for number, line in enumerate(file, start=1):
        if line := line.removeprefix(b"\xef\xbb\xbf").strip():
            try:
                split = _split_of(json.loads(line))
            except (ValueError, RecursionError):
                split = None
            yield Line(f"{name} line {number}", line, split)


def _read_csv(file: IO[bytes], name: str) -> Iterator[Found]:
    # Bytes that are not UTF-8 travel on as lone surrogates, to be refused with the row they are in.
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    first = text.readline()
    delimiter = csv_delimiter(first)
    header = [cell.strip() for cell in next(csv.reader([first], delimiter=delimiter))]
    lines = _RowLines(text)
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
    while True:
        lines.start_row()
        where = f"{name} line {lines.number + 2}"
        try:
            cells = next(reader, None)
            if lines.asked > 1:  # a quote with line breaks in it, or one never closed that swallows rows
                next(csv.reader(lines.taken, delimiter=delimiter, skipinitialspace=True, strict=True))
        except csv.Error as error:
            if lines.asked > 1:
                lines.give_back()
                hint = "a quote in a text is written twice, and the text in quotes"
                yield where, f"columns|a cell begins with a quote and does not end with one: {error}; {hint}"
            else:
                yield where, f"columns|{error}"
            continue
        if cells is None:
            return
        if len(cells) > len(header):
            hint = f"a text with {delimiter!r} in it wants quotes"
            yield where, f"columns|{len(cells)} cells under {len(header)} columns; {hint}"
        elif cells:
            yield where, dict(zip(header, cells))


class _RowLines:
    """The lines of a file for a csv reader; those of a row but the first can be given back, to be read again."""

    def __init__(self, text: Iterator[str]) -> None:
        self.text = text
        self.again: list[str] = []  # given back, the next one last
        self.number = 0  # lines read and not given back
        self.start_row()

    def start_row(self) -> None:
        self.taken: list[str] = []
        self.asked = 0  # one more than taken, if the file ended in the row

    def __iter__(self) -> "_RowLines":
        return self

    def __next__(self) -> str:
        self.asked += 1
        line = self.again.pop() if self.again else next(self.text)
        self.number += 1
        self.taken.append(line)
        return line

    def give_back(self) -> None:
        self.again += reversed(self.taken[1:])
        self.number -= len(self.taken) - 1


class _JsonLines(Exception):
    """What should be one JSON document is one on each line."""


def _whole_document(file: IO[bytes], name: str) -> Any:
    text = file.read().decode("utf-8-sig", "surrogateescape")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            document = text[: error.pos].strip()
            if "\n" not in document:  # it ends on its first line
                raise _JsonLines from error
        raise UserError(f"{name}: neither JSON nor JSON lines: {error}") from error


def _read_json(document: Any, name: str) -> Iterator[Found]:
    """COCO captions, Karpathy's `dataset_*.json`, or a list of objects, bare or the only one in an object."""
    if isinstance(document, dict):
        lists = {key: value for key, value in document.items() if _is_list_of_objects(value)}
        if "images" in lists and "annotations" in lists:
            yield from _read_coco(lists["images"], lists["annotations"], name)
            return
        is_row = any(_is_part_of_a_row(key, value) for key, value in lists.items())
        document = next(iter(lists.values())) if len(lists) == 1 and not is_row else [document]
    if not isinstance(document, list):
        raise UserError(f"{name}: a list of objects is wanted, got {type(document).__name__}")
    for index, record in enumerate(document):
        where = f"{name}[{index}]"
        if not isinstance(record, dict):
            yield where, f"not_json|an object with column names is wanted, got {str(record)[:40]}"
        elif "filepath" in record and "filename" in record:  # Karpathy's folder and name
            yield where, {"file_name": f"{record.pop('filepath')}/{record.pop('filename')}", **record}
        else:
            yield where, record


def _read_coco(images: list[Record], annotations: list[Record], name: str) -> Iterator[Found]:
    if not any("caption" in annotation for annotation in annotations):
        found = ", ".join(sorted(annotations[0]))
        raise UserError(f"{name}: its annotations have no captions but {found}; COCO's captions_*.json do")
    captions: dict[str, list[Any]] = {}
    for annotation in annotations:
        captions.setdefault(str(annotation.get("image_id")), []).append(annotation.get("caption"))
    for index, image in enumerate(images):
        record = {"image_id": image.get("id"), **image, "captions": captions.pop(str(image.get("id")), [])}
        record.pop("id", None)
        yield f"{name} images[{index}]", record
    for image_id, orphans in captions.items():
        yield (
            f"{name} image_id {image_id}",
            f"unknown_image|{len(orphans)} captions for an image that is not in the list of images",
        )


def _join_captions(found: Iterable[Found], columns: Columns) -> Iterator[Line]:
    open_where, open_image = "", None
    open_record: Record = {}
    for where, record in found:
        if isinstance(record, str):
            yield Line(printable(where), problem=printable(record))
            continue
        image = record.get(columns.image or first_name(record, IMAGE_NAMES))
        caption_name = columns.caption or first_name(record, CAPTION_NAMES)
        caption = record.get(caption_name)
        has_question = first_name(record, QUESTION_NAMES) != ""
        if has_question or not _is_good_text(image) or not _is_good_text(caption):
            yield _line(where, record)  # by itself: if it is bad, it alone is
        elif image == open_image:
            open_record[caption_name].append(caption)
        else:
            if open_record:
                yield _line(open_where, open_record)
            open_where, open_image, open_record = where, image, {**record, caption_name: [caption]}
    if open_record:
        yield _line(open_where, open_record)


def _line(where: str, record: Record) -> Line:
    return Line(where, json.dumps(record).encode(), _split_of(record))


def _split_of(record: Any) -> str | None:
    return printable(str(record.get("split") or "")) if isinstance(record, dict) else None


def _read_tar(file: IO[bytes], name: str) -> Iterator[Line]:
    """Members whose names are equal up to the first dot are one sample: webdataset's convention."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for key, members in itertools.groupby(_members(tar, file), key=_sample_key):
            if key:
                yield _read_sample(file, name, key, members)
            else:
                yield Line(name, problem="truncated_tar|the archive breaks off; what came after is lost")


def _read_sample(file: IO[bytes], name: str, key: str, members: Iterable[tarfile.TarInfo]) -> Line:
    image: tarfile.TarInfo | None = None
    caption: Record = {}
    sidecar: Record = {}
    problem = None
    for member in members:
        suffix = member.name.rpartition(".")[2].lower()
        if suffix in IMAGE_SUFFIXES:
            image = image or member
        elif suffix in ("txt", "json") and member.size > MAX_TEXT:
            problem = f"not_text|{member.name} has {member.size} bytes, more than {MAX_TEXT}"
        elif suffix in ("txt", "json"):
            file.seek(member.offset_data)
            text = file.read(member.size).decode("utf-8", "surrogateescape")
            if suffix == "txt":
                caption = {"caption": text}
                continue
            try:
                sidecar = dict(json.loads(text))
            except (ValueError, TypeError, RecursionError) as error:
                problem = f"not_json|{member.name}: {error}"
    if image is None:
        problem = problem or "missing_image|no member of this sample is an image"
    record = {**sidecar, **caption, "key": _picture_key(name, key)}
    return _line(f"{name} {printable(key)}", record)._replace(
        problem=None if problem is None else printable(problem),
        start=None if image is None else image.offset_data,
        stop=None if image is None else image.offset_data + image.size,
    )


def _members(tar: tarfile.TarFile, file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """The files in an archive; if it breaks off, a last one without a name."""
    try:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined] # it would keep every header read so far
            if member.isfile() and not PurePosixPath(member.name).name.startswith("."):
                yield member
        file.seek(tar.offset)  # tarfile stops without a word at a damaged header as it does at the end
        complete = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except tarfile.ReadError:
        complete = False
    if not complete:
        yield tarfile.TarInfo("")


def _picture_key(tar: str, sample: str) -> str:
    """A name no other sample of the source has; in `00012.tar` of img2dataset its own, as `000120345`."""
    path, base = PurePosixPath(tar).with_suffix(""), PurePosixPath(sample).name
    return str(path.parent / base if base.startswith(path.name) else path / base)


def _sample_key(member: tarfile.TarInfo) -> str:
    folder, slash, base = member.name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def first_name(names: Iterable[str], candidates: tuple[str, ...]) -> str:
    """The first of `candidates` among `names`, or the empty string."""
    return next((name for name in candidates if name in names), "")


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _is_part_of_a_row(name: str, objects: list[Record]) -> bool:
    """Whether a list is a conversation or the captions of one row, and not a table of rows."""
    row_names = {*IMAGE_NAMES, *VIDEO_NAMES, *CHAT_NAMES}
    return name in {*CHAT_NAMES, *CAPTION_NAMES} and row_names.isdisjoint(objects[0])


def _is_good_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and value == printable(value)
