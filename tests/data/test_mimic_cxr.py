"""MIMIC-CXR in miniature: its names, columns and folder trees, with drawn images and made-up reports."""

import csv
import gzip
import json
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
from medxray.data.readers.mimic_cxr import MIMICCXR
from medxray.spec import DataSpec, packaged
from medxray.types import DataError, Study

METADATA = next(
    csv.reader(
        [
            "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,StudyDate,StudyTime,"
            "ProcedureCodeSequence_CodeMeaning,ViewCodeSequence_CodeMeaning,PatientOrientationCodeSequence_CodeMeaning"
        ]
    )
)
FINDINGS = next(
    csv.reader(
        [
            "Atelectasis,Cardiomegaly,Consolidation,Edema,Enlarged Cardiomediastinum,Fracture,Lung Lesion,Lung Opacity,"
            "No Finding,Pleural Effusion,Pleural Other,Pneumonia,Pneumothorax,Support Devices"
        ]
    )
)
"""The labels in the order of the published tables."""

# patient, study, images as (id, ViewPosition, view code), date, time as published: without leading zeros; split; findings
VISITS: list[tuple[str, str, list[tuple[str, str, str]], str, str, str, str]] = [
    ("10000032", "53189527", [("2a2277a9-b0ded155", "LATERAL", "lateral"), ("e084de3b-be89b11e", "PA", "postero-anterior")],
     "21800626", "213014.531", "train", "The heart is large."),
    ("10000032", "50414267", [("02aa804e-bde0afdd", "PA", "postero-anterior"), ("174413ec-4ec4c1f7", "LATERAL", "lateral")],
     "21800626", "90414.25", "train", "No effusion."),
    ("10000032", "53911762", [("68b5c4b1-227d0485", "AP", "antero-posterior")], "21800723", "80556.875", "train", ""),
    ("11000011", "51029426", [("d2b6bb58-e8d6d1c9", "AP", "antero-posterior")], "21500101", "1.5", "validate", "Tube in place."),
    ("12000012", "56522600", [("c6ce8d6c-77d3ea4b", "", "postero-anterior")], "21330415", "120000", "test", "Edema."),
]  # fmt: skip
CHEXPERT = {
    "53189527": {"Cardiomegaly": "1.0", "Edema": "-1.0"},
    "50414267": {"Pleural Effusion": "0.0"},
    "56522600": {"Edema": "1.0"},
}


def report(study: str, findings: str) -> str:
    section = f" FINDINGS: \n \n {findings}\n \n" if findings else ""
    return (
        "                                 FINAL REPORT\n EXAMINATION:  CHEST (PA AND LAT)\n \n"
        f" INDICATION:  ___F with cough {study}.\n \n TECHNIQUE:  Chest PA and lateral\n \n COMPARISON:  None.\n \n"
        f"{section} IMPRESSION: \n \n Impression of {study}.\n"
    )


