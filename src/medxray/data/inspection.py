"""What a data set holds, and what leaks in it. Numbers and small pictures only; `medxray.visual.data_card` draws them."""

import hashlib
import math
import re
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch.utils.data import DataLoader

from medxray.data.duplicates import COEFFICIENTS, Coefficients, coefficients, copies, correlate, hashes
from medxray.data.images import ImageHeader, read_header, read_image
from medxray.data.loading import end_unanswered
from medxray.data.prepare import cores
from medxray.data.readers import READERS, Reader
from medxray.data.seeds import seed_of
from medxray.data.splits import SPLITS, divide
from medxray.data.study import load_studies
from medxray.data.text import clean, is_empty
from medxray.data.transforms import resize
from medxray.progress import progress_bar
from medxray.types import DataError, MedxrayError, Study

if TYPE_CHECKING:
    from medxray.spec import DataSpec

VIEWS = ("PA", "AP", "LL", "unknown")
NEEDED, PICTURE = 128, 160
"""Pixels a side that an image is decoded to at least, and longest side of a picture that is kept to be shown."""
SAMPLES, SHOWN, LISTED = 8, 12, 10
"""Pictures of a split and view, pictures of what is unusual, and texts or names, that are kept."""
GROUPS, OF_A_GROUP = 24, 4
_CHUNK = 16

LONG, RARE = 40, 3
"""A report of so many words in at most so many studies is its patient's own; shorter ones are alike by chance."""
TOLD = 5
"""Words of a report that an indication never holds by chance."""

CONSTANT, SATURATED, BLACK, FAINT, INVERTED = 2 / 255, 0.2, 0.7, 0.06, -0.25
"""Range of gray, share of pixels at white and at black, standard deviation of gray, and correlation with an average
chest, at which an image is unusual. None of Indiana's 4,729 is; inverted, 98 % of them are."""

MARKS = {
    "XXXX": re.compile(r"(?<![A-Za-z])X{3,}(?![A-Za-z])"),
    "___": re.compile(r"_{2,}"),
    "[** **]": re.compile(r"\[\*\*.*?\*\*\]", re.DOTALL),
    "<unk> or [redacted]": re.compile(r"[<\[](?:unk|redacted|removed|anonymi[sz]ed)[>\]]", re.IGNORECASE),
}
"""What de-identification leaves in reports."""

_In = TypeVar("_In")
_Out = TypeVar("_Out")


class Image(NamedTuple):
    """One image of one study.

    Attributes:
        name: as the reader opens it.
        study: row of its study.
        view: PA, AP, LL or unknown.
        split: of its study.
    """

    name: str
    study: int
    view: str
    split: str


@dataclass
class SplitCounts:
    """What a split holds."""

    studies: int = 0
    patients: int = 0
    images: int = 0
    reports: int = 0


class LabelCounts(NamedTuple):
    """How often a label is each value."""

    present: int
    absent: int
    uncertain: int
    missing: int

    @property
    def prevalence(self) -> float:
        """Present among present and absent; NaN where it is neither."""
        known = self.present + self.absent
        return self.present / known if known else math.nan


@dataclass
class Copies:
    """Images that show one picture.

    Attributes:
        images: names.
        studies: names of their studies, one an image.
        views, splits: one an image.
        kinds: what each is to the first, "" for itself: "same file", "same pixels", "near" or "inverted".
        distances: bits in which its hash differs from that of the first.
        correlations: of its fine detail with that of the first.
        between: "splits", "patients", "studies" or "views of one study", the widest.
        contradictions: labels that are present in one of the studies and absent in another.
    """

    images: list[str]
    studies: list[str]
    views: list[str]
    splits: list[str]
    kinds: list[str]
    distances: list[int]
    correlations: list[float]
    between: str
    contradictions: list[str]


@dataclass
class Unusual:
    """Images that stand out in one way.

    Attributes:
        what: in words.
        count: how many.
        images: the most unusual of them, with what was measured.
    """

    what: str
    count: int
    images: list[tuple[Image, float]]


@dataclass
class Leak:
    """Something that one split or input tells of another.

    Attributes:
        kind: "patients", "images", "reports", "inputs" or "labels".
        count: how often.
        text: in words.
        examples: names, the first few.
        certain: False for what only makes a data set doubtful, such as labels that contradict each other.
    """

    kind: str
    count: int
    text: str
    examples: list[str]
    certain: bool = True


