"""The selective scan on the CPU: threads, memory and derivatives around the kernels of `cpu_kernels`.

A kernel walks a sequence, or a map in four directions, once for every block of channels. It reads each input where it
lies, so that directions are orders of reading and not copies, and keeps what it works on in the first-level cache. The
forward pass stores the states at the start of every tile of steps, 1/32 of all; the backward pass computes the others
again, because their decays are needed there anyway.
"""

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import torch
from torch import Tensor

from medxray.encoders.scan import cpu_kernels, operators
from medxray.encoders.scan.cpu_kernels import BLOCK, LANES, TILE

SPAN = 4
"""Blocks of neighbouring channels that take turns at every tile, so that a page of memory is not left after one line."""
SHARES = 16
"""Parts into which the blocks of channels are divided at most, each with its own sum for the gradients of B and C."""


def missing() -> str | None:
    """Why this back-end does not run here; None where it does."""
    return None


@functools.lru_cache(maxsize=2)
def _native(kernel: Callable[..., Any]) -> Any:
    """A kernel as a C function of one address, with the interpreter's lock released while it runs."""
    signature = numba.types.void(cpu_kernels.integers)
    try:
        return numba.cfunc(signature, cache=True, **cpu_kernels.OPTIONS)(kernel).ctypes
    except (RuntimeError, OSError):
        # No place for a cache, or none that can be written.
        return numba.cfunc(signature, **cpu_kernels.OPTIONS)(kernel).ctypes


@functools.lru_cache(maxsize=1)
def _team() -> Any:
    """OpenMP's own entry in the runtime that torch has loaded, or None. Threads of another pool would have to wait
    for those of torch, which go on spinning for a while after each of its operations."""
    try:
        entry = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    entry.argtypes, entry.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return entry


_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    # The threads of a parent do not live on in its child, and OpenMP would wait for them.
    os.register_at_fork(after_in_child=_after_fork)


def _run(kernel: Callable[..., Any], tasks: int, work: int, given: list[int]) -> None:
    """Runs a kernel, which takes its tasks one by one, on as many threads as torch uses here.

    Args:
        kernel: `cpu_kernels.forward` or `backward`.
        tasks: how many it has.
        work: numbers that each thread needs for itself.
        given: what the kernel reads: numbers, strides and addresses.
    """
    threads = max(1, min(1 if _forked else torch.get_num_threads(), tasks))
    own = torch.empty(threads * work)
    # The next seat, the next task, memory for whoever takes a seat.
    table = (ctypes.c_int64 * (3 + len(given)))(0, 0, own.data_ptr(), *given)
    function = _native(kernel)
    address = ctypes.addressof(table)
    if threads == 1:
        function(table)
    elif (team := _team()) is not None:
        team(ctypes.cast(function, ctypes.c_void_p), address, threads, 0)
    else:
        with ThreadPoolExecutor(threads - 1) as pool:
            others = [pool.submit(function, table) for _ in range(threads - 1)]
            function(table)
        for other in others:
            other.result()


@functools.lru_cache(maxsize=64)
def _orders(length: int, height: int, width: int) -> Tensor:
    """(K, L) places in the order in which each direction comes by them; one direction where height is 0."""
    places = torch.arange(length, device="cpu")
    if height == 0:
        return places[None]
    columns = places.view(height, width).T.reshape(-1)
    return torch.stack([places, columns, places.flip(0), columns.flip(0)])


def _at(tensor: Tensor) -> list[int]:
    return [tensor.data_ptr(), *tensor.stride()]


