"""The selective scan: every back-end that runs here against its definition in float64, values and all gradients."""

import copy
import os
import subprocess
import sys
import threading
import types
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from medxray.encoders.scan import BACKENDS, backends, cpu, cross_merge, cross_scan, scan_map, selective_scan
from medxray.types import SpecError

# Triton's interpreter is slow; small shapes go through it in test_scan_triton.py.
RUNNING = [
    name for name, why in backends().items() if why is None and (name != "triton" or torch.cuda.is_available())
]
KERNELS = [name for name in RUNNING if name != "reference"]
EXACT = 2e-5


def device_of(backend: str) -> str:
    return "cuda" if backend in ("triton", "mamba-ssm") else "cpu"


def arguments(D: int, L: int, N: int, G: int, batch: int = 2, scale: float = 1.0) -> list[Tensor]:
    """u, delta, A, B, C, D and bias in float64."""
    generator = torch.Generator().manual_seed(L * 100 + N)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    A = -torch.rand(D, N, generator=generator, dtype=torch.float64) * 4 - 0.01
    return [draw(batch, D, L), draw(batch, D, L) * scale, A, *draw(2, batch, G, N, L), draw(D), draw(D)]


def map_arguments(D: int, H: int, W: int, N: int, batch: int = 2) -> list[Tensor]:
    """maps, delta, A, B, C, D and bias in float64, as VMamba lays them out."""
    generator = torch.Generator().manual_seed(H * 100 + W)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    A = -torch.rand(4 * D, N, generator=generator, dtype=torch.float64) * 4 - 0.01
    maps, delta = draw(batch, H, W, D).permute(0, 3, 1, 2), draw(batch, 4, H, W, D).permute(0, 1, 4, 2, 3)
    return [maps, delta, A, *draw(2, batch, 4, N, H, W), draw(4 * D), draw(4 * D)]


def run(
    given: list[Tensor], backend: str, dtype: torch.dtype = torch.float32, softplus: bool = True, scan: Any = None
) -> list[Tensor]:
    """Values, then the gradient of every argument."""
    given = [tensor.detach().to(device_of(backend), dtype).requires_grad_() for tensor in given]
    y = (scan or selective_scan)(*given, delta_softplus=softplus, backend=backend)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(y)
    return [tensor.cpu() for tensor in (y.detach(), *torch.autograd.grad((y * weights).sum(), given))]


def assert_exact(found: list[Tensor], expected: list[Tensor], tolerance: float = EXACT) -> None:
    for name, one, other in zip(("y", "u", "delta", "A", "B", "C", "D", "bias"), found, expected, strict=True):
        assert one.isfinite().all(), name
        # Of a single step A has no gradient.
        error, size = (one.double() - other).abs().max().item(), other.abs().max().item()
        assert error <= tolerance * size + 1e-30, f"{name}: {error / size:.1e}"


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(("N", "G"), list(product((1, 4, 16, 64), (1, 2, 4))))
@pytest.mark.parametrize("L", [1, 2, 31, 33, 64, 197])
def test_equals_the_definition(backend: str, L: int, N: int, G: int) -> None:
    given = arguments(40 if N < 16 else 12, L, N, G)
    assert_exact(run(given, backend), run(given, "reference", torch.float64))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(("L", "N", "G"), [(1000, 16, 2), (3137, 1, 1), (10_000, 4, 1)])
def test_long_sequences(backend: str, L: int, N: int, G: int) -> None:
    given = arguments(4, L, N, G, batch=1)
    assert_exact(run(given, backend), run(given, "reference", torch.float64))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("scale", [1e-6, 30.0, 1e4])
def test_extreme_steps(backend: str, scale: float) -> None:
    """Steps that keep everything and steps that forget everything; nothing overflows on the way."""
    given = [tensor.float().double() for tensor in arguments(4, 150, 2, 1, scale=scale)]
    assert_exact(run(given, backend), run(given, "reference", torch.float64))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(("which", "value"), [(0, 0.0), (1, 0.0), (3, 0.0), (0, 1e18), (3, 1e15), (4, -1e15), (5, 1e10)])
