"""Writing an encoder's weights as other libraries read them: timm's ViT and transformers' ViTModel."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from medxray.types import WeightsError
from medxray.weights.families import rename

TIMM = {192: "tiny", 384: "small", 768: "base", 1024: "large"}
"""Width -> timm's name of the size."""


@torch.no_grad()
def export(
    encoder: nn.Module,
    folder: str | Path,
    format: Literal["timm", "transformers"] = "timm",
    image_size: int | list[int] | tuple[int, int] = 224,
) -> Path:
    """Writes a `vit` encoder as a folder that timm or transformers builds a model from, with the same tokens.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` also pools as the encoder does; the file may be given as
    `checkpoint_path` to a model of the same size. `AutoModel.from_pretrained(FOLDER)` adds a pooler of its own, which
    is not trained. Both read `weights: FOLDER` back.

    Args:
        encoder: with positions sincos or learned, and stem linear.
        folder: gets config.json and model.safetensors, and for transformers preprocessor_config.json.
        format: timm or transformers.
        image_size: pixels a side, or (H, W): the table of positions is written for it.

    Raises:
        WeightsError: something of the encoder has no place in the format; the setting is named.
        SpecError: the size is not a whole number of patches.
    """
    if format not in ("timm", "transformers"):
        raise WeightsError(f"format {format!r} is not known; expected timm, transformers or medxray")
    model: Any = encoder
    state = {key: value.detach().float().cpu() for key, value in encoder.state_dict().items()}
    _refuse_what_has_no_place(model, state, format)
    path, size = Path(folder), (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if (path / "spec.yaml").exists():
        raise WeightsError(f"{path} is a run folder, whose weights would be overwritten; name another")
    grid = model.grid(*size)
    table = model.positions(*grid).float().cpu()
    single = state["pos_embed"][:, :1] if "pos_embed" in state else torch.zeros(1, 1, model.width)
    if "reg_token" in state:
        # timm then has positions of the patches alone.
        state["cls_token"], state["pos_embed"] = state["cls_token"] + single, table
    else:
        state["pos_embed"] = torch.cat([single, table], 1)
    files = _for_timm(model, state, size) if format == "timm" else _for_transformers(model, state, size)
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (path / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    state = to_transformers(state) if format == "transformers" else state
    save_file({k: v.contiguous() for k, v in state.items()}, path / "model.safetensors", metadata={"format": "pt"})
    return path


def _refuse_what_has_no_place(model: Any, state: dict[str, Tensor], format: str) -> None:
    """Raises WeightsError that names the setting."""
    if "blocks.0.attn.qkv.weight" not in state or not hasattr(model, "positions"):
        raise WeightsError(f"only the encoder 'vit' can be written for {format}, found {type(model).__name__}")
    stem = {key for key in state if key.startswith("patch_embed.")}
    strange = {
        "encoder.stem": stem != {"patch_embed.proj.weight", "patch_embed.proj.bias"},
        "encoder.positions: rope": bool(model.turned),
        "encoder.norm_eps": format == "timm" and model.norm.eps != 1e-6,
        "encoder.registers": format == "transformers" and "reg_token" in state,
        "encoder.layer_scale": format == "transformers" and "blocks.0.ls1.gamma" in state,
    }
    found = [setting for setting, has in strange.items() if has]
    if found:
        library = "timm's VisionTransformer" if format == "timm" else "transformers' ViTModel"
        raise WeightsError(f"{', '.join(found)}: {library} has no place for it; this encoder cannot be written so")


def _facts(model: Any, state: dict[str, Tensor]) -> dict[str, Any]:
    hidden, width = state["blocks.0.mlp.fc1.weight"].shape
    mean, std = ([float(x) for x in torch.tensor(n).expand(model.channels)] for n in (model.mean, model.std))
    return {"hidden": hidden, "width": width, "heads": model.blocks[0].attn.heads, "mean": mean, "std": std}


def _for_timm(model: Any, state: dict[str, Tensor], size: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """The config.json of timm's folders."""
    facts = _facts(model, state)
    ratio = facts["hidden"] / facts["width"]
    arguments: dict[str, Any] = {
        "img_size": list(size),
        "patch_size": model.stride,
        "in_chans": model.channels,
        "embed_dim": facts["width"],
        "depth": model.depth,
        "num_heads": facts["heads"],
        # timm rounds down.
        "mlp_ratio": ratio if int(facts["width"] * ratio) == facts["hidden"] else ratio + 0.5 / facts["width"],
        # The mean of the patches, after the norm.
        "global_pool": "avg",
        "fc_norm": False,
        "num_classes": 0,
    }
    if model.registers:
        arguments |= {"reg_tokens": model.registers, "no_embed_class": True}
    if "blocks.0.ls1.gamma" in state:
        arguments["init_values"] = 1e-5
    config = {
        "architecture": f"vit_{TIMM.get(facts['width'], 'base')}_patch16_224",
        "num_classes": 0,
        "num_features": facts["width"],
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [model.channels, *size],
            "fixed_input_size": True,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": facts["mean"],
            "std": facts["std"],
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    return {"config.json": config}


def _for_transformers(model: Any, state: dict[str, Tensor], size: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """The config.json and preprocessor_config.json of transformers."""
    facts = _facts(model, state)
    config: dict[str, Any] = {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": facts["width"],
        "num_hidden_layers": model.depth,
        "num_attention_heads": facts["heads"],
        "intermediate_size": facts["hidden"],
        "hidden_act": "gelu",
        "layer_norm_eps": model.norm.eps,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "image_size": size[0] if size[0] == size[1] else list(size),
        "patch_size": model.stride,
        "num_channels": model.channels,
        "qkv_bias": True,
        "dtype": "float32",
    }
    return {"config.json": config, "preprocessor_config.json": _preprocessor(size, facts["mean"], facts["std"])}


def write_preprocessor(folder: Path, size: tuple[int, ...], mean: Sequence[float], std: Sequence[float]) -> None:
    """Tells transformers how the images of a saved model are resized and normalised."""
    content = _preprocessor(size, list(mean), list(std))
    (folder / "preprocessor_config.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _preprocessor(size: tuple[int, ...], mean: list[float], std: list[float]) -> dict[str, Any]:
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": size[0], "width": size[1]},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }


_TO_TRANSFORMERS = (
    (r"^(cls_token)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"^norm\.", "layernorm."),
)


def to_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A plain ViT's tensors under the names of transformers' files, the inverse of `families.from_hub`."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        key = rename(key, _TO_TRANSFORMERS)
        if ".attn.qkv." in key:
            for part, tensor in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed[key.replace(".attn.qkv.", f".attention.attention.{part}.")] = tensor.clone()
        else:
            renamed[key] = value
    return renamed
