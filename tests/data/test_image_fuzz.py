"""Damaged at random, an image of any kind is read or refused: no crash, no hang, no flood of memory."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

DICOM = {
    "explicit": ExplicitVRLittleEndian,
    "implicit": ImplicitVRLittleEndian,
    "big": ExplicitVRBigEndian,
    "deflated": DeflatedExplicitVRLittleEndian,
    "rle": RLELossless,
    "lossless": JPEGLosslessSV1,
    "process14": JPEGLossless,
    "jpegls": JPEGLSLossless,
    "jpeg2000": JPEG2000Lossless,
}
QUICK, ALL = 1_500, 20_000


def drawn(peak: int, dtype: type) -> np.ndarray:
    y, x = np.mgrid[0:72, 0:80]
    noise = np.random.default_rng(0).normal(0, 0.02, y.shape)
    return ((0.5 + 0.4 * np.sin(x / 9) * np.cos(y / 14) + noise).clip(0, 1) * peak).astype(dtype)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory, write_dicom: Callable[..., Path]) -> list[Path]:
    """Whole files of every kind that can be written here."""
    folder = tmp_path_factory.mktemp("seeds")
    deep, flat = drawn(4095, np.uint16), drawn(255, np.uint8)
    table = pydicom.Dataset()
    table.LUTDescriptor, table.LUTData = [4096, 0, 12], list(range(4096))
    table["LUTDescriptor"].VR = table["LUTData"].VR = "US"
    shown: dict[str, Any] = {"WindowCenter": [2000, 1000], "WindowWidth": [3000, 900], "PixelPaddingValue": 0}
    for name, syntax in DICOM.items():
        write_dicom(folder / f"{name}.dcm", deep, 12, syntax, **shown)
    write_dicom(folder / "tables.dcm", deep, 12, ModalityLUTSequence=[table], VOILUTSequence=[table])
    write_dicom(folder / "colour.dcm", np.stack([flat] * 3, -1), 8, RLELossless)
    buffer = io.BytesIO()
    Image.fromarray(flat).save(buffer, "JPEG")
    for name in ("baseline", "extended"):
        # A baseline stream is an extended one too.
        data = pydicom.dcmread(write_dicom(folder / f"{name}.dcm", flat, 8))
        data.file_meta.TransferSyntaxUID = JPEGBaseline8Bit if name == "baseline" else pydicom.uid.JPEGExtended12Bit
        data.PixelData = pydicom.encaps.encapsulate([buffer.getvalue()])
        data["PixelData"].VR = "OB"
        data.save_as(folder / f"{name}.dcm")
    exif = Image.Exif()
    exif[0x0112] = 6
    gray, rgb = Image.fromarray(flat), Image.merge("RGB", [Image.fromarray(flat)] * 3)
    gray.save(folder / "gray.png")
    Image.fromarray(deep).save(folder / "deep.png")
    gray.convert("P").save(folder / "palette.png")
    gray.save(folder / "gray.jpg", exif=exif)
    rgb.save(folder / "rgb.jpg", progressive=True)
    for name, compression in (("plain", None), ("lzw", "tiff_lzw"), ("zip", "tiff_adobe_deflate"), ("jpeg", "jpeg")):
        (gray if name == "jpeg" else Image.fromarray(deep)).save(folder / f"{name}.tif", compression=compression)
    Image.fromarray(deep).save(folder / "deep.jp2")
    rgb.save(folder / "rgb.j2k", irreversible=True)
    gray.save(folder / "gray.bmp")
    return sorted(path for path in folder.iterdir())


def run(seeds: list[Path], read: Callable[..., Any], folder: Path, number: int) -> None:
    whole = read([(path, None) for path in seeds], folder)
    assert [outcome.error for outcome in whole] == [""] * len(seeds), whole
    jobs = [(seeds[i % len(seeds)], i // len(seeds)) for i in range(number)]
    found = read(jobs, folder)
    wrong = [
        (path.name, mutation, outcome)
        for (path, mutation), outcome in zip(jobs, found, strict=True)
        if outcome.error not in ("", "ImageError") or outcome.seconds > 10 or outcome.grown > 200
    ]
    assert not wrong, "\n".join(map(str, wrong[:40])) + f"\n{len(wrong)} of {number}"
    refused = [outcome for outcome in found if outcome.error]
    assert len(refused) > number / 10
    assert all(outcome.message.startswith("mutant: ") for outcome in refused)


def test_random_damage(seeds: list[Path], read_in_child: Callable[..., Any], tmp_path: Path) -> None:
    run(seeds, read_in_child, tmp_path, QUICK)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_random_damage_twenty_thousand_times(
    seeds: list[Path], read_in_child: Callable[..., Any], tmp_path: Path
) -> None:
    run(seeds, read_in_child, tmp_path, ALL)
