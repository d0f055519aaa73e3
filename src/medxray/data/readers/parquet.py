"""Parquet shards with images in a column, such as `datasets.Dataset.to_parquet` writes and the hub holds."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.compute as compute
from numpy.typing import NDArray
from pyarrow import parquet

from medxray.data.readers import Locality
from medxray.data.readers.csv import VALUES, Table, label_values
from medxray.data.readers.shards import IMAGE, Kept, Shards, words
from medxray.registry import nearest
from medxray.types import DataError, ImageError, Study

CACHE_BYTES = 2**29
"""Row groups that a process keeps; the last one always, however large."""

MANIFEST, WORK = "manifest.json", ".prepare"
"""What `medxray prepare` writes beside its shards when all are there, and its folder until then."""

MASK_SIDE = 64
"""A chest's mask is kept as so many shares of coverage a side, a byte each."""

Cells = list[Any]


@dataclass
class Column:
    """A column of images: its name, its leaf of bytes, a leaf that tells how many there are, whether a row is a list."""

    name: str
    leaf: str
    light: str
    many: bool


@dataclass
class Shard:
    """An opened file, and where its images lie."""

    file: parquet.ParquetFile
    columns: list[Column]
    starts: list[int]  # first row of each group, then the number of rows
    masks: str | None = None  # the leaf of masks, where there is one


