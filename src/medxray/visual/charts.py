"""Charts as inline SVG. Colours and type come from the page's style sheet and follow light and dark."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from medxray.types import Score

Point = tuple[float, float]

_WIDTH, _HEIGHT = 400, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 14, 14, 40
_MOST_POINTS = 240
_CHART_STYLE = (
    ".intervals{font:13px system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;background:#fff}"
    ".intervals text{fill:#1c1b19}.intervals .soft{fill:#66635c;font-size:12px}.intervals .head{font-weight:600}"
    ".intervals .grid{stroke:#e4e1d9}.intervals .least{stroke:#a8501a;stroke-dasharray:3 3}"
    ".intervals .model{stroke:#1d5c86;fill:#1d5c86}.intervals .floor{stroke:#a8501a;fill:#fff}"
)
_NOT_DRAWN = ("runtime", "per_second", "flos", "epoch", "num_tokens", "memory")


class Svg(str):
    """A picture of its own, as text; a notebook shows it."""

    def _repr_svg_(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return f"Svg({len(self):,} characters)"


@dataclass
class Series:
    """A line of a chart.

    Attributes:
        name: what the legend calls it.
        points: (x, y), by x; where y is not finite the line breaks.
        dotted: draws each point and takes the second colour, for what is measured now and then.
    """

    name: str
    points: Sequence[Point]
    dotted: bool = False


def line_chart(title: str, series: Sequence[Series], x_label: str = "step") -> str:
    """A figure with one or more lines over a common x, its last values in the legend.

    Lines of more than 240 points are drawn as means of neighbours. Values that are not finite are left out,
    and counted in the legend.
    """
    thinned = [Series(s.name, _thin(s.points), s.dotted) for s in series]
    seen = [p for s in thinned for p in s.points if math.isfinite(p[1])]
    legend = "".join(map(_legend_entry, series))
    head = f'<figcaption><b>{escape(title)}</b><span class="legend">{legend}</span></figcaption>'
    if not seen:
        return f'<figure class="chart">{head}<p class="quiet">no values yet</p></figure>'
    x_ticks = _ticks(min(x for x, _ in seen), max(x for x, _ in seen), whole=True)
    y_ticks = _ticks(min(y for _, y in seen), max(y for _, y in seen))
    x_range = [min(x_ticks[0], seen[0][0]), max(x_ticks[-1], *(x for x, _ in seen))]
    frame, place = _frame((x_ticks, y_ticks), x_label, x_range)
    drawn = [frame]
    for line in thinned:
        drawn.append(_line([place(p) if math.isfinite(p[1]) else None for p in line.points], line.dotted))
    label = f"{title} against {x_label}: {', '.join(s.name for s in series)}"
    return _figure(head, label, "".join(drawn))


def histogram(title: str, values: NDArray[Any], x_label: str, bins: int = 30) -> str:
    """A figure with how many values lie in each of some equal steps; the last one takes the largest 0.5 % too.

    Args:
        values: (n,), n > 0.
        bins: steps at most; whole numbers get whole steps.
    """
    whole = np.issubdtype(values.dtype, np.integer)
    low, high = float(values.min()), max(float(np.quantile(values, 0.995)), float(values.min()))
    step = (high - low) / bins or 1.0
    if whole:
        step = max(1.0, float(math.ceil(step)))
    count = max(1, math.floor((high - low) / step) + 1) if whole else bins if high > low else 1
    edges = [low + i * step for i in range(count + 1)]
    places = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, count - 1)
    heights = np.bincount(places, minlength=count)
    x_ticks, y_ticks = _ticks(low, low + count * step, whole), _ticks(0, int(heights.max()), whole=True)
    frame, place = _frame((x_ticks, y_ticks), x_label)
    bars = ""
    for i, height in enumerate(heights.tolist()):
        if height:
            (left, top), (right, bottom) = place((edges[i], height)), place((edges[i + 1], 0))
            ends = f"{edges[i]:g}" + (f" to {edges[i + 1] - whole:g}" if not whole or step > 1 else "")
            ends += " and more" if i == count - 1 and values.max() > edges[-1] - whole else ""
            # Exact, so that a script finds the same values in it.
            of = f'data-low="{edges[i]!r}" data-high="{edges[i + 1]!r}"{" data-last" if i == count - 1 else ""}'
            bars += (
                f'<rect class="column" {of} x="{left:.1f}" y="{top:.1f}" width="{max(right - left - 1, 0.8):.1f}" '
                f'height="{bottom - top:.1f}"><title>{ends}: {height:,}</title></rect>'
            )
    median = f"median {np.median(values):.4g}"
    return _figure(_titled(title, median), f"{title}: a histogram of {len(values):,} values, {median}", frame + bars)


def density(title: str, points: NDArray[Any], x_label: str, y_label: str, note: str = "") -> str:
    """A figure with a square where points (n, 2) lie, n > 0: the more of them, the larger."""
    ticks = [_ticks(float(axis.min()), float(axis.max())) for axis in points.T]
    size = 8
    cells = (_WIDTH - _LEFT - _RIGHT) // size, (_HEIGHT - _TOP - _BOTTOM) // size
    edges = [np.linspace(axis[0], axis[-1], count + 1) for axis, count in zip(ticks, cells, strict=True)]
    counts, _, _ = np.histogram2d(points[:, 0], points[:, 1], bins=edges)
    frame, place = _frame((ticks[0], ticks[1]), x_label)
    frame += f'<text x="{_LEFT + 4}" y="{_TOP - 3}">{escape(y_label)}</text>'
    squares = ""
    for i, j in np.argwhere(counts).tolist():
        x, y = place(((edges[0][i] + edges[0][i + 1]) / 2, (edges[1][j] + edges[1][j + 1]) / 2))
        side = size * (0.4 + 0.6 * math.sqrt(counts[i, j] / counts.max()))
        where = f"{edges[0][i]:.4g}–{edges[0][i + 1]:.4g}, {edges[1][j]:.4g}–{edges[1][j + 1]:.4g}"
        squares += (
            f'<rect class="column" x="{x - side / 2:.1f}" y="{y - side / 2:.1f}" width="{side:.1f}" height="{side:.1f}">'
            f"<title>{where}: {int(counts[i, j]):,}</title></rect>"
        )
    label = f"{title}: {y_label} against {x_label} of {len(points):,} images"
    return _figure(_titled(title, note), label, frame + squares)


def _titled(title: str, note: str) -> str:
    return f"<figcaption><b>{escape(title)}</b><i>{escape(note)}</i></figcaption>"


def _figure(head: str, label: str, drawn: str) -> str:
    opening = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">'
    return f'<figure class="chart">{head}{opening}{drawn}</svg></figure>'


def _frame(
    ticks: tuple[Sequence[float], Sequence[float]], x_label: str, x_range: Sequence[float] = ()
) -> tuple[str, Callable[[Point], Point]]:
    """Grid and axis of a chart over `x_range`, by default the ticks', and where a point lies in it."""
    x_ticks, y_ticks = ticks
    left, right = x_range or (x_ticks[0], x_ticks[-1])

    def place(point: Point) -> Point:
        across = (point[0] - left) / (right - left)
        up = (point[1] - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    drawn = []
    for tick, text in zip(y_ticks, _tick_labels(y_ticks), strict=True):
        y = place((left, tick))[1]
        drawn.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        drawn.append(f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for tick, text in zip(x_ticks, _tick_labels(x_ticks), strict=True):
        x = place((tick, y_ticks[0]))[0]
        drawn.append(f'<path class="axis" d="M{x:.1f} {_HEIGHT - _BOTTOM}v4"/>')
        drawn.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 17}" text-anchor="middle">{text}</text>')
    drawn.append(f'<path class="axis" d="M{_LEFT} {_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}"/>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    drawn.append(f'<text x="{middle}" y="{_HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(drawn), place


def training_curves(log: Sequence[Mapping[str, Any]]) -> list[str]:
    """One chart a quantity of a training log: the loss, each validation metric but not those of single labels, then what else
    was logged.

    Args:
        log: rows with "step" and numbers; names that begin with "eval_" are measured on validation.
    """
    found: dict[str, list[Point]] = {}
    for row in log:
        step = row.get("step")
        if not _is_number(step):
            continue
        for name, value in row.items():
            of_label = name.startswith("eval_") and "/" in name
            skipped = name == "step" or name.startswith("train_") or of_label or any(part in name for part in _NOT_DRAWN)
            if _is_number(value) and not skipped:
                found.setdefault(name, []).append((float(step), float(value)))
    measured = [name for name in found if name.startswith("eval_") and name != "eval_loss"]
    others = [name for name in found if not name.startswith("eval_") and name != "loss"]
    charts = []
    losses = {"loss": ("train", False), "eval_loss": ("validation", True)}
    lines = [Series(label, found[name], dots) for name, (label, dots) in losses.items() if name in found]
    if lines:
        charts.append(line_chart("loss", lines))
    for name in measured:
        charts.append(line_chart(name.removeprefix("eval_"), [Series("validation", found[name], True)]))
    for name in others:
        charts.append(line_chart(name.replace("_", " "), [Series("train", found[name])]))
    return charts


def interval_chart(rows: Mapping[str, Mapping[str, Score]], metrics: Sequence[str], floors: Sequence[str] = ()) -> Svg:
    """A picture of its own: a line a row and a panel a metric, each value a dot on its interval.

    Args:
        rows: row -> metric -> score, drawn in this order; what is not defined is left out.
        metrics: panels, from left to right.
        floors: rows that others must beat, drawn in another colour; an upright line stands at the best of them.

    Returns:
        An SVG document with its own style, on white.
    """
    left, wide, gap, line, top = 16 + 7.1 * max(map(len, rows)), 190, 38, 24, 48
    width, height = left + len(metrics) * (wide + gap), top + line * len(rows) + 34
    drawn = []
    for i, row in enumerate(rows):
        drawn.append(f'<text x="{left - 14:.0f}" y="{top + line * i + 17}" text-anchor="end">{escape(row)}</text>')
    for column, metric in enumerate(metrics):
        start = left + column * (wide + gap)
        scores = {row: values[metric] for row, values in rows.items() if metric in values}
        scores = {row: score for row, score in scores.items() if math.isfinite(score.value)}
        drawn.append(f'<text class="head" x="{start:.0f}" y="22">{escape(metric)}</text>')
        if not scores:
            continue
        ends = [v for s in scores.values() for v in (s.value, s.low, s.high) if math.isfinite(v)]
        ticks = _ticks(min(0.0, *ends), max(ends))

        def x(value: float, start: float = start, ticks: Sequence[float] = ticks) -> float:
            return start + wide * (value - ticks[0]) / (ticks[-1] - ticks[0])

        bottom = top + line * len(rows) + 4
        for tick, text in zip(ticks, _tick_labels(ticks), strict=True):
            drawn.append(f'<path class="grid" d="M{x(tick):.1f} {top}V{bottom}"/>')
            if tick in (ticks[0], ticks[-1]) or len(ticks) < 6:
                place = f'x="{x(tick):.1f}" y="{bottom + 17}" text-anchor="middle"'
                drawn.append(f'<text class="soft" {place}>{text}</text>')
        least = [scores[row].value for row in floors if row in scores]
        if least:
            best = min(least) if lower_is_better(metric) else max(least)
            drawn.append(f'<path class="least" d="M{x(best):.1f} {top}V{bottom}"/>')
        for i, row in enumerate(rows):
            if row not in scores:
                continue
            score, y = scores[row], top + line * i + 12.5
            span = ""
            if math.isfinite(score.low) and math.isfinite(score.high):
                span = f'<path stroke-width="2" d="M{x(score.low):.1f} {y}H{x(score.high):.1f}"/>'
            label = f"{row}, {metric}: {number(score.value)}"
            drawn.append(
                f'<g class="{"floor" if row in floors else "model"}"><title>{escape(label)}</title>{span}'
                f'<circle cx="{x(score.value):.1f}" cy="{y}" r="4" stroke-width="1.6"/></g>'
            )
    size = f'width="{width:.0f}" height="{height}" viewBox="0 0 {width:.0f} {height}"'
    return Svg(
        f'<svg xmlns="http://www.w3.org/2000/svg" class="intervals" {size} role="img"><style>{_CHART_STYLE}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(drawn)}</svg>\n'
    )


def difference_chart(title: str, rows: Mapping[str, Score], better: Mapping[str, bool | None], notes: Mapping[str, str]) -> str:
    """A figure of differences, a forest plot: each row a dot on its interval, and an upright line at no difference.

    Args:
        title: what differs.
        rows: name -> difference, drawn in this order; one that is not defined is said to be.
        better: row -> True, False, or None where that is open, which makes the dot hollow.
        notes: row -> what stands at the right above its interval.
    """
    line, height = 46, 46 * len(rows) + 26
    ends = [v for score in rows.values() for v in (score.value, score.low, score.high) if math.isfinite(v)]
    ticks = _ticks(min(0.0, *ends), max(0.0, *ends)) if ends else [-1.0, 0.0, 1.0]

    def x(value: float) -> float:
        return 14 + (_WIDTH - 28) * (value - ticks[0]) / (ticks[-1] - ticks[0])

    drawn = []
    for tick, text in zip(ticks, _tick_labels(ticks), strict=True):
        kind = "axis" if abs(tick) < 1e-12 else "grid"
        drawn.append(f'<path class="{kind}" d="M{x(tick):.1f} 0V{height - 24}"/>')
        drawn.append(f'<text x="{x(tick):.1f}" y="{height - 8}" text-anchor="middle">{text}</text>')
    for i, (row, score) in enumerate(rows.items()):
        y = line * i + 30
        drawn.append(f'<text class="row" x="4" y="{y - 13}">{escape(_cut(row, 28))}</text>')
        drawn.append(f'<text class="note" x="{_WIDTH - 4}" y="{y - 13}" text-anchor="end">{escape(notes.get(row, ""))}</text>')
        if not math.isfinite(score.value):
            continue
        span = ""
        if math.isfinite(score.low) and math.isfinite(score.high):
            span = f'<path class="interval" d="M{x(score.low):.1f} {y}H{x(score.high):.1f}"/>'
        kind = {True: "better", False: "worse", None: "open"}[better.get(row)]
        dot = f'<circle cx="{x(score.value):.1f}" cy="{y}" r="4"/>'
        drawn.append(f'<g class="apart {kind}"><title>{escape(row)}: {number(score.value)}</title>{span}{dot}</g>')
    opening = f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}: differences">'
    return f'<figure class="chart">{_titled(title, "")}{opening}{"".join(drawn)}</svg></figure>'


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def lower_is_better(metric: str) -> bool:
    """Whether a metric is an error, by its name."""
    measure = metric.split("/")[0]
    return measure in ("ece", "brier") or "error" in measure or "loss" in measure


def interval_strip(score: Score, others: Sequence[Score], mark: float, filled: bool) -> str:
    """A dot and its interval on the common scale of `others`, with a tick at the value `mark` unless NaN."""
    ends = [v for s in [score, *others] for v in (s.value, s.low, s.high) if math.isfinite(v)]
    if not math.isfinite(score.value):
        return ""
    low, high = min(ends), max(ends)
    span = (high - low) or 1.0

    def x(value: float) -> float:
        return 5 + 90 * (value - low) / span if high > low else 50

    drawn = ""
    if math.isfinite(mark):
        drawn += f'<path class="mark" d="M{x(mark):.1f} 0V12"/>'
    if math.isfinite(score.low) and math.isfinite(score.high):
        drawn += f'<path class="interval" d="M{x(score.low):.1f} 6H{x(score.high):.1f}"/>'
    kind = "filled" if filled else "hollow"
    drawn += f'<circle class="{kind}" cx="{x(score.value):.1f}" cy="6" r="3.2"/>'
    return f'<svg class="strip" viewBox="0 0 100 12" aria-hidden="true">{drawn}</svg>'


def bar(share: float) -> str:
    """A bar for a number in 0..1; numbers beyond are cut."""
    width = 100 * min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0
    return (
        '<svg class="bar" viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="track" width="100" height="6"/>'
        f'<rect class="fill" width="{width:.1f}" height="6"/></svg>'
    )


def number(value: float) -> str:
    """Three decimals, or three digits where that would hide the value."""
    if not math.isfinite(value):
        return "undefined"
    return f"{value:.3f}" if value == 0 or 5e-3 <= abs(value) < 1e4 else _scientific(f"{value:.3g}")


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _thin(points: Sequence[Point]) -> list[Point]:
    """At most 240 points: means of equal runs, of their finite values."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    thinned = []
    for run in np.array_split(np.array(points, dtype=np.float64), _MOST_POINTS):
        finite = run[np.isfinite(run[:, 1])]
        x, y = finite.mean(axis=0) if len(finite) else (run[:, 0].mean(), math.nan)
        thinned.append((float(x), float(y)))
    return thinned


def _line(places: Sequence[Point | None], dotted: bool) -> str:
    pieces: list[list[str]] = [[]]
    dots = ""
    for i, spot in enumerate(places):
        if spot is None:
            pieces.append([])
            continue
        text = f"{spot[0]:.1f} {spot[1]:.1f}"
        pieces[-1].append(text)
        alone = places[i - 1 : i] in ([], [None]) and places[i + 1 : i + 2] in ([], [None])
        if dotted or alone:
            dots += f'<circle cx="{spot[0]:.1f}" cy="{spot[1]:.1f}" r="2.8"/>'
    path = "".join(f"M{'L'.join(piece)}" for piece in pieces if len(piece) > 1)
    return f'<g class="series {"dotted" if dotted else "plain"}"><path d="{path}"/>{dots}</g>'


def _legend_entry(series: Series) -> str:
    dot = '<circle cx="11" cy="5" r="2.8"/>' if series.dotted else ""
    kind = "dotted" if series.dotted else "plain"
    swatch = f'<svg viewBox="0 0 22 10"><g class="series {kind}"><path d="M1 5L21 5"/>{dot}</g></svg>'
    finite = [y for _, y in series.points if math.isfinite(y)]
    last = f" <i>last {number(finite[-1])}</i>" if finite else ""
    lost = len(series.points) - len(finite)
    note = f" <i>({lost} not finite)</i>" if lost else ""
    return f"<span>{swatch} {escape(series.name)}{last}{note}</span>"


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Four to seven round numbers that cover low..high; at least two."""
    if high <= low:
        pad = abs(low) / 2 or 1.0
        low, high = (low, low + 1) if whole else (low - pad, high + pad)
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    if whole:
        step = max(step, 1.0)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _tick_labels(ticks: Sequence[float]) -> list[str]:
    step, most = ticks[1] - ticks[0], max(abs(t) for t in ticks)
    if most >= 1e4 and step >= 1e2:
        return [f"{t / 1e3:g}k" if t else "0" for t in ticks]
    if most < 1e-2 or most >= 1e5:
        return [_scientific(f"{t:.3g}") if abs(t) > step / 2 else "0" for t in ticks]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{t:.{decimals}f}" for t in ticks]


def _scientific(text: str) -> str:
    mantissa, e, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if e else text


def reliability_chart(title: str, bins: Sequence[tuple[float, float, float, float, int]]) -> str:
    """A figure of how often what is told with a probability is there: a dot a bin, the larger the more are in it, on its
    interval, and the diagonal of probabilities that can be taken at their word. Its expected calibration error stands above.

    Args:
        title: whose probabilities.
        bins: by probability: their mean probability, share, low and high end of its interval, and number.
    """
    if not bins:
        return f'<figure class="chart">{_titled(title, "")}<p class="quiet">no studies</p></figure>'
    ticks = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    frame, place = _frame((ticks, ticks), "probability", [0.0, 1.0])
    frame += f'<text x="{_LEFT + 4}" y="{_TOP - 3}">share that has it</text>'
    (left, bottom), (right, top) = place((0, 0)), place((1, 1))
    frame += f'<path class="axis" stroke-dasharray="3 4" d="M{left:.1f} {bottom:.1f}L{right:.1f} {top:.1f}"/>'
    most, total = max(n for *_, n in bins), sum(n for *_, n in bins)
    drawn = "".join(
        f'<path d="M{place((p, low))[0]:.1f} {place((p, low))[1]:.1f}V{place((p, high))[1]:.1f}"/>' for p, _, low, high, _ in bins
    )
    for p, share, low, high, n in bins:
        x, y = place((p, share))
        drawn += (
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{2 + 4.5 * math.sqrt(n / most):.1f}"><title>{n:,} at {p:.3f}: '
            f"{share:.3f} ({low:.3f}–{high:.3f})</title></circle>"
        )
    error = sum(n * abs(p - share) for p, share, _, _, n in bins) / total
    note = f"ECE {number(error)}, {total:,} probabilities"
    label = f"{title}: share that has it against probability, {note}"
    return _figure(_titled(title, note), label, f'{frame}<g class="series plain">{drawn}</g>')
