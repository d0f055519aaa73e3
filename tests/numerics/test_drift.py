"""How far bfloat16 leads each small spec away from float32: loss curves of 200 steps, on images as small as they go."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import medxray
from medxray.spec import packaged

SPECS = [name for name in packaged() if name.endswith("-phantom")]
STEPS, WINDOW = 200, 20
WITHIN = 0.05
"""Relative difference of the mean losses of any 20 steps."""


def curve(name: str, precision: str, phantom: Path, output: Path) -> np.ndarray:
    """The training loss at each step."""
    overrides: dict[str, Any] = {
        "output": str(output),
        "data": {"reader": {"name": "csv", "root": str(phantom), "report": "findings"}, "image_size": 32, "max_pixels": 10**6},
        "encoder": {"width": 32, "depth": 1, "heads": 2, "patch": 8},
        "training": {
            "steps": STEPS, "batch_size": 8, "precision": precision, "log_steps": 1, "evaluate_steps": STEPS,
            "save_steps": STEPS, "validation_studies": 4, "pictures": 0,
        },
        "metrics": [],
    }  # fmt: skip
    decoder = medxray.Spec.read(name).decoder
    if decoder is not None:
        overrides["generation"] = {"max_new_tokens": 1}
        overrides["decoder"] = {"max_length": 32} | (
            {"width": 32, "hidden": 64, "layers": 1}
            if decoder.name == "memory-transformer"
            else {"config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}}
        )
    medxray.build(name, overrides).fit(progress=False)
    rows = map(json.loads, (output / "log.jsonl").read_text().splitlines())
    found = np.array([row["loss"] for row in rows if "loss" in row])
    assert len(found) == STEPS
    return found


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", SPECS)
def test_bf16_learns_what_float32_learns(name: str, phantom: Path, tmp_path: Path) -> None:
    wide, narrow = (curve(name, precision, phantom, tmp_path / precision) for precision in ("fp32", "bf16"))
    assert not np.array_equal(wide, narrow), "both ran in one precision"
    assert wide[-WINDOW:].mean() < 0.97 * wide[:WINDOW].mean(), "nothing was learned, so nothing was compared"
    means = [np.convolve(losses, np.full(WINDOW, 1 / WINDOW), "valid") for losses in (wide, narrow)]
    apart = np.abs(means[1] / means[0] - 1)
    print(f"{name}: at most {apart.max():.4f} apart, {apart[-1]:.4f} at the end; loss {wide[0]:.3f} to {means[0][-1]:.3f}")
    assert apart.max() < WITHIN
