"""Shared by all tests: medxray first (it makes torchvision importable beside a CPU torch), own caches, Triton's
interpreter where there is no CUDA device."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread a worker, and so in the processes that it starts; OpenMP reads this when torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import medxray

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    # Read when triton is first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
SHARED = Path(os.environ.get("MEDXRAY_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real radiographs; without it a test skips, except in CI, where it must be there."""
    if not SHARED.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"{SHARED} is missing; CI runs with it")
        pytest.skip(f"{SHARED} is missing; name the folder of test data by MEDXRAY_SHARED")
    return SHARED


@pytest.fixture(scope="session")
def run() -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process: its exit code, what it prints, and what it says beside."""
    from typer.testing import CliRunner

    from medxray.cli import app

    def invoke(*arguments: object) -> tuple[int, str, str]:
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout, result.stderr

    return invoke


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing is left in a user's cache or data."""
    os.environ["MEDXRAY_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["XDG_DATA_HOME"] = str(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set of made-up radiographs."""
    from medxray.data.phantom import generate

    return generate(tmp_path_factory.mktemp("phantom") / "data", studies=96, size=96, seed=3, progress=False)


@pytest.fixture(scope="session")
def report_run(tmp_path_factory: pytest.TempPathFactory, phantom: Path) -> Path:
    """A run folder that writes reports of up to two views; fitted for seconds, so that they are long and wrong."""
    spec = {
        "task": "report",
        "name": "tiny",
        "output": str(tmp_path_factory.mktemp("report") / "run"),
        "data": {
            "image_size": 64,
            "reader": {"name": "csv", "root": str(phantom), "report": "findings"},
            "max_studies": 40,
            "max_pixels": 1_000_000,
        },
        "encoder": {"name": "vit", "width": 32, "depth": 1, "heads": 2, "patch": 16},
        "retriever": {"name": "nearest", "positives": 2, "negatives": 1},
        "decoder": {
            "name": "causal-lm", "trainable": True, "vocabulary": 300, "words": True, "prompt": "r2gengpt",
            "config": {
                "model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
                "num_attention_heads": 2,
            },
        },
        "training": {"steps": 30, "batch_size": 8, "learning_rate": 3e-3},
        "generation": {"max_new_tokens": 24, "batch_size": 16},
        "metrics": ["bleu"],
    }  # fmt: skip
    return medxray.build(spec).fit(progress=False).folder


@pytest.fixture(scope="session")
def radiograph() -> Callable[..., bytes]:
    """Makes a DICOM radiograph of noise; attributes by their keywords take the place of its own, None leaves one out."""
    import numpy as np
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid

    def make(seed: int = 0, **attributes: Any) -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 4096, (96, 80)).astype("<u2")
        data = Dataset()
        own = {
            "SOPClassUID": DigitalXRayImageStorageForPresentation,
            "SOPInstanceUID": generate_uid(entropy_srcs=[f"image {seed}"]),
            "StudyInstanceUID": generate_uid(entropy_srcs=["study"]),
            "SeriesInstanceUID": generate_uid(entropy_srcs=["series"]),
            "SpecificCharacterSet": "ISO_IR 100", "PatientName": "Mustermann^Jörg", "PatientID": "4711-0815",
            "PatientBirthDate": "19480229", "PatientSex": "M", "AccessionNumber": "A99", "StudyID": "77",
            "StudyDate": "20240203", "StudyTime": "101112", "ReferringPhysicianName": "Weiß^Ada", "ViewPosition": "PA",
            "Rows": 96, "Columns": 80, "BitsAllocated": 16, "BitsStored": 12, "HighBit": 11, "PixelRepresentation": 0,
            "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2",
        }  # fmt: skip
        for keyword, value in (own | attributes).items():
            if value is not None:
                setattr(data, keyword, value)
        data.add_new("PixelData", "OW", pixels.tobytes())
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.file_meta.MediaStorageSOPInstanceUID = data.get("SOPInstanceUID", "1.2")
        file = io.BytesIO()
        data.save_as(file, enforce_file_format=True)
        return file.getvalue()

    return make
