"""Charts: what they draw, and that odd data do not break them."""

import math
import re
import xml.etree.ElementTree as ET

import pytest

from medxray.types import Score
from medxray.visual.charts import (
    Series,
    bar,
    difference_chart,
    interval_chart,
    interval_strip,
    line_chart,
    lower_is_better,
    number,
    reliability_chart,
    training_curves,
)

NAN = math.nan
SVG = "{http://www.w3.org/2000/svg}"


def svg(figure: str) -> ET.Element:
    found = ET.fromstring(figure).find("svg")
    assert found is not None
    assert "nan" not in ET.tostring(found, encoding="unicode")
    return found


def line_of(figure: str) -> str:
    return next(p.get("d", "") for g in svg(figure).iter("g") for p in g.iter("path"))


def circles(figure: str) -> int:
    return len(list(svg(figure).iter("circle")))


def test_a_line_rises_when_its_values_do():
    places = re.findall(r"([\d.]+) ([\d.]+)", line_of(line_chart("loss", [Series("train", [(0, 1), (5, 2), (10, 4)])])))
    x, y = zip(*[(float(a), float(b)) for a, b in places], strict=True)
    assert len(x) == 3 and x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)
    assert y[1] - y[2] == pytest.approx(2 * (y[0] - y[1]), abs=0.3) and y[0] > y[1]


def test_axes_are_labelled():
    texts = [t.text for t in svg(line_chart("loss", [Series("train", [(0, 0.91), (600, 0.95)])])).iter("text")]
    assert {"step", "0", "200", "600", "0.91", "0.95"} <= set(texts)


@pytest.mark.parametrize("value", [0.0, 2.5, -3.0, 1e-9, 1e12])
def test_one_point_is_drawn(value):
    assert circles(line_chart("loss", [Series("train", [(10, value)])])) == 1


def test_what_is_not_finite_breaks_the_line_and_is_counted():
    points = [(1, 1.0), (2, 2.0), (3, NAN), (4, 1.0), (5, math.inf), (6, 2.0), (7, 1.0)]
    figure = line_chart("loss", [Series("train", points)])
    assert line_of(figure).count("M") == 2 and circles(figure) == 1
    assert "2 not finite" in figure


@pytest.mark.parametrize("points", [[], [(1, NAN)]])
def test_nothing_to_draw_says_so(points):
    assert "no values yet" in line_chart("loss", [Series("train", points)])


def test_long_lines_are_thinned_to_their_means():
    figure = line_chart("loss", [Series("train", [(i, float(i % 2)) for i in range(24_000)])])
    assert line_of(figure).count("L") == 239
    assert len({y for _, y in re.findall(r"([\d.]+) ([\d.]+)", line_of(figure))}) == 1


def test_training_curves():
    log = [
        {"step": 10, "loss": 1.2, "learning_rate": 1e-3, "epoch": 0.1},
        {"step": 20, "loss": 1.0, "learning_rate": 5e-4, "epoch": 0.2},
        {"step": 20, "eval_loss": 0.9, "eval_bleu-4": 0.1, "eval_runtime": 3.0},
        {"step": 20, "train_runtime": 9.0, "train_loss": 1.1, "note": "done", "ok": True},
        {"loss": 5.0},
    ]
    titles = [ET.fromstring(c).findtext("figcaption/b") for c in training_curves(log)]
    assert titles == ["loss", "bleu-4", "learning rate"]
    assert [e.get("class") for e in svg(training_curves(log)[0]).iter("g")] == [
        "series plain",
        "series dotted",
    ]
    assert training_curves([]) == [] == training_curves([{"step": 1, "eval_auroc/Edema": 0.5}])


def test_names_are_escaped():
    assert "<script>" not in line_chart("<script>", [Series("<script>", [(1, 1.0)])], "<script>")


def test_interval_strip_places_dots_on_the_common_scale():
    low, high = Score(0.1, 0.0, 0.2, 9), Score(0.9, 0.8, 1.0, 9)
    dots = [
        float(re.search(r'cx="([\d.]+)"', interval_strip(s, [low, high], high.value, False))[1]) for s in (low, high)
    ]
    assert dots == [14.0, 86.0]
    assert interval_strip(Score(NAN, NAN, NAN, 9), [low], NAN, True) == ""
    assert "interval" not in interval_strip(Score(0.5, NAN, NAN, 9), [low], NAN, True)
    assert "NaN" not in interval_strip(Score(0.5, 0.5, 0.5, 9), [Score(0.5, 0.5, 0.5, 9)], 0.5, True)


def test_bar_is_cut_to_its_range():
    assert [re.search(r'fill" width="([\d.]+)"', bar(v))[1] for v in (-1, 0.25, 7, NAN)] == [
        "0.0",
        "25.0",
        "100.0",
        "0.0",
    ]


def test_numbers():
    assert [number(v) for v in (0.12345, 0.0, 1e-5, 123456.0, NAN)] == [
        "0.123",
        "0.000",
        "1e-5",
        "1.23e5",
        "undefined",
    ]


