"""Rules for texts, by hand; and what they change when scores are read."""

import pytest

from openblip.config import UserError
from openblip.curate.dataset import decide, scores, write_webdataset
from openblip.curate.engine import run
from openblip.curate.texts import TextRules
from openblip.data.sources import open_source
from tests.curate.made import WRONG, ColourCapFilt, tar_source


@pytest.mark.parametrize(
    ("rules", "text", "allowed"),
    [
        ({}, "", True),
        ({"min_words": 2}, "red", False),
        ({"min_words": 2}, "a  red ", True),
        ({"max_words": 2}, "a red cup", False),
        ({"script": ["latin"]}, "ein Café, très chic: 100%", True),
        ({"script": ["latin"]}, "красная чашка", False),
        ({"script": ["cyrillic"]}, "красная чашка No. 5", False),
        ({"script": ["cyrillic"], "script_share": 0.8}, "красная чашка No. 5", True),
        ({"script": ["hiragana", "cjk"]}, "赤いカップ", False),
        ({"script": ["hiragana", "cjk", "katakana"]}, "赤いカップ", True),
        ({"script": ["latin"]}, "12:30 !!", False),
    ],
)
def test_what_a_rule_allows(rules, text, allowed):
    assert TextRules(**rules).allows(text) is allowed


@pytest.mark.parametrize(
    "rules",
    [{"min_words": 3, "max_words": 2}, {"script": ["english"]}, {"script_share": 2}, {"min_words": -1}],
)
def test_impossible_rules_are_refused(rules):
    with pytest.raises(UserError):
        TextRules(**rules)


def test_rules_are_applied_when_scores_are_read(tmp_path):
    source, capfilt = tar_source(tmp_path), ColourCapFilt()
    run(capfilt, source, tmp_path / "job")
    calls = capfilt.calls
    table = scores(tmp_path / "job")  # web: "a red square & <b>0</b>", five words; written: "one red thing"
    short = decide(table, texts=TextRules(max_words=3))
    assert {line["kind"] for line in short.to_pylist() if line["kept"]} == {"synthetic"}
    best = decide(table, "top_k", k=1, texts=TextRules(min_words=4)).to_pylist()
    assert {line["kind"] for line in best if line["kept"]} == {"web"}, "what breaks a rule takes no place"
    made = write_webdataset(tmp_path / "job", source, tmp_path / "out", texts=TextRules(min_words=4))
    assert made.captions == {"web": 12 - len(WRONG)} and capfilt.calls == calls
    assert len(open_source(tmp_path / "out", cache_dir=tmp_path / "c")) == 8
    assert "min_words=4" in (tmp_path / "out/README.md").read_text()
