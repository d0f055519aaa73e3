"""Thousands of steps and requests: memory and open files stay as they were after the first tenth."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

COUNT = 2000
GROWTH = 0.02
FORM = "multipart/form-data; boundary=part"


class Sample(NamedTuple):
    """What a process holds after some steps or requests."""

    done: int
    memory: int
    files: int

    @classmethod
    def of(cls, pid: int, done: int) -> "Sample":
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return cls(done, pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd")))


def assert_flat(samples: list[Sample]) -> None:
    """The last tenth against the second: the median of memory, and the fewest files, as a connection may just be ending."""
    tenths = [[sample for sample in samples if share <= sample.done / COUNT <= share + 0.1] for share in (0.1, 0.9)]
    memory = [float(np.median([sample.memory for sample in some])) for some in tenths]
    files = [min(sample.files for sample in some) for some in tenths]
    growth = memory[1] / memory[0] - 1
    print(f"{memory[0] / 2**20:.1f} MiB after a tenth, {memory[1] / 2**20:.1f} at the end ({growth:+.2%}); files {files}")
    assert samples[-1].done >= 0.95 * COUNT and len(samples) >= 40
    assert growth < GROWTH
    assert files[1] <= files[0]


@contextlib.contextmanager
def running(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A command of medxray in a process of its own, with the end of its errors where it fails."""
    command = [sys.executable, "-m", "medxray.cli", *arguments]
    with (folder / "errors").open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory and files are read from /proc")
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("spec", ["hd-mae-phantom", "classify-phantom", "r2gencsr-nearest-phantom"])
def test_steps_of_training(spec: str, phantom: Path, tmp_path: Path) -> None:
    """With its validations and checkpoints, ten of each."""
    run = tmp_path / "run"
    changes = [
        f"output={run}", "data.reader.name=csv", f"data.reader.root={phantom}", "data.reader.report=findings",
        "data.image_size=32", "data.max_pixels=1000000", "encoder.width=32", "encoder.depth=1", "encoder.heads=2",
        "encoder.patch=8", f"training.steps={COUNT}", "training.batch_size=4", "training.log_steps=10",
        f"training.evaluate_steps={COUNT // 10}", f"training.save_steps={COUNT // 10}", "training.pictures=2",
        "training.validation_studies=8", *(["generation.max_new_tokens=8"] if "r2gen" in spec else []),
    ]  # fmt: skip
    samples: list[Sample] = []
    with running(tmp_path, "fit", spec, *changes) as process:
        while process.poll() is None:
            time.sleep(0.2)
            with contextlib.suppress(OSError, ValueError, IndexError, KeyError):
                done = json.loads((run / "log.jsonl").read_text().splitlines()[-1])["step"]
                if not samples or samples[-1].done < done:
                    samples.append(Sample.of(process.pid, done))
        assert process.returncode == 0, (tmp_path / "errors").read_text()[-3000:]
    assert_flat(samples)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory and files are read from /proc")
@pytest.mark.timeout(3000)
def test_requests_to_a_service(report_run: Path, radiograph: Callable[..., bytes], tmp_path: Path) -> None:
    """Each on a connection of its own, of all three forms; one in ten is refused."""
    bodies = [radiograph(seed) for seed in range(4)]

    def form(file: bytes) -> bytes:
        head = b'--part\r\nContent-Disposition: form-data; name="files"; filename="a.dcm"\r\n'
        return head + b"Content-Type: application/octet-stream\r\n\r\n" + file + b"\r\n--part--\r\n"

    samples: list[Sample] = []
    with running(tmp_path, "serve", str(report_run), "--port", "0") as process:
        assert process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())
        assert found, (tmp_path / "errors").read_text()[-3000:]
        for done in range(COUNT):
            accepted = ["application/json", "application/fhir+json", "application/dicom"][done % 3]
            body = form(b"no image" if done % 10 == 9 else bodies[done % 4])
            connection = HTTPConnection("127.0.0.1", int(found[1]), timeout=60)
            with contextlib.closing(connection):
                connection.request("POST", "/v1/reports", body, {"Content-Type": FORM, "Accept": accepted})
                answer = connection.getresponse()
                content = answer.read()
            assert (answer.status < 300) == (done % 10 != 9), (answer.status, content[:300])
            if done % 10 == 0:
                # The service closes its end of the connection a moment later.
                time.sleep(0.05)
                samples.append(Sample.of(process.pid, done))
    assert_flat(samples)
