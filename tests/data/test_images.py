import io
import json
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from medxray.data import (
    ImageError,
    StudyImages,
    equalise,
    exposed_field,
    load_studies,
    random_crop_box,
    read_header,
    read_image,
    resize,
    study_from,
    to_image,
)
from medxray.data.phantom import generate
from medxray.data.readers import READERS
from medxray.data.transforms import cut, normalise
from medxray.spec import DataSpec


def gradient(height: int, width: int, peak: int, dtype: type) -> np.ndarray:
    return np.linspace(0, peak, height * width).round().reshape(height, width).astype(dtype)


# Raster files


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_files_keep_every_value(tmp_path: Path, suffix: str) -> None:
    array = gradient(64, 50, 65535, np.uint16)
    Image.fromarray(array).save(tmp_path / f"x.{suffix}")
    image = read_image(tmp_path / f"x.{suffix}")
    assert image.dtype == np.float32 and image.shape == (1, 64, 50)
    np.testing.assert_array_equal(np.round(image[0] * 65535).astype(np.uint16), array)


def test_12_bits_in_a_16_bit_file_are_scaled_by_4095(tmp_path: Path) -> None:
    array = gradient(64, 64, 4000, np.uint16)
    Image.fromarray(array).save(tmp_path / "x.png")
    np.testing.assert_allclose(read_image(tmp_path / "x.png")[0], array / 4095, atol=1e-7)


def test_8_bit_png_is_divided_by_255(tmp_path: Path) -> None:
    array = gradient(16, 16, 90, np.uint8)
    Image.fromarray(array).save(tmp_path / "x.png")
    np.testing.assert_array_equal(read_image(tmp_path / "x.png")[0], array.astype(np.float32) / np.float32(255))


def test_every_mode_of_one_gray_image_reads_the_same(tmp_path: Path) -> None:
    array = gradient(20, 30, 255, np.uint8)
    gray = Image.fromarray(array)
    alpha = Image.fromarray(np.full_like(array, 7))
    for mode, image in {
        "L": gray,
        "RGB": gray.convert("RGB"),
        "P": gray.convert("P"),
        "LA": Image.merge("LA", [gray, alpha]),
        "RGBA": Image.merge("RGBA", [gray, gray, gray, alpha]),
    }.items():
        assert image.mode == mode
        image.save(tmp_path / f"{mode}.png")
        np.testing.assert_array_equal(read_image(tmp_path / f"{mode}.png"), read_image(tmp_path / "L.png"), mode)


