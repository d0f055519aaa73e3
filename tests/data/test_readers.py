import io
import json
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pytest
from PIL import Image
from pyarrow import parquet

from medxray.data import StudyImages, clean, load_studies, read_image
from medxray.data.readers import READERS, Reader, split_of, view_of
from medxray.data.readers.csv import CSV, read_table
from medxray.data.readers.iu_xray import IUXRay
from medxray.spec import DataSpec
from medxray.types import DataError, Study

SHARED = Path(os.environ.get("MEDXRAY_SHARED", Path(__file__).parents[2].parent / "shared")) / "data"
real = pytest.mark.skipif(not SHARED.is_dir(), reason=f"real radiographs are absent: {SHARED}")


def table(root: Path, text: str, name: str = "studies.csv") -> Path:
    (root / name).write_text(text)
    return root


def by_id(studies: Iterable[Study]) -> dict[str, Study]:
    return {study["study_id"]: study for study in studies}


# csv


def test_rows_of_a_study_are_grouped_frontal_first(tmp_path: Path) -> None:
    root = table(
        tmp_path,
        "path,study_id,patient_id,view,report,split,Effusion,Mass\n"
        "a1.png,a,p,Lateral,Clear lungs.,train,0,\n"
        "b.png,b,q,ap,Effusion.,validate,1,-1.0\n"
        "a0.png,a,p,PA,Clear lungs.,train,0,\n",
    )
    a, b = CSV(root).read()
    assert a == Study(
        study_id="a",
        patient_id="p",
        images=["a0.png", "a1.png"],
        views=["PA", "LL"],
        findings="",
        impression="",
        report="Clear lungs.",
        labels={"Effusion": 0, "Mass": None},
        split="train",
        indication="",
        prior="",
        sex="",
        age_band="",
        manufacturer="",
    )
    assert b["split"] == "val" and b["views"] == ["AP"] and b["labels"] == {"Effusion": 1, "Mass": -1}


def test_sex_age_and_manufacturer_are_kept_as_groups(tmp_path: Path) -> None:
    root = table(
        tmp_path,
        "path,study_id,sex,age,manufacturer,Edema\n"
        "a0,a,F,90,GE Healthcare,1\na1,a,F,91,GE Healthcare,1\nb,b,M,17,,0\nc,c,,,My Company,0\n",
    )
    a, b, c = CSV(root).read()
    assert (a["sex"], a["age_band"], a["manufacturer"]) == ("female", "80+", "GE")
    assert (b["sex"], b["age_band"], b["manufacturer"]) == ("male", "0-17", "")
    assert (c["sex"], c["age_band"], c["manufacturer"]) == ("", "", "other")
    assert "90" not in str(a) and list(a["labels"]) == ["Edema"]


def test_only_path_and_study_are_needed(tmp_path: Path) -> None:
    (study,) = CSV(table(tmp_path, "path,study_id\nx.png,s\n")).read()
    assert study["views"] == ["unknown"] and study["report"] == "" and study["labels"] == {}
    assert study["split"] == split_of("s")


def test_columns_can_be_named(tmp_path: Path) -> None:
    root = table(tmp_path, "file,exam,person,text,fold,Edema,score\nx.png,s,p,Clear.,dev,1,1\n")
    reader = CSV(
        root, path="file", study="exam", patient="person", report="text", split="fold", label_columns=["Edema"]
    )
    (study,) = reader.read()
    assert (study["patient_id"], study["report"], study["split"]) == ("p", "Clear.", "val")
    assert study["labels"] == {"Edema": 1}


def test_report_falls_back_to_findings(tmp_path: Path) -> None:
    (study,) = CSV(table(tmp_path, "path,study_id,findings,impression\nx,s,Clear.,Normal.\n")).read()
    assert study["report"] == study["findings"] == "Clear." and study["impression"] == "Normal."


def test_labels_are_columns_of_labels_only(tmp_path: Path) -> None:
    rows = "".join(f"{i}.png,s{i},{i % 2},{20 + i},1.5,,text {i}\n" for i in range(20))
    studies = CSV(table(tmp_path, "path,study_id,Mass,age,weight,nothing,note\n" + rows)).read()
    assert {label for study in studies for label in study["labels"]} == {"Mass"}


def test_tags_become_labels(tmp_path: Path) -> None:
    root = table(tmp_path, "path,study_id,finding\nx,s,Edema|Mass\ny,t,Mass\nz,u,\n")
    s, t, u = CSV(root, tags="finding").read()
    assert s["labels"] == {"Edema": 1, "Mass": 1}
    assert t["labels"] == {"Edema": 0, "Mass": 1}
    assert u["labels"] == {"Edema": 0, "Mass": 0}