@dataclass
class Reports:
    """What the reports are like.

    Attributes:
        lengths: section -> words of each that is not empty.
        count, distinct: reports that are not empty, and how many differ in their words.
        frequent: reports that stand in more than one study, with the number of studies, the most frequent first.
        sentences: likewise; distinct_sentences of all.
        marks: mark of de-identification -> reports that have it.
        empty: studies without a word in the report after cleaning.
    """

    lengths: dict[str, NDArray[np.int64]]
    count: int
    distinct: int
    frequent: list[tuple[str, int]]
    sentences: list[tuple[str, int]]
    distinct_sentences: int
    marks: dict[str, int]
    empty: int


@dataclass
class Inspection:
    """What was found in a data set.

    Attributes:
        root: its folder.
        reader: name of its reader.
        settings: of the reader.
        refused: what stops a fit, in the words of `load_studies`; "" if nothing does.
        splits: split -> counts; "" is everything.
        views: view -> split -> images.
        labels: label -> split -> counts.
        per_patient: studies -> patients that have so many; per_study: images -> studies.
        headers: field -> value -> images.
        other_view: images whose header tells another view than the data set.
        total, looked: images of the data set, and how many were looked at.
        sampled: whether only a sample of the images was asked for.
        sizes: (n, 2) width and height of each image that could be read.
        gray: (n, 2) mean and standard deviation of its pixels.
        unusual: images that stand out.
        reports: of the texts.
        copies: groups of images that show one picture, those across splits first; copies_whole is False where there were
            too many to search.
        copies_between: widest relation -> groups.
        leaks: what leaks, and what is doubtful.
        skipped: reason -> images, files or studies that cannot be used, or that a reader doubts; skipped_examples: some
            of their names.
        samples: (split, view) -> images chosen by the seed.
        pictures: name of an image -> (h, w) uint8, of all that is to be shown.
        seed: that chose.
    """

    root: Path
    reader: str
    settings: dict[str, Any]
    refused: str
    splits: dict[str, SplitCounts]
    views: dict[str, dict[str, int]]
    labels: dict[str, dict[str, LabelCounts]]
    per_patient: dict[int, int]
    per_study: dict[int, int]
    headers: dict[str, dict[str, int]]
    other_view: int
    total: int
    looked: int
    sampled: bool
    sizes: NDArray[np.int64]
    gray: NDArray[np.float64]
    unusual: list[Unusual]
    reports: Reports
    copies: list[Copies]
    copies_whole: bool
    copies_between: dict[str, int]
    leaks: list[Leak]
    skipped: dict[str, int]
    skipped_examples: dict[str, list[str]]
    samples: dict[tuple[str, str], list[Image]]
    pictures: dict[str, NDArray[np.uint8]] = field(default_factory=dict)
    seed: int = 0

    @property
    def leaking(self) -> bool:
        """Whether anything leaks for certain."""
        return any(leak.certain for leak in self.leaks)


def reader_of(folder: Path) -> str:
    """The reader whose layout a folder has, with every setting as by default.

    Raises:
        DataError: none has it, or more than one.
    """
    found: list[str] = []
    # It takes whatever is DICOM, tables or not, so it is asked only where no other knows the layout.
    for name in sorted(READERS.names(), key=lambda name: name == "dicom-folder"):
        if found and name == "dicom-folder":
            break
        try:
            reader = READERS.build(READERS.settings_of(name).model_validate({"name": name, "root": str(folder)}), folder)
            first = next(iter(reader.read()), None) if name != "phantom" else None
            # A reader of any table sees studies in one that is meant otherwise, but not their images.
            if first is not None and all(reader.exists(image) for image in first["images"]):
                found.append(name)
        except (MedxrayError, ValidationError):
            continue
    if len(found) != 1:
        told = f"readers {' and '.join(found)} find studies in it" if found else "no reader finds a study in it"
        raise DataError(
            f"{folder}: {told}; "
            f"name one, as in: medxray inspect {(found or ['csv'])[0]} reader.root={folder}"
        )
    return found[0]


