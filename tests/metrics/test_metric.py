"""What every metric can do by its base class."""

import numpy as np
import pytest

from medxray.metrics import METRICS

PREDICTIONS = ["edema . no effusion .", "clear lungs .", "", "left effusion . the heart is large ."]
REFERENCES = ["edema .", "clear lungs .", "no edema .", "right effusion . cardiomegaly ."]


def metric(name: str):
    return METRICS.build(METRICS.settings_of(name)(name=name))


@pytest.mark.parametrize("name", ["bleu", "rouge-l", "cider", "finding-f1", "clinical"])
def test_a_studys_own_values_are_those_of_it_alone(name):
    # More studies than are reduced at once.
    found = metric(name)
    rows = found.statistics(PREDICTIONS * 70, REFERENCES * 70)
    alone = np.concatenate([found.reduce(rows[i : i + 1], np.ones((1, 1))) for i in range(4)])
    each = found.each(rows)
    assert each.shape == (280, len(found.values))
    np.testing.assert_allclose(each, np.tile(alone, (70, 1)), rtol=1e-12)


def test_a_value_that_one_study_cannot_have_is_nan_and_nans_do_not_spread():
    ranking = metric("auroc")
    ranking.labels = ["a", "b"]
    assert np.isnan(ranking.each(ranking.statistics([[0.2, 0.9], [0.4, 0.1]], [[1, 0], [0, None]]))).all()
    mean = metric("rouge-l")
    np.testing.assert_array_equal(mean.each(np.array([[0.5], [np.nan]])), [[0.5], [np.nan]])
    assert metric("bleu").each(np.empty((0, 10))).shape == (0, 4)
