"""Writing tokens one by one: greedy, beams or sampling over any language model that keeps its state.

`decode` is the loop. A `Writer` is a language model in the middle of texts; a `Search` decides which tokens come next.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from medxray.types import RunError

if TYPE_CHECKING:
    from medxray.spec import GenerationSpec

NEVER = -1e9
# R2Gen's release: what an n-gram costs for each time that it came before, and how far a whole text is pushed down.
AGAIN, ENDED = 1.386, 1000


class Writer(ABC):
    """A language model in the middle of B texts. It holds rows of cached state, B of them after `start`."""

    @abstractmethod
    def start(self) -> Tensor:
        """Reads what stands before the texts, once a study: logits (B, K) float32 of their first tokens."""

    @abstractmethod
    def step(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Goes on with some of its rows, each of which may be taken once, often or never.

        Args:
            rows: (R,) int64 rows of the state as the last call left it; the state then has R rows in this order. Rows of
                one study stand together, and studies keep their order.
            tokens: (R,) int64 next token of each.

        Returns:
            (R, K) float32 logits of the tokens that follow.
        """


class Decoded(NamedTuple):
    """One text.

    Attributes:
        ids: its tokens, the end sign included where it ended by itself.
        log_probabilities: one a token, by the model's own distribution: before penalties, blocked tokens, temperature
            and top-p.
    """

    ids: list[int]
    log_probabilities: list[float]


class Search(ABC):
    """Decides which tokens come next. A study leaves its rows when its text is whole.

    Args:
        studies: B.
        generation: how texts are written.
        eos: the token that ends a text.
        device: where the logits are.
        seeds: one a study, for sampling.
    """

    def __init__(
        self, studies: int, generation: GenerationSpec, eos: int, device: torch.device, seeds: Sequence[int] = ()
    ) -> None:
        self.generation = generation
        self.eos = eos
        self.most = generation.max_new_tokens
        self.written = 0
        self.open = torch.arange(studies, device=device)
        self._ids = torch.zeros(studies, self.most, dtype=torch.long, device=device)
        self._log_probabilities = torch.zeros(studies, self.most, device=device)
        self._lengths = torch.zeros(studies, dtype=torch.long, device=device)

    @abstractmethod
    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """What `Writer.step` goes on with: rows (R,) and tokens (R,), both empty once all texts are whole.

        Args:
            logits: (R, K) of the rows that it chose last; at first (B, K), a row a study.
        """

    def finish(self, studies: Tensor, ids: Tensor, log_probabilities: Tensor, lengths: Tensor) -> None:
        """Keeps whole texts: studies (n,), ids (n, T), log-probabilities (n, T), lengths (n,)."""
        self._ids[studies] = ids
        self._log_probabilities[studies] = log_probabilities
        self._lengths[studies] = lengths

    def texts(self) -> list[Decoded]:
        """The text of each study."""
        found = zip(self._ids.tolist(), self._log_probabilities.tolist(), self._lengths.tolist(), strict=True)
        return [Decoded(ids[:n], values[:n]) for ids, values, n in found]


def decode(writer: Writer, generation: GenerationSpec, eos: int, seeds: Sequence[int] = ()) -> list[Decoded]:
    """Writes the text of each study; nothing is computed for a study whose text is whole.

    Ids are those of transformers' `generate` with the same settings, given embeddings: penalties and blocked n-grams go
    by the text's own tokens. A text hangs on its study alone and not on those that are written beside it.

    Args:
        writer: the language model before the first tokens.
        generation: how.
        eos: the token that ends a text.
        seeds: one a study, for sampling.

    Raises:
        RunError: more beams than the vocabulary has tokens.
    """
    with torch.no_grad():
        logits = writer.start()
        if generation.beams > logits.shape[-1]:
            raise RunError(
                f"generation.beams: {generation.beams} texts cannot begin differently with a vocabulary of {logits.shape[-1]} "
                "tokens; lower it"
            )
        beams = R2GenBeamSearch if generation.rule == "r2gen" else BeamSearch
        search = beams if generation.beams > 1 else SingleSearch
        chooser = search(len(logits), generation, eos, logits.device, seeds)
        rows, tokens = chooser.choose(logits)
        while len(rows):
            rows, tokens = chooser.choose(writer.step(rows, tokens))
        return chooser.texts()


