"""The pydantic model of a pipeline: YAML in and out, `key=value` overrides, JSON Schema for editors."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    Strict,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic import create_model as _create_model

from medxray.registry import SECTIONS, Settings, describe, nearest, registry_of
from medxray.types import SpecError, html_table

# Models made at run time are beyond a static checker: their bases and fields are plain values to it.
_made: Any = _create_model
_whole: Any = SerializeAsAny
_list: Any = list
Positive = Annotated[int, Strict(), Field(gt=0)]
Count = Annotated[int, Strict(), Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0)]
Flag = Annotated[bool, Strict()]
Part = SerializeAsAny[Settings]


class Section(BaseModel):
    """A block of a spec that every task has."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


class DataSpec(Section):
    """Which studies, and how their images and reports are read."""

    reader: Part = Field(description="a data set's reader and its root folder")
    image_size: Union[Positive, Annotated[list[Positive], Field(min_length=2, max_length=2)]] = Field(
        224, description="pixels a side, or [height, width]"
    )
    fit: Literal["stretch", "pad"] = Field(
        "stretch", description="how a radiograph becomes image_size: stretched as in the papers, or padded"
    )
    views: Literal["average", "concatenate", "single"] = Field(
        "average", description="how the token maps of a study's views are joined"
    )
    max_views: Positive = Field(2, description="views of a study that are read at most")
    cleaning: Literal["r2gen-iu", "r2gen-mimic", "r2gencsr-mimic", "none"] = Field(
        "r2gen-iu", description="rule for report text"
    )
    marks: Literal["keep", "drop"] = Field(
        "keep", description="what becomes of the marks of de-identification in texts: XXXX, ___, [** **]"
    )
    split: Literal["official", "patient", "stratified"] = Field(
        "official",
        description="as the data set has it, or all patients anew: by a hash of their names, or such that labels are as "
        "frequent in each split",
    )
    split_shares: list[Share] = Field(
        [0.8, 0.1, 0.1],
        description="of the patients, for train, val and test, where split is patient or stratified",
        min_length=3,
        max_length=3,
    )
    labels: list[str] | None = Field(None, description="names of labels; all that the data set has by default")
    on_error: Literal["raise", "skip"] = Field("raise", description="what an unreadable image does")
    burned_in: Literal["keep", "drop"] = Field(
        "keep",
        description="drop leaves out studies with an image whose header says that annotations are burned into it; those whose "
        "headers say nothing stay",
    )
    max_pixels: Positive = Field(100_000_000, description="an image with more is refused before it is decoded")
    crop: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="smallest share of the area that a random training crop keeps; never flipped"
    )
    crop_from: Positive | None = Field(
        None,
        description="in place of crop: all training crops are as large as image_size in an image of this side, such as "
        "224 in 256",
    )
    decode: Literal["full", "reduced"] = Field(
        "full",
        description="reduced decodes JPEG and JPEG 2000 at a half, a quarter or less of their sides, where that is no "
        "smaller than image_size and the crop need",
    )
    frames: Literal["refuse", "first"] = Field("refuse", description="a file of several frames: refused, or its first read")
    window: Count = Field(0, description="which of a DICOM file's VOI LUTs, or windows where it has no LUT; 0 is the first")
    border: Literal["keep", "crop"] = Field(
        "keep", description="crop cuts off the straight black or white border that a collimator leaves"
    )
    clahe: Annotated[float, Field(ge=1)] | None = Field(
        None,
        description="limit of a contrast-limited adaptive histogram equalisation, such as 2.0, in multiples of the mean "
        "count of a level; none if null",
    )
    cache_images: Flag = Field(True, description="keep decoded images in memory while they fit one GiB")
    workers: Count = Field(0, description="processes that load images")
    max_studies: Positive | None = Field(None, description="the first so many studies of each split only")
    fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="share of the training patients, stratified by label; the smaller lies in the larger"
    )

    @model_validator(mode="after")
    def _one_crop(self) -> "DataSpec":
        side = self.image_size if isinstance(self.image_size, int) else max(self.image_size)
        if self.crop_from is not None and (self.crop < 1 or self.crop_from < side):
            raise ValueError(f"crop_from must be at least image_size ({side}) and stands in place of crop; leave one out")
        return self

    @model_validator(mode="after")
    def _shares_of_a_division(self) -> "DataSpec":
        if self.split == "official" and self.split_shares != DataSpec.model_fields["split_shares"].default:
            raise ValueError(
                f"split_shares {self.split_shares} do nothing beside split official; set split: patient or split: stratified"
            )
        return self

    @field_validator("split_shares")
    @classmethod
    def _whole(cls, shares: list[float]) -> list[float]:
        if abs(sum(shares) - 1) > 1e-6 or not shares[0]:
            raise ValueError(
                f"expected three shares that sum to 1, that of train above 0 (they sum to {sum(shares):g}), such as "
                "[0.8, 0.1, 0.1]"
            )
        return shares

    @property
    def shown(self) -> dict[str, Any]:
        """How files become images, as `medxray.data.read_image` takes it; what is as by default is left out."""
        fields = {"frame": "frames", "window": "window", "border": "border", "clahe": "clahe"}
        values = {name: (getattr(self, field), DataSpec.model_fields[field].default) for name, field in fields.items()}
        return {name: value for name, (value, default) in values.items() if value != default}

    @property
    def crops(self) -> tuple[float, float] | None:
        """Smallest and largest share of the area that a training crop keeps; None where nothing is cut."""
        if self.crop_from is not None:
            side = self.image_size if isinstance(self.image_size, int) else max(self.image_size)
            share = (side / self.crop_from) ** 2
            return share, share
        return (self.crop, 1.0) if self.crop < 1 else None


