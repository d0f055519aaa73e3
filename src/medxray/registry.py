"""Names for parts. One class, `Registry`, maps a name to a class and to a strict pydantic model of its settings."""

import difflib
import importlib
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, Strict, create_model
from pydantic.fields import FieldInfo

from medxray.types import MedxrayError, SpecError

Base = TypeVar("Base")

SECTIONS: dict[str, str] = {
    "task": "medxray.tasks:TASKS",
    "reader": "medxray.data.readers:READERS",
    "encoder": "medxray.encoders:ENCODERS",
    "masker": "medxray.pretrain:MASKERS",
    "segmenter": "medxray.pretrain:SEGMENTERS",
    "pixel_decoder": "medxray.pretrain:PIXEL_DECODERS",
    "projector": "medxray.llm:PROJECTORS",
    "retriever": "medxray.retrieval:RETRIEVERS",
    "decoder": "medxray.llm:REPORT_DECODERS",
    "head": "medxray.classify:HEADS",
    "metrics": "medxray.metrics:METRICS",
}
"""Where each section of a spec finds its registry; imported only when asked for."""


def registry_of(section: str) -> "Registry[Any]":
    """The registry whose parts a spec's section names."""
    module, attribute = SECTIONS[section].split(":")
    registry: Registry[Any] = getattr(importlib.import_module(module), attribute)
    return registry


def nearest(name: str, names: typing.Iterable[str]) -> str:
    """`; did you mean 'depth'?` for a name that is close to one of `names`, else an empty string."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


class Settings(BaseModel):
    """A part's name and settings as a spec holds them; complete, so that a saved spec survives changed defaults."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False)

    name: str


