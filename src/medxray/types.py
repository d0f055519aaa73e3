"""The few types that flow between rooms. Shape letters: B batch, V views, C channels, H W pixels,
N tokens, D width, L sequence, K classes."""

from __future__ import annotations

import dataclasses
import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NamedTuple, NotRequired, TypedDict

if TYPE_CHECKING:
    import torch


_WIDTH = 100
"""Columns of a printed table."""


class MedxrayError(Exception):
    """A mistake in what the library was given: names the thing, what was expected, what was found, what to do."""


class SpecError(MedxrayError):
    """A spec that cannot be built: unknown parts or settings, wrong types, parts that don't fit together."""


class DataError(MedxrayError):
    """A data set, table or study that cannot be used."""


class ImageError(DataError):
    """One image file that cannot be read."""


class WeightsError(MedxrayError):
    """A checkpoint that is missing, unreadable or does not fit the model."""


class RunError(MedxrayError):
    """A run folder that is missing, incomplete, or belongs to another spec."""


class Study(TypedDict):
    """One row of a `datasets.Dataset`: a patient's visit with its images and report.

    `labels` maps a name to 1 present, 0 absent, -1 uncertain; a name that is missing is None.
    `report` is the cleaned target text; `views` are "PA", "AP", "LL" or "unknown", one an image. `indication`, why the
    study was made, and `prior`, the report of the patient's study before, are "" where unknown, or left out.
    `burned_in` is 1 where a header says that annotations are burned into one of the images, 0 where all say that none
    are, and None, or left out, where that is unknown. `sex`, `age_band` and `manufacturer` are words of
    `medxray.data.attributes`, "" where unknown, or left out.
    """

    study_id: str
    patient_id: str
    images: list[str]
    views: list[str]
    findings: str
    impression: str
    report: str
    labels: dict[str, int | None]
    split: str
    indication: NotRequired[str]
    prior: NotRequired[str]
    burned_in: NotRequired[int | None]
    sex: NotRequired[str]
    age_band: NotRequired[str]
    manufacturer: NotRequired[str]


@dataclass
class Batch:
    """What a task's model takes.

    Attributes:
        pixels: (B, V, C, H, W) float32, normalised as the encoder declares.
        view_mask: (B, V) bool, False where a study has fewer views than V.
        reports: B cleaned reports; empty strings at prediction.
        labels: (B, K) float32 with 1, 0, -1 uncertain and NaN missing; K may be 0.
        study_ids: B names.
        patient_ids: B names; "" where unknown.
        seeds: (B,) int64, one a study and epoch: all randomness of a sample flows from it, so that
            it depends neither on the batch nor on the number of processes.
        regions: (B, V, h, w) float32 coverage of each token by the chest, or None.
        features: of a frozen encoder, computed once: tokens (B, V, N, D), pooled (B, V, D); or None.
        indications: B texts, why each study was made; "" where unknown, [] where nobody asks.
        priors: B reports of the patients' studies before, likewise.
    """

    pixels: torch.Tensor
    view_mask: torch.Tensor
    reports: list[str]
    labels: torch.Tensor
    study_ids: list[str]
    patient_ids: list[str]
    seeds: torch.Tensor
    regions: torch.Tensor | None = None
    features: Features | None = None
    indications: list[str] = field(default_factory=list)
    priors: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.study_ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on `device`."""
        moved = {
            f.name: value.to(device, non_blocking=non_blocking)
            for f in dataclasses.fields(self)
            if hasattr(value := getattr(self, f.name), "to")
        }
        return dataclasses.replace(self, **moved)


@dataclass
class Features:
    """What an encoder returns.

    Attributes:
        tokens: (B, N, D).
        grid: (h, w) with h * w = N when the tokens are a map, row by row; None otherwise.
        pooled: (B, D), one vector an image.
    """

    tokens: torch.Tensor
    grid: tuple[int, int] | None
    pooled: torch.Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Features:
        """The same features on `device`."""
        return Features(
            self.tokens.to(device, non_blocking=non_blocking),
            self.grid,
            self.pooled.to(device, non_blocking=non_blocking),
        )


@dataclass
class Context:
    """What a retriever returns for each of B studies: n_pos diseased and n_neg normal training studies.

    Attributes:
        positive: (B, n_pos, D) pooled encoder features.
        negative: (B, n_neg, D).
        positive_ids: B lists of n_pos study ids.
        negative_ids: B lists of n_neg study ids.
    """

    positive: torch.Tensor
    negative: torch.Tensor
    positive_ids: list[list[str]]
    negative_ids: list[list[str]]


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """A table of cells that are HTML, each row's first its name. It has no style sheet: a notebook shows tables in its own."""
    left = ' style="text-align:left;vertical-align:top"'
    top = "".join(f"<th{left}>{cell}</th>" for cell in head)
    body = "".join(
        f"<tr><th{left}>{name}</th>{''.join(f'<td{left}>{cell}</td>' for cell in cells)}</tr>" for name, *cells in rows
    )
    told = f'<caption style="text-align:left;color:inherit">{caption}</caption>' if caption else ""
    return f"<table>{told}{f'<thead><tr>{top}</tr></thead>' if head else ''}<tbody>{body}</tbody></table>"


