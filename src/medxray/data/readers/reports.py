"""What of a report is learned, which report was before it, and R2Gen's file of reports."""

import json
from collections.abc import Hashable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from medxray.data.readers import read_text
from medxray.types import DataError

Part = Literal["findings", "impression", "findings+impression", "all"]
"""What of a report is learned."""


def chosen(sections: Mapping[str, str], part: Part, whole: str = "") -> str:
    """The text to learn; "" where the report has no such section.

    Args:
        sections: name -> text.
        part: of two sections, what there is of them.
        whole: the text of which they are sections.
    """
    if part == "all":
        return whole
    # "Findings and impression" under one heading are both.
    return " ".join(dict.fromkeys(filter(None, (sections.get(name, "").strip() for name in part.split("+")))))


def studies_before(patients: Mapping[str, str], times: Mapping[str, float]) -> dict[str, str]:
    """Study -> the same patient's study before it; one without a time has none and is none.

    Of two studies at one time neither is before the other.

    Args:
        patients: study -> patient.
        times: study -> any number that grows with time.
    """
    own: dict[Hashable, list[tuple[float, str]]] = {}
    for study, time in times.items():
        own.setdefault(patients[study], []).append((time, study))
    found = {}
    for visits in own.values():
        visits.sort()
        last: tuple[float, str] | None = None
        for (time, study), (after, later) in pairwise(visits):
            last = (time, study) if time < after else last
            if last:
                found[later] = last[1]
    return found


class Entry(NamedTuple):
    """A report of R2Gen's file.

    Attributes:
        where: file, split and number, as messages begin.
        split: train, val or test.
        name: its `id`.
        report: the text.
        images: paths as written.
        fields: all that the entry holds.
    """

    where: str
    split: str
    name: str
    report: str
    images: list[str]
    fields: Mapping[str, Any]


def read_annotation(path: Path) -> list[Entry]:
    """R2Gen's `annotation.json`: an object with lists train, val and test of entries with id, report and image_path.

    Raises:
        DataError: it is none, with the entry that shows it.
    """
    try:
        splits = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg}); fetch the file again") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: no annotation ({error}); fetch the file again") from None
    if not (isinstance(splits, dict) and all(isinstance(rows, list) for rows in splits.values())):
        raise DataError(f"{path}: expected an object with lists train, val and test, as R2Gen writes it")
    entries = []
    for split, rows in splits.items():
        if split not in ("train", "val", "test"):
            raise DataError(f"{path}: split {split!r}; expected train, val or test")
        for index, row in enumerate(rows):
            where = f"{path}, {split}[{index}]"
            if not isinstance(row, dict):
                raise DataError(f"{where}: {row!r:.60} is no object; expected id, report and image_path")
            for key, kind in {"id": str, "report": str, "image_path": list}.items():
                if not isinstance(row.get(key), kind):
                    raise DataError(
                        f"{where}: {key!r} is {row.get(key)!r:.60}; expected a {'list' if kind is list else 'string'}"
                    )
            if not all(isinstance(image, str) for image in row["image_path"]):
                raise DataError(f"{where}: 'image_path' is {row['image_path']!r:.60}; expected a list of strings")
            entries.append(Entry(where, split, row["id"], row["report"], row["image_path"], row))
    return entries
