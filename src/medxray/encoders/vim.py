"""Vision Mamba (Vim, arXiv:2401.09417): a sequence of patches that is scanned forwards and backwards."""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from medxray.encoders import Encoder
from medxray.encoders.scan import selective_scan
from medxray.encoders.scan.ssd import ssd
from medxray.encoders.vit import PatchEmbed, whole_patches
from medxray.layers import DropPath
from medxray.types import Features

SIZES: dict[str, tuple[int, int]] = {"tiny": (192, 24), "small": (384, 24)}
"""name -> width, depth."""


class CausalConvolution(nn.Conv1d):
    """A depthwise convolution over the steps before and at each place, and SiLU."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__(width, width, kernel, padding=kernel - 1, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, D, L) -> (B, D, L)."""
        return F.silu(super().forward(x)[..., : x.shape[2]])


class MambaMixer(nn.Module):
    """The selective scan in both directions, each with parameters of its own, halved and added (section 3.3).

    Keys are those of the public weights; the backward direction's end in `_b`.
    """

    def __init__(self, width: int, inner: int, state: int, kernel: int, scan: str) -> None:
        super().__init__()
        self.rank, self.state, self.scan = math.ceil(width / 16), state, scan
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        for end in ("", "_b"):
            setattr(self, f"conv1d{end}", CausalConvolution(inner, kernel))
            setattr(self, f"x_proj{end}", nn.Linear(inner, self.rank + 2 * state, bias=False))
            setattr(self, f"dt_proj{end}", nn.Linear(self.rank, inner))
            logs = torch.arange(1, state + 1).float().log().repeat(inner, 1)
            setattr(self, "A_b_log" if end else "A_log", nn.Parameter(logs))
            setattr(self, f"D{end}", nn.Parameter(torch.ones(inner)))
            _initialise_steps(getattr(self, f"dt_proj{end}").bias)
            nn.init.uniform_(getattr(self, f"dt_proj{end}").weight, -(self.rank**-0.5), self.rank**-0.5)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D) -> (B, L, D)."""
        x, gate = self.in_proj(x).mT.chunk(2, dim=1)
        y = self._direction(x, "") + self._direction(x.flip(2), "_b").flip(2)
        out: Tensor = self.out_proj((y * F.silu(gate) / 2).mT)
        return out

    def _direction(self, x: Tensor, end: str) -> Tensor:
        x = getattr(self, f"conv1d{end}")(x)
        steps, B, C = getattr(self, f"x_proj{end}")(x.mT).split([self.rank, self.state, self.state], dim=2)
        to_steps = getattr(self, f"dt_proj{end}")
        return selective_scan(
            x,
            F.linear(steps, to_steps.weight).mT,
            -getattr(self, "A_b_log" if end else "A_log").float().exp(),
            B.mT,
            C.mT,
            getattr(self, f"D{end}"),
            to_steps.bias,
            delta_softplus=True,
            backend=self.scan,
        )


class SSDMixer(nn.Module):
    """Mamba-2's mixer (arXiv:2405.21060, section 7.1) in both directions: convolution, steps, decays and skip are each
    direction's own, the projections are shared."""

    def __init__(self, width: int, inner: int, state: int, kernel: int, head: int) -> None:
        super().__init__()
        self.inner, self.state, self.head, self.heads = inner, state, head, inner // head
        self.in_proj = nn.Linear(width, 2 * inner + 2 * state + self.heads, bias=False)
        for end in ("", "_b"):
            setattr(self, f"conv1d{end}", CausalConvolution(inner + 2 * state, kernel))
            setattr(self, f"dt_bias{end}", nn.Parameter(torch.empty(self.heads)))
            logs = torch.arange(1, self.heads + 1).float().log()
            setattr(self, "A_b_log" if end else "A_log", nn.Parameter(logs))
            setattr(self, f"D{end}", nn.Parameter(torch.ones(self.heads)))
            _initialise_steps(getattr(self, f"dt_bias{end}"))
        self.norm = nn.RMSNorm(inner, eps=1e-5)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D) -> (B, L, D)."""
        gate, mixed, steps = self.in_proj(x).split([self.inner, self.inner + 2 * self.state, self.heads], dim=2)
        y = self._direction(mixed, steps, "") + self._direction(mixed.flip(1), steps.flip(1), "_b").flip(1)
        out: Tensor = self.out_proj(self.norm(y / 2 * F.silu(gate)))
        return out

    def _direction(self, mixed: Tensor, steps: Tensor, end: str) -> Tensor:
        mixed = getattr(self, f"conv1d{end}")(mixed.mT).mT
        x, B, C = mixed.split([self.inner, self.state, self.state], dim=2)
        y = ssd(
            x.unflatten(2, (self.heads, self.head)),
            steps,
            -getattr(self, "A_b_log" if end else "A_log").float().exp(),
            B[:, :, None],
            C[:, :, None],
            getattr(self, f"D{end}"),
            getattr(self, f"dt_bias{end}"),
            delta_softplus=True,
        )
        return y.flatten(2)


class VimBlock(nn.Module):
    """Norm and mixer, added to the input."""

    def __init__(self, width: int, mixer: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.mixer = mixer
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D) -> (B, L, D)."""
        out: Tensor = x + self.drop_path(self.mixer(self.norm(x)))
        return out


