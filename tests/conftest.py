"""Shared by all tests: medxray first (it makes torchvision importable beside a CPU torch), own caches, Triton's
interpreter where there is no CUDA device."""

import os
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread a worker, and so in the processes that it starts; OpenMP reads this when torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import medxray  # noqa: F401

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
