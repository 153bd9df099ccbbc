"""Pictures for people: photographs in a grid with captions, and heat maps of words over an image."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_MARGIN = 6
_LINES = 4  # of a caption; what is longer ends in "…"
_INK, _PAPER = (30, 30, 30), (255, 255, 255)
# From nothing over blue, green and yellow to red.
_HEAT = np.array([(0, 0, 80), (0, 90, 255), (0, 220, 120), (255, 220, 0), (255, 30, 0)], dtype=np.float32)


def caption_grid(
    images: Sequence[Image.Image],
    captions: Sequence[str],
    *,
    columns: int = 4,
    tile: int = 224,
    font_size: int = 13,
) -> Image.Image:
    """RGB picture of `images`, each fitted into tile x tile pixels, its caption below it, `columns` in a row.

    Captions are wrapped to the tile and cut after four lines.

    Raises:
        ValueError: no image, or not one caption per image.
    """
    if not images or len(images) != len(captions):
        raise ValueError(
            f"{len(images)} images and {len(captions)} captions: wanted one of each, at least one"
        )
    font = ImageFont.load_default(font_size)
    texts = [_wrapped(caption, font, tile) for caption in captions]
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    line_height = round(1.3 * font_size)
    heights = [
        tile + line_height * max(len(text) for text in texts[row * columns : (row + 1) * columns]) + _MARGIN
        for row in range(rows)
    ]
    sheet = Image.new(
        "RGB", (columns * (tile + _MARGIN) + _MARGIN, sum(heights) + rows * _MARGIN + _MARGIN), _PAPER
    )
    draw = ImageDraw.Draw(sheet)
    for i, (image, lines) in enumerate(zip(images, texts)):
        row, column = divmod(i, columns)
        left = _MARGIN + column * (tile + _MARGIN)
        top = _MARGIN + sum(heights[:row]) + row * _MARGIN
        small = _fitted(image, tile)
        sheet.paste(small, (left + (tile - small.width) // 2, top + (tile - small.height) // 2))
        for number, line in enumerate(lines):
            draw.text((left, top + tile + 2 + number * line_height), line, fill=_INK, font=font)
    return sheet


def heat_overlay(image: Image.Image, heat: np.ndarray, *, strength: float = 0.6) -> Image.Image:
    """The image with a heat map [h, w] over it: 0 and less leaves it as it is, 1 and more is deepest red.

    The map may have any size; it is enlarged smoothly to the image's.

    Raises:
        ValueError: not two-dimensional, or not finite.
    """
    heat = np.asarray(heat, dtype=np.float32)
    if heat.ndim != 2 or not np.isfinite(heat).all():
        raise ValueError(f"a heat map has two dimensions and finite values, got shape {heat.shape}")
    # Blown up as one byte per pixel: Pillow's bicubic filter overshoots, bytes are clipped.
    small = Image.fromarray((heat.clip(0, 1) * 255).round().astype(np.uint8))
    level = np.asarray(small.resize(image.size, Image.Resampling.BICUBIC), dtype=np.float32) / 255
    steps = np.linspace(0, 1, len(_HEAT))
    colour = np.stack([np.interp(level, steps, _HEAT[:, channel]) for channel in range(3)], axis=-1)
    share = strength * level[..., None]
    mixed = np.asarray(image.convert("RGB"), dtype=np.float32) * (1 - share) + colour * share
    return Image.fromarray(mixed.round().astype(np.uint8))


def draw_heatmaps(
    image: Image.Image, words: Sequence[str], maps: np.ndarray, *, tile: int = 224, columns: int = 8
) -> Image.Image:
    """A labelled strip: the image, then once per word with its heat map [h, w] over it.

    All maps [n, h, w] are scaled by one number, the largest value of all, so that words can be compared.

    Raises:
        ValueError: not one map per word.
    """
    maps = np.asarray(maps, dtype=np.float32)
    if maps.ndim != 3 or len(maps) != len(words):
        raise ValueError(f"{len(words)} words and maps of shape {maps.shape}: wanted [{len(words)}, h, w]")
    small = _fitted(image, tile)
    scale = max(float(maps.max(initial=0)), 1e-12)
    shown = [small, *(heat_overlay(small, heat / scale) for heat in maps)]
    return caption_grid(shown, ["", *words], columns=columns, tile=tile)


def _fitted(image: Image.Image, side: int) -> Image.Image:
    """RGB, as large as fits into side x side pixels."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.BICUBIC)


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines of at most `width` pixels; a word that is wider is broken."""
    lines: list[str] = [""]
    for word in text.split():
        for piece in _pieces(word, font, width):
            longer = f"{lines[-1]} {piece}".strip()
            if lines[-1] and font.getlength(longer) > width:
                lines.append(piece)
            else:
                lines[-1] = longer
    if len(lines) > _LINES:
        last = lines[_LINES - 1]
        while last and font.getlength(f"{last}…") > width:
            last = last[:-1]
        lines = [*lines[: _LINES - 1], f"{last}…"]
    return lines


def _pieces(word: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    pieces = [""]
    for letter in word:
        if pieces[-1] and font.getlength(pieces[-1] + letter) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces
