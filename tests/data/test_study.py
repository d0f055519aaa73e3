import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from medxray.data import FEATURES, StudyImages, collate, features_of, load_studies, seed_of, study_from
from medxray.data.readers import READERS
from medxray.spec import DataSpec
from medxray.types import DataError, ImageError


def data_spec(root: Path, reader: dict[str, Any] | None = None, **settings: Any) -> DataSpec:
    settings = {"image_size": 16, **settings}
    settings_of = READERS.settings_of("csv")
    return DataSpec(reader=settings_of(name="csv", root=str(root), **(reader or {})), **settings)


def write_studies(root: Path, n: int = 10, views: int = 2, side: int = 20) -> Path:
    """n studies, the last but one val, the last test; images of random noise, the first study's one view."""
    rng = np.random.default_rng(0)
    lines = ["path,study_id,patient_id,view,report,split,Mass"]
    for i in range(n):
        split = "test" if i == n - 1 else "val" if i == n - 2 else "train"
        for v in range(views if i else 1):
            name = f"s{i}_{v}.png"
            Image.fromarray(rng.integers(0, 256, (side, side), np.uint8)).save(root / name)
            lines.append(f"{name},s{i},p{i},{('PA', 'LL')[v % 2]},Report number {i}.,{split},{i % 2}")
    (root / "studies.csv").write_text("\n".join(lines) + "\n")
    return root


def images_of(root: Path, spec: DataSpec, split: str = "train", **settings: Any) -> StudyImages:
    studies = load_studies(spec)
    settings = {"channels": 1, "mean": (0.5,), "std": (0.25,), "seed": 7, "train": True, **settings}
    return StudyImages(studies.splits[split], root, spec, labels=studies.labels, max_views=studies.views, **settings)


def test_load_studies(tmp_path: Path) -> None:
    studies = load_studies(data_spec(write_studies(tmp_path)))
    assert {split: rows["study_id"][:] for split, rows in studies.splits.items()} == {
        "train": [f"s{i}" for i in range(8)],
        "val": ["s8"],
        "test": ["s9"],
    }
    assert studies.labels == ["Mass"] and studies.views == 2 and studies.skipped == []
    row = studies.splits["train"][1]
    assert set(row) == set(FEATURES)
    assert row["report"] == "report number 1 ." and row["labels"] == {"Mass": 1}
    assert studies.splits["train"].features == features_of(["Mass"])
    assert all(not rows.cache_files for rows in studies.splits.values())


def test_settings_of_the_spec(tmp_path: Path) -> None:
    write_studies(tmp_path)
    few = load_studies(data_spec(tmp_path, max_studies=3, cleaning="none", labels=[], views="single"))
    assert few.splits["train"]["study_id"][:] == ["s0", "s1", "s2"] and len(few.splits["val"]) == 1
    assert few.splits["train"][0]["report"] == "Report number 0."
    assert few.labels == [] and few.splits["train"][0]["labels"] == {}
    assert few.views == 1


def test_require(tmp_path: Path) -> None:
    studies = load_studies(data_spec(write_studies(tmp_path)))
    studies.require("train", "val", "test")
    studies.splits["test"] = studies.splits["test"].select([])
    with pytest.raises(DataError, match=r"split 'test' has no study \(found: train 8, val 1, test 0\)"):
        studies.require("val", "test")


def test_skip_leaves_out_and_lists(tmp_path: Path) -> None:
    write_studies(tmp_path)
    (tmp_path / "s1_1.png").write_bytes(b"")
    (tmp_path / "s2_0.png").unlink()
    (tmp_path / "s2_1.png").write_text("no image")
    text = (tmp_path / "studies.csv").read_text().replace("Report number 3.", " .")
    (tmp_path / "studies.csv").write_text(text)
    studies = load_studies(data_spec(tmp_path, on_error="skip"))
    rows = studies.splits["train"]
    assert rows["study_id"][:] == ["s0", "s1", "s4", "s5", "s6", "s7"]
    assert rows[1]["images"] == ["s1_0.png"] and rows[1]["views"] == ["PA"]
    listed = [(entry["study"], entry["file"]) for entry in studies.skipped]
    assert listed == [("s3", ""), ("s1", "s1_1.png"), ("s2", "s2_0.png"), ("s2", "s2_1.png"), ("s2", "")]
    reasons = " | ".join(entry["reason"] for entry in studies.skipped)
    for words in ("empty after cleaning", "empty (0 bytes)", "no such file", "not an image", "no readable image"):
        assert words in reasons


