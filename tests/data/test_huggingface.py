"""Data sets of the datasets library: saved, as files, and from a hub that runs on this machine."""

import csv
import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pyarrow as arrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from pydantic import ValidationError

from medxray.data import StudyImages, load_studies, read_image
from medxray.data.readers import READERS, split_of
from medxray.data.readers.huggingface import HuggingFace
from medxray.data.study import Studies
from medxray.spec import DataSpec
from medxray.types import DataError, ImageError, SpecError, Study

HUB = "clinic/chest"


def spec_of(kind: str, root: Path, **changes: Any) -> DataSpec:
    own = {key: changes.pop(key) for key in list(changes) if key not in DataSpec.model_fields}
    reader = READERS.settings_of(kind)(name=kind, root=str(root), **own)
    return DataSpec(**{"reader": reader, "image_size": 32, **changes})


def images_of(studies: Studies, spec: DataSpec, split: str = "train") -> StudyImages:
    return StudyImages(
        studies.splits[split], studies.root, spec, reader=studies.reader, channels=1, mean=(0.0,), std=(1.0,),
        labels=studies.labels, seed=1, train=False, max_views=studies.views,
    )  # fmt: skip


def by_id(studies: Iterable[Study]) -> dict[str, Study]:
    return {study["study_id"]: study for study in studies}


def png(value: int = 7, side: int = 8) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((side, side), value, np.uint8)).save(file, "png")
    return file.getvalue()


def files(root: Path, n: int = 6) -> list[str]:
    (root / "images").mkdir(parents=True, exist_ok=True)
    names = [f"images/{i}.png" for i in range(n)]
    for i, name in enumerate(names):
        (root / name).write_bytes(png(i * 10))
    return names


def values(root: Path, study: Study, reader: HuggingFace) -> list[int]:
    """The gray value of each of a study's images."""
    found = []
    for image in study["images"]:
        pixels = read_image(reader.open(image), max_pixels=10**6, name=image)
        found.append(round(float(pixels[0, 0, 0]) * 255))
    return found


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "studies.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def splits_of(folder: Path, embed: bool = True) -> Any:
    """The phantom as a `DatasetDict` with splits train, validation and test."""
    from datasets import Dataset, DatasetDict, Features, Value
    from datasets import Image as ImageFeature

    parts = {}
    for split, name in (("train", "train"), ("val", "validation"), ("test", "test")):
        part = [row for row in rows_of(folder) if row["split"] == split]
        columns: dict[str, list[Any]] = {
            key: [row[key] for row in part] for key in part[0] if key not in ("path", "split")
        }
        columns["image"] = [
            {"bytes": (folder / row["path"]).read_bytes(), "path": None} if embed else str(folder / row["path"])
            for row in part
        ]
        features = Features({key: Value("string") for key in columns} | {"image": ImageFeature()})
        parts[name] = Dataset.from_dict(columns, features=features)
    return DatasetDict(parts)


