"""Visible tokens -> the pixels of every patch."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from medxray.layers import Block, initialise, sincos_positions
from medxray.pretrain import PixelDecoder


class SelfAttentionDecoder(PixelDecoder):
    """MAE's: mask tokens put where tokens are missing, Transformer blocks over all of them, a linear layer.

    Args:
        dim: width of its blocks.
        depth: number of blocks.
        heads: attention heads.
    """

    def __init__(
        self,
        width: int,
        patch_pixels: int,
        dim: Annotated[int, Field(gt=0)] = 128,
        depth: Annotated[int, Field(gt=0)] = 2,
        heads: Annotated[int, Field(gt=0)] = 4,
    ) -> None:
        super().__init__()
        if dim % heads or dim % 4:
            raise ValueError(f"dim must be divisible by heads and by 4, found dim {dim} and heads {heads}")
        self.decoder_embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder_blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_pred = nn.Linear(dim, patch_pixels)
        initialise(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, encoded: Tensor, restore: Tensor, grid: tuple[int, int]) -> Tensor:
        x = self.decoder_embed(encoded)
        B, visible, D = x.shape[0], x.shape[1] - 1, x.shape[2]
        missing = self.mask_token.to(x.dtype).expand(B, restore.shape[1] - visible, -1)
        tokens = torch.cat([x[:, 1:], missing], dim=1).gather(1, restore[..., None].expand(-1, -1, D))
        tokens = tokens + sincos_positions(D, *grid, tokens.device).to(x.dtype)
        x = torch.cat([x[:, :1], tokens], dim=1)
        for block in self.decoder_blocks:
            x = block(x)
        patches: Tensor = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        return patches
