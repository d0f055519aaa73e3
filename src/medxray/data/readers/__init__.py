"""Data sets -> studies. One file a data set."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from medxray.data.seeds import seed_of
from medxray.registry import Registry, Settings
from medxray.types import DataError, Study


class Locality(NamedTuple):
    """Which images are best read together.

    Attributes:
        parts: (n,) int64, the part of the data set that each lies in, such as a row group.
        window: so many parts are at hand at a time.
    """

    parts: NDArray[np.int64]
    window: int


class Reader(ABC):
    """Reads a data set as its publisher lays it out.

    Args:
        root: folder that every path must stay in.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._real: dict[str, str] = {}

    @abstractmethod
    def read(self) -> Iterable[Study]:
        """All studies in a stable order. `images` are relative to `root`; `report` is raw text, "" for none;
        a label that a study lacks may be left out of `labels`; `split` is train, val or test.

        Raises:
            DataError: with the file, the field and the cure.
        """

    def open(self, image: str) -> Path | bytes:
        """The file of an image as `read` names it, or what such a file would hold.

        Raises:
            ImageError: it cannot be read.
        """
        return self.root / image

    def exists(self, image: str) -> bool:
        """Whether there is something to open; what it holds is not looked at."""
        return os.path.isfile(os.path.join(self.root, image))

    def stamp(self, image: str) -> str:
        """Changes when an image does: its name, and size and time of the file that it lies in."""
        stat = os.stat(os.path.join(self.root, image))
        return f"{image} {stat.st_size} {stat.st_mtime_ns}"

    def locality(self, images: Sequence[str]) -> Locality | None:
        """Which of these images are read together; None where each is a file of its own."""
        return None

    def inside(self, path: str, where: str) -> str:
        """A path as written in a data set -> the same relative to `root`.

        Args:
            path: relative to `root`, or absolute.
            where: file and row that name it, for the message.

        Raises:
            DataError: it leads out of `root`, by `..`, as an absolute path or through a symbolic link.
        """
        if "\0" in path:
            raise DataError(f"{where}: image {path!r} holds a zero byte; mend the path")
        root = self._folder(os.fspath(self.root))
        full = os.path.join(root, path)
        folder, name = os.path.split(full)
        real = os.path.join(self._folder(folder), name)
        if name in ("", ".", "..") or os.path.islink(real):
            real = os.path.realpath(full)
        if not real.startswith(os.path.join(root, "")):
            raise DataError(
                f"{where}: image {path!r} leads to {real}, outside data.reader.root {root}; "
                "keep all images below the root, or set the root to a folder that holds them"
            )
        plain = not os.path.isabs(path) and ".." not in path
        return os.path.normpath(path) if plain else os.path.relpath(real, root)

    def file(self, name: str) -> Path:
        """A table of the data set that must be there.

        Raises:
            DataError: the root or the file is missing.
        """
        if not self.root.is_dir():
            raise DataError(
                f"data.reader.root: no folder {self.root}; expected the data set's folder; check the path "
                f"(it is taken from {Path.cwd()})"
            )
        path = self.root / name
        if not path.is_file():
            found = ", ".join(sorted(p.name for p in self.root.iterdir())[:10]) or "nothing"
            raise DataError(f"{path}: no such file; the folder holds {found}; check data.reader.root")
        return path

    def _folder(self, folder: str) -> str:
        if folder not in self._real:
            self._real[folder] = os.path.realpath(folder)
        return self._real[folder]


class Files(Reader):
    """Images that are files below a root, whatever lists them."""

    def read(self) -> Iterable[Study]:
        """None: it knows of no study."""
        return ()


def split_of(patient: str) -> str:
    """Eight in ten patients to train, one to val, one to test, by a hash of the name alone, so that a patient
    stays where it is when others come or go."""
    tenth = seed_of("split", patient) % 10
    return "train" if tenth < 8 else "val" if tenth == 8 else "test"


def view_of(text: str) -> str:
    """A view as data sets write it -> PA, AP, LL or unknown."""
    word = text.strip().lower()
    if word in ("pa", "ap"):
        return word.upper()
    return "LL" if word in ("ll", "rl", "l", "lat", "lateral", "left lateral", "right lateral") else "unknown"


def frontal_first(images: Sequence[str], views: Sequence[str]) -> tuple[list[str], list[str]]:
    """Images and views with laterals last, else in the order given."""
    order = sorted(range(len(images)), key=lambda i: views[i] == "LL")
    return [images[i] for i in order], [views[i] for i in order]


def read_text(path: Path) -> str:
    """A table's text, with or without a byte order mark.

    Raises:
        DataError: it is not UTF-8; with the first byte that shows it.
    """
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}: expected UTF-8, found byte {data[error.start]:#04x} at offset {error.start} "
            f"(line {line}); save the file as UTF-8"
        ) from None


class ReaderSettings(Settings):
    """What a spec may say of any reader beside its own settings."""

    root: str = Field(description="folder of the data set")


READERS: Registry[Reader] = Registry(
    "reader",
    Reader,  # type: ignore[type-abstract]
    {
        "iu-xray": "medxray.data.readers.iu_xray:IUXRay",
        "csv": "medxray.data.readers.csv:CSV",
        "parquet": "medxray.data.readers.parquet:Parquet",
        "phantom": "medxray.data.readers.phantom:Phantom",
        "webdataset": "medxray.data.readers.webdataset:WebDataset",
    },
    group="medxray.readers",
    context=("root",),
    settings=ReaderSettings,
)
