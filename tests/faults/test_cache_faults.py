"""What is kept beside a data set or in the user's cache: half, damaged or without room it costs its making, and nothing else."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from medxray.encoders.frozen import compute_once
from medxray.pipeline import Pipeline
from medxray.pretrain import SEGMENTERS, Region, Segmenter
from medxray.pretrain.regions import Contours


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEDXRAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def images(unbroken: Pipeline) -> Any:
    return unbroken.images("train").still(range(8))


def features(pipeline: Pipeline, images: Any) -> list[float]:
    found = compute_once(pipeline.task.encoder, images, 4, progress=False)
    return [float(found.tokens.double().sum()), float(found.pooled.double().sum())]


def test_features_that_a_kill_has_left_half(child: Any, unbroken: Pipeline, images: Any, cache: Path) -> None:
    made = child(lambda: features(unbroken, images), below=cache)
    assert made.how == "done" and made.operations >= 5
    for number in range(made.operations):
        shutil.rmtree(cache)
        assert child(lambda: features(unbroken, images), below=cache, kill_at=number).how == "killed"
        assert child(lambda: features(unbroken, images)).said == made.said, number


def test_features_without_room(child: Any, unbroken: Pipeline, images: Any, small_disk: Any, monkeypatch: Any) -> None:
    """The files are mapped into memory, where a write without room would end the process without a word."""
    where = small_disk("12k")
    monkeypatch.setenv("MEDXRAY_CACHE", str(where))
    full = child(lambda: features(unbroken, images))
    assert full.how == "RunError" and "No space left on device" in full.said and "MEDXRAY_CACHE" in full.said, full
    assert str(where) in full.said and not [path for path in where.rglob("*") if path.is_file()]
    small_disk("4m", folder=where)
    assert child(lambda: features(unbroken, images)).how == "done"


@pytest.mark.parametrize("file", ["tokens.npy", "pooled.npy", "grid.json"])
def test_features_that_are_cut(file: str, child: Any, unbroken: Pipeline, images: Any, cache: Path) -> None:
    expected = child(lambda: features(unbroken, images)).said
    path = next(cache.rglob(file))
    for size in (path.stat().st_size // 2, 0):
        path.write_bytes(path.read_bytes()[:size])
        assert child(lambda: features(unbroken, images)).said == expected
    path.unlink()
    assert child(lambda: features(unbroken, images)).said == expected


class Bright(Segmenter):
    """Where an image is brighter than its mean, and how many it has looked at: what is kept matters here, not what it is."""

    def __init__(self, parent: int = 0) -> None:
        self.looked, self.parent = 0, parent

    def __call__(self, pixels: NDArray[np.float32], view: str) -> Region:
        self.looked += 1
        if self.parent and os.getpid() != self.parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return Region(pixels > pixels.mean(), "computed", "")


def contours(images: Any, workers: int = 0, kill: bool = False) -> list[int]:
    """The regions' sums, and how many images were looked at; with `kill` those who look for this process are killed."""
    bright = Bright(os.getpid() if kill else 0)
    regions = Contours(SEGMENTERS.settings_of("classical")(name="classical"), bright).of(images, workers=workers)  # type: ignore[arg-type]
    return [round(1000 * float(torch.as_tensor(regions[name]).double().sum())) for name in regions] + [bright.looked]


@pytest.fixture
def chests(images: Any, tmp_path: Path) -> Any:
    """Six studies in a folder of their own."""
    import copy

    part = copy.copy(images.still(range(6)))
    root = tmp_path / "data"
    for names in part.images:
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(part.root / name, root / name)
    part.root = root
    part.reader = copy.copy(part.reader)
    part.reader.root = root
    return part


def test_contours_that_a_kill_has_left_half(child: Any, chests: Any) -> None:
    kept = chests.root / ".medxray"
    made = child(lambda: contours(chests), below=kept)
    assert made.how == "done" and made.operations >= 6 and made.said[-1] > 0
    assert child(lambda: contours(chests)).said == [*made.said[:-1], 0]
    for number in range(made.operations):
        shutil.rmtree(kept)
        assert child(lambda: contours(chests), below=kept, kill_at=number).how == "killed", number
        assert child(lambda: contours(chests)).said[:-1] == made.said[:-1], number
    shutil.rmtree(kept)
    assert child(lambda: contours(chests), largest=5000, kill_when_full=True).how == "killed"
    assert child(lambda: contours(chests)).said == made.said


def test_contours_without_room(child: Any, chests: Any) -> None:
    full = child(lambda: contours(chests), largest=5000)
    assert full.how == "RunError" and "File too large" in full.said and "MEDXRAY_CACHE" in full.said, full
    assert str(chests.root) in full.said
    assert child(lambda: contours(chests)).how == "done"


def test_damaged_contours_are_found_anew(child: Any, chests: Any) -> None:
    """One bit of a mask or of its list is another, or a file is cut."""
    expected = child(lambda: contours(chests)).said
    for kind in ("*.npy", "*.jsonl"):
        path = next((chests.root / ".medxray").rglob(kind))
        good = path.read_bytes()
        place = len(good) // 2
        for content in (good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :], good[:place], b""):
            path.write_bytes(content)
            assert child(lambda: contours(chests)).said == expected, (kind, len(content))
            for other in (chests.root / ".medxray").rglob("*.*"):
                if other.stem != path.stem:
                    other.unlink()
            path.write_bytes(good)


def test_a_process_that_looks_for_contours_is_killed(child: Any, chests: Any) -> None:
    ended = child(lambda: contours(chests, workers=1, kill=True), within=60)
    assert ended.how == "RunError" and "a process that reads images died" in ended.said and ended.seconds < 30, ended
    found = child(lambda: contours(chests)).said
    assert len(found) == found[-1] + 1 and all(found)


def test_a_changed_image_is_noticed_whatever_the_clock_says(child: Any, chests: Any) -> None:
    """Another image of the same size and name, with a time before the first one's: kept contours and features are not its."""
    expected = child(lambda: contours(chests)).said
    path = chests.root / chests.images[0][0]
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, (10**6, 10**6))
    again = child(lambda: contours(chests)).said
    assert again[-1] == 1 and np.array_equal(again[1:-1], expected[1:-1])
