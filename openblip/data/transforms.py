"""PIL images to tensors: the evaluation transform of BLIP and CLIP, and the paper's training augmentation.

Random numbers come from the numpy Generator that is passed in and from nowhere else: an augmented picture
is a pure function of picture and generator. Pixels stay in PIL and numpy to the end, because both keep to
the thread they are called on, and the loader has many.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from openblip.config import ConfigError

T = TypeVar("T")

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's; BLIP and BLIP-2 took them over
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FILL = (128, 128, 128)  # what a warped picture shows where there is no picture

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class ImageTransform:
    """What a picture goes through when nothing is random: resize, take the centre, scale to [0, 1], normalise.

    resize: "squash" scales both sides to `resize_size`, whatever the aspect ratio (BLIP); "crop" scales the short
        side to it (CLIP).
    resize_size: in pixels; None: `image_size`, and of a squashed picture the centre is all of it. DINOv2 scales to
        256 and takes 224. What the centre has beyond the picture is black.
    """

    image_size: int = 224
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    resize: Literal["squash", "crop"] = "squash"
    interpolation: Interpolation = "bicubic"
    resize_size: int | None = None

    def __post_init__(self) -> None:
        _check(self.image_size, self.std, self.interpolation)
        if self.resize not in ("squash", "crop"):
            raise ConfigError(f'resize must be "squash" or "crop", got {self.resize!r}')
        if self.draft_size < 1:
            raise ConfigError(f"resize_size must be positive, got {self.resize_size}")

    @property
    def draft_size(self) -> int:
        """The `draft_size` for `open_image`."""
        return self.image_size if self.resize_size is None else self.resize_size

    def at(self, image_size: int) -> "ImageTransform":
        """The same for another image size; what is cut off stays in proportion."""
        size = None if self.resize_size is None else round(self.resize_size * image_size / self.image_size)
        return replace(self, image_size=image_size, resize_size=size)

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> Tensor:
        """An RGB image -> float32 [3, S, S]. `rng` is ignored: both transforms are called alike."""
        size, width, height = self.draft_size, *image.size
        if self.resize == "squash":
            width = height = size
        else:
            short = min(width, height)
            # Down, as transformers rounds.
            width, height = int(size * width / short), int(size * height / short)
        image = image.resize((width, height), _RESAMPLING[self.interpolation])
        if (width, height) != (self.image_size, self.image_size):
            left, top = (width - self.image_size) // 2, (height - self.image_size) // 2
            image = image.crop((left, top, left + self.image_size, top + self.image_size))
        return _to_tensor(image, self.mean, self.std)


@dataclass(frozen=True)
class TrainTransform:
    """BLIP's training augmentation: random resized crop, horizontal flip, RandomAugment, normalise.

    scale: share of the picture's area that a crop has, (0.2, 1) in pre-training and (0.5, 1) in fine-tuning.
    randaugment: off for BLIP-2, which only crops and flips.
    num_ops, magnitude: N and M of RandomAugment; magnitude goes from 0 to 10.
    """

    image_size: int = 224
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    randaugment: bool = True
    num_ops: int = 2
    magnitude: float = 5
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        _check(self.image_size, self.std, self.interpolation)
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError(f"scale must be two growing shares above 0 and up to 1, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ConfigError(f"ratio must be two growing positive numbers, got {self.ratio}")
        if self.num_ops < 0 or not 0 <= self.magnitude <= 10:
            raise ConfigError(
                f"num_ops must not be negative and magnitude must lie in 0 to 10, got {self.num_ops} and "
                f"{self.magnitude}"
            )

    @property
    def draft_size(self) -> int:
        """The `draft_size` for `open_image`: the smallest crop still has `image_size` pixels a side.

        `open_image` never goes below twice what it is told, hence the half.
        """
        return math.ceil(self.image_size / math.sqrt(self.scale[0]) / 2)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        """An RGB image -> float32 [3, S, S]."""
        size = (self.image_size, self.image_size)
        box = random_crop_box(*image.size, self.scale, self.ratio, rng)
        image = image.crop(box).resize(size, _RESAMPLING[self.interpolation])
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.randaugment:
            image = random_augment(image, rng, self.num_ops, self.magnitude)
        return _to_tensor(image, self.mean, self.std)


def random_crop_box(
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a crop with a share of the area in `scale` and width / height in `ratio`.

    The aspect ratio is drawn log-uniformly. When ten draws do not fit into the picture, the largest centred
    crop of an allowed ratio is taken. The rule is that of torchvision's RandomResizedCrop.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w = min(width, round(height * ratio[1]))
    h = min(height, round(width / ratio[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


# (image, strength in 0..1, sign of the movement) -> image. At the paper's strength of 0.5 the factor of
# brightness and sharpness is 1, so they do nothing there; autocontrast and equalize know no strength.
RANDOM_AUGMENT: dict[str, Callable[[Image.Image, float, int], Image.Image]] = {
    "identity": lambda image, strength, sign: image,
    "autocontrast": lambda image, strength, sign: ImageOps.autocontrast(image),
    "brightness": lambda image, strength, sign: ImageEnhance.Brightness(image).enhance(1.8 * strength + 0.1),
    "sharpness": lambda image, strength, sign: ImageEnhance.Sharpness(image).enhance(1.8 * strength + 0.1),
    "equalize": lambda image, strength, sign: ImageOps.equalize(image),
    "shear_x": lambda image, strength, sign: warp(image, (1, 0.3 * strength * sign, 0, 0, 1, 0)),
    "shear_y": lambda image, strength, sign: warp(image, (1, 0, 0, 0.3 * strength * sign, 1, 0)),
    "translate_x": lambda image, strength, sign: warp(image, (1, 0, 10 * strength * sign, 0, 1, 0)),
    "translate_y": lambda image, strength, sign: warp(image, (1, 0, 0, 0, 1, 10 * strength * sign)),
    "rotate": lambda image, strength, sign: rotate(image, 30 * strength * sign),
}


def random_augment(
    image: Image.Image, rng: np.random.Generator, num_ops: int = 2, magnitude: float = 5
) -> Image.Image:
    """BLIP's flavour of RandAugment: `num_ops` drawn with replacement, each done with probability 0.5.

    Unlike the original (Cubuk et al. 2020) it neither inverts, solarises nor posterises, and it moves by up
    to 10 pixels, whatever the size. `magnitude` is from 0 to 10; the direction of a movement is drawn.
    """
    operations = list(RANDOM_AUGMENT.values())
    for choice in rng.integers(len(operations), size=num_ops):
        if rng.random() < 0.5:
            sign = 1 if rng.random() < 0.5 else -1
            image = operations[choice](image, magnitude / 10, sign)
    return image


def warp(image: Image.Image, matrix: tuple[float, float, float, float, float, float]) -> Image.Image:
    """The picture whose pixel (x, y) is (a·x + b·y + c, d·x + e·y + f) of `image`; bilinear, grey outside.

    Coordinates are pixel indices, as in OpenCV, with which the paper's augmentation was made. PIL's begin
    at the corner of the first pixel, half a pixel before its centre.
    """
    a, b, c, d, e, f = matrix
    cornered = (a, b, c + 0.5 * (1 - a - b), d, e, f + 0.5 * (1 - d - e))
    transform, bilinear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    return image.transform(image.size, transform, cornered, bilinear, fillcolor=FILL)


def rotate(image: Image.Image, degrees: float) -> Image.Image:
    """The picture turned about pixel (W / 2, H / 2), size kept, grey outside."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = image.width / 2, image.height / 2
    return warp(image, (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y))


