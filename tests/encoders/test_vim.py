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
from medxray.types import SpecError, WeightsError
from medxray.weights import IMAGENET_MEAN, IMAGENET_STD, load_encoder

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


def by_steps(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
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

    def test_long_steps_do_not_blur_short_ones(self) -> None:
        """A step that forgets everything has an exponent beside which those of the steps after it are rounding."""
        x, delta, A, B, C, *_ = arguments(200, 2, 1, 4, 4)
        with torch.no_grad():
            delta.fill_(1e-3)[:, [3, 70]] = 1000.0
            A.fill_(-16.0)
        given = [tensor.detach() for tensor in (x, delta, A, B, C)]
        zeros = torch.zeros(2, dtype=torch.float64)
        # The inverse of the softplus in the definition.
        expected = by_steps(x, delta + torch.log(-torch.expm1(-delta)), A, B, C, zeros, zeros)
        found = ssd(*(tensor.float() for tensor in given))
        for part in (slice(4, 70), slice(71, 200)):
            assert (found - expected)[:, part].abs().max() <= 1e-6 * expected[:, part].abs().max()

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
        with pytest.raises(SpecError, match=r"ssd: B is \(2, 5, 2, 3\), .* G dividing the 3 heads of x"):
            ssd(x[:, :, :3], delta[..., :3], A[:3], B, C)
        with pytest.raises(SpecError, match=r"ssd: B is \(2, 5, 3\), expected \(2, 5, G, N\)"):
            ssd(x, delta, A, B[:, :, 0], C)
        with pytest.raises(SpecError, match=r"ssd: B is \(2, 4, 2, 3\), expected \(2, 5, 2, 3\) beside x \(2, 5, 4, 2\)"):
            ssd(x, delta, A, B[:, :4], C)
        with pytest.raises(SpecError, match=r"ssd: A is \(3,\), expected \(4,\)"):
            ssd(x, delta, A[:3], B, C)
        for name in ("D", "delta_bias"):
            with pytest.raises(SpecError, match=rf"ssd: {name} is \(2, 2\), expected \(4,\)"):
                ssd(x, delta, A, B, C, **{name: torch.ones(2, 2)})
        with pytest.raises(SpecError, match=r"ssd: x is \(2, 0, 4, 2\), .* at least one step"):
            ssd(x[:, :0], delta[:, :0], A, B[:, :0], C[:, :0])


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


def literal_mamba(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Algorithm 1 of arXiv:2401.09417 for one sequence (L, D), one step, channel and number of state after the other."""
    x, gate = (x @ state["in_proj.weight"].T).chunk(2, 1)
    results = []
    for end, A in (("", "A_log"), ("_b", "A_b_log")):
        u = x.flip(0) if end else x
        kernel, bias = state[f"conv1d{end}.weight"][:, 0], state[f"conv1d{end}.bias"]
        taps = kernel.shape[1]
        seen = torch.cat([torch.zeros_like(u[: taps - 1]), u])
        u = F.silu(torch.stack([(seen[t : t + taps] * kernel.T).sum(0) + bias for t in range(len(u))]))
        rank, N = state[f"dt_proj{end}.weight"].shape[1], state[A].shape[1]
        steps, B, C = (u @ state[f"x_proj{end}.weight"].T).split([rank, N, N], 1)
        delta = F.softplus(steps @ state[f"dt_proj{end}.weight"].T + state[f"dt_proj{end}.bias"])
        h, y = torch.zeros(u.shape[1], N, dtype=u.dtype), torch.zeros_like(u)
        for t in range(len(u)):
            for n in range(N):
                h[:, n] = torch.exp(-delta[t] * state[A][:, n].exp()) * h[:, n] + delta[t] * B[t, n] * u[t]
            y[t] = h @ C[t] + state[f"D{end}"] * u[t]
        results.append(y.flip(0) if end else y)
    return (sum(results) * F.silu(gate) / 2) @ state["out_proj.weight"].T


def literal_ssd(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The same for Mamba-2's mixer, in both directions."""
    heads, inner = len(state["D"]), len(state["norm.weight"])
    N = (len(state["in_proj.weight"]) - 2 * inner - heads) // 2
    gate, mixed, steps = (x @ state["in_proj.weight"].T).split([inner, inner + 2 * N, heads], 1)
    results = []
    for end, A in (("", "A_log"), ("_b", "A_b_log")):
        u, delta = (mixed.flip(0), steps.flip(0)) if end else (mixed, steps)
        kernel = state[f"conv1d{end}.weight"]
        u = F.pad(u.T, (kernel.shape[2] - 1, 0))[None]
        u, B, C = F.silu(F.conv1d(u, kernel, state[f"conv1d{end}.bias"], groups=len(kernel)))[0].T.split([inner, N, N], 1)
        rest = (B[None, :, None], C[None, :, None], state[f"D{end}"], state[f"dt_bias{end}"])
        y = by_steps(u.unflatten(1, (heads, -1))[None], delta[None], -state[A].exp(), *rest)[0].flatten(1)
        results.append(y.flip(0) if end else y)
    y = sum(results) / 2 * F.silu(gate)
    y = y / (y.square().mean(1, keepdim=True) + 1e-5).sqrt() * state["norm.weight"]
    return y @ state["out_proj.weight"].T


def small(**settings: Any) -> Vim:
    torch.manual_seed(0)
    return Vim(**{"width": 32, "depth": 2, "state": 4, **settings}).eval()


class TestVim:
    @pytest.mark.parametrize(("size", "millions"), [("tiny", 7), ("small", 26), ("base", 98)])
    def test_sizes_are_those_of_the_paper(self, size: str, millions: int) -> None:
        """Table 1 of arXiv:2401.09417, its head of 1,000 classes left out here."""
        with torch.device("meta"):
            encoder = Vim(size, channels=3)  # type: ignore[arg-type]
        head = 1001 * encoder.width
        assert (sum(p.numel() for p in encoder.parameters()) + head) / 1e6 == pytest.approx(millions, abs=0.5)

    @pytest.mark.parametrize("block", ["mamba", "ssd"])
    def test_equals_the_definition(self, block: str) -> None:
        """From pixels to tokens, with every parameter moved away from where it starts."""
        encoder = small(block=block, width=16, patch=8, grid_side=3, head=8).double()
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        state, image = encoder.state_dict(), torch.randn(1, 24, 24).double()
        patches = [image[:, i : i + 8, j : j + 8].flatten() for i in range(0, 24, 8) for j in range(0, 24, 8)]
        rows = torch.stack(patches) @ state["patch_embed.proj.weight"].flatten(1).T + state["patch_embed.proj.bias"]
        x = torch.cat([rows[:4], state["cls_token"][0], rows[4:]]) + state["pos_embed"][0]

        def norm(name: str) -> Tensor:
            return x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt() * state[f"{name}.weight"]

        for i in range(2):
            prefix = f"layers.{i}.mixer."
            mixer = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            x = x + (literal_mamba if block == "mamba" else literal_ssd)(mixer, norm(f"layers.{i}.norm"))
        x = norm("norm_f")
        features = encoder(image[None])
        assert features.grid == (3, 3)
        # The decays are made in float32 and then double.
        torch.testing.assert_close(features.pooled[0], x[4], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(features.tokens[0], torch.cat([x[:4], x[5:]]), rtol=1e-5, atol=1e-6)

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
            # A plane stays a plane, away from its border.
            y, x = torch.meshgrid(torch.arange(14.0), torch.arange(14.0), indexing="ij")
            plane = torch.stack([x, y], -1).flatten(0, 1)
            encoder.pos_embed.zero_()
            encoder.pos_embed[0, :98, :2], encoder.pos_embed[0, 99:, :2] = plane[:98], plane[98:]
        table = encoder.positions(28, 28)
        grid = torch.cat([table[:, :392], table[:, 393:]], 1).view(28, 28, 32)
        expected = (torch.arange(28.0) + 0.5) / 2 - 0.5
        torch.testing.assert_close(grid[14, 6:-6, 0], expected[6:-6], rtol=0, atol=1e-4)
        torch.testing.assert_close(grid[6:-6, 14, 1], expected[6:-6], rtol=0, atol=1e-4)
        assert encoder.bfloat16().positions(28, 28).dtype == torch.bfloat16

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
        pixels = torch.rand(1, 1, 32, 48)
        m, s = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (IMAGENET_MEAN, IMAGENET_STD))
        found, expected = gray((pixels - 0.5) / 0.5), source((pixels.expand(-1, 3, -1, -1) - m) / s)
        torch.testing.assert_close(found.pooled, expected.pooled, rtol=1e-4, atol=1e-4)
        with pytest.raises(WeightsError, match=r"pos_embed is \(1, 197, 32\) in the file and \(1, 730, 32\) in the model"):
            load_encoder(small(channels=3, grid_side=27), str(tmp_path / "vim.pth"))

    def test_patches_that_overlap(self) -> None:
        """As in the public `_ft_` files: 224 pixels are 27 x 27 patches of 16, one every 8."""
        encoder = small(step=8, grid_side=7)
        features = encoder(torch.randn(1, 1, 64, 64))
        assert encoder.stride == 8 and features.grid == (7, 7)
        assert encoder(torch.randn(1, 1, 224, 224)).grid == (27, 27)
        assert encoder.patch_embed.proj.weight.shape == (32, 1, 16, 16)
        with pytest.raises(SpecError, match=r"60 x 8 is not a multiple of encoder.step 8 from .*patch 16 on; take 64 x 16"):
            encoder(torch.zeros(1, 1, 60, 8))
        with pytest.raises(ValueError, match=r"step must divide patch 16, found 6"):
            small(step=6)

    def test_heads_are_64_channels_or_what_divides(self) -> None:
        for width, heads in ((192, 6), (32, 1), (24, 3)):
            mixer = small(width=width, block="ssd").layers[0].mixer
            assert mixer.D.shape == mixer.A_b_log.shape == (heads,)

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
