"""A hospital's folder of DICOM files, as it comes out of an archive.

Only headers are read, and of those only what studies are made of. Patients, studies and images are named by keyed
hashes (`medxray.data.privacy`); no identifier, date or path below root goes any further, not even into a message.
"""

import contextlib
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from medxray.cache import cache_folder
from medxray.data.attributes import agreed, manufacturer_of, sex_of
from medxray.data.dicom_headers import HEADER, Header, StructuredReport, class_name, structured_report
from medxray.data.privacy import Names, find_key
from medxray.data.readers import Reader, frontal_first, split_of
from medxray.data.readers.csv import NOT_LABELS, SPLITS, VALUES, Table, labels_of_tags, read_table
from medxray.data.readers.reports import Part, chosen
from medxray.data.text import sections
from medxray.progress import progress_bar
from medxray.types import DataError, ImageError, Study

IMAGE, REPORT, NO_DICOM = "image", "report", "no DICOM file"

_VERSION = 2  # of what an index holds
_MANY = 500  # files that are worth a bar
_BARE = (b"\x02\x00", b"\x08\x00")  # how files without a preamble begin
_LARGEST = 25_000_000  # pixels of a deflated file, which is unpacked to be read at all
_THREADS = 8  # they wait for disks; to parse a header takes half a millisecond of one processor

_REPORTS = {f"1.2.840.10008.5.1.4.1.1.88.{n}" for n in (11, 22, 33, 34, 35)}
"""Basic Text, Enhanced, Comprehensive, Comprehensive 3D and Extensible SR (PS3.4 B.5)."""

_SECONDARY, _PROCESSING = "1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.5.1.4.1.1.1.1.1"
_CHEST_CODES = {"51185008", "43799004", "T-D3000"}
"""Chest and thoracic cavity in SNOMED CT and SNOMED RT (PS3.16 CID 4031)."""

# What a header says is repeated only where it is one of these; anything else could be an identifier in a wrong place.
_MODALITIES = (
    "AR AU BI BMD CR CT DG DOC DX ECG EPS ES GM HC HD IO IVOCT IVUS KER KO LEN LS M3D MG MR NM OAM OCT OP OPM OPT OPV OT "
    "PLAN PR PT PX REG RESP RF RG RTDOSE RTIMAGE RTPLAN RTRECORD RTSTRUCT SEG SM SMR SR SRF STAIN TG US VA XA XC"
)
_PARTS = (
    "ABDOMEN ANKLE ARM BRAIN BREAST CERVIX CHEST CLAVICLE COCCYX CSPINE ELBOW EXTREMITY EYE FACE FEMUR FINGER FOOT FOREARM "
    "HAND HEAD HIP HUMERUS JAW KNEE LEG LSPINE MANDIBLE NECK PELVIS RIB RIBS SACRUM SHOULDER SKULL SPINE SSPINE STERNUM "
    "THORAX TIBIA TLSPINE TOE TSPINE WHOLEBODY WRIST"
)


class _File(NamedTuple):
    """What is known of a file: keyed hashes, and words of the lists above. A row of the index."""

    stamp: str  # of its path, size and time
    kind: str  # IMAGE, REPORT, or why it is passed by
    study: str = ""
    number: str = ""  # the Patient ID
    patient: str = ""  # the Patient ID with its issuer; "" where none is told
    accession: str = ""
    dated: str = ""  # the Patient ID and the study's day
    image: str = ""
    view: str = "unknown"
    burned_in: int | None = None
    sex: str = ""
    age_band: str = ""
    manufacturer: str = ""
    visit: int = -1  # which of its patient's times the study is of; -1 where none is told
    place: int = 0  # of the image in its study

    @property
    def damaged(self) -> bool:
        return self.kind.startswith(("damaged", "cannot be read"))

    @property
    def group(self) -> str:
        """Files of one group are put in order together; "" for one that has none."""
        return self.number or self.study


class _Read(NamedTuple):
    """A file just read, with what puts it in order and is then forgotten."""

    file: _File
    moment: str = ""
    number: tuple[int, int] = (0, 0)


class _Report(NamedTuple):
    findings: str = ""
    impression: str = ""
    indication: str = ""
    whole: str = ""

    @classmethod
    def of(cls, text: str) -> "_Report":
        found = sections(text)
        return cls(found["findings"], found["impression"], found["indication"], text)


