"""Report generation: encoder, projector, context samples, language model (R2GenGPT; with a retriever, R2GenCSR)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from medxray.data import Studies, StudyImages
from medxray.encoders import Encoder
from medxray.llm import PROJECTORS, REPORT_DECODERS
from medxray.metrics.intervals import distinct_share
from medxray.retrieval import RETRIEVERS, RetrieverSettings
from medxray.retrieval.bank import FeatureBank
from medxray.retrieval.context import context_tokens
from medxray.spec import GenerationSpec, Spec
from medxray.tasks import Task
from medxray.types import Batch, Prediction, Scores, SpecError
from medxray.visual import ContextCard, StudyCard

DISTINCT_WARNING = 0.1


class Report(Task):
    """Image tokens and context in a language model's prompt; the loss is the mean over report tokens."""

    sections: ClassVar[dict[str, dict[str, Any] | None]] = {
        "encoder": None,
        "projector": {"name": "linear"},
        "retriever": {},
        "decoder": None,
    }
    metrics = ("bleu", "rouge-l", "cider")
    reports = True

    def __init__(self, spec: Spec, encoder: Encoder | None = None) -> None:
        super().__init__(spec, encoder)
        assert spec.decoder is not None and spec.projector is not None
        self.decoder = REPORT_DECODERS.build(spec.decoder, spec.seed)
        self.projector = PROJECTORS.build(spec.projector, self.encoder.width, self.decoder.width)
        self.generation: GenerationSpec = spec.generation or GenerationSpec()
        self.bank: FeatureBank | None = None
        if spec.retriever is not None:
            settings = spec.retriever
            assert isinstance(settings, RetrieverSettings)
            self.bank = FeatureBank(RETRIEVERS.build(settings), settings, self.encoder.width)
        self._context_images: StudyImages | None = None
        self._context_batches: list[Batch] = []

    def prepare(self, studies: Studies) -> None:
        super().prepare(studies)
        train = studies.splits["train"]
        self.decoder.prepare(train["report"])
        if self.bank is not None:
            labels = [dict(row) for row in train["labels"]]
            self.bank.fill(train["study_id"], train["patient_id"], train["report"], labels)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "bank": self.bank.state() if self.bank is not None else None}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        if self.bank is not None:
            self.bank.restore(state["bank"])

    def save_files(self, folder: Path) -> None:
        super().save_files(folder)
        self.decoder.save(folder)

    def restore(self, folder: Path) -> None:
        super().restore(folder)
        self.decoder.restore(folder)

    def references(self) -> dict[str, str]:
        return self.decoder.references()

    def copy_public(self, folder: Path) -> dict[str, Any]:
        if not self.decoder.references():
            return {}
        self.decoder.copy_public(folder / "public" / "decoder")
        return {"decoder": {"model": "./public/decoder"}}

    def frozen_public(self) -> tuple[str, ...]:
        return ("decoder.",) if self.decoder.references() else ()

    def watch(self, images: StudyImages) -> None:
        if self.bank is not None:
            places = {name: i for i, name in enumerate(images.study_ids)}
            rows = [places[name] for name in self.bank.study_ids]
            self._context_images = images.still(rows)
            self._context_batches = []

    def before_step(self, step: int, steps_per_epoch: int) -> None:
        if self.bank is None:
            return
        every = self.bank.settings.refresh or steps_per_epoch
        if step % every == 0 and (step == 0 or not self.frozen_encoder):
            self.refresh()

    def after_fit(self) -> None:
        if self.bank is not None and self._context_images is not None:
            self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Computes the bank's features anew with the encoder as it is."""
        assert self.bank is not None and self._context_images is not None
        training = self.training
        self.eval()
        device = self.bank.features.device
        size = self.spec.training.batch_size
        batches = self._context_batches or list(self._context_images.batches(size))
        # A handful of images stays decoded between refreshes; a whole training set does not.
        if len(self._context_images) <= 4 * size:
            self._context_batches = batches
        pooled = [self.study_features(batch.to(device)).pooled.float() for batch in batches]
        self.bank.features.copy_(torch.cat(pooled))
        self.train(training)

    def items(self, batch: Batch) -> int:
        return self.decoder.count(batch.reports)

    def forward(self, batch: Batch, items: Tensor | int | None = None) -> Tensor:
        visual, context, _ = self.inputs(batch)
        total = self.decoder.loss(visual, context, batch.reports)
        return total / (items if items is not None else max(1, self.items(batch)))

    def inputs(
        self, batch: Batch, with_context: bool = True
    ) -> tuple[Tensor, Tensor | None, list[dict[str, list[str]]]]:
        """Image tokens (B, N, D) and context tokens (B, T, D) in the decoder's width, and who the context is."""
        features = self.study_features(batch)
        visual = self.projector(features.tokens)
        nobody: list[dict[str, list[str]]] = [{} for _ in batch.study_ids]
        if self.bank is None or not with_context:
            return visual, None, nobody
        context = self.bank(features.pooled, batch.study_ids, batch.patient_ids)
        tokens = context_tokens(
            self.bank.settings.residual, features.pooled, context, self.projector.project, self.decoder.wrap_context
        )
        who = [
            {"positive": p, "negative": n}
            for p, n in zip(context.positive_ids, context.negative_ids, strict=True)
        ]
        return visual, tokens, who

    def predict(self, batch: Batch, with_context: bool = True) -> list[Prediction]:
        visual, context, who = self.inputs(batch, with_context)
        generated = self.decoder.generate(visual, context, self.generation, self.spec.seed)
        return [
            Prediction(name, text=report.text, context=ids, log_probabilities=report.log_probabilities)
            for name, report, ids in zip(batch.study_ids, generated, who, strict=True)
        ]

    def targets(self, images: StudyImages) -> list[str]:
        return list(images.reports)

    def outputs(self, predictions: Sequence[Prediction]) -> list[str]:
        return [prediction.text for prediction in predictions]

    def floors(self, train: StudyImages, val: StudyImages, images: StudyImages) -> dict[str, list[str]]:
        from medxray.metrics.text import best_constant

        n, reports = len(images), list(train.reports)
        counts: dict[str, int] = {}
        for report in reports:
            counts[report] = counts.get(report, 0) + 1
        nearest = nearest_pixels(train.thumbnails(), images.thumbnails())
        return {
            "best constant report": [best_constant(reports, list(val.reports))] * n,
            "most frequent report": [max(counts, key=lambda report: counts[report])] * n,
            "nearest image's report": [reports[i] for i in nearest],
        }

    def ablations(self) -> dict[str, Callable[[Batch], list[Prediction]]]:
        if self.bank is None:
            return {}
        return {"same model, context off": lambda batch: self.predict(batch, with_context=False)}

    def notes(self, predictions: Sequence[Prediction], scores: Scores) -> list[str]:
        share = distinct_share([prediction.text for prediction in predictions])
        notes = [f"{share:.0%} of the predictions are distinct"]
        if share < DISTINCT_WARNING and len(predictions) > 1:
            notes.append("Warning: the model says nearly the same of every study; its scores tell little")
        for metric in scores:
            above = [
                row for row, values in scores.comparisons.items()
                if row in ("best constant report", "most frequent report", "nearest image's report")
                and metric in values and values[metric].value >= scores[metric].value
            ]
            if above:
                notes.append(f"Warning: {metric} is not above {' and '.join(above)}")
        return notes

    def cards(
        self, images: StudyImages, predictions: Sequence[Prediction], train: StudyImages | None
    ) -> list[StudyCard]:
        places = {name: i for i, name in enumerate(train.study_ids)} if train is not None else {}

        def card(name: str, pool: str) -> ContextCard:
            if train is None or name not in places:
                return ContextCard(name, pool, None, "")
            return ContextCard(name, pool, train.picture(places[name], 0), train.reports[places[name]])

        return [
            StudyCard(
                study_id=prediction.study_id,
                images=[images.picture(i, v) for v in range(len(images.views[i]))],
                captions=list(images.views[i]),
                reference=images.reports[i],
                prediction=prediction.text,
                context=[
                    card(name, {"positive": "diseased", "negative": "normal"}[pool])
                    for pool, names in prediction.context.items()
                    for name in names
                ],
            )
            for i, prediction in enumerate(predictions)
        ]


def nearest_pixels(train: np.ndarray, queries: np.ndarray) -> list[int]:
    """For each of B thumbnails (B, P) the training thumbnail (n, P) at the smallest squared distance."""
    if len(train) == 0:
        raise SpecError("data: no training studies to compare with")
    squared = (train**2).sum(1)[None] - 2 * queries @ train.T
    return [int(i) for i in squared.argmin(1)]
