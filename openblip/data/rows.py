"""What one row of data is, whatever it was read from, and what becomes of rows that are not usable.

A source hands over records (dicts with the names people use: `file_name`, `caption`, `answers`, ...);
`RowReader` makes each a `Row` with one set of names, or raises `BadRow`. `BadRows` counts them, lists them,
and ends the run when they are too many.
"""

import json
import math
import os
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openblip.config import UserError
from openblip.data.image import BadImage, Readable
from openblip.data.video import Video

# The names under which people keep things; the first of each that has a value in a record is taken.
IMAGE_NAMES = (
    *("image", "images", "file_name", "image_path", "img_path", "image_file", "image_name", "image_bytes"),
    *("img", "picture", "filename", "filepath", "jpg", "jpeg", "png", "webp", "file", "path"),
)
PAIR_NAMES = (("left_image", "right_image"), ("left", "right"), ("image0", "image1"), ("image_0", "image_1"))
VIDEO_NAMES = ("video", "video_path", "video_file")
CAPTION_NAMES = (
    *("captions", "caption", "texts", "text", "sentences", "sentence", "raw_caption", "alt_text", "alt"),
    *("comment", "description", "title"),
)
QUESTION_NAMES = ("question",)
ANSWER_NAMES = ("answers", "answer")
ID_NAMES = ("image_id", "img_id", "cocoid", "key")
ROW_ID_NAMES = ("id", "uid")  # in a row with a question or a conversation these name it
CHAT_NAMES = frozenset({"conversations", "messages", "chosen"})  # a row with one of these is a conversation


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes `start` to `stop` (None: to the end) of a local or remote file, read when asked for.

    A member of a tar costs one open, one seek and one read; on object storage, one range request.
    """

    url: str
    start: int = 0
    stop: int | None = None

    def __str__(self) -> str:
        return self.url if self.stop is None else f"bytes {self.start} to {self.stop} of {self.url}"

    def read(self) -> bytes:
        """The bytes; an OSError of the file system comes through."""
        import fsspec

        filesystem, path = fsspec.url_to_fs(self.url)
        return filesystem.cat_file(path, self.start, self.stop)


# A local path, encoded bytes, or where they are; a video of such.
Reference = str | bytes | ByteRange | Video | Readable


@dataclass(slots=True)
class Row:
    """One row. Which fields are filled depends on the task the data was made for.

    `id` names the picture, not the row: rows with equal ids show the same picture (the questions of VQA), and
    the objectives rely on it. `images` has two entries for NLVR2, any number for conversations and documents, else
    one; a `Video` stands where an image could. `label` is as it was read. `where` is for error messages. `extra` holds
    every other column, unchanged; of an interleaved document "document", its texts in order with None where the next
    of `images` stands.
    """

    id: str
    images: list[Reference]
    captions: list[str]
    question: str | None = None
    answers: list[str] = field(default_factory=list)
    label: Any = None
    split: str | None = None
    where: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def image(self) -> Reference:
        """The first image. Raises BadRow: a conversation or document of text alone."""
        if not self.images:
            raise BadRow("missing_image", self.where, "the row is of text alone")
        return self.images[0]


class BadRow(UserError):
    """A row that cannot be used.

    `reason`, for counting, is one of: `missing_image`, `missing_caption`, `missing_question`, `missing_answer`,
    `missing_instruction`, `missing_output`, `bad_label` (neither true nor false), `not_utf8`, `not_text`,
    `not_json`, `remote_image` (a URL elsewhere than the source itself), `columns` (more cells than the header
    has, or a quote that is not closed), `unknown_image` (a caption of an image the file does not list),
    `truncated_tar`, `no_features` (the picture was bad when its features were computed), or one of `BadImage`;
    of conversations `missing_messages`,
    `unknown_role`, `role_order` (turns do not alternate), `unknown_part`, `image_count` (not as many images as
    markers), `too_many_images`, `too_long` (no room for anything to learn), `no_preference` (both answers are the
    same), `video` (the model reads none), or one of `BadChat` or `BadVideo`. `where` names file and line; `detail` is
    a sentence for people.
    """

    def __init__(self, reason: str, where: str, detail: str) -> None:
        super().__init__(reason, where, detail)  # all three, to survive pickling between processes
        self.reason = reason
        self.where = where
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.where}: {self.detail} ({self.reason})"


class BadRows:
    """The bad rows of a run: counted by reason, appended to a file, and an error when they are too many.

        for row in source.rows(bad):
            with bad.skipping(row.where):
                use(row, open_image(row.image))

    Each meeting is counted and listed: a row that is bad in two epochs counts twice, as it was seen twice.

    Args:
        path: a JSON-lines file, appended to; None only counts.
        max_share: the share of bad rows among those seen that is still accepted.
        min_seen: below this many rows seen nothing is judged.
    """

    def __init__(self, path: Path | None = None, max_share: float = 0.1, min_seen: int = 100) -> None:
        if not 0 <= max_share <= 1:
            raise UserError(f"max_share is a share between 0 and 1, got {max_share}")
        self.path = path
        self.max_share = max_share
        self.min_seen = min_seen
        self.seen = 0
        self.counts: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """How many bad rows were met."""
        return self.counts.total()

    def saw(self, count: int = 1) -> None:
        """Count rows looked at, good or bad; the share of bad ones is judged by it."""
        self.seen += count

    def add(self, reason: str, where: str, detail: str) -> None:
        """Count and list one bad row.

        Raises:
            UserError: more than `max_share` of at least `min_seen` rows seen are bad.
        """
        self.counts[reason] += 1
        if self.path is not None:  # opened for each: rare, complete after a crash, and nothing open to pickle
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"reason": reason, "where": where, "detail": detail}) + "\n")
        if self.seen >= self.min_seen and self.total > self.max_share * self.seen:
            listed = f"; all are listed in {self.path}" if self.path is not None else ""
            raise UserError(
                f"{self.total} of {self.seen} rows are bad ({self.summary()}), more than the share of "
                f"{self.max_share:g} that max_share allows; the last is {where}: {detail}{listed}"
            )

    def summary(self) -> str:
        """`"missing_image 3, truncated 1"`, most frequent first."""
        return ", ".join(f"{reason} {count}" for reason, count in self.counts.most_common())

    @contextmanager
    def skipping(self, where: str = "") -> Iterator[None]:
        """A block that `BadRow` and `BadImage` end, recorded; any other exception passes through."""
        try:
            yield
        except BadRow as error:
            self.add(error.reason, error.where, error.detail)
        except BadImage as error:
            self.add(error.reason, where, error.detail)


@dataclass(frozen=True)
class RowReader:
    """Records to rows.

    Args:
        base: the folder, local or a URL, that relative image paths start from.
        prefix: put before file names in ids; what leads from the source's root to `base`, such as `"val/"`.
        image_column, caption_column: the only names looked at, if given.
        require_captions: a row needs a caption, a question, a conversation or a document.
    """

    base: str
    prefix: str = ""
    image_column: str | None = None
    caption_column: str | None = None
    require_captions: bool = True

    def row(self, record: Mapping[str, Any], where: str, default_id: str, split: str | None) -> Row:
        """One row.

        Args:
            record: names to values. An image is a path, bytes, a `ByteRange`, Hugging Face's
                {"bytes", "path"}, or a list of these; captions and answers are text or a list of texts. The images
                of a conversation may stand in its messages, those of a document at their places. A video
                comes after a row's images; a list is one of its frames.
            where: file and line, for messages.
            default_id: the id if no column has one and the image has no file name.
            split: the split of the whole file; None if a column may say.

        Raises:
            BadRow: see there.
        """
        rest = {name: value for name, value in record.items() if not _is_blank(value)}
        if is_document(rest):
            return self._document(rest, where, default_id, split)
        is_chat = not CHAT_NAMES.isdisjoint(record)
        values = (message_images(rest) if is_chat else []) or self._take_images(rest)
        if is_chat and values == [None]:
            values = []
        elif not values or any(_is_blank(value) for value in values):
            raise BadRow("missing_image", where, f"no image; the row has {_names(record)}")
        images = [self._locate(value, where) for value in values]
        names = (self.caption_column,) if self.caption_column else CAPTION_NAMES
        captions = _texts(_take(rest, names), where)
        question = " ".join(_texts(_take(rest, QUESTION_NAMES), where)) or None
        if self.require_captions and not captions and question is None and not is_chat:
            raise BadRow("missing_caption", where, f"no caption; the row has {_names(record)}")
        row_id = _take(rest, ID_NAMES if question or is_chat else ID_NAMES + ROW_ID_NAMES)
        if row_id is None:
            named = (value.source if isinstance(value, Video) else value for value in values)
            paths = [self.prefix + value for value in named if isinstance(value, str)]
            row_id = "|".join(paths) or default_id
        split = split if split is not None else _take(rest, ("split",))
        return Row(
            id=printable(str(row_id)),
            images=images,
            captions=captions,
            question=question,
            answers=_texts(_take(rest, ANSWER_NAMES), where, numbers=True),
            label=_take(rest, ("label",)),
            split=None if split is None else str(split),
            where=where,
            extra=rest,
        )

    def _document(self, rest: dict[str, Any], where: str, default_id: str, split: str | None) -> Row:
        """An interleaved document. What cannot be an image is kept: opening it fails, and it alone is left out."""
        parts: list[Any] = []
        images: list[Reference] = []
        for text, image in zip(rest.pop("texts"), rest.pop("images"), strict=True):
            if image is not None:
                parts.append(None)
                images.append(self._locate_if_possible(_embedded(image), where))
            if not _is_blank(text):
                parts.append(text)
        row_id = _take(rest, ID_NAMES)
        split = split if split is not None else _take(rest, ("split",))
        return Row(
            id=printable(str(row_id if row_id is not None else default_id)),
            images=images,
            captions=[],
            split=None if split is None else str(split),
            where=where,
            extra={**rest, "document": parts},
        )

    def _locate_if_possible(self, value: Any, where: str) -> Reference:
        try:
            return self._locate(value, where)
        except BadRow:
            return str(value)

    def _take_images(self, rest: dict[str, Any]) -> list[Any]:
        """The image values of a record, removed from it: two for a pair, several for a list; then its video."""
        if self.image_column is None:
            for left, right in PAIR_NAMES:
                if left in rest and right in rest:
                    return [_embedded(rest.pop(left)), _embedded(rest.pop(right))]
        video = None if self.image_column else _take(rest, VIDEO_NAMES)
        names = IMAGE_NAMES if video is None else IMAGE_NAMES[:2]  # `path` and the like: they are the video's
        value = _take(rest, (self.image_column,) if self.image_column else names)
        images = [_embedded(item) for item in (value if isinstance(value, list) else [value])]
        if video is None:
            return images
        return [*(images if value is not None else []), _video(video)]

    def _locate(self, value: Any, where: str) -> Reference:
        if isinstance(value, bytes | ByteRange):
            return value
        if isinstance(value, Video):
            source = value.source
            frames = [self._locate(one, where) for one in source] if isinstance(source, list) else None
            return Video(self._locate(source, where) if frames is None else frames)
        if not isinstance(value, str):
            raise BadRow("missing_image", where, f"an image is a path or bytes, got {type(value).__name__}")
        protocol, separator, folder = self.base.rpartition("://")
        if "://" not in value and not separator:
            return os.path.join(self.base, value)  # noqa: PTH118 (as it is written)
        if "://" not in value:  # object storage takes ".." for a name
            return ByteRange(f"{protocol}://{posixpath.normpath(f'{folder}/{value}')}")
        origin = "/".join(self.base.split("/")[:3])  # protocol and host, or bucket
        if separator and value.startswith(origin.rstrip("/") + "/"):
            return ByteRange(value)
        raise BadRow(
            "remote_image", where, f"{value} is a URL and not fetched; img2dataset makes tars of URLs"
        )


def printable(text: str) -> str:
    """`text` as valid Unicode: bytes of a file name that are not UTF-8 become escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def is_document(record: Mapping[str, Any]) -> bool:
    """Whether `texts` and `images` are parallel lists in which one is None where the other stands (OBELICS)."""
    texts, images = record.get("texts"), record.get("images")
    if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
        return False
    return any(item is None for item in [*texts, *images])


