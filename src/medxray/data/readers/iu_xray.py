"""Indiana University chest X-rays (Open-i): R2Gen's annotation.json, or the public CSV tables."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from medxray.data.readers import Reader, frontal_first, read_text, split_of
from medxray.data.readers.csv import read_table
from medxray.types import DataError, Study

LEAST_STUDIES = 20
"""A tag of fewer training studies is too rare to learn or to score."""

NAMES = {"normal": "No Finding"}
UNREAD = "No Indexing"
"""The tag of studies whose problems nobody entered: their labels are missing, not absent."""


class IUXRay(Reader):
    """One study a patient. Labels are the problem tags that people entered, those of at least 20 training
    studies; "normal" is called "No Finding".

    Root holds either R2Gen's `annotation.json` and `images/` (and, for findings, impression and labels,
    `reports.csv`), or the public `indiana_reports.csv`, `indiana_projections.csv` and `images_normalized/`.
    Only the first has a split; the second's patients are divided 80/10/10 by a stable hash.
    R2Gen's file of MIMIC-CXR is read too: there an entry is one image with its report, and `subject_id` its patient.

    Args:
        annotation: name of R2Gen's file below root.
        report: section to learn, for the public tables; R2Gen's file has its own choice, the findings.
    """

    def __init__(
        self,
        root: Path,
        annotation: str = "annotation.json",
        report: Literal["findings", "impression"] = "findings",
    ) -> None:
        super().__init__(root)
        self.annotation, self.section = annotation, report

    def read(self) -> Iterable[Study]:
        """All studies of the layout that is found."""
        public = ("indiana_reports.csv", "indiana_projections.csv")
        if (self.root / self.annotation).is_file():
            studies, tags = self._r2gen()
        elif all((self.root / name).is_file() for name in public):
            studies, tags = self._public(*public)
        else:
            self._explain(public)
        _label(studies, tags)
        return studies

    def _explain(self, public: tuple[str, str]) -> Any:
        if self.root.is_dir():
            found = ", ".join(sorted(p.name for p in self.root.iterdir())[:10]) or "nothing"
        else:
            found = "no such folder"
        raise DataError(
            f"data.reader.root {self.root}: expected R2Gen's {self.annotation!r}, or {public[0]!r} and "
            f"{public[1]!r}; found {found}; check the path (it is taken from {Path.cwd()})"
        )

    def _r2gen(self) -> tuple[list[Study], list[str | None]]:
        path = self.file(self.annotation)
        try:
            splits = json.loads(read_text(path))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg}); fetch the file again") from None
        if not (isinstance(splits, dict) and all(isinstance(rows, list) for rows in splits.values())):
            raise DataError(f"{path}: expected an object with lists train, val and test, as R2Gen writes it")
        sections = self._sections()
        studies: list[Study] = []
        tags: list[str | None] = []
        for split, rows in splits.items():
            if split not in ("train", "val", "test"):
                raise DataError(f"{path}: split {split!r}; expected train, val or test")
            for index, row in enumerate(rows):
                where = f"{path}, {split}[{index}]"
                name, text, images = _entry(row, where)
                shown = [{"0": "PA", "1": "LL"}.get(Path(image).stem, "unknown") for image in images]
                paths, views = frontal_first([self.inside(f"images/{image}", where) for image in images], shown)
                section = sections.get(name)
                studies.append(
                    Study(
                        study_id=name,
                        patient_id=str(row.get("subject_id", _patient(name))),
                        images=paths,
                        views=views,
                        findings=section["findings"] if section else text,
                        impression=section["impression"] if section else "",
                        report=text,
                        labels={},
                        split=split,
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

    def _public(self, reports: str, projections: str) -> tuple[list[Study], list[str | None]]:
        texts, shots = read_table(self.file(reports)), read_table(self.file(projections))
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
            view = {"frontal": "PA", "lateral": "LL"}.get(projection.strip().lower(), "unknown")
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
                    report=texts[self.section][row],
                    labels={},
                    split=split_of(name),
                    indication=indications[row],
                )
            )
            tags.append(texts["Problems"][row])
        return studies, tags


def _entry(row: Any, where: str) -> tuple[str, str, list[str]]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: {row!r:.60} is no object; expected id, report and image_path")
    for key, kind in {"id": str, "report": str, "image_path": list}.items():
        if not isinstance(row.get(key), kind):
            raise DataError(
                f"{where}: {key!r} is {row.get(key)!r:.60}; expected a {'list' if kind is list else 'string'}"
            )
    if not all(isinstance(image, str) for image in row["image_path"]):
        raise DataError(f"{where}: 'image_path' is {row['image_path']!r:.60}; expected a list of strings")
    return row["id"], row["report"], row["image_path"]


def _patient(study_id: str) -> str:
    """The CXRnnn that R2Gen's ids begin with."""
    found = re.match(r"CXR\d+", study_id)
    return found[0] if found else study_id


def _label(studies: list[Study], tags: list[str | None]) -> None:
    read: list[set[str] | None] = []
    for cell in tags:
        found = {tag.strip() for tag in (cell or "").split(";")} - {""}
        read.append({NAMES.get(tag, tag) for tag in found} if found - {UNREAD} else None)
    count = Counter(
        tag for study, own in zip(studies, read, strict=True) if study["split"] == "train" for tag in own or ()
    )
    labels = sorted(tag for tag, n in count.items() if n >= LEAST_STUDIES)
    for study, own in zip(studies, read, strict=True):
        study["labels"] = {label: None if own is None else int(label in own) for label in labels}
