"""Any module as an encoder."""

import torch
from torch import Tensor, nn

from medxray.encoders import Encoder, tried
from medxray.encoders.shapes import shapes_only
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
    return next((grid for grid in _grids(height, width, stride) if grid[0] * grid[1] == tokens), None)


def _grids(height: int, width: int, stride: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(h, w) where the last incomplete tokens are dropped, and where they are padded."""
    return (height // stride, width // stride), (-(-height // stride), -(-width // stride))


def stride_of(tokens: int | tuple[int, int], height: int, width: int) -> int | None:
    """Pixels a token, from so many tokens or a grid; None where no stride gives them.

    Where several do, a power of two is meant, or else the one that divides the height.
    """

    def fits(stride: int) -> bool:
        return any(grid == tokens or grid[0] * grid[1] == tokens for grid in _grids(height, width, stride))

    found = [stride for stride in range(1, max(height, width) + 1) if fits(stride)]
    return min(found, key=lambda stride: (stride.bit_count() > 1, height % stride), default=None)


def try_out(encoder: Encoder, height: int, width: int) -> tuple[int, int, tuple[int, int] | None]:
    """N, D and the grid of the tokens of one image, from its shape alone where that is possible.

    Parameters that have no part in the tokens, such as a head's norm or a mask token, are set not to be trained.
    """
    try:
        with shapes_only(encoder) as copy:
            features, used = _parts_of_tokens(copy, height, width)
    except Exception:
        # What fails without numbers is tried with them; then errors are the encoder's own.
        features, used = _parts_of_tokens(encoder, height, width)
    for parameter, has_part in zip(_trained(encoder), used, strict=True):
        parameter.requires_grad_(has_part)
    return features.tokens.shape[1], features.tokens.shape[2], features.grid


def _parts_of_tokens(encoder: Encoder, height: int, width: int) -> tuple[Features, list[bool]]:
    training = encoder.training
    try:
        with torch.enable_grad():
            features: Features = encoder.eval()(torch.zeros(1, encoder.channels, height, width))
            gradients = torch.autograd.grad(features.tokens.sum(), _trained(encoder), allow_unused=True)
    finally:
        encoder.train(training)
    return features, [gradient is not None for gradient in gradients]


def _trained(encoder: Encoder) -> list[nn.Parameter]:
    return [parameter for parameter in encoder.parameters() if parameter.requires_grad]


class Coloured(nn.Module):
    """Gray images as the colour images that a model was made for.

    Attributes:
        mean, std: normalisation of the gray pixels: the means over the colours.
    """

    gain: Tensor
    shift: Tensor

    def __init__(self, means: tuple[float, ...], stds: tuple[float, ...], channels: int) -> None:
        super().__init__()
        self.mean, self.std = (sum(means) / len(means),), (sum(stds) / len(stds),)
        m, s = (torch.tensor(numbers).expand(channels).view(-1, 1, 1) for numbers in (means, stds))
        self.register_buffer("gain", self.std[0] / s, persistent=False)
        self.register_buffer("shift", (self.mean[0] - m) / s, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, H, W) -> (B, C, H, W), exactly what a gray image saved in colour would be."""
        return images * self.gain + self.shift


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
