"""The page: complete, self-contained, escaped, small, and honest in its verdict."""

import base64
import hashlib
import html.parser
import json
import math
import os
import re
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medxray.metrics import per_finding
from medxray.types import MedxrayError, RunError, Score, Scores
from medxray.visual import ContextCard, StudyCard
from medxray.visual.attention import ACROSS, EDGE, heat_sheet
from medxray.visual.report_page import report_page
from medxray.visual.study_list import LARGEST

EVIL = "<script>alert(1)</script> <!-- \" ' & </pre> \u2028 </SCRIPT \ud800"
VOID = {"meta", "img", "br", "rect", "path", "circle", "input"}


class Page(html.parser.HTMLParser):
    """Reads a page, and the cards in its blocks, holding them to closed elements.

    Attributes:
        elements, text: of the page and its cards.
        marks: kind -> texts, of the cards.
        blocks: name -> what a script element that does not run holds.
        scripts: those that run.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.marks: dict[str, list[str]] = {kind: [] for kind in ("agreed", "differs", "missed", "unsupported")}
        self.blocks: dict[str, str] = {}
        self.scripts: list[str] = []
        self.feed(text)
        self.marks = {kind: [] for kind in self.marks}  # those of the legend
        for name, block in list(self.blocks.items()):
            if name != "index":
                self.feed(block)
        assert not self.open

    @property
    def index(self) -> dict[str, Any]:
        return json.loads(self.blocks["index"])

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
        if "script" in self.open:
            name = self.elements[-1][1].get("id")
            if name:
                self.blocks[name] = self.blocks.get(name, "") + data
            else:
                self.scripts.append(data)
        elif "style" not in self.open:
            self.text += data
        if "mark" in self.open:
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
    # Nothing but the page's own script, two contexts' reports, one's image, the card and the index is a script element.
    assert len(found.scripts) == 1 and set(found.blocks) == {"s0", "r0", "r1", "c0", "index"}
    shown = EVIL.replace("\ud800", "?")
    assert found.text.count(shown) > 20
    assert found.index["ids"] == [EVIL] and found.index["texts"] == [[EVIL, f"{EVIL} x"]] and EVIL in found.index["scores"]
    assert found.count("img") == 3
    for tag, attributes in found.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "action", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/webp;base64,", "#")), (tag, value)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"@import|url\(|<link", text)
    assert "Research use only. Not a medical device." in found.text


def test_the_policy_lets_only_the_pages_own_script_run(tmp_path):
    found = page(tmp_path, studies=[study("a", "b")])
    (policy,) = (a["content"] for t, a in found.elements if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(found.scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy and "http" not in policy
    assert "unsafe-eval" not in policy and policy.count("unsafe-inline") == 1
    empty = page(tmp_path)
    assert not empty.scripts and not any("script-src" in (a.get("content") or "") for _, a in empty.elements)


def test_an_empty_run_has_a_page(tmp_path):
    found = page(tmp_path)
    assert "Not evaluated yet." in found.text and found.count("script") == 0 and "needs a script" not in found.text


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


def test_sentences_are_marked_by_what_the_other_report_says(tmp_path):
    card = study(
        "No effusion. There is cardiomegaly. Left pneumothorax.",
        "heart is enlarged . right pneumothorax . edema . midline trachea",
    )  # fmt: skip
    found = page(tmp_path, studies=[card])
    assert found.marks == {
        "agreed": ["There is cardiomegaly.", "heart is enlarged ."],
        "differs": ["Left pneumothorax.", "right pneumothorax ."],
        "missed": [],
        "unsupported": ["edema ."],
    }
    assert "agreed" in found.text and "unsupported" in found.text
    assert found.index["findings"] == ["Cardiomegaly", "Edema", "Pneumothorax"] and found.index["flags"] == ["ahw"]
    assert found.index["scores"] == {"findings missed": [0.0], "findings hallucinated": [1.0]}


def test_a_prediction_without_reference_is_not_marked(tmp_path):
    found = page(tmp_path, studies=[study("", "There is edema .")])
    assert "There is edema ." in found.text and found.count("mark") == 0


def test_bars_and_filters_of_findings_are_those_of_the_metric(tmp_path):
    references = ["edema .", "left pleural effusion .", "clear lungs .", "edema . cardiomegaly .", "pneumonia ."]
    predictions = ["edema .", "right pleural effusion .", "edema .", "no edema .", ""]
    found = page(tmp_path, studies=[study(r, p) for r, p in zip(references, predictions, strict=True)])
    rows = {row.name: row for row in per_finding(predictions, references)}
    links = {(a["data-finding"], a["data-kind"]): a for t, a in found.elements if t == "a" and "data-kind" in a}
    index = found.index
    for name, row in rows.items():
        letters = [flags[index["findings"].index(name)] for flags in index["flags"]] if name in index["findings"] else []
        counts = {"aw": row.hits, "w": row.wrong_side, "m": row.misses, "h": row.hallucinations}
        for kind, count in counts.items():
            assert sum(letter in kind for letter in letters) == count, (name, kind)
            assert ((name, kind) in links) == (count > 0)
        if letters:
            said = f"{row.hits} found, {row.wrong_side} wrong side, {row.misses} missed, {row.hallucinations} hallucinated"
            assert any(a.get("aria-label") == f"{name}: {said}" for _, a in found.elements)


def test_each_score_has_a_histogram_whose_columns_hold_all_studies(tmp_path):
    values = {"rouge-l": np.linspace(0, 1, 50), "cider": [math.nan] * 49 + [1.0], "even": [0.5] * 50}
    found = page(tmp_path, studies=[study("", f"text {i}") for i in range(50)], values=values)
    assert [a["data-score"] for t, a in found.elements if t == "div" and "data-score" in a] == ["rouge-l"]
    columns = [(float(a["data-low"]), float(a["data-high"]), "data-last" in a) for t, a in found.elements if "data-low" in a]
    counted = [sum(low <= v and (v < high or last) for v in found.index["scores"]["rouge-l"]) for low, high, last in columns]
    assert sum(counted) == 50 and all(counted) and len(columns) == 30
    assert found.index["scores"]["cider"] == [None] * 49 + [1.0]
    # What no study has is nothing to sort by.
    nothing = page(tmp_path, studies=[study("", "text")], values={"meteor": [math.nan]})
    assert not any(a.get("value") == "meteor" for t, a in nothing.elements if t == "option")


def test_labels_are_filters_and_their_probabilities_scores(tmp_path):
    cards = [
        StudyCard("a", [], [], scores={"Edema": 0.9, "Nodule": 0.2}, labels={"Edema": 1, "Nodule": -1}),
        StudyCard("b", [], [], scores={"Edema": 0.3, "Nodule": 0.2}, labels={"Edema": 0, "Nodule": None}),
    ]
    found = page(tmp_path, studies=cards, calibration=["<figure>as told</figure>"])
    assert found.index["flags"] == ["pu", "n."] and found.index["scores"]["Edema"] == [0.9, 0.3]
    assert found.index["scores"]["brier"] == pytest.approx([0.01, 0.09])
    assert "as told" in found.text and "Calibration" in found.text and "hallucinated" not in found.text


def test_subgroups_have_a_table_an_attribute(tmp_path):
    groups = {"sex": {"female": {"auroc": s(0.7)}, "male": {"auroc": s(0.9)}}, "view": {"AP": {"auroc": s(math.nan)}}}
    found = page(tmp_path, scores=Scores({"auroc": s(0.8)}, subgroups=groups))
    assert found.count("table") == 3
    for expected in ("by sex", "female, 50 studies", "0.700", "by view", "AP, 50 studies", "undefined"):
        assert expected in found.text


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
    words = [a for tag, a in found.elements if tag == "label" and (a.get("class") or "").startswith("word")]
    assert [a["class"] for a in words] == [f"word w{i}" for i in range(6)] * 2
    doubts = ["--doubt:0.10", "--doubt:0.75", "--doubt:0.00", "--doubt:0.50", None, "--doubt:1.00"]
    assert [a.get("style") for a in words[:6]] == doubts
    assert words[1]["title"] == "25%" and words[4].get("title") is None
    radios = [a for tag, a in found.elements if tag == "input" and a["type"] == "radio"]
    assert len({a["name"] for a in radios}) == 2 and len(radios) == 14 and sum("checked" in a for a in radios) == 2
    assert "the heart is <b> & clear." in found.text and "map of findings" in found.text
    # Every word has a rule by which its tile comes, chosen or pointed at; rules for more words are not there.
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    for state in (">:checked", ":hover"):
        assert f"article:has(.w5{state}){{--x:6;--y:0}}" in text and f".w6{state}" not in text
    assert not re.search(r"url\(", text)


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
    assert not any(a.get("type") == "radio" for _, a in bare.elements) and "no map" in bare.text
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
    assert found.text.count("diseased 0.877") == 2 and "cosine" in found.text and "no image" in found.text
    # Another study that draws the same ones adds neither image nor report.
    twice = page(tmp_path, studies=[study("a", "b", context=context)] * 2)
    assert set(twice.blocks) == {"s0", "s1", "r0", "r1", "index"}
    assert "cosine" not in page(tmp_path, studies=[study("a", "b", context=context[1:])]).text


def test_24_studies_of_large_images_stay_small(tmp_path):
    rng = np.random.default_rng(0)
    shade = np.linspace(0, 1, 512, dtype=np.float32)
    images = [np.outer(shade, shade) + rng.normal(0, 0.02, (512, 512)).astype(np.float32) for _ in range(4)]
    context = [ContextCard(str(i), "normal", images[i % 4], "lungs are clear .") for i in range(6)]
    cards = [study("a", "b", context=context) for _ in range(24)]
    for card in cards:
        card.images, card.captions = images, ["input"] * 4
        card.prediction, card.confidence = "word " * 100, [0.5] * 100
        card.attention = [rng.random((100, 14, 14), np.float32) ** 8 for _ in range(4)]
    assert len(page(tmp_path, studies=cards).index["ids"]) == 24
    assert (tmp_path / "report.html").stat().st_size < 6e6


def test_the_more_studies_the_smaller_their_images_and_none_is_held(tmp_path):
    made = []

    def cards(count):
        for i in range(count):
            made.append(weakref.ref(image := np.full((700, 600), 0.5, np.float32)))
            yield StudyCard(str(i), [image], ["frontal"])
            del image
            assert sum(one() is not None for one in made) <= 2

    for count, (_, side) in zip((1, 601, 1501, 4001), LARGEST, strict=True):
        made.clear()
        found = page(tmp_path, studies=cards(1), count=count)
        (size,) = ((int(a["width"]), int(a["height"])) for t, a in found.elements if t == "img")
        assert size == (round(side * 600 / 700), side)
    made.clear()
    page(tmp_path, studies=cards(5))
    assert len(made) == 5


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


def test_a_notebook_shows_a_card_whole_and_keeps_its_style_to_itself():
    image = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    maps = np.full((2, 4, 4), 1 / 16, np.float32)
    card = StudyCard(
        EVIL, [image], ["frontal"], "no effusion .", "an effusion",
        context=[ContextCard("c1", "sick", image, EVIL, 0.5), ContextCard("c2", "normal", image, "clear")],
        confidence=[0.5, 0.9], attention=[maps],
    )  # fmt: skip
    shown = card._repr_html_()
    found = Page(shown)
    assert not found.scripts and not found.blocks and "data-block" not in shown
    assert EVIL in found.text and "clear" in found.text and "no image" not in found.text
    # The study's image and its maps, and one of each context study.
    assert found.count("img") == 4 and found.count("form") == 1
    style_of = shown[shown.index("<style>") + 7 : shown.index("</style>")]
    assert style_of.startswith(".medxray{") and ":root" not in style_of
    depths = [0]
    for sign in re.findall(r"[{}]", re.sub(r'"[^"]*"', "", style_of)):
        depths.append(depths[-1] + (1 if sign == "{" else -1))
    assert depths[-1] == 0 and min(depths[1:-1]) >= 1, "a rule that reaches out of the card"
    assert "article:has(.w1:hover)" in style_of
    assert repr(card) == f"StudyCard({EVIL}: frontal)"
