"""Which frames of a video are taken, told by their colour, from files of every common kind; and what is refused."""

import io
import struct
import sys

import numpy as np
import pytest
from PIL import Image

from openblip.config import UserError
from openblip.data import video
from openblip.data.image import BadImage, open_image
from openblip.data.video import BadVideo, Video, read_frames
from tests.data.videos import encode, greys, numbers

KINDS = [
    ("mp4", "libx264"),  # with frames stored in another order than they are shown
    ("mp4", "mpeg4"),
    ("webm", "libvpx-vp9"),  # does not say how many frames
    ("matroska", "libx264"),
    ("mpegts", "libx264"),  # begins at another time than 0
    ("avi", "mpeg4"),
    ("h264", "libx264"),  # no times, no length, no way to seek
]


def middles(count, frames):
    return [(2 * i + 1) * count // (2 * frames) for i in range(frames)]


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_the_middles_of_equal_spans_in_every_kind_of_file(kind):
    file = encode(greys(40), *kind)
    assert numbers(read_frames(file, 4)) == [5, 15, 25, 35]
    assert numbers(read_frames(file, 8)) == middles(40, 8)
    assert numbers(read_frames(file, 1)) == [20]
    assert {frame.mode for frame in read_frames(file, 3)} == {"RGB"} and read_frames(file, 1)[0].size == (
        64,
        48,
    )


def test_a_short_video_shows_frames_more_than_once():
    assert numbers(read_frames(encode(greys(3)), 6)) == [0, 0, 1, 1, 2, 2]
    assert numbers(read_frames(encode(greys(1)), 3)) == [0, 0, 0]


@pytest.mark.parametrize("kind", [("mp4", "libx264"), ("webm", "libvpx")], ids="-".join)
def test_time_counts_where_frames_are_not_equally_long(kind):
    """Of 2 seconds the first frame has 1, so it is what half of the picks show."""
    times = [0, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19]
    assert numbers(read_frames(encode(greys(11), *kind, times=times), 4)) == [0, 0, 3, 8]


def test_a_stream_that_knows_neither_its_length_nor_its_frames():
    """WebM as a browser records it: written once from start to end."""

    class Pipe(io.RawIOBase):
        def __init__(self):
            self.data = b""

        def writable(self):
            return True

        def write(self, data):
            self.data += bytes(data)
            return len(data)

    import av

    pipe = Pipe()
    with av.open(pipe, "w", format="webm") as out:
        stream = out.add_stream("libvpx", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for picture in greys(40):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())
    with av.open(io.BytesIO(pipe.data)) as made:
        assert made.duration is None and made.streams.video[0].frames == 0
    assert numbers(read_frames(pipe.data, 4)) == [5, 15, 25, 35]


@pytest.mark.parametrize("kind", [k for k in KINDS if k[0] != "h264"], ids="-".join)
def test_a_long_video_is_decoded_in_places(kind, monkeypatch):
    file = encode(greys(1000), *kind, keys=20)
    decoded, whole = [], video._decoded

    def spied(*given):
        for pair in whole(*given):
            decoded.append(pair[0])
            yield pair

    monkeypatch.setattr(video, "_decoded", spied)
    wanted = [6 * number % 256 // 6 for number in middles(1000, 3)]
    assert numbers(read_frames(file, 3)) == pytest.approx(wanted, abs=1)
    assert len(decoded) < 350, "not all the frames that come before"


def test_what_is_shown_is_taken_though_seeking_leads_too_far(monkeypatch):
    file = encode(greys(40), keys=5)
    scan = video._scan

    def shifted(container, stream):
        found = scan(container, stream)
        return video._Timeline(found.times, found.end, [(time, found.end) for time, _ in found.keys], False)

    monkeypatch.setattr(video, "_scan", shifted)
    assert numbers(read_frames(file, 4)) == [5, 15, 25, 35]


def test_pictures_are_turned_upright():
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:, 32:] = 255  # the right half is white
    file = bytearray(encode([picture] * 4))
    matrix = bytes(file).index(b"tkhd") + 44
    one = 1 << 16
    for turn, white in (
        ((0, one, -one, 0), "bottom"),
        ((0, -one, one, 0), "top"),
        ((-one, 0, 0, -one), "left"),
    ):
        a, b, c, d = turn
        file[matrix : matrix + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
        (frame,) = read_frames(bytes(file), 1)
        assert frame.size == ((64, 48) if white == "left" else (48, 64))
        middle = {"bottom": (24, 60), "top": (24, 4), "left": (4, 24)}[white]
        opposite = (frame.width - 1 - middle[0], frame.height - 1 - middle[1])
        assert frame.getpixel(middle)[0] > 240 and frame.getpixel(opposite)[0] < 15


def test_frames_given_one_by_one(tmp_path):
    for number, picture in enumerate(greys(12)):
        Image.fromarray(picture).save(tmp_path / f"frame{number}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    assert numbers(read_frames(tmp_path, 4)) == [1, 4, 7, 10], "frame2 comes before frame10"
    pictures = [Image.fromarray(picture) for picture in greys(3)]
    assert numbers(read_frames(pictures, 6)) == [0, 0, 1, 1, 2, 2]
    (tmp_path / "frame4.png").write_bytes(b"")
    assert numbers(read_frames(tmp_path, 1)) == [6], "only what is taken is opened"
    with pytest.raises(BadImage, match="empty"):
        read_frames(tmp_path, 4)


def test_a_path_bytes_and_what_can_be_read_are_the_same(tmp_path):
    data = encode(greys(10), sound=True)
    path = tmp_path / "a.mp4"
    path.write_bytes(data)
    for source in (path, str(path), data, io.BytesIO(data)):
        assert numbers(read_frames(source, 2)) == [2, 7]


def cut_at_the_end():
    """A file that says at its start how long it is, without its last half."""
    data = encode(greys(40), "matroska", "mpeg4")
    return data[: len(data) // 2]


def picture():
    """libav would read it, with one of the readers that are not asked."""
    file = io.BytesIO()
    Image.new("RGB", (64, 48)).save(file, "BMP")
    return file.getvalue()


def sound_alone():
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        audio = out.add_stream("aac", rate=8000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.sample_rate = 8000
        out.mux([*audio.encode(silence), *audio.encode()])
    return file.getvalue()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: b"", "empty"),
        (lambda: b"once upon a time, a text" * 100, "not_a_video"),
        (lambda: encode(greys(40))[:-200], "truncated"),  # the index is at the end
        (cut_at_the_end, "truncated"),
        (picture, "not_a_video"),
        (lambda: encode(greys(40), "webm", "libvpx")[:300], "damaged"),
        (sound_alone, "no_video"),
        (lambda: "nowhere.mp4", "missing"),
        (lambda: "https://example.org/a.mp4", "missing"),
        (lambda: "a\0b", "missing"),
        (lambda: [], "empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused(make, reason):
    with pytest.raises(BadVideo) as error:
        read_frames(make())
    assert error.value.reason == reason and str(error.value).startswith(f"bad video ({reason})")


def test_an_empty_folder_and_a_folder_that_is_none(tmp_path):
    with pytest.raises(BadVideo, match="no images in the folder"):
        read_frames(tmp_path)


def test_bytes_lost_in_the_middle():
    data = bytearray(encode(greys(40), "mp4", "mpeg4", keys=40))
    start = bytes(data).index(b"mdat") + 4
    data[start + 200 : start + 1200] = bytes(1000)
    with pytest.raises(BadVideo, match="damaged"):
        read_frames(bytes(data), 40)


def test_large_frames_are_refused_before_they_are_decoded(monkeypatch):
    file = encode(greys(4))
    assert len(read_frames(file, 2, max_pixels=64 * 48)) == 2
    monkeypatch.setattr(video, "_decoded", lambda *_: pytest.fail("decoded"))
    with pytest.raises(BadVideo, match="64 x 48 pixels; the limit is 3,071") as error:
        read_frames(file, 2, max_pixels=64 * 48 - 1)
    assert error.value.reason == "too_large"


def test_a_stream_that_grows_under_way_is_held_to_the_limit(monkeypatch):
    """The header has the first size; raw H.264 may go on with another."""
    file = encode(greys(4), "h264") + encode(greys(4, 640, 480), "h264")
    assert len(read_frames(file, 8)) == 8
    monkeypatch.setattr(video, "_upright", lambda frame, _: frame.width)
    with pytest.raises(BadVideo, match="damaged"):  # libav refuses the frame
        read_frames(file, 8, max_pixels=64 * 48)


def test_endless_videos_are_refused(monkeypatch):
    file = encode(greys(20), keys=20)
    monkeypatch.setattr(video, "MAX_DECODED", 12 * 64 * 48)
    assert len(read_frames(file, 1)) == 1
    with pytest.raises(BadVideo, match="too_long"):
        read_frames(file, 8)
    monkeypatch.setattr(video, "MAX_PACKETS", 10)
    with pytest.raises(BadVideo, match="more than 10 packets"):
        read_frames(file, 1)


def test_a_list_of_other_files_is_no_video(tmp_path):
    """A playlist could make this machine read or fetch whatever it names."""
    av = pytest.importorskip("av")
    (tmp_path / "secret.ts").write_bytes(encode(greys(10), "mpegts"))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{tmp_path}/secret.ts\n#EXT-X-ENDLIST\n"
    (tmp_path / "a.m3u8").write_text(playlist)
    with av.open(tmp_path / "a.m3u8") as opened:
        assert len(list(opened.decode(video=0))) == 10, "libav itself would read it"
    for source in (tmp_path / "a.m3u8", playlist.encode()):
        with pytest.raises(BadVideo, match="not_a_video"):
            read_frames(source)


def test_no_frames_asked_for_and_no_source():
    with pytest.raises(ValueError, match="at least 1"):
        read_frames(b"", 0)
    with pytest.raises(TypeError, match="wants a path"):
        read_frames(5)


def test_without_the_package_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"pip install 'openblip\[video\]'"):
        read_frames(b"something")


def test_where_a_picture_is_wanted_a_video_is_a_bad_one():
    with pytest.raises(BadImage, match="it is a video"):
        open_image(Video("a.mp4"))
