"""Visible tokens -> the pixels of patches."""

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from medxray.encoders import MaskableEncoder
from medxray.layers import MLP, Block, chosen, initialise, sincos_positions
from medxray.pretrain import Masking, PixelDecoder


class SelfAttentionDecoder(PixelDecoder):
    """MAE's: mask tokens put where tokens are missing, Transformer blocks over all of them, a linear layer.

    Args:
        dim: width of its blocks.
        depth: number of blocks.
        heads: attention heads.
    """

    def __init__(
        self,
        encoder: MaskableEncoder,
        dim: Annotated[int, Field(gt=0)] = 128,
        depth: Annotated[int, Field(gt=0)] = 2,
        heads: Annotated[int, Field(gt=0)] = 4,
    ) -> None:
        super().__init__()
        _check(dim, heads)
        self.position_grid: tuple[int, int] | None = getattr(encoder, "position_grid", None)
        self.decoder_embed = nn.Linear(encoder.width, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder_blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_pred = nn.Linear(dim, encoder.stride**2 * encoder.channels)
        initialise(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self, layers: Sequence[Tensor], masking: Masking, grid: tuple[int, int], targets: Tensor
    ) -> Tensor:
        x, restore = self.decoder_embed(layers[-1]), masking.restore
        B, visible, D = x.shape[0], x.shape[1] - 1, x.shape[2]
        missing = self.mask_token.to(x.dtype).expand(B, restore.shape[1] - visible, -1)
        tokens = chosen(torch.cat([x[:, 1:], missing], dim=1), restore)
        tokens = tokens + sincos_positions(D, *grid, tokens.device, self.position_grid).to(x.dtype)
        x = torch.cat([x[:, :1], tokens], dim=1)
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        # Behind the last block nothing asks for the others.
        x = self.decoder_blocks[-1](x, rows=1 + targets)
        patches: Tensor = self.decoder_pred(self.decoder_norm(x))
        return patches


class CrossAttention(nn.Module):
    """Queries of one width look at tokens of another, by the fused kernel that torch picks."""

    def __init__(self, dim: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(width, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """x (B, T, dim), seen (B, N, width) -> (B, T, dim)."""
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.kv(seen).chunk(2, dim=2))
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class CrossBlock(nn.Module):
    """Pre-norm cross-attention and MLP, each added to its input."""

    def __init__(self, dim: int, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.seen_norm = nn.LayerNorm(width, eps=1e-6)
        self.attn = CrossAttention(dim, width, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, 4 * dim)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """x (B, T, dim), seen (B, N, width) -> (B, T, dim)."""
        x = x + self.attn(self.norm1(x), self.seen_norm(seen))
        return x + self.mlp.after(self.norm2, x)


class CrossAttentionDecoder(PixelDecoder):
    """CrossMAE's (arXiv:2401.14391): each chosen token asks the visible ones, and no other, so that its cost grows with
    the number of tokens that are predicted. Every block reads a mix of its own of all the encoder's layers.

    Args:
        dim: width of its blocks.
        depth: number of blocks.
        heads: attention heads.
    """

    every_layer = True

    def __init__(
        self,
        encoder: MaskableEncoder,
        dim: Annotated[int, Field(gt=0)] = 128,
        depth: Annotated[int, Field(gt=0)] = 2,
        heads: Annotated[int, Field(gt=0)] = 4,
    ) -> None:
        super().__init__()
        _check(dim, heads)
        self.position_grid: tuple[int, int] | None = getattr(encoder, "position_grid", None)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.mix = nn.Parameter(torch.randn(depth, encoder.depth) * encoder.depth**-0.5)
        self.decoder_blocks = nn.ModuleList(CrossBlock(dim, encoder.width, heads) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_pred = nn.Linear(dim, encoder.stride**2 * encoder.channels)
        initialise(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self, layers: Sequence[Tensor], masking: Masking, grid: tuple[int, int], targets: Tensor
    ) -> Tensor:
        dim = self.mask_token.shape[2]
        positions = sincos_positions(dim, *grid, targets.device, self.position_grid)[0][targets]
        x = self.mask_token + positions.to(self.mask_token.dtype)
        mixed = torch.einsum("kl,lbnd->kbnd", self.mix.to(layers[-1].dtype), torch.stack(tuple(layers)))
        for block, seen in zip(self.decoder_blocks, mixed, strict=True):
            x = block(x, seen)
        patches: Tensor = self.decoder_pred(self.decoder_norm(x))
        return patches


class LinearDecoder(PixelDecoder):
    """One linear layer, as SimMIM's (arXiv:2111.09886): the encoder itself sees the whole grid, with learned pixels in place
    of masked patches, and so pays for every token."""

    def __init__(self, encoder: MaskableEncoder) -> None:
        super().__init__()
        pixels = encoder.stride**2 * encoder.channels
        self.mask_patch = nn.Parameter(torch.randn(1, 1, pixels) * 0.02)
        self.decoder_pred = nn.Linear(encoder.width, pixels)
        initialise(self)

    def forward(
        self, layers: Sequence[Tensor], masking: Masking, grid: tuple[int, int], targets: Tensor
    ) -> Tensor:
        patches: Tensor = self.decoder_pred(chosen(layers[-1], 1 + targets))
        return patches


def _check(dim: int, heads: int) -> None:
    if dim % heads or dim % 4:
        raise ValueError(f"dim must be divisible by heads and by 4, found dim {dim} and heads {heads}")
