"""The demo's reports come from the images: it beats what needs no image, and falls to that without their help."""

import runpy
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "demo_learning.py"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_reports_come_from_images(tmp_path: Path) -> None:
    benchmark = runpy.run_path(str(BENCHMARK))
    measured = benchmark["measure"](tmp_path)
    floor = max(measured[row].value for row in benchmark["FLOORS"])
    assert measured["demo"].value >= floor + 0.30
    assert measured["fitted with shuffled images"].value <= floor
