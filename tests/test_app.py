"""The reading room as a reader has it: in Chromium, by mouse and keyboard."""

import base64
import io
import json
import os
import shutil
import socket
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from typer.testing import CliRunner

import medxray
from medxray import cli

pytest.importorskip("gradio", reason="pip install 'medxray[app]'")
playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright axe-playwright-python")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install playwright axe-playwright-python")

from medxray.app import launch  # noqa: E402
from medxray.app.door import Door  # noqa: E402
from medxray.app.reading import Reader, opened  # noqa: E402

CHROMIUM = shutil.which("chromium")
WIDE, NARROW = {"width": 1440, "height": 1000}, {"width": 390, "height": 844}
IDENTITY = ("Mustermann", "4711", "A99", "Weiß", "secret")
SHOTS = os.environ.get("MEDXRAY_SHOTS")
"""A folder that gets screenshots, for who wants to look at them."""


def serve(*pipelines: medxray.Pipeline) -> str:
    """The address of a room of its own."""
    said: Queue[str] = Queue()
    threading.Thread(target=launch, args=(pipelines,), kwargs={"port": 0, "say": said.put}, daemon=True).start()
    line = said.get(timeout=120)
    assert "research use only" in line
    return line.split()[2]


@pytest.fixture(scope="module")
def report(report_run: Path) -> medxray.Pipeline:
    return medxray.load(report_run)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, phantom: Path) -> Callable[..., medxray.Pipeline]:
    def fit(task: str, **more: Any) -> medxray.Pipeline:
        spec = {
            "task": task, "name": task, "output": str(tmp_path_factory.mktemp(task)),
            "data": {"image_size": 64, "reader": {"name": "csv", "root": str(phantom), "report": "findings"}, "max_studies": 24},
            "encoder": {"name": "vit", "width": 32, "depth": 1, "heads": 2, "patch": 8},
            "training": {"steps": 2, "batch_size": 8, "pictures": 0},
        } | more  # fmt: skip
        return medxray.build(spec).fit(progress=False)

    return fit


@pytest.fixture(scope="module")
def room(report: medxray.Pipeline) -> str:
    return serve(report)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine, so the room is not tried in a browser")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Opens a room; at the end nothing was loaded from elsewhere, and no error stands in the console."""
    wrong: list[str] = []
    contexts = []

    def open_page(address: str, size: dict[str, int] = WIDE, **options: Any) -> Any:
        context = chromium.new_context(viewport=size, accept_downloads=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        own = (address, "data:", "blob:")
        page.on("request", lambda request: None if request.url.startswith(own) else wrong.append(request.url))
        page.goto(address)
        page.wait_for_selector(".reading[data-model]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong, wrong


def drop(page: Any, *files: bytes, names: tuple[str, ...] = ("secret-frontal.dcm", "secret-lateral.dcm")) -> None:
    """Gives a study to the room, and waits for what comes of it."""
    page.evaluate("document.querySelector('.readings').dataset.old = 1")
    sent = [{"name": name, "mimeType": "application/dicom", "buffer": file} for name, file in zip(names, files, strict=False)]
    page.set_input_files("#files input[type=file]", sent)
    page.wait_for_selector(".readings:not([data-old]):not(:has([aria-busy]))")


def pixels(page: Any, view: int = 0) -> np.ndarray:
    """What a view's canvas holds, (h, w)."""
    page.wait_for_function(f"document.querySelectorAll('.view')[{view}].dataset.drawn === ''")
    page.wait_for_timeout(60)
    data = page.evaluate(f"document.querySelectorAll('.stage canvas')[{view}].toDataURL('image/png')")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data.split(",")[1]))).convert("L"), np.float32)


def picture(page: Any, view: int = 0) -> np.ndarray:
    """What a reader sees of a view, (h, w, 3)."""
    page.wait_for_timeout(250)
    shot = page.locator(".stage").nth(view).screenshot()
    return np.asarray(Image.open(io.BytesIO(shot)).convert("RGB"), np.float32)


def findings_of_axe(page: Any) -> list[str]:
    page.wait_for_timeout(400)
    found = axe.Axe().run(page).response["violations"]
    return [
        f"{one['id']}: {node['html'][:160]}" for one in found if one["impact"] in ("serious", "critical") for node in one["nodes"]
    ]


def shoot(page: Any, name: str) -> None:
    if SHOTS:
        page.wait_for_timeout(500)
        page.screenshot(path=f"{SHOTS}/{name}.png", full_page=True)


