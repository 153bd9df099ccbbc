"""The tokenizer gives the Java program's tokens: a stored table, and the program itself where Java is."""

import importlib.util
import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from openblip.eval.ptb import PUNCTUATION, tokenize

# What PTBTokenizer 3.4.1 -preserveLines -lowerCase makes of each text, less the COCO punctuation.
JAVA_SAYS = [json.loads(line) for line in (Path(__file__).parent / "ptb_java.jsonl").read_text().splitlines()]
PIECES = """
    don't can't it's I'm o'clock rock'n'roll U.S. U.S.A. a.m. 5'10" 6' 1/2 3.5 1,000 10:30am 1980's '80s 24/7
    and/or t-shirt St. Mr. Dr. No. vs. etc. e.g. i.e. #1 #dog @home B&W b&w AT&T w/o 4x4 3-D 50% $5.00 £10
    x-ray &amp; <unk> <b> [UNK] (see) -- ... café naïve 20°C 2nd cannot gonna 'tis 'em y'all ma'am Jr. Inc.
    Ave. Jan. Ph.D. www.site.com http://a.b.com/c me@site.com :) ;-) C++ A b. B. K. 1-2 5-year-old 12. +1 -5
    16:9 O'Neil dogs' 90's J.R.R. fig. mt. ft. lbs.
"""
BEHIND = "'s ' n't 'll 'd 're 've 'm . , ! ? ; : ... - -- \" ) ] % th ft !! ?! -like 'n .jpg"


@pytest.mark.parametrize("said", JAVA_SAYS, ids=lambda said: ascii(said["caption"])[:40])
def test_tokens_are_those_of_the_java_program(said):
    assert tokenize(said["caption"]) == said["tokens"]


def test_no_caption_sees_its_neighbour():
    # The Java program reads a corpus as one text: a caption that begins with "The" ends the one before it.
    assert tokenize("plan b.\nThe dog") == ["plan", "b", "the", "dog"]
    assert [tokenize("plan b."), tokenize("The dog")] == [["plan", "b."], ["the", "dog"]]


@pytest.fixture(scope="module")
def java(tmp_path_factory):
    """texts -> tokens, by the program that comes with pycocoevalcap; nothing is written beside it."""
    package = importlib.util.find_spec("pycocoevalcap")
    if shutil.which("java") is None or package is None:
        pytest.skip("needs java and pycocoevalcap")
    jar = Path(next(iter(package.submodule_search_locations))) / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    program = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    options = ["-preserveLines", "-lowerCase"]
    path = tmp_path_factory.mktemp("java") / "texts.txt"

    def run(texts: list[str]) -> list[list[str]]:
        # A line of its own between two texts, so that none sees its neighbour.
        lines = [line for text in texts for line in (text.replace("\n", " "), "between")]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        environment = {**os.environ, "LC_ALL": "C.UTF-8"}
        done = subprocess.run(
            [*program, *options, str(path)], capture_output=True, check=True, env=environment
        )
        answers = done.stdout.decode("utf-8").split("\n")[: len(lines)]
        assert set(answers[1::2]) == {"between"}
        dropped = PUNCTUATION | {"-LRB-", "-RRB-", "-LCB-", "-RCB-"}  # the COCO list as it stands
        return [
            [token for token in line.split(" ") if token and token not in dropped] for line in answers[::2]
        ]

    return run


def test_the_table_is_what_java_says(java):
    assert java([said["caption"] for said in JAVA_SAYS]) == [said["tokens"] for said in JAVA_SAYS]


def test_java_agrees_on_spoiled_captions(java):
    """Random marks, contractions, numbers, abbreviations, capitals put into captions: not one may differ."""
    rng = random.Random(0)
    captions = [
        "a man in a red shirt rides a bicycle down the street",
        "two brown dogs run through the snow and one holds a stick",
        "children are playing football in front of an old church",
        "the surfer on the white board is about to fall into the water",
    ]
    pieces = PIECES.split()
    before = ["'", '"', "(", "[", "$", "#", "-", "--", "...", "*", "&", "non-", "co-", "e-", "o'", "d'", "Mc"]
    behind = BEHIND.split()
    joints = ["-", "/", ".", ",", "'", "&", "_", "--", "...", "+", ":", ";", "!", "?", "  ", "\u00a0"]
    texts = []
    for _ in range(4000):
        words = rng.choice(captions).split()
        for _ in range(rng.randint(1, 4)):
            i, change = rng.randrange(len(words) - 1), rng.randrange(7)
            if change == 0:
                words[i] = rng.choice(before) + words[i]
            elif change == 1:
                words[i] += rng.choice(behind)
            elif change == 2:
                words[i : i + 2] = [words[i] + rng.choice(joints) + words[i + 1]]
            elif change == 3:
                words[i] = rng.choice([str.upper, str.capitalize])(words[i])
            elif change == 4:
                words[i] = (
                    f"{rng.randint(0, 2100)}{rng.choice(['', 's', chr(39) + 's', 'th', '.', '%', 'x', 'lb'])}"
                )
            else:
                words.insert(i, rng.choice(pieces))
        texts.append(" ".join(words))
    differ = [
        (text, want, tokenize(text)) for text, want in zip(texts, java(texts)) if tokenize(text) != want
    ]
    assert not differ, differ[:3]


def test_java_agrees_on_human_captions(java, flickr8k):
    with (flickr8k / "captions.jsonl").open(encoding="utf-8") as lines:
        texts = [caption for line in lines for caption in json.loads(line)["captions"]]
    differ = [
        (text, want, tokenize(text)) for text, want in zip(texts, java(texts)) if tokenize(text) != want
    ]
    assert not differ, f"{len(differ)} of {len(texts)}: {differ[:3]}"
