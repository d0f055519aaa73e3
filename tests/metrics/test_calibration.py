"""Calibration error, Brier score and reliability curves against their definitions, study by study."""

import numpy as np
import pytest

from medxray.metrics import intervals
from medxray.metrics.calibration import Brier, CalibrationError, reliability

sklearn_metrics = pytest.importorskip("sklearn.metrics")


def value(metric, probabilities, truth, weights=None):
    rows = metric.statistics(np.array(probabilities)[:, None], np.array(truth)[:, None])
    return metric.reduce(rows, np.ones((1, len(rows))) if weights is None else weights)[:, 0]


def some_studies(n=500, seed=0):
    rng = np.random.default_rng(seed)
    probabilities = np.round(rng.beta(1, 3, n), 2)
    return probabilities, (rng.random(n) < probabilities**1.5).astype(float)


def by_definition(probabilities, truth, bins):
    """Guo et al., equation 3, for the probability of the label: bins ((m - 1) / M, m / M], the first with 0."""
    error = 0.0
    for m in range(bins):
        low, high = np.linspace(0, 1, bins + 1)[[m, m + 1]]
        own = (probabilities > low) & (probabilities <= high) | ((m == 0) & (probabilities == 0))
        if own.any():
            error += own.sum() / len(own) * abs(truth[own].mean() - probabilities[own].mean())
    return error


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_is_that_of_its_definition(bins):
    probabilities, truth = some_studies()
    assert {0.0, 0.2} <= set(probabilities), "ends of bins are among them"
    expected = by_definition(probabilities, truth, bins)
    assert value(CalibrationError(bins), probabilities, truth) == pytest.approx(expected, abs=1e-12)


def test_bins_of_one_mass():
    """Without ties each bin holds as many studies; with them equal probabilities stay together."""
    rng = np.random.default_rng(1)
    probabilities = rng.permutation(np.arange(120) / 120)
    truth = (rng.random(120) < 0.3).astype(float)
    order = np.argsort(probabilities).reshape(10, 12)
    expected = np.mean([abs(truth[own].mean() - probabilities[own].mean()) for own in order])
    assert value(CalibrationError(10, "equal-mass"), probabilities, truth) == pytest.approx(expected, abs=1e-12)
    assert [b.n for b in reliability(probabilities, truth, 10, "equal-mass")] == [12] * 10
    assert value(CalibrationError(10, "equal-mass"), np.full(9, 0.4), [1, 0, 0] * 3) == pytest.approx(0.4 - 1 / 3)
    assert len(reliability(np.full(9, 0.4), np.array([1, 0, 0] * 3), 10, "equal-mass")) == 1


def test_brier_equals_scikit_learn():
    probabilities, truth = some_studies()
    weights = np.random.default_rng(3).integers(0, 3, (4, 500)).astype(float)
    expected = [sklearn_metrics.brier_score_loss(truth, probabilities, sample_weight=weight) for weight in weights]
    assert value(Brier(), probabilities, truth, weights) == pytest.approx(expected, abs=1e-12)


def test_what_is_calibrated_has_a_small_error_and_what_is_not_a_large_one():
    rng = np.random.default_rng(0)
    probabilities = rng.random(20000)
    truth = (rng.random(20000) < probabilities).astype(float)
    assert value(CalibrationError(), probabilities, truth)[0] < 0.02
    assert value(CalibrationError(), np.clip(probabilities + 0.2, 0, 1), truth)[0] == pytest.approx(0.18, abs=0.01)
    assert not CalibrationError().higher_is_better and not Brier().higher_is_better


def test_they_have_intervals():
    probabilities, truth = some_studies()
    for metric in (CalibrationError(), Brier()):
        (found,) = intervals.score(metric, probabilities[:, None], truth[:, None], [""] * 500).values()
        assert 0 < found.low < found.high and found.low <= found.value + 0.02


def test_a_reliability_curve():
    probabilities, truth = some_studies(2000)
    truth[::9] = -1
    curve = reliability(probabilities, truth, 10)
    known = truth >= 0
    assert sum(b.n for b in curve) == known.sum()
    error = sum(b.n * abs(b.probability - b.share) for b in curve) / known.sum()
    assert error == pytest.approx(by_definition(probabilities[known], truth[known], 10), abs=1e-12)
    assert [b.probability for b in curve] == sorted(b.probability for b in curve)
    assert all(b.low <= b.share <= b.high for b in curve)
    # Wilson's interval of 2 in 10 (Newcombe, 1998, gives .0567 to .5098).
    (one,) = reliability(np.full(10, 0.3), np.array([1, 1] + [0] * 8))
    assert (one.share, one.n) == (0.2, 10) and (one.low, one.high) == pytest.approx((0.0567, 0.5098), abs=1e-4)
    assert reliability(np.array([0.5]), np.array([np.nan])) == []
