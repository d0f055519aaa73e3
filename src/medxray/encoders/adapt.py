"""Any module as an encoder."""

import torch
from torch import Tensor, nn

from medxray.encoders import Encoder, tried
from medxray.types import Features, SpecError


def features_from(output: Features | Tensor) -> Features:
    """A map (B, D, h, w), tokens (B, N, D) or one vector (B, D) as Features; pooled is the mean over tokens."""
    if isinstance(output, Features):
        return output
    if not isinstance(output, Tensor) or output.ndim not in (2, 3, 4):
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise SpecError(
            f"encoder: expected a map (B, D, h, w), tokens (B, N, D), a vector (B, D) or Features, found {found}"
        )
    if output.ndim == 2:
        return Features(output[:, None], (1, 1), output)
    if output.ndim == 3:
        return Features(output, None, output.mean(1))
    tokens = output.flatten(2).transpose(1, 2)
    return Features(tokens, (output.shape[2], output.shape[3]), tokens.mean(1))


def grid_of(tokens: int, height: int, width: int, stride: int) -> tuple[int, int] | None:
    """(h, w) of so many tokens of an image, whether its last incomplete ones were dropped or padded."""
    for h, w in ((height // stride, width // stride), (-(-height // stride), -(-width // stride))):
        if h * w == tokens:
            return h, w
    return None


def try_out(encoder: Encoder, height: int, width: int) -> Features:
    """One pass over a black image, in evaluation.

    Parameters that have no part in the tokens, such as a head's norm or a mask token, are set not to be trained.
    """
    training = encoder.training
    with torch.enable_grad():
        features: Features = encoder.eval()(torch.zeros(1, encoder.channels, height, width))
        parameters = list(encoder.parameters())
        gradients = torch.autograd.grad(features.tokens.sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)
    encoder.train(training)
    return Features(features.tokens.detach(), features.grid, features.pooled.detach())


class ModuleEncoder(Encoder):
    """Wraps a plain module; what it does not declare is found by one pass over a black image."""

    def __init__(self, module: nn.Module, height: int, width: int) -> None:
        super().__init__()
        self.module = module
        self.channels = int(getattr(module, "channels", 0) or _channels(module))
        self.mean = tuple(getattr(module, "mean", (0.5,)))
        self.std = tuple(getattr(module, "std", (0.5,)))
        self.train(module.training)
        features = tried(self, height, width, name=type(module).__name__)
        self.width = features.tokens.shape[-1]
        self.stride = height // features.grid[0] if features.grid else height

    def forward(self, images: Tensor) -> Features:
        return features_from(self.module(images))


class GivenEncoder(Encoder):
    """Stands in a spec for a module that was handed to `build`; it cannot be built from the spec alone."""

    def __init__(self) -> None:
        raise ValueError("this pipeline was built with a module; hand it over again: load(folder, encoder=module)")

    def forward(self, images: Tensor) -> Features:
        """Never reached."""
        raise AssertionError


def as_encoder(module: nn.Module, image_size: int | list[int]) -> Encoder:
    """The module itself if it is an Encoder, else wrapped."""
    if isinstance(module, Encoder):
        return module
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return ModuleEncoder(module, height, width)


def _channels(module: nn.Module) -> int:
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            return layer.in_channels
    return 1
