"""A model card out of a run folder alone (Mitchell et al., Model Cards for Model Reporting, FAT* 2019), as the Hugging Face
hub reads it. What a run does not tell is said to be missing. No name of a study, patient, file or folder gets into it."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from medxray import disk
from medxray.data import Studies
from medxray.tasks import Task
from medxray.types import RunError, Score, Scores, SpecError

_WARNING = "Warning: "
_OWN = "library_name: medxray"
_MISSING = "This is not recorded in this run folder."
_FEW_PATIENTS, _FEW_OF_GROUP, _SUBGROUP_METRICS = 1000, 0.1, 5

_TASKS = {
    "report": ("image-to-text", "report-generation", "writes the findings of a chest X-ray as a report"),
    "classify": ("image-classification", "classification", "tells which findings a chest X-ray shows, each with a probability"),
    "pretrain": ("image-feature-extraction", "self-supervised", "turns chest X-rays into features that other models begin with"),
}
"""Task -> the hub's name of it, a tag, and what its model does."""

_USES = {
    "report": "Research on report generation: to compare systems, and as a start for others. Its reports are drafts of a "
    "machine; nobody may be treated by them.",
    "classify": "Research on finding classification: to compare systems, and as a start for others. A probability is no "
    "diagnosis; nobody may be treated by it.",
    "pretrain": "Research: as the encoder that a classifier or a report system begins with. It says nothing of a study itself.",
}
_RECIPE = (
    "epochs", "steps", "batch_size", "accumulate", "optimiser", "learning_rate", "base_learning_rate", "rates", "schedule",
    "warmup", "layer_decay", "weight_decay", "clip", "clip_value", "ema", "precision", "select",
)  # fmt: skip
_USUAL: tuple[Any, ...] = (None, {}, 0)
"""Values of a recipe that do nothing."""
_STYLES = (
    "main table{display:block;overflow-x:auto;width:max-content;max-width:100%}"
    "main th,main td{text-align:left;padding:.15rem 1.2rem .15rem 0;white-space:nowrap}main pre{overflow-x:auto}"
)


def model_card(folder: str | Path, *, license: str = "unknown") -> str:
    """The card in Markdown, behind a header in YAML.

    Args:
        folder: a run folder; no data set and no weights are opened.
        license: of the weights, by its identifier on the hub, such as "mit".

    Raises:
        RunError: it is no run folder, or a file in it is damaged.
        SpecError: a licence that is no identifier.
    """
    if not re.fullmatch(r"[\w.-]+", license):
        raise SpecError(f"license: expected an identifier such as mit or cc-by-nc-4.0, found {license!r}")
    run = _Run.read(Path(folder))
    sections = "\n".join(f"## {heading}\n\n{write(run).strip()}\n" for heading, write in _SECTIONS.items())
    header = yaml.safe_dump(_header(run, license), sort_keys=False, allow_unicode=True)
    what = _TASKS.get(run.task, ("", "", f"is fitted for the task {run.task}"))[2]
    return f"---\n{header}---\n\n# {_escaped(run.name)}\n\nA model that {_escaped(what)}. Made with medxray.\n\n{sections}"


def write_card(folder: str | Path, path: str | Path | None = None, *, license: str = "unknown") -> Path:
    """Writes the card: as an HTML page where the path ends in .html, else in Markdown.

    Args:
        folder: a run folder.
        path: gets the card; README.md of the run folder, where the hub looks for it, if None.
        license: as for `model_card`.

    Raises:
        RunError: as for `model_card`; the file cannot be written, or is one that somebody else wrote.
    """
    disk.settle(Path(folder))
    text, path = model_card(folder, license=license), Path(path or Path(folder) / "README.md")
    if path.suffix == ".html":
        _write_page(path, text)
        return path
    try:
        if path.exists() and _OWN not in path.read_text(encoding="utf-8"):
            raise RunError(f"{path} was not written by medxray and would be lost; name another file by --out")
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.write(path, text)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise RunError(f"{path} cannot be written: {reason}; name another file by --out") from None
    return path


