"""The pieces our reports are made of: one self-contained HTML file, without scripts and without network.

What is called `text`, `title` or `tag` is escaped here; what is called `body`, or returned by a function
of this file, is HTML already.
"""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from openblip.data.image import BadImage, open_image

COLOURS = ("#3b6fb6", "#e0812c", "#3f9a5a", "#8a63b0")  # of series, in their order

_STYLE = """
:root { --ink: #22262b; --soft: #667079; --line: #dfe3e7; --good: #2f7d4a; --bad: #b3392f; }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 1080px; margin: 2rem auto;
       padding: 0 1rem; background: #fff }
h1 { font-size: 1.7rem; margin: 0 0 .3rem } h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem }
.soft, figcaption { color: var(--soft) }
table { border-collapse: collapse; margin: .5rem 0 } caption { text-align: left; color: var(--soft) }
th, td { padding: .25rem .8rem; border-bottom: 1px solid var(--line); text-align: left }
td.number { text-align: right; font-variant-numeric: tabular-nums }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(235px, 1fr)); gap: 14px }
.card { border: 1px solid var(--line); border-radius: 8px; padding: 10px; overflow-wrap: anywhere }
.card img { display: block; max-width: 100%; max-height: 180px; margin: 0 auto 8px }
.card p { margin: .35rem 0 } .tag { font-size: .78rem; color: var(--soft) }
.kept { border-left: 3px solid var(--good); padding-left: 7px }
.dropped { border-left: 3px solid var(--bad); padding-left: 7px; color: var(--soft) }
.dropped .caption { text-decoration: line-through }
.id { font: .75rem ui-monospace, monospace; color: var(--soft) }
figure { margin: .5rem 0 } svg { max-width: 100%; height: auto } code { font-size: .85rem }
"""


@dataclass(frozen=True)
class CardLine:
    """A text under a picture. `tag` is said above it in small; kept: None leaves it without a mark."""

    text: str
    tag: str = ""
    kept: bool | None = None


def page(title: str, body: str, *, subtitle: str = "", refresh: int | None = None) -> str:
    """The whole document around `body`. refresh: seconds after which a browser loads it again."""
    again = f'<meta http-equiv="refresh" content="{refresh}">\n' if refresh is not None else ""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n{again}'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f'<p class="soft">{escape(subtitle)}</p>\n{body}\n</body>\n</html>\n'
    )


def section(title: str, body: str, *, text: str = "") -> str:
    """A heading, a sentence about what is seen, and what is seen."""
    intro = f'<p class="soft">{escape(text)}</p>\n' if text else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{intro}{body}\n</section>"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table of texts and numbers; floats have three decimals. An empty header is left out."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = "\n".join(f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in rows)
    return f"<table>\n{f'<tr>{head}</tr>' if header else ''}\n{lines}\n</table>"


def card(picture: str, lines: Sequence[CardLine], *, title: str = "") -> str:
    """One picture (an address, such as `thumbnail` gives) and what is said about it."""
    texts = "\n".join(_card_line(line) for line in lines)
    name = f'<div class="id">{escape(title)}</div>' if title else ""
    return f'<div class="card"><img src="{escape(picture)}" alt="">\n{texts}\n{name}</div>'


def cards(found: Iterable[str]) -> str:
    """Cards side by side."""
    return f'<div class="cards">\n{"".join(found)}\n</div>'


def thumbnail(image: Any, side: int = 200, quality: int = 80) -> str:
    """An image (anything `open_image` takes) as a JPEG in a data: address, at most side x side pixels.

    An image that cannot be opened becomes an empty grey one: a report is not the place to fail.
    """
    try:
        small = open_image(image)
    except BadImage:
        small = Image.new("RGB", (side, side), "#dddddd")
    small.thumbnail((side, side), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=quality)
    return picture_uri(file.getvalue(), "image/jpeg")


def picture_uri(data: bytes, kind: str = "image/png") -> str:
    """Encoded bytes of a picture as a data: address."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def histogram_svg(
    series: Mapping[str, Sequence[float]],
    *,
    low: float = 0.0,
    high: float = 1.0,
    bins: int = 20,
    threshold: float | None = None,
    label: str = "P(match)",
) -> str:
    """Histograms of one or more series over one axis, each as shares of its own number, bars side by side.

    Values outside low…high are counted in the first or last bin. `threshold` is drawn as a dashed line.
    """
    width, height, left, bottom, top = 640, 240, 40, 34, 26
    shares = {}
    for name, values in series.items():
        counts, _ = np.histogram(np.clip(np.asarray(values, float), low, high), bins, (low, high))
        shares[name] = counts / max(1, len(values))
    highest = max([float(share.max()) for share in shares.values()], default=0) or 1.0

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (width - left - 10)

    def y(share: float) -> float:
        return height - bottom - share / highest * (height - bottom - top)

    step = (high - low) / bins
    bar = (x(low + step) - x(low) - 2) / max(1, len(shares))
    drawn = [
        f'<rect x="{x(low + step * place) + 1 + bar * number:.1f}" y="{y(share):.1f}" width="{bar:.1f}" '
        f'height="{y(0) - y(share):.1f}" fill="{_colour(number)}"/>'
        for number, values in enumerate(shares.values())
        for place, share in enumerate(values)
        if share
    ]
    drawn.append(f'<path d="M{left} {y(0)}H{width - 10}" stroke="#889"/>')
    for value in np.linspace(low, high, 5):
        drawn.append(_svg_text(x(value), height - bottom + 14, f"{value:g}", "middle"))
    drawn.append(_svg_text((left + width) / 2, height - 4, label, "middle"))
    drawn += [
        _svg_text(left - 4, y(highest) + 8, f"{highest:.0%}", "end"),
        _svg_text(left - 4, y(0), "0", "end"),
    ]
    if threshold is not None and low <= threshold <= high:
        at = x(threshold)
        drawn.append(f'<path d="M{at:.1f} {top}V{y(0)}" stroke="#b3392f" stroke-dasharray="4 3"/>')
    for number, (name, values) in enumerate(series.items()):
        place = left + 190 * number
        drawn.append(f'<rect x="{place}" y="6" width="10" height="10" fill="{_colour(number)}"/>')
        drawn.append(_svg_text(place + 15, 15, f"{name} ({len(values)})", "start"))
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(label)}">{"".join(drawn)}</svg>'
    )


def _svg_text(x: float, y: float, text: str, anchor: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} font-size="11" fill="#667079">{escape(text)}</text>'


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _card_line(line: CardLine) -> str:
    mark = {True: ' class="kept"', False: ' class="dropped"', None: ""}[line.kept]
    tag = f'<span class="tag">{escape(line.tag)}</span><br>' if line.tag else ""
    return f'<p{mark}>{tag}<span class="caption">{escape(line.text)}</span></p>'


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"<td>{escape(str(value))}</td>"
    text = f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
    return f'<td class="number">{text}</td>'
