"""Scores with intervals."""

import dataclasses
import math
import time

import numpy as np
import pytest

from medxray.data.phantom import draw_study
from medxray.metrics import Metric, intervals
from medxray.metrics.classification import AUROC
from medxray.metrics.reconstruction import ReconstructionError
from medxray.metrics.text import Bleu, Cider, RougeL, _corpus_bleu
from medxray.types import MedxrayError

REPORTS = ["heart is normal .", "no pleural effusion is seen .", "lungs are clear .", "small left effusion ."]


def errors(values, groups, **settings):
    return intervals.score(ReconstructionError(), values, np.zeros(len(values)), groups, **settings)[
        "reconstruction-error"
    ]


def test_interval_is_that_of_a_mean():
    values = np.random.default_rng(0).normal(5, 1, 400)
    found = errors(values, [str(i) for i in range(400)], resamples=4000)
    width = 1.96 * values.std() / math.sqrt(400)
    assert found.value == pytest.approx(values.mean()) and found.n == 400
    assert found.low == pytest.approx(values.mean() - width, abs=width / 10)
    assert found.high == pytest.approx(values.mean() + width, abs=width / 10)


def test_patients_are_drawn_whole():
    values = np.random.default_rng(0).normal(5, 1, 100).repeat(4)
    alone = errors(values, [str(i) for i in range(400)])
    together = errors(values, [str(i // 4) for i in range(400)])
    assert together.high - together.low > 1.6 * (alone.high - alone.low)
    assert errors(values, [""] * 400) == alone


def test_same_seed_same_interval_whatever_the_chunks(monkeypatch):
    values, groups = np.random.default_rng(0).random(50), [str(i // 2) for i in range(50)]
    whole = errors(values, groups)
    monkeypatch.setattr(intervals, "_CHUNK", 50 * 7)
    assert dataclasses.astuple(errors(values, groups)) == pytest.approx(dataclasses.astuple(whole), rel=1e-12)
    assert errors(values, groups, seed=1) != whole


def test_undefined_values_and_intervals_are_nan():
    auroc = intervals.score(AUROC(), [[0.1], [0.2]], [[1], [1]], ["a", "b"])["auroc"]
    assert str(auroc) == "undefined" and math.isnan(auroc.low)
    assert math.isnan(errors([1.0, 2.0], ["a", "a"]).low)
    assert math.isnan(errors([1.0, 2.0], ["a", "b"], resamples=0).low)


def test_score_all_keeps_the_order():
    found = intervals.score_all([RougeL(), Bleu()], REPORTS, REPORTS, list("abcd"), resamples=10)
    assert list(found) == ["rouge-l", "bleu-1", "bleu-2", "bleu-3", "bleu-4"]
    assert found["bleu-4"].value == pytest.approx(1, abs=1e-6)
    assert all(score.low <= score.value <= score.high for score in found.values())


def test_lengths_that_disagree_are_named():
    with pytest.raises(MedxrayError, match="4 predictions, 3 references, 4 patient ids"):
        intervals.score(Bleu(), REPORTS, REPORTS[:3], list("abcd"))
    with pytest.raises(MedxrayError, match="0 predictions"):
        intervals.score(Bleu(), [], [], [])


def test_distinct_share():
    assert intervals.distinct_share(["a", "a", "b", "a"]) == 0.5
    assert math.isnan(intervals.distinct_share([]))


def apart(ours, theirs, groups, **settings):
    found = intervals.difference(ReconstructionError(), ours, theirs, np.zeros(len(ours)), groups, **settings)
    return found["reconstruction-error"]


def test_a_difference_is_paired():
    rng = np.random.default_rng(0)
    hard, noise = 20 + rng.normal(5, 2, 400), rng.normal(0, 0.2, 400)
    groups = [str(i) for i in range(400)]
    found = apart(hard + 0.05 + noise, hard, groups, resamples=2000)
    width = 1.96 * noise.std() / math.sqrt(400)
    assert found.value == pytest.approx(0.05 + noise.mean())
    assert found.high - found.low == pytest.approx(2 * width, rel=0.1), "not that of two separate intervals"
    back = apart(hard, hard + 0.05 + noise, groups, resamples=2000)
    assert (back.value, back.low, back.high, back.p) == pytest.approx((-found.value, -found.high, -found.low, found.p))


def test_p_value_of_equal_systems_and_of_others():
    same = apart(np.ones(9), np.ones(9), [""] * 9)
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert apart(np.ones(9), np.zeros(9), [""] * 9, resamples=100).p == 0.01


def test_what_no_draw_defines_has_no_difference():
    found = intervals.difference(Bleu(), REPORTS, REPORTS, REPORTS, ["one"] * 4)["bleu-4"]
    assert found.value == 0 and math.isnan(found.low) and math.isnan(found.p)
    with pytest.raises(MedxrayError, match="found 3 predictions, 4 references, 4 patient ids"):
        intervals.difference(Bleu(), REPORTS, REPORTS[:3], REPORTS, ["one"] * 4)


class Simulated(Metric):
    """Many data sets at once, a value each, drawn alike: statistics are given in place of predictions, (n, parts x sets)."""

    def __init__(self, sets, formula):
        super().__init__()
        self.values, self.formula = tuple(map(str, range(sets))), formula

    def statistics(self, predictions, references):
        return np.asarray(predictions)

    def reduce(self, statistics, weights):
        return self.formula(weights @ statistics, weights)


def mean(totals, weights):
    return totals / weights.sum(axis=1, keepdims=True)


def ratio(totals, weights):
    above, below = np.split(totals, 2, axis=1)
    return above / below


SETS = 2000
"""The 95 % interval's coverage has a standard error of 0.5 points over these data sets, and another 0.5 by 2,000 resamples that
all of them share; the test allows 2."""


def one_study(rng, n):
    return [str(i) for i in range(n)], np.ones(n, dtype=int)


def several_studies(rng, n):
    """1 to 5 a patient."""
    sizes = rng.integers(1, 6, n)
    return list(np.arange(n).repeat(sizes).astype(str)), sizes


def normal(rng, sizes):
    """Half of the variance is the patient's."""
    drawn = rng.normal(size=(len(sizes), SETS)).repeat(sizes, axis=0) + rng.normal(size=(sizes.sum(), SETS))
    return drawn, 0.0, mean


def skewed(rng, sizes):
    return rng.exponential(size=(len(sizes), SETS)).repeat(sizes, axis=0), 1.0, mean


def rare(rng, sizes):
    return (rng.random((sizes.sum(), SETS)) < 0.1).astype(float), 0.1, mean


def skewed_ratio(rng, sizes):
    """A sum over a sum, as precision is, of lengths that vary by a factor of e."""
    lengths = rng.lognormal(0, 1, (sizes.sum(), SETS))
    return np.hstack([lengths * rng.uniform(0, 1, lengths.shape), lengths]), 0.5, ratio


@pytest.mark.parametrize(
    ("simulate", "patients", "n"),
    [
        (normal, one_study, 20), (normal, one_study, 200), (normal, several_studies, 100), (skewed, one_study, 100),
        (skewed, several_studies, 200), (rare, one_study, 400), (skewed_ratio, one_study, 100),
        (skewed_ratio, several_studies, 100),
    ],
)  # fmt: skip
def test_interval_holds_the_truth_95_times_of_100(simulate, patients, n):
    rng = np.random.default_rng(0)
    groups, sizes = patients(rng, n)
    statistics, truth, formula = simulate(rng, sizes)
    found = intervals.score(Simulated(SETS, formula), statistics, statistics, groups, resamples=2000)
    assert 0.93 <= np.mean([score.low <= truth <= score.high for score in found.values()]) <= 0.97


def test_interval_of_bleu_holds_that_of_all_reports():
    """2,000 samples of 200 studies each out of 3,000 made-up ones that are scored against another study's report."""
    rng, sets = np.random.default_rng(0), 500
    reports = [draw_study(1, i, 32, views=()).findings.lower() for i in range(3000)]
    bleu = Bleu()
    every = bleu.statistics(reports[1:] + reports[:1], reports)
    truth = bleu.reduce(every, np.ones((1, len(every))))[0, 3]

    def bleu_4(totals, weights):
        return _corpus_bleu(totals.reshape(-1, every.shape[1]))[:, 3].reshape(len(totals), sets)

    inside = []
    for _ in range(4):
        drawn = every[rng.integers(len(every), size=(200, sets))].reshape(200, -1)
        found = intervals.score(Simulated(sets, bleu_4), drawn, drawn, [""] * 200)
        inside += [score.low <= truth <= score.high for score in found.values()]
    assert 0.93 <= np.mean(inside) <= 0.97


def test_p_value_is_uniform_where_there_is_no_difference():
    """Of systems that share what makes a study hard; at 5 points of the distribution, each with a standard error below 1.2
    points, and 0.95 is where the interval begins to leave out 0."""
    rng = np.random.default_rng(0)
    groups, sizes = several_studies(rng, 100)
    hard = normal(rng, sizes)[0]
    ours, others = (hard + rng.exponential(size=hard.shape) for _ in range(2))
    found = intervals.difference(Simulated(SETS, mean), ours, others, hard, groups, resamples=2000).values()
    p = np.array([one.p for one in found])
    for level in (0.05, 0.2, 0.5, 0.8, 0.95):
        assert np.mean(p < level) == pytest.approx(level, abs=0.015 if level == 0.05 else 0.04)
    leaves_out = np.array([not one.low <= 0 <= one.high for one in found])
    assert np.mean(leaves_out == (p < 0.05)) > 0.995


def fits(rng, hard, count, own, of_study):
    """Values (n, SETS) of fits: seeds' own differences, in standard errors of the mean over studies, and each study's."""
    scale = own / np.sqrt(len(hard))
    return [hard + rng.normal(0, scale, SETS) + rng.normal(0, of_study, hard.shape) for _ in range(count)]


def counted(metric, runs, references):
    return [metric.statistics(one, references) for one in runs]


@pytest.mark.parametrize(
    ("count", "own", "of_study"),
    [
        (3, 0, 1), (3, 3, 0.2),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(3, 1, 0.2), (3, 3, 1), (5, 0, 1), (5, 1, 0.2), (5, 3, 1)]),
    ],
)  # fmt: skip
def test_interval_over_seeds_holds_the_truth_for_other_studies_and_seeds(count, own, of_study):
    """At least 94 of 100 times, and up to 98.5 where few seeds leave open how much they differ."""
    rng = np.random.default_rng(count)
    hard = rng.normal(size=(200, SETS))
    runs, metric, groups = fits(rng, hard, count, own, of_study), Simulated(SETS, mean), [""] * 200
    found = intervals.seeds(metric, counted(metric, runs, hard), groups).values()
    assert 0.935 <= np.mean([score.low <= 0 <= score.high for score in found]) <= 0.985
    assert next(iter(found)).value == pytest.approx(np.mean([run[:, 0].mean() for run in runs]))
    if own == 3:
        alone = intervals.score(metric, np.mean(runs, axis=0), hard, groups).values()
        assert np.mean([score.low <= 0 <= score.high for score in alone]) < 0.85, "studies alone would do"
    others = fits(rng, hard, 3, own, of_study)
    apart = intervals.seeds_difference(metric, *(counted(metric, one, hard) for one in (runs, others)), groups).values()
    assert np.mean([one.p < 0.05 for one in apart]) <= 0.06


def test_seeds_that_agree_or_are_one_add_nothing():
    predictions = ["heart is normal", "no effusion is seen .", "lungs .", "left effusion ."]
    one = intervals.score(Bleu(), predictions, REPORTS, list("abcd"))
    rows, perfect = counted(Bleu(), [predictions, REPORTS], REPORTS)
    assert intervals.seeds(Bleu(), [rows], list("abcd")) == one
    both = intervals.seeds(Bleu(), [rows] * 3, list("abcd"))
    assert dataclasses.astuple(both["bleu-1"]) == pytest.approx(dataclasses.astuple(one["bleu-1"]))
    apart = intervals.seeds_difference(Bleu(), [rows] * 3, [perfect], list("abcd"))["bleu-1"]
    assert dataclasses.astuple(apart) == pytest.approx(
        dataclasses.astuple(intervals.difference(Bleu(), predictions, REPORTS, REPORTS, list("abcd"))["bleu-1"])
    )


def test_seeds_say_what_is_missing():
    (rows,) = counted(Bleu(), [REPORTS], REPORTS)
    with pytest.raises(MedxrayError, match="one seed or more; found none"):
        intervals.seeds(Bleu(), [], list("abcd"))
    with pytest.raises(MedxrayError, match="one seed or more; found none"):
        intervals.seeds_difference(Bleu(), [rows], [], list("abcd"))
    with pytest.raises(MedxrayError, match="found 3 statistics, 4 patient ids"):
        intervals.seeds(Bleu(), [rows, rows[:3]], list("abcd"))


def test_thousand_resamples_of_bleu_and_cider():
    """Of 3,000 studies, statistics included: seconds on one core."""
    reports = [draw_study(2, i, 32, views=()).findings.lower() for i in range(3000)]
    groups, started = [str(i // 2) for i in range(3000)], time.process_time()
    found = intervals.score_all([Bleu(), Cider()], reports[1:] + reports[:1], reports, groups)
    assert all(score.low < score.value < score.high for score in found.values())
    assert time.process_time() - started < 20
