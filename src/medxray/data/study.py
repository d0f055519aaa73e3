"""The schema of a study, and a data set's way from its reader to checked studies."""

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset, Features, List, Value
from datasets.table import InMemoryTable

from medxray.data.images import read_image
from medxray.data.readers import READERS, Reader
from medxray.data.splits import SPLITS, divide
from medxray.data.subsets import subset
from medxray.data.text import clean, is_empty, without_marks
from medxray.progress import progress_bar
from medxray.registry import nearest
from medxray.types import DataError, ImageError, Study, html_table

if TYPE_CHECKING:
    from medxray.spec import DataSpec

FEATURES = Features(
    {
        "study_id": Value("string"),
        "patient_id": Value("string"),
        "images": List(Value("string")),
        "views": List(Value("string")),
        "findings": Value("string"),
        "impression": Value("string"),
        "report": Value("string"),
        "labels": {},
        "split": Value("string"),
        "indication": Value("string"),
        "prior": Value("string"),
        "burned_in": Value("int8"),
        "sex": Value("string"),
        "age_band": Value("string"),
        "manufacturer": Value("string"),
    }
)
"""Columns of every data set of studies; `features_of` fills in the labels."""


def features_of(labels: Iterable[str]) -> Features:
    """The schema with one int8 a label: 1 present, 0 absent, -1 uncertain, null missing."""
    return Features({**FEATURES, "labels": {label: Value("int8") for label in labels}})


@dataclass(repr=False)
class Studies:
    """A data set that has passed every check.

    Attributes:
        splits: train, val and test -> a `datasets.Dataset` of `medxray.types.Study`, in the reader's order; a
            split may be empty.
        labels: names of labels, the order of every label vector.
        root: folder that the paths in `images` are relative to.
        reader: opens the images.
        views: V, the constant number of views of a batch.
        skipped: what `data.on_error: skip` left out: {study, file, reason}; file is "" for a whole study.
    """

    splits: dict[str, Dataset]
    labels: list[str]
    root: Path
    views: int
    reader: Reader
    skipped: list[dict[str, str]] = field(default_factory=list)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {len(rows):,}" for name, rows in self.splits.items())
        return f"Studies({self.root}: {sizes}; {len(self.labels)} labels)"

    def _repr_html_(self) -> str:
        """For a notebook: how many studies, patients and images each split has, and the share of its studies with a label."""
        columns = []
        for rows in self.splits.values():
            labels = list(rows["labels"])
            patients = {patient for patient in rows["patient_id"] if patient}
            counts = (len(rows), len(patients), sum(map(len, rows["images"])))
            shares = (sum(own[name] == 1 for own in labels) / max(1, len(labels)) for name in self.labels)
            columns.append([*(f"{count:,}" for count in counts), *(f"{share:.0%}" for share in shares)])
        names = ("studies", "patients", "images", *map(escape, self.labels))
        return html_table(["", *self.splits], list(zip(names, *columns, strict=True)))

    def require(self, *splits: str) -> None:
        """Checks that splits hold studies.

        Raises:
            DataError: one is empty, or there is no such split.
        """
        for split in splits:
            if split not in self.splits:
                raise DataError(f"no split {split!r}{nearest(split, SPLITS)}; expected one of {', '.join(SPLITS)}")
            if not len(self.splits[split]):
                sizes = ", ".join(f"{name} {len(rows)}" for name, rows in self.splits.items())
                left_out = f"; {len(self.skipped)} things were skipped" if self.skipped else ""
                raise DataError(
                    f"{self.root}: split {split!r} has no study (found: {sizes}{left_out}); "
                    "check the split column and data.max_studies"
                )


