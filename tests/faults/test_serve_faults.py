"""The service under faults: whoever is left is answered, rightly, and nothing is held for those that are gone."""

import contextlib
import http.client
import io
import json
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medxray.pipeline import Pipeline

pytest.importorskip("fastapi", reason="pip install 'medxray[serve]'")

from medxray.serve import Limits, serve

Start = Callable[..., "Service"]


class Service:
    """A service in a forked process, which may be told to suffer something first."""

    def __init__(self, pipeline: Pipeline, folder: Path, suffer: Callable[[], Any], limits: Limits) -> None:
        greeting = folder / "greeting"
        self.process = os.fork()
        if self.process == 0:
            try:
                torch.set_num_threads(1)
                suffer()
                serve(pipeline, port=0, limits=limits, say=lambda text: (greeting.write_text(text), None)[1])
            finally:
                os._exit(0)
        while not greeting.is_file() or "http://" not in greeting.read_text():
            assert os.waitpid(self.process, os.WNOHANG)[0] == 0, "it did not start"
            time.sleep(0.02)
        self.port = int(greeting.read_text().split("http://127.0.0.1:")[1].split()[0].strip("/,;:"))

    def ask(self, method: str, path: str, body: bytes = b"", kind: str = "") -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, path, body or None, {"Content-Type": kind} if kind else {})
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def waiting(self) -> int:
        return int(self.ask("GET", "/v1/health")[1]["accepted"])

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.process}/fd"))


@pytest.fixture
def start(unbroken: Pipeline, tmp_path: Path) -> Iterator[Start]:
    started: list[Service] = []

    def make(suffer: Callable[[], Any] = lambda: None, **limits: Any) -> Service:
        folder = tmp_path / f"service{len(started)}"
        folder.mkdir()
        started.append(Service(unbroken, folder, suffer, Limits(**{"max_wait_ms": 1, **limits})))
        return started[-1]

    yield make
    for service in started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(service.process, signal.SIGKILL)
        os.waitpid(service.process, 0)


def form(side: int = 48, noise: bool = True) -> tuple[bytes, str]:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (side, side), dtype=np.uint8) if noise else np.eye(side, dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    return head + file.getvalue() + b"\r\n--x--\r\n", "multipart/form-data; boundary=x"


def post(body: bytes, kind: str, length: int | None = None) -> bytes:
    head = f"POST /v1/reports HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\n"
    return f"{head}Content-Length: {length or len(body)}\r\n\r\n".encode() + body


def scores(answer: tuple[int, Any]) -> dict[str, float]:
    assert answer[0] == 200, answer
    return dict(answer[1]["scores"])


def test_clients_that_disconnect(start: Start) -> None:
    """Half of a body sent, or all of it and no wait for the answer: their place is free at once, and others are answered as
    before."""
    service = start(max_wait_ms=200, queue=4)
    body, kind = form()
    expected = scores(service.ask("POST", "/v1/reports", body, kind))
    before = service.open_files()
    for sent in (post(body, kind), post(body[: len(body) // 2], kind, len(body))) * 8:
        with socket.create_connection(("127.0.0.1", service.port), 5) as client:
            client.sendall(sent)
            # Reset, not closed: what is under way is lost.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        if sent.endswith(body):
            found = service.ask("POST", "/v1/reports", body, kind)
            assert found[0] == 503 or scores(found) == expected
    end = time.monotonic() + 20
    while service.waiting() and time.monotonic() < end:
        time.sleep(0.05)
    assert service.waiting() == 0
    assert scores(service.ask("POST", "/v1/reports", body, kind)) == expected
    assert service.open_files() <= before + 1


def test_no_room_for_what_is_sent(start: Start, tmp_path: Path) -> None:
    """Large bodies wait on the disk. Where that takes no more, the client is told so, and small studies are answered."""

    def full() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    service = start(full)
    small, kind = form()
    expected = scores(service.ask("POST", "/v1/reports", small, kind))
    large, _ = form(side=1400)
    assert len(large) > 1.5 * 2**20
    for _ in range(3):
        status, answer = service.ask("POST", "/v1/reports", large, kind)
        assert status == 507 and answer["error"]["code"] == "room", (status, answer)
    assert scores(service.ask("POST", "/v1/reports", small, kind)) == expected
    assert service.waiting() == 0


def test_no_memory_for_an_image(start: Start) -> None:
    """The image is not called damaged, and the service lives."""
    service = start()
    small, kind = form()
    expected = scores(service.ask("POST", "/v1/reports", small, kind))
    own = int(Path(f"/proc/{service.process}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(service.process, resource.RLIMIT_AS, (own + 24 * 2**20, own + 24 * 2**20))
    large, _ = form(side=5000, noise=False)
    status, answer = service.ask("POST", "/v1/reports", large, kind)
    assert status == 500 and "out of memory while it was read" in answer["error"]["message"], (status, answer)
    assert scores(service.ask("POST", "/v1/reports", small, kind)) == expected
    assert service.waiting() == 0


def test_a_clock_that_jumps(start: Start, tmp_path: Path) -> None:
    """Years back and forth every moment: time limits are those of a clock that only goes on."""

    def jump() -> None:
        own, state = time.time, [0]

        def now() -> float:
            state[0] += 1
            return own() + (-1) ** state[0] * 10**8

        time.time = now

    service = start(jump, timeout=20, max_wait_ms=50)
    body, kind = form()
    found = [scores(service.ask("POST", "/v1/reports", body, kind)) for _ in range(3)]
    assert found[0] == found[1] == found[2]
    assert service.waiting() == 0
