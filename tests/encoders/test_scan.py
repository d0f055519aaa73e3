"""The selective scan against its definition, values and gradients; the four directions."""

from itertools import product

import pytest
import torch
from torch import Tensor

from medxray.encoders.scan import backends, cross_merge, cross_scan, selective_scan
from medxray.types import SpecError

RUNNING = sorted(name for name, reason in backends().items() if reason is None and name != "reference")


def arguments(
    D: int, L: int, N: int, G: int, batch: int = 2, dtype: torch.dtype = torch.float64, scale: float = 1.0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(L * 100 + N)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    A = -torch.rand(D, N, generator=generator, dtype=torch.float64) * 4 - 0.01
    u, delta, B, C = draw(batch, D, L), draw(batch, D, L) * scale, draw(batch, G, N, L), draw(batch, G, N, L)
    return [tensor.to(dtype).requires_grad_() for tensor in (u, delta, A, B, C, draw(D), draw(D))]


def run(given: list[Tensor], backend: str, softplus: bool = True) -> list[Tensor]:
    """Values, then the gradient of every argument."""
    y = selective_scan(*given, delta_softplus=softplus, backend=backend)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(y.dtype)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), given)]


@pytest.mark.parametrize("backend", RUNNING)
@pytest.mark.parametrize(("N", "G"), list(product((1, 4, 16), (1, 2))))
@pytest.mark.parametrize("L", [1, 2, 3, 7, 31, 64, 197])
def test_equals_the_definition(backend: str, L: int, N: int, G: int) -> None:
    given = arguments(4, L, N, G)
    for found, expected in zip(run(given, backend), run(given, "reference"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", RUNNING)
@pytest.mark.parametrize("L", [1, 33, 200])
def test_float32_is_near_float64(backend: str, L: int) -> None:
    single, double = arguments(4, L, 4, 2, dtype=torch.float32), arguments(4, L, 4, 2)
    for found, expected in zip(run(single, backend), run(double, "reference"), strict=True):
        assert found.dtype == torch.float32
        # Of a single step A has no gradient.
        assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("backend", RUNNING)
@pytest.mark.parametrize("scale", [1e-6, 30.0, 1e4])
def test_extreme_steps(backend: str, scale: float) -> None:
    """Steps that keep everything and steps that forget everything; nothing overflows on the way."""
    single = arguments(4, 150, 2, 1, dtype=torch.float32, scale=scale)
    double = [tensor.detach().double().requires_grad_() for tensor in single]
    for found, expected in zip(run(single, backend), run(double, "reference"), strict=True):
        assert found.isfinite().all()
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("backend", RUNNING)
def test_a_constant_input_without_decay_is_a_sum(backend: str) -> None:
    L = 100
    one = torch.ones(1, 1, L)
    y = selective_scan(one, one, torch.zeros(1, 1), one, one, backend=backend)
    assert torch.equal(y.flatten(), torch.arange(1.0, L + 1))


@pytest.mark.parametrize("backend", ["auto", *RUNNING])
def test_what_may_be_left_out(backend: str) -> None:
    u, delta, A, B, C, D, bias = arguments(4, 20, 3, 1)
    step = delta.exp()
    plain = selective_scan(u, step, A, B[:, 0], C[:, 0], backend=backend)
    torch.testing.assert_close(plain, selective_scan(u, step, A, B, C, backend="reference"))
    torch.testing.assert_close(
        selective_scan(u, step, A, B, C, D, backend=backend), plain + D[:, None] * u, rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(
        selective_scan(u, delta, A, B, C, delta_bias=bias, delta_softplus=True, backend=backend),
        selective_scan(u, torch.nn.functional.softplus(delta + bias[:, None]), A, B, C, backend="reference"),
    )


def test_nothing_looks_ahead() -> None:
    given = arguments(4, 50, 2, 1)
    first = selective_scan(*given, delta_softplus=True)
    changed = [tensor.detach().clone() for tensor in given]
    changed[0][..., 30:] += 1
    second = selective_scan(*changed, delta_softplus=True)
    assert torch.equal(first[..., :30], second[..., :30])
    assert (first[..., 30:] != second[..., 30:]).all()


def test_half_precision_is_computed_in_float32() -> None:
    given = [tensor.detach().bfloat16() for tensor in arguments(4, 64, 2, 2)]
    found = selective_scan(*given, delta_softplus=True)
    assert found.dtype == torch.bfloat16
    exact = selective_scan(*(tensor.double() for tensor in given), delta_softplus=True, backend="reference")
    # One rounding, of the result.
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        single = [tensor.float() for tensor in given]
        torch.testing.assert_close(
            selective_scan(*single, delta_softplus=True).double(), exact, rtol=1e-4, atol=1e-5
        )


def test_mistakes() -> None:
    u, delta, A, B, C, *_ = arguments(4, 5, 2, 1)
    with pytest.raises(SpecError, match=r"unknown backend 'torhc'; did you mean 'torch'"):
        selective_scan(u, delta, A, B, C, backend="torhc")
    with pytest.raises(SpecError, match=r"found u \(2, 4, 5\).*A \(3, 2\)"):
        selective_scan(u, delta, A[:3], B, C)
    assert "torch" in backends()


def test_four_directions() -> None:
    maps = torch.arange(6.0).view(1, 1, 2, 3)
    assert cross_scan(maps)[0, :, 0].tolist() == [
        [0, 1, 2, 3, 4, 5],
        [0, 3, 1, 4, 2, 5],
        [5, 4, 3, 2, 1, 0],
        [5, 2, 4, 1, 3, 0],
    ]
    maps = torch.randn(2, 3, 4, 7)
    torch.testing.assert_close(cross_merge(cross_scan(maps), 4, 7), 4 * maps)
    # Merging is the transpose of scanning.
    sequences = torch.randn(2, 4, 3, 28)
    left = (cross_scan(maps) * sequences).sum()
    torch.testing.assert_close(left, (maps * cross_merge(sequences, 4, 7)).sum(), rtol=1e-4, atol=1e-4)