def counts(task: Task, studies: Studies) -> dict[str, Any]:
    """Numbers that no other file of a run folder tells, for facts.json: parameters of parts, and studies."""
    parts: dict[str, dict[str, int]] = {}
    seen: set[nn.Parameter] = set()
    for name, part in task.named_children():
        own = set(part.parameters()) - seen
        if own:
            trained = sum(p.numel() for p in own if p.requires_grad)
            parts[name] = {"all": sum(p.numel() for p in own), "trained": trained}
        seen |= own
    splits = {name: rows for name, rows in studies.splits.items() if len(rows)}
    labels: dict[str, dict[str, list[int]]] = {name: {} for name in studies.labels}
    for split, rows in splits.items():
        known = Counter((name, value) for row in rows["labels"] for name, value in row.items())
        for name, of in labels.items():
            of[split] = [known[name, 1], known[name, 0]]
    told = {name: Counter(studies.splits["train"][name]) for name in ("sex", "age_band", "manufacturer")}
    return {
        "parameters": parts,
        "splits": {
            name: {
                "studies": len(rows),
                "patients": len({patient or i for i, patient in enumerate(rows["patient_id"])}),
                "images": sum(map(len, rows["images"])),
            }
            for name, rows in splits.items()
        },
        "labels": labels,
        "attributes": {name: dict(sorted(groups.items())) for name, groups in told.items() if set(groups) - {"", None}},
    }


@dataclass(frozen=True)
class _Run:
    """What a run folder holds, read whole before a word is written; {} or [] for a file that is not there."""

    spec: dict[str, Any]
    facts: dict[str, Any]
    environment: dict[str, Any]
    references: dict[str, str]
    log: list[dict[str, Any]]
    skipped: list[dict[str, str]]
    scores: Scores | None
    split: str
    stored: int | None

    @classmethod
    def read(cls, folder: Path) -> "_Run":
        if not (folder / "spec.yaml").is_file():
            found = ", ".join(sorted(p.name for p in folder.iterdir())) if folder.is_dir() else "no such folder"
            raise RunError(f"{folder} is no run folder: spec.yaml is missing (found: {found or 'nothing'}); name one of fit's")
        spec = _read(folder / "spec.yaml", _spec)
        scores = _read(folder / "scores.json", lambda text: Scores.from_dict(json.loads(text)))
        return cls(
            spec=spec,
            facts=_read(folder / "facts.json", json.loads) or {},
            environment=_read(folder / "environment.json", json.loads) or {},
            references=_read(folder / "references.json", json.loads) or {},
            log=_read(folder / "log.jsonl", _lines) or [],
            skipped=_read(folder / "skipped.jsonl", _lines) or [],
            scores=scores,
            split=_split(folder / "predictions.parquet", scores),
            stored=_stored(folder / "model.safetensors"),
        )

    @property
    def task(self) -> str:
        return str(self.spec["task"])

    @property
    def name(self) -> str:
        return str(self.spec.get("name", "unnamed"))

    @property
    def reader(self) -> str:
        return str(self.spec["data"]["reader"]["name"])

    @property
    def metrics(self) -> dict[str, Score]:
        """Values that are not of single labels."""
        return {name: score for name, score in (self.scores or {}).items() if "/" not in name}


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    """A file's content, None where there is none."""
    if not path.is_file():
        return None
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise RunError(f"{path} cannot be read ({reason}); restore it, or make it anew by fit or evaluate") from None


def _spec(text: str) -> dict[str, Any]:
    spec = yaml.safe_load(text)
    if not isinstance(spec, dict) or "task" not in spec or not isinstance((spec.get("data") or {}).get("reader"), dict):
        raise ValueError("expected a spec with task and data.reader")
    return spec


def _lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _split(path: Path, scores: Scores | None) -> str:
    """Of which split the scores are; "" where the run does not tell."""
    if scores is None or not path.is_file():
        return ""
    from pyarrow import ArrowInvalid, parquet

    try:
        with parquet.ParquetFile(path) as file:
            if "split" not in file.schema_arrow.names or not file.metadata.num_rows:
                return ""
            return str(next(file.iter_batches(1, columns=["split"]))["split"][0])
    except (ArrowInvalid, OSError) as error:
        raise RunError(f"{path} cannot be read ({str(error).splitlines()[0]}); evaluate the run again") from None


