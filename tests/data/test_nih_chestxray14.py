"""ChestX-ray14: the layout of its download and of its mirror, in small; and real radiographs of it."""

import csv
import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medxray.data import load_studies, read_image
from medxray.data.phantom import draw_study
from medxray.data.readers import READERS, split_of
from medxray.data.readers.nih_chestxray14 import LABELS, NIHChestXray14
from medxray.spec import DataSpec
from medxray.types import DataError, Study

OLD = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
)
NEW = OLD.removesuffix(",").replace("Patient Gender", "Patient Sex")

ROWS = [
    ("00000001_000.png", "Cardiomegaly", 0, 1, "057", "M", "PA"),
    ("00000001_001.png", "Cardiomegaly|Emphysema", 1, 1, "058", "M", "PA"),
    ("00000002_000.png", "No Finding", 0, 2, "080", "M", "AP"),
    ("00000003_000.png", "Hernia|Pleural_Thickening", 0, 3, "074", "F", "PA"),
    ("00000004_000.png", "Mass|Nodule", 0, 4, "082", "M", "AP"),
]
"""Of these patients 4 is tested."""


def layout(root: Path, table: str = "Data_Entry_2017.csv", folders: int = 0, packed: bool = False) -> Path:
    """Images of phantoms in `images/`, or in so many numbered folders."""
    root.mkdir(exist_ok=True)
    old = "v2020" not in table
    lines = [OLD if old else NEW]
    for name, labels, number, patient, age, sex, view in ROWS:
        line = f"{name},{labels},{number},{patient},{age}{'Y' * old},{sex},{view},2682,2749,0.143,0.143"
        lines.append(line + "," * old)
    text = "\r\n".join(lines) + "\r\n"
    if packed:
        (root / f"{table}.gz").write_bytes(gzip.compress(text.encode()))
    else:
        (root / table).write_text(text)
    names = [row[0] for row in ROWS]
    (root / "train_val_list.txt").write_text("\n".join(names[:4]))
    (root / "test_list.txt").write_text("\n".join(names[4:]) + "\n")
    for i, name in enumerate(names):
        folder = root / (f"images_{i % folders + 1:03}/images" if folders else "images")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((draw_study(0, i, 32).images[0] >> 4).astype(np.uint8)).save(folder / name)
    return root


def spec_of(root: Path, **settings: Any) -> DataSpec:
    reader = READERS.settings_of("nih-chestxray14")(name="nih-chestxray14", root=str(root), **settings)
    return DataSpec(reader=reader, image_size=32)


@pytest.mark.parametrize(
    ("table", "folders", "packed"),
    [
        ("Data_Entry_2017.csv", 0, False),
        ("Data_Entry_2017_v2020.csv", 3, False),
        ("Data_Entry_2017_v2020.csv", 0, True),
    ],
)
def test_official_layout(tmp_path: Path, table: str, folders: int, packed: bool) -> None:
    root = layout(tmp_path, table, folders, packed)
    studies = {study["study_id"]: study for study in NIHChestXray14(root).read()}
    assert list(studies) == [row[0].removesuffix(".png") for row in ROWS]
    two = studies["00000001_001"]
    folder = "images_002/images" if folders else "images"
    assert two == Study(
        study_id="00000001_001",
        patient_id="1",
        images=[f"{folder}/00000001_001.png"],
        views=["PA"],
        findings="",
        impression="",
        report="",
        labels={label: int(label in ("Cardiomegaly", "Emphysema")) for label in LABELS},
        split=two["split"],
        sex="male",
        age_band="40-64",
    )
    assert studies["00000003_000"]["sex"] == "female" and studies["00000004_000"]["age_band"] == "80+"
    assert studies["00000002_000"]["labels"]["No Finding"] == 1 and studies["00000002_000"]["views"] == ["AP"]
    assert studies["00000004_000"]["split"] == "test"
    assert len(LABELS) == 15 and all(list(study["labels"]) == list(LABELS) for study in studies.values())
    found = load_studies(spec_of(root))
    assert sum(map(len, found.splits.values())) == len(ROWS) and found.labels == list(LABELS)


def test_validation_is_one_in_ten_patients_of_the_first_list(tmp_path: Path) -> None:
    root = layout(tmp_path)
    names = [f"{patient:08}_{k:03}.png" for patient in range(1, 2001) for k in range(2)]
    rows = [f"{name},No Finding,0,{int(name[:8])},57,M,PA,1,1,1,1" for name in names]
    (root / "Data_Entry_2017.csv").write_text("\n".join([OLD.removesuffix(","), *rows]))
    (root / "train_val_list.txt").write_text("\n".join(names[:3000]))
    (root / "test_list.txt").write_text("\n".join(names[3000:]))
    studies = list(NIHChestXray14(root).read())
    splits: dict[str, set[str]] = {}
    for study in studies:
        splits.setdefault(study["patient_id"], set()).add(study["split"])
    assert all(len(own) == 1 for own in splits.values())
    assert [s["split"] == "test" for s in studies] == [i >= 3000 for i in range(4000)]
    share = sum(own == {"val"} for own in splits.values()) / 1500
    assert 0.08 < share < 0.12
    divided = list(NIHChestXray14(root, official=False).read())
    assert all(study["split"] == split_of(study["patient_id"]) for study in divided)


def test_newer_table_goes_first(tmp_path: Path) -> None:
    root = layout(layout(tmp_path), "Data_Entry_2017_v2020.csv")
    text = (root / "Data_Entry_2017_v2020.csv").read_text()
    (root / "Data_Entry_2017_v2020.csv").write_text(text.replace("Mass|Nodule", "No Finding"))
    studies = list(NIHChestXray14(root).read())
    assert studies[-1]["labels"]["No Finding"] == 1


