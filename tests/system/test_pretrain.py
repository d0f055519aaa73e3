"""Pre-training as its users write it: by the contour, from shards, then judged; what `show` says; the example."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import medxray
from medxray.summary import summarise
from medxray.types import SpecError

SMALL = {"name": "vit", "width": 32, "depth": 2, "heads": 2, "patch": 8}


def spec(root: Path, folder: Path, **overrides: Any) -> dict[str, Any]:
    return {
        "task": "pretrain",
        "output": str(folder),
        "data": {"image_size": 64, "reader": {"name": "csv", "root": str(root), "report": "findings"}, "max_studies": 24},
        "encoder": SMALL,
        "masker": {"name": "contour", "ratio": 0.75},
        "pixel_decoder": {"name": "cross-attention", "dim": 32, "depth": 1, "predicted": 0.5},
        "training": {"steps": 4, "batch_size": 8, "pictures": 2},
        **overrides,
    }


def test_the_mask_follows_the_chest(phantom: Path, tmp_path: Path) -> None:
    masker = {"name": "contour", "ratio": 0.75, "inner": 0.95, "outer": 0.5}
    pipeline = medxray.build(spec(phantom, tmp_path / "run", masker=masker)).fit(progress=False)
    images = pipeline.images("val")
    batch = images.collate([images[i] for i in range(len(images))])
    assert batch.regions is not None and batch.regions.shape[-2:] == (8, 8)
    model, seen = pipeline.task.model, {}
    pixels, regions = batch.pixels[:, 0], batch.regions[:, 0]
    chest = regions > 0.9
    for name, given in (("with", regions), ("without", torch.zeros_like(regions))):
        masks = [model(pixels, given, generator=batch.seeds + i).masking.mask.view_as(regions) for i in range(20)]
        seen[name] = 1 - float(torch.stack(masks).mean(0)[chest].mean())
    assert seen["with"] < 0.5 * seen["without"]
    told = (tmp_path / "run" / "regions.txt").read_text()
    assert told.startswith("regions of ") and " computed" in told
    assert any("regions of" in note for note in pipeline.evaluate(progress=False).notes)
    assert len(list((tmp_path / "run" / "pictures").glob("*.png"))) >= 1
    # A study that is in no data set has a contour as well.
    file = next((phantom / "images").rglob("*.png"))
    assert pipeline.predict(file).scores["reconstruction"] > 0


def test_several_masks_of_one_image(phantom: Path, tmp_path: Path) -> None:
    pipelines = [
        medxray.build(spec(phantom, tmp_path / str(n), masker={"name": "random", "repeats": n})) for n in (1, 3)
    ]
    images = pipelines[0].images("train", train=True)
    batch = images.collate([images[0, i] for i in range(4)])
    once, thrice = (pipeline.task.train() for pipeline in pipelines)
    assert once.items(batch) == thrice.items(batch)
    study, view = batch.view_mask.nonzero(as_tuple=True)
    pixels, seeds = batch.pixels[study, view], batch.seeds[study] + view
    # The first mask of each image is that of a single one.
    first = once.model(pixels, generator=seeds)
    drawn = []
    thrice.model.register_forward_hook(lambda module, given, output: drawn.append(output))
    loss = thrice(batch)
    assert len(drawn[0].loss) == 3 * len(pixels) and torch.equal(drawn[0].masking.keep[::3], first.masking.keep)
    assert not torch.equal(drawn[0].masking.keep[::3], drawn[0].masking.keep[1::3])
    torch.testing.assert_close(loss, drawn[0].loss.mean())
    # In evaluation there is one.
    thrice.eval()(batch)
    assert len(drawn[1].loss) == len(pixels)


def test_a_curriculum_knows_how_far_a_fit_is(phantom: Path, tmp_path: Path) -> None:
    task = medxray.build(spec(phantom, tmp_path / "run", masker={"name": "curriculum"})).task
    images = medxray.build(spec(phantom, tmp_path / "run")).images("train")
    batch = images.collate([images[i] for i in range(2)])
    task.before_step(1, 10)
    task.train()(batch)
    assert task.model.masker.progress == 0.25
    task.eval()(batch)
    assert task.model.masker.progress == 1.0


@pytest.mark.parametrize("recompute", [False, "mlp", True])
@pytest.mark.parametrize("decoder", ["self-attention", "cross-attention", "linear"])
def test_show_says_what_a_step_keeps(phantom: Path, tmp_path: Path, decoder: str, recompute: bool | str) -> None:
    """Beside the bytes that autograd really holds, and those of what is returned."""
    overrides = {"pixel_decoder": {"name": decoder}, "training": {"steps": 1, "gradient_checkpointing": recompute}}
    pipeline = medxray.build(spec(phantom, tmp_path / "run", **overrides))
    found = summarise(pipeline)
    assert found["tokens seen and predicted"] == "16 visible, 48 predicted of 64"
    number, unit = found["step activations an image"].split()[:2]
    shown = float(number) * {"KiB": 2**10, "MiB": 2**20}[unit]
    model, counts = pipeline.task.model.train(), []
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for images in (torch.randn(2, 1, 64, 64), torch.randn(10, 1, 64, 64)):
        held: dict[int, int] = {}

        def keep(tensor: torch.Tensor, held: dict[int, int] = held) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        # A recomputed block holds its input in another way.
        inputs: list[torch.Tensor] = []
        hooks = [b.register_forward_pre_hook(lambda _, x, seen=inputs: seen.append(x[0])) for b in model.encoder.blocks]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(images)
        for tensor in (*inputs, *output[:3], *output.masking, output.latent):
            keep(tensor)
        for hook in hooks:
            hook.remove()
        counts.append(sum(held.values()))
        del output
    assert shown == pytest.approx((counts[1] - counts[0]) / 8, rel=0.15)


def test_specs_of_the_papers() -> None:
    """Every number that the release and the recipes state."""
    release = medxray.Spec.read("hd-mae-release").to_dict()
    task = medxray.build("hd-mae-release", {"encoder": {"size": "tiny"}}).task
    assert task.encoder.grid(1280, 1280) == (20, 20) and type(task.encoder.patch_embed).__name__ == "HDStem"
    assert task.model.masker(None, 1, (20, 20), torch.tensor([1])).keep.shape[1] == 46
    training = release["training"]
    assert (release["encoder"]["size"], training["clip"], training["precision"]) == ("large", 3.0, "fp16")
    assert (training["weight_decay"], training["final_weight_decay"], training["warmup"]) == (0.04, 0.4, 0.1)
    # Eight processes of two images: 2.5e-4 x 16 / 256.
    assert medxray.Spec.read("hd-mae-release").training.peak(8) == pytest.approx(2.5e-4 / 16)
    hd = medxray.build("hd-mae-1280", {"encoder": {"size": "tiny"}}).task
    assert hd.encoder.grid(1280, 1280) == (80, 80)
    assert hd.model.masker(None, 1, (80, 80), torch.tensor([1])).keep.shape[1] == 704
    for name, ratio, crop in (("mae-224", 0.75, 0.2), ("medical-mae-224", 0.9, 0.5)):
        recipe = medxray.Spec.read(name).to_dict()
        assert (recipe["masker"]["ratio"], recipe["data"]["crop"]) == (ratio, crop)
        assert recipe["training"]["epochs"] == 800 and recipe["training"]["betas"] == [0.9, 0.95]


def test_mistakes_are_told(phantom: Path, tmp_path: Path) -> None:
    for change, word in (
        ({"segmenter": {"name": "clasical"}}, "segmenter.name: unknown segmenter 'clasical'; did you mean 'classical'"),
        ({"segmenter": {"name": "classical", "stored": "masks"}}, "segmenter.stored"),
        ({"segmenter": {"stored": "masks"}}, "segmenter.stored"),
        ({"masker": {"name": "contour", "inner": 1.0}}, "masker.inner"),
        ({"masker": {"name": "contour", "repeats": 0}}, "masker.repeats"),
        ({"encoder": {"name": "vmamba"}}, "MaskableEncoder"),
    ):
        with pytest.raises(SpecError, match=word.replace(".", r"\.")):
            _ = medxray.build({**spec(phantom, tmp_path / "run"), **change}).task


def test_the_example(phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "pretrain_then_classify.py"))
    reader = {"name": "csv", "root": str(phantom), "report": "findings"}
    monkeypatch.setitem(example["DATA"], "reader", reader)
    monkeypatch.setitem(example["DATA"], "image_size", 64)
    monkeypatch.setitem(example["DATA"], "max_studies", 40)
    pretrained = example["pretrain"]()
    for way, overrides in example["WAYS"].items():
        few = {"training": {"epochs": None, "steps": 2}}
        if "nearest" in way:
            few["head"] = {**overrides["head"], "k": 3}
        assert 0 <= example["judge"](way, str(pretrained.folder), **{**overrides, **few}) <= 1
