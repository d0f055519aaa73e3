"""The selective scan of Mamba (arXiv:2312.00752, S6) and the four directions in which VMamba runs it over a map."""

import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from medxray.encoders.scan import reference
from medxray.registry import nearest
from medxray.types import SpecError


def backends() -> dict[str, str | None]:
    """Name of each back-end -> why it does not run on this machine; None where it does."""
    return {"torch": None, "reference": None}


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

    Differentiable once in every tensor. Computed in float32, or in float64 where `u` is float64; the result has
    the type of `u`.

    Args:
        u: (B, D, L), the input.
        delta: (B, D, L), the steps.
        A: (D, N), negative.
        B: (B, N, L), or (B, G, N, L) for G groups of D / G channels.
        C: as B.
        D: (D), the skip, or None.
        delta_bias: (D), added to the steps, or None.
        delta_softplus: steps go through softplus after the bias.
        backend: "auto", or a name of `backends()`.

    Returns:
        (B, D, L).

    Raises:
        SpecError: an unknown back-end, or shapes that do not belong together.
    """
    if backend not in ("auto", *backends()):
        raise SpecError(
            f"selective scan: unknown backend {backend!r}{nearest(backend, backends())}; "
            f"take auto or one of {', '.join(backends())}"
        )
    B, C = (m[:, None] if m.ndim == 3 else m for m in (B, C))
    _check(u, delta, A, B, C)
    dtype = torch.promote_types(u.dtype, torch.float32)
    with torch.autocast(u.device.type, enabled=False):
        x, delta, A, B, C = (tensor.to(dtype) for tensor in (u, delta, A, B, C))
        D, delta_bias = (tensor if tensor is None else tensor.to(dtype) for tensor in (D, delta_bias))
        if backend == "reference":
            y = reference.selective_scan(x, delta, A, B, C, D, delta_bias, delta_softplus)
        else:
            if delta_bias is not None:
                delta = delta + delta_bias[:, None]
            delta = F.softplus(delta) if delta_softplus else delta
            y = _scan(x, delta, A, B, C)
            y = y if D is None else y + D[:, None] * x
    return y.to(u.dtype)


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


def _check(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> None:
    batch, channels, length = u.shape
    groups, states = B.shape[1], A.shape[-1]
    fits = (
        delta.shape == u.shape
        and A.shape == (channels, states)
        and B.shape == C.shape == (batch, groups, states, length)
        and channels % groups == 0
    )
    if not fits:
        named = {"u": u, "delta": delta, "A": A, "B": B, "C": C}
        found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in named.items())
        raise SpecError(
            "selective scan: expected u and delta (B, D, L), A (D, N), B and C (B, N, L) or (B, G, N, L) with G "
            f"dividing D, found {found}"
        )


def _scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """(B, D, L), (B, D, L), (D, N), (B, G, N, L), (B, G, N, L) -> (B, D, L), without skip."""
    groups, length = B.shape[1], u.shape[2]
    # Time goes second and channels last: (B, L, G, D / G), so that one step is one run of memory.
    u, delta = (x.transpose(1, 2).unflatten(2, (groups, -1)) for x in (u, delta))
    B, C = (x.permute(2, 0, 3, 1) for x in (B, C))
    chunk = 1 << round(math.log2(length) / 2)
    if missing := -length % chunk:
        u, delta = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (u, delta))
        B, C = (F.pad(x, (0, 0, 0, missing)) for x in (B, C))
    y: Tensor = _Scan.apply(  # type: ignore[no-untyped-call]
        u.contiguous(), delta.contiguous(), A.unflatten(0, (groups, -1)), B, C, chunk
    )
    return y[:, :length].flatten(2).transpose(1, 2)


class _Scan(torch.autograd.Function):
    """One state at a time; the backward pass recomputes the states, so that memory does not grow with N.

    u, delta (B, L, G, E); A (G, E, N); B, C (N, B, L, G).
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int) -> Tensor:
        ctx.save_for_backward(u, delta, A, B, C)
        ctx.chunk = chunk
        driven, y = delta * u, torch.zeros_like(u)
        for n in range(A.shape[-1]):
            states = _recur(torch.exp(delta * A[..., n]), driven * B[n, ..., None], chunk)
            y.addcmul_(states, C[n, ..., None])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C = ctx.saved_tensors
        gradient = gradient.contiguous()
        driven = delta * u
        of_driven, of_delta = torch.zeros_like(u), torch.zeros_like(u)
        of_A, of_B, of_C = torch.empty_like(A), torch.empty_like(B), torch.empty_like(C)
        for n in range(A.shape[-1]):
            decay = torch.exp(delta * A[..., n])
            states = _recur(decay.clone(), driven * B[n, ..., None], ctx.chunk)
            of_C[n] = (states * gradient).sum(-1)
            # The gradient of the states runs the same recurrence backwards, each with the decay of the step after it.
            of_states = _recur(decay.roll(-1, 1), gradient * C[n, ..., None], ctx.chunk, reverse=True)
            of_B[n] = (of_states * driven).sum(-1)
            of_driven.addcmul_(of_states, B[n, ..., None])
            of_exponent = of_states[:, 1:] * decay[:, 1:] * states[:, :-1]
            of_delta[:, 1:].addcmul_(of_exponent, A[..., n])
            of_A[..., n] = (of_exponent * delta[:, 1:]).sum((0, 1))
        return of_driven * delta, of_delta.addcmul_(of_driven, u), of_A, of_B, of_C, None


def _recur(decay: Tensor, x: Tensor, chunk: int, reverse: bool = False) -> Tensor:
    """x_t becomes x_t + decay_t x_{t-1}, in place, along dimension 1; both arguments are used up.

    All chunks go through their steps together, then each takes over the last state of the one before. Decays only
    ever multiply, so that nothing grows however long the sequence is.
    """
    length = x.shape[1]
    d, h = (tensor.view(len(tensor), length // chunk, chunk, -1) for tensor in (decay, x))
    inside, across = range(chunk), range(length // chunk)
    if reverse:
        inside, across = inside[::-1], across[::-1]
    for before, now in itertools.pairwise(inside):
        h[:, :, now].addcmul_(d[:, :, now], h[:, :, before])
        d[:, :, now].mul_(d[:, :, before])
    last = inside[-1]
    for before, now in itertools.pairwise(across):
        h[:, now].addcmul_(d[:, now], h[:, before, last, None])
    return x
