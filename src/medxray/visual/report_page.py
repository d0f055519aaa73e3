"""The page of a run folder: one HTML file that needs nothing beside it and no network."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

from medxray.types import Score, Scores
from medxray.visual import ContextCard, StudyCard
from medxray.visual.attention import ACROSS, EDGE, heat_sheet
from medxray.visual.charts import bar, interval_strip, lower_is_better, number, training_curves
from medxray.visual.page import TABLE, encoded, image_tag, write_page

LARGEST, LARGEST_OF_MANY, THUMBNAIL = 256, 176, 80
"""Longest side in pixels of a study's one or two images, of more, and of a context image."""

_FLOORS = ("best constant", "most frequent", "nearest")
_MAIN = ("finding-f1", "bleu-4", "auroc", "average-precision", "reconstruction-error")
_SHARED_WORDS = 3


def report_page(
    path: str | os.PathLike[str],
    *,
    title: str,
    spec_yaml: str,
    log: Sequence[Mapping[str, Any]],
    scores: Scores | None,
    studies: Sequence[StudyCard],
    facts: Mapping[str, str],
    notes: Sequence[str],
) -> None:
    """Write a run's page; a file that is there is replaced only once the new one is complete.

    Args:
        path: the file to write; its folder is made when missing.
        title: the run's name.
        spec_yaml: the resolved spec.
        log: rows of the training log, as `training_curves` takes them.
        scores: the table, or None before an evaluation. Rows called after a floor ("best constant ...", "most
            frequent ...", "nearest ...") are what the verdict compares with.
        studies: shown in this order.
        facts: versions, parameters, times.
        notes: sentences that a reader of the scores must know.

    Raises:
        RunError: the file cannot be written.
        MedxrayError: an image is not (H, W).
    """
    curves = training_curves(log)
    sections = {
        "Scores": _scores(scores, [*(scores.notes if scores else []), *notes]),
        "Training": f'<div class="curves">{"".join(curves)}</div>' if curves else "",
        "Studies": _studies(studies),
        "Spec": f"<details><summary>The resolved spec</summary><pre>{escape(spec_yaml)}</pre></details>",
        "Run": "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items()) + "</dl>",
    }
    sections["Run"] = "" if sections["Run"] == "<dl></dl>" else sections["Run"]
    words = max((len(study.prediction.split()) for study in studies if study.attention), default=0)
    write_page(path, title, _verdict(scores), sections, _choices(words))


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


def _studies(studies: Sequence[StudyCard]) -> str:
    if not studies:
        return ""
    lines = []
    if any(study.reference and study.prediction for study in studies):
        lines.append(
            'In a prediction: <mark class="shared">words that the reference has too</mark>, three or more in a row or a '
            'whole sentence. In a reference: <mark class="missed">what the prediction lacks</mark>.'
        )
    if any(study.confidence for study in studies):
        steps = "".join(f'<span style="--doubt:{doubt}">{1 - doubt:.0%}</span>' for doubt in (0.0, 0.25, 0.5, 0.75, 1.0))
        lines.append(f'The probability that the model gave to a word: <span class="steps">{steps}</span>.')
    if any(study.attention for study in studies):
        lines.append(
            "The colour over an image: where the words looked, from the average region "
            '<span class="ramp"></span> to the most looked at. Point at a word or choose it, also by the arrow keys, to see '
            "its own map; point at the image to see it bare. Attention is what the model read, not why it wrote a word."
        )
    if any(card.similarity is not None for study in studies for card in study.context):
        lines.append("Beneath a context image: how near it is, the cosine of its features with those of the study.")
    legend = "".join(f'<p class="quiet">{line}</p>' for line in lines)
    written = any(study.reference or study.prediction for study in studies)
    cards = "".join(_study(study, i) for i, study in enumerate(studies))
    return f'{legend}<div class="studies{"" if written else " pictures"}">{cards}</div>'


