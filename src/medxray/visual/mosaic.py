"""Pictures of studies in rows and of what a model makes of them in columns, as one image."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from medxray import disk

Picture = NDArray[np.float32]
"""(H, W) gray or (H, W, 3) RGB, float32 in [0, 1]."""

CELL = 224
PAPER, INK, SOFT = (255, 255, 255), (28, 27, 25), (102, 99, 92)
MASKED: Picture = np.array([0.42, 0.51, 0.62], np.float32)
OUTLINE: Picture = np.array([1.0, 0.62, 0.11], np.float32)
_MARGIN, _GAP, _NAMES = 18, 8, 132
_LIMITS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)


@dataclass
class Row:
    """One study.

    Attributes:
        name: stands at the left.
        cells: a picture a column, of one shape all; None leaves a place empty.
        note: stands under the name.
    """

    name: str
    cells: list[Picture | None]
    note: str = ""


@dataclass
class Scale:
    """A colour bar under a column.

    Attributes:
        column: which one.
        low, high: what stands at its ends.
    """

    column: int
    low: str
    high: str


def mosaic(
    rows: Sequence[Row], columns: Sequence[str], title: str = "", scales: Sequence[Scale] = (), notes: Sequence[str] = ()
) -> Image.Image:
    """Rows of cells, captions above them, colour bars and notes below."""
    h, w = next(cell.shape[:2] for row in rows for cell in row.cells if cell is not None)
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    left, top = _MARGIN + _NAMES, _MARGIN + 28
    pitch = _GAP + max(w, *(round(font.getlength(column)) for column in columns))
    width = left + len(columns) * pitch - _GAP + _MARGIN
    told = [line for note in notes for line in _wrapped(note, small, width - left - _MARGIN)]
    below = top + len(rows) * (h + _GAP) + 4
    height = below + (38 if scales else 0) + 19 * len(told) + _MARGIN - 6
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN + 14), title, INK, font, anchor="lm")
    for i, column in enumerate(columns):
        draw.text((left + i * pitch, _MARGIN + 14), column, INK, font, anchor="lm")
    for j, row in enumerate(rows):
        y = top + j * (h + _GAP)
        lines = _wrapped(row.name, font, _NAMES - 12)[: max(1, (h - 22) // 19)]
        for k, line in enumerate(lines):
            draw.text((_MARGIN, y + 19 * k), line, INK, font)
        draw.text((_MARGIN, y + 19 * len(lines) + 2), row.note, SOFT, small)
        for i, cell in enumerate(row.cells):
            if cell is not None:
                sheet.paste(_image(cell), (left + i * pitch, y))
    for scale in scales:
        x = left + scale.column * pitch
        sheet.paste(_image(np.repeat(colours(np.linspace(0, 1, w, dtype=np.float32))[None], 10, 0)), (x, below))
        draw.text((x, below + 13), scale.low, SOFT, small)
        draw.text((x + w, below + 13), scale.high, SOFT, small, anchor="ra")
    for k, line in enumerate(told):
        draw.text((left, below + (38 if scales else 0) + 19 * k), line, SOFT, small)
    return sheet


def save(sheet: Image.Image, path: Path) -> Path:
    """Writes a PNG: the old file or the new one stays, never half of one.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk.replacing(path) as staged:
        sheet.save(staged, "PNG")
    return path


def fitted(picture: Picture, side: int = CELL) -> Picture:
    """A picture whose longer side is `side` pixels, smoothed as it shrinks."""
    h, w = picture.shape[:2]
    size = max(1, round(h * side / max(h, w))), max(1, round(w * side / max(h, w)))
    if size == (h, w):
        return picture
    maps = torch.from_numpy(np.ascontiguousarray(picture, dtype=np.float32)).reshape(1, h, w, -1).permute(0, 3, 1, 2)
    mode = "area" if h > 2 * size[0] else "bicubic"
    small = F.interpolate(maps, size, mode=mode, **({} if mode == "area" else {"antialias": True}))
    return small.clamp(0, 1)[0].permute(1, 2, 0).numpy().reshape(*size, *picture.shape[2:])


def hidden(picture: Picture, mask: NDArray[np.float32]) -> Picture:
    """A picture (H, W) with its masked tokens, 1 in `mask` (h, w), under a flat tint that no gray is mistaken for."""
    over = _spread(mask, picture.shape[:2])[..., None] > 0.5
    made: Picture = np.where(over, MASKED, _rgb(picture)).astype(np.float32)
    return made


def outlined(picture: Picture, region: NDArray[np.float32], thick: float = 1.6) -> Picture:
    """A picture with the line round what a region (h, w) in [0, 1] covers by half or more.

    Drawn `thick` pixels wide: to be called on a picture of the size that is shown.
    """
    size = picture.shape[:2]
    smooth = F.interpolate(torch.from_numpy(region.astype(np.float32))[None, None], size, mode="bilinear")[0, 0]
    y, x = torch.gradient(smooth)
    # The distance from the line in pixels, to first order.
    distance = (smooth - 0.5).abs() / (x.square() + y.square()).sqrt().clamp(min=1e-4)
    line = (thick / 2 + 0.5 - distance).clamp(0, 1)[..., None].numpy()
    made: Picture = (_rgb(picture) * (1 - line) + OUTLINE * line).astype(np.float32)
    return made


