"""CheXpert Plus in miniature: its names, columns and folder trees, with drawn images and made-up reports."""

import csv
import json
import shutil
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from medxray.data import load_studies
from medxray.data.phantom import generate
from medxray.data.readers import READERS, split_of
from medxray.data.readers.chexpert import LABELS
from medxray.data.readers.chexpert_plus import CheXpertPlus
from medxray.spec import DataSpec, packaged
from medxray.types import DataError, Study

COLUMNS = next(
    csv.reader(
        [
            "path_to_image,path_to_dcm,frontal_lateral,ap_pa,deid_patient_id,patient_report_date_order,report,section_narrative,"
            "section_clinical_history,section_history,section_comparison,section_technique,section_procedure_comments,"
            "section_findings,section_impression,section_end_of_impression,section_summary,section_accession_number,age,sex,race,"
            "ethnicity,interpreter_needed,insurance_type,recent_bmi,deceased,split"
        ]
    )
)


def row(
    study: str, view: str, order: str, findings: str, impression: str, split: str = "train", history: str = ""
) -> dict[str, str]:
    """A row of the table; `study` is patientNNNNN/studyN, `view` such as view1_frontal."""
    return {
        "path_to_image": f"{split}/{study}/{view}.jpg",
        "path_to_dcm": f"{split}/{study}/{view}.dcm",
        "frontal_lateral": "Lateral" if "lateral" in view else "Frontal",
        "ap_pa": "" if "lateral" in view else "PA",
        "deid_patient_id": study.split("/")[0],
        "patient_report_date_order": order,
        "report": f"NARRATIVE:\nCHEST\n\nFINDINGS: {findings}\n\nIMPRESSION: {impression}",
        "section_history": history,
        "section_findings": findings,
        "section_impression": impression,
        "age": "71", "sex": "Male", "race": "White", "ethnicity": "Hispanic", "insurance_type": "Medicare", "recent_bmi": "31.5",
        "deceased": "Yes", "split": split,
    }  # fmt: skip


ROWS = [
    row("patient42142/study5", "view2_lateral", "3", "Clear,\nboth sides.", "Normal.", history="Cough."),
    row("patient42142/study5", "view1_frontal", "3", "Clear,\nboth sides.", "Normal.", history="Cough."),
    row("patient42142/study2", "view1_frontal", "10", "", "Worse."),
    row("patient42142/study9", "view1_frontal", "2", "Edema.", "Edema, mild."),
    row("patient00001/study1", "view1_frontal", "1", "Tube.", ""),
    *(row(f"patient{i:05}/study1", "view1_frontal", "1", f"Text {i}.", f"Note {i}.") for i in range(100, 130)),
    row("patient64541/study1", "view1_frontal", "1", "Heart large.", "Large heart.", "valid"),
]


