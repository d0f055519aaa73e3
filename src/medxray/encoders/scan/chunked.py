"""The selective scan in plain operations of torch: any device, any order of derivative, vmap, compilation, export."""

import math
from typing import Any

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
    dtype, groups = torch.promote_types(u.dtype, torch.float32), B.shape[1]
    x, delta, A, B, C = (tensor.to(dtype) for tensor in (u, delta, A, B, C))
    if bias is not None:
        delta = delta + bias.to(dtype)[:, None]
    if softplus:
        delta = F.softplus(delta)
    # Time goes second and channels last, (B, L, G, D / G), so that one step is one run of memory.
    sequences = (tensor.transpose(1, 2).unflatten(2, (groups, -1)).contiguous() for tensor in (x, delta))
    maps = (tensor.permute(2, 0, 3, 1) for tensor in (B, C))
    y: Tensor = _Scan.apply(*sequences, A.unflatten(0, (groups, -1)), *maps)  # type: ignore[no-untyped-call]
    y = y.flatten(2).transpose(1, 2)
    return (y if D is None else y + D.to(dtype)[:, None] * x).to(u.dtype)


class _Scan(torch.autograd.Function):
    """One state at a time; the backward pass recomputes the states, so that memory does not grow with N.

    u, delta (B, L, G, E); A (G, E, N); B, C (N, B, L, G). Each pass is made of operations that have a derivative
    themselves, so that there is a second one.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        driven = delta * u
        y = torch.zeros_like(u)
        for a, b, c in zip(A.unbind(-1), B.unbind(0), C.unbind(0), strict=True):
            y = y + recur(torch.exp(delta * a), driven * b[..., None]) * c[..., None]
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        u, delta, A, B, C = ctx.saved_tensors
        driven = delta * u
        of_driven, of_delta = torch.zeros_like(u), torch.zeros_like(u)
        of_A, of_B, of_C = [], [], []
        for a, b, c in zip(A.unbind(-1), B.unbind(0), C.unbind(0), strict=True):
            decay = torch.exp(delta * a)
            states = recur(decay, driven * b[..., None])
            # The gradient of the states runs the same recurrence backwards, each with the decay of the step after it.
            after = F.pad(decay[:, 1:], (0, 0, 0, 0, 0, 1))
            of_states = recur(after.flip(1), (gradient * c[..., None]).flip(1)).flip(1)
            of_exponent = of_states * decay * F.pad(states[:, :-1], (0, 0, 0, 0, 1, 0))
            of_driven = of_driven + of_states * b[..., None]
            of_delta = of_delta + of_exponent * a
            of_A.append((of_exponent * delta).sum((0, 1)))
            of_B.append((of_states * driven).sum(-1))
            of_C.append((states * gradient).sum(-1))
        of_delta = of_delta + of_driven * u
        return of_driven * delta, of_delta, torch.stack(of_A, -1), torch.stack(of_B), torch.stack(of_C)


def recur(decay: Tensor, x: Tensor) -> Tensor:
    """h_t = decay_t h_{t-1} + x_t along dimension 1.

    All chunks go through their steps together, then each takes over the last state of the one before. Decays only
    ever multiply, so that nothing grows however long the sequence is.
    """
    length = x.shape[1]
    chunk = 1 << round(math.log2(length) / 2)
    if short := -length % chunk:
        decay, x = (F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, short)) for tensor in (decay, x))
    kept: list[Tensor] = []
    state: list[Tensor] = []
    for d, step in zip(*(tensor.unflatten(1, (-1, chunk)).unbind(2) for tensor in (decay, x)), strict=True):
        kept.append(kept[-1] * d if kept else d)
        state.append(state[-1] * d + step if state else step)
    carry = [torch.zeros_like(state[-1][:, 0])]
    for d, last in zip(kept[-1].unbind(1)[:-1], state[-1].unbind(1)[:-1], strict=True):
        carry.append(carry[-1] * d + last)
    h = torch.stack(state, 2) + torch.stack(kept, 2) * torch.stack(carry, 1)[:, :, None]
    return h.flatten(1, 2)[:, :length]