class Registry(Generic[Base]):
    """Maps a name to a class and to the settings that its typed `__init__` takes.

    Args:
        kind: what a part is called in messages, such as "encoder".
        base: the class that every part derives from.
        builtin: name -> "module:Class", imported only when used.
        context: names of the leading `__init__` parameters that a task passes by position, such as a
            width that another part decides; they never stand in a spec.
        settings: fields that a spec's section has beside the part's own, such as `weights`.
        group: entry point group in which other packages offer parts.
    """

    def __init__(
        self,
        kind: str,
        base: type[Base],
        builtin: Mapping[str, str],
        *,
        group: str,
        context: tuple[str, ...] = (),
        settings: type[Settings] = Settings,
    ) -> None:
        self.kind = kind
        self.base = base
        self.group = group
        self.context = context
        self.settings = settings
        self._builtin = dict(builtin)
        self._classes: dict[str, type[Base]] = {}
        self._models: dict[str, type[Settings]] = {}

    def __repr__(self) -> str:
        return f"Registry({self.kind}: {', '.join(self.names())})"

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def names(self) -> list[str]:
        """Every name that a spec may use, those of other installed packages included."""
        return sorted({*self._builtin, *self._classes, *(e.name for e in entry_points(group=self.group))})

    def register(self, name: str, *, replace: bool = False) -> Callable[[type[Base]], type[Base]]:
        """A decorator that makes a class known by `name`.

        Raises:
            SpecError: the name is taken and `replace` is False, or the class does not fit.
        """

        def decorate(cls: type[Base]) -> type[Base]:
            if not replace and name in self:
                raise SpecError(
                    f"{self.kind} {name!r} is registered already; choose another name or pass replace=True"
                )
            self._models[name] = self._settings_of(name, cls)
            self._classes[name] = cls
            return cls

        return decorate

    def get(self, name: str) -> type[Base]:
        """The class behind a name.

        Raises:
            SpecError: no such name, with the nearest one; or another package's part that fails to load.
        """
        if name not in self._classes:
            self._classes[name] = self._load(name)
        return self._classes[name]

    def settings_of(self, name: str) -> type[Settings]:
        """The strict pydantic model of a part's settings, made from its `__init__` and its docstring's Args."""
        if name not in self._models:
            self._models[name] = self._settings_of(name, self.get(name))
        return self._models[name]

    def build(self, settings: Settings, *context: Any) -> Base:
        """The part that `settings` describes; `context` is what the task knows and a spec never holds."""
        cls = self.get(settings.name)
        own = {key: getattr(settings, key) for key in self._own_parameters(cls)}
        try:
            return cls(*context, **own)
        except ValueError as error:
            raise SpecError(f"{self.kind} {settings.name!r}: {error}") from error

    def _load(self, name: str) -> type[Base]:
        if name in self._builtin:
            module, attribute = self._builtin[name].split(":")
            cls: type[Base] = getattr(importlib.import_module(module), attribute)
            return cls
        found = [e for e in entry_points(group=self.group) if e.name == name]
        if not found:
            names = self.names()
            raise SpecError(
                f"unknown {self.kind} {name!r}{nearest(name, names)} (registered: {', '.join(names)})"
            )
        try:
            cls = found[0].load()
        except Exception as error:
            raise SpecError(
                f"{self.kind} {name!r} of package {found[0].value!r} could not be loaded: {error}"
            ) from error
        self._check(name, cls)
        return cls

    def _check(self, name: str, cls: object) -> None:
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            raise SpecError(
                f"{self.kind} {name!r}: expected a subclass of {self.base.__module__}.{self.base.__name__}, "
                f"found {cls!r}"
            )

    def _own_parameters(self, cls: type[Base]) -> dict[str, inspect.Parameter]:
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        return {
            p.name: p
            for p in parameters[len(self.context) :]
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        }

    def _settings_of(self, name: str, cls: type[Base]) -> type[Settings]:
        self._check(name, cls)
        descriptions = _documented_arguments(f"{cls.__doc__ or ''}\n{cls.__init__.__doc__ or ''}")
        hints = typing.get_type_hints(cls.__init__, include_extras=True)
        fields: dict[str, Any] = {"name": (typing.Literal[name], name)}
        for key, parameter in self._own_parameters(cls).items():
            if key not in hints:
                raise SpecError(
                    f"{self.kind} {name!r}: setting {key!r} of {cls.__name__}.__init__ has no type; "
                    "annotate it, so that specs can be checked"
                )
            if key in self.settings.model_fields:
                raise SpecError(
                    f"{self.kind} {name!r}: {key!r} is a setting of every {self.kind}; rename it in {cls.__name__}"
                )
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[key] = (strict(hints[key]), Field(default, description=descriptions.get(key)))
        make: Any = create_model
        model: type[Settings] = make(f"{cls.__name__}Settings", __base__=self.settings, **fields)
        paragraph = " ".join((cls.__doc__ or "").split("\n\n")[0].split())
        model.__doc__ = re.split(r"(?<=[.;]) (?=[A-Z])", paragraph)[0]
        return model


def strict(annotation: Any) -> Any:
    """The annotation with its plain numbers, strings and booleans checked without conversion."""
    if annotation in (bool, int, float, str):
        return Annotated[annotation, Strict()]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return Annotated[(strict(arguments[0]), *arguments[1:])]
    if origin in (typing.Union, types.UnionType):
        return typing.Union[tuple(strict(a) for a in arguments)]
    if origin in (list, tuple, dict) and arguments:
        return origin[tuple(a if a is ... else strict(a) for a in arguments)]
    return annotation


def describe(field: FieldInfo) -> str:
    """A field's type in words that a spec's author knows."""
    return _words(field.annotation)


def _words(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _words(arguments[0])
    if origin is typing.Literal:
        return " | ".join(map(repr, arguments))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(_words, arguments))
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(_words, arguments))}]"
    return "None" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


def _documented_arguments(doc: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for block in re.findall(r"^[ \t]*Args:\n((?:[ \t]+.*\n?|\n)+)", doc, flags=re.M):
        for key, text in re.findall(r"^\s+(\w+): (.+(?:\n(?!\s+\w+: ).+)*)", block, flags=re.M):
            found.setdefault(key, " ".join(text.split()))
    return found


__all__ = ["SECTIONS", "MedxrayError", "Registry", "Settings", "describe", "nearest", "registry_of", "strict"]