def test_zeros_and_huge_inputs(backend: str, which: int, value: float) -> None:
    given = arguments(4, 70, 2, 1)
    given[which] = torch.zeros_like(given[which]) if value == 0 else (given[which] * value).float().double()
    assert_exact(run(given, backend), run(given, "reference", torch.float64))


@pytest.mark.parametrize("backend", KERNELS)
def test_small_steps_are_exact_in_relative_terms(backend: str) -> None:
    """softplus(x) is e^x for very negative x, not zero."""
    x = torch.linspace(-60, 30, 91).view(1, 91, 1)
    one = torch.ones(1, 1, 1, device=device_of(backend))
    y = selective_scan(
        torch.ones_like(x).to(one), x.to(one), -one[0].expand(91, 1), one, one, delta_softplus=True, backend=backend
    )
    torch.testing.assert_close(y.cpu().double(), F.softplus(x.double()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", RUNNING)
def test_a_constant_input_without_decay_is_a_sum(backend: str) -> None:
    L = 100
    one = torch.ones(1, 1, L, device=device_of(backend))
    y = selective_scan(one, one, torch.zeros(1, 1).to(one), one, one, backend=backend)
    assert torch.equal(y.flatten().cpu(), torch.arange(1.0, L + 1))


@pytest.mark.parametrize("backend", ["auto", *KERNELS])
def test_what_may_be_left_out(backend: str) -> None:
    given = [tensor.to(device_of(backend), torch.float32) for tensor in arguments(20, 50, 3, 1)]
    u, delta, A, B, C, D, bias = given

    def close(found: Tensor, *others: Any, **options: Any) -> None:
        expected = selective_scan(*[t.double() for t in others], backend="reference", **options)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)

    step = delta.exp()
    close(selective_scan(u, step, A, B[:, 0], C[:, 0], backend=backend), u, step, A, B, C)
    close(selective_scan(u, step, A, B, C, D, backend=backend), u, step, A, B, C, D)
    found = selective_scan(u, delta, A, B, C, delta_bias=bias, delta_softplus=True, backend=backend)
    close(found, u, F.softplus(delta + bias[:, None]), A, B, C)


@pytest.mark.parametrize("backend", KERNELS)
def test_any_layout(backend: str) -> None:
    given = [tensor.to(device_of(backend), torch.float32) for tensor in arguments(24, 37, 3, 2)]
    expected = run([t.double() for t in given], "reference", torch.float64)
    u, delta, A, B, C, D, bias = given
    last = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (u, delta)]
    wide = [torch.cat([t, t], 2)[..., : t.shape[2]] for t in (u, delta)]
    odd = [torch.stack([t, t], 3)[..., 0] for t in (u, delta)]
    maps = torch.cat([B, C], 2).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1).split(3, 2)
    transposed = A.T.contiguous().T
    for some in ([*last, A, *maps, D, bias], [*wide, A, B, C, D, bias], [*odd, transposed, B, C, D, bias],
                 [last[0], delta, A, B, C, D, bias]):  # fmt: skip
        assert_exact([y.cpu() for y in gradients_of(some, backend)], expected)


def gradients_of(given: list[Tensor], backend: str) -> list[Tensor]:
    """As `run`, the layout left as it is."""
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    y = selective_scan(*leaves, delta_softplus=True, backend=backend)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(y)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), leaves)]


@pytest.mark.parametrize("backend", KERNELS)
def test_gradients_that_are_views(backend: str) -> None:
    """What comes back from a sum has strides of zero."""
    given = [tensor.to(device_of(backend), torch.float32).requires_grad_() for tensor in arguments(20, 40, 2, 1)]
    found = torch.autograd.grad(selective_scan(*given, delta_softplus=True, backend=backend).sum(), given)
    double = [tensor.detach().cpu().double().requires_grad_() for tensor in given]
    expected = torch.autograd.grad(selective_scan(*double, delta_softplus=True, backend="reference").sum(), double)
    assert_exact([expected[0], *(g.cpu() for g in found)], [expected[0], *expected], 1e-4)