def test_colour_becomes_luma(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "red.png")
    np.testing.assert_allclose(read_image(tmp_path / "red.png"), 0.299, atol=1e-6)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    array = np.zeros((40, 60), np.uint8)
    array[:20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: to be shown rotated by 90 degrees clockwise
    Image.fromarray(array).save(tmp_path / "x.jpg", exif=exif, quality=95)
    image = read_image(tmp_path / "x.jpg")[0]
    assert image.shape == (60, 40)
    assert image[:, 25:].mean() > 0.95 and image[:, :15].mean() < 0.05


def test_name_says_nothing_about_content(tmp_path: Path, write_dicom: Callable[..., Path]) -> None:
    array = gradient(16, 16, 4095, np.uint16)
    path = write_dicom(tmp_path / "x.dcm", array, 12).rename(tmp_path / "x.png")
    np.testing.assert_allclose(read_image(path)[0], array / 4095, atol=1e-7)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_every_orientation_in_every_format(tmp_path: Path, suffix: str, orientation: int) -> None:
    array = np.zeros((40, 60), np.uint8)
    array[:20, :30], array[:20, 30:], array[20:, :30] = 250, 150, 60
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(array).save(tmp_path / f"x.{suffix}", exif=exif, quality=95)
    shown = {
        1: array, 2: array[:, ::-1], 3: array[::-1, ::-1], 4: array[::-1],
        5: array.T, 6: array.T[:, ::-1], 7: array[::-1, ::-1].T, 8: array.T[::-1],
    }[orientation]  # fmt: skip
    image = read_image(tmp_path / f"x.{suffix}")[0]
    assert abs(image - shown / 255).max() < 0.06
    header = read_header(tmp_path / f"x.{suffix}")
    assert (header.height, header.width) == image.shape


def test_twelve_bits_in_jpeg_2000(tmp_path: Path) -> None:
    """Its header tells the bits, so white does not depend on the brightest pixel."""
    from openjpeg.utils import encode_array

    array = gradient(64, 70, 900, np.uint16)
    for bits in (10, 12, 16):
        (tmp_path / "x.j2k").write_bytes(encode_array(array, bits_stored=bits, photometric_interpretation=2))
        white = 1023 if bits == 16 else 2**bits - 1
        np.testing.assert_allclose(read_image(tmp_path / "x.j2k")[0], array / white, atol=1e-7)
        assert read_header(tmp_path / "x.j2k").bits == bits


@pytest.mark.parametrize("suffix", ["png", "tif", "jp2"])
@pytest.mark.parametrize("channels", [3, 4])
def test_sixteen_bits_of_colour_keep_their_depth(tmp_path: Path, suffix: str, channels: int) -> None:
    cv2 = pytest.importorskip("cv2")
    y, x = np.mgrid[0:64, 0:80]
    array = np.stack([30000 + 300 * x, 20000 + 500 * y, 9000 + 3 * x * y, 99 * x][:channels], -1).astype(np.uint16)
    assert cv2.imwrite(str(tmp_path / f"x.{suffix}"), array)
    expected = array[..., 2::-1] @ np.array([0.299, 0.587, 0.114]) / 65535
    lossy = 1e-3 if suffix == "jp2" else 1e-6
    np.testing.assert_allclose(read_image(tmp_path / f"x.{suffix}")[0], expected, atol=lossy)
    assert read_header(tmp_path / f"x.{suffix}").bits == 16


def test_sixteen_bits_of_gray_with_alpha(tmp_path: Path) -> None:
    """A gray PNG of 16 bits with alpha: the same bytes as one of 8 bits in four channels, but for its header."""
    pytest.importorskip("cv2")
    gray = gradient(30, 20, 65535, np.uint16)
    content = np.stack([gray >> 8, gray & 255, gray * 0 + 3, gray * 0 + 7], -1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(content).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[24:26] = bytes([16, 4])
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    np.testing.assert_allclose(read_image(bytes(data))[0], gray / 65535, atol=1e-6)


def test_without_opencv_sixteen_bits_of_colour_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cv2 = pytest.importorskip("cv2")
    cv2.imwrite(str(tmp_path / "x.png"), np.zeros((4, 4, 3), np.uint16))
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImageError, match=r"x.png: colour or alpha of 16 bits .* install medxray\[opencv\], or store"):
        read_image(tmp_path / "x.png")


def test_cmyk_and_colour_jpeg(tmp_path: Path) -> None:
    y, x = np.mgrid[0:64, 0:64]
    rgb = np.stack([128 + 90 * np.sin(x / 9), 128 + 90 * np.cos(y / 7), 60 + x + y], -1).astype(np.uint8)
    luma = rgb @ np.array([0.299, 0.587, 0.114]) / 255
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=98)
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "cmyk.tif")
    Image.fromarray(rgb).save(tmp_path / "rgb.jpg", quality=98)
    for name, format, photometric in (
        ("cmyk.jpg", "JPEG", "CMYK"), ("cmyk.tif", "TIFF", "CMYK"), ("rgb.jpg", "JPEG", "RGB")
    ):  # fmt: skip
        assert abs(read_image(tmp_path / name)[0] - luma).max() < 0.02, name
        header = read_header(tmp_path / name)
        assert (header.format, header.photometric, header.bits) == (format, photometric, 8)


def test_colour_jpeg_is_within_a_level_of_its_luma(shared: Path) -> None:
    """Only its brightness is decoded, a third of the time; gray that was stored in colour stays what it was."""
    path = sorted((shared / "data" / "large").glob("*.jpg"))[0]
    gray = Image.open(path)
    buffer = io.BytesIO()
    gray.convert("RGB").save(buffer, "JPEG", quality=92)
    whole = np.asarray(Image.open(buffer)) @ np.array([0.299, 0.587, 0.114])
    assert abs(read_image(buffer.getvalue())[0] * 255 - whole).max() <= 1.01


def test_the_first_of_several_pages(tmp_path: Path) -> None:
    first, second = (Image.new("L", (8, 9), value) for value in (51, 102))
    first.save(tmp_path / "x.tif", save_all=True, append_images=[second])
    np.testing.assert_allclose(read_image(tmp_path / "x.tif", frame="first"), 0.2, atol=1e-7)
    assert read_header(tmp_path / "x.tif").frames == 2


