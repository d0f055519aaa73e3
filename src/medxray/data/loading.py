"""Studies -> normalised tensors, and batches of them."""

import contextlib
import copy
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as compute
import torch
from numpy.typing import NDArray
from torch import Tensor

from medxray.data.images import read_image, to_image
from medxray.data.readers import Files, Locality, Reader
from medxray.data.seeds import seed_of
from medxray.data.transforms import Box, cover, cut, height_width, normalise, random_crop_box, resize
from medxray.registry import Settings
from medxray.types import Batch, DataError, Features, ImageError, MedxrayError, RunError

if TYPE_CHECKING:
    from datasets import Dataset

    from medxray.spec import DataSpec

CACHE_BYTES = 2**30

_VIEWS = ("PA", "AP", "LL")


@dataclass
class Sample:
    """One study as a model sees it.

    Attributes:
        pixels: (v, C, h, w) float32, normalised; v views.
        report: cleaned; "" at prediction.
        labels: (K,) float32 with NaN where missing.
        study_id: its name.
        patient_id: "" where unknown.
        seed: all randomness of the sample follows from it.
        features: of a frozen encoder, tokens (v, N, D) and pooled (v, D), where they are known already.
        regions: (v, h, w) float32 coverage of each token by the chest, where it is known.
        indication: why the study was made; "" where unknown.
        prior: report of the patient's study before; "" where unknown.
    """

    pixels: Tensor
    report: str
    labels: Tensor
    study_id: str
    patient_id: str
    seed: int
    features: Features | None = None
    regions: Tensor | None = None
    indication: str = ""
    prior: str = ""


