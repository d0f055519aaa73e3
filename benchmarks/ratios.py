"""All benchmarks in one table: every ratio to a peer of the same run, and what got slower than the table that is kept.

    python benchmarks/ratios.py            # some 15 minutes on two cores; writes runs/bench/ratios.md
    python benchmarks/ratios.py --keep     # and makes it the table that later runs are held against
    python benchmarks/ratios.py --only "report.py memory" "metrics.py text"

A ratio is the peer's time, or memory, over ours: larger is better. One that is more than a fifth below the kept one is measured
once more, as a machine may have been busy, and the better of the two counts. The command then exits 1 if any is still below.

Each benchmark tells its ratios by `record`, which prints nothing and keeps nothing unless this command runs it.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

FILE = "MEDXRAY_RATIOS"
HERE = Path(__file__).parent
KEPT = HERE / "ratios.json"
SLOWER = 1.2
# Benchmark -> its arguments here: sizes that tell the same in less time than the files' own.
SUITE = (
    "encoders.py scan memory models",
    "pretrain.py --size 640 --rounds 1",
    "report.py retrieval --rounds 5",
    "report.py step --rounds 2 --cases frozen/fixed frozen/nearest learning/fixed learning/nearest",
    "report.py memory",
    "report.py generation",
    "metrics.py text --studies 1000 --rounds 3",
    "data.py decode --rounds 10",
    "data.py text --rounds 50",
    "data.py tables --rounds 3",
    "prepare.py speed --studies 16",
    "serve.py --steps 60 --rounds 2",
)


class Ratio(NamedTuple):
    """One row of the table.

    Attributes:
        benchmark: the command that measures it.
        what: is done.
        peer: what does it otherwise.
        version: of the package that the peer's first word names, if one is.
        value: the peer's time or memory over ours.
    """

    benchmark: str
    what: str
    peer: str
    version: str
    value: float

    @property
    def key(self) -> tuple[str, ...]:
        """The same in every run."""
        return self[:3]


def record(what: str, value: float, peer: str) -> None:
    """Tells a ratio to the command that runs this benchmark, if one does.

    Args:
        what: is done, in the words of the benchmark's own table.
        value: the peer's time or memory over ours.
        peer: what does it otherwise; a package's name first, if it is one's.
    """
    if file := os.environ.get(FILE):
        try:
            version = importlib.metadata.version(peer.split()[0])
        except importlib.metadata.PackageNotFoundError:
            version = ""
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps([what, peer, version, value]) + "\n")


def measured(benchmark: str) -> list[Ratio]:
    """Runs one benchmark; its own words go to the terminal.

    Raises:
        SystemExit: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ratios.jsonl"
        script, *arguments = shlex.split(benchmark)
        done = subprocess.run([sys.executable, HERE / script, *arguments], env={**os.environ, FILE: str(file)})
        if done.returncode:
            raise SystemExit(f"{benchmark}: ended with {done.returncode}")
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [Ratio(benchmark, *json.loads(line)) for line in lines]


def slower(found: Sequence[Ratio], kept: Sequence[Ratio]) -> list[tuple[Ratio, float]]:
    """Rows that are more than a fifth below the kept ones, and what is kept of each."""
    before = {row.key: row.value for row in kept}
    pairs = [(row, before.get(row.key)) for row in found]
    return [(row, old) for row, old in pairs if old is not None and row.value * SLOWER < old]


def better(first: Sequence[Ratio], second: Sequence[Ratio]) -> list[Ratio]:
    """Each row of the first, or of the second where that is better."""
    again = {row.key: row for row in second}
    return [max(row, again.get(row.key, row), key=lambda one: one.value) for row in first]


def table(rows: Sequence[Ratio], machine: str) -> str:
    """The rows as Markdown."""
    said = f"{machine}. The peer's time, or memory, over that of medxray."
    lines = [said, "", "| what | peer | ratio | command |", "| --- | --- | --- | --- |"]
    for row in rows:
        name, *rest = row.peer.split()
        peer = " ".join([name, row.version, *rest]) if row.version else row.peer
        lines.append(f"| {row.what} | {peer} | {row.value:.2f} | `{row.benchmark}` |")
    return "\n".join([*lines, ""])


def machine() -> str:
    """What the figures hold for."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), model)
    return f"{os.cpu_count()} cores of {model}, Python {platform.python_version()}, torch {importlib.metadata.version('torch')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="BENCHMARK", help="those whose command begins so")
    parser.add_argument("--keep", action="store_true", help="later runs are held against this one")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder of the table")
    chosen = parser.parse_args()
    suite = [one for one in SUITE if not chosen.only or any(one.startswith(only) for only in chosen.only)]
    if not suite:
        parser.error(f"--only: no benchmark begins so; there are: {', '.join(SUITE)}")
    stored = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.is_file() else {"rows": []}
    kept = [Ratio(*row) for row in stored["rows"]]
    rows: list[Ratio] = []
    began = time.perf_counter()
    for i, benchmark in enumerate(suite):
        print(f"\n[{i + 1} of {len(suite)}, {time.perf_counter() - began:.0f} s] {benchmark}", flush=True)
        found = measured(benchmark)
        if not chosen.keep and slower(found, kept):
            print("slower than what is kept: once more", flush=True)
            found = better(found, measured(benchmark))
        rows += found
    chosen.output.mkdir(parents=True, exist_ok=True)
    (chosen.output / "ratios.md").write_text(table(rows, machine()), encoding="utf-8")
    print(f"\n{table(rows, machine())}\n{chosen.output / 'ratios.md'}, {time.perf_counter() - began:.0f} s")
    if chosen.keep:
        others = [row for row in kept if row.benchmark in SUITE and row.benchmark not in suite]
        merged = sorted([*others, *rows], key=lambda row: SUITE.index(row.benchmark))
        told = {"machine": machine(), "rows": [[*row[:4], round(row.value, 3)] for row in merged]}
        KEPT.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        return
    if late := slower(rows, kept):
        for row, old in late:
            print(f"slower: {row.benchmark}: {row.what}: {row.value:.2f} times, was {old:.2f}")
        sys.exit(1)
    print("nothing is slower than what is kept" if kept else "no table is kept yet: --keep makes this one it")


if __name__ == "__main__":
    main()
