"""Whether a generated report names the findings that its reference names."""

from collections.abc import Sequence

import numpy as np

from medxray.metrics import Metric


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
    # The labeller's rules are compiled, and the phantom's drawing imported, only when this metric is used.
    from medxray.data.phantom import FINDINGS
    from medxray.metrics.clinical import label_report

    rows = {text: label_report(text) for text in dict.fromkeys(texts)}
    named = [[rows[text].get(finding, 0) != 0 for finding in FINDINGS] for text in texts]
    return np.array(named, dtype=bool).reshape(len(texts), len(FINDINGS))
