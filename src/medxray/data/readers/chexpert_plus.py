"""CheXpert Plus of Stanford AIMI: CheXpert's radiographs with their reports."""

import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from medxray.data.attributes import age_band_of, sex_of
from medxray.data.readers import Reader, frontal_first
from medxray.data.readers.chexpert import LABELS, Places, assigned, patient_folders, place_of, view_from
from medxray.data.readers.csv import SPLITS, Table, read_table
from medxray.data.readers.reports import Part, chosen, read_annotation, studies_before
from medxray.types import DataError, Study

TABLE = "df_chexpert_plus_240401.csv"
KINDS = (".png", ".jpg", ".jpeg", ".dcm")
"""Kinds of image files; of several the first that is there."""


class CheXpertPlus(Reader):
    """A study is a patient's visit with its views and its report.

    Root holds `df_chexpert_plus_240401.csv` and the images below any folder (`PNG/`, `DICOM/`, one for each archive
    that was unpacked), and, for labels, `chexbert_labels/` or `chexbert_labels.zip`. Rows of one study may have
    different reports: texts and labels are those of its first frontal image's row, or of the next that has the section
    to learn. The report before is told by `patient_report_date_order`. Of the columns about a person sex and a band
    of age are kept.

    Args:
        report: what of a report is learned; all is the column `report`.
        without_report: what becomes of a study whose report has no such section.
        labels: of which section CheXbert's labels are; a study without that section has none. Null is the
            impression's, as in CheXpert, where they are there.
        valid: which split the official validation images are: test, where patients for validation are taken out of
            the training set, one in ten by a stable hash; or val, where nothing is for test.
        images: folder below root to look for images in; null is root, and of several kinds PNG first.
        annotation: name of a file below root in R2Gen's form, as R2GenCSR gives one for this data set: its entries are
            then the studies, with their texts and splits. Null is the table's own.
    """

    def __init__(
        self,
        root: Path,
        report: Part = "findings",
        without_report: Literal["keep", "drop"] = "keep",
        labels: Literal["impression", "findings", "report"] | None = None,
        valid: Literal["test", "val"] = "test",
        images: str | None = None,
        annotation: str | None = None,
    ) -> None:
        super().__init__(root)
        self.part, self.without_report, self.section, self.valid = report, without_report, labels, valid
        self.images, self.annotation = images, annotation

    def read(self) -> Iterable[Study]:
        """All studies of the table, or of the annotation.

        Raises:
            DataError: the table, the labels or all images are missing, a path that names no patient, study and view,
                one image in two rows, an unknown split, a value that is no label, an image of the annotation that the
                table lacks.
        """
        table = read_table(self.table(TABLE))
        places = patient_folders(self.root, self.root / (self.images or ""), KINDS)
        rows = _Rows(table, self.part)
        labels = self._labels(table)
        studies = self._annotated(rows, places) if self.annotation else self._official(rows, places)
        found = []
        for study, row in studies:
            if self.without_report == "drop" and not study["report"].strip():
                continue
            if labels is not None:
                study["labels"] = dict(labels[row])
            found.append(study)
        return found

    def _official(self, rows: "_Rows", places: Places) -> Iterable[tuple[Study, int]]:
        for name, own in rows.studies.items():
            row = rows.main[name]
            shots = [(self.inside(places.file(rows.shots[i]), rows.table.where(i)), rows.view(i)) for i in own]
            images, views = frontal_first(*zip(*shots, strict=True))
            split = assigned(SPLITS[rows.splits[row]], rows.patients[row], self.valid)
            report = chosen(rows.texts(row), self.part, rows.whole[row])
            yield rows.study(row, name, images, views, report, split), row

    def _annotated(self, rows: "_Rows", places: Places) -> Iterable[tuple[Study, int]]:
        row_of = {shot: row for row, shot in enumerate(rows.shots)}
        for entry in read_annotation(self.file(self.annotation or "")):
            shown = []
            for path in entry.images:
                shot = place_of(path, f"{entry.where}: image")
                if shot not in row_of:
                    raise DataError(
                        f"{entry.where}: image {path!r} has no row in {rows.table.path.name}; fetch both files again"
                    )
                shown.append(row_of[shot])
            if not shown:
                raise DataError(f"{entry.where}: no image; remove the entry")
            pairs = [(self.inside(places.file(rows.shots[i]), entry.where), rows.view(i)) for i in shown]
            images, views = frontal_first(*zip(*pairs, strict=True))
            row = shown[0]
            yield rows.study(row, entry.name, images, views, entry.report, entry.split), row

    def _labels(self, table: Table) -> list[dict[str, int | None]] | None:
        """Those of each row; None where there are none."""
        section = self.section or "impression"
        name = f"{section}_fixed.json"
        places = [self.root / folder / name for folder in ("chexbert_labels", "labels", ".")]
        path = next((place for place in places if place.is_file()), None)
        packed = self.root / "chexbert_labels.zip"
        if path is not None:
            with path.open("rb") as file:
                known = _read_labels(path, file)
        elif packed.is_file():
            try:
                with zipfile.ZipFile(packed) as archive:
                    member = next((m for m in archive.namelist() if m.rpartition("/")[2] == name), None)
                    if member is None:
                        raise DataError(f"{packed}: no {name} in it; fetch it again, or choose data.reader.labels")
                    with archive.open(member) as lines:
                        path = packed / name
                        known = _read_labels(path, lines)
            except (zipfile.BadZipFile, EOFError) as error:
                raise DataError(f"{packed}: damaged or no zip archive ({error}); fetch it again") from None
        elif self.section is None:
            return None
        else:
            raise DataError(
                f"{self.root}: no chexbert_labels/{name} and no chexbert_labels.zip; fetch it, or leave out data.reader.labels"
            )
        texts = table["report" if section == "report" else f"section_{section}"]
        nothing = dict.fromkeys(LABELS)
        found: list[dict[str, int | None]] = []
        for row, (image, text) in enumerate(zip(table["path_to_image"], texts, strict=True)):
            if image not in known:
                raise DataError(f"{path}: no labels of {image!r} ({table.where(row)}); fetch both files again")
            # What was computed of an empty text says "No Finding" of an image that nobody described.
            found.append(known[image] if text.strip() else nothing)
        return found