def test_byte_order_mark_quoted_lines_and_blank_lines(tmp_path: Path) -> None:
    text = 'path,study_id,report\nx,s,"Clear, both sides.\nNo ""mass""."\n\ny,t,Fine.\n'
    (tmp_path / "studies.csv").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    s, t = CSV(tmp_path).read()
    assert s["report"] == 'Clear, both sides.\r\nNo "mass".' and t["report"] == "Fine."
    assert read_table(tmp_path / "studies.csv").lines == [2, 5]


def test_split_without_a_column_keeps_patients_together(tmp_path: Path) -> None:
    rows = "".join(f"{i}.png,s{i},p{i // 3},\n" for i in range(3000))
    root = table(tmp_path, "path,study_id,patient_id,split\n" + rows)
    studies = list(CSV(root).read())
    of_patient: dict[str, set[str]] = {}
    for study in studies:
        of_patient.setdefault(study["patient_id"], set()).add(study["split"])
    assert all(len(splits) == 1 for splits in of_patient.values())
    share = sum(study["split"] == "train" for study in studies) / 3000
    assert 0.77 < share < 0.83
    assert studies == list(CSV(root).read())


def test_split_of_is_the_same_everywhere() -> None:
    # Recorded values: a change moves patients of every saved run.
    assert [split_of(f"p{i}") for i in range(12)] == [
        *("train", "train", "val", "val", "train", "train"),
        *("train", "train", "val", "val", "train", "train"),
    ]


