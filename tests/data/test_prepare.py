"""Prepared shards: the pixels and texts of their source, the same bytes however they were made."""

import contextlib
import csv
import errno
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from typer.testing import CliRunner

import medxray
from medxray.cli import app
from medxray.data import StudyImages, load_studies, prepare, read_image, resize
from medxray.data.phantom import draw_study, generate
from medxray.data.prepare import data_of, encode_png, verify_shards, write_shards
from medxray.data.readers import READERS
from medxray.data.readers.parquet import MANIFEST, WORK, Parquet
from medxray.data.study import Studies
from medxray.pretrain import SEGMENTERS
from medxray.pretrain.regions import Contours
from medxray.spec import DataSpec
from medxray.types import DataError, ImageError, Study

SIZE, SHARD = 40, 6


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 studies of DICOM files with a table."""
    return generate(tmp_path_factory.mktemp("source") / "data", studies=36, size=64, seed=5, format="dicom", progress=False)


@pytest.fixture(scope="module")
def unbroken(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("unbroken") / "out"
    write(source, out)
    return out


def block(root: Path, *settings: str) -> DataSpec:
    return data_of("csv", [f"reader.root={root}", f"image_size={SIZE}", *settings])[0].data


def write(root: Path, out: Path, *settings: str, **more: Any) -> dict[str, Any]:
    return write_shards(block(root, *settings), out, **{"studies": SHARD, "workers": 1, **more})


def sums(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())}


def contours() -> Any:
    return Contours(SEGMENTERS.settings_of("classical")(name="classical"))  # type: ignore[arg-type]


def studies_of(reader: str, root: Path) -> Studies:
    spec = data_of(reader, [f"reader.root={root}", "cleaning=none"])[0]
    return load_studies(spec.data, reports=False)


def rows_of(found: Studies) -> list[Study]:
    return [row for rows in found.splits.values() for row in rows]


# What is in them


@pytest.mark.parametrize("format", ["png8", "png16", "dicom"])
@pytest.mark.parametrize("size, fit", [("40", "stretch"), ("[48, 32]", "pad"), ("full", "stretch")])
def test_shards_hold_the_pixels_of_their_source_to_half_a_level(
    format: Any, size: str, fit: str, tmp_path: Path
) -> None:
    root = generate(tmp_path / "data", studies=4, size=56, seed=8, format=format, progress=False)
    if format == "png16":
        for path in list(root.glob("images/*"))[::2]:
            # dark all over: the brightest pixel does not tell where white is
            Image.fromarray(np.asarray(Image.open(path)) // 5).save(path)
    settings = ["fit=" + fit, *([] if size == "full" else [f"image_size={size}"])]
    write(root, tmp_path / "out", *settings, full=size == "full")
    before, after = studies_of("csv", root), studies_of("parquet", tmp_path / "out")
    levels = 255 if format == "png8" else 65535
    n = 0
    for old, new in zip(rows_of(before), rows_of(after), strict=True):
        for name, stored in zip(old["images"], new["images"], strict=True):
            pixels = torch.from_numpy(read_image(root / name))
            if size != "full":
                pixels = resize(pixels, 40 if size == "40" else (48, 32), fit)  # type: ignore[arg-type]
            found = after.reader.open(stored)
            assert isinstance(found, bytes) and (b"White" in found) == (levels == 65535)
            again = read_image(found)
            assert again.shape == tuple(pixels.shape)
            assert np.abs(again - pixels.numpy()).max() <= 0.5 / levels + 1e-7
            n += 1
    assert n == len(list(root.glob("images/*")))


@pytest.mark.parametrize("bits, mode", [("auto", "I;16"), ("8", "L"), ("16", "I;16")])
def test_bits_of_a_pixel(bits: Any, mode: str, source: Path, tmp_path: Path) -> None:
    write(source, tmp_path / "out", "max_studies=1", bits=bits)
    reader = Parquet(tmp_path / "out")
    image = next(iter(reader.read()))["images"][0]
    opened = reader.open(image)
    assert isinstance(opened, bytes)
    assert Image.open(io.BytesIO(opened)).mode == mode


def test_shards_hold_every_text_name_label_and_view(source: Path, tmp_path: Path) -> None:
    table = (source / "studies.csv").read_text().splitlines()
    copy = tmp_path / "data"
    shutil.copytree(source, copy)
    # a label that nobody is known to have or to lack, and one that most do not tell
    first = table[1].split(",")[1]
    more = [f",,{'1' if line.split(',')[1] == first else ''},before" for line in table[1:]]
    lines = [table[0] + ",Unseen,Rare,prior", *(line + end for line, end in zip(table[1:], more, strict=True))]
    (copy / "studies.csv").write_text("\n".join(lines) + "\n")
    settings = ["reader.label_columns=[Cardiomegaly, Unseen, Rare]"]
    write(copy, tmp_path / "out", *settings)
    data = block(copy, "cleaning=none", *settings)
    before, after = load_studies(data, reports=False), studies_of("parquet", tmp_path / "out")
    assert after.labels == before.labels == ["Cardiomegaly", "Unseen", "Rare"]
    assert [split for split, rows in after.splits.items() for _ in rows] == [s["split"] for s in rows_of(before)]
    for old, new in zip(rows_of(before), rows_of(after), strict=True):
        assert {k: v for k, v in old.items() if k != "images"} == {k: v for k, v in new.items() if k != "images"}
        assert old["prior"] == "before" and old["indication"] and old["sex"] and old["age_band"]
        assert len(old["images"]) == len(new["images"])
    reader = next(iter(Parquet(tmp_path / "out").read()))
    assert set(reader) >= set(before.splits["train"].column_names)


@pytest.mark.parametrize("labels", [True, False])
def test_burned_in_is_kept_and_is_no_label(labels: bool, source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The table's reader does not tell it, so that one that does stands in."""
    told = [1, 0, None]

    @READERS.register("telling", replace=True)
    class Telling(READERS.get("csv")):  # type: ignore[misc]
        """The same, with burned_in."""

        def read(self) -> list[Study]:
            found = list(super().read())
            for i, study in enumerate(found):
                study["burned_in"] = told[i % 3]
                study["labels"] = study["labels"] if labels else {}
            return found

    data = data_of("telling", [f"reader.root={source}", f"image_size={SIZE}"])[0].data
    write_shards(data, tmp_path / "out", studies=SHARD, workers=1)
    after = studies_of("parquet", tmp_path / "out")
    assert bool(after.labels) == labels and "burned_in" not in after.labels
    by_name = {study["study_id"]: study["burned_in"] for study in rows_of(after)}
    expected = {study["study_id"]: study["burned_in"] for study in Telling(source).read()}
    assert by_name == expected and set(by_name.values()) == {1, 0, None}


