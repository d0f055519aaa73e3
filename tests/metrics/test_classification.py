"""AUROC and average precision against scikit-learn: weights, ties, missing labels, single classes."""

import numpy as np
import pytest

from medxray.metrics.classification import AUROC, AveragePrecision
from medxray.types import MedxrayError

sklearn_metrics = pytest.importorskip("sklearn.metrics")
SKLEARN = {AUROC: sklearn_metrics.roc_auc_score, AveragePrecision: sklearn_metrics.average_precision_score}


def some_studies(n: int = 80) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, (n, 5)).astype(float)
    scores = np.round(rng.random((n, 5)) + truth * 0.3, 1)
    scores[:, 3] = rng.random(n)
    truth[rng.random((n, 5)) < 0.2] = -1
    truth[::7, 1] = np.nan
    truth[:, 4] = np.where(truth[:, 4] == 0, -1, truth[:, 4])
    return scores, truth


@pytest.mark.parametrize("metric", [AUROC, AveragePrecision])
def test_values_equal_scikit_learn(metric):
    scores, truth = some_studies()
    weights = np.random.default_rng(1).integers(0, 4, (6, len(scores))).astype(float)
    ranking = metric()
    ranking.labels = list("abcde")
    found = ranking.reduce(ranking.statistics(scores, truth), weights)
    for row, weight in zip(found, weights, strict=True):
        expected = []
        for k in range(4):
            known = (truth[:, k] >= 0) & (weight > 0)
            expected.append(SKLEARN[metric](truth[known, k], scores[known, k], sample_weight=weight[known]))
        assert row[1:5] == pytest.approx(expected, abs=1e-12)
        assert np.isnan(row[5])  # one class only
        assert row[0] == pytest.approx(np.mean(expected), abs=1e-12)


def test_weights_that_leave_one_class_leave_no_value():
    metric = AUROC()
    statistics = metric.statistics([[0.1], [0.9], [0.5]], [[0], [1], [1]])
    found = metric.reduce(statistics, np.array([[0, 1, 1], [1, 0, 2.0]]))
    np.testing.assert_array_equal(found, [[np.nan], [1]])


def test_label_names_name_the_values():
    metric = AveragePrecision()
    assert metric.values == ("average-precision",)
    metric.labels = ["Effusion", "Edema"]
    assert metric.values == ("average-precision", "average-precision/Effusion", "average-precision/Edema")
    found = metric.compute(predictions=[[0.5, 0.25], [0.75, 0.5]], references=[[0, 1], [1, 0]])
    assert found["average-precision/Effusion"] == 1 and found["average-precision"] == 0.75


def test_shapes_that_disagree_are_named():
    metric = AUROC()
    metric.labels = ["Effusion", "Edema"]
    with pytest.raises(MedxrayError, match=r"\(2, 2\).*\(2, 1\)"):
        metric.statistics([[0.5], [0.1]], [[0], [1]])
