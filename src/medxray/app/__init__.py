"""A reading room in the browser: studies are dropped, one or two fitted runs read them, side by side.

Nothing is loaded from elsewhere and nothing of a study is kept: a file lies on disk from its upload until it is decoded.
"""

import logging
import os
import shutil
import socket
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import gradio
import uvicorn
from fastapi import FastAPI

from medxray.app.door import Door
from medxray.app.page import card_of, failure, header, no_viewer, readings, viewer, waiting
from medxray.app.reading import MAX_FILES, Reader, Reading, Study, examples, opened
from medxray.loopback import is_loopback
from medxray.pipeline import Pipeline
from medxray.types import MedxrayError, RunError

LOG = logging.getLogger("medxray.app")
MAX_BYTES = 64 * 2**20
"""Of a file."""

MODELS = 2
TOKEN = "MEDXRAY_TOKEN"

_DROP = "Drop the views of one study: DICOM, PNG or JPEG"


class Room:
    """The models, the examples, and what is said of them.

    Args:
        pipelines: fitted, one or two.

    Raises:
        RunError: none, or more.
    """

    def __init__(self, pipelines: Sequence[Pipeline]) -> None:
        if not 0 < len(pipelines) <= MODELS:
            raise RunError(f"{len(pipelines)} runs; expected one, or two that are read side by side")
        names = [pipeline.spec.name for pipeline in pipelines]
        if len(set(names)) < len(names):
            names = [f"{name} ({pipeline.folder.name})" for name, pipeline in zip(names, pipelines, strict=True)]
        self.names = names
        self.readers = [Reader(name, pipeline) for name, pipeline in zip(names, pipelines, strict=True)]
        self.examples = examples()
        self._read: dict[int, list[Reading]] = {}
        self._busy = threading.Lock()

    def open(self, files: Sequence[str] | None) -> Iterator[tuple[Any, Any]]:
        """Files as gradio has stored them -> the pages of views and readings, as they come. The files are gone then."""
        if not files:
            yield gradio.skip(), gradio.skip()
            return
        try:
            data = [reader.pipeline.spec.data for reader in self.readers]
            # Too many are not read at all.
            study = opened([(Path(file).name, _taken(file)) for file in files[: MAX_FILES + 1]], data)
        except Exception as error:
            yield no_viewer(), _failed(error)
            return
        finally:
            for file in files:
                shutil.rmtree(Path(file).parent, ignore_errors=True)
        yield from self._said(study, None)

    def example(self, place: int) -> Iterator[tuple[Any, Any]]:
        """A drawn study -> the pages of views and readings."""
        return self._said(self.examples[place], place)

    def _said(self, study: Study, place: int | None) -> Iterator[tuple[Any, Any]]:
        found = self._read.get(place) if place is not None else None
        yield viewer(study), waiting(self.names) if found is None else readings(found)
        if found is not None:
            return
        try:
            with self._busy:
                found = [reader(study) for reader in self.readers]
        except Exception as error:
            yield gradio.skip(), _failed(error)
            return
        if place is not None:
            self._read[place] = found
        yield gradio.skip(), readings(found)


def _taken(file: str) -> bytes:
    if Path(file).stat().st_size > MAX_BYTES:
        raise RunError(f"{Path(file).name}: more than {MAX_BYTES // 2**20} MiB; expected a radiograph")
    return Path(file).read_bytes()


def _failed(error: Exception) -> str:
    """A mistake in what was given, told to whom it concerns; or a fault of ours, whose place the log has."""
    if isinstance(error, MedxrayError):
        return failure("This study cannot be read", str(error), "Nothing was kept. Drop other files, or choose an example.")
    # Its message might repeat what a file says.
    place = traceback.extract_tb(error.__traceback__)[-1]
    LOG.error("%s in %s, line %d", type(error).__name__, place.filename, place.lineno or 0)
    return failure("The reading failed", f"{type(error).__name__}; the log of medxray app tells where. The page goes on.")


