"""Classification heads."""

from typing import Literal

from torch import Tensor, nn

from medxray.classify import Head
from medxray.types import Features


class LinearHead(Head):
    """LayerNorm, dropout and one linear layer on one vector an image.

    Args:
        pooling: the encoder's own pooled vector, or the largest value of each channel over the tokens, by which a
            small finding counts as much as a large one.
        dropout: share of the pooled vector that is dropped while training.
    """

    def __init__(self, width: int, classes: int, pooling: Literal["encoder", "max"] = "encoder", dropout: float = 0.0) -> None:
        super().__init__()
        self.pooling = pooling
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Features) -> Tensor:
        pooled = features.pooled if self.pooling == "encoder" else features.tokens.amax(1)
        logits: Tensor = self.linear(self.dropout(self.norm(pooled)))
        return logits
