"""Classification: encoder and head, one logit a label."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from medxray.classify import HEADS
from medxray.data import Studies, StudyImages
from medxray.encoders import Encoder
from medxray.spec import Spec
from medxray.tasks import Task
from medxray.types import Batch, Prediction, SpecError
from medxray.visual import StudyCard


class Classify(Task):
    """Binary cross-entropy over the labels that are known to be present or absent; uncertain and missing ones
    count for nothing."""

    sections: ClassVar[dict[str, dict[str, Any] | None]] = {"encoder": None, "head": {"name": "linear"}}
    metrics = ("auroc", "average-precision")

    def __init__(self, spec: Spec, encoder: Encoder | None = None) -> None:
        super().__init__(spec, encoder)
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
            self.head = HEADS.build(self.spec.head, self.encoder.width, len(labels))

    def prepare(self, studies: Studies) -> None:
        super().prepare(studies)
        self._set_labels(self.labels)

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self._set_labels(self.labels)

    def items(self, batch: Batch) -> int:
        return int((batch.labels >= 0).sum())

    def logits(self, batch: Batch) -> Tensor:
        """(B, K)."""
        logits: Tensor = self.head(self.study_features(batch))
        return logits

    def forward(self, batch: Batch, items: Tensor | int | None = None) -> Tensor:
        logits = self.logits(batch).float()
        known = batch.labels >= 0
        losses = F.binary_cross_entropy_with_logits(logits, batch.labels.clamp(min=0).nan_to_num(0), reduction="none")
        return (losses * known).sum() / (items if items is not None else known.sum().clamp(min=1))

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

    def cards(
        self, images: StudyImages, predictions: Sequence[Prediction], train: StudyImages | None
    ) -> list[StudyCard]:
        truth = images.label_array(self.labels)
        return [
            StudyCard(
                study_id=prediction.study_id,
                images=[images.picture(i, v) for v in range(len(images.views[i]))],
                captions=list(images.views[i]),
                scores=prediction.scores,
                labels={
                    name: None if np.isnan(value) else int(value)
                    for name, value in zip(self.labels, truth[i], strict=True)
                },
            )
            for i, prediction in enumerate(predictions)
        ]
