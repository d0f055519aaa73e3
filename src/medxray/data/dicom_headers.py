"""What DICOM headers say that studies are made of, and the text of structured reports.

Values are decoded here and not by pydicom, whose warnings and errors repeat what they are about.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from medxray.data.attributes import age_band_between, age_band_of
from medxray.types import DataError

if TYPE_CHECKING:
    from pydicom import Dataset

TAGS = {
    "charset": 0x00080005, "type": 0x00080008, "class": 0x00080016, "instance": 0x00080018, "study date": 0x00080020,
    "acquisition date": 0x00080022, "content date": 0x00080023, "study time": 0x00080030, "acquisition time": 0x00080032,
    "content time": 0x00080033, "accession": 0x00080050, "modality": 0x00080060, "intent": 0x00080068,
    "manufacturer": 0x00080070, "series": 0x0008103E, "region": 0x00082218, "patient": 0x00100020, "issuer": 0x00100021,
    "birth": 0x00100030, "sex": 0x00100040, "age": 0x00101010, "body part": 0x00180015,
    "protocol": 0x00181030, "view": 0x00185101, "study": 0x0020000D, "series number": 0x00200011, "number": 0x00200013,
    "orientation": 0x00200020, "rows": 0x00280010, "burned in": 0x00280301, "views": 0x00540220,
    "code": 0x00080100, "long code": 0x00080119, "meaning": 0x00080104, "kind": 0x0040A040, "relation": 0x0040A010,
    "concept": 0x0040A043, "items": 0x0040A730, "text": 0x0040A160, "coded": 0x0040A168, "measured": 0x0040A300,
    "numeric": 0x0040A30A, "unit": 0x004008EA, "complete": 0x0040A491, "verified": 0x0040A493,
}  # fmt: skip
"""Names that elements have here."""

HEADER = [TAGS[name] for name in list(TAGS)[: list(TAGS).index("views") + 1]]
"""What is read of a header."""

_CLASS_OF_FILE = 0x00020002

_VIEW_CODES = {
    "272479007": "PA", "R-10214": "PA", "R-40888": "PA", "399348003": "AP", "R-10206": "AP",
    **dict.fromkeys(("399198007", "399173006", "399067008", "399352003", "399260004", "R-10232", "R-10236", "R-102CD",
                     "R-10228", "R-10224"), "LL"),
}  # fmt: skip
"""PS3.16 CID 4010, DX views, in SNOMED CT and SNOMED RT."""

_VIEW_WORDS = {
    **dict.fromkeys(("pa", "posteroanterior", "dorsoventral"), "PA"),
    **dict.fromkeys(("ap", "anteroposterior", "ventrodorsal"), "AP"),
    **dict.fromkeys(("ll", "rl", "lat", "lateral", "profile", "profil", "seitlich", "seitl"), "LL"),
}

_HEADINGS = {
    **dict.fromkeys(("121070", "121071", "59776-5", "18782-3"), "FINDINGS"),
    **dict.fromkeys(("121072", "121073", "121076", "121077", "19005-8", "55110-1"), "IMPRESSION"),
    **dict.fromkeys(("121109", "121060", "121062", "18785-6", "11329-0", "55752-0", "55115-0"), "INDICATION"),
    **dict.fromkeys(("121064", "121065", "55111-9"), "TECHNIQUE"),
    **dict.fromkeys(("121066", "121068", "121069", "55114-3", "18834-2"), "COMPARISON"),
    **dict.fromkeys(("121074", "121075", "18783-1"), "RECOMMENDATIONS"),
    **dict.fromkeys(("121078", "55107-7"), "ADDENDUM"),
}
"""PS3.16 CID 7001 and 7002, headings and elements of diagnostic imaging reports, in DCM and LOINC."""

_SAID = {"", "CONTAINS", "INFERRED FROM", "HAS PROPERTIES"}
"""Relationships whose items belong to a report's text; the others tell who observed whom, when, and of which images."""


