"""Public layouts of other projects, made small: the encoder that reads one computes what the project computes.

The references below are written from the projects' published forward passes, over the names of their files.
"""

import argparse
import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medxray.encoders import ENCODERS, Encoder
from medxray.encoders.timm import TimmEncoder
from medxray.encoders.transformers import TransformersEncoder
from medxray.summary import spec_of_encoder
from medxray.types import WeightsError
from medxray.weights import IMAGENET_MEAN, IMAGENET_STD, load_encoder, load_state
from medxray.weights.families import FAMILIES, Family, one_list_of_blocks

D, DEPTH, HEADS, PATCH, SIDE = 32, 3, 2, 8, 32
GRID = SIDE // PATCH
State = dict[str, Tensor]


def made_up(shapes: dict[str, tuple[int, ...]]) -> State:
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.randn(shape, generator=generator) * 0.2 + (1.0 if "norm" in key and key.endswith("weight") else 0.0)
        for key, shape in shapes.items()
    }


def layer_shapes(name: str, inputs: int, outputs: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), **({f"{name}.bias": (outputs,)} if bias else {})}


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def norm(state: State, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)


def embed(state: State, images: Tensor) -> Tensor:
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], PATCH)
    x = x.flatten(2).transpose(1, 2)
    return torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def heads_of(x: Tensor) -> Tensor:
    return x.unflatten(2, (HEADS, -1)).transpose(1, 2)


def common_shapes(extra_tokens: int = 1) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, D),
        "pos_embed": (1, GRID**2 + extra_tokens, D),
        "patch_embed.proj.weight": (D, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (D,),
        "norm.weight": (D,),
        "norm.bias": (D,),
    }
    for i in range(DEPTH):
        for at in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{at}.weight": (D,), f"blocks.{i}.{at}.bias": (D,)}
        shapes |= layer_shapes(f"blocks.{i}.attn.proj", D, D)
    return shapes


# DINOv2 and what is trained by its code.


def dinov2_file(registers: int, gated: bool) -> State:
    shapes = common_shapes() | {"mask_token": (1, D)}
    if registers:
        shapes["register_tokens"] = (1, registers, D)
    hidden = (int(4 * D * 2 / 3) + 7) // 8 * 8
    for i in range(DEPTH):
        shapes |= layer_shapes(f"blocks.{i}.attn.qkv", D, 3 * D)
        shapes |= {f"blocks.{i}.ls{n}.gamma": (D,) for n in (1, 2)}
        if gated:
            shapes |= layer_shapes(f"blocks.{i}.mlp.w12", D, 2 * hidden)
            shapes |= layer_shapes(f"blocks.{i}.mlp.w3", hidden, D)
        else:
            shapes |= layer_shapes(f"blocks.{i}.mlp.fc1", D, 4 * D) | layer_shapes(f"blocks.{i}.mlp.fc2", 4 * D, D)
    return made_up(shapes)


def dinov2(state: State, images: Tensor) -> Tensor:
    """x_norm_patchtokens (B, N, D)."""
    x = embed(state, images)
    registers = state.get("register_tokens", x[:1, :0])
    x = torch.cat([x[:, :1], registers.expand(len(x), -1, -1), x[:, 1:]], 1)
    for i in range(DEPTH):
        block = f"blocks.{i}"
        q, k, v = map(heads_of, linear(state, f"{block}.attn.qkv", norm(state, f"{block}.norm1", x)).chunk(3, -1))
        x = x + state[f"{block}.ls1.gamma"] * linear(state, f"{block}.attn.proj", attend(q, k, v))
        y = norm(state, f"{block}.norm2", x)
        if f"{block}.mlp.w12.weight" in state:
            gate, y = linear(state, f"{block}.mlp.w12", y).chunk(2, -1)
            y = linear(state, f"{block}.mlp.w3", F.silu(gate) * y)
        else:
            y = linear(state, f"{block}.mlp.fc2", F.gelu(linear(state, f"{block}.mlp.fc1", y)))
        x = x + state[f"{block}.ls2.gamma"] * y
    return norm(state, "norm", x)[:, 1 + registers.shape[1] :]


