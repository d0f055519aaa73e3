"""PadChest: radiographs of Hospital San Juan, Alicante, with reports in Spanish and labels of their findings."""

import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from medxray.data.attributes import age_band_between, agreed, manufacturer_of, sex_of
from medxray.data.readers import Reader, frontal_first, split_of
from medxray.data.readers.csv import Table, read_table
from medxray.types import DataError, Study

TABLE = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"

VIEWS = {"PA": "PA", "AP": "AP", "AP_horizontal": "AP", "L": "LL"}
"""Projection -> view; the others are unknown."""

NAMES = {"normal": "No Finding"}

_WORD = re.compile(r"'([^']*)'|\"([^\"]*)\"")
_LIST = re.compile(r"\[\s*(?:(?:'[^']*'|\"[^\"]*\")\s*(?:,\s*|(?=\])))*\]")


class PadChest(Reader):
    """One study a StudyID and report, with all its images; the text to learn is the report, in Spanish. Labels are
    the terms of its findings and diagnoses, those of at least `least_studies` training studies; "normal" is called
    "No Finding".

    Root holds `PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv` and the 16-bit images, in the numbered folders of
    the table's ImageDir, or all in one folder (root or `images/`). There is no official split: patients are divided
    80/10/10 by a stable hash. Of dates and years of birth a band of age is kept, of what else the table has of a DICOM
    header sex and manufacturer.

    Args:
        projections: images of these only; null takes PA, AP, AP_horizontal and L (lateral), and leaves out COSTAL
            (ribs), EXCLUDE (of no use) and UNK, and tells how many.
        labelled_by: physician leaves out studies whose labels a network has predicted, three in four.
        pediatric: false leaves out studies of children.
        folders: images of these numbered folders only, such as [0, 1, 2]; null takes all.
        least_studies: a term of fewer training studies is too rare to learn or to score.
    """

    def __init__(
        self,
        root: Path,
        projections: list[Literal["PA", "AP", "AP_horizontal", "L", "COSTAL", "EXCLUDE", "UNK"]] | None = None,
        labelled_by: Literal["anyone", "physician"] = "anyone",
        pediatric: bool = True,
        folders: list[int] | None = None,
        least_studies: Annotated[int, Field(ge=1)] = 20,
    ) -> None:
        super().__init__(root)
        self.projections = set(VIEWS if projections is None else projections)
        self.labelled_by = labelled_by
        self.pediatric, self.folders, self.least_studies = pediatric, folders, least_studies

    def read(self) -> Iterable[Study]:
        """All studies that have an image left.

        Raises:
            DataError: the table or a folder of images is missing, no image is left, or a cell of labels is no list.
        """
        table = read_table(self.table(TABLE))
        rows = self._rows(table)
        if not rows:
            raise DataError(
                f"{table.path}: no image is left; check projections, labelled_by and folders in data.reader"
            )
        tags = self._tags(table, rows)
        names, folders, projections = table["ImageID"], table["ImageDir"], table["Projection"]
        places = self._places(sorted({folders[row] for row in rows}))
        studies: dict[tuple[str, str, str], list[int]] = {}
        for key, row in zip(self._keys(table, rows), rows, strict=True):
            studies.setdefault(key, []).append(row)
        blank = [""] * len(table)
        births, dates, sexes, makers = (
            table.columns.get(name, blank)
            for name in ("PatientBirth", "StudyDate_DICOM", "PatientSex_DICOM", "Manufacturer_DICOM")
        )
        reports = Counter(study for study, _, _ in studies)
        split_by_patient = {patient: split_of(patient) for patient in {patient for _, patient, _ in studies}}
        found: list[Study] = []
        given: list[frozenset[str]] = []
        for (study, patient, report), own in studies.items():
            paths = [self.inside(places[folders[row]] + names[row], table.where(row)) for row in own]
            images, views = frontal_first(paths, [VIEWS.get(projections[row], "unknown") for row in own])
            text = table["Report"][own[0]].strip()
            found.append(
                Study(
                    study_id=study if reports[study] == 1 else f"{study}-{report}",
                    patient_id=patient,
                    images=images,
                    views=views,
                    findings=text,
                    impression="",
                    report=text,
                    labels={},
                    split=split_by_patient[patient],
                    sex=agreed(sex_of(sexes[row]) for row in own),
                    age_band=agreed(age_band_between(births[row].removesuffix(".0"), dates[row]) for row in own),
                    manufacturer=agreed(manufacturer_of(makers[row]) for row in own),
                )
            )
            given.append(frozenset().union(*(tags[row] for row in own)))
        _label(found, given, self.least_studies)
        return found

    def _rows(self, table: Table) -> list[int]:
        """Rows of the images that the settings ask for."""
        methods, children = table["MethodLabel"], table["Pediatric"]
        only = None if self.folders is None else {str(folder) for folder in self.folders}
        folders = table["ImageDir"]
        rows = []
        passed: Counter[str] = Counter()
        for row, projection in enumerate(table["Projection"]):
            if (projection or "UNK") not in self.projections:
                passed[projection or "UNK"] += 1
                continue
            if only is not None and folders[row] not in only:
                continue
            if self.labelled_by == "physician" and methods[row] != "Physician":
                continue
            if not self.pediatric and children[row] == "PED":
                continue
            rows.append(row)
        self.left_out = [
            {
                "study": "",
                "file": table.path.name,
                "reason": f"{n} images of projection {name}, not in data.reader.projections",
            }
            for name, n in sorted(passed.items())
        ]
        return rows

    def _keys(self, table: Table, rows: list[int]) -> Iterable[tuple[str, str, str]]:
        """Study, patient and report of each row: what differs in one of them is not one study."""
        studies, patients, reports = table["StudyID"], table["PatientID"], table["ReportID"]
        for row in rows:
            if not (studies[row] and patients[row]):
                raise DataError(f"{table.where(row)}: StudyID or PatientID is empty; fetch the table again")
            yield studies[row], patients[row], reports[row]

    def _tags(self, table: Table, rows: list[int]) -> dict[int, frozenset[str]]:
        """Row -> labels that are present; none where nobody has entered any."""
        cells = table["Labels"]
        known: dict[str, frozenset[str]] = {"": frozenset()}
        for row in rows:
            cell = cells[row]
            if cell not in known:
                if not _LIST.fullmatch(cell.strip()):
                    raise DataError(
                        f"{table.where(row)}: Labels {cell!r:.60}; expected a list such as ['normal'], or nothing"
                    )
                words = {(single or double).strip().lower() for single, double in _WORD.findall(cell)} - {""}
                known[cell] = frozenset(NAMES.get(word, word) for word in words)
        return {row: known[cells[row]] for row in rows}

    def _places(self, folders: list[str]) -> dict[str, str]:
        """ImageDir -> what stands before a name.

        Raises:
            DataError: some of the numbered folders are missing, or all are still packed.
        """
        for base in ("", "images/"):
            there = [folder for folder in folders if folder and os.path.isdir(self.root / base / folder)]
            if there:
                missing = [folder for folder in folders if folder not in there]
                if missing:
                    raise DataError(
                        f"{self.root}: folders {', '.join(missing[:5])} of {len(folders)} are missing (found: "
                        f"{', '.join(there[:5])}); unpack them, or name those to take in data.reader.folders"
                    )
                return {folder: f"{base}{folder}/" for folder in folders}
        packed = [folder for folder in folders if (self.root / f"{folder}.zip").is_file()]
        if packed:
            raise DataError(
                f"{self.root}: {packed[0]}.zip is packed and cannot be read in place: unpack it into the folder "
                f"{packed[0]}/, and so the others, or name those to take in data.reader.folders"
            )
        base = "images/" if (self.root / "images").is_dir() else ""
        return dict.fromkeys(folders, base)


def _label(studies: list[Study], given: list[frozenset[str]], least: int) -> None:
    """Every study gets the frequent labels; one without any label gets them all missing."""
    count = Counter(tag for study, own in zip(studies, given, strict=True) if study["split"] == "train" for tag in own)
    labels = sorted(tag for tag, n in count.items() if n >= least)
    # Of some 180 labels each study has few: equal ones are one object, or all studies would take a gigabyte.
    known: dict[frozenset[str], dict[str, int | None]] = {frozenset(): dict.fromkeys(labels)}
    absent, frequent = dict.fromkeys(labels, 0), frozenset(labels)
    for study, own in zip(studies, given, strict=True):
        if own not in known:
            known[own] = {**absent, **dict.fromkeys(own & frequent, 1)}
        study["labels"] = known[own]
