"""What the Vision Transformer offers beside what MAE's golden tensors hold."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from medxray.encoders.vit import ViT
from medxray.layers import Attention, LayerScale, rotary_positions
from medxray.types import SpecError


def small(**settings: Any) -> ViT:
    torch.manual_seed(0)
    return ViT(**{"width": 48, "depth": 2, "heads": 3, **settings}).eval()


EVERYTHING = {"positions": "rope", "registers": 4, "layer_scale": 0.1}


@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("patch", [8, 14, 16, 32, 64])
def test_any_patch_and_grid(settings: dict[str, Any], patch: int) -> None:
    features = small(patch=patch, channels=3, **settings)(torch.randn(2, 3, 2 * patch, 3 * patch))
    assert features.grid == (2, 3) and features.tokens.shape == (2, 6, 48)
    with pytest.raises(SpecError, match=rf"not a multiple of encoder.patch {patch}; take "):
        small(patch=patch)(torch.zeros(1, 1, 2 * patch + 1, patch))


@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["plain", "everything"])
def test_a_subset_knows_its_places(settings: dict[str, Any]) -> None:
    """Tokens that are kept are encoded as if the others had never been, whatever their order."""
    encoder = small(**settings)
    tokens = encoder.embed(torch.randn(2, 1, 48, 64))
    keep = torch.stack([torch.randperm(12)[:5] for _ in range(2)])

    def kept(order: Tensor) -> Tensor:
        return encoder.encode(tokens.gather(1, order[..., None].expand(-1, -1, 48)), (3, 4), order)

    first = kept(keep)
    assert first.shape == (2, 6, 48)
    again = kept(keep.flip(1))
    torch.testing.assert_close(again[:, 1:].flip(1), first[:, 1:], rtol=1e-4, atol=1e-5)
    every = torch.arange(12).expand(2, -1)
    torch.testing.assert_close(kept(every), encoder.encode(tokens, (3, 4)))
    # At other places the same tokens are something else.
    if settings:
        others = encoder.encode(tokens.gather(1, keep[..., None].expand(-1, -1, 48)), (3, 4), (keep * 5 + 1) % 12)
        assert (others - first).abs().max() > 1e-4


class TestRope:
    def test_attention_depends_on_differences_of_place(self) -> None:
        torch.manual_seed(0)
        attention, x = Attention(48, 3), torch.randn(1, 12, 48)
        wide = rotary_positions(16, 8, 9, torch.device("cpu")).view(8, 9, 8)
        results = [
            attention(x, wide[row : row + 3, column : column + 4].reshape(12, 8)) for row, column in ((0, 0), (4, 2), (5, 5))
        ]
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-5)
        assert (attention(x) - results[0]).abs().max() > 1e-3
        # Rows and columns are told apart.
        turned = attention(x, wide[:4, :3].transpose(0, 1).reshape(12, 8))
        assert (turned - results[0]).abs().max() > 1e-3

    def test_lengths_are_kept(self) -> None:
        table = rotary_positions(16, 5, 7, torch.device("cpu"))
        assert table.shape == (35, 8) and table.dtype == torch.complex64
        torch.testing.assert_close(table.abs(), torch.ones(35, 8))

    def test_no_position_is_added(self) -> None:
        encoder = small(positions="rope")
        flat = encoder.embed(torch.ones(1, 1, 32, 32))
        assert torch.equal(flat[:, 0], flat[:, 3])

    def test_heads_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match=r"rope needs width / heads divisible by 4, found 36 / 6"):
            small(width=36, heads=6, positions="rope")


class TestRegistersAndScale:
    def test_registers_are_seen_and_not_handed_on(self) -> None:
        encoder = small(registers=3)
        images = torch.randn(1, 1, 32, 48)
        before = encoder(images)
        assert before.tokens.shape == (1, 6, 48)
        with torch.no_grad():
            encoder.reg_token.normal_()
        assert (encoder(images).tokens - before.tokens).abs().max() > 1e-3

    def test_a_scale_of_nearly_nothing_is_the_identity(self) -> None:
        encoder = small(layer_scale=1e-8)
        assert sum(isinstance(m, LayerScale) for m in encoder.modules()) == 4
        tokens = encoder.embed(torch.randn(1, 1, 32, 32))
        torch.testing.assert_close(encoder.encode(tokens, (2, 2))[:, 1:], encoder.norm(tokens))

    def test_keys_are_those_of_timm(self) -> None:
        settings = {"img_size": 224, "num_classes": 0, "reg_tokens": 4, "init_values": 1e-5, "class_token": True}
        theirs = timm.create_model("vit_small_patch16_224", **settings)
        ours = ViT("small", channels=3, registers=4, layer_scale=1e-5)
        shapes = {key: value.shape for key, value in theirs.state_dict().items() if key != "pos_embed"}
        assert {key: value.shape for key, value in ours.state_dict().items()} == shapes

    def test_plain_keys_are_those_of_timm(self) -> None:
        theirs = timm.create_model("vit_small_patch16_224", num_classes=0)
        shapes = {key: value.shape for key, value in theirs.state_dict().items() if key != "pos_embed"}
        assert {key: value.shape for key, value in ViT("small", channels=3).state_dict().items()} == shapes

    def test_blocks_are_those_of_timm(self) -> None:
        """The same weights, class token, registers and scales give the same tokens."""
        theirs = timm.create_model(
            "vit_tiny_patch16_224", num_classes=0, img_size=32, reg_tokens=2, init_values=0.5, no_embed_class=True
        ).eval()
        ours = ViT("tiny", channels=3, registers=2, layer_scale=0.5).eval()
        state = theirs.state_dict()
        state.pop("pos_embed")
        ours.load_state_dict(state)
        with torch.no_grad():
            tokens = ours.patch_embed(torch.randn(2, 3, 32, 32))
            x = torch.cat([theirs.cls_token.expand(2, -1, -1), theirs.reg_token.expand(2, -1, -1), tokens], 1)
            expected = theirs.norm(theirs.blocks(x))
            found = ours.encode(tokens, (2, 2))
        torch.testing.assert_close(found[:, 1:], expected[:, 3:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[:, 0], expected[:, 0], rtol=1e-4, atol=1e-4)


def test_recomputed_activations_change_nothing() -> None:
    images, found = torch.randn(2, 1, 32, 32), []
    for recompute in (False, True):
        encoder = small(gradient_checkpointing=recompute, **EVERYTHING).train()
        encoder(images).tokens.square().sum().backward()
        found.append([p.grad for p in encoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_pre_training_with_every_option() -> None:
    """Masked auto-encoding through `encode` of a subset, gradients to all."""
    from medxray.pretrain.decoders import SelfAttentionDecoder
    from medxray.pretrain.maskers import RandomMasker
    from medxray.pretrain.model import MaskedAutoEncoder

    encoder = small(**EVERYTHING).train()
    decoder = SelfAttentionDecoder(encoder.width, 16 * 16, dim=32, depth=1, heads=2)
    model = MaskedAutoEncoder(encoder, RandomMasker(0.5), decoder, 1)
    model(torch.randn(2, 1, 64, 64)).loss.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
