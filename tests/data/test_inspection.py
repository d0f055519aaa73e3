"""What is found in a data set with everything planted in it that can be wrong."""

import csv
import dataclasses
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from medxray.cli import app
from medxray.data import data_of, inspection
from medxray.data.inspection import LONG, Inspection, inspect, reader_of
from medxray.data.phantom import FINDINGS, generate
from medxray.types import DataError, ImageError

LONG_REPORT = " ".join(f"finding{i} is seen." for i in range(LONG // 3 + 1))
LABEL = "Cardiomegaly"


def rows_of(root: Path) -> list[dict[str, str]]:
    with (root / "studies.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write(root: Path, rows: list[dict[str, str]]) -> None:
    with (root / "studies.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def spec_of(root: Path, *settings: str):
    return data_of("csv", [f"reader.root={root}", "reader.report=findings", *settings])[0].data


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty studies; every report has words of its own, so that no two are alike by chance."""
    root = generate(tmp_path_factory.mktemp("inspect") / "clean", studies=30, size=128, seed=4, progress=False)
    rows = rows_of(root)
    for row in rows:
        row["findings"] += f" Number {row['study_id']}."
    write(root, rows)
    return root


@pytest.fixture(scope="module")
def planted(clean: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with what is wrong; each added study is called after it."""
    root = tmp_path_factory.mktemp("inspect") / "planted"
    shutil.copytree(clean, root)
    rows = rows_of(root)
    frontal = [row for row in rows if row["view"] != "LL"]
    train = [row for row in frontal if row["split"] == "train"]

    def pixels(row: dict[str, str]) -> np.ndarray:
        return np.asarray(Image.open(root / row["path"]))

    def add(study: str, split: str, image: np.ndarray | None, suffix: str = "png", view: str = "PA", **cells: str) -> None:
        path = f"images/{study}.{suffix}"
        if image is not None:
            Image.fromarray(image).save(root / path, **({"quality": 80} if suffix == "jpg" else {"compress_level": 9}))
        empty = dict.fromkeys(rows[0], "")
        rows.append(empty | {"path": path, "study_id": study, "patient_id": f"of-{study}", "view": view, "split": split,
                             "findings": f"Nothing but {study}."} | cells)  # fmt: skip

    add("same-file", "test", None, **{LABEL: "1"})
    shutil.copy(root / train[0]["path"], root / "images/same-file.png")
    train[0][LABEL] = "0"
    for row in rows:
        if row["study_id"] == train[0]["study_id"]:
            row[LABEL] = "0"
    add("same-pixels", "train", pixels(train[1]))
    changed = Image.fromarray((pixels(train[2]) * 1.12).clip(0, 255).astype(np.uint8)).resize((100, 100))
    add("near", "val", np.asarray(changed), "jpg")
    add("mirrored", "test", np.ascontiguousarray(pixels(train[3])[:, ::-1]))
    add("inverted", "train", 255 - pixels(train[4]))
    add("constant", "train", np.full((70, 90), 90, np.uint8))
    add("saturated", "train", np.where(pixels(train[5]) > 120, 255, pixels(train[5])).astype(np.uint8))
    dark = np.zeros((128, 128), np.uint8)
    dark[60:68, 60:68] = pixels(train[6])[60:68, 60:68]
    add("black", "train", dark)
    add("faint", "train", (120 + pixels(train[7]) // 16).astype(np.uint8))
    add("damaged", "train", pixels(train[8]))
    data = (root / "images/damaged.png").read_bytes()
    (root / "images/damaged.png").write_bytes(data[: len(data) // 2])
    add("missing", "train", None)
    rng = np.random.default_rng(0)

    def other() -> np.ndarray:
        return np.asarray(Image.fromarray(rng.integers(0, 255, (12, 12), np.uint8)).resize((96, 80)))

    add("crosses", "train", other(), patient_id="crossing")
    add("crosses-too", "test", other(), patient_id="crossing")
    add("long", "train", other(), findings=LONG_REPORT)
    add("long-too", "val", other(), findings=LONG_REPORT.upper().replace(".", " ."))
    add("told", "val", other(), findings="A shadow of the left lung.", indication="Cough. a shadow of the left lung; ?")
    add("repeated", "test", other(), findings="No XXXX seen. Heart ___ normal.")
    add("wordless", "train", other(), findings=" . ")
    write(root, rows)
    return root


@pytest.fixture(scope="module")
def found(planted: Path) -> Inspection:
    return inspect(spec_of(planted), workers=1, progress=False)


def pair(found: Inspection, study: str):
    return next(group for group in found.copies if study in group.studies)


def test_counts_are_those_of_the_table(planted: Path, found: Inspection) -> None:
    rows = rows_of(planted)
    studies = {row["study_id"]: row for row in rows}
    for split, counts in found.splits.items():
        own = [row for row in studies.values() if split in ("", row["split"])]
        assert counts.studies == len(own)
        assert counts.patients == len({row["patient_id"] for row in own})
        assert counts.images == sum(row["split"] == split or not split for row in rows)
        assert counts.reports == len(own)
    assert list(found.splits) == ["", "train", "val", "test"]
    for view in ("PA", "AP", "LL"):
        for split, n in found.views[view].items():
            assert n == sum(row["view"] == view and row["split"] == split for row in rows)
    assert list(found.labels) == list(FINDINGS)
    for label, own in found.labels.items():
        for split, counts in own.items():
            cells = Counter(row[label] for row in studies.values() if row["split"] == split)
            assert tuple(counts) == tuple(cells[cell] for cell in ("1", "0", "-1", ""))
            known = cells["1"] + cells["0"]
            assert counts.prevalence == cells["1"] / known if known else np.isnan(counts.prevalence)
    patients = Counter(row["patient_id"] for row in studies.values())
    assert found.per_patient == dict(sorted(Counter(patients.values()).items()))
    assert found.per_study == dict(sorted(Counter(Counter(row["study_id"] for row in rows).values()).items()))


def test_headers_and_sizes(planted: Path, found: Inspection) -> None:
    n = len(rows_of(planted)) - 2
    assert len(found.sizes) == len(found.gray) == n and found.total == found.looked == n + 2 and not found.sampled
    assert found.headers["format"] == {"PNG": n - 1, "JPEG": 1}
    assert found.headers["bits stored"] == {"8": n} and found.headers["photometric"] == {"MONOCHROME2": n}
    assert set(found.headers) == {"format", "bits stored", "photometric"}, "what no header tells is left out"
    assert [90, 70] in found.sizes.tolist() and [100, 100] in found.sizes.tolist()


@pytest.mark.parametrize(
    ("study", "kind", "between"),
    [
        ("same-file", "same file", "splits"),
        ("same-pixels", "same pixels", "patients"),
        ("near", "near", "splits"),
        ("inverted", "inverted", "patients"),
    ],
)
def test_copies_are_found_and_named(study: str, kind: str, between: str, found: Inspection) -> None:
    group = pair(found, study)
    assert len(group.images) == 2 and group.studies[1] == study and group.images[1].startswith(f"images/{study}.")
    assert group.kinds == ["", kind] and group.between == between
    assert group.distances[0] == 0 and group.distances[1] <= 9 and group.correlations[0] == 1
    assert group.correlations[1] < -0.93 if kind == "inverted" else group.correlations[1] > 0.93
    assert (group.distances[1] == 0) == (kind != "near")


def test_nothing_else_is_a_copy_and_those_across_splits_come_first(found: Inspection) -> None:
    assert not any("mirrored" in group.studies for group in found.copies), "a mirrored image is another"
    named = {"same-file", "same-pixels", "near", "inverted", "saturated", "faint"}
    assert all(named & set(group.studies) for group in found.copies) and found.copies_whole
    order = [group.between for group in found.copies]
    assert order == sorted(order, key=["splits", "patients", "studies", "views of one study"].index)
    assert found.copies_between == Counter(order) and order[:2] == ["splits", "splits"]


def test_what_stands_out(found: Inspection) -> None:
    seen = {entry.what.split(":")[0].split(" ")[0]: entry for entry in found.unusual}
    for what in ("constant", "saturated", "black", "faint"):
        assert (seen[what].count, [image.name for image, _ in seen[what].images]) == (1, [f"images/{what}.png"])
    inverted = [image.name for image, _ in seen["inverted-looking"].images]
    assert inverted == ["images/inverted.png"]
    values = [value for _, value in seen["least"].images]
    assert values == sorted(values) and len(values) == inspection.SHOWN and seen["least"].count == 0


def test_leaks(found: Inspection) -> None:
    leaks = {leak.kind: leak for leak in found.leaks}
    assert set(leaks) == {"patients", "images", "reports", "inputs", "labels"} and found.leaking
    assert leaks["patients"].count == 1 and leaks["patients"].examples == ["crossing: crosses (train), crosses-too (test)"]
    assert leaks["images"].count == 2 and "train and val 1" in leaks["images"].text
    assert any("images/same-file.png (test)" in text for text in leaks["images"].examples)
    assert leaks["reports"].count == 1 and leaks["reports"].examples == ["long (train), long-too (val)"]
    assert leaks["inputs"].count == 1 and leaks["inputs"].examples == ["told"]
    assert leaks["labels"].count == 1 and not leaks["labels"].certain
    assert leaks["labels"].examples[0].startswith(f"{LABEL}: ") and leaks["labels"].examples[0].endswith("same-file")


def test_a_data_set_that_cannot_be_fitted_is_still_looked_at(planted: Path, found: Inspection) -> None:
    assert "1 patients in two splits (crossing in test and train)" in found.refused
    rows = rows_of(planted)
    for row in rows:
        row["patient_id"] = row["study_id"]
    root = planted.parent / "missing"
    shutil.copytree(planted, root)
    write(root, rows)
    found = inspect(spec_of(root), workers=1, progress=False)
    assert "1 of" not in found.refused and "wordless" in found.refused, "what a fit says first"
    found = inspect(spec_of(root, "data.on_error=skip"), images=5, workers=1, progress=False)
    assert found.refused == ""


def test_skipped_with_reasons(found: Inspection) -> None:
    assert found.skipped == {
        "image: damaged or truncated": 1,
        "image: no such file": 1,
        "study: no word in the report": 1,
    }
    assert found.skipped_examples["image: no such file"] == ["images/missing.png"]
    assert found.skipped_examples["study: no word in the report"] == ["wordless"]


def test_what_a_reader_passed_by_is_told(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medxray.data.readers.csv import CSV

    read = CSV.read

    def noting(self):
        self.damaged = [{"study": "", "file": name, "reason": f"{self.root / name}: cut at byte {name}"} for name in "12"]
        self.left_out = [
            {"study": "", "file": "", "reason": "300 files: modality CT"},
            {"study": "s9", "file": "", "reason": "the table tells no split"},
            {"study": "", "file": "", "reason": "7 studies without a patient"},
        ]
        return read(self)

    monkeypatch.setattr(CSV, "read", noting)
    found = inspect(spec_of(planted), images=1, workers=1, progress=False)
    told = {reason: n for reason, n in found.skipped.items() if reason.startswith("reader")}
    assert told == {
        "reader: modality CT": 300,
        "reader: cut at byte N": 2,
        "reader: 7 studies without a patient": 1,
        "reader: the table tells no split": 1,
    }
    assert found.skipped_examples["reader: cut at byte N"] == ["1", "2"]
    assert found.skipped_examples["reader: the table tells no split"] == ["s9"]


def test_reports(planted: Path, found: Inspection) -> None:
    rows = rows_of(planted)
    texts = {row["study_id"]: row["findings"] for row in rows}
    raw = {row["study_id"]: row["findings"] + row["impression"] for row in rows}.values()
    assert found.reports.count == len(texts) - 1 and found.reports.distinct == len(texts) - 2
    assert [n for _, n in found.reports.frequent] == [2] and found.reports.frequent[0][0].startswith("finding0 is seen")
    assert found.reports.marks == {"XXXX": sum("XXXX" in text for text in raw), "___": 1}
    assert found.reports.empty == 1
    assert len(found.reports.lengths["report"]) == len(texts) - 1
    assert found.reports.lengths["findings"].max() == max(len(text.split()) for text in texts.values())
    assert set(found.reports.lengths) == {"report", "findings", "impression", "indication"}
    counts = [n for _, n in found.reports.sentences]
    assert counts == sorted(counts, reverse=True) and len(counts) == inspection.LISTED


def test_equal_to_the_bit_for_any_number_of_processes_and_twice(planted: Path, found: Inspection) -> None:
    spec = spec_of(planted)
    for workers in (1, 3):
        again = inspect(spec, workers=workers, progress=False)
        for name in (f.name for f in dataclasses.fields(found)):
            a, b = getattr(found, name), getattr(again, name)
            if isinstance(a, np.ndarray):
                assert a.tobytes() == b.tobytes(), name
            elif name == "pictures":
                assert list(a) == list(b) and all((a[image] == b[image]).all() for image in a)
            elif name == "reports":
                assert repr(a) == repr(b)
            else:
                assert a == b, name


def test_a_sample_is_chosen_by_the_seed_and_lies_in_a_larger_one(planted: Path) -> None:
    spec = spec_of(planted)
    few, more, other = (
        inspect(spec, images=n, seed=seed, workers=1, progress=False) for n, seed in ((8, 0), (20, 0), (8, 1))
    )
    assert (few.looked, few.sampled, few.total) == (8, True, more.total) and few.splits == more.splits

    def names(found: Inspection) -> set[str]:
        return {image.name for images in found.samples.values() for image in images}

    failed = sum(n for reason, n in more.skipped.items() if reason.startswith("image"))
    assert names(few) <= names(more) | set() or failed
    assert names(few) != names(other)
    assert not inspect(spec, images=10_000, workers=1, progress=False).sampled


def test_samples_and_pictures(found: Inspection) -> None:
    assert [key for key in found.samples if key[1] == "PA"] == [("train", "PA"), ("val", "PA"), ("test", "PA")]
    for (split, view), images in found.samples.items():
        assert 0 < len(images) <= inspection.SAMPLES
        assert all((image.split, image.view) == (split, view) for image in images)
    for image in found.pictures.values():
        assert image.dtype == np.uint8 and max(image.shape) <= inspection.PICTURE
    assert found.pictures["images/constant.png"].shape == (70, 90)
    shown = {name for group in found.copies for name in group.images}
    shown |= {image.name for images in found.samples.values() for image in images}
    shown |= {image.name for entry in found.unusual for image, _ in entry.images}
    assert set(found.pictures) == shown


def test_a_clean_set_has_nothing_to_tell(clean: Path) -> None:
    found = inspect(spec_of(clean), workers=1, progress=False)
    assert found.leaks == [] and not found.leaking and found.skipped == {} and found.copies == [] and found.refused == ""
    assert [entry.count for entry in found.unusual] == [0]


def test_a_split_of_the_spec_is_what_is_looked_at(planted: Path) -> None:
    found = inspect(spec_of(planted, "data.split=patient"), images=1, workers=1, progress=False)
    assert "patients" not in {leak.kind for leak in found.leaks}


def test_many_equal_files_make_one_group(clean: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    shutil.copytree(clean, root)
    rows = rows_of(root)
    first = rows[0]
    copied = [first | {"path": f"images/copy{i}.png", "study_id": f"c{i}", "patient_id": f"c{i}"} for i in range(40)]
    for row in copied:
        shutil.copy(root / first["path"], root / row["path"])
    write(root, rows + copied)
    found = inspect(spec_of(root), workers=2, progress=False)
    assert [len(group.images) for group in found.copies] == [41] and set(found.copies[0].kinds[1:]) == {"same file"}
    assert len(set(found.copies[0].images) & set(found.pictures)) < 41, "a few of them are shown"


def test_what_breaks_on_the_second_look_stops_nothing(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = inspection._Files._read

    def fail(self, source, where, least):
        if least != inspection.NEEDED and "same-pixels" in where:
            raise ImageError(f"{where}: damaged in its finer parts")
        return read(self, source, where, least)

    monkeypatch.setattr(inspection._Files, "_read", fail)
    found = inspect(spec_of(planted), workers=1, progress=False)
    assert pair(found, "same-pixels").kinds == ["", "near"]
    assert found.pictures["images/same-pixels.png"].shape == (1, 1)


def test_images_that_lie_together_are_read_by_one_process() -> None:
    parts = np.array([3, 3, 3, 0, 0, 5, 3, 3])
    for workers in (1, 2):
        read = list(inspection._in_order(process_of, list(range(8)), workers, False, "", parts))
        assert [item for item, _ in read] == list(range(8))
        own = [process for _, process in read]
        assert len(set(own[:3])) == len(set(own[3:5])) == len(set(own[6:])) == 1
        assert len(set(own)) == workers
    assert list(inspection._in_order(process_of, [], 2, False, "")) == []


def process_of(item: int) -> tuple[int, int]:
    return item, os.getpid()


def test_shards_give_what_files_give(clean: Path, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = rows_of(clean)
    columns = ("study_id", "patient_id", "view", "findings", "split")
    table = {name: [row[name] for row in rows] for name in columns}
    table["image"] = [{"bytes": (clean / row["path"]).read_bytes(), "path": row["path"]} for row in rows]
    parquet.write_table(pyarrow.table(table), tmp_path / "train-0.parquet", row_group_size=7)
    shards, files = (
        inspect(data_of(reader, [f"reader.root={root}", "reader.report=findings"])[0].data, workers=2, progress=False)
        for reader, root in (("parquet", tmp_path), ("csv", clean))
    )
    assert shards.gray.tobytes() == files.gray.tobytes() and shards.sizes.tobytes() == files.sizes.tobytes()
    assert shards.splits == files.splits and shards.leaks == files.leaks == [] and shards.copies == []


def test_the_header_tells_of_the_maker_and_of_nothing_else(tmp_path: Path) -> None:
    import pydicom

    root = generate(tmp_path / "dicom", studies=6, size=64, seed=1, format="dicom", progress=False)
    secrets = {
        "PatientName": "SECRETNAME^ANN", "PatientID": "SECRETID", "StudyDate": "20190517", "PatientBirthDate": "19500203",
        "ManufacturerModelName": "SECRETMODEL", "InstitutionName": "SECRETHOSPITAL", "AccessionNumber": "SECRET12345",
        "StationName": "SECRETSTATION", "DeviceSerialNumber": "SECRET777", "StudyDescription": "SECRETWORDS",
    }  # fmt: skip
    views = Counter()
    for path in sorted((root / "images").glob("*.dcm")):
        data = pydicom.dcmread(path)
        for name, value in secrets.items():
            setattr(data, name, value)
        data.Manufacturer, data.BurnedInAnnotation = "ACME Imaging", "YES"
        views[data.ViewPosition] += 1
        if data.ViewPosition == "LL":
            data.ViewPosition = "AP"
        data.save_as(path)
    found = inspect(spec_of(root), workers=1, progress=False)
    n = sum(views.values())
    assert found.headers["manufacturer"] == {"ACME Imaging": n} and found.headers["burned-in text"] == {"yes": n}
    assert found.headers["bits stored"] == {"12": n} and found.headers["format"] == {"DICOM": n}
    assert set(found.headers["photometric"]) == {"MONOCHROME1", "MONOCHROME2"}
    assert found.other_view == views["LL"] > 0
    text = repr(found)
    assert "SECRET" not in text and "2019" not in text and "1950" not in text


def test_the_reader_of_a_folder(clean: Path, tmp_path: Path) -> None:
    assert reader_of(clean) == "csv"
    with pytest.raises(DataError, match="no reader finds a study in it; name one"):
        reader_of(tmp_path)
    root = tmp_path / "two"
    shutil.copytree(clean, root)
    path = rows_of(root)[0]["path"].removeprefix("images/")
    (root / "annotation.json").write_text(
        '{"train": [{"id": "a", "report": "r", "image_path": ["' + path + '"]}]}', encoding="utf-8"
    )
    with pytest.raises(DataError, match=r"readers csv and iu-xray find studies in it; name one"):
        reader_of(root)


def test_a_reader_without_a_study_is_an_error(clean: Path, tmp_path: Path) -> None:
    root = tmp_path / "none"
    root.mkdir()
    (root / "studies.csv").write_text("path,study_id\n", encoding="utf-8")
    with pytest.raises(DataError, match="found no study"):
        inspect(data_of("csv", [f"reader.root={root}"])[0].data, progress=False)


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_the_command(planted: Path, clean: Path, tmp_path: Path) -> None:
    out = tmp_path / "a" / "card.html"
    given = ["csv", f"reader.root={planted}", "reader.report=findings", "--out", out, "-q", "--workers", 1]
    code, text, _ = run("inspect", *given)
    assert code == 0 and "Leaks: 1 patient in more than one split" in text and "A fit would not begin:" in text
    assert f"card: {out}" in text and out.is_file()
    assert run("inspect", *given, "--strict")[0] == 3
    code, text, _ = run("inspect", clean, "reader.report=findings", "--out", out, "-q", "--workers", 1, "--strict")
    assert code == 0 and "No leak was found." in text
    code, _, error = run("inspect", tmp_path / "nothing", "-q")
    assert code == 2 and error.startswith("medxray: no spec or reader")
    code, _, error = run("inspect", tmp_path, "-q")
    assert code == 2 and "no reader finds a study" in error


@pytest.mark.slow
def test_indiana_as_a_whole(shared: Path) -> None:
    spec = data_of("iu-xray", [f"reader.root={shared / 'data' / 'iu_xray'}"])[0].data
    found = inspect(spec, progress=False)
    assert found.leaks == [] and found.refused == "" and found.skipped == {}
    assert [(group.between, group.kinds) for group in found.copies] == [("views of one study", ["", "same file"])]
    assert [entry.count for entry in found.unusual] == [0]
    # An upside-down chest, and laterals that are called frontal, are the least typical.
    names = [image.name for image, _ in found.unusual[0].images]
    assert names[0] == "images/CXR1285_IM-0188/0.jpg" and "images/CXR1268_IM-0180/0.jpg" in names
