"""The recipe: rates, weight decay and averaged weights as functions of the step, and what stops a run."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import medxray
from medxray import Spec
from medxray.data.readers import Locality
from medxray.pipeline import read_log
from medxray.spec import TrainingSpec
from medxray.tasks.pretrain import Pretrain
from medxray.training import EpochBatches, Fitter, oversampled, parameter_groups, rate_factor, weight_decay
from medxray.types import Batch, RunError, SpecError


def spec(root: Path, folder: Path, **training: Any) -> dict[str, Any]:
    return {
        "task": "pretrain",
        "seed": 3,
        "output": str(folder),
        "data": {"image_size": 32, "reader": {"name": "csv", "root": str(root)}, "max_studies": 32},
        "encoder": {"name": "vit", "width": 16, "depth": 1, "heads": 2, "patch": 8, "stem": "convolutions"},
        "pixel_decoder": {"name": "self-attention", "dim": 16, "depth": 1, "heads": 2},
        "training": {
            "steps": 9, "batch_size": 4, "accumulate": 2, "learning_rate": 1e-2, "log_steps": 4, "evaluate_steps": 4,
            "save_steps": 3, "validation_studies": 4, "pictures": 0, **training,
        },
    }  # fmt: skip


def fit(*args: Any, **training: Any) -> medxray.Pipeline:
    return medxray.build(spec(*args, **training)).fit(progress=False)


def test_the_rate_is_scaled_to_the_studies_of_a_step(tmp_path: Path) -> None:
    read = Spec.read("hd-mae-phantom", {"training": {"learning_rate": None, "base_learning_rate": 1.5e-4}})
    assert read.training.peak(processes=1) == 1.5e-4 * 64 / 256
    read.training.accumulate = 2
    assert read.training.peak(processes=4, repeats=3) == 1.5e-4 * 64 * 2 * 4 * 3 / 256
    (tmp_path / "s.yaml").write_text(read.to_yaml())
    assert Spec.read(tmp_path / "s.yaml").to_dict() == read.to_dict() == Spec.read(read).to_dict()
    plain = {"task": "pretrain", "data": {"reader": {"name": "csv", "root": "x"}}, "encoder": "vit"}
    by_default = Spec.read({**plain, "training": {"steps": 3, "base_learning_rate": 1e-3}})
    assert by_default.training.learning_rate is None, "the default rate gives way"
    assert Spec.read({**plain, "training": {"steps": 3}}).training.peak() == 1e-4
    for both in ({"learning_rate": 1e-4, "base_learning_rate": 1e-3}, {"learning_rate": None}):
        with pytest.raises(SpecError, match="training: give either learning_rate or base_learning_rate"):
            Spec.read({**plain, "training": {"steps": 3, **both}})


def test_the_scaled_rate_is_the_one_that_trains(phantom: Path, tmp_path: Path) -> None:
    scaled = fit(phantom, tmp_path / "a", learning_rate=None, base_learning_rate=0.32, accumulate=2)
    plain = fit(phantom, tmp_path / "b", learning_rate=0.32 * 8 / 256)
    assert (scaled.folder / "model.safetensors").read_bytes() == (plain.folder / "model.safetensors").read_bytes()
    logged = [json.loads(line) for line in (scaled.folder / "log.jsonl").read_text().splitlines()]
    assert logged[0]["learning_rate"] == pytest.approx(0.01 * rate_factor(TrainingSpec(steps=9), 9, 0.01)(logged[0]["step"] - 1))


def test_an_epoch_has_studies_with_a_label_as_often_as_asked(phantom: Path, tmp_path: Path) -> None:
    pipeline = medxray.build(spec(phantom, tmp_path))
    pipeline.task.prepare(pipeline.studies)
    images = pipeline.images("train", train=True)
    present = {name: images.label_array([name])[:, 0] == 1 for name in images.label_names}
    twice, thrice = [name for name, has in present.items() if 0 < has.sum() < len(images)][:2]
    rows = oversampled(images, {twice: 2, thrice: 3})
    count = np.bincount(rows, minlength=len(images))
    assert (count == np.where(present[thrice], 3, np.where(present[twice], 2, 1))).all()
    assert (oversampled(images, {}) == np.arange(len(images))).all()

    parts = np.arange(len(images)) // 8
    for locality in (None, Locality(parts, window=1)):
        batches = EpochBatches(rows, TrainingSpec(batch_size=1), 5, 0, 1, locality)
        seen = [study for batch in batches for _, study in batch]
        assert (np.bincount(seen, minlength=len(images)) == count).all()
    assert len(set(parts[seen[:8]])) == 1, "studies of a part stay together"
    with pytest.raises(SpecError, match=rf"training.oversample: no label '{twice}x'; did you mean '{twice}'"):
        fit(phantom, tmp_path / "wrong", oversample={f"{twice}x": 2})
    fitted = fit(phantom, tmp_path / "run", steps=None, epochs=1, accumulate=1, oversample={twice: 3})
    assert max(line["step"] for line in read_log(fitted.folder)) == (len(images) + 2 * present[twice].sum()) // 4


def test_schedules_by_step() -> None:
    settings = TrainingSpec(
        steps=100, warmup=0.1, min_learning_rate=1e-6, weight_decay=0.04, final_weight_decay=0.4, learning_rate=1e-3
    )
    factor = rate_factor(settings, 100, 1e-3)
    assert [factor(s) for s in (0, 9)] == [1 / 11, 10 / 11], "warm-up is a share of the steps"
    assert factor(10) == 1 and factor(100) == pytest.approx(1e-3)
    assert factor(55) == pytest.approx(1e-3 + (1 - 1e-3) / 2)
    decay = [weight_decay(settings, step, 100) for step in range(101)]
    assert (decay[0], decay[50], decay[100]) == pytest.approx((0.04, 0.22, 0.4))
    assert decay[25] == pytest.approx(0.4 - 0.36 * (1 + math.cos(math.pi / 4)) / 2)
    assert decay == sorted(decay)
    assert weight_decay(TrainingSpec(steps=5, weight_decay=0.3), 4, 5) == 0.3


def test_weight_decay_reaches_the_groups_that_decay(
    phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[float]] = []
    step = torch.optim.AdamW.step

    def watched(self: Any, closure: Any = None) -> Any:
        seen.append([group["weight_decay"] for group in self.param_groups])
        return step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    pipeline = fit(phantom, tmp_path / "a", weight_decay=0.0, final_weight_decay=0.4)
    settings = pipeline.spec.training
    expected = [weight_decay(settings, step, 9) for step in range(9)]
    assert [max(groups) for groups in seen] == expected
    assert all(min(groups) == 0 for groups in seen), "biases and norms do not decay"
    still = medxray.build(spec(phantom, tmp_path / "b", weight_decay=0.0)).task
    assert len(parameter_groups(still, still.spec.training, 1.0)) == 1


def test_validation_and_the_kept_model_use_averaged_weights(
    phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The averages are made again here from the weights after each step."""
    after: list[dict[str, Tensor]] = []
    judged: list[dict[str, Tensor]] = []
    step, validation_loss = torch.optim.AdamW.step, medxray.pipeline.validation_loss
    build = medxray.build(spec(phantom, tmp_path / "run", ema=0.5, select="loss"))

    def copies() -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in build.task.named_parameters()}

    def watched(self: Any, closure: Any = None) -> Any:
        if not after:
            after.append(copies())
        made = step(self, closure)
        after.append(copies())
        return made

    def judge(*args: Any) -> float:
        judged.append(copies())
        assert not build.task.training
        return validation_loss(*args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    monkeypatch.setattr(medxray.pipeline, "validation_loss", judge)
    build.fit(progress=False)
    average, averages = after[0], []
    for n, weights in enumerate(after[1:]):
        decay = min(0.5, (1 + n) / (10 + n))
        average = {name: decay * value + (1 - decay) * weights[name] for name, value in average.items()}
        averages.append(average)
    assert len(after) == 10 and len(judged) == 3
    for found, step_ in zip(judged, (4, 8, 9), strict=True):
        torch.testing.assert_close(found, averages[step_ - 1], atol=1e-6, rtol=1e-5)
        assert any(not torch.equal(found[name], after[step_][name]) for name in found)
    newest = tmp_path / "run" / "checkpoints" / "step-00000009"
    torch.testing.assert_close(load_file(newest / "ema.safetensors"), averages[-1], atol=1e-6, rtol=1e-5)
    raw = load_file(newest / "model.safetensors")
    assert all(torch.equal(raw[name], value) for name, value in after[-1].items())
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    best = (4, 8, 9)[losses.index(min(losses))]
    kept = load_file(tmp_path / "run" / "model.safetensors")
    torch.testing.assert_close({n: kept[n] for n in average}, averages[best - 1], atol=1e-6, rtol=1e-5)
    buffers = [name for name in kept if name not in average]
    assert any("running_mean" in name for name in buffers), "statistics of batch norm are the model's own"
    if best == 9:
        assert all(torch.equal(kept[name], raw[name]) for name in buffers)


RECIPE = {
    "ema": 0.9, "weight_decay": 0.04, "final_weight_decay": 0.4, "learning_rate": None, "base_learning_rate": 0.3,
    "warmup": 0.2, "betas": [0.9, 0.95],
}  # fmt: skip


R2GEN = {
    "optimiser": "adam", "amsgrad": True, "weight_decay": 5e-5, "schedule": "step", "step_epochs": 1, "step_factor": 0.5,
    "clip": 0.0, "clip_value": 0.1, "rates": {"encoder": 5e-3}, "accumulate": 1, "batch_size": 8,
}  # fmt: skip


def test_rates_fall_by_steps_of_epochs() -> None:
    settings = TrainingSpec(epochs=9, schedule="step", step_epochs=2, step_factor=0.1, min_learning_rate=1.0)
    factor = rate_factor(settings, 36, 1e-3, steps_per_epoch=4)
    assert [factor(s) for s in (0, 7, 8, 15, 16)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])


