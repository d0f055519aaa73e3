"""MIMIC-CXR of PhysioNet: its images as JPG or DICOM, its tables and its reports, as they are published."""

import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

from medxray.data.readers import Reader, frontal_first, read_text, split_of, view_of
from medxray.data.readers.chexpert import SUFFIXES, labels_of
from medxray.data.readers.csv import SPLITS, Table, read_table
from medxray.data.readers.reports import Part, chosen, read_annotation, studies_before
from medxray.data.text import sections
from medxray.progress import progress_bar
from medxray.types import DataError, Study

VERSIONS = ("2.0.0", "2.1.0")
RADIOLOGISTS = "mimic-cxr-2.1.0-test-set-labeled.csv"
REPORTS = "mimic-cxr-reports.zip"
_CODES = {
    "postero-anterior": "PA",
    "antero-posterior": "AP",
    "lateral": "LL",
    "left lateral": "LL",
    "right lateral": "LL",
}
_MANY = 5000
"""Reports from which on a bar is shown."""
_BATCH = 256
"""Reports that a thread reads at a time."""


class MIMICCXR(Reader):
    """A study is a patient's visit with its views and its report.

    Root is the folder of MIMIC-CXR-JPG (`files/` with JPG, tables `mimic-cxr-2.0.0-*.csv.gz`) or of MIMIC-CXR (`files/`
    with DICOM, `cxr-record-list.csv.gz`); tables may be unpacked. The report before is told by StudyDate and StudyTime,
    which are not kept.

    Args:
        report: what of a report is learned; all is the whole text.
        without_report: what becomes of a study whose report has no such section.
        reports: folder with the report tree, or `mimic-cxr-reports.zip` itself, below root or absolute. Null looks into
            root, where images and reports may share `files/`; without any, reports are empty.
        tables: folder with the tables of MIMIC-CXR-JPG, below root or absolute; null is root.
        images: folder below root that holds p10 to p19; null is `files`, else `images`, else root.
        labels: by whose labeller; null is chexpert where its table is there.
        test_labels: radiologists takes the labels of test studies from `mimic-cxr-2.1.0-test-set-labeled.csv` alone,
            which has some 700 of them; the others then have none.
        split: official, or hash for patients divided 80/10/10, where there is no table of splits.
        annotation: name of R2Gen's file of MIMIC-CXR below root: its entries, one an image, are then the studies, with
            their texts and splits; the tables and reports, where they are, tell the rest.
    """

    def __init__(
        self,
        root: Path,
        report: Part = "findings",
        without_report: Literal["keep", "drop"] = "keep",
        reports: str | None = None,
        tables: str | None = None,
        images: str | None = None,
        labels: Literal["chexpert", "negbio"] | None = None,
        test_labels: Literal["same", "radiologists"] = "same",
        split: Literal["official", "hash"] = "official",
        annotation: str | None = None,
    ) -> None:
        super().__init__(root)
        self.part, self.without_report, self.annotation = report, without_report, annotation
        self.reports, self.tables, self.images = reports, tables, images
        self.labels, self.test_labels, self.split = labels, test_labels, split

    def read(self) -> Iterable[Study]:
        """All studies of the tables, or of the annotation.

        Raises:
            DataError: a table, a report or all images are missing, an image without a split, an empty name, an
                unknown split, a value that is no label.
        """
        metadata = self._metadata()
        visits = self._annotated(metadata) if self.annotation else self._official(metadata)
        labels = self._labels({visit.study for visit in visits if visit.split == "test"})
        patients = {visit.study: visit.patient for visit in visits}
        texts = self._texts({**(metadata.patients if metadata else {}), **patients})
        before = studies_before(metadata.patients, metadata.times()) if metadata else {}
        found = []
        for visit in visits:
            text = texts.get(visit.study, _NONE)
            report = chosen(text.sections, self.part, text.whole) if visit.report is None else visit.report
            if self.without_report == "drop" and not report.strip():
                continue
            findings = text.sections.get("findings", "")
            found.append(
                Study(
                    study_id=visit.name,
                    patient_id=visit.patient,
                    images=visit.images,
                    views=visit.views,
                    findings=findings if visit.report is None or text is not _NONE else visit.report,
                    impression=text.sections.get("impression", ""),
                    report=report,
                    labels=dict(labels.get(visit.study, {})),
                    split=visit.split,
                    indication=text.sections.get("indication", ""),
                    prior=chosen(texts.get(before.get(visit.study, ""), _NONE).sections, "findings+impression"),
                )
            )
        return found

    def _official(self, metadata: "_Metadata | None") -> list["_Visit"]:
        listing = metadata.table if metadata else self._listing()
        splits = self._splits(listing)
        folder, suffix = self._images()
        dicoms, studies, patients = (listing[name] for name in ("dicom_id", "study_id", "subject_id"))
        rows: dict[str, list[int]] = {}
        for row, study in enumerate(studies):
            rows.setdefault(study, []).append(row)
        visits = []
        for study, own in rows.items():
            patient = patients[own[0]]
            if not (study and patient):
                raise DataError(f"{listing.where(own[0])}: subject_id or study_id is empty; fetch the table again")
            place = f"{folder}p{patient[:2]}/p{patient}/s{study}/"
            images = [self.inside(f"{place}{dicoms[row]}{suffix}", listing.where(row)) for row in own]
            if len(set(images)) < len(images):
                raise DataError(
                    f"{listing.where(own[-1])}: an image of study {study} stands twice; fetch the table again"
                )
            if len({(patients[row], splits and splits[dicoms[row]]) for row in own}) > 1:
                raise DataError(
                    f"{listing.where(own[-1])}: another patient or split than in other rows of study {study}; fetch the "
                    "tables again"
                )
            views = [metadata.views[row] for row in own] if metadata else ["unknown"] * len(own)
            images, views = frontal_first(images, views)
            split = splits[dicoms[own[0]]] if splits is not None else split_of(patient)
            visits.append(_Visit(study, study, patient, images, views, split))
        return visits

    def _annotated(self, metadata: "_Metadata | None") -> list["_Visit"]:
        folder, suffix = self._images()
        view_of_image = dict(zip(metadata.table["dicom_id"], metadata.views, strict=True)) if metadata else {}
        visits = []
        for entry in read_annotation(self.file(self.annotation or "")):
            study, patient = (str(entry.fields.get(key, "")) for key in ("study_id", "subject_id"))
            if not (study and patient):
                raise DataError(f"{entry.where}: no study_id or no subject_id; expected R2Gen's file of MIMIC-CXR")
            stems = [os.path.splitext(image.removeprefix("files/"))[0] for image in entry.images]
            images = [self.inside(f"{folder}{stem}{suffix}", entry.where) for stem in stems]
            views = [view_of_image.get(stem.rpartition("/")[2], "unknown") for stem in stems]
            images, views = frontal_first(images, views)
            visits.append(_Visit(entry.name, study, patient, images, views, entry.split, entry.report))
        return visits

    def _metadata(self) -> "_Metadata | None":
        path = self._found(*_names("metadata"))
        return _Metadata(read_table(path)) if path else None

    def _listing(self) -> Table:
        """A table that lists the images, where there is no metadata."""
        names = *_names("split"), "cxr-record-list.csv"
        path = self._found(*names) or self._found("cxr-record-list.csv", folder=self.root)
        if path is None:
            if not self.root.is_dir():
                self.file("files")
            raise DataError(
                f"{self._place(self.tables)}: expected {_names('metadata')[0]} of MIMIC-CXR-JPG or cxr-record-list.csv of "
                f"MIMIC-CXR, plain or with .gz; the folder holds {_inside(self._place(self.tables))}; check "
                "data.reader.root and data.reader.tables"
            )
        return read_table(path)

    def _splits(self, listing: Table) -> dict[str, str] | None:
        """Image -> split; None where they are not asked for."""
        if self.split == "hash":
            return None
        path = self._found(*_names("split"))
        if path is None:
            raise DataError(
                f"{self._place(self.tables)}: no {_names('split')[0]}, plain or with .gz; fetch it from MIMIC-CXR-JPG and name "
                "its folder in data.reader.tables, or set data.reader.split: hash"
            )
        table = read_table(path)
        found = {}
        for row, (image, cell) in enumerate(zip(table["dicom_id"], table["split"], strict=True)):
            if cell not in SPLITS:
                raise DataError(
                    f"{table.where(row)}: split {cell!r}; expected train, validate or test; fetch the table again"
                )
            found[image] = SPLITS[cell]
        for row, image in enumerate(listing["dicom_id"]):
            if image not in found:
                raise DataError(
                    f"{listing.where(row)}: image {image!r} has no split in {path}; fetch both tables again"
                )
        return found

    def _labels(self, tested: set[str]) -> dict[str, dict[str, int | None]]:
        """Study -> labels."""
        kind = self.labels or "chexpert"
        path = self._found(*_names(kind))
        if path is None and self.labels is not None:
            raise DataError(
                f"{self._place(self.tables)}: no {_names(kind)[0]}, plain or with .gz; fetch it, or choose other "
                "data.reader.labels"
            )
        found = {}
        if path is not None:
            table = read_table(path)
            found = dict(zip(table["study_id"], labels_of(table), strict=True))
        if self.test_labels == "radiologists":
            path = self._found(RADIOLOGISTS)
            if path is None:
                raise DataError(
                    f"{self._place(self.tables)}: no {RADIOLOGISTS}; fetch it from MIMIC-CXR-JPG 2.1.0, or leave out "
                    "data.reader.test_labels"
                )
            table = read_table(path)
            name = "Airspace Opacity"  # as Lung Opacity is called there
            names = {"Lung Opacity": name} if name in table.columns else {}
            own = dict(zip(table["study_id"], labels_of(table, names, some=True), strict=True))
            found = {study: labels for study, labels in found.items() if study not in tested}
            found |= {study: own[study] for study in tested if study in own}
        return found

    def _found(self, *names: str, folder: Path | None = None) -> Path | None:
        folder = folder or self._place(self.tables)
        paths = (folder / f"{name}{suffix}" for name in names for suffix in ("", ".gz"))
        return next((path for path in paths if path.is_file()), None)

    def _place(self, below: str | None) -> Path:
        return self.root / below if below else self.root

    def _images(self) -> tuple[str, str]:
        """Their folder below root, with a slash, and the kind of their files."""
        folders = [self.images] if self.images else ["files", "images", "."]
        for folder in folders:
            suffix = _first_suffix(self.root / folder)
            if suffix:
                return "" if folder == "." else f"{folder.rstrip('/')}/", suffix
        raise DataError(
            f"{self.root}: no folder {' or '.join(folders)} with images such as p10/p10000032/s50414267/NAME.jpg (or "
            f"{', '.join(SUFFIXES[1:])}); the folder holds {_inside(self.root)}; check data.reader.root and data.reader.images"
        )

    def _texts(self, patients: Mapping[str, str]) -> dict[str, "_Text"]:
        """Study -> its report, for all of these studies; empty where there are no reports at all.

        Args:
            patients: study -> patient.
        """
        place = self._place(self.reports)
        archive = place if place.suffix == ".zip" else place / REPORTS
        folders = [
            place / name for name in ("files", "mimic-cxr-reports/files", "mimic-cxr-reports", "reports/files", ".")
        ]
        folder = next((folder for folder in folders if _has_texts(folder)), None)
        if folder is not None:
            return _read_texts(partial(_from_folder, folder), patients, str(folder))
        if archive.is_file():
            try:
                with zipfile.ZipFile(archive) as file:
                    members = {Path(m.filename).stem: m for m in file.infolist() if m.filename.endswith(".txt")}
                    return _read_texts(partial(_from_archive, file, members), patients, str(archive))
            except (zipfile.BadZipFile, EOFError) as error:
                raise DataError(f"{archive}: damaged or no zip archive ({error}); fetch it again") from None
        if self.reports is None and (self.without_report == "keep" or self.annotation):
            return {}
        raise DataError(
            f"{place}: no report; expected files/p10/p10000032/s50414267.txt, or {REPORTS}; fetch it from MIMIC-CXR and name "
            "it, or the folder that it was unpacked into, in data.reader.reports"
        )


