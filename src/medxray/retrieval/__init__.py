"""Context samples from the training set: who may be context, which are taken, and what becomes of them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from pydantic import Field
from torch import Tensor

from medxray.registry import Registry, Settings
from medxray.retrieval.pools import PoolSettings
from medxray.retrieval.search import ExactSearch
from medxray.retrieval.texts import TextIndex
from medxray.types import Context

Residual = Literal["release", "after_projection", "before_projection", "none"]


class RetrieverSettings(Settings):
    """What a spec may say of any retriever beside its own settings."""

    positives: int = Field(3, ge=0, description="diseased context studies for each study")
    negatives: int = Field(3, ge=0, description="normal context studies for each study")
    pools: PoolSettings = Field(PoolSettings(), description="how the training set is split in two pools")
    context_text: bool = Field(
        False, strict=True, description="give the context's reports to the language model as text as well"
    )
    residual: Residual = Field("release", description="what becomes of a context vector")
    refresh: int = Field(
        0,
        ge=0,
        description="steps between two computations of the context's features while the encoder learns, 0 for refresh_epochs; "
        "each is a pass over all studies that may be context, which is the whole training set but for fixed",
    )
    refresh_epochs: float = Field(1.0, gt=0, description="the same in epochs, where refresh is 0")
    index: Literal["exact", "faiss"] = Field(
        "exact", description="how the nearest are searched; faiss is approximate and says its recall in the log"
    )
    index_from: int = Field(100_000, ge=1, description="studies of a pool below which faiss is not used")
    recall: float = Field(0.95, gt=0, le=1, description="share of the true nearest that faiss has to find")


@dataclass
class Queries:
    """What is known of B studies that want context.

    Attributes:
        features: (B, D) pooled encoder features.
        own: (B, E) int64, rows of the pool that are the study itself or its patient's; -1 stands for none.
        seeds: one a study, in training one a study and epoch.
        labels: (B, K) 1 present, 0 absent, NaN uncertain or missing; in training alone, else all NaN.
        reports: in training alone, else empty strings.
    """

    features: Tensor
    own: Tensor
    seeds: Sequence[int]
    labels: Tensor
    reports: Sequence[str]

    @property
    def training(self) -> bool:
        """Whether labels and reports are told."""
        return any(self.reports)


@dataclass
class Pool:
    """The n training studies of one pool.

    Attributes:
        features: (n, D) pooled encoder features.
        labels: (n, K) as of `Queries`.
        reports: their texts.
        search: the nearest of them.
    """

    features: Tensor
    labels: Tensor
    reports: Sequence[str]
    search: ExactSearch

    def __len__(self) -> int:
        return len(self.reports)

    @cached_property
    def texts(self) -> TextIndex:
        """Their reports, to be searched by similarity."""
        return TextIndex(self.reports)


class Retriever(ABC):
    """Chooses context studies from a bank of training features. A study is never its own context, nor is
    another study of its patient."""

    def candidates(
        self, pool: list[int], patients: Sequence[str], count: int, settings: PoolSettings
    ) -> list[int]:
        """Which members of a pool the bank has to hold, best first; all of them unless a retriever needs fewer.

        Args:
            pool: rows of the training set.
            patients: the patient of every row of the training set.
            count: how many are taken for each study.
            settings: of the pools.
        """
        return pool

    def complete(self, queries: Queries, pools: Sequence[tuple[Pool, Tensor]]) -> Queries:
        """Fills in what the retriever wants to know of the queries from all pools, each with the queries' own rows (B, E) of
        it; called before `choose`."""
        return queries

    @abstractmethod
    def choose(self, queries: Queries, pool: Pool, count: int) -> Tensor:
        """Rows of a pool for each query: (B, count) int64, best first, none of them in `queries.own`."""


RETRIEVERS: Registry[Retriever] = Registry(
    "retriever",
    Retriever,
    {
        "fixed": "medxray.retrieval.retrievers:FixedRetriever",
        "random": "medxray.retrieval.retrievers:RandomRetriever",
        "nearest": "medxray.retrieval.retrievers:NearestRetriever",
        "label": "medxray.retrieval.retrievers:LabelRetriever",
        "report": "medxray.retrieval.retrievers:ReportRetriever",
        "hybrid": "medxray.retrieval.retrievers:HybridRetriever",
    },
    group="medxray.retrievers",
    settings=RetrieverSettings,
)

__all__ = ["RETRIEVERS", "Context", "Pool", "PoolSettings", "Queries", "Residual", "Retriever", "RetrieverSettings"]
