"""No text that reaches a page becomes more than text: report texts, names of studies, labels and files, values of specs. Each
page is made twice, of hostile words and of the same words with their signs taken out, and must have the same elements; and
Chromium, which runs whatever it can, is shown the hostile one with its content policy taken off."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from medxray.model_card import model_card, write_card
from medxray.outputs import Answer, write
from medxray.spec import DataSpec, Spec
from medxray.types import Prediction, Score, Scores
from medxray.visual import ContextCard, StudyCard
from medxray.visual.charts import histogram
from medxray.visual.comparison_page import Apart, Differing, comparison_page
from medxray.visual.data_card import data_card
from medxray.visual.page import write_page
from medxray.visual.report_page import report_page

RAN = "window.ran=1;document.title=1"
RUNNING = (
    f"<script>{RAN}</script>", f'"><img src="x" onerror="{RAN}">', f"'><svg onload='{RAN}'></svg>",
    f"</script><script>{RAN}</script>", f"--><img src=x onerror={RAN}><!--",
    f"</style></title></textarea></pre></option></select></details><img src=x onerror={RAN}>",
    f"<iframe srcdoc='<script>parent.{RAN.split(';')[0]}</script>'></iframe>", f"<details open ontoggle={RAN}></details>",
)  # fmt: skip
"""What runs in a page that takes it as it is."""
WORDS = " ".join((
    *RUNNING, f"{{{{{RAN}}}}}", f"${{{RAN}}}", f"]]><img src=x onerror={RAN}>", f"javascript:{RAN}", "<!--<script>",
    f"<body onload={RAN}>",
    f'" onmouseover="{RAN}" autofocus onfocus="{RAN}" style="animation:x" x="', f"&lt;img src=x onerror={RAN}&gt;",
    f"\\u003cscript\\u003e{RAN}\\u003c/script\\u003e", f"\u2028{RAN}//\u2029", f"<a href=javascript:{RAN}>",
    f"[x](javascript:{RAN})",
    "![x](http://127.0.0.1:9/p.png)", "[x](http://127.0.0.1:9/)", "*x* _x_ `x` ~~~", "<base href=http://127.0.0.1:9/>",
    "<meta http-equiv=refresh content=0;url=http://127.0.0.1:9/>", "<style>*{x:url(http://127.0.0.1:9)}", "</svg></math>",
    f"<form action=javascript:{RAN}><input type=submit>", "<link rel=stylesheet href=http://127.0.0.1:9/>", "\ud800",
))  # fmt: skip
CALM = re.sub(r"""[<>"'&{}()*`~_!=$#|\\\[\]-]""", "x", WORDS)
METRIC = str.maketrans("/", "x")