def _study(study: StudyCard, place: int) -> str:
    largest = LARGEST if len(study.images) <= 2 else LARGEST_OF_MANY
    captions = [*study.captions, *[""] * len(study.images)]
    heats = [*_heats(study), *[""] * len(study.images)]
    images = "".join(
        f'<figure><div class="picture">{image_tag(image, largest, f"{study.study_id} {caption}".strip())}{heat}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for image, caption, heat in zip(study.images, captions, heats, strict=False)
    )
    texts = ""
    if study.reference or study.prediction:
        both = bool(study.reference and study.prediction)
        reference = _plain(_marked(study.reference, study.prediction if both else None, "missed"))
        marked = _marked(study.prediction, study.reference if both else None, "shared")
        prediction = _words(study, marked, place) if study.confidence or study.attention else _plain(marked)
        empty = '<span class="quiet">empty</span>'
        remark = f'<p class="quiet remark">{escape(study.remark)}</p>' if study.remark else ""
        texts = (
            f'<div class="texts"><div><h4>Reference</h4><p>{reference or empty}</p></div>'
            f"<div><h4>Prediction</h4><p>{prediction or empty}</p>{remark}</div></div>"
        )
    return (
        f'<article><h3>{escape(study.study_id)}</h3><div class="body"><div class="images">{images}</div>'
        f'<div class="rest">{texts}{_bars(study)}{_context(study.context)}</div></div></article>'
    )


def _heats(study: StudyCard) -> list[str]:
    """For each image with attention its sheet of maps, the one at rest first, then one for each word."""
    if not study.attention or not study.attention[0].shape[0]:
        return []
    sheets = []
    for sheet, (h, w), rows in heat_sheet(study.attention, study.pointed, study.study_id):
        # One tile of the sheet fills the frame, but for its edge; --x and --y say which.
        across, down = w + 2 * EDGE, h + 2 * EDGE
        style = (
            f"--w:{100 * across / w:.3f}%;--h:{100 * down / h:.3f}%;--l:{100 * EDGE / w:.3f}%;--t:{100 * EDGE / h:.3f}%;"
            f"--rows:{rows}"
        )
        data = encoded(sheet)
        sheets.append(f'<span class="heat" style="{style}"><img src="{data}" alt=""></span>')
    return sheets


def _choices(words: int) -> str:
    """Style rules that turn the sheets of a study to the map of the word that is chosen, or else pointed at."""
    rules = []
    for state in (">:checked", ":hover"):
        rules += [
            f"article:has(.w{i}{state}){{--x:{(i + 1) % ACROSS};--y:{(i + 1) // ACROSS}}}" for i in range(words)
        ]
    return "".join(rules)


def _words(study: StudyCard, marked: Sequence[tuple[str, str]], place: int) -> str:
    """A prediction whose words are shaded by their probability and choose a map; `marked` as `_marked` gives it."""
    pieces, count, group = [], 0, f"map-{place}"
    sure = study.confidence if len(study.confidence) == len(study.prediction.split()) else []
    maps = bool(study.attention and len(study.attention[0]))
    for is_space, run in groupby(marked, key=lambda piece: piece[0].isspace()):
        text = _plain(list(run))
        if is_space:
            pieces.append(text)
            continue
        shade = title = button = ""
        if sure and math.isfinite(sure[count]):
            shade = f' style="--doubt:{1 - sure[count]:.2f}"'
            title = f' title="{sure[count]:.0%}"'
        if maps:
            button = f'<input type="radio" name="{group}">'
        kind = "label" if maps else "span"
        pieces.append(f'<{kind} class="word w{count}"{shade}{title}>{button}{text}</{kind}>')
        count += 1
    if maps:
        name = "findings" if study.pointed else "all words"
        pieces.append(f' <label class="rest-map"><input type="radio" name="{group}" checked>map of {name}</label>')
    return "".join(pieces)


def _bars(study: StudyCard) -> str:
    if not study.scores:
        return ""
    if len(study.scores) == 1:
        name, value = next(iter(study.scores.items()))
        return f'<p class="single">{escape(name)} <b>{number(value)}</b></p>'
    known = {1: "present", 0: "absent", -1: "uncertain"}
    head = "<tr><th></th><th></th><th></th><th>reference</th></tr>" if study.labels else ""
    lines = ""
    for name, value in study.scores.items():
        label = study.labels.get(name)
        truth = known.get(label, "") if label is not None else ""
        lines += (
            f'<tr{" class=present" if label == 1 else ""}><th scope="row">{escape(name)}</th>'
            f"<td>{bar(value)}</td><td>{number(value)}</td>{f'<td>{truth}</td>' if study.labels else ''}</tr>"
        )
    return f'<table class="bars">{head}{lines}</table>'