def test_masks_lie_beside_their_images(tmp_path: Path) -> None:
    root = generate(tmp_path / "data", studies=3, size=128, seed=8, progress=False)
    finder = contours()
    found = write(root, tmp_path / "out", "fit=pad", "image_size=[64, 32]", masks=finder)
    assert found["settings"]["masks"]["segmenter"]["name"] == "classical" and found["masks"] > 3
    before, after = studies_of("csv", root), studies_of("parquet", tmp_path / "out")
    known = 0
    for old, new in zip(rows_of(before), rows_of(after), strict=True):
        for name, stored, view in zip(old["images"], new["images"], old["views"], strict=True):
            region = finder.segmenter(read_image(root / name)[0], view)
            mask = after.reader.mask(stored)
            assert (mask is None) == (region.source != "computed")
            if mask is not None:
                assert mask.shape == (64, 64)
                # a square image in an upright frame of half the width: the upper and lower quarter are padding
                assert not mask[:16].any() and not mask[48:].any()
                whole = torch.from_numpy(region.mask.astype(np.float32))[None, None]
                inner = torch.nn.functional.adaptive_avg_pool2d(whole, (32, 64))[0, 0].numpy()
                assert np.abs(mask[16:48] - inner).max() <= 0.5 / 255 + 1e-6
                known += 1
    assert known == found["masks"]


def test_pretraining_takes_masks_from_shards(tmp_path: Path) -> None:
    root = generate(tmp_path / "data", studies=24, size=96, seed=8, progress=False)

    class Corner:
        method: ClassVar[dict[str, Any]] = {"name": "corner"}

        def mask(self, pixels: Any, view: str, root: Path, image: str) -> Any:
            mask = np.zeros((4, 4), bool)
            mask[:2, :2] = True
            return mask

    found = write(root, tmp_path / "out", masks=Corner())
    studies = studies_of("parquet", tmp_path / "out")
    spec = block(tmp_path / "out")
    images = StudyImages(
        studies.splits["train"], studies.root, spec, channels=1, mean=(0.0,), std=(1.0,), labels=[], seed=0, train=False,
        max_views=2, reader=studies.reader,
    )  # fmt: skip
    # Its segmenter would fail: nobody is to ask it.
    regions = Contours(SEGMENTERS.settings_of("classical")(name="classical"), SimpleNamespace(version=1)).of(images)  # type: ignore[arg-type]
    assert regions.counts == {"stored": found["splits"]["train"]["images"]}
    for name in regions:
        assert regions[name][:32, :32].min() == 1 and regions[name].sum() == 32 * 32