class _Visit(NamedTuple):
    """A study to be; `report` is None where it is to be taken from its text."""

    name: str
    study: str
    patient: str
    images: list[str]
    views: list[str]
    split: str
    report: str | None = None


class _Text(NamedTuple):
    whole: str
    sections: dict[str, str]


_NONE = _Text("", {})


class _Metadata:
    """The metadata table.

    Attributes:
        table: as read.
        patients: study -> patient.
        views: a row's PA, AP, LL or unknown; by the view's code where its position is not told.
    """

    def __init__(self, table: Table) -> None:
        self.table = table
        self.patients = dict(zip(table["study_id"], table["subject_id"], strict=True))
        codes = table.columns.get("ViewCodeSequence_CodeMeaning", [""] * len(table))
        pairs = list(zip(table["ViewPosition"], codes, strict=True))
        known = {
            (position, code): view_of(position) if position.strip() else _CODES.get(code.strip().lower(), "unknown")
            for position, code in set(pairs)
        }
        self.views = [known[pair] for pair in pairs]

    def times(self) -> dict[str, float]:
        """Study -> YYYYMMDDhhmmss of its first image; a time as published has no leading zeros."""
        found: dict[str, float] = {}
        for study, date, time in zip(*(self.table[c] for c in ("study_id", "StudyDate", "StudyTime")), strict=True):
            try:
                at = float(date) * 1e6 + float(time)
            except ValueError:
                continue
            if study not in found or at < found[study]:
                found[study] = at
        return found