def test_data_sets_without_reports(tmp_path: Path) -> None:
    write_studies(tmp_path)
    spec = data_spec(tmp_path, {"report": None})
    assert set(load_studies(spec).splits["train"]["report"][:]) == {""}
    with pytest.raises(DataError, match="study 's0': report is empty after cleaning"):
        load_studies(spec, reports=True)


def test_four_thousand_studies_open_quickly(tmp_path: Path) -> None:
    (tmp_path / "x.png").touch()
    lines = ["path,study_id,patient_id,view,report,Mass,Edema"]
    for i in range(4000):
        for v in range(2):
            image = tmp_path / f"{i}_{v}.png"
            image.symlink_to("x.png") if i < 10 else image.touch()
            lines.append(f"{i}_{v}.png,s{i},p{i // 2},{'PA' if v else 'LL'},The lungs are clear. {i}.,1,")
    (tmp_path / "studies.csv").write_text("\n".join(lines))
    start = time.process_time()
    studies = load_studies(data_spec(tmp_path))
    assert time.process_time() - start < 2
    assert sum(len(rows) for rows in studies.splits.values()) == 4000


# Samples


def test_samples(tmp_path: Path) -> None:
    images = images_of(tmp_path, data_spec(write_studies(tmp_path)), channels=3)
    sample = images[1]
    assert sample.pixels.shape == (2, 3, 16, 16) and sample.pixels.dtype == torch.float32
    assert sample.pixels[:, 0].equal(sample.pixels[:, 2])
    assert sample.report == "report number 1 ." and sample.study_id == "s1" and sample.patient_id == "p1"
    assert sample.labels.tolist() == [1.0]
    batch = images.collate([images[0], sample])
    assert batch.pixels.shape == (2, 2, 3, 16, 16) and batch.seeds.dtype == torch.int64
    assert batch.view_mask.tolist() == [[True, False], [True, True]]
    assert batch.pixels[0, 1].count_nonzero() == 0 and batch.pixels[1].equal(sample.pixels)
    assert batch.labels.tolist() == [[0.0], [1.0]] and batch.study_ids == ["s0", "s1"]


def test_normalisation(tmp_path: Path) -> None:
    spec = data_spec(write_studies(tmp_path, side=16))
    gray = torch.from_numpy(np.asarray(Image.open(tmp_path / "s0_0.png")).astype(np.float32)) / 255
    sample = images_of(tmp_path, spec, channels=3, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0))[0]
    for c, (mean, std) in enumerate(((0.1, 1), (0.2, 2), (0.3, 4))):
        torch.testing.assert_close(sample.pixels[0, c], (gray - mean) / std)


def test_single_reads_the_frontal_view_only(tmp_path: Path) -> None:
    write_studies(tmp_path)
    (tmp_path / "s1_1.png").write_bytes(b"never read")
    assert images_of(tmp_path, data_spec(tmp_path, views="single"))[1].pixels.shape[0] == 1


@pytest.mark.parametrize("crop", [1.0, 0.5])
def test_cached_and_uncached_reads_are_equal(tmp_path: Path, crop: float) -> None:
    write_studies(tmp_path)
    cached, plain = (images_of(tmp_path, data_spec(tmp_path, cache_images=keep, crop=crop)) for keep in (True, False))
    first = [cached[i].pixels for i in range(4)]
    for file in tmp_path.glob("*.png"):
        file.rename(file.with_suffix(".gone"))
    again = [cached[i].pixels for i in range(4)]
    with pytest.raises(ImageError, match=r"s0_0.png: no such file"):
        plain[0]
    for file in tmp_path.glob("*.gone"):
        file.rename(file.with_suffix(".png"))
    for a, b, c in zip(first, again, (plain[i].pixels for i in range(4)), strict=True):
        assert a.equal(b) and a.equal(c)


