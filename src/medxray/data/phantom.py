"""Made-up chest X-ray studies with reports, labels and masks: for tests, demonstrations and first steps.

Images are projections of a drawn chest (`phantom_drawing`), reports come from a grammar (`phantom_reports`). A
study follows from its seed and index alone, so any one can be drawn without the others.
"""

import csv
import json
import os
import shutil
import uuid
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medxray.data.phantom_drawing import Anatomy, Mask, draw_view
from medxray.data.phantom_reports import FINDINGS, Finding, write_report
from medxray.data.seeds import seed_of
from medxray.progress import progress_bar
from medxray.types import DataError

__all__ = ["FINDINGS", "Finding", "PhantomStudy", "draw_study", "generate", "split_of"]

Format = Literal["png8", "png16", "dicom"]
Split = Literal["train", "val", "test"]

_VERSION = 1  # of the drawing and the grammar: another number, another set
_NORMAL_SHARE = 0.35
_DEVICES = ("Pacemaker", "Central Line", "Tube")
_WEIGHT = dict.fromkeys(FINDINGS, 1.0) | {
    "Cardiomegaly": 0.85,
    "Effusion": 0.8,
    "Edema": 0.8,
    "Central Line": 0.8,
}
_TOGETHER = {
    ("Edema", "Effusion"): 2.0, ("Edema", "Cardiomegaly"): 2.2, ("Effusion", "Cardiomegaly"): 1.5,
    ("Tube", "Central Line"): 3.0, ("Pneumothorax", "Fracture"): 1.8, ("Effusion", "Atelectasis"): 1.5,
}  # fmt: skip
_ZONED = ("Consolidation", "Nodule", "Fracture")
_DEGREES = ("small", "moderate", "large")


@dataclass(frozen=True)
class PhantomStudy:
    """One visit of a made-up patient.

    Attributes:
        views: "PA", "AP" or "LL", one an image.
        images: uint16 (H, W), 12-bit values 0..4095, bone bright.
        thorax_masks: bool (H, W), the inside of the rib cage.
        lung_masks: bool (H, W), the lungs above the diaphragm; inside the thorax mask.
        labels: every name of `FINDINGS` -> 1 present, 0 absent, -1 uncertain.
        details: what is drawn and where.
    """

    study_id: str
    patient_id: str
    views: tuple[str, ...]
    images: tuple[NDArray[np.uint16], ...]
    thorax_masks: tuple[Mask, ...]
    lung_masks: tuple[Mask, ...]
    labels: dict[str, int]
    details: tuple[Finding, ...]
    indication: str
    findings: str
    impression: str
    age: int
    sex: str


def _patient_of(seed: int, index: int) -> tuple[int, int]:
    """The patient's number and which of the patient's visits: six studies are three patients' 1, 2 and 3."""
    block, offset = divmod(index, 6)
    order = np.random.default_rng(seed_of("visits", seed, block)).permutation(3)
    for j, visits in enumerate(order + 1):
        if offset < visits:
            return 3 * block + j, offset
        offset -= int(visits)
    raise AssertionError("1 + 2 + 3 visits are six")


def split_of(seed: int, patient: int) -> Split:
    """The patient's split: of each ten patients in a row seven train, one is for validation, two test."""
    tens, place = divmod(patient, 10)
    order = np.random.default_rng(seed_of("split", seed, tens)).permutation(10)
    splits: tuple[Split, ...] = (
        "val",
        "test",
        "train",
        "train",
        "test",
        "train",
        "train",
        "train",
        "train",
        "train",
    )
    return splits[int(order[place])]


