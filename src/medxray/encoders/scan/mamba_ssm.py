"""The selective scan by the CUDA kernels of mamba_ssm, where that package is installed."""

import importlib.util

import torch
from torch import Tensor


def missing() -> str | None:
    """Why this back-end does not run here; None where it does."""
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    if importlib.util.find_spec("mamba_ssm") is None:
        return "mamba-ssm is not installed: pip install 'medxray[mamba]'"
    return None


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, bias: Tensor | None, softplus: bool,
) -> Tensor:  # fmt: skip
    """As every back-end's; see `medxray.encoders.scan`. Its kernels want one type for u, delta, B and C."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    given = (tensor.to(u.dtype) for tensor in (delta, B, C))
    delta, B, C = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in given)
    u = u if u.stride(-1) == 1 else u.contiguous()
    single = [None if tensor is None else tensor.float() for tensor in (D, bias)]
    y: Tensor = selective_scan_fn(u, delta, A.float(), B, C, single[0], None, single[1], softplus)
    return y
