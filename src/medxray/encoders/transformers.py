"""Any vision model of transformers as an encoder."""

import copy
import functools
import inspect
import math
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, ViTModel
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import logging

from medxray.encoders import Encoder
from medxray.encoders.adapt import Coloured, features_from, grid_of, stride_of, try_out
from medxray.registry import nearest
from medxray.types import Features, SpecError, WeightsError
from medxray.weights import IMAGENET_MEAN, IMAGENET_STD, NOT_ENCODER, refuse
from medxray.weights.architectures import config_of, read_config, without_kernels
from medxray.weights.families import to_hub
from medxray.weights.writing import write_preprocessor

SMALL: dict[str, Any] = {
    "model_type": "swin",
    "image_size": 128,
    "embed_dim": 32,
    "depths": [2, 2, 2],
    "num_heads": [2, 4, 8],
    "window_size": 4,
    "drop_path_rate": 0.0,
}
"""The Swin Transformer that is built where neither model nor config is given: 16 pixels a token, width 128."""

SINGLE_TOKENS = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
"""Parameters of tokens that stand before those of the map."""


class TransformersEncoder(Encoder):
    """A vision model of transformers; pooled is the mean of the tokens, class and register tokens left out.

    For Swin the tokens are normalised last, so that pooled is what R2GenGPT uses. A model of three channels takes
    gray images, normalised channel by channel inside, where `channels` is 1.

    Args:
        model: a local folder or a name on the Hugging Face hub; its weights are taken. No code of it is run.
        config: settings of a model to build from nothing, with `model_type`: {model_type: vit, hidden_size: 192}.
        channels: C of the images; by default what the model was made for, 1 where a config does not say.
    """

    def __init__(
        self,
        model: str | None = None,
        config: dict[str, Any] | None = None,
        channels: Annotated[int, Field(gt=0)] | None = None,
    ) -> None:
        super().__init__()
        self.model: Any
        if model is not None and config is not None:
            raise ValueError("model and config were both given; model brings its own config, so leave one out")
        if model is not None:
            self.model = _load(model)
            own = int(getattr(self.model.config, "num_channels", 3))
            means, stds = _normalisation(model, own)
        else:
            self.model = _build({**(SMALL if config is None else config)}, channels)
            own = int(getattr(self.model.config, "num_channels", 3))
            means, stds = (IMAGENET_MEAN, IMAGENET_STD) if own == 3 else ((0.5,), (0.5,))
        self.channels = own if channels is None else channels
        if self.channels not in (own, 1):
            raise ValueError(f"channels is {channels}, but {model or 'the config'} takes {own}; set it to {own} or 1")
        self.colour = Coloured(means, stds, own) if self.channels != own else None
        self.mean, self.std = (means, stds) if self.colour is None else (self.colour.mean, self.colour.std)
        layer: Any
        for layer in self.model.modules():
            if hasattr(layer, "set_shift_and_window_size"):
                rule = functools.partial(_set_shift, layer, int(layer.window_size), int(layer.shift_size))
                layer.set_shift_and_window_size = rule
        self.options = (
            {"interpolate_pos_encoding": True}
            if "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters
            else {}
        )
        self.leading = 0
        size = getattr(self.model.config, "image_size", None) or 224
        height, width = (size, size) if isinstance(size, int) else size
        self.size = (int(height), int(width))
        self._measure()

    def forward(self, images: Tensor) -> Features:
        if self.colour is not None:
            images = self.colour(images)
        try:
            found = self.model(pixel_values=images, **self.options).last_hidden_state
        except (AssertionError, RuntimeError, ValueError) as error:
            size = (images.shape[2], images.shape[3])
            if size == self.size or isinstance(error, torch.OutOfMemoryError):
                raise
            raise SpecError(
                f"data.image_size: {size[0]} x {size[1]} does not go through the {self.model.config.model_type} "
                f"encoder ({error}); its own size is {self.size[0]} x {self.size[1]}"
            ) from error
        if found.ndim != 3:
            return features_from(found)
        tokens = found[:, self.leading :]
        return Features(
            tokens, grid_of(tokens.shape[1], images.shape[2], images.shape[3], self.stride), tokens.mean(1)
        )

    def adopt(self, state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
        """The tensors of a public file under this encoder's names: renamed to those of the hub where they are a
        project's own, then read as transformers reads the hub's files.

        Raises:
            WeightsError: tensors that are missing or left over, or shapes that disagree.
        """
        config = self.model.config
        state = to_hub(state, config.model_type)
        model, found = _read(type(self.model), None, config=config, state_dict=state, ignore_mismatched_sizes=True)
        wrong = {name: shapes for name, *shapes in found["mismatched_keys"]}
        if wrong and self.channels == 1 and getattr(config, "num_channels", None) == 1:
            # The kernel may be one for colour images, to be folded afterwards.
            config = copy.deepcopy(config)
            config.num_channels = 3
            model, found = _read(type(self.model), None, config=config, state_dict=state, ignore_mismatched_sizes=True)
            wrong = {name: shapes for name, *shapes in found["mismatched_keys"]}
        left = [key for key in sorted(found["unexpected_keys"]) if not key.startswith(NOT_ENCODER)]
        disagree = [f"{key} is {tuple(a)} in the file and {tuple(b)} in the model" for key, (a, b) in wrong.items()]
        refuse(source, type(self.model).__name__, sorted(found["missing_keys"]), left, disagree)
        return {f"model.{key}": value for key, value in model.state_dict().items()}

    def save(self, folder: Path) -> None:
        """Writes the model as `AutoModel.from_pretrained` reads it, with how its images are normalised."""
        means, stds = self.mean, self.std
        if self.colour is not None:
            stds = tuple((self.std[0] / self.colour.gain).flatten().tolist())
            means = tuple(self.mean[0] - s * shift for s, shift in zip(stds, self.colour.shift.flatten().tolist(), strict=True))
        self.model.save_pretrained(folder)
        write_preprocessor(folder, self.size, means, stds)

    def _measure(self) -> None:
        """Finds the tokens' width, the pixels that each stands for, and how many stand before those of the map."""
        self.stride = 1
        count, self.width, grid = try_out(self, *self.size)
        if grid is not None:
            self.stride = stride_of(grid, *self.size) or math.ceil(self.size[0] / grid[0])
            return
        single = sum(
            parameter.shape[-2] if parameter.ndim > 1 else 1
            for name, parameter in self.model.named_parameters()
            if name.rsplit(".", 1)[-1] in SINGLE_TOKENS
        )
        # Such a parameter may also serve a head alone, and a pooled token may have none.
        for leading in dict.fromkeys((single, 0, 1)):
            stride = stride_of(count - leading, *self.size)
            if stride is not None:
                self.leading, self.stride = leading, stride
                if leading:
                    # Of parameters, some may have had a part in those tokens alone.
                    try_out(self, *self.size)
                return
        raise SpecError(
            f"encoder: {self.model.config.model_type!r} of transformers gives {count} tokens for "
            f"{self.size[0]} x {self.size[1]} pixels, which are not a map; take another model"
        )


def _load(name: str) -> nn.Module:
    looks_local = name.startswith((".", "~", "/")) or name.count("/") > 1
    path = Path(name).expanduser()
    if looks_local and not path.is_dir():
        raise WeightsError(
            f"encoder.model {name!r}: no such folder; give the folder of a saved model (with config.json and "
            "model.safetensors), or a name on the Hugging Face hub such as microsoft/swin-base-patch4-window7-224"
        )
    source = str(path) if path.is_dir() else name
    if torch.get_default_device().type == "meta":
        made = AutoModel.from_config(config_of(source, "encoder.model", path if path.is_dir() else None))
        return _vision(made, f"model {name!r}")
    try:
        kind = read_config(source).model_type
        # MAE's own class hides a random share of each image; its encoder is the plain ViT.
        reader = ViTModel if kind == "vit_mae" else AutoModel
        model, found = _read(reader, source, trust_remote_code=False, dtype=torch.float32)
    # A hub, a config and a model: each has errors of its own.
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(
            f"encoder.model {name!r} could not be loaded: {reason} Give a folder with config.json and "
            "model.safetensors, of an architecture that transformers has, since a model's own code is never run; or connect to "
            "the network once and check the name on the Hugging Face hub"
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise WeightsError(
            f"encoder.model {name!r}: its weights lack {len(missing)} tensors of {type(model).__name__} "
            f"({', '.join(missing[:3])}); take a whole checkpoint"
        )
    return _vision(model, f"model {name!r}")


def _read(reader: Any, source: str | None, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A model, and what transformers says of its tensors: missing, left over, of another shape."""
    told, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        try:
            found = reader.from_pretrained(source, output_loading_info=True, add_pooling_layer=False, **options)
        except TypeError:
            # Only some models have a pooling layer to leave out.
            found = reader.from_pretrained(source, output_loading_info=True, **options)
    finally:
        logging.set_verbosity(told)
        if bars:
            logging.enable_progress_bar()
    model: nn.Module = found[0].eval()
    return model, found[1]


def _build(config: dict[str, Any], channels: int | None) -> nn.Module:
    kind = config.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        known = list(CONFIG_MAPPING.keys())
        raise ValueError(
            f"config.model_type: expected a model type of transformers such as swin, vit or convnext, "
            f"found {kind!r}{nearest(str(kind), known)}"
        )
    if kind == "vit_mae":
        raise ValueError("config.model_type 'vit_mae' hides a random share of each image; its encoder is 'vit'")
    default = AutoConfig.for_model(kind)
    names = {*default.to_dict(), *getattr(default, "attribute_map", {})}
    for key in config:
        if key not in names:
            raise ValueError(f"config.{key}: unknown setting of {kind!r}{nearest(key, names)}")
    if "num_channels" in names:
        config.setdefault("num_channels", channels or 1)
    try:
        made = without_kernels(AutoConfig.for_model(kind, **config))
        try:
            model: nn.Module = AutoModel.from_config(made, add_pooling_layer=False)
        except TypeError:
            model = AutoModel.from_config(made)
    except Exception as error:
        raise ValueError(f"config: transformers cannot build a {kind!r} from it: {error}") from error
    return _vision(model, f"config with model_type {kind!r}")


def _vision(model: nn.Module, what: str) -> nn.Module:
    if getattr(model, "main_input_name", None) != "pixel_values":
        raise SpecError(
            f"encoder.{what} is not a vision model: {type(model).__name__} takes "
            f"{getattr(model, 'main_input_name', 'something else')}, expected pixel_values; "
            "take one such as swin, vit, dinov2 or convnext"
        )
    needs = [
        name
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if name != "pixel_values" and parameter.default is parameter.empty and parameter.kind < parameter.VAR_POSITIONAL
    ]
    if needs:
        raise SpecError(
            f"encoder.{what}: {type(model).__name__} needs {', '.join(needs)} beside the image; take another model"
        )
    return model


def _normalisation(name: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of preprocessor_config.json; where it is missing ImageNet's for three channels, else 0.5."""
    try:
        found, _ = ImageProcessingMixin.get_image_processor_dict(str(Path(name).expanduser()))
    except (OSError, ValueError):
        found = {}
    if found.get("do_normalize") is False:
        return (0.0,), (1.0,)
    if found.get("image_mean") is not None and found.get("image_std") is not None:
        means, stds = (
            tuple(float(n) for n in (value if isinstance(value, list | tuple) else [value]))
            for value in (found["image_mean"], found["image_std"])
        )
        if len(means) in (1, channels) and len(stds) in (1, channels):
            return means, stds
    return (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,), (0.5,))


def _set_shift(layer: Any, window: int, shift: int, resolution: tuple[int, int]) -> None:
    """Swin's rule, but the window keeps its size: transformers shrinks it for good and then lacks its table of
    positions. Maps smaller than a window are padded to one."""
    layer.window_size = window
    layer.shift_size = 0 if min(resolution) <= window else shift
