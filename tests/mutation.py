"""How many small faults the tests notice: mutants of the modules below, drawn by a seed, each judged by its module's tests.

    python tests/mutation.py /tmp/mutants --mutants 200

A mutant is a copy of a module with one operator, constant, returned value or statement changed. It is killed when a test
fails, ends badly or takes far longer than it does without the change. The tree is copied into the folder and mutated there;
what was judged is kept there too, so that the same command goes on after an end, and judges survivors anew when tests have
changed. Heavy modules are imported once and each mutant is tried in a fork, so this needs Linux.
"""

import argparse
import ast
import contextlib
import difflib
import hashlib
import importlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PROPERTIES = "tests/properties"
SCAN = ["tests/encoders/test_scan.py", "-k", "not cache and not compiled and not fork"]
TESTS: dict[str, dict[str, list[str]]] = {
    "registry": {"registry.py": ["tests/test_registry.py", "tests/test_spec.py", "-k", "not without_memory"]},
    "spec": {"spec.py": ["tests/test_spec.py", f"{PROPERTIES}/test_spec.py", "-k", "not without_memory"]},
    "scan": {
        "encoders/scan/ssd.py": [f"{PROPERTIES}/test_scan.py", "tests/encoders/test_vim.py"],
        "encoders/scan/triton.py": ["tests/encoders/test_scan_triton.py", "-k", "not gpu"],
        "encoders/scan/*.py": [f"{PROPERTIES}/test_scan.py", *SCAN],
    },
    "maskers": {"pretrain/maskers.py": ["tests/pretrain/test_maskers.py", f"{PROPERTIES}/test_maskers.py"]},
    "metrics": {
        "metrics/text.py": ["tests/metrics/test_text.py", f"{PROPERTIES}/test_metrics.py"],
        "metrics/classification.py": ["tests/metrics/test_classification.py", f"{PROPERTIES}/test_metrics.py"],
        "metrics/calibration.py": ["tests/metrics/test_calibration.py", f"{PROPERTIES}/test_metrics.py"],
        "metrics/intervals.py": ["tests/metrics/test_intervals.py", f"{PROPERTIES}/test_metrics.py", "-m", "not slow"],
        "metrics/findings.py": ["tests/metrics/test_clinical.py", "tests/metrics/test_findings.py",
                                f"{PROPERTIES}/test_metrics.py"],
        "metrics/*.py": ["tests/metrics", "-m", "not slow"],
    },
}
"""Area -> modules below src/medxray, the first pattern that fits, and the tests that judge them."""

COMPARED: dict[type[ast.cmpop], list[type[ast.cmpop]]] = {
    ast.Lt: [ast.LtE, ast.GtE], ast.LtE: [ast.Lt, ast.Gt], ast.Gt: [ast.GtE, ast.LtE], ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.In: [ast.NotIn], ast.NotIn: [ast.In], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is],
}  # fmt: skip
COMPUTED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr, ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}  # fmt: skip
SIMPLE = (ast.Expr, ast.AugAssign, ast.Raise, ast.Assert, ast.Break, ast.Continue)
"""Statements that can be left out. Without an assignment to a new name nothing would run, which would be too easy."""
MEMORY = 3 * 2**30


class Mutant(NamedTuple):
    """A module with one change; `path` is below src/medxray."""

    area: str
    path: str
    source: str
    changed: str

    @property
    def diff(self) -> str:
        lines = difflib.unified_diff(self.source.splitlines(), self.changed.splitlines(), lineterm="", n=0)
        return "\n".join([self.path, *list(lines)[2:]])


def tests_of(area: str, path: str) -> list[str]:
    return next(tests for pattern, tests in TESTS[area].items() if Path(path).match(pattern))


def mutants(area: str, path: str, source: str) -> Iterator[Mutant]:
    """Every mutant of a module."""
    lines = source.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    for node, instead in _changes(ast.parse(source)):
        start, stop = (starts[row - 1] + column for row, column in (
            (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)))  # fmt: skip
        changed = source.encode()[:start] + instead.encode() + source.encode()[stop:]
        with contextlib.suppress(SyntaxError):
            compile(changed, path, "exec")
            yield Mutant(area, path, source, changed.decode())