def write(path: Path, header: list[str], rows: Iterable[dict[str, str]], packed: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(f"{path}.gz", "wt", newline="") if packed else path.open("w", newline="") as file:
        table = csv.DictWriter(file, header, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def folder_of(patient: str) -> str:
    return f"files/p{patient[:2]}/p{patient}"


def tables(root: Path, packed: bool = True, version: str = "2.0.0") -> None:
    """What MIMIC-CXR-JPG has beside its images."""
    images = [
        {"dicom_id": image, "subject_id": patient, "study_id": study, "ViewPosition": view, "StudyDate": date, "StudyTime": at,
         "Rows": "3056", "Columns": "2544", "ViewCodeSequence_CodeMeaning": code, "split": split}
        for patient, study, shots, date, at, split, _ in VISITS
        for image, view, code in shots
    ]  # fmt: skip
    write(
        root / f"mimic-cxr-{version}-metadata.csv",
        METADATA,
        ({k: r[k] for k in METADATA if k in r} for r in images),
        packed,
    )
    header = ["dicom_id", "study_id", "subject_id", "split"]
    write(root / f"mimic-cxr-{version}-split.csv", header, ({k: r[k] for k in header} for r in images), packed)
    patient_of = {study: patient for patient, study, *_ in VISITS}
    rows = [{"subject_id": patient_of[study], "study_id": study, **labels} for study, labels in CHEXPERT.items()]
    write(root / f"mimic-cxr-{version}-chexpert.csv", ["subject_id", "study_id", *FINDINGS], rows, packed)
    rows[0] = {**rows[0], "Edema": "0.0"}
    write(root / f"mimic-cxr-{version}-negbio.csv", ["subject_id", "study_id", *FINDINGS], rows, packed)


def pictures(root: Path, phantom: Path, suffix: str = ".jpg") -> None:
    drawn = iter(sorted((phantom / "images").iterdir()))
    for patient, study, shots, *_ in VISITS:
        folder = root / folder_of(patient) / f"s{study}"
        folder.mkdir(parents=True, exist_ok=True)
        for image, *_ in shots:
            source = next(drawn)
            if suffix == ".dcm":
                (folder / f"{image}.dcm").write_bytes(source.read_bytes())
            else:
                Image.open(source).save(folder / f"{image}{suffix}", quality=95)


def texts(root: Path) -> None:
    for patient, study, *_, findings in VISITS:
        path = root / folder_of(patient) / f"s{study}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(report(study, findings))


@pytest.fixture(scope="module")
def jpg(tmp_path_factory: pytest.TempPathFactory, phantom: Path) -> Path:
    """MIMIC-CXR-JPG with the report tree unpacked into the same folder."""
    root = tmp_path_factory.mktemp("mimic") / "mimic-cxr-jpg" / "2.0.0"
    tables(root)
    pictures(root, phantom)
    texts(root)
    return root


def by_id(studies: Iterable[Study]) -> dict[str, Study]:
    return {study["study_id"]: study for study in studies}


def settings(root: Path, name: str = "mimic-cxr", **more: Any) -> Any:
    return READERS.settings_of("mimic-cxr")(name=name, root=str(root), **more)


def test_studies_as_published(jpg: Path) -> None:
    studies = by_id(MIMICCXR(jpg).read())
    assert list(studies) == ["53189527", "50414267", "53911762", "51029426", "56522600"]
    whole = studies["53189527"]
    assert whole["patient_id"] == "10000032" and whole["split"] == "train"
    folder = "files/p10/p10000032/s53189527"
    assert whole["images"] == [f"{folder}/e084de3b-be89b11e.jpg", f"{folder}/2a2277a9-b0ded155.jpg"]
    assert whole["views"] == ["PA", "LL"]
    assert whole["findings"] == whole["report"] == "The heart is large."
    assert whole["impression"] == "Impression of 53189527." and whole["indication"] == "___F with cough 53189527."
    assert list(whole["labels"]) == list(LABELS) and len(LABELS) == 14
    assert {k: v for k, v in whole["labels"].items() if v is not None} == {"Cardiomegaly": 1, "Edema": -1}
    assert [studies[s]["split"] for s in ("51029426", "56522600")] == ["val", "test"]
    assert studies["51029426"]["views"] == ["AP"]
    assert studies["56522600"]["views"] == ["PA"], "by the view's code where its position is not told"
    assert set(studies["53911762"]["labels"].values()) <= {None}
    assert studies["53911762"]["report"] == "" and studies["53911762"]["impression"]


def test_the_report_before_is_by_date_and_time_and_no_date_is_kept(jpg: Path) -> None:
    studies = by_id(MIMICCXR(jpg).read())
    assert studies["50414267"]["prior"] == "", "9:04 in the morning is before 21:30"
    assert studies["53189527"]["prior"] == "No effusion. Impression of 50414267."
    assert studies["53911762"]["prior"] == "The heart is large. Impression of 53189527."
    assert studies["51029426"]["prior"] == ""
    kept = json.dumps(list(studies.values()))
    assert not any(text in kept for text in ("2180", "213014", "90414", "2150", "2133"))


def test_studies_at_one_time_are_not_before_one_another(jpg: Path, tmp_path: Path) -> None:
    for path in jpg.glob("*.gz"):
        (tmp_path / path.name).symlink_to(path)
    with gzip.open(jpg / "mimic-cxr-2.0.0-metadata.csv.gz", "rt") as file:
        text = file.read().replace("90414.25", "213014.531").replace("21800723", "")
    (tmp_path / "mimic-cxr-2.0.0-metadata.csv").write_text(text)
    studies = by_id(MIMICCXR(jpg, tables=str(tmp_path)).read())
    assert [studies[s]["prior"] for s in ("50414267", "53189527", "53911762")] == ["", "", ""]


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ("findings", "No effusion."),
        ("impression", "Impression of 50414267."),
        ("findings+impression", "No effusion. Impression of 50414267."),
        ("all", report("50414267", "No effusion.")),
    ],
)
def test_what_is_learned_of_a_report(jpg: Path, part: Any, text: str) -> None:
    studies = by_id(MIMICCXR(jpg, report=part).read())
    assert studies["50414267"]["report"] == text
    if part == "findings+impression":
        assert studies["53911762"]["report"] == "Impression of 53911762.", "what there is of them"


