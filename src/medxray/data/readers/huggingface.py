"""Data sets of the datasets library: by name from the hub, as `save_to_disk` leaves them, or as local files."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import pyarrow as arrow
import pyarrow.compute as compute
from numpy.typing import NDArray

from medxray.data.readers import Locality, Reader, read_text
from medxray.data.readers.csv import SPLITS
from medxray.data.readers.parquet import (
    Cells,
    Column,
    Parquet,
    Shard,
    classes_of,
    features_told,
    holds_images,
    holds_masks,
    is_list,
)
from medxray.data.readers.shards import IMAGE, OPEN_SHARDS, Kept, words
from medxray.registry import nearest
from medxray.types import DataError

PATHS = ("image", "images", "image_path", "image_paths", "path", "paths", "file_name", "file_names")
"""Columns of strings that are taken for images where there is none of bytes."""

PRESENCE = {
    "absent": "0", "negative": "0", "no": "0", "false": "0",
    "present": "1", "positive": "1", "yes": "1", "true": "1",
    "uncertain": "-1",
    "unlabeled": "", "unlabelled": "", "not mentioned": "", "missing": "", "blank": "",
}  # fmt: skip
"""Classes that tell whether a column's own name is present."""

_KINDS = (("**/*.parquet",), ("**/*.arrow",), ("**/*.json", "**/*.jsonl", "**/*.ndjson"))
_OF_THE_LIBRARY = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_STRUCT = arrow.struct({"bytes": arrow.binary(), "path": arrow.string()})


class _Table:
    """An Arrow table in what is used of a `ParquetFile`: its record batches are the row groups."""

    def __init__(self, table: arrow.Table) -> None:
        self.table = table
        self.schema_arrow = table.schema
        self.batches: list[arrow.RecordBatch] = [batch for batch in table.to_batches() if batch.num_rows]

    def iter_batches(self, batch_size: int, columns: list[str], use_threads: bool) -> Iterator[arrow.RecordBatch]:
        yield from self.table.select(columns).to_batches(max_chunksize=batch_size)

    def read_row_group(self, group: int, columns: list[str], use_threads: bool) -> arrow.RecordBatch:
        return self.batches[group].select(columns)


