"""`open_image`: what is let in comes out as upright RGB, what is not says why, and nothing else changes."""

import io
import pickle
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from openblip.config import UserError
from openblip.data.image import BadImage, open_image

LOSSLESS = [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("PPM", {}), ("WEBP", {"lossless": True})]
ALL_FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]


def pixels(width: int = 24, height: int = 16) -> np.ndarray:
    """A smooth picture without symmetry, [H, W, 3] uint8."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 / width, y * 255 / height, (x * y) % 256], -1).astype(np.uint8)


def encode(image: Image.Image, format_: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


def png(width: int, height: int, depth: int, colour: int, data: bytes = b"") -> bytes:
    """A PNG by hand, for what Pillow does not write: any size in the header, 16-bit colour."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )


def reason(source, **options) -> str:
    with pytest.raises(BadImage) as caught:
        open_image(source, **options)
    return caught.value.reason


@pytest.mark.parametrize(("format_", "options"), LOSSLESS)
def test_lossless_formats_keep_every_pixel(format_, options):
    image = open_image(encode(Image.fromarray(pixels()), format_, **options))
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), pixels())


def test_path_bytes_file_and_pil_image_are_the_same_picture(tmp_path):
    data = encode(Image.fromarray(pixels()), "PNG")
    path = tmp_path / "a.txt"  # the content decides
    path.write_bytes(data)
    for source in (path, str(path), data, io.BytesIO(data), Image.fromarray(pixels()), Image.open(path)):
        assert np.array_equal(np.asarray(open_image(source)), pixels())


def test_the_result_shares_nothing_with_an_image_given():
    given_ = Image.fromarray(pixels())
    open_image(given_).paste((0, 0, 0), (0, 0, 24, 16))
    assert np.array_equal(np.asarray(given_), pixels())


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(format_, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(pixels()), format_, exif=exif)
    stored = Image.open(io.BytesIO(data))
    expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    image = open_image(data)
    assert np.array_equal(np.asarray(image), expected)
    assert np.array_equal(np.asarray(open_image(image)), expected), "turned again by the second reader"


def test_a_broken_exif_block_does_not_cost_the_picture():
    data = encode(Image.fromarray(pixels()), "JPEG", exif=b"Exif\0\0MM\0\x2a\0\0\0\xff\xff")
    assert open_image(data).size == (24, 16)


def test_palette_and_its_transparency():
    image = Image.fromarray(pixels()).quantize(16)
    expected = np.array(image.convert("RGB"))
    assert np.array_equal(np.asarray(open_image(encode(image, "PNG"))), expected)
    expected[np.asarray(image) == 3] = 255
    assert np.array_equal(np.asarray(open_image(encode(image, "PNG", transparency=3))), expected)


def test_alpha_is_laid_on_white():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = (0, 128, 255)  # black: unseen, half seen, seen
    for data in (encode(Image.fromarray(rgba), "PNG"), encode(Image.fromarray(rgba).convert("LA"), "PNG")):
        assert np.asarray(open_image(data))[0].tolist() == [[255] * 3, [127] * 3, [0] * 3]


def test_grey_with_one_transparent_value():
    image = Image.fromarray(np.array([[7, 8]], np.uint8))
    assert np.asarray(open_image(encode(image, "PNG", transparency=7)))[0].tolist() == [[255] * 3, [8] * 3]


def test_bilevel_and_cmyk():
    assert np.asarray(open_image(encode(Image.new("1", (2, 2), 1), "PNG"))).min() == 255
    cmyk = open_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert np.abs(np.asarray(cmyk).astype(int) - (255, 0, 0)).max() <= 4  # red, up to the loss of JPEG


