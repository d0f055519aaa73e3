"""The service as its clients meet it: answers, refusals, limits, and how it ends."""

import asyncio
import base64
import concurrent.futures
import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
from fhirclient.models.diagnosticreport import DiagnosticReport
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian
from starlette.testclient import TestClient

import medxray
from medxray.cli import app
from medxray.data.dicom_headers import structured_report as read_report
from medxray.serve import Batcher, Limits, Sample, application, find_token, serve
from medxray.types import RunError

TOKEN = "a token of 24 characters"
IDENTITY = ("Mustermann", "4711", "Weiß", "A99", "secret")
DICOM_JSON = "application/dicom+json"


class Server:
    """`medxray serve` in a process of its own."""

    def __init__(self, run: Path, log: Path, *options: str, token: str | None = TOKEN) -> None:
        environment = os.environ | ({"MEDXRAY_TOKEN": token} if token else {})
        command = [sys.executable, "-m", "medxray.cli", "serve", str(run), "--port", "0", *options]
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True, env=environment)
        assert self.process.stdout is not None
        self.greeting = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", self.greeting)
        assert found, (self.greeting, log.read_text())
        self.port = int(found[1])

    def connect(self, timeout: float = 60) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, Any, dict[str, str]]:
        connection = self.connect()
        named = {name.replace("_", "-"): value for name, value in ({"Authorization": f"Bearer {TOKEN}"} | headers).items()}
        with contextlib.closing(connection):
            # A refusal may come, and the connection end, before all is sent.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, path, body or None, {k: v for k, v in named.items() if v})
            return understood(connection.getresponse())

    def memory(self) -> int:
        """Bytes that the process has in memory."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(30)


def understood(response: http.client.HTTPResponse) -> tuple[int, Any, dict[str, str]]:
    content, headers = response.read(), {key.lower(): value for key, value in response.getheaders()}
    return response.status, json.loads(content) if "json" in headers.get("content-type", "") else content, headers


def form(*files: bytes, name: str = "secret.dcm", **fields: str) -> tuple[bytes, dict[str, str]]:
    """A body of multipart/form-data and its header."""
    mark, body = uuid.uuid4().hex, b""
    for key, value in fields.items():
        body += f'--{mark}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'.encode()
    for file in files:
        head = f'--{mark}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
        body += f"{head}Content-Type: application/octet-stream\r\n\r\n".encode() + file + b"\r\n"
    return body + f"--{mark}--\r\n".encode(), {"Content_Type": f"multipart/form-data; boundary={mark}"}


def png(seed: int = 0, side: int = 96) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def server(report_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(
        report_run, tmp_path_factory.mktemp("serve") / "log", "--max-body", "2", "--timeout", "4", "--max-files", "3"
    )
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def pipeline(report_run: Path) -> medxray.Pipeline:
    return medxray.load(report_run)


@pytest.fixture
def client(pipeline: medxray.Pipeline) -> Iterator[Callable[..., TestClient]]:
    with contextlib.ExitStack() as stack:

        def make(**limits: Any) -> TestClient:
            made = application(pipeline, limits=Limits(**{"max_wait_ms": 1, **limits}))
            return stack.enter_context(TestClient(made, base_url="http://127.0.0.1:1"))

        yield make


def test_it_says_what_the_library_says(server: Server, pipeline: medxray.Pipeline, radiograph: Callable[..., bytes]) -> None:
    views = [radiograph(1), radiograph(2, ViewPosition="LL")]
    body, kind = form(*views, study_id="one")
    expected = pipeline.predict({"images": views, "study_id": "one"})
    status, said, _ = server.ask("POST", "/v1/reports", body, **kind)
    assert status == 200 and said["text"] == expected.text and said["study_id"] == "one"
    assert said["context"] == expected.context and len(said["text"]) > 20
    status, report, headers = server.ask("POST", "/v1/reports", body, **kind, Accept="text/plain;q=0.9, application/fhir+json")
    assert status == 200 and headers["content-type"] == "application/fhir+json"
    assert DiagnosticReport(report).conclusion == expected.text and report["effectiveDateTime"] == "2024-02-03"
    status, content, headers = server.ask("POST", "/v1/reports", body, **kind, Accept="application/dicom")
    assert status == 200 and headers["content-type"] == "application/dicom"
    assert pydicom.dcmread(io.BytesIO(content)).PatientID == "4711-0815"
    path = server.log.with_name("sr.dcm")
    path.write_bytes(content)
    assert read_report(path).text == f"FINDINGS:\n{expected.text}"
    document = json.dumps([pydicom.dcmread(io.BytesIO(one)).to_json_dict(bulk_data_threshold=2**30) for one in views])
    status, said, _ = server.ask("POST", "/v1/reports", document.encode(), Content_Type=DICOM_JSON)
    assert status == 200 and said["text"] == pipeline.predict({"images": views, "study_id": "study"}).text
    status, said, _ = server.ask("POST", "/v1/features", body, **kind)
    vector = pipeline.features([{"images": views}])[0]
    assert status == 200 and vector.shape == (32,) and np.allclose(said["features"], vector, atol=1e-5)
    status, content, _ = server.ask("POST", "/v1/features", body, **kind, Accept="application/x-npy")
    loaded = np.load(io.BytesIO(content), allow_pickle=False)
    assert loaded.dtype == np.float32 and np.allclose(loaded, vector, atol=1e-5)


def test_what_is_told_of_it(server: Server) -> None:
    assert "requests must bear the token" in server.greeting and "research use only" in server.greeting
    status, health, headers = server.ask("GET", "/v1/health", Authorization="")
    assert (status, health) == (200, {"status": "ok", "accepted": 0}) and len(headers["x-request-id"]) == 16
    status, model, _ = server.ask("GET", "/v1/model")
    assert status == 200 and model["task"] == "report" and model["features"] == 32 and model["limits"]["max_body"] == 2**21
    status, described, _ = server.ask("GET", "/openapi.json")
    assert status == 200 and set(described["paths"]) == {"/v1/reports", "/v1/features", "/v1/health", "/v1/model"}
    accepted = described["paths"]["/v1/reports"]["post"]["responses"]["200"]["content"]
    assert set(accepted) == {"application/json", "application/fhir+json", "application/dicom"}
    status, page, _ = server.ask("GET", "/", Authorization="")
    assert status == 200 and b"POST /v1/reports" in page and b"http://" not in page and b"https://" not in page


def deflated(content: bytes) -> bytes:
    """A DICOM file whose data set is deflated: `content`, and then an endless private element of zeros."""
    data = pydicom.dcmread(io.BytesIO(content))
    data.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    file = io.BytesIO()
    data.save_as(file, enforce_file_format=True)
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    meta = pydicom.dcmread(io.BytesIO(file.getvalue())).file_meta
    head = file.getvalue()[: 132 + 12 + meta.FileMetaInformationGroupLength]
    bomb = packer.compress(b"\x09\x00\x10\x10OB\x00\x00" + (2**30).to_bytes(4, "little"))
    bomb += packer.compress(bytes(2**26))
    return head + bomb + packer.flush()


def refusals(radiograph: Callable[..., bytes]) -> dict[str, tuple[int, str, str, bytes, dict[str, str]]]:
    """Name -> status, what the message says, path, body, headers."""
    good, kind = form(radiograph(1))

    def study(*files: bytes) -> tuple[bytes, dict[str, str]]:
        return form(*files)

    return {
        "no token": (401, "Bearer TOKEN", "/v1/reports", good, kind | {"Authorization": ""}),
        "wrong token": (401, "Bearer TOKEN", "/v1/reports", good, kind | {"Authorization": f"Bearer {TOKEN[:-1]}x"}),
        "another scheme": (401, "Bearer TOKEN", "/v1/reports", good, kind | {"Authorization": f"Basic {TOKEN}"}),
        "form of the answer": (406, "application/fhir+json", "/v1/reports", good, kind | {"Accept": "text/csv"}),
        "unwanted": (406, "Accept", "/v1/features", good, kind | {"Accept": "application/json;q=0, text/*"}),
        "content": (415, "multipart/form-data", "/v1/reports", b"x", {"Content_Type": "text/plain"}),
        "nothing": (422, "no file", "/v1/reports", *form(study_id="x")),
        "not a form": (400, "", "/v1/reports", b"x", {"Content_Type": "multipart/form-data"}),
        "no image": (422, "file 1: not an image", "/v1/reports", *study(b"secret text of a patient")),
        "empty": (422, "file 2: empty", "/v1/reports", *study(png(), b"")),
        "cut": (422, "file 1:", "/v1/reports", *study(png()[:1000])),
        "third of two views": (422, "file 3: not an image", "/v1/reports", *study(png(), png(), b"secret")),
        "cut DICOM": (422, "file 1: ", "/v1/reports", *study(radiograph(1)[:-1000])),
        "no pixels of DICOM": (422, "DICOM without pixel data", "/v1/reports", *study(radiograph(1)[: -2 * 96 * 80 - 12])),
        "pixels": (422, "file 1:", "/v1/reports", *study(png(side=1100))),
        "two patients": (422, "files of 2 patients", "/v1/reports", *study(radiograph(1), radiograph(2, PatientID="secret"))),
        "SR of PNG": (422, "needs DICOM sources", "/v1/reports", form(png())[0], {}),
        "many": (413, "more than 3 files", "/v1/reports", *study(*[png()] * 4)),
        "long": (413, "more than 2097152 bytes", "/v1/reports", *study(bytes(2**21 + 1))),
        "bomb": (422, "unpacks to more than", "/v1/reports", *study(deflated(radiograph(1)))),
        "no JSON": (422, "not the DICOM JSON model", "/v1/reports", b'{"secret": [[[', {"Content_Type": DICOM_JSON}),
        "deep JSON": (422, "not the DICOM JSON", "/v1/reports", b"[" * 100000, {"Content_Type": DICOM_JSON}),
        "bulk data": (422, "a BulkDataURI is not fetched", "/v1/reports", b'[{"7FE00010": {"vr": "OW", "BulkDataURI": '
                      b'"http://127.0.0.1/secret"}}]', {"Content_Type": DICOM_JSON}),
        "path": (404, "Not Found", "/v1/secret", good, kind),
        "method": (405, "Method Not Allowed", "/v1/model", good, kind),
    }  # fmt: skip


def test_refusals(server: Server, radiograph: Callable[..., bytes]) -> None:
    cases = refusals(radiograph)
    body, kind = form(png())
    cases["SR of PNG"] = (*cases["SR of PNG"][:3], body, kind | {"Accept": "application/dicom"})
    before = server.memory()
    for name, (status, message, path, content, headers) in cases.items():
        found, answer, told = server.ask("POST", path, content, **headers)
        assert found == status, (name, found, answer)
        assert set(answer) == {"error"} and set(answer["error"]) == {"code", "message"}, name
        assert message in answer["error"]["message"], (name, answer)
        assert "Traceback" not in answer["error"]["message"], name
        assert not any(word in json.dumps(answer, ensure_ascii=False) for word in IDENTITY), (name, answer)
        assert status != 401 or told["www-authenticate"] == "Bearer"
    assert server.memory() - before < 200 * 2**20
    assert server.ask("GET", "/v1/health")[1] == {"status": "ok", "accepted": 0}, "it lives on"


def test_a_gigabyte_is_refused_before_it_is_sent(server: Server) -> None:
    before = server.memory()
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="x"\r\n\r\n'
    for length in (f"Content-Length: {2**30}", "Transfer-Encoding: chunked"):
        def framed(data: bytes, chunked: bool = "chunked" in length) -> bytes:
            return b"%x\r\n%s\r\n" % (len(data), data) if chunked else data

        head = f"POST /v1/reports HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n{length}\r\n"
        sent = 0
        with socket.create_connection(("127.0.0.1", server.port), 10) as client:
            client.sendall(head.encode() + b"Content-Type: multipart/form-data; boundary=x\r\n\r\n" + framed(part))
            with contextlib.suppress(ConnectionError):
                while sent < 2**30:
                    client.sendall(framed(bytes(2**20)))
                    sent += 2**20
            answer = http.client.HTTPResponse(client, method="POST")
            answer.begin()
            assert answer.status == 413 and json.loads(answer.read())["error"]["code"] == "size"
            assert answer.getheader("connection") == "close"
        assert sent < 64 * 2**20
    assert server.memory() - before < 64 * 2**20


def test_slow_clients_are_cut_off(server: Server) -> None:
    """One sends the head a byte at a time, one the body, one trickles on behind a refusal; others are served meanwhile."""
    body, kind = form(png())
    start = f"POST /v1/reports HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
    start += f"Content-Type: {kind['Content_Type']}\r\n"
    heads = {
        "head": b"GET /v1/health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow",
        "body": f"{start}Authorization: Bearer {TOKEN}\r\n\r\n".encode(),
        "refused": f"{start}\r\n".encode(),
    }
    received: dict[str, bytes] = {}

    def slow(name: str) -> float:
        started, received[name] = time.monotonic(), b""
        with socket.create_connection(("127.0.0.1", server.port), 1) as client:
            client.sendall(heads[name])
            client.settimeout(0.2)
            for byte in body[:100]:
                try:
                    client.sendall(bytes([byte]))
                    got = client.recv(65536)
                    if not got:
                        break
                    received[name] += got
                except TimeoutError:
                    continue
                except ConnectionError:
                    break
        return time.monotonic() - started

    with concurrent.futures.ThreadPoolExecutor() as pool:
        waiting = {name: pool.submit(slow, name) for name in heads}
        time.sleep(0.5)
        assert server.ask("POST", "/v1/reports", body, **kind)[0] == 200
        took = {name: future.result() for name, future in waiting.items()}
    # A hundred bytes take twenty seconds, unless they are cut off after four.
    assert all(seconds < 12 for seconds in took.values()), took
    assert b" 408 " in received["body"] and b'"code":"slow"' in received["body"]
    assert b" 401 " in received["refused"] and received["head"] == b""


def test_two_hundred_mixed_requests(server: Server, pipeline: medxray.Pipeline, radiograph: Callable[..., bytes]) -> None:
    cases = list(refusals(radiograph).values())
    cases = [case for case in cases if case[0] not in (413,) and case[4]]
    images = [png(i) for i in range(4)] + [radiograph(i) for i in range(4)]
    expected = {i: pipeline.predict({"images": [image], "study_id": "x"}).text for i, image in enumerate(images)}

    def ask(number: int) -> tuple[int, int, Any, float]:
        started = time.monotonic()
        if number % 4 == 3:
            status, _, path, content, headers = cases[number // 4 % len(cases)]
            found = server.ask("POST", path, content, **headers)
        else:
            status = 200
            content, kind = form(images[number % 8], study_id="x")
            path = "/v1/features" if number % 4 == 1 else "/v1/reports"
            found = server.ask("POST", path, content, **kind)
            assert path != "/v1/reports" or found[1]["text"] == expected[number % 8], "whatever it was batched with"
        return status, found[0], found[1], time.monotonic() - started

    for _ in range(2):
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            before, answers = server.memory(), list(pool.map(ask, range(200)))
    assert len(answers) == 200 and all(expected == found for expected, found, _, _ in answers)
    refused = [body["error"]["message"] for _, status, body, _ in answers if status != 200]
    assert len(refused) == 50 and all(refused)
    assert server.memory() - before < 32 * 2**20, "flat in the second round"


@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_the_log_tells_no_one(server: Server, radiograph: Callable[..., bytes]) -> None:
    body, kind = form(radiograph(1, PatientName="Mustermann", PatientAge="secret"), study_id="secret")
    for accept in ("application/json", "application/fhir+json", "application/dicom"):
        server.ask("POST", "/v1/reports?patient=secret", body, **kind, Accept=accept)
    server.ask("GET", "/patients/secret")
    # A line is written once its answer is away.
    until = time.monotonic() + 10
    while "GET (unknown path) 404" not in (lines := server.log.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    assert re.search(r"POST /v1/reports 200 \d+ ms \d+ bytes [0-9a-f]{16}$", lines, flags=re.M)
    assert "GET (unknown path) 404" in lines and "Traceback" not in lines
    assert not any(word in lines for word in (*IDENTITY, TOKEN)), lines


def test_a_study_waits_no_longer_than_it_has_to(client: Callable[..., TestClient]) -> None:
    files = [("files", ("x.png", png(), "image/png"))]
    late = client(timeout=0.3, max_wait_ms=1000)
    answer = late.post("/v1/reports", files=files)
    assert answer.status_code == 504 and answer.json()["error"]["code"] == "time"
    full = client(queue=1, max_wait_ms=1000)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(full.post, "/v1/reports", files=files)
        time.sleep(0.5)
        second = full.post("/v1/reports", files=files)
        assert second.status_code == 503 and second.headers["retry-after"] == "1" and second.json()["error"]["code"] == "busy"
        assert first.result().status_code == 200
    assert full.post("/v1/reports", files=files).status_code == 200


def test_without_a_token_only_this_machine_is_answered(
    client: Callable[..., TestClient], pipeline: medxray.Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = client()
    assert own.get("/v1/model").status_code == 200
    for host in ("localhost:8000", "[::1]:8000"):
        assert own.get("/v1/model", headers={"host": host}).status_code == 200
    # A page elsewhere whose name was made to lead here.
    assert own.get("/v1/model", headers={"host": "evil.example"}).status_code == 403
    with pytest.raises(RunError, match=r"--host 0\.0\.0\.0 can be reached by others"):
        serve(pipeline, host="0.0.0.0")
    with pytest.raises(RunError, match="can be guessed"):
        application(pipeline, token="short")
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(RunError, match="cannot listen there"):
        serve(pipeline, port=taken.getsockname()[1])
    (tmp_path / "token").write_text(f" {TOKEN}\n")
    monkeypatch.setenv("MEDXRAY_TOKEN", "of the environment")
    assert find_token("given", tmp_path / "token") == "given" and find_token(None, tmp_path / "token") == TOKEN
    assert find_token(None, None) == "of the environment"
    with pytest.raises(RunError, match="cannot be read"):
        find_token(None, tmp_path / "none")


def test_what_fails_inside_tells_where_and_nothing_else(
    client: Callable[..., TestClient],
    pipeline: medxray.Pipeline,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    own = client()

    def fail(*_: Any) -> Any:
        raise KeyError("secret")

    monkeypatch.setattr(pipeline, "predict", fail)
    answer = own.post("/v1/reports", files=[("files", ("x.png", png(), "image/png"))])
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "service"
    assert "KeyError" in caplog.text and "secret" not in caplog.text + answer.text


def test_batches() -> None:
    """They gather while one runs, hold one kind each, leave out what is cancelled, and one failure is one study's."""
    seen: list[tuple[str, list[int]]] = []
    held = threading.Event()

    def run(kind: str, samples: list[Sample]) -> list[int]:
        held.wait(10)
        seen.append((kind, [sample.seed for sample in samples]))
        if any(sample.seed == 3 for sample in samples):
            raise ValueError("3")
        return [10 * sample.seed for sample in samples]


    def sample(seed: int) -> Sample:
        return Sample(torch.zeros(0), "", torch.zeros(0), "", "", seed)

    async def main() -> list[Any]:
        batcher = Batcher(run, 4, 0.0)
        first = asyncio.ensure_future(batcher("a", sample(0)))
        await asyncio.sleep(0.2)
        rest = [asyncio.ensure_future(batcher("b" if i == 5 else "a", sample(i))) for i in range(1, 8)]
        await asyncio.sleep(0)
        rest[6].cancel()
        # The loop hands it on before the thread may take it.
        await asyncio.sleep(0.05)
        held.set()
        found = await asyncio.gather(first, *rest, return_exceptions=True)
        await asyncio.to_thread(batcher.close)
        return found

    found = asyncio.run(main())
    assert found[:3] == [0, 10, 20] and isinstance(found[3], ValueError) and found[4:7] == [40, 50, 60]
    assert isinstance(found[7], asyncio.CancelledError)
    assert seen == [("a", [0]), ("a", [1, 2, 3, 4]), *(("a", [i]) for i in (1, 2, 3, 4)), ("b", [5]), ("a", [6])]