def test_crops_and_seeds_follow_epoch_and_row(tmp_path: Path) -> None:
    write_studies(tmp_path)
    images = images_of(tmp_path, data_spec(tmp_path, crop=0.5))
    first, later = images[(0, 1)], images[(1, 1)]
    assert first.seed == images[1].seed == seed_of(7, 0, 1) and later.seed == seed_of(7, 1, 1)
    assert not first.pixels.equal(later.pixels) and first.pixels.equal(images[(0, 1)].pixels)
    other = images_of(tmp_path, data_spec(tmp_path, crop=0.5), seed=8)
    assert not other[1].pixels.equal(first.pixels)
    still = images_of(tmp_path, data_spec(tmp_path, crop=0.5), train=False)
    assert still[(0, 1)].seed == still[(1, 1)].seed == seed_of(7, "s1")
    assert still[(0, 1)].pixels.equal(still[(1, 1)].pixels)


def test_crops_of_one_size(tmp_path: Path) -> None:
    """An image of 10 x 10 with columns 0 to 9: 8 of 10 columns, beginning anywhere."""
    write_studies(tmp_path)
    columns = np.tile(np.arange(10, dtype=np.uint8) * 25, (10, 1))
    Image.fromarray(columns).save(tmp_path / "s1_0.png")
    spec = data_spec(tmp_path, image_size=8, crop_from=10)
    images, still = images_of(tmp_path, spec), images_of(tmp_path, spec, train=False)
    starts = set()
    for epoch in range(20):
        shown = ((images[(epoch, 1)].pixels[0, 0, 0] * 0.25 + 0.5) * 255 / 25).round().int().tolist()
        assert shown == list(range(shown[0], shown[0] + 8)), "neither another size nor mirrored"
        starts.add(shown[0])
    assert starts == {0, 1, 2}
    assert still[1].pixels.equal(still[(5, 1)].pixels)
    for wrong in ({"crop": 0.5, "crop_from": 256}, {"crop_from": 100}):
        with pytest.raises(ValueError, match=r"crop_from must be at least image_size \(224\)"):
            data_spec(tmp_path, **{"image_size": 224, **wrong})


def test_views_of_a_study_are_cropped_alike(tmp_path: Path) -> None:
    write_studies(tmp_path)
    for study in range(1, 8):
        (tmp_path / f"s{study}_1.png").write_bytes((tmp_path / f"s{study}_0.png").read_bytes())
    sample = images_of(tmp_path, data_spec(tmp_path, crop=0.4))[3]
    assert sample.pixels[0].equal(sample.pixels[1])


def test_missing_labels_are_nan(tmp_path: Path) -> None:
    write_studies(tmp_path)
    rows = (tmp_path / "studies.csv").read_text().splitlines()
    (tmp_path / "studies.csv").write_text("\n".join([rows[0], rows[1][:-1], *rows[2:]]))
    assert math.isnan(images_of(tmp_path, data_spec(tmp_path))[0].labels.item())


def test_seed_of_is_the_same_everywhere() -> None:
    # Recorded values: a change alters every run's crops and splits.
    assert seed_of(42, 0, 0) == 3146835939665538804 and seed_of("42", "0", 0) == seed_of(42, 0, 0)
    assert seed_of(4, 20, 0) != seed_of(42, 0, 0)
    assert all(0 <= seed_of(i) < 2**63 for i in range(100))


# What predict is given

OPTIONS: dict[str, Any] = {"channels": 1, "mean": (0.5,), "std": (0.5,), "max_views": 2, "seed": 3}


