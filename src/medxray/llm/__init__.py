"""Report decoders (visual tokens -> text) and the projectors that bring visual tokens into their width."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from medxray.registry import Registry
from medxray.types import RunError


class Generated(NamedTuple):
    """One decoded report.

    Attributes:
        text: as it is read.
        log_probabilities: of each of its tokens, the end sign with them.
        tokens: what each token adds to `text`, so that they join to it, "" for an end sign; () where not told.
    """

    text: str
    log_probabilities: list[float]
    tokens: Sequence[str] = ()


class StudyTexts(NamedTuple):
    """What a decoder may read of B studies beside their images; () stands for B empty ones.

    Attributes:
        indications: why each study was made.
        priors: the report of each patient's study before.
        context: for each study its context's reports, each after its pool: ("positive", "the heart is enlarged .").
    """

    indications: Sequence[str] = ()
    priors: Sequence[str] = ()
    context: Sequence[Sequence[tuple[str, str]]] = ()

    def one(self, study: int) -> "StudyTexts":
        """Those of one study."""
        own = slice(study, study + 1)
        return StudyTexts(self.indications[own], self.priors[own], self.context[own])


class ReportDecoder(nn.Module, ABC):
    """Writes a report about visual tokens. Takes (seed,); its vocabulary may be learned from training reports.

    Attributes:
        width: D of the visual tokens that it takes.
        frozen: True when none of its parameters are trained.
        reads_texts: True when `loss` and `generate` take `texts`; others are never given any.
        limit: where `cut` cuts a report, in words, such as "100 tokens".
    """

    width: int
    frozen: bool = False
    reads_texts: bool = False
    limit: str = ""

    def prepare(self, reports: Sequence[str]) -> None:
        """Learns what the decoder needs from the training reports, such as a vocabulary."""

    @abstractmethod
    def loss(
        self, visual: Tensor, context: Tensor | None, reports: Sequence[str], texts: StudyTexts | None = None
    ) -> Tensor:
        """Sum over all target tokens of -log p: visual (B, N, D), context (B, T, D) or None -> ()."""

    @abstractmethod
    def count(self, reports: Sequence[str]) -> int:
        """Target tokens that `loss` sums over."""

    def cut(self, reports: Sequence[str]) -> list[str]:
        """Reports as its training targets, cut at the token limit, read as text: what the releases score against.

        Raises:
            RunError: it learns reports of any length.
        """
        name = type(self).__name__
        raise RunError(f"protocol r2gen: decoder {name} has no token limit; take protocol full, or give it `cut` and `limit`")

    @abstractmethod
    def generate(
        self,
        visual: Tensor,
        context: Tensor | None,
        generation: Any,
        seeds: Sequence[int] = (),
        texts: StudyTexts | None = None,
    ) -> list[Generated]:
        """visual (B, N, D), context (B, T, D) or None, a `GenerationSpec`, a seed a study for sampling -> B reports."""

    def reading_lengths(self, texts: StudyTexts, studies: int) -> list[int]:
        """Tokens of a prompt that are each study's own words; all 0 for a decoder that reads no texts."""
        return [0] * studies

    def attend(
        self, visual: Tensor, context: Tensor | None, reports: Sequence[str], texts: StudyTexts | None = None
    ) -> list[Tensor] | None:
        """What each word of a report looked at in the image while it was written.

        Args:
            visual: (B, N, D).
            context: (B, T, D) or None.
            reports: what the decoder wrote about them.
            texts: what it read beside them, where it reads texts.
            texts: what it read beside the images.

        Returns:
            B tensors (words of `report.split()`, N) float32 whose rows sum to one; None where a decoder has no attention
            to its visual tokens.
        """
        return None

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

    def export(self, folder: Path) -> bool:
        """Writes the decoder as transformers reads it, with all that was learned; False where it has no place there."""
        return False


class Projector(nn.Module, ABC):
    """Visual tokens -> tokens of the decoder's width. Takes (in_width, out_width)."""

    @abstractmethod
    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, N, D_in) -> (B, N', D_out): what stands in the decoder's prompt as the image."""

    def on_grid(self, tokens: Tensor, grid: tuple[int, int] | None) -> Tensor:
        """As `forward`, for a projector that has to know where tokens lie.

        Args:
            tokens: (B, N, D_in); those of concatenated views follow one another.
            grid: (h, w) of one view, row by row; None for tokens that are no map.
        """
        image: Tensor = self(tokens)
        return image

    def grid(self, grid: tuple[int, int]) -> tuple[int, int] | None:
        """Where its tokens lie, row by row, when those of a view are a map (h, w); None when they are no map."""
        return grid

    @abstractmethod
    def project(self, pooled: Tensor) -> Tensor:
        """A global vector (..., D_in) -> (..., D_out), as context samples are projected."""


REPORT_DECODERS: Registry[ReportDecoder] = Registry(
    "report decoder",
    ReportDecoder,
    {
        "causal-lm": "medxray.llm.causal_lm:CausalLM",
        "memory-transformer": "medxray.llm.memory_transformer:MemoryTransformer",
    },
    group="medxray.report_decoders",
    context=("seed",),
)
PROJECTORS: Registry[Projector] = Registry(
    "projector",
    Projector,
    {
        "linear": "medxray.llm.projectors:LinearProjector",
        "linear-relu": "medxray.llm.projectors:LinearReLUProjector",
        "q-former": "medxray.llm.projectors:QFormerProjector",
        "pixel-shuffle": "medxray.llm.projectors:PixelShuffleProjector",
    },
    group="medxray.projectors",
    context=("in_width", "out_width"),
)