@dataclass
class _Tree:
    """What is found below root.

    Attributes:
        images: study -> its images, in order.
        patients: study -> its patient; "" where unknown.
        documents: paths of structured reports.
        folders: folder -> the studies that it holds images of.
    """

    images: dict[str, list[_File]] = field(default_factory=dict)
    patients: dict[str, str] = field(default_factory=dict)
    documents: dict[str, _File] = field(default_factory=dict)
    folders: dict[str, set[str]] = field(default_factory=dict)

    def person(self, study: str) -> str:
        """Who is divided into splits: the patient, or the study where that is unknown."""
        return self.patients[study] or study

    def by(self, what: Callable[[_File], str]) -> dict[str, set[str]]:
        """Studies by something that their images tell."""
        found: dict[str, set[str]] = {}
        for study, files in self.images.items():
            for file in files:
                if value := what(file):
                    found.setdefault(value, set()).add(study)
        return found


@dataclass
class _Rows:
    """What a table tells, by study."""

    labels: dict[str, dict[str, int | None]] = field(default_factory=dict)
    reports: dict[str, _Report] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)


class DicomFolder(Reader):
    """Any tree of DICOM files, whatever their names; what is no chest radiograph is passed by and counted.

    Files of one Study Instance UID are a study (without one, those of one accession number, else of one folder), and
    those of one Patient ID and issuer a patient; a study without a Patient ID is a patient of its own. Frontal views
    come first. A report is that of `table`, else of a text file, else of a structured report in the tree; `prior` is
    findings and impression of the patient's last study before, by date and time, that has any.

    Names of studies, patients and images are keyed hashes: another key gives other names and divides patients
    otherwise. What headers tell is kept in the cache, without an identifier or a date, so that a tree is read once.

    Args:
        modalities: of radiographs that are taken; RG and RF may be added.
        body_parts: words of Body Part Examined that are taken; "" is for headers that do not tell.
        leave_out: images that are passed by: raw ones for processing, secondary captures, derived ones.
        reports: paths of text files below root, with {accession}, {study} (the UID) or {folder} (one that holds a
            single study) in them and * for any part of a name, such as reports/{accession}.txt.
        encoding: of these files.
        table: a CSV file below root, plain or .gz, with reports, splits or labels; null if there is none.
        study: its column with Study Instance UIDs.
        accession: its column with accession numbers.
        patient: its column with Patient IDs; with `date` it tells a study.
        date: its column with the study's date.
        date_format: how that is written, such as %d.%m.%Y; null is YYYYMMDD or YYYY-MM-DD.
        text: its column with whole reports; columns findings, impression and indication are taken by their names.
        split: its column with train, val or test; without one, or if all of it is empty, patients are divided 80/10/10
            by a hash.
        label_columns: its columns with 1, 0, -1 (uncertain) or nothing; null takes every other column that holds
            nothing else.
        tags: its column that lists the labels that are present, parted by "|" or ";"; all others are absent.
        sr: read structured reports (Basic Text, Enhanced, Comprehensive) in the tree.
        report: what is learned of a report; all is its whole text.
        key_file: holds the key of the names; null takes MEDXRAY_KEY, else the user's own.
    """

    def __init__(
        self,
        root: Path,
        modalities: list[str] = ["CR", "DX"],  # noqa: B006
        body_parts: list[str] = ["CHEST", "THORAX", ""],  # noqa: B006
        leave_out: list[Literal["for-processing", "secondary-capture", "derived"]] = ["for-processing"],  # noqa: B006
        reports: str | None = None,
        encoding: str = "utf-8",
        table: str | None = None,
        study: str | None = "study_uid",
        accession: str | None = "accession",
        patient: str | None = "patient_id",
        date: str | None = "study_date",
        date_format: str | None = None,
        text: str | None = "report",
        split: str | None = "split",
        label_columns: list[str] | None = None,
        tags: str | None = None,
        sr: bool = True,
        report: Part = "findings",
        key_file: str | None = None,
    ) -> None:
        super().__init__(root)
        self.modalities, self.body_parts = {name.upper() for name in modalities}, {part.upper() for part in body_parts}
        self.leave_out = set(leave_out)
        self.pattern = _pattern(reports) if reports is not None else None
        self.encoding, self.table_name = encoding, table
        # A default name may be missing from the table; one that a spec states may not.
        self.columns = {
            "study": (study, "study_uid"), "accession": (accession, "accession"), "patient": (patient, "patient_id"),
            "date": (date, "study_date"), "text": (text, "report"), "split": (split, "split"),
        }  # fmt: skip
        self.date_format, self.label_columns, self.tags = date_format, label_columns, tags
        self.sr, self.part, self.key_file = sr, report, key_file
        self._paths: dict[str, str] = {}
        self._stamps: dict[str, str] = {}

    # An image and its file

    def path(self, name: str) -> Path:
        """The file of an image, or of what was left out, for whoever has to mend it: nothing that is written tells.

        Raises:
            ImageError: there is none of this name.
        """
        if name not in self._paths:
            raise ImageError(f"{self.root}: no file is called {name!r} here; names are those that read() gives")
        return self.root / self._paths[name]

    def find(self, name: str) -> list[Path]:
        """The files of a patient, a study, an image, or of something that was left out, for whoever has the key.

        Unlike `path` it needs no `read`, which may have failed.

        Raises:
            DataError: there is none, or another key gave the name.
        """
        names = Names(find_key(self.key_file))
        files = _one_person(self._index(self._walk(), names))
        found = [path for path, f in files.items() if name and name in (f.stamp, f.image, f.study, f.patient)]
        if not found:
            raise DataError(
                f"{self.root}: nothing is called {name!r} here; either another key gave that name, or the file has changed"
            )
        return [self.root / path for path in found]

    def open(self, image: str) -> bytes:
        """What an image's file holds; a path would come into messages."""
        try:
            return self.path(image).read_bytes()
        except OSError as error:
            raise ImageError(
                f"{self.root / image}: cannot be read ({error.strerror}); DicomFolder.find tells its path, see its help"
            ) from None

    def exists(self, image: str) -> bool:
        """Whether the file of an image is there."""
        return image in self._paths and self.path(image).is_file()

    def stamp(self, image: str) -> str:
        """The name and a keyed hash of path, size and time, as they were when the tree was read."""
        return f"{image} {self._stamps[image]}"

    def inside(self, path: str, where: str) -> str:
        """The same name: a link that leads out of root is refused when the tree is read."""
        return path

    # From a tree to studies

    def read(self) -> list[Study]:
        """All studies, in the order of their first files.

        Raises:
            DataError: no chest radiograph, a link that leads out of root, a study or an image of two patients, or
                what is wrong in the table or a text file.
        """
        self.left_out, self.damaged = [], []
        self._paths, self._stamps = {}, {}
        found = self._walk()
        texts = {path: next(iter(field.groupdict().items())) for path in found if (field := self._matched(path))}
        if self.table_name is not None:
            super().inside(self.table_name, "data.reader.table")
        table = Path(os.path.normpath(self.table_name or "")).as_posix()
        likely = {path: found[path] for path in found.keys() - {*texts, table, f"{table}.gz"}}
        if not any(_may_be_dicom(self.root / path) for path in likely):
            # Nobody's key is made for a folder of something else.
            raise DataError(f"{self.root}: none of {len(found)} files is a DICOM file; check data.reader.root")
        names = Names(find_key(self.key_file))
        self.mark = names.mark
        tree = self._group(_one_person(self._index(dict(sorted(likely.items())), names)))
        reports: dict[str, _Report] = {}
        if self.sr:
            reports |= self._structured(tree)
        if self.pattern is not None:
            reports |= self._texts(texts, tree, names)
        rows = self._table(tree, names) if self.table_name is not None else _Rows()
        return self._studies(tree, reports | rows.reports, rows)

    def _walk(self) -> dict[str, os.stat_result]:
        """Every file below root, sorted by path. Links are not followed."""
        if not self.root.is_dir():
            raise DataError(
                f"data.reader.root: no folder {self.root}; expected a folder of DICOM files; check the path (it is taken from "
                f"{Path.cwd()})"
            )
        root = os.path.realpath(self.root)
        files: dict[str, os.stat_result] = {}
        odd: Counter[str] = Counter()

        def look(folder: str) -> tuple[dict[str, os.stat_result], list[str], list[str]]:
            own: dict[str, os.stat_result] = {}
            below: list[str] = []
            reasons: list[str] = []
            try:
                with os.scandir(os.path.join(root, folder)) as entries:
                    for entry in entries:
                        path = f"{folder}/{entry.name}" if folder else entry.name
                        if entry.is_symlink():
                            real = os.path.realpath(entry.path)
                            within = os.path.join(real, "").startswith(os.path.join(root, ""))
                            reasons.append("link" if within or not os.path.exists(real) else "out")
                        elif entry.is_dir():
                            below += [path] if entry.name != ".medxray" else []
                        elif entry.is_file():
                            own[path] = entry.stat()
                        else:
                            reasons.append("no regular file")
            except OSError as error:
                reasons.append(f"in a folder that cannot be read ({error.strerror})")
            return own, below, reasons

        level = [""]
        with ThreadPoolExecutor(_THREADS) as pool:
            while level:
                looked = list(pool.map(look, level))
                level = [path for _, below, _ in looked for path in below]
                for own, _, reasons in looked:
                    files |= own
                    odd.update(reasons)
        if outside := odd.pop("out", 0):
            raise DataError(
                f"{self.root}: symbolic links that lead out of data.reader.root: {outside}; set the root to a folder that holds "
                f"what they lead to, or remove them (find {self.root} -type l lists all links)"
            )
        if not files:
            raise DataError(f"{self.root}: no file in this folder; expected DICOM files; check data.reader.root")
        if links := odd.pop("link", 0):
            self._tell(links, "a symbolic link; what it leads to is read where it lies")
        for reason, n in sorted(odd.items()):
            self._tell(n, reason)
        return dict(sorted(files.items()))

    def _tell(self, n: int, reason: str) -> None:
        self.left_out.append({"study": "", "file": "", "reason": f"{n} {'file' if n == 1 else 'files'}: {reason}"})

    def _index(self, stats: Mapping[str, os.stat_result], names: Names) -> dict[str, _File]:
        """What is known of every file, by path: from the cache, or from its header.

        With a file that is new or has changed all others of its patient are read again: how they follow each other is
        kept, and when they were made is not.
        """
        stamps = {path: names("file", path, str(s.st_size), str(s.st_mtime_ns)) for path, s in stats.items()}
        settings = json.dumps([_VERSION, *(sorted(s) for s in (self.modalities, self.body_parts, self.leave_out))])
        cache = cache_folder() / "dicom-folder" / f"{names('index', os.path.realpath(self.root), settings)}.parquet"
        known = _load(cache)
        files = {path: known[stamp] for path, stamp in stamps.items() if stamp in known}
        new = [path for path in stats if path not in files]
        if not new and len(known) == len(files):
            return files
        fresh: dict[str, _Read] = {}
        with warnings.catch_warnings(), ThreadPoolExecutor(_THREADS) as pool:
            # pydicom's warnings repeat what a header says.
            warnings.simplefilter("ignore")

            def read(paths: Sequence[str], what: str) -> None:
                found = pool.map(lambda path: self._header(path, stamps[path], names), paths)
                bar = progress_bar(found, desc=what, total=len(paths), unit="file", disable=len(paths) <= _MANY)
                fresh.update(zip(paths, bar, strict=True))

            read(new, "headers")
            touched = {one.file.group for one in fresh.values()} - {""}
            read([path for path, file in files.items() if file.group in touched], "headers of the same patients")
        files |= _in_order(fresh)
        _store(cache, [file for file in files.values() if not file.kind.startswith("cannot be read")])
        return {path: files[path] for path in stats}

    def _header(self, path: str, stamp: str, names: Names) -> _Read:
        import pydicom

        from medxray.data.dicom import inflated

        bare = False
        try:
            with open(self.root / path, "rb") as file:
                head = file.read(132)
                bare = head[128:] != b"DICM"
                if bare and head[:2] not in _BARE:
                    return _Read(_File(stamp, NO_DICOM))
                file.seek(0)
                plain = inflated(file, "", _LARGEST)
                header = Header(pydicom.dcmread(plain, stop_before_pixels=True, force=True, specific_tags=HEADER))
            kind = self._kind(header)
            if kind in (IMAGE, REPORT):
                return _read(header, kind, path, stamp, names)
        except OSError as error:
            return _Read(_File(stamp, f"cannot be read ({error.strerror})"))
        # pydicom raises whatever a damaged header makes it stumble over, in words that may repeat the header's.
        except Exception as error:
            kind = f"damaged DICOM header ({type(error).__name__})"
        # Other files may begin like a data set without meta information.
        return _Read(_File(stamp, NO_DICOM if bare and kind.startswith("damaged") else kind))

    def _kind(self, header: Header) -> str:
        """IMAGE, REPORT, or why a file is passed by."""
        storage, modality = header.storage, header["modality"].upper()
        if storage in _REPORTS:
            return REPORT
        if not modality:
            return f"no modality (SOP class {class_name(storage)})" if storage else "damaged DICOM header (no SOP class)"
        if modality not in self.modalities:
            return f"modality {modality}" if modality in _MODALITIES.split() else "a modality that DICOM does not know"
        if "rows" not in header:
            ends = "Image Storage" in class_name(storage)
            return "damaged DICOM header (it ends before the image)" if ends else f"modality {modality}, but no image"
        if "for-processing" in self.leave_out and (storage == _PROCESSING or header["intent"].upper() == "FOR PROCESSING"):
            return "raw image for processing"
        origin = [*header["type"].upper().split("\\"), ""]
        secondary = storage == _SECONDARY or storage.startswith(f"{_SECONDARY}.") or origin[1] == "SECONDARY"
        if "secondary-capture" in self.leave_out and secondary:
            return "secondary capture"
        if "derived" in self.leave_out and origin[0] == "DERIVED":
            return "derived image"
        part, code = header["body part"].upper(), header.code("region")
        if not part and code:
            return IMAGE if code in _CHEST_CODES else "body part other than the chest, by its code"
        if part in self.body_parts or (set(re.split(r"[^A-Z]+", part)) - {""}) & self.body_parts:
            return IMAGE
        return f"body part {part or 'not told'}" if part in ["", *_PARTS.split()] else "body part other than the chest"

    def _group(self, files: Mapping[str, _File]) -> _Tree:
        """Studies with their images, each once; what is left out is told.

        Raises:
            DataError: no chest radiograph, or a study or an image of two patients.
        """
        kinds = Counter(file.kind for file in files.values())
        if not kinds[IMAGE]:
            reasons = ", ".join(f"{reason}: {n}" for reason, n in kinds.most_common(6))
            raise DataError(
                f"{self.root}: none of {len(files)} files is a chest radiograph ({reasons}); check data.reader.root, or widen "
                "data.reader.modalities and body_parts"
            )
        broken = [(path, file) for path, file in files.items() if file.damaged]
        for path, file in broken:
            self._paths[file.stamp] = path
            self.damaged.append({"study": "", "file": file.stamp, "reason": file.kind})
        for kind in sorted(kinds.keys() - {IMAGE, REPORT, *(file.kind for _, file in broken)}):
            self._tell(kinds[kind], kind)
        tree = _Tree(documents={path: file for path, file in files.items() if file.kind == REPORT})
        firsts: dict[str, _File] = {}
        people: dict[str, set[str]] = {}
        shared: list[str] = []
        for path, file in files.items():
            if file.kind != IMAGE:
                continue
            people.setdefault(file.study, set()).update({file.patient} - {""})
            first = firsts.setdefault(file.image, file)
            if first is not file:
                if first.patient and file.patient and first.patient != file.patient:
                    shared.append(file.image)
                reason = "a second file of one SOP Instance UID; the first is kept"
                self.left_out.append({"study": file.study, "file": file.stamp, "reason": reason})
                self._paths[file.stamp] = path
                continue
            self._paths[file.image], self._stamps[file.image] = path, file.stamp
            tree.images.setdefault(file.study, []).append(file)
            folder = os.path.dirname(path)
            while folder and file.study not in tree.folders.setdefault(folder, set()):
                tree.folders[folder].add(file.study)
                folder = os.path.dirname(folder)
        mixed = [study for study, own in people.items() if len(own) > 1]
        for uids, what in ((mixed, "Study"), (shared, "SOP")):
            if uids:
                raise DataError(
                    f"{self.root}: {len(uids)} {what} Instance UIDs are each of two patients, by Patient ID and issuer (here "
                    f"called {_some(uids)}); such a UID is of one patient alone: mend the headers, or take wrong files out"
                )
        tree.images = {study: sorted(own, key=lambda file: file.place) for study, own in tree.images.items()}
        tree.patients = {study: next(iter(people[study]), "") for study in tree.images}
        if alone := sum(not patient for patient in tree.patients.values()):
            reason = f"none: {alone} studies without a Patient ID are kept, each as a patient of its own"
            self.left_out.append({"study": "", "file": "", "reason": reason})
        return tree

    def _studies(self, tree: _Tree, reports: Mapping[str, _Report], rows: _Rows) -> list[Study]:
        before = {study: chosen(report._asdict(), "findings+impression") for study, report in reports.items()}
        visits = {study: max(file.visit for file in own) for study, own in tree.images.items()}
        told: dict[str, list[tuple[int, str]]] = {}
        for study, visit in visits.items():
            if visit >= 0 and before.get(study):
                told.setdefault(tree.person(study), []).append((visit, study))
        divided = {tree.person(study): split for study, split in rows.splits.items()}
        studies = []
        for study, own in tree.images.items():
            person = tree.person(study)
            split = divided.get(person) if divided else split_of(person)
            if split is None:
                self.left_out.append({"study": study, "file": "", "reason": f"{self.table_name} tells no split of its patient"})
                continue
            last = max((one for one in told.get(person, ()) if one[0] < visits[study]), default=None)
            report = reports.get(study, _Report())
            images, views = frontal_first([file.image for file in own], [file.view for file in own])
            burned = [file.burned_in for file in own]
            studies.append(
                Study(
                    study_id=study,
                    patient_id=tree.patients[study],
                    images=images,
                    views=views,
                    findings=report.findings,
                    impression=report.impression,
                    report=chosen(report._asdict(), self.part, report.whole),
                    labels=rows.labels.get(study) or dict.fromkeys(rows.names),
                    split=split,
                    indication=report.indication,
                    prior=before[last[1]] if last is not None else "",
                    burned_in=1 if 1 in burned else None if None in burned else 0,
                    sex=agreed(file.sex for file in own),
                    age_band=agreed(file.age_band for file in own),
                    manufacturer=agreed(file.manufacturer for file in own),
                )
            )
        return studies

    # Reports

    def _structured(self, tree: _Tree) -> dict[str, _Report]:
        """Reports of DICOM SR; of several of a study the complete, verified and last one."""
        by_accession = tree.by(lambda file: file.accession)
        owners: dict[str, str] = {}
        for path, file in tree.documents.items():
            likely = {file.study} & tree.images.keys() or by_accession.get(file.accession, set())
            if len(likely) == 1:
                owners[path] = next(iter(likely))
        if strangers := len(tree.documents) - len(owners):
            self._tell(strangers, "a structured report of no study that has images here")

        def read(path: str) -> StructuredReport | str:
            try:
                return structured_report(self.root / path)
            except DataError as error:
                return str(error)

        found: dict[str, StructuredReport] = {}
        with warnings.catch_warnings(), ThreadPoolExecutor(_THREADS) as pool:
            warnings.simplefilter("ignore")
            read_all = pool.map(read, owners)
            bar = progress_bar(read_all, desc="reports", total=len(owners), unit="file", disable=len(owners) <= _MANY)
            for (path, study), one in zip(owners.items(), bar, strict=True):
                if isinstance(one, str):
                    name = tree.documents[path].stamp
                    self._paths[name] = path
                    self.damaged.append({"study": study, "file": name, "reason": one})
                elif one.text and (study not in found or one.order > found[study].order):
                    found[study] = one
        return {study: _Report.of(report.text) for study, report in found.items()}

    def _matched(self, path: str) -> re.Match[str] | None:
        return self.pattern.fullmatch(path) if self.pattern is not None else None

    def _texts(self, texts: Mapping[str, tuple[str, str]], tree: _Tree, names: Names) -> dict[str, _Report]:
        """Reports of text files, each with what its path tells: a field and its value."""
        by_accession = tree.by(lambda file: file.accession)
        found: dict[str, str] = {}
        strangers = 0
        for path, (told, value) in texts.items():
            if told == "accession":
                likely = by_accession.get(names("accession", value), set())
            else:
                likely = {names("study", value)} & tree.images.keys() if told == "study" else tree.folders.get(value, set())
            if len(likely) != 1:
                strangers += 1
                continue
            study = next(iter(likely))
            where = f"{self.root}: the text file of study {study!r}"
            try:
                text = (self.root / path).read_bytes().decode(self.encoding).removeprefix("\ufeff")
            except OSError as error:
                raise DataError(f"{where} cannot be read ({error.strerror}); check its rights") from None
            except LookupError:
                raise DataError(f"data.reader.encoding: no encoding {self.encoding!r}; expected utf-8 or cp1252") from None
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{where}: expected {self.encoding}, found byte {error.object[error.start]:#04x} at offset {error.start}; "
                    "save it as UTF-8, or set data.reader.encoding to what it is, such as cp1252"
                ) from None
            if found.setdefault(study, text) != text:
                raise DataError(f"{where} and another one differ; leave one that data.reader.reports matches")
        if not found:
            raise DataError(
                f"{self.root}: data.reader.reports matches {len(texts)} files, and none is of a study here; it is a path below "
                "the root, such as reports/{accession}.txt, and what stands for {...} is compared with the headers"
            )
        if strangers:
            self._tell(strangers, "a text report of no study that has images here, or of several")
        return {study: _Report.of(text) for study, text in found.items()}

    # A table beside the images

    def _table(self, tree: _Tree, names: Names) -> _Rows:
        """What a table tells. No cell is repeated in a message: any may hold an identifier.

        Raises:
            DataError: a column or value that is wrong, rows of one study that disagree, no row of a study here, or a
                patient in two splits.
        """
        path = self.root / str(self.table_name)
        packed = path.with_name(f"{path.name}.gz")
        if not path.is_file() and not packed.is_file():
            raise DataError(f"data.reader.table: no file {path}; name a CSV file by its path below data.reader.root")
        table = read_table(path if path.is_file() else packed)
        owners = self._owners(table, tree, names)
        reports, splits = table.optional(*self.columns["text"]), table.optional(*self.columns["split"])
        texts = {name: table.columns.get(name) for name in _Report._fields[:3]} | {"report": reports}
        labels = self._labels(table)
        columns: dict[str, Any] = {name: cells for name, cells in {**texts, "split": splits, **labels}.items() if cells}
        first: dict[str, int] = {}
        lines: dict[str, int] = {}
        found = _Rows(names=list(labels))
        for row, study in owners.items():
            start = first.setdefault(study, row)
            for name, cells in columns.items():
                if cells[row] != cells[start]:
                    raise DataError(
                        f"{table.where(row)}: {name} is not that of {table.place(start)}, a row of the same study; rows of one "
                        "study must agree"
                    )
            if start < row:
                continue
            found.labels[study] = {name: values[row] for name, values in labels.items()}
            own = _Report(*((cells[row].strip() if cells else "") for cells in texts.values()))
            if own.whole and not own.findings and not own.impression:
                told = _Report.of(own.whole)
                own = told._replace(indication=own.indication or told.indication)
            elif not own.whole:
                own = own._replace(whole="\n\n".join(filter(None, own[:2])))
            if own.whole:
                found.reports[study] = own
            if splits and splits[row].strip():
                split = SPLITS.get(splits[row].strip().lower())
                if split is None:
                    raise DataError(f"{table.where(row)}: the split is none of train, val and test; mend it")
                other = lines.setdefault(tree.person(study), row)
                if SPLITS.get(splits[other].strip().lower()) != split:
                    raise DataError(
                        f"{table.where(row)}: a patient in two splits, here in {split} and otherwise on {table.place(other)}; "
                        "all studies of a patient must be in one; mend the split column, or set data.reader.split: null"
                    )
                found.splits[study] = split
        return found

    def _owners(self, table: Table, tree: _Tree, names: Names) -> dict[int, str]:
        """Rows that are of one study, and that study."""
        uids, numbers, people, days = (
            table.optional(*self.columns[role]) for role in ("study", "accession", "patient", "date")
        )
        if uids is None and numbers is None and (people is None or days is None):
            raise DataError(
                f"{table.path}: no column tells which study a row is of (found: {', '.join(table.columns)}); name that of the "
                "Study Instance UID by data.reader.study, of the accession number by accession, or of patient and date"
            )
        by_number, by_day = tree.by(lambda file: file.accession), tree.by(lambda file: file.dated)
        owners: dict[int, str] = {}
        reasons = ("of no study that has images here", "of several studies of one patient and day")
        strangers: tuple[list[int], list[int]] = [], []
        for row in range(len(table)):
            uid, number, person, day = (cells[row].strip() if cells else "" for cells in (uids, numbers, people, days))
            likely = {names("study", uid)} & tree.images.keys() if uid else set()
            if not likely and number:
                likely = by_number.get(names("accession", number), set())
            if not likely and person and day:
                date = _day(day, self.date_format)
                if not date:
                    raise DataError(
                        f"{table.where(row)}: the date is not written as {self.date_format or 'YYYYMMDD or YYYY-MM-DD'}; mend "
                        "it, or tell data.reader.date_format"
                    )
                likely = by_day.get(names("dated", person, date), set())
            if len(likely) == 1:
                owners[row] = next(iter(likely))
            else:
                strangers[bool(likely)].append(row)
        if not owners:
            raise DataError(
                f"{table.path}: none of {len(table)} rows is of a study below {self.root}; check the columns that tell the "
                "study, whose cells must be as in the headers, leading zeros too"
            )
        for reason, rows in zip(reasons, strangers, strict=True):
            if rows:
                places = ", ".join(table.place(row) for row in rows[:10]) + (", ..." if len(rows) > 10 else "")
                told = f"{len(rows)} rows of {self.table_name} are {reason}: {places}"
                self.left_out.append({"study": "", "file": "", "reason": told})
        return owners

    def _labels(self, table: Table) -> dict[str, list[int | None]]:
        if self.tags is not None:
            return labels_of_tags(table[self.tags])
        wanted = self.label_columns
        if wanted is None:
            taken = {*(name for name, _ in self.columns.values()), *NOT_LABELS}
            wanted = [name for name, cells in table.columns.items() if name not in taken and _labelled(cells) >= 0.9]
        for name in wanted:
            row = next((row for row, cell in enumerate(table[name]) if cell.strip() not in VALUES), None)
            if row is not None:
                raise DataError(
                    f"{table.where(row)}: label {name!r} is none of 1, 0, -1 (uncertain) and nothing; mend it, or name the "
                    "columns that are labels in data.reader.label_columns"
                )
        return {name: [VALUES[cell.strip()] for cell in table[name]] for name in wanted}


