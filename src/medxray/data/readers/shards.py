"""Data sets in shards, files that hold many images each: read where they lie, nothing is unpacked.

An image is named SHARD#PLACE. Its bytes are fetched when they are needed; what is known of it is read beforehand,
without its bytes, and then goes the way of a table's rows.
"""

import os
import re
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar, Generic, TypeVar

from medxray.data.readers.csv import CSV, SPLITS, Table
from medxray.types import DataError, ImageError, Study

IMAGE = "name of the image"
OPEN_SHARDS = 64

V = TypeVar("V")


class Rows(Table):
    """One row an image, from all shards."""

    def place(self, row: int) -> str:
        """The name of the row's image."""
        return self.columns[IMAGE][row]


class Kept(Generic[V]):
    """The values used last, while their sizes fit into `room`; the last one always.

    Args:
        room: sum of the sizes of what is kept.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self._values: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()
        self._size = 0
        self._lock = Lock()

    def get(self, key: Hashable, make: Callable[[], tuple[V, int]]) -> V:
        """The value of a key; `make` gives it and its size where it is not there."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            else:
                self._values[key] = made = make()
                self._size += made[1]
                while self._size > self.room and len(self._values) > 1:
                    self._size -= self._values.popitem(last=False)[1][1]
            return self._values[key][0]


class Shards(CSV):
    """A data set in shards below root.

    Args:
        root: folder of the data set.
        files: patterns of its shards, relative to root.
        study, patient, view, report, split, indication, prior, label_columns, tags: columns, as in a table.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        root: Path,
        files: str | list[str],
        study: str,
        patient: str | None,
        view: str | None,
        report: str | None,
        split: str | None,
        indication: str | None,
        prior: str | None,
        label_columns: list[str] | None,
        tags: str | None,
    ) -> None:
        super().__init__(root, "", IMAGE, study, patient, view, report, split, indication, prior, label_columns, tags)
        self.files = [files] if isinstance(files, str) else files
        self._absent: set[str] = set()
        self._known: set[str] = set()
        self._process = 0
        self._opened: Kept[Any] = Kept(OPEN_SHARDS)

    def __getstate__(self) -> dict[str, Any]:
        # Open files and locks do not travel; what is kept for the main process is of no use to a worker.
        own = {key: value for key, value in vars(self).items() if not isinstance(value, Kept)}
        return own | {"_process": 0, "_absent": set(), "_known": set(), "_real": {}}

    @abstractmethod
    def rows(self, shard: str) -> dict[str, list[str]]:
        """A shard's columns, one row an image, the images' names in the column `IMAGE`. A row without an image
        names one in `_absent`.

        Raises:
            DataError: it is damaged, or lacks what a setting names.
        """

    @abstractmethod
    def opened(self, shard: str) -> tuple[Any, int]:
        """What is needed to read from a shard, and its size, in shards."""

    def read(self) -> Iterable[Study]:
        """All studies; images are not read.

        Raises:
            DataError: no shard, a damaged one, a missing column, or what is wrong in a table's rows.
        """
        shards = self.shards()
        with ThreadPoolExecutor() as pool:
            tables = list(pool.map(self.rows, shards))
        names = dict.fromkeys(name for table in tables for name in table)
        columns: dict[str, list[str]] = {name: [] for name in names}
        for table in tables:
            for name, cells in columns.items():
                cells += table.get(name) or [""] * len(table[IMAGE])
        if self.study == "study_id" and self.study not in columns:
            # Without the suffix of its shard and, in a tar, its own.
            columns[self.study] = [self._sample(image) for image in columns[IMAGE]]
        split, default = self.optional["split"]
        named = [_split_of_file(shard) for shard in shards]
        if split == default and split not in columns and all(named) and len(set(named)) > 1:
            columns[split] = [
                name for name, table in zip(named, tables, strict=True) for _ in range(len(table[IMAGE]))
            ]
        return self.group(Rows(self.root, columns, list(range(len(columns.get(IMAGE, ()))))))

    def shards(self) -> list[str]:
        """Paths of the shards relative to root, sorted.

        Raises:
            DataError: no folder, no shard, one outside of root, or a name that holds "#".
        """
        if not self.root.is_dir():
            raise DataError(
                f"data.reader.root: no folder {self.root}; expected the data set's folder; check the path "
                f"(it is taken from {Path.cwd()})"
            )
        found = {path.relative_to(self.root).as_posix() for glob in self.files for path in self.root.glob(glob)}
        shards = sorted(path for path in found if not os.path.basename(path).startswith("."))
        if not shards:
            held = sorted(path.name for path in self.root.iterdir())
            packed = [name for name in held if re.search(r"\.(tgz|tar\.\w+)$", name)]
            raise DataError(
                f"{self.root}: no file matches {' or '.join(map(repr, self.files))} "
                f"(the folder holds {', '.join(held[:10]) or 'nothing'})"
                + (f"; {packed[0]} is compressed and cannot be read in place: gunzip it" if packed else "")
                + "; check data.reader.root and data.reader.files"
            )
        for shard in shards:
            if "#" in shard:
                raise DataError(f"{self.root / shard}: '#' parts a shard from its images; rename the file")
            super().inside(shard, str(self.root))
        return shards

    def exists(self, image: str) -> bool:
        """False for a row or sample that lacks its image."""
        return image not in self._absent

    def stamp(self, image: str) -> str:
        """The image's name, and size and time of its shard."""
        stat = os.stat(self.root / image.partition("#")[0])
        return f"{image} {stat.st_size} {stat.st_mtime_ns}"

    def inside(self, path: str, where: str) -> str:
        """The name of an image; its shard lies inside of root."""
        shard = path.partition("#")[0]
        if shard not in self._known:
            super().inside(shard, where)
            self._known.add(shard)
        return path

    def shard(self, image: str) -> tuple[Any, str]:
        """What `opened` gives for an image's shard, from this process's open ones, and the place in it.

        Raises:
            ImageError: the shard cannot be read any more.
        """
        self.own()
        shard, _, place = image.partition("#")
        try:
            return self._opened.get(shard, lambda: self.opened(shard)), place
        except DataError as error:
            raise ImageError(f"{self.root / image}: {error}") from error

    def own(self) -> None:
        """Forgets what another process has opened: files and threads of a library do not survive a fork."""
        if self._process != os.getpid():
            self._process = os.getpid()
            self.forget()

    def forget(self) -> None:
        """Drops open shards."""
        self._opened = Kept(OPEN_SHARDS)

    def _sample(self, image: str) -> str:
        shard, _, place = image.partition("#")
        return f"{shard.removesuffix(f'.{self.kind}')}#{self.sample_of(place)}"

    def sample_of(self, place: str) -> str:
        """What the images of one sample have in common of their places."""
        return place


def words(error: BaseException) -> str:
    """An error of a library in one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 120 else text[:117] + "..."


def _split_of_file(shard: str) -> str:
    """train-00000-of-00004.parquet -> train, as data sets of the hub are laid out; "" where no split is named."""
    return SPLITS.get(re.split(r"[-_.0-9]", os.path.basename(shard).lower())[0], "")
