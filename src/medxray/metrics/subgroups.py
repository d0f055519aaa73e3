"""Scores of groups of studies, such as those of women, out of the statistics of all."""

from collections.abc import Mapping, Sequence

import numpy as np

from medxray.metrics import Metric
from medxray.metrics.intervals import seeds
from medxray.types import Score

LEAST = 20
"""Studies of a group that is scored."""

UNKNOWN = "unknown"

Subgroups = dict[str, dict[str, dict[str, Score]]]
"""Attribute -> group -> value name -> Score."""


def score_subgroups(
    metrics: Sequence[Metric],
    statistics: Sequence[np.ndarray],
    patients: Sequence[str],
    attributes: Mapping[str, Sequence[str]],
    resamples: int = 1000,
    seed: int = 0,
) -> Subgroups:
    """Each group's values with 95 % intervals by draws of its own patients.

    Nothing of a prediction is computed again. What a metric's statistics take from the whole set, such as how rare words are
    for CIDEr, stays that of the whole.

    Args:
        metrics: what is computed.
        statistics: of each metric, a row a study: (n, S).
        patients: n names, as for `intervals.score`.
        attributes: attribute -> n groups; "" is unknown, and a group of its own.
        resamples, seed: of the draws.

    Returns:
        Attributes that tell studies apart, with groups in alphabetical order and the unknown last. Of a group with fewer
        than 20 studies every value is NaN, with their number.
    """
    found: Subgroups = {}
    for attribute, groups in attributes.items():
        names = sorted(set(groups), key=lambda group: (not group, group))
        if len(names) < 2:
            continue
        of_study = np.array(groups)
        for group in names:
            rows = np.flatnonzero(of_study == group).tolist()
            own = found.setdefault(attribute, {}).setdefault(group or UNKNOWN, {})
            for metric, whole in zip(metrics, statistics, strict=True):
                if len(rows) < LEAST:
                    own |= dict.fromkeys(metric.values, Score(np.nan, np.nan, np.nan, len(rows)))
                else:
                    own |= seeds(metric, [whole[rows]], [patients[row] for row in rows], resamples, seed)
    return found


def describe(subgroups: Subgroups, scores: Mapping[str, Score]) -> list[str]:
    """Sentences for a reader of the table: where the groups are, which are too small, and where a mean is of fewer labels.

    Args:
        subgroups: of one system.
        scores: the same system's of all studies.
    """
    if not subgroups:
        return []
    small, fewer = [], []
    for attribute, groups in subgroups.items():
        for group, values in groups.items():
            n = max(score.n for score in values.values())
            if n < LEAST:
                small.append(f"{attribute} {group} ({n})")
            elif any("/" in name and np.isnan(score.value) > np.isnan(scores[name].value) for name, score in values.items()):
                fewer.append(f"{attribute} {group}")
    notes = [f"scores by {', '.join(subgroups)} are in scores.json, under subgroups"]
    if small:
        notes.append(f"groups of fewer than {LEAST} studies are not scored: {', '.join(small)}")
    if fewer:
        notes.append(f"of some groups a mean is over fewer labels, as others are undefined there: {', '.join(fewer)}")
    return notes
