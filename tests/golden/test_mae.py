"""The masked auto-encoder computes what the reference implementations do: MAE whole, the HD release's mask."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from medxray.encoders.vit import ViT
from medxray.layers import sincos_positions
from medxray.pretrain import Masker
from medxray.pretrain.decoders import SelfAttentionDecoder
from medxray.pretrain.maskers import RandomMasker, RectangleMasker
from medxray.pretrain.model import MaskedAutoEncoder
from medxray.weights import load_into

GOLDEN = Path(os.environ.get("MEDXRAY_GOLDEN", Path(__file__).parents[2].parent / "shared" / "golden"))
Case = tuple[dict[str, Any], dict[str, Tensor]]


def cases(reference: str) -> list[Any]:
    found = [
        path.stem
        for path in sorted(GOLDEN.glob("*.json"))
        if isinstance(held := json.loads(path.read_text()), dict) and held.get("reference") == reference
    ]
    reason = f"no golden tensors in {GOLDEN}; name their folder by MEDXRAY_GOLDEN"
    return found or [pytest.param("absent", marks=pytest.mark.skip(reason=reason))]


def read(name: str) -> Case:
    return json.loads((GOLDEN / f"{name}.json").read_text()), load_file(GOLDEN / f"{name}.safetensors")


def made(config: dict[str, Any], masker: Masker, **settings: Any) -> MaskedAutoEncoder:
    """The model that a golden file's settings describe."""
    encoder = ViT(
        width=config["embed_dim"],
        depth=config["depth"],
        heads=config["num_heads"],
        patch=config["patch_size"],
        channels=config["in_chans"],
        mlp_ratio=config.get("mlp_ratio", 4.0),
        **settings,
    )
    decoder = SelfAttentionDecoder(
        encoder,
        dim=config["decoder_embed_dim"],
        depth=config["decoder_depth"],
        heads=config["decoder_num_heads"],
    )
    return MaskedAutoEncoder(encoder, masker, decoder, encoder.channels, config["norm_pix_loss"])


@pytest.mark.parametrize("name", cases("mae"))
def test_same_function_as_mae(name: str) -> None:
    config, tensors = read(name)
    masker = RandomMasker(config["mask_ratio"])
    model = made(config, masker)
    encoder, decoder = model.encoder, model.decoder
    weights = {key.removeprefix("weights."): t for key, t in tensors.items() if key.startswith("weights.")}
    grid = encoder.grid(*tensors["input"].shape[2:])
    for key in ("pos_embed", "decoder_pos_embed"):
        table = weights.pop(key)
        width = table.shape[2]
        expected = torch.cat([torch.zeros(1, 1, width), sincos_positions(width, *grid, torch.device("cpu"))], dim=1)
        torch.testing.assert_close(expected, table, rtol=0, atol=1e-6)
    for part in (encoder, decoder):
        load_into(part, {key: weights.pop(key) for key in part.state_dict()}, name)
    assert not weights

    masking = masker.choose(tensors["noise"], grid)
    assert torch.equal(masking.restore, tensors["ids_restore"])
    assert torch.equal(masking.mask, tensors["mask"])
    output = model.reconstruct(tensors["input"], masking)
    torch.testing.assert_close(output.latent, tensors["latent"], rtol=0, atol=1e-5)
    torch.testing.assert_close(output.prediction, tensors["pred"], rtol=0, atol=1e-5)
    # Every image has as many masked patches, so that MAE's mean over patches is the mean over images.
    loss = output.loss.mean()
    assert loss.item() == pytest.approx(config["loss_value"], rel=1e-5)

    loss.backward()
    parameters = {**dict(encoder.named_parameters()), **dict(decoder.named_parameters())}
    assert set(parameters) == set(config["grad_norms"])
    norms = {key: p.grad.norm().item() for key, p in parameters.items() if p.grad is not None}
    assert norms == pytest.approx(config["grad_norms"], rel=1e-4)


@pytest.mark.parametrize("name", cases("hdmae"))
def test_same_function_as_the_hd_release(name: str) -> None:
    config, tensors = read(name)
    masker = RectangleMasker(config["mask_ratio_inner"], config["mask_ratio_outer"])
    model = made(config, masker, stem="hd")
    encoder, decoder = model.encoder, model.decoder
    weights = {key.removeprefix("weights."): t for key, t in tensors.items() if key.startswith("weights.")}
    grid = (config["grid"][0], config["grid"][1])
    for key in ("pos_embed", "decoder_pos_embed"):
        table = weights.pop(key)
        rows = table.shape[1]
        expected = sincos_positions(table.shape[2], *grid, torch.device("cpu"))[:, : rows - 1]
        torch.testing.assert_close(torch.cat([torch.zeros_like(expected[:, :1]), expected], 1), table, rtol=0, atol=1e-6)
    for part in (encoder, decoder):
        load_into(part, {key: weights.pop(key) for key in part.state_dict()}, name)
    # A layer that the release has and never uses.
    assert all(key.startswith("decoder_image.") for key in weights)

    restore = tensors["ids_restore"]
    # The release keeps no noise. Noise that rises along its own shuffled order has to give that order back: only
    # the right rectangle, counts and order of the four groups do.
    masking = masker.choose(restore.float() / restore.shape[1], grid)
    assert masking.keep.shape[1] == config["kept_tokens"]
    assert torch.equal(masking.restore, restore)
    assert torch.equal(masking.mask, tensors["mask"])
    small = tensors["input_160"]
    scale = config["img_size"] // small.shape[-1]
    with torch.no_grad():
        output = model.reconstruct(small.repeat_interleave(scale, 2).repeat_interleave(scale, 3), masking)
    torch.testing.assert_close(output.latent, tensors["latent"], rtol=0, atol=1e-5)
    first = tensors["pred_first_patches"]
    torch.testing.assert_close(output.prediction[:, : first.shape[1]], first, rtol=0, atol=1e-5)
    assert output.loss.mean().item() == pytest.approx(config["loss_value"], rel=1e-4)
