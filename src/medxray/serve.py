"""A fitted run as a service: reports and features over HTTP. Studies that wait are joined into batches.

What a client sends is never logged: neither names of files nor anything that DICOM tells.
"""

import asyncio
import functools
import hmac
import io
import ipaddress
import json
import logging
import math
import os
import queue
import secrets
import socket
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path, PurePath
from typing import Annotated, Any
from urllib.parse import urlsplit

import h11
import numpy as np
import python_multipart  # noqa: F401  starlette reads forms by it
import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from medxray.data import Sample
from medxray.outputs import check_format, row, study_headers, version
from medxray.outputs.dicom_sr import structured_report
from medxray.outputs.fhir import diagnostic_report
from medxray.pipeline import Pipeline
from medxray.spec import Spec
from medxray.types import DataError, MedxrayError, Prediction, RunError
from medxray.visual.page import write_page

LOG = logging.getLogger("medxray.serve")
TOKEN = "MEDXRAY_TOKEN"
LEAST_TOKEN = 16
"""Characters that a token has at least."""

_OPEN = ("/", "/v1/health", "/openapi.json")
_POSTS = ("/v1/reports", "/v1/features")
_KNOWN = (*_OPEN, *_POSTS, "/v1/model")
_JSON, _FHIR, _DICOM, _NPY = "application/json", "application/fhir+json", "application/dicom", "application/x-npy"
_DICOM_JSON = "application/dicom+json"
_DRAINED = 2**23
"""Bytes of a refused body up to which they are read and dropped; above, the connection is closed, and a client that is
still sending may miss the answer."""


@dataclass(frozen=True)
class Limits:
    """What a service takes.

    Attributes:
        max_body: bytes of a request.
        max_files: files of a request.
        max_batch: studies that the model runs at once.
        max_wait_ms: how long a study waits for others while the model is idle.
        queue: requests that are accepted and not yet answered; more are refused with 503. Their bodies wait in temporary
            files, so that the disk holds `queue` x `max_body` at most.
        timeout: seconds for a client to send its request, and again for the answer.
        header_timeout: seconds for a client to send the head of a request.
        readers: threads that decode images.
    """

    max_body: int = 64 * 2**20
    max_files: int = 8
    max_batch: int = 16
    max_wait_ms: float = 20
    queue: int = 64
    timeout: float = 60
    header_timeout: float = 10
    readers: int = 2


