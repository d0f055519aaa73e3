"""The Vision Transformer of MAE and timm, with fixed positions, sin-cos or rotary, for any grid."""

import itertools
from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from medxray.encoders import MaskableEncoder
from medxray.layers import Block, initialise, rotary_positions, sincos_positions
from medxray.types import Features, SpecError

SIZES: dict[str, tuple[int, int, int]] = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
"""name -> width, depth, heads."""


class PatchEmbed(nn.Module):
    """One convolution whose stride is the patch, or a smaller step, so that patches overlap."""

    def __init__(self, channels: int, width: int, patch: int, step: int | None = None) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, step or patch)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> tokens (B, N, D), row by row."""
        tokens: Tensor = self.proj(images).flatten(2).transpose(1, 2)
        return tokens


class ConvolutionStem(nn.Module):
    """3 x 3 convolutions that halve the map until a cell is a patch, with a second one at each width but the first
    (after Xiao et al., "Early Convolutions Help Transformers See Better", NeurIPS 2021)."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        halvings = patch.bit_length() - 1
        if 2**halvings != patch or patch < 2:
            raise ValueError(f"stem: convolutions needs a patch that is a power of two, found {patch}")
        widths = [channels, *(max(8, width >> (halvings - 1 - i)) for i in range(halvings))]
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(itertools.pairwise(widths)):
            for narrow, stride in ((before, 2), (after, 1)) if i else ((before, 2),):
                layers += [
                    nn.Conv2d(narrow, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)
                ]  # fmt: skip
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> tokens (B, N, D), row by row."""
        # Channels innermost in memory: a fifth faster on a CPU. Images of one channel would not keep it.
        maps = self.layers[0](images).contiguous(memory_format=torch.channels_last)
        tokens: Tensor = self.layers[1:](maps).flatten(2).transpose(1, 2)
        return tokens


class HDStem(nn.Module):
    """The HD X-ray MAE's (arXiv:2404.17926, its release): a convolution over every 16 pixels, one over the cells of a
    patch, one of a single cell, ReLU between them. A token sees its own pixels only. Keys are the release's."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        if patch % 16:
            raise ValueError(f"stem: hd needs a patch that is a multiple of 16, such as its own 64, found {patch}")
        self.conv1 = nn.Conv2d(channels, width, 16, 16)
        self.conv2 = nn.Conv2d(width, width, patch // 16, patch // 16)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> tokens (B, N, D), row by row."""
        tokens: Tensor = self.proj(F.relu(self.conv2(F.relu(self.conv1(images))))).flatten(2).transpose(1, 2)
        return tokens


class ViT(MaskableEncoder):
    """Vision Transformer with a class token; keys as MAE's and timm's, so that their weights load.

    Pooled is the mean of the patch tokens.

    Args:
        size: tiny, small, base, large or huge; explicit numbers stand in place of its own.
        width: D; 192 where no size is given.
        depth: number of blocks; 6 where no size is given.
        heads: attention heads; 3 where no size is given.
        patch: pixels a side of a token.
        stem: how pixels become tokens: linear as in ViT; hd, the HD X-ray MAE's, made for patches of 64; or
            convolutions, which learn from far fewer images, and blocks then start as the identity.
        positions: sincos, added to the tokens, or rope, which turns queries and keys of every block by row and column.
        registers: tokens beside the class token that belong to no patch (arXiv:2309.16588); they are not handed on.
        layer_scale: what a learned factor for each channel of every branch starts from, such as 1.0e-5; None has none.
        channels: C of the images.
        mlp_ratio: hidden width of the MLP over D.
        drop_path: share of samples that skip the last block's branches while training; rises with depth.
        gradient_checkpointing: recompute activations to save memory.
    """

    def __init__(
        self,
        size: Literal["tiny", "small", "base", "large", "huge"] | None = None,
        width: Annotated[int, Field(gt=0)] | None = None,
        depth: Annotated[int, Field(gt=0)] | None = None,
        heads: Annotated[int, Field(gt=0)] | None = None,
        patch: Annotated[int, Field(gt=0)] = 16,
        stem: Literal["linear", "hd", "convolutions"] = "linear",
        positions: Literal["sincos", "rope"] = "sincos",
        registers: Annotated[int, Field(ge=0)] = 0,
        layer_scale: Annotated[float, Field(gt=0)] | None = None,
        channels: Annotated[int, Field(gt=0)] = 1,
        mlp_ratio: Annotated[float, Field(gt=0)] = 4.0,
        drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        base = SIZES[size] if size else (192, 6, 3)
        width, depth, heads = (given or own for given, own in zip((width, depth, heads), base, strict=True))
        if width % heads or width % 4:
            raise ValueError(f"width must be divisible by heads and by 4, found width {width} and heads {heads}")
        if positions == "rope" and width // heads % 4:
            raise ValueError(f"positions: rope needs width / heads divisible by 4, found {width} / {heads}")
        self.width, self.stride, self.channels = width, patch, channels
        self.turned, self.registers = width // heads if positions == "rope" else 0, registers
        self.gradient_checkpointing, self.depth = gradient_checkpointing, depth
        self.overlapping = stem == "convolutions"
        if not self.overlapping:
            self.patch_embed: nn.Module = (HDStem if stem == "hd" else PatchEmbed)(channels, width, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        if registers:
            self.reg_token = nn.Parameter(torch.zeros(1, registers, width))
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, rate, layer_scale) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        initialise(self)
        nn.init.normal_(self.cls_token, std=0.02)
        if registers:
            nn.init.normal_(self.reg_token, std=0.02)
        if self.overlapping:
            # Keeps torch's initial values: with xavier's, which are larger, batch norm makes its steps too small.
            self.patch_embed = ConvolutionStem(channels, width, patch)
            for name, parameter in self.blocks.named_parameters():
                if name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
                    nn.init.zeros_(parameter)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return whole_patches(height, width, self.stride)

    def embed(self, images: Tensor) -> Tensor:
        h, w = self.grid(images.shape[2], images.shape[3])
        tokens: Tensor = self.patch_embed(images)
        if self.turned:
            return tokens
        return tokens + sincos_positions(self.width, h, w, tokens.device).to(tokens.dtype)

    def encode(self, tokens: Tensor, grid: tuple[int, int], keep: Tensor | None = None) -> Tensor:
        for x in self._layers(tokens, grid, keep):
            last = x
        out: Tensor = self.norm(last)
        return out

    def encode_layers(self, tokens: Tensor, grid: tuple[int, int], keep: Tensor | None = None) -> list[Tensor]:
        *layers, last = self._layers(tokens, grid, keep)
        return [*layers, self.norm(last)]

    def _layers(self, tokens: Tensor, grid: tuple[int, int], keep: Tensor | None) -> Iterator[Tensor]:
        """The class token and the patches after each block, (B, 1 + n, D)."""
        # The class token's position is zero, and so are the registers'.
        single = torch.cat([self.cls_token, self.reg_token], 1) if self.registers else self.cls_token
        x = torch.cat([single.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens], dim=1)
        angles = None
        if self.turned:
            table = rotary_positions(self.turned, *grid, tokens.device)
            angles = F.pad(table if keep is None else table[keep][:, None], (0, 0, single.shape[1], 0))
        for block in self.blocks:
            recompute = self.gradient_checkpointing and self.training
            x = checkpoint(block, x, angles, use_reentrant=False) if recompute else block(x, angles)
            yield torch.cat([x[:, :1], x[:, single.shape[1] :]], 1) if self.registers else x

    def forward(self, images: Tensor) -> Features:
        grid = self.grid(images.shape[2], images.shape[3])
        tokens = self.encode(self.embed(images), grid)[:, 1:]
        return Features(tokens, grid, tokens.mean(1))


def whole_patches(height: int, width: int, patch: int, step: int | None = None) -> tuple[int, int]:
    """(h, w) of the patches of an image: one every `step` pixels, which divides the patch, or side by side.

    Raises:
        SpecError: it is not a whole number of them.
    """
    step = step or patch
    if height % step or width % step or min(height, width) < patch:
        near = " x ".join(str(max(patch, round(side / step) * step)) for side in (height, width))
        rule = f"encoder.patch {patch}" if step == patch else f"encoder.step {step} from encoder.patch {patch} on"
        raise SpecError(
            f"data.image_size: {height} x {width} is not a multiple of {rule}; take {near}, or another patch"
        )
    return (height - patch) // step + 1, (width - patch) // step + 1
