"""ViT and ViTMAE of transformers and timm: read into ours they compute the same, and ours written is what they read."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    AutoModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)
from typer.testing import CliRunner

import medxray
from medxray.cli import app
from medxray.encoders.vit import ViT
from medxray.layers import resample_positions, resize_kernel, sincos_positions
from medxray.pretrain.decoders import CrossAttentionDecoder, SelfAttentionDecoder
from medxray.pretrain.maskers import RandomMasker
from medxray.pretrain.model import MaskedAutoEncoder
from medxray.types import RunError, WeightsError
from medxray.weights import load_autoencoder, load_decoder, load_encoder
from medxray.weights.writing import export

D, DEPTH, HEADS, PATCH = 32, 2, 4, 8
CPU = torch.device("cpu")
OURS: dict[str, Any] = {"width": D, "depth": DEPTH, "heads": HEADS, "patch": PATCH}
THEIRS: dict[str, Any] = {
    "hidden_size": D, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "intermediate_size": 4 * D,
    "patch_size": PATCH, "layer_norm_eps": 1e-6,
}  # fmt: skip


def stirred(model: nn.Module) -> Any:
    """Weights that no two layers share, biases and norms too, of a size that keeps activations near 1."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def class_and_patches(encoder: ViT, images: Tensor) -> Tensor:
    return encoder.encode(encoder.embed(images), encoder.grid(*images.shape[2:]))


def with_class_row(width: int, h: int, w: int) -> Tensor:
    return F.pad(sincos_positions(width, h, w, CPU), (0, 0, 1, 0))


