"""VinDr-CXR: PhysioNet's layout in small, with DICOM files of phantoms."""

import gzip
from pathlib import Path
from typing import Any

import pytest

from medxray.data import load_studies
from medxray.data.phantom import generate
from medxray.data.readers import READERS, split_of
from medxray.data.readers.vindr_cxr import VinDrCXR
from medxray.spec import DataSpec
from medxray.types import DataError, Study

HEADER = (
    "Aortic enlargement,Atelectasis,Calcification,Cardiomegaly,Clavicle fracture,Consolidation,Edema,Emphysema,"
    "Enlarged PA,ILD,Infiltration,Lung Opacity,Lung cavity,Lung cyst,Mediastinal shift,Nodule/Mass,Pleural effusion,"
    "Pleural thickening,Pneumothorax,Pulmonary fibrosis,Rib fracture,Other lesion,COPD,Lung tumor,Pneumonia,"
    "Tuberculosis,Other diseases,No finding"
)
FINDINGS = HEADER.split(",")

NAMES = [f"{i:02x}0a34c3c1f3a4f1d2b5e6a7c8d9e0f1" for i in range(8)]
"""Six of train, two of test."""


def row(**present: int) -> str:
    values = {name.replace(" ", "_"): 0 for name in FINDINGS} | present
    assert len(values) == len(FINDINGS)
    return ",".join(map(str, values.values()))


