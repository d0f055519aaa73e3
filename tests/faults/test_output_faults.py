"""What commands write under faults: each file, and files that belong together, are all the old or all the new."""

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import medxray
from medxray import disk
from medxray.outputs import Answer, write
from medxray.pipeline import Pipeline
from medxray.retrieval.bank import read_arrow, write_arrow
from medxray.types import Prediction
from medxray.visual import mosaic

Write = Callable[[Path, int], Any]
"""Writes a folder as it was (OLD) or as it will be (NEW)."""
OLD, NEW = 0, 1


@pytest.fixture(scope="module")
def two(unbroken: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> tuple[Pipeline, Pipeline]:
    """Two fitted pipelines with other weights and scores, in folders of their own."""
    folders = [tmp_path_factory.mktemp("two") / name for name in ("first", "second")]
    for folder in folders:
        shutil.copytree(unbroken.folder, folder)
    pipelines = medxray.load(folders[0]), medxray.load(folders[1])
    with torch.no_grad():
        for parameter in pipelines[1].task.parameters():
            parameter += 0.01
    for pipeline in pipelines:
        pipeline.evaluate("val", progress=False)
    return pipelines


def answers(which: int) -> list[Answer]:
    said = (Prediction("a", text="No acute disease. " * (40 + 40 * which), scores={"Edema": 0.25 + 0.5 * which}),)
    image = io.BytesIO()
    Image.new("L", (8, 8)).save(image, "PNG")
    return [Answer(one, [image.getvalue()]) for one in said]


CASES = ("evaluate", "save", "export", "compare", "card", "csv", "parquet", "page", "bank", "picture")


@pytest.fixture
def case(request: pytest.FixtureRequest, two: tuple[Pipeline, Pipeline]) -> Write:
    spec: Any = two[0].spec.data

    def evaluate(folder: Path, which: int) -> None:
        if not (folder / "spec.yaml").is_file():
            shutil.copytree(two[0].folder, folder, dirs_exist_ok=True)
        pipeline, own = two[which], two[which].folder
        try:
            pipeline.folder = folder
            pipeline.evaluate("val", progress=False)
        finally:
            pipeline.folder = own

    def compared(folder: Path, which: int) -> None:
        names = [f"one={two[0].folder}", f"two={two[1].folder}"]
        medxray.compare(names[:: 1 - 2 * which], intervals=False).write(folder)

    def output(name: str) -> Write:
        return lambda folder, which: write(answers(which), Path(name).suffix[1:], folder / name, model="fault", data=spec)

    def bank(folder: Path, which: int) -> None:
        write_arrow(folder / "bank.arrow", {"study_id": ["a", "b"]}, torch.full((2, 64), float(which)), {"positives": 1})
        read_arrow(folder / "bank.arrow")

    cases: dict[str, Write] = {
        "evaluate": evaluate,
        "save": lambda folder, which: two[which].save(folder),
        "export": lambda folder, which: two[which].export(folder, "timm"),
        "compare": compared,
        "card": lambda folder, which: two[which].card(folder / "card.md", license=("mit", "apache-2.0")[which]),
        "csv": output("said.csv"),
        "parquet": output("said.parquet"),
        "page": output("said.html"),
        "bank": bank,
        "picture": lambda folder, which: mosaic.save(Image.new("RGB", (9 + which, 9)), folder / "a.png"),
    }
    return cases[request.param]


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES, indirect=True)
def test_killed_at_any_file_operation(case: Write, every: int, child: Any, held_files: Any, tmp_path: Path) -> None:
    folder, before = tmp_path / "out", tmp_path / "before"
    case(folder, OLD)
    shutil.copytree(folder, before)
    old = held_files(folder)
    made = child(lambda: case(folder, NEW) and None, below=folder)
    new = held_files(folder)
    assert made.how == "done" and made.operations >= 2 and set(old) == set(new) and old != new, made
    assert not [path.name for path in folder.rglob(".*")]
    states = []
    for number in range(0, made.operations, every):
        shutil.rmtree(folder)
        shutil.copytree(before, folder)
        assert child(lambda: case(folder, NEW) and None, below=folder, kill_at=number).how == "killed", number
        # Whoever reads several files of a folder calls this first.
        disk.settle(folder)
        found = held_files(folder)
        assert found in (old, new), (number, [name for name in found if found[name] not in (old.get(name), new.get(name))])
        states.append(found == new)
    assert states == sorted(states), "what is new stays"
    assert not states[0]


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_a_write_that_does_not_come_to_its_end(case: Write, child: Any, held_files: Any, tmp_path: Path) -> None:
    """The disk is full at a byte in the middle of the largest file; and the process is killed there."""
    folder = tmp_path / "out"
    case(folder, OLD)
    old = held_files(folder)
    names = [name for name in old if name.split("/")[0] != "checkpoints" and name != "model.safetensors"]
    largest = max(len(old[name]) for name in names or old) // 2
    full = child(lambda: case(folder, NEW) and None, largest=largest)
    assert full.how in ("RunError", "OSError") and "File too large" in full.said, full
    assert held_files(folder) == old and not [path.name for path in folder.rglob(".*")]
    assert child(lambda: case(folder, NEW) and None, largest=largest, kill_when_full=True).how == "killed"
    disk.settle(folder)
    assert held_files(folder) == old


