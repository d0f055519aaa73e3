"""The chest's region in every image of a data set: found once, kept beside the data, told where it came from."""

import hashlib
import io
import json
import os
import string
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from medxray import disk
from medxray.cache import cache_folder
from medxray.data import StudyImages
from medxray.data.images import MAX_PIXELS, read_image
from medxray.data.loading import end_unanswered, loading
from medxray.pretrain import SEGMENTERS, Region, Segmenter, SegmenterSettings, Source
from medxray.progress import progress_bar
from medxray.types import ImageError, RunError, SpecError

SIDE = 64  # a region is kept as so many shares a side
_DECODED = 128  # pixels that suffice to find it
_KEPT_IMAGES, _KEPT_SECONDS = 512, 20.0  # how much a killed run loses at most
_SHOWN = 20  # images that a printed report names


class Regions(Mapping[str, Tensor]):
    """Name of an image -> (64, 64) float32 coverage by the chest, read from the disk when it is asked for.

    Attributes:
        sources: where each image's region comes from.
        reasons: why an earlier link of the chain was not used, of each image for which one was not.
        means: of each view that has any contour, the mean of all of them.
    """

    def __init__(self, places: Mapping[str, tuple[Path, int]], entries: "Mapping[str, _Entry]") -> None:
        """Args:
        places: the file of each image's region and its row there.
        entries: what is known of each image.
        """
        self._places = dict(places)
        self._open: dict[Path, NDArray[np.uint8]] = {}
        self.sources: dict[str, Source] = {name: entry.source for name, entry in entries.items()}
        self.reasons = {name: entry.reason for name, entry in entries.items() if entry.reason}
        self._views = {name: entry.view for name, entry in entries.items()}
        totals: dict[str, NDArray[np.int64]] = {}
        known: Counter[str] = Counter()
        for name, source in self.sources.items():
            if source in ("computed", "stored"):
                view = self._views[name]
                totals[view] = totals.get(view, np.zeros((SIDE, SIDE), np.int64)) + self._row(name)
                known[view] += 1
        self.means = {view: torch.from_numpy(total / (255.0 * known[view])).float() for view, total in totals.items()}
        for name, source in self.sources.items():
            if source in ("rectangle", "uniform") and self._views[name] in self.means:
                self.sources[name] = "mean"

    def __getitem__(self, name: str) -> Tensor:
        if self.sources[name] == "mean":
            return self.means[self._views[name]]
        return torch.from_numpy(self._row(name)).float() / 255

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __getstate__(self) -> dict[str, Any]:
        # Mapped files would be sent to a loading process with all that they hold.
        return vars(self) | {"_open": {}}

    def _row(self, name: str) -> NDArray[np.uint8]:
        path, row = self._places[name]
        if path not in self._open:
            self._open[path] = np.load(path, mmap_mode="r")
        return np.array(self._open[path][row])

    @property
    def counts(self) -> dict[Source, int]:
        """How many images each source gave a region, in the order of the chain; those that gave any."""
        return _counted(self.sources)

    def __str__(self) -> str:
        return report(self.sources, self.reasons)


def report(sources: Mapping[str, Source], reasons: Mapping[str, str]) -> str:
    """How many images each source gave a region, in one line; then the first images that took a later link of the chain,
    with the reason. Both by the name of an image, as `Regions` has them."""
    counts = ", ".join(f"{n} {source}" for source, n in _counted(sources).items())
    lines = [f"regions of {len(sources)} images: {counts}"]
    lines += [f"  {name}: {sources[name]}; {reason}" for name, reason in list(reasons.items())[:_SHOWN]]
    if len(reasons) > _SHOWN:
        lines.append(f"  and {len(reasons) - _SHOWN} more")
    return "\n".join(lines)


def _counted(sources: Mapping[str, Source]) -> dict[Source, int]:
    found = Counter(sources.values())
    chain: tuple[Source, ...] = ("stored", "computed", "mean", "rectangle", "uniform")
    return {source: found[source] for source in chain if found[source]}


