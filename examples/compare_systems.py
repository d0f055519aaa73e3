"""The systems side by side on drawn radiographs: one command, one table.

    python examples/compare_systems.py                  # three seeds, a few hours on two cores
    python examples/compare_systems.py --seeds 1        # a third of that

In the papers an encoder knows images before it learns to report. Here one that has learned to name findings stands in for
weights from ImageNet; R2GenCSR, R2GenGPT and R2Gen write from what it sees. In the row of HD X-ray MAE the same encoder begins
with masked auto-encoding. R2GenGPT is R2GenCSR fitted without context, so that its row is the ablation "context off".

Scores are those of test patients whom no fit has seen, over their studies under all seeds together. Their 95 % intervals are
by a bootstrap over patients, each drawn with all of their studies, and so tell of patients; what another seed changes is the
standard deviation beside them. What is finished is not done again: the command goes on where it was stopped.
"""

import argparse
import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import stdev
from typing import Any, NamedTuple

import pyarrow.parquet as parquet
from torch.nn import functional as F

import medxray
from medxray.metrics.findings import FindingF1
from medxray.metrics.intervals import score_all
from medxray.metrics.text import Bleu, Cider, RougeL
from medxray.types import Score
from medxray.visual.charts import interval_chart

# Run -> what it is called, packaged spec, overrides. "weights" names another run of the same seed.
ENCODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "pretrain": ("masked auto-encoding", "hd-mae-phantom", {}),
    "classify": ("findings", "classify-phantom", {}),
    "hd-mae": ("findings after masked auto-encoding", "classify-phantom", {"encoder": {"weights": "pretrain"}}),
}
SEEING = {"encoder": {"weights": "classify", "trainable": False}}
SYSTEMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "hd-mae-reports": (
        "HD X-ray MAE + report decoder", "r2gengpt-phantom", {"encoder": {"weights": "hd-mae", "trainable": False}}
    ),
    "r2gencsr": ("R2GenCSR (fixed context, release)", "r2gencsr-phantom", SEEING),
    "r2gengpt": ("R2GenGPT (context off)", "r2gengpt-phantom", SEEING),
    "r2gen": ("R2Gen", "r2gen-phantom", SEEING),
    "nearest": ("R2GenCSR, nearest context", "r2gencsr-nearest-phantom", SEEING),
    **{
        mode: (f"R2GenCSR, fixed, {mode}", "r2gencsr-phantom", {**SEEING, "retriever": {"residual": mode}})
        for mode in ("after_projection", "before_projection", "none")
    },
}  # fmt: skip
RETRIEVED = "nearest report by the encoder's features"
FLOORS = ("nearest image's report", "best constant report", "most frequent report")
MEASURES = ("finding-f1", "finding-micro-f1", "bleu-1", "bleu-4", "rouge-l", "cider")


