"""Sharded data sets: the same studies as from files, read where they lie."""

import csv
import gzip
import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from medxray.data import StudyImages, load_studies, read_image
from medxray.data.phantom import generate
from medxray.data.readers import READERS, Locality
from medxray.data.readers.parquet import Parquet
from medxray.data.readers.webdataset import WebDataset
from medxray.data.study import Studies
from medxray.spec import DataSpec, Spec, TrainingSpec
from medxray.training import EpochBatches
from medxray.types import DataError, ImageError

FORMATS = ["png8", "png16", "jpeg"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a format: files with studies.csv, and the same in Parquet and in tar shards."""
    root = tmp_path_factory.mktemp("sets")
    for name in FORMATS:
        if name == "jpeg":
            files = as_jpeg(root / "png8", root / "jpeg")
        else:
            files = generate(root / name, studies=30, size=48, seed=4, format=name, progress=False)
        rows = rows_of(files)
        to_parquet(rows, files, root / f"{name}-parquet")
        to_tar(rows, files, root / f"{name}-webdataset")
    return root


def rows_of(files: Path) -> list[dict[str, str]]:
    with (files / "studies.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def as_jpeg(source: Path, target: Path) -> Path:
    target.mkdir()
    rows = rows_of(source)
    for row in rows:
        path = (target / row["path"]).with_suffix(".jpg")
        path.parent.mkdir(exist_ok=True)
        Image.open(source / row["path"]).save(path, quality=90)
        row["path"] = str(path.relative_to(target))
    with (target / "studies.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return target


def to_parquet(rows: list[dict[str, str]], files: Path, folder: Path, batch: int = 7) -> Path:
    """As the datasets library writes it: two shards of small row groups."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    folder.mkdir(exist_ok=True)
    half = len(rows) // 2 + 1
    for i, part in enumerate((rows[:half], rows[half:])):
        columns: dict[str, list[Any]] = {key: [row[key] for row in part] for key in rows[0] if key != "path"}
        columns["image"] = [{"bytes": (files / row["path"]).read_bytes(), "path": row["path"]} for row in part]
        features = Features({key: Value("string") for key in columns} | {"image": ImageFeature()})
        dataset = Dataset.from_dict(columns, features=features)
        dataset.to_parquet(str(folder / f"shard-{i:05}.parquet"), batch_size=batch)
    return folder


def to_tar(rows: list[dict[str, str]], files: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    half = len(rows) // 2 + 1
    for i, part in enumerate((rows[:half], rows[half:])):
        with tarfile.open(folder / f"shard-{i:05}.tar", "w") as tar:
            for n, row in enumerate(part):
                meta = {key: value for key, value in row.items() if key != "path"}
                add(tar, f"{n:06}{Path(row['path']).suffix}", (files / row["path"]).read_bytes())
                add(tar, f"{n:06}.json", json.dumps(meta).encode())
    return folder


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def spec_of(kind: str, root: Path, **changes: Any) -> DataSpec:
    own = {key: changes.pop(key) for key in list(changes) if key not in DataSpec.model_fields}
    reader = READERS.settings_of(kind)(name=kind, root=str(root), **own)
    return DataSpec(**{"reader": reader, "image_size": 32, **changes})


def images_of(studies: Studies, spec: DataSpec, split: str = "train", train: bool = False) -> StudyImages:
    return StudyImages(
        studies.splits[split], studies.root, spec, reader=studies.reader, channels=1, mean=(0.0,), std=(1.0,),
        labels=studies.labels, seed=1, train=train, max_views=studies.views,
    )  # fmt: skip


def png(value: int = 7, side: int = 8) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((side, side), value, np.uint8)).save(file, "png")
    return file.getvalue()


def write(folder: Path, columns: dict[str, Any], name: str = "a.parquet", **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    parquet.write_table(arrow.table(columns), folder / name, **settings)
    return folder


# The same studies


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_the_same_studies_as_from_files(sets: Path, kind: str, format: str) -> None:
    plain, sharded = spec_of("csv", sets / format), spec_of(kind, sets / f"{format}-{kind}")
    a, b = load_studies(plain), load_studies(sharded)
    assert a.labels == b.labels and a.views == b.views == 2
    for split in ("train", "val", "test"):
        assert len(a.splits[split]) == len(b.splits[split]) > 0
        for column in ("study_id", "patient_id", "views", "report", "findings", "labels"):
            assert list(a.splits[split][column]) == list(b.splits[split][column]), column
        one, two = images_of(a, plain, split), images_of(b, sharded, split)
        for row in range(len(one)):
            assert torch.equal(one[row].pixels, two[row].pixels)
            assert torch.equal(one[row].labels.nan_to_num(9), two[row].labels.nan_to_num(9))
            assert one[row].seed == two[row].seed
    assert np.array_equal(one.thumbnails(), two.thumbnails())
    assert np.array_equal(one.picture(0, 0), two.picture(0, 0))
    assert torch.equal(one.still([1])[0].pixels, two.still([1])[0].pixels)


def test_sixteen_bits_stay_sixteen(sets: Path) -> None:
    studies = load_studies(spec_of("parquet", sets / "png16-parquet"))
    assert studies.reader is not None
    data = studies.reader.open(studies.splits["train"][0]["images"][0])
    assert isinstance(data, bytes)
    levels = np.unique(read_image(data))
    assert len(levels) > 256


def test_names_say_where_an_image_lies(sets: Path) -> None:
    images = load_studies(spec_of("parquet", sets / "png8-parquet")).splits["train"][0]["images"]
    assert images[0] == "shard-00000.parquet#0"
    images = load_studies(spec_of("webdataset", sets / "png8-webdataset")).splits["train"][0]["images"]
    assert images[0] == "shard-00000.tar#000000.png"


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(sets: Path, kind: str, workers: int) -> None:
    spec = spec_of(kind, sets / f"png8-{kind}", crop=0.6)
    images = images_of(load_studies(spec), spec, train=True)
    order = EpochBatches(len(images), TrainingSpec(batch_size=3), 5, 0, 1, images.locality)

    def epoch(workers: int) -> list[tuple[list[str], torch.Tensor]]:
        loader = torch.utils.data.DataLoader(
            images, batch_sampler=order, collate_fn=images.collate, num_workers=workers
        )
        return [(batch.study_ids, batch.pixels) for batch in loader]

    for (names, pixels), (others, twins) in zip(epoch(0), epoch(workers), strict=True):
        assert names == others and torch.equal(pixels, twins)


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_a_reader_travels_to_a_spawned_worker(sets: Path, kind: str) -> None:
    # As a pipeline has it: Spec.read makes classes for the parts that a spec names.
    whole = {"task": "pretrain", "data": {"reader": {"name": kind, "root": str(sets / f"png8-{kind}")}, "image_size": 32}}
    parts = {"encoder": {"name": "vit"}, "masker": {"name": "random"}, "pixel_decoder": {"name": "linear"}}
    spec = Spec.read({**whole, **parts, "training": {"steps": 1}}).data
    images = images_of(load_studies(spec), spec)
    pixels = images[0].pixels
    copied = pickle.loads(pickle.dumps(images))
    copied._cache.clear()
    assert torch.equal(copied[0].pixels, pixels)
    assert len(pickle.dumps(images.reader)) < 2000


def test_metadata_is_read_without_images(sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("images were read")

    monkeypatch.setattr(Parquet, "open", refuse)
    monkeypatch.setattr(Parquet, "_group", refuse)
    assert len(load_studies(spec_of("parquet", sets / "png8-parquet")).splits["train"]) > 10


def test_frozen_features_follow_the_shards(sets: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from medxray.encoders.adapt import as_encoder
    from medxray.encoders.frozen import compute_once

    monkeypatch.setenv("MEDXRAY_CACHE", str(tmp_path))
    encoder = as_encoder(torch.nn.Conv2d(1, 8, 16, 16), 32)
    spec = spec_of("parquet", sets / "png8-parquet")
    images = images_of(load_studies(spec), spec)
    plain = spec_of("csv", sets / "png8")
    found = compute_once(encoder, images, 4, progress=False)
    twin = compute_once(encoder, images_of(load_studies(plain), plain), 4, progress=False)
    assert torch.equal(found.tokens, twin.tokens)
    assert len(list((tmp_path / "features").iterdir())) == 2
    compute_once(encoder, images, 4, progress=False)
    assert len(list((tmp_path / "features").iterdir())) == 2
    shard = sets / "png8-parquet" / "shard-00000.parquet"
    before = shard.stat()
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    compute_once(encoder, images, 4, progress=False)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert len(list((tmp_path / "features").iterdir())) == 3


# What is in a shard


def test_several_views_a_row(tmp_path: Path) -> None:
    blob = {"bytes": png(1), "path": None}
    root = write(
        tmp_path / "list",
        {
            "study_id": ["s", "t"],
            "images": [[blob, {"bytes": png(2), "path": None}], [blob]],
            "views": [["LATERAL", "PA"], ["AP"]],
            "labels": [{"Mass": 1, "Edema": None}, {"Mass": 0, "Edema": -1}],
            "split": ["train", "train"],
        },
    )
    reader = Parquet(root)
    s, t = reader.read()
    assert s["images"] == ["a.parquet#0/1", "a.parquet#0/0"] and s["views"] == ["PA", "LL"]
    assert t["images"] == ["a.parquet#1"] and t["labels"] == {"Mass": 0, "Edema": -1}
    assert [reader.open(name) for name in s["images"]] == [png(2), png(1)]

    root = write(tmp_path / "columns", {"pa": [png(1), png(3)], "lateral": [png(2), None]})
    s, t = Parquet(root).read()
    assert s["images"] == ["a.parquet#0/0", "a.parquet#0/1"] and s["views"] == ["PA", "LL"]
    assert t["images"] == ["a.parquet#1/0"] and s["study_id"] == "a#0"
    (only, _) = Parquet(root, image="lateral", files="a.parq*").read()
    assert only["images"] == ["a.parquet#0"] and Parquet(root, image="lateral").open("a.parquet#0") == png(2)

    root = write(tmp_path / "plain", {"scans": [[png(1)], [png(2), png(3)]]})
    _, t = Parquet(root).read()
    assert t["images"] == ["a.parquet#1/0", "a.parquet#1/1"] and Parquet(root).open("a.parquet#1/1") == png(3)


def test_classes_of_the_datasets_library_become_labels(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, List
    from datasets import Image as ImageFeature

    features = Features(
        {
            "image": ImageFeature(),
            "labels": List(ClassLabel(names=["No Finding", "Edema", "Mass"])),
            "view": ClassLabel(names=["PA", "AP"]),
            "Fracture": ClassLabel(names=["0", "1"]),
        }
    )
    blob = {"bytes": png(), "path": None}
    columns = {"image": [blob] * 3, "labels": [[1, 2], [0], []], "view": [1, 0, 0], "Fracture": [1, 0, None]}
    Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / "a.parquet"))
    studies = list(Parquet(tmp_path).read())
    assert [s["labels"] for s in studies] == [
        {"No Finding": 0, "Edema": 1, "Mass": 1, "Fracture": 1},
        {"No Finding": 1, "Edema": 0, "Mass": 0, "Fracture": 0},
        {"No Finding": 0, "Edema": 0, "Mass": 0, "Fracture": None},
    ]
    assert [s["views"] for s in studies] == [["AP"], ["PA"], ["PA"]]


def test_splits_come_from_the_names_of_files_or_by_patient(tmp_path: Path) -> None:
    for name in ("train-00000-of-00001", "validation-00000-of-00001", "test-00000-of-00001"):
        write(tmp_path / "hub", {"image": [png()]}, f"{name}.parquet")
    assert sorted(s["split"] for s in Parquet(tmp_path / "hub").read()) == ["test", "train", "val"]
    write(tmp_path / "one", {"image": [png()] * 400, "patient_id": [f"p{i // 2}" for i in range(400)]})
    studies = list(Parquet(tmp_path / "one").read())
    assert {s["split"] for s in studies} == {"train", "val", "test"}
    assert all(a["split"] == b["split"] for a, b in zip(studies[::2], studies[1::2], strict=True))


def test_tar_samples(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "deep/1.frontal.png", png(1))
        add(tar, "deep/1.lateral.PNG", png(2))
        add(tar, "deep/1.json", json.dumps({"patient_id": 5, "labels": {"Mass": True}, "age": 70}).encode())
        add(tar, "deep/1.txt", "Clear – lungs.".encode())
        add(tar, "deep/1.npy", b"unknown")
        add(tar, "2.png", png(3))
        add(tar, "2.cls", b"1")
        add(tar, "3.png", png(3))
        add(tar, "3.cls", b"0\n")
    reader = WebDataset(tmp_path)
    one, two, _ = reader.read()
    assert one["images"] == ["a.tar#deep/1.frontal.png", "a.tar#deep/1.lateral.PNG"]
    assert one["views"] == ["unknown", "LL"] and one["report"] == "Clear – lungs."
    assert (one["study_id"], one["patient_id"]) == ("a#deep/1", "5")
    assert one["labels"] == {"Mass": 1, "cls": None} and two["labels"] == {"Mass": None, "cls": 1}
    assert reader.open("a.tar#deep/1.lateral.PNG") == png(2)


def test_an_index_of_a_tar_is_made_once_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medxray.data.readers import webdataset

    scans: list[Path] = []
    scan = webdataset._scan

    def counted(path: Path) -> Any:
        scans.append(path)
        return scan(path)

    monkeypatch.setattr(webdataset, "_scan", counted)

    def made(value: int) -> None:
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            add(tar, "1.png", png(value, 8 * value))

    made(1)
    for _ in range(2):
        (study,) = WebDataset(tmp_path).read()
    assert len(scans) == 1 and WebDataset(tmp_path).open(study["images"][0]) == png(1)
    made(2)
    assert WebDataset(tmp_path).open("a.tar#1.png") == png(2, 16) and len(scans) == 2
    (tmp_path / ".a.tar.index").write_bytes(b"broken")
    assert WebDataset(tmp_path).open("a.tar#1.png") == png(2, 16) and len(scans) == 3
    monkeypatch.setattr(webdataset, "_places", lambda path: [tmp_path / "a.tar" / "x", tmp_path / "own" / "x"])
    assert WebDataset(tmp_path).open("a.tar#1.png") == png(2, 16) and (tmp_path / "own" / "x").is_file()


# Order


def test_without_shards_the_order_is_what_it_was() -> None:
    batches = EpochBatches(11, TrainingSpec(batch_size=4), 5, 0, 1)
    batches.set_epoch(2)
    # Recorded: another order would change the bytes of every saved run.
    assert [[study for _, study in batch] for batch in batches] == [[5, 2, 10, 4], [9, 6, 8, 3]]


def test_order_over_shards() -> None:
    parts = np.repeat(np.arange(40), 25)[np.random.default_rng(0).permutation(1000)]
    locality = Locality(parts, window=4)

    def order(epoch: int, rank: int = 0, world: int = 1, size: int = 20) -> list[int]:
        batches = EpochBatches(1000, TrainingSpec(batch_size=size), 3, rank, world, locality)
        batches.set_epoch(epoch)
        return [study for batch in batches for _, study in batch]

    first = order(0)
    assert sorted(first) == list(range(1000)) and first == order(0) and first != order(1)
    windows = [set(parts[first[start : start + 100]]) for start in range(0, 1000, 100)]
    assert all(len(window) == 4 for window in windows) and len(set().union(*windows)) == 40
    # Mixed inside of a window, and windows of other parts in the next epoch.
    assert all(len(set(parts[first[start : start + 20]])) >= 3 for start in range(0, 1000, 20))
    assert set(parts[order(1)[:100]]) != windows[0]
    pairs = [order(0, rank, 2, 10) for rank in (0, 1)]
    both = [a for i in range(0, 500, 10) for rank in (0, 1) for a in pairs[rank][i : i + 10]]
    assert both == first


def test_row_groups_are_read_once_an_epoch(sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medxray.data.readers import parquet as module

    spec = spec_of("parquet", sets / "png8-parquet", cache_images=False)
    studies = load_studies(spec)
    sizes = []
    for shard in studies.root.glob("*.parquet"):
        footer = parquet.ParquetFile(shard).metadata
        for group in (footer.row_group(i) for i in range(footer.num_row_groups)):
            parts = [group.column(i) for i in range(group.num_columns)]
            sizes += [part.total_uncompressed_size for part in parts if part.path_in_schema == "image.bytes"]
    monkeypatch.setattr(module, "CACHE_BYTES", 3 * max(sizes))
    images = images_of(studies, spec)
    assert images.locality is not None and images.locality.window == 3
    read: list[tuple[str, int]] = []
    whole = Parquet._group

    def counted(self: Parquet, shard: str, group: int, column: str) -> Any:
        read.append((shard, group))
        return whole(self, shard, group, column)

    monkeypatch.setattr(Parquet, "_group", counted)
    for batch in EpochBatches(len(images), TrainingSpec(batch_size=1), 0, 0, 1, images.locality):
        for key in batch:
            images[key]
    # A study's second view may lie in the next group.
    assert len(set(read)) <= len(read) <= 2 * len(set(read))


# What can be wrong


def test_wrong_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no folder .*missing; expected the data set's folder"):
        list(Parquet(tmp_path / "missing").read())
    with pytest.raises(DataError, match=r"no file matches '\*\*/\*\.parquet' .*holds nothing.*data\.reader\.files"):
        list(Parquet(tmp_path).read())
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(b"x"))
    with pytest.raises(DataError, match=r"a\.tar\.gz.*compressed.*gunzip"):
        list(WebDataset(tmp_path).read())
    (tmp_path / "b.tar").write_bytes(gzip.compress(b"x"))
    with pytest.raises(DataError, match=r"b\.tar: compressed.*gunzip"):
        list(WebDataset(tmp_path).read())


def test_wrong_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no, not really")
    with pytest.raises(DataError, match=r"a\.parquet: not a Parquet file, or damaged.*fetch it again"):
        list(Parquet(tmp_path).read())
    write(tmp_path, {"image": [png()], "study_id": ["s"]})
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"a\.parquet: not a Parquet file, or damaged"):
        list(Parquet(tmp_path).read())
    write(tmp_path, {"note": ["x"], "value": [1.5]})
    with pytest.raises(DataError, match=r"no column of images.*note: string, value: double.*data\.reader\.image"):
        list(Parquet(tmp_path).read())
    write(tmp_path, {"image": [png()], "value": [1.5]})
    with pytest.raises(DataError, match=r"no column 'imag'; did you mean 'image'\?"):
        list(Parquet(tmp_path, image="imag").read())
    with pytest.raises(DataError, match=r"column 'value' holds double.*expected bytes"):
        list(Parquet(tmp_path, image="value").read())
    with pytest.raises(DataError, match=r"no column 'exam'"):
        list(Parquet(tmp_path, study="exam").read())
    write(tmp_path, {"image": [png()] * 2, "study_id": ["s", "s"], "report": ["a", "b"]})
    with pytest.raises(DataError, match=r"a\.parquet#1: study 's' has report 'b', but 'a' on a\.parquet#0"):
        list(Parquet(tmp_path).read())


def test_paths_in_place_of_bytes(tmp_path: Path) -> None:
    root = write(tmp_path, {"image": [{"bytes": arrow.scalar(None, arrow.binary()), "path": "x.png"}] * 2})
    with pytest.raises(DataError, match=r"a\.parquet: column 'image' has no bytes in any row.*embed_table_storage"):
        list(Parquet(root).read())


def test_a_null_image(tmp_path: Path) -> None:
    blob = {"bytes": png(), "path": None}
    for i, nothing in enumerate((None, {"bytes": None, "path": "x.png"})):
        root = write(tmp_path / str(i), {"image": [blob, nothing, blob], "split": ["train"] * 3})
        with pytest.raises(DataError, match=r"1 of 3 images are missing: 'a\.parquet#1'"):
            load_studies(spec_of("parquet", root))
        studies = load_studies(spec_of("parquet", root, on_error="skip"))
        assert len(studies.splits["train"]) == 2
        assert "a.parquet#1: no bytes" in studies.skipped[0]["reason"]


def test_a_damaged_image_names_shard_and_row(tmp_path: Path) -> None:
    root = write(tmp_path / "p", {"image": [png(), png(7, 64)[:-30], b"", b"text"], "split": ["train"] * 4})
    spec = spec_of("parquet", root)
    images = images_of(load_studies(spec), spec)
    for row, word in ((1, "damaged or truncated"), (2, "empty"), (3, "not an image")):
        with pytest.raises(ImageError, match=rf"p/a\.parquet#{row}: {word}"):
            images[row]
    assert len(load_studies(spec_of("parquet", root, on_error="skip")).skipped) == 6
    # Bytes that decay inside of a row group.
    noise = [np.random.default_rng(i).bytes(20_000) for i in range(4)]
    root = write(tmp_path / "q", {"image": noise, "split": ["train"] * 4}, row_group_size=2, compression="zstd")
    path = root / "a.parquet"
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(bytes(data))
    spec = spec_of("parquet", root)
    with pytest.raises(ImageError, match=r"q/a\.parquet#0: .*row group 0.*damaged"):
        images_of(load_studies(spec), spec)[0]


def test_wrong_tar(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"no tar at all" * 100)
    with pytest.raises(DataError, match=r"a\.tar: not a tar archive.*"):
        list(WebDataset(tmp_path).read())
    with tarfile.open(path, "w") as tar:
        for i in range(4):
            add(tar, f"{i}.png", png(i, 64))
    whole = path.read_bytes()
    member = 512 + -(-len(png(0, 64)) // 512) * 512
    for end in (2 * member - 100, 2 * member, 2 * member + 100):
        path.write_bytes(whole[:end])
        with pytest.raises(DataError, match=r"a\.tar: truncated.*fetch it again"):
            list(WebDataset(tmp_path).read())
    path.write_bytes(whole[: 2 * member] + b"x" * 512 + whole[2 * member + 512 :])
    with pytest.raises(DataError, match=rf"a\.tar: damaged at byte {2 * member}"):
        list(WebDataset(tmp_path).read())
    with tarfile.open(path, "w") as tar:
        add(tar, "1.png", png())
        add(tar, "1.json", b"{")
    with pytest.raises(DataError, match=r"a\.tar#1\.json: not JSON"):
        list(WebDataset(tmp_path).read())
    with tarfile.open(path, "w") as tar:
        add(tar, "1.png", png())
        add(tar, "1.json", b'{"split": "train"}')
        add(tar, "2.json", b'{"split": "train"}')
    with pytest.raises(DataError, match=r"1 of 2 images are missing: 'a\.tar#2'"):
        load_studies(spec_of("webdataset", tmp_path))
    assert len(load_studies(spec_of("webdataset", tmp_path, on_error="skip")).splits["train"]) == 1
    with pytest.raises(ImageError, match=r"a\.tar#9\.png: no such member"):
        WebDataset(tmp_path).open("a.tar#9.png")


# Reduced size


@pytest.mark.parametrize("suffix", ["jpg", "jp2"])
@pytest.mark.parametrize(
    ("needed", "found"), [((100, 100), (100, 150)), ((101, 90), (200, 300)), ((64, 64), (100, 150)), ((50, 40), (50, 75))]
)
def test_reduced_decoding_is_close_and_never_too_small(
    tmp_path: Path, suffix: str, needed: tuple[int, int], found: tuple[int, int]
) -> None:
    from medxray.data import resize

    y, x = np.mgrid[:400, :600]
    smooth = np.uint8(127 + 60 * np.sin(y / 23) * np.cos(x / 31) + 40 * np.sin((x + y) / 57))
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(smooth).save(path, **({"quality": 95} if suffix == "jpg" else {"irreversible": False}))
    full, reduced = read_image(path), read_image(path, at_least=needed)
    assert full.shape == (1, 400, 600) and reduced.shape == (1, *found)
    error = (resize(full, needed) - resize(reduced, needed)).abs()
    # The smaller image of JPEG 2000 lies half a pixel to the upper left.
    assert error.mean() < (0.004 if suffix == "jpg" else 0.025) and error.max() < (0.02 if suffix == "jpg" else 0.1)
    assert np.array_equal(read_image(path.read_bytes(), at_least=needed), reduced)


def test_reduced_decoding_of_a_turned_image_and_of_other_formats(tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(400 * 200, dtype=np.uint32).astype(np.uint8).reshape(400, 200))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    # Stored 400 x 200, shown 200 x 400.
    assert read_image(tmp_path / "a.jpg", at_least=(100, 200)).shape == (1, 100, 200)
    assert read_image(tmp_path / "a.jpg", at_least=(200, 100)).shape == (1, 200, 400)
    image.save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", at_least=(10, 10)).shape == (1, 400, 200)
    # Fewer resolutions in the file than would be wanted.
    image.save(tmp_path / "a.jp2", num_resolutions=2)
    assert read_image(tmp_path / "a.jp2", at_least=(25, 25)).shape[1] >= 25


def test_a_spec_asks_for_reduced_decoding(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (256, 256)).astype(np.uint8)).save(tmp_path / "a.jpg")
    (tmp_path / "studies.csv").write_text("path,study_id,split\na.jpg,s,train\n")
    sizes = {}
    for decode, crop in (("full", 1.0), ("reduced", 1.0), ("reduced", 0.5), ("reduced", 0.2)):
        spec = spec_of("csv", tmp_path, decode=decode, crop=crop, image_size=64)
        images = images_of(load_studies(spec), spec, train=True)
        assert images[(0, 0)].pixels.shape == (1, 1, 64, 64)
        sizes[decode, crop] = images.read("a.jpg", images.needed).shape[1]
    # 64 / sqrt(.5) = 91 and 64 / sqrt(.2) = 144 are needed for a sharp crop.
    assert sizes == {("full", 1.0): 256, ("reduced", 1.0): 64, ("reduced", 0.5): 128, ("reduced", 0.2): 256}


def test_bytes_are_images(tmp_path: Path) -> None:
    from medxray.data import to_image

    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    for suffix in ("png", "tif"):
        Image.fromarray(deep).save(tmp_path / f"a.{suffix}")
        data = (tmp_path / f"a.{suffix}").read_bytes()
        assert np.array_equal(read_image(data), read_image(tmp_path / f"a.{suffix}"))
        assert np.array_equal(to_image(data), read_image(data))
    with pytest.raises(ImageError, match=r"^x#3: not an image"):
        read_image(b"text", name="x#3")
