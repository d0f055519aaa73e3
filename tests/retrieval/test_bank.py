"""The bank in a run: built, refreshed, saved, loaded, refused; and what becomes of its vectors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F

import medxray
from medxray.retrieval.bank import read_arrow, write_arrow
from medxray.retrieval.context import context_tokens
from medxray.tasks import join_views
from medxray.types import RunError


def spec(root: Path, folder: Path, **overrides: Any) -> dict[str, Any]:
    return {
        "task": "report",
        "output": str(folder),
        "data": {
            "image_size": 32,
            "reader": {"name": "csv", "root": str(root), "report": "findings"},
            "max_studies": 40,
        },
        "encoder": {"name": "vit", "width": 16, "depth": 1, "heads": 2, "patch": 16},
        "retriever": {"name": "nearest", "positives": 2, "negatives": 1},
        "decoder": {
            "name": "causal-lm", "trainable": True, "vocabulary": 300, "words": True, "prompt": "r2gengpt",
            "config": {
                "model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                "num_attention_heads": 2,
            },
        },
        "training": {"steps": 7, "batch_size": 8, "learning_rate": 1e-2, "log_steps": 1, "evaluate_steps": 7},
        "generation": {"max_new_tokens": 4},
        "metrics": ["bleu"],
        **overrides,
    }  # fmt: skip


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, phantom: Path) -> medxray.Pipeline:
    chosen = spec(phantom, tmp_path_factory.mktemp("bank") / "run")
    return medxray.build(chosen, {"retriever": {"refresh": 3}}).fit(progress=False)


def test_the_run_folder_holds_the_bank_of_the_fitted_encoder(fitted: medxray.Pipeline) -> None:
    table, features, facts = read_arrow(fitted.folder / "bank.arrow")
    bank, train = fitted.task.bank, fitted.images("train").still()
    assert table["study_id"] == bank.study_ids and facts["positives"] == bank.positives
    assert set(table["study_id"]) <= set(fitted.studies.splits["train"]["study_id"])
    places = [train.study_ids.index(name) for name in bank.study_ids]
    assert table["report"] == [train.reports[row] for row in places]
    with torch.no_grad():
        pooled = torch.cat([fitted.task.study_features(batch).pooled for batch in train.still(places).batches(8)])
    torch.testing.assert_close(features, pooled, atol=1e-6, rtol=0)
    with safe_open(fitted.folder / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if name.startswith("bank.")], "held once, in the Arrow file"  # noqa: SIM118


def test_staleness_is_in_the_log(fitted: medxray.Pipeline) -> None:
    log = [json.loads(line) for line in (fitted.folder / "log.jsonl").read_text().splitlines()]
    told = {row["step"]: (row["bank_steps_old"], row["bank_moved"]) for row in log if "bank_moved" in row}
    # Before the 4th and the 7th step; what was made before the first one replaces nothing.
    assert list(told) == [4, 7] and all(old == 3 and 1e-9 < moved < 1 for old, moved in told.values())


def test_a_loaded_model_keeps_patients_apart(fitted: medxray.Pipeline, tmp_path: Path) -> None:
    loaded = medxray.load(fitted.save(tmp_path / "saved"))
    bank = loaded.task.bank
    train = fitted.images("train").still()
    owner = dict(zip(train.study_ids, train.patient_ids, strict=True))
    own = 0
    for batch in train.batches(8):
        for found, patient in zip(loaded.task.predict(batch), batch.patient_ids, strict=True):
            used = [*found.context["positive"], *found.context["negative"]]
            own += patient in {owner[name] for name in bank.study_ids}
            assert len(used) == 3 and set(used) <= set(owner) and patient not in {owner[name] for name in used}
    assert own > 30, "most patients have studies in the bank that they must not get"
    images = tuple(train.root / name for name in train.images[0])
    nearest = loaded.predict(images)
    # An unknown study may have anyone, also the very images in the bank; named, its patient may not.
    assert train.study_ids[0] in {*nearest.context["positive"], *nearest.context["negative"]}
    known = loaded.predict({"images": images, "patient_id": train.patient_ids[0]})
    assert train.study_ids[0] not in {*known.context["positive"], *known.context["negative"]}


def test_a_bank_of_another_encoder_is_refused(fitted: medxray.Pipeline, phantom: Path, tmp_path: Path) -> None:
    image = next((phantom / "images").rglob("*.png"))
    folder = fitted.save(tmp_path / "saved")
    other = medxray.build(spec(phantom, tmp_path / "other", seed=9, training={"steps": 1, "batch_size": 8})).fit(progress=False)
    (folder / "bank.arrow").write_bytes((other.folder / "bank.arrow").read_bytes())
    with pytest.raises(RunError, match=r"of another encoder: its hash is \w{12}, that of this encoder \w{12}; put back the"):
        medxray.load(folder).predict(image)
    write_arrow(folder / "bank.arrow", {"study_id": ["a"]}, torch.zeros(1, 5), {})
    with pytest.raises(RunError, match="features of width 5, but the encoder's are 16 wide"):
        medxray.load(folder)
    (folder / "bank.arrow").write_bytes(b"half")
    with pytest.raises(RunError, match=r"bank.arrow cannot be read"):
        medxray.load(folder)
    (folder / "bank.arrow").unlink()
    with pytest.raises(RunError, match=r"has no bank.arrow, which holds its context studies"):
        medxray.load(folder)


@pytest.mark.parametrize("crop", [1.0, 0.7])
def test_a_frozen_encoder_looks_at_the_training_set_once(
    crop: float, phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDXRAY_CACHE", str(tmp_path / "cache"))
    seen: list[int] = []
    chosen = spec(phantom, tmp_path / "one", training={"steps": 6, "batch_size": 8, "evaluate_steps": 6, "validation_studies": 2})
    chosen["encoder"] |= {"trainable": False}
    chosen["data"] |= {"crop": crop}

    def fit(folder: str) -> medxray.Pipeline:
        pipeline = medxray.build({**chosen, "output": str(tmp_path / folder)})
        pipeline.task.encoder.register_forward_hook(lambda m, images, out: seen.append(len(images[0])))
        seen.clear()
        return pipeline.fit(progress=False)

    one = fit("one")
    first = sum(seen)
    assert len(list((tmp_path / "cache" / "banks").glob("*.arrow"))) == (crop < 1)
    two = fit("two")
    # Views of the bank are encoded for the first fit alone; cropped images of the steps in both.
    views = sum(len(one.studies.splits["train"]["images"][i]) for i in range(40))
    assert first - sum(seen) >= views
    assert torch.equal(one.task.bank.features, two.task.bank.features) and one.task.bank.features.any()
    assert not [row for row in (tmp_path / "one" / "log.jsonl").read_text().splitlines() if "bank_moved" in row]


def test_refreshing_by_epochs(phantom: Path, tmp_path: Path) -> None:
    chosen = spec(phantom, tmp_path / "run", training={"epochs": 2, "batch_size": 8, "log_steps": 1})
    task = medxray.build(chosen, {"retriever": {"refresh_epochs": 0.4}}).task
    steps: list[int] = []
    task.refresh = lambda: steps.append(step) or 0.5
    for step in range(10):
        task.before_step(step, 5)
    assert steps == [0, 2, 4, 6, 8] and task.logged() == {"bank_steps_old": 2, "bank_moved": 0.5} and task.logged() == {}


def test_a_large_pool_has_an_index(phantom: Path, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    chosen = spec(phantom, tmp_path / "run", training={"steps": 2, "batch_size": 8})
    chosen["retriever"] |= {"index": "faiss", "index_from": 5, "recall": 1.0}
    pipeline = medxray.build(chosen).fit(progress=False)
    image = next((phantom / "images").rglob("*.png"))
    exact = medxray.build({**chosen, "retriever": {**chosen["retriever"], "index": "exact"}, "output": str(tmp_path / "exact")})
    assert pipeline.predict(image).context == exact.fit(progress=False).predict(image).context
    assert pipeline.task.bank.recall == {"diseased": 1.0, "normal": 1.0}
    pipeline.save(tmp_path / "saved")
    assert {p.name for p in (tmp_path / "saved").glob("*.faiss")} == {"bank-diseased.faiss", "bank-normal.faiss"}
    assert medxray.load(tmp_path / "saved").predict(image).context == pipeline.predict(image).context
    assert any("recall of the nearest: 1.000 of the diseased" in n for n in pipeline.evaluate("val", progress=False).notes)


@pytest.mark.parametrize("views", ["average", "concatenate", "single"])
@pytest.mark.parametrize("mode", ["release", "after_projection", "before_projection", "none"])
def test_residuals_with_each_way_of_joining_views(
    mode: str, views: str, fitted: medxray.Pipeline, phantom: Path, tmp_path: Path
) -> None:
    chosen = spec(phantom, tmp_path / "run")
    chosen["data"] |= {"views": views, "max_views": 2}
    chosen["retriever"] |= {"residual": mode}
    pipeline = medxray.build(chosen)
    task = pipeline.task
    task.prepare(pipeline.studies)
    task.watch(pipeline.images("train", train=True))
    task.refresh()
    batch = pipeline.images("val").collate([pipeline.images("val")[i] for i in range(4)])
    with torch.no_grad():
        visual, context, who = task.inputs(batch)
        # The plain way: context images encoded again, each vector in its prompt.
        study = join_views(task.encode(batch), batch.view_mask, views)
        train = pipeline.images("train").still()
        vectors = {}
        for pool in ("positive", "negative"):
            rows = [[train.study_ids.index(name) for name, _ in own[pool]] for own in who]
            batches = [train.collate([train[r] for r in row]) for row in rows]
            vectors[pool] = torch.stack([task.study_features(one).pooled for one in batches])
        project, wrap = task.projector.project, task.decoder.wrap_context
        g = project(study.pooled)[:, None]
        if mode == "release":
            turns = [("negative", 0), ("positive", 0), ("positive", 1)]
            expected = g - torch.cat([wrap(project(vectors[pool][:, i : i + 1]), pool) for pool, i in turns], 1)
        else:
            made = {
                "after_projection": lambda c: g - project(c),
                "before_projection": lambda c: project(study.pooled[:, None] - c),
                "none": project,
            }[mode]
            expected = torch.cat([wrap(made(vectors[pool]), pool) for pool in ("negative", "positive")], 1)
    torch.testing.assert_close(context, expected, atol=1e-5, rtol=0)
    V = batch.pixels.shape[1]
    assert (views == "single") == (V == 1)
    assert visual.shape[1] == (2 * 4 if views == "concatenate" else 4), "tokens of 32 px in patches of 16"
    assert F.cosine_similarity(context[0].flatten(), context[1].flatten(), dim=0) < 1 - 1e-6 or mode == "none"


def test_context_of_no_gradient() -> None:
    from medxray.types import Context

    pooled, vector = torch.randn(2, 4, requires_grad=True), torch.randn(2, 1, 4)
    for mode in ("release", "after_projection", "before_projection", "none"):
        tokens = context_tokens(mode, pooled, Context(vector, vector, [], []), lambda x: 2 * x, lambda x, pool: x)
        assert tokens.shape == (2, 2, 4) and not tokens.requires_grad
