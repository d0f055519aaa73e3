"""AUROC and average precision against scikit-learn; F1, sensitivity and specificity against a search of every threshold."""

import itertools

import numpy as np
import pytest

from medxray.metrics import METRICS
from medxray.metrics.classification import (
    AUROC,
    F1,
    AveragePrecision,
    Sensitivity,
    Specificity,
    best_threshold,
    undefined,
)
from medxray.types import MedxrayError

sklearn_metrics = pytest.importorskip("sklearn.metrics")
SKLEARN = {AUROC: sklearn_metrics.roc_auc_score, AveragePrecision: sklearn_metrics.average_precision_score}
EVERY = ("auroc", "average-precision", "f1", "sensitivity", "specificity", "ece", "brier")


def metric_of(name, labels=(), **settings):
    metric = METRICS.build(METRICS.settings_of(name)(name=name, **settings))
    metric.labels = list(labels)
    return metric


def values(metric, scores, truth, weights=None):
    rows = metric.statistics(scores, truth)
    return metric.reduce(rows, np.ones((1, len(rows))) if weights is None else weights)


def some_studies(n=80, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 2, (n, 5)).astype(float)
    scores = np.round(rng.random((n, 5)) * 0.7 + truth * 0.3, 1)
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


def adversarial(rng):
    """Scores and labels of one label: few studies or many, all equal, ties of every size, infinitely near, far apart."""
    n = int(rng.choice([2, 3, 5, 17, 200, 1500]))
    truth = (rng.random(n) < rng.choice([0.02, 0.5, 0.97])).astype(float)
    truth[:2] = 0, 1
    kind = rng.integers(7)
    scores = [
        np.full(n, 0.3),
        rng.random(n),
        rng.integers(0, 3, n) / 2,
        np.round(rng.random(n), 2),
        truth + 0.0,
        1 - truth,
        rng.choice([0.5, np.nextafter(0.5, 1), np.nextafter(0.5, 0), 1e-300, 1e300, -1e300, 0.0, -0.0], n),
    ][kind]
    return scores, truth


