"""Features -> one logit a label."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from medxray.registry import Registry, Settings
from medxray.types import Features


class Head(nn.Module, ABC):
    """Turns an image's or a study's features into logits. Takes (width, classes)."""

    @abstractmethod
    def forward(self, features: Features) -> Tensor:
        """Features of B studies -> logits (B, K)."""

    def read_labels(self, labels: Sequence[str]) -> None:
        """Gets the names of the K labels before a fit, and then only: what comes of them is kept in buffers."""


class JoiningHead(Head):
    """A head whose own tokens may go through the encoder's last block beside the image's.

    So it is done where the encoder can (`JoinableEncoder`) and is trained. A frozen one's features are computed once,
    after its last block: the head then does without, as with any other encoder.
    """

    @abstractmethod
    def join(self) -> None:
        """Called once where the encoder's last block is shared; drops what stands in for it."""

    @abstractmethod
    def forward(self, features: Features, last: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Features of B studies -> logits (B, K).

        Args:
            features: of an encoder, or of a joined one before its last block.
            last: of a joined encoder, its last block: own tokens (B, T, D) -> all tokens (B, n + T, D), those last.
        """


class MemoryHead(Head):
    """A head that keeps the training studies' features, so that the encoder must be frozen."""

    @abstractmethod
    def reserve(self, studies: int) -> None:
        """Makes room for the training studies."""

    @abstractmethod
    def fill(self, pooled: Tensor, labels: Tensor, owners: Tensor) -> None:
        """Keeps n training studies: pooled (n, D), labels (n, K) as in a `Batch`, patients as numbers (n,) int64.

        Raises:
            SpecError: there are too few.
        """

    @abstractmethod
    def forward(self, features: Features, owners: Tensor | None = None) -> Tensor:
        """Features of B studies -> logits (B, K).

        Args:
            features: of a frozen encoder.
            owners: (B,) whose studies they are; what is kept of the same patient counts for nothing.
        """


class HeadSettings(Settings):
    """What a spec may say of any head beside its own settings."""

    loss: Literal["bce", "exponential"] = Field(
        "bce",
        description="binary cross-entropy; or, as in the HD X-ray MAE's paper, times exp(y (1 - p) + (1 - y) p) for a label "
        "y whose share of positive training studies is p, so that rare answers count more",
    )


HEADS: Registry[Head] = Registry(
    "head",
    Head,
    {
        "linear": "medxray.classify.heads:LinearHead",
        "attentive-probe": "medxray.classify.heads:AttentiveProbe",
        "label-text-fusion": "medxray.classify.heads:LabelTextFusion",
        "k-nearest": "medxray.classify.heads:KNearest",
    },
    group="medxray.heads",
    context=("width", "classes"),
    settings=HeadSettings,
)