class SingleSearch(Search):
    """One text a study: the likeliest token, or one drawn by temperature and top-p."""

    def __init__(
        self, studies: int, generation: GenerationSpec, eos: int, device: torch.device, seeds: Sequence[int] = ()
    ) -> None:
        super().__init__(studies, generation, eos, device, seeds)
        self.ids, self.log_probabilities = self._ids.clone(), self._log_probabilities.clone()
        # A study's numbers come from its own seed, all at once, so that they hang on nothing else.
        self.draws: Tensor | None = None
        if generation.sample:
            if len(seeds) != studies:
                raise ValueError(f"sampling needs a seed a study: {studies} were expected, found {len(seeds)}")
            draws = [torch.rand(self.most, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
            self.draws = torch.stack(draws).to(device)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        t = self.written
        scores = restrict(logits, self.ids[:, :t], self.generation, self.eos)
        if self.draws is None:
            tokens = scores.argmax(-1)
        else:
            tokens = draw(scores, self.draws[self.open, t], self.generation.temperature, self.generation.top_p)
        self.ids[:, t] = tokens
        self.log_probabilities[:, t] = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
        self.written += 1
        ended = tokens == self.eos if self.written < self.most else torch.ones_like(tokens, dtype=torch.bool)
        rows = (~ended).nonzero()[:, 0]
        if len(rows) < len(ended):
            lengths = torch.full_like(self.open, self.written)
            self.finish(self.open[ended], self.ids[ended], self.log_probabilities[ended], lengths[ended])
            self.open, self.ids, self.log_probabilities = self.open[rows], self.ids[rows], self.log_probabilities[rows]
        return rows, tokens[rows]


class BeamSearch(Search):
    """The best of several texts a study, by the rules of transformers' `generate`.

    A study keeps as many running beams as whole texts; a whole text's score is its sum of log-probabilities over its
    length to the power of `length_penalty`. A study is done when its best running beam, were it to end now, is below the
    worst of its whole texts.
    """

    def __init__(
        self, studies: int, generation: GenerationSpec, eos: int, device: torch.device, seeds: Sequence[int] = ()
    ) -> None:
        super().__init__(studies, generation, eos, device, seeds)
        shape = (studies, generation.beams)
        self.ids = torch.zeros(*shape, self.most, dtype=torch.long, device=device)
        self.log_probabilities = torch.zeros(*shape, self.most, device=device)
        # Only the first beam counts at first: all begin as the same empty text.
        self.totals = torch.full(shape, NEVER, device=device)
        self.totals[:, 0] = 0
        self.whole_ids, self.whole_log_probabilities = self.ids.clone(), self.log_probabilities.clone()
        self.whole_lengths = torch.zeros(shape, dtype=torch.long, device=device)
        self.scores = torch.full(shape, NEVER, device=device)
        self.ended = torch.zeros(shape, dtype=torch.bool, device=device)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        B, beams, t = len(self.open), self.generation.beams, self.written
        if t == 0:
            logits = logits.repeat_interleave(beams, 0)
        own = logits.log_softmax(-1)
        scores = restrict(own, self.ids[:, :, :t].flatten(0, 1), self.generation, self.eos)
        K = scores.shape[-1]
        # Twice as many as are kept: those that end leave enough to go on with.
        totals, index = (scores.view(B, beams, K) + self.totals[..., None]).flatten(1).topk(2 * beams)
        parents, tokens = index // K, index % K
        ids, log_probabilities = _take(self.ids, parents), _take(self.log_probabilities, parents)
        ids[..., t] = tokens
        log_probabilities[..., t] = own.view(B, beams * K).gather(1, index)
        self.written += 1
        last = self.written == self.most
        ending = tokens == self.eos if not last else torch.ones_like(tokens, dtype=torch.bool)
        self._keep_whole(ids, log_probabilities, totals, ending)

        self.totals, going = (totals + ending * NEVER).topk(beams)
        self.ids, self.log_probabilities = _take(ids, going), _take(log_probabilities, going)
        tokens, parents = tokens.gather(1, going), parents.gather(1, going)
        studies = torch.arange(B, device=index.device)[:, None].expand(-1, beams)
        rows = studies * beams + parents if t else studies

        # A later text can only gain on the worst whole one if the best running beam would by ending now.
        possible = self.totals[:, :1] / self.written**self.generation.length_penalty
        worst = torch.where(self.ended, self.scores.min(1, keepdim=True).values, NEVER)
        done = ~(possible > worst).any(1) if not last else torch.ones_like(self.open, dtype=torch.bool)
        left = (~done).nonzero()[:, 0]
        if len(left) < B:
            self.finish(
                self.open[done], self.whole_ids[done, 0], self.whole_log_probabilities[done, 0],
                self.whole_lengths[done, 0],
            )  # fmt: skip
            self._narrow(left)
        return rows[left].flatten(), tokens[left].flatten()

    def _keep_whole(self, ids: Tensor, log_probabilities: Tensor, totals: Tensor, ending: Tensor) -> None:
        """Merges candidates (B, 2 * beams) that end into the whole texts; only the better half may."""
        beams = self.generation.beams
        closing = ending & (torch.arange(ending.shape[1], device=ending.device) < beams)
        scores = totals / self.written**self.generation.length_penalty + ~closing * NEVER
        scores, best = torch.cat([self.scores, scores], 1).topk(beams)
        self.scores, self.ended = scores, torch.cat([self.ended, closing], 1).gather(1, best)
        lengths = torch.full_like(totals, self.written, dtype=torch.long)
        self.whole_lengths = torch.cat([self.whole_lengths, lengths], 1).gather(1, best)
        self.whole_ids = _take(torch.cat([self.whole_ids, ids], 1), best)
        self.whole_log_probabilities = _take(torch.cat([self.whole_log_probabilities, log_probabilities], 1), best)

    def _narrow(self, left: Tensor) -> None:
        """Goes on with some studies alone."""
        for name in (
            "open", "ids", "log_probabilities", "totals", "whole_ids", "whole_log_probabilities", "whole_lengths",
            "scores", "ended",
        ):  # fmt: skip
            setattr(self, name, getattr(self, name)[left])


class R2GenBeamSearch(Search):
    """The best of several texts a study, by the rules of R2Gen's release.

    A text's score is its sum of log-probabilities, whatever its length. One that ends keeps its place among the beams at
    that step, and is pushed down by 1,000 from then on; at the longest length all end. Nothing is blocked or penalised.
    A study is done when no running beam is above its best whole text, as sums only fall.
    """

    def __init__(
        self, studies: int, generation: GenerationSpec, eos: int, device: torch.device, seeds: Sequence[int] = ()
    ) -> None:
        super().__init__(studies, generation, eos, device, seeds)
        self.ids = torch.zeros(studies, 1, self.most, dtype=torch.long, device=device)
        self.log_probabilities = torch.zeros(studies, 1, self.most, device=device)
        self.totals = torch.zeros(studies, 1, device=device)
        self.scores = torch.full((studies,), -torch.inf, device=device)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        (B, before), t, K = self.totals.shape, self.written, logits.shape[-1]
        own = logits.log_softmax(-1).view(B, before, K)
        totals, index = (own + self.totals[..., None]).flatten(1).topk(self.generation.beams)
        parents, tokens = index // K, index % K
        self.ids, self.log_probabilities = _take(self.ids, parents), _take(self.log_probabilities, parents)
        self.ids[..., t] = tokens
        self.log_probabilities[..., t] = own.flatten(1).gather(1, index)
        self.written += 1
        ended = tokens == self.eos if self.written < self.most else torch.ones_like(tokens, dtype=torch.bool)
        best, place = totals.where(ended, -torch.inf).max(1)
        better = (best > self.scores).nonzero()[:, 0]
        place, length = place[better], torch.full_like(better, self.written)
        self.finish(self.open[better], self.ids[better, place], self.log_probabilities[better, place], length)
        self.scores = torch.maximum(self.scores, best)
        self.totals = totals - ENDED * ended
        left = (self.totals.amax(1) > self.scores).nonzero()[:, 0]
        rows = torch.arange(B, device=index.device)[:, None] * before + parents
        for name in ("open", "ids", "log_probabilities", "totals", "scores"):
            setattr(self, name, getattr(self, name)[left])
        return rows[left].flatten(), tokens[left].flatten()


def restrict(scores: Tensor, ids: Tensor, generation: GenerationSpec, eos: int) -> Tensor:
    """Scores (R, K) with the tokens that texts (R, t) may not or should not take next lowered, as `generation` says."""
    t, n = ids.shape[1], generation.no_repeat_ngram
    penalised = generation.repetition_penalty != 1 and t > 0
    blocked = 0 < n <= t
    if not (penalised or blocked or t < generation.min_new_tokens):
        return scores
    scores = scores.clone()
    if penalised:
        found = scores.gather(1, ids)
        penalty = generation.repetition_penalty
        scores.scatter_(1, ids, torch.where(found < 0, found * penalty, found / penalty))
    if blocked:
        ngrams = ids.unfold(1, n, 1)
        again = (ngrams[..., :-1] == ids[:, None, t - n + 1 :]).all(-1)
        if generation.rule == "r2gen":
            scores.scatter_add_(1, ngrams[..., -1], again * -AGAIN)
        else:
            limits = torch.where(again, -torch.inf, torch.inf).to(scores.dtype)
            scores.scatter_reduce_(1, ngrams[..., -1], limits, "amin")
    if t < generation.min_new_tokens:
        scores[:, eos] = -torch.inf
    return scores


def draw(scores: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token a row by the inverse of its distribution function: scores (R, K), numbers in [0, 1) (R,) -> (R,)."""
    shares = ((scores - scores.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if top_p < 1:
        ranked, order = shares.sort(descending=True)
        ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p, 0)
        shares = torch.zeros_like(shares).scatter_(1, order, ranked)
    # In the order of the vocabulary, so that rounding among near shares moves no token.
    below = shares.cumsum(-1)
    whole = below[:, -1:]
    wanted = torch.minimum(uniform[:, None] * whole, torch.nextafter(whole, torch.zeros_like(whole)))
    return torch.searchsorted(below, wanted, right=True)[:, 0]


def _take(texts: Tensor, index: Tensor) -> Tensor:
    """Texts (B, n, T) by index (B, m) -> (B, m, T)."""
    return texts.gather(1, index[..., None].expand(-1, -1, texts.shape[-1]))
