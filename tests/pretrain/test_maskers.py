"""Maskers: exact counts, one stream of noise a seed, the rectangle's regions."""

import pytest
import torch

from medxray import maskers
from medxray.pretrain import Masking
from medxray.pretrain.maskers import (
    ContourMasker,
    CurriculumMasker,
    RandomMasker,
    RectangleMasker,
    kept_of,
    release_rectangle,
    uniform_noise,
)
from medxray.types import SpecError

GRIDS = [(8, 8), (5, 9), (1, 1), (2, 1), (1, 13), (20, 7)]
NAMES = maskers.names()
RANKED = [name for name in NAMES if "ratio" in maskers.settings_of(name).model_fields]


def splitmix64(seed: int, n: int) -> list[float]:
    """The first n numbers of the documented stream, in Python's own integers."""
    wrap = 2**64 - 1

    def mix(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & wrap
        z = (z ^ z >> 27) * 0x94D049BB133111EB & wrap
        return z ^ z >> 31

    return [(mix(mix(seed + 0x9E3779B97F4A7C15 * i & wrap)) >> 40) / 2**24 for i in range(1, n + 1)]


def assert_consistent(masking: Masking, B: int, N: int) -> None:
    visible = masking.keep.shape[1]
    assert masking.keep.shape[0] == B and visible >= 1
    assert torch.equal(masking.restore.sort(dim=1).values, torch.arange(N).expand(B, -1))
    assert torch.equal(masking.mask.sum(1), torch.full((B,), float(N - visible)))
    assert torch.equal(masking.mask.gather(1, masking.keep), torch.zeros(masking.keep.shape))
    assert torch.equal(masking.restore.gather(1, masking.keep), torch.arange(visible).expand(B, -1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grid", GRIDS)
def test_masking_is_consistent(name: str, grid: tuple[int, int]) -> None:
    masking = maskers.get(name)()(None, 3, grid, torch.tensor([5, 6, 7]))
    assert_consistent(masking, 3, grid[0] * grid[1])


@pytest.mark.parametrize("name", RANKED)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("unit", [1, 2, 4])
def test_counts_are_exact(name: str, grid: tuple[int, int], ratio: float, unit: int) -> None:
    n = grid[0] * grid[1]
    masker = maskers.get(name)(ratio=ratio, mask_unit=unit)
    expected = round(n * (1 - ratio)) if masker.regional else kept_of(n, ratio)
    for regions in (None, torch.rand(2, *grid)):
        masking = masker(regions, 2, grid, torch.tensor([1, 2]))
        assert_consistent(masking, 2, n)
        assert masking.keep.shape[1] == max(1, expected)


@pytest.mark.parametrize("name", RANKED)
def test_units_stay_whole(name: str) -> None:
    masking = maskers.get(name)(ratio=0.75, mask_unit=2)(None, 8, (8, 12), torch.arange(8))
    units = masking.mask.view(8, 4, 2, 6, 2)
    assert torch.equal(units.amin((2, 4)), units.amax((2, 4)))


@pytest.mark.parametrize("name", RANKED)
def test_no_place_is_never_seen(name: str) -> None:
    """Over many seeds every token is visible in some and masked in others."""
    nowhere = torch.zeros(2000, 10, 12)
    share = maskers.get(name)(ratio=0.75)(nowhere, 2000, (10, 12), torch.arange(2000)).mask.mean(0)
    assert share.min() > 0.55 and share.max() < 0.9


def neighbours(masking: Masking, grid: tuple[int, int]) -> float:
    """Share of pairs of neighbours that are both visible."""
    visible = (1 - masking.mask).unflatten(1, grid).bool()
    pairs = [visible[:, 1:] & visible[:, :-1], visible[:, :, 1:] & visible[:, :, :-1]]
    return sum(int(pair.sum()) for pair in pairs) / sum(pair.numel() for pair in pairs)


def test_lattice() -> None:
    visible = (1 - maskers.get("grid")(0.75)(None, 64, (8, 12), torch.arange(64)).mask).view(64, 8, 12).bool()
    starts = set()
    for image in visible:
        rows, columns = image.any(1).nonzero()[:, 0], image.any(0).nonzero()[:, 0]
        assert (rows.diff() == 2).all() and (columns.diff() == 2).all()
        assert torch.equal(image, image.any(1)[:, None] & image.any(0)[None])
        starts.add((int(rows[0]), int(columns[0])))
    assert starts == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_blocks_are_rectangles() -> None:
    grid, whole = (20, 20), 0
    masking = maskers.get("block")(0.1, block=0.2)(None, 64, grid, torch.arange(64))
    for masked in masking.mask.view(64, *grid).bool():
        # One rectangle, or the lower 40 tokens of one, so that at most its first row is not whole.
        rows = masked.any(1).nonzero()[:, 0]
        whole += len({tuple(masked[row].tolist()) for row in rows[1:]}) == 1
    # In the others the first rectangle lay over the edge.
    assert whole > 20
    random = neighbours(RandomMasker(0.75)(None, 64, grid, torch.arange(64)), grid)
    assert neighbours(maskers.get("block")(0.75)(None, 64, grid, torch.arange(64)), grid) > 2 * random


def test_filtered_noise_spreads_clusters() -> None:
    grid, seeds = (40, 40), torch.arange(64)
    random, green = (maskers.get(name)(0.75)(None, 64, grid, seeds) for name in ("random", "filtered-noise"))

    def uneven(masking: Masking) -> float:
        """Variance of the number of visible tokens in squares of 8 x 8."""
        counts = (1 - masking.mask).view(64, 5, 8, 5, 8).sum((2, 4))
        return float(counts.var())

    assert uneven(green) < 0.8 * uneven(random)
    assert neighbours(green, grid) > 1.1 * neighbours(random, grid)
    # Not a lattice: two images differ as two independent ones do.
    assert (green.mask[0] - green.mask[1]).abs().mean() == pytest.approx(2 * 0.25 * 0.75, abs=0.06)
    with pytest.raises(ValueError, match=r"less than coarse, found 2.0 and 1.0"):
        maskers.get("filtered-noise")(fine=2.0, coarse=1.0)


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_follows_from_its_seed_alone(name: str) -> None:
    masker = maskers.get(name)()
    together = masker(None, 2, (8, 8), torch.tensor([11, -4]))
    alone = masker(None, 1, (8, 8), torch.tensor([-4]))
    assert all(torch.equal(a[1:], b) for a, b in zip(together, alone, strict=True))
    assert not torch.equal(together.mask[0], together.mask[1])
    drawn = [masker(None, 2, (8, 8), torch.Generator().manual_seed(3)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))


@pytest.mark.parametrize(
    ("n", "ratio", "kept"), [(6400, 0.9, 640), (6400, 0.75, 1600), (130, 0.95, 6), (270, 0.85, 40)]
)
def test_counts_are_safe_from_binary_fractions(n: int, ratio: float, kept: int) -> None:
    assert kept_of(n, ratio) == kept


def test_ratios_are_checked() -> None:
    with pytest.raises(ValueError, match=r"ratio must be in \[0, 1\), found 1.2"):
        RandomMasker(1.2)
    with pytest.raises(ValueError, match=r"outer must be in \[0, 1\), found 1"):
        RectangleMasker(outer=1)
    with pytest.raises((SpecError, ValueError)):
        maskers.settings_of("random")(ratio=1.2)


def test_noise_decides() -> None:
    noise = torch.tensor([[0.9, 0.1, 0.5, 0.3]])
    masking = RandomMasker(0.5).choose(noise, (2, 2))
    assert masking == Masking(masking.keep, masking.restore, masking.mask)
    assert masking.keep.tolist() == [[1, 3]]
    assert masking.restore.tolist() == [[3, 0, 2, 1]]
    assert masking.mask.tolist() == [[1, 0, 1, 0]]


def test_contour_meets_its_two_ratios() -> None:
    """Grid 80 x 80, the chest two fifths of it: 704 tokens stay, 5.25 % of the chest and 14.8 % of the rest."""
    chest = torch.zeros(64, 80, 80)
    chest[:, 10:74, 20:60] = 1
    masker = ContourMasker()
    masking = masker(chest, 64, (80, 80), torch.arange(64))
    assert masking.keep.shape[1] == 704
    kept, inside = 1 - masking.mask, chest.flatten(1).bool()
    assert kept[inside].mean() == pytest.approx(0.0525, abs=0.002)
    assert kept[~inside].mean() == pytest.approx(0.148, abs=0.002)
    # Tokens of the edge lie between: half covered, half the way.
    half = masker(chest / 2, 64, (80, 80), torch.arange(64)).mask[inside].mean()
    assert 0.87 < half < 0.95
    # An image's mask hangs on its own region and seed alone.
    alone = masker(chest[3:4], 1, (80, 80), torch.tensor([3]))
    assert torch.equal(alone.keep[0], masking.keep[3])
    # Draws are those of sampling without replacement: a token of twice the weight comes first twice as often.
    first = ContourMasker(inner=0.5, outer=0.0, ratio=0.75)(
        torch.tensor([0.0, 1.0, 1.0, 1.0]).view(1, 2, 2).expand(4000, -1, -1), 4000, (2, 2), torch.arange(4000)
    )
    assert (first.keep[:, 0] == 0).float().mean() == pytest.approx(1 / 2.5, abs=0.03)


def test_contour_without_regions_takes_the_rectangle() -> None:
    seeds = torch.arange(16)
    regions = release_rectangle((20, 20)).float().expand(16, -1, -1)
    assert torch.equal(ContourMasker()(None, 16, (20, 20), seeds).keep, ContourMasker()(regions, 16, (20, 20), seeds).keep)


def test_units_of_the_contour_are_means_over_the_grid() -> None:
    """Grid 5 x 5 in units of 2: the unit in the corner is one token."""
    chest = torch.zeros(500, 5, 5)
    chest[:, 4, 4] = 1
    kept = 1 - ContourMasker(inner=0.99, outer=0.0, ratio=0.5, mask_unit=2)(chest, 500, (5, 5), torch.arange(500)).mask
    assert kept[:, 24].mean() < 0.05 < 0.3 < kept[:, :24].mean()


def test_curriculum_goes_from_random_to_contour() -> None:
    chest = torch.zeros(300, 16, 16)
    chest[:, 4:12, 4:14] = 1
    inside, seeds = chest.flatten(1).bool(), torch.arange(300)
    masker = CurriculumMasker(inner=0.9, outer=0.6, ratio=0.75, begin=0.2, end=0.6)
    shares = []
    for masker.progress in (0.0, 0.2, 0.4, 0.6, 1.0):
        masking = masker(chest, 300, (16, 16), seeds)
        assert masking.keep.shape[1] == 64
        shares.append(float(masking.mask[inside].mean()))
    assert shares[:2] == [pytest.approx(0.75, abs=0.01)] * 2 and shares[3] == shares[4]
    assert shares[1] + 0.03 < shares[2] < shares[3] - 0.03
    contour = ContourMasker(inner=0.9, outer=0.6, ratio=0.75)(chest, 300, (16, 16), seeds)
    assert torch.equal(masking.keep, contour.keep)


@pytest.mark.parametrize("settings", [{"inner": 1.0}, {"outer": -0.1}, {"ratio": 1.0}, {"mask_unit": 0}])
def test_contour_refuses_what_is_no_share(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        ContourMasker(**settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="begin and end"):
        CurriculumMasker(begin=0.6, end=0.5)


def test_rectangle_of_the_release() -> None:
    """Grid 20 x 20: rows 6 to 15, columns 3 to 15, 6 of 130 tokens and 40 of 270 kept."""
    inside = release_rectangle((20, 20))
    rows, columns = inside.nonzero(as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (6, 15, 3, 15)
    assert inside.sum() == 130
    masking = RectangleMasker()(None, 4, (20, 20), torch.arange(4))
    visible = 1 - masking.mask
    assert torch.equal((visible * inside.flatten()).sum(1), torch.full((4,), 6.0))
    assert torch.equal((visible * ~inside.flatten()).sum(1), torch.full((4,), 40.0))
    kept_inside = inside.flatten()[masking.keep]
    assert torch.equal(kept_inside, (torch.arange(46) >= 40).expand(4, -1))


def test_rectangle_takes_its_rows_from_the_height() -> None:
    inside = release_rectangle((4, 16))
    rows, columns = inside.nonzero(as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (2, 3, 3, 12)


def test_seeded_noise_is_splitmix64() -> None:
    seeds = [0, 1, 42, 2**62, -1]
    noise = uniform_noise(torch.tensor(seeds), len(seeds), 50)
    expected = torch.tensor([splitmix64(seed, 50) for seed in seeds])
    assert noise.dtype == torch.float32
    assert torch.equal(noise, expected)


def test_seeded_noise_is_uniform_and_independent() -> None:
    """Seeds side by side are the hard case: they are what neighbouring studies and views have."""
    rows, n = 400, 2000
    noise = uniform_noise(torch.arange(rows), rows, n).double()
    assert noise.min() >= 0 and noise.max() < 1
    cells = 64
    counts = torch.bincount((noise.flatten() * cells).long(), minlength=cells).double()
    expected = noise.numel() / cells
    chi2 = ((counts - expected) ** 2 / expected).sum()
    # 63 degrees of freedom: mean 63, deviation 11.2.
    assert 63 - 5 * 11.2 < chi2 < 63 + 5 * 11.2
    z = (noise - 0.5) * 12**0.5
    bound = 5
    for first, second in ((z[:, :-1], z[:, 1:]), (z[:-1], z[1:]), (z[:-1, :-1], z[1:, 1:]), (z[:-1, 1:], z[1:, :-1])):
        assert abs((first * second).mean()) * first.numel() ** 0.5 < bound
    # No token of the grid is favoured over the seeds, and no seed over the tokens.
    assert (z.mean(0).abs() * rows**0.5).max() < bound
    assert (z.mean(1).abs() * n**0.5).max() < bound


def test_every_token_is_kept_as_often() -> None:
    masking = RandomMasker(0.75)(None, 4000, (4, 4), torch.arange(4000))
    share = 1 - masking.mask.mean(0)
    deviation = (0.25 * 0.75 / 4000) ** 0.5
    assert ((share - 0.25).abs() < 5 * deviation).all()
