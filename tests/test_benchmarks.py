import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def ratios() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ratios", BENCHMARKS / "ratios.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["ratios"] = module
    spec.loader.exec_module(module)
    return module


def test_every_benchmark_of_the_suite_is_there(ratios: ModuleType) -> None:
    for line in ratios.SUITE:
        assert "from ratios import record" in (BENCHMARKS / line.split()[0]).read_text(encoding="utf-8"), line
    scripts = {line.split()[0] for line in ratios.SUITE}
    telling = {path.name for path in BENCHMARKS.glob("*.py") if "from ratios import record" in path.read_text(encoding="utf-8")}
    assert scripts == telling


@pytest.fixture
def suite(ratios: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A suite of one benchmark, whose ratios are those of a file; gives what the command does with them, and its words."""
    script, values = tmp_path / "own.py", tmp_path / "values"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\nfrom ratios import record\n"
        f"rest = open({str(values)!r}).read().split()\n"
        "record('scan', float(rest[0]), 'torch operations')\nrecord('scan', 2.0, 'the plain loop')\n"
        f"open({str(values)!r}, 'w').write(' '.join(rest[1:] or rest))\n"
    )
    monkeypatch.setattr(ratios, "SUITE", (str(script),))
    monkeypatch.setattr(ratios, "KEPT", tmp_path / "ratios.json")

    def run(said: str, *arguments: str) -> int | str | None:
        values.write_text(said)
        monkeypatch.setattr(sys, "argv", ["ratios.py", "--output", str(tmp_path / "out"), *arguments])
        try:
            ratios.main()
        except SystemExit as end:
            return end.code
        return 0

    return run


def test_what_got_slower_is_told(suite, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert suite("6") == 0 and "no table is kept yet" in capsys.readouterr().out
    assert suite("6", "--keep") == 0
    assert suite("5.1") == 0 and "nothing is slower" in capsys.readouterr().out
    assert suite("4.9") == 1
    assert "scan: 4.90 times, was 6.00" in capsys.readouterr().out
    # A busy machine's figure is measured once more.
    assert suite("3 6.1") == 0
    import torch

    table = (tmp_path / "out" / "ratios.md").read_text()
    assert f"| scan | torch {torch.__version__} operations | 6.10 |" in table and "| scan | the plain loop | 2.00 |" in table
    # The kept table stays until it is asked for.
    assert '"torch operations"' in (tmp_path / "ratios.json").read_text() and "6.0" in (tmp_path / "ratios.json").read_text()


def test_a_wrong_name_and_a_failing_benchmark_are_told(suite, ratios: ModuleType, tmp_path: Path, monkeypatch, capsys) -> None:
    assert suite("1", "--only", "nothing.py") == 2
    assert "no benchmark begins so" in capsys.readouterr().err
    (tmp_path / "bad.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(ratios, "SUITE", (str(tmp_path / "bad.py"),))
    assert "ended with 3" in str(suite("1"))


def test_nothing_is_written_when_a_benchmark_runs_alone(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); from ratios import record; record('x', 1.0, 'torch')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "" and list(tmp_path.iterdir()) == []
