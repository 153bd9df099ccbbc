"""BLEU, ROUGE-L and CIDEr-D agree with pycocoevalcap on the same tokens, and with a sum done by hand."""

import random

import pytest

from openblip.config import UserError
from openblip.eval.captions import bleu, caption_scores, cider_d, rouge_l

WORDS = ["a", "man", "dog", "runs", "on", "the", "grass", "red", "ball", "'s", "-lrb-", "two"]


@pytest.fixture
def coco():
    """captions, references -> BLEU-1..4, ROUGE-L per image, CIDEr-D per image, by pycocoevalcap."""
    scorers = [
        pytest.importorskip(f"pycocoevalcap.{name.lower()}.{name.lower()}").__dict__[name]
        for name in ("Bleu", "Rouge", "Cider")
    ]

    def run(captions, references):
        truths = {i: [" ".join(text) for text in texts] for i, texts in enumerate(references)}
        said = {i: [" ".join(caption)] for i, caption in enumerate(captions)}
        bleus = scorers[0](4).compute_score(truths, said, verbose=0)[0]
        return bleus, *(list(scorer().compute_score(truths, said)[1]) for scorer in scorers[1:])

    return run


def corpus(seed: int, images: int, longest: int) -> tuple[list, list]:
    rng = random.Random(seed)

    def text(shortest: int) -> list[str]:
        return [rng.choice(WORDS) for _ in range(rng.randint(shortest, longest))]

    return [text(0) for _ in range(images)], [
        [text(1) for _ in range(rng.randint(1, 5))] for _ in range(images)
    ]


@pytest.mark.parametrize(
    ("captions", "references"),
    [
        corpus(seed=0, images=40, longest=12),
        corpus(seed=1, images=7, longest=3),  # too short for 4-grams
        corpus(seed=2, images=30, longest=40),  # lengths far apart: the penalties of BLEU and CIDEr-D
        corpus(seed=3, images=1, longest=9),  # one image: every n-gram is in all images
        ([[]], [[["a", "dog"]]]),
        ([[], ["a"]], [[[]], [["a"], []]]),
        ([["dog"] * 9], [[["dog", "dog"], ["a", "dog", "dog", "runs"]]]),  # clipping
        ([["a", "b", "c"]], [[["a", "b"], ["a", "b", "c", "d"]]]),  # two references equally near: the shorter
        ([["1\xa01/2", "cups"], ["a"]], [[["1\xa01/2", "cups"], ["1", "1/2"]], [["b"]]]),
    ],
)
def test_scores_agree_with_pycocoevalcap(coco, captions, references):
    bleus, rouge, cider = coco(captions, references)
    assert bleu(captions, references) == pytest.approx(bleus, abs=1e-6)
    assert rouge_l(captions, references) == pytest.approx(rouge, abs=1e-6)
    assert cider_d(captions, references) == pytest.approx(cider, abs=1e-6)


def test_raw_text_agrees_with_pycocoevalcap_on_javas_tokens(coco):
    # On the right of each text, what the Java tokenizer and the COCO punctuation list leave of it.
    texts = {
        "A boy's dog (brown) didn't run.": "a boy 's dog -lrb- brown -rrb- did n't run",
        'The dog\'s shirt says "ADHD" -- in red!': "the dog 's shirt says adhd in red",
        "Mr. Smith, of the U.S., runs 1 1/2 miles.": "mr. smith of the u.s. runs 1\xa01/2 miles",
        "A man and/or woman at 10:30am; it's cold.": "a man and/or woman at 10:30 am it 's cold",
        "A boy's dog didn't run.": "a boy 's dog did n't run",
        "It says 'ADHD' -- in red!": "it says adhd in red",
        "Mr. Smith of the U.S. runs 1 1/2 miles": "mr. smith of the u.s. runs 1\xa01/2 miles",
        "(a woman; it's cold)": "-lrb- a woman it 's cold -rrb-",
    }
    raw, tokens = list(texts), [text.split(" ") for text in texts.values()]
    references = [[tokens[i], tokens[(i + 1) % 4]] for i in range(4)]
    bleus, rouge, cider = coco(tokens[4:], references)
    got = caption_scores(
        {i: raw[4 + i] for i in range(4)}, {i: [raw[i], raw[(i + 1) % 4]] for i in (3, 1, 0, 2)}
    )
    want = {f"bleu@{n}": score for n, score in enumerate(bleus, 1)}
    want |= {"rouge_l": sum(rouge) / 4, "cider": sum(cider) / 4}
    assert got == pytest.approx(want, abs=1e-6)
    assert min(got.values()) > 0.01  # nothing was compared as zero with zero


def test_scores_by_hand():
    captions, references = {"x": "A dog runs on grass.", "y": "two red balls"}, {"x": ["a dog runs on grass"]}
    references["y"] = ["Two men sit"]
    scores = caption_scores(captions, references)
    # 6 of 8 words, 4 of 6 pairs, 3 of 4 triples, 2 of 2 quadruples; lengths equal, so no brevity penalty.
    assert scores["bleu@1"] == pytest.approx(6 / 8)
    assert scores["bleu@2"] == pytest.approx((6 / 8 * 4 / 6) ** 0.5)
    assert scores["bleu@4"] == pytest.approx((6 / 8 * 4 / 6 * 3 / 4) ** 0.25)
    assert scores["rouge_l"] == pytest.approx((1 + 1 / 3) / 2)
    # x is its own reference: 10. y shares one of three words, all equally rare: cosine 1/3 for n = 1 alone.
    assert scores["cider"] == pytest.approx((10 + 10 * (1 / 3) / 4) / 2)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ({}, {"x": ["a"]}, "there are none"),
        ({"x": "a", "y": "b"}, {"x": ["a"]}, "1 ids have a prediction but no reference: 'y'"),
        (
            {"x": "a"},
            {"x": ["a"], "y": ["b"], "z": ["c"]},
            "2 ids have a reference but no prediction: 'y', 'z'",
        ),
        ({"x": "a"}, {"x": []}, "image 'x': got .*wanted a list of captions"),
        ({"x": "a"}, {"x": "a"}, "image 'x': got 'a', wanted a list of captions"),
        ({"x": ["a"]}, {"x": ["a"]}, "image 'x': got .*wanted one caption as text"),
        ({"x": None}, {"x": ["a"]}, "image 'x': got None"),
    ],
)
def test_what_cannot_be_scored_is_named(predictions, references, message):
    with pytest.raises(UserError, match=message):
        caption_scores(predictions, references)
