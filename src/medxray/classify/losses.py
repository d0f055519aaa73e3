"""What a wrong probability costs; labels that are uncertain or missing cost nothing."""

from torch import Tensor
from torch.nn import functional as F


def label_losses(logits: Tensor, labels: Tensor, rates: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of each label that is known, (B, K), zero for the others.

    With `rates` it is the HD X-ray MAE's (arXiv:2404.17926): times exp(1 - p) where the label is present and exp(p)
    where it is absent.

    Args:
        logits: (B, K).
        labels: (B, K) with 1, 0, -1 uncertain and NaN missing.
        rates: (K,), p of each label: the share of training studies that have it.
    """
    known = labels >= 0
    y = labels.where(known, 0.0)
    losses = F.binary_cross_entropy_with_logits(logits, y, reduction="none")
    if rates is not None:
        losses = losses * (y * (1 - rates) + (1 - y) * rates).exp()
    return losses * known


def positive_rates(labels: Tensor) -> Tensor:
    """labels (n, K) with 1, 0, -1 uncertain and NaN missing -> (K,) share of 1 among 1 and 0; a half where none is known."""
    known, positive = (labels >= 0).sum(0), (labels == 1).sum(0)
    return (positive / known.clamp(min=1)).where(known > 0, 0.5)
