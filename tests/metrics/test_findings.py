"""F1 of the findings that two texts name."""

import numpy as np
import pytest

pytest.importorskip("medxray.metrics.clinical")
pytest.importorskip("medxray.data.phantom")

from medxray.metrics.findings import FindingF1

EFFUSION = "there is a small left pleural effusion ."
BOTH = "the heart is enlarged . there is a small left pleural effusion ."
NORMAL = "the lungs are clear . no pleural effusion or pneumothorax ."


def f1(predictions: list[str], references: list[str]) -> list[float]:
    metric = FindingF1()
    return list(metric.reduce(metric.statistics(predictions, references), np.ones((1, len(predictions))))[0])


def test_hits_misses_and_inventions():
    # Effusion: 1 hit, 1 invented, 1 missed. Cardiomegaly: 1 missed.
    macro, micro = f1([EFFUSION, EFFUSION, NORMAL], [BOTH, NORMAL, EFFUSION])
    assert macro == pytest.approx((0.5 + 0) / 2)
    assert micro == pytest.approx(2 / (2 + 1 + 2))


def test_a_finding_no_reference_names_is_left_out_of_the_mean_only():
    macro, micro = f1([BOTH, NORMAL], [EFFUSION, NORMAL])
    assert macro == 1 and micro == pytest.approx(2 / 3)


def test_doubt_counts_as_named():
    assert f1(["possible pneumothorax ."], ["there is a pneumothorax ."]) == [1, 1]


def test_nothing_to_find_is_undefined():
    assert np.isnan(f1([BOTH], [NORMAL])).all()