def inspect(
    spec: "DataSpec", *, images: int | None = None, seed: int = 0, workers: int | None = None, progress: bool = True
) -> Inspection:
    """Looks through a data set: its tables whole, and its images one by one, decoded small.

    Nothing stops at what is wrong: it is counted. `data.max_studies` and `data.fraction` are passed over.

    Args:
        spec: the data block of a spec.
        images: look at so many images, chosen by the seed; all if None. A smaller sample lies in a larger one.
        seed: also chooses the pictures that are shown.
        workers: processes that read; by default one a processor. The result is the same for any number.
        progress: show bars.

    Raises:
        DataError: the reader cannot list any study.
    """
    reader = READERS.build(spec.reader, Path(getattr(spec.reader, "root")))  # noqa: B009
    studies = list(reader.read())
    if not studies:
        raise DataError(f"{reader.root}: reader {spec.reader.name!r} found no study; check data.reader")
    studies = divide(studies, spec.split, spec.split_shares)
    everything = [
        Image(name, row, view, study["split"])
        for row, study in enumerate(studies)
        for name, view in zip(study["images"], study["views"], strict=True)
    ]
    chosen = _sample(everything, images, seed)
    workers = workers or cores()
    files = _Files(reader, spec.max_pixels, spec.shown)
    with tempfile.TemporaryFile() as file:
        seen = _look_at(files, chosen, workers, progress, file)
        groups, whole = _copies(files, seen, studies, workers, progress)
        unusual = _unusual(seen)
        samples = _samples(seen, seed)
    targets = [clean(study["report"], spec.cleaning) if study["report"].strip() else "" for study in studies]
    words = [_words(text) for text in targets]
    reports = _reports(studies, targets, words)
    skipped, examples = _skipped(reader, seen, studies, targets)
    found = Inspection(
        root=reader.root,
        reader=spec.reader.name,
        settings={k: v for k, v in spec.reader.model_dump().items() if k not in ("name", "root")},
        refused=_refusal(spec),
        splits=_split_counts(studies),
        views=_view_counts(everything),
        labels=_label_counts(studies),
        per_patient=dict(sorted(Counter(Counter(filter(None, (s["patient_id"] for s in studies))).values()).items())),
        per_study=dict(sorted(Counter(len(study["images"]) for study in studies).items())),
        headers=_header_counts(seen.headers),
        other_view=sum(
            header.view != image.view and "unknown" not in (header.view, image.view)
            for header, image in zip(seen.headers, seen.images, strict=True)
        ),
        total=len(everything),
        looked=len(chosen),
        sampled=images is not None and len(chosen) < len(everything),
        sizes=np.array([(header.width, header.height) for header in seen.headers], np.int64).reshape(-1, 2),
        gray=seen.gray[:, :2],
        unusual=unusual,
        reports=reports,
        copies=groups[:GROUPS],
        copies_whole=whole,
        copies_between=dict(Counter(group.between for group in groups)),
        leaks=_leaks(studies, groups, words),
        skipped=skipped,
        skipped_examples=examples,
        samples=samples,
        seed=seed,
    )
    shown = {name for group in found.copies for name in group.images[:OF_A_GROUP]}
    shown |= {image.name for entry in unusual for image, _ in entry.images}
    shown |= {image.name for images_ in samples.values() for image in images_}
    names = sorted(shown)
    small = _in_order(files.picture, names, workers, progress, "pictures")
    found.pictures = dict(zip(names, small, strict=True))
    return found


# Images


class _Look(NamedTuple):
    header: ImageHeader
    file: bytes
    gray: tuple[float, ...]  # mean, standard deviation, least, most, share at black, share at white
    detail: Coefficients


class _Failure(NamedTuple):
    reason: str