class Comparison(NamedTuple):
    """What is compared.

    Attributes:
        folder: gets the radiographs, a folder a seed with its runs, and the table.
        seeds: of the fits; the radiographs and their split stay the same.
        studies: drawn, of whom some 10 % are test patients'.
        steps: optimiser steps of each fit for a try; None for what the specs say.
    """

    folder: Path
    seeds: int = 3
    studies: int = 2400
    steps: int | None = None

    def place(self, run: str, seed: int) -> Path:
        """The folder of a run."""
        return self.folder / f"seed-{seed}" / run

    def build(self, run: str, seed: int) -> medxray.Pipeline:
        """A run, not fitted yet."""
        _, spec, overrides = (ENCODERS | SYSTEMS)[run]
        ours: dict[str, Any] = {
            **overrides,
            "name": run,
            "seed": seed,
            "output": str(self.place(run, seed)),
            "data": {"reader": {"root": str(self.folder / "data"), "studies": self.studies}},
        }
        if "encoder" in overrides:
            weights = self.place(overrides["encoder"]["weights"], seed)
            ours["encoder"] = {**overrides["encoder"], "weights": str(weights)}
        if self.steps is not None:
            ours["training"] = {"epochs": None, "steps": self.steps}
        return medxray.build(spec, ours)

    def run(self, job: tuple[str, int]) -> str:
        """Fits a run and evaluates it; what is there already is kept."""
        run, seed = job
        folder = self.place(run, seed)
        if not (folder / "scores.json").is_file():
            pipeline = self.build(run, seed).fit(progress=False)
            if run in SYSTEMS:
                pipeline.evaluate(ablations=False, progress=False)
        return f"seed {seed}: {(ENCODERS | SYSTEMS)[run][0]}"

    def run_all(self, jobs: int) -> None:
        """Every run, those first whose weights others take."""
        _ = self.build("classify", 0).studies  # draws the radiographs, before several processes want them
        for stage in (("pretrain", "classify"), ("hd-mae",), tuple(SYSTEMS)):
            work = [(run, seed) for seed in range(self.seeds) for run in stage]
            if jobs == 1:
                for job in work:
                    print(self.run(job), flush=True)
                continue
            os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
            with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
                for line in pool.map(self.run, work):
                    print(line, flush=True)

    def rows(self) -> tuple[dict[str, dict[str, Score]], dict[str, dict[str, float]]]:
        """The table of finished runs: row -> measure -> score over all seeds, and its standard deviation between seeds."""
        test = self.build("r2gengpt", 0).studies.splits["test"]
        references, patients = list(test["report"]), list(test["patient_id"])
        metrics = [FindingF1(), Bleu(), RougeL(), Cider()]
        texts = {title: [self.written(run, seed) for seed in range(self.seeds)] for run, (title, *_) in SYSTEMS.items()}
        texts[RETRIEVED] = [self.retrieved(seed) for seed in range(self.seeds)]
        rows, spread = {}, {}
        for row, written in texts.items():
            together = [text for one in written for text in one]
            rows[row] = score_all(metrics, together, references * self.seeds, patients * self.seeds)
            each = [score_all(metrics, one, references, patients, resamples=0) for one in written]
            spread[row] = {m: stdev(scores[m].value for scores in each) if len(each) > 1 else 0.0 for m in MEASURES}
        # No seed has a part in these.
        scores = json.loads((self.place("r2gengpt", 0) / "scores.json").read_text(encoding="utf-8"))
        floors = medxray.Scores.from_dict(scores).comparisons
        return rows | {row: floors[row] for row in FLOORS}, spread

    def written(self, run: str, seed: int) -> list[str]:
        """The reports of the test studies that a run has generated."""
        table = parquet.read_table(self.place(run, seed) / "predictions.parquet", columns=["text"])
        return list(table["text"].to_pylist())

    def retrieved(self, seed: int) -> list[str]:
        """For each test study the report of the training study that the systems' encoder finds most like it."""
        pipeline = self.build("r2gengpt", seed)
        train, test = pipeline.images("train"), pipeline.images("test")
        known, asked = (F.normalize(images.features.pooled[:, 0], dim=1) for images in (train, test))
        return [train.reports[i] for i in (asked @ known.T).argmax(1)]


def markdown(rows: dict[str, dict[str, Score]], spread: dict[str, dict[str, float]], seeds: int) -> str:
    """The table as Markdown."""
    lines = ["| | " + " | ".join(MEASURES) + " |", "| --- " * (len(MEASURES) + 1) + "|"]
    for row, scores in rows.items():
        cells = []
        for measure in MEASURES:
            score, apart = scores[measure], f" ±{spread[row][measure]:.3f}" if row in spread and seeds > 1 else ""
            cells.append(f"{score.value:.3f} ({score.low:.3f}-{score.high:.3f}){apart}")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    n = max(score.n for score in rows["R2Gen"].values()) // seeds
    note = f"{n} studies of test patients. In brackets the 95 % interval by a bootstrap over patients."
    if seeds > 1:
        note += f" Over {seeds} seeds together; after ± the standard deviation between seeds. The last rows take no fit."
    return "\n".join([*lines, "", note, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/compare-systems"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--studies", type=int, default=2400, help="radiographs to draw")
    parser.add_argument("--jobs", type=int, default=1, help="fits at once, which share the cores")
    parser.add_argument("--steps", type=int, help="optimiser steps of each fit, for a try")
    options = parser.parse_args(arguments)
    comparison = Comparison(options.folder, options.seeds, options.studies, options.steps)
    comparison.run_all(options.jobs)
    rows, spread = comparison.rows()
    text = markdown(rows, spread, options.seeds)
    (options.folder / "table.md").write_text(text, encoding="utf-8")
    chart = interval_chart(rows, ("finding-f1", "bleu-4", "cider"), floors=(RETRIEVED, *FLOORS))
    (options.folder / "table.svg").write_text(chart, encoding="utf-8")
    print(f"\n{text}\n{options.folder / 'table.md'}, {options.folder / 'table.svg'}")


if __name__ == "__main__":
    main()
