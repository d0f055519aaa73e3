"""Which members of the pools a study gets."""

import torch
from torch import Tensor
from torch.nn import functional as F

from medxray.retrieval import Retriever


class FixedRetriever(Retriever):
    """R2GenCSR's release: the same few studies for every query, drawn once with the pools' seed.

    Unlike the release, a study of the query's own patient is passed over and the next one taken.
    """

    def candidates(self, pool: list[int], patients: list[str], count: int) -> list[int]:
        return pool[: count + 1]

    def choose(self, queries: Tensor, features: Tensor, allowed: Tensor, count: int) -> Tensor:
        places = torch.arange(features.shape[0], device=features.device)
        return torch.argsort(places + features.shape[0] * ~allowed, dim=1)[:, :count]


class NearestRetriever(Retriever):
    """The nearest studies of each pool by cosine similarity of pooled encoder features."""

    def choose(self, queries: Tensor, features: Tensor, allowed: Tensor, count: int) -> Tensor:
        similarity = F.normalize(queries.float(), dim=1) @ F.normalize(features.float(), dim=1).T
        return similarity.masked_fill(~allowed, -torch.inf).topk(count, dim=1).indices
