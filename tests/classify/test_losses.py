"""Losses against numbers worked out by hand."""

import math

import pytest
import torch

from medxray.classify.losses import label_losses, positive_rates

NAN = torch.nan


def test_cross_entropy_of_known_labels_alone() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [math.log(3.0), -5.0], [2.0, 7.0]], requires_grad=True)
    labels = torch.tensor([[1.0, 0.0], [1.0, -1.0], [NAN, NAN]])
    losses = label_losses(logits, labels)
    expected = [[math.log(2), math.log(4)], [math.log(4 / 3), 0.0], [0.0, 0.0]]
    assert torch.allclose(losses, torch.tensor(expected), atol=1e-6)
    losses.sum().backward()
    assert logits.grad is not None and bool(logits.grad.isfinite().all())
    assert logits.grad[1, 1] == 0 and not logits.grad[2].any(), "uncertain and missing labels pull at nothing"
    assert logits.grad[0, 0] == pytest.approx(-0.5)


def test_the_exponential_loss_of_the_paper() -> None:
    """exp(y (1 - p) + (1 - y) p): a label of one study in ten costs e^0.9 where it is present, e^0.1 where absent."""
    logits = torch.zeros(2, 2)
    labels = torch.tensor([[1.0, 1.0], [0.0, NAN]])
    losses = label_losses(logits, labels, torch.tensor([0.1, 0.75]))
    half = 0.6931471805599453
    expected = [[half * 2.45960311, half * 1.28402542], [half * 1.10517092, 0.0]]
    assert torch.allclose(losses, torch.tensor(expected), atol=1e-6)


def test_rates_are_of_known_labels() -> None:
    labels = torch.tensor([[1.0, NAN, 0.0, -1.0], [0.0, 1.0, 0.0, NAN], [0.0, -1.0, NAN, NAN], [0.0, 1.0, 0.0, -1.0]])
    assert positive_rates(labels).tolist() == [0.25, 1.0, 0.0, 0.5]
    assert positive_rates(torch.zeros(0, 3)).tolist() == [0.5] * 3