def test_every_way_to_give_one_image_agrees(tmp_path: Path) -> None:
    spec = data_spec(write_studies(tmp_path))
    path = tmp_path / "s0_0.png"
    array = np.asarray(Image.open(path))
    expected = images_of(tmp_path, spec, train=False, mean=(0.5,), std=(0.5,))[0].pixels
    values = [path, str(path), array, Image.open(path), torch.from_numpy(array.copy()), [path], (array,)]
    for value in [*values, {"images": path}, {"images": [array]}]:
        sample = study_from(value, spec, **OPTIONS)
        assert sample.pixels.equal(expected)
        assert sample.report == "" and sample.labels.numel() == 0


def test_a_study_of_several_views(tmp_path: Path) -> None:
    spec = data_spec(write_studies(tmp_path))
    paths = [tmp_path / f"s{i}_0.png" for i in range(3)]
    sample = study_from(paths, spec, **OPTIONS, labels=["Mass", "Edema"])
    assert sample.pixels.shape == (2, 1, 16, 16) and sample.study_id == "s0_0"
    assert sample.labels.isnan().tolist() == [True, True] and sample.seed == seed_of(3, "s0_0")
    named = study_from({"images": paths[:1], "study_id": "x", "patient_id": "p"}, spec, **OPTIONS)
    assert (named.study_id, named.patient_id) == ("x", "p")
    batch = collate([sample, study_from(paths[0], spec, **OPTIONS, labels=["Mass", "Edema"])], 2)
    assert batch.view_mask.tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "a study without images; expected a file, array or PIL image"),
        ({"files": []}, "needs 'images'; found files"),
        ([["a.png"]], "found list; a study is one list of images"),
        (7, "expected a path, array, tensor or PIL image, found int"),
        ("nowhere.png", "nowhere.png: no such file"),
    ],
)
def test_what_is_no_study(tmp_path: Path, value: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        study_from(value, data_spec(tmp_path), **OPTIONS)


def test_features_describe_a_study() -> None:
    row = {key: "" for key in FEATURES} | {"images": ["a"], "views": ["PA"], "labels": {"Mass": None}, "burned_in": None}
    rows = Dataset.from_list([row], features=features_of(["Mass"]))
    assert rows[0] == row


def test_attributes_of_the_studies(tmp_path: Path) -> None:
    lines = ["path,study_id,view,split,sex,age"]
    rows = [("a", "LL", "F", "20"), ("a", "PA", "F", "20"), ("b", "AP", "M", ""), ("c", "", "", "70"), ("d", "PA", "M", "70")]
    for i, (study, view, sex, age) in enumerate(rows):
        Image.new("L", (20, 20)).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,{study},{view},train,{sex},{age}")
    (tmp_path / "studies.csv").write_text("\n".join(lines))
    images = images_of(tmp_path, data_spec(tmp_path))
    assert images.attributes == {
        "sex": ["female", "male", "", "male"],
        "age": ["18-39", "", "65-79", "65-79"],
        "view": ["PA+LL", "AP", "", "PA"],
        "manufacturer": [""] * 4,
    }
    assert images.still([3, 0]).attributes["sex"] == ["male", "female"]
    assert images.still([3, 0]).attributes["view"] == ["PA", "PA+LL"]
    single = images_of(tmp_path, data_spec(tmp_path, views="single"))
    assert single.attributes["view"] == ["PA", "AP", "", "PA"], "views that nobody looks at tell nothing"


def test_a_notebook_shows_the_splits(tmp_path: Path) -> None:
    studies = load_studies(data_spec(write_studies(tmp_path)))
    assert repr(studies) == f"Studies({tmp_path}: train 8, val 1, test 1; 1 labels)"
    rows = [re.findall(r"<t[hd][^>]*>([^<]*)<", row) for row in studies._repr_html_().split("<tr>")[1:]]
    assert rows == [
        ["", "train", "val", "test"], ["studies", "8", "1", "1"], ["patients", "8", "1", "1"], ["images", "15", "2", "2"],
        ["Mass", "50%", "0%", "100%"],
    ]  # fmt: skip
