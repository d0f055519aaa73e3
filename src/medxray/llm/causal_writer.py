"""A causal language model of transformers as a writer: prefixes read once a study, keys and values in one buffer."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from medxray.llm.decoding import Writer


class CausalWriter(Writer):
    """Writes after embedded prefixes, which may differ in length.

    What all prefixes have in common at their beginning is read once for all. In the cache it comes first, then what
    pads the shorter ones, then what is each study's own; positions are counted without padding.

    Args:
        llm: a causal language model of transformers.
        prefix: embeddings (B, S, D), padded on the left.
        mask: (B, S), 0 at padding; None where all have one length.
        most: tokens that a text may have.
    """

    def __init__(self, llm: Any, prefix: Tensor, mask: Tensor | None, most: int) -> None:
        B, S, _ = prefix.shape
        self.llm, self.prefix = llm, prefix
        self.lengths = mask.sum(1) if mask is not None else torch.full((B,), S, device=prefix.device)
        self.longest = int(self.lengths.max())
        self.padded = bool((self.lengths < self.longest).any())
        self.studies = torch.arange(B, device=prefix.device)
        self.takes_positions = "position_ids" in inspect.signature(llm.forward).parameters
        self.cache = DynamicCache(config=llm.config)
        for i, layer in enumerate(self.cache.layers):
            # Layers of other kinds, such as sliding windows, keep their own way.
            if type(layer) is DynamicLayer:
                self.cache.layers[i] = _Buffer(self.longest + most)

    def start(self) -> Tensor:
        B, S, _ = self.prefix.shape
        # A sliding window counts places, so that padding may not stand inside it.
        apart = self.padded and not all(isinstance(layer, _Buffer) for layer in self.cache.layers)
        shared = 0 if apart else common_beginning(self.prefix, self.lengths)
        if shared:
            first = S - int(self.lengths[0])
            self._run(inputs_embeds=self.prefix[:1, first : first + shared])
            self.cache.reorder_cache(torch.zeros_like(self.studies))
        own = self.prefix[:, S - self.longest + shared :]
        place = torch.arange(shared, self.longest, device=own.device)
        # Places of the cache that a study attends to, and the positions of its own tokens.
        padding = self.longest - self.lengths[:, None]
        self.seen = torch.cat([place.new_ones(B, shared), (place >= shared + padding).long()], 1)
        return self._run(inputs_embeds=own, position_ids=(place - padding).clamp(min=0))

    def step(self, rows: Tensor, tokens: Tensor) -> Tensor:
        studies = self.studies[rows]
        # Beams of a study share its prefix: where they only change places, what stands before their texts stays.
        settled = self.longest if torch.equal(studies, self.studies) else 0
        for layer in self.cache.layers:
            if isinstance(layer, _Buffer):
                layer.select(rows, settled)
            else:
                layer.reorder_cache(rows)
        self.studies = studies
        if self.padded:
            self.seen = torch.cat([self.seen[rows], self.seen.new_ones(len(rows), 1)], 1)
            self.lengths = self.lengths[rows] + 1
        return self._run(input_ids=tokens[:, None], position_ids=self.lengths[:, None] - 1)

    def _run(self, position_ids: Tensor | None = None, **inputs: Tensor) -> Tensor:
        if self.padded and position_ids is not None:
            inputs["attention_mask"] = self.seen
            if self.takes_positions:
                inputs["position_ids"] = position_ids
        output = self.llm(**inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = output.logits[:, -1].float()
        return logits


def common_beginning(prefix: Tensor, lengths: Tensor) -> int:
    """How many tokens the prefixes (B, S, D), padded on the left, begin with that are the same in all; none for one."""
    B, S, _ = prefix.shape
    if B == 1:
        return 0
    shortest = int(lengths.min())
    place = (S - lengths[:, None] + torch.arange(shortest, device=prefix.device))[..., None]
    tokens = prefix.gather(1, place.expand(-1, -1, prefix.shape[2]))
    same = (tokens == tokens[:1]).all(2).all(0)
    # A study's last token is its own, so that there is something to say what follows.
    return min(int(same.long().cumprod(0).sum()), shortest - 1)


class _Buffer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of a layer in a buffer with room for whole texts, so that growing copies nothing."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.buffers: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        begin = self.get_seq_length()
        end = begin + key_states.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [
                states.new_empty(*states.shape[:2], self.room, states.shape[3]) for states in (key_states, value_states)
            ]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, begin:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select(beam_idx, 0)

    def select(self, rows: Tensor, settled: int) -> None:
        """Takes rows; the first `settled` places are known to be right as they are."""
        end = self.get_seq_length()
        if settled:
            moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
            for buffer in self.buffers:
                texts = buffer[:, :, settled:end]
                texts.index_copy_(0, moved, texts.index_select(0, rows[moved]))
            return
        for i, buffer in enumerate(self.buffers):
            self.buffers[i] = buffer.new_empty(len(rows), *buffer.shape[1:])
            self.buffers[i][:, :, :end] = buffer[:, :, :end].index_select(0, rows)
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
