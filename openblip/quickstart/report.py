"""The story as a page with pictures: what was kept, dropped and rewritten, the figures, what the models see."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from openblip.api import Pipeline
from openblip.config import UserError
from openblip.curate.capfilt import ScoredText
from openblip.data.rows import Row
from openblip.html import (
    CardLine,
    card,
    cards,
    histogram_svg,
    page,
    picture_uri,
    section,
    table,
    thumbnail,
)
from openblip.quickstart.story import MODELS, Story

QUERIES = ("a red heart", "a dog", "a man riding a bicycle", "a red fruit")


def write_report(story: Story, path: str | Path) -> Path:
    """Write the story as one self-contained HTML file."""
    results = story.results
    body = "\n".join(
        (
            _figures(story),
            _filter(story),
            _examples(story),
            _captions(story),
            _search(story.models["bootstrapped"], story.test),
            _heat(story),
            _curves(story),
        )
    )
    wrong = sum(not right for right in story.right.values())
    subtitle = (
        f"{len(story.human)} human-labelled pairs, {len(story.web)} web pairs of which {wrong} had wrong captions, "
        f"{len(story.test)} unseen test pairs; seed {results['seed']}, {results['seconds']:.0f} s"
    )
    path = Path(path)
    path.write_text(page("BLIP and CapFilt, the whole story", body, subtitle=subtitle), encoding="utf-8")
    return path


def _figures(story: Story) -> str:
    header = (
        "pre-trained on",
        "mean recall",
        "image→text R@1",
        "R@5",
        "R@10",
        "text→image R@1",
        "R@5",
        "R@10",
    )
    names = {
        "noisy": "noisy web + human",
        "bootstrapped": "CapFilt's output + human",
        "clean": "true captions + human",
    }
    keys = ("r_mean", "tr@1", "tr@5", "tr@10", "ir@1", "ir@5", "ir@10")
    rows = []
    for model in MODELS:
        figures = story.results[model]
        rows.append((names[model], *(figures[key] for key in keys), figures["cider"]))
    text = "Three models from the same start, with the same number of steps, on test pictures none has seen."
    return section("Did CapFilt make a better model?", table((*header, "CIDEr-D"), rows), text=text)


def _filter(story: Story) -> str:
    figures = story.results["filter"]
    web = [text for text in story.texts if text.kind == "web"]
    series = {
        "right web captions": [text.match for text in web if story.right[text.id]],
        "wrong web captions": [text.match for text in web if not story.right[text.id]],
        "written by the captioner": [text.match for text in story.texts if text.kind == "synthetic"],
    }
    threshold = figures["threshold"]
    picture = histogram_svg(series, threshold=threshold, label="P(match)")
    keys = ("auc", "precision", "recall", "f1", "share_dropped")
    return section(
        "Did the filter find the noise?",
        table(("of the web's texts", "value"), [(key, figures[key]) for key in keys]) + picture,
        text="Only this report knows which captions were planted wrong. Precision and recall are of dropping noise.",
    )


def _examples(story: Story, count: int = 12) -> str:
    by_image: dict[str, list[tuple[ScoredText, bool]]] = {}
    for text, kept in zip(story.texts, story.kept, strict=True):
        by_image.setdefault(text.id, []).append((text, kept))
    step = max(1, len(story.web) // count)
    found = []
    for row in story.web[::step][:count]:
        lines = [
            CardLine(text.text, f"{text.kind} · P(match) {text.match:.2f}{_planted(story, text)}", kept)
            for text, kept in by_image[row.id]
        ]
        found.append(card(thumbnail(row.image), lines))
    note = "Every so many-th web picture, unpicked: its web caption, what the captioner wrote, and what was kept."
    return section("Kept, dropped, rewritten", cards(found), text=note)


def _planted(story: Story, text: ScoredText) -> str:
    return " · planted wrong" if text.kind == "web" and not story.right[text.id] else ""


def _captions(story: Story, count: int = 9) -> str:
    step = max(1, len(story.test) // count)
    found = []
    for row in story.test[::step][:count]:
        lines = [CardLine(row.captions[0], "human")]
        lines += [CardLine(story.captions[model][row.id], model) for model in MODELS]
        found.append(card(thumbnail(row.image), lines))
    return section("What the models write about unseen pictures", cards(found), text="Beam search, unpicked.")


def _search(model: Pipeline, test: Sequence[Row], shown: int = 6) -> str:
    images = model.embed_images([row.image for row in test])
    body = ""
    for query, vector in zip(QUERIES, model.embed_texts(QUERIES), strict=True):
        scores = images @ vector
        best = np.argsort(-scores, kind="stable")[:shown]
        found = [
            card(thumbnail(test[i].image, 120), [CardLine(test[i].captions[0], f"{scores[i]:.2f}")])
            for i in best
        ]
        body += f"<h3>{query}</h3>" + cards(found)
    return section(
        "Search the unseen pictures", body, text="The bootstrapped model's nearest pictures by cosine."
    )


def _heat(story: Story, count: int = 3) -> str:
    import io

    rows = story.test[:: max(1, len(story.test) // count)][:count]
    figures = ""
    for row in rows:
        file = io.BytesIO()
        story.models["bootstrapped"].localize(row.image, row.captions[0]).picture().save(file, "PNG")
        figures += f'<figure><img src="{picture_uri(file.getvalue())}" alt=""></figure>'
    return section("Where the words look", figures, text="Grad-CAM of the ITM cross-attention, word by word.")


def _curves(story: Story) -> str:
    figures = ""
    for name in ("noisy", "bootstrapped", "clean"):
        file = story.folder / name / "loss.png"
        if not file.is_file():
            raise UserError(f"{file}: the run drew no loss curve (is matplotlib installed?)")
        figures += f'<h3>{name}</h3><figure><img src="{picture_uri(file.read_bytes())}" alt=""></figure>'
    return section("Loss curves", figures)
