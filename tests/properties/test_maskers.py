"""What holds of any masker on any grid, at any ratio, with any seeds."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from medxray import maskers
from medxray.pretrain.maskers import kept_of, release_rectangle, uniform_noise

NAMES = maskers.names()
RANKED = [name for name in NAMES if "ratio" in maskers.settings_of(name).model_fields]
REGIONAL = [name for name in NAMES if maskers.get(name).regional]

grids = st.tuples(st.integers(1, 12), st.integers(1, 12))
ratios = st.floats(0, 0.999)
seeds = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=3).map(torch.tensor)
units = st.integers(1, 5)


def coverage(grid: tuple[int, int], batch: int, seed: int) -> Tensor:
    """(B, h, w) with whole chests, none and edges in it."""
    drawn = torch.rand(batch, *grid, generator=torch.Generator().manual_seed(seed))
    return (2 * drawn - 0.5).clamp(0, 1)


def whole(h: int, w: int, unit: int) -> tuple[int, int]:
    return h * unit, w * unit


@pytest.mark.parametrize("name", RANKED)
@given(grid=grids, ratio=ratios, unit=units, seeds=seeds, covered=st.none() | st.integers(0, 99))
def test_counts_and_orders(name: str, grid: tuple[int, int], ratio: float, unit: int, seeds: Tensor, covered: Any) -> None:
    """An exact number stays visible, and `restore` undoes the order that `keep` begins."""
    (B,), n = seeds.shape, grid[0] * grid[1]
    masker = maskers.get(name)(ratio=ratio, mask_unit=unit)
    regions = None if covered is None else coverage(grid, B, covered)
    keep, restore, mask = masker(regions, B, grid, seeds)
    assert keep.shape == (B, max(1, round(n * (1 - ratio)) if masker.regional else kept_of(n, ratio)))
    order = restore.argsort(1)
    assert torch.equal(order.gather(1, restore), torch.arange(n).expand(B, -1))
    assert torch.equal(restore.gather(1, order), torch.arange(n).expand(B, -1))
    assert torch.equal(order[:, : keep.shape[1]], keep)
    assert torch.equal(mask, torch.ones(B, n).scatter(1, keep, 0))


@given(grid=grids, inner=ratios, outer=ratios, seeds=seeds)
def test_the_rectangle_counts_its_regions_apart(
    grid: tuple[int, int], inner: float, outer: float, seeds: Tensor
) -> None:
    keep, restore, mask = maskers.get("rectangle")(inner=inner, outer=outer)(None, len(seeds), grid, seeds)
    inside = release_rectangle(grid).flatten()
    wanted = [kept_of(int(inside.sum()), inner), kept_of(int((~inside).sum()), outer)]
    found = (1 - mask)[:, inside].sum(1), (1 - mask)[:, ~inside].sum(1)
    if sum(wanted) == 0:
        assert keep.shape[1] == 1 and bool(((1 - mask).sum(1) == 1).all())
    else:
        assert all((count == n).all() for count, n in zip(found, wanted, strict=True))
    assert torch.equal(restore.sort(1).values, torch.arange(len(inside)).expand(len(seeds), -1))
    assert torch.equal(mask, torch.ones(mask.shape).scatter(1, keep, 0))


@pytest.mark.parametrize("name", ["random", *REGIONAL])
@pytest.mark.parametrize("axis", [1, 2])
@given(h=st.integers(1, 6), w=st.integers(1, 6), unit=st.integers(1, 3), ratio=ratios, seed=st.integers(0, 999))
def test_a_mirrored_chest_has_a_mirrored_mask(name: str, axis: int, h: int, w: int, unit: int, ratio: float, seed: int) -> None:
    grid = whole(h, w, unit)
    masker = maskers.get(name)(ratio=ratio, mask_unit=unit)
    # Distinct numbers, so that no tie is broken by a token's place.
    noise = torch.randperm(h * w, generator=torch.Generator().manual_seed(seed)).add(0.5).div(h * w).view(1, h, w)
    regions = coverage((h, w), 1, seed).repeat_interleave(unit, 1).repeat_interleave(unit, 2)
    mask = masker.choose(noise.flatten(1), grid, regions).mask.view(1, *grid)
    mirrored = masker.choose(noise.flip(axis).flatten(1), grid, regions.flip(axis)).mask.view(1, *grid)
    if masker.kept(grid[0] * grid[1]) % unit**2 == 0:
        assert torch.equal(mirrored, mask.flip(axis))
    else:
        # The last unit is taken in part, from its first token on.
        assert (mirrored != mask.flip(axis)).sum() <= unit**2


@pytest.mark.parametrize("name", REGIONAL)
@given(
    grid=grids, seed=st.integers(0, 999), outer=st.floats(0, 0.9), more=st.floats(0.001, 0.09),
    ratio=ratios, place=st.integers(0, 143), progress=st.floats(0, 1),
)  # fmt: skip
def test_more_chest_never_shows_a_masked_token(
    name: str, grid: tuple[int, int], seed: int, outer: float, more: float, ratio: float, place: int, progress: float
) -> None:
    n = grid[0] * grid[1]
    masker = maskers.get(name)(inner=outer + more, outer=outer, ratio=ratio)
    masker.progress = progress
    noise, regions = uniform_noise(torch.tensor([seed]), 1, n), coverage(grid, 1, seed)
    before = masker.choose(noise, grid, regions).mask[0, place % n]
    regions.view(-1)[place % n] = 1
    assert masker.choose(noise, grid, regions).mask[0, place % n] >= before


@pytest.mark.parametrize("name", ["random", "filtered-noise", *REGIONAL])
@given(grid=grids, low=ratios, high=ratios, unit=units, seeds=seeds)
def test_what_a_higher_ratio_shows_a_lower_one_does_too(
    name: str, grid: tuple[int, int], low: float, high: float, unit: int, seeds: Tensor
) -> None:
    few, many = (
        maskers.get(name)(ratio=ratio, mask_unit=unit)(None, len(seeds), grid, seeds).mask
        for ratio in (max(low, high), min(low, high))
    )
    assert bool((few >= many).all())


@given(seeds=seeds, n=st.integers(1, 300), more=st.integers(0, 50))
def test_noise_is_a_stream(seeds: Tensor, n: int, more: int) -> None:
    noise = uniform_noise(seeds, len(seeds), n + more)
    assert torch.equal(uniform_noise(seeds, len(seeds), n), noise[:, :n]) and noise.dtype == torch.float32
    assert bool((noise >= 0).all() and (noise < 1).all())
