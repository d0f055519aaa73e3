"""One sweep over every registered encoder, then what each family promises beside it."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import medxray
from medxray.encoders import ENCODERS, Encoder
from medxray.encoders.timm import TimmEncoder
from medxray.encoders.transformers import TransformersEncoder
from medxray.encoders.vmamba import VMamba
from medxray.types import SpecError, WeightsError
from medxray.weights import IMAGENET_MEAN, IMAGENET_STD, load_encoder, load_into

SMALL: dict[str, list[dict[str, Any]]] = {
    "vit": [{"width": 32, "depth": 2, "heads": 2}],
    "vmamba": [{"dims": 8}, {"dims": 8, "version": "v0", "ssm_ratio": 2.0, "state": 2}],
    # A map with channels first, a sequence, a map with channels last.
    "timm": [{"model": "test_resnet"}, {"model": "test_vit"}, {"model": "test_mambaout"}],
    "transformers": [
        {"config": {"model_type": "swin", "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}},
        {"config": {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}},
        {
            "config": {
                "model_type": "dinov2_with_registers",
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            }
        },
        {"config": {"model_type": "convnext", "hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1]}},
        {
            "config": {
                "model_type": "resnet",
                "embedding_size": 8,
                "hidden_sizes": [8, 8, 8, 16],
                "depths": [1, 1, 1, 1],
                "layer_type": "basic",
            }
        },
    ],
}
"""Settings that keep the sweep quick; a part that is not named here is swept as it comes."""

CASES = [
    pytest.param(name, settings, id="-".join([name, *(str(i) for i in [at] if at)]))
    for name in ENCODERS.names()
    if name != "module"
    for at, settings in enumerate(SMALL.get(name, [{}]))
]


def images_for(encoder: Encoder, batch: int = 3) -> torch.Tensor:
    """Not square, a multiple of the stride."""
    side = encoder.stride * max(2, 64 // encoder.stride)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, encoder.channels, side, side + encoder.stride, generator=generator)


@pytest.mark.parametrize(("name", "settings"), CASES)
@pytest.mark.parametrize("channels", [1, 3])
def test_encoder(name: str, settings: dict[str, Any], channels: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    chosen = ENCODERS.settings_of(name)(name=name, **settings, channels=channels)
    encoder = ENCODERS.build(chosen).eval()
    images = images_for(encoder)
    assert encoder.channels == channels == images.shape[1]
    assert len(encoder.mean) in (1, channels) and len(encoder.std) in (1, channels) and min(encoder.std) > 0

    features = encoder(images)
    B, N, D = features.tokens.shape
    assert len(images) == B and encoder.width == D
    assert features.pooled.shape == (B, D)
    assert features.grid == (images.shape[2] // encoder.stride, images.shape[3] // encoder.stride)
    assert features.grid[0] * features.grid[1] == N
    assert features.tokens.isfinite().all() and features.pooled.isfinite().all()
    assert features.tokens.dtype == torch.float32
    # It looks at its input: other images, other tokens.
    assert (features.pooled[0] - features.pooled[1]).abs().max() > 1e-6

    again = encoder(images)
    assert torch.equal(again.tokens, features.tokens) and torch.equal(again.pooled, features.pooled)
    alone = encoder(images[1:2])
    torch.testing.assert_close(alone.tokens, features.tokens[1:2], rtol=1e-4, atol=1e-5)

    torch.manual_seed(1)
    other = ENCODERS.build(chosen).eval()
    assert not torch.equal(other(images).tokens, features.tokens)
    torch.save(encoder.state_dict(), tmp_path / "encoder.pt")
    load_encoder(other, str(tmp_path / "encoder.pt"))
    assert torch.equal(other(images).tokens, features.tokens)

    encoder.train()
    features = encoder(images)
    weights = torch.randn(features.tokens.shape, generator=torch.Generator().manual_seed(2))
    (features.tokens * weights).sum().backward()
    trained = {key: p.grad for key, p in encoder.named_parameters() if p.requires_grad}
    assert [key for key, gradient in trained.items() if gradient is None or not gradient.isfinite().all()] == []
    # Branches that start at a scale of zero learn only once it has moved, and keys' biases never do.
    assert sum(bool(gradient.abs().max() > 0) for gradient in trained.values()) > len(trained) / 2


def test_rows_and_columns_are_not_mixed_up() -> None:
    """What changes at one place of a map with more columns than rows shows most in the tokens around it."""
    for encoder in (
        TimmEncoder("test_resnet"),
        TimmEncoder("test_mambaout"),
        TransformersEncoder(config=SMALL["transformers"][3]["config"]),
        TransformersEncoder(config=SMALL["transformers"][0]["config"]),
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

    def test_files_of_timm_itself(self, tmp_path: Path) -> None:
        """A file with a classifier and timm's own keys, for RGB, into an encoder."""
        import timm

        model = timm.create_model("resnet10t", pretrained=False).eval()
        torch.save({"state_dict": model.state_dict()}, tmp_path / "resnet.pth")
        encoder = TimmEncoder("resnet10t", channels=3).eval()
        load_encoder(encoder, str(tmp_path / "resnet.pth"))
        images = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            expected = model.forward_features(images).flatten(2).transpose(1, 2)
            assert torch.equal(encoder(images).tokens, expected)


class TestTransformers:
    VIT = SMALL["transformers"][1]["config"]

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


def test_an_encoder_of_ones_own_is_swept_and_built() -> None:
    try:

        @medxray.encoders.register("mean-cnn")
        class MeanCNN(Encoder):
            def __init__(self, width: int = 4) -> None:
                super().__init__()
                self.width, self.stride = width, 8
                self.conv = nn.Conv2d(1, width, 8, 8)

            def forward(self, images: torch.Tensor) -> Any:
                from medxray.encoders.adapt import features_from

                return features_from(self.conv(images))

        built = ENCODERS.build(ENCODERS.settings_of("mean-cnn")(width=6))
        assert isinstance(built, MeanCNN)
        assert built(torch.zeros(2, 1, 16, 24)).grid == (2, 3)
        state = built.state_dict()
        load_into(built, state, "itself")
    finally:
        ENCODERS._classes.pop("mean-cnn", None)
        ENCODERS._models.pop("mean-cnn", None)