def page(room: Room) -> gradio.Blocks:
    """The page as gradio has it."""
    with gradio.Blocks(title="Reading room", analytics_enabled=False, fill_width=True) as blocks:
        gradio.HTML(header(room.names), elem_id="top", apply_default_css=False, js_on_load=None)
        with gradio.Row(elem_id="intake"):
            files = gradio.File(label=_DROP, file_count="multiple", show_label=False, elem_id="files", scale=3)
            cases = [
                gradio.Button(study.title, elem_id=f"case-{i}", elem_classes="case", min_width=120)
                for i, study in enumerate(room.examples)
            ]
        with gradio.Row(elem_id="desk"):
            views, said = (
                gradio.HTML(name, elem_id=part, apply_default_css=False, js_on_load=None)
                for part, name in (("views", ""), ("said", waiting(room.names)))
            )
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        files.upload(room.open, files, [views, said], **quiet)
        # The place to drop is free again at once.
        files.upload(lambda: None, None, files, queue=False, **quiet)
        for i, case in enumerate(cases):
            case.click(_of(room, i), None, [views, said], **quiet)
        blocks.load(_of(room, 0), None, [views, said], **quiet)
    return blocks


def _of(room: Room, place: int) -> Callable[[], Iterator[tuple[Any, Any]]]:
    def read() -> Iterator[tuple[Any, Any]]:
        yield from room.example(place)

    return read


def application(pipelines: Sequence[Pipeline], folder: Path, *, token: str | None = None) -> FastAPI:
    """The room as an ASGI application.

    Args:
        pipelines: fitted, one or two, the left one first.
        folder: where an upload lies until it is decoded.
        token: the password that a browser must give, by any name; without it only requests to a loopback address are answered.

    Raises:
        RunError: no run, or more than two.
    """
    room = Room(pipelines)
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    app = FastAPI(
        docs_url=None, redoc_url=None, openapi_url=None, telemetry={"tracing": False, "operation_spans": False, "logs": False}
    )
    app.add_middleware(Door, token=token)
    fonts = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
    mono = ("ui-monospace", "Menlo", "Consolas", "monospace")
    shade = "linear-gradient(transparent 30%, rgb(0 0 0 / .82))"
    pictures = [f"#case-{i} {{ background-image: {shade}, url({card_of(study)}); }}" for i, study in enumerate(room.examples)]
    return gradio.mount_gradio_app(
        app, page(room), "/", footer_links=[], run_history=False, show_error=False, max_file_size=MAX_BYTES, ssr_mode=False,
        pwa=False, mcp_server=False, enable_monitoring=False, theme=gradio.themes.Base(font=fonts, font_mono=mono),
        css=_file("room.css") + "".join(pictures), head=f"<script>{_file('room.js')}</script>",
    )  # fmt: skip


def _file(name: str) -> str:
    return resources.files("medxray.app").joinpath(name).read_text(encoding="utf-8")


def launch(
    pipelines: Sequence[Pipeline],
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    token: str | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Opens the room until it is stopped.

    Args:
        pipelines: fitted, one or two.
        host, port: where it listens; port 0 takes a free one.
        token: the password; it has to be given for a host that other machines reach.
        say: is told where it listens.

    Raises:
        RunError: no token though others can reach the host, or the port cannot be had.
    """
    if token is None and not is_loopback(host):
        raise RunError(f"--host {host} can be reached by others: name a password too, by {TOKEN}")
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise RunError(f"{host}:{port}: cannot listen there ({error.strerror}); name another --port") from None
    # Warnings of the libraries below quote what a file says.
    warnings.simplefilter("ignore")
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    with listening, tempfile.TemporaryDirectory(prefix="medxray-") as folder:
        app = application(pipelines, Path(folder), token=token)
        place, number = listening.getsockname()[:2]
        where = f"[{place}]" if ":" in place else place
        say(f"reading room: http://{where}:{number} (research use only; stop it by Ctrl+C)")
        config = uvicorn.Config(
            app, log_level="error", access_log=False, ws="none", server_header=False, timeout_graceful_shutdown=2
        )
        uvicorn.Server(config).run([listening])
