"""Whether a probability is the share of studies that have what it is told of."""

from typing import Annotated, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field

from medxray.metrics.classification import LabelMean, Ranked

Bins = Literal["equal-width", "equal-mass"]
_Z = 1.959963984540054  # of 95 %


class CalibrationError(LabelMean):
    """Expected calibration error: of the studies of each bin of probabilities the difference between their mean probability
    and the share that has the label, mean over all studies, then over labels; lower is better.

    As Naeini et al. (AAAI 2015) for the probability of a label; the bins are Guo et al.'s (ICML 2017).

    Args:
        bins: how many.
        by: equal-width bins are of one width, each with its upper end; equal-mass ones hold as many studies each, as far as
            equal probabilities, which stay together, let them.
    """

    measure = "ece"
    needs: ClassVar[tuple[bool, bool]] = (False, False)
    higher_is_better = False

    def __init__(self, bins: Annotated[int, Field(ge=1)] = 15, by: Bins = "equal-width") -> None:
        super().__init__()
        self.bins, self.by = bins, by

    def value(self, scores: np.ndarray, hits: np.ndarray, alarms: np.ndarray) -> np.ndarray:
        weights = hits + alarms
        excess = scores[:, None] * weights - hits
        if self.by == "equal-width":
            starts = np.flatnonzero(np.diff(_widths(scores, self.bins), prepend=-1) != 0)
            gaps = np.add.reduceat(excess, starts, axis=0)
        else:
            places = _masses(weights, self.bins) + self.bins * np.arange(weights.shape[1])
            gaps = np.bincount(places.ravel(), excess.ravel(), self.bins * weights.shape[1]).reshape(-1, self.bins).T
        error: np.ndarray = np.abs(gaps).sum(axis=0) / weights.sum(axis=0)
        return error


class Brier(LabelMean):
    """Mean squared difference of the probability from 1 or 0 (Brier, 1950), mean over labels; lower is better."""

    measure = "brier"
    needs: ClassVar[tuple[bool, bool]] = (False, False)
    higher_is_better = False

    def value(self, scores: np.ndarray, hits: np.ndarray, alarms: np.ndarray) -> np.ndarray:
        squares = (1 - scores) ** 2 @ hits + scores**2 @ alarms
        mean: np.ndarray = squares / (hits.sum(axis=0) + alarms.sum(axis=0))
        return mean


class Bin(NamedTuple):
    """A point of a reliability curve.

    Attributes:
        probability: the mean one of its studies.
        share: how many of them have the label.
        low, high: Wilson's 95 % interval of the share, as if each study were a patient's own.
        n: studies.
    """

    probability: float
    share: float
    low: float
    high: float
    n: int


def reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15, by: Bins = "equal-width") -> list[Bin]:
    """A label's reliability curve: the bins of `CalibrationError` that hold a study, by probability.

    Args:
        probabilities: (n,).
        labels: (n,), 1 and 0; others are left out.
        bins, by: as of `CalibrationError`.
    """
    ranked = Ranked.of(np.asarray(probabilities, np.float64), np.where(np.isin(labels, (0, 1)), labels, np.nan))
    hits, alarms = (counts[:, 0] for counts in ranked.counts(np.ones((len(labels), 1))))
    weights = hits + alarms
    places = _widths(ranked.scores, bins) if by == "equal-width" else _masses(weights[:, None], bins)[:, 0]
    curve = []
    for place in np.unique(places):
        own = places == place
        n, share = float(weights[own].sum()), float(hits[own].sum() / weights[own].sum())
        middle, half = share + _Z**2 / (2 * n), _Z * np.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
        low, high = ((middle + side * half) / (1 + _Z**2 / n) for side in (-1, 1))
        curve.append(Bin(float(weights[own] @ ranked.scores[own] / n), share, float(low), float(high), int(n)))
    return sorted(curve)


def _widths(scores: np.ndarray, bins: int) -> np.ndarray:
    """Bins of one width (T,): from 0, which holds [0, 1 / bins], to that of (1 - 1 / bins, 1]."""
    return np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], scores)


def _masses(weights: np.ndarray, bins: int) -> np.ndarray:
    """Bins of one mass (T, R) for weights of scores in order (T, R): where the middle of a score's own weight lies."""
    middle = np.cumsum(weights, axis=0) - weights / 2
    return np.minimum(middle * bins / weights.sum(axis=0), bins - 1).astype(np.int64)
