"""What several rooms build from: the Transformer block of ViT and MAE, its positions and its initial values."""

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Attention(nn.Module):
    """Multi-head self-attention by the fused kernel that torch picks."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, angles: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """x (B, N, D) -> (B, N, D), or (B, T, D) of the tokens `rows` (B, T) alone, which look at all.

        `angles` as `rotary_positions` gives them, (N, d / 2) or (B, 1, N, d / 2) for heads of d channels, turn queries
        and keys; they go with no rows.
        """
        D = x.shape[2]
        # Split by channels, so that the gradients of all three are put side by side in one copy.
        if rows is None:
            parts = self.qkv(x).split(D, dim=2)
        else:
            weight, bias = self.qkv.weight.split([D, 2 * D]), self.qkv.bias.split([D, 2 * D])
            parts = (F.linear(chosen(x, rows), weight[0], bias[0]), *F.linear(x, weight[1], bias[1]).split(D, dim=2))
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        if angles is not None:
            q, k = _turned(q, angles), _turned(k, angles)
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


def chosen(x: Tensor, rows: Tensor) -> Tensor:
    """The tokens `rows` (B, T) of x (B, N, D)."""
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[2]))


class MLP(nn.Module):
    """Linear, GELU, linear.

    Attributes:
        recompute: whether `after` keeps nothing but its input for the backward pass.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out

    def after(self, norm: nn.Module, x: Tensor) -> Tensor:
        """x (..., D), normalised -> (..., D). Its hidden layer is most of what a block keeps: recomputing it costs a
        twelfth of a step or less."""
        if self.recompute and self.training and torch.is_grad_enabled():
            out: Tensor = checkpoint(lambda x: self(norm(x)), x, use_reentrant=False, preserve_rng_state=False)
            return out
        return self(norm(x))


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

    def forward(self, x: Tensor, angles: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """x (B, N, D) -> (B, N, D); `angles` and `rows` as in `Attention`."""
        branch = self.drop_path(self.ls1(self.attn(self.norm1(x), angles, rows)))
        x = branch + (x if rows is None else chosen(x, rows))
        out: Tensor = x + self.drop_path(self.ls2(self.mlp.after(self.norm2, x)))
        return out


@functools.lru_cache(maxsize=32)
def sincos_positions(
    width: int, h: int, w: int, device: torch.device, made_for: tuple[int, int] | None = None
) -> Tensor:
    """2-D sin-cos table (1, h * w, width) float32, as MAE's and the HD release's.

    The first half of the channels encodes the column x, the second the row y, each as
    [sin(p w_k), cos(p w_k)] with w_k = 10000^(-k / (width / 4)). Places are counted from 0, or, where weights were
    `made_for` another grid, lie where its own would: x at (x + 0.5) w_old / w - 0.5.
    """
    if width % 4:
        raise ValueError(f"width must be divisible by 4, found {width}")
    quarter = width // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = (place[:, None] * frequency for place in _places((h, w), made_for))
    x = torch.cat([columns.sin(), columns.cos()], 1)[None].expand(h, -1, -1)
    y = torch.cat([rows.sin(), rows.cos()], 1)[:, None].expand(-1, w, -1)
    return torch.cat([x, y], 2).reshape(1, h * w, width).float().to(device)


@functools.lru_cache(maxsize=32)
def rotary_positions(
    width: int, h: int, w: int, device: torch.device, made_for: tuple[int, int] | None = None
) -> Tensor:
    """2-D rotary angles (h * w, width / 2) float32 for heads of `width` (axial, arXiv:2403.13298).

    The first half of a head's pairs of channels turns with the column, the second with the row: pair k of each half by
    p 100^(-4k / width) at place p; `made_for` as in `sincos_positions`.
    """
    if width % 4:
        raise ValueError(f"width of a head must be divisible by 4, found {width}")
    quarter = width // 4
    frequency = 100.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = (place[:, None] * frequency for place in _places((h, w), made_for))
    x, y = columns[None].expand(h, -1, -1), rows[:, None].expand(-1, w, -1)
    return torch.cat([x, y], 2).reshape(h * w, 2 * quarter).float().to(device)


def _places(grid: tuple[int, int], made_for: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """Rows and columns of a grid, as those of `made_for` number the same image."""
    rows, columns = (
        (torch.arange(new, dtype=torch.float64) + 0.5) * (old / new) - 0.5
        for new, old in zip(grid, made_for or grid, strict=True)
    )
    return rows, columns


def resample_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A table of positions (1, h * w, D) for another grid: bicubic, antialiased, in float32 or better."""
    if old == new:
        return table
    maps = table.mT.unflatten(2, old).to(torch.promote_types(table.dtype, torch.float32))
    return F.interpolate(maps, new, mode="bicubic", antialias=True).flatten(2).mT.to(table.dtype)


def resize_kernel(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """A patch kernel (O, I, h, w) for patches of another size, as FlexiViT's (arXiv:2212.08013, section 3.3).

    With B the bilinear resize of a patch, the new kernel is pinv(B^T) w: a larger one makes of an enlarged patch exactly
    what the old one made of the patch, a smaller one comes as near as it can.
    """
    sides = []
    for old, new in zip(kernel.shape[2:], size, strict=True):
        image = torch.eye(old, dtype=torch.float64)[None, None]
        resize = F.interpolate(image, (new, old), mode="bilinear", antialias=True)[0, 0]
        sides.append(torch.linalg.pinv(resize.T))
    return (sides[0] @ kernel.double() @ sides[1].T).to(kernel.dtype)


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
