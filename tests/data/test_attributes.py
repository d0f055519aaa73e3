"""Sex, age and manufacturer: what of them is kept."""

import pytest

from medxray.data.attributes import (
    AGE_BANDS,
    MANUFACTURERS,
    age_band_between,
    age_band_of,
    agreed,
    manufacturer_of,
    sex_of,
)


@pytest.mark.parametrize(
    ("text", "band"),
    [
        ("0", "0-17"), ("17", "0-17"), ("17.9", "0-17"), ("18", "18-39"), ("039", "18-39"), ("40", "40-64"), ("064Y", "40-64"),
        ("65", "65-79"), ("79Y", "65-79"), ("080Y", "80+"), (" 89 ", "80+"), ("90+", "80+"), (">89", "80+"), ("120", "80+"),
        ("018M", "0-17"), ("052W", "0-17"), ("300D", "0-17"), ("240M", "18-39"), ("57 years", "40-64"), ("121", ""),
        ("414", ""), ("", ""), ("old", ""), ("-5", ""), ("1931-01-02", ""), ("19310102", ""), ("nan", ""),
    ],
)  # fmt: skip
def test_bands_of_ages(text: str, band: str) -> None:
    assert age_band_of(text) == band


def test_a_band_is_its_own() -> None:
    assert [age_band_of(band) for band in AGE_BANDS] == list(AGE_BANDS)
    assert [manufacturer_of(name) for name in MANUFACTURERS.values()] == list(MANUFACTURERS.values())
    assert [sex_of(sex) for sex in ("female", "male", "other")] == ["female", "male", "other"]


@pytest.mark.parametrize(
    ("birth", "day", "band"),
    [
        ("19800405", "20200404", "18-39"), ("19800405", "20200405", "40-64"), ("20000229", "20180228", "0-17"),
        ("1931", "20140915", "80+"),
        ("20200101", "20190101", ""), ("18000101", "20200101", ""), ("", "20200101", ""), ("19800405", "", ""),
        ("198004", "2020", ""),
    ],
)  # fmt: skip
def test_bands_between_days(birth: str, day: str, band: str) -> None:
    assert age_band_between(birth, day) == band


def test_sexes() -> None:
    assert [sex_of(text) for text in ("F", "female", " Male ", "m", "O", "U", "", "unknown", "1")] == [
        "female", "female", "male", "male", "other", "", "", "", "",
    ]  # fmt: skip


def test_of_a_manufacturer_only_a_known_name_is_kept() -> None:
    told = {
        "SIEMENS Healthineers": "Siemens", "GE Healthcare": "GE", '"GE Medical Systems"': "GE", "GENORAY": "other",
        "FUJI PHOTO FILM Co., ltd.": "Fujifilm", "FUJIFILM Corporation": "Fujifilm", "Agfa-Gevaert": "Agfa",
        "KONICA MINOLTA": "Konica Minolta", "PhilipsMedicalSystems": "Philips", "Carestream Health": "Carestream",
        "John Doe, 12345": "other", "  ": "", "": "",
    }  # fmt: skip
    assert {text: manufacturer_of(text) for text in told} == told


def test_images_of_a_study_agree_or_tell_nothing() -> None:
    assert (agreed(["a", "", "a"]), agreed(["a", "b"]), agreed([]), agreed([""])) == ("a", "", "", "")