def _context(context: Sequence[ContextCard]) -> str:
    if not context:
        return ""
    thumbnails = lines = ""
    for card in context:
        pool, name = escape(card.pool), escape(card.study_id)
        near = f" <b>{number(card.similarity)}</b>" if card.similarity is not None else ""
        picture = image_tag(card.image, THUMBNAIL, card.study_id) if card.image is not None else "<span>no image</span>"
        thumbnails += (
            f'<figure class="{"normal" if card.pool == "normal" else "other"}" '
            f'title="{name}: {escape(card.report)}">{picture}<figcaption>{pool}{near}</figcaption></figure>'
        )
        lines += f"<li><b>{name}</b> <i>{pool}{near}</i> {escape(card.report)}</li>"
    counts = ", ".join(
        f"{sum(card.pool == pool for card in context)} {escape(pool)}"
        for pool in dict.fromkeys(c.pool for c in context)
    )
    return (
        f'<div class="context"><h4>Context <span class="quiet">{counts}</span></h4>'
        f'<div class="thumbnails">{thumbnails}</div>'
        f"<details><summary>their reports</summary><ul>{lines}</ul></details></div>"
    )


def _marked(text: str, other: str | None, kind: str) -> list[tuple[str, str]]:
    """The text in pieces, each with its mark: `shared` for words that `other` has too, `missed` for those that it lacks,
    "" for what is not marked, as all is where `other` is None."""
    tokens = _tokens(text)
    if other is None:
        return [(token, "") for token in tokens]
    there = {run for sentence in _sentences(_tokens(other)) for run in _runs([word for _, word in sentence])}
    common = [False] * len(tokens)
    for sentence in _sentences(tokens):
        words = [word for _, word in sentence]
        length = min(_SHARED_WORDS, len(words))
        for start in range(len(words) - length + 1):
            if tuple(words[start : start + length]) in there or ("", *words) in there:
                for place, _ in sentence[start : start + length]:
                    common[place] = True
    marked = [bool(_word(token)) and common[i] == (kind == "shared") for i, token in enumerate(tokens)]
    # A space between two marked words of a sentence belongs to the mark.
    for i in range(1, len(tokens) - 1):
        if tokens[i].isspace() and marked[i - 1] and marked[i + 1]:
            marked[i] = True
    return [(token, kind if mark else "") for token, mark in zip(tokens, marked, strict=True)]


def _plain(pieces: Sequence[tuple[str, str]]) -> str:
    """Pieces with their marks, neighbours of one mark in one."""
    found = []
    for kind, run in groupby(pieces, key=lambda piece: piece[1]):
        piece = escape("".join(text for text, _ in run))
        found.append(f'<mark class="{kind}">{piece}</mark>' if kind else piece)
    return "".join(found)


def _tokens(text: str) -> list[str]:
    return re.findall(r"\s+|[^\s.;!?]+(?:[.][^\s.;!?]+)*|[.;!?]+", text)


def _word(token: str) -> str:
    return re.sub(r"[^\w]+", "", token.lower())


def _sentences(tokens: Sequence[str]) -> list[list[tuple[int, str]]]:
    """Words with their places, sentence by sentence."""
    sentences: list[list[tuple[int, str]]] = [[]]
    for i, token in enumerate(tokens):
        if re.fullmatch(r"[.;!?]+", token):
            sentences.append([])
        elif word := _word(token):
            sentences[-1].append((i, word))
    return [sentence for sentence in sentences if sentence]


def _runs(words: list[str]) -> list[tuple[str, ...]]:
    """Every three words in a row, and the whole sentence, told apart by an empty first word."""
    inside = [tuple(words[i : i + _SHARED_WORDS]) for i in range(len(words) - _SHARED_WORDS + 1)]
    return [*inside, ("", *words)]