def exchange_left_right(sentence: str) -> str:
    """The sentence seen in a mirror: left, left-hand and leftmost become right, ..., and the reverse."""
    return re.sub(r"\b(left|right)(?=(most)?\b)", lambda m: _MIRRORED[m[0]], sentence)


_MIRRORED = {"left": "right", "right": "left"}


def swap_pair(left: T, right: T, sentence: str, rng: np.random.Generator) -> tuple[T, T, str]:
    """NLVR2's augmentation: with probability 0.5 the pictures and the sides in the sentence are exchanged.

    Both at once, so the label stays valid. (The released code knows only "left" and "right" between spaces:
    "leftmost" or "left," get a wrong label.) The sentence is in lower case, as `clean_caption` leaves it.
    """
    if rng.random() < 0.5:
        return left, right, sentence
    return right, left, exchange_left_right(sentence)


def _to_tensor(image: Image.Image, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """RGB -> normalised float32 [3, H, W]."""
    if image.mode != "RGB":
        raise ValueError(f"a transform wants RGB, which data.image.open_image gives; got mode {image.mode}")
    pixels: np.ndarray = np.asarray(image, dtype=np.float32) / np.float32(255)
    pixels = (pixels - np.array(mean, dtype=np.float32)) / np.array(std, dtype=np.float32)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def _check(image_size: int, std: tuple[float, ...], interpolation: str) -> None:
    if image_size < 1:
        raise ConfigError(f"image_size must be positive, got {image_size}")
    if min(std) <= 0:
        raise ConfigError(f"std must be positive, got {std}")
    if interpolation not in _RESAMPLING:
        raise ConfigError(f"interpolation must be one of {', '.join(_RESAMPLING)}, got {interpolation!r}")
