"""A table with one row an image: what any data set can be exported to."""

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medxray.data.attributes import age_band_of, agreed, manufacturer_of, sex_of
from medxray.data.readers import Reader, frontal_first, read_text, split_of, view_of
from medxray.data.readers.reports import chosen
from medxray.data.text import sections
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

SEPARATORS = {"comma": ",", "semicolon": ";", "tab": "\t", "bar": "|"}
"""What parts the cells of a row, by name."""

LARGEST_CELL = 2**20
"""Characters of a cell; more is an open quote."""

NOT_LABELS = {"age", "age_band", "sex", "manufacturer", "indication", "comparison", "technique", "findings", "impression"}


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

    def optional(self, name: str | None, default: str) -> list[str] | None:
        """The cells of a column that may be missing where its name is the default one; None without it.

        Raises:
            DataError: another name was stated, and there is no such column.
        """
        return None if name is None or (name == default and name not in self.columns) else self[name]

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


def read_table(path: Path, separator: str | None = None) -> Table:
    """A UTF-8 file with a header, plain or packed by gzip; quoted cells may span lines.

    Args:
        path: the file.
        separator: what parts its cells; by default the comma or, where the header has none, the semicolon, tab or bar
            that stands in it.

    Raises:
        DataError: not UTF-8 or damaged, no header, a name twice, an open quote, or a row with more or fewer cells than
            the header.
    """
    text = read_text(path)
    separator = separator or _separator(text)
    # The limit is the module's own; the usual one is less than a long report.
    csv.field_size_limit(LARGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows: list[list[str]] = []
    lines: list[int] = []
    line = 1
    try:
        header = [name.strip() for name in next(reader, ())]
        if not any(header):
            raise DataError(f"{path}: empty; expected a header line with the names of columns")
        width = len(header)
        line = reader.line_num + 1
        for row in reader:
            if len(row) == width:
                rows.append(row)
                lines.append(line)
            elif row and not (width > 1 and len(row) == 1 and not row[0].strip()):
                raise DataError(
                    f"{path}, line {line}: {len(row)} cells; expected {width} as in the header; "
                    f"quote cells that hold {_name_of(separator)}s or line ends"
                )
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {line}: not a CSV row ({_trouble(str(error))}); mend the quotes of the row that begins there"
        ) from None
    columns = {name: [row[i] for row in rows] for i, name in enumerate(header)}
    if len(columns) < width:
        name = next(name for name in header if header.count(name) > 1)
        # Spreadsheets leave empty columns at the right.
        bare = [i for i, other in enumerate(header) if other == name]
        if name or any(row[i].strip() for row in rows for i in bare):
            what = f"column {name!r} stands twice in the header; rename one"
            raise DataError(f"{path}: {what if name else f'columns {bare[0] + 1} and {bare[1] + 1} have no name; name them'}")
        del columns[""]
    return Table(path, columns, lines)


def _separator(text: str) -> str:
    """That of the header: the comma, unless it has none and another."""
    header = text[: text.find("\n") + 1 or len(text)]
    counts = {mark: header.count(mark) for mark in SEPARATORS.values()}
    return "," if counts[","] else max(counts, key=lambda mark: counts[mark])


def _name_of(separator: str) -> str:
    return next((name for name, mark in SEPARATORS.items() if mark == separator), "separator")


def _trouble(message: str) -> str:
    if "unexpected end" in message:
        return "a quote is opened and never closed"
    if "field limit" in message:
        return f"a cell of more than {LARGEST_CELL} characters, as where a quote is not closed"
    return message


