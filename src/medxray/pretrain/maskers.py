"""Which tokens stay visible."""

import math
from abc import abstractmethod
from typing import Annotated

import torch
from pydantic import Field
from torch import Generator, Tensor
from torch.nn import functional as F

from medxray.pretrain import Masker, Masking

Ratio = Annotated[float, Field(ge=0, lt=1)]
Unit = Annotated[int, Field(gt=0)]


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


class RankedMasker(Masker):
    """Keeps the tokens of lowest rank, an exact number whatever the grid; a masker of this kind says how tokens rank."""

    def __init__(self, ratio: Ratio = 0.75, mask_unit: Unit = 1) -> None:
        """Args:
        ratio: share of the tokens that is masked.
        mask_unit: tokens a side that share one rank, so that no single token stays visible among masked ones; units at
            the far edges may be cut, and one unit is taken in part where the number asks for it.
        """
        if not 0 <= ratio < 1:
            raise ValueError(f"ratio must be in [0, 1), found {ratio}")
        if mask_unit < 1:
            raise ValueError(f"mask_unit must be at least 1, found {mask_unit}")
        self.ratio, self.mask_unit = ratio, mask_unit

    def numbers(self, grid: tuple[int, int]) -> int:
        """How many numbers of noise an image needs for a grid of units."""
        return grid[0] * grid[1]

    @abstractmethod
    def rank(self, noise: Tensor, grid: tuple[int, int]) -> Tensor:
        """noise (B, numbers) in [0, 1) -> (B, h, w), low where a unit should stay visible."""

    def rank_in(self, regions: Tensor | None, noise: Tensor, grid: tuple[int, int]) -> Tensor:
        """As `rank`, for maskers that look at the chest's coverage of each unit (B, h, w)."""
        return self.rank(noise, grid)

    def choose(self, noise: Tensor, grid: tuple[int, int], regions: Tensor | None = None) -> Masking:
        """The masking that noise (B, numbers) stands for; at least one token stays visible."""
        (h, w), unit = grid, self.mask_unit
        if regions is not None and unit > 1:
            # Units at the far edges are means over what the grid has of them.
            regions = F.avg_pool2d(regions[:, None], unit, ceil_mode=True, count_include_pad=False)[:, 0]
        ranks = self.rank_in(regions, noise, _units(grid, unit))
        ranks = ranks.repeat_interleave(unit, 1).repeat_interleave(unit, 2)[:, :h, :w]
        order = ranks.flatten(1).argsort(dim=1, stable=True)
        return masking_from_order(order, self.kept(h * w))

    def kept(self, n: int) -> int:
        """How many of n tokens stay visible."""
        return max(1, kept_of(n, self.ratio))

    def __call__(
        self, regions: Tensor | None, batch: int, grid: tuple[int, int], generator: Generator | Tensor | None
    ) -> Masking:
        noise = uniform_noise(generator, batch, self.numbers(_units(grid, self.mask_unit)))
        return self.choose(noise, grid, regions.to(noise.device) if regions is not None else None)