def hub_mae(channels: int = 1, side: int = 32, **more: Any) -> ViTMAEForPreTraining:
    """Its tables are zero when it is built from a config."""
    settings = THEIRS | {"num_channels": channels, "image_size": side, "decoder_hidden_size": 16} | more
    model = ViTMAEForPreTraining(
        ViTMAEConfig(
            **settings, decoder_num_hidden_layers=2, decoder_num_attention_heads=2, decoder_intermediate_size=64
        )
    )
    stirred(model)
    with torch.no_grad():
        model.vit.embeddings.position_embeddings.copy_(with_class_row(D, side // PATCH, side // PATCH))
        model.decoder.decoder_pos_embed.copy_(with_class_row(16, side // PATCH, side // PATCH))
    return model


def autoencoder(channels: int = 1, norm_pix: bool = False, ratio: float = 0.75) -> MaskedAutoEncoder:
    torch.manual_seed(1)
    encoder = ViT(**OURS, channels=channels)
    decoder = SelfAttentionDecoder(encoder, dim=16, depth=2, heads=2)
    return MaskedAutoEncoder(encoder, RandomMasker(ratio), decoder, channels, norm_pix).eval()


class TestViTMAE:
    @pytest.mark.parametrize("norm_pix", [False, True])
    @pytest.mark.parametrize(("channels", "side"), [(1, 32), (3, 48)])
    @torch.no_grad()
    def test_same_outputs(self, channels: int, side: int, norm_pix: bool, tmp_path: Path) -> None:
        theirs = hub_mae(channels, side, norm_pix_loss=norm_pix)
        theirs.save_pretrained(tmp_path)
        ours = autoencoder(channels, norm_pix)
        load_autoencoder(ours, str(tmp_path))
        images = torch.randn(2, channels, side, side)
        noise = torch.rand(2, (side // PATCH) ** 2)
        expected = theirs(images, noise=noise)
        latent = theirs.vit(images, noise=noise).last_hidden_state
        grid = (side // PATCH, side // PATCH)
        masking = ours.masker.choose(noise, grid)  # type: ignore[operator]
        found = ours.reconstruct(images, masking)
        assert torch.equal(masking.mask, expected.mask) and torch.equal(masking.restore, expected.ids_restore)
        close(found.latent, latent)
        close(found.prediction, expected.logits)
        close(found.loss.mean(), expected.loss)

    @torch.no_grad()
    def test_names_in_memory_and_an_encoder_alone(self, tmp_path: Path) -> None:
        theirs = hub_mae(mask_ratio=0.0)
        torch.save(theirs.state_dict(), tmp_path / "state.bin")
        ViTMAEModel.from_pretrained(_saved(theirs, tmp_path / "whole")).save_pretrained(tmp_path / "encoder")
        images = torch.randn(1, 1, 32, 32)
        expected = theirs.vit(images, noise=torch.arange(16.0)[None]).last_hidden_state
        for source in ("state.bin", "encoder", "encoder/model.safetensors"):
            encoder = ViT(**OURS).eval()
            load_encoder(encoder, str(tmp_path / source))
            close(class_and_patches(encoder, images), expected)
        with pytest.raises(WeightsError, match="holds no decoder; take a file with one"):
            load_decoder(autoencoder().decoder, str(tmp_path / "encoder"))

    def test_what_tensors_cannot_show(self, tmp_path: Path) -> None:
        for change, message in (
            ({"num_attention_heads": 2}, "made with 2 attention heads, and the model has 4"),
            ({"layer_norm_eps": 1e-3}, r"epsilon of 0.001, and the model has 1e-06; set encoder\.norm_eps"),
            ({"hidden_act": "relu"}, "activation relu, and the model has gelu"),
        ):
            hub_mae(**change).save_pretrained(tmp_path)
            with pytest.raises(WeightsError, match=message):
                load_encoder(ViT(**OURS), str(tmp_path))
        hub_mae(layer_norm_eps=1e-12).save_pretrained(tmp_path)
        load_encoder(ViT(**OURS), str(tmp_path))
        config = json.loads((tmp_path / "config.json").read_text()) | {"decoder_num_attention_heads": 4}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(WeightsError, match="made with 4 attention heads, and the model has 2"):
            load_decoder(autoencoder().decoder, str(tmp_path))
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(WeightsError, match=r"config\.json cannot be read"):
            load_encoder(ViT(**OURS), str(tmp_path))

    @pytest.mark.parametrize("eps", [1e-12, 1e-2])
    @torch.no_grad()
    def test_epsilon_of_the_config(self, eps: float, tmp_path: Path) -> None:
        theirs = hub_mae(layer_norm_eps=eps, mask_ratio=0.0)
        theirs.vit.embeddings.cls_token.mul_(1e-3)
        theirs.save_pretrained(tmp_path)
        images = torch.randn(1, 1, 32, 32)
        expected = theirs.vit(images, noise=torch.arange(16.0)[None]).last_hidden_state
        encoder = ViT(**OURS, norm_eps=eps).eval()
        load_encoder(encoder, str(tmp_path))
        close(class_and_patches(encoder, images), expected)
        with pytest.raises(WeightsError, match=rf"epsilon of {eps:g}, and the model has 0\.1; set encoder\.norm_eps"):
            load_encoder(ViT(**OURS, norm_eps=0.1), str(tmp_path))
        # A class token so small shows the difference.
        other = ViT(**OURS).eval()
        other.load_state_dict(encoder.state_dict())
        assert (class_and_patches(other, images) - expected).abs().max() > 1e-4

    def test_decoder_of_another_kind_or_with_its_own_positions(self, tmp_path: Path) -> None:
        theirs = hub_mae()
        theirs.save_pretrained(tmp_path)
        cross = CrossAttentionDecoder(ViT(**OURS), dim=16, depth=2, heads=2)
        with pytest.raises(WeightsError, match="do not fit CrossAttentionDecoder"):
            load_decoder(cross, str(tmp_path))
        with torch.no_grad():
            theirs.decoder.decoder_pos_embed += 0.1
        theirs.save_pretrained(tmp_path)
        with pytest.raises(WeightsError, match=r"decoder_pos_embed \(1, 17, 16\) holds learned positions"):
            load_autoencoder(autoencoder(), str(tmp_path))


def _saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("wrapper", "prefix"), [("model", ""), ("model", "backbone."), ("student", "module.backbone.")])
def test_decoder_of_mae_and_of_the_hd_release(wrapper: str, prefix: str, tmp_path: Path) -> None:
    """MAE's whole file, and the release's two layouts, which hold a layer that is never used."""
    source, twin = stirred(autoencoder()), autoencoder()
    state = {**source.encoder.state_dict(), **source.decoder.state_dict()}
    state |= {"pos_embed": with_class_row(D, 4, 4), "decoder_pos_embed": with_class_row(16, 4, 4)}
    if prefix:
        state["decoder_image.weight"] = torch.zeros(3)
    torch.save({wrapper: {prefix + key: value for key, value in state.items()}}, tmp_path / "mae.pth")
    load_autoencoder(twin, str(tmp_path / "mae.pth"))
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), source.parameters(), strict=True))


def test_decoder_of_a_run(tmp_path: Path) -> None:
    source, twin = stirred(autoencoder()), autoencoder()
    state = {f"encoder.{key}": value for key, value in source.encoder.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"pixel_decoder\.weights .* the run holds no pixel decoder"):
        load_decoder(twin.decoder, str(tmp_path))
    state |= {f"model.decoder.{key}": value for key, value in source.decoder.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    load_autoencoder(twin, str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), source.parameters(), strict=True))


class TestLearnedPositions:
    @pytest.mark.parametrize("kind", [ViTModel, ViTForImageClassification])
    @torch.no_grad()
    def test_vit_of_the_hub(self, kind: Any, tmp_path: Path) -> None:
        theirs = stirred(kind(ViTConfig(**THEIRS, image_size=32)))
        theirs.save_pretrained(tmp_path)
        ours = ViT(**OURS, channels=3, positions="learned", position_grid=4).eval()
        load_encoder(ours, str(tmp_path))
        images = torch.randn(2, 3, 32, 32)
        expected = getattr(theirs, "vit", theirs)(images).last_hidden_state
        close(class_and_patches(ours, images), expected)
        close(ours(images).tokens, expected[:, 1:])
        with pytest.raises(WeightsError, match=r"holds learned positions.*set encoder.positions: learned"):
            load_encoder(ViT(**OURS, channels=3), str(tmp_path))

    @pytest.mark.parametrize("size", [(32, 48), (24, 72), (64, 64)])
    @torch.no_grad()
    def test_vit_of_timm_at_any_size(self, size: tuple[int, int], tmp_path: Path) -> None:
        """Resampled as the images come, and when a file of another table is loaded."""
        settings = {"patch_size": PATCH, "embed_dim": D, "depth": DEPTH, "num_heads": HEADS}
        theirs = stirred(timm.create_model("vit_tiny_patch16_224", img_size=40, dynamic_img_size=True, **settings))
        torch.save(theirs.state_dict(), tmp_path / "timm.pth")
        ours = ViT(**OURS, channels=3, positions="learned", position_grid=5).eval()
        load_encoder(ours, str(tmp_path / "timm.pth"))
        images, grid = torch.randn(2, 3, *size), [size[0] // PATCH, size[1] // PATCH]
        close(class_and_patches(ours, images), theirs.forward_features(images))
        fixed = ViT(**OURS, channels=3, positions="learned", position_grid=grid).eval()
        load_encoder(fixed, str(tmp_path / "timm.pth"))
        close(class_and_patches(fixed, images), theirs.forward_features(images))

    def test_tables_of_a_rectangle(self, tmp_path: Path) -> None:
        """Where a folder says for which image its table was made; a bare file may have the encoder's own grid."""
        theirs = stirred(ViTModel(ViTConfig(**THEIRS, image_size=[16, 64])))
        theirs.save_pretrained(tmp_path)
        table = theirs.embeddings.position_embeddings
        square = ViT(**OURS, channels=3, positions="learned", position_grid=4)
        load_encoder(square, str(tmp_path))
        assert square.pos_embed is not None
        close(square.pos_embed[:, 1:], resample_positions(table[:, 1:], (2, 8), (4, 4)))
        own = ViT(**OURS, channels=3, positions="learned", position_grid=[2, 8])
        load_encoder(own, str(tmp_path / "model.safetensors"))
        assert own.pos_embed is not None and torch.equal(own.pos_embed, table)

    def test_a_table_without_a_row_for_the_class_token(self, tmp_path: Path) -> None:
        source = ViT(**OURS, positions="learned", position_grid=4)
        assert source.pos_embed is not None
        torch.save(source.state_dict() | {"pos_embed": source.pos_embed.data[:, 1:]}, tmp_path / "vit.pth")
        twin = ViT(**OURS, positions="learned", position_grid=4)
        load_encoder(twin, str(tmp_path / "vit.pth"))
        assert twin.pos_embed is not None and not twin.pos_embed[:, 0].any()
        assert torch.equal(twin.pos_embed[:, 1:], source.pos_embed[:, 1:])
        torch.save(source.state_dict() | {"pos_embed": torch.zeros(1, 20, D)}, tmp_path / "odd.pth")
        with pytest.raises(WeightsError, match=r"pos_embed is \(1, 20, 32\) in the file and \(1, 17, 32\) in the model"):
            load_encoder(twin, str(tmp_path / "odd.pth"))


class TestPatchKernels:
    @pytest.mark.parametrize(("old", "new"), [(8, 16), (8, 12), (4, 14)])
    def test_an_enlarged_image_gives_the_same_tokens(self, old: int, new: int) -> None:
        kernel, patches = torch.randn(5, 2, old, old), torch.randn(3, 2, old, old)
        enlarged = F.interpolate(patches, (new, new), mode="bilinear")
        found = F.conv2d(enlarged, resize_kernel(kernel, (new, new)))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, F.conv2d(patches, kernel), rtol=1e-4, atol=1e-4)

    def test_a_smooth_image_made_smaller(self) -> None:
        """What a smaller patch can hold of a smooth kernel and image is nearly all of it."""
        ramp = torch.linspace(-1, 1, 16)
        kernel = (ramp[:, None] + 0.5 * ramp[None])[None, None] + 0.3
        image = (0.2 + ramp[None] - 0.4 * ramp[:, None])[None, None]
        small = F.interpolate(image, (8, 8), mode="bilinear", antialias=True)
        expected, found = F.conv2d(image, kernel), F.conv2d(small, resize_kernel(kernel, (8, 8)))
        assert abs(found - expected).item() < 0.03 * abs(expected).item()
        # Cut or averaged kernels would be off by the number of pixels.
        assert abs(F.conv2d(small, F.avg_pool2d(kernel, 2)) - expected).item() > 0.5 * abs(expected).item()

    @pytest.mark.parametrize("patch", [4, 16])
    @torch.no_grad()
    def test_loaded_and_told(self, patch: int, tmp_path: Path) -> None:
        source = stirred(ViT(**OURS, channels=3))
        torch.save(source.state_dict(), tmp_path / "vit.pth")
        kernel = resize_kernel(source.patch_embed.proj.weight, (patch, patch))  # type: ignore[union-attr]
        for channels in (3, 1):
            encoder = ViT(**(OURS | {"patch": patch}), channels=channels).eval()
            with pytest.warns(UserWarning, match=rf"patches of 8 x 8 pixels was resized to {patch} x {patch}"):
                load_encoder(encoder, str(tmp_path / "vit.pth"))
            if channels == 3:
                colour = encoder
        assert torch.equal(colour.patch_embed.proj.weight, kernel)  # type: ignore[union-attr]
        # Folding for gray images is exact for the resized kernel too.
        pixels = torch.rand(1, 1, 2 * patch, 2 * patch)
        means, stds = (torch.tensor(n).view(3, 1, 1) for n in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        expected = colour((pixels.expand(-1, 3, -1, -1) - means) / stds).tokens
        torch.testing.assert_close(encoder((pixels - 0.5) / 0.5).tokens, expected, rtol=1e-4, atol=1e-4)

    def test_same_patch_is_silent(self, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
        torch.save(ViT(**OURS).state_dict(), tmp_path / "vit.pth")
        load_encoder(ViT(**OURS), str(tmp_path / "vit.pth"))
        assert not [w for w in recwarn if "resized" in str(w.message)]

    def test_a_run_with_another_patch_and_grid(self, tmp_path: Path) -> None:
        source = ViT(**OURS, positions="learned", position_grid=4)
        save_file({f"encoder.{k}": v for k, v in source.state_dict().items()}, tmp_path / "model.safetensors")
        finer = ViT(**(OURS | {"patch": 4}), positions="learned", position_grid=8)
        with pytest.warns(UserWarning, match="resized to 4 x 4"):
            load_encoder(finer, str(tmp_path))
        assert finer.pos_embed is not None and source.pos_embed is not None
        close(finer.pos_embed[:, 1:], resample_positions(source.pos_embed[:, 1:], (4, 4), (8, 8)))


@torch.no_grad()
def test_colours_are_those_that_a_folder_names(tmp_path: Path) -> None:
    """ViT of the hub is trained with 0.5 for every colour, MAE with ImageNet's."""
    theirs = stirred(ViTModel(ViTConfig(**THEIRS, image_size=32)))
    theirs.save_pretrained(tmp_path)
    means, stds = [0.2, 0.5, 0.7], [0.4, 0.5, 0.6]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": means, "image_std": stds}))
    gray = ViT(**OURS, positions="learned", position_grid=4).eval()
    load_encoder(gray, str(tmp_path))
    pixels = torch.rand(2, 1, 32, 32)
    m, s = (torch.tensor(n).view(3, 1, 1) for n in (means, stds))
    expected = theirs((pixels.expand(-1, 3, -1, -1) - m) / s).last_hidden_state
    torch.testing.assert_close(class_and_patches(gray, (pixels - 0.5) / 0.5), expected, rtol=1e-4, atol=1e-4)


class TestHub:
    def test_a_name_is_fetched(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        hub_mae().save_pretrained(tmp_path)
        asked = []

        def fetch(name: str, **options: Any) -> str:
            asked.append((name, options["allow_patterns"]))
            return str(tmp_path)

        monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
        twin = autoencoder()
        load_encoder(twin.encoder, "facebook/vit-mae-base")
        assert asked == [("facebook/vit-mae-base", ["config.json", "preprocessor_config.json", "model.safetensors"])]
        asked.clear()
        # A path that is only mistyped is not asked for.
        monkeypatch.chdir(tmp_path)
        (tmp_path / "runs").mkdir()
        for path in ("runs/nowhere", "other/mae.pth", "./a/b", str(tmp_path / "no")):
            with pytest.raises(WeightsError, match="no such file or folder; give a checkpoint"):
                load_encoder(twin.encoder, path)
        assert not asked

    def test_offline(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(WeightsError, match=r"'facebook/no-such-model'.*did not give it.*connect to the network once"):
            load_encoder(ViT(**OURS), "facebook/no-such-model")

    def test_folder_without_weights(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(WeightsError, match=r"has a config\.json and no model\.safetensors or pytorch_model\.bin"):
            load_encoder(ViT(**OURS), str(tmp_path))


WRITTEN = [
    pytest.param({}, (32, 32), id="plain"),
    pytest.param({"channels": 3, "mlp_ratio": 2.5}, (32, 48), id="colour, rectangle"),
    pytest.param({"position_grid": [3, 3]}, (32, 48), id="stretched sin-cos"),
    pytest.param({"positions": "learned", "position_grid": [2, 5]}, (40, 16), id="learned"),
]


class TestWriting:
    @pytest.mark.parametrize(
        ("settings", "size"),
        [
            *WRITTEN,
            pytest.param({"registers": 3, "layer_scale": 0.1}, (32, 32), id="registers, scale"),
            pytest.param({"registers": 2, "positions": "learned", "position_grid": 3}, (32, 32), id="learned, registers"),
        ],
    )
    @torch.no_grad()
    def test_timm(self, settings: dict[str, Any], size: tuple[int, int], tmp_path: Path) -> None:
        encoder, images = stirred(ViT(**OURS, **settings)), torch.randn(2, settings.get("channels", 1), *size)
        export(encoder, tmp_path, "timm", size)
        theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        expected, found = class_and_patches(encoder, images), theirs.forward_features(images)
        single = 1 + settings.get("registers", 0)
        close(found[:, [0, *range(single, found.shape[1])]], expected)
        close(theirs(images), encoder(images).pooled)
        assert theirs.pretrained_cfg["mean"] == [0.5] * encoder.channels
        self._read_back(encoder, images, size, settings, tmp_path)

    def test_checkpoint_for_a_model_of_timm(self, tmp_path: Path) -> None:
        """At the size that the model has anyway, the file alone is enough."""
        encoder = stirred(ViT("tiny", depth=1, positions="learned"))
        export(encoder, tmp_path, "timm", 224)
        file = str(tmp_path / "model.safetensors")
        theirs = timm.create_model(
            "vit_tiny_patch16_224", depth=1, num_classes=0, in_chans=1, checkpoint_path=file
        ).eval()
        images = torch.randn(1, 1, 224, 224)
        with torch.no_grad():
            close(theirs.forward_features(images), class_and_patches(encoder, images))

    @pytest.mark.parametrize(("settings", "size"), WRITTEN)
    @torch.no_grad()
    def test_transformers(self, settings: dict[str, Any], size: tuple[int, int], tmp_path: Path) -> None:
        encoder, images = stirred(ViT(**OURS, **settings)), torch.randn(2, settings.get("channels", 1), *size)
        export(encoder, tmp_path, "transformers", size)
        theirs = AutoModel.from_pretrained(tmp_path).eval()
        assert isinstance(theirs, ViTModel) and theirs.config.layer_norm_eps == 1e-6
        close(theirs(images).last_hidden_state, class_and_patches(encoder, images))
        self._read_back(encoder, images, size, settings, tmp_path)
        # The same pixels go in.
        processor = AutoImageProcessor.from_pretrained(tmp_path)
        pixels = torch.randint(256, (encoder.channels, *size), dtype=torch.uint8)
        prepared = processor(pixels, return_tensors="pt")["pixel_values"]
        close(prepared[0], (pixels / 255 - 0.5) / 0.5)

    def _read_back(
        self, encoder: ViT, images: Tensor, size: tuple[int, int], settings: dict[str, Any], folder: Path
    ) -> None:
        twin = ViT(**OURS, **settings).eval()
        load_encoder(twin, str(folder))
        if settings.get("position_grid") and "positions" in settings:
            # The table was written for the image, so that this is its grid now.
            grid = list(encoder.grid(*size))
            twin = ViT(**OURS, **(settings | {"position_grid": grid})).eval()
            load_encoder(twin, str(folder))
        close(class_and_patches(twin, images), class_and_patches(encoder, images))

    @pytest.mark.parametrize(
        ("settings", "format", "named"),
        [
            ({"positions": "rope"}, "timm", "encoder.positions: rope: timm"),
            ({"patch": 16, "stem": "hd"}, "timm", "encoder.stem: timm"),
            ({"stem": "convolutions"}, "transformers", "encoder.stem: transformers"),
            ({"norm_eps": 1e-12}, "timm", "encoder.norm_eps: timm"),
            ({"registers": 2}, "transformers", "encoder.registers: transformers"),
            ({"registers": 2, "layer_scale": 0.1}, "transformers", "encoder.registers, encoder.layer_scale: transformers"),
            ({}, "onnx", "format 'onnx' is not known; expected timm, transformers or medxray"),
        ],
    )
    def test_what_has_no_place(self, settings: dict[str, Any], format: Any, named: str, tmp_path: Path) -> None:
        with pytest.raises(WeightsError, match=named):
            export(ViT(**(OURS | settings)), tmp_path / "new", format, 32)
        assert not (tmp_path / "new").exists()

    def test_other_encoders_and_run_folders(self, tmp_path: Path) -> None:
        with pytest.raises(WeightsError, match="only the encoder 'vit' can be written for timm, found Linear"):
            export(nn.Linear(2, 2), tmp_path)
        (tmp_path / "spec.yaml").touch()
        with pytest.raises(WeightsError, match="is a run folder, whose weights would be overwritten"):
            export(ViT(**OURS), tmp_path, "timm", 32)

    def test_epsilon(self, tmp_path: Path) -> None:
        export(ViT(**OURS, norm_eps=1e-12), tmp_path, "transformers", 32)
        assert AutoModel.from_pretrained(tmp_path).config.layer_norm_eps == 1e-12

    def test_names_are_those_of_transformers(self, tmp_path: Path) -> None:
        theirs = ViTModel(ViTConfig(**THEIRS, image_size=32, num_channels=1), add_pooling_layer=False)
        theirs.save_pretrained(tmp_path / "theirs")
        export(ViT(**OURS), tmp_path / "ours", "transformers", 32)
        names = [set(load_file(tmp_path / who / "model.safetensors")) for who in ("theirs", "ours")]
        assert names[0] == names[1]


def test_a_run_is_written(phantom: Path, tmp_path: Path) -> None:
    """From Python and from the command line, at the run's own image size; a mistake is one message."""
    pipeline = medxray.build(
        {
            "task": "classify", "output": str(tmp_path / "run"),
            "data": {"reader": {"name": "csv", "root": str(phantom), "report": "findings"}, "image_size": [16, 24]},
            "encoder": {"name": "vit", "width": 16, "depth": 1, "heads": 2, "patch": 8},
            "training": {"steps": 2, "batch_size": 4},
        }
    )  # fmt: skip
    with pytest.raises(RunError, match="fit"):
        pipeline.export(tmp_path / "early")
    pipeline.fit(progress=False)
    encoder, images = pipeline.task.encoder.cpu().eval(), torch.randn(1, 1, 16, 24)
    pipeline.export(tmp_path / "timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    command = ["export", str(tmp_path / "run"), str(tmp_path / "hub"), "--format", "transformers"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0 and result.stdout == f"written: {tmp_path / 'hub'}\n"
    with torch.no_grad():
        close(theirs(images), encoder(images).pooled)
        hub = AutoModel.from_pretrained(tmp_path / "hub").eval()
        close(hub(images).last_hidden_state[:, 1:], encoder(images).tokens)
    result = CliRunner().invoke(app, [*command[:-1], "onnx"])
    assert result.exit_code == 2 and "expected timm, transformers or medxray" in result.stderr
