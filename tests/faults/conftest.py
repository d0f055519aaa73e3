"""Faults injected for real, mostly into a forked child: killed at one of its file operations or in the middle of a write, out
of disk, without rights to write, out of memory."""

import contextlib
import gc
import os
import pickle
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import medxray
from medxray.pipeline import Pipeline

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Ended(NamedTuple):
    """How a child ended: "done", "killed", or the name of the exception's type; what that said, or what the work returned; how
    many operations changed the folder; what it warned of; how long it took in seconds."""

    how: str
    said: Any = ""
    operations: int = 0
    warned: str = ""
    seconds: float = 0.0


Work = Callable[[], Any]


def attempt(
    work: Work,
    *,
    below: Path | None = None,
    kill_at: int | None = None,
    largest: int | None = None,
    kill_when_full: bool = False,
    within: float = 120,
    meanwhile: Callable[[int], None] | None = None,
) -> Ended:
    """Runs work in a forked child.

    Args:
        below: operations that change this folder are counted: opening to write, making, renaming, removing.
        kill_at: SIGKILL takes the place of the operation of that number, from 0 on.
        largest: bytes of a file; a write goes up to there, and the next one fails as on a full disk (EFBIG).
        kill_when_full: that write kills (SIGXFSZ), so that the file stays half written.
        within: seconds, after which the child hangs.
        meanwhile: called with the child's number, once it runs.
    """
    receive, send = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(receive)
        _child(work, send, below, kill_at, largest, kill_when_full)
    os.close(send)
    if meanwhile is not None:
        meanwhile(child)
    content, end = b"", started + within
    while True:
        ready, _, _ = select.select([receive], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail(f"hangs: nothing ended within {within} s")
        part = os.read(receive, 2**16)
        if not part:
            break
        content += part
    os.close(receive)
    status, seconds = os.waitpid(child, 0)[1], time.monotonic() - started
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXFSZ), f"died by signal {os.WTERMSIG(status)}"
        return Ended("killed", seconds=seconds)
    return Ended(*pickle.loads(content), seconds)


def _child(
    work: Work,
    send: int,
    below: Path | None,
    kill_at: int | None,
    largest: int | None,
    kill_when_full: bool,
) -> None:
    operations, counting = 0, True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal operations
        if not counting or event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate"):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITES):
            return
        if not any(str(path).startswith(str(below)) for path in arguments[:2]):
            return
        if operations == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        operations += 1

    told: tuple[Any, ...]
    # What is there already is not looked through: that would copy its memory.
    gc.freeze()
    try:
        torch.set_num_threads(1)
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        if below is not None:
            sys.addaudithook(watch)
        if largest is not None:
            # Python ignores the signal, so that a write fails.
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kill_when_full else signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                how, said = "done", work()
            except BaseException as error:
                how, said = type(error).__name__, str(error)
        counting = False
        told = (how, said, operations, "\n".join(str(one.message) for one in caught))
    except BaseException as error:
        told = ("the test itself", repr(error), operations, "")
    with open(send, "wb") as file:
        file.write(pickle.dumps(told))
    os._exit(0)


@pytest.fixture(scope="session")
def child() -> Callable[..., Ended]:
    """`attempt`."""
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    return attempt


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file that has a name of its own, not one of work under way."""
    found = {}
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            found[str(name)] = path.read_bytes()
    return found


@pytest.fixture(scope="session")
def held_files() -> Callable[[Path], dict[str, bytes]]:
    """`files_of`."""
    return files_of


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a disk of some bytes; called with its folder again, changes its size or has it read only."""
    mounted: list[Path] = []

    def mount(size: int | str = "1m", options: str = "", folder: Path | None = None) -> Path:
        where = folder or tmp_path / f"disk{len(mounted)}"
        where.mkdir(exist_ok=True)
        again = ["-o", "remount"] if where in mounted else []
        more = ["-o", options] if options else []
        command = ["mount", "-t", "tmpfs", *again, "-o", f"size={size}", *more, "tmpfs", str(where)]
        done = subprocess.run(command, capture_output=True)
        if done.returncode:
            pytest.skip("mounting takes root, or a container that may mount")
        mounted.append(where)
        return where

    if shutil.which("mount") is None:
        pytest.skip("this system has no mount")
    yield mount
    for where in dict.fromkeys(mounted):
        # A test may have mounted more upon it.
        while os.path.ismount(where):
            subprocess.run(["umount", "-l", str(where)], check=True)


