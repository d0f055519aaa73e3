"""One sweep over every registered encoder, then what each family promises beside it."""

import copy
import functools
import json
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import medxray
from medxray.encoders import ENCODERS, Encoder
from medxray.encoders.adapt import features_from, stride_of, try_out
from medxray.encoders.shapes import shapes_only
from medxray.encoders.timm import TimmEncoder
from medxray.encoders.transformers import TransformersEncoder
from medxray.encoders.vmamba import VMamba
from medxray.types import Features, SpecError, WeightsError
from medxray.weights import IMAGENET_MEAN, IMAGENET_STD, load_encoder

TRANSFORMERS: dict[str, dict[str, Any]] = {
    "swin": {"model_type": "swin", "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4},
    "vit": {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    "dinov2": {
        "model_type": "dinov2_with_registers", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    },
    "convnext": {"model_type": "convnext", "hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1]},
    "resnet": {
        "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1],
        "layer_type": "basic",
    },
}  # fmt: skip
SMALL: dict[str, list[dict[str, Any]]] = {
    "vit": [
        {"width": 32, "depth": 2, "heads": 2},
        {"width": 32, "depth": 2, "heads": 2, "registers": 2, "layer_scale": 1e-4},
    ],
    "hd-vit": [{"width": 32, "depth": 2, "heads": 2, "patch": 32}],
    "vim": [{"width": 32, "depth": 2, "head": 16}],
    "vmamba": [{"dims": 8}, {"dims": 8, "version": "v0", "ssm_ratio": 2.0, "state": 2}],
    # A map with channels first, a sequence, a map with channels last, rotary positions.
    "timm": [
        {"model": "test_resnet"},
        {"model": "test_vit"},
        {"model": "test_mambaout"},
        {"model": "eva02_tiny_patch14_224", "arguments": {"embed_dim": 32, "depth": 1, "num_heads": 2}},
    ],
    "transformers": [{"config": config} for config in TRANSFORMERS.values()],
}
"""Settings that keep the sweep quick; a part that is not named here is swept as it comes."""


def choices(name: str) -> list[dict[str, Any]]:
    """Each word that a setting may have in place of its default; back-ends of the scan have tests of their own."""
    found = []
    for key, field in ENCODERS.settings_of(name).model_fields.items():
        if typing.get_origin(field.annotation) is Literal and key not in ("name", "scan"):
            found += [{key: word} for word in typing.get_args(field.annotation) if word != field.default]
    return found


def cases() -> list[Any]:
    """Every registered encoder with its small settings and every choice, for gray and for colour images."""
    found = []
    for name in sorted(set(ENCODERS.names()) - {"module"}):
        small = SMALL.get(name, [{}])
        own = "channels" in ENCODERS.settings_of(name).model_fields
        for at, settings in enumerate([*small, *({**small[0], **choice} for choice in choices(name))]):
            for more in ({"channels": 1}, {"channels": 3}) if own else ({},):
                label = "-".join([f"{name}{at or ''}", *(f"{n}ch" for n in more.values())])
                found.append(pytest.param((name, {**settings, **more}), id=label))
    return found


def build(name: str, settings: dict[str, Any], seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    return ENCODERS.build(ENCODERS.settings_of(name)(name=name, **settings)).eval()


def images_for(encoder: Encoder, batch: int = 3) -> Tensor:
    """Not square, a multiple of the stride."""
    side = encoder.stride * max(2, 64 // encoder.stride)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, encoder.channels, side, side + encoder.stride, generator=generator)


def everything(encoder: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those that are not saved included."""
    held = {**dict(encoder.named_parameters()), **dict(encoder.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in held.items()}


@torch.no_grad()
def check_declarations(encoder: Encoder, other: Encoder) -> None:
    """Width, stride, channels and normalisation are as declared; the tokens are a map of finite numbers."""
    images = images_for(encoder)
    for numbers in (encoder.mean, encoder.std):
        assert len(numbers) in (1, encoder.channels)
    assert min(encoder.std) > 0
    features = encoder(images)
    B, N, D = features.tokens.shape
    assert len(images) == B and encoder.width == D
    assert features.pooled.shape == (B, D)
    assert features.grid == (images.shape[2] // encoder.stride, images.shape[3] // encoder.stride)
    assert features.grid[0] * features.grid[1] == N
    assert features.tokens.isfinite().all() and features.pooled.isfinite().all()
    assert features.tokens.dtype == features.pooled.dtype == torch.float32


@torch.no_grad()
def check_that_it_looks(encoder: Encoder, other: Encoder) -> None:
    """Other images and other seeds give other tokens."""
    images = images_for(encoder)
    features = encoder(images)
    assert (features.pooled[0] - features.pooled[1]).abs().max() > 1e-6
    assert not torch.equal(other(images).tokens, features.tokens)


@torch.no_grad()
def check_that_images_stand_alone(encoder: Encoder, other: Encoder) -> None:
    """Neither the number nor the order of the images in a batch counts."""
    images = images_for(encoder)
    features = encoder(images)
    alone, turned = encoder(images[1:2]), encoder(images.flip(0))
    for name in ("tokens", "pooled"):
        whole = getattr(features, name)
        torch.testing.assert_close(getattr(alone, name), whole[1:2], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(getattr(turned, name), whole.flip(0), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def check_that_nothing_is_remembered(encoder: Encoder, other: Encoder) -> None:
    """In evaluation the same images give the same bits, whatever sizes went before, and no tensor changes."""
    images = images_for(encoder)
    before = everything(encoder)
    first = encoder(images)
    works(encoder, encoder.stride, encoder.stride)
    works(encoder, 2 * images.shape[2], images.shape[3])
    again = encoder(images)
    assert torch.equal(again.tokens, first.tokens) and torch.equal(again.pooled, first.pooled)
    after = everything(encoder)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def check_gradients(encoder: Encoder, other: Encoder) -> None:
    """Every trained parameter has a gradient, finite and not nothing. What has nothing has no say by mathematics."""
    model, images = copy.deepcopy(encoder).double().train(), images_for(encoder).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        # Branches may start at a scale of zero, and what lies behind them learns once it has moved.
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    def run() -> Features:
        torch.manual_seed(3)
        found: Features = model(images)
        return found

    features = run()
    weights = torch.randn(features.tokens.shape, generator=generator, dtype=torch.float64)
    ((features.tokens * weights).sum() + features.pooled.square().sum()).backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    gradients = {name: parameter.grad for name, parameter in trained.items()}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert [name for name, gradient in gradients.items() if not gradient.isfinite().all()] == []
    largest = max(gradient.abs().max() for gradient in gradients.values())
    silent = [name for name, gradient in gradients.items() if gradient.abs().max() <= 1e-12 * largest]
    # The biases of keys, which a softmax takes away, and those in front of a norm over the batch.
    for name in silent:
        assert trained[name].ndim == 1, f"{name} gets no gradient"
        with torch.no_grad():
            trained[name] += torch.randn(trained[name].shape, generator=generator, dtype=torch.float64)
            moved = run()
        torch.testing.assert_close(moved.tokens, features.tokens, rtol=0, atol=1e-8, msg=f"{name} gets no gradient")
    assert sum(trained[name].numel() for name in silent) <= 0.02 * sum(p.numel() for p in trained.values())


@torch.no_grad()
def check_odd_sizes(encoder: Encoder, other: Encoder) -> None:
    """A side that is no multiple of the stride gives a map of tokens, or one error that says which sizes do."""
    stride, side = encoder.stride, images_for(encoder).shape[2]
    for height, width in ((side + 1, side + stride // 2 + 1), (side + stride - 1, side), (stride + 1, 2 * stride - 1)):
        check_size(encoder, height, width)


def check_size(encoder: Encoder, height: int, width: int) -> None:
    try:
        features = encoder(torch.randn(1, encoder.channels, height, width))
    except SpecError as error:
        named = {(int(h), int(w)) for h, w in re.findall(r"(\d+) x (\d+)", str(error))} - {(height, width)}
        assert any(works(encoder, *size) for size in named), f"no size is named that works: {error}"
    else:
        assert features.grid is not None and features.grid[0] * features.grid[1] == features.tokens.shape[1]
        assert features.tokens.isfinite().all()


def works(encoder: Encoder, height: int, width: int) -> bool:
    try:
        encoder(torch.zeros(1, encoder.channels, height, width))
    except SpecError:
        return False
    return True


@torch.no_grad()
def check_bfloat16(encoder: Encoder, other: Encoder) -> None:
    """Weights in bfloat16, and autocast over weights in float32, stay near float32."""
    images = images_for(encoder)
    expected = encoder(images)
    whole = copy.deepcopy(encoder).bfloat16()(images.bfloat16())
    assert whole.tokens.dtype == whole.pooled.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        mixed = encoder(images)
    for found in (whole, mixed):
        for name in ("tokens", "pooled"):
            a, b = getattr(found, name).float(), getattr(expected, name)
            assert a.isfinite().all()
            assert (a - b).norm() < 0.05 * b.norm()


@torch.no_grad()
def check_files(encoder: Encoder, other: Encoder, tmp_path: Path) -> None:
    """What is saved and loaded into one of another seed computes the same bits."""
    images = images_for(encoder)
    other = copy.deepcopy(other)
    torch.save(encoder.state_dict(), tmp_path / "encoder.pt")
    load_encoder(other, str(tmp_path / "encoder.pt"))
    assert torch.equal(other(images).tokens, encoder(images).tokens)


def check_shapes(encoder: Encoder, other: Encoder) -> None:
    """The tokens' shape can be had without numbers, and leaves no trace."""
    images, before = images_for(encoder), everything(encoder)
    with torch.no_grad():
        expected = encoder(images)
    with shapes_only(encoder) as empty:
        features = empty.train()(torch.zeros(images.shape))
        assert features.tokens.shape == expected.tokens.shape and features.grid == expected.grid
        assert type(features.tokens) is not Tensor
    assert all(torch.equal(tensor, before[name]) for name, tensor in everything(encoder).items())
    with torch.no_grad():
        assert torch.equal(encoder(images).tokens, expected.tokens)


CHECKS: list[Callable[..., None]] = [
    check_declarations,
    check_that_it_looks,
    check_that_images_stand_alone,
    check_that_nothing_is_remembered,
    check_gradients,
    check_odd_sizes,
    check_bfloat16,
    check_files,
    check_shapes,
]


@pytest.fixture(scope="module", params=cases())
def pair(request: pytest.FixtureRequest) -> tuple[Encoder, Encoder]:
    """Two of the same settings and of other seeds; tests leave them as they are."""
    return build(*request.param), build(*request.param, seed=1)


@torch.no_grad()
def test_images_below_one_token(pair: tuple[Encoder, Encoder]) -> None:
    check_size(pair[0], max(1, pair[0].stride - 1), pair[0].stride + 1)


@pytest.mark.parametrize("check", CHECKS)
def test_encoder(pair: tuple[Encoder, Encoder], check: Callable[..., None], tmp_path: Path) -> None:
    check(*pair, tmp_path) if check is check_files else check(*pair)


class MeanCNN(Encoder):
    """An encoder of one's own, with a scale that cannot learn where `idle`."""

    def __init__(self, width: int = 4, idle: bool = False) -> None:
        super().__init__()
        self.width, self.stride, self.idle = width, 8, idle
        self.conv = nn.Conv2d(1, width, 8, 8)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, images: Tensor) -> Features:
        found = features_from(self.conv(images))
        scale = self.scale.detach() + 0 * self.scale if self.idle else self.scale
        return Features(found.tokens * scale, found.grid, found.pooled * scale)


@pytest.fixture
def own_encoder() -> Any:
    medxray.encoders.register("mean-cnn")(MeanCNN)
    yield "mean-cnn"
    ENCODERS._classes.pop("mean-cnn", None)
    ENCODERS._models.pop("mean-cnn", None)


def test_an_encoder_of_ones_own_is_swept_by_being_registered(own_encoder: str, tmp_path: Path) -> None:
    own = [case.values[0] for case in cases() if case.values[0][0] == own_encoder]
    assert own == [("mean-cnn", {})]
    pair = build(*own[0]), build(*own[0], seed=1)
    for check in CHECKS:
        check(*pair, tmp_path) if check is check_files else check(*pair)


def test_the_sweep_finds_a_parameter_that_cannot_learn(own_encoder: str) -> None:
    idle = build(own_encoder, {"idle": True})
    with pytest.raises(AssertionError, match="scale gets no gradient"):
        check_gradients(idle, idle)


def test_rows_and_columns_are_not_mixed_up() -> None:
    """What changes at one place of a map with more columns than rows shows most in the tokens around it."""
    for encoder in (
        TimmEncoder("test_resnet"),
        TimmEncoder("test_mambaout"),
        TransformersEncoder(config=TRANSFORMERS["convnext"]),
        TransformersEncoder(config=TRANSFORMERS["swin"]),
    ):
        encoder.eval()
        images = torch.zeros(2, 1, 8 * encoder.stride, 12 * encoder.stride)
        images[1, :, encoder.stride : 3 * encoder.stride, 8 * encoder.stride : 10 * encoder.stride] = 3
        with torch.no_grad():
            features = encoder(images)
        assert features.grid == (8, 12)
        change = (features.tokens[1] - features.tokens[0]).norm(dim=1).view(8, 12)
        near, far = change[:4, 7:11].mean(), torch.cat([change[:, :5].flatten(), change[6:].flatten()]).mean()
        assert near > 2 * far


class TestVMamba:
    def test_sizes_are_those_of_the_public_weights(self) -> None:
        with torch.device("meta"):
            counts = {size: sum(p.numel() for p in VMamba(size, channels=3).parameters()) for size in ("tiny", "base")}
        # The paper's 30 M and 89 M with the classifier's 1000 classes.
        assert counts["tiny"] + 769_000 == pytest.approx(30.2e6, rel=0.02)
        assert counts["base"] + 1_025_000 == pytest.approx(88.6e6, rel=0.02)

    def test_numbers_stand_in_place_of_the_sizes_own(self) -> None:
        encoder = VMamba("tiny", dims=8, depths=[1, 1, 1, 1], drop_path=0.0)
        assert encoder.width == 64
        assert [len(stage["blocks"]) for stage in encoder.layers] == [1, 1, 1, 1]

    @pytest.mark.parametrize("version", ["v2", "v0"])
    @pytest.mark.parametrize("size", [(33, 70), (4, 4), (50, 31)])
    def test_any_size(self, version: Any, size: tuple[int, int]) -> None:
        encoder = VMamba(dims=8, depths=[1, 1, 1, 1], version=version).eval()
        grid = size
        for stage in range(5):
            halve = (lambda n: n // 4) if version == "v0" and stage == 0 else (lambda n: -(-n // 2))
            if not (version == "v0" and stage == 1):
                grid = (halve(grid[0]), halve(grid[1]))
        with torch.no_grad():
            features = encoder(torch.randn(1, 1, *size))
        assert features.grid == grid
        assert features.tokens.isfinite().all()

    def test_mistakes(self) -> None:
        with pytest.raises(ValueError, match=r"depths must be 4 numbers above zero, found \[1, 2\]"):
            VMamba(depths=[1, 2])
        with pytest.raises(SpecError, match=r"3 x 64 is smaller than a patch of 4 x 4"):
            VMamba(dims=8, version="v0")(torch.zeros(1, 1, 3, 64))

    def test_first_values(self) -> None:
        torch.manual_seed(0)
        op = VMamba(dims=32, state=4).layers[0]["blocks"][0].op
        steps = nn.functional.softplus(op.dt_projs_bias.detach())
        assert steps.min() >= 0.999e-3 and steps.max() <= 0.1001
        assert steps.log().mean().item() == pytest.approx(-4.6, abs=0.4)
        torch.testing.assert_close(op.A_logs.exp(), torch.arange(1.0, 5).expand(4 * 32, -1))

    def test_recomputed_activations_change_nothing(self) -> None:
        encoder = VMamba(dims=8).train()
        images = torch.randn(2, 1, 64, 64)
        gradients = []
        for recompute in (False, True):
            encoder.gradient_checkpointing = recompute
            encoder.zero_grad()
            encoder(images).pooled.square().sum().backward()
            gradients.append([p.grad.clone() for p in encoder.parameters() if p.grad is not None])
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)


class TestTimm:
    def test_unknown_model_names_the_nearest(self) -> None:
        with pytest.raises(SpecError, match=r"resnt18.*did you mean 'resnet18'"):
            TimmEncoder("resnt18")

    def test_weights_that_cannot_be_had(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(WeightsError, match=r"public weights of 'resnet10t' could not be had.*online once"):
            TimmEncoder("resnet10t", pretrained=True)

    def test_size_that_a_model_refuses(self) -> None:
        with pytest.raises(SpecError, match=r"does not take images of 100 x 96"):
            TimmEncoder("test_vit")(torch.zeros(1, 1, 100, 96))

    def test_arguments(self) -> None:
        encoder = TimmEncoder("test_vit", arguments={"patch_size": 8, "depth": 1})
        assert encoder.stride == 8 and len(encoder.model.blocks) == 1
        with pytest.raises(SpecError, match=r"'test_vit' of timm does not take arguments.patch_siez"):
            TimmEncoder("test_vit", arguments={"patch_siez": 8})
        with pytest.raises(ValueError, match=r"arguments: img_size, in_chans cannot be given there; use encoder"):
            TimmEncoder("test_vit", arguments={"in_chans": 3, "img_size": 32})

    def test_normalisation(self) -> None:
        """Of the images that the weights were made for: the model's own in colour, 0.5 for gray, or what is given."""
        assert TimmEncoder("resnet18", channels=3).mean == IMAGENET_MEAN
        assert (TimmEncoder("resnet18").mean, TimmEncoder("resnet18").std) == ((0.5,), (0.5,))
        given = TimmEncoder("resnet18", mean=[0.4, 0.5, 0.6], std=[0.2])
        assert (given.mean, given.std) == ((0.5,), (0.2,))
        with pytest.raises(ValueError, match="mean and std belong together"):
            TimmEncoder("resnet18", mean=[0.4])
        with pytest.raises(ValueError, match="mean has 2 numbers; give one, three or 1"):
            TimmEncoder("resnet18", mean=[0.4, 0.5], std=[0.2])

    @pytest.mark.parametrize("model", ["pit_ti_224", "volo_d1_224"])
    def test_tokens_that_are_no_map(self, model: str) -> None:
        """A class token alone, and one among the others that the model does not tell of."""
        with torch.device("meta"), pytest.raises(SpecError, match=r"gives 1(97)? tokens for 224 x 224.*take another"):
            TimmEncoder(model)

    @pytest.mark.parametrize("name", ["resnet10t", "test_efficientnet", "test_convnext"])
    def test_files_of_timm_itself(self, name: str, tmp_path: Path) -> None:
        """A file with a classifier, whatever that is called, and timm's own keys, for RGB, into an encoder."""
        import timm

        model = timm.create_model(name, pretrained=False).eval()
        torch.save({"state_dict": model.state_dict()}, tmp_path / "model.pth")
        encoder = TimmEncoder(name, channels=3).eval()
        load_encoder(encoder, str(tmp_path / "model.pth"))
        images = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            expected = model.forward_features(images).flatten(2).transpose(1, 2)
            assert torch.equal(encoder(images).tokens, expected)


class TestTransformers:
    VIT = TRANSFORMERS["vit"]

    def save(self, folder: Path, config: dict[str, Any], **preprocessor: Any) -> nn.Module:
        from transformers import AutoConfig, AutoModel

        model = AutoModel.from_config(AutoConfig.for_model(**config)).eval()
        model.save_pretrained(folder)
        if preprocessor:
            held = {"image_processor_type": "ViTImageProcessor", **preprocessor}
            (folder / "preprocessor_config.json").write_text(json.dumps(held))
        return model

    def test_folder(self, tmp_path: Path) -> None:
        model = self.save(tmp_path, self.VIT, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.25, 0.5])
        encoder = TransformersEncoder(str(tmp_path)).eval()
        assert (encoder.channels, encoder.mean, encoder.std) == (3, (0.5, 0.4, 0.3), (0.2, 0.25, 0.5))
        assert set(encoder.state_dict()) <= {f"model.{key}" for key in model.state_dict()}
        images = torch.randn(2, 3, 48, 64)
        with torch.no_grad():
            expected = model(pixel_values=images, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
            torch.testing.assert_close(encoder(images).tokens, expected)

    @pytest.mark.parametrize(
        ("model_type", "size", "grid", "stride", "leading"),
        [
            # A pooled token without a parameter; a class token that only a head has; two; strides that round up and
            # down; class token at the last stage alone.
            ("dinov3_convnext", 224, (7, 7), 32, 1),
            ("aimv2_vision_model", 224, (16, 16), 14, 0),
            ("deit", 224, (14, 14), 16, 2),
            ("levit", 224, (4, 4), 64, 0),
            ("efficientnet", 600, (18, 18), 32, 0),
            ("pvt", 224, (7, 7), 32, 1),
        ],
    )
    def test_which_tokens_are_the_map(
        self, model_type: str, size: int, grid: tuple[int, int], stride: int, leading: int
    ) -> None:
        with torch.device("meta"):
            encoder = TransformersEncoder(config={"model_type": model_type})
        assert (encoder.size, encoder.stride, encoder.leading) == ((size, size), stride, leading)
        with shapes_only(encoder) as empty:
            assert empty(torch.zeros(1, 1, size, size)).grid == grid

    def test_models_whose_output_is_no_map(self) -> None:
        with torch.device("meta"):
            with pytest.raises(SpecError, match=r"'yolos' of transformers gives \d+ tokens .* which are not a map"):
                TransformersEncoder(config={"model_type": "yolos"})
            with pytest.raises(SpecError, match=r"needs pixel_attention_mask, spatial_shapes beside the image; take"):
                TransformersEncoder(config={"model_type": "siglip2_vision_model"})

    def test_gray_images_are_what_their_rgb_copies_are(self, tmp_path: Path) -> None:
        self.save(tmp_path, self.VIT, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.25, 0.5])
        rgb, gray = TransformersEncoder(str(tmp_path)).eval(), TransformersEncoder(str(tmp_path), channels=1).eval()
        assert len(gray.mean) == len(gray.std) == 1
        pixels = torch.rand(2, 1, 32, 48)
        m, s = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (rgb.mean, rgb.std))
        with torch.no_grad():
            expected = rgb((pixels.expand(-1, 3, -1, -1) - m) / s).tokens
            found = gray((pixels - gray.mean[0]) / gray.std[0]).tokens
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    def test_normalisation_without_a_preprocessor(self, tmp_path: Path) -> None:
        self.save(tmp_path, self.VIT)
        encoder = TransformersEncoder(str(tmp_path))
        assert (encoder.mean, encoder.std) == (IMAGENET_MEAN, IMAGENET_STD)
        assert TransformersEncoder(config=self.VIT).mean == (0.5,)

    def test_swin_is_what_transformers_computes(self, tmp_path: Path) -> None:
        """At every size that transformers itself can take, whatever sizes went before; and at others."""
        config = {"model_type": "swin", "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}
        model = self.save(tmp_path, config)
        encoder = TransformersEncoder(str(tmp_path)).eval()
        with torch.no_grad():
            assert encoder(torch.randn(1, 3, 16, 20)).grid == (2, 3)
            for side in (64, 48, 44, 32):
                images = torch.randn(2, 3, side, side)
                # A new copy each time, because transformers' own is changed by the sizes that it has seen.
                expected = copy.deepcopy(model)(pixel_values=images)
                found = encoder(images)
                torch.testing.assert_close(found.tokens, expected.last_hidden_state)
                torch.testing.assert_close(found.pooled, expected.pooler_output)

    def test_a_copy_stands_alone(self) -> None:
        encoder = TransformersEncoder().eval()
        twin = copy.deepcopy(encoder)
        layers = set(map(id, encoder.modules()))
        bound = [m.set_shift_and_window_size.args[0] for m in twin.modules() if hasattr(m, "set_shift_and_window_size")]
        assert bound and not any(id(layer) in layers for layer in bound)

    def test_mistakes(self, tmp_path: Path) -> None:
        with pytest.raises(WeightsError, match=r"missing-folder.*no such folder.*config.json"):
            TransformersEncoder(str(tmp_path / "missing-folder"))
        with pytest.raises(WeightsError, match=r"could not be loaded"):
            TransformersEncoder(str(tmp_path))
        with pytest.raises(ValueError, match=r"'swni'; did you mean 'swin'"):
            TransformersEncoder(config={"model_type": "swni"})
        with pytest.raises(ValueError, match=r"config.hiden_size.*did you mean 'hidden_size'"):
            TransformersEncoder(config={"model_type": "vit", "hiden_size": 32})
        with pytest.raises(ValueError, match=r"both given"):
            TransformersEncoder("some/model", config=self.VIT)
        with pytest.raises(ValueError, match=r"channels is 2, but the config takes 3"):
            TransformersEncoder(config={**self.VIT, "num_channels": 3}, channels=2)
        bert = {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        with pytest.raises(SpecError, match=r"not a vision model: BertModel takes input_ids"):
            TransformersEncoder(config={**bert, "vocab_size": 10, "intermediate_size": 8})

    def test_weights_that_lack_tensors(self, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        self.save(tmp_path, self.VIT)
        file = tmp_path / "model.safetensors"
        state = load_file(file)
        state.pop(next(key for key in state if "norm" in key))
        save_file(state, file, metadata={"format": "pt"})
        with pytest.raises(WeightsError, match=r"lack 1 tensors"):
            TransformersEncoder(str(tmp_path))


class TestShapes:
    def test_what_functions_keep_does_not_outlive_the_pass(self) -> None:
        @functools.lru_cache
        def table(width: int) -> tuple[Tensor]:
            return (torch.ones(width),)

        @functools.cache
        def untouched() -> Tensor:
            return torch.ones(1)

        class Cached(MeanCNN):
            def forward(self, images: Tensor) -> Features:
                features = super().forward(images)
                return Features(features.tokens + table(self.width)[0], features.grid, features.pooled)

        encoder, kept = Cached(), untouched()
        with shapes_only(encoder) as empty:
            empty(torch.zeros(1, 1, 16, 16))
            assert type(table(4)[0]) is not Tensor
        assert type(table(4)[0]) is Tensor
        assert untouched() is kept

    def test_guards_against_bad_numbers_are_answered(self) -> None:
        class Guarded(MeanCNN):
            def forward(self, images: Tensor) -> Features:
                if not images.isfinite().all() or images.isnan().any():
                    raise ValueError("bad numbers")
                return super().forward(images)

        encoder = Guarded()
        with shapes_only(encoder) as empty:
            assert empty(torch.zeros(1, 1, 16, 24)).grid == (2, 3)
        with pytest.raises(ValueError, match="bad numbers"):
            encoder(torch.full((1, 1, 16, 16), torch.nan))

    def test_what_needs_numbers_is_tried_with_them(self) -> None:
        class Needy(MeanCNN):
            def forward(self, images: Tensor) -> Features:
                assert images.sum().item() == 0
                return super().forward(images)

        encoder = Needy()
        encoder.unused = nn.Parameter(torch.zeros(1))
        assert try_out(encoder, 16, 24) == (6, 4, (2, 3))
        assert not encoder.unused.requires_grad and encoder.scale.requires_grad

    @pytest.mark.parametrize(
        ("tokens", "size", "stride"),
        [
            (196, (224, 224), 16),
            (256, (224, 224), 14),
            (16, (224, 224), 64),
            ((18, 18), (600, 600), 32),
            (6, (16, 24), 8),
            (255, (224, 224), None),
            (50, (224, 224), None),
        ],
    )
    def test_stride(self, tokens: int | tuple[int, int], size: tuple[int, int], stride: int | None) -> None:
        assert stride_of(tokens, *size) == stride