@pytest.fixture(scope="module")
def sets(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantom in each form that is read."""
    root = tmp_path_factory.mktemp("sets")
    parts = splits_of(phantom)
    parts.save_to_disk(str(root / "saved"))
    (root / "parquet").mkdir()
    (root / "arrow").mkdir()
    for name, part in parts.items():
        part.to_parquet(str(root / "parquet" / f"{name}-00000-of-00001.parquet"), batch_size=13)
        folder = root / "arrow" / name
        folder.mkdir()
        with arrow.OSFile(str(folder / "data-00000.arrow"), "wb") as sink:
            table = part.data.table
            with arrow.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=11)
    for name in ("lines", "splits"):
        (root / name).mkdir()
        os.symlink(phantom / "images", root / name / "images")
    rows = [{"images": [row.pop("path")], **row} for row in rows_of(phantom)]
    studies: dict[str, dict[str, Any]] = {}
    for row in rows:
        own = studies.setdefault(row["study_id"], {**row, "images": [], "view": []})
        own["images"] += row["images"]
        own["view"].append(row["view"])
    (root / "lines" / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in studies.values()))
    by_split: dict[str, list[Any]] = {}
    for study in studies.values():
        by_split.setdefault(study.pop("split"), []).append(study)
    (root / "splits" / "annotation.json").write_text(json.dumps(by_split))
    return root


# The same studies


@pytest.mark.parametrize("form", ["saved", "parquet", "arrow"])
def test_the_same_studies_as_from_files(sets: Path, phantom: Path, form: str) -> None:
    plain, own = spec_of("csv", phantom), spec_of("huggingface", sets / form)
    a, b = load_studies(plain), load_studies(own)
    assert a.labels == b.labels and a.views == b.views == 2
    for split in ("train", "val", "test"):
        assert len(a.splits[split]) == len(b.splits[split]) > 0
        for column in ("study_id", "patient_id", "views", "report", "findings", "labels"):
            assert list(a.splits[split][column]) == list(b.splits[split][column]), column
        one, two = images_of(a, plain, split), images_of(b, own, split)
        assert torch.equal(one[0].pixels, two[0].pixels) and torch.equal(one[-1].pixels, two[-1].pixels)


@pytest.mark.parametrize("form", ["lines", "splits"])
def test_json_names_images_below_root(sets: Path, phantom: Path, form: str, tmp_path: Path) -> None:
    # A link that leads out of root is refused: here the images are copied.
    root = tmp_path / form
    shutil.copytree(sets / form, root)
    plain, own = spec_of("csv", phantom), spec_of("huggingface", root)
    a, b = load_studies(plain), load_studies(own)
    for split in ("train", "val", "test"):
        for column in ("study_id", "patient_id", "images", "views", "report", "labels"):
            assert list(a.splits[split][column]) == list(b.splits[split][column]), column
    assert torch.equal(images_of(a, plain)[3].pixels, images_of(b, own)[3].pixels)
    assert b.reader.locality(b.splits["train"][0]["images"]) is None
    with pytest.raises(DataError, match=r"outside data\.reader\.root"):
        list(HuggingFace(sets / form).read())


@pytest.mark.parametrize(
    ("form", "start"), [("saved", "fork"), ("arrow", "fork"), ("parquet", "fork"), ("saved", "spawn")]
)
def test_workers_read_the_same(sets: Path, form: str, start: str) -> None:
    """The main process has read images before: open files are not shared with a worker."""
    spec = spec_of("huggingface", sets / form)
    images = images_of(load_studies(spec), spec)
    here = [images[i].pixels for i in range(8)]
    loader = torch.utils.data.DataLoader(
        images, batch_size=None, sampler=range(8), num_workers=2, multiprocessing_context=start
    )
    there = [sample.pixels.clone() for sample in loader]
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_a_pickled_reader_needs_neither_the_library_nor_a_hub(sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = HuggingFace(sets / "saved")
    study = next(iter(reader.read()))
    before = reader.open(study["images"][0])
    data = pickle.dumps(reader)
    assert len(data) < 10_000
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert pickle.loads(data).open(study["images"][0]) == before


def test_images_are_opened_one_by_one(sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading studies maps the files, and copies no image."""
    reader = HuggingFace(sets / "saved")
    before = arrow.total_allocated_bytes()
    studies = list(reader.read())
    size = sum(path.stat().st_size for path in (sets / "saved").rglob("*.arrow"))
    assert arrow.total_allocated_bytes() - before < 0.5 * size
    stamps = {reader.stamp(image) for study in studies for image in study["images"]}
    assert len(stamps) == sum(len(study["images"]) for study in studies)


# Columns


def save(root: Path, columns: dict[str, Any], features: Any = None) -> Path:
    from datasets import Dataset

    Dataset.from_dict(columns, features=features).save_to_disk(str(root))
    return root


def test_lists_of_images_and_mapped_columns(tmp_path: Path) -> None:
    from datasets import Features, List, Value
    from datasets import Image as ImageFeature

    features = Features(
        {"scans": List(ImageFeature()), "angle": List(Value("string")), "who": Value("int64"), "text": Value("string"),
         "exam": Value("string"), "why": Value("string"), "before": Value("string")}
    )  # fmt: skip
    columns = {
        "scans": [[{"bytes": png(10), "path": None}, {"bytes": png(20), "path": None}], [{"bytes": png(30), "path": None}], []],
        "angle": [["lateral", "PA"], ["AP"], []],
        "who": [7, 7, 8], "text": ["One.", "Two.", "Three."], "exam": ["a", "b", "c"], "why": ["pain", "", ""],
        "before": ["", "One.", ""],
    }  # fmt: skip
    reader = HuggingFace(
        save(tmp_path / "s", columns, features), image="scans", study="exam", patient="who", view="angle", report="text",
        indication="why", prior="before",
    )  # fmt: skip
    a, b, c = reader.read()
    assert a["views"] == ["PA", "LL"] and values(tmp_path, a, reader) == [20, 10]
    assert (a["patient_id"], a["report"], a.get("indication"), b.get("prior")) == ("7", "One.", "pain", "One.")
    assert b["images"] == ["all#1"] and values(tmp_path, b, reader) == [30]
    assert not reader.exists(c["images"][0])
    with pytest.raises(ImageError, match="all#2"):
        reader.open(c["images"][0])
    assert {a["split"], b["split"]} == {split_of("7")}


def test_classes_become_labels(tmp_path: Path) -> None:
    from datasets import ClassLabel, Features, List, Value
    from datasets import Image as ImageFeature

    features = Features(
        {
            "image": ImageFeature(),
            "finding": ClassLabel(names=["Normal", "Pneumonia", "Mass"]),
            "several": List(ClassLabel(names=["Edema", "Fracture"])),
            "Effusion": ClassLabel(names=["unlabeled", "uncertain", "absent", "present"]),
            "Cyst": ClassLabel(names=["negative", "positive"]),
            "Tube": Value("int8"),
            "view": ClassLabel(names=["PA", "AP", "Lateral"]),
            "split": ClassLabel(names=["train", "validation", "test"]),
        }
    )
    columns = {
        "image": [{"bytes": png(), "path": None}] * 4, "finding": [1, 0, None, 2], "several": [[0], [0, 1], [], None],
        "Effusion": [3, 2, 1, 0], "Cyst": [0, 1, None, 1], "Tube": [1, 0, -1, None], "view": [0, 1, 2, 0],
        "split": [0, 0, 1, 2],
    }  # fmt: skip
    studies = list(HuggingFace(save(tmp_path / "s", columns, features)).read())
    labels = [study["labels"] for study in studies]
    expected = {
        "Normal": [0, 1, None, 0],
        "Pneumonia": [1, 0, None, 0],
        "Mass": [0, 0, None, 1],
        "Edema": [1, 1, 0, 0],
        "Fracture": [0, 1, 0, 0],
        "Effusion": [1, 0, -1, None],
        "Cyst": [0, 1, None, 1],
        "Tube": [1, 0, -1, None],
    }
    found = {name: [own[name] for own in labels] for name in labels[0]}
    assert {**found, "Edema": found["Edema"][:3], "Fracture": found["Fracture"][:3]} == {
        **expected, "Edema": expected["Edema"][:3], "Fracture": expected["Fracture"][:3]
    }  # fmt: skip
    assert [study["views"] for study in studies] == [["PA"], ["AP"], ["LL"], ["PA"]]
    assert [study["split"] for study in studies] == ["train", "train", "val", "test"]


@pytest.mark.parametrize("form", ["parquet", "arrow", "json"])
@pytest.mark.parametrize("many", [False, True])
def test_paths_in_any_file(tmp_path: Path, form: str, many: bool) -> None:
    names = files(tmp_path)
    cells: list[Any] = [[names[0], names[1]], [names[2]], []] if many else [names[0], names[1], None]
    rows = [{"image_path": cell, "report": f"Text {i}."} for i, cell in enumerate(cells)]
    table = arrow.Table.from_pylist(rows)
    if form == "parquet":
        parquet.write_table(table, tmp_path / "a.parquet")
    elif form == "arrow":
        with arrow.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, arrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        (tmp_path / "a.json").write_text(json.dumps(rows))
    reader = HuggingFace(tmp_path)
    one, two, three = reader.read()
    assert one["images"] == ([names[0], names[1]] if many else [names[0]])
    assert two["images"] == [names[2] if many else names[1]]
    assert values(tmp_path, two, reader) == [20 if many else 10]
    assert reader.exists(one["images"][0]) and not reader.exists(three["images"][0])
    assert len({one["study_id"], two["study_id"], three["study_id"]}) == 3
    before = reader.stamp(names[0])
    (tmp_path / names[0]).write_bytes(png(1, 16))
    assert reader.stamp(names[0]) != before
    (tmp_path / names[1]).unlink()
    assert not reader.exists(names[1])


def test_image_features_that_know_only_paths(tmp_path: Path) -> None:
    """As an image folder is in the library's own Arrow files: some rows with bytes, some with absolute paths."""
    names = files(tmp_path)
    images = [
        {"bytes": None, "path": str(tmp_path / names[3])},
        {"bytes": png(50), "path": "elsewhere.png"},
        {"bytes": None, "path": names[4]},
    ]
    table = arrow.table({"image": images, "front": [images[1], None, images[0]]})
    with arrow.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, arrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    reader = HuggingFace(tmp_path, view=None)
    one, two, three = reader.read()
    assert one["images"] == [names[3], "a.arrow#0/1"] and values(tmp_path, one, reader) == [30, 50]
    assert two["images"] == ["a.arrow#1/0"] and values(tmp_path, two, reader) == [50]
    assert values(tmp_path, three, reader) == [40, 30]
    parquet.write_table(table.slice(0, 1).select(["image"]), tmp_path / "b.parquet")
    (study,) = HuggingFace(tmp_path, files="b.parquet").read()
    assert study["images"] == [names[3]]


def test_nested_labels_of_json(tmp_path: Path) -> None:
    names = files(tmp_path)
    (tmp_path / "a.jsonl").write_text(
        "\n".join(
            json.dumps({"image": name, "labels": {"Edema": i % 2, "Mass": -1}, "tags": ["x"] * (i % 2)})
            for i, name in enumerate(names[:2])
        )
    )
    one, two = HuggingFace(tmp_path).read()
    assert one["labels"] == {"Edema": 0, "Mass": -1} and two["labels"] == {"Edema": 1, "Mass": -1}
    one, two = HuggingFace(tmp_path, tags="tags").read()
    assert one["labels"] == {"x": 0} and two["labels"] == {"x": 1}


# Splits


def lines(root: Path, *names: str) -> Path:
    images = files(root, len(names))
    for name, image in zip(names, images, strict=True):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"image": image, "study_id": name}))
    return root