def is_image_part(part: Any) -> bool:
    """Whether a part of a message's content is an image, or a video."""
    return isinstance(part, Mapping) and part.get("type") in ("image", "image_url", "video", "video_url")


def message_images(record: Mapping[str, Any]) -> list[Any]:
    """The images that the parts of messages bring, in order; none if the parts only say where images stand."""
    found = []
    for name in ("conversations", "messages", "prompt", "chosen"):
        messages = record.get(name)
        for message in messages if isinstance(messages, list) else []:
            content = message.get("content") if isinstance(message, Mapping) else None
            for part in content if isinstance(content, list) else []:
                if is_image_part(part):
                    values = [
                        part.get(key) for key in ("image", "video", "path", "url", "image_url", "video_url")
                    ]
                    value = next((value for value in values if not _is_blank(value)), None)
                    value = value.get("url") if isinstance(value, dict) and "url" in value else value
                    found.append(_video(value) if part["type"].startswith("video") and value else value)
        if found:  # a `chosen` that repeats the prompt repeats its images
            break
    return [] if all(value is None for value in found) else [_embedded(value) for value in found]


def _embedded(value: Any) -> Any:
    """Hugging Face's image struct to its bytes, or else its path."""
    return (value.get("bytes") or value.get("path")) if isinstance(value, dict) else value


