"""Report text as a model learns it."""

from collections.abc import Callable

from medxray.types import DataError

_ITEMS = [("1. ", "")] + [(f"{dot} {n}. ", ". ") for dot in (".", "") for n in range(2, 6)]
"""Numbers of enumerated sentences and what takes their place, in this order."""

_QUOTES = str.maketrans("", "", "\"'/\\")
_MARKS = str.maketrans("", "", ".,?;*!%^&_+():<=>@[]{}")


def _squeeze(text: str, mark: str) -> str:
    while mark * 2 in text:
        text = text.replace(mark * 2, mark)
    return text


def _sentences(text: str) -> str:
    text = _squeeze(text, ".")
    for number, instead in _ITEMS:
        text = text.replace(number, instead)
    sentences = text.strip().lower().split(". ")
    return " . ".join([s.translate(_QUOTES).strip().translate(_MARKS) for s in sentences]) + " ."


def _r2gen_mimic(text: str) -> str:
    return _sentences(_squeeze(text.replace("\n", " "), " "))


RULES: dict[str, Callable[[str], str]] = {
    "r2gen-iu": _sentences,
    "r2gen-mimic": _r2gen_mimic,
    "none": lambda text: text,
}
"""Name of a cleaning rule -> the rule. The r2gen ones give the strings that R2Gen trains and scores with
(EMNLP 2020): lower case, no enumeration, no punctuation but " . " after each sentence. Spaces that a removed
character leaves behind stay, as they do there."""


def clean(text: str, rule: str) -> str:
    """A report as the target of training and the reference of scores.

    Args:
        text: the raw report.
        rule: "r2gen-iu", "r2gen-mimic" or "none".

    Raises:
        DataError: no such rule.
    """
    if rule not in RULES:
        raise DataError(f"unknown cleaning rule {rule!r}; expected one of {', '.join(RULES)}")
    return RULES[rule](text)


def is_empty(report: str) -> bool:
    """Whether a cleaned report has no word left."""
    return not report.strip(" .\n\t\r")