def _may_be_dicom(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(132)
    except OSError:
        return True  # which is told later
    return head[128:] == b"DICM" or head[:2] in _BARE


def _read(header: Header, kind: str, path: str, stamp: str, names: Names) -> _Read:
    """What is kept of a header, and for a while of its times and numbers."""
    patient, issuer, accession = header["patient"], header["issuer"], header["accession"]
    moment, day = header.moment()
    if header["study"]:
        study = names("study", header["study"])
    elif accession:
        study = names("study of an accession number", patient, accession)
    else:
        study = names("study of a folder", patient, os.path.dirname(path))
    file = _File(
        stamp,
        kind,
        study=study,
        number=names("number", patient) if patient else "",
        patient=names("patient", patient, issuer) if patient and issuer else "",
        accession=names("accession", accession) if accession else "",
        dated=names("dated", patient, day) if patient and day else "",
        image=names("image", header["instance"] or path),
        view=header.view(),
        burned_in={"YES": 1, "NO": 0}.get(header["burned in"].upper()),
        sex=sex_of(header["sex"]),
        age_band=header.age_band(),
        manufacturer=manufacturer_of(header["manufacturer"]),
    )
    return _Read(file, moment, (header.whole("series number"), header.whole("number")))


def _one_person(files: Mapping[str, _File]) -> dict[str, _File]:
    """The files with `patient` told wherever there is a Patient ID: one without issuer is that of the only issuer, so
    that no patient is in two splits because a device left it out."""
    issued: dict[str, set[str]] = {}
    for file in files.values():
        issued.setdefault(file.number, set()).update({file.patient} - {""})
    found = dict(files)
    for path, file in files.items():
        if file.number and not file.patient:
            own = issued[file.number]
            found[path] = file._replace(patient=next(iter(own)) if len(own) == 1 else file.number)
    return found


def _in_order(fresh: Mapping[str, _Read]) -> dict[str, _File]:
    """Files with `visit` and `place`: the order of a patient's studies, and of a study's images."""
    moments: dict[tuple[str, str], str] = {}
    images: dict[str, list[tuple[tuple[int, int], str]]] = {}
    for path, one in fresh.items():
        if one.moment:
            key = (one.file.group, one.file.study)
            moments[key] = min(one.moment, moments.get(key, one.moment))
        images.setdefault(one.file.study, []).append((one.number, path))
    # Where one study of a day has no time, that day's studies have no order.
    days = {(group, moment) for (group, _), moment in moments.items() if len(moment) == 8}
    moments = {key: m[:8] if (key[0], m[:8]) in days else m for key, m in moments.items()}
    known: dict[str, set[str]] = {}
    for (group, _), moment in moments.items():
        known.setdefault(group, set()).add(moment)
    ranks = {group: {moment: rank for rank, moment in enumerate(sorted(own))} for group, own in known.items()}
    places = {path: place for own in images.values() for place, (_, path) in enumerate(sorted(own))}
    found = {}
    for path, (file, _, _) in fresh.items():
        moment = moments.get((file.group, file.study), "")
        found[path] = file._replace(visit=ranks[file.group][moment] if moment else -1, place=places[path])
    return found


_KINDS = {"visit": "int32", "place": "int32", "burned_in": "int8"}


def _load(path: Path) -> dict[str, _File]:
    """An index by stamps; empty where it is missing or damaged."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path, use_threads=False)
        return {row[0]: _File(*row) for row in zip(*(table[name].to_pylist() for name in _File._fields), strict=True)}
    except (pyarrow.ArrowException, OSError, KeyError):
        return {}


def _store(path: Path, files: Iterable[_File]) -> None:
    import pyarrow
    from pyarrow import parquet

    columns = list(zip(*files, strict=True)) or [()] * len(_File._fields)
    schema = pyarrow.schema([(name, _KINDS.get(name, "string")) for name in _File._fields])
    table = pyarrow.Table.from_arrays([pyarrow.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)
    # A cache that cannot be written makes headers be read every time.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            parquet.write_table(table, staged, compression="zstd")
            staged.replace(path)
        finally:
            staged.unlink(missing_ok=True)


def _pattern(text: str) -> re.Pattern[str]:
    """reports/{accession}.txt -> what its paths look like.

    Raises:
        DataError: it has not one of the fields.
    """
    fields = {"accession": "[^/]+", "study": "[^/]+", "folder": ".+"}
    parts = re.split(r"\{(\w*)\}", text)
    if len(parts) != 3 or parts[1] not in fields:
        raise DataError(
            f"data.reader.reports: expected a path with one of {{accession}}, {{study}} and {{folder}} in it, such as "
            f"reports/{{accession}}.txt, found {text!r}"
        )
    before, after = ("[^/]*".join(map(re.escape, part.split("*"))) for part in (parts[0].removeprefix("./"), parts[2]))
    return re.compile(f"{before}(?P<{parts[1]}>{fields[parts[1]]}){after}")


def _day(text: str, how: str | None) -> str:
    """A date as YYYYMMDD; "" where it is not written as is told."""
    if how is None:
        found = re.match(r"(\d{4})([-/.]?)(\d{2})\2(\d{2})(?!\d)", text)
        return found[1] + found[3] + found[4] if found else ""
    try:
        return datetime.strptime(text, how).strftime("%Y%m%d")
    except ValueError:
        return ""


def _labelled(cells: Sequence[str]) -> float:
    """The share of filled cells that are labels; where it is nearly all, the others are mistakes to be told."""
    filled = [cell.strip() for cell in cells if cell.strip()]
    return sum(cell in VALUES for cell in filled) / max(1, len(filled))


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