def _names(kind: str) -> list[str]:
    return [f"mimic-cxr-{version}-{kind}.csv" for version in VERSIONS]


def _inside(folder: Path) -> str:
    if not folder.is_dir():
        return "nothing: there is no such folder"
    return ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"


def _patients_in(folder: Path) -> Iterator[Path]:
    """Folders such as p10/p10000032, in order."""
    if folder.is_dir():
        for tenth in sorted(folder.glob("p[0-9][0-9]")):
            yield from sorted(path for path in tenth.iterdir() if path.is_dir())


def _first_suffix(folder: Path) -> str | None:
    """Kind of the image files below a folder."""
    for patient in _patients_in(folder):
        for study in sorted(path for path in patient.iterdir() if path.is_dir()):
            own = {path.suffix for path in study.iterdir()}
            for suffix in SUFFIXES:
                if suffix in own:
                    return suffix
    return None


def _has_texts(folder: Path) -> bool:
    return any(any(patient.glob("s*.txt")) for patient in islice(_patients_in(folder), 20))


def _read_texts(read: Callable[[str, str], str | None], patients: Mapping[str, str], source: str) -> dict[str, _Text]:
    """All reports with their sections.

    Args:
        read: patient and study -> the text, None where there is none.
        patients: study -> patient.
        source: for messages.

    Raises:
        DataError: some are missing.
    """
    studies = list(patients)
    starts = range(0, len(studies), _BATCH)

    def batch(start: int) -> list[str | None]:
        return [read(patients[study], study) for study in studies[start : start + _BATCH]]

    found: dict[str, _Text] = {}
    missing = []
    # Threads wait for the files; sections are found meanwhile.
    with (
        ThreadPoolExecutor(8) as pool,
        progress_bar(desc="reports", total=len(studies), disable=len(studies) < _MANY, unit="report") as bar,
    ):
        for start, texts in zip(starts, pool.map(batch, starts), strict=True):
            for study, text in zip(studies[start:], texts, strict=False):
                if text is None:
                    missing.append(f"p{patients[study][:2]}/p{patients[study]}/s{study}.txt")
                else:
                    found[study] = _Text(text, sections(text))
            bar.update(len(texts))
    if missing:
        raise DataError(
            f"{source}: {len(missing)} of {len(patients)} reports are missing, such as {missing[0]}; fetch {REPORTS} again"
        )
    return found


def _from_folder(folder: Path, patient: str, study: str) -> str | None:
    path = folder / f"p{patient[:2]}" / f"p{patient}" / f"s{study}.txt"
    # The name of a patient or study is no way out of the folder.
    plain = not set("/\\\0") & {*patient, *study}
    return read_text(path) if plain and path.is_file() else None


def _from_archive(
    archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], patient: str, study: str
) -> str | None:
    member = members.get(f"s{study}")
    if member is None:
        return None
    try:
        return archive.read(member).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{archive.filename}: {member.filename}: expected UTF-8 ({error}); fetch it again") from None
