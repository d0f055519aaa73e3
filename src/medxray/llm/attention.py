"""Words of a report: which text each token adds, and what each word looked at."""

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


def spelled(ids: Sequence[int], decode: Callable[[list[int]], str]) -> list[str]:
    """What each token adds to the report's text; they join to `decode(ids)` without space around it.

    Found by decoding longer and longer beginnings, so that it holds for byte pairs, for pieces that carry their space and
    for whole words alike. A token that ends inside a character adds nothing; the one that completes it adds it.

    Args:
        ids: tokens of one report.
        decode: the tokenizer's, special tokens left out.
    """
    text = decode(list(ids)).strip()
    ends = [0]
    for stop in range(1, len(ids) + 1):
        beginning = decode(list(ids[:stop])).lstrip()
        same = len(beginning)
        # Half a character, and what a tokenizer tidies up when more follows, is not the text's beginning yet.
        while not text.startswith(beginning[:same]):
            same -= 1
        ends.append(max(ends[-1], same))
    ends[-1] = len(text) if len(ids) else 0
    return [text[start:stop] for start, stop in pairwise(ends)]


@torch.no_grad()
def attention_rows(llm: Any, embeddings: Tensor, first: int, columns: Tensor) -> Tensor | None:
    """What the last places of one sequence attend to, in one pass of a language model of transformers.

    Each layer's weights are cut down as they come, so that no more than one layer's are held.

    Args:
        llm: in evaluation; its way of computing attention is as before afterwards.
        embeddings: (1, S, D).
        first: the first place that is asked for.
        columns: (N,) int64 places that are looked at.

    Returns:
        (S - first, N) float32, the mean over the heads of the upper half of the layers, where words are chosen; rows sum to
        one. None when no layer has attention weights.
    """
    S = embeddings.shape[1]
    layers: list[Tensor] = []

    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if isinstance(weights, Tensor) and weights.ndim == 4 and weights.shape[-2:] == (S, S):
            layers.append(weights[0, :, first:, columns].float().mean(0))

    usual = llm.config._attn_implementation
    hooks = [module.register_forward_hook(keep) for module in llm.modules()]
    try:
        llm.set_attn_implementation("eager")
        mask = torch.ones(1, S, dtype=torch.long, device=embeddings.device)
        llm(inputs_embeds=embeddings, attention_mask=mask, logits_to_keep=1, use_cache=False)
    finally:
        llm.set_attn_implementation(usual)
        for hook in hooks:
            hook.remove()
    if not layers:
        return None
    mean = torch.stack(layers[len(layers) // 2 :]).mean(0)
    return mean / mean.sum(1, keepdim=True).clamp(min=torch.finfo(mean.dtype).tiny)


def word_rows(report: str, spans: Sequence[tuple[int, int]], rows: Tensor) -> Tensor:
    """A row for each token (L, N) -> a row for each word of `report.split()`, the mean over the tokens that it is made of.

    Args:
        report: its text.
        spans: where in the text each of L tokens begins and ends.
        rows: (L, N).
    """
    words = torch.tensor([word.span() for word in re.finditer(r"\S+", report)]).reshape(-1, 1, 2)
    tokens = torch.tensor(spans).reshape(1, -1, 2)
    shared = (tokens[..., 0] < words[..., 1]) & (tokens[..., 1] > words[..., 0])
    member = shared.to(rows)
    means: Tensor = member @ rows / member.sum(1, keepdim=True).clamp(min=1)
    return means
