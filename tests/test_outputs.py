"""What others read: tables, a page, FHIR R4 by SMART's models of 4.0.1, DICOM structured reports by highdicom."""

import base64
import csv
import datetime
import io
import json
import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydicom
import pytest
from fhirclient.models.bundle import Bundle
from fhirclient.models.diagnosticreport import DiagnosticReport
from fhirclient.models.fhirabstractbase import FHIRValidationError
from highdicom import sr
from pyarrow import parquet

import medxray
from medxray.data.dicom_headers import structured_report as read_report
from medxray.data.privacy import Names, find_key
from medxray.data.study_files import studies_in
from medxray.outputs import Answer, as_text, write
from medxray.outputs.dicom_sr import structured_report
from medxray.outputs.fhir import diagnostic_report
from medxray.types import DataError, Prediction, RunError

Run = Callable[..., tuple[int, str, str]]
TEXT = "The heart is normal in size. No <pneumothorax> & no effusion.\nLungs: größer als üblich, 肺."
SAID = Prediction("one", text=TEXT, context={"positive": ["a", "b"]}, similarity={"positive": [0.5, 0.25]})
SCORED = Prediction("two", scores={"Effusion": 0.25, "Lung Lesion": 0.0})
IDENTITY = ("Mustermann", "4711", "19480229", "A99", "Weiß", "101112")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, radiograph: Callable[..., bytes], phantom: Path) -> Path:
    """Two DICOM studies, one of two views with the lateral one first, a PNG, and a file that is no image."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "deep").mkdir()
    (folder / "a-lateral.dcm").write_bytes(radiograph(1, ViewPosition="LL"))
    (folder / "b-frontal.dcm").write_bytes(radiograph(2))
    other = radiograph(3, StudyInstanceUID="1.2.3", PatientID="7")
    (folder / "deep" / "c").write_bytes(other)
    (folder / "d.png").write_bytes(next((phantom / "images").rglob("*.png")).read_bytes())
    (folder / "notes.txt").write_text("no image")
    return folder


def test_tables_have_the_same_columns_for_every_task(tmp_path: Path) -> None:
    answers = [Answer(SAID, []), Answer(SCORED, [])]
    names = ["study_id", "text", "scores", "context", "similarity", "log_probabilities", "tokens"]
    lines = [json.loads(line) for line in as_text(answers, "jsonl", "m").splitlines()]
    assert [list(line) for line in lines] == [names, names]
    rows = list(csv.reader(io.StringIO(as_text(answers, "csv", "m"))))
    assert rows[0] == names and rows[1][:2] == ["one", TEXT]
    assert [json.loads(cell) for cell in rows[2][2:]] == list(lines[1].values())[2:]
    write(answers, "parquet", tmp_path / "x.parquet", model="m", data=None)  # type: ignore[arg-type]
    table = parquet.read_table(tmp_path / "x.parquet")
    assert table.column_names == names
    assert table.to_pylist(maps_as_pydicts="strict") == lines
    write(answers[:1], "parquet", tmp_path / "y.parquet", model="m", data=None)  # type: ignore[arg-type]
    assert parquet.read_table(tmp_path / "y.parquet").schema == table.schema


@pytest.mark.parametrize("prediction", [SAID, SCORED, Prediction("three", text="\x00\x0bCtrl", scores={"x": float("nan")})])
def test_fhir_is_what_r4_says(prediction: Prediction, radiograph: Callable[..., bytes], phantom: Path) -> None:
    image = next((phantom / "images").rglob("*.png"))
    for images in ([radiograph(1), radiograph(2)], [image]):
        report = json.loads(json.dumps(diagnostic_report(prediction, images, model="m"), allow_nan=False))
        found = DiagnosticReport(report, strict=True)
        assert found.as_json() == report and found.status == "preliminary"
        assert not any(name in json.dumps(report, ensure_ascii=False) for name in IDENTITY)
        assert report["code"]["coding"][0] == {"system": "http://loinc.org", "code": "30745-4", "display": "XR Chest Views"}
        assert datetime.datetime.fromisoformat(report["issued"]).tzinfo is not None
        # dom-3: what is contained is referred to, and what is referred to is contained.
        contained = {f"#{one['id']}" for one in report.get("contained", [])}
        assert contained == set(re.findall(r'"reference": "(#.*?)"', json.dumps(report)))
        assert len(found.result or []) == len(prediction.scores)
    assert "subject" not in report and "effectiveDateTime" not in report, "a PNG tells neither"


def test_fhir_says_what_was_predicted(radiograph: Callable[..., bytes]) -> None:
    report = diagnostic_report(SAID, [radiograph(1)], model="m")
    assert report["conclusion"] == TEXT and report["effectiveDateTime"] == "2024-02-03"
    assert base64.b64decode(report["presentedForm"][0]["data"]).decode() == TEXT
    assert "No &lt;pneumothorax&gt; &amp; no effusion." in report["text"]["div"] and "<pneumo" not in report["text"]["div"]
    assert report["subject"]["identifier"]["value"] == Names(find_key())("number", "4711-0815")
    issued = diagnostic_report(SAID, [radiograph(1, IssuerOfPatientID="H")], model="m")
    assert issued["subject"]["identifier"]["value"] == Names(find_key())("patient", "4711-0815", "H")
    observations = diagnostic_report(SCORED, [], model="m")["contained"][:-1]
    assert [one["valueQuantity"]["value"] for one in observations] == [0.25, 0.0]
    with pytest.raises(FHIRValidationError):
        DiagnosticReport(report | {"status": 3})
    several = json.loads(as_text([Answer(SAID, []), Answer(SCORED, [])], "fhir", "m"))
    assert len(Bundle(several, strict=True).entry) == 2


@pytest.mark.parametrize("prediction", [SAID, SCORED, Prediction("both", text=TEXT, scores={"Größe" * 20: 0.125})])
def test_a_structured_report_reads_back(prediction: Prediction, radiograph: Callable[..., bytes], tmp_path: Path) -> None:
    sources = [radiograph(1, ViewPosition="LL"), radiograph(2)]
    path = tmp_path / "report.dcm"
    path.write_bytes(structured_report(prediction, sources, model="tiny"))
    data, source = pydicom.dcmread(path), pydicom.dcmread(io.BytesIO(sources[0]))
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate",
                    "AccessionNumber", "ReferringPhysicianName"):  # fmt: skip
        assert str(data[keyword].value) == str(source[keyword].value), keyword
    assert data.SOPClassUID == pydicom.uid.EnhancedSRStorage and data.Modality == "SR"
    assert data.SeriesInstanceUID != source.SeriesInstanceUID
    assert (data.CompletionFlag, data.VerificationFlag, data.PreliminaryFlag) == ("COMPLETE", "UNVERIFIED", "PRELIMINARY")
    document = sr.srread(path)
    assert isinstance(document, sr.EnhancedSR)
    findings = document.content[0].ContentSequence if len(document.content) == 1 else document.content
    texts = [item.value for item in sr.utils.find_content_items(document, value_type="TEXT", recursive=True)
             if item.name.value == "121071"]  # fmt: skip
    assert texts == ([prediction.text] if prediction.text else []) and findings
    certain = sr.utils.find_content_items(document, value_type="NUM", recursive=True)
    assert [float(item.value) for item in certain] == [100 * value for value in prediction.scores.values()]
    images = sr.utils.find_content_items(document, value_type="IMAGE", recursive=True)
    expected = {pydicom.dcmread(io.BytesIO(one)).SOPInstanceUID for one in sources}
    assert {item.referenced_sop_instance_uid for item in images} == expected
    evidence = data.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
    assert {one.ReferencedSOPInstanceUID for series in evidence for one in series.ReferencedSOPSequence} == expected
    if prediction.text and not prediction.scores:
        # As this library's own reader of reports has it.
        assert read_report(path).text == f"FINDINGS:\n{prediction.text}"


ODD = {
    "no study": ({"StudyInstanceUID": None}, "without StudyInstanceUID"),
    "no instance": ({"SOPInstanceUID": None}, "without SOPInstanceUID"),
    "sex": ({"PatientSex": "MUSTERMANN"}, "attributes of the DICOM source are not valid"),
    "birth date": ({"PatientBirthDate": "4711"}, "attributes of the DICOM source are not valid"),
}


@pytest.mark.parametrize("case", ODD)
@pytest.mark.filterwarnings("ignore")
def test_odd_sources_are_refused_without_their_values(case: str, radiograph: Callable[..., bytes]) -> None:
    attributes, message = ODD[case]
    with pytest.raises(DataError, match=message) as error:
        structured_report(SAID, [radiograph(1, **attributes)], model="m")
    assert not any(name.lower() in str(error.value).lower() for name in IDENTITY)


def test_a_source_that_tells_little_is_enough_and_nothing_is_logged(
    radiograph: Callable[..., bytes], caplog: pytest.LogCaptureFixture
) -> None:
    few = dict.fromkeys(("PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate", "StudyTime"))
    caplog.set_level(logging.DEBUG)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = structured_report(SAID, [radiograph(1, **few)], model="m")
        structured_report(SAID, [radiograph(1, PatientName="Mustermann")], model="m")
    assert pydicom.dcmread(io.BytesIO(made)).PatientName == ""
    assert not any(name in caplog.text for name in IDENTITY)


def test_sources_that_cannot_be(radiograph: Callable[..., bytes], phantom: Path) -> None:
    image = next((phantom / "images").rglob("*.png"))
    with pytest.raises(DataError, match=r"needs DICOM sources.*1 of 2 files are not"):
        structured_report(SAID, [radiograph(1), image], model="m")
    for make in (structured_report, diagnostic_report):
        for other in ({"PatientID": "another"}, {"StudyInstanceUID": "1.2.3"}):
            with pytest.raises(DataError, match=r"files of 2 (patients|studies)") as error:
                make(SAID, [radiograph(1), radiograph(2, **other)], model="m")  # type: ignore[operator]
            assert not any(name in str(error.value) for name in IDENTITY)


def test_studies_of_a_folder(folder: Path, tmp_path: Path) -> None:
    studies, left_out = studies_in([folder, folder / "d.png"])
    assert [(one["study_id"], [image.name for image in one["images"]]) for one in studies] == [
        ("b-frontal", ["b-frontal.dcm", "a-lateral.dcm"]), ("d", ["d.png"]), ("deep/c", ["c"]), ("d", ["d.png"]),
    ]  # fmt: skip
    assert len(left_out) == 1 and "notes.txt" in left_out[0]
    with pytest.raises(DataError, match="a folder without images"):
        studies_in([tmp_path])


def test_predict_writes_every_form(run: Run, report_run: Path, folder: Path, tmp_path: Path) -> None:
    code, out, error = run("predict", report_run, folder, "--format", "jsonl")
    assert code == 0 and "left out:" in error and "notes.txt" in error
    lines: list[dict[str, Any]] = [json.loads(line) for line in out.splitlines()]
    assert [line["study_id"] for line in lines] == ["b-frontal", "d", "deep/c"] and all(line["text"] for line in lines)
    assert json.loads(run("predict", report_run, folder, "--json")[1])["predictions"] == lines
    with_one = medxray.load(report_run).predict((folder / "b-frontal.dcm", folder / "a-lateral.dcm"))
    assert with_one.text == lines[0]["text"]
    for ending in ("csv", "parquet", "html", "json"):
        code, out, _ = run("predict", report_run, folder, "--output", tmp_path / "new" / f"x.{ending}", "-q")
        assert code == 0 and out == f"written: {tmp_path / 'new' / f'x.{ending}'}\n"
    page = (tmp_path / "new" / "x.html").read_text()
    assert page.count("<article>") == 3 and page.count("<img ") == 4 and lines[0]["text"] in page
    assert "http" not in re.sub(r"http-equiv|data:image/\S+", "", page), "self-contained"
    assert len(Bundle(json.loads((tmp_path / "new" / "x.json").read_text())).entry) == 3
    code, out, _ = run("predict", report_run, folder / "b-frontal.dcm", "--format", "fhir")
    assert DiagnosticReport(json.loads(out)).conclusion
    code, out, _ = run(
        "predict", report_run, "--study", folder / "b-frontal.dcm", folder / "a-lateral.dcm", "--output", tmp_path / "one.dcm"
    )
    assert code == 0 and read_report(tmp_path / "one.dcm").text == f"FINDINGS:\n{lines[0]['text']}"
    code, out, error = run("predict", report_run, folder, "--format", "dicom-sr", "--output", tmp_path / "reports")
    assert code == 2 and "needs DICOM sources" in error and not (tmp_path / "reports").exists()
    (folder / "d.png").rename(tmp_path / "d.png")
    try:
        code, out, _ = run("predict", report_run, folder, "--format", "dicom-sr", "--output", tmp_path / "reports")
    finally:
        (tmp_path / "d.png").rename(folder / "d.png")
    assert code == 0 and sorted(p.name for p in (tmp_path / "reports").iterdir()) == ["b-frontal.dcm", "deep_c.dcm"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "fihr"], "no form 'fihr'; did you mean 'fhir'"),
        (["--format", "parquet"], "name a file by --output"),
        (["--output", "x.doc"], "its ending is none of .csv"),
        (["--output", "{file}/x.csv"], "cannot be written"),
    ],
)
def test_mistakes(arguments: list[str], message: str, run: Run, report_run: Path, folder: Path) -> None:
    file = folder / "d.png"
    code, _, error = run("predict", report_run, file, *(a.format(file=file) for a in arguments))
    assert code == 2 and message in error and error.startswith("medxray: ")


def test_no_place_for_errors_of_reconstruction() -> None:
    from medxray.outputs import check_format

    with pytest.raises(RunError, match="fhir takes a report or probabilities"):
        check_format("fhir", "pretrain")
