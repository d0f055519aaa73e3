"""Features of the training studies that may be context, kept with the weights that made them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medxray.retrieval import Retriever, RetrieverSettings, pools
from medxray.types import Context, SpecError


class FeatureBank(nn.Module):
    """Pooled features of both pools, and the choice of context from them.

    Part of the model's state: a checkpoint holds the features as they were, so that a resumed run is equal to
    an unbroken one and a loaded model needs no training data. Memory: 4 * n * D bytes.

    Args:
        retriever: what chooses.
        settings: how many, from which pools.
        width: D of the encoder.
    """

    features: Tensor

    def __init__(self, retriever: Retriever, settings: RetrieverSettings, width: int) -> None:
        super().__init__()
        self.retriever = retriever
        self.settings = settings
        self.width = width
        self.study_ids: list[str] = []
        self.patient_ids: list[str] = []
        self.positives = 0

    def fill(
        self,
        study_ids: Sequence[str],
        patient_ids: Sequence[str],
        reports: Sequence[str],
        labels: Sequence[dict[str, int | None]],
    ) -> list[int]:
        """Decides which of n training studies may be context. Returns their rows, diseased first.

        Raises:
            SpecError: a pool is smaller than the number asked for.
        """
        settings, patients = self.settings, list(patient_ids)
        rows: list[int] = []
        for name, pool, count in zip(
            ("diseased", "normal"),
            pools.split(settings.pools, reports, labels),
            (settings.positives, settings.negatives),
            strict=True,
        ):
            size = settings.pools.size if settings.name == "fixed" else len(pool)
            chosen = pools.draw(pool, patients, size, settings.pools.seed) if settings.name == "fixed" else pool
            chosen = self.retriever.candidates(chosen, patients, count)
            if len({patients[row] or study_ids[row] for row in chosen}) < count + 1 and count:
                raise SpecError(
                    f"retriever: {count} {name} context studies were asked for, which takes {count + 1} {name} "
                    f"patients in the training set; found {len({patients[r] or study_ids[r] for r in chosen})}"
                )
            if name == "diseased":
                self.positives = len(chosen)
            rows += chosen
        self.restore({
            "study_ids": [study_ids[row] for row in rows],
            "patient_ids": [patients[row] for row in rows],
            "positives": self.positives,
        })
        return rows

    def state(self) -> dict[str, object]:
        """Names of the members, for a run folder."""
        return {"study_ids": self.study_ids, "patient_ids": self.patient_ids, "positives": self.positives}

    def restore(self, state: dict[str, object]) -> None:
        """The inverse of `state`; features follow with the weights."""
        self.study_ids = list(state["study_ids"])  # type: ignore[call-overload]
        self.patient_ids = list(state["patient_ids"])  # type: ignore[call-overload]
        self.positives = int(state["positives"])  # type: ignore[call-overload]
        self.register_buffer("features", torch.zeros(len(self.study_ids), self.width))

    def forward(self, queries: Tensor, study_ids: Sequence[str], patient_ids: Sequence[str]) -> Context:
        """Context for B studies with pooled features `queries` (B, D).

        Raises:
            RuntimeError: a study would be its own context; never happens, but is checked at run time.
        """
        allowed = self._allowed(study_ids, patient_ids).to(queries.device)
        features = self.features.to(queries.dtype)
        taken: list[Tensor] = []
        for start, stop, count in (
            (0, self.positives, self.settings.positives),
            (self.positives, len(self.study_ids), self.settings.negatives),
        ):
            if count == 0:
                taken.append(torch.zeros(len(study_ids), 0, dtype=torch.long, device=queries.device))
                continue
            rows = self.retriever.choose(queries.detach(), features[start:stop], allowed[:, start:stop], count)
            taken.append(rows + start)
        both = torch.cat(taken, 1)
        if not bool(allowed.gather(1, both).all()):
            raise RuntimeError("a study was chosen as its own context, or another study of its patient")
        ids = [[self.study_ids[i] for i in row] for row in both.tolist()]
        n = self.settings.positives
        return Context(
            features[taken[0]], features[taken[1]], [row[:n] for row in ids], [row[n:] for row in ids]
        )

    def _allowed(self, study_ids: Sequence[str], patient_ids: Sequence[str]) -> Tensor:
        codes = {name: i for i, name in enumerate(dict.fromkeys(p for p in self.patient_ids if p))}
        members = torch.tensor([codes.get(p, -1) for p in self.patient_ids])
        queries = torch.tensor([codes.get(p, -2) for p in patient_ids])
        studies = {name: i for i, name in enumerate(self.study_ids)}
        own = torch.tensor([studies.get(s, -1) for s in study_ids])
        same_study = own[:, None] == torch.arange(len(self.study_ids))[None]
        return ~((queries[:, None] == members[None]) | same_study)
