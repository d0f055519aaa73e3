"""How well a label's scores tell studies with it from those without; studies carry weights, so that a bootstrap needs no loop
over them."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, NamedTuple

import numpy as np
from pydantic import Field

from medxray.metrics import Metric
from medxray.types import MedxrayError

THRESHOLD = 0.5
"""Where nothing was chosen."""

_BLOCK = 64
"""Resamples at a time: what is computed of them for 3,000 studies stays in a processor's cache."""


class Ranked(NamedTuple):
    """The known studies of a label by its T distinct scores, highest first.

    Attributes:
        order: their rows (n,).
        starts: where each score begins in `order` (T,).
        scores: (T,).
        positive: whether a study has the label (n,), in the order of `order`.
    """

    order: np.ndarray
    starts: np.ndarray
    scores: np.ndarray
    positive: np.ndarray

    @classmethod
    def of(cls, scores: np.ndarray, truth: np.ndarray) -> "Ranked":
        """Scores (n,) and 1, 0 or NaN (n,); a study counts where neither is NaN."""
        known = np.flatnonzero(~np.isnan(scores) & ~np.isnan(truth))
        order = known[np.argsort(-scores[known], kind="stable")]
        ranked = scores[order]
        starts = np.flatnonzero(np.diff(ranked, prepend=np.nan) != 0)
        return cls(order, starts, ranked[starts], truth[order])

    def counts(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weights (n, R) of all studies -> those of the studies with and without the label at each score (T, R)."""
        whole = weights[self.order]
        hits = whole * self.positive[:, None]
        if len(self.starts) < len(self.order):
            whole, hits = (np.add.reduceat(part, self.starts, axis=0) for part in (whole, hits))
        return hits, whole - hits


class LabelMean(Metric):
    """A mean over labels of a number that follows from a label's scores.

    Predictions are K scores a study, references K labels: 1, 0, and NaN, None or -1 (uncertain) for those left out, as is a
    score of NaN. The number is undefined for a label without studies of the classes that it needs; the mean is that of the
    other labels, in a resample too, and undefined with none.

    Statistics: the K scores, then the K labels.

    Attributes:
        measure: the mean's name; a label's own is `measure/label`.
        needs: whether studies with the label, and studies without it, must be there.
    """

    takes = "labels"
    measure: str
    needs: ClassVar[tuple[bool, bool]] = (True, True)

    def __init__(self) -> None:
        super().__init__()
        self.labels = []

    @property
    def labels(self) -> list[str]:
        """Names of the K labels; once set, the values hold the mean and then each label's own."""
        return self._labels

    @labels.setter
    def labels(self, names: Sequence[str]) -> None:
        self._labels = list(names)
        self.values = (self.measure, *(f"{self.measure}/{name}" for name in self._labels))

    def statistics(
        self, predictions: Sequence[Sequence[float]], references: Sequence[Sequence[float | None]]
    ) -> np.ndarray:
        scores = np.array(predictions, dtype=np.float64)
        truth = np.array(references, dtype=np.float64)
        width = len(self.labels) or (scores.shape[1] if scores.ndim == 2 else 0)
        if not scores.shape == truth.shape == (len(predictions), width):
            raise MedxrayError(
                f"{self.measure}: expected predictions and references of shape ({len(predictions)}, "
                f"{width or 'labels'}), found {scores.shape} and {truth.shape}"
            )
        return np.concatenate([scores, np.where((truth == 0) | (truth == 1), truth, np.nan)], axis=1)

    def reduce(self, statistics: np.ndarray, weights: np.ndarray) -> np.ndarray:
        ranked = [Ranked.of(*columns) for columns in zip(*np.split(statistics.T, 2), strict=True)]
        each = np.full((len(weights), len(ranked)), np.nan)
        for start in range(0, len(weights), _BLOCK):
            block = np.ascontiguousarray(weights[start : start + _BLOCK].T)
            for k, label in enumerate(ranked):
                if not len(label.order):
                    continue
                hits, alarms = label.counts(block)
                there = [counts.sum(axis=0) > 0 for counts in (hits, alarms)]
                defined = np.logical_or(*there)
                for needed, found in zip(self.needs, there, strict=True):
                    defined &= found if needed else True
                with np.errstate(invalid="ignore", divide="ignore"):
                    each[start : start + _BLOCK, k] = np.where(defined, self.value(label.scores, hits, alarms), np.nan)
        defined = ~np.isnan(each)
        with np.errstate(invalid="ignore"):
            mean = np.where(defined, each, 0).sum(axis=1) / defined.sum(axis=1)
        return np.column_stack([mean, each] if self.labels else [mean])

    @abstractmethod
    def value(self, scores: np.ndarray, hits: np.ndarray, alarms: np.ndarray) -> np.ndarray:
        """A label's number for R weightings of its studies (R,).

        Args:
            scores: the T distinct ones, highest first.
            hits, alarms: summed weights (T, R) of the studies at each score that have the label, and that don't.
        """


class AUROC(LabelMean):
    """Area under the ROC curve, ties counted half, mean over labels."""

    measure = "auroc"

    def value(self, scores: np.ndarray, hits: np.ndarray, alarms: np.ndarray) -> np.ndarray:
        # A negative study is beaten by the positives above it and by half of those beside it.
        found = np.cumsum(hits, axis=0)
        beaten = np.einsum("tr,tr->r", alarms, found - hits / 2)
        area: np.ndarray = beaten / (found[-1] * alarms.sum(axis=0))
        return area


class AveragePrecision(LabelMean):
    """Precision at each distinct score weighted by the recall that it adds, mean over labels."""

    measure = "average-precision"

    def value(self, scores: np.ndarray, hits: np.ndarray, alarms: np.ndarray) -> np.ndarray:
        found = np.cumsum(hits, axis=0)
        flagged = found + np.cumsum(alarms, axis=0)
        # Where nothing is flagged yet no recall is added either.
        precision = found / np.maximum(flagged, 1e-300)
        area: np.ndarray = np.einsum("tr,tr->r", hits, precision) / found[-1]
        return area


class F1(LabelMean):
    """F1 of saying that a label is there where its score is at least a threshold, mean over labels.

    Each label has its own threshold, which validation studies decide: the one with the highest F1 among 0.5, the lowest
    score and the middles between neighbouring scores; of several the one nearest to 0.5, of two as near the lower. It is
    0.5 for a label that no validation study has, and where nothing was chosen. F1 is undefined for a label that no study
    has.

    Statistics: what is said of the K labels, 1 or 0, then the K labels.
    """

    measure = "f1"
    needs = (True, False)
    chooses = True

    def choose(self, predictions: Sequence[Sequence[float]], references: Sequence[Sequence[float | None]]) -> None:
        scores, truth = np.split(super().statistics(predictions, references).T, 2)
        names = self.labels or [str(k) for k in range(len(scores))]
        self.chosen = dict(zip(names, map(best_threshold, scores, truth), strict=True))

    def statistics(
        self, predictions: Sequence[Sequence[float]], references: Sequence[Sequence[float | None]]
    ) -> np.ndarray:
        scores, truth = np.split(super().statistics(predictions, references), 2, axis=1)
        thresholds = list(self.chosen.values()) or THRESHOLD
        return np.concatenate([np.where(np.isnan(scores), np.nan, scores >= thresholds), truth], axis=1)

    def notes(self) -> list[str]:
        if not self.chosen:
            return ["f1: a label is said to be there from a score of 0.5; no threshold was chosen"]
        told = ", ".join(f"{name} {threshold:.3g}" for name, threshold in self.chosen.items())
        return [f"f1: a label is said to be there from the score that is best for it on the validation studies: {told}"]

    def value(self, scores: np.ndarray, hits: np.ndarray, alarms: np.ndarray) -> np.ndarray:
        found, false = hits[scores == 1].sum(axis=0), alarms[scores == 1].sum(axis=0)
        f1: np.ndarray = 2 * found / (found + false + hits.sum(axis=0))
        return f1


def best_threshold(scores: np.ndarray, truth: np.ndarray) -> float:
    """The threshold that `F1` chooses on scores (n,) and labels 1, 0 or NaN (n,)."""
    ranked = Ranked.of(scores, truth)
    if not ranked.positive.any():
        return THRESHOLD
    hits, alarms = ranked.counts(np.ones((len(scores), 1)))
    found, flagged = np.cumsum(hits), np.cumsum(hits + alarms)
    f1 = 2 * found / (flagged + found[-1])
    below = np.append(ranked.scores[1:], ranked.scores[-1])
    middles = (ranked.scores + below) / 2
    # Between two floats that are neighbours there is no middle.
    thresholds = np.where(middles > below, middles, ranked.scores)
    at_half = int((ranked.scores >= THRESHOLD).sum())
    thresholds = np.append(thresholds, THRESHOLD)
    f1 = np.append(f1, f1[at_half - 1] if at_half else 0.0)
    best = thresholds[f1 == f1.max()]
    return float(min(best, key=lambda threshold: (abs(threshold - THRESHOLD), threshold)))


class Sensitivity(LabelMean):
    """The best sensitivity among the thresholds at which specificity is at least a given one, mean over labels.

    A point of each label's ROC curve: its threshold is that of the studies that are scored, not one chosen before. Studies
    of one score are on one side of a threshold together, and nothing lies between two points of the curve.

    Args:
        specificity: the least; the value is called `sensitivity@0.90`.
    """

    def __init__(self, specificity: Annotated[float, Field(gt=0, le=1)] = 0.9) -> None:
        self.least = specificity
        self.measure = f"sensitivity@{_written(specificity)}"
        super().__init__()

    def notes(self) -> list[str]:
        return [f"{self.measure}: at a specificity of at least {_written(self.least)} on the studies that are scored"]

    def value(self, scores: np.ndarray, hits: np.ndarray, alarms: np.ndarray) -> np.ndarray:
        found, false = np.cumsum(hits, axis=0), np.cumsum(alarms, axis=0)
        # Counts are whole, so that a quotient equals the decimal number that it is.
        allowed = (false[-1] - false) / false[-1] >= self.least
        best: np.ndarray = np.where(allowed, found, 0).max(axis=0) / found[-1]
        return best


class Specificity(LabelMean):
    """The best specificity among the thresholds at which sensitivity is at least a given one, mean over labels; otherwise as
    `Sensitivity`.

    Args:
        sensitivity: the least; the value is called `specificity@0.90`.
    """

    def __init__(self, sensitivity: Annotated[float, Field(gt=0, le=1)] = 0.9) -> None:
        self.least = sensitivity
        self.measure = f"specificity@{_written(sensitivity)}"
        super().__init__()

    def notes(self) -> list[str]:
        return [f"{self.measure}: at a sensitivity of at least {_written(self.least)} on the studies that are scored"]

    def value(self, scores: np.ndarray, hits: np.ndarray, alarms: np.ndarray) -> np.ndarray:
        found, false = np.cumsum(hits, axis=0), np.cumsum(alarms, axis=0)
        allowed = found / found[-1] >= self.least
        best: np.ndarray = np.where(allowed, false[-1] - false, 0).max(axis=0) / false[-1]
        return best


def undefined(values: Mapping[str, float]) -> dict[str, list[str]]:
    """Measure -> labels without a value, of values called `measure` and `measure/label`."""
    found: dict[str, list[str]] = {}
    for name, value in values.items():
        measure, _, label = name.partition("/")
        if label and value != value:
            found.setdefault(measure, []).append(label)
    return found


def _written(share: float) -> str:
    """At least two decimals, as names of such values have."""
    return f"{share:.2f}" if float(f"{share:.2f}") == share else f"{share:g}"
