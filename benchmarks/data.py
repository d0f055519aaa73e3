"""What reading data costs, each figure beside a peer in the same run.

    python benchmarks/data.py COMMAND [--help]
"""

import argparse
import csv
import gzip
import io
import multiprocessing
import os
import random
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas
import pydicom
import torch
from datasets import Dataset
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut
from pydicom.uid import (
    UID,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from medxray.data import load_studies, read_image, resize
from medxray.data.readers import READERS
from medxray.data.text import RULES, clean, sections, without_marks
from medxray.spec import DataSpec
from ratios import record

COMMANDS: dict[str, Callable[[list[str]], None]] = {}


def command(run: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """Makes a function of the remaining arguments a command of its name."""
    COMMANDS[run.__name__] = run
    return run


SIZE = 1280
H, W = 2500, 2048


@command
def decode(arguments: list[str]) -> None:
    """Radiographs of 2,500 x 2,048 read and made 1,280 x 1,280, beside a loop of pydicom and Pillow's bicubic filter.

    The loop is the shortest that gives the same gray values: stored values over white, a window where the file has
    one, float32, Pillow's resize. Both run on one core, then ours in two processes.
    """
    parser = argparse.ArgumentParser(prog="data.py decode", description=decode.__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--cpu", action="store_true",
        help="processor time, for a machine that does other work too; two workers as if each had a core to itself",
    )  # fmt: skip
    parser.add_argument("--only", nargs="*", help="kinds")
    parser.add_argument("--shared", type=Path, help="a radiograph to take in place of the drawn one, PNG or DICOM")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    clock = time.process_time if asked.cpu else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        kinds = _written(Path(folder), asked.shared)
        chosen = {kind: path for kind, path in kinds.items() if not asked.only or kind in asked.only}
        print(f"{'':<24}{'peer':>9}{'medxray':>9}{'ratio':>7}{'two workers':>13}{'ratio':>7}   levels of 255 apart")
        with multiprocessing.get_context("fork").Pool(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for kind, path in chosen.items():
                jobs = [str(path)] * 6
                _ours(path), _theirs(path), pool.map(_ours_of, jobs, 3)
                peer, ours, both = [], [], []
                for _ in range(asked.rounds):
                    peer.append(_seconds(lambda p=path: _theirs(p), clock))
                    ours.append(_seconds(lambda p=path: _ours(p), clock))
                    begin = time.perf_counter()
                    spent = pool.map(_ours_of, jobs, 3)
                    wall = time.perf_counter() - begin
                    both.append((sum(spent) / 2 if asked.cpu else wall) / len(jobs))
                # The least of some rounds in turn: what else the machine does only adds.
                one, two, three = min(peer), min(ours), min(both)
                record(f"decode and resize: {kind}", one / two, "pydicom and Pillow")
                record(f"decode and resize, two workers: {kind}", one / three, "pydicom and Pillow")
                apart = 255 * np.abs(_ours(path) - _theirs(path))
                print(
                    f"{kind:<24}{1e3 * one:>6.1f} ms{1e3 * two:>6.1f} ms{one / two:>7.2f}{1e3 * three:>10.1f} ms"
                    f"{one / three:>7.2f}   mean {apart.mean():.2f}",
                    flush=True,
                )


def _seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    begin = clock()
    work()
    return clock() - begin


def _ours(path: Path) -> NDArray[np.float32]:
    return resize(read_image(path), SIZE).numpy()[0]


def _ours_of(path: str) -> float:
    """In a process, which tells what it spent; pixels do not leave it, as a training process shares its memory."""
    return _seconds(lambda: _ours(Path(path)), time.process_time)


def _theirs(path: Path) -> NDArray[np.float32]:
    if path.suffix == ".dcm":
        data = pydicom.dcmread(path)
        values, white = data.pixel_array, 2.0**data.BitsStored - 1
        if "WindowWidth" in data:
            values = apply_voi_lut(apply_modality_lut(values, data), data)
    else:
        image = Image.open(path)
        if image.mode == "L":
            # Eight bits may be resized as they are.
            return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.float32) / np.float32(255)
        values = np.asarray(image.convert("L") if image.mode == "RGB" else image)
        white = 255 if values.dtype == np.uint8 else 2.0 ** int(values.max()).bit_length() - 1
    pixels = np.asarray(values, np.float32) / np.float32(white)
    return np.asarray(Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def _written(folder: Path, source: Path | None) -> dict[str, Path]:
    """A file of each kind, all of one radiograph of 12 bits."""
    if source is None:
        y, x = np.mgrid[0:H, 0:W]
        noise = np.random.default_rng(0).normal(0, 12, (H, W))
        deep = (2000 + 1500 * np.sin(x / 300) * np.cos(y / 400) + noise).clip(0, 4095).astype(np.uint16)
    else:
        deep = np.rint(resize(read_image(source), [H, W])[0].numpy() * 4095).astype(np.uint16)
    flat = Image.fromarray((deep >> 4).astype(np.uint8))
    paths = {}
    syntaxes = {
        "DICOM raw": ExplicitVRLittleEndian, "DICOM JPEG 2000": JPEG2000Lossless, "DICOM RLE": RLELossless,
        "DICOM JPEG-LS": JPEGLSLossless,
    }  # fmt: skip
    for kind, syntax in syntaxes.items():
        paths[kind] = _dicom(folder / f"{kind}.dcm", deep, syntax)
    paths["DICOM raw, window"] = _dicom(folder / "window.dcm", deep, ExplicitVRLittleEndian, True)
    buffer = io.BytesIO()
    flat.save(buffer, "JPEG", quality=92)
    for kind, image, suffix, settings in (
        ("PNG 8 bits", flat, "png", {}),
        ("PNG 16 bits", Image.fromarray(deep), "png", {}),
        ("JPEG", flat, "jpg", {"quality": 92}),
        ("JPEG in colour", flat.convert("RGB"), "jpg", {"quality": 92}),
    ):
        paths[kind] = folder / f"{kind}.{suffix}"
        image.save(paths[kind], **settings)
    return paths


def _dicom(path: Path, pixels: NDArray[np.uint16], syntax: UID, window: bool = False) -> Path:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = UID("1.2.3.4")
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 12, 11
    data.PixelData = pixels.tobytes()
    if window:
        data.WindowCenter, data.WindowWidth = 2000, 3000
    if syntax.is_encapsulated:
        data.compress(syntax, generate_instance_uid=False)
    data.save_as(path, enforce_file_format=True)
    return path


WORDS = """the heart is normal in size; lungs are clear, no effusion or pneumothorax (stable) mild left base atelectasis:
right apex opacity 3 cm unchanged mediastinum within limits"""


def _reports(count: int, length: int) -> list[str]:
    """Made-up reports of at least so many characters, of sentences such as radiologists write."""
    draw, words, found = random.Random(0), WORDS.split(), []
    for _ in range(count):
        sentences, left = [], length
        while left > 0:
            sentences.append(" ".join(draw.choices(words, k=9)).capitalize() + ".")
            left -= len(sentences[-1]) + 1
        found.append(" ".join(sentences))
    return found


def _by_sentence(report: str) -> str:
    """R2Gen's IU X-Ray rule as it is usually written: every replacement on the text, a pattern on every sentence."""
    for _ in range(3):
        report = report.replace("..", ".")
    report = report.replace("1. ", "")
    for dot in (".", ""):
        for number in (2, 3, 4, 5):
            report = report.replace(f"{dot} {number}. ", ". ")
    cleaned = []
    for sentence in report.strip().lower().split(". "):
        for quote in "\"/\\'":
            sentence = sentence.replace(quote, "")
        cleaned.append(re.sub(r"[.,?;*!%^&_+():-\[\]{}]", "", sentence.strip().lower()))
    return " . ".join(cleaned) + " ."


@command
def text(arguments: list[str]) -> None:
    """Reports cleaned a second in one process, beside R2Gen's rule written sentence by sentence; and cut in sections."""
    parser = argparse.ArgumentParser(prog="data.py text", description=text.__doc__)
    parser.add_argument("--reports", type=int, default=100, help="of a round; the best round counts")
    parser.add_argument("--characters", type=int, default=600, help="of each report")
    parser.add_argument("--rounds", type=int, default=200)
    asked = parser.parse_args(arguments)
    reports = _reports(asked.reports, asked.characters)
    headed = [f"INDICATION: Cough.\n\nFINDINGS: {report}\n\nIMPRESSION: No acute process.\n" for report in reports]
    if any(clean(report, "r2gen-iu") != _by_sentence(report) for report in reports):
        raise SystemExit("the rules differ")
    jobs: dict[str, Callable[[], object]] = {"peer, r2gen-iu": lambda: [_by_sentence(report) for report in reports]}
    for rule in RULES:
        jobs[rule] = lambda rule=rule: [clean(report, rule) for report in reports]
    jobs["marks: drop"] = lambda: [without_marks(report) for report in reports]
    jobs["sections"] = lambda: [sections(report) for report in headed]
    seconds = {name: min(_seconds(job, time.process_time) for _ in range(asked.rounds)) for name, job in jobs.items()}
    peer = next(iter(seconds.values()))
    record("cleaning by R2Gen's rule", peer / seconds["r2gen-iu"], "the rule sentence by sentence")
    for name, spent in seconds.items():
        print(f"{name:<16}{len(reports) / spent:>10,.0f} reports/s{peer / spent:>8.2f}")


@command
def tables(arguments: list[str]) -> None:
    """A CSV of studies opened by `load_studies`, beside pandas and a look for every image: no checks, nothing cleaned."""
    parser = argparse.ArgumentParser(prog="data.py tables", description=tables.__doc__)
    parser.add_argument("--studies", type=int, default=4000)
    parser.add_argument("--labels", type=int, default=14)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args(arguments)
    draw = random.Random(0)
    names = [f"Label {i}" for i in range(asked.labels)]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        with (root / "studies.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "study_id", "patient_id", "view", "report", "split", *names])
            for i, report in enumerate(_reports(asked.studies, 600)):
                path = f"{i // 100}/{i}.png"
                (root / path).parent.mkdir(exist_ok=True)
                (root / path).touch()
                split = ("train", "train", "train", "val", "test")[i // 2 % 5]
                labels = draw.choices(["0", "1", "", "-1"], k=asked.labels)
                writer.writerow([path, f"s{i}", f"p{i // 2}", "PA", report, split, *labels])

        def peer(table: str) -> None:
            frame = pandas.read_csv(root / table, dtype=str, keep_default_na=False)
            if not all(os.path.isfile(root / path) for path in frame["path"]):
                raise SystemExit("images are missing")
            Dataset.from_pandas(frame)

        def ours(table: str, split: str = "official") -> None:
            reader = READERS.settings_of("csv")(name="csv", root=folder, file=table)
            load_studies(DataSpec(reader=reader, split=split))  # type: ignore[arg-type]

        packed = gzip.compress((root / "studies.csv").read_bytes(), 6)
        (root / "packed.csv.gz").write_bytes(packed)
        jobs: dict[str, Callable[[], None]] = {
            "peer": lambda: peer("studies.csv"),
            "load_studies": lambda: ours("studies.csv"),
            "peer, .csv.gz": lambda: peer("packed.csv.gz"),
            "load_studies, .csv.gz": lambda: ours("packed.csv.gz"),
            "split: stratified": lambda: ours("studies.csv", "stratified"),
        }
        found: dict[str, float] = {}
        for name, job in jobs.items():
            first = _seconds(job, time.process_time)
            found[name] = spent = min(_seconds(job, time.process_time) for _ in range(asked.rounds))
            print(f"{name:<24}{spent:>7.2f} s, the first time {first:.2f} s")
        record(f"table of {asked.studies:,} studies", found["peer"] / found["load_studies"], "pandas, nothing checked")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=sorted(COMMANDS))
    chosen, rest = parser.parse_known_args()
    COMMANDS[chosen.command](rest)


if __name__ == "__main__":
    main()
