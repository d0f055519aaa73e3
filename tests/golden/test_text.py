"""Report cleaning equals that of the releases, string by string."""

import json
import os
from pathlib import Path

import pytest

from medxray.data.text import RULES, clean

GOLDEN = Path(os.environ.get("MEDXRAY_GOLDEN", Path(__file__).parents[2].parent / "shared" / "golden"))


def rule_of(file: str, column: str) -> str | None:
    """Which rule made a column: its own name, or that of the file's system for a data set."""
    if (name := column.replace("_", "-")) in RULES:
        return name
    own = "r2gen" if file.removeprefix("report_cleaning_") == "r2gen" else "r2gencsr"
    return {"iu_xray": "r2gen-iu", "mimic_cxr": f"{own}-mimic"}.get(column)


def test_cleaning() -> None:
    files = sorted(GOLDEN.glob("report_cleaning_*.json"))
    if not files:
        pytest.skip(f"golden files are absent: {GOLDEN}")
    compared = set()
    for path in files:
        for row in json.loads(path.read_text(encoding="utf-8")):
            for column in row.keys() - {"report"}:
                rule = rule_of(path.stem, column)
                assert rule, f"{path}: no rule for column {column!r}"
                assert clean(row["report"], rule) == row[column], f"{path}: {row['report']!r}"
                compared.add(rule)
    assert {"r2gen-iu", "r2gen-mimic"} <= compared


def test_columns_name_their_rule() -> None:
    assert rule_of("report_cleaning_r2gen", "mimic_cxr") == "r2gen-mimic"
    assert rule_of("report_cleaning_r2gencsr", "mimic_cxr") == "r2gencsr-mimic"
    assert rule_of("report_cleaning_r2gengpt", "iu_xray") == "r2gen-iu"
    assert rule_of("report_cleaning_all", "r2gencsr_mimic") == "r2gencsr-mimic"
    assert rule_of("report_cleaning_r2gen", "other") is None