def load_studies(spec: "DataSpec", *, reports: bool | None = None, images: bool = True) -> Studies:
    """Reads, checks and cleans a data set.

    With `on_error: skip` every image is decoded once here, so that what cannot be read is known, counted and
    left out before anything is computed; with "raise" a damaged image stops the first step that needs it.

    Args:
        spec: the data block of a spec.
        reports: whether each study must have a report; None asks for all or none.
        images: whether they are looked at; where they lie always is.

    Raises:
        DataError: two studies of one name, a patient in two splits, an unknown label, no training study, an
            image that is missing or outside the root, or a report without a word (the last two are listed in
            `skipped` instead where `on_error` is "skip"; a path outside the root never is).
    """
    reader = READERS.build(spec.reader, Path(getattr(spec.reader, "root")))  # noqa: B009
    studies = list(reader.read())
    root = reader.root
    if not studies:
        raise DataError(f"{root}: reader {spec.reader.name!r} found no study; check data.reader")
    studies = divide(studies, spec.split, spec.split_shares)
    _check_names(studies, root)
    _check_patients(studies, root)
    labels = _choose_labels(studies, spec.labels, root)
    skip = spec.on_error == "skip"
    skipped = _left_out(reader, skip)
    if spec.burned_in == "drop":
        studies = _not_burned_in(studies, skipped)
    studies = subset(_first(studies, spec.max_studies), spec.fraction)
    if spec.marks == "drop":
        studies = [_without_marks(study) for study in studies]
    studies = _with_reports(studies, spec, reports, skip, skipped, root)
    _check_paths(studies, reader)
    if images:
        studies = _with_images(studies, reader, skip, spec, skipped)
    features = features_of(labels)
    try:
        splits = {split: _dataset([s for s in studies if s["split"] == split], labels, features) for split in SPLITS}
    except UnicodeEncodeError:
        raise _half_a_character(studies, root) from None
    most = max((len(s["images"]) for s in studies), default=1)
    views = 1 if spec.views == "single" else min(spec.max_views, most)
    found = Studies(splits, labels, root, views, reader, skipped)
    found.require("train")
    return found


def _check_names(studies: list[Study], root: Path) -> None:
    count = Counter(s["study_id"] for s in studies)
    if len(count) < len(studies):
        twice = [name for name, n in count.items() if n > 1]
        raise DataError(f"{root}: study_id {_some(twice)} used by more than one study; give each study its own name")
    for study in studies:
        if study["split"] not in SPLITS:
            raise DataError(
                f"{root}: study {study['study_id']!r} has split {study['split']!r}; expected one of {SPLITS}"
            )


def _check_patients(studies: list[Study], root: Path) -> None:
    splits: dict[str, set[str]] = {}
    for study in studies:
        if study["patient_id"]:
            splits.setdefault(study["patient_id"], set()).add(study["split"])
    leaks = {patient: own for patient, own in splits.items() if len(own) > 1}
    if leaks:
        examples = [f"{patient} in {' and '.join(sorted(own))}" for patient, own in leaks.items()]
        raise DataError(
            f"{root}: {len(leaks)} patients in two splits ({', '.join(examples[:3])}); all studies of a "
            "patient must be in one; mend the split column, or set data.split: patient to divide by patient"
        )


def _choose_labels(studies: list[Study], wanted: list[str] | None, root: Path) -> list[str]:
    known = list(dict.fromkeys(label for study in studies for label in study["labels"]))
    for label in wanted or ():
        if label not in known:
            raise DataError(
                f"data.labels: {root} has no label {label!r}{nearest(label, known)} "
                f"(found: {', '.join(known) or 'none'})"
            )
    return known if wanted is None else list(wanted)


def _left_out(reader: Reader, skip: bool) -> list[dict[str, str]]:
    if reader.damaged and not skip:
        first = reader.damaged[0]
        raise DataError(
            f"{reader.root}: files that cannot be read: {len(reader.damaged)}, such as {first['file']} ({first['reason']}); mend "
            "or remove them, or set data.on_error: skip"
        )
    return [*reader.left_out, *reader.damaged]


def _not_burned_in(studies: list[Study], skipped: list[dict[str, str]]) -> list[Study]:
    kept = []
    for study in studies:
        if study.get("burned_in") == 1:
            reason = "a header says that annotations are burned into an image (data.burned_in: drop)"
            skipped.append({"study": study["study_id"], "file": "", "reason": reason})
        else:
            kept.append(study)
    return kept


def _first(studies: list[Study], most: int | None) -> list[Study]:
    if most is None:
        return studies
    seen: Counter[str] = Counter()
    kept = []
    for study in studies:
        seen[study["split"]] += 1
        if seen[study["split"]] <= most:
            kept.append(study)
    return kept


_TEXTS = ("findings", "impression", "report", "indication", "prior")


def _without_marks(study: Study) -> Study:
    texts: dict[str, Any] = {key: without_marks(str(text)) for key in _TEXTS if (text := dict(study).get(key))}
    return Study(**{**study, **texts})  # type: ignore[typeddict-item]


