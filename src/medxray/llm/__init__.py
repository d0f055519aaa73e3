"""Report decoders (visual tokens -> text) and the projectors that bring visual tokens into their width."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from medxray.registry import Registry


class Generated(NamedTuple):
    """One decoded report: its text and the log-probability of each of its tokens."""

    text: str
    log_probabilities: list[float]


class ReportDecoder(nn.Module, ABC):
    """Writes a report about visual tokens. Takes (seed,); its vocabulary may be learned from training reports.

    Attributes:
        width: D of the visual tokens that it takes.
        frozen: True when none of its parameters are trained.
    """

    width: int
    frozen: bool = False

    def prepare(self, reports: Sequence[str]) -> None:
        """Learns what the decoder needs from the training reports, such as a vocabulary."""

    @abstractmethod
    def loss(self, visual: Tensor, context: Tensor | None, reports: Sequence[str]) -> Tensor:
        """Sum over all target tokens of -log p: visual (B, N, D), context (B, T, D) or None -> ()."""

    @abstractmethod
    def count(self, reports: Sequence[str]) -> int:
        """Target tokens that `loss` sums over."""

    @abstractmethod
    def generate(self, visual: Tensor, context: Tensor | None, generation: Any, seed: int = 0) -> list[Generated]:
        """visual (B, N, D), context (B, T, D) or None, a `GenerationSpec` -> B reports."""

    def wrap_context(self, vectors: Tensor, pool: str) -> Tensor:
        """Context vectors (B, n, D) of a pool inside its prompt: (B, n + k, D). No prompt by default."""
        return vectors

    def save(self, folder: Path) -> None:
        """Writes what `prepare` learned into a run folder."""

    def restore(self, folder: Path) -> None:
        """Reads it back."""

    def references(self) -> dict[str, str]:
        """Public weights that a run folder names instead of copying: name -> SHA-256."""
        return {}

    def copy_public(self, folder: Path) -> None:
        """Writes those weights into a folder that a spec can name in their place."""


class Projector(nn.Module, ABC):
    """Visual tokens -> tokens of the decoder's width. Takes (in_width, out_width)."""

    @abstractmethod
    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, N, D_in) -> (B, N', D_out): what stands in the decoder's prompt as the image."""

    @abstractmethod
    def project(self, pooled: Tensor) -> Tensor:
        """A global vector (..., D_in) -> (..., D_out), as context samples are projected."""


REPORT_DECODERS: Registry[ReportDecoder] = Registry(
    "report decoder",
    ReportDecoder,
    {"causal-lm": "medxray.llm.causal_lm:CausalLM"},
    group="medxray.report_decoders",
    context=("seed",),
)
PROJECTORS: Registry[Projector] = Registry(
    "projector",
    Projector,
    {"linear": "medxray.llm.projectors:LinearProjector"},
    group="medxray.projectors",
    context=("in_width", "out_width"),
)
