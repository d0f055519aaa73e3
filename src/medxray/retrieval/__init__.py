"""Context samples from the training set: who may be context, which are taken, and what becomes of them."""

from abc import ABC, abstractmethod
from typing import Literal

from pydantic import Field
from torch import Tensor

from medxray.registry import Registry, Settings
from medxray.retrieval.pools import PoolSettings
from medxray.types import Context

Residual = Literal["release", "after_projection", "before_projection"]


class RetrieverSettings(Settings):
    """What a spec may say of any retriever beside its own settings."""

    positives: int = Field(3, ge=0, description="diseased context studies for each study")
    negatives: int = Field(3, ge=0, description="normal context studies for each study")
    pools: PoolSettings = Field(PoolSettings(), description="how the training set is split in two pools")
    residual: Residual = Field("release", description="what becomes of a context vector")
    refresh: int = Field(
        0, ge=0, description="context features are computed anew every so many steps; 0 is once an epoch"
    )


class Retriever(ABC):
    """Chooses context studies from a bank of training features. A study is never its own context, nor is
    another study of its patient."""

    def candidates(self, pool: list[int], patients: list[str], count: int) -> list[int]:
        """Which members of a pool the bank has to hold, best first; all of them unless a retriever needs fewer.

        Args:
            pool: rows of the training set.
            patients: the patient of every row of the training set.
            count: how many are taken for each study.
        """
        return pool

    @abstractmethod
    def choose(self, queries: Tensor, features: Tensor, allowed: Tensor, count: int) -> Tensor:
        """Rows of the bank for each query.

        Args:
            queries: (B, D) pooled features of the studies.
            features: (n, D) pooled features of one pool.
            allowed: (B, n) bool, False where the patient is the query's own.
            count: how many to take.

        Returns:
            (B, count) int64 rows, best first.
        """


RETRIEVERS: Registry[Retriever] = Registry(
    "retriever",
    Retriever,
    {
        "fixed": "medxray.retrieval.retrievers:FixedRetriever",
        "nearest": "medxray.retrieval.retrievers:NearestRetriever",
    },
    group="medxray.retrievers",
    settings=RetrieverSettings,
)

__all__ = ["RETRIEVERS", "Context", "PoolSettings", "Residual", "Retriever", "RetrieverSettings"]
