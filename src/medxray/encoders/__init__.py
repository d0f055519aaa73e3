"""Images -> Features. The base class, its registry, and what every encoder declares."""

from abc import ABC, abstractmethod

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from medxray.adapters import LoRA
from medxray.layers import chosen
from medxray.registry import Registry, Settings
from medxray.types import Features, MedxrayError, SpecError


class Encoder(nn.Module, ABC):
    """Turns images into tokens. Settings are typed keyword arguments of `__init__`.

    Attributes:
        width: D, the width of its tokens and pooled vector.
        stride: pixels of an image side that one token stands for.
        channels: C that `forward` expects.
        mean, std: normalisation of pixels in [0, 1] that its weights were trained with, one number a channel
            or one for all.
    """

    width: int
    stride: int
    channels: int = 1
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)

    @abstractmethod
    def forward(self, images: Tensor) -> Features:
        """images (B, C, H, W) -> Features with tokens (B, N, D), grid and pooled (B, D)."""


class MaskableEncoder(Encoder):
    """An encoder that can encode only some of its tokens, as masked auto-encoding needs.

    Attributes:
        overlapping: True where `embed` lets a token see its neighbours' pixels: masked patches are then blanked
            in the image before it is embedded.
        depth: how many layers `encode_layers` gives.
    """

    overlapping: bool = False
    depth: int = 1

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> tokens (B, N, D), with their positions where those are added, row by row, no class token."""

    def embed_visible(self, images: Tensor, keep: Tensor) -> Tensor:
        """images (B, C, H, W) -> the tokens `keep` (B, n) of `embed` alone, (B, n, D)."""
        return chosen(self.embed(images), keep)

    @abstractmethod
    def encode(self, tokens: Tensor, grid: tuple[int, int], keep: Tensor | None = None) -> Tensor:
        """Embedded tokens (B, n, D) -> (B, 1 + n, D): class token first, normalised last.

        Args:
            tokens: (B, n, D), all of the grid's, row by row, or some of them.
            grid: (h, w) that they come from.
            keep: (B, n), which of the h * w they are; None where they are all.
        """

    def encode_layers(self, tokens: Tensor, grid: tuple[int, int], keep: Tensor | None = None) -> list[Tensor]:
        """As `encode`, after each of `depth` blocks; the last is what `encode` gives."""
        return [self.encode(tokens, grid, keep)]

    @abstractmethod
    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the tokens of an image of height x width pixels."""


class JoinableEncoder(Encoder):
    """An encoder whose last block can take other tokens beside the image's, as fusion with label texts needs."""

    @abstractmethod
    def before_last(self, images: Tensor) -> Features:
        """images (B, C, H, W) -> all tokens that the last block is given (B, n, D), class tokens among them; the grid
        (h, w) is the image's."""

    @abstractmethod
    def last(self, tokens: Tensor, grid: tuple[int, int], beside: Tensor) -> Tensor:
        """The last block over tokens of one image or of several side by side (B, V * n, D), and over others `beside`
        them (B, K, D), which have no place: (B, V * n + K, D), normalised."""


class EncoderSettings(Settings):
    """What a spec may say of any encoder beside its own settings."""

    weights: str | None = Field(
        None,
        description="a run folder of medxray, a checkpoint file, a folder of transformers or timm, or a name on the "
        "Hugging Face hub",
    )
    trainable: bool = Field(True, description="False freezes it; its features are then computed once and cached")
    lora: LoRA | None = Field(
        None, description="train low-rank updates in place of its weights; {} takes those of R2GenGPT's delta alignment"
    )

    @model_validator(mode="after")
    def _learns(self) -> "EncoderSettings":
        if self.lora is not None and not self.trainable:
            raise ValueError("trainable: false freezes all of it and lora trains a part; remove one of the two")
        return self


ENCODERS: Registry[Encoder] = Registry(
    "encoder",
    Encoder,
    {
        "vit": "medxray.encoders.vit:ViT",
        "hd-vit": "medxray.encoders.vit:HDViT",
        "vmamba": "medxray.encoders.vmamba:VMamba",
        "vim": "medxray.encoders.vim:Vim",
        "timm": "medxray.encoders.timm:TimmEncoder",
        "transformers": "medxray.encoders.transformers:TransformersEncoder",
        "module": "medxray.encoders.adapt:GivenEncoder",
    },
    group="medxray.encoders",
    settings=EncoderSettings,
)
register, get, names = ENCODERS.register, ENCODERS.get, ENCODERS.names


@torch.no_grad()
def tried(encoder: Encoder, height: int, width: int, name: str | None = None) -> Features:
    """What an encoder makes of one black image of height x width pixels.

    Raises:
        SpecError: it fails on it.
    """
    name, training = name or type(encoder).__name__, encoder.training
    shape = (1, encoder.channels, height, width)
    device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
    try:
        return encoder.eval()(torch.zeros(shape, device=device))
    except MedxrayError:
        raise
    except Exception as error:
        raise SpecError(
            f"encoder {name} fails on an image {shape}: {error}; correct its forward, or data.image_size"
        ) from error
    finally:
        encoder.train(training)


def freeze(module: nn.Module) -> nn.Module:
    """Stops gradients to every parameter of a module and sets it to evaluation."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module.eval()


__all__ = [
    "ENCODERS",
    "Encoder",
    "EncoderSettings",
    "JoinableEncoder",
    "MaskableEncoder",
    "freeze",
    "get",
    "names",
    "register",
]