class TrainingSpec(Section):
    """How the parameters are fitted."""

    epochs: Annotated[float, Field(gt=0)] | None = Field(None, description="passes over the training set")
    steps: Positive | None = Field(None, description="optimiser steps; in place of epochs")
    batch_size: Positive = Field(16, description="studies a process and step")
    oversample: dict[str, Positive] = Field(
        {},
        description="label -> how often an epoch has each study that it is present in, the most of several; where most studies "
        "are normal, a model that is sure of little then says more of what is not",
    )
    accumulate: Positive = Field(1, description="batches whose gradients make one step")
    learning_rate: Rate | None = Field(1e-4, description="peak rate; null where base_learning_rate is given")
    base_learning_rate: Rate | None = Field(
        None,
        description="peak rate for 256 studies a step, in place of learning_rate: it is scaled to those of a step, "
        "batch_size x accumulate x processes",
    )
    rates: dict[str, Rate] = Field({}, description="peak rates of single parts, such as {encoder: 5.0e-5}")
    min_learning_rate: Rate = Field(1e-6, description="floor of the schedule")
    schedule: Literal["cosine", "linear", "constant", "step"] = Field(
        "cosine", description="how the rate falls; by steps as step_epochs and step_factor say, with no floor"
    )
    step_epochs: Positive = Field(50, description="epochs between the falls of schedule step")
    step_factor: Annotated[float, Field(gt=0, le=1)] = Field(0.1, description="on the rate, at each of these falls")
    warmup: Share = Field(0.0, description="share of the steps in which the rate rises from zero")
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="factor on the rate for each block further from the encoder's output"
    )
    optimiser: Literal["adamw", "adam"] = Field(
        "adamw", description="adam adds the decay to the gradients, as older recipes do"
    )
    amsgrad: Flag = Field(False, description="divide by the largest second moment so far")
    weight_decay: Rate = Field(
        0.05, description="not applied to biases, norms and single tokens; by adam, to every parameter"
    )
    final_weight_decay: Rate | None = Field(
        None, description="where weight_decay ends, along a cosine over the steps; it stays as it is if null"
    )
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="decay of a moving average of the weights, such as 0.999, which validation and the fitted model then "
        "use; none if null",
    )
    betas: list[Share] = Field([0.9, 0.999], min_length=2, max_length=2)
    clip: Rate = Field(1.0, description="largest gradient norm; 0 is off")
    clip_value: Rate = Field(0.0, description="largest size of a gradient's single numbers; 0 is off")
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    strategy: Literal["auto", "ddp", "fsdp", "deepspeed"] = Field(
        "auto",
        description="how several processes share a fit: ddp, which auto takes, has the whole model in each; fsdp divides "
        "weights, gradients and optimiser state, gathered block by block; deepspeed the last two (ZeRO-2)",
    )
    gradient_checkpointing: Flag | Literal["mlp"] = Field(
        False,
        description="recompute activations to save memory: true those of whole blocks, mlp those inside the MLPs of "
        "medxray's own blocks, which is half of them at a fraction of the time",
    )
    compile: Flag = Field(False, description="torch.compile the model")
    log_steps: Positive = Field(10, description="a line in log.jsonl every so many steps")
    evaluate_steps: Positive | None = Field(None, description="validate every so many steps; each epoch if null")
    save_steps: Positive | None = Field(None, description="checkpoint every so many steps; each epoch if null")
    keep_checkpoints: Positive = Field(2, description="newest checkpoints that are kept")
    select: str = Field(
        "loss",
        description="validation metric by which the best weights are chosen, or a weighted sum of some, such as "
        "0.5 bleu-4 + 0.5 cider",
    )
    validation_studies: Positive | None = Field(
        None, description="validate on the first so many studies while fitting; all if null"
    )
    pictures: Count = Field(6, description="validation studies that a task draws after each epoch, where it draws any")

    @field_validator("select")
    @classmethod
    def _sum_of_metrics(cls, text: str) -> str:
        _weighted(text)
        return text

    @property
    def selected(self) -> dict[str, float]:
        """What `select` is a sum of: metric -> weight."""
        return _weighted(self.select)

    @model_validator(mode="after")
    def _one_rate(self) -> "TrainingSpec":
        if self.base_learning_rate is not None and "learning_rate" not in self.model_fields_set:
            self.learning_rate = None
        return self

    def peak(self, processes: int = 1, repeats: int = 1) -> float:
        """The peak rate, scaled to the images of a step where the spec gives a base: its studies x `repeats`."""
        if self.base_learning_rate is None:
            return self.learning_rate or 0.0
        return self.base_learning_rate * self.batch_size * self.accumulate * processes * repeats / 256


