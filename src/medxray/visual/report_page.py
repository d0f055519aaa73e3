"""The page of a run folder: one HTML file that needs nothing beside it and no network."""

import math
import operator
import os
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from html import escape
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np

from medxray.progress import progress_bar
from medxray.types import Score, Scores
from medxray.visual import StudyCard
from medxray.visual.charts import histogram, interval_strip, lower_is_better, number, training_curves
from medxray.visual.page import TABLE, style, write_page, writing
from medxray.visual.study_list import StudyList, choices

_FLOORS = ("best constant", "most frequent", "nearest")
_MAIN = ("finding-f1", "bleu-4", "auroc", "average-precision", "reconstruction-error")
_DISTRIBUTIONS = 6


def report_page(
    path: str | os.PathLike[str],
    *,
    title: str,
    spec_yaml: str,
    log: Sequence[Mapping[str, Any]],
    scores: Scores | None,
    studies: Iterable[StudyCard],
    facts: Mapping[str, str],
    notes: Sequence[str],
    values: Mapping[str, Sequence[float] | np.ndarray] | None = None,
    calibration: Sequence[str] = (),
    count: int | None = None,
    progress: bool = False,
) -> None:
    """Write a run's page; a file that is there is replaced only once the new one is complete.

    Studies are written as they come and not held, so that a generator of thousands takes little memory.

    Args:
        path: the file to write; its folder is made when missing.
        title: the run's name.
        spec_yaml: the resolved spec.
        log: rows of the training log, as `training_curves` takes them.
        scores: the table, or None before an evaluation. Rows called after a floor ("best constant ...", "most
            frequent ...", "nearest ...") are what the verdict compares with.
        studies: shown in this order, until a reader takes another.
        facts: versions, parameters, times.
        notes: sentences that a reader of the scores must know.
        values: score -> each study's own value (n,), by which the list is sorted; NaN where it has none.
        calibration: figures, as HTML, on whether probabilities can be believed.
        count: how many studies there are, by which the size of their images is chosen; their length if None.
        progress: show a bar.

    Raises:
        RunError: the file cannot be written.
        MedxrayError: an image is not (H, W).
    """
    count = operator.length_hint(studies, 0) if count is None else count
    with ExitStack() as stack:
        with writing(path):
            folder = Path(path).parent
            blocks = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace", dir=folder))
        listed = StudyList(blocks, values or {}, count)
        for study in progress_bar(studies, total=count, desc="page", unit="study", disable=not progress):
            with writing(path):
                listed.add(study)
        curves = training_curves(log)
        sections = {
            "Scores": _scores(scores, [*(scores.notes if scores else []), *notes]),
            "Subgroups": _subgroups(scores) if scores else "",
            "Findings": _findings(listed.found),
            "Distribution": _distribution(listed.columns, listed.labels),
            "Calibration": f'<div class="curves">{"".join(calibration)}</div>' if calibration else "",
            "Training": f'<div class="curves">{"".join(curves)}</div>' if curves else "",
            "Studies": listed.html(),
            "Spec": f"<details><summary>The resolved spec</summary><pre>{escape(spec_yaml)}</pre></details>",
            "Run": _facts(facts),
        }
        script = style("report_page.js") if len(listed) else ""
        blocks.seek(0)
        data = chain(blocks, [listed.index()]) if len(listed) else []
        write_page(path, title, _verdict(scores), sections, choices(listed.words), script, data)


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    return f"<dl>{rows}</dl>" if rows else ""


