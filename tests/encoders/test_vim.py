"""Vision Mamba and state-space duality against other implementations and their definitions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import medxray
from medxray.encoders.scan.ssd import ssd
from medxray.encoders.vim import MambaMixer, SSDMixer, Vim
from medxray.types import SpecError
from medxray.weights import load_encoder

assert medxray.encoders  # which makes the libraries below importable where torchvision's operators are missing


def hub(name: str, **config: Any) -> Any:
    import transformers
    from transformers.models.mamba.modeling_mamba import MambaMixer as Mamba
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as Mamba2

    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    if name == "mamba":
        return Mamba(transformers.MambaConfig(hidden_size=32, state_size=8, **config), layer_idx=0).eval()
    sizes = {"num_heads": 4, "head_dim": 16, "expand": 2, "state_size": 8, "n_groups": 1, "chunk_size": 16}
    return Mamba2(transformers.Mamba2Config(hidden_size=32, **sizes, **config), layer_idx=0).eval()


def by_steps(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor
) -> Tensor:
    """The definition of ssd, one step after the other."""
    delta = F.softplus(delta + bias)
    B, C = (m.repeat_interleave(x.shape[2] // m.shape[2], 2) for m in (B, C))
    state, out = torch.zeros((*x[:, 0].shape, B.shape[3]), dtype=x.dtype), []
    for t in range(x.shape[1]):
        driven = (delta[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        state = torch.exp(delta[:, t] * A)[..., None, None] * state + driven
        out.append((state * C[:, t, :, None]).sum(-1))
    return torch.stack(out, 1) + D[:, None] * x


def arguments(L: int, H: int, G: int, P: int, N: int, scale: float = 2.0) -> list[Tensor]:
    torch.manual_seed(L)
    draw = torch.randn
    given = [draw(2, L, H, P), draw(2, L, H) * scale, -torch.rand(H) * 5, *draw(2, 2, L, G, N), draw(H), draw(H)]
    return [tensor.double().requires_grad_() for tensor in given]


class TestSSD:
    @pytest.mark.parametrize(
        ("L", "H", "G", "P", "N", "chunk"),
        [(1, 2, 1, 3, 2, 64), (65, 4, 2, 5, 3, 16), (200, 4, 4, 8, 16, 64), (130, 2, 1, 4, 4, 64), (64, 2, 1, 2, 2, 64)],
    )
    def test_equals_the_definition(self, L: int, H: int, G: int, P: int, N: int, chunk: int) -> None:
        given = arguments(L, H, G, P, N)
        found, expected = ssd(*given, delta_softplus=True, chunk=chunk), by_steps(*given)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        weights = torch.randn_like(found)
        pairs = [torch.autograd.grad((y * weights).sum(), given) for y in (found, expected)]
        torch.testing.assert_close(*pairs, rtol=1e-8, atol=1e-8)
        single = ssd(*(tensor.float() for tensor in given), delta_softplus=True, chunk=chunk)
        assert single.dtype == torch.float32
        assert (single - expected).abs().max() <= 2e-5 * expected.abs().max()

    def test_derivatives(self) -> None:
        given = arguments(5, 2, 1, 2, 2)
        assert torch.autograd.gradcheck(lambda *g: ssd(*g, delta_softplus=True, chunk=2), given)

    @pytest.mark.parametrize("scale", [1e-6, 1e4])
    def test_extreme_steps(self, scale: float) -> None:
        given = arguments(100, 2, 1, 4, 4, scale)
        found, expected = ssd(*(t.float() for t in given), delta_softplus=True), by_steps(*given)
        assert found.isfinite().all() and (found - expected).abs().max() <= 1e-4 * expected.abs().max()

    def test_half_precision(self) -> None:
        given = [tensor.detach().bfloat16() for tensor in arguments(70, 2, 1, 4, 4)]
        with torch.autocast("cpu", torch.bfloat16):
            found = ssd(*given, delta_softplus=True)
        exact = by_steps(*(tensor.double() for tensor in given))
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), exact, rtol=2**-7, atol=1e-4)

    def test_mistakes(self) -> None:
        x, delta, A, B, C, *_ = arguments(5, 4, 2, 2, 3)
        with pytest.raises(SpecError, match=r"ssd: delta is \(2, 5, 3\), expected \(2, 5, 4\)"):
            ssd(x, delta[..., :3], A, B, C)
        with pytest.raises(SpecError, match=r"ssd: C is \(2, 5, 1, 3\)"):
            ssd(x, delta, A, B, C[:, :, :1])
        with pytest.raises(SpecError, match=r"groups that divide the 3 heads"):
            ssd(x[:, :, :3], delta[..., :3], A[:3], B, C)


def one_way(mixer: Any, source: Any) -> Any:
    """A mixer with the weights of one that knows one direction, its backward direction silent."""
    state = dict(mixer.state_dict())
    for key, value in source.state_dict().items():
        state[key] = value
    for key in state:
        if key.startswith("conv1d_b"):
            # SiLU of zero is zero, so that nothing enters the scan, nor its skip.
            state[key] = torch.zeros_like(state[key])
    mixer.load_state_dict(state)
    return mixer


class TestMixers:
    def test_mamba_is_that_of_transformers(self) -> None:
        theirs = hub("mamba")
        ours = one_way(MambaMixer(32, 64, 8, 4, "auto"), theirs)
        x = torch.randn(2, 50, 32)
        with torch.no_grad():
            torch.testing.assert_close(2 * ours(x), theirs(x), rtol=1e-4, atol=1e-5)

    def test_ssd_is_that_of_transformers(self) -> None:
        theirs = hub("mamba2")
        with torch.no_grad():
            theirs.norm.weight.uniform_(0.5, 2)
        ours = one_way(SSDMixer(32, 64, 8, 4, 16), theirs)
        # The norm takes the half out again, but for its epsilon.
        ours.norm.eps = theirs.norm.variance_epsilon / 4
        x = torch.randn(2, 50, 32)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-5)

    @pytest.mark.parametrize("kind", ["mamba", "ssd"])
    def test_directions_mirror_each_other(self, kind: str) -> None:
        """With the two directions' parameters exchanged, a reversed sequence gives the reversed result."""
        torch.manual_seed(0)
        mixer: Any = MambaMixer(16, 32, 4, 4, "auto") if kind == "mamba" else SSDMixer(16, 32, 4, 4, 8)
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        x = torch.randn(1, 20, 16)
        first = mixer(x)
        state = mixer.state_dict()

        def other(key: str) -> str:
            if key.startswith(("in_proj", "out_proj", "norm")):
                return key
            name, dot, rest = key.partition(".")
            name = {"A_log": "A_b_log", "A_b_log": "A_log"}.get(name) or (name[:-2] if name.endswith("_b") else name + "_b")
            return name + dot + rest

        mixer.load_state_dict({key: state[other(key)].clone() for key in state})
        torch.testing.assert_close(mixer(x.flip(1)).flip(1), first, rtol=1e-5, atol=1e-6)
        assert (mixer(x) - first).abs().max() > 1e-4