def test_nothing_looks_ahead() -> None:
    given = [tensor.float() for tensor in arguments(20, 50, 2, 1)]
    first = selective_scan(*given, delta_softplus=True)
    changed = [tensor.clone() for tensor in given]
    changed[0][..., 30:] += 1
    second = selective_scan(*changed, delta_softplus=True)
    assert torch.equal(first[..., :30], second[..., :30])
    assert (first[..., 30:] != second[..., 30:]).all()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(backend: str, dtype: torch.dtype) -> None:
    given = [tensor.to(device_of(backend), dtype) for tensor in arguments(20, 64, 2, 2)]
    found = selective_scan(*given, delta_softplus=True, backend=backend)
    assert found.dtype == dtype
    exact = selective_scan(*(tensor.double() for tensor in given), delta_softplus=True, backend="reference")
    # One rounding, of the result.
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)
    leaves = [tensor.requires_grad_() for tensor in given]
    y = selective_scan(*leaves, delta_softplus=True, backend=backend)
    assert all(g.dtype == dtype and g.isfinite().all() for g in torch.autograd.grad(y.sum(), leaves))
    with torch.autocast(device_of(backend), torch.bfloat16):
        single = [tensor.detach().float() for tensor in given]
        torch.testing.assert_close(
            selective_scan(*single, delta_softplus=True, backend=backend).double(), exact, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_derivatives(backend: str) -> None:
    """Against differences of values; of the second order for the back-end that promises one."""
    given = [tensor.requires_grad_() for tensor in arguments(2, 6, 2, 1, batch=1)]

    def scan(*tensors: Tensor) -> Tensor:
        return selective_scan(*tensors, delta_softplus=True, backend=backend)

    assert torch.autograd.gradcheck(scan, given)
    assert torch.autograd.gradgradcheck(scan, given)


def test_a_second_derivative_of_the_kernels_is_refused() -> None:
    given = [tensor.float().requires_grad_() for tensor in arguments(4, 6, 2, 1)]
    (first,) = torch.autograd.grad(selective_scan(*given, backend="cpu").square().sum(), given[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"one derivative.*backend='torch'"):
        first.sum().backward()


class TestTransforms:
    """What torch makes of the scan: vmap, per-sample gradients, compilation, export."""

    def test_vmap(self) -> None:
        many = [torch.stack([t.float(), t.float() + 0.1]) for t in arguments(4, 9, 2, 1)]
        many[2] = -many[2].abs()
        found = torch.vmap(lambda *t: selective_scan(*t, delta_softplus=True))(*many)
        for i in range(2):
            expected = selective_scan(*(t[i] for t in many), delta_softplus=True, backend="reference")
            torch.testing.assert_close(found[i], expected)

    def test_functional_gradients(self) -> None:
        u, *others = (t.float() for t in arguments(4, 9, 2, 1))

        def loss(u: Tensor) -> Tensor:
            return selective_scan(u, *others, delta_softplus=True).square().sum()

        leaf = u.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(leaf), leaf)
        torch.testing.assert_close(torch.func.grad(loss)(u), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("backend", ["cpu", "torch"])
    def test_compiled_in_one_graph(self, backend: str) -> None:
        torch._dynamo.reset()
        given = [t.float().requires_grad_() for t in arguments(4, 9, 2, 1)]

        def scan(*tensors: Tensor) -> Tensor:
            return selective_scan(*tensors, delta_softplus=True, backend=backend) * 2

        compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*given), scan(*given))
        found, expected = (torch.autograd.grad(f(*given).sum(), given) for f in (compiled, scan))
        torch.testing.assert_close(found, expected)

    def test_exported_without_operators_of_ours(self) -> None:
        class Scan(torch.nn.Module):
            def forward(self, *given: Tensor) -> Tensor:
                return selective_scan(*given, delta_softplus=True)

        given = tuple(t.float() for t in arguments(4, 9, 2, 1))
        program = torch.export.export(Scan(), given)
        assert "medxray" not in str(program.graph)
        torch.testing.assert_close(program.module()(*given), Scan()(*given))

    def test_the_operators_keep_torchs_rules(self) -> None:
        given = [t.float().requires_grad_() for t in arguments(4, 40, 2, 1)]
        steps = given[1].detach()[:, None].requires_grad_()
        torch.library.opcheck(
            torch.ops.medxray.scan_cpu, (given[0], steps, *given[2:], True, 0, 0, True),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )  # fmt: skip


