"""What flows between rooms, as a notebook shows it."""

import html.parser
import math
import re

import pytest

from medxray.types import Prediction, Score, Scores

EVIL = "<script>alert(1)</script> & \"'"


class Parsed(html.parser.HTMLParser):
    """HTML, held to closed elements: their kinds, and the text of table cells row by row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.kinds: set[str] = set()
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.kinds.add(tag)
        if tag not in ("br", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def test_scores_are_a_table_with_floors_notes_and_warnings() -> None:
    scores = Scores(
        {"f1": Score(0.5, 0.4, 0.6, 30), "lost": Score(math.nan, math.nan, math.nan, 30), f"f1/{EVIL}": Score(0.2, 0.1, 0.3, 30)},
        {f"floor {EVIL}": {"f1": Score(0.1, 0.05, 0.15, 30)}},
        ["a quiet note", f"Warning: below {EVIL}"],
        protocol="full: whole",
    )
    found = Parsed(scores._repr_html_())
    assert "script" not in found.kinds
    assert found.rows == [
        ["", "model", f"floor {EVIL}"], ["f1", "0.5000.400–0.600", "0.1000.050–0.150"], ["lost", "undefined", ""],
        ["", "model", f"floor {EVIL}"], [f"f1/{EVIL}", "0.2000.100–0.300", ""],
    ]  # fmt: skip
    folded = re.findall(r"<details>(.*?)</details>", scores._repr_html_())
    assert "a quiet note" in folded[-1] and "protocol full: whole" in folded[-1] and "n = 30" in folded[-1]
    assert "Warning" not in "".join(folded) and f"Warning: below {EVIL}" in found.text


def test_a_report_is_shown_with_the_doubt_of_each_word_and_its_context() -> None:
    tokens, sure = ["small ", f"{EVIL.split()[0]} ", "effusion"], [0.0, math.log(0.5), math.log(0.25)]
    prediction = Prediction(
        EVIL, "".join(tokens), context={"positive": ["s1", "s2"]}, similarity={"positive": [0.5, 0.25]},
        log_probabilities=sure, tokens=tokens,
    )  # fmt: skip
    shown = prediction._repr_html_()
    assert [float(x) for x in re.findall(r"rgba\(224,128,40,([\d.]+)\)", shown)] == pytest.approx([0, 0.31, 0.465], abs=0.006)
    found = Parsed(shown)
    assert "script" not in found.kinds and EVIL in found.text and "positive context: s1 (0.50), s2 (0.25)" in found.text
    assert "log_probabilities" not in repr(prediction) and "small" in repr(prediction)
    # Without words of its own it is the text alone.
    assert "a text" in Parsed(Prediction("s", "a text")._repr_html_()).text


def test_probabilities_are_bars() -> None:
    shown = Prediction("s", scores={"Edema": 0.25, "reconstruction": 1.5})._repr_html_()
    assert Parsed(shown).rows == [["Edema", "", "0.250"], ["reconstruction", "", "1.500"]]
    assert re.findall(r"width:(\d+)%", shown) == ["25", "100"]
