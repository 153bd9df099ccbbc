"""The one door for videos: `read_frames` takes a few of a video's frames, each upright and plain RGB, as a picture is.

    frames as shown    |  0  |  1  |     2     |  3  |  4  |  5  |
    4 equal spans      |         |          |          |         |
    their middles           0          2          3         5         what is shown then is taken

A video's packets are read once without decoding, which says when each frame is shown: containers often do not know
how many frames there are or for how long, and frames need not be equally long. Then the frames are decoded, from
the last place before them at which a decoder can begin. libav (by the package `av`) reads the formats; those that
are no video but a list of other files or addresses are not among them, so no file makes this machine call out.
"""

import io
import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from openblip.config import UserError
from openblip.data.image import MAX_PIXELS, BadImage, Readable, open_image

INSTALL = "pip install 'openblip[video]'"
FRAMES = 8  # of BLIP-3-Video (Ryoo et al. 2024)
MAX_PACKETS = 2_000_000  # of all streams: about seven hours with sound
MAX_DECODED = 200_000_000_000  # pixels decoded for one video: 100,000 frames of 1920 x 1080
FORMATS = (  # libav's names
    *("mov", "mp4", "matroska", "webm", "avi", "mpegts", "mpeg", "mpegvideo", "flv", "asf", "ogg"),
    *("m4v", "h264", "hevc", "ivf", "gif", "apng"),
)
SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mpg", ".mpeg", ".flv", ".wmv", ".ogv"}
)
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".avif")

Picture = str | os.PathLike[str] | bytes | Readable | Image.Image  # what `open_image` takes


class BadVideo(BadImage):
    """A video that cannot be used.

    `reason` is one of `missing`, `unreadable`, `empty` (zero bytes, or a folder without frames), `not_a_video` (none
    of `FORMATS`), `no_video` (sound alone), `no_decoder`, `no_frames`, `too_large` (frames over `max_pixels`),
    `too_long` (over `MAX_PACKETS`, or `MAX_DECODED` without a frame to begin with), `truncated` (the end is missing),
    `damaged`.
    """

    def __str__(self) -> str:
        return f"bad video ({self.reason}): {self.detail}"


@dataclass(frozen=True)
class Video:
    """A video where an image could stand in a row. `source` is what `read_frames` takes."""

    source: Picture | list[Any]

    def read(self) -> bytes:
        """Raises BadImage: `open_image` calls this where a picture is wanted."""
        raise BadImage("not_an_image", "it is a video, where a picture is wanted")


def as_video(source: Any) -> Video | None:
    """A video that is named where a picture could be: a `Video`, or a path that ends as videos do. None: a picture."""
    if isinstance(source, Video):
        return source
    is_path = isinstance(source, str | os.PathLike) and Path(source).suffix.lower() in SUFFIXES
    return Video(source) if is_path else None


@dataclass(frozen=True)
class _Timeline:
    """When the frames of a stream are shown, in its own units; where it does not say, their numbers."""

    times: list[int]  # in order
    end: int  # of the last frame
    keys: list[tuple[int, int]]  # (time, where to seek) of the frames that a decoder can begin with, in order
    is_counted: bool  # whether times are numbers


class _SoughtTooFar(Exception):
    """Seeking led behind the frame that was wanted."""


def read_frames(
    source: Picture | Sequence[Picture], frames: int = FRAMES, *, max_pixels: int = MAX_PIXELS
) -> list[Image.Image]:
    """`frames` RGB images out of a video, the first among the earliest.

    The time from the first frame to the end of the last is cut into `frames` equal spans; of each is taken what is
    shown at its middle. So a video with fewer frames repeats some, and one frame is taken from the middle. Videos
    without times, and frames given one by one, count as equally long.

    Rotation by quarter turns that the file asks for is applied, its mirroring and the shape of its pixels are not.

    Args:
        source: a local file, its bytes, an object whose `read()` gives them; or the frames: a list of what
            `open_image` takes, or a folder of images, in order of name (frame2 before frame10).
        max_pixels: the most pixels (width x height) of a frame that are decoded.

    Raises:
        BadImage: for everything that is wrong with the video (`BadVideo`), or with one of the frames given.
        UserError: the package av is not installed.
    """
    if frames < 1:
        raise ValueError(f"frames must be at least 1, got {frames}")
    if isinstance(source, str | os.PathLike) and os.path.isdir(source):  # noqa: PTH112 (bytes that are no name: False)
        source = _frames_in(Path(source))
    if isinstance(source, Sequence) and not isinstance(source, str | bytes):
        if not source:
            raise BadVideo("empty", "a list of no frames")
        picked = _middles(list(range(len(source))), len(source), frames)
        opened = {number: open_image(source[number], max_pixels=max_pixels) for number in set(picked)}
        return [opened[number] for number in picked]
    with _access(source) as file:
        with _opened(file, max_pixels) as (container, stream):
            timeline = _scan(container, stream)
        wanted = _middles(timeline.times, timeline.end, frames)
        try:
            found = _decode(file, timeline, sorted(set(wanted)), max_pixels, seek=not timeline.is_counted)
        except _SoughtTooFar:
            found = _decode(file, timeline, sorted(set(wanted)), max_pixels, seek=False)
    return [found[time] for time in wanted]


