"""A table with one row an image: what any data set can be exported to."""

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from medxray.data.readers import Reader, frontal_first, read_text, split_of, view_of
from medxray.registry import nearest
from medxray.types import DataError, Study

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validate": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
"""How data sets write a split -> its name here."""

VALUES = {"1": 1, "1.0": 1, "0": 0, "0.0": 0, "-1": -1, "-1.0": -1, "": None}
"""How tables write a label -> present, absent, uncertain, missing."""

NOT_LABELS = {"age", "sex", "indication", "comparison", "technique", "findings", "impression"}


@dataclass
class Table:
    """A CSV file in memory.

    Attributes:
        path: where it lies.
        columns: name -> cells, one a row.
        lines: line of the file on which each row starts.
    """

    path: Path
    columns: dict[str, list[str]]
    lines: list[int]

    def __len__(self) -> int:
        return len(self.lines)

    def place(self, row: int) -> str:
        """Where in the file a row stands."""
        return f"line {self.lines[row]}"

    def where(self, row: int) -> str:
        """File and line of a row, as messages begin."""
        return f"{self.path}, {self.place(row)}"

    def __getitem__(self, column: str) -> list[str]:
        """The cells of a column that must be there.

        Raises:
            DataError: it is not; with the columns found and the nearest name.
        """
        if column not in self.columns:
            raise DataError(
                f"{self.path}: no column {column!r}{nearest(column, self.columns)} "
                f"(found: {', '.join(self.columns)}); name the right one in data.reader"
            )
        return self.columns[column]