class Word(NamedTuple):
    """A word of a generated report, with its probability after the words before it."""

    text: str
    probability: float


def token_words(tokens: Sequence[str]) -> list[list[int]]:
    """For each token the words of `"".join(tokens).split()` that it has a part in.

    One without letters of its own, such as a space or half a character, belongs to the word that follows; an end sign to none.
    """
    spans = [match.span() for match in re.finditer(r"\S+", "".join(tokens))]
    found, start, first = [], 0, 0
    for token in tokens:
        stop = start + len(token)
        while first < len(spans) and spans[first][1] <= start:
            first += 1
        last = first
        while last < len(spans) and (spans[last][0] < stop or last == first):
            last += 1
        found.append(list(range(first, last)))
        start = stop
    return found


@dataclass
class Prediction:
    """What a pipeline says of one study; a row of `predictions.parquet`.

    Attributes:
        study_id: its name.
        text: the generated report; "" for tasks without text.
        scores: a probability for each label, or a reconstruction error; empty for reports.
        context: ids of the training studies that were used, by pool.
        similarity: by pool, the cosine of each of them with the study, between pooled encoder features.
        log_probabilities: one a generated token.
        tokens: what each of these tokens adds to `text`; empty where a decoder does not tell.
    """

    study_id: str
    text: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    context: dict[str, list[str]] = field(default_factory=dict)
    similarity: dict[str, list[float]] = field(default_factory=dict)
    log_probabilities: list[float] = field(default_factory=list, repr=False)
    tokens: list[str] = field(default_factory=list, repr=False)

    @property
    def words(self) -> list[Word]:
        """The words of `text` with the probability that the model gave each, the product over its tokens."""
        if not self.tokens:
            return []
        sums: dict[int, float] = {}
        for words, value in zip(token_words(self.tokens), self.log_probabilities, strict=True):
            for word in words:
                sums[word] = sums.get(word, 0.0) + value
        return [Word(word, math.exp(sums[i])) for i, word in enumerate("".join(self.tokens).split())]

    def __str__(self) -> str:
        return self.text or ", ".join(f"{name} {value:.3f}" for name, value in self.scores.items())

    def _repr_html_(self) -> str:
        """For a notebook: the report on a ground that is the darker the less probable a word was, probabilities as bars, and
        who the context was."""
        words = "".join(
            f'<span title="{word.probability:.0%}" style="background:rgba(224,128,40,{0.62 * (1 - word.probability):.2f})">'
            f"{escape(word.text)}</span> "
            for word in self.words
        )
        shown = f"<b>{escape(self.study_id)}</b>"
        if self.text:
            shown += f'<p style="max-width:80ch">{words or escape(self.text)}</p>'
        if self.scores:
            bar = '<div style="width:120px;background:#8883"><div style="width:{:.0%};height:8px;background:#1d5c86"></div></div>'
            rows = (
                (escape(name), bar.format(min(max(value, 0.0), 1.0)), f"{value:.3f}") for name, value in self.scores.items()
            )
            shown += html_table((), rows)
        for pool, studies in self.context.items():
            near = [f" ({value:.2f})" for value in self.similarity.get(pool, ())] or [""] * len(studies)
            listed = ", ".join(escape(name) + cosine for name, cosine in zip(studies, near, strict=False))
            shown += f"<small>{escape(pool)} context: {listed}</small><br>"
        return f"<div>{shown}</div>"