class StudyImages(torch.utils.data.Dataset[Sample]):
    """The studies of a split, ready for a model.

    Args:
        studies: rows of `medxray.types.Study`.
        root: folder of their images.
        spec: the data block of a spec.
        channels: C of the encoder; gray is repeated.
        mean, std: the encoder's normalisation, one number or C.
        labels: names, in the order of the label vector.
        seed: of the whole run.
        train: draws random crops, anew each epoch.
        max_views: V; views beyond it are not read.
        reader: opens the images; files below `root` if None.

    Attributes:
        regions: name of an image -> (s, t) coverage of the whole image by the chest; None where it is not asked for.
        grid: (h, w) tokens of an image, of which samples then tell the coverage.
    """

    def __init__(
        self,
        studies: "Dataset",
        root: str | Path,
        spec: "DataSpec",
        *,
        channels: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        labels: list[str],
        seed: int,
        train: bool,
        max_views: int,
        reader: Reader | None = None,
    ) -> None:
        self.root = Path(root)
        self.reader = reader if reader is not None else Files(self.root)
        self.spec = spec
        self.channels, self.mean, self.std = channels, mean, std
        self.max_views = max_views
        self.seed = seed
        self.train = train
        self.crops = spec.crops if train else None
        # Arrow rows are slow to take apart one by one.
        table = studies.with_format("arrow")[:]
        self.study_ids: list[str] = table["study_id"].to_pylist()
        self.patient_ids: list[str] = table["patient_id"].to_pylist()
        self.reports: list[str] = table["report"].to_pylist()
        self.indications: list[str] = table["indication"].to_pylist()
        self.priors: list[str] = table["prior"].to_pylist()
        self.sexes: list[str] = table["sex"].to_pylist()
        self.age_bands: list[str] = table["age_band"].to_pylist()
        self.manufacturers: list[str] = table["manufacturer"].to_pylist()
        self.images: list[list[str]] = [images[:max_views] for images in table["images"].to_pylist()]
        self.views: list[list[str]] = [views[:max_views] for views in table["views"].to_pylist()]
        self.features: Features | None = None
        self.regions: Mapping[str, Tensor] | None = None
        self.grid: tuple[int, int] | None = None
        self._shapes: dict[str, tuple[int, int]] = {}
        self.labels = torch.full((len(self.study_ids), len(labels)), torch.nan)
        for k, label in enumerate(labels):
            values = compute.struct_field(table["labels"], label).cast("float32")
            self.labels[:, k] = torch.from_numpy(values.to_numpy().copy())
        self.label_names = list(labels)
        self._cache: dict[str, Tensor] = {}
        # Each loading process keeps its own.
        self._room = CACHE_BYTES // max(1, spec.workers) if spec.cache_images else 0

    def __getstate__(self) -> dict[str, Any]:
        # For a loading process that is not forked: classes of settings made at run time do not travel.
        from medxray.spec import DataSpec

        values = {name: getattr(self.spec, name) for name in DataSpec.model_fields if name != "reader"}
        spec = DataSpec.model_construct(**values, reader=Settings(name=self.spec.reader.name))
        return vars(self) | {"spec": spec, "_cache": {}}

    def __len__(self) -> int:
        return len(self.study_ids)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        """One study by its row, or by (epoch, row): each epoch has other crops and seeds.

        Raises:
            ImageError: a file that cannot be read.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        name = self.study_ids[index]
        seed = seed_of(self.seed, epoch, index) if self.train else seed_of(self.seed, name)
        box = random_crop_box(seed, *self.crops) if self.crops else None
        features = None
        if self.features is not None:
            views = len(self.images[index])
            features = Features(
                self.features.tokens[index, :views], self.features.grid, self.features.pooled[index, :views]
            )
        # Where features are known, pixels are never looked at: none are read.
        pixels = (
            torch.stack([self._view(image, box) for image in self.images[index]])
            if features is None
            else torch.zeros(len(self.images[index]), self.channels, 1, 1)
        )
        return Sample(
            pixels=pixels,
            report=self.reports[index],
            labels=self.labels[index],
            study_id=name,
            patient_id=self.patient_ids[index],
            seed=seed,
            features=features,
            regions=self._coverage(self.images[index], box) if features is None else None,
            indication=self.indications[index],
            prior=self.priors[index],
        )

    def still(self, rows: Sequence[int] | None = None) -> "StudyImages":
        """The same studies, or some of their rows, as they are read at prediction: no crops, constant seeds."""
        part = copy.copy(self)
        part.train, part.crops = False, None
        # Images kept for crops are of another size.
        part._cache, part._shapes = ({}, {}) if self.crops else (self._cache, self._shapes)
        if rows is not None:
            for name in (
                "study_ids", "patient_ids", "reports", "indications", "priors", "sexes", "age_bands", "manufacturers", "images",
                "views",
            ):  # fmt: skip
                setattr(part, name, [getattr(self, name)[row] for row in rows])
            part.labels = self.labels[list(rows)]
            if self.features is not None:
                tokens, pooled = (t[list(rows)] for t in (self.features.tokens, self.features.pooled))
                part.features = Features(tokens, self.features.grid, pooled)
        return part

    @property
    def attributes(self) -> dict[str, list[str]]:
        """What subgroups are told by: attribute -> each study's group, "" where unknown. Several kinds of views are
        joined by "+", such as PA+LL; with one that is unknown so is the group."""
        views = ["" if "unknown" in own else "+".join(sorted(set(own), key=_VIEWS.index)) for own in self.views]
        return {"sex": self.sexes, "age": self.age_bands, "view": views, "manufacturer": self.manufacturers}

    def batches(self, size: int, order: Sequence[int] | None = None) -> Iterator[Batch]:
        """All studies, or those of some rows, in order, `size` at a time."""
        rows = range(len(self)) if order is None else order
        for start in range(0, len(rows), size):
            yield self.of(rows[start : start + size])

    def of(self, rows: Sequence[int]) -> Batch:
        """The studies of some rows as a batch."""
        return self.collate([self[row] for row in rows])

    def picture(self, row: int, view: int) -> NDArray[np.float32]:
        """A study's view as a picture (h, w) in [0, 1]."""
        pixels = self.read(self.images[row][view], needed_size(self.spec))
        return resize(pixels, self.spec.image_size, self.spec.fit)[0].numpy()

    def read(self, image: str, at_least: tuple[int, int] | None = None) -> NDArray[np.float32]:
        """An image as `images` names it: (1, H, W) in [0, 1], decoded whole or to no less than (h, w).

        Raises:
            ImageError: it cannot be read.
        """
        source = self.reader.open(image)
        return read_image(
            source,
            max_pixels=self.spec.max_pixels,
            at_least=at_least,
            name=str(self.root / image),
            **self.spec.shown,
        )

    def stamp(self, image: str) -> str:
        """Changes when an image does, or how it is shown.

        Raises:
            OSError: it is not there.
        """
        stamp = self.reader.stamp(image)
        return f"{stamp} {self.spec.shown}" if self.spec.shown else stamp

    @property
    def needed(self) -> tuple[int, int] | None:
        """(h, w) below which an image is not decoded, so that the smallest crop stays sharp; None for the whole."""
        return needed_size(self.spec, self.crops[0] if self.crops else 1.0)

    @property
    def locality(self) -> Locality | None:
        """Which studies are read together, by their first images; None where each image is a file."""
        return self.reader.locality([images[0] for images in self.images])

    def thumbnails(self, side: int = 32) -> NDArray[np.float32]:
        """Each study's first view as raw pixels (n, side * side), brightness and contrast made equal."""
        small = []
        for images in self.images:
            small.append(resize(self.read(images[0]), side, "stretch").flatten())
        stack = torch.stack(small)
        stack = stack - stack.mean(1, keepdim=True)
        return (stack / stack.std(1, keepdim=True).clamp(min=1e-6)).numpy()

    def label_array(self, names: Sequence[str]) -> NDArray[np.float32]:
        """(n, K) with 1, 0, -1 uncertain and NaN missing."""
        return self.labels[:, [self.label_names.index(name) for name in names]].numpy()

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Samples -> a batch of the data set's constant shape."""
        return collate(samples, self.max_views)

    def _view(self, image: str, box: Box | None) -> Tensor:
        """(C, h, w); kept in memory before the crop if there is one, else after the change of size."""
        pixels = self._cache.get(image)
        if pixels is None:
            pixels = torch.from_numpy(self.read(image, self.needed))
            self._shapes[image] = (pixels.shape[1], pixels.shape[2])
            if not self.crops:
                pixels = resize(pixels, self.spec.image_size, self.spec.fit)
            if pixels.nbytes <= self._room:
                self._room -= pixels.nbytes
                self._cache[image] = pixels
        if box is not None:
            pixels = resize(cut(pixels, box), self.spec.image_size, self.spec.fit)
        return normalise(pixels, self.channels, self.mean, self.std)

    def _coverage(self, images: Sequence[str], box: Box | None) -> Tensor | None:
        """(v, h, w) of images whose pixels were just read: the region goes the way of its image."""
        if self.regions is None or self.grid is None:
            return None
        size, fit = self.spec.image_size, self.spec.fit
        covered = [cover(self.regions[image], self.grid, self._shapes[image], size, fit, box) for image in images]
        return torch.stack(covered)


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """To be held around what takes batches from other processes: what happens to those is told in words.

    Raises:
        RunError: one of them died, or has no memory left.
        MedxrayError: what one of them raised, as if it had been raised here.
    """
    cure = "give the same command again to go on, with a lower data.workers if it happens again"
    try:
        yield
    except MedxrayError as error:
        # torch puts the other process's traceback in place of the message.
        _, raised, said = str(error).rpartition(f"{type(error).__module__}.{type(error).__qualname__}: ")
        if not raised or not str(error).startswith("Caught "):
            raise
        raise type(error)(said.rstrip()) from error
    except (MemoryError, RuntimeError) as error:
        found = re.search(r"DataLoader worker \(pid\S* ([\d, ]+)\) (.*)", str(error))
        if found:
            raise RunError(
                f"a process that reads images died (pid {found[1]}: {found[2].strip(' .')}), perhaps for want of memory; {cure}"
            ) from error
        if str(error).startswith("Caught ") and is_out_of_memory(error):
            raise RunError(f"a process that reads images is out of memory; {cure}") from error
        raise


