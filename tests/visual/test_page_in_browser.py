"""The page of a run as a reader has it: in Chromium, by mouse and keyboard, at 200 studies and at 3,000."""

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medxray.types import Score, Scores
from medxray.visual import ContextCard, StudyCard
from medxray.visual.report_page import report_page

SENTENCES = {
    "Cardiomegaly": "There is cardiomegaly.", "Edema": "There is pulmonary edema.", "": "The trachea is midline.",
    "Pneumothorax": "There is a left pneumothorax.", "Pleural Effusion": "There is a small right pleural effusion.",
}  # fmt: skip
SHOWN = "document.querySelectorAll('#feed article').length"
FILLED = "document.querySelectorAll('#feed article[data-filled]').length"
ORDER = "[...document.querySelectorAll('#feed article')].map(article => +article.dataset.study)"


def reports(count: int) -> list[tuple[str, str]]:
    chance = random.Random(0)
    texts = [" ".join(s for s in SENTENCES.values() if chance.random() < 0.4) for _ in range(2 * count)]
    pairs = list(zip(texts[:count], texts[count:], strict=True))
    hostile = '</script><img src="x" onerror="document.title=1"> \u2028'
    pairs[7] = ("There is cardiomegaly.", f"A word as no other has: zebra {hostile}")
    return pairs


