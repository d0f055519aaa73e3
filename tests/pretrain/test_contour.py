"""The chest's contour: found under every fault, never doubtful in silence, kept, and in step with its image."""

import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import concatenate_datasets
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from medxray.data import StudyImages, load_studies, read_image
from medxray.data.loading import study_from
from medxray.data.phantom import draw_study, generate
from medxray.data.readers import READERS
from medxray.data.transforms import Box, cover, cut, resize
from medxray.pretrain import SEGMENTERS, Region, Segmenter, SegmenterSettings
from medxray.pretrain.contour import ClassicalSegmenter
from medxray.pretrain.regions import Contours
from medxray.spec import DataSpec
from medxray.types import ImageError, SpecError

SEED = 901
Pair = tuple[NDArray[np.float32], NDArray[np.bool_]]


def iou(mask: NDArray[np.bool_] | NDArray[np.float32], truth: NDArray[np.bool_]) -> float:
    h, w = truth.shape
    drawn = np.asarray(Image.fromarray(mask.astype(np.float32)).resize((w, h), Image.Resampling.BILINEAR)) > 0.5
    return float((drawn & truth).sum() / (drawn | truth).sum())


Drawn = tuple[str, NDArray[np.float32], NDArray[np.bool_]]


def drawn(views: tuple[str, ...] = ("PA", "AP", "LL"), studies: int = 4) -> list[Drawn]:
    found = []
    for index in range(studies):
        study = draw_study(SEED, index, 192, views=views)
        for view, image, mask in zip(views, study.images, study.thorax_masks, strict=True):
            found.append((view, image.astype(np.float32) / 4095, mask))
    return found


def framed(image: NDArray[np.float32], level: float) -> NDArray[np.float32]:
    whole = np.full_like(image, level)
    whole[14:-8, 8:-16] = image[14:-8, 8:-16]
    return whole


def turned(image: NDArray[np.float32], mask: NDArray[np.bool_], angle: float) -> Pair:
    return (
        ndimage.rotate(image, angle, reshape=False, order=1),
        ndimage.rotate(mask.astype(np.float32), angle, reshape=False, order=1) > 0.5,
    )