def test_studies_without_the_section_are_dropped_on_demand(jpg: Path) -> None:
    studies = by_id(MIMICCXR(jpg, without_report="drop").read())
    assert "53911762" not in studies and len(studies) == 4
    later = by_id(MIMICCXR(jpg, report="impression", without_report="drop").read())
    assert len(later) == 5 and later["53911762"]["prior"].startswith("The heart is large.")


@pytest.mark.parametrize("version", ["2.0.0", "2.1.0"])
@pytest.mark.parametrize("packed", [True, False])
def test_tables_packed_or_not_of_either_version(jpg: Path, tmp_path: Path, packed: bool, version: str) -> None:
    (tmp_path / "files").symlink_to(jpg / "files")
    tables(tmp_path, packed, version)
    # The root is another folder, and its `files` leads out of it: that is refused, as everywhere.
    with pytest.raises(DataError, match=r"outside data\.reader\.root"):
        list(MIMICCXR(tmp_path).read())
    assert list(MIMICCXR(jpg, tables=str(tmp_path)).read()) == list(MIMICCXR(jpg).read())


@pytest.mark.parametrize("how", ["zip", "unpacked zip", "other folder", "zip in root"])
def test_reports_where_they_lie(jpg: Path, tmp_path: Path, phantom: Path, how: str) -> None:
    root = tmp_path / "jpg"
    tables(root)
    pictures(root, phantom)
    where = None
    if how.startswith("zip"):
        home = root if how == "zip in root" else tmp_path
        texts(tmp_path / "apart")
        with zipfile.ZipFile(home / "mimic-cxr-reports.zip", "w") as archive:
            for path in sorted((tmp_path / "apart").rglob("*.txt")):
                archive.write(path, path.relative_to(tmp_path / "apart"))
        where = None if how == "zip in root" else str(home / "mimic-cxr-reports.zip")
    elif how == "unpacked zip":
        texts(root / "mimic-cxr-reports")
    else:
        texts(tmp_path / "mimic-cxr" / "2.0.0")
        where = str(tmp_path / "mimic-cxr" / "2.0.0")
    assert list(MIMICCXR(root, reports=where).read()) == list(MIMICCXR(jpg).read())