def test_a_mixture_is_settled_by_whoever_reads(two: tuple[Pipeline, Pipeline], child: Any, tmp_path: Path) -> None:
    """Killed after the decision, before the last file was moved: the next reader finds the new ones, of one evaluation."""
    run = tmp_path / "run"
    shutil.copytree(two[0].folder, run)
    for name in ("scores.json", "predictions.parquet", "report.html"):
        (run / disk._NEW).mkdir(exist_ok=True)
        shutil.copy(two[1].folder / name, run / disk._NEW / name)
    (run / disk._NEW / "scores.json").replace(run / "scores.json")
    medxray.load(run)
    for name in ("scores.json", "predictions.parquet", "report.html"):
        assert (run / name).read_bytes() == (two[1].folder / name).read_bytes(), name
    assert not (run / disk._NEW).exists()


def test_a_read_only_place_is_told(two: tuple[Pipeline, Pipeline], child: Any, small_disk: Any) -> None:
    """By the commands themselves: one message, exit code 2, and a run on such a disk can still be read."""
    from typer.testing import CliRunner

    from medxray.cli import app

    where = small_disk("8m")
    shutil.copytree(two[0].folder, where / "run")
    image = where / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)).save(image)
    small_disk("8m", "ro", folder=where)
    run = str(where / "run")
    said = CliRunner().invoke(app, ["predict", run, str(image), "-q"])
    assert said.exit_code == 0 and "image" in said.stdout, said.output
    for command in (
        ["evaluate", run, "--split", "val", "-q"],
        ["predict", run, str(image), "--output", str(where / "said.csv"), "-q"],
        ["export", run, str(where / "exported")],
        ["card", run],
        ["compare", f"one={run}", f"two={two[1].folder}", "--out", str(where / "compared"), "--no-intervals"],
        ["pictures", run, str(image), "--output", str(where / "drawn"), "-q"],
        ["schema", "--out", str(where / "schema.json")],
        ["fit", str(where / "run" / "spec.yaml"), f"output={where / 'other'}", "-q"],
    ):
        told = CliRunner().invoke(app, command)
        assert told.exit_code == 2, (command, told.output, told.exception)
        assert "Read-only file system" in told.stderr and str(where) in told.stderr and "Traceback" not in told.stderr, command


def bits(data: bytes, count: int) -> Iterator[tuple[int, bytes]]:
    """A file with one bit that is another, at places all over it."""
    for place in np.linspace(0, len(data) - 1, count).astype(int).tolist():
        yield place, data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :]


@pytest.mark.parametrize("file", ["model.safetensors", "task.json", "spec.yaml", "predictions.parquet", "references.json"])
def test_a_damaged_run_is_refused_or_says_the_same(file: str, two: tuple[Pipeline, Pipeline], tmp_path: Path) -> None:
    """Never a traceback of a library below, and never another answer; but for settings of a spec that are as good as before."""
    run = tmp_path / "run"
    shutil.copytree(two[0].folder, run)
    good = (run / file).read_bytes()
    image = np.random.default_rng(1).random((48, 48), np.float32)

    def said() -> Any:
        if file == "predictions.parquet":
            return str(medxray.compare([f"one={run}", f"two={two[1].folder}"], intervals=False))
        return medxray.load(run).predict(image)

    expected = said()
    refused = 0
    cases = [*bits(good, 12), *((n, good[:n]) for n in (0, 1, len(good) // 3, len(good) - 1))]
    for place, content in cases:
        (run / file).write_bytes(content)
        try:
            found = said()
        except medxray.MedxrayError as error:
            assert str(run) in str(error) or file == "spec.yaml", (place, error)
            refused += 1
        else:
            assert found == expected or file == "spec.yaml", place
    assert refused >= (1 if file == "references.json" else 4) or file == "references.json"


def test_a_damaged_bank_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bank.arrow"
    rng = np.random.default_rng(0)
    table = {"study_id": [f"study {i}" for i in range(20)], "labels": rng.random((20, 3)).astype(np.float32)}
    features = torch.from_numpy(rng.random((20, 16)).astype(np.float32))
    write_arrow(path, table, features, {"encoder": "a", "positives": 5})
    good = path.read_bytes()
    refused = 0
    for place, content in [*bits(good, 150), *((n, good[:n]) for n in range(0, len(good), 200))]:
        path.write_bytes(content)
        try:
            columns, found, facts = read_arrow(path)
        except medxray.MedxrayError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert torch.equal(found, features) and facts == {"encoder": "a", "positives": 5}, place
            assert columns["study_id"] == table["study_id"] and np.array_equal(columns["labels"], table["labels"]), place
    assert refused > 60