class _Rows:
    """The table by study.

    Attributes:
        table: as read.
        shots: a row's patient, study and view.
        studies: study -> its rows.
        main: study -> the row whose texts and labels it has.
    """

    def __init__(self, table: Table, part: Part) -> None:
        self.table = table
        self.patients = table["deid_patient_id"]
        self.sides, self.positions = table["frontal_lateral"], table["ap_pa"]
        self.sections = {name: table[f"section_{name}"] for name in ("findings", "impression")}
        self.whole = table["report"]
        self.splits = table["split"]
        for row, cell in enumerate(self.splits):
            if cell not in SPLITS:
                raise DataError(f"{table.where(row)}: split {cell!r}; expected train or valid; fetch the table again")
        blank = [""] * len(table)
        self.sexes, self.ages = table.columns.get("sex", blank), table.columns.get("age", blank)
        self.reasons = table["section_clinical_history"], table["section_history"]
        self.shots = [
            place_of(path, f"{table.where(i)}: path_to_image") for i, path in enumerate(table["path_to_image"])
        ]
        self.studies: dict[str, list[int]] = {}
        for row, shot in enumerate(self.shots):
            self.studies.setdefault(f"{shot.patient}_{shot.study}", []).append(row)
        self.main: dict[str, int] = {}
        for name, own in self.studies.items():
            if len(own) > 1:
                if len({self.shots[row] for row in own}) < len(own):
                    raise DataError(f"{table.where(own[-1])}: an image of {name} stands twice; fetch the table again")
                if len({(self.patients[row], self.splits[row]) for row in own}) > 1:
                    raise DataError(
                        f"{table.where(own[-1])}: another patient or split than in other rows of {name}; fetch the table again"
                    )
                own.sort(key=lambda row: self.view(row) == "LL")
            texts = (row for row in own if chosen(self.texts(row), part, self.whole[row]).strip())
            self.main[name] = next(texts, own[0])
        times = {}
        for name, row in self.main.items():
            try:
                times[name] = float(table["patient_report_date_order"][row])
            except ValueError:
                continue
        self.before = studies_before({name: self.patients[row] for name, row in self.main.items()}, times)

    def view(self, row: int) -> str:
        """PA, AP, LL or unknown."""
        return view_from(self.sides[row], self.positions[row])

    def texts(self, row: int) -> dict[str, str]:
        """Findings and impression."""
        return {name: cells[row].strip() for name, cells in self.sections.items()}

    def study(self, row: int, name: str, images: list[str], views: list[str], report: str, split: str) -> Study:
        """A study with a row's texts."""
        texts = self.texts(row)
        shot = self.shots[row]
        before = self.before.get(f"{shot.patient}_{shot.study}")
        return Study(
            study_id=name,
            patient_id=self.patients[row],
            images=images,
            views=views,
            findings=texts["findings"],
            impression=texts["impression"],
            report=report,
            labels={},
            split=split,
            indication=next(filter(None, (cells[row].strip() for cells in self.reasons)), ""),
            prior=chosen(self.texts(self.main[before]), "findings+impression") if before else "",
            sex=sex_of(self.sexes[row]),
            age_band=age_band_of(self.ages[row]),
        )


_NUMBERS: dict[Any, int | None] = {1: 1, 0: 0, -1: -1, None: None}


def _read_labels(path: Path, lines: Iterable[bytes]) -> dict[str, dict[str, int | None]]:
    """Image -> labels, of a file with a JSON object a line."""
    found: dict[str, dict[str, int | None]] = {}
    known: dict[tuple[Any, ...], dict[str, int | None]] = {}
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            image, values = entry["path_to_image"], tuple(entry[label] for label in LABELS)
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}, line {number}: not JSON with labels ({error}); fetch the file again") from None
        except KeyError as error:
            raise DataError(f"{path}, line {number}: no {error}; expected path_to_image and 14 labels") from None
        if values not in known:
            for label, value in zip(LABELS, values, strict=True):
                if not isinstance(value, int | float | None) or value not in _NUMBERS:
                    raise DataError(
                        f"{path}, line {number}: label {label!r} is {value!r:.60}; expected 1, 0, -1 (uncertain) or null; "
                        "fetch the file again"
                    )
            known[values] = {label: _NUMBERS[value] for label, value in zip(LABELS, values, strict=True)}
        found[image] = known[values]
    return found