def _onset(name: str, others: Collection[Finding], rng: np.random.Generator) -> Finding:
    """A new finding of a study that has the others already."""
    side = ("left", "right")[int(rng.integers(2))]
    both = bool(rng.random() < 0.22)
    pleural = [other for other in others if other.name in ("Effusion", "Pneumothorax", "Atelectasis")]
    taken = {other.side for other in pleural}
    if name in ("Effusion", "Atelectasis") and both and not taken:
        side = "bilateral"
    elif taken and "bilateral" not in taken and name not in _DEVICES:
        # on the other side, where it is not hidden
        side = "right" if "left" in taken else "left"
    place, degree = "none", _DEGREES[int(rng.choice(3, p=(0.3, 0.4, 0.3)))]
    if name in ("Cardiomegaly", "Tube"):
        side = "none"
    elif name == "Edema":
        side = "bilateral"
    elif name == "Pacemaker":
        side = "left" if rng.random() < 0.75 else "right"
    elif name == "Central Line":
        side = "right" if rng.random() < 0.65 else "left"
    if name in _ZONED:
        hidden = name == "Consolidation" and "bilateral" in taken
        place = ("upper", "mid", "lower")[int(rng.integers(2 if hidden else 3))]
    elif name in ("Effusion", "Atelectasis"):
        place = "base"
        if side == "bilateral" and degree == "large":
            degree = "moderate"
    elif name == "Pneumothorax":
        place = "apex"
    elif name == "Central Line":
        place = "jugular" if rng.random() < 0.55 else "subclavian"
    elif name == "Tube":
        place = ("high", "good", "good", "low")[int(rng.integers(4))]
    uncertain = name not in _DEVICES and rng.random() < 0.13
    if name in _DEVICES:
        degree = "none"
    elif uncertain:
        degree = "small"
    return Finding(name, side, place, degree, uncertain, "new", int(rng.integers(2**62)))


def _progress(finding: Finding, rng: np.random.Generator) -> Finding:
    """The same finding at the next visit."""
    if finding.name in _DEVICES or finding.uncertain:
        return replace(finding, change="unchanged")
    level, course = _DEGREES.index(finding.degree), rng.random()
    if course < 0.35 and level > 0:
        return replace(finding, degree=_DEGREES[level - 1], change="improved")
    if course > 0.85 and level < 2 and finding.side != "bilateral":
        return replace(finding, degree=_DEGREES[level + 1], change="worse")
    return replace(finding, change="unchanged")


def _visit(seed: int, patient: int, visit: int) -> tuple[tuple[Finding, ...], tuple[str, ...]]:
    """The findings of a visit, in the order of `FINDINGS`, and the names of those gone since the one before."""
    current: list[Finding] = []
    gone: tuple[str, ...] = ()
    for number in range(visit + 1):
        rng = np.random.default_rng(seed_of("findings", seed, patient, number))
        count = 0 if rng.random() < _NORMAL_SHARE else int(rng.choice((1, 2, 3), p=(0.15, 0.35, 0.5)))
        before = current
        order = rng.permutation(len(before))
        stay = {int(i) for i in order[:count] if rng.random() < 0.75}
        current = [_progress(finding, rng) for i, finding in enumerate(before) if i in stay]
        while len(current) < count:
            weight = np.array([_WEIGHT[name] for name in FINDINGS])
            for k, name in enumerate(FINDINGS):
                for other in current:
                    weight[k] *= _TOGETHER.get((name, other.name), 1.0) * _TOGETHER.get((other.name, name), 1.0)
                    weight[k] *= other.name != name
                weight[k] *= all(name != finding.name for finding in before)
            name = FINDINGS[int(rng.choice(len(FINDINGS), p=weight / weight.sum()))]
            current.append(_onset(name, current, rng))
        names = {finding.name for finding in current}
        gone = tuple(finding.name for finding in before if finding.name not in names)
    return tuple(sorted(current, key=lambda finding: FINDINGS.index(finding.name))), gone


def _views(findings: Collection[Finding], rng: np.random.Generator) -> tuple[str, ...]:
    bedside = 0.12
    for finding in findings:
        bedside = max(bedside, {"Tube": 0.6, "Central Line": 0.4, "Edema": 0.25}.get(finding.name, 0.0))
    if rng.random() < bedside:
        return ("AP", "LL") if rng.random() < 0.25 else ("AP",)
    return ("PA", "LL") if rng.random() < 0.85 else ("PA",)


