"""A fit under faults: what was saved is there, the message names what is wrong, and the next fit ends as if nothing had been."""

import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import medxray
from medxray import disk
from medxray.data import StudyImages
from medxray.pipeline import Pipeline
from medxray.training import Fitter

Spec = Callable[..., dict[str, Any]]
SLOW = pytest.mark.slow


def fit(settings: dict[str, Any], **more: Any) -> str:
    return str(medxray.build(settings).fit(progress=False, **more).folder)


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], Any]) -> None:
    """Does something before a step, from 0 on."""
    step = Fitter.training_step

    def training_step(self: Fitter, *arguments: Any, **named: Any) -> Any:
        if self.state.global_step == number:
            act()
        return step(self, *arguments, **named)

    monkeypatch.setattr(Fitter, "training_step", training_step)


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir())


@pytest.mark.parametrize("start", [pytest.param(n, marks=SLOW if n != 5 else ()) for n in range(17)])
def test_killed_at_a_file_operation(
    start: int, child: Any, spec: Spec, same_as: Any, unbroken: Pipeline, tmp_path: Path
) -> None:
    """Every operation that changes the run folder is once the last, a share of them in a hurry; another fit follows each."""
    run = tmp_path / "run"
    count = child(lambda: fit(spec(run)), below=run).operations
    assert same_as(run) and count > 40
    for number in range(start, count, 17):
        shutil.rmtree(run)
        assert child(lambda: fit(spec(run)), below=run, kill_at=number).how == "killed", number
        ended = child(lambda: fit(spec(run)))
        assert ended.how == "done", (number, ended)
        assert same_as(run), number
        # A finished run is only read by the second fit: the lock of the first stays, and locks nobody out.
        left = [path.name for path in run.rglob(".*") if path.name != disk.LOCK]
        assert not left, (number, left)


def test_killed_in_the_middle_of_a_write(child: Any, spec: Spec, same_as: Any, unbroken: Pipeline, tmp_path: Path) -> None:
    """The kernel kills at a byte: of the weights, of a checkpoint's optimiser."""
    sizes = {path.name: path.stat().st_size for path in unbroken.folder.rglob("*") if path.is_file()}
    for name, of in (("model.safetensors", 0.5), ("optimizer.pt", 0.9)):
        run = tmp_path / name
        assert child(lambda: fit(spec(run)), largest=int(sizes[name] * of), kill_when_full=True).how == "killed"  # noqa: B023
        assert not any((run / "checkpoints").glob("step-*")), name
        assert child(lambda: fit(spec(run))).how == "done" and same_as(run), name  # noqa: B023


def test_a_full_disk(child: Any, spec: Spec, same_as: Any, small_disk: Any) -> None:
    """The second checkpoint does not fit. With more room the fit goes on from the first."""
    where = small_disk("260k")
    run = where / "run"
    ended = child(lambda: fit(spec(run)))
    assert ended.how == "RunError" and str(run / "checkpoints") in ended.said, ended
    assert "0.0 MiB are free" in ended.said or "No space left on device" in ended.said, ended
    assert "what was saved before is whole" in ended.said and "fit again to go on" in ended.said
    assert checkpoints(run) == ["step-00000003"]
    small_disk("4m", folder=where)
    assert child(lambda: fit(spec(run))).how == "done"
    assert same_as(run)


