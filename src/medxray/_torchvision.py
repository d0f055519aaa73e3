"""Lets torchvision be imported beside a torch without CUDA.

A torchvision built for CUDA stops at its import when torch lacks CUDA, because two operators that it describes
were never declared. Declaring their schemas is enough; they are not used here. A finder waits for the import of
torchvision, so that importing medxray does not import torch.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_kept: list[object] = []


def declare() -> None:
    """Declares `torchvision::nms` and `qnms` where torch has no CUDA and nobody has declared them."""
    import torch

    if torch.version.cuda is not None or _kept:
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}{SCHEMA}")
    _kept.append(library)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            declare()
        return None


def install() -> None:
    """Makes the declaration happen before torchvision's own import, once."""
    if "torchvision" not in sys.modules and not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
