"""Data sets -> studies. One file a data set."""

import io
import os
import zlib
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

    Attributes:
        left_out: what `read` passed by or doubts, as {study, file, reason}; "" where a row is of many.
        damaged: likewise, what it could not read; an error unless `data.on_error` is "skip".
        mark: changes when `read` calls the same patients otherwise; "" for names that are a data set's own.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._real: dict[str, str] = {}
        self.left_out: list[dict[str, str]] = []
        self.damaged: list[dict[str, str]] = []
        self.mark = ""

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

    def mask(self, image: str) -> NDArray[np.float32] | None:
        """Coverage (h, w) of the whole image by the chest, in [0, 1], where the data set tells it beside the image.

        Raises:
            ImageError: it cannot be read.
        """
        return None

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
            if path.is_dir():
                raise DataError(f"{path}: a folder; expected a file; check data.reader.root")
            found = ", ".join(sorted(p.name for p in self.root.iterdir())[:10]) or "nothing"
            raise DataError(f"{path}: no such file; the folder holds {found}; check data.reader.root")
        return path

    def table(self, *names: str) -> Path:
        """The first of NAME and NAME.gz that is there, name by name: as published, or unpacked.

        Raises:
            DataError: the root or every one of them is missing.
        """
        for name in names:
            for path in (self.root / name, self.root / f"{name}.gz"):
                if path.is_file():
                    return path
        if len(names) == 1:
            return self.file(names[0])
        if self.root.is_dir():
            found = ", ".join(sorted(p.name for p in self.root.iterdir())[:10]) or "nothing"
            raise DataError(
                f"{self.root}: expected one of {', '.join(names)}, plain or with .gz; the folder holds {found}; check "
                "data.reader.root"
            )
        return self.file(names[0])

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


LARGEST_TEXT = 2**32
"""Bytes that a packed table may unpack to."""

_OTHERS = {
    b"\xff\xfe": "UTF-16; save the file as UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "UTF-16; save the file as UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"PK\x03\x04": "a zip archive or an Excel workbook; unpack it, or save its sheet as CSV",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook; save its sheet as CSV",
    b"PAR1": "a Parquet file; choose reader parquet",
    b"<!doctype html": "an HTML page, such as that of a login; fetch the file again",
    b"<html": "an HTML page, such as that of a login; fetch the file again",
    b"version https://git-lfs": "the pointer of a file in Git LFS; fetch it with git lfs pull",
}
"""How files begin that are taken for a table or an annotation, and what each is."""


def read_text(path: Path) -> str:
    """A table's text, packed by gzip or not, with or without a byte order mark.

    Raises:
        DataError: it cannot be read or unpacked, or is not UTF-8, with the first byte that shows it.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its kind and its rights") from None
    if data[:2] == b"\x1f\x8b":
        data = _unpacked(path, data)
    start = data[:64].lstrip().lower()
    for begin, what in _OTHERS.items():
        if data.startswith(begin) or start.startswith(begin):
            raise DataError(f"{path}: expected text in UTF-8, found {what}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}: expected UTF-8, found byte {data[error.start]:#04x} at offset {error.start} "
            f"(line {line}); save the file as UTF-8 (if it is of Windows or Latin-1: iconv -f WINDOWS-1252 -t UTF-8)"
        ) from None
    if (zero := text.find("\0")) >= 0:
        line = text.count("\n", 0, zero) + 1
        wide = "; every second byte is zero, as in UTF-16: save the file as UTF-8" if data[1:64:2].count(0) > 16 else ""
        raise DataError(f"{path}, line {line}: a zero byte; the file is damaged or no text{wide or '; fetch it again'}")
    return text


def _unpacked(path: Path, data: bytes) -> bytes:
    """All members of a gzip file."""
    found = io.BytesIO()
    while data:
        unpacker = zlib.decompressobj(wbits=31)
        try:
            while not unpacker.eof:
                piece = unpacker.decompress(data, 2**24)
                data = unpacker.unconsumed_tail
                found.write(piece)
                # No text shrinks to a four hundredth; deflate's limit is a thousandth.
                if found.tell() > LARGEST_TEXT or found.tell() > max(2**26, 400 * path.stat().st_size):
                    raise DataError(
                        f"{path}: {path.stat().st_size} bytes unpack to more than {found.tell()}, which no table does; "
                        "fetch the file again, or unpack it if it is right"
                    )
                if not (piece or data or unpacker.eof):
                    raise DataError(f"{path}: cut off; the end of the gzip file is missing; fetch it again")
        except zlib.error as error:
            raise DataError(f"{path}: damaged gzip file ({error}); fetch it again") from None
        data = unpacker.unused_data.lstrip(b"\0")
    return found.getvalue()


class ReaderSettings(Settings):
    """What a spec may say of any reader beside its own settings."""

    root: str = Field(description="folder of the data set")


READERS: Registry[Reader] = Registry(
    "reader",
    Reader,  # type: ignore[type-abstract]
    {
        "iu-xray": "medxray.data.readers.iu_xray:IUXRay",
        "mimic-cxr": "medxray.data.readers.mimic_cxr:MIMICCXR",
        "chexpert": "medxray.data.readers.chexpert:CheXpert",
        "chexpert-plus": "medxray.data.readers.chexpert_plus:CheXpertPlus",
        "csv": "medxray.data.readers.csv:CSV",
        "dicom-folder": "medxray.data.readers.dicom_folder:DicomFolder",
        "parquet": "medxray.data.readers.parquet:Parquet",
        "huggingface": "medxray.data.readers.huggingface:HuggingFace",
        "nih-chestxray14": "medxray.data.readers.nih_chestxray14:NIHChestXray14",
        "rsna-pneumonia": "medxray.data.readers.rsna_pneumonia:RSNAPneumonia",
        "vindr-cxr": "medxray.data.readers.vindr_cxr:VinDrCXR",
        "padchest": "medxray.data.readers.padchest:PadChest",
        "phantom": "medxray.data.readers.phantom:Phantom",
        "webdataset": "medxray.data.readers.webdataset:WebDataset",
    },
    group="medxray.readers",
    context=("root",),
    settings=ReaderSettings,
)
