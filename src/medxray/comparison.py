"""Runs side by side on the same studies: what each scores, how far they are apart, and in which studies."""

import io
import itertools
import json
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from medxray import disk
from medxray.evaluated import Outputs, Runs, grouped, named, read_outputs, recipe
from medxray.metrics import Metric, StudyMean, available
from medxray.metrics.findings import FindingRow, per_finding
from medxray.metrics.intervals import seeds, seeds_difference
from medxray.metrics.protocols import protocol as named_protocol
from medxray.registry import nearest
from medxray.scoring import named_metric
from medxray.types import DataError, RunError, Score, Scores, SpecError, for_json
from medxray.visual.comparison_page import Apart, Differing, comparison_page

METRICS_OF = {
    "text": ("bleu", "rouge-l", "cider", "clinical"),
    "labels": ("auroc", "average-precision"),
    "reconstruction": ("reconstruction",),
}
"""What runs say of a study -> the metrics by which they are compared when none are named."""

_SAID = {"text": "reports", "labels": "probabilities of labels", "reconstruction": "reconstruction errors"}
_RESAMPLES = 1000
_SHOWN = 6
_TIE = 1e-9
_WIDTH = 80
FILES = ("scores.json", "table.md", "table.tex", "comparison.html")


@dataclass(frozen=True)
class Comparison:
    """Systems on the same studies. A system is a run, or several that differ by their seed.

    Attributes:
        baseline: the system that others are compared with.
        scores: system -> metric -> Score, the baseline first.
        differences: every other system -> metric -> how far it is from the baseline, by paired draws.
        lower: metrics that are better when lower.
        per_study: metric -> system -> each study's own value (n,), for metrics that are means over studies.
        findings: system -> the 14 observations, over all of its seeds together; {} without reports.
        studies: n names.
        texts: system -> a report a study, of its first seed; {} without reports.
        references: a text a study; [] without reports.
        places: system -> folders or tables.
        notes: sentences that a reader of the table must know.
    """

    baseline: str
    scores: dict[str, dict[str, Score]]
    differences: dict[str, dict[str, Apart]]
    lower: tuple[str, ...]
    per_study: dict[str, dict[str, np.ndarray]]
    findings: dict[str, list[FindingRow]]
    studies: list[str]
    texts: dict[str, list[str]]
    references: list[str]
    places: dict[str, list[Path]]
    notes: list[str]

    @property
    def metrics(self) -> list[str]:
        """Values in the order of the table."""
        return list(self.scores[self.baseline])

    def wins(self, system: str, metric: str) -> tuple[int, int, int]:
        """In how many studies a system is better than the baseline, equal, and worse, by a metric of `per_study`."""
        gain = self.gains(system, metric)
        return int((gain > _TIE).sum()), int((abs(gain) <= _TIE).sum()), int((gain < -_TIE).sum())

    def gains(self, system: str, metric: str) -> np.ndarray:
        """How much better a system is than the baseline in each study (n,)."""
        values = self.per_study[metric]
        apart: np.ndarray = values[system] - values[self.baseline]
        return -apart if metric in self.lower else apart

    def differing(self, system: str, count: int = _SHOWN) -> tuple[str, list[Differing], list[Differing]]:
        """The metric that tells, CIDEr or else ROUGE-L, and the studies in which a system is most above and most below the
        baseline by it, at most `count` each; none without reports."""
        metric = next((name for name in ("cider", "rouge-l") if name in self.per_study), "")
        if not self.texts or not metric:
            return metric, [], []
        gains = self.gains(system, metric)
        order = np.argsort(-gains, kind="stable")
        chosen = [order[gains[order] > _TIE][:count], order[::-1][gains[order[::-1]] < -_TIE][:count]]
        above, below = ([self._study(int(i), system, metric) for i in rows] for rows in chosen)
        return metric, above, below

    def _study(self, row: int, system: str, metric: str) -> Differing:
        said = {
            name: (self.texts[name][row], float(self.per_study[metric][name][row])) for name in (self.baseline, system)
        }
        return Differing(self.studies[row], self.references[row], said)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `scores.json`: those of `Scores`, and beside them what only a comparison has."""
        table = Scores(
            self.scores[self.baseline],
            {name: values for name, values in self.scores.items() if name != self.baseline},
            self.notes,
            self.baseline,
        )
        found = table.to_dict() | {
            "runs": self.places,
            "differences": {
                name: {metric: asdict(apart) for metric, apart in values.items()}
                for name, values in self.differences.items()
            },
            "wins": {
                name: {
                    metric: dict(zip(("wins", "ties", "losses"), self.wins(name, metric), strict=True))
                    for metric in self.per_study
                }
                for name in self.differences
            },
            "findings": {
                name: {
                    row.name: {
                        "named": row.named, "hits": row.hits, "misses": row.misses, "hallucinations": row.hallucinations,
                        "wrong_side": row.wrong_side, "f1": row.f1,
                    }
                    for row in rows
                }
                for name, rows in self.findings.items()
            },
        }  # fmt: skip
        return for_json(found)  # type: ignore[no-any-return]

    def __str__(self) -> str:
        """For a terminal of 80 columns; what metrics say of single labels is left to the files."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=0)
        table.add_column("", overflow="fold")
        for name in ("value", "difference", "", "p", "Holm"):
            table.add_column(name, no_wrap=True)
        for metric in (name for name in self.metrics if "/" not in name):
            table.add_row(metric + (" (lower is better)" if metric in self.lower else ""))
            for system, values in self.scores.items():
                cells = ["", "", "", ""]
                if system != self.baseline:
                    apart = self.differences[system][metric]
                    cells = [_difference(apart), apart.mark, _p(apart.p), _p(apart.holm)]
                table.add_row(Padding(Text(system, overflow="fold"), (0, 0, 0, 2)), str(values[metric]), *cells)
        text = io.StringIO()
        # In a notebook rich would show the table itself, and write nothing.
        plain: dict[str, Any] = {"color_system": None, "highlight": False, "markup": False, "emoji": False}
        Console(file=text, width=_WIDTH, force_jupyter=False, **plain).print(table)
        lines = [line.rstrip() for line in text.getvalue().splitlines()]
        lines.append("")
        for note in self._told():
            lines += textwrap.wrap(note, _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        return "\n".join(lines)

    __repr__ = __str__

    def _told(self) -> list[str]:
        lines = [f"n = {len(self.studies)} studies; differences are to {self.baseline}"]
        if any(d.better is not None for values in self.differences.values() for d in values.values()):
            lines.append("▲ better, ▼ worse, where the interval of the difference leaves out 0")
        for name in self.differences:
            for metric in self.per_study:
                wins, ties, losses = self.wins(name, metric)
                lines.append(f"{name} by {metric}: better in {wins} studies, equal in {ties}, worse in {losses}")
        return lines + self.notes

    def markdown(self) -> str:
        """The table, a line a metric, with its notes."""
        return self._markdown(self.metrics)

    def _repr_markdown_(self) -> str:
        """For a notebook: without what metrics say of single labels."""
        return self._markdown([name for name in self.metrics if "/" not in name])

    def _markdown(self, metrics: Sequence[str]) -> str:
        head, rows = self._cells(metrics)
        lines = [head, ["---"] * len(head), *rows]
        text = "".join(f"| {' | '.join(map(_markdown, line))} |\n" for line in lines)
        return text + "\n" + "".join(f"* {_markdown(note)}\n" for note in self._told())

    def latex(self) -> str:
        """The table as a `tabular` with rules of the package booktabs; its notes are comments."""
        head, rows = self._cells(self.metrics)
        notes = "".join(f"% {' '.join(note.split())}\n" for note in self._told())
        cells = [[_latex(name), *(_signs(_latex(cell)) for cell in values)] for name, *values in rows]
        body = "".join(f"{' & '.join(row)} \\\\\n" for row in cells)
        return (
            f"% \\usepackage{{booktabs}}\n{notes}\\begin{{tabular}}{{{'l' * len(head)}}}\n\\toprule\n"
            f"{' & '.join(map(_latex, head))} \\\\\n\\midrule\n{body}\\bottomrule\n\\end{{tabular}}\n"
        )

    def _cells(self, metrics: Sequence[str]) -> tuple[list[str], list[list[str]]]:
        head = ["metric", self.baseline]
        for name in self.differences:
            head += [name, "difference", "p (Holm)"]
        rows = []
        for metric in metrics:
            row = [metric + (" (lower is better)" if metric in self.lower else ""), str(self.scores[self.baseline][metric])]
            for name, values in self.differences.items():
                apart = values[metric]
                tested = f"{_p(apart.p)} ({_p(apart.holm)})" if math.isfinite(apart.p) else ""
                row += [str(self.scores[name][metric]), f"{_difference(apart)} {apart.mark}".strip(), tested]
            rows.append(row)
        return head, rows

    def write(self, folder: str | Path) -> Path:
        """Writes scores.json, table.md, table.tex and comparison.html.

        Raises:
            RunError: the folder is a run's, whose own scores would be lost, or cannot be written.
        """
        folder = Path(folder)
        if (folder / "spec.yaml").exists():
            raise RunError(f"{folder} is a run folder, whose scores.json would be lost; name another folder")
        texts = (json.dumps(self.to_dict(), indent=1) + "\n", self.markdown(), self.latex())
        try:
            with disk.replacing_together(folder) as staged:
                for name, text in zip(FILES, texts, strict=False):
                    disk.write(staged / name, text)
                self._page(staged / FILES[-1])
        except OSError as error:
            raise RunError(f"{folder} cannot be written: {error.strerror}; name another folder") from error
        return folder

    def _page(self, path: Path) -> None:
        comparison_page(
            path,
            baseline=self.baseline,
            scores=self.scores,
            differences=self.differences,
            lower=self.lower,
            findings={name: {row.name: _fared(row) for row in rows} for name, rows in self.findings.items()},
            wins={name: {m: self.wins(name, m) for m in self.per_study} for name in self.differences},
            studies={name: self.differing(name) for name in self.differences},
            runs={name: ", ".join(map(str, places)) for name, places in self.places.items()},
            notes=self.notes,
        )


def compare(
    runs: Runs,
    *,
    metrics: Sequence[str] | None = None,
    baseline: str | None = None,
    split: str | None = None,
    protocol: str | None = None,
    reference_of: str | None = None,
    group_seeds: bool = False,
    intervals: bool = True,
    seed: int = 0,
    prediction: str = "prediction",
    reference: str = "reference",
    patient: str | None = None,
    study: str | None = None,
) -> Comparison:
    """Compares runs on the studies that all of them have, with intervals of their differences by a paired bootstrap.

    Args:
        runs: two or more of a run folder that `evaluate` has filled, or a CSV table with a row a study. `NAME=PATH` gives
            one a name; `NAME=PATH,PATH,...`, or a mapping of names to lists of paths, makes several seeds one system.
        metrics: names; by default those of `METRICS_OF`. One that needs settings takes them from the first run whose spec has it.
        baseline: the system that others are compared with; the first by default.
        split: the one that all run folders must have been evaluated on.
        protocol: how all reports are cleaned and their references cut before they are scored: one of
            `medxray.metrics.protocols.PROTOCOLS`. None takes those of tables as they stand, and those of runs as they were
            evaluated.
        reference_of: the system by whose references all are judged; without it they must be the same.
        group_seeds: makes one system of run folders whose specs are equal but for seed, name and output.
        intervals: 95 % ones with p-values, by 1,000 draws of patients.
        seed: of these draws.
        prediction, reference: columns of tables.
        patient: column of patients in tables; `patient_id` where there is one.
        study: column of studies in tables; `study_id` by default.

    Raises:
        SpecError: fewer than two systems, a name twice, an unknown system, metric or protocol.
        RunError: a folder that holds no evaluated run, or runs of other tasks or splits.
        DataError: a table that cannot be read, a study twice, no study in common, or references that differ.
    """
    way = named_protocol(protocol)
    systems = {
        name: [read_outputs(path, prediction, reference, patient, study, way) for path in paths]
        for name, paths in named(runs).items()
    }
    if group_seeds:
        systems = grouped(systems)
    if len(systems) < 2:
        raise SpecError(f"compare: expected two or more systems, found {len(systems)} ({', '.join(systems)}); name another run")
    for what, name in (("baseline", baseline), ("reference_of", reference_of)):
        if name is not None and name not in systems:
            raise SpecError(f"{what}: no system {name!r}{nearest(name, systems)} (found: {', '.join(systems)})")
    first = baseline or next(iter(systems))
    systems = {first: systems[first]} | systems
    takes = _checked(systems, split)
    if protocol is not None and takes != "text":
        raise SpecError(f"protocol {protocol!r}: the runs write no reports, so there is none; leave it out")
    chosen, left_out = available(_chosen(metrics, takes, systems))
    systems, notes = _in_common(systems)
    notes += left_out
    if reference_of is None:
        _check_references(systems, takes)
    else:
        notes.append(f"all are judged by the references of {reference_of}")
    patients, told = _patients(systems)
    notes += told + _told_of_all(systems, takes)
    if takes == "labels":
        labels, systems, told = _labels_in_common(systems)
        notes += told
        for metric in chosen:
            if hasattr(metric, "labels"):
                metric.labels = labels
    references = systems[reference_of or first][0].references
    said = {name: [one.predictions for one in outputs] for name, outputs in systems.items()}
    scores: dict[str, dict[str, Score]] = {name: {} for name in systems}
    apart: dict[str, dict[str, Apart]] = {name: {} for name in systems if name != first}
    per_study: dict[str, dict[str, np.ndarray]] = {}
    resamples = _RESAMPLES if intervals else 0
    for metric in chosen:
        rows: dict[str, list[Any]] = {name: [metric.statistics(one, references) for one in made] for name, made in said.items()}
        for name, own in rows.items():
            scores[name] |= seeds(metric, own, patients, resamples, seed)
            if name != first:
                found = seeds_difference(metric, own, rows[first], patients, resamples, seed)
                apart[name] |= {value: Apart.judged(d, d.p, metric.higher_is_better) for value, d in found.items()}
        notes += metric.notes()
        if isinstance(metric, StudyMean):
            means = {name: np.mean(own, axis=0) for name, own in rows.items()}
            per_study |= {value: {name: of[:, i] for name, of in means.items()} for i, value in enumerate(metric.values)}
    if intervals:
        notes += _tested(apart, len({p for p in patients if p}) + patients.count(""))
    is_text = takes == "text"
    return Comparison(
        baseline=first,
        scores=scores,
        differences=_corrected(apart),
        lower=tuple(value for metric in chosen if not metric.higher_is_better for value in metric.values),
        per_study=per_study,
        findings={
            name: per_finding([text for one in made for text in one], references * len(made)) for name, made in said.items()
        } if is_text else {},
        studies=systems[first][0].studies,
        texts={name: made[0] for name, made in said.items()} if is_text else {},
        references=references if is_text else [],
        places={name: [one.place for one in outputs] for name, outputs in systems.items()},
        notes=notes,
    )  # fmt: skip


def _checked(systems: Mapping[str, list[Outputs]], split: str | None) -> str:
    """What all runs say of a study.

    Raises:
        RunError: they say different things, or of different splits.
    """
    each = [(name, one) for name, outputs in systems.items() for one in outputs]
    (first, other), *rest = each
    for name, one in rest:
        if one.takes != other.takes:
            raise RunError(
                f"{first} gives {_SAID[other.takes]}, {name} gives {_SAID[one.takes]}; compare runs of one task"
            )
    known = [(name, one) for name, one in each if one.split]
    wanted = split or (known[0][1].split if known else "")
    for name, one in known:
        if one.split != wanted:
            of = f"{known[0][0]} on {wanted}" if split is None else f"{split} was asked for"
            raise RunError(
                f"{name} was evaluated on {one.split}, {of}; judge both on one: medxray evaluate {one.place} --split {wanted}"
            )
    return other.takes


def _in_common(systems: Mapping[str, list[Outputs]]) -> tuple[dict[str, list[Outputs]], list[str]]:
    """The studies that all runs have, in the order of the first; how many were left out of each."""
    each = [one for outputs in systems.values() for one in outputs]
    common = set(each[0].studies).intersection(*(one.studies for one in each))
    if not common:
        examples = " and ".join(f"{one.place} has {one.studies[0]!r}" for one in each[:2])
        raise DataError(f"compare: the runs have no study in common ({examples}); compare runs of one data set and split")
    studies = [name for name in each[0].studies if name in common]
    left = [f"{len(one.studies) - len(studies)} of {one.place}" for one in each if len(one.studies) > len(studies)]
    notes = [f"compared on the {len(studies)} studies that all have; left out: {', '.join(left)}"] if left else []
    return {name: [one.of(studies) for one in outputs] for name, outputs in systems.items()}, notes


def _labels_in_common(
    systems: Mapping[str, list[Outputs]],
) -> tuple[list[str], dict[str, list[Outputs]], list[str]]:
    """The K labels that all runs have; each study's K probabilities and K truths, NaN where unknown; what was left out."""
    each = [one for outputs in systems.values() for one in outputs]
    names = [list(one.predictions[0]) for one in each]
    common = [name for name in names[0] if all(name in other for other in names)]
    if not common:
        raise DataError(f"compare: {each[0].place} and the others have no label in common; compare runs of one data set")
    left = list(dict.fromkeys(name for other in names for name in other if name not in common))
    notes = [f"labels that not all runs have are left out: {', '.join(left)}"] if left else []

    def rows(of: list[Any]) -> list[list[float]]:
        return [[math.nan if row[name] is None else float(row[name]) for name in common] for row in of]

    found = {
        name: [replace(one, predictions=rows(one.predictions), references=rows(one.references)) for one in outputs]
        for name, outputs in systems.items()
    }
    return common, found, notes


def _check_references(systems: Mapping[str, list[Outputs]], takes: str) -> None:
    """Raises DataError where two runs are judged by different references of a study."""
    each = [one for outputs in systems.values() for one in outputs]
    first, name = each[0], next(iter(systems))
    for other in each[1:]:
        for study, ours, theirs in zip(first.studies, first.references, other.references, strict=True):
            if takes == "labels":
                differing = [label for label in ours if label in theirs and ours[label] != theirs[label]]
                if differing:
                    raise DataError(
                        f"study {study!r}: label {differing[0]!r} is {ours[differing[0]]} for {first.place}, "
                        f"{theirs[differing[0]]} for {other.place}; evaluate both on one data set"
                    )
            elif takes == "text" and ours.split() != theirs.split():
                raise DataError(
                    f"study {study!r} has another reference: {_beginning(ours, theirs)} for {first.place}, "
                    f"{_beginning(theirs, ours)} for {other.place}; evaluate both with one data.cleaning and protocol, read "
                    f"both by one (--protocol), or name the system by whose references all are judged (--reference-of {name!r})"
                )


def _beginning(text: str, other: str, length: int = 48) -> str:
    """A text from shortly before it parts from another."""
    parts = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    start = max(0, parts - length // 2) if parts > length // 2 else 0
    piece = text[start : start + length]
    return repr(("..." if start else "") + piece + ("..." if start + length < len(text) else ""))


def _patients(systems: Mapping[str, list[Outputs]]) -> tuple[list[str], list[str]]:
    """Patients of the studies, out of the first run that knows them."""
    each = [one for outputs in systems.values() for one in outputs]
    known = next((one.patients for one in each if any(one.patients)), None)
    if known is None:
        return [""] * len(each[0].studies), ["no run tells patients apart, so each study counts as a patient"]
    return known, []


def _told_of_all(systems: Mapping[str, list[Outputs]], takes: str) -> list[str]:
    each = [(name, one) for name, outputs in systems.items() for one in outputs]
    splits = list(dict.fromkeys(one.split for _, one in each if one.split))
    notes = [f"split: {splits[0]}"] if splits else []
    several = [f"{name} {len(outputs)}" for name, outputs in systems.items() if len(outputs) > 1]
    if several:
        told = "values are means over them, intervals are for other studies and seeds, texts are the first's"
        notes.append(f"seeds: {', '.join(several)}; {told}")
    single: dict[str, list[str]] = {}
    for name, outputs in systems.items():
        if len(outputs) == 1 and outputs[0].spec:
            single.setdefault(recipe(outputs[0]), []).append(name)
    for names in single.values():
        if len(names) > 1:
            notes.append(f"{', '.join(names)} have one spec but for seed, name and output; --seeds makes them one system")
    if takes != "text":
        return notes
    for way in dict.fromkeys(one.protocol for _, one in each):
        own = dict.fromkeys(name for name, one in each if one.protocol == way)
        notes.append(f"protocol of {', '.join(own)}: {way}")
    empty = [(sum(not text.strip() for text in one.predictions), one.place) for _, one in each]
    counted = ", ".join(f"{count} of {place}" for count, place in empty if count)
    return notes + ([f"empty texts, which count as such: {counted}"] if counted else [])


def _chosen(names: Sequence[str] | None, takes: str, systems: Mapping[str, list[Outputs]]) -> list[Metric]:
    """Metrics, with the settings that the first run has for them."""
    settings: dict[str, Any] = {}
    for one in (one for outputs in systems.values() for one in outputs):
        for entry in one.spec.get("metrics") or []:
            if isinstance(entry, Mapping) and "name" in entry:
                settings.setdefault(entry["name"], entry)
    if names is not None and not names:
        raise SpecError(f"metrics: none are named; expected some of {', '.join(METRICS_OF[takes])}")
    return [named_metric(name, takes, settings.get(name)) for name in names or METRICS_OF[takes]]


def _tested(apart: Mapping[str, Mapping[str, Apart]], patients: int) -> list[str]:
    if patients < 2:
        return ["one patient only, so there are no intervals"]
    count = sum(math.isfinite(d.p) for values in apart.values() for metric, d in values.items() if "/" not in metric)
    return [
        f"95 % intervals and two-sided p by {_RESAMPLES:,} draws of the {patients} patients, the same for all systems; "
        f"Holm: p corrected for the {count} differences of the table"
    ]


def _corrected(apart: Mapping[str, Mapping[str, Apart]]) -> dict[str, dict[str, Apart]]:
    """With p corrected by Holm's method: all differences of the table together, and those of single labels together."""
    found = {name: dict(values) for name, values in apart.items()}
    for by_label in (False, True):
        places = [(name, m) for name, values in apart.items() for m in values if ("/" in m) == by_label]
        corrected = holm([apart[name][metric].p for name, metric in places])
        for (name, metric), p in zip(places, corrected, strict=True):
            found[name][metric] = replace(apart[name][metric], holm=p)
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number (Holm, Scandinavian Journal of Statistics 6, 1979); NaN ones are no tests."""
    found = [math.nan] * len(p_values)
    order = sorted((i for i, p in enumerate(p_values) if math.isfinite(p)), key=lambda i: p_values[i])
    steps = (min(1.0, (len(order) - rank) * p_values[i]) for rank, i in enumerate(order))
    for i, p in zip(order, itertools.accumulate(steps, max), strict=True):
        found[i] = p
    return found


def _fared(row: FindingRow) -> tuple[float, str]:
    said = f"{row.hits} of {row.named}"
    said += f"; {row.hallucinations} unsupported" if row.hallucinations else ""
    return row.f1, said + (f"; {row.wrong_side} on the wrong side" if row.wrong_side else "")


def _difference(apart: Score) -> str:
    if not math.isfinite(apart.value):
        return "undefined"
    span = f" ({apart.low:+.3f}, {apart.high:+.3f})" if math.isfinite(apart.low) else ""
    return f"{apart.value:+.3f}{span}"


def _p(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else ""


def _markdown(text: str) -> str:
    return re.sub(r"([\\|<*_`])", r"\\\1", " ".join(text.split()))


_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "▲": r"$\bigtriangleup$", "▼": r"$\bigtriangledown$",
}  # fmt: skip


def _latex(text: str) -> str:
    return "".join(_LATEX.get(char, char) for char in " ".join(text.split()))


def _signs(text: str) -> str:
    """Dashes between numbers and minus signs before them."""
    return re.sub(r"(?<=\d)-(?=\d)", "--", re.sub(r"(?<![\w.])-(?=\d)", "$-$", text))
