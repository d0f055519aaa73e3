"""What the class token of an encoder looks at."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from medxray.encoders import MaskableEncoder


class _LastAttention(TorchFunctionMode):
    """Keeps the first query and the keys of the last attention that runs while it is entered."""

    query: Tensor | None = None
    keys: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.query, self.keys = args[0][:, :, :1], args[1]
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def class_attention(encoder: MaskableEncoder, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """One pass over whole images; an encoder's own way is left as fast as it is, one row of one block is added.

    Args:
        encoder: gives a class token first.
        images: (B, C, H, W).

    Returns:
        Tokens of the patches (B, N, D), and the share of the class token's attention that each gets in the last block
        (B, N), a mean over heads that sums to what the class token and registers leave; None for an encoder that has no
        attention.
    """
    grid = encoder.grid(images.shape[2], images.shape[3])
    watch = _LastAttention()
    with watch:
        tokens = encoder.encode(encoder.embed(images), grid)[:, 1:]
    if watch.query is None or watch.keys is None or watch.keys.shape[2] <= tokens.shape[1]:
        return tokens, None
    query, keys = watch.query.float(), watch.keys.float()
    weights = (query @ keys.mT / query.shape[-1] ** 0.5).softmax(-1)
    return tokens, weights[:, :, 0, -tokens.shape[1] :].mean(1)
