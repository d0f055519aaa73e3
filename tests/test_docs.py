"""The site: it builds, no link is dead, nothing is loaded from elsewhere, and every block of code on every page runs.

A fence with a title that begins with `needs` is not run: Python and specs are checked, and command lines parsed. One whose
title is the name of a file is written to the folder that the page's other blocks run in. `title="prints"` is what the block
before it prints, `...` standing for anything.
"""

import functools
import importlib
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import pytest
import typer.main
import yaml
from typer.testing import CliRunner

import medxray
from medxray.cli import app
from medxray.registry import SECTIONS, registry_of
from medxray.spec import Spec, packaged

pytest.importorskip("mkdocs", reason="pip install 'medxray[docs]'")

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


class Block(NamedTuple):
    """A fence: its page, the line that it begins in, its language, title and text."""

    page: str
    line: int
    language: str
    title: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def runs(self) -> bool:
        return not self.title.startswith("needs ")

    @property
    def is_file(self) -> bool:
        return re.fullmatch(r"[\w./-]+\.\w+", self.title) is not None


def blocks(page: str, text: str) -> list[Block]:
    found = []
    fence = r"^(?P<indent> *)```(?P<language>\w*) *(?P<options>[^\n`]*)\n(?P<text>.*?)^(?P=indent)``` *$"
    for match in re.finditer(fence, text, flags=re.M | re.S):
        title = re.search(r'title="([^"]*)"', match["options"])
        own = re.sub(rf"^{match['indent']}", "", match["text"], flags=re.M)
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(page, line, match["language"], title[1] if title else "", own))
    return found