def _changes(node: ast.AST) -> Iterator[tuple[Any, str]]:
    """Nodes and the source to put in their places."""
    if isinstance(node, ast.Compare):
        for i, operator in enumerate(node.ops):
            for other in COMPARED[type(operator)]:
                yield node, _with(node, ops=[*node.ops[:i], other(), *node.ops[i + 1 :]])
    elif isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in COMPUTED:
        yield node, _with(node, op=COMPUTED[type(node.op)]())
    elif isinstance(node, ast.BoolOp):
        yield node, _with(node, op=ast.And() if isinstance(node.op, ast.Or) else ast.Or())
    elif isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant):
        yield node, f"({ast.unparse(node.operand)})"
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield node, repr(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield from ((node, f"({node.value + one!r})") for one in (1, -1))
    elif isinstance(node, ast.Return) and node.value is not None and not _is_none(node.value):
        yield node, "return None"
    if isinstance(node, SIMPLE):
        yield node, "pass"
    for name, child in ast.iter_fields(node):
        # Annotations, decorators and messages say nothing that a value would show.
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for item in child if isinstance(child, list) else [child]:
            skipped = isinstance(item, ast.JoinedStr) or (isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant))
            # `strict` of zip tells of mistakes that are not there.
            skipped |= isinstance(item, ast.keyword) and item.arg == "strict"
            typing = isinstance(item, ast.If) and ast.unparse(item.test) == "TYPE_CHECKING"
            if isinstance(item, ast.AST) and not skipped and not typing:
                yield from _changes(item)


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _with(node: ast.AST, **changed: Any) -> str:
    fields = {name: getattr(node, name) for name in node._fields} | changed
    text = ast.unparse(ast.fix_missing_locations(type(node)(**fields)))
    return text if isinstance(node, ast.stmt) else f"({text})"


