"""Classification: encoder and head, one logit a label."""

import functools
from collections.abc import Collection, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from medxray.classify import HEADS, HeadSettings, JoiningHead, MemoryHead
from medxray.classify.losses import label_losses, positive_rates
from medxray.data import Studies, StudyImages, seed_of
from medxray.encoders import Encoder, JoinableEncoder
from medxray.metrics.calibration import reliability
from medxray.metrics.classification import undefined
from medxray.spec import Spec
from medxray.tasks import Task, join_views
from medxray.types import Batch, Features, Prediction, Scores, SpecError
from medxray.visual import StudyCard
from medxray.visual.charts import reliability_chart

CURVES = 23
"""Labels at most whose reliability curves are drawn, beside that of all."""


class Classify(Task):
    """Binary cross-entropy, or the head's other `loss`, over the labels that are known to be present or absent; uncertain
    and missing ones count for nothing.

    Attributes:
        rates: for each label the share of the training studies that have it, among those for which it is known.
        members: how many training studies the head keeps.
        joined: the head's tokens go through the encoder's last block; `encode` then stops before it.
    """

    sections: ClassVar[dict[str, dict[str, Any] | None]] = {"encoder": None, "head": {"name": "linear"}}
    metrics = ("auroc", "average-precision", "f1", "sensitivity", "ece", "brier")

    def __init__(self, spec: Spec, encoder: Encoder | None = None) -> None:
        super().__init__(spec, encoder)
        assert isinstance(spec.head, HeadSettings)
        self.exponential = spec.head.loss == "exponential"
        self.rates: list[float] = []
        self.members = 0
        self.joined = False
        if issubclass(HEADS.get(spec.head.name), MemoryHead) and not self.frozen_encoder:
            raise SpecError(
                f"head.name: {spec.head.name!r} keeps features of the training studies, which must not change; set "
                "encoder.trainable: false"
            )
        if spec.data.labels:
            self._set_labels(list(spec.data.labels))

    def _set_labels(self, labels: list[str]) -> None:
        assert self.spec.head is not None
        if not labels:
            raise SpecError(
                f"task classify: reader {self.spec.data.reader.name!r} gives no labels; "
                "use a data set with label columns"
            )
        self.labels = labels
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.spec.seed)
            head = HEADS.build(self.spec.head, self.encoder.width, len(labels))
        if isinstance(head, JoiningHead) and isinstance(self.encoder, JoinableEncoder) and not self.frozen_encoder:
            head.join()
            self.joined = True
        if isinstance(head, MemoryHead):
            head.reserve(self.members)
        device = next((p.device for p in self.encoder.parameters()), torch.device("cpu"))
        self.head = head.to(device)

    def prepare(self, studies: Studies) -> None:
        super().prepare(studies)
        train = studies.splits["train"]
        self.members = len(train)
        self._set_labels(self.labels)
        rows = [[row[label] for label in self.labels] for row in train["labels"]]
        values = torch.tensor([[torch.nan if v is None else v for v in row] for row in rows], dtype=torch.float32)
        self.rates = positive_rates(values).tolist()
        self.head.read_labels(self.labels)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "rates": self.rates, "members": self.members}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        # Runs of before have neither.
        self.rates, self.members = state.get("rates", []), state.get("members", 0)
        self._set_labels(self.labels)

    @torch.no_grad()
    def watch(self, images: StudyImages) -> None:
        if not isinstance(self.head, MemoryHead):
            return
        self.eval()
        device = next(self.encoder.parameters()).device
        pooled, owners = [], []
        for batch in images.still().batches(self.spec.training.batch_size):
            pooled.append(self.study_features(batch.to(device)).pooled.float())
            owners.append(self._owners(batch))
        labels = torch.from_numpy(images.label_array(self.labels))
        self.head.fill(torch.cat(pooled), labels.to(device), torch.cat(owners))

    def items(self, batch: Batch) -> int:
        return int((batch.labels >= 0).sum())

    def encode(self, batch: Batch) -> Features:
        """As in `Task`; where the head is joined, before the encoder's last block and with all of its tokens."""
        if not self.joined:
            return super().encode(batch)
        assert isinstance(self.encoder, JoinableEncoder)
        B, V = batch.pixels.shape[:2]
        flat = self.encoder.before_last(batch.pixels.flatten(0, 1))
        return Features(flat.tokens.unflatten(0, (B, V)), flat.grid, flat.pooled.unflatten(0, (B, V)))

    def logits(self, batch: Batch) -> Tensor:
        """(B, K)."""
        features = self.encode(batch)
        study = join_views(features, batch.view_mask, self.spec.data.views)
        if isinstance(self.head, MemoryHead):
            logits: Tensor = self.head(study, self._owners(batch))
        elif self.joined:
            assert isinstance(self.encoder, JoinableEncoder) and features.grid is not None
            logits = self.head(study, functools.partial(self.encoder.last, study.tokens, features.grid))
        else:
            logits = self.head(study)
        return logits

    def _owners(self, batch: Batch) -> Tensor:
        """Whose studies they are, as numbers (B,); a study without a patient is one of its own."""
        owners = [
            seed_of("patient", patient) if patient else seed_of("study", study)
            for study, patient in zip(batch.study_ids, batch.patient_ids, strict=True)
        ]
        return torch.tensor(owners, dtype=torch.int64, device=batch.view_mask.device)

    def forward(self, batch: Batch, items: Tensor | int | None = None) -> Tensor:
        logits = self.logits(batch).float()
        rates = torch.tensor(self.rates, device=logits.device) if self.exponential else None
        losses = label_losses(logits, batch.labels, rates)
        return losses.sum() / (items if items is not None else (batch.labels >= 0).sum().clamp(min=1))

    def predict(self, batch: Batch) -> list[Prediction]:
        probabilities = self.logits(batch).float().sigmoid().tolist()
        return [
            Prediction(name, scores=dict(zip(self.labels, row, strict=True)))
            for name, row in zip(batch.study_ids, probabilities, strict=True)
        ]

    def targets(self, images: StudyImages) -> list[Any]:
        values: np.ndarray = images.label_array(self.labels)
        return [row.tolist() for row in np.where(values >= 0, values, np.nan)]

    def outputs(self, predictions: Sequence[Prediction]) -> list[list[float]]:
        return [[prediction.scores[name] for name in self.labels] for prediction in predictions]

    def notes(self, predictions: Sequence[Prediction], scores: Scores) -> list[str]:
        by_labels: dict[tuple[str, ...], list[str]] = {}
        for measure, labels in undefined({name: score.value for name, score in scores.items()}).items():
            by_labels.setdefault(tuple(labels), []).append(measure)
        return [
            f"{', '.join(measures)}: the mean of {len(self.labels) - len(labels)} of {len(self.labels)} labels; undefined, for "
            f"want of studies with them or without: {', '.join(labels)}"
            for labels, measures in by_labels.items()
        ]

    def calibration(self, outputs: Sequence[Any], targets: Sequence[Any]) -> list[str]:
        probabilities, truth = np.array(outputs), np.array(targets)
        present = np.nansum(truth, axis=0)
        # Of many labels those that most studies have.
        often = sorted(np.argsort(-present, kind="stable")[:CURVES].tolist())
        curves = {self.labels[k]: reliability(probabilities[:, k], truth[:, k]) for k in often if present[k]}
        if len(self.labels) > 1:
            curves = {"all labels": reliability(probabilities.ravel(), truth.ravel())} | curves
        return [reliability_chart(name, curve) for name, curve in curves.items()]

    def cards(
        self, images: StudyImages, predictions: Sequence[Prediction], train: StudyImages | None, explained: Collection[int]
    ) -> Iterator[StudyCard]:
        truth = images.label_array(self.labels)
        for i, prediction in enumerate(predictions):
            yield StudyCard(
                study_id=prediction.study_id,
                images=[images.picture(i, v) for v in range(len(images.views[i]))],
                captions=list(images.views[i]),
                scores=prediction.scores,
                labels={
                    name: None if np.isnan(value) else int(value)
                    for name, value in zip(self.labels, truth[i], strict=True)
                },
            )