def test_a_study_is_read(
    visit: Callable[..., Any], room: str, report: medxray.Pipeline, radiograph: Callable[..., bytes], tmp_path: Path
) -> None:
    page = visit(room)
    assert page.locator(".view").count() == 2, "an example is there at once"
    shoot(page, "report-1440")
    drop(page, radiograph(2, ViewPosition="LL"), radiograph(1))
    views = [radiograph(1), radiograph(2, ViewPosition="LL")]
    said = report.predict({"images": views, "study_id": "study"})
    assert [text.split()[0] for text in page.locator(".view figcaption").all_inner_texts()] == ["Frontal,", "Lateral"]
    assert page.locator(".report").inner_text().split() == said.text.split()
    shown = page.eval_on_selector_all(".word", "words => words.map(word => [word.textContent, word.title])")
    assert shown == [[word.text, f"{word.probability:.0%}"] for word in said.words]

    # Where it looked: over both views, by mouse and by keyboard.
    rest = [picture(page, view) for view in (0, 1)]
    sentences = page.locator(".sentence")
    sentences.first.hover()
    looked = [picture(page, view) for view in (0, 1)]
    assert all(np.abs(a - b).max() > 20 for a, b in zip(rest, looked, strict=True)) and page.locator(".heat.on").count() == 2
    assert "on average" in page.locator(".readout").inner_text()
    page.mouse.move(5, 5)
    assert np.array_equal(picture(page), rest[0])
    sentences.first.focus()
    assert page.locator(".heat.on").count() == 2
    page.keyboard.press("Enter")
    page.locator("h1").click()
    assert sentences.first.get_attribute("aria-pressed") == "true" and page.locator(".heat.on").count() == 2
    sentences.first.press("Enter")

    # The training studies that it was given.
    cards, first = page.locator(".context li"), said.context["positive"][0]
    assert cards.count() == 3
    cards.first.locator("summary").click()
    assert cards.first.locator("p").inner_text() == report.task.bank.report(first)
    assert cards.first.locator("img").evaluate("image => image.complete && image.naturalWidth > 30")
    assert f"distance {1 - said.similarity['positive'][0]:.3f}" in cards.first.inner_text()

    # Window and level.
    window, level = (page.get_by_role("slider", name=name) for name in ("Window", "Level"))
    whole = medxray.data.read_image(views[0])[0]
    assert pixels(page).shape == whole.shape and np.abs(pixels(page) - 255 * whole).max() <= 1
    window.fill("20")
    level.fill("40")
    wanted = (255 * ((whole - 0.3) / 0.2)).clip(0, 255)
    assert np.abs(pixels(page) - wanted).max() <= 2
    page.get_by_role("button", name="Invert").click()
    assert np.abs(pixels(page) - (255 - wanted)).max() <= 2
    page.get_by_role("button", name="Reset").click()
    assert np.abs(pixels(page) - 255 * whole).max() <= 1
    box = page.locator(".stage").first.bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 100)
    page.mouse.down()
    page.mouse.move(box["x"] + 60, box["y"] + 150)
    page.mouse.up()
    assert float(window.input_value()) < 100 and float(level.input_value()) > 50
    page.locator(".stage").first.press("r")
    page.mouse.wheel(0, -300)
    assert not np.array_equal(picture(page), rest[0])
    page.locator(".stage").first.press("r")
    assert np.array_equal(picture(page), rest[0])

    # The draft.
    page.get_by_label("Draft").fill("No effusion.")
    for kind in ("text", "JSON"):
        with page.expect_download() as download:
            page.get_by_role("button", name=f"Save {kind}").click()
        download.value.save_as(tmp_path / kind)
    kept = json.loads((tmp_path / "JSON").read_text())
    assert kept["draft"] == "No effusion." and kept["edited"] is True and kept["generated"] == said.text
    assert (tmp_path / "text").read_text().startswith("No effusion.\n")
    assert not any(name in (tmp_path / kind).read_text() for kind in ("text", "JSON") for name in IDENTITY)
    left = [file for folder in Path(tempfile.gettempdir()).glob("medxray-*") for file in folder.rglob("*")]
    assert not [file for file in left if "secret" in file.name or (file.is_file() and file.stat().st_size)]
    assert findings_of_axe(page) == []


def test_what_cannot_be_read_is_told_and_the_page_goes_on(
    visit: Callable[..., Any], room: str, radiograph: Callable[..., bytes]
) -> None:
    page = visit(room, NARROW)
    shoot(page, "report-390")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    wrong = page.locator(".failed")
    for files, message in (
        ((radiograph(1)[:3000],), "secret-frontal.dcm: PixelData holds"),
        ((b"no image at all",), "secret-frontal.dcm: not an image"),
        ((radiograph(1), radiograph(2, PatientID="other")), "files of 2 patients"),
    ):
        drop(page, *files)
        assert message in wrong.inner_text() and "Traceback" not in wrong.inner_text()
        assert page.locator(".view").count() == 0, "no pictures of another study beside it"
    shoot(page, "failed-390")
    assert findings_of_axe(page) == []
    drop(page, radiograph(1))
    assert page.locator(".view").count() == 1 and len(page.locator(".report").inner_text()) > 20
    page.get_by_role("button", name="Cardiomegaly").click()
    page.wait_for_selector(".hint:has-text('Cardiomegaly')")
    assert page.locator(".view").count() == 2