def draw_study(
    seed: int,
    index: int,
    size: int = 256,
    *,
    views: tuple[str, ...] | None = None,
    without: Collection[str] = (),
) -> PhantomStudy:
    """The study with this index: always the same for the same seed, index and size.

    Args:
        seed: of the whole set.
        index: 0, 1, ...: the study's number in the set; follow-ups of a patient stand next to each other.
        size: side of the square images in pixels, at least 32.
        views: draw these instead of those the study has.
        without: names of findings to leave out of the images, with all else unchanged; texts and labels keep them.

    Raises:
        DataError: a negative index or a size under 32.
    """
    if index < 0 or size < 32:
        raise DataError(f"phantom study: expected index >= 0 and size >= 32, got index {index} and size {size}")
    patient, visit = _patient_of(seed, index)
    person = np.random.default_rng(seed_of("patient", seed, patient))
    female, age = bool(person.random() < 0.5), int(person.integers(19, 89))
    anatomy = Anatomy.sample(seed_of("anatomy", seed, patient), age, female)
    found, gone = _visit(seed, patient, visit)
    rng = np.random.default_rng(seed_of("study", seed, index))
    indication, findings, impression = write_report(found, gone, visit > 0, female, rng)
    chosen = _views(found, rng)
    if views is not None:
        chosen = views
    drawn = [draw_view(anatomy, view, found, (seed_of("view", seed, index, view),), size, without) for view in chosen]
    present = {finding.name: -1 if finding.uncertain else 1 for finding in found}
    return PhantomStudy(
        study_id=f"S{index:06d}",
        patient_id=f"P{patient:06d}",
        views=chosen,
        images=tuple(image for image, _, _ in drawn),
        thorax_masks=tuple(thorax for _, thorax, _ in drawn),
        lung_masks=tuple(lung for _, _, lung in drawn),
        labels={name: present.get(name, 0) for name in FINDINGS},
        details=found,
        indication=indication,
        findings=findings,
        impression=impression,
        age=min(age + visit, 89),
        sex="F" if female else "M",
    )


def _write_dicom(path: Path, study: PhantomStudy, k: int, seed: int, number: int) -> None:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid

    def uid(*parts: object) -> str:
        sources = ["medxray phantom", str(_VERSION), str(seed), *map(str, parts)]
        return str(generate_uid(prefix="2.25.", entropy_srcs=sources))

    image = study.images[k]
    inverse = seed_of("monochrome1", seed, number) % 3 == 0
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = uid(study.study_id, study.views[k])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = uid("writer")
    data = Dataset()
    data.file_meta = meta
    data.SOPClassUID = meta.MediaStorageSOPClassUID
    data.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    data.StudyInstanceUID = uid(study.study_id)
    data.SeriesInstanceUID = uid(study.study_id, "series")
    data.PatientID = study.patient_id
    data.PatientName = study.patient_id
    data.PatientSex = study.sex
    data.PatientAge = f"{study.age:03d}Y"
    data.PatientBirthDate = data.StudyDate = data.StudyTime = data.ReferringPhysicianName = ""
    data.StudyID = data.AccessionNumber = study.study_id
    data.Modality = "DX"
    data.BodyPartExamined = "CHEST"
    data.ViewPosition = study.views[k]
    data.PatientOrientation = ["P", "F"] if study.views[k] == "LL" else ["L", "F"]
    data.SeriesNumber, data.InstanceNumber = 1, k + 1
    data.SamplesPerPixel = 1
    data.PhotometricInterpretation = "MONOCHROME1" if inverse else "MONOCHROME2"
    data.PresentationLUTShape = "INVERSE" if inverse else "IDENTITY"
    data.Rows, data.Columns = image.shape
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.WindowCenter, data.WindowWidth = 2048, 4096
    data.PixelData = (4095 - image if inverse else image).astype("<u2").tobytes()
    data["PixelData"].VR = "OW"
    data.save_as(path, enforce_file_format=True)


def _write_study(folder: Path, seed: int, index: int, size: int, format: Format) -> list[dict[str, Any]]:
    """Draws one study into the folder; its rows of the table, one an image."""
    study = draw_study(seed, index, size)
    patient = int(study.patient_id[1:])
    rows = []
    for k, view in enumerate(study.views):
        name = f"{study.study_id}_{view}"
        path = f"images/{name}.{'dcm' if format == 'dicom' else 'png'}"
        if format == "dicom":
            _write_dicom(folder / path, study, k, seed, index)
        elif format == "png16":
            # the full range of 16 bits, as a viewer expects
            Image.fromarray(study.images[k] * np.uint16(16)).save(folder / path, compress_level=1)
        else:
            Image.fromarray((study.images[k] >> 4).astype(np.uint8)).save(folder / path, compress_level=1)
        masks = {"thorax_mask": study.thorax_masks[k], "lung_mask": study.lung_masks[k]}
        files = {kind: f"masks/{name}_{kind.removesuffix('_mask')}.png" for kind in masks}
        for kind, mask in masks.items():
            Image.fromarray(mask).save(folder / files[kind], compress_level=1)
        rows.append({
            "path": path, "study_id": study.study_id, "patient_id": study.patient_id, "view": view,
            "indication": study.indication, "findings": study.findings, "impression": study.impression,
            "age": study.age, "sex": study.sex, "split": split_of(seed, patient), **study.labels, **files,
        })  # fmt: skip
    return rows


