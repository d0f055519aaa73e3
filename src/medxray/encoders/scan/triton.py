"""The selective scan on CUDA devices: two kernels of Triton, compiled when first used, no build step.

A program walks one direction of a block of channels, chunk by chunk: within a chunk all steps at once by an associative
scan, from chunk to chunk by the last state. It reads every input at its place in memory, whichever way it walks. The
forward pass keeps the states at the start of each chunk, the backward pass recomputes the others. A program writes its
own part of every sum, so that results do not hang on the order in which programs run.
"""

import contextlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from medxray.encoders.scan import operators

try:
    import triton
    import triton.language as tl
except ImportError:  # the back-end then says so

    class _Absent:
        """Stands where Triton would, so that this file can be read without it."""

        constexpr = Any

        @staticmethod
        def jit(function: Any) -> Any:
            return function

    triton = tl = _Absent

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CHANNELS, STEPS = 16, 64
"""Channels and steps of a tile, at most: one tile is 1,024 numbers, eight a thread."""


def missing() -> str | None:
    """Why this back-end does not run here; None where it does."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: it comes with a CUDA build of torch"
    if not torch.cuda.is_available() and not INTERPRETED:
        return "needs a CUDA device"
    return None


@triton.jit
def _after(keep_a, enter_a, keep_b, enter_b):  # type: ignore[no-untyped-def]
    """Two stretches of steps, one after the other."""
    return keep_a * keep_b, keep_b * enter_a + enter_b


@triton.jit
def _place(t, direction, height, width):  # type: ignore[no-untyped-def]
    """Where a direction is at step t: rows, columns, rows backwards, columns backwards."""
    t = tl.where(direction >= 2, height * width - 1 - t, t)
    return tl.where(direction % 2 == 1, (t % height) * width + t // height, t)


@triton.jit
def _softplus(x):  # type: ignore[no-untyped-def]
    """log(1 + e^x) = max(x, 0) + 2 artanh(s) with s = z / (2 + z), z = e^-|x|: exact however small."""
    z = tl.exp(-tl.abs(x))
    s = z / (2 + z)
    q = s * s
    series = 1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15)))
    return tl.maximum(x, 0) + 2 * s * (1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * series))))


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    u, delta, A, B, C, skip, bias, y, starts,
    u_b, u_c, u_l, d_b, d_k, d_c, d_l, B_b, B_g, B_n, B_l, C_b, C_g, C_n, C_l, y_b, y_k, y_c, y_l,
    directions, groups, channels, states, height, width,
    SOFTPLUS: tl.constexpr, SKIP: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr,
    BD: tl.constexpr, BL: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0), tl.program_id(1)
    blocks = tl.cdiv(channels, BD)
    b, k, g = (row // directions).to(tl.int64), row % directions, block // blocks
    own = block % blocks * BD + tl.arange(0, BD)
    here = own < channels
    c = (g * channels + own).to(tl.int64)
    r = k * groups * channels + c
    length, chunks = height * width, tl.cdiv(height * width, BL)
    n_all = tl.arange(0, BN)
    last = tl.arange(0, BL) == BL - 1
    h_all = tl.zeros((BD, BN), tl.float32)
    v_skip, v_bias = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
    if SKIP:
        v_skip = tl.load(skip + r, here, 0).to(tl.float32)
    if BIAS:
        v_bias = tl.load(bias + r, here, 0).to(tl.float32)
    from_B, from_C = B + b * B_b + (k * groups + g) * B_g, C + b * C_b + (k * groups + g) * C_g
    for chunk in range(chunks):
        t = chunk * BL + tl.arange(0, BL)
        inside = t < length
        place = _place(t, k, height, width).to(tl.int64)
        both = here[:, None] & inside[None]
        x = tl.load(u + b * u_b + c[:, None] * u_c + place[None] * u_l, both, 0).to(tl.float32)
        step = tl.load(delta + b * d_b + k * d_k + c[:, None] * d_c + place[None] * d_l, both, 0).to(tl.float32)
        step += v_bias[:, None]
        if SOFTPLUS:
            step = _softplus(step)
        step = tl.where(both, step, 0)
        total = v_skip[:, None] * x
        if KEEP:
            at = starts + ((b * directions + k) * chunks + chunk) * groups * channels * states
            tl.store(at + c[:, None] * states + n_all[None], h_all, here[:, None] & (n_all < states)[None])
        for n in range(states):
            a = tl.load(A + r * states + n, here, 0).to(tl.float32)
            v_B = tl.load(from_B + n * B_n + place * B_l, inside, 0).to(tl.float32)
            v_C = tl.load(from_C + n * C_n + place * C_l, inside, 0).to(tl.float32)
            keep, h = tl.associative_scan((tl.exp(step * a[:, None]), step * x * v_B[None]), 1, _after)
            h += keep * tl.sum(tl.where(n_all[None] == n, h_all, 0), 1)[:, None]
            total += v_C[None] * h
            h_all = tl.where(n_all[None] == n, tl.sum(tl.where(last[None], h, 0), 1)[:, None], h_all)
        tl.store(y + b * y_b + k * y_k + c[:, None] * y_c + place[None] * y_l, total, both)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    u, delta, A, B, C, skip, bias, grad, starts, of_u, of_delta, of_A, of_B, of_C, of_skip, of_bias,
    u_b, u_c, u_l, d_b, d_k, d_c, d_l, B_b, B_g, B_n, B_l, C_b, C_g, C_n, C_l, g_b, g_c, g_l,
    o_b, o_k, o_c, o_l, p_b, p_k, p_c, p_l,
    directions, groups, channels, states, height, width,
    SOFTPLUS: tl.constexpr, SKIP: tl.constexpr, BIAS: tl.constexpr,
    BD: tl.constexpr, BL: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0), tl.program_id(1)
    blocks = tl.cdiv(channels, BD)
    b, k, g = (row // directions).to(tl.int64), row % directions, block // blocks
    own = block % blocks * BD + tl.arange(0, BD)
    here = own < channels
    c = (g * channels + own).to(tl.int64)
    r = k * groups * channels + c
    length, chunks = height * width, tl.cdiv(height * width, BL)
    n_all = tl.arange(0, BN)
    first = tl.arange(0, BL) == 0
    gh_all, ga_all = tl.zeros((BD, BN), tl.float32), tl.zeros((BD, BN), tl.float32)
    v_skip, v_bias = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
    g_skip, g_bias = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
    if SKIP:
        v_skip = tl.load(skip + r, here, 0).to(tl.float32)
    if BIAS:
        v_bias = tl.load(bias + r, here, 0).to(tl.float32)
    from_B, from_C = B + b * B_b + (k * groups + g) * B_g, C + b * C_b + (k * groups + g) * C_g
    from_delta = delta + b * d_b + k * d_k + c[:, None] * d_c
    # A block's own sums for B and C: (batch, directions x groups, blocks, states, length).
    own_sum = (((b * directions + k) * groups + g) * blocks + block % blocks) * states * length
    for back in range(chunks):
        chunk = chunks - 1 - back
        t = chunk * BL + tl.arange(0, BL)
        inside = t < length
        place = _place(t, k, height, width).to(tl.int64)
        both = here[:, None] & inside[None]
        x = tl.load(u + b * u_b + c[:, None] * u_c + place[None] * u_l, both, 0).to(tl.float32)
        q = tl.load(grad + b * g_b + c[:, None] * g_c + place[None] * g_l, both, 0).to(tl.float32)
        raw = tl.load(from_delta + place[None] * d_l, both, 0).to(tl.float32) + v_bias[:, None]
        # The steps after these: the decay from each of these states to the next one.
        following = here[:, None] & (t + 1 < length)[None]
        beyond = _place(tl.where(t + 1 < length, t + 1, 0), k, height, width).to(tl.int64)
        after = tl.load(from_delta + beyond[None] * d_l, following, 0).to(tl.float32) + v_bias[:, None]
        step = raw
        if SOFTPLUS:
            step = _softplus(raw)
            after = _softplus(after)
        step = tl.where(both, step, 0)
        after = tl.where(following, after, 0)
        gx, gs = tl.zeros((BD, BL), tl.float32), tl.zeros((BD, BL), tl.float32)
        at = starts + ((b * directions + k) * chunks + chunk) * groups * channels * states
        for n in range(states):
            a = tl.load(A + r * states + n, here, 0).to(tl.float32)
            v_B = tl.load(from_B + n * B_n + place * B_l, inside, 0).to(tl.float32)
            v_C = tl.load(from_C + n * C_n + place * C_l, inside, 0).to(tl.float32)
            h_0 = tl.load(at + c * states + n, here, 0)
            enter = step * x * v_B[None]
            keep, h = tl.associative_scan((tl.exp(step * a[:, None]), enter), 1, _after)
            h += keep * h_0[:, None]
            decay = tl.exp(after * a[:, None])
            keep, gh = tl.associative_scan((decay, v_C[None] * q), 1, _after, reverse=True)
            gh += keep * tl.sum(tl.where(n_all[None] == n, gh_all, 0), 1)[:, None]
            gh_all = tl.where(n_all[None] == n, tl.sum(tl.where(first[None], gh, 0), 1)[:, None], gh_all)
            # What of a state comes from the one before it.
            exponent = tl.where(both, gh * (h - enter), 0)
            gx += gh * v_B[None]
            gs += exponent * a[:, None]
            ga_all += tl.where(n_all[None] == n, tl.sum(exponent * step, 1)[:, None], 0)
            tl.store(of_C + own_sum + n * length + place, tl.sum(q * h, 0), inside)
            tl.store(of_B + own_sum + n * length + place, tl.sum(gh * step * x, 0), inside)
        gs += gx * x
        if SOFTPLUS:
            z = tl.exp(-tl.abs(raw))
            gs *= tl.where(raw > 0, 1, z) / (1 + z)
        gs = tl.where(both, gs, 0)
        g_bias += tl.sum(gs, 1)
        g_skip += tl.sum(q * x, 1)
        tl.store(of_delta + b * p_b + k * p_k + c[:, None] * p_c + place[None] * p_l, gs, both)
        total = gx * step + q * v_skip[:, None]
        tl.store(of_u + b * o_b + k * o_k + c[:, None] * o_c + place[None] * o_l, total, both)
    own_row = b * directions * groups * channels + r
    tl.store(of_A + own_row[:, None] * states + n_all[None], ga_all, here[:, None] & (n_all < states)[None])
    tl.store(of_skip + own_row, g_skip, here)
    tl.store(of_bias + own_row, g_bias, here)


def _sizes(u: Tensor, B: Tensor, A: Tensor, height: int, width: int) -> tuple[dict[str, int], dict[str, int]]:
    """Numbers of things, and of a tile."""
    K = 4 if height else 1
    groups = B.shape[1] // K
    channels = u.shape[1] // groups
    counts = {"directions": K, "groups": groups, "channels": channels, "states": A.shape[1]}
    counts |= {"height": height or 1, "width": width or u.shape[2]}

    def power(most: int, count: int) -> int:
        return min(most, 1 << (count - 1).bit_length())

    tile = {"BD": power(CHANNELS, channels), "BL": max(16, power(STEPS, u.shape[2])), "BN": power(1 << 20, A.shape[1])}
    return counts, tile


def _empty_as(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """(..., D, L), channels innermost in memory where they are so in `tensor`."""
    if tensor.stride(-2) == 1 and tensor.shape[-2] > 1:
        return tensor.new_empty((*shape[:-2], shape[-1], shape[-2]), dtype=dtype).mT
    return tensor.new_empty(shape, dtype=dtype)


def _on(tensor: Tensor) -> Any:
    """Kernels start on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@torch.library.custom_op("medxray::scan_triton", mutates_args=())