class Vim(Encoder):
    """Vision Mamba with the keys of the public `vim_*_midclstok` weights: the class token stands in the middle of the
    patches. Pooled is the class token, which is what those weights were trained for.

    Positions are learned for one square grid and resampled, bicubic, for any other.

    Args:
        size: tiny or small of the public weights; explicit numbers stand in place of its own.
        width: D; 192 where no size is given.
        depth: number of blocks; 4 where no size is given.
        patch: pixels a side of a token.
        block: mamba, the selective scan, or ssd, Mamba-2's with one decay a head.
        state: N, numbers of state a channel, or a head's channel for ssd.
        expand: width inside a block over D.
        kernel: steps that a block's convolution sees.
        head: channels of a head of ssd.
        grid_side: tokens a side of the grid for which positions are learned; 14 is 224 pixels.
        channels: C of the images.
        drop_path: share of samples that skip the last block while training; rises with depth.
        scan: back-end of the selective scan: auto, or one that `medxray doctor` lists.
        gradient_checkpointing: recompute activations to save memory.
    """

    def __init__(
        self,
        size: Literal["tiny", "small"] | None = None,
        width: Annotated[int, Field(gt=0)] | None = None,
        depth: Annotated[int, Field(gt=0)] | None = None,
        patch: Annotated[int, Field(gt=0)] = 16,
        block: Literal["mamba", "ssd"] = "mamba",
        state: Annotated[int, Field(gt=0)] = 16,
        expand: Annotated[int, Field(gt=0)] = 2,
        kernel: Annotated[int, Field(gt=0)] = 4,
        head: Annotated[int, Field(gt=0)] = 32,
        grid_side: Annotated[int, Field(gt=0)] = 14,
        channels: Annotated[int, Field(gt=0)] = 1,
        drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        scan: Literal["auto", "cpu", "triton", "mamba-ssm", "torch", "reference"] = "auto",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        own = SIZES[size] if size else (192, 4)
        width, depth = own[0] if width is None else width, own[1] if depth is None else depth
        inner = expand * width
        if block == "ssd" and inner % head:
            raise ValueError(f"head must divide expand * width = {inner}, found {head}")
        self.width, self.stride, self.channels = width, patch, channels
        self.gradient_checkpointing = gradient_checkpointing
        self.patch_embed = PatchEmbed(channels, width, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid_side**2, width))
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        self.layers = nn.ModuleList(
            VimBlock(
                width,
                MambaMixer(width, inner, state, kernel, scan)
                if block == "mamba"
                else SSDMixer(width, inner, state, kernel, head),
                rate,
            )
            for rate in rates
        )
        self.norm_f = nn.RMSNorm(width, eps=1e-5)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for layer in self.layers.modules():
            if isinstance(layer, VimBlock):
                # The residual stream keeps its size however many blocks add to it.
                nn.init.kaiming_uniform_(layer.mixer.out_proj.weight, a=math.sqrt(5))  # type: ignore[union-attr,arg-type]
                layer.mixer.out_proj.weight.data.div_(math.sqrt(depth))  # type: ignore[union-attr,operator]

    def positions(self, h: int, w: int) -> Tensor:
        """The learned table for a grid, (1, 1 + h w, D), the class token's in the middle."""
        N = self.pos_embed.shape[1] - 1
        side = math.isqrt(N)
        if (h, w) == (side, side):
            return self.pos_embed
        before, single, after = self.pos_embed.split([N // 2, 1, N - N // 2], dim=1)
        table = torch.cat([before, after], 1).mT.unflatten(2, (side, side)).float()
        table = F.interpolate(table, (h, w), mode="bicubic", align_corners=False).flatten(2).mT.to(single.dtype)
        middle = h * w // 2
        return torch.cat([table[:, :middle], single, table[:, middle:]], 1)

    def forward(self, images: Tensor) -> Features:
        h, w = whole_patches(images.shape[2], images.shape[3], self.stride)
        patches = self.patch_embed(images)
        middle = h * w // 2
        single = self.cls_token.expand(len(images), -1, -1).to(patches.dtype)
        x = torch.cat([patches[:, :middle], single, patches[:, middle:]], 1) + self.positions(h, w)
        for layer in self.layers:
            recompute = self.gradient_checkpointing and self.training
            x = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        x = self.norm_f(x)
        return Features(torch.cat([x[:, :middle], x[:, middle + 1 :]], 1), (h, w), x[:, middle])


def _initialise_steps(bias: nn.Parameter) -> None:
    """The inverse of softplus, so that the first steps are log-uniform in [0.001, 0.1]."""
    low, high = math.log(1e-3), math.log(0.1)
    with torch.no_grad():
        steps = (torch.rand_like(bias) * (high - low) + low).exp().clamp(min=1e-4)
        bias.copy_(steps + torch.log(-torch.expm1(-steps)))
