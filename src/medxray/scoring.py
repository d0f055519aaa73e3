"""Scores of any model's reports, out of a table."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from medxray.data.readers import read_text
from medxray.data.readers.csv import Table, read_table
from medxray.data.text import is_empty
from medxray.metrics import METRICS, Metric, available
from medxray.metrics.floors import repetition
from medxray.metrics.intervals import score_all
from medxray.metrics.protocols import AS_IT_STANDS, Protocol
from medxray.metrics.protocols import protocol as named_protocol
from medxray.registry import nearest
from medxray.types import DataError, Scores, SpecError

PATIENT, STUDY = "patient_id", "study_id"
_COMPARES = {"text": "texts", "labels": "labels", "reconstruction": "reconstructions"}


def score_table(
    file: str | Path,
    prediction: str,
    reference: str,
    *,
    metrics: Sequence[str] = ("bleu", "rouge-l", "cider"),
    patient: str | None = None,
    study: str | None = None,
    protocol: str | None = None,
    words: int | None = None,
    intervals: bool = True,
    seed: int = 0,
) -> Scores:
    """Scores a column of reports against another, both as they stand unless a protocol is named; words are parted by spaces.

    Args:
        file: a table with a row a study: CSV, plain or packed by gzip, JSON Lines, or Parquet, such as a run's
            predictions.parquet (columns text and reference).
        prediction, reference: names of its columns. An empty prediction counts as one without a word.
        metrics: names of those that compare texts.
        patient: column of patients, by whom the bootstrap draws; `patient_id` where there is one, else each row is its own.
        study: column of the studies' names, which must differ; `study_id` where there is one.
        protocol: how both are cleaned and how much of a reference counts: one of `medxray.metrics.protocols.PROTOCOLS`,
            such as "r2gen-iu". None leaves them as they stand.
        words: of a reference that count, in place of the protocol's own limit.
        intervals: 95 % ones, by a bootstrap over patients.
        seed: of its draws.

    Raises:
        DataError: no such file or column, no row, a row without a reference, or a study twice; with the line.
        SpecError: no metric, a protocol or metric that is unknown, or a metric that needs settings or does not compare texts.
    """
    if not metrics:
        raise SpecError(f"metrics: none are named; expected some of {', '.join(METRICS.names())}")
    read = named_protocol(protocol, words)
    chosen, left_out = available([named_metric(name) for name in metrics])
    reports = read_reports(file, prediction, reference, patient=patient, study=study, protocol=read)
    groups = reports.patients or [""] * len(reports.texts)
    found = score_all(chosen, reports.texts, reports.references, groups, 1000 if intervals else 0, seed)
    notes = repetition(reports.texts, reports.references, {})
    empty = sum(not text.strip() for text in reports.texts)
    if empty:
        notes.append(f"{empty} predictions are empty and count as such")
    notes += left_out
    if intervals and not reports.patients:
        notes.append(f"each row counts as a patient; name a column with patients for intervals by them ({PATIENT})")
    return Scores(found, notes=notes, title=prediction, protocol=read.words)


@dataclass(frozen=True)
class Reports:
    """Columns of a table of reports, a cell a row.

    Attributes:
        texts: what was generated; may be empty.
        references: what people wrote; never empty.
        patients, studies: their names; [] where the table has no such column.
    """

    texts: list[str]
    references: list[str]
    patients: list[str]
    studies: list[str]


def read_reports(
    file: str | Path,
    prediction: str,
    reference: str,
    *,
    patient: str | None = None,
    study: str | None = None,
    protocol: Protocol = AS_IT_STANDS,
) -> Reports:
    """The reports of a table as a protocol reads them, each study once; arguments and errors as those of `score_table`."""
    path = Path(file)
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected a CSV table with a prediction and a reference a row")
    table = _read(path)
    for option, name in (("prediction", prediction), ("reference", reference), ("patient", patient), ("study", study)):
        if name is not None and name not in table.columns:
            found = f"{nearest(name, table.columns)} (found: {', '.join(table.columns)})"
            raise DataError(f"{path}: no column {name!r}{found}; name the right one by --{option}")
    texts = [protocol.prediction(text) for text in table[prediction]]
    references = [protocol.reference(text) for text in table[reference]]
    if not len(table):
        raise DataError(f"{path}: a header and no row; expected a row a study")
    for row, text in enumerate(references):
        if not table[reference][row].strip():
            raise DataError(f"{table.where(row)}: column {reference!r} is empty; give the study a reference, or remove the row")
        if protocol.cleaning != "none" and is_empty(text):
            raise DataError(
                f"{table.where(row)}: column {reference!r} has no word left when it is cleaned by {protocol.cleaning}; "
                "give the study a reference, or remove the row"
            )
    _check_studies(table, study)
    patients, studies = (
        table[named or default] if named or default in table.columns else []
        for named, default in ((patient, PATIENT), (study, STUDY))
    )
    return Reports(texts, references, patients, studies)


def named_metric(name: str, takes: str = "text", settings: Mapping[str, Any] | None = None) -> Metric:
    """A metric by its name.

    Args:
        name: a registered one.
        takes: what it must compare.
        settings: its own, as a spec has them.

    Raises:
        SpecError: it is unknown, needs settings, or compares something else.
    """
    known = METRICS.names()
    if name not in known:
        raise SpecError(f"metrics: no metric {name!r}{nearest(name, known)}; expected some of {', '.join(known)}")
    if METRICS.get(name).takes != takes:
        raise SpecError(f"metrics: {name!r} does not compare {_COMPARES[takes]}; leave it out")
    try:
        return METRICS.build(METRICS.settings_of(name).model_validate({**(settings or {}), "name": name}))
    except ValidationError as error:
        needed = ", ".join(str(one["loc"][-1]) for one in error.errors())
        raise SpecError(f"metrics: {name!r} needs settings ({needed}); give them in a spec and evaluate a run") from None


def _check_studies(table: Table, study: str | None) -> None:
    if study is None and STUDY not in table.columns:
        return
    first: dict[str, int] = {}
    for row, name in enumerate(table[study or STUDY]):
        if name and first.setdefault(name, row) != row:
            raise DataError(
                f"{table.where(row)}: study {name!r} stands on {table.place(first[name])} too; a study is scored once: "
                "remove a row"
            )


class _Rows(Table):
    """A table in a file without lines."""

    def place(self, row: int) -> str:
        return f"row {self.lines[row]}"


def _read(path: Path) -> Table:
    """A table of texts by its file's kind; what is missing is ""."""
    if path.suffix == ".parquet":
        return _parquet(path)
    return _json_lines(path) if path.suffix in (".jsonl", ".ndjson") else read_table(path)


def _parquet(path: Path) -> Table:
    import pyarrow as arrow
    from pyarrow import parquet

    try:
        data = parquet.read_table(path)
    except (arrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a Parquet file ({str(error).splitlines()[0]}); write it again, or give CSV") from None
    flat = [name for name in data.column_names if not arrow.types.is_nested(data.schema.field(name).type)]
    columns = {name: [_cell(value) for value in data[name].to_pylist()] for name in flat}
    return _Rows(path, columns, list(range(1, len(data) + 1)))


def _json_lines(path: Path) -> Table:
    rows, lines = [], []
    for line, text in enumerate(read_text(path).split("\n"), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise DataError(f'{path}, line {line}: expected a JSON object such as {{"text": "...", "reference": "..."}}')
        rows.append(row)
        lines.append(line)
    names = dict.fromkeys(name for row in rows for name in row)
    return Table(path, {name: [_cell(row.get(name)) for row in rows] for name in names}, lines)


def _cell(value: Any) -> str:
    return "" if value is None else str(value)