def end_unanswered(worker: int) -> None:
    """Has a loading process (`worker_init_fn` of a DataLoader) end when it cannot send what it has read, as without memory: its
    queue would drop that, and whoever waits for it would wait for ever."""
    from multiprocessing.queues import Queue

    Queue._on_queue_feeder_error = staticmethod(lambda error, batch: os._exit(1))  # type: ignore[attr-defined]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that there is no memory left, of this machine or of its GPU."""
    told = re.search(r"can't allocate memory|[Oo]ut of memory|not enough memory|Cannot allocate memory", str(error))
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and told is not None)


def collate(samples: Sequence[Sample], max_views: int) -> Batch:
    """Samples -> a batch of `max_views` views; views that a study lacks are zeros, False in `view_mask`."""
    first, first_region = samples[0].pixels, samples[0].regions
    pixels = first.new_zeros(len(samples), max_views, *first.shape[1:])
    view_mask = torch.zeros(len(samples), max_views, dtype=torch.bool)
    for i, sample in enumerate(samples):
        views = min(len(sample.pixels), max_views)
        pixels[i, :views] = sample.pixels[:views]
        view_mask[i, :views] = True
    features = None
    if samples[0].features is not None:
        known = [sample.features for sample in samples if sample.features is not None]
        tokens = known[0].tokens.new_zeros(len(known), max_views, *known[0].tokens.shape[1:])
        pooled = known[0].pooled.new_zeros(len(known), max_views, known[0].pooled.shape[-1])
        for i, one in enumerate(known):
            tokens[i, : len(one.tokens)] = one.tokens
            pooled[i, : len(one.pooled)] = one.pooled
        features = Features(tokens, known[0].grid, pooled)
    regions = None
    if first_region is not None:
        regions = first_region.new_zeros(len(samples), max_views, *first_region.shape[1:])
        for i, sample in enumerate(samples):
            assert sample.regions is not None
            regions[i, : len(sample.regions)] = sample.regions[:max_views]
    return Batch(
        pixels=pixels,
        view_mask=view_mask,
        reports=[sample.report for sample in samples],
        labels=torch.stack([sample.labels for sample in samples]),
        study_ids=[sample.study_id for sample in samples],
        patient_ids=[sample.patient_id for sample in samples],
        seeds=torch.tensor([sample.seed for sample in samples], dtype=torch.int64),
        regions=regions,
        features=features,
        indications=[sample.indication for sample in samples],
        priors=[sample.prior for sample in samples],
    )


