import pytest

from medxray.data.text import clean, is_empty
from medxray.types import DataError


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("No effusion.", "no effusion ."),
        ("1. No effusion. 2. Clear lungs.", "no effusion . clear lungs ."),
        ("Heart: normal (stable); lungs/pleura 'clear'.", "heart normal stable lungspleura clear ."),
        ("left-sided XXXX", "left-sided xxxx ."),
        ("Clear... No change", "clear . no change ."),
    ],
)
def test_rules_agree_on_plain_reports(raw: str, expected: str) -> None:
    assert clean(raw, "r2gen-iu") == expected
    assert clean(raw, "r2gen-mimic") == expected


def test_mimic_joins_lines_and_spaces() -> None:
    raw = "The lungs \n  are   clear.  No \n effusion."
    assert clean(raw, "r2gen-mimic") == "the lungs are clear . no effusion ."
    assert "\n" in clean(raw, "r2gen-iu")


def test_none_leaves_text_alone() -> None:
    raw = " 1. Any TEXT, (as it is). "
    assert clean(raw, "none") == raw


def test_numbers_that_are_no_enumeration_stay() -> None:
    assert clean("A 6. mm nodule and 45 mm mass. Stable.", "r2gen-iu") == "a 6 . mm nodule and 45 mm mass . stable ."


@pytest.mark.parametrize(("raw", "empty"), [("", True), (" ... \n", True), ("1. ", True), ("clear", False)])
def test_is_empty(raw: str, empty: bool) -> None:
    assert is_empty(clean(raw, "r2gen-iu")) is empty


def test_unknown_rule_names_the_known() -> None:
    with pytest.raises(DataError, match=r"'r2gen'.*r2gen-iu, r2gen-mimic, none"):
        clean("text", "r2gen")