def test_absolute_paths_below_root_are_made_relative(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    root = table(tmp_path, f"path,study_id\n{tmp_path}/deep/x.png,s\ndeep/../y.png,t\n")
    assert [study["images"] for study in CSV(root).read()] == [["deep/x.png"], ["y.png"]]


def test_links_inside_root_and_a_linked_root_are_fine(tmp_path: Path) -> None:
    root = tmp_path / "real"
    root.mkdir()
    (root / "x.png").touch()
    (root / "link.png").symlink_to("x.png")
    table(root, "path,study_id\nlink.png,s\n")
    (tmp_path / "linked").symlink_to(root)
    assert [study["images"] for study in CSV(tmp_path / "linked").read()] == [["link.png"]]


@pytest.mark.parametrize(
    ("text", "view"),
    [("pa", "PA"), (" AP ", "AP"), ("LATERAL", "LL"), ("LL", "LL"), ("", "unknown"), ("oblique", "unknown")],
)
def test_views(text: str, view: str) -> None:
    assert view_of(text) == view


# phantom


@pytest.mark.parametrize("format", ["png8", "dicom"])
def test_phantoms_are_drawn_once_and_read(tmp_path: Path, format: str) -> None:
    settings = READERS.settings_of("phantom")(
        name="phantom", root=str(tmp_path / "made"), studies=24, size=64, format=format
    )
    studies = load_studies(DataSpec(reader=settings, on_error="skip"))
    assert sum(len(rows) for rows in studies.splits.values()) == 24 and studies.skipped == []
    assert {"Cardiomegaly", "Effusion", "Pneumothorax"} <= set(studies.labels)
    row = studies.splits["train"][0]
    assert row["report"] == clean(row["findings"], "r2gen-iu") and row["impression"]
    assert set(row["labels"].values()) <= {0, 1, -1}
    image = read_image(studies.root / row["images"][0])
    assert image.shape == (1, 64, 64) and image.max() > image.min()
    written = (tmp_path / "made" / "studies.csv").stat().st_mtime_ns
    load_studies(DataSpec(reader=settings))
    assert (tmp_path / "made" / "studies.csv").stat().st_mtime_ns == written


# iu-xray


def r2gen_layout(root: Path, studies: int) -> Path:
    rows = [
        {
            "id": f"CXR{i}_IM-{i:04}",
            "report": f"Report {i}.",
            "image_path": [f"CXR{i}_IM-{i:04}/{view}.jpg" for view in (1, 0)],
            "split": "train",
        }
        for i in range(studies)
    ]
    (root / "annotation.json").write_text(json.dumps({"train": rows[1:], "val": rows[:1], "test": []}))
    return root


def test_r2gen_layout(tmp_path: Path) -> None:
    studies = list(IUXRay(r2gen_layout(tmp_path, 3)).read())
    assert [study["study_id"] for study in studies] == ["CXR1_IM-0001", "CXR2_IM-0002", "CXR0_IM-0000"]
    assert studies[0]["patient_id"] == "CXR1" and studies[0]["report"] == "Report 1."
    assert [study["split"] for study in studies] == ["train", "train", "val"]
    assert studies[0]["images"] == ["images/CXR1_IM-0001/0.jpg", "images/CXR1_IM-0001/1.jpg"]
    assert studies[0]["views"] == ["PA", "LL"]


def test_r2gen_labels_come_from_frequent_tags(tmp_path: Path) -> None:
    tags = ["normal"] * 21 + ["Cardiomegaly;Lung;Cardiomegaly"] * 20 + ["Nodule"] * 3 + ["No Indexing"]
    lines = "".join(f"CXR{i},CXR{i}_IM-{i:04},f{i},i{i},{tag}\n" for i, tag in enumerate(tags))
    table(tmp_path, "study_id,r2gen_id,findings,impression,problems\n" + lines, "reports.csv")
    studies = by_id(IUXRay(r2gen_layout(tmp_path, len(tags))).read())
    assert studies["CXR5_IM-0005"]["labels"] == {"Cardiomegaly": 0, "Lung": 0, "No Finding": 1}
    assert studies["CXR30_IM-0030"]["labels"] == {"Cardiomegaly": 1, "Lung": 1, "No Finding": 0}
    assert studies["CXR41_IM-0041"]["labels"] == {"Cardiomegaly": 0, "Lung": 0, "No Finding": 0}
    assert set(studies["CXR44_IM-0044"]["labels"].values()) == {None}
    assert studies["CXR5_IM-0005"]["findings"] == "f5" and studies["CXR5_IM-0005"]["impression"] == "i5"


def test_public_layout(tmp_path: Path) -> None:
    header = "uid,MeSH,Problems,image,indication,comparison,findings,impression\n"
    table(tmp_path, header + "7,m,normal,i,i,c,Clear.,Normal.\n8,m,normal,i,i,c,F.,I.\n", "indiana_reports.csv")
    shots = "uid,filename,projection\n7,b.png,Lateral\n7,a.png,Frontal\n"
    table(tmp_path, shots, "indiana_projections.csv")
    (tmp_path / "images_normalized").mkdir()
    (study,) = IUXRay(tmp_path).read()
    assert study["study_id"] == "CXR7" and study["views"] == ["PA", "LL"] and study["report"] == "Clear."
    assert study["images"] == ["images_normalized/a.png", "images_normalized/b.png"]
    assert study["split"] == split_of("CXR7")
    (study,) = IUXRay(tmp_path, report="impression").read()
    assert study["report"] == "Normal."


# Real data sets


@real
def test_real_r2gen_split() -> None:
    studies = list(IUXRay(SHARED / "iu_xray").read())
    splits = [study["split"] for study in studies]
    assert (splits.count("train"), splits.count("val"), splits.count("test")) == (2069, 296, 0)
    assert sum(len(study["images"]) for study in studies) == 4729
    assert all((SHARED / "iu_xray" / image).is_file() for study in studies for image in study["images"])
    assert all(study["views"][0] == "PA" for study in studies)
    labels = studies[0]["labels"]
    assert {"No Finding", "Cardiomegaly", "Pleural Effusion"} <= set(labels)
    assert sum(study["labels"]["No Finding"] == 1 for study in studies if study["split"] == "train") == 682
    # "No Indexing" means that nobody entered tags.
    assert sum(study["labels"]["No Finding"] is None for study in studies if study["split"] == "train") >= 41


@real
def test_real_public_layout() -> None:
    root = SHARED / "iu_xray_public_layout"
    studies = list(IUXRay(root).read())
    assert len(studies) == 24
    assert all((root / image).is_file() for study in studies for image in study["images"])
    twin = by_id(IUXRay(SHARED / "iu_xray").read())
    same = [s for t, s in twin.items() if t.split("_")[0] == "CXR1"]
    assert [s["findings"] for s in same] == [by_id(studies)["CXR1"]["findings"]]


@real
def test_real_nih_labels_through_the_csv_reader() -> None:
    reader = CSV(SHARED / "nih_chestxray14", file="labels.csv", path="image_paths", tags="labels")
    studies = by_id(reader.read())
    assert len(studies) == 76
    labels = studies["00000061_025"]["labels"]
    assert {name for name, value in labels.items() if value} == {
        "Consolidation",
        "Effusion",
        "Infiltration",
        "Nodule",
    }
    assert studies["00000061_025"]["views"] == ["AP"]


# Own readers


def test_a_registered_reader_needs_ten_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Other tests must not find this reader.
    monkeypatch.setattr(READERS, "_classes", dict(READERS._classes))
    monkeypatch.setattr(READERS, "_models", dict(READERS._models))

    @READERS.register("one-folder")
    class OneFolder(Reader):
        def __init__(self, root: Path, split: str = "train") -> None:
            super().__init__(root)
            self.split = split

        def read(self) -> Iterable[Study]:
            for path in sorted(self.root.glob("*.png")):
                yield Study(
                    study_id=path.stem,
                    patient_id="",
                    images=[path.name],
                    views=["unknown"],
                    findings="",
                    impression="",
                    report="",
                    labels={},
                    split=self.split,
                )

    for name in "ba":
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / f"{name}.png")
    settings = READERS.settings_of("one-folder")(name="one-folder", root=str(tmp_path))
    studies = load_studies(DataSpec(reader=settings))
    assert studies.splits["train"]["study_id"] == ["a", "b"]


