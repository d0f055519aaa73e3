"""Checkpoints: nothing in them runs, what does not fit is said, RGB kernels fold, layouts stand for each other."""

import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from medxray.encoders.vit import ViT
from medxray.encoders.vmamba import VMamba
from medxray.types import WeightsError
from medxray.weights import IMAGENET_MEAN, IMAGENET_STD, load_encoder, load_into, load_state, sha256


class Payload:
    """Makes a folder when it is unpickled by a reader without an allow-list."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def vit(channels: int = 1) -> ViT:
    return ViT(width=16, depth=1, heads=2, patch=8, channels=channels).eval()


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_payload_is_refused_and_does_not_run(tmp_path: Path, wrapped: bool) -> None:
    mark, file = tmp_path / "mark", tmp_path / "weights.pth"
    held = {"model": {"a": torch.zeros(1)}, "extra": Payload(mark)}
    if wrapped:
        torch.save(held, file)
    else:
        file.write_bytes(pickle.dumps(held))
    with pytest.raises(WeightsError, match=r"weights\.pth"):
        load_state(file)
    assert not mark.exists()
    # The payload is a real one.
    with file.open("rb") as stream:
        torch.load(stream, weights_only=False) if wrapped else pickle.load(stream)
    assert mark.is_dir()


def test_namespaces_of_training_scripts_load(tmp_path: Path) -> None:
    model = vit()
    torch.save(
        {"model": model.state_dict(), "args": argparse.Namespace(lr=0.1, data="x"), "epoch": 3}, tmp_path / "mae.pth"
    )
    assert set(load_state(tmp_path / "mae.pth")) == set(model.state_dict())


@pytest.mark.parametrize("wrap", ["model", "state_dict", "student", None])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "_orig_mod."])
def test_wrappers_and_prefixes(tmp_path: Path, wrap: str | None, prefix: str) -> None:
    state = {prefix + key: value for key, value in vit().state_dict().items()}
    torch.save({wrap: state, "epoch": 1} if wrap else state, tmp_path / "x.pt")
    assert set(load_state(tmp_path / "x.pt")) == set(vit().state_dict())


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="do not exist; give a checkpoint file"):
        load_state(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(WeightsError, match=r"text\.pth"):
        load_state(tmp_path / "text.pth")
    (tmp_path / "empty.pth").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"empty\.pth"):
        load_state(tmp_path / "empty.pth")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(WeightsError, match=r"text\.safetensors cannot be read"):
        load_state(tmp_path / "text.safetensors")
    torch.save({"epoch": 3}, tmp_path / "nothing.pth")
    with pytest.raises(WeightsError, match="no tensors were found"):
        load_state(tmp_path / "nothing.pth")
    torch.save(vit().state_dict(), tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match=r"half\.pth"):
        load_state(tmp_path / "half.pth")


def test_what_does_not_fit_is_said_and_nothing_is_changed() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = {key: value + 1 for key, value in before.items()}
    state["0.weight"] = torch.zeros(5, 3)
    state["2.bias"] = state.pop("1.bias")
    with pytest.raises(WeightsError) as caught:
        load_into(model, state, "my.pth")
    message = str(caught.value)
    assert "my.pth do not fit Sequential" in message
    assert "1 missing keys (1.bias)" in message
    assert "1 keys that the model lacks (2.bias)" in message
    assert "0.weight is (5, 3) in the file and (2, 3) in the model" in message
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    state.pop("2.bias")
    state["0.weight"] = before["0.weight"]
    load_into(model, state, "my.pth", allow_missing=["1.bias"])
    assert torch.equal(model.state_dict()["1.weight"], before["1.weight"] + 1)


def test_many_keys_are_cut_short() -> None:
    with pytest.raises(WeightsError, match=r"and \d+ more"):
        load_into(vit(), {"other": torch.zeros(1)}, "my.pth")


def test_linear_layers_and_pointwise_convolutions_stand_for_each_other() -> None:
    linear, conv = nn.Linear(3, 2, bias=False), nn.Conv2d(3, 2, 1, bias=False)
    load_into(conv, linear.state_dict(), "linear")
    assert torch.equal(conv.weight[:, :, 0, 0], linear.weight)
    nn.init.ones_(conv.weight)
    load_into(linear, conv.state_dict(), "conv")
    assert torch.equal(linear.weight, torch.ones(2, 3))
    # Nothing else of the same number of elements does.
    with pytest.raises(WeightsError, match="shapes that disagree"):
        load_into(linear, {"weight": torch.zeros(3, 2)}, "transposed")


def test_channel_first_weights_of_vmamba(tmp_path: Path) -> None:
    encoder = VMamba(dims=8).eval()
    pointwise = ("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight")
    state = {
        key: value[:, :, None, None] if key.endswith(pointwise) else value
        for key, value in encoder.state_dict().items()
    }
    state |= {"classifier.head.weight": torch.zeros(5, 64), "classifier.head.bias": torch.zeros(5)}
    torch.save({"model": state}, tmp_path / "vssm.pth")
    twin = VMamba(dims=8).eval()
    load_encoder(twin, str(tmp_path / "vssm.pth"))
    images = torch.randn(1, 1, 32, 32)
    assert torch.equal(twin(images).tokens, encoder(images).tokens)


def test_rgb_kernels_fold_exactly_for_gray_images(tmp_path: Path) -> None:
    rgb, gray = vit(channels=3), vit()
    nn.init.normal_(rgb.patch_embed.proj.bias)
    torch.save(rgb.state_dict(), tmp_path / "rgb.pth")
    load_encoder(gray, str(tmp_path / "rgb.pth"))
    pixels = torch.rand(2, 1, 16, 24)
    means, stds = (torch.tensor(numbers).view(3, 1, 1) for numbers in (IMAGENET_MEAN, IMAGENET_STD))
    expected = rgb((pixels.expand(-1, 3, -1, -1) - means) / stds)
    found = gray((pixels - gray.mean[0]) / gray.std[0])
    torch.testing.assert_close(found.tokens, expected.tokens, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pointwise", [False, True])
def test_public_file_of_vmamba_for_gray_images(tmp_path: Path, pointwise: bool) -> None:
    """Colour, under `model` beside a moving average, with its classifier, linear layers in either form."""
    rgb, gray = VMamba(dims=8, channels=3), VMamba(dims=8)
    nn.init.normal_(rgb.patch_embed[0].bias)
    linear = ("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight")
    state = {
        key: value[:, :, None, None] if pointwise and key.endswith(linear) else value
        for key, value in rgb.state_dict().items()
    }
    state |= {"classifier.head.weight": torch.zeros(1000, 64), "classifier.head.bias": torch.zeros(1000)}
    held = {"model": state, "model_ema": {key: value + 1 for key, value in state.items()}, "epoch": 237}
    torch.save(held, tmp_path / "vssm.pth")
    load_encoder(gray, str(tmp_path / "vssm.pth"))
    own = rgb.state_dict()
    assert all(torch.equal(v, own[k]) for k, v in gray.state_dict().items() if not k.startswith("patch_embed.0."))
    # The same but for the border, which each pads with its own zero.
    pixels = torch.rand(2, 1, 32, 48)
    means, stds = (torch.tensor(numbers).view(3, 1, 1) for numbers in (IMAGENET_MEAN, IMAGENET_STD))
    expected = rgb.patch_embed[0]((pixels.expand(-1, 3, -1, -1) - means) / stds)
    found = gray.patch_embed[0]((pixels - gray.mean[0]) / gray.std[0])
    torch.testing.assert_close(found[..., 1:, 1:], expected[..., 1:, 1:], rtol=1e-4, atol=1e-5)


def test_a_fold_that_would_not_be_exact_is_refused(tmp_path: Path) -> None:
    class Bare(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(channels, 4, 3, bias=False)

    torch.save(Bare(3).state_dict(), tmp_path / "bare.pth")
    with pytest.raises(WeightsError, match=r"conv has no bias.*channels: 3"):
        load_encoder(Bare(1), str(tmp_path / "bare.pth"))
    # A kernel whose colours cancel has no shift to take up.
    kernel = torch.randn(4, 3, 3, 3)
    kernel -= kernel.mean((2, 3), keepdim=True)
    torch.save({"conv.weight": kernel}, tmp_path / "edge.pth")
    edge = Bare(1)
    load_encoder(edge, str(tmp_path / "edge.pth"))
    folded = 0.5 * (kernel / torch.tensor(IMAGENET_STD)[:, None, None]).sum(1, keepdim=True)
    torch.testing.assert_close(edge.conv.weight.detach(), folded)


def test_run_folders(tmp_path: Path) -> None:
    model = vit()
    with pytest.raises(WeightsError, match=r"no model\.safetensors; fit that run first"):
        load_encoder(vit(), str(tmp_path))
    file = tmp_path / "model.safetensors"
    save_file({"decoder.weight": torch.zeros(1)}, file)
    with pytest.raises(WeightsError, match="holds no encoder"):
        load_encoder(vit(), str(tmp_path))
    state = {f"encoder.{key}": value for key, value in model.state_dict().items()}
    save_file({**state, "head.bias": torch.ones(1)}, file)
    other = vit()
    load_encoder(other, str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with pytest.raises(WeightsError, match="no such file or folder"):
        load_encoder(vit(), str(tmp_path / "nowhere"))


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