@functools.cache
def hook(name: str) -> Any:
    sys.path.insert(0, str(DOCS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(DOCS))


WRITTEN = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
MADE = [f"reference/{name}.md" for name in ("command-line", "specs")]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning is an error."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder)))
    return folder


class Page(HTMLParser):
    """Links, anchors and what is loaded of a built page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors |= {value for key in ("id", "name") if (value := values.get(key))}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"] or "")
        elif tag == "link" and values.get("rel") not in ("canonical", "prev", "next"):
            self.loaded.append(values.get("href") or "")
        elif tag in ("script", "img", "iframe", "source") and values.get("src"):
            self.loaded.append(values["src"] or "")


def test_links_lead_somewhere(site: Path) -> None:
    pages = {
        path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html")) if path.name != "404.html"
    }
    assert len(pages) >= len(WRITTEN) + len(SECTIONS) + 4
    dead = []
    for path, page in pages.items():
        for link in page.links + page.loaded:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if parts.scheme not in ("http", "https") or "." not in parts.netloc or " " in link:
                    dead.append((path.relative_to(site), link))
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(parts.fragment)
            if not target.is_file() or (anchor and target in pages and anchor not in pages[target].anchors):
                dead.append((path.relative_to(site), link))
    assert not dead


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        assert not [link for link in Page(path.read_text(encoding="utf-8")).loaded if urlsplit(link).netloc], path
    for path in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", path.read_text(encoding="utf-8")), path


def test_every_part_and_setting_has_its_place(site: Path) -> None:
    reference = hook("reference")
    for section in SECTIONS:
        page = Page(
            (site / "reference" / reference.page_of(section).replace(".md", ".html")).read_text(encoding="utf-8")
        )
        builtin = set(registry_of(section)._builtin)
        assert builtin <= page.anchors
    text = (site / "reference" / "encoders.html").read_text(encoding="utf-8")
    for key in registry_of("encoder").settings_of("vit").model_fields:
        assert key == "name" or f"<code>{key}</code>" in text
    specs = Page((site / "reference" / "specs.html").read_text(encoding="utf-8"))
    assert set(packaged()) <= specs.anchors
    commands = Page((site / "reference" / "command-line.html").read_text(encoding="utf-8"))
    assert set(COMMANDS) <= commands.anchors
    # README's table of figures is there, and not a second time in docs/.
    figures = (site / "benchmarks.html").read_text(encoding="utf-8")
    assert "benchmarks/demo_learning.py" in figures
    assert "demo_learning.py" not in (DOCS / "benchmarks.md").read_text(encoding="utf-8")


def test_every_command_has_an_example() -> None:
    assert not [name for name, command in COMMANDS.items() if "Example" not in (command.help or "")]


Registered = list[tuple[Any, dict[str, Any], dict[str, Any]]]


def registered() -> Registered:
    """Every registry with what is registered in it."""
    return [(registry, dict(registry._classes), dict(registry._models)) for registry in map(registry_of, SECTIONS)]


def register(parts: Registered) -> None:
    for registry, classes, models in parts:
        registry._classes, registry._models = dict(classes), dict(models)


def test_a_shell_completes_commands_and_specs() -> None:
    def completed(typed: str) -> list[str]:
        env = {"_MEDXRAY_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
        return CliRunner().invoke(app, env=env, prog_name="medxray").stdout.split()

    assert completed("medxray eva") == ["evaluate"]
    assert completed("medxray fit hd-mae-") == [name for name in packaged() if name.startswith("hd-mae-")]


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Registered]:
    """What a shell knows; a page's own parts, and modules of its folder, are gone after it."""
    parts, path = registered(), list(sys.path)
    yield parts
    register(parts)
    sys.path[:] = path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantom as pages ask for it, drawn once."""
    from medxray.data.phantom import generate

    return generate(tmp_path_factory.mktemp("drawn") / "phantom", studies=120, size=128, seed=0, progress=False)


@pytest.mark.parametrize("page", WRITTEN + MADE)
def test_blocks_run(
    page: str,
    drawn: Path,
    outside: Registered,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (DOCS / page).read_text(encoding="utf-8") if page in WRITTEN else hook("reference").pages()[page][1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["python"])
    # Names, and so splits, follow from it.
    monkeypatch.setenv("MEDXRAY_KEY", "a key for the pages of the documentation")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "small").symlink_to(drawn)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    for block in blocks(page, text):
        if block.is_file:
            write(block, tmp_path)
        if block.language == "python":
            code = compile("\n" * block.line + block.text, block.page, "exec")
            if block.runs and not block.is_file:
                exec(code, namespace)
                printed = capsys.readouterr().out
        elif block.language == "bash":
            for line in commands(block.text):
                if block.runs:
                    # A shell knows nothing that the page's Python has registered.
                    own = registered()
                    register(outside)
                    printed = run(line, block.where)
                    register(own)
                else:
                    parse(line, block.where)
        elif block.language == "yaml":
            for fragment in fragments(block.text):
                check_spec(fragment, block.where)
        elif block.title == "prints":
            wanted = "".join(
                ".*" if part == "..." else re.escape(part) for part in re.split(r"(\.\.\.)", squeezed(block.text))
            )
            assert re.search(wanted, squeezed(printed)), f"{block.where}: it prints {printed!r}"
        else:
            assert block.language in ("", "text", "toml", "csv"), f"{block.where}: {block.language}"
            for line in commands(block.text):
                if not block.language and line.startswith("medxray "):
                    parse(line, block.where)


def squeezed(text: str) -> str:
    return " ".join(text.split())


def commands(text: str) -> list[str]:
    lines = re.sub(r" *\\\n *", " ", text).splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def write(block: Block, folder: Path) -> None:
    """A file of the page; a project file's entry points are there as they are when it is installed."""
    path = folder / block.title
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.text, encoding="utf-8")
    if block.language == "toml":
        project = tomllib.loads(block.text)["project"]
        installed = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        installed.mkdir()
        (installed / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
        groups = [
            f"[{group}]\n" + "".join(f"{name} = {place}\n" for name, place in entries.items())
            for group, entries in project["entry-points"].items()
        ]
        (installed / "entry_points.txt").write_text("\n".join(groups))
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()


def run(line: str, where: str) -> str:
    words = shlex.split(line, comments=True)
    assert words[0] == "medxray", f"{where}: {line!r} is not run; give the block a title that begins with 'needs'"
    result = CliRunner().invoke(app, words[1:])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, f"{where}: {line!r} ends with {result.exit_code}: {result.stderr}"
    return result.stdout


def parse(line: str, where: str) -> None:
    """A command line that is not run: its options are known, and its spec can be read with its settings."""
    words = shlex.split(line, comments=True)
    launched = next((i for i, word in enumerate(words) if word in ("medxray", "medxray.cli")), None)
    if launched is None:
        if words[0] == "python" and not words[1].startswith("-"):
            assert (ROOT / words[1]).is_file(), f"{where}: no file {words[1]}"
        return
    name, *rest = words[launched + 1 :]
    if name.startswith("-"):
        return
    assert name in COMMANDS, f"{where}: no command {name}"
    given = COMMANDS[name].make_context(name, rest).params
    if name in ("fit", "show") and (spec := given.get("spec") or given.get("name")) in packaged():
        Spec.read(spec, given["settings"])
    if given.get("spec") in packaged() and name in ("evaluate", "predict", "export"):
        Spec.read(given["spec"], given.get("settings"))
    if name in ("prepare", "inspect") and given["source"] and not given["source"].isupper():
        from medxray.data import data_of

        data_of(given["source"], list(given["settings"] or []))


def fragments(text: str) -> list[dict[str, Any]]:
    """A block of YAML; one in which a section comes twice shows several specs."""
    found: list[str] = [""]
    seen: set[str] = set()
    for line in text.splitlines(keepends=True):
        key = re.match(r"([\w-]+):", line)
        if key and key[1] in seen:
            found.append("")
            seen = set()
        seen |= {key[1]} if key else set()
        found[-1] += line
    return [yaml.safe_load(part) for part in found]


def check_spec(fragment: dict[str, Any], where: str) -> None:
    """A spec, or some sections of one."""
    if "task" in fragment:
        Spec.read(fragment)
        return
    task = (
        "hd-mae"
        if {"masker", "pixel_decoder", "segmenter"} & set(fragment)
        else "classify"
        if "head" in fragment
        else "r2gencsr"
    )
    try:
        Spec.read(f"{task}-phantom", fragment)
    except medxray.MedxrayError as error:
        raise AssertionError(f"{where}: {error}") from error
