"""The page of a comparison: systems side by side, in one HTML file that needs nothing beside it and no network."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from html import escape
from itertools import groupby

from medxray.types import Score
from medxray.visual.charts import difference_chart, interval_strip, number
from medxray.visual.page import TABLE, style, write_page

_MAIN = ("cider", "bleu-4", "auroc", "average-precision", "reconstruction-error")


@dataclass(frozen=True)
class Apart(Score):
    """How far a system is from the baseline in a metric.

    Attributes:
        p: of no difference; NaN without an interval.
        holm: p corrected for the number of differences.
        better: None where the interval holds 0, or there is none.
    """

    p: float = math.nan
    holm: float = math.nan
    better: bool | None = None

    @classmethod
    def judged(cls, difference: Score, p: float, higher_is_better: bool) -> "Apart":
        """A difference, with which of both systems is better where its interval leaves out 0."""
        clear = difference.low > 0 or difference.high < 0
        better = (difference.low > 0) == higher_is_better if clear else None
        return cls(difference.value, difference.low, difference.high, difference.n, p, better=better)

    @property
    def mark(self) -> str:
        """▲ better, ▼ worse."""
        return {True: "▲", False: "▼", None: ""}[self.better]


@dataclass(frozen=True)
class Differing:
    """A study in which two systems differ: what each wrote, with its value there, and what a person wrote."""

    study_id: str
    reference: str
    said: dict[str, tuple[str, float]]


def comparison_page(
    path: str | os.PathLike[str],
    *,
    baseline: str,
    scores: Mapping[str, Mapping[str, Score]],
    differences: Mapping[str, Mapping[str, Apart]],
    lower: Sequence[str],
    findings: Mapping[str, Mapping[str, tuple[float, str]]],
    wins: Mapping[str, Mapping[str, tuple[int, int, int]]],
    studies: Mapping[str, tuple[str, Sequence[Differing], Sequence[Differing]]],
    runs: Mapping[str, str],
    notes: Sequence[str],
) -> None:
    """Write the page; a file that is there is replaced only once the new one is complete.

    Args:
        path: the file to write.
        baseline: the system that others are compared with.
        scores: system -> metric -> score; a metric called MEASURE/LABEL belongs to a label.
        differences: every other system -> metric -> difference to the baseline.
        lower: metrics that are better when lower.
        findings: system -> finding -> F1 and a few words.
        wins: every other system -> metric -> studies in which it is better, equal, worse.
        studies: every other system -> the metric that tells, studies in which it is most above and most below.
        runs: system -> where it lies.
        notes: sentences that a reader of the scores must know.

    Raises:
        RunError: the file cannot be written.
    """
    overall = [metric for metric in scores[baseline] if "/" not in metric]
    by_label = [metric for metric in scores[baseline] if "/" in metric]
    listed = f'<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>' if notes else ""
    sections = {
        "Scores": _scores(scores, differences, overall, lower, baseline) + listed,
        "Differences": _differences(differences, overall, lower, baseline),
        "Labels": _labels(scores, differences, by_label, baseline),
        "Findings": _findings(findings, baseline),
        "Studies": _studies(studies, wins, baseline),
        "Runs": "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in runs.items()) + "</dl>",
    }
    title = " and ".join([", ".join([baseline, *differences][:-1]), [baseline, *differences][-1]])
    write_page(path, title, _verdict(scores, differences, overall, baseline), sections, style("comparison_page.css"))


def _verdict(
    scores: Mapping[str, Mapping[str, Score]],
    differences: Mapping[str, Mapping[str, Apart]],
    metrics: Sequence[str],
    baseline: str,
) -> str:
    main = next((name for name in _MAIN if name in metrics), metrics[0])
    lines = []
    for system, values in differences.items():
        apart = values[main]
        head = f"<b>{escape(system)}</b>, {escape(main)} {number(scores[system][main].value)}"
        if not math.isfinite(apart.value):
            lines.append(f"{head}: cannot be compared, for a value is undefined.")
            continue
        word = {True: "better than", False: "worse than", None: "not told apart from"}[apart.better]
        lines.append(f"{head}: {word} {escape(baseline)}, {number(scores[baseline][main].value)}; {_words(apart)}.")
        others = [m for m in metrics if m != main and values[m].better is not apart.better]
        better, worse = ([m for m in others if values[m].better is kind] for kind in (True, False))
        lines += [f"{word} in {escape(', '.join(names))}." for word, names in (("Better", better), ("Worse", worse)) if names]
    n = max(score.n for score in scores[baseline].values())
    return f'<p class="verdict">{"<br>".join(lines)}</p><p class="quiet">{n:,} studies that all have.</p>'


def _words(apart: Apart) -> str:
    text = f"{apart.value:+.3f}"
    if math.isfinite(apart.low):
        text += f" ({apart.low:+.3f} to {apart.high:+.3f}), p {apart.p:.3f}, by Holm {apart.holm:.3f}"
    return text


def _scores(
    scores: Mapping[str, Mapping[str, Score]],
    differences: Mapping[str, Mapping[str, Apart]],
    metrics: Sequence[str],
    lower: Sequence[str],
    baseline: str,
) -> str:
    names = {m: escape(m) + (" <i>lower is better</i>" if m in lower else "") for m in metrics}
    body = "".join(_line(name, metric, [metric], scores, differences, baseline) for metric, name in names.items())
    return TABLE.format(head=_head(scores, baseline), body=body) + (
        '<p class="quiet">Beneath each value its 95 % interval; the dots of a line share one scale, and the upright line is '
        f'{escape(baseline)}. <b class="better">▲</b> better and <b class="worse">▼</b> worse than {escape(baseline)}, where the '
        "interval of the difference leaves out 0.</p>"
    )


def _head(systems: Mapping[str, object], baseline: str) -> str:
    return "".join(f'<th scope="col">{escape(s)}{" <i>baseline</i>" if s == baseline else ""}</th>' for s in systems)


def _line(
    name: str,
    metric: str,
    scale: Sequence[str],
    scores: Mapping[str, Mapping[str, Score]],
    differences: Mapping[str, Mapping[str, Apart]],
    baseline: str,
) -> str:
    """A row of a table; its dots are drawn on the common scale of some metrics."""
    cells, mark = "", scores[baseline][metric].value
    for system, values in scores.items():
        score, apart = values[metric], differences.get(system, {}).get(metric)
        if not math.isfinite(score.value):
            cells += '<td class="quiet">undefined</td>'
            continue
        sign = "" if apart is None or apart.better is None else _sign(apart)
        span = f'<span class="range">{number(score.low)}–{number(score.high)}</span>' if math.isfinite(score.low) else ""
        strip = interval_strip(score, [s[m] for s in scores.values() for m in scale], mark, filled=system != baseline)
        cells += f'<td><span class="value">{number(score.value)}{sign}</span>{span}{strip}</td>'
    return f'<tr><th scope="row">{name}</th>{cells}</tr>'


def _sign(apart: Apart) -> str:
    kind = "better" if apart.better else "worse"
    return f' <b class="{kind}" title="{kind}">{apart.mark}</b>'


def _differences(
    differences: Mapping[str, Mapping[str, Apart]], metrics: Sequence[str], lower: Sequence[str], baseline: str
) -> str:
    charts = []
    for metric in metrics:
        rows = {system: values[metric] for system, values in differences.items()}
        charts.append(
            difference_chart(
                metric + (", lower is better" if metric in lower else ""),
                rows,
                {system: apart.better for system, apart in rows.items()},
                {system: _note(apart) for system, apart in rows.items()},
            )
        )
    return (
        f'<p class="quiet">Each less {escape(baseline)}, with its 95 % interval by paired draws. Filled dots: the interval '
        "leaves out 0. In brackets p corrected by Holm's method for all differences of the table.</p>"
        f'<div class="curves">{"".join(charts)}</div>'
    )


def _note(apart: Apart) -> str:
    if not math.isfinite(apart.value):
        return "undefined"
    tested = f", p {apart.p:.3f} ({apart.holm:.3f})" if math.isfinite(apart.p) else ""
    return f"{apart.value:+.3f}{tested} {apart.mark}".strip()


def _labels(
    scores: Mapping[str, Mapping[str, Score]],
    differences: Mapping[str, Mapping[str, Apart]],
    metrics: Sequence[str],
    baseline: str,
) -> str:
    tables = ""
    for measure, own in groupby(metrics, key=lambda metric: metric.split("/", 1)[0]):
        names = list(own)
        body = "".join(_line(escape(m.split("/", 1)[1]), m, names, scores, differences, baseline) for m in names)
        table = TABLE.format(head=_head(scores, baseline), body=body)
        tables += f"<details open><summary>{escape(measure)} by label</summary>{table}</details>"
    return f'<div class="by-label">{tables}</div>' if tables else ""


def _findings(findings: Mapping[str, Mapping[str, tuple[float, str]]], baseline: str) -> str:
    if not findings:
        return ""
    lines = ""
    for name in findings[baseline]:
        cells = ""
        for rows in findings.values():
            f1, words = rows[name]
            value = number(f1) if math.isfinite(f1) else '<span class="quiet">none</span>'
            cells += f'<td><span class="value">{value}</span><span class="range">{escape(words)}</span></td>'
        lines += f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'
    return (
        '<p class="quiet">F1 of CheXpert\'s observations, read from both texts by rules. Beneath it in how many of the studies '
        "whose reference names the finding the report names it too, how many reports name it without support, and how many of "
        "the hits are on the wrong side. Of several seeds all reports are counted.</p>"
        f'<div class="found">{TABLE.format(head=_head(findings, baseline), body=lines)}</div>'
    )


def _studies(
    studies: Mapping[str, tuple[str, Sequence[Differing], Sequence[Differing]]],
    wins: Mapping[str, Mapping[str, tuple[int, int, int]]],
    baseline: str,
) -> str:
    lines = ""
    for system, counts in wins.items():
        for metric, (better, equal, worse) in counts.items():
            lines += (
                f'<tr><th scope="row">{escape(system)}</th><td>{escape(metric)}</td><td>{_shares(better, equal, worse)}</td>'
                f"<td>{better:,}</td><td>{equal:,}</td><td>{worse:,}</td></tr>"
            )
    if not lines:
        return ""
    head = "".join(f"<th>{name}</th>" for name in ("by", f"against {escape(baseline)}", "better", "equal", "worse"))
    body = f'<div class="wins">{TABLE.format(head=head, body=lines)}</div>'
    cards = ""
    for system, (metric, above, below) in studies.items():
        for word, chosen in (("above", above), ("below", below)):
            if chosen:
                cards += f"<h3>{escape(system)} most {word} {escape(baseline)}, by {escape(metric)}</h3>"
                cards += f'<div class="studies">{"".join(map(_study, chosen))}</div>'
    if cards:
        body += (
            '<p class="quiet">In a report: <mark class="shared">words that the reference has too</mark>, in the same order. '
            "Beside its name its value in that study.</p>"
        )
    return body + cards


def _shares(better: int, equal: int, worse: int) -> str:
    """One bar of three parts."""
    total, left, parts = better + equal + worse, 0.0, ""
    for kind, count in (("better", better), ("equal", equal), ("worse", worse)):
        width = 100 * count / total
        parts += f'<rect class="{kind}" x="{left:.2f}" width="{width:.2f}" height="6"/>'
        left += width
    return f'<svg class="bar" viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true">{parts}</svg>'


def _study(study: Differing) -> str:
    empty = '<span class="quiet">empty</span>'
    texts = f"<div><h4>Reference</h4><p>{escape(study.reference) or empty}</p></div>"
    for system, (text, value) in study.said.items():
        texts += f"<div><h4>{escape(system)} <i>{number(value)}</i></h4><p>{_shared(text, study.reference) or empty}</p></div>"
    return f'<article><h3>{escape(study.study_id)}</h3><div class="texts">{texts}</div></article>'


def _shared(text: str, reference: str) -> str:
    """A text with the words marked that the reference has in the same order, whatever their case and punctuation."""
    words = text.split()
    bare = [word.lower().strip(".,;:!?") for word in words]
    places = [i for i, word in enumerate(bare) if word]
    ours, theirs = [bare[i] for i in places], [word for one in reference.split() if (word := one.lower().strip(".,;:!?"))]
    shared: set[int] = set()
    for start, _, size in SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks():
        # Alone, an article or preposition says nothing.
        if size > 1 or (size and len(ours[start]) > 3):
            shared.update(places[start : start + size])
    pieces = []
    for marked, run in groupby(range(len(words)), key=shared.__contains__):
        piece = escape(" ".join(words[i] for i in run))
        pieces.append(f'<mark class="shared">{piece}</mark>' if marked else piece)
    return " ".join(pieces)