def _stored(path: Path) -> int | None:
    """Parameters in a file of weights, by its header; None where there is none."""
    if not path.is_file():
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  # it is no mapping
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} cannot be read ({error}); restore it, or fit again") from None
    return sum(math.prod(shape) for name, shape in shapes.items() if not name.startswith("bank."))


# The header


def _header(run: _Run, license: str) -> dict[str, Any]:
    hub, tag, _ = _TASKS.get(run.task, ("other", run.task, ""))
    header: dict[str, Any] = {"license": license, "library_name": "medxray", "pipeline_tag": hub}
    if run.task == "report":
        header["language"] = "en"
    header["tags"] = ["medxray", "chest-x-ray", "radiology", tag]
    told = {name: score.value for name, score in run.metrics.items() if math.isfinite(score.value)}
    if told:
        header["metrics"] = list(told)
        dataset = {"name": run.reader, "type": run.reader, **({"split": run.split} if run.split else {})}
        result = {
            "task": {"type": hub, "name": tag},
            "dataset": dataset,
            "metrics": [{"type": name, "name": name, "value": round(value, 4)} for name, value in told.items()],
        }
        header["model-index"] = [{"name": run.name, "results": [result]}]
    return header


# Sections


def _model(run: _Run) -> str:
    counts: dict[str, dict[str, int]] = run.facts.get("parameters", {})
    sections = ("encoder", "masker", "segmenter", "pixel_decoder", "projector", "retriever", "decoder", "head")
    parts = {name: run.spec[name]["name"] for name in sections if isinstance(run.spec.get(name), Mapping)}
    rows = [
        [_escaped(name), _code(parts[name]) if name in parts else "", *_numbers(counts.get(name))]
        for name in dict.fromkeys([*parts, *counts])
    ]
    if counts:
        rows.append(["all", "", *(f"{sum(part[key] for part in counts.values()):,}" for key in ("all", "trained"))])
    text = _written(["part", "name", "parameters", "trained"], rows)
    if not counts:
        stored = "none" if run.stored is None else f"{run.stored:,} in model.safetensors"
        text += f"\nHow many parameters each part has: {_MISSING} Stored: {stored}.\n"
    begun = {
        name: _last(section["weights"])
        for name, section in [("all", run.spec), *((part, run.spec[part]) for part in parts)]
        if section.get("weights")
    }
    language = run.spec.get("decoder", {}).get("model")
    if language:
        begun["decoder"] = _public(language)
    if begun:
        told = ", ".join(f"{_escaped(name)} {_code(source)}" for name, source in begun.items())
        text += f"\nThe fit began with weights of others: {told}.\n"
    if run.references:
        told = ", ".join(f"{_code(_public(name))} (SHA-256 {_code(digest[:12])})" for name, digest in run.references.items())
        text += f"\nNot in this folder, and needed beside it: {told}.\n"
    size, channels = run.spec["data"].get("image_size"), run.spec.get("encoder", {}).get("channels")
    text += "\n" + _escaped(f"It takes images of {_sides(size)} pixels{f', {channels} channel(s)' if channels else ''};") + " "
    views = {"average": "averaged", "concatenate": "concatenated", "single": "left out but the first"}
    return text + f"further views of a study are {views.get(run.spec['data'].get('views', ''), 'joined')}.\n"


def _intended(run: _Run) -> str:
    use = _USES.get(run.task, "Research.")
    return f"{use}\n\nNot intended: any use on patients, by clinicians or without them. This is not a medical device.\n"


def _data(run: _Run) -> str:
    data = run.spec["data"]
    cleaned = f"reports cleaned by {_code(str(data.get('cleaning', 'none')))}"
    text = f"Read by {_code(run.reader)}; split: {_escaped(str(data.get('split', 'official')))}; {cleaned}.\n\n"
    splits: dict[str, dict[str, int]] = run.facts.get("splits", {})
    if splits:
        rows = [[name, *(f"{counts[key]:,}" for key in ("studies", "patients", "images"))] for name, counts in splits.items()]
        text += _table(["split", "studies", "patients", "images"], rows)
    else:
        text += f"How many studies each split has: {_MISSING}\n"
    labels: dict[str, dict[str, list[int]]] = run.facts.get("labels", {})
    if labels:
        rows = [
            [name, *(f"{own[0]:,} of {sum(own):,}" if (own := of.get(split)) else "" for split in splits)]
            for name, of in labels.items()
        ]
        text += "\nStudies that have a label, of those where it is known:\n\n" + _table(["label", *splits], rows)
    for attribute, groups in run.facts.get("attributes", {}).items():
        told = ", ".join(f"{_escaped(group or 'not told')} {count:,}" for group, count in groups.items())
        text += f"\nTraining studies by {_escaped(attribute.replace('_', ' '))}: {told}.\n"
    if run.skipped:
        reasons = Counter(_reason(row) for row in run.skipped)
        text += "\nLeft out:\n\n" + "".join(f"* {count:,}: {_escaped(reason)}\n" for reason, count in reasons.most_common())
    elif splits:
        text += "\nNothing was left out.\n"
    return text


