"""The page of a comparison."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from medxray.types import RunError, Score
from medxray.visual.comparison_page import Apart, Differing, comparison_page

NAN = math.nan
BETTER = Apart(0.1, 0.02, 0.18, 9, 0.004, 0.012, True)
WORSE = Apart(-0.1, -0.18, -0.02, 9, 0.004, 0.012, False)
OPEN = Apart(0.01, -0.08, 0.1, 9, 0.6, 0.6)
UNDEFINED = Apart(NAN, NAN, NAN, 9)
SAID = {"base": ("", 0.1), "ours <i>": ("No edema, a large heart", 0.9)}
VOID = {"meta", "br", "img", "input", "path", "circle", "rect"}


class Reader(HTMLParser):
    """Checks that every element is closed, and keeps what is there."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page(path: Path, **changed: Any) -> tuple[str, Reader]:
    settings: dict[str, Any] = {
        "baseline": "base",
        "scores": {
            name: {"bleu-4": Score(value, value - 0.1, value + 0.1, 9), "cider": Score(value, value - 0.1, value + 0.1, 9)}
            for name, value in (("base", 0.3), ("ours <i>", 0.4), ("third", 0.2))
        },
        "differences": {"ours <i>": {"bleu-4": BETTER, "cider": OPEN}, "third": {"bleu-4": WORSE, "cider": UNDEFINED}},
        "lower": (),
        "findings": {name: {"Edema": (0.5, "3 of 4"), "Fracture": (NAN, "0 of 0")} for name in ("base", "ours <i>", "third")},
        "wins": {"ours <i>": {"cider": (5, 1, 3)}},
        "studies": {"ours <i>": ("cider", [Differing("s<1>", "no edema . the heart is large", SAID)], [])},
        "runs": {"base": "runs/base"},
        "notes": ["split: test & more"],
        **changed,
    }  # fmt: skip
    comparison_page(path, **settings)
    text = path.read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    assert reader.open == [] and "nan" not in reader.text.lower().split()
    return text, reader


def test_it_needs_nothing_beside_it(tmp_path: Path) -> None:
    text, reader = page(tmp_path / "deep" / "page.html")
    assert not re.search(r"https?:|//[a-z]", text) and "script" not in {tag for tag, _ in reader.seen}
    assert not any(name in attributes for _, attributes in reader.seen for name in ("src", "onclick"))
    assert all((of.get("href") or "#").startswith("#") for _, of in reader.seen)
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text
    ids = {of["id"] for _, of in reader.seen if "id" in of}
    assert {of["href"] for tag, of in reader.seen if tag == "a"} == {f"#{name}" for name in ids}


def test_what_it_says(tmp_path: Path) -> None:
    text, reader = page(tmp_path / "page.html")
    assert "<i>baseline</i>" in text and "ours &lt;i&gt;" in text and "ours <i><" not in text and "s&lt;1&gt;" in text
    # The verdict is of CIDEr, and names what is otherwise.
    assert "ours <i>, cider 0.400: not told apart from base, 0.300; +0.010 (-0.080 to +0.100), p 0.600" in reader.text
    assert "Better in bleu-4." in reader.text and "third, cider 0.200: cannot be compared" in reader.text
    # Marks stand where an interval leaves out 0, and nowhere else.
    cells = re.findall(r'class="(better|worse)" title', text)
    assert cells == ["better", "worse"]
    dots = re.findall(r'class="apart (\w+)"', text)
    assert dots == ["better", "worse", "open"]
    assert "+0.100, p 0.004 (0.012) ▲" in reader.text and "split: test & more" in reader.text and "3 of 4" in reader.text


def test_words_that_agree_are_marked(tmp_path: Path) -> None:
    text, _ = page(tmp_path / "page.html")
    article = text[text.index("<article>") : text.index("</article>")]
    marks = re.findall(r"<mark class=\"shared\">(.*?)</mark>", article)
    assert marks == ["No edema,", "large"], "whatever their case and punctuation, in the same order"
    assert '<h4>base <i>0.100</i></h4><p><span class="quiet">empty</span></p>' in article
    assert "no edema . the heart is large" in article


def test_a_lone_article_is_not_marked(tmp_path: Path) -> None:
    said = {"base": ("the aorta", 0.1), "ours <i>": ("the heart . the lungs", 0.2)}
    text, _ = page(tmp_path / "page.html", studies={"ours <i>": ("cider", [Differing("s", "the heart . the spine", said)], [])})
    assert re.findall(r"<mark class=\"shared\">(.*?)</mark>", text)[1:] == ["the heart", "the"]


def test_a_bar_has_three_shares(tmp_path: Path) -> None:
    text, _ = page(tmp_path / "page.html")
    widths = {kind: float(width) for kind, width in re.findall(r'<rect class="(\w+)" x="[\d.]+" width="([\d.]+)"', text)}
    assert widths == {"better": pytest.approx(55.56), "equal": pytest.approx(11.11), "worse": pytest.approx(33.33)}


def test_labels_have_tables_of_their_own(tmp_path: Path) -> None:
    names = ("auroc", "auroc/Edema", "auroc/Mass & more", "average-precision", "average-precision/Edema")
    scores = {one: {name: Score(0.5, NAN, NAN, 9) for name in names} for one in ("base", "ours")}
    scores["ours"]["auroc/Edema"] = Score(NAN, NAN, NAN, 9)
    text, reader = page(
        tmp_path / "page.html", scores=scores, differences={"ours": dict.fromkeys(names, OPEN)},
        findings={}, wins={}, studies={}, lower=("average-precision",),
    )  # fmt: skip
    assert "auroc by label" in reader.text and "average-precision by label" in reader.text and "Mass & more" in reader.text
    assert "Findings" not in reader.text and "Studies" not in reader.text and "undefined" in reader.text
    assert text.count('<figure class="chart">') == 2, "a chart for each value over all labels"
    assert "average-precision <i>lower is better</i>" in text


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="expected to write the report page"):
        page(tmp_path / "file" / "page.html")


@pytest.mark.parametrize(
    ("low", "high", "higher_is_better", "better"),
    [(0.1, 0.2, True, True), (0.1, 0.2, False, False), (-0.2, -0.1, True, False), (-0.2, -0.1, False, True),
     (-0.1, 0.1, True, None), (0.0, 0.1, True, None), (NAN, NAN, True, None)],
)  # fmt: skip
def test_only_an_interval_without_0_tells_which_is_better(low: float, high: float, higher_is_better: bool, better: Any) -> None:
    assert Apart.judged(Score((low + high) / 2, low, high, 9), 0.5, higher_is_better).better is better
