"""The command line: what it prints, how it ends, and how fast it starts."""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from medxray import progress, summary
from medxray.cli import app, main
from medxray.registry import registry_of
from medxray.spec import packaged

Run = Callable[..., tuple[int, str, str]]
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


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
    (folder / "odd").mkdir()
    (folder / "odd" / "spec.yaml").write_text("task: classify\n")
    (folder / "odd" / "t.csv").write_text("a,b\nx,y\n")
    return path


def test_fit_evaluate_predict(run: Run, spec: Path, phantom: Path) -> None:
    code, out, _ = run("fit", spec, "-q")
    folder = spec.parent / "run"
    assert code == 0 and out.endswith(f"fitted: {folder}\n")
    assert out.splitlines()[0].split() == ["step", "training", "loss", "validation", "loss"]
    for name in ("spec.yaml", "environment.json", "model.safetensors", "task.json", "log.jsonl"):
        assert (folder / name).is_file()
    code, out, _ = run("evaluate", folder, "--split", "val", "-q")
    assert code == 0 and "auroc" in out and (folder / "report.html").is_file()
    assert json.loads((folder / "scores.json").read_text())["scores"]["auroc"]["n"] > 0
    assert (folder / "predictions.parquet").is_file()
    files = sorted((phantom / "images").rglob("*.png"))[:2]
    code, out, _ = run("predict", folder, *files)
    assert code == 0 and len(out.strip().splitlines()) == 2
    code, out, _ = run("predict", folder, "--study", *files, "--format", "jsonl")
    assert set(json.loads(out)["scores"]) >= {"Cardiomegaly", "Effusion"}


def test_what_is_known_without_data(run: Run, spec: Path) -> None:
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