class Elements(HTMLParser):
    """A page's elements with the names of their attributes, those of its blocks among them; and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, ...]] = []
        self.addresses: list[str] = []
        self.text, self.blocks = "", []
        self._inside: tuple[str, str] = ("", "")
        self.feed(html)
        for block in self.blocks:
            self._inside = ("", "")
            self.feed(block)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, *(name for name, _ in attributes)))
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "action", "srcset", "formaction")]
        self._inside = tag, dict(attributes).get("type") or ""

    def handle_endtag(self, tag: str) -> None:
        self._inside = ("", "")

    def handle_data(self, data: str) -> None:
        if self._inside == ("script", "text/html"):
            self.blocks.append(data)
        elif self._inside[0] not in ("script", "style"):
            self.text += data


def score(value: float = 0.4) -> Score:
    return Score(value, value - 0.1, value + 0.1, 9)


def scores(w: str) -> Scores:
    m = w.translate(METRIC)  # what stands behind a slash is a label
    by = {w: {w: {m: score()}, "b": {m: score()}}}
    return Scores({m: score(), f"auroc/{w}": score()}, {f"{w}2": {m: score()}}, [w, f"Warning: {w}"], w, by, w)


def card(w: str, **more: Any) -> StudyCard:
    image = np.zeros((8, 8), np.float32)
    return StudyCard(
        w, [image, image], [w, w], f"{w} . There is cardiomegaly.", f"There is edema. {w}", {w: 0.25},
        [ContextCard(w, w, image, w), ContextCard("b", w, None, w)], {w: 1}, remark=w, **more,
    )  # fmt: skip


def labelled(w: str) -> StudyCard:
    return StudyCard(w, [], [], scores={w: 0.9, "b": 0.2}, labels={w: 1, "b": None})


def attended(w: str) -> StudyCard:
    said = f"There is edema. {w}"
    n = len(said.split())
    return card(w, confidence=[0.5] * n, attention=[np.full((n, 2, 2), 0.125, np.float32)] * 2)


Make = Callable[[Path, str, Any], str]


def of_a_run(path: Path, w: str, given: Any, make: Callable[[str], StudyCard] = card) -> str:
    report_page(
        path, title=w, spec_yaml=f"task: {w}\n", log=[{"step": i, "loss": 1.0, w: 1.0, f"eval_{w}": 2.0} for i in range(3)],
        scores=scores(w), studies=[make(w)] * 3, facts={w: w}, notes=[w], values={w: [0.1, 0.2, 0.3]},
        calibration=[histogram(w, np.array([0.1, 0.2, 0.3]), w)],
    )  # fmt: skip
    return path.read_text(encoding="utf-8")


def of_a_run_of_labels(path: Path, w: str, given: Any) -> str:
    return of_a_run(path, w, given, labelled)


def of_a_run_with_attention(path: Path, w: str, given: Any) -> str:
    return of_a_run(path, w, given, attended)


def of_a_comparison(path: Path, w: str, given: Any) -> str:
    m = w.translate(METRIC)
    apart = {m: Apart(0.1, 0.02, 0.18, 9, 0.004, 0.012, True), f"auroc/{w}": Apart(-0.1, -0.2, -0.02, 9, 0.004, 0.01, False)}
    study = Differing(w, w, {w: (w, 0.1), f"{w}2": (w, 0.9)})
    comparison_page(
        path, baseline=w, scores={name: dict.fromkeys(apart, score()) for name in (w, f"{w}2")}, differences={f"{w}2": apart},
        lower=[m], findings={name: {w: (0.5, w)} for name in (w, f"{w}2")}, wins={f"{w}2": {m: (5, 1, 3)}},
        studies={f"{w}2": (m, [study], [study])}, runs={w: w}, notes=[w],
    )  # fmt: skip
    return path.read_text(encoding="utf-8")


def of_a_data_set(path: Path, w: str, given: Any) -> str:
    from medxray.data.inspection import Copies, Image, Leak, Unusual, inspect

    found = inspect(Spec.read(given("small_spec")).data, workers=1, progress=False)
    names = [f"{i} {w}" for i in range(4)]
    kinds = ["", "near", w, "same pixels"]
    group = Copies(names, names, [w] * 4, ["train", "test", "val", w], kinds, [0, 4, 0, 0], [1] * 4, "splits", [w])
    label = next(iter(found.labels.values()))
    found = replace(
        found, root=Path(f"/{w}"), reader=w, refused=w, copies=[group], copies_between={"splits": 1}, copies_whole=False,
        leaks=[Leak("images", 3, w, [w]), Leak("labels", 2, w, [w], certain=False)],
        unusual=[Unusual(w, 20, [(Image(names[0], 0, w, w), 0.5)])], skipped={w: 12}, skipped_examples={w: [w]},
        headers={w: {w: 3, "b": 1}, "manufacturer": {w: 2}}, labels={w: label}, samples={(w, w): [Image(names[1], 0, w, w)]},
        reports=replace(found.reports, frequent=[(w, 4)], sentences=[(w, 4)], marks={w: 2}),
        settings={w: w}, pictures={name: np.full((20, 30), 128, np.uint8) for name in names},
    )  # fmt: skip
    data_card(path, found, title=w)
    return path.read_text(encoding="utf-8")


def of_predictions(path: Path, w: str, given: Any) -> str:
    image = given("small_studies") / "0.png"
    answers = [Answer(Prediction(w, text=w, scores={w: 0.5}), [image]), Answer(Prediction(w), [])]
    write(answers, "html", path, model=w, data=DataSpec.model_construct(max_pixels=10**6))
    return path.read_text(encoding="utf-8")


def planted_run(folder: Path, w: str) -> Path:
    """A run folder whose files say hostile things; JSON has no lone surrogates."""
    w = w.replace("\ud800", "")
    folder.mkdir(exist_ok=True)
    several = f"{w}\n## {w}\n\n# {w}\n</details>\n```\n{w}"
    spec = {
        "task": "report", "name": several, "seed": w, "weights": f"/x/{w}",
        "data": {"reader": {"name": w, "root": "/x"}, "image_size": w, "split": w, "cleaning": w},
        "encoder": {"name": w, "weights": f"/x/{w}", "channels": w}, "decoder": {"name": w, "model": w, "prompt": several},
        "training": {"select": w, "steps": w, "optimiser": several},
    }  # fmt: skip
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec, allow_unicode=True), encoding="utf-8")
    facts = {
        "parameters": {w: {"all": 1, "trained": 1}}, "labels": {w: {"train": [1, 2], w: [0, 3]}},
        "attributes": {w: {w: 100, "b": 1}},
        "splits": {"train": {"studies": 1, "patients": 1, "images": 1}, w: {"studies": 1, "patients": 1, "images": 1}},
    }  # fmt: skip
    log = [{"step": 1, f"eval_{w}": 1.0}]
    rows = [{"reason": several, "file": "x", "study": "y"}]
    told = scores(w)
    told.notes += [several, f"Warning: {several}", f"- {w}", f"# {w}", f"1. {w}", f"threshold {w}"]
    for name, content in (
        ("facts.json", facts), ("scores.json", told.to_dict()), ("references.json", {several: w}),
        ("environment.json", {"python": w, "packages": {w: several}, "device": several}),
    ):  # fmt: skip
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    for name, lines in (("log.jsonl", log), ("skipped.jsonl", rows)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def of_a_card(path: Path, w: str, given: Any) -> str:
    write_card(planted_run(path.parent / f"run-{w == WORDS}", w), path)
    return path.read_text(encoding="utf-8")


def of_a_card_in_markdown(path: Path, w: str, given: Any) -> str:
    from markdown_it import MarkdownIt

    text = model_card(planted_run(path.parent / f"run-{w == WORDS}", w)).split("---\n", 2)[2]  # less its header in YAML
    return "<!doctype html><meta charset=utf-8>" + MarkdownIt("commonmark", {"html": True}).enable("table").render(text)


def of_a_service(path: Path, w: str, given: Any) -> str:
    fastapi = pytest.importorskip("fastapi")
    from medxray.serve import Limits
    from medxray.serve.description import page_of

    app = fastapi.FastAPI(title=w)

    @app.post(f"/{re.sub('[{}]', '', w)}", summary=w, description=w, responses={422: {"description": w}})
    def answer() -> None: ...

    return page_of(app, Limits())


def of_a_title(path: Path, w: str, given: Any) -> str:
    write_page(path, w, "", {w: "<p>text</p>"})
    return path.read_text(encoding="utf-8")


def of_a_notebook(path: Path, w: str, given: Any) -> str:
    spec = Spec.read(given("small_spec"), {"decoder": {"prompt": f"{{image}} {w.replace('{', '(').replace('}', ')')}"}})
    said = Prediction(w, text=w, scores={w: 0.4}, context={w: [w]}, similarity={w: [0.5]})
    shown = [spec, scores(w), said, card(w), labelled(w), attended(w)]
    return "<!doctype html><meta charset=utf-8><title>t</title>" + "".join(one._repr_html_() for one in shown)


PAGES: dict[str, Make] = {
    make.__name__: make
    for make in (
        of_a_run, of_a_run_of_labels, of_a_run_with_attention, of_a_comparison, of_a_data_set, of_predictions, of_a_card,
        of_a_card_in_markdown, of_a_service, of_a_title, of_a_notebook,
    )
}  # fmt: skip


@pytest.mark.parametrize("name", PAGES)
def test_no_word_adds_an_element(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    seen, calm = (Elements(PAGES[name](tmp_path / "page.html", words, request.getfixturevalue)) for words in (WORDS, CALM))
    assert seen.found == calm.found
    assert not [value for value in seen.addresses if not value.startswith(("data:image/", "#", "/openapi.json"))]
    assert "window.ran=1" in seen.text, "it is there, as text"


def test_nothing_runs_in_a_browser(tmp_path: Path, browser: Any, request: pytest.FixtureRequest) -> None:
    for name, make in PAGES.items():
        html = make(tmp_path / "page.html", WORDS, request.getfixturevalue)
        bare = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
        assert bare != html or name in ("of_a_notebook", "of_a_card_in_markdown")
        (tmp_path / "bare.html").write_text(bare, encoding="utf-8", errors="replace")
        browser.open(f"file://{tmp_path / 'bare.html'}")
        title = browser.run("document.title")
        if name.startswith("of_a_run"):
            browser.run("document.querySelector('#feed').scrollIntoView()")
            browser.until("[...document.querySelectorAll('#feed article')].some(article => 'filled' in article.dataset)")
            browser.press("j")
            browser.press("Enter")
            browser.until("document.querySelector('#opened[open] h3')?.textContent")
        # Whatever waits for a pointer, a focus or a turn of the loop has its chance.
        browser.run(
            "(async () => { for (const e of document.querySelectorAll('*')) { e.dispatchEvent(new MouseEvent('mouseover'));"
            " e.focus?.(); if (e.tagName === 'DETAILS') e.open = true; } await new Promise(r => setTimeout(r, 50)); })()"
        )
        assert browser.run("window.ran ?? 0") == 0 and browser.run("document.title") == title, name
        assert browser.run("document.querySelectorAll('iframe, base, object, embed, svg[onload]').length") == 0, name
        assert browser.run("[...document.images].filter(image => !image.src.startsWith('data:image/')).length") == 0, name
        assert not browser.events("Page.javascriptDialogOpening")


def test_the_words_do_run_where_nothing_is_escaped(tmp_path: Path, browser: Any) -> None:
    """Otherwise nothing above could fail."""
    for word in RUNNING:
        page = tmp_path / "careless.html"
        page.write_text(f'<!doctype html><meta charset=utf-8><p>{word}</p>', encoding="utf-8")
        browser.open(f"file://{page}")
        assert browser.until("window.ran") == 1, word
    browser.open("about:blank")  # what the browser told of them is forgotten
    assert Elements(f"<p>{WORDS}</p>").found != Elements(f"<p>{CALM}</p>").found