def _training(run: _Run) -> str:
    training = run.spec.get("training", {})
    settings = {name: training[name] for name in _RECIPE if training.get(name) not in _USUAL}
    rows = [[name.replace("_", " "), _plain(value)] for name, value in {**settings, "seed": run.spec.get("seed")}.items()]
    text = _table(["setting", "value"], rows)
    steps = max((int(row.get("step", 0)) for row in run.log), default=0)
    judged = [row for row in run.log if any(name.startswith("eval_") for name in row)]
    if not run.log:
        text += "\nThere is no log of the fit in this run folder.\n"
    else:
        text += f"\n{steps:,} steps were taken; the model was validated {len(judged)} times, and the weights that are best by "
        text += f"{_code(training.get('select', 'loss'))} on the validation split were kept.\n"
    spec = yaml.safe_dump(_without_paths(run.spec), sort_keys=False, allow_unicode=True)
    # Longer than any in the spec, which so cannot end it.
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", spec)), default=0))
    return f"{text}\n<details><summary>The whole spec, without its paths</summary>\n\n{fence}yaml\n{spec}{fence}\n\n</details>\n"


def _scores(run: _Run) -> str:
    if run.scores is None:
        return "Not evaluated yet: `medxray evaluate RUN` writes the scores.\n"
    scores = run.scores
    n = max((score.n for score in scores.values()), default=0)
    text = f"On {n:,} studies of split {_code(run.split)}. " if run.split else f"On {n:,} studies. "
    if run.task == "report":
        text += f"Protocol {_escaped(scores.protocol)}. " if scores.protocol else "The protocol is not recorded. "
    told = any(math.isfinite(score.low) for score in scores.values())
    text += "In brackets the 95 % interval by a bootstrap over patients.\n\n" if told else "\n\n"
    overall = list(run.metrics)
    text += _table(["", *scores.rows], [[name, *(_score(row.get(name)) for row in scores.rows.values())] for name in overall])
    single = [name for name in scores if "/" in name]
    if single:
        text += "\nBy label:\n\n" + _table(["", scores.title], [[name, _score(scores[name])] for name in single])
    notes = [note for note in scores.notes if not note.startswith(_WARNING)]
    if len(notes) < len(scores.notes):
        notes.append("what the scores warn of is told under limits")
    return text + ("\n" + "".join(f"* {_escaped(note)}\n" for note in notes) if notes else "")


def _subgroups(run: _Run) -> str:
    if run.scores is None or not run.scores.subgroups:
        return "Groups of patients were not scored apart, or the data set tells of none.\n"
    text = ""
    for attribute, groups in run.scores.subgroups.items():
        names = [name for name in run.metrics if any(name in values for values in groups.values())][:_SUBGROUP_METRICS]
        rows, small = [], []
        for group, values in groups.items():
            n = f"{max((score.n for score in values.values()), default=0):,}"
            if any(math.isfinite(score.value) for score in values.values()):
                rows.append([group or "not told", n, *(_score(values.get(name)) for name in names)])
            else:
                small.append(f"{group or 'not told'} ({n} studies)")
        attribute = attribute.replace("_", " ")
        text += _table([attribute, "studies", *names], rows) + "\n" if rows else ""
        told = _escaped(f"Not scored by {attribute}, for want of studies: {', '.join(small)}.")
        text += f"{told}\n\n" if small else ""
    return text