@pytest.mark.parametrize(
    ("suffix", "mode", "bits", "photometric"),
    [
        ("png", "1", 1, "MONOCHROME2"), ("png", "L", 8, "MONOCHROME2"), ("png", "I;16", 16, "MONOCHROME2"),
        ("png", "P", 8, "PALETTE COLOR"), ("png", "RGBA", 8, "RGB"), ("tif", "I;16", 16, "MONOCHROME2"),
        ("tif", "F", 32, "MONOCHROME2"), ("jpg", "L", 8, "MONOCHROME2"), ("jp2", "L", 8, "MONOCHROME2"),
        ("bmp", "L", 8, "PALETTE COLOR"),
    ],
)  # fmt: skip
def test_headers(tmp_path: Path, suffix: str, mode: str, bits: int, photometric: str) -> None:
    Image.new(mode, (50, 40)).save(tmp_path / f"x.{suffix}")
    header = read_header(tmp_path / f"x.{suffix}")
    formats = {"png": "PNG", "tif": "TIFF", "jpg": "JPEG", "jp2": "JPEG2000", "bmp": "BMP"}
    assert (header.width, header.height, header.frames, header.format) == (50, 40, 1, formats[suffix])
    assert header.bits == bits and (suffix == "bmp" or header.photometric == photometric)
    assert (header.manufacturer, header.view, header.burned_in) == ("", "unknown", None)
    assert read_header((tmp_path / f"x.{suffix}").read_bytes()) == header


