"""What `medxray show` says of an encoder: counts that can be worked out by hand, and memory that is really taken."""

import ctypes
import gc
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

from medxray.encoders import ENCODERS, Encoder
from medxray.encoders.adapt import features_from
from medxray.encoders.vit import ViT
from medxray.summary import _from_shapes, _measured, _watched, spec_of_encoder, summarise_encoder
from medxray.types import Features, SpecError, WeightsError


def test_arithmetic_of_a_vit() -> None:
    """Two for each multiply-add of the patches, the four projections, the MLP and the two products of attention."""
    D, depth, N = 32, 3, 17
    patches = 2 * 16 * 8 * 8 * D
    block = 2 * N * (4 * D * D + 8 * D * D)
    attention = 2 * 2 * N * N * D
    found = summarise_encoder(spec_of_encoder("vit", ["width=32", "depth=3", "heads=2", "patch=8"], 32))
    assert found["FLOP an image"] == (
        f"{(patches + depth * (block + attention)) / 1e6:.1f} M forward (matrix products {depth * block / 1e6:.1f} M, "
        f"attention {depth * attention / 1e3:.1f} k, convolutions {patches / 1e3:.1f} k)"
    )
    assert found["tokens an image"] == "16 (4 x 4) of width 32"
    assert found["pixels a token"] == "8 x 8"
    assert "32 x 32 pixels; a multiply-add is 2 FLOP" in found["counted"]


def test_parts_add_up() -> None:
    for name, settings in (("vit", ["width=32", "heads=2"]), ("timm", ["model=test_vit"]), ("transformers", [])):
        found = summarise_encoder(spec_of_encoder(name, settings))
        parts = [int(value.replace(",", "")) for key, value in found.items() if key.startswith("  ")]
        whole = int(found["parameters"].replace(",", ""))
        # Single tokens and tables of positions belong to no part.
        assert len(parts) > 1 and 0.9 * whole < sum(parts) <= whole


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vit", {}),
        ("vit", {"gradient_checkpointing": True}),
        ("vmamba", {}),
        ("vmamba", {"gradient_checkpointing": True}),
        ("timm", {}),
        ("transformers", {}),
    ],
)
def test_shapes_alone_give_what_a_pass_takes(name: str, settings: dict[str, Any]) -> None:
    encoder = ENCODERS.build(ENCODERS.settings_of(name)(name=name, **settings))
    cost = _from_shapes(encoder, 64, 96)
    assert cost is not None
    # Norms need more than one image, and what all images share, such as tables that the first pass makes, is left out.
    _watched(encoder.train(), 2, 64, 96)
    two, four = (_watched(encoder.train(), count, 64, 96)[1].kept for count in (2, 4))
    kept = cost.activations.split(" in float32, while training")[0]
    number, unit = kept.split()
    assert float(number) * {"KiB": 2**10, "MiB": 2**20}[unit] == pytest.approx((four - two) / 2, rel=0.03)
    features, watch = _watched(encoder.eval(), 1, 64, 96)
    assert cost.arithmetic == watch.arithmetic()
    assert features.grid is not None and f"({features.grid[0]} x {features.grid[1]})" in cost.tokens


def test_memory_is_that_of_the_process() -> None:
    def resident() -> int:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    if not Path("/proc/self/statm").is_file() or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("needs Linux with glibc")
    encoder, images = ViT("tiny").train(), torch.zeros(8, 1, 224, 224)
    encoder(images)
    before = resident()
    features = encoder(images)
    taken = resident() - before
    del features
    assert _watched(encoder, 8, 224, 224)[1].kept == pytest.approx(taken, rel=0.1)


