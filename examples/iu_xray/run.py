"""Both papers and their baselines on real radiographs, IU X-Ray in R2Gen's layout, with a real language model: one command.

    python examples/iu_xray/run.py --root data/iu_xray
    python examples/iu_xray/run.py --root data/iu_xray --split test    # judged on another split, the fits kept

Masked auto-encoding sees the training images alone; then the encoder learns the tags that people gave the training studies.
R2Gen, R2GenGPT and R2GenCSR write from what that encoder sees. The three systems with SmolLM2 begin with one fit that has no
context and go on for the same number of steps each: without context, with a fixed one and with the nearest, so that what
differs between them is the context.

Where a fit chooses its weights it does so on the validation split; scores on it are therefore a little kind, and those of a
test split are not. What is finished is not done again: the command goes on where it was stopped.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as parquet
from torch.nn import functional as F

import medxray
from medxray.metrics import Metric
from medxray.metrics.clinical import label_reports
from medxray.metrics.intervals import difference, distinct_share, score_all
from medxray.metrics.text import Bleu, Cider, RougeL
from medxray.types import Score
from medxray.visual.charts import interval_chart

HERE = Path(__file__).parent
# Run -> spec beside this file, overrides; "weights" names another run.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "pretrain": ("pretrain", {}),
    "findings": ("findings", {"encoder": {"weights": "pretrain"}}),
    "r2gen": ("r2gen", {"encoder": {"weights": "findings"}}),
    "language": ("r2gengpt", {"encoder": {"weights": "findings"}}),
    "r2gengpt": ("r2gencsr", {"weights": "language", "retriever": None}),
    "r2gencsr-fixed": ("r2gencsr", {"weights": "language"}),
    "r2gencsr-nearest": ("r2gencsr", {"weights": "language", "retriever": {"name": "nearest"}}),
}
SYSTEMS = {
    "r2gen": "R2Gen",
    "r2gengpt": "R2GenGPT (context off)",
    "r2gencsr-fixed": "R2GenCSR, fixed context",
    "r2gencsr-nearest": "R2GenCSR, nearest context",
}
RETRIEVED = "nearest report by the encoder's features"
FLOORS = ("best constant report", "most frequent report", "nearest image's report")
MEASURES = ("bleu-1", "bleu-4", "rouge-l", "cider", "tag-f1", "tag-f1-macro")

# CheXpert's names -> tags of the collection that say the same.
TAGS: Mapping[str, tuple[str, ...]] = {
    "Cardiomegaly": ("Cardiomegaly",),
    "Lung Lesion": ("Calcified Granuloma", "Granuloma", "Nodule", "Mass", "Granulomatous Disease"),
    "Lung Opacity": ("Opacity", "Infiltrate", "Airspace Disease", "Density", "Consolidation", "Pneumonia"),
    "Edema": ("Pulmonary Congestion", "Pulmonary Edema"),
    "Atelectasis": ("Pulmonary Atelectasis",),
    "Pleural Effusion": ("Pleural Effusion",),
    "Pleural Other": ("Thickening", "Costophrenic Angle"),
    "Fracture": ("Fractures, Bone",),
    "Support Devices": ("Catheters, Indwelling", "Surgical Instruments", "Implanted Medical Device", "Medical Device"),
}


class TagF1(Metric):
    """F1 of the findings that a report names, read by `label_reports`, against the tags that people gave the study: pooled
    over findings, and its mean over those that some study has. In doubt counts as named.

    References are sets of tags. Statistics: true positives of each finding, false positives, false negatives.
    """

    values = ("tag-f1", "tag-f1-macro")

    def statistics(self, predictions: Sequence[str], references: Sequence[set[str]]) -> np.ndarray:
        named = np.array([[found.get(name, 0) != 0 for name in TAGS] for found in label_reports(list(predictions))])
        given = np.array([[not tags.isdisjoint(TAGS[name]) for name in TAGS] for tags in references])
        return np.concatenate([named & given, named & ~given, ~named & given], axis=1).astype(np.float64)

    def reduce(self, statistics: np.ndarray, weights: np.ndarray) -> np.ndarray:
        hits, extra, missed = np.split(weights @ statistics, 3, axis=1)
        with np.errstate(invalid="ignore"):
            each = np.where(hits + missed > 0, 2 * hits / (2 * hits + extra + missed), np.nan)
            pooled = 2 * hits.sum(1) / (2 * hits + extra + missed).sum(1)
        return np.stack([pooled, np.nanmean(each, axis=1)], axis=1)


class Study(NamedTuple):
    """What is run.

    Attributes:
        root: the data set.
        folder: gets the runs and the table.
        split: on which the systems are judged.
        overrides: of every spec, such as fewer steps for a try.
    """

    root: Path
    folder: Path
    split: str = "val"
    overrides: Mapping[str, Any] = {}

    def build(self, run: str) -> medxray.Pipeline:
        """A run, not fitted yet."""
        spec, overrides = RUNS[run]
        ours: dict[str, Any] = {"name": run, "output": str(self.folder / run), "data": {"reader": {"root": str(self.root)}}}
        read = medxray.Spec.read(medxray.Spec.read(HERE / f"{spec}.yaml", ours), dict(self.overrides)).to_dict()
        if "weights" in overrides:
            read["weights"] = str(self.folder / overrides["weights"])
        if "weights" in overrides.get("encoder", {}):
            read["encoder"]["weights"] = str(self.folder / overrides["encoder"]["weights"])
        if "retriever" in overrides:
            read["retriever"] = overrides["retriever"] and {**read["retriever"], **overrides["retriever"]}
        return medxray.build(read)

    def run(self, run: str) -> None:
        """Fits a run and, if it is a system, has it write the reports of the split; what is there already is kept."""
        folder = self.folder / run
        print(f"{run}: {folder}", flush=True)
        pipeline = medxray.load(folder) if (folder / "task.json").is_file() else self.build(run).fit()
        notes = json.loads((folder / "scores.json").read_text())["notes"] if (folder / "scores.json").is_file() else [""]
        if run != "language" and not notes[0].startswith(f"split: {self.split};"):
            print(pipeline.evaluate(self.split, ablations=False), flush=True)

    def written(self, run: str) -> list[str]:
        """The reports that a run has generated."""
        return list(parquet.read_table(self.folder / run / "predictions.parquet", columns=["text"])["text"].to_pylist())

    def texts(self) -> tuple[dict[str, list[str]], list[str], list[set[str]], list[str]]:
        """Row -> reports of the split; the reports and tags that people gave, and whose they are."""
        pipeline = self.build("language")
        train, val, judged = (pipeline.images(split) for split in ("train", "val", self.split))
        rows = {title: self.written(run) for run, title in SYSTEMS.items()}
        known, asked = (F.normalize(images.features.pooled.sum(1), dim=1) for images in (train, judged))
        rows[RETRIEVED] = [train.reports[i] for i in (asked @ known.T).argmax(1)]
        rows |= {row: floor("bleu-4") for row, floor in pipeline.task.floors(train, val, judged).items()}
        tags = [{name for name, value in row.items() if value == 1} for row in pipeline.studies.splits[self.split]["labels"]]
        return rows, list(judged.reports), tags, list(judged.patient_ids)

    def table(self) -> tuple[dict[str, dict[str, Score]], str]:
        """Row -> measure -> score, and all of it as Markdown."""
        rows, references, tags, patients = self.texts()
        text = [Bleu(), RougeL(), Cider()]
        scores = {
            row: score_all(text, texts, references, patients) | score_all([TagF1()], texts, tags, patients)
            for row, texts in rows.items()
        }
        lines = ["| | " + " | ".join(MEASURES) + " | distinct |", "| --- " * (len(MEASURES) + 2) + "|"]
        for row, found in scores.items():
            cells = [str(found[measure]) for measure in MEASURES]
            lines.append(f"| {row} | " + " | ".join(cells) + f" | {distinct_share(rows[row]):.2f} |")
        lines += [
            "",
            f"{len(references)} studies of split {self.split}; in brackets the 95 % interval by a bootstrap over patients.",
            "The last rows take no fit. tag-f1: findings that a report names against the tags that people gave.",
            "",
            "What the context adds to R2GenGPT, the same studies drawn for both:",
            "",
        ]
        off = rows[SYSTEMS["r2gengpt"]]
        for run in ("r2gencsr-fixed", "r2gencsr-nearest"):
            own = rows[SYSTEMS[run]]
            apart = difference(Cider(), own, off, references, patients) | difference(TagF1(), own, off, tags, patients)
            apart |= difference(Bleu(), own, off, references, patients)
            told = [
                f"{measure} {apart[measure].value:+.3f} ({apart[measure].low:+.3f} to {apart[measure].high:+.3f})"
                for measure in ("bleu-4", "cider", "tag-f1")
            ]
            lines.append(f"- {SYSTEMS[run]}: {', '.join(told)}")
        return scores, "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None, overrides: Mapping[str, Any] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("data/iu_xray"), help="holds annotation.json, images/, reports.csv")
    parser.add_argument("--folder", type=Path, default=Path("runs/iu_xray"), help="gets the runs and the table")
    parser.add_argument("--split", choices=("val", "test"), default="val", help="on which the systems are judged")
    options = parser.parse_args(arguments)
    study = Study(options.root, options.folder, options.split, overrides or {})
    for run in RUNS:
        study.run(run)
    scores, text = study.table()
    (options.folder / f"table-{options.split}.md").write_text(text, encoding="utf-8")
    chart = interval_chart(scores, ("bleu-4", "cider", "tag-f1"), floors=(RETRIEVED, *FLOORS))
    (options.folder / f"table-{options.split}.svg").write_text(chart, encoding="utf-8")
    print(f"\n{text}\n{options.folder / f'table-{options.split}.md'}")


if __name__ == "__main__":
    main()
