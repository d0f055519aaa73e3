"""Mosaics: where cells lie, what each kind of cell shows, and the page that pre-training draws."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import medxray
from medxray.types import RunError
from medxray.visual import mosaic


def gray(h: int = 48, w: int = 64) -> mosaic.Picture:
    return np.linspace(0, 1, h * w, dtype=np.float32).reshape(h, w)


def test_cells_lie_in_rows_and_columns() -> None:
    a, b = gray(), 1 - gray()
    rows = [mosaic.Row("one", [a, b]), mosaic.Row("a-very-long-name-of-a-study-that-is-broken", [None, a], "loss 1")]
    sheet = mosaic.mosaic(rows, ["first", "second"], "title", [mosaic.Scale(1, "0", "0.5")], ["a note " * 30])
    pixels = np.asarray(sheet).astype(np.float32) / 255
    x, y = 18 + 132, 18 + 28
    step = 64 + 8, 48 + 8

    def cell(row: int, column: int) -> np.ndarray:
        top, left = y + row * step[1], x + column * step[0]
        return pixels[top : top + 48, left : left + 64]

    for at, expected in (((0, 0), a), ((0, 1), b), ((1, 1), a)):
        np.testing.assert_allclose(cell(*at), np.repeat(expected[..., None], 3, 2), atol=1 / 255)
    assert (cell(1, 0) == 1).all(), "an empty place is paper"
    assert pixels[y : y + 48, :x].min() < 0.5, "a name stands at the left"
    assert (pixels[:, -10:] == 1).all() and (pixels[-6:] == 1).all(), "nothing runs over the edge"


def test_a_picture_is_fitted_into_a_cell() -> None:
    image = np.zeros((1280, 640), np.float32)
    image[:, 320:] = 1
    small = mosaic.fitted(image)
    assert small.shape == (224, 112) and small.dtype == np.float32
    assert small.mean() == pytest.approx(0.5, abs=5e-3)
    assert mosaic.fitted(gray(30, 20)).shape == (224, 149)
    assert mosaic.fitted(np.ones((100, 300, 3), np.float32)).shape == (75, 224, 3)
    same = gray(224, 224)
    assert mosaic.fitted(same) is same


def test_masked_tokens_are_told_from_any_gray() -> None:
    image, mask = gray(32, 32), np.zeros((4, 4), np.float32)
    mask[1, 2] = 1
    made = mosaic.hidden(image, mask)
    assert np.allclose(made[8:16, 16:24], mosaic.MASKED) and np.ptp(mosaic.MASKED) > 0.1
    made[8:16, 16:24] = image[8:16, 16:24, None]
    np.testing.assert_array_equal(made, np.repeat(image[..., None], 3, 2))


def test_the_contour_lies_on_the_border_of_the_region() -> None:
    region = np.zeros((14, 14), np.float32)
    region[4:10, 4:10] = 1
    image = np.full((224, 224), 0.5, np.float32)
    changed = np.abs(mosaic.outlined(image, region) - 0.5).max(2) > 0.1
    rows, columns = np.nonzero(changed)
    assert len(rows) > 300
    assert abs(rows.min() - 64) < 5 and abs(rows.max() - 159) < 5 and abs(columns.min() - 64) < 5
    assert not changed[80:144, 80:144].any() and not changed[:56].any()
    assert changed[112].sum() <= 8, "two thin lines across the middle"
    assert not np.abs(mosaic.outlined(image, np.ones((14, 14), np.float32)) - 0.5).any(), "no border, no line"


def test_colours_rise_in_lightness() -> None:
    ramp = mosaic.colours(np.linspace(0, 1, 256, dtype=np.float32))
    assert ramp.min() >= 0 and ramp.max() <= 1
    light = ramp**2.2 @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(light) > -1e-4).all() and light[0] < 0.03 and light[-1] > 0.7
    assert np.array_equal(mosaic.colours(np.float32([[-1, 2]])), [[ramp[0], ramp[-1]]])


def test_scales_are_round_numbers() -> None:
    values = np.linspace(0, 0.17, 1000, dtype=np.float32)
    assert mosaic.limit_of([values, values / 9]) == 0.2
    assert mosaic.limit_of([np.zeros((3, 3), np.float32)]) == 0.01
    assert mosaic.limit_of([np.full(9, 3, np.float32)]) == 1.0


def test_components_are_those_of_all_tokens() -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(3, 20, 12, generator=generator) * torch.arange(1.0, 13.0)
    made = mosaic.principal_colours(tokens, (4, 5))
    assert made.shape == (3, 4, 5, 3) and made.dtype == np.float32 and made.min() == 0 and made.max() == 1
    flat = tokens.flatten(0, 1).double()
    scores = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    for k in range(3):
        expected = (scores.U[:, k] * scores.S[k]).numpy()
        likeness = np.corrcoef(expected, made.reshape(-1, 3)[:, k])[0, 1]
        assert abs(likeness) > 0.98
    assert np.array_equal(made, mosaic.principal_colours(tokens.clone(), (4, 5)))
    np.testing.assert_allclose(made, mosaic.principal_colours(tokens + 3, (4, 5)), atol=1e-3)
    narrow = mosaic.principal_colours(tokens[..., :2], (4, 5))
    assert narrow.shape == (3, 4, 5, 3) and not narrow[..., 2].any()
    assert np.isfinite(mosaic.principal_colours(torch.ones(1, 4, 8), (2, 2))).all()


def test_heat_leaves_what_is_cold() -> None:
    image = gray(64, 64)
    values = np.zeros((8, 8), np.float32)
    values[2, 5] = 1
    made = mosaic.heated(image, values)
    assert np.allclose(made[40:, :24], image[40:, :24, None] * 0.7)
    assert np.abs(made[20, 44] - image[20, 44] * 0.7).max() > 0.2


def test_a_file_is_whole_or_absent(tmp_path: Path) -> None:
    path = mosaic.save(Image.new("RGB", (9, 9)), tmp_path / "new" / "a.png")
    assert Image.open(path).size == (9, 9) and [p.name for p in path.parent.iterdir()] == ["a.png"]
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        mosaic.save(Image.new("RGB", (9, 9)), tmp_path / "file" / "a.png")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, phantom: Path) -> medxray.Pipeline:
    spec = {
        "task": "pretrain",
        "output": str(tmp_path_factory.mktemp("pictures") / "run"),
        "data": {"image_size": [64, 48], "reader": {"name": "csv", "root": str(phantom)}, "max_studies": 24},
        "encoder": {"name": "vit", "width": 16, "depth": 1, "heads": 2, "patch": 8},
        "training": {"steps": 2, "batch_size": 8, "pictures": 2, "validation_studies": 4},
    }
    return medxray.build(spec).fit(progress=False)


def test_pre_training_draws_after_an_epoch_and_on_demand(fitted: medxray.Pipeline, phantom: Path, tmp_path: Path) -> None:
    (file,) = (fitted.folder / "pictures").iterdir()
    assert file.name == "step-00000002.png"
    sheet = np.asarray(Image.open(file)).astype(np.float32)
    cells = 7 - 1  # no contour
    assert sheet.shape[1] == 18 + 132 + cells * (168 + 8) - 8 + 18
    visible = sheet[18 + 28 : 18 + 28 + 224, 150 + 176 : 150 + 176 + 168] / 255
    share = (np.abs(visible - mosaic.MASKED).max(2) < 0.02).mean()
    assert 0.6 < share < 0.8, "three quarters are masked"
    (again,) = fitted.pictures()
    assert again.parent == fitted.folder / "pictures" and again.name == "validation.png"
    other = np.asarray(Image.open(again)).astype(np.float32)
    assert np.array_equal(other[46:], sheet[46:]), "the same studies, masks and weights: only the title differs"
    images = sorted((phantom / "images").rglob("*.png"))
    made = fitted.pictures([(images[1], images[2])], tmp_path / "out")
    assert [p.name for p in made] == ["studies.png"]
    assert np.asarray(Image.open(made[0])).shape[0] == sheet.shape[0] - 232, "a row a study"
    assert [p.name for p in fitted.pictures(images[:13], tmp_path / "out")] == ["studies-001.png", "studies-002.png"]
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="cannot be written"):
        fitted.pictures(images[0], tmp_path / "file")


def test_drawing_leaves_the_model_and_the_randomness_as_they_are(fitted: medxray.Pipeline) -> None:
    before = {name: tensor.clone() for name, tensor in fitted.task.state_dict().items()}
    state = torch.random.get_rng_state()
    fitted.pictures()
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in fitted.task.state_dict().items())


def test_a_contour_is_drawn_where_regions_are_known(fitted: medxray.Pipeline, tmp_path: Path) -> None:
    images = fitted.images("val")
    batch = images.collate([images[0], images[1]])
    batch.regions = torch.zeros(2, batch.pixels.shape[1], 8, 6)
    batch.regions[:, :, 2:6, 1:5] = 1
    with torch.no_grad():
        (path,) = fitted.task.pictures(batch, tmp_path, "with")
    assert Image.open(path).width == 18 + 132 + 7 * (168 + 8) - 8 + 18


def test_on_the_command_line(fitted: medxray.Pipeline, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from medxray.cli import app

    done = CliRunner().invoke(app, ["pictures", str(fitted.folder), "--output", str(tmp_path / "drawn"), "--quiet"])
    assert done.exit_code == 0, done.output
    assert done.output.strip() == str(tmp_path / "drawn" / "validation.png")
    assert Image.open(tmp_path / "drawn" / "validation.png").height > 448


def test_a_task_that_draws_nothing_says_so(fitted: medxray.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(fitted.task), "pictures", medxray.tasks.Task.pictures)
    with pytest.raises(RunError, match="task pretrain draws no pictures"):
        fitted.pictures()