def test_splits_are_told_by_names_of_files_and_folders(tmp_path: Path) -> None:
    root = lines(tmp_path / "a", "train-00000-of-00001.json", "validation-00000.json", "test.json")
    assert [study["split"] for study in HuggingFace(root).read()] == ["test", "train", "val"]
    root = lines(tmp_path / "b", "default/train/0000.json", "default/test/0000.json")
    assert [study["split"] for study in HuggingFace(root).read()] == ["test", "train"]
    root = lines(tmp_path / "c", "train.json")
    assert [study["split"] for study in HuggingFace(root).read()] == [split_of("train.json")]


def test_splits_can_be_mapped(tmp_path: Path) -> None:
    root = lines(tmp_path, "fold1.json", "fold2.json", "extra.json", "holdout/a.json")
    splits: Any = {"fold1": "train", "fold2": "val", "holdout": "test"}
    found = {study["study_id"]: study["split"] for study in HuggingFace(root, splits=splits).read()}
    assert found == {"fold1.json": "train", "fold2.json": "val", "holdout/a.json": "test"}
    with pytest.raises(DataError, match=r"data\.reader\.splits: .* has none of other \(found: extra\.json"):
        list(HuggingFace(root, splits={"other": "train"}).read())
    with pytest.raises(ValidationError, match="'train', 'val' or 'test'"):
        READERS.settings_of("huggingface")(name="huggingface", root="x", splits={"a": "dev"})


