"""The page: complete, self-contained, escaped, small, and honest in its verdict."""

import html.parser
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest

from medxray.types import MedxrayError, RunError, Score, Scores
from medxray.visual import ContextCard, StudyCard
from medxray.visual.attention import ACROSS, EDGE, heat_sheet
from medxray.visual.report_page import report_page

EVIL = "<script>alert(1)</script> \" ' & </pre>"
VOID = {"meta", "img", "br", "rect", "path", "circle", "input"}


class Page(html.parser.HTMLParser):
    """Reads a page, holding it to closed elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.marks: dict[str, list[str]] = {"shared": [], "missed": []}
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "mark":
            self.marks[dict(attrs)["class"]].append("")

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if self.open and self.open[-1] == "mark":
            kind = next(a["class"] for t, a in reversed(self.elements) if t == "mark")
            self.marks[kind][-1] += data

    def count(self, tag: str) -> int:
        return sum(t == tag for t, _ in self.elements)


def s(value: float, half: float = 0.02) -> Score:
    return Score(value, value - half, value + half, 50)


def page(folder: Path, **settings) -> Page:
    given = {
        "title": "run",
        "spec_yaml": "task: report\n",
        "log": [],
        "scores": None,
        "studies": [],
        "facts": {},
    }
    report_page(folder / "report.html", **{**given, "notes": [], **settings})
    assert os.listdir(folder) == ["report.html"]
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def study(reference: str, prediction: str, **settings) -> StudyCard:
    return StudyCard("s1", [np.zeros((8, 8), np.float32)], ["frontal"], reference, prediction, **settings)


def test_everything_given_is_shown_escaped_and_nothing_is_fetched(tmp_path):
    image = np.linspace(-1, 2, 300 * 200, dtype=np.float32).reshape(300, 200)
    image[0, 0] = np.nan
    card = StudyCard(
        EVIL, [image, image], [EVIL, "lateral"], EVIL, f"{EVIL} x",
        {EVIL: 0.25, "Edema": math.nan}, [ContextCard(EVIL, "sick", image, EVIL), ContextCard("b", EVIL, None, EVIL)],
        {EVIL: 1},
    )  # fmt: skip
    found = page(
        tmp_path,
        title=EVIL,
        spec_yaml=EVIL,
        log=[{"step": 1, EVIL: 1.0}],
        scores=Scores({EVIL: s(0.5), f"{EVIL}/{EVIL}": s(0.5)}, {EVIL: {EVIL: s(0.4)}}, [EVIL], EVIL),
        studies=[card],
        facts={EVIL: EVIL},
        notes=[EVIL],
    )
    assert found.count("script") == 0 and found.text.count(EVIL) > 20
    assert found.count("img") == 3
    for tag, attributes in found.elements:
        for name in ("src", "href", "action", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/png;base64,", "#")), (tag, value)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"@import|url\(|<link", text)
    assert "Research use only. Not a medical device." in found.text


def test_an_empty_run_has_a_page(tmp_path):
    assert "Not evaluated yet." in page(tmp_path).text


@pytest.mark.parametrize(
    ("model", "floors", "expected"),
    [
        (
            {"finding-f1": s(0.5)},
            {"nearest image's report": s(0.2)},
            "better than the best floor, nearest image's",
        ),
        (
            {"finding-f1": s(0.5)},
            {"nearest image's report": s(0.2)},
            "0.300 higher; the intervals do not overlap",
        ),
        (
            {"finding-f1": s(0.2)},
            {"most frequent report": s(0.21)},
            "not better than the best floor, most frequent",
        ),
        ({"finding-f1": s(0.2)}, {"most frequent report": s(0.21)}, "0.010 lower; the intervals overlap"),
        (
            {"finding-f1": s(0.5)},
            {"retriever off": s(0.48)},
            "Retriever off: 0.480, 0.020 lower; the intervals overlap",
        ),
        ({"finding-f1": s(0.5)}, {}, "no floor to compare with"),
        ({"finding-f1": s(math.nan)}, {}, "finding-f1 is undefined on these 50 studies"),
        ({"bleu-4": s(0.1), "cider": s(0.3)}, {}, "bleu-4 0.100"),
    ],
)
def test_verdict(tmp_path, model, floors, expected):
    rows = {row: {"finding-f1": score} for row, score in floors.items()}
    assert expected in page(tmp_path, scores=Scores(model, rows)).text


def test_verdict_takes_the_lower_error_as_better_and_names_metrics_behind_a_floor(tmp_path):
    rows = {"most frequent report": {"reconstruction-error": s(0.3), "bleu-1": s(0.4)}}
    found = page(tmp_path, scores=Scores({"reconstruction-error": s(0.2), "bleu-1": s(0.3)}, rows)).text
    assert "better than the best floor" in found and "not better than" not in found
    assert "Not better than the best floor in bleu-1." in found


def test_table_has_every_row_with_intervals_and_leaves_undefined_ones_open(tmp_path):
    scores = Scores({"auroc": s(0.8), "auroc/Edema": s(0.75), "auroc/Tube": s(math.nan)}, {"frozen": {"auroc": s(0.7)}})
    found = page(tmp_path, scores=scores)
    assert found.count("table") == 2
    for expected in ("0.800", "0.780–0.820", "frozen", "0.700", "0.750", "Tube", "undefined"):
        assert expected in found.text


def test_marks_show_what_both_texts_say_and_what_the_prediction_lacks(tmp_path):
    card = study(
        "No effusion. The heart is mildly enlarged . (Lungs) are clear",
        "the heart is normal . no effusion . the lungs are clear today",
    )
    marks = page(tmp_path, studies=[card]).marks
    assert marks["shared"][1:] == ["the heart is", "no effusion", "lungs are clear"]
    assert marks["missed"][1:] == ["mildly enlarged"]


@pytest.mark.parametrize(("reference", "prediction", "missed"), [("a b c .", "a b c", []), ("a b .", " . ", ["a b"])])
def test_marks_of_equal_and_wordless_texts(tmp_path, reference, prediction, missed):
    assert page(tmp_path, studies=[study(reference, prediction)]).marks["missed"][1:] == missed


def test_a_prediction_without_reference_is_not_marked(tmp_path):
    found = page(tmp_path, studies=[study("", "lungs are clear .")])
    assert "lungs are clear ." in found.text and found.count("mark") == 0


def explained(**settings) -> StudyCard:
    rng = np.random.default_rng(0)
    shares = rng.random((2, 6, 3, 4)).astype(np.float32)
    shares /= shares.sum((0, 2, 3), keepdims=True)[:, :, :1]
    given = {
        "confidence": [0.9, 0.25, 1.0, 0.5, math.nan, 0.0], "attention": list(shares), "pointed": [1, 2], **settings
    }  # fmt: skip
    card = study("the heart is big.", "the heart is <b> & clear.", **given)
    card.images, card.captions = [np.zeros((8, 8), np.float32)] * 2, ["PA", "LL"]
    return card


def test_each_word_shows_its_probability_and_chooses_its_own_map(tmp_path):
    found = page(tmp_path, studies=[explained(), explained()])
    words = [a for tag, a in found.elements if tag == "label" and a["class"].startswith("word")]
    assert [a["class"] for a in words] == [f"word w{i}" for i in range(6)] * 2
    doubts = ["--doubt:0.10", "--doubt:0.75", "--doubt:0.00", "--doubt:0.50", None, "--doubt:1.00"]
    assert [a.get("style") for a in words[:6]] == doubts
    assert words[1]["title"] == "25%" and words[4].get("title") is None
    radios = [a for tag, a in found.elements if tag == "input"]
    assert len({a["name"] for a in radios}) == 2 and len(radios) == 14 and sum("checked" in a for a in radios) == 2
    assert "the heart is <b> & clear." in found.text and "map of findings" in found.text
    # Every word has a rule by which its tile comes, chosen or pointed at; rules for more words are not there.
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    for state in (">:checked", ":hover"):
        assert f"article:has(.w5{state}){{--x:6;--y:0}}" in text and f".w6{state}" not in text
    assert found.count("script") == 0 and not re.search(r"url\(", text)


def test_a_sheet_holds_the_map_of_findings_and_then_that_of_each_word():
    card = explained()
    card.attention[0][4], card.attention[1][4] = 0, 0
    card.attention[1][4, 2, 3] = 1.0
    sheets = heat_sheet(card.attention, card.pointed, "s1")
    assert [(size, rows) for _, size, rows in sheets] == [((3, 4), 1)] * 2
    tall, wide = 3 + 2 * EDGE, 4 + 2 * EDGE
    for (sheet, *_), shares in zip(sheets, card.attention, strict=True):
        assert sheet.size == (ACROSS * wide, tall)
        opacity = np.asarray(sheet.convert("RGBA"))[..., 3].reshape(tall, ACROSS, wide).swapaxes(0, 1)
        inner = opacity[:, EDGE:-EDGE, EDGE:-EDGE].astype(int)
        mean = shares[[1, 2]].mean(0)
        assert not inner[0][mean * 24 <= 1].any()
        assert inner[0].ravel()[mean.argmax()] == inner[0].max()
        assert (opacity[:, :EDGE, EDGE:-EDGE] == opacity[:, EDGE : EDGE + 1, EDGE:-EDGE]).all()
    last = np.asarray(sheets[1][0].convert("RGBA"))[EDGE:-EDGE, 5 * wide + EDGE : 6 * wide - EDGE, 3]
    assert last[2, 3] == last.max() > 150 and (last > 0).sum() == 1


def test_an_even_map_has_no_colour_and_a_fine_one_is_averaged():
    even = np.full((20, 80, 8), 1 / 640, np.float32)
    (sheet, size, rows), = heat_sheet([even], [], "s1")
    assert size == (16, 8) and rows == 2
    assert np.asarray(sheet.convert("RGBA"))[..., 3].max() == 0


def test_attention_that_is_no_map_of_words_is_named():
    with pytest.raises(MedxrayError, match=r"s1.*\(words, h, w\).*\(2, 6\)"):
        heat_sheet([np.ones((2, 6), np.float32)], [], "s1")


def test_what_a_decoder_does_not_tell_is_left_out(tmp_path):
    bare = page(tmp_path, studies=[explained(attention=[], remark="no map")])
    assert bare.count("input") == 0 and "no map" in bare.text
    assert sum(a.get("class", "").startswith("word") for t, a in bare.elements if t == "span") == 6
    silent = page(tmp_path, studies=[explained(attention=[], confidence=[])])
    assert "probability" not in silent.text and "the heart is <b> & clear." in silent.text
    assert page(tmp_path, studies=[explained(confidence=[], pointed=[])]).text.count("map of all words") == 1
    nothing = explained(attention=[np.zeros((0, 3, 4))], confidence=[])
    nothing.prediction = ""
    assert "empty" in page(tmp_path, studies=[nothing]).text


def test_how_near_a_context_study_is(tmp_path):
    context = [ContextCard("a", "diseased", None, "x", 0.8768), ContextCard("b", "normal", None, "y")]
    found = page(tmp_path, studies=[study("a", "b", context=context)])
    assert found.text.count("diseased 0.877") == 2 and "cosine" in found.text
    assert "cosine" not in page(tmp_path, studies=[study("a", "b", context=context[1:])]).text


def test_24_studies_of_large_images_stay_small(tmp_path):
    rng = np.random.default_rng(0)
    shade = np.linspace(0, 1, 512, dtype=np.float32)
    images = [np.outer(shade, shade) + rng.normal(0, 0.02, (512, 512)).astype(np.float32) for _ in range(4)]
    context = [ContextCard(str(i), "normal", images[i % 4], "lungs are clear .") for i in range(6)]
    two, four = ([study("a", "b", context=context) for _ in range(24)] for _ in range(2))
    for cards, count in ((two, 2), (four, 4)):
        for card in cards:
            card.images, card.captions = images[:count], ["input"] * count
            card.prediction, card.confidence = "word " * 100, [0.5] * 100
            card.attention = [rng.random((100, 14, 14), np.float32) ** 8 for _ in range(count)]
        assert page(tmp_path, studies=cards).count("article") == 24
        assert (tmp_path / "report.html").stat().st_size < 6e6


def test_a_wrong_image_leaves_the_former_page(tmp_path):
    page(tmp_path, title="former")
    card = StudyCard("s1", [np.zeros((3, 8, 8), np.float32)], ["frontal"])
    with pytest.raises(MedxrayError, match=r"s1 frontal.*\(H, W\).*\(3, 8, 8\)"):
        page(tmp_path, studies=[card])
    assert "former" in (tmp_path / "report.html").read_text() and os.listdir(tmp_path) == ["report.html"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/report\.html"):
        report_page(
            tmp_path / "file" / "report.html",
            title="", spec_yaml="", log=[], scores=None, studies=[], facts={}, notes=[],
        )  # fmt: skip