def test_r2gens_file_of_mimic_cxr(tmp_path: Path) -> None:
    """There an entry is an image, and several of them are of one patient."""
    rows = [
        {"id": f"d{n}", "study_id": 50 + n // 2, "subject_id": 10 + n // 3, "report": "Clear.", "split": split,
         "image_path": [f"p10/p1/s{50 + n // 2}/d{n}.jpg"]}
        for n, split in enumerate(["train", "train", "train", "val"])
    ]  # fmt: skip
    for row in rows:
        path = tmp_path / "images" / row["image_path"][0]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(path)
    (tmp_path / "annotation.json").write_text(json.dumps({"train": rows[:3], "val": rows[3:], "test": []}))
    studies = load_studies(DataSpec(reader=READERS.settings_of("iu-xray")(root=str(tmp_path)), cleaning="r2gen-mimic"))
    assert studies.splits["train"]["patient_id"] == ["10", "10", "10"] and studies.splits["val"]["patient_id"] == ["11"]
    assert studies.splits["train"]["study_id"] == ["d0", "d1", "d2"]
    assert studies.splits["train"]["images"][2] == ["images/p10/p1/s51/d2.jpg"]


@pytest.mark.parametrize("kind", ["csv", "parquet", "webdataset"])
def test_texts_of_a_study_beside_its_report(kind: str, tmp_path: Path) -> None:
    """Why it was made and what the study before said: into a batch, and "" where unknown."""
    rows = [
        {"study_id": "a", "report": "clear", "why": "cough", "prior": "effusion", "split": "train"},
        {"study_id": "b", "report": "clear", "why": "", "prior": "", "split": "train"},
    ]
    images = [io.BytesIO() for _ in rows]
    for file in images:
        Image.new("L", (8, 8)).save(file, "png")
    if kind == "csv":
        for i, file in enumerate(images):
            (tmp_path / f"{i}.png").write_bytes(file.getvalue())
        lines = [",".join(["path", *rows[0]]), *(f"{i}.png," + ",".join(row.values()) for i, row in enumerate(rows))]
        (tmp_path / "studies.csv").write_text("\n".join(lines) + "\n")
    elif kind == "parquet":
        table = arrow.Table.from_pylist([{**row, "image": file.getvalue()} for row, file in zip(rows, images, strict=True)])
        parquet.write_table(table, tmp_path / "data.parquet")
    else:
        with tarfile.open(tmp_path / "data.tar", "w") as tar:
            for row, file in zip(rows, images, strict=True):
                for suffix, data in (("png", file.getvalue()), ("json", json.dumps(row).encode())):
                    member = tarfile.TarInfo(f"{row['study_id']}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    reader = {"name": kind, "root": str(tmp_path), "indication": "why"}
    spec = DataSpec(reader=READERS.settings_of(kind)(**reader), image_size=8)
    studies = load_studies(spec)
    images_of = StudyImages(studies.splits["train"], studies.root, spec, channels=1, mean=(0.5,), std=(0.5,), labels=[],
                            seed=0, train=False, max_views=1, reader=studies.reader)  # fmt: skip
    (batch,) = images_of.batches(2)
    assert (batch.indications, batch.priors) == (["cough", ""], ["effusion", ""])
    (late,) = images_of.still([1]).batches(1)
    assert (late.indications, late.priors) == ([""], [""])
    reader["indication"] = "wy"
    with pytest.raises(DataError, match=r"no column 'wy'; did you mean 'why'\?"):
        load_studies(DataSpec(reader=READERS.settings_of(kind)(**reader), image_size=8))