@dataclass
class _Files:
    """Opens images; goes to other processes, so that it holds plain values."""

    reader: Reader
    max_pixels: int
    shown: dict[str, Any]

    def look(self, image: Image) -> _Look | _Failure:
        """Everything that is asked of an image, in one pass."""
        where = str(self.reader.root / image.name)
        try:
            self.reader.inside(image.name, str(self.reader.root))
            source = self.reader.open(image.name)
            pixels = self._read(source, where, NEEDED)
            header = read_header(source, name=where)
        except DataError as error:
            return _Failure(_reason(str(error), where))
        least, most = float(pixels.min()), float(pixels.max())
        black, white = (float(ends.mean()) for ends in (pixels <= 1 / 255, pixels >= 254 / 255))
        gray = (float(pixels.mean(dtype=np.float64)), float(pixels.std(dtype=np.float64)), least, most, black, white)
        return _Look(header, _digest(source), gray, coefficients(pixels))

    def picture(self, name: str) -> NDArray[np.uint8]:
        """(h, w), the longer side `PICTURE` pixels or what the image has; one black pixel where it is damaged."""
        try:
            pixels = self._read(self.reader.open(name), str(self.reader.root / name), PICTURE)
        except DataError:
            # What was decoded small before may be damaged in its finer parts.
            return np.zeros((1, 1), np.uint8)
        h, w = pixels.shape[1:]
        scale = min(1.0, PICTURE / max(h, w))
        small = resize(pixels, (max(1, round(h * scale)), max(1, round(w * scale))))[0].numpy()
        return np.asarray((small * 255).round(), np.uint8)

    def whole(self, name: str) -> bytes:
        """A digest of the pixels, decoded whole; "" where they cannot be."""
        try:
            pixels = self._read(self.reader.open(name), str(self.reader.root / name), None)
        except DataError:
            return b""
        return hashlib.blake2b(pixels.tobytes(), digest_size=16, salt=f"{pixels.shape[2]}".encode()).digest()

    def _read(self, source: Path | bytes, where: str, least: int | None) -> NDArray[np.float32]:
        at_least = None if least is None else (least, least)
        return read_image(source, max_pixels=self.max_pixels, at_least=at_least, name=where, **self.shown)


