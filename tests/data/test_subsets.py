"""Subsets of the training split: by patient, stratified by label, one inside the other, the same everywhere."""

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medxray.data import load_studies
from medxray.data.readers import READERS
from medxray.data.subsets import subset
from medxray.spec import DataSpec, Spec
from medxray.types import SpecError, Study

FRACTIONS = (0.01, 0.03, 0.1, 0.25, 0.5, 0.77)
RATES = {"common": 0.4, "some": 0.1, "rare": 0.02, "rarest": 0.005}


def study(name: str, patient: str, labels: dict[str, Any], split: str = "train") -> Study:
    return Study(
        study_id=name, patient_id=patient, images=[f"{name}.png"], views=["PA"], findings="", impression="", report="",
        labels=labels, split=split,
    )  # fmt: skip


def cohort(patients: int, missing: float = 0.2, seed: int = 0) -> list[Study]:
    """One to four studies a patient, whose labels go together as findings do; some uncertain, some missing."""
    draw = np.random.default_rng(seed)
    found = []
    for p in range(patients):
        ill = draw.random() < 0.5
        for s in range(draw.integers(1, 5)):
            labels: dict[str, int | None] = {}
            for label, rate in RATES.items():
                value = int(ill and draw.random() < 2 * rate)
                labels[label] = None if draw.random() < missing else -1 if draw.random() < 0.02 else value
            found.append(study(f"s{p}.{s}", f"p{p}", labels))
    return found


def patients_of(studies: Sequence[Study]) -> set[str]:
    return {s["patient_id"] or s["study_id"] for s in studies}


def positive(studies: Sequence[Study], label: str) -> set[str]:
    return {s["patient_id"] or s["study_id"] for s in studies if s["labels"].get(label) == 1}


def rate(studies: Sequence[Study], label: str) -> float:
    """Share of patients with the label among those for whom it is known."""
    known = {s["patient_id"] or s["study_id"] for s in studies if s["labels"].get(label) in (0, 1)}
    return len(positive(studies, label)) / len(known)


def test_nested_whole_patients_and_as_many_as_asked_for() -> None:
    studies = cohort(2000)
    whole = patients_of(studies)
    before: set[str] = set()
    for fraction in FRACTIONS:
        part = subset(studies, fraction)
        own = patients_of(part)
        assert before < own, "a smaller subset lies in every larger one"
        assert len(own) == round(fraction * len(whole))
        assert part == [s for s in studies if s["patient_id"] in own], "all studies of a patient, in the reader's order"
        before = own
    assert subset(studies, 1.0) == studies


@pytest.mark.parametrize("missing", [0.0, 0.2, 0.9])
def test_the_rate_of_every_label_is_kept(missing: float) -> None:
    studies = cohort(4000, missing)
    for fraction in FRACTIONS:
        part = subset(studies, fraction)
        count = len(patients_of(part))
        for label in RATES:
            expected = fraction * len(positive(studies, label))
            # Findings go together, so that not every one's count can be exact.
            assert abs(len(positive(part, label)) - expected) <= 1.5 + 0.003 * count, (fraction, label)
            if expected >= 1:
                assert positive(part, label), f"{label} is lost at {fraction}"
            if missing < 0.5:
                assert abs(rate(part, label) - rate(studies, label)) < 3 / count + 0.01


def test_it_is_far_closer_than_chance() -> None:
    """The largest error of a label's rate at 5 %, against that of patients drawn at random."""
    studies = cohort(3000)
    everyone = sorted(patients_of(studies))

    def error(part: Sequence[Study]) -> float:
        return max(abs(len(positive(part, label)) / 150 - len(positive(studies, label)) / 3000) for label in RATES)

    drawn = []
    for seed in range(20):
        chosen = set(random.Random(seed).sample(everyone, 150))
        drawn.append(error([s for s in studies if s["patient_id"] in chosen]))
    assert error(subset(studies, 0.05)) < 0.5 * min(np.median(drawn), 1)


def test_it_hangs_on_names_alone() -> None:
    studies = cohort(500)
    chosen = {s["study_id"] for s in subset(studies, 0.1)}
    shuffled = random.Random(1).sample(studies, len(studies))
    assert {s["study_id"] for s in subset(shuffled, 0.1)} == chosen
    renamed = [Study(**{**s, "patient_id": "x" + s["patient_id"]}) for s in studies]
    assert {s["study_id"] for s in subset(renamed, 0.1)} != chosen, "other names, other patients"


def test_no_labels_and_no_patients() -> None:
    bare = [study(f"s{i}", "", {}) for i in range(300)]
    small, large = (subset(bare, f) for f in (0.02, 0.5))
    assert len(small) == 6 and len(large) == 150
    assert {s["study_id"] for s in small} < {s["study_id"] for s in large}
    assert [s["study_id"] for s in small] != [f"s{i}" for i in range(6)], "not the first ones"
    unknown = [study(f"s{i}", "", {"Mass": None, "Node": -1}) for i in range(300)]
    assert [s["study_id"] for s in subset(unknown, 0.02)] == [s["study_id"] for s in small]


def test_at_least_one_patient_and_the_other_splits_whole() -> None:
    studies = cohort(30) + [study(f"v{i}", f"v{i}", {"some": 0}, "val") for i in range(5)]
    studies += [study(f"t{i}", f"t{i}", {"some": 1}, "test") for i in range(7)]
    part = subset(studies, 1e-6)
    assert len(patients_of([s for s in part if s["split"] == "train"])) == 1
    for split, n in (("val", 5), ("test", 7)):
        assert sum(s["split"] == split for s in part) == n
    assert subset([s for s in studies if s["split"] != "train"], 0.1) == [s for s in studies if s["split"] != "train"]


def test_a_hundred_thousand_patients_take_seconds() -> None:
    labels = [{name: int(draw) for name, draw in zip(RATES, row, strict=True)} for row in np.eye(4, dtype=int)]
    studies = [study(f"s{p}", f"p{p}", labels[p % 4]) for p in range(100_000)]
    start = time.perf_counter()
    assert len(patients_of(subset(studies, 0.01))) == 1000
    assert time.perf_counter() - start < 20


def test_a_spec_asks_for_it(tmp_path: Path) -> None:
    lines = ["path,study_id,patient_id,view,report,split,Mass"]
    for i in range(60):
        (tmp_path / f"{i}.png").touch()
        lines.append(f"{i}.png,s{i},p{i // 2},PA,,{'train' if i < 40 else 'val' if i < 50 else 'test'},{int(i % 10 == 0)}")
    (tmp_path / "studies.csv").write_text("\n".join(lines) + "\n")
    reader = READERS.settings_of("csv")(name="csv", root=str(tmp_path))
    sizes = {}
    for fraction in (0.1, 0.5, 1.0):
        splits = load_studies(DataSpec(reader=reader, fraction=fraction)).splits
        sizes[fraction] = {split: len(rows) for split, rows in splits.items()}
    assert sizes == {f: {"train": round(40 * f), "val": 10, "test": 10} for f in sizes}
    for wrong in ("0", "1.5", "-0.1"):
        with pytest.raises(SpecError, match=r"data\.fraction: .*found"):
            Spec.read("classify-phantom", [f"data.fraction={wrong}"])
