"""Copies of a radiograph: the same picture stored anew, resized, re-encoded, brighter or inverted.

Chest radiographs look alike, so that the coarse shape says little. A picture is described by its cosine transform
from the ninth diagonal on: what is left once the outline of a chest is taken away.

* The signs of the 64 lowest such coefficients are a hash. They do not change with size, contrast or brightness, and an
  inverted image has the opposite ones.
* Pairs of hashes that differ in few bits are found without comparing all: 9 different bits in five bands leave one
  band with at most one (multi-index hashing, Norouzi et al., CVPR 2012).
* Of these pairs, the correlation over all kept coefficients decides.
"""

import itertools
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medxray.data.transforms import resize

SIDE, KEPT = 64, 32
"""Side of the picture that is transformed, and of the block of its coefficients that is kept."""
COEFFICIENTS = KEPT * KEPT
RADIUS, CORRELATION = 9, 0.93
"""Bits in which the hashes of copies differ at most; least correlation of copies.

A copy resized, saved as JPEG of quality 30, or made a fifth brighter stays above 0.94. Of the 11 million pairs of
Indiana's radiographs, all but its one true pair of copies stay below 0.9.
"""
MOST_PAIRS = 1_000_000
"""Pairs after which a search ends: a data set with more is made of copies."""

_FIRST = 8
_AT_A_TIME, _BLOCK = 1 << 21, 1 << 12

Coefficients = NDArray[np.float16]
Hashes = NDArray[np.uint64]


