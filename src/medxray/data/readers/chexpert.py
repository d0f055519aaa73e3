"""CheXpert of Stanford: frontal and lateral radiographs with labels of their reports."""

import os
import re
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from medxray.data.attributes import age_band_of, sex_of
from medxray.data.readers import Reader, frontal_first, split_of, view_of
from medxray.data.readers.csv import VALUES, Table, read_table
from medxray.registry import nearest
from medxray.types import DataError, Study

LABELS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation",
    "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip
"""Of Irvin et al., AAAI 2019, in the order of its tables."""

SUFFIXES = (".jpg", ".jpeg", ".png", ".dcm")
"""Kinds of image files; of several the first that is there."""

_PATH = re.compile(r"(?:.*/)?(patient\d+)/(study\d+)/([\w-]+)\.\w+")
_TABLES = {"chexpert": "train.csv", "chexbert": "train_cheXbert.csv", "visualchexbert": "train_visualCheXbert.csv"}


class CheXpert(Reader):
    """A study is a patient's visit with its views; it has 14 labels and no report.

    Root holds `train.csv`, `valid.csv` and their images, in the folders as they are unpacked, itself or in a folder of
    any name (`CheXpert-v1.0-small`; `CheXpert-v1.0`; "CheXpert-v1.0 batch 1 (validate & csv)" beside the other three).
    Whatever stands before `patient` in the tables' paths is not looked at. The official test set is read where
    `test.csv` or `test_labels.csv` and its images lie in root too. In every table, 1 is present, 0 absent, -1 uncertain
    and an empty cell missing; labels are those of a study's first row.

    Args:
        valid: which split the official validation images are: val, or test, where patients for validation are taken
            out of the training set, one in ten by a stable hash; null is val where the test set is there, else test.
        labels: of the training images: those of the CheXpert labeller in `train.csv`, or of
            `train_cheXbert.csv` or `train_visualCheXbert.csv`, which lie beside the full set.
    """

    def __init__(
        self,
        root: Path,
        valid: Literal["val", "test"] | None = None,
        labels: Literal["chexpert", "chexbert", "visualchexbert"] = "chexpert",
    ) -> None:
        super().__init__(root)
        self.valid = valid
        self.training = _TABLES[labels]

    def read(self) -> Iterable[Study]:
        """All studies of the two or three tables.

        Raises:
            DataError: a table is missing or twice there, no image is there, a path that names no patient, study and
                view, a value that is no label.
        """
        train, valid = self._find(self.training), self._find("valid.csv")
        test = self._found("test.csv", "test_labels.csv")
        if test and self.valid == "test":
            raise DataError(f"{test[0]}: the official test set is here; set data.reader.valid: val, or move it away")
        ours = self.valid or ("val" if test else "test")
        places = patient_folders(self.root, self.root)
        studies = self._studies(read_table(train), "train", ours, places)
        studies += self._studies(read_table(valid), "val", ours, places)
        return studies + (self._studies(read_table(test[0]), "test", ours, places) if test else [])

    def _find(self, name: str) -> Path:
        found = self._found(name)
        if len(found) > 1:
            raise DataError(
                f"{self.root}: more than one {name}: in {' and in '.join(repr(p.parent.name) for p in found)}; set "
                "data.reader.root to one of these folders"
            )
        if not found:
            if not self.root.is_dir():
                self.file(name)
            inside = ", ".join(sorted(p.name for p in self.root.iterdir())[:10]) or "nothing"
            raise DataError(
                f"{self.root}: no {name}, here or one folder further down; the folder holds {inside}; check data.reader.root"
            )
        return found[0]

    def _found(self, *names: str) -> list[Path]:
        """A table in root or in its folders; as published or with .gz."""
        for folder in ("", "*/"):
            for name in names:
                for suffix in ("", ".gz"):
                    if found := sorted(self.root.glob(f"{folder}{name}{suffix}")):
                        return found
        return []

    def _studies(self, table: Table, split: str, valid: str, places: "Places") -> list[Study]:
        views = _views(table)
        labels = labels_of(table, some=split == "test")
        blank = [""] * len(table)
        sexes, ages = table.columns.get("Sex", blank), table.columns.get("Age", blank)
        shots: dict[str, list[tuple[str, str]]] = {}
        first: dict[str, int] = {}
        patient_of: dict[str, str] = {}
        for row, path in enumerate(table["Path"]):
            image = place_of(path, f"{table.where(row)}: Path")
            name = f"{image.patient}_{image.study}"
            if name not in first:
                first[name] = row
                patient_of[name] = image.patient
                shots[name] = []
            file = self.inside(places.file(image), table.where(row))
            if any(file == other for other, _ in shots[name]):
                raise DataError(f"{table.where(row)}: image {path!r} stands twice; fetch the table again")
            shots[name].append((file, views[row]))
        studies = []
        for name, row in first.items():
            patient = patient_of[name]
            images, shown = frontal_first(*zip(*shots[name], strict=True))
            studies.append(
                Study(
                    study_id=name,
                    patient_id=patient,
                    images=images,
                    views=shown,
                    findings="",
                    impression="",
                    report="",
                    labels=dict(labels[row]),
                    split=assigned(split, patient, valid),
                    sex=sex_of(sexes[row]),
                    age_band=age_band_of(ages[row]),
                )
            )
        return studies