def _calibration(run: _Run) -> str:
    named = {name: score for name, score in run.metrics.items() if name in ("ece", "brier")}
    notes = [note for note in (run.scores.notes if run.scores else []) if re.search(r"threshold|is said to be there", note)]
    if not named and not notes:
        return "Not measured.\n"
    rows = [[name, _score(score)] for name, score in named.items()]
    text = _table(["calibration error, lower is better", "value"], rows) + "\n" if rows else ""
    return text + "".join(f"* {_escaped(note)}\n" for note in notes)


def _limits(run: _Run) -> str:
    limits = [
        "Research use only; not a medical device. It is wrong often, and says so nowhere.",
        f"Fitted and judged on one data set ({_code(run.reader)}); how it does with other patients and devices is not known.",
        "One seed: a fit with another one may score otherwise; the intervals are for other patients alone.",
    ]
    if run.reader == "phantom":
        limits.append("The radiographs are made up. It knows nothing of real ones.")
    train = run.facts.get("splits", {}).get("train")
    if train and train["patients"] < _FEW_PATIENTS:
        limits.append(f"It learned from {train['patients']:,} patients only.")
    if not run.facts.get("attributes"):
        limits.append("Who the patients are (sex, age) and what their devices were is not recorded.")
    for attribute, groups in run.facts.get("attributes", {}).items():
        limits += map(_escaped, _lopsided(attribute.replace("_", " "), groups))
    cleaning = run.spec["data"].get("cleaning", "none")
    if run.task == "report" and cleaning != "none":
        limits.append(f"It writes as rule {_code(str(cleaning))} cleans reports: in lower case, with few marks but full stops.")
    for label, of in run.facts.get("labels", {}).items():
        for split, (present, absent) in of.items():
            if present + absent and not (present and absent):
                every = "every" if present else "no"
                limits.append(_escaped(f"{label}: {every} study of {split} has it, so it cannot be judged there."))
    return "".join(f"* {limit}\n" for limit in [*limits, *map(_escaped, _limits_of_scores(run))])


def _lopsided(attribute: str, groups: Mapping[str, int]) -> list[str]:
    told = {group: count for group, count in groups.items() if group}
    if not told:
        return [f"The {attribute} of the training patients is not told."]
    if len(told) == 1:
        return [f"The training studies are of {attribute} only {next(iter(told))}."]
    few = [f"{group} {count:,}" for group, count in told.items() if count < _FEW_OF_GROUP * sum(told.values())]
    return [f"Few training studies of {attribute}: {', '.join(few)}."] if few else []


def _limits_of_scores(run: _Run) -> list[str]:
    if run.scores is None:
        return ["It has not been evaluated."]
    limits = []
    if run.split in ("train", "val"):
        seen = "it was fitted to" if run.split == "train" else "its weights were chosen by"
        limits.append(f"The scores are of split {run.split}, the studies that {seen}, and so flatter it.")
    for note in run.scores.notes:
        if note.startswith(_WARNING):
            told = note.removeprefix(_WARNING)
            limits.append(f"{told[:1].upper()}{told[1:]}.")
        elif "of the predictions are distinct" in note:
            limits.append(f"{note}.")
    undefined = [name for name, score in run.metrics.items() if math.isnan(score.value)]
    if undefined:
        limits.append(f"{', '.join(undefined)} is undefined on these studies.")
    for attribute, groups in run.scores.subgroups.items():
        limits += _worst(attribute.replace("_", " "), groups, next(iter(run.metrics), ""))
    return limits


def _worst(attribute: str, groups: Mapping[str, Mapping[str, Score]], metric: str) -> list[str]:
    known = {group: values[metric] for group, values in groups.items() if metric in values and group}
    known = {group: score for group, score in known.items() if math.isfinite(score.value)}
    if len(known) < 2:
        return []
    worst = min(known, key=lambda group: known[group].value)
    return [f"{metric} is lowest for {attribute} {worst}: {known[worst]}, of {known[worst].n:,} studies."]


def _how_to_use(run: _Run) -> str:
    if run.stored is None:
        return "The fit has not finished: there are no weights to load. `medxray fit` with its spec goes on.\n"
    text = (
        '```python\nimport medxray\n\npipeline = medxray.load("FOLDER")\n'
        'prediction = pipeline.predict(("frontal.dcm", "lateral.dcm"))\nprint(prediction)\n```\n'
        "\nA study is one image, or its views as a tuple, frontal first: DICOM, PNG, JPEG or TIFF. "
        "On the command line: `medxray predict FOLDER chest.dcm`.\n"
    )
    return text + ("\nThe weights named above must be there too.\n" if run.references else "")


