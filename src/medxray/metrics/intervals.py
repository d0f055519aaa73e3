"""Scores with 95 % intervals by a bootstrap over patients."""

import warnings
from collections.abc import Sequence
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
    n = len(predictions)
    if not n or not n == len(references) == len(groups):
        raise MedxrayError(
            f"{', '.join(metric.values)}: expected a prediction, a reference and a patient id for each "
            f"of one or more studies; found {n} predictions, {len(references)} references, "
            f"{len(groups)} patient ids"
        )
    statistics = metric.statistics(predictions, references)
    values = metric.reduce(statistics, np.ones((1, n)))[0]
    low = high = np.full(len(values), np.nan)
    patients = [(group, -1) if group else ("", i) for i, group in enumerate(groups)]
    # Numbered as they come, so that the draws depend on which studies share a patient, not on ids.
    number = {patient: i for i, patient in enumerate(dict.fromkeys(patients))}
    codes, count = np.array([number[patient] for patient in patients]), len(number)
    if count > 1 and resamples > 0:
        rng = np.random.default_rng(seed)
        chunk = max(1, _CHUNK // n)
        draws = []
        for start in range(0, resamples, chunk):
            size = min(chunk, resamples - start)
            drawn = rng.multinomial(count, np.full(count, 1 / count), size=size).astype(np.float64)
            draws.append(metric.reduce(statistics, drawn[:, codes]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a value that no draw defines stays NaN
            low, high = np.nanpercentile(np.concatenate(draws), [2.5, 97.5], axis=0)
    return {
        name: Score(float(v), float(lo), float(hi), n)
        for name, v, lo, hi in zip(metric.values, values, low, high, strict=True)
    }


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