def _weighted(text: str) -> dict[str, float]:
    """"0.5 bleu-4 + 0.5 cider" as metric -> weight."""
    found: dict[str, float] = {}
    for term in text.split("+"):
        parts = re.fullmatch(r"\s*(?:(\d*\.?\d+)\s*[* ]\s*)?([A-Za-z][\w-]*)\s*", term)
        if parts is None or parts[2] in found:
            raise ValueError(
                f"expected a metric, or a sum of different ones such as 0.5 bleu-4 + 0.5 cider; {term.strip()!r} is no "
                "term of it"
            )
        found[parts[2]] = float(parts[1] or 1)
    return found


class GenerationSpec(Section):
    """How a report is decoded."""

    beams: Positive = 1
    min_new_tokens: Count = 0
    max_new_tokens: Positive = 100
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    length_penalty: float = 1.0
    rule: Literal["transformers", "r2gen"] = Field(
        "transformers",
        description="whose search: r2gen scores a text by its sum of log-probabilities alone, with no length_penalty and "
        "no n-gram blocked among beams; without beams each earlier n-gram costs 1.386 and is not forbidden",
    )
    no_repeat_ngram: Count = Field(0, description="n-grams of this length never come twice; 0 is off")
    sample: Flag = Field(False, description="draw tokens instead of taking the best; follows the seed")
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    batch_size: Positive = Field(16, description="studies decoded at a time")

    @model_validator(mode="after")
    def _possible(self) -> "GenerationSpec":
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens {self.min_new_tokens} is more than max_new_tokens {self.max_new_tokens}; lower the first "
                "or raise the second"
            )
        if self.sample and self.beams > 1:
            raise ValueError(
                f"beams {self.beams} keep the likeliest texts, and sample draws one; set beams: 1 or sample: false"
            )
        return self


def _changed(section: BaseModel, above: str = "") -> Iterator[str]:
    """Settings of a section that are not its defaults, as `key=value`."""
    own = section.model_dump(exclude_defaults=True, mode="json")
    for key, value in section:
        if isinstance(value, BaseModel):
            name = getattr(value, "name", None)
            yield from [f"{above}{key}={name}"] if name else []
            yield from _changed(value, f"{above}{key}.")
        elif key in own and key != "name":
            yield f"{above}{key}={own[key] if isinstance(own[key], str) else json.dumps(own[key])}"


