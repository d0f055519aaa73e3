"""What holds of the metrics for any reports and labels: bounds, symmetries, weights, intervals."""

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from medxray.metrics import METRICS, Metric
from medxray.metrics.calibration import reliability
from medxray.metrics.intervals import difference, score
from medxray.metrics.text import best_constant

TEXT = ["bleu", "rouge-l", "cider", "finding-f1", "clinical"]
LABELS = ["auroc", "average-precision", "f1", "sensitivity", "specificity", "ece", "brier"]

words = st.sampled_from(["no", "heart", "lungs", "clear", "effusion", "edema", ".", "normal", "left", "large"])
reports = st.lists(words, max_size=12).map(" ".join)
pairs = st.lists(st.tuples(reports, reports), min_size=1, max_size=6)
long_reports = st.lists(words, min_size=4, max_size=12).map(" ".join)
# Scores with ties, each study with or without the label, or not known.
ranked = st.lists(st.tuples(st.integers(0, 8).map(lambda i: i / 8), st.sampled_from([0.0, 1.0])), min_size=2, max_size=12)


def metric(name: str) -> Metric:
    return METRICS.build(METRICS.settings_of(name)(name=name))


def values(made: Metric, predictions: Any, references: Any, weights: Any = None) -> np.ndarray:
    rows = made.statistics(predictions, references)
    with np.errstate(invalid="ignore", divide="ignore"):
        return made.reduce(rows, np.ones((1, len(rows))) if weights is None else np.array([weights], float))[0]