def draw(tree: Path, areas: Sequence[str], count: int, seed: int) -> list[Mutant]:
    """As many mutants of each area, in an order in which any beginning has all areas."""
    drawn = []
    for area in areas:
        modules = TESTS[area]
        folder = tree / "src/medxray"
        paths = sorted({path for pattern in modules for path in folder.glob(pattern)})
        names = [path.relative_to(folder).as_posix() for path in paths]
        pool = [m for name in names for m in mutants(area, name, (folder / name).read_text(encoding="utf-8"))]
        drawn.append(random.Random(f"{seed} {area}").sample(pool, min(len(pool), count // len(TESTS))))
    return [mutant for some in itertools.zip_longest(*drawn) for mutant in some if mutant is not None]


def judge(tree: Path, tests: list[str], limit: float) -> tuple[bool, float]:
    """Whether the tests pass in the tree, and the processor time that they took."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            log = os.open(tree.parent / "last.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1), os.dup2(log, 2)
            resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 1))
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            os._exit(_run(tree, tests))
        except BaseException:
            os._exit(70)
    until, done = time.monotonic() + 20 * limit, 0
    while not done and time.monotonic() < until:
        time.sleep(0.05)
        done, status, used = os.wait4(child, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):
        # What the tests started goes with them.
        os.killpg(child, signal.SIGKILL)
    if not done:
        _, status, used = os.wait4(child, 0)
    return status == 0, used.ru_utime + used.ru_stime


def _run(tree: Path, tests: list[str]) -> int:
    import pytest

    # Kept alive: what they registered with torch goes with them.
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "medxray"}
    importlib.invalidate_caches()
    os.chdir(tree)
    sys.path.insert(0, str(tree / "src"))
    os.environ["PYTHONPATH"] = str(tree / "src")
    sys.dont_write_bytecode = True
    ended = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=line", *tests])
    del before
    return int(ended)


def preload(chosen: list[Mutant]) -> None:
    """Imports what takes long; the tests' own import of medxray then takes its files from the tree."""
    import hypothesis  # noqa: F401

    from medxray.registry import SECTIONS, registry_of

    for path in {mutant.path for mutant in chosen}:
        importlib.import_module(f"medxray.{path.removesuffix('.py').removesuffix('/__init__').replace('/', '.')}")
    if {"registry", "spec"} & {mutant.area for mutant in chosen}:
        for section in SECTIONS:
            registry = registry_of(section)
            for name in registry.names():
                registry.settings_of(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mutants", type=int, default=200)
    parser.add_argument("--areas", nargs="+", choices=TESTS, default=list(TESTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--list", action="store_true", help="judge nothing, show survivors so far")
    options = parser.parse_args()
    until = time.monotonic() + 60 * options.minutes
    folder: Path = options.folder.resolve()
    tree = folder / "tree"
    folder.mkdir(parents=True, exist_ok=True)
    ignored = shutil.ignore_patterns("__pycache__", "runs")
    for name in ("src", "tests"):
        shutil.rmtree(tree / name, ignore_errors=True)
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy2(ROOT / name, tree / name)
    os.environ.setdefault("MEDXRAY_SHARED", str(ROOT.parent / "shared"))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    chosen = draw(tree, options.areas, options.mutants, options.seed)
    kept = folder / "judged.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.is_file() else []
    killed = {row["mutant"] for row in rows if row["killed"]}
    survived = {(row["mutant"], row["tests"]) for row in rows if not row["killed"]}
    limits: dict[tuple[str, ...], float] = {}
    if not options.list:
        preload(chosen)
    open_ones = 0
    with kept.open("a", encoding="utf-8") as log:
        for mutant in chosen:
            tests = tests_of(mutant.area, mutant.path)
            named = [tree / word for word in tests if word.startswith("tests/")]
            files = sorted(file for path in named for file in (path, *path.rglob("*.py")) if file.is_file())
            digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
            name = hashlib.sha256(f"{mutant.path}\n{mutant.changed}".encode()).hexdigest()
            if name in killed or (name, digest) in survived:
                continue
            if options.list or time.monotonic() > until:
                open_ones += 1
                continue
            if tuple(tests) not in limits:
                passed, seconds = judge(tree, tests, 600)
                if not passed:
                    sys.exit(f"{' '.join(tests)} fail without any mutant; see {folder / 'last.log'}")
                limits[tuple(tests)] = 10 + 4 * seconds
                print(f"{' '.join(tests)}: {seconds:.1f} s", flush=True)
            file = tree / "src/medxray" / mutant.path
            original = file.stat()
            file.write_text(mutant.changed, encoding="utf-8")
            passed, seconds = judge(tree, tests, limits[tuple(tests)])
            file.write_text(mutant.source, encoding="utf-8")
            os.utime(file, ns=(original.st_atime_ns, original.st_mtime_ns))
            (survived.add((name, digest)) if passed else killed.add(name))
            log.write(json.dumps({"mutant": name, "tests": digest, "killed": not passed, "diff": mutant.diff}) + "\n")
            log.flush()
            ended = f"survived: {mutant.diff}" if passed else f"killed: {mutant.path}"
            print(f"{seconds:.1f} s, {ended}", flush=True)
    report(chosen, killed, {name for name, _ in survived} - killed)
    if open_ones:
        print(f"{open_ones} are still to be judged: give the same command again")


def report(chosen: list[Mutant], killed: set[str], survived: set[str]) -> None:
    counts = {area: [0, 0] for area in TESTS}
    for mutant in chosen:
        name = hashlib.sha256(f"{mutant.path}\n{mutant.changed}".encode()).hexdigest()
        counts[mutant.area][0] += name in killed
        counts[mutant.area][1] += name in survived
        if name in survived:
            print(f"\nsurvived: {mutant.diff}")
    print()
    for area, (dead, alive) in {**counts, "all": [sum(column) for column in zip(*counts.values(), strict=True)]}.items():
        print(f"{area:10} {dead:4} of {dead + alive:4} killed, {dead / max(1, dead + alive):.0%}")


if __name__ == "__main__":
    main()