def study_from(
    value: Any,
    spec: "DataSpec",
    *,
    channels: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    labels: Sequence[str] = (),
    seed: int = 0,
    max_views: int = 1,
    name: str = "",
    segment: Callable[[NDArray[np.float32], str], Tensor] | None = None,
    grid: tuple[int, int] | None = None,
) -> Sample:
    """What `predict` is given for one study -> a sample without report and labels.

    Args:
        value: a path, array, tensor or PIL image; a list or tuple of those, the views of one study, frontal
            first; or a mapping with "images" and, if wanted, "views", "study_id", "patient_id", "indication", "prior",
            and "names", by which messages call images that are given as bytes.
        spec: the data block of the pipeline's spec.
        channels, mean, std: as the encoder declares.
        labels: names of labels, all missing here.
        seed: of the run.
        max_views: V of the pipeline; more views are left out, as in training.
        name: the study's name where `value` has none; its first file's stem if empty.
        segment: pixels (1, H, W) and view -> (s, t) coverage by the chest, where the sample is to tell it.
        grid: (h, w) tokens of an image, with `segment`.

    Raises:
        ImageError: an image that cannot be read, or something that is no image.
        DataError: no image, or a mapping without "images".
    """
    patient, indication, prior, named, called = "", "", "", list[str](), list[str]()
    if isinstance(value, Mapping):
        if "images" not in value:
            raise DataError(
                f"a study given as a mapping needs 'images'; found {', '.join(map(str, value)) or 'nothing'}"
            )
        name, patient = str(value.get("study_id", name)), str(value.get("patient_id", ""))
        indication, prior = (str(value.get(text) or "") for text in ("indication", "prior"))
        named, called = list(value.get("views", ())), list(value.get("names", ()))
        value = value["images"]
    images = list(value) if isinstance(value, (list, tuple)) else [value]
    if not images:
        raise DataError("a study without images; expected a file, array or PIL image, or a list of them")
    if not name:
        name = Path(images[0]).stem if isinstance(images[0], (str, Path)) else "study"
    views, regions = [], []
    for i, image in enumerate(images[:max_views]):
        whole = _pixels(image, spec, called[i] if i < len(called) else "image in memory")
        if segment is not None and grid is not None:
            region = segment(whole, named[i] if i < len(named) else "unknown")
            regions.append(cover(region, grid, whole.shape[1:], spec.image_size, spec.fit))
        pixels = resize(whole, height_width(spec.image_size), spec.fit)
        views.append(normalise(pixels, channels, mean, std))
    return Sample(
        pixels=torch.stack(views),
        report="",
        labels=torch.full((len(labels),), torch.nan),
        study_id=name,
        patient_id=patient,
        seed=seed_of(seed, name),
        regions=torch.stack(regions) if regions else None,
        indication=indication,
        prior=prior,
    )


def needed_size(spec: "DataSpec", crop: float = 1.0) -> tuple[int, int] | None:
    """(h, w) that an image must have to be read as a spec says; None where it is to be decoded whole."""
    if spec.decode == "full":
        return None
    h, w = height_width(spec.image_size)
    side = math.sqrt(crop)
    return math.ceil(h / side), math.ceil(w / side)


def _pixels(image: Any, spec: "DataSpec", name: str) -> NDArray[np.float32]:
    if isinstance(image, (str, Path, bytes)):
        return read_image(image, max_pixels=spec.max_pixels, at_least=needed_size(spec), name=name, **spec.shown)
    if isinstance(image, (list, tuple, Mapping)):
        raise ImageError(
            f"expected a path, array, tensor or PIL image as a view, found {type(image).__name__}; "
            "a study is one list of images"
        )
    return to_image(image, max_pixels=spec.max_pixels, border=spec.border, clahe=spec.clahe)
