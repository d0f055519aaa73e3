"""Report text: what a model learns of it, and the sections that free text falls into."""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

from medxray.types import DataError

# Cleaning

_ITEMS = [("1. ", "")] + [(f"{dot} {n}. ", ". ") for dot in (".", "") for n in range(2, 6)]
"""Numbers of enumerated sentences and what takes their place, in this order."""

_QUOTES = "\"'/\\"
_MARKS = ".,?;*!%^&_+():<=>@[]{}"
_MARKS_BUT_COLONS = ".,?;*!%^&_+()[]{}"

_GAPS = "".join(map(chr, (*range(8), *range(0xE000, 0xF900))))
"""Characters that no report holds, of which one parts sentences for a while."""


def _halve(text: str, mark: str, times: int) -> str:
    """Runs of a mark made half as long, so many times, as the rules' authors do it."""
    double = mark * 2
    for _ in range(times):
        if double not in text:
            break
        text = text.replace(double, mark)
    return text


def _without_numbers(text: str) -> str:
    for number, instead in _ITEMS:
        text = text.replace(number, instead)
    return text


def _drop(text: str, marks: str) -> str:
    for mark in marks:
        if mark in text:
            text = text.replace(mark, "")
    return text


def _sentences(text: str, marks: str) -> str:
    """Sentences of which quotes, spaces at both ends and then `marks` are taken away, all at a time."""
    gap = next(mark for mark in _GAPS if mark not in text)
    text = _drop(text.strip().lower().replace(". ", gap), _QUOTES)
    text = _drop(gap.join([sentence.strip() for sentence in text.split(gap)]), marks)
    return text.replace(gap, " . ") + " ."


def _r2gen_iu(text: str) -> str:
    return _sentences(_without_numbers(_halve(text, ".", 3)), _MARKS)


def _mimic_lines(text: str) -> str:
    return _without_numbers(_halve(_halve(text.replace("\n", " "), " ", 6), ".", 8))


def _r2gen_mimic(text: str) -> str:
    return _sentences(_mimic_lines(text), _MARKS)


def _r2gencsr_mimic(text: str) -> str:
    return _sentences(_mimic_lines(text).replace(":", " :"), _MARKS_BUT_COLONS)


RULES: dict[str, Callable[[str], str]] = {
    "r2gen-iu": _r2gen_iu,
    "r2gen-mimic": _r2gen_mimic,
    "r2gencsr-mimic": _r2gencsr_mimic,
    "none": lambda text: text,
}
"""Name of a cleaning rule -> the rule. The r2gen ones give the strings that R2Gen trains and scores with
(EMNLP 2020): lower case, no enumeration, no punctuation but " . " after each sentence. Spaces that a removed
character leaves behind stay, as they do there. R2GenGPT's and R2GenCSR's rule for MIMIC-CXR differs from R2Gen's in
that a colon stays, with a space before it, and so do <, =, > and @."""


def clean(text: str, rule: str) -> str:
    """A report as the target of training and the reference of scores.

    Args:
        text: the raw report.
        rule: "r2gen-iu", "r2gen-mimic", "r2gencsr-mimic" or "none".

    Raises:
        DataError: no such rule.
    """
    if rule not in RULES:
        raise DataError(f"unknown cleaning rule {rule!r}; expected one of {', '.join(RULES)}")
    return RULES[rule](text)


def is_empty(report: str) -> bool:
    """Whether a cleaned report has no word left."""
    return not report.strip(" .\n\t\r")


_DEIDENTIFIED = re.compile(
    r"\[\*\*[^\[\]]*\*\*\]|_{2,}|(?<![a-z])x{3,}(?![a-z])|[<\[](?:unk|redacted)[>\]]", re.IGNORECASE
)
_GONE = [
    (r"([-/])\0[-/](?=\w)", r"\1"),
    (r"[-/]\0|\0[-/]", "\0"),
    (r"[(<\[]\0[)>\]]", "\0"),
    (r"\0(?:[ \t,;&-]*\0)+", "\0"),
    # A sentence that held nothing else goes with its stop.
    (r"(?:^|(?<=[.!?\n]))[ \t]*\0[ \t]*[.,;:!?]", ""),
    (r"[ \t]*\0[ \t]*(?=[.,;:?!)\]\n]|$)|(?:^|(?<=[(\[\n]))[ \t]*\0[ \t]*", ""),
    (r"[ \t]*\0[ \t]*", " "),
]
_GONE_WITH = [(re.compile(pattern), instead) for pattern, instead in _GONE]
"""What goes with a mark, which is a zero byte here, and what takes its place; in this order."""