def assigned(split: str, patient: str, valid: str) -> str:
    """The split of a patient of one of the official sets.

    Args:
        split: train, val or test, as published.
        patient: name.
        valid: which split the published validation set is; where it is test, some training patients are val.
    """
    if split == "train" and valid == "test":
        return "val" if split_of(patient) == "val" else "train"
    return valid if split == "val" else split


class Image(NamedTuple):
    """What a path such as `train/patient00001/study1/view1_frontal.jpg` tells."""

    patient: str
    study: str
    view: str


def place_of(path: str, where: str) -> Image:
    """Patient, study and view of a path; what stands before them and its kind of file are not looked at.

    Raises:
        DataError: it has another form.
    """
    parts = path.rsplit("/", 3)[-3:]
    if len(parts) == 3 and parts[0].startswith("patient") and parts[1].startswith("study") and _PATH.fullmatch(path):
        return Image(parts[0], parts[1], parts[2].rpartition(".")[0])
    raise DataError(f"{where} {path!r}; expected .../patientN/studyN/viewN_frontal.jpg; fetch the table again")


class Places(NamedTuple):
    """Where images lie.

    Attributes:
        folders: patient -> the folder of his folder, relative to a reader's root.
        other: the same for a patient who is not there.
        suffix: kind of the files.
    """

    folders: Mapping[str, str]
    other: str
    suffix: str

    def file(self, image: Image) -> str:
        """Path relative to the reader's root."""
        folder = self.folders.get(image.patient, self.other)
        return f"{folder}{image.patient}/{image.study}/{image.view}{self.suffix}"


def patient_folders(root: Path, start: Path, kinds: tuple[str, ...] = SUFFIXES) -> Places:
    """Finds the folders that hold `patientN` folders, up to four deep below `start`; archives of one data set may have
    been unpacked into several.

    Raises:
        DataError: there is none, or none holds an image.
    """
    queue = deque([(start, 0)] if start.is_dir() else [])
    found: dict[str, list[tuple[str, list[str]]]] = {}
    while queue:
        folder, depth = queue.popleft()
        with os.scandir(folder) as entries:
            below = sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
        patients = [name for name in below if re.match(r"patient\d", name)]
        if patients:
            suffix = next(filter(None, (_suffix(folder / patient, kinds) for patient in patients[:50])), None)
            prefix = os.path.relpath(folder, root)
            if suffix:
                found.setdefault(suffix, []).append(("" if prefix == "." else f"{prefix}/", patients))
        elif depth < 4:
            queue.extend((folder / name, depth + 1) for name in below)
    if not found:
        raise DataError(
            f"{start}: no image below it; expected folders such as train/patient00001/study1/ with files of kind "
            f"{', '.join(kinds)}; unpack the images there, or check data.reader"
        )
    suffix = next(kind for kind in kinds if kind in found)
    folders = {patient: prefix for prefix, patients in reversed(found[suffix]) for patient in patients}
    return Places(folders, found[suffix][0][0], suffix)


def _suffix(patient: Path, kinds: tuple[str, ...]) -> str | None:
    """Kind of a patient's image files."""
    own = {path.suffix for study in sorted(patient.iterdir()) if study.is_dir() for path in study.iterdir()}
    return next((kind for kind in kinds if kind in own), None)


def _views(table: Table) -> list[str]:
    """PA or AP where a frontal's row tells, LL for a lateral; the test set has no such columns."""
    blank = [""] * len(table)
    sides, positions = table.columns.get("Frontal/Lateral", blank), table.columns.get("AP/PA", blank)
    known = {pair: view_from(*pair) for pair in set(zip(sides, positions, strict=True))}
    return [known[pair] for pair in zip(sides, positions, strict=True)]


def view_from(side: str, position: str) -> str:
    """A view from its two columns, "Frontal" or "Lateral" and "AP" or "PA"."""
    if side.strip().lower() == "lateral":
        return "LL"
    view = view_of(position)
    return view if view in ("AP", "PA") else "unknown"


def labels_of(table: Table, names: Mapping[str, str] | None = None, some: bool = False) -> list[dict[str, int | None]]:
    """The 14 labels of each row; rows with the same labels share a dictionary.

    Args:
        table: has a column a label.
        names: what a label is called in the table, where it has another name.
        some: whether labels may have no column; they are then missing.

    Raises:
        DataError: a column is missing, or a value that is no label.
    """
    columns = {label: (names or {}).get(label, label) for label in LABELS}
    absent = [column for column in columns.values() if column not in table.columns]
    if absent and not some:
        table[absent[0]]
    blank = [""] * len(table)
    cells = [table.columns.get(column, blank) for column in columns.values()]
    known: dict[tuple[str, ...], dict[str, int | None]] = {}
    found = []
    for row, values in enumerate(zip(*cells, strict=True)):
        if values not in known:
            for label, value in zip(columns.values(), values, strict=True):
                if value.strip() not in VALUES:
                    raise DataError(
                        f"{table.where(row)}: label {label!r} is {value!r:.60}; expected 1, 0, -1 (uncertain) or nothing"
                        f"{nearest(value, VALUES)}; fetch the table again"
                    )
            known[values] = {label: VALUES[value.strip()] for label, value in zip(columns, values, strict=True)}
        found.append(known[values])
    return found
