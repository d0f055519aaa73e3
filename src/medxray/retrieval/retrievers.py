"""Which members of the pools a study gets."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from medxray.retrieval import Pool, PoolSettings, Queries, Retriever, pools

Positive = Annotated[int, Field(gt=0)]


class FixedRetriever(Retriever):
    """R2GenCSR's release: the same few studies for every query, drawn once with the pools' seed.

    Unlike the release, a study of the query's own patient is passed over and the next one taken.
    """

    def candidates(
        self, pool: list[int], patients: Sequence[str], count: int, settings: PoolSettings
    ) -> list[int]:
        # No patient twice, so that one more than are wanted are enough.
        return pools.draw(pool, patients, settings.size, settings.seed)[: count + 1]

    def choose(self, queries: Queries, pool: Pool, count: int) -> Tensor:
        places = torch.arange(len(pool), device=queries.own.device)
        refused = (places[None, :, None] == queries.own[:, None]).any(2)
        return torch.argsort(places + len(pool) * refused, dim=1)[:, :count]


class RandomRetriever(Retriever):
    """Studies drawn evenly from each pool, none twice: anew for each study and epoch in training, always the same for a
    study in evaluation."""

    def choose(self, queries: Queries, pool: Pool, count: int) -> Tensor:
        drawn = []
        for seed, own in zip(queries.seeds, queries.own.tolist(), strict=True):
            refused = {row for row in own if row >= 0}
            # The other pool is drawn from with another stream of numbers, as it has another size.
            rows = random.Random(f"{seed} {len(pool)}").sample(range(len(pool)), min(len(pool), count + len(refused)))
            drawn.append([row for row in rows if row not in refused][:count])
        return torch.tensor(drawn, device=queries.features.device)


class NearestRetriever(Retriever):
    """The nearest studies of each pool by cosine similarity of pooled encoder features."""

    def choose(self, queries: Queries, pool: Pool, count: int) -> Tensor:
        return pool.search.nearest(queries.features, count, queries.own).rows


class LabelRetriever(Retriever):
    """Studies that agree with the query in most labels, the nearest of them first.

    All labels of the data set are compared, those that are uncertain or missing in one of the two left out. In evaluation
    and prediction a study's labels are not looked at: its nearest studies of both pools vote on each label.

    Args:
        voters: nearest studies that vote.
    """

    def __init__(self, voters: Positive = 15) -> None:
        self.voters = voters

    def complete(self, queries: Queries, pools: Sequence[tuple[Pool, Tensor]]) -> Queries:
        if queries.training:
            return queries
        similarity, labels = [], []
        for pool, own in pools:
            found = pool.search.nearest(queries.features, min(self.voters, len(pool)), own)
            similarity.append(found.similarity)
            # A row that is none has a similarity of -inf, so that it comes last, and no voice.
            labels.append(pool.labels[found.rows].masked_fill((found.rows < 0)[..., None], torch.nan))
        voters = torch.cat(similarity, 1).topk(min(self.voters, sum(s.shape[1] for s in similarity)), dim=1).indices
        votes = torch.cat(labels, 1).gather(1, voters[..., None].expand(-1, -1, queries.labels.shape[1]))
        return replace(queries, labels=(votes.nanmean(1) > 0.5).float().masked_fill(votes.isnan().all(1), torch.nan))

    def choose(self, queries: Queries, pool: Pool, count: int) -> Tensor:
        mine, theirs = _present_absent(queries.labels), _present_absent(pool.labels)
        known = mine.sum(1, keepdim=True)

        def bonus(start: int, stop: int) -> Tensor:
            # Similarities differ by two at most. Full agreement adds nothing, so that no digits of theirs are lost.
            return 3 * (mine @ theirs[start:stop].T - known)

        return pool.search.nearest(queries.features, count, queries.own, bonus).rows


class ReportRetriever(Retriever):
    """Studies whose reports are most similar to the query's, by TF-IDF.

    In training alone: in evaluation and prediction a study has no report, and its nearest studies by encoder features are
    taken, as `nearest` does.
    """

    def choose(self, queries: Queries, pool: Pool, count: int) -> Tensor:
        if not queries.training:
            return pool.search.nearest(queries.features, count, queries.own).rows
        wanted = min(count + queries.own.shape[1], len(pool))
        rows = pool.texts.similarity(queries.reports).topk(wanted, dim=1).indices.to(queries.own.device)
        refused = (rows[..., None] == queries.own[:, None]).any(2)
        return rows.gather(1, torch.argsort(refused.int(), dim=1, stable=True))[:, :count]


class HybridRetriever(Retriever):
    """Near studies that differ from one another, by maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998).

    Of the nearest, each next one has the largest lambda * similarity to the query - (1 - lambda) * largest similarity to
    those already taken.

    Args:
        relevance: lambda; 1 takes the nearest.
        among: nearest studies that are chosen from, at least as many as are taken.
    """

    def __init__(self, relevance: Annotated[float, Field(ge=0, le=1)] = 0.7, among: Positive = 24) -> None:
        self.relevance, self.among = relevance, among

    def choose(self, queries: Queries, pool: Pool, count: int) -> Tensor:
        near = pool.search.nearest(queries.features, min(max(self.among, count), len(pool)), queries.own)
        vectors = F.normalize(pool.features[near.rows].float(), dim=2)
        between = vectors @ vectors.transpose(1, 2)
        score = self.relevance * near.similarity
        # Own rows have no similarity, so that they are never the largest.
        repeated = torch.zeros_like(score)
        taken = []
        for step in range(count):
            value = score - (1 - self.relevance) * repeated
            best = value.argmax(1, keepdim=True)
            taken.append(best)
            score = score.scatter(1, best, -torch.inf)
            beside = between.gather(1, best[..., None].expand(-1, -1, between.shape[2]))[:, 0]
            repeated = beside if step == 0 else repeated.maximum(beside)
        return near.rows.gather(1, torch.cat(taken, 1)) if taken else near.rows[:, :0]


def _present_absent(labels: Tensor) -> Tensor:
    """(n, K) -> (n, 2 K): a product of two of them counts the labels in which they agree."""
    return torch.cat([labels == 1, labels == 0], 1).float()
