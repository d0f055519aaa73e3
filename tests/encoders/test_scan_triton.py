"""Triton's kernels against the definition in float64, by its interpreter where there is no CUDA device; and that they
compile for one in any case."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed; the dev extra has it where there is one for the platform")

from medxray.encoders.scan import cross_merge, cross_scan, scan_map, selective_scan

CUDA = torch.cuda.is_available()
EXACT = 2e-5


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def gradients(scan: Any, given: list[Tensor], backend: str, dtype: torch.dtype, softplus: bool = True) -> list[Tensor]:
    device = "cuda" if CUDA and backend == "triton" else "cpu"
    leaves = [tensor.detach().to(device, dtype).requires_grad_() for tensor in given]
    y = scan(*leaves, delta_softplus=softplus, backend=backend)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(y)
    return [tensor.cpu() for tensor in (y.detach(), *torch.autograd.grad((y * weights).sum(), leaves))]


def assert_exact(found: list[Tensor], expected: list[Tensor]) -> None:
    for name, one, other in zip(("y", "u", "delta", "A", "B", "C", "D", "bias"), found, expected, strict=True):
        error, size = (one.double() - other).abs().max().item(), other.abs().max().item()
        assert one.isfinite().all() and error <= EXACT * size + 1e-30, f"{name}: {error / size:.1e}"


def sequences(D: int, L: int, N: int, G: int, scale: float = 1.0) -> list[Tensor]:
    torch.manual_seed(L * 100 + N)
    A = -torch.rand(D, N, dtype=torch.float64) * 4 - 0.01
    given = [draw(2, D, L), draw(2, D, L) * scale, A, draw(2, G, N, L), draw(2, G, N, L), draw(D), draw(D)]
    return [tensor.float().double() for tensor in given]


def maps(D: int, H: int, W: int, N: int) -> list[Tensor]:
    torch.manual_seed(H * 100 + W)
    A = -torch.rand(4 * D, N, dtype=torch.float64) * 4 - 0.01
    image, delta = draw(2, H, W, D).permute(0, 3, 1, 2), draw(2, 4, H, W, D).permute(0, 1, 4, 2, 3)
    return [image, delta, A, draw(2, 4, N, H, W), draw(2, 4, N, H, W), draw(4 * D), draw(4 * D)]


@pytest.mark.parametrize(
    ("D", "L", "N", "G"),
    [(20, 1, 1, 1), (20, 31, 1, 1), (20, 64, 1, 2), (36, 150, 1, 2), (12, 66, 3, 2), (8, 31, 4, 4), (4, 70, 16, 1)],
)
def test_sequences(D: int, L: int, N: int, G: int) -> None:
    given = sequences(D, L, N, G)
    assert_exact(
        gradients(selective_scan, given, "triton", torch.float32),
        gradients(selective_scan, given, "reference", torch.float64),
    )


@pytest.mark.parametrize("scale", [1e-6, 30.0, 1e4])
def test_extreme_steps(scale: float) -> None:
    given = sequences(4, 150, 2, 1, scale)
    assert_exact(
        gradients(selective_scan, given, "triton", torch.float32),
        gradients(selective_scan, given, "reference", torch.float64),
    )


@pytest.mark.parametrize(("which", "value"), [(0, 0.0), (1, 0.0), (3, 0.0), (0, 1e18), (4, -1e15)])
def test_zeros_and_huge_inputs(which: int, value: float) -> None:
    given = sequences(4, 70, 2, 1)
    given[which] = (given[which] * value).float().double()
    assert_exact(
        gradients(selective_scan, given, "triton", torch.float32),
        gradients(selective_scan, given, "reference", torch.float64),
    )


@pytest.mark.parametrize(("D", "H", "W", "N"), [(2, 1, 1, 1), (20, 7, 5, 1), (3, 9, 12, 2)])
def test_maps(D: int, H: int, W: int, N: int) -> None:
    given = maps(D, H, W, N)
    expected = gradients(scan_map, given, "reference", torch.float64)
    assert_exact(gradients(scan_map, given, "triton", torch.float32), expected)
    contiguous = [tensor.contiguous() for tensor in given]
    assert_exact(gradients(scan_map, contiguous, "triton", torch.float32), expected)


def test_the_map_is_four_scans() -> None:
    given = [tensor.float() for tensor in maps(4, 5, 6, 1)]
    u, delta, A, B, C, D, bias = given

    def walked(places: Tensor) -> Tensor:
        return torch.stack([cross_scan(places[:, k])[:, k] for k in range(4)], 1)

    y = selective_scan(cross_scan(u).flatten(1, 2), walked(delta).flatten(1, 2), A, walked(B), walked(C), D, bias, True)
    device = "cuda" if CUDA else "cpu"
    found = scan_map(*(tensor.to(device) for tensor in given), delta_softplus=True, backend="triton")
    torch.testing.assert_close(found.cpu(), cross_merge(y.unflatten(1, (4, 4)), 5, 6), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    given = [tensor.to(dtype) for tensor in sequences(20, 70, 2, 1)]
    found = gradients(selective_scan, given, "triton", dtype)
    expected = gradients(selective_scan, [t.double() for t in given], "reference", torch.float64)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).abs().max() <= 2 * torch.finfo(dtype).eps * other.abs().max()


def test_layouts_and_what_is_left_out() -> None:
    u, delta, A, B, C, *_ = (tensor.float().to("cuda" if CUDA else "cpu") for tensor in sequences(20, 40, 2, 1))
    expected = selective_scan(u.cpu(), delta.cpu().exp(), A.cpu(), B.cpu(), C.cpu(), backend="reference")
    last = [tensor.mT.contiguous().mT for tensor in (u, delta.exp())]
    for steps in ([u, delta.exp()], last, [last[0], delta.exp()]):
        y = selective_scan(*steps, A.T.contiguous().T, B[:, 0], C[:, 0], backend="triton")
        torch.testing.assert_close(y.cpu(), expected, rtol=1e-4, atol=1e-4)


COMPILE = """
import time, tempfile, os
os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from medxray.encoders.scan import triton as ours
started = time.perf_counter()
for kernel, names in ((ours._forward, "y starts"), (ours._backward, "grad starts of_u of_delta of_A of_B of_C of_skip of_bias")):
    for dtype in ("fp32", "bf16"):
        for states in (1, 16):
            constants = {"SOFTPLUS": True, "SKIP": True, "BIAS": True, "BD": 16, "BL": 64, "BN": states}
            if kernel is ours._forward:
                constants["KEEP"] = True
            single = {"A", "skip", "bias", "starts", "of_A", "of_B", "of_C", "of_skip", "of_bias"}
            pointers = {"u", "delta", "B", "C", *names.split()} | single
            signature = {}
            for name in kernel.arg_names:
                if name in constants:
                    signature[name] = "constexpr"
                elif name in pointers:
                    signature[name] = "*fp32" if name in single else f"*{dtype}"
                else:
                    signature[name] = "i32"
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
            assert ".visible .entry" in made.asm["ptx"] and made.asm["cubin"]
print(time.perf_counter() - started)
"""


def test_kernels_compile_for_a_gpu() -> None:
    """Both passes, two types, one state and sixteen, for compute capability 9.0, from an empty cache."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout) < 60