class HuggingFace(Parquet):
    """Any data set of the datasets library, one row an image or a study. Root is a folder that `save_to_disk` has
    written, or one with Parquet, Arrow or JSON files (lines, a list, or an object with a list a split). With `dataset`
    it is where that data set of the hub is prepared, at the first use; nothing else is ever downloaded.

    Columns of images hold `Image` features, bytes, or paths below root, or lists of those. An image is SPLIT#ROW or
    FILE#ROW, with /N where a row has several, and one that is a file is its path. Images of Parquet files are read a
    row group at a time, those of Arrow files where they lie. A column of classes becomes a label for each, or one of its
    own name where the classes say whether it is present, such as "absent", "present" and "uncertain".

    Args:
        dataset: name on the hub, OWNER/NAME; null reads what is in root.
        config: configuration of the hub's data set, where it has several.
        revision: its commit, tag or branch on the hub, so that later changes there change nothing here.
        files: patterns of the files below root, such as "data/*.parquet"; null takes all Parquet files, else all
            Arrow files, else all JSON files.
        splits: which of the data set's splits (or files and folders named so) are train, val and test; others are
            left out. Without it the usual names are known, and a set with one split is divided 80/10/10 by patient.
        image: columns of images; null takes every column that holds bytes, else one of paths.
        study: column with the study's name; the row's place where the data set has no such column.
        patient: column with the patient's name; null if there is none.
        view: column with PA, AP or lateral, or a list of those; without one, the names of several columns of
            images tell.
        report: column with the text to learn; the findings where there is no such column.
        split: column with train, val or test, which goes before the names of splits.
        indication: column that tells why the study was made; null if there is none.
        prior: column with the report of the patient's study before; null if there is none.
        label_columns: columns with 1, 0, -1 (uncertain) or null; null takes every other column that holds
            nothing else.
        tags: column that lists the labels that are present; all others are absent.
    """

    def __init__(
        self,
        root: Path,
        dataset: str | None = None,
        config: str | None = None,
        revision: str | None = None,
        files: str | list[str] | None = None,
        splits: dict[str, Literal["train", "val", "test"]] | None = None,
        image: str | list[str] | None = None,
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
        super().__init__(
            root, files or [], image, study, patient, view, report, split, indication, prior, label_columns, tags
        )
        if dataset is None and (config is not None or revision is not None):
            raise ValueError("config and revision are of a data set on the hub; name it in dataset")
        if dataset is not None and files is not None:
            raise ValueError("files are those of a local folder; leave them or dataset out")
        self.dataset, self.config, self.revision = dataset, config, revision
        self.splits = splits
        self._prepared: dict[str, list[str]] = {}  # split -> Arrow files of the library
        self._metadata: dict[str, dict[bytes, bytes]] = {}  # and what it tells of their columns
        self._named: dict[str, str] = {}  # shard -> train, val or test
        self._shards: set[str] = set()
        self._tables: Kept[Shard] = Kept(OPEN_SHARDS)

    def rows(self, shard: str) -> dict[str, list[str]]:
        """A shard's columns but those of images, whose names they hold: paths where they are files."""
        cells = super().rows(shard)
        opened = self.opened(shard)[0]
        if isinstance(opened.file, _Table):
            columns = [opened.file.table.column(column.name) for column in opened.columns]
            if any(map(_lack_bytes, columns)):
                if self.study == "study_id" and self.study not in cells:
                    cells[self.study] = [self._sample(image) for image in cells[IMAGE]]
                paths = [_paths(column) for column in columns]
                cells[IMAGE] = [_path_of(image, paths) or image for image in cells[IMAGE]]
        split, default = self.optional["split"]
        if shard in self._named and split == default and split not in cells:
            cells[split] = [self._named[shard]] * len(cells[IMAGE])
        return cells

    def shards(self) -> list[str]:
        """Names of the data set's splits, or paths of its files.

        Raises:
            DataError: nothing to read in root; a data set that the hub does not give; a split of an unknown name.
        """
        if self.dataset is not None:
            shards = self._fetch()
        elif any((self.root / name).is_file() for name in ("dataset_dict.json", "state.json")):
            shards = self._saved()
        else:
            shards = self._files()
        self._named = self._splits(shards)
        if self.splits is not None:
            shards = [shard for shard in shards if shard in self._named]
        self._shards = set(shards)
        return shards

    def opened(self, shard: str) -> tuple[Shard, int]:
        """A shard's rows and columns of images."""
        return self._tables.get(shard, lambda: self._open(shard)), 1

    def forget(self) -> None:
        """Drops open shards and row groups."""
        super().forget()
        self._tables = Kept(OPEN_SHARDS)

    def _open(self, shard: str) -> tuple[Shard, int]:
        path = self.root / shard
        if shard in self._prepared:
            parts = [_mapped(Path(file)) for file in self._prepared[shard]]
            table = arrow.concat_tables([part.replace_schema_metadata(self._metadata[shard]) for part in parts])
        elif shard.endswith(".parquet"):
            table = self._parquet(shard)
            if table is None:
                return super().opened(shard)
        else:
            table = _mapped(path) if shard.endswith(".arrow") else _json(path)
        images = self._images(path, table.schema)
        for name in images:
            if not holds_images(table.schema.field(name).type):
                index = table.schema.get_field_index(name)
                table = table.set_column(index, name, _as_images(table.column(name)))
        file = _Table(table)
        starts = [0, *np.cumsum([batch.num_rows for batch in file.batches]).tolist()]
        columns = [Column(name, name, name, is_list(table.schema.field(name).type)) for name in images]
        return Shard(file, columns, starts), 1

    def open(self, image: str) -> Path | bytes:  # type: ignore[override]
        """The bytes of an image, or its file."""
        return super().open(image) if self._in_shard(image) else Reader.open(self, image)

    def exists(self, image: str) -> bool:
        """Whether its row has bytes, or its file is there."""
        return super().exists(image) if self._in_shard(image) else Reader.exists(self, image)

    def inside(self, path: str, where: str) -> str:
        """The name of an image; its shard or file lies inside of root."""
        return super().inside(path, where) if self._in_shard(path) else Reader.inside(self, path, where)

    def stamp(self, image: str) -> str:
        """The image's name, and size and time of the files that it lies in."""
        shard = image.partition("#")[0]
        if shard not in self._prepared or not self._in_shard(image):
            return super().stamp(image) if self._in_shard(image) else Reader.stamp(self, image)
        stats = [os.stat(file) for file in self._prepared[shard]]
        return " ".join([image, *(f"{stat.st_size} {stat.st_mtime_ns}" for stat in stats)])

    def mask(self, image: str) -> NDArray[np.float32] | None:
        """The chest's coverage that lies beside an image."""
        return super().mask(image) if self._in_shard(image) else None

    def locality(self, images: Sequence[str]) -> Locality | None:  # type: ignore[override]
        """Row groups of Parquet files; None where images are files, or in Arrow files, of which any row is at hand."""
        shards = {image.partition("#")[0] for image in images if self._in_shard(image)}
        if not all(map(self._in_shard, images)) or any(isinstance(self.shard(s)[0].file, _Table) for s in shards):
            return None
        return super().locality(images)

    def _in_shard(self, image: str) -> bool:
        shard, mark, _ = image.partition("#")
        return bool(mark) and shard in self._shards

    # Where data sets lie

    def _fetch(self) -> list[str]:
        """A data set of the hub; at the second use from root."""
        name = self.dataset or ""
        if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) or os.path.exists(name):
            raise DataError(
                f"data.reader.dataset {name!r}: expected OWNER/NAME, a data set on the hub; "
                "for a local folder leave it out and name the folder in data.reader.root"
            )
        import datasets

        try:
            loaded = datasets.load_dataset(
                name, self.config, revision=self.revision, cache_dir=str(self.root), keep_in_memory=False
            )
            parts = {str(split): _embedded(part) for split, part in loaded.items()}
        except Exception as error:  # of the network, the hub, the library or the data set's own files
            raise DataError(
                f"data.reader.dataset {name!r}: could not be prepared in {self.root} ({words(error)}); check the name, "
                "config and revision, and for a gated one log in (hf auth login). Without a network, prepare it where "
                f"there is one, by the same spec or load_dataset({name!r}).save_to_disk(FOLDER), and copy the folder to "
                "root (in the second case leave data.reader.dataset out)"
            ) from error
        shards = self._take(parts)
        # Without a network the library takes what is there, of whatever revision.
        commit = self.revision if re.fullmatch(r"[0-9a-f]{40}", self.revision or "") else None
        if commit and any(commit not in Path(file).parts for files in self._prepared.values() for file in files):
            raise DataError(
                f"data.reader.revision {commit}: {self.root} holds another revision of {name}, and the hub is out of reach; "
                "prepare this one where there is a network, or take the revision that is there"
            )
        return shards

    def _saved(self) -> list[str]:
        """What `save_to_disk` has written."""
        import datasets

        try:
            loaded = datasets.load_from_disk(str(self.root), keep_in_memory=False)
        except Exception as error:  # the library raises what its own files happen to lead to
            raise DataError(
                f"{self.root}: looks like a data set of save_to_disk, but cannot be read ({words(error)}); save it again"
            ) from error
        if isinstance(loaded, datasets.Dataset):
            return self._take({str(loaded.split or "all"): loaded})
        return self._take({str(split): part for split, part in loaded.items()})

    def _take(self, parts: dict[str, Any]) -> list[str]:
        for split, part in parts.items():
            if not len(part):
                continue
            files = [str(file["filename"]) for file in part.cache_files]
            for file in files:
                Reader.inside(self, os.path.abspath(file), f"{self.root}: split {split!r}")
            self._prepared[split] = files
            self._metadata[split] = part.features.arrow_schema.metadata or {}
        if not self._prepared:
            raise DataError(
                f"{self.root}: the data set has no row (splits: {', '.join(parts)}); check what it was made of"
            )
        return list(self._prepared)

    def _files(self) -> list[str]:
        if self.files:
            shards = super().shards()
            wrong = [
                shard for shard in shards if not shard.endswith((".parquet", ".arrow", ".json", ".jsonl", ".ndjson"))
            ]
            if wrong:
                raise DataError(
                    f"{self.root / wrong[0]}: expected a name that ends in .parquet, .arrow, .json, .jsonl or .ndjson; "
                    "mend data.reader.files"
                )
            return shards
        for patterns in _KINDS:
            found = {path.relative_to(self.root) for glob in patterns for path in self.root.glob(glob)}
            own = sorted(
                path.as_posix()
                for path in found
                if path.name not in _OF_THE_LIBRARY and not any(part.startswith(".") for part in path.parts)
            )
            if own:
                self.files = own
                return super().shards()
        self.files = [pattern for patterns in _KINDS for pattern in patterns]
        return super().shards()  # tells that there is nothing

    def _splits(self, shards: list[str]) -> dict[str, str]:
        """Shard -> train, val or test; empty where names tell nothing or all the same."""
        known: dict[str, str] = dict(self.splits) if self.splits is not None else SPLITS
        named: dict[str, str] = {}
        for shard in shards:
            if shard in self._prepared:
                names = [shard]
            else:
                path = PurePosixPath(shard)
                names = [path.stem, re.split(r"[-_.0-9]", path.stem)[0], *reversed(path.parts[:-1])]
            if self.splits is None:
                names = [name.lower() for name in names]
            split = next((known[name] for name in names if name in known), None)
            if split is not None:
                named[shard] = split
        if self.splits is not None:
            if not named:
                raise DataError(
                    f"data.reader.splits: {self.root} has none of {', '.join(self.splits)} (found: {', '.join(shards[:10])})"
                )
            return named
        unnamed = [shard for shard in shards if shard not in named]
        if named and unnamed:
            raise DataError(
                f"{self.root}: split {unnamed[0]!r} beside {', '.join(sorted(named)[:3])} is none of train, val and test; "
                "say in data.reader.splits which it is, or leave it out there, such as {train: train, validation: val}"
            )
        return named if len(set(named.values())) > 1 else {}

    # Columns

    def _parquet(self, shard: str) -> arrow.Table | None:
        """A Parquet file whose images are paths, whole; None if it holds their bytes, to be read by row groups."""
        from pyarrow import parquet

        path = self.root / shard
        try:
            file = parquet.ParquetFile(path, pre_buffer=False)
            schema = file.schema_arrow
            images = self._images(path, schema)
            if any(holds_images(schema.field(name).type) and not _all_null(file, name) for name in images):
                return None
            return file.read(use_threads=False)
        except (arrow.ArrowException, OSError) as error:
            raise DataError(
                f"{path}: not a Parquet file, or damaged or cut off ({words(error)}); fetch it again"
            ) from error

    def _images(self, path: Path, schema: arrow.Schema) -> list[str]:
        """Names of the columns of images."""
        types = {field.name: field.type for field in schema}
        for name in self.image or ():
            if name not in types:
                raise DataError(
                    f"{path}: no column {name!r}{nearest(name, types)} (found: {', '.join(types)}); "
                    "name the right one in data.reader.image"
                )
            if not (holds_images(types[name]) or _holds_texts(types[name])):
                raise DataError(
                    f"{path}: column {name!r} holds {types[name]}; expected images, bytes, paths, or lists of those; "
                    "name another in data.reader.image"
                )
        found = self.image or [field.name for field in schema if holds_images(field.type) and not holds_masks(field)]
        found = found or [name for name in PATHS if name in types and _holds_texts(types[name])][:1]
        if not found:
            raise DataError(
                f"{path}: no column of images (found: {', '.join(f'{name}: {kind}' for name, kind in types.items())}); "
                "name the one with images, bytes or paths in data.reader.image"
            )
        return found

    def _counts(self, shard: str, opened: Shard, column: Column) -> NDArray[Any]:
        """Images of each row (n,): 0 or 1, or the length of its list."""
        if not isinstance(opened.file, _Table):
            return super()._counts(shard, opened, column)
        values = opened.file.table.column(column.name)
        if column.many:
            counts = compute.fill_null(compute.list_value_length(values), 0)
        elif arrow.types.is_struct(values.type):
            counts = compute.is_valid(compute.struct_field(values, "bytes"))
            if values.type.get_field_index("path") >= 0:
                counts = compute.or_(counts, compute.is_valid(compute.struct_field(values, "path")))
        else:
            counts = compute.is_valid(values)
        return counts.to_numpy().astype(np.int64)  # type: ignore[no-any-return]

    def _cells(self, shard: str, opened: Shard) -> dict[str, Cells]:
        """Column -> cells; columns of classes such as "absent" and "present" hold 0 and 1."""
        cells = super()._cells(shard, opened)
        schema = opened.file.schema_arrow
        for name, feature in features_told(schema).items():
            classes = classes_of(feature)
            if name not in cells or not classes or not {one.lower() for one in classes} <= set(PRESENCE):
                continue
            for one in set(classes) - set(schema.names):
                cells.pop(one, None)
            cells[name] = [PRESENCE[cell.lower()] if isinstance(cell, str) and cell else cell for cell in cells[name]]
        return cells