class Spec(Section):
    """A whole pipeline: which task, which parts, which data. `Spec.read` checks it before anything is built."""

    name: str = Field("unnamed", description="names the run folder", pattern=r"^\w[\w.-]*$")
    task: str = Field(description="pretrain, classify, report, or another registered task")
    seed: Annotated[int, Strict(), Field(ge=0, lt=2**31)] = 42
    output: str | None = Field(None, description="run folder; runs/NAME if null")
    weights: str | None = Field(
        None,
        description="a checkpoint of a whole system that a fit begins with: a run folder, or a file of R2GenCSR, R2GenGPT or "
        "R2Gen. Where it has the encoder, encoder.weights is not read",
    )
    data: SerializeAsAny[DataSpec]
    encoder: Part | None = None
    masker: Part | None = None
    segmenter: Part | None = None
    pixel_decoder: Part | None = None
    projector: Part | None = None
    retriever: Part | None = None
    decoder: Part | None = None
    head: Part | None = None
    training: TrainingSpec = TrainingSpec()
    generation: GenerationSpec | None = None
    metrics: list[Part] = Field([], description="names of metrics, in the order of the table")
    protocol: Literal["full", "r2gen"] | None = Field(
        None,
        description="what reports are scored against, while fitting too: full takes references whole, r2gen as the decoder's "
        "targets, cut at its token limit, as the papers do; full if null",
    )

    @property
    def run_folder(self) -> Path:
        """Where a fit of this spec keeps what it makes."""
        return Path(self.output or f"runs/{self.name}")

    @classmethod
    def read(
        cls, source: "str | Path | Mapping[str, Any] | Spec", overrides: "Overrides | None" = None
    ) -> "Spec":
        """A checked, complete spec.

        Args:
            source: a packaged spec's name, a YAML file's path, a mapping, or a Spec.
            overrides: a nested mapping, or `key=value` strings such as "encoder.name=vit"; naming another
                part drops the settings of the one it replaces, and steps or a base rate those of epochs or a rate.

        Raises:
            SpecError: with one line for each mistake: the path in the spec, what was expected and found.
        """
        data = _load(source)
        raw: dict[tuple[str, ...], str] = {}
        if overrides is None:
            overrides = {}
        if not isinstance(overrides, Mapping):
            overrides, raw = _parse_overrides(overrides)
        data = _merge(data, overrides, ())
        try:
            return cls._check(data)
        except ValidationError as error:
            # `name=0229` reads as a number in YAML; where the spec wants text, the text as typed is meant.
            wanted = [e["loc"] for e in error.errors() if e["type"] == "string_type" and e["loc"] in raw]
            for location in wanted:
                _set(data, location, raw[tuple(str(part) for part in location)])
            try:
                return cls._check(data)
            except ValidationError as error:
                raise SpecError("\n".join(_lines(error, data))) from None

    @classmethod
    def _check(cls, data: dict[str, Any]) -> "Spec":
        """Validates with the exact settings model of each named part in place of the open `Settings`."""
        if not isinstance(data.get("task"), str):
            raise SpecError(f"task: expected one of {', '.join(registry_of('task').names())}, found {data.get('task')!r}")
        try:
            sections = registry_of("task").get(data["task"]).sections
        except SpecError as error:
            raise SpecError(f"task: {error}") from None
        fields: dict[str, Any] = {}
        problems: list[str] = []
        data = dict(data)
        for section in set(SECTIONS) - {"task", "reader", "metrics"}:
            if section not in sections:
                if data.get(section) is not None:
                    problems.append(f"{section}: not used by task {data['task']!r}; remove it (uses: {', '.join(sections)})")
                data.pop(section, None)
                continue
            usual = sections[section]
            if section not in data and usual is not None:
                data[section] = usual
            elif usual and isinstance(data.get(section), dict) and "name" not in data[section]:
                # `segmenter.stored=...` alone means the part that the task takes when none is named.
                data[section] = {"name": usual["name"], **data[section]}
            told = len(problems)
            model = _model_for(section, data, section, problems)
            optional = sections[section] == {}
            if model is not None:
                fields[section] = (_whole[model], ...)
            elif data.get(section) in (None, {}) and optional:
                data[section] = None
            elif len(problems) == told:
                names = ", ".join(registry_of(section).names())
                problems.append(f"{section}: missing; task {data['task']!r} needs one of {names}")
        if isinstance(data.get("data"), dict):
            data["data"] = dict(data["data"])
            model = _model_for("reader", data["data"], "data.reader", problems)
            if model is not None:
                narrowed = _made("DataSpec", __base__=DataSpec, reader=(_whole[model], ...))
                fields["data"] = (_whole[narrowed], ...)
        if isinstance(data.get("metrics"), list):
            data["metrics"], metrics = list(data["metrics"]), []
            for i in range(len(data["metrics"])):
                metrics.append(_model_for("metrics", data["metrics"], f"metrics.{i}", problems, i))
            if not all(metrics):
                data["metrics"] = []
            elif metrics:
                fields["metrics"] = (_whole[_list[_union(metrics)]], ...)
        if data.get("generation") is None and "decoder" in sections:
            data["generation"] = {}
        if data.get("protocol") is not None and "decoder" not in sections:
            problems.append(f"protocol: not used by task {data['task']!r}, which writes no reports; remove it")
        narrowed_spec = _made("Spec", __base__=cls, **fields)
        try:
            spec = narrowed_spec.model_validate(data)
        except ValidationError as error:
            if problems:
                paths = tuple(problem.partition(":")[0] for problem in problems)
                lines = [line for line in _lines(error, data) if not line.startswith(paths)]
                raise SpecError("\n".join([*problems, *lines])) from None
            raise
        if problems:
            raise SpecError("\n".join(problems))
        if (spec.training.epochs is None) == (spec.training.steps is None):
            raise SpecError("training: give either epochs or steps, not both and not neither")
        if (spec.training.learning_rate is None) == (spec.training.base_learning_rate is None):
            raise SpecError(
                "training: give either learning_rate or base_learning_rate, and not both; set the other to null"
            )
        return spec

    def to_dict(self) -> dict[str, Any]:
        """The complete spec as plain values; sections that the task does not use are left out."""
        return {k: v for k, v in self.model_dump().items() if v is not None}

    def to_yaml(self) -> str:
        """The complete spec as YAML; reading it gives an equal spec."""
        return yaml.dump(self.to_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)

    def _repr_html_(self) -> str:
        """For a notebook: each part with the settings that are not its defaults."""
        rows = [
            (name, " ".join([*([f"<b>{escape(part.name)}</b>"] if hasattr(part, "name") else []), *map(escape, _changed(part))]))
            for name, part in self
            if isinstance(part, BaseModel)
        ]
        metrics = ", ".join(escape(getattr(metric, "name", "")) for metric in self.metrics)
        rows += [("metrics", metrics)] if metrics else []
        return html_table((), rows, f"<b>{escape(self.name)}</b>, task {escape(self.task)}")

    @staticmethod
    def schema_for_editors() -> dict[str, Any]:
        """JSON Schema that lists every registered part and its settings."""

        def union(section: str) -> Any:
            registry = registry_of(section)
            models = []
            for name in registry.names():
                model = registry.settings_of(name)
                # In a schema the name is what tells parts apart, so that it must be given.
                models.append(_made(f"{section}_{name}", __base__=model, __doc__=model.__doc__,
                                           name=(Literal[name], ...)))  # type: ignore[valid-type]
            return _union(models)

        fields: dict[str, Any] = {
            section: (Union[union(section), None], None)
            for section in SECTIONS
            if section not in ("task", "reader", "metrics")
        }
        reader = _made("DataSpec", __base__=DataSpec, reader=(union("reader"), ...))
        metric_names = Literal[tuple(registry_of("metrics").names())]  # type: ignore[valid-type]
        model = _made(
            "Spec",
            __base__=Spec,
            task=(Literal[tuple(registry_of("task").names())], Field(description="what is fitted")),  # type: ignore[valid-type]
            data=(reader, ...),
            metrics=(_list[_union([metric_names, union("metrics")])], []),
            **fields,
        )
        schema = model.model_json_schema()
        schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
        schema["title"] = "medxray spec"
        return schema