class Header:
    """A header, or an item of a sequence, by the names of `TAGS`. What is not there is "".

    Args:
        data: as pydicom has read it.
        outer: the header that an item lies in.
    """

    def __init__(self, data: "Dataset", outer: "Header | None" = None) -> None:
        self.data = data
        self._charset: str = outer._charset if outer is not None else self["charset"]

    def __contains__(self, name: str) -> bool:
        return TAGS[name] in self.data

    def __getitem__(self, name: str) -> str:
        """The text of an element without white space at its ends; several values are parted by a backslash."""
        if TAGS[name] not in self.data:
            return ""
        return self._text(self.data.get_item(TAGS[name]).value)

    def items(self, name: str) -> list["Header"]:
        """The items of a sequence."""
        if TAGS[name] not in self.data:
            return []
        return [Header(item, self) for item in self.data[TAGS[name]].value or ()]

    def code(self, name: str) -> str:
        """The first code of a sequence of codes."""
        return next((item["code"] or item["long code"] for item in self.items(name)), "")

    def meaning(self, name: str) -> str:
        """What the first code of a sequence means."""
        return next((item["meaning"] for item in self.items(name)), "")

    def whole(self, name: str) -> int:
        """A whole number; 0 where there is none."""
        found = re.match(r"[+-]?\d{1,9}", self[name])
        return int(found[0]) if found else 0

    @property
    def storage(self) -> str:
        """UID of the SOP class; that of the file's meta information where the data set tells none."""
        meta = getattr(self.data, "file_meta", None)
        told = self._text(meta.get_item(_CLASS_OF_FILE).value) if meta and _CLASS_OF_FILE in meta else ""
        return self["class"] or told

    def moment(self) -> tuple[str, str]:
        """When the study was: day and time as far as they are told, to be compared as text; and the day, YYYYMMDD."""
        for which in ("study", "acquisition", "content"):
            day = re.match(r"(\d{4})[.-]?(\d{2})[.-]?(\d{2})", self[f"{which} date"])
            if day:
                digits, _, parts = self[f"{which} time"].replace(":", "").partition(".")
                time = digits.ljust(6, "0") + parts.ljust(6, "0")[:6] if re.fullmatch(r"\d{2,6}", digits) else ""
                return "".join(day.groups()) + time, "".join(day.groups())
        return "", ""

    def age_band(self) -> str:
        """By Patient's Age, else by birth date and the day of the study; "" where neither is told."""
        return age_band_of(self["age"]) or age_band_between(self["birth"], self.moment()[1])

    def view(self) -> str:
        """PA, AP, LL or unknown: by View Position, the code of the view or its meaning, descriptions of series and protocol,
        and last Patient Orientation, which tells a lateral view from a frontal one."""
        meaning = next((item["meaning"] for item in self.items("views")), "").replace("-", "")
        for found in (
            _view(self["view"]), _VIEW_CODES.get(self.code("views")), _view(meaning), _view(self["series"]),
            _view(self["protocol"]),
        ):  # fmt: skip
            if found:
                return found
        directions = {direction[:1] for direction in self["orientation"].upper().split("\\")}
        return "LL" if directions & {"A", "P"} else "unknown"

    def _text(self, value: Any) -> str:
        if isinstance(value, bytes):
            value = _decoded(value, self._charset if hasattr(self, "_charset") else "")
        elif value is None:
            value = ""
        elif not isinstance(value, str) and hasattr(value, "__iter__"):
            value = "\\".join(map(str, value))
        return str(value).strip(" \0\t\r\n")


class StructuredReport(NamedTuple):
    """A report's text, and what orders it among others of its study: complete, verified, and when it was written."""

    order: tuple[bool, bool, str, int]
    text: str


def structured_report(path: Path) -> StructuredReport:
    """The text of a DICOM structured report, each section below its heading.

    Texts, codes, numbers and what is inferred from them are taken; names of persons, dates, UIDs and images are not.

    Raises:
        DataError: it cannot be read; the message repeats nothing of it.
    """
    import pydicom

    try:
        header = Header(pydicom.dcmread(path, force=True, stop_before_pixels=True))
        if "items" not in header:
            raise DataError("damaged structured report (it has no content)")
        found: dict[str, list[str]] = {}
        for heading, line in _lines(header, ""):
            found.setdefault(heading, []).append(line)
        text = "\n\n".join((f"{heading}:\n" if heading else "") + "\n".join(lines) for heading, lines in found.items())
        written = header["content date"] + header["content time"]
        order = (header["complete"] == "COMPLETE", header["verified"] == "VERIFIED", written, header.whole("number"))
        return StructuredReport(order, text)
    except OSError as error:
        raise DataError(f"structured report cannot be read ({error.strerror})") from None
    except DataError:
        raise
    # As with headers: whatever pydicom stumbles over.
    except Exception as error:
        raise DataError(f"damaged structured report ({type(error).__name__})") from None


def class_name(uid: str) -> str:
    """The name of a standard SOP class; another's UID is not repeated."""
    from pydicom.uid import UID_dictionary

    return str(UID_dictionary[uid][0]) if uid in UID_dictionary else "private"


def _lines(item: Header, heading: str) -> Iterator[tuple[str, str]]:
    """Headings and lines below an item of a content tree, in its order."""
    for below in item.items("items"):
        if below["relation"].upper() not in _SAID:
            continue
        kind, name = below["kind"].upper(), below.meaning("concept")
        own = _HEADINGS.get(below.code("concept"), name.upper())
        if kind == "CONTAINER":
            # Containers inside of a section part it further.
            yield from _lines(below, heading or own)
            continue
        said = ""
        if kind == "TEXT":
            said = "\n".join(below["text"].replace("\r\n", "\n").replace("\r", "\n").split("\n"))
        elif kind == "CODE":
            said = below.meaning("coded")
        elif kind == "NUM":
            measured = next(iter(below.items("measured")), None)
            if measured is not None:
                unit = measured.code("unit")
                said = " ".join([measured["numeric"], *([unit] if unit not in ("", "1") else [])])
        if said:
            plain = kind == "TEXT" or not name
            yield heading or own, said if plain else f"{name}: {said}"
        yield from _lines(below, heading or own)


def _view(text: str) -> str:
    """A view that a text names; "" where it names none or several."""
    words = re.findall(r"[a-z]+", re.sub(r"(?<=postero|.antero)[\s_-]+(?=anterior|posterior)", "", text.lower().replace(".", "")))
    found = {_VIEW_WORDS[word] for word in words if word in _VIEW_WORDS}
    if any(word.startswith(("decub", "dekub")) for word in words):
        # The patient lies on a side; the beam is that of a frontal view.
        found.discard("LL")
    return found.pop() if len(found) == 1 else ""


def _decoded(value: bytes, charset: str) -> str:
    if value.isascii() and b"\x1b" not in value:
        return value.decode("ascii")
    from pydicom.charset import convert_encodings, decode_bytes

    try:
        return str(decode_bytes(value, convert_encodings(charset.split("\\")), {0x0A, 0x0C, 0x0D}))
    except (LookupError, ValueError):
        return value.decode("latin-1")
