"""Pages of the site from the notebooks of examples/, with what they keep of their outputs. A hook of MkDocs (`mkdocs.yml`)."""

import base64
import functools
import json
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
SHOWN = ("text/html", "image/svg+xml", "image/png", "text/markdown", "text/plain")
"""Kinds of an output, the one that is taken first."""


class Page(NamedTuple):
    """A notebook: its title, its Markdown, HTML that stands in place of marks in it, and files beside it."""

    title: str
    text: str
    outputs: dict[str, str]
    files: dict[str, bytes]


@functools.cache
def pages() -> dict[str, Page]:
    """Path below docs/ -> page, in the order in which docs/notebooks.md lists them."""
    listed = re.findall(r"\(notebooks/(\w+)\.md\)", (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8"))
    return {f"notebooks/{name}.md": page_of(name) for name in dict.fromkeys(listed)}


def page_of(name: str) -> Page:
    """What is shown of a notebook."""
    raw = (ROOT / "examples" / f"{name}.ipynb").read_bytes()
    outputs: dict[str, str] = {}
    files = {f"{name}.ipynb": raw}
    parts = []
    for cell in json.loads(raw)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"\((\w+)\.ipynb\)", r"(\1.md)", source))
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            for text in output_of(output, name, files):
                mark = f"output-{name}-{len(outputs)}"
                outputs[mark] = text
                parts.append(f'<div class="output" data-output="{mark}"></div>' if text.startswith("<") else text)
    title = parts[0].splitlines()[0].removeprefix("# ")
    parts.insert(1, f"[The notebook]({name}.ipynb), to be run and changed.")
    return Page(title, "\n\n".join(parts) + "\n", outputs, files)


def output_of(output: dict[str, Any], name: str, files: dict[str, bytes]) -> Iterator[str]:
    """An output as HTML, or as Markdown; pictures become files, since a page of this site holds none itself."""

    def file(kind: str, content: bytes) -> str:
        made = f"{name}-{len(files)}.{kind}"
        files[made] = content
        return made

    if output["output_type"] == "stream":
        yield f"<pre>{escape(''.join(output['text']))}</pre>"
        return
    data = {kind: "".join(value) for kind, value in output.get("data", {}).items()}
    kind = next((kind for kind in SHOWN if kind in data), None)
    if kind == "text/html":
        yield re.sub(
            r'src="data:image/(\w+);base64,([^"]+)"',
            lambda found: f'src="{file(found[1], base64.b64decode(found[2]))}"',
            data[kind],
        )
    elif kind == "image/svg+xml":
        yield f'<img src="{file("svg", data[kind].encode())}" alt="chart">'
    elif kind == "image/png":
        yield f'<img src="{file("png", base64.b64decode(data[kind]))}" alt="picture">'
    elif kind == "text/markdown":
        yield data[kind]
    elif kind == "text/plain":
        yield f"<pre>{escape(data[kind])}</pre>"


def on_config(config: Any) -> Any:
    """Puts them into the navigation."""
    pages.cache_clear()
    for entry in config.nav:
        if "Notebooks" in entry:
            entry["Notebooks"] += [{page.title: path} for path, page in pages().items()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds them, their pictures and the notebooks themselves to the site."""
    from mkdocs.structure.files import File

    for path, page in pages().items():
        files.append(File.generated(config, path, content=page.text))
        for name, content in page.files.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Puts outputs in their places, as they are."""
    made = pages().get(page.file.src_uri)
    if made is None:
        return html
    return re.sub(r'(data-output="([\w-]+)">)', lambda found: found[1] + made.outputs[found[2]], html)
