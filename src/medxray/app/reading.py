"""A study as it was opened, and what a fitted run says of it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medxray.data import Sample, StudyImages, collate, exposed_field, read_header, read_image, resize
from medxray.data.phantom import draw_study
from medxray.data.transforms import Box, height_width
from medxray.outputs import study_headers
from medxray.pipeline import Pipeline
from medxray.pretrain import SegmenterSettings
from medxray.pretrain.regions import Contours
from medxray.spec import DataSpec
from medxray.types import DataError, MedxrayError
from medxray.visual import StudyCard
from medxray.visual.mosaic import Picture, fitted, outlined

MAX_FILES = 8
"""Views of a study."""

_SHOWN = 1024
_EXAMPLES, _EXAMPLE_SEED, _EXAMPLE_SIZE = (38, 19, 31, 2), 7_301, 512
_VIEWS = {"PA": "frontal, PA", "AP": "frontal, AP", "LL": "lateral"}


@dataclass(frozen=True)
class View:
    """One image.

    Attributes:
        source: the bytes of a file, or (H, W) float32 in [0, 1].
        name: by which messages call it.
        view: "PA", "AP", "LL" or "unknown".
        pixels: (1, H, W) float32 in [0, 1], decoded whole and not changed for any model.
    """

    source: bytes | NDArray[np.float32]
    name: str
    view: str
    pixels: NDArray[np.float32]

    @property
    def caption(self) -> str:
        return _VIEWS.get(self.view, "view")

    @property
    def shown(self) -> Picture:
        """(h, w), its longer side at most 1,024 pixels."""
        _, h, w = self.pixels.shape
        scale = min(1.0, _SHOWN / max(h, w))
        small: Picture = resize(self.pixels, (max(1, round(scale * h)), max(1, round(scale * w))))[0].numpy()
        return small


@dataclass(frozen=True)
class Study:
    """The views of one study, frontal ones first.

    Attributes:
        title: for a reader.
        views: at least one.
        report: that was written of it; "" where unknown.
    """

    title: str
    views: tuple[View, ...]
    report: str = ""


@dataclass(frozen=True)
class Reading:
    """What a run says of a study.

    Attributes:
        model: its name.
        task: of its spec.
        views: how many of the study's views it reads.
        cards: one; of a pre-trained model one a view.
        contours: (h, w, 3) of each view with the chest's outline, for a pre-trained model.
        frames: for each view that is read the part of the image that the model sees, in shares of it. It is larger than the
            image where that is padded.
        seconds: that it took.
        remarks: sentences for a reader.
    """

    model: str
    task: str
    views: int
    cards: list[StudyCard]
    contours: list[Picture]
    frames: list[Box]
    seconds: float
    remarks: list[str] = field(default_factory=list)


class Reader:
    """A fitted run that reads one study at a time.

    Args:
        name: by which a reader knows it.
        pipeline: fitted.

    Raises:
        RunError: it is not fitted.
    """

    def __init__(self, name: str, pipeline: Pipeline) -> None:
        self.name, self.pipeline = name, pipeline
        # Fails where nothing is fitted.
        pipeline.read([])
        self._train, self._remark = None, ""
        if getattr(pipeline.task, "bank", None) is not None:
            try:
                self._train = _training_images(pipeline)
            except MedxrayError:
                self._remark = "The data set is not where the fit found it, so context studies are shown without images."

    def __call__(self, study: Study) -> Reading:
        """
        Raises:
            ImageError, DataError: as `Pipeline.predict`.
        """
        started, pipeline, task = time.perf_counter(), self.pipeline, self.pipeline.task
        # Of a pre-trained model every view is an image of its own.
        alone = pipeline.spec.task == "pretrain"
        read = study.views if alone else study.views[: task.views]
        cards = [card for views in ([[view] for view in read] if alone else [read]) for card in self._cards(views)]
        bank: Any = getattr(task, "bank", None)
        for context in (context for card in cards for context in card.context):
            context.report = context.report or bank.report(context.study_id)
        remarks = [self._remark] if self._remark and cards[0].context else []
        if len(read) < len(study.views):
            remarks.append(f"Reads {len(read)} of the {len(study.views)} views: no more are in its training data.")
        contours = [self._contour(view) for view in read] if alone else []
        frames = [_frame(view.pixels, pipeline.spec.data) for view in read]
        seconds = time.perf_counter() - started
        return Reading(self.name, pipeline.spec.task, len(read), cards, contours, frames, seconds, remarks)

    def _cards(self, views: Sequence[View]) -> list[StudyCard]:
        task = self.pipeline.task
        told = {"images": [v.source for v in views], "views": [v.view for v in views], "names": [v.name for v in views]}
        sample = self.pipeline.read([told | {"study_id": "study"}])[0]
        prediction = self.pipeline.predict([sample])[0]
        opened: Any = _Opened(sample, views, max(len(views), task.views))
        with torch.no_grad():
            cards = list(task.cards(opened, [prediction], self._train, {0}))
        for card in cards:
            card.scores = card.scores or dict(prediction.scores)
        return cards

    def _contour(self, view: View) -> Picture:
        settings = self.pipeline.spec.segmenter
        assert isinstance(settings, SegmenterSettings)
        segment = self.pipeline.task.segment or Contours(settings)
        return outlined(fitted(view.pixels[0], 320), segment(view.pixels, view.view).numpy())


class _Opened:
    """One opened study in place of the `StudyImages` of a data set, as far as `Task.cards` asks for them."""

    def __init__(self, sample: Sample, views: Sequence[View], most: int) -> None:
        self._sample, self._shown, self._most = sample, views, most
        self.views, self.reports = [[view.view for view in views]], [""]

    def __len__(self) -> int:
        return 1

    def __getitem__(self, row: int) -> Sample:
        return self._sample

    def picture(self, row: int, view: int) -> Picture:
        return fitted(self._shown[view].pixels[0])

    def collate(self, samples: list[Sample]) -> Any:
        return collate(samples, self._most)

    def label_array(self, names: Sequence[str]) -> NDArray[np.float32]:
        return np.full((1, len(names)), np.nan, np.float32)


def opened(files: Sequence[tuple[str, bytes]], data: Sequence[DataSpec]) -> Study:
    """A study out of files.

    Args:
        files: the name and the bytes of each.
        data: how each model reads images; the first decides how they are shown, the strictest what is too large.

    Raises:
        ImageError: a file that is no image.
        DataError: none, too many, or those of several patients or studies.
    """
    if not 0 < len(files) <= MAX_FILES:
        raise DataError(f"{len(files)} files; expected the views of one study, at most {MAX_FILES}; drop one study at a time")
    most = min(spec.max_pixels for spec in data)
    how = {key: value for key, value in data[0].shown.items() if key in ("frame", "window")}
    views = []
    for name, content in files:
        view = read_header(content, name=name).view
        views.append(View(content, name, view, read_image(content, max_pixels=most, name=name, **how)))
    study_headers([content for _, content in files])
    count = f"{len(views)} views" if len(views) > 1 else "1 view"
    return Study(f"Your study, {count}", tuple(sorted(views, key=lambda view: view.view == "LL")))


@cache
def examples() -> tuple[Study, ...]:
    """Drawn studies, of two views each, that no packaged spec trains on."""
    found = []
    for index in _EXAMPLES:
        drawn = draw_study(_EXAMPLE_SEED, index, _EXAMPLE_SIZE)
        title = ", ".join(finding.name for finding in drawn.details).capitalize() or "Nothing found"
        images = [(image / 4095).astype(np.float32) for image in drawn.images]
        views = (View(image, view, view, image[None]) for image, view in zip(images, drawn.views, strict=True))
        found.append(Study(title, tuple(views), drawn.findings))
    return tuple(found)


def _training_images(pipeline: Pipeline) -> StudyImages:
    """The training studies for their pictures and reports; unlike `Pipeline.images` without a pass of the encoder."""
    studies, encoder = pipeline.studies, pipeline.task.encoder
    return StudyImages(
        studies.splits["train"], studies.root, pipeline.spec.data, channels=encoder.channels, mean=encoder.mean, std=encoder.std,
        labels=pipeline.task.labels, seed=pipeline.spec.seed, train=False, max_views=studies.views, reader=studies.reader,
    )  # fmt: skip


def _frame(pixels: NDArray[np.float32], data: DataSpec) -> Box:
    """Where in an image (1, H, W) the model's input lies, in shares of its height and width."""
    _, H, W = pixels.shape
    top, left, height, width = map(float, exposed_field(pixels) if data.border == "crop" else (0, 0, H, W))
    if data.fit == "pad":
        h, w = height_width(data.image_size)
        scale = min(h / height, w / width)
        top, left = top - (h / scale - height) / 2, left - (w / scale - width) / 2
        height, width = h / scale, w / scale
    return Box(top / H, left / W, height / H, width / W)
