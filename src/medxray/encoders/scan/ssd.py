"""State-space duality (Mamba-2, arXiv:2405.21060): one decay a head, so that a chunk of steps is a product of matrices."""

import contextlib

import torch
from torch import Tensor
from torch.nn import functional as F

from medxray.encoders.scan.chunked import recur
from medxray.types import SpecError


def ssd(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    chunk: int = 64,
) -> Tensor:
    """h_t = exp(delta_t A) h_{t-1} + delta_t x_t B_t^T from h_0 = 0, and y_t = h_t C_t + D x_t, for every head.

    Within a chunk it is attention with decays for weights (section 6); between chunks the recurrence. Exponents of
    decays are sums of terms of one sign, never differences of sums, so that nothing overflows or cancels. Computed in
    float32, or in float64 where `x` is float64.

    Args:
        x: (B, L, H, P), H heads of P channels.
        delta: (B, L, H), the steps.
        A: (H), negative.
        B: (B, L, G, N), H / G heads a group.
        C: as B.
        D: (H), the skip, or None.
        delta_bias: (H), added to the steps, or None.
        delta_softplus: steps go through softplus after the bias.
        chunk: steps that are multiplied at once, at most.

    Returns:
        (B, L, H, P) in the type of `x`.

    Raises:
        SpecError: shapes that do not belong together.
    """
    _check(x, delta, A, B, C, D, delta_bias)
    dtype, groups = torch.promote_types(x.dtype, torch.float32), B.shape[2]
    with contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
        u, delta, A, B, C = (tensor.to(dtype) for tensor in (x, delta, A, B, C))
        if delta_bias is not None:
            delta = delta + delta_bias.to(dtype)
        if delta_softplus:
            delta = F.softplus(delta)
        driven, exponent = (u * delta[..., None]).unflatten(2, (groups, -1)), (delta * A).unflatten(2, (groups, -1))
        y = _chunks(driven, exponent, B, C, chunk).flatten(2, 3)
        if D is not None:
            y = y + D.to(dtype)[:, None] * u
    return y.to(x.dtype)


def _chunks(x: Tensor, exponent: Tensor, B: Tensor, C: Tensor, chunk: int) -> Tensor:
    """x (B, L, G, H, P), exponent (B, L, G, H), H the heads of a group, B and C (B, L, G, N) -> (B, L, G, H, P)."""
    length = x.shape[1]
    count = -(-length // chunk)
    size = -(-length // count)
    # Steps that are added keep the state and enter nothing. Then (B, chunks, G, size, ...).
    x, exponent, B, C = (
        F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, count * size - length)).unflatten(1, (count, size)).transpose(2, 3)
        for tensor in (x, exponent, B, C)
    )
    # [t, s] is the exponent of the decay from step s to step t: the sum over the steps after s up to t.
    steps = exponent.transpose(3, 4)[..., None].expand(*(-1,) * 5, size)
    later = torch.ones(size, size, dtype=torch.bool, device=x.device).triu()
    between = steps.masked_fill(later, 0).cumsum(4).masked_fill(later.triu(1), float("-inf")).exp()
    weights = (C @ B.mT)[:, :, :, None] * between
    inside = (weights @ x.transpose(3, 4)).transpose(3, 4)
    # What each chunk adds to the state at its end, and the state at its start: (B, chunks, G, N, H, P).
    to_end, from_start = between[..., -1, :].transpose(3, 4), exponent.cumsum(3).exp()
    added = (B.mT @ (x * to_end[..., None]).flatten(4)).unflatten(4, x.shape[4:])
    state = recur(from_start[:, :, :, -1:, :, None], added)
    before = F.pad(state[:, :-1], (0, 0) * 4 + (1, 0))
    carried = (C @ before.flatten(4)).unflatten(4, x.shape[4:]) * from_start[..., None]
    return (inside + carried).transpose(2, 3).flatten(1, 2)[:, :length]


def _check(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, bias: Tensor | None) -> None:
    """Raises SpecError that names the first tensor which does not belong to the others."""
    if x.ndim != 4 or not x.shape[1]:
        raise SpecError(f"ssd: x is {tuple(x.shape)}, expected (B, L, H, P) with at least one step")
    batch, length, heads, _ = x.shape
    if B.ndim != 4 or not B.shape[2] or heads % B.shape[2]:
        raise SpecError(
            f"ssd: B is {tuple(B.shape)}, expected ({batch}, {length}, G, N) with G dividing the {heads} heads of x"
        )
    shared = (batch, length, *B.shape[2:])
    for name, tensor, expected in (
        ("delta", delta, (batch, length, heads)),
        ("A", A, (heads,)),
        ("B", B, shared),
        ("C", C, shared),
        ("D", D, (heads,)),
        ("delta_bias", bias, (heads,)),
    ):
        if tensor is not None and tensor.shape != expected:
            raise SpecError(f"ssd: {name} is {tuple(tensor.shape)}, expected {expected} beside x {tuple(x.shape)}")
