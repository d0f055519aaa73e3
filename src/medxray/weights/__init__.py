"""Reading checkpoints, ours and others', without running what is in them.

What is known of other projects' files stands in `families`. An encoder over another library has a method
`adopt(state, source)`: the tensors of a public file under its own names, without those that it has no place for.
"""

import argparse
import hashlib
import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from medxray.layers import sincos_positions
from medxray.types import WeightsError
from medxray.weights.families import one_list_of_blocks

SHOWN = 5
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Where a file holds a model and its moving average, or a student and its teacher, each project evaluates the named one.
WRAPPERS = ("model", "state_dict", "teacher", "student", "module", "model_ema")
PREFIXES = ("module.", "backbone.", "_orig_mod.")
# Parts of public checkpoints that an encoder does not have: MAE's decoder, classifiers, heads of self-supervision,
# other projects' extras.
NOT_ENCODER = (
    "decoder_", "decoder.", "mask_token", "head.", "head_dist.", "fc.", "fc_norm.", "classifier.", "pooler.",
    "projector.", "retriever.", "dino_head.", "ibot_head.", "lm_head.",
)  # fmt: skip
# Plain values that training scripts leave beside the tensors. numpy's have two names, of its version 1 and of 2.
_SCALAR = np.float64(0).__reduce__()[0]
PLAIN: list[Any] = [
    argparse.Namespace, (_SCALAR, "numpy.core.multiarray.scalar"), (_SCALAR, "numpy._core.multiarray.scalar"), np.dtype,
    *{type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")},
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
    """Loads an encoder from a medxray run folder or a checkpoint file: every tensor of the encoder, or an error.

    From other projects' files decoders, heads and fixed position tables are left out; RGB kernels are folded for an
    encoder of one channel, exactly for gray images but for a border that the layer pads.

    Raises:
        WeightsError: with the reason and the cure.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        file = path / "model.safetensors"
        if not file.is_file():
            raise WeightsError(f"encoder.weights {source!r}: the folder has no model.safetensors; fit that run first")
        state = {
            key.removeprefix("encoder."): value for key, value in load_state(file).items() if key.startswith("encoder.")
        }
        if not state:
            raise WeightsError(f"encoder.weights {source!r}: the run holds no encoder")
    elif path.is_file():
        state = fold_to_gray(encoder, _own_names(encoder, load_state(path), source))
    else:
        raise WeightsError(
            f"encoder.weights {source!r}: no such file or folder; give a checkpoint, or the run folder of a fit"
        )
    load_into(encoder, state, source)


def _own_names(encoder: nn.Module, found: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """The encoder's part of a file, under the encoder's own names."""
    own = set(encoder.state_dict())
    adopt = getattr(encoder, "adopt", None)
    if adopt is not None and own.isdisjoint(found):
        adopted: dict[str, Tensor] = adopt(one_list_of_blocks(found), source)
        return adopted
    if "pos_embed" in found and "pos_embed" not in own:
        _check_positions(found["pos_embed"], source)
    return {key: value for key, value in found.items() if key in own or not key.startswith((*NOT_ENCODER, "pos_embed"))}


def fold_to_gray(encoder: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first convolution's RGB kernel as one channel: the same output for gray images.

    With RGB images normalised by (m_c, s_c) and gray ones by (m, s): w' = s sum_c w_c / s_c, and the bias gains
    sum_c (m - m_c) / s_c sum_ij w_c; where the layer has no bias, the shift is left out when it is zero and
    refused otherwise. RGB means and deviations are the encoder's `colours`, or ImageNet's.
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
    colours = getattr(encoder, "colours", (IMAGENET_MEAN, IMAGENET_STD))
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


def _check_positions(table: Tensor, source: str) -> None:
    """Raises WeightsError unless a table (1, N or 1 + N, D) is the fixed one that the encoder computes itself."""
    N, D = table.shape[-2], table.shape[-1]
    side = math.isqrt(N)
    patches = table.reshape(-1, D)[-(side**2) :].float()
    if D % 4 or N - side**2 > 1 or (patches - sincos_positions(D, side, side, patches.device)[0]).abs().max() > 1e-3:
        raise WeightsError(
            f"weights {source}: pos_embed {tuple(table.shape)} holds learned positions, and the encoder has fixed "
            "2-D sin-cos ones; take one that has its own table, such as {name: timm, model: vit_base_patch16_224}"
        )


def _pointwise(a: torch.Size, b: torch.Size) -> bool:
    return (*a, 1, 1) == tuple(b) or (*b, 1, 1) == tuple(a)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
