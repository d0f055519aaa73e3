"""The RSNA Pneumonia Detection Challenge of 2018: radiographs of ChestX-ray14, read anew by radiologists."""

import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from medxray.data.attributes import manufacturer_of
from medxray.data.readers import Reader, read_text, split_of
from medxray.data.readers.csv import read_table
from medxray.types import DataError, Study

if TYPE_CHECKING:
    from medxray.data.images import ImageHeader

LABELS, CLASSES = "stage_2_train_labels.csv", "stage_2_detailed_class_info.csv"
TRAIN, TEST = "stage_2_train_images", "stage_2_test_images"
MAPPING = "*dataset-mappings*.json"

NAMES = {
    "Lung Opacity": "Lung Opacity",
    "No Lung Opacity / Not Normal": "No Lung Opacity / Not Normal",
    "Normal": "No Finding",
}
"""Class of the challenge -> label."""


class RSNAPneumonia(Reader):
    """One image a study, without a report. Labels are "Pneumonia" (the challenge's Target) and the three classes, of
    which "Normal" is called "No Finding". A table's several rows of an image, one a box, are one study.

    Root holds the second stage as Kaggle publishes it: `stage_2_train_labels.csv`, `stage_2_detailed_class_info.csv`,
    `stage_2_train_images/*.dcm` and `stage_2_test_images/*.dcm`. What the challenge calls a patientId is an image: a
    patient may have several. RSNA's `pneumonia-challenge-dataset-mappings_2018.json` tells the images of
    ChestX-ray14 that they are, hence the patients; without it each image counts as a patient, and a patient may lie
    in two splits unnoticed.

    Args:
        mapping: name of RSNA's mapping below root; null takes it where it is there.
        test: patients divides the labelled images 80/10/10 by a stable hash of the patient; challenge takes the
            challenge's own test images, which have no labels, and of the others one patient in ten for validation.
            With the mapping, labelled images of patients that the challenge tests are then left out, and listed.
        headers: read each file's header for its view, PA or AP, sex, band of age and manufacturer, which takes a while;
            else they are unknown.
    """

    def __init__(
        self,
        root: Path,
        mapping: str | None = None,
        test: Literal["patients", "challenge"] = "patients",
        headers: bool = False,
    ) -> None:
        super().__init__(root)
        self.mapping, self.test, self.headers = mapping, test, headers

    def read(self) -> Iterable[Study]:
        """The labelled images, and with `test: challenge` those of the challenge's test.

        Raises:
            DataError: a table, a folder or the named mapping is missing, rows of an image that disagree, an image
                without a class or that the mapping lacks, or a value that is none of the challenge's.
        """
        labels = self._labels()
        known = self._mapping()
        self.left_out = []
        if known is None:
            reason = f"no mapping to ChestX-ray14 ({MAPPING}): each image counts as a patient, so that patients may cross splits"
            self.left_out.append({"study": "", "file": LABELS, "reason": reason})
        patients = {image: self._patient(image, known) for image in labels}
        images = {image: f"{TRAIN}/{image}.dcm" for image in labels}
        self._has(TRAIN)
        splits = {image: split_of(patient) for image, patient in patients.items()}
        if self.test == "challenge":
            tested = self._tested()
            patients |= {image: self._patient(image, known) for image in tested}
            elsewhere = {patients[image] for image in tested}
            for image in [image for image in images if patients[image] in elsewhere]:
                reason = "the challenge tests other images of its patient"
                self.left_out.append({"study": image, "file": images.pop(image), "reason": reason})
            splits = {image: "val" if splits[image] == "val" else "train" for image in images}
            splits |= dict.fromkeys(tested, "test")
            images |= {image: f"{TEST}/{image}.dcm" for image in tested}
        paths = [self.inside(path, str(self.root / LABELS)) for path in images.values()]
        headers = self._headers(paths)
        return [
            Study(
                study_id=image,
                patient_id=patients[image],
                images=[path],
                views=[header.view if header else "unknown"],
                findings="",
                impression="",
                report="",
                labels=dict(labels.get(image, {})),
                split=splits[image],
                sex=header.sex if header else "",
                age_band=header.age_band if header else "",
                manufacturer=manufacturer_of(header.manufacturer) if header else "",
            )
            for image, path, header in zip(images, paths, headers, strict=True)
        ]

    def _labels(self) -> dict[str, dict[str, int | None]]:
        """Image -> its labels."""
        classes: dict[str, str] = {}
        table = read_table(self.table(CLASSES))
        for row, (image, name) in enumerate(zip(table["patientId"], table["class"], strict=True)):
            if name not in NAMES:
                raise DataError(f"{table.where(row)}: class {name!r}; expected one of {', '.join(map(repr, NAMES))}")
            if classes.setdefault(image, name) != name:
                raise DataError(
                    f"{table.where(row)}: image {image!r} is {name!r}, but {classes[image]!r} above; mend it"
                )
        targets: dict[str, str] = {}
        table = read_table(self.table(LABELS))
        for row, (image, target) in enumerate(zip(table["patientId"], table["Target"], strict=True)):
            if target not in ("0", "1"):
                raise DataError(f"{table.where(row)}: Target {target!r}; expected 0 or 1")
            if targets.setdefault(image, target) != target:
                raise DataError(f"{table.where(row)}: image {image!r} has Target {target}, but {targets[image]} above")
            if image not in classes:
                raise DataError(f"{table.where(row)}: image {image!r} has no row in {CLASSES}; fetch both tables again")
        return {
            image: {"Pneumonia": int(target), **{label: int(classes[image] == name) for name, label in NAMES.items()}}
            for image, target in targets.items()
        }

    def _mapping(self) -> dict[str, str] | None:
        """Image -> patient of ChestX-ray14, named as there; None where there is no mapping."""
        if self.mapping is not None:
            path = self.file(self.mapping)
        else:
            found = sorted(self.root.glob(MAPPING))
            if not found:
                return None
            path = found[0]
        try:
            rows = json.loads(read_text(path))
            # "00013774_026.png", the image 26 of patient 13774
            return {row["subset_img_id"]: str(int(row["img_id"].partition("_")[0])) for row in rows}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}: expected a list of objects with 'subset_img_id' and 'img_id', such as 00013774_026.png "
                f"({type(error).__name__}: {error}); fetch RSNA's mapping again"
            ) from None

    def _patient(self, image: str, known: dict[str, str] | None) -> str:
        if known is None:
            return image
        if image not in known:
            raise DataError(f"{self.root}: image {image!r} is not in RSNA's mapping; fetch the mapping again")
        return known[image]

    def _has(self, folder: str) -> Path:
        path = self.root / folder
        if not path.is_dir():
            held = ", ".join(sorted(p.name for p in self.root.iterdir())[:10])
            raise DataError(f"{path}: no such folder; expected the challenge's DICOM files; the root holds {held}")
        return path

    def _tested(self) -> list[str]:
        with os.scandir(self._has(TEST)) as entries:
            found = sorted(entry.name.removesuffix(".dcm") for entry in entries if entry.name.endswith(".dcm"))
        if not found:
            raise DataError(f"{self.root / TEST}: no file *.dcm; unpack the challenge's test images there")
        return found

    def _headers(self, paths: list[str]) -> "Sequence[ImageHeader | None]":
        if not self.headers:
            return [None] * len(paths)
        from medxray.data.images import read_header

        with ThreadPoolExecutor() as pool:
            return list(pool.map(lambda path: read_header(self.root / path), paths))