def test_an_unknown_split_beside_known_ones_is_told(tmp_path: Path) -> None:
    root = lines(tmp_path, "train.json", "extra.json")
    with pytest.raises(DataError, match=r"split 'extra\.json' beside train\.json is none of.*data\.reader\.splits"):
        list(HuggingFace(root).read())


def test_saved_splits_can_be_mapped(sets: Path) -> None:
    found = list(HuggingFace(sets / "saved", splits={"validation": "train", "test": "test"}).read())
    assert {study["split"] for study in found} == {"train", "test"}
    assert all(image.startswith(("validation#", "test#")) for study in found for image in study["images"])


# What is wrong


def test_errors_name_what_is_wrong(tmp_path: Path) -> None:
    def check(root: Path, match: str, **settings: Any) -> None:
        with pytest.raises(DataError, match=match):
            list(HuggingFace(root, **settings).read())

    check(tmp_path / "nowhere", "no folder")
    root = tmp_path / "a"
    root.mkdir()
    (root / "notes.txt").touch()
    check(root, r"no file matches .*\.parquet.*\.arrow.*\.json.* \(the folder holds notes\.txt\)")
    check(root, r"expected a name that ends in \.parquet", files="*.txt")
    (root / "a.json").write_text('{"image": "x.png"}\n{"image" "y.png"}\n')
    check(root, r"a\.json, line 2: not JSON")
    (root / "a.json").write_text("[1]")
    check(root, "row 0 is no object")
    (root / "a.json").write_text("[]")
    check(root, "no row")
    (root / "a.json").write_text('[{"image": "x", "age": 1}, {"image": "y", "age": "old"}]')
    check(root, "column 'age' holds values that no column holds .*one kind")
    (root / "a.json").write_text('[{"image": "x", "report": "\\ud800"}]')
    check(root, "column 'report' holds values that no column holds")
    (root / "a.json").write_text("[" * 100_000)
    check(root, r"a\.json, line 1: not JSON")
    (root / "a.json").write_text('[{"picture": "x.png", "report": "a"}]')
    check(root, r"no column of images \(found: picture: string, report: string\).*data\.reader\.image")
    check(root, "no column 'pictures'; did you mean 'picture'", image="pictures")
    (root / "a.json").write_text('[{"image": 3, "report": "a"}]')
    check(root, "column 'image' holds int64; expected images, bytes, paths", image="image")
    (root / "a.json").write_text('[{"image": "../x.png"}]')
    check(root, r"outside data\.reader\.root")
    (root / "b.arrow").write_bytes(b"no arrow")
    check(root, r"b\.arrow: not an Arrow file", files="b.arrow")
    table = arrow.table({"image": [png()] * 100})
    with arrow.OSFile(str(root / "b.arrow"), "wb") as sink, arrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    (root / "b.arrow").write_bytes((root / "b.arrow").read_bytes()[:3000])
    check(root, r"b\.arrow: not an Arrow file, or damaged or cut off", files="b.arrow")
    (root / "c.parquet").write_bytes(b"PAR1")
    check(root, r"c\.parquet: not a Parquet file", files="c.parquet")
    root = save(tmp_path / "b", {"image": ["x.png"]})
    next(root.glob("*.arrow")).write_bytes(b"cut off")
    check(root, "looks like a data set of save_to_disk, but cannot be read")
    root = save(tmp_path / "c", {"image": []})
    check(root, "cannot be read|has no row")


