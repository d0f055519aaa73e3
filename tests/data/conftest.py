"""DICOM files of every transfer syntax that can be written here, and a process that reads damaged images."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataelem import RawDataElement
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLossless,
    JPEGLosslessSV1,
)


def jpeg_lossless(array: np.ndarray, bits: int) -> bytes:
    """Process 14, predictor 1 (ISO 10918-1 H), with one Huffman table in which each of 17 codes has 5 bits."""
    H, W = array.shape
    values = array.astype(np.int64)
    predicted = np.empty_like(values)
    predicted[0, 0] = 1 << (bits - 1)
    predicted[0, 1:] = values[0, :-1]
    predicted[1:, 0] = values[:-1, 0]
    predicted[1:, 1:] = values[1:, :-1]
    coded = []
    for difference in ((values - predicted + 2**15) % 2**16 - 2**15).ravel().tolist():
        length = abs(difference).bit_length()
        coded.append(f"{length:05b}")
        if 0 < length < 16:
            coded.append(f"{difference if difference > 0 else difference + (1 << length) - 1:0{length}b}")
    text = "".join(coded)
    text += "1" * (-len(text) % 8)
    scan = int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\x00")
    frame = struct.pack(">BHHB3B", bits, H, W, 1, 1, 0x11, 0)
    table = bytes([0, 0, 0, 0, 0, 17, *[0] * 11, *range(17)])
    start = bytes([1, 1, 0, 1, 0, 0])
    segments = [(0xC3, frame), (0xC4, table), (0xDA, start)]
    head = b"".join(struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body for marker, body in segments)
    return b"\xff\xd8" + head + scan + b"\xff\xd9"


def write(
    path: Path, array: np.ndarray, bits: int, syntax: UID = ExplicitVRLittleEndian, **changed: Any
) -> Path:
    """A minimal radiograph in a file.

    changed: in place of those that `array` and `bits` mean; None leaves one out, and bytes for a field of another kind
    are written as they are.
    """
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = UID("1.2.3.4")
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    values = {
        "SOPClassUID": meta.MediaStorageSOPClassUID,
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "Rows": array.shape[0],
        "Columns": array.shape[1],
        "SamplesPerPixel": 1 if array.ndim == 2 else 3,
        "PhotometricInterpretation": "MONOCHROME2" if array.ndim == 2 else "RGB",
        "PlanarConfiguration": None if array.ndim == 2 else 0,
        "BitsAllocated": array.dtype.itemsize * 8,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": int(array.dtype.kind == "i"),
        "PixelData": array.tobytes(),
        **changed,
    }
    for name, value in values.items():
        tag = pydicom.datadict.tag_for_keyword(name)
        kind = pydicom.datadict.dictionary_VR(tag)
        if isinstance(value, bytes) and "OW" not in kind:
            data[tag] = RawDataElement(pydicom.tag.Tag(tag), kind, len(value), value, 0, False, True)
        elif value is not None:
            setattr(data, name, value)
    if syntax in (JPEGLossless, JPEGLosslessSV1):
        data.PixelData = encapsulate([jpeg_lossless(array, bits)])
        data["PixelData"].VR = "OB"
    elif syntax.is_encapsulated:
        data.compress(syntax, generate_instance_uid=False)
    elif syntax == ExplicitVRBigEndian and "PixelData" in data:
        data.PixelData = array.byteswap().tobytes()
    meta.TransferSyntaxUID = syntax
    implicit, little = syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian
    with pydicom.config.disable_value_validation():
        pydicom.dcmwrite(path, data, enforce_file_format=True, implicit_vr=implicit, little_endian=little)
    return path


@pytest.fixture(scope="session")
def write_dicom() -> Callable[..., Path]:
    """`write` above."""
    return write


@dataclass
class Outcome:
    """What came of reading one image: error is "" for a proper one, "died" where the process did; grown MiB."""

    error: str
    message: str = ""
    seconds: float = 0.0
    grown: int = 0


def outcomes(
    jobs: Sequence[tuple[Path, int | None]], folder: Path, *, seconds: int = 20, max_pixels: int = 1_000_000
) -> list[Outcome]:
    """Reads images, damaged by a number or as they are, in a child process; after its death, the rest in another."""
    found: list[Outcome] = []
    while len(found) < len(jobs):
        rest = [[str(path), mutation] for path, mutation in jobs[len(found) :]]
        plan = folder / "jobs.json"
        plan.write_text(json.dumps({"seconds": seconds, "max_pixels": max_pixels, "jobs": rest}))
        command = [sys.executable, str(Path(__file__).with_name("reading_child.py")), str(plan)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        found += [Outcome(*(line[f.name] for f in fields(Outcome))) for line in lines if "error" in line]
        if len(found) < len(jobs):
            if not lines or "error" in lines[-1]:
                raise RuntimeError(f"the reading process failed: {done.stderr[-2000:]}")
            found.append(Outcome("died", f"by signal {-done.returncode}; {done.stderr[-500:]}"))
    return found


@pytest.fixture(scope="session")
def read_in_child() -> Callable[..., list[Outcome]]:
    """`outcomes` above."""
    return outcomes