def without_marks(text: str) -> str:
    """A report without the marks that de-identification leaves: XXXX (Indiana), ___ and [** **] (MIMIC), <unk>.

    Spaces, hyphens, brackets and stops that belong to nothing else go too; the words of the report stay as they are.
    """
    text = text.replace("\0", "")
    found = _DEIDENTIFIED.sub("\0", text)
    if "\0" not in found:
        return text
    for pattern, instead in _GONE_WITH:
        found = pattern.sub(instead, found)
    return found.strip()


# Sections

SECTIONS = ("findings", "impression", "indication", "comparison", "technique")

_NAMES = {
    "findings": "findings;finding;radiographic findings;imaging findings;reference findings;"
    "observations;description;report;body of report",
    "impression": "impression;impressions;final impression;overall impression;conclusion;conclusions;summary;"
    "opinion;interpretation;diagnosis;assessment",
    "indication": "indication;indications;clinical indication;clinical indications;indication for exam;"
    "indication for examination;indication for study;history;clinical history;patient history;brief history;"
    "medical history;relevant history;clinical information;clinical data;clinical details;clinical statement;"
    "clinical question;reason for exam;reason for examination;reason for study;reason for the exam;"
    "reason for the examination;reason for the study;reason for this exam;reason for this examination;"
    "reason for visit;reason;underlying medical condition;medical condition",
    "comparison": "comparison;comparisons;comparison exam;comparison exams;comparison examination;comparison study;"
    "comparison studies;comparison film;comparison films;comparison radiograph;comparison radiographs;"
    "comparison date;reference exam;prior exam;prior exams;prior study;prior studies;previous exam;previous exams;"
    "previous study;previous studies",
    "technique": "technique;techniques;technical factors;procedure;procedure comments",
    "examination": "examination;examinations;exam;exams;type of exam;type of examination;examination performed;"
    "exam performed;exam type;study;study type;views;projections",
    "start": "final report;preliminary report;interim report;radiology report",
    "wet read": "wet read;wetread;wet read report",
    "other": "addendum;addenda;notification;notifications;recommendation;recommendations;recommendation(s);pfi;"
    "attending;dictated by;electronically signed by;signed by;transcribed by",
}
"""Kind of section -> the headings that begin one. An examination is the technique where nothing else tells it."""

_KIND = {name: kind for kind, names in _NAMES.items() for name in names.split(";")}
_PLAIN = {"findings", "impression", "impressions", "indication", "comparison", "technique", "conclusion"}
"""Headings that stand before their text without any mark between."""

_ADJECTIVES = (
    "no any the a an these those this that other additional incidental new of for in with without and or to on by from as "
    "following significant important acute positive negative my admitting working differential discharge pertinent key "
    "radiographic radiological initial preliminary main major relevant previous prior"
)
_IN_SENTENCE = frozenset(_ADJECTIVES.split())
"""After one of these a name belongs to the sentence."""


def _pattern(name: str) -> str:
    words = re.escape(name).replace(r"\ ", r"[ \t]+")
    # Several words are a heading with a mark or on a line of their own only; else the first may be one.
    mark = r"(?=[\"*]*[ \t]*(?:[:;(\uff1a\n\u2013\u2014-]|/|&|,|and\b|\Z))"
    return words + mark if " " in name else words


def _any_of(names: Iterable[str]) -> str:
    """A pattern of any, the longest first; by first letters, so that other words fail at once."""
    letters = groupby(sorted(names, key=lambda name: (name[0], -len(name), name)), key=lambda name: name[0])
    return "|".join(f"{letter}(?:{'|'.join(_pattern(name)[1:] for name in own)})" for letter, own in letters)


