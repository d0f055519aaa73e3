"""What the scan's operators have in common: derivatives, counts of operations, and how they are called.

An operator takes u (B, D, L), delta (B, K, D, L) for K directions, A, B, C, D, bias, softplus, a map's height and width
(0 for a sequence) and whether to keep states; it gives y and those states. Its backward operator takes the gradient of
y, the tensors, the states, softplus, height and width, and gives the gradients of the seven tensors.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def complete(forward: Any, backward: Any) -> None:
    """Registers an operator's derivative and what both count for."""

    def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.softplus, ctx.height, ctx.width, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, output[1])

    def differentiate(ctx: Any, of_y: Tensor, of_states: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, states = ctx.saved_tensors
        found = backward(of_y, *tensors, states, ctx.softplus, ctx.height, ctx.width)
        gradients = [None if tensor is None else one for tensor, one in zip(tensors, found, strict=True)]
        return *gradients, None, None, None, None

    def refuse(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError("the selective scan's kernels have one derivative; for a second one take backend='torch'")

    forward.register_autograd(differentiate, setup_context=remember)
    backward.register_autograd(refuse)

    @register_flop_formula(forward._opoverload.overloadpacket)
    def of_forward(u: Any, delta: Any, A: Any, *others: Any, out_shape: Any = None, **named: Any) -> int:
        return _operations(delta, A[1])

    @register_flop_formula(backward._opoverload.overloadpacket)
    def of_backward(of_y: Any, u: Any, delta: Any, A: Any, *others: Any, out_shape: Any = None, **named: Any) -> int:
        # Twice the forward pass for the gradients, once more for the states.
        return 3 * _operations(delta, A[1])


def _operations(shape: list[int], states: int) -> int:
    """Of the forward pass: 8 for each state of a step (decay, input, recurrence, output) and 3 for each step."""
    B, K, D, L = shape
    return B * K * D * L * (8 * states + 3)


def call(
    operator: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, bias: Tensor | None,
    softplus: bool, size: tuple[int, int] | None,
) -> Tensor:  # fmt: skip
    """y of an operator; states are kept where a gradient will be asked for."""
    given = (u, delta if size else delta[:, None], A, B, C, D, bias)
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in given)
    y: Tensor = operator(*given, softplus, *(size or (0, 0)), keep)[0]
    return y
