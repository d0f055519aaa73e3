"""What a run tells of its reports: context and how near it is, words and their probability, attention on the views."""

import copy
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from torch.nn import functional as F

import medxray

LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CAUSAL = {"name": "causal-lm", "trainable": True, "vocabulary": 300, "prompt": "bare", "config": LLAMA}
R2GEN = {"name": "memory-transformer", "width": 32, "hidden": 32, "heads": 2, "layers": 1, "threshold": 2}


def fitted(root: Path, folder: Path, **overrides: Any) -> medxray.Pipeline:
    spec = {
        "task": "report",
        "output": str(folder),
        "data": {
            "image_size": 64, "max_studies": 40, "views": "average", "max_views": 2,
            "reader": {"name": "csv", "root": str(root), "report": "findings"},
        },
        "encoder": {"name": "vit", "width": 32, "depth": 1, "heads": 2, "patch": 16},
        "retriever": {"name": "nearest", "positives": 2, "negatives": 1},
        "decoder": CAUSAL,
        "training": {"steps": 2, "batch_size": 8, "learning_rate": 3e-3},
        "generation": {"max_new_tokens": 12, "batch_size": 16},
        "metrics": ["bleu"],
    }  # fmt: skip
    return medxray.build(medxray.Spec.read(spec, overrides)).fit(progress=False)


def cards(pipeline: medxray.Pipeline, rows: list[int]) -> list[Any]:
    images = pipeline.images("val").still(rows)
    with torch.no_grad():
        predictions = [p for batch in images.batches(2) for p in pipeline.task.predict(batch)]
    return list(pipeline.task.cards(images, predictions, pipeline.images("train").still(), range(len(rows))))


@pytest.fixture(scope="module")
def averaged(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> medxray.Pipeline:
    return fitted(phantom, tmp_path_factory.mktemp("explained") / "run")


def test_the_run_folder_tells_of_words_and_context(averaged: medxray.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medxray.pipeline.CARDS", 2)
    averaged.evaluate("val")
    rows = parquet.read_table(averaged.folder / "predictions.parquet").to_pylist()
    assert any(row["words"] for row in rows)
    for row in rows:
        assert row["words"] == row["text"].split()
        assert all(0 < p <= 1 for p in row["word_probabilities"])
        assert len(row["similarity_positive"]) == 2 and len(row["similarity_negative"]) == 1
    page = (averaged.folder / "report.html").read_text(encoding="utf-8")
    # Every study has a card, and so many of them, which cost a pass each, maps and words.
    lines = [line for line in page.splitlines() if 'type="text/html" id="s' in line]
    assert len(lines) == len(rows) > 2
    assert sum('class="heat"' in line for line in lines) == sum('class="word w0"' in line for line in lines) == 2
    assert all('class="context"' in line and "data-score=" in line for line in lines)


def test_words_of_a_notebook_user_have_the_tokens_probabilities(averaged: medxray.Pipeline, phantom: Path) -> None:
    files = sorted((phantom / "images").rglob("*.png"))[:2]
    prediction = averaged.predict(files)[0]
    assert "".join(prediction.tokens) == prediction.text
    assert [word.text for word in prediction.words] == prediction.text.split()
    spoken = [lp for token, lp in zip(prediction.tokens, prediction.log_probabilities, strict=True) if token.strip()]
    assert math.isclose(sum(math.log(w.probability) for w in prediction.words), sum(spoken), abs_tol=1e-4)


def test_nearness_is_the_cosine_of_pooled_features(averaged: medxray.Pipeline) -> None:
    images, bank = averaged.images("val"), averaged.task.bank
    batch = next(images.batches(1))
    with torch.no_grad():
        pooled = averaged.task.study_features(batch).pooled
        (prediction,) = averaged.task.predict(batch)
    near = F.cosine_similarity(pooled, bank.features.float())
    for pool, names in prediction.context.items():
        expected = [float(near[bank.study_ids.index(name)]) for name in names]
        assert prediction.similarity[pool] == pytest.approx(expected, abs=1e-5)


def test_averaged_views_share_one_map_and_say_so(averaged: medxray.Pipeline) -> None:
    views = averaged.images("val").views
    rows = [next(i for i, v in enumerate(views) if len(v) == n) for n in sorted({len(v) for v in views})]
    for row, card in zip(rows, cards(averaged, rows), strict=True):
        words = len(card.prediction.split())
        assert [m.shape for m in card.attention] == [(words, 4, 4)] * len(views[row])
        np.testing.assert_allclose(sum(m.sum((1, 2)) for m in card.attention), 1, rtol=1e-4)
        assert ("averaged" in card.remark) == (len(views[row]) > 1)
        assert len(card.confidence) == words and card.context[0].similarity is not None


@pytest.mark.parametrize("decoder", [CAUSAL, R2GEN], ids=["causal-lm", "memory-transformer"])
def test_concatenated_views_have_maps_of_their_own(decoder: dict[str, Any], phantom: Path, tmp_path: Path) -> None:
    pipeline = fitted(phantom, tmp_path / "run", data={"views": "concatenate"}, decoder=decoder, retriever=None)
    views = pipeline.images("val").views
    (card,) = cards(pipeline, [next(i for i, v in enumerate(views) if len(v) == 2)])
    first, second = card.attention
    assert first.shape == second.shape == (len(card.prediction.split()), 4, 4) and card.remark == ""
    np.testing.assert_allclose(first.sum((1, 2)) + second.sum((1, 2)), 1, rtol=1e-4)
    assert card.prediction and not np.allclose(first, second) and not card.context


def test_tokens_that_are_no_map_are_told(averaged: medxray.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(averaged.task.projector, "grid", lambda grid: None)
    (card,) = cards(averaged, [0])
    assert card.attention == [] and re.search("no map of the image", card.remark)


def test_looking_changes_no_later_report(averaged: medxray.Pipeline) -> None:
    batch = next(averaged.images("val").batches(2))
    with torch.no_grad():
        before = [p.log_probabilities for p in averaged.task.predict(copy.copy(batch))]
        cards(averaged, [0, 1])
        assert [p.log_probabilities for p in averaged.task.predict(copy.copy(batch))] == before