class Refusal(Exception):
    """A request that is not answered, and why."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, {k.replace("_", "-"): v for k, v in headers.items()}

    def response(self) -> JSONResponse:
        return JSONResponse({"error": {"code": self.code, "message": str(self)}}, self.status, self.headers)


class Batcher:
    """Joins studies that wait into batches, which one thread runs.

    Args:
        run: kind of work and its studies -> a result each.
        most: studies of a batch.
        wait: seconds that a study waits for others while nothing runs; while something does, they gather anyway.
    """

    def __init__(self, run: Callable[[str, list[Sample]], Sequence[Any]], most: int, wait: float) -> None:
        self._run, self._most, self._wait = run, most, wait
        self._queue: queue.SimpleQueue[tuple[str, Sample, Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    async def __call__(self, kind: str, sample: Sample) -> Any:
        """The result of one study; one that is cancelled while it waits is never run."""
        future: Future[Any] = Future()
        self._queue.put((kind, sample, future))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Ends the thread once what was asked is done."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        going = True
        while going:
            batch: list[tuple[str, Sample, Future[Any]]] = []
            until = math.inf
            while len(batch) < self._most:
                try:
                    item = self._queue.get(timeout=max(0.0, until - time.monotonic()) if batch else None)
                except queue.Empty:
                    break
                if item is None:
                    going = False
                    break
                if item[2].set_running_or_notify_cancel():
                    batch.append(item)
                    until = min(until, time.monotonic() + self._wait)
            for kind in dict.fromkeys(kind for kind, _, _ in batch):
                self._answer(kind, [(sample, future) for own, sample, future in batch if own == kind])

    def _answer(self, kind: str, batch: list[tuple[Sample, Future[Any]]]) -> None:
        try:
            results = self._run(kind, [sample for sample, _ in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0][1].set_exception(error)
                return
            # One study must not take the others with it.
            for one in batch:
                self._answer(kind, [one])
            return
        for (_, future), result in zip(batch, results, strict=True):
            future.set_result(result)


class Service:
    """What all requests share.

    Args:
        pipeline: fitted.
        token: that requests must bear; none if None.
        limits: what is taken.

    Attributes:
        accepted: requests that were accepted and are not answered yet.
        stopping: set once a stop was asked for; new requests are refused.
    """

    def __init__(self, pipeline: Pipeline, token: str | None, limits: Limits) -> None:
        self.pipeline, self.token, self.limits = pipeline, token, limits
        self.name = pipeline.spec.name
        self.accepted = 0
        self.stopping = False
        self.readers = ThreadPoolExecutor(limits.readers, "reader")
        self.batcher = Batcher(self._run, limits.max_batch, limits.max_wait_ms / 1000)

    def _run(self, kind: str, samples: list[Sample]) -> Sequence[Any]:
        if kind == "features":
            return list(self.pipeline.features(samples))
        return self.pipeline.predict(samples)

    async def work(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Runs a function where it keeps no other request waiting."""
        return await asyncio.get_running_loop().run_in_executor(self.readers, function, *arguments)

    def close(self) -> None:
        self.batcher.close()
        self.readers.shutdown()

    def read(self, study: "_Study") -> Sample:
        """Decodes a study; files of two patients are refused, whatever is asked of them."""
        images = [part() for part in study.parts]
        names = [f"file {i + 1}" for i in range(len(images))]
        sample = self.pipeline.read([{"images": images, "study_id": study.name, "names": names}])[0]
        # Views that the model has no place for are left out, but not taken unseen.
        for i in range(len(sample.pixels), len(images)):
            self.pipeline.read([{"images": images[i : i + 1], "names": names[i : i + 1]}])
        study_headers(images)
        return sample

    def refuse(self, scope: Scope) -> Refusal | None:
        """Why a request is refused before its body is read."""
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        path, limits = scope["path"], self.limits
        if self.token is None and not _is_loopback(headers.get("host", "")):
            return Refusal(403, "host", "without a token only requests to this machine's own address are answered")
        if self.token is not None and path not in _OPEN:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode("latin-1"), self.token.encode())
            if scheme.lower() != "bearer" or not right:
                return Refusal(401, "token", "expected the header Authorization: Bearer TOKEN", WWW_Authenticate="Bearer")
        if scope["method"] != "POST" or path not in _POSTS:
            return None
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > limits.max_body:
            return _too_large(limits.max_body)
        if self.stopping:
            return Refusal(503, "stopping", "the service is being stopped; ask again later", Retry_After="5")
        if self.accepted >= limits.queue:
            return Refusal(503, "busy", f"{self.accepted} requests wait already; ask again later", Retry_After="1")
        return None


@dataclass
class _Study:
    """A study as it was sent: its name, and what gives the bytes of each file."""

    name: str
    parts: list[Callable[[], bytes]]


