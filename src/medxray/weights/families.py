"""Other projects' checkpoints: where they are, which encoder reads each, and what their tensors are called."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medxray.types import WeightsError


@dataclass(frozen=True)
class Family:
    """Public checkpoints of one kind and an encoder that reads them.

    Attributes:
        name: what the project calls itself.
        encoder: the name that it has in the registry.
        files: what they are called, and where they are.
        settings: the encoder's, FILE in place of a checkpoint's path.
    """

    name: str
    encoder: str
    files: str
    settings: Mapping[str, Any]

    @property
    def example(self) -> str:
        """The settings as they follow an encoder's name on a command line."""
        pairs = []
        for key, value in self.settings.items():
            text = value if isinstance(value, str) else json.dumps(value).replace('"', "")
            pairs.append(f"'{key}={text}'" if set(text) & set("[]{} ") else f"{key}={text}")
        return " ".join(pairs)


FAMILIES = (
    Family(
        "VMamba",
        "vmamba",
        "vssm*_{tiny,small,base}_*_ckpt_epoch_*.pth of github.com/MzeroMiko/VMamba; size as in the name",
        {"size": "base", "weights": "FILE"},
    ),
    Family(
        "Vim",
        "vim",
        "vim_{t,s}_midclstok_*.pth of huggingface.co/hustvl; tiny or small as in the name",
        {"size": "tiny", "weights": "FILE"},
    ),
    Family(
        "MAE and Medical MAE",
        "vit",
        "mae_pretrain_vit_*.pth of github.com/facebookresearch/mae, files of github.com/lambert-x/medical_mae",
        {"size": "base", "weights": "FILE"},
    ),
    Family(
        "ViTMAE",
        "vit",
        "huggingface.co/facebook/vit-mae-*, or a folder of transformers' ViTMAEModel or ViTMAEForPreTraining",
        {"size": "base", "weights": "facebook/vit-mae-base"},
    ),
    Family(
        "ViT and DeiT",
        "vit",
        "timm's vit_* and deit_* with a class token, as a file or a folder; huggingface.co/google/vit-*; position_grid is "
        "the side of the images that they were made for over the patch",
        {"size": "base", "positions": "learned", "position_grid": 14, "weights": "google/vit-base-patch16-224-in21k"},
    ),
    Family(
        "HD X-ray MAE",
        "vit",
        "the release of arXiv:2404.17926; huge or base as the file",
        {"size": "large", "patch": 64, "stem": "hd", "weights": "FILE"},
    ),
    Family(
        "MAE and Medical MAE",
        "timm",
        "mae_pretrain_vit_*.pth of github.com/facebookresearch/mae, files of github.com/lambert-x/medical_mae",
        {"model": "vit_base_patch16_224.mae", "weights": "FILE"},
    ),
    Family(
        "MAE",
        "transformers",
        "huggingface.co/facebook/vit-mae-*; the encoder sees the whole image",
        {"model": "facebook/vit-mae-base"},
    ),
    Family(
        "EVA-X",
        "timm",
        "eva_x_{tiny,small,base}_patch16_merged520k_mim.pt of huggingface.co/MapleF/eva_x; eva02 of that size",
        {
            "model": "eva02_base_patch14_224",
            "arguments": {"patch_size": 16, "ref_feat_shape": [14, 14]},
            "mean": [0.49185243],
            "std": [0.28509309],
            "weights": "FILE",
        },
    ),
    Family(
        "DINOv2",
        "timm",
        "dinov2_vit*_pretrain.pth of github.com/facebookresearch/dinov2, teacher_checkpoint.pth of its training",
        {"model": "vit_base_patch14_dinov2", "weights": "FILE"},
    ),
    Family(
        "DINOv2",
        "transformers",
        "huggingface.co/facebook/dinov2-*; the files that timm reads, with a config in place of the model",
        {"model": "facebook/dinov2-base"},
    ),
    Family(
        "RAD-DINO",
        "transformers",
        "huggingface.co/microsoft/rad-dino",
        {"model": "microsoft/rad-dino"},
    ),
    Family(
        "CheXFound",
        "transformers",
        "teacher_checkpoint.pth of github.com/RPIDIAL/CheXFound, made at 512 pixels a side",
        {
            "config": {
                "model_type": "dinov2_with_registers",
                "hidden_size": 1024,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "patch_size": 16,
                "image_size": 512,
                "use_swiglu_ffn": True,
            },
            "weights": "FILE",
        },
    ),
    Family(
        "Swin",
        "transformers",
        "huggingface.co/microsoft/swin-base-patch4-window7-224, as R2GenGPT and R2GenCSR take it",
        {"model": "microsoft/swin-base-patch4-window7-224"},
    ),
    Family(
        "timm's own",
        "timm",
        "every model and tag of timm.list_pretrained()",
        {"model": "resnet18.a1_in1k", "pretrained": True},
    ),
)


