import os
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut

from medxray.data import ImageError, random_crop_box, read_image, resize, to_image
from medxray.data.transforms import cut, normalise

SHARED = Path(os.environ.get("MEDXRAY_SHARED", Path(__file__).parents[2].parent / "shared"))
DICOM = SHARED / "data" / "dicom_chest"


def gradient(height: int, width: int, peak: int, dtype: type) -> np.ndarray:
    return np.linspace(0, peak, height * width).round().reshape(height, width).astype(dtype)


def write_dicom(path: Path, array: np.ndarray, bits: int, **fields: object) -> Path:
    """A minimal explicit little endian DICOM file; fields of value None are left out."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = pydicom.uid.UID("1.2.3.4")
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID = meta.MediaStorageSOPClassUID
    data.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    allocated = array.dtype.itemsize * 8
    values = {
        "Rows": array.shape[0],
        "Columns": array.shape[1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": allocated,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": int(array.dtype.kind == "i"),
        "PixelData": array.tobytes(),
        **fields,
    }
    for name, value in values.items():
        if value is not None:
            setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return path


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


def test_name_says_nothing_about_content(tmp_path: Path) -> None:
    array = gradient(16, 16, 4095, np.uint16)
    path = write_dicom(tmp_path / "x.dcm", array, 12).rename(tmp_path / "x.png")
    np.testing.assert_allclose(read_image(path)[0], array / 4095, atol=1e-7)


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


# DICOM


def test_dicom_without_window_is_scaled_by_its_bits(tmp_path: Path) -> None:
    array = gradient(32, 32, 3000, np.uint16)
    path = write_dicom(tmp_path / "x.dcm", array, 12)
    np.testing.assert_allclose(read_image(path)[0], array / 4095, atol=1e-7)


@pytest.mark.parametrize("function", [None, "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("rescale", [(None, None), (2.0, -100.0)])
def test_window_equals_pydicom(tmp_path: Path, function: str | None, rescale: tuple[float, float]) -> None:
    array = gradient(64, 64, 4095, np.uint16)
    path = write_dicom(
        tmp_path / "x.dcm",
        array,
        12,
        WindowCenter=[1800, 5],
        WindowWidth=[2500, 7],
        VOILUTFunction=function,
        RescaleSlope=rescale[0],
        RescaleIntercept=rescale[1],
    )
    data = pydicom.dcmread(path)
    shown = apply_voi_lut(apply_modality_lut(data.pixel_array, data), data)
    ends = np.array([0, 4095]) * (rescale[0] or 1) + (rescale[1] or 0)
    expected = (shown - ends[0]) / (ends[1] - ends[0])
    np.testing.assert_allclose(read_image(path)[0], expected, atol=1e-6)


def test_signed_pixels_with_a_window(tmp_path: Path) -> None:
    array = gradient(32, 32, 2000, np.int16) - np.int16(1000)
    path = write_dicom(tmp_path / "x.dcm", array, 16, WindowCenter=0, WindowWidth=2001)
    np.testing.assert_allclose(read_image(path)[0], (array + 0.5) / 2000 + 0.5, atol=1e-3)


def test_voi_lut_equals_pydicom(tmp_path: Path) -> None:
    array = gradient(32, 32, 255, np.uint8)
    item = pydicom.Dataset()
    item.LUTDescriptor = [256, 0, 10]
    item.LUTData = (np.arange(256, dtype=np.uint16)[::-1] * 4).tolist()
    item["LUTDescriptor"].VR, item["LUTData"].VR = "US", "US"
    path = write_dicom(tmp_path / "x.dcm", array, 8, VOILUTSequence=pydicom.Sequence([item]))
    expected = apply_voi_lut(array, pydicom.dcmread(path)) / 1023
    assert expected[0, 0] > 0.9 > 0.1 > expected[-1, -1]
    np.testing.assert_allclose(read_image(path)[0], expected, atol=1e-6)


def test_monochrome1_is_the_inverse_of_monochrome2(tmp_path: Path) -> None:
    array = gradient(32, 32, 4095, np.uint16)
    window = {"WindowCenter": 2000, "WindowWidth": 3000}
    two = read_image(write_dicom(tmp_path / "2.dcm", array, 12, **window))
    one = read_image(write_dicom(tmp_path / "1.dcm", array, 12, **window, PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_allclose(one, 1 - two, atol=1e-6)


def test_deflated_dicom_reads_the_same(tmp_path: Path) -> None:
    array = gradient(32, 32, 4095, np.uint16)
    plain = write_dicom(tmp_path / "x.dcm", array, 12)
    data = pydicom.dcmread(plain)
    data.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    data.save_as(tmp_path / "deflated.dcm", enforce_file_format=True)
    assert (tmp_path / "deflated.dcm").read_bytes() != plain.read_bytes()
    np.testing.assert_array_equal(read_image(tmp_path / "deflated.dcm"), read_image(plain))


real = pytest.mark.skipif(not DICOM.is_dir(), reason=f"real radiographs are absent: {DICOM}")


@real
def test_every_real_dicom_reads() -> None:
    files = sorted(DICOM.glob("*.dcm"))
    assert len(files) == 7
    for file in files:
        image = read_image(file)
        header = pydicom.dcmread(file, force=True, stop_before_pixels=True)
        assert image.shape == (1, header.Rows, header.Columns) and image.dtype == np.float32
        assert 0 <= image.min() < 0.2 and 0.9 < image.max() <= 1


@real
def test_real_polarity() -> None:
    right, wrong = (
        read_image(DICOM / f"rsna_pneumonia_16d7f894_{end}.dcm")
        for end in ("MONOCHROME2_8bit_jpeg", "relabelled_MONOCHROME1")
    )
    np.testing.assert_allclose(wrong, 1 - right, atol=1e-6)
    names = ("CR-MONO1-10-chest_10bit_explicitLE", "WG04_RG1_chest_MONOCHROME1_15bit_j2k")
    for image in (right, *(read_image(DICOM / f"{name}.dcm") for name in names)):
        # The spine and heart are brighter than the middle of either lung.
        _, H, W = image.shape
        rows = image[0, int(0.35 * H) : int(0.5 * H)]
        middle = rows[:, int(0.47 * W) : int(0.53 * W)].mean()
        assert middle > rows[:, int(0.2 * W) : int(0.3 * W)].mean()
        assert middle > rows[:, int(0.7 * W) : int(0.8 * W)].mean()


@real
def test_real_dicom_without_meta_information_equals_its_twin() -> None:
    np.testing.assert_array_equal(
        read_image(DICOM / "CR-MONO1-10-chest_no_file_meta.dcm"),
        read_image(DICOM / "CR-MONO1-10-chest_10bit_explicitLE.dcm"),
    )


# Sizes


def test_resize_shapes_and_range() -> None:
    image = np.random.default_rng(0).random((1, 50, 80), np.float32)
    for size, shape in ((32, (1, 32, 32)), ([20, 40], (1, 20, 40)), (100, (1, 100, 100))):
        for fit in ("stretch", "pad"):
            small = resize(image, size, fit)
            assert small.shape == shape and small.dtype == torch.float32
            assert small.min() >= 0 and small.max() <= 1


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