class Gate:
    """Stands before the application: refuses, limits, logs.

    Args:
        app: answers.
        service: decides.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        service, limits = self.service, self.service.limits
        started, name = time.monotonic(), secrets.token_hex(8)
        status = size = 0
        whole = False
        until = started + limits.timeout

        async def bounded() -> Message:
            nonlocal size, whole
            if whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, until - time.monotonic()))
            except TimeoutError:
                raise Refusal(408, "slow", f"the request was not there within {limits.timeout:g} seconds") from None
            if message["type"] == "http.disconnect":
                raise Refusal(400, "cut", "the connection ended before the request did")
            size += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if size > limits.max_body:
                raise _too_large(limits.max_body)
            return message

        async def answering(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [(b"x-request-id", name.encode())]
                if not whole and _long(scope):
                    own.append((b"connection", b"close"))
                message = {**message, "headers": [*message.get("headers", []), *own]}
            await send(message)

        refusal = service.refuse(scope)
        accepted = refusal is None and scope["method"] == "POST" and scope["path"] in _POSTS
        service.accepted += accepted
        try:
            if refusal is not None:
                await refusal.response()(scope, bounded, answering)
            else:
                await self.app(scope, bounded, answering)
        except Exception as error:
            # Its message might repeat what a client sent.
            place = traceback.extract_tb(error.__traceback__)[-1]
            LOG.error("%s failed: %s in %s, line %d", name, type(error).__name__, place.filename, place.lineno or 0)
            if not status:
                failure = Refusal(500, "service", f"the service failed; its log tells where, by {name}")
                await failure.response()(scope, bounded, answering)
        finally:
            service.accepted -= accepted
            path = scope["path"] if scope["path"] in _KNOWN else "(unknown path)"
            method = scope["method"] if scope["method"] in ("GET", "POST", "HEAD") else "(method)"
            took = 1000 * (time.monotonic() - started)
            LOG.info("%s %s %d %.0f ms %d bytes %s", method, path, status, took, size, name)


def application(pipeline: Pipeline, *, token: str | None = None, limits: Limits | None = None) -> FastAPI:
    """The service of a fitted pipeline as an ASGI application, for a server of one's own.

    Args:
        pipeline: fitted.
        token: that requests must bear; without one only requests to a loopback address are answered.
        limits: what is taken.

    Raises:
        RunError: the pipeline is not fitted, or the token is too short to be one.
    """
    if token is not None and len(token) < LEAST_TOKEN:
        raise RunError(f"a token of {len(token)} characters can be guessed; expected {LEAST_TOKEN} or more: openssl rand -hex 32")
    limits = limits or Limits()
    service = Service(pipeline, token, limits)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> Any:
        # The first pass compiles, and shows that the model runs here.
        await service.work(lambda: pipeline.predict([np.zeros((64, 64), np.float32)]))
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title=f"medxray: {service.name}", version=version(), lifespan=lifespan, docs_url=None, redoc_url=None,
        description="Research use only. Not a medical device.",
        # Newer versions offer both to OpenTelemetry; spans hold queries, and logs the messages of exceptions.
        telemetry={"tracing": False, "operation_spans": False, "logs": False},
    )  # fmt: skip
    app.state.service = service
    app.add_middleware(Gate, service=service)
    body = _body(limits)

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> Response:
        return error.response()

    @app.exception_handler(MedxrayError)
    async def mistaken(request: Request, error: MedxrayError) -> Response:
        sent = isinstance(error, DataError)
        return Refusal(422 if sent else 500, "study" if sent else "service", str(error)).response()

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        many = error.status_code == 400 and "Too many" in str(error.detail)
        message = f"more than {limits.max_files} files" if many else str(error.detail)
        return Refusal(413 if many else error.status_code, "request", message).response()

    @app.post("/v1/reports", summary="The report, or the probabilities, of one study", openapi_extra=body, responses=_answers(
        {_JSON: {"schema": {"type": "object"}}, _FHIR: {"schema": {"type": "object"}}, _DICOM: {}}
    ))  # fmt: skip
    async def reports(request: Request, kind: Annotated[str, Depends(_accepts(_JSON, _FHIR, _DICOM))]) -> Response:
        """As JSON the fields of a prediction; by the header Accept a FHIR R4 DiagnosticReport, or a DICOM structured report,
        which needs DICOM files and carries their patient's identity."""
        if kind != _JSON:
            check_format("fhir" if kind == _FHIR else "dicom-sr", pipeline.spec.task)
        async with _study_of(request, service) as study:
            prediction = await _answered(service, "reports", study)
            return await service.work(_said, kind, prediction, study, service.name)  # type: ignore[no-any-return]

    @app.post("/v1/features", summary="The encoder's pooled vector of one study", openapi_extra=body, responses=_answers(
        {_JSON: {"schema": {"type": "object"}}, _NPY: {}}
    ))  # fmt: skip
    async def features(request: Request, kind: Annotated[str, Depends(_accepts(_JSON, _NPY))]) -> Response:
        """The mean over the views, as JSON or, by the header Accept, as a float32 vector in NumPy's format."""
        async with _study_of(request, service) as study:
            vector: np.ndarray = await _answered(service, "features", study)
            if kind == _JSON:
                return JSONResponse({"study_id": study.name, "features": vector.tolist()})
            file = io.BytesIO()
            np.save(file, vector)
            return Response(file.getvalue(), media_type=_NPY)

    @app.get("/v1/health", summary="Whether the service takes requests")
    async def health() -> JSONResponse:
        state = "stopping" if service.stopping else "ok"
        return JSONResponse({"status": state, "accepted": service.accepted}, 503 if service.stopping else 200)

    @app.get("/v1/model", summary="What answers, and what it takes")
    async def model() -> dict[str, Any]:
        spec, task = pipeline.spec, pipeline.task
        return {
            "name": service.name, "task": spec.task, "labels": task.labels, "views": task.views,
            "image_size": spec.data.image_size, "max_pixels": spec.data.max_pixels, "features": task.encoder.width,
            "medxray": version(), "limits": asdict(limits), "notice": "Research use only. Not a medical device.",
        }  # fmt: skip

    page = _page(app, limits)

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page)

    return app


