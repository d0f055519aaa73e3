"""From images without labels to findings from few: masked auto-encoding, then what it is worth.

    python examples/pretrain_then_classify.py            # drawn radiographs, some ten minutes on two cores
    python examples/pretrain_then_classify.py FOLDER     # your own: studies.csv and images, as reader csv takes them

Pre-training hides more of the chest than of the rest, by the contour that is found in each image. Its encoder is then judged
three ways beside one that was not trained: a linear probe, the nearest neighbours, and fine-tuning on a tenth of the labels.
"""

import sys

import medxray

OWN = sys.argv[1:2]
READER = {"name": "csv", "root": OWN[0]} if OWN else {"name": "phantom", "root": "data/phantom", "studies": 2400, "size": 128}
DATA = {"reader": READER, "image_size": 128}
RUNS = "runs/pretrain-then-classify"


def pretrain() -> medxray.Pipeline:
    """Masked auto-encoding; pictures of it after every epoch are in the run folder."""
    masker = {"name": "contour", "ratio": 0.75, "inner": 0.85, "outer": 0.68}
    overrides = {"data": DATA, "masker": masker, "training": {"epochs": 4}, "output": f"{RUNS}/pretrain"}
    return medxray.build("hd-mae-phantom", overrides).fit()


def judge(name: str, weights: str | None, **overrides: object) -> float:
    """Mean AUROC on test patients."""
    settings = {
        "frozen": {"trainable": False, "weights": weights},
        "fine-tuned": {"trainable": True, "weights": weights},
    }
    data = {**DATA, **overrides.pop("data", {})}
    spec = {"data": data, "encoder": settings[overrides.pop("encoder")], "output": f"{RUNS}/{name}", **overrides}
    return medxray.build("classify-phantom", spec).fit().evaluate()["auroc"].value


WAYS = {
    "linear probe": {"encoder": "frozen", "head": {"pooling": "encoder"}, "data": {"crop": 1.0}},
    "nearest neighbours": {
        "encoder": "frozen", "head": {"name": "k-nearest"}, "data": {"crop": 1.0}, "training": {"epochs": None, "steps": 1}
    },
    "fine-tuned on 10 %": {
        "encoder": "fine-tuned", "data": {"fraction": 0.1}, "training": {"epochs": 15, "learning_rate": 1e-3}
    },
}  # fmt: skip

if __name__ == "__main__":
    pretrained = pretrain()
    print("pictures:", *pretrained.pictures())
    for way, overrides in WAYS.items():
        words = way.replace(" ", "-").replace("%", "percent")
        trained = judge(f"{words}-pretrained", str(pretrained.folder), **overrides)
        scratch = judge(f"{words}-untrained", None, **overrides)
        print(f"{way:>20}: mean AUROC {trained:.3f} after pre-training, {scratch:.3f} without")