def test_an_encoder_alone(run: Run) -> None:
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
    "label": (["fit", "{spec}", "training.oversample={{Efusion: 2}}", "output={folder}/x"], "did you mean 'Effusion'"),
    "metric of another task": (["fit", "{spec}", "metrics=[bleu]", "output={folder}/x"], "'bleu' judges text"),
    "sides": (["fit", "{spec}", "data.image_size=[32]", "output={folder}/x"], "at least 2 items"),
    "card of no spec": (["card", "{folder}/odd"], "expected a spec with task and data.reader"),
    "no metric": (["score", "{folder}/odd/t.csv", "--prediction", "a", "--reference", "b", "--metrics", ","], "none are named"),
    "export into a file": (["export", "{folder}/run", "{spec}"], "tiny.yaml cannot be read or written"),
    "two documents": (["predict", "{folder}/run", "{spec}", "--json", "--format", "csv"], "leave one out, or name an --output"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_exits_with_2_and_one_message(run: Run, case: str, spec: Path) -> None:
    run("fit", spec, "-q")
    arguments, message = MISTAKES[case]
    code, out, error = run(*(a.format(spec=spec, folder=spec.parent) for a in arguments))
    assert code == 2, (out, error)
    assert error.startswith("medxray: ") and message in error
    assert "Traceback" not in out + error
    assert not (spec.parent / "x").exists() and not (spec.parent / "never").exists(), "nothing half written"


def test_start_is_fast(run: Run) -> None:
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


@pytest.fixture(scope="module")
def places(run: Run, spec: Path, phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What commands are given: fitted runs, a table of reports, an image, a folder for what they write."""
    folder = tmp_path_factory.mktemp("json")
    table = folder / "reports.csv"
    table.write_text("study_id,patient_id,ours,theirs,report\n" + "".join(
        f"s{i},p{i},the heart is normal .,lungs are clear .,the lungs are {'clear' if i % 2 else 'hazy'} .\n" for i in range(4)
    ))  # fmt: skip
    drawn = folder / "drawn.yaml"
    drawn.write_text(spec.read_text().replace("classify", "pretrain").replace(f"{spec.parent / 'run'}", f"{folder / 'drawn'}"))
    for one in (spec, drawn):
        assert run("fit", one, "-q")[0] == 0
    image = next((phantom / "images").rglob("*.png"))
    return {"spec": spec, "run": spec.parent / "run", "drawn": folder / "drawn", "table": table, "image": image,
            "phantom": phantom, "out": folder / "out"}  # fmt: skip


JSON = {
    "fit": ("fit {spec}", "run name task log files"),
    "evaluate": ("evaluate {run}", "run name task title protocol scores comparisons notes subgroups files"),
    "score": ("score {table} --prediction ours --reference report --out {out}.json", "title protocol scores notes files"),
    "compare": (
        "compare ours={table} theirs={table} --prediction ours --reference report --out {out}",
        "title protocol scores comparisons notes runs differences wins findings files",
    ),
    "card": ("card {run} --out {out}.md", "run files"),
    "predict": ("predict {run} {image}", "run name task predictions left_out files"),
    "predict into a file": ("predict {run} {image} --output {out}.csv", "run name task predictions left_out files"),
    "pictures": ("pictures {drawn} {image} --output {out}", "run name task files"),
    "export": ("export {run} {out}/exported", "run name task files"),
    "show": ("show {spec}", "spec figures"),
    "show an encoder": ("show vit width=32 depth=1 heads=2", "spec figures"),
    "list": ("list", "specs task encoder metrics"),
    "list a part": ("list encoder vit", "encoder"),
    "schema": ("schema", "$schema properties"),
    "doctor": ("doctor", "checks"),
    "prepare": (
        "prepare csv {out}/shards reader.root={phantom} reader.report=findings --size 32 --workers 1",
        "studies images bytes skipped files",
    ),
    "prepare --verify": ("prepare --verify {out}/shards", "studies images bytes skipped files"),
    "inspect": (
        "inspect csv reader.root={phantom} reader.report=findings --out {out}/card.html --workers 1",
        "splits notes leaking files",
    ),
}


@pytest.mark.parametrize("case", JSON)
def test_json_is_one_document(case: str, run: Run, places: dict[str, Path]) -> None:
    line, keys = JSON[case]
    code, out, error = run(*line.format(**places).split(), *([] if case == "schema" else ["--json"]))
    assert code == 0, error
    # NaN and infinities, which Python would read, are no JSON.
    found = json.loads(out, parse_constant=pytest.fail)
    assert set(keys.split()) <= set(found)
    assert all(Path(file).exists() for file in found.get("files", []))
    if "scores" in found:
        assert set(next(iter(found["scores"].values()))) == {"value", "low", "high", "n"}
    if "run" in found:
        assert Path(found["run"]) in (places["run"], places["drawn"])
    if case == "show an encoder":
        assert found["figures"]["parameters"] == {"text": "21,024", "value": 21024}
    if case == "predict":
        assert found["predictions"][0]["study_id"] == places["image"].stem


def test_every_command_is_for_programs_too() -> None:
    """A long step can be silenced, an answer can be read; `schema` prints JSON in any case, and `app` is for people."""
    for name, command in COMMANDS.items():
        options = {option for parameter in command.params for option in parameter.opts}
        assert options & {"--json", "--quiet"} or name in ("schema", "app"), name


def test_a_mistake_leaves_no_half_document(run: Run, places: dict[str, Path]) -> None:
    code, out, error = run("predict", places["run"], places["table"], "--json")
    assert code == 2 and not out and error.startswith("medxray: ")


def test_quiet_is_quiet(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every long step shows how far it is, and with -q none does; the phantom is drawn anew each time."""
    # A line each time that a bar would be drawn.
    monkeypatch.setattr(progress, "LINE_S", 0.0)

    def steps(quiet: bool) -> dict[str, str]:
        here = tmp_path / ("quiet" if quiet else "loud")
        here.mkdir()
        spec = here / "spec.yaml"
        spec.write_text(f"""
task: classify
output: {here / "run"}
data: {{reader: {{name: phantom, root: {here / "data"}, studies: 40, size: 32}}, image_size: 32}}
encoder: {{name: vit, width: 16, depth: 1, heads: 2, patch: 8, trainable: false}}
training: {{steps: 2, batch_size: 8}}
""")
        small = "reader.studies=8 reader.size=32 --workers 1"
        lines = (
            f"fit {spec}", f"evaluate {here / 'run'}", f"predict {here / 'run'} {here / 'data/images'}",
            f"prepare phantom {here / 'shards'} reader.root={here / 'more'} {small} --size 32",
            f"prepare --verify {here / 'shards'}",
            f"inspect phantom reader.root={here / 'most'} {small} --out {here / 'card.html'}",
        )  # fmt: skip
        said = {}
        for line in lines:
            code, _, error = run(*line.split(), *(["-q"] if quiet else []))
            assert code == 0, error
            said[line.split()[0]] = said.get(line.split()[0], "") + error
        return said

    loud = steps(False)
    for command, bars in {
        "fit": ("drawing", "features", "fit"), "evaluate": ("evaluate", "page"), "predict": ("predict",),
        "prepare": ("drawing", "preparing", "verifying"), "inspect": ("drawing", "images"),
    }.items():  # fmt: skip
        for bar in bars:
            assert re.search(rf"^{bar}: .*\d/\d.* \[.*<.*/s", loud[command], flags=re.M), (command, bar, loud[command])
    assert steps(True) == dict.fromkeys(loud, "")


def test_a_log_gets_no_bars(run: Run, tmp_path: Path) -> None:
    code, _, error = run(
        *f"prepare phantom {tmp_path / 'shards'} reader.root={tmp_path / 'data'} reader.studies=8 reader.size=32".split(),
        "--size", "32", "--workers", "1",
    )  # fmt: skip
    assert code == 0 and not error


def test_the_doctor_says_what_mends(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, out, _ = run("doctor")
    assert code == 0 and "selective scan, torch: runs here" in out and "torch: 2" in out
    for package, (_, _, mend) in summary.PACKAGES.items():
        assert re.search(rf"^{package}: (installed|\d|missing: .*{re.escape(mend)})", out, flags=re.M), package
    for name in ("GPU", "bfloat16", "threads", "memory", "disk of runs", "disk of the cache", "java", "SmolLM2-135M"):
        assert re.search(rf"^{name}: ", out, flags=re.M), name
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(summary, "LEAST_DISK", 2**60)
    checks = {check["name"]: check for check in json.loads(run("doctor", "--json")[1])["checks"]}
    missing = {name for name, check in checks.items() if check["state"] == "missing"}
    assert missing >= {*summary.PACKAGES, "java", "METEOR", "SmolLM2-135M"} and checks["disk of runs"]["state"] == "slow"
    for name in missing - {"triton"}:
        assert checks[name]["mend"] and checks[name]["mend"] not in checks[name]["found"], checks[name]
    small = next(line for line in run("doctor")[1].splitlines() if line.startswith("SmolLM2"))
    assert small.count("missing") == small.count("pip install") == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_understood(name: str) -> None:
    """Each command's help has an example whose options and settings are known."""
    lines = re.findall(r"(?:^ *|: )medxray (\S.*)$", COMMANDS[name].help or "", flags=re.M)
    assert lines, name
    for command, *rest in map(shlex.split, lines):
        given = COMMANDS[command].make_context(command, rest).params
        assert all("=" in setting for setting in given.get("settings") or ()), rest


def completed(typed: str) -> list[str]:
    environment = {
        "_MEDXRAY_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split(" ")) - 1),
    }  # fmt: skip
    return CliRunner().invoke(app, env=environment, prog_name="medxray").stdout.split()


def test_a_shell_completes_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/one", "runs/two", "runs/no-run"):
        (tmp_path / folder).mkdir(parents=True)
    for folder in ("runs/one", "runs/two"):
        (tmp_path / folder / "spec.yaml").touch()
    assert completed("medxray evaluate runs/") == ["runs/one", "runs/two"]
    assert completed("medxray evaluate hd-mae-p") == ["hd-mae-phantom"]
    assert completed("medxray fit hd-mae-") == [name for name in packaged() if name.startswith("hd-mae-")]
    assert completed("medxray inspect dicom") == ["dicom-folder"]
    assert completed("medxray list enc") == ["encoder"]
    assert completed("medxray list encoder vm") == ["vmamba"]
    assert completed("medxray predict x y --format dic") == ["dicom-sr"]
    scores = [name for name in registry_of("metrics").names() if name.startswith("rouge")]
    assert completed("medxray score t.csv --metrics bleu,rou") == [f"bleu,{name}" for name in scores]


def test_a_shell_learns_to_complete(tmp_path: Path) -> None:
    """bash has what it needs after --install-completion."""
    environment = os.environ | {"HOME": str(tmp_path), "SHELL": "/bin/bash", "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    script = Path(sys.executable).parent / "medxray"
    for option in ("--install-completion", "--show-completion"):
        found = subprocess.run([script, option, "bash"], env=environment, capture_output=True, text=True)
        assert found.returncode == 0, found.stderr
    assert "complete_bash" in found.stdout
    (written,) = [path for path in tmp_path.rglob("*.sh") if "complete_bash" in path.read_text()]
    assert str(written) in (tmp_path / ".bashrc").read_text()
    ask = f"source {written}; COMP_WORDS=(medxray eval); COMP_CWORD=1; _medxray_completion medxray; echo ${{COMPREPLY[@]}}"
    environment |= {"PATH": f"{script.parent}:{os.environ['PATH']}"}
    assert subprocess.run(["bash", "-c", ask], env=environment, capture_output=True, text=True).stdout == "evaluate\n"


def test_a_reader_that_leaves_early_is_no_failure() -> None:
    shown = subprocess.run(["bash", "-c", f"{sys.executable} -m medxray.cli list specs | true"], capture_output=True, text=True)
    assert shown.returncode == 0 and not shown.stderr


@pytest.mark.parametrize("arguments", [["predict", "runs/x", ""], ["fit", ""], ["score", "t.csv", "--prediction", ""]])
def test_an_empty_argument_is_not_this_folder(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["medxray", *arguments])
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True))
    with pytest.raises(SystemExit, match="2"):
        main()
    assert sys.stderr.buffer.getvalue().startswith(b"medxray: an argument is empty")


def test_a_terminal_without_a_sign_shows_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    rows = "".join(f"s{i},the lungs are clear and quiet,the lungs are hazy,the lungs are clear and quiet\n" for i in range(9))
    table.write_text(f"study_id,good,bad,report\n{rows}")
    bad = tmp_path / "bad.csv"
    bad.write_text(table.read_text().replace("study_id,good,bad", "study_id,bad,good"))
    arguments = ["compare", f"a={bad}", f"b={table}", "--prediction", "good", "--reference", "report", "--metrics", "rouge-l"]
    monkeypatch.setattr(sys, "argv", ["medxray", *arguments])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True))
    with pytest.raises(SystemExit, match="0"):
        main()
    assert b"? better" in sys.stdout.buffer.getvalue()


FULL = [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 20 GiB"), OSError(28, "No space left on device", "x")]


@pytest.mark.parametrize("error", FULL)
def test_a_full_machine_is_told_in_one_line(error: Exception, run: Run, spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("medxray.build", full, raising=False)
    code, out, said = run("fit", spec)
    assert code == 2 and not out and said.startswith("medxray: ") and said.count("\n") == 1
    # Any other failure is ours, and shows where it is.
    error = RuntimeError("a mistake of ours")
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        run("fit", spec)


def test_an_interrupt_is_one_line(spec: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "medxray.cli", "fit", str(spec), "training.steps=100000", f"output={tmp_path / 'run'}"]
    # What a shell starts in the background ignores the signal, and so would what that starts.
    heard = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=heard)
    while not (tmp_path / "run" / "log.jsonl").is_file():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.splitlines()[-1] == "medxray: interrupted; run the same command again to go on" and "Traceback" not in error
