"""Masked auto-encoding: which tokens stay visible (maskers) and what is predicted from them (pixel decoders)."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import Generator, Tensor, nn

from medxray.registry import Registry, Settings

Source = Literal["stored", "computed", "mean", "rectangle", "uniform"]


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
    """Chooses the visible tokens of a batch on its device, with the same exact count for every image.

    Attributes:
        regional: True where it looks at regions; where there are none it takes the release's rectangle.
        progress: share of the training that is done, 1 outside of it; set by the task.
    """

    regional: bool = False
    progress: float = 1.0

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


class Region(NamedTuple):
    """Where the chest is in one image.

    Attributes:
        mask: (h, w) bool or float32, coverage of the image by the chest, in the image's own frame at any resolution.
        source: "computed" from the pixels, or what stands in for that: "stored", "mean", "rectangle" or "uniform".
        reason: why an earlier link of that chain was not used; empty for the first.
    """

    mask: NDArray[np.bool_] | NDArray[np.float32]
    source: Source
    reason: str


class Segmenter(ABC):
    """Finds the chest in a radiograph. It is made anew in every process that looks at images.

    Attributes:
        version: of the method; another number, and what was kept of an earlier one is computed anew.
    """

    version: int = 1

    @abstractmethod
    def __call__(self, pixels: NDArray[np.float32], view: str) -> Region:
        """Args:
            pixels: (H, W) in [0, 1].
            view: "PA", "AP", "LL" or "unknown".

        Returns:
            A region whose source is "computed"; any other source, with the reason, where it is not to be trusted.
        """


class SegmenterSettings(Settings):
    """What a spec may say of any segmenter beside its own settings."""

    stored: str | None = Field(
        None,
        description="where masks of the chest lie, if there are any, below the data's root: {path}, {folder} and {stem} "
        "stand for an image's path, its folder and its name without ending, as in masks/{stem}_thorax.png",
    )


class PixelDecoder(nn.Module, ABC):
    """Predicts pixels from visible tokens. Takes the encoder, for its width, patch, channels and depth.

    Attributes:
        every_layer: True where it reads what every block of the encoder gives, and not only the last.
        mask_patch: (1, 1, patch * patch * C), the pixels that it puts in place of masked patches where the encoder is to
            see the whole grid, masked places among it; None where the encoder sees visible patches alone.
    """

    every_layer: bool = False
    mask_patch: nn.Parameter | None

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("mask_patch", None)

    @abstractmethod
    def forward(
        self, layers: Sequence[Tensor], masking: Masking, grid: tuple[int, int], targets: Tensor
    ) -> Tensor:
        """Args:
            layers: the encoder's outputs (B, 1 + n, D) for the class token and the visible tokens, or all N of them
                with a `mask_patch`, the last one last; `every_layer` of them, or that one alone.
            masking: which tokens are visible.
            grid: (h, w).
            targets: (B, T), positions to predict.

        Returns:
            (B, T, patch * patch * C).
        """


class MaskerSettings(Settings):
    """What a spec may say of any masker beside its own settings."""

    repeats: int = Field(
        1, gt=0, strict=True, description="masks that are drawn for each decoded image while training; a step has as "
        "many times the images"
    )  # fmt: skip


class PixelDecoderSettings(Settings):
    """What a spec may say of any pixel decoder beside its own settings."""

    weights: str | None = Field(
        None,
        description="a run folder of task pretrain, or a public file or folder with a decoder, such as "
        "mae_visualize_vit_base.pth or facebook/vit-mae-base",
    )
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
    chest_weight: float = Field(
        1.0, gt=0, description="how much more a patch of the chest counts in the loss than one beside it"
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
        "contour": "medxray.pretrain.maskers:ContourMasker",
        "curriculum": "medxray.pretrain.maskers:CurriculumMasker",
    },
    group="medxray.maskers",
    settings=MaskerSettings,
)
SEGMENTERS: Registry[Segmenter] = Registry(
    "segmenter",
    Segmenter,
    {"classical": "medxray.pretrain.contour:ClassicalSegmenter"},
    group="medxray.segmenters",
    settings=SegmenterSettings,
)
PIXEL_DECODERS: Registry[PixelDecoder] = Registry(
    "pixel decoder",
    PixelDecoder,
    {
        "self-attention": "medxray.pretrain.decoders:SelfAttentionDecoder",
        "cross-attention": "medxray.pretrain.decoders:CrossAttentionDecoder",
        "linear": "medxray.pretrain.decoders:LinearDecoder",
    },
    group="medxray.pixel_decoders",
    context=("encoder",),
    settings=PixelDecoderSettings,
)
