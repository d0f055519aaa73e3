"""Classification heads."""

from torch import Tensor, nn

from medxray.classify import Head
from medxray.types import Features


class LinearHead(Head):
    """LayerNorm, dropout and one linear layer on the pooled vector.

    Args:
        dropout: share of the pooled vector that is dropped while training.
    """

    def __init__(self, width: int, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Features) -> Tensor:
        logits: Tensor = self.linear(self.dropout(self.norm(features.pooled)))
        return logits
