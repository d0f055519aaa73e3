"""The model card of a run folder: what is there is told, what is missing is said, nothing of a patient gets out."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from typer.testing import CliRunner

from medxray.cli import app
from medxray.model_card import model_card, write_card
from medxray.spec import Spec
from medxray.types import RunError, Score, Scores, SpecError

SECRETS = ("patient-77", "study-77", "/hospital", "secret-folder", "key.bin")
FACTS = {
    "parameters": {"encoder": {"all": 85_000_000, "trained": 0}, "decoder": {"all": 1_200_000, "trained": 1_200_000}},
    "splits": {
        "train": {"studies": 300, "patients": 210, "images": 420},
        "val": {"studies": 40, "patients": 30, "images": 55},
        "test": {"studies": 60, "patients": 41, "images": 80},
    },
    "labels": {"Edema": {"train": [30, 270], "val": [4, 36], "test": [0, 60]}},
    "attributes": {"sex": {"female": 150, "male": 140, "": 10}, "manufacturer": {"Philips": 300}},
}
SKIPPED = [
    {"study": "study-77", "file": "", "reason": "no word in the report"},
    {"study": "study-78", "file": "", "reason": "no word in the report"},
    {"study": "study-77", "file": "p1/patient-77.png", "reason": "/hospital/p1/patient-77.png: truncated after 77 bytes"},
]


def score(value: float, low: float, high: float) -> Score:
    return Score(value, low, high, 60)


def scores() -> Scores:
    own = {"bleu-4": score(0.12, 0.1, 0.14), "cider": score(0.3, 0.2, 0.4), "edema": score(*[float("nan")] * 3)}
    floor = {"bleu-4": score(0.11, 0.09, 0.13), "cider": score(0.5, 0.4, 0.6)}
    notes = [
        "split: test; 41 patients",
        "Warning: below best constant report: cider -0.200 (-0.300 to -0.100)",
        "12% of the predictions are distinct (references 90%); the most frequent one is given to 60% of the studies",
        "Warning: the model says the same of most studies; its scores tell little of the images",
    ]
    by = {"sex": {"female": {"bleu-4": score(0.1, 0.08, 0.12)}, "male": {"bleu-4": score(0.14, 0.12, 0.16)}}}
    protocol = "r2gen: references cleaned by r2gen-iu, cut after 60 tokens"
    return Scores(own, {"best constant report": floor}, notes, "r2gen-iu-xray", by, protocol)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "secret-folder" / "run"
    folder.mkdir(parents=True)
    spec = Spec.read("r2gencsr-iu-xray", ["data.reader.root=/hospital/secret-folder", f"output={folder}", "seed=7"])
    (folder / "spec.yaml").write_text(spec.to_yaml())
    (folder / "task.json").write_text('{"labels": ["Edema"], "views": 2}')
    (folder / "references.json").write_text('{"/hospital/secret-folder/llama": "ab12", "Qwen/Qwen1.5-1.8B-Chat": "cd34"}')
    packages = {"medxray": "0.1.0", "torch": "2.13.0"}
    environment = {"python": "3.11", "device": "cpu", "packages": packages, "names": "key.bin"}
    (folder / "environment.json").write_text(json.dumps(environment))
    save_file({"projector.linear.weight": torch.zeros(8, 4), "bank.features": torch.zeros(3)}, folder / "model.safetensors")
    (folder / "log.jsonl").write_text('{"step": 10, "loss": 2.0}\n{"step": 20, "eval_loss": 1.5}\n')
    (folder / "facts.json").write_text(json.dumps(FACTS))
    (folder / "skipped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SKIPPED))
    (folder / "scores.json").write_text(json.dumps(scores().to_dict()))
    return folder


def parts(text: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The header, and heading -> text."""
    _, header, body = text.split("---\n", 2)
    _, *sections = body.split("\n## ")
    return yaml.safe_load(header), dict(section.split("\n", 1) for section in sections)