def _counts(rows: list[dict[str, Any]]) -> dict[str, Any]:
    first = {row["study_id"]: row for row in rows}.values()
    return {
        "images": len(rows),
        "patients": len({row["patient_id"] for row in rows}),
        "splits": {split: sum(row["split"] == split for row in first) for split in ("train", "val", "test")},
        "present": {name: sum(row[name] == 1 for row in first) for name in FINDINGS},
        "uncertain": {name: sum(row[name] == -1 for row in first) for name in FINDINGS},
    }


def _is_whole(root: Path, arguments: dict[str, Any]) -> bool:
    """Whether the set is there already.

    Raises:
        DataError: something else is.
    """
    record = root / "phantom.json"
    if not record.is_file():
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise DataError(
                f"{root}: expected a new or empty folder, or a phantom set (with a phantom.json); found other files; "
                "name another folder"
            )
        return False
    try:
        found = json.loads(record.read_text(encoding="utf-8"))["arguments"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{record}: not the record of a phantom set ({error}); delete {root} to draw it anew"
        ) from error
    differing = [
        f"{name} is {found.get(name)!r}, asked for {value!r}"
        for name, value in arguments.items()
        if found.get(name) != value
    ]
    if differing:
        raise DataError(
            f"{root} holds another phantom set: {'; '.join(differing)}. Ask for the same arguments, name another "
            "folder, or delete this one to draw it anew"
        )
    return True


def generate(
    root: Path,
    studies: int = 400,
    size: int = 256,
    seed: int = 0,
    format: Format = "png8",
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Writes a set of phantom studies and returns its folder; at once when it is there already.

    The folder holds `studies.csv` (one row an image: path, ids, view, the report's sections, age, sex, split, a
    column 1 / 0 / -1 a label, paths of the masks), `images/`, `masks/` and `phantom.json` (the arguments and counts).
    It appears whole or not at all, and is the same byte for byte whatever the number of workers.

    Args:
        root: the folder to make.
        studies: how many; each has one or two images.
        size: side of the images in pixels.
        seed: another seed, other patients.
        format: "png8", "png16" (the 12 bits times 16) or "dicom" (12 bits, some MONOCHROME1).
        workers: threads; by default one a processor.
        progress: show a bar.

    Raises:
        DataError: wrong arguments, or the folder holds something else, such as a set drawn with other arguments.
    """
    root = Path(root)
    if format not in ("png8", "png16", "dicom"):
        raise DataError(f"phantom: format: expected png8, png16 or dicom, got {format!r}")
    if studies < 1 or size < 32:
        raise DataError(f"phantom: expected studies >= 1 and size >= 32, got studies {studies} and size {size}")
    arguments = {"version": _VERSION, "studies": studies, "size": size, "seed": seed, "format": format}
    if _is_whole(root, arguments):
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    folder = root.parent / f".{root.name}-{uuid.uuid4().hex[:12]}.partial"
    try:
        (folder / "images").mkdir(parents=True)
        (folder / "masks").mkdir()
        rows: list[dict[str, Any]] = []
        # The kernels, zlib and the files release the interpreter's lock: threads are as quick as processes.
        with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
            drawn = pool.map(lambda index: _write_study(folder, seed, index, size, format), range(studies))
            for part in progress_bar(drawn, desc="drawing", total=studies, unit="study", disable=not progress):
                rows += part
        with (folder / "studies.csv").open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
        record = {"arguments": arguments, "counts": _counts(rows)}
        (folder / "phantom.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if root.exists() and not any(root.iterdir()):
            root.rmdir()
        try:
            folder.rename(root)
        except OSError:
            # someone else drew it meanwhile
            if not _is_whole(root, arguments):
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return root

