"""VinDr-CXR: PA radiographs of two hospitals in Vietnam, each read by several radiologists."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from medxray.data.readers import Reader, split_of
from medxray.data.readers.csv import VALUES, read_table
from medxray.types import DataError, Study

NAMES = {"No finding": "No Finding", "Other disease": "Other diseases"}
"""The tables of the two splits name one label differently."""

NOT_LABELS = {"image_id", "rad_id"}


class VinDrCXR(Reader):
    """One image a study, PA, without a report; 22 local findings, 5 diagnoses and "No Finding".

    Root holds PhysioNet's version 1.0.0: `train/*.dicom`, `test/*.dicom`, and in `annotations/` the tables
    `image_labels_train.csv`, a row an image and radiologist, and `image_labels_test.csv`, a row an image, the consensus
    of five. Who the patients are is not published: `patient_id` is empty. One in ten training images is taken for
    validation by a stable hash. Boxes are not read.

    Args:
        disagreement: what radiologists who disagree make of a label: majority decides (a tie is uncertain), or
            uncertain.
    """

    def __init__(self, root: Path, disagreement: Literal["majority", "uncertain"] = "majority") -> None:
        super().__init__(root)
        self.disagreement = disagreement

    def read(self) -> Iterable[Study]:
        """All images of both tables.

        Raises:
            DataError: a table or a folder is missing, a value that is no label, a radiologist twice for an image, or
                an image in both tables.
        """
        studies: list[Study] = []
        seen: set[str] = set()
        for split in ("train", "test"):
            labels = self._labels(split)
            both = seen & set(labels)
            if both:
                raise DataError(f"{self.root}: image {sorted(both)[0]!r} is in both tables; fetch the tables again")
            seen |= set(labels)
            if not (self.root / split).is_dir():
                held = ", ".join(sorted(p.name for p in self.root.iterdir())[:10])
                raise DataError(
                    f"{self.root / split}: no such folder; expected the images *.dicom; the root holds {held}"
                )
            studies += [
                Study(
                    study_id=name,
                    patient_id="",
                    images=[self.inside(f"{split}/{name}.dicom", f"{self.root}: {split}")],
                    views=["PA"],
                    findings="",
                    impression="",
                    report="",
                    labels=own,
                    split="val" if split == "train" and split_of(name) == "val" else split,
                )
                for name, own in labels.items()
            ]
        return studies

    def _labels(self, split: str) -> dict[str, dict[str, int | None]]:
        """Image -> labels, those of several radiologists made one."""
        table = read_table(self.table(f"annotations/image_labels_{split}.csv"))
        images = table["image_id"]
        readers = table.columns.get("rad_id", images)
        rows: dict[str, dict[str, int]] = {}
        for row, (image, reader) in enumerate(zip(images, readers, strict=True)):
            if not image:
                raise DataError(f"{table.where(row)}: column 'image_id' is empty; fetch the table again")
            own = rows.setdefault(image, {})
            if reader in own:
                raise DataError(
                    f"{table.where(row)}: image {image!r} stands twice"
                    + (f" for radiologist {reader!r}" if "rad_id" in table.columns else "")
                    + "; remove a row"
                )
            own[reader] = row
        labels: dict[str, dict[str, int | None]] = {image: {} for image in rows}
        for name, cells in table.columns.items():
            if name in NOT_LABELS or not name:
                continue
            for row, cell in enumerate(cells):
                if cell not in VALUES:
                    raise DataError(f"{table.where(row)}: label {name!r} is {cell!r}; expected 0, 1 or nothing")
            label = NAMES.get(name, name)
            for image, own in rows.items():
                labels[image][label] = self._agreed([VALUES[cells[row]] for row in own.values()])
        return labels

    def _agreed(self, votes: list[int | None]) -> int | None:
        given = [vote for vote in votes if vote is not None]
        if not given:
            return None
        if -1 in given:
            return -1
        if 2 * sum(given) == len(given) or (self.disagreement == "uncertain" and len(set(given)) > 1):
            return -1
        return int(2 * sum(given) > len(given))
