"""Data sets in shards: what reading their metadata costs, how fast images come from them, and decoding at reduced size.

    python benchmarks/shards.py metadata --studies 200000
    python benchmarks/shards.py stream
    python benchmarks/shards.py decode FOLDER_OR_FILES...
"""

import argparse
import gc
import io
import json
import resource
import tarfile
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as arrow
from PIL import Image
from pyarrow import parquet

from medxray.data import StudyImages, load_studies, read_image, resize
from medxray.data.readers import READERS
from medxray.data.readers import parquet as reading
from medxray.spec import DataSpec, TrainingSpec
from medxray.training import EpochBatches

REPORT = "The heart is normal in size. The lungs are clear. There is no effusion or pneumothorax. " * 2
LABELS = 14


def write_parquet(folder: Path, images: list[bytes], shard: int = 10_000, group: int = 100) -> None:
    """Shards with a report and labels a row."""
    for start in range(0, len(images), shard):
        rows = range(start, min(start + shard, len(images)))
        columns = {
            "image": [{"bytes": images[i], "path": f"{i}.png"} for i in rows],
            "study_id": [f"study{i:08}" for i in rows],
            "patient_id": [f"patient{i // 2:08}" for i in rows],
            "report": [f"{REPORT}{i}" for i in rows],
            **{f"label {k}": [(i >> k) & 1 for i in rows] for k in range(LABELS)},
        }
        parquet.write_table(arrow.table(columns), folder / f"{start:08}.parquet", row_group_size=group)


def write_tar(folder: Path, images: list[bytes], shard: int = 10_000) -> None:
    """The same as samples of PNG and JSON."""
    for start in range(0, len(images), shard):
        with tarfile.open(folder / f"{start:08}.tar", "w") as tar:
            for i in range(start, min(start + shard, len(images))):
                labels = {f"label {k}": (i >> k) & 1 for k in range(LABELS)}
                row = {"study_id": f"study{i:08}", "patient_id": f"patient{i // 2:08}", "report": f"{REPORT}{i}"}
                for suffix, data in (("png", images[i]), ("json", json.dumps({**row, "labels": labels}).encode())):
                    member = tarfile.TarInfo(f"{i:08}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def spec_of(kind: str, root: Path) -> DataSpec:
    """224 px, nothing kept in memory."""
    settings = READERS.settings_of(kind)(name=kind, root=str(root))  # type: ignore[call-arg]
    return DataSpec(reader=settings, image_size=224, cache_images=False)


def ready(spec: DataSpec) -> StudyImages:
    """The training studies."""
    studies = load_studies(spec)
    return StudyImages(
        studies.splits["train"], studies.root, spec, channels=1, mean=(0.5,), std=(0.5,), labels=studies.labels,
        seed=0, train=True, max_views=1, reader=studies.reader,
    )  # fmt: skip


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def metadata(studies: int) -> None:
    """Seconds and bytes a study until batches can be drawn."""
    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(file, "png")
    for kind, write in (("parquet", write_parquet), ("webdataset", write_tar)):
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), [file.getvalue()] * studies)
            for again in range(2 if kind == "webdataset" else 1):
                # A process each, so that nothing of the former is counted.
                with ProcessPoolExecutor(1) as process:
                    seconds, held, most, drawn = process.submit(opened, kind, Path(folder)).result()
                print(
                    f"{kind}{', its index there already' if again else ''}: {studies} studies with a report and {LABELS} "
                    f"labels in {seconds:.1f} s ({studies / seconds:.0f} a second), {held / studies:.0f} bytes a study held, "
                    f"{most / studies:.0f} while reading; first order in {drawn:.2f} s"
                )