def serve(
    pipeline: Pipeline,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    limits: Limits | None = None,
    max_pixels: int | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Answers until it is stopped. SIGTERM and SIGINT finish what was accepted and refuse what is new; a second one ends at
    once.

    Args:
        pipeline: fitted.
        host, port: where it listens; port 0 takes a free one.
        token: that requests must bear; it has to be given for a host that other machines reach.
        limits: what is taken.
        max_pixels: of an image; `data.max_pixels` of the run if None.
        say: is told where it listens.

    Raises:
        RunError: no token though others can reach the host, or the port cannot be had.
    """
    if token is None and not _is_loopback(host):
        raise RunError(f"--host {host} can be reached by others: name a token too, by {TOKEN} or --token-file")
    if max_pixels is not None:
        pipeline.spec = Spec.read(pipeline.spec, {"data": {"max_pixels": max_pixels}})
    limits = limits or Limits()
    app = application(pipeline, token=token, limits=limits)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise RunError(f"{host}:{port}: cannot listen there ({error.strerror}); name another --port or --host") from None
    # Warnings of the libraries below quote what a file says.
    warnings.simplefilter("ignore")
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    config = uvicorn.Config(
        app, http=_Protocol, ws="none", lifespan="on", access_log=False, log_config=None, server_header=False,
        timeout_keep_alive=int(limits.header_timeout) or 1,
    )  # fmt: skip
    _Server(config, app.state.service, lambda: say(_greeting(listening, pipeline.spec.name, token))).run([listening])


def find_token(token: str | None, file: Path | None) -> str | None:
    """The token of an option, else of a file, else of the environment; None where there is none.

    Raises:
        RunError: the file cannot be read, or holds nothing.
    """
    if token is None and file is not None:
        try:
            token = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"--token-file {file} cannot be read ({getattr(error, 'strerror', '') or 'no text'})") from None
        if not token:
            raise RunError(f"--token-file {file} is empty; fill it: openssl rand -hex 32 > {file}")
    return token or os.environ.get(TOKEN, "").strip() or None


class _Server(uvicorn.Server):
    """Stops gracefully: goes on listening, to refuse, until all that was accepted is answered."""

    def __init__(self, config: uvicorn.Config, service: Service, started: Callable[[], None]) -> None:
        super().__init__(config)
        self.service, self.told = service, started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.told()

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self.service.stopping:
            # What is given up now fails, which needs no traceback.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            self.should_exit = self.force_exit = True
        self.service.stopping = True

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or (self.service.stopping and not self.service.accepted)


class _Protocol(H11Protocol):
    """HTTP/1.1 that waits no longer for the head of a request than between two requests, and whose errors are JSON."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        # Waited for: a head, or the rest of a body whose refusal was answered.
        refused = self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE
        if self.conn.their_state is not h11.IDLE and not refused:
            self._unwatch()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.timeout_keep_alive, self.transport.close)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def send_400_response(self, msg: str) -> None:
        body = json.dumps({"error": {"code": "request", "message": msg}}).encode()
        headers = [("content-type", _JSON), ("content-length", str(len(body))), ("connection", "close")]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def _accepts(*kinds: str) -> Callable[[Request], str]:
    """The first of `kinds` that the header Accept likes best (RFC 9110, 12.5.1)."""

    def choose(request: Request) -> str:
        liked: dict[str, float] = {}
        for part in request.headers.get("accept", "*/*").lower().split(","):
            name, *parameters = (piece.strip() for piece in part.split(";"))
            weights = [piece[2:] for piece in parameters if piece.startswith("q=")]
            try:
                liked[name] = float(weights[0]) if weights else 1.0
            except ValueError:
                liked[name] = 0.0

        def weight(kind: str) -> float:
            return next((liked[name] for name in (kind, f"{kind.split('/')[0]}/*", "*/*") if name in liked), 0.0)

        best = max(kinds, key=weight)
        if weight(best) <= 0:
            raise Refusal(406, "accept", f"expected Accept to have one of {', '.join(kinds)}")
        return best

    return choose


