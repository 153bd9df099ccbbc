"""From a path to the files behind it: which there are, of what kind, in which splits.

Only the beginnings of files are read, to tell what they are.
"""

import hashlib
import re
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import PurePosixPath
from typing import Any

from openblip.config import UserError
from openblip.data.lines import IMAGE_SUFFIXES, csv_delimiter

DESCRIPTIONS = ("metadata.csv", "metadata.jsonl", "metadata.parquet", "captions.jsonl", "captions.csv")
DATA_SUFFIXES = frozenset({"csv", "tsv", "json", "jsonl", "ndjson", "parquet", "tar"})  # opened, in a folder
OWN_RECORD = "bad_rows.jsonl"  # what openblip itself leaves in a folder: no data
HEAD = 1 << 18  # bytes read to recognise a file
WANTED = (
    "a folder with metadata.csv, metadata.jsonl or captions.jsonl; a csv, jsonl, COCO json or parquet file; "
    "tars of webdataset"
)
_NOT_DATA = {
    "empty": "the file is empty",
    "packed": "the file is compressed; unpack it first, rows cannot be found in it by position",
    "text": "the first line is neither JSON nor a header with at least two columns",
    "binary": "it is neither parquet nor a tar nor text in UTF-8",
}
_SPLIT = re.compile(r"(train|training|val|valid|validation|dev|test)(?=$|[-_.\d])")


@dataclass(frozen=True)
class Group:
    """Files of one kind and one split. `base` is the folder that relative paths in them start from.

    `names` are relative to the source's root. Of kind images, the one url is a folder and `pictures` the
    names in it.
    """

    kind: str
    base: str
    urls: list[str]
    names: list[str]
    sizes: list[int]
    split: str | None = None
    pictures: tuple[str, ...] = ()


def find_files(path: str, *, by_name: bool = False) -> tuple[str, list[Group]]:
    """The source's root folder and its files, at least one group.

    by_name: a file that is called `.tar` or `.parquet` is taken for one without a look into it.

    Raises:
        UserError: nothing there, nothing known there, or it cannot be reached; the message says what was found.
    """
    try:
        return _find_files(path, by_name)
    except UserError:
        raise
    except Exception as error:  # each file system has its own for a network that fails
        if "://" not in path:
            raise
        raise UserError(f"{path}: cannot be reached: {error or type(error).__name__}") from error


def _find_files(path: str, by_name: bool) -> tuple[str, list[Group]]:
    import fsspec

    try:
        filesystem, root = fsspec.url_to_fs(path)
    except (ValueError, ImportError) as error:  # unknown protocol, or its package is not installed
        raise UserError(f"{path}: {error}") from error
    if filesystem.isfile(root):  # before isdir, which on the web takes anything with links in it for a folder
        entries = [filesystem.info(root)]
    elif filesystem.isdir(root):
        folder = _Folder(filesystem, root.rstrip("/"), by_name=by_name)
        groups = folder.groups() or folder.split_groups() or folder.picture_group()
        if not groups:
            raise UserError(f"{path}: {folder.contents()}; openblip reads {WANTED}")
        return folder.root_url, groups
    else:
        entries = _match(filesystem, path, root)
    names = [entry["name"] for entry in entries]
    common = _parent(names[0])
    while not all(name.startswith(common + "/") for name in names):
        common = _parent(common)
    folder = _Folder(filesystem, common, by_name=by_name)
    return folder.root_url, folder.grouped(entries)


def below(root: str, base: str) -> str:
    """What leads from folder `root` to folder `base` in it: `""`, or a path that ends in a slash."""
    return f"{base.removeprefix(root).strip('/')}/".lstrip("/")


