"""The making of shards under faults; what is there already is in tests/data/test_prepare.py."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medxray.data import prepare
from medxray.data.phantom import generate
from medxray.data.prepare import data_of, verify_shards, write_shards


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(tmp_path_factory.mktemp("source") / "data", studies=20, size=64, seed=5, progress=False)


def write(root: Path, out: Path, *settings: str, **more: Any) -> None:
    data = data_of("csv", [f"reader.root={root}", "image_size=40", *settings])[0].data
    write_shards(data, out, **{"studies": 4, "workers": 1, **more})


@pytest.fixture(scope="module")
def whole(source: Path, held_files: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    write(source, out)
    return dict(held_files(out))


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that are there at once."""
    monkeypatch.setattr(prepare, "get_context", lambda _: multiprocessing.get_context("fork"))


def slow(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    own = prepare._image

    def image(*arguments: Any) -> Any:
        time.sleep(seconds)
        return own(*arguments)

    monkeypatch.setattr(prepare, "_image", image)


def with_workers(act: Callable[[int], Any]) -> Callable[[int], None]:
    """Does something to each worker of a child, once there are any."""

    def watch(child: int) -> None:
        def run() -> None:
            listed = Path(f"/proc/{child}/task/{child}/children")
            with contextlib.suppress(OSError):
                while not (workers := listed.read_text().split()):
                    time.sleep(0.005)
                time.sleep(0.2)
                for worker in workers:
                    with contextlib.suppress(ProcessLookupError):
                        act(int(worker))

        threading.Thread(target=run, daemon=True).start()

    return watch


def test_killed_in_the_middle_of_a_write(child: Any, held_files: Any, source: Path, whole: Any, tmp_path: Path) -> None:
    """The kernel kills at a byte of the largest shard; of it nothing is seen, and the others are as they were."""
    out = tmp_path / "out"
    size = sorted(len(data) for name, data in whole.items() if name.endswith(".parquet"))[-1]
    assert child(lambda: write(source, out), largest=size - 1, kill_when_full=True).how == "killed"
    found = held_files(out)
    assert "manifest.json" not in found and all(whole[name] == data for name, data in found.items())
    assert child(lambda: write(source, out)).how == "done" and held_files(out) == whole


def test_a_full_disk(child: Any, held_files: Any, source: Path, whole: Any, small_disk: Any) -> None:
    """A disk with room for half of the shards. With more room the same command goes on."""
    size = sum(map(len, whole.values()))
    where = small_disk(size // 2)
    full = child(lambda: write(source, where / "out"))
    assert full.how == "DataError" and "No space left on device" in full.said and "make room" in full.said, full
    kept = held_files(where / "out")
    assert kept and all(whole[name] == data for name, data in kept.items())
    small_disk(4 * size + 2**20, folder=where)
    assert child(lambda: write(source, where / "out")).how == "done" and held_files(where / "out") == whole


def test_a_read_only_disk(child: Any, source: Path, small_disk: Any) -> None:
    where = small_disk("4m")
    small_disk("4m", "ro", folder=where)
    told = child(lambda: write(source, where / "out"))
    assert told.how == "DataError" and "Read-only file system" in told.said and "name another folder" in told.said, told


def test_a_worker_is_killed(
    child: Any, held_files: Any, forked: None, source: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the system does when memory ends: the run says so within seconds, and keeps the shards that are whole."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        slow(patch, 0.05)
        kill = with_workers(lambda worker: os.kill(worker, signal.SIGKILL))
        ended = child(lambda: write(source, out, workers=2), meanwhile=kill, within=60)
    assert ended.how == "DataError" and "a worker process died, perhaps for want of memory" in ended.said, ended
    assert "to go on" in ended.said and ended.seconds < 30
    assert all(whole[name] == data for name, data in held_files(out).items())
    assert child(lambda: write(source, out)).how == "done" and held_files(out) == whole


def test_a_worker_without_memory_loses_no_image(
    child: Any, forked: None, large: tuple[Path, str], memory: Callable[[int], None], tmp_path: Path, monkeypatch: Any
) -> None:
    """It may take 24 MB more when it comes to an image that takes 125. The image is not left out as a damaged one is, which
    `on_error: skip` would do for good."""
    out, (root, name) = tmp_path / "out", large
    own = prepare._image

    def image(job: Any, which: str, view: str) -> Any:
        if which == name:
            memory(24 * 2**20)
        return own(job, which, view)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_image", image)
        ended = child(lambda: write(root, out, "on_error=skip", "max_studies=9", workers=2), within=120)
    assert ended.how in ("RunError", "DataError") and "memory" in ended.said, ended
    assert child(lambda: write(root, out, "on_error=skip", "max_studies=9")).how == "done"
    found = verify_shards(out)
    assert found["skipped"] == [] and found["studies"] == 3 * 9


def test_a_data_set_that_is_deleted_meanwhile(
    child: Any, held_files: Any, source: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names the image. Once the data set is there again the same command goes on."""
    out, root = tmp_path / "out", tmp_path / "data"
    shutil.copytree(source, root)
    own, seen = prepare._image, [0]

    def image(*arguments: Any) -> Any:
        seen[0] += 1
        if seen[0] == 9:
            root.rename(tmp_path / "gone")
        return own(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_image", image)
        ended = child(lambda: write(root, out))
    assert ended.how == "ImageError" and str(root) in ended.said and "no such file" in ended.said, ended
    (tmp_path / "gone").rename(root)
    assert held_files(out)
    assert child(lambda: write(root, out)).how == "done"
    shards = {name: data for name, data in held_files(out).items() if name.endswith(".parquet")}
    assert shards == {name: data for name, data in whole.items() if name.endswith(".parquet")}


def test_a_clock_that_jumps(child: Any, held_files: Any, source: Path, whole: Any, tmp_path: Path) -> None:
    """No byte of a shard or of the manifest hangs on what time it is."""
    own, state = time.time, [0]

    def now() -> float:
        state[0] += 1
        return own() + (-1) ** state[0] * 10**8

    def jumped() -> None:
        time.time = now
        write(source, tmp_path / "out")

    assert child(jumped).how == "done" and held_files(tmp_path / "out") == whole
