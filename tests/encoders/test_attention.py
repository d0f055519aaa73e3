"""The class token's attention, against one that is written out."""

from typing import Any

import pytest
import torch
from torch import Tensor

from medxray.encoders import ENCODERS, MaskableEncoder
from medxray.encoders.attention import class_attention
from medxray.types import Features


@pytest.mark.parametrize("settings", [{}, {"registers": 2}, {"stem": "convolutions"}, {"positions": "rope"}], ids=str)
def test_it_is_that_of_the_last_block(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    encoder: Any = ENCODERS.get("vit")(width=16, depth=2, heads=2, patch=8, **settings).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    images = torch.randn(3, 1, 32, 48)
    seen: list[Tensor] = []
    encoder.blocks[-1].attn.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    tokens, attention = class_attention(encoder, images)
    assert attention is not None and attention.shape == (3, 24)
    torch.testing.assert_close(tokens, encoder(images).tokens)
    assert ((attention > 0) & (attention < 1)).all() and (attention.sum(1) < 1).all()
    if settings.get("positions") == "rope":
        return
    q, k, _ = encoder.blocks[-1].attn.qkv(seen[0]).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    expected = (q @ k.mT / 8**0.5).softmax(-1).mean(1)[:, 0, -24:]
    torch.testing.assert_close(attention, expected)


class Mixer(MaskableEncoder):
    """No token looks at another by attention."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.stride = 8, 8
        self.layer = torch.nn.Conv2d(1, 8, 8, 8)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return height // 8, width // 8

    def embed(self, images: Tensor) -> Tensor:
        return self.layer(images).flatten(2).mT

    def encode(self, tokens: Tensor, grid: tuple[int, int], keep: Tensor | None = None) -> Tensor:
        return torch.cat([tokens.mean(1, keepdim=True), tokens], 1)

    def forward(self, images: Tensor) -> Features:
        tokens = self.embed(images)
        return Features(tokens, None, tokens.mean(1))


def test_an_encoder_without_attention_has_none() -> None:
    tokens, attention = class_attention(Mixer(), torch.zeros(2, 1, 32, 16))
    assert tokens.shape == (2, 8, 8) and attention is None
