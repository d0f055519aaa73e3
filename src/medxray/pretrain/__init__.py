"""Masked auto-encoding: which tokens stay visible (maskers) and what is predicted from them (pixel decoders)."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from pydantic import Field
from torch import Generator, Tensor, nn

from medxray.registry import Registry, Settings


class Masking(NamedTuple):
    """Which tokens of B images stay visible.

    Attributes:
        keep: (B, n) int64, positions of the visible tokens, in the order in which they are encoded.
        restore: (B, N) int64, for each position its place in the shuffled order: visible ones first.
        mask: (B, N) float32, 1 where masked.
    """

    keep: Tensor
    restore: Tensor
    mask: Tensor


class Masker(ABC):
    """Chooses the visible tokens of a batch on its device, with the same exact count for every image."""

    @abstractmethod
    def __call__(
        self, regions: Tensor | None, batch: int, grid: tuple[int, int], generator: Generator | Tensor | None
    ) -> Masking:
        """Args:
        regions: (B, h, w) coverage of each token by the chest in [0, 1], or None.
        batch: B.
        grid: (h, w).
        generator: a torch generator, or (B,) int64 seeds, one an image: then a mask depends neither on
            its neighbours in the batch nor on the number of processes.
        """


class PixelDecoder(nn.Module, ABC):
    """Predicts pixels from visible tokens. Takes (width, patch_pixels) from the encoder."""

    @abstractmethod
    def forward(self, encoded: Tensor, restore: Tensor, grid: tuple[int, int]) -> Tensor:
        """encoded (B, 1 + n, D), restore (B, N) -> predicted patches (B, N, patch * patch * C)."""


class PixelDecoderSettings(Settings):
    """What a spec may say of any pixel decoder beside its own settings."""

    normalize_patches: bool = Field(
        False, description="each patch is predicted with its own mean taken off and divided by its deviation"
    )


MASKERS: Registry[Masker] = Registry(
    "masker",
    Masker,
    {
        "random": "medxray.pretrain.maskers:RandomMasker",
        "rectangle": "medxray.pretrain.maskers:RectangleMasker",
    },
    group="medxray.maskers",
)
PIXEL_DECODERS: Registry[PixelDecoder] = Registry(
    "pixel decoder",
    PixelDecoder,
    {"self-attention": "medxray.pretrain.decoders:SelfAttentionDecoder"},
    group="medxray.pixel_decoders",
    context=("width", "patch_pixels"),
    settings=PixelDecoderSettings,
)
