"""Pages that the site makes from the code whenever it is built: parts, settings, specs, the command line, the Python surface.

A hook of MkDocs (`mkdocs.yml`). Other pages may hold `<!-- README: Heading -->`, where that part of README.md is put.
"""

import functools
import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import typer.main
import yaml
from pydantic import BaseModel

import medxray
from medxray.cli import app
from medxray.registry import Settings, describe, registry_of
from medxray.spec import DataSpec, GenerationSpec, Spec, TrainingSpec, packaged
from medxray.weights.families import FAMILIES

ROOT = Path(__file__).parents[1]

# Section of a spec -> title of its page, and what its parts are for.
PARTS = {
    "task": ("Tasks", "What is fitted: a task wires parts together, and says which sections a spec has."),
    "reader": (
        "Readers",
        "A data set, as its publisher lays it out. [Data](../data.md) tells of each where to get it.",
    ),
    "encoder": ("Encoders", "Images to tokens."),
    "masker": ("Maskers", "Which tokens stay visible in masked auto-encoding."),
    "segmenter": ("Segmenters", "Where the chest lies in a radiograph."),
    "pixel_decoder": ("Pixel decoders", "Visible tokens to the pixels of hidden ones."),
    "projector": ("Projectors", "An encoder's tokens in a language model's width."),
    "retriever": ("Retrievers", "Which training studies stand beside a study as its context."),
    "decoder": ("Report decoders", "Visual tokens to a report."),
    "head": ("Heads", "An image's or a study's features to one logit a label."),
    "metrics": ("Metrics", "Predictions and references to scores."),
}
PLAIN = {"data": DataSpec, "training": TrainingSpec, "generation": GenerationSpec}


