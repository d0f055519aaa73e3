"""CheXpert in miniature: its names, columns and folder trees, with drawn images."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from medxray.data import load_studies
from medxray.data.readers import READERS, split_of
from medxray.data.readers.chexpert import LABELS, CheXpert
from medxray.spec import DataSpec
from medxray.types import DataError, Study

HEADER = (
    "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,"
    "Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
)
TRAIN = [
    "train/patient00002/study2/view1_frontal.jpg,Female,87,Frontal,AP,,,-1.0,1.0,,-1.0,-1.0,,-1.0,,-1.0,,1.0,",
    "train/patient00002/study1/view2_lateral.jpg,Female,83,Lateral,,,,,1.0,,,-1.0,,,,,,1.0,",
    "train/patient00002/study1/view1_frontal.jpg,Female,83,Frontal,PA,,,,1.0,,,-1.0,,,,,,1.0,",
    "train/patient00005/study1/view1_frontal.jpg,Male,33,Frontal,PA,1.0,,0.0,,,,,,,0.0,0.0,,,1.0",
    *(f"train/patient{i:05}/study1/view1_frontal.jpg,Male,33,Frontal,PA,1.0{',' * 13}" for i in range(10, 40)),
]
VALID = [
    "valid/patient64541/study1/view1_frontal.jpg,Male,73,Frontal,AP,0.0,1.0,1.0,1.0,0.0,0.0,0.0,0.0,0.0,0.0,1.0,0.0,0.0,0.0"
]
TEST = ["test/patient64741/study1/view1_frontal.jpg," + ",".join(["0.0"] * 13 + ["1.0"])]


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").resize((48, 56)).save(path)


def write(root: Path, prefix: str = "CheXpert-v1.0-small/", test: str | None = None) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", TRAIN), ("valid", VALID)):
        (root / f"{name}.csv").write_text("\n".join([HEADER, *(prefix + row for row in rows)]) + "\n")
        for row in rows:
            picture(root / row.split(",")[0])
    if test:
        names = [label for label in LABELS if label != "No Finding"]
        (root / test).write_text("\n".join([",".join(["Path", *names, "No Finding"]), *TEST]) + "\n")
        picture(root / TEST[0].split(",")[0])
    return root


def by_id(studies: Iterable[Study]) -> dict[str, Study]:
    return {study["study_id"]: study for study in studies}


def settings(root: Path, **more: Any) -> Any:
    return READERS.settings_of("chexpert")(name="chexpert", root=str(root), **more)


def test_studies_as_published(tmp_path: Path) -> None:
    studies = by_id(CheXpert(write(tmp_path)).read())
    first, second = studies["patient00002_study2"], studies["patient00002_study1"]
    assert list(studies)[:2] == ["patient00002_study2", "patient00002_study1"]
    assert first["patient_id"] == "patient00002" and first["views"] == ["AP"]
    assert list(first["labels"]) == list(LABELS)
    assert {k: v for k, v in first["labels"].items() if v is not None} == {
        "Cardiomegaly": -1, "Lung Opacity": 1, "Edema": -1, "Consolidation": -1, "Atelectasis": -1, "Pleural Effusion": -1,
        "Fracture": 1,
    }  # fmt: skip
    folder = "train/patient00002/study1"
    assert second["images"] == [f"{folder}/view1_frontal.jpg", f"{folder}/view2_lateral.jpg"]
    assert second["views"] == ["PA", "LL"] and second["report"] == second["findings"] == second["impression"] == ""
    assert studies["patient00005_study1"]["labels"]["Cardiomegaly"] == 0
    assert (second["sex"], second["age_band"]) == ("female", "80+")
    assert studies["patient00005_study1"]["sex"] == "male"


@pytest.mark.parametrize("prefix", ["CheXpert-v1.0-small/", "CheXpert-v1.0/", ""])
@pytest.mark.parametrize("below", ["", "CheXpert-v1.0-small"])
def test_whatever_the_root_and_the_prefix(tmp_path: Path, prefix: str, below: str) -> None:
    write(tmp_path / below, prefix)
    studies = by_id(CheXpert(tmp_path).read())
    image = studies["patient64541_study1"]["images"][0]
    assert image == str(Path(below) / "valid/patient64541/study1/view1_frontal.jpg")
    assert all((tmp_path / image).is_file() for study in studies.values() for image in study["images"])


def test_the_full_set_as_it_is_unpacked(tmp_path: Path) -> None:
    """Four archives: the tables lie with the validation images, and three folders hold patients without a `train`."""
    whole = write(tmp_path / "whole", "CheXpert-v1.0/")
    root = tmp_path / "chexpertchestxrays-u20210408"
    first = root / "CheXpert-v1.0 batch 1 (validate & csv)"
    first.mkdir(parents=True)
    for name in ("train.csv", "valid.csv", "valid"):
        (whole / name).rename(first / name)
    for i, patient in enumerate(sorted((whole / "train").iterdir())):
        batch = root / f"CheXpert-v1.0 batch {2 + i % 3} (train {1 + i % 3})"
        batch.mkdir(exist_ok=True)
        patient.rename(batch / patient.name)
    lines = (first / "train.csv").read_text().replace("-1.0", "1.0")
    (root / "train_cheXbert.csv").write_text(lines)
    studies = by_id(CheXpert(root).read())
    assert len(studies) == 34 and all((root / image).is_file() for s in studies.values() for image in s["images"])
    assert studies["patient00005_study1"]["images"] == [
        "CheXpert-v1.0 batch 3 (train 2)/patient00005/study1/view1_frontal.jpg"
    ]
    assert by_id(CheXpert(root, labels="chexbert").read())["patient00002_study2"]["labels"]["Edema"] == 1
    assert studies["patient00002_study2"]["labels"]["Edema"] == -1
    with pytest.raises(DataError, match=r"train_visualCheXbert.csv"):
        list(CheXpert(root, labels="visualchexbert").read())


def test_validation_is_the_test_unless_there_is_one(tmp_path: Path) -> None:
    """The published sets are two; then some training patients, by hash, are for validation."""
    two = by_id(CheXpert(write(tmp_path / "two")).read())
    assert two["patient64541_study1"]["split"] == "test"
    train = {s["patient_id"]: s["split"] for s in two.values() if s["patient_id"] < "patient64541"}
    assert train == {patient: "val" if split_of(patient) == "val" else "train" for patient in train}
    assert "val" in train.values()
    as_val = by_id(CheXpert(tmp_path / "two", valid="val").read())
    assert as_val["patient64541_study1"]["split"] == "val"
    assert {s["split"] for s in as_val.values() if s["patient_id"] < "patient64541"} == {"train"}
    for name in ("test.csv", "test_labels.csv"):
        three = by_id(CheXpert(write(tmp_path / name, test=name)).read())
        assert {s["patient_id"]: s["split"] for s in three.values() if s["split"] != "train"} == {
            "patient64541": "val",
            "patient64741": "test",
        }
        tested = three["patient64741_study1"]
        assert tested["labels"]["No Finding"] == 1, "columns by name, not by place"
        assert tested["views"] == ["unknown"] and list(tested["labels"]) == list(LABELS)
        with pytest.raises(DataError, match=r"valid: val"):
            list(CheXpert(tmp_path / name, valid="test").read())


def test_from_a_spec_to_decoded_studies(tmp_path: Path) -> None:
    found = load_studies(DataSpec(reader=settings(write(tmp_path)), on_error="skip"))
    assert found.skipped == [] and found.labels == list(LABELS)
    assert sum(map(len, found.splits.values())) == 34


def test_resized_copies_in_another_format(tmp_path: Path) -> None:
    root = write(tmp_path)
    for path in list(root.rglob("*.jpg")):
        Image.open(path).save(path.with_suffix(".png"))
        path.unlink()
    assert next(iter(CheXpert(root).read()))["images"] == ["train/patient00002/study2/view1_frontal.png"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("-1.0", "u", r"train.csv, line 2: label 'Cardiomegaly' is 'u'; expected"),
        ("train/patient00002/study2/", "x/", r"train.csv, line 2: Path '.*/x/view1_frontal.jpg'; expected .*patient"),
        ("patient00002/study2/view1", "patient00002/../view1", r"train.csv, line 2: Path .*expected"),
        ("study1/view2_lateral.jpg,Female,83,Lateral", "study1/view1_frontal.jpg,Female,83,Frontal", r"stands twice"),
        ("Path", "path", r"train.csv: no column 'Path'; did you mean 'path'"),
        ("Pleural Other", "Pleural", r"train.csv: no column 'Pleural Other'"),
    ],
)
def test_mistakes_in_the_table(tmp_path: Path, old: str, new: str, message: str) -> None:
    root = write(tmp_path)
    (root / "train.csv").write_text((root / "train.csv").read_text().replace(old, new))
    with pytest.raises(DataError, match=message):
        list(CheXpert(root).read())


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no folder .*none"):
        list(CheXpert(tmp_path / "none").read())
    (tmp_path / "stray.txt").touch()
    with pytest.raises(DataError, match=r"no train.csv.*stray.txt.*data.reader.root"):
        list(CheXpert(tmp_path).read())
    root = write(tmp_path / "a")
    (root / "valid.csv").unlink()
    with pytest.raises(DataError, match=r"no valid.csv"):
        list(CheXpert(root).read())
    write(tmp_path / "b")
    write(tmp_path / "c")
    (tmp_path / "a" / "train.csv").unlink()
    with pytest.raises(DataError, match=r"more than one train.csv.*b.*c.*data.reader.root"):
        list(CheXpert(tmp_path).read())
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("train.csv", "valid.csv"):
        (bare / name).write_text((tmp_path / "b" / name).read_text())
    with pytest.raises(DataError, match=r"no image below.*patient"):
        list(CheXpert(bare).read())


@pytest.mark.slow
def test_tables_of_full_size_are_read_in_seconds(tmp_path: Path) -> None:
    """223,414 images of 64,540 patients."""
    write(tmp_path)
    with (tmp_path / "train.csv").open("w") as file:
        file.write(HEADER + "\n")
        for i in range(223_414):
            path = f"patient{i * 64_540 // 223_414 + 1:05}/study{i % 3 + 1}/view{i // 3 % 2 + 1}_frontal.jpg"
            file.write(f"CheXpert-v1.0-small/train/{path},Male,3,Frontal,AP,,,-1.0,1.0,,-1.0,,,,,0.0,,1.0,\n")
    start = time.process_time()
    studies = list(CheXpert(tmp_path).read())
    seconds = time.process_time() - start
    print(f"{seconds:.1f} s")
    assert len(studies) > 180_000 and seconds < 30