@dataclass(frozen=True)
class Score:
    """A value with its 95 % interval over n studies; NaN where it is undefined."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        if self.value != self.value:
            return "undefined"
        if self.low != self.low:
            return f"{self.value:.3f}"
        return f"{self.value:.3f} ({self.low:.3f}-{self.high:.3f})"


def for_json(value: Any) -> Any:
    """The same in what JSON has: None for NaN and infinities, of which it knows none, and texts for paths."""
    if isinstance(value, Mapping):
        return {str(key): for_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [for_json(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return str(value) if isinstance(value, PurePath) else value


def _plain(scores: Mapping[str, Score]) -> dict[str, dict[str, float | None]]:
    return {metric: for_json(dataclasses.asdict(score)) for metric, score in scores.items()}


def _scores(data: Mapping[str, Mapping[str, Any]]) -> dict[str, Score]:
    def known(value: Any) -> Any:
        return float("nan") if value is None else value

    return {metric: Score(**{key: known(value) for key, value in values.items()}) for metric, values in data.items()}


class Scores(Mapping[str, Score]):
    """Metric -> `Score` for one system, with the floors and ablations that it is compared with.

    Args:
        scores: metric name -> Score.
        comparisons: row name -> metric name -> Score: floors such as "most frequent report".
        notes: sentences that a reader of the table must know.
        title: the row name of `scores` itself.
        subgroups: attribute such as "sex" -> group such as "female" -> metric name -> Score, the system's own over that
            group's studies. Of a group with too few studies to be scored the scores are undefined (NaN), with their n.
        protocol: what the predictions were scored against, in words that begin with its name; "" where there is no choice.
    """

    def __init__(
        self,
        scores: Mapping[str, Score],
        comparisons: Mapping[str, Mapping[str, Score]] | None = None,
        notes: list[str] | None = None,
        title: str = "model",
        subgroups: Mapping[str, Mapping[str, Mapping[str, Score]]] | None = None,
        protocol: str = "",
    ) -> None:
        self.scores = dict(scores)
        self.comparisons = {row: dict(values) for row, values in (comparisons or {}).items()}
        self.notes = list(notes or [])
        self.title = title
        self.subgroups = {
            attribute: {group: dict(values) for group, values in groups.items()}
            for attribute, groups in (subgroups or {}).items()
        }
        self.protocol = protocol

    def __getitem__(self, metric: str) -> Score:
        return self.scores[metric]

    def __iter__(self) -> Iterator[str]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def rows(self) -> dict[str, dict[str, Score]]:
        """Every row of the table, the system itself first."""
        return {self.title: self.scores, **self.comparisons}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `scores.json`; what is undefined is None."""
        return {
            "title": self.title,
            "protocol": self.protocol,
            "scores": _plain(self.scores),
            "comparisons": {row: _plain(values) for row, values in self.comparisons.items()},
            "notes": self.notes,
            "subgroups": {
                attribute: {group: _plain(values) for group, values in groups.items()}
                for attribute, groups in self.subgroups.items()
            },
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Scores:
        """The inverse of `to_dict`; a file of before may lack subgroups and protocol."""
        rows = {row: _scores(values) for row, values in data["comparisons"].items()}
        subgroups = {
            attribute: {group: _scores(values) for group, values in groups.items()}
            for attribute, groups in data.get("subgroups", {}).items()
        }
        return cls(_scores(data["scores"]), rows, data["notes"], data["title"], subgroups, data.get("protocol", ""))

    def __str__(self) -> str:
        """For a terminal of 100 columns: a metric a line, and where there is something to compare its intervals below. Rows
        that find no place beside the others stand under them."""
        stacked = bool(self.comparisons) and any(s.low == s.low for row in self.rows.values() for s in row.values())

        def cells(values: Mapping[str, Score]) -> Iterator[str]:
            for metric in self.scores:
                value, _, interval = str(values.get(metric, "")).partition(" ")
                yield from (value, interval) if stacked else (" ".join(filter(None, (value, interval))),)

        names = [line for metric in self.scores for line in ((metric, "") if stacked else (metric,))]
        columns = [["", *names], *([row, *cells(values)] for row, values in self.rows.items())]
        headers = [textwrap.wrap(column[0], 14, break_long_words=False) for column in columns]
        height = max(map(len, headers))
        filled = [[""] * (height - len(header)) + header + column[1:] for header, column in zip(headers, columns, strict=True)]
        first, *padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in filled]
        blocks = [[first]]
        for column in padded:
            if len(blocks[-1]) > 1 and sum(len(known[0]) + 2 for known in blocks[-1]) + len(column[0]) > _WIDTH:
                blocks.append([first])
            blocks[-1].append(column)
        lines = ["  ".join(line).rstrip() for block in blocks for line in zip(*block, strict=True)]
        for note in self._told():
            lines += textwrap.wrap(note, _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        return "\n".join(lines)

    __repr__ = __str__

    def _told(self) -> list[str]:
        n = max((score.n for score in self.scores.values()), default=0)
        told = "; 95 % intervals by bootstrap over patients" if any(s.low == s.low for s in self.scores.values()) else ""
        return [f"n = {n} studies{told}", *([f"protocol {self.protocol}"] if self.protocol else []), *self.notes]

    def _repr_html_(self) -> str:
        """For a notebook: a metric a line, a row of `rows` a column; labels and notes open on demand, warnings are seen."""

        def cells(metric: str) -> Iterator[str]:
            for values in self.rows.values():
                value, _, interval = str(values.get(metric, "")).partition(" ")
                shown = f"<b>{value}</b>" if values is self.scores else value
                yield shown + (f"<br><small>{interval.strip('()').replace('-', '–')}</small>" if interval else "")

        def table(metrics: Sequence[str]) -> str:
            return html_table(["", *map(escape, self.rows)], ([escape(metric), *cells(metric)] for metric in metrics))

        labels = [metric for metric in self.scores if "/" in metric]
        shown = table([metric for metric in self.scores if "/" not in metric])
        if labels:
            shown += f"<details><summary>by label</summary>{table(labels)}</details>"
        first, *others = self._told()
        warnings = [note for note in others if note.startswith("Warning")]
        notes = "<br>".join(escape(note) for note in others if note not in warnings)
        shown += f"<details><summary>{escape(first)}</summary><small>{notes}</small></details>"
        return f"<div>{shown}{''.join(f'<small>{escape(note)}</small><br>' for note in warnings)}</div>"
