"""Scores of groups of studies: those of the group alone, from the statistics of all."""

import math

import numpy as np
import pytest

from medxray.metrics import METRICS, intervals
from medxray.metrics.classification import AUROC
from medxray.metrics.reconstruction import ReconstructionError
from medxray.metrics.subgroups import LEAST, describe, score_subgroups
from medxray.metrics.text import Bleu, RougeL
from medxray.types import Score, Scores

N = 150


def some_studies():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, (N, 2)).astype(float)
    scores = rng.random((N, 2)) + truth * 0.4
    sexes = rng.choice(["female", "male", ""], N, p=[0.4, 0.35, 0.25])
    patients = [f"p{i // 2}" for i in range(N)]
    return scores, truth, sexes, patients


def test_a_group_has_the_scores_of_its_studies_alone():
    scores, truth, sexes, patients = some_studies()
    metric = AUROC()
    metric.labels = ["a", "b"]
    found = score_subgroups([metric], [metric.statistics(scores, truth)], patients, {"sex": sexes}, 200, seed=3)
    assert list(found["sex"]) == ["female", "male", "unknown"]
    for group, values in found["sex"].items():
        own = sexes == group.replace("unknown", "")
        alone = intervals.score(metric, scores[own], truth[own], [p for p, o in zip(patients, own, strict=True) if o], 200, 3)
        assert values == alone and values["auroc/b"].n == own.sum()
        assert values["auroc"].low < values["auroc"].value < values["auroc"].high


def test_groups_of_reports():
    """Precisions of a corpus are not means of studies: a group's come from its own counts."""
    texts = ["heart is normal .", "no effusion .", "small left effusion is seen ."] * 20
    references = ["the heart is normal .", "no pleural effusion .", "large left effusion ."] * 20
    groups = ["PA", "AP", "PA"] * 20
    metrics = [Bleu(), RougeL()]
    statistics = [metric.statistics(texts, references) for metric in metrics]
    found = score_subgroups(metrics, statistics, [""] * 60, {"view": groups}, 50)["view"]
    for group, values in found.items():
        own = [i for i in range(60) if groups[i] == group]
        for metric in metrics:
            alone = metric.compute(predictions=[texts[i] for i in own], references=[references[i] for i in own])
            assert {name: values[name].value for name in metric.values} == pytest.approx(alone, abs=1e-12)


def test_small_groups_are_told_and_not_scored():
    metric = ReconstructionError()
    bands = ["18-39"] * LEAST + ["80+"] * (LEAST - 1) + [""] * LEAST
    rows = metric.statistics(np.arange(len(bands)), np.zeros(len(bands)))
    found = score_subgroups([metric], [rows], [""] * len(bands), {"age": bands, "sex": ["male"] * len(bands)}, 50)
    assert list(found) == ["age"], "one group of all studies is no subgroup"
    small, large = found["age"]["80+"]["reconstruction-error"], found["age"]["18-39"]["reconstruction-error"]
    assert math.isnan(small.value) and math.isnan(small.low) and small.n == LEAST - 1
    assert large.value == pytest.approx(9.5) and large.n == LEAST
    where, told = describe(found, {"reconstruction-error": large})
    assert "by age are in scores.json" in where and "fewer than 20" in told and told.endswith("not scored: age 80+ (19)")
    assert describe({}, {}) == []


def test_a_mean_over_fewer_labels_is_told():
    scores, truth, _, patients = some_studies()
    views = ["AP"] * 40 + ["PA"] * (N - 40)
    truth[:40, 1] = 0
    metric = AUROC()
    metric.labels = ["a", "b"]
    found = score_subgroups([metric], [metric.statistics(scores, truth)], patients, {"view": views}, 20)
    whole = intervals.score(metric, scores, truth, patients, 20)
    assert found["view"]["AP"]["auroc"].value == found["view"]["AP"]["auroc/a"].value
    assert math.isnan(found["view"]["AP"]["auroc/b"].value)
    assert describe(found, whole)[-1].endswith("undefined there: view AP")


def test_scores_json_keeps_them():
    one = {"auroc": Score(0.5, 0.4, 0.6, 30)}
    scores = Scores(one, subgroups={"sex": {"female": one, "male": {"auroc": Score(math.nan, math.nan, math.nan, 3)}}})
    kept = scores.to_dict()
    assert kept["subgroups"]["sex"]["male"]["auroc"] == {"value": None, "low": None, "high": None, "n": 3}
    again = Scores.from_dict(kept)
    assert again.subgroups["sex"]["female"] == one and again.subgroups["sex"]["male"]["auroc"].n == 3
    del kept["subgroups"]
    assert Scores.from_dict(kept).subgroups == {}, "a file of before"


def test_every_metric_of_labels_scores_groups():
    scores, truth, sexes, patients = some_studies()
    names = [name for name in METRICS.names() if METRICS.get(name).takes == "labels"]
    metrics = [METRICS.build(METRICS.settings_of(name)(name=name)) for name in names]
    statistics = [metric.statistics(np.clip(scores, 0, 1), truth) for metric in metrics]
    found = score_subgroups(metrics, statistics, patients, {"sex": sexes}, 20)["sex"]["female"]
    assert len(found) == len(names) == 7 and all(math.isfinite(score.low) for score in found.values())