def read_table(path: Path) -> Table:
    """A comma-separated UTF-8 file with a header; quoted cells may span lines.

    Raises:
        DataError: not UTF-8, no header, a name twice, or a row with more or fewer cells than the header.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        header = next(reader, None)
        if not header:
            raise DataError(f"{path}: empty; expected a header line with the names of columns")
        line = reader.line_num + 1
        for row in reader:
            if row:
                if len(row) != len(header):
                    raise DataError(
                        f"{path}, line {line}: {len(row)} cells; expected {len(header)} as in the header; "
                        "quote cells that hold commas or line ends"
                    )
                rows.append(row)
                lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not a CSV row ({error}); mend the quotes") from None
    twice = {name for name in header if header.count(name) > 1}
    if twice:
        raise DataError(f"{path}: column {sorted(twice)[0]!r} stands twice in the header; rename one")
    cells = zip(*rows, strict=True) if rows else ([] for _ in header)
    columns = {name.strip(): list(column) for name, column in zip(header, cells, strict=True)}
    return Table(path, columns, lines)


class CSV(Reader):
    """One row an image; rows of one study are grouped, in the order of their first row.

    Args:
        file: the table, below root.
        path: column with image paths, relative to root.
        study: column with the study's name.
        patient: column with the patient's name; null if there is none.
        view: column with PA, AP or lateral; null if there is none.
        report: column with the text to learn; the findings where the table has no such column.
        split: column with train, val or test; without one, or if all of it is empty, patients are divided
            80/10/10 by a stable hash.
        indication: column that tells why the study was made; null if there is none.
        prior: column with the report of the patient's study before; null if there is none.
        label_columns: columns with 1, 0, -1 (uncertain) or nothing; null takes every other column that holds
            nothing else.
        tags: column that lists the labels that are present, parted by "|" or ";"; all others are absent.
    """

    def __init__(
        self,
        root: Path,
        file: str = "studies.csv",
        path: str = "path",
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
        super().__init__(root)
        self.table = file
        self.path, self.study = path, study
        # A default name may be missing from the table; one that a spec states may not.
        self.optional = {
            "patient": (patient, "patient_id"),
            "view": (view, "view"),
            "report": (report, "report"),
            "split": (split, "split"),
            "indication": (indication, "indication"),
            "prior": (prior, "prior"),
        }
        self.label_columns, self.tags = label_columns, tags

    def read(self) -> Iterable[Study]:
        """All studies of the table."""
        return self.group(read_table(self.file(self.table)))

    def group(self, table: Table) -> list[Study]:
        """Rows -> studies.

        Raises:
            DataError: rows of one study that disagree, an image twice in a study, a path that leaves root, a
                missing column, or a value that is no split or label.
        """
        paths, names = table[self.path], table[self.study]
        patients, views, reports, splits, indications, priors = (self._column(table, role) for role in self.optional)
        splits = splits if splits and any(splits) else None
        findings, impressions = table.columns.get("findings"), table.columns.get("impression")
        reports = reports or findings
        labels = self._labels(table)
        of_study = {
            column: cells
            for column, cells in {
                "patient": patients,
                "report": reports,
                "split": splits,
                "findings": findings,
                "impression": impressions,
                "indication": indications,
                "prior": priors,
                **labels,
            }.items()
            if cells
        }
        blank = [""] * len(table)
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            if not name.strip():
                raise DataError(f"{table.where(row)}: column {self.study!r} is empty; give the study a name")
            rows.setdefault(name, []).append(row)
        studies = []
        for name, own in rows.items():
            first = own[0]
            for column, cells in of_study.items():
                other = next((row for row in own if cells[row] != cells[first]), None)
                if other is not None:
                    raise DataError(
                        f"{table.where(other)}: study {name!r} has {column} {_short(cells[other])}, but "
                        f"{_short(cells[first])} on {table.place(first)}; rows of one study must agree"
                    )
            images = [self.inside(paths[row], table.where(row)) for row in own]
            if len(set(images)) < len(images):
                row = next(own[i] for i, image in enumerate(images) if image in images[:i])
                raise DataError(
                    f"{table.where(row)}: image {paths[row]!r} stands twice in study {name!r}; remove a row"
                )
            patient = (patients or blank)[first]
            images, shown = frontal_first(images, [view_of((views or blank)[row]) for row in own])
            studies.append(
                Study(
                    study_id=name,
                    patient_id=patient,
                    images=images,
                    views=shown,
                    findings=(findings or blank)[first],
                    impression=(impressions or blank)[first],
                    report=(reports or blank)[first],
                    labels={label: values[first] for label, values in labels.items()},
                    split=_split(splits[first], table, first) if splits else split_of(patient or name),
                    indication=(indications or blank)[first],
                    prior=(priors or blank)[first],
                )
            )
        return studies

    def _column(self, table: Table, role: str) -> list[str] | None:
        name, default = self.optional[role]
        if name is None or (name == default and name not in table.columns):
            return None
        return table[name]

    def _labels(self, table: Table) -> Mapping[str, list[int | None]]:
        if self.tags is not None:
            given = [{tag.strip() for tag in cell.replace(";", "|").split("|")} - {""} for cell in table[self.tags]]
            known = sorted(set().union(*given))
            return {tag: [int(tag in present) for present in given] for tag in known}
        if self.label_columns is not None:
            return {name: _values(table, name) for name in self.label_columns}
        taken = {self.path, self.study, *(name for name, _ in self.optional.values()), *NOT_LABELS}
        return {
            name: _values(table, name)
            for name, cells in table.columns.items()
            if name not in taken and _looks_like_label(cells)
        }


def _looks_like_label(cells: list[str]) -> bool:
    """Nine in ten filled cells are labels: the tenth is then a mistake to be told."""
    filled = [cell.strip() for cell in cells if cell.strip()]
    return bool(filled) and sum(cell in VALUES for cell in filled) >= 0.9 * len(filled)


def _values(table: Table, name: str) -> list[int | None]:
    values = []
    for row, cell in enumerate(table[name]):
        if cell.strip() not in VALUES:
            raise DataError(
                f"{table.where(row)}: label {name!r} is {_short(cell)}; expected 1, 0, -1 (uncertain) "
                "or nothing; mend it, or name the columns that are labels in data.reader.label_columns"
            )
        values.append(VALUES[cell.strip()])
    return values


def _split(cell: str, table: Table, row: int) -> str:
    split = SPLITS.get(cell.strip().lower())
    if split is None:
        raise DataError(
            f"{table.where(row)}: split {cell!r}{nearest(cell, ('train', 'val', 'test'))}; expected train, val or test"
        )
    return split


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