def test_a_header_needs_no_pixels(tmp_path: Path) -> None:
    for suffix in ("png", "jpg", "tif", "jp2"):
        noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"x.{suffix}")
        data = (tmp_path / f"x.{suffix}").read_bytes()
        header = read_header(tmp_path / f"x.{suffix}")
        assert read_header(data[: len(data) * 4 // 5]) == header
        with pytest.raises(ImageError):
            read_image(data[: len(data) * 4 // 5])


def test_headers_of_nothing(tmp_path: Path) -> None:
    for name, content in (("empty", b""), ("text", b"not pixels")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=f"{name}: (empty|not an image)"):
            read_header(tmp_path / name)
    with pytest.raises(ImageError, match="no such file"):
        read_header(tmp_path / "gone.png")


def test_no_rights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "x.png").touch()
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ImageError, match=r"x.png: cannot be opened .Permission denied.*check its kind and rights"):
        read_image(tmp_path / "x.png")


# The collimator's border and contrast


@pytest.fixture(scope="module")
def chests(tmp_path_factory: pytest.TempPathFactory) -> list[np.ndarray]:
    root = generate(tmp_path_factory.mktemp("chests") / "data", studies=12, size=256, seed=2, progress=False)
    found = [read_image(path) for path in sorted((root / "images").rglob("*.png"))]
    fields = [exposed_field(chest) for chest in found]
    # Some are drawn with a border.
    return [chest[:, f.top : f.top + f.height, f.left : f.left + f.width] for chest, f in zip(found, fields, strict=True)]


@pytest.mark.parametrize("level", [0.0, 0.04, 1.0])
@pytest.mark.parametrize("edges", [(20, 0, 0, 0), (0, 33, 0, 0), (10, 12, 0, 17), (40, 40, 40, 40), (60, 8, 50, 70)])
def test_a_drawn_border_is_found(chests: list[np.ndarray], level: float, edges: tuple[int, ...]) -> None:
    top, bottom, left, right = edges
    rng = np.random.default_rng(0)
    for chest in chests:
        whole = exposed_field(chest)
        assert whole == (0, 0, *chest.shape[1:])
        framed = np.clip(level + rng.normal(0, 0.005, chest.shape), 0, 1).astype(np.float32)
        H, W = chest.shape[1:]
        # Inside a collimator something is seen: the phantom's own air is not black.
        inside = np.clip(0.2 + 0.6 * chest, 0, 1)
        framed[:, top : H - bottom, left : W - right] = inside[:, top : H - bottom, left : W - right]
        # A marker beside the field.
        framed[:, 2:6, 2:8] = 0.5
        assert exposed_field(framed) == (top, left, H - top - bottom, W - left - right)


def test_a_border_survives_jpeg_and_size(chests: list[np.ndarray]) -> None:
    framed = np.zeros((1, 400, 500), np.float32)
    H, W = chests[0].shape[1:]
    framed[:, 50 : 50 + H, 100 : 100 + W] = 0.2 + 0.6 * chests[0]
    buffer = io.BytesIO()
    Image.fromarray((framed[0] * 255).astype(np.uint8)).resize((1000, 800)).save(buffer, "JPEG", quality=75)
    found = exposed_field(read_image(buffer.getvalue()))
    assert np.abs(np.array(found) - np.array([100, 200, 2 * H, 2 * W])).max() <= 4


def test_what_is_no_border_is_kept(chests: list[np.ndarray]) -> None:
    y, x = np.mgrid[0:200, 0:160]
    body = ((x - 80) ** 2 / 60**2 + (y - 130) ** 2 / 110**2 < 1).astype(np.float32)
    for image in (np.zeros((1, 50, 60)), np.ones((1, 1, 1)), body[None] * 0.7, (y / 199)[None], chests[0].transpose(0, 2, 1)):
        assert exposed_field(image.astype(np.float32)) == (0, 0, *image.shape[1:])
    tilted = np.zeros((200, 160), np.float32)
    tilted[y + x * 0.2 > 60] = 0.6
    assert exposed_field(tilted[None]) == (0, 0, 200, 160)


def test_few_real_radiographs_have_a_border_and_none_loses_what_it_shows(shared: Path) -> None:
    """Looked at one by one, those that are cut have one; what is cut off is of one level but for markers."""
    files = sorted((shared / "data" / "iu_xray" / "images").rglob("*.jpg"))[::8]
    assert len(files) > 500
    cut_ones = 0
    for file in files:
        image = read_image(file)
        top, left, height, width = exposed_field(image)
        cut_ones += (height, width) != image.shape[1:]
        assert height * width > 0.5 * image[0].size, file
        for line in (*image[0, :top], *image[0, top + height :], *image[0, :, :left].T, *image[0, :, left + width :].T):
            assert np.mean(np.abs(line - np.median(line)) > 0.13) < 0.12, file
    assert 0 < cut_ones < 0.09 * len(files)


def test_border_and_contrast_are_settings(tmp_path: Path, chests: list[np.ndarray]) -> None:
    framed = np.zeros((1, 300, 300), np.float32)
    H, W = chests[0].shape[1:]
    framed[:, 20 : 20 + H, 30 : 30 + W] = 0.2 + 0.6 * chests[0]
    levels = np.round(framed[0] * 255).astype(np.uint8)
    Image.fromarray(levels).save(tmp_path / "a.png")
    (tmp_path / "studies.csv").write_text("path,study_id,split\na.png,s,train\n")
    plain = read_image(tmp_path / "a.png")
    inner = plain[:, 20 : 20 + H, 30 : 30 + W]
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", border="crop"), inner)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", border="crop", clahe=2.0), equalise(inner, 2.0))
    np.testing.assert_array_equal(to_image(levels, border="crop", clahe=2.0), equalise(inner, 2.0))
    reader = READERS.settings_of("csv")(name="csv", root=str(tmp_path))
    kept: dict[str, Any] = {"channels": 1, "mean": (0.0,), "std": (1.0,)}
    spec = DataSpec(reader=reader, image_size=64, border="crop", clahe=2.0)
    studies = load_studies(spec)
    images = StudyImages(
        studies.splits["train"], tmp_path, spec, labels=[], seed=0, train=False, max_views=1, **kept
    )
    expected = resize(equalise(inner, 2.0), 64)
    torch.testing.assert_close(images[0].pixels[0], expected)
    # A file, its bytes and its pixels are shown alike at prediction.
    for value in (tmp_path / "a.png", (tmp_path / "a.png").read_bytes(), levels):
        torch.testing.assert_close(study_from(value, spec, **kept).pixels[0], expected)
    plainly = StudyImages(
        studies.splits["train"], tmp_path, DataSpec(reader=reader), labels=[], seed=0, train=False, max_views=1, **kept
    )
    assert plainly.stamp("a.png") == plainly.reader.stamp("a.png") != images.stamp("a.png")
    assert json.loads(spec.model_dump_json())["frames"] == "refuse"


