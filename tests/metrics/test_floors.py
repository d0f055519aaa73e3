"""What a run is worth beside systems that need no fit."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from medxray.metrics import Metric, StudyMean
from medxray.metrics.floors import beside_floors, repetition
from medxray.metrics.intervals import difference, score
from medxray.metrics.text import Bleu


class Values(StudyMean):
    """Predictions are numbers already; the second value is twice the first."""

    values = ("one", "two")

    def statistics(self, predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
        return np.outer(np.array(predictions, dtype=np.float64), [1, 2])


class Errors(Values):
    values = ("error", "twice")
    higher_is_better = False


N = 40
OURS = [0.5 + 0.01 * (i % 7) for i in range(N)]
PATIENTS = [f"p{i // 2}" for i in range(N)]


def judged(metric: Metric, **floors: Any) -> tuple[dict[str, Any], list[str]]:
    made = {name: value if callable(value) else (lambda _, value=value: value) for name, value in floors.items()}
    return beside_floors([metric], OURS, made, OURS, PATIENTS, resamples=200, seed=4)


def test_a_floor_that_is_beaten_ties_and_wins() -> None:
    noisy = [value + (0.3 if i % 3 else -0.5) for i, value in enumerate(OURS)]
    rows, notes = judged(Values(), low=[v - 0.1 for v in OURS], noisy=noisy, high=[v + 0.1 for v in OURS])
    assert rows["low"]["two"] == score(Values(), [v - 0.1 for v in OURS], OURS, PATIENTS, 200, 4)["two"]
    apart = difference(Values(), OURS, noisy, OURS, PATIENTS, 200, 4)["one"]
    assert apart.low < 0 < apart.high
    assert notes[0] == "above low: one +0.100 (+0.100 to +0.100), two +0.200 (+0.200 to +0.200)"
    assert notes[1].startswith(
        f"Warning: no clear difference from noisy: one {apart.value:+.3f} ({apart.low:+.3f} to {apart.high:+.3f}), two "
    )
    assert notes[2] == "Warning: below high: one -0.100 (-0.100 to -0.100), two -0.200 (-0.200 to -0.200)"
    assert len(notes) == 3


def test_lower_is_better_for_errors() -> None:
    _, notes = judged(Errors(), low=[v - 0.1 for v in OURS], high=[v + 0.1 for v in OURS])
    assert notes == [
        "Warning: worse than low: error +0.100 (+0.100 to +0.100), twice +0.200 (+0.200 to +0.200)",
        "better than high: error -0.100 (-0.100 to -0.100), twice -0.200 (-0.200 to -0.200)",
    ]


def test_the_same_as_a_floor_is_not_above_it() -> None:
    assert judged(Values(), same=OURS)[1] == [
        "Warning: no clear difference from same: one +0.000 (+0.000 to +0.000), two +0.000 (+0.000 to +0.000)"
    ]


def test_one_patient_has_no_interval() -> None:
    rows, notes = beside_floors([Values()], OURS, {"low": lambda _: [0.1] * N}, OURS, ["p"] * N)
    assert notes == [f"above low: one {np.mean(OURS) - 0.1:+.3f}, two {2 * np.mean(OURS) - 0.2:+.3f}"]
    assert rows["low"]["one"].low != rows["low"]["one"].low


def test_a_floor_may_answer_each_value_with_its_own() -> None:
    """BLEU-1 of one text and BLEU-4 of another, each as if it had been scored alone."""
    references = ["a b c d e f", "a b c d e g", "a b x d e f"]
    texts = {"bleu-1": ["a b c"] * 3, "bleu-4": ["a b c d e f"] * 3}
    made: dict[str, Any] = {"best": lambda value: texts.get(value, texts["bleu-4"])}
    rows, notes = beside_floors([Bleu()], ["a b"] * 3, made, references, ["p", "q", "r"])
    for name in Bleu.values:
        expected = score(Bleu(), texts.get(name, texts["bleu-4"]), references, ["p", "q", "r"])[name]
        assert rows["best"][name] == expected
    assert list(rows["best"]) == list(Bleu.values)
    assert sum("best" in note for note in notes) >= 1


def test_repetition_in_words() -> None:
    references = [f"report {i}" for i in range(20)]
    floors = {"constant": ["a"] * 20, "nearest": [f"report {i // 2}" for i in range(20)]}
    assert repetition(references, references, floors) == [
        "100% of the predictions are distinct (nearest 50%, references 100%); the most frequent one is given to 5% of the studies"
    ]
    same = repetition(["a"] * 19 + ["b"], references, floors)
    assert same[0].startswith("10% of the predictions are distinct") and "given to 95% of the studies" in same[0]
    assert same[1] == "Warning: the model says the same of most studies; its scores tell little of the images"
    # People may repeat themselves too; a model that does it no more than they do is not warned of.
    assert len(repetition(["a"] * 20, ["a"] * 20, floors)) == 1
    assert repetition(["a"], ["b"], {}) == []


@pytest.mark.parametrize("share", [0.4, 0.6])
def test_one_text_for_most_studies_is_a_warning(share: float) -> None:
    n = 100
    texts = ["normal"] * int(share * n) + [f"report {i}" for i in range(n - int(share * n))]
    found = repetition(texts, [f"r{i}" for i in range(n)], {})
    assert (len(found) == 2) == (share > 0.5)