class CSV(Reader):
    """One row an image; rows of one study are grouped, in the order of their first row. Columns sex, age (in years; its
    band alone is kept) and manufacturer, where there are any, tell of which subgroups a study is.

    Args:
        file: the table, below root; FILE.gz is taken where only that is there.
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
        section: what to learn of reports that are whole texts with headings; findings, impression and indication
            are then taken out of them too, unless they have columns.
        separator: comma, semicolon, tab or bar; null takes that of the header.
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
        section: Literal["findings", "impression", "findings+impression"] | None = None,
        separator: Literal["comma", "semicolon", "tab", "bar"] | None = None,
    ) -> None:
        super().__init__(root)
        self.listing = file
        self.section = section
        self.separator = SEPARATORS[separator] if separator else None
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
        return self.group(read_table(self.table(self.listing), self.separator))

    def group(self, table: Table) -> list[Study]:
        """Rows -> studies.

        Raises:
            DataError: rows of one study that disagree, an image twice in a study, a path that leaves root, a
                missing column, or a value that is no split or label.
        """
        paths, names = table[self.path], [cell.strip() for cell in table[self.study]]
        patients, views, reports, splits, indications, priors = (table.optional(*named) for named in self.optional.values())
        # A space at the end of a name would make two patients of one.
        patients = [cell.strip() for cell in patients] if patients else None
        splits = splits if splits and any(map(str.strip, splits)) else None
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
        if self.section and not reports:
            raise DataError(
                f"{table.path}: no column of reports to take the {self.section} from; name it in data.reader.report"
            )
        blank = [""] * len(table)
        rows: dict[str, list[int]] = {}
        for row, (name, path) in enumerate(zip(names, paths, strict=True)):
            if not name:
                raise DataError(f"{table.where(row)}: column {self.study!r} is empty; give the study a name")
            if not path.strip():
                raise DataError(
                    f"{table.where(row)}: image '' leads to nothing: column {self.path!r} is empty; name the image, or "
                    "remove the row"
                )
            rows.setdefault(name, []).append(row)
        sexes, ages, bands, makers = (table.columns.get(c, blank) for c in ("sex", "age", "age_band", "manufacturer"))
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
            report, found = (reports or blank)[first], {}
            if self.section:
                found = sections(report)
                report = chosen(found, self.section)
            images, shown = frontal_first(images, [view_of((views or blank)[row]) for row in own])
            studies.append(
                Study(
                    study_id=name,
                    patient_id=patient,
                    images=images,
                    views=shown,
                    findings=findings[first] if findings else found.get("findings", ""),
                    impression=impressions[first] if impressions else found.get("impression", ""),
                    report=report,
                    labels={label: values[first] for label, values in labels.items()},
                    split=_split(splits[first], table, first) if splits else split_of(patient or name),
                    indication=indications[first] if indications else found.get("indication", ""),
                    prior=(priors or blank)[first],
                    sex=agreed(sex_of(sexes[row]) for row in own),
                    age_band=agreed(age_band_of(ages[row] or bands[row]) for row in own),
                    manufacturer=agreed(manufacturer_of(makers[row]) for row in own),
                )
            )
        return studies

    def _labels(self, table: Table) -> Mapping[str, list[int | None]]:
        if self.tags is not None:
            return labels_of_tags(table[self.tags])
        if self.label_columns is not None:
            return {name: label_values(table, name) for name in self.label_columns}
        taken = {self.path, self.study, *(name for name, _ in self.optional.values()), *NOT_LABELS}
        return {
            name: label_values(table, name)
            for name, cells in table.columns.items()
            if name and name not in taken and _looks_like_label(cells)
        }


def _looks_like_label(cells: list[str]) -> bool:
    """Nine in ten filled cells are labels: the tenth is then a mistake to be told."""
    filled = [cell.strip() for cell in cells if cell.strip()]
    return bool(filled) and sum(cell in VALUES for cell in filled) >= 0.9 * len(filled)


def labels_of_tags(cells: list[str]) -> dict[str, list[int | None]]:
    """Tag -> 1 where a cell lists it, else 0; cells part their tags by "|" or ";"."""
    given = [{tag.strip() for tag in cell.replace(";", "|").split("|")} - {""} for cell in cells]
    return {tag: [int(tag in present) for present in given] for tag in sorted(set().union(*given))}


def label_values(table: Table, name: str) -> list[int | None]:
    """A column's labels.

    Raises:
        DataError: a cell that is none; with its line.
    """
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