def test_dicom_layout_with_the_tables_of_the_other(tmp_path: Path, jpg: Path) -> None:
    drawn = generate(tmp_path / "drawn", studies=8, size=48, seed=1, format="dicom", progress=False)
    root = tmp_path / "mimic-cxr" / "2.1.0"
    pictures(root, drawn, ".dcm")
    texts(root)
    rows = [
        {
            "subject_id": patient,
            "study_id": study,
            "dicom_id": image,
            "path": f"{folder_of(patient)}/s{study}/{image}.dcm",
        }
        for patient, study, shots, *_ in VISITS
        for image, *_ in shots
    ]
    write(root / "cxr-record-list.csv", ["subject_id", "study_id", "dicom_id", "path"], rows)
    texts_of = [{"subject_id": p, "study_id": s, "path": f"{folder_of(p)}/s{s}.txt"} for p, s, *_ in VISITS]
    write(root / "cxr-study-list.csv", ["subject_id", "study_id", "path"], texts_of)
    with pytest.raises(DataError, match=r"no mimic-cxr-2.0.0-split.csv.*data.reader.tables.*split: hash"):
        list(MIMICCXR(root).read())
    alone = by_id(MIMICCXR(root, split="hash").read())
    assert {s["split"] for s in alone.values() if s["patient_id"] == "10000032"} == {split_of("10000032")}
    assert alone["50414267"]["views"] == ["unknown", "unknown"] and alone["50414267"]["labels"] == {}
    assert alone["50414267"]["report"] == "No effusion." and alone["53189527"]["prior"] == ""
    both = by_id(MIMICCXR(root, tables=str(jpg)).read())
    assert both["53189527"]["images"][0] == "files/p10/p10000032/s53189527/e084de3b-be89b11e.dcm"
    expected = by_id(MIMICCXR(jpg).read())
    for name, study in both.items():
        assert {**study, "images": []} == {**expected[name], "images": []}
    found = load_studies(DataSpec(reader=settings(root, tables=str(jpg), without_report="drop"), on_error="skip"))
    assert found.skipped == [] and len(found.splits["train"]) == 2


def test_labels_by_another_reader_or_by_radiologists(jpg: Path, tmp_path: Path) -> None:
    assert by_id(MIMICCXR(jpg, labels="negbio").read())["53189527"]["labels"]["Edema"] == 0
    for path in jpg.glob("*.gz"):
        (tmp_path / path.name).symlink_to(path)
    names = ["study_id", "Airspace Opacity", "Edema"]
    write(
        tmp_path / "mimic-cxr-2.1.0-test-set-labeled.csv",
        names,
        [{"study_id": "56522600", "Airspace Opacity": "1.0"}],
        False,
    )
    plain = by_id(MIMICCXR(jpg, tables=str(tmp_path)).read())
    assert plain["56522600"]["labels"]["Edema"] == 1, "never of itself"
    studies = by_id(MIMICCXR(jpg, tables=str(tmp_path), test_labels="radiologists").read())
    assert studies["56522600"]["labels"]["Lung Opacity"] == 1 and studies["56522600"]["labels"]["Edema"] is None
    assert studies["53189527"]["labels"] == plain["53189527"]["labels"]
    with pytest.raises(DataError, match=r"test-set-labeled.csv.*test_labels"):
        list(MIMICCXR(jpg, test_labels="radiologists").read())


def annotation(root: Path, prefix: str = "") -> None:
    kept: dict[str, list[dict[str, Any]]] = {"train": [], "val": [], "test": []}
    for patient, study, shots, *_, split, findings in VISITS:
        for image, *_ in shots:
            if findings:
                kept[{"validate": "val"}.get(split, split)].append({
                    "id": image, "study_id": int(study), "subject_id": int(patient), "report": f" {findings}\n",
                    "image_path": [f"{prefix}p{patient[:2]}/p{patient}/s{study}/{image}.jpg"], "split": split,
                })  # fmt: skip
    (root / "annotation.json").write_text(json.dumps(kept))


def test_r2gens_annotation(tmp_path: Path, phantom: Path, jpg: Path) -> None:
    """An entry is an image with its report; the official tables add what they know."""
    root = tmp_path / "r2gen"
    pictures(root, phantom)
    (root / "files").rename(root / "images")
    annotation(root)
    (bare, *rest) = MIMICCXR(root, annotation="annotation.json").read()
    assert (bare["study_id"], bare["patient_id"], bare["split"]) == ("2a2277a9-b0ded155", "10000032", "train")
    assert bare["images"] == ["images/p10/p10000032/s53189527/2a2277a9-b0ded155.jpg"] and bare["views"] == ["unknown"]
    assert bare["report"] == bare["findings"] == " The heart is large.\n" and bare["labels"] == {} and len(rest) == 5
    more = MIMICCXR(root, annotation="annotation.json", tables=str(jpg), reports=str(jpg))
    first = next(iter(more.read()))
    assert first["views"] == ["LL"] and first["labels"]["Cardiomegaly"] == 1
    assert first["report"] == " The heart is large.\n" and first["impression"] == "Impression of 53189527."
    assert (
        first["prior"] == "No effusion. Impression of 50414267." and first["indication"] == "___F with cough 53189527."
    )
    assert load_studies(DataSpec(reader=settings(root, annotation="annotation.json"), cleaning="r2gen-mimic")).splits[
        "val"
    ]


