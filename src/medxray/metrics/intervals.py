"""Scores, and differences of two systems, with 95 % intervals by a bootstrap over patients."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri, stdtr, stdtrit

from medxray.metrics import Metric
from medxray.progress import progress_bar
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
    """A metric's values, each with the 95 % interval of a bootstrap that draws whole patients.

    The interval is the expanded percentile one (Hesterberg, The American Statistician 69, 2015, section 5.3): percentiles
    a little further out than 2.5 and 97.5, as far as a t interval of P patients is wider than the bootstrap's own.

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
    _check(metric, predictions=predictions, references=references, patient_ids=groups)
    return seeds(metric, [metric.statistics(predictions, references)], groups, resamples, seed)


def seeds(
    metric: Metric,
    runs: Sequence[np.ndarray],
    groups: Sequence[str],
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Score]:
    """A metric's mean over S fits of one system that differ by their seed, with a 95 % interval for other studies and seeds.

    Studies and seeds are crossed: value = mean + study + seed + what a seed makes of a study. The mean over all has the
    variance W + A / S. W, of the mean over seeds when patients are drawn, holds the first and the last; A is the variance
    of seeds themselves: that of the S values, less what of it patients make, which the same draws tell, and at least 0
    (the analysis of variance of a crossed random model: Searle, Casella and McCulloch, Variance Components, 1992, chapter
    4). Each draw of patients gets a draw of sqrt(A / S) t, t with S - 1 degrees of freedom, and the interval is that of
    the sums. So two seeds alone give a wide one where they differ. Of one seed the interval holds studies only.

    Args:
        metric: what is computed.
        runs: of each seed the statistics (n, S) of its studies, as `Metric.statistics` gives them.
        groups, resamples, seed: as for `score`.

    Raises:
        MedxrayError: no seeds, no studies, or lists of different lengths.
    """
    for run in runs:
        _check(metric, statistics=run, patient_ids=groups)
    (values, drawn), patients = _drawn(metric, [runs], groups, resamples, seed)
    low, high = _interval(drawn[0], patients)
    n = len(groups)
    return {
        name: Score(float(v), float(lo), float(hi), n)
        for name, v, lo, hi in zip(metric.values, values[0], low, high, strict=True)
    }