def write(path: Path, count: int) -> list[tuple[str, str]]:
    """A page of made-up studies, each of two views of noise round a bright spot, with three context studies."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:256, 0:256].astype(np.float32) / 256
    spots = [np.exp(-8 * ((x - a) ** 2 + (y - b) ** 2)) for a, b in rng.random((40, 2))]
    noise = rng.normal(0, 0.01, (8, 256, 256)).astype(np.float32)
    pairs = reports(count)

    def cards() -> Iterator[StudyCard]:
        for i, (reference, prediction) in enumerate(pairs):
            images = [spots[(i * k) % 40] + noise[i % 8] for k in (1, 3)]
            context = [ContextCard(f"t{i * k % 50}", "normal", spots[i * k % 40], "lungs are clear .", 0.5) for k in (1, 2, 3)]
            yield StudyCard(f"study-{i}", images, ["PA", "LL"], reference or "none", prediction, context=context)

    values = {"rouge-l": rng.random(count), "cider": rng.random(count) * 5}
    scores = Scores({name: Score(float(own.mean()), 0.1, 0.9, count) for name, own in values.items()})
    report_page(
        path, title="run", spec_yaml="", log=[], scores=scores, studies=cards(), facts={}, notes=[], values=values, count=count
    )
    return pairs


def first_paint(browser: Any) -> float:
    """Milliseconds from the start of loading to the first text that is seen."""
    return browser.until("performance.getEntriesByName('first-contentful-paint').map(entry => entry.startTime)")[0]


def test_a_reader_searches_filters_sorts_and_opens_studies(browser: Any, tmp_path: Path) -> None:
    pairs = write(tmp_path / "report.html", 200)
    browser.open(f"file://{tmp_path / 'report.html'}")
    assert first_paint(browser) < 2000
    assert browser.run(SHOWN) == 200 and browser.run("document.getElementById('tools').hidden") is False

    # Search, with the keyboard alone; what was hostile in the text is text.
    browser.press("/")
    browser.type("zebra")
    browser.until(f"{SHOWN} === 1 && {FILLED} === 1")
    assert "1 of 200" in browser.run("document.querySelector('output').value")
    assert browser.run("document.querySelector('#feed').innerText").count("</script><img src") == 1
    assert browser.run("document.title") == "run" and browser.run("CSS.highlights.get('found').size") >= 1
    assert browser.run("document.querySelector('#feed mark.missed').textContent") == "There is cardiomegaly."
    browser.press("Enter")
    assert browser.run("document.activeElement.dataset.study") == "7"
    browser.press("/")
    browser.press("Escape")
    browser.until(f"{SHOWN} === 200")
    assert browser.run("document.activeElement === document.body")

    # A number of the table of findings leads to its studies.
    browser.click('[data-finding="Pneumothorax"][data-kind="m"]')
    missed = [i for i, (reference, prediction) in enumerate(pairs) if "pneumo" in reference and "pneumo" not in prediction]
    browser.until(f"{SHOWN} === {len(missed)}")
    assert browser.run(ORDER) == missed
    browser.click("#tools [type=reset]")
    browser.until(f"{SHOWN} === 200")

    # Sorted, in both directions.
    browser.run("document.querySelector('[name=sort]').value = 'cider'")
    browser.run("document.querySelector('[name=sort]').dispatchEvent(new Event('input', {bubbles: true}))")
    values = browser.run("JSON.parse(document.getElementById('index').textContent).scores.cider")
    order = sorted(range(200), key=lambda i: values[i])
    browser.until(f"{ORDER}[0] === {order[0]}")
    assert browser.run(ORDER) == order
    browser.click("[name=order]")
    browser.until(f"{ORDER}[0] === {order[-1]}")
    assert browser.run("document.querySelector('#feed .sorted').dataset.score") == "cider"

    # A column of a histogram leads to its studies.
    browser.click('[data-score="rouge-l"] rect')
    count = browser.run("+document.querySelector('[data-score=\"rouge-l\"] rect').textContent.split(': ')[1]")
    browser.until(f"{SHOWN} === {count}")
    browser.click("[name=range]")
    browser.until(f"{SHOWN} === 200")

    # From study to study and into one, by keys.
    current = "document.activeElement.getAttribute('aria-posinset')"
    browser.run("scrollTo(0, 0)")
    for key, place in (("j", 1), ("j", 2), ("ArrowRight", 3), ("k", 2), ("ArrowLeft", 1), ("k", 1)):
        browser.press(key)
        assert int(browser.run(current)) == place, key
    assert browser.run("document.activeElement.matches(':focus-visible')")
    browser.press("Enter")
    opened = "document.querySelector('#opened[open] h3')?.textContent"
    first, second = (browser.run(f"JSON.parse(document.getElementById('index').textContent).ids[{ORDER}[{i}]]") for i in (0, 1))
    assert browser.until(opened) == first
    browser.until("[...document.querySelectorAll('#opened .picture > img')].length === 2")
    assert browser.run("[...document.querySelectorAll('#opened img')].every(image => image.complete && image.naturalWidth > 0)")
    assert "lungs are clear" in browser.run("document.querySelector('#opened .context').innerText")
    browser.press("j")
    assert browser.run(opened) == second and browser.run("location.hash") == f"#study={second}"
    browser.press("Escape")
    browser.until("!document.querySelector('#opened').open")
    assert int(browser.run(current)) == 2
    browser.press("?")
    assert browser.run("document.querySelector('dialog#keys').open")
    browser.press("Escape")

    # On paper stand the first ones, and the list is as it was afterwards.
    browser.run("scrollTo(0, document.body.scrollHeight)")
    browser.call("Page.printToPDF")
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert browser.run(FILLED) >= 48 and "first 48 of 200" in browser.run("document.querySelector('output').value")
    browser.run("dispatchEvent(new Event('afterprint'))")
    browser.until(f"{FILLED} < 30 && document.querySelector('output').value === '200 studies'")

    # Another reader opens the address that was copied.
    browser.open("about:blank")
    browser.open(f"file://{tmp_path / 'report.html'}#study={second}")
    assert browser.run(opened) == second


def test_without_scripts_the_tables_stand_and_what_is_missing_is_told(browser: Any, tmp_path: Path) -> None:
    write(tmp_path / "report.html", 20)
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(f"file://{tmp_path / 'report.html'}")
    seen = browser.run("document.body.innerText")
    assert "needs a script" in seen and "rouge-l" in seen and "Cardiomegaly" in seen and "Sort by" not in seen


@pytest.mark.slow
def test_3000_studies_are_there_at_once_and_never_all_in_the_page(browser: Any, tmp_path: Path) -> None:
    pairs = write(tmp_path / "report.html", 3000)
    assert (tmp_path / "report.html").stat().st_size < 60e6
    browser.open(f"file://{tmp_path / 'report.html'}")
    assert first_paint(browser) < 2000
    assert browser.run(SHOWN) == 3000
    # Wherever one goes by the scroll bar, cards come, and others go.
    for share in (0.2, 0.5, 0.93, 1, 0):
        browser.run("document.querySelector('#feed').scrollIntoView()")
        browser.run(f"scrollBy(0, {share} * document.querySelector('#feed').offsetHeight)")
        seen = "[200, 450, 700].map(y => document.elementFromPoint(650, y).closest('#feed article')).filter(a => a)"
        browser.until(f"{seen}.length && {seen}.every(article => 'filled' in article.dataset)", 2)
        assert browser.run(FILLED) < 40
    for text, expected in (("zebra", 1), ("pneumothorax", sum("pneumothorax" in " ".join(pair) for pair in pairs))):
        browser.run("document.querySelector('[type=reset]').click()")
        browser.press("/")
        start = time.monotonic()
        browser.type(text)
        browser.until(f"{SHOWN} === {expected}", 2)
        assert time.monotonic() - start < 2
        browser.press("Escape")
    for _ in range(30):
        browser.press("j")
    browser.press("Enter")
    assert browser.until("document.querySelector('#opened[open] h3')?.textContent").startswith("study-")
    assert browser.run("document.querySelector('#opened .place').textContent").endswith("of 3,000")
    assert browser.run("document.querySelectorAll('img').length") < 400