def _mapped(path: Path) -> arrow.Table:
    """An Arrow file, as a stream or with a footer, not read but mapped."""
    try:
        source = arrow.memory_map(str(path))
        try:
            table = arrow.ipc.open_stream(source).read_all()
        except arrow.ArrowInvalid:
            table = arrow.ipc.open_file(source).read_all()
        table.validate()
        return table
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not an Arrow file, or damaged or cut off ({words(error)}); fetch it again") from error


def _json(path: Path) -> arrow.Table:
    """Objects, one a line, in a list, or in a list a split."""
    text = read_text(path)
    parts: list[tuple[str, Any]]
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        whole = None
    if isinstance(whole, list):
        parts = [("", whole)]
    elif isinstance(whole, dict) and whole and all(isinstance(part, list) for part in whole.values()):
        parts = list(whole.items())
    else:
        try:
            lines = [line for line in text.split("\n") if line.strip()]
            parts = [("", [json.loads(line) for line in lines])]
        except (ValueError, RecursionError) as error:
            line = next(i for i, one in enumerate(text.split("\n"), 1) if one.strip() and not _is_json(one))
            raise DataError(
                f"{path}, line {line}: not JSON ({words(error)}); expected an object a line, a list of objects, or an "
                "object with such a list a split"
            ) from None
    rows: list[dict[str, Any]] = []
    for split, part in parts:
        wrong = next((i for i, row in enumerate(part) if not isinstance(row, dict)), None)
        if wrong is not None:
            raise DataError(
                f"{path}: row {wrong}{f' of {split!r}' * bool(split)} is no object; expected names and values"
            )
        rows += [{"split": split, **row} for row in part] if len(parts) > 1 else part
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        try:
            columns[name] = arrow.array(values)
        except (arrow.ArrowException, ValueError, TypeError, OverflowError) as error:
            raise DataError(
                f"{path}: column {name!r} holds values that no column holds ({words(error)}); give all its values one kind"
            ) from None
    if not columns:
        raise DataError(f"{path}: no row; expected an object for each image or study")
    return arrow.table(columns)


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _embedded(part: Any) -> Any:
    """A split of the hub with the bytes of all its images, so that root holds all there is to it."""
    from datasets.table import embed_table_storage

    table = part.data.table
    for field in table.schema:
        kind = field.type.value_type if is_list(field.type) else field.type
        if not (arrow.types.is_struct(kind) and holds_images(field.type)):
            continue
        values = table.column(field.name)
        values = compute.list_flatten(values) if is_list(field.type) else values
        if compute.struct_field(values, "bytes").null_count > values.null_count:
            arrows = part.with_format("arrow")
            return arrows.map(embed_table_storage, batched=True, batch_size=100, writer_batch_size=100)
    return part


