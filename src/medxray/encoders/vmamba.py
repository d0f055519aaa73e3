"""VMamba (arXiv:2401.10166): four stages of blocks that scan a map in four directions."""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from medxray.encoders import Encoder
from medxray.encoders.scan import scan_map
from medxray.layers import MLP, DropPath
from medxray.types import Features, SpecError

SIZES: dict[str, dict[str, tuple[int, tuple[int, ...], float, float]]] = {
    "v2": {
        "tiny": (96, (2, 2, 8, 2), 1.0, 0.2),
        "small": (96, (2, 2, 15, 2), 2.0, 0.3),
        "base": (128, (2, 2, 15, 2), 2.0, 0.6),
    },
    "v0": {
        "tiny": (96, (2, 2, 9, 2), 2.0, 0.1),
        "small": (96, (2, 2, 27, 2), 2.0, 0.3),
        "base": (128, (2, 2, 27, 2), 2.0, 0.6),
    },
}
"""version -> size -> width of the first stage, blocks of each stage, ssm_ratio, drop path: those of the public weights."""

STAGES = 4


class SS2D(nn.Module):
    """The selective scan over a map in four directions (section 4.2)."""

    def __init__(self, width: int, ssm_ratio: float, state: int, gated: bool, scan: str) -> None:
        super().__init__()
        inner, rank = int(ssm_ratio * width), math.ceil(width / 16)
        self.rank, self.state, self.gated, self.scan = rank, state, gated, scan
        self.in_proj = nn.Linear(width, inner * (2 if gated else 1), bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=gated)
        self.x_proj_weight = nn.Parameter(torch.empty(4, rank + 2 * state, inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(4, inner, rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(4, inner))
        self.A_logs = nn.Parameter(torch.arange(1, state + 1).float().log().repeat(4 * inner, 1))
        self.Ds = nn.Parameter(torch.ones(4 * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, width, bias=False)
        nn.init.kaiming_uniform_(self.x_proj_weight.flatten(0, 1), a=math.sqrt(5))
        nn.init.uniform_(self.dt_projs_weight, -(rank**-0.5), rank**-0.5)
        low, high = math.log(1e-3), math.log(0.1)
        steps = (torch.rand(4, inner) * (high - low) + low).exp().clamp(min=1e-4)
        with torch.no_grad():
            # The inverse of softplus, so that the first steps are log-uniform.
            self.dt_projs_bias.copy_(steps + torch.log(-torch.expm1(-steps)))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H, W, D) -> (B, H, W, D)."""
        x = self.in_proj(x)
        gate = None
        if self.gated:
            x, gate = x.chunk(2, dim=-1)
        y = self.out_norm(self._scan(F.silu(self.conv2d(x.permute(0, 3, 1, 2)))))
        out: Tensor = self.out_proj(y if gate is None else y * F.silu(gate))
        return out

    def _scan(self, maps: Tensor) -> Tensor:
        """maps (B, D, H, W) -> (B, H, W, D)."""
        # Directions differ in the order of walking only, so that all four are projected in place at once.
        projected = F.linear(maps.permute(0, 2, 3, 1), self.x_proj_weight.flatten(0, 1)).unflatten(3, (4, -1))
        steps, B, C = projected.split([self.rank, self.state, self.state], dim=4)
        delta = torch.einsum("bhwkr,kdr->bkhwd", steps, self.dt_projs_weight).permute(0, 1, 4, 2, 3)
        y = scan_map(
            maps,
            delta,
            -self.A_logs.float().exp(),
            B.permute(0, 3, 4, 1, 2),
            C.permute(0, 3, 4, 1, 2),
            self.Ds,
            self.dt_projs_bias.flatten(),
            delta_softplus=True,
            backend=self.scan,
        )
        return y.permute(0, 2, 3, 1)


class VSSBlock(nn.Module):
    """SS2D and, where mlp_ratio is not zero, an MLP, each normalised before and added to its input."""

    def __init__(
        self, width: int, ssm_ratio: float, state: int, gated: bool, scan: str, mlp_ratio: float, drop_path: float
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.op = SS2D(width, ssm_ratio, state, gated, scan)
        self.drop_path = DropPath(drop_path)
        self.has_mlp = mlp_ratio > 0
        if self.has_mlp:
            self.norm2 = nn.LayerNorm(width)
            self.mlp = MLP(width, int(mlp_ratio * width))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H, W, D) -> (B, H, W, D)."""
        x = x + self.drop_path(self.op(self.norm(x)))
        if self.has_mlp:
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x


class ToChannelsLast(nn.Module):
    """(B, D, H, W) -> (B, H, W, D)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class ToChannelsFirst(nn.Module):
    """(B, H, W, D) -> (B, D, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)


class PatchMerging(nn.Module):
    """Version v0's way between stages: each 2 x 2 neighbours become one, odd sides padded with zeros."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H, W, D) -> (B, ceil(H / 2), ceil(W / 2), 2 D)."""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        corners = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        out: Tensor = self.reduction(self.norm(torch.cat(corners, dim=-1)))
        return out


class VMamba(Encoder):
    """VMamba with the keys of the public `vssm*_0229` (v2) and first (v0) weights. Pooled is the mean of the tokens.

    Any image size: v2 rounds each halving up, v0 drops what a 4-pixel patch does not fill and then rounds up.

    Args:
        size: tiny, small or base of the public weights; explicit numbers stand in place of its own.
        dims: width of the first stage, doubled at each further one; 32 where no size is given.
        depths: blocks of each of the four stages; 1, 1, 2, 1 where no size is given.
        ssm_ratio: width inside a block over its own; 1 where no size is given.
        state: N, numbers of state a channel and direction; 1 in v2, 16 in v0.
        version: v2 (`v05_noz`) or v0 (gated, without MLP, patches of one convolution).
        mlp_ratio: hidden width of the MLP over the block's; 0 leaves it out; 4 in v2, 0 in v0.
        channels: C of the images.
        drop_path: share of samples that skip the last block's branches while training; rises with depth; the
            size's own, or 0.
        classes: K of a linear head on the pooled vector, as the public classifiers have it; its weights are then
            read too, and `logits` gives what it says. None leaves it out.
        scan: back-end of the selective scan: auto, or one that `medxray doctor` lists.
        gradient_checkpointing: recompute activations to save memory.
    """

    def __init__(
        self,
        size: Literal["tiny", "small", "base"] | None = None,
        dims: Annotated[int, Field(gt=0)] | None = None,
        depths: list[int] | None = None,
        ssm_ratio: Annotated[float, Field(gt=0)] | None = None,
        state: Annotated[int, Field(gt=0)] | None = None,
        version: Literal["v2", "v0"] = "v2",
        mlp_ratio: Annotated[float, Field(ge=0)] | None = None,
        channels: Annotated[int, Field(gt=0)] = 1,
        drop_path: Annotated[float, Field(ge=0, lt=1)] | None = None,
        classes: Annotated[int, Field(gt=0)] | None = None,
        scan: Literal["auto", "cpu", "triton", "mamba-ssm", "torch", "reference"] = "auto",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        own = SIZES[version][size] if size else (32, (1, 1, 2, 1), 1.0, 0.0)
        dims = own[0] if dims is None else dims
        depths = list(own[1]) if depths is None else depths
        ssm_ratio = own[2] if ssm_ratio is None else ssm_ratio
        drop_path = own[3] if drop_path is None else drop_path
        if len(depths) != STAGES or min(depths) < 1:
            raise ValueError(f"depths must be {STAGES} numbers above zero, found {depths}")
        if dims % 2 or int(dims * ssm_ratio) < 1:
            raise ValueError(f"dims must be even and dims * ssm_ratio at least 1, found {dims} and {ssm_ratio}")
        gated = version == "v0"
        state = (16 if gated else 1) if state is None else state
        mlp_ratio = (0.0 if gated else 4.0) if mlp_ratio is None else mlp_ratio
        self.version, self.channels = version, channels
        self.width, self.stride = dims * 2 ** (STAGES - 1), 32
        self.gradient_checkpointing = gradient_checkpointing
        # The places without parameters keep the numbers in the public weights' keys.
        if gated:
            self.patch_embed = nn.Sequential(nn.Conv2d(channels, dims, 4, 4), ToChannelsLast(), nn.LayerNorm(dims))
        else:
            self.patch_embed = nn.Sequential(
                nn.Conv2d(channels, dims // 2, 3, 2, 1), ToChannelsLast(), nn.LayerNorm(dims // 2), nn.GELU(),
                ToChannelsFirst(), nn.Conv2d(dims // 2, dims, 3, 2, 1), ToChannelsLast(), nn.LayerNorm(dims),
            )  # fmt: skip
        rates = iter(torch.linspace(0, drop_path, sum(depths), device="cpu").tolist())
        self.layers = nn.ModuleList()
        for i, depth in enumerate(depths):
            width = dims * 2**i
            blocks = [VSSBlock(width, ssm_ratio, state, gated, scan, mlp_ratio, next(rates)) for _ in range(depth)]
            down: nn.Module = nn.Identity()
            if i < STAGES - 1 and gated:
                down = PatchMerging(width)
            elif i < STAGES - 1:
                conv = nn.Conv2d(width, 2 * width, 3, 2, 1)
                down = nn.Sequential(ToChannelsFirst(), conv, ToChannelsLast(), nn.LayerNorm(2 * width))
            self.layers.append(nn.ModuleDict({"blocks": nn.ModuleList(blocks), "downsample": down}))
        self.classifier = nn.ModuleDict({"norm": nn.LayerNorm(self.width)})
        if classes is not None:
            self.classifier["head"] = nn.Linear(self.width, classes)
        self.apply(_initialise)

    def stages(self, images: Tensor, downsampled: bool = True) -> list[Tensor]:
        """images (B, C, H, W) -> what each of the four stages makes of them, (B, D, h, w), at 1/4 to 1/32 of their size.

        Args:
            images: (B, C, H, W).
            downsampled: the first three as they are handed on, of half the size and twice the width.

        Raises:
            SpecError: version v0 and a side below one patch.
        """
        if self.version == "v0" and min(images.shape[2:]) < 4:
            raise SpecError(
                f"data.image_size: {images.shape[2]} x {images.shape[3]} is smaller than a patch of 4 x 4 pixels; "
                "take larger images, or encoder.version: v2"
            )
        x, outputs = self.patch_embed(images), []
        stage: Any
        for stage in self.layers:
            for block in stage["blocks"]:
                recompute = self.gradient_checkpointing and self.training
                x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
            before, x = x, stage["downsample"](x)
            outputs.append((x if downsampled else before).permute(0, 3, 1, 2))
        return outputs

    def features(self, images: Tensor, stage: int) -> Features:
        """images (B, C, H, W) -> the tokens of stage 1, 2, 3 or 4, of stride 4, 8, 16 or 32; the last normalised.

        Raises:
            SpecError: no such stage.
        """
        if stage not in range(1, STAGES + 1):
            raise SpecError(f"VMamba has stages 1 to {STAGES}, found {stage}")
        if stage == STAGES:
            return self.forward(images)
        chosen = self.stages(images, downsampled=False)[stage - 1]
        tokens = chosen.permute(0, 2, 3, 1).flatten(1, 2)
        return Features(tokens, (chosen.shape[2], chosen.shape[3]), tokens.mean(1))

    def forward(self, images: Tensor) -> Features:
        last = self.stages(images)[-1]
        tokens: Tensor = self.classifier["norm"](last.permute(0, 2, 3, 1)).flatten(1, 2)
        return Features(tokens, (last.shape[2], last.shape[3]), tokens.mean(1))

    def logits(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> (B, K), what the public classifier says.

        Raises:
            SpecError: built without `classes`.
        """
        if "head" not in self.classifier:
            raise SpecError("VMamba has no head; build it with classes: 1000 for the public weights")
        out: Tensor = self.classifier["head"](self.forward(images).pooled)
        return out


def _initialise(layer: nn.Module) -> None:
    if isinstance(layer, nn.Linear):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