def _union(models: Sequence[Any]) -> Any:
    return Union[tuple(dict.fromkeys(models))]


Overrides = Mapping[str, Any] | Sequence[str]


def packaged() -> dict[str, Path]:
    """Name -> file of every spec that comes with the library."""
    folder = Path(str(resources.files("medxray"))) / "specs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def describe_settings(model: type[BaseModel]) -> list[tuple[str, str, str, str]]:
    """(name, type, default, description) of each setting of a part."""
    return [
        (key, describe(field), "required" if field.is_required() else repr(field.default), field.description or "")
        for key, field in model.model_fields.items()
        if key != "name"
    ]


_LARGEST = 100_000
"""Values that a spec may hold."""


class _Loader(yaml.SafeLoader):
    """YAML without objects, in which 1e-4 is a number."""

    def get_single_data(self) -> Any:
        """The document; aliases are counted as what they stand for.

        Raises:
            yaml.YAMLError: it holds itself, or too much.
        """
        try:
            data = super().get_single_data()
            if _count(data, {}) > _LARGEST:
                raise yaml.YAMLError(f"too large: more than {_LARGEST} values, with what its aliases stand for")
        except RecursionError:
            raise yaml.YAMLError("too deeply nested, or a value that holds itself") from None
        return data


def _count(value: Any, known: dict[int, int]) -> int:
    """Values in a value, itself among them."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        known[id(value)] = 1 + sum(_count(one, known) for one in (value.values() if isinstance(value, dict) else value))
    return known[id(value)]


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


class _Dumper(yaml.SafeDumper):
    """Lists of plain values on one line, so that a spec reads as people write it."""


def _represent_list(dumper: yaml.SafeDumper, values: list[Any]) -> yaml.Node:
    flat = all(isinstance(v, (int, float, str, bool)) for v in values)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=flat)


_Dumper.add_representer(list, _represent_list)


def _load(source: "str | Path | Mapping[str, Any] | Spec") -> dict[str, Any]:
    if isinstance(source, Spec):
        return source.to_dict()
    if isinstance(source, Mapping):
        return _plain(source)
    path = Path(source)
    names = packaged()
    if str(source) in names:
        path = names[str(source)]
    elif path.suffix not in (".yaml", ".yml") and not path.exists():
        raise SpecError(
            f"unknown spec {str(source)!r}{nearest(str(source), names)}; "
            f"expected a YAML file, a run folder or one of {', '.join(names)}"
        )
    if path.is_dir():
        path = path / "spec.yaml"
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise SpecError(f"spec file {path} does not exist; give a YAML file or one of {', '.join(packaged())}") from None
    except OSError as error:
        raise SpecError(f"spec file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SpecError(f"spec file {path} is not UTF-8 text; save it as YAML in UTF-8") from None
    except yaml.constructor.ConstructorError as error:
        raise SpecError(f"spec file {path}: only plain values are allowed; {_yaml_problem(error)}; remove the tag") from None
    except yaml.YAMLError as error:
        raise SpecError(f"spec file {path} is not YAML: {_yaml_problem(error)}") from None
    if not isinstance(data, dict):
        raise SpecError(f"spec file {path}: expected a mapping with 'task' and 'data', found {type(data).__name__}")
    data.setdefault("name", path.stem)
    return data


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
    return f"{getattr(error, 'problem', None) or error}{place}"


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _parse_overrides(pairs: Sequence[str]) -> tuple[dict[str, Any], dict[tuple[str, ...], str]]:
    if isinstance(pairs, str):
        pairs = [pairs]
    tree: dict[str, Any] = {}
    raw: dict[tuple[str, ...], str] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        location = tuple(key.strip().split("."))
        if not equals or not all(location):
            raise SpecError(f"override {pair!r}: expected key=value, such as encoder.name=vit")
        try:
            value = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError as error:
            raise SpecError(f"override {pair!r}: the value is not YAML: {_yaml_problem(error)}") from None
        node = tree
        for part in location[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise SpecError(f"override {pair!r}: {part!r} was given a plain value by an earlier override")
        node[location[-1]] = value
        raw[location] = text
    return tree, raw


_EITHER = (("epochs", "steps"), ("learning_rate", "base_learning_rate"))


def _merge(base: Any, over: Any, location: tuple[str, ...]) -> Any:
    if not isinstance(over, Mapping) or not isinstance(base, Mapping):
        return _plain(over)
    kept = dict(base)
    if location == ("training",):
        # Of two ways to say the same the one that is named now counts.
        for pair in _EITHER:
            named = [key for key in pair if over.get(key) is not None]
            kept |= dict.fromkeys(set(pair) - set(named)) if len(named) == 1 else {}
    if "name" in over and "name" in base and over["name"] != base["name"] and location and location[-1] in SECTIONS:
        shared = set(registry_of(location[-1]).settings.model_fields) - {"name", "weights"}
        kept = {key: value for key, value in base.items() if key in shared}
    for key, value in over.items():
        part = kept.get(key)
        # `encoder: vit` is short for `encoder: {name: vit}`.
        if isinstance(part, str) and key in SECTIONS and key != "task" and isinstance(value, Mapping):
            part = {"name": part}
        kept[key] = _merge(part, value, (*location, key)) if isinstance(part, Mapping) else _plain(value)
    return kept


def _set(data: Any, location: Sequence[Any], value: Any) -> None:
    for part in location[:-1]:
        data = data[part]
    data[location[-1]] = value


def _model_for(
    section: str, holder: Any, path: str, problems: list[str], key: str | int | None = None
) -> type[Settings] | None:
    """The settings model of the part that `holder[key]` names; mistakes go to `problems`."""
    key = section if key is None else key
    registry = registry_of(section)
    value = holder.get(key) if isinstance(holder, dict) else holder[key]
    if isinstance(value, str):
        holder[key] = value = {"name": value}
    if value in (None, {}):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        problems.append(f"{path}: expected a mapping with 'name', one of {', '.join(registry.names())}; found {value!r}")
        holder[key] = None
        return None
    try:
        return registry.settings_of(value["name"])
    except SpecError as error:
        problems.append(f"{path}.name: {error}")
        holder[key] = None
        return None


def _lines(error: ValidationError, data: Any) -> list[str]:
    """One line for each mistake that pydantic found."""
    lines = []
    for item in error.errors():
        location = [str(part) for part in item["loc"] if not str(part).endswith("Settings")]
        path = ".".join(location) or "spec"
        if item["type"] == "extra_forbidden":
            owner, names = _owner(location[:-1], data)
            line = f"{path}: unknown setting{owner}{nearest(location[-1], names)} (known: {', '.join(names)})"
        elif path == "data.reader":
            line = f"data.reader: missing; expected one of {', '.join(registry_of('reader').names())}"
        elif item["type"] == "missing":
            line = f"{path}: missing; this setting is required"
        else:
            message = re.sub(r"^(Input|Value error,?) ", "", item["msg"])
            line = f"{path}: {message[0].lower()}{message[1:]}, found {item['input']!r}"
            line = line.replace("should be", "expected")
        if line not in lines:
            lines.append(line)
    return lines


def _owner(location: list[str], data: Any) -> tuple[str, list[str]]:
    """Whose setting it is, in words, and the names that it has."""
    if not location:
        return " of a spec", list(Spec.model_fields)
    last = max((i for i, part in enumerate(location) if part in SECTIONS), default=None)
    if last is not None:
        section, node, inner = location[last], data, location[last + 1 :]
        if inner and inner[0].isdigit():
            last, inner = last + 1, inner[1:]
        for part in location[: last + 1]:
            node = node[int(part)] if isinstance(node, list) else node[part]
        model: type[BaseModel] = registry_of(section).settings_of(node["name"])
        for part in inner:
            # A block of settings inside a part's own, such as `lora`.
            annotation = model.model_fields[part].annotation
            kinds = [k for k in (annotation, *get_args(annotation)) if isinstance(k, type) and issubclass(k, BaseModel)]
            model = kinds[0] if kinds else model
        return f" of {inner[-1] if inner else node['name']!r}", list(model.model_fields)
    models: dict[str, type[BaseModel]] = {"data": DataSpec, "training": TrainingSpec, "generation": GenerationSpec}
    return f" of {location[-1]!r}", list(models[location[-1]].model_fields) if location[-1] in models else []