def _units(grid: tuple[int, int], unit: int) -> tuple[int, int]:
    return -(-grid[0] // unit), -(-grid[1] // unit)


class RandomMasker(RankedMasker):
    """The same share of tokens anywhere (MAE)."""

    def rank(self, noise: Tensor, grid: tuple[int, int]) -> Tensor:
        return noise.unflatten(1, grid)


class GridMasker(RankedMasker):
    """Visible units stand on a lattice, whose period goes by the ratio and whose place is drawn for each image (He et al.,
    figure 6); what the exact number wants beyond the lattice, or leaves of it, is drawn at random."""

    def numbers(self, grid: tuple[int, int]) -> int:
        return 2 + grid[0] * grid[1]

    def rank(self, noise: Tensor, grid: tuple[int, int]) -> Tensor:
        period = max(1, round((1 - self.ratio) ** -0.5))
        start = (noise[:, :2] * period).long()
        rows, columns = (
            (torch.arange(side, device=noise.device) - start[:, i, None]) % period == 0 for i, side in enumerate(grid)
        )
        return noise[:, 2:].unflatten(1, grid) + ~(rows[:, :, None] & columns[:, None])


class BlockMasker(RankedMasker):
    """Masked units form rectangles, drawn until enough are covered (BEiT, arXiv:2106.08254); the last may be cut.

    Args:
        ratio: share of the tokens that is masked.
        mask_unit: tokens a side that share one rank.
        block: share of the image that one rectangle covers; its sides have a ratio of 0.3 to 3.3.
    """

    def __init__(
        self, ratio: Ratio = 0.75, mask_unit: Unit = 1, block: Annotated[float, Field(gt=0, le=1)] = 0.1
    ) -> None:
        super().__init__(ratio, mask_unit)
        if not 0 < block <= 1:
            raise ValueError(f"block must be in (0, 1], found {block}")
        self.block = block

    def _blocks(self) -> int:
        """So many that they cover more than the ratio, some over others or over the edge."""
        return 4 + math.ceil(2 * math.log(1 - min(self.ratio, 0.99)) / math.log(1 - min(self.block, 0.9)))

    def numbers(self, grid: tuple[int, int]) -> int:
        return 3 * self._blocks() + grid[0] * grid[1]

    def rank(self, noise: Tensor, grid: tuple[int, int]) -> Tensor:
        (h, w), count = grid, self._blocks()
        shape, place = noise[:, :count], noise[:, count : 3 * count].unflatten(1, (2, count))
        tall = (0.3 ** (1 - 2 * shape) * self.block) ** 0.5
        inside = []
        for i, (side, extent) in enumerate(zip(grid, (tall, self.block / tall), strict=True)):
            size = (extent * side).round().clamp(1, side)
            # From over the edge on, so that every place is covered as often.
            start = (place[:, i] * (side + size - 1)).floor() - size + 1
            at = torch.arange(side, device=noise.device)
            inside.append((at >= start[..., None]) & (at < (start + size)[..., None]))
        covered = inside[0][..., :, None] & inside[1][..., None, :]
        # The first rectangle over a unit decides: what is covered early is masked first, and the last one from below.
        first = torch.where(covered.any(1), covered.int().argmax(1), count)
        row_by_row = torch.arange(h * w, device=noise.device).view(h, w) / (h * w)
        return torch.where(first == count, noise[:, 3 * count :].unflatten(1, grid), count - first + row_by_row)


class FilteredNoiseMasker(RankedMasker):
    """Noise without its finest and its coarse parts, so that visible tokens form small clusters, spread more evenly than
    at random: the "green" noise of ColorMAE (arXiv:2407.13036), as the difference of two Gaussian blurs.

    Args:
        ratio: share of the tokens that is masked.
        mask_unit: tokens a side that share one rank.
        fine: deviation, in units, of the blur that takes out what is finer.
        coarse: of the blur whose result is taken off, more than `fine`.
    """

    def __init__(
        self,
        ratio: Ratio = 0.75,
        mask_unit: Unit = 1,
        fine: Annotated[float, Field(ge=0)] = 0.5,
        coarse: Annotated[float, Field(gt=0)] = 1.5,
    ) -> None:
        super().__init__(ratio, mask_unit)
        if not 0 <= fine < coarse:
            raise ValueError(f"fine must be at least 0 and less than coarse, found {fine} and {coarse}")
        self.fine, self.coarse = fine, coarse

    def rank(self, noise: Tensor, grid: tuple[int, int]) -> Tensor:
        h, w = grid
        rows, columns = torch.fft.fftfreq(h, device=noise.device), torch.fft.rfftfreq(w, device=noise.device)
        turns = -2 * math.pi**2 * (rows[:, None] ** 2 + columns[None] ** 2)
        band = torch.exp(turns * self.fine**2) - torch.exp(turns * self.coarse**2)
        return torch.fft.irfft2(torch.fft.rfft2(noise.unflatten(1, grid)) * band, s=grid)


class ContourMasker(RankedMasker):
    """The chest is masked more than the rest, by its contour in each image; the count is exact and the same for all, so
    that batches keep their shape.

    A token that the chest covers to c has the weight w = c (1 - inner) + (1 - c) (1 - outer); those with the largest
    log w + Gumbel noise stay visible, which draws them without replacement in proportion to w. The paper's two ratios
    (arXiv:2404.17926) are so met on average where the chest covers what `ratio` stands for.

    Args:
        inner: share masked inside the chest.
        outer: share masked outside.
        ratio: share of all tokens that is masked; what the two give where the chest is two fifths of the image if null.
        mask_unit: tokens a side that share one rank.
    """

    regional = True

    def __init__(
        self, inner: Ratio = 0.95, outer: Ratio = 0.85, ratio: Ratio | None = None, mask_unit: Unit = 1
    ) -> None:
        for name, share in (("inner", inner), ("outer", outer)):
            if not 0 <= share < 1:
                raise ValueError(f"{name} must be in [0, 1), found {share}")
        super().__init__(0.4 * inner + 0.6 * outer if ratio is None else ratio, mask_unit)
        self.inner, self.outer = inner, outer

    def kept(self, n: int) -> int:
        return max(1, round(n * (1 - self.ratio)))

    def weights(self, coverage: Tensor) -> Tensor:
        """Coverage by the chest in [0, 1] -> weight of staying visible, of the same shape."""
        return coverage * (1 - self.inner) + (1 - coverage) * (1 - self.outer)

    def rank(self, noise: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.rank_in(None, noise, grid)

    def rank_in(self, regions: Tensor | None, noise: Tensor, grid: tuple[int, int]) -> Tensor:
        if regions is None:
            regions = release_rectangle(grid, noise.device).float()
        # Exponential noise over the weight has the order of the negative of log w + Gumbel.
        return -noise.clamp(min=2**-25).unflatten(1, grid).log() / self.weights(regions)


class CurriculumMasker(ContourMasker):
    """Random at first, by the contour at last: weights go from equal ones to those of `contour` over the training.

    Args:
        inner: share masked inside the chest at last.
        outer: share masked outside at last.
        ratio: share of all tokens that is masked throughout; as for `contour` if null.
        mask_unit: tokens a side that share one rank.
        begin: share of the training up to which masks are random.
        end: share of it from which they are those of `contour`, as they are in evaluation.
    """

    def __init__(
        self,
        inner: Ratio = 0.95,
        outer: Ratio = 0.85,
        ratio: Ratio | None = None,
        mask_unit: Unit = 1,
        begin: Annotated[float, Field(ge=0, le=1)] = 0.0,
        end: Annotated[float, Field(ge=0, le=1)] = 0.5,
    ) -> None:
        super().__init__(inner, outer, ratio, mask_unit)
        if not 0 <= begin <= end <= 1:
            raise ValueError(f"begin and end must be in [0, 1] and in this order, found {begin} and {end}")
        self.begin, self.end = begin, end

    def weights(self, coverage: Tensor) -> Tensor:
        done = (self.progress - self.begin) / max(self.end - self.begin, 1e-9)
        share = min(1.0, max(0.0, done)) if self.progress < self.end else 1.0
        return share * super().weights(coverage) + (1 - share) * (1 - self.ratio)


class RectangleMasker(Masker):
    """One fixed rectangle for every image, masked more than the rest (the HD X-ray MAE's release): `release_rectangle`.

    The order of tokens is kept outer, kept inner, dropped outer, dropped inner.

    Args:
        inner: share masked inside the rectangle.
        outer: share masked outside.
    """

    def __init__(self, inner: Ratio = 0.95, outer: Ratio = 0.85) -> None:
        for name, ratio in (("inner", inner), ("outer", outer)):
            if not 0 <= ratio < 1:
                raise ValueError(f"{name} must be in [0, 1), found {ratio}")
        self.inner, self.outer = inner, outer

    def choose(self, noise: Tensor, grid: tuple[int, int]) -> Masking:
        """In each region the tokens of smallest noise (B, N) stay visible; at least one of all does."""
        inside = release_rectangle(grid, noise.device).flatten()
        order = noise.argsort(dim=1, stable=True)
        # A stable sort by region keeps the order of the noise within each.
        regional = inside[order].long().argsort(dim=1, stable=True)
        order = order.gather(1, regional)
        (h, w) = grid
        # Counted without asking the device.
        inner = (int(0.75 * h) - int(0.25 * h)) * (int(0.75 * w) - int(0.125 * w))
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
        return self.choose(uniform_noise(generator, batch, grid[0] * grid[1]), grid)


def release_rectangle(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """(h, w) bool, True in the release's rectangle: rows int(0.25 h) + 1 to int(0.75 h) and columns int(0.125 w) + 1 to
    int(0.75 w), both inclusive."""
    h, w = grid
    rows, columns = torch.arange(h, device=device), torch.arange(w, device=device)
    inner_rows = (rows > int(0.25 * h)) & (rows <= int(0.75 * h))
    inner_columns = (columns > int(0.125 * w)) & (columns <= int(0.75 * w))
    return inner_rows[:, None] & inner_columns