def test_equalisation_equals_opencv() -> None:
    cv2 = pytest.importorskip("cv2")
    y, x = np.mgrid[0:1024, 0:1280]
    array = (100 + 60 * np.sin(x / 200) * np.cos(y / 160) + np.random.default_rng(0).normal(0, 8, x.shape)).astype(np.uint8)
    for limit in (1.0, 2.0, 4.0, 40.0):
        theirs = cv2.createCLAHE(clipLimit=limit, tileGridSize=(8, 8)).apply(array)
        ours = equalise((array / 255).astype(np.float32)[None], limit)[0] * 255
        # OpenCV rounds each tile's table to whole levels and puts what is cut off back in whole pixels.
        assert np.abs(ours - theirs).max() <= 4 and np.abs(ours - theirs).mean() < 1, limit


def test_equalisation_keeps_depth_and_range() -> None:
    rng = np.random.default_rng(0)
    image = (0.4 + 0.02 * rng.random((1, 100, 90))).astype(np.float32)
    result = equalise(image, 3.0)
    assert result.shape == image.shape and result.dtype == np.float32 and 0 <= result.min() <= result.max() <= 1
    assert result.std() > 1.5 * image.std()
    image[0, 50, 45] += 0.0003  # a tenth of one of 8 bits' levels
    assert equalise(image, 3.0)[0, 50, 45] > result[0, 50, 45] + 1e-4
    for small in ((1, 1, 1), (1, 3, 9)):
        assert equalise(np.full(small, 0.5, np.float32), 2.0).shape == small


# Arrays


@pytest.mark.parametrize("shape", [(5, 6), (1, 5, 6), (5, 6, 1), (5, 6, 3), (5, 6, 4), (3, 5, 6)])
def test_array_shapes(shape: tuple[int, ...]) -> None:
    image = to_image(np.full(shape, 51, np.uint8))
    assert image.shape == (1, 5, 6) and image.dtype == np.float32
    np.testing.assert_allclose(image, 0.2, atol=1e-7)