def test_two_models_side_by_side_one_of_which_classifies(
    visit: Callable[..., Any], report: medxray.Pipeline, fitted: Callable[..., medxray.Pipeline], radiograph: Callable[..., bytes]
) -> None:
    classify = fitted("classify")
    page = visit(serve(report, classify), color_scheme="dark")
    shoot(page, "two-1440-dark")
    drop(page, radiograph(1))
    boxes = [one.bounding_box() for one in page.locator(".reading").all()]
    assert len(boxes) == 2 and boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    scores = classify.predict({"images": [radiograph(1)], "study_id": "study"}).scores
    wanted = [[name, f"{value:.0%}"] for name, value in sorted(scores.items(), key=lambda score: -score[1])]
    rows = page.locator(".bars tbody tr").all()
    assert [[row.locator("th").inner_text(), row.locator("td").last.inner_text()] for row in rows] == wanted
    page.locator(".sentence").first.hover()
    assert page.locator(".heat.on").count() == 1
    assert findings_of_axe(page) == []
    page.set_viewport_size(NARROW)
    shoot(page, "two-390-dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_pre_trained_model_shows_what_it_predicts_and_where_the_chest_is(
    visit: Callable[..., Any], fitted: Callable[..., medxray.Pipeline]
) -> None:
    model = fitted("pretrain", masker={"name": "random", "ratio": 0.5}, pixel_decoder={"name": "self-attention", "dim": 32,
                   "depth": 1, "heads": 2})  # fmt: skip
    page = visit(serve(model))
    shoot(page, "pretrain-1440")
    captions = ["image", "contour", "visible tokens", "reconstruction", "error"]
    assert page.locator(".steps figcaption").all_inner_texts() == 2 * captions
    kept = []
    for image in page.locator(".steps img").all():
        kept.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(image.get_attribute("src").split(",")[1]))).convert("RGB")))
    assert len({one.tobytes() for one in kept}) == 10, "each is a picture of its own"
    orange = (kept[1][..., 0].astype(int) - kept[1][..., 2] > 120).mean()
    assert 0.002 < orange < 0.2, "a line round the chest"
    errors = [float(text.split()[-1]) for text in page.locator(".reading h3").all_inner_texts()]
    assert len(set(errors)) == 2 and min(errors) > 0
    assert findings_of_axe(page) == []


def test_only_this_machine_is_answered(room: str) -> None:
    def status(**headers: str) -> int:
        try:
            return urllib.request.urlopen(urllib.request.Request(room, headers=headers)).status
        except urllib.error.HTTPError as error:
            return error.code

    assert status() == 200 and status(Host="attacker.example") == 403
    client = TestClient(Door(PlainTextResponse("inside"), "a token"), base_url="http://hospital.example")
    answers = [client.get("/", auth=auth) for auth in (None, ("anyone", "a tokem"), ("anyone", "a token"))]
    assert [answer.status_code for answer in answers] == [401, 401, 200] and answers[2].text == "inside"
    assert answers[0].headers["www-authenticate"].startswith("Basic")
    assert client.get("/", headers={"Authorization": "Basic not base64"}).status_code == 401


def test_the_part_that_the_model_sees(report: medxray.Pipeline, radiograph: Callable[..., bytes]) -> None:
    """A padded image lies inside of the model's square; a stretched one fills it."""
    study = opened([("a.dcm", radiograph(1))], [report.spec.data])
    assert Reader("a", report)(study).frames == [(0, 0, 1, 1)]
    from medxray.app.reading import _frame

    padded = report.spec.data.model_copy(update={"fit": "pad"})
    top, left, height, width = _frame(study.views[0].pixels, padded)
    # Of 96 x 80 pixels.
    assert (top, height) == (0, 1) and left == pytest.approx(-0.1) and width == pytest.approx(1.2)


def test_mistakes_end_with_one_message(report_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def message(*arguments: object) -> str:
        result = CliRunner().invoke(cli.app, ["app", *map(str, arguments)])
        assert result.exit_code == 2 and "Traceback" not in result.output, result.output
        return result.stderr

    assert "no run folder" in message(tmp_path / "a" / "b")
    assert "is not a finished run" in message(tmp_path)
    assert "expected one, or two" in message(report_run, report_run, report_run)
    assert "can be reached by others" in message(report_run, "--host", "0.0.0.0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}: cannot listen there" in message(report_run, "--port", port)
    for name in [name for name in sys.modules if name.startswith("medxray.app")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(medxray, "app")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "gradio is missing; install what the app needs: pip install 'medxray[app]'" in message(report_run)
