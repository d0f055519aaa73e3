"""Any image model of timm as an encoder."""

from typing import Annotated, Any

import timm
import torch
from pydantic import Field
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from medxray.encoders import Encoder
from medxray.encoders.adapt import features_from, grid_of, try_out
from medxray.registry import nearest
from medxray.types import Features, SpecError, WeightsError

# Names that are places, not architectures of this timm.
PLACES = ("hf-hub:", "hf_hub:", "local-dir:")


class TimmEncoder(Encoder):
    """A model of timm without its head: its last map or its patch tokens. Pooled is the mean of the tokens.

    Args:
        model: its name in timm, with the tag of its weights where wanted (resnet18.a1_in1k), or local-dir:FOLDER.
        pretrained: take its public weights, and their normalisation; they are downloaded once.
        channels: C of the images; timm folds public weights for RGB to any number.
        image_size: pixels a side, for models whose size is fixed when they are built.

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
    ) -> None:
        super().__init__()
        self.name, self.channels = model, channels
        self.model: Any
        self.model = _create(model, pretrained, channels, image_size)
        self.width = int(getattr(self.model, "num_features", 0))
        self.stride = _stride(model, self.model)
        self.prefix = int(getattr(self.model, "num_prefix_tokens", 0))
        if pretrained:
            data = resolve_model_data_config(self.model)
            self.mean, self.std = (
                values if channels == len(values) else (sum(values) / len(values),)
                for values in (tuple(map(float, data["mean"])), tuple(map(float, data["std"])))
            )
        height, width = self.model.pretrained_cfg.get("input_size", (3, 224, 224))[1:]
        try_out(self, image_size or int(height), image_size or int(width))

    def forward(self, images: Tensor) -> Features:
        try:
            output = self.model.forward_features(images)
        except (AssertionError, RuntimeError) as error:
            # What timm checks by assertion is the size. Elsewhere a wrong one shows as shapes that don't match.
            other = isinstance(error, RuntimeError) and "size" not in str(error) and "shape" not in str(error)
            if other or isinstance(error, torch.OutOfMemoryError):
                raise
            raise SpecError(
                f"encoder {self.name!r} of timm does not take images of {images.shape[2]} x {images.shape[3]}: "
                f"{error}; change data.image_size, or set encoder.image_size to it"
            ) from error
        if not isinstance(output, Tensor) or output.ndim not in (3, 4):
            raise SpecError(
                f"encoder {self.name!r} of timm gives no single map or sequence of tokens; take another model"
            )
        if output.ndim == 4:
            channels_last = output.shape[1] != self.width or str(getattr(self.model, "output_fmt", "")).endswith("NHWC")
            return features_from(output.permute(0, 3, 1, 2) if channels_last else output)
        tokens = output[:, self.prefix :]
        grid = grid_of(tokens.shape[1], images.shape[2], images.shape[3], self.stride)
        return Features(tokens, grid, tokens.mean(1))

    def gradient_checkpointing_enable(self, options: dict[str, Any] | None = None) -> None:
        """Recomputes activations to save memory.

        Raises:
            SpecError: the model does not offer it.
        """
        try:
            self.model.set_grad_checkpointing(True)
        except (AssertionError, AttributeError) as error:
            raise SpecError(f"training.gradient_checkpointing: timm's {self.name!r} does not offer it") from error


def _create(name: str, pretrained: bool, channels: int, image_size: int | None) -> nn.Module:
    architecture = name.split(".")[0]
    if not name.startswith(PLACES) and not timm.is_model(architecture):
        raise SpecError(
            f"encoder.model: timm has no model {name!r}{nearest(architecture, timm.list_models())}; "
            f"timm.list_models() lists all of them"
        )
    settings = {"pretrained": pretrained, "num_classes": 0, "in_chans": channels}
    # Models that can take images of any size, or that are built for one, each say so by accepting the argument.
    optional = [{"img_size": image_size}] if image_size is not None else [{"dynamic_img_size": True}, {}]
    for more in optional:
        try:
            model: nn.Module = timm.create_model(name, **settings, **more)
            return model
        except TypeError as error:
            if more is optional[-1]:
                setting = "image_size" if image_size is not None else "channels"
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
