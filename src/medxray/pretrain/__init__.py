"""Masked auto-encoding: which tokens stay visible (maskers) and what is predicted from them (pixel decoders)."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
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
    """Predicts pixels from visible tokens. Takes the encoder, for its width, patch, channels and depth.

    Attributes:
        every_layer: True where it reads what every block of the encoder gives, and not only the last.
    """

    every_layer: bool = False

    @abstractmethod
    def forward(
        self, layers: Sequence[Tensor], masking: Masking, grid: tuple[int, int], targets: Tensor
    ) -> Tensor:
        """Args:
            layers: the encoder's outputs (B, 1 + n, D) for the class token and the visible tokens, the last one last;
                `every_layer` of them, or that one alone.
            masking: which tokens are visible.
            grid: (h, w).
            targets: (B, T), positions to predict.

        Returns:
            (B, T, patch * patch * C).
        """


class PixelDecoderSettings(Settings):
    """What a spec may say of any pixel decoder beside its own settings."""

    normalize_patches: bool = Field(
        False, description="each patch is predicted with its own mean taken off and divided by its deviation"
    )
    variance_floor: float = Field(
        1e-6,
        gt=0,
        description="added to each patch's variance where patches are normalised: 1e-6 is MAE's; more, such as "
        "1e-3, keeps the noise of black borders from counting as much as anatomy",
    )
    predicted: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of all tokens that is predicted at each step of training, chosen among the masked ones at "
        "random; None predicts every masked one, as evaluation always does",
    )


MASKERS: Registry[Masker] = Registry(
    "masker",
    Masker,
    {
        "random": "medxray.pretrain.maskers:RandomMasker",
        "block": "medxray.pretrain.maskers:BlockMasker",
        "grid": "medxray.pretrain.maskers:GridMasker",
        "filtered-noise": "medxray.pretrain.maskers:FilteredNoiseMasker",
        "rectangle": "medxray.pretrain.maskers:RectangleMasker",
    },
    group="medxray.maskers",
)
PIXEL_DECODERS: Registry[PixelDecoder] = Registry(
    "pixel decoder",
    PixelDecoder,
    {
        "self-attention": "medxray.pretrain.decoders:SelfAttentionDecoder",
        "cross-attention": "medxray.pretrain.decoders:CrossAttentionDecoder",
    },
    group="medxray.pixel_decoders",
    context=("encoder",),
    settings=PixelDecoderSettings,
)
