"""A report run judged: both protocols, floors, the checkpoint that a sum of metrics picks, and the model card."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import parquet
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from safetensors.torch import load_file
from typer.testing import CliRunner

import medxray
import medxray.pipeline
from medxray.cli import app
from medxray.metrics.intervals import difference
from medxray.metrics.text import Bleu as OwnBleu
from medxray.metrics.text import best_constant
from medxray.pipeline import Pipeline
from medxray.types import SpecError

LENGTH = 12


def spec(root: Path, folder: Path, **overrides: Any) -> dict[str, Any]:
    return {
        "task": "report",
        "output": str(folder),
        "data": {"image_size": 64, "reader": {"name": "csv", "root": str(root), "report": "findings"}, "max_studies": 32},
        "encoder": {"name": "vit", "width": 16, "depth": 1, "heads": 1, "patch": 32},
        "decoder": {
            "name": "memory-transformer", "width": 16, "hidden": 16, "heads": 1, "layers": 1, "slots": 1,
            "threshold": 10, "max_length": LENGTH,
        },
        "training": {"steps": 12, "batch_size": 16, "learning_rate": 5e-3},
        "generation": {"max_new_tokens": 30, "batch_size": 32},
        "metrics": ["bleu", "rouge-l", "cider"],
        **overrides,
    }  # fmt: skip


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, phantom: Path) -> Pipeline:
    return medxray.build(spec(phantom, tmp_path_factory.mktemp("protocols") / "run")).fit(progress=False)


def caption_scores(predictions: list[str], references: list[str]) -> dict[str, float]:
    made, wanted = ({i: [text] for i, text in enumerate(texts)} for texts in (predictions, references))
    bleu = Bleu(4).compute_score(wanted, made, verbose=0)[0]
    named = {f"bleu-{n + 1}": value for n, value in enumerate(bleu)}
    return named | {"rouge-l": Rouge().compute_score(wanted, made)[0], "cider": Cider().compute_score(wanted, made)[0]}


def test_both_protocols_are_what_they_say(fitted: Pipeline) -> None:
    """R2Gen's references are its tokenizer's ids, cut, decoded: composed here from the run's own vocabulary file."""
    whole = fitted.evaluate("val", progress=False)
    first = json.loads((fitted.folder / "scores.json").read_text())
    cut = fitted.evaluate("val", protocol="r2gen", progress=False)
    known = set(json.loads((fitted.folder / "vocabulary.json").read_text()))
    references = list(fitted.studies.splits["val"]["report"])
    read = [" ".join(w if w in known else "<unk>" for w in text.split()[: LENGTH - 1]) for text in references]
    assert any("<unk>" in text for text in read) and any(len(text.split()) > LENGTH for text in references)
    rows = parquet.read_table(fitted.folder / "predictions.parquet").to_pylist()
    assert [row["reference"] for row in rows] == read
    predictions = [row["text"] for row in rows]
    for scores, wanted in ((whole, references), (cut, read)):
        for name, value in caption_scores(predictions, wanted).items():
            assert scores[name].value == pytest.approx(value, abs=1e-9), name
    assert whole["bleu-1"].value != cut["bleu-1"].value
    assert whole.protocol == first["protocol"] == "full: references cleaned by r2gen-iu, whole"
    assert cut.protocol == (
        f"r2gen: references cleaned by r2gen-iu, cut after {LENGTH - 1} words, words that it does not know as <unk>"
    )
    assert f"protocol {cut.protocol}" in " ".join(str(cut).replace("\n ", "").split())
    assert cut.protocol in (fitted.folder / "report.html").read_text().replace("&lt;", "<").replace("&gt;", ">")


def test_floors_stand_beside_every_table(fitted: Pipeline) -> None:
    scores = fitted.evaluate("val", progress=False)
    train, val = (list(fitted.studies.splits[split]["report"]) for split in ("train", "val"))
    assert list(scores.comparisons) == ["best constant report", "most frequent report", "nearest image's report"]
    for row in scores.comparisons.values():
        assert list(row) == list(scores) and all(score.low <= score.value <= score.high for score in row.values())
    # Each metric's own: no other constant does better by it.
    constants = [caption_scores([text] * len(val), val) for text in dict.fromkeys(train)]
    for name, score in scores.comparisons["best constant report"].items():
        best = max(values[name] for values in constants)
        assert score.value == pytest.approx(best, abs=1e-9), name
    texts = [row["text"] for row in parquet.read_table(fitted.folder / "predictions.parquet").to_pylist()]
    groups = list(fitted.studies.splits["val"]["patient_id"])
    made = [best_constant(train, val, "bleu-1")] * len(val)
    apart = difference(OwnBleu(), texts, made, val, groups, seed=fitted.spec.seed)["bleu-1"]
    told = f"bleu-1 {apart.value:+.3f} ({apart.low:+.3f} to {apart.high:+.3f})"
    (line,) = [note for note in scores.notes if told in note]
    verdict = "above" if apart.low > 0 else "Warning: below" if apart.high < 0 else "Warning: no clear difference from"
    assert line.startswith(f"{verdict} best constant report: ")
    assert any(f"{len(set(texts)) / len(texts):.0%} of the predictions are distinct (nearest" in note for note in scores.notes)
    assert max(len(line) for line in str(scores).splitlines()) <= 100