class TestMaps:
    def test_four_directions(self) -> None:
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

    @pytest.mark.parametrize("backend", KERNELS)
    @pytest.mark.parametrize(("D", "H", "W", "N"), [(2, 1, 1, 1), (3, 2, 3, 2), (24, 7, 5, 1), (64, 4, 13, 4)])
    def test_equal_scanning_copies(self, backend: str, D: int, H: int, W: int, N: int) -> None:
        """The definition: each direction on its own copy, put back in place, summed."""

        def by_copies(maps: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Tensor, **how: Any) -> Tensor:
            def walked(places: Tensor) -> Tensor:
                each = [cross_scan(places[:, k])[:, k] for k in range(4)]
                return torch.stack(each, 1)

            y = selective_scan(
                cross_scan(maps).flatten(1, 2), walked(delta).flatten(1, 2), A, walked(B), walked(C), *rest, **how
            )
            return cross_merge(y.unflatten(1, (4, D)), H, W)

        given = map_arguments(D, H, W, N)
        expected = run(given, "reference", torch.float64, scan=by_copies)
        assert_exact(run(given, backend, scan=scan_map), expected)
        # Channels outermost in memory, as most of torch has it.
        contiguous = [t.contiguous() for t in given]
        assert_exact(run(contiguous, backend, scan=scan_map), expected)

    def test_make_no_copy_a_direction(self) -> None:
        given = [t.float() for t in map_arguments(256, 32, 32, 1, batch=1)]
        scan_map(*given, delta_softplus=True)
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            scan_map(*given, delta_softplus=True)
        taken = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
        # The result and some work space, of four times which a copy for each direction would take for the input alone.
        assert taken < 1.5 * given[0].numel() * 4

    def test_mistakes(self) -> None:
        maps, delta, A, B, C, D, bias = map_arguments(4, 3, 3, 1)
        with pytest.raises(SpecError, match=r"delta is \(2, 3, 4, 9\), expected \(2, 4, 4, 9\)"):
            scan_map(maps, delta[:, :3], A, B, C, D, bias)
        with pytest.raises(SpecError, match=r"B is \(2, 2, 1, 9\).*4 directions"):
            scan_map(maps, delta, A, B[:, :2], C[:, :2], D, bias)
        with pytest.raises(SpecError, match=r"maps is \(2, 4, 9\), expected \(B, D, H, W\)"):
            scan_map(maps.flatten(2), delta, A, B, C)