def _middles(times: list[int], end: int, frames: int) -> list[int]:
    """Of the times at which frames begin, those of the frames shown at the middles of `frames` equal spans."""
    start, length = times[0], end - times[0]
    middles = (start + (2 * number + 1) * length // (2 * frames) for number in range(frames))
    return [times[bisect_right(times, middle) - 1] for middle in middles]


def _frames_in(folder: Path) -> list[Picture]:
    """The images of a folder, in order of name; numbers in names count as numbers."""
    files = [file for file in folder.iterdir() if file.suffix.lower() in FRAME_SUFFIXES]
    if not files:
        raise BadVideo("empty", f"there are no images in the folder {folder}")
    return [*sorted(files, key=_by_number)]


def _by_number(file: Path) -> list[tuple[int, str]]:
    """Orders names as people do: longer numbers are larger."""
    return [(len(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", file.name)]


@contextmanager
def _access(source: Any) -> Iterator[BinaryIO]:
    """A seekable file of what is one video."""
    try:
        if isinstance(source, bytes):
            file: BinaryIO = io.BytesIO(source)
        elif isinstance(source, str | os.PathLike):
            file = open(source, "rb")  # noqa: PTH123, SIM115 (closed below)
        elif hasattr(source, "read"):
            file = io.BytesIO(source.read())
        else:
            raise TypeError(f"read_frames wants a path, bytes, a file or frames, got {type(source).__name__}")
    except FileNotFoundError as error:
        hint = "; only local paths are opened, a URL is not fetched" if "://" in str(source) else ""
        raise BadVideo("missing", f"there is no file {source!s}{hint}") from error
    except OSError as error:
        raise BadVideo("unreadable", f"{source!s}: {error.strerror or error}") from error
    except ValueError as error:
        raise BadVideo("missing", f"{source!r} is no name of a file: {error}") from error
    with file:
        yield file


@contextmanager
def _opened(file: BinaryIO, max_pixels: int) -> Iterator[tuple[Any, Any]]:
    """(container, its video stream), from the beginning. What libav finds wrong becomes a `BadVideo`."""
    av = _library()
    file.seek(0)
    head = file.read(16)
    if not head:
        raise BadVideo("empty", "there are no bytes in it")
    file.seek(0)
    # libav judges the size of each frame before it decodes it, for a stream can change it under way.
    limits = {
        "format_whitelist": ",".join(FORMATS), "protocol_whitelist": "none", "max_pixels": str(max_pixels)
    }  # fmt: skip
    try:
        container = av.open(file, options=limits, buffer_size=1 << 18, metadata_errors="replace")
    except av.error.FFmpegError as error:
        if head[4:8] == b"ftyp":
            detail = f"an MP4 whose index cannot be found, so its end must be missing: {error}"
            raise BadVideo("truncated", detail) from error
        if head.startswith((b"\x1aE\xdf\xa3", b"RIFF")):  # Matroska and WebM; AVI
            raise BadVideo("damaged", f"cut off, or damaged: {error}") from error
        raise BadVideo("not_a_video", f"begins with {head!r}, which no reader of videos takes") from error
    try:
        cover = av.stream.Disposition.attached_pic
        streams = [one for one in container.streams.video if not one.disposition & cover]
        if not streams:
            raise BadVideo("no_video", "there is no video in it, only sound, covers or subtitles")
        stream = streams[0]
        if stream.codec_context is None:
            raise BadVideo("no_decoder", "its video is of a kind that this libav cannot decode")
        if stream.width * stream.height > max_pixels:
            size = f"{stream.width} x {stream.height}"
            raise BadVideo("too_large", f"frames of {size} pixels; the limit is {max_pixels:,} (max_pixels)")
        stream.codec_context.options = {"max_pixels": str(max_pixels)}
        stream.codec_context.thread_count = 1  # the loader reads many videos at once
        yield container, stream
    except av.error.FFmpegError as error:
        raise BadVideo("damaged", f"{type(error).__name__}: {error}") from error
    finally:
        container.close()


def _scan(container: Any, stream: Any) -> _Timeline:
    """The timeline, from the packets alone."""
    shown: list[tuple[int, int]] = []  # when each frame begins and ends
    keys: list[tuple[int, int]] = []
    is_counted, seen, seconds = False, 0, 0.0
    for packet in container.demux():
        seen += 1
        if seen > MAX_PACKETS:
            raise BadVideo("too_long", f"more than {MAX_PACKETS:,} packets of data")
        start, length = packet.pts, packet.duration or 0
        if start is not None:
            seconds = max(seconds, float((start + length) * packet.time_base))
        if packet.stream is not stream or not packet.size or packet.is_discard:
            continue
        if start is None:
            is_counted = True
            start = len(shown)
        elif packet.is_keyframe:
            keys.append((start, start if packet.dts is None else min(packet.dts, start)))
        shown.append((start, start + length))
    _check_length(container, seconds)
    if not shown:
        raise BadVideo("no_frames", "there is not a single frame in it")
    if is_counted:
        return _Timeline(list(range(len(shown))), len(shown), [], True)
    times = sorted(start for start, _ in shown)
    end = max(end for _, end in shown)
    if end <= times[-1]:  # the last frame does not say how long it is: as long as the others
        end = times[-1] + max((times[-1] - times[0]) // max(len(times) - 1, 1), 1)
    return _Timeline(times, end, sorted(keys), False)


def _check_length(container: Any, seconds: float) -> None:
    """Refuse a file that ends long before the time which its header says; other formats only estimate that."""
    if container.duration is None or not {"mov", "matroska", "avi"} & set(container.format.name.split(",")):
        return
    said = (container.duration + max(container.start_time or 0, 0)) / 1_000_000
    if seconds < 0.95 * said and seconds < said - 0.5:
        raise BadVideo("truncated", f"it ends after {seconds:.1f} of {said:.1f} seconds")


def _decode(
    file: BinaryIO, timeline: _Timeline, wanted: list[int], max_pixels: int, *, seek: bool
) -> dict[int, Image.Image]:
    """The frames shown at the times wanted, which are in order."""
    found: dict[int, Image.Image] = {}
    with _opened(file, max_pixels) as (container, stream):
        coming = _decoded(container, stream, timeline)
        now, ahead = None, next(coming, None)  # what is shown, and what comes next: (time, frame)
        for due in wanted:
            key = bisect_right(timeline.keys, due, key=lambda pair: pair[0]) - 1
            place = ahead or now
            if seek and key > 0 and (place is None or timeline.keys[key][0] > place[0]):
                container.seek(timeline.keys[key][1], stream=stream)
                coming = _decoded(container, stream, timeline)
                now, ahead = None, next(coming, None)
                if ahead is None or ahead[0] > due:
                    raise _SoughtTooFar
            while ahead is not None and ahead[0] <= due:
                now, ahead = ahead, next(coming, None)
            picked = now or ahead  # what comes next: if the first frames cannot be decoded
            if picked is None:
                raise BadVideo("no_frames", "not a single frame of it can be decoded")
            found[due] = _upright(picked[1], max_pixels)
    return found


def _decoded(container: Any, stream: Any, timeline: _Timeline) -> Iterator[tuple[int, Any]]:
    """Frames with their times, from where the container stands."""
    pixels = 0
    for number, frame in enumerate(container.decode(stream)):
        pixels += frame.width * frame.height
        if pixels > MAX_DECODED:
            raise BadVideo("too_long", f"{number} frames after the last one that a decoder can begin with")
        if timeline.is_counted:
            yield number, frame
        elif frame.pts is not None:
            yield frame.pts, frame


def _upright(frame: Any, max_pixels: int) -> Image.Image:
    """A frame as an RGB image, turned as the file asks."""
    if frame.is_corrupt:
        raise BadVideo("damaged", f"the frame at {frame.time} seconds cannot be decoded whole")
    image = open_image(frame.to_image(), max_pixels=max_pixels)
    turn = {
        90: Image.Transpose.ROTATE_90,  # counter-clockwise, as libav counts too
        180: Image.Transpose.ROTATE_180,
        270: Image.Transpose.ROTATE_270,
    }.get(round(frame.rotation) % 360)
    return image if turn is None else image.transpose(turn)


def _library() -> Any:
    try:
        import av
    except ImportError:
        raise UserError(f"reading a video needs the package av: {INSTALL}") from None
    return av
