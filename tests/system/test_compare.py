"""The comparison of all systems, in small: it goes through, goes on where it was stopped, and writes what it found."""

import runpy
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "compare_systems.py"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_all_systems_in_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(EXAMPLE))
    arguments = ["--folder", str(tmp_path), "--seeds", "2", "--studies", "60", "--steps", "2"]
    example["main"](arguments)
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if line.startswith("|")][2:]
    titles = [title for title, *_ in example["SYSTEMS"].values()]
    assert rows == [*titles, example["RETRIEVED"], *example["FLOORS"]]
    assert table in capsys.readouterr().out
    ET.parse(tmp_path / "table.svg")
    # What is there is kept; a run that was lost alone is made again, and the table is the same.
    kept = (tmp_path / "seed-0" / "r2gen" / "model.safetensors").stat().st_mtime_ns
    lost = tmp_path / "seed-1" / "nearest" / "scores.json"
    lost.unlink()
    example["main"](arguments)
    assert lost.is_file() and (tmp_path / "table.md").read_text(encoding="utf-8") == table
    assert (tmp_path / "seed-0" / "r2gen" / "model.safetensors").stat().st_mtime_ns == kept
