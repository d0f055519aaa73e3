"""Which sentences of two reports agree, as the rules of `medxray.metrics` read them."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from medxray.metrics import read_report

_BOUNDARY = re.compile(r"(?:[.;?!]+(?=\s|$)|(?<=[a-z])\.(?=[A-Z])|\n)\s*")
_WORDS = re.compile(r"[^\W_]+")
_FUNCTION_WORDS = frozenset((
    "a", "an", "and", "are", "as", "at", "be", "been", "by", "for", "has", "have", "in", "is", "it", "of", "on", "or", "that",
    "the", "there", "these", "this", "to", "was", "with",
))  # fmt: skip
_NEGATIONS = frozenset(("no", "not", "without", "nor", "never"))
_ALIKE = 0.75
"""The share of words from which two sentences without a finding say the same."""
_STRENGTH = ("", "agreed", "differs", "lacking")


class Sentence(NamedTuple):
    """A sentence as it stands in its report, the white space behind it included.

    Attributes:
        text: joined, the texts of a report's sentences are the report.
        mark: "agreed", "differs", "missed", "unsupported", or "" where the other report neither says so nor had to.
    """

    text: str
    mark: str


class _Statement(NamedTuple):
    name: str
    value: int
    side: str | None


def compare_reports(reference: str, prediction: str) -> tuple[list[Sentence], list[Sentence]]:
    """Marks each sentence of two reports of a study by what the other one says.

    A sentence says of an observation that it is present, in doubt or absent, and on which side. It is

    * agreed where the other report says the same of it;
    * differs where both find it, but one with doubt or on another side;
    * missed (of the reference) or unsupported (of the prediction) where it finds what the other report does not find, or
      denies what the other one finds.

    What is denied in one and not mentioned in the other stays without a mark. A sentence on several observations has the
    gravest of their marks. One that names no observation is agreed where the other report has a sentence with as much
    negation and nearly the same words.

    Args:
        reference: the report that was written; where it is empty nothing is marked.
        prediction: the report that was generated.

    Returns:
        The sentences of the reference, and those of the prediction.
    """
    texts = _sentences(reference), _sentences(prediction)
    said = tuple([_statements(text) for text in own] for own in texts)
    marked = []
    for own, other, lacking in ((0, 1, "missed"), (1, 0, "unsupported")):
        sentences = []
        for text, statements in zip(texts[own], said[own], strict=True):
            mark = ""
            if reference.strip():
                mark = _judged(statements, said[own], said[other]) if statements else _repeated(text, texts[other])
            sentences.append(Sentence(text, lacking if mark == "lacking" else mark))
        marked.append(sentences)
    return marked[0], marked[1]


def _sentences(text: str) -> list[str]:
    ends = [0, *(match.end() for match in _BOUNDARY.finditer(text)), len(text)]
    return [text[start:end] for start, end in pairwise(ends) if end > start]


def _statements(sentence: str) -> list[_Statement]:
    return [_Statement(finding.name, finding.value, finding.side) for finding in read_report(sentence)]


def _judged(
    statements: Sequence[_Statement], own: Sequence[Sequence[_Statement]], other: Sequence[Sequence[_Statement]]
) -> str:
    """The gravest mark of a sentence's statements, "lacking" for what is missed or unsupported."""
    marks = []
    for name, value, side in statements:
        ours, theirs = ([s for said in report for s in said if s.name == name] for report in (own, other))
        found = [s for s in theirs if s.value]
        same = any(s.value == value and (None in (s.side, side) or s.side == side) for s in theirs)
        # "Left effusion. Right effusion." says what "bilateral effusions" says.
        same = same or (any(s.value == value for s in found) and _sides(ours) == _sides(theirs))
        if same:
            marks.append("agreed")
        elif value:
            marks.append("differs" if found else "lacking")
        else:
            marks.append("lacking" if found and not any(s.value for s in ours) else "")
    return max(marks, key=_STRENGTH.index)


def _sides(statements: Sequence[_Statement]) -> str | None:
    sides = {s.side for s in statements if s.value and s.side}
    return "bilateral" if len(sides) > 1 else next(iter(sides), None)


def _repeated(sentence: str, others: Sequence[str]) -> str:
    words = _content(sentence)
    for other in others if words else ():
        theirs = _content(other)
        if bool(words & _NEGATIONS) != bool(theirs & _NEGATIONS):
            continue
        if 2 * len(words & theirs) >= _ALIKE * (len(words) + len(theirs)):
            return "agreed"
    return ""


def _content(sentence: str) -> set[str]:
    return set(_WORDS.findall(sentence.lower())) - _FUNCTION_WORDS
