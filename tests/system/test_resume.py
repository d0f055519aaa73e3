"""A run that is killed and started again ends as one that was never killed, to the bit."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SPEC = {
    "task": "report",
    "seed": 5,
    "data": {"image_size": 32, "crop": 0.7},
    "encoder": {"name": "vit", "width": 16, "depth": 1, "heads": 2, "patch": 8, "drop_path": 0.1},
    "retriever": {"name": "nearest", "positives": 1, "negatives": 1},
    "decoder": {
        "name": "causal-lm", "trainable": True, "vocabulary": 300, "prompt": "bare", "words": True,
        "config": {
            "model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "attention_dropout": 0.1,
        },
    },
    "training": {
        "steps": 36, "batch_size": 4, "accumulate": 2, "learning_rate": 1e-2, "log_steps": 3, "evaluate_steps": 9,
        "save_steps": 5, "validation_studies": 8,
    },
    "generation": {"max_new_tokens": 8},
    "metrics": ["bleu"],
}  # fmt: skip

# Imports once, then forks a child for each attempt; a child dies by SIGKILL at a random moment or inside a save.
DRIVER = """
import json, os, random, signal, sys, threading, time
import medxray, torch
from medxray.pipeline import build
import medxray.training, transformers.models.llama.modeling_llama

spec, folder = json.load(open(sys.argv[1])), sys.argv[2]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def attempt(output, kill_after=None, kill_in_save=None):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    torch.set_num_threads(1)
    if kill_after is not None:
        threading.Timer(kill_after, die).start()
    if kill_in_save is not None:
        count, save = [0], torch.save
        def half(value, path):
            save(value, path)
            count[0] += 1
            if count[0] == kill_in_save:
                os.truncate(path, os.path.getsize(path) // 2)
                die()
        torch.save = half
    pipeline = build({**spec, "output": output}).fit(progress=False)
    pipeline.evaluate("val", progress=False)
    os._exit(0)

assert attempt(folder + "/unbroken") == 0
started = time.time()
assert attempt(folder + "/again") == 0
whole = time.time() - started
chance = random.Random(11)
killed = 0
for i in range(5):
    killed += attempt(folder + f"/random{i}", kill_after=chance.uniform(0.1, 0.9) * whole) != 0
    left = folder + f"/random{i}/checkpoints"
    print(i, "left", sorted(os.listdir(left)) if os.path.isdir(left) else "nothing")
    assert attempt(folder + f"/random{i}") == 0
assert killed >= 3, killed
for save in (1, 4, 9):
    assert attempt(folder + "/saving", kill_in_save=save) != 0
assert attempt(folder + "/saving") == 0
"""


def test_killed_and_started_again(tmp_path: Path, phantom: Path) -> None:
    spec = json.loads(json.dumps(SPEC))
    spec["data"]["reader"] = {"name": "csv", "root": str(phantom), "report": "findings"}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    (tmp_path / "driver.py").write_text(textwrap.dedent(DRIVER))
    done = subprocess.run(
        [sys.executable, str(tmp_path / "driver.py"), str(tmp_path / "spec.json"), str(tmp_path)],
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for run in (*(f"random{i}" for i in range(5)), "saving", "again"):
        for name in ("model.safetensors", "log.jsonl", "scores.json"):
            same = (tmp_path / run / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()
            assert same, f"{run}/{name} differs from the unbroken run's\n{done.stdout}"
        left = [p.name for p in (tmp_path / run).rglob(".*")]
        assert not left, f"half written files stayed: {left}"


def test_a_full_disk_while_saving_keeps_the_former_checkpoint(
    tmp_path: Path, phantom: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    import torch

    from medxray import build
    from medxray.types import RunError

    spec = json.loads(json.dumps(SPEC))
    spec["data"]["reader"] = {"name": "csv", "root": str(phantom), "report": "findings"}
    spec["output"] = str(tmp_path / "run")
    spec["training"]["steps"] = 12
    save, count = torch.save, [0]

    def full(value: object, path: Path) -> None:
        count[0] += 1
        if count[0] > 2:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(value, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunError, match=r"could not be written: No space left on device; what was saved before is whole"):
        build(spec).fit(progress=False)
    monkeypatch.undo()
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir() if p.is_dir())
    assert kept == ["step-00000005"]
    build(spec).fit(progress=False)
    whole = build({**spec, "output": str(tmp_path / "whole")}).fit(progress=False)
    assert (whole.folder / "model.safetensors").read_bytes() == (tmp_path / "run" / "model.safetensors").read_bytes()


STREAM = {
    "task": "pretrain",
    "seed": 5,
    "data": {"image_size": 32, "crop": 0.7, "workers": 2, "decode": "reduced"},
    "encoder": {"name": "vit", "width": 16, "depth": 1, "heads": 2, "patch": 8},
    "masker": {"name": "random"},
    "pixel_decoder": {"name": "cross-attention", "dim": 16, "depth": 1, "heads": 2},
    # 16 steps an epoch.
    "training": {
        "steps": 40, "batch_size": 4, "learning_rate": 1e-2, "log_steps": 3, "evaluate_steps": 20, "save_steps": 5,
        "validation_studies": 4,
    },
}  # fmt: skip

STREAM_DRIVER = """
import json, os, signal, sys
import medxray, torch
from medxray.pipeline import build
from medxray.training import Fitter

spec, folder = json.load(open(sys.argv[1])), sys.argv[2]

def attempt(output, workers, kill_at=None):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    torch.set_num_threads(1)
    step = Fitter.training_step
    def training_step(self, *arguments, **named):
        if self.state.global_step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *arguments, **named)
    Fitter.training_step = training_step
    build({**spec, "output": folder + "/" + output}, [f"data.workers={workers}"]).fit(progress=False)
    os._exit(0)

assert attempt("unbroken", 2) == 0
assert attempt("alone", 0) == 0
for output, workers in (("same", (2, 2, 2)), ("other", (2, 0, 1))):
    for number, kill_at in zip(workers, (12, 27, None)):
        assert (attempt(output, number, kill_at) != 0) == (kill_at is not None)
"""


def test_killed_in_mid_epoch_on_a_stream_with_workers(tmp_path: Path, phantom: Path) -> None:
    import csv

    import pyarrow
    from pyarrow import parquet

    with (phantom / "studies.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["view"] != "LL"]
    columns = {key: [row[key] for row in rows] for key in ("study_id", "patient_id", "view", "split")}
    columns["image"] = [(phantom / row["path"]).read_bytes() for row in rows]
    table = pyarrow.table(columns)
    (tmp_path / "data").mkdir()
    for i in range(2):
        part = table.slice(i * len(table) // 2, len(table) // 2)
        parquet.write_table(part, tmp_path / "data" / f"{i}.parquet", row_group_size=7)
    spec = json.loads(json.dumps(STREAM))
    spec["data"]["reader"] = {"name": "parquet", "root": str(tmp_path / "data")}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    (tmp_path / "driver.py").write_text(textwrap.dedent(STREAM_DRIVER))
    done = subprocess.run(
        [sys.executable, str(tmp_path / "driver.py"), str(tmp_path / "spec.json"), str(tmp_path)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for run in ("alone", "same", "other"):
        for name in ("model.safetensors", "log.jsonl"):
            same = (tmp_path / run / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()
            assert same, f"{run}/{name} differs from the unbroken run's\n{done.stdout}"
