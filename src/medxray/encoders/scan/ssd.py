"""State-space duality (Mamba-2, arXiv:2405.21060): one decay a head, so that a chunk of steps is a product of matrices."""

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

    Within a chunk it is attention with decays for weights (section 6); between chunks the recurrence. Decays are only
    ever exponentials of differences that are not positive. Computed in float32, or in float64 where `x` is float64.

    Args:
        x: (B, L, H, P), H heads of P channels.
        delta: (B, L, H), the steps.
        A: (H), negative.
        B: (B, L, G, N), H / G heads a group.
        C: as B.
        D: (H), the skip, or None.
        delta_bias: (H), added to the steps, or None.
        delta_softplus: steps go through softplus after the bias.
        chunk: steps that are multiplied at once.

    Returns:
        (B, L, H, P) in the type of `x`.

    Raises:
        SpecError: shapes that do not belong together.
    """
    batch, length, heads, _ = x.shape
    groups, states = B.shape[2:]
    for name, tensor, expected in (
        ("delta", delta, (batch, length, heads)),
        ("A", A, (heads,)),
        ("B", B, (batch, length, groups, states)),
        ("C", C, (batch, length, groups, states)),
    ):
        if tensor.shape != expected or heads % groups:
            raise SpecError(
                f"ssd: {name} is {tuple(tensor.shape)}, expected {expected} beside x {tuple(x.shape)}, "
                f"with groups that divide the {heads} heads"
            )
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        u, delta, A, B, C = (tensor.to(dtype) for tensor in (x, delta, A, B, C))
        if delta_bias is not None:
            delta = delta + delta_bias.to(dtype)
        if delta_softplus:
            delta = F.softplus(delta)
        driven = u * delta[..., None]
        y = _chunks(driven, delta * A, B, C, min(chunk, length))
        if D is not None:
            y = y + D.to(dtype)[:, None] * u
    return y.to(x.dtype)


def _chunks(x: Tensor, exponent: Tensor, B: Tensor, C: Tensor, chunk: int) -> Tensor:
    """x (B, L, H, P), exponent (B, L, H), B and C (B, L, G, N) -> (B, L, H, P)."""
    length, groups = x.shape[1], B.shape[2]
    short = -length % chunk
    # Steps that are added keep the state and enter nothing.
    x, B, C = (F.pad(tensor, (0, 0, 0, 0, 0, short)).unflatten(1, (-1, chunk)) for tensor in (x, B, C))
    # (B, chunks, G, H / G, chunk): the exponent of the decay from the chunk's start to each of its steps.
    total = F.pad(exponent, (0, 0, 0, short)).unflatten(1, (-1, chunk)).cumsum(2).movedim(2, 3).unflatten(2, (groups, -1))
    x = x.unflatten(3, (groups, -1))
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    between = (total[..., :, None] - total[..., None, :]).masked_fill(later, float("-inf")).exp()
    weights = torch.einsum("bctgn,bcsgn->bcgts", C, B)[:, :, :, None] * between
    inside = torch.einsum("bcghts,bcsghp->bctghp", weights, x)
    # What each chunk adds to the state at its end, and the state at its start.
    left = (total[..., -1:] - total).exp()
    added = torch.einsum("bcsgn,bcghs,bcsghp->bcghpn", B, left, x)
    state = recur(total[..., -1].exp()[..., None, None].expand_as(added), added)
    before = F.pad(state[:, :-1], (0, 0) * (state.ndim - 2) + (1, 0))
    carried = torch.einsum("bctgn,bcghpn,bcght->bctghp", C, before, total.exp())
    return (inside + carried).flatten(1, 2).flatten(2, 3)[:, :length]
