"""The room's HTML: a study's views, and what models say of it. `room.js` brings it to life."""

import json
import math
from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby
from typing import Any

import numpy as np
from PIL import Image

from medxray.app.reading import Reading, Study, View
from medxray.outputs import version
from medxray.visual import ContextCard
from medxray.visual.agreement import compare_reports
from medxray.visual.attention import ACROSS, EDGE, heat_sheet
from medxray.visual.charts import bar, number
from medxray.visual.page import encoded, image_tag

NOTICE = "Research use only. Not a medical device."
LEVELS = 4096
"""Gray levels that reach the browser, which has windows of its own."""

STRONGEST = 4.0
"""Times the average region's attention for which the strongest colour stands."""

_BUTTONS = (
    ("invert", "Invert", "i"), ("move", "Move", "m"), ("smaller", "−", "-"), ("larger", "+", "+"), ("reset", "Reset", "r"),
)  # fmt: skip
_LABELS = {"smaller": "Zoom out", "larger": "Zoom in"}
_STATES = ("invert", "move")


def header(models: Sequence[str]) -> str:
    names = "".join(f"<li>{escape(name)}</li>" for name in models)
    return f'<header class="top"><h1>Reading room</h1><ul aria-label="Models">{names}</ul><p>{NOTICE}</p></header>'


def viewer(study: Study) -> str:
    """The views on black, with window, level, zoom and inversion."""
    tools = "".join(
        f'<label class="dial">{name.capitalize()} <input type="range" name="{name}" min="{least}" max="{most}" value="{value}">'
        f"<output>{value} %</output></label>"
        for name, least, most, value in (("window", 1, 200, 100), ("level", 0, 100, 50))
    )
    acts = ""
    for action, text, key in _BUTTONS:
        pressed = ' aria-pressed="false"' if action in _STATES else ""
        label = f' aria-label="{_LABELS[action]}"' if action in _LABELS else ""
        acts += f'<button type="button" data-action="{action}" aria-keyshortcuts="{key}"{label}{pressed}>{text}</button>'
    views = "".join(_view(view, i) for i, view in enumerate(study.views))
    written = f'<details class="written"><summary>The report of this drawing</summary><p>{escape(study.report)}</p></details>'
    return (
        f'<section class="viewer" aria-label="Images"><div class="tools" role="group" aria-label="Display">{tools}'
        f'<div class="acts">{acts}</div></div>'
        f'<div class="views" data-count="{len(study.views)}">{views}</div>'
        f'<p class="hint"><b>{escape(study.title)}.</b> Drag for window and level, turn the wheel to zoom; '
        "in a picture also the keys + − i m r and the arrows.</p>"
        f"{written if study.report else ''}</section>"
    )


def no_viewer() -> str:
    """The place of views that could not be opened, lest those of another study stand beside the reason."""
    return '<section class="viewer none" aria-label="Images"><p>No study is open.</p></section>'


def _view(view: View, place: int) -> str:
    shown, (_, H, W) = view.shown, view.pixels.shape
    h, w = shown.shape
    caption = view.caption[:1].upper() + view.caption[1:]
    return (
        f'<figure class="view" style="--aspect:{w / h:.4f}"><div class="stage" tabindex="0" role="group" '
        f'aria-label="{caption}, display by keys" data-view="{place}"><div class="plane">'
        f'<canvas width="{w}" height="{h}" role="img" aria-label="{caption}" data-levels="{_levels(shown)}"></canvas>'
        f'<span class="heat"></span></div></div><figcaption>{caption} <span>{W:,} × {H:,}</span></figcaption></figure>'
    )


def _levels(picture: np.ndarray) -> str:
    """A picture (h, w) whose pixels are levels of 12 bits, red times 256 plus green."""
    levels = (np.nan_to_num(picture).clip(0, 1) * (LEVELS - 1)).round().astype(np.uint16)
    split = np.stack([levels >> 8, levels & 255, np.zeros_like(levels)], axis=-1).astype(np.uint8)
    return encoded(Image.fromarray(split))


def readings(found: Sequence[Reading]) -> str:
    """What each model says, side by side."""
    articles = "".join(_reading(reading, i) for i, reading in enumerate(found))
    names = " and ".join(reading.model for reading in found)
    return f'<section class="readings" data-count="{len(found)}" data-said="Read by {escape(names)}.">{articles}</section>'


def waiting(models: Sequence[str]) -> str:
    """The place of readings that are not made yet."""
    lines = '<div class="lines"><i></i><i></i><i></i></div>'
    articles = "".join(f'<article class="reading" aria-busy="true"><h2>{escape(name)}</h2>{lines}</article>' for name in models)
    return f'<section class="readings" data-count="{len(models)}" data-said="Reading.">{articles}</section>'


