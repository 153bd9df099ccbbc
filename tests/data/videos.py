"""Small real videos, made by the encoders that come with av, whose grey tells when a frame is shown."""

import io
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
from PIL import Image

STEP = 6  # grey values from one frame to the next


def encode(
    pictures: Sequence[np.ndarray],
    container: str = "mp4",
    codec: str = "libx264",
    times: Sequence[int] | None = None,
    keys: int = 10,
    sound: bool = False,
) -> bytes:
    """Pictures [H, W, 3] uint8 as a video of 10 frames a second, or shown at `times`, in tenths of a second."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=10)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        stream.gop_size, stream.bit_rate = keys, 4_000_000  # enough to tell frames apart
        stream.codec_context.time_base = Fraction(1, 10)
        audio = out.add_stream("aac", rate=8000, layout="mono") if sound else None
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number if times is None else times[number]
            frame.time_base = Fraction(1, 10)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
        if audio is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            silence.sample_rate = 8000
            out.mux([*audio.encode(silence), *audio.encode()])
    return file.getvalue()


def greys(count: int, width: int = 64, height: int = 48) -> list[np.ndarray]:
    """Frame i is all of grey STEP · i."""
    return [np.full((height, width, 3), STEP * i % 256, np.uint8) for i in range(count)]


def numbers(frames: Sequence[Image.Image]) -> list[int]:
    """Which frames of `greys` these are."""
    return [round(np.asarray(frame)[20, 20].mean() / STEP) for frame in frames]
