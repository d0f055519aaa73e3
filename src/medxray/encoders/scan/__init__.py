"""The selective scan of Mamba (arXiv:2312.00752, S6) and the four directions in which VMamba runs it over a map.

Every back-end is a module with `missing()`, why it does not run here, and `scan(u, delta, A, B, C, D, bias, softplus)`;
those named in `FUSED` take a map's size as well, with delta (B, 4, D, L), and walk it in four directions without copies.
"""

import contextlib
import importlib
from typing import Any

import torch
from torch import Tensor

from medxray.registry import nearest
from medxray.types import SpecError

BACKENDS = {"cpu": "cpu", "triton": "triton", "mamba-ssm": "mamba_ssm", "torch": "chunked", "reference": "reference"}
"""Name -> module in this package."""
FUSED = ("cpu", "triton")


def backends() -> dict[str, str | None]:
    """Name of each back-end -> why it does not run on this machine; None where it does."""
    return {name: _missing(name) for name in BACKENDS}


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    backend: str = "auto",
) -> Tensor:
    """h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t from h_0 = 0, and y_t = <C_t, h_t> + D u_t.

    Differentiable in every tensor; twice with backend "torch" or "reference". Computed in float32, or in float64 where
    `u` is float64. Tensors need not be contiguous.

    Args:
        u: (B, D, L), the input.
        delta: (B, D, L), the steps.
        A: (D, N), negative.
        B: (B, N, L), or (B, G, N, L) for G groups of D / G channels.
        C: as B.
        D: (D), the skip, or None.
        delta_bias: (D), added to the steps, or None.
        delta_softplus: steps go through softplus after the bias.
        backend: "auto", which goes by the device, or a name of `backends()`.

    Returns:
        (B, D, L) in the type of `u`.

    Raises:
        SpecError: a back-end that is unknown or does not run here; tensors that do not belong together.
    """
    B, C = (m[:, None] if m.ndim == 3 else m for m in (B, C))
    _check(u, delta, A, B, C, D, delta_bias)
    with _as_given(u):
        name = _choose(backend, u)
        y: Tensor = _scan(name)(u, delta, A, B, C, D, delta_bias, delta_softplus)
    return y


