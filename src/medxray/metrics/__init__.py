"""Predictions and references -> scores. A metric is a sum of per-study statistics and a formula over the sum,
so that a subset or a resample costs nothing."""

import importlib
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import datasets
import evaluate
import numpy as np

from medxray.registry import Registry
from medxray.types import MedxrayError

if TYPE_CHECKING:
    from medxray.metrics.clinical import label_reports, read_report
    from medxray.metrics.findings import per_finding

__all__ = [
    "METRICS", "Metric", "StudyMean", "available", "get", "label_reports", "names", "per_finding", "read_report", "register",
]  # fmt: skip

_ALONE = 256
"""Studies reduced at once, each alone: weights of 512 KiB."""


class Metric(evaluate.Metric):
    """An `evaluate.Metric` whose value comes from per-study statistics.

    Attributes:
        values: names of the numbers it gives, such as ("bleu-1", "bleu-2").
        higher_is_better: False for errors.
        takes: "text", "labels" or "reconstruction": which predictions it scores.
        chooses: whether it has something to choose, such as a threshold, that the studies it scores must not decide.
        chosen: what that is, by label; empty before `choose`, and where nothing is chosen.
    """

    values: tuple[str, ...]
    higher_is_better: bool = True
    takes: str = "text"
    chooses: bool = False

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)
        self.chosen: dict[str, float] = {}

    def choose(self, predictions: Sequence[Any], references: Sequence[Any]) -> None:
        """Chooses on validation studies, before others are scored; most metrics have nothing to choose."""

    def notes(self) -> list[str]:
        """Sentences that a reader of the values must know."""
        return []

    def unavailable(self) -> str | None:
        """Why it cannot be computed on this machine, with the cure; None where it can."""
        return None

    @abstractmethod
    def statistics(self, predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
        """One row a study: float64 (n, S)."""

    @abstractmethod
    def reduce(self, statistics: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Values under R weightings of the studies: statistics (n, S), counts (R, n) -> (R, values)."""

    def each(self, statistics: np.ndarray) -> np.ndarray:
        """Every study's own values, as if it were alone: statistics (n, S) -> (n, values), NaN where one has none."""
        found = [np.empty((0, len(self.values)))]
        with np.errstate(invalid="ignore", divide="ignore"):
            for start in range(0, len(statistics), _ALONE):
                rows = statistics[start : start + _ALONE]
                found.append(self.reduce(rows, np.eye(len(rows))))
        return np.concatenate(found)

    def _info(self) -> evaluate.MetricInfo:
        feature = {
            "text": datasets.Value("string"),
            "labels": datasets.Sequence(datasets.Value("float32")),
            "reconstruction": datasets.Value("float32"),
        }[self.takes]
        return evaluate.MetricInfo(
            description=(type(self).__doc__ or "").strip(),
            citation="",
            inputs_description="predictions and references, one a study",
            features=datasets.Features({"predictions": feature, "references": feature}),
        )

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        rows = self.statistics(predictions, references)
        values = self.reduce(rows, np.ones((1, len(rows))))[0]
        return {name: float(value) for name, value in zip(self.values, values, strict=True)}


class StudyMean(Metric):
    """A metric whose values are means over studies: its statistics are each study's values, (n, values)."""

    def each(self, statistics: np.ndarray) -> np.ndarray:
        return statistics.copy()

    def reduce(self, statistics: np.ndarray, weights: np.ndarray) -> np.ndarray:
        means: np.ndarray = weights @ statistics / weights.sum(axis=1, keepdims=True)
        return means


METRICS: Registry[Metric] = Registry(
    "metric",
    Metric,
    {
        "bleu": "medxray.metrics.text:Bleu",
        "rouge-l": "medxray.metrics.text:RougeL",
        "meteor": "medxray.metrics.meteor:Meteor",
        "cider": "medxray.metrics.text:Cider",
        "finding-f1": "medxray.metrics.findings:FindingF1",
        "clinical": "medxray.metrics.findings:Clinical",
        "chexbert": "medxray.metrics.chexbert:Chexbert",
        "radgraph": "medxray.metrics.radgraph:RadGraph",
        "ratescore": "medxray.metrics.ratescore:RaTEScore",
        "auroc": "medxray.metrics.classification:AUROC",
        "average-precision": "medxray.metrics.classification:AveragePrecision",
        "f1": "medxray.metrics.classification:F1",
        "sensitivity": "medxray.metrics.classification:Sensitivity",
        "specificity": "medxray.metrics.classification:Specificity",
        "ece": "medxray.metrics.calibration:CalibrationError",
        "brier": "medxray.metrics.calibration:Brier",
        "reconstruction": "medxray.metrics.reconstruction:ReconstructionError",
    },
    group="medxray.metrics",
)
register, get, names = METRICS.register, METRICS.get, METRICS.names


def available(metrics: Sequence[Metric]) -> tuple[list[Metric], list[str]]:
    """The metrics that can be computed on this machine, and a sentence for each other one.

    Raises:
        MedxrayError: none of them can.
    """
    reasons = [metric.unavailable() for metric in metrics]
    left_out = [f"{', '.join(m.values)} left out: {why}" for m, why in zip(metrics, reasons, strict=True) if why]
    if left_out and len(left_out) == len(metrics):
        raise MedxrayError(f"no metric can be computed here: {'; '.join(left_out)}")
    return [metric for metric, why in zip(metrics, reasons, strict=True) if not why], left_out

_PLACES = {"label_reports": "clinical", "read_report": "clinical", "per_finding": "findings"}


def __getattr__(name: str) -> Any:
    # The rules are compiled when they are first used.
    if name not in _PLACES:
        raise AttributeError(f"module 'medxray.metrics' has no attribute {name!r}")
    return getattr(importlib.import_module(f"medxray.metrics.{_PLACES[name]}"), name)
