"""Indiana University chest X-rays (Open-i): R2Gen's annotation.json, the public CSV tables, or its own XML reports."""

import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

from medxray.data.readers import Reader, frontal_first, split_of
from medxray.data.readers.csv import read_table
from medxray.data.readers.reports import chosen, read_annotation
from medxray.types import DataError, Study

LEAST_STUDIES = 20
"""A tag of fewer training studies is too rare to learn or to score."""

PUBLIC = ("indiana_reports.csv", "indiana_projections.csv")
PACKED = "NLMCXR_reports.tgz"
NAMES = {"normal": "No Finding"}
UNREAD = "No Indexing"
"""The tag of studies whose problems nobody entered: their labels are missing, not absent."""


class IUXRay(Reader):
    """One study a patient. Labels are the problem tags that people entered, those of at least `least_studies` training
    studies; "normal" is called "No Finding".

    Root holds R2Gen's `annotation.json` and `images/` (and, for findings, impression and labels, `reports.csv`); or the
    public `indiana_reports.csv`, `indiana_projections.csv` and `images_normalized/`; or what Open-i gives out: the XML
    reports (`ecgen-radiology/`, or `NLMCXR_reports.tgz` as it is) and their PNG images in a folder (`NLMCXR_png/`,
    `images/` or root itself). Only the first has a split; the patients of the others are divided 80/10/10 by a stable
    hash. The XML does not tell frontal from lateral: views come from `indiana_projections.csv` if it lies there too.
    R2Gen's file of MIMIC-CXR is read too: there an entry is one image with its report, and `subject_id` its patient.

    Args:
        annotation: name of R2Gen's file below root.
        report: sections to learn, for the public tables and the XML; R2Gen's file has its own choice, the findings.
        without_report: what becomes of a study without them.
        tags: of the XML, those that people entered (major), without what is said of a problem after its name, or those
            that a program found in the text (automatic).
        least_studies: a tag of fewer training studies is too rare to learn or to score.
    """

    def __init__(
        self,
        root: Path,
        annotation: str = "annotation.json",
        report: Literal["findings", "impression", "findings+impression"] = "findings",
        without_report: Literal["keep", "drop"] = "keep",
        tags: Literal["major", "automatic"] = "major",
        least_studies: int = LEAST_STUDIES,
    ) -> None:
        super().__init__(root)
        self.annotation, self.section, self.without_report = annotation, report, without_report
        self.tags, self.least_studies = tags, least_studies

    def read(self) -> Iterable[Study]:
        """All studies of the layout that is found.

        Raises:
            DataError: none is found, or a table, an entry or a report of it is damaged.
        """
        if (self.root / self.annotation).is_file():
            studies, tags = self._r2gen()
        elif all((self.root / name).is_file() for name in PUBLIC):
            studies, tags = self._public()
        elif reports := self._reports():
            studies, tags = self._open_i(reports)
        else:
            self._explain()
        if self.without_report == "drop":
            kept = [(study, own) for study, own in zip(studies, tags, strict=True) if study["report"].strip()]
            studies, tags = [study for study, _ in kept], [own for _, own in kept]
        _label(studies, tags, self.least_studies)
        return studies

    def _explain(self) -> Any:
        if self.root.is_dir():
            found = ", ".join(sorted(p.name for p in self.root.iterdir())[:10]) or "nothing"
        else:
            found = "no such folder"
        raise DataError(
            f"data.reader.root {self.root}: expected R2Gen's {self.annotation!r}, or {PUBLIC[0]!r} and {PUBLIC[1]!r}, or "
            f"Open-i's 'ecgen-radiology' or {PACKED!r}; found {found}; check the path (it is taken from {Path.cwd()})"
        )

    def _r2gen(self) -> tuple[list[Study], list[str | None]]:
        sections = self._sections()
        studies: list[Study] = []
        tags: list[str | None] = []
        for entry in read_annotation(self.file(self.annotation)):
            shown = [{"0": "PA", "1": "LL"}.get(Path(image).stem, "unknown") for image in entry.images]
            paths, views = frontal_first([self.inside(f"images/{image}", entry.where) for image in entry.images], shown)
            section = sections.get(entry.name)
            studies.append(
                Study(
                    study_id=entry.name,
                    patient_id=str(entry.fields.get("subject_id", _patient(entry.name))),
                    images=paths,
                    views=views,
                    findings=section["findings"] if section else entry.report,
                    impression=section["impression"] if section else "",
                    report=entry.report,
                    labels={},
                    split=entry.split,
                    indication=section["indication"] if section else "",
                )
            )
            tags.append(section["problems"] if section else None)
        return studies, tags

    def _sections(self) -> dict[str, dict[str, str]]:
        """R2Gen's id -> findings, impression, problems and indication, where reports.csv lies beside the annotation."""
        path = self.root / "reports.csv"
        if not path.is_file():
            return {}
        table = read_table(path)
        columns = {name: table[name] for name in ("findings", "impression", "problems")}
        columns["indication"] = table.columns.get("indication", [""] * len(table))
        return {
            name: {column: cells[row] for column, cells in columns.items()}
            for row, name in enumerate(table["r2gen_id"])
            if name
        }

    def _public(self) -> tuple[list[Study], list[str | None]]:
        texts, shots = (read_table(self.file(name)) for name in PUBLIC)
        folder = next((f for f in ("images_normalized", "images/images_normalized") if (self.root / f).is_dir()), ".")
        indications = texts.columns.get("indication", [""] * len(texts))
        row_of = {uid: row for row, uid in enumerate(texts["uid"])}
        if len(row_of) < len(texts):
            uid = Counter(texts["uid"]).most_common(1)[0][0]
            raise DataError(f"{texts.path}: uid {uid!r} stands more than once; remove a row")
        images: dict[str, list[tuple[str, str]]] = {}
        cells = zip(shots["uid"], shots["filename"], shots["projection"], strict=True)
        for row, (uid, file, projection) in enumerate(cells):
            if uid not in row_of:
                raise DataError(
                    f"{shots.where(row)}: uid {uid!r} has no row in {texts.path.name}; remove it or add the report"
                )
            view = _VIEWS.get(projection.strip().lower(), "unknown")
            images.setdefault(uid, []).append((self.inside(f"{folder}/{file}", shots.where(row)), view))
        studies: list[Study] = []
        tags: list[str | None] = []
        for uid, row in row_of.items():
            # A report without an image has nothing to learn from.
            if uid not in images:
                continue
            paths, views = frontal_first(*zip(*images[uid], strict=True))
            name = f"CXR{uid}"
            studies.append(
                Study(
                    study_id=name,
                    patient_id=name,
                    images=paths,
                    views=views,
                    findings=texts["findings"][row],
                    impression=texts["impression"][row],
                    report=chosen({name: texts[name][row] for name in ("findings", "impression")}, self.section),
                    labels={},
                    split=split_of(name),
                    indication=indications[row],
                )
            )
            tags.append(texts["Problems"][row])
        return studies, tags

    def _reports(self) -> Path | None:
        """The folder of XML reports, or their archive."""
        for folder in ("ecgen-radiology", "NLMCXR_reports/ecgen-radiology", "NLMCXR_reports", "."):
            if any((self.root / folder).glob("*.xml")):
                return self.root / folder
        return self.root / PACKED if (self.root / PACKED).is_file() else None

    def _open_i(self, reports: Path) -> tuple[list[Study], list[str | None]]:
        folders = ("NLMCXR_png", "images", "png", ".")
        folder = next((name for name in folders if any((self.root / name).glob("CXR*.png"))), folders[0])
        known = self._projections()
        files: dict[str, str] = {}
        studies: list[Study] = []
        tags: list[str | None] = []
        for where, root in sorted(_parsed(reports), key=lambda pair: _number(pair[0])):
            name = next((str(uid.get("id")) for uid in root.iter("uId")), "")
            if not name:
                raise DataError(f"{where}: no uId; expected a report of Open-i; fetch it again")
            if name in files:
                raise DataError(f"{where}: report {name!r} stands in {files[name]} as well; remove one")
            files[name] = where
            sections: dict[str, str] = {}
            for text in root.iter("AbstractText"):
                label = str(text.get("Label")).lower()
                sections[label] = f"{sections.get(label, '')} {''.join(text.itertext())}".strip()
            names = [str(image.get("id")) for image in root.iter("parentImage")]
            # A report without an image has nothing to learn from.
            if not names:
                continue
            paths = [self.inside(f"{folder}/{image}.png", where) for image in names]
            paths, views = frontal_first(paths, [known.get(_short(image), "unknown") for image in names])
            findings, impression = sections.get("findings", ""), sections.get("impression", "")
            studies.append(
                Study(
                    study_id=name,
                    patient_id=name,
                    images=paths,
                    views=views,
                    findings=findings,
                    impression=impression,
                    report=chosen(sections, self.section),
                    labels={},
                    split=split_of(name),
                    indication=sections.get("indication", ""),
                )
            )
            tags.append(self._tags(root))
        return studies, tags

    def _tags(self, root: ElementTree.Element) -> str:
        """As the public table writes them."""
        major = [(tag.text or "").strip().partition("/")[0] for tag in root.iter("major")]
        if self.tags == "major":
            return ";".join(major)
        plain = [tag for tag in major if tag in (UNREAD, *NAMES)]
        return ";".join(plain + [(tag.text or "").strip() for tag in root.iter("automatic")])

    def _projections(self) -> dict[str, str]:
        """Image -> view, from the public table if it is there."""
        if not (self.root / PUBLIC[1]).is_file():
            return {}
        table = read_table(self.root / PUBLIC[1])
        cells = zip(table["filename"], table["projection"], strict=True)
        return {
            _short(file.removesuffix(".dcm.png")): _VIEWS.get(view.strip().lower(), "unknown") for file, view in cells
        }


