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

STUDIES, SIZE = 2400, 128


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed-of-data", type=int, default=0)
    arguments = parser.parse_args()
    settings = {
        "root": str(arguments.folder / "data"), "studies": STUDIES, "size": SIZE, "seed": arguments.seed_of_data
    }  # fmt: skip
    scores = demo.run(arguments.folder / "images", reader=settings)
    shuffled = demo.run(arguments.folder / "shuffled", reader={"name": "shuffled-phantom", **settings})
    floors = {row: scores.comparisons[row]["finding-f1"] for row in ("most frequent report", "nearest image's report")}
    best = max(score.value for score in floors.values())
    print("\nmean F1 over the phantom's findings, read back from generated reports of test patients")
    for row, score in {
        "demo": scores["finding-f1"],
        "context off": scores.comparisons["same model, context off"]["finding-f1"],
        "fitted without a retriever": scores.comparisons["fitted without a retriever"]["finding-f1"],
        "fitted with shuffled images": shuffled["finding-f1"],
        **floors,
    }.items():
        print(f"{row:>28}  {score}")
    print(f"above the better floor: {scores['finding-f1'].value - best:+.3f} with images as they are, "
          f"{shuffled['finding-f1'].value - best:+.3f} shuffled")


if __name__ == "__main__":
    main()