def test_a_spec_fits_on_shards(unbroken: Path, tmp_path: Path) -> None:
    pipeline = medxray.build(
        "classify-phantom",
        [
            "data.reader.name=parquet", f"data.reader.root={unbroken}", f"data.image_size={SIZE}", "encoder.patch=8",
            "training.steps=3", "training.batch_size=4", f"output={tmp_path}/run",
            "data.labels=[Cardiomegaly]",
        ],
    ).fit(progress=False)  # fmt: skip
    assert len(pipeline.evaluate(ablations=False, progress=False))


def test_the_datasets_library_reads_shards(unbroken: Path) -> None:
    import datasets

    files = [str(path) for path in sorted(unbroken.glob("train-*"))]
    rows = datasets.Dataset.from_parquet(files, cache_dir=str(unbroken.parent / "cache"))
    assert rows[0]["images"][0].size == (SIZE, SIZE)
    assert set(rows.features["labels"]) > {"Cardiomegaly"} and rows.features["views"].feature.dtype == "string"


def test_row_groups_are_small_and_read_one_at_a_time(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(prepare, "GROUP_BYTES", 8000)
    write(source, tmp_path / "out")
    reader = Parquet(tmp_path / "out")
    images = [image for study in reader.read() for image in study["images"]]
    locality = reader.locality(images)
    groups = sum(parquet.ParquetFile(path).num_row_groups for path in (tmp_path / "out").glob("*.parquet"))
    assert locality is not None and len(set(locality.parts.tolist())) == groups > 10
    assert locality.window > 100
    for path in (tmp_path / "out").glob("*.parquet"):
        file = parquet.ParquetFile(path)
        for group in range(file.num_row_groups):
            columns = [file.metadata.row_group(group).column(i) for i in range(file.metadata.num_columns)]
            images_only = [c for c in columns if c.path_in_schema == "images.list.element.bytes"]
            assert images_only[0].compression == "UNCOMPRESSED" and not images_only[0].is_stats_set


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (33, 20), (64, 64)])
def test_png_is_exact(kind: Any, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    for levels in (
        rng.integers(0, np.iinfo(kind).max, shape, endpoint=True),
        np.broadcast_to(np.arange(shape[1]) * 7, shape),
        np.zeros(shape),
        np.full(shape, np.iinfo(kind).max),
    ):
        levels = levels.astype(kind)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(levels)))), levels)


def test_png_is_smaller_than_a_general_encoder_makes_it() -> None:
    levels = draw_study(0, 0, 256).images[0].astype(np.uint16) * 16
    general = io.BytesIO()
    Image.fromarray(levels).save(general, "PNG", compress_level=1)
    assert len(encode_png(levels)) < len(general.getvalue())


def test_a_depth_that_is_none_is_refused(source: Path, tmp_path: Path) -> None:
    spec, _ = data_of("csv", [f"reader.root={source}", f"image_size={SIZE}"])
    with pytest.raises(DataError, match=r"bits: expected 'auto', '8', '16', found 16"):
        write_shards(spec.data, tmp_path / "out", bits=16)  # type: ignore[arg-type]


# Privacy