def failure(title: str, message: str, advice: str = "") -> str:
    """Why there is no reading."""
    more = f"<p>{escape(advice)}</p>" if advice else ""
    return (
        f'<section class="readings" data-said="{escape(title)}"><article class="reading failed" role="alert">'
        f"<h2>{escape(title)}</h2><p>{escape(message)}</p>{more}</article></section>"
    )


def _reading(reading: Reading, place: int) -> str:
    told = {"pretrain": "pre-trained encoder", "classify": "findings", "report": "report"}.get(reading.task, reading.task)
    views = f"{reading.views} view{'s' if reading.views > 1 else ''}"
    remarks = "".join(f'<p class="remark">{escape(text)}</p>' for text in [*reading.remarks, reading.cards[0].remark] if text)
    body = {"report": _report, "pretrain": _reconstruction}.get(reading.task, _probabilities)(reading, place)
    return (
        f'<article class="reading" data-model="{place}" aria-labelledby="model-{place}"><header><h2 id="model-{place}">'
        f"{escape(reading.model)}</h2><p>{told}, {views}, {reading.seconds:.1f} s</p></header>{remarks}{body}</article>"
    )


def _report(reading: Reading, place: int) -> str:
    card = reading.cards[0]
    text, sheets = _sentences(reading)
    if not text:
        return '<p class="empty">The model wrote nothing.</p>' + _context(card.context)
    steps = "".join(f'<i style="--doubt:{doubt}">{1 - doubt:.0%}</i>' for doubt in (0, 0.5, 1))
    rest = "Words are shaded by the model's doubt."
    ramp = ""
    if sheets:
        rest += " Point at a sentence, or choose it, to see where the model looked."
        ramp = ' attention <i class="ramp"></i>'
    return (
        f'<div class="report">{text}</div>{sheets}'
        f'<p class="readout" data-rest="{escape(rest)}" aria-live="polite">{escape(rest)}</p>'
        f'<p class="legend" aria-hidden="true">probability of a word {steps}{ramp}</p>'
        f"{_context(card.context)}{_draft(reading, place, card.prediction)}"
    )


def _sentences(reading: Reading) -> tuple[str, str]:
    """A report whose sentences can be chosen and whose words are shaded; and, for each view, the sentences' maps."""
    card = reading.cards[0]
    text, start, maps = "", 0, list[slice]()
    for sentence in compare_reports("", card.prediction)[1]:
        count = len(sentence.text.split())
        if not count:
            continue
        maps.append(slice(start, start + count))
        sure = card.confidence[start : start + count] or [math.nan] * count
        words, i = "", 0
        for is_space, run in groupby(sentence.text.strip(), key=str.isspace):
            piece = "".join(run)
            if is_space:
                words += " "
                continue
            known = math.isfinite(sure[i])
            shade = f' style="--doubt:{1 - sure[i]:.2f}" title="{sure[i]:.0%}"' if known else ""
            words += f'<span class="word"{shade}>{escape(piece)}</span>'
            i += 1
        worst = int(np.argmin(np.nan_to_num(sure, nan=2.0)))
        said = ""
        if math.isfinite(sure[worst]):
            least = sentence.text.split()[worst].rstrip(".,;")
            said = f"Words of this sentence: {np.nanmean(sure):.0%} on average, least “{least}” with {sure[worst]:.0%}."
        text += (
            f'<span class="sentence" role="button" tabindex="0" aria-pressed="false" data-tile="{len(maps)}" '
            f'data-said="{escape(said)}">{words}</span> '
        )
        start += count
    sheets = "".join(_sheets(reading, maps)) if maps and card.attention and len(card.attention[0]) == start else ""
    return text, sheets


def _sheets(reading: Reading, sentences: Sequence[slice]) -> Iterator[str]:
    """For each view the maps of sentences, which are slices of the words, as a sheet that the script moves."""
    card = reading.cards[0]
    means = [np.stack([shares[words].mean(0) for words in sentences]) for shares in card.attention]
    drawn = zip(heat_sheet(_stretched(means), [], card.study_id), reading.frames, strict=False)
    for view, ((sheet, (h, w), rows), frame) in enumerate(drawn):
        style = (
            f"--w:{100 * (w + 2 * EDGE) / w:.3f}%;--h:{100 * (h + 2 * EDGE) / h:.3f}%;--l:{100 * EDGE / w:.3f}%;"
            f"--t:{100 * EDGE / h:.3f}%;--rows:{rows};top:{frame.top:.2%};left:{frame.left:.2%};"
            f"height:{frame.height:.2%};width:{frame.width:.2%}"
        )
        yield (
            f'<span hidden class="sheet" data-view="{view}" data-across="{ACROSS}" data-style="{style}" '
            f'data-source="{encoded(sheet)}"></span>'
        )


