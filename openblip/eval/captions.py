"""BLEU-1..4, ROUGE-L and CIDEr-D of captions, as the COCO evaluation computes them, without Java.

Sources: BLEU, Papineni et al. 2002; ROUGE-L, Lin 2004; CIDEr-D, Vedantam et al. 2015 (arXiv:1411.5726); the
constants and conventions are those of the COCO caption evaluation (Chen et al. 2015, arXiv:1504.00325), with
which every function here agrees to 1e-6. A caption is a list of tokens (`ptb.tokenize`); `references[i]` are
the human captions of the image that `captions[i]` describes.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from openblip.config import UserError
from openblip.eval.metrics import require_same_ids
from openblip.eval.ptb import tokenize

Tokens = Sequence[str]
Ngram = tuple[str, ...]

_ORDER = 4  # the longest n-gram of BLEU and CIDEr-D
_TINY, _SMALL = 1e-15, 1e-9  # keep the quotients of BLEU finite
_BETA = 1.2  # ROUGE-L: recall weighs this much more than precision
_SIGMA = 6.0  # CIDEr-D: width of the penalty on the difference in length


def caption_scores(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Scores of one written caption per image against the image's human captions, all of it raw text.

    CIDEr-D weighs n-grams by their rarity among the references given: figures of different sets, or of a
    part and the whole, cannot be compared, and the CIDEr-D of a single image is 0.

    Args:
        predictions: image id -> caption; an empty caption is allowed and scores 0.
        references: image id -> one or more captions, for exactly the ids of `predictions`.

    Returns:
        "bleu@1".."bleu@4" and "rouge_l" in 0..1, "cider" (CIDEr-D) in 0..10; papers print them times 100.

    Raises:
        UserError: nothing to score, ids that do not agree, an image without references, a value not text.
    """
    require_same_ids(predictions, references, "reference")
    for image, caption in predictions.items():
        if not isinstance(caption, str):
            raise UserError(f"prediction of image {image!r}: got {caption!r}, wanted one caption as text")
        texts = references[image]
        if isinstance(texts, str) or not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(f"references of image {image!r}: got {texts!r}, wanted a list of captions")
    captions = [tokenize(caption) for caption in predictions.values()]
    truths = [[tokenize(text) for text in references[image]] for image in predictions]
    rouge, cider = rouge_l(captions, truths), cider_d(captions, truths)
    return {
        **{f"bleu@{n}": score for n, score in enumerate(bleu(captions, truths), 1)},
        "rouge_l": sum(rouge) / len(rouge),
        "cider": sum(cider) / len(cider),
    }


def bleu(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """BLEU-1..4 of the whole corpus with the closest reference length: four numbers in 0..1."""
    correct, guessed = [0] * _ORDER, [0] * _ORDER
    caption_length = reference_length = 0
    for caption, texts in zip(captions, references, strict=True):
        length = len(_words(caption))
        caption_length += length
        # Between two references equally far off, the shorter one.
        reference_length += min((abs(n - length), n) for n in (len(_words(text)) for text in texts))[1]
        allowed: Counter[Ngram] = Counter()
        for text in texts:
            allowed |= _ngrams(text)
        for ngram, count in _ngrams(caption).items():
            correct[len(ngram) - 1] += min(count, allowed[ngram])
        for n in range(_ORDER):
            guessed[n] += max(0, length - n)
    ratio = (caption_length + _TINY) / (reference_length + _SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = [], 1.0
    for n in range(_ORDER):
        product *= (correct[n] + _TINY) / (guessed[n] + _SMALL)
        scores.append(product ** (1 / (n + 1)) * brevity)
    return scores


def rouge_l(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """ROUGE-L of each image in 0..1: the F-measure (beta 1.2) of its best precision and its best recall.

    The two may come from different references: that is the COCO convention.
    """
    scores = []
    for caption, texts in zip(captions, references, strict=True):
        # An empty caption is one empty word there, for so an empty string splits at spaces.
        hypothesis, truths = caption or [""], [text or [""] for text in texts]
        common = [_longest_common_subsequence(hypothesis, truth) for truth in truths]
        precision = max(common) / len(hypothesis)
        recall = max(length / len(truth) for length, truth in zip(common, truths, strict=True))
        weighted = recall + _BETA**2 * precision
        scores.append((1 + _BETA**2) * precision * recall / weighted if weighted else 0.0)
    return scores


def cider_d(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """CIDEr-D of each image in 0..10; the rarity of an n-gram is counted over all `references`."""
    counts = [[_ngrams(text) for text in texts] for texts in references]
    images_with = Counter(ngram for texts in counts for ngram in set().union(*texts))
    log_images = math.log(max(1, len(references)))

    def weigh(count: Counter[Ngram]) -> tuple[dict[Ngram, float], list[float], int]:
        """Frequency x rarity of each n-gram, the norm of these weights for each n, the number of bigrams."""
        weights = {g: k * (log_images - math.log(max(1, images_with[g]))) for g, k in count.items()}
        norms = [0.0] * _ORDER
        for ngram, weight in weights.items():
            norms[len(ngram) - 1] += weight**2
        bigrams = sum(k for ngram, k in count.items() if len(ngram) == 2)
        return weights, [math.sqrt(norm) for norm in norms], bigrams

    scores = []
    for caption, texts in zip(captions, counts, strict=True):
        weights, norms, length = weigh(_ngrams(caption))
        total = 0.0
        for text in texts:
            true_weights, true_norms, true_length = weigh(text)
            cosines = [0.0] * _ORDER
            for ngram, weight in weights.items():
                truth = true_weights.get(ngram, 0.0)
                cosines[len(ngram) - 1] += min(weight, truth) * truth  # clipped: repetition gains nothing
            for n in range(_ORDER):
                if norms[n] and true_norms[n]:
                    cosines[n] /= norms[n] * true_norms[n]
            # Lengths in bigrams, as published; their difference is that in words.
            penalty = math.exp(-((length - true_length) ** 2) / (2 * _SIGMA**2))
            total += sum(cosines) / _ORDER * penalty
        scores.append(10.0 * total / len(texts))
    return scores


def _words(tokens: Tokens) -> list[str]:
    """The published BLEU and CIDEr-D split at every white space, so also inside our one token "1\\xa01/2"."""
    return " ".join(tokens).split()


def _ngrams(tokens: Tokens) -> Counter[Ngram]:
    words = _words(tokens)
    return Counter(tuple(words[i : i + n]) for n in range(1, _ORDER + 1) for i in range(len(words) - n + 1))


def _longest_common_subsequence(a: Tokens, b: Tokens) -> int:
    row = [0] * (len(b) + 1)  # row[j]: its length for the words of `a` so far and the first j of `b`
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]