def test_protocol_on_the_command_line(fitted: Pipeline) -> None:
    done = CliRunner().invoke(app, ["evaluate", str(fitted.folder), "--split", "val", "--protocol", "r2gen", "--quiet"])
    assert done.exit_code == 0 and "protocol r2gen: references cleaned by r2gen-iu, cut after" in done.output, done.output
    done = CliRunner().invoke(app, ["evaluate", str(fitted.folder), "--protocol", "r2gem", "--quiet"])
    assert done.exit_code == 2 and "no 'r2gem'; did you mean 'r2gen'" in done.output


def test_a_spec_names_the_protocol(fitted: Pipeline, phantom: Path, tmp_path: Path) -> None:
    training = {"steps": 1, "batch_size": 16, "select": "bleu-1", "validation_studies": 6}
    pipeline = medxray.build(spec(phantom, tmp_path / "run", protocol="r2gen", training=training)).fit(progress=False)
    assert pipeline.evaluate("val", progress=False).protocol.startswith("r2gen: ")
    # The validation of the fit goes by it too.
    val = pipeline.images("val").still(range(6))
    predictions = pipeline._predict_all(pipeline.task.predict, val, "", False)
    assert isinstance(pipeline.task, medxray.Task)
    wanted = pipeline.task.as_scored(pipeline.task.targets(val), "r2gen")[0]
    logged = [json.loads(line) for line in (pipeline.folder / "log.jsonl").read_text().splitlines()]
    value = caption_scores([p.text for p in predictions], wanted)["bleu-1"]
    assert [row["eval_bleu-1"] for row in logged if "eval_bleu-1" in row] == [pytest.approx(value, abs=1e-9)]
    with pytest.raises(SpecError, match=r"protocol: .*'full'"):
        medxray.build(spec(phantom, tmp_path / "run", protocol="whole"))
    with pytest.raises(SpecError, match="protocol: not used by task 'classify'"):
        medxray.Spec.read("classify-phantom", ["protocol=full"])


def test_a_sum_of_metrics_picks_its_checkpoint(phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """BLEU-4 and CIDEr, told for three validations, disagree; the weights kept are those of the best sum."""
    told = iter([{"bleu-4": 0.4, "cider": 0.1}, {"bleu-4": 0.3, "cider": 0.5}, {"bleu-4": 0.1, "cider": 0.6}])
    real = medxray.pipeline.score_all

    def score_all(*arguments: Any, **named: Any) -> Any:
        found, values = real(*arguments, **named), next(told)
        return found | {name: medxray.types.Score(value, value, value, 1) for name, value in values.items()}

    monkeypatch.setattr(medxray.pipeline, "score_all", score_all)
    training = {"steps": 3, "batch_size": 16, "evaluate_steps": 1, "save_steps": 1, "keep_checkpoints": 3,
                "select": "0.5 bleu-4 + 0.5 cider", "validation_studies": 4}  # fmt: skip
    folder = tmp_path / "run"
    medxray.build(spec(phantom, folder, training=training)).fit(progress=False)
    kept = load_file(folder / "model.safetensors")
    same = [
        all(torch.equal(tensor, kept[name]) for name, tensor in load_file(step / "model.safetensors").items())
        for step in sorted((folder / "checkpoints").glob("step-*"))
    ]
    assert same == [False, True, False]


def test_the_card_of_a_real_run(fitted: Pipeline, phantom: Path) -> None:
    scores = fitted.evaluate("val", progress=False)
    text = fitted.card().read_text()
    counts = {split: rows for split, rows in fitted.studies.splits.items() if len(rows)}
    for split, rows in counts.items():
        images = sum(map(len, rows["images"]))
        assert f"| {split} | {len(rows)} | {len(set(rows['patient_id']))} | {images} |" in text
    total = sum(parameter.numel() for parameter in fitted.task.parameters())
    assert f"| all |  | {total:,} | {total:,} |" in text
    assert f"| bleu-4 | {scores['bleu-4']} | {scores.comparisons['best constant report']['bleu-4']} |" in text
    assert f"Protocol {scores.protocol}" in text.replace("&lt;", "<").replace("&gt;", ">")
    assert "The scores are of split val" in text and "12 steps were taken" in text
    ids = {name for rows in counts.values() for column in ("study_id", "patient_id") for name in rows[column]}
    words = set(text.replace("`", " ").split())
    assert not ids & words and str(phantom) not in text and str(fitted.folder.parent) not in text
    copy = fitted.save(fitted.folder.parent / "copy")
    told = medxray.load(copy).card().read_text()
    assert "There is no log" in told and f"| all |  | {total:,} |" in told and f"| bleu-4 | {scores['bleu-4']} |" in told
