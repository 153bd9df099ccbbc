"""Where a picture is, as a line of an index keeps it, and how it is opened again.

{"path": ...}                           a local file
{"url": ..., "start": ..., "stop": ...}  bytes of a local or remote file, such as a member of a tar
{"data": ..., "reading": ..., "row": ...}  a row of a data source that holds the bytes, such as parquet
"""

import json
import os
from typing import Any

from PIL import Image

from openblip.config import UserError
from openblip.data.image import BadImage, open_image
from openblip.data.rows import BadRow, ByteRange, Row
from openblip.data.sources import InSource, Source, open_source


def place_of(row: Row, reading: dict[str, Any]) -> str:
    """Where the (first) picture of a light row is. reading: the options its source was opened with."""
    image: Any = row.image
    if isinstance(image, str):
        return json.dumps({"path": absolute(image)})
    if isinstance(image, ByteRange):
        return json.dumps({"url": absolute(image.url), "start": image.start, "stop": image.stop})
    if isinstance(image, InSource):
        return json.dumps({"data": absolute(image.source.path), "reading": reading, "row": image.index})
    raise BadRow("missing_image", row.where, f"a picture is wanted, got {type(image).__name__}")


def absolute(path: str) -> str:
    """A path that holds wherever this process is; what has a protocol stays as it is."""
    return path if "://" in path else os.path.abspath(path)  # noqa: PTH100 (symbolic links stay)


class Places:
    """Opens pictures again, in any number of threads; keeps sources open. cache_dir: as for `open_source`."""

    def __init__(self, cache_dir: str | os.PathLike[str] | None = None) -> None:
        self.cache_dir = cache_dir
        self._sources: dict[str, Source] = {}

    def open(self, place: dict[str, Any], id: str, draft_size: int | None = None) -> Image.Image:
        """The picture `id` at a place, RGB.

        Raises BadImage: it is gone, or another one is there; or one of the reasons of `open_image`.
        """
        try:
            if "path" in place:
                return open_image(place["path"], draft_size=draft_size)
            if "url" in place:
                stored = ByteRange(place["url"], place["start"], place["stop"])
                return open_image(stored, draft_size=draft_size)
            row = self._source(place)[place["row"]]
        except (UserError, IndexError, OSError) as error:
            if isinstance(error, BadImage):
                raise
            raise BadImage("missing", str(error)) from error
        if row.id != id:
            raise BadImage("missing", f"{row.where}: holds picture {row.id} now, not {id}")
        return open_image(row.image, draft_size=draft_size)

    def open_if_there(
        self, place: dict[str, Any], id: str, draft_size: int | None = None
    ) -> Image.Image | None:
        """The same; None of one that cannot be opened."""
        try:
            return self.open(place, id, draft_size)
        except BadImage:
            return None

    def _source(self, place: dict[str, Any]) -> Source:
        key = json.dumps([place["data"], place["reading"]])
        if key not in self._sources:
            self._sources[key] = open_source(
                place["data"], **place["reading"], require_captions=False, cache_dir=self.cache_dir
            )
        return self._sources[key]
