"""A fitted model judged on a split, beside its floors and other systems; what a table and a page are made of."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as arrow
from pyarrow import parquet

from medxray import disk
from medxray.data import StudyImages
from medxray.metrics import Metric
from medxray.metrics.floors import beside_floors, repetition
from medxray.metrics.intervals import score_all, seeds
from medxray.metrics.subgroups import describe, score_subgroups
from medxray.tasks import Task
from medxray.types import Prediction, Score, Scores, for_json

System = Callable[[str], list[Any]]
"""Name of a split -> what a system says of each of its studies, in the form that metrics take."""


class Judged(NamedTuple):
    """What an evaluation found.

    Attributes:
        scores: the table.
        references: what each study was scored against.
        each: name of a value -> every study's own (n,), of metrics under which a study alone has one.
        calibration: figures on whether probabilities can be believed, as HTML.
    """

    scores: Scores
    references: list[Any]
    each: dict[str, np.ndarray]
    calibration: list[str]


def judge(
    task: Task,
    metrics: Sequence[Metric],
    split: str,
    images: Mapping[str, StudyImages],
    predictions: Sequence[Prediction],
    system: System,
    others: Mapping[str, System],
    *,
    protocol: str | None = None,
    subgroups: bool = True,
) -> Judged:
    """Scores with intervals. What a metric has to choose, such as a threshold, each system chooses on the validation studies.

    Args:
        task: of the model.
        metrics: what is computed.
        split: whose studies are scored.
        images: of that split, of train, and of val where the data set has one.
        predictions: of the split.
        system: what `task` says; of another split it is asked only where a metric chooses.
        others: row of the table -> another system.
        protocol: as `Task.as_scored` takes it.
        subgroups: score groups of studies too.
    """
    seed, shown = task.spec.seed, images[split]
    groups, validation = shown.patient_ids, images.get("val", shown)
    references, told = task.as_scored(task.targets(shown), protocol)
    outputs, chooses = system(split), [metric for metric in metrics if metric.chooses]
    choosing = chooses if "val" in images else []

    def choose(system: System, outputs: list[Any]) -> None:
        if choosing:
            validated, known = (outputs, references) if split == "val" else (system("val"), task.targets(validation))
            for metric in choosing:
                metric.choose(validated, known)

    floors = task.floors(images["train"], validation, shown, task.as_scored(task.targets(validation), protocol)[0])
    settled = [metric for metric in metrics if not metric.chooses]
    comparisons, verdicts = beside_floors(settled, outputs, floors, references, groups, seed=seed)
    if told:
        said = {row: floor(metrics[0].values[0]) for row, floor in floors.items()}
        verdicts = repetition(outputs, references, said) + verdicts
    for row, other in others.items():
        theirs = other(split)
        choose(other, theirs)
        comparisons[row] = score_all(metrics, theirs, references, groups, seed=seed)
    choose(system, outputs)
    statistics = [metric.statistics(outputs, references) for metric in metrics]
    own: dict[str, Score] = {}
    for metric, rows in zip(metrics, statistics, strict=True):
        own |= seeds(metric, [rows], groups, seed=seed)
    parted = score_subgroups(metrics, statistics, groups, shown.attributes if subgroups else {}, seed=seed)
    scores = Scores(own, comparisons, title=task.spec.name, subgroups=parted, protocol=told)
    patients = len({group or row for row, group in enumerate(groups)})
    scores.notes = [f"split: {split}; {patients} patients", *(note for metric in metrics for note in metric.notes())]
    for metric in chooses:
        if split == "val":
            why = "chosen on the very studies that are scored, which flatters it; evaluate another split"
        elif not choosing:
            why = "the data set has no validation studies to choose on"
        else:
            continue
        scores.notes.append(f"{metric.values[0]}: {why}")
    scores.notes += task.notes(predictions, scores) + verdicts + describe(parted, own)
    each = {
        name: column
        for metric, rows in zip(metrics, statistics, strict=True)
        # Ranks are of many studies.
        if metric.takes != "labels"
        for name, column in zip(metric.values, metric.each(rows).T, strict=True)
    }
    return Judged(scores, references, each, task.calibration(outputs, references))


def write_predictions(
    path: Path, predictions: Sequence[Prediction], references: Sequence[Any], patients: Sequence[str], split: str
) -> None:
    """What `medxray compare` reads: each study with its patient, its split, what is said of it and what is true."""
    rows = [
        {
            "study_id": p.study_id,
            "patient_id": patient,
            "split": split,
            "text": p.text,
            "reference": r if isinstance(r, str) else None,
            "scores": json.dumps(p.scores),
            "labels": json.dumps(for_json(dict(zip(p.scores, r, strict=True)))) if isinstance(r, list) else None,
            "context_positive": p.context.get("positive", []),
            "context_negative": p.context.get("negative", []),
            "similarity_positive": p.similarity.get("positive", []),
            "similarity_negative": p.similarity.get("negative", []),
            "log_probabilities": p.log_probabilities,
            "words": [word.text for word in p.words],
            "word_probabilities": [word.probability for word in p.words],
        }
        for p, r, patient in zip(predictions, references, patients, strict=True)
    ]
    with disk.replacing(path) as staged:
        parquet.write_table(arrow.Table.from_pylist(rows), staged, write_page_checksum=True)