FAULTS = {
    "none": lambda image, mask: (image, mask),
    "inverted": lambda image, mask: (1 - image, mask),
    "black border": lambda image, mask: (framed(image, 0), mask),
    "white border": lambda image, mask: (framed(image, 1), mask),
    "turned left": lambda image, mask: turned(image, mask, 13),
    "turned right": lambda image, mask: turned(image, mask, -13),
    "dark": lambda image, mask: (image**2.2, mask),
    "flat": lambda image, mask: (0.4 + 0.2 * image, mask),
    "unscaled": lambda image, mask: (image / 16, mask),
    "on its side": lambda image, mask: (np.rot90(image), np.rot90(mask)),
    "mirrored": lambda image, mask: (image[:, ::-1], mask[:, ::-1]),
    "inverted and turned": lambda image, mask: turned(1 - image, mask, 13),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_thorax_is_found_under_every_fault(fault: str) -> None:
    overlaps = []
    for view, image, mask in drawn():
        pixels, truth = FAULTS[fault](image, mask)
        region = ClassicalSegmenter()(np.ascontiguousarray(pixels, np.float32), view)
        assert region.source == "computed" and region.reason == ""
        overlaps.append(iou(region.mask, truth))
    assert np.mean(overlaps) > 0.9, overlaps
    assert min(overlaps) > 0.8, overlaps


def test_an_unknown_view_is_told_apart() -> None:
    for view, image, mask in drawn(("PA", "LL"), studies=3):
        known, unknown = (ClassicalSegmenter()(image, name).mask for name in (view, "unknown"))
        assert np.array_equal(known, unknown)
        assert iou(unknown, mask) > 0.85


def test_a_mirrored_image_has_the_mirrored_contour() -> None:
    segment = ClassicalSegmenter()
    for view, image, _ in drawn(studies=2):
        there, back = segment(image, view).mask, segment(image[:, ::-1].copy(), view).mask
        assert iou(there, back[:, ::-1].astype(bool)) > 0.9


def test_size_and_depth_do_not_matter() -> None:
    study = draw_study(SEED, 1, 256, views=("PA",))
    masks = [
        ClassicalSegmenter()(draw_study(SEED, 1, size, views=("PA",)).images[0].astype(np.float32) / 4095, "PA").mask
        for size in (128, 256, 640)
    ]
    assert all(iou(mask, study.thorax_masks[0]) > 0.9 for mask in masks)
    tall = np.zeros((256, 160), np.float32)
    tall[:] = (study.images[0] / 4095)[:, 48:208]
    region = ClassicalSegmenter()(tall, "PA")
    assert region.mask.shape == (128, 80)  # the frame keeps its aspect
    assert iou(region.mask, study.thorax_masks[0][:, 48:208]) > 0.9


@pytest.mark.parametrize(
    ("pixels", "word"),
    [
        (np.zeros((90, 90), np.float32), "nothing to see"),
        (np.full((90, 90), np.nan, np.float32), "nothing to see"),
        (np.random.default_rng(0).random((90, 90), np.float32), "correlates"),
        (np.linspace(0, 1, 8100, dtype=np.float32).reshape(90, 90), "correlates"),
        (np.random.default_rng(0).random((4, 900), np.float32), "4 x 900"),
        (np.ones((1, 1), np.float32), "nothing to see"),
    ],
)
@pytest.mark.parametrize("view", ["PA", "LL", "unknown"])
def test_what_is_no_chest_is_never_contoured_in_silence(pixels: NDArray[np.float32], word: str, view: str) -> None:
    region = ClassicalSegmenter()(pixels, view)
    assert region.source == ("uniform" if view == "LL" else "rectangle")
    assert word in region.reason
    # The release's proportions: rows 0.25 to 0.75, columns 0.125 to 0.75.
    assert region.mask.mean() == pytest.approx(1 if view == "LL" else 0.5 * 0.625)


def test_a_gate_gives_its_reason() -> None:
    image = drawn(("PA",), 1)[0][1]
    for settings, word in (
        ({"min_score": 1.0}, "correlates"), ({"max_area": 0.2}, "covers"), ({"min_area": 0.9}, "covers"),
    ):  # fmt: skip
        region = ClassicalSegmenter(**settings)(image, "PA")
        assert region.source == "rectangle" and word in region.reason
    half = np.zeros_like(image)
    half[:, :96] = image[:, 96:]
    region = ClassicalSegmenter()(half, "PA")
    assert region.source != "computed" and region.reason


def test_an_ambiguous_image_is_not_contoured_in_silence() -> None:
    """Turned, inverted, collimated and full of findings: hardly better as it is than the other way about."""
    study = draw_study(77, 32, 256, views=("PA",))
    rng = np.random.default_rng([32, 9])
    top, bottom, left, right = (rng.uniform(0.0, 0.12, 4) * 256).astype(int)
    image = np.full((256, 256), 1.0, np.float32)
    image[top : 256 - bottom, left : 256 - right] = (1 - study.images[0].astype(np.float32) / 4095)[
        top : 256 - bottom, left : 256 - right
    ]
    angle = float(rng.uniform(10, 15)) * float(rng.choice((-1, 1)))
    pixels, truth = turned(image, study.thorax_masks[0], angle)
    region = ClassicalSegmenter()(pixels, "PA")
    assert iou(region.mask, truth) > 0.8 or (region.source != "computed" and "inverted" in region.reason)


def test_real_radiographs(shared: Path) -> None:
    """Nearly all are contoured, upright or on their side; a shin is not, whatever view it is said to be."""
    found = []
    for path in sorted((shared / "data/nih_chestxray14/images").glob("*.jpg"))[:24]:
        region = ClassicalSegmenter()(read_image(path)[0], "PA")
        found.append(region.source == "computed")
        if found[-1]:
            assert 0.2 < region.mask.mean() < 0.92
    assert np.mean(found) > 0.9
    shin = read_image(next((shared / "data/dicom_chest").glob("*tibia*")))[0]
    for view in ("PA", "LL", "unknown"):
        region = ClassicalSegmenter()(shin, view)
        assert region.source != "computed" and region.reason
    upright = ClassicalSegmenter()(
        read_image(shared / "data/dicom_chest/rsna_pneumonia_16d7f894_MONOCHROME2_8bit_jpeg.dcm")[0], "PA"
    )
    false_tag = ClassicalSegmenter()(
        read_image(shared / "data/dicom_chest/rsna_pneumonia_16d7f894_relabelled_MONOCHROME1.dcm")[0], "PA"
    )
    assert iou(upright.mask, false_tag.mask.astype(bool)) > 0.95


# A data set ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return generate(tmp_path / "data", studies=12, size=64, seed=9, progress=False)


def images_of(root: Path, **data: Any) -> StudyImages:
    reader = READERS.settings_of("phantom")(name="phantom", root=str(root), studies=12, size=64, seed=9)
    spec = DataSpec(reader=reader, image_size=64, labels=[], cleaning="none", **data)
    studies = load_studies(spec)
    return StudyImages(
        concatenate_datasets(list(studies.splits.values())), root, spec,
        channels=1, mean=(0.5,), std=(0.5,), labels=[], seed=1, train=True, max_views=2, reader=studies.reader,
    )  # fmt: skip


def settings(**values: object) -> SegmenterSettings:
    made = SEGMENTERS.settings_of("classical")(name="classical", **values)
    assert isinstance(made, SegmenterSettings)
    return made


def names(images: StudyImages) -> list[str]:
    return [name for views in images.images for name in views]


def test_a_data_set_is_done_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = images_of(folder)
    regions = Contours(settings()).of(images)
    assert set(regions) == set(names(images)) and len(regions) == len(names(images))
    for name in regions:
        truth = np.asarray(Image.open(folder / "masks" / f"{Path(name).stem}_thorax.png"))
        assert regions[name].shape == (64, 64) and regions[name].dtype == torch.float32
        assert iou(regions[name].numpy(), truth.astype(bool)) > 0.75
    assert regions.counts == {"computed": len(regions)} and not regions.reasons
    kept = next((folder / ".medxray").iterdir())
    assert kept.name.startswith("contours-")

    def never(*_: object) -> Region:
        raise AssertionError("computed again")

    monkeypatch.setattr(ClassicalSegmenter, "__call__", never)
    again = Contours(settings()).of(images)
    assert all(torch.equal(again[name], regions[name]) for name in regions)
    loaded = pickle.loads(pickle.dumps(again))
    assert torch.equal(loaded[names(images)[0]], regions[names(images)[0]])
    with pytest.raises(AssertionError):
        Contours(settings(min_score=0.4)).of(images)


def test_a_changed_file_is_computed_anew(folder: Path) -> None:
    images = images_of(folder)
    before = Contours(settings()).of(images)
    first, second = names(images)[:2]
    (folder / first).write_bytes((folder / names(images)[-1]).read_bytes())
    os.utime(folder / first, (1, 1))
    calls = count_calls()
    after = Contours(settings(), segmenter=calls).of(images)
    assert calls.count == 1
    assert torch.equal(before[second], after[second]) and not torch.equal(before[first], after[first])


class count_calls(Segmenter):
    def __init__(self) -> None:
        self.count, self.inner = 0, ClassicalSegmenter()

    def __call__(self, pixels: NDArray[np.float32], view: str) -> Region:
        self.count += 1
        return self.inner(pixels, view)


def test_processes_find_the_same(folder: Path, tmp_path: Path) -> None:
    images = images_of(folder)
    alone = Contours(settings()).of(images)
    expected = {name: alone[name] for name in alone}
    for kept in (folder / ".medxray").rglob("*"):
        if kept.is_file():
            kept.unlink()
    together = Contours(settings()).of(images, workers=2)
    assert all(torch.equal(together[name], region) for name, region in expected.items())


def test_a_killed_run_goes_on(folder: Path) -> None:
    """What was kept stays, what was half written is not seen."""
    script = textwrap.dedent("""
        import sys, time
        from medxray.pretrain import regions
        sys.path.insert(0, sys.argv[2])
        import test_contour as t
        regions._KEPT_IMAGES = 3
        class Slow(t.count_calls):
            def __call__(self, pixels, view):
                if self.count == 7:
                    print("seven", flush=True)
                    time.sleep(60)
                return super().__call__(pixels, view)
        regions.Contours(t.settings(), segmenter=Slow()).of(t.images_of(t.Path(sys.argv[1])))
    """)
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(folder), str(Path(__file__).parent)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "seven\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    images, calls = images_of(folder), count_calls()
    regions = Contours(settings(), segmenter=calls).of(images)
    assert calls.count == len(names(images)) - 6
    assert set(regions) == set(names(images)) and regions.counts == {"computed": len(regions)}


def test_the_chain_falls_to_the_mean_then_to_the_rectangle(folder: Path) -> None:
    """One frontal image of noise takes the mean of its view; laterals that all fail have no mean."""
    rng = np.random.default_rng(0)
    images = images_of(folder)
    views = dict(zip(names(images), (view for row in images.views for view in row), strict=True))
    spoilt = [next(name for name in views if views[name] == "PA"), *(n for n in views if views[n] == "LL")]
    for name in spoilt:
        Image.fromarray(rng.integers(0, 256, (64, 64), np.uint8)).save(folder / name)
    regions = Contours(settings()).of(images)
    sound = [regions[name] for name in views if views[name] == "PA" and name not in spoilt]
    assert torch.allclose(regions[spoilt[0]], torch.stack(sound).mean(0), atol=1e-6)
    assert regions.sources[spoilt[0]] == "mean" and "correlates" in regions.reasons[spoilt[0]]
    for name in spoilt[1:]:
        assert regions.sources[name] == "uniform" and torch.equal(regions[name], torch.ones(64, 64))
    assert regions.counts == {
        "computed": len(views) - len(spoilt), "mean": 1, "uniform": len(spoilt) - 1
    }  # fmt: skip
    told = str(regions)
    assert "1 mean" in told and spoilt[0] in told and "correlates" in told
    for name in (n for n in views if views[n] == "PA" and n not in spoilt):
        Image.fromarray(rng.integers(0, 256, (64, 64), np.uint8)).save(folder / name)
    alone = Contours(settings()).of(images)
    assert alone.sources[spoilt[0]] == "rectangle"


def test_stored_masks_come_first(folder: Path) -> None:
    images = images_of(folder)
    first, second, third = names(images)[:3]
    (folder / "masks" / f"{Path(first).stem}_thorax.png").unlink()
    Image.new("L", (64, 64)).save(folder / "masks" / f"{Path(second).stem}_thorax.png")
    regions = Contours(settings(stored="masks/{stem}_thorax.png")).of(images)
    truth = np.asarray(Image.open(folder / "masks" / f"{Path(third).stem}_thorax.png"), np.float32)
    assert np.array_equal(regions[third].numpy(), truth) and regions.sources[third] == "stored"
    assert regions.sources[first] == "computed" and "thorax.png" in regions.reasons[first]
    assert regions.sources[second] == "computed" and "empty" in regions.reasons[second]
    # A mask that comes later is seen.
    Image.fromarray(np.eye(64, dtype=np.uint8) * 255).save(folder / "masks" / f"{Path(first).stem}_thorax.png")
    assert torch.equal(Contours(settings(stored="masks/{stem}_thorax.png")).of(images)[first], torch.eye(64))
    with pytest.raises(SpecError, match="stem"):
        Contours(settings(stored="masks/{name}.png")).of(images)


def test_unreadable_images(folder: Path) -> None:
    name = names(images_of(folder))[0]
    strict, lenient = images_of(folder), images_of(folder, on_error="skip")
    (folder / name).write_bytes(b"no image")
    for workers in (0, 1):
        with pytest.raises(ImageError, match=Path(name).name):
            Contours(settings()).of(strict, workers=workers)
    regions = Contours(settings()).of(lenient)
    assert regions.sources[name] == "mean" and Path(name).name in regions.reasons[name]


def test_a_root_that_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEDXRAY_CACHE", str(tmp_path / "cache"))
    (folder / ".medxray").write_text("a file in the way")
    regions = Contours(settings()).of(images_of(folder))
    assert regions.counts == {"computed": len(regions)}
    assert list((tmp_path / "cache").rglob("*.npy"))


def test_a_damaged_cache_is_made_again(folder: Path) -> None:
    images = images_of(folder)
    before = Contours(settings()).of(images)
    kept = {name: before[name] for name in before}
    for file in (folder / ".medxray").rglob("*.jsonl"):
        file.write_text(file.read_text()[:100])
    after = Contours(settings()).of(images)
    assert all(torch.equal(after[name], region) for name, region in kept.items())
    for file in (folder / ".medxray").rglob("*.npy"):
        file.write_bytes(file.read_bytes()[:100])
    after = Contours(settings()).of(images)
    assert all(torch.equal(after[name], region) for name, region in kept.items())


def test_new_images(folder: Path) -> None:
    contours = Contours(settings())
    for view, image, mask in drawn(("PA",), 2):
        region = contours(image[None], view)
        assert region.shape == (64, 64) and iou(region.numpy(), mask) > 0.85
    noise = np.random.default_rng(0).random((64, 64), np.float32)
    rectangle = contours(noise, "PA")
    assert rectangle.mean() == pytest.approx(0.5 * 0.625)
    contours.of(images_of(folder))
    assert not torch.equal(contours(noise, "PA"), rectangle)  # the mean of the view is known by now
    image = drawn(("LL",), 1)[0][1]
    spec = images_of(folder).spec
    sample = study_from(
        {"images": [image], "views": ["LL"]}, spec, channels=1, mean=(0.5,), std=(0.5,), segment=contours, grid=(8, 8)
    )
    assert sample.regions is not None and sample.regions.shape == (1, 8, 8)
    assert torch.allclose(sample.regions[0], torch.nn.functional.avg_pool2d(contours(image, "LL")[None], 8)[0], atol=1e-6)


# In step with the image ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", ["stretch", "pad"])
@pytest.mark.parametrize("shape", [(64, 64), (128, 64), (64, 192)])
@pytest.mark.parametrize("box", [None, Box(0.25, 0.125, 0.5, 0.5), Box(0.0, 0.25, 0.75, 0.75)])
def test_a_region_goes_the_way_of_its_image(fit: str, shape: tuple[int, int], box: Box | None) -> None:
    """The region drawn as an image has the same mean in each token as the coverage that is worked out."""
    rng = np.random.default_rng(0)
    region = torch.from_numpy(ndimage.gaussian_filter(rng.random((64, 64)), 3).astype(np.float32))
    region = (region - region.min()) / (region.max() - region.min())
    tall, wide = shape[0] // 64, shape[1] // 64
    image = region.repeat_interleave(tall, 0).repeat_interleave(wide, 1)[None]
    pixels = resize(image if box is None else cut(image, box), (96, 128), fit)  # type: ignore[arg-type]
    means = torch.nn.functional.avg_pool2d(pixels, (16, 16))[0]
    covered = cover(region, (6, 8), shape, (96, 128), fit, box)  # type: ignore[arg-type]
    assert covered.shape == (6, 8) and covered.dtype == torch.float32
    assert torch.allclose(covered, means, atol=0.02), (covered - means).abs().max()
    if fit == "pad" and shape == (128, 64):
        assert (covered[:, 0] == 0).all()


def test_coverage_is_exact() -> None:
    """A chest that ends in the middle of a token covers half of it, whatever the grid."""
    region = torch.zeros(64, 64)
    region[:, :32] = 1
    assert torch.allclose(cover(region, (1, 3), (50, 50), (48, 48), "stretch")[0], torch.tensor([1.0, 0.5, 0.0]))
    assert cover(region, (5, 7), (50, 50), (48, 48), "stretch").mean() == pytest.approx(0.5, abs=1e-6)
    everywhere = cover(torch.ones(64, 64), (3, 7), (31, 57), (48, 48), "stretch", Box(0.11, 0.2, 0.61, 0.61))
    assert torch.allclose(everywhere, torch.ones(3, 7), atol=1e-6)


@pytest.mark.parametrize("crop", [1.0, 0.3])
def test_batches_carry_coverage(folder: Path, crop: float) -> None:
    images = images_of(folder, crop=crop)
    images.regions, images.grid = Contours(settings()).of(images), (4, 4)
    row = next(i for i, views in enumerate(images.images) if len(views) == 2)
    single = next(i for i, views in enumerate(images.images) if len(views) == 1)
    batch = images.collate([images[(3, row)], images[(3, single)]])
    assert batch.regions is not None and batch.regions.shape == (2, 2, 4, 4)
    assert (batch.regions[1, 1] == 0).all() and batch.regions[0].mean() > 0.2
    assert torch.equal(images.collate([images[(3, row)]]).regions, batch.regions[:1])  # from the cache too
    still = images.still([row])
    whole = still.collate([still[0]]).regions
    assert whole is not None
    expected = torch.nn.functional.avg_pool2d(images.regions[images.images[row][0]][None], 16)[0]
    assert torch.allclose(whole[0, 0], expected, atol=1e-6)
    assert torch.equal(whole[0], batch.regions[0]) == (crop == 1.0)
    images.regions = None
    assert images.collate([images[0]]).regions is None


def test_settings_are_checked() -> None:
    with pytest.raises(SpecError, match="min_area"):
        SEGMENTERS.build(settings(min_area=0.9, max_area=0.2))
    described = SEGMENTERS.settings_of("classical").model_fields
    assert all(field.description for name, field in described.items() if name != "name")
    assert isinstance(SEGMENTERS.build(settings()), ClassicalSegmenter)


def test_a_learned_segmenter_plugs_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Half(Segmenter):
        """The upper half."""

        def __call__(self, pixels: NDArray[np.float32], view: str) -> Region:
            mask = np.zeros((10, 20), np.bool_)
            mask[:5] = True
            return Region(mask, "computed", "")

    monkeypatch.setattr(SEGMENTERS, "_classes", dict(SEGMENTERS._classes))
    monkeypatch.setattr(SEGMENTERS, "_models", dict(SEGMENTERS._models))
    SEGMENTERS.register("half")(Half)
    made = SEGMENTERS.settings_of("half")(name="half")
    images = images_of(folder)
    regions = Contours(made).of(images)
    assert all(region[:32].min() == 1 and region[32:].max() == 0 for region in regions.values())
    meta = [json.loads(line) for file in (folder / ".medxray").rglob("*.jsonl") for line in file.open()]
    assert {row["source"] for row in meta} == {"computed"}