def flat(text: str) -> str:
    return " ".join(text.split())


def test_the_header_is_that_of_the_hub(run: Path) -> None:
    header, _ = parts(model_card(run))
    assert header["library_name"] == "medxray" and header["license"] == "unknown"
    assert header["pipeline_tag"] == "image-to-text" and "chest-x-ray" in header["tags"]
    (result,) = header["model-index"][0]["results"]
    assert result["dataset"] == {"name": "iu-xray", "type": "iu-xray"}
    told = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert told == {"bleu-4": 0.12, "cider": 0.3}, "what is undefined has no number"
    assert header["metrics"] == ["bleu-4", "cider"]
    assert parts(model_card(run, license="mit"))[0]["license"] == "mit"


def test_everything_of_the_run_is_told(run: Path) -> None:
    _, found = parts(model_card(run))
    assert list(found) == [
        "Model", "Intended use", "Data", "Training", "Scores", "Subgroups", "Calibration and thresholds", "Limits", "How to use",
        "Environment",
    ]  # fmt: skip
    assert "| encoder | `vmamba` | 85,000,000 | 0 |" in found["Model"] and "| all |  | 86,200,000 | 1,200,000 |" in found["Model"]
    assert "Qwen/Qwen1.5-1.8B-Chat" in found["Model"]
    assert "| train | 300 | 210 | 420 |" in found["Data"]
    assert "2: no word in the report" in found["Data"] and "1: truncated after N bytes" in found["Data"]
    assert "| Edema | 30 of 300 | 4 of 40 | 0 of 60 |" in found["Data"]
    assert "| epochs | 25 |" in found["Training"] and "| seed | 7 |" in found["Training"] and "20 steps" in found["Training"]
    assert "Protocol r2gen: references cleaned by r2gen-iu, cut after 60 tokens." in flat(found["Scores"])
    assert "| bleu-4 | 0.120 (0.100-0.140) | 0.110 (0.090-0.130) |" in found["Scores"]
    assert "| edema | undefined |  |" in found["Scores"]
    assert "| female | 60 | 0.100 (0.080-0.120) |" in found["Subgroups"]
    assert "Not measured" in found["Calibration and thresholds"]
    assert "torch 2.13.0" in flat(found["Environment"])
    assert 'medxray.load("FOLDER")' in found["How to use"]


def test_limits_are_those_of_the_run(run: Path) -> None:
    limits = flat(parts(model_card(run))[1]["Limits"])
    for told in (
        "Research use only", "one data set (`iu-xray`)", "210 patients", "Below best constant report: cider -0.200",
        "12% of the predictions are distinct", "says the same of most studies", "edema is undefined",
        "lowest for sex female: 0.100 (0.080-0.120)", "One seed", "Edema: no study of test has it",
        "of manufacturer only Philips",
    ):
        assert told in limits, told  # fmt: skip


def test_nothing_of_a_patient_or_a_place_gets_out(run: Path) -> None:
    text = model_card(run)
    assert not [secret for secret in SECRETS if secret in text]
    assert str(run.parent) not in text


@pytest.mark.parametrize(
    ("file", "section", "told"),
    [
        ("scores.json", "Scores", "Not evaluated yet"),
        ("facts.json", "Data", "not recorded in this run folder"),
        ("facts.json", "Model", "32 in model.safetensors"),
        ("skipped.jsonl", "Data", "Nothing was left out"),
        ("environment.json", "Environment", "not recorded in this run folder"),
        ("log.jsonl", "Training", "no log"),
        ("model.safetensors", "How to use", "not finished"),
    ],
)
def test_what_is_missing_is_said(file: str, section: str, told: str, run: Path) -> None:
    (run / file).unlink()
    header, found = parts(model_card(run))
    assert told in flat(found[section]), found[section]
    assert ("model-index" in header) == (file != "scores.json")


