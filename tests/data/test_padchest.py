"""PadChest: the published table and its folders in small, with 16-bit images of phantoms."""

import csv
import gzip
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medxray.data import load_studies, read_image
from medxray.data.phantom import draw_study
from medxray.data.readers import READERS, split_of
from medxray.data.readers.padchest import TABLE, PadChest
from medxray.spec import DataSpec
from medxray.types import DataError, Study

HEADER = (
    ",ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,PatientBirth,PatientSex_DICOM,ViewPosition_DICOM,Projection,"
    "MethodProjection,Pediatric,Modality_DICOM,Manufacturer_DICOM,PhotometricInterpretation_DICOM,"
    "PixelRepresentation_DICOM,PixelAspectRatio_DICOM,SpatialResolution_DICOM,BitsStored_DICOM,WindowCenter_DICOM,"
    "WindowWidth_DICOM,Rows_DICOM,Columns_DICOM,XRayTubeCurrent_DICOM,Exposure_DICOM,ExposureInuAs_DICOM,ExposureTime,"
    "RelativeXRayExposure_DICOM,ReportID,Report,MethodLabel,Labels,Localizations,LabelsLocalizationsBySentence,labelCUIS,"
    "LocalizationsCUIS"
)
COLUMNS = HEADER.split(",")

REPORT = "sin hallazg patolog edad pacient . "
DATE, BIRTH = "20140915", "1931.0"

Row = dict[str, str]


def a_row(image: str, study: str, patient: str, projection: str = "PA", **more: Any) -> Row:
    own = {
        "ImageID": f"{image}.png", "ImageDir": "0", "StudyDate_DICOM": DATE, "StudyID": study, "PatientID": patient,
        "PatientBirth": BIRTH, "PatientSex_DICOM": "F", "ViewPosition_DICOM": "POSTEROANTERIOR", "Projection": projection,
        "MethodProjection": "Manual review of DICOM fields", "Pediatric": "No", "BitsStored_DICOM": "14",
        "WindowCenter_DICOM": "[8191, 8191]", "ReportID": f"R{study}", "Report": REPORT, "MethodLabel": "Physician",
        "Labels": "['normal']", "Localizations": "[]", "LabelsLocalizationsBySentence": "[['normal'], ['normal']]",
    }  # fmt: skip
    return dict.fromkeys(COLUMNS, "") | own | {key: str(value) for key, value in more.items()}


ROWS = [
    a_row("1000", "s1", "p1", "L", Labels="['cardiomegaly', ' pleural effusion', '']"),
    a_row("1001", "s1", "p1", Labels="['cardiomegaly', ' pleural effusion', '']", ImageDir=1),
    a_row("2000", "s2", "p4", "AP_horizontal", MethodLabel="RNN_model"),
    a_row("3000", "s3", "p1", "COSTAL"),
    a_row("4000", "s4", "p5", "AP", Pediatric="PED", Labels="[\"Chilaiditi's sign\", 'normal']"),
    a_row("5000", "s5", "p3", "EXCLUDE"),
    a_row("5001", "s5", "p3", ""),
    a_row("6000", "s6", "p5", Labels="", Report=""),
]


def write(root: Path, rows: list[Row], packed: bool = False) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(row | {"": str(i)} for i, row in enumerate(rows))
    data = text.getvalue().encode()
    (root / (TABLE + ".gz" * packed)).write_bytes(gzip.compress(data) if packed else data)


def layout(root: Path, rows: list[Row] = ROWS, place: str = "{ImageDir}/", packed: bool = False) -> Path:
    root.mkdir(exist_ok=True)
    write(root, rows, packed)
    for i, row in enumerate(rows):
        path = root / place.format(**row) / row["ImageID"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_study(0, i, 32).images[0] * np.uint16(16)).save(path)
    return root


def by_id(studies: Iterable[Study]) -> dict[str, Study]:
    return {study["study_id"]: study for study in studies}


def spec_of(root: Path, **settings: Any) -> DataSpec:
    reader = READERS.settings_of("padchest")(name="padchest", root=str(root), **settings)
    return DataSpec(reader=reader, image_size=32, cleaning="none")


@pytest.mark.parametrize(
    ("place", "packed"),
    [("{ImageDir}/", False), ("{ImageDir}/", True), ("images/{ImageDir}/", False), ("", False), ("images/", True)],
)
def test_official_layout(tmp_path: Path, place: str, packed: bool) -> None:
    root = layout(tmp_path, place=place, packed=packed)
    studies = by_id(PadChest(root, least_studies=1).read())
    assert list(studies) == ["s1", "s2", "s4", "s6"]
    two_views = studies["s1"]
    assert two_views == Study(
        study_id="s1",
        patient_id="p1",
        images=[place.format(ImageDir=1) + "1001.png", place.format(ImageDir=0) + "1000.png"],
        views=["PA", "LL"],
        findings=REPORT.strip(),
        impression="",
        report=REPORT.strip(),
        labels={"No Finding": 0, "cardiomegaly": 1, "chilaiditi's sign": 0, "pleural effusion": 1},
        split=split_of("p1"),
        sex="female",
        age_band="80+",
        manufacturer="",
    )
    assert studies["s2"]["views"] == ["AP"] and studies["s2"]["labels"]["No Finding"] == 1
    assert studies["s4"]["labels"]["chilaiditi's sign"] == 1
    assert set(studies["s6"]["labels"].values()) == {None}
    image = two_views["images"][0]
    pixels = read_image(root / image, max_pixels=10**6, name=image)
    assert np.array_equal(np.unique(np.round(pixels * 65535)) % 16, np.zeros(len(np.unique(pixels))))


