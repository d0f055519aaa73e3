"""Scores of a table of reports."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pytest
from pyarrow import parquet
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from typer.testing import CliRunner

from medxray.cli import app
from medxray.data.text import clean
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
    assert alone["rouge-l"].value == by_patient.value and alone["rouge-l"].high != by_patient.high
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


def test_the_protocol_of_r2gen(tmp_path: Path) -> None:
    """Raw texts are scored as R2Gen would: cleaned by its rule, references cut at 59 words."""
    long = "1. The heart is normal. 2. No effusion. " + "Lungs are clear. " * 30
    rows = [("s1", "p1", "The heart is normal. No effusion.", long), ("s2", "p2", "lungs are clear .", "Lungs: clear!")]
    found = score_table(table(tmp_path / "t.csv", rows), "model", "report", protocol="r2gen-iu", intervals=False)
    references = {i: [" ".join(clean(row[3], "r2gen-iu").split()[:59])] for i, row in enumerate(rows)}
    predictions = {i: [clean(row[2], "r2gen-iu")] for i, row in enumerate(rows)}
    assert len(references[0][0].split()) == 59
    bleu = Bleu(4).compute_score(references, predictions, verbose=0)[0]
    assert [found[f"bleu-{n + 1}"].value for n in range(4)] == pytest.approx(bleu, abs=1e-9)
    cleaned = "r2gen-iu: predictions and references cleaned by r2gen-iu"
    assert found.protocol == f"{cleaned}; references cut after 59 words, rare words kept"
    # Of 8 + 4 words predicted 8 + 3 are right, and the references have as many: nothing is taken off for length.
    short = score_table(tmp_path / "t.csv", "model", "report", protocol="r2gen-iu", words=8, intervals=False)
    assert short["bleu-1"].value == pytest.approx(11 / 12) and "cut after 8 words" in short.protocol
    whole = score_table(tmp_path / "t.csv", "model", "report", protocol="full-iu", intervals=False)
    assert whole["bleu-1"].value < found["bleu-1"].value < short["bleu-1"].value
    assert score_table(tmp_path / "t.csv", "model", "report").protocol == "as it stands: texts neither cleaned nor cut"
    with pytest.raises(DataError, match=r"line 2: column 'report' has no word left when it is cleaned by r2gen-iu"):
        score_table(table(tmp_path / "e.csv", [("s1", "p1", "a", "...")]), "model", "report", protocol="r2gen-iu")


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_other_tables_give_the_same(suffix: str, tmp_path: Path) -> None:
    names = ("study_id", "patient_id", "model", "report")
    rows: list[dict[str, Any]] = [dict(zip(names, row, strict=True)) for row in ROWS]
    rows[2]["model"] = None
    path = tmp_path / f"t{suffix}"
    if suffix == ".parquet":
        parquet.write_table(arrow.Table.from_pylist([{**row, "words": ["a"]} for row in rows]), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    found, known = score_table(path, "model", "report"), score_table(table(tmp_path / "t.csv"), "model", "report")
    assert found.to_dict() == known.to_dict()
    with pytest.raises(DataError, match=r"no column 'modle'; did you mean 'model'.*\(found: study_id, .*one by --prediction"):
        score_table(path, "modle", "report")
    rows[3]["report"] = None
    if suffix == ".parquet":
        parquet.write_table(arrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=rf"t{suffix}, (row|line) 4: column 'report' is empty"):
        score_table(path, "model", "report")


FILES = {
    "an empty file": ("t.csv", b"", "empty; expected a header line"),
    "another encoding": ("t.csv", "study_id,model,report\ns,é,a\n".encode("latin-1"), r"expected UTF-8, .* 0xe9 .*line 2"),
    "UTF-16": ("t.csv", "study_id,model,report\n".encode("utf-16"), "found UTF-16"),
    "a workbook": ("t.csv", b"PK\x03\x04 and so on", "found a zip archive or an Excel workbook"),
    "prose": ("t.csv", b"dear reader\nthis is no table\n", "no column 'model'"),
    "a short row": ("t.csv", b"study_id,model,report\ns1,a\n", "line 2: 2 cells; expected 3"),
    "no Parquet": ("t.parquet", b"study_id,model,report\n", "not a Parquet file"),
    "no JSON": ("t.jsonl", b'{"model": "a", "report": "b"}\n{"model"\n', "line 2: expected a JSON object"),
    "a list": ("t.jsonl", b"[1]\n", "line 1: expected a JSON object"),
}


@pytest.mark.parametrize("what", FILES)
def test_files_that_are_no_table_of_reports(what: str, tmp_path: Path) -> None:
    """One clear message and exit code 2, whatever the file is."""
    name, data, message = FILES[what]
    (tmp_path / name).write_bytes(data)
    command = ["score", str(tmp_path / name), "--prediction", "model", "--reference", "report"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2 and re.search(message, done.output), done.output
    assert done.output.startswith("medxray: ") and str(tmp_path / name) in done.output
    assert len(done.output.splitlines()) == 1


@pytest.mark.parametrize("out", ["none/scores.json", ".", "t.csv/scores.json"])
def test_a_place_that_cannot_be_written_is_told_first(out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        pytest.fail("scored before the place was tried")

    monkeypatch.setattr("medxray.scoring.score_all", never)
    command = ["score", str(table(tmp_path / "t.csv")), "--prediction", "model", "--reference", "report"]
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path / out)])
    assert done.exit_code == 2 and "cannot be written" in done.output and "--out" in done.output, done.output


def test_nothing_is_left_where_the_scoring_fails(tmp_path: Path) -> None:
    out = tmp_path / "out" / "scores.json"
    out.parent.mkdir()
    out.write_text("kept")
    file = table(tmp_path / "t.csv", [*ROWS, ROWS[0]])
    done = CliRunner().invoke(app, ["score", str(file), "--prediction", "model", "--reference", "report", "--out", str(out)])
    assert done.exit_code == 2 and out.read_text() == "kept" and list(out.parent.iterdir()) == [out]


def test_the_command_of_the_docs(tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    command = ["score", str(table(tmp_path / "t.csv")), "--prediction", "model", "--reference", "report"]
    command += ["--metrics", "bleu,rouge-l,cider", "--no-intervals", "--out", str(out)]
    command += ["--max-words", "4", "--protocol", "r2gen-iu"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and "protocol r2gen-iu: " in done.output and "cut after 4 words" in done.output, done.output
    written = json.loads(out.read_text())
    assert list(written["scores"]) == ["bleu-1", "bleu-2", "bleu-3", "bleu-4", "rouge-l", "cider"]
    assert all(isinstance(score["value"], float) for score in written["scores"].values())
    assert written["protocol"].startswith("r2gen-iu: ")
    done = CliRunner().invoke(app, [*command[:-1], "r2gen-ui"])
    assert done.exit_code == 2 and "no 'r2gen-ui'; did you mean 'r2gen-iu'" in done.output
