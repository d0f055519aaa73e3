"""What masked auto-encoding is good for: on drawn radiographs of 256 px, an encoder of `hd-mae-phantom` beside the same one
untrained, by a linear probe and by fine-tuning on few labels; and masks by the chest's contour beside random ones.

    python benchmarks/pretrain_learning.py runs/pretrain-learning             # three seeds, some three hours on two cores
    python benchmarks/pretrain_learning.py runs/pretrain-learning --seeds 1   # one of them

Every number is the mean AUROC over the findings, on test patients, of weights chosen by validation loss. What is finished is
not done again.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean

SIZE, STUDIES = 256, 2400
# Deeper than the spec's, which tells little more than random filters do, and with a stem that sees nothing of masked patches:
# convolutions over blanked ones learn other statistics than whole images have.
ENCODER = {"stem": "linear", "width": 192, "depth": 6, "heads": 3}
DECODER = {"name": "cross-attention", "dim": 128, "depth": 4, "heads": 4, "predicted": 0.25, "normalize_patches": True}
MASKERS = {
    "random": {"name": "random", "ratio": 0.75},
    "contour": {"name": "contour", "ratio": 0.75, "inner": 0.85, "outer": 0.68},
}
FRACTIONS = (0.01, 0.1)
# As MAE's own: without it a probe of the untrained encoder would still be far from its end when the other one is there.
PROBE = {"pooling": "encoder", "norm": "batch"}


def measure(folder: Path, seed: int, masker: str, epochs: float) -> dict[str, float]:
    """Pre-trains once, then judges: row of the table -> mean AUROC. Without a masker the encoder stays untrained."""
    import medxray

    data = {
        "reader": {"root": str(folder.parent / "data"), "studies": STUDIES, "size": SIZE},
        "image_size": SIZE,
        "views": "single",
    }
    weights = None
    if masker in MASKERS:
        weights = str(folder / "pretrain")
        overrides = {
            "data": {**data, "views": "average", "crop": 0.5},
            "encoder": ENCODER,
            "pixel_decoder": DECODER,
            "masker": MASKERS[masker],
            "training": {"epochs": epochs, "batch_size": 16, "pictures": 0},
        }
        medxray.build("hd-mae-phantom", {**overrides, "seed": seed, "output": weights}).fit(progress=False)

    def judged(run: str, **overrides: object) -> float:
        encoder = {**ENCODER, "weights": weights, **overrides.pop("encoder", {})}
        common = {"data": {**data, **overrides.pop("data", {})}, "encoder": encoder, "seed": seed}
        spec = {**common, "output": str(folder / run), **overrides}
        return medxray.build("classify-phantom", spec).fit(progress=False).evaluate(progress=False)["auroc"].value

    frozen = {"encoder": {"trainable": False}, "data": {"crop": 1.0}}
    training = {"epochs": 30, "learning_rate": 5e-3}
    found = {"linear probe": judged("probe", **frozen, head=PROBE, training=training)}
    # Random masks are compared by the probe alone.
    for fraction in FRACTIONS if masker != "random" else ():
        found[f"fine-tuned on {fraction:.0%}"] = judged(
            f"fine-tuned-{fraction}",
            data={"fraction": fraction},
            training={"epochs": None, "steps": 120, "batch_size": 16, "evaluate_steps": 30, "learning_rate": 1e-3},
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=6, help="of pre-training")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        seed, masker = int(chosen.one[0]), chosen.one[1]
        folder = chosen.folder / f"{masker}-{seed}"
        found = measure(folder, seed, masker, chosen.epochs)
        (folder / "auroc.json").write_text(json.dumps(found))
        return
    cases = [(masker, seed) for seed in range(chosen.seeds) for masker in ("untrained", *MASKERS)]
    waiting = [(m, s) for m, s in cases if not (chosen.folder / f"{m}-{s}" / "auroc.json").is_file()]
    running: list[subprocess.Popen[bytes]] = []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for masker, seed in waiting:
        command = [sys.executable, __file__, str(chosen.folder), "--epochs", str(chosen.epochs), "--one", str(seed), masker]
        running.append(subprocess.Popen(command, env=environment))
        # The first one draws the data.
        while len(running) >= (chosen.jobs if (chosen.folder / "data" / "phantom.json").is_file() else 1):
            if running.pop(0).wait():
                sys.exit(f"{masker}, seed {seed} failed")
    if any(job.wait() for job in running):
        sys.exit("a run failed")
    results = {case: json.loads((chosen.folder / f"{case[0]}-{case[1]}" / "auroc.json").read_text()) for case in cases}
    rows = list(results["untrained", 0])
    print("| encoder | " + " | ".join(rows) + " |\n| --- |" + " --- |" * len(rows))
    for masker in ("untrained", *MASKERS):
        cells = []
        for row in rows:
            values = [results[masker, seed].get(row) for seed in range(chosen.seeds)]
            known = [value for value in values if value is not None]
            cells.append(f"{mean(known):.3f} ({', '.join(f'{v:.3f}' for v in known)})" if known else "")
        print(f"| {masker} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
