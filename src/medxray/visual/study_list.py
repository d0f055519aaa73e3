"""The list of all studies of a page: cards and images as blocks of text, which a script shows while they are in view."""

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from typing import TextIO

import numpy as np

from medxray.metrics import per_finding
from medxray.visual import ContextCard, StudyCard
from medxray.visual.agreement import Sentence, compare_reports
from medxray.visual.attention import ACROSS, EDGE, heat_sheet
from medxray.visual.charts import bar, lower_is_better, number
from medxray.visual.page import encoded, fragment, image_tag

LARGEST = ((600, 512), (1500, 384), (4000, 256), (math.inf, 160))
"""Longest side in pixels of images of lists of at most so many studies, by which a page stays below some 60 MB."""
QUALITY, THUMBNAIL = 75, 72
"""Of 100, for WebP; and the longest side of a context image."""

_REPORT_KINDS = {
    "found by both": "aw", "on another side": "w", "missed": "m", "hallucinated": "h", "named in the reference": "awm",
}  # fmt: skip
_LABEL_KINDS = {"present": "p", "absent": "n", "uncertain": "u"}
_SIGNS = {"a": ("agreed", "found by both"), "w": ("differs", "found on another side"), "m": ("missed", "missed"),
          "h": ("unsupported", "hallucinated")}  # fmt: skip
_LEGEND = {
    "agreed": "both say so", "differs": "another side or certainty", "missed": "in the reference alone",
    "unsupported": "in the prediction alone",
}  # fmt: skip
_KEYS = {
    "j or →": "next study", "k or ←": "previous study", "Enter": "open the study; from the search to the first one",
    "/": "search", "Esc": "close, or end the search", "?": "this help",
}  # fmt: skip


