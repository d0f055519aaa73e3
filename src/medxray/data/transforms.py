"""From a radiograph of any size to what an encoder takes. Nothing here ever flips an image: left and right
are part of the report."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from torch import Tensor

Image = NDArray[np.float32] | Tensor


class Box(NamedTuple):
    """A part of an image, in shares of its height and width."""

    top: float
    left: float
    height: float
    width: float


def height_width(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """`data.image_size` as (h, w)."""
    h, w = (size, size) if isinstance(size, int) else size
    return h, w


def resize(image: Image, size: int | list[int] | tuple[int, int], fit: Literal["stretch", "pad"] = "stretch") -> Tensor:
    """Bilinear with antialiasing, in float32.

    Args:
        image: (1, H, W) in [0, 1].
        size: side, or (h, w).
        fit: "stretch" fills the size; "pad" keeps the aspect ratio and centres the image on black.

    Returns:
        (1, h, w) float32.
    """
    pixels = torch.as_tensor(image, dtype=torch.float32)
    h, w = height_width(size)
    if fit == "stretch":
        return _interpolate(pixels, h, w)
    top, left, inner_h, inner_w = _inside(pixels.shape[1:], (h, w), fit)
    padded = torch.zeros(1, h, w)
    padded[:, top : top + inner_h, left : left + inner_w] = _interpolate(pixels, inner_h, inner_w)
    return padded


def _inside(shape: Sequence[int], size: tuple[int, int], fit: str) -> tuple[int, int, int, int]:
    """Top, left, height and width, in the result, of an image (H, W) that is made `size`."""
    (h, w), scale = size, min(size[0] / shape[0], size[1] / shape[1])
    if fit == "stretch":
        return 0, 0, h, w
    inner_h, inner_w = (max(1, round(scale * side)) for side in shape)
    return (h - inner_h) // 2, (w - inner_w) // 2, inner_h, inner_w


def _interpolate(pixels: Tensor, h: int, w: int) -> Tensor:
    if pixels.shape[1:] == (h, w):
        return pixels
    if h < pixels.shape[1]:
        # The same sums, rows first: as a sparse product they take a third of the time.
        pixels = torch.from_numpy(_row_weights(pixels.shape[1], h) @ pixels[0].numpy())[None]
    small = F.interpolate(pixels[None], (h, w), mode="bilinear", antialias=True, align_corners=False)[0]
    # The weights of a pixel sum to 1 only to an ulp.
    return small.clamp_(0, 1)


@lru_cache(64)
def _row_weights(H: int, h: int) -> csr_matrix:
    """(h, H): what each row of the smaller image takes of those of the larger, in float32 as torch reckons."""
    f = np.float32
    scale = f(H) / f(h)
    centres = scale * (np.arange(h, dtype=f) + f(0.5))
    first = np.maximum((centres - scale + f(0.5)).astype(np.int64), 0)
    last = np.minimum((centres + scale + f(0.5)).astype(np.int64), H)
    rows = first[:, None] + np.arange((last - first).max())
    weights = np.maximum(0, 1 - np.abs((rows.astype(f) - centres[:, None] + f(0.5)) / scale))
    weights[rows >= last[:, None]] = 0
    weights /= weights.sum(1, keepdims=True)
    ends = np.arange(0, rows.size + 1, rows.shape[1])
    return csr_matrix((weights.ravel(), np.minimum(rows, H - 1).ravel(), ends), shape=(h, H))


def random_crop_box(seed: int, crop: float, most: float = 1.0) -> Box:
    """A box of the image's own aspect ratio, at a random place, that keeps `crop` to `most` of the area.

    Args:
        seed: decides everything.
        crop: smallest share of the area, in (0, 1].
        most: the largest.
    """
    area, down, right = np.random.default_rng(seed).random(3)
    side = math.sqrt(crop + (most - crop) * area)
    return Box(down * (1 - side), right * (1 - side), side, side)


def cut(image: Image, box: Box) -> Image:
    """The part of (1, H, W) that a box covers, to the nearest pixel, at least one."""
    top, left, height, width = _bounds(box, *image.shape[1:])
    return image[:, top : top + height, left : left + width]


def _bounds(box: Box, H: int, W: int) -> tuple[int, int, int, int]:
    """A box as pixels of an image (H, W): top, left, height, width."""
    top, left = round(box.top * H), round(box.left * W)
    height, width = max(1, round(box.height * H)), max(1, round(box.width * W))
    return min(top, H - height), min(left, W - width), height, width


def cover(
    region: Tensor,
    grid: tuple[int, int],
    shape: tuple[int, int],
    size: int | list[int] | tuple[int, int],
    fit: Literal["stretch", "pad"] = "stretch",
    box: Box | None = None,
) -> Tensor:
    """How much of each token a region covers, once its image was cut and resized: exact means over areas.

    Args:
        region: (s, t) coverage of the whole image, in [0, 1].
        grid: (h, w) tokens of the resized image.
        shape: (H, W) of the image before it was cut.
        size, fit: as the image was resized; padding counts 0.
        box: as it was cut.

    Returns:
        (h, w) float32 in [0, 1].
    """
    top, left, height, width = (0, 0, *shape) if box is None else _bounds(box, *shape)
    outer = height_width(size)
    y, x, inner_h, inner_w = _inside((height, width), outer, fit)
    rows = _shares(grid[0], outer[0], y, inner_h, top / shape[0], height / shape[0], region.shape[0])
    columns = _shares(grid[1], outer[1], x, inner_w, left / shape[1], width / shape[1], region.shape[1])
    return (rows @ region.double() @ columns.T).float()


def _shares(
    tokens: int, outer: int, start: int, inner: int, cut_start: float, cut_length: float, cells: int
) -> Tensor:
    """(tokens, cells) float64, along one axis: the share of each token that lies on each cell of the whole image."""
    edges = (torch.arange(tokens + 1, dtype=torch.float64) * outer / tokens - start) / inner
    whole = (edges[1:] - edges[:-1]) * cut_length
    edges = cut_start + edges.clamp(0, 1) * cut_length
    cell = torch.arange(cells, dtype=torch.float64) / cells
    overlap = torch.minimum(edges[1:, None], cell + 1 / cells) - torch.maximum(edges[:-1, None], cell)
    return overlap.clamp(min=0) / whole[:, None]


def normalise(pixels: Tensor, channels: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(1, h, w) in [0, 1] -> (channels, h, w), gray repeated, less `mean`, over `std` (one or C numbers)."""
    shift, scale = (torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1) for numbers in (mean, std))
    return ((pixels - shift) / scale).expand(channels, -1, -1)