@pytest.fixture(scope="module")
def dicoms(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = generate(tmp_path_factory.mktemp("dicom") / "d", 16, 32, 2, "dicom", progress=False)
    return sorted((folder / "images").glob("*_[PA][AP].dcm"))


@pytest.fixture
def root(tmp_path: Path, dicoms: list[Path]) -> Path:
    """Three radiologists an image; of the first image all see an effusion, two a cardiomegaly, one a COPD."""
    for i, name in enumerate(NAMES):
        folder = tmp_path / ("train" if i < 6 else "test")
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.dicom").write_bytes(dicoms[i].read_bytes())
    (tmp_path / "annotations").mkdir()
    lines = ["image_id,rad_id," + HEADER]
    lines += [
        f"{NAMES[0]},R9,{row(Pleural_effusion=1, Cardiomegaly=1)}",
        f"{NAMES[1]},R9,{row(No_finding=1)}",
        f"{NAMES[0]},R8,{row(Pleural_effusion=1, Cardiomegaly=1)}",
        f"{NAMES[0]},R10,{row(Pleural_effusion=1, COPD=1)}",
    ]
    lines += [f"{NAMES[1]},{reader},{row(No_finding=1)}" for reader in ("R8", "R10")]
    lines += [f"{name},{reader},{row(ILD=1)}" for name in NAMES[2:6] for reader in ("R1", "R2", "R3")]
    (tmp_path / "annotations/image_labels_train.csv").write_text("\n".join(lines) + "\n")
    header = "image_id," + HEADER.replace("Other diseases", "Other disease")
    lines = [header, f"{NAMES[6]},{row(Other_diseases=1)}", f"{NAMES[7]},{row(No_finding=1)}"]
    (tmp_path / "annotations/image_labels_test.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "annotations/annotations_train.csv").write_text(
        f"image_id,rad_id,class_name,x_min,y_min,x_max,y_max\n{NAMES[0]},R9,Cardiomegaly,691.0,1375.0,1653.0,1831.0\n"
        f"{NAMES[1]},R9,No finding,,,,\n"
    )
    return tmp_path


def spec_of(root: Path, **settings: Any) -> DataSpec:
    reader = READERS.settings_of("vindr-cxr")(name="vindr-cxr", root=str(root), **settings)
    return DataSpec(reader=reader, image_size=32)


def test_official_layout(root: Path) -> None:
    studies = {study["study_id"]: study for study in VinDrCXR(root).read()}
    assert list(studies) == NAMES
    labels = [{"No finding": "No Finding"}.get(name, name) for name in FINDINGS]
    assert studies[NAMES[0]] == Study(
        study_id=NAMES[0],
        patient_id="",
        images=[f"train/{NAMES[0]}.dicom"],
        views=["PA"],
        findings="",
        impression="",
        report="",
        labels={label: int(label in ("Pleural effusion", "Cardiomegaly")) for label in labels},
        split="val" if split_of(NAMES[0]) == "val" else "train",
    )
    assert studies[NAMES[1]]["labels"]["No Finding"] == 1
    assert studies[NAMES[6]]["labels"]["Other diseases"] == 1 and list(studies[NAMES[6]]["labels"]) == labels
    assert [study["split"] == "test" for study in studies.values()] == [False] * 6 + [True] * 2
    assert studies[NAMES[7]]["images"] == [f"test/{NAMES[7]}.dicom"]
    found = load_studies(spec_of(root))
    assert found.labels == labels and sum(map(len, found.splits.values())) == 8


def test_disagreement_can_be_uncertainty(root: Path) -> None:
    first = next(iter(VinDrCXR(root, disagreement="uncertain").read()))
    found = {label: value for label, value in first["labels"].items() if value}
    assert found == {"Pleural effusion": 1, "Cardiomegaly": -1, "COPD": -1}


def test_a_tie_is_uncertain_and_a_blank_no_vote(root: Path) -> None:
    path = root / "annotations/image_labels_train.csv"
    lines = path.read_text().splitlines()
    assert lines[4].startswith(f"{NAMES[0]},R10")
    cells = lines[3].split(",")
    cells[2] = ""
    path.write_text("\n".join([*lines[:3], ",".join(cells), *lines[5:]]))
    labels = next(iter(VinDrCXR(root).read()))["labels"]
    assert labels["Cardiomegaly"] == 1 and labels["Aortic enlargement"] == 0
    lines[3] = lines[3].replace(row(Pleural_effusion=1, Cardiomegaly=1), row(Pleural_effusion=1))
    path.write_text("\n".join([*lines[:4], *lines[5:]]))
    labels = next(iter(VinDrCXR(root).read()))["labels"]
    assert labels["Cardiomegaly"] == -1 and labels["Pleural effusion"] == 1


def test_validation_is_one_in_ten_training_images(root: Path) -> None:
    names = [f"{i:032x}" for i in range(2000)]
    lines = ["image_id,rad_id,Edema"] + [f"{name},R{k},0" for name in names for k in range(3)]
    (root / "annotations/image_labels_train.csv").write_text("\n".join(lines))
    studies = list(VinDrCXR(root).read())
    assert 0.08 < sum(study["split"] == "val" for study in studies) / 2000 < 0.12
    assert studies == list(VinDrCXR(root).read())


def test_packed_tables(root: Path) -> None:
    before = list(VinDrCXR(root).read())
    for split in ("train", "test"):
        path = root / f"annotations/image_labels_{split}.csv"
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert list(VinDrCXR(root).read()) == before


def test_errors_name_what_is_wrong(root: Path) -> None:
    train = root / "annotations/image_labels_train.csv"
    text = train.read_text()
    train.write_text(text + f"{NAMES[0]},R9,{row()}\n")
    with pytest.raises(DataError, match=f"line 20: image '{NAMES[0]}' stands twice for radiologist 'R9'"):
        VinDrCXR(root).read()
    train.write_text(text.replace(",0,", ",x,", 1))
    with pytest.raises(DataError, match=r"line 2: label 'Aortic enlargement' is 'x'; expected 0, 1"):
        VinDrCXR(root).read()
    train.write_text(text.replace(NAMES[5], NAMES[6]))
    with pytest.raises(DataError, match=f"'{NAMES[6]}' is in both tables"):
        VinDrCXR(root).read()
    train.write_text(text.replace("image_id", "image"))
    with pytest.raises(DataError, match="no column 'image_id'; did you mean 'image'"):
        VinDrCXR(root).read()
    train.write_text(text)
    (root / f"train/{NAMES[2]}.dicom").unlink()
    with pytest.raises(DataError, match=f"1 of 8 images are missing: 'train/{NAMES[2]}.dicom'"):
        load_studies(spec_of(root))
    (root / "test").rename(root / "tests")
    with pytest.raises(DataError, match=r"test: no such folder; .*holds annotations, tests, train"):
        VinDrCXR(root).read()
    (root / "annotations/image_labels_test.csv").unlink()
    with pytest.raises(DataError, match=r"image_labels_test\.csv: no such file"):
        VinDrCXR(root).read()
