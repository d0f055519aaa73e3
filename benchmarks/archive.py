"""Studies a second of an archive that is predicted on Ray, with one model and with two, beside one process and a plain loop.

    python benchmarks/archive.py [--help]

The archive is a DICOM file of 12 bits for each view. The loop is what one would write: batches of the files through
`Pipeline.predict`, and one table at the end. A model has one thread everywhere. Start of a cluster and of its processes is
told apart: `going` is from the first part to the last. All ways must give the same texts.
"""

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
import torch
from pyarrow import parquet

import medxray
from medxray.archive import archive_of, predict_archive
from medxray.data import load_studies
from medxray.data.phantom import generate
from medxray.outputs import table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="a fitted run; r2gencsr-phantom, fitted for --steps, if left out")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--studies", type=int, default=192)
    parser.add_argument("--size", type=int, default=1024, help="pixels a side of the archive's images")
    parser.add_argument("--part", type=int, default=32)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = generate(Path(folder) / "archive", asked.studies, asked.size, 1, "dicom", progress=False)
        pipeline = medxray.load(asked.run or fitted(Path(folder), asked.steps))
        data = archive_of(pipeline.spec, root, ["reader.name=dicom-folder"])
        ways: dict[str, Callable[[Path], Any]] = {"a plain loop": lambda out: loop(pipeline, data, out)}
        ways["one process"] = lambda out: predict_archive(pipeline, data, out, part=asked.part)
        for n in asked.workers:
            ways[f"Ray, {n} worker{'s' if n > 1 else ''}"] = lambda out, n=n: predict_archive(  # type: ignore[misc]
                pipeline, data, out, ray="local", workers=n, part=asked.part
            )
        images = len(list(root.rglob("*.dcm")))
        print(f"{asked.studies} studies, {images} images of {asked.size} pixels, {os.cpu_count()} processors")
        print(f"{'':<16}{'studies/s':>10}{'ratio':>7}{'going':>8}{'ratio':>7}{'MiB':>7}")
        rates: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        peaks: dict[str, int] = dict.fromkeys(ways, 0)
        texts: dict[str, str] = {}
        for i in range(asked.rounds):
            for name, way in ways.items():
                out = Path(folder) / f"{name}-{i}"
                started = time.time()
                with peak() as held:
                    way(out)
                whole = asked.studies / (time.time() - started)
                made = sorted(path.stat().st_mtime for path in out.glob("*.parquet"))
                going = (asked.studies - asked.part) / (made[-1] - made[0]) if len(made) > 1 else whole
                rates[name].append((whole, going))
                peaks[name] = max(peaks[name], held[0])
                rows = parquet.read_table(out, columns=["study_id", "text"]).to_pydict()
                found = dict(zip(rows["study_id"], rows["text"], strict=True))
                assert (texts := texts or found) == found, f"{name} says something else"
        first = [statistics.median(column) for column in zip(*rates["a plain loop"], strict=True)]
        for name, own in rates.items():
            whole, going = (statistics.median(column) for column in zip(*own, strict=True))
            print(f"{name:<16}{whole:>10.2f}{whole / first[0]:>7.2f}{going:>8.2f}{going / first[1]:>7.2f}{peaks[name]:>7}")
        print("every text was that of the loop")


def loop(pipeline: medxray.Pipeline, data: Any, out: Path, size: int = 16) -> None:
    """What one would write."""
    found = load_studies(data, reports=False)
    studies, made = list(found.splits["train"]), []
    for start in range(0, len(studies), size):
        rows = studies[start : start + size]
        made += pipeline.predict([{**row, "images": [found.reader.open(image) for image in row["images"]]} for row in rows])
    out.mkdir()
    parquet.write_table(table(made), out / "predictions.parquet")


def fitted(folder: Path, steps: int) -> Path:
    settings = [f"training.steps={steps}", f"output={folder / 'run'}", f"data.reader.root={folder / 'train'}"]
    return medxray.build("r2gencsr-phantom", settings).fit(progress=False).folder


@contextmanager
def peak() -> Iterator[list[int]]:
    """MiB that this process and those below it hold together at most, memory that they share counted once."""
    found, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            total = 0
            for one in [(me := psutil.Process()), *me.children(recursive=True)]:
                try:
                    total += one.memory_full_info().pss
                except psutil.Error:
                    continue
            found[0] = max(found[0], total // 2**20)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


if __name__ == "__main__":
    main()
