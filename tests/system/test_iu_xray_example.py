"""The study on real radiographs, in small: it goes through, is judged, and keeps what is finished."""

import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "iu_xray" / "run.py"
TRY = {
    "data": {"max_studies": 48},
    "training": {"epochs": None, "steps": 2, "warmup": 0.0, "evaluate_steps": 2, "save_steps": 2, "validation_studies": 4},
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_from_radiographs_to_the_table(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(EXAMPLE))
    arguments = ["--root", str(shared / "data" / "iu_xray"), "--folder", str(tmp_path)]
    example["main"](arguments, TRY)
    table = (tmp_path / "table-val.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if line.startswith("|")][2:]
    floors = ("best constant report", "most frequent report", "nearest image's report")
    assert rows == [*example["SYSTEMS"].values(), example["RETRIEVED"], *floors]
    assert "48 studies of split val" in table and table in capsys.readouterr().out
    assert table.count("- R2GenCSR, ") == 2
    # What is there is kept; what was lost is made again, and the table is the same.
    kept = (tmp_path / "pretrain" / "model.safetensors").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "r2gen")
    example["main"](arguments, TRY)
    assert (tmp_path / "table-val.md").read_text(encoding="utf-8") == table
    assert (tmp_path / "pretrain" / "model.safetensors").stat().st_mtime_ns == kept


def test_findings_named_are_judged_by_the_tags_that_people_gave() -> None:
    metric = runpy.run_path(str(EXAMPLE))["TagF1"]()
    reports = ["the heart is enlarged . no pleural effusion .", "there is a small left pleural effusion .", "normal chest ."]
    tags = [{"Cardiomegaly", "Spine"}, {"Cardiomegaly"}, {"Pleural Effusion"}]
    found = dict(zip(metric.values, metric.reduce(metric.statistics(reports, tags), np.ones((1, 3)))[0], strict=True))
    assert found["tag-f1"] == pytest.approx(2 / (2 + 1 + 2))
    assert found["tag-f1-macro"] == pytest.approx((2 / 3 + 0) / 2)
