"""Sex, age and manufacturer as data sets write them -> the few words that a study keeps of them.

Scores are told by these groups. Nothing else of a person goes further: an age only as its band, and of what stands for a
manufacturer only a name of a closed list, since headers hold anything in any place.
"""

import re
from collections.abc import Iterable
from functools import lru_cache

SEXES = ("female", "male", "other")

AGE_BANDS = {"0-17": 0, "18-39": 18, "40-64": 40, "65-79": 65, "80+": 80}
"""Band -> its first age, in whole years; it ends before the next one's."""

MANUFACTURERS = {
    "agfa": "Agfa", "canon": "Canon", "carestream": "Carestream", "del medical": "Del Medical", "delft": "Delft Imaging",
    "drtech": "DRTECH", "fuji": "Fujifilm", r"ge\b|gems|general electric": "GE", "hitachi": "Hitachi", "hologic": "Hologic",
    "imaging dynamics": "Imaging Dynamics", "imix": "IMIX", "kodak|eastman": "Kodak", "konica|minolta": "Konica Minolta",
    "lodox": "Lodox", "mindray": "Mindray", "neusoft": "Neusoft", "oehm": "Oehm und Rehbein", "philips": "Philips",
    "rayence": "Rayence", "samsung": "Samsung", "sedecal": "Sedecal", "shimadzu": "Shimadzu", "siemens": "Siemens",
    "swissray": "Swissray", "toshiba": "Toshiba", "united imaging": "United Imaging", "varian": "Varian", "vieworks": "Vieworks",
}  # fmt: skip
"""How a word of a manufacturer's name begins -> what the manufacturer is called here; all others are "other"."""

_SEX_WORDS = {"f": "female", "female": "female", "m": "male", "male": "male", "o": "other", "other": "other"}
_AGE = re.compile(r"[>=≥ ]*(\d{1,3})(?:\.\d*)? *([YMWD]?)[a-z]*\+?", re.IGNORECASE)
_IN_A_YEAR = {"": 1, "Y": 1, "M": 12, "W": 52, "D": 365}
_OLDEST = 120
"""More is a mistake of a table, such as 414."""


def sex_of(text: str) -> str:
    """female, male or other; "" where it is not told."""
    return _SEX_WORDS.get(text.strip().lower(), "")


@lru_cache(1024)
def age_band_of(text: str) -> str:
    """The band of an age such as 57, 57.0, 057Y, 18M or 90+, or of its band; "" where it is not told or no age."""
    text = text.strip()
    if text in AGE_BANDS:
        return text
    found = _AGE.fullmatch(text)
    return _band(int(found[1]) // _IN_A_YEAR[found[2].upper()]) if found else ""


def age_band_between(birth: str, day: str) -> str:
    """The band of the age on a day, both YYYYMMDD, or YYYY where only the year is told; "" where one of them is neither."""
    dates = [date.ljust(8, "0") for date in (birth, day) if re.fullmatch(r"\d{4}(\d{4})?", date)]
    return _band((int(dates[1]) - int(dates[0])) // 10000) if len(dates) == 2 else ""


@lru_cache(1024)
def manufacturer_of(text: str) -> str:
    """A name of `MANUFACTURERS`, or other; "" where it is not told."""
    found = (name for start, name in MANUFACTURERS.items() if re.search(rf"\b(?:{start})", text, re.IGNORECASE))
    return next(found, "other" if text.strip() else "")


def agreed(values: Iterable[str]) -> str:
    """What all images of a study say that say anything; "" where they differ."""
    told = set(values) - {""}
    return told.pop() if len(told) == 1 else ""


def _band(years: int) -> str:
    return next((band for band, first in reversed(AGE_BANDS.items()) if first <= years <= _OLDEST), "")
