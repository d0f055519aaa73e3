"""Word overlap of generated and reference reports, as the COCO caption evaluation computes it.

Reports are scored as they stand, split at white space: the spec's cleaning has set words and stops apart, so
that no other tokenizer comes between a model's target and its score."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from medxray.metrics import Metric, StudyMean
from medxray.types import MedxrayError

ORDERS = 4
"""Longest n-gram of BLEU and CIDEr."""
BETA_SQUARED = 1.2**2
"""What recall weighs against precision in ROUGE-L."""
SIGMA = 6.0
"""Standard deviation of CIDEr's penalty on a difference of lengths, in bigrams."""
_TOGETHER = 2000
"""References that one integer holds."""
_CANDIDATES = 20_000
"""Constant reports that are judged at once."""


class Bleu(Metric):
    """BLEU-1 to BLEU-4 of the corpus, not smoothed (Papineni et al., ACL 2002).

    Statistics: words predicted, words in the reference, then for n = 1..4 the n-grams predicted and those of
    them that the reference holds as often.
    """

    values = tuple(f"bleu-{n + 1}" for n in range(ORDERS))

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        n, orders = len(references), _ngrams([*predictions, *references])
        lengths = [grams.lengths() for grams in orders]
        columns = [lengths[0][:n], lengths[0][n:], *(length[:n] for length in lengths)]
        for grams in orders:
            ours, theirs = grams.shared(n)
            common = np.minimum(grams.count[ours], grams.count[theirs])
            columns.append(np.bincount(grams.document[ours], common, n))
        return np.stack(columns, axis=1)

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
    """ROUGE-L: F-measure (beta 1.2) of the longest common word sequence, mean over studies (Lin, 2004).

    As in COCO's, words are parted at each single space, so that two spaces have an empty word between them.
    """

    values = ("rouge-l",)

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        pairs = zip(predictions, references, strict=True)
        scores = [_Sequences([reference]).rouge(prediction) for prediction, reference in pairs]
        return np.concatenate([np.empty(0), *scores])[:, None]


class Cider(StudyMean):
    """CIDEr, the COCO evaluation's CIDEr-D without stemming, mean over studies (Vedantam et al., CVPR 2015).

    The weight of an n-gram comes from the references of all studies that are scored. A subset or a resample keeps the
    weights of the whole, so its value is the mean of its studies' own; scored apart, a subset has weights of its own.
    With one study every weight, and so the score, is 0.
    """

    values = ("cider",)

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        n, orders = len(references), _ngrams([*predictions, *references])
        total = np.zeros(n)
        for grams in orders:
            weight, norm = grams.tf_idf(n)
            ours, theirs = grams.shared(n)
            product = np.minimum(weight[ours], weight[theirs]) * weight[theirs]
            norms = norm[:n] * norm[n:]
            total += np.bincount(grams.document[ours], product, n) / np.where(norms, norms, 1)
        lengths = orders[1].lengths()
        return (10 / ORDERS * total * _alike(lengths[:n], lengths[n:]))[:, None]


def _alike(lengths: np.ndarray, others: np.ndarray) -> np.ndarray:
    """CIDEr's factor for texts of different lengths, in bigrams."""
    factor: np.ndarray = np.exp(-((lengths - others) ** 2) / (2 * SIGMA**2))
    return factor


