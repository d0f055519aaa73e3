"""A pipeline as its users write it: swapping encoders, bringing one's own, saving, loading, predicting."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import medxray
from medxray.types import DataError, RunError, SpecError, WeightsError

DECODER = {
    "name": "causal-lm", "trainable": True, "vocabulary": 300, "words": True, "prompt": "r2gengpt",
    "config": {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
}  # fmt: skip


def spec(root: Path, folder: Path, **overrides: Any) -> dict[str, Any]:
    return {
        "task": "report",
        "output": str(folder),
        "data": {
            "image_size": 64,
            "reader": {"name": "csv", "root": str(root), "report": "findings"},
            "max_studies": 40,
        },
        "encoder": {"name": "vit", "width": 32, "depth": 1, "heads": 2, "patch": 16},
        "retriever": {"name": "nearest", "positives": 2, "negatives": 1},
        "decoder": DECODER,
        "training": {"steps": 6, "batch_size": 8, "learning_rate": 3e-3},
        "generation": {"max_new_tokens": 12, "batch_size": 16},
        "metrics": ["bleu", "finding-f1"],
        **overrides,
    }


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, phantom: Path) -> medxray.Pipeline:
    return medxray.build(spec(phantom, tmp_path_factory.mktemp("fitted") / "run")).fit(progress=False)


@pytest.mark.parametrize(
    "encoder",
    [["encoder.name=vit"], ["encoder.name=vmamba"], ["encoder.name=timm", "encoder.model=test_resnet"],
     ["encoder.name=transformers"]],
    ids=lambda e: e[0].partition("=")[2],
)  # fmt: skip
def test_an_encoder_is_swapped_by_its_name_alone(encoder: list[str], phantom: Path, tmp_path: Path) -> None:
    base = medxray.Spec.read(spec(phantom, tmp_path / "run"), ["training.steps=2"])
    pipeline = medxray.build(base, encoder).fit(progress=False)
    image = next((phantom / "images").rglob("*.png"))
    assert isinstance(pipeline.predict(image).text, str)
    assert pipeline.predict([image])[0].text == pipeline.predict(image).text


def test_a_new_process_and_another_batch_size_say_the_same(fitted: medxray.Pipeline, phantom: Path) -> None:
    files = [str(p) for p in sorted((phantom / "images").rglob("*.png"))[:17]]
    sixteen = [p.text for p in fitted.predict(files)]
    assert any(sixteen)
    fitted.spec.generation.batch_size = 1
    assert [p.text for p in fitted.predict(files)] == sixteen
    fitted.spec.generation.batch_size = 16
    code = (
        "import json, sys, medxray; p = medxray.load(sys.argv[1]); "
        "print(json.dumps([r.text for r in p.predict(sys.argv[2:])]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(fitted.folder), *files], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == sixteen


def test_evaluation_has_floors_intervals_context_and_a_page(fitted: medxray.Pipeline) -> None:
    scores = fitted.evaluate("val", progress=False)
    assert {"best constant report", "most frequent report", "nearest image's report", "same model, context off"} == set(
        scores.comparisons
    )
    assert "distinct" in "".join(scores.notes)
    assert scores["bleu-4"].low <= scores["bleu-4"].value <= scores["bleu-4"].high
    page = (fitted.folder / "report.html").read_text()
    assert "most frequent report" in page and "not a medical device" in page.lower()
    patients = dict(zip(fitted.studies.splits["train"]["study_id"], fitted.studies.splits["train"]["patient_id"], strict=True))
    images = fitted.images("train").still(range(8))
    for prediction, own in zip(fitted._predict_all(fitted.task.predict, images, "", False), images.patient_ids, strict=True):
        context = [*prediction.context["positive"], *prediction.context["negative"]]
        assert len(context) == 3
        assert own not in {patients[name] for name in context}, "a patient is never their own context"


def test_what_predict_takes(fitted: medxray.Pipeline, phantom: Path) -> None:
    file = next((phantom / "images").rglob("*.png"))
    picture = Image.open(file)
    same = {fitted.predict(value).text for value in (file, str(file), picture, np.asarray(picture))}
    assert len(same) == 1
    study = fitted.predict((file, file))
    assert isinstance(study, medxray.Prediction)
    named = fitted.predict({"images": [file], "study_id": "mine", "patient_id": "p"})
    assert named.study_id == "mine" and len(named.log_probabilities) > 0
    with pytest.raises(RunError, match="not fitted yet"):
        medxray.build(spec(phantom, Path("runs/never"))).predict(file)


def test_own_encoder_three_ways(phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "own_encoder.py"))
    base = spec(phantom, tmp_path / "name", training={"steps": 2, "batch_size": 8})
    pipeline = medxray.build(base, {"encoder": {"name": "my-cnn", "width": 16}}).fit(progress=False)
    assert type(pipeline.task.encoder).__name__ == "MyCNN" and pipeline.task.encoder.width == 16
    module = example["MyCNN"](width=16).layers
    other = medxray.build({**base, "output": str(tmp_path / "instance")}, encoder=module).fit(progress=False)
    file = next((phantom / "images").rglob("*.png"))
    text = other.predict(file).text
    with pytest.raises(SpecError, match="hand it over again"):
        medxray.load(other.folder)
    again = medxray.load(other.folder, encoder=example["MyCNN"](width=16).layers)
    assert again.predict(file).text == text


def test_a_module_is_frozen_where_the_spec_says_so(phantom: Path, tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 16, 16), torch.nn.Conv2d(8, 8, 1))
    overrides = {"encoder": {"trainable": False}, "output": str(tmp_path / "frozen")}
    pipeline = medxray.build(spec(phantom, tmp_path / "x", training={"steps": 2, "batch_size": 8}), overrides, encoder=module)
    before = [p.clone() for p in module.parameters()]
    pipeline.fit(progress=False)
    assert pipeline.task.frozen_encoder and not any(p.requires_grad for p in module.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_a_run_feeds_the_next_and_frozen_features_are_computed_once(
    phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = spec(
        phantom, tmp_path / "pretrain", task="pretrain", metrics=["reconstruction"],
        training={"steps": 2, "batch_size": 8},
    )  # fmt: skip
    for key in ("retriever", "decoder", "generation"):
        base.pop(key)
    first = medxray.build(base).fit(progress=False)
    assert first.evaluate("val", progress=False)["reconstruction-error"].value > 0
    overrides = {"encoder": {"weights": str(first.folder), "trainable": False}, "output": str(tmp_path / "report")}
    second = medxray.build(spec(phantom, tmp_path / "report"), overrides)
    for a, b in zip(first.task.encoder.parameters(), second.task.encoder.parameters(), strict=True):
        assert torch.equal(a, b)
    seen = []
    forward = type(second.task.encoder).forward

    def counted(self: Any, images: torch.Tensor) -> medxray.Features:
        # The blank image that every encoder is tried on does not count.
        seen.append(int(images.flatten(1).any(1).sum()))
        return forward(self, images)

    monkeypatch.setattr(type(second.task.encoder), "forward", counted)
    second.fit(progress=False)
    once = sum(seen)
    studies = second.studies
    assert once <= studies.views * (len(studies.splits["train"]) + len(studies.splits["val"]))
    medxray.build(spec(phantom, tmp_path / "report2"), {**overrides, "output": str(tmp_path / "report2")}).fit(progress=False)
    assert sum(seen) == once, "another run of the same frozen encoder computes nothing anew"
    wrong = {"encoder": {"weights": str(first.folder), "width": 48}, "output": str(tmp_path / "x")}
    with pytest.raises(WeightsError, match=r"shapes that disagree .*is \(32,\) in the file and \(48,\) in the model"):
        medxray.build(spec(phantom, tmp_path / "x"), wrong).fit(progress=False)
    assert not (tmp_path / "x").exists()


def test_public_frozen_weights_are_named_not_copied(phantom: Path, tmp_path: Path, fitted: medxray.Pipeline) -> None:
    llm = tmp_path / "llm"
    fitted.task.decoder.copy_public(llm)
    frozen = {"name": "causal-lm", "model": str(llm), "prompt": "r2gengpt"}
    pipeline = medxray.build(spec(phantom, tmp_path / "run", decoder=frozen)).fit(progress=False)
    with safe_open(pipeline.folder / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if name.startswith("decoder.")]  # noqa: SIM118
    assert len(json.loads((pipeline.folder / "references.json").read_text())[str(llm)]) == 64
    image = next((phantom / "images").rglob("*.png"))
    text = pipeline.predict(image).text
    assert medxray.load(pipeline.save(tmp_path / "small")).predict(image).text == text
    whole = pipeline.save(tmp_path / "whole", complete=True)
    config = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    with pytest.raises(RunError, match="is not the one that this run was fitted with"):
        medxray.load(tmp_path / "small")
    assert medxray.load(whole).predict(image).text == text, "a complete copy needs nothing beside it"


def test_an_encoder_that_disagrees_with_what_it_declares(phantom: Path, tmp_path: Path) -> None:
    class Wrong(medxray.Encoder):
        width, stride = 8, 16

        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Conv2d(1, 4, 16, 16)

        def forward(self, images: torch.Tensor) -> medxray.Features:
            tokens = self.layer(images).flatten(2).transpose(1, 2)
            return medxray.Features(tokens, None, tokens.mean(1))

    with pytest.raises(SpecError, match=r"encoder Wrong: tokens of shape \(B, N, 8\) were expected .* found \(.*4\)"):
        medxray.build(spec(phantom, tmp_path / "run"), encoder=Wrong()).fit(progress=False)


def test_the_best_model_is_chosen_by_a_named_metric(phantom: Path, tmp_path: Path) -> None:
    base = spec(phantom, tmp_path / "run", training={"steps": 4, "batch_size": 8, "evaluate_steps": 2, "save_steps": 2})
    base["training"]["validation_studies"] = 4
    wrong = {**base, "training": {**base["training"], "select": "blue-4"}}
    with pytest.raises(SpecError, match=r"training\.select: .*'blue-4'; did you mean 'bleu-4'"):
        medxray.build(wrong).fit(progress=False)
    assert not (tmp_path / "run").exists()
    base["training"]["select"] = "bleu-1"
    medxray.build(base).fit(progress=False)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    values = {row["step"]: row["eval_bleu-1"] for row in rows if "eval_bleu-1" in row}
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000004" / "trainer_state.json").read_text())
    assert len(values) == 2 and state["best_metric"] == max(values.values())


def test_the_best_model_is_chosen_by_a_sum_of_metrics(phantom: Path, tmp_path: Path) -> None:
    training = {"steps": 2, "batch_size": 8, "validation_studies": 4, "select": "0.25 bleu-1 + 0.5*bleu-4"}
    medxray.build(spec(phantom, tmp_path / "run", training=training)).fit(progress=False)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if "eval_bleu-1" in row]
    assert row["eval_bleu-1"] > 0
    assert row[f"eval_{training['select']}"] == pytest.approx(0.25 * row["eval_bleu-1"] + 0.5 * row["eval_bleu-4"])
    mixed = {**training, "select": "bleu-1 + loss"}
    with pytest.raises(SpecError, match=r"training\.select: of bleu-1 and loss some are better when higher"):
        medxray.build(spec(phantom, tmp_path / "other", training=mixed)).fit(progress=False)


def test_ablations_can_be_left_out(fitted: medxray.Pipeline, phantom: Path) -> None:
    assert "same model, context off" not in fitted.evaluate("val", ablations=False, progress=False).comparisons


def test_studies_are_predicted_by_the_length_of_their_texts(
    fitted: medxray.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, task, seen = fitted.images("val"), fitted.task, list[str]()
    in_order = fitted._predict_all(task.predict, images, "", progress=False)
    rows = list(range(len(images)))
    monkeypatch.setattr(task.decoder, "reading_lengths", lambda texts, n: [-(i * 7 % n) for i in rows])

    def predict(batch: medxray.Batch) -> list[medxray.Prediction]:
        seen.extend(batch.study_ids)
        return task.predict(batch)

    assert [p.text for p in fitted._predict_all(predict, images, "", progress=False)] == [p.text for p in in_order]
    assert seen == [images.study_ids[i] for i in sorted(rows, key=lambda i: -(i * 7 % len(rows)))] != images.study_ids


def test_an_encoder_that_is_not_what_it_declares_leaves_nothing_behind(phantom: Path, tmp_path: Path) -> None:
    class Wrong(medxray.Encoder):
        def __init__(self, makes: int, takes: int = 16) -> None:
            super().__init__()
            self.width, self.stride = 8, 16
            self.layer = torch.nn.Conv2d(1, makes, takes, takes)

        def forward(self, images: torch.Tensor) -> medxray.Features:
            maps = self.layer(images)
            tokens = maps.flatten(2).transpose(1, 2)
            return medxray.Features(tokens, (maps.shape[2], maps.shape[3]), tokens.mean(1))

    for encoder, message in ((Wrong(4), r"\(B, N, 8\) were expected"), (Wrong(8, 99), "encoder Wrong fails on an image")):
        with pytest.raises(SpecError, match=message):
            medxray.build(spec(phantom, tmp_path / "run"), encoder=encoder).fit(progress=False)
        assert not (tmp_path / "run").exists()


def test_a_notebook_shows_a_pipeline_and_its_studies(fitted: medxray.Pipeline, phantom: Path) -> None:
    shown = fitted._repr_html_()
    assert "<th" in shown and "causal-lm" in shown and "loss" in shown and "</svg>" in shown
    assert "</svg>" not in medxray.build(spec(phantom, Path("runs/never")))._repr_html_()
    cards = fitted.cards([3, 0], "val")
    names = fitted.studies.splits["val"]["study_id"]
    assert [card.study_id for card in cards] == [names[3], names[0]]
    texts = [prediction.text for prediction in fitted._predict_all(fitted.task.predict, fitted.images("val"), "", False)]
    for card, row in zip(cards, (3, 0), strict=True):
        assert card.prediction == texts[row] and card.reference == fitted.images("val").reports[row]
        assert all(own.image is not None for own in card.context) and len(card.context) == 3
        assert card.attention and card.attention[0].shape[0] == len(card.prediction.split())
    count = len(names)
    with pytest.raises(DataError, match=f"{count} studies, 0 to {count - 1}; found {count}"):
        fitted.cards([0, count], "val")
    with pytest.raises(DataError, match="no split 'tset'; did you mean 'test'"):
        fitted.cards([0], "tset")
