"""Own splits: by patient, with the shares asked for, as many of each label in each, the same everywhere."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medxray.data import load_studies
from medxray.data.readers import READERS
from medxray.data.splits import divide
from medxray.spec import DataSpec, Spec
from medxray.types import DataError, SpecError, Study

SPLITS = ("train", "val", "test")
SHARES = (0.8, 0.1, 0.1)
RATES = {"common": 0.4, "some": 0.1, "rare": 0.02, "rarest": 0.005}
OWN = ["patient", "stratified"]


def study(name: str, patient: str, labels: dict[str, Any], split: str = "train") -> Study:
    return Study(
        study_id=name, patient_id=patient, images=[f"{name}.png"], views=["PA"], findings="", impression="", report="",
        labels=labels, split=split,
    )  # fmt: skip


def cohort(patients: int, seed: int = 0) -> list[Study]:
    """One to four studies a patient in random splits; labels go together, some are uncertain or missing."""
    draw = np.random.default_rng(seed)
    found = []
    for p in range(patients):
        ill = draw.random() < 0.5
        for s in range(draw.integers(1, 5)):
            labels: dict[str, int | None] = {}
            for label, rate in RATES.items():
                labels[label] = None if draw.random() < 0.1 else int(ill and draw.random() < 2 * rate)
            found.append(study(f"s{p}.{s}", f"p{p}", labels, SPLITS[draw.integers(3)]))
    return found


def by_patient(studies: Sequence[Study]) -> dict[str, str]:
    """Patient -> split; no patient may have two."""
    found: dict[str, str] = {}
    for one in studies:
        assert found.setdefault(one["patient_id"] or one["study_id"], one["split"]) == one["split"], (
            "a patient in two splits"
        )
    return found


def positive(studies: Sequence[Study], label: str, split: str | None = None) -> int:
    return len({s["patient_id"] for s in studies if s["labels"].get(label) == 1 and split in (None, s["split"])})


def test_official_changes_nothing() -> None:
    studies = cohort(50)
    assert divide(studies, "official", SHARES) == studies


@pytest.mark.parametrize("how", OWN)
@pytest.mark.parametrize("shares", [SHARES, (0.7, 0.3, 0.0), (0.34, 0.33, 0.33), (1.0, 0.0, 0.0), (0.98, 0.01, 0.01)])
@pytest.mark.parametrize("n", [997, 20])
def test_shares_are_right_within_a_patient(how: Any, shares: tuple[float, ...], n: int) -> None:
    studies = cohort(n)
    divided = divide(studies, how, shares)
    count = Counter(by_patient(divided).values())
    # No split that has a share is left without a patient.
    given = sum(0 < share * n < 1 for share in shares)
    for split, share in zip(SPLITS, shares, strict=True):
        assert abs(count[split] - share * n) <= 1 + given, (split, count)
        assert bool(count[split]) is (share > 0)
    assert [{**s, "split": ""} for s in divided] == [{**s, "split": ""} for s in studies], "order and all else stay"


@pytest.mark.parametrize("n", [700, 4000])
def test_stratified_has_each_label_as_often_in_every_split(n: int) -> None:
    studies = cohort(n)
    divided = divide(studies, "stratified", SHARES)
    for label in RATES:
        for split, share in zip(SPLITS, SHARES, strict=True):
            # Findings go together, so that not every one's count can be exact.
            assert abs(positive(divided, label, split) - share * positive(divided, label)) <= 1.5 + 0.003 * share * n


def test_stratified_is_far_closer_than_a_hash() -> None:
    studies = cohort(3000)

    def error(how: Any) -> float:
        divided = divide(studies, how, SHARES)
        return max(
            abs(positive(divided, label, "test") / positive(divided, label) - 0.1)
            for label in ("common", "some", "rare")
        )

    assert error("stratified") < 0.5 * error("patient")


@pytest.mark.parametrize("how", OWN)
def test_the_order_of_rows_and_the_old_splits_do_not_matter(how: Any) -> None:
    studies = cohort(500)
    expected = by_patient(divide(studies, how, SHARES))
    shuffled = [Study(**{**s, "split": "train"}) for s in random.Random(1).sample(studies, len(studies))]
    assert by_patient(divide(shuffled, how, SHARES)) == expected
    renamed = [Study(**{**s, "patient_id": "x" + s["patient_id"]}) for s in studies]
    assert {p[1:]: split for p, split in by_patient(divide(renamed, how, SHARES)).items()} != expected


@pytest.mark.parametrize(("how", "most"), [("patient", 0.005), ("stratified", 0.03)])
def test_few_move_when_patients_come_or_labels_change(how: Any, most: float) -> None:
    studies = cohort(2020)
    fewer = [s for s in studies if int(s["patient_id"][1:]) < 2000]
    before, after = by_patient(divide(fewer, how, SHARES)), by_patient(divide(studies, how, SHARES))
    moved = sum(after[patient] != split for patient, split in before.items())
    assert moved <= most * len(before), f"{moved} of {len(before)} moved"
    if how == "patient":
        relabelled = [Study(**{**s, "labels": {"common": 1}}) for s in fewer]
        assert by_patient(divide(relabelled, how, SHARES)) == before


@pytest.mark.parametrize("how", OWN)
def test_studies_without_a_patient_are_their_own(how: Any) -> None:
    bare = [study(f"s{i}", "", {}) for i in range(100)]
    assert Counter(s["split"] for s in divide(bare, how, SHARES)) == {"train": 80, "val": 10, "test": 10}


def test_too_few_patients() -> None:
    two = [study(f"s{i}", f"p{i % 2}", {}) for i in range(6)]
    with pytest.raises(
        DataError, match=r"data\.split_shares: 2 patients cannot be divided among 3 splits; leave out a split"
    ):
        divide(two, "patient", SHARES)
    assert set(by_patient(divide(two, "patient", (0.9, 0.1, 0.0))).values()) == {"train", "val"}


def test_recorded_values() -> None:
    # A change moves the patients of every saved run.
    studies = [study(f"s{i}", f"p{i}", {"Mass": int(i < 12)}) for i in range(40)]
    found = {how: "".join(s["split"][1] for s in divide(studies, how, SHARES)) for how in ("patient", "stratified")}
    assert found == RECORDED


RECORDED = {
    "patient": "rrrrrrerrrerrarrrarrrrrarrrrrrreerrrrrar",
    "stratified": "rrrrrrarrrerrarrrarrrrrarrrrrrreerrrrrer",
}

PROGRAM = """
import json, sys
from medxray.data.splits import divide
studies = json.load(sys.stdin)
print(json.dumps([[s["split"] for s in divide(studies, how, (0.8, 0.1, 0.1))] for how in ("patient", "stratified")]))
"""


def test_another_process_divides_alike() -> None:
    studies = cohort(300)
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(studies), capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )  # fmt: skip
    expected = [[s["split"] for s in divide(studies, how, SHARES)] for how in ("patient", "stratified")]
    assert json.loads(run.stdout) == expected


def test_by_a_spec(tmp_path: Path) -> None:
    lines = ["path,study_id,patient_id,split,Mass"]
    for i in range(60):
        Image.new("L", (4, 4)).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,s{i},p{i // 2},{SPLITS[i % 3]},{int(i % 10 < 2)}")
    (tmp_path / "studies.csv").write_text("\n".join(lines) + "\n")
    reader = READERS.settings_of("csv")(name="csv", root=str(tmp_path))
    with pytest.raises(DataError, match=r"30 patients in two splits.*data\.split: patient"):
        load_studies(DataSpec(reader=reader))
    for how in OWN:
        splits = load_studies(DataSpec(reader=reader, split=how)).splits  # type: ignore[arg-type]
        assert {split: len(rows) for split, rows in splits.items()} == {"train": 48, "val": 6, "test": 6}
    thirds = load_studies(DataSpec(reader=reader, split="stratified", split_shares=[0.4, 0.3, 0.3], on_error="skip"))
    assert [sum(row["Mass"] for row in thirds.splits[split]["labels"]) for split in SPLITS] == [4, 4, 4]
    # A part of the training patients lies in a larger one, as with any split.
    parts = [
        set(load_studies(DataSpec(reader=reader, split="stratified", fraction=f)).splits["train"]["study_id"])
        for f in (0.25, 0.5, 1)
    ]
    assert parts[0] < parts[1] < parts[2]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("[0.8, 0.1]", "at least 3 items"),
        ("[0.8, 0.1, 0.2]", r"three shares that sum to 1, that of train above 0 \(they sum to 1.1\)"),
        ("[0, 0.5, 0.5]", "that of train above 0"),
        ("[1.2, -0.1, -0.1]", "split_shares"),
    ],
)
def test_shares_that_cannot_be(wrong: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Spec.read("classify-phantom", ["data.split=patient", f"data.split_shares={wrong}"])


def test_shares_beside_the_official_split_do_nothing() -> None:
    with pytest.raises(SpecError, match=r"split_shares .* do nothing beside split official; set split: patient"):
        Spec.read("classify-phantom", ["data.split_shares=[0.5, 0.25, 0.25]"])
    with pytest.raises(SpecError, match=r"data\.split: .*'random'"):
        Spec.read("classify-phantom", ["data.split=random"])
    spec = Spec.read("classify-phantom", ["data.split=stratified", "data.split_shares=[0.5, 0.25, 0.25]"])
    assert Spec.read(spec.model_dump()).data.split_shares == [0.5, 0.25, 0.25]