def test_arrays_tensors_and_pil_images_agree() -> None:
    array = gradient(12, 10, 255, np.uint8)
    expected = array[None].astype(np.float32) / np.float32(255)
    for value in (array, torch.from_numpy(array), Image.fromarray(array), expected, expected.astype(np.float64)):
        np.testing.assert_array_equal(to_image(value), expected)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.full((4, 4), 17.0), r"floats from 17 to 17; expected \[0, 1\]; divide"),
        (np.full((4, 4), np.nan), r"floats from nan .*expected \[0, 1\]"),
        (np.full((4, 4), -3, np.int16), "holds -3; expected no negative integers"),
        (np.zeros((2, 2, 4, 4)), r"shape \(2, 2, 4, 4\).*expected \(H, W\)"),
        (np.zeros((0, 4)), "at least one pixel"),
        (np.array([["a"]]), "expected integers or floats"),
        (42, "expected a path, array, tensor or PIL image, found int"),
    ],
)
def test_arrays_that_are_no_images(value: object, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        to_image(value)


# Real DICOM


def test_every_real_dicom_reads(shared: Path) -> None:
    files = sorted((shared / "data" / "dicom_chest").glob("*.dcm"))
    assert len(files) == 7
    for file in files:
        image = read_image(file)
        header = pydicom.dcmread(file, force=True, stop_before_pixels=True)
        assert image.shape == (1, header.Rows, header.Columns) and image.dtype == np.float32
        assert 0 <= image.min() < 0.2 and 0.9 < image.max() <= 1


def test_real_polarity(shared: Path) -> None:
    folder = shared / "data" / "dicom_chest"
    right, wrong = (
        read_image(folder / f"rsna_pneumonia_16d7f894_{end}.dcm")
        for end in ("MONOCHROME2_8bit_jpeg", "relabelled_MONOCHROME1")
    )
    np.testing.assert_allclose(wrong, 1 - right, atol=1e-6)
    names = ("CR-MONO1-10-chest_10bit_explicitLE", "WG04_RG1_chest_MONOCHROME1_15bit_j2k")
    for image in (right, *(read_image(folder / f"{name}.dcm") for name in names)):
        # The spine and heart are brighter than the middle of either lung.
        _, H, W = image.shape
        rows = image[0, int(0.35 * H) : int(0.5 * H)]
        middle = rows[:, int(0.47 * W) : int(0.53 * W)].mean()
        assert middle > rows[:, int(0.2 * W) : int(0.3 * W)].mean()
        assert middle > rows[:, int(0.7 * W) : int(0.8 * W)].mean()


def test_real_dicom_without_meta_information_equals_its_twin(shared: Path) -> None:
    folder = shared / "data" / "dicom_chest"
    np.testing.assert_array_equal(
        read_image(folder / "CR-MONO1-10-chest_no_file_meta.dcm"),
        read_image(folder / "CR-MONO1-10-chest_10bit_explicitLE.dcm"),
    )


# Sizes


def test_resize_shapes_and_range() -> None:
    image = np.random.default_rng(0).random((1, 50, 80), np.float32)
    for size, shape in ((32, (1, 32, 32)), ([20, 40], (1, 20, 40)), (100, (1, 100, 100))):
        for fit in ("stretch", "pad"):
            small = resize(image, size, fit)
            assert small.shape == shape and small.dtype == torch.float32
            assert small.min() >= 0 and small.max() <= 1


@pytest.mark.parametrize(
    ("shape", "size"), [((2500, 2048), (1280, 1280)), ((1955, 1841), (224, 224)), ((777, 300), (512, 640)),
                        ((101, 640), (100, 64)), ((300, 90), (7, 8)), ((64, 64), (64, 32)), ((50, 80), (90, 33))]
)  # fmt: skip
def test_resize_equals_torch(shape: tuple[int, int], size: tuple[int, int]) -> None:
    image = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    torch.testing.assert_close(resize(image, list(size)), expected, rtol=0, atol=1e-6)
    part = image[:, 3 : shape[0] // 2, 2 : shape[1] // 3]
    expected = F.interpolate(part[None], size, mode="bilinear", antialias=True)[0]
    torch.testing.assert_close(resize(part, list(size)), expected, rtol=0, atol=1e-6)


def test_resize_antialiases() -> None:
    stripes = np.tile(np.array([0, 1], np.float32), (1, 64, 32))
    assert (resize(stripes, 8) - 0.5).abs().max() < 0.1


def test_pad_keeps_the_aspect_ratio() -> None:
    padded = resize(np.ones((1, 100, 50), np.float32), 40, "pad")[0]
    torch.testing.assert_close(padded[:, 10:30], torch.ones(40, 20))
    assert padded[:, :10].max() == 0 and padded[:, 30:].max() == 0


def test_resize_does_not_depend_on_threads() -> None:
    image = np.random.default_rng(0).random((1, 300, 200), np.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = resize(image, 128)
        torch.set_num_threads(2)
        assert torch.equal(one, resize(image, 128))
    finally:
        torch.set_num_threads(threads)


def test_crop_box_follows_its_seed_and_keeps_its_share() -> None:
    boxes = [random_crop_box(seed, 0.6) for seed in range(200)]
    assert boxes == [random_crop_box(seed, 0.6) for seed in range(200)]
    assert len(set(boxes)) == 200
    areas = [box.height * box.width for box in boxes]
    assert min(areas) >= 0.6 and min(areas) < 0.65 and max(areas) > 0.95
    for box in boxes:
        assert 0 <= box.top <= 1 - box.height and 0 <= box.left <= 1 - box.width
    assert random_crop_box(3, 1.0) == (0, 0, 1, 1)
    same = [random_crop_box(seed, 0.49, 0.49) for seed in range(50)]
    assert all(box.height == box.width == pytest.approx(0.7) for box in same) and len({box.left for box in same}) == 50


def test_cut_takes_the_box() -> None:
    image = np.arange(100, dtype=np.float32).reshape(1, 10, 10)
    part = cut(image, random_crop_box(1, 0.25))
    top, left = np.argwhere(image[0] == part[0, 0, 0])[0]
    np.testing.assert_array_equal(part[0], image[0, top : top + part.shape[1], left : left + part.shape[2]])


def test_normalise() -> None:
    pixels = torch.full((1, 2, 2), 0.5)
    assert normalise(pixels, 1, (0.5,), (0.25,)).equal(torch.zeros(1, 2, 2))
    three = normalise(pixels, 3, (0.5, 0.25, 0.0), (1.0, 1.0, 0.5))
    assert three[:, 0, 0].tolist() == [0, 0.25, 1]