class StudyList:
    """Takes studies one by one, writes their cards and images to a file, and keeps what sorting and filters ask for.

    Args:
        blocks: gets a `<script>` of inert text for each card, context image and context report, a line each.
        values: score -> each study's own value (n,), NaN where it has none.
        count: n, or how many are expected, by which the size of images is chosen.

    Attributes:
        words: how many the longest report has whose words have maps.
        labels: names of the labels that studies have.
    """

    def __init__(self, blocks: TextIO, values: Mapping[str, Sequence[float] | np.ndarray], count: int) -> None:
        self._blocks = blocks
        self._side = next(side for most, side in LARGEST if count <= most)
        self._values = {name: [float(v) for v in own] for name, own in values.items()}
        self._ids: list[str] = []
        self._texts: list[tuple[str, str]] = []
        self._kinds: dict[str, str] = {}
        self._flags: list[dict[str, str]] = []
        self._own: list[dict[str, float]] = []
        self._context: dict[str, int] = {}
        self._pictured: set[str] = set()
        self.words = 0
        self.labels: dict[str, None] = {}
        self._shown: set[str] = set()

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def columns(self) -> dict[str, list[float]]:
        """Score -> each study's value: those given, then those of the cards."""
        names = dict.fromkeys(name for own in self._own for name in own)
        columns = self._values | {name: [own.get(name, math.nan) for own in self._own] for name in names}
        # Six digits are all that a page needs to hold.
        return {name: [float(f"{value:.6g}") for value in column] for name, column in columns.items()}

    @property
    def found(self) -> dict[str, dict[str, int]]:
        """Observation -> kind -> how many studies, as "a" found by both, "w" of them on another side, "m", "h"."""
        counts: dict[str, dict[str, int]] = {}
        for flags in self._flags if self._kinds is _REPORT_KINDS else ():
            for name, letter in flags.items():
                of = counts.setdefault(name, dict.fromkeys("awmh", 0))
                of[letter] += 1
        return counts

    def add(self, study: StudyCard) -> None:
        """Writes a study's blocks.

        Raises:
            MedxrayError: an image is not (H, W).
            OSError: the file cannot be written.
        """
        place = len(self._ids)
        flags, own = self._judged(study)
        scores = {name: values[place] for name, values in self._values.items() if place < len(values)} | own
        card = _card(study, place, self._side, flags, scores, self._context_of(study.context))
        self._write(f"s{place}", card)
        self._ids.append(study.study_id)
        self._texts.append((study.reference, study.prediction))
        self._flags.append(flags)
        self._own.append(own)
        if study.attention:
            self.words = max(self.words, len(study.prediction.split()))
        told = {
            "marks": study.reference and study.prediction, "confidence": study.confidence, "attention": study.attention,
            "similarity": any(card.similarity is not None for card in study.context),
        }  # fmt: skip
        self._shown |= {name for name, there in told.items() if there}

    def _judged(self, study: StudyCard) -> tuple[dict[str, str], dict[str, float]]:
        """The kind of each observation or label, and scores that come from them."""
        if study.reference:
            self._kinds = _REPORT_KINDS
            flags: dict[str, str] = {}
            for row in per_finding([study.prediction], [study.reference]):
                counts = {"w": row.wrong_side, "a": row.hits, "m": row.misses, "h": row.hallucinations}
                letter = next((letter for letter, count in counts.items() if count), None)
                if letter is not None:
                    flags[row.name] = letter
            own = {
                kind: float(sum(flag == letter for name, flag in flags.items() if name != "No Finding"))
                for kind, letter in (("findings missed", "m"), ("findings hallucinated", "h"))
            }
            return flags, own | study.scores
        if study.labels:
            self.labels |= dict.fromkeys(study.labels)
            self._kinds = _LABEL_KINDS
            letters = {1: "p", 0: "n", -1: "u"}
            flags = {name: letters[value] for name, value in study.labels.items() if value in letters}
            known = [(study.scores[name] - value) ** 2 for name, value in study.labels.items()
                     if value in (0, 1) and name in study.scores]  # fmt: skip
            return flags, {"brier": float(np.mean(known)) if known else math.nan, **study.scores}
        return {}, dict(study.scores)

    def _context_of(self, context: Sequence[ContextCard]) -> list[tuple[ContextCard, int]]:
        """Context studies with their numbers; what is shown of one is written once, however many studies draw it."""
        numbered = []
        for card in context:
            name = card.study_id
            if name not in self._context:
                self._context[name] = len(self._context)
                self._write(f"r{self._context[name]}", escape(card.report))
            if card.image is not None and name not in self._pictured:
                self._pictured.add(name)
                self._write(f"c{self._context[name]}", image_tag(card.image, THUMBNAIL, name, QUALITY))
            numbered.append((card, self._context[name]))
        return numbered

    def _write(self, name: str, content: str) -> None:
        # All that came from outside is escaped, so that no text can end the element.
        self._blocks.write(f'<script type="text/html" id="{name}">{content}</script>\n')

    def index(self) -> str:
        """What the script sorts, filters and searches by, as an element."""
        names = list(dict.fromkeys(name for flags in self._flags for name in flags))
        data = {
            "ids": self._ids,
            "texts": self._texts,
            "findings": names,
            "flags": ["".join(flags.get(name, ".") for name in names) for flags in self._flags],
            "scores": {
                name: [value if math.isfinite(value) else None for value in column]
                for name, column in self.columns.items()
            },
        }
        # In a JSON string "<" may be written as its number, so that no text can end the element.
        text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
        return f'<script type="application/json" id="index">{text}</script>\n'

    def html(self) -> str:
        """The section: legend, tools, the list that the script fills, and its dialogs."""
        if not self._ids:
            return ""
        names = list(dict.fromkeys(name for flags in self._flags for name in flags))
        columns = [name for name, values in self.columns.items() if any(map(math.isfinite, values))]
        finding = kind = ""
        if names:
            kinds = {letters: name for name, letters in self._kinds.items()}
            finding = _select("finding", "Finding", {"": "any", **{str(i): name for i, name in enumerate(names)}})
            kind = _select("kind", "that is", {"": "any", **kinds})
        better = {name: "1" for name in columns if lower_is_better(name) or name.startswith("findings ")}
        sort = _select("sort", "Sort by", {"": "order of the data", **{name: name for name in columns}}, better)
        keys = "".join(f"<dt><kbd>{key}</kbd></dt><dd>{meaning}</dd>" for key, meaning in _KEYS.items())
        count = f"{len(self._ids):,} studies"
        return (
            f'{self._legend()}<noscript><p class="verdict warn">The list of {count} needs a script, which is part of this '
            "file and was not run. All tables and charts above are complete without it.</p></noscript>"
            '<form id="tools" role="search" aria-label="Studies" hidden><label class="find">Search '
            '<input type="search" name="text" placeholder="words, &quot;a phrase&quot; or a study" autocomplete="off" '
            f'aria-keyshortcuts="/"></label>{finding}{kind}{sort}'
            '<button type="button" name="order" title="turn the order round">lowest first</button>'
            '<button type="button" name="range" hidden></button>'
            '<button type="reset">Clear</button>'
            f'<output name="count">{count}</output>'
            '<button type="button" name="keys" aria-label="Keys" aria-keyshortcuts="?">?</button></form>'
            '<div id="feed" class="studies" role="feed" aria-label="Studies"></div>'
            '<p id="none" class="quiet" hidden>No study fits. Clear the search or the filters.</p>'
            '<dialog id="opened" aria-label="Study"><div class="head"><button type="button" name="previous" '
            'aria-label="Previous study">←</button><button type="button" name="next" aria-label="Next study">→</button>'
            '<span class="place quiet" aria-live="polite"></span>'
            '<button type="button" name="close" aria-label="Close">×</button></div>'
            '<form tabindex="-1" autofocus><article></article></form></dialog>'
            '<dialog id="keys" aria-label="Keys"><div class="head"><h3>Keys</h3><button type="button" name="close" '
            f'aria-label="Close">×</button></div><dl>{keys}</dl></dialog>'
        )

    def _legend(self) -> str:
        lines = []
        if "marks" in self._shown:
            marks = "".join(f'<span><mark class="{mark}">{mark}</mark> {text}</span>' for mark, text in _LEGEND.items())
            lines.append(
                f'<span class="marks">{marks}</span> Sentences are read by rules: findings with their side and certainty; what '
                "names none is compared by its words."
            )
        if "confidence" in self._shown:
            steps = "".join(
                f'<span style="--doubt:{doubt}">{1 - doubt:.0%}</span>' for doubt in (0.0, 0.25, 0.5, 0.75, 1.0)
            )
            lines.append(f'The probability that the model gave to a word: <span class="steps">{steps}</span>.')
        if "attention" in self._shown:
            lines.append(
                "The colour over an image: where the words looked, from the average region "
                '<span class="ramp"></span> to the most looked at. Point at a word or choose it, also by the arrow keys, to see '
                "its own map; point at the image to see it bare. Attention is what the model read, not why it wrote a word."
            )
        if "similarity" in self._shown:
            lines.append("Beneath a context image: how near it is, the cosine of its features with those of the study.")
        return "".join(f'<p class="quiet legends">{line}</p>' for line in lines)


