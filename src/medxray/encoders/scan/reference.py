"""The selective scan as its definition reads: one step after the other. For tests; any floating type."""

import torch
from torch import Tensor
from torch.nn import functional as F


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """As `medxray.encoders.scan.selective_scan`, in the type of its arguments."""
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    B, C = (m[:, None] if m.ndim == 3 else m for m in (B, C))
    channels = u.shape[1] // B.shape[1]
    # (B, D, N, L): every channel of a group has the group's input and output maps.
    B, C = (m.repeat_interleave(channels, dim=1) for m in (B, C))
    decay = torch.exp(delta[:, :, None] * A[:, :, None])
    driven = delta[:, :, None] * B * u[:, :, None]
    state = torch.zeros_like(decay[..., 0])
    out = []
    for t in range(u.shape[2]):
        state = decay[..., t] * state + driven[..., t]
        out.append((state * C[..., t]).sum(-1))
    y = torch.stack(out, dim=-1)
    return y if D is None else y + D[:, None] * u