def _as_images(column: arrow.ChunkedArray) -> arrow.Array:
    """Paths as the library has images of which it knows the paths alone."""

    def one(path: str | None) -> dict[str, str | None] | None:
        return {"bytes": None, "path": path} if path else None

    values = column.to_pylist()
    if is_list(column.type):
        return arrow.array(
            [None if row is None else [one(path) for path in row if path] for row in values], arrow.list_(_STRUCT)
        )
    return arrow.array([one(path) for path in values], _STRUCT)


def _lack_bytes(column: arrow.ChunkedArray) -> bool:
    """Whether some image of a column is known by its path alone."""
    flat = compute.list_flatten(column) if is_list(column.type) else column
    if not arrow.types.is_struct(flat.type) or flat.type.get_field_index("path") < 0:
        return False
    return compute.struct_field(flat, "bytes").null_count > flat.null_count


def _paths(column: arrow.ChunkedArray) -> list[Any]:
    """For each row the path of an image without bytes, else None; or a list of those."""
    many = is_list(column.type)
    flat = compute.list_flatten(column) if many else column
    own = [None] * len(flat)
    if _lack_bytes(column):
        without = compute.is_null(compute.struct_field(flat, "bytes"))
        own = compute.if_else(without, compute.struct_field(flat, "path"), None).to_pylist()
    if not many:
        return own
    ends = np.cumsum(compute.fill_null(compute.list_value_length(column), 0).to_numpy())
    return [own[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _path_of(image: str, paths: list[list[Any]]) -> str | None:
    """The path of SHARD#ROW/SLOT, if it has no bytes."""
    row, _, slot = image.rpartition("#")[2].partition("/")
    own: list[str | None] = []
    for column in paths:
        value = column[int(row)]
        own += value if isinstance(value, list) else [value]
    return own[int(slot or 0)] if own else None


def _holds_texts(kind: arrow.DataType) -> bool:
    kind = kind.value_type if is_list(kind) else kind
    return arrow.types.is_string(kind) or arrow.types.is_large_string(kind)


def _all_null(file: Any, name: str) -> bool:
    """Whether no row of a column has bytes, as far as the footer tells."""
    for group in range(file.num_row_groups):
        row_group = file.metadata.row_group(group)
        for i in range(row_group.num_columns):
            part = row_group.column(i)
            if part.path_in_schema == name or (
                part.path_in_schema.startswith(f"{name}.") and part.path_in_schema.endswith(".bytes")
            ):
                statistics = part.statistics
                if statistics is None or not statistics.has_null_count or statistics.null_count < part.num_values:
                    return False
    return True
