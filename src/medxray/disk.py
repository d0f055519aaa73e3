"""What is written is the old or the new, never half; one process at a time writes to a folder; a file that does not answer is
named."""

import _thread
import contextlib
import errno
import hashlib
import os
import re
import shutil
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from medxray.types import RunError

SLOW = 60.0
"""Seconds after which a file that is still being read is named."""

LOCK = ".lock"
_NEW = ".new"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` for a file to be written to, which takes its place, flushed, when nothing was raised."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with _refusals():
            yield staged
        flush(staged)
        staged.replace(path)
    finally:
        with contextlib.suppress(OSError):
            staged.unlink(missing_ok=True)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """What the system refuses, as OSError, for which safetensors has an error of its own."""
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from error


def write(path: Path, text: str) -> None:
    """Writes a text file: the old one or the new one stays.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as staged:
        staged.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing_together(folder: Path) -> Iterator[Path]:
    """A folder for files to be written to, which take the places of those of the same names in `folder` all or none.

    One renaming decides; what is left to be moved after it is moved by `settle`, even if this process is killed.

    Args:
        folder: made if need be; its other files stay.
    """
    settle(folder)
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    staged = folder / f"{_NEW}.{os.getpid()}"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    try:
        with _refusals():
            yield staged
        for path in staged.rglob("*"):
            flush(path)
        staged.rename(folder / _NEW)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        if new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    flush(folder)
    settle(folder)


def settle(folder: Path) -> None:
    """Ends what `replacing_together` had decided when its process was killed; to be called before such files are read."""
    new = folder / _NEW
    for path in sorted(new.rglob("*")) if new.is_dir() else ():
        target = folder / path.relative_to(new)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        else:
            # Another process may do the same.
            with contextlib.suppress(FileNotFoundError):
                path.replace(target)
    shutil.rmtree(new, ignore_errors=True)


def remove(folder: Path) -> None:
    """Deletes a folder. It is renamed first, so that a kill leaves none of that name and not half of one; what it leaves beside
    is deleted by the next call.

    Raises:
        OSError: it cannot be renamed.
    """
    for half in folder.parent.glob(f".{folder.name}.*"):
        if is_left(half):
            shutil.rmtree(half, ignore_errors=True)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    folder.rename(aside)
    shutil.rmtree(aside)


def flush(path: Path) -> None:
    """Has a file, or a folder's list of files, on the disk."""
    if os.name == "nt" and path.is_dir():
        return
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock(file: IO[str]) -> bool:
    """Locks an open file against other processes, until it is closed; False where another one holds it. Where the system or
    its disk knows no locks nothing is held against anybody."""
    try:
        import fcntl

        # A process's own: those that it has forked do not hold it on after a kill, as they would a flock.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return True
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
    return True


@contextlib.contextmanager
def held(folder: Path, doing: str) -> Iterator[None]:
    """The folder, made if need be, held against other processes that write to it; what killed ones have left half is removed.

    Args:
        folder: gets a file .lock meanwhile.
        doing: what a second process would spoil, for the message, such as "fit".

    Raises:
        RunError: another process holds it, or it cannot be written.
    """
    path, new = folder / LOCK, not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise RunError(f"folder {folder} cannot be written: {error.strerror}; free some space, or name another") from error
    with file:
        # The former holder may just have removed the file that was opened.
        if not lock(file) or not _is_named(file, path):
            raise RunError(
                f"{folder}: another process writes to it; wait for it or stop it, or name another folder to {doing} as well"
            )
        for half in folder.glob(".*"):
            if half != path and is_left(half):
                shutil.rmtree(half, ignore_errors=True) if half.is_dir() else half.unlink(missing_ok=True)
        try:
            yield
        finally:
            # What went wrong before is told, not that this cannot be removed either.
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
                if new:
                    # Where nothing came of it nothing is left.
                    folder.rmdir()


def _is_named(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def is_left(path: Path) -> bool:
    """Whether it is a lock, or what a process was writing that is no more."""
    if path.name == LOCK:
        return True
    made = re.fullmatch(r"\..+\.(\d+)", path.name)
    if made is None:
        return False
    try:
        os.kill(int(made[1]), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    return False


def reserve(path: Path) -> None:
    """Has room on the disk for all of a file that is mapped into memory, where a write without room would end the process.

    Raises:
        OSError: there is none.
    """
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


_reading: dict[int, tuple[str, float]] = {}
_watching = 0


@contextlib.contextmanager
def watched(name: str) -> Iterator[None]:
    """Warns of a file by name when it is still being read after `SLOW` seconds, as on a file server that is gone. The read goes
    on: the system cannot break it off."""
    global _watching
    # A forked process has no threads.
    if _watching != os.getpid():
        _reading.clear()
        # A `threading.Thread` waits for its beginning, which never comes where there is no memory.
        with contextlib.suppress(RuntimeError, MemoryError):
            _thread.start_new_thread(_tell_of_slow_ones, ())
            _watching = os.getpid()
    thread = threading.get_ident()
    _reading[thread] = name, time.monotonic()
    try:
        yield
    finally:
        _reading.pop(thread, None)


def _tell_of_slow_ones() -> None:
    told: set[tuple[str, float]] = set()
    while True:
        time.sleep(SLOW / 10)
        slow = {(name, since) for name, since in list(_reading.values()) if time.monotonic() - since > SLOW}
        for name, since in sorted(slow - told):
            seconds = time.monotonic() - since
            warnings.warn(
                f"{name} has not answered for {seconds:.0f} s; is its disk or server still there? waiting", stacklevel=1
            )
        told = slow