@pytest.mark.parametrize("metric", [AUROC, AveragePrecision])
def test_adversarial_values_equal_scikit_learn(metric):
    rng = np.random.default_rng(5)
    for _ in range(150):
        scores, truth = adversarial(rng)
        weights = rng.integers(0, 5, len(scores)).astype(float)
        weights[:2] += 1
        found = values(metric(), scores[:, None], truth[:, None], np.stack([np.ones_like(weights), weights]))[:, 0]
        expected = [SKLEARN[metric](truth, scores), SKLEARN[metric](truth, scores, sample_weight=weights)]
        assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_weights_equal_repeated_rows(name):
    rng = np.random.default_rng(2)
    scores, truth = some_studies(120)
    weights = rng.multinomial(120, np.full(120, 1 / 120), size=70).astype(float)  # more than one block
    metric = metric_of(name, "abcde")
    metric.choose(*some_studies(90, seed=3))
    found = values(metric, scores, truth, weights)
    for row, weight in zip(found, weights.astype(int), strict=True):
        np.testing.assert_allclose(row, values(metric, scores.repeat(weight, 0), truth.repeat(weight, 0))[0], atol=1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_what_is_not_known_counts_for_nothing(name):
    scores, truth = some_studies()
    metric = metric_of(name)
    whole = values(metric, scores[:, :1], truth[:, :1])
    known = truth[:, 0] >= 0
    assert 0 < known.sum() < len(known)
    assert values(metric, scores[known, :1], truth[known, :1]) == whole
    assert values(metric, scores[:, :1], [[v if v >= 0 else None] for v in truth[:, 0]]) == whole
    blind = np.vstack([scores[:, :1], [[np.nan]]])
    assert values(metric, blind, np.append(truth[:, :1], [[1.0]], axis=0)) == whole


@pytest.mark.parametrize("name", EVERY)
def test_a_label_of_one_class(name):
    """Undefined where the class that is missing is needed; the mean is that of the others."""
    scores = [[0.2, 0.9, 0.3, 0.5], [0.7, 0.8, 0.4, 0.5]]
    truth = [[0, 1, 0, np.nan], [1, 1, 0, -1]]
    mean, good, positive, negative, unknown = values(metric_of(name, "abcd"), scores, truth)[0]
    probabilities = name in ("ece", "brier")
    assert np.isfinite(good) and np.isnan(unknown)
    assert np.isfinite(positive) == (probabilities or name == "f1") and np.isfinite(negative) == probabilities
    assert mean == pytest.approx(np.nanmean([good, positive, negative]), abs=1e-15)
    assert np.isnan(values(metric_of(name), [[0.5]], [[-1]])[0, 0])


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
    assert metric_of("sensitivity", ["Edema"]).values == ("sensitivity@0.90", "sensitivity@0.90/Edema")
    assert Sensitivity(0.975).values == ("sensitivity@0.975",) and Specificity(1.0).values == ("specificity@1.00",)
    assert undefined({"auroc": np.nan, "auroc/a": np.nan, "auroc/b": 0.5, "f1/a": 1.0}) == {"auroc": ["a"]}


def test_shapes_that_disagree_are_named():
    metric = AUROC()
    metric.labels = ["Effusion", "Edema"]
    with pytest.raises(MedxrayError, match=r"\(2, 2\).*\(2, 1\)"):
        metric.statistics([[0.5], [0.1]], [[0], [1]])


# F1 and its threshold


def f1_at(threshold, scores, truth):
    said = scores >= threshold
    return 2 * (said & (truth == 1)).sum() / (said.sum() + (truth == 1).sum())


def test_f1_equals_scikit_learn():
    rng = np.random.default_rng(0)
    for _ in range(50):
        scores, truth = adversarial(rng)
        weights = np.stack([np.ones(len(truth)), rng.integers(1, 4, len(truth))])
        found = values(F1(), scores[:, None], truth[:, None], weights)[:, 0]
        expected = [sklearn_metrics.f1_score(truth, scores >= 0.5, sample_weight=w, zero_division=0) for w in weights]
        assert found == pytest.approx(expected, abs=1e-12)


def test_no_threshold_is_better_than_the_chosen_one_and_none_as_good_is_nearer_to_half():
    rng = np.random.default_rng(1)
    for _ in range(200):
        scores, truth = adversarial(rng)
        scores = np.clip(scores, 0, 1)
        chosen = best_threshold(scores, truth)
        distinct = np.unique(scores)
        middles = (distinct[1:] + distinct[:-1]) / 2
        candidates = np.concatenate([[0.5], distinct[:1], np.where(middles > distinct[:-1], middles, distinct[1:])])
        each = np.array([f1_at(t, scores, truth) for t in candidates])
        best = candidates[each == each.max()]
        assert f1_at(chosen, scores, truth) == each.max() >= max(f1_at(t, scores, truth) for t in distinct)
        assert abs(chosen - 0.5) == np.abs(best - 0.5).min() and chosen in best


@pytest.mark.parametrize(
    ("scores", "truth", "threshold"),
    [
        ([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1], 0.5),  # everything in .2-.8 is best
        ([0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1], 0.25),
        ([0.6, 0.7, 0.8, 0.9], [0, 0, 1, 1], 0.75),
        ([0.7, 0.8], [1, 1], 0.5),
        ([0.2, 0.3], [1, 1], 0.2),
        ([0.2, 0.9], [0, 0], 0.5),  # nobody has it
        ([0.2, 0.9], [np.nan, np.nan], 0.5),
        # 0.75 and 0.25 are as good, 2 / (1 + 2) and 4 / (4 + 2), and as near.
        ([0.875, 0.625, 0.375, 0.375, 0.125], [1, 0, 1, 0, 0], 0.25),
        ([0.5, np.nextafter(0.5, 0)], [1, 0], 0.5),
        ([0.2, np.nextafter(0.2, 0)], [1, 0], 0.2),  # no float lies between
    ],
)
def test_threshold_by_hand(scores, truth, threshold):
    assert best_threshold(np.array(scores), np.array(truth, dtype=float)) == pytest.approx(threshold, abs=1e-12)


def test_a_threshold_is_chosen_a_label_and_before_the_scoring():
    metric = metric_of("f1", ["a", "b"])
    assert metric.chooses and metric.chosen == {} and "no threshold was chosen" in metric.notes()[0]
    metric.choose([[0.1, 0.7], [0.2, 0.9]], [[0, 0], [1, 1]])
    assert metric.chosen == pytest.approx({"a": 0.15, "b": 0.8})
    assert metric.notes()[0].endswith("a 0.15, b 0.8")
    # Other studies do not move it.
    assert values(metric, [[0.16, 0.79], [0.9, 0.95]], [[0, 1], [1, 1]])[0] == pytest.approx([2 / 3] * 3)
    before = dict(metric.chosen)
    values(metric, *([[0.0, 1.0]], [[1, 0]]))
    assert metric.chosen == before
    assert not any(METRICS.get(name).chooses for name in METRICS.names() if name != "f1")


# A point of the ROC curve


def points(scores, truth, weights):
    """(sensitivity, specificity) of every threshold, in whole numbers until the quotient."""
    for threshold in [np.inf, *np.unique(scores)]:
        said = scores >= threshold
        hits, rejected = weights[said & (truth == 1)].sum(), weights[~said & (truth == 0)].sum()
        yield hits / weights[truth == 1].sum(), rejected / weights[truth == 0].sum()


def test_sensitivity_and_specificity_are_the_best_of_every_threshold():
    rng = np.random.default_rng(7)
    for least, _ in itertools.product([0.5, 0.8, 0.9, 0.95, 1.0], range(40)):
        scores, truth = adversarial(rng)
        weights = rng.integers(0, 4, len(scores))
        weights[:2] += 1
        arguments = scores[:, None], truth[:, None], weights[None].astype(float)
        curve = list(points(scores, truth, weights))
        assert values(Sensitivity(least), *arguments)[0, 0] == max(a for a, b in curve if b >= least)
        assert values(Specificity(least), *arguments)[0, 0] == max(b for a, b in curve if a >= least)


def test_the_given_specificity_itself_is_enough():
    """One false alarm among ten is 0.9, though 1 - 1 / 10 and (1 - 0.9) * 10 are not what they are on paper."""
    truth = [[0]] * 10 + [[1]]
    assert values(Sensitivity(0.9), [[0.9], *[[0.1]] * 9, [0.5]], truth)[0, 0] == 1
    assert values(Sensitivity(0.95), [[0.9], *[[0.1]] * 9, [0.5]], truth)[0, 0] == 0
    # A tie cannot be parted: the study with the label comes with three alarms.
    assert values(Sensitivity(0.9), [[0.9]] * 3 + [[0.1]] * 7 + [[0.9]], truth)[0, 0] == 0