@pytest.mark.parametrize("reader", ["csv", "dicom-folder"])
def test_nothing_of_a_dicom_header_reaches_a_shard(reader: str, source: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(source, root)
    planted = {
        "PatientName": "Quixote^Alonso", "PatientBirthDate": "15470929", "StudyDate": "16050116", "InstitutionName": "La Mancha",
        "AccessionNumber": "ACC7719", "PatientComments": "rides a horse", "ReferringPhysicianName": "Panza^Sancho",
    }  # fmt: skip
    if reader == "csv":
        planted["PatientID"] = "MRN50116"
    uids = set()
    for path in root.glob("images/*.dcm"):
        data = pydicom.dcmread(path)
        for name, value in planted.items():
            setattr(data, name, value)
        uids |= {str(data.StudyInstanceUID), str(data.SOPInstanceUID), str(data.PatientID)}
        data.save_as(path)
    bad = sorted(root.glob("images/*.dcm"))[0]
    data = pydicom.dcmread(bad)
    data.PixelData = data.PixelData[:100]
    data.save_as(bad)
    spec, _ = data_of(reader, [f"reader.root={root}", f"image_size={SIZE}", "on_error=skip"])
    found = write_shards(spec.data, tmp_path / "out", workers=1)
    assert sum("100 bytes" in one["reason"] for one in found["skipped"]) == 1 and str(root) not in json.dumps(found)
    secrets = [part for value in planted.values() for part in value.split("^")] + sorted(uids) + [str(root)]
    if len(os.uname().nodename) > 6:  # shorter ones stand in compressed bytes by chance
        secrets.append(os.uname().nodename)
    for path in (tmp_path / "out").iterdir():
        whole = path.read_bytes()
        if path.suffix == ".parquet":
            table = parquet.read_table(path)
            texts = table.drop_columns(["images"]).to_pylist()
            whole += json.dumps(texts).encode() + str(table.schema.metadata).encode()
            for row in table["images"].to_pylist():
                for image in row:
                    assert image["path"] is None
                    chunks = png_chunks(image["bytes"])
                    assert chunks == ["IHDR", "tEXt", "IDAT", "IEND"]
                    assert dict(Image.open(io.BytesIO(image["bytes"])).info) == {"White": "65535"}
        for secret in secrets:
            assert secret.encode() not in whole


def png_chunks(data: bytes) -> list[str]:
    place, found = 8, []
    while place < len(data):
        found.append(data[place + 4 : place + 8].decode())
        place += 12 + int.from_bytes(data[place : place + 4], "big")
    return found


def test_a_manifest_has_no_date_host_or_path(unbroken: Path, source: Path) -> None:
    text = (unbroken / MANIFEST).read_text()
    for word in (str(source), str(unbroken), os.uname().nodename, time.strftime("%Y-%m"), "images/"):
        assert word not in text
    manifest = json.loads(text)
    assert manifest["made_by"]["medxray"] == version("medxray")
    assert manifest["studies"] == 36 and manifest["skipped"] == []
    assert sum(record["bytes"] for record in manifest["files"]) == manifest["bytes"]
    for record in manifest["files"]:
        assert record["sha256"] == hashlib.sha256((unbroken / record["file"]).read_bytes()).hexdigest()


# Kills


def killed(run: Callable[[], Any], after: float, begun: Callable[[], bool] = lambda: True) -> bool:
    """Runs in a process group of its own that is killed so many seconds after `begun`; whether it still ran then."""
    child = os.fork()
    if child == 0:
        try:
            os.setpgid(0, 0)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            run()
        finally:
            os._exit(0)
    # Whichever of the two comes first.
    with contextlib.suppress(PermissionError, ProcessLookupError):
        os.setpgid(child, child)
    end = None if not begun() else time.monotonic() + after
    while end is None or time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.001)
        if end is None and begun():
            end = time.monotonic() + after
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def wait_for_lock(out: Path) -> None:
    """Until the last of the killed workers, which were forked and so hold the lock too, is gone."""
    with contextlib.suppress(FileNotFoundError), (out / WORK / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)


def forked_workers(workers: int) -> None:
    """Has workers forked: they are there at once, so that a kill meets them at work."""
    torch.set_num_threads(1)
    prepare.get_context = lambda _: multiprocessing.get_context("fork")  # type: ignore[assignment]


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_runs_end_with_the_shards_of_an_unbroken_one(
    workers: int, source: Path, unbroken: Path, tmp_path: Path
) -> None:
    out, rng = tmp_path / "out", random.Random(workers)

    def run() -> None:
        forked_workers(workers)
        write(source, out, workers=workers)

    def shards() -> int:
        return len(list(out.glob("*.parquet")))

    kills, seen = 0, set[int]()
    for _ in range(60):
        if (out / MANIFEST).is_file():
            shutil.rmtree(out)
        wanted = shards() + rng.randint(0, 2)
        kills += killed(run, rng.uniform(0, 0.1), lambda: shards() >= wanted)  # noqa: B023
        wait_for_lock(out)
        seen.add(shards())
        if kills == 10:
            break
    assert kills == 10 and len(seen) > 2
    write(source, out)
    assert sums(out) == sums(unbroken)


class Cut(BaseException):
    """Stands for a kill."""


