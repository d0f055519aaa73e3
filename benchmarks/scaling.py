"""What full-size runs take on 1, 8 and 64 GPUs: arithmetic counted from the specs, decoding measured here, and a GPU assumed.

    python benchmarks/scaling.py                                # two minutes; the tables of docs/scaling.md
    python benchmarks/scaling.py --tflops 120 --bandwidth 900   # another GPU

Nothing of a GPU is measured. A job goes as fast as the slowest of four things that run at once: arithmetic, decoding, reading
from storage, and the exchange of gradients among machines of eight GPUs. The tables name the slowest.
"""

import argparse
import re
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

import medxray
from medxray.data import StudyImages, data_of, load_studies, read_image, write_shards
from medxray.data.readers import READERS
from medxray.spec import DataSpec
from medxray.summary import summarise
from prepare import H, W, draw

GPUS = (1, 8, 64)
RADIOGRAPHS, EPOCHS, REPEATS = 1_000_000, 100, 4
MIMIC = {"train": 270_790, "val": 2_130, "test": 3_858}


class Cluster(NamedTuple):
    """What is assumed: rates of a GPU, and of what eight of them share.

    Attributes:
        flops: bf16 FLOP a second that a training step reaches.
        bandwidth: bytes a second of a GPU's memory.
        cores: of processors beside each GPU.
        network: bytes a second between machines.
        storage: bytes a second for the whole job.
        price: of a GPU's hour.
    """

    flops: float
    bandwidth: float
    cores: int
    network: float
    storage: float
    price: float