def _stretched(maps: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Shares of attention, each (sentences, h, w), whose largest are `STRONGEST` times the average: the sheet's last colour.

    A sentence's mean is more even than its words, and the map of a study shows where it is largest, however little.
    """
    regions = sum(shares[0].size for shares in maps)
    top = float(np.quantile(np.concatenate([shares.ravel() for shares in maps]), 0.99)) * regions
    scale = (STRONGEST - 1) / (top - 1) if top > 1 else 0.0
    return [(1 + (shares * regions - 1) * scale) / regions for shares in maps]


def _context(cards: Sequence[ContextCard]) -> str:
    if not cards:
        return ""
    listed = ""
    for card in cards:
        image = "<span>no image</span>"
        if card.image is not None:
            image = image_tag(card.image, 240, f"Context study {card.study_id}")
        far = ""
        if card.similarity is not None:
            far = f'<span title="1 − cosine of the encoder&#39;s features">distance {1 - card.similarity:.3f}</span>'
        listed += (
            f'<li class="{escape(card.pool)}"><details><summary>{image}<b>{escape(card.pool)}</b>{far}</summary>'
            f"<p>{escape(card.report) or 'no report'}</p></details></li>"
        )
    return (
        '<section class="context" aria-label="Context"><h3>Context</h3><p class="remark">Training studies that the model was '
        f"given beside this one. Open one to read its report.</p><ul>{listed}</ul></section>"
    )


def _draft(reading: Reading, place: int, text: str) -> str:
    rows = max(4, 2 + len(text) // 62)
    return (
        f'<form class="draft" data-made="{escape(json.dumps(_made(reading)))}"><label for="draft-{place}">Draft</label>'
        f'<textarea id="draft-{place}" rows="{rows}" spellcheck="true">{escape(text)}</textarea>'
        f'<div class="buttons"><span class="remark">Saved without any name. {NOTICE}</span>'
        '<button type="button" data-save="txt">Save text</button>'
        '<button type="button" data-save="json">Save JSON</button></div></form>'
    )


def _made(reading: Reading) -> dict[str, Any]:
    """What a saved file says beside the draft; nothing that came with the files is in it."""
    card = reading.cards[0]
    words = card.prediction.split()
    sure = card.confidence if len(card.confidence) == len(words) else []
    return {
        "model": reading.model, "task": reading.task, "generated": card.prediction,
        "words": [[word, round(value, 4)] for word, value in zip(words, sure, strict=False)],
        "probabilities": {name: round(value, 4) for name, value in card.scores.items()},
        "medxray": version(), "notice": NOTICE,
    }  # fmt: skip


def _probabilities(reading: Reading, place: int) -> str:
    scores = sorted(reading.cards[0].scores.items(), key=lambda score: -score[1])
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{bar(value)}</td><td>{value:.0%}</td></tr>' for name, value in scores
    )
    made = escape(json.dumps(_made(reading)))
    return (
        '<table class="bars"><caption>Probability of each finding</caption><thead class="unseen"><tr><th scope="col">finding</th>'
        f'<th scope="col">bar</th><th scope="col">probability</th></tr></thead><tbody>{rows}</tbody></table>'
        f'<form class="draft" data-made="{made}"><div class="buttons"><span class="remark">Saved without any name.</span>'
        '<button type="button" data-save="json">Save JSON</button></div></form>'
    )


def _reconstruction(reading: Reading, place: int) -> str:
    parts = ""
    for view, (card, contour) in enumerate(zip(reading.cards, reading.contours, strict=True)):
        pictures = [(caption, _picture(image, caption)) for caption, image in zip(card.captions, card.images, strict=True)]
        pictures.insert(1, ("contour", _picture(contour, "contour of the chest")))
        figures = "".join(f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>" for caption, image in pictures)
        error = card.scores.get("reconstruction", math.nan)
        told = f", error {number(error)}" if math.isfinite(error) else ""
        parts += f'<h3>View {view + 1}{told}</h3><div class="steps">{figures}</div>'
    return parts


def _picture(image: np.ndarray, description: str) -> str:
    if image.ndim == 2:
        return image_tag(image, 320, description)
    colours = Image.fromarray((image.clip(0, 1) * 255).round().astype(np.uint8))
    return f'<img src="{encoded(colours)}" alt="{escape(description)}" width="{colours.width}" height="{colours.height}">'


def card_of(study: Study) -> str:
    """An example's picture, for a button, as the address of a small image."""
    small = Image.fromarray((study.views[0].shown * 255).astype(np.uint8)).resize((96, 96))
    return encoded(small, 80)
