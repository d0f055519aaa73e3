"""What VMamba promises beside the sweep and the golden tensors."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from medxray.encoders.vmamba import SS2D, VMamba
from medxray.types import SpecError, WeightsError
from medxray.weights import load_encoder


def small(**settings: object) -> VMamba:
    torch.manual_seed(0)
    return VMamba(dims=8, **settings).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("version", "size", "millions"),
    [("v2", "tiny", 30), ("v2", "small", 50), ("v2", "base", 89), ("v0", "tiny", 22), ("v0", "small", 44), ("v0", "base", 75)],
)
def test_sizes_are_those_of_the_paper(version: str, size: str, millions: int) -> None:
    """Parameters as arXiv:2401.10166 and its first version state them, head of 1,000 classes included."""
    with torch.device("meta"):
        encoder = VMamba(size, version=version, channels=3, classes=1000)  # type: ignore[arg-type]
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(millions, abs=1.5)


@pytest.mark.parametrize("version", ["v2", "v0"])
def test_features_of_every_stage(version: str) -> None:
    encoder = small(version=version)
    images = torch.randn(2, 1, 64, 96)
    for stage in (1, 2, 3, 4):
        features = encoder.features(images, stage)
        h, w = 64 >> (stage + 1), 96 >> (stage + 1)
        assert features.grid == (h, w) and features.tokens.shape == (2, h * w, 8 << (stage - 1))
        torch.testing.assert_close(features.pooled, features.tokens.mean(1))
    assert torch.equal(encoder.features(images, 4).tokens, encoder(images).tokens)
    with pytest.raises(SpecError, match=r"stages 1 to 4, found 5"):
        encoder.features(images, 5)


@pytest.mark.parametrize("version", ["v2", "v0"])
@pytest.mark.parametrize(("height", "width"), [(33, 47), (5, 64), (64, 5), (32, 32)])
def test_any_size(version: str, height: int, width: int) -> None:
    features = small(version=version)(torch.randn(1, 1, height, width))
    h, w = ((side // 4 if version == "v0" else -(-side // 4)) for side in (height, width))
    assert features.grid == (-(-h // 8), -(-w // 8)) and features.tokens.isfinite().all()


def test_smaller_than_a_patch() -> None:
    with pytest.raises(SpecError, match=r"data.image_size: 3 x 40 is smaller than a patch"):
        small(version="v0")(torch.zeros(1, 1, 3, 40))
    assert small()(torch.zeros(1, 1, 1, 1)).grid == (1, 1)


def test_back_ends_agree() -> None:
    images = torch.randn(2, 1, 40, 56)
    encoder, results = small(version="v0", state=3), {}
    for name in ("cpu", "torch", "reference", "auto"):
        for layer in encoder.modules():
            if isinstance(layer, SS2D):
                layer.scan = name
        results[name] = encoder(images).tokens
    for name in ("cpu", "torch"):
        torch.testing.assert_close(results[name], results["reference"], rtol=1e-4, atol=1e-5)
    assert torch.equal(results["auto"], results["cpu"])


def test_recomputed_activations_change_nothing() -> None:
    images = torch.randn(2, 1, 32, 32)

    def gradients(encoder: VMamba) -> list[Tensor]:
        encoder.train()
        encoder(images).tokens.square().sum().backward()
        return [p.grad for p in encoder.parameters() if p.grad is not None]

    pairs = zip(gradients(small()), gradients(small(gradient_checkpointing=True)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


class TestPublicFiles:
    """Files of the form of `vssm*_ckpt_epoch_*.pth`: under `model`, for RGB, with a classifier."""

    def save(self, folder: Path, pointwise: bool) -> tuple[VMamba, Path]:
        encoder = small(channels=3, classes=7)
        state = dict(encoder.state_dict())
        if pointwise:
            names = ("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight")
            state = {k: v[:, :, None, None] if k.endswith(names) else v for k, v in state.items()}
        torch.save({"model": state, "epoch": 3}, folder / "vssm.pth")
        return encoder, folder / "vssm.pth"

    @pytest.mark.parametrize("pointwise", [False, True])
    def test_head_kept_or_dropped(self, tmp_path: Path, pointwise: bool) -> None:
        source, file = self.save(tmp_path, pointwise)
        images = torch.randn(2, 3, 32, 48)
        torch.manual_seed(1)
        kept = VMamba(dims=8, channels=3, classes=7).eval()
        load_encoder(kept, str(file))
        assert torch.equal(kept.logits(images), source.logits(images))
        dropped = VMamba(dims=8, channels=3).eval()
        load_encoder(dropped, str(file))
        assert torch.equal(dropped(images).tokens, source(images).tokens)
        with pytest.raises(SpecError, match=r"has no head; build it with classes"):
            dropped.logits(images)
        with pytest.raises(WeightsError, match=r"classifier.head.weight is \(7, 64\) in the file and \(5, 64\)"):
            load_encoder(VMamba(dims=8, channels=3, classes=5), str(file))

    def test_gray(self, tmp_path: Path) -> None:
        """A gray image through the folded kernel is its RGB copy through the file's, away from the border."""
        from medxray.weights import IMAGENET_MEAN, IMAGENET_STD

        source, file = self.save(tmp_path, pointwise=True)
        gray = VMamba(dims=8).eval()
        load_encoder(gray, str(file))
        pixels = torch.rand(1, 1, 160, 160)
        m, s = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (IMAGENET_MEAN, IMAGENET_STD))
        first = [encoder.patch_embed[0] for encoder in (gray, source)]
        found, expected = first[0]((pixels - 0.5) / 0.5), first[1]((pixels.expand(-1, 3, -1, -1) - m) / s)
        torch.testing.assert_close(found[..., 1:, 1:], expected[..., 1:, 1:], rtol=1e-4, atol=1e-5)