def _findings(found: Mapping[str, Mapping[str, int]]) -> str:
    """For each observation what both texts find, the reference alone, and the prediction alone."""
    kinds = (("found", "aw"), ("wrong side", "w"), ("missed", "m"), ("hallucinated", "h"))
    lines = ""
    for name, of in sorted(found.items(), key=lambda row: -sum(row[1][letter] for letter in "awm")):
        named, hits, total = of["a"] + of["w"] + of["m"], of["a"] + of["w"], sum(of.values())
        drawn = ""
        for kind, letter in (("agreed", "a"), ("differs", "w"), ("missed", "m"), ("unsupported", "h")):
            drawn += f'<span class="{kind}" style="width:{100 * of[letter] / total:.2f}%"></span>' if of[letter] else ""
        said = ", ".join(f"{sum(of[x] for x in letters)} {kind}" for kind, letters in kinds)
        picture = f'<span class="shares" role="img" aria-label="{escape(name)}: {said}">{drawn}</span>'
        links = "".join(
            f'<td><a href="#studies" data-finding="{escape(name)}" data-kind="{letters}">{count:,}</a></td>' if count
            else '<td class="quiet">0</td>'
            for count, letters in ((sum(of[x] for x in letters), letters) for _, letters in kinds)
        )
        f1 = 2 * hits / (2 * hits + of["m"] + of["h"])
        lines += f'<tr><th scope="row">{escape(name)}</th><td>{picture}</td><td>{named:,}</td>{links}<td>{number(f1)}</td></tr>'
    if not lines:
        return ""
    head = "".join(f'<th scope="col">{name}</th>' for name in ("", "in the reference", *(k for k, _ in kinds), "F1"))
    legend = "".join(
        f'<span><span class="shares"><span class="{kind}" style="width:100%"></span></span> {text}</span>'
        for kind, text in (
            ("agreed", "in both texts"), ("differs", "in both, on another side"), ("missed", "missed"),
            ("unsupported", "hallucinated"),
        )
    )  # fmt: skip
    return (
        f'<p class="quiet marks">{legend}</p><div class="findings">{TABLE.format(head=head, body=lines)}</div>'
        '<p class="quiet">Numbers of studies, read from the texts by rules; what is in doubt counts as found. A bar has the '
        "studies in which either text finds the observation. A number leads to its studies.</p>"
    )


def _distribution(columns: Mapping[str, Sequence[float]], labels: Collection[str]) -> str:
    """How each score is spread over the studies; not of single labels."""
    charts = []
    for name, column in columns.items():
        values = np.array(column, dtype=np.float64)
        values = values[np.isfinite(values)]
        if name in labels or name in ("bleu-2", "bleu-3") or len(values) < 2 or values.min() == values.max():
            continue
        if (values == values.round()).all():
            values = values.astype(np.int64)
        charts.append(f'<div data-score="{escape(name)}">{histogram(name, values, "score of a study")}</div>')
    shown = f'<div class="curves">{"".join(charts[:_DISTRIBUTIONS])}</div>'
    if charts[_DISTRIBUTIONS:]:
        rest = "".join(charts[_DISTRIBUTIONS:])
        shown += f'<details><summary>{len(charts) - _DISTRIBUTIONS} more</summary><div class="curves">{rest}</div></details>'
    note = '<p class="quiet">Studies by their own score. A column leads to its studies.</p>'
    return note + shown if charts else ""


def _gain(metric: str, value: float, than: float) -> float:
    return than - value if lower_is_better(metric) else value - than


def _words_of(metric: str, score: Score, other: Score) -> str:
    """How a score stands to another, such as `0.120 higher; the intervals overlap`."""
    difference = score.value - other.value
    words = "the same" if difference == 0 else f"{number(abs(difference))} {'higher' if difference > 0 else 'lower'}"
    if not all(map(math.isfinite, (score.low, score.high, other.low, other.high))):
        return words
    apart = score.low > other.high or score.high < other.low
    return f"{words}; the intervals {'do not overlap' if apart else 'overlap'}"


def _verdict(scores: Scores | None) -> str:
    if not scores:
        return '<p class="verdict">Not evaluated yet.</p>'
    metric = next((m for m in _MAIN if m in scores), next(iter(scores)))
    main, name = scores[metric], escape(metric)
    if not math.isfinite(main.value):
        return f'<p class="verdict warn">{name} is undefined on these {main.n} studies.</p>'
    rows = {r: v[metric] for r, v in scores.comparisons.items() if metric in v and math.isfinite(v[metric].value)}
    floors = {row: score for row, score in rows.items() if _is_floor(row)}
    text, warn = f"<b>{name} {number(main.value)}</b>{_interval(main, ' ')}", ""
    if floors:
        best = max(floors, key=lambda row: _gain(metric, floors[row].value, 0.0))
        above = _gain(metric, main.value, floors[best].value) > 0
        warn = "" if above else " warn"
        text += (
            f", {'better' if above else 'not better'} than the best floor, {escape(best)}, at "
            f"{number(floors[best].value)}: {_words_of(metric, main, floors[best])}."
        )
    else:
        text += f" over {main.n} studies; no floor to compare with."
    behind = [m for m in scores if m != metric and "/" not in m and _is_behind(scores, m)]
    if behind:
        text += f"<br>Not better than the best floor in {escape(', '.join(behind))}."
    for row in [row for row in rows if row not in floors]:
        text += f"<br>{escape(row[:1].upper() + row[1:])}: {number(rows[row].value)}, "
        text += f"{_words_of(metric, rows[row], main)}."
    return f'<p class="verdict{warn}">{text}</p>'