def _video(value: Any) -> Video:
    return Video([_embedded(one) for one in value] if isinstance(value, list) else _embedded(value))


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str | bytes | list | dict) and not value)


def _take(rest: dict[str, Any], names: Iterable[str]) -> Any:
    """Remove and return the first of `names` that is there."""
    return next((rest.pop(name) for name in names if name in rest), None)


def _names(record: Mapping[str, Any]) -> str:
    return ", ".join(sorted(record)) or "no columns"


def _texts(value: Any, where: str, numbers: bool = False) -> list[str]:
    """The texts in a text, a list of texts, or the dicts of VQA's and Karpathy's files; blanks left out."""
    texts = []
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, dict):
            item = next((item[name] for name in ("raw", "caption", "answer", "text") if name in item), None)
        if item is None or (isinstance(item, float) and math.isnan(item)):
            continue
        if numbers and isinstance(item, int | float):
            item = str(item)
        if item := read_text(item, where):
            texts.append(item)
    return texts


def read_text(item: Any, where: str) -> str:
    """A text, stripped. Raises BadRow: it is none, or not UTF-8."""
    try:
        if isinstance(item, bytes):
            return item.decode("utf-8").strip()
        if isinstance(item, str):
            item.encode("utf-8")  # refuses lone surrogates, which no tokenizer and no file would take
            return item.strip()
    except UnicodeError as error:
        raise BadRow("not_utf8", where, f"text is not UTF-8: {error}") from error
    raise BadRow("not_text", where, f"a text is wanted, got {type(item).__name__}: {str(item)[:80]}")
