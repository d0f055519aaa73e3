"""From a radiograph of any size to what an encoder takes. Nothing here ever flips an image: left and right
are part of the report."""

import math
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
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
    scale = min(h / pixels.shape[1], w / pixels.shape[2])
    inner_h, inner_w = (max(1, round(scale * side)) for side in pixels.shape[1:])
    padded = torch.zeros(1, h, w)
    top, left = (h - inner_h) // 2, (w - inner_w) // 2
    padded[:, top : top + inner_h, left : left + inner_w] = _interpolate(pixels, inner_h, inner_w)
    return padded


def _interpolate(pixels: Tensor, h: int, w: int) -> Tensor:
    if pixels.shape[1:] == (h, w):
        return pixels
    small = F.interpolate(pixels[None], (h, w), mode="bilinear", antialias=True, align_corners=False)[0]
    # The weights of a pixel sum to 1 only to an ulp.
    return small.clamp_(0, 1)


def random_crop_box(seed: int, crop: float) -> Box:
    """A box of the image's own aspect ratio, at a random place, that keeps at least `crop` of the area.

    Args:
        seed: decides everything.
        crop: smallest share of the area, in (0, 1].
    """
    area, down, right = np.random.default_rng(seed).random(3)
    side = math.sqrt(crop + (1 - crop) * area)
    return Box(down * (1 - side), right * (1 - side), side, side)


def cut(image: Image, box: Box) -> Image:
    """The part of (1, H, W) that a box covers, to the nearest pixel, at least one."""
    _, H, W = image.shape
    top, left = round(box.top * H), round(box.left * W)
    height, width = max(1, round(box.height * H)), max(1, round(box.width * W))
    top, left = min(top, H - height), min(left, W - width)
    return image[:, top : top + height, left : left + width]


def normalise(pixels: Tensor, channels: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(1, h, w) in [0, 1] -> (channels, h, w), gray repeated, less `mean`, over `std` (one or C numbers)."""
    shift, scale = (torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1) for numbers in (mean, std))
    return ((pixels - shift) / scale).expand(channels, -1, -1)