@pytest.mark.parametrize("remade", [False, True])
def test_a_run_may_end_at_any_write(remade: bool, source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Every call that changes the folder is once the last one. With `remade` it stands whole but for two shards."""
    real = {name: getattr(os, name) for name in ("replace", "fsync", "unlink")}
    state = {"left": 10**9}
    small, unbroken = ("max_studies=3",), tmp_path / "unbroken"
    write(source, unbroken, *small, studies=2)

    def counted(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            state["left"] -= 1
            if state["left"] < 0:
                raise Cut
            return real[name](*arguments, **more)

        return call

    def begin(out: Path) -> None:
        shutil.rmtree(out, ignore_errors=True)
        if remade:
            shutil.copytree(unbroken, out)
            os.remove(out / "train-00001-of-00002.parquet")
            os.remove(out / "test-00000-of-00002.parquet")

    for name in real:
        monkeypatch.setattr(prepare.os, name, counted(name))
    out = tmp_path / "out"
    begin(out)
    write(source, out, *small, studies=2)
    steps = 10**9 - state["left"]
    assert steps > (15 if remade else 30)
    for step in range(0, steps, 5 if remade else 11):
        begin(out)
        state["left"] = step
        with pytest.raises(Cut):
            write(source, out, *small, studies=2)
        state["left"] = 10**9
        write(source, out, *small, studies=2)
        assert sums(out) == sums(unbroken), step


def test_two_processes_write_the_same_bytes(source: Path, unbroken: Path, tmp_path: Path, monkeypatch: Any) -> None:
    write(source, tmp_path / "two", workers=2)
    assert sums(tmp_path / "two") == sums(unbroken)
    image = tmp_path / "data" / first_images(source)[-1]
    shutil.copytree(source, tmp_path / "data")
    image.write_bytes(image.read_bytes()[:2000])
    monkeypatch.setattr(prepare, "get_context", lambda _: multiprocessing.get_context("fork"))
    with pytest.raises(ImageError, match=image.name):
        write(tmp_path / "data", tmp_path / "bad", workers=2)


@pytest.mark.slow
def test_a_ray_cluster_writes_the_same_bytes(source: Path, unbroken: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    write(source, tmp_path / "ray", ray="local", workers=2)
    assert sums(tmp_path / "ray") == sums(unbroken)
    # errors of a task come back as they are
    shutil.copytree(source, tmp_path / "data")
    (tmp_path / "data" / first_images(source)[-1]).write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ImageError, match="damaged"):
        write(tmp_path / "data", tmp_path / "bad", ray="local", workers=1)


def test_ray_that_is_not_there(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DataError, match=r"medxray\[scale\]"):
        write(source, tmp_path / "out", ray="local")


def test_workers_of_the_command(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    command = ["prepare", "csv", str(tmp_path / "out"), f"reader.root={source}", "--size", "32", "--workers"]
    for given, told in {"ray": r"medxray[scale]", "x": "found 'x'", "0": "found '0'"}.items():
        done = CliRunner().invoke(app, [*command, given])
        assert done.exit_code == 2 and told in done.output, done.output


@pytest.mark.slow
def test_a_killed_command_goes_on(source: Path, unbroken: Path, tmp_path: Path) -> None:
    """The command itself, with two workers: ten kills of the whole group, then one of the first process alone."""
    command = [
        sys.executable, "-m", "medxray.cli", "prepare", "csv", str(tmp_path / "out"), f"reader.root={source}",
        "--size", str(SIZE), "--shard", str(SHARD), "--workers", "2", "-q",
    ]  # fmt: skip
    rng = random.Random(4)
    for _ in range(10):
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
        while not (tmp_path / "out" / WORK / "plan.json").is_file() and process.poll() is None:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 6))
        with_group(process.pid, signal.SIGKILL)
        process.wait()
        if (tmp_path / "out" / MANIFEST).is_file():
            shutil.rmtree(tmp_path / "out")
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    time.sleep(6)
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    while group_lives(process.pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert not group_lives(process.pid)
    subprocess.run(command, check=True)
    assert sums(tmp_path / "out") == sums(unbroken)


def with_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_interrupted_command_says_how_to_go_on(source: Path, unbroken: Path, tmp_path: Path) -> None:
    command = [
        "prepare", "csv", str(tmp_path / "out"), f"reader.root={source}", "--size", str(SIZE), "--shard", str(SHARD), "--workers",
    ]  # fmt: skip
    # What a shell puts behind itself ignores the signal.
    slow = "import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler); "
    slow += "import medxray.data.prepare as p; own = p._image; p._image = lambda *a: (time.sleep(0.1), own(*a))[1]; "
    process = subprocess.Popen(
        [sys.executable, "-c", slow + "from medxray.cli import app; app()", *command, "1"],
        start_new_session=True, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not list((tmp_path / "out").glob("*.parquet")) and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    message = process.communicate()[1]
    assert process.returncode == 130 and "run the same command again to go on" in message and "Traceback" not in message
    with pytest.raises(DataError, match="not finished"):
        list(Parquet(tmp_path / "out").read())
    with pytest.raises(DataError, match="not finished"):
        verify_shards(tmp_path / "out")
    kept = sums_of_shards(tmp_path / "out")
    result = CliRunner().invoke(app, [*command, "1", "-q"])
    assert result.exit_code == 0, result.output
    assert sums(tmp_path / "out") == sums(unbroken) and kept.items() <= sums(unbroken).items()
    assert CliRunner().invoke(app, ["prepare", "--verify", str(tmp_path / "out"), "-q"]).output.startswith("verified")


def sums_of_shards(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("*.parquet")}


def test_a_finished_run_is_left_as_it_is(source: Path, unbroken: Path, monkeypatch: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in unbroken.iterdir()}
    monkeypatch.setattr(prepare, "_make", None)
    write(source, unbroken)
    assert {path: path.stat().st_mtime_ns for path in unbroken.iterdir()} == before


# What changes meanwhile


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_and_other_studies_do_not_mix(
    finished: bool, source: Path, unbroken: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    out, root = tmp_path / "out", tmp_path / "data"
    shutil.copytree(source, root)
    if finished:
        shutil.copytree(unbroken, out)
    else:
        stop_after(monkeypatch, 3)
        with pytest.raises(Cut):
            write(root, out)
        monkeypatch.undo()
    before = sums_of_shards(out)
    for settings, more, message in [
        ([], {"bits": "8"}, r'bits was "auto" and is "8"'),
        (["image_size=41"], {}, "size was 40 and is 41"),
        (["fit=pad"], {}, "fit was"),
        (["reader.report=impression"], {}, "reader.report was"),
        ([], {"studies": 7}, "shard was 6 and is 7"),
        (["labels=[Cardiomegaly]"], {}, "labels"),
        ([], {"masks": contours()}, "masks"),
        ([], {"full": True}, 'size was 40 and is "full"'),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            write(root, out, *settings, **more)
        assert "name another folder" in str(caught.value)
    table = root / "studies.csv"
    text = table.read_text()
    for other, message in [
        (text.replace("Heart", "heart", 1) if "Heart" in text else text.replace("The ", "the ", 1), "1 of 7 shards"),
        ("\n".join(line for line in text.splitlines() if "S000003" not in line) + "\n", "had 36 studies and has 35"),
    ]:
        table.write_text(other)
        with pytest.raises(DataError, match=message):
            write(root, out)
    table.write_text(text)
    monkeypatch.setattr(prepare, "version", lambda _: "9.9")
    with pytest.raises(DataError, match=r'medxray was ".*" and is "9.9"'):
        write(root, out)
    monkeypatch.undo()
    assert sums_of_shards(out) == before
    write(root, out)
    assert sums_of_shards(out) == sums_of_shards(unbroken)


def stop_after(monkeypatch: Any, shards: int) -> None:
    own, made = prepare._make, []

    def make(*arguments: Any) -> Any:
        if len(made) == shards:
            raise Cut
        made.append(own(*arguments))
        return made[-1]

    monkeypatch.setattr(prepare, "_make", make)


def test_a_changed_image_remakes_its_shard_alone(source: Path, unbroken: Path, tmp_path: Path) -> None:
    out, root = tmp_path / "out", tmp_path / "data"
    shutil.copytree(source, root)
    shutil.copytree(unbroken, out)
    write(root, out)
    image = root / first_images(root)[0]
    data = pydicom.dcmread(image)
    data.PixelData = bytes(len(data.PixelData))
    data.save_as(image)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    write(root, out)
    changed = {path.name for path in out.glob("*.parquet") if path.stat().st_mtime_ns != before[path.name]}
    assert len(changed) == 1
    write(root, tmp_path / "anew")
    assert sums(tmp_path / "anew") == sums(out) != sums(unbroken)


def first_images(root: Path, split: str = "train") -> list[str]:
    with (root / "studies.csv").open(newline="") as file:
        return [row["path"] for row in csv.DictReader(file) if row["split"] == split]


def test_a_bad_image_stops_the_run_and_a_mended_one_lets_it_go_on(source: Path, unbroken: Path, tmp_path: Path) -> None:
    out, root = tmp_path / "out", tmp_path / "data"
    shutil.copytree(source, root)
    image = root / first_images(root)[-1]
    whole = image.read_bytes()
    image.write_bytes(whole[:2000])
    with pytest.raises(ImageError, match="again to go on") as caught:
        write(root, out)
    assert str(image) in str(caught.value) and "data.on_error=skip" in str(caught.value)
    kept = sums_of_shards(out)
    assert kept
    image.write_bytes(whole)
    write(root, out)
    assert sums_of_shards(out) == sums_of_shards(unbroken) and kept.items() <= sums_of_shards(out).items()


def test_what_cannot_be_read_is_left_out_and_listed(source: Path, unbroken: Path, tmp_path: Path, monkeypatch: Any) -> None:
    out, root = tmp_path / "out", tmp_path / "data"
    shutil.copytree(source, root)
    studies = [row for row in rows_of(studies_of("csv", root)) if row["split"] == "train"]
    pair, single = (next(s for s in studies if len(s["images"]) == n) for n in (2, 1))
    (root / pair["images"][1]).write_bytes(b"no image")
    (root / single["images"][0]).unlink()
    with pytest.raises(DataError, match=r"1 of .* images are missing"):
        write(root, out)
    stop_after(monkeypatch, 1)
    with pytest.raises(Cut):
        write(root, out, "on_error=skip")
    monkeypatch.undo()
    # one more is gone when the run goes on
    gone = next(s for s in reversed(studies) if s["study_id"] not in (pair["study_id"], single["study_id"]))
    for image in gone["images"]:
        (root / image).unlink()
    found = write(root, out, "on_error=skip")
    lines = {(one["study"], one["file"]): one["reason"] for one in found["skipped"]}
    for study in (single, gone):
        assert lines[study["study_id"], ""] == "no readable image"
        assert "no such file" in lines[study["study_id"], study["images"][0]]
    assert "not an image" in lines[pair["study_id"], pair["images"][1]]
    assert len(lines) == 1 + 2 * 1 + 0 + (len(gone["images"]) - 1) + 2 and str(root) not in json.dumps(found)
    assert found["studies"] == 34 and verify_shards(out) == found
    names = {study["study_id"]: study for study in rows_of(studies_of("parquet", out))}
    assert len(names) == 34 and len(names[pair["study_id"]]["images"]) == 1
    write(root, tmp_path / "anew", "on_error=skip")
    assert sums(tmp_path / "anew") == sums(out)
    # what was left out is not left out in silence by a stricter run
    with pytest.raises(DataError):
        write(root, out, "on_error=raise")


def test_an_image_that_goes_while_the_run_reads(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    root = tmp_path / "data"
    shutil.copytree(source, root)
    own = prepare._begin

    def begin(*arguments: Any) -> Any:
        (root / first_images(root)[3]).unlink(missing_ok=True)
        return own(*arguments)

    monkeypatch.setattr(prepare, "_begin", begin)
    with pytest.raises(ImageError, match=r"no such file.*again to go on"):
        write(root, tmp_path / "out")


def test_a_shard_may_be_empty(source: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(source, root)
    for image in first_images(root, "test"):
        (root / image).unlink()
    found = write(root, tmp_path / "out", "on_error=skip")
    assert found["splits"]["test"]["studies"] == 0 and found["splits"]["test"]["shards"] == 2
    assert len(studies_of("parquet", tmp_path / "out").splits["test"]) == 0
    verify_shards(tmp_path / "out")


# Folders


def test_a_full_disk_stops_the_run_with_one_message(source: Path, unbroken: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = tmp_path / "told"

    def run() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            write(source, out)
        except DataError as error:
            told.write_text(str(error))

    assert not killed(run, 60)
    assert "cannot be written (File too large); make room and give the same command again to go on" in told.read_text()
    assert not list(out.rglob("*.partial"))
    write(source, out)
    assert sums(out) == sums(unbroken)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_errors_of_the_disk_are_told(number: int, source: Path, unbroken: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def flush(path: Path) -> None:
        if path.name.startswith("train-00002"):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(prepare, "_flush", flush)
    with pytest.raises(DataError, match=os.strerror(number)) as caught:
        write(source, tmp_path / "out")
    assert str(tmp_path / "out") in str(caught.value)
    monkeypatch.undo()
    write(source, tmp_path / "out")
    assert sums(tmp_path / "out") == sums(unbroken)


def test_folders_that_cannot_be_taken(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(DataError, match="cannot be written"):
            write(source, out)
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "thesis.tex").write_text("")
    with pytest.raises(DataError, match=r"new or empty folder.*thesis\.tex"):
        write(source, tmp_path / "held")
    assert [path.name for path in (tmp_path / "held").iterdir()] == ["thesis.tex"]
    for out in (source, source / "images" / "out"):
        with pytest.raises(DataError, match="name a folder outside"):
            write(source, out)
    (tmp_path / "empty").mkdir()
    write(source, tmp_path / "empty", "max_studies=1")
    with pytest.raises(DataError, match="at least one study a shard"):
        write(source, tmp_path / "zero", studies=0)
    assert not (tmp_path / "zero").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_rights(source: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(DataError, match="mend its rights"):
            write(source, tmp_path / "out")
    finally:
        tmp_path.chmod(0o700)


def test_two_runs_do_not_write_to_one_folder(source: Path, unbroken: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = "import sys; from pathlib import Path; from medxray.data import prepare\n"
    code += "with prepare._held(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", code, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    with pytest.raises(DataError, match="another run writes"):
        write(source, out)
    other.communicate()
    assert not out.exists()
    write(source, out)
    assert sums(out) == sums(unbroken)


# Checks


def test_verify_finds_a_flipped_byte_and_what_is_missing(source: Path, unbroken: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(unbroken, out)
    assert verify_shards(out) == json.loads((out / MANIFEST).read_text())
    flipped, cut, gone = (out / f"train-0000{i}-of-00004.parquet" for i in range(3))
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 1
    flipped.write_bytes(data)
    with pytest.raises(DataError, match=r"1 shards.*train-00000-of-00004.parquet has another SHA-256 sum") as caught:
        verify_shards(out)
    assert "delete them and prepare" in str(caught.value)
    cut.write_bytes(cut.read_bytes()[:-1])
    gone.unlink()
    shutil.copy(flipped, out / "train-00009-of-00009.parquet")
    with pytest.raises(DataError, match=r"00001.*bytes, expected.*00002.* is missing.*00009.parquet is not listed"):
        verify_shards(out)
    result = CliRunner().invoke(app, ["prepare", "--verify", str(out), "-q"])
    assert result.exit_code == 2 and "SHA-256" in result.output
    flipped.unlink()
    (out / "train-00009-of-00009.parquet").unlink()
    write(source, out)
    assert sums(out) == sums(unbroken)


def test_verify_counts_studies_and_images(unbroken: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(unbroken, out)
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["files"][0]["images"] += 1
    (out / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="images, expected"):
        verify_shards(out)
    (out / MANIFEST).write_text("{")
    with pytest.raises(DataError, match="damaged"):
        verify_shards(out)
    with pytest.raises(DataError, match="no such file"):
        verify_shards(tmp_path)


# The command


def command(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["prepare", *arguments, "-q"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_command(source: Path, unbroken: Path, tmp_path: Path) -> None:
    own = ["--shard", str(SHARD), "--workers", "1"]
    code, told = command("csv", str(tmp_path / "a"), f"reader.root={source}", "--size", str(SIZE), *own)
    assert code == 0 and "7 shards, 36 studies" in told
    assert sums(tmp_path / "a") == sums(unbroken)
    # a spec's data block says the size itself
    spec = tmp_path / "own.yaml"
    spec.write_text(
        f"task: classify\ndata: {{reader: {{name: csv, root: {source}}}, image_size: {SIZE}}}\nencoder: {{name: vit}}\n"
        "training: {steps: 1}\n"
    )
    assert command(str(spec), str(tmp_path / "b"), *own)[0] == 0
    assert sums(tmp_path / "b") == sums(unbroken)
    code, told = command(
        "classify-phantom", str(tmp_path / "c"), f"data.reader.root={tmp_path / 'ph'}", "reader.studies=8", "reader.size=48",
        "--size", "24x32", "--fit", "pad", "--bits", "8", "--masks", *own,
    )  # fmt: skip
    assert code == 0, told
    settings = json.loads((tmp_path / "c" / MANIFEST).read_text())["settings"]
    assert (settings["size"], settings["fit"], settings["bits"]) == ([24, 32], "pad", "8") and settings["masks"]
    assert command("csv", str(tmp_path / "d"), f"reader.root={source}", "--size", "full", *own)[0] == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["csv", "out", "reader.root=x"], "--size"),
        (["csv", "out", "reader.root=x", "--size", "big"], "--size: expected pixels"),
        (["csv", "out", "reader.root=nowhere", "--size", "8"], "no folder nowhere"),
        (["csw", "out", "--size", "8"], "did you mean 'csv'"),
        (["csv", "reader.root=x", "--size", "8"], "expected a reader or spec, then the folder"),
        (["csv", "out", "--size", "8"], "data.reader.root"),
        (["csv", "out", "reader.rot=x", "--size", "8"], "data.reader.rot"),
        (["csv", "out", "reader.root=x", "--size", "8", "--bits", "12"], "--bits"),
        (["csv", "out", "reader.root=x", "--size", "8", "--fit", "cut"], "data.fit"),
        (["--verify", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_of_a_command(arguments: Sequence[str], message: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    code, told = command(*arguments)
    assert code == 2 and message in told, told
    assert not (tmp_path / "out").exists()


def test_a_run_travels(source: Path, tmp_path: Path) -> None:
    """To processes and machines, whatever the reader's settings are made of."""
    data = block(source)
    found = load_studies(data)
    schema = prepare._schema(found.labels, True)
    masks = contours()
    job = prepare._Job(tmp_path, found.reader, prepare._portable(data), False, "auto", masks, schema)
    again = pickle.loads(pickle.dumps(job))
    assert again.schema.equals(schema, check_metadata=True) and again.data.shown == data.shown
    assert (tmp_path / WORK).is_dir() is False
