"""Reading checkpoints, ours and others', without running what is in them; writing for others stands in `writing`.

What is known of other projects' files stands in `families`. An encoder over another library has a method
`adopt(state, source)`: the tensors of a public file under its own names, without those that it has no place for.
"""

import argparse
import hashlib
import math
import pickle
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from medxray.adapters import LoRA, merged
from medxray.layers import Attention, resample_positions, resize_kernel, sincos_positions
from medxray.types import WeightsError
from medxray.weights.families import Told, from_hub, one_list_of_blocks, told_by

SHOWN = 5
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Where a file holds a model and its moving average, or a student and its teacher, each project evaluates the named one.
WRAPPERS = ("model", "state_dict", "model_state_dict", "teacher", "student", "module", "model_ema")
PREFIXES = ("module.", "backbone.", "_orig_mod.")
# Parts of public checkpoints that an encoder does not have: MAE's decoder, classifiers, heads of self-supervision,
# other projects' extras.
NOT_ENCODER = (
    "decoder_", "decoder.", "mask_token", "head.", "head_dist.", "fc.", "fc_norm.", "classifier.", "pooler.",
    "projector.", "retriever.", "dino_head.", "ibot_head.", "lm_head.",
)  # fmt: skip
# In a folder of transformers or timm.
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
HUB_CONFIGS = ("config.json", "preprocessor_config.json")
# Plain values that training scripts leave beside the tensors. numpy's have two names, of its version 1 and of 2;
# Lightning's dictionary of settings, which becomes a plain one, has moved.
_SCALAR = np.float64(0).__reduce__()[0]
PLAIN: list[Any] = [
    argparse.Namespace, (_SCALAR, "numpy.core.multiarray.scalar"), (_SCALAR, "numpy._core.multiarray.scalar"), np.dtype,
    *{type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")},
    *((dict, f"{module}.AttributeDict") for module in (
        "lightning.fabric.utilities.data", "lightning_fabric.utilities.data", "lightning.pytorch.utilities.parsing",
        "pytorch_lightning.utilities.parsing",
    )),
]  # fmt: skip


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_state(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file or a torch pickle, taken out of `model`, `state_dict` and the like.

    A pickle is read with an allow-list: tensors, plain containers, numpy's numbers and argparse.Namespace, nothing
    else.

    Raises:
        WeightsError: missing, damaged, not a checkpoint, or holding objects that would have to be run.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"weights {path} do not exist; give a checkpoint file or a medxray run folder")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            with torch.serialization.safe_globals(PLAIN):
                state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"weights {path} hold more than tensors and plain values, and were not opened: "
            f"{str(error).strip().splitlines()[0]}; convert them to safetensors where you trust them"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise WeightsError(f"weights {path} cannot be read: {error}; expected safetensors or a torch file") from error
    for wrapper in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
            break
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise WeightsError(f"weights {path}: no tensors were found in it; expected a state dict")
    for prefix in PREFIXES:
        # Heads of self-supervised training stand beside the backbone, not in it.
        if all(key.startswith((prefix, *NOT_ENCODER)) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def load_into(
    module: nn.Module, state: dict[str, Tensor], source: str, *, allow_missing: Sequence[str] = ()
) -> None:
    """Puts tensors into a module, all of them or none.

    A linear layer's (O, I) and a 1x1 convolution's (O, I, 1, 1) stand for each other.

    Args:
        module: gets them.
        state: name -> tensor.
        source: what to call them in a message.
        allow_missing: names that need not be there.

    Raises:
        WeightsError: keys that are missing or left over, shapes that disagree.
    """
    own = module.state_dict()
    fitted: dict[str, Tensor] = {}
    wrong: list[str] = []
    for name, tensor in state.items():
        if name not in own:
            continue
        shape = own[name].shape
        if tensor.shape != shape and tensor.numel() == own[name].numel() and _pointwise(tensor.shape, shape):
            tensor = tensor.reshape(shape)
        if tensor.shape != shape:
            wrong.append(f"{name} is {tuple(tensor.shape)} in the file and {tuple(shape)} in the model")
        fitted[name] = tensor
    missing = [name for name in own if name not in state and name not in set(allow_missing)]
    extra = [name for name in state if name not in own]
    refuse(source, type(module).__name__, missing, extra, wrong)
    with torch.no_grad():
        for name, tensor in fitted.items():
            own[name].copy_(tensor)


def refuse(source: str, model: str, missing: list[str], extra: list[str], wrong: list[str]) -> None:
    """Raises WeightsError with every kind of misfit, if there is any."""
    problems = [
        f"{len(names)} {what} ({_some(names)})"
        for what, names in (
            ("missing keys", missing), ("keys that the model lacks", extra), ("shapes that disagree", wrong)
        )
        if names
    ]
    if problems:
        raise WeightsError(
            f"weights {source} do not fit {model}: {'; '.join(problems)}; "
            "give the settings that they were made with, or other weights"
        )


def load_encoder(encoder: nn.Module, source: str) -> None:
    """Loads an encoder, every tensor of it, or raises an error.

    From other projects' files decoders, heads and fixed position tables are left out; RGB kernels are folded for an
    encoder of one channel, exactly for gray images but for a border that the layer pads, by the normalisation that a
    folder names and ImageNet's for a file. The kernel of another patch is resized, with a warning; a learned table of
    another grid is resampled to `position_grid`.

    Args:
        encoder: gets them.
        source: a medxray run folder, a checkpoint file, a folder of transformers or timm (config.json and
            model.safetensors), or a name on the Hugging Face hub such as facebook/vit-mae-base.

    Raises:
        WeightsError: with the reason and the cure.
    """
    state, told = _opened(source, "encoder", "encoder.")
    if told is None:
        load_into(encoder, _resized(encoder, state, source, None), source)
    else:
        _check_told(encoder, told.heads, told, source)
        load_into(encoder, _fitted(encoder, state, source, told), source)


def encoder_state(encoder: nn.Module, state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """All of an encoder's tensors, under its own names, of the part that it is in another project's checkpoint.

    Buffers that the file lacks are the encoder's.

    Args:
        encoder: whose they shall be; it stays as it is.
        state: tensors by the names of a public file.
        source: what to call it in a message.

    Raises:
        WeightsError: keys that are missing or left over, shapes that disagree.
    """
    fitted, own = _fitted(encoder, state, source, Told()), encoder.state_dict()
    parameters = {name for name, _ in encoder.named_parameters()}
    missing = [name for name in own if name not in fitted and name in parameters]
    wrong = [
        f"{name} is {tuple(fitted[name].shape)} in the file and {tuple(own[name].shape)} in the model"
        for name in fitted
        if name in own and fitted[name].shape != own[name].shape
    ]
    refuse(source, type(encoder).__name__, missing, [name for name in fitted if name not in own], wrong)
    return fitted


def _fitted(encoder: nn.Module, state: dict[str, Tensor], source: str, told: Told) -> dict[str, Tensor]:
    """A public file's tensors as the encoder has them: its names, patches, grid and colours."""
    state = _resized(encoder, _own_names(encoder, state, source, told), source, told.image)
    return fold_to_gray(encoder, state, told.colours)


def load_decoder(decoder: nn.Module, source: str) -> None:
    """Loads the pixel decoder of a masked auto-encoder, every tensor of it, or raises an error.

    Args:
        decoder: gets them.
        source: as for `load_encoder`: a run of task pretrain, a file of MAE or of the HD release that holds a decoder,
            such as mae_visualize_vit_base.pth, or Hugging Face's ViTMAEForPreTraining.

    Raises:
        WeightsError: with the reason and the cure.
    """
    state, told = _opened(source, "pixel_decoder", "model.decoder.")
    if told is not None:
        _check_told(decoder, told.decoder_heads, told, source)
        state = from_hub(state)
        if "decoder_pos_embed" in state:
            _check_positions(decoder, "decoder_pos_embed", state, _grid(state, told.image), source)
        # The last is a layer that the HD release holds and never uses.
        not_used = ("decoder_pos_embed", "decoder_image.")
        state = {k: v for k, v in state.items() if k.startswith(("decoder_", "mask_token")) and not k.startswith(not_used)}
        if not any(key.startswith("decoder_") for key in state):
            raise WeightsError(
                f"pixel_decoder.weights {source!r} holds no decoder; take a file with one, such as "
                "mae_visualize_vit_base.pth, or leave pixel_decoder.weights out"
            )
    load_into(decoder, state, source)


def load_autoencoder(model: nn.Module, source: str) -> None:
    """Loads both halves of a `MaskedAutoEncoder`, to go on with its pre-training.

    Args:
        model: has an `encoder` and a `decoder`.
        source: as for `load_decoder`.

    Raises:
        WeightsError: with the reason and the cure.
    """
    load_encoder(model.get_submodule("encoder"), source)
    load_decoder(model.get_submodule("decoder"), source)


def _opened(source: str, section: str, prefix: str) -> tuple[dict[str, Tensor], Told | None]:
    """The tensors of one part of a medxray run, with None; or all of a public file, with what came beside it."""
    setting, path = f"{section}.weights {source!r}", Path(source).expanduser()
    on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and path.suffix not in (".safetensors", ".bin", ".pth", ".pt")
    if on_hub and not path.exists() and not path.parent.exists():
        path = _fetched(source, setting)
    if path.is_file():
        return load_state(path), Told()
    if not path.is_dir():
        raise WeightsError(f"{setting}: no such file or folder; give a checkpoint, or the run folder of a fit")
    file = next((path / name for name in HUB_FILES if (path / name).is_file()), None)
    if (path / "config.json").is_file() and not (path / "spec.yaml").is_file():
        if file is None:
            raise WeightsError(f"{setting}: the folder has a config.json and no {' or '.join(HUB_FILES)}")
        return load_state(file), told_by(*(path / name for name in HUB_CONFIGS))
    if file is None or file.name != "model.safetensors":
        raise WeightsError(f"{setting}: the folder has no model.safetensors; fit that run first")
    held = {key.removeprefix(prefix): value for key, value in load_state(file).items() if key.startswith(prefix)}
    if not held:
        raise WeightsError(f"{setting}: the run holds no {section.replace('_', ' ')}")
    spec = path / "spec.yaml"
    lora = (yaml.safe_load(spec.read_text(encoding="utf-8")).get(section) or {}).get("lora") if spec.is_file() else None
    return (merged(held, LoRA(**lora)) if lora else held), None


def _fetched(name: str, setting: str) -> Path:
    """The folder of a name on the hub, from its cache where it was fetched before."""
    from huggingface_hub import snapshot_download

    try:
        for file in HUB_FILES:
            folder = Path(snapshot_download(name, allow_patterns=[*HUB_CONFIGS, file]))
            if (folder / file).is_file():
                return folder
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"{setting}: no such file or folder, and the Hugging Face hub did not give it ({reason}); correct the path, "
            "or connect to the network once and check the name"
        ) from error
    raise WeightsError(f"{setting}: the hub has no {' or '.join(HUB_FILES)} under that name; take another")


def _check_told(module: nn.Module, heads: int | None, told: Told, source: str) -> None:
    """Raises WeightsError where a config makes another function of the same tensors.

    1e-12 passes for 1e-6: public files of MAE and ViT name transformers' default, and were trained with the other.
    """
    own = next((layer.heads for layer in module.modules() if isinstance(layer, Attention)), None)
    eps = next((layer.eps for layer in module.modules() if isinstance(layer, nn.LayerNorm)), None)
    if own is not None and heads is not None and heads != own:
        raise WeightsError(f"weights {source}: made with {heads} attention heads, and the model has {own}; set heads")
    if own is None or eps is None:
        return
    if told.eps is not None and abs(told.eps - eps) > 1e-6:
        raise WeightsError(
            f"weights {source}: made with a LayerNorm epsilon of {told.eps:g}, and the model has {eps:g}; "
            "set encoder.norm_eps"
        )
    if told.activation not in (None, "gelu"):
        raise WeightsError(f"weights {source}: made with the activation {told.activation}, and the model has gelu")


def _own_names(encoder: nn.Module, found: dict[str, Tensor], source: str, told: Told) -> dict[str, Tensor]:
    """The encoder's part of a public file, under the encoder's own names."""
    own = set(encoder.state_dict())
    adopt = getattr(encoder, "adopt", None)
    if adopt is not None and own.isdisjoint(found):
        adopted: dict[str, Tensor] = adopt(one_list_of_blocks(found), source)
        return adopted
    if adopt is None:
        found = from_hub(found)
    if "pos_embed" in found and "pos_embed" not in own:
        _check_positions(encoder, "pos_embed", found, _grid(found, told.image), source)
    return {key: value for key, value in found.items() if key in own or not key.startswith((*NOT_ENCODER, "pos_embed"))}


def _grid(state: dict[str, Tensor], image: tuple[int, int] | None) -> tuple[int, int] | None:
    """(h, w) of the tokens of the image that a file was made for, where that is known."""
    kernel = state.get("patch_embed.proj.weight")
    if image is None or kernel is None or kernel.ndim != 4:
        return None
    return image[0] // kernel.shape[2], image[1] // kernel.shape[3]


def _resized(
    encoder: nn.Module, state: dict[str, Tensor], source: str, image: tuple[int, int] | None
) -> dict[str, Tensor]:
    """The kernel of another patch, and a learned table of another grid, as the encoder has them."""
    fitted, grid = dict(state), _grid(state, image)
    name, kernel = "patch_embed.proj.weight", state.get("patch_embed.proj.weight")
    layer = getattr(getattr(encoder, "patch_embed", None), "proj", None)
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == layer.stride != (1, 1) and kernel is not None:
        size = (layer.kernel_size[0], layer.kernel_size[1])
        if kernel.ndim == 4 and kernel.shape[2:] != size:
            made_for = " x ".join(str(side) for side in kernel.shape[2:])
            warnings.warn(
                f"weights {source}: the kernel for patches of {made_for} pixels was resized to {size[0]} x {size[1]}",
                stacklevel=3,
            )
            fitted[name] = resize_kernel(kernel, size)
    table, own_grid = state.get("pos_embed"), getattr(encoder, "position_grid", None)
    if getattr(encoder, "pos_embed", None) is None or table is None or own_grid is None or table.ndim != 3:
        return fitted
    side = math.isqrt(table.shape[1])
    for h, w in [*([grid] if grid else []), own_grid, (side, side)]:
        single = table.shape[1] - h * w
        if single in (0, 1):
            # A table without a row for the class token adds nothing to it.
            first = table[:, :1] if single else torch.zeros_like(table[:, :1])
            fitted["pos_embed"] = torch.cat([first, resample_positions(table[:, single:], (h, w), own_grid)], 1)
            break
    return fitted


def fold_to_gray(
    encoder: nn.Module,
    state: dict[str, Tensor],
    made_with: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
) -> dict[str, Tensor]:
    """The first convolution's RGB kernel as one channel: the same output for gray images.

    With RGB images normalised by (m_c, s_c) and gray ones by (m, s): w' = s sum_c w_c / s_c, and the bias gains
    sum_c (m - m_c) / s_c sum_ij w_c; where the layer has no bias, the shift is left out when it is zero and
    refused otherwise. RGB means and deviations are those that weights were `made_with`, the encoder's `colours`, or
    ImageNet's.
    """
    first = next((name for name, layer in encoder.named_modules() if isinstance(layer, nn.Conv2d)), None)
    weight, bias = f"{first}.weight", f"{first}.bias"
    kernel = state.get(weight)
    if first is None or kernel is None or kernel.ndim != 4 or kernel.shape[1] != 3:
        return state
    layer = encoder.get_submodule(first)
    if not isinstance(layer, nn.Conv2d) or layer.in_channels != 1:
        return state
    mean, std = float(getattr(encoder, "mean", (0.5,))[0]), float(getattr(encoder, "std", (0.5,))[0])
    colours = made_with or getattr(encoder, "colours", None) or (IMAGENET_MEAN, IMAGENET_STD)
    means, stds = (torch.tensor(numbers).expand(3) for numbers in colours)
    folded = dict(state)
    folded[weight] = std * (kernel / stds[:, None, None]).sum(1, keepdim=True)
    shift = ((mean - means) / stds * kernel.sum((2, 3))).sum(1)
    if bias in state:
        folded[bias] = state[bias] + shift
    elif layer.bias is None and float(shift.abs().max()) > 1e-6:
        raise WeightsError(
            f"encoder.weights: {first} has no bias to take up the change of normalisation; set channels: 3"
        )
    return folded


def _check_positions(
    module: nn.Module, name: str, state: dict[str, Tensor], grid: tuple[int, int] | None, source: str
) -> None:
    """Raises WeightsError unless a table (1, N or 1 + N, D) is the fixed one that the module computes itself."""
    rows = state[name].reshape(-1, state[name].shape[-1]).float()
    (N, D), side = rows.shape, math.isqrt(len(rows))
    h, w = grid if grid is not None and N - math.prod(grid) in (0, 1) else (side, side)
    single, patches = rows.split([N - h * w, h * w])
    grids = (None, getattr(module, "position_grid", None))
    tables = [sincos_positions(D, h, w, rows.device, made_for)[0] for made_for in grids] if D % 4 == 0 else []
    near = any((patches - fixed).abs().max() < 1e-3 for fixed in tables)
    if len(single) > 1 or (single.abs() > 1e-3).any() or not near:
        cure = "set encoder.positions: learned" if name == "pos_embed" else "take another decoder"
        raise WeightsError(
            f"weights {source}: {name} {tuple(state[name].shape)} holds learned positions, and the model has fixed "
            f"2-D sin-cos ones; {cure}"
        )


def _pointwise(a: torch.Size, b: torch.Size) -> bool:
    return (*a, 1, 1) == tuple(b) or (*b, 1, 1) == tuple(a)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
