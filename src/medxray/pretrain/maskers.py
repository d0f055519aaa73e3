"""Which tokens stay visible."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Generator, Tensor

from medxray.pretrain import Masker, Masking

Ratio = Annotated[float, Field(ge=0, lt=1)]


def kept_of(n: int, ratio: float) -> int:
    """n * (1 - ratio) rounded down, safe from binary fractions: 6,400 tokens at 0.9 keep 640, not 639."""
    return int(n * (1 - ratio) + 1e-6)


def uniform_noise(generator: Generator | Tensor | None, batch: int, n: int) -> Tensor:
    """(B, n) float32 in [0, 1): from a torch generator, or from (B,) int64 seeds, one stream a row.

    A seeded row is a counter run through splitmix64's mixing steps, so that its values depend on nothing else.
    """
    if not isinstance(generator, Tensor):
        device = generator.device if generator is not None else None
        return torch.rand(batch, n, generator=generator, device=device)
    counter = torch.arange(1, n + 1, device=generator.device)
    # int64 wraps round as the unsigned numbers of the method do.
    state = _mix(generator[:, None] + _signed(0x9E3779B97F4A7C15) * counter)
    return (_mix(state) >> 40 & 0xFFFFFF).float() / 2**24


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical shift right of int64."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def masking_from_order(order: Tensor, kept: int) -> Masking:
    """order (B, N), a permutation of positions with the visible ones first."""
    restore = order.argsort(dim=1)
    return Masking(order[:, :kept], restore, (restore >= kept).float())


class RandomMasker(Masker):
    """The same share of tokens anywhere (MAE).

    Args:
        ratio: share of the tokens that is masked.
    """

    def __init__(self, ratio: Ratio = 0.75) -> None:
        if not 0 <= ratio < 1:
            raise ValueError(f"ratio must be in [0, 1), found {ratio}")
        self.ratio = ratio

    def choose(self, noise: Tensor, grid: tuple[int, int], regions: Tensor | None = None) -> Masking:
        """The tokens of smallest noise (B, N) stay visible; at least one does."""
        return masking_from_order(noise.argsort(dim=1, stable=True), max(1, kept_of(noise.shape[1], self.ratio)))

    def __call__(
        self, regions: Tensor | None, batch: int, grid: tuple[int, int], generator: Generator | Tensor | None
    ) -> Masking:
        return self.choose(uniform_noise(generator, batch, grid[0] * grid[1]), grid, regions)


class RectangleMasker(Masker):
    """One fixed rectangle for every image, masked more than the rest (the HD X-ray MAE's release).

    Rows int(0.25 h) + 1 to int(0.75 h) and columns int(0.125 w) + 1 to int(0.75 w), both inclusive. The order of
    tokens is kept outer, kept inner, dropped outer, dropped inner.

    Args:
        inner: share masked inside the rectangle.
        outer: share masked outside.
    """

    def __init__(self, inner: Ratio = 0.95, outer: Ratio = 0.85) -> None:
        for name, ratio in (("inner", inner), ("outer", outer)):
            if not 0 <= ratio < 1:
                raise ValueError(f"{name} must be in [0, 1), found {ratio}")
        self.inner, self.outer = inner, outer

    def inside(self, grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
        """(N,) bool, True in the rectangle."""
        h, w = grid
        rows = torch.arange(h, device=device)
        columns = torch.arange(w, device=device)
        inner_rows = (rows > int(0.25 * h)) & (rows <= int(0.75 * h))
        inner_columns = (columns > int(0.125 * w)) & (columns <= int(0.75 * w))
        return (inner_rows[:, None] & inner_columns[None]).flatten()

    def choose(self, noise: Tensor, grid: tuple[int, int], regions: Tensor | None = None) -> Masking:
        """In each region the tokens of smallest noise (B, N) stay visible; at least one of all does."""
        inside = self.inside(grid, noise.device)
        order = noise.argsort(dim=1, stable=True)
        # A stable sort by region keeps the order of the noise within each.
        regional = inside[order].long().argsort(dim=1, stable=True)
        order = order.gather(1, regional)
        inner = _count_inside(grid)
        outer = noise.shape[1] - inner
        kept_outer, kept_inner = kept_of(outer, self.outer), kept_of(inner, self.inner)
        if kept_outer + kept_inner == 0:
            kept_outer, kept_inner = (1, 0) if outer else (0, 1)
        o, i = order[:, :outer], order[:, outer:]
        parts = [o[:, :kept_outer], i[:, :kept_inner], o[:, kept_outer:], i[:, kept_inner:]]
        return masking_from_order(torch.cat(parts, dim=1), kept_outer + kept_inner)

    def __call__(
        self, regions: Tensor | None, batch: int, grid: tuple[int, int], generator: Generator | Tensor | None
    ) -> Masking:
        return self.choose(uniform_noise(generator, batch, grid[0] * grid[1]), grid, regions)


def _count_inside(grid: tuple[int, int]) -> int:
    """Tokens in the rectangle, counted without asking the device."""
    h, w = grid
    return (int(0.75 * h) - int(0.25 * h)) * (int(0.75 * w) - int(0.125 * w))