class Contours:
    """Finds regions by a chain, and tells which link gave each: a stored mask, the segmenter's contour, the mean contour of
    the view, the release's rectangle, uniform.

    Args:
        settings: the `segmenter` section of a spec.
        segmenter: in place of the one that `settings` names.

    Raises:
        SpecError: a pattern of stored masks that cannot be filled in.
    """

    def __init__(self, settings: SegmenterSettings, segmenter: Segmenter | None = None) -> None:
        self.settings = settings
        self.segmenter: Segmenter = segmenter if segmenter is not None else SEGMENTERS.build(settings)
        self._means: dict[str, Tensor] = {}
        if settings.stored is not None:
            try:
                fields = {field for _, field, _, _ in string.Formatter().parse(settings.stored) if field is not None}
            except ValueError as error:
                raise SpecError(f"segmenter.stored: {settings.stored!r}: {error}") from None
            if not fields <= {"path", "folder", "stem"} or not fields:
                raise SpecError(
                    f"segmenter.stored: expected a path with {{stem}}, {{folder}} or {{path}} in it, found {settings.stored!r}"
                )

    def __getstate__(self) -> dict[str, Any]:
        # For a process that is not forked: a part's settings are of a class made at run time.
        plain = SegmenterSettings(name=self.settings.name, stored=self.settings.stored)
        return vars(self) | {"settings": plain}

    def __call__(self, pixels: NDArray[np.float32], view: str = "unknown") -> Tensor:
        """The region of an image that is in no data set; it may take the mean of the last data set that was looked at.

        Args:
            pixels: (H, W) or (1, H, W) in [0, 1].
            view: "PA", "AP", "LL" or "unknown".

        Returns:
            (64, 64) float32.
        """
        region = self.segmenter(np.ascontiguousarray(pixels.reshape(pixels.shape[-2:])), view)
        if region.source != "computed" and view in self._means:
            return self._means[view]
        return torch.from_numpy(_kept(region.mask)).float() / 255

    def of(self, images: StudyImages, *, workers: int = 0, progress: bool = False) -> Regions:
        """The region of every image of a data set; only those are looked at that are new or have changed.

        What is found is kept in `.medxray/contours-...` below the data's root, or in the user's cache where the root
        cannot be written. A run that is killed goes on where it was.

        Args:
            images: the data set.
            workers: processes; none is this one alone.
            progress: show a bar.

        Raises:
            ImageError: an image cannot be read, and the data's `on_error` is "raise".
        """
        folder = self._folder(images.root)
        jobs = {
            name: view
            for names, views in zip(images.images, images.views, strict=True)
            for name, view in zip(names, views, strict=True)
        }
        looked = _Looked(images, self, jobs)
        stamps = {name: looked.stamp(name) for name in jobs}
        known = _load(folder, jobs, stamps)
        looked.names = [name for name in jobs if name not in known]
        if looked.names:
            own = min(workers, len(looked.names))
            loader: Any = DataLoader(looked, batch_size=None, num_workers=own, worker_init_fn=end_unanswered)
            store = _Store(folder)
            with loading():
                try:
                    for entry, mask in progress_bar(
                        loader, desc="contours", total=len(looked.names), disable=not progress, unit="image"
                    ):
                        if not entry.stamp and images.spec.on_error == "raise":
                            raise ImageError(entry.reason)
                        store.add(entry._replace(stamp=entry.stamp and stamps[entry.image]), mask)
                finally:
                    store.flush()
            known |= store.places
        regions = Regions(
            {name: known[name][:2] for name in jobs}, {name: known[name][2] for name in jobs}
        )
        self._means = regions.means
        return regions

    def _folder(self, root: Path) -> Path:
        """Where regions are kept that were found with these settings and this method."""
        method = [*self.method.values(), SIDE]
        key = hashlib.sha256(json.dumps(method, sort_keys=True).encode()).hexdigest()[:12]
        beside = root / ".medxray" / f"contours-{key}"
        own = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]
        for folder in (beside, cache_folder() / "contours" / own / key):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError:
                continue
            if os.access(folder, os.W_OK):
                return folder
        raise SpecError(
            f"contours can be kept neither in {beside} nor in {cache_folder()}; name a folder by MEDXRAY_CACHE"
        )

    def find(self, images: StudyImages, name: str, view: str) -> Region:
        """The first links of the chain, for one image: its stored mask, else what the segmenter says.

        Raises:
            ImageError: the image cannot be read.
        """
        beside = images.reader.mask(name)
        if beside is not None:
            return Region(beside, "stored", "")
        mask, missing = self._read(images.root, name, images.spec.max_pixels)
        if mask is not None:
            return Region(mask, "stored", "")
        region = self.segmenter(images.read(name, (_DECODED, _DECODED))[0], view)
        return region._replace(reason="; ".join(filter(None, (missing, region.reason))))

    @property
    def method(self) -> dict[str, Any]:
        """What decides a region, as plain values."""
        return {"segmenter": self.settings.model_dump(), "version": self.segmenter.version}

    def mask(
        self, pixels: NDArray[np.float32], view: str, root: Path, image: str
    ) -> NDArray[np.float32] | NDArray[np.bool_] | None:
        """The same for an image that was read already, as `medxray.data.write_shards` asks for it.

        Args:
            pixels: (1, H, W) in [0, 1].
            view: "PA", "AP", "LL" or "unknown".
            root, image: of the data set, and the image's name in it.

        Returns:
            Coverage (h, w); None where there is neither a stored mask nor a contour.
        """
        stored, _ = self._read(root, image, MAX_PIXELS)
        if stored is not None:
            return stored
        region = self.segmenter(np.ascontiguousarray(pixels[0]), view)
        return region.mask if region.source == "computed" else None

    def _read(self, root: Path, name: str, max_pixels: int) -> tuple[NDArray[np.float32] | None, str]:
        """An image's stored mask, or why there is none where there should be."""
        path = self.stored(root, name)
        if path is None:
            return None, ""
        try:
            mask = read_image(path, max_pixels=max_pixels)[0]
        except ImageError as error:
            return None, f"no stored mask: {error}"
        return (mask / mask.max(), "") if mask.max() > 0 else (None, f"the stored mask {path} is empty")

    def stored(self, root: Path, name: str) -> Path | None:
        """Where an image's stored mask would lie."""
        if self.settings.stored is None:
            return None
        path = PurePosixPath(name)
        return root / self.settings.stored.format(path=path.with_suffix(""), folder=path.parent, stem=path.stem)