def _is_floor(row: str) -> bool:
    return row.lower().startswith(_FLOORS)


def _is_behind(scores: Scores, metric: str) -> bool:
    """Whether some floor's value is at least as good."""
    floors = [values[metric] for row, values in scores.comparisons.items() if _is_floor(row) and metric in values]
    return any(_gain(metric, scores[metric].value, floor.value) <= 0 for floor in floors)


def _interval(score: Score, before: str = "") -> str:
    if not (math.isfinite(score.low) and math.isfinite(score.high)):
        return ""
    return f'{before}<span class="range">{number(score.low)}–{number(score.high)}</span>'


def _scores(scores: Scores | None, notes: Sequence[str]) -> str:
    listed = f'<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>' if notes else ""
    if not scores:
        return listed
    overall = [m for m in scores if "/" not in m]
    by_label = ""
    for measure, names in groupby((m for m in scores if "/" in m), key=lambda m: m.split("/", 1)[0]):
        own = list(names)
        table = _label_table(scores, own)
        by_label += f"<details open><summary>{escape(measure)} by label</summary>{table}</details>"
    n = max(score.n for score in scores.values())
    line = f"; the upright line is {escape(scores.title)}" if scores.comparisons else ""
    caption = (
        f'<p class="quiet">{n} studies. Beneath each value its 95 % interval by a bootstrap over patients; '
        f"the dots of a column share one scale{line}.</p>"
    )
    return (
        (_table(scores, overall) if overall else "")
        + (f'<div class="by-label">{by_label}</div>' if by_label else "")
        + caption
        + listed
    )


def _subgroups(scores: Scores) -> str:
    overall = [m for m in scores if "/" not in m]
    tables = ""
    for attribute, groups in scores.subgroups.items():
        sized = {f"{group}, {max((s.n for s in own.values()), default=0):,} studies": own for group, own in groups.items()}
        table = _table(Scores(scores.scores, sized, title="all studies"), overall)
        tables += f"<details open><summary>by {escape(attribute)}</summary>{table}</details>"
    return tables


def _table(scores: Scores, metrics: Sequence[str]) -> str:
    head = "".join(
        f'<th scope="col">{escape(m)}{" <i>lower is better</i>" if lower_is_better(m) else ""}</th>' for m in metrics
    )
    lines = []
    for row, values in scores.rows.items():
        own = values is scores.scores
        cells = "".join(_cell(scores, row, m) for m in metrics)
        lines.append(f'<tr{" class=own" if own else ""}><th scope="row">{escape(row)}</th>{cells}</tr>')
    return TABLE.format(head=head, body="".join(lines))


def _label_table(scores: Scores, metrics: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{escape(row)}</th>' for row in scores.rows)
    lines = []
    for metric in metrics:
        cells = "".join(_cell(scores, row, metric, of=metrics) for row in scores.rows)
        lines.append(f'<tr><th scope="row">{escape(metric.split("/", 1)[1])}</th>{cells}</tr>')
    return TABLE.format(head=head, body="".join(lines))


def _cell(scores: Scores, row: str, metric: str, of: Sequence[str] = ()) -> str:
    """A cell; its strip has the scale of the metrics `of`, by default of this metric, over all rows."""
    score = scores.rows[row].get(metric)
    if score is None:
        return "<td></td>"
    if not math.isfinite(score.value):
        return '<td class="quiet">undefined</td>'
    mark = scores[metric].value if scores.comparisons else math.nan
    column = [values[m] for values in scores.rows.values() for m in (of or [metric]) if m in values]
    strip = interval_strip(score, column, mark, filled=row == scores.title)
    return f'<td><span class="value">{number(score.value)}</span>{_interval(score)}{strip}</td>'
