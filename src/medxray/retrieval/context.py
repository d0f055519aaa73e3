"""What becomes of context vectors beside a study's own: R2GenCSR's residual modes."""

from collections.abc import Callable

import torch
from torch import Tensor

from medxray.retrieval import Residual
from medxray.types import Context


@torch.no_grad()
def context_tokens(
    mode: Residual,
    pooled: Tensor,
    context: Context,
    project: Callable[[Tensor], Tensor],
    wrap: Callable[[Tensor, str], Tensor],
) -> Tensor:
    """Tokens (B, T, D_llm) that stand before the main prompt; no gradient flows through them, as in the release.

    Args:
        mode: `release` wraps every sample c by itself, a normal one and a diseased one in turn, and takes each
            token e of the whole sequence, prompt words too, to g - e, as the released code does;
            `after_projection` wraps g - c, the normal ones together, then the diseased ones together;
            `before_projection` wraps project(pooled - pooled_c) likewise; `none` wraps c itself likewise.
        pooled: (B, D) global vectors of the studies.
        context: pooled features of the context studies.
        project: (..., D) -> (..., D_llm).
        wrap: vectors (B, n, D_llm) and their pool -> (B, n + k, D_llm) with the pool's prompt around them.
    """
    query = pooled[:, None]
    pools = {"negative": context.negative, "positive": context.positive}
    if mode == "release":
        vectors = {pool: project(samples) for pool, samples in pools.items()}
        most = max(samples.shape[1] for samples in vectors.values())
        turns = [
            wrap(samples[:, i : i + 1], pool)
            for i in range(most)
            for pool, samples in vectors.items()
            if i < samples.shape[1]
        ]
        return project(query) - torch.cat(turns, dim=1)
    if mode == "before_projection":
        vectors = {pool: project(query - samples) for pool, samples in pools.items()}
    elif mode == "none":
        vectors = {pool: project(samples) for pool, samples in pools.items()}
    else:
        vectors = {pool: project(query) - project(samples) for pool, samples in pools.items()}
    return torch.cat([wrap(samples, pool) for pool, samples in vectors.items() if samples.shape[1]], dim=1)
