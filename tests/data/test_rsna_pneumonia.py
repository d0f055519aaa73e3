"""RSNA's pneumonia challenge: Kaggle's second stage in small, with DICOM files of phantoms."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pydicom
import pytest

from medxray.data import load_studies
from medxray.data.attributes import age_band_of
from medxray.data.phantom import generate
from medxray.data.readers import READERS, split_of
from medxray.data.readers.rsna_pneumonia import RSNAPneumonia
from medxray.spec import DataSpec
from medxray.types import DataError, Study

NAMES = [f"{i:08x}-3b2c-4f5d-9a51-63f4f55f9a52" for i in range(12)]
"""What the challenge calls patientId."""

MAPPING = "pneumonia-challenge-dataset-mappings_2018.json"


@pytest.fixture(scope="module")
def dicoms(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = generate(tmp_path_factory.mktemp("dicom") / "d", 16, 32, 2, "dicom", progress=False)
    return sorted((folder / "images").glob("*_[PA][AP].dcm"))


@pytest.fixture
def root(tmp_path: Path, dicoms: list[Path]) -> Path:
    """Nine labelled images, of which every third has pneumonia, one with two boxes; three to be tested."""
    labels, classes = ["patientId,x,y,width,height,Target"], ["patientId,class"]
    for i, name in enumerate(NAMES[:9]):
        if i % 3 == 0:
            boxes = ["264.0,152.0,213.0,379.0", "562.0,152.0,256.0,453.0"][: 1 + (i == 3)]
            labels += [f"{name},{box},1" for box in boxes]
            classes += [f"{name},Lung Opacity"] * len(boxes)
        else:
            labels.append(f"{name},,,,,0")
            classes.append(f"{name},{'Normal' if i % 3 == 1 else 'No Lung Opacity / Not Normal'}")
    (tmp_path / "stage_2_train_labels.csv").write_text("\n".join(labels) + "\n")
    (tmp_path / "stage_2_detailed_class_info.csv").write_text("\n".join(classes) + "\n")
    (tmp_path / "stage_2_sample_submission.csv").write_text("patientId,PredictionString\n")
    for i, name in enumerate(NAMES):
        folder = tmp_path / ("stage_2_train_images" if i < 9 else "stage_2_test_images")
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.dcm").write_bytes(dicoms[i].read_bytes())
    return tmp_path


def write_mapping(root: Path, patients: list[int], name: str = MAPPING) -> None:
    rows = [
        {
            "subset_img_id": image,
            "img_id": f"{patient:08}_{i:03}.png",
            "subset_group": "train",
            "orig_labels": ["Infiltration"],
            "StudyInstanceUID": f"1.2.{i}",
            "SeriesInstanceUID": f"1.3.{i}",
            "SOPInstanceUID": f"1.4.{i}",
        }
        for i, (image, patient) in enumerate(zip(NAMES, patients, strict=True))
    ]
    (root / name).write_text(json.dumps(rows))


def by_id(studies: Iterable[Study]) -> dict[str, Study]:
    return {study["study_id"]: study for study in studies}


def spec_of(root: Path, **settings: Any) -> DataSpec:
    reader = READERS.settings_of("rsna-pneumonia")(name="rsna-pneumonia", root=str(root), **settings)
    return DataSpec(reader=reader, image_size=32)


def test_official_layout(root: Path) -> None:
    studies = by_id(RSNAPneumonia(root).read())
    assert list(studies) == NAMES[:9]
    two_boxes = studies[NAMES[3]]
    assert two_boxes == Study(
        study_id=NAMES[3],
        patient_id=NAMES[3],
        images=[f"stage_2_train_images/{NAMES[3]}.dcm"],
        views=["unknown"],
        findings="",
        impression="",
        report="",
        labels={"Pneumonia": 1, "Lung Opacity": 1, "No Lung Opacity / Not Normal": 0, "No Finding": 0},
        split=split_of(NAMES[3]),
        sex="",
        age_band="",
        manufacturer="",
    )
    assert studies[NAMES[1]]["labels"]["No Finding"] == 1 and studies[NAMES[1]]["labels"]["Pneumonia"] == 0
    assert studies[NAMES[2]]["labels"]["No Lung Opacity / Not Normal"] == 1
    found = load_studies(spec_of(root))
    assert sum(map(len, found.splits.values())) == 9
    assert ["each image counts as a patient" in entry["reason"] for entry in found.skipped] == [True]


def test_mapping_keeps_patients_in_one_split(root: Path) -> None:
    write_mapping(root, [13774, 13774, 13774, 5, 5, 6, 7, 8, 9, 10, 11, 12])
    studies = by_id(RSNAPneumonia(root).read())
    assert [studies[name]["patient_id"] for name in NAMES[:5]] == ["13774", "13774", "13774", "5", "5"]
    assert all(study["split"] == split_of(study["patient_id"]) for study in studies.values())
    load_studies(spec_of(root))
    (root / MAPPING).rename(root / "mappings.json")
    assert by_id(RSNAPneumonia(root).read())[NAMES[0]]["patient_id"] == NAMES[0]
    assert by_id(RSNAPneumonia(root, mapping="mappings.json").read())[NAMES[0]]["patient_id"] == "13774"


def test_the_tested_images_of_the_challenge(root: Path) -> None:
    studies = by_id(RSNAPneumonia(root, test="challenge").read())
    assert set(studies) == set(NAMES)
    tested = studies[NAMES[10]]
    assert tested["split"] == "test" and tested["labels"] == {}
    assert tested["images"] == [f"stage_2_test_images/{NAMES[10]}.dcm"]
    splits = [studies[name]["split"] for name in NAMES[:9]]
    assert splits == ["val" if split_of(name) == "val" else "train" for name in NAMES[:9]]
    assert set(splits) == {"train", "val"}
    # A patient with images on both sides: those to learn from are left out.
    write_mapping(root, [1, 1, 2, 3, 4, 5, 6, 7, 8, 1, 11, 12])
    studies = by_id(RSNAPneumonia(root, test="challenge").read())
    assert NAMES[0] not in studies and NAMES[1] not in studies and NAMES[9] in studies and len(studies) == 10
    found = load_studies(spec_of(root, test="challenge"))
    assert len(found.splits["test"]) == 3 and found.labels[0] == "Pneumonia"
    assert [entry["study"] for entry in found.skipped] == NAMES[:2]


def test_views_from_headers(root: Path, dicoms: list[Path]) -> None:
    studies = list(RSNAPneumonia(root, headers=True).read())
    assert [study["views"] for study in studies] == [[path.stem[-2:]] for path in dicoms[:9]]
    assert {view for study in studies for view in study["views"]} == {"PA", "AP"}
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in dicoms[:9]]
    assert [study["sex"][0].upper() for study in studies] == [header.PatientSex for header in headers]
    assert [study["age_band"] for study in studies] == [age_band_of(header.PatientAge) for header in headers]
    assert {study["manufacturer"] for study in studies} == {""}


def test_errors_name_what_is_wrong(root: Path) -> None:
    reader = RSNAPneumonia(root)

    def changed(file: str, old: str, new: str, match: str, reader: RSNAPneumonia = reader) -> None:
        text = (root / file).read_text()
        assert old in text
        (root / file).write_text(text.replace(old, new, 1))
        with pytest.raises(DataError, match=match):
            reader.read()
        (root / file).write_text(text)

    labels, classes = "stage_2_train_labels.csv", "stage_2_detailed_class_info.csv"
    changed(labels, "453.0,1", "453.0,0", "line 6: image .* has Target 0, but 1 above")
    changed(labels, "379.0,1", "379.0,2", "line 2: Target '2'")
    changed(classes, "Normal", "Healthy", "line 3: class 'Healthy'; expected one of")
    changed(classes, NAMES[8], "x", "has no row in stage_2_detailed_class_info")
    changed(classes, f"{NAMES[3]},Lung Opacity", f"{NAMES[3]},Normal", "is 'Lung Opacity', but 'Normal' above")
    changed(labels, "Target", "target", "no column 'Target'; did you mean 'target'")
    write_mapping(root, list(range(12)))
    changed(MAPPING, NAMES[4], "x", f"{NAMES[4]}.*not in RSNA's mapping")
    changed(MAPPING, "img_id", "image", "expected a list of objects with 'subset_img_id' and 'img_id'")
    changed(MAPPING, "[", "{", "expected a list of objects")
    with pytest.raises(DataError, match=r"other\.json: no such file"):
        RSNAPneumonia(root, mapping="other.json").read()
    (root / "stage_2_test_images").rename(root / "tests")
    with pytest.raises(DataError, match="stage_2_test_images: no such folder"):
        RSNAPneumonia(root, test="challenge").read()
    (root / "stage_2_train_images").rename(root / "elsewhere")
    with pytest.raises(DataError, match=r"stage_2_train_images: no such folder; .* holds .*elsewhere"):
        reader.read()
    (root / classes).unlink()
    with pytest.raises(DataError, match=r"stage_2_detailed_class_info\.csv: no such file"):
        reader.read()
