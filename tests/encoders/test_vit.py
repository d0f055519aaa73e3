"""What the Vision Transformer offers beside what MAE's golden tensors hold."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from medxray.encoders.vit import ViT
from medxray.layers import Attention, LayerScale, rotary_positions, sincos_positions
from medxray.types import SpecError


def small(**settings: Any) -> ViT:
    torch.manual_seed(0)
    return ViT(**{"width": 48, "depth": 2, "heads": 3, **settings}).eval()


EVERYTHING = {"positions": "rope", "registers": 4, "layer_scale": 0.1}
LEARNED = {"positions": "learned", "position_grid": [2, 5]}


@pytest.mark.parametrize("settings", [{}, EVERYTHING, LEARNED], ids=["plain", "everything", "learned"])
@pytest.mark.parametrize("patch", [8, 14, 16, 32, 64])
def test_any_patch_and_grid(settings: dict[str, Any], patch: int) -> None:
    features = small(patch=patch, channels=3, **settings)(torch.randn(2, 3, 2 * patch, 3 * patch))
    assert features.grid == (2, 3) and features.tokens.shape == (2, 6, 48)
    with pytest.raises(SpecError, match=rf"not a multiple of encoder.patch {patch}; take "):
        small(patch=patch)(torch.zeros(1, 1, 2 * patch + 1, patch))


@pytest.mark.parametrize("settings", [{}, EVERYTHING, LEARNED], ids=["plain", "everything", "learned"])
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
    # At other places the same tokens are something else, where encoding knows the places.
    if settings == EVERYTHING:
        others = encoder.encode(tokens.gather(1, keep[..., None].expand(-1, -1, 48)), (3, 4), (keep * 5 + 1) % 12)
        assert (others - first).abs().max() > 1e-4
    assert kept(keep[:, :1]).shape == (2, 2, 48)


@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["plain", "everything"])
def test_a_subset_is_the_whole_with_the_others_out_of_sight(settings: dict[str, Any]) -> None:
    """Against attention over every token of the grid in which nobody looks at those that are left out."""
    encoder, keep = small(**settings), torch.tensor([[9, 0, 4, 7, 2]])
    tokens = encoder.embed(torch.randn(1, 1, 48, 64))
    found = encoder.encode(tokens[:, keep[0]], (3, 4), keep)

    single = 1 + encoder.registers
    x = torch.cat([encoder.cls_token, *([encoder.reg_token] if encoder.registers else []), tokens], 1)
    seen = torch.cat([torch.arange(single), single + keep[0]])
    hidden = torch.full((x.shape[1],), float("-inf")).index_fill(0, seen, 0.0)
    turn = torch.ones(x.shape[1], 8, dtype=torch.complex64)
    if settings:
        row, column = torch.meshgrid(torch.arange(3.0), torch.arange(4.0), indexing="ij")
        angles = torch.stack([place[..., None] * 100 ** (-torch.arange(4) / 4) for place in (column, row)], 2)
        turn[single:] = torch.polar(torch.ones(12, 8), angles.view(12, 8))
    for block in encoder.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).view(1, -1, 3, 3, 16).permute(2, 0, 3, 1, 4)
        q, k = (torch.view_as_real(torch.view_as_complex(t.reshape(1, 3, -1, 8, 2)) * turn).flatten(3) for t in (q, k))
        y = ((q @ k.mT / 4 + hidden).softmax(3) @ v).transpose(1, 2).flatten(2)
        x = x + block.ls1(block.attn.proj(y))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    expected = encoder.norm(x[:, [0, *(single + keep[0]).tolist()]])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_hd_stem() -> None:
    """A token sees its own pixels and no others, so that masked ones need not be blanked."""
    encoder = small(patch=32, stem="hd")
    images = torch.randn(1, 1, 64, 96)
    changed = images.clone()
    changed[:, :, 32:, 32:64] += 1
    moved = (encoder.embed(changed) - encoder.embed(images)).abs().amax(2)[0] > 1e-4
    assert moved.tolist() == [False, False, False, False, True, False]
    assert not encoder.overlapping
    with pytest.raises(ValueError, match=r"stem: hd needs a patch that is a multiple of 16, .* found 24"):
        small(patch=24, stem="hd")


class TestRope:
    def test_attention_depends_on_differences_of_place(self) -> None:
        torch.manual_seed(0)
        attention, x = Attention(48, 3), torch.randn(1, 12, 48)
        wide = rotary_positions(16, 8, 9, torch.device("cpu")).view(8, 9, 8)
        assert wide.dtype == torch.float32
        results = [
            attention(x, wide[row : row + 3, column : column + 4].reshape(12, 8)) for row, column in ((0, 0), (4, 2), (5, 5))
        ]
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-5)
        assert (attention(x) - results[0]).abs().max() > 1e-3
        # Rows and columns are told apart.
        turned = attention(x, wide[:4, :3].transpose(0, 1).reshape(12, 8))
        assert (turned - results[0]).abs().max() > 1e-3

    def test_doubles_stay_doubles(self) -> None:
        """Differences of places decide in all digits."""
        attention, x = Attention(48, 3).double(), torch.randn(1, 12, 48).double()
        # Angles that float32 holds exactly.
        angles = torch.arange(96.0).view(12, 8) / 64
        torch.testing.assert_close(attention(x, angles + 2), attention(x, angles), rtol=1e-12, atol=1e-14)

    def test_class_token_and_registers_have_no_place(self) -> None:
        """At row 0 and column 0 nothing turns; elsewhere a patch is turned and what has no place is not."""
        turned, plain = (small(positions=positions, registers=2) for positions in ("rope", "sincos"))
        token = torch.randn(1, 1, 48)
        at = [turned.encode(token, (3, 3), torch.tensor([[place]])) for place in (0, 5)]
        torch.testing.assert_close(at[0], plain.encode(token, (1, 1)), rtol=0, atol=0)
        assert (at[1] - at[0]).abs().max() > 1e-4

    def test_no_position_is_added(self) -> None:
        encoder = small(positions="rope")
        flat = encoder.embed(torch.ones(1, 1, 32, 32))
        assert torch.equal(flat[:, 0], flat[:, 3])

    def test_heads_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match=r"rope needs width / heads divisible by 4, found 36 / 6"):
            small(width=36, heads=6, positions="rope")


class TestPositionGrid:
    def test_sincos_at_places_between(self) -> None:
        """A grid of twice as many tokens lies over the same image: two of its tokens about each of the old one's."""
        device = torch.device("cpu")
        angle = lambda place: place * 10000 ** (-torch.arange(4) / 4)  # noqa: E731
        table = sincos_positions(16, 6, 4, device, (3, 8)).view(6, 4, 16)
        assert table.dtype == torch.float32
        for row, column in ((0, 0), (5, 3), (2, 1)):
            x, y = angle((column + 0.5) * 2 - 0.5), angle((row + 0.5) / 2 - 0.5)
            expected = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()])
            torch.testing.assert_close(table[row, column], expected, rtol=1e-5, atol=1e-5)
        # At the grid's own size nothing changes, to the bit.
        for h, w in ((14, 14), (5, 9), (80, 80)):
            assert torch.equal(sincos_positions(32, h, w, device, (h, w)), sincos_positions(32, h, w, device))
            assert torch.equal(rotary_positions(16, h, w, device, (h, w)), rotary_positions(16, h, w, device))
        wide = rotary_positions(16, 6, 4, device, (3, 8)).view(6, 4, 8)
        places = torch.tensor([2.5, 0.25])[:, None] * 100 ** (-torch.arange(4) / 4)
        torch.testing.assert_close(wide[1, 1], places.flatten())

    @pytest.mark.parametrize("positions", ["sincos", "rope"])
    def test_the_setting(self, positions: str) -> None:
        images = torch.randn(1, 1, 32, 64)
        plain, same, other = (small(positions=positions, position_grid=grid) for grid in (None, [2, 4], 3))
        assert torch.equal(plain(images).tokens, same(images).tokens)
        assert (plain(images).tokens - other(images).tokens).abs().max() > 1e-3
        assert other.position_grid == (3, 3)
        with pytest.raises(ValueError, match=r"position_grid must be a number or \[rows, columns\], found \[1, 2, 3\]"):
            small(position_grid=[1, 2, 3])

    def test_learned(self) -> None:
        encoder, images = small(positions="learned", position_grid=[2, 3], registers=1), torch.randn(2, 1, 32, 48)
        table = encoder.pos_embed
        assert table is not None and table.shape == (1, 7, 48) and table.std() > 0.01
        assert small(positions="learned").pos_embed.shape == (1, 1 + 14 * 14, 48)
        with torch.no_grad():
            tokens = encoder.patch_embed(images)
            assert torch.equal(encoder.embed(images), tokens + table[:, 1:])
            before = encoder.encode(tokens, (2, 3))
            bump = torch.randn(48)
            table[:, 0] += bump
            moved = encoder.encode(tokens, (2, 3)) - before
            assert moved[:, 0].abs().max() > 1e-2
            # Nothing but the class token was moved: its own place is no register's.
            table[:, 0] -= bump
            encoder.cls_token += bump
            torch.testing.assert_close(encoder.encode(tokens, (2, 3)) - before, moved, rtol=0, atol=1e-5)
            # A constant table stays constant on any grid.
            table[:, 1:] = 0.5
            for size in ((16, 16), (64, 80)):
                other = torch.randn(1, 1, *size)
                torch.testing.assert_close(encoder.embed(other), encoder.patch_embed(other) + 0.5)


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
        theirs = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=56, num_classes=0)
        ours = ViT("small", patch=14, channels=3, registers=4, layer_scale=1e-5)
        shapes = {key: value.shape for key, value in theirs.state_dict().items() if key != "pos_embed"}
        assert {key: value.shape for key, value in ours.state_dict().items()} == shapes

    def test_plain_keys_are_those_of_timm(self) -> None:
        theirs = timm.create_model("vit_small_patch16_224", num_classes=0)
        shapes = {key: value.shape for key, value in theirs.state_dict().items() if key != "pos_embed"}
        assert {key: value.shape for key, value in ViT("small", channels=3).state_dict().items()} == shapes

    def test_images_are_what_timm_makes_of_them(self) -> None:
        """The same weights, class token, registers and scales, with timm's learned table holding our positions."""
        torch.manual_seed(0)
        theirs = timm.create_model(
            "vit_tiny_patch16_224", num_classes=0, img_size=(32, 48), reg_tokens=2, init_values=0.5, no_embed_class=True
        ).eval()
        ours = ViT("tiny", channels=3, registers=2, layer_scale=0.1).eval()
        with torch.no_grad():
            theirs.pos_embed.copy_(sincos_positions(192, 2, 3, torch.device("cpu")))
            theirs.reg_token.normal_()
            state = theirs.state_dict()
            state.pop("pos_embed")
            ours.load_state_dict(state)
            images = torch.randn(2, 3, 32, 48)
            expected, found = theirs.forward_features(images), ours(images)
        torch.testing.assert_close(found.tokens, expected[:, 3:], rtol=1e-4, atol=1e-4)


def test_recomputed_activations_change_nothing() -> None:
    images, found = torch.randn(2, 1, 32, 32), []
    for recompute in (False, True):
        encoder = small(gradient_checkpointing=recompute, **EVERYTHING).train()
        encoder(images).tokens.square().sum().backward()
        found.append([p.grad for p in encoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