class TestMistakes:
    """Each names the argument, what was expected and what was found."""

    def test_back_ends(self) -> None:
        u, delta, A, B, C, *_ = arguments(4, 5, 2, 1)
        with pytest.raises(SpecError, match=r"unknown backend 'torhc'; did you mean 'torch'"):
            selective_scan(u, delta, A, B, C, backend="torhc")
        with pytest.raises(SpecError, match=r"backend 'cpu' takes float32.* found u in float64 on cpu"):
            selective_scan(u, delta, A, B, C, backend="cpu")
        assert set(backends()) == set(BACKENDS) and backends()["cpu"] is backends()["torch"] is None
        absent = [name for name, why in backends().items() if why is not None]
        for name in absent:
            with pytest.raises(SpecError, match=rf"backend '{name}' does not run here: "):
                selective_scan(u.float(), delta, A, B, C, backend=name)
        if not torch.cuda.is_available():
            assert "CUDA" in str(backends()["mamba-ssm"])

    @pytest.mark.parametrize(
        ("which", "change", "message"),
        [
            (0, lambda t: t[0], r"u is \(4, 5\), expected \(B, D, L\)"),
            (1, lambda t: t[:, :3], r"delta is \(2, 3, 5\), expected \(2, 4, 5\) beside u \(2, 4, 5\) and A \(4, 2\)"),
            (2, lambda t: t[:3], r"A is \(3, 2\), expected \(4, 2\)"),
            (2, lambda t: t[:, 0], r"A is \(4,\), expected \(4, N\)"),
            (2, lambda t: t * float("inf"), r"A is not finite in 8 of 8 places"),
            (2, lambda t: t * float("nan"), r"A is not finite"),
            (3, lambda t: t[..., :4], r"B is \(2, 1, 2, 4\), expected \(2, 1, 2, 5\)"),
            (3, lambda t: t.expand(-1, 3, -1, -1), r"B is \(2, 3, 2, 5\), .*G dividing the 4 channels of u"),
            (3, lambda t: t[0, 0], r"B is \(2, 5\), expected \(2, N, 5\) or \(2, G, N, 5\)"),
            (4, lambda t: t[:, :, :1], r"C is \(2, 1, 1, 5\), expected \(2, 1, 2, 5\)"),
            (5, lambda t: t[:1], r"D is \(1,\), expected \(4,\)"),
            (6, lambda t: t[:1], r"delta_bias is \(1,\), expected \(4,\)"),
            (0, lambda t: t.long(), r"u is int64, expected floating-point numbers"),
            (4, lambda t: t.int(), r"C is int32, expected floating-point numbers"),
            (1, lambda t: t.to("meta"), r"delta is on meta, expected on cpu as u"),
        ],
    )
    def test_tensors(self, which: int, change: Any, message: str) -> None:
        given = [tensor.float() for tensor in arguments(4, 5, 2, 1)]
        given[which] = change(given[which])
        with pytest.raises(SpecError, match=message):
            selective_scan(*given)

    def test_nothing_to_walk(self) -> None:
        u, delta, A, B, C, *_ = (t.float() for t in arguments(4, 5, 2, 1))
        with pytest.raises(SpecError, match=r"u is \(2, 4, 0\), expected at least one step"):
            selective_scan(u[..., :0], delta[..., :0], A, B[..., :0], C[..., :0])
        assert selective_scan(u[:0], delta[:0], A, B[:0], C[:0]).shape == (0, 4, 5)