def _digest(source: Path | bytes) -> bytes:
    if isinstance(source, bytes):
        return hashlib.blake2b(source, digest_size=16).digest()
    with open(source, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()


@dataclass
class _Seen:
    """Images that could be read, in order, and why others could not."""

    images: list[Image]
    headers: list[ImageHeader]
    files: list[bytes]
    gray: NDArray[np.float64]
    detail: Coefficients
    failures: list[tuple[Image, str]]


def _look_at(files: _Files, images: Sequence[Image], workers: int, progress: bool, file: Any) -> _Seen:
    """Each image once. What they are compared by goes to a file, which is mapped: 2 KB an image."""
    seen = _Seen([], [], [], np.zeros((0, 6)), np.zeros((0, COEFFICIENTS), np.float16), [])
    gray: list[tuple[float, ...]] = []
    near = files.reader.locality([image.name for image in images]) if images else None
    looks = _in_order(files.look, images, workers, progress, "images", None if near is None else near.parts)
    for image, found in zip(images, looks, strict=True):
        if isinstance(found, _Failure):
            seen.failures.append((image, found.reason))
            continue
        seen.images.append(image)
        seen.headers.append(found.header)
        seen.files.append(found.file)
        gray.append(found.gray)
        file.write(found.detail.tobytes())
    if gray:
        file.flush()
        seen.gray = np.array(gray, np.float64)
        seen.detail = np.memmap(file, np.float16, "r", shape=(len(gray), COEFFICIENTS))
    return seen


def _in_order(
    function: Callable[[_In], _Out],
    items: Sequence[_In],
    workers: int,
    progress: bool,
    what: str,
    parts: NDArray[np.int64] | None = None,
) -> Iterator[_Out]:
    """function(item) of each item, in order, by processes; few are ahead of what was taken, so that memory is bounded.

    Items of one part that follow each other, such as the images of a row group, go to one process.
    """
    starts = np.arange(0, len(items), _CHUNK) if parts is None else np.flatnonzero(np.diff(parts, prepend=parts[0] - 1))
    chunks = _Chunks(function, items, [*starts.tolist(), len(items)])
    own = min(workers, len(chunks)) if workers > 1 and len(chunks) > 1 else 0
    with warnings.catch_warnings():
        # More processes than cores are the user's choice.
        warnings.filterwarnings("ignore", "This DataLoader will create")
        loader: Any = iter(
            DataLoader(chunks, batch_size=None, num_workers=own, collate_fn=_as_it_is, worker_init_fn=end_unanswered)
        )
    with progress_bar(total=len(items), desc=what, unit="image", disable=not progress or not items) as bar:
        try:
            for chunk in loader:
                yield from chunk
                bar.update(len(chunk))
        except RuntimeError as error:
            if "worker" not in str(error):
                raise
            raise DataError(
                "a process that reads images died, perhaps for want of memory; inspect with fewer workers"
            ) from error


class _Chunks(torch.utils.data.Dataset[list[Any]]):
    """A few items at a time, so that processes do not speak of each."""

    def __init__(self, function: Callable[[Any], Any], items: Sequence[Any], edges: list[int]) -> None:
        self.function, self.items, self.edges = function, items, edges

    def __len__(self) -> int:
        return len(self.edges) - 1

    def __getitem__(self, place: int) -> list[Any]:
        return [self.function(item) for item in self.items[self.edges[place] : self.edges[place + 1]]]


def _as_it_is(chunk: list[Any]) -> list[Any]:
    return chunk


def _sample(images: list[Image], count: int | None, seed: int) -> list[Image]:
    if count is None or count >= len(images):
        return images
    ranks = [seed_of("inspect", seed, image.name) for image in images]
    taken = sorted(np.argsort(np.array(ranks), kind="stable")[:count].tolist())
    return [images[place] for place in taken]


def _samples(seen: _Seen, seed: int) -> dict[tuple[str, str], list[Image]]:
    """A few images of each split and view."""
    by: dict[tuple[str, str], list[Image]] = defaultdict(list)
    for image in seen.images:
        by[image.split, image.view].append(image)
    order = [(split, view) for split in _in_use({split for split, _ in by}) for view in VIEWS if (split, view) in by]
    return {key: _sample(by[key], SAMPLES, seed_of("shown", seed)) for key in order}


def _unusual(seen: _Seen) -> list[Unusual]:
    if not seen.images:
        return []
    _, spread, least, most, black, white = seen.gray.T
    constant = most - least < CONSTANT
    typical, upright = _likeness(seen)
    measured = {
        "constant: one gray everywhere": (constant, most),
        f"saturated: {SATURATED:.0%} of the pixels or more are white": (~constant & (white >= SATURATED), -white),
        f"black: {BLACK:.0%} of the pixels or more": (~constant & (black >= BLACK), -black),
        f"faint: the grays' standard deviation is below {FAINT}": (~constant & (black < BLACK) & (spread < FAINT), spread),
        "inverted-looking: like the negative of a chest": (upright < INVERTED, upright),
    }
    found = []
    for what, (those, value) in measured.items():
        rows = np.flatnonzero(those)
        first = rows[np.argsort(value[rows], kind="stable")][:SHOWN]
        if len(rows):
            found.append(Unusual(what, len(rows), [(seen.images[row], abs(float(value[row]))) for row in first]))
    rows = np.flatnonzero(~np.isnan(typical))
    if len(rows) > SHOWN:
        first = rows[np.argsort(typical[rows], kind="stable")][:SHOWN]
        what = "least like the average of their view, such as turned, wrongly labelled, or no chest; some are in any set"
        found.append(Unusual(what, 0, [(seen.images[row], float(typical[row])) for row in first]))
    return found


def _likeness(seen: _Seen) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Correlation of each image with the mean of its view, NaN where there are few, and with an average phantom."""
    views = np.array([image.view for image in seen.images])
    typical, upright = np.full(len(views), np.nan), np.zeros(len(views))
    for view in sorted(set(views)):
        rows = np.flatnonzero(views == view)
        atlas = _atlas("LL" if view == "LL" else "PA")
        mean = np.zeros(COEFFICIENTS)
        for unit in _units(seen.detail, rows):
            mean += unit.sum(0, dtype=np.float64)
        mean /= np.linalg.norm(mean) or 1.0
        shown = [np.stack([unit @ mean, unit @ atlas], 1) for unit in _units(seen.detail, rows)]
        likeness = np.concatenate(shown)
        upright[rows] = likeness[:, 1]
        if len(rows) > SHOWN:
            typical[rows] = likeness[:, 0]
    typical[seen.gray[:, 3] - seen.gray[:, 2] < CONSTANT] = np.nan
    return typical, upright


def _units(detail: Coefficients, rows: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
    """All coefficients but the mean gray, with norm 1, in blocks."""
    for start in range(0, len(rows), 4096):
        block = detail[rows[start : start + 4096]].astype(np.float32)
        block[:, 0] = 0
        yield block / np.maximum(np.linalg.norm(block, axis=1, keepdims=True), 1e-6)


@lru_cache(maxsize=2)
def _atlas(view: str) -> NDArray[np.float32]:
    """The coefficients of an average phantom."""
    from medxray.data.phantom import draw_study

    drawn = [draw_study(0, index, 64, views=(view,)).images[0] for index in range(8)]
    mean = np.stack(drawn).astype(np.float32).mean(0, keepdims=True) / np.float32(4095)
    return next(_units(coefficients(mean)[None], np.zeros(1, np.int64)))[0]


# Copies


def _copies(
    files: _Files, seen: _Seen, studies: list[Study], workers: int, progress: bool
) -> tuple[list[Copies], bool]:
    """All groups, those that matter most first, and whether the search came to its end."""
    n = len(seen.images)
    if not n:
        return [], True
    # Equal files and equal pictures are joined first, so that a thousand of one make no million pairs.
    by_file = _firsts(seen.files)
    by_picture = _firsts(hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in seen.detail)
    flat = seen.gray[:, 3] - seen.gray[:, 2] < CONSTANT
    by_picture[flat] = np.arange(n)[flat]
    single = np.flatnonzero(by_picture == np.arange(n))
    pairs = copies(seen.detail, single)
    first = np.concatenate([np.arange(n), np.arange(n), pairs.first])
    second = np.concatenate([by_file, by_picture, pairs.second])
    joined = coo_array((np.ones(len(first), bool), (first, second)), shape=(n, n))
    _, component = connected_components(joined, directed=False)
    order = np.argsort(component, kind="stable")
    groups = [rows for rows in np.split(order, np.flatnonzero(np.diff(component[order])) + 1) if len(rows) > 1]
    pixels = _whole_pixels(files, seen, groups, workers, progress)
    found = [_group(seen, studies, rows, pixels) for rows in groups]
    rank = ["splits", "patients", "studies", "views of one study"]
    found.sort(key=lambda group: (rank.index(group.between), -max(map(abs, group.correlations[1:]))))
    return found, pairs.whole


def _firsts(keys: Iterable[bytes]) -> NDArray[np.int64]:
    """For each key the first place where it stands."""
    place: dict[bytes, int] = {}
    return np.array([place.setdefault(key, row) for row, key in enumerate(keys)], np.int64)


def _whole_pixels(
    files: _Files, seen: _Seen, groups: list[NDArray[np.int64]], workers: int, progress: bool
) -> dict[int, bytes]:
    """Digests of the images in groups that have the size of another there, but not its bytes: decoded whole."""
    asked = []
    for rows in groups:
        size = Counter((seen.headers[row].width, seen.headers[row].height) for row in rows)
        if len({seen.files[row] for row in rows}) > 1:
            asked += [int(row) for row in rows if size[seen.headers[row].width, seen.headers[row].height] > 1]

    names = [seen.images[row].name for row in asked]
    return dict(zip(asked, _in_order(files.whole, names, workers, progress, "copies"), strict=True))


def _group(seen: _Seen, studies: list[Study], rows: NDArray[np.int64], pixels: dict[int, bytes]) -> Copies:
    images = [seen.images[row] for row in rows]
    own = [studies[image.study] for image in images]
    head = int(rows[0])
    signs = hashes(seen.detail[rows])
    correlations = correlate(seen.detail, np.full(len(rows), head), rows)
    kinds, distances = [""], [0]
    for place, row in list(enumerate(rows.tolist()))[1:]:
        opposite = correlations[place] < 0
        distances.append(int(np.bitwise_count(signs[0] ^ (~signs[place] if opposite else signs[place]))))
        if seen.files[row] == seen.files[head]:
            kinds.append("same file")
        elif pixels.get(row) and pixels[row] == pixels.get(head):
            kinds.append("same pixels")
        else:
            kinds.append("inverted" if opposite else "near")
    patients = {study["patient_id"] or study["study_id"] for study in own}
    between = (
        "splits" if len({image.split for image in images}) > 1
        else "patients" if len(patients) > 1
        else "studies" if len({image.study for image in images}) > 1
        else "views of one study"
    )  # fmt: skip
    names = dict.fromkeys(label for study in own for label in study["labels"])
    contradictions = [name for name in names if {0, 1} <= {study["labels"].get(name) for study in own}]
    return Copies(
        [image.name for image in images],
        [study["study_id"] for study in own],
        [image.view for image in images],
        [image.split for image in images],
        kinds,
        distances,
        [1.0, *correlations[1:].tolist()],
        between,
        contradictions,
    )


# Tables


def _in_use(splits: Iterable[str]) -> list[str]:
    """Splits in their order; names that are none come last."""
    given = set(splits)
    return [split for split in SPLITS if split in given] + sorted(given - set(SPLITS))


def _split_counts(studies: list[Study]) -> dict[str, SplitCounts]:
    found = {}
    for split in ["", *_in_use(study["split"] for study in studies)]:
        own = [study for study in studies if split in ("", study["split"])]
        found[split] = SplitCounts(
            len(own),
            len({study["patient_id"] for study in own} - {""}),
            sum(len(study["images"]) for study in own),
            sum(bool(study["report"].strip()) for study in own),
        )
    return found


def _view_counts(images: list[Image]) -> dict[str, dict[str, int]]:
    count = Counter((image.view, image.split) for image in images)
    splits = _in_use({image.split for image in images})
    views = [*VIEWS, *sorted({image.view for image in images} - set(VIEWS))]
    return {view: own for view in views if any((own := {s: count[view, s] for s in splits}).values())}


def _label_counts(studies: list[Study]) -> dict[str, dict[str, LabelCounts]]:
    names = dict.fromkeys(label for study in studies for label in study["labels"])
    splits = _in_use(study["split"] for study in studies)
    count: Counter[tuple[str, str, int | None]] = Counter(
        (name, study["split"], study["labels"].get(name)) for study in studies for name in names
    )
    return {
        name: {split: LabelCounts(*(count[name, split, value] for value in (1, 0, -1, None))) for split in splits}
        for name in names
    }


def _header_counts(headers: list[ImageHeader]) -> dict[str, dict[str, int]]:
    said = {True: "yes", False: "no", None: "not stated"}
    fields: dict[str, Callable[[ImageHeader], str]] = {
        "format": lambda header: header.format,
        "bits stored": lambda header: str(header.bits),
        "photometric": lambda header: header.photometric or "not stated",
        "manufacturer": lambda header: header.manufacturer or "not stated",
        "burned-in text": lambda header: said[header.burned_in],
        "frames": lambda header: str(header.frames),
    }
    counts = {name: Counter(map(value, headers)) for name, value in fields.items()}
    return {
        name: dict(sorted(count.items(), key=lambda item: (-item[1], item[0])))
        for name, count in counts.items()
        if set(count) - {"not stated"} and not (name == "frames" and set(count) == {"1"})
    }


def _reports(studies: list[Study], targets: list[str], words: list[str]) -> Reports:
    lengths: dict[str, NDArray[np.int64]] = {}
    texts = {"report": targets} | {
        section: [str(dict(study).get(section) or "") for study in studies]
        for section in ("findings", "impression", "indication", "prior")
    }
    for section, own in texts.items():
        sizes = [size for size in (len(re.findall(r"\w+", text)) for text in own) if size]
        if sizes:
            lengths[section] = np.array(sizes, np.int64)
    whole = Counter(filter(None, words))
    first = dict(zip(reversed(words), reversed(targets), strict=True))
    sentences = Counter(
        sentence for text in targets for sentence in {_words(part) for part in re.split(r"(?<=[.!?])\s+|\n+", text)} if sentence
    )
    raw = ["\n".join([s["report"], s["findings"], s["impression"]]) for s in studies]
    marks = {mark: sum(pattern.search(text) is not None for text in raw) for mark, pattern in MARKS.items()}
    return Reports(
        lengths=lengths,
        count=sum(whole.values()),
        distinct=len(whole),
        frequent=[(" ".join(first[text].split()), n) for text, n in _most(whole)],
        sentences=_most(sentences),
        distinct_sentences=len(sentences),
        marks={mark: n for mark, n in marks.items() if n},
        empty=sum(is_empty(text) for text in targets),
    )


def _most(counts: Counter[str]) -> list[tuple[str, int]]:
    """The most frequent of what stands more than once."""
    return sorted(((text, n) for text, n in counts.items() if n > 1), key=lambda item: (-item[1], item[0]))[:LISTED]


def _words(text: str) -> str:
    """A text's words alone, so that case, spaces and punctuation make no difference."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def _refusal(spec: "DataSpec") -> str:
    """Why a fit would not begin."""
    try:
        # With "skip" each image would be decoded whole; those that cannot be read are known already.
        load_studies(spec.model_copy(update={"max_studies": None, "fraction": 1.0}), images=spec.on_error == "raise")
    except DataError as error:
        return str(error)
    return ""


def _skipped(
    reader: Reader, seen: _Seen, studies: list[Study], targets: list[str]
) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Reason -> how often, and some names."""
    count: Counter[str] = Counter()
    names: dict[str, list[str]] = defaultdict(list)

    def add(reason: str, own: Iterable[str], n: int = 1) -> None:
        for name in own:
            count[reason] += n
            names[reason] += [name] if name and len(names[reason]) < LISTED else []

    for entry in [*reader.damaged, *reader.left_out]:
        file = entry["file"] or entry["study"]
        many = re.fullmatch(r"(\d+) files?: (.*)", entry["reason"], re.DOTALL)
        if many is not None:
            add(f"reader: {many[2]}", [""], int(many[1]))
        else:
            add(f"reader: {_reason(entry['reason'], str(reader.root / file)) if file else entry['reason']}", [file])
    for image, reason in seen.failures:
        add(f"image: {reason}", [image.name])
    add("study: no image", (study["study_id"] for study in studies if not study["images"]))
    empty = [study["study_id"] for study, text in zip(studies, targets, strict=True) if is_empty(text)]
    # A set without any report lacks none.
    add("study: no word in the report", empty if len(empty) < len(studies) else [])
    order = [reason for reason, _ in sorted(count.items(), key=lambda item: (-item[1], item[0]))]
    return {reason: count[reason] for reason in order}, {reason: names[reason] for reason in order}


def _reason(message: str, name: str) -> str:
    """An error's first part without what is this image's own: its name, numbers, and a decoder's words."""
    text = message.replace(name, "").lstrip(": ").split(";")[0]
    return re.sub(r"\d+", "N", re.sub(r"\s*\(.*\)", "", text, flags=re.DOTALL)).strip()


# Leaks


def _leaks(studies: list[Study], groups: list[Copies], words: list[str]) -> list[Leak]:
    found = [
        _patients_across(studies),
        _images_across(groups),
        _reports_across(studies, words),
        *_told_before(studies),
        _contradictions(groups),
    ]
    return [leak for leak in found if leak.count]


def _patients_across(studies: list[Study]) -> Leak:
    splits: dict[str, dict[str, str]] = defaultdict(dict)
    for study in studies:
        if study["patient_id"]:
            splits[study["patient_id"]].setdefault(study["split"], study["study_id"])
    across = {patient: own for patient, own in splits.items() if len(own) > 1}
    examples = [f"{patient}: {_listed(own)}" for patient, own in list(across.items())[:LISTED]]
    return Leak("patients", len(across), f"{_number(len(across), 'patient')} in more than one split", examples)


def _images_across(groups: list[Copies]) -> Leak:
    across = [group for group in groups if group.between == "splits"]
    pairs = Counter(tuple(_in_use(group.splits)) for group in across)
    where = ", ".join(f"{' and '.join(splits)} {n}" for splits, n in sorted(pairs.items()))
    examples = [" = ".join(f"{i} ({s})" for i, s in zip(g.images[:3], g.splits, strict=False)) for g in across[:LISTED]]
    return Leak("images", len(across), f"{_number(len(across), 'picture')} in more than one split ({where})", examples)


def _reports_across(studies: list[Study], words: list[str]) -> Leak:
    owners: dict[str, list[Study]] = defaultdict(list)
    for study, text in zip(studies, words, strict=True):
        if text.count(" ") + 1 >= LONG:
            owners[text].append(study)
    across = [own for own in owners.values() if len(own) <= RARE and len({study["split"] for study in own}) > 1]
    examples = [_listed({study["split"]: study["study_id"] for study in own}) for own in across[:LISTED]]
    text = f"{_number(len(across), 'report')} of {LONG} words or more, the same in two splits, and in no more than {RARE} studies"
    return Leak("reports", len(across), text, examples)


def _told_before(studies: list[Study]) -> Iterator[Leak]:
    """Reports that the model is given as an indication or a prior."""
    for column, least in (("indication", TOLD), ("prior", LONG)):
        told = []
        for study in studies:
            given = str(dict(study).get(column) or "")
            if not given:
                continue
            report, given = _words(study["report"]), _words(given)
            if report.count(" ") + 1 >= least and f" {report} " in f" {given} ":
                told.append(study["study_id"])
        text = f"{_number(len(told), 'report')} whole in the study's own {column}"
        yield Leak("inputs", len(told), text, told[:LISTED])


def _contradictions(groups: list[Copies]) -> Leak:
    those = [group for group in groups if group.contradictions]
    examples = [f"{', '.join(g.contradictions[:3])}: {', '.join(dict.fromkeys(g.studies))}" for g in those[:LISTED]]
    text = f"{_number(len(those), 'picture')} in studies whose labels contradict each other"
    return Leak("labels", len(those), text, examples, certain=False)


def _listed(names: dict[str, str]) -> str:
    return ", ".join(f"{names[split]} ({split})" for split in _in_use(names))


def _number(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"