def test_from_a_spec_to_decoded_studies(jpg: Path) -> None:
    found = load_studies(DataSpec(reader=settings(jpg, without_report="drop"), on_error="skip"), reports=True)
    assert {name: len(rows) for name, rows in found.splits.items()} == {"train": 2, "val": 1, "test": 1}
    assert found.skipped == [] and found.labels == list(LABELS)
    with pytest.raises(DataError, match="report is empty"):
        load_studies(DataSpec(reader=settings(jpg)), reports=True)


def test_the_packaged_specs_read_it(jpg: Path) -> None:
    data = yaml.safe_load(packaged()["r2gencsr-mimic-cxr"].read_text())["data"]
    found = load_studies(DataSpec(**{**data, "reader": settings(**{**data["reader"], "root": jpg})}), reports=True)
    assert {name: len(rows) for name, rows in found.splits.items()} == {"train": 2, "val": 1, "test": 1}
    assert found.splits["train"]["report"] == ["the heart is large .", "no effusion ."]


def edit(jpg: Path, to: Path, name: str, old: str, new: str) -> None:
    """The tables with one of them changed, elsewhere."""
    for path in jpg.glob("*.gz"):
        (to / path.name).symlink_to(path)
    with gzip.open(jpg / f"{name}.gz", "rt") as file:
        text = file.read()
    assert old in text
    (to / f"{name}.gz").unlink()
    (to / name).write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("mimic-cxr-2.0.0-chexpert.csv", "-1.0", "maybe", r"chexpert.csv, line 2: label 'Edema' is 'maybe'; expected"),
        ("mimic-cxr-2.0.0-split.csv", "validate", "unknown", r"split.csv, line 7: split 'unknown'"),
        (
            "mimic-cxr-2.0.0-split.csv",
            "d2b6bb58-e8d6d1c9",
            "x",
            r"metadata.csv.gz, line 7: image 'd2b6bb58.*has no split",
        ),
        ("mimic-cxr-2.0.0-metadata.csv", "study_id", "study", r"metadata.csv: no column 'study_id'"),
        ("mimic-cxr-2.0.0-metadata.csv", "d2b6bb58-e8d6d1c9", "../../../../../x", r"outside data.reader.root|no split"),
        (
            "mimic-cxr-2.0.0-metadata.csv",
            "174413ec-4ec4c1f7",
            "02aa804e-bde0afdd",
            r"image of study 50414267 stands twice",
        ),
        (
            "mimic-cxr-2.0.0-metadata.csv",
            "174413ec-4ec4c1f7,10000032",
            "174413ec-4ec4c1f7,10000033",
            r"another patient or split",
        ),
        (
            "mimic-cxr-2.0.0-split.csv",
            "174413ec-4ec4c1f7,50414267,10000032,train",
            "174413ec-4ec4c1f7,50414267,10000032,test",
            r"line 5: another patient or split than in other rows of study 50414267",
        ),
        ("mimic-cxr-2.0.0-metadata.csv", "12000012", "", r"metadata.csv, line 8: .*subject_id"),
    ],
)
def test_mistakes_in_tables(jpg: Path, tmp_path: Path, name: str, old: str, new: str, message: str) -> None:
    edit(jpg, tmp_path, name, old, new)
    with pytest.raises(DataError, match=message):
        list(MIMICCXR(jpg, tables=str(tmp_path)).read())


