"""Scores of any model's reports, out of a table."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from medxray.data.readers.csv import Table, read_table
from medxray.metrics import METRICS, Metric
from medxray.metrics.intervals import distinct_share, score_all
from medxray.registry import nearest
from medxray.types import DataError, Scores, SpecError

PATIENT, STUDY = "patient_id", "study_id"


def score_table(
    file: str | Path,
    prediction: str,
    reference: str,
    *,
    metrics: Sequence[str] = ("bleu", "rouge-l", "cider"),
    patient: str | None = None,
    study: str | None = None,
    intervals: bool = True,
    seed: int = 0,
) -> Scores:
    """Scores a column of reports against another, both as they stand: nothing is cleaned or cut, words are parted by spaces.

    Args:
        file: a CSV file with a row a study, plain or packed by gzip.
        prediction, reference: names of its columns. An empty prediction counts as one without a word.
        metrics: names of those that compare texts.
        patient: column of patients, by whom the bootstrap draws; `patient_id` where there is one, else each row is its own.
        study: column of the studies' names, which must differ; `study_id` where there is one.
        intervals: 95 % ones, by a bootstrap over patients.
        seed: of its draws.

    Raises:
        DataError: no such file or column, no row, a row without a reference, or a study twice; with the line.
        SpecError: a metric that is unknown, needs settings, or does not compare texts.
    """
    path = Path(file)
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected a CSV table with a prediction and a reference a row")
    chosen = [_metric(name) for name in metrics]
    table = read_table(path)
    predictions, references = table[prediction], table[reference]
    if not len(table):
        raise DataError(f"{path}: a header and no row; expected a row a study")
    for row, text in enumerate(references):
        if not text.strip():
            raise DataError(f"{table.where(row)}: column {reference!r} is empty; give the study a reference, or remove the row")
    _check_studies(table, study)
    by = patient or (PATIENT if PATIENT in table.columns else None)
    groups = table[by] if by else [""] * len(table)
    found = score_all(chosen, predictions, references, groups, 1000 if intervals else 0, seed)
    notes = ["texts as they stand: neither cleaned nor cut", f"{distinct_share(predictions):.0%} of the predictions are distinct"]
    empty = sum(not text.strip() for text in predictions)
    if empty:
        notes.append(f"{empty} predictions are empty and count as such")
    if intervals and not by:
        notes.append(f"each row counts as a patient; name a column with patients for intervals by them ({PATIENT})")
    return Scores(found, notes=notes, title=prediction)


def _metric(name: str) -> Metric:
    known = METRICS.names()
    if name not in known:
        raise SpecError(f"metrics: no metric {name!r}{nearest(name, known)}; expected some of {', '.join(known)}")
    if METRICS.get(name).takes != "text":
        raise SpecError(f"metrics: {name!r} does not compare texts; leave it out")
    try:
        return METRICS.build(METRICS.settings_of(name).model_validate({"name": name}))
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