def write(root: Path, rows: list[dict[str, str]] = ROWS, images: str = "PNG", suffix: str = ".png") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    with (root / "df_chexpert_plus_240401.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, restval="")
        table.writeheader()
        table.writerows(rows)
    for entry in rows:
        path = (root / images / entry["path_to_image"]).with_suffix(suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").resize((48, 56)).save(path)
    return root


def labels(root: Path, section: str, **more: Any) -> None:
    """CheXbert's labels: a JSON object a line; where a section is empty they say "No Finding"."""
    lines = []
    for entry in ROWS:
        values: dict[str, float | None] = dict.fromkeys(LABELS)
        text = entry["report"] if section == "report" else entry[f"section_{section}"]
        values["Edema"] = 1.0 if "Edema" in text else -1.0 if "Worse" in text else 0.0 if "Clear" in text else None
        values["No Finding"] = 1.0 if not text or "Normal" in text else None
        lines.append(json.dumps({"path_to_image": entry["path_to_image"], **values, **more}))
    (root / "chexbert_labels").mkdir(exist_ok=True)
    (root / "chexbert_labels" / f"{section}_fixed.json").write_text("\n".join(lines) + "\n")


def by_id(studies: Iterable[Study]) -> dict[str, Study]:
    return {study["study_id"]: study for study in studies}


def settings(root: Path, name: str = "chexpert-plus", **more: Any) -> Any:
    return READERS.settings_of("chexpert-plus")(name=name, root=str(root), **more)


def test_studies_as_published(tmp_path: Path) -> None:
    studies = by_id(CheXpertPlus(write(tmp_path)).read())
    assert list(studies)[:3] == ["patient42142_study5", "patient42142_study2", "patient42142_study9"]
    study = studies["patient42142_study5"]
    folder = "PNG/train/patient42142/study5"
    assert study["images"] == [f"{folder}/view1_frontal.png", f"{folder}/view2_lateral.png"]
    assert study["views"] == ["PA", "LL"] and study["patient_id"] == "patient42142"
    assert study["report"] == study["findings"] == "Clear,\nboth sides." and study["impression"] == "Normal."
    assert study["indication"] == "Cough." and study["labels"] == {}
    kept = json.dumps(list(studies.values()))
    assert not any(word in kept for word in ("White", "Hispanic", "Medicare", "31.5", "71", "deceased", "Male"))
    assert "section_race" not in study and set(study) <= set(Study.__annotations__)


def test_the_report_before_is_by_the_order_of_dates(tmp_path: Path) -> None:
    studies = by_id(CheXpertPlus(write(tmp_path)).read())
    assert studies["patient42142_study9"]["prior"] == ""
    assert studies["patient42142_study5"]["prior"] == "Edema. Edema, mild."
    assert studies["patient42142_study2"]["prior"] == "Clear,\nboth sides. Normal.", "10 comes after 3"
    assert studies["patient00001_study1"]["prior"] == ""


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ("findings", "Edema."),
        ("impression", "Edema, mild."),
        ("findings+impression", "Edema. Edema, mild."),
        ("all", ROWS[3]["report"]),
    ],
)
def test_what_is_learned_of_a_report(tmp_path: Path, part: Any, text: str) -> None:
    studies = by_id(CheXpertPlus(write(tmp_path), report=part).read())
    assert studies["patient42142_study9"]["report"] == text
    dropped = by_id(CheXpertPlus(tmp_path, report=part, without_report="drop").read())
    assert ("patient42142_study2" in dropped) == (part != "findings")
    assert ("patient00001_study1" in dropped) == (part != "impression")


def test_texts_of_a_study_come_from_one_of_its_rows(tmp_path: Path) -> None:
    """Rows of a study may differ in their report: the first image's stands, or the first that has the section."""
    rows = [dict(entry) for entry in ROWS]
    rows[0].update(section_findings="Another text.", section_impression="Another.")
    assert by_id(CheXpertPlus(write(tmp_path, rows)).read())["patient42142_study5"]["report"] == "Clear,\nboth sides."
    rows[1].update(section_findings="", section_impression="")
    study = by_id(CheXpertPlus(write(tmp_path, rows)).read())["patient42142_study5"]
    assert study["report"] == "Another text." and study["impression"] == "Another."


def test_labels_of_a_section(tmp_path: Path) -> None:
    root = write(tmp_path)
    with pytest.raises(DataError, match=r"findings_fixed.json.*data.reader.labels"):
        list(CheXpertPlus(root, labels="findings").read())
    labels(root, "impression")
    labels(root, "findings")
    studies = by_id(CheXpertPlus(root).read())
    assert list(studies["patient42142_study5"]["labels"]) == list(LABELS)
    assert studies["patient42142_study2"]["labels"]["Edema"] == -1, "of the impression, as CheXpert's"
    assert studies["patient42142_study5"]["labels"]["No Finding"] == 1
    empty = studies["patient00001_study1"]["labels"]
    assert set(empty.values()) == {None}, "an empty section has no labels, whatever was computed of it"
    findings = by_id(CheXpertPlus(root, labels="findings").read())
    assert findings["patient42142_study5"]["labels"]["Edema"] == 0
    assert set(findings["patient42142_study2"]["labels"].values()) == {None}
    before = list(CheXpertPlus(root).read())
    with zipfile.ZipFile(root / "chexbert_labels.zip", "w") as archive:
        for path in (root / "chexbert_labels").iterdir():
            archive.write(path, f"chexbert_labels/{path.name}")
    shutil.rmtree(root / "chexbert_labels")
    assert list(CheXpertPlus(root).read()) == before


