"""ChestX-ray14 of the NIH Clinical Center: frontal radiographs with labels mined from their reports."""

import os
from collections.abc import Iterable
from pathlib import Path

from medxray.data.attributes import age_band_of, sex_of
from medxray.data.readers import Reader, read_text, split_of, view_of
from medxray.data.readers.csv import read_table
from medxray.types import DataError, Study

LABELS = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia", "No Finding",
)  # fmt: skip
"""Of Wang et al., CVPR 2017, in the paper's order."""

TABLES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
"""Of two tables the newer: its labels were mended in 2020."""

TRAIN, TEST = "train_val_list.txt", "test_list.txt"


class NIHChestXray14(Reader):
    """One image a study, PA or AP, without a report; 14 labels and "No Finding".

    Root holds `Data_Entry_2017_v2020.csv` or `Data_Entry_2017.csv`, `train_val_list.txt`, `test_list.txt`, and the
    images in `images/` or in `images_001/images/` to `images_012/images/`. The official split is by patient; one in
    ten patients of its first list is taken for validation by a stable hash. A patient's name is the number that the
    table gives, as the reader `rsna-pneumonia` has it.

    Args:
        official: the split of the two lists; false divides the patients 80/10/10 by a stable hash, without them.
    """

    def __init__(self, root: Path, official: bool = True) -> None:
        super().__init__(root)
        self.official = official

    def read(self) -> Iterable[Study]:
        """All images of the table.

        Raises:
            DataError: a table, a list or the images are missing, an image in no list or in both, or a label that is
                none of theirs.
        """
        table = read_table(self.table(*TABLES))
        names, patients = table["Image Index"], table["Patient ID"]
        positions, findings = table["View Position"], table["Finding Labels"]
        blank = [""] * len(table)
        ages = table.columns.get("Patient Age", blank)
        sexes = table.columns.get("Patient Sex") or table.columns.get("Patient Gender", blank)
        lists = self._lists() if self.official else {}
        places = self._places()
        labels: dict[str, dict[str, int | None]] = {}
        split_by_patient: dict[str, str] = {}
        studies = []
        for row, (name, patient, cell) in enumerate(zip(names, patients, findings, strict=True)):
            if cell not in labels:
                present = {word.strip() for word in cell.split("|")}
                if not present <= set(LABELS):
                    raise DataError(
                        f"{table.where(row)}: finding {sorted(present - set(LABELS))[0]!r}; expected those of "
                        f"ChestX-ray14 ({', '.join(LABELS)}), parted by '|'; fetch the table again"
                    )
                labels[cell] = {label: int(label in present) for label in LABELS}
            if patient not in split_by_patient:
                split_by_patient[patient] = split_of(patient)
            split = split_by_patient[patient]
            if self.official:
                if name not in lists:
                    raise DataError(
                        f"{table.where(row)}: image {name!r} is neither in {TRAIN} nor in {TEST}; fetch them again, "
                        "or set data.reader.official: false to divide by patient"
                    )
                if lists[name] == "test" or split == "test":
                    split = lists[name]
            studies.append(
                Study(
                    study_id=name.removesuffix(".png"),
                    patient_id=patient,
                    images=[self.inside(places.get(name, f"images/{name}"), table.where(row))],
                    views=[view_of(positions[row])],
                    findings="",
                    impression="",
                    report="",
                    labels=dict(labels[cell]),
                    split=split,
                    sex=sex_of(sexes[row]),
                    age_band=age_band_of(ages[row]),
                )
            )
        return studies

    def _lists(self) -> dict[str, str]:
        """Image -> train or test."""
        found: dict[str, str] = {}
        for file, split in ((TRAIN, "train"), (TEST, "test")):
            if not (self.root / file).is_file():
                raise DataError(
                    f"{self.root / file}: no such file; expected the official split, {TRAIN} and {TEST}, beside the "
                    "table; fetch both, or set data.reader.official: false to divide by patient"
                )
            for name in read_text(self.root / file).split():
                if found.setdefault(name, split) != split:
                    raise DataError(f"{self.root / file}: image {name!r} is in {TRAIN} as well; fetch both lists again")
        return found

    def _places(self) -> dict[str, str]:
        """Image -> where it lies below root.

        Raises:
            DataError: there is no image at all, such as while they are still packed.
        """
        folders = [path for path in sorted(self.root.glob("images*")) if path.is_dir()]
        places: dict[str, str] = {}
        packed = sorted(path.name for path in self.root.glob("*.tar.gz"))
        for folder in (inner for path in folders for inner in (path / "images", path)):
            if folder.is_dir():
                with os.scandir(folder) as entries:
                    own = sorted(entry.name for entry in entries)
                below = folder.relative_to(self.root).as_posix()
                for name in own:
                    if name.endswith(".png"):
                        places.setdefault(name, f"{below}/{name}")
                packed += [f"{below}/{name}" for name in own if name.endswith(".tar.gz")]
        if not places:
            held = ", ".join(sorted(path.name for path in self.root.iterdir())[:10])
            raise DataError(
                f"{self.root}: no image; expected images/*.png, or images_001/images/*.png to images_012/images/*.png; "
                f"found {held}"
                + (f"; {packed[0]} is packed and cannot be read in place: unpack all of them" if packed else "")
                + "; check data.reader.root"
            )
        return places
