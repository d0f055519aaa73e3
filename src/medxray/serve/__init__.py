"""A fitted run as a service: reports and features over HTTP. Studies that wait are joined into batches.

What a client sends is never logged: neither names of files nor anything that DICOM tells.
"""

import asyncio
import io
import logging
import os
import socket
import warnings
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import python_multipart  # noqa: F401  starlette reads forms by it
import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from medxray.data import Sample
from medxray.loopback import is_loopback
from medxray.outputs import check_format, version
from medxray.pipeline import Pipeline
from medxray.serve.batching import Batcher
from medxray.serve.description import answers, body_of, page_of
from medxray.serve.gate import LOG, Gate, Limits, Refusal, SentStudy, Service
from medxray.serve.requests import DICOM, FHIR, JSON, NPY, accepts, answered, said, study_of
from medxray.serve.server import Protocol, Server
from medxray.spec import Spec
from medxray.types import DataError, MedxrayError, RunError

TOKEN = "MEDXRAY_TOKEN"
LEAST_TOKEN = 16
"""Characters that a token has at least."""

__all__ = [
    "LEAST_TOKEN", "LOG", "TOKEN", "Batcher", "Gate", "Limits", "Refusal", "Sample", "SentStudy", "Service", "application",
    "find_token", "serve",
]  # fmt: skip


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
    body = body_of(limits)

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

    @app.post("/v1/reports", summary="The report, or the probabilities, of one study", openapi_extra=body, responses=answers(
        {JSON: {"schema": {"type": "object"}}, FHIR: {"schema": {"type": "object"}}, DICOM: {}}
    ))  # fmt: skip
    async def reports(request: Request, kind: Annotated[str, Depends(accepts(JSON, FHIR, DICOM))]) -> Response:
        """As JSON the fields of a prediction; by the header Accept a FHIR R4 DiagnosticReport, or a DICOM structured report,
        which needs DICOM files and carries their patient's identity."""
        if kind != JSON:
            check_format("fhir" if kind == FHIR else "dicom-sr", pipeline.spec.task)
        async with study_of(request, service) as study:
            prediction = await answered(service, "reports", study)
            return await service.work(said, kind, prediction, study, service.name)  # type: ignore[no-any-return]

    @app.post("/v1/features", summary="The encoder's pooled vector of one study", openapi_extra=body, responses=answers(
        {JSON: {"schema": {"type": "object"}}, NPY: {}}
    ))  # fmt: skip
    async def features(request: Request, kind: Annotated[str, Depends(accepts(JSON, NPY))]) -> Response:
        """The mean over the views, as JSON or, by the header Accept, as a float32 vector in NumPy's format."""
        async with study_of(request, service) as study:
            vector: np.ndarray = await answered(service, "features", study)
            if kind == JSON:
                return JSONResponse({"study_id": study.name, "features": vector.tolist()})
            file = io.BytesIO()
            np.save(file, vector)
            return Response(file.getvalue(), media_type=NPY)

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

    page = page_of(app, limits)

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
    if token is None and not is_loopback(host):
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
        app, http=Protocol, ws="none", lifespan="on", access_log=False, log_config=None, server_header=False,
        timeout_keep_alive=int(limits.header_timeout) or 1,
    )  # fmt: skip
    Server(config, app.state.service, lambda: say(_greeting(listening, pipeline.spec.name, token))).run([listening])


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


def _greeting(listening: socket.socket, name: str, token: str | None) -> str:
    host, port = listening.getsockname()[:2]
    where = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    who = "requests must bear the token" if token else "no token, so only this machine is answered"
    return f"{name}: {where} ({who}); research use only"
