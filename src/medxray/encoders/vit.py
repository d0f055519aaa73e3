"""The Vision Transformer of MAE and timm, with sin-cos, learned or rotary positions, for any grid."""

import itertools
import math
from collections.abc import Iterator
from typing import Annotated, Literal, Union

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from medxray.data.transforms import height_width
from medxray.encoders import JoinableEncoder, MaskableEncoder
from medxray.layers import Block, initialise, resample_positions, rotary_positions, sincos_positions
from medxray.types import Features, SpecError

Side = Annotated[int, Field(gt=0)]
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
        if images.shape[2:] == self.proj.kernel_size:
            # One patch: the convolution is a matrix product, and many images make a large one.
            return F.linear(images.flatten(1), self.proj.weight.flatten(1), self.proj.bias)[:, None]
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


class ViT(MaskableEncoder, JoinableEncoder):
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
        positions: sincos, added to the tokens; learned, a table that is added; or rope, which turns queries and keys of
            every block by row and column.
        position_grid: tokens a side, or [rows, columns], that positions were made for; they are stretched over images of
            another number. It is the size of a learned table, 14 where none is given; sin-cos and rope then number the
            tokens of each image as they are.
        registers: tokens beside the class token that belong to no patch (arXiv:2309.16588); they are not handed on.
        layer_scale: what a learned factor for each channel of every branch starts from, such as 1.0e-5; None has none.
        norm_eps: added to the variance in every LayerNorm; 1e-6 is MAE's and timm's, configs of transformers say 1e-12.
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
        positions: Literal["sincos", "learned", "rope"] = "sincos",
        position_grid: Union[Side, list[Side]] | None = None,
        registers: Annotated[int, Field(ge=0)] = 0,
        layer_scale: Annotated[float, Field(gt=0)] | None = None,
        norm_eps: Annotated[float, Field(gt=0)] = 1e-6,
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
        if isinstance(position_grid, list) and len(position_grid) != 2:
            raise ValueError(f"position_grid must be a number or [rows, columns], found {position_grid}")
        if positions == "learned" and position_grid is None:
            position_grid = 14
        self.position_grid = None if position_grid is None else height_width(position_grid)
        self.gradient_checkpointing, self.depth = gradient_checkpointing, depth
        self.overlapping = stem == "convolutions"
        if not self.overlapping:
            self.patch_embed: nn.Module = (HDStem if stem == "hd" else PatchEmbed)(channels, width, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed: nn.Parameter | None = None
        if positions == "learned" and self.position_grid is not None:
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + math.prod(self.position_grid), width))
        if registers:
            self.reg_token = nn.Parameter(torch.zeros(1, registers, width))
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, rate, layer_scale) for rate in rates)
        self.norm = nn.LayerNorm(width)
        for layer in self.modules():
            if isinstance(layer, nn.LayerNorm):
                layer.eps = norm_eps
        initialise(self)
        nn.init.normal_(self.cls_token, std=0.02)
        if self.pos_embed is not None:
            nn.init.normal_(self.pos_embed, std=0.02)
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

    def positions(self, h: int, w: int) -> Tensor:
        """What is added to the patches of a grid, (1, h * w, D)."""
        if self.pos_embed is not None and self.position_grid is not None:
            return resample_positions(self.pos_embed[:, 1:], self.position_grid, (h, w))
        return sincos_positions(self.width, h, w, self.cls_token.device, self.position_grid)

    def embed(self, images: Tensor) -> Tensor:
        h, w = self.grid(images.shape[2], images.shape[3])
        tokens: Tensor = self.patch_embed(images)
        if self.turned:
            return tokens
        return tokens + self.positions(h, w).to(tokens.dtype)

    def embed_visible(self, images: Tensor, keep: Tensor) -> Tensor:
        if self.overlapping:
            return super().embed_visible(images, keep)
        # Each visible patch is an image of its own to the stem, so that it never looks at the others.
        (h, w), p, (B, C) = self.grid(images.shape[2], images.shape[3]), self.stride, images.shape[:2]
        patches = images.view(B, C, h, p, w, p).permute(0, 2, 4, 1, 3, 5)
        rows = torch.arange(B, device=keep.device)[:, None]
        tokens: Tensor = self.patch_embed(patches[rows, keep // w, keep % w].flatten(0, 1)).view(B, -1, self.width)
        if self.turned:
            return tokens
        return tokens + self.positions(h, w)[0][keep].to(tokens.dtype)

    def encode(self, tokens: Tensor, grid: tuple[int, int], keep: Tensor | None = None) -> Tensor:
        for x in self._layers(tokens, grid, keep):
            last = x
        out: Tensor = self.norm(last)
        return out

    def encode_layers(self, tokens: Tensor, grid: tuple[int, int], keep: Tensor | None = None) -> list[Tensor]:
        *layers, last = self._layers(tokens, grid, keep)
        return [*layers, self.norm(last)]

    def before_last(self, images: Tensor) -> Features:
        grid = self.grid(images.shape[2], images.shape[3])
        x, angles, _ = self._entered(self.embed(images), grid, None)
        for block in self.blocks[:-1]:
            x = self._through(block, x, angles)
        return Features(x, grid, x.mean(1))

    def last(self, tokens: Tensor, grid: tuple[int, int], beside: Tensor) -> Tensor:
        angles = None
        if self.turned:
            table = F.pad(self._angles(grid, tokens.device), (0, 0, 1 + self.registers, 0))
            angles = F.pad(table.repeat(tokens.shape[1] // len(table), 1), (0, 0, 0, beside.shape[1]))
        out: Tensor = self.norm(self._through(self.blocks[-1], torch.cat([tokens, beside.to(tokens.dtype)], 1), angles))
        return out

    def _layers(self, tokens: Tensor, grid: tuple[int, int], keep: Tensor | None) -> Iterator[Tensor]:
        """The class token and the patches after each block, (B, 1 + n, D)."""
        x, angles, singles = self._entered(tokens, grid, keep)
        for block in self.blocks:
            x = self._through(block, x, angles)
            yield torch.cat([x[:, :1], x[:, singles:]], 1) if self.registers else x

    def _entered(
        self, tokens: Tensor, grid: tuple[int, int], keep: Tensor | None
    ) -> tuple[Tensor, Tensor | None, int]:
        """What the first block is given: class token, registers and patches, their angles, and how many are no patch."""
        # The class token's position is zero unless learned, and so are the registers'.
        single = self.cls_token if self.pos_embed is None else self.cls_token + self.pos_embed[:, :1]
        single = torch.cat([single, self.reg_token], 1) if self.registers else single
        x = torch.cat([single.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens], dim=1)
        angles = None
        if self.turned:
            table = self._angles(grid, tokens.device)
            angles = F.pad(table if keep is None else table[keep][:, None], (0, 0, single.shape[1], 0))
        return x, angles, single.shape[1]

    def _angles(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        return rotary_positions(self.turned, *grid, device, self.position_grid)

    def _through(self, block: nn.Module, x: Tensor, angles: Tensor | None) -> Tensor:
        recompute = self.gradient_checkpointing and self.training
        out: Tensor = checkpoint(block, x, angles, use_reentrant=False) if recompute else block(x, angles)
        return out

    def forward(self, images: Tensor) -> Features:
        grid = self.grid(images.shape[2], images.shape[3])
        tokens = self.encode(self.embed(images), grid)[:, 1:]
        return Features(tokens, grid, tokens.mean(1))


class HDViT(ViT):
    """The HD X-ray MAE's encoder (arXiv:2404.17926, its release): `vit` with patches of 64 px through three convolutions.

    Args:
        size: tiny, small, base, large or huge; explicit numbers stand in place of its own.
        width: D.
        depth: number of blocks.
        heads: attention heads.
        patch: pixels a side of a token, a multiple of 16.
        positions: sincos, learned or rope, as those of `vit`.
        channels: C of the images.
        drop_path: share of samples that skip the last block's branches while training; rises with depth.
        gradient_checkpointing: recompute activations to save memory.
    """

    def __init__(
        self,
        size: Literal["tiny", "small", "base", "large", "huge"] = "large",
        width: Annotated[int, Field(gt=0)] | None = None,
        depth: Annotated[int, Field(gt=0)] | None = None,
        heads: Annotated[int, Field(gt=0)] | None = None,
        patch: Annotated[int, Field(gt=0)] = 64,
        positions: Literal["sincos", "learned", "rope"] = "sincos",
        channels: Annotated[int, Field(gt=0)] = 1,
        drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(
            size, width, depth, heads, patch, "hd", positions,
            channels=channels, drop_path=drop_path, gradient_checkpointing=gradient_checkpointing,
        )  # fmt: skip


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