@asynccontextmanager
async def _study_of(request: Request, service: Service) -> Any:
    """The study of a request, whose files are open as long as it lasts."""
    limits, kind = service.limits, request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == _DICOM_JSON:
        content = await request.body()
        files = await service.work(_from_dicom_json, content, limits.max_files)
        yield _Study("study", [functools.partial(bytes, file) for file in files])
        return
    if kind != "multipart/form-data":
        raise Refusal(415, "content", f"expected multipart/form-data with files of one study, or {_DICOM_JSON}")
    async with request.form(max_files=limits.max_files, max_fields=8) as form:
        files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        if not files:
            raise Refusal(422, "study", "no file; expected the views of one study as files of the form, frontal first")
        name = form.get("study_id")
        name = name if isinstance(name, str) and name else PurePath(files[0].filename or "").stem or "study"

        yield _Study(name[:200], [functools.partial(_content, file) for file in files])


def _content(file: UploadFile) -> bytes:
    file.file.seek(0)
    return file.file.read()


async def _answered(service: Service, kind: str, study: _Study) -> Any:
    seconds = service.limits.timeout
    try:
        async with asyncio.timeout(seconds):
            return await service.batcher(kind, await service.work(service.read, study))
    except TimeoutError:
        raise Refusal(504, "time", f"no answer within {seconds:g} seconds; ask again later") from None


def _said(kind: str, prediction: Prediction, study: _Study, model: str) -> Response:
    if kind == _JSON:
        return JSONResponse(row(prediction))
    images = [part() for part in study.parts]
    if kind == _FHIR:
        return JSONResponse(diagnostic_report(prediction, images, model=model), media_type=_FHIR)
    return Response(structured_report(prediction, images, model=model), media_type=_DICOM)


def _from_dicom_json(content: bytes, most: int) -> list[bytes]:
    """DICOM files out of the DICOM JSON model (PS3.18 F), whose pixels stand in it, in native little endian."""
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian

    try:
        items = json.loads(content)
        items = items if isinstance(items, list) else [items]
        if len(items) > most:
            raise Refusal(413, "request", f"more than {most} files")
        files = []
        for i, item in enumerate(items):
            if "InlineBinary" not in item.get("7FE00010", {}):
                raise Refusal(
                    422, "study", f"file {i + 1}: DICOM JSON without pixels; put them into 7FE00010 as InlineBinary, since a "
                    "BulkDataURI is not fetched, or send the file",
                )  # fmt: skip
            data = pydicom.Dataset.from_json({tag: value for tag, value in item.items() if not tag.startswith("0002")})
            data.file_meta = pydicom.dataset.FileMetaDataset()
            data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            file = io.BytesIO()
            data.save_as(file, enforce_file_format=True)
            files.append(file.getvalue())
    except Refusal:
        raise
    # Whatever a damaged document makes the libraries stumble over; their messages repeat it.
    except Exception as error:
        raise Refusal(422, "study", f"not the DICOM JSON model ({type(error).__name__})") from None
    return files