class TestThreads:
    GIVEN = staticmethod(lambda: [tensor.float() for tensor in arguments(100, 200, 4, 1)])

    def test_their_number_changes_nothing(self) -> None:
        before = torch.get_num_threads()
        try:
            results = []
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                results.append(run(self.GIVEN(), "cpu"))
        finally:
            torch.set_num_threads(before)
        for one in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], one, strict=True))

    def test_as_many_as_torch_uses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        team, asked = cpu._team(), []
        if team is None:
            pytest.skip("this torch has no OpenMP runtime that can be called")

        def count(function: Any, table: Any, threads: int, flags: int) -> None:
            asked.append(threads)
            team(function, table, threads, flags)

        monkeypatch.setattr(cpu, "_team", lambda: count)
        before = torch.get_num_threads()
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                run(self.GIVEN(), "cpu")
        finally:
            torch.set_num_threads(before)
        assert asked == [2, 2, 3, 3]

    def test_without_openmp(self, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = run(self.GIVEN(), "cpu")
        monkeypatch.setattr(cpu, "_team", lambda: None)
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            found = run(self.GIVEN(), "cpu")
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    def test_two_at_once(self) -> None:
        expected, wrong = run(self.GIVEN(), "cpu"), []

        def work() -> None:
            for _ in range(10):
                found = run(self.GIVEN(), "cpu")
                if not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
                    wrong.append(found)

        workers = [threading.Thread(target=work) for _ in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        assert not wrong and not any(worker.is_alive() for worker in workers)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
    def test_after_a_fork(self) -> None:
        """Once in a loader's worker, once in a bare child whose parent has used its threads."""
        code = """
import os, sys, torch
from torch.utils.data import DataLoader, Dataset
from medxray.encoders.scan import selective_scan
torch.set_num_threads(2)
u = torch.ones(1, 64, 50)
def scan():
    return selective_scan(u, u, -torch.ones(64, 2), u[:, :2], u[:, :2], backend="cpu")
expected = scan()
class Scans(Dataset):
    def __len__(self): return 4
    def __getitem__(self, i): return scan()
for batch in DataLoader(Scans(), num_workers=2, multiprocessing_context="fork"):
    assert torch.equal(batch[0], expected)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(scan(), expected) else 1)
assert os.waitpid(child, 0)[1] == 0
print("equal")
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert done.stdout.strip() == "equal", done.stderr


def seconds_to_first_call(environment: dict[str, str], before: str = "") -> float:
    """In a new process, from a torch that is there to the first gradient."""
    code = f"""
import time, torch
started = time.perf_counter()
{before}
from medxray.encoders.scan import selective_scan
assert "numba" not in __import__("sys").modules or {bool(before)}
u = torch.ones(1, 64, 50, requires_grad=True)
selective_scan(u, u, -torch.ones(64, 2), u[:, :2], u[:, :2], backend="cpu").sum().backward()
print(time.perf_counter() - started)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_kernels_are_compiled_once(tmp_path: Any) -> None:
    """Under 15 seconds the first time and one later; bounds of the first are for a busy machine."""
    first = seconds_to_first_call({"NUMBA_CACHE_DIR": str(tmp_path)})
    assert list(tmp_path.rglob("*.nbc"))
    later = min(seconds_to_first_call({"NUMBA_CACHE_DIR": str(tmp_path)}) for _ in range(2))
    assert first < 30 and later < first / 2


@pytest.mark.parametrize(
    "before",
    [
        "import numba.core.caching as c; c.CacheImpl._locator_classes = []",
        "import numba.core.caching as c\ndef full(*a, **k): raise OSError(28, 'No space left on device')\n"
        "c.IndexDataCacheFile.save = full",
    ],
    ids=["no-place", "full-disk"],
)
def test_a_cache_that_cannot_be_written(tmp_path: Any, before: str) -> None:
    seconds_to_first_call({"NUMBA_CACHE_DIR": str(tmp_path)}, before)
    assert not list(tmp_path.rglob("*.nbc"))


def test_mamba_ssm_gets_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels need CUDA; here stands a function with their signature and their demands on types and layout."""
    from medxray.encoders.scan import mamba_ssm as backend

    def selective_scan_fn(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
        delta_bias: Tensor | None = None, delta_softplus: bool = False, return_last_state: bool = False,
    ) -> Tensor:  # fmt: skip
        assert u.dtype == delta.dtype == B.dtype == C.dtype and z is None
        assert A.dtype == D.dtype == delta_bias.dtype == torch.float32
        assert all(t.stride(-1) == 1 for t in (u, delta, B, C)) and B.ndim == 4
        return selective_scan(u, delta, A, B, C, D, delta_bias, delta_softplus, backend="reference")

    package, ops, interface = (types.ModuleType(n) for n in ("mamba_ssm", "ops", "selective_scan_interface"))
    interface.selective_scan_fn = selective_scan_fn
    for name, module in (
        ("mamba_ssm", package), ("mamba_ssm.ops", ops), ("mamba_ssm.ops.selective_scan_interface", interface)
    ):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    given = [tensor.float() for tensor in arguments(4, 9, 2, 2)]
    given[0] = given[0].mT.contiguous().mT
    found = backend.scan(*copy.copy(given), True)
    torch.testing.assert_close(found, selective_scan(*given, delta_softplus=True, backend="reference"))