def small(**settings: Any) -> Vim:
    torch.manual_seed(0)
    return Vim(**{"width": 32, "depth": 2, "state": 4, **settings}).eval()


class TestVim:
    @pytest.mark.parametrize(("size", "millions"), [("tiny", 7), ("small", 26)])
    def test_sizes_are_those_of_the_paper(self, size: str, millions: int) -> None:
        """Table 1 of arXiv:2401.09417, its head of 1,000 classes left out here."""
        with torch.device("meta"):
            encoder = Vim(size, channels=3)  # type: ignore[arg-type]
        head = 1001 * encoder.width
        assert (sum(p.numel() for p in encoder.parameters()) + head) / 1e6 == pytest.approx(millions, abs=0.5)

    @pytest.mark.parametrize("block", ["mamba", "ssd"])
    def test_the_class_token_stands_in_the_middle(self, block: str) -> None:
        encoder = small(block=block)
        images = torch.randn(1, 1, 64, 96)
        features = encoder(images)
        assert features.grid == (4, 6) and features.tokens.shape == (1, 24, 32)
        # It sees both ends: the first and the last patch change it.
        for place in (0, -16):
            changed = images.clone()
            changed[..., place:, place:][..., :16, :16] += 1
            assert (encoder(changed).pooled - features.pooled).abs().max() > 1e-6
        assert torch.equal(encoder.positions(14, 14), encoder.pos_embed)
        table = encoder.positions(7, 20)
        assert table.shape == (1, 141, 32)
        assert torch.equal(table[:, 70], encoder.pos_embed[:, 98])

    def test_positions_of_another_grid(self) -> None:
        encoder = small()
        with torch.no_grad():
            # A plane stays nearly a plane.
            y, x = torch.meshgrid(torch.arange(14.0), torch.arange(14.0), indexing="ij")
            plane = torch.stack([x, y], -1).flatten(0, 1)
            encoder.pos_embed.zero_()
            encoder.pos_embed[0, :98, :2], encoder.pos_embed[0, 99:, :2] = plane[:98], plane[98:]
        table = encoder.positions(28, 28)
        grid = torch.cat([table[:, :392], table[:, 393:]], 1).view(28, 28, 32)
        expected = (torch.arange(28.0) + 0.5) / 2 - 0.5
        torch.testing.assert_close(grid[14, 6:-6, 0], expected[6:-6], rtol=0, atol=0.06)
        torch.testing.assert_close(grid[6:-6, 14, 1], expected[6:-6], rtol=0, atol=0.06)

    def test_public_file(self, tmp_path: Path) -> None:
        """Under `model`, for RGB, with a head."""
        source = small(channels=3)
        state = {**source.state_dict(), "head.weight": torch.zeros(5, 32), "head.bias": torch.zeros(5)}
        assert {"layers.0.mixer.A_b_log", "layers.0.mixer.conv1d_b.weight", "layers.0.mixer.dt_proj_b.bias",
                "layers.1.norm.weight", "norm_f.weight", "patch_embed.proj.bias", "pos_embed"} < set(state)  # fmt: skip
        torch.save({"model": state}, tmp_path / "vim.pth")
        torch.manual_seed(1)
        twin = Vim(width=32, depth=2, state=4, channels=3).eval()
        load_encoder(twin, str(tmp_path / "vim.pth"))
        images = torch.randn(1, 3, 32, 48)
        assert torch.equal(twin(images).pooled, source(images).pooled)
        gray = Vim(width=32, depth=2, state=4).eval()
        load_encoder(gray, str(tmp_path / "vim.pth"))

    def test_recomputed_activations_change_nothing(self) -> None:
        images, found = torch.randn(2, 1, 32, 32), []
        for recompute in (False, True):
            encoder = small(gradient_checkpointing=recompute).train()
            encoder(images).tokens.square().sum().backward()
            found.append([p.grad for p in encoder.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))

    def test_mistakes(self) -> None:
        with pytest.raises(SpecError, match=r"40 x 32 is not a multiple of encoder.patch 16; take 32 x 32"):
            small()(torch.zeros(1, 1, 40, 32))
        with pytest.raises(ValueError, match=r"head must divide expand \* width = 64, found 48"):
            small(block="ssd", head=48)
