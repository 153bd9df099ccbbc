"""VQA accuracy with the official answer normaliser, and its relatives for A-OKVQA and GQA.

Source: Antol et al. 2015 (arXiv:1505.00468) and the evaluation script of the VQA challenge, whose quirks are
kept because all published figures have them. Accuracies are fractions in 0..1; the official script prints
them times 100, rounded to 2 decimals.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

from openblip.config import UserError
from openblip.eval.metrics import require_same_ids

Variant = Literal["official", "lavis", "always"]

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_NUMBERS = {"none": "0"} | {word: str(n) for n, word in enumerate(_DIGITS)}
_ARTICLES = frozenset(["a", "an", "the"])
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
    he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've
    mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
    they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
    who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
    y'all'd've y'all'll you'd you'd've you'll you're you've
"""
# Mended where exactly one apostrophe is missing ("dont", "couldn'tve"). One entry of the official table is
# the wrong way round, and stays so here.
_MENDED = {
    form[:i] + form[i + 1 :]: form
    for form in _CONTRACTIONS.split()
    for i, character in enumerate(form)
    if character == "'"
} | {"somebody'd": "somebodyd"}


def normalize_punctuation(answer: str) -> str:
    """The first half of the official normaliser: 21 punctuation marks and the full stop.

    A mark is deleted where it stands beside a space anywhere in the answer, or where the answer has a comma
    between digits; otherwise it becomes a space. Then full stops that no digit follows are deleted, the
    first 32 of them: the official script passes a regex flag, whose value is 32, where the count belongs.
    """
    has_thousands = re.search(r"\d,\d", answer) is not None
    text = answer
    for mark in _PUNCTUATION:
        is_loose = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if is_loose or has_thousands else " ")
    return re.sub(r"\.(?!\d)", "", text, count=32)


def normalize_words(answer: str) -> str:
    """The second half: lower case, number words to digits, no articles, apostrophes mended, single spaces."""
    words = [_NUMBERS.get(word, word) for word in answer.lower().split()]
    return " ".join(_MENDED.get(word, word) for word in words if word not in _ARTICLES)


def normalize_answer(answer: str) -> str:
    """`answer` as the VQA challenge compares it: "A dog, and two cats!" becomes "dog and 2 cats"."""
    return normalize_words(normalize_punctuation(_one_line(answer)))


def vqa_accuracy(
    predictions: Mapping[str, str],
    answers: Mapping[str, Sequence[str]],
    answer_types: Mapping[str, str] | None = None,
    variant: Variant = "official",
) -> dict[str, float]:
    """VQA accuracy: for each annotator min(1, matches among the others / 3); the mean of these; the mean of
    all.

    One is left out by position, so others who gave the same answer count. The formula serves VQAv2, VizWiz,
    TextVQA and OK-VQA (5 annotators, listed twice; published OK-VQA figures often lemmatise the predictions
    before).

    Three normalisations are in use and differ by 0.001 to 0.003:

    - "official": prediction and answers are normalised where the annotators disagree; where all gave one
      answer, the prediction must be that answer as it stands.
    - "lavis": the prediction is always normalised; the answers lose their punctuation only, and only where
      the annotators disagree (LAVIS, and the official script at first).
    - "always": both are always normalised (OpenFlamingo).

    Args:
        predictions: question id -> answer.
        answers: question id -> the answers of the annotators (10 in VQAv2, at least 4: of fewer, with one
            left out, no prediction could score 1), for exactly the ids of `predictions`.
        answer_types: question id -> its type, in VQAv2 "yes/no", "number" or "other".
        variant: one of the three.

    Returns:
        "accuracy" and, with `answer_types`, the accuracy of each type under its name.

    Raises:
        UserError: nothing to score, ids that do not agree, fewer than 4 answers, a value that is not text.
    """
    if variant not in get_args(Variant):
        raise UserError(f'variant: got "{variant}", wanted one of {", ".join(get_args(Variant))}')
    _check(predictions, answers)
    if answer_types is not None:
        require_same_ids(predictions, answer_types, "answer type")
    scores: dict[str, list[float]] = {"accuracy": []}
    for question, prediction in predictions.items():
        if (n := len(answers[question])) < 4:
            raise UserError(
                f"question {question!r}: got {n} answers, wanted at least 4, for one is left out "
                "(for questions with one right answer there is exact_match)"
            )
        said, truths = _normalized(prediction, list(answers[question]), variant)
        matches = truths.count(said)
        score = sum(min(1.0, (matches - (truth == said)) / 3) for truth in truths) / n
        scores["accuracy"].append(score)
        if answer_types is not None:
            scores.setdefault(answer_types[question], []).append(score)
    return {name: sum(values) / len(values) for name, values in scores.items()}


def aokvqa_direct_answer(
    predictions: Mapping[str, str], answers: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """A-OKVQA's direct-answer "accuracy": min(1, matches / 3), nobody left out, strings compared as they
    stand.

    Source: Schwenk et al. 2022 (arXiv:2206.01718) and its evaluation script. Errors are those of
    `exact_match`.
    """
    return _mean(predictions, answers, lambda said, truths: min(1.0, list(truths).count(said) / 3))


def exact_match(predictions: Mapping[str, str], answers: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Share of predictions equal to one of their answers, both normalised ("accuracy"): GQA, multiple choice.

    Raises:
        UserError: nothing to score, ids that do not agree, a question without an answer, a value that is not
            text.
    """
    return _mean(
        predictions,
        answers,
        lambda said, truths: float(normalize_answer(said) in map(normalize_answer, truths)),
    )


def _mean(
    predictions: Mapping[str, str],
    answers: Mapping[str, Sequence[str]],
    score: Callable[[str, Sequence[str]], float],
) -> dict[str, float]:
    _check(predictions, answers)
    return {"accuracy": sum(score(said, answers[q]) for q, said in predictions.items()) / len(predictions)}


def _check(predictions: Mapping[str, str], answers: Mapping[str, Sequence[str]]) -> None:
    require_same_ids(predictions, answers, "list of answers")
    for question, said in predictions.items():
        if not isinstance(said, str):
            raise UserError(f"prediction for question {question!r}: got {said!r}, wanted one answer as text")
        truths = answers[question]
        if isinstance(truths, str) or not truths or not all(isinstance(truth, str) for truth in truths):
            raise UserError(f"answers of question {question!r}: got {truths!r}, wanted a list of texts")


def _normalized(said: str, truths: list[str], variant: Variant) -> tuple[str, list[str]]:
    if variant == "lavis":
        are_agreed = len(set(truths)) == 1
        return normalize_answer(said), truths if are_agreed else [normalize_punctuation(t) for t in truths]
    said, truths = _one_line(said), [_one_line(truth) for truth in truths]
    if variant == "official" and len(set(truths)) == 1:
        return said, truths
    return normalize_answer(said), [normalize_answer(truth) for truth in truths]


def _one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()
