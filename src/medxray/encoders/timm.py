"""Any image model of timm as an encoder."""

import math
import sys
from typing import Annotated, Any

import timm
import torch
from pydantic import Field
from torch import Tensor, nn

from medxray.encoders import Encoder
from medxray.encoders.adapt import Coloured, features_from, grid_of, try_out
from medxray.registry import nearest
from medxray.types import Features, SpecError, WeightsError
from medxray.weights import IMAGENET_MEAN, IMAGENET_STD, NOT_ENCODER

# Names that are places, not architectures of this timm.
PLACES = ("hf-hub:", "hf_hub:", "local-dir:")


class TimmEncoder(Encoder):
    """A model of timm without its head: its last map or its patch tokens. Pooled is the mean of the tokens.

    Public weights for colour images take gray ones exactly: as if these had been saved in colour.

    Args:
        model: its name in timm, with the tag of its weights where wanted (resnet18.a1_in1k), or local-dir:FOLDER.
        pretrained: take its public weights, and their normalisation; they are downloaded once.
        channels: C of the images; timm itself fits public weights to numbers other than 1 and 3.
        image_size: pixels a side, for models whose size is fixed when they are built.
        arguments: more settings of the model, as timm names them: {patch_size: 16}.
        mean: of the images that the weights were made for, a number a colour or one for all, with `std`; by default
            the model's own in timm, or 0.5 for gray images without public weights.
        std: the deviation that goes with `mean`.

    Raises:
        SpecError: no such model, or not one that takes these settings.
        WeightsError: public weights that cannot be fetched or do not exist.
    """

    def __init__(
        self,
        model: str = "resnet18",
        pretrained: bool = False,
        channels: Annotated[int, Field(gt=0)] = 1,
        image_size: Annotated[int, Field(gt=0)] | None = None,
        arguments: dict[str, Any] | None = None,
        mean: Annotated[list[float], Field(min_length=1)] | None = None,
        std: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)] | None = None,
    ) -> None:
        super().__init__()
        if (mean is None) != (std is None):
            raise ValueError("mean and std belong together; give both or neither")
        self.name, self.channels = model, channels
        coloured = pretrained and channels == 1
        self.model: Any
        # On the meta device there are no numbers to fetch.
        pretrained = pretrained and torch.get_default_device().type != "meta"
        self.model = _create(model, pretrained, 3 if coloured else channels, image_size, arguments or {})
        self.width = int(getattr(self.model, "num_features", 0))
        self.stride = _stride(model, self.model)
        self.prefix = int(getattr(self.model, "num_prefix_tokens", 0))
        own = self.model.pretrained_cfg
        self.colours = (
            tuple(map(float, mean or own.get("mean") or IMAGENET_MEAN)),
            tuple(map(float, std or own.get("std") or IMAGENET_STD)),
        )
        for name, numbers in zip(("mean", "std"), self.colours, strict=True):
            if len(numbers) not in (1, 3, channels):
                raise ValueError(f"{name} has {len(numbers)} numbers; give one, three or {channels}")
        self.colour = Coloured(*self.colours, 3) if coloured else None
        if pretrained or mean is not None or channels == 3:
            self.mean, self.std = (
                numbers if len(numbers) in (1, channels) else (sum(numbers) / len(numbers),)
                for numbers in self.colours
            )
        height, width = own.get("input_size", (3, 224, 224))[1:]
        self.size = (image_size or int(height), image_size or int(width))
        tokens, _, grid = try_out(self, *self.size)
        if grid is None:
            raise SpecError(
                f"encoder.model: {model!r} of timm gives {tokens} tokens for {self.size[0]} x {self.size[1]} pixels, "
                f"which are not a map of {self.stride} pixels a token; take another model"
            )

    def forward(self, images: Tensor) -> Features:
        if self.colour is not None:
            images = self.colour(images)
        size = (images.shape[2], images.shape[3])
        try:
            output = self.model.forward_features(images)
        except (AssertionError, RuntimeError) as error:
            # What timm checks by assertion is the size. Elsewhere a wrong one shows as shapes that don't match.
            other = isinstance(error, RuntimeError) and "size" not in str(error) and "shape" not in str(error)
            if other or size == self.size or isinstance(error, torch.OutOfMemoryError):
                raise
            raise SpecError(
                f"encoder {self.name!r} of timm does not take images of {size[0]} x {size[1]}: {error}; change "
                f"data.image_size, or set encoder.image_size to it; its own size is {self.size[0]} x {self.size[1]}"
            ) from error
        if not isinstance(output, Tensor) or output.ndim not in (3, 4):
            raise SpecError(
                f"encoder {self.name!r} of timm gives no single map or sequence of tokens; take another model"
            )
        if output.ndim == 4:
            channels_last = output.shape[1] != self.width or str(getattr(self.model, "output_fmt", "")).endswith("NHWC")
            return features_from(output.permute(0, 3, 1, 2) if channels_last else output)
        tokens = output[:, self.prefix :]
        return Features(tokens, grid_of(tokens.shape[1], *size, self.stride), tokens.mean(1))

    def adopt(self, state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
        """The tensors of a public file under this encoder's names, by timm's own rules for the kind of model.

        Raises:
            WeightsError: patches or rotary positions that are not the model's, or a file that timm cannot convert.
        """
        _check_patch(self.model, state, source)
        _check_rotation(self.model, state, source)
        convert = getattr(sys.modules[type(self.model).__module__], "checkpoint_filter_fn", None)
        if convert is not None:
            try:
                state = convert(dict(state), self.model)
            except Exception as error:
                raise WeightsError(
                    f"weights {source}: timm cannot convert them for {self.name!r} ({type(error).__name__}: {error}); "
                    "name the model that they were made for"
                ) from error
        own, heads = self.model.state_dict(), self.model.pretrained_cfg.get("classifier") or ()
        heads = (heads,) if isinstance(heads, str) else heads
        left_out = (*NOT_ENCODER, *(f"{head}." for head in heads))
        return {f"model.{key}": value for key, value in state.items() if key in own or not key.startswith(left_out)}

    def gradient_checkpointing_enable(self, options: dict[str, Any] | None = None) -> None:
        """Recomputes activations to save memory.

        Raises:
            SpecError: the model does not offer it.
        """
        try:
            self.model.set_grad_checkpointing(True)
        except (AssertionError, AttributeError) as error:
            raise SpecError(f"training.gradient_checkpointing: timm's {self.name!r} does not offer it") from error


def _create(
    name: str, pretrained: bool, channels: int, image_size: int | None, arguments: dict[str, Any]
) -> nn.Module:
    architecture = name.split(".")[0]
    if not name.startswith(PLACES) and not timm.is_model(architecture):
        raise SpecError(
            f"encoder.model: timm has no model {name!r}{nearest(architecture, timm.list_models())}; "
            f"timm.list_models() lists all of them"
        )
    settings = {"pretrained": pretrained, "num_classes": 0, "in_chans": channels}
    if taken := {*settings, "img_size"} & set(arguments):
        raise ValueError(
            f"arguments: {', '.join(sorted(taken))} cannot be given there; use encoder.pretrained, encoder.channels "
            "and encoder.image_size (there is no classifier)"
        )
    # Models that can take images of any size, or that are built for one, each say so by accepting the argument.
    optional = [{"img_size": image_size}] if image_size is not None else [{"dynamic_img_size": True}, {}]
    for more in optional:
        try:
            model: nn.Module = timm.create_model(name, **settings, **{**more, **arguments})
            return model
        except TypeError as error:
            if more is optional[-1]:
                named = [key for key in arguments if f"'{key}'" in str(error)]
                setting = f"arguments.{named[0]}" if named else "channels" if image_size is None else "image_size"
                raise SpecError(f"encoder.model: {name!r} of timm does not take {setting}: {error}") from error
        except Exception as error:
            if not pretrained and not name.startswith(PLACES):
                raise SpecError(f"encoder.model: timm cannot build {name!r} with these settings: {error}") from error
            known = timm.list_pretrained(f"{architecture}*")
            raise WeightsError(
                f"encoder.model: the public weights of {name!r} could not be had ({str(error).partition(chr(10))[0]}); "
                "go online once, or set encoder.pretrained: false and name a file by encoder.weights"
                + (f"; timm names weights for {', '.join(known[:5])}" if known else "")
            ) from error
    raise AssertionError


def _stride(name: str, model: nn.Module) -> int:
    """Pixels a side of a token, as the model's own table of features says, or its patch."""
    info = getattr(model, "feature_info", None)
    try:
        return int(info[-1]["reduction"])  # type: ignore[index]
    except (TypeError, KeyError, IndexError) as error:
        patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
        patch = patch[0] if isinstance(patch, tuple) else patch
        if isinstance(patch, int):
            return patch
        raise SpecError(
            f"encoder.model: {name!r} of timm does not say how many pixels a token stands for; take another model"
        ) from error


def _check_patch(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """timm would resample the kernel of another patch, and the model would no longer be that of the file."""
    kernel = getattr(getattr(getattr(model, "patch_embed", None), "proj", None), "weight", None)
    found = next((tensor for key, tensor in state.items() if key.endswith("patch_embed.proj.weight")), None)
    if kernel is None or found is None or found.ndim != 4 or found.shape[2:] == kernel.shape[2:]:
        return
    raise WeightsError(
        f"weights {source}: made for patches of {found.shape[2]} x {found.shape[3]} pixels, and the model has "
        f"{kernel.shape[2]} x {kernel.shape[3]}; set encoder.arguments: {{patch_size: {found.shape[2]}}}"
    )


def _check_rotation(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """timm leaves a file's table of rotary positions (N, D) out, and computes the model's own."""
    table, rotation = state.get("rope.freqs_cos"), getattr(model, "rope", None)
    side = math.isqrt(len(table)) if table is not None else 0
    if table is None or rotation is None or side * side != len(table):
        return
    with torch.no_grad():
        own = rotation.get_embed([side, side])
    if own.shape[-1] != 2 * table.shape[-1] or (own[..., table.shape[-1] :] - table).abs().max() > 1e-3:
        raise WeightsError(
            f"weights {source}: its rotary positions are not the model's; for weights made on a grid of "
            f"{side} x {side} set encoder.arguments: {{ref_feat_shape: [{side}, {side}]}}"
        )