def _scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, bias: Tensor | None,
    softplus: bool, height: int, width: int, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y, and the states at the start of every chunk where `keep`. delta (B, K, D, L) for K directions."""
    A = A.contiguous()
    counts, tile = _sizes(u, B, A, height, width)
    y, starts = _outputs(u, counts, tile, keep)
    parts = y if counts["directions"] == 1 else _empty_as(u, tuple(delta.shape), torch.float32)
    strides = parts.stride() if parts.ndim == 4 else (parts.stride(0), 0, *parts.stride()[1:])
    if y.numel():
        grid = (u.shape[0] * counts["directions"], counts["groups"] * -(-counts["channels"] // tile["BD"]))
        with _on(u):
            _forward[grid](
                u, delta, A, B, C, D, bias, parts, starts,
                *u.stride(), *delta.stride(), *B.stride(), *C.stride(), *strides, **counts,
                SOFTPLUS=softplus, SKIP=D is not None, BIAS=bias is not None, KEEP=keep, **tile,
            )  # fmt: skip
    return (y if parts is y else parts.sum(1).to(u.dtype)), starts


def _outputs(u: Tensor, counts: dict[str, int], tile: dict[str, int], keep: bool) -> tuple[Tensor, Tensor]:
    chunks = (u.shape[2] + tile["BL"] - 1) // tile["BL"]
    states = u.shape[0] * counts["directions"] * chunks * u.shape[1] * counts["states"] if keep else 0
    return _empty_as(u, tuple(u.shape), u.dtype), u.new_empty(states, dtype=torch.float32)


@_scan.register_fake
def _(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, bias: Tensor | None,
    softplus: bool, height: int, width: int, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _outputs(u, *_sizes(u, B, A, height, width), keep)


@torch.library.custom_op("medxray::scan_triton_backward", mutates_args=())
def _scan_backward(
    gradient: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    bias: Tensor | None, starts: Tensor, softplus: bool, height: int, width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of u, delta, A, B, C, D and the bias."""
    A = A.contiguous()
    counts, tile = _sizes(u, B, A, height, width)
    K, (batch, _, length), (rows, N) = counts["directions"], u.shape, A.shape
    blocks = -(-counts["channels"] // tile["BD"])
    one = K == 1
    of_u = _empty_as(u, tuple(u.shape) if one else tuple(delta.shape), u.dtype if one else torch.float32)
    of_delta = _empty_as(delta, tuple(delta.shape), delta.dtype)
    of_A = u.new_zeros(batch, rows, N, dtype=torch.float32)
    of_B, of_C = u.new_zeros(2, batch, B.shape[1], blocks, N, length, dtype=torch.float32)
    of_skip, of_bias = u.new_zeros(2, batch, rows, dtype=torch.float32)
    strides = (of_u.stride(0), 0, *of_u.stride()[1:]) if one else of_u.stride()
    if u.numel():
        with _on(u):
            _backward[(batch * K, counts["groups"] * blocks)](
                u, delta, A, B, C, D, bias, gradient, starts, of_u, of_delta, of_A, of_B, of_C, of_skip, of_bias,
                *u.stride(), *delta.stride(), *B.stride(), *C.stride(), *gradient.stride(), *strides,
                *of_delta.stride(), **counts,
                SOFTPLUS=softplus, SKIP=D is not None, BIAS=bias is not None, **tile,
            )  # fmt: skip
    sums = [part.sum(2).to(like.dtype) for part, like in ((of_B, B), (of_C, C))]
    single = [
        part.sum(0).to(A.dtype if like is None else like.dtype) for part, like in ((of_skip, D), (of_bias, bias))
    ]
    return of_u if one else of_u.sum(1).to(u.dtype), of_delta, of_A.sum(0).to(A.dtype), *sums, *single


@_scan_backward.register_fake
def _(
    gradient: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    bias: Tensor | None, starts: Tensor, softplus: bool, height: int, width: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    of_u, of_delta = (_empty_as(x, tuple(x.shape), x.dtype) for x in (u, delta))
    single = [A.new_empty(A.shape[0], dtype=A.dtype if like is None else like.dtype) for like in (D, bias)]
    return of_u, of_delta, A.new_empty(A.shape), B.new_empty(B.shape), C.new_empty(C.shape), *single


operators.complete(_scan, _scan_backward)


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, bias: Tensor | None,
    softplus: bool, size: tuple[int, int] | None = None,
) -> Tensor:  # fmt: skip
    """As every back-end's; see `medxray.encoders.scan`. Computed in float32 whatever the types of the tensors."""
    return operators.call(_scan, u, delta, A, B, C, D, bias, softplus, size)
