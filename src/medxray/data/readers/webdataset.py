"""WebDataset: tar archives whose members of one name are one sample, 0001.png beside 0001.json."""

import hashlib
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as arrow
from pyarrow import parquet

from medxray.cache import cache_folder
from medxray.data.readers import Locality
from medxray.data.readers.shards import IMAGE, Shards, words
from medxray.types import DataError, ImageError

IMAGES = {"png", "jpg", "jpeg", "tif", "tiff", "jp2", "bmp", "dcm", "dicom"}
TEXTS = {"json", "txt", "cls"}
PART_BYTES, WINDOW = 2**24, 64
"""Bytes of a shard that are read together, and how many such parts at a time: what a page cache holds."""

_PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_BLOCK = 512


class _Member(NamedTuple):
    name: str
    offset: int
    size: int
    text: bytes | None  # of a small member that is no image


class WebDataset(Shards):
    """Tar archives of samples: the members of one name up to the first dot. `png`, `jpg`, `tif`, `jp2` or `dcm` are
    images, `json` an object of what a table's row would hold, `txt` a report and `cls` a class.

    A shard's headers are read once, into an index beside it, .NAME.index, or in the cache. An image is
    SHARD#MEMBER. Several of one sample are its views, as in 0001.pa.png and 0001.lateral.png.

    Args:
        files: patterns of the archives below root; they are not compressed.
        study: key with the study's name; the sample's place where the samples have no such key.
        patient: key with the patient's name; null if there is none.
        view: key with PA, AP or lateral, or a list of those; without one, the members' names tell.
        report: key with the text to learn; `txt` or the findings where there is no such key.
        split: key with train, val or test; without one the names of the archives tell, if they begin with
            different splits, and else patients are divided 80/10/10 by a stable hash.
        indication: key that tells why the study was made; null if there is none.
        prior: key with the report of the patient's study before; null if there is none.
        label_columns: keys with 1, 0, -1 (uncertain) or null; null takes every other key that holds nothing
            else.
        tags: key that lists the labels that are present; all others are absent.
    """

    kind = "tar"

    def __init__(
        self,
        root: Path,
        files: str | list[str] = "**/*.tar",
        study: str = "study_id",
        patient: str | None = "patient_id",
        view: str | None = "view",
        report: str | None = "report",
        split: str | None = "split",
        indication: str | None = "indication",
        prior: str | None = "prior",
        label_columns: list[str] | None = None,
        tags: str | None = None,
    ) -> None:
        super().__init__(root, files, study, patient, view, report, split, indication, prior, label_columns, tags)

    def rows(self, shard: str) -> dict[str, list[str]]:
        """A shard's samples, one row an image."""
        samples: dict[str, tuple[list[str], dict[str, Any]]] = {}
        for member in _index(self.root / shard):
            key, kind = _parts(member.name)
            suffix = kind.rpartition(".")[2].lower()
            images, cells = samples.setdefault(key, ([], {}))
            if suffix in IMAGES:
                images.append(member.name)
            elif member.text is not None:
                cells.update(self._cells(f"{self.root / shard}#{member.name}", suffix, member.text))
        view = self.optional["view"][0]
        table: dict[str, list[str]] = {IMAGE: []}
        rows = 0
        for key, (images, cells) in samples.items():
            if view == "view" and "view" not in cells and "views" in cells:
                cells["view"] = cells.pop("views")
            if not images:
                self._absent.add(f"{shard}#{key}")
            for k, image in enumerate(images or [key]):
                own = {name: "|".join(cell) if isinstance(cell, list) else cell for name, cell in cells.items()}
                if view is not None:
                    given = cells.get(view, _parts(image)[1].partition(".")[0])
                    own[view] = given if isinstance(given, str) else given[k] if k < len(given) else ""
                for name, cell in own.items():
                    column = table.setdefault(name, [])
                    column += [""] * (rows - len(column)) + [cell]
                table[IMAGE].append(f"{shard}#{image}")
                rows += 1
        return {name: column + [""] * (rows - len(column)) for name, column in table.items()}

    def opened(self, shard: str) -> tuple[tuple[Any, dict[str, tuple[int, int]]], int]:
        """An open archive and where its members are."""
        members = {m.name: (m.offset, m.size) for m in _index(self.root / shard) if m.text is None}
        return ((self.root / shard).open("rb", buffering=0), members), 1

    def open(self, image: str) -> bytes:
        """The bytes of an image."""
        (file, members), name = self.shard(image)
        if name not in members:
            raise ImageError(f"{self.root / image}: no such member in the archive, or no image; check the sample")
        offset, size = members[name]
        try:
            data = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise ImageError(f"{self.root / image}: cannot be read ({error.strerror}); fetch the archive again") from error
        if len(data) < size:
            raise ImageError(f"{self.root / image}: {len(data)} of {size} bytes are there; fetch the archive again")
        return data

    def locality(self, images: Sequence[str]) -> Locality:
        """Stretches of an archive."""
        numbers: dict[tuple[str, int], int] = {}
        places: dict[str, dict[str, tuple[int, int]]] = {}
        parts = np.empty(len(images), np.int64)
        for i, image in enumerate(images):
            shard, _, name = image.partition("#")
            if shard not in places:
                places = {shard: self.shard(image)[0][1]}
            parts[i] = numbers.setdefault((shard, places[shard].get(name, (0, 0))[0] // PART_BYTES), len(numbers))
        return Locality(parts, WINDOW)

    def sample_of(self, place: str) -> str:
        """The sample's name."""
        return _parts(place)[0]

    def _cells(self, where: str, suffix: str, data: bytes) -> dict[str, Any]:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: expected UTF-8, found byte {data[error.start]:#04x}; save it as UTF-8") from None
        if suffix != "json":
            return {"report" if suffix == "txt" else suffix: text.strip()}
        try:
            row = json.loads(text)
        except ValueError as error:
            raise DataError(f"{where}: not JSON ({words(error)}); mend the sample") from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected an object of names and values, found {type(row).__name__}")
        cells: dict[str, Any] = {}
        for name, value in row.items():
            if isinstance(value, dict):
                cells |= {str(key): _cell(one) for key, one in value.items()}
            else:
                cells[str(name)] = _cell(value)
        return cells


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return [str(_cell(one)) for one in value]
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, bool) else str(value)


def _parts(name: str) -> tuple[str, str]:
    """deep/0001.pa.png -> deep/0001 and pa.png."""
    folder, slash, base = name.rpartition("/")
    key, _, kind = base.partition(".")
    return folder + slash + key, kind


def _index(path: Path) -> list[_Member]:
    """An archive's images and texts; from its index where that is of this size and time."""
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check data.reader.root") from error
    mark = f"1 {stat.st_size} {stat.st_mtime_ns}".encode()
    places = _places(path)
    for place in places:
        try:
            table = parquet.read_table(place, use_threads=False)
            if (table.schema.metadata or {}).get(b"archive") == mark:
                return [_Member(*row) for row in zip(*(c.to_pylist() for c in table.columns), strict=True)]
        except (arrow.ArrowException, OSError):
            continue
    members = _scan(path)
    columns: list[Any] = [arrow.array([m[i] for m in members], kind) for i, kind in enumerate(_KINDS)]
    table = arrow.Table.from_arrays(columns, list(_Member._fields)).replace_schema_metadata({b"archive": mark})
    for place in places:
        staged = place.with_name(f"{place.name}.{os.getpid()}")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            parquet.write_table(table, staged)
            staged.replace(place)
            break
        except (arrow.ArrowException, OSError):
            continue  # a read-only place: the next one, or every time anew
    return members


_KINDS = (arrow.string(), arrow.int64(), arrow.int64(), arrow.binary())


def _places(path: Path) -> list[Path]:
    """Where an archive's index may be: beside it, or in the cache."""
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:24]
    return [path.with_name(f".{path.name}.index"), cache_folder() / "shards" / f"{name}.index"]


def _scan(path: Path) -> list[_Member]:
    """Reads the headers of an archive, and its small texts.

    Raises:
        DataError: it is compressed, no tar, cut off, or damaged between two members.
    """
    members: list[_Member] = []
    end, size = 0, path.stat().st_size
    try:
        with path.open("rb") as file:
            if file.read(6).startswith(_PACKED):
                raise DataError(
                    f"{path}: compressed; its images cannot be read in place: gunzip it, or pack it again as plain tar"
                )
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                    start = member.offset_data
                    end = start + -(-member.size // _BLOCK) * _BLOCK if member.isreg() else start
                    if end > size:
                        raise _cut_off(path, member.name)
                    suffix = member.name.rpartition(".")[2].lower()
                    if not member.isreg() or suffix not in IMAGES | TEXTS:
                        continue
                    text = None
                    if suffix in TEXTS:
                        file.seek(start)
                        text = file.read(member.size)
                    members.append(_Member(member.name.removeprefix("./"), start, member.size, text))
            file.seek(end)
            after = file.read(_BLOCK)
    except (tarfile.TarError, EOFError) as error:
        if members and "end of data" in str(error):
            raise _cut_off(path, members[-1].name) from error
        raise DataError(
            f"{path}: {'damaged at byte ' + str(end) if end else 'not a tar archive'} ({words(error)}); fetch it again"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its rights") from error
    if len(after) < _BLOCK:
        raise _cut_off(path, members[-1].name if members else "")
    if any(after):
        raise DataError(f"{path}: damaged at byte {end}, where the next member should begin; fetch it again")
    return members


def _cut_off(path: Path, last: str) -> DataError:
    return DataError(
        f"{path}: truncated in or after member {last!r}: the end of the archive is missing; fetch it again, or pack it again"
    )