def inputs(name: str, told: list[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    """Predictions and references; a study's label has a column of its own."""
    predictions, references = map(list, zip(*told, strict=True))
    return (predictions, references) if name in TEXT else ([[p] for p in predictions], [[r] for r in references])


def studies(name: str) -> Any:
    return pairs if name in TEXT else ranked


def both(told: list[tuple[float, float]]) -> bool:
    return {truth for _, truth in told} == {0.0, 1.0}


@pytest.mark.parametrize("name", [*TEXT, *LABELS])
@given(data=st.data())
def test_bounds(name: str, data: st.DataObject) -> None:
    told = data.draw(studies(name))
    found = values(metric(name), *inputs(name, told))
    most = 10 if name == "cider" else 1
    assert np.all(np.isnan(found) | ((found >= 0) & (found <= most + 1e-6)))
    if name in ("bleu", "rouge-l", "cider"):
        assert not np.isnan(found).any()


@pytest.mark.parametrize("name", [*TEXT, *LABELS])
@given(data=st.data())
def test_the_order_of_studies_does_not_matter(name: str, data: st.DataObject) -> None:
    told = data.draw(studies(name))
    moved = data.draw(st.permutations(told))
    np.testing.assert_allclose(*(values(metric(name), *inputs(name, some)) for some in (told, moved)), rtol=1e-9)


@pytest.mark.parametrize("name", [*TEXT, *LABELS])
@given(data=st.data())
def test_a_weight_is_a_repetition(name: str, data: st.DataObject) -> None:
    told = data.draw(studies(name))
    weights = data.draw(st.lists(st.integers(0, 3), min_size=len(told), max_size=len(told)).filter(any))
    made = metric(name)
    rows = made.statistics(*inputs(name, told))
    with np.errstate(invalid="ignore", divide="ignore"):
        weighed = made.reduce(rows, np.array([weights, weights], float))
        repeated = made.reduce(np.repeat(rows, weights, axis=0), np.ones((1, sum(weights))))
    np.testing.assert_allclose(weighed, np.repeat(repeated, 2, axis=0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", TEXT)
@given(references=st.lists(long_reports, min_size=1, max_size=5), others=st.lists(reports, min_size=5, max_size=5))
def test_nothing_is_better_than_the_reference(name: str, references: list[str], others: list[str]) -> None:
    made = metric(name)
    best, found = (values(made, predicted, references) for predicted in (references, others[: len(references)]))
    assert np.all(np.isnan(best) | np.isnan(found) | (found <= best + 1e-6))
    if name != "cider":
        np.testing.assert_allclose(best[~np.isnan(best)], 1, atol=1e-6)
    elif len(set(references)) == len(references) > 1:
        assert best > 0


@given(reference=st.lists(words, min_size=6, max_size=14), cut=st.tuples(st.integers(4, 14), st.integers(4, 14)))
def test_bleu_pays_for_what_is_left_out(reference: list[str], cut: tuple[int, int]) -> None:
    few, many = (min(n, len(reference)) for n in sorted(cut))
    shorter, longer = (values(metric("bleu"), [" ".join(reference[:n])], [" ".join(reference)]) for n in (few, many))
    assert np.all(shorter <= longer + 1e-9) and (few == many or np.all(shorter < longer))
    np.testing.assert_allclose(shorter, np.exp(1 - len(reference) / few), rtol=1e-5)


@given(told=ranked)
def test_auroc_is_the_share_of_pairs_in_order(told: list[tuple[float, float]]) -> None:
    assume(both(told))
    made = metric("auroc")
    (found,) = values(made, *inputs("auroc", told))
    has, has_not = ([score for score, truth in told if truth == one] for one in (1, 0))
    in_order = [(a > b) + (a == b) / 2 for a in has for b in has_not]
    assert found == pytest.approx(np.mean(in_order))
    (other_way,) = values(made, *inputs("auroc", [(-score, truth) for score, truth in told]))
    (exchanged,) = values(made, *inputs("auroc", [(score, 1 - truth) for score, truth in told]))
    (stretched,) = values(made, *inputs("auroc", [(np.exp(3 * score), truth) for score, truth in told]))
    assert other_way == pytest.approx(1 - found) and exchanged == pytest.approx(1 - found) and stretched == found


@given(told=ranked)
def test_sensitivity_is_the_specificity_of_the_other_class(told: list[tuple[float, float]]) -> None:
    assume(both(told))
    (one,) = values(metric("sensitivity"), *inputs("sensitivity", told))
    (other,) = values(metric("specificity"), *inputs("specificity", [(-score, 1 - truth) for score, truth in told]))
    assert one == pytest.approx(other)


@given(told=ranked, bins=st.integers(1, 20), by=st.sampled_from(["equal-width", "equal-mass"]))
def test_reliability_is_what_ece_sums(told: list[tuple[float, float]], bins: int, by: Any) -> None:
    scores, truth = map(np.array, zip(*told, strict=True))
    curve = reliability(scores, truth, bins, by)
    assert sum(point.n for point in curve) == len(told)
    assert all(0 <= point.low <= point.share + 1e-12 and point.share <= point.high + 1e-12 <= 1 + 1e-9 for point in curve)
    made = METRICS.build(METRICS.settings_of("ece")(name="ece", bins=bins, by=by))
    (error,) = values(made, *inputs("ece", told))
    assert error == pytest.approx(sum(point.n * abs(point.probability - point.share) for point in curve) / len(told))


@given(told=ranked)
def test_the_chosen_threshold_is_the_best(told: list[tuple[float, float]]) -> None:
    assume(1.0 in {truth for _, truth in told})
    predictions, references = inputs("f1", told)
    made = metric("f1")
    made.choose(predictions, references)
    (best,) = values(made, predictions, references)
    for threshold in (0.5, *(one for one, _ in told)):
        made.chosen = {"0": threshold}
        assert values(made, predictions, references)[0] <= best + 1e-12


@pytest.mark.parametrize("name", ["bleu-1", "bleu-4", "rouge-l", "cider"])
@given(candidates=st.lists(reports, min_size=1, max_size=5), references=st.lists(reports, min_size=1, max_size=5))
def test_the_best_constant_is_the_best(name: str, candidates: list[str], references: list[str]) -> None:
    made = metric(name.removesuffix("-1").removesuffix("-4"))
    column = made.values.index(name)
    scores = {text: values(made, [text] * len(references), references)[column] for text in candidates}
    assert scores[best_constant(candidates, references, name)] == pytest.approx(max(scores.values()), abs=1e-12)


@pytest.mark.parametrize("name", ["rouge-l", "cider", "brier", "auroc"])
@given(data=st.data(), seed=st.integers(0, 99))
def test_intervals_hold_the_value(name: str, data: st.DataObject, seed: int) -> None:
    told = data.draw(studies(name).filter(lambda some: len(some) > 3))
    assume(name != "auroc" or both(told))
    predictions, references = inputs(name, told)
    patients = data.draw(st.lists(st.sampled_from(["a", "b", "c", ""]), min_size=len(told), max_size=len(told)))
    for found in score(metric(name), predictions, references, patients, 200, seed).values():
        assert np.isnan(found.low) or found.low - 1e-9 <= found.value <= found.high + 1e-9
    same = difference(metric(name), predictions, predictions, references, patients, 50, seed)
    assert all(one.value == 0 and (np.isnan(one.low) or one.low == one.high == 0) for one in same.values())
