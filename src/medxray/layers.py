"""What several rooms build from: the Transformer block of ViT and MAE, its positions and its initial values."""

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head self-attention by the fused kernel that torch picks."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, angles: Tensor | None = None) -> Tensor:
        """x (B, N, D) -> (B, N, D); `angles` as `rotary_positions` gives them, (N, d / 2) or (B, 1, N, d / 2) for heads
        of d channels, turn queries and keys."""
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        if angles is not None:
            q, k = _turned(q, angles), _turned(k, angles)
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D))
        return out


class MLP(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class DropPath(nn.Module):
    """Leaves a residual branch out for some samples while training (stochastic depth)."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        """x (B, ...), each sample zero with probability `share`, the others scaled to the same mean."""
        if not self.training or self.share == 0:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.share
        return x * keep / (1 - self.share)


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual branch (arXiv:2103.17239)."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), start))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to its input, scaled where `layer_scale` is given."""

    def __init__(
        self, width: int, heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0, layer_scale: float | None = None
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, int(width * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.ls1, self.ls2 = (
            nn.Identity() if layer_scale is None else LayerScale(width, layer_scale) for _ in range(2)
        )

    def forward(self, x: Tensor, angles: Tensor | None = None) -> Tensor:
        """x (B, N, D) -> (B, N, D); `angles` as in `Attention`."""
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), angles)))
        out: Tensor = x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
        return out


@functools.lru_cache(maxsize=32)
def sincos_positions(width: int, h: int, w: int, device: torch.device) -> Tensor:
    """2-D sin-cos table (1, h * w, width) float32, as MAE's and the HD release's.

    The first half of the channels encodes the column x, the second the row y, each as
    [sin(p w_k), cos(p w_k)] with w_k = 10000^(-k / (width / 4)).
    """
    if width % 4:
        raise ValueError(f"width must be divisible by 4, found {width}")
    quarter = width // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    columns = torch.arange(w, dtype=torch.float64)[:, None] * frequency
    rows = torch.arange(h, dtype=torch.float64)[:, None] * frequency
    x = torch.cat([columns.sin(), columns.cos()], 1)[None].expand(h, -1, -1)
    y = torch.cat([rows.sin(), rows.cos()], 1)[:, None].expand(-1, w, -1)
    return torch.cat([x, y], 2).reshape(1, h * w, width).float().to(device)


@functools.lru_cache(maxsize=32)
def rotary_positions(width: int, h: int, w: int, device: torch.device) -> Tensor:
    """2-D rotary angles (h * w, width / 2) float32 for heads of `width` (axial, arXiv:2403.13298).

    The first half of a head's pairs of channels turns with the column, the second with the row: pair k of each half by
    p 100^(-4k / width) at place p.
    """
    if width % 4:
        raise ValueError(f"width of a head must be divisible by 4, found {width}")
    quarter = width // 4
    frequency = 100.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    x = (torch.arange(w, dtype=torch.float64)[:, None] * frequency)[None].expand(h, -1, -1)
    y = (torch.arange(h, dtype=torch.float64)[:, None] * frequency)[:, None].expand(-1, w, -1)
    return torch.cat([x, y], 2).reshape(h * w, 2 * quarter).float().to(device)


def _turned(x: Tensor, angles: Tensor) -> Tensor:
    """x (B, heads, N, d) with its pairs of neighbouring channels turned."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = angles.to(dtype).cos(), angles.to(dtype).sin()
    a, b = x.to(dtype).unflatten(3, (-1, 2)).unbind(4)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], 4).flatten(3).to(x.dtype)


def initialise(module: nn.Module) -> None:
    """MAE's: xavier-uniform for linear layers and the patch convolution seen as one, zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight.view(layer.weight.shape[0], -1))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
