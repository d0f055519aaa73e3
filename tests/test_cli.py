"""The command line: what it prints, how it ends, and how fast it starts."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from medxray.cli import app


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory, phantom: Path) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    path = folder / "tiny.yaml"
    path.write_text(f"""
task: classify
output: {folder / "run"}
data: {{reader: {{name: csv, root: {phantom}, report: findings}}, image_size: 32}}
encoder: {{name: vit, width: 16, depth: 1, heads: 2, patch: 8}}
training: {{steps: 3, batch_size: 8}}
""")
    return path


def test_fit_evaluate_predict(spec: Path, phantom: Path) -> None:
    code, out, _ = run("fit", spec, "-q")
    folder = spec.parent / "run"
    assert code == 0 and f"fitted: {folder}" in out
    for name in ("spec.yaml", "environment.json", "model.safetensors", "task.json", "log.jsonl"):
        assert (folder / name).is_file()
    code, out, _ = run("evaluate", folder, "--split", "val", "-q")
    assert code == 0 and "auroc" in out and (folder / "report.html").is_file()
    assert json.loads((folder / "scores.json").read_text())["scores"]["auroc"]["n"] > 0
    assert (folder / "predictions.parquet").is_file()
    files = sorted((phantom / "images").rglob("*.png"))[:2]
    code, out, _ = run("predict", folder, *files)
    assert code == 0 and len(out.strip().splitlines()) == 2
    code, out, _ = run("predict", folder, "--study", "--json", *files)
    assert set(json.loads(out)["scores"]) >= {"Cardiomegaly", "Effusion"}


def test_what_is_known_without_data(spec: Path) -> None:
    code, out, _ = run("show", "hd-mae-phantom")
    assert code == 0 and "tokens an image" in out and "64 (8 x 8) of width 128" in out and "trained parameters" in out
    code, out, _ = run("list")
    assert code == 0 and "r2gencsr-phantom" in out and "rectangle" in out
    code, out, _ = run("list", "encoders", "vit")
    assert code == 0 and "patch (int" in out and "pixels a side of a token" in out
    code, out, _ = run("list", "encoders")
    assert code == 0
    for family in ("VMamba", "MAE and Medical MAE", "EVA-X", "DINOv2", "RAD-DINO", "CheXFound", "Swin", "timm's own"):
        assert f"    reads {family} (" in out
    assert "reads VMamba" in run("list", "encoder", "vmamba")[1] and "EVA-X" not in run("list", "encoder", "vmamba")[1]
    code, out, _ = run("schema")
    assert code == 0 and "$schema" in json.loads(out)
    code, out, _ = run("doctor")
    assert code == 0 and "selective scan, torch: runs here" in out and "torch 2" in out
    # Of every extra it says what is there, or how to get it.
    extras = {
        "faiss": "retrieval", "cv2": "opencv", "ray": "scale", "bitsandbytes": "quantize", "peft": "lora",
        "highdicom": "interchange", "fastapi": "serve",
    }  # fmt: skip
    for package, extra in extras.items():
        assert re.search(rf"^{package}(: installed| \d|: missing \(pip install 'medxray\[{extra}\]')", out, flags=re.M), package


def test_an_encoder_alone() -> None:
    code, out, _ = run("show", "vit", "width=32", "depth=1", "heads=2", "--image-size", "32x64")
    assert code == 0 and "  width: 32" in out and "8 (2 x 4) of width 32" in out and "pixels a token:" in out
    assert re.search(r"^parameters: +21,024$", out, flags=re.M)
    assert run("show", "encoder", "vit", "width=32", "depth=1", "heads=2", "--image-size", "32x64")[1] == out
    code, out, _ = run("show", "timm", "model=test_vit", "image_size=96", "trainable=false")
    assert code == 0 and "36 (6 x 6) of width 64" in out and "its weights are frozen" in out
    code, out, _ = run("show", "hd-mae-phantom", "--image-size", "64")
    assert code == 0 and "16 (4 x 4) of width 128" in out and "image_size: 64" in out


MISTAKES = {
    "spec": (["fit", "r2gencsr-fantom"], "did you mean 'r2gencsr-phantom'"),
    "setting": (["fit", "{spec}", "encoder.depht=2"], "encoder.depht: unknown setting of 'vit'; did you mean 'depth'"),
    "run": (["evaluate", "{folder}/nothing"], "no run folder"),
    "not fitted": (["evaluate", "{spec}", "output={folder}/never"], "is not fitted yet"),
    "another spec": (["fit", "{spec}", "seed=9"], "belongs to another spec (seed: 42 there, 9 here)"),
    "image": (["predict", "{folder}/run", "{spec}"], "tiny.yaml"),
    "missing image": (["predict", "{folder}/run", "{folder}/none.png"], "none.png"),
    "data": (["fit", "{spec}", "data.reader.root={folder}/nowhere", "output={folder}/x"], "nowhere"),
    "list": (["list", "encodr"], "did you mean 'encoder'"),
    "settings of a run": (["evaluate", "{folder}/run", "seed=3"], "is a run folder, which has its settings"),
    "half a run": (["predict", "{folder}", "x.png"], "is not a finished run: spec.yaml is missing"),
    "show": (["show", "vmaba"], "no spec or encoder 'vmaba'; did you mean 'vmamba'"),
    "show a setting": (["show", "vmamba", "szie=base"], "encoder.szie: unknown setting of 'vmamba'; did you mean"),
    "show a value": (["show", "vit", "width=30"], "width must be divisible by heads and by 4"),
    "show a size": (["show", "vit", "--image-size", "100"], "take 96 x 96"),
    "show sides": (["show", "vit", "--image-size", "22x"], "expected pixels such as 224, or 224x320"),
    "show weights": (["show", "vit", "weights={folder}/none.pth"], "no such file or folder"),
    "show a module": (["show", "module"], "hand it over again"),
    "split": (["evaluate", "{folder}/run", "--split", "tset"], "did you mean 'test'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_exits_with_2_and_one_message(case: str, spec: Path) -> None:
    run("fit", spec, "-q")
    arguments, message = MISTAKES[case]
    code, out, error = run(*(a.format(spec=spec, folder=spec.parent) for a in arguments))
    assert code == 2, (out, error)
    assert error.startswith("medxray: ") and message in error
    assert "Traceback" not in out + error
    assert not (spec.parent / "x").exists() and not (spec.parent / "never").exists(), "nothing half written"


def test_start_is_fast() -> None:
    """Best of three: `--help` without torch, `import medxray` beside `import torch`."""

    def best(*command: str) -> float:
        times = []
        for _ in range(3):
            started = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, capture_output=True)
            times.append(time.perf_counter() - started)
        return min(times)

    # Twice the promised figures, for a machine that does other work beside.
    assert best("-m", "medxray.cli", "--help") < 2
    assert best("-c", "import torch, medxray") - best("-c", "import torch") < 2
    loaded = "import sys, medxray.cli, medxray.spec; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True).stdout.strip() == "[]"