def card_of(study: StudyCard) -> str:
    """One study as a list shows it, with its context's images and reports in their places: an element, without a script."""
    blocks = io.StringIO()
    listed = StudyList(blocks, {}, 1)
    listed.add(study)
    written = dict(re.findall(r'<script type="text/html" id="(\w+)">(.*?)</script>\n', blocks.getvalue(), flags=re.DOTALL))

    def filled(place: re.Match[str]) -> str:
        return f"<{place[1]}>{written.get(place[2], place[3])}</{place[1]}>"

    card = re.sub(r'<(div|span) data-block="(\w+)">(.*?)</\1>', filled, written["s0"])
    # Without a form of its own, a card's choice of words would be that of another card with as many.
    return fragment(f"<form><article>{card}</article></form>", choices(listed.words))


def choices(words: int) -> str:
    """Style rules that turn the sheets of a study to the map of the word that is chosen, or else pointed at."""
    rules = []
    for state in (">:checked", ":hover"):
        rules += [
            f"article:has(.w{i}{state}){{--x:{(i + 1) % ACROSS};--y:{(i + 1) // ACROSS}}}" for i in range(words)
        ]
    return "".join(rules)


def _select(name: str, label: str, options: Mapping[str, str], errors: Mapping[str, str] | None = None) -> str:
    """A choice; what is an error, so that its largest values are the worst, is told to the script."""
    listed = "".join(
        f'<option value="{escape(value)}"{" data-error" if value in (errors or {}) else ""}>{escape(text)}</option>'
        for value, text in options.items()
    )
    return f'<label>{label} <select name="{name}">{listed}</select></label>'


def _card(
    study: StudyCard,
    place: int,
    side: int,
    flags: Mapping[str, str],
    scores: Mapping[str, float],
    context: Sequence[tuple[ContextCard, int]],
) -> str:
    """What stands in a study's article."""
    captions = [*study.captions, *[""] * len(study.images)]
    heats = [*_heats(study), *[""] * len(study.images)]
    images = "".join(
        f'<figure><div class="picture">{image_tag(image, side, f"{study.study_id} {caption}".strip(), QUALITY)}{heat}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for image, caption, heat in zip(study.images, captions, heats, strict=False)
    )
    texts = findings = ""
    if study.reference or study.prediction:
        reference, prediction = compare_reports(study.reference, study.prediction)
        shown = _words(study, prediction, place) if study.confidence or study.attention else _plain(prediction)
        empty = '<span class="quiet">empty</span>'
        remark = f'<p class="quiet remark">{escape(study.remark)}</p>' if study.remark else ""
        texts = (
            f'<div class="texts"><div><h4>Reference</h4><p>{_plain(reference) or empty}</p></div>'
            f"<div><h4>Prediction</h4><p>{shown or empty}</p>{remark}</div></div>"
        )
        signed = "".join(
            f'<li class="{_SIGNS[letter][0]}" title="{_SIGNS[letter][1]}">{escape(name)}</li>'
            for name, letter in flags.items() if letter in _SIGNS
        )  # fmt: skip
        findings = f'<ul class="signs" aria-label="Findings">{signed}</ul>' if signed else ""
    shown_scores = {name: value for name, value in scores.items() if name not in study.labels and math.isfinite(value)}
    values = "".join(
        f'<span data-score="{escape(name)}">{escape(name)} <b>{_short(value)}</b></span>' for name, value in shown_scores.items()
    )
    return (
        f'<div class="head"><h3>{escape(study.study_id)}</h3><button type="button" class="open">Open</button>'
        f'<p class="values">{values}</p></div><div class="body"><div class="images">{images}</div>'
        f'<div class="rest">{texts}{findings}{_bars(study)}{_context(context)}</div></div>'
    )