@pytest.mark.parametrize("file", ["spec.yaml", "optimizer.pt", pytest.param("model.safetensors", marks=SLOW)])
def test_a_disk_that_takes_no_more(file: str, child: Any, spec: Spec, same_as: Any, unbroken: Pipeline, tmp_path: Path) -> None:
    """As a quota, at a byte of one file or another."""
    run = tmp_path / "run"
    size = next(path for path in sorted(unbroken.folder.rglob(file))).stat().st_size
    ended = child(lambda: fit(spec(run)), largest=size // 2)
    assert ended.how == "RunError" and str(run) in ended.said and "some space" in ended.said, ended
    assert file == "optimizer.pt" or "File too large" in ended.said, ended
    assert child(lambda: fit(spec(run))).how == "done" and same_as(run)


def test_a_read_only_disk(child: Any, spec: Spec, same_as: Any, small_disk: Any) -> None:
    """From the start, and from a step on, as a server remounts after an error."""
    where = small_disk("4m")
    run = where / "run"
    small_disk("4m", "ro", folder=where)
    ended = child(lambda: fit(spec(run)))
    assert ended.how == "RunError" and f"{run} cannot be written: Read-only file system" in ended.said, ended

    def remounted() -> Any:
        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, 5, lambda: cover(where))
            return fit(spec(run))

    def cover(folder: Path) -> None:
        """As it is, but read only; files that are open already stay as they were."""
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)

    small_disk("4m", "rw", folder=where)
    ended = child(remounted)
    assert ended.how == "RunError" and "Read-only file system; what was saved before is whole" in ended.said, ended
    subprocess.run(["umount", "-l", where], check=True)
    assert checkpoints(run) == ["step-00000003"]
    assert child(lambda: fit(spec(run))).how == "done" and same_as(run)


def loaders(parent: int) -> list[int]:
    """Processes that read images for another."""
    return [int(number) for number in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def test_a_loading_process_is_killed(child: Any, spec: Spec, same_as: Any, tmp_path: Path) -> None:
    """As the system does when memory ends: the fit says so within seconds, names the process, and goes on when asked."""
    run = tmp_path / "run"

    def killed() -> Any:
        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, 5, lambda: os.kill(loaders(os.getpid())[0], signal.SIGKILL))
            return fit(spec(run, data={"workers": 2}))

    ended = child(killed, within=60)
    assert ended.how == "RunError" and "a process that reads images died" in ended.said, ended
    assert "pid " in ended.said and "memory" in ended.said and "data.workers" in ended.said and ended.seconds < 30, ended
    assert checkpoints(run) == ["step-00000003"]
    assert child(lambda: fit(spec(run, data={"workers": 2}))).how == "done" and same_as(run)


def test_a_loading_process_is_out_of_memory(
    child: Any, spec: Spec, large: tuple[Path, str], memory: Callable[[int], None], tmp_path: Path
) -> None:
    """It may take 24 MB more when it comes to an image that takes 125: that is not called damaged, nor left out."""
    run, (root, name) = tmp_path / "run", large
    data = {"workers": 1, "on_error": "skip", "reader": {"name": "csv", "root": str(root)}}
    settings = spec(run, data=data)
    pipeline = medxray.build(settings)
    assert any(name in images for images in pipeline.studies.splits["train"]["images"])
    read = StudyImages.read

    def starved() -> Any:
        def short(self: StudyImages, image: str, *arguments: Any) -> Any:
            if image == name and torch.utils.data.get_worker_info() is not None:
                memory(24 * 2**20)
            return read(self, image, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StudyImages, "read", short)
            return fit(settings)

    ended = child(starved)
    assert ended.how == "RunError" and "memory" in ended.said and "damaged or truncated" not in ended.said, ended
    assert child(lambda: fit(settings)).how == "done" and (run / "model.safetensors").is_file()


def test_out_of_memory_in_a_step(child: Any, spec: Spec, same_as: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def starved() -> Any:
        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, 5, lambda: torch.empty(2**45))
            return fit(spec(run))

    ended = child(starved)
    assert ended.how == "RunError" and "memory" in ended.said and "training.batch_size" in ended.said, ended
    assert "step-00000003" in ended.said and checkpoints(run) == ["step-00000003"]
    assert child(lambda: fit(spec(run))).how == "done" and same_as(run)


