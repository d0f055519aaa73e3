"""Gradients of every own kernel, layer and loss against differences of values.

Doubles go through `gradcheck` or through `assert_slopes` with small steps. What computes in float32 whatever it is given
(the kernels of the scan, losses that keep their last sum in float32) is compared at larger steps and 2e-3.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from medxray.classify import HEADS, JoiningHead, MemoryHead
from medxray.classify.losses import label_losses
from medxray.encoders import ENCODERS
from medxray.encoders.scan import cross_merge, cross_scan, scan_map, selective_scan
from medxray.encoders.scan.ssd import ssd
from medxray.encoders.vit import ViT
from medxray.llm import PROJECTORS
from medxray.llm.causal_lm import CausalLM
from medxray.llm.memory_transformer import (
    ConditionalNorm,
    DecoderLayer,
    EncoderLayer,
    MemoryTransformer,
    Norm,
    RelationalMemory,
)
from medxray.pretrain import MASKERS, PIXEL_DECODERS
from medxray.pretrain.model import MaskedAutoEncoder
from medxray.registry import Registry
from medxray.retrieval.context import context_tokens
from medxray.types import Context, Features

NAN = float("nan")
REPORTS = ["the heart is large .", "no effusion . the lungs are clear .", "clear ."]


def made(registry: Registry[Any], name: str, *context: Any, **settings: Any) -> Any:
    return registry.build(registry.settings_of(name)(name=name, **settings), *context)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_slopes(
    value: Callable[[], Tensor], groups: Mapping[str, Sequence[Tensor]], step: float = 1e-4, within: float = 1e-6
) -> None:
    """In one direction of each group of tensors, d value = <gradient, direction>, the difference taken over four values.

    The error is measured in the length of the group's gradient, or a tenth of the longest one's where that is more.
    """
    every = [tensor for group in groups.values() for tensor in group]
    gradients = iter(torch.autograd.grad(value(), every))
    known = {name: [next(gradients) for _ in group] for name, group in groups.items()}
    lengths = {name: float(torch.cat([g.flatten() for g in some]).norm()) for name, some in known.items()}
    longest = max(lengths.values())
    assert longest > 0
    generator = torch.Generator().manual_seed(1)
    for name, group in groups.items():
        directions = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in group]
        length = torch.cat([d.flatten() for d in directions]).norm()
        directions = [d / length for d in directions]
        before, found = [t.detach().clone() for t in group], []
        with torch.no_grad():
            for places in (1, -1, 2, -2, 0):
                for tensor, was, direction in zip(group, before, directions, strict=True):
                    tensor.copy_(was + places * step * direction)
                if places:
                    found.append(value().double().item())
        slope = (8 * (found[0] - found[1]) - (found[2] - found[3])) / (12 * step)
        expected = sum(float((g * d).double().sum()) for g, d in zip(known[name], directions, strict=True))
        error = abs(slope - expected) / max(lengths[name], 0.1 * longest)
        assert error <= within, f"{name}: {error:.1e}"


def assert_module(module: nn.Module, run: Callable[[], Tensor], inputs: Mapping[str, Tensor], **options: float) -> None:
    """Slopes of a weighted sum of what a module gives, in its inputs and the parameters of each of its parts; parameters
    are moved away from zeros first."""
    groups = {name: [tensor.requires_grad_()] for name, tensor in inputs.items()}
    with torch.no_grad():
        for i, (name, parameter) in enumerate(module.named_parameters()):
            parameter.add_(0.1 * draw(*parameter.shape, seed=i + 5).to(parameter))
            if parameter.requires_grad:
                groups.setdefault(".".join(name.split(".")[:2]), []).append(parameter)
    weights = draw(*run().shape, seed=99)
    assert_slopes(lambda: (run().double() * weights).sum(), groups, **options)


FLOAT32 = {"step": 1e-2, "within": 2e-3}


class TestScan:
    @pytest.mark.parametrize("groups", [1, 2])
    def test_kernels(self, groups: int) -> None:
        """Over the end of a tile of steps, with everything that may be given."""
        D, L, N = 6, 40, 3
        told = {"u": draw(2, D, L), "delta": draw(2, D, L, seed=1), "A": -draw(D, N, seed=2).abs(),
                "B": draw(2, groups, N, L, seed=3), "C": draw(2, groups, N, L, seed=4), "D": draw(D, seed=5),
                "delta_bias": draw(D, seed=6)}  # fmt: skip
        leaves = {name: tensor.float().requires_grad_() for name, tensor in told.items()}
        weights = draw(2, D, L, seed=7)
        assert_slopes(
            lambda: (selective_scan(**leaves, delta_softplus=True, backend="cpu").double() * weights).sum(),
            {name: [leaf] for name, leaf in leaves.items()},
            **FLOAT32,
        )

    @pytest.mark.parametrize("backend", ["cpu", "torch"])
    def test_maps(self, backend: str) -> None:
        D, H, W, N = 3, 4, 6, 2
        told = {"maps": draw(2, D, H, W), "delta": draw(2, 4, D, H, W, seed=1), "A": -draw(4 * D, N, seed=2).abs(),
                "B": draw(2, 4, N, H, W, seed=3), "C": draw(2, 4, N, H, W, seed=4), "D": draw(4 * D, seed=5),
                "delta_bias": draw(4 * D, seed=6)}  # fmt: skip
        dtype = torch.float32 if backend == "cpu" else torch.float64
        leaves = {name: tensor.to(dtype).requires_grad_() for name, tensor in told.items()}
        weights = draw(2, D, H, W, seed=7)
        assert_slopes(
            lambda: (scan_map(**leaves, delta_softplus=True, backend=backend).double() * weights).sum(),
            {name: [leaf] for name, leaf in leaves.items()},
            **(FLOAT32 if backend == "cpu" else {}),
        )

    def test_ways_through_a_map(self) -> None:
        assert gradcheck(cross_scan, draw(2, 2, 3, 2).requires_grad_())
        assert gradcheck(lambda s: cross_merge(s, 3, 2), draw(2, 4, 2, 6).requires_grad_())

    def test_chunks_of_ssd(self) -> None:
        given = [draw(1, 7, 2, 2), draw(1, 7, 2), -draw(2).abs(), draw(1, 7, 1, 2), draw(1, 7, 1, 2), draw(2), draw(2)]
        leaves = [tensor.requires_grad_() for tensor in given]
        assert gradcheck(lambda *g: ssd(*g, delta_softplus=True, chunk=3), leaves)


ENCODER_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "sin-cos": ("vit", {"patch": 4}),
    "learned": ("vit", {"patch": 4, "positions": "learned", "position_grid": 2, "registers": 2, "layer_scale": 0.5}),
    "rotary": ("vit", {"patch": 4, "positions": "rope"}),
    "convolutions": ("vit", {"patch": 4, "stem": "convolutions"}),
    "hd": ("hd-vit", {"patch": 16}),
    "vim": ("vim", {"patch": 8}),
    "vmamba": ("vmamba", {}),
}


@pytest.mark.parametrize("case", ENCODER_SETTINGS)
def test_encoders(case: str) -> None:
    name, settings = ENCODER_SETTINGS[case]
    small = {"vit": {"width": 8, "depth": 2, "heads": 2}, "hd-vit": {"width": 8, "depth": 1, "heads": 2},
             "vim": {"width": 8, "depth": 2}, "vmamba": {"dims": 4, "depths": [1, 1, 1, 1]}}[name]  # fmt: skip
    torch.manual_seed(0)
    encoder = made(ENCODERS, name, **small, **settings).double().eval()
    images = draw(2, encoder.channels, 32, 32) if name in ("vmamba", "hd-vit") else draw(2, encoder.channels, 16, 16)
    if case == "convolutions":
        # A ReLU's kink between two values is no slope; batch statistics come in while training alone.
        for norm in encoder.modules():
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.constant_(norm.bias, 4.0)

    def run() -> Tensor:
        features = encoder(images)
        return torch.cat([features.tokens.flatten(1), features.pooled], 1)

    # Small steps, so that hardly any ReLU turns between them.
    assert_module(encoder, run, {"images": images}, step=1e-5, within=1e-5)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("decoder", ["self-attention", "cross-attention", "linear"])
def test_masked_auto_encoder(decoder: str, normalise: bool) -> None:
    """The loss in images and parameters: normalised patches with their floor, weights of the chest, chosen targets."""
    torch.manual_seed(0)
    encoder = ViT(width=8, depth=2, heads=2, patch=4)
    settings = {} if decoder == "linear" else {"dim": 8, "depth": 1, "heads": 2}
    mae = MaskedAutoEncoder(
        encoder, made(MASKERS, "contour", ratio=0.5), made(PIXEL_DECODERS, decoder, encoder, **settings), 1, normalise,
        variance_floor=0.3, predicted=0.4, chest_weight=3.0,
    ).double().train()  # fmt: skip
    images, regions = draw(2, 1, 16, 16), torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(3))
    seeds = torch.tensor([3, 4])
    assert_module(mae, lambda: mae(images, regions, seeds).loss, {"images": images}, **FLOAT32)


class TestClassification:
    @pytest.mark.parametrize("rates", [None, [0.1, 0.5, 0.9]])
    def test_losses(self, rates: list[float] | None) -> None:
        labels = torch.tensor([[1.0, 0.0, -1.0], [0.0, NAN, 1.0]], dtype=torch.float64)
        given = None if rates is None else torch.tensor(rates, dtype=torch.float64)
        logits = draw(2, 3).requires_grad_()
        assert gradcheck(lambda x: label_losses(x, labels, given), logits)
        (gradient,) = torch.autograd.grad(label_losses(logits, labels, given).sum(), logits)
        assert torch.equal(gradient != 0, labels >= 0)

    @pytest.mark.parametrize(
        ("name", "settings"),
        [("linear", {}), ("linear", {"norm": "batch"}), ("linear", {"pooling": "max"}), ("attentive-probe", {"heads": 2}),
         ("attentive-probe", {"heads": 2, "queries": "single"}), ("label-text-fusion", {"heads": 2, "text_width": 5})],
    )  # fmt: skip
    def test_heads(self, name: str, settings: dict[str, Any]) -> None:
        torch.manual_seed(0)
        head = made(HEADS, name, 8, 3, **settings).double().train()
        tokens, pooled = draw(4, 6, 8), draw(4, 8, seed=1)
        uses = {"pooled": pooled} if name == "linear" and "pooling" not in settings else {"tokens": tokens}
        assert_module(head, lambda: head(Features(tokens, (2, 3), pooled)), uses)

    def test_labels_in_the_encoders_last_block(self) -> None:
        torch.manual_seed(0)
        encoder = ViT(width=8, depth=2, heads=2, patch=4)
        head = made(HEADS, "label-text-fusion", 8, 3, heads=2, text_width=5)
        assert isinstance(head, JoiningHead)
        head.join()
        both = nn.ModuleList([encoder, head]).double().train()
        images = draw(4, 1, 16, 16)

        def run() -> Tensor:
            features = encoder.before_last(images)
            return head(features, lambda own: encoder.last(features.tokens, (4, 4), own))

        assert_module(both, run, {"images": images})

    def test_votes_of_neighbours(self) -> None:
        head = made(HEADS, "k-nearest", 8, 3, k=3)
        assert isinstance(head, MemoryHead)
        head.reserve(10)
        head.fill(draw(10, 8).float(), (draw(10, 3, seed=1) > 0).float(), torch.arange(10))
        pooled = draw(4, 8, seed=2).float()
        assert_module(head, lambda: head(Features(pooled[:, None], None, pooled)), {}, **FLOAT32)


class TestReports:
    @pytest.mark.parametrize(
        ("name", "settings"),
        [("linear", {}), ("linear-relu", {"dropout": 0.0}), ("pixel-shuffle", {}), ("pixel-shuffle", {"hidden": 6, "factor": 3}),
         ("q-former", {"queries": 3, "layers": 2, "width": 8, "heads": 2, "hidden": 12, "dropout": 0.0})],
    )  # fmt: skip
    def test_projectors(self, name: str, settings: dict[str, Any]) -> None:
        torch.manual_seed(0)
        projector = made(PROJECTORS, name, 6, 8, **settings).double()
        tokens, pooled = draw(2, 12, 6), draw(2, 3, 6, seed=1)

        def run() -> Tensor:
            return torch.cat([projector.on_grid(tokens, (3, 4)).flatten(1), projector.project(pooled).flatten(1)], 1)

        assert_module(projector, run, {"tokens": tokens, "pooled": pooled}, step=1e-5, within=1e-5)

    @pytest.mark.parametrize("mode", ["release", "after_projection", "before_projection", "none"])
    def test_no_gradient_flows_through_context(self, mode: Any) -> None:
        """As in the release; the token's values hang on the features all the same."""
        project, pooled = nn.Linear(6, 8).double(), draw(2, 6).requires_grad_()
        context = Context(draw(2, 2, 6, seed=1), draw(2, 2, 6, seed=2), [], [])
        tokens = context_tokens(mode, pooled, context, project, lambda vectors, pool: vectors)
        assert not tokens.requires_grad and tokens.shape == (2, 4, 8)
        moved = context_tokens(mode, pooled + 1, context, project, lambda vectors, pool: vectors)
        assert torch.equal(moved, tokens) == (mode == "none")

    def test_relational_memory(self) -> None:
        torch.manual_seed(0)
        memory = RelationalMemory(8, 3, 2, 0.0).double()
        words, before = draw(2, 5, 8), draw(2, 3, 8, seed=1)
        assert_module(memory, lambda: memory(words, before)[0], {"words": words, "memory": before}, step=1e-5, within=1e-5)

    def test_norms_that_a_memory_conditions(self) -> None:
        torch.manual_seed(0)
        plain, conditional = Norm(8).double(), ConditionalNorm(8, 6).double()
        x, memory = draw(2, 5, 8).requires_grad_(), draw(2, 5, 6, seed=1)
        assert gradcheck(plain, x)
        assert_module(conditional, lambda: conditional(x, memory), {"x": x, "memory": memory}, step=1e-5, within=1e-5)

    def test_layers_of_r2gen(self) -> None:
        torch.manual_seed(0)
        encoder, decoder = EncoderLayer(8, 12, 2, 0.0).double(), DecoderLayer(8, 12, 2, 6, 0.0).double()
        x, memory, source = draw(2, 5, 8), draw(2, 5, 6, seed=1), draw(2, 4, 8, seed=2)
        mask = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
        assert_module(encoder, lambda: encoder(x), {"x": x}, step=1e-5, within=1e-5)
        given = {"x": x, "memory": memory, "source": source}
        assert_module(decoder, lambda: decoder(x, memory, decoder.source(source), mask=mask)[0], given, step=1e-5, within=1e-5)

    @pytest.mark.parametrize("with_context", [False, True])
    @pytest.mark.parametrize("name", ["memory-transformer", "causal-lm"])
    def test_losses(self, name: str, with_context: bool) -> None:
        """Of reports of different lengths, one of them cut, in the image's tokens and every parameter."""
        torch.manual_seed(0)
        decoder: MemoryTransformer | CausalLM
        if name == "memory-transformer":
            decoder = MemoryTransformer(0, width=8, hidden=12, heads=2, layers=2, dropout=0.0, threshold=1, max_length=7)
            decoder.prepare(REPORTS)
            decoder, dtype, steps = decoder.double(), torch.float64, FLOAT32 | {"step": 2e-3}
        else:
            config = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
                      "num_attention_heads": 2}  # fmt: skip
            decoder = CausalLM(0, config=config, trainable=True, words=True, vocabulary=300, max_length=7)
            decoder.prepare(REPORTS)
            dtype, steps = torch.float32, FLOAT32
        inputs = {"visual": draw(3, 4, 8).to(dtype)}
        if with_context:
            inputs["context"] = draw(3, 2, 8, seed=1).to(dtype)
        assert_module(decoder, lambda: decoder.loss(inputs["visual"], inputs.get("context"), REPORTS), inputs, **steps)
