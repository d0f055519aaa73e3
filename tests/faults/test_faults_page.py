"""docs/faults.md names the tests that there are, and they are enough."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_each_fault_names_its_test() -> None:
    rows = [line for line in (ROOT / "docs" / "faults.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    faults = [row for row in rows if not row.startswith(("| fault |", "| --- |"))]
    named = []
    for row in faults:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 5 and all(cells), row
        found = re.fullmatch(r"`(tests/[\w/]+\.py)::(test_\w+)`", cells[4])
        assert found, row
        assert f"\ndef {found[2]}(" in (ROOT / found[1]).read_text(encoding="utf-8"), f"{cells[0]}: there is no {found[0]}"
        named.append(found[0])
    assert len(set(named)) == len(named) >= 25, "a row a test"
    own = {
        f"`tests/faults/{path.name}::{name}`"
        for path in (ROOT / "tests" / "faults").glob("test_*.py")
        if path != Path(__file__)
        for name in re.findall(r"^def (test_\w+)\(", path.read_text(encoding="utf-8"), flags=re.M)
    }
    missing = own - set(named) - {"`tests/faults/test_fit_faults.py::test_killed_at_random_moments_with_loading_processes`"}
    assert not missing, "a fault that is tested stands in the table"