def _too_large(most: int) -> Refusal:
    return Refusal(413, "size", f"a request of more than {most} bytes")


def _long(scope: Scope) -> bool:
    """Whether a body that was not read is too long to be dropped."""
    lengths = [value for key, value in scope["headers"] if key == b"content-length"]
    chunked = any(key == b"transfer-encoding" for key, _ in scope["headers"])
    return chunked or any(not value.isdigit() or int(value) > _DRAINED for value in lengths)


def _is_loopback(host: str) -> bool:
    """Of a host as it is given, or as a request calls it."""
    try:
        name = host if host.count(":") > 1 and host[0] != "[" else urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _greeting(listening: socket.socket, name: str, token: str | None) -> str:
    host, port = listening.getsockname()[:2]
    where = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    who = "requests must bear the token" if token else "no token, so only this machine is answered"
    return f"{name}: {where} ({who}); research use only"


def _answers(content: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    """What a POST answers, for the OpenAPI page."""
    reasons: dict[int | str, str] = {
        401: "no token, or a wrong one", 406: "none of these forms is accepted", 408: "the request came too slowly",
        413: "too many bytes or files", 415: "another content type", 422: "a file or study that cannot be used, and why",
        503: "busy or stopping; see Retry-After", 504: "no answer in time",
    }  # fmt: skip
    schema = {"type": "object", "properties": {"error": {"type": "object", "properties": {
        "code": {"type": "string"}, "message": {"type": "string"}}}}}  # fmt: skip
    errors = {status: {"description": reason, "content": {_JSON: {"schema": schema}}} for status, reason in reasons.items()}
    return {200: {"description": "the answer", "content": content}} | errors


def _body(limits: Limits) -> dict[str, Any]:
    form = {
        "type": "object", "required": ["files"],
        "properties": {
            "files": {"type": "array", "maxItems": limits.max_files, "items": {"type": "string", "format": "binary"},
                      "description": "views of one study, frontal first: DICOM, PNG, JPEG or TIFF"},
            "study_id": {"type": "string", "description": "name of the study; the first file's if left out"},
        },
    }  # fmt: skip
    dicom = {"type": "array", "items": {"type": "object"}, "description": "DICOM JSON with pixels as InlineBinary"}
    content = {"multipart/form-data": {"schema": form}, _DICOM_JSON: {"schema": dicom}}
    return {"requestBody": {"required": True, "content": content}}


def _page(app: FastAPI, limits: Limits) -> str:
    """The OpenAPI description for a reader, which needs nothing from elsewhere."""
    sections = {}
    for path, operations in app.openapi()["paths"].items():
        for method, operation in operations.items():
            answers = "".join(
                f"<tr><td>{status}</td><td>{escape(answer['description'])}</td>"
                f"<td>{escape(', '.join(answer.get('content', {})))}</td></tr>"
                for status, answer in operation["responses"].items()
            )
            text = escape(operation.get("description", ""))
            takes = ", ".join(operation.get("requestBody", {}).get("content", {}))
            sections[f"{method.upper()} {path}"] = (
                f"<p>{escape(operation['summary'])}. {text}</p>" + (f"<p>Takes {escape(takes)}.</p>" if takes else "")
                + f'<div class="scroll"><table><tbody>{answers}</tbody></table></div>'
            )  # fmt: skip
    example = "curl -H 'Authorization: Bearer TOKEN' -F files=@frontal.dcm -F files=@lateral.dcm ADDRESS/v1/reports"
    sections["Example"] = f"<pre>{escape(example)}</pre>"
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{value:,}</td></tr>" for name, value in asdict(limits).items())
    sections["Limits"] = f"<table><tbody>{rows}</tbody></table>"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        write_page(file, app.title, '<p>Described for machines in <a href="/openapi.json">openapi.json</a>.</p>', sections)
        return file.read_text(encoding="utf-8")