@dataclass(frozen=True)
class _Ngrams:
    """The distinct n-grams of D documents, for one n: an entry for each document and n-gram in it, documents ascending.

    Attributes:
        documents: D.
        document, gram, count: (T,) whose entry it is, the n-gram's number, how often the document has it.
    """

    documents: int
    document: np.ndarray
    gram: np.ndarray
    count: np.ndarray

    def lengths(self) -> np.ndarray:
        """How many n-grams each document has (D,)."""
        return np.bincount(self.document, self.count, self.documents)

    def shared(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Of n predictions and then their n references: the predictions' entries whose n-gram the reference has too, and
        the references' entries for them."""
        if self.documents != 2 * n:
            raise MedxrayError(f"expected a prediction a reference, found {self.documents - n} predictions, {n} references")
        grams, first = 1 + self.gram.max(initial=0), np.searchsorted(self.document, n)
        key = self.document * grams + self.gram
        _, ours, theirs = np.intersect1d(key[:first], key[first:] - n * grams, assume_unique=True, return_indices=True)
        return ours, first + theirs

    def tf_idf(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Entries' weights (T,), by how many of the last n documents have the n-gram, and documents' norms (D,)."""
        first = np.searchsorted(self.document, self.documents - n)
        holders = np.bincount(self.gram[first:], minlength=1 + self.gram.max(initial=0))
        weight = self.count * (np.log(n) - np.log(np.maximum(holders, 1)))[self.gram]
        return weight, np.sqrt(np.bincount(self.document, weight**2, self.documents))

    def matches(self, n: int, value: np.ndarray, column: np.ndarray) -> np.ndarray:
        """How much each of the first n documents has in common with the others: n-grams as often as both have them.

        The j-th occurrence of an n-gram is matched in all that hold it at least j times, so that one table of occurrences
        serves all n, whatever the number of others.

        Args:
            n: how many documents are compared with the others.
            value: (T,) what a match with an entry counts.
            column: (D,) where matches with a document are added up.

        Returns:
            (n, columns).
        """
        entry = np.repeat(np.arange(len(self.count)), self.count)
        nth = np.arange(len(entry)) - np.repeat(np.cumsum(self.count) - self.count, self.count)
        key = self.gram[entry] * (1 + self.count.max(initial=0)) + nth
        number = np.unique(key, return_inverse=True)[1]
        document, kinds, columns = self.document[entry], 1 + number.max(initial=0), 1 + column.max(initial=0)
        first = np.searchsorted(document, n)
        own = sparse.csr_array((np.ones(first), (document[:first], number[:first])), shape=(n, kinds))
        table = sparse.csr_array(
            (value[entry][first:], (number[first:], column[document[first:]])), shape=(kinds, columns)
        )
        return (own @ table).toarray()


def _ngrams(documents: Sequence[str]) -> list[_Ngrams]:
    """The n-grams of documents for n = 1..4."""
    split = [text.split() for text in documents]
    number: dict[str, int] = {}
    words = np.array([number.setdefault(word, len(number)) for text in split for word in text], dtype=np.int64)
    document = np.repeat(np.arange(len(split)), [len(text) for text in split])
    found, gram = [], words
    for n in range(ORDERS):
        if n:
            # Numbers of n-grams stay below the count of words, so that the product fits.
            inside = document[n:] == document[:-n]
            gram = gram[: len(gram) - 1] * (1 + len(number)) + words[n:]
            gram = np.unique(gram, return_inverse=True)[1]
        else:
            inside = np.ones(len(words), dtype=bool)
        grams = 1 + gram.max(initial=0)
        key, count = np.unique(document[: len(gram)][inside] * grams + gram[inside], return_counts=True)
        found.append(_Ngrams(len(split), key // grams, key % grams, count))
    return found


class _Sequences:
    """References in one integer, a bit a word, so that a text's longest common sequences with all of them are found at once.

    Bit-parallel (Hyyrö, AWOCA 2004). A bit that is always 0 above each reference keeps carries out of the next.
    """

    def __init__(self, references: Sequence[str]) -> None:
        self.places: dict[str, int] = {}
        self.lengths, self.starts = [], []
        place = self.whole = 0
        for reference in references:
            words = reference.split(" ")
            self.lengths.append(len(words))
            self.starts.append(place)
            self.whole |= ((1 << len(words)) - 1) << place
            for i, word in enumerate(words, place):
                self.places[word] = self.places.get(word, 0) | 1 << i
            place += len(words) + 1
        self.bytes = -(-place // 8)

    def rouge(self, text: str) -> np.ndarray:
        """ROUGE-L of the text with each reference."""
        words = text.split(" ")
        left = self.whole
        for word in words:
            matched = left & self.places.get(word, 0)
            left = ((left + matched) | (left - matched)) & self.whole
        used = np.frombuffer((self.whole ^ left).to_bytes(self.bytes, "little"), np.uint8)
        common = np.add.reduceat(np.unpackbits(used, bitorder="little"), self.starts, dtype=np.int64)
        precision, recall = common / len(words), common / np.array(self.lengths)
        weighted = recall + BETA_SQUARED * precision
        score: np.ndarray = (1 + BETA_SQUARED) * precision * recall / np.where(weighted, weighted, 1)
        return score


def best_constant(train_reports: Sequence[str], references: Sequence[str], metric: str = "bleu-4") -> str:
    """The training report that scores best when it is given for every study: a floor that needs no image.

    Args:
        train_reports: candidates, cleaned; of those that score the same the first is taken.
        references: the cleaned reports to score against.
        metric: "bleu-1" to "bleu-4", of the corpus, "rouge-l" or "cider".

    Raises:
        MedxrayError: no candidates, no references or another metric.
    """
    known = (*Bleu.values, *RougeL.values, *Cider.values)
    if metric not in known:
        raise MedxrayError(f"best constant report: unknown metric {metric!r}; expected one of {', '.join(known)}")
    if not train_reports or not references:
        what = "references" if train_reports else "training reports"
        raise MedxrayError(f"best constant report: no {what}; give at least one")
    candidates = list(dict.fromkeys(train_reports))
    parts = [candidates[i : i + _CANDIDATES] for i in range(0, len(candidates), _CANDIDATES)]
    if metric in Bleu.values:
        scores = [_constant_bleu(part, references)[:, Bleu.values.index(metric)] for part in parts]
    else:
        judge = _constant_rouge if metric in RougeL.values else _constant_cider
        scores = [judge(part, references) for part in parts]
    return candidates[int(np.concatenate(scores).argmax())]


def _constant_bleu(candidates: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """BLEU of each candidate, given for every reference: (candidates, 4)."""
    n, orders = len(candidates), _ngrams([*candidates, *references])
    lengths = [grams.lengths() for grams in orders]
    expected = np.full(n, lengths[0][n:].sum())
    columns = [lengths[0][:n] * len(references), expected, *(length[:n] * len(references) for length in lengths)]
    together = np.zeros(n + len(references), dtype=np.int64)
    columns += [grams.matches(n, np.ones(len(grams.gram)), together)[:, 0] for grams in orders]
    return _corpus_bleu(np.stack(columns, axis=1))


def _constant_rouge(candidates: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """ROUGE-L of each candidate, given for every reference: (candidates,)."""
    parts = [_Sequences(references[i : i + _TOGETHER]) for i in range(0, len(references), _TOGETHER)]
    return np.array([sum(part.rouge(text).sum() for part in parts) for text in candidates]) / len(references)


def _constant_cider(candidates: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """CIDEr of each candidate, given for every reference: (candidates,)."""
    n, orders = len(candidates), _ngrams([*candidates, *references])
    lengths = orders[1].lengths()
    distinct, column = np.unique(lengths, return_inverse=True)
    total = np.zeros((n, len(distinct)))
    for grams in orders:
        weight, norm = grams.tf_idf(len(references))
        norm = np.where(norm, norm, 1)
        total += grams.matches(n, weight**2 / grams.count / norm[grams.document], column) / norm[:n, None]
    score: np.ndarray = (total * _alike(lengths[:n, None], distinct)).sum(axis=1) * 10 / ORDERS / len(references)
    return score