def test_a_picture_of_intervals_has_every_row_and_the_floor_to_beat():
    def s(value: float, half: float = 0.1) -> Score:
        return Score(value, value - half, value + half, 20)

    rows = {"a & b": {"f1": s(0.5)}, "c": {"f1": s(math.nan)}, "worst": {"f1": s(0.2)}, "best": {"f1": s(0.3, math.nan)}}
    root = ET.fromstring(interval_chart(rows, ["f1", "lost"], floors=["worst", "best", "absent"]))
    texts = [t.text for t in root.iter(SVG + "text")]
    assert [t for t in texts if t in rows] == list(rows) and {"f1", "lost", "0.0"} <= set(texts)
    marks = list(root.iter(SVG + "g"))
    assert [m.get("class") for m in marks] == ["model", "floor", "floor"]
    where = [float(m.find(SVG + "circle").get("cx")) for m in marks]
    assert where[1] < where[2] < where[0]
    (least,) = (p for p in root.iter(SVG + "path") if p.get("class") == "least")
    assert least.get("d").startswith(f"M{where[2]:.1f} ")
    spans = [m.find(SVG + "path") for m in marks]
    assert spans[0] is not None and spans[2] is None
    assert len(spans[0].get("d").split("H")) == 2


def test_of_errors_the_least_floor_is_the_one_to_beat():
    rows = {name: {"reconstruction-error": Score(v, v, v, 9)} for name, v in (("model", 0.5), ("x", 0.1), ("y", 0.4))}
    root = ET.fromstring(interval_chart(rows, ["reconstruction-error"], floors=["x", "y"]))
    least = next(p for p in root.iter(SVG + "path") if p.get("class") == "least")
    x = list(root.iter(SVG + "circle"))[1].get("cx")
    assert least.get("d").startswith(f"M{float(x):.1f} ")


def test_a_forest_plot_has_a_dot_a_row_beside_the_line_of_no_difference():
    rows = {
        "ours & theirs": Score(0.2, 0.1, 0.3, 9), "worse": Score(-0.1, -0.15, -0.05, 9), "open": Score(0.0, -0.1, 0.1, 9),
        "alone": Score(0.1, NAN, NAN, 9), "lost": Score(NAN, NAN, NAN, 9),
    }  # fmt: skip
    better = {"ours & theirs": True, "worse": False, "open": None}
    root = svg(difference_chart("bleu-4", rows, better, {"open": "p 0.9"}))
    texts = [t.text for t in root.iter("text")]
    assert set(rows) <= set(texts) and "p 0.9" in texts and "0.0" in texts
    dots = {g.findtext("title").rpartition(":")[0]: g for g in root.iter("g")}
    assert {name: g.get("class") for name, g in dots.items()} == {
        "ours & theirs": "apart better", "worse": "apart worse", "open": "apart open", "alone": "apart open",
    }  # fmt: skip
    (zero,) = (float(re.match(r"M([\d.]+)", p.get("d"))[1]) for p in root.iter("path") if p.get("class") == "axis")
    at = {name: float(g.find("circle").get("cx")) for name, g in dots.items()}
    assert at["worse"] < zero == at["open"] < at["alone"] < at["ours & theirs"]
    assert [g.find("path") is None for g in dots.values()] == [False, False, False, True]
    assert circles(difference_chart("one", {"same": Score(0.0, 0.0, 0.0, 9)}, {}, {})) == 1
    assert circles(difference_chart("none", {"lost": rows["lost"]}, {}, {})) == 0
    cut = svg(difference_chart("long", {"a" * 60: rows["open"]}, {}, {}))
    assert next(t.text for t in cut.iter("text") if t.get("class") == "row") == "a" * 27 + "…"


def test_a_reliability_curve_lies_on_the_diagonal_where_probabilities_hold():
    bins = [(0.1, 0.1, 0.05, 0.2, 100), (0.5, 0.5, 0.3, 0.7, 25), (0.9, 0.7, 0.6, 0.8, 25)]
    drawn = svg(reliability_chart("<Edema>", bins))
    x, y, radius = ([float(c.get(key, "")) for c in drawn.iter("circle")] for key in ("cx", "cy", "r"))
    (diagonal,) = [p.get("d", "") for p in drawn.iter("path") if p.get("stroke-dasharray")]
    left, bottom, right, top = map(float, re.findall(r"[\d.]+", diagonal))
    on_it = [bottom + (top - bottom) * (place - left) / (right - left) for place in x]
    assert y[:2] == pytest.approx(on_it[:2], abs=0.15) and y[2] > on_it[2] + 10, "overconfident is below"
    assert radius[0] > radius[1] == radius[2]
    whiskers = [p.get("d", "") for g in drawn.iter("g") for p in g.iter("path")]
    low, high = (float(value) for value in re.findall(r"[\d.]+", whiskers[2])[1:])
    assert high < y[2] < low
    assert "ECE 0.033, 150 probabilities" in drawn.get("aria-label", "")
    assert "no studies" in reliability_chart("Edema", [])


def test_errors_are_better_when_lower():
    names = ("ece", "brier/Edema", "loss", "reconstruction-error", "auroc", "bleu-4", "auroc/ece", "f1/loss of volume")
    assert [lower_is_better(name) for name in names] == [True] * 4 + [False] * 4


def test_a_notebook_shows_a_picture_whose_style_is_its_own():
    chart = interval_chart({"a": {"f1": Score(0.5, 0.4, 0.6, 9)}}, ["f1"])
    assert chart._repr_svg_() == chart and repr(chart) == f"Svg({len(chart):,} characters)"
    rules = re.findall(r"([^{}]+)\{", chart[chart.index("<style>") + 7 : chart.index("</style>")])
    assert len(rules) > 5 and all(rule.startswith(".intervals") for rule in rules)