def as_teacher(state: State, chunks: int) -> dict[str, Any]:
    """What DINOv2's training writes: heads beside the backbone, blocks in chunks with numbers that run through."""
    size = math.ceil(DEPTH / chunks)

    def name(key: str) -> str:
        if chunks > 1 and key.startswith("blocks."):
            key = f"blocks.{int(key.split('.')[1]) // size}.{key.removeprefix('blocks.')}"
        return f"backbone.{key}"

    teacher = {name(key): value for key, value in state.items()}
    heads = {"dino_head.last_layer.weight_v": torch.zeros(2, 2), "ibot_head.mlp.0.bias": torch.zeros(2)}
    return {"teacher": teacher | heads}


def dinov2_by_transformers(registers: int, gated: bool, **more: Any) -> TransformersEncoder:
    config = {
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "hidden_size": D, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "patch_size": PATCH,
        "image_size": SIDE, "use_swiglu_ffn": gated, **({"num_register_tokens": registers} if registers else {}),
    }  # fmt: skip
    return TransformersEncoder(config=config, **more).eval()


def dinov2_by_timm(registers: int, **more: Any) -> TimmEncoder:
    model = f"vit_small_patch14_{'reg4_' if registers else ''}dinov2"
    arguments = {"embed_dim": D, "depth": DEPTH, "num_heads": HEADS, "patch_size": PATCH}
    return TimmEncoder(model, image_size=SIDE, arguments=arguments, **more).eval()


@torch.no_grad()
def tokens(encoder: Encoder, images: Tensor) -> Tensor:
    return encoder(images).tokens


def gray_and_colour(encoder: Encoder, means: Any = IMAGENET_MEAN, stds: Any = IMAGENET_STD) -> tuple[Tensor, Tensor]:
    """The same gray pixels as a gray encoder gets them, and in the colours of a public file's training."""
    pixels = torch.rand(2, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    m, s = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (means, stds))
    return (pixels - encoder.mean[0]) / encoder.std[0], (pixels.expand(-1, 3, -1, -1) - m) / s


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize(("registers", "gated"), [(0, False), (4, False), (4, True)])
def test_dinov2_and_chexfound(registers: int, gated: bool, chunks: int, tmp_path: Path) -> None:
    state = dinov2_file(registers, gated)
    torch.save(as_teacher(state, chunks), tmp_path / "teacher_checkpoint.pth")
    torch.save(state, tmp_path / "pretrain.pth")
    builders = [lambda **more: dinov2_by_transformers(registers, gated, **more)]
    if not gated:
        builders.append(lambda **more: dinov2_by_timm(registers, **more))
    for build in builders:
        for file in ("teacher_checkpoint.pth", "pretrain.pth"):
            encoder = build(channels=3)
            assert (encoder.mean, encoder.std) == (IMAGENET_MEAN, IMAGENET_STD)
            load_encoder(encoder, str(tmp_path / file))
            images = torch.randn(2, 3, SIDE, SIDE)
            torch.testing.assert_close(tokens(encoder, images), dinov2(state, images), rtol=1e-4, atol=1e-5)
        gray = build(channels=1)
        load_encoder(gray, str(tmp_path / "teacher_checkpoint.pth"))
        own, coloured = gray_and_colour(gray)
        torch.testing.assert_close(tokens(gray, own), dinov2(state, coloured), rtol=1e-3, atol=1e-4)


def test_dinov2_file_that_does_not_fit(tmp_path: Path) -> None:
    state = dinov2_file(0, False)
    torch.save({k: v for k, v in state.items() if k != "blocks.1.norm1.bias"}, tmp_path / "lacks.pth")
    torch.save(state | {"extra.weight": torch.zeros(2)}, tmp_path / "more.pth")
    torch.save(state | {"pos_embed": torch.zeros(1, 50, D)}, tmp_path / "grid.pth")
    for build in (dinov2_by_transformers, lambda registers, gated: dinov2_by_timm(registers, channels=3)):
        encoder = build(0, False)
        before = {key: value.clone() for key, value in encoder.state_dict().items()}
        with pytest.raises(WeightsError, match=r"lacks\.pth do not fit .*1 missing keys \(.*1\.norm1\.bias\)"):
            load_encoder(encoder, str(tmp_path / "lacks.pth"))
        with pytest.raises(WeightsError, match=r"more\.pth do not fit .*1 keys that the model lacks \(.*extra\.weight"):
            load_encoder(encoder, str(tmp_path / "more.pth"))
        assert all(torch.equal(encoder.state_dict()[key], value) for key, value in before.items())
    # transformers resamples as it runs, from the table of the size that its config names; timm when it loads.
    with pytest.raises(WeightsError, match=r"position_embeddings is \(1, 50, 32\) in the file and \(1, 17, 32\)"):
        load_encoder(dinov2_by_transformers(0, False, channels=3), str(tmp_path / "grid.pth"))


