"""Attention of words to image regions as sheets of small maps."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from medxray.types import MedxrayError

ACROSS, EDGE = 16, 2
"""Maps in a row of a sheet, and tokens around each that repeat its border, so that enlarged neighbours do not mix."""
LARGEST = 16
"""Regions a side that are kept of a map; finer ones are averaged."""

_LEAST = 4.0
"""The strongest colour stands for at least so many times the average region, so that an even map has no colour."""
_LEVELS = 32
# From nothing over violet and red to yellow: level, red, green, blue, opacity.
_RAMP = np.array([[0, 90, 20, 130, 0], [0.35, 160, 30, 130, 90], [0.7, 235, 90, 60, 150], [1, 255, 225, 80, 185]])


def heat_sheet(
    maps: Sequence[np.ndarray], pointed: Sequence[int], name: str
) -> list[tuple[Image.Image, tuple[int, int], int]]:
    """A sheet for each image of a study: the mean map of some words first, then each word's own, `ACROSS` in a row.

    All sheets of a study have one scale: no colour where a region gets no more than its even share of a word's attention,
    the strongest for the largest but one per cent of the shares.

    Args:
        maps: for each image (words, h, w) shares of attention; a word's sum to one over the images.
        pointed: whose mean comes first; all words if empty.
        name: of the study, for messages.

    Returns:
        The picture with its palette and opacity, (h, w) of a map in it, and the number of rows.

    Raises:
        MedxrayError: a map is not (words, h, w).
    """
    for shares in maps:
        if shares.ndim != 3 or len(shares) != len(maps[0]):
            raise MedxrayError(
                f"{name}: attention of shape (words, h, w) was expected, one for each image; found {shares.shape}"
            )
    regions = sum(shares.shape[1] * shares.shape[2] for shares in maps)
    chosen = list(pointed) or list(range(len(maps[0])))
    times = [_coarse(np.concatenate([s[chosen].mean(0, keepdims=True), s]) * regions) for s in maps]
    top = max(_LEAST, float(np.quantile(np.concatenate([t.ravel() for t in times]), 0.99)))
    palette, opacity = _palette()
    sheets = []
    for each in times:
        levels = ((each - 1) / (top - 1)).clip(0, 1)
        tiles = np.pad((levels * (_LEVELS - 1)).round().astype(np.uint8), ((0, 0), (EDGE, EDGE), (EDGE, EDGE)), "edge")
        count, h, w = tiles.shape
        rows = -(-count // ACROSS)
        sheet = np.zeros((rows * ACROSS, h, w), np.uint8)
        sheet[:count] = tiles
        joined = sheet.reshape(rows, ACROSS, h, w).swapaxes(1, 2).reshape(rows * h, ACROSS * w)
        picture = Image.fromarray(joined, "L")
        picture.putpalette(palette)
        picture.info["transparency"] = opacity
        sheets.append((picture, (h - 2 * EDGE, w - 2 * EDGE), rows))
    return sheets


def _coarse(maps: np.ndarray) -> np.ndarray:
    """Maps (n, h, w) of at most `LARGEST` regions a side, as means."""
    maps = np.nan_to_num(maps.astype(np.float32))
    h, w = maps.shape[1:]
    size = min(w, LARGEST), min(h, LARGEST)
    if size == (w, h):
        return maps
    return np.stack([np.asarray(Image.fromarray(each).resize(size, Image.Resampling.BOX)) for each in maps])


def _palette() -> tuple[bytes, bytes]:
    """Colours and opacities of the levels."""
    at = np.linspace(0, 1, _LEVELS)
    stops = np.stack([np.interp(at, _RAMP[:, 0], _RAMP[:, i]) for i in range(1, 5)], axis=1).round().astype(np.uint8)
    return stops[:, :3].tobytes(), stops[:, 3].tobytes()
