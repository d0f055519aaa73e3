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
from medxray.layers import DropPath, resample_positions
from medxray.types import Features

SIZES: dict[str, tuple[int, int]] = {"tiny": (192, 24), "small": (384, 24), "base": (768, 24)}
"""name -> width, depth."""


class CausalConvolution(nn.Conv1d):
    """A depthwise convolution over the steps before and at each place, and SiLU."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__(width, width, kernel, padding=kernel - 1, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, D, L) -> (B, D, L)."""
        return F.silu(super().forward(x)[..., : x.shape[2]])


class MambaMixer(nn.Module):
    """The selective scan in both directions, each with parameters of its own, averaged and gated (section 3.3).

    Keys are those of the public weights; `_b` stands for backwards.
    """

    def __init__(self, width: int, inner: int, state: int, kernel: int, scan: str) -> None:
        super().__init__()
        rank = math.ceil(width / 16)
        self.scan, self.parts = scan, [rank, state, state]
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d, self.conv1d_b = (CausalConvolution(inner, kernel) for _ in range(2))
        self.x_proj, self.x_proj_b = (nn.Linear(inner, sum(self.parts), bias=False) for _ in range(2))
        self.dt_proj, self.dt_proj_b = (nn.Linear(rank, inner) for _ in range(2))
        logs = torch.arange(1, state + 1).float().log()
        self.A_log, self.A_b_log = (nn.Parameter(logs.repeat(inner, 1)) for _ in range(2))
        self.D, self.D_b = (nn.Parameter(torch.ones(inner)) for _ in range(2))
        self.out_proj = nn.Linear(inner, width, bias=False)
        for to_steps in (self.dt_proj, self.dt_proj_b):
            nn.init.uniform_(to_steps.weight, -(rank**-0.5), rank**-0.5)
            _initialise_steps(to_steps.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D) -> (B, L, D)."""
        x, gate = self.in_proj(x).mT.chunk(2, dim=1)
        forth = self._scan(x, self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)
        back = self._scan(x.flip(2), self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b)
        out: Tensor = self.out_proj(((forth + back.flip(2)) / 2 * F.silu(gate)).mT)
        return out

    def _scan(
        self, x: Tensor, convolution: nn.Module, project: nn.Module, to_steps: nn.Linear, A_log: Tensor, D: Tensor
    ) -> Tensor:
        """x (B, D, L) -> (B, D, L), in one direction."""
        x = convolution(x)
        steps, B, C = project(x.mT).split(self.parts, dim=2)
        delta = F.linear(steps, to_steps.weight)
        A = -A_log.float().exp()
        return selective_scan(x, delta.mT, A, B.mT, C.mT, D, to_steps.bias, delta_softplus=True, backend=self.scan)


class SSDMixer(nn.Module):
    """Mamba-2's mixer (arXiv:2405.21060, section 7.1) in both directions, averaged, gated and normalised.

    Both read one projection and share the one out; convolution, bias of the steps, decays and skip are each direction's
    own. Keys are those of Mamba-2; `_b` stands for backwards.
    """

    def __init__(self, width: int, inner: int, state: int, kernel: int, head: int) -> None:
        super().__init__()
        heads, mixed = inner // head, inner + 2 * state
        self.head, self.parts, self.mixed_parts = head, [inner, mixed, heads], [inner, state, state]
        self.in_proj = nn.Linear(width, sum(self.parts), bias=False)
        self.conv1d, self.conv1d_b = (CausalConvolution(mixed, kernel) for _ in range(2))
        self.dt_bias, self.dt_bias_b = (nn.Parameter(torch.empty(heads)) for _ in range(2))
        self.A_log, self.A_b_log = (nn.Parameter(torch.empty(heads).uniform_(1, 16).log()) for _ in range(2))
        self.D, self.D_b = (nn.Parameter(torch.ones(heads)) for _ in range(2))
        self.norm = nn.RMSNorm(inner, eps=1e-5)
        self.out_proj = nn.Linear(inner, width, bias=False)
        for bias in (self.dt_bias, self.dt_bias_b):
            _initialise_steps(bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D) -> (B, L, D)."""
        gate, x, steps = self.in_proj(x).split(self.parts, dim=2)
        forth = self._scan(x, steps, self.conv1d, self.dt_bias, self.A_log, self.D)
        back = self._scan(x.flip(1), steps.flip(1), self.conv1d_b, self.dt_bias_b, self.A_b_log, self.D_b)
        y = (forth + back.flip(1)) / 2 * F.silu(gate)
        out: Tensor = self.out_proj(self.norm(y.to(self.norm.weight.dtype)))
        return out

    def _scan(
        self, x: Tensor, steps: Tensor, convolution: nn.Module, bias: Tensor, A_log: Tensor, D: Tensor
    ) -> Tensor:
        """x (B, L, D + 2 N), steps (B, L, heads) -> (B, L, D), in one direction."""
        x, B, C = convolution(x.mT).mT.split(self.mixed_parts, dim=2)
        x, A = x.unflatten(2, (-1, self.head)), -A_log.float().exp()
        return ssd(x, steps, A, B[:, :, None], C[:, :, None], D, bias, delta_softplus=True).flatten(2)