def test_timm_resamples_positions_by_its_own_rule(tmp_path: Path) -> None:
    from timm.layers import resample_abs_pos_embed

    state = dinov2_file(0, False) | {"pos_embed": torch.randn(1, 37, D)}
    torch.save(state, tmp_path / "grid.pth")
    encoder = dinov2_by_timm(0, channels=3)
    load_encoder(encoder, str(tmp_path / "grid.pth"))
    expected = resample_abs_pos_embed(state["pos_embed"], [GRID, GRID], num_prefix_tokens=1)
    assert torch.equal(encoder.state_dict()["model.pos_embed"], expected)


def test_blocks_in_chunks() -> None:
    def renamed(*keys: str) -> list[str]:
        return list(one_list_of_blocks(dict.fromkeys(keys, torch.zeros(1))))

    assert renamed("blocks.0.0.norm1.weight", "blocks.3.23.attn.proj.bias", "norm.weight") == [
        "blocks.0.norm1.weight", "blocks.23.attn.proj.bias", "norm.weight"
    ]  # fmt: skip
    for others in (["blocks.5.norm1.weight"], ["blocks.0.0.norm1.weight", "blocks.1.0.norm1.weight"]):
        assert renamed(*others) == others


# EVA-X: EVA-02 for patches of 16 pixels, tiny and small with joint projections, base with single ones.


def rotation(side: int, pretrained: int) -> tuple[Tensor, Tensor]:
    """cos and sin (N, head width) of EVA-02's rotary positions."""
    half = D // HEADS // 2
    frequency = 10000.0 ** (-torch.arange(0, half, 2).float() / half)
    angle = ((torch.arange(side).float() / side * pretrained)[:, None] * frequency).repeat_interleave(2, 1)
    rows = angle[:, None].expand(-1, side, -1)
    columns = angle[None].expand(side, -1, -1)
    angles = torch.cat([rows, columns], -1).flatten(0, 1)
    return angles.cos(), angles.sin()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """All tokens but the first."""
    t = x[:, :, 1:]
    turned = torch.stack([-t[..., 1::2], t[..., ::2]], -1).flatten(-2)
    return torch.cat([x[:, :, :1], t * cos + turned * sin], 2)


def eva_file(base: bool) -> State:
    shapes = common_shapes() | {"mask_token": (1, 1, D)} | layer_shapes("lm_head", D, 24)
    hidden = int(D * 4 * 2 / 3)
    for i in range(DEPTH):
        block = f"blocks.{i}"
        shapes |= {f"{block}.attn.q_bias": (D,), f"{block}.attn.v_bias": (D,)}
        if base:
            for part in "qkv":
                shapes |= layer_shapes(f"{block}.attn.{part}_proj", D, D, bias=False)
            shapes |= layer_shapes(f"{block}.mlp.w1", D, hidden) | layer_shapes(f"{block}.mlp.w2", D, hidden)
            shapes |= {f"{block}.mlp.ffn_ln.weight": (hidden,), f"{block}.mlp.ffn_ln.bias": (hidden,)}
        else:
            shapes |= layer_shapes(f"{block}.attn.qkv", D, 3 * D, bias=False)
            shapes |= layer_shapes(f"{block}.mlp.w12", D, 2 * hidden)
        shapes |= layer_shapes(f"{block}.mlp.w3", hidden, D)
    cos, sin = rotation(GRID, GRID)
    return made_up(shapes) | {"rope.freqs_cos": cos, "rope.freqs_sin": sin, "blocks.0.attn.rope.freqs_cos": cos}