@pytest.mark.parametrize("layout", ["PNG", "PNG/PNG", "PNGs", ".", "chunks"])
def test_images_wherever_they_were_unpacked(tmp_path: Path, layout: str) -> None:
    root = write(tmp_path, images="PNG" if layout == "chunks" else layout)
    if layout == "chunks":
        for i, folder in enumerate(sorted((root / "PNG" / "train").iterdir())):
            to = root / f"PNG/png_chexpert_plus_chunk_{i % 3}/PNG/train"
            to.mkdir(parents=True, exist_ok=True)
            folder.rename(to / folder.name)
        (root / "PNG" / "train").rmdir()
    studies = list(CheXpertPlus(root).read())
    assert len(studies) == 35 and all((root / image).is_file() for study in studies for image in study["images"])


def test_dicom_files(tmp_path: Path) -> None:
    root = write(tmp_path / "plus")
    drawn = generate(tmp_path / "drawn", studies=2, size=48, seed=1, format="dicom", progress=False)
    source = next((drawn / "images").iterdir())
    for entry in ROWS:
        path = root / "DICOM/Uncompressed" / entry["path_to_dcm"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.read_bytes())
    assert next(iter(CheXpertPlus(root).read()))["images"][0] == "PNG/train/patient42142/study5/view1_frontal.png"
    named = next(iter(CheXpertPlus(root, images="DICOM").read()))
    assert named["images"][0] == "DICOM/Uncompressed/train/patient42142/study5/view1_frontal.dcm"
    shutil.rmtree(root / "PNG")
    found = load_studies(DataSpec(reader=settings(root, without_report="drop"), on_error="skip"))
    assert found.skipped == [] and sum(map(len, found.splits.values())) == 34


def test_official_validation_as_test_or_as_validation(tmp_path: Path) -> None:
    root = write(tmp_path)
    studies = by_id(CheXpertPlus(root).read())
    assert studies["patient64541_study1"]["split"] == "test"
    train = {s["patient_id"]: s["split"] for s in studies.values() if s["patient_id"] != "patient64541"}
    assert (
        train == {patient: "val" if split_of(patient) == "val" else "train" for patient in train}
        and "val" in train.values()
    )
    as_val = by_id(CheXpertPlus(root, valid="val").read())
    assert as_val["patient64541_study1"]["split"] == "val"
    assert {s["split"] for s in as_val.values()} == {"train", "val"}


@pytest.mark.parametrize("prefix", ["", "PNG/"])
def test_the_annotation_of_r2gencsr(tmp_path: Path, prefix: str) -> None:
    """Its file has the studies, reports and splits of the paper; the table adds what it knows of the images."""
    root = write(tmp_path, images="PNGs")
    labels(root, "impression")
    first, second = (
        f"{prefix}train/{study}/view1_frontal.png" for study in ("patient42142/study5", "patient00001/study1")
    )
    entries: dict[str, list[dict[str, Any]]] = {
        "train": [{"id": "a", "report": "Clear both sides.", "image_path": [first], "split": "train"}],
        "val": [],
        "test": [{"id": "b", "report": "Tube.", "image_path": [second], "split": "test"}],
    }
    (root / "annotation.json").write_text(json.dumps(entries))
    studies = by_id(CheXpertPlus(root, annotation="annotation.json").read())
    assert list(studies) == ["a", "b"] and [s["split"] for s in studies.values()] == ["train", "test"]
    assert studies["a"]["images"] == ["PNGs/train/patient42142/study5/view1_frontal.png"] and studies["a"]["views"] == [
        "PA"
    ]
    assert studies["a"]["report"] == "Clear both sides." and studies["a"]["impression"] == "Normal."
    assert studies["a"]["patient_id"] == "patient42142" and studies["a"]["prior"] == "Edema. Edema, mild."
    assert studies["a"]["labels"]["No Finding"] == 1
    entries["val"] = [{"id": "c", "report": "x", "image_path": ["train/patient7/study1/view1_frontal.png"]}]
    (root / "annotation.json").write_text(json.dumps(entries))
    with pytest.raises(DataError, match=r"val\[0\].*patient7/study1/view1_frontal.*no row"):
        list(CheXpertPlus(root, annotation="annotation.json").read())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"path_to_image": "patient1.jpg"},
            r"df_chexpert_plus_240401.csv, line 2: path_to_image 'patient1.jpg'; expected",
        ),
        ({"path_to_image": "train/patient9/../x.jpg"}, r"line 2: path_to_image .*expected"),
        ({"split": "x"}, r"line 2: split 'x'"),
        ({"split": "valid"}, r"another patient or split than in other rows of patient42142_study5"),
        ({"deid_patient_id": "patient9"}, r"another patient or split"),
        ({"path_to_image": ROWS[1]["path_to_image"]}, r"stands twice"),
    ],
)
def test_mistakes_in_the_table(tmp_path: Path, change: dict[str, str], message: str) -> None:
    root = write(tmp_path)
    write(root, [{**ROWS[0], **change}, *ROWS[1:]], images="other")
    shutil.rmtree(root / "other")
    with pytest.raises(DataError, match=message):
        list(CheXpertPlus(root).read())


