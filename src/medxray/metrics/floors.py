"""How far a system is above floors, which need no fit, and whether it says the same of every study."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from medxray.metrics import Metric
from medxray.metrics.intervals import Difference, difference, distinct_share, score
from medxray.types import Score

Floor = Callable[[str], Sequence[Any]]
"""Name of a value, such as "bleu-4" -> what the floor says of each study where it is judged by that value."""

FEW_DISTINCT, MOST = 0.1, 0.5
"""Shares of distinct predictions, and of studies with one prediction, that are worth a warning."""


def beside_floors(
    metrics: Sequence[Metric],
    outputs: Sequence[Any],
    floors: Mapping[str, Floor],
    references: Sequence[Any],
    groups: Sequence[str],
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[dict[str, dict[str, Score]], list[str]]:
    """Scores of floors, and sentences on which of them a system is above, by the interval of the paired difference.

    Args:
        metrics: what is computed.
        outputs: of the system, one a study.
        floors: name of a row -> what stands there.
        references, groups, resamples, seed: as for `intervals.score`.

    Returns:
        Row -> name of a value -> Score, and the sentences; those on floors that the system is not above warn.
    """
    rows: dict[str, dict[str, Score]] = {}
    notes = []
    for row, floor in floors.items():
        rows[row] = {}
        told: dict[str, list[str]] = {}
        for metric in metrics:
            known: list[tuple[Sequence[Any], dict[str, Score], dict[str, Difference]]] = []
            for name in metric.values:
                made = floor(name)
                found = next((one for one in known if one[0] is made or one[0] == made), None)
                if found is None:
                    values = score(metric, made, references, groups, resamples, seed)
                    known.append((made, values, difference(metric, outputs, made, references, groups, resamples, seed)))
                    found = known[-1]
                rows[row][name] = found[1][name]
                told.setdefault(_verdict(found[2][name], metric.higher_is_better), []).append(_told(name, found[2][name]))
        notes += [f"{verdict} {row}: {', '.join(told[verdict])}" for verdict in _VERDICTS if verdict in told]
    return rows, notes


_UNCLEAR = "Warning: no clear difference from"
_VERDICTS = ("above", "better than", _UNCLEAR, "Warning: below", "Warning: worse than")


def _verdict(apart: Difference, higher_is_better: bool) -> str:
    if math.isnan(apart.value):
        return ""
    low, high = (apart.value,) * 2 if math.isnan(apart.low) else (apart.low, apart.high)
    if low <= 0 <= high:
        return _UNCLEAR
    if higher_is_better:
        return "above" if low > 0 else "Warning: below"
    return "better than" if high < 0 else "Warning: worse than"


def _told(name: str, apart: Difference) -> str:
    interval = "" if math.isnan(apart.low) else f" ({_signed(apart.low)} to {_signed(apart.high)})"
    return f"{name} {_signed(apart.value)}{interval}"


def _signed(value: float) -> str:
    """Three places, and no negative zero."""
    return f"{round(value, 3) + 0.0:+.3f}"


def repetition(texts: Sequence[str], references: Sequence[str], floors: Mapping[str, Sequence[str]]) -> list[str]:
    """Sentences on how often a system repeats itself, with a warning where it does so far more than people do.

    Args:
        texts: one a study.
        references: one a study.
        floors: what floors say, one a study; those that always say the same are not told of.
    """
    if len(texts) < 2:
        return []
    share, most, usual = distinct_share(texts), _most(texts), distinct_share(references)
    others = {row: distinct_share(made) for row, made in floors.items() if len(set(made)) > 1}
    beside = ", ".join(f"{row} {value:.0%}" for row, value in {**others, "references": usual}.items())
    notes = [
        f"{share:.0%} of the predictions are distinct ({beside}); the most frequent one is given to {most:.0%} of the studies"
    ]
    if (share < FEW_DISTINCT and share < usual / 2) or (most > MOST and most > 2 * _most(references)):
        notes.append("Warning: the model says the same of most studies; its scores tell little of the images")
    return notes


def _most(texts: Sequence[str]) -> float:
    """Share of the studies that get the most frequent text."""
    return max(Counter(texts).values()) / len(texts)