def eva(state: State, images: Tensor) -> Tensor:
    """Patch tokens (B, N, D) before the last norm, which comes after their mean."""
    x, (cos, sin) = embed(state, images), rotation(GRID, GRID)
    for i in range(DEPTH):
        block = f"blocks.{i}"
        y = norm(state, f"{block}.norm1", x)
        bias = {"q": state[f"{block}.attn.q_bias"], "k": None, "v": state[f"{block}.attn.v_bias"]}
        if f"{block}.attn.qkv.weight" in state:
            weights = dict(zip("qkv", state[f"{block}.attn.qkv.weight"].chunk(3), strict=True))
        else:
            weights = {part: state[f"{block}.attn.{part}_proj.weight"] for part in "qkv"}
        q, k, v = (heads_of(F.linear(y, weights[part], bias[part])) for part in "qkv")
        y = attend(rotated(q, cos, sin), rotated(k, cos, sin), v)
        x = x + linear(state, f"{block}.attn.proj", y)
        y = norm(state, f"{block}.norm2", x)
        if f"{block}.mlp.w12.weight" in state:
            gate, y = linear(state, f"{block}.mlp.w12", y).chunk(2, -1)
            y = F.silu(gate) * y
        else:
            y = F.silu(linear(state, f"{block}.mlp.w1", y)) * linear(state, f"{block}.mlp.w2", y)
            y = norm(state, f"{block}.mlp.ffn_ln", y)
        x = x + linear(state, f"{block}.mlp.w3", y)
    return x[:, 1:]


def eva_by_timm(base: bool, *, patch: int = PATCH, trained_on: int = GRID, **more: Any) -> TimmEncoder:
    arguments = {"embed_dim": D, "depth": DEPTH, "num_heads": HEADS, "patch_size": patch}
    return TimmEncoder(
        f"eva02_{'base' if base else 'tiny'}_patch14_224",
        image_size=SIDE,
        arguments={**arguments, "ref_feat_shape": [trained_on, trained_on]},
        **more,
    ).eval()


@pytest.mark.parametrize("base", [False, True])
def test_eva_x(base: bool, tmp_path: Path) -> None:
    state = eva_file(base)
    # Its pickles hold the optimiser's state too, with numbers of numpy.
    torch.save({"model": state, "optimizer": {"lr": np.float64(1e-3)}, "epoch": 600}, tmp_path / "eva_x.pt")
    gray_statistics: dict[str, Any] = {"mean": [0.49185243], "std": [0.28509309]}
    encoder = eva_by_timm(base, channels=3, **gray_statistics)
    load_encoder(encoder, str(tmp_path / "eva_x.pt"))
    images = torch.randn(2, 3, SIDE, SIDE)
    torch.testing.assert_close(tokens(encoder, images), eva(state, images), rtol=1e-4, atol=1e-5)

    gray = eva_by_timm(base, **gray_statistics)
    assert (gray.channels, gray.mean, gray.std) == (1, (0.49185243,), (0.28509309,))
    load_encoder(gray, str(tmp_path / "eva_x.pt"))
    own, coloured = gray_and_colour(gray, *gray_statistics.values())
    torch.testing.assert_close(tokens(gray, own), eva(state, coloured), rtol=1e-3, atol=1e-4)

    with pytest.raises(WeightsError, match=r"patches of 8 x 8 pixels.*16 x 16; set encoder.arguments: {patch_size: 8}"):
        load_encoder(eva_by_timm(base, patch=16, channels=3), str(tmp_path / "eva_x.pt"))
    with pytest.raises(WeightsError, match=r"rotary positions.*ref_feat_shape: \[4, 4\]"):
        load_encoder(eva_by_timm(base, trained_on=16, channels=3), str(tmp_path / "eva_x.pt"))


# MAE through timm and transformers; through ViT in test_public_files.py.


