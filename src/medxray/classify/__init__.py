"""Features -> one logit a label."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from medxray.registry import Registry
from medxray.types import Features


class Head(nn.Module, ABC):
    """Turns an image's or a study's features into logits. Takes (width, classes)."""

    @abstractmethod
    def forward(self, features: Features) -> Tensor:
        """Features of B studies -> logits (B, K)."""


HEADS: Registry[Head] = Registry(
    "head",
    Head,
    {"linear": "medxray.classify.heads:LinearHead"},
    group="medxray.heads",
    context=("width", "classes"),
)