def test_calibration_and_small_groups(run: Path) -> None:
    data = scores()
    data.scores |= {"ece": score(0.05, 0.04, 0.06), "brier": score(0.1, 0.09, 0.11), "f1/Edema": score(0.4, 0.3, 0.5)}
    data.notes.append("f1: a label is said to be there from the score that is best for it on the validation studies: Edema 0.31")
    data.subgroups["sex"]["other"] = {"bleu-4": Score(*[float("nan")] * 3, 4)}
    (run / "scores.json").write_text(json.dumps(data.to_dict()))
    _, found = parts(model_card(run))
    told = flat(found["Calibration and thresholds"])
    assert "| ece | 0.050 (0.040-0.060) |" in told and "| brier |" in told and "Edema 0.31" in told
    assert "| f1/Edema | 0.400 (0.300-0.500) |" in found["Scores"].partition("By label")[2]
    assert "Not scored by sex, for want of studies: other (4 studies)." in flat(found["Subgroups"])
    assert "| other |" not in found["Subgroups"]


def test_no_subgroups(run: Path) -> None:
    data = scores().to_dict()
    (run / "scores.json").write_text(json.dumps({**data, "subgroups": {}}))
    assert "not scored" in parts(model_card(run))[1]["Subgroups"]
    del data["subgroups"], data["protocol"]
    (run / "scores.json").write_text(json.dumps(data))
    assert "The protocol is not recorded" in flat(parts(model_card(run))[1]["Scores"])


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(RunError, match=r"is no run folder: spec.yaml is missing \(found: notes.txt\)"):
        model_card(tmp_path)
    with pytest.raises(RunError, match=r"is no run folder: .*no such folder"):
        model_card(tmp_path / "none")
    done = CliRunner().invoke(app, ["card", str(tmp_path)])
    assert done.exit_code == 2 and "is no run folder" in done.output


@pytest.mark.parametrize("file", ["scores.json", "facts.json", "log.jsonl"])
def test_a_damaged_file(file: str, run: Path) -> None:
    (run / file).write_text("{half")
    with pytest.raises(RunError, match=rf"{file} cannot be read .*; "):
        model_card(run)


def test_on_the_command_line(run: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["card", str(run)])
    assert done.exit_code == 0, done.output
    assert (run / "README.md").read_text() == model_card(run)
    assert CliRunner().invoke(app, ["card", str(run)]).exit_code == 0, "its own card is replaced"
    (run / "README.md").write_text("# Mine\n")
    done = CliRunner().invoke(app, ["card", str(run)])
    assert done.exit_code == 2 and "was not written by medxray" in done.output
    page = tmp_path / "card.html"
    done = CliRunner().invoke(app, ["card", str(run), "--out", str(page)])
    assert done.exit_code == 0, done.output
    html = page.read_text()
    assert "<details><summary>The whole spec" in html and "<table>" in html
    assert "<script" not in html and "library_name" not in html
    assert not [secret for secret in SECRETS if secret in html]
    done = CliRunner().invoke(app, ["card", str(run), "--out", str(tmp_path / "a" / "README.md")])
    assert done.exit_code == 0 and (tmp_path / "a" / "README.md").is_file()
    done = CliRunner().invoke(app, ["card", str(run), "--out", str(page / "card.md")])
    assert done.exit_code == 2 and "card.md" in done.output


def test_words_of_the_run_do_not_break_the_page(run: Path) -> None:
    data = scores()
    data.notes.append("Warning: <script>alert(1)</script> | pipe")
    (run / "scores.json").write_text(json.dumps(data.to_dict()))
    write_card(run, run / "card.html")
    assert "<script" not in (run / "card.html").read_text()


def test_it_is_fast(run: Path) -> None:
    model_card(run)
    begin = time.perf_counter()
    model_card(run)
    assert time.perf_counter() - begin < 2


def test_licence_is_one_word(run: Path) -> None:
    with pytest.raises(SpecError, match="license: expected"):
        model_card(run, license="mine\nlibrary_name: other")
