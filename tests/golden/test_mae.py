"""The masked auto-encoder computes what the reference implementations do: MAE whole, the HD release's mask."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from medxray.encoders.vit import ViT
from medxray.layers import Block, sincos_positions
from medxray.pretrain import Masker, Masking
from medxray.pretrain.decoders import SelfAttentionDecoder
from medxray.pretrain.maskers import RandomMasker, RectangleMasker, kept_of, release_rectangle
from medxray.pretrain.model import MaskedAutoEncoder
from medxray.weights import load_into
from medxray.weights.families import from_hub

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
    ratio = config.get("mlp_ratio", 4.0)
    encoder = ViT(
        width=config["embed_dim"],
        depth=config["depth"],
        heads=config["num_heads"],
        patch=config["patch_size"],
        channels=config.get("in_chans", 3),
        mlp_ratio=ratio,
        **settings,
    )
    dim, heads = config["decoder_embed_dim"], config["decoder_num_heads"]
    decoder = SelfAttentionDecoder(encoder, dim=dim, depth=config["decoder_depth"], heads=heads)
    # MAE has one ratio for both halves.
    decoder.decoder_blocks = nn.ModuleList(Block(dim, heads, ratio) for _ in decoder.decoder_blocks)
    model = MaskedAutoEncoder(encoder, masker, decoder, encoder.channels, config.get("norm_pix_loss", False))
    for layer in model.modules():
        if isinstance(layer, nn.LayerNorm):
            layer.eps = config.get("layer_norm_eps", layer.eps)
    return model


def share(ratio: float, n: int) -> float:
    """A ratio that keeps as many of n tokens as the references do, whose int(n * (1 - ratio)) may be one less than
    ours: 9 of 100 at 0.9."""
    kept = int(n * (1 - ratio))
    return ratio if kept_of(n, ratio) == kept else 1 - kept / n


def image_of(config: dict[str, Any], tensors: dict[str, Tensor]) -> Tensor:
    """The input, which may be kept small as `input_SIDE`, to be enlarged by nearest neighbour."""
    name = next(key for key in tensors if key == "input" or key.startswith("input_"))
    size = config.get("img_size", tensors[name].shape[-1])
    height, width = (size, size) if isinstance(size, int) else size
    rows, columns = height // tensors[name].shape[2], width // tensors[name].shape[3]
    return tensors[name].repeat_interleave(rows, 2).repeat_interleave(columns, 3)


def load(model: MaskedAutoEncoder, tensors: dict[str, Tensor], grid: tuple[int, int], name: str) -> set[str]:
    """Puts the weights in, compares tables of positions, of which the first rows may be given, and returns the names of
    what the model has no place for."""
    weights = {key.removeprefix("weights."): t for key, t in tensors.items() if key.startswith("weights.")}
    for key in ("pos_embed", "decoder_pos_embed"):
        if key in weights:
            table = weights.pop(key)
            expected = F.pad(sincos_positions(table.shape[2], *grid, torch.device("cpu")), (0, 0, 1, 0))
            torch.testing.assert_close(expected[:, : table.shape[1]], table, rtol=0, atol=1e-6)
    for part in (model.encoder, model.decoder):
        load_into(part, {key: weights.pop(key) for key in part.state_dict()}, name)
    return set(weights)


def check(
    model: MaskedAutoEncoder, config: dict[str, Any], tensors: dict[str, Tensor], masking: Masking, tolerance: float
) -> None:
    """Latent, prediction, mask, ids, loss, and the gradient norms where they are given."""
    assert torch.equal(masking.restore, tensors["ids_restore"])
    assert torch.equal(masking.mask, tensors["mask"])
    assert masking.keep.shape[1] == config.get("kept_tokens", int((tensors["mask"][0] == 0).sum()))
    norms = config.get("grad_norms")
    with torch.set_grad_enabled(norms is not None):
        output = model.reconstruct(image_of(config, tensors), masking)
    torch.testing.assert_close(output.latent, tensors["latent"], rtol=0, atol=1e-5)
    expected = tensors["pred"] if "pred" in tensors else tensors["pred_first_patches"]
    torch.testing.assert_close(output.prediction[:, : expected.shape[1]], expected, rtol=0, atol=1e-5)
    # Every image has as many masked patches, so that MAE's mean over patches is the mean over images.
    loss = output.loss.mean()
    assert loss.item() == pytest.approx(config["loss_value"], rel=tolerance)
    if norms is not None:
        loss.backward()
        found = {
            key: p.grad.norm().item()
            for part in (model.encoder, model.decoder)
            for key, p in part.named_parameters()
            if p.grad is not None
        }
        # The HD release freezes biases and norms, and has a layer that it does not use.
        assert {key for key in norms if not key.startswith("decoder_image.")} <= set(found)
        lacking = set(found) - set(norms)
        assert config["reference"] == "hdmae" or not lacking
        assert all(key.endswith(".bias") or "norm" in key for key in lacking)
        assert {key: found[key] for key in norms if key in found} == pytest.approx(
            {key: norms[key] for key in norms if key in found}, rel=1e-4
        )


def check_mae(config: dict[str, Any], tensors: dict[str, Tensor], name: str) -> None:
    height, width = image_of(config, tensors).shape[2:]
    grid = (height // config["patch_size"], width // config["patch_size"])
    masker = RandomMasker(share(config["mask_ratio"], grid[0] * grid[1]))
    model = made(config, masker)
    assert not load(model, tensors, grid, name)
    check(model, config, tensors, masker.choose(tensors["noise"], grid), 1e-5)


def check_hdmae(config: dict[str, Any], tensors: dict[str, Tensor], name: str) -> None:
    height, width = image_of(config, tensors).shape[2:]
    grid = (height // config["patch_size"], width // config["patch_size"])
    assert list(grid) == config.get("grid", list(grid))
    inner = int(release_rectangle(grid).sum())
    counts = (inner, grid[0] * grid[1] - inner)
    masker = RectangleMasker(*map(share, (config["mask_ratio_inner"], config["mask_ratio_outer"]), counts))
    model = made(config, masker, stem="hd")
    # A layer that the release has and never uses.
    assert all(key.startswith("decoder_image.") for key in load(model, tensors, grid, name))
    restore = tensors["ids_restore"]
    # The release keeps no noise. Noise that rises along its own shuffled order has to give that order back: only
    # the right rectangle, counts and order of the four groups do.
    check(model, config, tensors, masker.choose(restore.float() / restore.shape[1], grid), 1e-4)


@pytest.mark.parametrize("name", cases("mae"))
def test_same_function_as_mae(name: str) -> None:
    check_mae(*read(name), name)


@pytest.mark.parametrize("name", cases("hdmae"))
def test_same_function_as_the_hd_release(name: str) -> None:
    check_hdmae(*read(name), name)


HUB: dict[str, Any] = {
    "embed_dim": 32, "depth": 1, "num_heads": 2, "decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 4,
}  # fmt: skip


def of_the_hub(config: dict[str, Any], size: tuple[int, int]) -> Case:
    """A case of the same form, by transformers' ViTMAE."""
    settings, ratio = HUB | config, config.get("mlp_ratio", 4)
    channels, patch = settings["in_chans"], settings["patch_size"]
    model = ViTMAEForPreTraining(
        ViTMAEConfig(
            image_size=list(size), patch_size=patch, num_channels=channels, hidden_size=32, num_hidden_layers=1,
            num_attention_heads=2, intermediate_size=int(32 * ratio), decoder_hidden_size=16,
            decoder_num_hidden_layers=1, decoder_num_attention_heads=4, decoder_intermediate_size=int(16 * ratio),
            layer_norm_eps=config.get("layer_norm_eps", 1e-6), norm_pix_loss=config.get("norm_pix_loss", False),
            mask_ratio=config["mask_ratio"],
        )
    )  # fmt: skip
    grid, generator = (size[0] // patch, size[1] // patch), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
            table.copy_(F.pad(sincos_positions(table.shape[2], *grid, torch.device("cpu")), (0, 0, 1, 0)))
    images = torch.randn(2, channels, *size, generator=generator)
    noise = torch.rand(2, grid[0] * grid[1], generator=generator)
    patchify = model.patchify
    # Whose check of squares has an exception for tables that are resampled.
    model.patchify = lambda images, **_: patchify(images, interpolate_pos_encoding=True)
    output = model(images, noise=noise)
    output.loss.backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    norms = {key: float(gradient.norm()) for key, gradient in from_hub(gradients).items()}
    tensors = {
        "input": images, "noise": noise, "latent": model.vit(images, noise=noise).last_hidden_state, "pred": output.logits,
        "mask": output.mask, "ids_restore": output.ids_restore,
    }  # fmt: skip
    tensors |= {f"weights.{key}": value for key, value in from_hub(model.state_dict()).items()}
    told = settings | {"reference": "mae", "loss_value": output.loss.item(), "grad_norms": norms}
    return told, {key: value.detach() for key, value in tensors.items()}


@pytest.mark.parametrize(
    ("config", "size"),
    [
        # 9 tokens of 100 stay visible, one less than a tenth.
        ({"patch_size": 4, "in_chans": 1, "mask_ratio": 0.9, "norm_pix_loss": True, "img_size": 40}, (40, 40)),
        ({"patch_size": 8, "in_chans": 3, "mask_ratio": 0.6, "mlp_ratio": 2.5, "img_size": [16, 64]}, (16, 64)),
        ({"patch_size": 16, "in_chans": 2, "mask_ratio": 0.3, "norm_pix_loss": False, "layer_norm_eps": 1e-3}, (48, 48)),
    ],
)
def test_other_cases_of_the_form_of_mae(config: dict[str, Any], size: tuple[int, int]) -> None:
    told, tensors = of_the_hub(config, size)
    check_mae(told, tensors, "hub")
    for key in ("latent", "pred", "weights.pos_embed", "weights.blocks.0.attn.qkv.bias"):
        with pytest.raises(AssertionError):
            check_mae(told, tensors | {key: tensors[key] + 1e-3}, "hub")
    wrong = dict(told["grad_norms"], cls_token=1.001 * told["grad_norms"]["cls_token"])
    with pytest.raises(AssertionError):
        check_mae(told | {"grad_norms": wrong}, tensors, "hub")


@pytest.mark.parametrize("name", cases("hdmae"))
def test_other_cases_of_the_form_of_the_hd_release(name: str) -> None:
    """Whole inputs and tables, gradient norms, and what need not be said."""
    config, tensors = read(name)
    given = image_of(config, tensors)
    grid = (given.shape[2] // config["patch_size"], given.shape[3] // config["patch_size"])
    tensors = {key: value for key, value in tensors.items() if not key.startswith("input")} | {"input": given}
    for key in ("weights.pos_embed", "weights.decoder_pos_embed"):
        table = sincos_positions(tensors[key].shape[2], *grid, torch.device("cpu"))
        tensors[key] = F.pad(table, (0, 0, 1, 0))
    said = {key: value for key, value in config.items() if key not in ("grid", "kept_tokens", "img_size", "note")}
    check_hdmae(said, tensors, name)
    with pytest.raises(AssertionError):
        check_hdmae(said | {"mask_ratio_inner": 0.9}, tensors, name)
    with pytest.raises(AssertionError):
        check_hdmae(said | {"grad_norms": {"cls_token": 1.0}}, tensors, name)
