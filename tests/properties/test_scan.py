"""What holds of the selective scan for any shape: its recurrence, linearity, where it may be cut, and turned maps."""

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from medxray.encoders.scan import cross_merge, cross_scan, scan_map, selective_scan
from medxray.encoders.scan.chunked import recur
from medxray.encoders.scan.ssd import ssd
from medxray.types import SpecError

BACKENDS = ["cpu", "torch"]
sizes = st.fixed_dictionaries({
    "batch": st.integers(0, 3), "channels": st.integers(1, 9), "groups": st.integers(1, 3), "states": st.integers(1, 6),
    "length": st.integers(1, 80), "seed": st.integers(0, 999),
})  # fmt: skip


def drawn(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def arguments(size: dict[str, int]) -> list[Tensor]:
    """u, steps above 0, A, B, C and D in float64."""
    b, d, g, n, length = (size[key] for key in ("batch", "channels", "groups", "states", "length"))
    d *= g
    shapes = [(b, d, length), (b, d, length), (d, n), (b, g, n, length), (b, g, n, length), (d,)]
    u, delta, A, B, C, D = drawn(size["seed"], *shapes)
    return [u, delta.abs(), -A.abs(), B, C, D]


def run(tensors: list[Tensor], backend: str) -> Tensor:
    dtype = torch.float32 if backend == "cpu" else torch.float64
    return selective_scan(*(tensor.to(dtype) for tensor in tensors), backend=backend).double()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def by_steps(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    y = torch.zeros_like(u)
    for b, d in torch.cartesian_prod(torch.arange(len(u)), torch.arange(u.shape[1])).tolist():
        group = d * B.shape[1] // u.shape[1]
        state = torch.zeros(A.shape[1], dtype=u.dtype)
        for t in range(u.shape[2]):
            step = delta[b, d, t]
            state = (step * A[d]).exp() * state + step * B[b, group, :, t] * u[b, d, t]
            y[b, d, t] = C[b, group, :, t] @ state + D[d] * u[b, d, t]
    return y


@pytest.mark.parametrize("backend", BACKENDS)
@given(size=sizes)
def test_is_the_recurrence(backend: str, size: dict[str, int]) -> None:
    tensors = arguments(size | {"length": size["length"] % 9 + 1, "channels": size["channels"] % 3 + 1})
    close(run(tensors, backend), by_steps(*tensors))


@pytest.mark.parametrize("backend", BACKENDS)
@given(size=sizes, factor=st.floats(-3, 3))
def test_is_linear_in_its_input(backend: str, size: dict[str, int], factor: float) -> None:
    u, *others = arguments(size)
    (other,) = drawn(size["seed"] + 1, tuple(u.shape))
    parts = run([u, *others], backend), run([other, *others], backend)
    close(run([factor * u + other, *others], backend), factor * parts[0] + parts[1])


@pytest.mark.parametrize("backend", BACKENDS)
@given(size=sizes, at=st.integers(1, 79))
def test_may_be_cut_anywhere(backend: str, size: dict[str, int], at: int) -> None:
    """Two parts, the second from the state at the end of the first, are the whole."""
    at %= size["length"]
    assume(at)
    u, delta, A, B, C, D = arguments(size)
    first, second = ([u[..., s], delta[..., s], A, B[..., s], C[..., s], D] for s in (slice(at), slice(at, None)))
    whole = run([u, delta, A, B, C, D], backend)
    close(run(first, backend), whole[..., :at])
    # A state is what an output map of one 1 reads, and it decays by all the steps since.
    later = run(second, backend)
    since = delta[..., at:].cumsum(-1)
    per_group = u.shape[1] // B.shape[1]
    for n in range(A.shape[1]):
        reads = torch.zeros_like(first[4])
        reads[:, :, n] = 1
        state = run([*first[:4], reads, torch.zeros_like(D)], backend)[..., -1:]
        later = later + second[4][:, :, n].repeat_interleave(per_group, 1) * (since * A[:, n, None]).exp() * state
    close(later, whole[..., at:])


@pytest.mark.parametrize("backend", BACKENDS)
@given(size=sizes)
def test_one_step_and_none(backend: str, size: dict[str, int]) -> None:
    u, delta, A, B, C, D = arguments(size | {"length": 1})
    read = (B * C).sum(2).repeat_interleave(u.shape[1] // B.shape[1], 1)
    close(run([u, delta, A, B, C, D], backend), u * delta * read + D[:, None] * u)
    with pytest.raises(SpecError, match=r"u is .* expected at least one step"):
        run([u[..., :0], delta[..., :0], A, B[..., :0], C[..., :0], D], backend)


@given(shape=st.tuples(*[st.integers(0, 3)] * 2, *[st.integers(1, 7)] * 2), seed=st.integers(0, 999))
def test_merging_is_the_transpose_of_scanning(shape: tuple[int, ...], seed: int) -> None:
    B, C, H, W = shape
    maps, sequences = drawn(seed, (B, C, H, W), (B, 4, C, H * W))
    close((cross_scan(maps) * sequences).sum(), (maps * cross_merge(sequences, H, W)).sum())
    assert torch.equal(cross_merge(cross_scan(maps), H, W), 4 * maps)


@pytest.mark.parametrize("backend", BACKENDS)
@given(H=st.integers(1, 7), W=st.integers(1, 7), channels=st.integers(1, 5), states=st.integers(1, 3), seed=st.integers(0, 999))
def test_a_turned_map_has_its_directions_exchanged(
    backend: str, H: int, W: int, channels: int, states: int, seed: int
) -> None:
    maps, delta, A, B, C, D = drawn(
        seed, (2, channels, H, W), (2, 4, channels, H, W), (4, channels, states), *[(2, 4, states, H, W)] * 2, (4, channels)
    )
    delta, A = delta.abs(), -A.abs()

    def scanned(turn: Any, order: list[int]) -> Tensor:
        some = [turn(maps), turn(delta)[:, order], A[order].flatten(0, 1), turn(B)[:, order], turn(C)[:, order]]
        some.append(D[order].flatten())
        dtype = torch.float32 if backend == "cpu" else torch.float64
        return scan_map(*(tensor.to(dtype) for tensor in some), backend=backend).double()

    as_it_is = scanned(lambda x: x, [0, 1, 2, 3])
    rows = selective_scan(
        cross_scan(maps)[:, 0], delta[:, 0].flatten(2), A[0], B[:, 0].flatten(2), C[:, 0].flatten(2), D[0], backend="torch"
    )
    close(scanned(lambda x: x, [1, 0, 3, 2]), scanned(lambda x: x.mT, [0, 1, 2, 3]).mT)
    close(scanned(lambda x: x.mT, [1, 0, 3, 2]).mT, as_it_is)
    close(scanned(lambda x: x.flip(-1, -2), [2, 3, 0, 1]).flip(-1, -2), as_it_is)
    only = torch.zeros(2, 4, 1, H, W, dtype=torch.float64)
    only[:, 0] = 1
    C, D = C * only, D * torch.eye(4, dtype=torch.float64)[0, :, None]
    close(scanned(lambda x: x, [0, 1, 2, 3]), rows.unflatten(2, (H, W)))


@given(batch=st.integers(1, 2), length=st.integers(1, 70), seed=st.integers(0, 999))
def test_recur(batch: int, length: int, seed: int) -> None:
    decay, x = drawn(seed, (batch, length, 3), (batch, length, 3))
    expected = [x[:, 0]]
    for t in range(1, length):
        expected.append(decay[:, t] * expected[-1] + x[:, t])
    close(recur(decay, x), torch.stack(expected, 1))


@given(length=st.integers(1, 70), chunks=st.tuples(st.integers(1, 80), st.integers(1, 80)), groups=st.integers(1, 3),
       heads=st.integers(1, 2), seed=st.integers(0, 999))  # fmt: skip
def test_chunks_of_ssd_leave_no_trace(length: int, chunks: tuple[int, int], groups: int, heads: int, seed: int) -> None:
    H = groups * heads
    x, delta, A, B, C, D = drawn(seed, (2, length, H, 2), (2, length, H), (H,), *[(2, length, groups, 3)] * 2, (H,))
    delta, A = delta.abs(), -A.abs()
    first, second = (ssd(x, delta, A, B, C, D, chunk=chunk) for chunk in chunks)
    close(first, second)
    # One decay a head is a selective scan whose states have the same.
    u, steps = x.permute(0, 2, 3, 1).flatten(1, 2), delta.mT.repeat_interleave(2, 1)
    maps = (m.permute(0, 2, 3, 1) for m in (B, C))
    own = A.repeat_interleave(2)[:, None].expand(-1, 3)
    as_scan = selective_scan(u, steps, own, *maps, D.repeat_interleave(2), backend="torch")
    close(first, as_scan.unflatten(1, (H, 2)).permute(0, 3, 1, 2))