class _Entry(NamedTuple):
    """A line of what is kept. stamp: changes when the image or its stored mask does; empty: could not be read."""

    image: str
    view: str
    stamp: str
    source: Source
    reason: str


class _Looked(Dataset[tuple[_Entry, NDArray[np.uint8]]]):
    """Images to be looked at, in this process or in others."""

    def __init__(self, images: StudyImages, contours: Contours, views: Mapping[str, str]) -> None:
        self.images, self.contours, self.views = images, contours, views
        self.names: list[str] = []

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> tuple[_Entry, NDArray[np.uint8]]:
        name = self.names[row]
        try:
            region, stamp = self.contours.find(self.images, name, self.views[name]), "read"
        except ImageError as error:
            # An exception that passes between processes loses its form.
            region, stamp = Region(np.ones((1, 1), np.bool_), "uniform", str(error)), ""
        return _Entry(name, self.views[name], stamp, region.source, region.reason), _kept(region.mask)

    def stamp(self, name: str) -> str:
        try:
            stamp = self.images.stamp(name)
        except OSError:
            stamp = "missing"
        path = self.contours.stored(self.images.root, name)
        if path is not None and path.is_file():
            stat = path.stat()
            stamp += f" {stat.st_size} {stat.st_mtime_ns}"
        return stamp


def _kept(mask: NDArray[np.bool_] | NDArray[np.float32]) -> NDArray[np.uint8]:
    """Coverage (h, w) in [0, 1] -> (64, 64) in 0..255: the mean over each cell."""
    values = torch.from_numpy(np.ascontiguousarray(mask, np.float32))[None, None]
    shares = F.adaptive_avg_pool2d(values, SIDE)[0, 0]
    return (shares * 255).round().byte().numpy()


_Places = dict[str, tuple[Path, int, _Entry]]


class _Store:
    """Writes regions some hundreds at a time: the masks first, then, as the sign that they are whole, their list."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: _Places = {}
        self._entries: list[_Entry] = []
        self._masks: list[NDArray[np.uint8]] = []
        self._since = time.monotonic()

    def add(self, entry: _Entry, mask: NDArray[np.uint8]) -> None:
        self._entries.append(entry)
        self._masks.append(mask)
        if len(self._entries) >= _KEPT_IMAGES or time.monotonic() - self._since > _KEPT_SECONDS:
            self.flush()

    def flush(self) -> None:
        if not self._entries:
            return
        lines = "".join(json.dumps(entry._asdict(), ensure_ascii=False) + "\n" for entry in self._entries)
        masks = np.stack(self._masks)
        path = self.folder / f"{_name(lines, masks)}.npy"
        try:
            # Of a file NumPy does not tell what the system said.
            content = io.BytesIO()
            np.save(content, masks)
            with disk.replacing(path) as staged:
                staged.write_bytes(content.getbuffer())
            disk.write(path.with_suffix(".jsonl"), lines)
        except OSError as error:
            raise RunError(
                f"contours cannot be kept in {self.folder}: {error.strerror or error}; free some space, or name another folder "
                "by MEDXRAY_CACHE. What was kept before is whole"
            ) from error
        self.places |= {entry.image: (path, row, entry) for row, entry in enumerate(self._entries)}
        self._entries, self._masks, self._since = [], [], time.monotonic()


def _name(lines: str, masks: NDArray[np.uint8]) -> str:
    """Of files that hold these: what is read under another name is damaged."""
    return hashlib.sha256(lines.encode() + np.ascontiguousarray(masks).tobytes()).hexdigest()[:32]


def _load(folder: Path, jobs: Mapping[str, str], stamps: Mapping[str, str]) -> _Places:
    """What is kept and still true; a damaged file counts as if it were not there."""
    places: _Places = {}
    for listed in sorted(folder.glob("*.jsonl")):
        path = listed.with_suffix(".npy")
        try:
            lines, masks = listed.read_text(encoding="utf-8"), np.load(path, mmap_mode="r")
            entries = [_Entry(**json.loads(line)) for line in lines.splitlines()]
            whole = masks.shape == (len(entries), SIDE, SIDE) and _name(lines, masks) == listed.stem
        except (OSError, ValueError, TypeError, EOFError):
            continue
        for row, entry in enumerate(entries) if whole else ():
            if entry.image in jobs and entry.view == jobs[entry.image] and entry.stamp == stamps[entry.image]:
                places[entry.image] = (path, row, entry)
    return places
