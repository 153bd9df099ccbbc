"""What CapFilt did to a data set, to look at: one HTML file with pictures, scores and examples.

Examples are not picked by hand: those of an outcome are sorted by score and taken at even distances, from the
lowest to the highest. Figures are of all texts. Of more than `DRAWN` texts, histograms and examples are of a part, and
the page says so: whoever cleans a billion pairs looks at no more of them than of a million.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from openblip.config import UserError
from openblip.curate.dataset import check_job, decide, shard_scores
from openblip.curate.job import ShardManifest, publish
from openblip.curate.texts import TextRules
from openblip.data.rows import BadRow
from openblip.data.shards import InShards
from openblip.eval.metrics import filter_scores
from openblip.html import CardLine, card, cards, histogram_svg, page, section, table, thumbnail

EXAMPLES = 12  # of each outcome
DRAWN = 20_000  # texts that histograms and examples are made of; of more, whole shards at even distances

Line = dict[str, Any]  # of the scores, with `kept` and `shard`


def write_report(
    job: str | Path,
    source: InShards,
    out_html: str | Path,
    *,
    threshold: float = 0.5,
    texts: TextRules | None = None,
    truth: Mapping[str, bool] | None = None,
) -> dict[str, Any]:
    """Write the report of a finished job and return its figures.

    Args:
        texts: see `decide`.
        truth: row id -> whether the web's captions of this picture are right, where that is known (planted
            noise). Adds precision, recall and AUC of finding the wrong ones.

    Returns:
        "images", "bad" (rows by reason), and for "web" and "synthetic": texts, kept, share_dropped. With
        `truth`, "noise" as `filter_scores` gives it.

    Raises:
        UserError: the job is not finished or of another source; no text's picture is in `truth`, or all of
            those are right, or all wrong.
    """
    done = check_job(job, source)
    counted, drawn, known = _read(job, done, threshold, texts, truth)
    if not counted:
        raise UserError(f"{job}: no row of this job could be used, so there is nothing to show")
    figures = _figures(counted, done)
    if known is not None:
        right, match = known
        figures["noise"] = filter_scores(1 - match, ~right, float(np.nextafter(1 - threshold, 2)))
    part = (
        "" if len(drawn) == counted.total() else f" Drawn from {len(drawn):,} of {counted.total():,} texts."
    )
    body = [
        _summary(figures),
        _histograms(drawn, threshold, known, part),
        *_examples(drawn, source),
        _made_by(done),
    ]
    subtitle = f"{source.path}: {figures['images']:,} images; a text is kept at P(match) ≥ {threshold:g}"
    document = page("CapFilt: what was kept, dropped and rewritten", "\n".join(body), subtitle=subtitle)
    out = Path(out_html)
    out.parent.mkdir(parents=True, exist_ok=True)
    publish(out, document.encode())
    return figures


def even_sample(lines: Sequence[Line], count: int) -> list[Line]:
    """At most `count` lines at even distances in the order of P(match), the lowest and the highest included."""
    ordered = sorted(lines, key=lambda line: (line["match"], line["id"], line["text"]))
    places = np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().astype(int)
    return [ordered[place] for place in places]


def _read(
    job: str | Path,
    done: Sequence[ShardManifest],
    threshold: float,
    rules: TextRules | None,
    truth: Mapping[str, bool] | None,
) -> tuple[Counter[tuple[str, bool]], pa.Table, tuple[np.ndarray, np.ndarray] | None]:
    """Shard by shard: texts by kind and whether kept; those to draw; (right [n] bool, P(match) [n]) where known."""
    counted: Counter[tuple[str, bool]] = Counter()
    texts = sum(manifest.texts for manifest in done)
    many = len(done) if texts <= DRAWN else max(1, len(done) * DRAWN // texts)
    places = set(np.linspace(0, len(done) - 1, many).round().astype(int).tolist())
    drawn, known = [], []
    for place, manifest in enumerate(done):
        table = decide(shard_scores(job, manifest), "itm", threshold, texts=rules)
        counted.update(zip(table["kind"].to_pylist(), table["kept"].to_pylist(), strict=True))
        if truth is not None:
            known += _known(table, truth)
        if place in places:
            drawn.append(table.append_column("shard", pa.array([manifest.shard] * len(table), pa.string())))
    if truth is not None and not known:
        raise UserError("truth: no picture of the job is in it; its keys are row ids, as in the scores")
    right, match = zip(*known, strict=True) if known else ((), ())
    judged = None if truth is None else (np.array(right, bool), np.array(match))
    return counted, pa.concat_tables(drawn), judged


def _figures(counted: Counter[tuple[str, bool]], done: Sequence[ShardManifest]) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "images": sum(manifest.images for manifest in done),
        "bad": dict(Counter(entry.reason for manifest in done for entry in manifest.bad)),
    }
    for kind in ("web", "synthetic"):
        kept = counted[kind, True]
        texts = kept + counted[kind, False]
        dropped = 1 - kept / texts if texts else 0.0
        figures[kind] = {"texts": texts, "kept": kept, "share_dropped": dropped}
    return figures


def _known(texts: pa.Table, truth: Mapping[str, bool]) -> list[tuple[bool, float]]:
    """Whether right, and P(match), of the web texts whose truth is known."""
    return [
        (truth[line["id"]], line["match"])
        for line in texts.select(["id", "kind", "match"]).to_pylist()
        if line["kind"] == "web" and line["id"] in truth
    ]


def _summary(figures: dict[str, Any]) -> str:
    kinds = [
        (kind, figures[kind]["texts"], figures[kind]["kept"], f"{figures[kind]['share_dropped']:.1%}")
        for kind in ("web", "synthetic")
    ]
    parts = [table(("texts", "in all", "kept", "dropped as noise"), kinds)]
    if figures["bad"]:
        parts.append(table(("rows that could not be used", "count"), sorted(figures["bad"].items())))
    if "noise" in figures:
        names = ("precision", "recall", "f1", "accuracy", "auc")
        judged = [(name, figures["noise"][name]) for name in names]
        parts.append(table(("finding the web texts known to be wrong", ""), judged))
    return section("In numbers", "\n".join(parts))


def _histograms(
    texts: pa.Table, threshold: float, known: tuple[np.ndarray, np.ndarray] | None, part: str
) -> str:
    kinds = np.array(texts["kind"].to_pylist())
    match, itm, itc = (texts[name].to_numpy() for name in ("match", "itm", "itc"))
    names = [kind for kind in ("web", "synthetic") if (kinds == kind).any()]
    by_kind = {kind: match[kinds == kind] for kind in names}
    drawn = [histogram_svg(by_kind, threshold=threshold)]
    if known is not None:
        right, of_web = known
        halves = {"web, right": of_web[right], "web, wrong": of_web[~right]}
        drawn.append(
            histogram_svg(halves, threshold=threshold, label="P(match) of web texts known to be ...")
        )
    if not np.allclose(match, itm):
        by_kind = {kind: itm[kinds == kind] for kind in names}
        drawn.append(histogram_svg(by_kind, label="P(match) of the ITM head alone"))
    cosines = {kind: itc[kinds == kind] for kind in names}
    drawn.append(
        histogram_svg(cosines, low=float(itc.min()), high=float(itc.max()) + 1e-9, label="ITC cosine")
    )
    figures = "\n".join(f"<figure>{svg}</figure>" for svg in drawn)
    return section("Scores", figures, text=f"Bars are shares of the texts of their kind.{part}")


def _examples(texts: pa.Table, source: InShards) -> list[str]:
    """One section for each outcome: kept, rewritten, written where there was no text, all dropped."""
    by_image: dict[tuple[str, str], list[Line]] = {}
    for line in texts.to_pylist():
        by_image.setdefault((line["shard"], line["id"]), []).append(line)
    outcomes: dict[str, list[Line]] = {"kept": [], "rewritten": [], "written": [], "lost": []}
    for lines in by_image.values():
        web = [line for line in lines if line["kind"] == "web"]
        best = max(web or lines, key=lambda line: line["match"])
        if web and best["kept"]:
            outcome = "kept"
        elif any(line["kept"] for line in lines):
            outcome = "rewritten" if web else "written"
        else:
            outcome = "lost"
        outcomes[outcome].append(best)
    titles = {
        "kept": ("Kept", "The web's text matches. From the weakest to the strongest."),
        "rewritten": ("Rewritten", "The web's text was dropped; one the captioner wrote is kept instead."),
        "written": ("Written", "The picture came without a text; one that the captioner wrote is kept."),
        "lost": (
            "Dropped",
            "Neither the web's text nor one the captioner wrote matches: the picture is lost.",
        ),
    }
    sections = []
    for outcome, (title, text) in titles.items():
        if outcome == "written" and not outcomes["written"]:
            continue
        chosen = even_sample(outcomes[outcome], EXAMPLES)
        shown = cards(_example(by_image[line["shard"], line["id"]], source) for line in chosen)
        share = len(outcomes[outcome]) / max(1, len(by_image))
        about = f"{text} {len(outcomes[outcome]):,} of {len(by_image):,} pictures ({share:.1%})."
        sections.append(section(title, shown if chosen else "", text=about))
    return sections


def _example(lines: Sequence[Line], source: InShards) -> str:
    texts = [
        CardLine(
            line["text"],
            f"{line['kind']} · P(match) {line['match']:.2f} · cosine {line['itc']:.2f} · "
            + ("kept" if line["kept"] else "dropped"),
            line["kept"],
        )
        for line in lines
    ]
    return card(thumbnail(_picture(source, lines[0])), texts, title=lines[0]["id"])


def _picture(source: InShards, line: Line) -> Any:
    """The picture of a row, for `thumbnail`; no bytes if the row is gone."""
    try:
        return source.part(line["shard"])[line["row"]].image
    except BadRow:
        return b""


def _made_by(done: Sequence[ShardManifest]) -> str:
    fingerprint = done[0].fingerprint
    rows = [
        (name, value if isinstance(value, str) else json.dumps(value)) for name, value in fingerprint.items()
    ]
    text = "SHA-256 of the models' weights, the configuration, and SHA-256 of what the source holds."
    return section("Made by", table((), rows), text=text)