def test_r2gens_recipe_is_that_of_plain_torch(
    phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients are cut number by number, then Adam with amsgrad takes decay and all; each step is made again here."""
    steps: list[tuple[list[Tensor], list[Tensor], list[Tensor]]] = []
    kinds: list[dict[str, Any]] = []
    step = torch.optim.Adam.step

    def watched(self: Any, closure: Any = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in parameters]
        gradients = [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in parameters]
        made = step(self, closure)
        steps.append((before, gradients, [p.detach().clone() for p in parameters]))
        kinds.append({"amsgrad": self.defaults["amsgrad"], "rates": [group["lr"] for group in self.param_groups]})
        assert {group["weight_decay"] for group in self.param_groups} == {5e-5}, "biases and norms decay as well"
        return made

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    settings = spec(phantom, tmp_path / "run", **R2GEN)
    pipeline = medxray.build(settings)
    pipeline.fit(progress=False)
    monkeypatch.undo()
    per_epoch = 32 // 8
    assert len(steps) == 9 and all(kind["amsgrad"] for kind in kinds)
    sizes = [max(g.abs().max().item() for g in gradients) for _, gradients, _ in steps]
    assert max(sizes) == pytest.approx(0.1), "some number was cut"
    own = [p.clone().requires_grad_() for p in steps[0][0]]
    groups = parameter_groups(pipeline.task, pipeline.spec.training, 1e-2)
    rates = [group["lr"] for group in groups for _ in group["params"]]
    assert set(rates) == {5e-3, 1e-2}
    adam = torch.optim.Adam([{"params": [p]} for p in own], weight_decay=5e-5, amsgrad=True)
    for n, (_, gradients, after) in enumerate(steps):
        for group, rate in zip(adam.param_groups, rates, strict=True):
            group["lr"] = rate * 0.5 ** (n // per_epoch)
        for parameter, gradient in zip(own, gradients, strict=True):
            parameter.grad = gradient
        adam.step()
        torch.testing.assert_close([p.detach() for p in own], after, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("recipe", "stopped"), [(RECIPE, 5), (RECIPE, 8), (RECIPE, 9), (R2GEN, 5)])
def test_a_stopped_run_goes_on_to_the_same_bits(
    phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any], stopped: int
) -> None:
    whole = fit(phantom, tmp_path / "whole", **recipe)
    before = Pretrain.before_step

    def stop(self: Pretrain, step: int, steps_per_epoch: int) -> None:
        before(self, step, steps_per_epoch)
        if step == stopped:
            raise KeyboardInterrupt

    def stop_after(self: Pretrain) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Pretrain, "before_step", stop)
    # All nine steps are done and saved, the model is not.
    monkeypatch.setattr(Pretrain, "after_fit", stop_after)
    with pytest.raises(KeyboardInterrupt):
        fit(phantom, tmp_path / "run", **recipe)
    monkeypatch.undo()
    assert (tmp_path / "run" / "checkpoints" / f"step-{stopped // 3 * 3:08d}" / "optimizer.pt").is_file()
    again = fit(phantom, tmp_path / "run", **recipe)
    last = Path("checkpoints") / "step-00000009"
    files = ["model.safetensors", "log.jsonl", last / "model.safetensors"]
    for name in files + ([last / "ema.safetensors"] if "ema" in recipe else []):
        assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name


class _NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * float("nan")


@pytest.mark.parametrize(
    ("fault", "workers"),
    [("loss", 0), ("gradient", 0), ("loss, checked late", 0), ("gradient, checked late", 1)],
)
def test_a_study_that_breaks_the_loss_is_named(
    phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, workers: int
) -> None:
    """Late is what a GPU does: reading a number each step would make it wait."""
    late = fault.endswith("late")
    settings = spec(phantom, tmp_path / "run")
    settings["data"]["workers"] = workers
    pipeline = medxray.build(settings)
    guilty = pipeline.studies.splits["train"]["study_id"][5]
    forward = Pretrain.forward

    def poisoned(self: Pretrain, batch: Batch, items: Tensor | int | None = None) -> Tensor:
        loss = forward(self, batch, items)
        if guilty not in batch.study_ids or not self.training:
            return loss
        return loss * float("nan") if fault.startswith("loss") else _NanGradient.apply(loss)

    monkeypatch.setattr(Pretrain, "forward", poisoned)
    if late:
        monkeypatch.setattr(Fitter, "deferred", property(lambda self: True))
    with pytest.raises(RunError) as error:
        pipeline.fit(progress=False)
    message = str(error.value)
    assert f"study {guilty}" in message, message
    assert message.startswith("the training loss is nan at step" if "loss" in fault else "the gradients are not finite at step")
    others = [name for name in pipeline.studies.splits["train"]["study_id"] if name in message]
    assert others == [guilty], "only the one that caused it"
    assert all(p.isfinite().all() for p in pipeline.task.parameters()), "nothing was learned from it"
    for file in (tmp_path / "run" / "checkpoints").rglob("model.safetensors"):
        assert all(t.isfinite().all() for t in load_file(file).values() if t.is_floating_point()), file
    if fault == "loss":
        monkeypatch.undo()
        mended = medxray.build(settings).fit(progress=False)
        untouched = fit(phantom, tmp_path / "untouched")
        for name in ("model.safetensors", "log.jsonl"):
            assert (mended.folder / name).read_bytes() == (untouched.folder / name).read_bytes()


def test_a_batch_that_breaks_together_is_named_whole(
    phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Pretrain.forward

    def poisoned(self: Pretrain, batch: Batch, items: Tensor | int | None = None) -> Tensor:
        loss = forward(self, batch, items)
        return loss * float("inf") if self.training and len(set(batch.study_ids)) > 1 else loss

    monkeypatch.setattr(Pretrain, "forward", poisoned)
    with pytest.raises(RunError, match=r"at step 1 of 9; none of its 8 studies .* alone: .*no checkpoint"):
        fit(phantom, tmp_path / "run")


def test_checking_late_changes_no_more_than_rounding(
    phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = fit(phantom, tmp_path / "plain")
    monkeypatch.setattr(Fitter, "deferred", property(lambda self: True))
    late = fit(phantom, tmp_path / "late")
    assert late.task.training is False
    one, other = (load_file(p.folder / "model.safetensors") for p in (plain, late))
    for name, tensor in one.items():
        if not name.endswith("qkv.bias"):  # a key's has no gradient but rounding, which Adam makes as large as any other
            torch.testing.assert_close(tensor, other[name], atol=2e-4, rtol=1e-3, msg=name)


def test_pictures_are_drawn_after_each_epoch_and_change_nothing(
    phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[int, list[str]]] = []

    def pictures(self: Pretrain, batch: Batch, folder: Path, name: str) -> list[Path]:
        assert not self.training and not torch.is_grad_enabled()
        torch.rand(7)
        drawn.append((int(name.removeprefix("step-")), batch.study_ids))
        if len(drawn) == 2:
            raise OSError(28, "No space left on device")
        return []

    monkeypatch.setattr(Pretrain, "pictures", pictures)
    with pytest.warns(UserWarning, match="No space left on device"):
        pipeline = medxray.build(spec(phantom, tmp_path / "with", pictures=3, ema=0.5)).fit(progress=False)
    per_epoch = len(pipeline.studies.splits["train"]) // 8
    assert [step for step, _ in drawn] == sorted({*range(per_epoch, 10, per_epoch), 9})
    assert len({tuple(names) for _, names in drawn}) == 1 and len(drawn[0][1]) == 3
    without = fit(phantom, tmp_path / "without", ema=0.5)
    for name in ("model.safetensors", "log.jsonl"):
        assert (pipeline.folder / name).read_bytes() == (without.folder / name).read_bytes()