def digest(url: str) -> str:
    """SHA-256 of a file's content."""
    import fsspec

    filesystem, path = fsspec.url_to_fs(url)
    with filesystem.open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sniff(head: bytes, suffix: str = "") -> str:
    """The kind of a file by its first bytes: parquet, tar, json, jsonl or csv, or a key of `_NOT_DATA`.

    `suffix` of its name decides where they do not: whether an object is a document or the first of many lines.
    """
    if not head.strip(b"\0"):
        return "empty"
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return "packed"
    try:
        tarfile.TarInfo.frombuf(head[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")  # verifies a checksum
        return "tar"
    except tarfile.HeaderError:
        pass  # then it may be text
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    line, _, rest = text.partition(b"\n")
    if text.startswith(b"["):
        return "json"
    if text.startswith(b"{") and suffix in ("jsonl", "ndjson"):
        return "json" if line.strip() == b"{" else "jsonl"  # "json" for what is clearly spread over lines
    if text.startswith(b"{"):  # a whole object on the first line and more to come: one object per line
        return "jsonl" if line.rstrip().endswith(b"}") and rest.strip() else "json"
    try:
        header = line.decode("utf-8")
    except UnicodeDecodeError:
        return "binary"
    if "\0" in header:
        return "binary"
    return "csv" if csv_delimiter(header) in header else "text"


@dataclass(frozen=True)
class _Folder:
    filesystem: Any  # fsspec.AbstractFileSystem
    path: str  # as the file system has it, without protocol
    root: str = ""  # the source's root; "": this folder
    by_name: bool = False

    @property
    def root_url(self) -> str:
        return self.url(self.root or self.path)

    def url(self, path: str) -> str:
        """A name of the file system as a path that opens: local ones stay plain."""
        from fsspec.implementations.local import LocalFileSystem

        local = isinstance(self.filesystem, LocalFileSystem)
        return path if local else self.filesystem.unstrip_protocol(path)

    def groups(self) -> list[Group]:
        """The data files of this folder itself, none if there are none."""
        described = [f"{self.path}/{name}" for name in DESCRIPTIONS]
        described = [
            path for path in described if self.filesystem.exists(path)
        ]  # no listing of a million images
        if len(described) > 1:
            raise UserError(f"{self.path}: {_listed(described)} are both here; name the one to read")
        if described:
            return self.grouped([self.filesystem.info(described[0])])
        entries = [
            entry
            for entry in self._list("file")
            if _suffix(entry["name"]) in DATA_SUFFIXES and not _is_own(entry["name"])
        ]
        kinds = {entry["name"]: self._kind(entry["name"]) for entry in entries}
        for wanted in (("tar",), ("parquet",), ("csv", "json", "jsonl")):  # img2dataset puts all side by side
            if chosen := [entry for entry in entries if kinds[entry["name"]] in wanted]:
                return self.grouped(chosen, by_split=True)
        if entries:
            self._refuse(entries[0]["name"], kinds[entries[0]["name"]])
        return []

    def split_groups(self) -> list[Group]:
        """The data files of the folders in this one, each a split unless its files are named as splits."""
        groups = []
        for entry in self._list("directory"):
            inside = _Folder(self.filesystem, entry["name"].rstrip("/"), self.path, self.by_name).groups()
            name = PurePosixPath(entry["name"]).name
            groups += [replace(group, split=group.split or name) for group in inside]
        return groups

    def picture_group(self) -> list[Group]:
        """All pictures in this folder and below."""
        found = self.filesystem.find(self.path, detail=True)
        names = sorted(name for name in found if _suffix(name) in IMAGE_SUFFIXES)
        if not names:
            return []
        pictures = tuple(name.removeprefix(self.path).lstrip("/") for name in names)
        size = sum(found[name]["size"] for name in names)
        return [Group("images", self.root_url, [self.root_url], ["images"], [size], pictures=pictures)]

    def grouped(self, entries: list[dict[str, Any]], by_split: bool = False) -> list[Group]:
        """Files as groups of one kind and folder.

        `by_split`: and of one split, if every name begins with the name of one. Several files always try that.
        """
        paths = [entry["name"] for entry in entries]
        kinds = [self._kind(path) for path in paths]
        for path, kind in zip(paths, kinds):
            if kind in _NOT_DATA:
                self._refuse(path, kind)
        splits = [_SPLIT.match(PurePosixPath(path).name) for path in paths]
        named = all(splits) and (by_split or len(paths) > 1)
        if not named and len(paths) > 1 and (len(set(kinds)) > 1 or kinds[0] not in ("tar", "parquet")):
            raise UserError(
                f"{self.path}: {_listed(paths)} are {len(paths)} different tables; name the one to read, or "
                "name them after their splits (train, val, test)"
            )
        groups: dict[tuple[str | None, str, str], list[int]] = {}
        for index, match in enumerate(splits):
            split = match[1] if named and match else None
            groups.setdefault((split, kinds[index], _parent(paths[index])), []).append(index)
        return [
            Group(
                kind,
                base=self.url(parent),
                urls=[self.url(paths[index]) for index in members],
                names=[paths[index].removeprefix(self.root or self.path).lstrip("/") for index in members],
                sizes=[entries[index]["size"] for index in members],
                split=split,
            )
            for (split, kind, parent), members in groups.items()
        ]

    def contents(self) -> str:
        """What is here, for a message."""
        names = [entry["name"] for entry in (*self._list("directory"), *self._list("file"))]
        return f"found {_listed(names)}" if names else "the folder is empty"

    def _list(self, kind: str) -> list[dict[str, Any]]:
        entries = self.filesystem.ls(self.path, detail=True)
        entries = [entry for entry in entries if not PurePosixPath(entry["name"]).name.startswith(".")]
        return sorted((entry for entry in entries if entry["type"] == kind), key=lambda entry: entry["name"])

    def _kind(self, path: str) -> str:
        if self.by_name and (suffix := _suffix(path)) in ("tar", "parquet"):
            return suffix
        with self.filesystem.open(path, "rb") as file:
            return sniff(file.read(HEAD), _suffix(path))

    def _refuse(self, path: str, kind: str) -> None:
        raise UserError(f"{path}: {_NOT_DATA[kind]}; openblip reads {WANTED}")


def _match(filesystem: Any, path: str, pattern: str) -> list[dict[str, Any]]:
    """The files of a pattern with `*`, `?`, `[...]`, `{a,b}` and `{000..123}`, in its order, each once."""
    found: dict[str, dict[str, Any]] = {}
    for one in expand_braces(pattern):
        matches = [one]
        if re.search(r"[*?\[]", one):
            matches = [name for name in sorted(filesystem.glob(one)) if not _is_own(name)]
        for name in matches:
            if not filesystem.isfile(name):
                in_pattern = f", which {path} asks for" if one != pattern else ""
                raise UserError(f"{name}: there is no such file or folder{in_pattern}")
            found[name] = filesystem.info(name)
    if not found:
        raise UserError(f"{path}: no file matches the pattern")
    return list(found.values())


def expand_braces(pattern: str) -> list[str]:
    """`x{00..02}` and `x{a,b}` written out, as a shell does; numbers keep their leading zeros."""
    pieces: list[list[str]] = []
    for text, brace in re.findall(r"([^{]*)(?:\{([^{}]*)\})?", pattern):
        pieces.append([text])
        if (numbers := re.fullmatch(r"(\d+)\.\.(\d+)", brace)) is not None:
            first, last = numbers.groups()
            pieces.append([f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)])
        elif brace:
            pieces.append(brace.split(","))
    return ["".join(choice) for choice in product(*pieces)]


def _parent(path: str) -> str:
    return path.rpartition("/")[0]  # pathlib would make one slash of the two in a URL


def _suffix(path: str) -> str:
    return PurePosixPath(path).suffix[1:].lower()


def _is_own(path: str) -> bool:
    return PurePosixPath(path).name == OWN_RECORD


def _listed(paths: Iterable[str]) -> str:
    """A few names of many."""
    names = [PurePosixPath(path).name for path in paths]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
