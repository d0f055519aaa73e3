"""Scores, and differences of two systems, with 95 % intervals by a bootstrap over patients."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medxray.metrics import Metric
from medxray.types import MedxrayError, Score

_CHUNK = 2**22
"""Study weights held at once: 32 MiB of float64."""


def score(
    metric: Metric,
    predictions: Sequence[Any],
    references: Sequence[Any],
    groups: Sequence[str],
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Score]:
    """A metric's values, each with the 95 % percentile interval of a bootstrap that draws whole patients.

    Args:
        metric: what is computed.
        predictions: one a study.
        references: one a study.
        groups: patient ids, one a study; a study with "" is a patient of its own.
        resamples: draws of as many patients as there are. The same seed and patients give the same draws for
            every metric and system, so that systems can be compared draw by draw.
        seed: of the draws.

    Returns:
        value name -> Score. A value that is not defined is NaN. So is an interval where there are fewer than
        two patients or no resamples; draws in which a value is not defined don't count.

    Raises:
        MedxrayError: no studies, or lists of different lengths.
    """
    n = _checked(metric, groups, predictions, references)
    statistics = metric.statistics(predictions, references)
    values = metric.reduce(statistics, np.ones((1, n)))[0]
    low, high = _interval(_draws(metric, [statistics], groups, resamples, seed)[0])
    return {
        name: Score(float(v), float(lo), float(hi), n)
        for name, v, lo, hi in zip(metric.values, values, low, high, strict=True)
    }


@dataclass(frozen=True)
class Difference(Score):
    """How much higher one system's value is than another's on the same studies, with its 95 % interval.

    Attributes:
        p: two-sided bootstrap p-value of no difference, never below 1 / resamples.
    """

    p: float


def difference(
    metric: Metric,
    predictions: Sequence[Any],
    others: Sequence[Any],
    references: Sequence[Any],
    groups: Sequence[str],
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Difference]:
    """A metric of some predictions less that of others for the same studies, by a paired bootstrap: both are judged on the
    same draws of patients.

    Args:
        metric: what is computed.
        predictions, others: of two systems, one a study.
        references: one a study.
        groups: patient ids, one a study, as for `score`.
        resamples, seed: likewise.

    Raises:
        MedxrayError: no studies, or lists of different lengths.
    """
    n = _checked(metric, groups, predictions, others, references)
    both = [metric.statistics(texts, references) for texts in (predictions, others)]
    ours, theirs = (metric.reduce(statistics, np.ones((1, n)))[0] for statistics in both)
    drawn = _draws(metric, both, groups, resamples, seed)
    apart = drawn[0] - drawn[1]
    low, high = _interval(apart)
    found = {}
    for i, name in enumerate(metric.values):
        defined = apart[:, i][np.isfinite(apart[:, i])]
        p = float("nan")
        if len(defined):
            tail = min((defined <= 0).mean(), (defined >= 0).mean())
            p = float(min(1.0, max(2 * tail, 1 / len(defined))))
        found[name] = Difference(float(ours[i] - theirs[i]), float(low[i]), float(high[i]), n, p)
    return found


def _checked(metric: Metric, groups: Sequence[str], *lists: Sequence[Any]) -> int:
    """How many studies there are."""
    n = len(groups)
    if not n or any(len(one) != n for one in lists):
        raise MedxrayError(
            f"{', '.join(metric.values)}: expected a prediction, a reference and a patient id for each of one or more "
            f"studies; found {', '.join(str(len(one)) for one in lists[:-1])} predictions, {len(lists[-1])} references, "
            f"{n} patient ids"
        )
    return n


def _draws(
    metric: Metric, systems: Sequence[np.ndarray], groups: Sequence[str], resamples: int, seed: int
) -> list[np.ndarray]:
    """Each system's values (resamples, values) on the same draws of patients; none of fewer than two."""
    n, patients = len(groups), [(group, -1) if group else ("", i) for i, group in enumerate(groups)]
    # Numbered as they come, so that the draws depend on which studies share a patient, not on ids.
    number = {patient: i for i, patient in enumerate(dict.fromkeys(patients))}
    codes, count = np.array([number[patient] for patient in patients]), len(number)
    found: list[list[np.ndarray]] = [[np.empty((0, len(metric.values)))] for _ in systems]
    if count > 1:
        rng = np.random.default_rng(seed)
        chunk = max(1, _CHUNK // n)
        for start in range(0, resamples, chunk):
            size = min(chunk, resamples - start)
            drawn = rng.multinomial(count, np.full(count, 1 / count), size=size).astype(np.float64)
            for values, statistics in zip(found, systems, strict=True):
                values.append(metric.reduce(statistics, drawn[:, codes]))
    return [np.concatenate(values) for values in found]


def _interval(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Low and high end of the middle 95 %; NaN where no draw defines a value."""
    if not len(draws):
        return (np.full(draws.shape[1], np.nan),) * 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        low, high = np.nanpercentile(draws, [2.5, 97.5], axis=0)
    return low, high


def score_all(
    metrics: Sequence[Metric],
    predictions: Sequence[Any],
    references: Sequence[Any],
    groups: Sequence[str],
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Score]:
    """`score` of several metrics in one dict, in the metrics' order."""
    found: dict[str, Score] = {}
    for metric in metrics:
        found |= score(metric, predictions, references, groups, resamples, seed)
    return found


def distinct_share(texts: Sequence[str]) -> float:
    """Distinct texts per text: near 0 for a model that repeats itself; NaN without texts."""
    return len(set(texts)) / len(texts) if texts else float("nan")