_VIEWS = {"frontal": "PA", "lateral": "LL"}


def _parsed(reports: Path) -> Iterator[tuple[str, ElementTree.Element]]:
    """Name and content of each XML report of a folder or of its archive."""
    if reports.is_dir():
        for path in reports.glob("*.xml"):
            yield str(path), _parse(path.read_bytes(), str(path))
        return
    try:
        with tarfile.open(reports, "r:gz") as tar:
            for member in tar:
                # A link may lead nowhere.
                file = tar.extractfile(member) if member.isreg() and member.name.endswith(".xml") else None
                if file is not None:
                    where = f"{reports}: {member.name}"
                    yield where, _parse(file.read(), where)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{reports}: damaged or no archive ({error}); fetch it again") from None


def _parse(data: bytes, where: str) -> ElementTree.Element:
    # Reports have no entities of their own, which could be made to grow without end.
    if b"<!DOCTYPE" in data or b"<!ENTITY" in data:
        raise DataError(f"{where}: has a document type; expected a plain report of Open-i; fetch it again")
    try:
        return ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        raise DataError(f"{where}, line {error.position[0]}: not XML ({error}); fetch it again") from None


def _number(where: str) -> tuple[int, str]:
    """Orders 2.xml before 10.xml."""
    found = re.search(r"(\d+)\.xml$", where)
    return int(found[1]) if found else 0, where


def _short(image: str) -> str:
    """What both names of an image have: CXR1_1_IM-0001-3001 is 1_IM-0001-3001 in the public table."""
    return re.sub(r"^(?:CXR)?(\d+)_(?:\d+_)?IM", r"\1_IM", image)


def _patient(study_id: str) -> str:
    """The CXRnnn that R2Gen's ids begin with."""
    found = re.match(r"CXR\d+", study_id)
    return found[0] if found else study_id


def _label(studies: list[Study], tags: list[str | None], least: int) -> None:
    read: list[set[str] | None] = []
    for cell in tags:
        found = {tag.strip() for tag in (cell or "").split(";")} - {""}
        read.append({NAMES.get(tag, tag) for tag in found} if found - {UNREAD} else None)
    count = Counter(
        tag for study, own in zip(studies, read, strict=True) if study["split"] == "train" for tag in own or ()
    )
    labels = sorted(tag for tag, n in count.items() if n >= least)
    for study, own in zip(studies, read, strict=True):
        study["labels"] = {label: None if own is None else int(label in own) for label in labels}