_NAME = _any_of(_KIND)
_HEADING = re.compile(
    rf"(?<![^\s*#>\"])({_NAME})(?:[ \t]*(?:/|&|,|\band\b)[ \t]*({_NAME}))?(?![\w/])"
    # In brackets, what it tells of, before a colon; then the mark.
    r"(?:[ \t]*\([^()\n]{0,40}\)(?=\"?\**[ \t]*[:\uff1a]))?\"?\**([ \t]*[:;\uff1a]\**|[ \t]*[-\u2013\u2014]+(?=\s)|)",
    re.IGNORECASE,
)
_TITLE = re.compile(r"^[ \t]*([A-Z][A-Z0-9 ()/,.&'_-]{2,70}):(?=\s|$)", re.MULTILINE)
_VIEW = re.compile(
    r"\b(CHEST|PORTABLE|RIBS|BONE WINDOW|FRONTAL|(PA|AP) (AND|VIEW|LATERAL)|LATERAL (AND|VIEW)|(ONE|TWO|\d) VIEWS?)\b"
)
_RULE = re.compile(r"^[ \t]*[_=*-]{8,}[ \t]*$", re.MULTILINE)
_LAST = re.compile(r"\w*\Z")
_BLANK = re.compile(r"\n[ \t]*\n\s*")
_WINDOWS = str.maketrans("\u2018\u2019\u201c\u201d\x91\x92\x93\x94\x96\x97\xa0\r", "''\"\"''\"\"-- \n", "\ufeff")


class _Heading(NamedTuple):
    start: int
    stop: int  # where its text begins
    kinds: tuple[str, ...]
    weak: bool = False  # inside findings or an impression it is a part of them


def sections(text: str) -> dict[str, str]:
    """A free-text report in its sections.

    A heading is known by its name, in any case, with a colon or a dash; without one if it has a line of its own, or
    is in capitals before a sentence. A name inside a sentence ("no findings: ...") is none. Where a section stands
    twice, the last with any text counts, as in MIMIC-CXR's own section files
    (github.com/MIT-LCP/mimic-cxr, txt/section_parser.py); texts of an indication and a history are joined.
    "FINDINGS AND IMPRESSION" is both. Addenda, wet reads, notifications, recommendations and signatures are in no section.

    Without a heading of findings they are, as there, what follows the first paragraph of the last section, or of a
    text that has no heading at all; a single paragraph without a heading is the findings itself.

    Args:
        text: of one report, with any line ends.

    Returns:
        findings, impression, indication, comparison and technique, each on one line; "" for none.
    """
    text = _RULE.sub("", text.replace("\r\n", "\n").translate(_WINDOWS))
    pieces = list(_pieces(text))
    texts: dict[str, list[str]] = {}
    for kinds, body in pieces:
        if words := _line(body):
            for kind in kinds:
                texts.setdefault(kind, []).append(words)
    found = {kind: texts.get(kind, [""])[-1] for kind in SECTIONS}
    found["indication"] = _joined(texts.get("indication", []))
    examination = texts.get("examination", [""])[-1]
    if not found["findings"]:
        found["findings"], owner, rest = _unheaded(pieces, bool(found["impression"]))
        if owner in found:
            found[owner] = rest
        elif owner == "examination":
            examination = rest
    found["technique"] = found["technique"] or examination
    return found


def _line(text: str) -> str:
    return " ".join(text.split()).strip("*# ")


def _joined(texts: list[str]) -> str:
    """Different texts as sentences, one after the other."""
    *former, last = dict.fromkeys(texts or [""])
    return "".join([f"{text} " if text[-1] in ".?!:;" else f"{text}. " for text in former]) + last