def on_config(config: Any) -> Any:
    """Puts the pages that are made here into the navigation."""
    pages.cache_clear()
    for entry in config.nav:
        if "Reference" in entry:
            entry["Reference"] += [{title: path} for path, (title, _) in pages().items()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds them to the site."""
    from mkdocs.structure.files import File

    for path, (_, text) in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fills in what a page takes from README.md."""
    return re.sub(r"<!-- README: (.+?) -->", lambda found: readme(found[1]), markdown)


def readme(heading: str) -> str:
    """The part of README.md under a heading, with its links as they are on the site's first level.

    Raises:
        LookupError: it has no such heading.
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, flags=re.M | re.S)
    if found is None:
        raise LookupError(f"README.md has no heading {heading!r}, which a page of docs/ asks for")
    return re.sub(r"\]\(docs/", "](", found[1]).strip()


@functools.cache
def pages() -> dict[str, tuple[str, str]]:
    """Path below docs/ -> title and Markdown of each page, in the order of the navigation."""
    made = {"reference/spec.md": ("Spec", spec_page())}
    for section, (title, purpose) in PARTS.items():
        made[f"reference/{page_of(section)}"] = (title, parts_page(section, title, purpose))
    made["reference/specs.md"] = ("Packaged specs", packaged_page())
    made["reference/command-line.md"] = ("Command line", command_page())
    made["reference/python.md"] = ("Python", python_page())
    return made


def page_of(section: str) -> str:
    """The file of a registry's page."""
    return PARTS[section][0].lower().replace(" ", "-") + ".md"


def spec_page() -> str:
    """The sections of a spec and the settings that every task has."""
    rows = []
    for key, field in Spec.model_fields.items():
        if key in PARTS and key not in ("task", "metrics"):
            text = f"a part: [{PARTS[key][0].lower()}]({page_of(key)})"
        elif key in PLAIN:
            text = f"a block of settings: [below](#{key})"
        else:
            text = plain(field.description or "")
        if key in ("task", "metrics"):
            text += f": [{PARTS[key][0].lower()}]({page_of(key)})"
        rows.append((f"`{key}`", "" if key in PLAIN else default_of(field), text))
    blocks = "".join(f"\n## {key}\n\n{plain(model.__doc__ or '')}\n\n{settings(model)}" for key, model in PLAIN.items())
    return (
        "# Spec\n\nA spec is a YAML file; `Spec.read` checks all of it before anything is loaded. Which parts it has follows "
        f"from its [task](tasks.md). Settings are overridden as `key=value`, with dots: `encoder.name=vmamba`.\n\n"
        f"{table(('section', 'default', 'what it is'), rows)}{blocks}"
    )


def parts_page(section: str, title: str, purpose: str) -> str:
    """A registry: what every part of it has, then each part with its own settings."""
    registry = registry_of(section)
    lines = [f"# {title}\n\n{purpose}\n"]
    shared = registry.settings
    if shared is not Settings:
        lines.append(f"## Settings of all of them\n\n{settings(shared)}")
    for name in registry.names():
        cls = registry.get(name)
        lines.append(f"## {name}\n\n{summary(cls)}\n")
        if section == "task":
            rows = [(f"[`{key}`]({page_of(key)})", left_out(value)) for key, value in cls.sections.items()]
            lines.append(table(("section", "if it is left out"), rows))
            continue
        lines.append(settings(registry.settings_of(name), without=set(shared.model_fields)))
        read = [
            (plain(f.name), plain(f.files), f"`{f.example}`")
            for f in FAMILIES
            if section == "encoder" and f.encoder == name
        ]
        if read:
            lines.append("Public weights that it reads:\n\n" + table(("weights", "files", "settings"), read))
    return "\n".join(lines)


def packaged_page() -> str:
    """Every spec that comes with the library, as it stands in its file."""
    lines = [
        "# Packaged specs\n\nEach is named in place of a file: `medxray fit NAME`. What a spec leaves out is as by default.\n"
    ]
    for name, path in packaged().items():
        lines.append(f"## {name}\n\n```yaml\n{path.read_text(encoding='utf-8').strip()}\n```\n")
    return "\n".join(lines)


def command_page() -> str:
    """Every command as its `--help` tells it."""
    group: Any = typer.main.get_command(app)
    lines = [f"# Command line\n\n{plain(group.help or '')} {plain(group.epilog or '')}\n"]
    for name, command in group.commands.items():
        told, _, examples = inspect.cleandoc(command.help or "").replace("\b", "").partition("Example")
        usage = " ".join(["medxray", name, "[OPTION]...", *map(written, arguments(command))])
        lines.append(f"## {name}\n\n{plain(told.strip())}\n\n```text\n{usage}\n```\n")
        rows = [parameter(p) for p in command.params if not getattr(p, "hidden", False)]
        if rows:
            lines.append(table(("argument or option", "default", "what it does"), rows))
        if examples:
            shown = "\n".join(line.strip() for line in examples.split(":", 1)[1].strip().splitlines() if line.strip())
            lines.append(f'```bash title="needs your data and runs: examples"\n{shown}\n```\n')
    return "\n".join(lines)


def arguments(command: Any) -> list[Any]:
    """What a command takes by position."""
    return [p for p in command.params if p.param_type_name == "argument"]


def written(argument: Any) -> str:
    """An argument as it stands in a command line."""
    name: str = argument.metavar or argument.name.upper()
    several = "..." if argument.nargs == -1 and not name.endswith("...") else ""
    return name + several if argument.required or name.startswith("[") else f"[{name}]{several}"


def parameter(p: Any) -> tuple[str, str, str]:
    """An argument or option of a command as a row: how it is written, its default, what it does."""
    names = (*p.opts, *p.secondary_opts) if p.param_type_name == "option" else (written(p),)
    usual = "" if p.default in (None, [], False, ...) or callable(p.default) else f"`{p.default}`"
    return ", ".join(f"`{name}`" for name in names), "required" if p.required else usual, plain(p.help or "")


def python_page() -> str:
    """What `import medxray` gives."""
    lines = ["# Python\n\n`import medxray` gives these names; each loads its module when it is first used.\n"]
    rows = []
    for name in medxray.__all__:
        value = getattr(medxray, name)
        doc = value if inspect.isclass(value) or inspect.isfunction(value) or inspect.ismodule(value) else type(value)
        section = next((s for s in PARTS if registry_of(s) is value), None)
        text = f"registry: [{PARTS[section][0].lower()}]({page_of(section)})" if section else plain(paragraph(doc))
        rows.append((f"[`{name}`](#{name.lower()})" if name in DOCUMENTED else f"`{name}`", text))
    lines.append(table(("name", "what it is"), rows))
    for name in DOCUMENTED:
        value = getattr(medxray, name)
        lines.append(f"## {name}\n\n{documented(value, name)}")
        for key, method in inspect.getmembers(value, inspect.isfunction) if inspect.isclass(value) else ():
            if not key.startswith("_") and key in vars(value):
                lines.append(f"### {name}.{key}\n\n{documented(method, key)}")
    return "\n".join(lines)


DOCUMENTED = ("build", "load", "Pipeline", "compare", "Prediction", "Scores", "read_image")


def documented(value: Any, name: str) -> str:
    """Signature and docstring."""
    signature = re.sub(r"[\"']", "", str(inspect.signature(value)))
    signature = re.sub(
        r"\b(?:medxray|pathlib|collections\.abc|typing|torch\.nn\.modules\.module)\.(?:\w+\.)*(?=[A-Z])", "", signature
    )
    doc = inspect.getdoc(value) or ""
    doc = "" if doc.startswith(f"{getattr(value, '__name__', name)}(") else doc
    head, *blocks = re.split(r"^(Args|Returns|Raises|Attributes):\n", doc, flags=re.M)
    text = f"```text\n{name}{signature}\n```\n\n{plain(head.strip())}\n"
    for title, block in zip(blocks[::2], blocks[1::2], strict=True):
        entries = re.split(r"^    (?=\S)", block, flags=re.M)[1:]
        items = [re.sub(r"^([\w, ]+): ", r"`\1`: ", " ".join(entry.split())) for entry in entries]
        text += f"\n**{title}**\n\n" + "".join(f"* {plain(item)}\n" for item in items)
    return text + "\n"


def settings(model: type[BaseModel], without: Iterable[str] = ()) -> str:
    """A table of a model's settings, and one of each block inside it."""
    limits = model.model_json_schema()
    rows, inner = [], []
    for key, field in model.model_fields.items():
        if key == "name" or key in without:
            continue
        about = limits["properties"][key]
        text = " ".join(filter(None, [plain(field.description or ""), bounds(about)]))
        rows.append((f"`{key}`", f"`{describe(field)}`", default_of(field), text))
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel) and not issubclass(kind, Settings):
                inner.append(f"Settings of `{key}`:\n\n{settings(kind)}")
    if not rows:
        return "No settings of its own.\n"
    return table(("setting", "type", "default", "what it does"), rows) + "".join(f"\n{block}" for block in inner)