def test_a_file_that_does_not_answer_is_named(
    child: Any, spec: Spec, same_as: Any, leased: Any, phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An open that waits, as on a file server that is gone for a while: the fit tells which file it is, waits, and learns the
    same."""
    monkeypatch.setattr(disk, "SLOW", 0.5)
    run, root = tmp_path / "run", tmp_path / "data"
    shutil.copytree(phantom, root)
    settings = spec(run, data={"image_size": 32, "reader": {"name": "csv", "root": str(root)}, "max_studies": 48})
    pipeline = medxray.build(settings)
    image = root / pipeline.studies.splits["train"]["images"][3][0]
    leased(image, 3)
    ended = child(lambda: fit(settings))
    assert ended.how == "done" and f"{image} has not answered for" in ended.warned, ended
    assert same_as(run)


@pytest.mark.parametrize("jump", [-(10**8), pytest.param(10**8, marks=SLOW)])
def test_a_clock_that_jumps(jump: int, child: Any, spec: Spec, same_as: Any, tmp_path: Path) -> None:
    """By three years, backwards or forwards, in the middle of a fit and again between two."""
    run = tmp_path / "run"
    own = time.time

    def jumped(kill: bool) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            def act() -> None:
                patch.setattr(time, "time", lambda: own() + jump)

            def end() -> None:
                act()
                raise KeyboardInterrupt

            at_step(patch, 5, end if kill else act)
            return fit(spec(run))

    assert child(lambda: jumped(True)).how == "KeyboardInterrupt" and checkpoints(run) == ["step-00000003"]
    assert child(lambda: jumped(False)).how == "done" and same_as(run)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[: len(data) * 2 // 3],
    "empty": lambda data: b"",
    "a bit": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :],
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"])
def test_a_damaged_checkpoint_is_named(
    file: str, damage: str, child: Any, spec: Spec, same_as: Any, interrupted: Path, tmp_path: Path
) -> None:
    """Cut, emptied, or with one bit that is another, which no format of these files would notice. The one before it is whole."""
    run = tmp_path / "run"
    shutil.copytree(interrupted, run)
    path = run / "checkpoints" / "step-00000006" / file
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    ended = child(lambda: fit(spec(run)))
    assert ended.how == "RunError" and str(path) in ended.said and "delete this checkpoint" in ended.said, ended
    if damage == "a bit" and file == "optimizer.pt":
        shutil.rmtree(path.parent)
        assert child(lambda: fit(spec(run))).how == "done" and same_as(run)


@pytest.fixture(scope="module")
def interrupted(spec: Spec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped at its eighth step, with the checkpoints of the third and the sixth."""
    run = tmp_path_factory.mktemp("interrupted") / "run"

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 7, stop)
        with pytest.raises(KeyboardInterrupt):
            fit(spec(run))
    assert checkpoints(run) == ["step-00000003", "step-00000006"]
    return run


def test_two_processes_and_one_folder(child: Any, spec: Spec, same_as: Any, tmp_path: Path) -> None:
    """The second is refused while the first one fits, and spoils nothing."""
    run, refused = tmp_path / "run", []
    (tmp_path / "go").mkdir()

    def slow() -> Any:
        with pytest.MonkeyPatch.context() as patch:
            def wait() -> None:
                (tmp_path / "reached").touch()
                while (tmp_path / "go").exists():
                    time.sleep(0.01)

            at_step(patch, 4, wait)
            return fit(spec(run))

    def second(_: int) -> None:
        while not (tmp_path / "reached").exists():
            time.sleep(0.01)
        refused.append(child(lambda: fit(spec(run))))
        refused.append(child(lambda: fit(spec(run), fresh=True)))
        (tmp_path / "go").rmdir()

    assert child(slow, meanwhile=second).how == "done"
    for ended in refused:
        assert ended.how == "RunError" and f"{run}: another process writes to it" in ended.said, ended
    assert same_as(run)


def test_killed_while_a_run_is_deleted(child: Any, spec: Spec, same_as: Any, unbroken: Pipeline, tmp_path: Path) -> None:
    """`fresh` gives up the former run whole or not at all: what stays is that run, or can be fitted again."""
    run = tmp_path / "run"
    shutil.copytree(unbroken.folder, run)
    count = child(lambda: fit(spec(run), fresh=True), below=tmp_path).operations
    assert count > 20
    for number in (1, 2, 3, 7, 15):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(unbroken.folder, run)
        assert child(lambda: fit(spec(run), fresh=True), below=tmp_path, kill_at=number).how == "killed", number
        ended = child(lambda: fit(spec(run)))
        assert ended.how == "done" and same_as(run), (number, ended)


