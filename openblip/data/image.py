"""The one door for image bytes nobody vouches for: every picture comes in through `open_image`.

The header is judged first; a pixel is decoded only when the size in the header is within the limits. What
comes out is plain 8-bit RGB, upright, without metadata; what cannot is a `BadImage` with a reason to be counted.
Pillow's process-wide switches (MAX_IMAGE_PIXELS, LOAD_TRUNCATED_IMAGES) and the warning filters stay as they
are, so any number of threads may decode at once.
"""

import io
import os
from typing import BinaryIO, NoReturn, Protocol

import numpy as np
from PIL import ExifTags, Image

from openblip.config import UserError

MAX_PIXELS = 100_000_000  # 300 MB as RGB; the largest photographs in web crawls have about half of it
MAX_ASPECT = 100  # long side / short side; wider than any panorama, narrower than tracking pixels and rulers
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")  # "JPEG" includes MPO, two in one file

_UPRIGHT = {  # EXIF orientation -> the operation that undoes it; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Readable(Protocol):
    """A file object, or anything else that hands over the bytes of one encoded image."""

    def read(self) -> bytes: ...


class BadImage(UserError):
    """An image that cannot be used.

    `reason` is one of a few stable words, for counting: `missing` (no such file), `unreadable` (the file system
    said no), `empty` (zero bytes), `not_an_image` (none of `FORMATS`), `too_large` (over `max_pixels`), `aspect`
    (over `MAX_ASPECT`), `truncated` (the end is missing), `damaged` (cannot be decoded), `mode` (pixels without
    an agreed meaning as a picture: float, CIELAB). `detail` is a sentence for people.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)  # both, so that the exception survives pickling between processes
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"bad image ({self.reason}): {self.detail}"


def open_image(
    source: str | os.PathLike[str] | bytes | Readable | Image.Image,
    *,
    max_pixels: int = MAX_PIXELS,
    draft_size: int | None = None,
) -> Image.Image:
    """Decode `source` to an upright 8-bit RGB image that shares nothing with it.

    EXIF orientation is applied; of an animation the first frame is taken; transparency is laid on white; of
    16-bit grey the high byte is kept, as Pillow does for 16-bit colour; CMYK is converted without a profile, and
    embedded profiles are ignored, as in the preprocessing that the published models were trained with.

    Args:
        source: a local path, the encoded bytes, an object whose `read()` gives them, or an image of Pillow, which
            is left as it was. A URL is not fetched: no data file shall make this machine call out.
        max_pixels: the most pixels (width x height in the header) that are decoded.
        draft_size: the side in pixels that the caller will scale or crop the short side to. A JPEG may then be
            decoded at 1/2, 1/4 or 1/8, never below twice this size: so the final 224 px image differs from that
            of a full decode by 0.6/255 on average (with once this size, by 2.5/255), in a third of the time.

    Raises:
        BadImage: for everything that is wrong with the image or with access to it.
    """
    if isinstance(source, Image.Image):
        return _decode(source, max_pixels, draft_size=None)
    try:
        with _access(source) as file:
            return _decode(_identify(file), max_pixels, draft_size)
    except BadImage as error:
        if isinstance(source, str | os.PathLike) and error.reason != "missing":  # which says so already
            raise BadImage(error.reason, f"{source!s}: {error.detail}") from error
        raise
    except FileNotFoundError as error:
        hint = "; only local paths are opened, a URL is not fetched" if "://" in str(source) else ""
        raise BadImage("missing", f"there is no file {source!s}{hint}") from error
    except OSError as error:
        raise BadImage("unreadable", f"{source!s}: {error.strerror or error}") from error


def _access(source: str | os.PathLike[str] | bytes | Readable) -> BinaryIO:
    """A seekable file. Of a path no more is read than the header, until that is found to be fine."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if isinstance(source, str | os.PathLike):
        try:
            return open(source, "rb")  # noqa: PTH123 (the caller closes it)
        except ValueError as error:
            raise BadImage("missing", f"{source!r} is no name of a file: {error}") from error
    if hasattr(source, "read"):
        return io.BytesIO(source.read())
    raise TypeError(f"open_image wants a path, bytes, a file or a PIL image, got {type(source).__name__}")


def _identify(file: BinaryIO) -> Image.Image:
    """The header, parsed; no pixel is decoded yet.

    This is what `Image.open(file, formats=FORMATS)` does, minus its own check of the size, which obeys a
    process-wide limit and speaks through `warnings`, which one thread alone cannot silence. Ours comes next.
    """
    prefix = file.read(16)
    if not prefix:
        raise BadImage("empty", "there are no bytes in it")
    Image.init()  # loads Pillow's decoders; does nothing from the second call on
    failure = None
    for name in FORMATS:
        factory, accept = Image.OPEN.get(name, (None, None))  # AVIF is absent from some builds of Pillow
        if factory is None or (accept is not None and accept(prefix) is not True):
            continue
        file.seek(0)
        try:
            return factory(file, "")
        except Exception as error:  # hostile bytes raise anything, and all of it means: this cannot be read
            failure = error
    if failure is not None:
        _refuse(failure)
    raise BadImage("not_an_image", f"begins with {prefix!r}, which is none of {', '.join(FORMATS)}")


def _decode(image: Image.Image, max_pixels: int, draft_size: int | None) -> Image.Image:
    """Judge the size, then decode: the order is the point."""
    width, height = image.size
    if width < 1 or height < 1:
        raise BadImage("damaged", f"the header says {width} x {height} pixels")
    if width * height > max_pixels:
        raise BadImage("too_large", f"{width} x {height} pixels; the limit is {max_pixels:,} (max_pixels)")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage("aspect", f"{width} x {height} pixels; one side is over {MAX_ASPECT} times the other")
    if draft_size is not None:
        image.draft(None, (2 * draft_size, 2 * draft_size))  # gives at least this; only JPEG can
    try:
        image.load()
    except Exception as error:  # as above
        _refuse(error)
    rgb = _to_rgb(image)
    operation = _UPRIGHT.get(_orientation(image))
    if operation is not None:
        rgb = rgb.transpose(operation)
    rgb.info = {}  # an orientation left behind would be applied once more by the next reader
    return rgb


def _to_rgb(image: Image.Image) -> Image.Image:
    """A new image in mode RGB, whatever the mode was."""
    if image.mode.startswith(
        "I"
    ):  # 16-bit; Pillow's own conversion would clip at 255. "I" is how it reads 16-bit PPM
        values = np.clip(np.asarray(image), 0, 0xFFFF)
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode in ("F", "LAB"):
        raise BadImage(
            "mode", f"pixels of mode {image.mode} have no agreed range as a picture; save as 8-bit RGB"
        )
    try:
        if not image.has_transparency_data:
            return image.convert("RGB")
        image = image.convert("RGBA")
        rgb = Image.new("RGB", image.size, "white")
        rgb.paste(image, mask=image.getchannel("A"))
        return rgb
    except ValueError as error:
        raise BadImage("mode", f"pixels of mode {image.mode} cannot be made RGB: {error}") from error


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; asked after decoding, because TIFF has undone its own by then."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a broken EXIF block does not make the pixels bad: upright is the best guess
        return 1


def _refuse(error: Exception) -> NoReturn:
    detail = f"{type(error).__name__}: {error}"
    if (
        isinstance(error, EOFError) or "truncated" in detail.lower()
    ):  # the one word all of Pillow's decoders use
        raise BadImage("truncated", detail) from error
    raise BadImage("damaged", detail) from error
