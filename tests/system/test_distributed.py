"""Several processes learn, judge and predict what one does; a checkpoint goes on with another number of them; one that is lost
is named."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file

# Imports once, then forks the processes of each job, which meet as those of torchrun do.
DRIVER = """
import json, os, shutil, signal, socket, sys, traceback
import torch
torch.set_num_threads(1)
import accelerate, medxray, medxray.sharding, transformers.models.llama.modeling_llama
from medxray.training import Fitter

def work(job, rank):
    step = Fitter.training_step
    def training_step(self, *arguments, **named):
        if self.state.global_step == job.get("kill_at") and rank == job["kill"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *arguments, **named)
    Fitter.training_step = training_step
    pipeline = medxray.build(job["spec"]).fit(progress=False)
    if "evaluate" in job:
        pipeline.evaluate(job["evaluate"], progress=False)
    if "predict" in job:
        found = [[one.study_id, one.text] for one in pipeline.predict(job["predict"])]
        json.dump(found, open(f"{job['said']}-{rank}.json", "w"))

def start(job, rank, count, port):
    child = os.fork()
    if child:
        return child
    if count > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }
    code = 1
    try:
        work(job, rank)
        code = 0
    except BaseException:
        print(f"{rank}: {traceback.format_exc()}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)

for job in json.load(open(sys.argv[1])):
    if "copy" in job:
        shutil.copytree(job["copy"], job["spec"]["output"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [start(job, rank, job["processes"], port) for rank in range(job["processes"])]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes) and "kill" not in job:
        sys.exit(f"{job['spec']['output']}: {codes}")
"""
STEPS, STUDIES = 50, 12
TASKS = ("pretrain", "classify", "report")
Run = Callable[[list[dict[str, Any]]], str]


def spec(root: Path, folder: Path, task: str, processes: int = 1, **training: Any) -> dict[str, Any]:
    """Twelve studies a step, whatever the number of processes."""
    decoder = {
        "name": "causal-lm", "trainable": True, "vocabulary": 300, "words": True,
        "config": {
            "model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
    }  # fmt: skip
    tasks: dict[str, dict[str, Any]] = {
        "pretrain": {"masker": {"name": "random", "ratio": 0.6}},
        "classify": {},
        "report": {
            "decoder": decoder,
            "retriever": {"name": "fixed", "positives": 2, "negatives": 1, "refresh": 12},
            "generation": {"max_new_tokens": 6, "batch_size": 2},
            "metrics": ["bleu"],
        },
    }
    return {
        "task": task,
        "output": str(folder / task),
        "data": {"image_size": 32, "reader": {"name": "csv", "root": str(root), "report": "findings"}},
        "encoder": {"name": "vit", "width": 16, "depth": 2, "heads": 2, "patch": 8},
        "training": {
            "steps": STEPS, "batch_size": STUDIES // processes, "learning_rate": 2e-3, "log_steps": 1, "warmup": 0.2,
            "evaluate_steps": 25, "save_steps": 20, "pictures": 0, **training,
        },
        **tasks[task],
    }  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from medxray.data.phantom import generate

    return generate(tmp_path_factory.mktemp("phantom") / "data", studies=80, size=48, seed=3, progress=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    def start(jobs: list[dict[str, Any]]) -> str:
        folder = tmp_path_factory.mktemp("jobs")
        (folder / "driver.py").write_text(DRIVER)
        (folder / "jobs.json").write_text(json.dumps(jobs))
        done = subprocess.run(
            [sys.executable, str(folder / "driver.py"), str(folder / "jobs.json")],
            capture_output=True, text=True, timeout=1500, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-6000:]
        return done.stderr

    return start


@pytest.fixture(scope="module")
def one(root: Path, run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every task as one process learns it."""
    folder = tmp_path_factory.mktemp("one")
    run([{"processes": 1, "spec": spec(root, folder, task)} for task in TASKS])
    return folder


def losses(folder: Path, task: str) -> dict[tuple[int, str], float]:
    rows = [json.loads(line) for line in (folder / task / "log.jsonl").read_text().splitlines()]
    return {(row["step"], key): row[key] for row in rows for key in ("loss", "eval_loss") if key in row}


def same(one: Path, other: Path, task: str) -> None:
    """Each step's loss and the fitted weights."""
    mine, theirs = losses(one, task), losses(other, task)
    assert len(mine) == STEPS + 2
    assert theirs == pytest.approx(mine, abs=1e-5, rel=0), other
    fitted, weights = (load_file(folder / task / "model.safetensors") for folder in (one, other))
    assert fitted.keys() == weights.keys()
    for name, tensor in fitted.items():
        if name.endswith("qkv.bias"):
            # A key's bias has no gradient but rounding, which Adam makes as large as any other.
            tensor, weights[name] = (b.unflatten(0, (3, -1))[[0, 2]] for b in (tensor, weights[name]))
        torch.testing.assert_close(weights[name], tensor, atol=5e-4, rtol=5e-3, msg=f"{other} {task} {name}")


QUICK = [("report", 2, "fsdp"), ("pretrain", 2, "ddp"), ("classify", 4, "fsdp")]
MATRIX = [(task, count, strategy) for task in TASKS for count in (2, 4) for strategy in ("ddp", "fsdp")]


@pytest.mark.timeout(900)
def test_several_processes_learn_what_one_learns(root: Path, run: Run, one: Path, tmp_path: Path) -> None:
    jobs = [
        {"processes": n, "spec": spec(root, tmp_path / f"{n}-{strategy}", task, n, strategy=strategy)}
        for task, n, strategy in QUICK
    ]
    more = spec(root, tmp_path / "accumulated", "classify", 3, accumulate=3)
    run([*jobs, {"processes": 1, "spec": more}])
    for task, n, strategy in QUICK:
        same(one, tmp_path / f"{n}-{strategy}", task)
        kept = tmp_path / f"{n}-{strategy}" / task / "checkpoints" / "step-00000040"
        written = sorted(path.name for path in kept.rglob("*.safetensors"))
        assert len(written) == (n if strategy == "fsdp" else 1), "of divided weights each process writes its own"
    same(one, tmp_path / "accumulated", "classify")


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("task", TASKS)
def test_two_and_four_processes_by_each_strategy(
    root: Path, run: Run, one: Path, tmp_path: Path, task: str, strategy: str
) -> None:
    """With averages, clipped gradients and activations recomputed too; and again, to the same bits."""
    # At a higher rate rounding alone grows: one process that accumulates then differs by 1e-4 from one that does not.
    hard: dict[str, Any] = {
        "strategy": strategy, "clip": 0.5, "ema": 0.9, "gradient_checkpointing": True, "learning_rate": 5e-4,
    }  # fmt: skip
    jobs = [{"processes": 1, "spec": spec(root, tmp_path / "1", task, **{**hard, "strategy": "auto"})}]
    for n in (2, 4):
        jobs += [
            {"processes": n, "spec": spec(root, tmp_path / f"{n}", task, n, **hard)},
            {"processes": n, "spec": spec(root, tmp_path / f"{n} plain", task, n, strategy=strategy)},
        ]
    run([*jobs, {"processes": 2, "spec": spec(root, tmp_path / "again", task, 2, **hard)}])
    for n in (2, 4):
        same(tmp_path / "1", tmp_path / f"{n}", task)
        same(one, tmp_path / f"{n} plain", task)
    for name in ("model.safetensors", "log.jsonl"):
        assert (tmp_path / "again" / task / name).read_bytes() == (tmp_path / "2" / task / name).read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_frozen_language_model_with_adapters_is_divided_too(root: Path, run: Run, tmp_path: Path) -> None:
    """In float32 as one process; held in bfloat16 and computed in it, divided as undivided."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from medxray.llm.causal_lm import learn_tokenizer

    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(tmp_path / "llm")
    learn_tokenizer((root / "studies.csv").read_text().splitlines(), 300, words=True).save_pretrained(tmp_path / "llm")
    assert AutoTokenizer.from_pretrained(tmp_path / "llm").pad_token_id == 0

    def adapted(name: str, n: int, strategy: str, dtype: str, **training: Any) -> dict[str, Any]:
        made = spec(root, tmp_path / name, "report", n, strategy=strategy, **training)
        lora = {"rank": 4, "dropout": 0.0}
        made["decoder"] = {"name": "causal-lm", "model": str(tmp_path / "llm"), "lora": lora, "dtype": dtype}
        return {"processes": n, "spec": made}

    run(
        [
            adapted("one", 1, "auto", "float32"),
            adapted("two", 2, "fsdp", "float32"),
            adapted("undivided", 2, "ddp", "bfloat16", precision="bf16"),
            adapted("divided", 2, "fsdp", "bfloat16", precision="bf16"),
        ]
    )
    assert losses(tmp_path / "two", "report") == pytest.approx(losses(tmp_path / "one", "report"), abs=1e-5, rel=0)
    undivided, divided = (losses(tmp_path / name, "report") for name in ("undivided", "divided"))
    assert divided == pytest.approx(undivided, abs=5e-3)
    names = load_file(tmp_path / "divided" / "report" / "model.safetensors").keys()
    assert any("lora_A" in name for name in names) and not any("base_layer" in name for name in names)


def lost(root: Path, folder: Path, task: str, strategy: str) -> dict[str, Any]:
    """Four processes, one of which is killed at step 27."""
    return {"processes": 4, "spec": spec(root, folder, task, 4, strategy=strategy), "kill": 1, "kill_at": 27}


def resumed(root: Path, before: Path, folder: Path, task: str, n: int, strategy: str) -> dict[str, Any]:
    own = spec(root, folder, task, 4, strategy=strategy if n > 1 else "auto")
    return {"processes": n, "copy": str(before / task), "spec": own}


@pytest.mark.timeout(900)
def test_a_lost_process_is_named_and_fewer_go_on(root: Path, run: Run, one: Path, tmp_path: Path) -> None:
    """Twelve studies a step are four each on three processes, in two batches; the curve is that of a run never stopped."""
    said = run(
        [
            lost(root, tmp_path / "four", "classify", "fsdp"),
            resumed(root, tmp_path / "four", tmp_path / "three", "classify", 3, "fsdp"),
        ]
    )
    for rank in (0, 2, 3):
        (message,) = (part for part in said.split(f"{rank}: Traceback")[1:2])
        assert "RunError: process 1 (pid" in message and "from which the same command goes on" in message, message
        assert "the checkpoint of step 20 is kept" in message
    same(one, tmp_path / "three", "classify")


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    ("task", "first", "then"),
    [("pretrain", "fsdp", "fsdp"), ("report", "fsdp", "ddp"), ("classify", "ddp", "fsdp")],
)
def test_a_checkpoint_of_four_goes_on_with_any_number(
    root: Path, run: Run, one: Path, tmp_path: Path, task: str, first: str, then: str
) -> None:
    jobs = [lost(root, tmp_path / "four", task, first)]
    jobs += [resumed(root, tmp_path / "four", tmp_path / f"{n}", task, n, then) for n in (1, 2, 3, 5)]
    run(jobs)
    for n in (1, 2, 3, 5):
        same(one, tmp_path / f"{n}", task)


@pytest.mark.timeout(600)
def test_three_processes_judge_and_predict_each_study_once(root: Path, run: Run, one: Path, tmp_path: Path) -> None:
    files = sorted(str(path) for path in root.rglob("*.png"))[:10]
    jobs = []
    for n in (1, 3):
        own = spec(root, tmp_path / f"{n}", "report")
        jobs.append(
            {
                "processes": n, "copy": str(one / "report"), "spec": own, "evaluate": "val", "predict": files,
                "said": str(tmp_path / f"said-{n}"),
            }
        )  # fmt: skip
    run(jobs)
    alone, together = (tmp_path / n / "report" for n in ("1", "3"))
    assert (alone / "scores.json").read_bytes() == (together / "scores.json").read_bytes()
    tables = [parquet.read_table(folder / "predictions.parquet") for folder in (alone, together)]
    assert tables[0].equals(tables[1])
    names = tables[0]["study_id"].to_pylist()
    assert len(set(names)) == len(names) and len(names) % 3, "not divisible among them"
    expected = json.loads((tmp_path / "said-1-0.json").read_text())
    assert [study for study, _ in expected] == [Path(file).stem for file in files]
    for rank in range(3):
        assert json.loads((tmp_path / f"said-3-{rank}.json").read_text()) == expected


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_torchrun_ends_with_the_reason_within_a_minute(root: Path, one: Path, tmp_path: Path) -> None:
    """The command line, a process killed from outside; then two in place of three."""
    import psutil
    import yaml

    own = spec(root, tmp_path, "classify", 3, strategy="fsdp", save_steps=5)
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(own))
    log = tmp_path / "classify" / "log.jsonl"

    def command(n: int) -> list[str]:
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={n}", "--master-port=0", "--standalone"]
        return [*launcher, "-m", "medxray.cli", "fit", str(tmp_path / "spec.yaml"), "--quiet"]

    with (tmp_path / "said.txt").open("w") as said:
        job = subprocess.Popen(command(3), stdout=said, stderr=said, env={**os.environ, "OMP_NUM_THREADS": "1"})
        while not log.is_file() or len(log.read_text().splitlines()) < 8:
            assert job.poll() is None, (tmp_path / "said.txt").read_text()
            time.sleep(0.05)
        workers = [p for p in psutil.Process(job.pid).children(recursive=True) if p.environ().get("RANK") == "1"]
        os.kill(workers[0].pid, signal.SIGKILL)
        killed = time.monotonic()
        assert job.wait(60) != 0
    told = (tmp_path / "said.txt").read_text()
    assert time.monotonic() - killed < 60
    assert "process 1 (pid" in told or "rank      : 1" in told, told
    assert "Signal 9 (SIGKILL)" in told or "is kept" in told, told
    done = subprocess.run(command(2), capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path, "classify") == pytest.approx(losses(one, "classify"), abs=1e-5, rel=0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ray_train_starts_processes_as_torchrun_does(root: Path, one: Path, tmp_path: Path) -> None:
    """As docs/recipes/machines.md has it."""
    import yaml

    pytest.importorskip("ray.train.torch", reason="ray's train module is not installed; pip install 'ray[train]'")
    own = spec(root, tmp_path, "classify", 2)
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(own))
    recipe = (Path(__file__).parents[2] / "docs" / "recipes" / "machines.md").read_text().split("```python")[1]
    code = recipe.split("\n", 1)[1].split("```")[0]
    for there, here in (
        ("r2gencsr-mimic-cxr", str(tmp_path / "spec.yaml")), ("/shared/mimic-cxr", str(root)),
        ("/shared/runs/r2gencsr", own["output"]), ("/shared/ray", str(tmp_path / "ray")),
        ("num_workers=8, use_gpu=True", "num_workers=2"), ("max_failures=3", "max_failures=0"),
    ):  # fmt: skip
        assert code.count(there) == 1, there
        code = code.replace(there, here)
    (tmp_path / "train.py").write_text(code)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "train.py")],
        capture_output=True, text=True, timeout=1200, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    same(one, tmp_path, "classify")
    shutil.rmtree(tmp_path / "ray", ignore_errors=True)