@pytest.fixture(scope="session")
def spec(phantom: Path) -> Callable[..., dict[str, Any]]:
    """A fit of a second: nine steps of masked auto-encoding with three checkpoints."""

    def make(output: Path, **sections: Any) -> dict[str, Any]:
        made: dict[str, Any] = {
            "task": "pretrain",
            "name": "fault",
            "seed": 5,
            "output": str(output),
            "data": {"image_size": 32, "reader": {"name": "csv", "root": str(phantom)}, "max_studies": 48, "crop": 0.7},
            "encoder": {"name": "vit", "width": 16, "depth": 1, "heads": 2, "patch": 8},
            "masker": {"name": "random"},
            "pixel_decoder": {"name": "cross-attention", "dim": 16, "depth": 1, "heads": 2},
            "training": {
                "steps": 9, "batch_size": 4, "learning_rate": 1e-2, "log_steps": 3, "evaluate_steps": 3, "save_steps": 3,
                "validation_studies": 4, "keep_checkpoints": 2, "pictures": 0,
            },
        }  # fmt: skip
        for section, values in sections.items():
            made[section] = {**made[section], **values} if isinstance(made.get(section), dict) else values
        return made

    return make


@pytest.fixture(scope="session")
def unbroken(spec: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """The fit that nothing disturbed."""
    return medxray.build(spec(tmp_path_factory.mktemp("unbroken") / "run")).fit(progress=False)


@pytest.fixture(scope="session")
def same_as(unbroken: Pipeline) -> Callable[[Path], bool]:
    """Whether a run's weights and log are those of the undisturbed one, to the bit."""

    def compare(folder: Path) -> bool:
        names = ("model.safetensors", "log.jsonl")
        return all((folder / name).read_bytes() == (unbroken.folder / name).read_bytes() for name in names)

    return compare


@pytest.fixture
def large(phantom: Path, tmp_path: Path) -> tuple[Path, str]:
    """A data set one of whose images takes 125 MB when it is read, and that image."""
    from PIL import Image

    root = tmp_path / "large"
    shutil.copytree(phantom, root)
    name = "images/S000003_PA.png"
    assert (root / name).is_file()
    Image.fromarray(np.eye(5000, dtype=np.uint8)).save(root / name, compress_level=1)
    return root, name


def limit(more: int) -> None:
    """Leaves this process so many bytes of address space beside what it has."""
    own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (own + more, own + more))


@pytest.fixture(scope="session")
def memory() -> Callable[[int], None]:
    """`limit`."""
    return limit


@pytest.fixture
def leased() -> Iterator[Callable[..., Any]]:
    """Keeps whoever opens a file waiting for some seconds, as a file server that is gone: the kernel asks the holder of a lease
    first."""
    import fcntl

    children: list[int] = []

    def lease(path: Path, seconds: float) -> None:
        ready, told = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                asked: list[int] = []
                signal.signal(signal.SIGIO, lambda number, _: asked.append(number))
                file = os.open(path, os.O_RDWR)
                fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
                os.write(told, b"x")
                while not asked:
                    time.sleep(0.02)
                time.sleep(seconds)
            finally:
                os._exit(0)
        children.append(child)
        os.close(told)
        got = os.read(ready, 1)
        os.close(ready)
        if not got:
            pytest.skip("this file system knows no leases")

    yield lease
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
