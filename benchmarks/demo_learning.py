"""Do generated reports come from the images? The demo as it is, and once more fitted with every training study given
the images of another, both judged on the same untouched test patients.

    python benchmarks/demo_learning.py runs/demo-learning

A model that learns from priors alone scores the same in both. Takes twice the demo's time.
"""

import argparse
import random
from pathlib import Path

import medxray
from medxray import demo
from medxray.data.readers.phantom import Phantom
from medxray.types import Score

STUDIES, SIZE = 2400, 128
FLOORS = ("most frequent report", "nearest image's report")


@medxray.readers.register("shuffled-phantom")
class ShuffledPhantom(Phantom):
    """The phantom with the images of the training and validation studies dealt out anew."""

    def read(self):
        studies = list(super().read())
        for split in ("train", "val"):
            rows = [i for i, study in enumerate(studies) if study["split"] == split]
            dealt = list(rows)
            random.Random(0).shuffle(dealt)
            images = {row: (studies[other]["images"], studies[other]["views"]) for row, other in zip(rows, dealt, strict=True)}
            for row, (files, views) in images.items():
                studies[row] = {**studies[row], "images": files, "views": views}
        return studies


def measure(folder: Path) -> dict[str, Score]:
    """Mean F1 over the phantom's findings, read back from generated reports of test patients: row -> score."""
    settings = {"root": str(folder / "data"), "studies": STUDIES, "size": SIZE}
    scores = demo.run(folder / "images", reader=settings)
    shuffled = demo.run(folder / "shuffled", reader={"name": "shuffled-phantom", **settings})
    beside = {row: values["finding-f1"] for row, values in scores.comparisons.items()}
    return {"demo": scores["finding-f1"], **beside, "fitted with shuffled images": shuffled["finding-f1"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    measured = measure(parser.parse_args().folder)
    floor = max(measured[row].value for row in FLOORS)
    print("\nmean F1 over the phantom's findings, read back from generated reports of test patients")
    for row, score in measured.items():
        print(f"{row:>28}  {score}  {score.value - floor:+.3f} above the better floor")


if __name__ == "__main__":
    main()
