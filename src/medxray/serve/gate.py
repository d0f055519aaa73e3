"""What stands before the application: who is let in, how much a request may hold, and what the log tells of it."""

import asyncio
import errno
import hmac
import logging
import secrets
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medxray.data import Sample
from medxray.loopback import is_loopback
from medxray.outputs import study_headers
from medxray.pipeline import Pipeline
from medxray.serve.batching import Batcher

LOG = logging.getLogger("medxray.serve")

_OPEN = ("/", "/v1/health", "/openapi.json")
POSTS = ("/v1/reports", "/v1/features")
_KNOWN = (*_OPEN, *POSTS, "/v1/model")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
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


@dataclass
class SentStudy:
    """A study as it was sent: its name, and what gives the bytes of each file."""

    name: str
    parts: list[Callable[[], bytes]]


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

    def read(self, study: SentStudy) -> Sample:
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
        if self.token is None and not is_loopback(headers.get("host", "")):
            return Refusal(403, "host", "without a token only requests to this machine's own address are answered")
        if self.token is not None and path not in _OPEN:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode("latin-1"), self.token.encode())
            if scheme.lower() != "bearer" or not right:
                return Refusal(401, "token", "expected the header Authorization: Bearer TOKEN", WWW_Authenticate="Bearer")
        if scope["method"] != "POST" or path not in POSTS:
            return None
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > limits.max_body:
            return too_large(limits.max_body)
        if self.stopping:
            return Refusal(503, "stopping", "the service is being stopped; ask again later", Retry_After="5")
        if self.accepted >= limits.queue:
            return Refusal(503, "busy", f"{self.accepted} requests wait already; ask again later", Retry_After="1")
        return None


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
                raise too_large(limits.max_body)
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
        accepted = refusal is None and scope["method"] == "POST" and scope["path"] in POSTS
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
                if isinstance(error, OSError) and error.errno in _FULL:
                    failure = Refusal(507, "room", "the service has no room for these files; ask again later", Retry_After="30")
                await failure.response()(scope, bounded, answering)
        finally:
            service.accepted -= accepted
            path = scope["path"] if scope["path"] in _KNOWN else "(unknown path)"
            method = scope["method"] if scope["method"] in ("GET", "POST", "HEAD") else "(method)"
            took = 1000 * (time.monotonic() - started)
            LOG.info("%s %s %d %.0f ms %d bytes %s", method, path, status, took, size, name)


def too_large(most: int) -> Refusal:
    return Refusal(413, "size", f"a request of more than {most} bytes")


def _long(scope: Scope) -> bool:
    """Whether a body that was not read is too long to be dropped."""
    lengths = [value for key, value in scope["headers"] if key == b"content-length"]
    chunked = any(key == b"transfer-encoding" for key, _ in scope["headers"])
    return chunked or any(not value.isdigit() or int(value) > _DRAINED for value in lengths)
