"""Which parts a task wires together, its loss, its predictions and its scores. A new task is one more file."""

import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medxray import disk
from medxray.adapters import adapt, unadapted
from medxray.data import Studies, StudyImages
from medxray.data.transforms import height_width
from medxray.encoders import ENCODERS, Encoder, freeze, tried
from medxray.metrics.floors import Floor
from medxray.registry import Registry
from medxray.spec import Spec
from medxray.types import Batch, Features, Prediction, RunError, Scores, SpecError
from medxray.visual import StudyCard
from medxray.weights import load_encoder
from medxray.weights.systems import holds_encoder
from medxray.weights.writing import export

Loader = Callable[[StudyImages], Sequence[Batch]]


class Task(nn.Module, ABC):
    """A model with what it learns from and how it is judged.

    Built from a spec alone; `prepare` (with the training studies) or `restore` (from a run folder) then gives it
    what a spec cannot know, such as a vocabulary or the names of the labels.

    Attributes:
        sections: the spec's sections that the task uses, each with the part that it takes when the spec
            names none: None where one must be named, {} where the section may be absent.
        metrics: names of the metrics when a spec lists none.
        reports: whether every study must have a report.
        repeats: how many times a step learns from each of its studies, as when an image gets several masks.
        segment: pixels (1, H, W) and view -> (s, t) coverage by the chest, for tasks that want regions; None for others.
        grid: (h, w) tokens of an image, with `segment`.
    """

    sections: ClassVar[dict[str, dict[str, Any] | None]]
    metrics: ClassVar[tuple[str, ...]]
    reports: ClassVar[bool] = False
    repeats: int = 1
    segment: Callable[[NDArray[np.float32], str], Tensor] | None = None
    grid: tuple[int, int] | None = None

    def __init__(self, spec: Spec, encoder: Encoder | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = encoder if encoder is not None else build_encoder(spec)
        if encoder is not None and self.frozen_encoder:
            freeze(encoder)
        self.labels: list[str] = []
        self.views = 1

    @property
    def frozen_encoder(self) -> bool:
        """True when image features never change, so that they are computed once."""
        return self.spec.encoder is not None and not getattr(self.spec.encoder, "trainable", True)

    @property
    def learner(self) -> nn.Module | None:
        """What a step runs over images (B, C, H, W), with `channels`; None where a step takes more than images."""
        return None

    def learner_says(self, output: Any) -> dict[str, str]:
        """What `medxray show` tells of the learner's output beside its cost."""
        return {}

    def train(self, mode: bool = True) -> "Task":
        super().train(mode)
        if self.frozen_encoder:
            self.encoder.eval()
        return self

    def prepare(self, studies: Studies) -> None:
        """Learns what only the training studies can tell."""
        self.labels, self.views = list(studies.labels), studies.views

    def state(self) -> dict[str, Any]:
        """What `prepare` found, as plain values for `task.json`."""
        return {"labels": self.labels, "views": self.views}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.labels, self.views = list(state["labels"]), int(state["views"])

    def begin_with(self, source: str) -> None:
        """Loads another project's checkpoint of the whole system, once prepared.

        Raises:
            WeightsError: it does not fit.
            SpecError: there are none for this task.
        """
        raise SpecError(
            f"weights: there are no checkpoints of whole systems for task {self.spec.task}; encoder.weights takes an encoder's"
        )

    @property
    def needs_studies(self) -> bool:
        """False where the model can be used without ever having seen the training studies."""
        return True

    def save_files(self, folder: Path) -> None:
        """Writes `state` and any files beside it into a run folder."""
        disk.write(folder / "task.json", json.dumps(self.state(), indent=1))

    def restore(self, folder: Path) -> None:
        """Reads what `save_files` wrote.

        Raises:
            RunError: the folder is not that of a finished fit.
        """
        path = folder / "task.json"
        if not path.is_file():
            raise RunError(f"run folder {folder} has no task.json; fit it first, or name a folder that medxray saved")
        try:
            self.load_state(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{path} cannot be read ({error}); restore it, or fit again") from error

    def references(self) -> dict[str, str]:
        """Public weights that a run folder names instead of copying: name -> SHA-256."""
        return {}

    def copy_public(self, folder: Path) -> dict[str, Any]:
        """Copies the weights that `references` names into a folder; returns the overrides that make a spec use them."""
        return {}

    def frozen_public(self) -> tuple[str, ...]:
        """Prefixes of parameters that `references` can bring back."""
        return ()

    def check_encoder(self) -> None:
        """Tries the encoder on one black image, before anything of a run is written.

        Raises:
            SpecError: it fails, or what it returns disagrees with what it declares.
        """
        check_features(tried(self.encoder, *height_width(self.spec.data.image_size)), self.encoder)

    def export(self, folder: Path, format: str | None) -> bool:
        """Writes what other libraries can read of the model into a folder.

        Args:
            folder: gets it.
            format: timm or transformers; None takes what suits the task.

        Returns:
            False, and nothing is written, where no format was named and none has a place for the model.

        Raises:
            WeightsError: the format has no place for it.
        """
        export(self.plain_encoder(), folder, format or "timm", self.spec.data.image_size)  # type: ignore[arg-type]
        return True

    def plain_encoder(self) -> nn.Module:
        """The encoder, or one without adapters that computes the same."""
        settings: Any = getattr(self.spec.encoder, "lora", None)
        return unadapted(self.encoder, settings) if settings is not None else self.encoder

    def complete(self, images: StudyImages, *, progress: bool = False) -> None:
        """Adds to the images of a split what the task wants beside their pixels, such as where the chest is."""

    def watch(self, images: StudyImages) -> None:
        """Gets the training images before a fit, for tasks that look at them beside the batch."""

    def before_step(self, step: int, steps_per_epoch: int) -> None:
        """Called before each optimiser step while fitting."""

    def looks_before(self, step: int, steps_per_epoch: int) -> bool:
        """Whether `before_step` runs the model, whose weights are then gathered where they are divided among processes."""
        return False

    def logged(self) -> dict[str, float]:
        """What belongs in the log beside the loss since it was last asked."""
        return {}

    def after_fit(self) -> None:
        """Called once with the chosen weights in place."""

    @abstractmethod
    def items(self, batch: Batch) -> int:
        """What the loss of a batch is a mean over: studies, labels or tokens."""

    @abstractmethod
    def forward(self, batch: Batch, items: Tensor | int | None = None) -> Tensor:
        """The loss () of a batch, a sum over its items divided by `items` (its own number of them if None)."""

    @abstractmethod
    def predict(self, batch: Batch) -> list[Prediction]:
        """One prediction a study. Leaves the model as it is."""

    def prediction_order(self, images: StudyImages) -> Sequence[int]:
        """Rows of the studies in the order in which a data set is best predicted; that of the data set by default."""
        return range(len(images))

    @abstractmethod
    def targets(self, images: StudyImages) -> list[Any]:
        """References of the studies, in the form that the task's metrics take."""

    def as_scored(self, targets: list[Any], protocol: str | None) -> tuple[list[Any], str]:
        """What `targets` returned as a protocol scores it, and the protocol in words; None is the task's usual one.

        Raises:
            SpecError: it is unknown, or the task has no choice.
            RunError: the model cannot follow it.
        """
        if protocol is not None:
            raise SpecError(f"protocol {protocol!r}: task {self.spec.task} writes no reports, so there is none; leave it out")
        return targets, ""

    @abstractmethod
    def outputs(self, predictions: Sequence[Prediction]) -> list[Any]:
        """Predictions in the form that the task's metrics take."""

    def floors(
        self, train: StudyImages, val: StudyImages, images: StudyImages, references: list[Any] | None = None
    ) -> dict[str, Floor]:
        """Systems that a fit must beat: row of the table -> what it says of each study of `images` by a metric's value.

        Whatever a floor chooses, it chooses from `train` and by `val`, whose references, if given, are taken as they are
        scored. It is judged by metrics that choose nothing themselves.
        """
        return {}

    def ablations(self) -> dict[str, Callable[[Batch], list[Prediction]]]:
        """The same model with a part switched off: row of the table -> predict."""
        return {}

    def notes(self, predictions: Sequence[Prediction], scores: Scores) -> list[str]:
        """Sentences that belong under the table of scores."""
        return []

    def calibration(self, outputs: Sequence[Any], targets: Sequence[Any]) -> list[str]:
        """Figures on whether the task's probabilities can be believed, as HTML; none for tasks without any."""
        return []

    def cards(
        self, images: StudyImages, predictions: Sequence[Prediction], train: StudyImages | None, explained: Collection[int]
    ) -> Iterable[StudyCard]:
        """What `report.html` shows of each study, made as it is asked for, since all images at once would fill the memory.

        Args:
            images: the studies.
            predictions: one a study.
            train: the studies that may be context.
            explained: rows of the studies for which a pass of the model may be spent, as on its attention.
        """
        return ()

    def pictures(self, batch: Batch, folder: Path, name: str) -> list[Path]:
        """Draws studies into PNG files of a folder, which it makes; called after each epoch and on demand.

        Args:
            batch: on the model's device; the model is in evaluation.
            folder: where they go.
            name: begins each file's name.

        Returns:
            The files; none where a task draws nothing.
        """
        return []

    def encode(self, batch: Batch) -> Features:
        """Features of every view: tokens (B, V, N, D), pooled (B, V, D); cached ones where the batch has them."""
        if batch.features is not None:
            return batch.features
        B, V = batch.pixels.shape[:2]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_encoder):
            flat = self.encoder(batch.pixels.flatten(0, 1))
        check_features(flat, self.encoder)
        return Features(flat.tokens.unflatten(0, (B, V)), flat.grid, flat.pooled.unflatten(0, (B, V)))

    def study_features(self, batch: Batch) -> Features:
        """Features of B studies, views joined as `data.views` says: tokens (B, N, D), grid, pooled (B, D)."""
        return join_views(self.encode(batch), batch.view_mask, self.spec.data.views)


def join_views(features: Features, view_mask: Tensor, how: str) -> Features:
    """tokens (B, V, N, D) -> (B, N, D) averaged over the views that exist, or (B, V * N, D) concatenated, with zeros
    where a view is missing; pooled (B, V, D) -> (B, D), always averaged."""
    weights = view_mask.to(features.pooled.dtype)
    weights = weights / weights.sum(1, keepdim=True).clamp(min=1)
    pooled = (features.pooled * weights[..., None]).sum(1)
    if how == "concatenate":
        tokens = (features.tokens * view_mask[..., None, None]).flatten(1, 2)
        return Features(tokens, None if view_mask.shape[1] > 1 else features.grid, pooled)
    return Features((features.tokens * weights[..., None, None]).sum(1), features.grid, pooled)


def build_encoder(spec: Spec) -> Encoder:
    """The encoder that a spec names, with its weights, frozen or adapted where it says so."""
    settings: Any = spec.encoder
    encoder = ENCODERS.build(settings)
    if settings.weights is not None and not (spec.weights is not None and holds_encoder(spec.weights)):
        load_encoder(encoder, settings.weights)
    if settings.lora is not None:
        adapt(encoder, settings.lora, "encoder.lora")
    if not settings.trainable:
        freeze(encoder)
    return encoder


def unfilled(spec: Spec) -> Task:
    """A spec's model on the meta device: every shape and no number, so that it takes no memory and no weights are read.

    Raises:
        SpecError: a part cannot be built so.
        WeightsError: what a public model is made of is not known here.
    """
    section: Any = spec.pixel_decoder
    without: dict[str, Any] = {"weights": None, "encoder": {"weights": None}}
    if getattr(section, "weights", None) is not None:
        without["pixel_decoder"] = {"weights": None}
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TASKS.get(spec.task)(Spec.read(spec, without), None)


def check_features(features: Features, encoder: Encoder) -> None:
    """Raises SpecError when an encoder's output disagrees with what it declares."""
    name = type(encoder).__name__
    if not isinstance(features, Features):
        raise SpecError(f"encoder {name}: forward must return medxray.Features, found {type(features).__name__}")
    if features.tokens.ndim != 3 or features.tokens.shape[-1] != encoder.width:
        raise SpecError(
            f"encoder {name}: tokens of shape (B, N, {encoder.width}) were expected from its declared width, "
            f"found {tuple(features.tokens.shape)}; correct `width` or `forward`"
        )
    if features.pooled.shape != (features.tokens.shape[0], encoder.width):
        raise SpecError(
            f"encoder {name}: pooled of shape (B, {encoder.width}) was expected, "
            f"found {tuple(features.pooled.shape)}; correct `width` or `forward`"
        )
    if features.grid is not None and features.grid[0] * features.grid[1] != features.tokens.shape[1]:
        raise SpecError(
            f"encoder {name}: grid {features.grid} does not hold its {features.tokens.shape[1]} tokens; "
            "return grid=None for tokens that are not a map"
        )


TASKS: Registry[Task] = Registry(
    "task",
    Task,
    {
        "pretrain": "medxray.tasks.pretrain:Pretrain",
        "classify": "medxray.tasks.classify:Classify",
        "report": "medxray.tasks.report:Report",
    },
    group="medxray.tasks",
    context=("spec", "encoder"),
)
register, get, names = TASKS.register, TASKS.get, TASKS.names