def test_mistakes_in_labels(tmp_path: Path) -> None:
    root = write(tmp_path)
    labels(root, "impression", Edema=0.5)
    with pytest.raises(DataError, match=r"impression_fixed.json, line 1: label 'Edema' is 0.5; expected"):
        list(CheXpertPlus(root).read())
    path = root / "chexbert_labels" / "impression_fixed.json"
    path.write_text("{\n")
    with pytest.raises(DataError, match=r"impression_fixed.json, line 1: not JSON"):
        list(CheXpertPlus(root).read())


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no folder .*none"):
        list(CheXpertPlus(tmp_path / "none").read())
    (tmp_path / "stray.txt").touch()
    with pytest.raises(DataError, match=r"df_chexpert_plus_240401.csv: no such file.*stray.txt"):
        list(CheXpertPlus(tmp_path).read())
    root = write(tmp_path / "a")
    shutil.rmtree(root / "PNG")
    with pytest.raises(DataError, match=r"no image below.*patient"):
        list(CheXpertPlus(root).read())
    with pytest.raises(DataError, match=r"no image below.*images"):
        list(CheXpertPlus(root, images="images").read())


def test_from_a_spec_to_decoded_studies(tmp_path: Path) -> None:
    found = load_studies(
        DataSpec(reader=settings(write(tmp_path), without_report="drop"), on_error="skip"), reports=True
    )
    assert found.skipped == [] and sum(map(len, found.splits.values())) == 34


def test_the_packaged_specs_read_it(tmp_path: Path) -> None:
    data = yaml.safe_load(packaged()["r2gencsr-chexpert-plus"].read_text())["data"]
    data["reader"]["root"] = write(tmp_path)
    found = load_studies(DataSpec(**{**data, "reader": settings(**data["reader"])}), reports=True)
    assert sum(map(len, found.splits.values())) == 34 and all(map(len, found.splits.values()))
    labels(tmp_path, "impression")
    entry = {"report": "Tube.", "image_path": ["train/patient00001/study1/view1_frontal.png"]}
    rows = {"train": [{"id": "a", **entry}], "val": [], "test": []}
    (tmp_path / "annotation.json").write_text(json.dumps(rows))
    reader = settings(**data["reader"], annotation="annotation.json")
    found = load_studies(DataSpec(reader=reader, cleaning="r2gen-mimic"), reports=True)
    assert found.splits["train"]["study_id"] == ["a"]


@pytest.mark.slow
def test_tables_of_full_size_are_read_in_seconds(tmp_path: Path) -> None:
    """223,228 rows of 187,711 studies, with reports of some hundred words."""
    root = write(tmp_path)
    words = "The cardiac silhouette is within normal limits, and there is no focal consolidation or effusion. " * 2
    rows = (
        row(
            f"patient{i * 64_725 // 223_228 + 1:05}/study{i % 3 + 1}",
            f"view{i // 3 % 2 + 1}_frontal",
            str(i % 3),
            words,
            words[:200],
        )
        for i in range(223_228)
    )
    with (root / "df_chexpert_plus_240401.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, restval="")
        table.writeheader()
        table.writerows(rows)
    start = time.process_time()
    studies = list(CheXpertPlus(root).read())
    seconds = time.process_time() - start
    print(f"{seconds:.1f} s")
    assert len(studies) > 180_000 and seconds < 40