class Parquet(Shards):
    """Parquet files with one row an image or, with lists or several columns of images, one row a study.

    A row group is read whole, and of it only the images: groups of some hundred rows are best. An image is
    SHARD#ROW, or SHARD#ROW/N where a row has several. Classes of the datasets library become a label each. Where a
    column `labels` is a struct of bytes (int8), its fields are the labels, none left out. A column `masks`, as `medxray prepare
    --masks` writes it, tells where the chest is in each image.

    Args:
        files: patterns of the files below root, such as "data/train-*.parquet".
        image: columns of images: bytes, {bytes, path}, or lists of those; null takes every column that holds
            such.
        study: column with the study's name; the row's place where the files have no such column.
        patient: column with the patient's name; null if there is none.
        view: column with PA, AP or lateral, or a list of those; without one, the names of several columns of
            images tell.
        report: column with the text to learn; the findings where there is no such column.
        split: column with train, val or test; without one the names of the files tell, if they begin with
            different splits, and else patients are divided 80/10/10 by a stable hash.
        indication: column that tells why the study was made; null if there is none.
        prior: column with the report of the patient's study before; null if there is none.
        label_columns: columns with 1, 0, -1 (uncertain) or null; null takes every other column that holds
            nothing else.
        tags: column that lists the labels that are present; all others are absent.
    """

    kind = "parquet"

    def __init__(
        self,
        root: Path,
        files: str | list[str] = "**/*.parquet",
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
        super().__init__(root, files, study, patient, view, report, split, indication, prior, label_columns, tags)
        self.image = [image] if isinstance(image, str) else image
        self._labelled: dict[str, None] = {}
        self._groups: Kept[arrow.ChunkedArray] = Kept(CACHE_BYTES)

    def read(self) -> Iterable[Study]:
        """All studies; images are not read.

        Raises:
            DataError: as of any shards; or `medxray prepare` has not finished these.
        """
        if (self.root / WORK).is_dir() and not (self.root / MANIFEST).is_file():
            raise DataError(
                f"{self.root}: `medxray prepare` has not finished these shards; give its command again to go on"
            )
        return super().read()

    def _labels(self, table: Table) -> Mapping[str, list[int | None]]:
        if self.tags is None and self.label_columns is None and self._labelled:
            return {name: label_values(table, name) for name in self._labelled}
        return {name: values for name, values in super()._labels(table).items() if name != "burned_in"}

    def group(self, table: Table) -> list[Study]:
        """Rows -> studies, as of a table, and whether annotations are burned in where a column `burned_in` says."""
        studies = super().group(table)
        if cells := table.columns.get("burned_in"):
            told = {name.strip(): cell for name, cell in zip(table[self.study], cells, strict=True)}
            for study in studies:
                study["burned_in"] = VALUES.get(told[study["study_id"]])
        return studies

    def rows(self, shard: str) -> dict[str, list[str]]:
        """A shard's columns but those of images."""
        opened = self.opened(shard)[0]
        n = opened.starts[-1]
        counts = np.zeros((n, len(opened.columns)), np.int64)
        slots = np.ones((n, len(opened.columns)), np.int64)
        for i, column in enumerate(opened.columns):
            counts[:, i] = self._counts(shard, opened, column)
            if column.many:
                slots[:, i] = counts[:, i]
        if n and not counts.any():
            raise DataError(
                f"{self.root / shard}: column {opened.columns[0].name!r} has no bytes in any row; expected those of image "
                "files; write it again with the images embedded (datasets: "
                "dataset.with_format('arrow').map(embed_table_storage, batched=True))"
            )
        cells = self._cells(shard, opened)
        views = self.optional["view"][0]
        if views == "view" and views not in cells and "views" in cells:
            cells["view"] = cells.pop("views")
        by_column = views is not None and views not in cells and len(opened.columns) > 1
        if counts.shape[1] == 1 and not opened.columns[0].many:
            images = [f"{shard}#{row}" for row in range(n)]
            self._absent.update(images[row] for row in np.flatnonzero(counts[:, 0] == 0))
            return {IMAGE: images, **{name: _joined(column) for name, column in cells.items()}}
        names, rows, nth, columns = [], [], [], []
        for row in range(n):
            found = [
                (slot + int(slots[row, :i].sum()), i)
                for i in range(counts.shape[1])
                for slot in range(counts[row, i])
            ]
            if not found:
                self._absent.add(f"{shard}#{row}")
            several = slots[row].sum() > 1
            for k, (slot, i) in enumerate(found or [(0, 0)]):
                names.append(f"{shard}#{row}/{slot}" if several and found else f"{shard}#{row}")
                rows.append(row)
                nth.append(k)
                columns.append(opened.columns[i].name)
        spread = {name: [column[row] for row in rows] for name, column in cells.items()}
        if views in spread:
            spread[views] = [
                (cell[k] if k < len(cell) else "") if isinstance(cell, list) else cell
                for cell, k in zip(spread[views], nth, strict=True)
            ]
        elif by_column and views is not None:
            spread[views] = columns
        if self.study == "study_id" and self.study not in spread:
            spread[self.study] = [self._sample(f"{shard}#{row}") for row in rows]
        return {IMAGE: names, **{name: _joined(column) for name, column in spread.items()}}

    def opened(self, shard: str) -> tuple[Shard, int]:
        """A shard's footer and columns of images."""
        path = self.root / shard
        try:
            file = parquet.ParquetFile(path, pre_buffer=False)
            schema = file.schema_arrow
        except (arrow.ArrowException, OSError) as error:
            raise DataError(
                f"{path}: not a Parquet file, or damaged or cut off ({words(error)}); fetch it again"
            ) from error
        starts = [0]
        for group in range(file.num_row_groups):
            starts.append(starts[-1] + file.metadata.row_group(group).num_rows)
        found = [n for n in schema.names if holds_images(schema.field(n).type) and not holds_masks(schema.field(n))]
        for name in self.image or ():
            if name not in schema.names:
                raise DataError(
                    f"{path}: no column {name!r}{nearest(name, schema.names)} (found: {', '.join(schema.names)}); "
                    "name the right one in data.reader.image"
                )
            if name not in found:
                raise DataError(
                    f"{path}: column {name!r} holds {schema.field(name).type}; expected bytes of image files, "
                    "{bytes, path}, or lists of those; name another in data.reader.image"
                )
        if not found:
            raise DataError(
                f"{path}: no column of images (found: {', '.join(f'{f.name}: {f.type}' for f in schema)}); "
                "write the files' bytes into one and name it in data.reader.image"
            )
        leaves = [file.schema.column(i).path for i in range(len(file.schema))]
        masks = next((leaf for leaf in leaves if _is_mask(schema, leaf)), None)
        columns = [_column(name, schema.field(name).type, leaves) for name in self.image or found]
        return Shard(file, columns, starts, masks), 1

    def open(self, image: str) -> bytes:
        """The bytes of an image, from its row group."""
        opened, place = self.shard(image)
        row, _, slot = place.partition("/")
        shard = image.partition("#")[0]
        if not row.isdigit() or int(row) >= opened.starts[-1]:
            raise ImageError(f"{self.root / image}: no such row; the shard has {opened.starts[-1]}")
        group = bisect_right(opened.starts, int(row)) - 1
        left = int(slot or 0)
        for column in opened.columns:
            if not column.many and left:
                left -= 1
                continue
            try:
                value = self._kept(shard, group, column.leaf)[int(row) - opened.starts[group]]
            except (arrow.ArrowException, OSError) as error:
                raise ImageError(
                    f"{self.root / image}: row group {group} of the shard is damaged ({words(error)}); fetch it again"
                ) from error
            if column.many:
                n = len(value) if value.is_valid else 0
                if left >= n:
                    left -= n
                    continue
                value = value[left]
            if value.is_valid and arrow.types.is_struct(value.type):
                value = value["bytes"]
            if value.is_valid:
                return value.as_py()  # type: ignore[no-any-return]
            break
        raise ImageError(
            f"{self.root / image}: no bytes; expected those of an image file; leave the row out, or write it again "
            "with the image embedded"
        )

    def mask(self, image: str) -> NDArray[np.float32] | None:
        """The chest's coverage (64, 64) that lies beside an image."""
        if "#" not in image:
            return None
        opened, place = self.shard(image)
        if opened.masks is None:
            return None
        row, _, slot = place.partition("/")
        group = bisect_right(opened.starts, int(row)) - 1
        try:
            column = self._kept(image.partition("#")[0], group, opened.masks)
        except (arrow.ArrowException, OSError) as error:
            raise ImageError(
                f"{self.root / image}: row group {group} of the shard is damaged ({words(error)}); fetch it again"
            ) from error
        values = column[int(row) - opened.starts[group]].as_py() or []
        value = values[int(slot or 0)] if int(slot or 0) < len(values) else None
        if value is None or len(value) != MASK_SIDE**2:
            return None
        return np.frombuffer(value, np.uint8).reshape(MASK_SIDE, MASK_SIDE).astype(np.float32) / np.float32(255)

    def locality(self, images: Sequence[str]) -> Locality:
        """Row groups; as many at a time as are kept."""
        numbers: dict[tuple[str, int], int] = {}
        starts: dict[str, list[int]] = {}
        parts = np.empty(len(images), np.int64)
        largest = 1
        for i, image in enumerate(images):
            shard, _, place = image.partition("#")
            if shard not in starts:
                opened = self.shard(image)[0]
                starts[shard] = opened.starts
                largest = max(largest, *_bytes(opened.file, [column.leaf for column in opened.columns]))
            group = bisect_right(starts[shard], int(place.partition("/")[0])) - 1
            parts[i] = numbers.setdefault((shard, group), len(numbers))
        return Locality(parts, max(1, CACHE_BYTES // largest))

    def forget(self) -> None:
        """Drops open shards and row groups."""
        super().forget()
        self._groups = Kept(CACHE_BYTES)

    def _kept(self, shard: str, group: int, leaf: str) -> arrow.ChunkedArray:
        def make() -> tuple[arrow.ChunkedArray, int]:
            column = self._group(shard, group, leaf)
            return column, column.nbytes

        return self._groups.get((shard, group, leaf), make)

    def _group(self, shard: str, group: int, leaf: str) -> arrow.ChunkedArray:
        """The images of a row group."""
        opened = self.shard(shard)[0]
        # One thread: loading processes are many, and pools of threads do not survive a fork.
        return opened.file.read_row_group(group, columns=[leaf], use_threads=False).column(0)

    def _counts(self, shard: str, opened: Shard, column: Column) -> np.ndarray[Any, Any]:
        """Images of each row (n,): 0 or 1, or the length of its list."""
        n = opened.starts[-1]
        if not column.many and _no_nulls(opened.file, column.leaf):
            return np.ones(n, np.int64)
        counts: list[np.ndarray[Any, Any]] = [np.zeros(0, np.int64)]
        for values in self._batches(shard, opened.file, [column.light if column.many else column.leaf]):
            values = values.column(0)
            if column.many:
                counts.append(compute.fill_null(compute.list_value_length(values), 0).to_numpy(zero_copy_only=False))
            else:
                if arrow.types.is_struct(values.type):
                    values = compute.struct_field(values, "bytes")
                counts.append(values.is_valid().to_numpy(zero_copy_only=False))
        return np.concatenate(counts).astype(np.int64)

    def _cells(self, shard: str, opened: Shard) -> dict[str, Cells]:
        """Column -> cells as a table holds them; lists stay lists."""
        schema, images = opened.file.schema_arrow, {column.name for column in opened.columns}
        known = features_told(schema)
        wanted = [f.name for f in schema if f.name not in images and not holds_images(f.type) and _is_plain(f.type)]
        columns: dict[str, list[Any]] = {name: [] for name in wanted}
        if wanted:
            for batch in self._batches(shard, opened.file, wanted):
                for name in wanted:
                    columns[name].append(batch.column(name))
        cells: dict[str, Cells] = {}
        roles = {self.study, *(name for name, _ in self.optional.values())}
        more: dict[str, Cells] = {}
        for name in wanted:
            column = arrow.chunked_array(columns[name], schema.field(name).type)
            classes = classes_of(known.get(name))
            if classes is not None:
                column = arrow.chunked_array([arrow.array(_named(column.to_pylist(), classes))])
                if name not in roles and not set(classes) <= set(VALUES):
                    more |= _one_each(column.to_pylist(), classes)
            if arrow.types.is_struct(column.type):
                flat = column.combine_chunks()
                for i, field in enumerate(column.type):
                    more[field.name] = _texts(compute.struct_field(flat, [i]))
                    if name == "labels" and arrow.types.is_int8(field.type):
                        self._labelled[field.name] = None
            else:
                cells[name] = _texts(column)
        return {**more, **cells}

    def _batches(self, shard: str, file: parquet.ParquetFile, columns: list[str]) -> Iterator[arrow.RecordBatch]:
        try:
            yield from file.iter_batches(batch_size=256, columns=columns, use_threads=False)
        except (arrow.ArrowException, OSError) as error:
            raise DataError(
                f"{self.root / shard}: columns {', '.join(columns[:5])} are damaged ({words(error)}); fetch it again"
            ) from error


def _bytes(file: parquet.ParquetFile, leaves: list[str]) -> list[int]:
    sizes = []
    for group in range(file.num_row_groups):
        row_group = file.metadata.row_group(group)
        parts = [row_group.column(i) for i in range(row_group.num_columns)]
        sizes.append(sum(part.total_uncompressed_size for part in parts if part.path_in_schema in leaves))
    return sizes


def holds_images(kind: arrow.DataType) -> bool:
    """Whether a column of this kind may hold images: bytes, a struct with bytes, or lists of those."""
    if arrow.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and holds_images(kind.field("bytes").type)
    if is_list(kind):
        return not is_list(kind.value_type) and holds_images(kind.value_type)
    return arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind)


def holds_masks(field: arrow.Field) -> bool:
    """Whether a column holds the chest's masks of prepared shards."""
    return field.name == "masks" and is_list(field.type) and arrow.types.is_binary(field.type.value_type)


def _is_mask(schema: arrow.Schema, leaf: str) -> bool:
    name = leaf.partition(".")[0]
    return name in schema.names and holds_masks(schema.field(name))


def _is_plain(kind: arrow.DataType) -> bool:
    """Whether a column can hold names, texts or labels."""
    types = arrow.types
    if is_list(kind):
        return types.is_string(kind.value_type) or types.is_large_string(kind.value_type) or (
            types.is_integer(kind.value_type)
        )
    if types.is_struct(kind):
        return all(_is_plain(field.type) and not types.is_struct(field.type) for field in kind)
    if types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    return (
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_integer(kind)
        or types.is_floating(kind)
        or types.is_boolean(kind)
    )


def is_list(kind: arrow.DataType) -> bool:
    """Whether a kind is any of the lists."""
    return arrow.types.is_list(kind) or arrow.types.is_large_list(kind) or arrow.types.is_fixed_size_list(kind)


def _column(name: str, kind: arrow.DataType, leaves: list[str]) -> Column:
    own = [leaf for leaf in leaves if leaf == name or leaf.startswith(f"{name}.")]
    leaf = next((leaf for leaf in own if leaf.endswith(".bytes")), own[0])
    light = next((leaf for leaf in own if leaf.endswith(".path")), leaf)
    return Column(name, leaf, light, is_list(kind))


def _no_nulls(file: parquet.ParquetFile, leaf: str) -> bool:
    for group in range(file.num_row_groups):
        row_group = file.metadata.row_group(group)
        for i in range(row_group.num_columns):
            part = row_group.column(i)
            if part.path_in_schema == leaf:
                statistics = part.statistics
                if statistics is None or not statistics.has_null_count or statistics.null_count:
                    return False
    return True


def features_told(schema: arrow.Schema) -> dict[str, Any]:
    """What the datasets library has written of each column."""
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    from datasets import Features

    try:
        return dict(Features.from_arrow_schema(schema))
    except Exception:  # of another version of the library: the columns then are what arrow says
        return {}


def classes_of(feature: Any) -> list[str] | None:
    """Names of classes that the datasets library gives a column; None where it gives none."""
    feature = getattr(feature, "feature", feature)
    names = getattr(feature, "names", None)
    return list(names) if isinstance(names, list) else None


def _named(values: list[Any], classes: list[str]) -> list[Any]:
    def name(value: Any) -> Any:
        if isinstance(value, list):
            return [name(one) for one in value if one is not None]
        return classes[value] if value is not None and 0 <= value < len(classes) else None

    return [name(value) for value in values]


def _one_each(values: list[Any], classes: list[str]) -> dict[str, Cells]:
    given = [None if value is None else value if isinstance(value, list) else [value] for value in values]
    return {name: ["" if own is None else str(int(name in own)) for own in given] for name in classes}


def _texts(column: arrow.ChunkedArray | arrow.Array) -> Cells:
    types, kind = arrow.types, column.type
    if is_list(kind):
        return [["" if one is None else str(one) for one in value or ()] for value in column.to_pylist()]
    if types.is_dictionary(kind):
        column = column.cast(kind.value_type)
    if types.is_boolean(kind):
        column = column.cast(arrow.int8())
    if types.is_floating(kind):
        # Whole numbers as integers are written: labels and names that pandas has made floats of.
        return ["" if v is None or v != v else str(int(v)) if v == int(v) else str(v) for v in column.to_pylist()]
    return compute.fill_null(column.cast(arrow.string()), "").to_pylist()  # type: ignore[no-any-return]


def _joined(cells: Cells) -> list[str]:
    return ["|".join(cell) if isinstance(cell, list) else cell for cell in cells]
