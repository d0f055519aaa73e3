"""What `evaluate` makes of a classifier: thresholds chosen on validation, subgroups, curves, and what a reader is told."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

import medxray
from medxray.metrics.classification import best_threshold
from medxray.metrics.text import Bleu
from medxray.pipeline import Pipeline
from medxray.types import Scores

SIZES = {"train": 60, "val": 50, "test": 70}
LABELS = ("Bright", "Dark", "Never")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Squares whose brightness tells two labels, roughly; a third is there in training alone."""
    root = tmp_path_factory.mktemp("squares")
    rng = np.random.default_rng(0)
    lines = ["path,study_id,patient_id,view,split,sex,age," + ",".join(LABELS)]
    for split, count in SIZES.items():
        for i in range(count):
            level = int(rng.integers(40, 216))
            pixels = np.clip(rng.normal(level, 20, (32, 32)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"{split}{i}.png")
            labels = int(level + rng.normal(0, 30) > 150), int(level < 90), int(split == "train" and i % 4 == 0)
            # Of nine studies the sex is not told, of three the age is that of a child.
            sex, age = "" if i < 9 else "FM"[i % 2], 9 if i < 3 else 30 if i < 40 else 70
            told = (f"{split}{i}.png", f"{split}{i}", f"{split}{i // 2}", "AP" if i % 3 == 0 else "PA", split, sex, age)
            lines.append(",".join(map(str, (*told, *labels))))
    (root / "studies.csv").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def fitted(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    spec = {
        "task": "classify", "output": str(tmp_path_factory.mktemp("run") / "run"),
        "data": {"image_size": 32, "reader": {"name": "csv", "root": str(root)}},
        "encoder": {"name": "vit", "width": 16, "depth": 1, "heads": 2, "patch": 16},
        "training": {"steps": 40, "batch_size": 20, "learning_rate": 1e-2},
    }  # fmt: skip
    return medxray.build(spec).fit(progress=False)


@pytest.fixture
def asked(fitted: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the model has looked at each study."""
    seen: Counter[str] = Counter()
    predict = fitted.task.predict

    def counting(batch: Any) -> Any:
        seen.update(batch.study_ids)
        return predict(batch)

    monkeypatch.setattr(fitted.task, "predict", counting)
    return seen


def probabilities(fitted: Pipeline, split: str) -> tuple[np.ndarray, np.ndarray]:
    images = fitted.images(split)
    made = fitted._predict_all(fitted.task.predict, images, "", False)
    return np.array(fitted.task.outputs(made)), np.array(fitted.task.targets(images))


def f1_at(threshold: float, scores: np.ndarray, truth: np.ndarray) -> float:
    said = scores >= threshold
    return float(2 * (said & (truth == 1)).sum() / (said.sum() + truth.sum()))


def test_thresholds_come_from_validation_and_hold_for_the_test(fitted: Pipeline, asked: Counter[str]) -> None:
    scores = fitted.evaluate("test", progress=False)
    assert set(asked.values()) == {1} and len(asked) == SIZES["val"] + SIZES["test"]
    val, test = probabilities(fitted, "val"), probabilities(fitted, "test")
    for k, label in enumerate(LABELS[:2]):
        threshold = best_threshold(val[0][:, k], val[1][:, k])
        assert threshold != best_threshold(test[0][:, k], test[1][:, k]), "or this test tells nothing"
        assert scores[f"f1/{label}"].value == pytest.approx(f1_at(threshold, test[0][:, k], test[1][:, k]), abs=1e-12)
        (note,) = [note for note in scores.notes if note.startswith("f1: ")]
        assert "on the validation studies" in note and f"{label} {threshold:.3g}" in note and "Never 0.5" in note
    assert json.loads((fitted.folder / "scores.json").read_text())["notes"] == scores.notes


def test_the_validation_split_itself_is_looked_at_once_and_flatters(fitted: Pipeline, asked: Counter[str]) -> None:
    scores = fitted.evaluate("val", progress=False)
    assert set(asked.values()) == {1} and len(asked) == SIZES["val"]
    val = probabilities(fitted, "val")
    best = [f1_at(best_threshold(val[0][:, k], val[1][:, k]), val[0][:, k], val[1][:, k]) for k in range(2)]
    assert [scores[f"f1/{label}"].value for label in LABELS[:2]] == pytest.approx(best, abs=1e-12)
    assert any("chosen on the very studies that are scored" in note for note in scores.notes)


def test_without_validation_studies_a_half_is_used_and_said(
    fitted: Pipeline, asked: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = fitted.studies.splits
    monkeypatch.setitem(splits, "val", splits["val"].select([]))
    scores = fitted.evaluate("test", progress=False)
    assert len(asked) == SIZES["test"]
    monkeypatch.undo()
    test = probabilities(fitted, "test")
    assert scores["f1/Bright"].value == pytest.approx(f1_at(0.5, test[0][:, 0], test[1][:, 0]), abs=1e-12)
    assert "f1: the data set has no validation studies to choose on" in scores.notes
    assert any("from a score of 0.5; no threshold was chosen" in note for note in scores.notes)


def test_a_system_beside_has_thresholds_of_its_own(fitted: Pipeline, tmp_path: Path) -> None:
    other = medxray.build(fitted.spec, {"seed": 1, "output": str(tmp_path / "other")}).fit(progress=False)
    alone, theirs = (pipeline.evaluate("test", progress=False) for pipeline in (fitted, other))
    told = [next(note for note in scores.notes if note.startswith("f1: ")) for scores in (alone, theirs)]
    assert told[0] != told[1], "or this test tells nothing"
    scores = fitted.evaluate("test", beside={"other": other}, progress=False)
    # Draws of patients follow the seed of the one that is evaluated.
    assert scores.comparisons["other"]["f1"].value == theirs["f1"].value
    assert scores["f1"] == alone["f1"] and told[0] in scores.notes


def test_what_a_mean_covers_is_told(fitted: Pipeline) -> None:
    scores = fitted.evaluate("test", progress=False)
    assert math.isnan(scores["auroc/Never"].value) and math.isfinite(scores["ece/Never"].value)
    assert scores["auroc"].value == pytest.approx((scores["auroc/Bright"].value + scores["auroc/Dark"].value) / 2)
    (note,) = [note for note in scores.notes if "the mean of 2 of 3 labels" in note]
    assert note.startswith("auroc, average-precision, f1, sensitivity@0.90: ") and note.endswith(": Never")


def test_subgroups_of_the_data_set(fitted: Pipeline) -> None:
    scores = fitted.evaluate("test", progress=False)
    assert {by: list(groups) for by, groups in scores.subgroups.items()} == {
        "sex": ["female", "male", "unknown"], "age": ["0-17", "18-39", "65-79"], "view": ["AP", "PA"],
    }  # fmt: skip
    scores_of, truth = probabilities(fitted, "test")
    own = np.array(fitted.images("test").sexes) == "female"
    female = scores.subgroups["sex"]["female"]
    assert female["auroc"].n == own.sum() == 30 and list(female) == list(scores)
    above = [a > b for a in scores_of[own & (truth[:, 0] == 1), 0] for b in scores_of[own & (truth[:, 0] == 0), 0]]
    assert female["auroc/Bright"].value == pytest.approx(np.mean(above), abs=1e-12)
    assert female["auroc"].low <= female["auroc"].value <= female["auroc"].high
    assert scores.subgroups["age"]["0-17"]["auroc"].n == 3 and math.isnan(scores.subgroups["age"]["0-17"]["brier"].value)
    assert "groups of fewer than 20 studies are not scored: sex unknown (9), age 0-17 (3)" in scores.notes
    kept = Scores.from_dict(json.loads((fitted.folder / "scores.json").read_text()))
    assert kept.subgroups["sex"]["female"]["f1"] == female["f1"]
    assert "female" not in str(scores), "the printed table stays short"
    assert fitted.evaluate("test", subgroups=False, progress=False).subgroups == {}


def test_subgroups_of_reports(phantom: Path, tmp_path: Path) -> None:
    spec = {
        "task": "report", "output": str(tmp_path / "run"),
        "data": {"image_size": 32, "reader": {"name": "csv", "root": str(phantom), "report": "findings"}, "split": "patient",
                 "split_shares": [0.3, 0.1, 0.6]},
        "encoder": {"name": "vit", "width": 16, "depth": 1, "heads": 2, "patch": 16},
        "decoder": {"name": "memory-transformer", "width": 16, "hidden": 16, "heads": 1, "layers": 1, "slots": 1},
        "training": {"steps": 2, "batch_size": 8}, "generation": {"max_new_tokens": 8}, "metrics": ["bleu", "rouge-l"],
    }  # fmt: skip
    pipeline = medxray.build(spec).fit(progress=False)
    scores = pipeline.evaluate("test", ablations=False, progress=False)
    images = pipeline.images("test")
    texts = [row["text"] for row in parquet.read_table(tmp_path / "run" / "predictions.parquet").to_pylist()]
    assert {"sex", "age", "view"} == set(scores.subgroups)
    own = [i for i, sex in enumerate(images.sexes) if sex == "female"]
    alone = Bleu().compute(predictions=[texts[i] for i in own], references=[images.reports[i] for i in own])
    female = scores.subgroups["sex"]["female"]
    assert len(own) >= 20 and female["rouge-l"].n == len(own) and list(female) == list(scores)
    assert {name: female[name].value for name in alone} == pytest.approx(alone, abs=1e-12)


def test_the_page_has_reliability_curves(fitted: Pipeline) -> None:
    fitted.evaluate("test", progress=False)
    page = (fitted.folder / "report.html").read_text()
    for name in ("all labels", "Bright", "Dark"):
        assert f"{name}: share that has it against probability, ECE" in page
    assert "Never: share" not in page
