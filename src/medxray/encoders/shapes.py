"""Passes that work out shapes and no numbers: a model of any size goes through at once and without memory."""

import contextlib
import copy
import functools
import gc
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

Model = TypeVar("Model", bound=nn.Module)


@contextlib.contextmanager
def shapes_only(model: Model) -> Iterator[Model]:
    """A copy of a model in which every tensor, like every other that is made inside the block, has no numbers.

    Operations take the way that they take on the CPU. A guard against bad numbers is told that there are none: all()
    is true and any() false. Whatever else asks for a number raises torch's own errors; so does an operation of another
    package that does not say its shapes.
    """
    filled = {id(kept): kept.cache_info().misses for kept in _kept_results()}
    with FakeTensorMode(allow_non_fake_inputs=True), _Guards(), torch.device("cpu"):
        copies: dict[int, Any] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            trained = isinstance(tensor, nn.Parameter)
            copies[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if trained else empty
        try:
            yield copy.deepcopy(model, copies)
        finally:
            # What a function keeps for equal arguments would come back later, still without numbers.
            for kept in _kept_results():
                if kept.cache_info().misses > filled.get(id(kept), 0):
                    kept.cache_clear()


class _Guards(TorchDispatchMode):
    """Answers `if x.isfinite().all()` and the like, for which there are no numbers."""

    def __init__(self) -> None:
        super().__init__()
        self._answers: list[tuple[Tensor, bool]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            for asked, answer in self._answers:
                if asked is args[0]:
                    return answer
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.all.default, torch.ops.aten.any.default):
            self._answers.append((result, func is torch.ops.aten.all.default))
        return result


def _kept_results() -> list[Any]:
    """Every function in this process that keeps its results, torch's own left out."""
    kept = functools._lru_cache_wrapper
    return [f for f in gc.get_objects() if type(f) is kept and not str(f.__module__).startswith(("torch.", "sympy."))]