def _environment(run: _Run) -> str:
    if not run.environment:
        return f"{_MISSING}\n"
    versions = {"Python": run.environment.get("python"), **run.environment.get("packages", {})}
    told = ", ".join(f"{name} {version}" for name, version in versions.items() if version not in (None, "not installed"))
    device = run.environment.get("device")
    return _escaped(f"Fitted with {told}" + (f"; device: {device}" if device else "")) + ".\n"


_SECTIONS: dict[str, Callable[[_Run], str]] = {
    "Model": _model,
    "Intended use": _intended,
    "Data": _data,
    "Training": _training,
    "Scores": _scores,
    "Subgroups": _subgroups,
    "Calibration and thresholds": _calibration,
    "Limits": _limits,
    "How to use": _how_to_use,
    "Environment": _environment,
}


# Words


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return _written(list(map(_escaped, head)), ([_escaped(cell) for cell in row] for row in rows))


def _written(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown."""
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, ["---"] * len(head), *rows])


def _escaped(text: str) -> str:
    """One line that Markdown and the pages made of it take as text."""
    text = re.sub(r"([\\`*|\[\]]|(?<!\w)_|_(?!\w)|^[#+-](?=[ #])|^~(?=~~))", r"\\\1", " ".join(text.split()))
    text = re.sub(r"^(\d+)([.)] )", r"\1\\\2", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _code(text: str) -> str:
    """One line as a piece of code, also in a table."""
    return "`" + " ".join(text.split()).replace("`", "'").replace("|", "\\|") + "`"


def _score(score: Score | None) -> str:
    return "" if score is None else str(score)


def _numbers(count: Mapping[str, int] | None) -> list[str]:
    return ["", ""] if count is None else [f"{count['all']:,}", f"{count['trained']:,}"]


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _sides(size: Any) -> str:
    return " x ".join(map(str, size)) if isinstance(size, list) else f"{size} x {size}"


def _public(source: str) -> str:
    """A name on the hub as it is, a path by its last part."""
    return source if re.fullmatch(r"\w[\w.-]*/[\w.-]+", source) else _last(source)


def _last(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _without_paths(value: Any, key: str = "") -> Any:
    """A spec without what tells where something lies on a machine."""
    if isinstance(value, dict):
        return {k: _without_paths(v, k) for k, v in value.items() if k not in ("root", "output", "key_file")}
    if isinstance(value, list):
        return value if key == "labels" else [_without_paths(item, key) for item in value]
    if not isinstance(value, str) or key == "prompt":
        return value
    return _public(value) if key == "model" else _last(value)


def _reason(row: Mapping[str, str]) -> str:
    """Why something was left out, without what is this study's own: names, places and numbers."""
    text = row.get("reason", "")
    for name in (row.get("file"), row.get("study")):
        text = text.replace(name, "") if name else text
    text = re.sub(r"\S*[/\\]\S*", "", text)
    return re.sub(r"\d+", "N", text).strip(" :;,") or "no reason told"


def _write_page(path: Path, text: str) -> None:
    """The card as a page, without its header."""
    from markdown_it import MarkdownIt

    from medxray.visual.page import write_page

    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    title, *sections = re.split(r"^## ", text.split("---\n", 2)[2].strip(), flags=re.MULTILINE)
    name, _, intro = title.partition("\n")
    bodies = {heading.strip(): body for heading, _, body in (section.partition("\n") for section in sections)}
    folded = re.compile(r"^<details><summary>(.*?)</summary>$(.*?)^</details>$", re.DOTALL | re.MULTILINE)

    def page(body: str) -> str:
        """Raw HTML is text to the renderer, so that what folds is put around it."""
        parts = folded.split(body)
        html = [markdown.render(part) for part in parts]
        html[1::3] = [f"<details><summary>{escape(part)}</summary>" for part in parts[1::3]]
        html[2::3] = [f"{part}</details>" for part in html[2::3]]
        return "".join(html)

    write_page(path, name.removeprefix("# "), markdown.render(intro), {k: page(body) for k, body in bodies.items()}, _STYLES)