def opened(kind: str, folder: Path) -> tuple[float, int, int, float]:
    """Seconds to the training studies, bytes that this holds and held at most, seconds to the first batch's names."""
    before, started = resident(), time.perf_counter()
    images = ready(spec_of(kind, folder))
    seconds = time.perf_counter() - started
    gc.collect()
    held = resident() - before
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    started = time.perf_counter()
    next(iter(EpochBatches(len(images), TrainingSpec(batch_size=256), 0, 0, 1, images.locality)))
    return seconds, held, most, time.perf_counter() - started


def stream(studies: int, side: int) -> None:
    """Images a second of one process, from files, shards in their order, and Parquet in an order without regard to it."""
    drawn = np.random.default_rng(0).integers(0, 255, (side // 8, side // 8)).astype(np.uint8)
    data = []
    for i in range(studies):
        file = io.BytesIO()
        Image.fromarray(drawn + np.uint8(i % 256)).resize((side, side), Image.Resampling.BICUBIC).save(file, "jpeg")
        data.append(file.getvalue())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "files").mkdir()
        for i, one in enumerate(data):
            (folder / "files" / f"{i}.jpg").write_bytes(one)
        rows = "".join(f"{i}.jpg,study{i:08},patient{i // 2:08}\n" for i in range(studies))
        (folder / "files" / "studies.csv").write_text("path,study_id,patient_id\n" + rows)
        for kind, write in (("parquet", write_parquet), ("webdataset", write_tar)):
            (folder / kind).mkdir()
            write(folder / kind, data)
        for kind, root, local in (
            ("csv", "files", True), ("parquet", "parquet", True), ("webdataset", "webdataset", True),
            ("parquet", "parquet", False),
        ):  # fmt: skip
            # Room for two row groups of the six, as if the set were far larger than what is kept.
            reading.CACHE_BYTES = 2 * 100 * len(data[0])
            images = ready(spec_of(kind, folder / root))
            order = EpochBatches(
                len(images), TrainingSpec(batch_size=16), 0, 0, 1, images.locality if local else None
            )
            rates = []
            for _ in range(3):
                started = time.perf_counter()
                for batch in order:
                    for _, row in batch:
                        images.reader.open(images.images[row][0])
                opened = time.perf_counter() - started
                started = time.perf_counter()
                for batch in order:
                    for key in batch:
                        images[key]
                count = len(order) * 16
                rates.append((count / (time.perf_counter() - started), opened / count * 1000))
            rate, opening = max(rates)
            print(
                f"{kind}{'' if local else ', any order'}: {rate:.0f} images of {side} px ({len(data[0])} bytes) a second; "
                f"to fetch the bytes of one takes {opening:.2f} ms"
            )


def decode(paths: list[Path], sizes: list[int]) -> None:
    """Milliseconds to decode whole and at reduced size, resized to what is needed, and their mean difference."""
    files = [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    files = [file for file in files if file.suffix in (".jpg", ".jpeg", ".jp2")]
    for size in sizes:
        times, errors = np.zeros(2), []
        for file in files:
            shown = []
            for i, needed in enumerate((None, (size, size))):
                rounds = []
                for _ in range(5):
                    started = time.perf_counter()
                    found = resize(read_image(file, at_least=needed), size)
                    rounds.append(time.perf_counter() - started)
                times[i] += min(rounds)
                shown.append(found)
            errors.append(float((shown[0] - shown[1]).abs().mean()))
        whole, reduced = times / len(files) * 1000
        print(
            f"{len(files)} files at {size} px: {whole:.1f} ms whole, {reduced:.1f} ms reduced ({whole / reduced:.1f} "
            f"times as fast); mean difference {np.mean(errors):.4f}, largest {max(errors):.4f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["metadata", "stream", "decode"])
    parser.add_argument("paths", type=Path, nargs="*")
    parser.add_argument("--studies", type=int)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 224, 512])
    arguments = parser.parse_args()
    if arguments.what == "metadata":
        metadata(arguments.studies or 200_000)
    elif arguments.what == "stream":
        stream(arguments.studies or 600, arguments.side)
    else:
        decode(arguments.paths, arguments.sizes)


if __name__ == "__main__":
    main()