def test_full_size_ones_are_at_once() -> None:
    started = time.perf_counter()
    base = summarise_encoder(spec_of_encoder("vmamba", ["size=base"]))
    large = summarise_encoder(spec_of_encoder("vit", ["size=large"], 1280))
    assert time.perf_counter() - started < 30
    assert base["FLOP an image"].startswith("30.") and " G forward" in base["FLOP an image"]
    assert "medxray::scan" in base["FLOP an image"] and "not counted" not in base["FLOP an image"]
    assert large["tokens an image"] == "6,400 (80 x 80) of width 1024"
    assert large["FLOP an image"].startswith("7,897.")
    assert large["activations an image"] == "9.4 GiB in float32, while training"


class Conv(Encoder):
    """A convolution and what a subclass adds."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.stride = 4, 8
        self.conv = nn.Conv2d(1, 4, 8, 8)

    def more(self, tokens: Tensor) -> Tensor:
        return tokens

    def forward(self, images: Tensor) -> Features:
        features = features_from(self.conv(images))
        return Features(self.more(features.tokens), features.grid, features.pooled)


@pytest.fixture
def operation() -> Any:
    """An operation of another package, which torch does not know."""
    library = torch.library.Library("elsewhere", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")
    library.impl("twice", lambda x: torch.empty_like(x), "Meta")
    yield torch.ops.elsewhere.twice
    flop_registry.pop(torch.ops.elsewhere.twice, None)
    library._destroy()


def test_operations_without_a_formula_are_named(operation: Any) -> None:
    class Foreign(Conv):
        def more(self, tokens: Tensor) -> Tensor:
            with torch.no_grad():
                return operation(operation(tokens))

    for find in (_from_shapes, _measured):
        said = find(Foreign(), 16, 16).arithmetic
        assert said == "2.0 k forward; not counted, for want of a formula: elsewhere::twice (2 times)"

    @register_flop_formula(operation)
    def twice(x: Any, out_shape: Any = None) -> int:
        return 10**6

    assert _from_shapes(Foreign(), 16, 16).arithmetic == "2.0 M forward (elsewhere::twice 2.0 M, convolutions 2.0 k)"


def test_an_encoder_that_needs_numbers_is_measured() -> None:
    class Needy(Conv):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def more(self, tokens: Tensor) -> Tensor:
            assert tokens.sum().item() < 1e9
            return self.norm(tokens.transpose(1, 2)).transpose(1, 2)

    encoder = Needy().train()
    assert _from_shapes(encoder, 16, 24) is None
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    cost = _measured(encoder, 16, 24)
    assert cost.tokens == "6 (2 x 3) of width 4"
    assert "in evaluation" in cost.activations and "by running a black image of 16 x 24 pixels" in cost.origin
    encoder.gradient_checkpointing = True
    assert "while training" in _measured(encoder, 16, 24).activations
    assert encoder.training
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


def test_sizes_and_mistakes(tmp_path: Path) -> None:
    assert spec_of_encoder("vit").data.image_size == 224
    assert spec_of_encoder("timm", ["model=test_vit", "image_size=96"]).data.image_size == 96
    assert spec_of_encoder("vit", image_size=[64, 32]).data.image_size == [64, 32]
    with pytest.raises(SpecError, match=r"encoder.dephts: unknown setting of 'vmamba'; did you mean 'depths'"):
        spec_of_encoder("vmamba", ["dephts=[1, 1, 1, 1]"])
    with pytest.raises(SpecError, match=r"100 x 100 is not a multiple of encoder.patch 16; take 96 x 96"):
        summarise_encoder(spec_of_encoder("vit", image_size=100))
    # Weights that a spec names are read, so that it is seen whether they fit.
    torch.save(ViT(width=32, heads=2).state_dict(), tmp_path / "vit.pt")
    settings = ["width=32", "heads=2", f"weights={tmp_path / 'vit.pt'}"]
    assert summarise_encoder(spec_of_encoder("vit", settings))["trained parameters"]
    with pytest.raises(WeightsError, match=r"vit\.pt do not fit ViT: .*missing keys"):
        summarise_encoder(spec_of_encoder("vit", [*settings, "depth=7"]))