class Job(NamedTuple):
    """One kind of training.

    Attributes:
        items: studies or images an epoch.
        epochs: of them.
        flop: of an item, both passes.
        decode: seconds of a core for an item.
        size: bytes read for an item.
        batch: items a GPU and step.
        gradient: bytes that a step exchanges.
    """

    items: int
    epochs: float
    flop: float
    decode: float
    size: float
    batch: int
    gradient: float

    def rates(self, gpus: int, cluster: Cluster) -> dict[str, float]:
        """What bounds the job -> items a second that it allows."""
        found = {
            "arithmetic": gpus * cluster.flops / self.flop,
            "decoding": gpus * cluster.cores / self.decode,
            "storage": cluster.storage / self.size,
        }
        # In a ring every machine sends and takes nearly twice what is exchanged; inside a machine it costs next to nothing.
        if (machines := gpus // 8) > 1:
            seconds = 2 * self.gradient * (machines - 1) / machines / cluster.network
            found["gradients"] = gpus * self.batch / seconds
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, default=350, help="bf16 TFLOP/s that a step reaches: a third of 990 by default")
    parser.add_argument("--bandwidth", type=float, default=3350, help="GB/s of a GPU's memory")
    parser.add_argument("--cores", type=int, default=16, help="of processors, a GPU")
    parser.add_argument("--network", type=float, default=50, help="GB/s between machines")
    parser.add_argument("--storage", type=float, default=5, help="GB/s for the whole job")
    parser.add_argument("--price", type=float, default=3, help="of a GPU's hour")
    chosen = parser.parse_args()
    cluster = Cluster(
        chosen.tflops * 1e12, chosen.bandwidth * 1e9, chosen.cores, chosen.network * 1e9, chosen.storage * 1e9, chosen.price
    )
    torch.set_num_threads(1)
    print(
        f"Assumed: {chosen.tflops:g} TFLOP/s of a GPU in a step, {chosen.bandwidth:g} GB/s of its memory, "
        f"{chosen.cores} cores a GPU, "
        f"{chosen.network:g} GB/s between machines of eight, {chosen.storage:g} GB/s of storage, {chosen.price:g} a GPU's hour.\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        read = measured(Path(folder))
    print("| measured, one core | ms an image | MB an image |\n| --- | --- | --- |")
    for name, (seconds, size) in read.items():
        print(f"| {name} | {1e3 * seconds:.0f} | {size / 1e6:.2f} |")
    pretraining(cluster, read)
    reports(cluster, read)


def measured(folder: Path) -> dict[str, tuple[float, float]]:
    """Source -> (seconds of a core to a training image, its bytes)."""
    root, rows = draw(folder, 8), {}
    dicom, _ = data_of("csv", [f"reader.root={root}", f"image_size={1280}"])
    rows["DICOM of 12 bits, not compressed, to 1,280 px"] = taken(dicom.data, files(root / "images", "dcm"))
    for bits in ("16", "8"):
        shards = folder / f"shards-{bits}"
        write_shards(dicom.data, shards, studies=8, workers=1, bits=bits)
        reader = READERS.settings_of("parquet")(name="parquet", root=str(shards))
        rows[f"shards of 1,280 px, {bits} bits"] = taken(DataSpec(reader=reader, image_size=1280), files(shards, "parquet"), True)
    for path in sorted((root / "images").glob("*.dcm")):
        levels = (read_image(path)[0] * 255).astype("uint8")
        Image.fromarray(levels).save(path.with_suffix(".jpg"), quality=95)
    table = (root / "studies.csv").read_text(encoding="utf-8").replace(".dcm", ".jpg")
    (root / "studies.csv").write_text(table, encoding="utf-8")
    jpeg, _ = data_of("csv", [f"reader.root={root}", "image_size=224"])
    rows[f"JPEG of {W:,} x {H:,} to 224 px"] = taken(jpeg.data, files(root / "images", "jpg"))
    return rows


def files(folder: Path, ending: str) -> list[int]:
    return [path.stat().st_size for path in folder.glob(f"*.{ending}")]


def taken(data: DataSpec, sizes: list[int], packed: bool = False) -> tuple[float, float]:
    """Seconds and bytes of an image as a training process reads it, nothing kept from before; of a pack, its share."""
    data = data.model_copy(update={"cache_images": False, "crop": 0.5, "views": "single"})
    studies = load_studies(data)
    images = StudyImages(
        studies.splits["train"], studies.root, data, channels=1, mean=(0.5,), std=(0.5,), labels=studies.labels,
        seed=0, train=True, max_views=1, reader=studies.reader,
    )  # fmt: skip
    rounds = []
    for _ in range(3):
        began = time.perf_counter()
        for i in range(len(images)):
            images[i]
        rounds.append((time.perf_counter() - began) / len(images))
    every = sum(len(row["images"]) for split in studies.splits.values() for row in split)
    return min(rounds), sum(sizes) / (every if packed else len(sizes))


def pretraining(cluster: Cluster, read: dict[str, tuple[float, float]]) -> None:
    spec = medxray.build("hd-mae-1280")
    told = summarise(spec)
    flop, gradient = 3 * giga(told["step FLOP an image"]), 4 * whole(told["trained parameters"])
    print(f"\n`hd-mae-1280`: {flop / 1e9:,.0f} GFLOP an image and step; {RADIOGRAPHS:,} radiographs, {EPOCHS} epochs\n")
    print("| read from | GPUs | images/s | days | cost | first bottleneck | then |\n| --- | --- | --- | --- | --- | --- | --- |")
    batch = spec.spec.training.batch_size
    sources = dict(list(read.items())[:3])
    name, (seconds, size) = list(sources.items())[-1]
    # An image is read and decoded once for so many masks, which count as images.
    sources[f"{name}, `masker.repeats` {REPEATS}"] = seconds / REPEATS, size / REPEATS
    for source, (seconds, size) in sources.items():
        for gpus in GPUS:
            line(source, gpus, Job(RADIOGRAPHS, EPOCHS, flop, seconds, size, batch, gradient), cluster)


def reports(cluster: Cluster, read: dict[str, tuple[float, float]]) -> None:
    pipeline = medxray.build("r2gencsr-mimic-cxr")
    told, spec = summarise(pipeline), pipeline.spec
    tokens, weights = whole(told["tokens a study"].partition(":")[0]), whole(told["  decoder"])
    trained = whole(told["trained parameters"])
    # A frozen model has no gradients of weights: two passes over them in place of three.
    flop = 4 * weights * tokens + 3 * giga(told["encoder FLOP an image"])
    source, (seconds, size) = list(read.items())[-1]
    assert spec.training.epochs is not None and spec.generation is not None
    print(
        f"\n`r2gencsr-mimic-cxr`: {flop / 1e12:.1f} TFLOP a study and step; {MIMIC['train']:,} studies, "
        f"{spec.training.epochs:g} epochs, steps of {spec.training.batch_size} a GPU\n"
    )
    print("| read from | GPUs | studies/s | days | cost | first bottleneck | then |\n| --- | --- | --- | --- | --- | --- | --- |")
    job = Job(MIMIC["train"], spec.training.epochs, flop, seconds, size, spec.training.batch_size, 4 * trained)
    for gpus in GPUS:
        line(source, gpus, job, cluster)
    written, rows = spec.generation, spec.generation.batch_size * spec.generation.beams
    # Each step reads the weights once for all rows: whichever takes longer, that or the arithmetic.
    step = max(2 * weights / cluster.bandwidth, 2 * weights * rows / cluster.flops)
    alone = written.batch_size / (step * written.max_new_tokens)
    print(f"\nReports of {written.max_new_tokens} tokens, {written.beams} beams, {written.batch_size} studies at a time\n")
    print("| GPUs | reports/s | test split, minutes | bounded by |\n| --- | --- | --- | --- |")
    bound = "memory's bandwidth" if step == 2 * weights / cluster.bandwidth else "arithmetic"
    for gpus in GPUS:
        print(f"| {gpus} | {alone * gpus:.1f} | {MIMIC['test'] / alone / gpus / 60:.1f} | {bound} |")


def line(source: str, gpus: int, job: Job, cluster: Cluster) -> None:
    rates = job.rates(gpus, cluster)
    first, then, *_ = sorted(rates, key=rates.__getitem__)
    days = job.items * job.epochs / rates[first] / 86400
    cost = days * 24 * gpus * cluster.price
    print(
        f"| {source} | {gpus} | {rates[first]:,.0f} | {days:.2f} | {cost:,.0f} | {first} | {then}, at {rates[then]:,.0f} |",
        flush=True,
    )


def whole(said: str) -> int:
    return int(said.replace(",", ""))


def giga(said: str) -> float:
    """FLOP of a line of `medxray show`, told in G."""
    found = re.match(r"([\d,.]+) G", said)
    assert found, said
    return float(found[1].replace(",", "")) * 1e9


if __name__ == "__main__":
    main()