def heated(picture: Picture, values: NDArray[np.float32]) -> Picture:
    """A darkened picture (H, W) coloured by `values` (h, w) in [0, 1], the less the smaller they are."""
    over = _spread(values, picture.shape[:2], smooth=True).clip(0, 1)
    share, gray = (1.5 * over).clip(0, 0.9)[..., None], _rgb(picture)
    made: Picture = (0.7 * gray * (1 - share) + colours(over) * (0.4 + 0.6 * gray) * share).astype(np.float32)
    return made


def limit_of(values: Sequence[NDArray[np.float32]], share: float = 0.98) -> float:
    """A round number that `share` of all values stay under: the end of a common scale, which seldom changes."""
    found = max(float(np.quantile(v, share)) for v in values)
    return next((limit for limit in _LIMITS if found <= limit), 1.0)


def colours(values: NDArray[np.float32]) -> Picture:
    """Values (...) in [0, 1] -> (..., 3): from near black over violet and orange to pale yellow, in steps of equal
    lightness."""
    rgb: Picture = _ramp()[(values.clip(0, 1) * 255).round().astype(np.int64)]
    return rgb


def principal_colours(tokens: Tensor, grid: tuple[int, int]) -> NDArray[np.float32]:
    """The first three principal components of all tokens as red, green and blue.

    Args:
        tokens: (n, N, D) of n images, N = h * w.
        grid: (h, w).

    Returns:
        (n, h, w, 3) in [0, 1], each component between its 1st and 99th percentile; its sign is such that the largest
        weight is positive.
    """
    flat = tokens.detach().flatten(0, 1).float()
    flat = flat - flat.mean(0)
    axes = torch.linalg.eigh(flat.T @ flat).eigenvectors.flip(1)[:, :3]
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    places = (flat @ axes).cpu().numpy()
    low, high = np.quantile(places, [0.01, 0.99], axis=0).astype(np.float32)
    shown = ((places - low) / np.maximum(high - low, 1e-6)).clip(0, 1)
    shown = np.pad(shown, ((0, 0), (0, 3 - shown.shape[1])))
    made: NDArray[np.float32] = shown.reshape(len(tokens), *grid, 3).astype(np.float32)
    return made


def blocks(cells: NDArray[np.float32], size: tuple[int, int]) -> Picture:
    """A picture of few cells (h, w) or (h, w, 3) at `size`, each a sharp block."""
    return _spread(cells, size)


def _spread(values: NDArray[np.float32], size: tuple[int, int], smooth: bool = False) -> NDArray[np.float32]:
    """(h, w, ...) -> (H, W, ...)."""
    h, w = values.shape[:2]
    maps = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).reshape(1, h, w, -1).permute(0, 3, 1, 2)
    made = F.interpolate(maps, size, mode="bilinear" if smooth else "nearest-exact")
    return made[0].permute(1, 2, 0).numpy().reshape(*size, *values.shape[2:])


def _rgb(picture: Picture) -> Picture:
    return picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, 2)


def _image(picture: Picture) -> Image.Image:
    return Image.fromarray((_rgb(picture).clip(0, 1) * 255).round().astype(np.uint8))


@lru_cache(maxsize=1)
def _ramp() -> Picture:
    """256 colours whose lightness rises evenly in OKLab (Ottosson, "A perceptual color space", 2020)."""
    t = np.linspace(0, 1, 256)
    lightness = 0.13 + 0.84 * t
    hue = np.deg2rad(285 + 180 * t)
    chroma = 0.03 + 0.17 * np.sin(np.pi * t**0.9) ** 0.9
    a, b = chroma * np.cos(hue), chroma * np.sin(hue)
    lms = (
        np.stack(
            [
                lightness + 0.3963377774 * a + 0.2158037573 * b,
                lightness - 0.1055613458 * a - 0.0638541728 * b,
                lightness - 0.0894841775 * a - 1.2914855480 * b,
            ]
        )
        ** 3
    )
    linear = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    ) @ lms
    linear = linear.clip(0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    ramp: Picture = srgb.T.astype(np.float32)
    return ramp


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines that fit, broken at spaces or, where there is none, anywhere."""
    lines, rest = [], text
    while rest and font.getlength(rest) > width:
        fits = next((i for i in range(len(rest), 1, -1) if font.getlength(rest[:i]) <= width), 1)
        space = rest.rfind(" ", 1, fits + 1)
        cut = space if space > 0 else fits
        lines.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    return [*lines, rest] if rest or not lines else lines