def _with_reports(
    studies: list[Study],
    spec: "DataSpec",
    reports: bool | None,
    skip: bool,
    skipped: list[dict[str, str]],
    root: Path,
) -> list[Study]:
    """Cleans every report; studies without a word in it raise or are listed."""
    if reports is None:
        reports = any(study["report"].strip() for study in studies)
    rule = spec.cleaning
    dropped = "set data.reader.without_report: drop" if hasattr(spec.reader, "without_report") else "choose another report column"
    kept = []
    for study in studies:
        # A rule may make a full stop of nothing; a study without a report has none.
        text = clean(study["report"], rule) if study["report"].strip() else ""
        if reports and is_empty(text):
            reason = f"report is empty after cleaning by {rule!r} (raw: {study['report'][:60]!r})"
            if not skip:
                raise DataError(
                    f"{root}: study {study['study_id']!r}: {reason}; remove the study, {dropped}, or set data.on_error: skip"
                )
            skipped.append({"study": study["study_id"], "file": "", "reason": reason})
            continue
        kept.append(Study(**{**study, "report": text}))
    return kept


def _check_paths(studies: list[Study], reader: Reader) -> None:
    for study in studies:
        for image in study["images"]:
            reader.inside(image, f"{reader.root}: study {study['study_id']!r}")


def _with_images(
    studies: list[Study], reader: Reader, skip: bool, spec: "DataSpec", skipped: list[dict[str, str]]
) -> list[Study]:
    """Studies with the images that can be used: decoded with `skip`, else only looked for."""
    names = [image for study in studies for image in study["images"]]
    if not skip:
        missing = [name for name in names if not reader.exists(name)]
        if missing:
            slashes = "; folders are parted by \\: write them with /" if any("\\" in name for name in missing) else ""
            raise DataError(
                f"{reader.root}: {len(missing)} of {len(names)} images are missing: {_some(missing)}; "
                f"check data.reader.root, or set data.on_error: skip{slashes}"
            )
        bare = [study["study_id"] for study in studies if not study["images"]]
        if bare:
            raise DataError(
                f"{reader.root}: study {_some(bare)} without an image; remove it, or set data.on_error: skip"
            )
        return studies

    def unreadable(name: str) -> str | None:
        try:
            read_image(
                reader.open(name), max_pixels=spec.max_pixels, name=str(reader.root / name), **spec.shown
            )
        except ImageError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        looked = progress_bar(pool.map(unreadable, names), desc="looking", total=len(names), unit="image", delay=2)
        reasons = iter(list(looked))
    kept = []
    for study in studies:
        good = []
        for i, image in enumerate(study["images"]):
            reason = next(reasons)
            if reason is None:
                good.append(i)
            else:
                skipped.append({"study": study["study_id"], "file": image, "reason": reason})
        if good:
            images, views = ([study[key][i] for i in good] for key in ("images", "views"))
            kept.append(Study(**{**study, "images": images, "views": views}))
        else:
            skipped.append({"study": study["study_id"], "file": "", "reason": "no readable image"})
    return kept


def _dataset(studies: list[Study], labels: list[str], features: Features) -> Dataset:
    unknown = dict.fromkeys(FEATURES, "") | {"burned_in": None}
    columns: dict[str, list[Any]] = {key: [dict(s).get(key, unknown[key]) for s in studies] for key in FEATURES}
    columns["labels"] = [{label: s["labels"].get(label) for label in labels} for s in studies]
    # `Dataset.from_dict` looks at every value in Python first.
    return Dataset(InMemoryTable.from_pydict(columns, schema=features.arrow_schema))


def _half_a_character(studies: list[Study], root: Path) -> DataError:
    for study in studies:
        for column, value in study.items():
            try:
                repr(value).encode() if isinstance(value, list) else str(value).encode()
            except UnicodeEncodeError as error:
                half = error.object[error.start]
                return DataError(
                    f"{root}: study {study['study_id']!a}: {column} holds half a character ({half!a}); write the file "
                    "again as UTF-8"
                )
    return DataError(f"{root}: a label's name holds half a character; write the file again as UTF-8")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name if len(name) <= 200 else f"{name[:197]}...") for name in names[:3]) + more
