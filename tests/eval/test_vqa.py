"""The VQA normaliser as a table, leaving one out by position, the three variants, A-OKVQA, exact match."""

import pytest

from openblip.config import UserError
from openblip.eval.vqa import (
    aokvqa_direct_answer,
    exact_match,
    normalize_answer,
    normalize_punctuation,
    normalize_words,
    vqa_accuracy,
)


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("yes", "yes"),
        ("A dog, and two cats!", "dog and 2 cats"),
        ("  On the\ttable.\n", "on table"),
        ("None", "0"),
        ("zero, one or ten", "0 1 or 10"),
        ("eleven", "eleven"),
        ("The A An the", ""),
        # a mark becomes a space, unless it stands beside a space somewhere in the answer
        ("t-shirt", "t shirt"),
        ("black-white - grey", "blackwhite grey"),
        ("t-shirt -red", "tshirt red"),
        ("t-shirt- red", "tshirt red"),
        ("black/white", "black white"),
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("red,blue, green", "redblue green"),
        ("(left)", "left"),
        ("x(y) z", "x y z"),
        ("what?no", "what no"),
        ("#1: it's 5:30 & 50% $5 *~^|", "#1: it's 5:30 & 50% $5 *~^|"),
        # a comma between digits anywhere deletes every mark
        ("1,000", "1000"),
        ("1,000 t-shirts", "1000 tshirts"),
        # full stops go unless a digit follows
        ("3.5", "3.5"),
        ("5.", "5"),
        (".5", ".5"),
        ("u.s.a.", "usa"),
        ("St. Louis", "st louis"),
        ("10.a.m.", "10am"),
        # one missing apostrophe is mended; words that only look like contractions are left
        ("dont", "don't"),
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("y'alld've", "y'all'd've"),
        ("twas", "'twas"),
        ("DONT", "don't"),
        ("its", "its"),
        ("Im", "im"),
        ("shes", "shes"),
        ("somebody'd", "somebodyd"),
        ("don't", "don't"),
    ],
)
def test_normalised_answers(answer, normal):
    assert normalize_answer(answer) == normal


def test_the_two_halves():
    assert normalize_punctuation("The T-Shirt.") == "The T Shirt"
    assert normalize_words("  The T-Shirt. ") == "t-shirt."
    assert normalize_words("the one") == "1"  # the number word is no article
    # The official script passes a regex flag of value 32 as the count.
    assert normalize_punctuation("." * 40 + "a") == "." * 8 + "a"


def accuracy(said, answers, **options):
    return vqa_accuracy({"q": said}, {"q": answers}, **options)["accuracy"]


@pytest.mark.parametrize(
    ("matches", "expected"),
    # of 10: an annotator who agrees sees one match fewer than one who does not
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0), (10, 1.0)],
)
def test_one_annotator_is_left_out_by_position(matches, expected):
    assert accuracy("red", ["red"] * matches + ["blue"] * (10 - matches)) == pytest.approx(expected)
    assert accuracy("red", ["blue"] * (10 - matches) + ["red"] * matches) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("said", "answers", "official", "lavis", "always"),
    [
        # all agree: the official script compares as it stands, after stripping
        ("two", ["2"] * 10, 0, 1, 1),
        ("Red", ["red"] * 10, 0, 1, 1),
        (" red\n", ["red"] * 10, 1, 1, 1),
        ("t-shirt", ["t-shirt"] * 10, 1, 0, 1),
        ("two", ["two"] * 10, 1, 0, 1),
        # they do not: LAVIS leaves case, numbers and articles of the answers alone
        ("2", ["two"] * 5 + ["three"] * 5, 1, 0, 1),
        ("dog", ["the dog"] * 5 + ["cat"] * 5, 1, 0, 1),
        ("t-shirt", ["t-shirt"] * 5 + ["shirt"] * 5, 1, 1, 1),
        ("red", ["red"] * 5 + ["red "] * 5, 1, 1, 1),
        ("Red", ["Red"] * 5 + ["Red "] * 5, 1, 0, 1),  # one answer, once stripped
    ],
)
def test_the_three_variants(said, answers, official, lavis, always):
    got = [accuracy(said, answers, variant=variant) for variant in ("official", "lavis", "always")]
    assert got == pytest.approx([official, lavis, always])
    assert accuracy(said, answers) == got[0]


def test_each_answer_type_has_its_accuracy():
    said = {1: "yes", 2: "no", 3: "2", 4: "red"}
    answers = {1: ["yes"] * 10, 2: ["yes"] * 10, 3: ["2"] * 2 + ["3"] * 8, 4: ["red"] * 4 + ["blue"] * 6}
    types = {1: "yes/no", 2: "yes/no", 3: "number", 4: "other"}
    want = {"accuracy": (1 + 0 + 0.6 + 1) / 4, "yes/no": 0.5, "number": 0.6, "other": 1.0}
    assert vqa_accuracy(said, answers, types) == pytest.approx(want)
    assert vqa_accuracy(said, answers) == pytest.approx({"accuracy": 0.65})


def test_aokvqa_leaves_nobody_out_and_compares_as_it_stands():
    answers = {i: ["red"] * i + ["Red"] * (10 - i) for i in range(5)}
    got = [aokvqa_direct_answer({i: "red"}, {i: truths})["accuracy"] for i, truths in answers.items()]
    assert got == pytest.approx([0, 1 / 3, 2 / 3, 1, 1])
    assert aokvqa_direct_answer(dict.fromkeys(answers, "red"), answers)["accuracy"] == pytest.approx(3 / 5)


def test_exact_match_normalises_both_sides():
    answers = {1: ["2"], 2: ["The T-shirt"], 3: ["red", "dark red"], 4: ["no"]}
    said = {1: "two", 2: "t shirt.", 3: "dark  red", 4: "none"}
    assert exact_match(said, answers) == {"accuracy": 0.75}


@pytest.mark.parametrize("score", [vqa_accuracy, aokvqa_direct_answer, exact_match])
@pytest.mark.parametrize(
    ("predictions", "answers", "message"),
    [
        ({}, {"q": ["a"] * 4}, "there are none"),
        ({"q": "a", "r": "b"}, {"q": ["a"] * 4}, "1 ids have a prediction but no list of answers: 'r'"),
        ({"q": "a"}, {"q": ["a"] * 4, "r": ["b"] * 4}, "1 ids have a list of answers but no prediction: 'r'"),
        ({"q": 2}, {"q": ["2"] * 4}, "question 'q': got 2, wanted one answer as text"),
        ({"q": "a"}, {"q": "aaaa"}, "question 'q': got 'aaaa', wanted a list of texts"),
        ({"q": "a"}, {"q": []}, r"question 'q': got \[\]"),
        ({"q": "a"}, {"q": ["a", "a", "a", 1]}, "question 'q': got .*, wanted a list of texts"),
    ],
)
def test_what_cannot_be_scored_is_named(score, predictions, answers, message):
    with pytest.raises(UserError, match=message):
        score(predictions, answers)


def test_too_few_annotators_and_unknown_variants_are_refused():
    with pytest.raises(UserError, match=r"question 'q': got 3 answers, wanted at least 4.*exact_match"):
        accuracy("a", ["a"] * 3)
    with pytest.raises(UserError, match='variant: got "new", wanted one of official, lavis, always'):
        accuracy("a", ["a"] * 10, variant="new")
    with pytest.raises(UserError, match="1 ids have a prediction but no answer type: 'q'"):
        accuracy("a", ["a"] * 10, answer_types={})