class Pairs(NamedTuple):
    """Pairs of copies, the smaller row first.

    Attributes:
        first, second: (n,) rows.
        distance: (n,) bits in which the hashes differ; of an inverted copy, with the opposite hash.
        correlation: (n,), negative for an inverted copy.
        whole: False where the search ended at `MOST_PAIRS`.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    distance: NDArray[np.int64]
    correlation: NDArray[np.float64]
    whole: bool


def coefficients(image: NDArray[np.float32]) -> Coefficients:
    """What an image (1, H, W) is compared by: (1024,), zeros where it has no detail.

    The first coefficients of the cosine transform of the picture stretched to 64 x 64, scaled so that the part that
    copies are compared by has norm 1.
    """
    picture = resize(image, SIDE)[0].numpy()
    rows = _cosines()
    block = (rows @ picture @ rows.T).reshape(-1)
    norm = float(np.linalg.norm(block[_fine()]))
    # A flat picture has rounding errors and no detail.
    return np.zeros(COEFFICIENTS, np.float16) if norm < 1e-3 else (block / norm).astype(np.float16)


def hashes(stack: Coefficients) -> Hashes:
    """(n, 1024) -> (n,), 64 bits each."""
    bits = np.ascontiguousarray(stack[:, _hashed()] > 0)
    return np.packbits(bits, axis=1, bitorder="little").view(np.uint64)[:, 0]


def near(queries: Hashes, table: Hashes, radius: int = RADIUS) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """All pairs i < j for which queries[i] and table[j] differ in at most `radius` bits, each once, in blocks.

    Args:
        queries, table: (n,) each.
        radius: of m bands one differs in at most one bit where that is at most 2 m - 1.
    """
    # Fewer bands would have more keys than a table should have places.
    masks = _bands(max(4, radius // 2 + 1))
    for number, (shift, width) in enumerate(masks):
        keys = ((table >> np.uint64(shift)) & np.uint64((1 << width) - 1)).astype(np.int64)
        order = np.argsort(keys, kind="stable")
        starts = np.searchsorted(keys[order], np.arange((1 << width) + 1))
        asked = ((queries >> np.uint64(shift)) & np.uint64((1 << width) - 1)).astype(np.int64)
        for flip in [0, *(1 << bit for bit in range(width))]:
            low = starts[asked ^ flip]
            ends = np.cumsum(starts[(asked ^ flip) + 1] - low)
            begin = 0
            while begin < len(queries):
                before = int(ends[begin - 1]) if begin else 0
                stop = max(begin + 1, int(np.searchsorted(ends, before + _AT_A_TIME, side="right")))
                counts = np.diff(ends[begin:stop], prepend=before)
                i = np.repeat(np.arange(begin, stop), counts)
                j = order[np.arange(len(i)) + np.repeat(low[begin:stop] - (ends[begin:stop] - counts - before), counts)]
                begin = stop
                ordered = i < j
                i, j = i[ordered], j[ordered]
                different = queries[i] ^ table[j]
                close = np.bitwise_count(different) <= radius
                i, j, different = i[close], j[close], different[close]
                fresh = np.ones(len(i), bool)
                for shift_, width_ in masks[:number]:
                    # An earlier band has found this pair.
                    mask = np.uint64(((1 << width_) - 1) << shift_)
                    fresh &= np.bitwise_count(different & mask) > 1
                if fresh.any():
                    yield i[fresh], j[fresh]


def copies(stack: Coefficients, among: NDArray[np.int64] | None = None) -> Pairs:
    """Pairs of rows that show the same picture.

    Args:
        stack: (n, 1024), in memory or mapped. Rows of zeros have no copies.
        among: (m,) the rows that are looked at, in order; all if None. Equal ones are best given once.
    """
    among = np.arange(len(stack)) if among is None else among
    signs, detailed = [np.zeros(0, np.uint64)], [np.zeros(0, bool)]
    for start in range(0, len(among), _BLOCK):
        block = stack[among[start : start + _BLOCK]]
        signs.append(hashes(block))
        detailed.append((block[:, _hashed()] != 0).any(1))
    kept = np.concatenate(detailed)
    rows, table = among[kept], np.concatenate(signs)[kept]
    found: list[tuple[NDArray[Any], ...]] = []
    count = 0
    for sign, asked in ((1, table), (-1, ~table)):
        for i, j in near(asked, table):
            first, second = rows[i], rows[j]
            correlation = correlate(stack, first, second)
            same = sign * correlation >= CORRELATION
            distance = np.bitwise_count(asked[i] ^ table[j]).astype(np.int64)
            found.append((first[same], second[same], distance[same], correlation[same]))
            count += int(same.sum())
            if count >= MOST_PAIRS:
                break
    if not count:
        none = np.zeros(0, np.int64)
        return Pairs(none, none, none, np.zeros(0), True)
    first, second, distance, correlation = (np.concatenate(part) for part in zip(*found, strict=True))
    order = np.lexsort((second, first))
    return Pairs(first[order], second[order], distance[order], correlation[order], count < MOST_PAIRS)


def correlate(stack: Coefficients, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.float64]:
    """(n,) correlations of the fine detail of rows `first` with that of rows `second`."""
    fine = _fine()
    parts = [np.zeros(0)]
    for start in range(0, len(first), _BLOCK):
        a, b = (stack[rows[start : start + _BLOCK]][:, fine].astype(np.float32) for rows in (first, second))
        parts.append(np.einsum("nd,nd->n", a, b).astype(np.float64))
    return np.concatenate(parts)


@lru_cache(maxsize=1)
def _cosines() -> NDArray[np.float32]:
    """(32, 64), the first rows of the orthonormal cosine transform."""
    frequency, place = np.mgrid[:KEPT, :SIDE]
    rows = np.sqrt(2 / SIDE) * np.cos(np.pi * frequency * (2 * place + 1) / (2 * SIDE))
    rows[0] /= np.sqrt(2)
    return rows.astype(np.float32)


@lru_cache(maxsize=1)
def _fine() -> NDArray[np.int64]:
    """Places of the kept coefficients that copies are compared by, the lowest first."""
    down, right = (axis.ravel() for axis in np.mgrid[:KEPT, :KEPT])
    order = np.lexsort((down, np.abs(down - right), down + right))
    return np.asarray(order[(down + right)[order] >= _FIRST])


@lru_cache(maxsize=1)
def _hashed() -> NDArray[np.int64]:
    """Places of the 64 hashed coefficients; neighbours, which change together, lie in different bands."""
    bands = RADIUS // 2 + 1
    return np.concatenate([_fine()[:64][start::bands] for start in range(bands)])


def _bands(count: int) -> list[tuple[int, int]]:
    """Shift and width of `count` parts of 64 bits."""
    edges = [64 * part // count for part in range(count + 1)]
    return [(low, high - low) for low, high in itertools.pairwise(edges)]