def _pieces(text: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Kinds of section and their raw text, in order; what stands before the first heading is a "start"."""
    kinds: tuple[str, ...] = ("start",)
    begin = 0
    for heading in _headings(text):
        if heading.weak and ("findings" in kinds or "impression" in kinds):
            continue
        yield kinds, text[begin : heading.start]
        kinds, begin = heading.kinds, heading.stop
    yield kinds, text[begin:]


def _unheaded(pieces: list[tuple[tuple[str, ...], str]], concluded: bool) -> tuple[str, str, str]:
    """Findings that no heading tells; the section that they were taken out of, and what is left of it."""
    for kinds, body in reversed(pieces):
        if kinds[0] in ("other", "wet read", "impression"):
            continue
        first, *more = _BLANK.split(body.strip())
        if more:
            return _line(" ".join(more)), kinds[0], _line(first)
    for kinds, body in pieces:
        words = _line(body)
        prose = words.endswith(".") and words.count(" ") > 1
        if kinds == ("start",) and words and (len(pieces) == 1 or (prose and concluded)):
            return words, "start", ""
    if not concluded:
        for kinds, body in pieces:
            if kinds == ("wet read",):
                # Its first line tells who read it and when.
                return _line(body.partition("\n")[2]), "wet read", ""
    return "", "", ""


def _headings(text: str) -> list[_Heading]:
    caseless = text.isupper() or text.islower()
    found = [
        _Heading(match.start(), match.end(), tuple(dict.fromkeys(_KIND[_line(n).lower()] for n in match.groups()[:2] if n)))
        for match in _HEADING.finditer(text)
        if _begins(text, match, caseless)
    ]
    known = {heading.start for heading in found}
    for match in _TITLE.finditer(text):
        if match.start(1) not in known and (guess := _guess(_line(match[1]))):
            found.append(_Heading(match.start(1), match.end(), guess[:1], guess[1] == "weak"))
    return sorted(found)


def _begins(text: str, match: re.Match[str], caseless: bool) -> bool:
    """Whether the name of a section is a heading where it stands."""
    start, name, mark = match.start(), match[1], match[3].strip(" \t*")
    window = text[max(0, start - 200) : start]
    before = window.rstrip(" \t*#>\"")
    at_line = not before or before[-1] == "\n"
    before = before.rstrip()
    blank = window.count("\n", len(before)) > 1
    fresh = not before or before[-1] in ".!?:" or (at_line and blank)
    upper = name.isupper() and not caseless
    title = name[0].isupper() and not caseless
    last = _LAST.search(before)[0]  # type: ignore[index]  # it always matches
    capital, last = last[:1].isupper(), last.lower()
    plain = _line(name).lower() in _PLAIN
    if mark in (":", "\uff1a") or (mark == ";" and upper and at_line and plain):
        if at_line:
            return upper or title or fresh or (caseless and last not in _IN_SENTENCE)
        if fresh:
            return True
        if last in _IN_SENTENCE or _KIND[_line(name).lower()] == "examination":
            return False  # "TWO VIEWS:"
        return upper or caseless or (title and (plain or not capital))
    if mark:
        return fresh and (upper or (at_line and (title or caseless)))
    rest = text[match.end() : match.end() + 200].partition("\n")[0].strip(" \t*")
    if not rest:
        return at_line and (fresh or upper)
    if not plain or not (upper or title):
        return False
    if upper and at_line:
        return True
    sentence = rest[0].isupper() or rest[0].isdigit() or rest[0] == "_"
    return sentence and fresh and (upper or (at_line and before[-1:] != ":"))


@lru_cache(4096)
def _guess(title: str) -> tuple[str, str] | None:
    """What a line's title in capitals begins, that no list holds: ("findings", "weak") for a view or a region."""
    words = re.findall(r"[A-Z]+", title)
    if not words or words[0].lower() in _IN_SENTENCE:
        return None
    for word, kind in (("IMPRESSION", "impression"), ("COMPARISON", "comparison"), ("HISTORY", "indication")):
        if word in words:
            return kind, "strong"
    if "FINDINGS" in words or _VIEW.search(title):
        return "findings", "weak"
    if len(words) == 1 and len(title) > 6:
        near = difflib.get_close_matches(title.lower(), SECTIONS, 1, 0.8)
        if near:
            return near[0], "strong"
    return None
