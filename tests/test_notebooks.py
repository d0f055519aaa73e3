"""The notebooks of examples/: each runs from a clean kernel, and what its file keeps is what it shows.

    python tests/test_notebooks.py [NAME ...]    # runs them again, in a folder of their own, and keeps what they show

They run with one thread, because with more of them sums are made in another order and a fit ends elsewhere.
"""

import base64
import io
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

nbclient = pytest.importorskip("nbclient", reason="pip install 'medxray[dev]'")
nbformat = pytest.importorskip("nbformat", reason="pip install 'medxray[dev]'")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "examples").glob("*.ipynb"))}
QUICK = ("own_data",)
LARGEST = 700_000
"""Bytes of a file, pictures and all."""

DATA = re.compile(r"data:image/\w+;base64,[A-Za-z0-9+/=\n]*")
NOT_KEPT = {
    "a path of a machine": r"(?<![\w.:/-])/(home|root|tmp|work|usr|opt|var|mnt|Users)/|[A-Z]:\\\\",
    "a place of packages": r"(?i)\b(pypi|index-url|site-packages|artifactory|devpi|conda)\b",
    "a time": r"\b20\d\d-\d\d-\d\d\b|\b\d\d:\d\d:\d\d\b",
    "a bar": r"it/s|s/it|\d%\||[━█]",
    "a warning of a library": r"\w+Warning:",
}


def run(path: Path, folder: Path) -> Any:
    """The notebook with what it shows when it is run in a folder."""
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=None, startup_timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}},
        record_timing=False, coalesce_streams=True, extra_arguments=["--log-level=40"],
    )  # fmt: skip
    own = {"OMP_NUM_THREADS": "1", "IPYTHONDIR": f"{folder}/.ipython", "MEDXRAY_CACHE": f"{folder}/.cache"}
    client.execute(env={**os.environ, **own})
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            # Of a picture in two formats the one that loses nothing.
            if "image/png" in output.get("data", {}):
                output.data.pop("image/jpeg", None)
    return notebook


def shown(notebook: Any) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """The number of each code cell, and what it shows: kind of text or picture -> what."""
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            yield number, [{o.name: o.text} if o.output_type == "stream" else dict(o.get("data", {})) for o in cell.outputs]


def without_pictures(text: str) -> str:
    return DATA.sub("data:", text)


def machine() -> str:
    """What numbers hang on beside the versions: the processor's kind, and the vectors that torch uses on it."""
    import torch

    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NOTEBOOKS])
def test_it_shows_what_is_kept(name: str, tmp_path: Path) -> None:
    kept = nbformat.read(NOTEBOOKS[name], as_version=4)
    again = dict(shown(run(NOTEBOOKS[name], tmp_path)))
    for number, outputs in shown(kept):
        where = f"{name}, cell {number}"
        assert [sorted(o) for o in outputs] == [sorted(o) for o in again[number]], where
        if kept.metadata.medxray.machine != machine():
            continue
        for old, new in zip(outputs, again[number], strict=True):
            for kind, value in old.items():
                if kind == "image/png":
                    apart = np.subtract(*(np.asarray(picture(v), np.float32) for v in (value, new[kind])))
                    assert np.abs(apart).mean() < 2, where
                else:
                    assert without_pictures(new[kind]) == without_pictures(value), where


def picture(encoded: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")


def test_all_six_are_here() -> None:
    assert set(NOTEBOOKS) == {
        "start_here", "own_encoder", "own_data", "pretrain_and_probe", "compare_systems", "what_the_context_does",
    }  # fmt: skip


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_is_whole_and_clean(name: str) -> None:
    """What can be told without running it."""
    path = NOTEBOOKS[name]
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < LARGEST
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and re.match(r"# .+\n", first.source)
    assert re.search(r"^\*\*Needs\*\* .+\. \*\*Takes\*\* .+\.$", first.source, flags=re.M), first.source
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "not run from its beginning to its end"
    kinds = [kind for _, outputs in shown(notebook) for output in outputs for kind in output]
    assert "stderr" not in kinds and {"text/html", "image/png", "image/svg+xml"} & set(kinds)
    assert not [o for cell in notebook.cells for o in cell.get("outputs", ()) if o.output_type == "error"]
    texts = [cell.source for cell in notebook.cells]
    texts += [v for _, outputs in shown(notebook) for o in outputs for k, v in o.items() if k != "image/png"]
    for text in map(without_pictures, texts):
        for what, pattern in NOT_KEPT.items():
            assert not (found := re.search(pattern, text)), f"{what}: {found}"
        host = socket.gethostname()
        assert len(host) < 3 or not re.search(rf"\b{re.escape(host)}\b", text)
    linted = subprocess.run([sys.executable, "-m", "ruff", "check", path], capture_output=True, text=True, cwd=ROOT)
    assert linted.returncode == 0, linted.stdout


def test_the_page_lists_them() -> None:
    page = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
    assert not [name for name in NOTEBOOKS if f"{name}.ipynb" not in page]


def keep(path: Path) -> None:
    """Runs a notebook and writes what it shows into its file."""
    with tempfile.TemporaryDirectory() as folder:
        notebook = run(path, Path(folder))
    for cell in notebook.cells:
        cell.metadata = {}
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "medxray": {"machine": machine()},
    }
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for name in sys.argv[1:] or NOTEBOOKS:
        print(name, flush=True)
        keep(NOTEBOOKS[name])