def test_loads_as_studies(tmp_path: Path) -> None:
    rows = [
        a_row(f"{i}", f"s{i}", f"p{i // 2}", Labels="['normal']" if i % 2 else f"['nodule', 'rare {i}']")
        for i in range(80)
    ]
    root = layout(tmp_path, rows)
    found = load_studies(spec_of(root), reports=True)
    assert found.labels == ["No Finding", "nodule"]
    assert all(split_of(study["patient_id"]) == name for name, split in found.splits.items() for study in split)
    study = found.splits["train"][0]
    assert study["report"] == REPORT.strip() and study["labels"] == {"No Finding": 0, "nodule": 1}


def test_no_date_is_kept(tmp_path: Path) -> None:
    rows = [row | {"Manufacturer_DICOM": "PhilipsMedicalSystems" if i else "Dr. 1931"} for i, row in enumerate(ROWS)]
    studies = list(PadChest(layout(tmp_path, rows)).read())
    kept = json.dumps(studies)
    assert DATE not in kept and "2014" not in kept and "1931" not in kept
    assert [study["manufacturer"] for study in studies] == ["", "Philips", "Philips", "Philips"], "s1 has images of two makers"


def test_settings_choose_studies(tmp_path: Path) -> None:
    root = layout(tmp_path)
    reader = PadChest(root)
    reader.read()
    assert [entry["reason"].split(",")[0] for entry in reader.left_out] == [
        f"1 images of projection {name}" for name in ("COSTAL", "EXCLUDE", "UNK")
    ]
    assert set(by_id(PadChest(root, projections=["PA", "COSTAL", "EXCLUDE"]).read())) == {"s1", "s3", "s5", "s6"}
    assert by_id(PadChest(root, projections=["PA"]).read())["s1"]["images"] == ["1/1001.png"]
    assert set(by_id(PadChest(root, labelled_by="physician").read())) == {"s1", "s4", "s6"}
    assert set(by_id(PadChest(root, pediatric=False).read())) == {"s1", "s2", "s6"}
    assert by_id(PadChest(root, folders=[1]).read())["s1"]["images"] == ["1/1001.png"]


def test_what_differs_is_not_one_study(tmp_path: Path) -> None:
    rows = [
        a_row("1", "s1", "p1", ReportID="7", Report="uno ."),
        a_row("2", "s1", "p1", ReportID="8", Report="dos ."),
        a_row("3", "s2", "p2"),
    ]
    studies = by_id(PadChest(layout(tmp_path, rows)).read())
    assert {name: study["report"] for name, study in studies.items()} == {
        "s1-7": "uno .",
        "s1-8": "dos .",
        "s2": REPORT.strip(),
    }


def test_errors_name_what_is_wrong(tmp_path: Path) -> None:
    root = layout(tmp_path)

    def changed(match: str, row: int, **cells: str) -> None:
        write(root, [own | cells if i == row else own for i, own in enumerate(ROWS)])
        with pytest.raises(DataError, match=match):
            PadChest(root).read()
        write(root, ROWS)

    changed(r"line 3: Labels .*normal.*; expected a list such as \['normal'\]", 1, Labels="normal")
    changed(r"line 3: Labels", 1, Labels="['normal'")
    changed(r"line 4: StudyID or PatientID is empty", 2, PatientID="")
    changed(r"folders 7 of 3 are missing \(found: 0, 1\).*data\.reader\.folders", 2, ImageDir="7")
    changed(r"outside data\.reader\.root", 2, ImageID="../../x.png")
    with pytest.raises(DataError, match="no image is left"):
        PadChest(root, folders=[9]).read()
    write(root, ROWS[:7])
    (root / "1" / "1001.png").unlink()
    with pytest.raises(DataError, match=r"1 of 4 images are missing: '1/1001\.png'"):
        load_studies(spec_of(root))
    for folder in ("0", "1"):
        (root / folder).rename(root / f"elsewhere{folder}")
    (root / "0.zip").touch()
    with pytest.raises(DataError, match=r"0\.zip is packed.*unpack it into the folder 0/"):
        PadChest(root).read()
    (root / TABLE).unlink()
    with pytest.raises(DataError, match=r"PADCHEST.*csv: no such file"):
        PadChest(root).read()


@pytest.mark.slow
def test_the_whole_table_opens_in_seconds(tmp_path: Path) -> None:
    """160,868 rows of 110,000 studies, 36 columns, some 180 labels."""
    import time

    terms = [f"finding {i}" for i in range(180)]
    rng = np.random.default_rng(0)
    sets = [str([terms[k] for k in rng.choice(180, 3)]) for _ in range(20_000)]
    rows = []
    for i in range(160_868):
        study = i * 110_000 // 160_868
        labels = "['normal']" if study % 3 == 0 else sets[study % 20_000]
        rows.append(a_row(f"{i:045}", f"{study:038}", f"{study // 2:038}", "PA", Labels=labels, ImageDir=i % 3))
    write(tmp_path, rows, packed=True)
    for folder in range(3):
        (tmp_path / str(folder)).mkdir()
    start = time.process_time()
    studies = list(PadChest(tmp_path).read())
    seconds = time.process_time() - start
    print(f"160,868 rows in {seconds:.2f} s of a processor")
    assert len(studies) == 110_000 and len(studies[0]["labels"]) == 181 and seconds < 15, seconds
