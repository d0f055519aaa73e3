"""What the set-up installs is pinned: a fresh one has the versions that the tests ran with."""

import functools
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

pytest.importorskip("packaging")
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def pins() -> dict[str, str]:
    """Package -> version, as constraints.txt has them."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    pairs = [re.fullmatch(r"([\w.-]+)==([\w.!+-]+)", line) for line in lines]
    assert all(pairs), "a package and its version a line"
    return {canonicalize_name(pair[1]): pair[2] for pair in pairs if pair}


@functools.cache
def installed() -> dict[str, str]:
    """Package -> version, of all that the Makefile's set-up installs: what it names, and what that needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    todo = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    alone: list[str] = []
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for options in re.findall(r"^\t\$\(BIN\)/pip install (.*)$", makefile, flags=re.M):
        named = [word.strip('"') for word in re.sub(r"-c \S+|--[\w-]+|-e \S+", "", options).split()]
        (alone if "--no-deps" in options else todo).extend(named)
    found = {canonicalize_name(name): metadata.version(name) for name in alone}
    seen: set[str] = set()
    while todo:
        text = todo.pop()
        wanted = Requirement(text)
        if text in seen or (wanted.marker is not None and not wanted.marker.evaluate({"extra": ""})):
            continue
        seen.add(text)
        name = canonicalize_name(wanted.name)
        if name in map(canonicalize_name, alone):
            continue
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # not of this machine, or not set up by the Makefile
        found[name] = package.version
        for need in map(Requirement, package.requires or ()):
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in ("", *wanted.extras)):
                need.marker = None
                todo.append(str(need))
    return found


def test_every_package_of_the_set_up_is_pinned() -> None:
    missing = sorted(f"{name}=={version.partition('+')[0]}" for name, version in installed().items() if name not in pins())
    assert not missing, "add to constraints.txt:\n" + "\n".join(missing)


def test_what_is_installed_is_what_is_pinned() -> None:
    pinned = pins()
    found = {name: (version.partition("+")[0], pinned[name]) for name, version in installed().items() if name in pinned}
    assert not {name: pair for name, pair in found.items() if pair[0] != pair[1]}, "installed, and pinned"


def test_the_audit_looks_at_all_of_it() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(r"^audit:.*\n((?:\t.*\n)+)", makefile, flags=re.M)
    assert recipe is not None and "pip-audit" in recipe[1] and "constraints.txt" in recipe[1]
