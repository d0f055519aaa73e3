"""What public checkpoints of ViT hold beside the encoder: positions, decoders, heads of self-supervised training."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from medxray.encoders.vit import ViT
from medxray.layers import sincos_positions
from medxray.types import WeightsError
from medxray.weights import load_encoder

WIDTH = 16


def vit() -> ViT:
    return ViT(width=WIDTH, depth=1, heads=2, patch=8)


def table(side: int, cls: bool = True) -> Tensor:
    fixed = sincos_positions(WIDTH, side, side, torch.device("cpu"))
    return torch.cat([torch.zeros(1, 1, WIDTH), fixed], dim=1) if cls else fixed


def save(path: Path, **more: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(5)
    state = vit().state_dict()
    torch.save({"model": {**state, **more}}, path)
    return state


@pytest.mark.parametrize("positions", [table(4), table(7), table(4, cls=False)])
def test_files_of_mae(tmp_path: Path, positions: Tensor) -> None:
    state = save(
        tmp_path / "mae.pth",
        pos_embed=positions,
        mask_token=torch.zeros(1, 1, 8),
        decoder_pos_embed=torch.zeros(1, 17, 8),
        **{"decoder_blocks.0.norm1.weight": torch.zeros(8), "head.weight": torch.zeros(3, WIDTH)},
    )
    encoder = vit()
    load_encoder(encoder, str(tmp_path / "mae.pth"))
    assert all(torch.equal(encoder.state_dict()[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    "positions", [torch.randn(1, 17, WIDTH) * 0.02, torch.zeros(1, 19, WIDTH), table(4) + 0.01, table(4).flip(2)]
)
def test_learned_positions_are_not_lost_in_silence(tmp_path: Path, positions: Tensor) -> None:
    save(tmp_path / "timm.pth", pos_embed=positions)
    with pytest.raises(WeightsError, match=r"timm\.pth: pos_embed .* holds learned positions.*set encoder.positions: learned"):
        load_encoder(vit(), str(tmp_path / "timm.pth"))


@pytest.mark.parametrize(("wrapper", "prefix"), [("model", "backbone."), ("student", "module.backbone.")])
def test_the_hd_release(tmp_path: Path, wrapper: str, prefix: str) -> None:
    """Its two layouts: pre-trained alone, and a student whose head stands beside it."""
    own = {"width": WIDTH, "depth": 1, "heads": 2, "patch": 32, "stem": "hd"}
    source, encoder = ViT(**own), ViT(**own)
    rest = {"pos_embed": table(20), "mask_token": torch.zeros(1, 1, 8), "decoder_image.bias": torch.zeros(1)}
    held = {f"{prefix}{key}": value for key, value in (source.state_dict() | rest).items()}
    head = prefix.removesuffix("backbone.") + "head.mlp.0.weight"
    torch.save({wrapper: held | {head: torch.zeros(2, 2)}, "args": Namespace(lr=2.5e-4), "epoch": 3}, tmp_path / "hd.pth")
    load_encoder(encoder, str(tmp_path / "hd.pth"))
    assert all(torch.equal(encoder.state_dict()[key], value) for key, value in source.state_dict().items())
