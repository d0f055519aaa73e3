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

if TYPE_CHECKING:
    from medxray.metrics.clinical import label_reports, read_report
    from medxray.metrics.findings import per_finding

__all__ = ["METRICS", "Metric", "StudyMean", "get", "label_reports", "names", "per_finding", "read_report", "register"]


class Metric(evaluate.Metric):
    """An `evaluate.Metric` whose value comes from per-study statistics.

    Attributes:
        values: names of the numbers it gives, such as ("bleu-1", "bleu-2").
        higher_is_better: False for errors.
        takes: "text", "labels" or "reconstruction": which predictions it scores.
    """

    values: tuple[str, ...]
    higher_is_better: bool = True
    takes: str = "text"

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    @abstractmethod
    def statistics(self, predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
        """One row a study: float64 (n, S)."""

    @abstractmethod
    def reduce(self, statistics: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Values under R weightings of the studies: statistics (n, S), counts (R, n) -> (R, values)."""

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

    def reduce(self, statistics: np.ndarray, weights: np.ndarray) -> np.ndarray:
        means: np.ndarray = weights @ statistics / weights.sum(axis=1, keepdims=True)
        return means


METRICS: Registry[Metric] = Registry(
    "metric",
    Metric,
    {
        "bleu": "medxray.metrics.text:Bleu",
        "rouge-l": "medxray.metrics.text:RougeL",
        "cider": "medxray.metrics.text:Cider",
        "finding-f1": "medxray.metrics.findings:FindingF1",
        "clinical": "medxray.metrics.findings:Clinical",
        "chexbert": "medxray.metrics.chexbert:Chexbert",
        "auroc": "medxray.metrics.classification:AUROC",
        "average-precision": "medxray.metrics.classification:AveragePrecision",
        "reconstruction": "medxray.metrics.reconstruction:ReconstructionError",
    },
    group="medxray.metrics",
)
register, get, names = METRICS.register, METRICS.get, METRICS.names

_PLACES = {"label_reports": "clinical", "read_report": "clinical", "per_finding": "findings"}


def __getattr__(name: str) -> Any:
    # The rules are compiled when they are first used.
    if name not in _PLACES:
        raise AttributeError(f"module 'medxray.metrics' has no attribute {name!r}")
    return getattr(importlib.import_module(f"medxray.metrics.{_PLACES[name]}"), name)