class VimBlock(nn.Module):
    """Norm and mixer, added to the input."""

    def __init__(self, width: int, mixer: MambaMixer | SSDMixer, drop_path: float) -> None:
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
        size: tiny, small or base of the public weights; explicit numbers stand in place of its own.
        width: D; 192 where no size is given.
        depth: number of blocks; 4 where no size is given.
        patch: pixels a side of a patch.
        step: pixels from one patch to the next; the patch where it is not given, 8 in the public `_ft_` weights.
        block: mamba, the selective scan, or ssd, Mamba-2's with one decay a head.
        state: N, numbers of state a channel.
        expand: width inside a block over D.
        kernel: steps that a block's convolution sees.
        head: channels of a head of ssd; 64 where that divides, or the largest power of two that does.
        grid_side: tokens a side of the grid for which positions are learned: 14 in the public weights, 27 in `_ft_`.
        channels: C of the images.
        drop_path: share of samples that skip the last block while training; rises with depth.
        scan: back-end of the selective scan: auto, or one that `medxray doctor` lists.
        gradient_checkpointing: recompute activations to save memory.
    """

    def __init__(
        self,
        size: Literal["tiny", "small", "base"] | None = None,
        width: Annotated[int, Field(gt=0)] | None = None,
        depth: Annotated[int, Field(gt=0)] | None = None,
        patch: Annotated[int, Field(gt=0)] = 16,
        step: Annotated[int, Field(gt=0)] | None = None,
        block: Literal["mamba", "ssd"] = "mamba",
        state: Annotated[int, Field(gt=0)] = 16,
        expand: Annotated[int, Field(gt=0)] = 2,
        kernel: Annotated[int, Field(gt=0)] = 4,
        head: Annotated[int, Field(gt=0)] | None = None,
        grid_side: Annotated[int, Field(gt=0)] = 14,
        channels: Annotated[int, Field(gt=0)] = 1,
        drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        scan: Literal["auto", "cpu", "triton", "mamba-ssm", "torch", "reference"] = "auto",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        own = SIZES[size] if size else (192, 4)
        width, depth = (own[0] if width is None else width), (own[1] if depth is None else depth)
        inner, step = expand * width, patch if step is None else step
        head = math.gcd(64, inner) if head is None else head
        if inner % head:
            raise ValueError(f"head must divide expand * width = {inner}, found {head}")
        if patch % step:
            raise ValueError(f"step must divide patch {patch}, found {step}")
        self.width, self.stride, self.channels, self.patch = width, step, channels, patch
        self.gradient_checkpointing = gradient_checkpointing
        self.patch_embed = PatchEmbed(channels, width, patch, step)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid_side**2, width))
        blocks = []
        for rate in torch.linspace(0, drop_path, depth, device="cpu").tolist():
            mixer = (
                MambaMixer(width, inner, state, kernel, scan)
                if block == "mamba"
                else SSDMixer(width, inner, state, kernel, head)
            )
            # The residual stream keeps its size however many blocks add to it.
            mixer.out_proj.weight.data /= math.sqrt(depth)
            blocks.append(VimBlock(width, mixer, rate))
        self.layers = nn.ModuleList(blocks)
        self.norm_f = nn.RMSNorm(width, eps=1e-5)
        for table in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(table, std=0.02)

    def positions(self, h: int, w: int) -> Tensor:
        """The learned table for a grid, (1, 1 + h w, D), the class token's in the middle."""
        N = self.pos_embed.shape[1] - 1
        side = math.isqrt(N)
        if (h, w) == (side, side):
            return self.pos_embed
        before, single, after = self.pos_embed.split([N // 2, 1, N - N // 2], dim=1)
        table = resample_positions(torch.cat([before, after], 1), (side, side), (h, w))
        middle = h * w // 2
        return torch.cat([table[:, :middle], single, table[:, middle:]], 1)

    def forward(self, images: Tensor) -> Features:
        h, w = whole_patches(images.shape[2], images.shape[3], self.patch, self.stride)
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
        steps = (torch.rand_like(bias) * (high - low) + low).exp()
        bias.copy_(steps + torch.log(-torch.expm1(-steps)))
