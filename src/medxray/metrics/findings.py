"""Whether a generated report names the findings that its reference names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from medxray.metrics import Metric

# The labeller's rules are compiled, and the phantom's drawing imported, only when they are used.


class FindingF1(Metric):
    """F1 of findings read back from both texts by `medxray.metrics.clinical.label_report`.

    A finding counts as named when the text says that it is present or doubtful; absent and not mentioned are
    the same. `finding-f1` is the mean over the findings that the references name at least once; one that none
    names has no recall and is left out. `finding-micro-f1` pools the decisions on all findings. Both are NaN
    when no reference names any.

    Statistics: true positives of each finding of `medxray.data.phantom.FINDINGS`, then false positives, then
    false negatives.
    """

    values = ("finding-f1", "finding-micro-f1")

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        predicted, expected = _named(predictions), _named(references)
        decisions = [predicted & expected, predicted & ~expected, ~predicted & expected]
        return np.concatenate(decisions, axis=1).astype(np.float64)

    def reduce(self, statistics: np.ndarray, weights: np.ndarray) -> np.ndarray:
        hits, extra, missed = np.split(weights @ statistics, 3, axis=1)
        occurs = hits + missed > 0
        with np.errstate(invalid="ignore"):
            each = np.where(occurs, _f1(hits, extra, missed), 0)
            macro = each.sum(axis=1) / occurs.sum(axis=1)
            micro = _f1(hits.sum(axis=1), extra.sum(axis=1), missed.sum(axis=1))
        return np.stack([macro, np.where(occurs.any(axis=1), micro, np.nan)], axis=1)


def _f1(hits: np.ndarray, extra: np.ndarray, missed: np.ndarray) -> np.ndarray:
    f1: np.ndarray = 2 * hits / (2 * hits + extra + missed)
    return f1


def _named(texts: Sequence[str]) -> np.ndarray:
    """(n, findings) bool."""
    from medxray.data.phantom import FINDINGS
    from medxray.metrics.clinical import label_report

    rows = {text: label_report(text) for text in dict.fromkeys(texts)}
    named = [[rows[text].get(finding, 0) != 0 for finding in FINDINGS] for text in texts]
    return np.array(named, dtype=bool).reshape(len(texts), len(FINDINGS))


Uncertain = Literal["positive", "negative"]
_MEANS, _MEASURES, _SETS = ("example", "micro", "macro"), ("precision", "recall", "f1"), (14, 5)
_HEADLINE = ("f1-micro-14", "f1-macro-14", "f1-micro-5", "f1-macro-5")


class Clinical(Metric):
    """Precision, recall and F1 of CheXpert's 14 observations, read from both texts by rules.

    Values are named clinical-MEASURE-MEAN-SET: precision, recall or f1; example, micro or macro; all 14 observations
    or CheXpert's 5 main ones. Absent and not mentioned are the same.

    * micro pools the decisions on all observations of all studies. Precision is NaN where no prediction names any,
      recall where no reference does, F1 where neither does.
    * macro is the mean over the observations that the references name at least once, NaN where they name none. One of
      them that no prediction names has precision and F1 0.
    * example is the mean over the studies in which the number is defined: precision where the prediction names any
      observation, recall where the reference does, F1 where either does. A study without any does not count (the
      `zero_division=0` of some published tables counts it as 0; with 14 observations there is none but for empty
      texts, since "No Finding" is one).

    Statistics: true positives of the 14, then false positives, then false negatives; then for each set and measure a
    study's own value, 0 where not defined, and whether it is defined.

    Args:
        uncertain: what an observation in doubt counts as, in both texts.
        full: all 18 values instead of micro and macro F1.
    """

    prefix = "clinical"

    def __init__(self, uncertain: Uncertain = "positive", full: bool = False) -> None:
        super().__init__()
        self.uncertain = uncertain
        names = [f"{measure}-{mean}-{count}" for count in _SETS for mean in _MEANS for measure in _MEASURES]
        self._chosen = [names.index(name) for name in (names if full else _HEADLINE)]
        self.values = tuple(f"{self.prefix}-{names[i]}" for i in self._chosen)

    def label(self, texts: Sequence[str]) -> list[dict[str, int]]:
        """Labels of each text, as `medxray.metrics.label_reports` gives them."""
        from medxray.metrics.clinical import label_reports

        return label_reports(texts)

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        predicted, expected = self._positive(predictions), self._positive(references)
        decisions = [predicted & expected, predicted & ~expected, ~predicted & expected]
        own = [
            column
            for chosen in _columns()
            for measure in _ratios(*(d[:, chosen].sum(axis=1).astype(np.float64) for d in decisions))
            for column in (np.nan_to_num(measure), ~np.isnan(measure))
        ]
        return np.column_stack([*decisions, *own]).astype(np.float64)

    def reduce(self, statistics: np.ndarray, weights: np.ndarray) -> np.ndarray:
        from medxray.metrics.clinical import OBSERVATIONS

        totals = weights @ statistics
        K = len(OBSERVATIONS)
        hits, extra, missed = (totals[:, i * K : (i + 1) * K] for i in range(3))
        own = totals[:, 3 * K :].reshape(len(totals), len(_SETS), len(_MEASURES), 2)
        found: list[np.ndarray] = []
        with np.errstate(invalid="ignore", divide="ignore"):
            for i, chosen in enumerate(_columns()):
                found += list((own[:, i, :, 0] / own[:, i, :, 1]).T)
                decisions = [d[:, chosen] for d in (hits, extra, missed)]
                found += _ratios(*(d.sum(axis=1) for d in decisions))
                occurs = decisions[0] + decisions[2] > 0
                for measure in _ratios(*decisions):
                    found.append(np.where(occurs, np.nan_to_num(measure), 0).sum(axis=1) / occurs.sum(axis=1))
        return np.stack(found, axis=1)[:, self._chosen]

    def _positive(self, texts: Sequence[str]) -> np.ndarray:
        """(n, 14) bool."""
        different = list(dict.fromkeys(texts))
        rows = dict(zip(different, self.label(different), strict=True))
        return np.array([_flags(rows[text], self.uncertain) for text in texts], dtype=bool).reshape(len(texts), -1)


def _flags(labels: Mapping[str, int], uncertain: Uncertain) -> list[bool]:
    from medxray.metrics.clinical import OBSERVATIONS

    named = (1, -1) if uncertain == "positive" else (1,)
    return [labels.get(name, 0) in named for name in OBSERVATIONS]


def _columns() -> list[list[int]]:
    """Places of the 14 and of the 5 among the 14."""
    from medxray.metrics.clinical import MAIN_OBSERVATIONS, OBSERVATIONS

    return [list(range(len(OBSERVATIONS))), [OBSERVATIONS.index(name) for name in MAIN_OBSERVATIONS]]


def _ratios(hits: np.ndarray, extra: np.ndarray, missed: np.ndarray) -> list[np.ndarray]:
    """Precision, recall and F1, NaN where nothing is divided by nothing."""
    with np.errstate(invalid="ignore"):
        return [hits / (hits + extra), hits / (hits + missed), _f1(hits, extra, missed)]


@dataclass(frozen=True)
class FindingRow:
    """How one observation fares over all studies.

    Attributes:
        name: the observation.
        named: studies whose reference names it.
        hits: those whose prediction names it too.
        misses: those whose prediction does not.
        hallucinations: studies whose prediction alone names it.
        wrong_side: hits in which both texts tell a side, and another one; left against bilateral is another.
    """

    name: str
    named: int
    hits: int
    misses: int
    hallucinations: int
    wrong_side: int

    @property
    def f1(self) -> float:
        """NaN where neither text of any study names it."""
        total = 2 * self.hits + self.misses + self.hallucinations
        return 2 * self.hits / total if total else float("nan")


def per_finding(
    predictions: Sequence[str], references: Sequence[str], uncertain: Uncertain = "positive"
) -> list[FindingRow]:
    """A row for each of CheXpert's 14 observations, read from the texts by rules.

    Args:
        predictions: one report a study.
        references: one report a study.
        uncertain: what an observation in doubt counts as.
    """
    from medxray.metrics.clinical import OBSERVATIONS, label_reports, sides

    counts = np.zeros((len(OBSERVATIONS), 4), dtype=int)
    labels = zip(label_reports(predictions), label_reports(references), strict=True)
    for (predicted, expected), prediction, reference in zip(labels, predictions, references, strict=True):
        own, true = (np.array(_flags(row, uncertain)) for row in (predicted, expected))
        counts[:, :3] += np.stack([own & true, ~own & true, own & ~true], axis=1)
        if (own & true).any():
            said, wanted = sides(prediction), sides(reference)
            for k in np.flatnonzero(own & true):
                name = OBSERVATIONS[k]
                counts[k, 3] += name in said and name in wanted and said[name] != wanted[name]
    return [
        FindingRow(name, int(hits + misses), int(hits), int(misses), int(extra), int(wrong))
        for name, (hits, misses, extra, wrong) in zip(OBSERVATIONS, counts, strict=True)
    ]