def test_without_lists_patients_are_divided_when_told_so(tmp_path: Path) -> None:
    root = layout(tmp_path)
    (root / "test_list.txt").unlink()
    with pytest.raises(DataError, match=r"test_list\.txt: no such file.*official: false"):
        NIHChestXray14(root).read()
    assert len(list(NIHChestXray14(root, official=False).read())) == len(ROWS)


def test_errors_name_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder"):
        NIHChestXray14(tmp_path / "nowhere").read()
    root = layout(tmp_path / "a")
    text = (root / "Data_Entry_2017.csv").read_text()
    (root / "Data_Entry_2017.csv").write_text(text.replace("Mass|Nodule", "Mas|Nodule"))
    with pytest.raises(DataError, match=r"line 6: finding 'Mas'"):
        NIHChestXray14(root).read()
    (root / "Data_Entry_2017.csv").write_text(text.replace("View Position", "Position"))
    with pytest.raises(DataError, match="no column 'View Position'; did you mean 'Position'"):
        NIHChestXray14(root).read()
    (root / "Data_Entry_2017.csv").unlink()
    with pytest.raises(DataError, match=r"expected one of Data_Entry_2017_v2020\.csv, Data_Entry_2017\.csv"):
        NIHChestXray14(root).read()

    root = layout(tmp_path / "b")
    with (root / "test_list.txt").open("a") as file:
        file.write("00000001_000.png\n")
    with pytest.raises(DataError, match=r"'00000001_000\.png' is in train_val_list\.txt as well"):
        NIHChestXray14(root).read()
    (root / "test_list.txt").write_text("")
    with pytest.raises(DataError, match=r"line 6: image '00000004_000\.png' is neither in"):
        NIHChestXray14(root).read()

    root = layout(tmp_path / "c")
    for path in (root / "images").iterdir():
        path.unlink()
    (root / "images" / "images_001.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"images/images_001\.tar\.gz is packed.*unpack"):
        NIHChestXray14(root).read()

    root = layout(tmp_path / "d")
    (root / "images" / "00000003_000.png").unlink()
    with pytest.raises(DataError, match=r"1 of 5 images are missing: 'images/00000003_000\.png'"):
        load_studies(spec_of(root))


def test_real_radiographs(shared: Path, tmp_path: Path) -> None:
    """Samples of the data set as it publishes them: some lie on their sides, patients come several times."""
    source = shared / "data" / "nih_chestxray14"
    with (source / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    (tmp_path / "images").mkdir()
    lines, names = [NEW], []
    for row in rows:
        names.append(f"{row['study_id']}.png")
        Image.open(source / row["image_paths"]).save(tmp_path / "images" / names[-1], compress_level=1)
        size = row["source_size"].replace("x", ",")
        sex, position = row["sex"], row["view"]
        cells = [names[-1], row["labels"], row["follow_up"], row["patient_id"], row["age"], sex, position, size]
        lines.append(",".join([*cells, "0.143,0.143"]))
    (tmp_path / "Data_Entry_2017_v2020.csv").write_text("\n".join(lines))
    patients = list(dict.fromkeys(row["patient_id"] for row in rows))
    tested = set(patients[-10:])
    (tmp_path / "test_list.txt").write_text(
        "\n".join(n for n, row in zip(names, rows, strict=True) if row["patient_id"] in tested)
    )
    (tmp_path / "train_val_list.txt").write_text(
        "\n".join(n for n, row in zip(names, rows, strict=True) if row["patient_id"] not in tested)
    )
    found = load_studies(spec_of(tmp_path))
    studies = {s["study_id"]: s for split in found.splits.values() for s in split}
    assert len(studies) == len(rows) == 76
    assert {s["patient_id"] for s in found.splits["test"]} == tested
    for row in rows:
        study = studies[row["study_id"]]
        assert {label for label, value in study["labels"].items() if value} == set(row["labels"].split("|"))
        assert study["views"] == [row["view"]] and study["patient_id"] == row["patient_id"]
    turned = next(row for row in rows if row["orientation"] == "rotated_90_ccw")
    image = studies[turned["study_id"]]["images"][0]
    pixels = read_image(found.reader.open(image), max_pixels=10**8, name=image)
    assert pixels.shape[0] == 1 and np.allclose(pixels, read_image(source / turned["image_paths"], max_pixels=10**8))


@pytest.mark.slow
def test_the_whole_table_opens_in_seconds(tmp_path: Path) -> None:
    """112,120 rows; the images are looked for in 12 folders, but not opened."""
    import time

    root = layout(tmp_path)
    (root / "images").rename(root / "other")
    names = [f"{patient:08}_{k:03}.png" for patient in range(1, 30806) for k in range(4)][:112_120]
    labels = ["No Finding", "Mass|Nodule", "Infiltration", "Effusion|Atelectasis"]
    rows = [f"{name},{labels[i % 4]},0,{int(name[:8])},57,M,PA,2682,2749,0.143,0.143" for i, name in enumerate(names)]
    (root / "Data_Entry_2017_v2020.csv").write_text("\n".join([NEW, *rows]))
    (root / "train_val_list.txt").write_text("\n".join(names[:86_524]))
    (root / "test_list.txt").write_text("\n".join(names[86_524:]))
    for i, name in enumerate(names):
        folder = root / f"images_{i // 10_000 + 1:03}" / "images"
        if i % 10_000 == 0:
            folder.mkdir(parents=True)
        (folder / name).touch()
    start = time.process_time()
    studies = list(NIHChestXray14(root).read())
    seconds = time.process_time() - start
    print(f"112,120 rows in {seconds:.2f} s of a processor")
    assert len(studies) == 112_120 and seconds < 5
