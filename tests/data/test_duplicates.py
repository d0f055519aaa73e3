"""Copies: found whatever was done to the file, not confused with other chests, and without comparing all pairs."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medxray.data import read_image
from medxray.data.duplicates import COEFFICIENTS, MOST_PAIRS, RADIUS, coefficients, copies, correlate, hashes, near
from medxray.data.phantom import draw_study


def all_pairs(queries, table, radius) -> set[tuple[int, int]]:
    distance = np.bitwise_count(queries[:, None] ^ table[None])
    return {(i, j) for i, j in np.argwhere(distance <= radius).tolist() if i < j}


def found(queries, table, radius=RADIUS) -> list[tuple[int, int]]:
    return [pair for i, j in near(queries, table, radius) for pair in zip(i.tolist(), j.tolist(), strict=True)]


@pytest.mark.parametrize("radius", [1, 3, 9, 11])
def test_near_finds_what_comparing_all_finds_each_once(radius: int) -> None:
    rng = np.random.default_rng(radius)
    table = rng.integers(0, 2**64, 1500, dtype=np.uint64)
    # Hashes of few bits crowd in the same bands; copies lie at every distance.
    table[:300] &= rng.integers(0, 2**64, dtype=np.uint64) & np.uint64(0xFFFF00FF)
    for k in range(600):
        bits = rng.choice(64, k % 16, replace=False).astype(np.uint64)
        table[900 + k] = table[k] ^ np.bitwise_or.reduce(np.uint64(1) << bits, initial=np.uint64(0))
    pairs = found(table, table, radius)
    assert len(pairs) == len(set(pairs)) and set(pairs) == all_pairs(table, table, radius)
    assert set(found(~table, table, radius)) == all_pairs(~table, table, radius)


def test_near_of_few_and_of_equal() -> None:
    assert found(np.zeros(0, np.uint64), np.zeros(0, np.uint64)) == []
    assert found(np.zeros(1, np.uint64), np.zeros(1, np.uint64)) == []
    equal = np.full(50, 7, np.uint64)
    assert set(found(equal, equal)) == {(i, j) for i in range(50) for j in range(i + 1, 50)}


def test_a_set_that_is_too_large_to_compare() -> None:
    """50,000 hashes: 1.25 thousand million pairs."""
    rng = np.random.default_rng(0)
    table = rng.integers(0, 2**64, 50_000, dtype=np.uint64)
    first, second = rng.choice(50_000, (2, 300), replace=False)
    for k, (i, j) in enumerate(zip(first, second, strict=True)):
        bits = rng.choice(64, k % (RADIUS + 1), replace=False).astype(np.uint64)
        table[j] = table[i] ^ np.bitwise_or.reduce(np.uint64(1) << bits, initial=np.uint64(0))
    pairs = set(found(table, table))
    planted = {(min(i, j), max(i, j)) for i, j in zip(first.tolist(), second.tolist(), strict=True)}
    assert planted <= pairs and len(pairs) <= len(planted) + 10


@pytest.fixture(scope="module")
def chests() -> np.ndarray:
    """(32, 256, 256) in [0, 1]: sixteen patients, frontal and lateral."""
    drawn = [draw_study(5, index, 256, views=("PA", "LL")) for index in range(0, 32, 2)]
    return np.stack([image for study in drawn for image in study.images]).astype(np.float32) / 4095


def stack(images) -> np.ndarray:
    return np.stack([coefficients(np.ascontiguousarray(image, np.float32)[None]) for image in images])


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray((image * 255).round().astype(np.uint8)).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer), np.float32) / 255


def resized(image: np.ndarray, side: int) -> np.ndarray:
    small = Image.fromarray((image * 255).round().astype(np.uint8)).resize((side, side), Image.Resampling.LANCZOS)
    return np.asarray(small, np.float32) / 255


CHANGED = {
    "encoded anew": lambda image: jpeg(image, 40),
    "smaller": lambda image: resized(image, 100),
    "larger": lambda image: resized(image, 611),
    "brighter": lambda image: (image * 1.15).clip(0, 1),
    "less contrast": lambda image: 0.2 + 0.6 * image,
    "another curve": lambda image: image**0.8,
    "noise": lambda image: (image + np.random.default_rng(0).normal(0, 0.02, image.shape)).clip(0, 1),
    "all of it": lambda image: jpeg(resized((image * 1.1).clip(0, 1), 150), 75),
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_copy_is_found_whatever_was_done_to_it(change: str, chests: np.ndarray) -> None:
    n = len(chests)
    pairs = copies(np.concatenate([stack(chests), stack([CHANGED[change](image) for image in chests])]))
    assert pairs.first.tolist() == list(range(n)) and (pairs.second - pairs.first == n).all()
    assert (pairs.distance <= RADIUS).all() and (pairs.correlation > 0.93).all() and pairs.whole


def test_an_inverted_copy_is_one_of_negative_correlation(chests: np.ndarray) -> None:
    n = len(chests)
    both = np.concatenate([stack(chests), stack(1 - chests)])
    pairs = copies(both)
    assert (pairs.second - pairs.first == n).all() and len(pairs.first) == n
    assert (pairs.correlation < -0.999).all() and not pairs.distance.any()
    assert (np.bitwise_count(hashes(both[:n]) ^ hashes(both[n:])) == 64).all()


def test_other_chests_and_mirrored_ones_are_no_copies(chests: np.ndarray) -> None:
    alone, mirrored = copies(stack(chests)), copies(np.concatenate([stack(chests), stack(chests[:, :, ::-1])]))
    turned = copies(np.concatenate([stack(chests), stack(chests[:, ::-1])]))
    assert [len(pairs.first) for pairs in (alone, mirrored, turned)] == [0, 0, 0]


def test_flat_images_have_no_detail_and_no_copies(chests: np.ndarray) -> None:
    flat = [np.full((64, 64), gray, np.float32) for gray in (0, 0.3, 0.3, 1)]
    described = stack([*flat, chests[0], *flat])
    assert described.shape == (9, COEFFICIENTS) and not described[[0, 1, 2, 3, 5, 6, 7, 8]].any() and described[4].any()
    assert len(copies(described).first) == 0 and len(copies(described[:0]).first) == 0


def test_correlation_is_that_of_the_fine_detail(chests: np.ndarray) -> None:
    described = stack(chests)
    rows = np.arange(len(chests))
    assert np.allclose(correlate(described, rows, rows), 1, atol=2e-3)
    # Frontal views of two patients are alike in outline, and far from it here.
    assert correlate(described, rows[:-2:2], rows[2::2]).max() < 0.9


def test_copies_among_some_rows(chests: np.ndarray) -> None:
    both = np.concatenate([stack(chests), stack(chests)])
    n = len(chests)
    pairs = copies(both, np.array([1, 2, 5, n + 1, n + 4, n + 5]))
    assert list(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)) == [(1, n + 1), (5, n + 5)]


def test_a_search_without_end_is_ended(monkeypatch: pytest.MonkeyPatch, chests: np.ndarray) -> None:
    assert MOST_PAIRS == 1_000_000
    monkeypatch.setattr("medxray.data.duplicates.MOST_PAIRS", 100)
    pairs = copies(np.repeat(stack(chests[:1]), 60, 0))
    assert not pairs.whole and len(pairs.first) >= 100 and (pairs.correlation > 0.99).all()


def test_indiana_radiographs_are_told_apart(shared: Path) -> None:
    """A tenth of them, and the one study whose two files are the same."""
    folder = shared / "data" / "iu_xray" / "images"
    names = sorted(path.name for path in folder.iterdir())
    chosen = sorted({*names[::10], "CXR3245_IM-1537"})
    files = [file for name in chosen for file in sorted((folder / name).iterdir())]
    assert len(files) > 450
    pairs = copies(np.stack([coefficients(read_image(file, at_least=(128, 128))) for file in files]))
    names = [file.relative_to(folder).as_posix() for file in files]
    same = [(names[i], names[j]) for i, j in zip(pairs.first, pairs.second, strict=True)]
    assert same == [("CXR3245_IM-1537/0.jpg", "CXR3245_IM-1537/1.jpg")]
