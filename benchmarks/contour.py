"""How well the chest's contour is found: overlap with the true thorax of phantoms, images a second, a mosaic to look at.

    python benchmarks/contour.py                                       # some five minutes on two cores
    python benchmarks/contour.py --studies 20
    python benchmarks/contour.py --mosaic contours.png --images FOLDER [FOLDER ...]

The phantoms are held out: the atlases come from another seed. Each study is taken once with each fault. A collimated
border does not cut the truth: the chest goes on below it. What "fell back" did not pass a quality gate, and counts with the
region that stood in. Images a second are those of all processes together, phantoms half frontal and half lateral; with
decoding, files are read in no more detail than the contour needs, as for a data set.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from medxray.data.images import read_image
from medxray.data.phantom import draw_study
from medxray.pretrain.contour import ClassicalSegmenter
from medxray.types import ImageError

Pair = tuple[NDArray[np.float32], NDArray[np.bool_]]
SEED = 77
COMPUTED, FALLEN = (255, 70, 60), (255, 220, 0)


def collimated(image: NDArray[np.float32], rng: np.random.Generator, level: float) -> NDArray[np.float32]:
    size = len(image)
    top, bottom, left, right = (rng.uniform(0.0, 0.12, 4) * size).astype(int)
    framed = np.full_like(image, level)
    framed[top : size - bottom, left : size - right] = image[top : size - bottom, left : size - right]
    return framed


def rotated(image: NDArray[np.float32], mask: NDArray[np.bool_], rng: np.random.Generator) -> Pair:
    angle = float(rng.uniform(10, 15)) * float(rng.choice((-1, 1)))
    turned = ndimage.rotate(image, angle, reshape=False, order=1)
    return turned, ndimage.rotate(mask.astype(np.float32), angle, reshape=False, order=1) > 0.5


def marked(image: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Burnt-in words and boxes in the corners, electrodes and cables over the chest."""
    size = len(image)
    picture = Image.fromarray((image * 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for x, y in rng.uniform(0, 0.9, (3, 2)) * size:
        draw.text((x, y), "PORTABLE  10:42", fill=255)
    x, y = rng.uniform(0, 0.8, 2) * size
    draw.rectangle((x, 0, x + 0.18 * size, 0.07 * size), fill=255)
    for _ in range(4):
        x, y = rng.uniform(0.2, 0.8, 2) * size
        draw.ellipse((x, y, x + 0.05 * size, y + 0.05 * size), fill=255)
        draw.line((x, y, *(rng.uniform(0, 1, 2) * size)), fill=255, width=max(1, size // 100))
    return np.asarray(picture, np.float32) / 255


FAULTS: dict[str, Callable[[NDArray[np.float32], NDArray[np.bool_], np.random.Generator], Pair]] = {
    "none": lambda image, mask, rng: (image, mask),
    "inverted": lambda image, mask, rng: (1 - image, mask),
    "black border": lambda image, mask, rng: (collimated(image, rng, 0.0), mask),
    "white border": lambda image, mask, rng: (collimated(image, rng, 1.0), mask),
    "rotated 10 to 15 degrees": rotated,
    "gamma and window": lambda image, mask, rng: (
        np.clip((image ** float(rng.uniform(0.5, 2.2)) - rng.uniform(0, 0.15)) / rng.uniform(0.75, 1.1), 0, 1),
        mask,
    ),
    "12 bits in 16, not scaled": lambda image, mask, rng: (image / 16, mask),
    "markers and cables": lambda image, mask, rng: (marked(image, rng), mask),
    "noise": lambda image, mask, rng: (np.clip(image + rng.normal(0, 0.15, image.shape), 0, 1), mask),
    "inverted, rotated, bordered": lambda image, mask, rng: rotated(collimated(1 - image, rng, 1.0), mask, rng),
    "on its side": lambda image, mask, rng: (np.rot90(image).copy(), np.rot90(mask)),
    "mirrored": lambda image, mask, rng: (image[:, ::-1].copy(), mask[:, ::-1]),
    "view unknown": lambda image, mask, rng: (image, mask),
}


def overlap(region: NDArray[Any], truth: NDArray[np.bool_]) -> float:
    """Intersection over union at the truth's size."""
    h, w = truth.shape
    drawn = np.asarray(Image.fromarray(region.astype(np.float32)).resize((w, h), Image.Resampling.BILINEAR)) > 0.5
    return float((drawn & truth).sum() / (drawn | truth).sum())


def judged(job: tuple[int, int, int]) -> list[tuple[str, str, float, bool]]:
    """(view, fault, overlap, fell back) of one study under every fault."""
    seed, index, size = job
    segment, rows = ClassicalSegmenter(), []
    study = draw_study(seed, index, size)
    for view, image, mask in zip(study.views, study.images, study.thorax_masks, strict=True):
        for k, (fault, change) in enumerate(FAULTS.items()):
            pixels, truth = change(image.astype(np.float32) / 4095, mask, np.random.default_rng([index, k]))
            region = segment(pixels.astype(np.float32), "unknown" if fault == "view unknown" else view)
            rows.append((view, fault, overlap(region.mask, truth), region.source != "computed"))
    return rows


def line(name: str, rows: list[tuple[str, str, float, bool]]) -> str:
    values = np.array([row[2] for row in rows])
    fell = np.mean([row[3] for row in rows])
    return f"  {name:30s} {len(rows):6d} {values.mean():8.3f} {np.percentile(values, 5):8.3f} {values.min():8.3f} {fell:9.1%}"


def quality(seed: int, studies: int, size: int, workers: int) -> None:
    with ProcessPoolExecutor(workers) as pool:
        jobs = ((seed, i, size) for i in range(studies))
        rows = [row for part in pool.map(judged, jobs, chunksize=4) for row in part]
    print(f"{studies} held-out studies of {size} px, seed {seed}, intersection over union with the true thorax")
    print(f"  {'':30s} {'images':>6s} {'mean':>8s} {'5th pc.':>8s} {'least':>8s} {'fell back':>9s}")
    print(line("all views and faults", rows))
    for view in ("PA", "AP", "LL"):
        print(line(view, [row for row in rows if row[0] == view]))
    for fault in FAULTS:
        print(line(fault, [row for row in rows if row[1] == fault]))


def timed(job: tuple[list[Path] | None, int, int]) -> tuple[int, float, float]:
    """(images, seconds with decoding, seconds without) of one process."""
    files, size, count = job
    segment = ClassicalSegmenter()
    for view in ("PA", "LL"):
        segment(np.random.default_rng(0).random((64, 64), np.float32), view)
    started = time.perf_counter()
    if files is None:
        studies = (draw_study(SEED, i, size, views=(("PA", "LL")[i % 2],)) for i in range(count))
        images = [study.images[0].astype(np.float32) / 4095 for study in studies]
    else:
        images = [read_image(path, at_least=(128, 128))[0] for path in files]
    decoded = time.perf_counter() - started
    started = time.perf_counter()
    for i, image in enumerate(images):
        segment(image, ("PA", "LL")[i % 2] if files is None else view_of(files[i]))
    took = time.perf_counter() - started
    return len(images), decoded + took, took


def speed(folders: list[Path], workers: int) -> None:
    print(f"images a second, {workers} processes of one thread")
    with ProcessPoolExecutor(workers) as pool:
        for size in (256, 1024):
            parts = list(pool.map(timed, [(None, size, 60)] * workers))
            print(f"  phantoms of {size} px, decoded: {sum(n / without for n, _, without in parts):.0f}")
        for folder in folders:
            files = pictures(folder)[:: max(1, len(pictures(folder)) // 120)]
            parts = list(pool.map(timed, [(files[i::workers], 0, 0) for i in range(workers)]))
            whole, without = (sum(part[0] / part[k] for part in parts) for k in (1, 2))
            print(f"  {folder}: {without:.0f} decoded, {whole:.0f} with decoding")


def pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".dcm"))


def view_of(path: Path) -> str:
    """Indiana's layout calls laterals 1; where nothing is known both atlases are tried."""
    return {"0": "PA", "1": "LL"}.get(path.stem, "unknown")


def cell(pixels: NDArray[np.float32], view: str, side: int) -> Image.Image:
    region = ClassicalSegmenter()(pixels, view)
    low, high = np.percentile(pixels, (0.5, 99.5))
    gray = (np.clip((pixels - low) / max(high - low, 1e-6), 0, 1) * 255).astype(np.uint8)
    h, w = pixels.shape
    size = (max(1, round(w * side / max(h, w))), max(1, round(h * side / max(h, w))))
    picture = np.asarray(Image.fromarray(gray).resize(size, Image.Resampling.LANCZOS).convert("RGB")).copy()
    mask = np.asarray(Image.fromarray(region.mask.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)) > 0.5
    edge = mask & ~ndimage.binary_erosion(mask, iterations=max(1, side // 100))
    picture[edge] = COMPUTED if region.source == "computed" else FALLEN
    whole = Image.new("RGB", (side, side))
    whole.paste(Image.fromarray(picture), ((side - size[0]) // 2, (side - size[1]) // 2))
    return whole


def mosaic(cells: Iterable[Image.Image], file: Path, across: int, levels: int) -> None:
    drawn = list(cells)
    side = drawn[0].width
    sheet = Image.new("RGB", (across * side, -(-len(drawn) // across) * side))
    for i, picture in enumerate(drawn):
        sheet.paste(picture, (i % across * side, i // across * side))
    # Grays of the images and the two colours of the lines, each as it is.
    grays = [(level, level, level) for level in np.linspace(0, 255, levels).astype(int).tolist()]
    palette = Image.new("P", (1, 1))
    palette.putpalette([value for colour in (*grays, COMPUTED, FALLEN) for value in colour])
    sheet.quantize(palette=palette, dither=Image.Dither.NONE).save(file, optimize=True)
    print(f"{file}: {len(drawn)} images, red computed, yellow fallen back")


def real(folders: list[Path], count: int, side: int) -> Iterable[Image.Image]:
    for folder in folders:
        files = pictures(folder)
        for path in files[:: max(1, -(-len(files) // count))]:
            try:
                yield cell(read_image(path)[0], view_of(path), side)
            except ImageError as error:
                print(error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=120)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--images", type=Path, nargs="*", default=[], help="folders of real images, timed or drawn")
    parser.add_argument("--mosaic", type=Path, help="draw the contours of these images, or of phantoms, and do no more")
    parser.add_argument("--count", type=int, default=48, help="images of each folder in the mosaic")
    parser.add_argument("--side", type=int, default=160)
    parser.add_argument("--across", type=int, default=8)
    parser.add_argument("--grays", type=int, default=48, help="levels of gray in the mosaic")
    arguments = parser.parse_args()
    if arguments.mosaic and arguments.images:
        cells = real(arguments.images, arguments.count, arguments.side)
        mosaic(cells, arguments.mosaic, arguments.across, arguments.grays)
    elif arguments.mosaic:
        studies = (draw_study(SEED, i, arguments.size) for i in range(arguments.count))
        pairs = ((v, p) for study in studies for v, p in zip(study.views, study.images, strict=True))
        cells = (cell(pixels.astype(np.float32) / 4095, view, arguments.side) for view, pixels in pairs)
        mosaic(cells, arguments.mosaic, arguments.across, arguments.grays)
    else:
        quality(arguments.seed, arguments.studies, arguments.size, arguments.workers)
        speed(arguments.images, arguments.workers)


if __name__ == "__main__":
    main()