@dataclass(frozen=True)
class Difference(Score):
    """How much higher one system's value is than another's on the same studies, with its 95 % interval.

    Attributes:
        p: two-sided bootstrap p-value of no difference, never below 1 / resamples. Below 0.05 it is where the interval
            leaves out 0.
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
    for said in (predictions, others):
        _check(metric, predictions=said, references=references, patient_ids=groups)
    ours, theirs = ([metric.statistics(said, references)] for said in (predictions, others))
    return seeds_difference(metric, ours, theirs, groups, resamples, seed)


def seeds_difference(
    metric: Metric,
    runs: Sequence[np.ndarray],
    others: Sequence[np.ndarray],
    groups: Sequence[str],
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Difference]:
    """A metric's mean over the seeds of one system less that over the seeds of another, for the same studies.

    Patients are drawn for both alike; the variance of seeds, as `seeds` has it, is each system's own, since equal seeds of
    two systems have nothing in common. So the systems may have different numbers of seeds.

    Args:
        metric: what is computed.
        runs, others: of two systems, as for `seeds`.
        groups, resamples, seed: as for `score`.

    Raises:
        MedxrayError: a system without seeds, no studies, or lists of different lengths.
    """
    for run in (*runs, *others):
        _check(metric, statistics=run, patient_ids=groups)
    (values, drawn), patients = _drawn(metric, [runs, others], groups, resamples, seed)
    apart = drawn[0] - drawn[1]
    low, high = _interval(apart, patients)
    found = {}
    for i, name in enumerate(metric.values):
        p = _p_value(apart[:, i], patients)
        found[name] = Difference(float(values[0][i] - values[1][i]), float(low[i]), float(high[i]), len(groups), p)
    return found


def _check(metric: Metric, **lists: Sequence[Any] | np.ndarray) -> None:
    if len({len(one) for one in lists.values()}) > 1 or not all(map(len, lists.values())):
        found = ", ".join(f"{len(one)} {name.replace('_', ' ')}" for name, one in lists.items())
        raise MedxrayError(f"{', '.join(metric.values)}: expected one of each for each of one or more studies; found {found}")


def _drawn(
    metric: Metric, runs: Sequence[Sequence[np.ndarray]], groups: Sequence[str], resamples: int, seed: int
) -> tuple[tuple[list[np.ndarray], list[np.ndarray]], int]:
    """For each system its values (values,) and their draws (resamples, values), means over its seeds; the number of patients.

    Args:
        runs: for each system the statistics (n, S) of its seeds.

    Of fewer than two patients there are no draws.
    """
    if not all(runs):
        raise MedxrayError(f"{', '.join(metric.values)}: expected predictions of one seed or more; found none")
    codes = _patients(groups)
    n, count = len(groups), int(codes.max()) + 1
    found: list[list[list[np.ndarray]]] = [[[np.empty((0, len(metric.values)))] for _ in system] for system in runs]
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // n)
    sizes = [min(chunk, resamples - start) for start in range(0, resamples if count > 1 else 0, chunk)]
    for size in progress_bar(sizes, desc="intervals", unit="part", delay=2, leave=False):
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=size).astype(np.float64)[:, codes]
        for system, statistics in zip(found, runs, strict=True):
            for draws, rows in zip(system, statistics, strict=True):
                draws.append(metric.reduce(rows, drawn))
    values, means = [], []
    for system, statistics in zip(found, runs, strict=True):
        whole = np.stack([metric.reduce(rows, np.ones((1, n)))[0] for rows in statistics])
        resampled = np.stack([np.concatenate(draws) for draws in system])
        values.append(whole.mean(axis=0))
        means.append(resampled.mean(axis=0) + _seed_noise(whole, resampled, rng))
    return (values, means), count


def _seed_noise(values: np.ndarray, draws: np.ndarray, rng: np.random.Generator) -> np.ndarray | float:
    """What other seeds would change, a draw each: values (S, values), draws (S, resamples, values) -> (resamples, values)."""
    count, resamples = draws.shape[:2]
    if count < 2 or not resamples:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        by_patients = np.nanmean((draws - values[:, None]).var(axis=0, ddof=1), axis=0)
    own = np.maximum(values.var(axis=0, ddof=1) - by_patients, 0)
    noise: np.ndarray = rng.standard_t(count - 1, (resamples, 1)) * np.sqrt(own / count)
    return noise


def _patients(groups: Sequence[str]) -> np.ndarray:
    """Studies' patients (n,), numbered as they come: draws depend on which studies share a patient, not on ids."""
    number: dict[tuple[str, int], int] = {}
    return np.array([number.setdefault((group, -1 if group else i), len(number)) for i, group in enumerate(groups)])


def _interval(draws: np.ndarray, patients: int) -> tuple[np.ndarray, np.ndarray]:
    """Low and high end of the middle 95 %, expanded; NaN where no draw defines a value."""
    if not len(draws):
        return (np.full(draws.shape[1], np.nan),) * 2
    tail = ndtr(-math.sqrt(patients / (patients - 1)) * stdtrit(patients - 1, 0.975))
    # Looking past NaN is slow, and hardly ever needed.
    quantile = np.nanquantile if np.isnan(draws).any() else np.quantile
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        low, high = quantile(draws, [tail, 1 - tail], axis=0)
    return low, high


def _p_value(draws: np.ndarray, patients: int) -> float:
    """The level at which the interval of these draws (resamples,) would end at 0; NaN where no draw defines a value."""
    defined = draws[np.isfinite(draws)]
    if not len(defined):
        return float("nan")
    tail = min((defined <= 0).mean(), (defined >= 0).mean())
    p = 2 * stdtr(patients - 1, math.sqrt((patients - 1) / patients) * ndtri(tail))
    return float(min(1.0, max(p, 1 / len(defined))))


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
