"""Preparing radiographs of 2,500 x 2,048 as shards of 1,280 x 1,280, beside the script that one would write for it.

    python benchmarks/prepare.py speed --studies 48 --workers 1 2
    python benchmarks/prepare.py png [FILES...]

`speed` draws phantoms, a DICOM file of 12 bits each, not compressed, and prepares them with one worker and with more. Its
peer reads with pydicom, resizes by Pillow in float32 and saves 16-bit PNG files by Pillow, on one core. The start of
processes counts. `png` packs each radiograph at 1,280 with every setting of Pillow's encoder and with ours.
"""

import argparse
import io
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pydicom
import torch
from numpy.typing import NDArray
from PIL import Image

from medxray.data import data_of, read_image, resize, write_shards
from medxray.data.phantom import draw_study, generate
from medxray.data.prepare import encode_png
from ratios import record

H, W, SIZE = 2500, 2048, 1280


def draw(folder: Path, studies: int) -> Path:
    """Phantoms drawn at 1,024, enlarged, with the noise of a detector."""
    root = generate(folder / "data", studies=studies, size=64, seed=0, format="dicom", progress=False)
    rng = np.random.default_rng(0)
    drawn: dict[int, NDArray[np.float32]] = {}
    for i, path in enumerate(sorted(root.glob("images/*.dcm"))):
        if i % 8 not in drawn:
            image = draw_study(1, i, 1024, views=("PA",)).images[0].astype(np.float32) / 4095
            drawn[i % 8] = resize(image[None], [H, W]).numpy()[0] * 4095
        data = pydicom.dcmread(path)
        data.Rows, data.Columns = H, W
        levels = (drawn[i % 8] + rng.normal(0, 12, (H, W)).astype(np.float32)).clip(0, 4095).astype("<u2")
        data.PhotometricInterpretation, data.PresentationLUTShape = "MONOCHROME2", "IDENTITY"
        data.PixelData = levels.tobytes()
        data.save_as(path)
    return root


def peer(root: Path, out: Path) -> None:
    """One file after the other."""
    out.mkdir()
    for path in sorted(root.glob("images/*.dcm")):
        data = pydicom.dcmread(path)
        pixels = Image.fromarray(data.pixel_array.astype(np.float32) / 4095)
        small = np.asarray(pixels.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
        Image.fromarray(np.rint(small * 65535).astype(np.uint16)).save(out / f"{path.stem}.png")


def cpu() -> float:
    """Seconds of processors that this process and its children have had."""
    return sum(os.times()[:4])


def timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def speed(studies: int, workers: list[int], rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = draw(Path(folder), studies)
        images = len(list(root.glob("images/*.dcm")))
        spec, _ = data_of("csv", [f"reader.root={root}", f"image_size={SIZE}"])
        print(f"{studies} studies, {images} images of {H} x {W}, 12 bits")
        print(f"{'':<12}{'studies/s':>10}{'images/s':>10}{'ratio':>7}{'CPU s a study':>15}{'MB a study':>12}")
        first = 0.0
        for n in [0, *workers]:
            seconds, size, begin = [], 0, cpu()
            for i in range(rounds):
                out = Path(folder) / f"{n}-{i}"
                if n:
                    seconds.append(timed(lambda o=out, n=n: write_shards(spec.data, o, studies=8, workers=n)))
                else:
                    seconds.append(timed(lambda o=out: peer(root, o)))
                size = sum(path.stat().st_size for path in out.iterdir())
            # The least of a few rounds: what else the machine does only adds.
            least = min(seconds)
            first = first or least
            if n:
                record(f"data set to shards, {n} worker{'s' if n > 1 else ''}", first / least, "pydicom and Pillow")
            name = f"{n} worker{'s' if n > 1 else ''}" if n else "peer"
            print(
                f"{name:<12}{studies / least:>10.2f}{images / least:>10.2f}{first / least:>7.2f}"
                f"{(cpu() - begin) / rounds / studies:>15.3f}{size / studies / 1e6:>12.2f}",
                flush=True,
            )


def png(files: list[Path], rounds: int) -> None:
    sources = {path.name: read_image(path) for path in files} or {
        "phantom": draw_study(0, 0, 1024).images[0][None].astype(np.float32) / 4095
    }
    print(f"{'':<36}{'kB':>8}{'ms to write':>13}{'ms to read':>12}")
    for name, image in sources.items():
        small = resize(image, SIZE).numpy()[0].astype(np.float64)
        for kind in (np.uint8, np.uint16):
            levels = np.rint(small * np.iinfo(kind).max).astype(kind)

            def general(level: int, levels: NDArray[np.uint8] | NDArray[np.uint16] = levels) -> bytes:
                file = io.BytesIO()
                Image.fromarray(levels).save(file, "PNG", compress_level=level)
                return file.getvalue()

            ways: dict[str, Callable[[], bytes]] = {"ours": lambda v=levels: encode_png(v)}
            ways |= {f"Pillow, level {level}": lambda n=level, g=general: g(n) for level in (1, 3, 6, 9)}
            for way, encode in ways.items():
                data = encode()
                written = min(timed(encode) for _ in range(rounds))
                read = min(timed(lambda d=data: np.asarray(Image.open(io.BytesIO(d)))) for _ in range(rounds))
                what = f"{name[:14]} {8 * levels.itemsize} bits, {way}"
                print(f"{what:<36}{len(data) / 1e3:>8.0f}{1e3 * written:>13.1f}{1e3 * read:>12.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["speed", "png"])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--studies", type=int, default=48)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.command == "speed":
        speed(asked.studies, asked.workers, asked.rounds)
    else:
        png(asked.files, asked.rounds)


if __name__ == "__main__":
    main()