def scan_map(
    maps: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The selective scan of a map in VMamba's four directions, each put back in place, summed.

    The same as `cross_merge(selective_scan(cross_scan(maps), ...))`, with steps, input and output maps given at their
    places and not in the order of walking. Back-ends "cpu" and "triton" make no copy a direction.

    Args:
        maps: (B, D, H, W); fastest with channels innermost in memory.
        delta: (B, 4, D, H, W), as `maps`.
        A: (4 D, N), negative.
        B: (B, 4, N, H, W).
        C: as B.
        D: (4 D), the skip, or None.
        delta_bias: (4 D), added to the steps, or None.
        delta_softplus: steps go through softplus after the bias.
        backend: "auto", which goes by the device, or a name of `backends()`.

    Returns:
        (B, D, H, W) in the type of `maps`.

    Raises:
        SpecError: as `selective_scan`.
    """
    if maps.ndim != 4:
        raise SpecError(f"selective scan: maps is {tuple(maps.shape)}, expected (B, D, H, W)")
    height, width = maps.shape[2:]
    u, delta, B, C = maps.flatten(2), delta.flatten(-2), B.flatten(-2), C.flatten(-2)
    _check(u, delta, A, B, C, D, delta_bias, directions=4)
    with _as_given(u):
        name = _choose(backend, u)
        if name in FUSED:
            y: Tensor = _scan(name)(u, delta, A, B, C, D, delta_bias, delta_softplus, (height, width))
            return y.unflatten(2, (height, width))
        sequences = cross_scan(maps).flatten(1, 2)
        delta, B, C = (_in_order(m, height, width) for m in (delta, B, C))
        y = _scan(name)(sequences, delta.flatten(1, 2), A, B, C, D, delta_bias, delta_softplus)
    return cross_merge(y.unflatten(1, (4, -1)), height, width)


def cross_scan(maps: Tensor) -> Tensor:
    """The four ways through a map: row by row, column by column, and both backwards.

    Args:
        maps: (B, C, H, W).

    Returns:
        (B, 4, C, H * W), channels innermost in memory.
    """
    rows = maps.permute(0, 2, 3, 1).flatten(1, 2)
    columns = maps.permute(0, 3, 2, 1).flatten(1, 2)
    forward = torch.stack([rows, columns], dim=2)
    return torch.cat([forward, forward.flip(1)], dim=2).permute(0, 2, 3, 1)


def cross_merge(sequences: Tensor, height: int, width: int) -> Tensor:
    """Puts the sequences of `cross_scan` back in place and adds them up.

    Args:
        sequences: (B, 4, C, height * width).

    Returns:
        (B, C, height, width), channels innermost in memory.
    """
    both = sequences[:, :2] + sequences[:, 2:].flip(3)
    rows = both[:, 0].unflatten(2, (height, width))
    columns = both[:, 1].unflatten(2, (width, height))
    merged: Tensor = rows + columns.transpose(2, 3)
    return merged


def _in_order(places: Tensor, height: int, width: int) -> Tensor:
    """(B, 4, C, L) at their places -> each direction in its order of walking."""
    columns = places[:, 1::2].unflatten(3, (height, width)).transpose(3, 4).flatten(3)
    return torch.stack([places[:, 0], columns[:, 0], places[:, 2].flip(2), columns[:, 1].flip(2)], 1)


def _as_given(u: Tensor) -> Any:
    """A context in which torch does not change types by itself; the meta device has none that could."""
    return contextlib.nullcontext() if u.device.type == "meta" else torch.autocast(u.device.type, enabled=False)


@torch.compiler.assume_constant_result
def _missing(name: str) -> str | None:
    why: str | None = importlib.import_module(f"{__name__}.{BACKENDS[name]}").missing()
    return why


def _scan(name: str) -> Any:
    """The function of a back-end, imported when first used; in a form that torch.compile can follow."""
    if name == "cpu":
        from medxray.encoders.scan import cpu

        return cpu.scan
    if name == "triton":
        from medxray.encoders.scan import triton

        return triton.scan
    if name == "mamba-ssm":
        from medxray.encoders.scan import mamba_ssm

        return mamba_ssm.scan
    if name == "torch":
        from medxray.encoders.scan import chunked

        return chunked.scan
    from medxray.encoders.scan import reference

    return reference.scan


def _choose(backend: str, u: Tensor) -> str:
    """The back-end that `backend` means for a tensor."""
    if backend == "auto":
        # Transforms and exported programs need plain operations; so do doubles, which the kernels do not have.
        plain = u.dtype == torch.float64 or torch.compiler.is_exporting() or _transformed()
        if plain or u.device.type not in ("cpu", "cuda", "meta"):
            return "torch"
        if u.device.type != "cuda":
            return "cpu"
        return next((name for name in ("triton", "mamba-ssm") if _missing(name) is None), "torch")
    if backend not in BACKENDS:
        raise SpecError(
            f"selective scan: unknown backend {backend!r}{nearest(backend, BACKENDS)}; "
            f"take auto or one of {', '.join(BACKENDS)}"
        )
    if reason := _missing(backend):
        raise SpecError(f"selective scan: backend {backend!r} does not run here: {reason}; take auto")
    if backend not in ("torch", "reference"):
        device = "cpu" if backend == "cpu" else "cuda"
        interpreted = backend == "triton" and not torch.cuda.is_available()
        if u.dtype == torch.float64 or (u.device.type != device and not interpreted):
            raise SpecError(
                f"selective scan: backend {backend!r} takes float32, bfloat16 or float16 on {device}, found u in "
                f"{str(u.dtype).removeprefix('torch.')} on {u.device}; take auto, or backend torch"
            )
    return backend


def _transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None  # type: ignore[attr-defined]


def _check(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, bias: Tensor | None,
    directions: int = 1,
) -> None:  # fmt: skip
    """Raises SpecError that names the first tensor which does not belong to the others."""
    tensors = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "delta_bias": bias}
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def wrong(name: str, expected: str, found: object) -> SpecError:
        return SpecError(f"selective scan: {name} is {found}, expected {expected}")

    for name, tensor in given.items():
        if not tensor.is_floating_point():
            raise wrong(name, "floating-point numbers", str(tensor.dtype).removeprefix("torch."))
        if tensor.device != u.device:
            raise wrong(name, f"on {u.device} as u", f"on {tensor.device}")
    if u.ndim != 3:
        raise wrong("u", "(B, D, L)", tuple(u.shape))
    batch, channels, length = u.shape
    rows = directions * channels
    if A.ndim != 2:
        raise wrong("A", f"({rows}, N)", tuple(A.shape))
    if B.ndim != 4:
        raise wrong("B", f"({batch}, N, {length}) or ({batch}, G, N, {length})", tuple(B.shape))
    groups, states = B.shape[1], A.shape[1]
    if channels % groups if directions == 1 else groups != directions:
        what = f"G dividing the {channels} channels of u" if directions == 1 else f"{directions} directions"
        raise wrong("B", f"({batch}, G, {states}, {length}) with {what}", tuple(B.shape))
    expected: dict[str, tuple[int, ...]] = {
        "delta": (batch, rows, length) if directions == 1 else (batch, directions, channels, length),
        "A": (rows, states),
        "B": (batch, groups, states, length),
        "C": (batch, groups, states, length),
        "D": (rows,),
        "delta_bias": (rows,),
    }
    for name, shape in expected.items():
        if name in given and given[name].shape != shape:
            raise wrong(name, f"{shape} beside u {tuple(u.shape)} and A {tuple(A.shape)}", tuple(given[name].shape))
    if not length:
        raise wrong("u", "at least one step", tuple(u.shape))
    # On a GPU a look at the values would wait for the device; a program that is traced has none.
    if A.device.type == "cpu" and not torch.compiler.is_compiling() and not _transformed():
        finite = A.detach().isfinite()
        if not finite.all():
            raise wrong("A", "finite numbers", f"not finite in {int((~finite).sum())} of {A.numel()} places")


__all__ = ["backends", "cross_merge", "cross_scan", "scan_map", "selective_scan"]