def test_what_is_missing_is_named(jpg: Path, tmp_path: Path, phantom: Path) -> None:
    with pytest.raises(DataError, match=r"no folder .*none; expected"):
        list(MIMICCXR(tmp_path / "none").read())
    (tmp_path / "other.txt").touch()
    with pytest.raises(DataError, match=r"mimic-cxr-2.0.0-metadata.csv.*cxr-record-list.csv.*other.txt"):
        list(MIMICCXR(tmp_path).read())
    tables(tmp_path)
    with pytest.raises(DataError, match=r"no folder files.*p10.*data.reader.images"):
        list(MIMICCXR(tmp_path).read())
    pictures(tmp_path, phantom)
    assert {study["report"] for study in MIMICCXR(tmp_path).read()} == {""}, "images and labels alone"
    with pytest.raises(DataError, match=r"no report.*mimic-cxr-reports.zip.*data.reader.reports"):
        list(MIMICCXR(tmp_path, without_report="drop").read())
    with pytest.raises(DataError, match=r"no report.*data.reader.reports"):
        list(MIMICCXR(tmp_path, reports="elsewhere").read())
    texts(tmp_path / "mimic-cxr-reports")
    (tmp_path / "mimic-cxr-reports" / folder_of("12000012") / "s56522600.txt").unlink()
    with pytest.raises(DataError, match=r"1 of 5 reports.*s56522600"):
        list(MIMICCXR(tmp_path).read())
    (tmp_path / "mimic-cxr-reports.zip").write_bytes(b"PK\3\4 cut")
    with pytest.raises(DataError, match=r"mimic-cxr-reports.zip: .*zip"):
        list(MIMICCXR(tmp_path, reports="mimic-cxr-reports.zip").read())
    with pytest.raises(DataError, match=r"negbio.*data.reader.labels"):
        (tmp_path / "mimic-cxr-2.0.0-negbio.csv.gz").unlink()
        list(MIMICCXR(tmp_path, labels="negbio", reports=str(jpg)).read())


def test_a_patient_in_two_splits_is_refused(jpg: Path, tmp_path: Path) -> None:
    edit(jpg, tmp_path, "mimic-cxr-2.0.0-split.csv", "53911762,10000032,train", "53911762,10000032,test")
    with pytest.raises(DataError, match="1 patients in two splits"):
        load_studies(DataSpec(reader=settings(jpg, tables=str(tmp_path))))


@pytest.mark.slow
def test_tables_of_full_size_are_read_in_seconds(tmp_path: Path, phantom: Path) -> None:
    """377,110 images of 227,835 studies of 65,379 patients, as published."""
    number, images = 377_110, []
    for i in range(number):
        study = 50_000_000 + i * 227_835 // number
        patient = 10_000_000 + (study - 50_000_000) * 65_379 // 227_835 * 150
        images.append((f"{i:08x}-{i * 7919 % 2**32:08x}-{i * 31:08x}-{i * 17:08x}-{i * 13:08x}", patient, study))
    with gzip.open(tmp_path / "mimic-cxr-2.0.0-metadata.csv.gz", "wt", compresslevel=1) as file:
        file.write(",".join(METADATA) + "\n")
        for i, (image, patient, study) in enumerate(images):
            view = ("PA", "LATERAL", "AP")[i % 3]
            when = f"2180{i % 1200 + 101:04},{i % 240000}.531"
            file.write(
                f"{image},{patient},{study},CHEST (PA AND LAT),{view},3056,2544,{when},CHEST (PA AND LAT),x,Erect\n"
            )
    with gzip.open(tmp_path / "mimic-cxr-2.0.0-split.csv.gz", "wt", compresslevel=1) as file:
        file.write("dicom_id,study_id,subject_id,split\n")
        file.writelines(f"{image},{study},{patient},train\n" for image, patient, study in images)
    with gzip.open(tmp_path / "mimic-cxr-2.0.0-chexpert.csv.gz", "wt", compresslevel=1) as file:
        file.write("subject_id,study_id," + ",".join(FINDINGS) + "\n")
        seen = {study: patient for _, patient, study in images}
        file.writelines(f"{patient},{study},,1.0,,,,,-1.0,,,0.0,,,,\n" for study, patient in seen.items())
    image, patient, study = images[0]
    folder = tmp_path / f"files/p{str(patient)[:2]}/p{patient}/s{study}"
    folder.mkdir(parents=True)
    Image.new("L", (8, 8)).save(folder / f"{image}.jpg")
    start = time.process_time()
    studies = list(MIMICCXR(tmp_path).read())
    seconds = time.process_time() - start
    assert len(studies) == 227_835 and sum(len(study["images"]) for study in studies) == number
    print(f"{seconds:.1f} s")
    assert seconds < 30
