"""Report cleaning equals R2Gen's, string by string."""

import json
import os
from pathlib import Path

import pytest

from medxray.data.text import clean

GOLDEN = Path(os.environ.get("MEDXRAY_GOLDEN", Path(__file__).parents[2].parent / "shared" / "golden"))


@pytest.mark.parametrize(("key", "rule"), [("iu_xray", "r2gen-iu"), ("mimic_cxr", "r2gen-mimic")])
def test_cleaning(key: str, rule: str) -> None:
    path = GOLDEN / "report_cleaning_r2gen.json"
    if not path.is_file():
        pytest.skip(f"golden files are absent: {GOLDEN}")
    rows = json.loads(path.read_text())
    assert rows
    for row in rows:
        assert clean(row["report"], rule) == row[key]