def one_list_of_blocks(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Blocks that DINOv2's training keeps in chunks, `blocks.CHUNK.BLOCK.`, as `blocks.BLOCK.`.

    Their numbers run through; stages of other models, in which they begin again, stay as they are.
    """
    numbers = {(found[1], found[2]) for key in state if (found := re.match(r"blocks\.(\d+)\.(\d+)\.", key))}
    if len({block for _, block in numbers}) < len(numbers):
        return dict(state)
    return {re.sub(r"^blocks\.\d+\.(?=\d+\.)", "blocks.", key): value for key, value in state.items()}


def rename(name: str, rules: Sequence[tuple[str, str]]) -> str:
    """A tensor's name by another project's rules, each a pattern and what stands in its place, one after the other."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


_DINOV2_ON_THE_HUB = (
    (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.ls(\d)\.gamma$", r".layer_scale\1.lambda1"),
    (r"\.mlp\.w12\.", ".mlp.weights_in."),
    (r"\.mlp\.w3\.", ".mlp.weights_out."),
    (r"^norm\.", "layernorm."),
)


def to_hub(state: Mapping[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """A project's own names as those of its files on the Hugging Face hub; others stay as they are.

    Args:
        state: name -> tensor.
        model_type: of transformers. Known are dinov2 and dinov2_with_registers: DINOv2's own files and CheXFound's.
    """
    if not model_type.startswith("dinov2") or "patch_embed.proj.weight" not in state:
        return dict(state)
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        key = rename(key, _DINOV2_ON_THE_HUB)
        if ".attn.qkv." in key:
            for part, tensor in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed[key.replace(".attn.qkv.", f".attention.attention.{part}.")] = tensor
        else:
            renamed[key] = value
    return renamed


_VIT_OF_THE_HUB = (
    (r"^vit\.", ""),
    (r"^decoder\.decoder_(encoder\.layer|layers)\.", "decoder_blocks."),
    (r"^decoder\.", ""),
    (r"^(encoder\.layer|layers)\.", "blocks."),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(attention\.query|q_proj)\.", ".attn.0."),
    (r"\.attention\.(attention\.key|k_proj)\.", ".attn.1."),
    (r"\.attention\.(attention\.value|v_proj)\.", ".attn.2."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"^layernorm\.", "norm."),
)


def from_hub(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' ViT and ViTMAE, encoder and decoder, under the names of MAE and timm; others stay as they are.

    Known are the names of its files and those of its modules.
    """
    if not any(key.endswith("embeddings.patch_embeddings.projection.weight") for key in state):
        return dict(state)
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        renamed[rename(key, _VIT_OF_THE_HUB)] = value
    for key in [key for key in renamed if ".attn.0." in key]:
        parts = [key.replace(".attn.0.", f".attn.{i}.") for i in range(3)]
        if all(part in renamed for part in parts):
            renamed[key.replace(".attn.0.", ".attn.qkv.")] = torch.cat([renamed.pop(part) for part in parts])
    return renamed


@dataclass(frozen=True)
class Told:
    """What stands beside the tensors of a folder and they cannot show themselves; None where nothing does.

    Attributes:
        heads, decoder_heads: of attention, in the encoder and the pixel decoder.
        eps: LayerNorm's.
        activation: of the MLP.
        image: (H, W) pixels that it was made for.
        colours: means and deviations that images of three channels were normalised with.
    """

    heads: int | None = None
    decoder_heads: int | None = None
    eps: float | None = None
    activation: str | None = None
    image: tuple[int, int] | None = None
    colours: tuple[tuple[float, ...], tuple[float, ...]] | None = None


def told_by(config: Path, preprocessor: Path) -> Told:
    """Reads the config.json of transformers or timm, and transformers' preprocessor_config.json where there is one.

    Raises:
        WeightsError: one of them is not JSON.
    """
    found: list[dict[str, Any]] = []
    for path in (config, preprocessor):
        try:
            held = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except (OSError, ValueError) as error:
            raise WeightsError(f"{path} cannot be read: {error}; fetch the folder again") from error
        found.append(held if isinstance(held, dict) else {})
    own, images = found
    if "architecture" in own:
        model, images = own.get("model_args") or {}, own.get("pretrained_cfg") or {}
        size, means, stds = images.get("input_size", [None])[1:], images.get("mean"), images.get("std")
        heads = model.get("num_heads")
        return Told(heads, image=_pair(model.get("img_size") or size), colours=_colours(means, stds))
    return Told(
        own.get("num_attention_heads"),
        own.get("decoder_num_attention_heads"),
        own.get("layer_norm_eps"),
        own.get("hidden_act"),
        _pair(own.get("image_size")),
        _colours(images.get("image_mean"), images.get("image_std")),
    )


def _pair(size: int | list[int] | None) -> tuple[int, int] | None:
    """A side, or [height, width]."""
    if isinstance(size, int):
        return size, size
    return (int(size[0]), int(size[1])) if size and len(size) == 2 else None


def _colours(means: Any, stds: Any) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    return (tuple(means), tuple(stds)) if means and stds and len(means) == len(stds) == 3 else None