def _inputs(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, bias: Tensor | None,
    softplus: bool, orders: Tensor, groups: int, span: int,
) -> list[int]:  # fmt: skip
    """What both kernels read."""
    addresses = [A.data_ptr(), *(_zeros(len(A)).data_ptr() if x is None else x.data_ptr() for x in (D, bias))]
    batch, channels, _ = u.shape
    sizes = [*orders.shape, A.shape[1], batch, groups, channels // groups, span]
    return [*_at(u), *_at(delta), *_at(B), *_at(C), *addresses, int(softplus), orders.data_ptr(), *sizes]


@functools.lru_cache(maxsize=16)
def _zeros(count: int) -> Tensor:
    return torch.zeros(count, device="cpu")


def _laid_out(tensor: Tensor, channels_last: bool) -> Tensor:
    """(..., D, L) as it is where a kernel can read it, else copied with channels or steps innermost."""
    if tensor.stride(-2) == 1 and tensor.shape[-2] > 1:
        return tensor
    if tensor.stride(-1) == 1 and not channels_last:
        return tensor
    return tensor.mT.contiguous().mT if channels_last else tensor.contiguous()


def _empty_as(tensor: Tensor, channels_last: bool) -> Tensor:
    """(..., D, L) without gaps, channels innermost where they are or must be."""
    if channels_last or (tensor.stride(-2) == 1 and tensor.shape[-2] > 1):
        return tensor.new_empty(tensor.mT.shape).mT
    return tensor.new_empty(tensor.shape)


def _span(u: Tensor, blocks: int) -> int:
    """Blocks in a turn: one where a channel's steps are neighbours in memory, or where threads would go without."""
    return max(1, min(SPAN, blocks // (2 * torch.get_num_threads()))) if u.stride(1) == 1 else 1


def _counts(u: Tensor, B: Tensor, N: int, K: int) -> tuple[int, int, int]:
    """Groups a direction, blocks of channels a group, and numbers that hold the states at the start of every tile."""
    groups = B.shape[1] // K
    blocks = (u.shape[1] // groups + LANES - 1) // LANES
    tiles = (u.shape[2] + TILE - 1) // TILE
    return groups, blocks, u.shape[0] * groups * blocks * K * tiles * N * LANES


@torch.library.custom_op("medxray::scan_cpu", mutates_args=(), device_types="cpu")
def _scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, bias: Tensor | None,
    softplus: bool, height: int, width: int, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and, where `keep`, the states at the start of every tile. delta (B, K, D, L) for K directions."""
    u, delta = (_laid_out(x, height > 0) for x in (u, delta))
    A, orders = A.contiguous(), _orders(u.shape[2], height, width)
    groups, blocks, states = _counts(u, B, A.shape[1], len(orders))
    y, starts = _empty_as(u, height > 0), u.new_empty(states if keep else 0)
    if y.numel():
        span = _span(u, len(u) * groups * blocks)
        given = _inputs(u, delta, A, B, C, D, bias, softplus, orders, groups, span)
        work = 4 * BLOCK + 2 * span * (A.shape[1] + 1) * LANES
        _run(cpu_kernels.forward, len(u) * groups * -(-blocks // span), work, [*given, *_at(y), starts.data_ptr() if keep else 0])
    return y, starts


@_scan.register_fake
def _(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, bias: Tensor | None,
    softplus: bool, height: int, width: int, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    states = _counts(u, B, A.shape[1], 4 if height else 1)[2]
    return _empty_as(_laid_out(u, height > 0), height > 0), u.new_empty(states if keep else 0)


@torch.library.custom_op("medxray::scan_cpu_backward", mutates_args=(), device_types="cpu")
def _scan_backward(
    gradient: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    bias: Tensor | None, starts: Tensor, softplus: bool, height: int, width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of u, delta, A, B, C, D and the bias."""
    u, delta, gradient = (_laid_out(x, height > 0) for x in (u, delta, gradient))
    A, orders = A.contiguous(), _orders(u.shape[2], height, width)
    (batch, _, length), (rows, N), K = u.shape, A.shape, len(orders)
    groups, blocks, _ = _counts(u, B, N, K)
    shares = max(1, min(blocks, SHARES // (batch * groups)))
    of_u, of_delta = _empty_as(u, height > 0), _empty_as(delta, height > 0)
    of_A = u.new_zeros(batch, rows, N)
    of_B, of_C = u.new_zeros(2, shares, batch, K * groups, N, -(-length // TILE) * TILE)
    of_skip, of_bias = u.new_zeros(2, batch, rows)
    if u.numel():
        span = _span(u, batch * groups * blocks)
        given = _inputs(u, delta, A, B, C, D, bias, softplus, orders, groups, span)
        given += [*_at(gradient), starts.data_ptr(), shares, *_at(of_u), *_at(of_delta)]
        given += [x.data_ptr() for x in (of_A, of_B, of_C, of_skip, of_bias)]
        _run(cpu_kernels.backward, batch * groups * shares, 11 * BLOCK + LANES + span * (3 * N + 4) * LANES, given)
    sums = [x.sum(0)[..., :length] for x in (of_B, of_C)]
    if K > 1:
        # From the order of walking back to places.
        places = orders.argsort(1).repeat_interleave(groups, 0)[:, None].expand(batch, -1, N, -1)
        sums = [x.gather(3, places) for x in sums]
    return of_u, of_delta, of_A.sum(0), sums[0].contiguous(), sums[1].contiguous(), of_skip.sum(0), of_bias.sum(0)


@_scan_backward.register_fake
def _(
    gradient: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    bias: Tensor | None, starts: Tensor, softplus: bool, height: int, width: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    of_u, of_delta = (_empty_as(_laid_out(x, height > 0), height > 0) for x in (u, delta))
    rows = [A.new_empty(A.shape[0]) for _ in range(2)]
    return of_u, of_delta, A.new_empty(A.shape), B.new_empty(B.shape), C.new_empty(C.shape), *rows


operators.complete(_scan, _scan_backward)


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, bias: Tensor | None,
    softplus: bool, size: tuple[int, int] | None = None,
) -> Tensor:  # fmt: skip
    """As every back-end's; see `medxray.encoders.scan`."""
    rows = [None if tensor is None else tensor.float() for tensor in (D, bias)]
    y = operators.call(_scan, u.float(), delta.float(), A.float(), B.float(), C.float(), rows[0], rows[1], softplus, size)
    return y.to(u.dtype)