@pytest.mark.slow
def test_a_stop_finishes_what_was_accepted(report_run: Path, tmp_path: Path) -> None:
    server = Server(report_run, tmp_path / "log", "--max-wait-ms", "6000", token=None)
    assert "no token, so only this machine is answered" in server.greeting
    body, kind = form(png())
    with concurrent.futures.ThreadPoolExecutor() as pool:
        accepted = [pool.submit(server.ask, "POST", "/v1/reports", body, **kind) for _ in range(4)]
        while server.ask("GET", "/v1/health")[1]["accepted"] < 4:
            time.sleep(0.05)
        server.process.send_signal(signal.SIGTERM)
        while server.ask("GET", "/v1/health")[0] == 200:
            time.sleep(0.05)
        status, answer, headers = server.ask("POST", "/v1/reports", body, **kind)
        assert status == 503 and answer["error"]["code"] == "stopping" and headers["retry-after"]
        assert server.ask("GET", "/v1/health")[:2] == (503, {"status": "stopping", "accepted": 4})
        assert [future.result()[0] for future in accepted] == [200] * 4
    assert server.process.wait(20) == 0
    with pytest.raises(ConnectionError):
        server.ask("GET", "/v1/health")


@pytest.mark.slow
def test_a_kill_is_never_a_false_success(report_run: Path, tmp_path: Path, pipeline: medxray.Pipeline) -> None:
    images = [png(i) for i in range(8)]
    expected = [pipeline.predict({"images": [image], "study_id": "x"}).text for image in images]
    bodies = [form(image, study_id="x") for image in images]
    server = Server(report_run, tmp_path / "log", "--max-wait-ms", "200", "--max-batch", "2")

    def ask(i: int) -> str:
        try:
            status, answer, _ = server.ask("POST", "/v1/reports", bodies[i % 8][0], **bodies[i % 8][1])
        except (OSError, http.client.HTTPException) as error:
            return type(error).__name__
        assert status == 200 and answer["text"] == expected[i % 8]
        return "answered"

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(ask, i) for i in range(200)]
        while sum(future.done() for future in asked) < 20:
            time.sleep(0.01)
        server.process.kill()
        found = [future.result() for future in asked]
    assert found.count("answered") >= 20 and len(found) - found.count("answered") > 50
    server.process.wait()
    again = Server(report_run, tmp_path / "log", "--max-wait-ms", "1")
    status, answer, _ = again.ask("POST", "/v1/reports", bodies[0][0], **bodies[0][1])
    assert status == 200 and answer["text"] == expected[0]
    assert again.stop() == 0


def test_the_command_says_what_is_wrong(report_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, ["serve", str(report_run), "--host", "0.0.0.0"], env={"MEDXRAY_TOKEN": ""})
    assert result.exit_code == 2 and "name a token too" in result.stderr
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "medxray.serve")
    monkeypatch.delattr(medxray, "serve")
    result = CliRunner().invoke(app, ["serve", str(report_run)])
    assert result.exit_code == 2 and "pip install 'medxray[serve]'" in result.stderr


def test_inline_pixels_are_what_the_file_holds(client: Callable[..., TestClient], radiograph: Callable[..., bytes]) -> None:
    content = radiograph(5)
    data = pydicom.dcmread(io.BytesIO(content)).to_json_dict(bulk_data_threshold=2**30)
    assert base64.b64decode(data["7FE00010"]["InlineBinary"]) == pydicom.dcmread(io.BytesIO(content)).PixelData
    own = client()
    by_file = own.post("/v1/features", files=[("files", ("x.dcm", content, "application/dicom"))]).json()["features"]
    by_json = own.post("/v1/features", json=data, headers={"content-type": DICOM_JSON}).json()["features"]
    assert by_file == by_json
