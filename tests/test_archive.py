"""An archive predicted in parts: whole after any kill, each study once, and the same text whoever made it."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as arrow
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import medxray
from medxray import archive
from medxray.archive import archive_of, predict_archive
from medxray.cli import app
from medxray.data import data_of, load_studies, write_shards
from medxray.data.readers.csv import CSV
from medxray.outputs import table
from medxray.pipeline import Pipeline
from medxray.types import DataError, ImageError, RunError

STUDIES, PART = 40, 16
SETTINGS = ["reader.name=csv", "reader.report=findings"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of other patients than the run's."""
    from medxray.data.phantom import generate

    return generate(tmp_path_factory.mktemp("archive") / "data", studies=STUDIES, size=96, seed=8, progress=False)


@pytest.fixture(scope="module")
def pipeline(report_run: Path) -> Pipeline:
    return medxray.load(report_run)


@pytest.fixture(scope="module")
def unbroken(pipeline: Pipeline, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes that nobody stops."""
    out = tmp_path_factory.mktemp("unbroken") / "out"
    predict(pipeline, source, out)
    return out


def predict(pipeline: Pipeline, root: Path, out: Path, *settings: str, **options: Any) -> dict[str, Any]:
    data = archive_of(pipeline.spec, root, [*SETTINGS, *settings])
    return predict_archive(pipeline, data, out, part=options.pop("part", PART), **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def parts(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(folder).items() if name.endswith(".parquet")}


def ids(folder: Path) -> list[str]:
    return parquet.read_table(folder)["study_id"].to_pylist()  # type: ignore[no-any-return]


def texts(folder: Path) -> dict[str, str]:
    table = parquet.read_table(folder, columns=["study_id", "text"])
    return dict(zip(*table.to_pydict().values(), strict=True))


class Cut(BaseException):
    """Stands for what nobody can catch."""


def stop_after(monkeypatch: pytest.MonkeyPatch, written: int) -> None:
    """Ends the process's work when so many parts are there and the next is half written."""
    own, count = parquet.write_table, iter(range(written))

    def write(rows: arrow.Table, where: Path, **options: Any) -> None:
        if next(count, None) is None:
            Path(where).write_bytes(b"PAR1 half")
            raise Cut
        own(rows, where, **options)

    monkeypatch.setattr(parquet, "write_table", write)


# One process


def test_each_study_is_there_once_with_the_pipelines_own_text(pipeline: Pipeline, source: Path, unbroken: Path) -> None:
    studies = load_studies(archive_of(pipeline.spec, source, SETTINGS)).splits["train"]
    assert ids(unbroken) == studies["study_id"] and len(studies) == STUDIES
    given = [
        {
            "study_id": row["study_id"], "patient_id": row["patient_id"], "views": row["views"], "indication": row["indication"],
            "images": [source / image for image in row["images"]],
        }
        for row in studies
    ]  # fmt: skip
    # Batches of the parts: 16 in each of the first two, 8 in the third.
    alone = [pipeline.predict(given[start : start + PART]) for start in range(0, STUDIES, PART)]
    found = parquet.read_table(unbroken).replace_schema_metadata()
    assert found.equals(table([prediction for batch in alone for prediction in batch]))
    assert len(set(found["text"].to_pylist())) > 2 and len(set(map(tuple, found["log_probabilities"].to_pylist()))) == STUDIES
    summary = json.loads((unbroken / "_summary.json").read_text())
    assert summary == {"studies": STUDIES, "parts": 3, "gone": 0, "skipped": []}


@pytest.mark.parametrize("written", [0, 1, 2])
def test_what_is_written_is_kept_and_only_the_rest_is_made(
    written: int, pipeline: Pipeline, source: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, written)
        with pytest.raises(Cut):
            predict(pipeline, source, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")}
    assert len(before) == written and not (tmp_path / "out" / "_summary.json").exists()
    found = predict(pipeline, source, tmp_path / "out")
    assert found["predicted"] == STUDIES - PART * written
    assert contents(tmp_path / "out") == contents(unbroken)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_parts_may_be_missing_anywhere(pipeline: Pipeline, source: Path, unbroken: Path, tmp_path: Path) -> None:
    out = shutil.copytree(unbroken, tmp_path / "out")
    (out / "part-00000.parquet").unlink()
    (out / "part-00001.parquet").write_bytes(b"damaged")
    assert predict(pipeline, source, out)["predicted"] == 2 * PART
    assert contents(out) == contents(unbroken)


def test_a_finished_archive_is_left_as_it_is(
    pipeline: Pipeline, source: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(unbroken)
    monkeypatch.setattr(Pipeline, "predict", None)
    assert predict(pipeline, source, unbroken)["predicted"] == 0
    assert contents(unbroken) == before


# What cannot be read


@pytest.fixture
def damaged(source: Path, tmp_path: Path) -> tuple[Path, str, str]:
    """An archive in which one study has lost its only image, another one of its two."""
    root = shutil.copytree(source, tmp_path / "damaged")
    spec, _ = data_of("csv", [f"reader.root={root}", "split=patient", "split_shares=[1,0,0]"])
    studies = load_studies(spec.data).splits["train"]
    whole = next(row for row in studies if len(row["images"]) == 1)
    half = next(row for row in studies if len(row["images"]) == 2)
    for row in (whole, half):
        (root / row["images"][0]).write_bytes(b"\x89PNG\r\n\x1a\n")
    return root, whole["study_id"], half["study_id"]


def test_what_cannot_be_read_stops_it_or_is_listed(
    pipeline: Pipeline, damaged: tuple[Path, str, str], unbroken: Path, source: Path, tmp_path: Path
) -> None:
    root, whole, half = damaged
    out = tmp_path / "out"
    with pytest.raises(ImageError, match=r"what is written is kept: mend the image, or set on_error=skip"):
        predict(pipeline, root, out, part=2)
    kept = set(parts(out))
    found = predict(pipeline, root, out, "on_error=skip", part=2)
    assert kept < set(parts(out)) or not kept
    assert set(ids(out)) == set(ids(unbroken)) - {whole} and len(ids(out)) == STUDIES - 1
    assert [(one["study"], bool(one["file"])) for one in found["skipped"]] in (
        [(whole, True), (whole, False), (half, True)], [(half, True), (whole, True), (whole, False)],
    )  # fmt: skip
    assert not any(str(tmp_path) in one["reason"] for one in found["skipped"])
    assert json.loads((out / "_summary.json").read_text())["skipped"] == found["skipped"]
    # Where it is an error again nothing passes for done.
    with pytest.raises(ImageError):
        predict(pipeline, root, out, part=2)
    # A mended file is seen, and its part alone is made again.
    for image in sorted((root / "images").rglob("*.png")):
        if image.stat().st_size < 20:
            shutil.copyfile(source / image.relative_to(root), image)
    again = predict(pipeline, root, out, "on_error=skip", part=2)
    assert again["predicted"] in (2, 4) and again["skipped"] == []
    assert texts(out) == texts(unbroken) and ids(out) == ids(unbroken)


def test_memory_that_ran_out_is_told(
    pipeline: Pipeline, source: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, calls = Pipeline.predict, iter(range(9))

    def fails(self: Pipeline, studies: Any, **options: Any) -> Any:
        if next(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return own(self, studies, **options)

    monkeypatch.setattr(Pipeline, "predict", fails)
    with pytest.raises(RunError, match=r"16 studies at once take more memory than there is \(CUDA out of memory.*kept"):
        predict(pipeline, source, tmp_path / "out")
    assert list(parts(tmp_path / "out")) == ["part-00000.parquet"]
    predict(pipeline, source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(unbroken)


def test_a_disk_that_takes_no_more_is_told(
    pipeline: Pipeline, source: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, count, limits = parquet.write_table, iter(range(9)), resource.getrlimit(resource.RLIMIT_FSIZE)

    def write(*arguments: Any, **options: Any) -> None:
        # The system then lets no file grow, halfway through the second part.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if next(count) else limits[0], limits[1]))
        try:
            own(*arguments, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch:
        patch.setattr(parquet, "write_table", write)
        with pytest.raises(RunError, match=r"cannot be written \(File too large\).*kept"):
            predict(pipeline, source, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"_archive.json", "part-00000.parquet"}
    predict(pipeline, source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(unbroken)


# What comes and goes


def test_an_archive_that_grows_and_shrinks(pipeline: Pipeline, source: Path, unbroken: Path, tmp_path: Path) -> None:
    root = shutil.copytree(source, tmp_path / "data")
    lines = (root / "studies.csv").read_text().splitlines(keepends=True)
    name = lines[0].split(",").index("study_id")
    known = list(dict.fromkeys(line.split(",")[name] for line in lines[1:]))

    def keep(wanted: list[str]) -> None:
        (root / "studies.csv").write_text("".join([lines[0], *(x for x in lines[1:] if x.split(",")[name] in wanted)]))

    keep(known[:30])
    assert predict(pipeline, root, tmp_path / "out")["predicted"] == 30
    before = parts(tmp_path / "out")
    keep(known)
    assert predict(pipeline, root, tmp_path / "out")["predicted"] == STUDIES - 30
    assert before.items() < parts(tmp_path / "out").items()
    assert sorted(ids(tmp_path / "out")) == sorted(ids(unbroken))
    keep(known[5:])
    found = predict(pipeline, root, tmp_path / "out")
    assert (found["predicted"], found["gone"], found["studies"]) == (0, 5, STUDIES)


def test_runs_and_archives_do_not_mix(
    pipeline: Pipeline, source: Path, unbroken: Path, phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(unbroken, tmp_path / "out")
    before = contents(out)
    with pytest.raises(RunError, match=r"another archive: none of its 40 studies is in this one"):
        predict(pipeline, phantom, out)
    with pytest.raises(RunError, match=r'another archive: reader.prior was .* and is "impression"'):
        predict(pipeline, source, out, "reader.prior=impression")
    other = shutil.copytree(pipeline.folder, tmp_path / "run")
    fitted = medxray.load(other)
    predict(fitted, source, out)
    tensors = load_file(other / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, other / "model.safetensors")
    with pytest.raises(RunError, match=r'another run: model.safetensors was ".* and is ".*--output'):
        predict(medxray.load(other), source, out)
    assert contents(out) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match=r"expected a new or empty folder.*it holds thesis.txt"):
        predict(pipeline, source, tmp_path / "full")
    shutil.copyfile(out / "part-00000.parquet", out / "part-00009.parquet")
    with pytest.raises(RunError, match="a study is in two parts"):
        predict(pipeline, source, out)
    (out / "_archive.json").write_text("{")
    with pytest.raises(RunError, match=r"_archive.json is damaged"):
        predict(pipeline, source, out)


def test_any_reader_gives_an_archive(pipeline: Pipeline, source: Path, unbroken: Path, tmp_path: Path) -> None:
    """Shards of the same images say the same of them; the reader is found by the layout."""
    write_shards(data_of("csv", [f"reader.root={source}", "image_size=96"])[0].data, tmp_path / "shards", full=True, workers=1)
    data = archive_of(pipeline.spec, tmp_path / "shards")
    assert data.reader.name == "parquet"
    predict_archive(pipeline, data, tmp_path / "out", part=PART)
    assert texts(tmp_path / "out") == texts(unbroken)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no reader finds a study in it.*reader.name=NAME"):
        archive_of(pipeline.spec, tmp_path / "empty")
    with pytest.raises(DataError, match=r"no folder .*gone"):
        archive_of(pipeline.spec, tmp_path / "gone")


IDENTITY = (b"Mustermann", b"4711-0815", b"19480229", b"ACC-99-77", b"1.2.826.0.9876543")


@pytest.fixture
def hospital(radiograph: Callable[..., bytes], tmp_path: Path) -> Path:
    """DICOM files of three studies, with identifiers in headers and paths; the last is cut off."""
    root = tmp_path / "hospital"
    for i in range(3):
        uid = f"1.2.826.0.9876543.{i}"
        path = root / "Mustermann 4711-0815" / uid / f"{uid}.1"
        path.parent.mkdir(parents=True)
        content = radiograph(
            i, Modality="DX", StudyInstanceUID=uid, SOPInstanceUID=f"{uid}.1", AccessionNumber="ACC-99-77", StudyID="4711-0815"
        )
        path.write_bytes(content[:-4000] if i == 2 else content)
    return root


def named(folder: Path) -> list[tuple[Path, bytes]]:
    """Files that hold an identifier, or are called by one."""
    found = []
    for path in sorted(folder.rglob("*")):
        texts = [path.name.encode()]
        if path.is_file() and not path.is_symlink():
            texts.append(path.read_bytes())
            if path.suffix == ".parquet":
                rows = parquet.read_table(path)
                texts.append(f"{rows.schema.metadata} {rows.to_pylist()}".encode())
        found += [(path, one) for one in IDENTITY for text in texts if one in text]
    return found


def test_nobody_is_named(
    pipeline: Pipeline, hospital: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDXRAY_CACHE", str(tmp_path / "written" / "cache"))
    out = tmp_path / "written" / "out"
    command = [pipeline.folder, hospital, "--engine", "process", "--output", out, "--part", 2]
    assert run(*command)[0] == 2
    code, said, error = run(*command, "on_error=skip")
    assert code == 0 and "2 parts, 2 studies" in said and "skipped" in said
    assert named(hospital) and named(tmp_path / "written") == []
    captured = capfd.readouterr()
    assert not any(one in f"{said} {error} {captured}".encode() for one in IDENTITY)
    assert all(len(name) == 24 for name in ids(out))


@pytest.mark.slow
def test_nobody_is_named_by_ray(pipeline: Pipeline, hospital: Path, cluster: str, tmp_path: Path) -> None:
    data = archive_of(pipeline.spec, hospital)
    with pytest.raises(ImageError):
        predict_archive(pipeline, data, tmp_path / "out", ray="local", part=2)
    data = archive_of(pipeline.spec, hospital, ["on_error=skip"])
    found = predict_archive(pipeline, data, tmp_path / "out", ray="local", part=2)
    assert found["studies"] == 2 and len(found["skipped"]) == 2
    assert named(tmp_path / "out") == [] and named(Path(cluster)) == []


# The command


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["predict", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_the_command_in_one_process(pipeline: Pipeline, source: Path, unbroken: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [pipeline.folder, source, *SETTINGS, "--engine", "process", "--output", out, "--part", PART]
    code, said, error = run(*command)
    assert code == 0, error
    assert said.startswith(f"written: {out}: 3 parts, 40 studies, 40 of them now, ") and "studies/s" in said
    assert contents(out) == contents(unbroken)
    assert "3 parts, 40 studies, all were there" in run(*command)[1]
    assert json.loads(run(*command, "--json")[1])["predicted"] == 0


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--engine", "spark"], "--engine: expected process or ray, found spark"),
        (["--workers", "2"], "found none, beside --ray or --workers"),
        (["--engine", "process", "--workers", "2"], "go with --engine ray"),
        (["--engine", "ray", "--study"], "leave out --study"),
        (["--engine", "ray", "--format", "fhir"], "leave out --format fhir"),
        (["--engine", "process", "other"], "found other beside"),
        (["--engine", "process", "reader.nome=csv"], "nome"),
        (["--engine", "ray", "--ray", "127.0.0.1:1"], "no Ray cluster at '127.0.0.1:1'"),
        (["--engine", "ray", "--ray", "nowhere"], "no Ray cluster at 'nowhere'"),
    ],
)
def test_mistakes_are_told(given: list[str], told: str, pipeline: Pipeline, source: Path, tmp_path: Path) -> None:
    code, _, error = run(pipeline.folder, source, *given, "--output", tmp_path / "out")
    assert code == 2 and told in error, error
    assert not (tmp_path / "out").exists()


def test_ray_that_is_not_there(pipeline: Pipeline, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(RunError, match=r"pip install 'medxray\[scale\]'"):
        predict(pipeline, source, tmp_path / "out", ray="local")


def test_a_folder_that_cannot_be_made(pipeline: Pipeline, source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot be written \(.*another folder by --output"):
        predict(pipeline, source, tmp_path / "file" / "out")


def test_models_for_what_a_cluster_has() -> None:
    assert archive._shares({"CPU": 8.0}, None) == (4, {"num_cpus": 1, "memory": 1})
    assert archive._shares({"CPU": 16.0, "GPU": 2.0}, None) == (2, {"num_gpus": 1})
    with pytest.raises(RunError, match=r"--workers 3: each takes a GPU, of which the cluster has 2; take fewer"):
        archive._shares({"CPU": 16.0, "GPU": 2.0}, 3)
    for cpus, workers in ((2, 2), (1, None)):
        with pytest.raises(RunError, match=rf"each takes a processor, of which the cluster has {cpus}, one of which reads"):
            archive._shares({"CPU": float(cpus)}, workers)


@pytest.mark.slow
def test_a_killed_command_goes_on(pipeline: Pipeline, source: Path, unbroken: Path, tmp_path: Path) -> None:
    """The command itself, killed as soon as each of its parts is there, and in between."""
    command = command_of(pipeline, source, tmp_path / "out", "--engine", "process")
    for written in (1, 2):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        wait(lambda n=written: len(list((tmp_path / "out").glob("part*"))) >= n, process)  # type: ignore[misc]
        process.kill()
        process.wait()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert contents(tmp_path / "out") == contents(unbroken)


def command_of(pipeline: Pipeline, source: Path, out: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "medxray.cli", "predict", str(pipeline.folder), str(source), *SETTINGS, "--output", str(out),
        "--part", str(PART), "-q", *more,
    ]  # fmt: skip


def wait(ready: Callable[[], bool], process: "subprocess.Popen[bytes] | None" = None, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not ready() and (process is None or process.poll() is None):
        assert time.monotonic() < end
        time.sleep(0.02)


# Ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A small cluster of this machine; its log and what it spills lie in the folder."""
    ray = pytest.importorskip("ray")
    # Its processes are as important as the tests that wait for them.
    for name, value in {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_worker_niceness": "0"}.items():
        os.environ.setdefault(name, value)
    # The paths of its sockets must be short.
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    ray.init(
        address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        object_store_memory=100 * 2**20, _temp_dir=folder,
    )  # fmt: skip
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield folder
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def test_ray_writes_the_same_bytes(
    pipeline: Pipeline, source: Path, unbroken: Path, cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Cut):
            predict(pipeline, source, tmp_path / "out")
    found = predict(pipeline, source, tmp_path / "out", ray="local", workers=1)
    assert found["predicted"] == STUDIES - PART
    assert contents(tmp_path / "out") == contents(unbroken)


@pytest.mark.slow
def test_ray_tells_what_cannot_be_read(
    pipeline: Pipeline, damaged: tuple[Path, str, str], cluster: str, tmp_path: Path
) -> None:
    root, *_ = damaged
    with pytest.raises(ImageError, match=r"what is written is kept"):
        predict(pipeline, root, tmp_path / "out", ray="local", workers=2)
    for out, ray in (("one", None), ("two", "local")):
        predict(pipeline, root, tmp_path / out, "on_error=skip", ray=ray)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


class Deadly(CSV):
    """Kills, as the system does for want of memory, the process that opens an image of `victim`; each time, or until `after`."""

    victim, after = "", Path()

    def open(self, image: str) -> Path | bytes:
        if image == self.victim and not self.after.exists():
            if self.after.name == "once":
                self.after.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().open(image)


def deadly(monkeypatch: pytest.MonkeyPatch, victim: str, after: Path) -> None:
    def loaded(*arguments: Any, **options: Any) -> Any:
        found = load_studies(*arguments, **options)
        found.reader.__class__ = Deadly
        found.reader.victim, found.reader.after = victim, after  # type: ignore[attr-defined]
        return found

    monkeypatch.setattr(archive, "load_studies", loaded)


@pytest.mark.slow
def test_a_reading_process_that_is_killed(
    pipeline: Pipeline, source: Path, unbroken: Path, cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studies = load_studies(archive_of(pipeline.spec, source, SETTINGS)).splits["train"]
    victim = studies[STUDIES - 1]["images"][0]
    with monkeypatch.context() as patch:
        deadly(patch, victim, tmp_path / "once")
        predict(pipeline, source, tmp_path / "out", ray="local", workers=1)
    assert (tmp_path / "once").exists() and contents(tmp_path / "out") == contents(unbroken)
    with monkeypatch.context() as patch:
        deadly(patch, victim, tmp_path / "never")
        with pytest.raises(RunError, match=r"3 processes died, one after the other, while they read studies .* memory\. What"):
            predict(pipeline, source, tmp_path / "bad", ray="local", workers=1)
    # What was written before it stays, and the rest is made.
    kept = parts(tmp_path / "bad")
    assert kept.items() < parts(unbroken).items()
    assert predict(pipeline, source, tmp_path / "bad")["predicted"] == STUDIES - PART * len(kept)
    assert contents(tmp_path / "bad") == contents(unbroken)


@pytest.mark.slow
def test_an_actor_that_is_killed_in_a_batch(
    pipeline: Pipeline, source: Path, unbroken: Path, cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(folder: Path, **options: Any) -> Pipeline:
        from medxray.pipeline import Pipeline, load

        own = Pipeline.predict
        if not (folder / "begun").exists():

            def predict(self: Any, studies: Any, **more: Any) -> Any:
                (folder / "begun").write_text(str(os.getpid()))
                time.sleep(600)

            Pipeline.predict = predict  # type: ignore[method-assign]
        else:
            Pipeline.predict = own  # type: ignore[method-assign]
        return load(folder, **options)

    copied = medxray.load(shutil.copytree(pipeline.folder, tmp_path / "run"))
    monkeypatch.setattr(archive, "load", slow)

    def kill() -> None:
        wait((copied.folder / "begun").is_file)
        time.sleep(0.5)
        os.kill(int((copied.folder / "begun").read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    predict(copied, source, tmp_path / "out", ray="local", workers=1)
    killer.join()
    assert parts(tmp_path / "out") == parts(unbroken)


class Counted(CSV):
    """Tells of every image that is opened."""

    log = Path()

    def open(self, image: str) -> Path | bytes:
        with self.log.open("a") as file:
            file.write(".")
        return super().open(image)


@pytest.mark.slow
def test_decoded_images_wait_in_bounded_memory(
    pipeline: Pipeline, cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples of 2 MB each, 320 MB in all, through a store of 100 MB: reading waits for the model, and nothing is spilled."""
    from medxray.data.phantom import generate

    root, own, log = generate(tmp_path / "many", studies=160, size=64, seed=9, progress=False), Pipeline.decoder, tmp_path / "log"
    images = len(list((root / "images").rglob("*.png")))

    def loaded(*arguments: Any, **options: Any) -> Any:
        found = load_studies(*arguments, **options)
        found.reader.__class__ = Counted
        found.reader.log = log  # type: ignore[attr-defined]
        return found

    def large(self: Pipeline, data: Any = None) -> Callable[[Any], Any]:
        decode = own(self, data)
        return lambda value: dataclasses.replace(decode(value), labels=torch.zeros(500_000))

    ahead = []

    class Bar:
        """In place of the progress bar."""

        def __init__(self, **options: Any) -> None:
            self.n, self.total = options["initial"], options["total"]

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def update(self, n: int) -> None:
            ahead.append(log.stat().st_size / images - self.n / self.total)
            self.n += n

    monkeypatch.setattr(archive, "load_studies", loaded)
    monkeypatch.setattr(Pipeline, "decoder", large)
    monkeypatch.setattr(archive, "progress_bar", Bar)
    assert predict(pipeline, root, tmp_path / "out", ray="local", workers=1)["predicted"] == 160
    assert len(ahead) == 10 and max(ahead) < 0.6
    assert not [path for path in Path(cluster).rglob("*spill*") if path.is_file()]


@pytest.mark.slow
def test_a_killed_command_on_ray_goes_on(pipeline: Pipeline, source: Path, unbroken: Path, tmp_path: Path) -> None:
    """The driver alone is killed: its cluster ends with it, and what it had written is whole."""
    out = tmp_path / "out"
    command = command_of(pipeline, source, out, "--engine", "ray", "--ray", "local", "--workers", "1")
    # A cluster that ends tells its whole group.
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait(lambda: len(list(out.glob("part*"))) >= 1, process)
    # Ray's agents, which hold nothing of an archive, find out late.
    children = [child for child in psutil.Process(process.pid).children(recursive=True) if "Agent" not in child.name()]
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, 60)
    assert children and not alive
    kept = parts(out)
    assert kept and kept.items() <= parts(unbroken).items()
    subprocess.run(command, check=True, start_new_session=True, stdout=subprocess.DEVNULL)
    assert contents(out) == contents(unbroken)
