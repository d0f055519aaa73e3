"""Scores with intervals."""

import math

import numpy as np
import pytest

from medxray.metrics import intervals
from medxray.metrics.classification import AUROC
from medxray.metrics.reconstruction import ReconstructionError
from medxray.metrics.text import Bleu, RougeL
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
    assert errors(values, groups) == whole
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


def test_p_value_is_uniform_where_there_is_no_difference():
    p = []
    for seed in range(200):
        values = 9 + np.random.default_rng(seed).normal(0, 1, 60)
        p.append(apart(values, np.full(60, 9.0), [""] * 60, resamples=400, seed=seed).p)
    assert 0.01 <= np.mean(np.array(p) < 0.05) <= 0.1 and 0.4 < np.mean(p) < 0.6
    same = apart(np.ones(9), np.ones(9), [""] * 9)
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert apart(np.ones(9), np.zeros(9), [""] * 9, resamples=100).p == 0.01


def test_what_no_draw_defines_has_no_difference():
    found = intervals.difference(Bleu(), REPORTS, REPORTS, REPORTS, ["one"] * 4)["bleu-4"]
    assert found.value == 0 and math.isnan(found.low) and math.isnan(found.p)
    with pytest.raises(MedxrayError, match="found 4, 3 predictions, 4 references, 4 patient ids"):
        intervals.difference(Bleu(), REPORTS, REPORTS[:3], REPORTS, ["one"] * 4)
