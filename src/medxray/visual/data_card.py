"""The card of a data set: what `medxray.data.inspection` found in it, on one page."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape

import numpy as np

from medxray.data.inspection import (
    GROUPS,
    LISTED,
    LONG,
    OF_A_GROUP,
    PICTURE,
    RARE,
    SAMPLES,
    SHOWN,
    Copies,
    Inspection,
    LabelCounts,
    Reports,
    Unusual,
)
from medxray.visual.charts import bar, density, histogram
from medxray.visual.page import TABLE, image_tag, style, write_page

_CHECKED = {
    "patients": "No patient is in more than one split.",
    "images": "No picture is in more than one split, as the same file, the same pixels or a near copy.",
    "reports": f"No report of {LONG} words or more, in at most {RARE} studies, is in more than one split.",
    "inputs": "No indication or prior holds the study's own report.",
    "labels": "No picture is in studies whose labels contradict each other.",
}
_BETWEEN = {
    "splits": "in more than one split",
    "patients": "of more than one patient, in one split",
    "studies": "of more than one study of a patient, in one split",
    "views of one study": "within one study",
}
_TOO_MANY = 8


def data_card(path: str | os.PathLike[str], found: Inspection, title: str = "") -> None:
    """Write a data set's card.

    Args:
        path: the file to write; its folder is made when missing.
        found: what is shown.
        title: by default the name of the data set's folder.

    Raises:
        RunError: the file cannot be written.
    """
    sections = {
        "Leaks": _leaks(found),
        "Studies": _studies(found),
        "Labels": _labels(found),
        "Images": _images(found),
        "Copies": _copies(found),
        "Reports": _reports(found.reports),
        "Samples": _samples(found),
        "Skipped": _skipped(found),
        "Source": _source(found),
    }
    write_page(path, title or f"Data card: {found.root.resolve().name}", _verdict(found), sections, style("data_card.css"))


def verdict(found: Inspection) -> list[str]:
    """What a reader must know first, in plain sentences: leaks, what stops a fit, and how much was looked at."""
    certain = [leak.text for leak in found.leaks if leak.certain]
    doubtful = [leak.text for leak in found.leaks if not leak.certain]
    lines = [f"Leaks: {'; '.join(certain)}." if certain else f"No leak was found{_in_sample(found)}."]
    if doubtful:
        lines.append(f"Doubtful: {'; '.join(doubtful)}.")
    if found.refused:
        lines.append(f"A fit would not begin: {found.refused}")
    if found.skipped:
        lines.append(f"{sum(found.skipped.values()):,} images, files or studies cannot be used or are doubtful; see Skipped.")
    if not found.copies_whole:
        lines.append("The search for copies was ended: there are too many of them.")
    return lines


def _in_sample(found: Inspection) -> str:
    return f" in a sample of {found.looked:,} of {found.total:,} images" if found.sampled else ""


def _verdict(found: Inspection) -> str:
    lines = verdict(found)
    warn = " warn" if found.leaking or found.refused else ""
    first, *others = (escape(line) for line in lines)
    sampled = (
        f"Images were looked at in a sample: {found.looked:,} of {found.total:,}, chosen by seed {found.seed}. "
        "Copies of images outside it are not seen. Tables are counted whole."
    )
    return f'<p class="verdict{warn}">{"<br>".join([f"<b>{first}</b>", *others])}</p>' + (
        f'<p class="quiet">{sampled}</p>' if found.sampled else ""
    )


def _leaks(found: Inspection) -> str:
    lines = ""
    for kind, fine in _CHECKED.items():
        own = [leak for leak in found.leaks if leak.kind == kind]
        if not own:
            lines += f'<li class="fine">{escape(fine)}</li>'
        for leak in own:
            more = f" and {leak.count - len(leak.examples):,} more" if leak.count > len(leak.examples) else ""
            names = "".join(f"<li>{escape(name)}</li>" for name in leak.examples)
            lines += (
                f'<li class="{"found" if leak.certain else "doubt"}"><b>{_capital(escape(leak.text))}.</b>'
                f"<details open><summary>which</summary><ul>{names}</ul>{more}</details></li>"
            )
    return f'<ul class="checks">{lines}</ul>'


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _studies(found: Inspection) -> str:
    splits = {split or "all": counts for split, counts in found.splits.items()}
    head = _heads("studies", "patients", "images", "reports")
    body = "".join(
        _row(split, [f"{n:,}" for n in (c.studies, c.patients, c.images, c.reports)], own=split == "all")
        for split, c in splits.items()
    )
    counts = TABLE.format(head=head, body=body)
    names = [split for split in found.splits if split]
    views = TABLE.format(
        head=_heads("all", *names),
        body="".join(
            _row(view, [f"{sum(own.values()):,}", *(f"{own[split]:,}" for split in names)])
            for view, own in found.views.items()
        ),
    )
    other = (
        f'<p class="quiet">{found.other_view:,} images whose header tells another view than the data set.</p>'
        if found.other_view
        else ""
    )
    return (
        f'<div class="tables">{counts}<div><h3>Images by view</h3>{views}{other}</div>'
        f"{_distribution('Studies of a patient', found.per_patient)}"
        f"{_distribution('Images of a study', found.per_study)}</div>"
    )


def _heads(*names: str) -> str:
    return "".join(f'<th scope="col">{escape(name)}</th>' for name in names)


def _row(name: str, cells: Iterable[str], own: bool = False) -> str:
    filled = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr{" class=own" if own else ""}><th scope="row">{escape(name)}</th>{filled}</tr>'


def _distribution(title: str, counts: Mapping[int, int]) -> str:
    shares = {f"{number}": count for number, count in counts.items() if number <= _TOO_MANY}
    more = sum(count for number, count in counts.items() if number > _TOO_MANY)
    return _bars(title, shares | ({f"more than {_TOO_MANY}, at most {max(counts)}": more} if more else {}))


def _bars(title: str, counts: Mapping[str, int]) -> str:
    """A table of counts with bars, the shares of them all."""
    whole = sum(counts.values())
    if not whole:
        return ""
    rows = list(counts.items())
    shown = rows if len(rows) <= LISTED else rows[: LISTED - 1]
    if len(rows) > len(shown):
        shown = [*shown, (f"{len(rows) - len(shown)} others", sum(n for _, n in rows[len(shown) :]))]
    lines = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{bar(n / whole)}</td><td>{n:,}</td><td>{_percent(n / whole)}</td></tr>'
        for name, n in shown
    )
    return f'<div class="counts"><h3>{escape(title)}</h3><table class="bars">{lines}</table></div>'


def _percent(share: float) -> str:
    if not math.isfinite(share):
        return "–"
    return f"{share:.1%}" if 0.001 <= share <= 0.999 or share in (0, 1) else ("<0.1%" if share < 0.5 else ">99.9%")


def _labels(found: Inspection) -> str:
    if not found.labels:
        return ""
    splits = [split for split in found.splits if split]
    order = "<i>present / absent / uncertain / missing</i>"
    head = _heads("prevalence") + "".join(f'<th scope="col">{escape(split)} {order}</th>' for split in splits)
    lines = []
    for name, own in found.labels.items():
        whole = LabelCounts(*(sum(values) for values in zip(*own.values(), strict=True)))
        rate = f"<span>{_percent(whole.prevalence)}</span>{bar(whole.prevalence)}"
        lines.append(_row(name, [rate, *(_label_cell(own[split]) for split in splits)]))
    told = "Prevalence is the share of present among present and absent; uncertain and missing ones are left out of it."
    return f'<p class="quiet">{told}</p><div class="labels">{TABLE.format(head=head, body="".join(lines))}</div>'


def _label_cell(counts: LabelCounts) -> str:
    return f'<span>{_percent(counts.prevalence)}</span><i>{" / ".join(f"{n:,}" for n in counts)}</i>'


def _images(found: Inspection) -> str:
    if not len(found.sizes):
        return '<p class="quiet">No image could be read.</p>' if found.total else ""
    aspect = found.sizes[:, 0] / found.sizes[:, 1]
    low, middle, high = np.quantile(aspect, [0.05, 0.5, 0.95])
    note = f"width / height {middle:.2f}, 90 % from {low:.2f} to {high:.2f}"
    unique, counts = np.unique(found.sizes, axis=0, return_counts=True)
    charts = density("size in pixels", found.sizes, "width", "height", note) if len(unique) > 1 else ""
    charts += density("brightness and contrast", found.gray, "mean gray, 0 black to 1 white", "standard deviation")
    order = np.argsort(-counts, kind="stable")
    common = {f"{unique[i][0]} × {unique[i][1]}": int(counts[i]) for i in order}
    tables = "".join(_bars(_capital(name), own) for name, own in found.headers.items())
    shown = "".join(_unusual(found, entry) for entry in found.unusual)
    alone = "" if any(entry.count for entry in found.unusual) else (
        '<p class="quiet">No image is constant, saturated, black, faint or inverted-looking.</p>'
    )  # fmt: skip
    return (
        f'<div class="curves">{charts}</div><div class="tables">{_bars("Width × height", common)}{tables}</div>'
        f'<h3>What stands out</h3>{alone}<div class="entries">{shown}</div>'
    )


def _unusual(found: Inspection, entry: Unusual) -> str:
    figures = "".join(
        _figure(found, image.name, f"{image.split} {image.view}", f"{value:.2f}") for image, value in entry.images
    )
    count = f"<b>{entry.count:,}</b> " if entry.count else ""
    first = f" The {SHOWN} that are most so:" if entry.count > SHOWN else ""
    return _gallery(f'<p class="quiet">{count}{escape(_capital(entry.what))}.{first}</p>', figures, len(entry.images))


def _gallery(head: str, figures: str, count: int) -> str:
    """Pictures under a heading, as wide as they need, so that small ones stand side by side."""
    return f'<div class="entry" style="--n:{count}">{head}<div class="gallery">{figures}</div></div>'


def _figure(found: Inspection, name: str, caption: str, measured: str = "") -> str:
    picture = found.pictures[name].astype(np.float32) / 255
    value = f" <i>{measured}</i>" if measured else ""
    return (
        f'<figure title="{escape(name)}">{image_tag(picture, PICTURE, name)}'
        f"<figcaption>{escape(caption)}{value}<br><small>{escape(name)}</small></figcaption></figure>"
    )


def _copies(found: Inspection) -> str:
    groups = sum(found.copies_between.values())
    if not found.looked:
        return ""
    if not groups:
        return f'<p class="quiet">No picture stands twice among {len(found.sizes):,} images{_in_sample(found)}.</p>'
    counts = {_BETWEEN[name]: found.copies_between[name] for name in _BETWEEN if name in found.copies_between}
    told = (
        "Images that show one picture. Distance: in how many of 64 bits the perceptual hash differs from the first image's. "
        "Correlation: that of its fine detail. Copies may be resized, encoded anew, brighter, or inverted; mirrored ones "
        "and other views of a patient are none."
    )
    first = f"The first {GROUPS} of {groups:,}, those across splits before others." if groups > GROUPS else ""
    body = "".join(_group(found, group) for group in found.copies)
    return (
        f'<p class="quiet">{told}</p>{_bars("Pictures that stand more than once", counts)}'
        f'<p class="quiet">{first}</p>'
        f'<div class="groups">{body}</div>'
    )


def _group(found: Inspection, group: Copies) -> str:
    figures = ""
    for i, name in enumerate(group.images[:OF_A_GROUP]):
        same = f"{group.kinds[i]}, distance {group.distances[i]}, correlation {group.correlations[i]:.3f}" if i else ""
        picture = image_tag(found.pictures[name].astype(np.float32) / 255, PICTURE, name)
        figures += (
            f'<figure title="{escape(name)}">{picture}<figcaption><b>{escape(group.splits[i])}</b> '
            f"{escape(group.studies[i])} {escape(group.views[i])}<br><i>{escape(same) or 'the first'}</i><br>"
            f"<small>{escape(name)}</small></figcaption></figure>"
        )
    more = len(group.images) - OF_A_GROUP
    rest = f'<p class="quiet">and {more:,} more</p>' if more > 0 else ""
    against = (
        f'<p class="quiet">Labels that contradict: {escape(", ".join(group.contradictions))}</p>' if group.contradictions else ""
    )
    kind = "warn" if group.between == "splits" else ""
    return (
        f'<article class="{kind}"><h3>{_capital(_BETWEEN[group.between])}</h3><div class="pair">{figures}</div>'
        f"{rest}{against}</article>"
    )


def _reports(reports: Reports) -> str:
    if not reports.count:
        return '<p class="quiet">No study has a report.</p>'
    head = _heads("texts", "words: median", "5 %", "95 %", "longest")
    body = "".join(
        _row(section, [f"{len(own):,}", *(f"{number:,.0f}" for number in (*np.quantile(own, [0.5, 0.05, 0.95]), own.max()))])
        for section, own in reports.lengths.items()
    )
    chart = histogram("length of a report", reports.lengths["report"], "words") if "report" in reports.lengths else ""
    top = reports.frequent[0] if reports.frequent else None
    alike = (
        f"{reports.distinct:,} of {reports.count:,} reports are distinct ({_percent(reports.distinct / reports.count)}); "
        + (f"the most frequent stands in {top[1]:,} studies ({_percent(top[1] / reports.count)}). " if top else "")
        + f"{reports.distinct_sentences:,} distinct sentences."
    )
    marks = _bars_of("Marks of de-identification", reports.marks, reports.count)
    return (
        f'<p>{alike}</p><div class="tables">{TABLE.format(head=head, body=body)}<div class="curves">{chart}</div></div>{marks}'
        + _texts("Most frequent reports", reports.frequent, reports.count)
        + _texts("Most frequent sentences", reports.sentences, reports.count)
    )


def _bars_of(title: str, counts: Mapping[str, int], whole: int) -> str:
    lines = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{bar(n / whole)}</td><td>{n:,}</td><td>{_percent(n / whole)}</td></tr>'
        for name, n in counts.items()
    )
    return f'<div class="counts"><h3>{escape(title)}</h3><table class="bars">{lines}</table></div>' if lines else ""


def _texts(title: str, texts: Sequence[tuple[str, int]], whole: int) -> str:
    rows = "".join(
        f'<tr><td>{n:,}</td><td>{_percent(n / whole)}</td><td class="text">{escape(text)}</td></tr>' for text, n in texts
    )
    table = f'<div class="scroll"><table class="texts-table">{rows}</table></div>'
    return f"<details open><summary>{escape(title)}</summary>{table}</details>" if texts else ""


def _samples(found: Inspection) -> str:
    body = ""
    for (split, view), images in found.samples.items():
        figures = "".join(_figure(found, image.name, view) for image in images)
        body += _gallery(f"<h3>{escape(split)}, {escape(view)}</h3>", figures, len(images))
    told = f"Up to {SAMPLES} of each split and view, chosen by seed {found.seed}."
    return f'<p class="quiet">{told}</p><div class="entries">{body}</div>' if body else ""


def _skipped(found: Inspection) -> str:
    if not found.skipped:
        return '<p class="quiet">Nothing: every image that was looked at can be read, and no report is empty.</p>'
    rows = "".join(
        f'<tr><td>{n:,}</td><td class="text">{escape(reason)}<br><small>'
        f'{escape(", ".join(found.skipped_examples[reason]))}{", …" if n > len(found.skipped_examples[reason]) > 0 else ""}'
        f"</small></td></tr>"
        for reason, n in found.skipped.items()
    )
    return f'<div class="scroll"><table class="texts-table">{rows}</table></div>'


def _source(found: Inspection) -> str:
    facts = {"folder": str(found.root), "reader": found.reader}
    facts |= {name: str(value) for name, value in found.settings.items() if value is not None}
    facts["images looked at"] = f"{found.looked:,} of {found.total:,}"
    facts["seed"] = str(found.seed)
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items()) + "</dl>"