def bounds(about: dict[str, Any]) -> str:
    """Limits of a number, as its JSON Schema has them."""
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    found = [
        f"{sign} {one[key]:g}" for one in (about, *about.get("anyOf", ())) for key, sign in signs.items() if key in one
    ]
    return f"({', '.join(dict.fromkeys(found))})" if found else ""


def default_of(field: Any) -> str:
    """A default as a spec would hold it."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return usual(value.model_dump() if isinstance(value, BaseModel) else value)


def left_out(part: dict[str, Any] | None) -> str:
    """What stands for a section that a spec leaves out."""
    return "it must be named" if part is None else usual(part) if part else "there is none"


def usual(value: Any) -> str:
    """A value in YAML, on one line."""
    if value is None:
        return "`null`"
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False, allow_unicode=True)
    return f"`{text.removesuffix('...' + chr(10)).strip()}`"


def summary(cls: type) -> str:
    """A class's docstring up to its arguments, as paragraphs."""
    text = re.split(r"^(?:Args|Attributes|Raises|Returns):", inspect.getdoc(cls) or "", flags=re.M)[0]
    return "\n\n".join(plain(" ".join(block.split())) for block in text.strip().split("\n\n"))


def paragraph(value: Any) -> str:
    """The first paragraph of a docstring."""
    return " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())


def plain(text: str) -> str:
    """Text in which nothing but code between backticks means anything to Markdown."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([\\*_<>|{}\[\]#])", r"\\\1", part) for part in parts)


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(' '.join(cell.split()) for cell in line)} |\n" for line in lines) + "\n"