def _short(value: float) -> str:
    # BLEU of a study without a common word is some 1e-16, and not 0.
    nearest = round(value)
    return str(nearest) if abs(value - nearest) < 1e-9 and abs(value) < 1e6 else number(value)


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


def _plain(sentences: Sequence[Sentence]) -> str:
    return "".join(_marked(sentence, escape(sentence.text.rstrip())) for sentence in sentences)


def _marked(sentence: Sentence, inside: str) -> str:
    """A sentence's words, as HTML, in its mark; the space behind it is not marked."""
    space = sentence.text[len(sentence.text.rstrip()) :]
    return (f'<mark class="{sentence.mark}">{inside}</mark>' if sentence.mark and inside else inside) + escape(space)


def _words(study: StudyCard, sentences: Sequence[Sentence], place: int) -> str:
    """A prediction whose words are shaded by their probability and choose a map."""
    pieces, count, group = [], 0, f"map-{place}"
    sure = study.confidence if len(study.confidence) == len(study.prediction.split()) else []
    maps = bool(study.attention and len(study.attention[0]))
    for sentence in sentences:
        inside = []
        for is_space, run in groupby(sentence.text.rstrip(), key=str.isspace):
            text = escape("".join(run))
            if is_space:
                inside.append(text)
                continue
            shade = title = button = ""
            if sure and math.isfinite(sure[count]):
                shade = f' style="--doubt:{1 - sure[count]:.2f}"'
                title = f' title="{sure[count]:.0%}"'
            if maps:
                button = f'<input type="radio" name="{group}">'
            kind = "label" if maps else "span"
            inside.append(f'<{kind} class="word w{count}"{shade}{title}>{button}{text}</{kind}>')
            count += 1
        pieces.append(_marked(sentence, "".join(inside)))
    if maps:
        name = "findings" if study.pointed else "all words"
        pieces.append(f' <label class="rest-map"><input type="radio" name="{group}" checked>map of {name}</label>')
    return "".join(pieces)


def _bars(study: StudyCard) -> str:
    """Probabilities of labels as bars, beside what the reference says."""
    known = {1: "present", 0: "absent", -1: "uncertain"}
    scores = study.scores if study.labels else {}
    lines = ""
    for name, value in scores.items():
        label = study.labels.get(name)
        truth = known.get(label, "") if label is not None else ""
        lines += (
            f'<tr{" class=present" if label == 1 else ""}><th scope="row">{escape(name)}</th>'
            f"<td>{bar(value)}</td><td>{number(value)}</td><td>{truth}</td></tr>"
        )
    return f'<table class="bars"><tr><th></th><th></th><th></th><th>reference</th></tr>{lines}</table>' if lines else ""


def _context(context: Sequence[tuple[ContextCard, int]]) -> str:
    """Context studies; their images and reports are blocks of their own, which the script puts in."""
    if not context:
        return ""
    thumbnails = lines = ""
    for card, place in context:
        pool, name = escape(card.pool), escape(card.study_id)
        near = f" <b>{number(card.similarity)}</b>" if card.similarity is not None else ""
        thumbnails += (
            f'<figure class="{"normal" if card.pool == "normal" else "other"}" title="{name}">'
            f'<div data-block="c{place}"><span>no image</span></div><figcaption>{pool}{near}</figcaption></figure>'
        )
        lines += f'<li><b>{name}</b> <i>{pool}{near}</i> <span data-block="r{place}"></span></li>'
    pools = dict.fromkeys(card.pool for card, _ in context)
    counts = ", ".join(f"{sum(card.pool == pool for card, _ in context)} {escape(pool)}" for pool in pools)
    return (
        f'<div class="context"><h4>Context <span class="quiet">{counts}</span></h4>'
        f'<div class="thumbnails">{thumbnails}</div>'
        f"<details><summary>their reports</summary><ul>{lines}</ul></details></div>"
    )
