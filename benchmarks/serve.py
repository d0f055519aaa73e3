"""What batching brings a service: studies a second of one client after another, and of many at once.

    python benchmarks/serve.py [RUN] [--help]
"""

import argparse
import concurrent.futures
import http.client
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import medxray
from medxray.data.phantom import generate
from ratios import record

MARK = "medxray-benchmark"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="a fitted run; r2gencsr-phantom, fitted for --steps, if left out")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=96, help="of each of the two ways, in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-batch", type=int, default=16)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = generate(Path(folder) / "phantom", studies=max(64, options.requests), size=128, progress=False)
        run = options.run or fitted(Path(folder), options.steps)
        files = sorted((root / "images").rglob("*.png"))[: options.requests]
        bodies = [form(file) for file in files]
        pipeline = medxray.load(run)
        started = time.perf_counter()
        expected = [pipeline.predict(file).text for file in files]
        alone = len(files) / (time.perf_counter() - started)
        started = time.perf_counter()
        pipeline.predict(list(files))
        joined = len(files) / (time.perf_counter() - started)
        print(f"{torch.get_num_threads()} threads; a text has {statistics.median(len(t.split()) for t in expected):.0f} words")
        print(f"{'the library, study by study':<44} {alone:7.1f} studies/s")
        print(f"{'the library, whole':<44} {joined:7.1f} studies/s   x {joined / alone:.2f}")
        one, many = measured(str(run), bodies, expected, options.clients, options.rounds, options.max_batch)
        print(f"{'the service, one client after another':<44} {statistics.median(one):7.1f} studies/s")
        told = f"the service, {options.clients} clients, batches of {options.max_batch}"
        ratio = [b / a for a, b in zip(one, many, strict=True)]
        spread = f"(of the rounds {', '.join(f'{r:.2f}' for r in ratio)})"
        print(f"{told:<44} {statistics.median(many):7.1f} studies/s   x {statistics.median(ratio):.2f} {spread}")
        record("service, 16 clients", statistics.median(ratio), "one request at a time")
        print("every text was that of the library alone")


def fitted(folder: Path, steps: int) -> Path:
    settings = [f"training.steps={steps}", f"output={folder / 'run'}"]
    settings += [f"data.reader.root={folder / 'train'}"]
    return medxray.build("r2gencsr-phantom", settings).fit(progress=False).folder


def measured(
    run: str, bodies: list[bytes], expected: list[str], clients: int, rounds: int, most: int
) -> tuple[list[float], list[float]]:
    """Studies a second of each round, the two ways in turn: one request at a time without waiting for others, and many."""
    command = [sys.executable, "-m", "medxray.cli", "serve", run, "--port", "0", "-q"]
    servers = [
        subprocess.Popen([*command, "--max-batch", str(size), "--max-wait-ms", str(wait)], stdout=subprocess.PIPE, text=True)
        for size, wait in ((1, 0), (most, 20))
    ]
    try:
        ports = [int(server.stdout.readline().split("127.0.0.1:")[1].split()[0]) for server in servers]  # type: ignore[union-attr]
        rates: list[list[float]] = [[], []]
        for _ in range(rounds):
            for way, (port, workers) in enumerate(zip(ports, (1, clients), strict=True)):
                started = time.perf_counter()
                with concurrent.futures.ThreadPoolExecutor(workers) as pool:
                    texts = list(pool.map(lambda body, port=port: ask(port, body), bodies))  # type: ignore[misc]
                rates[way].append(len(bodies) / (time.perf_counter() - started))
                assert texts == expected, f"{np.mean([a != b for a, b in zip(texts, expected, strict=True)]):.0%} differ"
        return rates[0], rates[1]
    finally:
        for server in servers:
            server.terminate()
            server.wait()


def form(file: Path) -> bytes:
    head = f'--{MARK}\r\nContent-Disposition: form-data; name="files"; filename="{file.name}"\r\n\r\n'
    return head.encode() + file.read_bytes() + f"\r\n--{MARK}--\r\n".encode()


def ask(port: int, body: bytes) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", "/v1/reports", body, {"Content-Type": f"multipart/form-data; boundary={MARK}"})
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return str(answer["text"])


if __name__ == "__main__":
    main()
