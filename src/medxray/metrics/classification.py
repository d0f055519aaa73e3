"""How well a label's scores rank the studies; studies carry weights, so that a bootstrap needs no loop."""

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np

from medxray.metrics import Metric
from medxray.types import MedxrayError


class _Ranking(Metric):
    """A mean over labels of a number that depends only on how a label's scores rank the studies.

    Predictions are K scores a study, references K labels: 1, 0, and NaN, None or -1 (uncertain) for those
    left out. A label without both classes has no value and is left out of the mean; with no label left
    the mean is NaN.

    Statistics: the K scores, then the K labels.
    """

    takes = "labels"
    measure: str

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
        scores, truth = np.split(statistics, 2, axis=1)
        each = np.full((len(weights), scores.shape[1]), np.nan)
        for k in range(scores.shape[1]):
            known = ~np.isnan(scores[:, k]) & ~np.isnan(truth[:, k])
            if not known.any():
                continue
            order = np.flatnonzero(known)[np.argsort(-scores[known, k], kind="stable")]
            ranked = scores[order, k]
            ties = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
            weight, positive = weights[:, order], truth[order, k]
            hits = np.add.reduceat(weight * positive, ties, axis=1)
            alarms = np.add.reduceat(weight * (1 - positive), ties, axis=1)
            both = (hits.sum(axis=1) > 0) & (alarms.sum(axis=1) > 0)
            each[both, k] = self.area(hits[both], alarms[both])
        defined = ~np.isnan(each)
        with np.errstate(invalid="ignore"):
            mean = np.where(defined, each, 0).sum(axis=1) / defined.sum(axis=1)
        return np.column_stack([mean, each] if self.labels else [mean])

    @abstractmethod
    def area(self, hits: np.ndarray, alarms: np.ndarray) -> np.ndarray:
        """Summed weights of positive and of negative studies at T distinct scores, highest first, -> (R,)."""


class AUROC(_Ranking):
    """Area under the ROC curve, ties counted half, mean over labels."""

    measure = "auroc"

    def area(self, hits: np.ndarray, alarms: np.ndarray) -> np.ndarray:
        # A negative study is beaten by the positives above it and by half of those beside it.
        beaten = (alarms * (np.cumsum(hits, axis=1) - hits / 2)).sum(axis=1)
        area: np.ndarray = beaten / (hits.sum(axis=1) * alarms.sum(axis=1))
        return area


class AveragePrecision(_Ranking):
    """Precision at each distinct score weighted by the recall that it adds, mean over labels."""

    measure = "average-precision"

    def area(self, hits: np.ndarray, alarms: np.ndarray) -> np.ndarray:
        found = np.cumsum(hits, axis=1)
        flagged = found + np.cumsum(alarms, axis=1)
        # Where nothing is flagged yet no recall is added either.
        precision = found / np.maximum(flagged, 1e-300)
        area: np.ndarray = (hits * precision).sum(axis=1) / hits.sum(axis=1)
        return area
