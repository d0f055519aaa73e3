"""Scores of a table of reports."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from typer.testing import CliRunner

from medxray.cli import app
from medxray.scoring import score_table
from medxray.types import DataError, SpecError

ROWS = [
    ("s1", "p1", "the heart is normal .", "the heart is normal in size ."),
    ("s2", "p1", "Lungs are clear, no effusion.", "lungs are clear ."),
    ("s3", "p2", "", "small left pleural effusion ."),
    ("s4", "p3", "there is a pacemaker .\nno pneumothorax .", "pacemaker in place ; no pneumothorax ."),
]


def table(path: Path, rows: Any = ROWS, header: Any = ("study_id", "patient_id", "model", "report")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_values_are_those_of_the_caption_evaluation(tmp_path: Path) -> None:
    found = score_table(table(tmp_path / "t.csv"), "model", "report")
    predictions = {i: [row[2]] for i, row in enumerate(ROWS)}
    references = {i: [row[3]] for i, row in enumerate(ROWS)}
    bleu = Bleu(4).compute_score(references, predictions, verbose=0)[0]
    for n in range(4):
        assert found[f"bleu-{n + 1}"].value == pytest.approx(bleu[n], abs=1e-9)
    assert found["rouge-l"].value == pytest.approx(Rouge().compute_score(references, predictions)[0], abs=1e-9)
    assert found["cider"].value == pytest.approx(Cider().compute_score(references, predictions)[0], abs=1e-9)
    assert found["bleu-1"].n == 4 and found["bleu-1"].low < found["bleu-1"].high
    assert "1 predictions are empty and count as such" in found.notes


def test_patients_are_drawn_whole(tmp_path: Path) -> None:
    file = table(tmp_path / "t.csv")
    by_patient = score_table(file, "model", "report", metrics=["rouge-l"])["rouge-l"]
    assert by_patient == score_table(file, "model", "report", metrics=["rouge-l"], patient="patient_id")["rouge-l"]
    unnamed = table(tmp_path / "u.csv", header=("id", "who", "model", "report"))
    alone = score_table(unnamed, "model", "report", metrics=["rouge-l"])
    assert alone["rouge-l"].value == by_patient.value and alone["rouge-l"].low != by_patient.low
    assert any("each row counts as a patient" in note for note in alone.notes)


def test_on_the_command_line(tmp_path: Path) -> None:
    file, out = table(tmp_path / "t.csv"), tmp_path / "scores.json"
    command = ["score", str(file), "--prediction", "model", "--reference", "report", "--out", str(out)]
    done = CliRunner().invoke(app, [*command, "--metrics", "bleu,clinical", "--no-intervals"])
    assert done.exit_code == 0, done.output
    assert "clinical-f1-micro-14" in done.output and "intervals" not in done.output
    written = json.loads(out.read_text(), parse_constant=pytest.fail)
    assert 0 < written["scores"]["bleu-1"]["value"] < 1 and written["scores"]["bleu-1"]["low"] is None
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and "95 % intervals" in done.output
    done = CliRunner().invoke(app, [*command[:3], "modle", *command[4:]])
    assert done.exit_code == 2 and "no column 'modle'; did you mean 'model'?" in done.output


@pytest.mark.parametrize(
    ("rows", "settings", "error", "message"),
    [
        ([], {}, DataError, "a header and no row"),
        ([*ROWS, ("s5", "", "clear .", " ")], {}, DataError, r"t.csv, line 7: column 'report' is empty; give the study"),
        ([*ROWS, ROWS[0]], {}, DataError, r"line 7: study 's1' stands on line 2 too"),
        (ROWS, {"metrics": ["blue"]}, SpecError, "no metric 'blue'; did you mean 'bleu'"),
        (ROWS, {"metrics": ["auroc"]}, SpecError, "'auroc' does not compare texts"),
        (ROWS, {"metrics": ["chexbert"]}, SpecError, r"'chexbert' needs settings \(weights\)"),
        (ROWS, {"patient": "who"}, DataError, "no column 'who'"),
    ],
)
def test_what_cannot_be_scored(rows: Any, settings: Any, error: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        score_table(table(tmp_path / "t.csv", rows), "model", "report", **settings)


def test_no_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.csv: no such file; expected a CSV table"):
        score_table(tmp_path / "none.csv", "model", "report")
