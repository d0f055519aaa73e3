"""Word overlap of generated and reference reports, as the COCO caption evaluation computes it.

Reports are scored as they stand, split at white space: the spec's cleaning has set words and stops apart, so
that no other tokenizer comes between a model's target and its score."""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider_scorer import CiderScorer
from pycocoevalcap.rouge.rouge import Rouge

from medxray.metrics import Metric, StudyMean
from medxray.types import MedxrayError

ORDERS = 4
"""Longest n-gram of BLEU and CIDEr."""


class Bleu(Metric):
    """BLEU-1 to BLEU-4 of the corpus, not smoothed (Papineni et al., ACL 2002).

    Statistics: words predicted, words in the reference, then for n = 1..4 the n-grams predicted and those of
    them that the reference holds as often.
    """

    values = tuple(f"bleu-{n + 1}" for n in range(ORDERS))

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        scorer = BleuScorer(n=ORDERS)
        for prediction, reference in zip(predictions, references, strict=True):
            scorer += (prediction, [reference])
        rows = [(c["testlen"], *c["reflen"], *c["guess"], *c["correct"]) for c in scorer.ctest]
        return np.array(rows, dtype=np.float64).reshape(len(rows), 2 + 2 * ORDERS)

    def reduce(self, statistics: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return _corpus_bleu(weights @ statistics)


def _corpus_bleu(totals: np.ndarray) -> np.ndarray:
    """(R, 10) sums of `Bleu` statistics -> (R, 4), guarded against division by zero as in COCO's."""
    tiny, small = 1e-15, 1e-9
    predicted, expected = totals[:, 0], totals[:, 1]
    guesses, correct = totals[:, 2 : 2 + ORDERS], totals[:, 2 + ORDERS :]
    precision = np.cumprod((correct + tiny) / (guesses + small), axis=1)
    ratio = (predicted + tiny) / (expected + small)
    brevity = np.exp(np.minimum(1 - 1 / ratio, 0))
    bleu: np.ndarray = precision ** (1 / np.arange(1, ORDERS + 1)) * brevity[:, None]
    return bleu


class RougeL(StudyMean):
    """ROUGE-L: F-measure (beta 1.2) of the longest common word sequence, mean over studies (Lin, 2004)."""

    values = ("rouge-l",)

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        rouge = Rouge()
        pairs = zip(predictions, references, strict=True)
        return np.array([[rouge.calc_score([p], [r])] for p, r in pairs], dtype=np.float64).reshape(-1, 1)


class Cider(StudyMean):
    """CIDEr, the COCO evaluation's CIDEr-D without stemming, mean over studies (Vedantam et al., CVPR 2015).

    The weight of a word comes from the references of all studies that are scored, and stays the same in a
    resample of them. With one study every weight, and so the score, is 0.
    """

    values = ("cider",)

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        if not any(reference.split() for reference in references):
            return np.zeros((len(references), 1))
        scorer = CiderScorer(n=ORDERS)
        for prediction, reference in zip(predictions, references, strict=True):
            scorer += (prediction, [reference])
        return np.array(scorer.compute_score()[1], dtype=np.float64)[:, None]


def best_constant(train_reports: Sequence[str], references: Sequence[str], metric: str = "bleu-4") -> str:
    """The training report that scores best when it is given for every study: a floor that needs no image.

    Args:
        train_reports: candidates, cleaned; of those that score the same the first is taken.
        references: the cleaned reports to score against.
        metric: "bleu-1" to "bleu-4", of the corpus.

    Raises:
        MedxrayError: no candidates, no references or another metric.
    """
    if metric not in Bleu.values:
        known = ", ".join(Bleu.values)
        raise MedxrayError(f"best constant report: unknown metric {metric!r}; expected one of {known}")
    if not train_reports or not references:
        what = "references" if train_reports else "training reports"
        raise MedxrayError(f"best constant report: no {what}; give at least one")
    # A candidate's clipped matches over all references are a sum over its n-grams: the j-th occurrence of an
    # n-gram is matched in as many references as hold it at least j times. One table serves all candidates.
    split = [reference.split() for reference in references]
    holders = Counter(occurrence for words in split for occurrence in _occurrences(words))
    expected = sum(map(len, split))
    candidates = list(dict.fromkeys(train_reports))
    totals = np.zeros((len(candidates), 2 + 2 * ORDERS))
    for row, candidate in zip(totals, candidates, strict=True):
        words = candidate.split()
        row[0], row[1] = len(words) * len(references), expected
        for n in range(ORDERS):
            row[2 + n] = max(0, len(words) - n) * len(references)
        for ngram, occurrence in _occurrences(words):
            row[1 + ORDERS + len(ngram)] += holders.get((ngram, occurrence), 0)
    return candidates[int(_corpus_bleu(totals)[:, Bleu.values.index(metric)].argmax())]


def _occurrences(words: list[str]) -> Iterator[tuple[tuple[str, ...], int]]:
    """Every n-gram of the words with its number among its equals, from 1."""
    seen: Counter[tuple[str, ...]] = Counter()
    for n in range(1, ORDERS + 1):
        for start in range(len(words) - n + 1):
            ngram = tuple(words[start : start + n])
            seen[ngram] += 1
            yield ngram, seen[ngram]