@pytest.mark.parametrize("what", ["run", "data"])
def test_a_folder_that_is_deleted_meanwhile(what: str, child: Any, spec: Spec, phantom: Path, tmp_path: Path) -> None:
    run, root = tmp_path / "run", tmp_path / "data"
    shutil.copytree(phantom, root)
    settings = spec(run, data={"reader": {"name": "csv", "root": str(root)}})

    def deleted() -> Any:
        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, 4, lambda: shutil.rmtree(run if what == "run" else root))
            return fit(settings)

    ended = child(deleted)
    if what == "run":
        assert ended.how == "RunError" and str(run) in ended.said and "No such file or directory" in ended.said, ended
    else:
        assert ended.how == "ImageError" and str(root) in ended.said and "no such file" in ended.said, ended
        assert checkpoints(run) == ["step-00000003"]


def test_a_file_that_goes_is_named_through_a_loading_process(child: Any, spec: Spec, phantom: Path, tmp_path: Path) -> None:
    """The same words as without processes, not a traceback of another process."""
    run, root = tmp_path / "run", tmp_path / "data"
    shutil.copytree(phantom, root)
    settings = spec(run, data={"reader": {"name": "csv", "root": str(root)}, "workers": 1})

    def deleted() -> Any:
        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, 2, lambda: shutil.rmtree(root))
            return fit(settings)

    ended = child(deleted)
    assert ended.how == "ImageError" and ended.said.startswith(str(root)) and "Traceback" not in ended.said, ended


@pytest.mark.parametrize("how", ["half a line", pytest.param("no text", marks=SLOW), pytest.param("a bit", marks=SLOW)])
def test_a_damaged_log_is_cut_where_a_run_goes_on(how: str, child: Any, spec: Spec, interrupted: Path, tmp_path: Path) -> None:
    """Of a finished run it is named, and no scores are written without it."""
    run = tmp_path / "run"
    shutil.copytree(interrupted, run)
    log = run / "log.jsonl"

    def damage() -> None:
        lines = log.read_bytes().splitlines(keepends=True)
        if how == "half a line":
            log.write_bytes(b"".join(lines)[:-20])
        elif how == "no text":
            log.write_bytes(b"".join(lines[:-1]) + b"\xff\xfe\xfd\n")
        else:
            log.write_bytes(lines[0][:1] + bytes([lines[0][1] ^ 4]) + lines[0][2:] + b"".join(lines[1:]))

    damage()
    assert child(lambda: fit(spec(run))).how == "done"
    assert all("step" in json.loads(line) for line in log.read_text().splitlines())
    damage()
    ended = child(lambda: medxray.load(run).evaluate("val", progress=False) and None)
    assert ended.how == "RunError" and str(log) in ended.said, ended
    assert not (run / "scores.json").exists()


def test_killed_with_loading_processes_and_started_at_once(child: Any, spec: Spec, same_as: Any, tmp_path: Path) -> None:
    """Those outlive it by some seconds, and do not hold the folder against the next fit."""
    run = tmp_path / "run"
    settings = spec(run, data={"workers": 2})

    def killed() -> Any:
        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, 5, lambda: os.kill(os.getpid(), signal.SIGKILL))
            return fit(settings)

    assert child(killed).how == "killed"
    assert child(lambda: fit(settings)).how == "done" and same_as(run)


@pytest.mark.slow
def test_killed_at_random_moments_with_loading_processes(child: Any, spec: Spec, same_as: Any, tmp_path: Path) -> None:
    """Twenty kills of a fit that reads by two processes; none of them outlives it, and the end is the same."""
    chance, run = random.Random(3), tmp_path / "run"
    settings = spec(run, data={"workers": 2})
    whole = child(lambda: fit(settings)).seconds
    assert same_as(run)
    for _ in range(20):
        shutil.rmtree(run)

        def kill(number: int) -> None:
            def act() -> None:
                os.kill(number, signal.SIGKILL)

            threading.Timer(chance.uniform(0.1, 0.9) * whole, act).start()

        if child(lambda: fit(settings), meanwhile=kill).how == "killed":
            assert child(lambda: fit(settings)).how == "done"
        assert same_as(run)
