"""The card: complete, self-contained, escaped, and plain about what leaks."""

import html.parser
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medxray.data import data_of
from medxray.data.inspection import Copies, Image, Inspection, Leak, Unusual, inspect
from medxray.data.phantom import generate
from medxray.types import RunError
from medxray.visual.charts import density, histogram
from medxray.visual.data_card import data_card, verdict

EVIL = "<script>alert(1)</script> \" ' & </pre>"
VOID = {"meta", "img", "br", "rect", "path", "circle", "input"}


class Page(html.parser.HTMLParser):
    """Reads a page, holding it to closed elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.raw = text
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def section(self, name: str) -> str:
        return re.search(f'<section id="{name}">.*?</section>', self.raw, re.DOTALL)[0]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Inspection:
    root = generate(tmp_path_factory.mktemp("card") / "A & B", studies=24, size=96, seed=2, progress=False)
    return inspect(data_of("csv", [f'reader.root="{root}"', "reader.report=findings"])[0].data, workers=1, progress=False)


def page(found: Inspection, folder: Path, **settings) -> Page:
    data_card(folder / "card.html", found, **settings)
    assert [path.name for path in folder.iterdir()] == ["card.html"]
    return Page((folder / "card.html").read_text(encoding="utf-8"))


def test_all_is_there_and_nothing_is_fetched(found: Inspection, tmp_path: Path) -> None:
    card = page(found, tmp_path)
    headings = re.findall(r"<h2>(.*?)</h2>", card.raw)
    assert headings == ["Leaks", "Studies", "Labels", "Images", "Copies", "Reports", "Samples", "Skipped", "Source"]
    assert "Data card: A & B" in card.text and "No leak was found." in card.text
    for tag, attributes in card.elements:
        assert tag not in ("script", "link", "iframe", "object", "base", "form")
        address = attributes.get("src") or attributes.get("href") or "#"
        assert address.startswith(("data:image/png;base64,", "#"))
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"url\(|@import|https?://", card.raw)
    assert "default-src 'none'" in card.raw and "prefers-color-scheme: dark" in card.raw and "@media print" in card.raw
    for counts in found.splits.values():
        assert f"<td>{counts.studies:,}</td><td>{counts.patients:,}</td><td>{counts.images:,}</td>" in card.raw
    assert all(name in card.section("labels") for name in found.labels)
    images = [attributes for tag, attributes in card.elements if tag == "img"]
    assert len(images) >= sum(map(len, found.samples.values())) and all(image["alt"] for image in images)


def test_the_same_bytes_twice(found: Inspection, tmp_path: Path) -> None:
    for name in ("a", "b"):
        data_card(tmp_path / name / "card.html", found)
    assert (tmp_path / "a" / "card.html").read_bytes() == (tmp_path / "b" / "card.html").read_bytes()


def planted(found: Inspection) -> Inspection:
    """The same with everything that is wrong, under hostile names."""
    picture = np.full((20, 30), 128, np.uint8)
    names = [f"{i} {EVIL}" for i in range(6)]
    group = Copies(
        names, names, ["PA"] * 6, ["train", "test", "val", "val", "val", "val"],
        ["", "near", "same file", "same pixels", "inverted", "near"], [0, 4, 0, 0, 3, 9],
        [1, 0.95, 1, 1, -0.98, 0.94], "splits", [EVIL],
    )  # fmt: skip
    return replace(
        found,
        refused=f"refused {EVIL}",
        copies=[group] * 2,
        copies_between={"splits": 30},
        copies_whole=False,
        leaks=[
            Leak("images", 30, f"30 pictures {EVIL}", [EVIL]),
            Leak("labels", 2, "2 pictures in contradiction", ["x"], certain=False),
        ],
        unusual=[Unusual(f"black {EVIL}", 20, [(Image(names[0], 0, "PA", "train"), 0.5)])],
        skipped={f"image: {EVIL}": 12},
        skipped_examples={f"image: {EVIL}": [EVIL]},
        headers={"manufacturer": {EVIL: 3, "b": 1}},
        labels={EVIL: next(iter(found.labels.values()))},
        reports=replace(found.reports, frequent=[(EVIL, 4)], sentences=[(EVIL, 4)], marks={EVIL: 2}),
        samples={(EVIL, EVIL): [Image(names[1], 0, EVIL, EVIL)]},
        settings={"file": EVIL},
        pictures={name: picture for name in names},
        sampled=True,
        looked=10,
        total=50,
    )


def test_what_is_wrong_is_said_first_and_everything_is_escaped(found: Inspection, tmp_path: Path) -> None:
    card = page(planted(found), tmp_path, title=f"T {EVIL}")
    assert "<script" not in card.raw and card.text.count("<script>") > 15
    assert not any(tag == "script" for tag, _ in card.elements)
    head = card.raw[: card.raw.index("<nav>")]
    assert 'class="verdict warn"' in head and "Leaks: 30 pictures" in head and "A fit would not begin: refused" in head
    assert "Doubtful: 2 pictures in contradiction" in head and "12 images, files or studies cannot be used" in head
    assert "in a sample: 10 of 50" in head and "The search for copies was ended" in head
    leaks = card.section("leaks")
    assert leaks.count('class="found"') == 1 and leaks.count('class="doubt"') == 1 and leaks.count('class="fine"') == 3
    assert "and 29 more" in leaks
    copies = card.section("copies")
    assert "The first 24 of 30" in copies and copies.count("<article") == 2 and copies.count("and 2 more") == 2
    assert "near, distance 4, correlation 0.950" in copies and "Labels that contradict" in copies
    assert "The 12 that are most so" in card.section("images")


def test_the_verdict_in_words(found: Inspection) -> None:
    assert verdict(found) == ["No leak was found."]
    assert verdict(replace(found, sampled=True, looked=3, total=9)) == ["No leak was found in a sample of 3 of 9 images."]
    lines = verdict(planted(found))
    assert lines[0].startswith("Leaks: 30 pictures") and lines[1] == "Doubtful: 2 pictures in contradiction."


def test_a_set_without_images_reports_and_labels(tmp_path: Path) -> None:
    root = generate(tmp_path / "set", studies=3, size=64, progress=False)
    shutil.rmtree(root / "images")
    table = root / "studies.csv"
    lines = table.read_text(encoding="utf-8").splitlines()
    table.write_text(
        "\n".join(["path,study_id", *(",".join(line.split(",")[:2]) for line in lines[1:])]), encoding="utf-8"
    )
    found = inspect(data_of("csv", [f"reader.root={root}"])[0].data, workers=1, progress=False)
    out = tmp_path / "out"
    out.mkdir()
    card = page(found, out)
    assert "No image could be read." in card.text and "No study has a report." in card.text
    assert "image: no such file" in card.text and "are missing" in card.text and 'id="labels"' not in card.raw


def test_a_place_that_cannot_be_written(found: Inspection, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file"):
        data_card(tmp_path / "file" / "card.html", found)


def columns(chart: str) -> list[int]:
    return [int(n.replace(",", "")) for n in re.findall(r"<title>[^<]*: ([\d,]+)</title>", chart)]


def test_a_histogram_counts_every_value() -> None:
    whole = np.array([1, 1, 1, 2, 5, 400])
    chart = histogram("lengths", whole, "words")
    assert columns(chart) == [5, 1] and "1 to 13: 5" in chart and "378 to 390 and more: 1" in chart
    assert columns(histogram("few", np.array([3, 3, 4, 6]), "words")) == [2, 1, 1]
    assert "median 1.5" in chart and "a histogram of 6 values" in chart
    assert sum(columns(histogram("x", np.random.default_rng(0).random(1000), "x"))) == 1000
    for one in (np.array([7]), np.array([0.25]), np.zeros(4)):
        assert sum(columns(histogram("x", one, "x"))) == len(one)
    assert "x &lt;b&gt;" in histogram("x <b>", whole, "y")


def test_a_density_counts_every_point() -> None:
    points = np.random.default_rng(0).normal(100, 20, (500, 2))
    assert sum(columns(density("size", points, "width", "height"))) == 500
    chart = density("size <b>", np.array([[10, 20], [10, 20], [30, 40]]), "w", "h", "<i>")
    assert sorted(columns(chart)) == [1, 2] and "<b>" not in chart.replace("<b>size &lt;b&gt;</b>", "")
    assert "NaN" not in density("one", np.array([[5, 5]]), "w", "h") + chart
