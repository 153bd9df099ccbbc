"""What `openblip quickstart` does: find the data, tell the story, write the report."""

import sys
from pathlib import Path
from typing import Any

from openblip.config import UserError
from openblip.data.image import open_image
from openblip.data.rows import BadRows
from openblip.data.sources import open_source
from openblip.quickstart.openmoji import openmoji
from openblip.quickstart.report import write_report
from openblip.quickstart.story import StoryConfig, tell


def run(
    data: str | Path | None,
    out: str | Path,
    *,
    seed: int = 0,
    noise: float = 0.4,
    human: int = 300,
    test: int = 400,
    **reading: Any,
) -> dict[str, Any]:
    """Tell the story on OpenMoji drawings, or on the user's own pictures, and return results.json's content.

    report.html, results.json and the models land in `out`. `reading`: options of `open_source`. Raises UserError for
    unusable data or sizes.
    """
    out = Path(out)
    config = StoryConfig(human=human, test=test, noise=noise, seed=seed)
    if data is None:
        _say("drawing OpenMoji (CC BY-SA 4.0)")
        rows = openmoji(out / "openmoji")
    else:
        bad = BadRows(out / "bad_rows.jsonl")
        out.mkdir(parents=True, exist_ok=True)
        _say("looking at every picture")
        rows = []
        for row in open_source(str(data), **reading).rows(bad):
            with bad.skipping(row.where):  # what cannot be opened takes no part
                open_image(row.image, draft_size=config.pretrain.model.vision.image_size)
                rows += [row] if row.captions else []
        if not rows:
            raise UserError(f"{data}: no picture with a caption")
    story = tell(rows, out, config, say=_say)
    write_report(story, out / "report.html")
    return story.results


def _say(line: str) -> None:
    """To standard error: standard output is for the answer."""
    print(line, file=sys.stderr, flush=True)