def test_mae_through_timm_for_gray_images(tmp_path: Path) -> None:
    arguments = {"embed_dim": D, "depth": 1, "num_heads": HEADS, "patch_size": PATCH}
    build = lambda channels: TimmEncoder(  # noqa: E731
        "vit_base_patch16_224.mae", channels=channels, image_size=SIDE, arguments=arguments
    ).eval()
    colour, gray = build(3), build(1)
    assert (colour.mean, gray.mean) == (IMAGENET_MEAN, (0.5,))
    nn.init.normal_(colour.model.patch_embed.proj.bias)
    file = {key.removeprefix("model."): value for key, value in colour.state_dict().items()}
    file |= {"mask_token": torch.zeros(1, 1, 8), "decoder_pred.bias": torch.zeros(3)}
    torch.save({"model": file, "args": argparse.Namespace(lr=np.float32(1))}, tmp_path / "mae.pth")
    load_encoder(gray, str(tmp_path / "mae.pth"))
    own, coloured = gray_and_colour(gray)
    torch.testing.assert_close(tokens(gray, own), tokens(colour, coloured), rtol=1e-3, atol=1e-4)


def test_mae_of_the_hub_sees_the_whole_image(tmp_path: Path) -> None:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        hidden_size=D, num_hidden_layers=1, num_attention_heads=HEADS, intermediate_size=D, image_size=SIDE,
        patch_size=PATCH, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=16, mask_ratio=0.0,
    )  # fmt: skip
    model = ViTMAEForPreTraining(config).eval()
    nn.init.normal_(model.vit.embeddings.position_embeddings)
    model.save_pretrained(tmp_path)
    encoder = TransformersEncoder(str(tmp_path)).eval()
    images = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        in_order = torch.arange(float(GRID**2)).expand(2, -1)
        expected = model.vit(images, noise=in_order).last_hidden_state[:, 1:]
    assert torch.equal(tokens(encoder, images), expected)
    assert encoder(images).grid == (GRID, GRID)
    with pytest.raises(ValueError, match=r"'vit_mae' hides a random share of each image; its encoder is 'vit'"):
        TransformersEncoder(config={"model_type": "vit_mae"})


def test_files_of_the_hub_into_a_built_model(tmp_path: Path) -> None:
    """The names of a file on the hub need not be those of the installed transformers."""
    source = dinov2_by_transformers(4, True, channels=3)
    source.model.save_pretrained(tmp_path)
    twin = dinov2_by_transformers(4, True, channels=3)
    load_encoder(twin, str(tmp_path / "model.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), twin.parameters(), strict=True))


def test_public_weights_of_timm_take_gray_images_exactly(tmp_path: Path) -> None:
    import timm
    from timm.models import save_for_hf

    model = timm.create_model("test_resnet", pretrained_cfg_overlay={"mean": IMAGENET_MEAN, "std": IMAGENET_STD})
    save_for_hf(model, str(tmp_path))
    source = f"local-dir:{tmp_path}"
    colour, gray = (TimmEncoder(source, pretrained=True, channels=channels).eval() for channels in (3, 1))
    own, coloured = gray_and_colour(gray)
    torch.testing.assert_close(tokens(gray, own), tokens(colour, coloured), rtol=1e-4, atol=1e-5)
    assert colour.mean == IMAGENET_MEAN and gray.mean == (pytest.approx(sum(IMAGENET_MEAN) / 3),)


# The table that `medxray list encoders` prints.


@pytest.mark.parametrize("family", [pytest.param(f, id=f"{f.name}-{f.encoder}") for f in FAMILIES])
def test_settings_in_the_table_are_those_of_the_encoder(family: Family) -> None:
    if family.encoder not in ENCODERS:
        pytest.skip(f"no encoder {family.encoder!r} is registered")
    spec = spec_of_encoder(family.encoder, shlex.split(family.example))
    found = spec.to_dict()["encoder"]
    assert {key: found[key] for key in family.settings} == dict(family.settings)


def test_moving_averages_and_teachers(tmp_path: Path) -> None:
    one, two = torch.zeros(1), torch.ones(1)
    torch.save({"student": {"a": one}, "teacher": {"a": two}}, tmp_path / "dino.pth")
    assert load_state(tmp_path / "dino.pth")["a"] == 1
    torch.save({"model": {"a": one}, "model_ema": {"a": two}}, tmp_path / "vssm.pth")
    assert load_state(tmp_path / "vssm.pth")["a"] == 0
    torch.save({"module": {"a": two}, "global_steps": 3}, tmp_path / "deepspeed.pt")
    assert load_state(tmp_path / "deepspeed.pt")["a"] == 1
