"""Projectors: which tokens stand in the prompt as the image, and what a global vector becomes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from medxray.llm import PROJECTORS, Projector
from medxray.types import SpecError

D, L = 12, 16


def build(name: str, **settings: Any) -> Projector:
    torch.manual_seed(0)
    return PROJECTORS.build(PROJECTORS.settings_of(name)(name=name, **settings), D, L).eval()


def small_q_former(**settings: Any) -> Projector:
    return build("q-former", **{"queries": 5, "width": 8, "heads": 2, "hidden": 16, **settings})


@pytest.mark.parametrize(
    ("projector", "count"),
    [(build("linear"), 12), (small_q_former(), 5), (build("pixel-shuffle"), 4), (build("pixel-shuffle", hidden=24), 4)],
    ids=["linear", "q-former", "pixel-shuffle", "pixel-shuffle with an MLP"],
)
def test_tokens_vectors_and_gradients(projector: Projector, count: int) -> None:
    torch.manual_seed(1)
    tokens = torch.randn(2, 12, D, requires_grad=True)
    image = projector.on_grid(tokens, (3, 4))
    assert image.shape == (2, count, L)
    # The image's tokens are normalised, a global vector is not.
    torch.testing.assert_close(image.mean(2), torch.zeros(2, count), atol=1e-5, rtol=0)
    torch.testing.assert_close(image.var(2, unbiased=False), torch.ones(2, count), atol=1e-2, rtol=0)
    (image * torch.randn_like(image)).sum().backward()
    assert tokens.grad is not None and (tokens.grad.abs().amax(2) > 0).all(), "every token has a part in the image"
    unused = [name for name, parameter in projector.named_parameters() if parameter.grad is None]
    assert not unused
    for shape in ((2, D), (2, 3, D), (D,)):
        vectors = projector.project(torch.randn(shape))
        assert vectors.shape == (*shape[:-1], L)
        assert vectors.mean(-1).abs().max() > 1e-4


def test_vectors_are_projected_one_by_one() -> None:
    for projector in (build("linear"), small_q_former(), build("pixel-shuffle", hidden=24)):
        pooled = torch.randn(2, 3, D)
        each = torch.stack([torch.stack([projector.project(v) for v in row]) for row in pooled])
        torch.testing.assert_close(projector.project(pooled), each)


def test_pixel_shuffle_joins_neighbours() -> None:
    projector: Any = build("pixel-shuffle", factor=2)
    tokens = torch.randn(1, 4 * 6, D)
    joined = projector.joined(tokens, (4, 6))
    assert joined.shape == (1, 6, 4 * D)
    # The second of two rows of three: rows 2 and 3, columns 0 and 1.
    expected = torch.cat([tokens[0, row * 6 + column] for row, column in ((2, 0), (2, 1), (3, 0), (3, 1))])
    assert torch.equal(joined[0, 3], expected)


def test_pixel_shuffle_of_odd_grids_repeats_the_border() -> None:
    projector: Any = build("pixel-shuffle", factor=2)
    tokens = torch.randn(1, 3 * 5, D)
    joined = projector.joined(tokens, (3, 5))
    assert joined.shape == (1, 2 * 3, 4 * D)
    last = tokens[0, 14]
    assert torch.equal(joined[0, 5], torch.cat([last] * 4))


def test_pixel_shuffle_takes_concatenated_views_one_at_a_time() -> None:
    projector = build("pixel-shuffle", factor=2)
    first, second = torch.randn(2, 2, 7 * 7, D)
    both = projector.on_grid(torch.cat([first, second], 1), (7, 7))
    assert both.shape == (2, 32, L)
    torch.testing.assert_close(both, torch.cat([projector.on_grid(view, (7, 7)) for view in (first, second)], 1))


def test_a_constant_map_and_its_vector_agree() -> None:
    projector: Any = build("pixel-shuffle", factor=3, hidden=20)
    vector = torch.randn(1, D)
    image = projector.on_grid(vector.expand(1, 9, D), (3, 3))
    torch.testing.assert_close(image[:, 0], projector.norm(projector.project(vector)))


def test_tokens_that_are_no_map_are_refused() -> None:
    projector = build("pixel-shuffle")
    for attempt in (lambda: projector(torch.randn(1, 12, D)), lambda: projector.on_grid(torch.randn(1, 12, D), None)):
        with pytest.raises(SpecError, match=r"projector 'pixel-shuffle'.*map.*take linear or q-former"):
            attempt()
    with pytest.raises(SpecError, match=r"13 tokens.*3 x 4"):
        projector.on_grid(torch.randn(1, 13, D), (3, 4))


def test_q_former_is_told_what_it_cannot_be() -> None:
    with pytest.raises(SpecError, match=r"width 10 .* 4 heads"):
        small_q_former(width=10, heads=4)


def test_q_former_reads_all_tokens_in_any_order() -> None:
    projector = small_q_former(layers=2)
    tokens = torch.randn(2, 9, D)
    torch.testing.assert_close(projector(tokens), projector(tokens.flip(1)), atol=1e-5, rtol=0)
    other = tokens.clone()
    other[0, 8] += 1
    changed = (projector(other) - projector(tokens)).abs().amax((1, 2))
    assert changed[0] > 1e-4 and changed[1] == 0


def test_a_projector_of_another_package_needs_no_grid() -> None:
    class Halves(Projector):
        def __init__(self, in_width: int, out_width: int) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(in_width, out_width)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.linear(tokens[:, ::2])

        def project(self, pooled: Tensor) -> Tensor:
            return self.linear(pooled)

    assert Halves(D, L).on_grid(torch.randn(1, 12, D), (3, 4)).shape == (1, 6, L)