def test_settings_that_do_not_fit(tmp_path: Path) -> None:
    for settings, match in (
        ({"config": "x"}, "name it in dataset"),
        ({"dataset": "a/b", "files": "*.json"}, "files are those of a local folder"),
    ):
        model = READERS.settings_of("huggingface")(name="huggingface", root=str(tmp_path), **settings)
        with pytest.raises(SpecError, match=match):
            READERS.build(model, tmp_path)


def test_a_missing_image_is_told_by_its_row(tmp_path: Path) -> None:
    from datasets import Features, Value
    from datasets import Image as ImageFeature

    columns = {"image": [{"bytes": png(), "path": None}, None], "report": ["A.", "B."]}
    root = save(tmp_path / "s", columns, Features({"image": ImageFeature(), "report": Value("string")}))
    with pytest.raises(DataError, match=r"1 of 2 images are missing: 'all#1'"):
        load_studies(spec_of("huggingface", root))


# The hub


class Hub(BaseHTTPRequestHandler):
    """The few pages of a hub that one data set needs."""

    folder: ClassVar[Path]
    commit = "0123456789abcdef0123456789abcdef01234567"
    asked: ClassVar[list[str]] = []

    def _files(self) -> list[dict[str, Any]]:
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return [
            {
                "type": "file",
                "path": path.relative_to(self.folder).as_posix(),
                "rfilename": path.relative_to(self.folder).as_posix(),
                "size": path.stat().st_size,
                "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
            }
            for path in paths
        ]

    def _json(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", value["code"])
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        Hub.asked.append(path)
        info = {"_id": "1", "id": HUB, "sha": self.commit, "private": False, "gated": False, "disabled": False,
                "downloads": 0, "likes": 0, "tags": [], "siblings": self._files()}  # fmt: skip
        if not path.startswith((f"/api/datasets/{HUB}", f"/datasets/{HUB}/")):
            self._json({"error": "not found", "code": "RepoNotFound"}, 404)
        elif path.startswith(f"/api/datasets/{HUB}/tree/"):
            below = path.removeprefix(f"/api/datasets/{HUB}/tree/").partition("/")[2]
            start = f"{below}/" if below else ""
            found = [file for file in self._files() if file["path"].startswith(start)]
            if "recursive=true" not in self.path.lower():
                names = {file["path"].removeprefix(start).partition("/")[::2] for file in found}
                folders = [
                    {"type": "directory", "path": start + name, "size": 0, "oid": "0" * 40}
                    for name in sorted({name for name, rest in names if rest})
                ]
                found = folders + [file for file in found if "/" not in file["path"].removeprefix(start)]
            self._json(found) if found else self._json({"error": "none", "code": "EntryNotFound"}, 404)
        elif path == f"/api/datasets/{HUB}" or path.startswith(f"/api/datasets/{HUB}/revision/"):
            self._json(info)
        elif "/resolve/" in path:
            name = path.partition("/resolve/")[2].partition("/")[2]
            if not (self.folder / name).is_file():
                self._json({"error": "none", "code": "EntryNotFound"}, 404)
                return
            data = (self.folder / name).read_bytes()
            self.send_response(200)
            self.send_header("X-Repo-Commit", self.commit)
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)
        else:
            self._json({"error": "none", "code": "EntryNotFound"}, 404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        Hub.asked.append(path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "/paths-info/" in path:
            wanted = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
            self._json([file for file in self._files() if file["path"] in wanted])
        else:
            self._json({"error": "none", "code": "EntryNotFound"}, 404)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    Hub.folder = tmp_path / "hub"
    Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


READ = """
    import json, sys
    from pathlib import Path
    from medxray.data.readers.huggingface import HuggingFace
    from medxray.types import DataError

    def read(settings):
        reader = HuggingFace(Path(sys.argv[1]), **settings)
        try:
            studies = list(reader.read())
        except DataError as error:
            return f"DataError: {error}"
        return [[s["study_id"], s["split"], s["images"], [len(reader.open(i)) for i in s["images"]]] for s in studies]

    print(json.dumps([read(settings) for settings in json.loads(sys.argv[2])]))
"""


def elsewhere(root: Path, home: Path, endpoint: str, *settings: dict[str, Any], offline: bool = False) -> list[Any]:
    """What another process reads, with its own settings of the library."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "http", "HTTP"))}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "NO_PROXY": "*", "HF_HUB_DISABLE_XET": "1"}
    if offline:
        environment["HF_HUB_OFFLINE"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(READ), str(root), json.dumps(settings)],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


def test_a_data_set_of_the_hub(phantom: Path, tmp_path: Path, hub: str) -> None:
    """It is fetched once; then root alone is enough."""
    (Hub.folder / "data").mkdir(parents=True)
    parts = splits_of(phantom)
    for name, part in parts.items():
        part.to_parquet(str(Hub.folder / "data" / f"{name}-00000-of-00001.parquet"))
    root, home = tmp_path / "root", tmp_path / "home"
    this, other = {"dataset": HUB, "revision": Hub.commit}, {"dataset": HUB, "revision": "f" * 40}
    found, message = elsewhere(root, home, hub, this, {"dataset": "clinic/other"})
    assert len(found) == sum(len(set(part["study_id"])) for part in parts.values())
    assert {split for _, split, _, _ in found} == {"train", "val", "test"}
    assert all(size > 100 for *_, sizes in found for size in sizes)
    assert any("data/train-00000-of-00001.parquet" in path for path in Hub.asked)
    assert message.startswith("DataError: data.reader.dataset 'clinic/other': could not be prepared")
    Hub.asked.clear()
    again, message = elsewhere(root, tmp_path / "empty", hub, this, other, offline=True)
    assert again == found and not Hub.asked
    assert message.startswith(f"DataError: data.reader.revision {'f' * 40}: ")


@pytest.mark.slow
def test_an_image_folder_of_the_hub_is_whole_in_root(tmp_path: Path, hub: str) -> None:
    """Its images are files of the hub's cache, which may go."""
    for split in ("train", "test"):
        (Hub.folder / split).mkdir(parents=True)
        rows = ["file_name,report"]
        for i in range(3):
            (Hub.folder / split / f"{i}.png").write_bytes(png(i))
            rows.append(f"{i}.png,Text {i}.")
        (Hub.folder / split / "metadata.csv").write_text("\n".join(rows))
    root, home = tmp_path / "root", tmp_path / "home"
    (found,) = elsewhere(root, home, hub, {"dataset": HUB})
    assert len(found) == 6
    shutil.rmtree(home)
    assert elsewhere(root, tmp_path / "empty", hub, {"dataset": HUB}, offline=True) == [found]


def test_without_a_network_the_cure_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'clinic/chest': could not be prepared.*Offline.*save_to_disk") as caught:
        list(HuggingFace(tmp_path, dataset=HUB).read())
    assert "Traceback" not in str(caught.value) and len(str(caught.value)) < 800
    for name in ("chest", "a/b/c", "../b", "imagefolder"):
        with pytest.raises(DataError, match="expected OWNER/NAME"):
            list(HuggingFace(tmp_path, dataset=name).read())


def test_nothing_is_fetched_unless_named(sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for form in ("saved", "parquet", "arrow"):
        assert list(HuggingFace(sets / form).read())