@pytest.mark.parametrize("format_", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_keeps_its_high_byte(format_):
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    image = open_image(encode(Image.fromarray(values), format_))
    assert np.array_equal(np.asarray(image)[..., 0], values >> 8)


def test_16_bit_colour():
    row = struct.pack(">6H", 0, 256, 32768, 65535, 255, 4096)  # two pixels
    image = open_image(png(2, 1, depth=16, colour=2, data=b"\0" + row))
    assert np.asarray(image)[0].tolist() == [[0, 1, 128], [255, 0, 16]]


@pytest.mark.parametrize("format_", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame(format_):
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if format_ == "WEBP" else {}
    data = encode(frames[0], format_, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.asarray(open_image(data))[4, 4].tolist() == [255, 0, 0]


def test_of_a_stereo_jpeg_the_first_picture():
    data = encode(
        Image.new("RGB", (64, 64), "red"), "MPO", save_all=True, append_images=[Image.new("RGB", (64, 64))]
    )
    assert np.asarray(open_image(data, draft_size=8))[4, 4].tolist() == [254, 0, 0]


@pytest.mark.parametrize(("mode", "format_"), [("F", "TIFF"), ("LAB", "TIFF")])
def test_pixels_without_an_agreed_meaning_are_refused(mode, format_):
    assert reason(encode(Image.new(mode, (4, 4)), format_)) == "mode"


# --- draft ---


@given(width=st.integers(1, 400), height=st.integers(1, 400), size=st.integers(1, 120), turned=st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_draft_keeps_twice_the_target_or_everything(width, height, size, turned):
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1
    if max(width, height) > 100 * min(width, height):
        return
    image = open_image(encode(Image.new("RGB", (width, height)), "JPEG", exif=exif), draft_size=size)
    full = (height, width) if turned else (width, height)
    assert image.size == full or min(image.size) >= 2 * size
    assert min(image.size) <= 4 * size or image.size == full or min(full) >= 16 * size  # 1/8 is the smallest


def test_a_draft_looks_like_the_whole_picture():
    data = encode(Image.fromarray(pixels(1200, 900)), "JPEG", quality=95)
    draft, full = open_image(data, draft_size=100), open_image(data)
    assert draft.size == (300, 225)
    assert full.size == (1200, 900)
    small = [np.asarray(image.resize((100, 100), Image.Resampling.BICUBIC), float) for image in (draft, full)]
    assert np.abs(small[0] - small[1]).mean() < 2


# --- what is refused ---


def test_a_png_bomb_is_refused_by_its_header(monkeypatch):
    def load(*_):
        raise AssertionError("the bomb was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    bomb = png(40_000, 40_000, depth=8, colour=2, data=bytes(1000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reason(bomb) == "too_large"
        assert reason(io.BytesIO(bomb)) == "too_large"
        assert reason(png(11_000, 11_000, depth=8, colour=2)) == "too_large"  # where Pillow would only warn


def test_the_limit_is_the_callers():
    data = encode(Image.fromarray(pixels(20, 10)), "PNG")
    assert open_image(data, max_pixels=200).size == (20, 10)
    assert reason(data, max_pixels=199) == "too_large"
    assert reason(Image.fromarray(pixels(20, 10)), max_pixels=199) == "too_large"


def test_the_process_wide_limit_of_pillow_neither_helps_nor_hinders(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert open_image(encode(Image.fromarray(pixels()), "PNG")).size == (24, 16)


@pytest.mark.parametrize("size", [(1, 65_535), (65_535, 1), (1, 101), (101, 1)])
def test_strips_are_refused(size):
    assert reason(encode(Image.new("RGB", size), "PNG")) == "aspect"


def test_the_longest_strip_that_is_not_refused():
    assert open_image(encode(Image.new("RGB", (1, 100)), "PNG")).size == (1, 100)


@pytest.mark.parametrize("format_", ALL_FORMATS)
def test_every_cut_file_is_refused(format_):
    data = encode(Image.fromarray(pixels(64, 48)), format_)
    cuts = {1, 4, 11, 20, len(data) // 3, len(data) // 2, len(data) * 9 // 10}
    reasons = {cut: reason(data[:cut]) for cut in cuts}
    assert set(reasons.values()) <= {"truncated", "damaged", "not_an_image"}
    assert reasons[len(data) // 2] == (
        "damaged" if format_ == "WEBP" else "truncated"
    )  # libwebp does not say


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty"),
        (b"\0" * 100, "not_an_image"),
        (b"<!DOCTYPE html><title>404</title>", "not_an_image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not_an_image"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "not_an_image",
        ),  # Pillow would start Ghostscript
        (b"\xff\xd8\xff\xe0" + b"\0" * 50, "damaged"),
    ],
)
def test_what_is_no_image_says_so(data, expected):
    assert reason(data) == expected


def test_access_errors_are_reasons_too(tmp_path):
    assert reason(tmp_path / "none.jpg") == "missing"
    assert reason(tmp_path) == "unreadable"
    assert reason("a\0b.jpg") == "missing"
    with pytest.raises(BadImage, match="a URL is not fetched"):
        open_image("http://example.com/a.jpg")
    with pytest.raises(TypeError, match="NoneType"):
        open_image(None)


def test_bad_image_is_a_user_error_and_survives_pickling():
    with pytest.raises(UserError, match=r"bad image \(empty\)") as caught:
        open_image(b"")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (type(copy), copy.reason, copy.detail) == (BadImage, "empty", caught.value.detail)


FUZZED = {name: encode(Image.fromarray(pixels()), name) for name in ALL_FORMATS}


@given(
    name=st.sampled_from(ALL_FORMATS),
    changes=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8
    ),
    draft_size=st.sampled_from([None, 4]),
)
@settings(max_examples=300, deadline=None)
def test_any_damage_gives_a_picture_or_a_reason(name, changes, draft_size):
    data = bytearray(FUZZED[name])
    for position, value in changes:
        data[int(position * len(data))] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libtiff and EXIF comment on what they see
        try:
            image = open_image(bytes(data), max_pixels=1_000_000, draft_size=draft_size)
        except BadImage as error:
            assert error.reason in {"truncated", "damaged", "not_an_image", "too_large", "aspect", "mode"}
        else:
            assert image.mode == "RGB"
            assert image.size[0] * image.size[1] <= 1_000_000


def test_nothing_in_the_process_is_changed_by_threads_of_good_and_bad_images():
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    good, bomb = FUZZED["JPEG"], png(40_000, 40_000, depth=8, colour=2)

    def attempt(data: bytes) -> str:
        try:
            return open_image(data).mode
        except BadImage as error:
            return error.reason

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(attempt, [good, bomb, good[:99]] * 30)) == ["RGB", "too_large", "truncated"] * 30
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)) == before
