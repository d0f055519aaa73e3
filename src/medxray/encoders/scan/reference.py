"""The selective scan as its definition reads: one step after the other. For tests; any floating type."""

import torch
from torch import Tensor
from torch.nn import functional as F


def missing() -> str | None:
    """Why this back-end does not run here; None where it does."""
    return None


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, bias: Tensor | None, softplus: bool,
) -> Tensor:  # fmt: skip
    """As every back-end's; see `medxray.encoders.scan`."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    x, delta, A, B, C = (tensor.to(dtype) for tensor in (u, delta, A, B, C))
    if bias is not None:
        delta = delta + bias.to(dtype)[:, None]
    if softplus:
        delta = F.softplus(delta)
    # (B, D, N, L): every channel of a group has the group's input and output maps.
    B, C = (m.repeat_interleave(u.shape[1] // m.shape[1], dim=1) for m in (B, C))
    decay = torch.exp(delta[:, :, None] * A[:, :, None])
    driven = delta[:, :, None] * B * x[:, :, None]
    state = torch.zeros_like(decay[..., 0])
    out = []
    for keep, enter, read in zip(decay.unbind(-1), driven.unbind(-1), C.unbind(-1), strict=True):
        state = keep * state + enter
        out.append((state * read).sum(-1))
    y = torch.stack(out, dim=-1)
    return (y if D is None else y + D.to(dtype)[:, None] * x).to(u.dtype)
