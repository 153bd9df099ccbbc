"""The report shows what happened, is one file, and lets no caption speak HTML."""

import base64
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from openblip.config import UserError
from openblip.curate.engine import run
from openblip.curate.report import even_sample, write_report
from openblip.data.image import open_image
from openblip.html import CardLine, card, histogram_svg, page, table, thumbnail
from tests.curate.made import WRONG, ColourCapFilt, tar_source

VOID = {"meta", "img", "br"}


class Balance(HTMLParser):
    """Every element that is opened is closed, in order; what is loaded from where."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    source = tar_source(folder, bad={11: b""})
    run(ColourCapFilt(), source, folder / "job")
    return source, folder / "job"


def test_the_report_of_planted_noise(finished, tmp_path):
    source, job = finished
    truth = {f"p{number}": number not in WRONG for number in range(12)}
    figures = write_report(job, source, tmp_path / "new/report.html", truth=truth)
    assert figures["images"] == 11 and figures["bad"] == {"empty": 1}
    assert figures["web"] == {"texts": 11, "kept": 7, "share_dropped": pytest.approx(4 / 11)}
    assert figures["synthetic"] == {"texts": 11, "kept": 11, "share_dropped": 0}
    assert figures["noise"] == dict.fromkeys(("precision", "recall", "f1", "accuracy", "auc"), 1)
    text = (tmp_path / "new/report.html").read_text()
    read = Balance(text)
    assert read.tags.count("img") == 11, "seven kept, four rewritten"
    assert all(source.startswith("data:image/jpeg;base64,") for source in read.sources)
    assert "script" not in read.tags and "b" not in read.tags
    assert "&lt;b&gt;1&lt;/b&gt;" in text and "http" not in text
    assert "36.4%" in text and "c" * 16 in text and source.fingerprint in text
    rewritten = text[text.index("<h2>Rewritten</h2>") : text.index("<h2>Dropped</h2>")]
    assert set(re.findall(r">p(\d+)<", rewritten)) == {str(number) for number in WRONG}


def test_a_report_is_the_same_every_time_and_the_threshold_is_free(finished, tmp_path):
    source, job = finished
    write_report(job, source, tmp_path / "a.html")
    write_report(job, source, tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert write_report(job, source, tmp_path / "c.html", threshold=0.85)["synthetic"]["kept"] == 0
    assert "4 of 11 pictures (36.4%)" in (tmp_path / "c.html").read_text().partition("<h2>Dropped</h2>")[2]


def test_a_truth_about_other_pictures_is_refused(finished, tmp_path):
    with pytest.raises(UserError, match="truth: no picture of the job is in it"):
        write_report(*reversed(finished), tmp_path / "a.html", truth={"elsewhere": True})
    assert not list(tmp_path.iterdir())


def test_examples_go_from_the_lowest_score_to_the_highest():
    lines = [{"match": (7 * n % 101) / 101, "id": str(n), "text": ""} for n in range(101)]
    chosen = even_sample(lines, 5)
    assert [round(line["match"] * 101) for line in chosen] == [0, 25, 50, 75, 100]
    assert len(even_sample(lines[:3], 5)) == 3 and even_sample([], 5) == []


def test_the_pieces_escape_what_they_are_given():
    evil = '"><script>alert(1)</script>'
    line = CardLine(evil, evil, True)
    document = page(evil, card(evil, [line], title=evil) + table([evil], [[evil, 1, 0.5]]), subtitle=evil)
    document += histogram_svg({evil: [0.5]}, label=evil)
    assert "<script>" not in document
    assert Balance(document).tags.count("svg") == 1


def test_thumbnails():
    uri = thumbnail(Image.new("RGB", (400, 100), "red"), 80)
    head, _, data = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    small = open_image(base64.b64decode(data))
    assert small.size == (80, 20) and small.getpixel((0, 0))[0] > 240
    assert thumbnail(b"no picture").startswith("data:image/jpeg")


def test_a_histogram_counts_all_values():
    svg = histogram_svg({"a": [0.0, 0.04, 1.0, 7.0], "b": []}, bins=10, threshold=0.5)
    bars = re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="[\d.]+" height="([\d.]+)"', svg)[:-2]
    assert len(bars) == 2 and bars[0][1] == bars[1][1], (
        "two in the first bin, two in the last; the legend left out"
    )
    assert float(bars[0][0]) < float(bars[1][0])
    assert "a (4)" in svg and "b (0)" in svg and "stroke-dasharray" in svg
