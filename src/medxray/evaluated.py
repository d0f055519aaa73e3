"""What evaluated runs, and tables of any model's reports, say of each study."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as arrow
import yaml
from pyarrow import parquet

from medxray import disk
from medxray.metrics.protocols import AS_IT_STANDS, Protocol
from medxray.scoring import read_reports
from medxray.types import DataError, RunError, Scores, SpecError

Runs = Sequence[str | Path] | Mapping[str, str | Path | Sequence[str | Path]]
"""Run folders or tables, as `NAME=PATH,PATH` or under their names; several paths of one name are its seeds."""

_COLUMNS = ("study_id", "patient_id", "split", "text", "reference", "scores", "labels")


@dataclass(frozen=True)
class Outputs:
    """What a run says of each study, and what is true.

    Attributes:
        place: the run folder or table.
        takes: which metrics judge it, as `Metric.takes`.
        studies: n names.
        patients: n names, "" for an unknown one; [] where the file tells none.
        predictions: n texts, mappings of labels to probabilities, or errors.
        references: n texts, mappings of labels to 1, 0 or None, or zeros.
        split: of the data set; "" where unknown.
        protocol: how texts were cleaned and cut, in words; "" without texts.
        spec: of the run; {} for a table.
    """

    place: Path
    takes: str
    studies: list[str]
    patients: list[str]
    predictions: list[Any]
    references: list[Any]
    split: str = ""
    protocol: str = ""
    spec: Mapping[str, Any] = field(default_factory=dict)

    def of(self, studies: Sequence[str]) -> "Outputs":
        """Of some of its studies, in their order."""
        row = {study: i for i, study in enumerate(self.studies)}
        rows = [row[study] for study in studies]
        patients, predictions, references = (
            [values[i] for i in rows] if values else [] for values in (self.patients, self.predictions, self.references)
        )
        return replace(self, studies=list(studies), patients=patients, predictions=predictions, references=references)


def named(runs: Runs) -> dict[str, list[Path]]:
    """Systems by name; those without one are called after the end of their path that tells them apart."""
    if isinstance(runs, str | Path):
        raise SpecError(f"compare: expected a list of runs, found {str(runs)!r} alone; name two or more")
    if isinstance(runs, Mapping):
        given = [(name, [Path(p) for p in ([one] if isinstance(one, str | Path) else one)]) for name, one in runs.items()]
    else:
        given = [_parsed(str(text)) for text in runs]
    unnamed = [paths[0] for name, paths in given if not name]
    tails: list[str] = []
    for depth in range(1, max((len(path.absolute().parts) for path in unnamed), default=0) + 1):
        tails = ["/".join([*path.absolute().parts[1:][-depth:-1], _stem(path)]) for path in unnamed]
        if len(set(tails)) == len(tails):
            break
    names = iter(tails)
    found: dict[str, list[Path]] = {}
    for name, paths in given:
        name = name or next(names)
        if name in found:
            raise SpecError(f"compare: two systems are called {name!r}; give each its own name: NAME=PATH")
        if not paths:
            raise SpecError(f"compare: {name!r} has no path; expected NAME=PATH")
        found[name] = paths
    return found


def _stem(path: Path) -> str:
    return path.absolute().name.removesuffix(".gz").removesuffix(".csv")


def _parsed(text: str) -> tuple[str, list[Path]]:
    """NAME=PATH,PATH -> its parts; a path that is there may hold either sign."""
    name, sign, rest = text.partition("=")
    # Unlike `Path.exists`, this takes a text that is too long for a path.
    if not sign or os.path.exists(text):
        name, rest = "", text
    paths = [rest] if os.path.exists(rest) else [part.strip() for part in rest.split(",")]
    return name.strip(), [Path(path) for path in paths if path]


def read_outputs(
    path: Path, prediction: str, reference: str, patient: str | None, study: str | None, protocol: Protocol
) -> Outputs:
    """A run folder that `evaluate` has filled, or a table of texts, read as a protocol says; errors as of `compare`."""
    if path.is_dir():
        run = _read_run(path)
        if protocol is AS_IT_STANDS or run.takes != "text":
            return run
        texts, references = map(protocol.prediction, run.predictions), map(protocol.reference, run.references)
        return replace(run, predictions=list(texts), references=list(references), protocol=protocol.words)
    if not path.exists():
        raise RunError(f"{path}: no such run folder or table (paths are taken from {Path.cwd()})")
    reports = read_reports(path, prediction, reference, patient=patient, study=study, protocol=protocol)
    if not reports.studies:
        raise DataError(f"{path}: no column 'study_id'; name the column by which studies of two runs are matched (--study)")
    if "" in reports.studies:
        raise DataError(f"{path}: a row without the name of its study; give every study its name")
    return Outputs(
        path, "text", reports.studies, reports.patients, reports.texts, reports.references, protocol=protocol.words
    )


def _read_run(folder: Path) -> Outputs:
    file = folder / "predictions.parquet"
    disk.settle(folder)
    if not file.is_file():
        raise RunError(f"{folder}: no predictions.parquet, so it was not evaluated yet; run: medxray evaluate {folder}")
    try:
        names = [name for name in parquet.read_schema(file).names if name in _COLUMNS]
        table = parquet.read_table(file, columns=names, page_checksum_verification=True)
        columns = {name: table[name].to_pylist() for name in table.column_names}
        spec = yaml.safe_load((folder / "spec.yaml").read_text(encoding="utf-8")) or {}
        studies, texts, references = columns["study_id"], columns["text"], columns["reference"]
        scores = [json.loads(row) for row in columns["scores"]]
        labels = [json.loads(row or "{}") for row in columns.get("labels", [None] * len(studies))]
    except (OSError, ValueError, KeyError, yaml.YAMLError, arrow.ArrowException) as error:
        raise RunError(f"{folder}: cannot be read as an evaluated run ({error}); run: medxray evaluate {folder}") from None
    if not studies:
        raise RunError(f"{folder}: its predictions.parquet holds no study; run: medxray evaluate {folder}")
    _check_once(file, studies)
    patients = columns.get("patient_id", [])
    told = _told_of(folder)
    split = columns["split"][0] if "split" in columns else told.get("split", "")
    if references[0] is not None:
        cleaning = (spec.get("data") or {}).get("cleaning", "none")
        protocol = told.get("protocol") or f"full: references cleaned by {cleaning}, whole"
        return Outputs(folder, "text", studies, patients, texts, references, split, protocol, spec)
    if spec.get("task") == "pretrain":
        errors = [row["reconstruction"] for row in scores]
        return Outputs(folder, "reconstruction", studies, patients, errors, [0.0] * len(studies), split, spec=spec)
    if not any(labels):
        raise RunError(
            f"{folder}: its predictions.parquet was written before labels were kept there, so what is true is not known; run: "
            f"medxray evaluate {folder}"
        )
    return Outputs(folder, "labels", studies, patients, scores, labels, split, spec=spec)


def _told_of(folder: Path) -> dict[str, str]:
    """Split and protocol, as far as a run's scores tell them."""
    try:
        scores = Scores.from_dict(json.loads((folder / "scores.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    splits = re.findall(r"^split: (\w+)", "\n".join(scores.notes), flags=re.MULTILINE)
    return {"protocol": scores.protocol} | ({"split": splits[0]} if splits else {})


def _check_once(file: Path, studies: Sequence[str]) -> None:
    seen: set[str] = set()
    for name in studies:
        if name in seen:
            raise DataError(f"{file}: study {name!r} stands there twice; a study is compared once: evaluate the run again")
        seen.add(name)


def grouped(systems: Mapping[str, list[Outputs]]) -> dict[str, list[Outputs]]:
    """One system of all single runs whose specs are equal but for seed, name and output, where the first of them stands."""
    groups: dict[str, list[str]] = {}
    for name, outputs in systems.items():
        alike = len(outputs) == 1 and outputs[0].spec
        groups.setdefault(recipe(outputs[0]) if alike else name, []).append(name)
    found: dict[str, list[Outputs]] = {}
    for names in groups.values():
        together = [one for member in names for one in systems[member]]
        found[_name_of(together, names, [*found, *systems]) if len(names) > 1 else names[0]] = together
    return found


def _name_of(seeds: Sequence[Outputs], names: Sequence[str], taken: Sequence[str]) -> str:
    """The name in their specs, without the number of a seed where they differ; the first's own where that is another's."""
    own = [str(one.spec.get("name")) for one in seeds]
    name = own[0] if len(set(own)) == 1 else re.sub(r"([-_. ]+(seed|s)?|seed)[-_. ]*\d+$", "", own[0])
    return name if name in names or name not in taken else names[0]


def recipe(outputs: Outputs) -> str:
    """What a run does, whatever its seed and wherever it lies."""
    return json.dumps({key: v for key, v in outputs.spec.items() if key not in ("seed", "name", "output")}, sort_keys=True)
